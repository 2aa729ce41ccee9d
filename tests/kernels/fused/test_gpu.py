"""The fused kernels on a GPU: every family, dtype and stage, large tensors and grids, graphs, compilers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fused_cases import LAYOUTS, ROUTES, Case, assert_right, errors, fused, reference, sample, with_pairs
from torch import Tensor

pytest.importorskip("triton")

from bratune import machine as machines
from bratune.kernels.api import routed_attention
from bratune.kernels.fused.backend import TritonBackend
from bratune.measure import gate
from bratune.problem import Problem
from bratune.variant import get_variant, stages

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "float16", "bfloat16")
REGIONS = (
    Case(batch=2, heads=2, map=(24, 24), region=(8, 8), topk=1),
    Case(batch=2, heads=4, map=(28, 28), region=(4, 4), topk=4),
    Case(batch=2, heads=8, map=(14, 14), region=(2, 2), topk=16),
    Case(batch=2, heads=2, map=(7, 7), region=(1, 1), topk=5),
    Case(batch=2, heads=2, map=(21, 28), region=(7, 7), topk=3),
    Case(batch=2, heads=2, map=(15, 20), region=(3, 5), topk=7),
    Case(batch=1, heads=2, map=(39, 42), region=(13, 21), topk=2),
    Case(batch=1, heads=2, map=(48, 32), region=(16, 16), topk=4),
    Case(batch=1, heads=1, map=(85, 142), region=(85, 71), topk=2, head_dim=20),
)
RAGGED = tuple(
    Case(batch=2, heads=2, padding=padding, **shape)
    for padding in ("zeros", "masked")
    for shape in (
        {"map": (15, 13), "region": (4, 3)},
        {"map": (9, 9), "region": (8, 8), "topk": 2},
        {"map": (5, 5), "region": (8, 8), "topk": 1},
        {"map": (50, 37), "region": (8, 8), "topk": 5},
        {"map": (12, 12), "region": (3, 3), "kv_map": (17, 19), "kv_region": (2, 5), "topk": 4},
    )
)


@pytest.fixture(autouse=True)
def _float32_means_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", with_pairs(*REGIONS, *RAGGED), ids=str)
def test_every_family_agrees_with_the_reference(case: Case, dtype: str) -> None:
    assert_right(case.replace(dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    with_pairs(*(Case(map=(8, 16), head_dim=d, heads=2) for d in (8, 16, 24, 32, 40, 48, 64, 96, 128))),
    ids=str,
)
def test_every_size_of_a_head_agrees_with_the_reference(case: Case, dtype: str) -> None:
    assert_right(case.replace(dtype=dtype), "cuda")


@pytest.mark.parametrize(
    "case",
    with_pairs(
        *(Case(batch=2, map=(16, 16), heads=2, layout=layout) for layout in LAYOUTS),
        *(Case(batch=2, map=(16, 16), heads=2, routes=routes) for routes in ROUTES),
        *(Case(batch=2, map=(16, 16), heads=2, topk=1, routes=routes) for routes in ROUTES[:6]),
        Case(map=(16, 16), heads=2, expanded_grad=True),
    ),
    ids=str,
)
def test_layouts_and_routes_agree_with_the_reference(case: Case) -> None:
    assert_right(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routes", ["hub", "random", "half_unchosen", "per_head"])
@pytest.mark.parametrize(("backward", "topk", "chunk"), [("key", 1, 2), ("key", 1, 9), ("gather", 3, 8)])
def test_hubs_that_are_split_agree_with_the_reference(
    backward: str, topk: int, chunk: int, routes: str, dtype: str
) -> None:
    case = Case(batch=2, heads=2, map=(30, 27), region=(4, 4), topk=topk, routes=routes, dtype=dtype)
    assert_right(case.replace(config=(("backward", backward), ("dkv_chunk", chunk))), "cuda")


@pytest.mark.parametrize("case", with_pairs(*REGIONS[:4]), ids=str)
def test_tf32_is_used_where_pytorch_may_and_is_as_exact_as_it_can_be(case: Case) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    s = sample(case, "cuda")
    found = errors(fused(case, s), reference(case, s))
    assert found["out"] > 1e-5, "TF32 was not used"
    assert max(found.values()) < 2e-3


def test_a_product_of_four_rows_is_right() -> None:
    config = (("forward", "stationary"), ("fwd_block_m", 4))
    for dtype in DTYPES:
        assert_right(REGIONS[2].replace(config=config, dtype=dtype), "cuda")


def published() -> Iterator[tuple[str, Problem]]:
    small = get_variant("biformer_small")
    for height, width, batch, n_win in ((224, 224, 128, 7), (512, 512, 16, 8), (800, 1333, 2, 16)):
        for stage in stages(small, height, width, batch=batch, n_win=n_win, dtype="bfloat16")[:3]:
            assert stage.problem is not None
            yield f"{height}x{width}-s{stage.index}", stage.problem.replace(direction="fwd-bwd")


def tensors(p: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slices of one packed tensor, and routes without repetition."""
    rng = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, p.dtype)
    packed = torch.randn(
        p.batch, p.height, p.width, 3 * p.channels, generator=rng, device="cuda", dtype=dtype
    )
    q, k, v = packed.chunk(3, -1)
    scores = torch.rand(p.batch, p.regions, p.kv_regions, generator=rng, device="cuda")
    return q, k, v, scores.topk(p.topk, -1).indices


