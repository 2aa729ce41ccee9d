"""Our own kernels, compiled for a target just as a call of a given size launches them.

The public launchers are called with tensors on the ``meta`` device, so that a batch of 128 takes no memory
and every specialisation (strides of the packed projection, divisibility) is that of the real call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bratune.machine import Machine
from bratune.predict.compile import Launch, compile_for
from bratune.predict.targets import CompileTarget, get_target
from bratune.problem import Problem

__all__ = ["attention_launches", "depthwise_launches", "machine_of", "norm_launches", "routing_launches"]


def machine_of(target: str | CompileTarget) -> Machine:
    """A machine that has nothing but the target's architecture, for looking up launch settings."""
    goal = get_target(target) if isinstance(target, str) else target
    number = goal.arch if isinstance(goal.arch, int) else 80
    return Machine(
        kind="cuda",
        device="cuda:0",
        gpu_key=goal.name,
        gpu_name=goal.name,
        compute_capability=f"{number // 10}.{number % 10}",
    )


def attention_launches(
    problem: Problem, target: str | CompileTarget, config: Mapping[str, int | str] | None = None
) -> dict[str, Launch]:
    """The launches of the ``triton`` backend, by the kind of the kernel.

    Kinds are those of `bratune.kernels.fused.launch.KINDS`; kernels that have nothing to
    set go by their name.

    Args:
        problem: The call; its backward kernels are compiled where its direction has them.
        target: What to compile for.
        config: Settings of the backend; the rest come from the launch table.

    Raises:
        UnsupportedError: a kernel is not legal on the target.
    """
    import torch

    from bratune.kernels.fused import run as fused_run
    from bratune.kernels.fused.call import as_text, call_for

    call = call_for(problem, as_text(config), machine_of(target))
    q, k, v = _packed(problem)
    heads = (problem.heads,) if problem.per_head else ()
    shape = (problem.batch, *heads, problem.regions, problem.topk)
    routes = torch.empty(shape, dtype=torch.int64, device="meta")

    def launch() -> None:
        out, lse = fused_run.run_forward(q, k, v, routes, call, keep_lse=problem.backward)
        if problem.backward:
            fused_run.run_backward(out, q, k, v, routes, out, lse, call, packed=problem.same_regions)

    return {_kind_of(found): found for found in compile_for(target, launch)}


# Kernels whose names are not those of their kind in `bratune.kernels.fused.launch.KINDS`.
_KINDS = {
    "stationary_fwd": "kv_stationary_fwd",
    "gather_bwd_dq": "gather_dq",
    "gather_bwd_dkv": "gather_dkv",
}


def _kind_of(launch: Launch) -> str:
    if launch.settings.get("FUSE_DQ"):
        return "k1_bwd"
    name = launch.kernel.removesuffix("_kernel")
    return _KINDS.get(name, name)


def _packed(problem: Problem) -> tuple[Any, Any, Any]:
    """q, k and v as slices of one projection, where keys have the map of the queries."""
    import torch

    dtype = getattr(torch, problem.dtype)
    sizes = (problem.channels, problem.channels, problem.v_channels)
    if (problem.kv_height, problem.kv_width) == (problem.height, problem.width):
        packed = torch.empty(
            problem.batch, problem.height, problem.width, sum(sizes), dtype=dtype, device="meta"
        )
        q, k, v = torch.split(packed, list(sizes), -1)
        return q, k, v
    q = torch.empty(problem.batch, problem.height, problem.width, sizes[0], dtype=dtype, device="meta")
    kv = torch.empty(
        problem.batch, problem.kv_height, problem.kv_width, sum(sizes[1:]), dtype=dtype, device="meta"
    )
    k, v = torch.split(kv, list(sizes[1:]), -1)
    return q, k, v


def routing_launches(
    problem: Problem, target: str | CompileTarget, *, maps: bool = True
) -> dict[str, Launch]:
    """The launches of the ``triton`` router for the routes of a problem."""
    from bratune.kernels.fused.route import launch_region_means, launch_route

    q, k, _ = _packed(problem)

    def launch() -> None:
        means = launch_region_means(q, k, list(problem.region), list(problem.kv_region))
        launch_route(*means, problem.topk, maps)

    return {_kind_of(found): found for found in compile_for(target, launch)}


def depthwise_launches(
    shape: tuple[int, int, int, int], kernel: int, dtype: str, target: str | CompileTarget
) -> dict[str, Launch]:
    """The launches of a depthwise convolution that is added to another map, and of its gradients.

    Args:
        shape: ``(batch, height, width, channels)`` of the map.
        kernel: Side of the filter.
        dtype: As in `bratune.problem.DTYPES`; weights are float32.
        target: What to compile for.
    """
    import torch

    from bratune.kernels.fused.depthwise import launch_depthwise, launch_wgrad

    channels = shape[-1]
    x = torch.empty(*shape[:-1], 3 * channels, dtype=getattr(torch, dtype), device="meta")[..., channels:]
    x = x[..., channels:]
    weight = torch.empty(channels, 1, kernel, kernel, device="meta")
    bias = torch.empty(channels, device="meta")
    grad = torch.empty(shape, dtype=x.dtype, device="meta")

    def launch() -> None:
        launch_depthwise(x, weight, bias, grad, reverse=False)
        launch_depthwise(grad, weight, None, None, reverse=True)
        launch_wgrad(x, grad, kernel)

    kinds = ("depthwise_fwd", "depthwise_dgrad", "depthwise_wgrad")
    return dict(zip(kinds, compile_for(target, launch), strict=True))


def norm_launches(
    shape: tuple[int, int, int, int], region: tuple[int, int], dtype: str, target: str | CompileTarget
) -> dict[str, Launch]:
    """The launches of a LayerNorm with a shift, and of one that also takes the means of regions.

    Args:
        shape: ``(batch, height, width, channels)`` of the map.
        region: Tokens of a region.
        dtype: As in `bratune.problem.DTYPES`.
        target: What to compile for.
    """
    import torch

    from bratune.kernels.fused.norm import launch_layer_norm

    x = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    weight, shift = x.new_empty(shape[-1]), x.new_empty(shape[-1], dtype=torch.float32)

    def launch() -> None:
        for wanted in ([], list(region)):
            launch_layer_norm(x, weight, weight, shift, 1e-6, wanted)

    return {_kind_of(found): found for found in compile_for(target, launch)}
