"""The backend ``triton``: routed attention in fused kernels that read keys and values where they lie.

Nothing is gathered, permuted or padded in memory: beside its result a forward pass allocates the log-sum-exp
of every query, and only where a gradient is wanted. How: `bratune.kernels.fused.families`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bratune.backend import Config
from bratune.kernels.fused import launch
from bratune.kernels.fused import ops as fused_ops
from bratune.kernels.fused.call import INTERPRETING, as_text, full_config, statistics_planes
from bratune.kernels.fused.families import TABLE_ROW_BYTES, backward_families, forward_families
from bratune.machine import Machine
from bratune.problem import Problem, ceil_div

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TritonBackend"]

_DTYPES = ("float16", "bfloat16", "float32")
_MOST_CHANNELS = 128
_MOST_PROGRAMS = 2**31 - 1
_OLDEST = (8, 0)


class TritonBackend:
    """Fused kernels, written in Triton; any strides, regions, padding and routes, three dtypes."""

    name = "triton"

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """What stands in its way: the machine, the dtype or the size of a head."""
        found = []
        if not machine.is_cuda and not INTERPRETING:
            found.append(
                "needs a CUDA device (or TRITON_INTERPRET=1 in the environment, which is very slow), "
                f"found {machine.gpu_name}"
            )
        if machine.is_cuda and machine.capability < _OLDEST:
            found.append(f"needs compute capability 8.0 or newer, found {machine.compute_capability}")
        # What is installed here says nothing of a machine that is elsewhere.
        if machine.device != "absent":
            found += launch.missing_triton()
        if problem.dtype not in _DTYPES:
            found.append(f"computes in {', '.join(_DTYPES)}, found {problem.dtype}")
        if problem.head_dim > _MOST_CHANNELS:
            found.append(f"holds heads of at most {_MOST_CHANNELS} channels, found {problem.head_dim}")
        if problem.v_head_dim != problem.head_dim:
            found.append(
                f"needs v to have as many channels per head as q and k, found {problem.v_head_dim} "
                f"and {problem.head_dim}"
            )
        if problem.scale <= 0:
            found.append(f"needs a scale above 0, found {problem.scale}")
        if self._programs(problem) > _MOST_PROGRAMS:
            found.append(
                f"starts at most {_MOST_PROGRAMS} programs, found {self._programs(problem)}; "
                "a smaller batch would work"
            )
        return tuple(found)

    @staticmethod
    def _programs(problem: Problem) -> int:
        """The most programs that any of the kernels may start: a tile has at least 16 rows."""
        queries = problem.regions * ceil_div(problem.region_tokens, 16)
        keys = problem.kv_regions * ceil_div(problem.kv_region_tokens, 16)
        return problem.batch * problem.heads * max(queries, keys)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """Attend from every query region to its routed key regions; see `bratune.backend.Backend`."""
        return fused_ops.attend(q, k, v, routes, problem, as_text(config))

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """The table's settings for the preferred families, then other families and other tiles."""
        default = full_config(problem, {}, machine)
        found = [default, *_variants(default, problem, machine)]
        for family in forward_families(problem):
            if family != default["forward"]:
                found.append(full_config(problem, {"forward": family}, machine))
        if problem.backward:
            for family in backward_families(problem)[1:]:
                found.append(full_config(problem, {"backward": family}, machine))
        return tuple(found)

    def workspace_bytes(self, problem: Problem) -> int:
        """The statistics of every query where a gradient is wanted; on small maps, the table of routes."""
        found = 0
        if "image" in forward_families(problem):
            found += (
                problem.batch * (problem.heads if problem.per_head else 1) * problem.regions * TABLE_ROW_BYTES
            )
        if problem.backward:
            planes = statistics_planes(problem.dtype)
            found += problem.batch * problem.heads * problem.regions * problem.region_tokens * 4 * planes
        return found

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add of both products, padding included."""
        return 2 * problem.attention_macs


def _variants(
    default: dict[str, int | str], problem: Problem, machine: Machine
) -> Iterator[dict[str, int | str]]:
    """Other settings of the preferred families between which counting instructions does not decide."""
    warps = int(default["fwd_num_warps"])
    yield default | {"fwd_num_warps": warps * 2 if warps < 4 else warps // 2}
    if default["forward"] == "gather":
        for heads in (2, 4):
            if problem.heads % heads == 0:
                yield default | {"fwd_heads_per_program": heads}
    if default["forward"] == "stationary":
        yield default | {"fwd_splits": 2 * int(default["fwd_splits"])}
        if problem.heads % 2 == 0:
            yield default | {"fwd_heads_per_program": 3 - min(2, int(default["fwd_heads_per_program"]))}
    if problem.backward and default.get("dkv_chunk") == 0 and (chunk := launch.hub_chunk(problem)):
        # What hubs cost depends on the routes, which a problem does not tell.
        yield default | {"dkv_chunk": chunk}
    # Twice the keys in a tile take more tensor memory than the newest GPUs have.
    if problem.backward and default["backward"] == "image" and machine.capability < (10, 0):
        yield default | {"dkv_block_n": 64}
