"""The password of a storage is in nothing that a tuning run writes or prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bratune.cli import run
from bratune.cli.tune import _again

SECRET = "hunter2secret"


@pytest.mark.parametrize("option", [["--storage", "{}"], ["--storage={}"], ["--join", "{}"]])
def test_the_command_that_goes_on_has_no_password(option: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"postgresql://me:{SECRET}@host:5432/studies"
    monkeypatch.setattr(sys, "argv", ["bratune", "tune", *(word.format(url) for word in option), "-b", "1"])
    assert SECRET not in _again()
    assert "postgresql://me@host:5432/studies" in _again()
    assert _again().endswith("-b 1")


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_run_that_cannot_reach_its_storage_shows_and_leaves_no_password(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"postgresql://me:{SECRET}@127.0.0.1:1/studies"
    asked = ["tune", "--device", "cpu", "--no-isolate", "--no-install", "-o", str(tmp_path / "run")]
    if by == "option":
        asked += ["--storage", url]
    else:
        monkeypatch.setenv("BRATUNE_STORAGE", url)
    monkeypatch.setattr(sys, "argv", ["bratune", *asked])
    assert run(asked) == 1
    said = capfd.readouterr()
    assert "cannot be opened" in said.err or "psycopg" in said.err
    assert SECRET not in said.out + said.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_text(errors="replace"), path
