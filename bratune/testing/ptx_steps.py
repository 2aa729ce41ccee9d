"""What the machine does for each instruction: sources are read, results written, memory and warps asked.

`bratune.testing.ptx_machine` has the threads, `bratune.testing.ptx_ops` what is computed in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bratune.errors import UnsupportedError
from bratune.testing.ptx import Address, Instruction
from bratune.testing.ptx_ops import RAW, Array, as_raw, matrix_product, operation, shuffle, sum_of_warps
from bratune.testing.ptx_units import fence_step, wgmma_step

if TYPE_CHECKING:
    from bratune.testing.ptx_machine import Programs

__all__ = ["SPECIAL", "Mask", "Step", "not_known", "step_of"]

Mask = NDArray[np.bool_]
# An instruction for the threads of a mask; None stands for all.
Step = Callable[["Programs", Mask | None], None]

SPECIAL = ("%tid.", "%ctaid.", "%ntid.", "%nctaid.", "%laneid")


def not_known(found: Instruction) -> UnsupportedError:
    """The error for an instruction of which the executor cannot tell what it does."""
    return UnsupportedError("the PTX executor", (f"it does not know {found.text}",))


def _source(text: Any, bits: int) -> Callable[[Programs], Array]:
    """An operand that is read, as registers hold so many bits; 0: as it is."""
    if not isinstance(text, str):
        raise UnsupportedError("the PTX executor", (f"it cannot read {text} as a number",))
    if text.startswith(SPECIAL):
        return lambda b: b.special[text]
    if text.startswith("%"):
        return (lambda b: as_raw(b.r[text], bits)) if bits else lambda b: b.r[text]
    if text == "global_smem":  # the only symbol: shared memory, from its beginning
        value = 0
    elif text[:2] in ("0f", "0F", "0d", "0D"):
        value = int(text[2:], 16)
    else:
        value = int(text.rstrip("U"), 0)
    constant = np.array([value & (1 << (bits or 32)) - 1], np.uint64).astype(RAW[bits or 32])
    return lambda b: constant


def _names(operand: Any) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def step_of(found: Instruction) -> Step:
    """What a machine does for an instruction; where threads go it decides itself.

    Raises:
        UnsupportedError: the instruction is not known.
    """
    op = found.opcode
    if op[0] in ("bra", "ret", "exit", "nop") or op[:2] == ("bar", "sync"):
        return lambda b, mask: None
    special: Mapping[str, Callable[[Instruction], Step]] = {
        "ld": _load, "st": _store, "shfl": _shuffle, "redux": _redux, "ldmatrix": _ldmatrix, "mma": _mma,
        "cp": _copy, "bar": _warp_barrier, "stmatrix": _stmatrix, "fence": fence_step,
        "wgmma": lambda found: wgmma_step(found, _source),
    }  # fmt: skip
    if op[0] in special:
        return special[op[0]](found)
    if op[0] == "mov" and any(isinstance(x, tuple) for x in found.operands):
        return _pack(found)
    if op[0] == "mov" and op[1] == "b32" and str(found.operands[1]).startswith("%r"):
        return _rename(found)
    compute, _, bits = operation(op)
    target = str(found.operands[0])
    widths = (*bits, *[bits[-1]] * len(found.operands))
    sources = [_source(x, n) for x, n in zip(found.operands[1:], widths, strict=False)]
    return lambda b, mask: b.put(target, compute(*(read(b) for read in sources)), mask)


def _rename(found: Instruction) -> Step:
    """``mov`` between registers: two names of one, which the assembler makes a single register."""
    target, source = (str(x) for x in found.operands)
    read = _source(source, int(found.opcode[1][1:]))

    def step(b: Programs, mask: Mask | None) -> None:
        b.put(target, read(b), mask)
        b.units.rename(target, source)

    return step


def _pack(found: Instruction) -> Step:
    """``mov`` between a register and several narrower ones."""
    bits = int(found.opcode[1][1:])
    target, source = found.operands
    parts = _names(target if isinstance(target, tuple) else source)
    width = bits // len(parts)
    if isinstance(target, tuple):
        whole = _source(source, bits)

        def unpack(b: Programs, mask: Mask | None) -> None:
            x = whole(b)
            for i, name in enumerate(parts):
                part = x >> RAW[bits](i * width) & RAW[bits]((1 << width) - 1)
                b.put(name, part.astype(RAW[width]), mask)

        return unpack
    reads = [_source(name, width) for name in parts]

    def pack(b: Programs, mask: Mask | None) -> None:
        total = np.zeros(1, RAW[bits])
        for i, read in enumerate(reads):
            total = total | read(b).astype(RAW[bits]) << RAW[bits](i * width)
        b.put(str(target), total, mask)

    return pack


def _shape(found: Instruction) -> tuple[np.dtype[Any], int]:
    """Type and number of what one access moves."""
    count = next((int(part[1:]) for part in found.opcode if part in ("v2", "v4", "v8")), 1)
    return np.dtype(RAW[int(found.opcode[-1][1:])]), count


def _address(operand: Any, bits: int) -> Callable[[Programs], Array]:
    if not isinstance(operand, Address):
        raise UnsupportedError("the PTX executor", (f"it cannot read {operand} as an address",))
    base = _source(operand.base, bits)
    return lambda b: b.all(base(b)).astype(np.int64) + operand.offset


def _extended(x: Array, kind: str) -> Array:
    """Signed numbers fill a wider register with their sign."""
    return x.view(f"i{x.dtype.itemsize}").astype(np.int64).view(np.uint64) if kind[0] == "s" else x


def _load(found: Instruction) -> Step:
    space, kind = found.opcode[1], found.opcode[-1]
    dtype, count = _shape(found)
    targets = _names(found.operands[0])
    if space == "param":
        parameter = found.operands[1]
        if not isinstance(parameter, Address) or parameter.offset:
            raise not_known(found)

        def load_parameter(b: Programs, mask: Mask | None) -> None:
            bits = b.parameters[parameter.base] & (1 << 8 * dtype.itemsize) - 1
            b.put(targets[0], _extended(np.array([bits], np.uint64).astype(dtype), kind), mask)

        return load_parameter
    if space not in ("global", "shared"):
        raise not_known(found)
    address = _address(found.operands[1], 64 if space == "global" else 32)

    def load(b: Programs, mask: Mask | None) -> None:
        who = b.active(mask)
        at, stamps = address(b)[who], b.stamps.now[who]
        if space == "global":
            x = b.memory.load(at, dtype, count, stamps, b.note)
        else:
            x = b.shared.load(b.program_of[who], at, dtype, count, stamps, b.note)
        for i, name in enumerate(targets):
            b.put(name, _everywhere(_extended(np.ascontiguousarray(x[:, i]), kind), who, b), mask)

    return load


def _everywhere(x: Array, who: Array, b: Programs) -> Array:
    """Values of some threads as those of all; the others have none."""
    if len(who) == b.threads:
        return x
    found = np.zeros(b.threads, x.dtype)
    found[who] = x
    return found


def _store(found: Instruction) -> Step:
    space = found.opcode[1]
    if space not in ("global", "shared"):
        raise not_known(found)
    dtype, _ = _shape(found)
    address = _address(found.operands[0], 64 if space == "global" else 32)
    reads = [_source(name, 8 * dtype.itemsize) for name in _names(found.operands[1])]

    def store(b: Programs, mask: Mask | None) -> None:
        who = b.active(mask)
        at, stamps = address(b)[who], b.stamps.now[who]
        values = np.stack([b.all(read(b))[who] for read in reads], 1)
        if space == "global":
            b.memory.store(at, values, stamps, b.note)
        else:
            b.shared.store(b.program_of[who], at, values, stamps, b.note)

    return store


def _shuffle(found: Instruction) -> Step:
    mode = found.opcode[2]
    targets = str(found.operands[0]).split("|")
    value, by, clamp = (_source(x, 32) for x in found.operands[1:4])

    def step(b: Programs, mask: Mask | None) -> None:
        b.whole_warps(found, mask)
        results = shuffle(mode, value(b), by(b), clamp(b), b.threads)
        for name, x in zip(targets, results, strict=False):
            b.put(name, x, mask)

    return step


def _redux(found: Instruction) -> Step:
    if found.opcode[2] != "add":
        raise not_known(found)
    value, members = (_source(x, 32) for x in found.operands[1:])

    def step(b: Programs, mask: Mask | None) -> None:
        b.whole_warps(found, mask)
        b.put(str(found.operands[0]), sum_of_warps(value(b), members(b), b.threads), mask)

    return step


def _warp_barrier(found: Instruction) -> Step:
    if found.opcode != ("bar", "warp", "sync"):
        raise not_known(found)

    def step(b: Programs, mask: Mask | None) -> None:
        b.whole_warps(found, mask)
        b.stamps.pass_warp_barrier(b.everyone if mask is None else mask)

    return step


def _ldmatrix(found: Instruction) -> Step:
    """Tiles of 8 x 8 halves: lane ``8 * i + j`` has the address of row j of tile i; all get two numbers."""
    targets = _names(found.operands[0])
    tiles = len(targets)
    address = _address(found.operands[1], 32)
    if "m8n8" not in found.opcode or found.opcode[-1] != "b16":
        raise not_known(found)

    def step(b: Programs, mask: Mask | None) -> None:
        b.whole_warps(found, mask)
        rows = (b.everyone if mask is None else mask).reshape(-1, 32)[:, : 8 * tiles]
        at = np.arange(b.threads).reshape(-1, 32)[:, : 8 * tiles]
        who = at[rows]
        x = b.shared.load_together(
            b.program_of[who], address(b)[who], np.dtype(np.uint16), 8, b.stamps.now[who], b.note
        )
        found_rows = np.zeros((*rows.shape, 8), np.uint16)
        found_rows[rows] = x
        matrices = found_rows.reshape(-1, tiles, 8, 8)
        if "trans" in found.opcode:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        pairs = matrices.reshape(-1, tiles, 32, 2).view(np.uint32)[..., 0]
        for i, name in enumerate(targets):
            b.put(name, pairs[:, i].reshape(-1), mask)

    return step


def _stmatrix(found: Instruction) -> Step:
    """The way back of `_ldmatrix`: lane ``8 * i + j`` has the address of row j of tile i."""
    reads = [_source(x, 32) for x in _names(found.operands[1])]
    tiles = len(reads)
    address = _address(found.operands[0], 32)
    if "m8n8" not in found.opcode or found.opcode[-1] != "b16":
        raise not_known(found)

    def step(b: Programs, mask: Mask | None) -> None:
        b.whole_warps(found, mask)
        pairs = np.stack([b.all(read(b)).reshape(-1, 32) for read in reads], 1)  # [warps, tiles, 32]
        matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, tiles, 8, 8)
        if "trans" in found.opcode:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        rows = (b.everyone if mask is None else mask).reshape(-1, 32)[:, : 8 * tiles]
        who = np.arange(b.threads).reshape(-1, 32)[:, : 8 * tiles][rows]
        values = matrices.reshape(-1, 8 * tiles, 8)[rows]
        b.shared.store(b.program_of[who], address(b)[who], values, b.stamps.now[who], b.note)

    return step


def _mma(found: Instruction) -> Step:
    shape, dtype = found.opcode[3], found.opcode[7]
    if shape not in ("m16n8k16", "m16n8k8") or (shape == "m16n8k8") != (dtype == "tf32"):
        raise not_known(found)
    if dtype not in ("f16", "bf16", "tf32") or found.opcode[6] != "f32" or found.opcode[9] != "f32":
        raise not_known(found)
    targets = _names(found.operands[0])
    a, b_, c = ([_source(x, 32) for x in _names(operand)] for operand in found.operands[1:])

    def step(b: Programs, mask: Mask | None) -> None:
        b.whole_warps(found, mask)
        left, right, added = ([read(b) for read in reads] for reads in (a, b_, c))
        for name, x in zip(targets, matrix_product(dtype, left, right, added, b.threads), strict=True):
            b.put(name, x, mask)

    return step


def _copy(found: Instruction) -> Step:
    """``cp.async``: copies from global to shared memory that are waited for in groups."""
    op = found.opcode
    if op[:3] == ("cp", "async", "commit_group"):
        return lambda b, mask: _commit(b, mask)
    if op[:3] in (("cp", "async", "wait_group"), ("cp", "async", "wait_all")):
        most = int(str(found.operands[0]), 0) if op[2] == "wait_group" else None
        return lambda b, mask: _wait(b, most, mask)
    if op[:2] != ("cp", "async") or op[2] not in ("ca", "cg"):
        raise not_known(found)
    goal, source = _address(found.operands[0], 32), _address(found.operands[1], 64)
    size = int(str(found.operands[2]), 0)
    read = _source(found.operands[3], 32) if len(found.operands) > 3 else _source(str(size), 32)

    def step(b: Programs, mask: Mask | None) -> None:
        who = b.active(mask)
        stamps = b.stamps.now[who]
        bytes_read = b.all(read(b))[who]
        b.note("a copy of a part of its bytes", "", int(((bytes_read != 0) & (bytes_read != size)).sum()))
        data = np.zeros((len(who), size), np.uint8)  # bytes that are not read are zero
        full = bytes_read == size
        numbers = b.memory.load(source(b)[who][full], np.dtype(np.uint32), size // 4, stamps[full], b.note)
        data[full] = np.ascontiguousarray(numbers).view(np.uint8)
        at = goal(b)[who]
        b.shared.begin_copy(b.program_of[who], at, size, stamps, b.note)
        b.copies.add(who, at, data)

    return step


def _commit(b: Programs, mask: Mask | None) -> None:
    b.copies.group[b.active(mask)] += 1


def _wait(b: Programs, most: int | None, mask: Mask | None) -> None:
    for who, at, data in b.copies.landed(most, b.everyone if mask is None else mask):
        b.shared.end_copy(b.program_of[who], at, data, b.stamps.now[who])
