"""Studies survive: queue, dead workers, torn files, several processes; samplers and constraints."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bratune.errors import MissingPackageError, StoreError, UnknownNameError, UsageError
from bratune.record import Record
from bratune.store.claims import Holder
from bratune.tune import storage
from bratune.tune.ledger import Ledger, derived_seed
from bratune.tune.pick import parse_constraint, violations
from bratune.tune.storage import SAMPLERS, make_sampler, open_storage


def urls(folder: Path) -> dict[str, str]:
    return {"sqlite": f"sqlite:///{folder}/s.db", "journal": f"journal:///{folder}/s.journal"}


def suggest(trial: Any) -> int:
    return int(trial.suggest_int("x", 0, 99))


def items(count: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [(f"k{i}", {"x": i}, {"note": i}) for i in range(count)]


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_queue_runs_in_order_once_and_survives_reopening(tmp_path: Path, kind: str) -> None:
    url = urls(tmp_path)[kind]
    ledger = Ledger(url, "s", ["ms"])
    assert ledger.enqueue(items(3)) == 3
    assert ledger.enqueue(items(4)) == 1  # three are queued already
    trial = ledger.claim(suggest)
    assert trial is not None
    assert (trial.params["x"], trial.user_attrs["note"]) == (0, 0)
    ledger.complete(trial, [1.5], constraints={"memory": -1.0}, record="r")

    again = Ledger(url, "s", ["ms"])
    assert again.enqueue(items(4)) == 0
    seen = []
    while (trial := again.claim(suggest)) is not None:
        seen.append(trial.params["x"])
        again.complete(trial, [1.0])
    assert seen == [1, 2, 3]
    done = again.by_key()["k0"]
    assert (done.values, done.user_attrs["record"], done.constraints) == ([1.5], "r", {"memory": -1.0})


def test_out_of_memory_is_pruned_with_its_constraint(tmp_path: Path) -> None:
    ledger = Ledger(urls(tmp_path)["sqlite"], "s", ["ms", "loss"])
    ledger.enqueue(items(1))
    trial = ledger.claim(suggest)
    assert trial is not None
    ledger.prune(trial, "out of memory", constraints={"memory": 100.0})
    (kept,) = ledger.trials("PRUNED")
    assert kept.constraints == {"memory": 100.0}
    assert kept.user_attrs["reason"] == "out of memory"
    assert ledger.study.best_trials == []


def _claim_and_die(url: str) -> None:
    ledger = Ledger(url, "s", ["ms"])
    assert ledger.claim(suggest) is not None
    os._exit(9)


def _abandon(ledger: Ledger) -> None:
    """Claim a trial in the name of a worker that is dead."""
    trial = ledger.claim(suggest)
    assert trial is not None
    me = ledger.worker
    trial.set_user_attr("worker", [me.host, me.pid, "1", me.boot])


def test_trial_of_a_process_that_died_is_queued_again(tmp_path: Path) -> None:
    url = urls(tmp_path)["journal"]
    Ledger(url, "s", ["ms"]).enqueue(items(1))
    process = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(url,))
    process.start()
    process.join()
    ledger = Ledger(url, "s", ["ms"])
    assert len(ledger.trials("RUNNING")) == 1
    assert ledger.reap() == 1
    (trial,) = ledger.trials("WAITING")
    assert (trial.user_attrs["key"], trial.user_attrs["note"]) == ("k0", 0)
    assert trial.system_attrs["fixed_params"] == {"x": 0}


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_twenty_deaths_with_one_trial_cost_twenty_retries(tmp_path: Path, kind: str) -> None:
    ledger = Ledger(urls(tmp_path)[kind], "s", ["ms"])
    ledger.enqueue(items(2))
    for death in range(1, 21):
        _abandon(ledger)
        assert ledger.reap() == 1
        assert ledger.enqueue(items(2)) == 0
        assert sorted(t.user_attrs["key"] for t in ledger.trials("WAITING")) == ["k0", "k1"]
        assert bool(ledger.often_died()) is (death >= 5)
    assert "workers died with the same one" in ledger.often_died()
    seen = {}
    while (trial := ledger.claim(suggest)) is not None:
        seen[trial.user_attrs["key"]] = (trial.params["x"], trial.user_attrs["note"])
        ledger.complete(trial, [1.0])
    assert seen == {"k0": (0, 0), "k1": (1, 1)}
    assert ledger.settled() == {"k0", "k1"}


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_death_between_failing_and_queueing_again_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ledger = Ledger(urls(tmp_path)[kind], "s", ["ms"])
    ledger.enqueue(items(1))
    _abandon(ledger)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_queue_lost_again", lambda self: None)
        assert ledger.reap() == 1
    assert ledger.trials("WAITING") == []
    assert ledger.settled() == set()
    assert ledger.reap() == 0
    (trial,) = ledger.trials("WAITING")
    assert trial.user_attrs["key"] == "k0"


def test_a_trial_that_was_queued_twice_runs_once(tmp_path: Path) -> None:
    ledger = Ledger(urls(tmp_path)["journal"], "s", ["ms"])
    for _ in range(2):
        ledger.study.enqueue_trial({"x": 0}, user_attrs={"key": "k0"})
    first = ledger.claim(suggest)
    assert first is not None
    assert ledger.claim(suggest) is None
    ledger.complete(first, [1.0])
    ledger.study.enqueue_trial({"x": 0}, user_attrs={"key": "k0"})
    assert ledger.claim(suggest) is None
    assert ledger.reap() == 0
    assert ledger.trials("WAITING") == []


def test_an_interrupted_trial_is_queued_again_with_what_it_knew(tmp_path: Path) -> None:
    ledger = Ledger(urls(tmp_path)["journal"], "s", ["ms"])
    ledger.enqueue(items(1))
    trial = ledger.claim(suggest)
    assert trial is not None
    ledger.release(trial)
    again = ledger.claim(suggest)
    assert again is not None
    assert (again.params["x"], again.user_attrs["key"], again.user_attrs["note"]) == (0, "k0", 0)
    assert "reason" not in again.user_attrs


def test_trial_of_a_living_worker_is_left_alone(tmp_path: Path) -> None:
    ledger = Ledger(urls(tmp_path)["journal"], "s", ["ms"])
    ledger.enqueue(items(1))
    assert ledger.claim(suggest) is not None
    assert ledger.reap() == 0
    assert ledger.busy_elsewhere() == 0


def test_worker_of_another_boot_or_start_is_dead_and_of_another_host_unknown() -> None:
    me = Holder.current()
    assert me.is_alive() is True
    assert Holder(me.host, me.pid, "1", me.boot).is_alive() is False
    assert Holder(me.host, me.pid, me.started, "other boot").is_alive() is False
    assert Holder("elsewhere", me.pid, me.started, me.boot).is_alive() is None


def test_trial_of_another_host_is_lost_when_its_lease_is_over(tmp_path: Path) -> None:
    ledger = Ledger(urls(tmp_path)["journal"], "s", ["ms"])
    ledger.enqueue(items(1))
    trial = ledger.claim(suggest)
    assert trial is not None
    trial.set_user_attr("worker", ["elsewhere", 1, "1", "b"])
    assert ledger.reap() == 0
    trial.set_user_attr("claimed_s", time.time() - 1000)
    assert ledger.reap() == 1


def test_journal_with_a_torn_last_line_opens_and_goes_on(tmp_path: Path) -> None:
    url = urls(tmp_path)["journal"]
    Ledger(url, "s", ["ms"]).enqueue(items(2))
    with open(tmp_path / "s.journal", "ab") as file:
        file.write(b'{"op_code": 4, "worker_')
    ledger = Ledger(url, "s", ["ms"])
    assert len(ledger.trials("WAITING")) == 2
    ledger.enqueue(items(3))
    assert len(Ledger(url, "s", ["ms"]).trials("WAITING")) == 3


@pytest.mark.parametrize("tail", [b'{"op_code": 4, "worker_', b'{"op_code": 4', b"\0\0"])
def test_a_worker_that_died_in_the_middle_of_a_line_spoils_no_line_of_the_others(
    tmp_path: Path, tail: bytes
) -> None:
    url = urls(tmp_path)["journal"]
    ledger = Ledger(url, "s", ["ms"])
    ledger.enqueue(items(1))
    with open(tmp_path / "s.journal", "ab") as file:
        file.write(tail)
    ledger.enqueue(items(2))  # the same process goes on, nothing was opened anew
    assert len(Ledger(url, "s", ["ms"]).trials("WAITING")) == 2


def test_a_whole_last_line_of_a_journal_without_its_end_is_kept(tmp_path: Path) -> None:
    url, path = urls(tmp_path)["journal"], tmp_path / "s.journal"
    Ledger(url, "s", ["ms"]).enqueue(items(2))
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    open_storage(url)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my only copy", b"a\nb\n", b'{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.journal"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is no journal of a study and is left as it is"):
        open_storage(urls(tmp_path)["journal"])
    assert path.read_bytes() == content


def test_a_disk_that_fails_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = urls(tmp_path)["journal"]
    ledger = Ledger(url, "s", ["ms"])
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.001)
    real, failures = os.fsync, [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]

    def fsync(fd: int) -> None:
        if failures:
            raise OSError(failures.pop(), "for a while")
        real(fd)

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.warns(UserWarning, match="does not answer; it is waited for"):
        ledger.enqueue(items(1))
    assert failures == []
    assert len(Ledger(url, "s", ["ms"]).trials("WAITING")) == 1


def test_a_full_disk_is_not_waited_for_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = urls(tmp_path)["journal"], tmp_path / "s.journal"
    ledger = Ledger(url, "s", ["ms"])
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.enqueue(items(1))
    assert path.read_bytes() == before


HOLD = """
import sys, time
from bratune.tune.storage import open_storage
open_storage(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_on_a_sqlite_study_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    url = urls(tmp_path)["sqlite"]
    first = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(
        StoreError, match=rf"another process \(pid {first.pid}\) works on the study .*journal:///FILE"
    ):
        open_storage(url)
    first.kill()
    first.communicate()
    open_storage(url)
    open_storage(url)  # the same process may


def _work(url: str) -> None:
    ledger = Ledger(url, "s", ["ms"])
    while (trial := ledger.claim(suggest)) is not None:
        ledger.complete(trial, [float(trial.params["x"])])


@dataclass(frozen=True)
class Server:
    url: str
    stop: Callable[[], None]
    start: Callable[[], None]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """URL of a PostgreSQL server of its own, on this machine only."""
    pytest.importorskip("psycopg", reason="needs the driver: pip install 'bratune[postgres]'")
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("needs a PostgreSQL server: initdb and pg_ctl are not on the path")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of a socket has at most 107 bytes
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, capture_output=True, cwd=folder, timeout=120)

    run("initdb", "-D", f"{folder}/data", "-U", "tuner", "--auth=trust", "--no-sync")
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    start = ("pg_ctl", "-D", f"{folder}/data", "-o", settings, "-l", f"{folder}/log", "-w", "start")
    stop = ("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "-w", "stop")
    run(*start)
    try:
        yield Server(f"postgresql://tuner@127.0.0.1:{port}/postgres", lambda: run(*stop), lambda: run(*start))
    finally:
        run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _share_the_work(url: str) -> None:
    ledger = Ledger(url, "s", ["ms"])
    ledger.enqueue(items(40))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(url,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    done = [t.params["x"] for t in ledger.trials("COMPLETE")]
    assert sorted(done) == list(range(40))


@pytest.mark.slow
def test_four_processes_share_a_journal_and_do_everything_once(tmp_path: Path) -> None:
    _share_the_work(urls(tmp_path)["journal"])


@pytest.mark.slow
def test_four_processes_share_a_database_and_do_everything_once(postgres: Server) -> None:
    _share_the_work(postgres.url)


def test_a_database_that_restarts_costs_nothing_but_time(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.1)
    ledger = Ledger(postgres.url, "restarted", ["ms"])
    ledger.enqueue(items(12))
    done = []
    for turn in range(12):
        if turn % 3 == 1:  # while nothing is asked of it: connections are checked before use
            postgres.stop()
            postgres.start()
        trial = ledger.claim(suggest)
        assert trial is not None
        back = threading.Timer(0.5, postgres.start)
        if turn % 3 == 2:  # while a result is about to be told
            postgres.stop()
            back.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ledger.complete(trial, [float(trial.params["x"])])
        if turn % 3 == 2:
            back.join()
        done.append(trial.user_attrs["key"])
    assert done == [f"k{i}" for i in range(12)]
    assert sorted(t.values[0] for t in ledger.trials("COMPLETE")) == [float(i) for i in range(12)]
    assert ledger.claim(suggest) is None


def test_resumed_study_does_not_repeat_its_draws(tmp_path: Path) -> None:
    url, draws = urls(tmp_path)["sqlite"], []
    for _ in range(2):
        ledger = Ledger(url, "s", ["ms"], sampler="random", seed=1)
        for _ in range(3):
            trial, x = ledger.propose(suggest)
            ledger.complete(trial, [0.0])
            draws.append(x)
    assert draws[:3] != draws[3:]


def test_seed_follows_from_content_only() -> None:
    assert derived_seed(0, "a", 1) == derived_seed(0, "a", 1)
    assert len({derived_seed(s, name, n) for s in (0, 1) for name in "ab" for n in (0, 1)}) == 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_proposes_with_two_objectives(tmp_path: Path, name: str) -> None:
    if name == "gp":
        pytest.importorskip("scipy", reason="the sampler gp needs scipy")
    try:
        ledger = Ledger(urls(tmp_path)["sqlite"], "s", ["ms", "loss"], sampler=name)
    except MissingPackageError as error:
        pytest.skip(str(error))
    for _ in range(3):
        trial, _ = ledger.propose(
            lambda t: (t.suggest_int("x", 0, 5), t.suggest_categorical("b", ["p", "q"]))
        )
        ledger.complete(trial, [1.0, 2.0])
    assert len(ledger.trials("COMPLETE")) == 3


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("redis://x", UsageError, "sqlite:///FILE, journal:///FILE"),
        ("sqlite://", UsageError, "is not known"),
        ("sqlite:////proc/none/x.db", StoreError, "cannot be opened"),
    ],
)
def test_storage_that_cannot_be_opened_is_one_sentence(url: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_storage(url)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:secret@host/db",
        "postgresql://me:secret@127.0.0.1:1/db",
        "postgresql://me:s@crets@ecret@127.0.0.1:1/db",
        "postgresql+psycopg://me:%73ecret@127.0.0.1:1/db",
        "postgresql://me@127.0.0.1:1/db?password=secret",
        "postgresql+nothing://me:secret@host/db",
    ],
)
def test_password_is_not_shown(url: str) -> None:
    with pytest.raises((UsageError, StoreError, MissingPackageError)) as caught:
        open_storage(url)
    assert "ecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "bratune tune --storage postgresql://me:se@cret@h/d -b 1",
            "bratune tune --storage postgresql://me@h/d -b 1",
        ),
        ("postgresql://h/d?user=me&password=x&y=1", "postgresql://h/d?user=me&password=***&y=1"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("10:30 at a@b", "10:30 at a@b"),
    ],
)
def test_texts_lose_their_passwords_and_nothing_else(text: str, shown: str) -> None:
    assert storage.without_password(text) == shown


