"""The worker survives whatever a job does, and says what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bratune.errors import MeasureError
from bratune.measure.process_tree import TOKEN_VARIABLE, family
from bratune.measure.worker import JobOutcome, Worker

JOBS = '''
import ctypes, gc, os, signal, sys, time

calls = 0

def double(n): return 2 * n
def pid(_): return os.getpid()
def frozen(_): return gc.get_freeze_count()
def count(_):
    global calls
    calls += 1
    return calls
def environment(name): return os.environ.get(name)
def hang(_): time.sleep(600)
def hang_in_c(_): ctypes.PyDLL(None).sleep(600)
def ignore_everything(_):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
def segfault(_): ctypes.string_at(0)
def abort(_): os.abort()
def leave(status): os._exit(status)
def exits(status): sys.exit(status)
def interrupt(_): raise KeyboardInterrupt
def raises(text): raise ValueError(text)
def not_json(_): return object()
def big(n): return "x" * n
def garbage(n):
    for _ in range(n):
        os.write(1, b'{"status": "ok", "value": 666}' + bytes([10]))
        os.write(2, bytes([0, 255, 10]))
    return n
def close_streams(_):
    for fd in (0, 1, 2): os.close(fd)
    return "done"
def dies_if_used(_):
    global calls
    if calls: os.abort()
    return "clean"
def fork_that_runs_on(_):
    os.fork()
    return os.getpid()
def children(_):
    """One in the same session, one in a session of its own; both outlive the job."""
    pids = []
    for own_session in (False, True):
        pid = os.fork()
        if pid == 0:
            if own_session: os.setsid()
            time.sleep(600)
            os._exit(0)
        pids.append(pid)
    return pids
def allocate(megabytes):
    block = bytearray(megabytes * 1_000_000)
    return len(block)
'''


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    (tmp_path / "fault_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker() as made:
        yield made


def run(worker: Worker, job: str, payload: Any = None, limit_s: float = 20.0) -> JobOutcome:
    return worker.run(f"fault_jobs:{job}", payload, limit_s=limit_s)


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie waiting for its parent to notice."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pids: list[int]) -> bool:
    """Whether processes end within a few seconds: the kernel needs a moment after a kill."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_a_job_returns_its_value_and_the_child_is_kept(worker: Worker) -> None:
    assert run(worker, "double", 21).value == 42
    first = run(worker, "pid").value
    assert run(worker, "pid").value == first == worker.pid != os.getpid()


def test_what_was_imported_is_left_out_of_what_the_collector_goes_through(worker: Worker) -> None:
    assert run(worker, "frozen").value > 1000


def test_nothing_is_started_before_the_first_job() -> None:
    with Worker() as worker:
        assert worker.pid is None


@pytest.mark.parametrize(
    ("job", "payload", "status", "reason"),
    [
        ("hang", None, "timeout", "no result within 0.5 s; the worker was killed"),
        ("hang_in_c", None, "timeout", "no result within 0.5 s; the worker was killed"),
        ("ignore_everything", None, "timeout", "no result within 0.5 s; the worker was killed"),
        ("segfault", None, "crashed", "the worker was killed by signal 11 (SIGSEGV) in string_at"),
        ("abort", None, "crashed", "the worker was killed by signal 6 (SIGABRT) in abort (fault_jobs.py"),
        ("leave", 0, "crashed", "the worker ended by itself with exit status 0"),
        ("leave", 7, "crashed", "the worker ended by itself with exit status 7"),
        ("exits", 3, "error", "3"),
        ("interrupt", None, "error", "KeyboardInterrupt"),
        ("raises", "two\nlines", "error", "two lines"),
        ("raises", "CUDA out of memory. Tried to allocate", "oom", "CUDA out of memory. Tried"),
        ("not_json", None, "error", "Object of type object is not JSON serializable"),
        ("missing", None, "error", "module 'fault_jobs' has no attribute 'missing'"),
    ],
)
def test_every_end_has_a_status_and_a_reason_and_the_next_job_runs(
    worker: Worker, job: str, payload: Any, status: str, reason: str
) -> None:
    outcome = run(worker, job, payload, limit_s=0.5 if status == "timeout" else 20.0)
    assert outcome.status == status
    assert outcome.reason.startswith(reason)
    assert run(worker, "double", 1).value == 2


def test_an_error_keeps_the_child_and_names_its_class(worker: Worker) -> None:
    pid = run(worker, "pid").value
    assert run(worker, "raises", "x").error == "ValueError"
    assert run(worker, "pid").value == pid


def test_a_module_that_cannot_be_imported_is_an_error_of_the_job(worker: Worker) -> None:
    outcome = worker.run("no_such_module:f", None, limit_s=20)
    assert (outcome.status, outcome.error) == ("error", "ModuleNotFoundError")


def test_what_a_job_prints_is_no_result(worker: Worker) -> None:
    outcome = run(worker, "garbage", 5000)
    assert outcome.value == 5000
    assert "666" in outcome.output
    assert len(outcome.output) <= 16_384


def test_a_job_may_close_its_streams(worker: Worker) -> None:
    assert run(worker, "close_streams").value == "done"
    assert run(worker, "double", 1).value == 2


def test_a_large_result_arrives_whole(worker: Worker) -> None:
    assert run(worker, "big", 3_000_000).value == "x" * 3_000_000


