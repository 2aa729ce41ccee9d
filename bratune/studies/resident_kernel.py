"""A prototype without a GPU: keys and values of a head in shared memory, rows gathered by their addresses.

``python -m bratune.studies resident-kernel`` executes it on the CPU as its PTX for sm_80 and compares it with
the reference, then compiles it for targets and says what it takes, beside the kernel of today. It is written
in Gluon, the lower dialect of Triton; docs/next-kernel.md says what it is for. Nothing uses it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The language of kernels has no types for its tensors.

from __future__ import annotations

import math
from collections import Counter

import click
import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from bratune.errors import MeasureError, UnsupportedError
from bratune.predict.compile import Launch, compile_for
from bratune.predict.offline import attention_launches
from bratune.predict.targets import TARGETS
from bratune.problem import Problem
from bratune.studies.execute_kernels import TOLERANCES
from bratune.testing.executor import Findings, executed

__all__ = ["LAYERS", "SMALL", "execute", "main", "resident_fwd", "resident_fwd_kernel", "resident_launch"]

# Keys of a tile: their scores fill half of the registers.
_TILE = 64
_WARPS = 8
_HEAD_DIM = 32

# A map of three rows of regions, in two tiles of keys.
SMALL = Problem(batch=1, height=12, width=16, heads=2, head_dim=32, region=(4, 4), topk=8, dtype="bfloat16")
LAYERS = {
    "224 stage 2": Problem(
        batch=128, height=28, width=28, heads=4, head_dim=32, region=(4, 4), topk=4, dtype="bfloat16"
    ),
    "512 stage 3": Problem(
        batch=16, height=32, width=32, heads=8, head_dim=32, region=(4, 4), topk=16, dtype="bfloat16"
    ),
}


@gluon.jit
def _key_rows(
    routes, region, n, r_r,
    WIDTH: gl.constexpr, RH: gl.constexpr, RW: gl.constexpr, GRID_W: gl.constexpr,
):  # fmt: skip
    """Rows of the map, ``y * width + x``, that the n-th keys of regions lie in."""
    token = n % (RH * RW)
    key_region = gl.load(routes + region * r_r + n // (RH * RW)).to(gl.int32)
    y = key_region // GRID_W * RH + token // RW
    return y * WIDTH + key_region % GRID_W * RW + token % RW


@gluon.jit
def _place(row, word):
    """Where a word of a row lies: pieces of two words are swizzled, so that rows fall on different banks."""
    return row * 8 + ((word // 2) ^ (row // 2 % 4)) * 2 + word % 2


@gluon.jit
def _channels(words, dtype: gl.constexpr):
    """The four channels of every word, ``[..., 2, 2]``: channel ``2 * h + b`` at ``[b, h]``."""
    c0 = words.to(gl.int16).to(dtype, bitcast=True)
    c1 = (words >> 16).to(gl.int16).to(dtype, bitcast=True)
    c2 = (words >> 32).to(gl.int16).to(dtype, bitcast=True)
    c3 = (words >> 48).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(gl.join(c0, c1), gl.join(c2, c3))


@gluon.jit
def resident_fwd_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr,
    q_b, q_y, q_x, k_b, k_y, k_x, v_b, v_y, v_x, o_b, o_y, o_x, r_b, r_r, logit_scale,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr, RH: gl.constexpr, RW: gl.constexpr,
    TOPK: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Grid: images x heads. Every warp has a region of its own, 16 queries, and goes through its keys.

    A row of 32 channels is eight words. Which lane of a product has which channel is free as long as both
    operands agree: here a lane has the four of a word.
    """
    G: gl.constexpr = 8  # warps
    M: gl.constexpr = 16
    N: gl.constexpr = 64
    D: gl.constexpr = 32
    GRID_W: gl.constexpr = WIDTH // RW
    REGIONS: gl.constexpr = HEIGHT // RH * GRID_W
    KEYS: gl.constexpr = TOPK * M
    gl.static_assert(RH * RW == M)
    gl.static_assert(KEYS % N == 0)
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [G, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [G, 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Words of k [G, 8, N] and of v [G, N, 8], and the output [G, M, D], as lanes have them in products.
    K_WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 4, 0], [0, 0, 8], [0, 0, 16], [0, 0, 32]],
        [[0, 1, 0], [0, 2, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[1, 0, 0], [2, 0, 0], [4, 0, 0]], [], [G, 8, N],
    )  # fmt: skip
    V_WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1, 0], [0, 8, 0], [0, 16, 0], [0, 32, 0]],
        [[0, 2, 0], [0, 4, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[1, 0, 0], [2, 0, 0], [4, 0, 0]], [], [G, N, 8],
    )  # fmt: skip
    OUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 8, 0]],
        [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [2, 0, 0], [4, 0, 0]], [], [G, M, D],
    )  # fmt: skip
    SUMS: gl.constexpr = gl.SliceLayout(2, PRODUCT)
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    head = gl.program_id(0) % HEADS
    b = (gl.program_id(0) // HEADS).to(gl.int64)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    c = gl.arange(0, D, gl.SliceLayout(0, COPY))[None, :]
    on_map = (row < HEIGHT * WIDTH)[:, None]
    y, x = row // WIDTH, row % WIDTH
    k_shared = gl.allocate_shared_memory(dtype, [ROWS, D], SWIZZLED)
    v_shared = gl.allocate_shared_memory(dtype, [ROWS, D], SWIZZLED)
    k_rows = k_ptr + b * k_b + head * D + (y * k_y + x * k_x)[:, None] + c
    v_rows = v_ptr + b * v_b + head * D + (y * v_y + x * v_x)[:, None] + c
    async_copy.async_copy_global_to_shared(k_shared, k_rows, mask=on_map)
    async_copy.async_copy_global_to_shared(v_shared, v_rows, mask=on_map)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.barrier()
    k_flat = k_shared._reinterpret(gl.int64, [ROWS * 8], FLAT)
    v_flat = v_shared._reinterpret(gl.int64, [ROWS * 8], FLAT)

    k_group = gl.arange(0, G, gl.SliceLayout(1, gl.SliceLayout(1, K_WORDS)))[:, None]
    v_group = gl.arange(0, G, gl.SliceLayout(1, gl.SliceLayout(2, V_WORDS)))[:, None]
    q_group = gl.arange(0, G, gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None]
    o_group = gl.arange(0, G, gl.SliceLayout(1, gl.SliceLayout(2, OUT)))[:, None]
    k_n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, K_WORDS)))[None, :]
    v_n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, V_WORDS)))[None, :]
    q_m = gl.arange(0, M, gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :]
    o_m = gl.arange(0, M, gl.SliceLayout(0, gl.SliceLayout(2, OUT)))[None, :]
    k_word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, K_WORDS)))[None, :][:, :, None]
    v_word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, V_WORDS)))[None, :][:, None, :]
    i = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, :][:, None, :]
    q_c = i // 16 * 16 + i % 8 // 2 * 4 + i % 16 // 8 * 2 + i % 2
    o_c = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, :][:, None, :]
    routes = routes_ptr + b * r_b
    for first in range(0, REGIONS, G):
        q_region = gl.minimum(first + q_group, REGIONS - 1)  # the last warps may repeat a region
        o_region = gl.minimum(first + o_group, REGIONS - 1)
        k_region = gl.minimum(first + k_group, REGIONS - 1)
        v_region = gl.minimum(first + v_group, REGIONS - 1)
        qy, qx = q_region // GRID_W * RH + q_m // RW, q_region % GRID_W * RW + q_m % RW
        q = gl.load(q_ptr + b * q_b + head * D + (qy * q_y + qx * q_x)[:, :, None] + q_c)  # [G, M, D]
        top = gl.full([G, M], float("-inf"), gl.float32, SUMS)
        total = gl.zeros([G, M], gl.float32, SUMS)
        acc = gl.zeros([G, M, D], gl.float32, PRODUCT)
        for start in range(0, KEYS, N):
            rows = _key_rows(routes, k_region, start + k_n, r_r, WIDTH, RH, RW, GRID_W)
            places = gl.reshape(_place(rows[:, None, :], k_word), [G * 8 * N])
            words = gl.reshape(k_flat.gather(places, 0), [G, 8, N])
            k = gl.reshape(_channels(words, dtype), [G, 2, 4, N, 2, 2])
            k = gl.reshape(gl.permute(k, (0, 1, 5, 2, 4, 3)), [G, D, N])
            s = mma_v2(q, gl.convert_layout(k, RIGHT), gl.zeros([G, M, N], gl.float32, PRODUCT))
            new_top = gl.maximum(top, gl.max(s, 2) * logit_scale)
            p = gl.exp2(s * logit_scale - new_top[:, :, None])
            keep = gl.exp2(top - new_top)
            total = total * keep + gl.sum(p, 2)
            rows = _key_rows(routes, v_region, start + v_n, r_r, WIDTH, RH, RW, GRID_W)
            places = gl.reshape(_place(rows[:, :, None], v_word), [G * N * 8])
            words = gl.reshape(v_flat.gather(places, 0), [G, N, 8])
            v = gl.reshape(gl.permute(_channels(words, dtype), (0, 1, 4, 3, 2)), [G, N, D])
            p = gl.convert_layout(p.to(dtype), LEFT)
            acc = mma_v2(p, gl.convert_layout(v, RIGHT), acc * keep[:, :, None])
            top = new_top
        acc = acc * (1.0 / total)[:, :, None]
        acc = gl.reshape(gl.permute(gl.reshape(acc, [G, M, 4, 8]), (0, 1, 3, 2)), [G, M, D])
        oy, ox = o_region // GRID_W * RH + o_m // RW, o_region % GRID_W * RW + o_m % RW
        o_rows = out_ptr + b * o_b + head * D + (oy * o_y + ox * o_x)[:, :, None] + o_c
        gl.store(o_rows, gl.convert_layout(acc.to(dtype), OUT))  # [G, M, D]


