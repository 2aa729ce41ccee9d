"""Roofline: what a board can do at best, and how long a kernel takes on it.

A kernel takes the longest of four times: its bytes from memory, its bytes through the last-level cache, its
multiply-adds on the matrix units and its instructions on the general cores; a kernel with fewer blocks than
the board has multiprocessors uses a part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bratune.errors import UsageError
from bratune.gpus import GPU
from bratune.predict.coefficients import Coefficients
from bratune.predict.work import Op

if TYPE_CHECKING:
    from bratune.predict.public import PublicRates

__all__ = ["OpTime", "Rates", "op_time", "public_time", "rates"]

# Bytes that one multiprocessor reads from the last-level cache per clock, sustained. Public measurements:
# A100 5400 GB/s, H100 PCIe 6900 (114 SMs at 1.755 GHz), GH200 9700 to 10500 (132 at 1.98), L40 5200; the rest
# are put with their nearest relative.
_CACHE_BYTES_PER_CLOCK = {"7.0": 18.0, "8.0": 35.0, "9.0": 35.0, "10.0": 35.0}
_CACHE_BYTES_PER_CLOCK_OTHER = 15.0
# Part of the cache that is reached at full speed: two partitions on A100 and H100 (24 of 40 MiB, 37 of 50).
_CACHE_SHARE = {"8.0": 0.6, "9.0": 0.72, "10.0": 0.72}
_CACHE_SHARE_OTHER = 0.9
# Instructions that a multiprocessor issues per clock, in lanes: four schedulers of 32 threads since Volta.
_LANES_PER_CLOCK = 128
# Multiprocessors that must be busy to saturate the memory.
_SATURATING_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peaks of a board for one dtype, per second."""

    memory: float
    cache: float
    matrix: float
    cores: float
    cache_bytes: float
    sm_count: int


def rates(board: GPU, dtype: str) -> Rates:
    """The peaks that a prediction needs.

    Raises:
        UsageError: no source gives one of them; a description of the board (``--gpu-spec``) can.
    """
    matrix = board.peak_tflops(dtype)
    needed = {
        "memory bandwidth": board.memory_gbps,
        f"{dtype} peak": matrix,
        "SM count": board.sm_count,
        "clock": board.boost_mhz,
    }
    if missing := [name for name, value in needed.items() if not value]:
        raise UsageError(
            f"no published {' or '.join(missing)} of {board.name} is known, so nothing can be predicted "
            "for it; a description of the board with --gpu-spec FILE would give it"
        )
    assert board.memory_gbps is not None
    assert board.sm_count is not None
    assert board.boost_mhz is not None
    assert matrix is not None
    capability = board.compute_capability
    per_clock = _CACHE_BYTES_PER_CLOCK.get(capability, _CACHE_BYTES_PER_CLOCK_OTHER)
    share = _CACHE_SHARE.get(capability, _CACHE_SHARE_OTHER)
    return Rates(
        memory=board.memory_gbps * 1e9,
        cache=max(per_clock * board.sm_count * board.boost_mhz * 1e6, board.memory_gbps * 1e9),
        matrix=matrix * 1e12,
        cores=matrix * 1e12 / 2
        if board.architecture == "CPU"
        else _LANES_PER_CLOCK * board.sm_count * board.boost_mhz * 1e6,
        cache_bytes=(board.l2_mib or 0.0) * 2**20 * share,
        sm_count=board.sm_count,
    )


@dataclass(frozen=True)
class OpTime:
    """How long a kernel works, and on what.

    Attributes:
        us: Microseconds of work, without the cost of launching it.
        bound: ``memory``, ``cache``, ``compute`` (matrix units) or ``cores``.
        memory_bytes: Bytes that it moves from and to memory.
    """

    us: float
    bound: str
    memory_bytes: float


def op_time(op: Op, peak: Rates, c: Coefficients, *, warm: bool = False) -> OpTime:
    """The working time of one kernel.

    A kernel whose reads and writes together fit the cache finds what the kernel before it wrote there; inputs
    of the part come from memory, unless they are warm.
    """
    moved = op.read + op.written
    resident = moved <= peak.cache_bytes
    memory_bytes = moved if not resident else (0.0 if warm else op.cold)
    busy = _busy(op.blocks, peak.sm_count)
    feeding = min(1.0, op.blocks / (_SATURATING_SHARE * peak.sm_count))
    feeding = max(feeding, 1 / peak.sm_count)
    times = {
        "memory": memory_bytes / (peak.memory * c.memory * feeding),
        "cache": (moved + op.reread) / (peak.cache * c.cache * feeding),
        "compute": 2 * op.macs / (peak.matrix * c.compute * busy),
        "cores": op.slots / (peak.cores * c.cores * busy),
    }
    bound = max(times, key=lambda name: times[name])
    return OpTime(us=times[bound] * 1e6, bound=bound, memory_bytes=memory_bytes)


def public_time(op: Op, kind: str, peak: Rates, public: PublicRates, *, warm: bool = False) -> OpTime:
    """The working time of one kernel at the rates that public measurements of real models gave.

    What stays in the cache is read at the cache's rate as far behind its ideal as memory is; a kernel that
    does not fill the board is as much slower as in `op_time`.
    """
    moved = op.read + op.written
    memory_bytes = moved if moved > peak.cache_bytes else (0.0 if warm else op.cold)
    through_cache = moved - memory_bytes + op.reread
    busy = _busy(op.blocks, peak.sm_count)
    feeding = max(min(1.0, op.blocks / (_SATURATING_SHARE * peak.sm_count)), 1 / peak.sm_count)
    compute = public.macs_us(kind, op.rate_macs) / busy
    moving = public.moved_us(kind, memory_bytes + through_cache * peak.memory / peak.cache) / feeding
    bound = "cores" if kind == "depthwise" else "compute"
    if moving >= compute:
        bound = "memory" if memory_bytes >= through_cache else "cache"
    return OpTime(us=compute + moving, bound=bound, memory_bytes=memory_bytes)


def _busy(blocks: float, sm_count: int) -> float:
    """Part of the multiprocessors that work, the unfilled last wave counted."""
    if blocks <= 1:
        return 1 / sm_count
    waves = math.ceil(blocks / sm_count)
    return blocks / (waves * sm_count)
