"""Files: writing one in a single step, with the permissions that the user's umask gives."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

__all__ = ["new_file_beside", "write_text"]


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
