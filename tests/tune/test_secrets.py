"""The password of a storage is in nothing that a tuning run writes or prints."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bratune.cli import Ended, run
from bratune.cli.options import command_line

SECRET = "hunter2secret"


@pytest.mark.parametrize("option", [["--storage", "{}"], ["--storage={}"], ["--join", "{}"]])
def test_the_command_that_goes_on_has_no_password(option: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"postgresql://me:{SECRET}@host:5432/studies"
    monkeypatch.setattr(sys, "argv", ["bratune", "tune", *(word.format(url) for word in option), "-b", "1"])
    assert SECRET not in command_line()
    assert "postgresql://me@host:5432/studies" in command_line()
    assert command_line().endswith("-b 1")


@pytest.mark.parametrize("end", [KeyboardInterrupt(), Ended(signal.SIGTERM)])
@pytest.mark.parametrize("option", [["--storage", "{}"], ["--storage={}"], ["--join", "{}"]])
def test_an_interrupted_run_says_no_password(
    option: list[str],
    end: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise end

    monkeypatch.setattr("bratune.cli.tune.command.callback", interrupted)
    url = f"postgresql://me:{SECRET}@host:5432/studies"
    assert run(["tune", *(word.format(url) for word in option)]) == 130
    said = capsys.readouterr().err
    assert SECRET not in said
    assert "postgresql://me@host:5432/studies" in said


@pytest.mark.parametrize("option", ["--storage", "--join"])
def test_settings_are_shown_without_the_password(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"postgresql://me:{SECRET}@host/studies"
    asked = ["tune", "--dump-config"]
    if option == "--storage":
        monkeypatch.setenv("BRATUNE_STORAGE", url)
    else:
        asked += [option, url]
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert SECRET not in said
    assert "postgresql://me@host/studies" in said


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


@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="where Linux is not, nothing can be hidden"
)
@pytest.mark.parametrize(
    "url", [f"postgresql://me:{SECRET}@host/studies", f"postgresql://host/studies?user=me&password={SECRET}"]
)
def test_the_title_of_the_process_shows_no_password(url: str) -> None:
    code = (
        "from pathlib import Path; from bratune.cli import hide_passwords; hide_passwords(); "
        "print(Path('/proc/self/cmdline').read_bytes().split(b'\\0'))"
    )
    words = ["tune", "--storage", url, f"--join={url}", "-b", "1"]
    out = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    ).stdout
    assert SECRET not in out
    assert url.replace(SECRET, "*" * len(SECRET)) in out
    assert out.rstrip().endswith("b'-b', b'1', b'']")
