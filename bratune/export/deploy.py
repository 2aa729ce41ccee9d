"""Deploy: a model as a file of a runtime, which is run there and compared before it is called done."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import bratune
from bratune.errors import PlanError, ProblemError
from bratune.foreign import accelerate
from bratune.kernels.api import OPERATORS
from bratune.kernels.backbone import Backbone
from bratune.kernels.layer import RoutedLayer
from bratune.kernels.runtime import FastModel
from bratune.tune.model_plan import ModelPlan, plan_from
from bratune.tune.plan import Plan
from bratune.work.deploy import TARGETS, open_file, read_notes, require, write_file
from bratune.work.forms import difference_limit

__all__ = ["Deployed", "deploy", "plan_in"]


@dataclass(frozen=True)
class Deployed:
    """A file that gives what the model gives.

    Attributes:
        path: The file.
        apart: How far its results are from those of the model in PyTorch, over the largest number, by batch.
        limit: How far they may be.
        left: Routed layers of a foreign model that were exported as they are, with the reason.
    """

    path: Path
    apart: dict[int, float]
    limit: float
    left: dict[str, str]

    def __str__(self) -> str:
        sizes = ", ".join(f"batch {batch}: {apart:.1e}" for batch, apart in self.apart.items())
        return f"{self.path}: run and compared with PyTorch, apart by ({sizes}), {self.limit:.0e} would pass"


def deploy(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    target: str,
    path: str | Path,
    *,
    plan: Plan | ModelPlan | None = None,
    open_batch: bool = True,
) -> Deployed:
    """Write a model as a file of a runtime, run the file there, and compare.

    A model of this package is made ready for inference first (norms folded into products); of any other one
    the routed layers are replaced where `bratune.accelerate` proves that they may be.

    Args:
        model: Stays as it is.
        example: What it is called with; the first axis of every tensor is the batch.
        target: ``onnx``, ``openvino`` or ``pt2``.
        path: The file; what stands there is replaced once the new one is found right.
        plan: Is carried in the file, see `plan_in`. Its backends are PyTorch's matter: a file holds ordinary
            operations.
        open_batch: Let the file take any batch; otherwise the example's.

    Raises:
        MissingPackageError: the tool is not installed.
        ProblemError: the model cannot be exported, or the file gives something else than the model.
        PlanError: the file cannot be written.
    """
    require(target)
    path = Path(path)
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise ProblemError("a model is exported in float32 from the CPU; model.cpu().float() would work")
    if model.training:
        raise ProblemError("the model is in training; model.eval() would work")
    notes = {"version": bratune.__version__}
    if plan is not None:
        notes["plan"] = json.dumps(plan.to_dict())
    swapped = None
    try:
        if isinstance(model, Backbone):
            with _ordinary(model):
                graph: nn.Module = FastModel(model, pack=False)
        else:
            swapped = accelerate(model, inputs)
            graph = model
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
            fresh = Path(scratch) / path.name
            with _ordinary(model):
                write_file(graph, inputs, fresh, target, notes=notes, open_batch=open_batch)
            left = dict(swapped.left) if swapped else {}
            if swapped:
                swapped.restore()
            apart, limit = _compared(model, inputs, fresh, target, open_batch=open_batch)
            for made in sorted(Path(scratch).iterdir()):
                os.replace(made, path.parent / made.name)
    except OSError as error:
        raise PlanError(f"the export cannot be written to {path}: {error.strerror or error}") from None
    finally:
        if swapped:
            swapped.restore()
    return Deployed(path, apart, limit, left)


@contextlib.contextmanager
def _ordinary(model: nn.Module) -> Iterator[None]:
    """Let layers whose backend is an operator of ours attend by ordinary operations meanwhile."""
    named = [m for m in model.modules() if isinstance(m, RoutedLayer) and m.backend in OPERATORS]
    settings = [(layer.backend, layer.config) for layer in named]
    try:
        for layer in named:
            layer.set_backend("auto")
        yield
    finally:
        for layer, (backend, config) in zip(named, settings, strict=True):
            layer.set_backend(backend, config)


def _compared(
    model: nn.Module, inputs: tuple[Tensor, ...], path: Path, target: str, *, open_batch: bool
) -> tuple[dict[int, float], float]:
    """How far a file is from the model, by batch: one and three, or the one that it was written for."""
    run = open_file(path, target, threads=torch.get_num_threads())
    rng = torch.Generator().manual_seed(1)
    apart, limit = {}, 0.0
    for batch in (1, 3) if open_batch else (len(inputs[0]),):
        fed = tuple(_like(x, batch, rng) for x in inputs)
        with torch.no_grad():
            found, expected = _outputs(run(*fed)), _outputs(model(*fed))
        if [t.shape for t in found] != [t.shape for t in expected]:
            shapes = [[list(t.shape) for t in outs] for outs in (found, expected)]
            raise ProblemError(f"the {target} file gives {shapes[0]} for a batch of {batch}, not {shapes[1]}")
        apart[batch], limit = difference_limit(found, expected)
        if not apart[batch] <= limit:
            raise ProblemError(
                f"the {target} file differs from the model by {apart[batch]:.1e} of the largest number at "
                f"batch {batch}, {limit:.0e} would pass; it was not kept"
            )
    return apart, limit


def _like(x: Tensor, batch: int, rng: torch.Generator) -> Tensor:
    """Other data of the kind of an input: as spread as it is, with another batch."""
    if not x.is_floating_point():
        return x[torch.randint(len(x), (batch,), generator=rng)]
    spread = x.std() if x.numel() > 1 else torch.ones(())
    return x.mean() + spread * torch.randn(batch, *x.shape[1:], generator=rng)


def _outputs(found: object) -> tuple[Tensor, ...]:
    """The tensors that a model gives, however they are nested."""
    leaves, _ = torch.utils._pytree.tree_flatten(found)
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def plan_in(path: str | Path) -> Plan | ModelPlan | None:
    """The plan that a file of `deploy` carries; None where it carries none.

    Raises:
        ProblemError: its name ends like none of these files.
        MissingPackageError: the tool that reads it is not installed.
    """
    path = Path(path)
    target = next((name for name, suffix in TARGETS.items() if path.suffix == suffix), None)
    if target is None:
        raise ProblemError(f"{path} is no exported file; these end in {', '.join(TARGETS.values())}")
    text = read_notes(path, target, ("plan",)).get("plan")
    return None if text is None else plan_from(json.loads(text), source=str(path))
