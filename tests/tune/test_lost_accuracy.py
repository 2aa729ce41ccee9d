"""What is claimed about lost accuracy holds as often as it says, and needs as many pictures as it says."""

from __future__ import annotations

import numpy as np
import pytest

from bratune.tune.conclude import shared
from bratune.tune.evidence import agreement, measured_top1
from bratune.tune.lost_accuracy import (
    Counts,
    change_interval,
    images_needed,
    most_lost,
    most_lost_labelled,
    need_in_words,
)
from bratune.tune.pick import Verified, acceptable, pick
from bratune.tune.setting import Setting


def test_no_difference_on_n_pictures_leaves_three_in_n() -> None:
    """The rule of three: exact, ``1 - 0.05 ** (1 / n)``."""
    assert most_lost(0, 600) == pytest.approx(1 - 0.05 ** (1 / 600))
    assert most_lost(600, 600) == 1.0


@pytest.mark.parametrize(
    ("images", "lost", "gained"),
    [(200, 0.02, 0.01), (500, 0.03, 0.03), (1000, 0.01, 0.0), (300, 0.005, 0.005), (2000, 0.03, 0.02)],
)
def test_limits_hold_as_often_as_they_say(images: int, lost: float, gained: float) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(images, [lost, gained, 1 - lost - gained], size=2000)
    labelled = [most_lost_labelled(int(a), int(b), images) >= lost - gained for a, b, _ in drawn]
    blind = [most_lost(int(a + b), images) >= lost - gained for a, b, _ in drawn]
    assert np.mean(labelled) >= 0.935  # 0.95 less three standard errors of 2000 draws
    assert np.mean(blind) >= 0.95


def test_the_limit_of_paired_answers_is_tango_s_score_limit() -> None:
    """Of the published example, 32 lost, 16 gained of 1000: the score equation holds at the limit."""
    images, lost, gained = 1000, 32, 16
    limit = most_lost_labelled(lost, gained, images, confidence=0.975)
    # At the limit, gained is most likely the q that solves its likelihood equation with lost = q + limit.
    q = np.linspace(1e-6, 0.2, 400_001)
    likelihood = lost * np.log(q + limit) + gained * np.log(q) + (images - 48) * np.log(1 - 2 * q - limit)
    best = q[likelihood.argmax()]
    score = (lost - gained - images * limit) / np.sqrt(images * (2 * best + limit * (1 - limit)))
    assert score == pytest.approx(-1.95996, abs=1e-3)


def test_needed_pictures_are_said_for_labels_and_without() -> None:
    assert images_needed(0.005, 0.0, labelled=False) == pytest.approx(600, rel=0.02)
    assert images_needed(0.005, 0.06, labelled=False) is None
    labelled = images_needed(0.005, 0.06, labelled=True)
    assert labelled is not None
    half = round(0.03 * labelled)
    assert most_lost_labelled(half, half, labelled) <= 0.005
    assert most_lost_labelled(half // 2, half // 2, labelled // 2) > 0.005
    text = need_in_words(0.005, Counts(images=1000, differ=60, lost=30, gained=30))
    assert text == (
        "for 0.5 points at 6.0% disagreement: 6,600 labelled pictures; "
        "1,000 were given: 1.3 points can be claimed"
    )
    assert "no number of pictures without labels" in need_in_words(0.005, Counts(images=1000, differ=60))


def test_the_evidence_of_a_setting_chosen_among_others_holds_for_all_of_them() -> None:
    counts = Counts(images=1000, differ=30, lost=20, gained=10)
    alone = measured_top1(
        images=1000,
        change=-0.01,
        interval=change_interval(10, 20, 1000),
        top1=0.8,
        most_lost=counts.most_lost(),
        confidence=0.95,
    )
    assert shared(alone, counts, 1).values["interval"] == pytest.approx(alone.values["interval"])
    among = shared(alone, counts, 8)
    assert among.values["most_lost"] == pytest.approx(counts.most_lost(among=8))
    assert among.values["most_lost"] > alone.values["most_lost"]
    low, high = among.values["interval"]
    assert (low + high) / 2 == pytest.approx(-0.01)
    # The normal quantiles of 1 - 0.05 / 16 and of 0.975.
    one = alone.values["interval"]
    assert high - low == pytest.approx(2.7344 / 1.9600 * (one[1] - one[0]), rel=1e-3)
    assert "chosen among 8 on these images" in among.text
    blind = agreement(
        images=1000,
        agree=970,
        bound=(0.957, 0.98),
        kl=0.01,
        kl_interval=(0.005, 0.02),
        most_lost=most_lost(30, 1000),
        confidence=0.95,
    )
    counts = Counts(images=1000, differ=30)
    assert shared(blind, counts, 8).values["most_lost"] == pytest.approx(counts.most_lost(among=8))
    assert shared(blind, counts, 8).level == "E2"


def test_more_settings_on_the_same_pictures_widen_every_limit() -> None:
    counts = Counts(images=1000, differ=20, lost=10, gained=10)
    assert counts.most_lost(among=20) > counts.most_lost(among=1) > 0
    blind = Counts(images=1000, differ=20)
    assert blind.most_lost() > counts.most_lost()
    assert blind.most_lost() == pytest.approx(most_lost(20, 1000))


def verified(trial: int, ms: float, counts: Counts | None, loss: float = 0.001) -> Verified:
    setting = Setting(n_win=(7,), topks=(trial + 1,))
    return Verified(trial=trial, setting=setting, ms=ms, ci=(ms, ms), loss=loss, counts=counts)


REFERENCE = verified(0, 10.0, None, 0.0)
LIMITS = {"safe": 0.002, "balanced": 0.005, "fast": 0.015}


def test_the_count_decides_and_not_the_divergence() -> None:
    near = verified(1, 5.0, Counts(images=1000, differ=60, lost=40, gained=20), loss=1e-6)
    far = verified(2, 6.0, Counts(images=20_000, differ=40, lost=20, gained=20), loss=0.5)
    found = pick("balanced", [REFERENCE, near, far], limits=LIMITS)
    assert found.chosen.trial == 2
    assert "at most 0.5 points of top-1 lost on other pictures, at 95%" in found.reason
    assert "the nearest of 1 faster ones would need more to be shown" in found.reason
    assert "1,000 were given" in found.reason


def test_the_reference_is_always_acceptable_and_an_unshown_setting_never() -> None:
    few = verified(1, 1.0, Counts(images=100, differ=0, lost=0, gained=0), loss=0.0)
    assert acceptable([REFERENCE, few], LIMITS["balanced"]) == [REFERENCE]
    assert pick("safe", [REFERENCE, few], limits=LIMITS).chosen is REFERENCE
