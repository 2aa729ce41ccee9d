"""Other people's models: their Bi-Level Routing Attention, replaced by ours where both are the same.

A class name says little: the official name stands for NHWC and for NCHW maps, for copies with other scales
and for other functions altogether. So a layer is found by its name or by the shapes of its parameters, and
it is replaced only after a proof (`bratune.proof`), and where the model runs with ours in its place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bratune.errors import PlanError, UnknownNameError
from bratune.kernels.layer import RoutedLayer
from bratune.kernels.registry import get
from bratune.proof import FORMS, TOLERANCE, legacy_projection, nchw_projection, proved

__all__ = ["Accelerated", "AttentionCall", "accelerate", "attention_calls", "swap"]

# Calls of a shared layer in one run that are looked at.
_MOST_CALLS = 4
_NAMED = re.compile(r"BiLevelRoutingAttention|nchwBRA|\bBRA", re.IGNORECASE)


@dataclass
class Accelerated:
    """What `accelerate` did.

    Attributes:
        model: The model, changed in place.
        swapped: How every replaced layer is held (``nhwc``, ``nchw outside`` or ``nchw``), by name.
        left: Why every other layer that looks like one was left as it is, by name.
        apart: The largest difference of output and gradients over the largest number, in float64, by name
            of the replaced layer.
    """

    model: nn.Module
    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    _before: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def restore(self) -> nn.Module:
        """Put the layers back that were there; they hold the same parameters, trained or not."""
        for name, layer in self._before.items():
            layer.train(self.model.get_submodule(name).training)
            _put(self.model, name, layer)
        self._before.clear()
        self.swapped.clear()
        return self.model

    def __str__(self) -> str:
        lines = [f"swapped {name}: {how}" for name, how in self.swapped.items()]
        lines += [f"left {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or f"no layer of this {type(self.model).__name__} looks like routed attention"


def accelerate(
    model: nn.Module,
    example: Any,
    *,
    backend: str = "auto",
    plan: Mapping[str, str] | LayerPlan | None = None,
    tolerance: float | None = None,
) -> Accelerated:
    """Replace the routed attention of any model by ours, in place, where both are proved to be the same.

    Ours holds the very parameters of the layer that it replaces, under the same keys: optimizers, checkpoints
    and training go on as before.

    Args:
        model: Any module. It stays in training or evaluation; the example is run in evaluation.
        example: What the model is called with: a tensor, a tuple of arguments, or a mapping of keywords.
        backend: Which implementation attends, a name of `bratune.kernels.registry.names` or ``auto``.
        plan: Backends by name of the layer, as `Accelerated.swapped` has them, or what `bratune.tune_model`
            found (`bratune.ModelPlan`); `backend` for all others.
        tolerance: On the largest difference over the largest number, in float64; by default `TOLERANCE`.

    Returns:
        The layers that were replaced, those that were left with the reason, and the way back.

    Raises:
        UnknownNameError: the plan names a layer that is none of these, or no backend has this name.
        PlanError: the plan says nothing about layers, or twice about one.
    """
    result = Accelerated(model)
    if _is_candidate(model):
        result.left["(the model)"] = (
            "is the layer itself; in a module, as nn.Sequential(layer), it is replaced"
        )
    candidates = dict(_candidates(model))
    backends = _backends(plan, backend, candidates)
    calls = _record(model, example, candidates)
    limit = TOLERANCE if tolerance is None else tolerance
    found: dict[int, tuple[nn.Module, str, float] | str] = {}
    for name, layer in candidates.items():
        if name.endswith("_orig_mod"):
            found[id(layer)] = "is compiled by itself; a model that is compiled afterwards would take ours"
        if id(layer) not in found:
            found[id(layer)] = proved(layer, calls[id(layer)], backends[id(layer)], limit)
    found |= _refused(model, example, candidates, found)
    for name, layer in candidates.items():
        proof = found[id(layer)]
        if isinstance(proof, str):
            result.left[name] = proof
            continue
        ours, result.swapped[name], result.apart[name] = proof
        result._before[name] = layer
        _put(model, name, ours)
    return result


def _backends(plan: object, usual: str, candidates: Mapping[str, nn.Module]) -> dict[int, str]:
    """The backend of each layer, which may have several names."""
    if plan is not None and not isinstance(plan, LayerPlan | Mapping):
        raise PlanError(
            f"a {type(plan).__name__} says nothing about the layers of this model; backends by name of the "
            "layer would, or bratune.ModelPlan.load(FILE)"
        )
    chosen: dict[str, str] = dict(plan.backends_by_layer if isinstance(plan, LayerPlan) else plan or {})
    for asked in (usual, *chosen.values()):
        if asked != "auto":
            get(asked)
    found: dict[int, str] = {}
    for name, asked in chosen.items():
        if name not in candidates:
            raise UnknownNameError("routed layer", name, sorted(candidates))
        if found.setdefault(id(candidates[name]), asked) != asked:
            raise PlanError(f"{name} is one layer under several names, and the plan has two backends for it")
    return {id(layer): found.get(id(layer), usual) for layer in candidates.values()}


def _refused(
    model: nn.Module,
    example: Any,
    candidates: Mapping[str, nn.Module],
    found: Mapping[int, tuple[nn.Module, str, float] | str],
) -> dict[int, str]:
    """Layers with ours in whose place the model raises: it may want more of them than their function."""
    ours = {key: proof[0] for key, proof in found.items() if not isinstance(proof, str)}
    if not ours or _error(model, example, candidates, ours) is None:
        return {}
    errors = {key: _error(model, example, candidates, {key: layer}) for key, layer in ours.items()}
    if not any(errors.values()):
        errors = dict.fromkeys(ours, _error(model, example, candidates, ours))
    return {
        key: f"with ours in its place the model raises {type(error).__name__}: {' '.join(str(error).split())}"
        for key, error in errors.items()
        if error is not None
    }


def _error(
    model: nn.Module, example: Any, candidates: Mapping[str, nn.Module], ours: Mapping[int, nn.Module]
) -> Exception | None:
    """What a run of the example raises with layers of ours in their places, which are then given back."""
    try:
        for name, layer in candidates.items():
            _put(model, name, ours.get(id(layer), layer))
        _run(model, example)
    except Exception as error:  # somebody else's code
        return error
    finally:
        for name, layer in candidates.items():
            _put(model, name, layer)
    return None


@runtime_checkable
class LayerPlan(Protocol):
    """What names a backend for layers of a model; `bratune.tune.model_plan.ModelPlan` does."""

    @property
    def backends_by_layer(self) -> Mapping[str, str]:
        """Backends by name of the layer."""
        ...


# --- measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """What a routed layer hands to `bratune.kernels.api.routed_attention` in a run of its model."""

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    heads: int
    region: tuple[int, int]
    kv_region: tuple[int, int]
    scale: float


def swap(model: nn.Module, held: Mapping[str, str], backends: Mapping[str, str]) -> None:
    """Replace layers that were proved already, in place.

    Args:
        model: Of the same kind as the one of the proof.
        held: `Accelerated.swapped` of that proof, or of some of its layers; a layer of this package is held
            as ``bratune``.
        backends: By name of the layer.
    """
    made: dict[int, nn.Module] = {}
    for name, how in held.items():
        layer = model.get_submodule(name)
        if isinstance(layer, RoutedLayer):
            layer.set_backend(backends[name])
            continue
        if id(layer) not in made:
            made[id(layer)] = FORMS[how](layer, backends[name]).train(layer.training)
        _put(model, name, made[id(layer)])


def attention_calls(model: nn.Module, example: Any) -> dict[str, list[AttentionCall]]:
    """The attention calls of every routed layer of this package in a run of the example, in evaluation.

    A layer with several names has the first; one that composes its attention itself (soft routing) has none.
    """
    found: dict[str, list[AttentionCall]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoutedLayer)}

    def listen(name: str, layer: RoutedLayer) -> Callable[..., Tensor]:
        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            routes: Tensor,
            region: tuple[int, int],
            kv_region: tuple[int, int],
        ) -> Tensor:
            found[name].append(
                AttentionCall(q, k, v, routes, layer.num_heads, region, kv_region, layer.scale)
            )
            return type(layer).attend_regions(layer, q, k, v, routes, region, kv_region)

        return attend

    for name, layer in layers.items():
        found[name] = []
        object.__setattr__(layer, "attend_regions", listen(name, layer))
    try:
        _run(model, example)
    finally:
        for layer in layers.values():
            object.__delattr__(layer, "attend_regions")
    return found


# --- finding ------------------------------------------------------------------------------------------


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may be routed attention, under every name that they have."""
    inside: list[nn.Module] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(module is part for part in inside) or _is_wrapper(module):
            continue
        if isinstance(module, RoutedLayer) or _looks_alike(module):
            inside += [part for part in module.modules() if part is not module]
        if _is_candidate(module):
            yield name, module


