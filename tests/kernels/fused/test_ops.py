"""The fused kernels as operators: traced, compiled, exported, recomputed, counted, captured."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from fused_cases import Case, sample
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from bratune.errors import UnsupportedError
from bratune.kernels.api import routed_attention
from bratune.kernels.fused import ops as fused_ops
from bratune.kernels.fused.backend import TritonBackend
from bratune.kernels.fused.ops import attend

interpreter = pytest.mark.interpreter

# Two regions of keys for each of two regions of queries: a handful of programs.
SMALL = Case(map=(4, 8), topk=2, heads=2, head_dim=16)
SINGLE = Case(map=(4, 8), topk=1, head_dim=16)


def leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    s = sample(case)
    q, k, v = (x.detach().requires_grad_() for x in (s.q, s.k, s.v))
    return q, k, v


def arguments(case: Case) -> tuple[Any, ...]:
    p = case.problem
    return p.heads, p.region, p.kv_region, p.scale, p.padding == "masked", ""


@interpreter
@pytest.mark.parametrize("case", [SMALL, SINGLE], ids=str)
def test_the_operators_pass_the_checks_of_pytorch(case: Case) -> None:
    s = sample(case)
    q, k, v = leaves(case)
    library.opcheck(torch.ops.bratune.routed_attention.default, (q, k, v, s.routes, *arguments(case), True))
    with torch.no_grad():
        out, lse = torch.ops.bratune.routed_attention(q, k, v, s.routes, *arguments(case), True)
    for packed in (True, False):
        library.opcheck(
            torch.ops.bratune.routed_attention_backward.default,
            (s.grad, s.q, s.k, s.v, s.routes, out, lse, *arguments(case), packed),
            test_utils=("test_schema", "test_faketensor"),
        )


@interpreter
@pytest.mark.parametrize("packed", [True, False])
def test_operators_and_the_direct_path_give_the_same_bits(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(map=(4, 8), topk=2, layout="packed" if packed else "split")
    s = sample(case)
    results = []
    for observed in (False, True):
        monkeypatch.setattr(fused_ops, "is_observed", lambda q, answer=observed: answer)
        inputs = leaves(case)
        out = attend(*inputs, s.routes, case.problem, "")
        results.append([out, *torch.autograd.grad(out, inputs, s.grad)])
    for direct, operator in zip(*results, strict=True):
        assert torch.equal(direct, operator)
        assert direct.stride() == operator.stride()


@interpreter
def test_a_compiled_call_is_one_graph_and_gives_the_same_bits() -> None:
    s = sample(SMALL)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(
            q * 1.0, k, v, s.routes, heads=2, region=(4, 4), backend="triton", config={"fwd_block_n": 32}
        )

    inputs = leaves(SMALL)
    eager = call(*inputs)
    eager_grads = torch.autograd.grad(eager, inputs, s.grad)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, inputs, s.grad), eager_grads, strict=True):
        assert torch.equal(a, b)


class Layer(torch.nn.Module):
    """Projection and routed attention, as a block has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor, routes: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return routed_attention(q, k, v, routes, heads=2, region=(4, 4), backend="triton")


@interpreter
def test_an_exported_layer_keeps_the_operator() -> None:
    layer, s = Layer().eval(), sample(SMALL)
    x = torch.randn(1, 4, 8, 32)
    program = torch.export.export(layer, (x, s.routes))
    assert any(node.target == torch.ops.bratune.routed_attention.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, s.routes), layer(x, s.routes))


@interpreter
def test_a_recomputed_layer_has_the_same_gradients() -> None:
    layer, s = Layer(), sample(SMALL)
    x = torch.randn(1, 4, 8, 32)
    grads: list[Tensor] = []
    for recompute in (False, True):
        layer.zero_grad()
        out = checkpoint(layer, x, s.routes, use_reentrant=False) if recompute else layer(x, s.routes)
        out.backward(s.grad)
        assert layer.qkv.weight.grad is not None
        grads.append(layer.qkv.weight.grad)
    assert torch.equal(grads[0], grads[1])


@interpreter
def test_under_autocast_the_kernels_compute_in_its_dtype() -> None:
    layer, s = Layer(), sample(SMALL)
    x = torch.randn(1, 4, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, s.routes)
    assert out.dtype == torch.bfloat16
    out.backward(s.grad.to(torch.bfloat16))
    assert layer.qkv.weight.grad is not None
    assert layer.qkv.weight.grad.dtype == torch.float32
    assert layer.qkv.weight.grad.isfinite().all()


