"""MeterSettings: how long, how often and in which regime to sample; and the text forms of its numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bratune.cell import L2_STATES, REGIMES
from bratune.errors import UnknownNameError, UsageError

__all__ = ["EFFORTS", "MeterSettings", "parse_percent", "parse_seconds"]

EFFORTS = ("quick", "standard", "full")

_SECONDS = {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_seconds(text: str | float) -> float:
    """Seconds from ``0.5s``, ``200ms``, ``20m``, ``1h`` or a bare number of seconds.

    Raises:
        UsageError: the text is no duration, or it is negative.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _SECONDS:
        raise UsageError(f"{text!r} is not a duration; 0.5s, 200ms, 20m and 1h are")
    return float(match[1]) * _SECONDS[match[2]]


def parse_percent(text: str | float) -> float:
    """Percent from ``0.5%`` or a bare number of percent.

    Raises:
        UsageError: the text is no percentage, or it is negative.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*%?\s*", str(text).lower())
    if not match:
        raise UsageError(f"{text!r} is not a percentage; 0.5% and 2% are")
    return float(match[1])


@dataclass(frozen=True, kw_only=True)
class MeterSettings:
    """What one measurement is asked for.

    Attributes:
        min_time_s: Least wall time of sampling, flushes between samples included.
        max_noise_pct: Stop once the 95 % interval of the median is this narrow: half its width, in
            percent of the median.
        timeout_s: Most wall time of sampling; at least one sample is always taken.
        min_samples: Fewest samples before noise is judged.
        max_samples: Most samples.
        warmup_s: Wall time of untimed calls before the first sample; at least one call.
        l2: ``cold`` flushes the last-level cache before every sample, ``warm`` does not.
        regime: ``eager``, ``graph`` (CUDA graph) or ``compile`` (torch.compile).
        give_up_ms: Stop after three samples when all of them are slower: whoever asks has something clearly
            better already. None never gives up.
        passes: Fresh processes that a precise answer takes; each of them measures as `per_pass` says.

    Raises:
        UsageError: a number is out of range, or a name is not known.
    """

    min_time_s: float = 2.4
    max_noise_pct: float = 0.6
    timeout_s: float = 16.0
    min_samples: int = 48
    max_samples: int = 10_000
    warmup_s: float = 0.1
    l2: str = "cold"
    regime: str = "eager"
    give_up_ms: float | None = None
    passes: int = 8

    def __post_init__(self) -> None:
        for name, known in (("l2", L2_STATES), ("regime", REGIMES)):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        for name in ("min_time_s", "max_noise_pct", "warmup_s"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.passes < 1:
            raise UsageError(f"passes must be at least 1, not {self.passes}")
        if self.timeout_s <= 0:
            raise UsageError(f"timeout_s must be more than 0, not {self.timeout_s}")
        if not 1 <= self.min_samples <= self.max_samples:
            raise UsageError(
                f"min_samples must be 1 to max_samples ({self.max_samples}), not {self.min_samples}"
            )

    @classmethod
    def for_effort(cls, effort: str, **changes: Any) -> MeterSettings:
        """The preset of an effort: ``quick``, ``standard`` (the defaults) or ``full``.

        Args:
            effort: Name of the preset.
            changes: Values that differ from the preset.

        Raises:
            UnknownNameError: there is no such effort.
        """
        if effort not in _PRESETS:
            raise UnknownNameError("effort", effort, EFFORTS)
        return cls(**(_PRESETS[effort] | changes))

    @property
    def sampling(self) -> str:
        """How long and how often, in words; what a record keeps, so that it is only reused for the same."""
        return (
            f"{self.warmup_s:g} s warm-up, {self.min_time_s:g} to {self.timeout_s:g} s, "
            f"{self.min_samples} to {self.max_samples} samples, {self.max_noise_pct:g} % noise"
        )

    def per_pass(self) -> MeterSettings:
        """What one of `passes` fresh processes measures, so that all take about as long as one would.

        Noise within a pass may be larger by the square root of their number: it averages out over them.
        """
        fewest = max(_FEWEST, math.ceil(self.min_samples / self.passes))
        return self.replace(
            min_time_s=self.min_time_s / self.passes,
            timeout_s=self.timeout_s / self.passes,
            max_noise_pct=self.max_noise_pct * math.sqrt(self.passes),
            min_samples=fewest,
            max_samples=max(fewest, self.max_samples // self.passes),
        )

    def replace(self, **changes: Any) -> MeterSettings:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MeterSettings:
        """The inverse of `to_dict`."""
        return cls(**data)


# Six samples are the fewest for which a 95 % interval of the median exists.
_FEWEST = 6
_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "min_time_s": 0.05,
        "max_noise_pct": 4.0,  # two processes differ by more, and that decides the interval
        "timeout_s": 2.0,
        "min_samples": 7,
        "max_samples": 500,
        "warmup_s": 0.02,
        "passes": 2,
    },
    "standard": {},
    "full": {
        "min_time_s": 8.0,
        "max_noise_pct": 0.25,
        "timeout_s": 160.0,
        "min_samples": 128,
        "max_samples": 50_000,
        "warmup_s": 0.2,
        "passes": 16,
    },
}
