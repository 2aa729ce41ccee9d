"""Where studies live: SQLite for one process, a journal file for a host, PostgreSQL for many hosts.

SQLite is for one process at a time, and a second one is refused: two can pop the same waiting trial, and then
one of them dies. A journal is mended before every line, because a worker may have died in the middle of one.
A database that goes away, as in a restart, is waited for.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from bratune.errors import MissingPackageError, StoreError, UsageError
from bratune.files import BINARY, lock, read_at

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

__all__ = ["SAMPLERS", "make_sampler", "masked", "open_storage", "serves_several", "without_password"]

SAMPLERS = ("tpe", "nsga2", "gp", "random", "brute")

# How long a storage that went away is waited for before the run ends; what was measured is in the records.
_PATIENCE_S = 600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
# What a disk that is slow, or behind a network, says for a while.
_PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "ENOLCK", "EREMOTEIO")
    if hasattr(errno, name)  # the last is Linux's
}


def serves_several(url: str) -> bool:
    """Whether several processes may share the storage."""
    return not url.startswith("sqlite:")


def open_storage(url: str) -> BaseStorage:
    """The Optuna storage behind a URL.

    Args:
        url: ``sqlite:///FILE``, ``journal:///FILE`` or ``postgresql://USER:PASSWORD@HOST/DATABASE``.

    Raises:
        UsageError: the URL is none of these.
        StoreError: the storage cannot be opened.
        MissingPackageError: PostgreSQL was asked for and its driver is not installed.
    """
    kind, _, rest = url.partition("://")
    try:
        if kind == "journal" and rest.strip("/"):
            return _journal(Path(rest if rest.startswith("//") else "/" + rest.lstrip("/")))
        if kind == "sqlite" and rest.strip("/"):
            path = Path(rest.removeprefix("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            _keep_others_out(path)
            return _fast_sqlite(url)
        if kind in ("postgresql", "postgres"):
            return _database(f"postgresql+psycopg://{rest}")  # one driver, whatever SQLAlchemy defaults to
        if kind.startswith("postgresql+"):
            return _database(url)
    except ImportError:
        if not kind.startswith("postgres"):
            raise
        raise MissingPackageError("psycopg", "a study in PostgreSQL", extra="postgres") from None
    except StoreError:
        raise
    except Exception as error:  # every database has error types of its own
        text = without_password(str(error).strip(), url)
        first = text.splitlines()[0] if text else type(error).__name__
        raise StoreError(f"the study storage {without_password(url)} cannot be opened: {first}") from None
    raise UsageError(
        f"storage {without_password(url)!r} is not known; sqlite:///FILE, journal:///FILE "
        "and postgresql://USER:PASSWORD@HOST/DATABASE are"
    )


_LOGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^:/@\s]*):(?P<password>[^/\s]*)@", re.IGNORECASE
)
_TELLING = 4
_KEYWORD = re.compile(r"(?P<name>[?&\s]password=)[^&\s]+", re.IGNORECASE)


def without_password(text: str, url: str = "") -> str:
    """A text without the passwords of URLs in it: ``postgresql://me@host/db``.

    Args:
        text: Anything: a URL, a command, the message of a library.
        url: A URL whose password shall go wherever it stands, also outside of a URL.
    """
    if found := _LOGIN.search(url):
        password = found["password"]
        # A library that splits a URL elsewhere shows what follows an @ in a password as the host.
        parts = {part for part in password.split("@") if len(part) >= _TELLING}
        for secret in sorted({password, unquote(password), *parts} - {""}, key=len, reverse=True):
            text = text.replace(secret, "***")
    return _KEYWORD.sub(r"\g<name>***", _LOGIN.sub(r"\g<scheme>\g<user>@", text))


def masked(text: str) -> str:
    """A text of the same length, with stars in the place of the passwords of URLs."""
    text = _LOGIN.sub(lambda f: f"{f['scheme']}{f['user']}:{'*' * len(f['password'])}@", text)
    return _KEYWORD.sub(lambda f: f["name"] + "*" * (len(f[0]) - len(f["name"])), text)


# --- one process: SQLite ----------------------------------------------------------------------

# Locks of SQLite files that this process holds until it ends, by process (a fork holds none) and file.
_HELD: dict[tuple[int, str], int] = {}


def _keep_others_out(path: Path) -> None:
    """Hold a study's file for this process; raises `StoreError` where another one has it."""
    key = os.getpid(), str(path.resolve())
    if key in _HELD:
        return
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        lock(fd, wait=False)
    except BlockingIOError:
        other = read_at(fd, 100, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StoreError(
            f"another process (pid {other}) works on the study {path}, and SQLite serves one at a time; "
            "wait for its end, or start both with --storage journal:///FILE"
        ) from None
    except OSError:  # no locks here: as safe as SQLite itself is on such a file system
        os.close(fd)
        return
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, f"{os.getpid()}\n".encode())
    _HELD[key] = fd


