"""The backend for CPUs: every variant that this machine runs, as an operator, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from bratune.errors import ProblemError, UnsupportedError
from bratune.kernels.api import routed_attention
from bratune.kernels.native.backend import NativeBackend
from bratune.kernels.native.library import Library, find
from bratune.machine import Machine, detect
from bratune.measure.memory import cpu_memory
from bratune.problem import Problem
from bratune.testing import CASES, BackendConformance, Case, Inputs

ROOT = Path(__file__).resolve().parents[3]
FOUND = find()
RUNNABLE = FOUND.runnable if isinstance(FOUND, Library) else ()

pytestmark = pytest.mark.skipif(not RUNNABLE, reason=str(FOUND))


def here(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in RUNNABLE, reason=f"this processor does not run {name}")


def _sizes(height: int, region: tuple[int, int], topk: int, **more: Any) -> Problem:
    sizes = {"batch": 1, "heads": 2, "head_dim": 16} | more
    return Problem(height=height, width=height, region=region, topk=topk, **sizes)


# What blocking could get wrong: keys that fill vectors and tiles or leave some over, heads of every width,
# more queries than a block, an odd number of keys in a region, more keys than a stretch, regions of one or
# two tokens, regions of four that are kept for a head or packed for each query region, a negative scale.
MORE = tuple(
    Case(problem.replace(dtype=dtype))
    for dtype in ("float32", "bfloat16")
    for problem in (
        _sizes(8, (2, 4), 3, head_dim=8),
        _sizes(12, (4, 4), 5, head_dim=40),
        _sizes(10, (5, 5), 3, head_dim=72),
        _sizes(12, (6, 6), 2, head_dim=96, heads=1),
        _sizes(8, (4, 4), 3, head_dim=128, heads=1),
        _sizes(22, (11, 11), 3, head_dim=32, heads=1),
        _sizes(9, (3, 3), 4, head_dim=32),
        _sizes(9, (4, 4), 3, head_dim=56, padding="masked"),
        _sizes(9, (4, 4), 3, per_head=True),
        _sizes(6, (1, 1), 5, head_dim=32),
        _sizes(5, (1, 2), 3, padding="masked"),
        _sizes(5, (2, 1), 3, per_head=True),
        _sizes(4, (1, 1), 2, kv_height=7, kv_width=5, kv_region=(3, 3), head_dim=48),
        _sizes(6, (1, 1), 5, head_dim=24),
        _sizes(8, (2, 2), 13, head_dim=32),
        _sizes(7, (2, 2), 5, head_dim=64, heads=1, padding="masked", scale=-0.3),
        _sizes(8, (1, 4), 6, head_dim=48, per_head=True),
        _sizes(8, (2, 2), 1, head_dim=32, kv_height=6, kv_width=4),
        _sizes(50, (2, 2), 3, head_dim=128, heads=1),
        _sizes(7, (1, 1), 9, head_dim=32, kv_height=7, kv_width=5, kv_region=(2, 2), padding="masked"),
    )
)


class Conformance(BackendConformance):
    __test__ = False
    backend = "native"
    cases = (*CASES, *MORE)


# The variants share their source: what only layouts and shapes decide need not be seen by each.
SOME = (*CASES[::3], *CASES[-9:], *MORE[::2], *MORE[9:20])


@here("portable")
class TestPortable(Conformance):
    __test__ = True
    cases = SOME
    config: ClassVar[dict[str, str]] = {"variant": "portable"}


@here("avx2")
class TestAVX2(Conformance):
    __test__ = True
    cases = SOME
    config: ClassVar[dict[str, str]] = {"variant": "avx2"}


@here("avx512")
class TestAVX512(Conformance):
    __test__ = True
    config: ClassVar[dict[str, str]] = {"variant": "avx512"}


@here("amx")
class TestAMX(Conformance):
    __test__ = True
    config: ClassVar[dict[str, str]] = {"variant": "amx"}


# --- one call, looked at from many sides ----------------------------------------------------------------

PROBLEM = Problem(
    batch=2, height=8, width=12, heads=2, head_dim=16, region=(4, 4), topk=3, direction="fwd-bwd"
)
CALL = (PROBLEM.heads, PROBLEM.region, PROBLEM.kv_region, PROBLEM.scale, False, "")


def inputs(problem: Problem = PROBLEM) -> Inputs:
    return Inputs.make(Case(problem), "cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, backend: str = "native") -> Tensor:
    p = PROBLEM
    return routed_attention(q, k, v, routes, heads=p.heads, region=p.region, backend=backend)


def leaves(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    return q, k, v


def test_the_operators_pass_the_checks_of_pytorch() -> None:
    x = inputs()
    library.opcheck(torch.ops.bratune.native_attention.default, (*leaves(x), x.routes, *CALL, True))
    with torch.no_grad():
        out, lse = torch.ops.bratune.native_attention(x.q, x.k, x.v, x.routes, *CALL, True)
    for packed in (True, False):
        library.opcheck(
            torch.ops.bratune.native_attention_backward.default,
            (x.cotangent, x.q, x.k, x.v, x.routes, out, lse, *CALL, packed),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("packed", [True, False])
def test_operators_and_the_direct_path_give_the_same_bits(packed: bool) -> None:
    x = inputs()
    q, k, v = leaves(x)
    if packed:
        q, k, v = torch.cat([q, k, v], -1).detach().requires_grad_().chunk(3, -1)
    direct = attend(q, k, v, x.routes)
    observed = torch.ops.bratune.native_attention(q, k, v, x.routes, *CALL, True)[0]
    assert torch.equal(direct, observed)
    pairs = (torch.autograd.grad(out, (q, k, v), x.cotangent) for out in (direct, observed))
    for mine, other in zip(*pairs, strict=True):
        assert torch.equal(mine, other)


def test_a_compiled_call_is_one_graph_and_gives_the_same_bits() -> None:
    x = inputs()
    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, v = leaves(x)
    assert torch.equal(run(q, k, v, x.routes), attend(q, k, v, x.routes))
    mine, other = (torch.autograd.grad(f(q, k, v, x.routes), (q, k, v), x.cotangent) for f in (run, attend))
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a, b)


def test_an_exported_call_keeps_the_operator() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> Tensor:
            return attend(q, k, v, routes)

    x = inputs()
    program = torch.export.export(Attention(), (x.q, x.k, x.v, x.routes))
    assert any(node.target == torch.ops.bratune.native_attention.default for node in program.graph.nodes)
    assert torch.equal(program.module()(x.q, x.k, x.v, x.routes), attend(x.q, x.k, x.v, x.routes))


def test_autocast_takes_it_to_bfloat16() -> None:
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(x.q, x.k, x.v, x.routes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attend(x.q, x.k, x.v, x.routes), rtol=2e-2, atol=2e-2)


def test_transforms_of_torch_give_the_gradients_of_the_reference() -> None:
    x = inputs()

    def loss(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v: (attend(q, k, v, x.routes, backend) * x.cotangent).sum()

    stacked = [torch.stack([t, t.flip(1)]) for t in (x.q, x.k, x.v)]
    mine, true = (vmap(grad(loss(name), (0, 1, 2)))(*stacked) for name in ("native", "gather"))
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_derivatives_that_it_does_not_have_are_refused() -> None:
    x = inputs()
    q, k, v = leaves(x)

    def loss(q: Tensor) -> Tensor:
        return attend(q, x.k, x.v, x.routes).square().sum()

    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(loss, (x.q,), (x.q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        attend(forward_ad.make_dual(x.q, x.q), x.k, x.v, x.routes)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedError, match="no derivative; the backend gather"):
        grad(lambda y: grad(loss)(y).sum())(x.q)
    with pytest.raises(UnsupportedError, match="no derivative"):
        torch.autograd.grad(attend(q, k, v, x.routes).square().sum(), k, create_graph=True)


def test_the_counter_of_pytorch_counts_the_products_of_both_passes() -> None:
    x = inputs()
    q, k, v = leaves(x)
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v, x.routes)
        forward = counter.get_total_flops()
        out.backward(x.cotangent)  # type: ignore[no-untyped-call]
    assert forward == NativeBackend().flops(PROBLEM)
    assert counter.get_total_flops() == forward * 7 // 2


@pytest.mark.parametrize("bad", [6, -1])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_route_to_nowhere_is_named(bad: int, per_head: bool) -> None:
    x = inputs(PROBLEM.replace(per_head=per_head))
    place = (1, 1, 4, 2) if per_head else (1, 4, 2)
    routes = x.routes.clone()
    routes[place] = bad
    text = f"route {bad} at {list(place)} is out of range: there are 6 key regions, 0 to 5"
    with pytest.raises(ProblemError, match=re.escape(text)):
        NativeBackend().forward(x.q, x.k, x.v, routes, PROBLEM.replace(per_head=per_head))


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repeats_and_threads_give_the_same_bits(variant: str, dtype: str) -> None:
    problem = Problem(
        batch=2, height=16, width=16, heads=2, head_dim=32, region=(4, 4), topk=4, dtype=dtype,
        direction="fwd-bwd",
    )  # fmt: skip
    x = inputs(problem)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        q, k, v = leaves(x)
        out = NativeBackend().forward(q, k, v, x.routes, problem, {"variant": variant})
        results.append([out, *torch.autograd.grad(out, (q, k, v), x.cotangent)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_head_is_shared_by_threads() -> None:
    problem = _sizes(16, (4, 4), 3, heads=1, head_dim=32, direction="fwd-bwd")
    x = inputs(problem)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        q, k, v = leaves(x)
        out = NativeBackend().forward(q, k, v, x.routes, problem)
        found.append([out, *torch.autograd.grad(out, (q, k, v), x.cotangent)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_workspace_is_an_upper_estimate() -> None:
    problem = _sizes(16, (4, 4), 4, direction="fwd")
    x = inputs(problem)
    taken = cpu_memory(lambda: NativeBackend().forward(x.q, x.k, x.v, x.routes, problem)).workspace_mb
    assert taken is not None
    assert taken * 1e6 <= NativeBackend().workspace_bytes(problem)


# --- what it refuses, and which variant runs ------------------------------------------------------------

GPU = Machine(kind="cuda", device="cuda:0", gpu_key="h100", gpu_name="a GPU", compute_capability="9.0")


@pytest.mark.parametrize(
    ("problem", "machine", "reason"),
    [
        (PROBLEM, GPU, "runs on CPUs, found a GPU"),
        (PROBLEM.replace(dtype="float64"), None, "computes in float16, bfloat16, float32, found float64"),
        (_sizes(8, (4, 4), 2, head_dim=12), None, "multiple of 8 channels up to 128, found 12"),
        (_sizes(8, (4, 4), 2, head_dim=136), None, "multiple of 8 channels up to 128, found 136"),
        (_sizes(8, (4, 4), 2, v_head_dim=24), None, "as many channels per head as q and k, found 24 and 16"),
    ],
)
def test_what_it_cannot_do_is_said(problem: Problem, machine: Machine | None, reason: str) -> None:
    (found,) = NativeBackend().why_not(problem, machine or detect("cpu"))
    assert reason in found


def said(code: str, **variables: str) -> str:
    import os

    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


FIND = "from bratune.kernels.native.library import find as f\nx = f()\nprint(getattr(x, 'default', x))"


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("portable", "portable"),
        ("neon9", f"BRATUNE_NATIVE=neon9 is not a variant; these run here: {', '.join(RUNNABLE)}"),
    ],
)
def test_the_environment_names_the_variant(wanted: str, answer: str) -> None:
    assert said(FIND, BRATUNE_NATIVE=wanted) == answer


def test_threads_are_those_that_torch_has_already() -> None:
    code = (
        "import re, torch\n"
        "from bratune.kernels.native.library import loaded\n"
        "from bratune.kernels.api import routed_attention\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(2, 16, 16, 64)\n"
        "(x @ x.mT).sum()\n"
        "def threads(): return int(re.search(r'Threads:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = threads()\n"
        "routes = torch.zeros(2, 16, 2, dtype=torch.int64)\n"
        "routed_attention(x, x, x, routes, heads=2, region=(4, 4), backend='native')\n"
        "print(loaded().openmp != '', threads() - before)"
    )
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
    assert said(code) == "True 0"
