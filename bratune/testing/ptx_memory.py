"""Memory of an executed kernel, and who touched every piece of it since which barrier.

Every thread has a *stamp*, a number made of its program, the barriers that the program has passed, its
warp, the barriers of the warp since then, and its lane. Memory keeps the stamp of the last store and of the
last load of every granule (the smallest piece that the kernel accesses). Two accesses, one of them a store,
are a race when nothing orders them: they belong to different programs, or to different warps with no
barrier of the program between, or to different lanes with no barrier of the warp between. The order in
which they were executed does not matter, so that one execution tells of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bratune.errors import MeasureError

__all__ = ["Global", "Segment", "Shared", "Stamps"]

_Bools = NDArray[np.bool_]
_Ints = NDArray[np.int64]
_Raw = NDArray[np.generic]
Note = Callable[[str, str, int], None]

_LANE, _WARP_BARRIERS, _WARP, _BARRIERS, _PROGRAM = 0, 6, 18, 24, 38
_NOBODY = np.int64(-1)
_SEVERAL_PROGRAMS = np.int64(1 << 62)
_SEVERAL_WARPS = np.int64(63 << _WARP | 63 << _LANE)
_SEVERAL_LANES = np.int64(63 << _LANE)
# What of a stamp is the thread, whatever barriers it has passed.
_THREAD = np.int64(~(4095 << _WARP_BARRIERS | 16383 << _BARRIERS))


class Stamps:
    """The stamps of all threads that are executed together.

    Args:
        first: Number of the first program.
        programs: How many programs there are.
        threads: Threads of a program.
    """

    def __init__(self, first: int, programs: int, threads: int) -> None:
        thread = np.arange(threads, dtype=np.int64)
        own = (thread // 32 << _WARP) + (thread % 32 << _LANE)
        program = np.arange(first, first + programs, dtype=np.int64) << _PROGRAM
        self.now: _Ints = (program[:, None] + own[None, :]).reshape(-1)

    def pass_barrier(self, threads: _Bools) -> None:
        """Order what these threads do from now on after what their program did before."""
        mine = self.now[threads] & ~np.int64(4095 << _WARP_BARRIERS)
        self._check((mine >> _BARRIERS) & 16383, 16383)
        self.now[threads] = mine + (1 << _BARRIERS)

    def pass_warp_barrier(self, threads: _Bools) -> None:
        """The same within each warp."""
        mine = self.now[threads]
        self._check((mine >> _WARP_BARRIERS) & 4095, 4095)
        self.now[threads] = mine + (1 << _WARP_BARRIERS)

    @staticmethod
    def _check(count: _Ints, most: int) -> None:
        if count.size and int(count.max()) >= most:
            raise MeasureError(f"a kernel with more than {most} barriers in a row cannot be followed")


def _unordered(old: _Ints, new: _Ints) -> _Bools:
    """Whether nothing orders an access that stands in memory and another one."""
    x = old ^ new
    other_program = (x >> _PROGRAM) != 0
    same_interval = (x >> _BARRIERS) == 0
    other_warp = (x >> _WARP) != 0
    other_lane = ((x >> _WARP_BARRIERS) == 0) & (x != 0)
    found: _Bools = (old != _NOBODY) & (other_program | (same_interval & (other_warp | other_lane)))
    return found


def _together(old: _Ints, new: _Ints) -> _Ints:
    """One stamp for two loads: of the later one, or of several threads where nothing orders them."""
    x = old ^ new
    found = new.copy()
    unordered = _unordered(old, new)
    found[unordered] |= _SEVERAL_LANES
    found[unordered & ((x >> _WARP) != 0)] |= _SEVERAL_WARPS
    found[unordered & ((x >> _PROGRAM) != 0)] = _SEVERAL_PROGRAMS
    return found


@dataclass(eq=False)
class Segment:
    """A stretch of memory.

    Attributes:
        name: What it is called in findings.
        data: Its bytes.
        given: Which of them may be touched, byte by byte.
        granule: Bytes that share a stamp.
        known: Which granules hold something; None: all of them.
    """

    name: str
    data: NDArray[np.uint8]
    given: _Bools
    granule: int
    known: _Bools | None = None
    stored: _Ints = field(init=False)
    loaded: _Ints = field(init=False)
    copying: _Bools = field(init=False)

    def __post_init__(self) -> None:
        size = -(-len(self.data) // self.granule)
        self.stored = np.full(size, _NOBODY, np.int64)
        self.loaded = np.full(size, _NOBODY, np.int64)
        self.copying = np.zeros(size, bool)

    def granules(self, offsets: _Ints, size: int) -> _Ints:
        """The granules of accesses of so many bytes, ``[accesses, granules]``."""
        return offsets[:, None] // self.granule + np.arange(max(1, size // self.granule))[None, :]

    def load(self, offsets: _Ints, size: int, stamps: _Ints, note: Note) -> None:
        """Check and note loads; nothing is read."""
        at = self.granules(offsets, size)
        if self.known is not None:
            note("load of shared memory that nobody stored", self.name, int((~self.known[at]).sum()))
        if self.copying.any():
            note("load of what a copy has not been waited for", self.name, int(self.copying[at].sum()))
        mine = np.broadcast_to(stamps[:, None], at.shape)
        races = _unordered(self.stored[at], mine)
        note("load of what another thread stores, with no barrier between", self.name, int(races.sum()))
        flat, wanted = at.reshape(-1), _together(self.loaded[at], mine).reshape(-1)
        self.loaded[flat] = wanted
        while (left := self.loaded[flat] != wanted).any():  # several threads loaded the same
            flat = flat[left]
            wanted = _together(self.loaded[flat], wanted[left])
            self.loaded[flat] = wanted

    def store(self, offsets: _Ints, size: int, stamps: _Ints, same: _Bools | None, note: Note) -> None:
        """Check and note stores; nothing is written.

        Args:
            offsets: Where.
            size: Bytes of each.
            stamps: Of the threads that store.
            same: ``[stores, bytes]``: whether the byte is there already; two threads may store the same.
            note: Where findings go.
        """
        at = self.granules(offsets, size)
        if self.copying.any():
            note("store into what a copy is filling", self.name, int(self.copying[at].sum()))
        mine = np.broadcast_to(stamps[:, None], at.shape)
        races = _unordered(self.loaded[at], mine)
        note("store into what another thread loads, with no barrier between", self.name, int(races.sum()))
        races = _unordered(self.stored[at], mine)
        if same is not None:
            races &= ~same.reshape(*at.shape, self.granule).all(2)
        note("store into what another thread stores, with no barrier between", self.name, int(races.sum()))
        self.stored[at] = mine
        if self.known is not None:
            self.known[at] = True


class Global:
    """The memory that all programs share, in segments of its own."""

    def __init__(self, segments: dict[int, Segment]) -> None:
        """Segments by their addresses."""
        self._bases = np.array(sorted(segments), np.int64)
        self._segments = [segments[int(base)] for base in self._bases]

    def load(
        self, addresses: _Ints, dtype: np.dtype[np.generic], count: int, stamps: _Ints, note: Note
    ) -> _Raw:
        """``count`` numbers at each address, ``[addresses, count]``; ones in every bit where none may be."""
        found = np.full((len(addresses), count * dtype.itemsize), 255, np.uint8).view(dtype)
        for segment, which, offsets in self._places(addresses, count * dtype.itemsize, "load", note):
            segment.load(offsets, count * dtype.itemsize, stamps[which], note)
            found[which] = _gather(segment.data, offsets, dtype, count)
        return found

    def store(self, addresses: _Ints, values: _Raw, stamps: _Ints, note: Note) -> None:
        """Write ``[addresses, count]`` numbers."""
        size = values.shape[1] * values.dtype.itemsize
        for segment, which, offsets in self._places(addresses, size, "store", note):
            _store(segment, offsets, values[which], stamps[which], note)

    def _places(
        self, addresses: _Ints, size: int, what: str, note: Note
    ) -> list[tuple[Segment, _Ints, _Ints]]:
        """Segments, which accesses go there, and at which offsets; what is out of bounds is left out."""
        owner = np.searchsorted(self._bases, addresses, side="right") - 1
        found = []
        for i in np.unique(owner):
            which = np.flatnonzero(owner == i)
            if i < 0:
                note(f"{what} outside of all tensors", "", len(which))
                continue
            segment = self._segments[i]
            offsets = addresses[which] - self._bases[i]
            inside = offsets + size <= len(segment.data)
            note(f"{what} outside", segment.name, int((~inside).sum()))
            which, offsets = which[inside], offsets[inside]
            inside = segment.given[offsets[:, None] + np.arange(size)[None, :]].all(1)
            note(f"{what} outside", segment.name, int((~inside).sum()))
            which, offsets = which[inside], offsets[inside]
            straight = addresses[which] % size == 0
            note(
                f"{what} of {size} bytes at an address that is no multiple",
                segment.name,
                int((~straight).sum()),
            )
            found.append((segment, which[straight], offsets[straight]))
        return found


class Shared:
    """The shared memory of programs that are executed together, one after the other.

    Args:
        programs: How many programs.
        size: Bytes of each.
        granule: Bytes of the smallest access.
    """

    def __init__(self, programs: int, size: int, granule: int) -> None:
        self.size = size
        self._stride = -(-size // 16) * 16
        length = programs * self._stride
        self._all = Segment(
            "shared memory",
            np.full(length, 255, np.uint8),
            np.ones(length, bool),
            granule,
            known=np.zeros(-(-length // granule), bool),
        )
        # What matrix units may be reading, how often, and what they do not see yet.
        self._reading = np.zeros(-(-length // granule), np.int32)
        self._unfenced = np.zeros(-(-length // granule), bool)

    def load(
        self,
        program: _Ints,
        addresses: _Ints,
        dtype: np.dtype[np.generic],
        count: int,
        stamps: _Ints,
        note: Note,
    ) -> _Raw:
        """``count`` numbers at each address of each program, ``[addresses, count]``."""
        size = count * dtype.itemsize
        found = np.full((len(addresses), size), 255, np.uint8).view(dtype)
        which, offsets = self._places(program, addresses, size, "load", note)
        self._all.load(offsets, size, stamps[which], note)
        found[which] = _gather(self._all.data, offsets, dtype, count)
        return found

    def load_together(
        self,
        program: _Ints,
        addresses: _Ints,
        dtype: np.dtype[np.generic],
        count: int,
        stamps: _Ints,
        note: Note,
    ) -> _Raw:
        """The same, of loads whose every number goes to all lanes of a warp."""
        return self.load(program, addresses, dtype, count, stamps | _SEVERAL_LANES, note)

    def store(self, program: _Ints, addresses: _Ints, values: _Raw, stamps: _Ints, note: Note) -> None:
        """Write ``[addresses, count]`` numbers."""
        size = values.shape[1] * values.dtype.itemsize
        which, offsets = self._places(program, addresses, size, "store", note)
        self._overwrite(offsets, size, note)
        _store(self._all, offsets, values[which], stamps[which], note)

    def begin_copy(self, program: _Ints, addresses: _Ints, size: int, stamps: _Ints, note: Note) -> None:
        """Asynchronous copies start to fill memory."""
        which, offsets = self._places(program, addresses, size, "copy", note)
        self._overwrite(offsets, size, note)
        self._all.store(offsets, size, stamps[which], None, note)
        self._all.copying[self._all.granules(offsets, size)] = True

    def end_copy(self, program: _Ints, addresses: _Ints, values: _Raw, stamps: _Ints) -> None:
        """Asynchronous copies were waited for by the threads that started them."""
        which, offsets = self._places(program, addresses, values.shape[1], "copy", _nothing)
        at = self._all.granules(offsets, values.shape[1])
        self._all.copying[at] = False
        self._unfenced[at] = True
        self._all.stored[at] = stamps[which][:, None]
        _scatter(self._all.data, offsets, values[which])

    def read_by_units(
        self, program: _Ints, addresses: _Ints, stamps: _Ints, note: Note
    ) -> tuple[_Raw, _Ints, _Ints]:
        """Matrix units start to read pieces of 16 bytes for warps together.

        Returns:
            Eight numbers of two bytes of every piece; the granules that are read, and of which piece.
        """
        which, offsets = self._places(program, addresses, 16, "load", note)
        at = self._all.granules(offsets, 16)
        unseen = int(self._unfenced[at].sum())
        note("load by a matrix unit of what no fence made visible to it", self._all.name, unseen)
        self._all.load(offsets, 16, stamps[which] | _SEVERAL_WARPS, note)
        np.add.at(self._reading, at.reshape(-1), 1)
        found = np.full((len(addresses), 8), 0xFFFF, np.uint16)
        found[which] = _gather(self._all.data, offsets, np.dtype(np.uint16), 8)
        return found, at.reshape(-1), np.repeat(which, at.shape[1])

    def end_reading(self, granules: _Ints, stamps: _Ints) -> None:
        """Warps waited for units that read granules; `stamps` are of one of them for each."""
        np.subtract.at(self._reading, granules, 1)
        self._all.loaded[granules] = stamps | _SEVERAL_WARPS

    def fence(self, stamps: _Ints) -> None:
        """What the threads with these stamps stored is visible to matrix units from now on."""
        at = np.flatnonzero(self._unfenced)
        self._unfenced[at[np.isin(self._all.stored[at] & _THREAD, stamps & _THREAD)]] = False

    def _overwrite(self, offsets: _Ints, size: int, note: Note) -> None:
        at = self._all.granules(offsets, size)
        busy = int((self._reading[at] > 0).sum())
        note("store into what a matrix unit may still read", self._all.name, busy)
        self._unfenced[at] = True

    def _places(
        self, program: _Ints, addresses: _Ints, size: int, what: str, note: Note
    ) -> tuple[_Ints, _Ints]:
        inside = (addresses >= 0) & (addresses + size <= self.size)
        note(f"{what} outside", "shared memory", int((~inside).sum()))
        straight = addresses % size == 0
        note(
            f"{what} of {size} bytes at an address that is no multiple",
            "shared memory",
            int((inside & ~straight).sum()),
        )
        which = np.flatnonzero(inside & straight)
        return which, program[which] * self._stride + addresses[which]


def _nothing(what: str, where: str, count: int) -> None:
    """Findings that were noted before."""


def _store(segment: Segment, offsets: _Ints, values: _Raw, stamps: _Ints, note: Note) -> None:
    data = np.ascontiguousarray(values).view(np.uint8)
    before = _gather(segment.data, offsets, np.dtype(np.uint8), data.shape[1])
    segment.store(offsets, data.shape[1], stamps, before == data, note)
    _scatter(segment.data, offsets, values)
    after = _gather(segment.data, offsets, np.dtype(np.uint8), data.shape[1])
    note("different values of two threads in one place", segment.name, int((after != data).any(1).sum()))


def _gather(data: NDArray[np.uint8], offsets: _Ints, dtype: np.dtype[np.generic], count: int) -> _Raw:
    """Numbers at offsets that are multiples of their size."""
    numbers = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    found: _Raw = numbers[offsets[:, None] // dtype.itemsize + np.arange(count)[None, :]]
    return found


def _scatter(data: NDArray[np.uint8], offsets: _Ints, values: _Raw) -> None:
    size = values.dtype.itemsize
    numbers = data[: len(data) // size * size].view(values.dtype)
    numbers[offsets[:, None] // size + np.arange(values.shape[1])[None, :]] = values
