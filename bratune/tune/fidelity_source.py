"""Fidelity source: whoever says how far a setting is from the reference, and on what evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from bratune.tune.evidence import Evidence
from bratune.tune.setting import Setting

__all__ = ["Fidelity", "FidelitySource"]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How far a setting is from the reference.

    Attributes:
        loss: Smaller is closer; 0 for the reference itself. Its unit is the source's.
        evidence: What is known about accuracy, with its interval.
        usable: The setting may be picked; False where the source could not judge it.
    """

    loss: float
    evidence: Evidence
    usable: bool = True


@runtime_checkable
class FidelitySource(Protocol):
    """Judges settings; backends play no part, they compute the same function."""

    @property
    def key(self) -> str:
        """Text that is equal where losses may be reused: weights, images, reference."""
        ...

    @property
    def limits(self) -> dict[str, float]:
        """Largest loss for the pick rules ``safe``, ``balanced`` and ``fast``."""
        ...

    def stage_loss(self, index: int, n_win: int, topk: int) -> float:
        """The loss of the reference with only stage ``index`` (from 0) changed."""
        ...

    def joint(self, setting: Setting) -> Fidelity:
        """The loss and the evidence of a whole setting."""
        ...
