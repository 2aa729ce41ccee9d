"""Calling the library: one routed attention, forward or backward, on tensors of a CPU."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from bratune.errors import ProblemError
from bratune.kernels.native.library import loaded, variant_number
from bratune.kernels.packed import empty_gradients
from bratune.problem import ceil_div

__all__ = [
    "ATTENTION",
    "DTYPES",
    "MOST_CHANNELS",
    "NOWHERE",
    "NativeCall",
    "address_of",
    "lse_shape",
    "map_of",
    "run_backward",
    "run_forward",
    "shout",
]

# The numbers of call.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_CHANNELS = 128
_NO_MEMORY = -1
_NO_LSE = torch.empty(0)
# attention_t: five maps, the pointer between them, routes, sizes, the scale.
ATTENTION = struct.Struct("20qq20q6q15qd")
NOWHERE = (0, 0, 0, 0, 0)


class NativeCall(NamedTuple):
    """What one attention is asked for beside its tensors."""

    heads: int
    region: tuple[int, int]
    kv_region: tuple[int, int]
    scale: float
    masked: bool
    variant: str


def lse_shape(q: Tensor, call: NativeCall) -> tuple[int, int, int]:
    """Shape of the statistics: a number per query, in the order of the regions and with padding."""
    rh, rw = call.region
    tokens = ceil_div(q.shape[1], rh) * ceil_div(q.shape[2], rw) * rh * rw
    return q.shape[0], call.heads, tokens


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, call: NativeCall, *, keep_lse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output ``[B, Hq, Wq, C]``, contiguous, and the statistics of `lse_shape`.

    Where they are not kept, an empty tensor that all calls share stands for them.

    Args:
        q: As `bratune.kernels.native.ops.attend`, as what follows.
        k: Keys.
        v: Values.
        routes: Key regions of every query region.
        call: What is asked for.
        keep_lse: Keep the statistics.
        out: Where the output goes; by default into a new map.

    Raises:
        ProblemError: a route names no key region.
    """
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty(lse_shape(q, call), dtype=torch.float32) if keep_lse else _NO_LSE
    if not out.numel():
        return out, lse
    packed = ATTENTION.pack(
        *map_of(q), *map_of(k), *map_of(v), *map_of(out), lse.data_ptr() if keep_lse else 0,
        *NOWHERE * 4, *_routes(routes), *_sizes(q, k, routes, call), call.scale,
    )  # fmt: skip
    _check(loaded().functions.bratune_forward(variant_number(call.variant), packed), routes, k, call)
    return out, lse


def run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, lse: Tensor, call: NativeCall,
    *, packed: bool, out: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k and v: three tensors, or one ``[B, H, W, 3 * C]`` where ``packed``.

    That one is ``out``, where it is given.
    """
    results = empty_gradients(q, k, v, packed=packed) if out is None else [out]
    if not q.numel():
        return [result.zero_() for result in results]
    dq, dk, dv = results[0].chunk(3, -1) if packed else results
    lse = lse.contiguous()  # as the forward pass made it, before any batching
    arguments = ATTENTION.pack(
        *map_of(q), *map_of(k), *map_of(v), *NOWHERE, lse.data_ptr(),
        *map_of(grad), *map_of(dq), *map_of(dk), *map_of(dv),
        *_routes(routes), *_sizes(q, k, routes, call), call.scale,
    )  # fmt: skip
    _check(loaded().functions.bratune_backward(variant_number(call.variant), arguments), routes, k, call)
    return results


def address_of(x: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if x is None else x.data_ptr()


def map_of(x: Tensor) -> tuple[int, ...]:
    """The fields of a ``map_t``."""
    return x.data_ptr(), *x.stride()


def _routes(routes: Tensor) -> tuple[int, ...]:
    strides = routes.stride()
    if len(strides) == 3:
        strides = (strides[0], 0, *strides[1:])
    return routes.data_ptr(), *strides, routes.element_size()


def _sizes(q: Tensor, k: Tensor, routes: Tensor, call: NativeCall) -> tuple[int, ...]:
    batch, height, width, channels = q.shape
    return (
        batch, call.heads, channels // call.heads, height, width, *call.region, k.shape[1], k.shape[2],
        *call.kv_region, routes.shape[-1], call.masked, DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def shout(failed: int) -> None:
    """Raise what the library's answer says of memory.

    Raises:
        MemoryError: there was no room for what a thread holds.
    """
    if failed == _NO_MEMORY:
        raise MemoryError("the backend native could not allocate its scratch memory")


def _check(answer: int, routes: Tensor, k: Tensor, call: NativeCall) -> None:
    """Raise what the library's answer says of an attention."""
    shout(answer)
    if not answer:
        return
    regions = ceil_div(k.shape[1], call.kv_region[0]) * ceil_div(k.shape[2], call.kv_region[1])
    place = [int(x) for x in torch.unravel_index(torch.tensor(answer - 1), routes.shape)]
    raise ProblemError(
        f"route {int(routes[tuple(place)])} at {place} is out of range: there are {regions} key regions, "
        f"0 to {regions - 1}"
    )
