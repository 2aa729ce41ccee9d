"""Calibration: how well the divergence ranks settings of given weights, and which divergence costs how much.

The divergence is computed on some pictures, accuracy on others, so that neither flatters the other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bratune.errors import StoreError
from bratune.measure.ranks import bootstrap_interval, spearman
from bratune.record import utc_now
from bratune.tune.checkpoint_fidelity import CheckpointFidelity
from bratune.tune.lost_accuracy import ALLOWED_LOSS, most_lost_labelled
from bratune.tune.setting import Setting
from bratune.tune.show import Say
from bratune.tune.space import Space

__all__ = ["Calibration", "CalibrationPoint", "calibrate", "isotonic", "stratified_settings"]

# Rank correlation whose interval reaches below this is no base for an order.
LEAST_RHO = 0.3


@dataclass(frozen=True, kw_only=True)
class CalibrationPoint:
    """One setting: what the proxy said and what happened.

    Attributes:
        setting: In words.
        additive: Sum of the divergences with one stage changed.
        divergence: Joint divergence on the proxy's pictures.
        disagreement: Share of the proxy's pictures with another top class.
        change_same: Change of top-1 on those very pictures; never beyond ``disagreement``.
        drop: Loss of top-1 on the other pictures, as a fraction.
        most_lost: Upper limit of that loss, which the number of those pictures leaves open; see
            `bratune.tune.lost_accuracy`.
    """

    setting: str
    additive: float
    divergence: float
    disagreement: float
    change_same: float
    drop: float
    most_lost: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found for some weights.

    Attributes:
        points: One per setting.
        rho: Spearman's correlation of divergence and loss of top-1.
        rho_interval: Bootstrap 95 % interval over the settings.
        additive_rho: Spearman's correlation of summed and joint divergence.
        limits: By pick rule, the largest divergence up to which no more than the rule allows was shown to be
            lost here, the noise of the test pictures included. They are told, and decide nothing.
        images: Pictures of the proxy.
        test_images: Pictures of top-1.
        top1: Of the reference, on those.
    """

    points: tuple[CalibrationPoint, ...]
    rho: float
    rho_interval: tuple[float, float]
    additive_rho: float
    limits: dict[str, float]
    images: int
    test_images: int
    top1: float

    @property
    def validated(self) -> bool:
        """Whether the divergence orders the settings of these weights."""
        return self.rho_interval[0] >= LEAST_RHO

    @property
    def violations(self) -> int:
        """Settings whose top-1 changed by more than the share of pictures that disagree: always 0."""
        return sum(abs(p.change_same) > p.disagreement + 1e-9 for p in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "validated": self.validated, "violations": self.violations}

    def save(self, path: Path) -> None:
        """Write it where `bratune tune` finds it."""
        try:
            path.write_text(json.dumps({"created_utc": utc_now(), **self.to_dict()}, indent=1) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"the calibration cannot be written to {path}: {reason}") from None

    def __str__(self) -> str:
        low, high = self.rho_interval
        verdict = "" if self.validated else ": not validated here"
        return (
            f"divergence against loss of top-1 over {len(self.points)} settings: Spearman {self.rho:.2f} "
            f"[{low:.2f}, {high:.2f}]{verdict}; additive against joint {self.additive_rho:.2f}; "
            f"agreement bound broken {self.violations} times"
        )


def stratified_settings(
    space: Space, source: CheckpointFidelity, count: int, *, seed: int = 0
) -> list[Setting]:
    """Settings spread evenly over the summed divergence, from small to large."""
    rng = random.Random(seed)
    losses = {(i, s, k): source.stage_loss(i, s, k) for i in space.routed for s, k in space.model_choices(i)}
    found: dict[str, tuple[float, Setting]] = {}
    for _ in range(20 * count):
        one = rng.choice([w.n_win for w in space.shared_windows()])
        sides = [space.base_n_win] * len(space.variant.dims)
        topks = list(space.variant.topks)
        total = 0.0
        for i in space.routed:
            sides[i] = rng.choice(space.windows(i)) if space.per_stage else one
            topks[i] = rng.choice(space.topks(i, sides[i]))
            total += losses[i, sides[i], topks[i]]
        setting = space.setting(sides, topks)
        found[space.model_key(setting)] = (total, setting)
    found.pop(space.model_key(source.reference), None)
    ordered = [setting for _, setting in sorted(found.values(), key=lambda pair: pair[0])]
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def calibrate(
    proxy: CheckpointFidelity,
    test: CheckpointFidelity,
    settings: Sequence[Setting],
    *,
    say: Say = lambda text: None,
    seed: int = 0,
) -> Calibration:
    """Compare divergence and loss of top-1 over settings.

    Args:
        proxy: Weights with the proxy's pictures; its labels are used for the agreement bound only.
        test: The same weights with other, labelled pictures.
        settings: Without the reference.
        say: Told about every setting.
        seed: Of the bootstrap.
    """
    before = test.correct(test.reference)
    assert before is not None
    points = []
    for setting in settings:
        fidelity = proxy.joint(setting)
        after = test.correct(setting)
        assert after is not None
        numbers = fidelity.evidence.values
        point = CalibrationPoint(
            setting=str(setting),
            additive=sum(proxy.stage_loss(i, setting.n_win[i], setting.topks[i]) for i in proxy.space.routed),
            divergence=fidelity.loss,
            disagreement=1 - numbers["agree"] / numbers["images"],
            change_same=numbers["change"],
            drop=float(before.float().mean() - after.float().mean()),
            most_lost=most_lost_labelled(
                int((before & ~after).sum()), int((~before & after).sum()), len(before)
            ),
        )
        points.append(point)
        say(f"{point.setting}: divergence {point.divergence:.4f}, top-1 {-100 * point.drop:+.1f} points")
    x = np.array([p.divergence for p in points])
    y = np.array([p.drop for p in points])
    return Calibration(
        points=tuple(points),
        rho=spearman(x, y),  # type: ignore[arg-type]
        rho_interval=bootstrap_interval(
            lambda rows: spearman(x[rows], y[rows]),  # type: ignore[arg-type]
            len(points),
            seed=seed,
        ),
        additive_rho=spearman([p.additive for p in points], [p.divergence for p in points]),
        limits=limits_of(points),
        images=len(proxy.pictures),
        test_images=len(before),
        top1=float(before.float().mean()),
    )


def limits_of(points: Sequence[CalibrationPoint]) -> dict[str, float]:
    """For each pick rule, the largest divergence whose loss of top-1 is shown to be accepted, or 0."""
    ordered = sorted(points, key=lambda p: p.divergence)
    fitted = isotonic([p.most_lost for p in ordered])
    return {
        rule: max((p.divergence for p, d in zip(ordered, fitted, strict=True) if d <= allowed), default=0.0)
        for rule, allowed in ALLOWED_LOSS.items()
    }


def isotonic(values: Sequence[float]) -> list[float]:
    """The closest rising sequence in squares: neighbours that fall are pooled to their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean = (mean * count + before * size) / (count + size)
            count += size
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def read_calibration(path: Path) -> dict[str, Any] | None:
    """The stored calibration of some weights; None where there is none.

    Raises:
        StoreError: the file is there and is none.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        limits = {name: float(found["limits"][name]) for name in ALLOWED_LOSS}
        assert all(math.isfinite(value) for value in limits.values())
        return {"limits": limits, "validated": bool(found["validated"])}
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise StoreError(f"{path} is no calibration ({error}); `bratune validate-proxy` makes one") from None
