"""The stop rule, sample by sample, with exact reasons."""

from __future__ import annotations

import math

import pytest

from bratune.errors import UnknownNameError, UsageError
from bratune.measure.settings import MeterSettings, parse_percent, parse_seconds
from bratune.measure.stopping import StopRule

BASE = MeterSettings(min_time_s=1.0, max_noise_pct=1.0, timeout_s=10.0, min_samples=6, max_samples=1000)


def fed(settings: MeterSettings, samples: list[float]) -> StopRule:
    rule = StopRule(settings)
    for sample in samples:
        rule.add(sample)
    return rule


@pytest.mark.parametrize(
    ("samples", "elapsed_s", "expected"),
    [
        pytest.param([1.0] * 5, 2.0, "", id="too few samples"),
        pytest.param([1.0] * 6, 0.5, "", id="too little time"),
        pytest.param([1.0] * 6, 1.0, "noise", id="enough of both"),
        pytest.param([1.0, 1.1] * 3, 2.0, "", id="too noisy"),
        pytest.param([1.0] * 3, 10.0, "timeout: 3 of 6 samples in 10 s", id="timeout with few samples"),
        pytest.param([1.0, 1.1] * 3, 10.0, "timeout: noise 4.8 %, wanted 1 %", id="timeout with noise"),
    ],
)
def test_the_reason_to_stop(samples: list[float], elapsed_s: float, expected: str) -> None:
    assert fed(BASE, samples).reason(elapsed_s) == expected


def test_a_least_time_beyond_the_timeout_is_named_as_the_open_wish() -> None:
    rule = fed(BASE.replace(min_time_s=20.0), [1.0] * 6)
    assert rule.reason(10.0) == "timeout: sampled 10 of 20 s"


def test_the_most_samples_end_a_noisy_call() -> None:
    settings = BASE.replace(max_samples=8)
    assert fed(settings, [1.0, 2.0] * 3 + [1.0]).reason(0.1) == ""
    assert fed(settings, [1.0, 2.0] * 4).reason(0.1) == "max-samples"


def test_noise_that_stays_when_samples_double_twice_is_a_plateau() -> None:
    alternating = [1.0, 2.0] * 24
    assert fed(BASE, alternating[:47]).reason(2.0) == ""
    assert fed(BASE, alternating).reason(2.0) == "plateau: noise stays at 33 %, wanted 1 %"


def test_noise_that_shrinks_is_no_plateau() -> None:
    wide_then_close = [0.5, 1.5] * 4 + [0.9, 1.1] * 20
    assert fed(BASE, wide_then_close).reason(2.0) == ""


def test_a_plateau_within_the_target_is_reported_as_reached() -> None:
    assert fed(BASE, [1.0] * 24).reason(2.0) == "noise"


def test_a_clearly_worse_call_is_given_up_after_three_samples() -> None:
    settings = BASE.replace(give_up_ms=2.0)
    assert fed(settings, [5.0, 5.0]).reason(0.1) == ""
    assert fed(settings, [5.0, 5.0, 2.1]).reason(0.1) == "worse: every sample is above 2 ms"
    assert fed(settings, [5.0, 5.0, 1.9]).reason(0.1) == ""


def test_withdrawn_samples_do_not_count() -> None:
    rule = fed(BASE, [1.0] * 5 + [9.0, 9.0])
    rule.withdraw([9.0, 9.0])
    assert rule.n == 5
    assert rule.reason(2.0) == ""
    rule.add(1.0)
    assert rule.reason(2.0) == "noise"


def test_one_sample_has_infinite_noise_and_the_timeout_says_so() -> None:
    rule = fed(BASE.replace(min_samples=1), [1.0])
    assert rule.noise_pct == math.inf
    assert rule.reason(10.0) == "timeout: noise inf %, wanted 1 %"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0.5s", 0.5), ("200ms", 0.2), ("20m", 1200), ("20min", 1200), ("1h", 3600), ("3", 3), (2.5, 2.5)],
)
def test_durations_are_read_with_their_units(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "percent"), [("0.5%", 0.5), ("2 %", 2.0), ("1", 1.0), (0.25, 0.25)])
def test_percentages_are_read_with_or_without_the_sign(text: str | float, percent: float) -> None:
    assert parse_percent(text) == pytest.approx(percent)


@pytest.mark.parametrize("text", ["", "abc", "-1s", "5 parsecs", "1s2", "nan"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"0\.5s"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["", "abc", "-1%", "50%%"])
def test_what_is_no_percentage_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"0\.5%"):
        parse_percent(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l2": "lukewarm"}, "cold, warm"),
        ({"regime": "fast"}, "eager, graph, compile"),
        ({"min_samples": 0}, "min_samples"),
        ({"min_samples": 20, "max_samples": 10}, "max_samples"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"warmup_s": -1.0}, "warmup_s"),
        ({"max_noise_pct": -0.1}, "max_noise_pct"),
    ],
)
def test_settings_are_checked_when_made(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MeterSettings(**values)  # type: ignore[arg-type]


def test_efforts_ask_for_more_in_order() -> None:
    quick, standard, full = (MeterSettings.for_effort(e) for e in ("quick", "standard", "full"))
    assert quick.timeout_s < standard.timeout_s < full.timeout_s
    assert quick.max_noise_pct > standard.max_noise_pct > full.max_noise_pct
    assert quick.min_samples < standard.min_samples < full.min_samples


def test_a_preset_takes_changes() -> None:
    assert MeterSettings.for_effort("quick", l2="warm").l2 == "warm"


def test_sampling_in_words_tells_efforts_apart_and_not_cells() -> None:
    quick, full = MeterSettings.for_effort("quick"), MeterSettings.for_effort("full")
    assert quick.sampling == "0.02 s warm-up, 0.05 to 2 s, 7 to 500 samples, 4 % noise"
    assert quick.sampling != full.sampling
    assert quick.sampling == quick.replace(l2="warm", regime="graph", give_up_ms=1.0).sampling


def test_an_unknown_effort_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="quick, standard, full"):
        MeterSettings.for_effort("thorough")


def test_settings_survive_a_round_trip() -> None:
    settings = MeterSettings.for_effort("full", regime="graph", give_up_ms=3.0)
    assert MeterSettings.from_dict(settings.to_dict()) == settings
