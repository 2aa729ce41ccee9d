"""Worker: a long-lived child process that runs jobs and is allowed to die.

A job is named ``module:function``; the function takes and returns plain data (JSON). Whatever happens to
the child, the caller gets a `JobOutcome`: hang, segfault, lost device and exhausted memory are outcomes with
a reason, and the next job finds a fresh child.

    >>> with Worker(preload=("torch",)) as worker:
    ...     outcome = worker.run("package.module:function", {"n": 3}, limit_s=30)
    >>> outcome.status, outcome.value

The parent sleeps in ``select`` until something happens, so that it takes no cycles from a child whose
launches are being timed. Results travel on a descriptor of their own: what the child prints cannot be
mistaken for one. The child and everything that it starts die with it, and with the parent.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from bratune.errors import MeasureError
from bratune.measure.process_tree import TOKEN_VARIABLE, kill_tree

__all__ = ["JobOutcome", "Worker"]

# Importing torch and creating a CUDA context on a cold disk has been seen to take most of a minute.
_START_LIMIT_S = 180.0
# How often a child is started that is killed while it starts: what did that may pass.
_STARTS = 3
_TAIL_BYTES = 16_384
# Of what a child said, so much stands in a reason.
_TOLD = 500
# How often a child is looked at that the system cannot watch.
_LOOK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """What became of a job.

    Attributes:
        status: ``ok``, ``error`` (the job raised), ``oom``, ``timeout`` or ``crashed`` (the child died or
            lost its device).
        value: What the job returned, when ok.
        reason: One sentence, when not ok.
        error: Class name of what the job raised, when it did.
        seconds: Wall time of the job, without starting a child.
        retried: The job had failed in a used child and ran again in a clean one.
        output: The last that the child printed.
    """

    status: str
    value: Any = None
    reason: str = ""
    error: str = ""
    seconds: float = 0.0
    retried: bool = False
    output: str = field(default="", repr=False)

    @property
    def ok(self) -> bool:
        """Whether the job returned."""
        return self.status == "ok"


class Worker:
    """A child process that is started when needed and replaced when broken.

    Args:
        env: Variables added to the child's environment, e.g. ``CUDA_VISIBLE_DEVICES``.
        preload: Modules to import before the first job, outside its time limit.
        memory_limit_bytes: Most private memory of the child (``RLIMIT_DATA``): a job that asks for more gets
            an ``oom`` instead of the whole machine. Not for CUDA, which reserves address space freely.

    Raises:
        MeasureError: this operating system is not Linux.
    """

    def __init__(
        self,
        *,
        env: Mapping[str, str] | None = None,
        preload: Iterable[str] = (),
        memory_limit_bytes: int | None = None,
    ) -> None:
        if not hasattr(os, "pidfd_open"):
            raise MeasureError("isolation needs Linux; --no-isolate measures in this process")
        self._env = dict(env or {})
        self._hello = {
            "path": sys.path,
            "preload": list(preload),
            "memory_limit_bytes": memory_limit_bytes,
        }
        self._child: _Child | None = None
        self._interrupted = False

    @property
    def pid(self) -> int | None:
        """Process id of the child; None when there is none."""
        return self._child.process.pid if self._child else None

    def run(self, job: str, payload: Any, *, limit_s: float, retry: bool = True) -> JobOutcome:
        """Run a job and wait for it.

        A job that runs out of memory or kills a child that other jobs used before is run once more in a
        clean one: what they left behind is not its fault.

        Args:
            job: ``module:function``.
            payload: Argument of the function, plain data.
            limit_s: Most wall time in seconds; then the child and all that it started are killed.
            retry: Run it once more as above; not where it builds on jobs before it.

        Raises:
            MeasureError: no child can be started.
        """
        used = retry and self._child is not None and self._child.jobs > 0
        outcome = self._run_once(job, payload, limit_s)
        if used and outcome.status in ("oom", "crashed") and not self._interrupted:
            outcome = replace(self._run_once(job, payload, limit_s), retried=True)
        return outcome

    def interrupt(self) -> None:
        """Kill the child in the middle of a job, from another thread than the one that waits for it.

        That thread gets ``crashed``.
        """
        self._interrupted = True
        child = self._child
        if child is not None:
            kill_tree(child.process.pid, child.token)

    def close(self) -> None:
        """Kill the child, if there is one, and everything that it started."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_once(self, job: str, payload: Any, limit_s: float) -> JobOutcome:
        child = self._living_child()
        start = time.monotonic()
        child.jobs += 1
        try:
            child.send({"job": job, "payload": payload})
            reply = child.receive(limit_s)
        except TimeoutError:
            reply = {"status": "timeout", "reason": f"no result within {limit_s:g} s; the worker was killed"}
        except (EOFError, OSError):
            reply = {"status": "crashed", "reason": child.cause_of_death()}
        except BaseException:  # Ctrl-C: the child is in the middle of a job and cannot be used again
            self.close()
            raise
        outcome = JobOutcome(**reply, seconds=time.monotonic() - start, output=child.output)
        if outcome.status in ("oom", "timeout", "crashed"):
            self.close()
        return outcome

    def _living_child(self) -> _Child:
        if self._child is not None and self._child.process.poll() is not None:
            self.close()
        why, starts = "", 0
        while self._child is None:
            starts += 1
            child = self._child = _Child(self._env)
            try:
                child.send(self._hello)
                child.receive(_START_LIMIT_S)
                return child
            except TimeoutError:
                why = f"it did not answer within {_START_LIMIT_S:g} s"
            except (EOFError, OSError):
                why = child.cause_of_death()
            except BaseException:
                self.close()
                raise
            killed = (child.process.poll() or 0) < 0
            said = " ".join(child.output.split())[-_TOLD:]
            why += f"; it said: {said}" if said else "; it said nothing"
            self.close()
            if not killed or starts == _STARTS or self._interrupted:
                times = f", {starts} times" if starts > 1 else ""
                raise MeasureError(f"a worker process cannot be started{times}: {why}")
        return self._child


