"""Cluster: the same cells on a Ray cluster, one per GPU at a time.

Ray schedules, watches nodes and runs a cell again elsewhere when its node is lost; rows come back to the
store of the driver as they finish. On a node, a cell runs as it would at home: in a worker that may die
(`bratune.profile.isolated`), after the same check against the reference. Every node needs the version of
bratune that the driver has.

Kinds of accelerator are Ray's: a node with an A100 has the resource ``accelerator_type:A100``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bratune
from bratune import gpus
from bratune.cell import Cell
from bratune.errors import MissingPackageError, TargetError
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.profile.cells import BASELINE
from bratune.profile.engine import CellEngine, Runner
from bratune.profile.run_cell import Result
from bratune.record import Record

__all__ = ["ClusterEngine", "Site", "connect", "find_sites", "machine_of"]

# How often Ray runs a cell again elsewhere after its node was lost, before the cell counts as crashed.
_RETRIES = 3
_ACCELERATOR = "accelerator_type:"
# Describing a node takes a worker's start and one import of torch.
_DESCRIBE_S = 300.0

MakeRunner = Callable[[MeterSettings], Runner]


@dataclass(frozen=True)
class Site:
    """Nodes of a cluster that have one kind of accelerator, or none.

    Attributes:
        accelerator: Ray's name, e.g. ``A100``; empty for nodes without a GPU.
        slots: Cells that can run at a time: GPUs, or nodes where there are none.
        cpus: Cores that a cell takes, on nodes without a GPU: those of the smallest one.
    """

    accelerator: str
    slots: int
    cpus: int = 0

    def options(self) -> dict[str, Any]:
        """What a task asks Ray for, so that no other cell runs on its device."""
        if not self.accelerator:
            return {"num_cpus": self.cpus}
        return {"num_gpus": 1, "num_cpus": 0, "resources": {f"{_ACCELERATOR}{self.accelerator}": 0.001}}

    def is_board(self, key: str) -> bool:
        """Whether a short key of the GPU table names this kind: ``a100-pcie-40`` is an ``A100``."""
        return self.accelerator.lower() == gpus.resolve(key).key.split("-")[0]


def connect(address: str) -> None:
    """Join a Ray cluster.

    Args:
        address: ``auto`` (the cluster that this machine belongs to), ``local`` (this machine only) or
            ``ray://HOST:PORT``.

    Raises:
        MissingPackageError: Ray is not installed.
        TargetError: no cluster answers there.
    """
    ray = _ray()
    given = {} if address == "local" else {"address": address}
    if ray.is_initialized():
        return
    try:
        ray.init(**given, log_to_driver=False, include_dashboard=False if not given else None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise TargetError(
            f"no Ray cluster answers at {address!r} ({first}); `ray start --head` starts one on this machine"
        ) from None


def find_sites(keys: Sequence[str] = ()) -> list[Site]:
    """The kinds of accelerator of the cluster, one site each.

    Args:
        keys: Short keys of GPUs; without any, every kind there is, or the CPUs where there is no GPU.

    Raises:
        UnknownNameError: a key names no GPU.
        TargetError: the cluster has no such GPU; the message says what it has.
    """
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    sites = _sites(nodes)
    if not keys:
        with_gpu = [site for site in sites if site.accelerator]
        return with_gpu or sites
    found = []
    for key in keys:
        match = next((site for site in sites if site.accelerator and site.is_board(key)), None)
        if match is None:
            has = ", ".join(site.accelerator or "CPUs only" for site in sites) or "no nodes"
            raise TargetError(f"GPU {key!r} was asked for and the cluster has none; it has {has}")
        found.append(match)
    return found


def _sites(nodes: Sequence[Mapping[str, float]]) -> list[Site]:
    """Sites of nodes, given the resources of each."""
    slots: dict[str, int] = {}
    bare = []
    for resources in nodes:
        kinds = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
        if kinds and resources.get("GPU"):
            slots[kinds[0]] = slots.get(kinds[0], 0) + int(resources["GPU"])
        elif resources.get("CPU"):
            bare.append(int(resources["CPU"]))
    sites = [Site(kind, count) for kind, count in sorted(slots.items())]
    return [*sites, Site("", len(bare), min(bare))] if bare else sites


def machine_of(site: Site) -> Machine:
    """The machine behind one node of a site; raises `TargetError` where none answers."""
    return ClusterRunner(site, MeterSettings.for_effort("quick")).machine


class ClusterRunner:
    """Measures cells on the nodes of a site; any number of threads may call it.

    Args:
        site: Which nodes.
        settings: How long to measure.
        make_runner: Makes the runner of a node, there; by default one that isolates cells.

    Raises:
        TargetError: no node of the site answers, or it has another version of bratune.
    """

    evidence = "measured"

    def __init__(self, site: Site, settings: MeterSettings, make_runner: MakeRunner | None = None) -> None:
        ray = _ray()
        self.site = site
        self._ray = ray
        self._settings = settings
        self._make = make_runner or _isolated
        # A worker of Ray keeps its runner from cell to cell (max_calls=0): torch is loaded once.
        task = ray.remote(**site.options(), max_retries=_RETRIES, max_calls=0)
        self._measure = task(_measure)
        self._in_flight: set[Any] = set()
        self._token = uuid.uuid4().hex
        self.machine = self._describe(task(_describe))

    def _describe(self, task: Any) -> Machine:
        try:
            found = self._ray.get(
                task.remote(self._token, self._make, self._settings.to_dict()), timeout=_DESCRIBE_S
            )
        except self._ray.exceptions.RayError as error:
            where = self.site.accelerator or "CPU"
            raise TargetError(f"no {where} node of the cluster answers: {_first_line(error)}") from None
        machine = Machine.from_dict(found)
        if machine.bratune != bratune.__version__:
            raise TargetError(
                f"a node has bratune {machine.bratune or 'of unknown version'} and this machine "
                f"{bratune.__version__}; the same version on both would work"
            )
        return machine

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        """See `bratune.profile.engine.Runner.run`; the limit counts on the node, from the cell's start."""
        settings = self._settings.to_dict()
        reference = self._measure.remote(
            self._token, self._make, settings, cell.to_dict(), limit_s, give_up_ms
        )
        self._in_flight.add(reference)
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            reason = f"lost with its node, {_RETRIES + 1} times: {_first_line(error)}"
            return Result(Record.of(cell, self.machine, outcome="crashed", reason=reason))
        finally:
            self._in_flight.discard(reference)
        return Result(Record.from_dict(found["record"]), tuple(found["samples_ms"]))

    def interrupt(self) -> None:
        """End every cell that is running."""
        for reference in tuple(self._in_flight):
            with contextlib.suppress(Exception):  # it may have ended meanwhile
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Nothing to close: workers belong to Ray."""


class ClusterEngine(CellEngine):
    """A `bratune.profile.engine.CellEngine` that measures on as many GPUs of a site as there are.

    Args:
        site: Which nodes.
        settings: How cells are sampled.
        make_runner: See `ClusterRunner`.
        options: Those of `bratune.profile.engine.CellEngine`.
    """

    def __init__(
        self,
        site: Site,
        settings: MeterSettings,
        *,
        make_runner: MakeRunner | None = None,
        **options: Any,
    ) -> None:
        super().__init__(ClusterRunner(site, settings, make_runner), settings, **options)
        self._slots = site.slots

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One finished record per cell, as each is known, baselines first; see `bratune.engine.Engine`."""
        waiting = list(cells)
        baselines = [cell for cell in waiting if set(cell.backend.split(",")) == {BASELINE}]
        others = [cell for cell in waiting if cell not in baselines]
        for wave in (baselines, others):
            yield from self._together(wave)

    def _together(self, cells: Sequence[Cell]) -> Iterator[Record]:
        """Rows of cells that run side by side, each written down where it is known."""
        with concurrent.futures.ThreadPoolExecutor(self._slots) as pool:
            turns = [pool.submit(self._one, cell) for cell in cells]
            try:
                for turn in concurrent.futures.as_completed(turns):
                    yield from turn.result()
            finally:
                for turn in turns:
                    turn.cancel()
                if not all(turn.done() for turn in turns):
                    self.cancel()

    def _one(self, cell: Cell) -> list[Record]:
        return list(super().run([cell]))


