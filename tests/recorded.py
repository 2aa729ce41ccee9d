"""A tuning run in a synthetic world whose rows are kept as if they had been measured, for replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bratune.cell import Cell
from bratune.record import Record
from bratune.store import Store
from bratune.store.pooled import in_turn_with
from bratune.tune import session
from bratune.tune.bench import registry_offers
from bratune.tune.request import TuneRequest
from bratune.tune.synthetic import MACHINE, SyntheticWorld

NAMES = ("gather", "gather-sdpa", "dense")
# What a replay of the run is asked for.
ASKED = ["--gpu", "synthetic", "--dtype", "bf16", "-b", "8", "--effort", "quick", "--l2", "cold"]
ASKED += ["--no-install", *(text for name in NAMES for text in ("--backend", name))]


class Recorder(SyntheticWorld):
    """A synthetic world that writes its rows down."""

    def __init__(self, path: Path) -> None:
        super().__init__(seed=1, noise=0.0)
        self.store = Store(path)

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        for record in super().run(cells):
            yield self._kept(record)

    def in_turn(
        self, cells: Sequence[Cell], base: Cell, passes: int, *, about: str = "", **more: Any
    ) -> dict[Cell, list[Record]]:
        sampling = f"some{in_turn_with(base, about)}"
        world = SyntheticWorld(seed=1, noise=0.0)
        return {
            cell: [self._kept(row.replace(baseline=base.cell_id, sampling=sampling)) for row in rows]
            for cell, rows in world.in_turn(cells, base, passes, **more).items()
        }

    def _kept(self, record: Record) -> Record:
        kept = record.replace(evidence="measured", outcome="measured")
        self.store.append(kept)
        return kept


def record(folder: Path) -> None:
    """Leave the rows (``rows``) and the plan (``run``) of a whole run in a folder."""
    engine = Recorder(folder / "rows" / "records.jsonl")
    request = TuneRequest(
        model="biformer_tiny",
        task="classification",
        height=224,
        width=224,
        batch=8,
        dtype="bfloat16",
        l2="cold",
        backends=NAMES,
        effort="quick",
    )
    session.run(engine, request, folder / "run", offers=registry_offers(MACHINE, NAMES))
