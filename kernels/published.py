"""The published composition of a BiFormer, operation by operation: the baseline that speedups speak of.

`as_published` runs the weights of a `BiFormer` as the official code does: NCHW maps between blocks, tokens
brought into regions before they are projected, one gathered copy of keys and values, every
intermediate result written out. It shares the parameters of the model that it is made from. The layers'
own parts (``project``, ``attend``, ``enhance``, ``merge``), of which `bratune.work.parts` makes the steps
that are timed, are no help here: they avoid the very copies that this form is measured for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bratune.errors import UnsupportedError
from bratune.kernels.biformer import BiFormer
from bratune.kernels.blocks import Block
from bratune.kernels.full_attention import AttentionLePE
from bratune.kernels.layer import BiLevelRoutingAttention
from bratune.kernels.layout import crop_tokens

__all__ = ["as_published"]


def as_published(model: BiFormer) -> nn.Module:
    """The model's weights behind the official sequence of operations, for inference.

    Raises:
        UnsupportedError: the model has options that no published model has.
    """
    if type(model) is not BiFormer:
        raise UnsupportedError(
            "published", (f"it runs the models of class BiFormer, not {type(model).__name__}",)
        )
    for name, module in model.named_modules():
        reasons = _unpublished(module)
        if reasons:
            raise UnsupportedError("published", reasons, name)
    return _Published(model).eval()


def _unpublished(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, Block) and (module.gamma1 is not None or not module.pre_norm):
        return ("layer scale and post-normalisation are in no published model",)
    if isinstance(module, Block) and module.pos_embed is None:
        return ("blocks without a position embedding are in no published model",)
    if isinstance(module, Block) and not isinstance(module.attn, BiLevelRoutingAttention | AttentionLePE):
        return (f"{type(module.attn).__name__} is in no published model; top-k 1 and more, and -2, are",)
    if isinstance(module, BiLevelRoutingAttention) and (
        module.soft_routing or not isinstance(module.kv_down, nn.Identity)
    ):
        return ("soft routing and pooled keys are in no published model",)
    if isinstance(module, BiLevelRoutingAttention | AttentionLePE) and module.lepe is None:
        return ("attention without local enhancement is in no published model",)
    return ()


class _Published(nn.Module):
    def __init__(self, model: BiFormer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        model = self.model
        maps = []
        for index, (down, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
            x = down(x)
            for block in stage.children():
                x = _block(block, x)
            if model.features_only:
                maps.append(model.extra_norms[index](x))
        if model.features_only:
            return tuple(maps)
        return model.head(model.norm(x).flatten(2).mean(-1))


def _block(block: Any, x: Tensor) -> Tensor:
    """A block on an NCHW map."""
    x = x + block.pos_embed(x)
    x = x.permute(0, 2, 3, 1)
    attend = _full if isinstance(block.attn, AttentionLePE) else _routed
    x = x + attend(block.attn, block.norm1(x))
    x = x + block.mlp(block.norm2(x))
    return x.permute(0, 3, 1, 2)


def _routed(attn: Any, x: Tensor) -> Tensor:
    inside = x.shape[1:3]
    x = attn.pad(x)
    batch, height, width, channels = x.shape
    side, heads, qk_dim = attn.n_win, attn.num_heads, attn.qk_dim
    rh, rw = height // side, width // side
    regions, tokens = side * side, rh * rw
    tiles = x.reshape(batch, side, rh, side, rw, channels).transpose(2, 3)
    tiles = tiles.reshape(batch, regions, rh, rw, channels)
    q, kv = attn.qkv(tiles).split((qk_dim, qk_dim + channels), dim=-1)
    queries = q.reshape(batch, regions, tokens, qk_dim)
    # There and back through the layout of the pooling that the published models leave out.
    pooled = kv.flatten(0, 1).permute(0, 3, 1, 2)
    pairs = pooled.permute(0, 2, 3, 1).reshape(batch, regions, tokens, qk_dim + channels)
    q_means, k_means = q.mean((2, 3)), kv[..., :qk_dim].mean((2, 3))

    v = kv[..., qk_dim:].unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
    local = attn.lepe(v.reshape(batch, channels, height, width).contiguous())
    local = local.permute(0, 2, 3, 1)

    affinity = (q_means * attn.scale) @ k_means.transpose(1, 2)
    best, routes = affinity.topk(attn.topk, dim=-1)
    torch.softmax(best, dim=-1)  # computed and not used, as published

    index = routes[..., None, None].expand(-1, -1, -1, tokens, qk_dim + channels)
    everything = pairs[:, None].expand(-1, regions, -1, -1, -1)
    k_sel, v_sel = everything.gather(2, index).split((qk_dim, channels), dim=-1)
    k_sel = k_sel.unflatten(-1, (heads, -1)).permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(0, 1)
    v_sel = v_sel.unflatten(-1, (heads, -1)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(0, 1)
    queries = queries.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(0, 1)
    weights = torch.softmax((queries * attn.scale) @ k_sel, dim=-1)
    out = weights @ v_sel  # [B * R, heads, T, D]
    out = out.unflatten(0, (batch, side, side)).unflatten(4, (rh, rw)).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, height, width, channels)
    return crop_tokens(attn.wo(out + local), *inside).contiguous()


def _full(attn: Any, x: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    x = x.permute(0, 3, 1, 2)
    local = attn.lepe(x).permute(0, 2, 3, 1).flatten(1, 2)
    tokens = x.flatten(2).transpose(1, 2)
    split = attn.qkv(tokens).reshape(batch, height * width, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = split.unbind(0)
    weights = ((q @ k.transpose(-2, -1)) * attn.scale).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, height * width, channels)
    return attn.proj(out + local).reshape(batch, height, width, channels)  # type: ignore[no-any-return]
