"""Other people's models: their Bi-Level Routing Attention, replaced by ours where both are the same.

A class name says little: the official name stands for NHWC and for NCHW maps, for copies with other scales
and for other functions altogether. So a layer is found by its name or by the shapes of its parameters, and
it is replaced only after a proof: on the tensors that reach it in a run of an example, ours must give its
output, and the gradients of its input and of its parameters, in float64.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bratune.errors import BratuneError, ProblemError, UnknownNameError
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, RoutedLayer
from bratune.kernels.nhwc import to_nchw, to_nhwc
from bratune.kernels.plain import hooks_of
from bratune.kernels.registry import get

__all__ = ["TOLERANCE", "Accelerated", "AttentionCall", "accelerate", "attention_calls", "swap"]

# On max|a - b| / max|b| in float64: far above what rounding makes of one function, far below another scale.
TOLERANCE = 1e-6
# Calls of a shared layer in one run that are looked at.
_MOST_CALLS = 4
_NAMED = re.compile(r"BiLevelRoutingAttention|nchwBRA|\bBRA", re.IGNORECASE)


class NCHWOutside(BiLevelRoutingAttention):
    """The official NHWC layer as many networks hold it: with NCHW maps outside."""

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Any:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``."""
        found = super().forward(to_nhwc(x), ret_attn_mask)
        return (to_nchw(found[0]), *found[1:]) if isinstance(found, tuple) else to_nchw(found)


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
        return "\n".join(lines + [f"left {name}: {why}" for name, why in self.left.items()])


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
            found; `backend` for all others.
        tolerance: On the largest difference over the largest number, in float64; by default `TOLERANCE`.

    Returns:
        The layers that were replaced, those that were left with the reason, and the way back.

    Raises:
        UnknownNameError: the plan names a layer that is none of these, or no backend has this name.
    """
    chosen = dict(plan.backends_by_layer if isinstance(plan, LayerPlan) else plan or {})
    for asked in (backend, *chosen.values()):
        if asked != "auto":
            get(asked)
    result = Accelerated(model)
    candidates = dict(_candidates(model))
    for name in chosen:
        if name not in candidates:
            raise UnknownNameError("routed layer", name, sorted(candidates))
    calls = _record(model, example, candidates)
    proved: dict[int, tuple[nn.Module, str, float] | str] = {}
    for name, layer in candidates.items():
        found = proved.get(id(layer))
        if found is None:
            limit = TOLERANCE if tolerance is None else tolerance
            found = _proved(layer, calls[id(layer)], chosen.get(name, backend), limit)
            proved[id(layer)] = found
        if isinstance(found, str):
            result.left[name] = found
            continue
        ours, result.swapped[name], result.apart[name] = found
        result._before[name] = layer
        _put(model, name, ours)
    return result


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
            made[id(layer)] = _FORMS[how](layer, backends[name]).train(layer.training)
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
            return type(layer)._attend(layer, q, k, v, routes, region, kv_region)

        return attend

    for name, layer in layers.items():
        found[name] = []
        object.__setattr__(layer, "_attend", listen(name, layer))
    try:
        _run(model, example)
    finally:
        for layer in layers.values():
            object.__delattr__(layer, "_attend")
    return found


# --- finding ------------------------------------------------------------------------------------------


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may be routed attention, under every name that they have."""
    inside: list[nn.Module] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(module is part for part in inside):
            continue
        known = isinstance(module, RoutedLayer) or _looks_alike(module)
        if known:
            inside += [part for part in module.modules() if part is not module]
        if known or _NAMED.search(type(module).__name__):
            yield name, module


def _looks_alike(module: nn.Module) -> bool:
    """Whether the parameters are those of one of the official layers."""
    return hasattr(module, "n_win") and (_legacy_projection(module) or _nchw_projection(module)) is not None


def _legacy_projection(module: nn.Module) -> nn.Linear | None:
    found = getattr(getattr(module, "qkv", None), "qkv", None)
    return found if isinstance(found, nn.Linear) else None


