"""What measures no GPU runs where what only Linux has is missing: on a Mac, on Windows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Takes away what Linux has and others lack, then runs commands in one process. The standard library is
# imported before: here it is Linux's own, which needs these modules.
CHILD = r"""
import asyncio, concurrent.futures, ctypes, errno, getpass, logging.handlers, multiprocessing.util
import os, pathlib, platform, random, shutil, signal, socket, subprocess, sys, tempfile, types

for name in ("fcntl", "resource", "pwd", "grp", "termios", "triton"):
    sys.modules[name] = None
for module, names in {
    os: "sched_getaffinity pread pwrite getuid geteuid fork sysconf getloadavg pidfd_open statvfs "
    "setsid killpg O_CLOEXEC",
    errno: "EREMOTEIO EDQUOT",
    signal: "SIGHUP SIGKILL",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
if LOCKS_OF_WINDOWS:
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda fd, mode, size: None)

def no_proc(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

sys.addaudithook(no_proc)
from bratune.cli import prepare, run

prepare()
for line in COMMANDS:
    code = run(line.split())
    print(f"{line}: exit code {code}", flush=True)
    if code != 0:
        sys.exit(code)
"""
RESULTS = ROOT / "results"
PLAN = RESULTS / "cpu-xeon-biformer-tiny-224.plan.json"
COMMANDS = [
    "list gpus",
    "list backends",
    "list suites",
    "predict --gpu a100 -b 1 --backend gather --backend triton -o {out}/predicted.jsonl",
    "explain --gpu a100 --fit 24GB --n-win 7,14",
    "explain --device cpu",
    "profile --gpu a100 --stage 1 --backend gather -o {out}/profile",
    "profile --gpu a100 --dry-run",
    "tune --gpu a100 --backend gather --backend triton -o {out}/tune",
    "export {plan} --to plan -o {out}/plan.json",
    "export {plan} --to hydra -o {out}/hydra.yaml",
    "compare {results}/cpu-xeon-biformer-tiny-224.jsonl {results}/cpu-xeon-biformer-tiny-224-r2.jsonl",
    "cache ls {results}",
    "cache merge {out}/merged.jsonl {results}",
    "report {results}/cpu-xeon-biformer-tiny-224.jsonl -o {out}/report.html",
]


def test_what_measures_nothing_runs_without_what_only_linux_has(tmp_path: Path) -> None:
    lines = [line.format(out=tmp_path, results=RESULTS, plan=PLAN) for line in COMMANDS]
    code = CHILD.replace("COMMANDS", repr(lines)).replace("LOCKS_OF_WINDOWS", "True")
    result = _run(code, tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    done = [line for line in result.stdout.splitlines() if line.endswith(": exit code 0")]
    assert len(done) == len(COMMANDS)
    assert "triton: not there" not in result.stdout, "without Triton its kernels are counted, not compiled"


def test_records_are_not_written_where_a_system_has_no_locks(tmp_path: Path) -> None:
    lines = [f"predict --gpu a100 -b 1 --backend gather -o {tmp_path}/x.jsonl"]
    code = CHILD.replace("COMMANDS", repr(lines)).replace("LOCKS_OF_WINDOWS", "False")
    result = _run(code, tmp_path)
    assert result.returncode == 1
    assert "this system gives no locks" in result.stderr
    assert "Traceback" not in result.stderr


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # In a home of its own there is no library of the C kernels; that it cannot be made is no reason to fail.
    own = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "USER": "someone", "CC": "false"}
    environment = {**os.environ, **own}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
