"""Mixers: the attentions that vision transformers are compared by, behind one interface.

A mixer is what mixes the tokens of a map in a block, projections included: ``[B, H, W, C]`` in,
``[B, H, W, C]`` out. A `MixerKind` says what it is called, where it comes from, which maps it refuses, and
what it costs on paper; `MixerKind.make` gives the module. They are held by name in
`bratune.kernels.mixers.registry`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from bratune.errors import ProblemError

__all__ = ["Mixer", "MixerKind", "Place"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a mixer stands: one block of a network at a resolution.

    Attributes:
        height: Rows of the map, in tokens.
        width: Columns of the map.
        dim: Channels.
        heads: Heads; they divide the channels.
        stage: 1 for the first stage. Strides, stripes and top-k grow or shrink from stage to stage.
        block: 0 for the first block of the stage. Some mixers take turns between two forms.
        n_win: Regions per side of bi-level routing.
        batch: Images.
        item_bytes: Bytes of a number.
    """

    height: int
    width: int
    dim: int
    heads: int
    stage: int
    block: int = 0
    n_win: int = 7
    batch: int = 1
    item_bytes: int = 4

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ProblemError(f"{self.heads} heads do not divide {self.dim} channels")
        if not 1 <= self.stage <= 4:
            raise ProblemError(f"a network of this layout has stages 1 to 4, not {self.stage}")

    @property
    def tokens(self) -> int:
        """Tokens of one map."""
        return self.height * self.width

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.heads

    def at(self, height: int, width: int) -> Place:
        """The same block on another map."""
        return dataclasses.replace(self, height=height, width=width)


@runtime_checkable
class MixerKind(Protocol):
    """One attention, as the registry holds it. All of it is pure but `make`, which draws weights."""

    @property
    def name(self) -> str:
        """What the command line and the records call it."""
        ...

    @property
    def paper(self) -> str:
        """Where it was published: authors, title, venue, arXiv number."""
        ...

    @property
    def order(self) -> str:
        """How its work grows with the number of tokens N, as its paper states it, e.g. ``N``."""
        ...

    def why_not(self, place: Place) -> tuple[str, ...]:
        """Every obstacle, each a sentence; empty: it can stand there."""
        ...

    def make(self, place: Place) -> nn.Module:
        """A module with fresh weights, ``[B, H, W, C]`` to ``[B, H, W, C]``.

        Raises:
            ProblemError: it cannot stand there; see `why_not`.
        """
        ...

    def definition(self, module: nn.Module) -> nn.Module:
        """What a module of `make` must agree with: the same weights, computed plainly at some tokens.

        It takes a map ``[B, H, W, C]`` and places of tokens in it, ``[M]``, row by row, and returns
        ``[B, M, C]``, in float64 where rounding changes nothing but the last digits. Its parameters are
        copies of those of the module, in the same order.
        """
        ...

    def macs(self, place: Place) -> int:
        """Multiply-adds of a forward pass: projections, convolutions and both products of attention."""
        ...

    def workspace_bytes(self, place: Place) -> int:
        """Bytes that a forward pass allocates beyond its input and its output (an upper estimate)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """A `MixerKind` from its parts.

    Attributes:
        name: See `MixerKind.name`.
        paper: See `MixerKind.paper`.
        order: See `MixerKind.order`.
        build: Makes the module of a place.
        define: See `MixerKind.definition`.
        count: Multiply-adds of one image of a place.
        maps: Maps of ``dim`` channels that are alive at most, beyond input and output, as a number of their
            numbers per image.
        refuse: Obstacles of a place.
    """

    name: str
    paper: str
    order: str
    build: Callable[[Place], nn.Module]
    define: Callable[[nn.Module], nn.Module]
    count: Callable[[Place], int]
    maps: Callable[[Place], int]
    refuse: Callable[[Place], tuple[str, ...]] = lambda place: ()

    def why_not(self, place: Place) -> tuple[str, ...]:
        """See `MixerKind.why_not`."""
        return self.refuse(place)

    def make(self, place: Place) -> nn.Module:
        """See `MixerKind.make`."""
        reasons = self.why_not(place)
        if reasons:
            raise ProblemError(f"{self.name}: {'; '.join(reasons)}")
        return self.build(place)

    def definition(self, module: nn.Module) -> nn.Module:
        """See `MixerKind.definition`."""
        return self.define(module)

    def macs(self, place: Place) -> int:
        """See `MixerKind.macs`."""
        return place.batch * self.count(place)

    def workspace_bytes(self, place: Place) -> int:
        """See `MixerKind.workspace_bytes`."""
        return place.batch * place.item_bytes * self.maps(place)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[..., N, heads * d]`` to ``[..., heads, N, d]``; copies nothing."""
    *lead, tokens, channels = x.shape
    return x.reshape(*lead, tokens, heads, channels // heads).transpose(-2, -3)


def join_heads(x: Tensor) -> Tensor:
    """``[..., heads, N, d]`` to ``[..., N, heads * d]``, contiguous."""
    *lead, heads, tokens, depth = x.shape
    return x.transpose(-2, -3).reshape(*lead, tokens, heads * depth)
