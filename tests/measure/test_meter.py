"""The sampling loop on a fake clock and a fake device: every discard, interval and reason is exact."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from bratune import machine, record
from bratune.errors import MeasureError
from bratune.measure.compiling import compile_call, forget_compiled
from bratune.measure.device import Call, Memory, Prepared, Sample
from bratune.measure.meter import DeviceMeter, Measurement, MeterSettings, meter_for
from bratune.measure.telemetry import Reading

COOL = Reading(sm_clock_mhz=1800, top_clock_mhz=1980, temp_c=50, power_w=300)
HOT = Reading(sm_clock_mhz=900, top_clock_mhz=1980, temp_c=92, power_w=200, throttle_reasons=("hw_thermal",))


@dataclasses.dataclass
class FakeDevice:
    """Device times come from a list (the last one repeats); time passes only here."""

    times_ms: Sequence[float] = (1.0,)
    host_ms: float | None = None
    readings: Sequence[Reading] = (Reading(),)
    flush_bytes: int = 64
    launch_floor_ms: float | None = None
    foreign: Sequence[int | None] = (None,)
    flush_s: float = 0.0
    prepare_s: float | None = None
    clock: float = 100.0
    log: list[str] = dataclasses.field(default_factory=list)

    @staticmethod
    def _turn(values: Sequence[object], done: int) -> object:
        return values[min(done, len(values) - 1)]

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.log.append(f"sleep {seconds:g}")
        self.clock += seconds

    def prepare(self, call: Call, regime: str) -> Prepared:
        self.log.append(f"prepare {regime}")
        return Prepared(call, self.prepare_s, call)

    def flush(self) -> None:
        self.log.append("flush")
        self.clock += self.flush_s

    def time(self, run: Callable[[], object]) -> Sample:
        run()
        value = self._turn(self.times_ms, self.log.count("time"))
        assert isinstance(value, float)
        self.log.append("time")
        self.clock += value / 1e3
        return Sample(value, self.host_ms)

    def memory(self, probe: Call) -> Memory:
        self.log.append("memory")
        return Memory(30.0, 40.0, 10.0)

    def read(self) -> Reading:
        reading = self._turn(self.readings, self.log.count("read"))
        self.log.append("read")
        assert isinstance(reading, Reading)
        return reading

    def foreign_processes(self) -> int | None:
        value = self._turn(self.foreign, self.log.count("foreign"))
        self.log.append("foreign")
        assert value is None or isinstance(value, int)
        return value


WARM = MeterSettings(
    min_time_s=0.0,
    max_noise_pct=1.0,
    timeout_s=10.0,
    min_samples=6,
    max_samples=1000,
    warmup_s=0.0,
    l2="warm",
)


def measure(device: FakeDevice, settings: MeterSettings = WARM) -> Measurement:
    return DeviceMeter(device).measure(lambda: None, settings)


def test_a_steady_call_stops_at_the_least_number_of_samples() -> None:
    m = measure(FakeDevice(times_ms=(2.0,)))
    assert m.samples_ms == (2.0,) * 6
    assert (m.stop_reason, m.n_discarded, m.median_ms, m.noise_pct) == ("noise", 0, 2.0, 0.0)


def test_what_was_timed_is_what_the_regime_has_made_of_the_call() -> None:
    def call() -> None: ...

    def compiled() -> None: ...

    class Compiling(FakeDevice):
        def prepare(self, call: Call, regime: str) -> Prepared:
            return Prepared(compiled, 1.0, call)

    assert DeviceMeter(FakeDevice()).measure(call, WARM).run is call
    assert DeviceMeter(Compiling()).measure(call, WARM.replace(regime="compile")).run is compiled


def test_order_of_work_is_prepare_warm_up_memory_then_samples() -> None:
    device = FakeDevice(flush_s=0.001)
    measure(device, WARM.replace(l2="cold", warmup_s=0.002, min_samples=2))
    assert device.log == [
        "prepare eager",
        *["time"] * 2,
        "memory",
        "foreign",
        *["flush", "time"] * 2,
        "read",
        "foreign",
    ]


def test_warm_up_is_not_among_the_samples() -> None:
    m = measure(FakeDevice(times_ms=(50.0, 40.0, 1.0)), WARM.replace(warmup_s=0.09))
    assert m.samples_ms == (1.0,) * 6


def test_a_warm_cache_is_never_flushed() -> None:
    device = FakeDevice()
    assert measure(device).flush_mb == 0.0
    assert "flush" not in device.log


def test_a_cold_cache_is_flushed_before_every_sample_and_the_bytes_are_kept() -> None:
    device = FakeDevice(flush_bytes=100_000_000)
    m = measure(device, WARM.replace(l2="cold"))
    assert device.log.count("flush") == m.n_samples == 6
    assert m.flush_mb == 100.0


def test_a_cold_cache_of_unknown_size_is_said_and_not_hidden() -> None:
    m = measure(FakeDevice(flush_bytes=0), WARM.replace(l2="cold"))
    assert m.stop_reason == "noise; the last-level cache is unknown and was not flushed"


def test_flushes_count_towards_the_time_of_sampling() -> None:
    m = measure(FakeDevice(flush_s=0.009), WARM.replace(l2="cold", min_time_s=0.2))
    assert m.n_samples == 20


def test_the_timeout_leaves_at_least_one_sample() -> None:
    m = measure(FakeDevice(times_ms=(20_000.0,)))
    assert m.samples_ms == (20_000.0,)
    assert m.stop_reason == "timeout: 1 of 6 samples in 10 s"
    assert m.noise_pct is None


def test_throttled_windows_are_discarded_and_waited_out_longer_each_time() -> None:
    # Windows of 50 ms hold five calls of 10 ms; the first two windows are throttled.
    device = FakeDevice(times_ms=(10.0,), readings=(HOT, HOT, COOL), foreign=(0,))
    m = measure(device, WARM.replace(min_samples=20))
    assert (m.n_samples, m.n_discarded) == (20, 10)
    assert [entry for entry in device.log if entry.startswith("sleep")] == ["sleep 0.1", "sleep 0.2"]
    assert m.throttle_reasons == ("hw_thermal",)
    assert (m.sm_clock_mhz, m.temp_c, m.power_w) == (1800, 50, 300)  # of what was kept


def test_slow_throttled_samples_do_not_shift_the_median() -> None:
    device = FakeDevice(times_ms=(1.0, *(25.0,) * 2, 10.0), readings=(HOT, COOL))
    m = measure(device)
    assert set(m.samples_ms) == {10.0}


def test_all_throttled_samples_are_kept_and_the_reason_says_so() -> None:
    device = FakeDevice(times_ms=(10.0,), readings=(HOT,))
    m = measure(device, WARM.replace(timeout_s=1.0))
    assert m.n_discarded == 0
    assert m.n_samples > 0
    assert m.stop_reason == "timeout: 0 of 6 samples in 1 s; every sample was throttled, all kept"
    assert m.throttle_reasons == ("hw_thermal",)


def test_pauses_never_outlast_the_timeout() -> None:
    device = FakeDevice(times_ms=(10.0,), readings=(HOT,))
    start = device.clock
    measure(device, WARM.replace(timeout_s=60.0))
    assert device.clock - start <= 60.1


def test_readings_are_summarised_over_windows() -> None:
    readings = [
        Reading(sm_clock_mhz=clock, top_clock_mhz=1980, temp_c=temp, power_w=power)
        for clock, temp, power in ((1500, 40, 100), (1700, 60, 300), (1900, 50, 200))
    ]
    m = measure(FakeDevice(times_ms=(10.0,), readings=readings), WARM.replace(min_samples=15))
    assert (m.sm_clock_mhz, m.temp_c, m.power_w) == (1700, 60, 200)


def test_absent_sensors_stay_empty() -> None:
    m = measure(FakeDevice())
    assert (m.sm_clock_mhz, m.temp_c, m.power_w, m.foreign_processes) == (None,) * 4


@pytest.mark.parametrize(
    ("foreign", "expected"), [((None, None), None), ((0, 2), 2), ((1, 0), 1), ((None, 1), 1), ((0, 0), 0)]
)
def test_foreign_processes_are_those_seen_before_or_after(
    foreign: tuple[int | None, ...], expected: int | None
) -> None:
    assert measure(FakeDevice(foreign=foreign)).foreign_processes == expected


@pytest.mark.parametrize(
    ("device_ms", "host_ms", "floor_ms", "expected"),
    [
        pytest.param(0.016, 0.008, 0.012, True, id="one kernel of 5 us behind a launch of 8 us"),
        pytest.param(0.031, 0.008, 0.012, False, id="one kernel of 20 us behind a launch of 8 us"),
        pytest.param(1.010, 1.000, 0.012, True, id="a hundred small kernels"),
        pytest.param(5.000, 1.000, 0.012, False, id="a hundred large kernels"),
        pytest.param(5.000, None, None, None, id="the host computes"),
    ],
)
def test_launch_bound_means_that_the_device_waits_for_the_host(
    device_ms: float, host_ms: float | None, floor_ms: float | None, expected: bool | None
) -> None:
    m = measure(FakeDevice(times_ms=(device_ms,), host_ms=host_ms, launch_floor_ms=floor_ms))
    assert m.launch_bound is expected
    assert m.host_ms == host_ms


def test_calls_that_take_turns_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is compiled beside another one must not make that one compile again when its turn comes."""
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def times(factor: int) -> Callable[[], Any]:
        return lambda: torch.ones(3) * factor

    compiled = [compile_call(times(factor))[0] for factor in range(12)]  # of one code object
    counted = torch._dynamo.utils.counters["stats"]
    assert counted["unique_graphs"] == 1, "of the last one"
    for _ in range(2):
        for factor, call in enumerate(compiled):
            assert torch.equal(cast(torch.Tensor, call()), torch.full((3,), float(factor)))
    assert counted["unique_graphs"] == 1
    forget_compiled()
    compiled[0]()
    assert counted["unique_graphs"] == 2


