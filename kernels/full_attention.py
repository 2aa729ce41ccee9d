"""Full attention: every token attends to every token, as the last stage of the official models does.

Three modules with the official parameters and numerics. Unlike routed attention they always have eight
heads, no bias on the projection, and ``head_dim ** -0.5`` as scale; no map is padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.backend import Config
from bratune.errors import ProblemError
from bratune.kernels.native.training import AttentionParts
from bratune.kernels.nhwc import conv_nhwc, depthwise, is_1x1, keeps_size, linear_1x1, to_nchw, to_nhwc
from bratune.kernels.plain import is_plain
from bratune.kernels.registry import get
from bratune.variant import FULL_ATTENTION_HEADS

__all__ = ["Attention", "AttentionLePE", "FullAttention", "NCHWAttentionLePE", "full_attention"]

# These backends stand for the published composition: the score matrix is written out.
COMPOSED = ("reference", "gather")


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, heads: int, scale: float, backend: str) -> Tensor:
    """Attend from every token to every token of the map.

    Args:
        q: ``[B, H, W, C]`` with ``C = heads * head_dim``, any strides.
        k: As ``q``.
        v: As ``q``.
        heads: Heads, contiguous slices of the channels.
        scale: Factor of the logits.
        backend: ``reference`` and ``gather`` write the score matrix out, as published; any other name
            uses PyTorch's fused attention.

    Returns:
        ``[B, H, W, C]``, contiguous.
    """
    batch, height, width, channels = q.shape
    q, k, v = (t.reshape(batch, height * width, heads, channels // heads).transpose(1, 2) for t in (q, k, v))
    if backend in COMPOSED:
        weights = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, height, width, channels)


class FullAttention(nn.Module):
    """What the three modules share: the parts of the forward pass, on NHWC maps."""

    qkv: nn.Module
    proj: nn.Module
    lepe: nn.Module | None

    def __init__(self, dim: int, num_heads: int, qk_scale: float | None, backend: str) -> None:
        super().__init__()
        self.lepe = None
        if num_heads < 1 or dim % num_heads:
            raise ProblemError(f"{num_heads} heads do not divide {dim} channels")
        self.dim = dim
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.set_backend(backend)

    def set_backend(self, backend: str, config: Config | None = None) -> None:
        """Attend as another backend would from now on; its settings mean nothing here."""
        if backend != "auto":
            get(backend)
        self.backend = backend

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a map, ``[B, H, W, C]`` each."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention itself, without projection and local enhancement."""
        return full_attention(q, k, v, heads=self.num_heads, scale=self.scale, backend=self.backend)

    def enhance(self, x: Tensor) -> Tensor | None:
        """The local enhancement of the module's input, or of the values; None without one."""
        return None if self.lepe is None else conv_nhwc(self.lepe, x)

    def merge(self, x: Tensor) -> Tensor:
        """The output projection."""
        out: Tensor = self.proj(x)
        return out

    def trained_parts(self, x: Tensor) -> AttentionParts | None:
        """What a block in training takes of the module on a map ``[B, H, W, C]``; None where it is called."""
        plain = all(is_plain(part, nn.Linear) or is_1x1(part) for part in (self.qkv, self.proj))
        if self.backend != "auto" or not (plain and (self.lepe is None or keeps_size(self.lepe))):
            return None
        enhances_input = isinstance(self, Attention)
        return AttentionParts(
            self.qkv, self.lepe, self.proj, self.num_heads, self.scale, None, 1, enhances_input
        )

    def finish(self, out: Tensor, local: Tensor | None) -> Tensor:
        """The output projection of what was attended to, with its local enhancement."""
        return self.merge(out if local is None else out + local)


class Attention(FullAttention):
    """Full attention on an NHWC map, without local enhancement (official top-k ``-1``).

    Args:
        dim: Channels.
        num_heads: Heads.
        qkv_bias: Give the projection a bias.
        qk_scale: Factor of the logits; by default ``head_dim ** -0.5``.
        backend: See `full_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = FULL_ATTENTION_HEADS,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qk_scale, backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        return self.finish(self.attend(*self.project(x)), self.enhance(x))


class AttentionLePE(Attention):
    """Full attention plus a depthwise convolution of the module's *input* (official top-k ``-2``).

    Args:
        dim: Channels.
        num_heads: Heads.
        qkv_bias: Give the projection a bias.
        qk_scale: Factor of the logits; by default ``head_dim ** -0.5``.
        side_dwconv: Side of the convolution; 0 leaves it out.
        backend: See `full_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = FULL_ATTENTION_HEADS,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale, backend=backend)
        self.lepe = depthwise(dim, side_dwconv)


class NCHWAttentionLePE(FullAttention):
    """Full attention plus a depthwise convolution of the *values*, NCHW (official ``nchwAttentionLePE``).

    The projections are 1x1 convolutions by their parameters and matrix products by computation: the map
    is read as NHWC, which costs nothing where it is ``channels_last`` in memory.

    Args:
        dim: Channels.
        num_heads: Heads.
        qkv_bias: Give the projection a bias.
        qk_scale: Factor of the logits; by default ``head_dim ** -0.5``.
        side_dwconv: Side of the convolution; 0 leaves it out.
        backend: See `full_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = FULL_ATTENTION_HEADS,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qk_scale, backend)
        self.qkv = nn.Conv2d(dim, 3 * dim, kernel_size=1, bias=qkv_bias)
        self.proj = nn.Conv2d(dim, dim, kernel_size=1)
        self.lepe = depthwise(dim, side_dwconv)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of an NHWC map, ``[B, H, W, C]`` each."""
        q, k, v = linear_1x1(self.qkv, x).chunk(3, dim=-1)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        """The output projection, on an NHWC map."""
        return linear_1x1(self.proj, x)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``, channels-last in memory."""
        q, k, v = self.project(to_nhwc(x))
        return to_nchw(self.finish(self.attend(q, k, v), self.enhance(v)))
