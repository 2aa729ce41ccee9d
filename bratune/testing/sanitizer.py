"""A sanitizer for Triton's interpreter: every address that a kernel touches, element by element.

The interpreter runs programs one after the other and reads whatever memory a pointer names, so that a kernel
which is wrong on a device may pass there. `sanitized` stands between the kernel and the memory and notes

- loads and stores outside of the elements that the launch was given, also inside of the same storage,
- stores into tensors that are inputs,
- memory that two programs share in one launch, one of them writing,
- reads, without a barrier between, of what the same program wrote: other threads may have written it,
- two lanes of one store that write different values to one address.

It needs ``TRITON_INTERPRET=1`` in the environment before Triton is imported::

    with sanitized() as findings:
        out = TritonBackend().forward(q, k, v, routes, problem)
    assert not findings
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bratune.errors import UnsupportedError

__all__ = ["INPUTS", "Violation", "products_in_one_order", "sanitized"]

# Parameters of this project's kernels that are read and never written.
INPUTS = frozenset(f"{name}_ptr" for name in ("q", "k", "v", "grad", "x", "weight", "bias", "shift"))
_NOBODY, _SEVERAL = -1, -2


@dataclass(frozen=True)
class Violation:
    """What a kernel did that it must not.

    Attributes:
        kernel: Name of the kernel.
        what: What happened.
        where: The parameter whose memory it concerns; empty where no parameter has that memory.
        count: Elements concerned, in the access that was seen first.
    """

    kernel: str
    what: str
    where: str
    count: int

    def __str__(self) -> str:
        return f"{self.kernel}: {self.what} of {self.where or 'unknown memory'}, {self.count} elements"


@dataclass(eq=False)
class _Memory:
    """One storage and, for every element of it, who touched it in this launch."""

    base: int
    item: int
    names: list[str]
    given: np.ndarray
    writer: np.ndarray
    reader: np.ndarray
    epoch: np.ndarray

    @classmethod
    def of(cls, x: Tensor, name: str) -> _Memory:
        storage = x.untyped_storage()
        size = storage.nbytes() // x.element_size()
        nobody = np.full(size, _NOBODY, np.int64)
        return cls(
            base=storage.data_ptr(), item=x.element_size(), names=[name], given=np.zeros(size, bool),
            writer=nobody, reader=nobody.copy(), epoch=nobody.copy(),
        )  # fmt: skip

    def give(self, x: Tensor) -> None:
        """Mark the elements of a view."""
        places = torch.arange(len(self.given)).as_strided(x.shape, x.stride(), x.storage_offset())
        self.given[places.reshape(-1).numpy()] = True


@dataclass
class _Watch:
    """Watches the launches of kernels, one at a time."""

    inputs: frozenset[str]
    findings: list[Violation] = field(default_factory=list)
    seen: set[tuple[str, str, str]] = field(default_factory=set)
    kernel: str = ""
    memories: list[_Memory] = field(default_factory=list)
    program: int = 0
    epoch: int = 0

    def launch(self, kernel: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.kernel, self.epoch = kernel, 0
        found: dict[int, _Memory] = {}
        for name, x in tensors:
            if x.numel() == 0:
                continue
            key = x.untyped_storage().data_ptr()
            if key not in found:
                found[key] = _Memory.of(x, name)
            else:
                found[key].names.append(name)
            found[key].give(x)
        self.memories = sorted(found.values(), key=lambda memory: memory.base)

    def note(self, what: str, where: str, count: int) -> None:
        if count and (self.kernel, what, where) not in self.seen:
            self.seen.add((self.kernel, what, where))
            self.findings.append(Violation(self.kernel, what, where, count))

    def _places(self, addresses: np.ndarray, what: str) -> Iterator[tuple[_Memory, np.ndarray]]:
        bases = np.array([memory.base for memory in self.memories], np.int64)
        which = np.searchsorted(bases, addresses, side="right") - 1
        for i in np.unique(which):
            mine = addresses[which == i]
            if i < 0:
                self.note(f"{what} outside", "", len(mine))
                continue
            memory = self.memories[i]
            places = (mine - memory.base) // memory.item
            inside = places < len(memory.given)
            inside[inside] = memory.given[places[inside]]
            name = "+".join(memory.names)
            self.note(f"{what} outside", name, int((~inside).sum()))
            yield memory, places[inside]

    def load(self, addresses: np.ndarray) -> None:
        for memory, at in self._places(addresses, "load"):
            name, writer = "+".join(memory.names), memory.writer[at]
            others = (writer != _NOBODY) & (writer != self.program)
            self.note("load of what another program stores", name, int(others.sum()))
            fresh = (writer == self.program) & (memory.epoch[at] == self.epoch)
            self.note("load of what this program stored, with no barrier between", name, int(fresh.sum()))
            reader = memory.reader[at]
            alone = (reader == _NOBODY) | (reader == self.program)
            memory.reader[at] = np.where(alone, self.program, _SEVERAL)

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(addresses, kind="stable")
        sorted_addresses, sorted_values = addresses[order], values[order]
        twice = sorted_addresses[1:] == sorted_addresses[:-1]
        differ = twice & (sorted_values[1:] != sorted_values[:-1])
        self.note("different values of two lanes in one address", "", int(differ.sum()))
        for memory, at in self._places(addresses, "store"):
            name, writer, reader = "+".join(memory.names), memory.writer[at], memory.reader[at]
            if self.inputs.issuperset(memory.names):
                self.note("store into an input", name, len(at))
            others = (writer != _NOBODY) & (writer != self.program)
            self.note("store to what another program stores", name, int(others.sum()))
            others = (reader != _NOBODY) & (reader != self.program)
            self.note("store to what another program loads", name, int(others.sum()))
            memory.writer[at], memory.epoch[at] = self.program, self.epoch


@contextlib.contextmanager
def sanitized(inputs: frozenset[str] = INPUTS) -> Iterator[list[Violation]]:
    """Watch every kernel that the interpreter runs.

    Args:
        inputs: Parameters that no kernel may write; memory that other parameters share is exempt.

    Yields:
        The list of findings, each kind of it once per kernel and parameter; it grows as kernels run.

    Raises:
        UnsupportedError: kernels are compiled here, not interpreted.
    """
    interpreter = _interpreter()
    builder = interpreter.interpreter_builder
    kind, executor = type(builder), interpreter.GridExecutor
    load, store, run = kind.create_masked_load, kind.create_masked_store, executor.__call__
    watch = _Watch(inputs)

    def numbers(mask: Any, pointers: np.ndarray) -> np.ndarray:
        here: np.ndarray = np.broadcast_to(mask.data, pointers.shape).reshape(-1)
        x, y, z = builder.grid_idx
        _, rows, planes = builder.grid_dim
        watch.program = (x * rows + y) * planes + z
        return here

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        where = np.asarray(pointers.data)
        watch.load(where.reshape(-1)[numbers(mask, where)].astype(np.int64))
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        where = np.asarray(pointers.data)
        here = numbers(mask, where)
        values = np.broadcast_to(np.asarray(value.data), where.shape).reshape(-1)
        watch.store(where.reshape(-1)[here].astype(np.int64), values[here])
        return store(self, pointers, value, mask, *rest)

    def barrier(self: Any, *rest: Any) -> None:
        watch.epoch += 1

    def call(self: Any, *args: Any, **named: Any) -> Any:
        given = itertools.chain(zip(self.arg_names, args, strict=False), named.items())
        watch.launch(self.fn.__name__, ((n, x) for n, x in given if isinstance(x, Tensor)))
        return run(self, *args, **named)

    with (
        mock.patch.object(kind, "create_masked_load", masked_load),
        mock.patch.object(kind, "create_masked_store", masked_store),
        mock.patch.object(kind, "create_barrier", barrier),
        mock.patch.object(executor, "__call__", call),
    ):
        yield watch.findings


@contextlib.contextmanager
def products_in_one_order() -> Iterator[None]:
    """Let a product of tiles have the same bits whatever its tile and whichever side is transposed.

    On a device the terms of an element are added in the order of the inner axis. The interpreter leaves the
    order to a matrix library, which chooses it by shape; here sums are rounded once, from float64.
    """
    interpreter = _interpreter()
    kind = type(interpreter.interpreter_builder)
    dot = kind.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype not in (np.float16, np.float32):
            return dot(self, a, b, d, *rest)
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    with mock.patch.object(kind, "create_dot", create_dot):
        yield


def _interpreter() -> Any:
    from bratune.kernels.fused.call import INTERPRETING

    if not INTERPRETING:
        raise UnsupportedError("triton", ("kernels are compiled; TRITON_INTERPRET=1 has them interpreted",))
    from triton.runtime import interpreter

    return interpreter
