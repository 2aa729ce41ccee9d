"""Machine code of a compiled kernel, read as instructions and loops.

Counting every instruction as often as its loops run gives the *issue time*: warp instructions divided by
what the schedulers of the GPU can issue, a lower bound of the run time that needs no GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bratune.errors import MeasureError

__all__ = ["CLASSES", "Listing", "Loop", "parse_amdgcn", "parse_sass"]

# Classes of instructions by the beginning of their names; what fits none is `other`.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "mma": ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "v_mfma"),
    "exp": ("MUFU", "v_exp"),
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "v_fma", "v_mul_f32", "v_add_f32", "v_pk_"),
    "load_async": ("LDGSTS",),
    "load": ("LDG", "global_load", "buffer_load"),
    "store": ("STG", "global_store", "buffer_store"),
    "shared": ("LDS", "STS", "STSM", "ds_"),
    "shuffle": ("SHFL",),
    "local": ("LDL", "STL", "scratch_"),
    "atomic": ("RED", "ATOM", "global_atomic"),
    "barrier": ("BAR", "s_barrier"),
}

# Loops of fewer instructions wait on something (a barrier, the end of the program); they do no work.
_SMALLEST_LOOP = 5


@dataclass(frozen=True)
class Loop:
    """Instructions ``start`` to ``end`` (both included) repeat."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Instructions of the body."""
        return self.end - self.start + 1


@dataclass(frozen=True)
class Listing:
    """The instructions of a kernel in order, and its loops, the largest first."""

    operations: tuple[str, ...]
    loops: tuple[Loop, ...]

    def classes(self, trips: Sequence[float] = ()) -> dict[str, float]:
        """Instructions of each class that a warp executes.

        Args:
            trips: How often each of `loops` runs; without it, every instruction is counted once. A loop
                inside another runs as often as the product.

        Raises:
            MeasureError: there are more or fewer trip counts than loops.
        """
        found: Counter[str] = Counter()
        for operation, weight in zip(self.operations, self._weights(trips), strict=True):
            found[_class_of(operation)] += weight  # type: ignore[assignment]
        return dict(sorted(found.items()))

    def count(self, trips: Sequence[float] = ()) -> float:
        """Instructions that a warp executes; see `classes`."""
        return sum(self._weights(trips))

    def count_in(self, name: str, loop: Loop) -> int:
        """Instructions of a class in the body of a loop."""
        body = self.operations[loop.start : loop.end + 1]
        return sum(_class_of(operation) == name for operation in body)

    def _weights(self, trips: Sequence[float]) -> list[float]:
        weights: list[float] = [1] * len(self.operations)
        if not trips:
            return weights
        if len(trips) != len(self.loops):
            raise MeasureError(
                f"{len(trips)} trip counts were given for {len(self.loops)} loops of "
                f"{', '.join(str(loop.size) for loop in self.loops)} instructions"
            )
        for loop, count in zip(self.loops, trips, strict=True):
            for i in range(loop.start, loop.end + 1):
                weights[i] *= count
        return weights


def _class_of(operation: str) -> str:
    for name, beginnings in CLASSES.items():
        if operation.startswith(beginnings):
            return name
    return "other"


def parse_sass(text: str) -> Listing:
    """The listing of ``nvdisasm -c`` output."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            labels[label[1]] = len(operations)
            continue
        found = re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*)", line)
        if not found or found[1] == "NOP":
            continue
        if found[1].startswith("BRA") and (goal := re.search(r"`\((\.L\w+)\)", found[2])):
            jumps.append((len(operations), goal[1]))
        operations.append(found[1])
    # What waits for a barrier stands behind the end of the kernel and jumps back into it: no loop.
    last = max((i for i, operation in enumerate(operations) if operation == "EXIT"), default=len(operations))
    jumps = [(source, goal) for source, goal in jumps if source < last or labels.get(goal, source) > last]
    return _listing(operations, labels, jumps)


def parse_amdgcn(text: str) -> Listing:
    """The listing of AMD assembly as LLVM prints it."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(operations)
            continue
        found = re.match(r"^\t((?:[vs]|ds|global|buffer|flat|scratch)_\w+)\s*(.*)", line)
        if not found or found[1] == "s_nop":
            continue
        if found[1].startswith(("s_cbranch", "s_branch")) and (goal := re.search(r"\.LBB\w+", found[2])):
            jumps.append((len(operations), goal[0]))
        operations.append(found[1])
    return _listing(operations, labels, jumps)


def _listing(
    operations: Sequence[str], labels: Mapping[str, int], jumps: Sequence[tuple[int, str]]
) -> Listing:
    """Join code and jumps: a jump backwards closes a loop, of two with the same head the longer counts."""
    ends: dict[int, int] = {}
    for source, goal in jumps:
        start = labels.get(goal, source + 1)
        if start <= source:
            ends[start] = max(source, ends.get(start, 0))
    loops = [Loop(start, end) for start, end in ends.items()]
    loops = sorted((x for x in loops if x.size >= _SMALLEST_LOOP), key=lambda x: (-x.size, x.start))
    return Listing(tuple(operations), tuple(loops))
