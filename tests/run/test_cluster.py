"""Cells on a Ray cluster: three nodes on this machine, with accelerators in name only."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bratune
from bratune import cluster
from bratune.cell import Cell
from bratune.cluster import ClusterEngine, Site
from bratune.errors import MissingPackageError, TargetError, UnknownNameError
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run.measure_cell import Result
from bratune.run.runner import Turns
from bratune.store import Store

QUICK = MeterSettings.for_effort("quick")
PROBLEM = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(2, 2), topk=2)


def cells(count: int) -> list[Cell]:
    return [Cell(part="attention", problem=PROBLEM, backend="dense", seed=seed) for seed in range(count)]


class Fake:
    """A runner that takes a while and leaves a file behind for every cell that it finished."""

    evidence = "measured"

    def __init__(
        self,
        folder: str,
        seconds: float,
        version: str = bratune.__version__,
        special: dict[int, str] | None = None,
        dies_in: int = 0,
    ) -> None:
        self.folder, self.seconds, self.special = Path(folder), seconds, special or {}
        self.dies_in = dies_in
        self.machine = Machine(kind="cuda", device="cuda:0", gpu_key="a100", gpu_name="A100", bratune=version)

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        (self.folder / f"{cell.seed}-started-{time.time_ns()}").touch()
        match self.special.get(cell.seed):
            case "hangs":
                time.sleep(600)
            case "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raises":
                raise OSError("no space left on this node")
            case "another torch":
                self.machine = Machine.from_dict(self.machine.to_dict() | {"torch": "9.9"})
        time.sleep(self.seconds)
        (self.folder / f"{cell.seed}-finished-{time.time_ns()}").touch()
        return Result(Record.of(cell, self.machine, median_ms=1.0 + cell.seed), (1.0, 2.0))

    def fresh(self) -> None:
        (self.folder / f"0-fresh-{time.time_ns()}").touch()

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        group, base, seed = turns.cells, turns.base, turns.seed
        (self.folder / f"{seed}-turn-{'+'.join(str(cell.seed) for cell in group)}-{os.getpid()}").touch()
        if seed == self.dies_in and not (self.folder / "0-died-0").exists():
            (self.folder / "0-died-0").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for cell in reversed(group):  # as they come
            row = Record.of(cell, self.machine, median_ms=float(seed))
            yield cell, Result(row if cell == base else row.replace(ratio=2.0), (1.0,))

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


class TestSites:
    NODES = (
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0},
        {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0},
        {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0},
        {"CPU": 6.0},
        {"CPU": 2.0},
        {"memory": 1.0},
    )

    def test_gpus_of_a_kind_are_one_site_and_bare_nodes_another(self) -> None:
        assert cluster._sites(self.NODES) == [Site("A100", 6), Site("L4", 1), Site("", 1, 6)]

    def test_two_cells_never_share_a_node_without_a_gpu(self) -> None:
        (site,) = cluster._sites([{"CPU": 4.0}, {"CPU": 6.0}, {"CPU": 6.0}, {"CPU": 2.0}])
        assert site == Site("", 2, 6)
        assert site.options() == {"num_cpus": 6}

    @pytest.mark.parametrize(
        ("key", "kind", "same"),
        [
            ("a100", "A100", True),
            ("a100-pcie-40", "A100", True),
            ("a10", "A100", False),
            ("h100", "A100", False),
            ("rtx4090", "RTX4090", True),
        ],
    )
    def test_a_key_names_the_accelerators_of_its_family(self, key: str, kind: str, same: bool) -> None:
        assert Site(kind, 1).is_board(key) is same

    def test_a_key_that_no_board_has_is_refused(self) -> None:
        with pytest.raises(UnknownNameError, match="no GPU is called 'zz9'"):
            Site("A100", 1).is_board("zz9")


def test_without_ray_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    cluster._ray.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match=r"pip install 'bratune\[cluster\]'"):
            cluster.connect("auto")
    finally:
        cluster._ray.cache_clear()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of a head and three nodes: two with an "A100", one with an "L4"."""
    ray: Any = pytest.importorskip("ray", reason="needs Ray: pip install 'bratune[cluster]'")
    tools: Any = importlib.import_module("ray.cluster_utils")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = tools.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for kind in ("A100", "A100", "L4"):
        made.add_node(num_cpus=1, num_gpus=1, resources={f"accelerator_type:{kind}": 1})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def finished(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[0]) for path in folder.glob("*-finished-*"))


