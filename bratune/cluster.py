"""Cluster: the same cells on a Ray cluster, one per GPU at a time.

Ray schedules, watches nodes and runs a task again elsewhere when its node is lost; rows come back to the
store of the driver as tasks finish. A task is one pass of a group, which a node measures in turn in a new
process; of an engine without passes it is one cell. On a node, a cell runs as it would at home: in a worker
that may die (`bratune.run.isolated`), after the same check against the reference. Every node needs the
version of bratune that the driver has. Passes of a group may run on several nodes: what these differ by is in
the scatter between passes, and in no ratio.

Kinds of accelerator are Ray's: a node with an A100 has the resource ``accelerator_type:A100``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import bratune
from bratune import gpus
from bratune.cell import Cell
from bratune.errors import MissingPackageError, TargetError
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.record import Record
from bratune.run.measure_cell import Result
from bratune.run.parallel import ParallelEngine
from bratune.run.reuse import NOT_FINISHED
from bratune.run.runner import GroupRunner, Runner, Turns

__all__ = ["ClusterEngine", "Site", "connect", "find_sites", "machine_of"]

# How often Ray runs a cell again elsewhere after its node was lost, before the cell counts as crashed.
_RETRIES = 3
# How much longer than its limit a cell may stay away while cells that were handed out after it come back, for
# the transfer and one preemption: as long as the limit itself, within these bounds.
_LEAST_SLACK_S, _MOST_SLACK_S = 30.0, 600.0
# How often a cell that is not back yet is asked about.
_LOOK_S = 5.0
# What must be the same on all nodes of a site, so that their rows may be compared.
_SAME = ("bratune", "torch", "triton")
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
        cpus: Cores that a cell takes, on nodes without a GPU: all of a node, so that no two share one.
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
    # Of nodes without a GPU the largest only: two cells would share one that is larger than they ask for.
    return [*sites, Site("", bare.count(max(bare)), max(bare))] if bare else sites


def machine_of(site: Site) -> Machine:
    """The machine behind one node of a site; raises `TargetError` where none answers."""
    return ClusterRunner(site, MeterSettings.for_effort("quick")).machine


class _Failure(NamedTuple):
    """Why a task gave nothing, as its rows say it."""

    outcome: str
    reason: str


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
        self._measure, self._measure_group = task(_measure), task(_measure_group)
        self._in_flight: set[Any] = set()
        self._handed_out = itertools.count(1)
        self._last_back = 0
        self._token = uuid.uuid4().hex
        self.machine = self._describe(task(_describe))

    def _describe(self, task: Any) -> Machine:
        try:
            found = self._ray.get(
                task.remote(self._token, self._make, self._settings.to_dict()), timeout=_DESCRIBE_S
            )
        except self._ray.exceptions.GetTimeoutError:
            raise TargetError(
                f"no {self._where} node of the cluster answers within {_DESCRIBE_S:g} s; `ray status` shows "
                "whether all are taken"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise TargetError(f"no {self._where} node of the cluster answers: {_cause(error)}") from None
        machine = Machine.from_dict(found)
        if machine.bratune != bratune.__version__:
            raise TargetError(
                f"a node has bratune {machine.bratune or 'of unknown version'} and this machine "
                f"{bratune.__version__}; the same version on both would work"
            )
        return machine

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        """See `bratune.run.runner.Runner.run`; the limit counts on the node, from the cell's start."""
        found = self._task(self._measure, limit_s, cell.to_dict(), limit_s, give_up_ms)
        if isinstance(found, _Failure):
            return self._failed(cell, found)
        return Result(Record.from_dict(found["record"]), tuple(found["samples_ms"]))

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        """See `bratune.run.runner.GroupRunner.run_group`: one task, in a new process of one node."""
        cells = turns.cells
        how = {
            "cells": [cell.to_dict() for cell in cells],
            "base": None if turns.base is None else turns.base.to_dict(),
            "limit_s": turns.limit_s,
            "left_s": turns.left_s,
            "seed": turns.seed,
        }
        found = self._task(self._measure_group, min(len(cells) * turns.limit_s, turns.left_s), how)
        if isinstance(found, _Failure):
            yield from ((cell, self._failed(cell, found)) for cell in cells)
            return
        for place, record, samples in found:
            yield cells[place], Result(Record.from_dict(record), tuple(samples))

    def fresh(self) -> None:
        """Every pass of a group begins in a new process of its node anyway."""

    def _task(self, task: Any, limit_s: float, *work: Any) -> Any:
        """What a task gives that a node does, or why it gave nothing."""
        exceptions = self._ray.exceptions
        settings = self._settings.to_dict()
        same = {name: getattr(self.machine, name) for name in _SAME}
        number = next(self._handed_out)
        reference = task.remote(self._token, self._make, settings, same, number, *work)
        self._in_flight.add(reference)
        try:
            found = self._wait_for(reference, number, limit_s)
            self._last_back = max(self._last_back, number)
        except exceptions.GetTimeoutError as error:
            self._cancel(reference)
            return _Failure("timeout", f"{NOT_FINISHED}{error}")
        except exceptions.RayTaskError as error:  # raised on the node, which is alive and well
            return _Failure("error", f"on a node: {_cause(error)}")
        except exceptions.RayError as error:
            return _Failure("crashed", f"lost with its node, {_RETRIES + 1} times: {_first_line(error)}")
        finally:
            self._in_flight.discard(reference)
        return found

    def _wait_for(self, reference: Any, number: int, limit_s: float) -> Any:
        """What a cell gives; one that waits for a free GPU is waited for, one that hangs is not.

        A cell hangs where it is overdue since its node began it, or since it was handed out and one that was
        handed out after it is back already.
        """
        patience = limit_s + min(max(limit_s, _LEAST_SLACK_S), _MOST_SLACK_S)
        handed_out, begun = time.monotonic(), ""
        since = handed_out
        while True:
            try:
                return self._ray.get(reference, timeout=min(patience, _LOOK_S))
            except self._ray.exceptions.GetTimeoutError:
                now, latest = time.monotonic(), _begun(self._token, number)
                if latest != begun:  # it began, or began again elsewhere
                    begun, since = latest, now
                    continue
                late = bool(begun) and now - since > patience
                overtaken = now - handed_out > patience and self._last_back > number
                if late or overtaken:
                    others = "" if late else ", and others did"
                    text = f"its {self._where} node gave no result within {patience:g} s{others}"
                    raise self._ray.exceptions.GetTimeoutError(text) from None

    @property
    def _where(self) -> str:
        return self.site.accelerator or "CPU"

    def _failed(self, cell: Cell, failure: _Failure) -> Result:
        return Result(Record.of(cell, self.machine, outcome=failure.outcome, reason=failure.reason))

    def _cancel(self, reference: Any) -> None:
        with contextlib.suppress(Exception):  # it may have ended meanwhile
            self._ray.cancel(reference, force=True)

    def interrupt(self) -> None:
        """End every cell that is running."""
        for reference in tuple(self._in_flight):
            self._cancel(reference)

    def close(self) -> None:
        """Nothing to close: workers belong to Ray."""