def resident_fwd(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, problem: Problem) -> Tensor:
    """The output ``[B, H, W, C]`` of routed attention.

    Raises:
        UnsupportedError: regions have not 16 tokens or do not tile the map, heads have not 32 channels, keys
            do not fill tiles, routes differ between heads, or Triton has no such gather.
    """
    p = problem
    reasons = []
    if not hasattr(gl.shared_memory_descriptor, "gather"):
        reasons.append(f"triton {triton.__version__} cannot gather from shared memory; 3.7 can")
    if not p.same_regions or p.padded != (p.height, p.width) or p.region_tokens != 16 or p.per_head:
        reasons.append("the prototype needs regions of 16 tokens that tile the map, and routes of all heads")
    if p.head_dim != _HEAD_DIM or p.keys_per_query % _TILE:
        reasons.append(f"the prototype needs heads of {_HEAD_DIM} channels and keys in tiles of {_TILE}")
    if reasons:
        raise UnsupportedError("the resident kernel", reasons)
    out = q.new_empty(q.shape)
    resident_fwd_kernel[(p.batch * p.heads,)](
        q, k, v, routes, out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *routes.stride()[:2],
        p.scale * math.log2(math.e),
        HEIGHT=p.height, WIDTH=p.width, RH=p.region[0], RW=p.region[1], TOPK=p.topk, HEADS=p.heads,
        ROWS=triton.next_power_of_2(p.height * p.width),
        num_warps=_WARPS,
    )  # fmt: skip
    return out


