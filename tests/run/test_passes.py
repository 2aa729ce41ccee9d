"""Passes: fresh processes that measure groups in turn, spread over a run, resumed where one ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bratune import machine
from bratune.cell import Cell
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run import session
from bratune.run.engine import CellEngine, LocalEngine
from bratune.run.groups import groups_of
from bratune.run.isolated import IsolatedEngine, IsolatedRunner
from bratune.run.measure_cell import Result
from bratune.run.parallel import ParallelEngine
from bratune.run.passes import disturbance
from bratune.run.replay import ReplayRunner
from bratune.run.runner import Turns
from bratune.store import Store, pool, read_records
from bratune.work.request import make_request

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU", threads=2)
SETTINGS = MeterSettings(min_time_s=0.0, max_noise_pct=100.0, min_samples=6, max_samples=6, warmup_s=0.0)
PROBLEM = Problem(batch=1, height=8, width=8, heads=2, head_dim=8, region=(4, 4), topk=2)


def cell(backend: str, seed: int = 0) -> Cell:
    return Cell(part="attention", problem=PROBLEM, backend=backend, l2="warm", seed=seed)


GROUPS = [cell(name, seed) for seed in (0, 1) for name in ("gather", "dense")]


def group_part(cells: Sequence[Cell]) -> str:
    return cells[0].part if len({one.part for one in cells}) == 1 else "block"


class FakeGroups:
    """Passes of known times: the n-th pass takes n milliseconds, `dense` half of it."""

    evidence = "measured"

    def __init__(
        self, failing: dict[tuple[str, int], str] | None = None, die_at: tuple[int, int] = (0, 0)
    ) -> None:
        self.machine = CPU
        self.failing = failing or {}
        self.die_at = die_at
        self.log: list[str] = []
        self.parts: dict[int, str] = {}
        self.number = 0

    def fresh(self) -> None:
        self.log.append("fresh")

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        cells, base, seed = turns.cells, turns.base, turns.seed
        self.parts[len(self.log)] = f" {group_part(cells)}"
        self.log.append(f"{seed}:{cells[0].seed}:" + "+".join(one.backend for one in cells))
        if (seed, cells[0].seed) == self.die_at:
            raise KeyboardInterrupt
        for one in cells:
            outcome = self.failing.get((one.backend, seed))
            if outcome:
                yield one, Result(Record.of(one, CPU, outcome=outcome, reason="as told"))
                continue
            median = seed * (0.5 if one.backend == "dense" else 1.0)
            ratio = None if one == base or base is None else 2.0
            row = Record.of(one, CPU, median_ms=median, ratio=ratio, ratio_lo=ratio, ratio_hi=ratio)
            yield one, Result(row, (median,))

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        raise AssertionError("cells of a pass take turns")

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def engine(runner: FakeGroups, path: Path, passes: int = 3, **options: object) -> CellEngine:
    return CellEngine(runner, SETTINGS, store=Store(path), passes=passes, **options)  # type: ignore[arg-type]


def test_passes_are_spread_over_the_groups_each_in_a_fresh_process(tmp_path: Path) -> None:
    runner = FakeGroups()
    rows = list(engine(runner, tmp_path / "r.jsonl", passes=2).run(GROUPS))
    turns = ["0:gather+dense", "1:gather+dense"]
    assert runner.log == ["fresh", *(f"1:{t}" for t in turns), "fresh", *(f"2:{t}" for t in turns)]
    assert [(row.backend, row.passes) for row in rows] == [("gather", 2), ("dense", 2)] * 2
    assert [row.median_ms or 0.0 for row in rows[:2]] == pytest.approx([2**0.5, 0.5 * 2**0.5])
    assert [row.speedup or 0.0 for row in rows[:2]] == pytest.approx([1.0, 2.0])
    assert {row.baseline for row in rows} == {"gather"}


def test_every_pass_is_a_row_with_its_number_after_a_line_that_it_started(tmp_path: Path) -> None:
    list(engine(FakeGroups(), tmp_path / "r.jsonl", passes=2).run(GROUPS[:2]))
    rows = [(r.backend, r.outcome, r.pass_number, r.passes) for r in read_records([tmp_path / "r.jsonl"])]
    assert rows == [
        (backend, outcome, number, 2)
        for number in (1, 2)
        for outcome in ("started", "measured")
        for backend in ("gather", "dense")
    ]


def test_the_same_again_adds_nothing_and_more_passes_add_those(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = list(engine(FakeGroups(), path, passes=2).run(GROUPS))
    again, more = FakeGroups(), FakeGroups()
    same = engine(again, path, passes=2)
    assert list(same.run(GROUPS)) == first
    assert (again.log, same.reused) == ([], 4)
    assert {row.passes for row in engine(more, path, passes=3).run(GROUPS)} == {3}
    assert more.log == ["fresh", "3:0:gather+dense", "3:1:gather+dense"]


def test_an_interrupted_run_goes_on_with_the_pass_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        list(engine(FakeGroups(die_at=(2, 1)), path, passes=2).run(GROUPS))
    runner = FakeGroups()
    rows = list(engine(runner, path, passes=2).run(GROUPS))
    assert runner.log == ["fresh", "2:1:gather+dense"]
    assert {row.passes for row in rows} == {2}


def test_a_backend_that_is_asked_for_later_is_measured_beside_the_baseline(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    list(engine(FakeGroups(), path, passes=2).run(GROUPS[:1]))
    runner = FakeGroups()
    _, dense = engine(runner, path, passes=2).run(GROUPS[:2])
    assert runner.log == ["fresh", "1:0:gather+dense", "fresh", "2:0:gather+dense"]
    assert (dense.ratio, dense.passes) == (2.0, 2)
    measured = [row.backend for row in read_records([path]) if row.outcome == "measured"]
    assert measured == ["gather", "gather", "dense", "dense"]  # whose row is there already gets no second one


def test_what_failed_is_not_tried_in_every_pass(tmp_path: Path) -> None:
    runner = FakeGroups({("dense", 1): "unsupported"})
    rows = list(engine(runner, tmp_path / "r.jsonl", passes=2).run(GROUPS[:2]))
    assert runner.log == ["fresh", "1:0:gather+dense", "fresh", "2:0:gather"]
    assert [row.outcome for row in rows] == ["measured", "unsupported"]


def test_a_spent_budget_leaves_the_passes_that_were_made(tmp_path: Path) -> None:
    seconds = iter(float(n) for n in range(100))
    runner = FakeGroups()
    rows = list(
        engine(runner, tmp_path / "r.jsonl", passes=9, budget_s=20.0, clock=lambda: next(seconds)).run(GROUPS)
    )
    made = [row.passes or 0 for row in rows]
    assert all(1 <= count < 9 for count in made)


def test_a_replay_answers_with_all_passes_together(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    pooled = list(engine(FakeGroups(), path, passes=3).run(GROUPS[:2]))
    with CellEngine(ReplayRunner.of([path]), SETTINGS, passes=3) as replay:
        rows = list(replay.run(GROUPS[:2]))
    assert [(r.median_ms, r.passes, r.ratio) for r in rows] == [
        (r.median_ms, r.passes, r.ratio) for r in pooled
    ]
    assert {row.evidence for row in rows} == {"replayed"}


# --- comparisons ---------------------------------------------------------------------------------


def test_a_comparison_takes_turns_in_fresh_processes_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    gather, dense = GROUPS[:2]
    path, runner = tmp_path / "r.jsonl", FakeGroups()
    first = engine(runner, path).in_turn([dense, gather], dense, 6, enough=lambda made: made == 2)
    turns = ["fresh", "1:0:dense+gather", "fresh", "2:0:dense+gather"]
    assert runner.log == turns
    assert [(row.ratio, row.pass_number, row.baseline) for row in first[gather]] == [
        (2.0, 1, dense.cell_id),
        (2.0, 2, dense.cell_id),
    ]
    begun = [row.outcome for row in read_records([path])]
    assert begun == ["started", "started", "measured", "measured"] * 2
    again = FakeGroups()
    more = engine(again, path).in_turn([dense, gather], dense, 3)
    assert again.log == ["fresh", "3:0:dense+gather"]
    assert [len(more[cell]) for cell in (dense, gather)] == [3, 3]
    one = FakeGroups()
    engine(one, path).in_turn([dense, gather, GROUPS[2]], dense, 3)
    assert one.log == [text for n in (1, 2, 3) for text in ("fresh", f"{n}:0:dense+gather")]


def test_a_comparison_is_answered_by_nothing_else_and_answers_nothing_else(tmp_path: Path) -> None:
    gather, dense = GROUPS[:2]
    path, runner = tmp_path / "r.jsonl", FakeGroups()
    before = list(engine(runner, path, passes=2).run([gather, dense]))
    runner.log.clear()
    compared = engine(runner, path).in_turn([gather, dense], dense, 2)
    assert len(runner.log) == 4
    runner.log.clear()
    assert list(engine(runner, path, passes=2).run([gather, dense])) == before
    assert len(engine(runner, path).in_turn([gather, dense], gather, 2)[dense]) == 2  # another base
    assert runner.log == ["fresh", "1:0:gather+dense", "fresh", "2:0:gather+dense"]
    runner.log.clear()
    searched = engine(runner, path).in_turn([gather, dense], dense, 1, about="search")
    assert runner.log == ["fresh", "1:0:gather+dense"]
    rows = list(read_records([path]))
    assert [row.passes for row in pool(rows)] == [2, 2]  # and no table shows ratios to another base
    with CellEngine(ReplayRunner.of([path]), SETTINGS) as replay:
        told = replay.in_turn([gather, dense], dense, 6)
        again = replay.in_turn([gather, dense], dense, 1, about="search")
    assert [row.replace(evidence="measured") for row in again[gather]] == searched[gather]
    assert [row.replace(evidence="measured") for row in told[gather]] == compared[gather]
    assert {row.evidence for row in told[gather]} == {"replayed"}


def test_a_disturbed_pass_of_a_comparison_is_made_again_by_the_same_command(tmp_path: Path) -> None:
    class Busy(FakeGroups):
        def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
            for one, result in super().run_group(turns):
                wait = 40.0 if turns.seed == 2 else 1.0
                yield one, Result(result.record.replace(cpu_wait_pct=wait), result.samples_ms)

    gather, dense = GROUPS[:2]
    path, runner = tmp_path / "r.jsonl", FakeGroups()
    busy = engine(Busy(), path).in_turn([gather, dense], gather, 3)
    assert [row.cpu_wait_pct for row in busy[dense]] == [1.0, 40.0, 1.0]
    quiet = engine(runner, path).in_turn([gather, dense], gather, 3)
    assert runner.log == ["fresh", "2:0:gather+dense"]
    assert sorted(row.pass_number or 0 for row in quiet[dense]) == [1, 2, 3]
    assert 40.0 not in [row.cpu_wait_pct for row in quiet[dense]]


def test_cells_of_this_process_have_one_pass_whatever_is_asked(tmp_path: Path) -> None:
    with LocalEngine(machine.detect("cpu"), SETTINGS) as local:
        rows = local.in_turn(GROUPS[:2], GROUPS[0], 6)
    assert [len(rows[cell]) for cell in GROUPS[:2]] == [1, 1]
    assert rows[GROUPS[1]][0].ratio is not None


@pytest.mark.usefixtures("forked")
def test_a_comparison_in_real_workers_has_ratios_to_its_base() -> None:
    with IsolatedEngine(machine.detect("cpu"), SETTINGS) as real:
        rows = real.in_turn(GROUPS[:2], GROUPS[1], 2)
    assert [row.ratio for row in rows[GROUPS[1]]] == [1.0, 1.0]
    assert all(row.ratio is not None and row.ratio_lo is not None for row in rows[GROUPS[0]])


def test_a_replay_in_passes_has_the_row_of_each_for_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    stored = engine(FakeGroups(), path, passes=3)
    pooled = list(stored.run(GROUPS[:2]))
    runner = ReplayRunner.of([path])
    assert runner.passes == 3
    with CellEngine(runner, SETTINGS, passes=runner.passes) as replay:
        rows = list(replay.run([*GROUPS[:2], cell("sparse")]))
    assert [(r.median_ms, r.ratio, r.passes) for r in rows[:2]] == [
        (r.median_ms, r.ratio, r.passes) for r in pooled
    ]
    assert [(r.backend, r.pass_number, r.median_ms) for r in replay.pass_rows if r.ok] == [
        (r.backend, r.pass_number, r.median_ms) for r in stored.pass_rows
    ]
    assert (rows[2].outcome, rows[2].evidence) == ("error", "replayed")


def test_a_pass_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    now = [0.0]

    class Slow(FakeGroups):
        def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
            now[0] += 10.0 if turns.cells[0].seed == 0 else 2.0
            return super().run_group(turns)

    runner = Slow()
    rows = list(
        engine(runner, tmp_path / "r.jsonl", passes=2, budget_s=20.0, clock=lambda: now[0]).run(GROUPS)
    )
    # 8 s are left after the first passes: not enough for the group that took 10 s, but for the other one.
    assert [line for line in runner.log if line != "fresh"] == [
        "1:0:gather+dense",
        "1:1:gather+dense",
        "2:1:gather+dense",
    ]
    assert [row.passes for row in rows] == [1, 1, 2, 2]


def test_a_block_takes_turns_with_its_parts() -> None:
    own = {"model": "biformer_tiny", "stage": 1, "n_win": "2", "topk": "1", "image": (32, 32)}
    parts = [cell("").replace(part=name, **own) for name in ("qkv", "mlp")]
    block = cell("dense").replace(part="block", **own)
    attention = cell("dense").replace(**own)
    other = block.replace(stage=2)
    assert groups_of([attention, *parts, block, other]) == [[attention], [*parts, block], [other]]
    by_gather = block.replace(backend="gather")
    with CellEngine(FakeGroups(), SETTINGS, passes=2) as passes:
        rows = list(passes.run([*parts, by_gather]))
    assert [row.ratio for row in rows] == [None] * 3  # none is compared with another


def order_of(*, answer_first: bool) -> list[str]:
    """What takes turns, group by group, in a session of two passes."""
    runner = FakeGroups()
    asked = make_request(CPU, backends=("gather", "dense"), forms=("published", "gather", "auto"))
    with CellEngine(runner, SETTINGS, passes=2) as passes:
        rows = list(session.run(asked, passes, answer_first=answer_first))
    assert len({row.cell_id for row in rows}) == len(rows)
    assert passes.reused == 0
    return [line.split(":")[0] + runner.parts[i] for i, line in enumerate(runner.log) if line != "fresh"]


def test_under_a_budget_the_whole_models_have_all_their_passes_before_anything_else() -> None:
    found = order_of(answer_first=True)
    assert found[:2] == ["1 model", "2 model"]
    assert found[2:10] == ["1 attention"] * 4 + ["2 attention"] * 4
    assert {line[2:] for line in found[10:]} == {"model", "block"}


def test_with_time_the_passes_of_the_answer_are_spread_over_the_run() -> None:
    found = order_of(answer_first=False)
    assert found[:10] == (["1 attention"] * 4 + ["1 model"]) + (["2 attention"] * 4 + ["2 model"])
    assert found[10] == "1 model"  # the fastest of every stage, in turn with the others once more
    assert found[11:15] == ["1 block"] * 4


@pytest.mark.parametrize("slots", [1, 3])
def test_several_devices_each_take_passes_of_groups(tmp_path: Path, slots: int) -> None:
    path = tmp_path / "r.jsonl"
    runner = FakeGroups()
    several = ParallelEngine(runner, SETTINGS, slots=slots, store=Store(path), passes=2)
    rows = list(several.run(GROUPS))
    assert sorted(runner.log) == [f"{n}:{seed}:gather+dense" for n in (1, 2) for seed in (0, 1)]
    assert [(row.backend, row.seed, row.passes) for row in rows] == [
        (one.backend, one.seed, 2) for one in GROUPS
    ]
    assert [row.ratio for row in rows] == [None, pytest.approx(2.0)] * 2
    again = FakeGroups()
    same = ParallelEngine(again, SETTINGS, slots=slots, store=Store(path), passes=2)
    assert len(list(same.run(GROUPS))) == 4
    assert (again.log, same.reused) == ([], 4)


def test_several_devices_stop_with_the_budget(tmp_path: Path) -> None:
    runner = FakeGroups()
    now = iter(float(n) for n in range(1000))
    several = ParallelEngine(runner, SETTINGS, slots=2, passes=50, budget_s=100.0, clock=lambda: next(now))
    assert all(1 <= (row.passes or 0) < 50 for row in several.run(GROUPS))


# --- real workers ------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
def test_two_passes_are_two_processes_and_ratios_are_within_rounds() -> None:
    with IsolatedEngine(machine.detect("cpu"), SETTINGS, passes=2) as real:
        gather, dense = real.run(GROUPS[:2])
    taken = (gather.n_samples or 0) + (gather.n_discarded or 0)  # those that waited are set aside
    assert (gather.outcome, gather.passes, taken) == ("measured", 2, 12)
    assert (gather.ratio, dense.baseline) == (None, "gather")
    assert dense.ratio is not None
    assert dense.speedup == dense.ratio
    assert dense.cpu_wait_pct is not None


@pytest.mark.usefixtures("forked")
def test_a_cell_has_the_memory_that_it_would_have_alone() -> None:
    with contextlib.closing(IsolatedRunner(machine.detect("cpu"), SETTINGS)) as runner:
        together = {
            one: result.record for one, result in runner.run_group(Turns(cells=GROUPS[:2], limit_s=60))
        }
        runner.fresh()
        ((_, alone),) = runner.run_group(Turns(cells=GROUPS[1:2], limit_s=60))
    assert alone.record.peak_alloc_mb is not None
    assert together[GROUPS[1]].peak_alloc_mb == pytest.approx(alone.record.peak_alloc_mb, rel=0.02)


@pytest.mark.usefixtures("failing", "forked")
def test_a_backend_that_crashes_costs_its_own_process_and_not_the_pass() -> None:
    group = [GROUPS[0], cell("fault-segfault"), cell("fault-raise"), GROUPS[1]]
    runner = IsolatedRunner(machine.detect("cpu"), SETTINGS)
    turns = Turns(cells=group, limit_s=60, base=GROUPS[0])
    found = {one.backend: result.record for one, result in runner.run_group(turns)}
    runner.close()
    assert {name: row.outcome for name, row in found.items()} == {
        "gather": "measured",
        "fault-segfault": "crashed",
        "fault-raise": "error",
        "dense": "measured",
    }
    assert found["dense"].ratio is not None


@pytest.mark.parametrize(("wait", "said"), [(None, False), (9.0, False), (25.0, True)])
def test_a_busy_machine_is_told_once(wait: float | None, said: bool) -> None:
    rows = [Record.of(one, CPU, median_ms=1.0, cpu_wait_pct=wait) for one in GROUPS]
    assert ("waited for a processor 25 % of the time" in disturbance(rows)) is said
