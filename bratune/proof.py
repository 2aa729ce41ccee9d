"""The proof that a layer of somebody else is one of ours, and ours around its parameters.

On the tensors that reach the layer, and on random ones, ours must give its output, and the gradients of its
input and of its parameters, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bratune.errors import ProblemError
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, RoutedLayer
from bratune.kernels.nhwc import to_nchw, to_nhwc
from bratune.kernels.plain import hooks_of

__all__ = ["FORMS", "TOLERANCE", "legacy_projection", "nchw_projection", "proved"]

# On max|a - b| / max|b| in float64: far above what rounding makes of one function, far below another scale.
TOLERANCE = 1e-6


class NCHWOutside(BiLevelRoutingAttention):
    """The official NHWC layer as many networks hold it: with NCHW maps outside."""

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Any:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``."""
        found = super().forward(to_nhwc(x), ret_attn_mask)
        return (to_nchw(found[0]), *found[1:]) if isinstance(found, tuple) else to_nchw(found)


# --- proving ------------------------------------------------------------------------------------------


def proved(
    layer: nn.Module, calls: list[tuple[Any, ...]], backend: str, tolerance: float
) -> tuple[nn.Module, str, float] | str:
    """Ours in the place of a layer, how maps lie and how far apart they are; or why not.

    Args:
        layer: Stays as it is.
        calls: Positional arguments and keywords of its calls in a run of the model.
        backend: Which implementation attends in ours.
        tolerance: On the largest difference over the largest number.
    """
    if isinstance(layer, RoutedLayer):
        return "is a layer of bratune already; its set_backend chooses"
    if not calls:
        return "was not called in a run of the example"
    if hooks_of(layer):
        return f"has {hooks_of(layer)[0]}, which ours in its place would leave out"
    maps = [_map_of(*call) for call in calls]
    for found in maps:
        if isinstance(found, str):
            return found
    reasons = []
    for how, make in FORMS.items():
        try:
            ours = make(layer, backend)
            missing = set(ours.state_dict()) ^ set(layer.state_dict())
            if missing:
                reasons.append(f"{how}: other parameters ({', '.join(sorted(missing)[:3])})")
                continue
            lost = _lost_hooks(layer, ours)
            if lost:
                reasons.append(f"{how}: has {lost}, which ours in its place would leave out")
                continue
            proof = _Proof(layer, how, tolerance)
            proof.compare([x for x in maps if isinstance(x, Tensor)])
            if not proof.apart <= tolerance:
                reasons.append(f"{how}: differs {proof.apart:.1e}{proof.where}")
                continue
            if isinstance(ours, BiLevelRoutingAttention):
                ours.auto_pad = ours.auto_pad and proof.pads
            with torch.no_grad():
                ours(maps[0])  # the backend itself, in the data type that it will meet
        except Exception as error:  # somebody else's code
            reasons.append(f"{how}: {' '.join(str(error).split())[:500] or type(error).__name__}")
            continue
        return ours.train(layer.training), how, proof.apart
    return "; ".join(reasons)


def _lost_hooks(layer: nn.Module, ours: nn.Module) -> str:
    """What would run with a call of a module in theirs that is not in ours."""
    kept = {id(module) for module in ours.modules()}
    for name, module in layer.named_modules():
        if name and id(module) not in kept and hooks_of(module):
            return f"{hooks_of(module)[0]} at {name}"
    return ""


