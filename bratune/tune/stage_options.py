"""Stage options: the trials that fill the table, one per option of a stage and one per divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from bratune.record import Record
from bratune.tune.bench import Bench
from bratune.tune.fidelity_source import FidelitySource
from bratune.tune.ledger import Ledger
from bratune.tune.setting import Setting
from bratune.tune.table import Entry, Table

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["StageOptions", "failure", "summary"]

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

    def table(self, backends: Iterable[str], objective: str) -> Table:
        """The table from everything that was ever measured for this space."""
        legal = {i: set(self.space.model_choices(i)) for i in self.space.routed}
        for i, choices in legal.items():
            choices.add((self.reference.n_win[i], self.reference.topks[i]))
        names, entries = set(backends), []
        for trial in self.cells.trials("COMPLETE"):
            entry = Entry(**trial.user_attrs["entry"])
            if (entry.n_win, entry.topk) in legal[entry.stage] and entry.backend in names:
                entries.append(self.bench.entry(entry, Record.from_dict(trial.user_attrs["record"])))
        table = Table(self.space, entries, objective=objective)
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
