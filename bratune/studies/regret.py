"""Regret of the tuner: how much slower its plan is than the best that a long measurement finds.

    $ python -m bratune.studies coverage tune -o out          # five seeds of `bratune tune --budget 4m`
    $ python -m bratune.studies coverage show -o out

The truth is the default with every swap of the backend of one stage, and every plan that was made, in turn
in many fresh processes. The best of noisy ratios looks better than it is, so a regret is an upper estimate.
Plans and passes that are there already are not made again.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from bratune.engine import ComparingEngine
from bratune.machine import detect
from bratune.measure.settings import MeterSettings
from bratune.run.engine import CellEngine
from bratune.run.isolated import IsolatedEngine
from bratune.run.passes import disturbance
from bratune.run.replay import ReplayRunner
from bratune.store import Store, read_records
from bratune.tune.bench import Bench
from bratune.tune.closing import Closing, compare
from bratune.tune.plan import Plan, load_plan
from bratune.tune.request import TuneRequest
from bratune.tune.setting import Setting

__all__ = [
    "LIMIT",
    "Regret",
    "disturbed",
    "plans_of",
    "regrets_of",
    "settings_of",
    "stored_regrets",
    "summary",
    "tune_command",
]

# The regret that is wanted at most.
LIMIT = 0.03


@dataclass(frozen=True)
class Regret:
    """One plan beside the truth.

    Attributes:
        seed: Of the search.
        plan: Its setting.
        best: The fastest setting of the truth.
        regret: Time of the plan over that of the best, minus 1.
        speedup: Over the default.
        verdict: Of the plan against the default; empty where it is the default.
    """

    seed: int
    plan: str
    best: str
    regret: float
    speedup: float
    verdict: str


def plans_of(output: Path) -> list[Plan]:
    """The plans of the searches that are there, by seed."""
    return sorted((load_plan(path) for path in output.glob("tune-*/plan.json")), key=lambda plan: plan.seed)


def settings_of(bench: Bench, plans: Sequence[Plan]) -> list[Setting]:
    """The default, every swap of the backend of one of its stages, and the settings of plans, each once."""
    default = bench.with_default_backends(bench.request.reference)
    found = [default]
    for i in bench.space.routed:
        for name, _ in bench.offered(i, default.n_win[i], default.topks[i]):
            names = [name if n == i else own for n, own in enumerate(default.backends)]
            found.append(default.replace(backends=tuple(names)))
    found += [plan.setting.replace(layout=default.layout) for plan in plans]
    return list({setting.key: setting for setting in found}.values())


def _regrets(
    bench: Bench, plans: Sequence[Plan], closing: Closing, settings: Sequence[Setting]
) -> list[Regret]:
    cells = {bench.model_cell(setting): setting for setting in settings}
    default, *others = cells
    speedups = {default: 1.0}
    speedups |= {cell: found.value for cell in others if (found := closing.speedup(cell)) is not None}
    best = max(speedups, key=lambda cell: speedups[cell])
    rows = []
    for plan in plans:
        cell = bench.model_cell(plan.setting)
        if cell in speedups:
            verdict = "" if cell == default else closing.verdicts[cell].verdict
            lost = speedups[best] / speedups[cell] - 1
            row = Regret(plan.seed, str(cells[cell]), str(cells[best]), lost, speedups[cell], verdict)
            rows.append(row)
    return rows


def regrets_of(engine: ComparingEngine, plans: Sequence[Plan], passes: int) -> list[Regret]:
    """The regret of every plan, from the passes of an engine.

    Args:
        engine: Who compares.
        plans: Of searches that were asked for the same.
        passes: Fresh processes of the truth.
    """
    plan = plans[0]
    request = TuneRequest(
        model=plan.model,
        task=plan.task,
        height=plan.height,
        width=plan.width,
        batch=plan.batch,
        dtype=plan.dtype,
        amp=plan.amp,
        direction=plan.direction,
        layout=plan.setting.layout,
        regimes=(plan.default.regime,),
        l2=plan.l2,
        backends=tuple(dict.fromkeys(_asked_backends(plan))),
    )
    bench = Bench(engine, request)
    found = settings_of(bench, plans)
    default, *others = (bench.model_cell(setting) for setting in found)
    return _regrets(bench, plans, compare(engine, default, others, None, passes), found)


def summary(rows: Sequence[Regret]) -> dict[str, object]:
    """The study as figures; ``slower`` are plans that are shown to be slower than the default."""
    return {
        "n": len(rows),
        "within": sum(row.regret <= LIMIT for row in rows),
        "slower": sum(row.verdict == "SLOWER" for row in rows),
        "plans": [asdict(row) for row in rows],
    }


def disturbed(output: Path) -> str:
    """What stands against believing the truth; see `bratune.run.passes.disturbance`."""
    records = output / "truth"
    return disturbance(read_records([records])) if records.exists() else ""


def stored_regrets(output: Path) -> list[Regret]:
    """What the plans and passes that are there say; nothing is measured. Empty where there are none."""
    plans, records = plans_of(output), output / "truth"
    if not plans or not records.exists():
        return []
    settings = MeterSettings.for_effort("quick").per_pass()
    with CellEngine(ReplayRunner.of([records]), settings) as engine:
        return regrets_of(engine, plans, 1)


def _asked_backends(plan: Plan) -> list[str]:
    """What ``--backend`` said in the command of a plan."""
    words = plan.command.split()
    return [after for word, after in itertools.pairwise(words) if word == "--backend"]


@click.command("tune")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Searches.")
@click.option("--budget", default="4m", show_default=True, help="Of each search.")
@click.option("--passes", default=8, show_default=True, type=click.IntRange(2), help="Of the truth.")
@click.argument("tune_options", nargs=-1, type=click.UNPROCESSED)
def tune_command(output: Path, seeds: int, budget: str, passes: int, tune_options: tuple[str, ...]) -> None:
    """Search by several seeds, then measure the truth; options after ``--`` go to `bratune tune`."""
    for seed in range(1, seeds + 1):
        folder = output / f"tune-{seed}"
        if (folder / "plan.json").exists():
            continue
        click.echo(f"{folder} ...", err=True)
        command = [sys.executable, "-m", "bratune", "tune", "--no-install", "-o", str(folder)]
        command += ["--seed", str(seed), "--budget", budget, *tune_options]
        env = dict(os.environ, BRATUNE_LOOKUP="off")
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    click.echo(f"{output / 'truth'} ...", err=True)
    plans, settings = plans_of(output), MeterSettings.for_effort("quick").per_pass()
    machine = detect("cpu" if plans[0].machine.kind == "cpu" else "auto")
    with IsolatedEngine(machine, settings, store=Store(output / "truth" / "records.jsonl")) as engine:
        regrets_of(engine, plans, passes)