def test_unknown_sampler_lists_the_known() -> None:
    with pytest.raises(UsageError, match="tpe, nsga2, gp, random, brute"):
        make_sampler("cma", 0)


def test_other_objectives_need_another_study(tmp_path: Path) -> None:
    url = urls(tmp_path)["journal"]
    Ledger(url, "s", ["ms"])
    with pytest.raises((StoreError, UsageError), match="s"):
        Ledger(url, "s", ["ms", "loss"])


@pytest.mark.parametrize(
    ("text", "value", "over"),
    [
        ("peak_alloc_mb<=20000", 20000.0, 0.0),
        ("peak_alloc_mb <= 2e4", 20500.0, 500.0),
        ("peak_alloc_mb<20000", 20000.0, 1e-9),
        ("images_per_s>=400", 390.0, 10.0),
        ("images_per_s > 400", 500.0, -100.0),
        ("peak_alloc_mb<=1", None, None),
    ],
)
def test_constraint_says_how_far_a_record_is_beyond_it(
    text: str, value: float | None, over: float | None
) -> None:
    constraint = parse_constraint(text)
    record = Record(**{constraint.field: value})  # type: ignore[arg-type]
    assert constraint.violation(record) == over
    assert violations([constraint], record) == ({} if over is None else {str(constraint): over})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("peak_alloc_mb<=", UsageError),
        ("peak_alloc_mb == 3", UsageError),
        ("__import__('os')<=1", UsageError),
        ("peak_alloc_mb<=1; 2", UsageError),
        ("peak_memory<=1", UnknownNameError),
        ("gpu_name<=1", UnknownNameError),
    ],
)
def test_constraints_are_never_evaluated(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_constraint(text)
