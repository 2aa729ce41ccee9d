"""The routing kernels agree with plain PyTorch, to the bit where the arithmetic is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, library

from bratune.errors import ProblemError, UnsupportedError
from bratune.kernels.fused import route as rf
from bratune.kernels.routing import region_means, route

pytestmark = pytest.mark.usefixtures("poisoned")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers: their products are exact in float32, and ties are many."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def routes_of(affinity: Tensor, topk: int) -> Tensor:
    """The rule: descending, of equal entries the lowest index first, NaN above all."""
    return affinity.sort(dim=-1, descending=True, stable=True).indices[..., :topk]


def mask_of(routes: Tensor, kv_regions: int) -> Tensor:
    words = math.ceil(kv_regions / 64)
    chosen = torch.zeros(*routes.shape[:2], words * 64, dtype=torch.int64, device=routes.device)
    chosen.scatter_(-1, routes, 1)
    bit = torch.arange(64, device=routes.device)
    return (chosen.view(*routes.shape[:2], words, 64) << bit).sum(-1)


def inverse_of(routes: Tensor, kv_regions: int) -> tuple[Tensor, Tensor]:
    flat = routes.flatten(1)
    order = flat.sort(dim=1, stable=True)
    region = torch.arange(kv_regions + 1, device=routes.device).expand(len(flat), -1).contiguous()
    return torch.searchsorted(order.values, region).int(), (order.indices // routes.shape[2]).int()


def assert_equals_sorting(q: Tensor, k: Tensor, topk: int) -> None:
    found = rf.route_by_means(q, k, topk=topk)
    expected = routes_of(q @ k.transpose(1, 2), topk)
    assert torch.equal(found.routes, expected)
    assert torch.equal(found.mask, mask_of(expected, k.shape[1]))
    starts, entries = inverse_of(expected, k.shape[1])
    assert torch.equal(found.starts, starts)
    assert torch.equal(found.entries, entries)


@pytest.mark.parametrize(
    ("regions", "kv_regions", "channels", "topk"),
    [
        (49, 49, 64, 1),
        (49, 49, 96, 4),
        (49, 49, 40, 16),
        (49, 49, 33, 49),
        (1, 1, 32, 1),
        (64, 64, 16, 8),
        (12, 49, 16, 3),
        (49, 12, 16, 12),
    ],
)
def test_routes_and_maps_equal_sorting(
    regions: int, kv_regions: int, channels: int, topk: int, device: str
) -> None:
    q, k = whole_numbers(2, regions, channels), whole_numbers(2, kv_regions, channels, seed=1)
    q, k = q.to(device), k.to(device)
    assert_equals_sorting(q, k, topk)


@pytest.mark.parametrize(
    ("regions", "kv_regions", "topk"), [(65, 65, 16), (65, 65, 65), (256, 256, 8), (17, 289, 4)]
)
def test_many_regions_are_routed_in_blocks(regions: int, kv_regions: int, topk: int, device: str) -> None:
    q, k = whole_numbers(1, regions, 32).to(device), whole_numbers(1, kv_regions, 32, seed=1).to(device)
    assert_equals_sorting(q, k, topk)


def test_of_equal_affinities_the_lowest_region_comes_first(device: str) -> None:
    zeros = torch.zeros(1, 49, 32, device=device)
    found = rf.route_by_means(zeros, zeros, topk=4)
    assert torch.equal(found.routes, torch.arange(4, device=device).expand(1, 49, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**100, -0.0])
def test_extreme_affinities_keep_the_order_of_torch_and_the_range(value: float, device: str) -> None:
    q, k = whole_numbers(1, 20, 16), whole_numbers(1, 20, 16, seed=1)
    q[0, 3, 2] = q[0, 7] = value
    k[0, 5, 1] = value
    q, k = q.to(device), k.to(device)
    found = rf.route_by_means(q, k, topk=20)
    assert torch.equal(found.routes.sort(-1).values, torch.arange(20, device=device).expand(1, 20, 20))
    affinity = (q[..., None, :] * k[:, None]).sum(-1)
    assert torch.equal(found.routes, routes_of(affinity, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "region"),
    [((14, 14), (2, 2)), ((15, 13), (4, 3)), ((9, 9), (8, 8)), ((3, 5), (4, 6)), ((7, 6), (1, 1))],
    ids=["tiled", "ragged", "nearly empty edge", "region larger than the map", "single tokens"],
)
def test_region_means_count_real_tokens_only(
    size: tuple[int, int], region: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    x = normal(2, *size, 40).to(device, dtype)
    found, empty = rf.region_means(x, region=region)
    torch.testing.assert_close(found, region_means(x.double(), region).float(), rtol=1e-5, atol=1e-6)
    assert empty.shape == (2, 0, 40)


def test_means_of_slices_of_a_packed_and_of_a_channels_first_map(device: str) -> None:
    packed = normal(2, 6, 6, 3 * 80).to(device)
    q, k = packed[..., :80], normal(2, 80, 4, 9, seed=1).to(device).permute(0, 2, 3, 1)
    found = rf.region_means(q, k, region=(2, 3), kv_region=(3, 2))
    for means, x, region in zip(found, (q, k), ((2, 3), (3, 2)), strict=True):
        torch.testing.assert_close(means, region_means(x.double(), region).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "region", "topk"), [((14, 14), (2, 2), 16), ((15, 13), (4, 3), 3), ((8, 8), (8, 8), 1)]
)
def test_router_gives_the_routes_of_the_torch_router(
    size: tuple[int, int], region: tuple[int, int], topk: int, device: str
) -> None:
    qkv = normal(2, *size, 3 * 48).to(device)
    q, k = qkv[..., :48], qkv[..., 48:96]
    expected = route(q.double(), k.double(), region=region, topk=topk, backend="torch")
    found = route(q, k, region=region, topk=topk, backend="triton")
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_no_gradient_flows(device: str) -> None:
    q = normal(1, 8, 8, 16).to(device).requires_grad_()
    found = rf.route_fused(q, q, region=(4, 4), topk=2)
    assert not any(x.requires_grad for x in found)


def test_operators_are_well_formed(device: str) -> None:
    x = normal(1, 6, 6, 16).to(device)
    library.opcheck(torch.ops.bratune.region_means.default, (x, x, [2, 2], [3, 3]))
    means = normal(1, 9, 16).to(device), normal(1, 4, 16).to(device)
    for maps in (True, False):
        library.opcheck(torch.ops.bratune.route.default, (*means, 2, maps))


def test_compiled_code_holds_one_graph(device: str) -> None:
    x = normal(1, 4, 4, 32).to(device)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    found = compiled(x, x, region=(2, 2), topk=2, backend="triton")
    assert torch.equal(found, route(x, x, region=(2, 2), topk=2, backend="triton"))


@pytest.mark.gpu
def test_routing_is_captured_in_a_graph_and_follows_new_inputs() -> None:
    x = normal(2, 14, 14, 96).cuda()
    q, k = x[..., :32], x[..., 32:64]
    rf.route_fused(q, k, region=(2, 2), topk=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rf.route_fused(q, k, region=(2, 2), topk=4)
    x.copy_(normal(2, 14, 14, 96, seed=1))
    graph.replay()
    expected = rf.route_fused(q, k, region=(2, 2), topk=4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_reasons_are_all_told() -> None:
    x = torch.empty(1, 40, 40, 8, dtype=torch.float64, device="meta")
    with pytest.raises(UnsupportedError, match=r"float64.*1600 key regions"):
        rf.route_fused(x, x, region=(1, 1), topk=1)


@pytest.mark.parametrize("topk", [0, 5])
def test_topk_out_of_range_names_the_range(topk: int) -> None:
    means = torch.zeros(1, 4, 8)
    with pytest.raises(ProblemError, match="1 to 4"):
        rf.route_by_means(means, means, topk=topk)


def test_flops_are_those_of_the_affinity_product() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    means = torch.zeros(2, 9, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        rf.route_by_means(means, means, topk=2)
    assert counter.get_total_flops() == 2 * 2 * 9 * 9 * 16