def _measure(
    token: str,
    make: MakeRunner,
    settings: Mapping[str, Any],
    cell: Mapping[str, Any],
    limit_s: float,
    give_up_ms: float | None,
) -> dict[str, Any]:
    """Measure one cell; runs on a node."""
    runner = _runner_here(token, make, settings)
    result = runner.run(Cell.from_dict(cell), limit_s=limit_s, give_up_ms=give_up_ms)
    return {"record": result.record.to_dict(), "samples_ms": list(result.samples_ms)}


def _describe(token: str, make: MakeRunner, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The machine behind a task; runs on a node."""
    return _runner_here(token, make, settings).machine.to_dict()


# The runner of this worker of Ray, by the engine that it works for and the GPUs that it sees.
_RUNNERS: dict[tuple[str, str], Runner] = {}


def _runner_here(token: str, make: MakeRunner, settings: Mapping[str, Any]) -> Runner:
    key = token, os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if key not in _RUNNERS:
        for old in _RUNNERS.values():  # another GPU now: the old runner's worker would hold its memory
            old.close()
        _RUNNERS.clear()
        _RUNNERS[key] = make(MeterSettings.from_dict(settings))
    return _RUNNERS[key]


def _isolated(settings: MeterSettings) -> Runner:
    from bratune.machine import detect
    from bratune.profile.isolated import IsolatedRunner

    return IsolatedRunner(detect(), settings)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@functools.cache
def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingPackageError("ray", "--cluster", "cluster") from None
    return ray
