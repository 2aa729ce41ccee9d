"""Run Triton kernels without a GPU as they were compiled for one: their machine-level code, step by step.

Triton's interpreter runs the source of a kernel; what the compiler makes of it (layouts, shared memory,
barriers, asynchronous copies, bfloat16) it never sees. Inside `executed` a launch compiles the kernel for a
target and executes the PTX on the CPU tensors it was given (`bratune.testing.ptx_machine`)::

    with executed("sm80") as findings:
        out = TritonBackend().forward(q, k, v, routes, problem)
    assert not findings
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bratune.errors import UnsupportedError
from bratune.predict.compile import Launch, record_launches
from bratune.predict.offline import machine_of
from bratune.testing.ptx import Program, parse
from bratune.testing.ptx_machine import PtxMachine, granule
from bratune.testing.ptx_memory import Global, Segment
from bratune.testing.sanitizer import Violation

__all__ = ["TARGETS", "Findings", "executed"]

# Targets whose instructions the machine knows.
TARGETS = ("sm80", "sm90")


class Findings(list[Violation]):
    """What was found, each kind of it once per kernel and place; and how much was executed.

    Attributes:
        launches: Kernels that were executed.
        instructions: Instructions that their warps executed.
    """

    launches: int = 0
    instructions: int = 0


@dataclass
class _Executor:
    findings: Findings
    change: Callable[[Program], Program]
    machines: dict[str, PtxMachine] = field(default_factory=dict)
    seen: set[tuple[str, str, str]] = field(default_factory=set)

    def run(self, launch: Launch, arguments: tuple[tuple[str, Any], ...]) -> None:
        text = launch.asm["ptx"]
        if text not in self.machines:
            self.machines[text] = PtxMachine(
                self.change(parse(text)), warps=launch.num_warps, shared_bytes=launch.metadata_shared
            )
        machine = self.machines[text]
        bits = [_bits(value) for _, value in arguments]
        # Behind the arguments stand pointers to scratch memory, which these kernels have none of.
        bits += [0] * (len(machine.program.parameters) - len(bits))
        memory = Global(_segments(arguments, granule(machine.program, "global")))

        def note(what: str, where: str, count: int) -> None:
            if count and (launch.kernel, what, where) not in self.seen:
                self.seen.add((launch.kernel, what, where))
                self.findings.append(Violation(launch.kernel, what, where, count))

        self.findings.launches += 1
        self.findings.instructions += machine.run(launch.grid, bits, memory, note)


@contextlib.contextmanager
def executed(
    target: str = "sm80", *, change: Callable[[Program], Program] = lambda program: program
) -> Iterator[Findings]:
    """Execute every kernel that is launched in a ``with`` block, on tensors of the CPU.

    Not for several threads at once: Triton has one active driver.

    Args:
        target: What kernels are compiled for, one of `TARGETS`; launch settings are those of its table.
        change: What to execute in the place of a kernel: for planting faults.

    Yields:
        The findings; the list grows as kernels run.

    Raises:
        UnsupportedError: the machine does not know what kernels for this target consist of.
        UsageError: the process interprets Triton instead of compiling.
    """
    if target not in TARGETS:
        raise UnsupportedError("the PTX executor", (f"it executes {', '.join(TARGETS)}, not {target}",))
    from bratune.kernels.fused import ops, run

    executor = _Executor(Findings(), change)
    with (
        mock.patch.object(run, "_on_device_of", return_value=contextlib.nullcontext()),
        mock.patch.object(ops, "_machine", return_value=machine_of(target)),
        record_launches(target, executor.run),
    ):
        yield executor.findings


def _bits(value: Any) -> int:
    """An argument as the bits of its parameter."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return int(value) & (1 << 64) - 1


def _segments(arguments: tuple[tuple[str, Any], ...], piece: int) -> dict[int, Segment]:
    """The storages of all tensors by address; what their views leave out is out of bounds."""
    found: dict[int, Segment] = {}
    for name, x in arguments:
        if not isinstance(x, Tensor) or x.numel() == 0:
            continue
        storage = x.untyped_storage()
        base, size = storage.data_ptr(), storage.nbytes()
        if base not in found:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
            found[base] = Segment(name, data, np.zeros(size, bool), piece)
        else:
            found[base].name += f"+{name}"
        element = x.element_size()
        places = torch.arange(size // element).as_strided(x.shape, x.stride(), x.storage_offset())
        given = found[base].given[: size // element * element].reshape(-1, element)
        given[places.reshape(-1).numpy()] = True
    return found
