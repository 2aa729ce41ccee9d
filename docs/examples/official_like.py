"""A network as people have it: BiFormer-T around a routed attention written by hand, gather and attend.

From a checkout, ``python -m docs.examples.official_like`` replaces its twelve routed layers, shows what was
proved and what it gains; ``bratune profile --model docs.examples.official_like:make --input 1x3x224x224``
measures every layer by every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bratune


class QKVLinear(nn.Module):
    """Queries, keys and values by one linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to ``[B, H, W, 3 * dim]``."""
        out: Tensor = self.qkv(x)
        return out


class BiLevelRoutingAttention(nn.Module):
    """Routed attention under the official name, with its parameters: every region's keys are copied out."""

    def __init__(self, dim: int, num_heads: int, n_win: int, topk: int) -> None:
        super().__init__()
        self.n_win, self.num_heads, self.topk, self.scale = n_win, num_heads, topk, dim**-0.5
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim)
        self.qkv = QKVLinear(dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to ``[B, H, W, dim]``."""
        batch, height, width, dim = x.shape
        s, heads = self.n_win, self.num_heads
        q, k, v = self.qkv(x).chunk(3, -1)
        local = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = (
            t.reshape(batch, s, height // s, s, width // s, dim).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            for t in (q, k, v)
        )  # [B, S * S, tokens, dim]
        routes = (q.mean(2) @ k.mean(2).transpose(1, 2)).topk(self.topk, -1).indices
        images = torch.arange(batch, device=x.device)[:, None, None]
        k, v = (t[images, routes].flatten(2, 3) for t in (k, v))  # [B, S * S, topk * tokens, dim]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
        out = (self.scale * q @ k.transpose(-1, -2)).softmax(-1) @ v
        out = out.transpose(2, 3).reshape(batch, s, s, height // s, width // s, dim)
        merged: Tensor = self.wo(out.transpose(2, 3).reshape(batch, height, width, dim) + local)
        return merged


def make() -> nn.Module:
    """BiFormer-T with these layers in the place of ours, and the same weights."""
    model = bratune.create_model("biformer_tiny")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bratune.BiLevelRoutingAttention):
            by_hand = BiLevelRoutingAttention(layer.dim, layer.num_heads, layer.n_win, layer.topk)
            by_hand.load_state_dict(layer.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, by_hand)
    return model.eval()


def main() -> None:
    """Replace, compare, and time both in turn."""
    from torch.utils.benchmark import Timer

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    model, images = make(), torch.randn(1, 3, 224, 224)
    timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=threads)
    with torch.inference_mode():
        before = model(images)
        by_hand_ms = 1e3 * timer.blocked_autorange(min_run_time=5).median
    found = bratune.accelerate(model, images)
    print(found)
    with torch.inference_mode():
        after = model(images)
        accelerated_ms = 1e3 * timer.blocked_autorange(min_run_time=5).median
    print(f"outputs apart by {float((after - before).abs().max() / before.abs().max()):.1e} of the largest")
    print(f"{by_hand_ms:.1f} ms by hand, {accelerated_ms:.1f} ms replaced, {threads} threads")


if __name__ == "__main__":
    main()
