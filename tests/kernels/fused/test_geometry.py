"""Sizes of pictures are given at the launch: a new one compiles nothing, and changes nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fused_cases import Case, fused, sample

pytest.importorskip("triton")

from bratune.kernels.fused import call as calls
from bratune.kernels.fused.call import as_text, call_for, is_compiled_in
from bratune.kernels.fused.depthwise import launch_depthwise, launch_wgrad
from bratune.kernels.fused.norm import launch_layer_norm
from bratune.kernels.fused.route import launch_region_means, launch_route
from bratune.kernels.fused.run import run_backward, run_forward
from bratune.predict.offline import machine_of
from bratune.problem import Problem
from bratune.testing.stub_driver import StubLaunch, stub_device
from bratune.variant import get_variant, stages

# Pictures of a detector: the longer side at most 1333, padded to multiples of 32.
PICTURES = ((800, 1333), (800, 1216), (1216, 800))


def detection(height: int, width: int, batch: int = 1) -> Iterator[Problem]:
    small = get_variant("biformer_tiny")
    found = stages(small, height, width, batch=batch, n_win=16, dtype="bfloat16", direction="fwd-bwd")
    for stage in found:
        if stage.kind == "routed" and stage.problem is not None:
            yield stage.problem


def attention(p: Problem, config: dict[str, int | str]) -> None:
    call = call_for(p, as_text(config), machine_of("sm90"))
    q, k, v = torch.empty(p.batch, p.height, p.width, 3 * p.channels, dtype=torch.bfloat16).chunk(3, -1)
    routes = torch.empty(p.batch, p.regions, p.topk, dtype=torch.int64)
    out, lse = run_forward(q, k, v, routes, call, keep_lse=True)
    run_backward(out, q, k, v, routes, out, lse, call, packed=True)


def around(p: Problem) -> None:
    """Routing, LayerNorm with means, and a depthwise convolution with its gradients."""
    q, k, _ = torch.empty(p.batch, p.height, p.width, 3 * p.channels, dtype=torch.bfloat16).chunk(3, -1)
    launch_route(*launch_region_means(q, k, list(p.region), list(p.kv_region)), p.topk, True)
    x, weight = q.contiguous(), torch.empty(p.channels, dtype=torch.bfloat16)
    for region in ([], list(p.region)):
        launch_layer_norm(x, weight, weight, None, 1e-6, region)
    taps = torch.empty(p.channels, 1, 5, 5)
    launch_depthwise(x, taps, None, x, reverse=False)
    launch_wgrad(x, x, 5)


def codes(launches: list[StubLaunch]) -> dict[str, set[bytes]]:
    found: dict[str, set[bytes]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, set()).add(launch.code)
    return found


@pytest.mark.compile
@pytest.mark.parametrize("stage", [0, 1, 2], ids=["stage 1", "stage 2", "stage 3"])
def test_a_new_size_of_picture_compiles_nothing(stage: int) -> None:
    # Launch settings follow from the size and make kernels of their own; here they are those of the first.
    config: dict[str, int | str] = {}
    with stub_device("sm90") as launches:
        for number, picture in enumerate(PICTURES):
            p = list(detection(*picture, batch=1 + number))[stage]
            config = config or {
                k: v for k, v in calls.full_config(p, {}, machine_of("sm90")).items() if v is not None
            }
            attention(p, config)
            if stage == 0:
                around(p)
            if number == 0:
                first = codes(launches)
    assert codes(launches) == first
    assert {"gather_fwd_kernel", "gather_bwd_dq_kernel", "gather_bwd_dkv_kernel"} <= set(first)
    assert len({launch.grid for launch in launches if launch.kernel == "gather_fwd_kernel"}) == len(PICTURES)


def test_sizes_that_stay_are_compiled_in_and_others_are_not() -> None:
    assert is_compiled_in((56, 56), (8, 8))  # a crop, in powers of two
    assert is_compiled_in((49, 49), (7, 7))  # a crop
    assert is_compiled_in((64, 128), (8, 16))
    assert not is_compiled_in((208, 336), (13, 21))
    assert not is_compiled_in((50, 84), (4, 8))
    for picture in PICTURES:
        for p in detection(*picture):
            constants = call_for(p, "", machine_of("sm90")).kernels["gather_fwd"]
            assert {constants[name] for name in ("REGIONS", "RH", "RW", "GRID_W", "KRH", "KRW")} == {0}


STATIC = (
    Case(batch=2, map=(8, 12), heads=2, topk=4, config=(("forward", "gather"), ("backward", "gather"))),
    Case(map=(8, 12), heads=2, topk=3, config=(("forward", "stationary"), ("backward", "gather"))),
    Case(map=(8, 16), region=(8, 8), topk=1, config=(("forward", "gather"), ("backward", "key"))),
    Case(map=(8, 8), region=(2, 2), topk=1, config=(("backward", "key"), ("dkv_chunk", 2)), routes="hub"),
    Case(
        map=(8, 12), topk=4, padding="masked",
        config=(("forward", "gather"), ("fwd_block_n", 16), ("backward", "gather"), ("dkv_chunk", 2)),
    ),
)  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("case", STATIC, ids=str)
def test_geometry_given_at_the_launch_gives_the_same_bits(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = sample(case)
    before: dict[str, Any] = fused(case, s)
    assert calls._geometry(case.problem)["RH"]
    call_for.cache_clear()
    monkeypatch.setattr(calls, "is_compiled_in", lambda size, region: False)
    assert not calls._geometry(case.problem)["RH"]
    found = fused(case, s)
    call_for.cache_clear()
    for name, x in before.items():
        assert torch.equal(x, found[name]), name
