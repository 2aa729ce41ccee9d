"""Processes that tests start, without the seconds that imports take: forks of one that has them behind it.

Torch, pandas, optuna and this package take three seconds of a core to import, and tests start a hundred
processes that do. Within `forks` a `subprocess.Popen` of this Python with ``-m`` or ``-c`` is a fork of a
server that has imported them and has run nothing. It is a process of its own, with its own id, session,
environment, working folder, files and memory, a child of whoever started it; so are those that it starts.

What it does not show is how an interpreter begins: tests of what is imported, of how long that takes, of
options of Python and of what libraries read from the environment while they are loaded start real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["forks"]

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("torch", "pandas", "optuna", "bratune.cli.profile", "bratune.cli.tune", "bratune.run.isolated")
# /proc shows the environment that a process began with, and those who end its family look there: what a fork
# has instead is written over it, and may be as long.
_ROOM = "BRATUNE_TESTS_ROOM"
_ROOM_BYTES = 1 << 15
# Of <linux/prctl.h>.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None)


@contextlib.contextmanager
def forks() -> Iterator[None]:
    """Within it, processes of this Python are forks of the server, which the first use starts."""
    before = subprocess.Popen
    _install(_server())
    try:
        yield
    finally:
        subprocess.Popen = before  # type: ignore[misc]


@functools.cache
def _server() -> _Server:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OPENBLAS_NUM_THREADS": "1",  # its threads would be started by the import, and lost in forks
                _ROOM: "x" * _ROOM_BYTES,
            },
        )
    if ours.recv(16) != b"ready":
        raise RuntimeError("the server of forks ended while it was starting")
    server = _Server(ours)
    atexit.register(server.close, process)
    return server


class _Server:
    """Where forks are asked for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def spawn(self, request: Mapping[str, Any], fds: Sequence[int]) -> int:
        """The id of a new child of this process, with the files in the places that the request names."""
        with self._lock, os.fdopen(os.memfd_create("request"), "wb", buffering=0) as message:
            message.write(json.dumps(request).encode())
            # It is born an orphan, and given to the nearest of its forebears that takes orphans.
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._connection, [b"fork"], [message.fileno(), *fds])
                return int(self._connection.recv(16))
            finally:
                _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def close(self, process: subprocess.Popen[bytes]) -> None:
        """Let a server end, and wait for it."""
        self._connection.close()
        process.wait()


def _install(server: _Server) -> None:
    """Put forks of a server in the place of new interpreters, in this process."""

    class Forked(subprocess.Popen[Any]):
        def _execute_child(self, args: Any, *given: Any) -> None:
            executable, preexec_fn, _, pass_fds, cwd, env, _, _, shell, *rest = given
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, new_session, *_ = rest
            parent: Any = super()
            python = not isinstance(args, str) and args[0] == sys.executable and args[1] in ("-m", "-c")
            if not python or executable or preexec_fn or shell:
                parent._execute_child(args, *given)
                return
            streams = zip((p2cread, c2pwrite, errwrite), range(3), strict=True)
            request = {
                "words": [*map(str, args[1:])],
                "environment": dict(os.environ if env is None else env),
                "folder": str(cwd or os.getcwd()),
                "places": [0, 1, 2, *pass_fds],
                "session": bool(new_session),
            }
            self.pid = server.spawn(request, [*(own if fd == -1 else fd for fd, own in streams), *pass_fds])
            self._child_created = True
            parent._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    subprocess.Popen = Forked  # type: ignore[misc]


# --- the server's side ---------------------------------------------------------------------------


def main(connection: socket.socket) -> None:
    """Import, fork for whoever asks, and in the forks run what was asked for."""
    del sys.path[0]  # this folder
    path = sys.path[1:]  # without PYTHONPATH
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    connection.send(b"ready")
    while True:
        words = _become(_fork_for(connection), path)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():  # this is the process that was asked for, with a server of its own
            theirs.close()
            _install(_Server(ours))
            break
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        ours.close()
        # Whoever reads what that process says waits for its end, not for ours.
        os.closerange(0, theirs.fileno())
        os.closerange(theirs.fileno() + 1, 4096)
        for _ in range(3):
            os.open(os.devnull, os.O_RDWR)
        connection = theirs
    _run(words)


def _fork_for(connection: socket.socket) -> list[int]:
    """Fork for every request; returns in the forks, with the files that came with it."""
    while True:
        asked, fds, _, _ = socket.recv_fds(connection, 16, 253)
        if not asked:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if not between:
            middle = os.getpid()
            if child := os.fork():
                os.write(tell, str(child).encode())
                os._exit(0)
            os.close(told)
            os.close(tell)
            connection.close()
            while os.getppid() == middle:
                os.sched_yield()
            return fds
        os.waitpid(between, 0)  # now the child has its parent
        connection.send(os.read(told, 16))
        for fd in (told, tell, *fds):
            os.close(fd)


def _become(fds: Sequence[int], path: Sequence[str]) -> list[str]:
    """Take the place of a new interpreter: files, environment, folder, session; returns its words."""
    message, *given = fds
    request = json.loads(os.pread(message, os.fstat(message).st_size, 0))
    places = request["places"]
    apart = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(places) + 1) for fd in given]
    for fd in fds:
        os.close(fd)
    for fd, place in zip(apart, places, strict=True):
        os.dup2(fd, place)
        os.close(fd)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(request["environment"])
    _show_environment()
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted != threads:  # it was read when torch was loaded
        importlib.import_module("torch").set_num_threads(int(wanted))
    os.chdir(request["folder"])
    if request["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words: list[str] = request["words"]
    first = request["folder"] if words[0] == "-m" else ""
    more = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *more, *path]
    importlib.invalidate_caches()
    return words


def _show_environment() -> None:
    """Write the environment over the one that this process began with; no library points there any more."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    entries = sorted(os.environ.items(), key=lambda entry: not entry[0].startswith("BRATUNE"))
    block = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in entries)
    assert len(block) <= end - start, "the environment of a test is longer than the room for it"
    ctypes.memmove(start, block.ljust(end - start, b"\0"), end - start)


def _run(words: Sequence[str]) -> None:
    kind, what, *more = words
    if kind == "-m":
        sys.argv = [what, *more]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    sys.argv = ["-c", *more]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), module.__dict__)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
