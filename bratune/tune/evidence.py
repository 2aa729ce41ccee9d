"""Evidence: what is known about a setting's accuracy, in a label and one sentence with its interval.

``E0`` nothing was measured, only floors hold · ``E1`` short trainings, weight-shared or one per setting ·
``E2`` agreement of outputs with a reference, and the bound that follows · ``E3`` top-1 measured on labelled
images. A bare score is never called accuracy. Attention-mass recall is
looked at beside it and decides nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "FROM_SCRATCH",
    "LEVELS",
    "Evidence",
    "LayerRecall",
    "agreement",
    "measured_top1",
    "not_trained",
    "prior_only",
    "recall_lines",
    "recall_text",
    "shared_run",
    "short_trainings",
    "stopped_training",
]

LEVELS = ("E0", "E1", "E2", "E3")

# What others know about training with another S or top-k; nothing in it is a measurement of ours.
FROM_SCRATCH = (
    "what is known about training from scratch with another S or top-k: the authors keep top-k 1/4/16 for "
    "every task and take S = 7, 8 or 16 (BiFormer, arXiv 2303.08810, and its configs); others train with "
    "2/4/8 (BRAU-Net++, arXiv 2401.00722); no published comparison at equal training was found. Smaller "
    "blocks let a router find what matters more surely, in language models (arXiv 2511.11571). A second "
    "training of biformer_tiny as published gave 81.26 % where the authors' log has 81.37 % (issue 32 of "
    "BiFormer's repository): a tenth of a point between two trainings says nothing. --train-trials "
    "compares settings on your own pictures, with paired seeds"
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A label, the sentence that is printed with it and the numbers behind the sentence."""

    level: str
    text: str
    values: dict[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evidence:
        """The inverse of `to_dict`."""
        return cls(**data)

    @property
    def from_scratch(self) -> bool:
        """Whether S or top-k changed, and no trained weights stand behind what is known."""
        return self.level in ("E0", "E1") and not self.values.get("unchanged", False)

    def __str__(self) -> str:
        return f"{self.level} {self.text}"


def prior_only(*, unchanged: bool, omega: float = 1.0) -> Evidence:
    """E0: no accuracy was looked at.

    Args:
        unchanged: S and top-k are the reference's own.
        omega: Share of the reference's keys per query that every stage keeps.
    """
    if unchanged:
        text = "same S and top-k as the reference: the function is the same, only its cost differs"
    else:
        share = "at least as many keys" if omega == 1.0 else f"at least {omega:.0%} of the keys"
        text = (
            f"prior only, no accuracy evidence: {share} per query as the reference in every stage, "
            "regions not larger"
        )
    return Evidence(level="E0", text=text, values={"omega": omega, "unchanged": unchanged})


def shared_run(*, gain: float, error: float, seeds: int) -> Evidence:
    """E1: difference to the reference in a weight-shared run, in points, with twice its standard error."""
    text = f"weight-shared short run, {_difference(gain, error)} ({seeds} seeds)"
    return Evidence(level="E1", text=text, values={"gain": gain, "standard_error": error, "seeds": seeds})


def short_trainings(*, gain: float, error: float, seeds: int, steps: int, not_worse: float) -> Evidence:
    """E1: difference between short trainings of a setting and of the reference, in points.

    Args:
        gain: Of validation accuracy.
        error: Its standard error.
        seeds: Pairs of trainings behind it.
        steps: Of each training.
        not_worse: Loss up to which a setting is called not worse.
    """
    low, high = gain - 2 * error, gain + 2 * error
    if high < 0:
        verdict = "worse"
    elif low >= -not_worse:
        verdict = f"not worse by more than {not_worse:g} points"
    else:
        verdict = f"undecided, up to {-low:.1f} points may be lost"
    pairs = f"{seeds} paired seed{'s' * (seeds != 1)} of {steps} steps"
    text = (
        f"short trainings, {gain:+.1f} +- {2 * error:.1f} points against the reference: {verdict} ({pairs})"
    )
    values = {"gain": gain, "standard_error": error, "seeds": seeds, "steps": steps, "not_worse": not_worse}
    return Evidence(level="E1", text=text, values=values)


def stopped_training(*, steps: int, of: int) -> Evidence:
    """E1: the short training of a setting was stopped because others were better."""
    text = f"short training stopped after {steps} of {of} steps: behind the median of the others there"
    return Evidence(level="E1", text=text, values={"steps": steps, "of": of})


def not_trained(*, most: int) -> Evidence:
    """E0: short trainings decide, and there was none for this setting."""
    text = f"not trained: all {most} trainings went to other settings, or this one failed"
    return Evidence(level="E0", text=text, values={"most": most})


def _difference(gain: float, error: float) -> str:
    distinct = "" if abs(gain) > 2 * error else ": not distinguishable"
    return f"{gain:+.1f} +- {2 * error:.1f} points against the reference{distinct}"


def agreement(
    *,
    images: int,
    agree: int,
    bound: tuple[float, float],
    kl: float,
    kl_interval: tuple[float, float],
    most_lost: float,
    confidence: float,
    top: str = "the checkpoint's own setting",
) -> Evidence:
    """E2: share of images with the same top class, which bounds the change of top-1 on them.

    Args:
        images: Images compared.
        agree: Of these, with the same top class.
        bound: Exact 95 % interval of that share for other images.
        kl: Mean divergence of the outputs, in nats.
        kl_interval: Its bootstrap interval.
        most_lost: Upper limit of lost top-1 on other images, as a fraction.
        confidence: Of that limit, one-sided.
        top: What was compared with.
    """
    share = agree / images
    text = (
        f"outputs agree with {top} on {share:.1%} of {images} images (accuracy on them cannot change by more "
        f"than {100 * (1 - share):.1f} points; on others no more than {100 * most_lost:.1f} are lost at "
        f"{confidence:.0%}); "
        f"KL {kl:.4f} [{kl_interval[0]:.4f}, {kl_interval[1]:.4f}]"
    )
    values = {
        "images": images,
        "agree": agree,
        "agreement_interval": list(bound),
        "kl": kl,
        "kl_interval": list(kl_interval),
        "most_lost": most_lost,
        "confidence": confidence,
    }
    return Evidence(level="E2", text=text, values=values)


def measured_top1(
    *,
    images: int,
    change: float,
    interval: tuple[float, float],
    top1: float,
    most_lost: float,
    confidence: float,
) -> Evidence:
    """E3: paired change of top-1 on labelled images, in points, with its 95 % interval.

    Args:
        images: Images compared.
        change: Of top-1, as a fraction.
        interval: Of the change.
        top1: Afterwards.
        most_lost: Upper limit of lost top-1 on other images, as a fraction.
        confidence: Of that limit, one-sided.
    """
    text = (
        f"top-1 {100 * top1:.1f} % measured on {images} labelled images: {100 * change:+.2f} points "
        f"[{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}] against the reference; on others no more than "
        f"{100 * max(most_lost, 0.0):.1f} are lost at {confidence:.0%}"
    )
    values = {
        "images": images,
        "change": change,
        "interval": list(interval),
        "top1": top1,
        "most_lost": most_lost,
        "confidence": confidence,
    }
    return Evidence(level="E3", text=text, values=values)


@dataclass(frozen=True, kw_only=True)
class LayerRecall:
    """What one routed layer sees of what full attention with its own queries and keys would see.

    Attributes:
        stage: From 1.
        block: From 1, within the stage.
        regions: Key regions of the map.
        topk: Of which every query region attends to so many.
        routed: Share of the attention mass in the regions of the router.
        best: Share in the best regions of that number, chosen by the mass itself.
    """

    stage: int
    block: int
    regions: int
    topk: int
    routed: float
    best: float


def recall_text(layers: Sequence[LayerRecall]) -> str:
    """Recall per stage in one line, mean over its layers: that of the router, of the best regions, and k."""
    parts = []
    for stage in sorted({layer.stage for layer in layers}):
        some = [layer for layer in layers if layer.stage == stage]
        routed, best = (sum(getattr(x, name) for x in some) / len(some) for name in ("routed", "best"))
        share = f"{some[0].topk}/{some[0].regions}"
        parts.append(f"stage {stage} {routed:.2f} of {best:.2f} (k {share})")
    return " · ".join(parts)


def recall_lines(diagnostics: Mapping[str, Any]) -> list[str]:
    """One line for the plan and one for the reference; none where nothing was looked at.

    Args:
        diagnostics: Those of a plan (`bratune.tune.plan.Plan`).
    """
    return [
        f"attention mass in routed regions, of the best possible ({name}; decides nothing): "
        + recall_text([LayerRecall(**layer) for layer in layers])
        for name, layers in diagnostics.get("recall", {}).items()
    ]
