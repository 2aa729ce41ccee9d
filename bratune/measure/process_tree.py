"""Ending a process and everything that it started, also what moved away from its session."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

__all__ = ["TOKEN_VARIABLE", "family", "kill_tree"]

# Every descendant inherits it, whatever session or parent it moves to.
TOKEN_VARIABLE = "BRATUNE_WORKER"
_ROUNDS = 10


def family(token: str) -> set[int]:
    """Ids of the processes whose environment carries the token."""
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
    return found


def kill_tree(pid: int, token: str) -> None:
    """Kill a session leader that was not waited for yet, its session and its family; never the caller.

    Args:
        pid: The session leader; its process group has the same number.
        token: Value of `TOKEN_VARIABLE` in the environment of the family.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    # A fork may be under way while the family is read, hence more than one look.
    for _ in range(_ROUNDS):
        alive = {member for member in family(token) if member not in (os.getpid(), pid)}
        if not alive:
            return
        for member in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
