"""A machine that executes the PTX of a kernel and says what a device would not: races, wrong addresses.

All threads of a number of programs take the same instruction at a time, as arrays of NumPy. Where their
ways part, those that are behind go first, until they meet again. What is checked: bounds and alignment of
every access, races in shared and in global memory, shared memory that nobody stored, copies (``cp.async``)
that nobody waited for, barriers and matrix instructions that a part of a program or warp takes; see
`bratune.testing.ptx_memory`.

It knows what Triton writes for sm_80, products by ``mma.sync`` with tiles by ``ldmatrix``, and for sm_90,
where four warps together hand products to units that read shared memory themselves (``wgmma``, see
`bratune.testing.ptx_units`). Copies of whole tiles (TMA) with the barriers that count their bytes
(``mbarrier``), which our kernels do not use, and what newer GPUs have (``tcgen05``, tensor memory) it refuses
by name: a check that leaves out how these are ordered would say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bratune.errors import MeasureError
from bratune.testing.ptx import Instruction, Program
from bratune.testing.ptx_memory import Global, Note, Shared, Stamps
from bratune.testing.ptx_ops import RAW, Array, as_raw
from bratune.testing.ptx_steps import Mask, not_known, step_of
from bratune.testing.ptx_units import MatrixUnits

__all__ = ["Programs", "PtxMachine", "granule"]

# Threads that are executed together: enough to make NumPy's own time small, few enough for the cache.
_THREADS = 4096
# A kernel that executes more instructions than this on its way does not end.
_MOST_STEPS = 20_000_000


class PtxMachine:
    """Executes one program.

    Args:
        program: What to execute.
        warps: Warps of a program.
        shared_bytes: Shared memory of a program.

    Raises:
        UnsupportedError: an instruction is not known.
    """

    def __init__(self, program: Program, *, warps: int, shared_bytes: int) -> None:
        self.program = program
        self.threads = 32 * warps
        self.shared_bytes = shared_bytes
        self.steps = tuple(step_of(found) for found in program.instructions)
        self.granule = granule(program, "shared")
        self.has_units = any(found.opcode[0] == "wgmma" for found in program.instructions)

    def run(self, grid: tuple[int, int, int], arguments: Sequence[int], memory: Global, note: Note) -> int:
        """Execute every program of a grid.

        Args:
            grid: Programs along its three axes.
            arguments: The bits of every parameter.
            memory: What pointers point to.
            note: Gets findings: what, where, and how many.

        Returns:
            How many instructions all warps executed together.
        """
        names = (name for name, _ in self.program.parameters)
        parameters = dict(zip(names, arguments, strict=True))
        total, done = grid[0] * grid[1] * grid[2], 0
        together = max(1, _THREADS // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, total, together):
                batch = Programs(self, first, min(together, total - first), grid, parameters, memory, note)
                done += batch.run()
        return done


def granule(program: Program, space: str) -> int:
    """Bytes of the smallest access to a space; 16 where there is none."""
    sizes = [16]
    for found in program.instructions:
        if found.opcode[0] in ("ld", "st") and space in found.opcode:
            sizes.append(int(found.opcode[-1][1:]) // 8)
        elif found.opcode[:2] == ("cp", "async") and len(found.operands) > 1:
            sizes.append(int(str(found.operands[2]), 0))
    return min(sizes)


class _Registers(dict[str, Array]):
    """Registers by name; what nobody wrote holds a pattern that is no number."""

    def __init__(self, bits: Mapping[str, int]) -> None:
        self.bits = bits

    def __missing__(self, name: str) -> Array:
        bits = self.bits[name.rstrip("0123456789")]
        return np.array([0x7FDEBEEF7FDEBEEF & (1 << bits) - 1]).astype(RAW[bits])


class _Copies:
    """Asynchronous copies of all threads that are under way."""

    def __init__(self, threads: int) -> None:
        self.group = np.zeros(threads, np.int64)  # the one that is not committed yet
        self.under_way: list[tuple[Array, Array, Array, Array]] = []

    def add(self, threads: Array, addresses: Array, data: Array) -> None:
        self.under_way.append((threads, self.group[threads], addresses, data))

    def landed(self, most: int | None, mask: Mask) -> list[tuple[Array, Array, Array]]:
        """Copies of threads that wait until at most so many groups are under way; None: all copies."""
        found, left = [], []
        for threads, group, addresses, data in self.under_way:
            done = mask[threads]
            if most is not None:
                done = done & (group < self.group[threads] - most)
            if done.any():
                found.append((threads[done], addresses[done], data[done]))
            if not done.all():
                left.append((threads[~done], group[~done], addresses[~done], data[~done]))
        self.under_way = left
        return found


class Programs:
    """Programs that are executed together."""

    def __init__(
        self, machine: PtxMachine, first: int, programs: int, grid: tuple[int, int, int],
        parameters: Mapping[str, int], memory: Global, note: Note,
    ) -> None:  # fmt: skip
        self.machine, self.memory, self.note = machine, memory, note
        self.each = machine.threads
        self.threads = programs * self.each
        self.programs = programs
        self.parameters = parameters
        self.program_of = np.repeat(np.arange(programs, dtype=np.int64), self.each)
        self.r = _Registers(machine.program.registers)
        self.stamps = Stamps(first, programs, self.each)
        self.shared = Shared(programs, machine.shared_bytes, machine.granule)
        self.copies = _Copies(self.threads)
        self.units = MatrixUnits(self.threads)
        self.special = self._special(first, grid)
        self.everyone = np.ones(self.threads, bool)
        self.left = np.zeros(self.threads, bool)
        self.waiting = np.full(self.threads, -1, np.int64)

    def _special(self, first: int, grid: tuple[int, int, int]) -> dict[str, Array]:
        thread = np.tile(np.arange(self.each), self.programs)
        program = first + self.program_of
        numbers = {
            "%tid.x": thread,
            "%ctaid.x": program % grid[0],
            "%ctaid.y": program // grid[0] % grid[1],
            "%ctaid.z": program // (grid[0] * grid[1]),
            "%laneid": thread % 32,
            "%ntid.x": np.array([self.each]),
            **{f"%nctaid.{axis}": np.array([n]) for axis, n in zip("xyz", grid, strict=True)},
        }
        nothing = {f"%{name}.{axis}": np.array([n]) for name, n in (("tid", 0), ("ntid", 1)) for axis in "yz"}
        return {name: x.astype(np.uint32) for name, x in (numbers | nothing).items()}

    # --- where threads are --------------------------------------------------------------------------

    def run(self) -> int:
        """Execute until every thread has left; how many instructions warps executed."""
        instructions = self.machine.program.instructions
        ways: dict[int, Mask] = {0: self.everyone}
        done = steps = 0
        while ways:
            at = min(ways)
            mask = ways.pop(at)
            # Those ahead wait where they are; who arrives there goes on with them.
            ahead = min(ways, default=len(instructions))
            everyone = bool(mask.all())
            warps = int(mask.reshape(-1, 32).any(1).sum())
            while at != ahead:
                found = instructions[at]
                steps += 1
                done += warps
                kind = found.opcode[0]
                if kind in ("bra", "ret", "exit", "bar") and found.opcode[:2] != ("bar", "warp"):
                    for place, who in self._jump(found, at, mask).items():
                        ways[place] = ways[place] | who if place in ways else who
                    break
                active: Mask | None = None if everyone else mask
                if found.guard:
                    active = self._guarded(found, mask)
                    if active.all():
                        active = None
                    elif not active.any():
                        at += 1
                        continue
                if self.units.under_way:
                    self.units.touch(self, found, active)
                self.machine.steps[at](self, active)
                at += 1
            else:
                ways[at] = ways[at] | mask if at in ways else mask
            if steps > _MOST_STEPS:
                raise MeasureError(f"{self.machine.program.name} does not end: {steps} instructions so far")
        if (self.waiting >= 0).any():
            self.note("a barrier that a part of the threads never reaches", "", 1)
        return done

    def _guarded(self, found: Instruction, mask: Mask) -> Mask:
        guard = np.broadcast_to(self.r[found.guard], (self.threads,))
        active: Mask = mask & (~guard if found.negated else guard)
        return active

    def _jump(self, found: Instruction, at: int, mask: Mask) -> dict[int, Mask]:
        """Where threads go from a branch, a barrier or the end."""
        taken = self._guarded(found, mask) if found.guard else mask
        rest = mask & ~taken
        ways = {at + 1: rest} if rest.any() else {}
        if not taken.any():
            return ways
        if found.opcode[0] == "bra":
            goal = self.machine.program.labels[str(found.operands[0])]
            ways[goal] = ways[goal] | taken if goal in ways else taken
        elif found.opcode[0] in ("ret", "exit"):
            self.left |= taken
        else:
            if found.operands != ("0",):
                raise not_known(found)
            self.waiting[taken] = at + 1
        for place, who in self._released().items():
            ways[place] = ways[place] | who if place in ways else who
        return ways

    def _released(self) -> dict[int, Mask]:
        """Threads of programs all of whose threads wait, and where they go on."""
        waits = (self.waiting >= 0).reshape(self.programs, -1)
        if not waits.any():
            return {}
        left = self.left.reshape(self.programs, -1)
        ready = waits.any(1) & (waits | left).all(1)
        if not ready.any():
            return {}
        self.note("a barrier after a part of the threads has ended", "", int((left.any(1) & ready).sum()))
        who = np.repeat(ready, self.each) & (self.waiting >= 0)
        places = np.unique(self.waiting[who])
        if len(places) > 1:
            first = np.where(waits, self.waiting.reshape(self.programs, -1), self.waiting.max()).min(1)
            other = waits & (self.waiting.reshape(self.programs, -1) != first[:, None])
            self.note("threads that wait at different barriers", "", int((other.any(1) & ready).sum()))
        self.stamps.pass_barrier(who)
        found = {int(place): who & (self.waiting == place) for place in places}
        self.waiting[who] = -1
        return found

    # --- registers and warps ------------------------------------------------------------------------

    def put(self, name: str, value: Array, mask: Mask | None) -> None:
        """Write a register of the threads of a mask."""
        if name == "_":
            return
        bits = self.r.bits[name.rstrip("0123456789")]
        value = as_raw(value, bits)
        self.r[name] = value if mask is None else np.where(mask, value, self.r[name])
        if self.machine.has_units:
            self.units.fresh.add(name)

    def all(self, x: Array) -> Array:
        """With an element for every thread."""
        return np.broadcast_to(x, (self.threads,))

    def active(self, mask: Mask | None) -> Array:
        """Numbers of the threads of a mask."""
        return np.flatnonzero(self.everyone if mask is None else mask)

    def whole_warps(self, found: Instruction, mask: Mask | None) -> None:
        """Note where a part of a warp takes what a warp takes together."""
        if mask is not None:
            warps = mask.reshape(-1, 32)
            parted = warps.any(1) & ~warps.all(1)
            self.note(f"{'.'.join(found.opcode[:2])} by a part of a warp", "", int(parted.sum()))
