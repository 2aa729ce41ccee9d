"""The script for machines with a GPU, on a stand-in for python: every step runs, and what failed is named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bratune.cli.profile import command

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "gpu"
# Notes what it was asked for; "-c" are the questions whether a package is there.
PYTHON = """#!/bin/sh
case "$1" in -c) exit 1 ;; esac
echo "$*" >> "$ASKED"
echo "said: $*"
case "$*" in *{failing}*) echo broken >&2; exit 3 ;; esac
"""


def run(
    tmp_path: Path, *words: str, failing: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    here = tmp_path / "checkout"
    (here / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, here / ".ci" / "gpu")
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python3"
    stand_in.write_text(PYTHON.format(failing=failing))
    stand_in.chmod(0o755)
    asked = tmp_path / "asked"
    asked.touch()
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ASKED": str(asked)}
    done = subprocess.run(
        [here / ".ci" / "gpu", *words], env=env, capture_output=True, text=True, check=False
    )
    return done, asked.read_text().splitlines()


@pytest.mark.parametrize("what", ["quick", "models", "tests", "profile", "all"])
def test_every_step_runs_whatever_became_of_the_one_before(what: str, tmp_path: Path) -> None:
    done, asked = run(tmp_path, what, failing="bratune")
    sound, without = run(tmp_path / "sound", what)
    assert (sound.returncode, without) == (0, asked)
    assert "FAILED" not in sound.stdout
    if any("bratune" in line for line in asked):
        assert done.returncode == 1
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        assert len(failures) == sum("bratune" in line for line in asked)
        assert all(line.endswith("exit status 3") for line in failures)


def test_the_output_of_a_step_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    done, asked = run(tmp_path, "models", "kept", failing="biformer_stl")
    folder = tmp_path / "checkout" / "kept"
    assert (folder / "small-224.txt").read_text().startswith("said: -m bratune profile --no-stages")
    assert (folder / "stl-224.txt").read_text().endswith("broken\n")
    assert "FAILED  stl-224: exit status 3" in done.stdout
    assert "-o kept/small-224 --model biformer_small -b 128" in asked[0]


def test_steps_are_chosen_by_name(tmp_path: Path) -> None:
    _, asked = run(tmp_path, "models", "kept", "^tiny-.*-1$")
    assert [line.split(" -o kept/")[1].split()[0] for line in asked] == ["tiny-224-1"]


def test_what_runs_out_of_time_is_interrupted_and_says_what_it_found(tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    assert text.count("timeout --signal INT") == text.count("timeout --") == 1


@pytest.mark.parametrize("what", ["models", "profile"])
def test_every_command_line_is_one_that_profile_takes(what: str, tmp_path: Path) -> None:
    """Parsed by the real command, which then finds no GPU here; a flag that is none would be said first."""
    _, asked = run(tmp_path, what)
    commands = [
        line.removeprefix("-m bratune ").split() for line in asked if line.startswith("-m bratune profile")
    ]
    assert commands
    for words in commands:
        parsed = command.make_context("profile", words[1:], resilient_parsing=False)
        assert not parsed.args


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done, asked = run(tmp_path, "modles")
    assert (done.returncode, asked) == (2, [])
    assert "all, quick, models, tests and profile are" in done.stderr
