"""Write: a plan as the files of a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bratune.errors import PlanError, UnknownNameError, UsageError
from bratune.export import hydra, mm, mmdet, mmseg, timm, yolo
from bratune.export.fields import identifier
from bratune.files import write_text
from bratune.tune.plan import Plan

__all__ = ["TARGETS", "export"]

TARGETS = ("plan", "timm", "hydra", "mmseg", "mmdet", "yolo")
# What a plan must have been tuned for.
TASKS_OF = {
    "timm": ("classification",),
    "hydra": ("classification",),
    "mmseg": ("segmentation",),
    "mmdet": ("detection",),
    "yolo": ("yolo", "detection"),
}
_SUFFIX = {"plan": ".json", "yolo": ".yaml", "hydra": ".yaml"}


def export(
    plan: Plan,
    target: str,
    output: str | Path,
    *,
    name: str = "",
    style: str = "0.x",
    head: str = "",
    bases: Sequence[str] = (),
    scale: str = "n",
    force: bool = False,
) -> Path:
    """Write a plan for a target; returns the file.

    Args:
        plan: What to export.
        target: One of `TARGETS`.
        output: A file, or a folder in which the file is named after the plan.
        name: Registered name, for ``timm`` and ``hydra``.
        style: For ``mmseg`` and ``mmdet``: ``0.x`` or ``1.x``.
        head: For ``mmseg`` and ``mmdet``; by default S-FPN or RetinaNet.
        bases: For ``mmseg`` and ``mmdet``: config files to inherit from.
        scale: For ``yolo``.
        force: Export a plan of another task than the target's too.

    Raises:
        UsageError: the plan is for another task, or a base cannot be read.
        UnknownNameError: a target, style, head or scale is not known.
        PlanError: the target cannot hold the plan, or the file cannot be written.
    """
    if target not in TARGETS:
        raise UnknownNameError("export target", target, TARGETS)
    suffix = _SUFFIX.get(target, ".py")
    path = Path(output)
    if path.suffix != suffix:
        path = path / f"{identifier(plan, name)}{suffix}"
    if target == "timm" and not name and path.stem.isidentifier():
        name = path.stem  # the module and the model that it registers have one name
    wanted = TASKS_OF.get(target, ())
    if wanted and plan.task not in wanted and not force:
        raise UsageError(
            f"the plan is for {plan.task} at {plan.height}x{plan.width}, {plan.setting}, and {target} is for "
            f"{' or '.join(wanted)}: `bratune tune --task {wanted[0]}` makes one, --force exports this one"
        )
    replaced = mm.base_names(bases, path.parent) if target in ("mmseg", "mmdet") else frozenset()
    texts = {
        "timm": lambda: timm.timm_module(plan, name),
        "hydra": lambda: hydra.hydra_group(plan, name),
        "mmseg": lambda: mmseg.mmseg_config(
            plan, style=style, head=head or "sfpn", bases=bases, replaced=replaced
        ),
        "mmdet": lambda: mmdet.mmdet_config(
            plan, style=style, head=head or "retinanet", bases=bases, replaced=replaced
        ),
        "yolo": lambda: yolo.yolo_fragment(plan, scale),
    }
    if target == "plan":
        return plan.save(path)
    text = texts[target]()
    try:
        write_text(path, text)
    except OSError as error:
        raise PlanError(f"the export cannot be written to {path}: {error.strerror or error}") from None
    return path
