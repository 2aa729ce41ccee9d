"""Work: what a kernel reads, writes, multiplies and launches.

A part is a short list of `Op`, one per kernel that PyTorch (or a fused backend) launches for it. Counts are
of what the hardware performs, not of what the formula needs: a region of 4 queries occupies a 16-row matrix
tile, a gathered key is read and written once per copy, a masked product is computed before it is masked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bratune.predict.counted import NARROW_WINDOW, product_kind
from bratune.problem import Problem, ceil_div

__all__ = [
    "BLOCK_ROWS",
    "ELEMENTS_PER_BLOCK",
    "SOFTMAX_SLOTS",
    "TILE",
    "Op",
    "backward_ops",
    "conv_op",
    "copy",
    "elementwise",
    "fuse",
    "matmul",
    "pad_to",
    "useful_macs",
]

# Rows of the smallest tensor-core tile; a matrix with fewer rows is filled up with zeros.
TILE = 16
# Rows that one program of a matrix product or a fused attention computes.
BLOCK_ROWS = 64
# Instruction lanes per score of a softmax: scale, maximum, subtract, the exponential (an eighth of the
# rate of the others, beside them), sum, conversion.
SOFTMAX_SLOTS = 10
# Instructions per multiply-add of a depthwise convolution written without reuse (load, convert, address).
DEPTHWISE_SLOTS = 5
# The public rate of a kind of kernel. A fused attention, a sort and a gather along routes have none: the last
# is timed like a copy and counts as unknown nevertheless.
_RATES = {"copy": "copy", "gather": "copy", "reduce": "pool"}
# Elements that one block of an elementwise kernel handles.
ELEMENTS_PER_BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class Op:
    """One kernel.

    Attributes:
        name: What it does.
        kind: ``copy``, ``pointwise``, ``gather``, ``matmul``, ``fused`` (attention in one kernel), ``conv``,
            ``reduce`` or ``sort``; decides what its backward costs and whether a compiler fuses it.
        read: Distinct bytes read.
        written: Bytes written.
        cold: Bytes of `read` that are inputs of the part, so that nothing has just written them.
        reread: Bytes that are read again and again out of the last-level cache, beyond `read`.
        macs: Multiply-adds on the matrix units, tile padding included.
        slots: Instructions on the general cores, one lane each.
        blocks: Independent blocks, which decide how much of the device is busy.
        launches: Kernels that it really is, where several small ones are counted together.
        rate: Whose public rate it takes, one of `bratune.predict.counted.KINDS`; empty: see `rate_kind`.
    """

    name: str
    kind: str
    read: float
    written: float
    cold: float = 0.0
    reread: float = 0.0
    macs: float = 0.0
    slots: float = 0.0
    blocks: float = 1.0
    launches: int = 1
    rate: str = ""

    @property
    def rate_kind(self) -> str:
        """The kind of operation whose public rate it takes; empty where nobody published its like."""
        if self.rate or self.kind != "pointwise":
            return self.rate or _RATES.get(self.kind, "")
        return "softmax" if self.name.startswith("softmax") else "elementwise"

    @property
    def rate_macs(self) -> float:
        """Multiply-adds, those of a depthwise convolution on the general cores included."""
        return self.slots / DEPTHWISE_SLOTS if self.rate == "depthwise" else self.macs

    def scaled(self, name: str, bytes_factor: float, work_factor: float, launches: int) -> Op:
        """The same kernel with more or less of everything, e.g. its backward pass."""
        return dataclasses.replace(
            self,
            name=name,
            read=self.read * bytes_factor,
            written=self.written * bytes_factor,
            reread=self.reread * bytes_factor,
            cold=0.0,
            macs=self.macs * work_factor,
            slots=self.slots * work_factor,
            launches=launches,
        )


def pad_to(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that holds ``value``."""
    return ceil_div(value, multiple) * multiple


def elementwise(
    name: str,
    read: float,
    written: float,
    *,
    cold: float = 0.0,
    item: int = 2,
    slots: float = 1,
    rate: str = "",
) -> Op:
    """A kernel that does a little with every element that it writes."""
    elements = max(read, written) / item
    return Op(
        name=name,
        kind="pointwise",
        read=read,
        written=written,
        cold=cold,
        slots=elements * slots,
        blocks=elements / ELEMENTS_PER_BLOCK,
        rate=rate,
    )