class ClusterEngine(ParallelEngine):
    """A `bratune.run.parallel.ParallelEngine` that measures on as many GPUs of a site as there are.

    Args:
        site: Which nodes.
        settings: How cells are sampled, in each pass.
        make_runner: See `ClusterRunner`.
        options: Those of `bratune.run.engine.CellEngine`.
    """

    def __init__(
        self,
        site: Site,
        settings: MeterSettings,
        *,
        make_runner: MakeRunner | None = None,
        **options: Any,
    ) -> None:
        super().__init__(ClusterRunner(site, settings, make_runner), settings, slots=site.slots, **options)


def _measure(
    token: str,
    make: MakeRunner,
    settings: Mapping[str, Any],
    same: Mapping[str, str],
    number: int,
    cell: Mapping[str, Any],
    limit_s: float,
    give_up_ms: float | None,
) -> dict[str, Any]:
    """Measure one cell; runs on a node, and says when it began.

    Raises:
        TargetError: the node has other versions than the one that the run began on.
    """
    runner = _begin(token, make, settings, same, number)
    result = runner.run(Cell.from_dict(cell), limit_s=limit_s, give_up_ms=give_up_ms)
    return {"record": result.record.to_dict(), "samples_ms": list(result.samples_ms)}


def _measure_group(
    token: str,
    make: MakeRunner,
    settings: Mapping[str, Any],
    same: Mapping[str, str],
    number: int,
    turns: Mapping[str, Any],
) -> list[tuple[int, dict[str, Any], list[float]]]:
    """Measure one pass of a group in a new process: place in the group, row and samples of each cell.

    Raises:
        TargetError: see `_measure`; or the node's runner cannot take turns.
    """
    runner = _begin(token, make, settings, same, number)
    if not isinstance(runner, GroupRunner):
        raise TargetError(f"{type(runner).__name__} measures cell after cell; passes need a GroupRunner")
    runner.fresh()
    cells = [Cell.from_dict(cell) for cell in turns["cells"]]
    base = None if turns["base"] is None else Cell.from_dict(turns["base"])
    results = runner.run_group(Turns(**{**turns, "cells": cells, "base": base}))
    return [(cells.index(cell), r.record.to_dict(), list(r.samples_ms)) for cell, r in results]


def _begin(
    token: str, make: MakeRunner, settings: Mapping[str, Any], same: Mapping[str, str], number: int
) -> Runner:
    """The runner of this node, which has the versions of the others; from now on its time counts."""
    runner = _runner_here(token, make, settings)
    _say_begun(token, number)  # loading torch is not the task's time
    for name, wanted in same.items():
        here = getattr(runner.machine, name)
        if here != wanted:
            raise TargetError(
                f"{platform.node()} has {name} {here or '(nothing)'} and the others {wanted or '(nothing)'}"
            )
    return runner


def _say_begun(token: str, number: int) -> None:
    """Leave word in the store of the cluster; runs on a node."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(f"bratune-{token}-{number}".encode(), uuid.uuid4().hex.encode())


def _begun(token: str, number: int) -> str:
    """The word that a node left of a cell, another one each time that it begins; empty before that."""
    from ray.experimental import internal_kv

    return bytes(internal_kv._internal_kv_get(f"bratune-{token}-{number}".encode()) or b"").decode()


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
    from bratune.run.isolated import IsolatedRunner

    return IsolatedRunner(detect(), settings)


def _cause(error: BaseException) -> str:
    """What a task raised on a node, without Ray's account of where."""
    return _first_line(getattr(error, "cause", None) or error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@functools.cache
def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingPackageError("ray", "--cluster", "cluster") from None
    return ray
