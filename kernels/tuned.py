"""Tuned: which backend plan files recommend for an attention call, for ``backend="auto"``.

A lookup never measures and is a pure function of files, so that every rank of a job gets the same answer.
Places, first hit wins: plans that were passed in, the folder ``BRATUNE_CONFIG_DIR``, the user's cache
(`user_plans`), plans that come with the package. A folder stands for every ``*.json`` below it.

A plan fits by content, not by file name: *exactly* when it was measured for the same call on the same
architecture with as many multiprocessors and as much memory; *nearly* when architecture, data type and
direction are the same and batch, map and top-k are within a factor of four. The marketing name of a board
plays no part. ``BRATUNE_LOOKUP`` is ``fuzzy`` (both count; a near hit is said once per process),
``strict`` (exact hits only) or ``off``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bratune.backend import Backend, Config
from bratune.errors import BratuneError, ConfigError
from bratune.kernels import registry
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.text import is_name

__all__ = [
    "MODES",
    "Tuned",
    "architecture",
    "choose",
    "lookup",
    "machine_key",
    "plan_folders",
    "user_plans",
]

MODES = ("fuzzy", "strict", "off")
NEAR = math.log(4.0)  # of batch and of tokens: beyond it another plan says too little
SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a plan recommends for one attention call.

    Attributes:
        backend: Backend name.
        config: Its settings.
        source: The plan file.
        exact: The plan was measured for this very call on such a machine.
        distance: How far away it was measured; 0 where exact.
    """

    backend: str
    config: Mapping[str, int | float | str | bool]
    source: str
    exact: bool
    distance: float = 0.0


@dataclass(frozen=True)
class _Row:
    problem: Problem
    machine: str
    architecture: str
    backend: str
    config: str
    source: str


def machine_key(machine: Machine) -> str:
    """Text for what decides a plan: ``sm90-132sm-140gib``; for a CPU its model, cores and threads."""
    memory = f"{round(machine.memory_gib)}gib"
    if machine.is_cuda:
        return f"{architecture(machine)}-{machine.sm_count}sm-{memory}"
    return f"{architecture(machine)}-{machine.sm_count}c-{machine.threads}t-{memory}"


def architecture(machine: Machine) -> str:
    """``sm90`` for a GPU; for a CPU, which reports no such number, a slug of its model name."""
    if machine.is_cuda:
        return f"sm{machine.compute_capability.replace('.', '')}"
    return "cpu-" + (re.sub(r"[^a-z0-9]+", "-", machine.gpu_name.lower()).strip("-") or "unknown")


