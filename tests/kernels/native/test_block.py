"""The C kernels around attention equal PyTorch's, alone and in the runtime, whatever the variant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from bratune.kernels.biformer import biformer_tiny
from bratune.kernels.native import block
from bratune.kernels.native import library as native
from bratune.kernels.native.library import Library, find
from bratune.kernels.routing import region_means, route
from bratune.kernels.runtime import FastModel, optimize

FOUND = find()
RUNNABLE = FOUND.runnable if isinstance(FOUND, Library) else ()
pytestmark = pytest.mark.skipif(not RUNNABLE, reason=str(FOUND))

# Of the largest value; 16-bit results are rounded once.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=RUNNABLE)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    number = native.variant_number(name)
    monkeypatch.setattr(block, "variant_number", lambda _: number)
    return name


def assert_close(found: Tensor, true: Tensor) -> None:
    error = float((found.double() - true.double()).abs().max() / true.double().abs().max())
    assert error <= TOLERANCES[found.dtype], error


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("channels", [64, 72, 5])
def test_layer_norm(variant: str, dtype: torch.dtype, channels: int) -> None:
    x, weight, bias = normal(2, 5, 7, channels, dtype=dtype) + 3, normal(channels), normal(channels + 0)
    true = F.layer_norm(x.double(), (channels,), weight.double(), bias.double(), 1e-6)
    assert_close(block.layer_norm(x, weight, bias, eps=1e-6), true)
    plain = F.layer_norm(x.double(), (channels,), None, None, 1e-6)
    assert_close(block.layer_norm(x, None, None, eps=1e-6), plain)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("size", [(9, 21), (2, 1), (7, 7)], ids=str)
def test_depthwise(variant: str, dtype: torch.dtype, side: int, size: tuple[int, int]) -> None:
    packed = normal(2, *size, 3 * 32, dtype=dtype)
    x, add = packed[..., 32:64], normal(2, *size, 32, dtype=dtype)
    weight, bias = normal(32, 1, side, side), normal(32)
    conv = F.conv2d(
        x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), padding=side // 2, groups=32
    ).permute(0, 2, 3, 1)
    strips = block.pack_depthwise(weight)
    assert_close(block.depthwise(x, strips, bias, add=add), conv + add.double())
    assert_close(block.depthwise(x, strips, None), conv - bias.double())
    into = add.clone()
    assert block.depthwise(x, strips, bias, add=into, out=into) is into
    assert_close(into, conv + add.double())


@pytest.mark.parametrize(
    ("size", "region", "topk"), [((8, 12), (2, 4), 5), ((7, 10), (3, 4), 3), ((6, 6), (6, 6), 1)]
)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_routing(
    variant: str, dtype: torch.dtype, size: tuple[int, int], region: tuple[int, int], topk: int
) -> None:
    q, k = normal(2, *size, 3 * 40, dtype=dtype)[..., :80].chunk(2, -1)
    found = block.route(q, k, region=region, topk=topk)
    true = route(q.double(), k.double(), region=region, topk=topk)
    assert torch.equal(found, true)


def test_routes_at_ties_and_nan_are_those_of_the_lowest_and_of_nan(variant: str) -> None:
    q, k = torch.ones(1, 4, 8, 16), torch.ones(1, 4, 8, 16)
    assert block.route(q, k, region=(2, 2), topk=3).tolist() == [[[0, 1, 2]] * 8]
    k[0, 0, 5] = torch.nan
    assert block.route(q, k, region=(2, 2), topk=3).tolist() == [[[2, 0, 1]] * 8]


def test_keys_may_have_regions_of_their_own(variant: str) -> None:
    q, k = normal(1, 8, 8, 32), normal(1, 6, 9, 32)
    found = block.route(q, k, region=(4, 4), kv_region=(2, 3), topk=4)
    assert torch.equal(found, route(q, k, region=(4, 4), kv_region=(2, 3), topk=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_attention_is_routed_attention_with_one_region(dtype: torch.dtype) -> None:
    q, k, v = normal(2, 7, 7, 3 * 128, dtype=dtype).chunk(3, -1)
    a, b, c = (t.double().reshape(2, 49, 2, 64).transpose(1, 2) for t in (q, k, v))
    true = F.scaled_dot_product_attention(a, b, c, scale=0.3).transpose(1, 2).reshape(2, 7, 7, 128)
    found = block.attend_fully(q, k, v, heads=2, scale=0.3)
    assert_close(found, true)


def test_the_operators_pass_the_checks_of_pytorch() -> None:
    x, weight = normal(1, 6, 6, 32), normal(32)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.bratune
    library.opcheck(ops.native_layer_norm.default, (x, weight, None, 1e-6), test_utils=checks)
    library.opcheck(ops.native_depthwise.default, (x, normal(9, 32), weight, x), test_utils=checks)
    library.opcheck(ops.native_route.default, (x, x, (2, 2), (2, 2), 3), test_utils=checks)


def test_the_runtime_uses_them_and_gives_the_scores_of_the_model() -> None:
    torch.manual_seed(0)
    model = biformer_tiny(num_classes=10, depth=(1, 1, 1, 1), n_win=2, topks=(1, 2, 3, -2)).eval()
    x = torch.randn(2, 3, 64, 64)
    from torch.profiler import ProfilerActivity, profile

    plain, fast = FastModel(model, native=False), optimize(model)
    with torch.no_grad():
        true = model(x)
        torch.testing.assert_close(fast(x), true, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(x), true, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(
            FastModel(model, pack=False, native=True), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(compiled(x), true, rtol=1e-4, atol=1e-4)
    sdpa = []
    for runner in (plain, fast):
        with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
            runner(x)
        sdpa.append(sum(event.key == "aten::scaled_dot_product_attention" for event in seen.key_averages()))
    assert sdpa[0] > 0
    assert sdpa[1] == 0


def test_a_named_backend_stays_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = biformer_tiny(num_classes=10, n_win=2, topks=(1, 2, 3, -2), backend="gather").eval()
    monkeypatch.setattr(block, "attend", lambda *_, **__: pytest.fail("gather was asked for"))
    with torch.no_grad():
        optimize(model)(torch.randn(1, 3, 64, 64))


def test_region_means_of_bfloat16_are_rounded_once() -> None:
    x = normal(2, 8, 12, 16, dtype=torch.bfloat16)
    true = F.avg_pool2d(x.double().permute(0, 3, 1, 2), (4, 6)).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(region_means(x, (4, 6)), true.bfloat16())
