"""Routing by the means of the input gives the routes of queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bratune.errors import ProblemError
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bratune.kernels.routing import route_pooled


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("size", "n_win"), [((14, 14), 7), ((13, 10), 4)], ids=["tiled", "padded"])
@pytest.mark.parametrize("qk_dim", [32, 64])
def test_routes_of_the_nhwc_layer_are_equal(size: tuple[int, int], n_win: int, qk_dim: int) -> None:
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(32, 4, n_win, qk_dim=qk_dim, topk=3, auto_pad=True).double()
    x = normal(2, *size, 32)
    padded = layer.pad(x)
    q, k, _ = layer.project(padded)
    assert torch.equal(layer.route_pooled(padded), layer.route(q, k))
    expected = layer(x)
    layer.pooled_routing = True
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("size", [(14, 14), (13, 10)], ids=["tiled", "ragged"])
def test_routes_of_the_nchw_layer_are_equal(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = NCHWBiLevelRoutingAttention(32, 4, 4, topk=3).double()
    x = normal(2, 32, *size)
    inside = x.permute(0, 2, 3, 1)
    q, k, _ = layer.project(inside)
    assert torch.equal(layer.route_pooled(inside), layer.route(q, k))
    expected = layer(x)
    layer.pooled_routing = True
    torch.testing.assert_close(layer(x), expected)


def test_the_option_adds_nothing_to_the_weights() -> None:
    plain, pooled = (BiLevelRoutingAttention(32, 4, pooled_routing=on) for on in (False, True))
    assert plain.state_dict().keys() == pooled.state_dict().keys()


def test_reduced_precision_and_autocast_route_as_float32_does() -> None:
    x, weight, bias = normal(2, 14, 14, 32).bfloat16(), normal(64, 32).bfloat16(), normal(64).bfloat16()
    exact = route_pooled(x.double(), weight.double(), bias.double(), region=(2, 2), topk=4)
    assert torch.equal(route_pooled(x, weight, bias, region=(2, 2), topk=4), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(route_pooled(x, weight, bias, region=(2, 2), topk=4), exact)


@pytest.mark.interpreter
def test_the_triton_router_gives_the_same_routes() -> None:
    x, weight = normal(1, 8, 6, 16, dtype=torch.float32), normal(32, 16, dtype=torch.float32)
    expected = route_pooled(x.double(), weight.double(), None, region=(2, 2), topk=3)
    assert torch.equal(route_pooled(x, weight, None, region=(2, 2), topk=3, backend="triton"), expected)


def test_gradients_of_the_layer_do_not_need_the_routes() -> None:
    layer = BiLevelRoutingAttention(16, 2, 2, topk=2, pooled_routing=True)
    layer(normal(1, 4, 4, 16, dtype=torch.float32)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_weights_of_soft_routing_are_refused() -> None:
    with pytest.raises(ProblemError, match="soft_routing"):
        BiLevelRoutingAttention(16, 2, soft_routing=True, pooled_routing=True)


def test_topk_out_of_range_names_the_range() -> None:
    with pytest.raises(ProblemError, match="1 to 4"):
        route_pooled(normal(1, 4, 4, 8), normal(16, 8), None, region=(2, 2), topk=5)
