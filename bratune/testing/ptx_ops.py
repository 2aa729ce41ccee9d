"""What the instructions of PTX compute in registers, on all threads at a time.

A register is an array of unsigned integers (predicates: of booleans) with an element per thread, or with
one element where it is the same in all. `operation` gives what an instruction computes, as a function of
such arrays; the machine reads and writes registers around it. What computes across the lanes of a warp,
products on matrix units among it, has functions of its own.

Approximate instructions (``ex2.approx``) are computed exactly and rounded, sums of matrix units in float32 in
the order of NumPy: results agree with a device's to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bratune.errors import UnsupportedError

__all__ = [
    "RAW",
    "Array",
    "Operation",
    "as_float",
    "as_raw",
    "halves",
    "matrix_product",
    "operation",
    "shuffle",
    "sum_of_warps",
]

Array = NDArray[Any]
Operation = Callable[..., Array]

RAW: Mapping[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_TYPES: Mapping[str, Any] = {
    **{f"{kind}{bits}": RAW[bits] for kind in "bu" for bits in (8, 16, 32, 64)},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
_WIDER: Mapping[Any, Any] = {
    np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64, np.int32: np.int64,
}  # fmt: skip
# Instructions that say how they round or how exact they are; here that makes no difference.
_IGNORED = frozenset({"rn", "approx", "ftz", "full", "sync", "aligned", "uni"})


def as_raw(x: Array, bits: int) -> Array:
    """The bits of numbers as unsigned integers, as registers hold them."""
    raw = RAW[bits]
    return x if x.dtype == raw else x.view(raw) if x.dtype.itemsize == raw().itemsize else x.astype(raw)


def operation(opcode: Sequence[str]) -> tuple[Operation, int, tuple[int, ...]]:
    """What an instruction computes.

    Returns:
        The function of the sources, the bits of the result, and the bits of the sources; the last of these
        stands for all that follow.

    Raises:
        UnsupportedError: nothing here knows the instruction.
    """
    name, *rest = (part for part in opcode if part not in _IGNORED)
    if name == "cvt":
        return _conversion(rest)
    if name in ("mul", "mad") and rest[-1][0] != "f":
        return _integer_product(name, rest)
    kind = rest[-1] if rest else ""
    if name == "add" and kind in ("s16x2", "u16x2"):
        return _add_pairs, 32, (32,)
    if kind not in _TYPES:
        raise _unknown(opcode)
    dtype = _TYPES[kind]
    bits = 1 if kind == "pred" else int(kind[1:])
    if name == "setp":
        if len(rest) != 2 or rest[0] not in _COMPARE:
            raise _unknown(opcode)
        compare = _COMPARE[rest[0]]
        return (lambda x, y: compare(x.view(dtype), y.view(dtype))), 1, (bits,)
    if name == "selp":
        return _choose, bits, (bits, bits, 1)
    if name in ("shl", "shr"):
        return _shift(name, dtype, bits), bits, (bits, 32)
    if name == "bfe":
        return _bit_field(dtype, bits), bits, (bits, 32)
    table = _FLOAT if kind[0] == "f" else _PREDICATE if kind == "pred" else _INTEGER
    if name in ("max", "min") and rest[0] == "NaN":  # NaN where one of both is, as NumPy has it for integers
        rest, table = rest[1:], _INTEGER
    if name not in table or len(rest) > 1:
        raise _unknown(opcode)
    function = table[name]

    def compute(*sources: Array) -> Array:
        return as_raw(np.asarray(function(*(x.view(dtype) for x in sources)), dtype), bits)

    return compute, bits, (bits,)


def _unknown(opcode: Sequence[str]) -> UnsupportedError:
    return UnsupportedError("the PTX executor", (f"it does not know {'.'.join(opcode)}",))


def _add_pairs(x: Array, y: Array) -> Array:
    low, high = np.uint32(0xFFFF), np.uint32(16)
    found: Array = (x + y & low) | ((x >> high) + (y >> high) << high)
    return found


def _choose(x: Array, y: Array, where: Array) -> Array:
    return np.where(where, x, y)


def _fused(x: Array, y: Array, z: Array) -> Array:
    if x.dtype == np.float32:  # the product of two is exact in float64
        return (x.astype(np.float64) * y + z).astype(np.float32)
    return x * y + z


def _quotient(x: Array, y: Array) -> Array:
    """Rounded towards zero; all ones for a division by zero."""
    safe = np.where(y == 0, 1, y).astype(y.dtype)
    found = (np.abs(x) // np.abs(safe)) * np.where((x < 0) != (safe < 0), -1, 1).astype(x.dtype)
    return np.where(y == 0, np.array(-1).astype(x.dtype), found).astype(x.dtype)


def _divide(x: Array, y: Array) -> Array:
    return _quotient(x, y) if x.dtype.kind == "i" else x // np.maximum(y, 1)


def _remainder(x: Array, y: Array) -> Array:
    left: Array = x - _divide(x, y) * y
    return left


def _permute(x: Array, y: Array, selector: Array) -> Array:
    """Four bytes chosen among the eight of two registers."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    found: Array = np.zeros(1, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(
            np.uint32
        ) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        found = found | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return found


