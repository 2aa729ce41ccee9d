"""Texts from files are shown as they are, and nothing obeys them."""

from __future__ import annotations

import pytest

from bratune.cli import run
from bratune.errors import UsageError
from bratune.machine import _named_key
from bratune.tables import Note, Table, to_csv, to_markdown, to_text
from bratune.text import for_spreadsheet, is_name, one_line, printable

CLEAR_SCREEN = "\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe ☃", "größe ☃"),
        (CLEAR_SCREEN, r"\x1b[2J"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b2J\u2028", r"\x9b2J\u2028"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_is_not_printed_is_spelled_out(text: str, shown: str) -> None:
    assert one_line(text) == shown
    one_line(text).encode("utf-8")


def test_lines_of_a_message_stay_lines() -> None:
    assert printable(f"a\n{CLEAR_SCREEN}b") == "a\n\\x1b[2Jb"


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_of_csv_is_no_formula(text: str) -> None:
    line = to_csv(["a"], [[text]]).splitlines()[1]
    assert line.strip('"')[0] in "'\\"


@pytest.mark.parametrize("value", ["-2", "1,4,16,-2", "-1.5e-3", "+3", -2, -1.5, "a=b"])
def test_numbers_and_plain_texts_of_csv_are_as_they_were(value: object) -> None:
    assert to_csv(["a"], [[value]]).splitlines()[1].strip('"') == str(value)
    assert for_spreadsheet("x") == "x"


def test_tables_show_no_escape_and_keep_their_rows() -> None:
    table = Table(
        ("<name", "ms"),
        ((f"a{CLEAR_SCREEN}", "1\n2"), Note(("b",), f"why\n{CLEAR_SCREEN}")),
        f"t{CLEAR_SCREEN}",
    )
    for text in (to_text(table), to_markdown(table)):
        assert "\x1b" not in text
        assert r"1\n2" in text


def test_an_error_that_quotes_a_name_shows_no_escape(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([f"prof{CLEAR_SCREEN}"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "a\n", "-o"])
def test_names_that_would_lead_elsewhere_are_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_name(name)
    monkeypatch.setenv("BRATUNE_GPU_NAME", name)
    if name:
        with pytest.raises(UsageError, match="BRATUNE_GPU_NAME is"):
            _named_key()
