"""Kernels are compiled for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from bratune.errors import UnknownNameError, UnsupportedError, UsageError
from bratune.predict.compile import Launch, Resources, compile_for
from bratune.predict.offline import attention_launches
from bratune.predict.targets import TARGETS, get_target
from bratune.problem import Problem
from bratune.studies.kernel_budgets import CASES, budget_of, budgets, over_budget


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, rows, stride, block: tl.constexpr, width: tl.constexpr = 64
):
    i, j = tl.arange(0, block), tl.arange(0, width)
    total = tl.zeros((block, block), tl.float32)
    for start in range(0, rows, block):
        x = tl.load(x_ptr + (start + i)[:, None] * stride + j[None, :])
        total += tl.dot(x, tl.trans(x))
    tl.store(y_ptr + i[:, None] * block + i[None, :], total)


def launch_product(
    block: int = 64, width: int = 64, device: str = "meta", stride: int = 64, **options: Any
) -> None:
    x = torch.empty(256, stride, dtype=torch.float16, device=device)
    y = torch.empty(block, block, device=device)
    product_kernel[(3, 2)](x, y, 256, stride, block=block, width=width, **options)


def compiled(target: str, **options: Any) -> Launch:
    (launch,) = compile_for(target, lambda: launch_product(**options))
    return launch


@pytest.mark.compile
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_gives_matrix_instructions_and_resources(target: str) -> None:
    launch = compiled(target)
    assert launch.kernel == "product_kernel"
    assert (launch.grid, launch.programs) == ((3, 2, 1), 6)
    assert launch.settings == {"block": 64, "width": 64}
    found = launch.resources
    assert 16 < found.registers < 256
    assert found.stack_bytes == 0
    assert found.resident_warps % found.num_warps == 0
    assert found.resident_warps > 0
    assert launch.listing.classes()["mma"] > 0
    assert launch.listing.loops


@pytest.mark.compile
def test_meta_and_cpu_tensors_give_the_same_machine_code() -> None:
    on_cpu, on_meta = compiled("sm90", device="cpu"), compiled("sm90", device="meta")
    assert on_cpu.asm["cubin"] == on_meta.asm["cubin"]


@pytest.mark.compile
def test_strides_are_specialised_as_at_a_launch() -> None:
    aligned, odd = compiled("sm90", stride=64).listing, compiled("sm90", stride=67).listing
    # Asynchronous copies need at least four bytes at an aligned address.
    assert "load_async" in aligned.classes()
    assert "load_async" not in odd.classes()


@pytest.mark.compile
def test_launch_options_reach_the_compiler() -> None:
    assert compiled("sm80", num_warps=8).resources.num_warps == 8


@pytest.mark.compile
def test_too_much_shared_memory_is_refused_with_the_limit() -> None:
    large = {"block": 128, "width": 256, "num_stages": 3}
    with pytest.raises(UnsupportedError, match=r"shared memory; sm120 has 101376"):
        compiled("sm120", **large)
    assert compiled("sm100", **large).resources.shared_bytes > 101376


@pytest.mark.compile
def test_what_does_not_compile_is_named_with_its_target() -> None:
    with pytest.raises(UnsupportedError, match=r"product_kernel.*does not compile for sm89"):
        compiled("sm89", block=48)


@pytest.mark.compile
def test_launches_run_again_after_the_block() -> None:
    run = triton.runtime.jit.JITFunction.run
    compiled("sm80")
    assert triton.runtime.jit.JITFunction.run is run


@pytest.mark.interpreter
def test_the_interpreter_cannot_compile() -> None:
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        compile_for("sm90", launch_product)
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.compile
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_legal_and_within_their_budget(target: str, case: str) -> None:
    allowed = budgets()[target]
    problems = {}
    for kernel, launch in CASES[case](target).items():
        name = f"{case}: {kernel}"
        assert name in allowed, f"{name} has no budget for {target}: python -m bratune.studies kernel-budgets"
        if over := over_budget(launch.resources, allowed[name]):
            problems[name] = over
    assert not problems


def small(**values: Any) -> Problem:
    settings: dict[str, Any] = {"batch": 2, "height": 16, "width": 16, "heads": 2, "head_dim": 32}
    settings |= {"region": (4, 4), "topk": 3, "dtype": "float16", "direction": "fwd-bwd"}
    return Problem(**(settings | values))


GATHER: dict[str, int | str] = {"forward": "gather", "backward": "gather"}
# What the interpreter takes and a compiler may refuse: types of loops, shapes that are no powers of two.
VARIANTS: dict[str, tuple[Problem, dict[str, int | str]]] = {
    "one token": (small(height=4, width=4, region=(1, 1), topk=5), {"forward": "stationary"}),
    "15 tokens, 16 channels": (
        small(height=21, width=25, region=(3, 5), topk=7, head_dim=16),
        {"forward": "stationary"},
    ),
    "49 tokens, 48 channels": (small(height=21, width=28, region=(7, 7), head_dim=48), {}),
    "64 channels": (small(region=(8, 8), topk=2, head_dim=64), GATHER),
    "96 channels, bfloat16": (small(head_dim=96, dtype="bfloat16"), GATHER),
    "float32": (small(height=56, width=56, region=(8, 8), topk=1, dtype="float32"), {}),
    "routes per head": (small(per_head=True), {"forward": "stationary", "backward": "gather"}),
    "routes per head, small map": (small(height=8, width=8, region=(2, 2), per_head=True), {}),
    "other key regions": (small(kv_height=12, kv_width=10, kv_region=(2, 5), padding="masked"), {}),
    "hub of one key": (small(height=20, width=20, region=(2, 2), topk=1), {"dkv_chunk": 8}),
    "hub, ragged and masked": (
        small(height=50, width=37, padding="masked", per_head=True),
        GATHER | {"dkv_chunk": 8},
    ),
    "several heads": (small(), GATHER | {"fwd_heads_per_program": 2, "fwd_block_n": 32}),
}


# Each kernel once with addresses of 64 bits.
WIDE = ("one token", "64 channels", "routes per head, small map", "hub of one key", "hub, ragged and masked")


@pytest.mark.compile
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_legal(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant in WIDE:
        for module in ("gather_fwd", "gather_bwd", "stationary", "image"):
            monkeypatch.setattr(f"bratune.kernels.fused.{module}.is_wide", lambda *maps: True)
    problem, config = VARIANTS[variant]
    launches = attention_launches(problem, "sm90", config)
    assert len(launches) >= 3
    assert ("gather_bwd_hub" in launches) == ("hub" in variant)


def test_every_case_has_a_budget_for_every_target_and_no_other() -> None:
    for target in TARGETS:
        assert {name.split(": ")[0] for name in budgets()[target]} == set(CASES)
    assert set(budgets()) == set(TARGETS)


def test_no_budget_allows_more_spills_than_the_design() -> None:
    spilled = {f"{t} {name}": b["stack_bytes"] for t, found in budgets().items() for name, b in found.items()}
    assert {name: stack for name, stack in spilled.items() if stack > 64} == {}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (62, 12 * 1024, 4, 32),
        (255, 0, 4, 8),
        (32, 100 * 1024, 4, 8),
        (32, 0, 1, 32),
        (32, 228 * 1024, 4, 0),
        (104, 0, 1, 16),  # registers of an SM would do for 19, those of a scheduler for 4
    ],
    ids=["registers", "most registers", "shared memory", "blocks", "nothing fits", "schedulers"],
)
def test_resident_warps_are_what_the_scarcest_resource_allows(
    registers: int, shared: int, warps: int, expected: int
) -> None:
    sm90 = get_target("sm90")
    assert sm90.resident_warps(registers=registers, shared_bytes=shared, num_warps=warps) == expected


def test_unknown_target_lists_the_targets() -> None:
    with pytest.raises(UnknownNameError, match="sm80, sm86"):
        get_target("sm70")


def test_a_budget_holds_what_it_was_made_from_and_tells_what_goes_beyond() -> None:
    found = Resources(registers=62, stack_bytes=8, shared_bytes=1025, num_warps=4, resident_warps=32)
    budget = budget_of(found)
    assert budget == {"registers": 80, "stack_bytes": 64, "shared_bytes": 2048}
    assert not over_budget(found, budget)
    (reason,) = over_budget(dataclasses.replace(found, stack_bytes=72), budget)
    assert reason == "72 stack bytes, 64 are allowed"
