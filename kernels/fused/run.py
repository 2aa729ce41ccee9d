"""Running the fused kernels: allocation and launches of one forward or backward pass.

Results and workspace are allocated here; their sizes follow from the problem alone, and nothing waits for the
device, so both passes can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bratune.errors import UnsupportedError
from bratune.kernels.dispatch import on_device_of
from bratune.kernels.fused.call import INTERPRETING, Call
from bratune.kernels.packed import empty_gradients

__all__ = ["run_backward", "run_forward"]


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, call: Call, *, keep_lse: bool
) -> tuple[Tensor, Tensor]:
    """The output ``[B, Hq, Wq, C]``, contiguous, and the statistics of `Call.lse_shape`.

    The statistics are empty where they are not to be kept.
    """
    out = q.new_empty(q.shape)
    lse = q.new_empty(call.lse_shape if keep_lse else (0,), dtype=torch.float32)
    with _on_device_of(q):
        _forward_pass(call.forward)(q, k, v, routes, out, lse, call)
    return out, lse


def run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor, call: Call,
    *, packed: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k and v: three tensors, or one ``[B, H, W, 3 * C]`` where ``packed``."""
    results = empty_gradients(q, k, v, packed=packed)
    dq, dk, dv = results[0].chunk(3, -1) if packed else results
    with _on_device_of(q):
        run = _image_pass if call.backward == "image" else _gather_pass
        run(grad, q, k, v, routes, out, lse, dq, dk, dv, call)
    return results


@functools.cache
def _forward_pass(family: str) -> Callable[..., None]:
    # Triton is imported when the first kernel is launched, not with the list of backends.
    if family == "stationary":
        from bratune.kernels.fused.stationary import stationary_fwd

        return stationary_fwd
    if family == "image":
        from bratune.kernels.fused.image import image_fwd

        return image_fwd
    from bratune.kernels.fused.gather_fwd import gather_fwd

    return gather_fwd


def _image_pass(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, call: Call,
) -> None:  # fmt: skip
    from bratune.kernels.fused.image import image_bwd

    image_bwd(q, k, v, routes, out, grad, lse, dq, dk, dv, call)


def _gather_pass(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, call: Call,
) -> None:  # fmt: skip
    from bratune.kernels.fused.gather_bwd import gather_bwd_dkv, gather_bwd_dq
    from bratune.kernels.fused.inverse import inverse_routes

    starts, entries = inverse_routes(routes, call.kv_regions)
    delta = lse
    if call.backward == "gather":
        delta = lse.new_empty(call.delta_shape)
        gather_bwd_dq(q, k, v, routes, out, grad, lse, delta, dq, call)
    gather_bwd_dkv(q, k, v, starts, entries, out, grad, lse, delta, dq, dk, dv, call)


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if x.device.type == "cpu" and not INTERPRETING:
        raise UnsupportedError("triton", (f"needs a CUDA device (or TRITON_INTERPRET=1), found {x.device}",))
    return on_device_of(x)
