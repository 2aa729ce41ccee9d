"""Forms: a whole model as it may run, on the same seeded weights and images; see `bratune.cell.FORMS`.

>>> form = build_form(cell, device)
>>> form.model(form.images)
>>> form.plain          # what its output must agree with; None of another project's model
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bratune.cell import Cell
from bratune.errors import UnknownNameError, UnsupportedError
from bratune.kernels.biformer import BiFormer
from bratune.kernels.published import as_published
from bratune.kernels.runtime import FastModel
from bratune.variant import get_variant
from bratune.work.cells import model_stages
from bratune.work.count import model_macs
from bratune.work.modules import images_for, model_for
from bratune.work.peers import PEERS, import_timm

__all__ = ["AGREE", "Form", "build_form", "cell_macs", "difference_limit", "form_modules"]

# On max|a - b| / max|b| of the outputs, by data type. Below float64 it is routes that decide: sums in another
# order let one at a near tie fall the other way, which moved a gradient of biformer_tiny by 5e-4 in float32.
AGREE = {"float64": 1e-9, "float32": 5e-3, "bfloat16": 0.1, "float16": 0.02}
# Modules that compute a form, beside those of its backends: what a row is reused by.
_MODULES = {
    "published": ("bratune.kernels.published",),
    "runtime": ("bratune.kernels.runtime",),
    "lean": ("bratune.kernels.lean",),
}


@dataclass(frozen=True)
class Form:
    """A whole model in one form.

    Attributes:
        model: On the device; in training where the cell asks for gradients.
        images: ``[B, 3, H, W]`` on the device.
        plain: The same weights in this package's layers, by the backends that ``auto`` prefers, in the same
            mode: what the form must agree with. None where the form is that model, or another model.
    """

    model: nn.Module
    images: Tensor
    plain: nn.Module | None


def build_form(cell: Cell, device: str) -> Form:
    """The model of a ``model`` cell in its form, weights and images seeded alike for every form.

    Raises:
        UnsupportedError: the model or the cell has no such form; the reasons say why.
        UnknownNameError: timm has no such model.
        MissingPackageError: timm is asked for and not installed.
    """
    reasons = _obstacles(cell)
    if reasons:
        raise UnsupportedError(cell.form, reasons)
    images = images_for(cell, device)
    if cell.form == "timm":
        return Form(_timm(cell, images), images, None)
    if cell.form == "plain":
        return Form(model_for(cell, device), images, None)
    plain = model_for(cell.replace(form="plain", backend=cell.backend or "auto"), device)
    if cell.form == "published":
        assert isinstance(plain, BiFormer)
        return Form(as_published(plain).train(cell.problem.backward), images, plain)
    if cell.form == "lean":
        lean = model_for(cell.replace(form="plain"), device)
        lean.set_lean()
        return Form(lean, images, plain)
    return Form(FastModel(plain, pack=cell.regime != "compile"), images, plain)


def _obstacles(cell: Cell) -> tuple[str, ...]:
    """Why a cell has no such form; each reason says what would work."""
    reasons = []
    if cell.form == "published" and get_variant(cell.model).layout != "biformer":
        reasons.append("only BiFormer-T, -S and -B have an official composition here")
    if cell.form == "runtime" and cell.problem.backward:
        reasons.append("the runtime is for inference; --direction fwd would work")
    if cell.form == "runtime" and cell.amp:
        reasons.append("the runtime has its weights in --dtype already; no --amp would work")
    if cell.form == "lean" and not cell.problem.backward:
        reasons.append("lean layers keep less for a backward pass; --direction fwd-bwd would work")
    if cell.form == "mixer":
        reasons.append("mixers have networks of their own, see bratune.work.mixers")
    if cell.form == "yours":
        reasons.append("a model of yours is not rebuilt from its name here")
    return tuple(reasons)


def _timm(cell: Cell, images: Tensor) -> nn.Module:
    timm, name = import_timm(), PEERS.get(cell.model, cell.model)
    if not timm.is_model(name):
        raise UnknownNameError("peer", name, PEERS)
    sized = {"img_size": cell.image} if _takes_size(timm, name) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model: Any = timm.create_model(name, pretrained=False, **sized)
    order = torch.channels_last if cell.layout == "nhwc" else torch.contiguous_format
    made: nn.Module = model.to(device=images.device, dtype=images.dtype, memory_format=order)
    return made.train(cell.problem.backward)


def _takes_size(timm: Any, model: str) -> bool:
    """Whether the constructor wants to know the size of the image, as windowed models do."""
    configuration = timm.get_pretrained_cfg(model)
    fixed = bool(getattr(configuration, "fixed_input_size", False))
    entry = timm.model_entrypoint(model)
    return fixed or "img_size" in inspect.signature(entry).parameters


def cell_macs(cell: Cell, form: Form) -> int:
    """Multiply-adds of a forward pass over the batch."""
    if cell.form != "timm":
        return model_macs(get_variant(cell.model), model_stages(cell), cell.problem.batch)
    from torch.utils.flop_counter import FlopCounterMode

    training = form.model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        form.model.eval()(form.images)
    form.model.train(training)
    return int(counter.get_total_flops()) // 2


def difference_limit(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """How far outputs are from others, over the largest number, and how far their data type allows."""
    a, b = (torch.cat([t.detach().flatten().double() for t in tensors]) for tensors in (found, expected))
    limit = AGREE[str(expected[0].dtype).removeprefix("torch.")]
    return float((a - b).abs().max() / b.abs().max()), limit


def form_modules(form: str) -> tuple[str, ...]:
    """Names of the modules that compute a form, beside those of its backends."""
    return _MODULES.get(form, ())
