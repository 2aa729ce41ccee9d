"""Meter: from a call to a measurement.

    >>> from bratune import machine
    >>> meter = meter_for(machine.detect())
    >>> m = meter.measure(lambda: a @ b, MeterSettings.for_effort("quick"))
    >>> m.median_ms, m.ci_lo_ms, m.ci_hi_ms, m.stop_reason

One loop serves every device (`DeviceMeter`); what differs stands behind `bratune.measure.device.Device`.
Calls that are to be compared take turns: in every round each call runs once, in an order drawn anew, so that
what the machine does meanwhile happens to all of them (`DeviceMeter.ready`, then `DeviceMeter.in_turn`).
Whether the call computes the right thing is not asked here: `bratune.measure.gate` comes first.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics as means
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bratune.machine import Machine
from bratune.measure.device import Call, Device, Memory, Sample
from bratune.measure.settings import EFFORTS, MeterSettings, parse_percent, parse_seconds
from bratune.measure.statistics import median, median_interval, paired_ratio, quantile, relative_noise_pct
from bratune.measure.stopping import StopRule
from bratune.measure.telemetry import Reading

__all__ = [
    "EFFORTS",
    "DeviceMeter",
    "Measurement",
    "Meter",
    "MeterSettings",
    "Ready",
    "device_for",
    "meter_for",
    "parse_percent",
    "parse_seconds",
]

# Sensors are read between windows, never inside a sample: one NVML query may take a millisecond.
_WINDOW_S = 0.05
# After a throttled window the device rests, each time longer, so that it can cool.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
# A sample that waited for a processor for more than this share of its time is set aside. Waking a thread
# takes some microseconds of waiting by itself.
_WAITED_SHARE, _LEAST_WAIT_MS = 0.1, 0.05
# Samples before a call is judged: to be hopeless, or to have calm samples enough.
_GIVE_UP_AFTER = 3
# Rounds in which two calls were calm, below which all rounds are compared.
_FEWEST_PAIRS = 3


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Samples of one call and the state of the device while they were taken.

    Attributes:
        samples_ms: Kept samples in the order taken, in milliseconds.
        rounds: Round of each sample; calls that were measured in turn are compared within rounds.
        aside: Round and time of every sample that was set aside because the process waited for a processor.
        n_discarded: Samples set aside because the device was throttled or the process waited for a processor.
        cpu_wait_pct: Of the time of all samples, the share that was spent waiting for a processor; None where
            that is not watched.
        stop_reason: Why sampling ended (see `bratune.measure.stopping`); says so when every sample was
            throttled and therefore none was discarded.
        compile_s: Seconds of compiling or capturing before the first sample; None in the eager regime.
        host_ms: Median time until the host had enqueued the call; None on a CPU.
        launch_bound: The host, not the device, sets the pace; None on a CPU.
        peak_alloc_mb: Most memory allocated at once, inputs and weights included, in 10**6 bytes.
        peak_reserved_mb: Most that the caching allocator held; None on a CPU.
        workspace_mb: Peak beyond what was live before the call, its output included.
        flush_mb: Bytes written to flush the last-level cache before each sample; 0 when it was kept warm.
        sm_clock_mhz: Median SM clock over the sampling windows.
        temp_c: Highest temperature.
        power_w: Mean power over the windows.
        throttle_reasons: What slowed the device down in any window, sorted.
        foreign_processes: Other processes seen on the device before or after; None when unknown.
        run: What was timed: the call itself, or what compiling or capturing has made of it.
        output: What the last timed call returned.
    """

    samples_ms: tuple[float, ...]
    rounds: tuple[int, ...] = ()
    aside: tuple[tuple[int, float], ...] = ()
    n_discarded: int = 0
    stop_reason: str = ""
    compile_s: float | None = None
    host_ms: float | None = None
    launch_bound: bool | None = None
    peak_alloc_mb: float | None = None
    peak_reserved_mb: float | None = None
    workspace_mb: float | None = None
    flush_mb: float = 0.0
    sm_clock_mhz: float | None = None
    temp_c: float | None = None
    power_w: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    foreign_processes: int | None = None
    cpu_wait_pct: float | None = None
    run: Call | None = dataclasses.field(default=None, repr=False, compare=False)
    output: object = dataclasses.field(default=None, repr=False, compare=False)

    @functools.cached_property
    def _ordered(self) -> list[float]:
        return sorted(self.samples_ms)

    @property
    def n_samples(self) -> int:
        """Kept samples."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Middle of the samples."""
        return quantile(self._ordered, 0.5)

    @property
    def ci_lo_ms(self) -> float:
        """Lower end of the distribution-free 95 % interval of the median."""
        return median_interval(self._ordered)[0]

    @property
    def ci_hi_ms(self) -> float:
        """Upper end of the distribution-free 95 % interval of the median."""
        return median_interval(self._ordered)[1]

    @property
    def p10_ms(self) -> float:
        """A tenth of the samples are faster."""
        return quantile(self._ordered, 0.1)

    @property
    def p90_ms(self) -> float:
        """A tenth of the samples are slower."""
        return quantile(self._ordered, 0.9)

    @property
    def min_ms(self) -> float:
        """The fastest sample."""
        return self._ordered[0]

    @property
    def noise_pct(self) -> float | None:
        """Half the interval of the median in percent of it; None when one sample is all there is."""
        noise = relative_noise_pct(self._ordered)
        return None if noise == float("inf") else noise

    def speedup_over(self, base: Measurement) -> tuple[float, float, float] | None:
        """How many times faster than another call in the rounds that both ran in, with its 95 % interval.

        Rounds in which neither waited for a processor count, or all where there are fewer than three of them.

        Returns:
            Median of the ratios within rounds, lower and upper end; None without a round in common.
        """
        pairs = _pairs(
            zip(base.rounds, base.samples_ms, strict=True), zip(self.rounds, self.samples_ms, strict=True)
        )
        if len(pairs) < _FEWEST_PAIRS:  # of a busy machine: both sides of a ratio waited alike
            pairs = _pairs(base._every_round, self._every_round)
        if not pairs:
            return None
        ratio, (low, high) = paired_ratio([b for b, _ in pairs], [o for _, o in pairs])
        return ratio, low, high

    @property
    def _every_round(self) -> list[tuple[int, float]]:
        return [*zip(self.rounds, self.samples_ms, strict=True), *self.aside]

    def to_record_fields(self) -> dict[str, Any]:
        """What a `bratune.record.Record` keeps of it, by field name; raw samples travel separately."""
        shared = (
            "n_samples n_discarded median_ms ci_lo_ms ci_hi_ms p10_ms p90_ms min_ms noise_pct stop_reason "
            "compile_s host_ms launch_bound peak_alloc_mb peak_reserved_mb workspace_mb flush_mb "
            "sm_clock_mhz temp_c power_w foreign_processes cpu_wait_pct"
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in shared.split()}
        return fields | {"n_processes": 1, "throttle_reasons": ",".join(self.throttle_reasons)}


