"""Tests that every backend passes, built in or of another package.

Four lines test a backend of yours with pytest::

    from bratune.testing import BackendConformance

    class TestMine(BackendConformance):
        backend = MyBackend()          # or the name under which it is registered

Cases are taken from tables of problems and filtered by what the backend accepts (its ``why_not``), on the CPU
and, where there is one, on the first CUDA device. The id of a case repeats it:
``pytest -k "mine-float32-2x8x8-r4x4-k2"``. Tests on a CUDA device carry the marker ``gpu``.
"""

# ruff: noqa: D102 - a test's name is its sentence

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bratune.backend import Backend, Config
from bratune.errors import UnsupportedError
from bratune.kernels import registry
from bratune.kernels.api import routed_attention
from bratune.kernels.reference import ReferenceBackend
from bratune.machine import Machine, detect
from bratune.measure.gate import TOLERANCES, max_rel_err
from bratune.problem import Problem

__all__ = ["CASES", "BackendConformance", "Case", "Inputs", "problem_id"]


@dataclass(frozen=True)
class Case:
    """A problem and where its routes come from: ``random``, or ``repeated`` (duplicates in every row)."""

    problem: Problem
    routes: str = "random"

    def __str__(self) -> str:
        return problem_id(self.problem) + ("-repeated" if self.routes == "repeated" else "")


def problem_id(problem: Problem) -> str:
    """A short name of a problem, e.g. ``float32-2x56x56-r8x8-k4``."""
    p = problem
    text = f"{p.dtype}-{p.batch}x{p.height}x{p.width}-r{p.region[0]}x{p.region[1]}-k{p.topk}"
    if not p.same_regions:
        text += f"-kv{p.kv_height}x{p.kv_width}r{p.kv_region[0]}x{p.kv_region[1]}"
    if (p.heads, p.head_dim) != (2, 16):
        text += f"-h{p.heads}x{p.head_dim}"
    if p.v_head_dim != p.head_dim:
        text += f"-v{p.v_head_dim}"
    if p.per_head:
        text += "-heads"
    return text + ("-masked" if p.padding == "masked" else "")


def _problem(height: int, width: int, region: tuple[int, int], topk: int, **more: Any) -> Problem:
    sizes = {"batch": 2, "heads": 2, "head_dim": 16} | more
    return Problem(height=height, width=width, region=region, topk=topk, **sizes)


