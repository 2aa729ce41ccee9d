"""Fidelity: how far the outputs of a model are from those of a reference, image by image.

The reference is the setting that the weights were trained with, never full attention: a network trained
sparse is damaged by attending to more. Nothing here needs labels except `paired_change`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bratune.errors import ProblemError
from bratune.measure.ranks import bootstrap_interval
from bratune.tune.lost_accuracy import change_interval

__all__ = [
    "agreement",
    "divergence",
    "feature_distance",
    "mean_interval",
    "paired_change",
]


def divergence(reference: Tensor, candidate: Tensor, valid: Tensor | None = None) -> Tensor:
    """KL divergence of the class probabilities of each image, in nats, computed in float32.

    Args:
        reference: Logits ``[N, classes]``, or ``[N, classes, H, W]`` for dense tasks.
        candidate: The same shape.
        valid: Positions that count, ``[N, H, W]`` bool; by default all. An image's value is their mean.

    Returns:
        ``[N]`` float32; 0 where both are equal.
    """
    _check_alike(reference, candidate)
    p, q = reference.float().log_softmax(1), candidate.float().log_softmax(1)
    return _mean_over_positions((p.exp() * (p - q)).sum(1).clamp_min(0), valid)


def agreement(reference: Tensor, candidate: Tensor) -> Tensor:
    """Whether the top class of each image is the same, ``[N]`` bool; logits as `divergence`, without maps.

    On these images the accuracy of two models cannot differ by more than the share that disagrees.
    """
    _check_alike(reference, candidate)
    return reference.argmax(1) == candidate.argmax(1)


def feature_distance(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> Tensor:
    """Relative L2 distance of feature maps, mean over the levels, ``[N]`` float32.

    Args:
        reference: Maps ``[N, C, H, W]``, one per level.
        candidate: The same shapes.
    """
    if len(reference) != len(candidate):
        raise ProblemError(f"{len(candidate)} levels cannot be compared with {len(reference)}")
    found = []
    for own, other in zip(reference, candidate, strict=True):
        _check_alike(own, other)
        scale = own.float().flatten(1).norm(dim=1).clamp_min(1e-12)
        found.append((other.float() - own.float()).flatten(1).norm(dim=1) / scale)
    return torch.stack(found).mean(0)


def paired_change(reference: Tensor, candidate: Tensor) -> tuple[float, tuple[float, float]]:
    """Change of accuracy between two models on the same images, and its 95 % interval.

    Args:
        reference: Whether each image was classified correctly, ``[N]`` bool.
        candidate: The same, by the other model.
    """
    n = len(reference)
    gained = int((~reference & candidate).sum())
    lost = int((reference & ~candidate).sum())
    return (gained - lost) / n, change_interval(gained, lost, n)


def mean_interval(values: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of per-image values (they are heavy-tailed)."""
    x = values.double().cpu().numpy()
    return bootstrap_interval(lambda rows: float(x[rows].mean()), len(x), seed=seed)


def _mean_over_positions(values: Tensor, valid: Tensor | None) -> Tensor:
    if values.ndim == 1:
        return values
    if valid is None:
        return values.flatten(1).mean(1)
    weights = valid.to(values.dtype)
    return (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1)


def _check_alike(reference: Tensor, candidate: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise ProblemError(f"outputs {list(candidate.shape)} cannot be compared with {list(reference.shape)}")