class Meter(Protocol):
    """Whoever can time a call."""

    def measure(self, call: Call, settings: MeterSettings, *, before: Call | None = None) -> Measurement:
        """Time a call as the settings ask.

        Args:
            call: Runs the whole work once (forward, or forward and backward), without waiting for the
                device; called many times.
            settings: How long, how often, in which regime.
            before: Run ahead of every sample and not timed: what precedes the call where it is used, so
                that caches hold what they hold there. A cold cache is flushed after it.

        Raises:
            MeasureError: the regime is not possible with this call or device.
        """
        ...


@dataclass(frozen=True)
class Ready:
    """A call that is prepared for its regime, warm, and whose memory is known.

    Attributes:
        run: What is timed.
        before: Run ahead of every sample and not timed.
        l2: See `MeterSettings.l2`.
        prepare_s: Seconds of compiling or capturing; None in the eager regime.
        memory: Of one call.
    """

    run: Call
    before: Call | None
    l2: str
    prepare_s: float | None
    memory: Memory


@dataclass
class _Player:
    """A call in the rounds, and what was seen of it."""

    ready: Ready
    rule: StopRule
    give_up: bool
    kept: list[tuple[int, Sample]] = dataclasses.field(default_factory=list)
    throttled: list[tuple[int, Sample]] = dataclasses.field(default_factory=list)
    window: list[tuple[int, Sample]] = dataclasses.field(default_factory=list)
    output: object = None
    reason: str = ""
    gave_up: bool = False

    def end_window(self, *, throttled: bool) -> None:
        """Keep the samples of the window, or set them aside."""
        if throttled:
            self.rule.withdraw(sample.device_ms for _, sample in self.window)
            self.throttled += self.window
        else:
            self.kept += self.window
        self.window = []

    @property
    def fastest_ms(self) -> float:
        """The fastest sample so far; infinite before the third."""
        taken = [sample.device_ms for _, sample in (*self.kept, *self.window)]
        return min(taken) if len(taken) >= _GIVE_UP_AFTER else float("inf")