def test_a_crash_in_a_used_child_is_tried_again_in_a_clean_one(worker: Worker) -> None:
    run(worker, "count")
    outcome = run(worker, "dies_if_used")
    assert (outcome.status, outcome.value, outcome.retried) == ("ok", "clean", True)


def test_a_crash_in_a_clean_child_is_believed(worker: Worker) -> None:
    outcome = run(worker, "abort")
    assert (outcome.status, outcome.retried) == ("crashed", False)


def test_a_timeout_is_not_tried_again(worker: Worker) -> None:
    run(worker, "count")
    outcome = run(worker, "hang", limit_s=0.3)
    assert (outcome.status, outcome.retried) == ("timeout", False)


def test_state_of_a_killed_child_is_gone(worker: Worker) -> None:
    assert run(worker, "count").value == 1
    assert run(worker, "count").value == 2
    run(worker, "hang", limit_s=0.3)
    assert run(worker, "count").value == 1


def test_a_forked_copy_answers_for_nobody(worker: Worker) -> None:
    outcome = run(worker, "fork_that_runs_on")
    assert outcome.value == worker.pid
    assert run(worker, "double", 4).value == 8
    assert run(worker, "double", 5).value == 10


def test_closing_kills_children_of_children_in_any_session(worker: Worker) -> None:
    pids = run(worker, "children").value
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    worker.close()
    assert gone(pids)


def test_a_timeout_kills_children_of_children_too(worker: Worker) -> None:
    pids = run(worker, "children").value
    run(worker, "hang", limit_s=0.3)
    assert gone(pids)


def test_a_memory_limit_turns_a_greedy_job_into_oom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fault_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker(memory_limit_bytes=500_000_000) as worker:
        assert run(worker, "allocate", 10).value == 10_000_000
        outcome = run(worker, "allocate", 1000)
        assert (outcome.status, outcome.error, outcome.retried) == ("oom", "MemoryError", True)


def test_the_environment_of_a_child_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fault_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker(env={"CUDA_VISIBLE_DEVICES": "GPU-ab"}) as worker:
        assert run(worker, "environment", "CUDA_VISIBLE_DEVICES").value == "GPU-ab"


def test_a_child_that_cannot_start_is_one_clear_error() -> None:
    with Worker(preload=("no_such_module",)) as worker, pytest.raises(MeasureError, match="no_such_module"):
        worker.run("operator:neg", 1, limit_s=20)


DIES_AT_FIRST = """
import os, pathlib, signal
count = pathlib.Path(os.environ["DEATHS"])
left = int(count.read_text())
count.write_text(str(left - 1))
if left:
    print("torn\\nwhile starting", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("deaths", "starts"), [(1, True), (2, True), (3, False)])
def test_a_child_that_dies_while_it_starts_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, starts: bool
) -> None:
    (tmp_path / "dies_at_first.py").write_text(DIES_AT_FIRST)
    (tmp_path / "jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deaths").write_text(str(deaths))
    with Worker(preload=("dies_at_first",), env={"DEATHS": str(tmp_path / "deaths")}) as worker:
        if starts:
            assert worker.run("jobs:double", 2, limit_s=30).value == 4
            return
        with pytest.raises(
            MeasureError, match=r"3 times: .*signal 9 \(SIGKILL\).*it said: torn while starting"
        ):
            worker.run("jobs:double", 2, limit_s=30)


def test_ctrl_c_in_the_parent_ends_the_child(worker: Worker) -> None:
    pid = run(worker, "pid").value
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        run(worker, "hang")
    assert gone([pid])
    assert run(worker, "double", 1).value == 2


@pytest.mark.parametrize("job", ["hang", "hang_in_c", "children"])
def test_everything_dies_with_a_killed_parent(tmp_path: Path, job: str) -> None:
    (tmp_path / "fault_jobs.py").write_text(JOBS)
    script = (
        "from bratune.measure.worker import Worker\n"
        "import time\n"
        "w = Worker(); w.run('fault_jobs:double', 1, limit_s=20)\n"
        "print(w._child.token, w.pid, flush=True)\n"
        f"w.run('fault_jobs:{job}', None, limit_s=600)\n"
        "time.sleep(600)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((root, str(tmp_path)))},
    )
    assert parent.stdout is not None
    token, pid = parent.stdout.readline().split()
    time.sleep(0.5)  # let the job begin
    members = family(token)
    assert int(pid) in members
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(sorted(members))
    assert not family(token)


def test_the_parent_sleeps_while_a_job_runs(worker: Worker) -> None:
    run(worker, "double", 1)
    before = os.times()
    run(worker, "hang", limit_s=1.0)
    after = os.times()
    used = after.user - before.user + after.system - before.system
    assert used < 0.5  # a loop without waiting would have used all of it


def test_where_the_system_cannot_watch_a_process_every_end_is_still_seen(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("os.pidfd_open", refuse)
    assert run(worker, "double", 4).value == 8
    assert run(worker, "big", 1_000_000).value == "x" * 1_000_000
    killed = run(worker, "abort", None)
    assert (killed.status, killed.retried) == ("crashed", True)
    assert "SIGABRT" in killed.reason
    assert "exit status 3" in run(worker, "leave", 3).reason
    assert run(worker, "hang", None, limit_s=1.0).status == "timeout"
    assert run(worker, "double", 4).value == 8


def test_families_are_told_apart() -> None:
    assert TOKEN_VARIABLE not in os.environ
    assert family("no such token") == set()
