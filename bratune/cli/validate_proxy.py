"""``bratune validate-proxy``: check how well the fidelity score ranks settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bratune.cli import options, values
from bratune.errors import UsageError


@click.command("validate-proxy", context_settings=options.CONTEXT)
@click.option("--study", type=click.Choice(["accuracy"]), help="Run a committed study.")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="With --study: how many.")
@click.option("--smoke", is_flag=True, help="With --study: a version of seconds that proves nothing.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Trained weights to calibrate for.")
@options.trust_option
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help="One subfolder per class.")
@click.option("--labels", is_flag=True, help="Say that the subfolders are classes (needed).")
@click.option("--model", default="biformer_small", show_default=True, help="Model of the weights.")
@click.option("--res", type=values.Resolution(), default="224", show_default=True, help="Image size.")
@click.option("--n-win", type=values.Numbers(), help="S that they were trained with.  [default: 7]")
@click.option("--topks", type=values.Numbers(), help="Top-k likewise.  [default: the published]")
@click.option("--settings", type=click.IntRange(6), default=24, show_default=True, help="How many are tried.")
@click.option(
    "--calibration-images",
    type=click.IntRange(16),
    default=128,
    show_default=True,
    help="Pictures of the score.",
)
@click.option(
    "--test-images",
    type=click.IntRange(16),
    default=1000,
    show_default=True,
    help="Other pictures, for accuracy.",
)
@click.option("--device", default="auto", show_default=True, help="To compute on.")
@click.option("--seed", type=values.Seed(), default=0, show_default=True, help="Of everything.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="Folder (--study).")
def command(**asked: Any) -> int:
    """Check how well the fidelity score ranks settings, for given weights or in a committed study.

    With --checkpoint, --images and --labels: settings spread over the score are tried without retraining,
    score and accuracy on different pictures; thresholds for these weights are written beside them, where
    `bratune tune` reads them. With --study accuracy: small networks are trained on
    three data sets with several seeds; a study that was interrupted goes on where it stopped.
    """
    if asked["study"] and asked["checkpoint"]:
        raise UsageError("--study trains its own weights, --checkpoint names others; leave one of them out")
    if asked["study"]:
        return _study(asked)
    if not (asked["checkpoint"] and asked["images"] and asked["labels"]):
        raise UsageError("either --study accuracy, or --checkpoint with --images and --labels")
    from bratune.tune.fidelity_source import calibrate_checkpoint, calibration_path

    found = calibrate_checkpoint(
        asked["model"],
        asked["checkpoint"],
        asked["images"],
        *asked["res"],
        n_win=asked["n_win"] or (7,),
        topks=asked["topks"] or (),
        settings=asked["settings"],
        images=asked["calibration_images"],
        test_images=asked["test_images"],
        device=asked["device"],
        seed=asked["seed"],
        say=_say,
    )
    path = calibration_path(asked["checkpoint"])
    found.save(path)
    click.echo(str(found))
    for rule, limit in found.limits.items():
        click.echo(
            f"{rule}: shown here up to a divergence of {limit:.4f}"
            if limit
            else f"{rule}: not shown here for any divergence; more --test-images would help"
        )
    click.echo(f"results: {path}", err=True)
    return 0


def _study(asked: dict[str, Any]) -> int:
    from bratune.studies.accuracy_show import write_study

    seeds = range(asked["seed"], asked["seed"] + (1 if asked["smoke"] else asked["seeds"]))
    click.echo(write_study(asked["output"], seeds, smoke=asked["smoke"], say=_say))
    return 0


def _say(text: str) -> None:
    click.echo(text, err=True)
