"""Compiled: the time of the fused backend on a board, from its kernels compiled for that board.

Counting bytes and products says little about a kernel whose machine code can be looked at: registers, spills,
shared memory and resident warps decide how much of a rate it reaches. Where the compiler and a target for the
board are here, the kernels of the very call are compiled (nothing runs) and costed (`bratune.predict.cost`);
elsewhere the counts of `bratune.predict.attention` stand in.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

from bratune.errors import UnsupportedError
from bratune.gpus import GPU
from bratune.problem import Problem

__all__ = ["BACKEND", "CompiledTime", "compiled_time"]

# The backend whose kernels are Triton's.
BACKEND = "triton"
_BOUNDS = {
    "memory": "memory", "cache": "cache", "issue": "cores", "exp": "cores", "matrix": "compute",
    "latency": "latency",
}  # fmt: skip


@dataclass(frozen=True)
class CompiledTime:
    """What the compiled kernels of one attention call cost.

    Attributes:
        us: Microseconds of every launch; None for a launch that is too small to be costed.
        bound: What limits the longest launch.
        memory_bytes: Bytes from and to memory.
        detail: Registers, spills and resident warps of the longest launch, in words.
    """

    us: tuple[float | None, ...]
    bound: str
    memory_bytes: float
    detail: str


@functools.lru_cache(maxsize=1024)
def compiled_time(problem: Problem, board: GPU) -> CompiledTime | None:
    """The cost of the fused kernels of a call on a board.

    Returns:
        None where they cannot be compiled here: no Triton, no target for the board, or a process that
        interprets Triton.

    Raises:
        UnsupportedError: a kernel is not legal on the board (its shared memory, its instructions).
    """
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    from bratune.kernels.fused.launch import KINDS
    from bratune.predict.cost import cost_of, work_of
    from bratune.predict.offline import attention_launches
    from bratune.predict.targets import TARGETS

    target = TARGETS.get(f"sm{board.capability[0]}{board.capability[1]}")
    if target is None:
        return None
    launches = attention_launches(problem, target)
    costs = {kind: cost_of(found, kind, problem, board) for kind, found in launches.items() if kind in KINDS}
    if not costs:
        return None
    longest = max(costs, key=lambda kind: costs[kind].us)
    resources = launches[longest].resources
    if not resources.resident_warps:
        raise UnsupportedError(BACKEND, [f"not one block of {longest} fits an SM of {board.name}"])
    spills = f", {resources.stack_bytes} bytes spilled" if resources.stack_bytes else ""
    return CompiledTime(
        us=tuple(costs[kind].us if kind in costs else None for kind in launches),
        bound=_BOUNDS[costs[longest].bound],
        memory_bytes=sum(work_of(k, problem, launches[k].settings).memory_bytes for k in costs),
        detail=(
            f"{longest} compiled for {target.name}: {resources.registers} registers{spills}, "
            f"{resources.resident_warps} of {target.max_warps} warps per SM"
        ),
    )
