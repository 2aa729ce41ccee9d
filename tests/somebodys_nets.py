"""Networks of somebody else, in the styles in which routed attention is pasted into them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BiLevelRoutingAttention",
    "ConvolvedBRA",
    "UNetLike",
    "YOLOLike",
    "attend",
    "make_unet",
    "make_yolo",
]


class QKV(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, side: int, topk: int, heads: int, scale: float) -> Tensor:
    """Routed attention on NHWC maps, region after region."""
    height, width = q.shape[1] // side, q.shape[2] // side

    def regions(x: Tensor) -> Tensor:
        split = x.unfold(1, height, height).unfold(2, width, width)  # [B, S, S, C, h, w]
        return split.flatten(1, 2).flatten(3).transpose(2, 3)  # [B, R, T, C]

    rq, rk, rv = map(regions, (q, k, v))
    routes = (rq.mean(2) @ rk.mean(2).transpose(1, 2)).topk(topk, -1).indices
    out = torch.zeros_like(q)
    for image in range(len(q)):
        for region in range(side * side):
            keys, values = (x[image, routes[image, region]].flatten(0, 1) for x in (rk, rv))
            parts = []
            for head in range(heads):
                some = slice(head * q.shape[3] // heads, (head + 1) * q.shape[3] // heads)
                logits = scale * rq[image, region][:, some] @ keys[:, some].T
                parts.append(logits.softmax(-1) @ values[:, some])
            row, col = region // side * height, region % side * width
            done = torch.cat(parts, -1).view(height, width, -1)
            out[image, row : row + height, col : col + width] = done
    return out


class BiLevelRoutingAttention(nn.Module):
    """An attention under the official name, as people paste it: ``nchw`` outside, padding, another scale."""

    def __init__(
        self, dim: int, *, outside: str = "nhwc", factor: float = 1.0, auto_pad: bool = False
    ) -> None:
        super().__init__()
        self.n_win, self.num_heads, self.topk, self.scale = 2, 2, 2, dim**-0.5
        self.outside, self.factor, self.auto_pad = outside, factor, auto_pad
        self.lepe = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.qkv = QKV(dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.outside == "nchw":
            x = x.permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        if self.auto_pad:
            x = F.pad(x, (0, 0, 0, -width % 2, 0, -height % 2))
        q, k, v = self.qkv(x).chunk(3, -1)
        out = attend(q, k, v, 2, self.topk, self.num_heads, self.scale * self.factor)
        out = self.wo(out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))[:, :height, :width]
        return out.permute(0, 3, 1, 2) if self.outside == "nchw" else out  # type: ignore[no-any-return]


class GatheredBRA(BiLevelRoutingAttention):
    """The same with pooled keys, or with keys and values weighed by how well their region fits."""

    def __init__(
        self, dim: int, *, pool: nn.Module | None = None, soft: bool = False, diff: bool = False
    ) -> None:
        super().__init__(dim)
        self.kv_down, self.soft_routing, self.diff_routing = pool or nn.Identity(), soft, diff

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        sides = height // 2, width // 2

        def regions(t: Tensor) -> Tensor:
            return t.unfold(1, *sides[:1] * 2).unfold(2, *sides[1:] * 2).flatten(1, 2)  # [B, R, C, h, w]

        rq, rk, rv = map(regions, (q, k, v))
        means = [t.mean((3, 4)) if self.diff_routing else t.mean((3, 4)).detach() for t in (rq, rk)]
        fits = self.scale * means[0] @ means[1].transpose(1, 2)
        weights, routes = fits.topk(self.topk, -1)
        rk, rv = (self.kv_down(t.flatten(0, 1)).unflatten(0, (batch, -1)).flatten(3) for t in (rk, rv))
        images = torch.arange(batch)[:, None, None]
        rk, rv = (t[images, routes] for t in (rk, rv))  # [B, R, topk, C, tokens]
        if self.soft_routing:
            rk, rv = (weights.softmax(-1)[..., None, None] * t for t in (rk, rv))
        heads = (batch, 4, self.num_heads, dim // self.num_heads)
        rq = rq.reshape(*heads, -1)
        rk, rv = (t.transpose(2, 3).reshape(*heads, -1) for t in (rk, rv))
        out = rv @ (self.scale * rk.transpose(-1, -2) @ rq).softmax(-2)
        out = out.reshape(batch, 2, 2, dim, *sides).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)
        local = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.wo(out + local)  # type: ignore[no-any-return]


class ConvolvedBRA(nn.Module):
    """The NCHW layer of the refactoring, under another name; ``drops`` what regions do not tile."""

    def __init__(self, dim: int, *, drops: bool = False) -> None:
        super().__init__()
        self.drops = drops
        self.n_win, self.num_heads, self.topk, self.scale = 2, 2, 2, dim**-0.5
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim)
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape[2] % 2 or x.shape[3] % 2) and not self.drops:
            raise ValueError("a map of 2 x 2 regions has an even side")
        q, k, v = self.qkv_linear(x).permute(0, 2, 3, 1).chunk(3, -1)
        out = attend(q, k, v, 2, self.topk, self.num_heads, self.scale).permute(0, 3, 1, 2)
        return self.output_linear(out + self.lepe(v.permute(0, 3, 1, 2)))  # type: ignore[no-any-return]


class YOLOLike(nn.Module):
    """A neck with the attention in a branch, and its batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU())
        self.c2f = nn.ModuleList([BiLevelRoutingAttention(8, outside="nchw"), ConvolvedBRA(8)])
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).chunk(2, 1)
        return self.head(torch.cat([self.c2f[0](one), self.c2f[1](two)], 1))  # type: ignore[no-any-return]


class UNetLike(nn.Module):
    """Down, attend, up and add: an NHWC layer on a map that S does not divide, and one that is shared."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 2, 2)
        self.attn = BiLevelRoutingAttention(8, auto_pad=True)
        self.again = self.attn
        self.alike = BiLevelRoutingAttention(8, auto_pad=True, factor=factor)
        self.up = nn.ConvTranspose2d(8, 1, 2, 2)
        self.unused = BiLevelRoutingAttention(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).permute(0, 2, 3, 1)
        x = x + self.again(x + self.attn(x))
        return self.up((x + self.alike(x)).permute(0, 3, 1, 2))  # type: ignore[no-any-return]


def make_yolo() -> nn.Module:
    return YOLOLike()


def make_unet() -> nn.Module:
    return UNetLike(factor=1.01)