@pytest.mark.parametrize(("name", "problem"), list(published()), ids=lambda x: x if type(x) is str else "")
def test_every_published_stage_passes_the_gate_in_every_configuration(name: str, problem: Problem) -> None:
    q, k, v, routes = tensors(problem)
    for config in TritonBackend().configs(problem, machines.detect("cuda")):
        result = gate.check(TritonBackend(), problem, q, k, v, routes, config=config)
        assert result.ok, f"{config}: {result.reason}"


@pytest.mark.parametrize(
    "case",
    with_pairs(Case(batch=2, heads=8, map=(14, 14), region=(2, 2), topk=16, dtype="bfloat16")),
    ids=str,
)
def test_two_runs_give_the_same_bits(case: Case) -> None:
    s = sample(case, "cuda")
    first, second = fused(case, s), fused(case, s)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- sizes beyond 16 and 32 bits --------------------------------------------------------------------


def test_grids_of_more_than_65535_programs_are_computed_to_the_end() -> None:
    p = Problem(batch=4096, height=4, width=4, heads=8, head_dim=16, region=(2, 2), topk=2, dtype="float16")
    p = p.replace(direction="fwd-bwd")
    for config in TritonBackend().configs(p, machines.detect("cuda")):
        result = gate.check(TritonBackend(), p, *tensors(p), config=config)
        assert result.ok, f"{config}: {result.reason}"
        assert result.images[-1] == p.batch - 1


