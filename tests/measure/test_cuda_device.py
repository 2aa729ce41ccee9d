"""The order in which the CUDA device does things, on stand-ins for torch's events, streams and graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bratune.errors import MeasureError
from bratune.machine import Machine
from bratune.measure import cuda
from bratune.measure.cuda import CudaDevice, flush_bytes_for

# A "GPU" whose tensors live on the CPU, so that its code runs where there is none.
BOARD = Machine(kind="cuda", device="cpu", gpu_key="x", gpu_name="no such board", l2_bytes=4096)


class FakeCuda:
    """Stands in for what the device uses of ``torch.cuda`` and writes down what happens."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capture_error: Exception | None = None
        log = self.log

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return 1.5

        class Stream:
            def __init__(self, device: object = None) -> None: ...

            def wait_stream(self, other: object) -> None:
                log.append("streams meet")

        class CUDAGraph:
            def replay(self) -> None:
                log.append("replay")

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, CUDAGraph

    def set_device(self, device: object) -> None: ...

    def synchronize(self, device: object = None) -> None:
        self.log.append("sync")

    def current_stream(self, device: object = None) -> Any:
        return self.Stream()

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.log.append("side stream")
        yield

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.log.append("capture")
        yield
        if self.capture_error:
            raise self.capture_error
        self.log.append("captured")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    monkeypatch.setattr("torch.cuda", made)
    return made


@pytest.fixture
def device(fake: FakeCuda) -> CudaDevice:
    made = CudaDevice(BOARD)
    fake.log.clear()
    return made


def test_a_sample_begins_and_ends_on_an_idle_device(device: CudaDevice, fake: FakeCuda) -> None:
    sample = device.time(lambda: fake.log.append("call"))
    assert fake.log == ["sync", "event", "call", "event", "wait"]
    assert sample.device_ms == 1.5
    assert sample.host_ms is not None


def test_the_launch_floor_is_that_of_the_smallest_call(device: CudaDevice) -> None:
    assert device.launch_floor_ms == 1.5


def test_a_graph_is_captured_after_warm_up_on_another_stream(device: CudaDevice, fake: FakeCuda) -> None:
    prepared = device.prepare(lambda: fake.log.append("call"), "graph")
    assert fake.log == [
        "streams meet",
        "side stream",
        *["call"] * 3,
        "streams meet",
        "sync",
        "capture",
        "call",
        "captured",
    ]
    fake.log.clear()
    prepared.run()
    assert fake.log == ["replay"]
    prepared.probe()  # memory is read from the call itself: a replay allocates nothing
    assert fake.log == ["replay", "call"]
    assert prepared.prepare_s is not None


def test_what_cannot_be_captured_is_one_sentence(device: CudaDevice, fake: FakeCuda) -> None:
    fake.capture_error = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.raises(
        MeasureError, match=r"captured in a CUDA graph: operation not permitted .* capturing$"
    ):
        device.prepare(lambda: None, "graph")


def test_running_out_of_memory_in_a_capture_stays_what_it_is(device: CudaDevice, fake: FakeCuda) -> None:
    fake.capture_error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        device.prepare(lambda: None, "graph")


def test_the_eager_regime_runs_the_call_itself(device: CudaDevice) -> None:
    def call() -> None: ...

    prepared = device.prepare(call, "eager")
    assert (prepared.run, prepared.probe, prepared.prepare_s) == (call, call, None)


def test_a_device_that_cannot_be_used_is_one_sentence(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(fake, "set_device", refuse)
    with pytest.raises(MeasureError, match="cpu cannot be used: no kernel image"):
        CudaDevice(BOARD)


@pytest.mark.parametrize(
    ("name", "reported", "expected"),
    [
        pytest.param("no such board", 50 * 2**20, 100 * 2**20, id="twice what the device reports"),
        pytest.param("NVIDIA H100 80GB HBM3", 50 * 2**20, 100 * 2**20, id="a known board that agrees"),
        pytest.param(
            "NVIDIA H100 80GB HBM3", 4 * 2**20, 100 * 2**20, id="a larger cache behind the inner one"
        ),
        pytest.param("no such board", 0, 0, id="unknown"),
    ],
)
def test_the_flush_covers_the_largest_known_cache_twice(name: str, reported: int, expected: int) -> None:
    machine = Machine(
        kind="cuda",
        device="cuda:0",
        gpu_key="x",
        gpu_name=name,
        sm_count=132,
        memory_gib=79.1,
        l2_bytes=reported,
    )
    assert flush_bytes_for(machine) == expected


def test_the_flush_buffer_is_not_counted_as_memory_of_the_call(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(cuda, "cuda_memory", lambda call, device, *, ignore_bytes: seen.append(ignore_bytes))
    device.memory(lambda: None)
    assert seen == [2 * 4096]
