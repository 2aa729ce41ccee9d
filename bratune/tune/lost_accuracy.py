"""Lost accuracy: what may be claimed of it after looking at some pictures, and how many a claim needs.

A claim is an upper limit: with the confidence that was asked for, on other pictures like these no more than
so much of top-1 is lost. It rests on counts alone, on no score and no training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from bratune.measure.ranks import clopper_pearson

__all__ = [
    "ALLOWED_LOSS",
    "CONFIDENCE",
    "Counts",
    "change_interval",
    "images_needed",
    "most_lost",
    "most_lost_labelled",
    "need_in_words",
]

# Loss of top-1, as a fraction, that each pick rule accepts at most.
ALLOWED_LOSS = {"safe": 0.002, "balanced": 0.005, "fast": 0.015}
CONFIDENCE = 0.95
# More pictures than anybody has; where even they show nothing, none do.
MOST_IMAGES = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted of a setting.

    Attributes:
        images: Pictures that were looked at.
        differ: Of these, with another top class than by the reference.
        lost: Of these, right before and wrong now; None where labels are not known.
        gained: Of these, wrong before and right now.
    """

    images: int
    differ: int
    lost: int | None = None
    gained: int | None = None

    @property
    def labelled(self) -> bool:
        """Whether labels are known."""
        return self.lost is not None and self.gained is not None

    def most_lost(self, confidence: float = CONFIDENCE, *, among: int = 1) -> float:
        """Upper limit of lost top-1, as a fraction.

        Args:
            confidence: One-sided, that no limit of all of them is broken.
            among: Settings that were judged on the same pictures.
        """
        each = 1 - (1 - confidence) / max(among, 1)
        if self.lost is None or self.gained is None:
            return most_lost(self.differ, self.images, confidence=each)
        return most_lost_labelled(self.lost, self.gained, self.images, confidence=each)


def most_lost(differ: int, images: int, *, confidence: float = CONFIDENCE) -> float:
    """Upper limit of lost top-1, as a fraction, where labels are not known.

    Who answers as before cannot be wrong where it was right, so that no more is lost than differs.

    Args:
        differ: Pictures whose top class is another.
        images: Pictures that were looked at.
        confidence: One-sided.

    Source: Clopper and Pearson, Biometrika 26, 1934: exact, whatever the pictures.
    """
    return clopper_pearson(differ, images, 2 * confidence - 1)[1]


def most_lost_labelled(lost: int, gained: int, images: int, *, confidence: float = CONFIDENCE) -> float:
    """Upper limit of lost top-1, as a fraction, where labels are known; negative where some is gained.

    Args:
        lost: Pictures that were right and are wrong now.
        gained: Pictures that were wrong and are right now.
        images: Pictures that were looked at.
        confidence: One-sided.

    Source: the score interval of a difference of paired proportions, Tango, Statistics in Medicine 17, 1998.
    """
    z = NormalDist().inv_cdf(confidence)

    def too_large(difference: float) -> bool:
        a = 2 * images
        b = (2 * images - lost + gained) * difference - lost - gained
        c = -gained * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = images * (2 * share + difference * (1 - difference))
        return images * difference - (lost - gained) > z * math.sqrt(max(variance, 0.0))

    low, high = (lost - gained) / images, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if too_large(middle) else (middle, high)
    return high


def change_interval(
    gained: int, lost: int, images: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of a change of accuracy, as a fraction.

    Args:
        gained: Images that only the second model classified correctly.
        lost: Images that only the first did.
        images: All.
        confidence: Two-sided.

    Source: the variance of a difference of paired proportions (McNemar's counts b and c):
    ``((b + c) - (b - c)**2 / n) / n**2``.
    """
    change = (gained - lost) / images
    # One discordant image more than was seen, so that "none seen" is not taken for "none possible".
    error = math.sqrt(max((gained + lost + 1) - (gained - lost) ** 2 / images, 0.0)) / images
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return change - reach, change + reach


def images_needed(
    allowed: float, differ: float, *, labelled: bool, confidence: float = CONFIDENCE
) -> int | None:
    """How many pictures show that no more is lost than is allowed; None where no number does.

    Args:
        allowed: Loss of top-1, as a fraction.
        differ: Share of pictures whose top class is another; with labels, half of them are taken to be lost
            and half gained.
        labelled: Labels are known.
        confidence: One-sided.
    """

    def shown(images: int) -> bool:
        if labelled:
            half = round(differ * images / 2)
            return most_lost_labelled(half, half, images, confidence=confidence) <= allowed
        return most_lost(round(differ * images), images, confidence=confidence) <= allowed

    if differ >= allowed and not labelled:
        return None
    return _first(shown)


def need_in_words(allowed: float, counts: Counts, *, confidence: float = CONFIDENCE, among: int = 1) -> str:
    """What would have to be looked at to claim a loss, and what can be claimed from what was looked at."""
    share, labelled = counts.differ / counts.images, counts.labelled
    bound = counts.most_lost(confidence, among=among)
    each = 1 - (1 - confidence) / max(among, 1)
    needed = images_needed(allowed, share, labelled=labelled, confidence=each)
    claim = f"{counts.images:,} were given: {100 * max(bound, 0.0):.1f} points can be claimed"
    asked = f"for {100 * allowed:.1f} points at {share:.1%} disagreement"
    if needed is None:
        return f"{asked}: no number of pictures without labels is enough, labels can be; {claim}"
    what = "labelled pictures" if labelled else "pictures"
    return f"{asked}: {_rounded(needed):,} {what}; {claim}"


def _first(shown: Callable[[int], bool]) -> int | None:
    """The smallest number of pictures, to 1 %, for which something is shown."""
    low, high = 1, 64
    while not shown(high):
        low, high = high, 2 * high
        if high > MOST_IMAGES:
            return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def _rounded(count: int) -> int:
    """Two digits, rounded up: nobody counts pictures more exactly."""
    step: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // step) * step