def copy(name: str, moved: float, *, cold: bool = False, item: int = 2) -> Op:
    """A change of layout: everything read once and written once."""
    return Op(
        name=name,
        kind="copy",
        read=moved,
        written=moved,
        cold=moved if cold else 0.0,
        blocks=moved / item / ELEMENTS_PER_BLOCK,
    )


def matmul(
    name: str,
    rows: int,
    inner: int,
    cols: int,
    item: int,
    *,
    batch: int = 1,
    weights: bool = True,
    cold: bool = False,
) -> Op:
    """A matrix product ``[batch, rows, inner] @ [inner, cols]``, filled up to whole tiles.

    Args:
        name: What it computes.
        rows: Rows of the left matrix.
        inner: Summed axis.
        cols: Columns of the right matrix.
        item: Bytes of a number.
        batch: Independent products.
        weights: The right matrix is shared by the batch (a linear layer) and not read from the part's input.
        cold: The left matrix is an input of the part.
    """
    left, right, out = rows * inner * batch, inner * cols * (1 if weights else batch), rows * cols * batch
    tiles = ceil_div(rows, BLOCK_ROWS) * ceil_div(cols, BLOCK_ROWS) * batch
    return Op(
        name=name,
        kind="matmul",
        read=(left + right) * item,
        written=out * item,
        cold=left * item if cold else 0.0,
        macs=batch * pad_to(rows, TILE) * pad_to(inner, TILE) * pad_to(cols, TILE),
        blocks=tiles,
        rate=product_kind(inner, cols) if weights else "batched",
    )


def conv_op(
    name: str,
    elements_in: float,
    elements_out: float,
    taps: int,
    item: int,
    *,
    depthwise: bool,
    channels: int = 0,
) -> Op:
    """A convolution with ``taps`` multiply-adds per output element.

    Args:
        name: What it computes.
        elements_in: Numbers that it reads.
        elements_out: Numbers that it writes.
        taps: Multiply-adds per number that it writes.
        item: Bytes of a number.
        depthwise: Every channel by itself.
        channels: Fewer of its channels before and behind.
    """
    macs = elements_out * taps
    return Op(
        name=name,
        kind="conv",
        read=elements_in * item,
        written=elements_out * item,
        cold=elements_in * item,
        macs=0.0 if depthwise else macs,
        slots=macs * DEPTHWISE_SLOTS if depthwise else 0.0,
        blocks=elements_out / ELEMENTS_PER_BLOCK,
        rate="depthwise" if depthwise else "conv" if channels >= NARROW_WINDOW else "conv-narrow",
    )


# --- whole passes -------------------------------------------------------------------------------------

# Per kind: bytes, matrix and general work of the backward pass relative to the forward, and its launches.
_BACKWARD = {
    "copy": (1.0, 1.0, 1),
    "pointwise": (1.5, 1.5, 1),
    "gather": (2.0, 2.0, 2),  # scatter-add: read, add, write
    "matmul": (2.0, 2.0, 2),  # one product per operand
    "fused": (2.0, 2.5, 3),  # scores again, then both operands
    "conv": (2.0, 2.0, 2),
    "reduce": (1.0, 1.0, 1),
    "sort": (0.0, 0.0, 0),  # no gradient
}


def backward_ops(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """The kernels of the backward pass, last operation first."""
    found = []
    for op in reversed(ops):
        moved, worked, launches = _BACKWARD[op.kind]
        if launches:
            found.append(op.scaled(f"{op.name}, backward", moved, worked, launches * op.launches))
    return tuple(found)


def fuse(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """What a compiler makes of them: runs of elementwise kernels and copies become one kernel each."""
    found: list[Op] = []
    for op in ops:
        if found and op.kind in _FUSABLE and found[-1].kind in _FUSABLE:
            last = found[-1]
            # What the first wrote and the second read stays in registers.
            shared = min(last.written, op.read)
            found[-1] = dataclasses.replace(
                last,
                name=f"{last.name} + {op.name}",
                read=last.read + op.read - shared,
                written=last.written + op.written - shared,
                slots=last.slots + op.slots,
                blocks=max(last.blocks, op.blocks),
                launches=max(last.launches, op.launches),
            )
        else:
            found.append(op)
    return tuple(found)


_FUSABLE = {"copy", "pointwise"}


def useful_macs(p: Problem) -> int:
    """Multiply-adds that the attention of a problem needs, without tile padding; both directions."""
    return p.attention_macs * (3 if p.backward else 1)
