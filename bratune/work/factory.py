"""Factory: a model of somebody else by the name of the function that makes it, ``package.module:factory``."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from bratune.errors import UsageError

__all__ = ["example_of", "is_factory", "load_factory", "shape_of", "source_of"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_factory(name: str) -> bool:
    """Whether a model's name is that of a function, ``package.module:factory``."""
    return ":" in name


def load_factory(name: str, seed: int = 0) -> nn.Module:
    """The model that a function makes, in evaluation; random weights are those of the seed.

    The module is looked for where Python looks, and in the current folder.

    Raises:
        UsageError: there is no such module or function, or what it makes is no model; what it raises is told.
    """
    if not _FACTORY.fullmatch(name):
        raise UsageError(f"{name!r} names no function that makes a model; package.module:factory would")
    module, _, attribute = name.partition(":")
    _look_here()
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name} cannot be imported: {error}") from None
    except Exception as error:  # somebody else's code
        raise UsageError(f"importing {module} raises {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}, not a function that makes a model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = found()
        except Exception as error:  # somebody else's code
            raise UsageError(f"{name}() raises {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{name}() makes a {type(made).__name__}, not a torch.nn.Module")
    return made.eval()


def shape_of(text: str) -> tuple[int, ...]:
    """The shape of an input, ``1x3x640x640``.

    Raises:
        UsageError: it is none.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        raise UsageError(f"{text!r} is no shape of an input; 1x3x640x640 is (batch, channels, height, width)")
    return tuple(int(number) for number in text.split("x"))


def example_of(text: str, seed: int = 0) -> Tensor:
    """Normal random numbers of a shape; see `shape_of`."""
    return torch.randn(shape_of(text), generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=8)
def source_of(model: str) -> str:
    """A name for the sources of a model: every Python file of the package of its function."""
    package = model.partition(":")[0].partition(".")[0]
    try:
        _look_here()
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return ""
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [f for folder in folders for f in sorted(folder.rglob("*.py"))]
    files += [Path(spec.origin)] if spec.origin and not folders else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return f"{package} {digest.hexdigest()[:12]}"


def _look_here() -> None:
    """Let imports find what is in the current folder, as ``python -m`` does."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