def test_the_time_to_compile_is_kept_apart() -> None:
    m = measure(FakeDevice(prepare_s=12.5), WARM.replace(regime="compile"))
    assert (m.compile_s, m.median_ms) == (12.5, 1.0)


def test_summary_of_known_samples() -> None:
    m = Measurement(samples_ms=tuple(float(i) for i in (10, 1, 9, 2, 8, 3, 7, 4, 6, 5)))
    assert (m.median_ms, m.min_ms, m.ci_lo_ms, m.ci_hi_ms) == (5.5, 1.0, 2.0, 9.0)
    assert (m.p10_ms, m.p90_ms) == pytest.approx((1.9, 9.1))
    assert m.noise_pct == pytest.approx(100 * 3.5 / 5.5)


def test_every_field_for_a_record_is_a_field_of_it() -> None:
    known = {field.name for field in dataclasses.fields(record.Record)}
    fields = measure(FakeDevice(foreign=(1,), host_ms=1.0)).to_record_fields()
    assert set(fields) <= known
    row = record.Record(cell_id="0", **fields)
    assert record.Record.from_json(row.to_json()) == row


def test_the_cpu_is_measured_for_real() -> None:
    import torch

    a = torch.ones(64, 1000)
    calls = 0

    def call() -> object:
        nonlocal calls
        calls += 1
        return a * 2, a + 1

    meter = meter_for(machine.detect("cpu"))
    m = meter.measure(
        call,
        MeterSettings(min_time_s=0.0, min_samples=5, max_samples=5, max_noise_pct=0.0, warmup_s=0.0),
    )
    assert m.n_samples + m.n_discarded == 5  # those that waited for a processor are set aside
    assert calls == 5 + 1 + 1  # samples, one warm-up call, one call for memory
    assert m.min_ms > 0
    assert m.flush_mb > 0
    assert m.workspace_mb == pytest.approx(2 * 0.256, rel=0.01)  # two results of 64 x 1000 float32
    assert m.peak_alloc_mb is not None
    assert m.workspace_mb is not None
    assert m.peak_alloc_mb >= m.workspace_mb + 0.256  # and the input


