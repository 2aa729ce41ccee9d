"""The host's time per operation, on a clock that is known."""

from __future__ import annotations

import itertools

import pytest

from bratune.measure import host
from bratune.measure.health import check_host


def test_the_host_takes_the_median_round_over_its_operations() -> None:
    # A call takes 3 ms, except the first, which loads kernels, and one that was disturbed.
    took = [1.0, *[0.003] * 5, 0.5, *[0.003] * 5]
    ends = itertools.accumulate(itertools.chain.from_iterable((0.1, t) for t in took))
    ticks = iter(list(ends))
    assert host.launch_us("cpu", clock=lambda: next(ticks)) == pytest.approx(10.0)
    with pytest.raises(StopIteration):
        next(ticks)


def test_as_many_operations_are_counted_as_run() -> None:
    import torch
    from torch import nn

    from bratune.kernels.accounting import count

    layers = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()) for _ in range(host.LAYERS)]
    model = nn.Sequential(*layers).eval()
    x = torch.zeros(8, 16)
    assert count(lambda: model(x), weights=model).operations == host.OPERATIONS


def test_doctor_says_what_to_give_to_predictions() -> None:
    finding = check_host(11.27)
    assert finding.state == "ok"
    assert "11.3 us per operation" in finding.found
    assert "--host 11.3" in finding.advice
