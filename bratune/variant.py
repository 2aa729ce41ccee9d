"""Variants and tasks: the published BiFormer models in numbers, and what they are run for.

`stages` turns a variant, a resolution, S and the top-k of each stage into one `Stage` per stage, each
with the `Problem` that its attention poses. Source: the official models (BiFormer, CVPR 2023).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bratune.errors import ProblemError, UnknownNameError, UsageError
from bratune.problem import Problem, ceil_div, split_map

__all__ = [
    "FULL_ATTENTION_HEADS",
    "TASKS",
    "VARIANTS",
    "Stage",
    "Task",
    "Variant",
    "get_task",
    "get_variant",
    "parse_resolution",
    "stages",
]

# The official full-attention modules are built without a head count and so always have eight.
FULL_ATTENTION_HEADS = 8


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A published model: its stages, from the first to the last.

    Attributes:
        layout: ``biformer`` (conv stem, position embedding per block, NHWC attention with S x S regions
            on a padded map), ``stl`` (Swin-T layout, same attention) or ``stl_nchw`` (Swin-T layout,
            NCHW attention whose regions round down, so that there may be more than S x S of them).
        topks: ``> 0`` routed attention, ``-2`` or ``-1`` full attention, ``0`` convolution only.
        parameters: Published count, with 1000 classes.
        gmacs_224: Counted multiply-adds of one 224x224 image, in 10^9.
    """

    name: str
    layout: str
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    head_dim: int = 32
    mlp_ratio: int
    topks: tuple[int, ...]
    side_dwconv: int = 5
    parameters: int
    gmacs_224: float

    def maps(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Token map of each stage for an image of ``height x width`` pixels."""
        sizes: list[tuple[int, int]] = []
        for _ in self.dims:
            for _ in range(1 if sizes else 2):
                if self.layout == "biformer":  # 3x3 convolutions of stride 2 with padding 1
                    height, width = ceil_div(height, 2), ceil_div(width, 2)
                else:  # 4x4 and 2x2 patches without padding: odd rows are dropped
                    height, width = height // 2, width // 2
            if height < 1 or width < 1:
                raise ProblemError(f"the image is too small for stage {len(sizes) + 1} of {self.name}")
            sizes.append((height, width))
        return tuple(sizes)


VARIANTS = {
    v.name: v
    for v in (
        Variant(
            name="biformer_tiny",
            layout="biformer",
            depths=(2, 2, 8, 2),
            dims=(64, 128, 256, 512),
            mlp_ratio=3,
            topks=(1, 4, 16, -2),
            parameters=13_142_760,
            gmacs_224=2.216,
        ),
        Variant(
            name="biformer_small",
            layout="biformer",
            depths=(4, 4, 18, 4),
            dims=(64, 128, 256, 512),
            mlp_ratio=3,
            topks=(1, 4, 16, -2),
            parameters=25_536_232,
            gmacs_224=4.464,
        ),
        Variant(
            name="biformer_base",
            layout="biformer",
            depths=(4, 4, 18, 4),
            dims=(96, 192, 384, 768),
            mlp_ratio=3,
            topks=(1, 4, 16, -2),
            parameters=56_804_968,
            gmacs_224=9.759,
        ),
        Variant(
            name="biformer_stl",
            layout="stl",
            depths=(2, 2, 6, 2),
            dims=(96, 192, 384, 768),
            mlp_ratio=4,
            topks=(1, 4, 16, -2),
            parameters=28_372_552,
            gmacs_224=4.574,
        ),
        Variant(
            name="biformer_stl_nchw",
            layout="stl_nchw",
            depths=(2, 2, 6, 2),
            dims=(96, 192, 384, 768),
            mlp_ratio=4,
            topks=(1, 4, 16, -1),
            parameters=28_372_552,
            gmacs_224=4.574,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is run for, with the official settings.

    Attributes:
        n_win: Regions per side, S.
        pad_to: The image is padded at the bottom and on the right to a multiple of this.
        features_only: The model returns the maps of its stages instead of class scores.
    """

    name: str
    height: int
    width: int
    n_win: int
    pad_to: int = 1
    features_only: bool = False

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Size of the image that the model sees, ``(height, width)`` in pixels."""
        return ceil_div(height, self.pad_to) * self.pad_to, ceil_div(width, self.pad_to) * self.pad_to


TASKS = {
    t.name: t
    for t in (
        Task(name="classification", height=224, width=224, n_win=7),
        Task(name="segmentation", height=512, width=512, n_win=8, features_only=True),
        Task(name="detection", height=800, width=1333, n_win=16, pad_to=32, features_only=True),
        Task(name="yolo", height=640, width=640, n_win=8, pad_to=32, features_only=True),
    )
}


def get_variant(name: str) -> Variant:
    """The variant of that name; raises `UnknownNameError`."""
    if name not in VARIANTS:
        raise UnknownNameError("model", name, VARIANTS)
    return VARIANTS[name]


def get_task(name: str) -> Task:
    """The task of that name; raises `UnknownNameError`."""
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    return TASKS[name]


def parse_resolution(text: str) -> tuple[int, int]:
    """``"512"`` or ``"800x1333"`` as ``(height, width)`` in pixels.

    Raises:
        UsageError: the text is neither, or a side is below 32 pixels (stage 4 would be empty).
    """
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not match:
        raise UsageError(f"resolution {text!r} is not a size; 512 or 800x1333 (height x width) would be")
    height = int(match[1])
    width = int(match[2]) if match[2] else height
    if min(height, width) < 32:
        raise UsageError(
            f"resolution {text!r} is too small: the last stage sees 1/32 of each side, "
            "so both sides must be at least 32 pixels"
        )
    return height, width


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a model at a resolution.

    Attributes:
        index: 1 for the first stage.
        blocks: How many blocks it has.
        dim: Channels.
        height: Tokens of the map from top to bottom, as the block sees it (not padded).
        width: Tokens of the map from left to right.
        kind: ``routed``, ``full`` (every query attends to every key) or ``conv`` (no attention).
        n_win: Regions per side; 0 where there are none.
        topk: As the official constructor takes it.
        problem: The attention call; None for ``conv``. Full attention is one region.
    """

    index: int
    blocks: int
    dim: int
    height: int
    width: int
    kind: str
    n_win: int
    topk: int
    problem: Problem | None

    @property
    def padded_tokens(self) -> int:
        """Tokens that the attention sees, padding included."""
        if self.problem is None:
            return self.height * self.width
        rows, cols = self.problem.padded
        return rows * cols

    @property
    def padding_waste(self) -> float:
        """Padded tokens over tokens, minus 1."""
        return self.padded_tokens / (self.height * self.width) - 1


def _per_stage(value: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise ProblemError(f"{name} needs one value per stage ({count}), not {len(values)}")
    return values


def stages(
    variant: Variant,
    height: int,
    width: int,
    *,
    batch: int = 1,
    n_win: int | Sequence[int] = 7,
    topks: Sequence[int] | None = None,
    dtype: str = "float32",
    direction: str = "fwd",
    pad: bool | None = None,
) -> tuple[Stage, ...]:
    """The stages of a model at a resolution, each with the attention call that it makes.

    Args:
        variant: The model.
        height: Image height in pixels.
        width: Image width in pixels.
        batch: Images.
        n_win: S, one for all stages or one per stage.
        topks: Top-k per stage; by default the published ones.
        dtype: See `Problem`.
        direction: See `Problem`.
        pad: Pad maps that S does not divide, as the official models do with ``auto_pad``. By default
            on for the ``biformer`` layout, which can, and off for ``stl``, which cannot.

    Raises:
        ProblemError: S or a top-k does not fit a stage; the message names the stage.
    """
    count = len(variant.dims)
    windows = _per_stage(n_win, count, "n_win")
    ks = variant.topks if topks is None else _per_stage(tuple(topks), count, "topks")
    if pad is None:
        pad = variant.layout == "biformer"
    found = []
    for i, (h, w) in enumerate(variant.maps(height, width)):
        dim, k, s = variant.dims[i], ks[i], windows[i]
        problem: Problem | None = None
        kind = "routed" if k > 0 else "conv" if k == 0 else "full"
        try:
            if kind == "routed":
                problem = _routed_problem(variant, h, w, s, k, dim, batch, dtype, direction, pad)
            elif kind == "full":
                head_dim = dim // FULL_ATTENTION_HEADS
                problem = Problem(
                    batch=batch,
                    height=h,
                    width=w,
                    heads=FULL_ATTENTION_HEADS,
                    head_dim=head_dim,
                    region=(h, w),
                    topk=1,
                    dtype=dtype,
                    direction=direction,
                    scale=head_dim**-0.5,
                )
        except ProblemError as error:
            raise ProblemError(f"stage {i + 1} of {variant.name}: {error}") from None
        found.append(
            Stage(
                index=i + 1,
                blocks=variant.depths[i],
                dim=dim,
                height=h,
                width=w,
                kind=kind,
                n_win=s if kind == "routed" else 0,
                topk=k,
                problem=problem,
            )
        )
    return tuple(found)


def _routed_problem(
    variant: Variant,
    height: int,
    width: int,
    n_win: int,
    topk: int,
    dim: int,
    batch: int,
    dtype: str,
    direction: str,
    pad: bool,
) -> Problem:
    if variant.layout == "stl_nchw":
        # Regions round down and the map is padded after the projection, so that the grid can be larger
        # than S x S.
        if n_win > min(height, width):
            raise ProblemError(
                f"{n_win} regions per side do not fit a {height}x{width} map; 1 to {min(height, width)} would"
            )
        region = (height // n_win, width // n_win)
    else:
        # The map is padded before the projection: attention sees S x S full regions.
        region = split_map(height, width, n_win, pad=pad)
        height, width = region[0] * n_win, region[1] * n_win
    return Problem(
        batch=batch,
        height=height,
        width=width,
        heads=dim // variant.head_dim,
        head_dim=variant.head_dim,
        region=region,
        topk=topk,
        dtype=dtype,
        direction=direction,
    )
