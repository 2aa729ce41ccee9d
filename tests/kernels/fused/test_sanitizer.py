"""The sanitizer finds what is planted, and nothing in the fused kernels."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fused_cases import ROUTES, TOLERANCES, Case, errors, fused, reference, sample, with_pairs

pytest.importorskip("triton")

import triton
import triton.language as tl

from bratune.kernels.fused.route import launch_region_means, launch_route
from bratune.testing.sanitizer import Violation, sanitized

pytestmark = pytest.mark.interpreter


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(x_ptr, out_ptr, size, step, FAULT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    if FAULT == "input":
        tl.store(x_ptr + at, x + 1.0, mask=at < size)
    elif FAULT == "unmasked":
        tl.store(out_ptr + at, x)
    elif FAULT == "lanes":
        tl.store(out_ptr + at // 2, x, mask=at < size)
    else:
        tl.store(out_ptr + at, x, mask=at < size)
        if FAULT == "barrier":
            tl.debug_barrier()
        if FAULT == "barrier" or FAULT == "no barrier":
            tl.store(out_ptr + at, tl.load(out_ptr + at, mask=at < size, other=0.0) + 1.0, mask=at < size)


def copied(fault: str, *, step: int = 16, size: int = 24, programs: int = 2) -> list[Violation]:
    """Copy 24 numbers in two programs of 16, in one way that is wrong."""
    room = torch.randn(64)
    x, out = room[:size], torch.zeros(64)[:size]
    with sanitized() as findings:
        _copy_kernel[(programs,)](x, out, size, step, FAULT=fault, BLOCK=16)
    return findings


@pytest.mark.parametrize("fault", ["", "barrier"])
def test_a_kernel_without_fault_has_no_finding(fault: str) -> None:
    assert copied(fault) == []


@pytest.mark.parametrize(
    ("fault", "options", "what"),
    [
        ("unmasked", {}, "store outside of out_ptr, 8 elements"),
        ("", {"step": 8}, "store to what another program stores of out_ptr, 8 elements"),
        ("input", {}, "store into an input of x_ptr"),
        ("input", {"step": 8, "size": 16}, "load of what another program stores of x_ptr"),
        ("lanes", {"programs": 1}, "different values of two lanes in one address"),
        ("no barrier", {}, "load of what this program stored, with no barrier between of out_ptr"),
    ],
)
def test_what_is_planted_is_found(fault: str, options: dict[str, Any], what: str) -> None:
    found = [str(finding) for finding in copied(fault, **options)]
    assert any(what in text for text in found), found


def test_neighbours_in_the_same_storage_are_outside_too() -> None:
    room = torch.randn(64)
    with sanitized() as findings:
        _copy_kernel[(1,)](room[:16], torch.zeros(64)[8:16], 16, 16, FAULT="", BLOCK=16)
    (found,) = findings
    assert (found.what, found.where, found.count) == ("store outside", "out_ptr", 8)


CASES = with_pairs(
    Case(map=(8, 8), region=(8, 8), topk=1),
    Case(map=(4, 8), topk=2, heads=2, dtype="float16"),
    Case(map=(7, 5), region=(4, 3), padding="masked", head_dim=24),
    Case(map=(6, 6), region=(3, 3), kv_map=(7, 9), kv_region=(2, 5), layout="nchw"),
    Case(map=(4, 6), region=(2, 2), topk=2, config=(("dkv_chunk", 1),), routes="hub"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_touch_what_is_theirs(case: Case) -> None:
    if "image" in dict(case.config).values():
        case = case.replace(config=tuple(pair for pair in case.config if pair[0] != "dkv_chunk"))
    with sanitized() as findings:
        fused(case, sample(case))
    assert findings == []


def test_the_router_touches_what_is_its_own() -> None:
    q, k, _ = torch.randn(1, 5, 7, 96).chunk(3, -1)
    with sanitized() as findings:
        launch_route(*launch_region_means(q, k, [2, 3], [2, 3]), 4, True)
    assert findings == []


def drawn(seed: int) -> Case:
    """A random problem of a few programs: any region, map, padding, layout, routes and family."""
    r = random.Random(seed)
    region = r.randint(1, 5), r.randint(1, 5)
    grid = r.randint(1, 3), r.randint(1, 3)
    height, width = (g * side - r.randint(0, side - 1) for g, side in zip(grid, region, strict=True))
    case = Case(
        batch=r.choice((1, 2)),
        map=(height, width),
        region=region,
        topk=r.randint(1, grid[0] * grid[1]),
        heads=r.choice((1, 2)),
        head_dim=r.choice((8, 16, 24, 32, 48)),
        dtype=r.choice(("float32", "float16")),
        padding=r.choice(("zeros", "masked")),
        layout=r.choice(("packed", "split", "nchw", "sliced", "channel_stride")),
        routes=r.choice([kind for kind in ROUTES if kind != "hub"]),
        expanded_grad=r.random() < 0.3,
    )
    return r.choice(with_pairs(case))


@pytest.mark.parametrize("seed", range(24))
def test_random_problems_are_right_and_touch_what_is_theirs(seed: int) -> None:
    case = drawn(seed)
    s = sample(case)
    with sanitized() as findings:
        mine = fused(case, s)
    assert findings == []
    found = errors(mine, reference(case, s))
    assert max(found.values()) < 3 * TOLERANCES[case.dtype], case
