"""Backends that fail, each in one way: what a trial engine has to survive, for its tests and for doctor.

They are no part of the registry. A process finds them through the entry-point group of other packages:
`install` writes a package description into a folder, and that folder goes onto ``sys.path``.

Every fault computes like ``reference`` but for one thing, so that nothing else is in the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bratune.backend import Config
from bratune.kernels.reference import ReferenceBackend
from bratune.problem import Problem

__all__ = ["CHEATS", "FAULTS", "install"]


class _Fault(ReferenceBackend):
    """The reference, with something before it, in its place or after it."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        self.misbehave(q)
        out = super().forward(q, k, v, routes, self.understood(problem), config)
        return self.answer(out, q, k, problem)

    def misbehave(self, q: Tensor) -> None:
        """What is done before."""

    def understood(self, problem: Problem) -> Problem:
        """What is computed instead of what was asked."""
        return problem

    def answer(self, out: Tensor, q: Tensor, k: Tensor, problem: Problem) -> Tensor:
        """What is returned instead of the result."""
        return out


class Hang(_Fault):
    """Never returns."""

    name = "fault-hang"

    def misbehave(self, q: Tensor) -> None:
        """Sleep for a day."""
        time.sleep(86_400)


class HangHoldingTheLock(_Fault):
    """Never returns from C code that holds the interpreter's lock: no thread of the process runs."""

    name = "fault-hang-in-c"

    def misbehave(self, q: Tensor) -> None:
        """Sleep in libc without releasing the lock."""
        ctypes.PyDLL(None).sleep(86_400)


class Segfault(_Fault):
    """Reads memory that is not there."""

    name = "fault-segfault"

    def misbehave(self, q: Tensor) -> None:
        """Follow a null pointer."""
        ctypes.string_at(0)


class Abort(_Fault):
    """Ends by abort, as a failed assertion in C++ does."""

    name = "fault-abort"

    def misbehave(self, q: Tensor) -> None:
        """Raise SIGABRT."""
        os.abort()


class Exit(_Fault):
    """Leaves the process as if all were well: exit status 0."""

    name = "fault-exit"

    def misbehave(self, q: Tensor) -> None:
        """Skip every handler."""
        os._exit(0)


class Leak(_Fault):
    """Keeps 16 MB of every call."""

    name = "fault-leak"
    kept: list[Tensor]

    def __init__(self) -> None:
        self.kept = []

    def misbehave(self, q: Tensor) -> None:
        """Hold on to what was allocated."""
        self.kept.append(torch.zeros(4_000_000, dtype=torch.float32, device=q.device))


class ExhaustMemory(_Fault):
    """Asks for more memory than any machine has."""

    name = "fault-exhaust"

    def misbehave(self, q: Tensor) -> None:
        """Allocate until it is refused."""
        kept = []
        for power in range(30, 60):
            kept.append(torch.empty(1 << power, dtype=torch.uint8, device=q.device))


class OutOfRange(_Fault):
    """Reads past the end of a tensor: on CUDA an assertion on the device, after which its context is lost."""

    name = "fault-index"

    def misbehave(self, q: Tensor) -> None:
        """Index far beyond the last element."""
        q.flatten()[torch.tensor([1 << 40], device=q.device)]


class Raise(_Fault):
    """Raises."""

    name = "fault-raise"

    def misbehave(self, q: Tensor) -> None:
        """Fail as Python code fails."""
        raise RuntimeError("this backend always raises")


class Garbage(_Fault):
    """Prints a lot, among it what looks like a result, and is otherwise right."""

    name = "fault-garbage"

    def misbehave(self, q: Tensor) -> None:
        """Write to both standard streams, through Python and past it."""
        line = '{"status": "ok", "value": {"median_ms": 0.0}}\n'
        for _ in range(200):
            sys.stdout.write(line)
        sys.stdout.flush()
        for fd in (1, 2):
            os.write(fd, b"\x00\xff garbage \n" * 200)


class Fork(_Fault):
    """Leaves a copy of the process behind that runs on, and a child in a session of its own."""

    name = "fault-fork"
    done = False

    def misbehave(self, q: Tensor) -> None:
        """Fork twice, in the first call only; the parent goes on and is right."""
        if self.done:
            return
        self.done = True
        if os.fork() == 0:
            return  # the copy goes on as if it were the worker
        if os.fork() == 0:
            with contextlib.suppress(OSError):
                os.setsid()
            time.sleep(86_400)


class NotANumber(_Fault):
    """One value in the output is NaN."""

    name = "fault-nan"

    def answer(self, out: Tensor, q: Tensor, k: Tensor, problem: Problem) -> Tensor:
        """The right result with its last value spoilt."""
        out = out.clone()
        out[-1, -1, -1, -1] = float("nan")
        return out


