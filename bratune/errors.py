"""Every error a user can act on.

::

    BratuneError                    exit code 1
     +-- UsageError                 exit code 2: what was asked cannot be
     |    +-- ProblemError          numbers that contradict each other or cannot be computed
     |    +-- UnknownNameError      a name that is not in a list; the message holds the list
     |    +-- ConfigError           a configuration file with an unknown key or a bad value
     +-- UnsupportedError           a backend was named that cannot do this problem here
     +-- TargetError                exit code 5: the target cannot be measured here
     +-- StoreError                 records cannot be read or written
     +-- CheckpointError            a weights file that cannot be loaded as asked
     +-- PlanError                  a plan that cannot be read or does not fit here
     +-- MissingPackageError        an optional package is needed; the message has the command
     +-- MeasureError               a measurement could not be taken

Each message is one sentence for the person who reads it: what was asked, what was found, what would
work. The command line prints the message without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BratuneError",
    "CheckpointError",
    "ConfigError",
    "MeasureError",
    "MissingPackageError",
    "PlanError",
    "ProblemError",
    "StoreError",
    "TargetError",
    "UnknownNameError",
    "UnsupportedError",
    "UsageError",
]


class BratuneError(Exception):
    """Root of the tree; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(BratuneError):
    """The request itself cannot be met, whatever the machine."""

    exit_code = 2


class ProblemError(UsageError, ValueError):
    """Numbers of an attention call that contradict each other."""


class UnknownNameError(UsageError, LookupError):
    """A name that is not in a list of names.

    Args:
        kind: What the name should have been, e.g. ``"backend"``.
        name: What was asked.
        known: The names that would work.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        close = difflib.get_close_matches(name.lower(), [k.lower() for k in self.known], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        super().__init__(f"no {kind} is called {name!r}; these are: {', '.join(self.known)}{hint}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.kind, self.name, self.known)


class ConfigError(UsageError):
    """A configuration file with an unknown key or a value of the wrong kind."""


class UnsupportedError(BratuneError):
    """A backend was asked for a problem that it cannot do here.

    Args:
        name: The backend that was asked.
        reasons: Every obstacle, each a sentence with what was found and what is needed.
        asked: The call in words, e.g. ``str(problem)``.
    """

    def __init__(self, name: str, reasons: Iterable[str], asked: str = "") -> None:
        self.name, self.reasons, self.asked = name, tuple(reasons), asked
        what = f" for {asked}" if asked else ""
        super().__init__(f"backend {name!r} cannot run{what}: {'; '.join(self.reasons)}")

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, tuple[str, ...], str]]:
        return type(self), (self.name, self.reasons, self.asked)


class TargetError(BratuneError):
    """The target GPU or device is not here, and a measurement was demanded."""

    exit_code = 5


class StoreError(BratuneError):
    """Records cannot be read or written."""


class CheckpointError(BratuneError):
    """A weights file that cannot be loaded as asked."""


class PlanError(BratuneError):
    """A plan that cannot be read, or that was made for something else."""


class MissingPackageError(BratuneError):
    """An optional package is needed.

    Args:
        package: The distribution, e.g. ``"timm"``.
        purpose: What needs it, as the subject of a sentence, e.g. ``"comparing with timm models"``.
        extra: The extra of this project that brings it, if one does.
    """

    def __init__(self, package: str, purpose: str, extra: str | None = None) -> None:
        self.package, self.purpose, self.extra = package, purpose, extra
        command = f"pip install 'bratune[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{purpose} needs the package {package}, which is not installed: {command}")

    def __reduce__(self) -> tuple[type[MissingPackageError], tuple[str, str, str | None]]:
        return type(self), (self.package, self.purpose, self.extra)


class MeasureError(BratuneError):
    """A measurement could not be taken; the message says why."""
