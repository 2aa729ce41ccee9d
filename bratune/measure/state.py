"""State: what torch keeps for the whole process, so that one backend's choices do not reach the next cell.

>>> as_found = TorchState.now()
>>> torch.set_num_threads(1)
>>> as_found.restore()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TorchState"]

# Switches of `torch.backends`, by the path below it.
_SWITCHES = (
    ("cudnn", "benchmark"),
    ("cudnn", "deterministic"),
    ("cudnn", "enabled"),
    ("cudnn", "allow_tf32"),
    ("cuda", "matmul", "allow_fp16_reduced_precision_reduction"),
    ("cuda", "matmul", "allow_bf16_reduced_precision_reduction"),
)


@dataclass(frozen=True)
class TorchState:
    """Threads, precision, determinism, default dtype, gradients, random numbers and switches of backends."""

    threads: int
    matmul_precision: str
    deterministic: bool
    warn_only: bool
    default_dtype: torch.dtype
    gradients: bool
    switches: tuple[Any, ...]
    random: torch.Tensor

    @classmethod
    def now(cls) -> TorchState:
        """The state of this process."""
        return cls(
            threads=torch.get_num_threads(),
            matmul_precision=torch.get_float32_matmul_precision(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            default_dtype=torch.get_default_dtype(),
            gradients=torch.is_grad_enabled(),
            switches=tuple(getattr(_owner(path), path[-1]) for path in _SWITCHES),
            random=torch.get_rng_state(),
        )

    def restore(self) -> None:
        """Make it the state of this process again; denormals are kept, as torch does by default."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_default_dtype(self.default_dtype)
        torch.set_grad_enabled(self.gradients)
        torch.set_flush_denormal(False)
        for path, value in zip(_SWITCHES, self.switches, strict=True):
            setattr(_owner(path), path[-1], value)
        torch.set_rng_state(self.random)


def _owner(path: tuple[str, ...]) -> Any:
    owner: Any = torch.backends
    for name in path[:-1]:
        owner = getattr(owner, name)
    return owner