@pytest.mark.slow
def test_rows_of_all_nodes_reach_the_store_of_the_driver(nodes: Any, tmp_path: Path) -> None:
    (site,) = cluster.find_sites(["a100"])
    assert site == Site("A100", 2)
    store = Store(tmp_path / "records.jsonl")
    folder = str(tmp_path)
    with ClusterEngine(site, QUICK, make_runner=lambda _: Fake(folder, 0.2), store=store) as engine:
        assert engine.machine.gpu_key == "a100"
        rows = list(engine.run(cells(4)))
    assert sorted(row.seed or 0 for row in rows) == [0, 1, 2, 3]
    stored = [row for row in store.records() if row.outcome == "measured"]
    assert sorted(row.median_ms or 0 for row in stored) == [1, 2, 3, 4]
    assert finished(tmp_path) == [0, 1, 2, 3]
    with ClusterEngine(site, QUICK, make_runner=lambda _: Fake(folder, 0.2), store=store) as engine:
        assert len(list(engine.run(cells(5)))) == 5
        assert engine.reused == 4
    assert finished(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_pass_of_a_group_is_one_task_in_a_new_process_of_a_node(nodes: Any, tmp_path: Path) -> None:
    folder, group = (
        str(tmp_path),
        [cell.replace(backend=name) for cell in cells(2) for name in ("gather", "dense")],
    )
    with ClusterEngine(
        Site("A100", 2),
        QUICK,
        make_runner=lambda _: Fake(folder, 0.0),
        passes=3,
        store=Store(tmp_path / "r.jsonl"),
    ) as engine:
        rows = list(engine.run(group))
    assert [(row.backend, row.seed, row.passes, row.ratio) for row in rows] == [
        ("gather", 0, 3, None),
        ("dense", 0, 3, 2.0),
        ("gather", 1, 3, None),
        ("dense", 1, 3, 2.0),
    ]
    turns = sorted(path.name.rpartition("-")[0] for path in tmp_path.glob("*-turn-*"))
    assert turns == [f"{number}-turn-{seed}+{seed}" for number in (1, 2, 3) for seed in (0, 1)]
    assert len(list(tmp_path.glob("*-fresh-*"))) == 6
    assert [(row.pass_number, row.ok) for row in engine.pass_rows] == [(n, True) for n in (1, 2, 3)] * 4


@pytest.mark.slow
def test_a_pass_that_is_lost_with_its_node_is_measured_again(nodes: Any, tmp_path: Path) -> None:
    folder = str(tmp_path)
    with ClusterEngine(
        Site("A100", 2), QUICK, make_runner=lambda _: Fake(folder, 0.0, dies_in=2), passes=2
    ) as engine:
        rows = list(engine.run([cell.replace(backend="gather") for cell in cells(1)]))
    assert (tmp_path / "0-died-0").exists()
    assert [(row.outcome, row.passes) for row in rows] == [("measured", 2)]


@pytest.mark.slow
def test_a_gpu_that_the_cluster_lacks_is_named_with_what_it_has(nodes: Any) -> None:
    with pytest.raises(TargetError, match=r"'h100' was asked for .* it has A100, L4"):
        cluster.find_sites(["h100"])


@pytest.mark.slow
def test_a_node_with_another_version_is_refused(nodes: Any, tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(TargetError, match=r"a node has bratune 9\.9"):
        ClusterEngine(Site("L4", 1), QUICK, make_runner=lambda _: Fake(folder, 0, "9.9"))


@pytest.mark.slow
def test_cells_of_a_lost_node_run_elsewhere(nodes: Any, tmp_path: Path) -> None:
    site = Site("L4", 2)
    extra = nodes.add_node(num_cpus=1, num_gpus=1, resources={"accelerator_type:L4": 1})
    folder = str(tmp_path)
    with ClusterEngine(
        site, QUICK, make_runner=lambda _: Fake(folder, 2.0), store=Store(tmp_path / "r.jsonl")
    ) as engine:
        rows = engine.run(cells(5))
        got = [next(rows)]
        nodes.remove_node(extra)
        got += rows
    assert sorted(row.seed or 0 for row in got) == [0, 1, 2, 3, 4]
    assert {row.outcome for row in got} == {"measured"}
    assert set(finished(tmp_path)) == {0, 1, 2, 3, 4}


@pytest.mark.slow
def test_what_a_node_raises_is_the_reason_of_a_row_and_the_run_goes_on(nodes: Any, tmp_path: Path) -> None:
    folder = str(tmp_path)
    with ClusterEngine(
        Site("A100", 2), QUICK, make_runner=lambda _: Fake(folder, 0.1, special={1: "raises"})
    ) as engine:
        rows = {row.seed: row for row in engine.run(cells(4))}
    assert (rows[1].outcome, rows[1].reason) == ("error", "on a node: no space left on this node")
    assert [rows[seed].outcome for seed in (0, 2, 3)] == ["measured"] * 3


@pytest.mark.slow
def test_a_node_of_other_versions_is_found_out_cell_by_cell(nodes: Any, tmp_path: Path) -> None:
    folder = str(tmp_path)
    with ClusterEngine(
        Site("L4", 1), QUICK, make_runner=lambda _: Fake(folder, 0.0, special={0: "another torch"})
    ) as engine:
        first, second = engine.run(cells(2))
    assert first.outcome == "measured"
    assert second.outcome == "error"
    assert second.reason.endswith("has torch 9.9 and the others (nothing)")


@pytest.mark.slow
def test_a_cell_that_never_comes_back_does_not_hold_up_the_sweep(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LEAST_SLACK_S", 1.0)
    folder = str(tmp_path)
    with ClusterEngine(
        Site("A100", 2),
        QUICK,
        make_runner=lambda _: Fake(folder, 0.1, special={0: "hangs"}),
        cell_limit_s=1.0,
    ) as engine:
        rows = {row.seed: row for row in engine.run(cells(6))}
    assert [rows[seed].outcome for seed in range(6)] == ["timeout", *["measured"] * 5]
    assert rows[0].reason.startswith("not finished: its A100 node gave no result within 2 s")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "stops"])
def test_the_last_cell_cannot_hold_a_sweep_for_ever(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(cluster, "_LEAST_SLACK_S", 1.0)
    monkeypatch.setattr(cluster, "_LOOK_S", 0.2)
    folder = str(tmp_path)
    with ClusterEngine(
        Site("A100", 2), QUICK, make_runner=lambda _: Fake(folder, 0.1, special={2: fault}), cell_limit_s=1.0
    ) as engine:
        rows = {row.seed: row for row in engine.run(cells(3))}
    assert [rows[seed].outcome for seed in range(3)] == ["measured", "measured", "timeout"]
    assert rows[2].reason == "not finished: its A100 node gave no result within 2 s"


@pytest.mark.slow
def test_a_budget_ends_a_run_that_waits_for_a_gpu(nodes: Any, tmp_path: Path) -> None:
    ray = importlib.import_module("ray")
    site, folder = Site("L4", 1), str(tmp_path)

    @ray.remote(num_gpus=1, num_cpus=0, resources={"accelerator_type:L4": 0.001})  # type: ignore[untyped-decorator]
    def somebody_else() -> None:
        time.sleep(600)

    with ClusterEngine(site, QUICK, make_runner=lambda _: Fake(folder, 0.0), budget_s=2.0) as engine:
        taken = somebody_else.remote()
        time.sleep(1.0)
        rows = list(engine.run(cells(3)))
        ray.cancel(taken, force=True)
    assert {row.outcome for row in rows} == {"timeout"}
    assert {row.reason for row in rows} == {
        "not finished: the budget of 2 s was spent",
        "not started: the budget of 2 s was spent",
    }
