"""Defaults: what every verb takes where nothing is said, in one table.

A question that is asked of `profile`, `tune` or `predict` with the same words is then the same cell.
"""

from __future__ import annotations

from dataclasses import dataclass

from bratune.machine import Machine

__all__ = ["MODEL", "TASK", "Defaults", "defaults_for"]

MODEL, TASK = "biformer_tiny", "classification"
# The first architecture whose tensor cores take bfloat16.
_BFLOAT16_SINCE = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a machine is measured where nothing is said.

    Attributes:
        dtype: Long name of the dtype: bfloat16 on a GPU (float16 where it has none), float32 on a CPU.
        layout: Memory order of images: ``nchw``, as data loaders and the official code hand them over.
        l2: ``cold`` on a GPU; ``warm`` on a CPU, where flushing 32 MB would take longer than most cells.
        effort: See `bratune.measure.settings.EFFORTS`.
    """

    dtype: str
    layout: str
    l2: str
    effort: str


def defaults_for(machine: Machine) -> Defaults:
    """The defaults of a machine, here or absent."""
    if not machine.is_cuda:
        return Defaults(dtype="float32", layout="nchw", l2="warm", effort="quick")
    old = (0, 0) < machine.capability < _BFLOAT16_SINCE
    return Defaults(dtype="float16" if old else "bfloat16", layout="nchw", l2="cold", effort="standard")