_FLOAT: Mapping[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fused,
    "neg": np.negative, "abs": np.abs, "max": np.fmax, "min": np.fmin, "ex2": np.exp2, "lg2": np.log2,
    "sqrt": np.sqrt, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x), "mov": lambda x: x,
}  # fmt: skip
_INTEGER: Mapping[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.bitwise_not, "neg": np.negative, "abs": np.abs, "max": np.maximum, "min": np.minimum,
    "div": _divide, "rem": _remainder, "mov": lambda x: x, "prmt": _permute,
    "popc": lambda x: np.unpackbits(x.view(np.uint8)).reshape(-1, 32).sum(1, dtype=np.uint32),
}  # fmt: skip
_PREDICATE: Mapping[str, Callable[..., Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not,
    "mov": lambda x: x,
}  # fmt: skip
_COMPARE: Mapping[str, Callable[..., Array]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    # A comparison is false where a number is none; those that end in u are true there.
    "ne": lambda x, y: (x < y) | (x > y), "neu": np.not_equal, "equ": lambda x, y: ~((x < y) | (x > y)),
    "ltu": lambda x, y: ~(x >= y), "leu": lambda x, y: ~(x > y), "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y), "num": lambda x, y: (x == x) & (y == y),
    "nan": lambda x, y: (x != x) | (y != y),
}  # fmt: skip


def _shift(name: str, dtype: Any, bits: int) -> Operation:
    def compute(x: Array, by: Array) -> Array:
        much, numbers = by >= bits, x.view(dtype)
        by = np.where(much, 0, by).astype(dtype)
        gone = np.where(numbers < 0, -1, 0) if np.dtype(dtype).kind == "i" and name == "shr" else 0
        found = numbers << by if name == "shl" else numbers >> by
        return np.where(much, np.asarray(gone).astype(dtype), found).astype(dtype).view(RAW[bits])

    return compute


def _bit_field(dtype: Any, bits: int) -> Operation:
    def compute(x: Array, start: Array, length: Array) -> Array:
        start, length = start.astype(np.int64), length.astype(np.int64)
        found = (x.astype(np.int64) >> start) & ((np.int64(1) << length) - 1)
        if np.dtype(dtype).kind == "i":
            sign = np.int64(1) << np.maximum(length - 1, 0)
            found = (found ^ sign) - sign
        return found.astype(dtype).view(RAW[bits])

    return compute


def _integer_product(name: str, rest: Sequence[str]) -> tuple[Operation, int, tuple[int, ...]]:
    how, kind = rest
    dtype, bits = _TYPES[kind], int(kind[1:])
    wide = _WIDER.get(dtype)
    if how not in ("lo", "hi", "wide") or (wide is None and how != "lo"):
        raise _unknown((name, *rest))
    result = 2 * bits if how == "wide" else bits

    def compute(x: Array, y: Array, *addend: Array) -> Array:
        a, b = x.view(dtype), y.view(dtype)
        if how == "lo":
            product = a * b
        else:
            product = a.astype(wide) * b.astype(wide)
            if how == "hi":
                product = (product >> bits).astype(dtype)
        found: Array = product.view(RAW[result])
        return np.add(found, addend[0]) if addend else found

    return compute, result, (bits, bits, result)


# --- conversions ------------------------------------------------------------------------------------


def _to_bfloat16(x: Array) -> Array:
    """The upper half of float32 numbers, rounded to even; as uint32."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x.view(np.float32)), np.uint32(0x7FFF), rounded)


def _to_float16(x: Array) -> Array:
    return x.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)


def _conversion(rest: Sequence[str]) -> tuple[Operation, int, tuple[int, ...]]:
    to, source = rest[-2], rest[-1]
    halves = {"bf16": _to_bfloat16, "f16": _to_float16}
    if to.endswith("x2") and to[:-2] in halves and source == "f32":
        half = halves[to[:-2]]
        return (lambda high, low: half(high) << np.uint32(16) | half(low)), 32, (32,)
    if to == "bf16" and source == "f32":
        return (lambda x: _to_bfloat16(x).astype(np.uint16)), 16, (32,)
    if to == "f32" and source == "bf16":
        return (lambda x: x.astype(np.uint32) << np.uint32(16)), 32, (16,)
    if (
        to not in _TYPES
        or source not in _TYPES
        or any(part not in ("rz", "rzi", "rni") for part in rest[:-2])
    ):
        raise _unknown(("cvt", *rest))
    a, b = _TYPES[source], _TYPES[to]
    bits = int(to[1:])

    def compute(x: Array) -> Array:
        numbers = x.astype(RAW[int(source[1:])]).view(a)  # a narrow source sits in a wider register
        if np.dtype(a).kind == "f" and np.dtype(b).kind in "iu":
            numbers = np.rint(numbers) if "rni" in rest else np.trunc(numbers)
            limits = np.iinfo(b)
            numbers = np.clip(np.nan_to_num(numbers.astype(np.float64)), limits.min, limits.max)
        found = numbers.astype(b)
        if bits == 8:  # registers have sixteen bits at least
            found = found.astype(np.int16 if to[0] == "s" else np.uint16)
        raw: Array = found.view(RAW[max(bits, 16)])
        return raw

    return compute, max(bits, 16), (0,)


# --- across the lanes of a warp ---------------------------------------------------------------------


def _warps(x: Array, threads: int) -> Array:
    return np.ascontiguousarray(np.broadcast_to(x, (threads,))).reshape(-1, 32)


def shuffle(mode: str, x: Array, by: Array, clamp: Array, threads: int) -> tuple[Array, Array]:
    """``shfl.sync``: the value of another lane, and whether there is one within the segment."""
    lane = np.arange(32, dtype=np.int64)[None, :]
    values, by, clamp = _warps(x, threads), *(_warps(y, threads).astype(np.int64) for y in (by, clamp))
    segment, last = clamp >> 8 & 31, clamp & 31
    most = (lane & segment) | (last & ~segment)
    source = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": (lane & segment) | (by & ~segment),
    }[mode]
    real = source >= most if mode == "up" else source <= most
    found = np.take_along_axis(values, np.where(real, source, lane), 1)
    return found.reshape(-1), real.reshape(-1)


def sum_of_warps(x: Array, members: Array, threads: int) -> Array:
    """``redux.sync.add``: the sum over those lanes of a warp that are members, in each of its lanes."""
    lane = np.arange(32, dtype=np.uint32)[None, :]
    joined = (_warps(members, threads) >> lane & np.uint32(1)).astype(bool)
    total = np.where(joined, _warps(x, threads), 0).sum(1, dtype=np.uint32)
    return np.repeat(total, 32)


def matrix_product(
    dtype: str, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], threads: int
) -> list[Array]:
    """``mma.sync`` of a 16 x 16 (TF32: 16 x 8) and an 8 columns wide tile, a product for every warp.

    Args:
        dtype: ``f16``, ``bf16`` or ``tf32``.
        a: Four registers with the rows of the first tile.
        b: Two with the second.
        c: Four with what is added, float32.
        threads: How many there are.
    """
    if dtype == "tf32":
        (a0, a1, a2, a3), (b0, b1) = (
            [_warps(x, threads).reshape(-1, 8, 4).view(np.float32) for x in tile] for tile in (a, b)
        )
    else:
        (a0, a1, a2, a3), (b0, b1) = ([halves(dtype, x, threads) for x in tile] for tile in (a, b))
    left = np.concatenate([np.concatenate([a0, a2], 2), np.concatenate([a1, a3], 2)], 1)  # [warps, 16, K]
    right = np.concatenate([b0, b1], 2)  # [warps, 8, K]: columns of the second tile
    product = np.matmul(left, right.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)  # upper, row, lane, even
    parts = [product[:, i // 2, :, :, i % 2].reshape(-1) for i in range(4)]
    return [(x + y.view(np.float32)).view(np.uint32) for x, y in zip(parts, c, strict=True)]


def halves(dtype: str, x: Array, threads: int) -> Array:
    """The two numbers of every register as float32, ``[warps, 8, 8]``."""
    return as_float(dtype, _warps(x, threads).reshape(-1, 8, 4).view(np.uint16))


def as_float(dtype: str, x: Array) -> Array:
    """Numbers of a half type, given by their bits, in float32."""
    if dtype == "bf16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.view(np.float16).astype(np.float32)