@pytest.mark.slow
@pytest.mark.parametrize(("topk", "side"), [(1, 8), (4, 4), (16, 2)])
def test_batches_of_more_than_two_to_the_31_numbers_are_right_to_the_end(topk: int, side: int) -> None:
    height, channels = 7 * side, 512 // (side * side) * 16
    batch = 2**31 // (height * height * 3 * channels) + 8
    p = Problem(
        batch=batch,
        height=height,
        width=height,
        heads=channels // 32,
        head_dim=32,
        region=(side, side),
        topk=topk,
        dtype="float16",
        direction="fwd-bwd",
    )
    result = gate.check(TritonBackend(), p, *tensors(p))
    assert result.ok, result.reason
    assert result.images[-1] == batch - 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_an_image_of_more_than_two_to_the_31_numbers_is_right_at_its_end(layout: str) -> None:
    side, size = 64, 8256
    p = Problem(
        batch=1, height=size, width=size, heads=1, head_dim=32, region=(side, side), topk=1, dtype="float16",
        direction="fwd-bwd",
    )  # fmt: skip
    assert size * size * 32 > 2**31
    shape = (1, size, size, 32) if layout == "nhwc" else (1, 32, size, size)
    q, k, v = (torch.randn(*shape, device="cuda", dtype=torch.float16) for _ in range(3))
    if layout == "nchw":
        q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    routes = torch.arange(p.regions, device="cuda").flip(0).view(1, -1, 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = TritonBackend().forward(q, k, v, routes, p)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    # The first and the last region attend to each other, both ways.
    corners = (slice(None, side), slice(None, side)), (slice(-side, None), slice(-side, None))
    for queries, keys in (corners, corners[::-1]):
        mine = [x[0][queries].detach().double().flatten(0, 1) for x in (q, out, grads[0])]
        theirs = [x[0][keys].detach().double().flatten(0, 1) for x in (k, v, grads[1], grads[2])]
        x, y, z = (t.requires_grad_() for t in (mine[0], theirs[0], theirs[1]))
        expected = ((x @ y.T) * p.scale).softmax(-1) @ z
        true = torch.autograd.grad(expected.sum(), (x, y, z))
        for a, b in zip((mine[1], mine[2], theirs[2], theirs[3]), (expected, *true), strict=True):
            assert (a - b).norm() <= 2e-3 * b.norm() + 1e-6


# --- how it is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"backward": "gather", "dkv_chunk": 8}], ids=str)
def test_a_captured_call_follows_routes_that_change(config: dict[str, int | str]) -> None:
    p = Problem(batch=4, height=28, width=28, heads=4, head_dim=32, region=(4, 4), topk=4, dtype="float16")
    q, k, v, routes = tensors(p)
    backend = TritonBackend()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        out = backend.forward(leaves[0], leaves[1], leaves[2], routes, p, config)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for seed in (1, 2):
        routes.copy_(tensors(p, seed)[3])
        graph.replay()
        for mine, true in zip(captured, both(), strict=True):
            assert torch.equal(mine, true)


def attention_of(p: Problem, routes: Tensor) -> Callable[[Tensor], Tensor]:
    def call(packed: Tensor) -> Tensor:
        q, k, v = packed.chunk(3, -1)
        return routed_attention(q, k, v, routes, heads=p.heads, region=p.region, backend="triton")

    return call


def test_a_compiled_call_is_one_graph_forward_and_backward() -> None:
    p = Problem(batch=4, height=28, width=28, heads=4, head_dim=32, region=(4, 4), topk=4, dtype="float16")
    *_, routes = tensors(p)
    packed = torch.randn(4, 28, 28, 384, device="cuda", dtype=torch.float16, requires_grad=True)
    call = attention_of(p, routes)
    eager = call(packed)
    (eager_grad,) = torch.autograd.grad(eager.square().sum(), packed)
    compiled = torch.compile(call, fullgraph=True)(packed)
    (grad,) = torch.autograd.grad(compiled.square().sum(), packed)
    assert torch.equal(compiled, eager)
    torch.testing.assert_close(grad, eager_grad)


def test_another_device_than_the_current_one_is_launched_on() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; torch finds one")
    case = REGIONS[0]
    assert_right(case, "cuda:1")


def extra_bytes(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    live = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - live


@pytest.mark.slow
def test_a_forward_pass_allocates_its_output_and_the_statistics() -> None:
    for _, p in published():
        q, k, v, routes = tensors(p)
        backend = TritonBackend()
        output = q.numel() * q.element_size()
        with torch.no_grad():
            found = extra_bytes(lambda: backend.forward(q, k, v, routes, p))  # noqa: B023
        assert found <= output + backend.workspace_bytes(p.replace(direction="fwd")) + 4096
        leaf = q.detach().requires_grad_()
        found = extra_bytes(lambda: backend.forward(leaf, k, v, routes, p))  # noqa: B023
        assert found <= output + backend.workspace_bytes(p) + 4096
        assert backend.workspace_bytes(p) <= output / 8


@pytest.mark.slow
def test_a_large_map_in_few_regions_needs_little_memory() -> None:
    # 20 channels, 600x500 tokens, 8x8 regions of 85x71: composed attention writes scores of 35 GiB per copy.
    p = Problem(
        batch=1, height=600, width=500, heads=1, head_dim=20, region=(85, 71), topk=4, dtype="float32"
    )
    q, k, v, routes = tensors(p.replace(direction="fwd-bwd"))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        out = TritonBackend().forward(leaves[0], leaves[1], leaves[2], routes, p)
        return out, *torch.autograd.grad(out, leaves, out.detach())

    results = 4 * q.numel() * q.element_size()
    assert extra_bytes(both) - results < 100e6
