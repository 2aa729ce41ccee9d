"""A tuning run in a synthetic world whose rows are kept as if they had been measured, for replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from bratune.cell import Cell
from bratune.record import Record
from bratune.store import Store
from bratune.tune import session
from bratune.tune.bench import registry_offers
from bratune.tune.request import Request
from bratune.tune.synthetic import MACHINE, SyntheticWorld

NAMES = ("gather", "gather-sdpa", "dense")
# What a replay of the run is asked for.
ASKED = ["--gpu", "synthetic", "--dtype", "bf16", "-b", "8", "--effort", "quick", "--l2", "cold"]
ASKED += ["--no-install", *(text for name in NAMES for text in ("--backend", name))]


class Recorder:
    """A synthetic world that writes its rows down."""

    def __init__(self, path: Path) -> None:
        self.world, self.store = SyntheticWorld(seed=1, noise=0.0), Store(path)
        self.machine = self.world.machine

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        for record in self.world.run(cells):
            kept = record.replace(evidence="measured", outcome="measured")
            self.store.append(kept)
            yield kept


def record(folder: Path) -> None:
    """Leave the rows (``rows``) and the plan (``run``) of a whole run in a folder."""
    engine = Recorder(folder / "rows" / "records.jsonl")
    request = Request(
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
    session.run(
        engine,
        lambda: contextlib.nullcontext(engine),
        request,
        folder / "run",
        offers=registry_offers(MACHINE, NAMES),
    )
