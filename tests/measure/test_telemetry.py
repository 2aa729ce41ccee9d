"""Telemetry against a stand-in for NVML: every query may be missing, refused or strange."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from bratune.machine import Machine
from bratune.measure.telemetry import Reading, Telemetry, connect, open_telemetry

GPU = Machine(kind="cuda", device="cuda:0", gpu_key="h100", gpu_name="NVIDIA H100", gpu_uuid="ab-12")
CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU")


class NVMLError(Exception):
    pass


class FakeNvml:
    """Answers what it was given; raises for everything else that it has, as NVML does."""

    def __init__(self, *, uuids: tuple[str, ...] = ("GPU-ab-12",), missing: str = "", **answers: Any) -> None:
        self.uuids, self.missing, self.answers = uuids, missing.split(), answers
        self.shut = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or name in self.missing:
            raise AttributeError(name)

        def query(handle: Any, *arguments: Any) -> Any:
            if name not in self.answers:
                raise NVMLError("Not Supported")
            answer = self.answers[name]
            return answer(*arguments) if callable(answer) else answer

        return query

    def nvmlInit(self) -> None:
        if "nvmlInit" in self.answers:
            raise NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.uuids:
            raise NVMLError("Not Found")
        return f"handle of {uuid}"


def fields(**values: tuple[int, int, Any]) -> Any:
    """Field id -> (return code, value type, value)."""
    members = {0: "dVal", 1: "uiVal", 3: "ullVal", 4: "sllVal"}

    def answer(ids: list[int]) -> list[Any]:
        code, kind, value = values.get(f"f{ids[0]}", (3, 0, 0))
        return [
            SimpleNamespace(nvmlReturn=code, valueType=kind, value=SimpleNamespace(**{members[kind]: value}))
        ]

    return answer


def sensors(**answers: Any) -> Telemetry:
    return connect(GPU, FakeNvml(**answers))


def test_a_full_reading() -> None:
    reading = sensors(
        nvmlDeviceGetClockInfo=1755,
        nvmlDeviceGetMaxClockInfo=1980,
        nvmlDeviceGetTemperature=61,
        nvmlDeviceGetFieldValues=fields(f186=(0, 1, 412_500)),
        nvmlDeviceGetCurrentClocksEventReasons=0x4 | 0x20 | 0x1,
    ).read()
    assert reading == Reading(
        sm_clock_mhz=1755,
        top_clock_mhz=1980,
        temp_c=61,
        power_w=412.5,
        throttle_reasons=("sw_power_cap", "sw_thermal"),
    )


def test_a_board_that_answers_nothing_reads_as_nothing() -> None:
    telemetry = sensors()
    assert telemetry.read() == Reading()
    assert telemetry.processes() is None
    assert telemetry.foreign_processes(holds_context=True) is None
    assert telemetry.energy_j() is None


def test_a_library_that_lacks_the_functions_reads_as_nothing() -> None:
    assert Telemetry(SimpleNamespace(), "handle").read() == Reading()


@pytest.mark.parametrize(
    "machine_and_nvml",
    [
        pytest.param((CPU, FakeNvml(nvmlDeviceGetClockInfo=1)), id="a CPU"),
        pytest.param((GPU, FakeNvml(nvmlInit=True, nvmlDeviceGetClockInfo=1)), id="no driver"),
        pytest.param((GPU, FakeNvml(uuids=(), nvmlDeviceGetClockInfo=1)), id="board not found"),
    ],
)
def test_without_a_board_nothing_is_read_and_nothing_raised(machine_and_nvml: tuple[Machine, Any]) -> None:
    telemetry = connect(*machine_and_nvml)
    assert not telemetry.present
    assert telemetry.read() == Reading()


@pytest.mark.parametrize("listed", ["ab-12", "GPU-ab-12", "MIG-ab-12"])
def test_the_board_is_found_by_uuid_with_or_without_a_prefix(listed: str) -> None:
    telemetry = connect(GPU, FakeNvml(uuids=(listed,), nvmlDeviceGetClockInfo=1000))
    assert telemetry.read().sm_clock_mhz == 1000


def test_the_older_name_of_throttle_reasons_is_used_where_the_new_one_is_missing() -> None:
    telemetry = sensors(
        missing="nvmlDeviceGetCurrentClocksEventReasons", nvmlDeviceGetCurrentClocksThrottleReasons=0x40
    )
    assert telemetry.throttle_reasons() == ("hw_thermal",)


def test_average_power_stands_in_for_instant_power() -> None:
    assert sensors(nvmlDeviceGetPowerUsage=250_000).power_w() == 250.0


@pytest.mark.parametrize(
    ("answers", "joules"),
    [
        ({"nvmlDeviceGetFieldValues": fields(f83=(0, 3, 7_000_000))}, 7000.0),
        ({"nvmlDeviceGetFieldValues": fields(f83=(0, 0, 1500.0))}, 1.5),
        ({"nvmlDeviceGetFieldValues": fields(f83=(3, 3, 0))}, None),  # refused: no zero joules
        ({"nvmlDeviceGetTotalEnergyConsumption": 9000}, 9.0),
    ],
)
def test_energy_is_a_counter_in_joules(answers: dict[str, Any], joules: float | None) -> None:
    assert sensors(**answers).energy_j() == joules


@pytest.mark.parametrize(
    ("clock", "top", "reasons", "throttled"),
    [
        (1900, 1980, (), False),
        (300, 1980, (), False),  # a locked clock is a choice
        (1900, 1980, ("sw_power_cap",), False),  # the normal speed of a board at work
        (1400, 1980, ("sw_power_cap",), True),
        (1900, 1980, ("hw_thermal",), True),
        (1900, 1980, ("hw_power_brake",), True),
        (None, None, ("sw_power_cap",), False),
        (None, None, ("sw_thermal",), True),
    ],
)
def test_throttled_means_that_the_time_is_not_the_boards_own(
    clock: float | None, top: float | None, reasons: tuple[str, ...], throttled: bool
) -> None:
    reading = Reading(sm_clock_mhz=clock, top_clock_mhz=top, throttle_reasons=reasons)
    assert reading.throttled is throttled


def process(pid: int, used: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


@pytest.mark.parametrize(
    ("compute", "holds_context", "foreign"),
    [
        pytest.param([process(os.getpid())], True, 0, id="alone"),
        pytest.param([process(os.getpid()), process(1)], True, 1, id="one other"),
        pytest.param([process(4_000_001)], True, 0, id="alone in a container"),
        pytest.param([process(4_000_001), process(4_000_002)], True, 1, id="one other in a container"),
        pytest.param([process(4_000_001)], False, 1, id="without a context"),
        pytest.param([], True, 0, id="a container that hides them"),
    ],
)
def test_foreign_processes_leave_this_one_out(
    compute: list[SimpleNamespace], holds_context: bool, foreign: int
) -> None:
    telemetry = sensors(nvmlDeviceGetComputeRunningProcesses=compute)
    assert telemetry.foreign_processes(holds_context=holds_context) == foreign


def test_a_process_with_two_kinds_of_context_is_one_process() -> None:
    telemetry = sensors(
        nvmlDeviceGetComputeRunningProcesses=[process(7, 2_000_000)],
        nvmlDeviceGetGraphicsRunningProcesses=[process(7, 2_000_000)],
    )
    found = telemetry.processes()
    assert found is not None
    assert [(p.pid, p.used_mb) for p in found] == [(7, 2.0)]


def test_the_library_is_shut_down_after_use() -> None:
    nvml = FakeNvml()
    with open_telemetry(GPU, nvml) as telemetry:
        assert telemetry.present
    assert nvml.shut == 1
