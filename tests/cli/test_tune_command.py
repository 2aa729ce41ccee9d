"""`bratune tune` from the command line, on recorded cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from recorded import ASKED, NAMES, record

from bratune.cli import run
from bratune.cli.tune import command
from bratune.errors import UsageError
from bratune.tune.plan import load_plan
from bratune.tune.synthetic import BACKENDS


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the records and the plan of a whole run."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    return folder


def test_replayed_run_gives_the_plan_of_the_recorded_one(recorded: Path, tmp_path: Path) -> None:
    arguments = [*ASKED, "--replay", str(recorded / "rows"), "-o", str(tmp_path), "--format", "json"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    plan, own = load_plan(tmp_path / "plan.json"), load_plan(recorded / "run" / "plan.json")
    assert plan.setting == own.setting
    assert plan.measured == "replayed"
    data = json.loads(result.stdout)
    assert data["plan"]["setting"] == plan.setting.to_dict()
    assert sum(row["picked"] for row in data["front"]) == 1
    assert json.loads((tmp_path / "front.json").read_text()) == data["front"]


@pytest.mark.parametrize("style", ["table", "md", "csv"])
def test_front_is_shown_in_every_format(recorded: Path, tmp_path: Path, style: str) -> None:
    arguments = [*ASKED, "--replay", str(recorded / "rows"), "-o", str(tmp_path), "--format", style]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "S=7 k=1/4/16" in result.stdout
    if style != "csv":
        assert "accuracy: E0" in result.stdout
        assert "replayed on synthetic board" in result.stdout


def test_dry_run_shows_what_is_legal_and_measures_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--device", "cpu", "--dry-run", "-o", str(tmp_path / "x")])
    assert result.exit_code == 0
    assert "S=14 (padding 0%): k in 64" in result.stdout
    assert "tried first: paper: S=7 k=1/4/16" in result.stdout
    (backends,) = {line for line in result.stdout.splitlines() if line.startswith("  backends: ")}
    assert "gather-sdpa, " in backends
    assert "nothing is known about accuracy" in result.stdout
    assert "no published comparison at equal training was found" in result.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpu", "a100"], 2, "--device cpu names this machine's CPU"),
        (["--model", "resnet"], 2, "no model is called 'resnet'"),
        (["--model", "biformer_tiny", "--model", "biformer_small"], 2, "one model, not 2"),
        (["--constraint", "speed>1"], 2, "no number of a record is called 'speed'"),
        (["--objective", "fidelity"], 2, "needs something to measure it on"),
        (["--n-win", "8"], 2, "say something about trained weights"),
        (["--topks", "1,4,16,-2"], 2, "say something about trained weights"),
        (["--allow-more-k"], 2, "--checkpoint names them"),
        (["--checkpoint", "none.pth"], 2, "there is no such file"),
        (["--backend", "fast"], 2, "no backend is called 'fast'"),
        (["--pick", "best"], 2, "no pick rule is called 'best'"),
        (["--pick", "trial:x"], 2, "no pick rule is called 'trial:x'"),
        (["--labels"], 2, "--images DIR is missing"),
        (["--images", "x"], 2, "--images alone judges nothing"),
        (["--train-trials", "3"], 2, "needs pictures to train on"),
        (["--join", "sqlite:///x.db"], 2, "SQLite serves one process only"),
        (["--replay", "nowhere"], 1, "there are no records at nowhere"),
    ],
)
def test_requests_that_cannot_be_met_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert run(["tune", "--device", "cpu", *arguments]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_fixture_backends_are_known_to_the_world() -> None:
    assert set(NAMES) <= set(BACKENDS)


def test_a_busy_machine_is_named_in_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise UsageError("enough")

    monkeypatch.setattr("bratune.measure.health.at_a_glance", lambda machine: f"busy: {machine.kind}")
    monkeypatch.setattr("bratune.tune.session.run", stop)
    result = CliRunner().invoke(command, ["--device", "cpu", "-o", str(tmp_path)])
    assert result.stderr.splitlines()[0] == "busy: cpu"
    assert isinstance(result.exception, UsageError)
