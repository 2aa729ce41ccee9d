"""``bratune tune --model package.module:factory``: the backend of each routed layer of somebody's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bratune.cli import options
from bratune.errors import UsageError

__all__ = ["run"]

# Options of a search over S, top-k and whole models; here there is nothing to search but backends.
_OF_A_SEARCH = {
    "amp": False,
    "join": "",
    "replay": None,
    "cluster": None,
    "shared_run": False,
    "train_trials": None,
    "allow_model_changes": False,
    "storage": "",
    "trials": None,
    "constraint": (),
    "dry_run": False,
    "plan_run": None,
}


def run(factory: str, asked: dict[str, Any]) -> int:
    """Measure every layer by every backend and the whole model; write the plan, show it."""
    for name, unasked in _OF_A_SEARCH.items():
        if asked.get(name, unasked) != unasked:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is about a search; of {factory} only backends are measured")
    from bratune.run.target import find_target
    from bratune.tune.model_plan import tune_model

    target = find_target(asked["gpu"], asked["device"])
    target.require_present()
    folder = asked["output"] or Path("runs") / "tune" / factory.replace(":", "-")
    plan = tune_model(
        factory,
        asked["input"],
        device=target.machine.device,
        dtype=asked["dtype"],
        direction=asked["direction"],
        backends=asked["backend"],
        seed=asked["seed"],
        effort=asked["effort"],
        budget_s=asked["budget"],
        store=folder / "records.jsonl",
        **options.meter_changes(asked),
    )
    path = plan.save(folder / "plan.json")
    click.echo(json.dumps(plan.to_dict(), indent=1) if asked["style"] == "json" else plan)
    click.echo(
        f"results: {path}   again: {options.command_line()}\n"
        f'applied by: bratune.accelerate(model, example, plan=bratune.ModelPlan.load("{path}"))',
        err=True,
    )
    return 0
