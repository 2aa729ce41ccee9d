"""``bratune export``: a plan as a config that training code loads, or a model as a file of a runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.cli import options
from bratune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bratune.tune.model_plan import ModelPlan
    from bratune.tune.plan import Plan

CONFIGS = ("plan", "timm", "hydra", "mmseg", "mmdet", "yolo")
RUNTIMES = ("onnx", "openvino", "pt2")
MEANT_FOR = {
    "name": ("timm", "hydra"),
    "style": ("mmseg", "mmdet"),
    "head": ("mmseg", "mmdet"),
    "bases": ("mmseg", "mmdet"),
    "scale": ("yolo",),
    "force": ("timm", "hydra", "mmseg", "mmdet", "yolo"),
    "model": RUNTIMES,
    "input": RUNTIMES,
    "checkpoint": RUNTIMES,
    "batch_size": RUNTIMES,
}


@click.command("export", context_settings=options.CONTEXT)
@click.argument("plan", type=click.Path(path_type=Path), required=False)
@click.option("--to", "target", type=click.Choice(CONFIGS + RUNTIMES), required=True, help="Who loads it.")
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
@click.option(
    "--model",
    metavar="NAME",
    help="In the place of PLAN: a model by name, or package.module:factory of yours (onnx, openvino, pt2).",
)
@click.option(
    "--input",
    metavar="SHAPE",
    help="Of the model's images, e.g. 1x3x640x640 (onnx, openvino, pt2).  [default: the plan's, 1x3x224x224]",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights of the model (onnx, openvino, pt2).  [default: seeded random ones]",
)
@options.trust_option
@click.option(
    "-b",
    "--batch-size",
    type=click.IntRange(1),
    help="The one batch that the file takes (onnx, openvino, pt2).  [default: any]",
)
def command(plan: Path | None, target: str, output: Path, **more: Any) -> None:
    """Write PLAN as a config that training code loads, or its model as a file of a runtime.

    timm: a module that registers the model, for the official classification code (one import line in
    main.py). hydra: the config group file that chooses it. mmseg, mmdet: a config around the backbone;
    style 0.x runs on the official repository as it is, 1.x on mmengine with bratune's backbone. yolo: a
    model file with the tuned blocks. plan: the plan itself, for `bratune.create_model`.

    onnx, openvino, pt2 (torch.export): the model in float32, with its weights, for any batch. The file is
    run by ONNX Runtime, OpenVINO or PyTorch and compared with the model before it is kept; it carries the
    plan, which may also be one of `bratune tune --model package.module:factory`. --model NAME --input
    1x3x640x640 exports a model without a plan, also one of yours.

    \b
    bratune export plan.json --to mmseg -o configs/
    bratune export plan.json --to onnx --checkpoint best.pth -o model.onnx
    bratune export --model my.network:make --input 1x3x640x640 --to openvino
    """  # noqa: D301
    given = {name: value for name, value in more.items() if value}
    for option in given:
        if target not in MEANT_FOR[option]:
            flag = {"bases": "base", "batch_size": "batch-size"}.get(option, option)
            raise UsageError(
                f"--{flag} means nothing to {target}; it is for {' and '.join(MEANT_FOR[option])}"
            )
    if target in RUNTIMES:
        _deploy(plan, target, output, given)
        return
    if plan is None:
        raise UsageError(f"--to {target} writes a plan, and none is named: bratune export PLAN --to {target}")
    from bratune.export.write import export
    from bratune.tune.plan import load_plan

    found = load_plan(plan)
    path = export(found, target, output, **given)
    click.echo(path)
    if target == "timm":
        from bratune.export.timm import launch_line

        click.echo(f"train with: {launch_line(found, given.get('name', path.stem))}", err=True)


def _deploy(plan: Path | None, target: str, output: Path, given: dict[str, Any]) -> None:
    """Write, run and compare a file of a runtime."""
    if (plan is None) == ("model" not in given):
        raise UsageError(f"--to {target} exports one model: that of PLAN, or --model NAME")
    from bratune.export.deploy import deploy
    from bratune.tune.model_plan import ModelPlan, plan_from
    from bratune.tune.plan import read_json
    from bratune.work.deploy import TARGETS, require

    require(target)
    found = None if plan is None else plan_from(read_json(plan), source=str(plan))
    if isinstance(found, ModelPlan):
        given = _asked_by(found, given)
    model, example, stem = _model(None if isinstance(found, ModelPlan) else found, given)
    path = output if output.suffix == TARGETS[target] else output / f"{stem}{TARGETS[target]}"
    if "checkpoint" not in given and ":" not in given.get("model", ""):
        click.echo("the weights are random; --checkpoint FILE exports those of a file", err=True)
    made = deploy(model, example, target, path, plan=found, open_batch="batch_size" not in given)
    for name, why in made.left.items():
        click.echo(f"left {name} as it is: {why}", err=True)
    click.echo(made.path)
    click.echo(made, err=True)


def _asked_by(plan: ModelPlan, given: dict[str, Any]) -> dict[str, Any]:
    """The options that name the model of a plan for layers, and its input unless another one is asked."""
    from bratune.work.yours import is_live

    if is_live(plan.model):
        raise UsageError(
            f"the plan is for a {plan.model.partition(':')[2]} of another process, which no name makes; "
            "--model package.module:factory would, or bratune.export.deploy.deploy(model, example, ...)"
        )
    return {"input": plan.input} | given | {"model": plan.model}


def _model(plan: Plan | None, given: dict[str, Any]) -> tuple[nn.Module, Tensor, str]:
    """The model that is asked for, an example of its input, and what its file is called."""
    import torch

    from bratune.export.fields import identifier
    from bratune.kernels.checkpoint import classes_of, load_weights
    from bratune.tune.create import create_model
    from bratune.work.factory import example_of, is_factory, load_factory, shape_of

    usual = (1, 3, plan.height, plan.width) if plan else (1, 3, 224, 224)
    shape = shape_of(given["input"]) if "input" in given else usual
    shape = (given.get("batch_size", shape[0]), *shape[1:])
    example = example_of("x".join(map(str, shape)))
    name, checkpoint = given.get("model", ""), given.get("checkpoint")
    if is_factory(name):
        model = load_factory(name)
        if checkpoint:
            load_weights(model, checkpoint)
        return model, example, name.replace(":", "_").replace(".", "_")
    classes = classes_of(checkpoint) if checkpoint else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = {} if plan else _padding(name)
        made = create_model(plan or name, pretrained=checkpoint, num_classes=classes or 1000, **own)
    stem = identifier(plan, "") if plan else f"{name}_{'x'.join(map(str, shape[-2:]))}"
    return made.eval(), example, stem


def _padding(name: str) -> dict[str, bool]:
    """A model by name takes any size: official ones pad where S does not divide a map."""
    from bratune.variant import get_variant

    return {"auto_pad": True} if get_variant(name).layout == "biformer" else {}