def _fast_sqlite(url: str) -> BaseStorage:
    """SQLite with a write-ahead log: 40 ms per trial where the default took 230 ms, safe against a kill."""
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    storage = RDBStorage(url)

    def tune_connection(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", tune_connection)
    storage.engine.dispose()
    return storage


# --- one host: a journal ----------------------------------------------------------------------


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)

    class Journal(JournalFileBackend):
        """Optuna's file of lines with a lock that dies with its holder, mended before every line."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            _patiently(lambda: _append(path, text.encode()), _is_passing, str(path))

    _append(path, b"")
    return JournalStorage(Journal(str(path)))


def _append(path: Path, data: bytes) -> None:
    """Add whole lines to a journal, all or nothing; on return they are on disk."""
    with _locked(path) as fd:
        end = _mend_end(fd, path)
        try:
            written = 0
            while written < len(data):
                written += os.write(fd, data[written:])
            os.fsync(fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, end)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | BINARY, 0o666)
    try:
        lock(fd)
        yield fd
    finally:
        os.close(fd)  # releases the lock


def _mend_end(fd: int, path: Path) -> int:
    """Drop half a line that a dying process left, complete a whole one; returns the length after it.

    Raises:
        StoreError: the file is no journal; it is left as it is.
    """
    size = os.fstat(fd).st_size
    if not size:
        return 0
    head = read_at(fd, 4096, 0)
    if not (head.startswith(b'{"op_code"') or b'{"op_code"'.startswith(head)):
        raise StoreError(
            f"{path} is no journal of a study and is left as it is; another file name would work"
        )
    end, tail = size, b""
    while end > 0 and b"\n" not in tail:
        start = max(0, end - 65536)
        tail = read_at(fd, end - start, start) + tail
        end = start
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return size
    try:
        json.loads(tail)
    except ValueError:
        os.ftruncate(fd, size - len(tail))
        return size - len(tail)
    os.write(fd, b"\n")
    return size + 1


def _is_passing(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _PASSING


# --- many hosts: a database -------------------------------------------------------------------

# What Optuna's cache in front of a database calls beside the public methods.
_OF_THE_CACHE = ("_create_new_trial", "_get_trials", "_get_best_trial_id", "_set_trial_param")


def _database(url: str) -> BaseStorage:
    """A database whose connections are checked before use, and which is waited for when it goes away."""
    return _patient_database()(url, engine_kwargs={"pool_pre_ping": True})


@functools.cache
def _patient_database() -> Callable[..., BaseStorage]:
    from optuna.storages import BaseStorage, RDBStorage

    class PatientDatabase(RDBStorage):
        """Optuna's storage in a database, each of whose calls waits for the database while it is away."""

    def waiting(name: str) -> Callable[..., Any]:
        call = getattr(RDBStorage, name)

        @functools.wraps(call)
        def method(self: Any, *given: Any, **named: Any) -> Any:
            return _patiently(lambda: call(self, *given, **named), _is_away, "the database of the study")

        return method

    public = [name for name, member in vars(BaseStorage).items() if name[0] != "_" and callable(member)]
    for name in (*public, *_OF_THE_CACHE):
        if callable(getattr(RDBStorage, name, None)):
            setattr(PatientDatabase, name, waiting(name))
    return PatientDatabase


def _is_away(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the connection is gone."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    while error is not None:
        if isinstance(error, OperationalError | InterfaceError):
            return True
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or error.__context__
    return False


def _patiently(call: Callable[[], Any], passing: Callable[[BaseException], bool], what: str) -> Any:
    """What a call returns, made again while it fails with something that passes.

    A call that was cut off may have had its effect: a trial may then be queued twice, which
    `bratune.tune.ledger.Ledger.claim` sees, or be finished already, which is what was wanted.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    begun, pause, waited = time.monotonic(), _FIRST_PAUSE_S, False
    while True:
        try:
            return call()
        except UpdateFinishedTrialError:
            if not waited:
                raise
            return True
        except Exception as error:
            if not passing(error):
                raise
            if time.monotonic() - begun > _PATIENCE_S:
                raise StoreError(
                    f"{what} has been away for {_PATIENCE_S:g} s; the same command goes on once it is back"
                ) from None
        if not waited:
            warnings.warn(f"{what} does not answer; it is waited for", stacklevel=2)
        waited = True
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def make_sampler(name: str, seed: int, *, several: bool = True) -> BaseSampler:
    """The sampler of that name.

    Args:
        name: One of `SAMPLERS`.
        seed: Makes its draws repeatable.
        several: There are two objectives; what that changes is set here explicitly.

    Raises:
        UsageError: the name is not known.
        MissingPackageError: ``gp`` needs scipy.
    """
    import optuna
    from optuna import samplers

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            # With several objectives the default is univariate, which proposes what it has seen before.
            return samplers.TPESampler(multivariate=several or None, seed=seed, constant_liar=True)
        if name == "nsga2":
            return samplers.NSGAIISampler(population_size=20, seed=seed)
        if name == "random":
            return samplers.RandomSampler(seed=seed)
        if name == "brute":
            return samplers.BruteForceSampler(seed=seed)
        if name == "gp":
            if importlib.util.find_spec("scipy") is None:
                raise MissingPackageError("scipy", "the sampler gp")
            return samplers.GPSampler(seed=seed, deterministic_objective=False)
    raise UsageError(f"sampler {name!r} is not known; these are: {', '.join(SAMPLERS)}")