def test_memory_that_an_operator_takes_and_gives_back_inside_is_seen() -> None:
    import torch

    a = torch.ones(1000, 250)
    meter = meter_for(machine.detect("cpu"))
    m = meter.measure(lambda: (a * 2 + 1).sum(), WARM.replace(max_samples=6))
    # Two temporaries of 1 MB live at once; the result is one number.
    assert m.workspace_mb == pytest.approx(2.0, rel=0.01)


def test_a_cpu_has_no_cuda_graphs_and_says_so() -> None:
    with pytest.raises(MeasureError, match="eager would work"):
        meter_for(machine.detect("cpu")).measure(lambda: None, WARM.replace(regime="graph"))


def test_a_call_that_raises_is_not_swallowed() -> None:
    def broken() -> None:
        raise ValueError("from the call")

    with pytest.raises(ValueError, match="from the call"):
        meter_for(machine.detect("cpu")).measure(broken, WARM)


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["cold", "warm"])
@pytest.mark.parametrize("regime", ["eager", "graph"])
def test_a_gpu_is_measured_for_real(regime: str, l2: str) -> None:
    import torch

    here = machine.detect("cuda")
    a = torch.ones(1024, 1024, device=here.device)
    m = meter_for(here).measure(lambda: a @ a, MeterSettings.for_effort("quick", regime=regime, l2=l2))
    assert m.min_ms > 0
    assert m.host_ms is not None
    assert m.workspace_mb == pytest.approx(4.19, rel=0.01)
    assert (m.flush_mb > 0) is (l2 == "cold")
    assert (m.compile_s is not None) is (regime == "graph")


