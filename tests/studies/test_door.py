"""Every study stands behind one door, which has the manners of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from bratune.cli import run
from bratune.studies.__main__ import STUDIES, studies

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"], group=studies, name="studies") == 0
    assert f"Usage: studies {name}" in capsys.readouterr().out


def test_help_lists_every_study_and_imports_none() -> None:
    code = (
        "import sys\n"
        "from bratune.cli import run\n"
        "from bratune.studies.__main__ import studies\n"
        "run(['--help'], group=studies)\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'optuna'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in STUDIES)


def test_an_unknown_study_and_a_wrong_option_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernls"], group=studies) == 2
    assert "no study is called 'kernls'" in capsys.readouterr().err
    assert run(["scale", "many", "-o", "x"], group=studies) == 2
    error = capsys.readouterr().err
    assert "'many' is not a valid integer" in error
    assert error.count("\n") == 1


def test_every_name_leads_to_a_command() -> None:
    assert all(
        isinstance(studies.get_command(click.Context(studies), name), click.Command) for name in STUDIES
    )
