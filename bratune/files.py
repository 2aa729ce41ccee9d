"""Files: locking, writing one in a single step with the permissions of the user's umask, reading YAML."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import time
import uuid
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from bratune.errors import ConfigError

__all__ = ["BINARY", "lock", "new_file_beside", "read_at", "read_yaml", "write_text"]

# For `os.open`: Windows would change ends of lines.
BINARY = getattr(os, "O_BINARY", 0)
# Where Windows locks a byte that stands for the file: what is locked there cannot be read by others.
_LOCKED_BYTE = 2**31 - 2
_POLL_S = 0.02


def lock(fd: int, *, wait: bool = True) -> None:
    """Take the lock of an open file, when no other process holds it; closing the file gives it back.

    Args:
        fd: The file.
        wait: For whoever holds it.

    Raises:
        BlockingIOError: another process holds it, and nobody waits.
        OSError: the file system or the operating system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        _lock_on_windows(fd, wait)
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _lock_on_windows(fd: int, wait: bool) -> None:
    try:
        msvcrt: Any = importlib.import_module("msvcrt")
    except ImportError:
        raise OSError(errno.ENOLCK, "this system gives no locks") from None
    while True:
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError:
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock") from None
            time.sleep(_POLL_S)


def read_at(fd: int, size: int, offset: int) -> bytes:
    """As `os.pread`, which Windows lacks."""
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


def new_file_beside(path: Path) -> str:
    """The name of a new empty file in the folder of another, with the permissions of any new file there.

    Unlike those of `tempfile`, which only their owner may read, also after they took another's place.

    Raises:
        OSError: the folder cannot be written.
    """
    name = str(path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}"))
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return name


def write_text(path: Path, text: str) -> None:
    """Put a text in the place of a file, all or nothing; its folder is made when missing.

    Raises:
        OSError: the file cannot be written; what was there is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = new_file_beside(path)
    try:
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or says a key twice, of which YAML's readers
            would keep the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if isinstance(name, Hashable) and name in seen:
                    raise ConfigError(
                        f"{path}, line {key.start_mark.line + 1}: the key {name!r} stands there twice; "
                        "one of them would do"
                    )
                seen.add(name if isinstance(name, Hashable) else None)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(path).read_text("utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the file {path} cannot be read: {reason}") from None
    except RecursionError:
        raise ConfigError(f"the file {path} cannot be read: it nests too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates and numbers that are none
        raise ConfigError(f"the file {path} is not YAML: {' '.join(str(error).split())}") from None