class WrongNumbers(_Fault):
    """Forgets the scale of the logits."""

    name = "fault-wrong"

    def understood(self, problem: Problem) -> Problem:
        """A problem whose map is plausible, and not the right one."""
        return problem.replace(scale=1.0)


class _Cheat(_Fault):
    """The reference where it is looked at once, something else where it is not."""

    calls = 0

    def answer(self, out: Tensor, q: Tensor, k: Tensor, problem: Problem) -> Tensor:
        """The result, or zeros."""
        self.calls += 1
        return torch.zeros_like(out) if self.is_off(q, k, problem) else out

    def is_off(self, q: Tensor, k: Tensor, problem: Problem) -> bool:
        """Whether this call is one that gives zeros."""
        raise NotImplementedError


class SecondCall(_Cheat):
    """Right in its first call only."""

    name = "cheat-second-call"

    def is_off(self, q: Tensor, k: Tensor, problem: Problem) -> bool:
        """From the second call on."""
        return self.calls > 1


class OneInFive(_Cheat):
    """Wrong in every fifth call."""

    name = "cheat-one-in-five"

    def is_off(self, q: Tensor, k: Tensor, problem: Problem) -> bool:
        """Every fifth."""
        return self.calls % 5 == 0


class ManyCalls(_Cheat):
    """Right until nobody should be looking any more."""

    name = "cheat-many-calls"

    def is_off(self, q: Tensor, k: Tensor, problem: Problem) -> bool:
        """After ten calls."""
        return self.calls > 10


class Contiguous(_Cheat):
    """Wrong for contiguous queries."""

    name = "cheat-contiguous"

    def is_off(self, q: Tensor, k: Tensor, problem: Problem) -> bool:
        """Where q is contiguous."""
        return q.is_contiguous()


class LargeLogits(_Fault):
    """Takes exponentials without subtracting the largest logit, as far as the result shows it."""

    name = "cheat-large-logits"

    def answer(self, out: Tensor, q: Tensor, k: Tensor, problem: Problem) -> Tensor:
        """Infinite where an exponential would overflow."""
        limit = q.abs().amax() * k.abs().amax() * problem.scale * problem.head_dim
        return out * float("inf") if limit > 80 else out


class ByPointer(_Fault):
    """Remembers the result by the address of the queries."""

    name = "cheat-by-pointer"
    known: dict[int, Tensor]

    def __init__(self) -> None:
        self.known = {}

    def answer(self, out: Tensor, q: Tensor, k: Tensor, problem: Problem) -> Tensor:
        """What was at this address before."""
        return self.known.setdefault(q.data_ptr(), out)


class _LazyTensor(Tensor):
    """A tensor that could put its work off."""


class Lazy(_Fault):
    """Returns a subclass of Tensor."""

    name = "cheat-lazy"

    def answer(self, out: Tensor, q: Tensor, k: Tensor, problem: Problem) -> Tensor:
        """The right numbers, in what is no plain tensor."""
        return out.as_subclass(_LazyTensor)


class LeaveState(_Fault):
    """Leaves the process with one thread, lower precision and a clock that runs slow."""

    name = "cheat-state"

    def misbehave(self, q: Tensor) -> None:
        """Change what all cells of a process share."""
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("medium")
        torch.set_flush_denormal(True)
        torch.set_default_dtype(torch.float64)
        real = time.perf_counter_ns
        time.perf_counter_ns = lambda: real() // 10


# Backends that are right where one looks once: the gate catches them. The last one is right, and changes
# what all cells of its process share.
CHEATS = (SecondCall, OneInFive, ManyCalls, Contiguous, LargeLogits, ByPointer, Lazy, LeaveState)

FAULTS = (
    Hang,
    HangHoldingTheLock,
    Segfault,
    Abort,
    Exit,
    Leak,
    ExhaustMemory,
    OutOfRange,
    Raise,
    Garbage,
    Fork,
    NotANumber,
    WrongNumbers,
)


def install(folder: Path) -> None:
    """Describe the faults as a package in a folder, so that a process with it on ``sys.path`` has them.

    Args:
        folder: An existing folder.
    """
    info = folder / "bratune_faults-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bratune-faults\nVersion: 1.0\n")
    lines = [f"{fault.name} = {fault.__module__}:{fault.__name__}" for fault in (*FAULTS, *CHEATS)]
    (info / "entry_points.txt").write_text("[bratune.backends]\n" + "\n".join(lines) + "\n")
