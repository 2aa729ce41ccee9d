"""Matrix units of Hopper: ``wgmma`` reads tiles from shared memory by itself, while its warps go on.

Four warps together multiply 64 rows by up to 256 columns. An operand in shared memory is named by a
*descriptor*: where it begins, how far apart its blocks lie, how 16-byte pieces are swizzled. What is checked
beyond races (`bratune.testing.ptx_memory`): stores that no ``fence.proxy.async`` made visible to the units,
stores into what they may still read, registers of a product that is under way, accumulators and rows that
were written after ``wgmma.fence``, descriptors that the threads of a group do not agree on.

Source: PTX ISA, "Asynchronous warpgroup-level matrix instructions" and "Matrix descriptor".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bratune.errors import UnsupportedError
from bratune.testing.ptx import Address, Instruction
from bratune.testing.ptx_ops import Array, as_float, halves

if TYPE_CHECKING:
    from bratune.testing.ptx_machine import Programs

__all__ = ["Descriptor", "MatrixUnits", "fence_step", "pieces", "wgmma_step"]

Mask = NDArray[np.bool_]
Source = Callable[[Any, int], Callable[["Programs"], Array]]

# Threads that issue an instruction together.
_GROUP = 128
_ROWS = 64
_DEPTH = 16
# Numbers of a half type in a piece, which swizzles leave whole.
_PIECE = 8
# Bytes of a swizzled row by the last two bits of a descriptor; 16: not swizzled.
_ROW_BYTES = (16, 128, 64, 32)


@dataclass(frozen=True)
class Descriptor:
    """Where an operand lies in shared memory, for every group: ``[groups]`` each, in bytes."""

    start: Array
    leading: Array
    stride: Array
    row_bytes: int

    @classmethod
    def of(cls, bits: Array) -> Descriptor:
        """From the 64 bits of each group.

        Raises:
            UnsupportedError: groups are swizzled differently, or a base offset is set.
        """
        bits = bits.astype(np.uint64)

        def field(first: int, length: int) -> Array:
            return (bits >> np.uint64(first) & np.uint64((1 << length) - 1)).astype(np.int64)

        kinds = np.unique(field(62, 2))
        if len(kinds) > 1 or field(49, 3).any():
            raise UnsupportedError("the PTX executor", ("it does not know this matrix descriptor",))
        return cls(field(0, 14) * 16, field(16, 14) * 16, field(32, 14) * 16, _ROW_BYTES[int(kinds[0])])


def pieces(d: Descriptor, rows: int, *, transposed: bool) -> Array:
    """Addresses of the pieces of an operand of so many rows and a depth of 16, ``[groups, ...]``.

    Args:
        d: The descriptor.
        rows: Rows of the first operand, columns of the second.
        transposed: Whether what follows in memory is the next row (else: the next place of the depth).

    Returns:
        ``[groups, rows, 2]``, pieces of eight places of the depth; transposed ``[groups, 16, rows / 8]``,
        pieces of eight rows.
    """
    row_bytes = d.row_bytes
    if transposed:
        k, block = np.arange(_DEPTH)[:, None], np.arange(rows // _PIECE)[None, :]
        if row_bytes == 16:
            near, far, inside = block, k // 8, k % 8 * 16
            near_by, far_by = d.stride, d.leading
        else:
            wide = row_bytes // 16  # pieces of a swizzled row
            near, far, inside = block // wide, k // 8, k % 8 * row_bytes + block % wide * 16
            near_by, far_by = d.leading, d.stride
    else:
        row, half = np.arange(rows)[:, None], np.arange(_DEPTH // _PIECE)[None, :]
        if row_bytes == 16:
            near, far, inside = half, row // 8, row % 8 * 16
        else:
            near, far, inside = half * 0, row // 8, row % 8 * row_bytes + half * 16
        near_by, far_by = d.leading, d.stride
    at = d.start[:, None, None] + near * near_by[:, None, None] + far * far_by[:, None, None] + inside
    # Bits 4 and on of an address change with bits 7 and on: one, two or three of them.
    found: Array = at ^ (at >> 3 & (row_bytes - 16))
    return found


@dataclass
class _Product:
    """A product that is under way, for the groups in ``groups``."""

    groups: Array
    number: Array
    results: frozenset[str]
    rows: frozenset[str]
    read: Array  # what it reads: places of shared memory
    reader: Array  # and for which group


class MatrixUnits:
    """What is under way on the matrix units of programs that are executed together."""

    def __init__(self, threads: int) -> None:
        self.number = np.zeros(-(-threads // _GROUP), np.int64)  # the group that is not committed yet
        self.under_way: list[_Product] = []
        # Registers that were written since the last ``wgmma.fence``.
        self.fresh: set[str] = set()

    def touch(self, b: Programs, found: Instruction, mask: Mask | None) -> None:
        """Note what an instruction does to registers of products that are under way."""
        groups = _groups(b, mask)
        names = [set(_registers(x)) for x in found.operands]
        target = names[0] if names and found.opcode[0] not in ("st", "stmatrix", "cp") else set()
        # Products that accumulate in the same registers may follow each other.
        used = set().union({found.guard}, *names[found.opcode[0] == "wgmma" :])
        for product in self.under_way:
            if groups[product.groups].any() and (used & product.results or target & product.rows):
                b.note("register of a matrix instruction that was not waited for", "", 1)

    def rename(self, target: str, source: str) -> None:
        """Another name for a register: as fresh as that one."""
        if source not in self.fresh:
            self.fresh.discard(target)

    def wait(self, b: Programs, most: int, mask: Mask | None) -> None:
        """Products of groups that wait until at most so many of their commits are under way."""
        groups, left = _groups(b, mask), []
        for product in self.under_way:
            done = groups[product.groups] & (product.number < self.number[product.groups] - most)
            ended = np.isin(product.reader, product.groups[done])
            first = product.reader[ended] * _GROUP
            b.shared.end_reading(product.read[ended], b.stamps.now[first])
            if not done.all():
                keep = ~done
                left.append(
                    _Product(
                        product.groups[keep], product.number[keep], product.results, product.rows,
                        product.read[~ended], product.reader[~ended],
                    )
                )  # fmt: skip
        self.under_way = left


def _groups(b: Programs, mask: Mask | None) -> Mask:
    """Which groups of four warps a mask has threads of."""
    if mask is None:
        return np.ones(len(b.units.number), bool)
    found: Mask = np.logical_or.reduceat(mask, np.arange(0, b.threads, _GROUP))
    return found


def _registers(operand: Any) -> Sequence[str]:
    if isinstance(operand, Address):
        return (operand.base,)
    return operand if isinstance(operand, tuple) else tuple(str(operand).split("|"))


def fence_step(found: Instruction) -> Callable[[Programs, Mask | None], None]:
    """``fence.proxy.async``: the units see what the threads of the mask stored before."""
    if found.opcode[:3] != ("fence", "proxy", "async"):
        raise UnsupportedError("the PTX executor", (f"it does not know {found.text}",))
    return lambda b, mask: b.shared.fence(b.stamps.now if mask is None else b.stamps.now[mask])


def wgmma_step(found: Instruction, source: Source) -> Callable[[Programs, Mask | None], None]:
    """What the machine does for ``wgmma``; ``source`` reads operands.

    Raises:
        UnsupportedError: the instruction is not known.
    """
    what = found.opcode[1]
    if what == "fence":
        return lambda b, mask: b.units.fresh.clear()
    if what == "commit_group":
        return lambda b, mask: _commit(b, mask)
    if what == "wait_group":
        most = int(str(found.operands[0]), 0)
        return lambda b, mask: b.units.wait(b, most, mask)
    shape = re.fullmatch(rf"m{_ROWS}n(\d+)k{_DEPTH}", found.opcode[4] if len(found.opcode) > 4 else "")
    kinds = found.opcode[5:]
    if what != "mma_async" or not shape or kinds not in (("f32", "f16", "f16"), ("f32", "bf16", "bf16")):
        raise UnsupportedError("the PTX executor", (f"it does not know {found.text}",))
    return _product(found, source, int(shape[1]), kinds[1])


def _commit(b: Programs, mask: Mask | None) -> None:
    b.units.number[_groups(b, mask)] += 1


def _product(
    found: Instruction, source: Source, columns: int, dtype: str
) -> Callable[[Programs, Mask | None], None]:
    names, left, right, scale_d, *signs = found.operands
    results = tuple(_registers(names))
    rows = tuple(left) if isinstance(left, tuple) else ()
    transposed = [x == "1" for x in signs[2:]]
    if list(signs[:2]) != ["1", "1"] or len(results) != columns // 2:
        raise UnsupportedError("the PTX executor", (f"it does not know {found.text}",))
    read_rows = [source(name, 32) for name in rows]
    read_left = None if rows else source(left, 64)
    read_right = source(right, 64)
    accumulates = source(scale_d, 0)
    read_results = [source(name, 32) for name in results]

    def step(b: Programs, mask: Mask | None) -> None:
        groups = np.flatnonzero(_whole_groups(b, found, mask))
        keeps = b.all(accumulates(b)).astype(bool).reshape(-1, _GROUP)[groups, 0]
        needed = {*rows, *(results if keeps.any() else ())}
        b.note("matrix instruction with registers written after its fence", "", len(needed & b.units.fresh))
        read: list[tuple[Array, Array]] = []
        if read_left is None:
            a = _rows_of_registers(dtype, [b.all(r(b)).reshape(-1, _GROUP)[groups] for r in read_rows])
        else:
            a = _operand(b, found, groups, read_left(b), _ROWS, dtype, transposed[0], read)
        columns_of_b = _operand(b, found, groups, read_right(b), columns, dtype, transposed[-1], read)
        product = np.matmul(a, columns_of_b.swapaxes(1, 2))  # [groups, 64, columns]
        # Rows: a warp, a half of eight, four lanes each; columns: eight together, two of a lane.
        parts = product.reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        threads = (groups[:, None] * _GROUP + np.arange(_GROUP)[None, :]).reshape(-1)
        who = np.zeros(b.threads, bool)
        who[threads] = True
        kept = np.repeat(keeps, _GROUP)
        for i, (name, before) in enumerate(zip(results, read_results, strict=True)):
            x = np.ascontiguousarray(parts[:, :, i // 2 % 2, :, i // 4, :, i % 2]).reshape(-1)
            old = np.ascontiguousarray(b.all(before(b))[threads]).view(np.float32)
            full = np.zeros(b.threads, np.float32)
            full[threads] = np.where(kept, old + x, x)
            b.put(name, full, who)
        b.units.fresh.difference_update(results)
        places, readers = (np.concatenate(found) for found in zip(*read, strict=True))
        number = b.units.number[groups]
        b.units.under_way.append(
            _Product(groups, number, frozenset(results), frozenset(rows), places, readers)
        )

    return step


def _whole_groups(b: Programs, found: Instruction, mask: Mask | None) -> Mask:
    groups = _groups(b, mask)
    if mask is not None:
        parted = groups & ~np.logical_and.reduceat(mask, np.arange(0, b.threads, _GROUP))
        b.note(f"{'.'.join(found.opcode[:2])} by a part of four warps", "", int(parted.sum()))
    return groups


def _rows_of_registers(dtype: str, registers: Sequence[Array]) -> Array:
    """The first operand ``[groups, 64, 16]`` from four registers of every thread, as in ``mma.sync``."""
    a0, a1, a2, a3 = (halves(dtype, x.reshape(-1), x.size) for x in registers)  # [warps, 8, 8]
    upper, lower = np.concatenate([a0, a2], 2), np.concatenate([a1, a3], 2)
    return np.concatenate([upper, lower], 1).reshape(-1, _ROWS, _DEPTH)


def _operand(
    b: Programs, found: Instruction, groups: Array, bits: Array, rows: int, dtype: str, transposed: bool,
    read: list[tuple[Array, Array]],
) -> Array:  # fmt: skip
    """An operand in shared memory, ``[groups, rows, 16]`` in float32; what it reads goes into ``read``."""
    each = b.all(bits).reshape(-1, _GROUP)[groups]
    different = (each != each[:, :1]).any(1)
    b.note("a matrix descriptor that threads do not agree on", "", int(different.sum()))
    at = pieces(Descriptor.of(each[:, 0]), rows, transposed=transposed)
    first = np.repeat(groups * _GROUP, at[0].size)
    values, places, piece = b.shared.read_by_units(
        b.program_of[first], at.reshape(-1), b.stamps.now[first], b.note
    )
    read.append((places, groups[piece // at[0].size]))
    x = values.reshape(*at.shape, _PIECE)
    x = x.swapaxes(1, 2).swapaxes(2, 3) if transposed else x
    # [groups, rows / 8, 8, 16] or [groups, rows, 2, 8]
    return as_float(dtype, np.ascontiguousarray(x).reshape(-1, rows, _DEPTH))