# What is odd about each stands behind it; padding of both kinds is wherever regions do not tile.
SHAPES = (
    _problem(16, 16, (8, 8), 1),
    _problem(16, 16, (4, 4), 4),
    _problem(12, 12, (2, 2), 16, batch=1),
    _problem(8, 8, (1, 1), 5, batch=1),  # regions of one token
    _problem(6, 9, (2, 3), 2, heads=1, head_dim=24),  # nothing is a power of two
    _problem(7, 5, (7, 5), 1, heads=3, head_dim=8),  # S = 1
    _problem(8, 8, (4, 4), 4, head_dim=64, batch=1),  # all regions
    _problem(13, 11, (4, 4), 3),
    _problem(9, 9, (8, 8), 2, heads=1, head_dim=32),  # three of four regions are mostly padding
    _problem(13, 11, (4, 3), 3, padding="masked"),
    _problem(9, 9, (8, 8), 2, padding="masked"),
    _problem(8, 8, (2, 2), 3, per_head=True),
    _problem(13, 11, (4, 4), 3, per_head=True, padding="masked"),
    _problem(16, 16, (4, 4), 2, kv_region=(8, 8)),
    _problem(16, 16, (4, 4), 3, kv_height=8, kv_width=8, kv_region=(2, 2)),
    _problem(13, 10, (5, 5), 2, kv_height=7, kv_width=9, kv_region=(3, 4), padding="masked"),
    _problem(12, 12, (4, 4), 1, kv_height=4, kv_width=4, kv_region=(4, 4)),  # one key region
    _problem(8, 8, (4, 4), 2, v_head_dim=24),
    _problem(8, 8, (4, 4), 2, scale=1.0),
)
CASES = (
    *(Case(p) for p in SHAPES),
    Case(_problem(8, 8, (2, 2), 5), routes="repeated"),
    Case(_problem(8, 8, (2, 2), 5, per_head=True), routes="repeated"),
    Case(_problem(9, 7, (4, 4), 3, padding="masked"), routes="repeated"),
    *(
        Case(_problem(*shape, dtype=dtype))
        for dtype in ("float64", "float16", "bfloat16")
        for shape in ((16, 16, (4, 4), 4), (13, 11, (4, 4), 3), (8, 8, (2, 2), 16))
    ),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, made from a seed; ``q``, ``k`` and ``v`` are values of the dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    cotangent: Tensor

    @classmethod
    def make(cls, case: Case, device: str, seed: int = 0) -> Inputs:
        """Inputs of a case: normal numbers, routes as the case says."""
        p = case.problem
        rng = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, p.dtype)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype).to(device)

        groups = (p.batch, p.heads, p.regions) if p.per_head else (p.batch, p.regions)
        order = torch.rand(*groups, p.kv_regions, generator=rng).argsort(dim=-1)
        routes = order[..., : p.topk]
        if case.routes == "repeated":
            routes = routes[..., torch.arange(p.topk) // 2]
        return cls(
            q=normal(p.batch, p.height, p.width, p.channels),
            k=normal(p.batch, p.kv_height, p.kv_width, p.channels),
            v=normal(p.batch, p.kv_height, p.kv_width, p.v_channels),
            routes=routes.contiguous().to(device),
            cotangent=normal(p.batch, p.height, p.width, p.v_channels),
        )

    def double(self) -> Inputs:
        """The same numbers in float64."""
        floats = (self.q, self.k, self.v, self.cotangent)
        q, k, v, cotangent = (x.double() for x in floats)
        return Inputs(q, k, v, self.routes, cotangent)


@functools.cache
def _machines() -> dict[str, Machine]:
    """The devices at hand by kind."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {kind: detect(kind) for kind in kinds}


@contextlib.contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """`torch.empty` and what is built on it hand out NaN, so that an unwritten element shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # Filling new memory is a part of the deterministic mode of torch.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class BackendConformance:
    """Inherit, set ``backend``, and pytest runs what every backend must satisfy.

    Attributes:
        backend: A backend, or the name of a registered one.
        config: Settings for all tests but that of the settings themselves; None is the backend's default.
        cases: What output and gradients are compared on.
    """

    backend: ClassVar[Backend | str]
    config: ClassVar[Config | None] = None
    cases: ClassVar[tuple[Case, ...]] = CASES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Gives every test its devices and, where it wants some, the cases that the backend accepts."""
        if "device" not in metafunc.fixturenames:
            return
        wants_cases = "case" in metafunc.fixturenames
        direction = "fwd-bwd" if "gradients" in metafunc.function.__name__ else "fwd"
        params = []
        for device in ("cpu", "cuda"):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if device not in _machines():
                skip = pytest.mark.skip(reason="needs a CUDA device; torch finds none")
                values = (None, device) if wants_cases else (device,)
                params.append(pytest.param(*values, marks=[*marks, skip], id=device))
            elif wants_cases:
                params += [
                    pytest.param(case, device, marks=marks, id=self._id(case, device))
                    for case in self._accepted_cases(direction, device)
                ]
            else:
                params.append(pytest.param(device, marks=marks, id=device))
        metafunc.parametrize(("case", "device") if wants_cases else ("device",), params)

    @classmethod
    def _accepted_cases(cls, direction: str, device: str) -> list[Case]:
        asked = [Case(case.problem.replace(direction=direction), case.routes) for case in cls.cases]
        return [case for case in asked if not cls._made().why_not(case.problem, _machines()[device])]

    @classmethod
    def _id(cls, case: Case, device: str) -> str:
        return f"{cls._made().name}-{case}" + ("" if device == "cpu" else f"-{device}")

    @classmethod
    def _made(cls) -> Backend:
        return registry.get(cls.backend) if isinstance(cls.backend, str) else cls.backend

    def _attend(self, inputs: Inputs, problem: Problem, config: Config | None = None) -> Tensor:
        settings = self.config if config is None else config
        return self._made().forward(inputs.q, inputs.k, inputs.v, inputs.routes, problem, settings)

    def _ask(self, device: str, *sizes: Any, **more: Any) -> Problem:
        """A problem that the backend accepts on a device; where it refuses, the test is skipped with why."""
        problem = _problem(*sizes, **more)
        reasons = self._made().why_not(problem, _machines()[device])
        if reasons:
            pytest.skip("; ".join(reasons))
        return problem

    # --- the result -------------------------------------------------------------------------

    def test_output_is_that_of_the_reference(self, case: Case, device: str) -> None:
        inputs = Inputs.make(case, device)
        found = self._attend(inputs, case.problem)
        assert found.dtype == inputs.q.dtype
        assert found.shape == inputs.cotangent.shape
        _assert_close(found, _right(case, device).output, case.problem.dtype)

    def test_gradients_are_those_of_the_reference(self, case: Case, device: str) -> None:
        inputs = Inputs.make(case, device)
        found = _gradients(inputs, lambda x: self._attend(x, case.problem))
        for name, mine, true in zip("qkv", found, _right(case, device).gradients, strict=True):
            _assert_close(mine, true, case.problem.dtype, gradient_of=name)

    # --- what must not matter ---------------------------------------------------------------

    @pytest.mark.parametrize("padding", ["zeros", "masked"])
    def test_unwritten_memory_never_shows(self, device: str, padding: str) -> None:
        problem = self._ask(device, 13, 11, (4, 4), 3, padding=padding)
        x = Inputs.make(Case(problem), device)
        with _nan_in_new_memory():
            found = self._attend(x, problem)
        assert found.isfinite().all(), f"{int((~found.isfinite()).sum())} numbers were never written"

    def test_all_regions_equal_dense_attention(self, device: str) -> None:
        problem = self._ask(device, 12, 8, (4, 4), 6)
        x = Inputs.make(Case(problem), device)
        q, k, v = (
            t.double().view(problem.batch, -1, problem.heads, problem.head_dim).transpose(1, 2)
            for t in (x.q, x.k, x.v)
        )
        attended = (q @ k.transpose(-2, -1) * problem.scale).softmax(-1) @ v
        expected = attended.transpose(1, 2).reshape(x.cotangent.shape)
        _assert_close(self._attend(x, problem), expected, problem.dtype)

    def test_order_of_routes_does_not_matter(self, device: str) -> None:
        problem = self._ask(device, 16, 16, (4, 4), 5)
        x = Inputs.make(Case(problem), device)
        turned = dataclasses.replace(x, routes=x.routes.flip(-1))
        _assert_close(self._attend(turned, problem), self._attend(x, problem), problem.dtype)

    def test_images_do_not_mix(self, device: str) -> None:
        problem = self._ask(device, 16, 16, (4, 4), 3)
        x = Inputs.make(Case(problem), device)
        expected = self._attend(x, problem)[:1]
        for image in (x.q[1], x.k[1], x.v[1]):
            image.fill_(torch.nan)
        found = self._attend(x, problem)
        _assert_close(found[:1], expected, problem.dtype)
        assert found[1].isnan().all()

    @pytest.mark.parametrize("layout", ["slices of qkv", "nchw"])
    def test_strides_do_not_matter(self, device: str, layout: str) -> None:
        problem = self._ask(device, 13, 11, (4, 4), 3)
        x = Inputs.make(Case(problem), device)
        if layout == "nchw":
            q, k, v = (t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (x.q, x.k, x.v))
        else:
            q, k, v = torch.cat([x.q, x.k, x.v], dim=-1).chunk(3, dim=-1)
        assert not q.is_contiguous()
        same = dataclasses.replace(x, q=q, k=k, v=v)
        _assert_close(self._attend(same, problem), self._attend(x, problem), problem.dtype)

    def test_routes_may_be_int32(self, device: str) -> None:
        for per_head in (False, True):
            problem = self._ask(device, 16, 16, (4, 4), 3, per_head=per_head)
            x = Inputs.make(Case(problem), device)
            short = dataclasses.replace(x, routes=x.routes.int())
            _assert_close(self._attend(short, problem), self._attend(x, problem), problem.dtype)

    def test_no_setting_changes_the_result(self, device: str) -> None:
        problem = self._ask(device, 13, 11, (4, 4), 3)
        x = Inputs.make(Case(problem), device)
        expected = _right(Case(problem), device).output
        for config in self._made().configs(problem, _machines()[device]):
            _assert_close(self._attend(x, problem, config), expected, problem.dtype)

    # --- what it says about itself ----------------------------------------------------------

    def test_it_keeps_the_interface(self, device: str) -> None:
        made, machine = self._made(), _machines()[device]
        assert isinstance(made, Backend)
        for case in CASES:
            reasons = made.why_not(case.problem, machine)
            assert reasons == made.why_not(case.problem, machine), "the same question, another answer"
            assert isinstance(reasons, tuple)
            assert all(isinstance(reason, str) and reason for reason in reasons)
            if not reasons:
                assert made.configs(case.problem, machine), "the default is a setting: at least ({},)"
                assert made.flops(case.problem) >= 2 * _fewest_macs(case.problem)
                assert made.workspace_bytes(case.problem) >= 0

    def test_a_refusal_is_an_error_with_every_reason(self, device: str) -> None:
        name = self._made().name
        if name not in registry.known_names():
            pytest.skip(f"{name} is not registered, so it cannot be asked for by name")
        for case in CASES:
            problem = case.problem
            reasons = self._made().why_not(problem, _machines()[device])
            if not reasons:
                continue
            x = Inputs.make(case, device)
            with pytest.raises(UnsupportedError) as refusal:
                routed_attention(
                    x.q,
                    x.k,
                    x.v,
                    x.routes,
                    heads=problem.heads,
                    region=problem.region,
                    kv_region=problem.kv_region,
                    scale=problem.scale,
                    padding=problem.padding,
                    backend=name,
                )
            assert refusal.value.reasons == reasons


def _fewest_macs(problem: Problem) -> int:
    """Multiply-adds of both products for real queries and real keys, were every routed region smallest."""
    smallest = (1 if not problem.divisible else problem.kv_region_tokens) * problem.topk
    return problem.batch * problem.tokens * smallest * (problem.channels + problem.v_channels)


@dataclass(frozen=True)
class _Right:
    """What is right for a case, in float64: the output, and the gradients with respect to q, k and v."""

    output: Tensor
    gradients: tuple[Tensor, ...]


def _right(case: Case, device: str) -> _Right:
    """What the reference makes of a case's inputs, whatever the direction that a test asks of its backend."""
    return _right_in_both_directions(Case(case.problem.replace(direction="fwd-bwd"), case.routes), device)


@functools.cache  # the loops of the reference take longer than most backends, of which each asks the same
def _right_in_both_directions(case: Case, device: str) -> _Right:
    x = Inputs.make(case, device).double()
    forward = ReferenceBackend().forward
    output, gradients = _differentiated(x, lambda x: forward(x.q, x.k, x.v, x.routes, case.problem))
    return _Right(output.detach(), gradients)


def _gradients(inputs: Inputs, attend: Callable[[Inputs], Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``sum(output * cotangent)`` with respect to q, k and v."""
    return _differentiated(inputs, attend)[1]


def _differentiated(inputs: Inputs, attend: Callable[[Inputs], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the gradients of ``sum(output * cotangent)`` with respect to q, k and v."""
    leaves = tuple(x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = attend(dataclasses.replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]))
    return out, torch.autograd.grad(out, leaves, inputs.cotangent)


def _assert_close(found: Tensor, expected: Tensor, dtype: str, gradient_of: str = "") -> None:
    __tracebackhide__ = True
    bound = TOLERANCES[dtype]
    error, tolerance = max_rel_err(found, expected), bound.gradient if gradient_of else bound.forward
    what = f"gradient of {gradient_of}" if gradient_of else "output"
    assert error <= tolerance, (
        f"{what} is off by {error:.1e} of its largest value; {tolerance:.0e} is allowed"
    )
