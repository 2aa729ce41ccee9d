"""Session: a tuning run from its first trial to the files that it leaves in a folder.

``study.db`` (or the storage that was named), ``records.jsonl`` (written by the engine), ``plan.json``,
``front.json`` (every verified setting with its evidence).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bratune.engine import ComparingEngine
from bratune.errors import StoreError
from bratune.files import write_text
from bratune.tune.bench import Offers
from bratune.tune.conclude import conclude, front_rows
from bratune.tune.fidelity_source import FidelitySource
from bratune.tune.plan import Plan, install
from bratune.tune.request import TuneRequest
from bratune.tune.show import Say
from bratune.tune.tuner import Tuner

__all__ = ["TuneResult", "default_storage", "run"]


@dataclass(frozen=True)
class TuneResult:
    """What a session leaves.

    Attributes:
        plan: The answer.
        rows: Every verified setting, by rising latency; see `bratune.tune.conclude.front_rows`.
        path: The plan's file.
        installed: Where ``backend="auto"`` finds it; None when it was not put there.
    """

    plan: Plan
    rows: list[dict[str, Any]]
    path: Path
    installed: Path | None


def default_storage(folder: Path) -> str:
    """The storage of a run on its own: SQLite in its folder."""
    return f"sqlite:///{folder.resolve()}/study.db"


def run(
    engine: ComparingEngine,
    request: TuneRequest,
    folder: Path,
    *,
    url: str = "",
    study: str = "",
    offers: Offers | None = None,
    fidelity: FidelitySource | None = None,
    say: Say = lambda text: None,
    command: str = "",
    put_in_cache: bool = False,
) -> TuneResult:
    """Search, conclude, and write the files.

    Args:
        engine: See `bratune.tune.tuner.Tuner`.
        request: What is tuned.
        folder: Where the files go; the same folder again resumes.
        url: Storage; by default `default_storage`.
        study: Name of the study; by default it follows from the request and the machine.
        offers: See `bratune.tune.tuner.Tuner`.
        fidelity: See `bratune.tune.tuner.Tuner`.
        say: Told what happens.
        command: What makes this plan again.
        put_in_cache: Put the plan where ``backend="auto"`` finds it; not that of an unfinished search.

    Raises:
        StoreError: the folder cannot be written; raised before anything is measured.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"results cannot be written to {folder}: {error.strerror or error}") from None
    tuner = Tuner(
        engine,
        request,
        url or default_storage(folder),
        study=study,
        offers=offers,
        fidelity=fidelity,
        say=say,
    )
    tuner.search()
    complete = not any(ledger.trials("WAITING") for ledger in (tuner.cells, tuner.settings))
    plan = conclude(tuner, command=command, complete=complete)
    rows = front_rows(tuner, plan)
    path = plan.save(folder / "plan.json")
    write_text(folder / "front.json", json.dumps(rows, indent=1) + "\n")
    return TuneResult(plan, rows, path, install(plan) if put_in_cache and complete else None)
