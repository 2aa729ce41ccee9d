"""Values: what a word of the command line means, checked and completed by the shell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from bratune.errors import UnknownNameError, UsageError
from bratune.measure.settings import parse_percent, parse_seconds
from bratune.variant import parse_resolution

__all__ = [
    "DTYPE_HELP",
    "DTYPE_NAMES",
    "BatchSize",
    "Dtype",
    "Duration",
    "Model",
    "Name",
    "Numbers",
    "Percent",
    "Resolution",
    "Seed",
    "backend_names",
    "model_names",
    "route_kinds",
    "task_names",
]

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]  # generic in the stubs of click 8.5, not at run time in older ones
else:
    ParamType = click.ParamType

DTYPE_HELP = "fp32, fp16, bf16 or fp64.  [default: fp32 on a CPU, bf16 on a GPU, fp16 where it has none]"
DTYPE_NAMES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp64": "float64",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float64": "float64",
}


class Resolution(ParamType):
    """``512`` or ``800x1333`` as ``(height, width)`` in pixels."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """The two sides; raises `UsageError`."""
        return value if isinstance(value, tuple) else parse_resolution(str(value))


class Duration(ParamType):
    """``0.5s``, ``200ms``, ``20m`` or ``1h`` in seconds; a bare number is seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds; raises `UsageError`."""
        seconds = parse_seconds(value)
        if not seconds > 0:
            raise UsageError(f"{_flag(param)} must be longer than nothing, not {value!r}")
        return seconds


class Percent(ParamType):
    """``0.5%`` or ``0.5`` as percent."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The percentage; raises `UsageError`."""
        return parse_percent(value)


class BatchSize(ParamType):
    """A number of images, or ``auto``."""

    name = "images"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number, or ``"auto"``; raises `UsageError`."""
        text = str(value).strip().lower()
        if text == "auto":
            return text
        if not text.isdigit() or int(text) < 1:
            raise UsageError(f"batch size {value!r} is not a number of images; 1, 32 or auto would be")
        return int(text)


class Numbers(ParamType):
    """Whole numbers joined by commas, one for all stages or one per stage."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers; raises `UsageError`."""
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            return tuple(int(part) for part in parts)
        except ValueError:
            raise UsageError(
                f"{_flag(param)} {value!r} is not a list of whole numbers; 7 or 1,4,16,-2 would be"
            ) from None


class Seed(ParamType):
    """A whole number that every generator of random numbers takes."""

    name = "integer"
    largest = 2**32 - 1

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; raises `UsageError`."""
        text = str(value).strip()
        if not re.fullmatch(r"\d{1,10}", text) or int(text) > self.largest:
            raise UsageError(
                f"{_flag(param)} {text[:40]} is no seed; whole numbers from 0 to {self.largest} are"
            )
        return int(text)


class Name(ParamType):
    """One of the names that a function lists when it is needed.

    Args:
        kind: What the name is, for the message.
        known: Returns the names that would work; not called before a name is given.
    """

    name = "name"

    def __init__(self, kind: str, known: Callable[[], Iterable[str]]) -> None:
        self.kind, self.known = kind, known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name in lower case; raises `UnknownNameError`."""
        text, known = str(value).strip().lower(), tuple(self.known())
        if text not in known:
            raise UnknownNameError(self.kind, str(value), known)
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin as what is there."""
        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete.lower())]


class Model(Name):
    """A model by its name, or ``package.module:factory`` of somebody else's, which is left as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; raises `UnknownNameError`."""
        return str(value).strip() if ":" in str(value) else super().convert(value, param, ctx)


class Dtype(Name):
    """A dtype by its short or its long name, as its long name."""

    def __init__(self) -> None:
        super().__init__("dtype", lambda: DTYPE_NAMES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The long name; raises `UnknownNameError`."""
        return DTYPE_NAMES[super().convert(value, param, ctx)]


def _flag(param: click.Parameter | None) -> str:
    return param.opts[-1] if param else "value"


def model_names() -> Iterable[str]:
    """Every variant."""
    from bratune.variant import VARIANTS

    return VARIANTS


def task_names() -> Iterable[str]:
    """Every task."""
    from bratune.variant import TASKS

    return TASKS


def backend_names() -> Iterable[str]:
    """Every registered backend, those of other packages too: naming one is asking for it."""
    from bratune.kernels.registry import known_names

    return known_names()


def route_kinds() -> Iterable[str]:
    """Every way to make routes."""
    from bratune.cell import ROUTE_KINDS

    return ROUTE_KINDS
