"""Counted: what a model of torch does, operation by operation, sorted into the kinds that are calibrated.

A model is built on meta tensors and run once under `bratune.kernels.accounting`: nothing is computed, no
weight is allocated, and a model of any size takes a fraction of a second. The same kinds sort the kernels
that `bratune.predict.parts` lists for models of ours, so that one set of rates speaks of both.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bratune.errors import BratuneError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from bratune.kernels.accounting import Operation

__all__ = [
    "KINDS",
    "NARROW_WINDOW",
    "Load",
    "count_peer",
    "load_of",
    "loads",
    "mixer_loads",
    "peer_loads",
    "product_kind",
    "timm_models",
]

# Inner or outer channels below which a product leaves the matrix units half empty.
NARROW = 128
NARROW_WINDOW = 64
# Every kind of operation that has a rate of its own.
KINDS = (
    "gemm",  # a linear layer
    "gemm-narrow",  # with fewer than `NARROW` channels on a side
    "batched",  # a product of two activations
    "conv",
    "conv-narrow",  # with fewer than `NARROW_WINDOW` channels on a side
    "pointwise",  # a convolution of one tap
    "pointwise-narrow",
    "grouped",
    "depthwise",
    "attention",  # fused
    "layer-norm",
    "batch-norm",
    "softmax",
    "copy",  # and every other change of place: gather, concatenation, padding, roll
    "pool",  # reductions
    "elementwise",
)
_COPIES = re.compile(
    "copy|clone|cat|roll|pad|index|gather|stack|scatter|fill|repeat|pixel|im2col|unfold|contiguous"
)
_POOLS = re.compile("pool|upsample|^(mean|sum|var|var_mean|max|amax)$")


@dataclass(frozen=True)
class Load:
    """What the operations of one kind add up to.

    Attributes:
        macs: Multiply-adds.
        moved: Bytes read and written, weights included.
        launches: How many there are.
    """

    macs: float = 0.0
    moved: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(self.macs + other.macs, self.moved + other.moved, self.launches + other.launches)

    def scaled(self, factor: float) -> Load:
        """So many times this load, launches included."""
        return Load(self.macs * factor, self.moved * factor, self.launches * factor)


def product_kind(inner: int, columns: int) -> str:
    """The kind of a linear layer with so many channels before and behind it."""
    return "gemm" if min(inner, columns) >= NARROW else "gemm-narrow"


def load_of(operation: Operation) -> tuple[str, Load]:
    """The kind of a counted operation and its load."""
    o = operation
    return _kind(o.name, o.shape), Load(o.macs, o.read + o.written + o.weights, 1)


def _kind(name: str, shape: tuple[int, ...]) -> str:
    if name in ("addmm", "mm", "addmv", "mv"):
        return product_kind(*shape[2:]) if len(shape) == 4 else "gemm-narrow"
    if name in ("bmm", "baddbmm"):
        return "batched"
    if "convolution" in name and shape:
        groups, inner, outer, taps = shape
        if groups > 1:
            return "depthwise" if inner == 1 else "grouped"
        if taps == 1:
            return "pointwise" if min(inner, outer) >= NARROW else "pointwise-narrow"
        return "conv" if min(inner, outer) >= NARROW_WINDOW else "conv-narrow"
    if "attention" in name:
        return "attention"
    if "norm" in name and "linalg" not in name:
        return "layer-norm" if "layer" in name else "batch-norm"
    if "softmax" in name:
        return "softmax"
    if _COPIES.search(name):
        return "copy"
    return "pool" if _POOLS.search(name) else "elementwise"


def loads(operations: Mapping[Operation, int] | Iterable[tuple[Operation, int]]) -> dict[str, Load]:
    """The load of every kind that occurs, by kind."""
    found: dict[str, Load] = {}
    pairs = operations.items() if isinstance(operations, Mapping) else operations
    for operation, times in pairs:
        kind, load = load_of(operation)
        found[kind] = found.get(kind, Load()) + load.scaled(times)
    return found


def timm_models() -> Any:
    """The package timm, on any torch: its operators of torchvision are declared where they are missing.

    Raises:
        MissingPackageError: timm is not installed.
        BratuneError: it cannot be imported for another reason.
    """
    from bratune.kernels.timm_import import import_timm

    try:
        return import_timm("counting a model of timm")
    except BratuneError:
        _declare_operators()
        return import_timm("counting a model of timm")


_DECLARED: list[Any] = []


def _declare_operators() -> None:
    """Declare what torchvision's Python describes and a torchvision for another torch does not bring.

    Nothing that is counted calls these; they only let timm be imported.
    """
    import sys

    from torch.library import Library

    if not _DECLARED:
        operators: Any = Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(operators)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]


def count_peer(
    name: str, image: tuple[int, int], batch: int, *, item_bytes: int = 2, gradients: bool = False
) -> Counter[Operation]:
    """Every operation of a forward pass (or of a training step) of a model of timm, and how often it runs.

    Args:
        name: As timm knows it.
        image: Height and width in pixels.
        batch: Images.
        item_bytes: Bytes of a number.
        gradients: Count the backward pass of the sum of the outputs too.

    Raises:
        UnknownNameError: timm has no such model.
        BratuneError: the model cannot be run on meta tensors, or not at this image size.
        MissingPackageError: timm is not installed.
    """
    timm = timm_models()
    import torch

    from bratune.kernels.accounting import count

    if not timm.is_model(name):
        raise UnknownNameError(
            "model of timm", name, difflib.get_close_matches(name, timm.list_models(), 8, 0.3)
        )
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            model = _sized(timm, name, image).eval()
            x = torch.empty(batch, 3, *image)
        account = count(
            lambda: model(x).sum().backward() if gradients else model(x),
            weights=model,
            item_bytes=item_bytes,
            gradients=gradients,
            fused_attention=True,
        )
    except (RuntimeError, NotImplementedError, AssertionError, ValueError, TypeError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BratuneError(f"{name} cannot be counted at {image[0]}x{image[1]}: {text}") from None
    finally:
        logging.disable(level)
    return Counter(account.by_operation)


def _sized(timm: Any, name: str, image: tuple[int, int]) -> Any:
    """The model for images of this size, where its weights have a size."""
    if image != tuple(timm.get_pretrained_cfg(name).input_size[1:]):
        try:
            return timm.create_model(name, img_size=image)
        except TypeError:  # it takes any
            pass
    return timm.create_model(name)


@functools.lru_cache(maxsize=64)
def peer_loads(
    name: str, image: tuple[int, int], batch: int, item_bytes: int = 2, gradients: bool = False
) -> Mapping[str, Load]:
    """The loads of a model of timm; see `count_peer`."""
    return loads(count_peer(name, image, batch, item_bytes=item_bytes, gradients=gradients))


@functools.lru_cache(maxsize=256)
def mixer_loads(
    name: str,
    part: str,
    stage: int,
    image: tuple[int, int],
    n_win: int,
    batch: int,
    item_bytes: int = 2,
) -> Mapping[str, Load]:
    """The loads of a mixer: of its network, of two blocks of a stage, or of their attentions alone.

    Args:
        name: See `bratune.kernels.mixers.registry`.
        part: ``model``, ``block`` or ``mixer``.
        stage: Of a block or mixer.
        image: Height and width in pixels.
        n_win: Regions per side of bi-level routing.
        batch: Images.
        item_bytes: Bytes of a number.

    Raises:
        UnsupportedError: it cannot be run on meta tensors, so that nobody counted its operations.
    """
    import torch

    from bratune.kernels.accounting import count
    from bratune.kernels.mixers import registry
    from bratune.kernels.mixers.network import MixerBlock, MixerNetwork, places

    kind = registry.get(name)
    with torch.device("meta"):
        pair = [place for place in places(*image, n_win=n_win) if place.stage == stage][:2]
        modules: list[Any] = (
            [MixerNetwork(kind, *image, n_win=n_win)]
            if part == "model"
            else [torch.nn.Sequential(*(MixerBlock(kind, place) for place in pair))]
        )
        if part == "mixer":
            modules = [block.attn for block in modules[0]]
        shape = (3, *image) if part == "model" else (pair[0].height, pair[0].width, pair[0].dim)
        x = torch.empty(batch, *shape)

        def call() -> None:
            for module in modules:
                module.eval()(x)

        try:
            account = count(
                call,
                weights=torch.nn.ModuleList(modules),
                item_bytes=item_bytes,
                fused_attention=True,
            )
        except (
            RuntimeError,
            NotImplementedError,
            AssertionError,
            ValueError,
            TypeError,
            BratuneError,
        ) as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedError(name, [f"its operations cannot be counted: {text}"]) from None
    return loads(account.by_operation)
