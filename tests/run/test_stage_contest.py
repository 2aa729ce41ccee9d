"""Backends in turn: ratios within rounds, refusals with reasons, nothing timed that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from bratune.errors import UsageError
from bratune.machine import detect
from bratune.measure.cpu import CpuDevice
from bratune.measure.device import Sample
from bratune.profile.stage_contest import contest, main, stage_rows, table
from bratune.work.request import make_request

CPU = detect("cpu")


class FakeDevice(CpuDevice):
    """Takes the time that the call itself names, and is twice as slow in every other round."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.asked = 0

    def time(self, run: Callable[[], Any]) -> Sample:
        self.asked += 1
        return Sample(run() * (1 + (self.asked - 1) // 2 % 2))


def test_the_calls_take_turns_and_what_is_before_them_is_not_timed() -> None:
    order: list[str] = []

    def call(name: str, ms: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return ms

        return run

    calls = {"a": (call("a", 4.0), lambda: order.append("rest")), "b": (call("b", 2.0), None)}
    times = contest(calls, FakeDevice(), rounds=4)
    assert times == {"a": [8.0, 4.0, 8.0, 4.0], "b": [4.0, 2.0, 4.0, 2.0]}
    assert order == ["rest", "a", "b"] * 7


def test_real_backends_are_compared_within_rounds() -> None:
    request = make_request(
        CPU, backends=("gather", "dense", "triton"), image=(64, 64), n_win=(2,), topks=(1, 2, 4, -2)
    )
    rows = stage_rows(request, CPU, CpuDevice(CPU), stages=(3,), rounds=6)
    assert [(row.stage, row.backend) for row in rows] == [(3, "gather"), (3, "dense"), (3, "triton")]
    gather, dense, triton = rows
    assert (gather.ratio, gather.ratio_interval) == (1.0, (1.0, 1.0))
    assert dense.ratio is not None
    assert dense.ratio_interval is not None
    assert dense.ratio_interval[0] <= dense.ratio <= dense.ratio_interval[1]
    assert "CUDA device" in triton.reason
    text = table(rows, "gather")
    assert "not here: needs a CUDA device" in text
    assert text.count(" *") == 1


def test_a_baseline_that_does_not_run_is_refused_with_its_reason() -> None:
    request = make_request(
        CPU, backends=("gather", "triton"), image=(64, 64), n_win=(2,), topks=(1, 2, 4, -2)
    )
    with pytest.raises(UsageError, match="baseline triton does not run at stage 1: needs a CUDA device"):
        stage_rows(request, CPU, CpuDevice(CPU), baseline="triton", rounds=6)
    with pytest.raises(UsageError, match="baseline dense does not run at stage 1: it is not asked for"):
        stage_rows(request, CPU, CpuDevice(CPU), baseline="dense", rounds=6)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bratune.kernels.dense import DenseBackend

    right = DenseBackend.forward
    monkeypatch.setattr(DenseBackend, "forward", lambda *a, **k: right(*a, **k) * 1.5)
    request = make_request(CPU, backends=("gather", "dense"), image=(64, 64), n_win=(2,), topks=(1, 2, 4, -2))
    _, dense = stage_rows(request, CPU, CpuDevice(CPU), stages=(1,), rounds=6)
    assert dense.median_ms is None
    assert dense.reason.startswith("WRONG RESULT, not timed: ")


def test_the_command_prints_every_stage() -> None:
    asked = ["--res", "224", "--backend", "gather-sdpa", "--stage", "3", "--rounds", "6", "--device", "cpu"]
    found = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert found.exit_code == 0
    assert "biformer_tiny · classification · 224 · batch 1 · float32 · fwd · 6 rounds" in found.output
    lines = [line.split()[:2] for line in found.output.splitlines() if line.startswith("3 ")]
    assert lines == [["3", "gather"], ["3", "gather-sdpa"]]


def test_cold_caches_are_flushed_before_every_call() -> None:
    flushed = []

    class Counting(CpuDevice):
        def flush(self) -> None:
            flushed.append(1)

    asked: dict[str, Any] = {"image": (64, 64), "n_win": (2,), "topks": (1, 2, 4, -2)}
    for l2, expected in (("cold", 2 * (3 + 6)), ("warm", 0)):
        flushed.clear()
        request = make_request(CPU, backends=("gather", "dense"), l2=l2, **asked)
        stage_rows(request, CPU, Counting(CPU), stages=(3,), rounds=6)
        assert len(flushed) == expected