def _is_candidate(module: nn.Module) -> bool:
    known = isinstance(module, RoutedLayer) or _looks_alike(module)
    return known or _NAMED.search(type(module).__name__) is not None


def _is_wrapper(module: nn.Module) -> bool:
    """Whether this is what torch.compile makes of a module, which has the attributes of what it wraps."""
    return "_orig_mod" in module._modules


def _looks_alike(module: nn.Module) -> bool:
    """Whether the parameters are those of one of the official layers."""
    return hasattr(module, "n_win") and (legacy_projection(module) or nchw_projection(module)) is not None


def _record(
    model: nn.Module, example: Any, candidates: Mapping[str, nn.Module]
) -> dict[int, list[tuple[Any, ...]]]:
    """The arguments of every call of every candidate in a run of the example, in evaluation."""
    calls: dict[int, list[tuple[Any, ...]]] = {id(layer): [] for layer in candidates.values()}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held = calls[id(module)]
        if len(held) < _MOST_CALLS:
            held.append((args, kwargs))

    layers = {id(layer): layer for layer in candidates.values()}.values()
    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _run(model: nn.Module, example: Any) -> None:
    """Call a model once, in evaluation, without gradients and as it is written, where it is compiled."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), _uncompiled():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple | list) else (example,)))
    finally:
        for module, training in modes:
            module.training = training


def _uncompiled() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return nullcontext()
    found: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return found


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
