"""docs/laptop.md shows what its commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bratune.cli import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "laptop.md"
SHOWN = re.findall(r"```\n\$ bratune ([^\n]*)\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)


def test_the_page_has_three_commands() -> None:
    assert [command.split()[0] for command, _ in SHOWN] == ["explain", "predict", "tune"]


@pytest.mark.parametrize(("command", "text"), SHOWN, ids=[command.split()[0] for command, _ in SHOWN])
def test_the_page_shows_what_its_commands_print(
    command: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(shlex.split(command)) == 0
    assert _without_versions(capsys.readouterr().out) == _without_versions(text)
    if "--plan-run" in command:
        assert Path("measure.sh").read_text("utf-8").splitlines()[1] in text


def _without_versions(text: str) -> list[str]:
    """The lines, but for the one that says which versions of torch and triton are installed here."""
    return [line for line in text.rstrip().splitlines() if "· torch " not in line]
