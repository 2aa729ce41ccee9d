"""The child's side of `bratune.measure.worker`: read a job, run it, write its outcome, again."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from bratune.measure.process_tree import TOKEN_VARIABLE, kill_tree

# What libraries say when memory runs out without raising a class of its own.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_LONGEST_REASON = 600


def main(requests_fd: int, results_fd: int, lifeline_fd: int) -> None:
    """Serve until the parent goes away.

    Args:
        requests_fd: Messages of the parent, one JSON line each; the first says how to set up.
        results_fd: Replies, one JSON line each.
        lifeline_fd: Held open by the parent and never written; its end is the parent's end.
    """
    _start_guard(lifeline_fd)
    for fd in (requests_fd, results_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.enable()
    own_pid = os.getpid()
    with os.fdopen(requests_fd, "rb") as requests, os.fdopen(results_fd, "wb") as results:
        _set_up(json.loads(requests.readline()))
        _write(results, {"status": "ok"})
        for line in requests:
            reply = _answer(json.loads(line))
            if os.getpid() != own_pid:  # a copy that the job forked and let run on: it answers for nobody
                os._exit(0)
            _write(results, reply)
            _tidy()


def _start_guard(lifeline_fd: int) -> None:
    """Fork a small process that kills the whole family once the parent is gone.

    A separate process, because a job that hangs inside a library may hold the interpreter's lock, and no
    thread of this process would run.
    """
    leader = os.getpid()
    if os.fork():
        return
    # The pipes are the worker's: holding them would hide its end from the parent.
    os.closerange(0, lifeline_fd)
    os.closerange(lifeline_fd + 1, 1024)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(lifeline_fd, 1):
        pass
    kill_tree_as_member(leader)


def kill_tree_as_member(leader: int) -> None:
    """Kill the family that this process belongs to, and end this process."""
    os.setsid()  # out of the leader's group, which dies first
    kill_tree(leader, os.environ[TOKEN_VARIABLE])
    os._exit(0)


def _set_up(hello: Mapping[str, Any]) -> None:
    sys.path[:] = hello["path"]
    limit = hello["memory_limit_bytes"]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    for name in hello["preload"]:
        importlib.import_module(name)
    # Modules stay: neither the collector nor who looks for live tensors need go through them again.
    gc.collect()
    gc.freeze()


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one job; whatever it raises becomes a reply."""
    try:
        module, _, function = str(request["job"]).partition(":")
        value = getattr(importlib.import_module(module), function)(request["payload"])
        _synchronize()
        json.dumps(value)
    except BaseException as error:  # SystemExit and KeyboardInterrupt of a job are outcomes too
        return _failure(error)
    return {"status": "ok", "value": value}


def _failure(error: BaseException) -> dict[str, Any]:
    text = " ".join(str(error).split()) or type(error).__name__
    reply = {"status": "error", "error": type(error).__name__, "reason": text[:_LONGEST_REASON]}
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _lowered()):
        return reply | {"status": "oom"}
    try:
        _synchronize()
    except Exception as lost:  # an earlier error of the device comes back at every call: the context is lost
        text = " ".join(str(lost).split())
        return reply | {"status": "crashed", "reason": f"the device is lost: {text[:_LONGEST_REASON]}"}
    return reply


def _lowered() -> tuple[str, ...]:
    return tuple(words.lower() for words in _OUT_OF_MEMORY)


def _synchronize() -> None:
    """Wait for the device, if a job used one: errors of kernels show up only here."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _tidy() -> None:
    """Give back what the job left, so that the next one finds the memory that it would find alone."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _write(results: BinaryIO, reply: Mapping[str, Any]) -> None:
    results.write(json.dumps(reply).encode() + b"\n")
    results.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
