"""BiFormer-STL: routed attention in the layout of Swin-T, NHWC and NCHW."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from bratune.backend import Config
from bratune.errors import ProblemError
from bratune.kernels.backbone import Backbone, drop_path_rates, per_stage
from bratune.kernels.blocks import BlockSTL, NCHWBlockSTL, Residual
from bratune.kernels.nhwc import LayerNorm2d
from bratune.problem import split_map

__all__ = ["BiFormerSTL", "NCHWBiFormerSTL", "StageSTL"]


class StageSTL(nn.Module):
    """The blocks of a stage, NHWC; a module of its own for the official key names."""

    def __init__(self, blocks: Sequence[Residual]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        out: Tensor = self.blocks(x)
        return out


class _BackboneSTL(Backbone):
    """What both layouts share; they differ in how a block is made and in which maps fit."""

    n_wins: tuple[int, ...]
    topks: tuple[int, ...]

    def __init__(
        self,
        block: Callable[..., Residual],
        *,
        depth: Sequence[int],
        in_chans: int,
        num_classes: int,
        embed_dim: Sequence[int],
        head_dim: int,
        drop_path_rate: float,
        use_checkpoint_stages: Sequence[int],
        norm_layer: Callable[[int], nn.Module],
        n_wins: int | Sequence[int],
        topks: int | Sequence[int],
        side_dwconv: int,
        mlp_ratios: Sequence[float],
        backend: str | Sequence[str],
        config: Config | Sequence[Config | None] | None,
        features_only: bool,
    ) -> None:
        super().__init__()
        count, dims = len(depth), tuple(embed_dim)
        self.n_wins = per_stage(n_wins, count, "n_wins")
        self.topks = per_stage(topks, count, "topks")
        mlps = per_stage(mlp_ratios, count, "mlp_ratios")
        backends = per_stage(backend, count, "backend")
        configs = per_stage(config, count, "config")
        self.use_checkpoint_stages = tuple(use_checkpoint_stages)
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), norm_layer(dims[0]))]
        )
        self.downsample_layers.extend(
            nn.Sequential(norm_layer(a), nn.Conv2d(a, b, kernel_size=2, stride=2))
            for a, b in itertools.pairwise(dims)
        )
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depth)):
            try:
                blocks = [
                    block(
                        dim=dims[i],
                        drop_path=rate,
                        num_heads=dims[i] // head_dim,
                        n_win=self.n_wins[i],
                        topk=self.topks[i],
                        mlp_ratio=mlps[i],
                        side_dwconv=side_dwconv,
                        backend=backends[i],
                        config=configs[i],
                    )
                    for rate in rates
                ]
            except ProblemError as error:
                raise ProblemError(f"stage {i + 1}: {error}") from None
            self.stages.append(StageSTL(blocks))
        self._finish(dims, num_classes, norm_layer(dims[-1]), features_only=features_only)

    def check_map(self, index: int, height: int, width: int) -> None:
        """Raise a `ProblemError` where the map does not fit routed attention of this stage."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise a `ProblemError` that names the stage which an image of this size does not fit."""
        for i in range(len(self.topks)):
            patch = 4 if i == 0 else 2
            height, width = height // patch, width // patch
            if not height or not width:
                raise ProblemError(f"stage {i + 1}: the image is too small, nothing is left of its map")
            try:
                self.check_map(i, height, width)
            except ProblemError as error:
                raise ProblemError(f"stage {i + 1}: {error}") from None