def resident_launch(problem: Problem, target: str) -> Launch:
    """The prototype, compiled for a target as a call of this size launches it."""
    p = problem
    packed = torch.empty(p.batch, p.height, p.width, 3 * p.channels, dtype=torch.bfloat16, device="meta")
    routes = torch.empty(p.batch, p.regions, p.topk, dtype=torch.int64, device="meta")
    q, k, v = packed.chunk(3, -1)
    (found,) = compile_for(target, lambda: resident_fwd(q, k, v, routes, p))
    return found


def _takes(launch: Launch) -> str:
    """Resources of a launch and, of its innermost loop, the instructions that tell how rows are read."""
    r, listing = launch.resources, launch.listing
    loops = [loop for loop in listing.loops if listing.count_in("exp", loop)]
    body = listing.operations[loops[-1].start : loops[-1].end + 1] if loops else listing.operations
    kinds = Counter(operation.split(".")[0] for operation in body)
    counted = ", ".join(f"{kinds[name]} {name}" for name in ("LDG", "LDS", "LDSM", "HMMA", "MUFU", "PRMT"))
    return (
        f"{r.registers} registers, {r.stack_bytes} bytes spilled, {r.shared_bytes // 1024} KiB shared, "
        f"{r.resident_warps} warps per SM; innermost loop: {len(body)} instructions, {counted}"
    )


def execute() -> tuple[Findings, float]:
    """What the executor finds in a small call, and the relative error of its output in the 2-norm."""
    from bratune.kernels.reference import ReferenceBackend

    p = SMALL
    seed = torch.Generator().manual_seed(0)
    packed = torch.randn(p.batch, p.height, p.width, 3 * p.channels, generator=seed).bfloat16()
    q, k, v = packed.chunk(3, -1)
    routes = torch.rand(p.batch, p.regions, p.kv_regions, generator=seed).argsort(-1)
    routes = routes[..., : p.topk].contiguous()
    with executed() as findings:
        out = resident_fwd(q, k, v, routes, p)
    true = ReferenceBackend().forward(q.double(), k.double(), v.double(), routes, p)
    return findings, float((out.double() - true).norm() / true.norm())


@click.command("resident-kernel")
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(tuple(TARGETS)), help="sm90 by default."
)
def main(targets: tuple[str, ...]) -> None:
    """Execute the kernel of docs/next-kernel.md on the CPU, and say what it compiles to.

    Raises:
        MeasureError: it computes something else than the reference.
    """
    findings, error = execute()
    click.echo(f"{SMALL}, executed: error {error:.1e}, findings {'; '.join(map(str, findings)) or 'none'}")
    if findings or not error <= TOLERANCES["bfloat16"]:
        raise MeasureError("the prototype does not compute what the reference computes")
    for name, problem in LAYERS.items():
        for target in targets or ("sm90",):
            today = attention_launches(problem, target, {"forward": "stationary"})["kv_stationary_fwd"]
            click.echo(f"{name}, {target}, resident: {_takes(resident_launch(problem, target))}")
            click.echo(f"{name}, {target}, stationary: {_takes(today)}")
