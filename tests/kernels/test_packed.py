"""A split that knows its own gradients gives the same numbers as any other, and copies less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bratune.kernels.packed import mark_packed, origin_of, split_packed


class Beside(torch.autograd.Function):
    """Stands for an attention whose gradients of q, k and v are written side by side: q * k + v."""

    written: list[Tensor]

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.origin = origin_of(q, k, v)  # type: ignore[attr-defined]
        return q * k + v

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k = ctx.saved_tensors  # type: ignore[attr-defined]
        whole = torch.cat([grad * k, grad * q, grad], -1)
        Beside.written.append(whole)
        return mark_packed(whole, [q.shape[-1]] * 3, ctx.origin)  # type: ignore[attr-defined]


def beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Beside.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture(autouse=True)
def _nothing_written() -> None:
    Beside.written = []


def projection() -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()


USES = {
    "once": lambda q, k, v: beside(q, k, v),
    "values also elsewhere": lambda q, k, v: beside(q, k, v) + v.sin(),
    "queries and keys also elsewhere": lambda q, k, v: beside(q, k, v) + q.sin() * k,
    "twice": lambda q, k, v: beside(q, k, v) * beside(q, k, v),
    "not at all": lambda q, k, v: q * k + v,
    "values left out": lambda q, k, v: q * k,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradients_are_those_of_an_ordinary_split(use) -> None:  # type: ignore[no-untyped-def]
    x = projection()
    weight = torch.arange(1.0, 5.0)
    (mine,) = torch.autograd.grad((use(*split_packed(x, [4, 4, 4])) * weight).sum(), x)
    (true,) = torch.autograd.grad((use(*torch.split(x, [4, 4, 4], -1)) * weight).sum(), x)
    assert torch.equal(mine, true)


@pytest.mark.parametrize("also", [False, True], ids=["once", "values also elsewhere"])
def test_gradients_that_lie_together_are_not_copied_together(also: bool) -> None:
    x = projection()
    q, k, v = split_packed(x, [4, 4, 4])
    out = beside(q, k, v) + v.sin() if also else beside(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.data_ptr() == Beside.written[0].data_ptr()


def test_parts_of_two_splits_are_not_mixed_up() -> None:
    x = projection()
    q, _, v = split_packed(x, [4, 4, 4])
    other, k, _ = split_packed(x, [4, 4, 4])
    assert origin_of(q, k, v) is None
    (mine,) = torch.autograd.grad((beside(q, k, v) + other * v).sum(), x)
    q, k, v = x.chunk(3, -1)
    (true,) = torch.autograd.grad((q * k + v + q * v).sum(), x)
    torch.testing.assert_close(mine, true)


def test_a_second_derivative_goes_through_the_split() -> None:
    x = projection()
    q, k, v = split_packed(x, [4, 4, 4])
    (grad,) = torch.autograd.grad((q * k * v).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    q, k, v = x.chunk(3, -1)
    (plain,) = torch.autograd.grad((q * k * v).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(second, expected)


def test_a_compiled_split_is_an_ordinary_one() -> None:
    x = projection()

    def call(x: Tensor) -> Tensor:
        q, k, v = split_packed(x, [4, 4, 4])
        return q * k + v

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