@interpreter
def test_the_counter_of_pytorch_counts_the_products_of_both_passes() -> None:
    inputs, s = leaves(SMALL), sample(SMALL)
    with FlopCounterMode(display=False) as counter:
        out = attend(*inputs, s.routes, SMALL.problem, "")
        forward = counter.get_total_flops()
        torch.autograd.backward(out, s.grad)
    assert forward == TritonBackend().flops(SMALL.problem)
    assert counter.get_total_flops() == forward * 7 // 2


def test_shapes_are_known_without_running() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = Case(map=(5, 7), topk=2, heads=2, region=(4, 4))
    with FakeTensorMode():
        q, k, v = torch.empty(1, 5, 7, 192, requires_grad=True).chunk(3, -1)
        routes = torch.empty(1, 4, 2, dtype=torch.int64)
        out = attend(q, k, v, routes, case.problem, "")
        _, lse = torch.ops.bratune.routed_attention(q, k, v, routes, *arguments(case), True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert out.is_contiguous()
    assert lse.shape == (1, 2, 2, 4 * 16)
    assert all(grad.shape == q.shape for grad in grads)


# --- derivatives beyond the first, forward mode and torch.func ----------------------------------------


def through(s: Any, backend: str = "triton") -> Any:
    """Routed attention as a function of the queries of `SMALL`, squared: its derivative depends on them."""

    def call(q: Tensor) -> Tensor:
        return routed_attention(q, s.k, s.v, s.routes, heads=2, region=(4, 4), backend=backend).square()

    return call


def gradient(s: Any, backend: str = "triton") -> Any:
    call = through(s, backend)
    return torch.func.grad(lambda q: call(q).sum())


@interpreter
@pytest.mark.parametrize(
    "derive",
    [
        lambda s, backend: gradient(s, backend)(s.q),
        lambda s, backend: torch.vmap(through(s, backend))(torch.stack([s.q, 2 * s.q])),
        lambda s, backend: torch.vmap(through(s, backend), in_dims=-1)(torch.stack([s.q, 2 * s.q], -1)),
        lambda s, backend: torch.vmap(gradient(s, backend))(torch.stack([s.q, 2 * s.q])),
        # A batch of cotangents for one forward pass: what is kept of it is expanded, not batched.
        lambda s, backend: torch.func.vjp(through(s, backend), s.q)[1](s.grad)[0],
        lambda s, backend: torch.vmap(torch.func.vjp(through(s, backend), s.q)[1])(
            torch.stack([s.grad, 2 * s.grad])
        )[0],
    ],
    ids=["grad", "vmap", "vmap-last", "vmap-grad", "vjp", "vmap-vjp"],
)
def test_torch_func_transforms_the_kernels(derive: Any) -> None:
    s = sample(SMALL)
    torch.testing.assert_close(derive(s, "triton"), derive(s, "gather"), rtol=1e-4, atol=1e-5)


@interpreter
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(
    "derive",
    [
        lambda s: torch.func.jvp(through(s), (s.q,), (s.grad,)),
        lambda s: torch.func.hessian(lambda q: through(s)(q).sum())(s.q),
        lambda s: torch.func.grad(lambda q: gradient(s)(q).sum())(s.q),
    ],
    ids=["jvp", "hessian", "grad-grad"],
)
def test_a_derivative_that_the_kernels_lack_is_refused_and_not_left_out(derive: Any, observed: bool) -> None:
    s = sample(SMALL)
    refused = pytest.raises(UnsupportedError, match="derivative; the backend gather has one")
    with FlopCounterMode(display=False) if observed else contextlib.nullcontext(), refused:
        derive(s)


@interpreter
def test_forward_mode_is_refused_with_and_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sample(SMALL)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(s.q, s.grad)  # type: ignore[no-untyped-call]
        with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
            through(s)(dual)
        with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
            torch.ops.bratune.routed_attention(dual, s.k, s.v, s.routes, *arguments(SMALL), True)


@interpreter
@pytest.mark.parametrize("observed", [False, True])
def test_a_second_derivative_is_refused_where_it_is_taken(observed: bool) -> None:
    s = sample(SMALL)
    q = s.q.detach().requires_grad_()
    with FlopCounterMode(display=False) if observed else contextlib.nullcontext():
        (first,) = torch.autograd.grad(through(s)(q).sum(), q, create_graph=True)
        torch.testing.assert_close(first.detach(), gradient(s, "gather")(s.q), rtol=1e-4, atol=1e-5)
        with pytest.raises(UnsupportedError, match="backward pass has no derivative"):
            torch.autograd.grad(first.square().sum(), q)
        with pytest.raises(UnsupportedError, match="backward pass has no derivative"):
            torch.autograd.backward(first.square().sum())
