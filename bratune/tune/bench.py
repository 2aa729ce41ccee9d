"""Bench: cells for options and whole settings, and what their records say.

It asks an engine and does not know whether that one measures here, elsewhere, or answers from records.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.errors import MeasureError, UsageError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.tune.request import Request
from bratune.tune.setting import Setting
from bratune.tune.space import Space
from bratune.tune.table import Entry
from bratune.variant import Stage, get_task, stages
from bratune.work import request as work_request
from bratune.work.cells import BASELINE, Scene, scenes

__all__ = ["Bench", "Offers", "registry_offers"]

# For an attention call: the backends that accept it, each with its settings, the preferred first.
Offers = Callable[[Problem], Sequence[tuple[str, tuple[str, ...]]]]

# Slow on purpose: it is there to be compared with.
ORACLE = "reference"


def registry_offers(machine: Machine, names: Sequence[str] = ()) -> Offers:
    """What the registered backends offer on a machine.

    Args:
        machine: Where they would run.
        names: The only ones wanted; by default all but the slow reference.
    """
    from bratune.kernels import registry

    wanted = tuple(names) or tuple(n for n in registry.names() if n != ORACLE)
    if not names and not wanted:
        wanted = (ORACLE,)

    def offers(problem: Problem) -> tuple[tuple[str, tuple[str, ...]], ...]:
        found = []
        for name in wanted:
            backend = registry.get(name)
            if not backend.why_not(problem, machine):
                texts = [
                    json.dumps(dict(c), sort_keys=True, separators=(",", ":"))
                    for c in backend.configs(problem, machine)
                ]
                # The first one is the default: it runs as {} wherever nothing is said.
                found.append((name, ("{}", *texts[1:])))
        return tuple(found)

    return offers


class Bench:
    """Measures options and settings of one request.

    Args:
        engine: Who turns cells into records.
        request: What is tuned.
        offers: Which backends accept a call; by default the registry's answer for the engine's machine.
    """

    def __init__(self, engine: Engine, request: Request, offers: Offers | None = None) -> None:
        self.engine, self.request = engine, request
        self.space: Space = request.space
        self.offers = offers or registry_offers(engine.machine, request.backends)

    # --- choices ----------------------------------------------------------------------------

    def offered(self, index: int, n_win: int, topk: int) -> Sequence[tuple[str, tuple[str, ...]]]:
        """Backends, with their settings, that accept stage ``index`` (from 0) with that S and top-k."""
        problem = self.space.stage(index, n_win, topk).problem
        return self.offers(problem) if problem is not None else ()

    def with_default_backends(self, setting: Setting) -> Setting:
        """A setting with what ``auto`` runs where there is no plan.

        Raises:
            UsageError: no backend accepts a stage.
        """
        names = list(setting.backends)
        for i in self.space.routed:
            found = self.offered(i, setting.n_win[i], setting.topks[i])
            if not found:
                raise UsageError(
                    f"no backend accepts stage {i + 1} of {self.space.model} with S {setting.n_win[i]} and "
                    f"top-k {setting.topks[i]} here; `bratune explain` lists every reason"
                )
            names[i] = found[0][0]
        return self.space.setting(setting.n_win, setting.topks, names, regime=self.request.regimes[0])

    def options(self, index: int) -> Iterator[Entry]:
        """Every option of a stage with default settings, without costs."""
        for s, k in self.space.model_choices(index):
            for backend, _ in self.offered(index, s, k):
                yield Entry(stage=index, n_win=s, topk=k, backend=backend)

    def other_configs(self, entry: Entry, most: int) -> Iterator[Entry]:
        """An option with up to ``most - 1`` other settings of its backend."""
        for backend, configs in self.offered(entry.stage, entry.n_win, entry.topk):
            if backend == entry.backend:
                for config in configs[1:most]:
                    yield Entry(
                        stage=entry.stage, n_win=entry.n_win, topk=entry.topk, backend=backend, config=config
                    )

    # --- cells ------------------------------------------------------------------------------

    @functools.cached_property
    def scene(self) -> Scene:
        """What the cells of the request have in common, the weights among it."""
        own, first = self.request, self.request.reference
        asked = work_request.Request(
            models=(own.model,),
            task=get_task(own.task),
            image=(own.height, own.width),
            batches=(own.batch,),
            n_win=first.n_win,
            topks=first.topks,
            dtype=own.dtype,
            amp=own.amp,
            layout=own.layout,
            direction=own.direction,
            backends=own.backends or (BASELINE,),
            routes=("recorded",),
            regimes=own.regimes,
            l2=(own.l2,),
            seed=own.seed,
            checkpoint=own.checkpoint,
        )
        return scenes(asked)[0]

    def block_cell(self, entry: Entry) -> Cell:
        """The cell of one block with an option."""
        stage = self.space.stage(entry.stage, entry.n_win, entry.topk)
        return self.scene.block_cell(stage, entry.backend, entry.config)

    def _stages(self, setting: Setting) -> tuple[Stage, ...]:
        space = self.space
        return stages(
            space.variant,
            space.height,
            space.width,
            batch=space.batch,
            n_win=setting.n_win,
            topks=setting.topks,
            dtype=space.dtype,
            direction=space.direction,
        )

    def published_cell(self, setting: Setting) -> Cell | None:
        """The official composition with the S and top-k of a setting; None where a model has none."""
        if self.space.variant.layout != "biformer":
            return None
        cell = self.scene.model_cell((), form="published", stages=self._stages(setting))
        return cell.replace(regime=setting.regime)

    def model_cell(self, setting: Setting) -> Cell:
        """The cell of the whole model with a setting."""
        space, found = self.space, self._stages(setting)
        configs = {
            str(i + 1): json.loads(setting.configs[i]) for i in space.routed if setting.configs[i] != "{}"
        }
        cell = self.scene.model_cell(setting.backends, stages=found, configs=configs)
        return cell.replace(regime=setting.regime)

    # --- records ----------------------------------------------------------------------------

    def measure(self, cell: Cell) -> Record:
        """The record of one cell.

        Raises:
            MeasureError: the engine gave none.
        """
        for record in self.engine.run([cell]):
            return record
        raise MeasureError(f"the engine gave no record for {cell}")

    def entry(self, entry: Entry, record: Record) -> Entry:
        """An option with the costs of its block's record, times the blocks of its stage."""
        blocks = self.space.variant.depths[entry.stage]
        assert record.median_ms is not None
        return Entry(
            stage=entry.stage,
            n_win=entry.n_win,
            topk=entry.topk,
            backend=entry.backend,
            config=entry.config,
            ms=blocks * record.median_ms,
            memory_mb=record.peak_alloc_mb,
        )
