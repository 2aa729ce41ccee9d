"""Suites: named lists of measurements, read from the YAML files in this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bratune import files
from bratune.cell import ROUTE_KINDS
from bratune.errors import BratuneError, ConfigError, UnknownNameError
from bratune.problem import DIRECTIONS
from bratune.variant import get_task, get_variant, parse_resolution

__all__ = ["Suite", "load", "names", "read_yaml"]

FOLDER = Path(__file__).resolve().parent
KEYS = ("about", "task", "res", "n_win", "topks", "models", "batch_size", "routes")
# A suite of mixers has these, and mixers in the place of kinds of routes.
MIXER_KEYS = ("mixers", "directions")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A list of measurements worth taking.

    Attributes:
        name: The file's name without its suffix.
        about: One line on what it stands for.
        task: Name of the task.
        image: Size in pixels, ``(height, width)``.
        n_win: Regions per side, S.
        topks: Top-k per stage; None for the published ones of each model.
        models: Names of variants.
        batch_sizes: Images per call.
        routes: Kinds of routes.
        mixers: Attentions that are compared in the layout of the model; empty for backends.
        directions: ``fwd``, ``fwd-bwd``, or both; empty for what the command line says.
    """

    name: str
    about: str
    task: str
    image: tuple[int, int]
    n_win: int
    topks: tuple[int, ...] | None
    models: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    routes: tuple[str, ...]
    mixers: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()


def names() -> tuple[str, ...]:
    """Names of the suites that come with this package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load(name: str) -> Suite:
    """The suite of that name, or of a YAML file of the caller's own.

    Raises:
        UnknownNameError: there is no such suite and no such file.
        ConfigError: the file has an unknown key, lacks one, or holds a value of the wrong kind.
    """
    if name in names():
        path = FOLDER / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")) and Path(name).is_file():
        path = Path(name)
    else:
        raise UnknownNameError("suite", name, names())
    data = read_yaml(path, known=(*KEYS, *MIXER_KEYS))
    missing = [key for key in KEYS if key not in data]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; a suite has {', '.join(KEYS)}")
    try:
        return _checked(path.stem, data)
    except (ArithmeticError, AttributeError, TypeError, ValueError, BratuneError) as error:
        raise ConfigError(f"{path}: {error}") from None


def read_yaml(path: Path, *, known: tuple[str, ...]) -> dict[str, Any]:
    """The mapping that a YAML file holds, with every key checked.

    Args:
        path: The file.
        known: Keys that may appear.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, has another key, or one twice.
    """
    data = files.read_yaml(path)
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"the file {path} holds a {type(data).__name__}; keys with values would work")
    for key in data:
        if key not in known:
            raise ConfigError(f"{path}: {UnknownNameError('key', str(key), known)}")
    return dict(data)


def _checked(name: str, data: Mapping[str, Any]) -> Suite:
    topks = None if data["topks"] == "published" else tuple(int(k) for k in data["topks"])
    models = tuple(get_variant(model).name for model in data["models"])
    for kind in data["routes"]:
        if kind not in ROUTE_KINDS:
            raise UnknownNameError("kind of routes", str(kind), ROUTE_KINDS)
    for direction in data.get("directions", ()):
        if direction not in DIRECTIONS:
            raise UnknownNameError("direction", str(direction), DIRECTIONS)
    batches = data["batch_size"] if isinstance(data["batch_size"], list) else [data["batch_size"]]
    return Suite(
        name=name,
        about=str(data["about"]),
        task=get_task(data["task"]).name,
        image=parse_resolution(str(data["res"])),
        n_win=int(data["n_win"]),
        topks=topks,
        models=models,
        batch_sizes=tuple(int(batch) for batch in batches),
        routes=tuple(data["routes"]),
        mixers=_mixers(data.get("mixers", ())),
        directions=tuple(data.get("directions", ())),
    )


def _mixers(names: Sequence[Any]) -> tuple[str, ...]:
    if not names:  # without importing torch
        return ()
    from bratune.kernels.mixers import registry

    return tuple(registry.get(str(name)).name for name in names)
