"""LayerNorm over the channels of a token map for inference, with what stands beside it in a block.

Two ways to compute it stand behind one function: ``torch``, PyTorch's own operations, and ``triton``, the
kernel of `bratune.kernels.fused.norm`, which takes several tokens per program (PyTorch's takes one, of which
a map of 64 channels fills a fraction), adds a shift per channel to what it reads and sums regions up
while it has them. ``auto`` is ``triton`` on CUDA where it can run, else ``torch``; under `torch.compile` it
is ``torch``, which the compiler makes one kernel with what stands before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.errors import ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels import layout
from bratune.kernels.constants import constant_in_graphs
from bratune.kernels.dispatch import is_observed
from bratune.kernels.fused import launch
from bratune.kernels.routing import region_means

__all__ = ["MAX_CHANNELS", "NORMS", "layer_norm", "why_not"]

# Ways to compute `layer_norm`.
NORMS = ("torch", "triton")
# A token is normalised in the registers of one program.
MAX_CHANNELS = 8192


def why_not(x: Tensor) -> tuple[str, ...]:
    """Every reason for which the Triton kernel cannot normalise this map; empty: it can."""
    reasons: tuple[str, ...] = _reasons(str(x.device), x.dtype, *layout.settled(x.shape[-1:]))
    return reasons


@constant_in_graphs
def _reasons(device: str, dtype: torch.dtype, channels: int) -> tuple[str, ...]:
    reasons = launch.not_here(device)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"x is {dtype}; float16, bfloat16 and float32 are normalised")
    if channels > MAX_CHANNELS:
        reasons.append(f"there are {channels} channels; up to {MAX_CHANNELS} fit into registers")
    return tuple(reasons)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    shift: Tensor | None = None,
    region: tuple[int, int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm of every token, and the means of regions of it; no gradient flows.

    Plain PyTorch::

        y = F.layer_norm(x if shift is None else x + shift, x.shape[-1:], weight, bias, eps)
        return y, None if region is None else region_means(y, region)

    Args:
        x: ``[B, H, W, C]``.
        weight: ``[C]``.
        bias: ``[C]``.
        eps: Added to the variance.
        shift: ``[C]``, added to every token before it is normalised; x stays as it is.
        region: Tokens of a region, ``(rh, rw)``, whose means are wanted; padding does not count.
        backend: One of `NORMS`, or ``auto``.

    Returns:
        ``[B, H, W, C]`` in the dtype of x, contiguous, and the means ``[B, R, C]``, at least float32.
        ``triton`` takes them before the rounding of y.

    Raises:
        ProblemError: the shapes do not fit.
        UnknownNameError: no backend has this name.
        UnsupportedError: ``triton`` was asked for and cannot take this map.
    """
    if backend not in ("auto", *NORMS):
        raise UnknownNameError("norm backend", backend, ("auto", *NORMS))
    vectors = {"weight": weight, "bias": bias, "shift": shift}
    if x.ndim != 4 or any(v is not None and v.shape != x.shape[-1:] for v in vectors.values()):
        shapes = {name: tuple(vector.shape) for name, vector in vectors.items() if vector is not None}
        raise ProblemError(f"layer_norm needs x [B, H, W, C] and vectors [C], not {tuple(x.shape)}, {shapes}")
    if backend == "triton" and (reasons := why_not(x)):
        raise UnsupportedError("triton", reasons, f"a LayerNorm of {tuple(x.shape)}")
    alone = x.is_cuda and not torch.compiler.is_compiling()
    with torch.no_grad():
        if backend == "triton" or (backend == "auto" and alone and not why_not(x)):
            from bratune.kernels.fused.norm import launch_layer_norm, layer_norm_op

            run = layer_norm_op if is_observed(x) else launch_layer_norm
            y, means = run(x.contiguous(), weight, bias, shift, eps, list(region or ()))
            return y, None if region is None else means
        shifted = x if shift is None else (x + shift).to(x.dtype)
        y = F.layer_norm(shifted, layout.settled(x.shape[-1:]), weight, bias, eps).contiguous()
        wide = torch.promote_types(x.dtype, torch.float32)
        return y, None if region is None else region_means(y, region, dtype=wide)