def _nchw_projection(module: nn.Module) -> nn.Conv2d | None:
    found = getattr(module, "qkv_linear", None)
    ends = isinstance(getattr(module, "output_linear", None), nn.Conv2d)
    return found if ends and isinstance(found, nn.Conv2d) else None


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
    """Call a model once, in evaluation and without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple | list) else (example,)))
    finally:
        for module, training in modes:
            module.training = training


# --- proving ------------------------------------------------------------------------------------------


def _proved(
    layer: nn.Module, calls: list[tuple[Any, ...]], backend: str, tolerance: float
) -> tuple[nn.Module, str, float] | str:
    """Ours in the place of a layer, how maps lie and how far apart they are; or why not."""
    if isinstance(layer, RoutedLayer):
        return "is a layer of bratune already; its set_backend chooses"
    if not calls:
        return "was not called in a run of the example"
    if hooks_of(layer):
        return f"has {hooks_of(layer)[0]}, which ours in its place would leave out"
    maps = []
    for args, kwargs in calls:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 4:
            return "was called with more than one map [B, H, W, C] or [B, C, H, W]"
        maps.append(args[0])
    reasons = []
    for how, make in _FORMS.items():
        try:
            ours = make(layer, backend)
            missing = set(ours.state_dict()) ^ set(layer.state_dict())
            if missing:
                reasons.append(f"{how}: other parameters ({', '.join(sorted(missing)[:3])})")
                continue
            apart = _apart(layer, make, maps)
            if not apart <= tolerance:
                reasons.append(f"{how}: differs {apart:.1e}")
                continue
            with torch.no_grad():
                ours(maps[0])  # the backend itself, in the data type that it will meet
        except (BratuneError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reasons.append(f"{how}: {' '.join(str(error).split())[:500]}")
            continue
        return ours.train(layer.training), how, apart
    return "; ".join(reasons)


def _apart(layer: nn.Module, make: Callable[[nn.Module, str], nn.Module], maps: list[Tensor]) -> float:
    """The largest difference of outputs and gradients over the largest number, in training and evaluation.

    In float64, where near ties between regions do not fall either way.
    """
    worst = 0.0
    theirs = copy.deepcopy(layer).double()
    ours = make(theirs, "gather")
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        for x in maps:
            expected, found = (_outputs_and_gradients(module, x.double()) for module in (theirs, ours))
            for a, b in zip(found, expected, strict=True):
                if a.shape != b.shape:
                    return float("inf")
                if b.numel():
                    worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def _outputs_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    weights = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        out = module(x)
        if not isinstance(out, Tensor):
            raise ProblemError(f"it returns a {type(out).__name__}, not a map")
        rng = torch.Generator().manual_seed(0)
        along = torch.randn(out.shape, generator=rng, dtype=out.dtype).to(out.device)
        grads = torch.autograd.grad(out, [x, *weights], along, allow_unused=True)
    zeros = (torch.zeros_like(p) for p in (x, *weights))
    return [out.detach(), *(z if g is None else g for g, z in zip(grads, zeros, strict=True))]


# --- making ours --------------------------------------------------------------------------------------


def _legacy(kind: type[BiLevelRoutingAttention]) -> Callable[[nn.Module, str], nn.Module]:
    def make(layer: nn.Module, backend: str) -> nn.Module:
        projection, wo, lepe = _legacy_projection(layer), _child(layer, "wo"), _child(layer, "lepe")
        if projection is None:
            raise ProblemError("it has no qkv.qkv, the linear layer of the official one")
        dim = projection.in_features
        qk_dim = (projection.out_features - dim) // 2
        router = _child(layer, "router")
        with torch.device("meta"):
            ours = kind(
                dim,
                num_heads=_number(layer, "num_heads"),
                n_win=_number(layer, "n_win"),
                qk_dim=qk_dim,
                qk_scale=getattr(layer, "scale", None),
                topk=_number(layer, "topk"),
                param_attention="qkvo" if isinstance(wo, nn.Linear) else "qkv",
                param_routing=bool(getattr(layer, "param_routing", False)),
                diff_routing=bool(getattr(layer, "diff_routing", False)),
                soft_routing=bool(getattr(layer, "soft_routing", False)),
                side_dwconv=_side(lepe),
                auto_pad=bool(getattr(layer, "auto_pad", False)),
                backend=backend,
            )
        ours.qkv.qkv = projection
        if wo is not None and isinstance(wo, nn.Linear):
            ours.wo = wo
        if isinstance(lepe, nn.Conv2d):
            ours.lepe = lepe
        pool = _child(layer, "kv_down")
        if pool is not None:
            ours.kv_down = pool
        learned = _child(router, "emb") if router is not None else None
        if learned is not None:
            ours.router.emb = learned
        return ours

    return make


def _nchw(layer: nn.Module, backend: str) -> nn.Module:
    projection, lepe, output = _nchw_projection(layer), _child(layer, "lepe"), _child(layer, "output_linear")
    if projection is None or not isinstance(output, nn.Conv2d):
        raise ProblemError("it has no qkv_linear and output_linear, the convolutions of the official one")
    with torch.device("meta"):
        ours = NCHWBiLevelRoutingAttention(
            projection.in_channels,
            num_heads=_number(layer, "num_heads"),
            n_win=_number(layer, "n_win"),
            qk_scale=getattr(layer, "scale", None),
            topk=_number(layer, "topk"),
            side_dwconv=_side(lepe),
            backend=backend,
        )
    ours.qkv_linear, ours.output_linear = projection, output
    if isinstance(lepe, nn.Conv2d):
        ours.lepe = lepe
    return ours


_FORMS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "nhwc": _legacy(BiLevelRoutingAttention),
    "nchw outside": _legacy(NCHWOutside),
    "nchw": _nchw,
}


def _child(module: nn.Module, name: str) -> nn.Module | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None


def _number(layer: nn.Module, name: str) -> int:
    found = getattr(layer, name, None)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ProblemError(f"its {name} is {found!r}, not a whole number")
    return found


def _side(lepe: nn.Module | None) -> int:
    if not isinstance(lepe, nn.Conv2d):
        return 0
    return int(lepe.kernel_size[0])


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
