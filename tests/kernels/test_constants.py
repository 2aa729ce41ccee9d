"""Index tables that are made once must serve every kind of call that comes later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bratune.kernels.api import route, routed_attention
from bratune.kernels.constants import constant_in_graphs, kept

BACKENDS = ("gather-sdpa", "dense")


def attend(size: tuple[int, int], backend: str, *, gradients: bool = False) -> tuple[Tensor, Tensor]:
    """The inputs and the output of a call on a map of its own size, whose tables nobody has made yet."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *size, 8, requires_grad=gradients) for _ in range(3))
    routes = route(q, k, region=(2, 3), topk=2)
    return q, routed_attention(q, k, v, routes, heads=2, region=(2, 3), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_with_gradients_may_follow_one_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        _, expected = attend((4, 9), backend)
    q, out = attend((4, 9), backend, gradients=True)
    out.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(out.detach(), expected.clone())
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_call_may_follow_one_on_fake_tensors_and_the_other_way_round(backend: str) -> None:
    with FakeTensorMode():
        _, first = attend((6, 6), backend)
    _, out = attend((6, 6), backend)
    with FakeTensorMode():
        _, last = attend((6, 6), backend)
    assert type(out) is Tensor
    assert type(first) is type(last) is not Tensor
    assert first.shape == last.shape == out.shape


def counted() -> tuple[list[int], Callable[[int], Tensor]]:
    calls = []

    @kept
    def numbers(count: int) -> Tensor:
        calls.append(count)
        return torch.arange(count)

    return calls, numbers


def test_kept_makes_once_per_arguments() -> None:
    calls, numbers = counted()
    assert numbers(3) is numbers(3)
    assert numbers(2).tolist() == [0, 1]
    assert calls == [3, 2]


def test_a_recorded_graph_shares_no_tensor_with_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, numbers = counted()
    before = numbers(3)
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_initialized", lambda: True)
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        during = numbers(3)
    assert during is not before
    assert numbers(3) is before
    assert calls == [3, 3]


def test_a_constant_of_graphs_is_marked_as_torch_marks_it() -> None:
    official: Any = torch.compiler.assume_constant_result
    assert vars(constant_in_graphs(lambda: 0)) == vars(official(lambda: 0)) != {}