@pytest.mark.parametrize(
    ("l2", "order"), [("warm", ["before", "time"]), ("cold", ["before", "flush", "time"])]
)
def test_what_precedes_a_call_runs_ahead_of_every_sample_and_is_not_timed(l2: str, order: list[str]) -> None:
    device = FakeDevice(times_ms=(2.0,))

    def before() -> None:
        device.log.append("before")
        device.clock += 1.0

    settings = WARM.replace(l2=l2, max_samples=7, min_samples=7, timeout_s=100.0)
    m = DeviceMeter(device).measure(lambda: None, settings, before=before)
    assert m.median_ms == 2.0
    sampled = device.log[device.log.index("before") :]
    assert [entry for entry in sampled if entry in order] == order * m.n_samples


# --- in turn -----------------------------------------------------------------------------------------------


def in_turn(
    device: FakeDevice, times: Sequence[Sequence[float]], settings: MeterSettings = WARM, **options: object
) -> tuple[list[Measurement], list[int]]:
    """Calls whose times come from lists of their own, and the order of their turns."""
    order: list[int] = []
    meter = DeviceMeter(device)

    def timed(run: Callable[[], object]) -> Sample:
        number = run()
        assert isinstance(number, int)
        value = times[number][min(order.count(number), len(times[number]) - 1)]
        order.append(number)
        device.clock += value / 1e3
        return Sample(value, waited_ms=device.waits.get(number, 0.0) * value, output=number)  # type: ignore[attr-defined]

    calls = [meter.ready(functools.partial(int, n), settings) for n in range(len(times))]
    device.time = timed  # type: ignore[method-assign]
    if not hasattr(device, "waits"):
        device.waits = {}  # type: ignore[attr-defined]
    return meter.in_turn(calls, settings, **options), order  # type: ignore[arg-type]


def test_every_round_runs_every_call_once_in_an_order_drawn_anew() -> None:
    found, order = in_turn(FakeDevice(), [[1.0], [2.0], [3.0]])
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(turns) == [0, 1, 2] for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 1
    assert [m.rounds for m in found] == [tuple(range(6))] * 3
    assert in_turn(FakeDevice(), [[1.0], [2.0], [3.0]], seed=0)[1] == order
    assert in_turn(FakeDevice(), [[1.0], [2.0], [3.0]], seed=1)[1] != order


