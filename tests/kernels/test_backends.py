"""Every built-in backend passes the conformance suite that is shipped for everyone's."""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bratune.backend import Config
from bratune.kernels import registry
from bratune.kernels.reference import ReferenceBackend
from bratune.measure.memory import cpu_memory
from bratune.problem import Problem
from bratune.testing import CASES, BackendConformance, Case, Inputs, conformance, problem_id


class TestReference(BackendConformance):
    backend = "reference"
    cases = CASES[::4]  # compared with itself; what it must equal is in test_golden_ops.py


class TestGather(BackendConformance):
    backend = "gather"


class TestGatherSDPA(BackendConformance):
    backend = "gather-sdpa"


class TestDense(BackendConformance):
    backend = "dense"


class TestSparse(BackendConformance):
    backend = "sparse"


class TestTriton(BackendConformance):
    backend = "triton"


class TestFlex(BackendConformance):
    backend = "flex"
    # Each call of uncompiled FlexAttention traces anew, half a second, and to compile takes many: a few cases
    # here, the others below.
    config: ClassVar[Config] = {"compiled": False}
    cases = CASES[::6]

    @pytest.mark.slow
    def test_no_setting_changes_the_result(self, device: str) -> None:
        super().test_no_setting_changes_the_result(device)


@pytest.mark.slow
class TestFlexOnTheOtherCases(BackendConformance):
    backend = "flex"
    config: ClassVar[Config] = {"compiled": False}
    cases = tuple(case for number, case in enumerate(CASES) if number % 6)


# What is asked without a case was asked above.
for name, test in vars(BackendConformance).items():
    if name.startswith("test_") and "case" not in inspect.signature(test).parameters:
        setattr(TestFlexOnTheOtherCases, name, None)


def test_what_is_right_is_computed_once_per_case(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Problem] = []

    class Counted(ReferenceBackend):
        def forward(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            routes: Tensor,
            problem: Problem,
            config: Config | None = None,
        ) -> Tensor:
            computed.append(problem)
            return super().forward(q, k, v, routes, problem, config)

    monkeypatch.setattr(conformance, "ReferenceBackend", Counted)
    # A scale that no table has, so that nothing is known of these cases; in both routes, for they differ.
    problem = Problem(batch=1, height=8, width=8, heads=2, head_dim=8, region=(4, 4), topk=2, scale=0.3)
    cases = [Case(problem), Case(problem, routes="repeated")]
    for suite in (TestGather(), TestDense()):
        for case in cases:
            suite.test_output_is_that_of_the_reference(case, "cpu")
            both = Case(case.problem.replace(direction="fwd-bwd"), case.routes)
            suite.test_gradients_are_those_of_the_reference(both, "cpu")
    assert len(computed) == len(cases)


WORK = [
    Problem(batch=2, height=20, width=20, heads=2, head_dim=32, region=(5, 5), topk=3),
    Problem(batch=1, height=14, width=14, heads=8, head_dim=32, region=(2, 2), topk=16),
    Problem(batch=1, height=19, width=17, heads=4, head_dim=32, region=(4, 4), topk=4),
    Problem(batch=1, height=19, width=17, heads=4, head_dim=32, region=(4, 4), topk=4, padding="masked"),
    Problem(batch=1, height=16, width=16, heads=4, head_dim=32, region=(4, 4), topk=4, per_head=True),
]


@pytest.mark.parametrize("problem", WORK, ids=problem_id)
@pytest.mark.parametrize("name", ["reference", "gather", "gather-sdpa", "dense"])
def test_flops_are_those_that_torch_counts(name: str, problem: Problem) -> None:
    x = Inputs.make(Case(problem), "cpu")
    backend = registry.get(name)
    # The counter of torch sees products; those of the fused attention are visible in its plain form.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backend.forward(x.q, x.k, x.v, x.routes, problem)
    assert counter.get_total_flops() == backend.flops(problem)


@pytest.mark.parametrize("problem", WORK, ids=problem_id)
@pytest.mark.parametrize("name", ["reference", "gather", "gather-sdpa", "dense", "sparse"])
def test_workspace_is_an_upper_estimate(name: str, problem: Problem) -> None:
    x = Inputs.make(Case(problem), "cpu")
    backend = registry.get(name)
    memory = cpu_memory(lambda: backend.forward(x.q, x.k, x.v, x.routes, problem))
    assert memory.workspace_mb is not None
    taken = memory.workspace_mb * 1e6
    assert taken <= backend.workspace_bytes(problem) <= 4 * taken
