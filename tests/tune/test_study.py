"""Studies survive: queue, dead workers, torn files, several processes; samplers and constraints."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bratune.errors import MissingPackageError, StoreError, UnknownNameError, UsageError
from bratune.record import Record
from bratune.tune.constraints import parse_constraint, violations
from bratune.tune.ledger import Ledger, Worker, derived_seed
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


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_trial_of_a_dead_worker_is_queued_once_more_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("bratune.tune.ledger.MAX_RETRIES", 1)
    url = urls(tmp_path)[kind]
    Ledger(url, "s", ["ms"]).enqueue(items(1))
    for expected in (1, 0):
        process = multiprocessing.get_context("spawn").Process(target=_claim_and_die, args=(url,))
        process.start()
        process.join()
        ledger = Ledger(url, "s", ["ms"])
        assert len(ledger.trials("RUNNING")) == 1
        assert ledger.reap() == 1
        assert len(ledger.trials("WAITING")) == expected
    assert ledger.enqueue(items(1)) == 0  # it killed two workers


def test_trial_of_a_living_worker_is_left_alone(tmp_path: Path) -> None:
    ledger = Ledger(urls(tmp_path)["journal"], "s", ["ms"])
    ledger.enqueue(items(1))
    assert ledger.claim(suggest) is not None
    assert ledger.reap() == 0
    assert ledger.busy_elsewhere() == 0


def test_worker_of_another_boot_or_start_is_dead_and_of_another_host_unknown() -> None:
    me = Worker.current()
    assert me.is_alive() is True
    assert Worker(me.host, me.pid, "1", me.boot).is_alive() is False
    assert Worker(me.host, me.pid, me.started, "other boot").is_alive() is False
    assert Worker("elsewhere", me.pid, me.started, me.boot).is_alive() is None


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


def _work(url: str) -> None:
    ledger = Ledger(url, "s", ["ms"])
    while (trial := ledger.claim(suggest)) is not None:
        ledger.complete(trial, [float(trial.params["x"])])


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
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
    run("pg_ctl", "-D", f"{folder}/data", "-o", settings, "-l", f"{folder}/log", "-w", "start")
    try:
        yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _share_the_work(url: str) -> None:
    ledger = Ledger(url, "s", ["ms"])
    ledger.enqueue(items(40))
    context = multiprocessing.get_context("spawn")
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
def test_four_processes_share_a_database_and_do_everything_once(postgres: str) -> None:
    _share_the_work(postgres)


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


def test_password_is_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        open_storage("mysql://me:secret@host/db")
    assert "secret" not in str(caught.value)


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
