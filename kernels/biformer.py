"""BiFormer: the official models, with any backend behind their attention.

Parameters, keys and numerics are the official ones. The factories take every constructor argument as a
keyword, so that a tuned S or top-k needs no code of its own.

    >>> model = biformer_small(n_win=8, topks=(1, 4, 16, -2), backend="gather")
    >>> model.set_backend(["auto", "auto", "dense", "auto"])
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bratune.backend import Config
from bratune.errors import ProblemError, UnknownNameError
from bratune.kernels.backbone import Backbone, drop_path_rates, per_stage
from bratune.kernels.blocks import Block
from bratune.kernels.checkpoint import classes_of, load_weights
from bratune.kernels.stl import BiFormerSTL, NCHWBiFormerSTL
from bratune.problem import ceil_div, split_map
from bratune.variant import Variant, get_variant

__all__ = [
    "BiFormer",
    "BiFormerSTL",
    "NCHWBiFormerSTL",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_stl_nchw",
    "biformer_tiny",
    "build",
]


class BiFormer(Backbone):
    """BiFormer with a convolutional stem and a position embedding per block.

    Args:
        depth: Blocks per stage.
        in_chans: Channels of the images.
        num_classes: Classes; 0 returns pooled features.
        embed_dim: Channels per stage.
        head_dim: Channels of q and k per head of routed attention.
        qk_scale: See `BiLevelRoutingAttention`.
        representation_size: None, the only value that the official code can build.
        drop_path_rate: Probability of dropping a branch of the last block while training.
        drop_rate: Accepted and unused, as in the official model.
        use_checkpoint_stages: Stages (0 is the first) that recompute their activations in backward.
        n_win: Regions per side, S: one for all stages (as officially) or one per stage.
        kv_downsample_mode: See `BiLevelRoutingAttention`.
        kv_per_wins: ``kv_per_win`` per stage.
        topks: Per stage; see `Block`.
        side_dwconv: Side of the depthwise convolution in attention.
        layer_scale_init_value: See `Block`.
        qk_dims: Channels of queries and keys per stage; None is that of the stage.
        param_routing: See `BiLevelRoutingAttention`.
        diff_routing: See `BiLevelRoutingAttention`.
        soft_routing: See `BiLevelRoutingAttention`.
        pre_norm: See `Block`.
        pe: None: the official code names position encodings and implements none.
        pe_stages: Unused.
        before_attn_dwconv: See `Block`.
        auto_pad: Pad maps that S does not divide, so that images of any size work.
        kv_downsample_kernels: Unused, as in the official model.
        kv_downsample_ratios: ``kv_downsample_ratio`` per stage.
        mlp_ratios: Hidden channels of the MLP over channels, per stage.
        param_attention: See `BiLevelRoutingAttention`.
        mlp_dwconv: See `Block`.
        backend: Which implementation attends: one name, or one per stage.
        config: Settings of the backend: one, or one per stage.
        features_only: Return the normalised map of every stage (strides 4, 8, 16, 32) in the place of class
            scores: the backbone of the official detection and segmentation models.

    Raises:
        ProblemError: sizes or options that contradict each other; the message names the stage.
        UnknownNameError: an option, or a backend, that does not exist.
    """

    def __init__(
        self,
        depth: Sequence[int] = (3, 4, 8, 3),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 64,
        qk_scale: float | None = None,
        representation_size: None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        use_checkpoint_stages: Sequence[int] = (),
        n_win: int | Sequence[int] = 7,
        kv_downsample_mode: str = "ada_avgpool",
        kv_per_wins: Sequence[int] = (2, 2, -1, -1),
        topks: Sequence[int] = (8, 8, -1, -1),
        side_dwconv: int = 5,
        layer_scale_init_value: float = -1,
        qk_dims: Sequence[int | None] = (None, None, None, None),
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        pre_norm: bool = True,
        pe: None = None,
        pe_stages: Sequence[int] = (0,),
        before_attn_dwconv: int = 3,
        auto_pad: bool = False,
        kv_downsample_kernels: Sequence[int] = (4, 2, 1, 1),
        kv_downsample_ratios: Sequence[int] = (4, 2, 1, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        param_attention: str = "qkvo",
        mlp_dwconv: bool = False,
        *,
        backend: str | Sequence[str] = "auto",
        config: Config | Sequence[Config | None] | None = None,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("representation_size", representation_size), ("pe", pe)):
            if value is not None:
                raise ProblemError(
                    f"{name}={value!r} is named by the official code and works nowhere; None does"
                )
        count = len(depth)
        self.n_wins = per_stage(n_win, count, "n_win")
        self.topks = per_stage(topks, count, "topks")
        self.auto_pad = auto_pad
        self.use_checkpoint_stages = tuple(use_checkpoint_stages)
        dims = per_stage(embed_dim, count, "embed_dim")
        qks = tuple(qk or dim for qk, dim in zip(per_stage(qk_dims, count, "qk_dims"), dims, strict=True))
        kv_wins = per_stage(kv_per_wins, count, "kv_per_wins")
        ratios = per_stage(kv_downsample_ratios, count, "kv_downsample_ratios")
        mlps = per_stage(mlp_ratios, count, "mlp_ratios")
        backends = per_stage(backend, count, "backend")
        configs = per_stage(config, count, "config")
        rates = drop_path_rates(drop_path_rate, depth)

        self.downsample_layers = nn.ModuleList([_stem(in_chans, dims[0])])
        self.downsample_layers.extend(_downsampling(a, b) for a, b in itertools.pairwise(dims))
        self.stages = nn.ModuleList()
        for i in range(count):
            try:
                blocks = [
                    Block(
                        dim=dims[i],
                        drop_path=rates[i][j],
                        layer_scale_init_value=layer_scale_init_value,
                        num_heads=qks[i] // head_dim,
                        n_win=self.n_wins[i],
                        qk_dim=qks[i],
                        qk_scale=qk_scale,
                        kv_per_win=kv_wins[i],
                        kv_downsample_ratio=ratios[i],
                        kv_downsample_mode=kv_downsample_mode,
                        topk=self.topks[i],
                        param_attention=param_attention,
                        param_routing=param_routing,
                        diff_routing=diff_routing,
                        soft_routing=soft_routing,
                        mlp_ratio=mlps[i],
                        mlp_dwconv=mlp_dwconv,
                        side_dwconv=side_dwconv,
                        before_attn_dwconv=before_attn_dwconv,
                        pre_norm=pre_norm,
                        auto_pad=auto_pad,
                        backend=backends[i],
                        config=configs[i],
                    )
                    for j in range(depth[i])
                ]
            except ProblemError as error:
                raise ProblemError(f"stage {i + 1}: {error}") from None
            self.stages.append(nn.Sequential(*blocks))
        self._finish(dims, num_classes, nn.BatchNorm2d(dims[-1]), features_only=features_only)

    def check_size(self, height: int, width: int) -> None:
        """Raise a `ProblemError` that names the stage which an image of this size does not fit."""
        if self.auto_pad:
            return
        for i, (n_win, topk) in enumerate(zip(self.n_wins, self.topks, strict=True)):
            height, width = (ceil_div(side, 4 if i == 0 else 2) for side in (height, width))
            if topk > 0 and (height % n_win or width % n_win):
                try:
                    split_map(height, width, n_win)
                except ProblemError as error:
                    raise ProblemError(f"stage {i + 1}: {error}, or auto_pad=True") from None


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(in_chans, half, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, dim, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(dim),
    )


def _downsampling(dim: int, next_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, next_dim, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(next_dim)
    )


# --- the published models ----------------------------------------------------------------------------

_CLASSES: dict[str, type[Backbone]] = {
    "biformer": BiFormer,
    "stl": BiFormerSTL,
    "stl_nchw": NCHWBiFormerSTL,
}


def build(
    name: str,
    *,
    pretrained: str | Path | None = None,
    trust_checkpoint: bool = False,
    **overrides: Any,
) -> Backbone:
    """A published model by name.

    Args:
        name: One of `bratune.variant.VARIANTS`.
        pretrained: A weights file; see `bratune.kernels.checkpoint.load_weights`.
        trust_checkpoint: Let the file run code of its own while it is read.
        overrides: Arguments of the model's constructor that shall differ from the published ones. For
            every model, ``n_win`` is S, one or one per stage. Without ``num_classes`` there are as many as
            the weights file has.

    Raises:
        UnknownNameError: no model, or no argument, has this name.
        CheckpointError: the weights file does not fit.
    """
    variant = get_variant(name)
    kind = _CLASSES[variant.layout]
    arguments = _published(variant)
    if variant.layout != "biformer" and "n_win" in overrides:
        overrides["n_wins"] = overrides.pop("n_win")
    known = [p for p in inspect.signature(kind).parameters if p != "self"]
    for key in overrides:
        if key not in known:
            raise UnknownNameError(f"argument of {name}", key, known)
    if pretrained is not None and "num_classes" not in overrides:
        classes = classes_of(pretrained, trust=trust_checkpoint)
        overrides |= {} if classes is None else {"num_classes": classes}
    model = kind(**{**arguments, **overrides})
    if pretrained is not None:
        load_weights(model, pretrained, trust=trust_checkpoint)
    return model


def _published(variant: Variant) -> dict[str, Any]:
    """Constructor arguments of a published model."""
    common = {
        "depth": variant.depths,
        "embed_dim": variant.dims,
        "head_dim": variant.head_dim,
        "mlp_ratios": (variant.mlp_ratio,) * len(variant.dims),
        "topks": variant.topks,
        "side_dwconv": variant.side_dwconv,
    }
    if variant.layout == "biformer":
        return {**common, "n_win": 7, "kv_downsample_mode": "identity", "qk_dims": variant.dims}
    return {**common, "n_wins": (7,) * len(variant.dims), "norm_layer": nn.BatchNorm2d}


def biformer_tiny(pretrained: str | Path | None = None, **overrides: Any) -> Backbone:
    """BiFormer-T: 13.1 M parameters, 2.2 GMACs at 224x224; see `build`."""
    return build("biformer_tiny", pretrained=pretrained, **overrides)


def biformer_small(pretrained: str | Path | None = None, **overrides: Any) -> Backbone:
    """BiFormer-S: 25.5 M parameters, 4.5 GMACs at 224x224; see `build`."""
    return build("biformer_small", pretrained=pretrained, **overrides)


def biformer_base(pretrained: str | Path | None = None, **overrides: Any) -> Backbone:
    """BiFormer-B: 56.8 M parameters, 9.8 GMACs at 224x224; see `build`."""
    return build("biformer_base", pretrained=pretrained, **overrides)


def biformer_stl(pretrained: str | Path | None = None, **overrides: Any) -> Backbone:
    """BiFormer-STL, the layout of Swin-T: 28.4 M parameters, 4.6 GMACs at 224x224; see `build`."""
    return build("biformer_stl", pretrained=pretrained, **overrides)


def biformer_stl_nchw(pretrained: str | Path | None = None, **overrides: Any) -> Backbone:
    """BiFormer-STL with the NCHW attention of the official refactoring; see `build`."""
    return build("biformer_stl_nchw", pretrained=pretrained, **overrides)
