"""When enough samples were taken, and why: one object that is shown every sample and asked after each.

The reasons, in the words that a record's ``stop_reason`` starts with:

``noise``       the median is known as well as was asked
``plateau``     samples were doubled twice and narrowed the interval neither time: more would not help
``worse``       the caller has something clearly better (`MeterSettings.give_up_ms`)
``max-samples`` the most samples that were allowed are taken
``timeout``     time is up; the text says which wish stayed open and by how much
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from bratune.measure.settings import MeterSettings
from bratune.measure.statistics import relative_noise_pct

__all__ = ["StopRule"]

# Independent samples narrow the interval by 1 - 1/sqrt(2) = 29 % when doubled; less than this third of
# it means that something slower than a sample (clocks, a neighbour) moves the median.
_PLATEAU_GAIN = 0.1
# Before four times the least number of samples the width of the interval is itself a matter of luck.
_PLATEAU_FROM = 4
_PLATEAU_DOUBLINGS = 2
_GIVE_UP_AFTER = 3


class StopRule:
    """Decides after every sample whether to go on.

    Args:
        settings: Noise target, least time and samples, most samples and time.
    """

    def __init__(self, settings: MeterSettings) -> None:
        self.settings = settings
        self._ordered: list[float] = []
        self._next_check = settings.min_samples * _PLATEAU_FROM
        self._noise_before = float("inf")
        self._stuck = 0

    @property
    def n(self) -> int:
        """Samples seen."""
        return len(self._ordered)

    @property
    def noise_pct(self) -> float:
        """Noise of the samples seen; infinite before the second."""
        return relative_noise_pct(self._ordered) if self._ordered else float("inf")

    def add(self, sample_ms: float) -> None:
        """Take note of one more kept sample, in milliseconds."""
        bisect.insort(self._ordered, sample_ms)
        if 2 * self.n == self._next_check:
            self._noise_before = self.noise_pct
        elif self.n == self._next_check:
            now = self.noise_pct
            self._stuck = self._stuck + 1 if now > (1 - _PLATEAU_GAIN) * self._noise_before else 0
            self._noise_before = now
            self._next_check *= 2

    def withdraw(self, samples_ms: Iterable[float]) -> None:
        """Forget samples that turned out to be throttled.

        Args:
            samples_ms: Values that were added before, in milliseconds.
        """
        for value in samples_ms:
            del self._ordered[bisect.bisect_left(self._ordered, value)]
        self._stuck = 0

    def reason(self, elapsed_s: float) -> str:
        """Why to stop now; empty means go on.

        Args:
            elapsed_s: Wall time since sampling began, pauses and flushes included.
        """
        wanted = self.settings
        if (
            wanted.give_up_ms is not None
            and self.n >= _GIVE_UP_AFTER
            and self._ordered[0] > wanted.give_up_ms
        ):
            return f"worse: every sample is above {wanted.give_up_ms:.3g} ms"
        if self.n >= wanted.min_samples and elapsed_s >= wanted.min_time_s:
            if self.noise_pct <= wanted.max_noise_pct:
                return "noise"
            if self._stuck >= _PLATEAU_DOUBLINGS:
                return f"plateau: noise stays at {self.noise_pct:.2g} %, wanted {wanted.max_noise_pct:g} %"
        if self.n >= wanted.max_samples:
            return "max-samples"
        if elapsed_s >= wanted.timeout_s:
            return f"timeout: {self._unmet(elapsed_s)}"
        return ""

    def _unmet(self, elapsed_s: float) -> str:
        wanted = self.settings
        if self.n < wanted.min_samples:
            return f"{self.n} of {wanted.min_samples} samples in {wanted.timeout_s:g} s"
        if elapsed_s < wanted.min_time_s:
            return f"sampled {elapsed_s:.3g} of {wanted.min_time_s:g} s"
        return f"noise {self.noise_pct:.2g} %, wanted {wanted.max_noise_pct:g} %"
