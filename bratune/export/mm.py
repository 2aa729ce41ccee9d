"""mm: what configs for mmsegmentation and mmdetection have in common.

Style ``0.x`` is for the official repository as it is (mmcv 1.x, mmseg 0.x, mmdet 2.x), whose backbone
``BiFormer_mm`` needs no import. Style ``1.x`` is for mmengine (mmseg 1.x, mmdet 3.x), for which the official
code was never written: there the backbone is bratune's own, with the tuned backends.

A config replaces what its bases say of the model and of training: merged, AdamW would inherit the momentum of
SGD, and a backbone the arguments of another. The frameworks have ``_delete_=True`` for that, and keep it as
an argument where there is nothing to replace; so the bases are read, as text, when the config is written.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from bratune.errors import UnknownNameError, UsageError
from bratune.export.fields import Field, backbone_fields, cost_fields, header, render_call
from bratune.tune.plan import Plan

__all__ = ["STYLES", "backbone", "base_names", "check_names", "preamble", "setting", "training"]

STYLES = ("0.x", "1.x")


def check_names(style: str, head: str, heads: Sequence[str]) -> None:
    """Raise `UnknownNameError` where a style or a head is not known."""
    if style not in STYLES:
        raise UnknownNameError("config style", style, STYLES)
    if head not in heads:
        raise UnknownNameError("head", head, heads)


def preamble(plan: Plan, style: str, bases: Sequence[str]) -> str:
    """Comments, the base files, and the import that style ``1.x`` needs."""
    lines = [header(plan, has_backends=style == "1.x")]
    lines.append(
        "# Give the dataset, its pipelines and the runtime as bases (`bratune export --base FILE`): which of"
    )
    lines.append(
        "# their dictionaries are replaced is decided then, and a base that is added by hand is merged."
    )
    lines.append(f"_base_ = {list(bases)!r}")
    if style == "1.x":
        lines.append(
            "custom_imports = dict(imports=['bratune.export.mm_backbone'], allow_failed_imports=False)"
        )
    return "\n".join(lines) + "\n"


def backbone(plan: Plan, style: str, target: str, drop_path: float, extra: Sequence[Field] = ()) -> str:
    """The backbone's dictionary, every key spelled out."""
    fields = backbone_fields(plan, target)
    kind = "BiFormer_mm"
    if style == "1.x":
        kind = "BratuneBiFormer"
        fields += cost_fields(plan)
    fields = [Field("type", kind), *extra, *fields, Field("drop_path_rate", drop_path)]
    return f"    backbone=dict(\n{render_call(fields, indent=8)}\n    ),"


def setting(name: str, arguments: str, replaced: Collection[str]) -> str:
    """A dictionary at the top of a config, in the place of that of a base."""
    first = (
        "_delete_=True, " if name in replaced and arguments else "_delete_=True" if name in replaced else ""
    )
    return f"{name} = dict({first}{arguments})\n"


def training(
    style: str,
    *,
    lr: float,
    decay: float,
    schedule: str,
    metric: str,
    iterations: int = 0,
    epochs: int = 0,
    replaced: Collection[str] = (),
) -> str:
    """AdamW as the authors use it, its schedule, the length of the run, and what is saved and evaluated when.

    Args:
        style: ``0.x`` or ``1.x``.
        lr: Of AdamW.
        decay: Its weight decay, of everything but norms.
        schedule: ``cosine``, ``poly`` or ``step`` (at epochs 8 and 11).
        metric: What is evaluated, as Python.
        iterations: Length of the run, or
        epochs: its length in epochs.
        replaced: Names that a base defines.
    """
    norms = "paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)})"
    adamw = f"type='AdamW', lr={lr!r}, betas=(0.9, 0.999), weight_decay={decay!r}"
    every = iterations // 10
    if style == "0.x":
        length = (
            f"type='IterBasedRunner', max_iters={iterations}"
            if iterations
            else f"type='EpochBasedRunner', max_epochs={epochs}"
        )
        when = f"by_epoch=False, interval={every}" if iterations else "interval=1"
        evaluated = f"interval={every or 1}, metric={metric}" + (", pre_eval=True" if iterations else "")
        parts = {
            "optimizer": f"{adamw}, {norms}",
            "optimizer_config": "grad_clip=None",
            "lr_config": _RATES[schedule],
            "runner": length,
            "checkpoint_config": when,
            "evaluation": evaluated,
        }
        text = "".join(setting(name, arguments, replaced) for name, arguments in parts.items())
        return f"{text}resume_from = None\ndevice = 'cuda'\n"
    length = (
        f"type='IterBasedTrainLoop', max_iters={iterations}, val_interval={every}"
        if iterations
        else f"type='EpochBasedTrainLoop', max_epochs={epochs}, val_interval=1"
    )
    parts = {
        "optim_wrapper": f"type='OptimWrapper', optimizer=dict({adamw}), {norms}",
        "train_cfg": length,
        "val_cfg": "type='ValLoop'",
        "test_cfg": "type='TestLoop'",
    }
    text = "".join(setting(name, arguments, replaced) for name, arguments in parts.items())
    rates = _SCHEDULERS[schedule].format(iterations=iterations, epochs=epochs)
    return f"{text}param_scheduler = [{rates}]\n"


# How the learning rate falls, before mmengine and since.
_RATES = {
    "cosine": "policy='CosineAnnealing', min_lr=0.0, by_epoch=False",
    "poly": "policy='poly', power=1.0, min_lr=0.0, by_epoch=False, warmup='linear', warmup_iters=1500, "
    "warmup_ratio=1e-6",
    "step": "policy='step', step=[8, 11], warmup='linear', warmup_iters=500, warmup_ratio=0.001",
}
_SCHEDULERS = {
    "cosine": "dict(type='CosineAnnealingLR', T_max={iterations}, eta_min=0.0, begin=0, end={iterations}, "
    "by_epoch=False)",
    "poly": "dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),\n    "
    "dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end={iterations}, by_epoch=False)",
    "step": "dict(type='LinearLR', start_factor=0.001, begin=0, end=500, by_epoch=False),\n    "
    "dict(type='MultiStepLR', milestones=[8, 11], gamma=0.1, begin=0, end={epochs}, by_epoch=True)",
}


def base_names(bases: Sequence[str], folder: Path) -> frozenset[str]:
    """Names that base configs define at their top, those of their own bases included; nothing is run.

    Args:
        bases: Paths, from the folder of the config that names them.
        folder: That folder.

    Raises:
        UsageError: a base is not there or is no Python.
    """
    return frozenset(name for base in bases for name in _names_in(folder / base, base, []))


def _literal(node: ast.expr, asked: str, path: Path) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UsageError(
            f"the base {asked} computes its own bases in {path}; a list of names would work"
        ) from None


def _names_in(path: Path, asked: str, seen: list[Path]) -> Iterator[str]:
    if path in seen:
        return
    seen.append(path)
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"the base {asked} cannot be read at {path} ({error.strerror or error}); bases are looked up "
            "from the folder of the config: -o in the folder where it will stand would work"
        ) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"the base {asked} at {path} is no Python config: {error}") from None
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if not isinstance(target, ast.Name):
                continue
            if target.id != "_base_":
                yield target.id
                continue
            found = _literal(node.value, asked, path) if isinstance(node, ast.Assign) else []
            for base in [found] if isinstance(found, str) else found:
                yield from _names_in(path.parent / base, str(base), seen)
