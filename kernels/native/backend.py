"""The backend ``native``: fused routed attention for CPUs, in C.

Nothing is gathered or permuted in memory: keys and values of a region are packed into a cache of the core
that needs them, from wherever they lie. How: ``attention.h`` and ``tiles.h`` beside this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bratune.backend import Config
from bratune.kernels.native import ops
from bratune.kernels.native.library import find
from bratune.kernels.native.run import MOST_CHANNELS
from bratune.machine import Machine
from bratune.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NativeBackend"]

_DTYPES = ("float16", "bfloat16", "float32")


class NativeBackend:
    """Fused attention in C: any strides, regions, padding and routes, three data types, both directions."""

    name = "native"
    checks_routes = True

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """What stands in its way: the machine, a missing compiler, the data type or the size of a head."""
        found = []
        if machine.is_cuda:
            found.append(f"runs on CPUs, found {machine.gpu_name}")
        else:
            library = find()
            if isinstance(library, str):
                found.append(library)
        if problem.dtype not in _DTYPES:
            found.append(f"computes in {', '.join(_DTYPES)}, found {problem.dtype}")
        if problem.head_dim % 8 or problem.head_dim > MOST_CHANNELS:
            found.append(
                f"needs heads of a multiple of 8 channels up to {MOST_CHANNELS}, found {problem.head_dim}"
            )
        if problem.v_head_dim != problem.head_dim:
            found.append(
                f"needs v to have as many channels per head as q and k, found {problem.v_head_dim} "
                f"and {problem.head_dim}"
            )
        return tuple(found)

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
        return ops.attend(q, k, v, routes, problem, str((config or {}).get("variant", "")))

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """The variant of the library: its default, and for bfloat16 on a CPU with tiles, without them."""
        library = "runs on CPUs" if machine.is_cuda else find()
        if isinstance(library, str):
            return ({},)
        found: list[Config] = [{"variant": library.default}]
        if library.default == "amx" and problem.dtype == "bfloat16":
            found.append({"variant": "avx512"})
        return tuple(found)

    def workspace_bytes(self, problem: Problem) -> int:
        """What threads hold of keys and values in float32, at most one copy each, and the statistics."""
        one_copy = 2 * 4 * problem.batch * problem.kv_padded[0] * problem.kv_padded[1] * problem.channels
        if not problem.backward:
            return one_copy
        lse = 4 * problem.batch * problem.heads * problem.regions * problem.region_tokens
        return 3 * one_copy + lse

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add of both products, padding included."""
        return 2 * problem.attention_macs
