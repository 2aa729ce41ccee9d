"""Attention between two maps, on grids that are no squares, and on folded sequences and volumes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bratune
from bratune.errors import ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels import registry
from bratune.kernels.api import route, routed_attention
from bratune.kernels.cross import CrossBiLevelRoutingAttention

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-model.md"


def layer(**asked: Any) -> CrossBiLevelRoutingAttention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"num_heads": 2, "n_win": (2, 3), "topk": 2, "backend": "gather", **asked}
    return CrossBiLevelRoutingAttention(16, **given).double()


def region_numbers(height: int, width: int, region: tuple[int, int], columns: int) -> Tensor:
    """The region of every token of a map, row by row."""
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (rows // region[0] * columns + cols // region[1]).flatten()


def by_mask(module: CrossBiLevelRoutingAttention, x: Tensor, context: Tensor) -> Tensor:
    """The same by full attention under a mask, token by token, on maps that regions tile."""
    rows, columns = module.n_win
    numbers = [
        region_numbers(h, w, (h // rows, w // columns), columns)
        for h, w in (x.shape[1:3], context.shape[1:3])
    ]
    q = module.q(x).flatten(1, 2)
    k, v = (part.flatten(1, 2) for part in module.kv(context).split([module.qk_dim, module.dim], -1))
    means = [
        torch.stack([t[:, where == r].mean(1) for r in range(rows * columns)], 1)
        for t, where in zip((q, k), numbers, strict=True)
    ]
    routes = (means[0] @ means[1].transpose(1, 2)).topk(module.topk, -1).indices
    seen = torch.zeros(len(x), rows * columns, rows * columns, dtype=torch.bool).scatter_(2, routes, True)
    mask = seen[:, numbers[0]][:, :, numbers[1]]  # [B, queries, keys]
    out = []
    for heads in zip(*(t.chunk(module.num_heads, -1) for t in (q, k, v)), strict=True):
        logits = (module.scale * heads[0] @ heads[1].transpose(1, 2)).masked_fill(~mask, float("-inf"))
        out.append(logits.softmax(-1) @ heads[2])
    return module.wo(torch.cat(out, -1)).view(x.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_it_is_full_attention_under_the_mask_of_its_regions(backend: str) -> None:
    module = layer(context_dim=24)
    x = torch.randn(2, 4, 9, 16, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 8, 3, 24, dtype=torch.float64, requires_grad=True)
    expected = by_mask(module, x, context)
    single = backend in ("triton", "flex", "native")
    run = module.float() if single else module
    run.set_backend(backend)
    try:
        found = run(x.float(), context.float()) if single else run(x, context)
    except UnsupportedError as error:
        pytest.skip(str(error))
    apart = (found - expected).detach().abs().max() / expected.detach().abs().max()
    assert float(apart) < (1e-5 if single else 1e-12)
    along = torch.randn_like(expected)
    grads, wanted = (torch.autograd.grad(out, [x, context], along.to(out)) for out in (found, expected))
    for a, b in zip(grads, wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < (3e-5 if single else 1e-11)


def test_of_a_map_to_itself_it_is_the_official_layer() -> None:
    module, x = layer(n_win=3, auto_pad=True), torch.randn(2, 7, 8, 16, dtype=torch.float64)
    official = bratune.BiLevelRoutingAttention(
        16, num_heads=2, n_win=3, topk=2, side_dwconv=0, auto_pad=True, backend="gather"
    ).double()
    with torch.no_grad():
        official.qkv.qkv.weight.copy_(torch.cat([module.q.weight, module.kv.weight]))
        official.qkv.qkv.bias.copy_(torch.cat([module.q.bias, module.kv.bias]))
    official.wo.load_state_dict(module.wo.state_dict())
    torch.testing.assert_close(module(x), official(x))


def test_both_maps_are_padded_to_the_grid() -> None:
    module = layer(auto_pad=True)
    x, context = (torch.randn(1, *sides, 16, dtype=torch.float64) for sides in ((5, 7), (3, 8)))
    padded = [torch.nn.functional.pad(t, (0, 0, 0, w, 0, h)) for t, h, w in ((x, 1, 2), (context, 1, 1))]
    torch.testing.assert_close(module(x, context), by_mask(module, *padded)[:, :5, :7])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layer(topk=7), "top-7 of 2 x 3 regions; 1 to 6 would work"),
        (lambda: layer(num_heads=3), "3 heads do not divide 16 channels"),
        (lambda: layer()(torch.randn(1, 4, 8, 16)), "2 x 3 regions do not tile a 4x8 map; auto_pad=True"),
        (lambda: layer()(torch.randn(1, 4, 6, 16), torch.randn(1, 4, 6, 8)), "context must be a map"),
    ],
)
def test_what_does_not_fit_is_one_sentence(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        make()
    with pytest.raises(UnknownNameError):
        layer(backend="nonsense")


def recipes() -> list[str]:
    """The pieces of code of the page that fold something."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [code for code in found if "fold" in code]


def attended(x: Tensor, numbers: Tensor, count: int, topk: int) -> Tensor:
    """Routed attention of tokens ``[B, N, C]`` with one head, by the region of every token."""
    means = torch.stack([x[:, numbers == r].mean(1) for r in range(count)], 1)
    routes = (means @ means.transpose(1, 2)).topk(topk, -1).indices
    seen = torch.zeros(len(x), count, count, dtype=torch.bool).scatter_(2, routes, True)
    mask = seen[:, numbers][:, :, numbers]
    logits = (x.shape[-1] ** -0.5 * x @ x.transpose(1, 2)).masked_fill(~mask, float("-inf"))
    out: Tensor = logits.softmax(-1) @ x
    return out


def test_the_recipes_of_the_page_fold_sequences_and_volumes_exactly() -> None:
    sequence, volume = recipes()
    names: dict[str, Any] = {"S": 4}
    exec(sequence, names)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    folded = names["fold"](x)
    routes = route(folded, folded, region=(1, 5), topk=2)
    out = routed_attention(folded, folded, folded, routes, heads=1, region=(1, 5), backend="gather")
    torch.testing.assert_close(names["unfold"](out), attended(x, torch.arange(20) // 5, 4, 2))

    names = {"d": 2, "h": 3, "w": 1}
    exec(volume, names)
    x = torch.randn(2, 4, 6, 3, 8, dtype=torch.float64)
    folded = names["fold"](x)
    routes = route(folded, folded, region=(1, 6), topk=3)
    out = routed_attention(folded, folded, folded, routes, heads=1, region=(1, 6), backend="gather")
    d, h, w = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(3), indexing="ij")
    numbers = ((d // 2 * 2 + h // 3) * 3 + w).flatten()
    expected = attended(x.flatten(1, 3), numbers, 12, 3).view(x.shape)
    torch.testing.assert_close(names["unfold"](out, x.shape), expected)
