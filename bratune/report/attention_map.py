"""Attention map: where a query position of a block looks, level one (regions) and level two (tokens).

What the paper draws in its figure 4 (routed regions and the attention response of a query), as numbers: a
model is run once, the block's input is caught, and its own projection, routing and scale are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.errors import UnsupportedError, UsageError
from bratune.kernels.blocks import Residual
from bratune.kernels.full_attention import FullAttention
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bratune.kernels.nhwc import to_nhwc
from bratune.work.parts import queries_and_keys

__all__ = ["Look", "block_at", "block_number", "blocks_of", "look"]


@dataclass(frozen=True)
class Look:
    """What one query sees.

    Attributes:
        query: Position in the image, ``(x, y)`` in pixels.
        token: Row and column of its token.
        map_size: Tokens from top to bottom and from left to right, without padding.
        region: Its own region as ``(top, left, bottom, right)`` in tokens.
        routed: The regions that it is routed to, most similar first, cut to the map, so that one of padding
            alone is empty; none for full attention.
        response: ``[heads, height, width]``, the attention weight of every token; a head's weights add up
            to 1 less what falls on padding.
    """

    query: tuple[int, int]
    token: tuple[int, int]
    map_size: tuple[int, int]
    region: tuple[int, int, int, int]
    routed: tuple[tuple[int, int, int, int], ...]
    response: Tensor

    @property
    def inside(self) -> tuple[tuple[int, int, int, int], ...]:
        """The routed regions that hold a part of the map."""
        return tuple(box for box in self.routed if box[0] < box[2] and box[1] < box[3])

    def of_head(self, head: int | None) -> Tensor:
        """The response of a head, or the mean of all, ``[height, width]``.

        Raises:
            UsageError: there is no such head.
        """
        if head is None:
            return self.response.mean(0)
        if not 0 <= head < len(self.response):
            raise UsageError(f"head {head} of {len(self.response)}; 0 to {len(self.response) - 1} would work")
        return self.response[head]


def block_at(model: nn.Module, stage: int, block: int) -> Residual:
    """A block of a model.

    Args:
        model: One of the models of `bratune.kernels.biformer`.
        stage: From 1.
        block: From 1; negative numbers count from the last.

    Raises:
        UsageError: the model has no such stage or block.
    """
    return blocks_of(model, stage)[block_number(model, stage, block) - 1]


def block_number(model: nn.Module, stage: int, block: int) -> int:
    """Which block is meant, from 1; negative numbers count from the last.

    Raises:
        UsageError: the model has no such stage or block.
    """
    count = len(blocks_of(model, stage))
    number = block if block >= 0 else count + 1 + block
    if not 1 <= number <= count:
        raise UsageError(f"block {block} of {count} in stage {stage}; 1 to {count} would work")
    return number


def blocks_of(model: nn.Module, stage: int) -> list[Residual]:
    """The blocks of a stage, which counts from 1.

    Raises:
        UsageError: the model has no such stage.
    """
    stages: Any = model.stages
    if not 1 <= stage <= len(stages):
        raise UsageError(f"stage {stage} of {len(stages)}; 1 to {len(stages)} would work")
    return [m for m in stages[stage - 1].modules() if isinstance(m, Residual)]


@torch.no_grad()
def look(
    model: nn.Module, image: Tensor, *, stage: int, block: int, queries: Sequence[tuple[int, int]]
) -> tuple[Look, ...]:
    """What queries of a block see in an image.

    Args:
        model: One of the models of `bratune.kernels.biformer`, on the CPU or a GPU.
        image: ``[3, H, W]``, normalised.
        stage: From 1.
        block: From 1; negative numbers count from the last.
        queries: Positions ``(x, y)`` in pixels.

    Raises:
        UsageError: no such stage or block, or a position outside of the image.
        UnsupportedError: the block has no attention of the kinds drawn here.
    """
    attn = block_at(model, stage, block).attn
    height, width = image.shape[1:]
    for x, y in queries:
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(f"the position {x},{y} is outside of the {width}x{height} image")
    tokens = _input_of(attn, model, image)
    if isinstance(attn, FullAttention):
        q, k, _ = attn.project(tokens)
        seen = [_full(attn, q, k, query, (height, width)) for query in queries]
    elif isinstance(attn, BiLevelRoutingAttention | NCHWBiLevelRoutingAttention):
        seen = [_routed(attn, tokens, query, (height, width)) for query in queries]
    else:
        raise UnsupportedError(type(attn).__name__, ["stage and block have no attention to look at"])
    return tuple(seen)


def _input_of(attn: nn.Module, model: nn.Module, image: Tensor) -> Tensor:
    """What reaches a block's attention, NHWC."""
    caught: list[Tensor] = []
    handle = attn.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    training = model.training
    try:
        model.eval()
        model(image[None])
    finally:
        handle.remove()
        model.train(training)
    nchw = isinstance(attn, NCHWBiLevelRoutingAttention) or type(attn).__name__.startswith("NCHW")
    return to_nhwc(caught[0]) if nchw else caught[0]


