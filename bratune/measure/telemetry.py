"""Telemetry: what a GPU's sensors say, through NVML.

Every query is optional: what a driver, a board or a container does not offer is None, never 0 and never an
exception. NVML numbers boards by itself and ignores ``CUDA_VISIBLE_DEVICES``, so a board is found by its
UUID or its PCI address, never by an index.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bratune.machine import Machine

__all__ = ["Process", "Reading", "Telemetry", "open_telemetry"]

# Bits of NVML's clock event reasons (called throttle reasons before driver 535).
_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "hw_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}
# An idle or a deliberately set clock is a state of the machine, not something that slows a sample down.
_HARMLESS = {"gpu_idle", "applications_clocks", "display_clocks", "sync_boost"}
# These say that the board protects itself: a time taken meanwhile is not the board's own.
_PROTECTIVE = {"hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake"}
# Boards under a power cap run below their top clock for as long as they work hard, which is their normal
# speed; only a clock under this share of the top counts as throttled.
_LOW_CLOCK = 0.75

_FIELD_TOTAL_ENERGY_MJ = 83
_FIELD_INSTANT_POWER_MW = 186
_SM_CLOCK = 1
_CORE_TEMPERATURE = 0
_VALUE_OF_TYPE = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Sensors at one moment; None where a sensor is absent.

    Attributes:
        sm_clock_mhz: Clock of the SMs.
        top_clock_mhz: Highest clock that the board may use.
        temp_c: Temperature of the core.
        power_w: Power drawn now (field 186), or the driver's average where that is not offered.
        throttle_reasons: What holds the clock down, idle and deliberate settings left out.
    """

    sm_clock_mhz: float | None = None
    top_clock_mhz: float | None = None
    temp_c: float | None = None
    power_w: float | None = None
    throttle_reasons: tuple[str, ...] = ()

    @property
    def throttled(self) -> bool:
        """Whether a time taken now would not be the board's own."""
        if _PROTECTIVE & set(self.throttle_reasons):
            return True
        if not self.throttle_reasons or self.sm_clock_mhz is None or self.top_clock_mhz is None:
            return False
        return self.sm_clock_mhz < _LOW_CLOCK * self.top_clock_mhz


@dataclass(frozen=True)
class Process:
    """A process on the GPU; memory is None where the driver does not tell."""

    pid: int
    used_mb: float | None