def _map_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | str:
    """The map that a call brings, or why it brings none that ours takes."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    first = given.pop(0, given.pop("x", None))
    if not isinstance(first, Tensor) or first.ndim != 4:
        return "was called with something else than a map [B, H, W, C] or [B, C, H, W]"
    if any(value is not False for value in given.values()):  # ret_attn_mask=False asks for nothing
        return f"was called with {len(given)} arguments beside its map, and ours takes none"
    return first


class _Proof:
    """Comparisons of a layer with ours, in float64, where near ties do not fall either way.

    Both compute with the same copies of the parameters.

    Args:
        layer: Theirs.
        how: A name of `FORMS`.
        tolerance: See `proved`.

    Attributes:
        apart: The largest difference of outputs and gradients over the largest number, so far.
        where: On which tensors, in words.
        pads: Ours may pad maps that S does not divide; otherwise it must refuse them.
    """

    def __init__(self, layer: nn.Module, how: str, tolerance: float) -> None:
        self.apart, self.where, self.pads = 0.0, "", True
        self._tolerance = tolerance
        self._rows = 1 if how == "nhwc" else 2
        with torch.inference_mode(False):
            self._theirs = copy.deepcopy(layer).double()
        self._ours: Any = FORMS[how](self._theirs, "gather")
        self._rng = torch.Generator().manual_seed(0)

    def compare(self, maps: list[Tensor]) -> None:
        """Compare, in training and in evaluation; then with random weights on random maps.

        Examples are often constant and weights often small or zero, where softmax is uniform whatever the
        scale. Two images show what one would mix, and a map that S does not divide how it is padded.
        """
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            for training in (True, False):
                for module in (self._theirs, self._ours):
                    module.train(training)
                for x in maps:
                    self._compare(x, " in training" if training else "")
            for p in self._theirs.parameters():
                p.data.copy_(self._drawn(p.shape, fan_in=p[0].numel() if p.ndim > 1 else 100))
            x = self._small(maps[0])
            self._compare(x, " with random weights on random maps")
            self._compare_cropped(x[:1])

    def _small(self, like: Tensor) -> Tensor:
        """Two random images, with maps of two tokens per side of a region where theirs takes these."""
        most = 2 * self._ours.n_win
        shape = [2, *like.shape[1:]]
        full = self._drawn(shape).to(like.device)
        for axis in (self._rows, self._rows + 1):
            shape[axis] = min(shape[axis], most)
        small = self._drawn(shape).to(like.device)
        try:
            self._theirs(small)
        except Exception:  # it takes no other size
            return full
        return small

    def _compare_cropped(self, x: Tensor) -> None:
        height, width = (side - 1 for side in x.shape[self._rows : self._rows + 2])
        x = x.narrow(self._rows, 0, height).narrow(self._rows + 1, 0, width)
        try:
            self._theirs(x)
        except Exception:  # it takes no such map: nobody will give it one
            return
        before = self.apart, self.where
        try:
            self._compare(x, f" on maps of {height}x{width}, which it takes as well")
        except Exception:  # ours takes no such map, and will say so
            return
        if isinstance(self._ours, BiLevelRoutingAttention) and not self.apart <= self._tolerance:
            self.pads, (self.apart, self.where) = False, before

    def _compare(self, x: Tensor, where: str) -> None:
        before = [b.clone() for b in self._theirs.buffers()]
        expected = _outputs_and_gradients(self._theirs, x)
        for b, kept in zip(self._theirs.buffers(), before, strict=True):
            b.data.copy_(kept)  # what a parametrization iterates is at the same place for both
        found = _outputs_and_gradients(self._ours, x)
        for a, b in zip(found, expected, strict=True):
            if not b.isfinite().all():
                raise ProblemError(f"it gives numbers that are not finite{where}, which prove nothing")
            apart = math.inf
            if a.shape == b.shape:
                apart = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0
            if not apart <= self.apart:  # also what is no number
                self.apart, self.where = (apart if apart == apart else math.inf), where

    def _drawn(self, shape: Sequence[int], fan_in: int = 1) -> Tensor:
        drawn = torch.randn(shape, generator=self._rng, dtype=torch.float64)
        return drawn / math.sqrt(fan_in)


def _outputs_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().double().clone().requires_grad_()
    weights = [p for p in module.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with torch.autocast(x.device.type, enabled=False):
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
        projection, wo, lepe = legacy_projection(layer), _child(layer, "wo"), _child(layer, "lepe")
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
                auto_pad=bool(getattr(layer, "auto_pad", True)),
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
    projection, lepe, output = nchw_projection(layer), _child(layer, "lepe"), _child(layer, "output_linear")
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


FORMS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
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


def legacy_projection(module: nn.Module) -> nn.Linear | None:
    """The linear layer for queries, keys and values of an official NHWC layer; None where there is none."""
    found = getattr(getattr(module, "qkv", None), "qkv", None)
    return found if isinstance(found, nn.Linear) else None


def nchw_projection(module: nn.Module) -> nn.Conv2d | None:
    """The convolution for queries, keys and values of an official NCHW layer; None where there is none."""
    found = getattr(module, "qkv_linear", None)
    ends = isinstance(getattr(module, "output_linear", None), nn.Conv2d)
    return found if ends and isinstance(found, nn.Conv2d) else None