def _token_at(query: tuple[int, int], image: tuple[int, int], tokens: tuple[int, int]) -> tuple[int, int]:
    x, y = query
    return y * tokens[0] // image[0], x * tokens[1] // image[1]


def _full(attn: FullAttention, q: Tensor, k: Tensor, query: tuple[int, int], image: tuple[int, int]) -> Look:
    _, height, width, channels = q.shape
    token = _token_at(query, image, (height, width))
    heads = attn.num_heads
    rows = q[0, token[0], token[1]].view(heads, channels // heads)
    keys = k[0].reshape(height * width, heads, channels // heads)
    logits = torch.einsum("hd,nhd->hn", rows.float() * attn.scale, keys.float())
    response = logits.softmax(-1).view(heads, height, width)
    return Look(query, token, (height, width), (0, 0, height, width), (), response.cpu())


def _routed(
    attn: BiLevelRoutingAttention | NCHWBiLevelRoutingAttention,
    tokens: Tensor,
    query: tuple[int, int],
    image: tuple[int, int],
) -> Look:
    height, width = tokens.shape[1:3]
    if isinstance(attn, BiLevelRoutingAttention) and not isinstance(attn.kv_down, nn.Identity):
        raise UnsupportedError("visualize", ["keys are pooled within regions, so no token has a weight"])
    q, k, (rh, rw) = queries_and_keys(attn, tokens)
    routes = attn.route(q, k)[0]
    # The NCHW module pads after the projection: its padded keys are zeros and take part.
    bottom, right = -q.shape[1] % rh, -q.shape[2] % rw
    k = F.pad(k, (0, 0, 0, right, 0, bottom))
    cols = k.shape[2] // rw
    token = _token_at(query, image, (height, width))
    own = token[0] // rh * cols + token[1] // rw
    heads = attn.num_heads
    row = q[0, token[0], token[1]].float().view(heads, -1) * attn.scale
    boxes = [_box(int(r), cols, rh, rw) for r in routes[own]]
    keys = torch.stack([k[0, t:b, left:r] for t, left, b, r in boxes]).float()  # [topk, rh, rw, C]
    logits = torch.einsum("hd,kijhd->hkij", row, keys.view(*keys.shape[:-1], heads, -1))
    weights = logits.flatten(1).softmax(-1).view(logits.shape)
    response = torch.zeros(heads, *k.shape[1:3])
    for number, (t, left, b, r) in enumerate(boxes):
        response[:, t:b, left:r] += weights[:, number].cpu()
    return Look(
        query,
        token,
        (height, width),
        _clipped(_box(own, cols, rh, rw), height, width),
        tuple(_clipped(box, height, width) for box in boxes),
        response[:, :height, :width],
    )


def _box(region: int, cols: int, rh: int, rw: int) -> tuple[int, int, int, int]:
    row, col = divmod(region, cols)
    return row * rh, col * rw, (row + 1) * rh, (col + 1) * rw


def _clipped(box: tuple[int, int, int, int], height: int, width: int) -> tuple[int, int, int, int]:
    top, left, bottom, right = box
    return min(top, height), min(left, width), min(bottom, height), min(right, width)
