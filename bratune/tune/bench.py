"""Bench: cells for options and whole settings, and what their records say.

It asks an engine and does not know whether that one measures here, elsewhere, or answers from records.

The trials that fill the table, one per option of a stage and one per divergence, are here too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.errors import MeasureError, UsageError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.tune.fidelity_source import FidelitySource
from bratune.tune.ledger import Ledger
from bratune.tune.request import TuneRequest
from bratune.tune.setting import Setting
from bratune.tune.space import Space
from bratune.tune.table import Entry, OptionTable
from bratune.variant import get_task
from bratune.work import request as work_request
from bratune.work.cells import BASELINE, Scene, scenes

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Bench", "Offers", "StageOptions", "failure", "registry_offers", "summary"]

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

    def __init__(self, engine: Engine, request: TuneRequest, offers: Offers | None = None) -> None:
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

    def published_cell(self, setting: Setting) -> Cell | None:
        """The official composition with the S and top-k of a setting; None where a model has none."""
        if self.space.variant.layout != "biformer":
            return None
        cell = self.scene.model_cell((), form="published", stages=self.space.stages_of(setting))
        return cell.replace(regime=setting.regime)

    def model_cell(self, setting: Setting) -> Cell:
        """The cell of the whole model with a setting."""
        space, found = self.space, self.space.stages_of(setting)
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


# What later steps and readers of a study need of a record; the full row is in the records.
KEPT = (
    "cell_id",
    "outcome",
    "reason",
    "evidence",
    "median_ms",
    "ci_lo_ms",
    "ci_hi_ms",
    "n_samples",
    "noise_pct",
    "peak_alloc_mb",
    "images_per_s",
    "run_id",
    "timestamp_utc",
)

Items = Iterator[tuple[str, dict[str, Any], dict[str, Any]]]


class StageOptions:
    """Queues, runs and reads the trials of stages.

    Args:
        bench: Measures options.
        cells: Ledger of measured options.
        losses: Ledger of divergences; None without a fidelity source.
        fidelity: Judges options.
        reference: Its options are measured whatever the bounds.
    """

    def __init__(
        self,
        bench: Bench,
        cells: Ledger,
        losses: Ledger | None,
        fidelity: FidelitySource | None,
        reference: Setting,
    ) -> None:
        self.bench, self.space, self.reference = bench, bench.space, reference
        self.cells, self.losses, self.fidelity = cells, losses, fidelity

    # --- what to measure --------------------------------------------------------------------

    def ordered(self, named: Iterable[Setting]) -> list[Entry]:
        """Options of every stage: those of the named settings first, then by how close and how heavy."""
        first = {(i, s.n_win[i], s.topks[i]) for s in named for i in self.space.routed}

        def distance(entry: Entry) -> tuple[int, float, str]:
            i = entry.stage
            problem = self.space.stage(i, entry.n_win, entry.topk).problem
            own = self.space.stage(i, self.reference.n_win[i], self.reference.topks[i]).problem
            assert problem is not None
            assert own is not None
            ratio = problem.keys_per_query / own.keys_per_query
            late = (i, entry.n_win, entry.topk) not in first
            # Distance from the reference, less for a stage with many blocks: that is where time is.
            return int(late), max(ratio, 1 / ratio) / self.space.variant.depths[i], entry.backend

        found = [entry for i in self.space.routed for entry in self.bench.options(i)]
        return sorted(found, key=lambda e: (distance(e), e))

    def cell_items(self, entries: Iterable[Entry]) -> Items:
        """Options as work for the ledger of cells."""
        for entry in entries:
            attrs = {"entry": dataclasses.asdict(entry)}
            yield self.bench.block_cell(entry).cell_id, _params(entry), attrs

    def loss_items(self) -> Items:
        """Every S and top-k of every stage as work for the ledger of divergences."""
        for i in self.space.routed:
            for s, k in self.space.model_choices(i):
                entry = Entry(stage=i, n_win=s, topk=k, backend="")
                yield f"{i}:{s}:{k}", _params(entry), {"option": [i, s, k]}

    @staticmethod
    def suggest(trial: Trial) -> None:
        """Record a trial's parameters; wide enough for any map, as these trials are never proposed."""
        trial.suggest_int("stage", 1, 16)
        trial.suggest_int("n_win", 1, 4096)
        trial.suggest_int("topk", 1, 4096**2)

    # --- measuring --------------------------------------------------------------------------

    def run_cell(self, trial: Trial) -> str:
        """Measure one option and finish its trial; returns a line about it."""
        entry = Entry(**trial.user_attrs["entry"])
        record = self.bench.measure(self.bench.block_cell(entry))
        what = f"stage {entry.stage + 1} S={entry.n_win} k={entry.topk} {entry.backend}"
        what += f" {entry.config}" if entry.config != "{}" else ""
        if record.ok:
            self.cells.complete(trial, [record.median_ms or 0.0], record=summary(record))
            return f"{what}: {record.median_ms:.3f} ms per block"
        self.cells.prune(trial, record.reason, constraints=failure(record), record=summary(record))
        return f"{what}: {record.outcome}, {record.reason}"

    def run_loss(self, trial: Trial) -> str:
        """Judge one option and finish its trial; returns a line about it."""
        assert self.fidelity is not None
        assert self.losses is not None
        i, s, k = trial.user_attrs["option"]
        loss = self.fidelity.stage_loss(i, s, k)
        self.losses.complete(trial, [loss])
        return f"stage {i + 1} S={s} k={k}: divergence {loss:.4f}"

    # --- reading ----------------------------------------------------------------------------

    def table(self, backends: Iterable[str], objective: str) -> OptionTable:
        """The table from everything that was ever measured for this space."""
        legal = {i: set(self.space.model_choices(i)) for i in self.space.routed}
        for i, choices in legal.items():
            choices.add((self.reference.n_win[i], self.reference.topks[i]))
        names, entries = set(backends), []
        for trial in self.cells.trials("COMPLETE"):
            entry = Entry(**trial.user_attrs["entry"])
            if (entry.n_win, entry.topk) in legal[entry.stage] and entry.backend in names:
                entries.append(self.bench.entry(entry, Record.from_dict(trial.user_attrs["record"])))
        table = OptionTable(self.space, entries, objective=objective)
        if self.losses is None:
            return table
        losses = {tuple(t.user_attrs["option"]): t.values[0] for t in self.losses.trials("COMPLETE")}
        return table.with_losses(losses)


def _params(entry: Entry) -> dict[str, Any]:
    return {"stage": entry.stage + 1, "n_win": entry.n_win, "topk": entry.topk}


def summary(record: Record) -> dict[str, Any]:
    """The part of a record that its trial keeps."""
    data = record.to_dict()
    return {name: data[name] for name in KEPT if data[name] not in (None, "")}


def failure(record: Record) -> dict[str, float]:
    """The broken constraint that a failed measurement stands for."""
    return {"memory" if record.outcome == "oom" else record.outcome: 1.0}