class Telemetry:
    """The sensors of one board.

    Args:
        nvml: The ``pynvml`` module, initialised (or a stand-in).
        handle: NVML's handle of the board; None reads nothing.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @property
    def present(self) -> bool:
        """Whether there is a board to read."""
        return self._handle is not None

    def read(self) -> Reading:
        """Clock, temperature, power and throttle reasons now."""
        return Reading(
            sm_clock_mhz=_number(self._ask("nvmlDeviceGetClockInfo", _SM_CLOCK)),
            top_clock_mhz=_number(self._ask("nvmlDeviceGetMaxClockInfo", _SM_CLOCK)),
            temp_c=self._temperature(),
            power_w=self.power_w(),
            throttle_reasons=self.throttle_reasons(),
        )

    def throttle_reasons(self) -> tuple[str, ...]:
        """What holds the clock down now; idle and deliberate settings are left out."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is None:
            return ()
        names = {name for bit, name in _REASONS.items() if int(bits) & bit}
        return tuple(sorted(names - _HARMLESS))

    def power_w(self) -> float | None:
        """Watts drawn now; the driver's running average where instant power is not offered."""
        milliwatts = self._field(_FIELD_INSTANT_POWER_MW)
        if milliwatts is None:
            milliwatts = _number(self._ask("nvmlDeviceGetPowerUsage"))
        return None if milliwatts is None else milliwatts / 1e3

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded, a counter; None before Volta and where it is not offered."""
        millijoules = self._field(_FIELD_TOTAL_ENERGY_MJ)
        if millijoules is None:
            millijoules = _number(self._ask("nvmlDeviceGetTotalEnergyConsumption"))
        return None if millijoules is None else millijoules / 1e3

    def processes(self) -> tuple[Process, ...] | None:
        """Every process with a compute or graphics context on the board; None when NVML will not say."""
        found: dict[int, Process] = {}
        answers = [
            self._ask("nvmlDeviceGetComputeRunningProcesses"),
            self._ask("nvmlDeviceGetGraphicsRunningProcesses"),
        ]
        if all(answer is None for answer in answers):
            return None
        for entry in (entry for answer in answers if answer is not None for entry in answer):
            used = _number(getattr(entry, "usedGpuMemory", None))
            found[int(entry.pid)] = Process(int(entry.pid), None if used is None else used / 1e6)
        return tuple(found.values())

    def foreign_processes(self, *, holds_context: bool) -> int | None:
        """Processes on the board other than this one; None when NVML will not say.

        In a container NVML lists process ids of the host, among which this process cannot find itself;
        one of them is then taken to be this process if it holds a context.

        Args:
            holds_context: This process has work on the board.
        """
        processes = self.processes()
        if processes is None:
            return None
        pids = {process.pid for process in processes}
        if os.getpid() in pids or (holds_context and pids):
            return len(pids) - 1
        return len(pids)

    def _temperature(self) -> float | None:
        value = _number(self._ask("nvmlDeviceGetTemperature", _CORE_TEMPERATURE))
        if value is None and hasattr(self._nvml, "nvmlDeviceGetTemperatureV"):
            value = _number(self._ask("nvmlDeviceGetTemperatureV", _CORE_TEMPERATURE))
        return value

    def _field(self, field_id: int) -> float | None:
        values = self._ask("nvmlDeviceGetFieldValues", [field_id])
        if values is None or len(values) != 1 or values[0].nvmlReturn != 0:
            return None
        member = _VALUE_OF_TYPE.get(int(values[0].valueType))
        return None if member is None else _number(getattr(values[0].value, member, None))

    def _ask(self, function: str, *arguments: Any) -> Any:
        """One query; None when the library lacks it, the board does not offer it or it is forbidden."""
        query: Callable[..., Any] | None = getattr(self._nvml, function, None)
        if query is None or not self.present:
            return None
        try:
            return query(self._handle, *arguments)
        except Exception:  # NVML has a class per error and more come with each driver; all mean "not here"
            return None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


@contextlib.contextmanager
def open_telemetry(machine: Machine, nvml: Any = None) -> Iterator[Telemetry]:
    """The sensors of a machine's board, for the length of a ``with`` block.

    Args:
        machine: Where; a CPU has no sensors here and reads as all None.
        nvml: Stand-in for the ``pynvml`` module.
    """
    telemetry = connect(machine, nvml)
    try:
        yield telemetry
    finally:
        if telemetry.present:
            with contextlib.suppress(Exception):
                telemetry._nvml.nvmlShutdown()


def connect(machine: Machine, nvml: Any = None) -> Telemetry:
    """The sensors of a machine's board, for as long as the process lives; see `open_telemetry`."""
    if not machine.is_cuda:
        return Telemetry(None, None)
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return Telemetry(None, None)
    try:
        nvml.nvmlInit()
    except Exception:  # no driver, or a container without the library
        return Telemetry(nvml, None)
    return Telemetry(nvml, _find(nvml, machine))


def _find(nvml: Any, machine: Machine) -> Any:
    """NVML's handle of the board behind a torch device; None when it cannot be told which one it is."""
    uuid = machine.gpu_uuid
    for name in (uuid, f"GPU-{uuid}", f"MIG-{uuid}") if uuid else ():
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except Exception:  # torch leaves out NVML's prefix
            continue
    address = _pci_address(machine.device)
    if address:
        with contextlib.suppress(Exception):
            return nvml.nvmlDeviceGetHandleByPciBusId(address)
    return None


def _pci_address(device: str) -> str:
    """``domain:bus:device.0`` of a torch device; empty when torch does not tell."""
    import torch

    try:
        props: Any = torch.cuda.get_device_properties(device)
        return f"{props.pci_domain_id:08x}:{props.pci_bus_id:02x}:{props.pci_device_id:02x}.0"
    except (AttributeError, AssertionError, RuntimeError, ValueError):
        return ""
