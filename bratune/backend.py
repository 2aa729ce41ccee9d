"""Backend: the one interface behind which every way to compute routed attention stands.

A backend is an object with a name. It may live in another package: the entry-point group
``bratune.backends`` adds it (docs: ``kernels/README.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from bratune.machine import Machine
from bratune.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Backend", "Config"]

# Settings of a backend that change its cost and never its result: tile sizes, warps, a variant's name.
Config: TypeAlias = Mapping[str, int | float | str | bool]


@runtime_checkable
class Backend(Protocol):
    """One way to compute `bratune.kernels.api.routed_attention`.

    Contract: `forward` gives the result of the ``reference`` backend within the tolerance of the dtype
    for every problem that `why_not` accepts; gradients of q, k and v come through autograd. Any layout
    change that it needs is part of its cost and happens inside `forward`.

    A backend that raises `bratune.errors.ProblemError` for routes that are out of range says so by an
    attribute ``checks_routes = True``; for others, `bratune.kernels.api.routed_attention` looks on a CPU.
    """

    @property
    def name(self) -> str:
        """What the command line and the records call it."""
        ...

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """Every obstacle, each a sentence with what was found and what is needed; empty: it accepts.

        Pure: no tensors, no device, the same answer every time.
        """
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """Attend from every query region to its routed key regions.

        Args:
            q: ``[B, Hq, Wq, heads * head_dim]``, any strides.
            k: ``[B, Hk, Wk, heads * head_dim]``, any strides.
            v: ``[B, Hk, Wk, heads * v_head_dim]``, any strides.
            routes: ``[B, R, topk]`` or, where ``problem.per_head``, ``[B, heads, R, topk]``; int32 or
                int64.
            problem: The call in numbers; its scale and padding are used, its sizes match the tensors.
            config: One of `configs`; by default the first.

        Returns:
            ``[B, Hq, Wq, heads * v_head_dim]`` in the dtype of q.
        """
        ...

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """Settings worth trying, the default first; ``({},)`` where there is nothing to set."""
        ...

    def workspace_bytes(self, problem: Problem) -> int:
        """Bytes that a forward pass allocates beyond its inputs and its output (an upper estimate)."""
        ...

    def flops(self, problem: Problem) -> int:
        """Floating-point operations that a forward pass performs, masked-out work included."""
        ...
