"""The one function: what it accepts, what it says when it cannot, and that it can be compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bratune.backend import Backend
from bratune.errors import BratuneError, ConfigError, ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels import api, layout, registry
from bratune.kernels.api import route, routed_attention
from bratune.machine import Machine
from bratune.problem import Problem

COMPILABLE = ("gather", "gather-sdpa", "dense")


def qkv(dtype: torch.dtype = torch.float32, size: tuple[int, ...] = (2, 13, 11, 64)) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=rng).to(dtype) for _ in "qkv")


def attend(**changes: Any) -> Tensor:
    q, k, v = qkv()
    call: dict[str, Any] = {"q": q, "k": k, "v": v, "routes": route(q, k, region=(4, 4), topk=3)}
    call |= {"heads": 2, "region": (4, 4), "backend": "gather-sdpa"}
    return routed_attention(**(call | changes))


WRONG: list[tuple[dict[str, Any], type[BratuneError], str]] = [
    ({"heads": 3}, ProblemError, "3 heads do not divide the 64 channels of q and the 64 of v"),
    ({"heads": 0}, ProblemError, "0 heads do not divide"),
    ({"q": torch.ones(13, 11, 64)}, ProblemError, "must be [B, H, W, C], not [13, 11, 64]"),
    ({"k": torch.ones(2, 12, 11, 64)}, ProblemError, "k and v must have one map"),
    ({"q": torch.ones(1, 13, 11, 64)}, ProblemError, "q and k the same batch and channels"),
    ({"q": torch.ones(2, 13, 11, 64).double()}, ProblemError, "one dtype, not torch.float64, torch.float32"),
    ({"k": torch.ones(2, 13, 11, 64, device="meta")}, ProblemError, "on one device, not cpu, meta, cpu"),
    ({"routes": torch.zeros(2, 12, 3)}, ProblemError, "routes must be int32 or int64, not torch.float32"),
    ({"routes": torch.zeros(12, 3).long()}, ProblemError, "routes must be [B, R, topk] or"),
    ({"routes": torch.zeros(2, 9, 3).long()}, ProblemError, "routes of shape [2, 9, 3] do not fit"),
    ({"routes": torch.zeros(2, 9, 3).long()}, ProblemError, "[2, 12, 3] would"),
    ({"routes": torch.zeros(2, 4, 12, 3).long()}, ProblemError, "[2, 2, 12, 3] would"),
    ({"routes": torch.zeros(2, 12, 13).long()}, ProblemError, "top-k 13 is more than the 12 key regions"),
    ({"region": (0, 4)}, ProblemError, "region must be at least 1x1 tokens, not 0x4"),
    ({"scale": 0.0}, ProblemError, "scale must be a number other than 0, not 0.0"),
    ({"scale": float("nan")}, ProblemError, "scale must be a number other than 0, not nan"),
    ({"padding": "reflect"}, ProblemError, "padding 'reflect' is not known; these are: zeros, masked"),
    ({"backend": "cutlass"}, UnknownNameError, "no backend is called 'cutlass'"),
    ({"config": {"tile": 3}}, ConfigError, "backend 'gather-sdpa' has no setting 'tile'; it has none"),
    (
        {"backend": "flex", "config": {"tile": 3}},
        ConfigError,
        "no setting 'tile'; these are: block, compiled",
    ),
]


@pytest.mark.parametrize(("changes", "error", "text"), WRONG)
def test_a_wrong_call_is_an_error_that_says_what_was_found(
    changes: dict[str, Any], error: type[BratuneError], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        attend(**changes)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
@pytest.mark.parametrize("wrong", [-1, 12])
@pytest.mark.parametrize(
    "backend", ["auto", "reference", "gather", "gather-sdpa", "dense", "sparse", "flex", "native"]
)
def test_a_route_out_of_range_is_an_error_that_names_it(backend: str, wrong: int, per_head: bool) -> None:
    routes = route(*qkv()[:2], region=(4, 4), topk=3)
    where = [1, 7, 2]
    routes[tuple(where)] = wrong
    if per_head:
        right = route(*qkv()[:2], region=(4, 4), topk=3)
        routes, where = torch.stack([right, routes], 1), [1, 1, 7, 2]
    text = f"route {wrong} at {where} is out of range: there are 12 key regions, 0 to 11"
    config = {"compiled": False} if backend == "flex" else None
    for number in (torch.int32, torch.int64):
        with pytest.raises(ProblemError, match=re.escape(text)):
            attend(routes=routes.to(number), backend=backend, config=config)


@pytest.mark.parametrize("wrong", [-1, 12])
@pytest.mark.parametrize("backend", ["reference", "gather", "gather-sdpa", "dense", "sparse"])
def test_a_route_out_of_range_is_an_error_where_nobody_looks_before(backend: str, wrong: int) -> None:
    """Beside a counter of operations no value is read, and no backend may read or write anywhere."""
    routes = torch.full((2, 12, 3), wrong)
    with FlopCounterMode(display=False), pytest.raises((IndexError, RuntimeError), match="out of"):
        attend(routes=routes, backend=backend)


def test_a_backend_that_cannot_differentiate_is_refused_only_for_gradients() -> None:
    q = qkv()[0].requires_grad_()
    with pytest.raises(UnsupportedError, match="FlexAttention has no backward pass on a CPU"):
        attend(q=q, backend="flex")
    with torch.no_grad():
        assert attend(q=q, backend="flex", config={"compiled": False}).shape == q.shape


def test_the_default_scale_is_that_of_all_channels() -> None:
    assert torch.equal(attend(), attend(scale=64**-0.5))
    assert not torch.equal(attend(), attend(scale=32**-0.5))


def test_values_may_have_channels_of_their_own() -> None:
    v = qkv()[2]
    torch.testing.assert_close(attend(v=v[..., :32], heads=1), attend(heads=1)[..., :32])


def test_auto_runs_what_the_registry_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    def choose(problem: Problem, machine: Machine) -> Backend:
        chosen.append(registry.preference(problem, machine)[-1])
        return registry.get(chosen[-1])

    monkeypatch.setattr(registry, "choose", choose)
    found = attend(backend="auto", scale=0.77)  # not asked for before
    assert torch.equal(found, attend(backend=chosen[0], scale=0.77))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    q, k, v = qkv()
    routes = route(q, k, region=(4, 4), topk=3)
    half = attend(q=q.bfloat16(), k=k.bfloat16(), v=v.bfloat16(), routes=routes)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q=q.to(dtype), k=k.to(dtype), v=v, routes=routes)  # may be mixed
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, half)


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = qkv(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q=q, k=k, v=v).dtype == torch.float64


class Attention(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        routes = route(q, k, region=(4, 4), topk=3)
        return routed_attention(q, k, v, routes, heads=2, region=(4, 4), backend=self.backend)


@pytest.mark.parametrize("backend", COMPILABLE)
def test_a_call_compiles_without_a_graph_break(backend: str) -> None:
    torch.compiler.reset()
    module = Attention(backend)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for height in (13, 16):  # the second size would otherwise become a symbol
        x = torch.cat(qkv(size=(2, height, 11, 64)), dim=-1).requires_grad_()
        (expected,) = torch.autograd.grad(module(x).sum(), x)
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("backend", COMPILABLE)
def test_a_call_can_be_exported(backend: str, strict: bool) -> None:
    x = torch.cat(qkv(), dim=-1)
    module = Attention(backend)
    exported = torch.export.export(module, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_call_can_be_traced() -> None:
    x = torch.cat(qkv(), dim=-1)
    module = Attention("gather")
    trace: Any = torch.jit.trace
    torch.testing.assert_close(trace(module, (x,))(x), module(x))


def test_calls_of_ever_new_sizes_are_not_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_MOST_CALLS", 4)
    monkeypatch.setattr(api, "_PLACES", {})
    monkeypatch.setattr(api, "_KNOWN", {})
    monkeypatch.setattr(api, "_RESOLVED", api._Resolved())
    for seed in range(2):
        for height in range(4, 20):
            q, k, v = qkv(size=(1, height, 4, 8))
            out = routed_attention(q, k, v, route(q, k, region=(2, 2), topk=1), heads=1, region=(2, 2))
            assert out.shape == v.shape, seed
    assert len(api._PLACES) <= 4
    assert set(api._PLACES.values()) == vars(api._RESOLVED).keys()
    assert len(api._KNOWN) <= 4


def test_a_call_like_one_before_is_checked_like_it() -> None:
    q, k, v = qkv()
    routes = route(q, k, region=(4, 4), topk=3)

    def attend(q: Tensor, routes: Tensor, **more: Any) -> Tensor:
        call: dict[str, Any] = {"heads": 2, "region": (4, 4)} | more
        return routed_attention(q, k, v, routes, **call)

    true = attend(q, routes)
    assert torch.equal(attend(q, routes), true)
    assert torch.equal(attend(q, routes, region=[4, 4]), true)
    for change, message in (
        ({"q": q.double()}, "must have one dtype"),
        ({"routes": routes.float()}, "routes must be int32 or int64"),
        ({"routes": routes + 100}, "out of range"),
        ({"heads": 3}, "do not divide"),
        ({"backend": "nobody"}, "nobody"),
        ({"config": {"no_such": 1}}, "no setting"),
    ):
        with pytest.raises(BratuneError, match=message):
            attend(**({"q": q, "routes": routes} | change))


def one_by_one(q: Tensor, k: Tensor, v: Tensor, topk: int, scale: float) -> Tensor:
    """Routed attention with one head on lists of regions ``[R, T, C]``."""
    routes = (q.mean(1) @ k.mean(1).T).topk(topk).indices
    outs = [
        (scale * q[r] @ k[routes[r]].flatten(0, 1).T).softmax(-1) @ v[routes[r]].flatten(0, 1)
        for r in range(len(q))
    ]
    return torch.stack(outs)


def test_a_volume_folded_to_rows_of_regions_is_exact() -> None:
    depth, height, width, channels = 4, 6, 4, 8
    q, k, v = (x.double() for x in qkv(size=(1, depth * height, width, channels)))

    def fold(x: Tensor) -> Tensor:
        split = x.view(1, 2, 2, 2, 3, 2, 2, channels)  # regions of 2x3x2
        return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(1, 8, 12, channels)

    q, k, v = map(fold, (q, k, v))
    routes = route(q, k, region=(1, 12), topk=3)
    found = routed_attention(q, k, v, routes, heads=1, region=(1, 12))
    torch.testing.assert_close(found[0], one_by_one(q[0], k[0], v[0], 3, channels**-0.5))


def test_two_maps_in_rectangles_are_attended_to_as_lists_of_regions() -> None:
    q, k, v = [x.double() for x in qkv(size=(1, 8, 6, 16))]
    context = [x[:, :4, :3] for x in (k, v)]
    routes = route(q, context[0], region=(4, 2), kv_region=(2, 1), topk=2)
    found = routed_attention(q, context[0], context[1], routes, heads=1, region=(4, 2), kv_region=(2, 1))
    rq, (rk, rv) = layout.to_regions(q, (4, 2))[0], (layout.to_regions(x, (2, 1))[0] for x in context)
    expected = one_by_one(rq, rk, rv, 2, 16**-0.5)
    torch.testing.assert_close(layout.to_regions(found, (4, 2))[0], expected)
