"""``bratune profile``, killed with -9 again and again: the same command goes on and ends as if undisturbed.

``python tests/test_resume.py 10`` does it with ten kills and prints what it found.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from bratune.store import read_records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
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
    moments = random.Random(seed)
    interrupted = 0
    for _ in range(kills):
        process = profile("-o", str(folder))
        deadline = time.monotonic() + moments.uniform(2.0, 15.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
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
    done = Counter(row.cell_id for row in rows if row.outcome != "started")
    assert set(done.values()) == {1}, "a cell was measured twice"
    assert len(done) == CELLS
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
        f"{interrupted} of {kills} kills hit a running sweep; {len(done)} cells, each measured once; "
        f"{lost} cells were in flight when killed and were measured later; the replay shows the same table"
    )


def test_a_killed_profile_goes_on_where_it_was(tmp_path: Path) -> None:
    assert check(tmp_path, kills=3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(check(Path(name), kills=int(sys.argv[1]) if len(sys.argv) > 1 else 10))
