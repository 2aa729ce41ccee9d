"""Level one and the permutations: region means, routes, maps to regions and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.errors import ProblemError, UnknownNameError
from bratune.kernels import layout
from bratune.kernels.api import route
from bratune.kernels.routing import multiplicity_bias, region_means
from bratune.problem import Problem

MAPS = [((8, 8), (4, 4)), ((6, 9), (2, 3)), ((13, 11), (4, 4)), ((7, 5), (7, 5)), ((9, 9), (8, 8))]
map_ids = [f"{h}x{w}-r{rh}x{rw}" for (h, w), (rh, rw) in MAPS]


def noise(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def official_means(x: Tensor, region: tuple[int, int]) -> Tensor:
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), region, region, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("size", "region"), MAPS, ids=map_ids)
def test_region_means_are_those_of_the_real_tokens(size: tuple[int, int], region: tuple[int, int]) -> None:
    x = noise(2, *size, 6)
    torch.testing.assert_close(region_means(x, region), official_means(x, region), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("region", [(16, 16), (24, 24)], ids=["tiled", "padded"])
def test_half_precision_means_are_rounded_once(dtype: torch.dtype, region: tuple[int, int]) -> None:
    x = (noise(1, 32, 32, 4) + 300).to(dtype)  # a sum over a region is beyond float16
    exact = official_means(x.double(), region)
    one_rounding = 0.51 * torch.finfo(dtype).eps * exact.abs()
    assert ((region_means(x, region).double() - exact).abs() <= one_rounding).all()


@pytest.mark.parametrize(("size", "region"), MAPS, ids=map_ids)
@pytest.mark.parametrize("strides", ["nhwc", "nchw", "slices of qkv"])
def test_routes_are_the_largest_affinities_best_first(
    size: tuple[int, int], region: tuple[int, int], strides: str
) -> None:
    q, k = noise(2, *size, 6), noise(2, *size, 6, seed=1)
    affinity = official_means(q, region) @ official_means(k, region).transpose(1, 2)
    topk = min(3, affinity.shape[-1])
    if strides == "nchw":
        q, k = (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for x in (q, k))
    elif strides == "slices of qkv":
        q, k, _ = torch.cat([q, k, k], dim=-1).chunk(3, dim=-1)
    found = route(q, k, region=region, topk=topk)
    assert found.dtype == torch.int64
    assert torch.equal(found, affinity.topk(topk).indices)


def test_routes_carry_no_gradient() -> None:
    q = noise(1, 8, 8, 4).requires_grad_()
    assert not route(q, q, region=(4, 4), topk=2).requires_grad


def test_keys_may_have_regions_of_their_own() -> None:
    q, k = noise(1, 8, 8, 4), noise(1, 6, 4, 4, seed=1)
    affinity = official_means(q, (4, 4)) @ official_means(k, (2, 2)).transpose(1, 2)
    found = route(q, k, region=(4, 4), kv_region=(2, 2), topk=2)
    assert torch.equal(found, affinity.topk(2).indices)


def test_routes_are_in_range_whatever_the_inputs_hold() -> None:
    q = noise(1, 8, 8, 4)
    q[0, 0, 0] = torch.nan
    q[0, 7, 7] = torch.inf
    found = route(q, q, region=(2, 2), topk=4)
    assert found.min() >= 0
    assert found.max() < 16
    assert (found.sort(-1).values.diff(dim=-1) > 0).all(), "a region twice in one row"


@pytest.mark.parametrize("topk", [0, 5])
def test_topk_must_fit_the_regions(topk: int) -> None:
    q = noise(1, 8, 8, 4)
    with pytest.raises(ProblemError, match=f"top-k {topk} of 4 key regions; 1 to 4 would work"):
        route(q, q, region=(4, 4), topk=topk)


def test_channels_of_q_and_k_must_agree() -> None:
    with pytest.raises(ProblemError, match="same B and C"):
        route(noise(1, 8, 8, 4), noise(1, 8, 8, 6), region=(4, 4), topk=1)


def test_an_unknown_router_is_named() -> None:
    q = noise(1, 8, 8, 4)
    with pytest.raises(UnknownNameError, match="no router is called 'cuda'"):
        route(q, q, region=(4, 4), topk=1, backend="cuda")


@pytest.mark.parametrize(("size", "region"), MAPS, ids=map_ids)
def test_regions_come_back_as_the_map(size: tuple[int, int], region: tuple[int, int]) -> None:
    x = noise(2, *size, 6)
    assert torch.equal(layout.from_regions(layout.to_regions(x, region), *size, region), x)
    assert torch.equal(layout.from_head_regions(layout.to_head_regions(x, region, 3), *size, region), x)


@pytest.mark.parametrize(("size", "region"), MAPS, ids=map_ids)
def test_padding_is_zero_and_marked(size: tuple[int, int], region: tuple[int, int]) -> None:
    regions = layout.to_regions(torch.ones(1, *size, 1), region)[0, :, :, 0]
    valid = layout.valid_tokens(*size, region, regions.device)
    assert torch.equal(regions, valid.float())
    assert valid.sum() == size[0] * size[1]
    assert valid.any(1).all(), "a region without a real token"


def test_regions_and_tokens_are_numbered_row_by_row() -> None:
    ids = layout.token_ids(4, 4, (2, 2), torch.device("cpu"))
    assert ids.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_numbers_of_regions_spread_to_tokens() -> None:
    assert layout.spread(torch.tensor([5, 7]), 1, 3, (1, 2)).tolist() == [5, 5, 7]


def test_flat_routes_count_through_images_and_heads() -> None:
    routes = torch.tensor([[[0], [2]], [[1], [0]]])
    assert layout.flat_routes(routes, 3).tolist() == [[[0], [2]], [[4], [3]]]
    per_head = torch.zeros(2, 3, 1, 1, dtype=torch.int32)
    assert layout.flat_routes(per_head, 4).flatten().tolist() == [0, 4, 8, 12, 16, 20]


def test_multiplicity_is_a_logarithm() -> None:
    problem = Problem(batch=1, height=1, width=3, heads=1, head_dim=1, region=(1, 1), topk=2)
    bias = multiplicity_bias(torch.tensor([[[0, 1], [2, 2], [1, 0]]]), problem, torch.float64)
    assert bias.exp()[0, 0].tolist() == [[1, 1, 0], [0, 0, 2], [1, 1, 0]]
