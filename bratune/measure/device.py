"""Device: what the sampling loop asks of the hardware, so that a test can stand in for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from bratune.measure.telemetry import Reading

__all__ = ["Call", "Device", "Memory", "Prepared", "Sample"]

Call: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Attributes:
        device_ms: From its first to its last work on the device.
        host_ms: Until the host had enqueued it; None where the host does the work itself.
        waited_ms: Of it, spent waiting for a processor; None where that is not watched.
        output: What the call returned; the meter lets go of it before the next one.
    """

    device_ms: float
    host_ms: float | None = None
    waited_ms: float | None = None
    output: object = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Prepared:
    """A call made ready for a regime.

    Attributes:
        run: What is timed.
        prepare_s: Seconds that compiling or capturing took; None where there is nothing to prepare.
        probe: What the memory of one call is read from; for a captured graph the call itself, because a
            replay allocates nothing.
    """

    run: Call
    prepare_s: float | None
    probe: Call


@dataclass(frozen=True)
class Memory:
    """Memory of one call, in MB (10**6 bytes); None where it cannot be known.

    Attributes:
        peak_alloc_mb: Most that was allocated at once, inputs and weights included.
        peak_reserved_mb: Most that the caching allocator held.
        workspace_mb: Peak beyond what was live before the call: temporaries and output.
    """

    peak_alloc_mb: float | None = None
    peak_reserved_mb: float | None = None
    workspace_mb: float | None = None


class Device(Protocol):
    """A clock, a cache that can be flushed and sensors that can be read."""

    @property
    def flush_bytes(self) -> int:
        """Bytes that one flush writes; 0 when the last-level cache is unknown."""
        ...

    @property
    def launch_floor_ms(self) -> float | None:
        """Device time of the smallest possible call on an idle device; None where the host computes."""
        ...

    def now(self) -> float:
        """Seconds on a clock that only runs forward."""
        ...

    def sleep(self, seconds: float) -> None:
        """Do nothing for a while."""
        ...

    def prepare(self, call: Call, regime: str) -> Prepared:
        """Make a call ready for a regime; raises `MeasureError` where that cannot be done."""
        ...

    def flush(self) -> None:
        """Push everything out of the last-level cache."""
        ...

    def time(self, run: Call) -> Sample:
        """Time one call that begins on an idle device; on return the device is idle again."""
        ...

    def memory(self, probe: Call) -> Memory:
        """Memory of one untimed call."""
        ...

    def read(self) -> Reading:
        """Clock, temperature, power and throttle reasons now."""
        ...

    def foreign_processes(self) -> int | None:
        """Other processes that use the device; None when that cannot be known."""
        ...