def test_a_ratio_within_rounds_does_not_see_what_happens_to_all() -> None:
    drift = [1.0 + i for i in range(60)]
    (base, other), _ = in_turn(
        FakeDevice(), [[4 * d for d in drift], [2 * d for d in drift]], WARM.replace(min_samples=40)
    )
    assert other.speedup_over(base) == (2.0, 2.0, 2.0)
    assert base.noise_pct is not None
    assert base.noise_pct > 10


def test_a_hopeless_call_stops_taking_turns_and_the_one_it_is_compared_with_does_not() -> None:
    found, order = in_turn(FakeDevice(), [[5.0], [1.0], [10.0], [4.0]], worse=3.0)
    assert [m.n_samples for m in found] == [6, 6, 3, 6]  # the last one is faster than the first
    assert found[2].stop_reason.startswith("worse: every sample is above 5 ms")
    assert order.count(0) == 6
    found, _ = in_turn(FakeDevice(), [[2.0], [1.0], [10.0], [4.0]], worse=3.0)
    assert [m.n_samples for m in found] == [6, 6, 3, 3]


def test_samples_that_waited_for_a_processor_are_set_aside_but_never_all() -> None:
    device = FakeDevice()
    device.waits = {0: 0.5}  # type: ignore[attr-defined]
    found, _ = in_turn(device, [[1.0], [1.0]])
    assert [m.cpu_wait_pct for m in found] == [50.0, 0.0]
    assert (found[0].n_samples, found[0].n_discarded) == (6, 0)
    assert "waited for a processor in every sample" in found[0].stop_reason


def test_a_calm_half_of_the_samples_is_what_counts() -> None:
    class HalfBusy(FakeDevice):
        def time(self, run: Callable[[], object]) -> Sample:
            super().time(run)
            busy = self.log.count("time") % 2 == 0
            return Sample(10.0 if busy else 1.0, waited_ms=9.0 if busy else 0.0)

    m = measure(HalfBusy(), WARM.replace(min_samples=12, max_samples=12))
    assert (m.median_ms, m.n_samples, m.n_discarded) == (1.0, 6, 6)
    assert m.cpu_wait_pct == pytest.approx(100 * 54 / 66)


def test_a_throttled_window_is_set_aside_for_all_who_took_turns_in_it() -> None:
    found, _ = in_turn(FakeDevice(readings=(HOT, COOL)), [[20.0], [20.0]])
    assert [m.n_discarded for m in found] == [found[0].n_discarded] * 2
    assert found[0].n_discarded > 0
    assert [m.n_samples for m in found] == [6, 6]


def test_the_output_of_the_last_timed_call_is_kept() -> None:
    found, _ = in_turn(FakeDevice(), [[1.0], [2.0]])
    assert [m.output for m in found] == [0, 1]


def test_passes_share_the_time_of_one_long_measurement() -> None:
    whole = MeterSettings.for_effort("standard")
    part = whole.per_pass()
    assert whole.passes == 8
    assert part.min_time_s * 8 == pytest.approx(whole.min_time_s)
    assert part.max_noise_pct == pytest.approx(8**0.5 * whole.max_noise_pct)
    assert part.sampling != whole.sampling
    assert [MeterSettings.for_effort(e).passes for e in ("quick", "standard", "full")] == [2, 8, 16]


def test_calls_that_were_never_calm_in_the_same_round_have_a_ratio_all_the_same() -> None:
    own = Measurement(samples_ms=(1.0, 1.0, 1.0), rounds=(0, 1, 2), aside=((3, 10.0), (4, 10.0), (5, 10.0)))
    base = Measurement(samples_ms=(2.0, 2.0, 2.0), rounds=(3, 4, 5), aside=((0, 20.0), (1, 20.0), (2, 20.0)))
    ratio, low, high = own.speedup_over(base) or (0.0, 0.0, 0.0)
    assert (low, high) == (0.2, 20.0)
    assert low <= ratio <= high
    calm = dataclasses.replace(base, rounds=(0, 1, 2))
    assert own.speedup_over(calm) == (2.0, 2.0, 2.0)