class BiFormerSTL(_BackboneSTL):
    """BiFormer-STL: NHWC routed attention in the layout of Swin-T.

    Args:
        depth: Blocks per stage.
        in_chans: Channels of the images.
        num_classes: Classes; 0 returns pooled features.
        embed_dim: Channels per stage.
        head_dim: Channels per head of routed attention.
        qk_scale: Accepted and unused, as in the official model.
        representation_size: None, the only value that the official code can build.
        drop_path_rate: Probability of dropping a branch of the last block while training.
        drop_rate: Accepted and unused, as in the official model.
        use_checkpoint_stages: Stages (0 is the first) that recompute their activations in backward.
        norm_layer: Norm of stem, downsampling and head; the published models have ``nn.BatchNorm2d``.
        n_wins: Regions per side, S: one per stage, or one for all.
        topks: Per stage; see `bratune.kernels.blocks.Block`.
        side_dwconv: Side of the depthwise convolution in attention.
        mlp_ratios: Hidden channels of the MLP over channels, per stage.
        auto_pad: Pad maps that S does not divide; the official class has no such option and needs maps
            that divide.
        backend: Which implementation attends: one name, or one per stage.
        config: Settings of the backend: one, or one per stage.
        features_only: Return the normalised map of every stage in the place of class scores.

    Raises:
        ProblemError: sizes or options that contradict each other; the message names the stage.
        UnknownNameError: a backend that does not exist.
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
        norm_layer: Callable[[int], nn.Module] = LayerNorm2d,
        n_wins: int | Sequence[int] = (7, 7, 7, 7),
        topks: int | Sequence[int] = (8, 8, -1, -1),
        side_dwconv: int = 5,
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        auto_pad: bool = False,
        *,
        backend: str | Sequence[str] = "auto",
        config: Config | Sequence[Config | None] | None = None,
        features_only: bool = False,
    ) -> None:
        super().__init__(
            functools.partial(BlockSTL, auto_pad=auto_pad),
            depth=depth,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            head_dim=head_dim,
            drop_path_rate=drop_path_rate,
            use_checkpoint_stages=use_checkpoint_stages,
            norm_layer=norm_layer,
            n_wins=n_wins,
            topks=topks,
            side_dwconv=side_dwconv,
            mlp_ratios=mlp_ratios,
            backend=backend,
            config=config,
            features_only=features_only,
        )
        self.auto_pad = auto_pad

    def check_map(self, index: int, height: int, width: int) -> None:
        """Raise a `ProblemError` where S does not divide the map."""
        n_win = self.n_wins[index]
        if self.topks[index] > 0 and not self.auto_pad and (height % n_win or width % n_win):
            try:
                split_map(height, width, n_win)
            except ProblemError as error:
                raise ProblemError(f"{error}, or auto_pad=True") from None


class NCHWBiFormerSTL(_BackboneSTL):
    """BiFormer-STL with NCHW routed attention (the official ``nchwBiFormerSTL``): any map of S and more fits.

    Args:
        depth: Blocks per stage.
        in_chans: Channels of the images.
        num_classes: Classes; 0 returns pooled features.
        embed_dim: Channels per stage.
        head_dim: Channels per head of routed attention.
        qk_scale: Accepted and unused, as in the official model.
        representation_size: None, the only value that the official code can build.
        drop_path_rate: Probability of dropping a branch of the last block while training.
        drop_rate: Accepted and unused, as in the official model.
        use_checkpoint_stages: Stages (0 is the first) that recompute their activations in backward.
        norm_layer: Norm of stem, downsampling and head; the published models have ``nn.BatchNorm2d``.
        n_wins: Regions per side, S: one per stage, or one for all.
        topks: Per stage: routed attention, or -1 for full attention.
        side_dwconv: Side of the depthwise convolution in attention.
        mlp_ratios: Hidden channels of the MLP over channels, per stage.
        backend: Which implementation attends: one name, or one per stage.
        config: Settings of the backend: one, or one per stage.
        features_only: Return the normalised map of every stage in the place of class scores.

    Raises:
        ProblemError: sizes or options that contradict each other; the message names the stage.
        UnknownNameError: a backend that does not exist.
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
        norm_layer: Callable[[int], nn.Module] = LayerNorm2d,
        n_wins: int | Sequence[int] = (7, 7, 7, 7),
        topks: int | Sequence[int] = (8, 8, -1, -1),
        side_dwconv: int = 5,
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        *,
        backend: str | Sequence[str] = "auto",
        config: Config | Sequence[Config | None] | None = None,
        features_only: bool = False,
    ) -> None:
        super().__init__(
            NCHWBlockSTL,
            depth=depth,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            head_dim=head_dim,
            drop_path_rate=drop_path_rate,
            use_checkpoint_stages=use_checkpoint_stages,
            norm_layer=norm_layer,
            n_wins=n_wins,
            topks=topks,
            side_dwconv=side_dwconv,
            mlp_ratios=mlp_ratios,
            backend=backend,
            config=config,
            features_only=features_only,
        )

    def check_map(self, index: int, height: int, width: int) -> None:
        """Raise a `ProblemError` where the map is smaller than S."""
        n_win = self.n_wins[index]
        if self.topks[index] > 0 and n_win > min(height, width):
            raise ProblemError(
                f"{n_win} regions per side do not fit a {height}x{width} map; "
                f"1 to {min(height, width)} would work"
            )