class DeviceMeter:
    """The sampling loop, over any `Device`.

    Prepare for the regime, warm up by time, read memory from one untimed call, then sample in windows of
    about 50 ms until `StopRule` says of every call why to stop. Windows in which the device was throttled
    are set aside and followed by a pause; samples in which the process waited for a processor are set aside,
    too. If there are no others, they are kept and the stop reason says so.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def measure(self, call: Call, settings: MeterSettings, *, before: Call | None = None) -> Measurement:
        """See `Meter.measure`."""
        (found,) = self.in_turn([self.ready(call, settings, before=before)], settings)
        return found

    def ready(self, call: Call, settings: MeterSettings, *, before: Call | None = None) -> Ready:
        """Make a call ready to take turns; see `Meter.measure` for what it takes.

        Raises:
            MeasureError: the regime is not possible with this call or device.
        """
        prepared = self.device.prepare(call, settings.regime)
        self._warm_up(prepared.run, settings.warmup_s)
        memory = self.device.memory(prepared.probe)
        return Ready(prepared.run, before, settings.l2, prepared.prepare_s, memory)

    def in_turn(
        self,
        calls: Sequence[Ready],
        settings: MeterSettings,
        *,
        seed: int = 0,
        keep: Sequence[int] = (0,),
        worse: float | None = None,
        on_turn: Callable[[int], None] | None = None,
    ) -> list[Measurement]:
        """Time calls in rounds, every call once per round in an order drawn anew.

        Args:
            calls: What takes turns.
            settings: How long and how often; times are those of one call, of several so many times more.
            seed: Of the orders.
            keep: Numbers of the calls that never give up, such as the one that others are compared with.
            worse: How many times slower than the fastest a call must be to give up, and slower than those
                that never do; None never does.
            on_turn: Told the number of a call before each of its turns.

        Returns:
            One measurement per call.
        """
        device = self.device
        foreign = device.foreign_processes()
        players = [
            _Player(ready, StopRule(settings), worse is not None and number not in keep)
            for number, ready in enumerate(calls)
        ]
        self._rounds(players, settings, random.Random(seed), worse, on_turn)
        counts = (foreign, device.foreign_processes())
        most = max((n for n in counts if n is not None), default=None)
        return [self._summary(player, settings, most) for player in players]

    def _warm_up(self, run: Call, seconds: float) -> None:
        end = self.device.now() + seconds
        self.device.time(run)
        while self.device.now() < end:
            self.device.time(run)

    def _rounds(
        self,
        players: Sequence[_Player],
        settings: MeterSettings,
        rng: random.Random,
        worse: float | None,
        on_turn: Callable[[int], None] | None,
    ) -> None:
        device, start, pause, number = self.device, self.device.now(), _FIRST_PAUSE_S, 0
        self._readings: list[Reading] = []
        active = list(players)
        while True:
            end = device.now() + _WINDOW_S
            begun = False
            while not _over(active) and (not begun or device.now() < end):
                begun = True
                for player in rng.sample(active, len(active)):
                    if on_turn is not None:
                        on_turn(players.index(player))
                    self._turn(player, number)
                number += 1
                elapsed = (device.now() - start) / len(players)
                for player in active:
                    player.reason = player.rule.reason(elapsed)
                active = _without_hopeless(active, worse)
            reading = device.read()
            self._readings.append(reading)
            for player in players:
                player.end_window(throttled=reading.throttled)
            if reading.throttled:
                elapsed = (device.now() - start) / len(players)
                for player in active:
                    player.reason = player.rule.reason(elapsed)
                if not _over(active):
                    device.sleep(min(pause, max(0.0, settings.timeout_s * len(players) - elapsed)))
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
            if _over(active):
                return

    def _turn(self, player: _Player, number: int) -> None:
        """One sample of one call."""
        player.output = None
        if player.ready.before is not None:
            player.ready.before()
        if player.ready.l2 == "cold":
            self.device.flush()
        sample = self.device.time(player.ready.run)
        player.output = sample.output
        player.window.append((number, dataclasses.replace(sample, output=None)))
        player.rule.add(sample.device_ms)

    def _summary(self, player: _Player, settings: MeterSettings, foreign: int | None) -> Measurement:
        device, ready, reason = self.device, player.ready, player.reason
        kept, aside = player.kept, player.throttled
        if not kept:
            kept, aside, reason = aside, [], f"{reason}; every sample was throttled, all kept"
        waits = [sample.waited_ms for _, sample in kept if sample.waited_ms is not None]
        wait_pct = 100 * sum(waits) / sum(s.device_ms for _, s in kept) if waits else None
        calm = [taken for taken in kept if not _disturbed(taken[1])]
        if len(calm) < min(_GIVE_UP_AFTER, len(kept)):
            reason += "; the process waited for a processor in every sample, all kept"
            calm = kept
        if ready.l2 == "cold" and not device.flush_bytes:
            reason += "; the last-level cache is unknown and was not flushed"
        return _summarise(
            calm,
            self._readings,
            aside=[taken for taken in kept if _disturbed(taken[1])] if calm is not kept else [],
            n_discarded=len(aside) + len(kept) - len(calm),
            reason=reason,
            ready=ready,
            floor_ms=device.launch_floor_ms,
            flush_bytes=device.flush_bytes if ready.l2 == "cold" else 0,
            foreign=foreign,
            wait_pct=None if wait_pct is None else min(100.0, wait_pct),
            output=player.output,
        )


def _pairs(base: Iterable[tuple[int, float]], own: Iterable[tuple[int, float]]) -> list[tuple[float, float]]:
    """Times of both in the rounds that both have."""
    theirs = dict(base)
    return [(theirs[number], ms) for number, ms in own if number in theirs]


def _over(active: Sequence[_Player]) -> bool:
    """Whether every call that still takes turns has a reason to stop."""
    return all(player.reason for player in active)


def _without_hopeless(active: Sequence[_Player], worse: float | None) -> list[_Player]:
    """Those that still take turns: not the ones whose own limit, or the fastest of all, rules them out.

    One that is faster than what it is compared with is worth a precise time, whoever else is faster still.
    """
    left = []
    fastest = min(player.fastest_ms for player in active)
    compared_with = max((player.fastest_ms for player in active if not player.give_up), default=0.0)
    for player in active:
        limit = float("inf") if worse is None else max(worse * fastest, compared_with)
        if player.give_up and limit < player.fastest_ms < float("inf"):
            player.reason = f"worse: every sample is above {limit:.3g} ms"
            player.gave_up = True
        if not player.gave_up:
            left.append(player)
    return left


def _disturbed(sample: Sample) -> bool:
    """Whether a sample says more about who else ran than about the call."""
    return sample.waited_ms is not None and sample.waited_ms > max(
        _WAITED_SHARE * sample.device_ms, _LEAST_WAIT_MS
    )


def _summarise(
    kept: Sequence[tuple[int, Sample]],
    readings: Sequence[Reading],
    *,
    aside: Sequence[tuple[int, Sample]],
    n_discarded: int,
    reason: str,
    ready: Ready,
    floor_ms: float | None,
    flush_bytes: int,
    foreign: int | None,
    wait_pct: float | None,
    output: object,
) -> Measurement:
    samples = [sample for _, sample in kept]
    host = [sample.host_ms for sample in samples if sample.host_ms is not None]
    host_ms = median(host) if host else None
    device_ms = median([sample.device_ms for sample in samples])
    usual = [r for r in readings if not r.throttled] or list(readings)
    clocks = [r.sm_clock_mhz for r in usual if r.sm_clock_mhz is not None]
    temps = [r.temp_c for r in usual if r.temp_c is not None]
    powers = [r.power_w for r in usual if r.power_w is not None]
    return Measurement(
        samples_ms=tuple(sample.device_ms for sample in samples),
        rounds=tuple(number for number, _ in kept),
        aside=tuple((number, sample.device_ms) for number, sample in aside),
        n_discarded=n_discarded,
        stop_reason=reason,
        compile_s=ready.prepare_s,
        host_ms=host_ms,
        launch_bound=_launch_bound(host_ms, device_ms, floor_ms),
        **dataclasses.asdict(ready.memory),
        flush_mb=flush_bytes / 1e6,
        sm_clock_mhz=median(clocks) if clocks else None,
        temp_c=max(temps, default=None),
        power_w=means.fmean(powers) if powers else None,
        throttle_reasons=tuple(sorted({name for r in readings for name in r.throttle_reasons})),
        foreign_processes=foreign,
        cpu_wait_pct=wait_pct,
        run=ready.run,
        output=output,
    )


def _launch_bound(host_ms: float | None, device_ms: float, floor_ms: float | None) -> bool | None:
    """Whether the device waits for the host.

    A sample begins on an idle device, so its device time is never less than the host's plus the latency of
    the last kernel. That latency is what the smallest call takes (``floor_ms``): a device that needs
    no longer than it after the host is done was waiting all along.
    """
    if host_ms is None:
        return None
    return host_ms >= device_ms - (floor_ms or 0.0)


def meter_for(machine: Machine) -> Meter:
    """The meter of a machine: CUDA events on a GPU, the wall clock on a CPU.

    Raises:
        MeasureError: the device of the machine cannot be used in this process.
    """
    return DeviceMeter(device_for(machine))


def device_for(machine: Machine) -> Device:
    """What takes single times on a machine; see `meter_for`."""
    if machine.is_cuda:
        from bratune.measure.cuda import CudaDevice

        return CudaDevice(machine)
    from bratune.measure.cpu import CpuDevice

    return CpuDevice(machine)
