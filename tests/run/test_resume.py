"""``profile`` and ``tune``, killed with -9 again and again: the same command ends as if undisturbed.

``python tests/run/test_resume.py`` prints what ten kills of each did under replay, and ten of a sweep that
measures.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as a script
from recorded import ASKED, record

from bratune.cli import run
from bratune.store import read_records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (
    "profile --device cpu --model biformer_tiny --res 112 -b 1 --stage 3 --no-whole-model --effort quick "
    "--backend gather --backend dense --backend gather-sdpa"
)
MARK = uuid.uuid4().hex
CELLS = 3 + 7 + 1  # attention by three backends, the other parts of a block, the block


def profile(*more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bratune", *COMMAND.split(), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "BRATUNE_RESUME_TEST": MARK},
    )


def table(text: str) -> list[str]:
    """The lines of a table without its title, in which a replay says that it is one."""
    return [line for line in text.splitlines() if not line.startswith("biformer_tiny ·")]


def running() -> set[str]:
    """Processes of this test's sweeps that run now; every one of them inherits the mark."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and MARK.encode() in (folder / "environ").read_bytes():
                found.add(folder.name)
        except OSError:
            continue
    return found


def disturbed(folder: Path, kills: int, seed: int = 1) -> tuple[str, int]:
    """The final output of a sweep that was killed at random moments, and how often it really was."""
    chance, records = random.Random(seed), folder / "records.jsonl"
    interrupted = 0
    # Every pass of a cell has a line when it starts and one when it ends.
    for moment in sorted(chance.sample(range(1, 4 * CELLS - 4), kills)):
        process = profile("-o", str(folder))
        while process.poll() is None and _lines(records) < moment:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        interrupted += process.poll() is None
        process.kill()
        process.communicate()
    process = profile("-o", str(folder))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, interrupted


def check(folder: Path, kills: int) -> str:
    out, interrupted = disturbed(folder / "run", kills)
    rows = list(read_records([folder / "run"]))
    done = Counter((row.cell_id, row.pass_number) for row in rows if row.outcome != "started")
    assert set(done.values()) == {1}, "a pass of a cell was measured twice"
    assert len({cell for cell, _ in done}) == CELLS
    assert len(done) == 2 * CELLS  # the passes of `quick`
    assert all(row.outcome == "measured" for row in rows if row.outcome != "started")

    replay = profile("--replay", str(folder / "run"), "-o", str(folder / "replay"))
    replayed, err = replay.communicate()
    assert replay.returncode == 0, err
    assert table(replayed) == table(out)
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(), "a worker outlived its parent"
    lost = sum(row.outcome == "started" for row in rows) - len(done)
    return (
        f"{interrupted} of {kills} kills hit a running sweep; {len(done)} passes of cells, each once; "
        f"{lost} were in flight when killed and were measured later; the replay shows the same table"
    )


@pytest.mark.usefixtures("forked")
def test_a_killed_profile_that_measures_goes_on_where_it_was(tmp_path: Path) -> None:
    assert check(tmp_path, kills=1).startswith("1 of 1 kills hit a running sweep")


# --- under replay: whatever moment, the end is the same ---------------------------------------

REPLAYED = ROOT / "results" / "cpu-epyc-biformer-tiny-224.jsonl"
PROFILE = ("profile", "--replay", str(REPLAYED), "--format", "json")


@dataclass(frozen=True)
class Story:
    """What became of a command that was killed again and again.

    Attributes:
        killed: Kills that hit it while it ran.
        lines: Lines of its records before each of them, at the moment of the kill.
        times: How often each cell has a finished row in the end.
    """

    killed: int
    lines: tuple[int, ...]
    times: Counter[str]


def here(arguments: Sequence[str], folder: Path) -> str:
    """What the command prints, run in this process: what it imports is there for the forks that follow."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*arguments, "-o", str(folder)])
    assert code == 0, err.getvalue()
    return out.getvalue()


def _in_child(arguments: Sequence[str], folder: Path) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # this process ends below
    os._exit(run([*arguments, "-o", str(folder)]))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed(arguments: Sequence[str], folder: Path, whole: int, *, kills: int, seed: int) -> tuple[str, Story]:
    """Kill a command at random moments, each after another line of its records, and let it end.

    Args:
        arguments: The command.
        folder: Its output.
        whole: Lines of the records of an undisturbed run.
        kills: How often.
        seed: Of the moments.
    """
    chance, forks = random.Random(seed), multiprocessing.get_context("fork")
    records = folder / "records.jsonl"
    seen = []
    for moment in sorted(chance.sample(range(1, whole), kills)):
        process = forks.Process(target=_in_child, args=(arguments, folder))
        process.start()
        while process.is_alive() and _lines(records) < moment:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.003))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            seen.append(_lines(records))
    text = here(arguments, folder)
    rows = read_records([records])
    times = Counter(row.cell_id for row in rows if row.outcome != "started")
    return text, Story(len(seen), tuple(seen), times)


def profile_story(folder: Path) -> Story:
    """Ten kills of a replayed sweep; the rows that it shows are those of an undisturbed one."""
    whole = json.loads(here(PROFILE, folder / "whole"))
    lines = _lines(folder / "whole" / "records.jsonl")
    text, story = killed(PROFILE, folder / "broken", lines, kills=10, seed=3)
    other = json.loads(text)
    for row in (*whole, *other):
        row["run_id"] = row["timestamp_utc"] = (
            ""  # what names the run, and when a row without a record was made
        )
    assert other == whole
    assert set(story.times.values()) == {1}, "a cell was measured twice"
    assert len(story.times) == len({row["cell_id"] for row in whole})
    return story


def tune_story(folder: Path) -> Story:
    """Ten kills of a replayed search; the plan and the front are those of an undisturbed one."""
    record(folder / "recorded")
    command = ("tune", *ASKED, "--replay", str(folder / "recorded" / "rows"))
    here(command, folder / "whole")
    lines = _lines(folder / "whole" / "records.jsonl")
    _, story = killed(command, folder / "broken", lines, kills=10, seed=4)
    plans = [json.loads((folder / name / "plan.json").read_text()) for name in ("whole", "broken")]
    for plan in plans:
        del plan["created_utc"], plan["command"]
    assert plans[0] == plans[1]
    fronts = [json.loads((folder / name / "front.json").read_text()) for name in ("whole", "broken")]
    for front in fronts:
        for row in front:
            del row["trial"]  # a trial that was killed keeps its number
    assert fronts[0] == fronts[1]
    assert set(story.times.values()) == {1}, "a cell was measured twice"
    return story


@pytest.mark.parametrize("story", [profile_story, tune_story])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_command_killed_at_ten_random_moments_ends_as_an_undisturbed_one(
    story: Callable[[Path], Story], tmp_path: Path
) -> None:
    assert story(tmp_path).killed >= 8  # the last ones may come after its end


def main() -> None:
    """Print what happened."""
    for story, name in ((profile_story, "profile"), (tune_story, "tune")):
        with tempfile.TemporaryDirectory() as folder:
            found = story(Path(folder))
        once = sum(number == 1 for number in found.times.values())
        print(
            f"{name} under replay: {found.killed} of 10 kills hit it, after {found.lines} lines; "
            f"{once} of {len(found.times)} cells were measured once; the end is that of an undisturbed run",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        print(check(Path(folder), kills=10))


if __name__ == "__main__":
    main()
