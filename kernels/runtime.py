"""A model made ready for inference: the same results with fewer operations and less memory traffic.

>>> fast = optimize(biformer_small(pretrained="weights.pth").eval())
>>> scores = fast(images)

What it does: batch norms and layer scales are folded into the layer beside them, the last one into the
head; the residual of the position embedding goes into its kernel; keys and values move as one tensor;
GELU and residuals are part of the product before them where torch has that; on a CPU, attention, routing,
norms and depthwise convolutions are C (`bratune.kernels.native`); on CUDA, norms take several
tokens at a time and routes come from two kernels; maps stay NHWC from the stem to the head. What it needs:
a model in evaluation, on the device and in the data type that it shall run in. It copies the weights: later
changes of the model do not reach it. What it makes can be copied, pickled, exported, and loaded with the
weights of another one; it refuses another device or data type, and training.

A block in which something stands in the way of a call (an adapter, a hook, a parametrization, a quantised
layer; `bratune.kernels.plain`) is copied and called as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from bratune import machine as machines
from bratune.errors import ProblemError, TargetError
from bratune.kernels import layout, tuned
from bratune.kernels.api import routed_attention
from bratune.kernels.backbone import Backbone, check_images
from bratune.kernels.blocks import Block, BlockSTL, ConvAttention, DropPath, NCHWBlockSTL, Residual, plain_mlp
from bratune.kernels.constants import constant_in_graphs
from bratune.kernels.dispatch import is_exported, is_recorded
from bratune.kernels.epilogues import FrozenConv, FrozenLinear, FrozenNorm, accumulates, refuse_another_form
from bratune.kernels.fold import conv_then_norm, norm_then_conv, norm_then_linear
from bratune.kernels.full_attention import Attention, FullAttention, full_attention
from bratune.kernels.fused import launch
from bratune.kernels.layer import BiLevelRoutingAttention, RoutedLayer, problem_of
from bratune.kernels.native import block as native_block
from bratune.kernels.native.whole import AtOnce, BlockParts, add_mlp, call_by_name, goes_at_once
from bratune.kernels.nhwc import keeps_size, to_nchw, to_nhwc
from bratune.kernels.packed_attention import PackedAttention, prefers_mask
from bratune.kernels.plain import hooks_of, is_plain, is_plain_throughout
from bratune.kernels.routing import route, route_pooled
from bratune.kernels.stl import StageSTL
from bratune.problem import Problem

__all__ = ["FastModel", "GraphRunner", "optimize"]

Module = TypeVar("Module", bound=nn.Module)


def optimize(model: Backbone, *, compile: bool = False, graph_input: Tensor | None = None) -> nn.Module:
    """The model made ready for inference.

    Layers whose backend is ``auto`` attend in the cheapest exact way that is known for the device; a named
    backend is the one that runs.

    Args:
        model: In evaluation.
        compile: Compile with ``torch.compile``, which fuses what eager torch cannot.
        graph_input: An example batch: capture a CUDA graph for its shape, which removes the cost of
            launching (what counts at small batches). The result then takes that shape alone, and returns
            the same output tensors at every call.

    Raises:
        ProblemError: the model is in training, is none of `bratune.kernels.biformer`, has hooks of its own,
            or holds something that cannot be copied.
        TargetError: a CUDA graph of a model that is not on a CUDA device.
    """
    _check_model(model)
    if model.training:
        raise ProblemError(
            "the model is in training, whose batch statistics cannot be folded; model.eval() can"
        )
    fast: nn.Module = FastModel(model, pack=not compile, native=True)
    if compile:
        fast.compile(dynamic=False)
    return fast if graph_input is None else GraphRunner(fast, graph_input)


class FastModel(nn.Module):
    """See `optimize`.

    Args:
        model: In evaluation.
        pack: See `FrozenLinear`.
        native: Use the C kernels for CPUs where they run and a layer's backend is ``auto``; by default where
            weights are packed. Without both, the model is plain PyTorch, which other tools can read.
    """

    def __init__(self, model: Backbone, *, pack: bool = True, native: bool | None = None) -> None:
        super().__init__()
        self.check_size = _skeleton(model).check_size
        self.dtype = next(model.parameters()).dtype
        self.features_only = model.features_only
        # In a graph these convolutions are operators, which may hold packed weights.
        native = (pack if native is None else native) and native_block.can_run(next(model.parameters()))
        folded = [_folded(layer, pack=pack or native) for layer in model.downsample_layers]
        self.downsample_layers = nn.ModuleList(folded)
        self.stages = nn.ModuleList()
        for stage, down in zip(model.stages, folded, strict=True):
            self.stages.append(fast := _fast_stage(stage, down, pack=pack))
            for part in (
                fast.modules() if native else ()
            ):  # the next stage then has the memory that these leave
                if isinstance(part, FrozenConv | FrozenLinear | FrozenNorm | _FastRouted | _FastFull):
                    part.use_native()
        if model.features_only:
            self.norms = copy.deepcopy(model.extra_norms)
            return
        self.norm, self.head = copy.deepcopy(model.norm), copy.deepcopy(model.head)
        if is_plain(model.norm, nn.BatchNorm2d) and is_plain(model.head, nn.Linear):
            assert isinstance(model.norm, nn.BatchNorm2d)
            assert isinstance(model.head, nn.Linear)
            self.norm, self.head = nn.Identity(), norm_then_linear(model.norm, model.head)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """For inference alone.

        Raises:
            ProblemError: training is asked for.
        """
        if mode:
            raise ProblemError(
                "an optimized model is for inference alone; train the plain one, then optimize it"
            )
        return super().train(mode)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take the weights of another optimized model, of the same model, device type and data type.

        Raises:
            ProblemError: the weights are those of a plain model, or of another one.
        """
        own = self.state_dict()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state_dict.items()}:
            raise ProblemError(
                f"these {len(state_dict)} weights do not fit the {len(own)} of this optimized model; load "
                "them into the plain model, then optimize it"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for tensor in (*self.buffers(), *self.parameters()):
            if tensor.dtype == self.dtype:
                refuse_another_form(tensor, fn)  # before anything has changed
                break
        done: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return done

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images ``[B, channels, H, W]`` to class scores, or to the four maps."""
        check_images(x)
        self.check_size(*layout.settled(x.shape[2:]))
        if x.dtype != self.dtype:
            raise ProblemError(f"the runtime was made of a model in {self.dtype}; the images are {x.dtype}")
        # The weights have their data type already, and packed ones cannot be cast.
        with torch.autocast(x.device.type, enabled=False):
            return self._forward(to_nhwc(x))

    def _forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        maps = []
        for index, (down, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(down(x).contiguous())
            if self.features_only:
                maps.append(self.norms[index](to_nchw(x)))
        if self.features_only:
            return tuple(maps)
        out: Tensor = self.head(to_nchw(self.norm_map(x)).mean((2, 3)))
        return out

    def norm_map(self, x: Tensor) -> Tensor:
        """The last norm, where it could not be folded into the head."""
        return x if isinstance(self.norm, nn.Identity) else to_nhwc(self.norm(to_nchw(x)))


class FastBlock(nn.Module):
    """A block of any of the models without its spare operations, NHWC; see `optimize`.

    Args:
        block: The block.
        pack: See `FrozenLinear`.
        lead: ``[C]`` float64, what the map that leaves the block shall hold too much of, for later blocks to
            take away; None where biases stay with their products.

    Attributes:
        lead: The same of the map that comes in.
    """

    def __init__(self, block: Residual, *, pack: bool, lead: Tensor | None) -> None:
        super().__init__()
        self.pre_norm = block.pre_norm
        self.pos_embed = None
        if block.pos_embed is not None:
            assert isinstance(block.pos_embed, nn.Conv2d)
            self.pos_embed = FrozenConv(block.pos_embed, residual=True, pack=pack)
        self.attn = _fast_attention(block.attn, block.gamma1, pack=pack)
        layers = plain_mlp(block.mlp)
        assert layers is not None
        first, conv, last = layers
        self.widen = _linear(first, None, pack=pack)
        self.narrow = _linear(last, block.gamma2, pack=pack)
        self.between = None if conv is None else FrozenConv(conv, pack=pack)
        assert isinstance(block.norm1, nn.LayerNorm)
        assert isinstance(block.norm2, nn.LayerNorm)
        if lead is not None:
            lead = lead + self.narrow.accumulate()
        self.norm2 = FrozenNorm(block.norm2, lead)
        if lead is not None and isinstance(self.attn, _Merged):
            lead = lead + self.attn.proj.accumulate()
        self.norm1 = FrozenNorm(block.norm1, lead)
        if lead is not None and self.pos_embed is not None:
            self.pos_embed.raise_by(lead)
            lead = torch.zeros_like(lead)
        self.lead = lead
        self.at_once = AtOnce(_native_parts)
        self.at_once.belong_to(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.at_once.belong_to(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``; may write into its input."""
        if is_recorded():
            size = (layout.batch_to_choose_by(x.shape[0]), *layout.settled(x.shape[1:]))
            whole = not is_exported() and goes_at_once(self.at_once.name, size, str(x.dtype), x.device.type)
            return call_by_name(x, self.at_once.name) if whole else self.by_parts(x)
        call = self.at_once.call(self, self.attn, x)
        return self.by_parts(x) if call is None else call(x, self.at_once.seconds)

    def by_parts(self, x: Tensor) -> Tensor:
        """`forward`, one part after the other."""
        if self.pos_embed is not None:
            x = self.pos_embed(x)
        if not self.pre_norm:
            x, _ = self.norm1(self.attn(x, x))
            return self.norm2(self.narrow.add(self.hidden(x), x))[0]  # type: ignore[no-any-return]
        y, means = self.norm1(x, self.attn.pooled_region(x))
        x = self.attn(y, x, means)
        parts = (self.norm2, self.widen, self.narrow)
        called = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        if self.between is None and all(part.native for part in parts) and not (called or is_exported()):
            return add_mlp(x, self.norm2.vectors(), self.widen.panels(), self.narrow.panels())
        y, _ = self.norm2(x)
        return self.narrow.add(self.hidden(y), x)

    def hidden(self, y: Tensor) -> Tensor:
        """The activated hidden channels of the MLP."""
        if self.between is None:
            return self.widen.gelu(y)
        return self.between.gelu(self.widen(y))


def _native_parts(block: Any, x: Tensor) -> BlockParts | None:
    """A block as the C kernels take it at once; None where they have not all of its parts."""
    attn, position = block.attn, block.pos_embed
    if not isinstance(attn, _FastRouted | _FastFull) or not block.pre_norm or block.between is not None:
        return None
    frozen = [position, block.norm1, attn.qkv, attn.lepe, attn.proj, block.norm2, block.widen, block.narrow]
    if not attn.native or not all(part is None or part.native for part in frozen):
        return None
    if isinstance(attn, _FastFull):
        heads, width, scale, region, topk = attn.heads, x.shape[-1], attn.scale, None, 0
    else:
        region = attn.source.region_of(*layout.sides(x))
        numbers = attn._numbers(x, region)
        if attn.source.pooled_routing or not attn._tiles(x, region) or not _attends_natively(*numbers):
            return None
        heads, width, scale, topk = attn.source.num_heads, attn.qk_dim, attn.source.scale, attn.source.topk
    if attn.qkv.outputs != 3 * width or width != x.shape[-1]:
        return None
    return BlockParts(
        position=None if position is None else position.strips,
        adds_input=position is not None and position.adds_input,
        norm1=block.norm1.vectors(),
        project=attn.qkv.panels(),
        heads=heads,
        qk_dim=width,
        scale=scale,
        region=region,
        topk=topk,
        local=None if attn.lepe is None else attn.lepe.strips,
        enhances_input=isinstance(attn, _FastFull) and attn.enhances_input and attn.lepe is not None,
        merge=attn.proj.panels(),
        norm2=block.norm2.vectors(),
        widen=block.widen.panels(),
        narrow=block.narrow.panels(),
    )


class _Fast(nn.Module):
    """An attention of ``y`` that is added to ``residual``; ``means`` are those of the regions it asks for."""

    def pooled_region(self, x: Tensor) -> tuple[int, int] | None:
        """The region whose means the attention reads, of a map like this one; None for none."""
        return None


class _Merged(_Fast):
    """What every fast attention ends with: local enhancement, projection, residual."""

    def __init__(self, lepe: nn.Module | None, proj: nn.Module, gamma: Tensor | None, *, pack: bool) -> None:
        super().__init__()
        self.lepe = FrozenConv(lepe, pack=pack) if isinstance(lepe, nn.Conv2d) else None
        self.proj = _linear(proj, gamma, pack=pack)

    def merge(self, out: Tensor, local: Tensor, residual: Tensor) -> Tensor:
        """Add the enhancement of ``local`` to ``out``, project what fits the residual, add it."""
        if self.lepe is not None:
            out = self.lepe.add(local, out)
        return self.proj.add(layout.crop_tokens(out, *layout.sides(residual)), residual)


class _FastRouted(_Merged):
    def __init__(
        self,
        attn: RoutedLayer,
        gamma: Tensor | None,
        *,
        pack: bool,
    ) -> None:
        super().__init__(attn.lepe, attn.output_layer, gamma, pack=pack)
        self.qkv = _linear(attn.qkv_layer, None, pack=pack)
        self.source = _skeleton(attn)
        self.qk_dim = attn.qk_dim
        self.native = False
        self.packed = PackedAttention(
            heads=attn.num_heads, qk_dim=self.qk_dim, n_win=attn.n_win, topk=attn.topk, scale=attn.scale
        )

    def use_native(self) -> None:
        """Route and attend by the C kernels for CPUs, where the backend is ``auto`` and would choose them."""
        self.native = self.source.backend == "auto"

    def pooled_region(self, x: Tensor) -> tuple[int, int] | None:
        region = self.source.region_of(*layout.sides(x))
        return region if self.source.pooled_routing and self._tiles(x, region) else None

    def _tiles(self, x: Tensor, region: tuple[int, int]) -> bool:
        """Whether S regions per side are the map, without padding."""
        return (region[0] * self.source.n_win, region[1] * self.source.n_win) == layout.sides(x)

    def forward(self, y: Tensor, residual: Tensor, means: Tensor | None = None) -> Tensor:
        if isinstance(self.source, BiLevelRoutingAttention):
            y = self.source.pad(y)
        region = self.source.region_of(*layout.sides(y))
        routes = self._pooled_routes(y, region, means)
        native = self.native and not is_exported() and _attends_natively(*self._numbers(y, region))
        if self.source.backend == "auto" and self._tiles(y, region) and not (y.is_cuda or native):
            masked = prefers_mask(self._problem(y, region))
            return self.merge(*self.packed(y, self.qkv, masked=masked, routes=routes), residual)
        qkv = self.qkv(y)
        q, k, v = qkv.split((self.qk_dim, self.qk_dim, qkv.shape[-1] - 2 * self.qk_dim), dim=-1)
        if native:
            if routes is None:
                routes = native_block.route(q, k, region=region, topk=self.source.topk)
            out = native_block.attend(
                q, k, v, routes, heads=self.source.num_heads, region=region, scale=self.source.scale
            )
            return self.merge(out, v, residual)
        if routes is None:
            routes = route(q, k, region=region, topk=self.source.topk, backend=_router(q, k, region))
        out = routed_attention(
            q,
            k,
            v,
            routes,
            heads=self.source.num_heads,
            region=region,
            scale=self.source.scale,
            backend=self.source.backend,
            config=self.source.config,
        )
        return self.merge(out, v, residual)

    def _pooled_routes(self, y: Tensor, region: tuple[int, int], means: Tensor | None) -> Tensor | None:
        """Routes from the means of the input, where the layer is made so."""
        if not self.source.pooled_routing:
            return None
        rows = 2 * self.qk_dim
        bias = self.qkv.bias
        return route_pooled(
            y,
            self.qkv.matrix[:rows],
            None if bias is None else bias[:rows],
            region=region,
            topk=self.source.topk,
            means=means,
            backend=_router(y, y, region),
        )

    def _problem(self, y: Tensor, region: tuple[int, int]) -> Problem:
        return problem_of(*self._numbers(y, region))

    def _numbers(self, y: Tensor, region: tuple[int, int]) -> tuple[Any, ...]:
        """What `problem_of` takes."""
        source, batch = self.source, layout.batch_to_choose_by(y.shape[0])
        return batch, *layout.sides(y), source.num_heads, self.qk_dim, region, source.topk, str(y.dtype)


class _FastFull(_Merged):
    def __init__(self, attn: FullAttention, gamma: Tensor | None, *, pack: bool) -> None:
        super().__init__(attn.lepe, attn.proj, gamma, pack=pack)
        self.qkv = _linear(attn.qkv, None, pack=pack)
        self.heads, self.scale, self.backend = attn.num_heads, attn.scale, attn.backend
        self.native = False
        self.enhances_input = isinstance(attn, Attention)  # the NCHW module enhances the values

    def use_native(self) -> None:
        """Attend by the C kernels for CPUs, where the backend is ``auto`` and heads fit them."""
        self.native = self.backend == "auto" and native_block.can_attend(self.proj.inputs // self.heads)

    def forward(self, y: Tensor, residual: Tensor, means: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        if self.native and not is_exported():
            out = native_block.attend_fully(q, k, v, heads=self.heads, scale=self.scale)
            return self.merge(out, y if self.enhances_input else v, residual)
        out = full_attention(q, k, v, heads=self.heads, scale=self.scale, backend=self.backend)
        return self.merge(out, y if self.enhances_input else v, residual)


class _FastConvs(_Merged):
    def __init__(self, attn: ConvAttention, gamma: Tensor | None, *, pack: bool) -> None:
        super().__init__(None, attn[3], gamma, pack=pack)
        self.first = _linear(attn[1], None, pack=pack)
        assert isinstance(attn[2], nn.Conv2d)
        self.depthwise = FrozenConv(attn[2], pack=pack)

    def forward(self, y: Tensor, residual: Tensor, means: Tensor | None = None) -> Tensor:
        return self.merge(self.depthwise(self.first(y)), y, residual)


class _AsItIs(_Fast):
    """Soft routing and pooled keys, which no published model has: the layer itself."""

    def __init__(self, attn: nn.Module, gamma: Tensor | None) -> None:
        super().__init__()
        self.attn = _copied(attn)
        self.gamma: Tensor | None
        self.register_buffer("gamma", None if gamma is None else gamma.detach().clone())

    def forward(self, y: Tensor, residual: Tensor, means: Tensor | None = None) -> Tensor:
        out: Tensor = self.attn(y)
        return residual + (out if self.gamma is None else out * self.gamma)


@constant_in_graphs
def _attends_natively(*numbers: Any) -> bool:
    """Whether ``auto`` chooses the C kernels, by a plan or by preference."""
    return _chosen_natively(*numbers)


@functools.lru_cache(maxsize=256)
def _chosen_natively(*numbers: Any) -> bool:
    return tuned.choose(problem_of(*numbers), machines.detect("cpu"))[0].name == "native"


def _router(q: Tensor, k: Tensor, region: tuple[int, int]) -> str:
    """On CUDA, the kernels that route in two launches, where they can."""
    if not q.is_cuda or launch.not_here(str(q.device)):
        return "auto"
    from bratune.kernels.fused import route as route_fused

    return "auto" if route_fused.why_not(q, k, region=region, kv_region=region) else "triton"


def _fast_stage(stage: nn.Module, before: nn.Sequential, *, pack: bool) -> nn.Sequential:
    """The blocks of a stage; ``before`` makes the map that enters it."""
    if not is_plain(stage, nn.Sequential, StageSTL):
        return nn.Sequential(_AsBefore(stage))
    inside = stage.blocks if isinstance(stage, StageSTL) else stage
    assert isinstance(inside, nn.Sequential)
    if not is_plain(inside, nn.Sequential):
        return nn.Sequential(_AsBefore(inside))
    if not all(map(_is_known, inside)):
        return nn.Sequential(
            *(FastBlock(b, pack=pack, lead=None) if _is_known(b) else _AsBefore(b) for b in inside)  # type: ignore[arg-type]
        )
    blocks = [block for block in inside if isinstance(block, Residual)]
    writer, weight = before[-1], next(stage.parameters())
    can_lead = all(block.pre_norm for block in blocks) and (
        isinstance(writer, FrozenConv) or all(block.pos_embed is not None for block in blocks)
    )
    lead = weight.new_zeros(()).double() if can_lead and pack and accumulates(weight) else None
    fast: list[nn.Module] = []
    for block in reversed(blocks):
        fast.insert(0, done := FastBlock(block, pack=pack, lead=lead))
        lead = done.lead
    if lead is not None and isinstance(writer, FrozenConv):
        writer.raise_by(lead)
    return nn.Sequential(*fast)


def _is_known(block: nn.Module) -> bool:
    """Whether a block is one of ours, with nothing in the way of a call: what `FastBlock` takes apart."""
    if type(block) not in (Block, BlockSTL, NCHWBlockSTL) or not is_plain_throughout(block):
        return False
    assert isinstance(block, Residual)
    norms = (block.norm1, block.norm2)
    return (
        plain_mlp(block.mlp) is not None
        and all(is_plain(norm, nn.LayerNorm) for norm in norms)
        and (block.pos_embed is None or keeps_size(block.pos_embed))
        and is_plain(block.drop_path, DropPath, nn.Identity)
        and isinstance(block.attn, RoutedLayer | FullAttention | ConvAttention)
    )


def _check_model(model: nn.Module) -> None:
    own = ("forward", "forward_features", "forward_maps", "forward_stage")
    if not isinstance(model, Backbone):
        raise ProblemError(
            f"optimize takes the models of bratune.kernels.biformer, not {type(model).__name__}; "
            "bratune.accelerate takes any"
        )
    changed = [name for name in own if getattr(type(model), name) is not getattr(Backbone, name)]
    if changed or hooks_of(model):
        what = f"{changed[0]} of its own" if changed else hooks_of(model)[0]
        raise ProblemError(
            f"this {type(model).__name__} has {what}, which an optimized model would leave out; "
            "it can be optimized without"
        )


def _copied(module: Module) -> Module:
    """A copy to be called, for inference."""
    try:
        copied = copy.deepcopy(module)
    except RuntimeError as error:
        raise ProblemError(
            f"a {type(module).__name__} with weights that are computed in a hook cannot be copied; make them "
            f"permanent first, with remove_weight_norm, remove_spectral_norm or prune.remove ({error})"
        ) from None
    return copied.eval()


class _AsBefore(nn.Module):
    """A part of a model with something in it that must be called, on NHWC maps."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = _copied(part)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x).contiguous()  # type: ignore[no-any-return]


def _fast_attention(attn: nn.Module, gamma: Tensor | None, *, pack: bool) -> _Fast:
    if isinstance(attn, RoutedLayer):
        return _FastRouted(attn, gamma, pack=pack) if attn.reads_all() else _AsItIs(attn, gamma)
    if isinstance(attn, ConvAttention):
        return _FastConvs(attn, gamma, pack=pack)
    assert isinstance(attn, FullAttention)
    return _FastFull(attn, gamma, pack=pack)


def _skeleton(module: Module) -> Module:
    """The module as it is now, without its weights: what it was asked for, and its geometry."""
    bare = copy.copy(module)
    bare._parameters, bare._modules = {}, {}
    return bare


def _linear(layer: nn.Module, gamma: Tensor | None, *, pack: bool) -> FrozenLinear:
    """A linear layer or 1x1 convolution, scaled per output channel."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight, bias = layer.weight.detach(), layer.bias
    if gamma is not None:
        weight = weight * gamma.detach().view(-1, *(1,) * (weight.ndim - 1))
        bias = None if bias is None else bias * gamma
    return FrozenLinear(weight, bias, pack=pack)


def _folded(layer: nn.Module, *, pack: bool) -> nn.Sequential:
    """Stem or downsampling with its batch norms folded and its GELU part of the convolution, on NHWC maps."""
    if not (is_plain(layer, nn.Sequential) and is_plain_throughout(layer)):
        return nn.Sequential(_OnNCHW(layer))
    assert isinstance(layer, nn.Sequential)
    parts: list[nn.Module] = list(layer)
    done: list[nn.Module] = []
    while parts:
        part, *parts = parts
        if isinstance(part, nn.Conv2d) and parts and isinstance(parts[0], nn.BatchNorm2d):
            part, *parts = conv_then_norm(part, parts[0]), *parts[1:]
        elif isinstance(part, nn.BatchNorm2d) and parts and isinstance(parts[0], nn.Conv2d):
            part, *parts = norm_then_conv(part, parts[0]), *parts[1:]
        if isinstance(part, nn.Conv2d) and parts and isinstance(parts[0], nn.GELU):
            part, *parts = _ConvGelu(FrozenConv(part, pack=pack)), *parts[1:]
        elif isinstance(part, nn.Conv2d):
            part = FrozenConv(part, pack=pack)
        else:
            part = _OnNCHW(part)
        done.append(part)
    return nn.Sequential(*done)


class _ConvGelu(nn.Module):
    def __init__(self, conv: FrozenConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.gelu(x)


class _OnNCHW(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = _copied(module)

    def forward(self, x: Tensor) -> Tensor:
        return to_nhwc(self.module(to_nchw(x)))


class GraphRunner(nn.Module):
    """A model as one CUDA graph with static buffers: one launch per batch.

    Args:
        model: Without synchronisation and without shapes that depend on data, as all models here are.
        example: A batch of the shape and data type that all later batches have.

    Raises:
        TargetError: the example is not on a CUDA device.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        if not example.is_cuda:
            raise TargetError(f"a CUDA graph needs a CUDA device; the example is on {example.device}")
        self.model = model
        self.static_input = example.detach().clone()
        # Streams and graphs belong to the current device, which need not be the example's.
        with torch.cuda.device(example.device), torch.no_grad():
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, tunes and fills caches, none of which may happen in a capture
                    model(self.static_input)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_output = model(self.static_input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ProblemError(
            "a captured CUDA graph is bound to the memory of its process and cannot be copied or pickled; "
            "what was captured, its .model, can"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        refuse_another_form(self.static_input, fn)
        done: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return done

    def forward(self, x: Tensor) -> Any:
        """The model's output for a batch, in tensors that the next call overwrites."""
        held = self.static_input
        if x.shape != held.shape or x.dtype != held.dtype:
            raise ProblemError(
                f"this graph was captured for {list(held.shape)} in {held.dtype}, not {list(x.shape)} in "
                f"{x.dtype}; capture another"
            )
        self.static_input.copy_(x)
        self.graph.replay()
        return self.static_output
