"""The gate lets the right numbers pass and names what is wrong with the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bratune.backend import Backend
from bratune.kernels import registry
from bratune.machine import detect
from bratune.measure import gate
from bratune.problem import DTYPES, Problem

FORWARD = Problem(batch=3, height=8, width=8, heads=2, head_dim=4, region=(2, 2), topk=3)
BOTH = FORWARD.replace(direction="fwd-bwd")


class Altered:
    """The reference with something done to its result."""

    name = "altered"

    def __init__(self, alter: Callable[[Tensor], Any]) -> None:
        self.alter = alter
        self.truth = registry.get("reference")

    def forward(self, *arguments: Any) -> Any:
        return self.alter(self.truth.forward(*arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.truth, name)


def inputs(problem: Problem, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shape = (problem.batch, problem.height, problem.width, 3 * problem.channels)
    q, k, v = torch.randn(shape, generator=draw).to(dtype).chunk(3, dim=-1)
    routes = torch.stack(
        [
            torch.randperm(problem.kv_regions, generator=draw)[: problem.topk]
            for _ in range(problem.batch * problem.regions)
        ]
    ).view(problem.batch, problem.regions, problem.topk)
    return q, k, v, routes


def check(alter: Callable[[Tensor], Any], problem: Problem) -> gate.GateResult:
    backend: Any = Altered(alter)
    assert isinstance(backend, Backend)
    return gate.check(backend, problem, *inputs(problem))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["fwd", "fwd-bwd"])
def test_the_reference_passes_its_own_gate(dtype: str, direction: str) -> None:
    problem = FORWARD.replace(dtype=dtype, direction=direction)
    data = inputs(problem, getattr(torch, dtype))
    result = gate.check(registry.get("reference"), problem, *data)
    assert result.ok, result.reason
    assert result.max_rel_err is not None
    assert result.max_rel_err <= result.tolerance == gate.TOLERANCES[dtype].forward
    assert (result.grad_rel_err is not None) is (direction == "fwd-bwd")
    assert result.images == (0, 1, 2)


def spoil(out: Tensor, value: float) -> Tensor:
    out = out.clone()
    out[1, 2, 3, 4] = value
    return out


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.01


class _NanGradient(_WrongGradient):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


@pytest.mark.parametrize(
    ("alter", "problem", "reason"),
    [
        pytest.param(lambda out: out + 0.001, FORWARD, "differs from the reference by", id="wrong numbers"),
        pytest.param(lambda out: spoil(out, 9.0), FORWARD, "1e-05 is allowed in float32", id="one value"),
        pytest.param(lambda out: spoil(out, float("nan")), FORWARD, "output has 1 of 1536 values", id="nan"),
        pytest.param(lambda out: spoil(out, float("inf")), FORWARD, "NaN or infinite", id="infinity"),
        pytest.param(
            lambda out: out[:, :4], FORWARD, r"shape \(3, 4, 8, 8\), not \(3, 8, 8, 8\)", id="shape"
        ),
        pytest.param(lambda out: out.double(), FORWARD, "torch.float64, not torch.float32", id="dtype"),
        pytest.param(lambda out: None, FORWARD, "NoneType, not a tensor", id="nothing"),
        pytest.param(lambda out: out.flip(0), FORWARD, "differs from the reference", id="images swapped"),
        pytest.param(lambda out: out.detach(), BOTH, "carries no gradient", id="detached"),
        pytest.param(_WrongGradient.apply, BOTH, "gradients differ from the reference by", id="gradient"),
        pytest.param(_NanGradient.apply, BOTH, "gradient of q has 1536 of 1536", id="nan gradient"),
        pytest.param(lambda out: out.detach() + out.sum() * 0, BOTH, "gradients differ", id="zero"),
    ],
)
def test_what_is_wrong_is_named(alter: Callable[[Tensor], Any], problem: Problem, reason: str) -> None:
    result = check(alter, problem)
    assert not result.ok
    assert re.search(reason, result.reason), result.reason


def test_an_output_that_forgets_an_input_is_named() -> None:
    class ForgetsK(Altered):
        def forward(self, q: Tensor, k: Tensor, *rest: Any) -> Any:
            return self.truth.forward(q, k.detach(), *rest)

    backend: Any = ForgetsK(lambda out: out)
    assert gate.check(backend, BOTH, *inputs(BOTH)).reason == "the output does not depend on k for autograd"


def test_a_wrong_gradient_does_not_matter_to_a_forward_problem() -> None:
    assert check(_WrongGradient.apply, FORWARD).ok


@pytest.mark.parametrize(
    ("batch", "side", "expected"),
    [(1, 8, (0,)), (4, 8, (0, 1, 2, 3)), (2, 512, (0, 1)), (8, 512, (0, 7))],
)
def test_a_large_batch_is_sampled_with_its_first_and_last_image(
    batch: int, side: int, expected: tuple[int, ...]
) -> None:
    problem = Problem(
        batch=batch, height=side, width=side, heads=2, head_dim=32, region=(side // 8, side // 8), topk=4
    )
    assert gate.images_to_check(problem) == expected


def test_the_strides_of_the_call_are_kept() -> None:
    seen = []

    class Watching(Altered):
        def forward(self, *arguments: Any) -> Any:
            seen.append(arguments[0].stride())
            return super().forward(*arguments)

    q, k, v, routes = inputs(BOTH)
    backend: Any = Watching(lambda out: out)
    gate.check(backend, BOTH, q, k, v, routes)
    assert seen[0] == seen[-1] == q.stride()
    assert not q.is_contiguous()


def test_an_error_of_a_zero_truth_is_absolute() -> None:
    assert gate.max_rel_err(torch.tensor([0.0, 0.5]), torch.zeros(2)) == 0.5


def test_what_a_backend_raises_is_not_swallowed() -> None:
    def boom(out: Tensor) -> Tensor:
        raise RuntimeError("from the backend")

    with pytest.raises(RuntimeError, match="from the backend"):
        check(boom, FORWARD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize(
    "shape",
    [
        {"height": 14, "width": 14, "heads": 2, "head_dim": 32, "region": (2, 2), "topk": 16},
        {"height": 13, "width": 10, "heads": 2, "head_dim": 16, "region": (4, 4), "topk": 3},  # padded
        {"height": 16, "width": 24, "heads": 1, "head_dim": 64, "region": (8, 8), "topk": 1},
    ],
    ids=lambda shape: f"{shape['height']}x{shape['width']}",
)
def test_no_backend_of_this_package_is_refused(dtype: str, spread: float, shape: dict[str, Any]) -> None:
    problem = Problem(batch=2, dtype=dtype, direction="fwd-bwd", **shape)
    q, k, v, routes = inputs(problem, getattr(torch, dtype))
    machine = detect("cpu")
    able = [one for one in map(registry.get, registry.BACKENDS) if not one.why_not(problem, machine)]
    assert len(able) > 2
    found = {
        one.name: gate.check(one, problem, spread * q, spread * k, v, routes).reason
        for one in able
        if one.name != "flex"  # compiles for seconds; the conformance suite has it
    }
    assert {name: reason for name, reason in found.items() if reason} == {}


def test_large_logits_are_given_what_rounding_them_costs_and_no_more() -> None:
    problem = Problem(
        batch=3, height=8, width=8, heads=2, head_dim=32, region=(2, 2), topk=3, dtype="bfloat16"
    )
    q, k, v, routes = inputs(problem, torch.bfloat16)

    def result(spread: float, factor: float) -> gate.GateResult:
        wrong: Any = Altered(lambda out: factor * out)
        return gate.check(wrong, problem, spread * q, spread * k, v, routes)

    table = gate.TOLERANCES["bfloat16"].forward
    assert [result(1.0, factor).ok for factor in (1.0, 1.02, 1.2)] == [True, True, False]
    assert [result(3.0, factor).ok for factor in (1.0, 1.02, 1.5)] == [True, True, False]
    assert result(1.0, 1.02).tolerance == table
    loose, wide = result(1.0, 1.5).tolerance, result(3.0, 1.5).tolerance
    assert table == loose < wide < 0.1


def test_threads_are_as_before_when_the_reference_has_run_by_one() -> None:
    seen = []

    class Counting(Altered):
        def forward(self, *arguments: Any) -> Any:
            seen.append(torch.get_num_threads())
            return super().forward(*arguments)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        truth: Any = Counting(lambda out: out)
        assert gate.check(registry.get("gather"), FORWARD, *inputs(FORWARD), reference=truth).ok
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
    assert len(seen) == 5  # three images of its data, then other data, and large logits