def user_plans() -> Path:
    """Where plans of this user live: ``$XDG_CACHE_HOME/bratune/plans`` or ``~/.cache/bratune/plans``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "bratune" / "plans"


def plan_folders() -> tuple[Path, ...]:
    """The folders that are searched, in order; those that do not exist are left out."""
    named = os.environ.get("BRATUNE_CONFIG_DIR")
    bundled = Path(__file__).resolve().parent / "plans"
    places = [Path(named)] if named else []
    return tuple(p for p in (*places, user_plans(), bundled) if p.is_dir())


def mode() -> str:
    """How generous lookups are; raises `ConfigError` where ``BRATUNE_LOOKUP`` is none of `MODES`."""
    text = os.environ.get("BRATUNE_LOOKUP", "fuzzy")
    if text not in MODES:
        raise ConfigError(f"BRATUNE_LOOKUP is {text!r}; {', '.join(MODES)} would work")
    return text


def lookup(
    problem: Problem, machine: Machine, *, plans: Sequence[str | os.PathLike[str]] = ()
) -> Tuned | None:
    """What the first plan that fits recommends for a call on a machine; None when none fits.

    Args:
        problem: The call.
        machine: Where it will run.
        plans: Plan files or folders that are searched before all others.
    """
    generosity = mode()
    if generosity == "off":
        return None
    for place in (*map(Path, plans), *plan_folders()):
        found = _best(_rows(place), problem, machine)
        if found is None or (generosity == "strict" and not found.exact):
            continue
        if not found.exact:
            _say_once(found.source, found.backend)
        return found
    return None


def choose(problem: Problem, machine: Machine) -> tuple[Backend, Config | None]:
    """What ``backend="auto"`` runs: a plan's backend with its settings, else the registry's first choice.

    A plan cannot make a backend run where it refuses: then the registry chooses.

    Raises:
        UnsupportedError: every backend refuses; the message has every reason.
    """
    found = lookup(problem, machine)
    if found is not None and found.backend in registry.names():
        backend = registry.get(found.backend)
        if not backend.why_not(problem, machine):
            return backend, dict(found.config) or None
    return registry.choose(problem, machine), None


def _best(rows: tuple[_Row, ...], problem: Problem, machine: Machine) -> Tuned | None:
    here, kind = machine_key(machine), architecture(machine)
    found: list[Tuned] = []
    for row in rows:
        distance = _distance(row.problem, problem)
        if row.architecture != kind or distance is None:
            continue
        exact = row.problem == problem and row.machine == here
        if row.machine != here:
            distance += 1.0
        found.append(
            Tuned(
                backend=row.backend,
                config=json.loads(row.config),
                source=row.source,
                exact=exact,
                distance=0.0 if exact else distance,
            )
        )
    return min(found, key=lambda t: (not t.exact, t.distance, t.source), default=None)


def _distance(a: Problem, b: Problem) -> float | None:
    """How different two calls are, as a sum of logarithms; None where one says nothing about the other."""
    same = (
        "dtype",
        "direction",
        "padding",
        "per_head",
        "head_dim",
        "v_head_dim",
        "same_regions",
        "divisible",
    )
    if any(getattr(a, name) != getattr(b, name) for name in same):
        return None
    total = 0.0
    for name in ("batch", "tokens", "region_tokens", "topk", "heads"):
        step = abs(math.log(getattr(a, name) / getattr(b, name)))
        if step > NEAR + 1e-9:
            return None
        total += step
    return total


def _rows(place: Path) -> tuple[_Row, ...]:
    files = sorted(place.rglob("*.json")) if place.is_dir() else [place]
    return tuple(row for file in files for row in _read(str(file), _stamp(file)))


def _stamp(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except OSError:
        return 0, 0
    return state.st_mtime_ns, state.st_size


@functools.lru_cache(maxsize=1024)
def _read(file: str, stamp: tuple[int, int]) -> tuple[_Row, ...]:
    """The stages of a plan file; a file that is no plan gives none and is said once."""
    try:
        data = json.loads(Path(file).read_text("utf-8"))
        if not isinstance(data, dict) or data.get("kind") != "bratune-plan":
            return ()
        if data.get("measured") == "modelled":  # nothing was measured: it decides nothing
            return ()
        if int(data["schema"]) > SCHEMA:
            raise ConfigError(f"its schema {data['schema']} is newer than this version reads ({SCHEMA})")
        return tuple(_plan_rows(data, file))
    except (
        ArithmeticError,
        AttributeError,
        OSError,
        ValueError,
        KeyError,
        RecursionError,
        TypeError,
        BratuneError,
    ) as error:
        warnings.warn(f"the plan {file} was left out: {error}", stacklevel=4)
        return ()


def _plan_rows(data: Mapping[str, Any], file: str) -> Iterator[_Row]:
    machine = Machine.from_dict(data["machine"])
    for stage in data["stages"]:
        if stage.get("problem") and stage.get("backend"):
            if not is_name(stage["backend"]) or not _is_plain(stage["config"]):
                raise ConfigError("a stage has no name of a backend, or settings that are no plain values")
            problem = Problem.from_dict(stage["problem"])
            if problem.batch * problem.tokens * problem.heads * problem.head_dim >= 2**63:
                raise ConfigError("a stage has more elements than any memory holds")
            yield _Row(
                problem=problem,
                machine=machine_key(machine),
                architecture=architecture(machine),
                backend=stage["backend"],
                config=json.dumps(stage["config"], sort_keys=True),
                source=file,
            )


def _is_plain(config: Any) -> bool:
    """Whether settings are names with plain values."""
    return isinstance(config, dict) and all(isinstance(value, int | float | str) for value in config.values())


_said: set[str] = set()


def _say_once(source: str, backend: str) -> None:
    if source in _said:
        return
    _said.add(source)
    warnings.warn(
        f"backend {backend!r} was taken from {source}, which was tuned for a similar call, not for this one; "
        "`bratune tune` here, at this batch and resolution, would make a plan of its own "
        "(BRATUNE_LOOKUP=strict ignores near plans)",
        stacklevel=4,
    )
