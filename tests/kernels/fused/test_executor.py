"""Compiled kernels run right and without a finding on the CPU, and what is planted in them is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fused_cases import TOLERANCES, Case, errors, fused, reference, sample

pytest.importorskip("triton")

from bratune.errors import MeasureError, UnsupportedError
from bratune.kernels.fused.depthwise import launch_depthwise, launch_wgrad
from bratune.kernels.fused.norm import launch_layer_norm
from bratune.kernels.fused.route import launch_region_means, launch_route
from bratune.kernels.routing import region_means
from bratune.testing.executor import Findings, executed
from bratune.testing.ptx import Program, parse
from bratune.testing.ptx_memory import Global, Segment, Shared, Stamps
from bratune.testing.ptx_ops import matrix_product, operation, shuffle
from bratune.testing.ptx_units import Descriptor, pieces

pytestmark = pytest.mark.compile


def pair(forward: str, backward: str, **settings: int) -> tuple[tuple[str, int | str], ...]:
    return (("forward", forward), ("backward", backward), *settings.items())


KEY = Case(map=(8, 16), heads=2, region=(8, 8), topk=1, config=pair("gather", "key"))
STATIONARY = Case(map=(8, 12), heads=2, topk=4, config=pair("stationary", "gather"))
# Two tiles of keys and the rest, a tile of queries and the rest.
IMAGE = Case(map=(8, 10), heads=2, region=(2, 2), topk=5, config=pair("image", "image"))
PIPELINED = Case(
    map=(11, 7), heads=2, region=(4, 3), topk=3, head_dim=24, padding="masked",
    config=pair("gather", "gather", fwd_block_n=16, fwd_num_stages=2, dq_block_n=16, dkv_chunk=2),
)  # fmt: skip
CASES = (
    KEY,
    STATIONARY,
    IMAGE,
    PIPELINED,
    KEY.replace(map=(9, 9), region=(3, 3), heads=1, head_dim=48, config=pair("gather", "key", dkv_chunk=1)),
    STATIONARY.replace(
        routes="per_head",
        layout="nchw",
        map=(9, 10),
        padding="masked",
        config=pair("stationary", "gather", fwd_block_n=16),
    ),
    STATIONARY.replace(map=(8, 8), region=(2, 2), topk=5, config=pair("stationary", "image", fwd_block_m=4)),
    IMAGE.replace(map=(7, 5), padding="masked", routes="per_head"),
    PIPELINED.replace(kv_map=(9, 6), kv_region=(3, 2), layout="split", routes="int32", magnitude=4.0),
)


@pytest.mark.parametrize(("target", "dtype"), [("sm80", "float16"), ("sm90", "bfloat16")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_is_right_in_both_directions(case: Case, target: str, dtype: str) -> None:
    case = case.replace(dtype=dtype)
    s = sample(case)
    with executed(target) as findings:
        mine = fused(case, s)
    assert findings == []
    assert findings.launches >= 3
    found = errors(mine, reference(case, s))
    assert all(error <= TOLERANCES[dtype] for error in found.values()), found


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_routing_is_right() -> None:
    q, k = normal(1, 6, 9, 48).chunk(2, -1)
    with executed() as findings:
        means = launch_region_means(q, k, [2, 4], [2, 4])
        found = launch_route(*means, 4, True)
    assert findings == []
    for mine, x in zip(means, (q, k), strict=True):
        torch.testing.assert_close(mine, region_means(x.float(), (2, 4)))
    affinity = means[0] @ means[1].transpose(1, 2)
    assert torch.equal(found.routes, affinity.topk(4, -1).indices)


@pytest.mark.parametrize("region", [[], [2, 4]], ids=str)
def test_layer_norm_is_right(region: list[int]) -> None:
    x, weight, bias, shift = normal(1, 5, 6, 40), normal(40), normal(40), normal(40, dtype=torch.float32)
    with executed() as findings:
        y, means = launch_layer_norm(x, weight, bias, shift, 1e-6, region)
    assert findings == []
    true = F.layer_norm(x.double() + shift, (40,), weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(y.double(), true, rtol=8e-3, atol=1e-2)
    if region:
        torch.testing.assert_close(means.double(), region_means(true, (2, 4)), rtol=1e-5, atol=1e-6)


def test_depthwise_convolution_and_its_gradients_are_right() -> None:
    x, grad, weight = normal(1, 7, 9, 24), normal(1, 7, 9, 24), normal(24, 1, 3, 3, dtype=torch.float32)
    with executed() as findings:
        y = launch_depthwise(x, weight, weight[:, 0, 0, 0].contiguous(), grad, reverse=False)
        d_weight, d_bias = launch_wgrad(x, grad, 3)
    assert findings == []
    wide, w = x.double().permute(0, 3, 1, 2), weight.double().requires_grad_()
    true = F.conv2d(wide, w, w[:, 0, 0, 0].detach(), padding=1, groups=24)
    (true_weight,) = torch.autograd.grad(true, w, grad.double().permute(0, 3, 1, 2))
    torch.testing.assert_close(y.double(), true.detach().permute(0, 2, 3, 1) + grad, rtol=8e-3, atol=1e-2)
    torch.testing.assert_close(d_weight.double(), true_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_bias.double(), grad.double().sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


def test_the_prototype_that_gathers_from_shared_memory_is_right() -> None:
    gl = pytest.importorskip("triton.experimental.gluon.language")
    if not hasattr(gl.shared_memory_descriptor, "gather"):
        pytest.skip("this Triton has no gather from shared memory")
    from bratune.studies import resident_kernel

    findings, error = resident_kernel.execute()
    assert findings == []
    assert error <= TOLERANCES["bfloat16"]


# --- what is planted is found -----------------------------------------------------------------------

Change = Callable[[Program], Program]


def places(program: Program, *opcode: str) -> list[int]:
    return [i for i, x in enumerate(program.instructions) if x.opcode[: len(opcode)] == opcode]


def forward_with(case: Case, change: Change, target: str = "sm80") -> Findings:
    """The forward kernel of a case, changed."""
    s = sample(case.replace(dtype="bfloat16"))
    from bratune.kernels.fused.backend import TritonBackend

    with executed(target, change=change) as findings:
        TritonBackend().forward(
            s.q, s.k, s.v, s.routes, case.replace(dtype="bfloat16").problem, dict(case.config)
        )
    return findings


def said(findings: Findings) -> str:
    return "; ".join(map(str, findings))


@pytest.mark.parametrize(
    ("case", "target"), [(KEY, "sm80"), (STATIONARY, "sm80"), (IMAGE, "sm80"), (KEY, "sm90")], ids=str
)
def test_every_barrier_that_is_left_out_is_noticed(case: Case, target: str) -> None:
    last: list[Program] = []

    def keep(program: Program) -> Program:
        last.append(program)
        return program

    assert forward_with(case, keep, target) == []
    name, barriers = last[-1].name, places(last[-1], "bar", "sync")
    assert len(barriers) >= 3
    for i in barriers:
        found = forward_with(case, without(name, i), target)
        assert "with no barrier between" in said(found), i


@pytest.mark.parametrize(("left_out", "noticed"), [(1, False), (12, True)], ids=["alone", "with the next"])
def test_a_barrier_whose_work_others_do_too_is_missed_with_them_alone(left_out: int, noticed: bool) -> None:
    # Threads of `image_bwd` store sums of rows, others load them, and its source asks for a barrier between.
    # Before the first of these loads the compiler has put eleven more, for tiles in shared memory: whoever
    # passed those has passed that one. It is the only barrier of the kernel that goes unnoticed.
    case = IMAGE.replace(heads=1, dtype="bfloat16")

    def change(program: Program) -> Program:
        if program.name != "image_bwd_kernel":
            return program
        sums = places(program, "st", "global")[0]
        after = [i for i in places(program, "bar", "sync") if i > sums]
        for i in after[:left_out]:
            program = program.without(i)
        return program

    with executed(change=change) as findings:
        fused(case, sample(case))
    races = [found for found in findings if "with no barrier between" in found.what]
    assert any(found.where == "delta_ptr" for found in races) == noticed
    assert bool(races) == noticed


def test_copies_that_nobody_waits_for_are_noticed() -> None:
    assert "load of what a copy has not been waited for of shared memory" in said(
        forward_with(PIPELINED, all_without("cp", "async", "wait_group"))
    )


def without(kernel: str, place: int) -> Change:
    """One kernel without one instruction."""
    return lambda program: program.without(place) if program.name == kernel else program


def all_without(*opcode: str) -> Change:
    """A program without any instruction of a kind."""

    def change(program: Program) -> Program:
        for i in places(program, *opcode):
            program = program.without(i)
        return program

    return change


@pytest.mark.parametrize(
    ("opcode", "what"),
    [
        (("fence", "proxy", "async"), "load by a matrix unit of what no fence made visible to it"),
        (("wgmma", "wait_group"), "register of a matrix instruction that was not waited for"),
        (("wgmma", "fence"), "matrix instruction with registers written after its fence"),
    ],
)
def test_what_orders_matrix_units_is_missed_where_it_is_left_out(opcode: tuple[str, ...], what: str) -> None:
    assert what in said(forward_with(KEY, all_without(*opcode), "sm90"))


def test_operands_of_matrix_units_lie_where_their_descriptors_say() -> None:
    # Rows of 64 bytes, eight of them 512 bytes, swizzled by 64 bytes: from address 1024 on.
    named = np.array([1024 >> 4 | 512 >> 4 << 32 | 2 << 62], np.uint64)
    along = pieces(Descriptor.of(named), 64, transposed=False)[0]
    assert along[:4].tolist() == [[1024, 1040], [1088, 1104], [1168, 1152], [1232, 1216]]
    assert along[8].tolist() == [1024 + 512, 1040 + 512]
    across = pieces(Descriptor.of(named), 32, transposed=True)[0]
    assert across[0].tolist() == [1024, 1040, 1056, 1072]
    assert across[2].tolist() == [1168, 1152, 1200, 1184]
    assert across[8].tolist() == [1024 + 512, 1040 + 512, 1056 + 512, 1072 + 512]
    # Not swizzled: blocks of 8 x 16 bytes, 128 apart along the depth and 256 along the rows.
    named = np.array([128 >> 4 << 16 | 256 >> 4 << 32], np.uint64)
    assert pieces(Descriptor.of(named), 64, transposed=False)[0, [0, 1, 8]].tolist() == [
        [0, 128],
        [16, 144],
        [256, 384],
    ]


def moved(*opcode: str, by: int) -> Change:
    """The first access of a kind at another address."""

    def change(program: Program) -> Program:
        i = next(i for i in places(program, *opcode) if "+ 0 ]" in program.instructions[i].text)
        return program.with_text(i, program.instructions[i].text.replace("+ 0 ]", f"+ {by} ]", 1))

    return change


@pytest.mark.parametrize(
    ("opcode", "by", "what"),
    [
        (("ld", "global", "v4"), 1 << 20, "load outside"),
        (("ld", "global", "v4"), -(1 << 20), "load outside"),
        (("st", "global", "v4"), 1 << 20, "store outside"),
        (("ld", "global", "v4"), 2, "load of 16 bytes at an address that is no multiple"),
        (("st", "shared"), 1 << 20, "store outside of shared memory"),
    ],
)
def test_wrong_addresses_are_noticed(opcode: tuple[str, ...], by: int, what: str) -> None:
    assert what in said(forward_with(KEY, moved(*opcode, by=by)))


def test_shared_memory_that_nobody_stored_is_noticed() -> None:
    found = forward_with(KEY, lambda program: program.without(places(program, "st", "shared")[0]))
    assert "load of shared memory that nobody stored" in said(found)


def test_matrix_instructions_of_a_part_of_a_warp_are_noticed() -> None:
    def partial(program: Program) -> Program:
        i = places(program, "mma")[0]
        before = places(program, "bar", "sync")[0]
        assert before < i
        lane = program.with_text(before, "setp.lt.u32 %p9999, %laneid, 7")
        return lane.with_text(i, f"@%p9999 {program.instructions[i].text}")

    assert "mma.sync by a part of a warp" in said(forward_with(STATIONARY, partial))


def test_programs_that_store_to_one_place_are_noticed() -> None:
    notes: list[tuple[str, int]] = []
    data = np.zeros(64, np.uint8)
    memory = Global({4096: Segment("out", data, np.ones(64, bool), 4)})
    two = Stamps(0, 2, 32).now[[0, 32]]
    at = np.array([4096, 4096 + 8])
    note = lambda what, where, count: notes.append((what, count)) if count else None  # noqa: E731
    memory.store(at, np.ones((2, 1), np.uint32), two, note)
    assert notes == []
    memory.store(at[::-1].copy(), np.full((2, 1), 2, np.uint32), two, note)
    assert notes == [("store into what another thread stores, with no barrier between", 2)]


def test_a_barrier_orders_warps_and_a_warp_barrier_lanes() -> None:
    stamps, everyone = Stamps(0, 1, 64), np.ones(64, bool)
    shared = Shared(1, 64, 4)
    notes: list[str] = []
    note = lambda what, where, count: notes.append(what) if count else None  # noqa: E731
    zero = np.zeros(1, np.int64)

    def load(thread: int) -> None:
        shared.load(zero, zero, np.dtype(np.uint32), 1, stamps.now[[thread]], note)

    shared.store(zero, zero, np.ones((1, 1), np.uint32), stamps.now[[3]], note)
    load(3)
    assert notes == []
    load(4)
    assert len(notes) == 1
    stamps.pass_warp_barrier(everyone)
    load(4)
    assert len(notes) == 1
    load(40)
    assert len(notes) == 2
    stamps.pass_barrier(everyone)
    load(40)
    assert len(notes) == 2


# --- the machine itself -----------------------------------------------------------------------------


def bits(*numbers: float, dtype: Any = np.uint32) -> Any:
    x = np.array(numbers, dtype)
    return x.view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize(
    ("opcode", "sources", "result"),
    [
        ("bfe.s32", (bits(0b11010), bits(1), bits(4)), bits(-3, dtype=np.int32)),
        ("bfe.u32", (bits(0b11010), bits(1), bits(4)), bits(0b1101)),
        ("shl.b32", (bits(3), bits(32)), bits(0)),
        ("shr.s32", (bits(-5, dtype=np.int32), bits(40)), bits(-1, dtype=np.int32)),
        ("shr.u32", (bits(-5, dtype=np.int32), bits(4)), bits(0x0FFFFFFF)),
        ("mul.hi.s32", (bits(-7, dtype=np.int32), bits(1431655766)), bits(-3, dtype=np.int32)),
        ("mul.wide.s32", (bits(-7, dtype=np.int32), bits(2)), bits(-14, dtype=np.int64)),
        ("mad.lo.s32", (bits(1 << 31), bits(2), bits(5)), bits(5)),
        ("div.s32", (bits(-7, dtype=np.int32), bits(2)), bits(-3, dtype=np.int32)),
        ("rem.s32", (bits(-7, dtype=np.int32), bits(2)), bits(-1, dtype=np.int32)),
        ("prmt.b32", (bits(0x80112233), bits(0x44556677), bits(0xB470)), bits(0xFF774433)),
        ("popc.b32", (bits(0xF0F1),), bits(9)),
        ("max.f32", (bits(np.nan, dtype=np.float32), bits(2, dtype=np.float32)), bits(2, dtype=np.float32)),
        ("min.NaN.f32", (bits(np.nan, dtype=np.float32), bits(2, dtype=np.float32)), bits(0x7FC00000)),
        ("setp.ne.f32", (bits(np.nan, dtype=np.float32), bits(2, dtype=np.float32)), np.array([False])),
        ("setp.neu.f32", (bits(np.nan, dtype=np.float32), bits(2, dtype=np.float32)), np.array([True])),
        ("cvt.s8.s32", (bits(200),), bits(-56, dtype=np.int16)),
        ("cvt.rn.bf16.f32", (bits(1 + 2**-8, dtype=np.float32),), bits(0x3F80, dtype=np.uint16)),
        ("cvt.rn.bf16.f32", (bits(1 + 3 * 2**-8, dtype=np.float32),), bits(0x3F82, dtype=np.uint16)),
        ("cvt.rn.f16x2.f32", (bits(2, dtype=np.float32), bits(1, dtype=np.float32)), bits(0x40003C00)),
        ("cvt.rzi.s32.f32", (bits(-2.7, dtype=np.float32),), bits(-2, dtype=np.int32)),
    ],
)  # fmt: skip
def test_instructions_compute_what_the_reference_says(opcode: str, sources: Any, result: Any) -> None:
    compute, *_ = operation(opcode.split("."))
    with np.errstate(all="ignore"):
        found = compute(*sources)
    assert found.dtype == result.dtype
    assert found.tolist() == result.tolist()


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "lanes"),
    [
        ("up", 1, 0, [0, 0, 1]),
        ("down", 30, 31, [30, 31, 2]),
        ("bfly", 1, 31, [1, 0, 3]),
        ("idx", 5, 31, [5] * 3),
    ],
)
def test_shuffles_take_the_value_of_a_lane(mode: str, by: int, clamp: int, lanes: list[int]) -> None:
    found, real = shuffle(mode, np.arange(64, dtype=np.uint32), bits(by), bits(clamp), 64)
    assert found[:3].tolist() == lanes
    assert found[32:35].tolist() == [32 + lane for lane in lanes]
    assert real[:3].tolist() == [mode != "up", True, mode != "down"]


@pytest.mark.parametrize(("dtype", "depth"), [("f16", 16), ("bf16", 16), ("tf32", 8)])
def test_matrix_products_use_the_layout_of_the_hardware(dtype: str, depth: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (16, depth)), rng.integers(-4, 5, (depth, 8))
    c = rng.integers(-4, 5, (16, 8)).astype(np.float32)
    g, t = np.arange(32) // 4, np.arange(32) % 4

    def register(x: Any, rows: Any, cols: Any, along: int) -> Any:
        """Lane by lane: one number, or two that follow each other along an axis."""
        if dtype == "tf32":
            return x[rows, cols].astype(np.float32).view(np.uint32)
        pairs: Any = np.stack([x[rows, cols], x[rows + (along == 0), cols + (along == 1)]], -1).astype(
            np.float32
        )
        if dtype == "bf16":
            upper = (pairs.view(np.uint32) >> 16).astype(np.uint16)
            return np.ascontiguousarray(upper).view(np.uint32)[:, 0]
        return pairs.astype(np.float16).view(np.uint32)[:, 0]

    step, half = (1, 4) if dtype == "tf32" else (2, 8)
    left = [register(a, g + 8 * (i % 2), step * t + half * (i // 2), 1) for i in range(4)]
    right = [register(b, step * t + half * i, g, 0) for i in range(2)]
    added = [np.ascontiguousarray(c[g + 8 * (i // 2), 2 * t + i % 2]).view(np.uint32) for i in range(4)]
    true = a @ b + c
    for i, x in enumerate(matrix_product(dtype, left, right, added, 32)):
        assert x.view(np.float32).tolist() == true[g + 8 * (i // 2), 2 * t + i % 2].tolist()


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"executes sm80, sm90, not sm100"), executed("sm100"):
        raise AssertionError
    with pytest.raises(UnsupportedError, match=r"does not know tcgen05"):
        operation(("tcgen05", "mma", "f32"))
    with pytest.raises(MeasureError, match=r"no \.entry"):
        parse("ret;")
