"""What the models share: stages and downsampling in turn, then class scores or the four maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bratune.backend import Config
from bratune.errors import ProblemError
from bratune.kernels import layout
from bratune.kernels.blocks import Residual
from bratune.kernels.full_attention import FullAttention
from bratune.kernels.layer import RoutedLayer
from bratune.kernels.nhwc import LayerNorm2d, to_nchw, to_nhwc

__all__ = ["Backbone", "check_images", "drop_path_rates", "per_stage"]

# The modules that a backend stands behind.
ATTENTION = (RoutedLayer, FullAttention)


def per_stage(value: Any, count: int, name: str) -> tuple[Any, ...]:
    """One value for every stage, from one for all or one each.

    Raises:
        ProblemError: there are more or fewer values than stages.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (value,) * count
    if len(value) != count:
        raise ProblemError(f"{name} needs one value per stage ({count}), not {len(value)}")
    return tuple(value)


def drop_path_rates(rate: float, depth: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Rates of every block, growing evenly from 0 in the first block to ``rate`` in the last."""
    last = max(sum(depth) - 1, 1)
    flat = iter([rate * i / last for i in range(sum(depth))])
    return tuple(tuple(next(flat) for _ in range(blocks)) for blocks in depth)


class Backbone(nn.Module):
    """A four-stage network: images in, class scores out, or the map of every stage.

    Subclasses call `_finish` last, with ``downsample_layers`` and ``stages`` made.

    Attributes:
        features_only: The model returns the normalised map of every stage.
        num_classes: Classes; 0 where the pooled features are returned.
        num_features: Channels of the last stage.
        use_checkpoint_stages: Stages (0 is the first) that recompute their activations in backward.
    """

    downsample_layers: nn.ModuleList
    stages: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    extra_norms: nn.ModuleList
    use_checkpoint_stages: tuple[int, ...]

    def _finish(
        self, embed_dim: Sequence[int], num_classes: int, norm: nn.Module, *, features_only: bool
    ) -> None:
        """Add what comes after the last stage, and draw the first weights."""
        self.features_only = features_only
        self.num_features = embed_dim[-1]
        self.num_classes = 0 if features_only else num_classes
        if features_only:
            self.extra_norms = nn.ModuleList(LayerNorm2d(dim) for dim in embed_dim)
        else:
            self.norm = norm
            self.head = nn.Identity()
            if num_classes > 0:
                self.head = nn.Linear(embed_dim[-1], num_classes)
        self.apply(_init_weights)

    def set_backend(
        self, backend: str | Sequence[str], config: Config | Sequence[Config | None] | None = None
    ) -> None:
        """Let another backend attend from now on; the weights stay.

        Args:
            backend: One name, or one per stage.
            config: Settings of the backend, one or one per stage.
        """
        names = per_stage(backend, len(self.stages), "backend")
        configs = per_stage(config, len(self.stages), "config")
        for stage, name, settings in zip(self.stages, names, configs, strict=True):
            for module in stage.modules():
                if isinstance(module, ATTENTION):
                    module.set_backend(name, settings)

    def set_lean(self, lean: bool = True) -> None:
        """Keep less for the backward pass from now on, with equal gradients; the weights stay.

        The outputs of norms and GELU are computed again in the backward pass, about a quarter to a third
        of what a block keeps for two more passes over its map, and residuals are added in place; see
        `bratune.kernels.lean`. In float32 on a CPU with AVX-512, whole blocks are computed by C kernels, in
        less time; see `bratune.kernels.native.training`. Blocks with options that no published model has stay
        partly or wholly as they are. `use_checkpoint_stages` saves more, for a second forward pass.
        """
        for module in self.modules():
            if isinstance(module, Residual):
                module.lean = lean

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for another number of classes; 0 returns the pooled features."""
        if self.features_only:
            raise ProblemError("a features_only model has no head; build it without features_only")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(_init_weights)

    def check_size(self, height: int, width: int) -> None:
        """Raise a `ProblemError` that names the stage which an image of this size does not fit."""
        raise NotImplementedError

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        """One downsampling and one stage: NCHW by shape, channels-last in memory."""
        x = self.downsample_layers[index](x)
        tokens = to_nhwc(x.contiguous(memory_format=torch.channels_last))
        stage = self.stages[index]
        if index in self.use_checkpoint_stages and torch.is_grad_enabled():
            tokens = checkpoint(stage, tokens, use_reentrant=False)
        else:
            tokens = stage(tokens)
        return to_nchw(tokens)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map of the last stage, ``[B, C, H, W]``."""
        x = self._prepared(x)
        for index in range(len(self.stages)):
            x = self.forward_stage(index, x)
        out: Tensor = self.norm(x)
        return out

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The normalised map of every stage, ``[B, C, H, W]`` each; for ``features_only`` models."""
        x = self._prepared(x)
        maps = []
        for index, norm in enumerate(self.extra_norms):
            x = self.forward_stage(index, x)
            maps.append(norm(x))
        return tuple(maps)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images ``[B, channels, H, W]`` to class scores ``[B, num_classes]``, or to the four maps."""
        if self.features_only:
            return self.forward_maps(x)
        out: Tensor = self.head(self.forward_features(x).mean((2, 3)))
        return out

    def _prepared(self, x: Tensor) -> Tensor:
        check_images(x)
        self.check_size(*layout.settled(x.shape[2:]))
        return x.contiguous(memory_format=torch.channels_last)


def check_images(x: Tensor) -> None:
    """Raise a `ProblemError` where a tensor is no batch of images."""
    if x.ndim != 4:
        hint = "; x[None] is a batch of one" if x.ndim == 3 else ""
        raise ProblemError(f"images must be [B, channels, H, W], not {list(x.shape)}{hint}")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
