"""Proof beside the kernels of attention: questions that cells do not express.

Depthwise convolution, in strips or by PyTorch (cuDNN on a GPU); LayerNorm, of several tokens per program or
by PyTorch; and full attention over all tokens by each of the implementations behind PyTorch's
``scaled_dot_product_attention``. `bratune.studies.kernels` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bratune.errors import BratuneError
from bratune.kernels.depthwise import DEPTHWISE, depthwise
from bratune.kernels.norm import NORMS, layer_norm
from bratune.machine import Machine
from bratune.measure.meter import meter_for
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem

__all__ = ["depthwise_lines", "norm_lines", "sdpa_lines"]

_RIVALS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def _line(name: str, call: Callable[[], object], machine: Machine, settings: MeterSettings) -> str:
    try:
        found = meter_for(machine).measure(call, settings)
    except (BratuneError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "refused")
        return f"  {name:28} not here: {first}"
    interval = f"[{1e3 * found.ci_lo_ms:.1f}, {1e3 * found.ci_hi_ms:.1f}]"
    return f"  {name:28} {1e3 * found.median_ms:9.1f} us {interval}"


def depthwise_lines(
    machine: Machine, settings: MeterSettings, maps: Sequence[tuple[int, int, int, int]], dtype: torch.dtype
) -> Iterator[str]:
    """A heading per map and filter, then a line per implementation and direction.

    Args:
        machine: Where.
        settings: How long each line is sampled.
        maps: Sizes ``[B, H, W, C]``.
        dtype: Of maps and filters.
    """
    for size in maps:
        for kernel in (5, 3):
            yield f"\ndepthwise {kernel}x{kernel} on {'x'.join(map(str, size))}"
            draw = torch.Generator(machine.device).manual_seed(0)
            x, weight = (
                torch.randn(shape, generator=draw, device=machine.device).to(dtype).requires_grad_()
                for shape in (size, (size[-1], 1, kernel, kernel))
            )
            gradient = torch.ones_like(x)
            for name in DEPTHWISE:

                def forward(x: Tensor = x, weight: Tensor = weight, name: str = name) -> Tensor:
                    with torch.no_grad():
                        return depthwise(x, weight, backend=name)

                def both(
                    x: Tensor = x, weight: Tensor = weight, name: str = name, gradient: Tensor = gradient
                ) -> object:
                    return torch.autograd.grad(depthwise(x, weight, backend=name), (x, weight), gradient)

                yield _line(f"{name} fwd", forward, machine, settings)
                yield _line(f"{name} fwd-bwd", both, machine, settings)


def norm_lines(
    machine: Machine,
    settings: MeterSettings,
    maps: Sequence[tuple[int, int, int, int]],
    n_win: int,
    dtype: torch.dtype,
) -> Iterator[str]:
    """A heading per map, then a line per implementation, without and with the means of its regions.

    Args:
        machine: Where.
        settings: How long each line is sampled.
        maps: Sizes ``[B, H, W, C]``.
        n_win: Regions per side; divides H and W.
        dtype: Of maps and weights.
    """
    for size in maps:
        yield f"\nLayerNorm of {'x'.join(map(str, size))}"
        draw = torch.Generator(machine.device).manual_seed(0)
        x, weight = (
            torch.randn(shape, generator=draw, device=machine.device).to(dtype) for shape in (size, size[-1:])
        )
        regions = {"": None, " with means": (size[1] // n_win, size[2] // n_win)}
        for name in NORMS:
            for what, region in regions.items():

                def normalize(
                    x: Tensor = x,
                    weight: Tensor = weight,
                    name: str = name,
                    region: tuple[int, int] | None = region,
                ) -> object:
                    return layer_norm(x, weight, weight, eps=1e-6, region=region, backend=name)

                yield _line(name + what, normalize, machine, settings)


def sdpa_lines(machine: Machine, settings: MeterSettings, problems: Sequence[Problem]) -> Iterator[str]:
    """A heading per problem, then a line per implementation of full attention over all of its tokens."""
    for problem in problems:
        size = f"{problem.batch}x{problem.tokens} tokens, {problem.heads}x{problem.head_dim}"
        yield f"\nfull attention over {size}"
        shape = (problem.batch, problem.heads, problem.tokens, problem.head_dim)
        draw = torch.Generator(machine.device).manual_seed(0)
        dtype = getattr(torch, problem.dtype)
        q, k, v = (torch.randn(shape, generator=draw, device=machine.device).to(dtype) for _ in range(3))
        for rival in _RIVALS:

            def attend(
                rival: SDPBackend = rival,
                q: Tensor = q,
                k: Tensor = k,
                v: Tensor = v,
                scale: float = problem.scale,
            ) -> Tensor:
                with sdpa_kernel(rival):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

            yield _line(rival.name.lower(), attend, machine, settings)
