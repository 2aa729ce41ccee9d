"""Several devices at once: each has its rows, its store and its worker."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from bratune.cell import Cell
from bratune.errors import TargetError
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run import fleet, session
from bratune.run.engine import CellEngine
from bratune.run.measure_cell import Result
from bratune.run.parallel import ParallelEngine
from bratune.run.target import device_names
from bratune.store import Store
from bratune.work.request import make_request

QUICK = MeterSettings.for_effort("quick")
PROBLEM = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(2, 2), topk=2)
CELLS = [Cell(part="attention", problem=PROBLEM, backend="gather", seed=seed) for seed in range(4)]


def board(uuid: str) -> Machine:
    return Machine(kind="cuda", device="cuda:0", gpu_key="h100", gpu_name="H100", gpu_uuid=uuid)


class Device:
    """Measures when it is told to; an interrupt ends its wait, as a killed worker does."""

    evidence = "measured"

    def __init__(self, uuid: str, *, waits_at: int = -1, fails_at: int = -1) -> None:
        self.machine = board(uuid)
        self.waits_at, self.fails_at = waits_at, fails_at
        self.released = threading.Event()
        self.waiting = threading.Event()
        self.closed = False

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        if cell.seed == self.fails_at:
            raise OSError("the disk is full")
        if cell.seed == self.waits_at:
            self.waiting.set()
            assert self.released.wait(20)
            return Result(Record.of(cell, self.machine, outcome="crashed", reason="killed"))
        return Result(Record.of(cell, self.machine, median_ms=1.0))

    def interrupt(self) -> None:
        self.released.set()

    def close(self) -> None:
        self.closed = True


def engines(folder: Path, *devices: Device) -> list[CellEngine]:
    return [
        CellEngine(device, QUICK, store=Store(folder / f"{device.machine.gpu_uuid}.jsonl"))
        for device in devices
    ]


def everything(number: int, engine: CellEngine) -> Iterator[Record]:
    return engine.run(CELLS)


def outcomes(folder: Path, uuid: str) -> list[str]:
    return [row.outcome for row in Store(folder / f"{uuid}.jsonl").records() if row.outcome != "started"]


def test_every_device_measures_everything_into_a_store_of_its_own(tmp_path: Path) -> None:
    rows = list(fleet.run(engines(tmp_path, Device("a"), Device("b")), everything))
    assert sorted((number, record.gpu_uuid) for number, record in rows) == [(0, "a")] * 4 + [(1, "b")] * 4
    for uuid in ("a", "b"):
        assert outcomes(tmp_path, uuid) == ["measured"] * 4
        assert {row.gpu_uuid for row in Store(tmp_path / f"{uuid}.jsonl").records()} == {uuid}


def test_one_device_needs_no_thread(tmp_path: Path) -> None:
    seen = []

    def where(number: int, engine: CellEngine) -> Iterator[Record]:
        seen.append(threading.current_thread())
        return engine.run(CELLS)

    assert len(list(fleet.run(engines(tmp_path, Device("a")), where))) == 4
    assert seen == [threading.main_thread()]


def test_a_failure_of_one_ends_all_and_the_cell_in_flight_has_no_outcome(tmp_path: Path) -> None:
    waiting = Device("a", waits_at=2)

    class FailsOnceTheOtherWaits(Device):
        def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
            assert waiting.waiting.wait(20)
            return super().run(cell, limit_s=limit_s)

    threads = threading.active_count()
    failing = FailsOnceTheOtherWaits("b", fails_at=1)
    with pytest.raises(OSError, match="the disk is full"):
        list(fleet.run(engines(tmp_path, waiting, failing), everything))
    assert outcomes(tmp_path, "a") == ["measured"] * 2
    assert [row.outcome for row in Store(tmp_path / "a.jsonl").records()][-1] == "started"
    assert threading.active_count() == threads


def test_a_caller_that_stops_ends_all(tmp_path: Path) -> None:
    threads = threading.active_count()
    devices = Device("a", waits_at=3), Device("b", waits_at=3)
    rows = fleet.run(engines(tmp_path, *devices), everything)
    next(rows)
    for device in devices:
        assert device.waiting.wait(20)
    rows.close()  # what Ctrl-C does
    assert threading.active_count() == threads
    for uuid in ("a", "b"):
        assert outcomes(tmp_path, uuid) == ["measured"] * 3


@pytest.mark.parametrize(
    ("text", "names"),
    [("auto", ("auto",)), ("cuda:1", ("cuda:1",)), ("cuda:0, cuda:2", ("cuda:0", "cuda:2"))],
)
def test_devices_are_named_one_by_one(text: str, names: tuple[str, ...]) -> None:
    assert device_names(text) == names


def test_all_devices_of_a_machine_without_any_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(TargetError, match="finds no CUDA device; cpu would work"):
        device_names("all")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device_names("all") == ("cuda:0", "cuda:1")


class Anything:
    """Measures whatever it is given; `dense` is the fastest."""

    evidence = "measured"
    machine = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU")

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        return Result(Record.of(cell, self.machine, median_ms=1.0 if "dense" in cell.backend else 2.0))

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def test_many_slots_measure_what_one_measures_in_two_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(
        Anything.machine,
        models=("biformer_tiny", "biformer_small"),
        backends=("gather", "dense"),
        batches=(1, 2),
    )
    one = list(session.run(request, CellEngine(Anything(), QUICK)))
    engine = ParallelEngine(Anything(), QUICK, slots=8)
    goes = []
    together = engine.run

    def counted(cells: Iterable[Cell]) -> Iterator[Record]:
        goes.append(list(cells))
        return together(goes[-1])

    monkeypatch.setattr(engine, "run", counted)
    many = list(session.run(request, engine))
    assert len(goes) == 2
    assert {(row.cell_id, row.speedup) for row in many} == {(row.cell_id, row.speedup) for row in one}
    assert len(many) == len(one)


def parts_in_order(*, answer_first: bool) -> list[tuple[str, int | None]]:
    request = make_request(Anything.machine, models=("biformer_small",), backends=("gather", "dense"))
    rows = session.run(request, CellEngine(Anything(), QUICK), answer_first=answer_first)
    kinds = [(row.part if row.part in ("attention", "model") else "block", row.stage) for row in rows]
    return list(dict.fromkeys(kinds))


def test_stages_come_in_order_when_there_is_time() -> None:
    found = parts_in_order(answer_first=False)
    assert [stage for part, stage in found if part == "attention"] == [1, 2, 3, 4]
    assert found.index(("block", 1)) < found.index(("attention", 2))


def test_under_a_budget_the_answer_comes_first_and_where_most_can_be_gained() -> None:
    found = parts_in_order(answer_first=True)
    attention = [stage for part, stage in found if part == "attention"]
    assert sorted(stage for stage in attention if stage) == [1, 2, 3, 4]
    assert attention[0] == 3  # 18 of 30 blocks
    assert found[0] == ("model", None)
    assert {part for part, _ in found[5:]} == {"block"}


def test_under_a_budget_the_networks_of_a_comparison_of_attentions_come_first() -> None:
    request = make_request(Anything.machine, models=("biformer_stl",), mixers=("window", "full"))
    for answer_first, ends in ((True, (0, 4)), (False, (1, 0))):
        rows = list(session.run(request, CellEngine(Anything(), QUICK), answer_first=answer_first))
        assert (rows[0].to_cell().stage, rows[-1].to_cell().stage) == ends
        assert len({row.cell_id for row in rows}) == len(rows)
