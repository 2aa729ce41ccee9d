"""Attention to the whole map, and bi-level routing in the same layout."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from bratune.errors import ProblemError
from bratune.kernels.full_attention import AttentionLePE
from bratune.kernels.layer import BiLevelRoutingAttention
from bratune.kernels.mixers.definition import Definition, under_mask
from bratune.kernels.mixers.mixer import Mixer, Place
from bratune.kernels.mixers.tiles import Projected, attended, projection_macs
from bratune.problem import Problem
from bratune.variant import get_variant

__all__ = ["FULL", "FullMapAttention", "bi_level_routing", "problem_at"]

_STL = "biformer_stl"


class FullMapAttention(Projected):
    """Every token attends to every token, by PyTorch's fused attention.

    Args:
        dim: Channels.
        heads: Heads.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        tokens = x.flatten(1, 2)
        out: Tensor = self.proj(attended(*self.split(tokens)))
        return out.reshape(x.shape)


class RoutedDefinition(nn.Module):
    """Bi-level routing by the backend ``reference``, in the module's own data type.

    Rounded otherwise, a region at a near tie would be routed elsewhere, and be another result.

    Args:
        mixer: The module of the mixer.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = copy.deepcopy(mixer)
        routed: Any = self.mixer
        routed.set_backend("reference")

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """See `bratune.kernels.mixers.mixer.MixerKind.definition`."""
        out: Tensor = self.mixer(x)
        return out.flatten(1, 2)[:, at]


def bi_level_routing(backend: str = "auto") -> Mixer:
    """Bi-level routing attention by a backend, with the top-k of BiFormer-STL in every stage."""

    def build(place: Place) -> nn.Module:
        topk = _topk(place)
        if topk < 0:
            return AttentionLePE(place.dim, backend=backend)
        return BiLevelRoutingAttention(
            place.dim, place.heads, place.n_win, topk=topk, side_dwconv=5, auto_pad=True, backend=backend
        )

    return Mixer(
        name="bi-level-routing" if backend == "auto" else f"bi-level-routing:{backend}",
        paper="Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, "
        "arXiv 2303.08810",
        order="N^(4/3)",
        build=build,
        define=RoutedDefinition,
        count=_routed_macs,
        maps=_routed_maps,
        refuse=_refusals,
    )


def _topk(place: Place) -> int:
    topk = get_variant(_STL).topks[place.stage - 1]
    return min(topk, place.n_win**2)


def _refusals(place: Place) -> tuple[str, ...]:
    try:
        _problem(place)
    except ProblemError as error:
        return (str(error),)
    return ()


def problem_at(place: Place, like: Problem) -> Problem | None:
    """The attention call of a stage, in the batch, data type and direction of another.

    None where the stage attends to its whole map.
    """
    found = _problem(place)
    return found and found.replace(batch=place.batch, dtype=like.dtype, direction=like.direction)


def _problem(place: Place) -> Problem | None:
    """The attention call of the stage; None where it attends to the whole map."""
    if _topk(place) < 0:
        return None
    padded = (-(-place.height // place.n_win), -(-place.width // place.n_win))
    return Problem(
        batch=1,
        height=place.height,
        width=place.width,
        heads=place.heads,
        head_dim=place.head_dim,
        region=padded,
        topk=_topk(place),
    )


def _routed_macs(place: Place) -> int:
    local = 25 * place.tokens * place.dim
    problem = _problem(place)
    if problem is None:
        return projection_macs(place) + local + 2 * place.tokens**2 * place.dim
    route = place.n_win**4 * place.dim
    return projection_macs(place) + local + route + problem.attention_macs


def _routed_maps(place: Place) -> int:
    problem = _problem(place)
    if problem is None:
        return place.tokens * (6 * place.dim + 8 * place.tokens)
    return (
        place.tokens * 6 * place.dim
        + (problem.gathered_bytes + 2 * problem.score_bytes) // problem.item_bytes
    )


def _everything(y: Tensor, x: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
    return (y == y) & (kx == kx)


FULL = Mixer(
    name="full",
    paper="Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762",
    order="N^2",
    build=lambda place: FullMapAttention(place.dim, place.heads),
    define=lambda module: Definition(module, lambda m, x, at: under_mask(m, x, at, _everything)),
    count=lambda place: projection_macs(place) + 2 * place.tokens**2 * place.dim,
    maps=lambda place: place.tokens * (5 * place.dim + place.heads * place.tokens),
)
