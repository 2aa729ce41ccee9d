"""What surrounds the measurement of a cell: rows on disk before and after, reuse, budget, replay."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bratune.cell import Cell
from bratune.errors import StoreError, TargetError
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run import reuse as cache
from bratune.run.engine import CellEngine
from bratune.run.measure_cell import Result
from bratune.run.parallel import ParallelEngine
from bratune.run.replay import ReplayRunner
from bratune.store import Store, read_records

CPU = Machine(
    kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU", threads=2, torch="2.13.0", triton="3.7.1"
)
QUICK = MeterSettings.for_effort("quick")
PROBLEM = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(2, 2), topk=2)


def cells(*names: str) -> list[Cell]:
    return [Cell(part="attention", problem=PROBLEM, backend=name) for name in names]


class FakeRunner:
    """Answers with known times; may do something else for a backend."""

    evidence = "measured"

    def __init__(self, machine: Machine = CPU, **special: Callable[[], Result | None]) -> None:
        self.machine = machine
        self.special = special
        self.ran: list[str] = []
        self.limits: list[float] = []
        self.give_up: list[float | None] = []
        self.closed = False
        self.interrupted = False

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        self.ran.append(cell.backend)
        self.limits.append(limit_s)
        self.give_up.append(give_up_ms)
        if cell.backend in self.special:
            result = self.special[cell.backend]()
            if result is not None:
                return result
        return Result(Record.of(cell, self.machine, median_ms=2.0, n_samples=3), (1.0, 2.0, 3.0))

    def interrupt(self) -> None:
        self.interrupted = True

    def close(self) -> None:
        self.closed = True


def failed(name: str, outcome: str, reason: str = "as told") -> Callable[[], Result]:
    (cell,) = cells(name)
    return lambda: Result(Record.of(cell, CPU, outcome=outcome, reason=reason))


def test_a_started_line_is_on_disk_before_a_cell_runs_and_its_outcome_after(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    seen: list[list[str]] = []

    def look() -> None:
        seen.append([row.outcome for row in read_records([path])])

    engine = CellEngine(FakeRunner(gather=look, dense=look), QUICK, store=Store(path), run_id="r1")
    list(engine.run(cells("gather", "dense")))
    assert seen == [["started"], ["started", "measured", "started"]]
    last = list(read_records([path]))[-1]
    assert (last.backend, last.outcome, last.run_id, last.median_ms) == ("dense", "measured", "r1", 2.0)
    assert last.source_hash == cache.source_hash(cells("dense")[0])
    assert last.sampling == QUICK.sampling


def test_rows_of_the_c_kernels_answer_while_their_c_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes
    edited: list[str] = []

    def read_bytes(path: Path) -> bytes:
        return read(path) + b"/* edited */" * (path.name in edited)

    def hash_of(name: str) -> str:
        cache._hash_of.cache_clear()
        return cache.source_hash(cells(name)[0])

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    native, gather = hash_of("native"), hash_of("gather")
    for name in ("linear.h", "amx.c"):
        edited[:] = [name]
        assert hash_of("native") != native
        assert hash_of("gather") == gather
    cache._hash_of.cache_clear()


def test_raw_samples_are_kept_beside_the_rows(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    list(CellEngine(FakeRunner(), QUICK, store=store).run(cells("gather")))
    assert json.loads(store.samples_path.read_text())["samples_ms"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("outcome", ["unsupported", "incorrect", "oom", "timeout", "crashed", "error"])
def test_a_failure_is_a_row_and_the_run_goes_on(tmp_path: Path, outcome: str) -> None:
    store = Store(tmp_path / "records.jsonl")
    runner = FakeRunner(gather=failed("gather", outcome))
    rows = list(CellEngine(runner, QUICK, store=store).run(cells("gather", "dense")))
    assert [(row.backend, row.outcome) for row in rows] == [("gather", outcome), ("dense", "measured")]
    assert [row.outcome for row in store.records()] == ["started", outcome, "started", "measured"]


def test_the_same_run_again_measures_nothing_and_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    runner = FakeRunner(sparse=failed("sparse", "crashed"))
    first = list(CellEngine(runner, QUICK, store=store).run(cells("gather", "dense", "sparse")))
    size = store.path.stat().st_size
    again = FakeRunner()
    rows = list(CellEngine(again, QUICK, store=store).run(cells("gather", "dense", "sparse")))
    assert again.ran == []
    assert rows == first
    assert store.path.stat().st_size == size


def test_a_fresh_run_measures_everything_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    list(CellEngine(FakeRunner(), QUICK, store=store).run(cells("gather")))
    runner = FakeRunner()
    list(CellEngine(runner, QUICK, store=store, fresh=True).run(cells("gather")))
    assert runner.ran == ["gather"]


def test_a_cell_that_only_started_is_measured_again(tmp_path: Path) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    store = Store(tmp_path / "records.jsonl")
    with pytest.raises(KeyboardInterrupt):
        list(CellEngine(FakeRunner(dense=die), QUICK, store=store).run(cells("gather", "dense")))
    assert [row.outcome for row in store.records()] == ["started", "measured", "started"]
    runner = FakeRunner()
    list(CellEngine(runner, QUICK, store=store).run(cells("gather", "dense")))
    assert runner.ran == ["dense"]


def test_a_replayed_row_in_the_store_never_stands_for_a_measurement(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    (row,) = CellEngine(ReplayRunner([stored()]), QUICK, store=store).run([GATHER])
    assert row.evidence == "replayed"
    runner = FakeRunner()
    (row,) = CellEngine(runner, QUICK, store=store).run([GATHER])
    assert (row.evidence, runner.ran) == ("measured", ["gather"])


def test_a_cell_twice_in_one_run_is_measured_once() -> None:
    runner = FakeRunner()
    rows = list(CellEngine(runner, QUICK).run(cells("gather", "gather")))
    assert runner.ran == ["gather"]
    assert rows[0] == rows[1]


def test_the_budget_leaves_what_was_not_started_with_a_reason_and_without_a_started_line(
    tmp_path: Path,
) -> None:
    now = [0.0]

    def slow() -> None:
        now[0] += 70.0

    store = Store(tmp_path / "records.jsonl")
    runner = FakeRunner(gather=slow, dense=slow)
    engine = CellEngine(runner, QUICK, store=store, budget_s=100.0, clock=lambda: now[0])
    rows = list(engine.run(cells("gather", "dense", "sparse")))
    assert [row.outcome for row in rows] == ["measured", "measured", "timeout"]
    assert rows[2].reason == "not started: the budget of 100 s was spent"
    assert runner.limits[1] == pytest.approx(30.0)  # a running cell is stopped when the budget ends
    assert [r.outcome for r in store.records()] == ["started", "measured", "started", "measured", "timeout"]


def test_a_cell_that_the_budget_stopped_is_not_called_slow_and_is_measured_next_time(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "records.jsonl")
    runner = FakeRunner(gather=failed("gather", "timeout"))
    (row,) = CellEngine(runner, QUICK, budget_s=1.0).run(cells("gather"))
    assert row.reason == "not finished: the budget of 1 s was spent"
    again = FakeRunner()
    store.append(row)
    list(CellEngine(again, QUICK, store=store).run(cells("gather")))
    assert again.ran == ["gather"]


def test_compiling_gets_more_time() -> None:
    runner = FakeRunner()
    (cell,) = cells("gather")
    list(CellEngine(runner, QUICK).run([cell, cell.replace(regime="compile")]))
    assert runner.limits[1] > runner.limits[0] > QUICK.timeout_s


def test_what_is_clearly_worse_than_the_fastest_need_not_be_measured_well() -> None:
    runner = FakeRunner()
    list(CellEngine(runner, QUICK).run(cells("dense", "sparse", "gather")))
    assert runner.give_up == [None, 6.0, None]  # nothing to compare with; three times 2 ms; the baseline


def test_speedup_is_relative_to_the_baseline_of_the_same_cell() -> None:
    (dense,) = cells("dense")
    runner = FakeRunner(dense=lambda: Result(Record.of(dense, CPU, median_ms=0.5)))
    rows = list(CellEngine(runner, QUICK).run(cells("gather", "dense")))
    assert [(row.speedup, row.baseline) for row in rows] == [(1.0, "gather"), (4.0, "gather")]


def test_the_runner_is_closed_whatever_happens() -> None:
    def boom() -> None:
        raise StoreError("gone")

    runner = FakeRunner(gather=boom)
    with pytest.raises(StoreError), CellEngine(runner, QUICK) as engine:
        list(engine.run(cells("gather")))
    assert runner.closed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_run_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    runner = FakeRunner()
    engine = CellEngine(runner, QUICK, store=Store(path))
    path.unlink()
    path.symlink_to("/dev/full")  # every write fails with "no space left on device"
    with pytest.raises(StoreError, match="No space left"):
        list(engine.run(cells("gather")))
    assert runner.ran == []


# --- reuse, field by field --------------------------------------------------------------------

(GATHER,) = cells("gather")


def stored(cell: Cell = GATHER, machine: Machine = CPU, settings: MeterSettings = QUICK) -> Record:
    (row,) = CellEngine(FakeRunner(machine), settings).run([cell])
    return row


def replaced(machine: Machine, **changes: str | int) -> Machine:
    return Machine.from_dict(machine.to_dict() | changes)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        pytest.param(stored(machine=replaced(CPU, torch="2.11.0")), "torch", id="torch"),
        pytest.param(stored(machine=replaced(CPU, triton="3.6.0")), "triton", id="triton"),
        pytest.param(stored(machine=replaced(CPU, driver="580.1")), "driver", id="driver"),
        pytest.param(stored(machine=replaced(CPU, gpu_key="h100")), "gpu_key", id="board"),
        pytest.param(stored(machine=replaced(CPU, threads=1)), "threads", id="threads"),
        pytest.param(stored().replace(source_hash="0123"), "source_hash", id="sources"),
        pytest.param(stored().replace(bratune="0.0.1"), "bratune", id="version"),
        pytest.param(stored(settings=MeterSettings.for_effort("full")), "sampling", id="effort"),
        pytest.param(stored(GATHER.replace(regime="compile")), "regime", id="regime"),
        pytest.param(stored(GATHER.replace(config='{"a": 1}')), "config", id="config"),
        pytest.param(stored(GATHER.replace(problem=PROBLEM.replace(topk=3))), "problem.topk", id="problem"),
        pytest.param(stored(GATHER.replace(seed=1)), "seed", id="seed"),
    ],
)
def test_a_row_answers_only_when_nothing_that_matters_changed_and_the_miss_names_it(
    row: Record, field: str
) -> None:
    why = cache.Cache(CPU, QUICK, [row]).why(GATHER)
    assert not why.hit
    assert [name for name, _, _ in why.differences] == [field]
    assert field in str(why)


def _weights(folder: Path) -> Cell:
    path = folder / "weights.pth"
    path.write_bytes(b"first")
    return GATHER.replace(extra=json.dumps({"checkpoint": str(path)}))


def _pictures(folder: Path) -> Cell:
    (folder / "a.png").write_bytes(b"first")
    return GATHER.replace(extra=json.dumps({"images": str(folder)}))


@pytest.mark.parametrize(
    ("make", "name", "field"),
    [(_weights, "weights.pth", "checkpoint_hash"), (_pictures, "a.png", "images_hash")],
)
def test_a_row_answers_only_for_the_contents_of_files_and_not_for_their_path(
    tmp_path: Path, make: Callable[[Path], Cell], name: str, field: str
) -> None:
    cell = make(tmp_path)
    row = stored(cell)
    known = cache.Cache(CPU, QUICK, [row])
    assert known.find(cell) == row
    (tmp_path / name).write_bytes(b"other")  # as long as before
    os.utime(tmp_path / name, ns=(1, 1))
    why = known.why(cell)
    assert not why.hit
    assert [changed for changed, _, _ in why.differences] == [field]
    (tmp_path / name).unlink()
    assert f"{field}: stored {getattr(row, field)}, asked (nothing)" in str(known.why(cell))


def test_rows_that_another_run_adds_meanwhile_answer_too(tmp_path: Path) -> None:
    store, first, second = Store(tmp_path / "records.jsonl"), FakeRunner(), FakeRunner()
    rows = CellEngine(first, QUICK, store=store).run(cells("gather", "dense"))
    next(rows)
    list(CellEngine(second, QUICK, store=store).run(cells("gather", "dense")))
    list(rows)
    assert (first.ran, second.ran) == (["gather"], ["dense"])


def test_a_hit_says_where_it_is_from() -> None:
    why = cache.Cache(CPU, QUICK, [stored().replace(run_id="r7")]).why(GATHER)
    assert why.hit
    assert "hit: measured in run r7" in str(why)


def test_the_serial_number_of_the_board_does_not_matter() -> None:
    row = stored(machine=replaced(CPU, gpu_uuid="one"))
    assert cache.Cache(replaced(CPU, gpu_uuid="other"), QUICK, [row]).find(GATHER) == row


def test_an_empty_cache_says_so() -> None:
    assert str(cache.Cache(CPU, QUICK).why(GATHER)) == "miss: nothing is stored"


def test_a_miss_names_the_nearest_row() -> None:
    far = stored(GATHER.replace(seed=1, backend="dense", regime="compile"))
    near = stored(GATHER.replace(seed=2))
    why = cache.Cache(CPU, QUICK, [far, near]).why(GATHER)
    assert why.record == near


def test_sources_of_backends_differ_and_layers_count_only_where_they_run() -> None:
    hashes = {name: cache.source_hash(cells(name)[0]) for name in ("reference", "gather", "dense", "sparse")}
    assert len(set(hashes.values())) == len(hashes)
    assert cache.source_hash(GATHER.replace(part="block")) != hashes["gather"]
    assert cache.source_hash(GATHER) == hashes["gather"]


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("work/call.py", True),
        ("work/parts.py", True),
        ("work/modules.py", True),
        ("measure/meter.py", True),
        ("measure/gate.py", True),
        ("kernels/gather.py", True),
        ("kernels/runtime.py", False),
        ("tune/space.py", False),
    ],
)
def test_rows_fall_with_whatever_builds_checks_or_times_them(
    source: str, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache.source_hash(GATHER)
    read = Path.read_bytes

    def edited(path: Path) -> bytes:
        return read(path) + b"# edited" * path.as_posix().endswith(source)

    monkeypatch.setattr(Path, "read_bytes", edited)
    cache._hash_of.cache_clear()
    try:
        assert (cache.source_hash(GATHER) != before) == changes
    finally:
        cache._hash_of.cache_clear()


def test_a_form_counts_the_modules_that_compute_it() -> None:
    whole = GATHER.replace(part="model", model="biformer_tiny")
    hashes = {cache.source_hash(whole.replace(form=form)) for form in ("plain", "published", "runtime")}
    assert len(hashes) == 3


def test_what_auto_runs_depends_on_the_plans_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRATUNE_CONFIG_DIR", str(tmp_path))
    whole = GATHER.replace(part="model", model="biformer_tiny", backend="auto")
    before = cache.source_hash(whole)
    assert before
    (tmp_path / "plan.json").write_text("{}")
    assert cache.source_hash(whole) != before


# --- many cells at a time ---------------------------------------------------------------------


class ManyRunner(FakeRunner):
    """Counts who runs at a time; the first call waits until it is interrupted."""

    def __init__(self, *, first_waits: bool = False) -> None:
        super().__init__()
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.waits, self.released = first_waits, threading.Event()

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        with self.lock:
            waits, self.waits = self.waits, False
            self.now += 1
            self.most = max(self.most, self.now)
        if waits:
            assert self.released.wait(20)
            return Result(Record.of(cell, CPU, outcome="crashed", reason="killed"))
        time.sleep(0.001)
        with self.lock:
            self.now -= 1
        return super().run(cell, limit_s=limit_s, give_up_ms=give_up_ms)

    def interrupt(self) -> None:
        self.released.set()


def test_many_cells_run_side_by_side_baselines_first_and_no_more_than_there_are_slots(tmp_path: Path) -> None:
    runner, store = ManyRunner(), Store(tmp_path / "records.jsonl")
    everything = [
        GATHER.replace(seed=seed, backend=name) for seed in range(150) for name in ("dense", "gather")
    ]
    rows = list(ParallelEngine(runner, QUICK, slots=4, store=store).run(everything))
    assert sorted(row.cell_id for row in rows) == sorted(cell.cell_id for cell in everything)
    assert runner.ran == ["gather"] * 150 + ["dense"] * 150
    assert 2 <= runner.most <= 4
    assert {row.speedup for row in rows} == {1.0}
    again = ParallelEngine(runner, QUICK, slots=4, store=store)
    assert len(list(again.run(everything))) == again.reused == len(everything)
    assert len(runner.ran) == len(everything)


def test_a_caller_that_stops_ends_what_runs_side_by_side() -> None:
    runner = ManyRunner(first_waits=True)
    rows = ParallelEngine(runner, QUICK, slots=2).run(GATHER.replace(seed=seed) for seed in range(9))
    next(rows)
    rows.close()  # type: ignore[attr-defined]  # a generator, what Ctrl-C does to it
    assert runner.released.is_set()


def test_a_cell_that_waits_for_a_device_when_the_budget_ends_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bratune.run.parallel._GRACE_S", 0.0)
    runner = ManyRunner(first_waits=True)
    (row,) = ParallelEngine(runner, QUICK, slots=2, budget_s=0.1).run([GATHER])
    assert (row.outcome, row.reason) == ("timeout", "not finished: the budget of 0.1 s was spent")


# --- replay -----------------------------------------------------------------------------------


def test_replay_answers_from_rows_and_says_so() -> None:
    (row,) = CellEngine(ReplayRunner([stored()]), QUICK).run([GATHER])
    assert (row.evidence, row.outcome, row.median_ms) == ("replayed", "measured", 2.0)


def test_replay_never_guesses() -> None:
    (row,) = CellEngine(ReplayRunner([stored()], source="demo"), QUICK).run(cells("dense"))
    assert (row.evidence, row.outcome) == ("replayed", "error")
    assert row.reason == "not replayed: demo holds no row of this cell on cpu"


def test_replay_prefers_a_time_over_a_later_failure() -> None:
    good = stored()
    bad = good.replace(outcome="crashed", reason="x", median_ms=None)
    (row,) = CellEngine(ReplayRunner([good, bad]), QUICK).run([GATHER])
    assert row.median_ms == 2.0


def test_replay_of_several_machines_asks_which() -> None:
    rows = [stored(), stored(machine=replaced(CPU, gpu_key="h100"))]
    with pytest.raises(TargetError, match="hold cpu, h100; --gpu says which"):
        ReplayRunner(rows)
    assert ReplayRunner(rows, gpu="h100").machine.gpu_key == "h100"


@pytest.mark.parametrize(
    ("rows", "gpu", "message"),
    [([], "", "nothing in them was measured"), ([stored()], "a100", "as a100: they hold cpu")],
)
def test_nothing_to_replay_is_one_sentence(rows: list[Record], gpu: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        ReplayRunner(rows, gpu=gpu)


def test_a_replay_is_no_source_of_another_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    list(CellEngine(ReplayRunner([stored()]), QUICK, store=store).run([GATHER]))
    assert {row.evidence for row in store.records()} == {"replayed"}
    with pytest.raises(TargetError, match="nothing in them was measured"):
        ReplayRunner(store.records())


def test_a_replayed_row_is_of_the_cell_that_was_asked_for() -> None:
    (row,) = CellEngine(ReplayRunner([stored().replace(cell="{}")]), QUICK).run([GATHER])
    assert row.to_cell() == GATHER


def test_the_machine_of_a_row_makes_the_same_rows() -> None:
    assert Record.of(GATHER, stored().machine, timestamp_utc="") == Record.of(GATHER, CPU, timestamp_utc="")


# --- kill -9 ----------------------------------------------------------------------------------


class SlowReplay(ReplayRunner):
    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        time.sleep(0.01)
        return super().run(cell, limit_s=limit_s)


def sweep(source: list[Record], target: Path) -> None:
    """What `profile --replay` does, in a process of its own, with a cell taking 10 ms."""
    store = Store(target)
    with CellEngine(SlowReplay(source), QUICK, store=store) as engine:
        for _ in engine.run(row.to_cell() for row in source):
            pass


def finished(path: Path) -> Counter[tuple[object, ...]]:
    rows = [row for row in read_records([path]) if row.outcome != "started"]
    return Counter((row.cell_id, row.backend, row.median_ms, row.evidence) for row in rows)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_sweep_killed_at_ten_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    everything = [
        GATHER.replace(seed=seed, backend=name) for seed in range(40) for name in ("gather", "dense")
    ]
    source = list(CellEngine(FakeRunner(), QUICK).run(everything))
    sweep(source, whole)

    forked = multiprocessing.get_context("fork")
    moments = random.Random(5)
    interrupted = 0
    for _ in range(10):
        process = forked.Process(target=sweep, args=(source, broken))
        process.start()
        process.join(moments.uniform(0.02, 0.1))
        process.kill()
        process.join()
        interrupted += process.exitcode == -signal.SIGKILL
    assert interrupted >= 5  # it was really killed, again and again
    sweep(source, broken)

    assert finished(broken) == finished(whole)
    assert set(finished(broken).values()) == {1}  # nothing was measured twice
    assert sum(finished(broken).values()) == len(everything)
