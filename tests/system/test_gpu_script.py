"""The script for machines with a GPU, on a stand-in for python: every step runs, and what failed is named.

A dry run follows: every command that the script gives is given to the real program on an H200 that is not
there, as far as its first measurement.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from bratune.cli import run as run_command
from bratune.studies.__main__ import studies

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "gpu"
CUDA_TOOLS = ("compute-sanitizer", "ncu")
# Notes what it was asked for, word by word; "-c" are the questions whether a package is there.
PYTHON = """#!/bin/sh
case "$1" in -c) exit {missing} ;; esac
for word in "$@"; do printf '%s\\0' "$word"; done >> "$ASKED.words"; echo >> "$ASKED.words"
echo "$*" >> "$ASKED"
echo "said: $*"
case "$*" in *{failing}*) echo broken >&2; exit 3 ;; esac
"""


# One of CUDA's tools, which runs what it is given and says so.
TOOL = """#!/bin/sh
echo "$0 $*" >> "$ASKED.tools"
while [ "${1##*/}" != python3 ]; do shift; done
exec "$@"
"""


def run(
    tmp_path: Path, *words: str, failing: str = "nothing", packages: bool = False, tools: bool = False
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    here = tmp_path / "checkout"
    (here / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, here / ".ci" / "gpu")
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python3"
    stand_in.write_text(PYTHON.format(failing=failing, missing=int(not packages)))
    stand_in.chmod(0o755)
    for name in CUDA_TOOLS if tools else ():
        (tmp_path / "bin" / name).write_text(TOOL)
        (tmp_path / "bin" / name).chmod(0o755)
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


def commands(tmp_path: Path, what: str, *, packages: bool = True) -> list[list[str]]:
    """What the script asks of python, where it finds every tool of CUDA, word by word."""
    run(tmp_path, what, packages=packages, tools=True)
    lines = (tmp_path / "asked.words").read_text().splitlines()
    return [line.split("\0")[:-1] for line in lines]


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200, as far as a plan looks at it."""
    props = types.SimpleNamespace(
        name="NVIDIA H200", total_memory=150_754_820_096, multi_processor_count=132, major=9, minor=0,
        L2_cache_size=62_914_560, uuid="c0ffee",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=0: props)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: (9, 0))


@pytest.mark.parametrize("what", ["quick", "models", "profile"])
def test_every_measurement_has_a_plan_on_an_h200(
    what: str, tmp_path: Path, h200: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):  # absent, or with a torchvision that does not fit
        packages = False
    else:
        packages = True
    found = commands(tmp_path, what, packages=packages)
    asked = [words for words in found if words[1] in ("bratune", "bratune.studies")]
    assert packages == any("--peers" in words for words in asked)
    assert len(asked) >= 4
    monkeypatch.chdir(tmp_path)
    for words in asked:
        if "--compile" in words:
            continue
        program = partial(run_command, group=studies) if words[1] == "bratune.studies" else run_command
        assert program([*words[2:], "--dry-run"]) == 0, (shlex.join(words), capsys.readouterr().err)
        plan = capsys.readouterr().out
        assert "triton" in plan or "runtime" in plan or "auto" in plan, (shlex.join(words), plan)
        refused = [
            line
            for line in plan.splitlines()
            if ": triton, not: " in line or (": family" in line and "not:" in line)
        ]
        assert not refused


def test_what_is_compiled_first_is_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bratune.studies import compile_kernels
    from bratune.studies.kernels import trials

    (words,) = [words for words in commands(tmp_path, "quick") if "--compile" in words]
    jobs: list[compile_kernels.Job] = []
    monkeypatch.setattr(compile_kernels, "compile_all", lambda found, target: jobs.extend(found))
    assert run_command([*words[2:], "--target", "sm90"], group=studies) == 0
    ours = [t.cell for t in trials() if t.cell.backend == "triton" and t.cell.problem.batch > 2]
    assert {job.problem for job in jobs if job.what == "attention"} == {cell.problem for cell in ours}


@pytest.mark.usefixtures("forked")
def test_every_selection_of_tests_selects_some(tmp_path: Path) -> None:
    selections = {
        tuple(words[2:]) for words in commands(tmp_path, "quick") if words[1] == "pytest" and "-k" in words
    }
    assert len(selections) >= 3
    for words in selections:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, "--collect-only"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "::" in done.stdout


def test_files_that_tests_are_chosen_from_are_there(tmp_path: Path) -> None:
    found = [word for words in commands(tmp_path, "quick") for word in words if word.startswith("tests/")]
    assert len(found) >= 5
    assert [word for word in found if not (ROOT / word).exists()] == []


@pytest.mark.skipif(
    any(shutil.which(name) or [*Path("/usr/local").glob(f"cuda*/bin/{name}")] for name in CUDA_TOOLS),
    reason="says what happens where CUDA's tools are not installed",
)
def test_tools_of_cuda_run_the_tests_and_are_left_out_where_they_are_not(tmp_path: Path) -> None:
    without, _ = run(tmp_path / "without", "quick")
    assert "compute-sanitizer is not on this machine" in without.stdout
    assert "ncu is not on this machine" in without.stdout
    assert "FAILED" not in without.stdout
    run(tmp_path / "with", "quick", tools=True)
    lines = (tmp_path / "with" / "asked.tools").read_text().splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in lines] == ["compute-sanitizer"] * 2 + ["ncu"]
    assert [check for check in ("memcheck", "racecheck") if any(f"--tool {check}" in x for x in lines)] == [
        "memcheck", "racecheck"
    ]  # fmt: skip
    assert all("python3 -m pytest" in line for line in lines)


def test_all_steps_of_ten_minutes_fit_into_them(tmp_path: Path) -> None:
    """What comes last may lose its time; what comes first has it."""
    done, _ = run(tmp_path, "quick", tools=True)
    limits = [int(x.split(", ")[1].split()[0]) for x in done.stdout.splitlines() if x.endswith(" s at most")]
    assert sum(limits[:-1]) <= 590


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done, asked = run(tmp_path, "modles")
    assert (done.returncode, asked) == (2, [])
    assert "all, quick, models, tests and profile are" in done.stderr


LOSING = """
import torch


def test_that_loses_the_device():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize
    assert not "what the test found"


def test_after_it():
    assert not torch.cuda.is_initialized()
"""


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("workers", "outcome"), [([], "1 failed"), (["-n", "1"], "1 failed, 1 passed")])
def test_a_device_that_is_lost_ends_the_process_of_tests_and_not_what_comes_after(
    workers: list[str], outcome: str, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "test_losing.py").write_text(LOSING)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, str(tmp_path)],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert f"{outcome} in" in told, told
    assert "the device is lost" in told
    assert "an illegal memory access" in told
    assert "what the test found" in told
