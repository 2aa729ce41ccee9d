"""One macro layout for every mixer: that of Swin-T, whose blocks differ in their attention only."""

from __future__ import annotations

import itertools

from torch import nn

from bratune.kernels.backbone import Backbone, drop_path_rates
from bratune.kernels.blocks import DropPath, Residual
from bratune.kernels.mixers.mixer import MixerKind, Place
from bratune.kernels.nhwc import LayerNorm2d
from bratune.kernels.stl import StageSTL
from bratune.variant import Variant, get_variant

__all__ = ["LAYOUT", "MixerBlock", "MixerNetwork", "places"]

# The layout of Swin-T: 2-2-6-2 blocks, 96 channels, MLP ratio 4.
LAYOUT = get_variant("biformer_stl")


def places(
    height: int,
    width: int,
    *,
    layout: Variant = LAYOUT,
    n_win: int = 7,
    batch: int = 1,
    item_bytes: int = 4,
) -> tuple[Place, ...]:
    """Where mixers stand in the network, block by block, for images of ``height x width`` pixels.

    Raises:
        ProblemError: the image is too small.
    """
    found = []
    for stage, (rows, columns) in enumerate(layout.maps(height, width), start=1):
        dim = layout.dims[stage - 1]
        for block in range(layout.depths[stage - 1]):
            found.append(
                Place(
                    height=rows,
                    width=columns,
                    dim=dim,
                    heads=dim // layout.head_dim,
                    stage=stage,
                    block=block,
                    n_win=n_win,
                    batch=batch,
                    item_bytes=item_bytes,
                )
            )
    return tuple(found)


class MixerBlock(Residual):
    """Mixer and MLP, each with a residual and a norm before it.

    Args:
        kind: Which mixer.
        place: Where the block stands.
        mlp_ratio: Hidden channels of the MLP over channels.
        drop_path: Probability of dropping a branch while training.
    """

    def __init__(self, kind: MixerKind, place: Place, *, mlp_ratio: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = place.dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = kind.make(place)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()


class MixerNetwork(Backbone):
    """The layout in which the BiFormer paper compares attentions: 2-2-6-2 blocks, 96 channels, MLP ratio 4.

    Patches of 4x4 pixels do not overlap, nor do those of 2x2 tokens between stages; blocks have no position
    embedding. Only the attention differs from one network to the next.

    Args:
        kind: Which mixer.
        height: Rows of the images, in pixels; some mixers have parameters for every place of the map.
        width: Columns of the images.
        layout: Blocks, channels and heads of the stages.
        num_classes: Classes; 0 returns pooled features.
        n_win: Regions per side of bi-level routing.
        drop_path_rate: Probability of dropping a branch of the last block while training.
        features_only: Return the normalised map of every stage in the place of class scores.

    Raises:
        ProblemError: the mixer cannot stand at some stage; the message says why.

    Source: Zhu et al., BiFormer, CVPR 2023, arXiv 2303.08810, its comparison of attentions; the layout is
    that of Swin-T.
    """

    def __init__(
        self,
        kind: MixerKind,
        height: int = 224,
        width: int = 224,
        *,
        layout: Variant = LAYOUT,
        num_classes: int = 1000,
        n_win: int = 7,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        dims = layout.dims
        self.use_checkpoint_stages = ()
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0]))]
        )
        self.downsample_layers.extend(
            nn.Sequential(LayerNorm2d(a), nn.Conv2d(a, b, kernel_size=2, stride=2))
            for a, b in itertools.pairwise(dims)
        )
        rates = itertools.chain.from_iterable(drop_path_rates(drop_path_rate, layout.depths))
        blocks = [
            MixerBlock(kind, place, mlp_ratio=layout.mlp_ratio, drop_path=rate)
            for place, rate in zip(places(height, width, layout=layout, n_win=n_win), rates, strict=True)
        ]
        of_stage = iter(blocks)
        self.stages = nn.ModuleList(StageSTL(list(itertools.islice(of_stage, n))) for n in layout.depths)
        self._finish(dims, num_classes, LayerNorm2d(dims[-1]), features_only=features_only)

    def check_size(self, height: int, width: int) -> None:
        """Raise a `ProblemError` where the image leaves a stage without a map."""
        LAYOUT.maps(height, width)
