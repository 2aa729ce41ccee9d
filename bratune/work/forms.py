"""Forms: a whole model as it may run, on the same seeded weights and images; see `bratune.cell.FORMS`.

>>> form = build_form(cell, device)
>>> form.model(form.images)
>>> form.plain          # what its output must agree with; None of another project's model
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bratune.cell import Cell
from bratune.errors import MissingPackageError, UnknownNameError, UnsupportedError
from bratune.kernels.biformer import BiFormer
from bratune.kernels.published import as_published
from bratune.kernels.runtime import FastModel
from bratune.variant import get_variant
from bratune.work.cells import model_stages
from bratune.work.contents import contents_of
from bratune.work.count import model_macs
from bratune.work.deploy import RUNTIMES, cached_file, open_file, require, write_file
from bratune.work.modules import images_for, model_for
from bratune.work.peers import PEERS, import_timm
from bratune.work.yours import model_of

__all__ = ["AGREE", "Form", "build_form", "cell_macs", "difference_limit", "form_modules"]

# On max|a - b| / max|b| of the outputs, by data type. Below float64 it is routes that decide: sums in another
# order let one at a near tie fall the other way, which moved a gradient of biformer_tiny by 5e-4 in float32.
AGREE = {"float64": 1e-9, "float32": 5e-3, "bfloat16": 0.1, "float16": 0.02}
# Modules that compute a form, beside those of its backends: what a row is reused by.
_MODULES = {
    "published": ("bratune.kernels.published",),
    "runtime": ("bratune.kernels.runtime",),
    "lean": ("bratune.kernels.lean",),
    "yours": ("bratune.foreign",),
    **dict.fromkeys(RUNTIMES, ("bratune.kernels.runtime",)),
}


@dataclass(frozen=True)
class Form:
    """A whole model in one form.

    Attributes:
        model: On the device; in training where the cell asks for gradients.
        images: ``[B, 3, H, W]`` on the device.
        plain: The same weights in this package's layers, by the backends that ``auto`` prefers, in the same
            mode: what the form must agree with. None where the form is that model, or another model.
        dtype: What it computes in, where that is another data type than that of the images.
    """

    model: nn.Module
    images: Tensor
    plain: nn.Module | None
    dtype: str = ""


def build_form(cell: Cell, device: str) -> Form:
    """The model of a ``model`` cell in its form, weights and images seeded alike for every form.

    Raises:
        UnsupportedError: the model or the cell has no such form; the reasons say why.
        UnknownNameError: timm has no such model.
        MissingPackageError: timm is asked for and not installed.
    """
    reasons = _obstacles(cell, device)
    if reasons:
        raise UnsupportedError(cell.form, reasons)
    if cell.form == "yours":
        return Form(*model_of(cell, device))
    images = images_for(cell, device)
    if cell.form == "timm":
        return Form(_timm(cell, images), images, None)
    if cell.form == "plain":
        return Form(model_for(cell, device), images, None)
    plain = model_for(cell.replace(form="plain", backend=cell.backend or "auto"), device)
    if cell.form in RUNTIMES:
        images = images.contiguous()
        return Form(_in_its_runtime(cell, images), images, plain, _dtype_there(cell))
    if cell.form == "published":
        assert isinstance(plain, BiFormer)
        return Form(as_published(plain).train(cell.problem.backward), images, plain)
    if cell.form == "lean":
        lean = model_for(cell.replace(form="plain"), device)
        lean.set_lean()
        return Form(lean, images, plain)
    return Form(FastModel(plain, pack=cell.regime != "compile"), images, plain)


def _obstacles(cell: Cell, device: str) -> tuple[str, ...]:
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
    if cell.form == "yours" and cell.amp:
        reasons.append("a model of yours decides about autocast itself; no --amp would work")
    if cell.form in RUNTIMES:
        reasons += _obstacles_there(cell, device)
    return tuple(reasons)


def _obstacles_there(cell: Cell, device: str) -> list[str]:
    """Why a cell cannot be run by another project's runtime."""
    runtime, reasons = RUNTIMES[cell.form], []
    if device != "cpu":
        reasons.append(f"{runtime.package} is measured on CPUs; --device cpu would work")
    if cell.problem.backward:
        reasons.append(f"{runtime.package} is for inference; --direction fwd would work")
    if cell.amp:
        reasons.append(f"{runtime.package} knows no autocast; no --amp would work")
    if cell.regime != "eager":
        reasons.append(f"{runtime.package} compiles by itself; --regime eager would work")
    if cell.problem.dtype not in runtime.dtypes:
        words = " and ".join(runtime.dtypes)
        reasons.append(f"{cell.form} computes {words} models on a CPU, found {cell.problem.dtype}")
    try:
        require(runtime.target)
    except MissingPackageError as error:
        reasons.append(str(error))
    return reasons


def _dtype_there(cell: Cell) -> str:
    return RUNTIMES[cell.form].dtypes[cell.problem.dtype]


def _in_its_runtime(cell: Cell, images: Tensor) -> nn.Module:
    """The model of a cell as a file of another runtime, opened there with the threads of torch.

    The file takes any batch and has float32 weights; the runtime is told the shape of the images.
    """
    target = RUNTIMES[cell.form].target
    key = {name: getattr(cell, name) for name in ("model", "task", "image", "n_win", "topk", "seed")}
    key["checkpoint"] = contents_of(cell)["checkpoint_hash"]

    def make(path: Path) -> None:
        exact = cell.replace(form="plain", backend="auto", problem=cell.problem.replace(dtype="float32"))
        write_file(FastModel(model_for(exact, "cpu"), pack=False), images.float(), path, target)

    path = cached_file(key, target, make)
    threads = torch.get_num_threads()
    return open_file(path, target, threads=threads, dtype=_dtype_there(cell), shape=images.shape)


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
    if cell.form == "yours":
        return 0  # somebody's operations need not be known to any counter
    if cell.form != "timm":
        return model_macs(get_variant(cell.model), model_stages(cell), cell.problem.batch)
    from torch.utils.flop_counter import FlopCounterMode

    training = form.model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        form.model.eval()(form.images)
    form.model.train(training)
    return int(counter.get_total_flops()) // 2


def difference_limit(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: str = ""
) -> tuple[float, float]:
    """How far outputs are from others, over the largest number, and how far their data type allows.

    Args:
        found: Outputs.
        expected: What they should be.
        dtype: What they were computed in, where that is another data type than theirs.
    """
    a, b = (torch.cat([t.detach().flatten().double() for t in tensors]) for tensors in (found, expected))
    limit = AGREE[dtype or str(expected[0].dtype).removeprefix("torch.")]
    return float((a - b).abs().max() / b.abs().max()), limit


def form_modules(form: str) -> tuple[str, ...]:
    """Names of the modules that compute a form, beside those of its backends."""
    return _MODULES.get(form, ())