class _Child:
    """One process, the three pipes to it and what it printed."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.jobs = 0
        self.token = uuid.uuid4().hex
        self._tail = bytearray()
        self._buffer = bytearray()
        requests_read, self._requests = os.pipe()
        self._results, results_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        theirs = (requests_read, results_write, lifeline_read)
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bratune.measure.worker_child", *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=theirs,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, **env, TOKEN_VARIABLE: self.token},
            )
        finally:
            for fd in theirs:
                os.close(fd)
        assert self.process.stdout is not None
        self._output = self.process.stdout.fileno()
        self._watch = _watch(self.process.pid)
        self._selector = selectors.DefaultSelector()
        for fd in (self._results, self._output, *self._watch):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)

    @property
    def output(self) -> str:
        """The last that the child printed."""
        return self._tail.decode(errors="replace")

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message; raises OSError when the child is gone."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._requests, data) :]

    def receive(self, limit_s: float) -> dict[str, Any]:
        """Wait for one message; raises TimeoutError, or EOFError when the child died."""
        deadline = time.monotonic() + limit_s
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                message = json.loads(line)
                assert isinstance(message, dict)
                return message
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            dead = not self._watch and self.process.poll() is not None  # asked before what it wrote is read
            patience = remaining if self._watch else min(remaining, 0.0 if dead else _LOOK_S)
            ready = {key.fd for key, _ in self._selector.select(patience)}
            if self._output in ready:
                self._tail = (self._tail + self._read(self._output))[-_TAIL_BYTES:]
            if self._results in ready:
                self._buffer += self._read(self._results)
            elif dead or ready & set(self._watch):  # and no result is left to read
                raise EOFError

    def cause_of_death(self) -> str:
        """How the child ended, and where in Python it was, if it could still say so."""
        code = self.process.wait()
        if code >= 0:
            return f"the worker ended by itself with exit status {code}"
        text = f"the worker was killed by signal {-code} ({_signal_name(-code)})"
        where = re.search(
            r'thread [^\n]*most recent call first\):\n  File "([^"]+)", line (\d+) in (\S+)', self.output
        )
        if where:
            text += f" in {where[3]} ({os.path.basename(where[1])}, line {where[2]})"
        if -code == signal.SIGKILL:
            text += "; the system does that when memory runs out"
        return text

    def kill(self) -> None:
        """End the child and all that it started, and release the pipes."""
        kill_tree(self.process.pid, self.token)
        self.process.wait()
        self._selector.close()
        if self.process.stdout is not None:
            self.process.stdout.close()
        for fd in (self._requests, self._results, self._lifeline, *self._watch):
            os.close(fd)

    def _read(self, fd: int) -> bytes:
        """What a readable pipe holds; one whose writers are all gone is not waited for any longer."""
        data = os.read(fd, 1 << 16)
        if not data:
            self._selector.unregister(fd)
        return data


def _watch(pid: int) -> tuple[int, ...]:
    """What becomes readable when a process ends; nothing where the system, as in a sandbox, cannot say."""
    try:
        return (os.pidfd_open(pid),)
    except OSError:
        return ()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
