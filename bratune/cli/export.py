"""``bratune export``: write a plan as a config that training code loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bratune.cli import options
from bratune.errors import UsageError

TARGETS = ("plan", "timm", "hydra", "mmseg", "mmdet", "yolo")
MEANT_FOR = {
    "name": ("timm", "hydra"),
    "style": ("mmseg", "mmdet"),
    "head": ("mmseg", "mmdet"),
    "bases": ("mmseg", "mmdet"),
    "scale": ("yolo",),
    "force": ("timm", "hydra", "mmseg", "mmdet", "yolo"),
}


@click.command("export", context_settings=options.CONTEXT)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="Who shall load it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="File or folder.")
@click.option("--name", default="", help="Name of the registered model (timm, hydra).")
@click.option(
    "--style",
    type=click.Choice(["0.x", "1.x"]),
    help="Generation of the framework (mmseg, mmdet).  [default: 0.x]",
)
@click.option("--head", default="", help="sfpn or upernet (mmseg), retinanet or mask_rcnn (mmdet).")
@click.option("--base", "bases", multiple=True, metavar="FILE", help="Config to inherit from; repeatable.")
@click.option("--scale", type=click.Choice(["n", "s", "m", "l", "x"]), help="Size (yolo).  [default: n]")
@click.option("--force", is_flag=True, help="Also a plan of another task than the target's.")
def command(plan: Path, target: str, output: Path, **more: Any) -> None:
    """Write PLAN as a config that training code loads.

    timm: a module that registers the model, for the official classification code (one import line in
    main.py). hydra: the config group file that chooses it. mmseg, mmdet: a config around the backbone;
    style 0.x runs on the official repository as it is, 1.x on mmengine with bratune's backbone. yolo: a
    model file with the tuned blocks. plan: the plan itself, for `bratune.create_model`.
    """
    given = {name: value for name, value in more.items() if value}
    for option in given:
        if target not in MEANT_FOR[option]:
            flag = "base" if option == "bases" else option
            raise UsageError(
                f"--{flag} means nothing to {target}; it is for {' and '.join(MEANT_FOR[option])}"
            )
    from bratune.export.write import export
    from bratune.tune.plan import load_plan

    found = load_plan(plan)
    path = export(found, target, output, **given)
    click.echo(path)
    if target == "timm":
        from bratune.export.timm import launch_line

        click.echo(f"train with: {launch_line(found, given.get('name', path.stem))}", err=True)
