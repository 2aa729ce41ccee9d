"""The backends by name, in order of preference.

A backend is loaded when it is first asked for. Other packages add theirs through the entry-point group
``bratune.backends`` (name = what the command line calls it, value = ``module:Class``); how:
``kernels/README.md``. What cannot be loaded keeps its place in the list, and says why.

The code of another package runs only where somebody asks for its backend by name, or where the environment
allows it: ``BRATUNE_BACKENDS=mine,theirs``, or ``all``. Then it is also among those that ``auto`` and a sweep
over all backends try. Nobody else's package can take a name of ours, or be imported because it is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

from bratune.backend import Backend, Config
from bratune.errors import UnknownNameError, UnsupportedError
from bratune.machine import Machine
from bratune.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALLOW_VARIABLE",
    "BACKENDS",
    "GROUP",
    "Unavailable",
    "choose",
    "get",
    "known_names",
    "names",
    "package_of",
    "preference",
]

# Names of backends of other packages, with commas, that may be tried without being asked for; or `all`.
ALLOW_VARIABLE = "BRATUNE_BACKENDS"

GROUP = "bratune.backends"

# Most preferred first: where `choose` finds several that accept, the first one runs.
_BUILT_IN = {
    "triton": "bratune.kernels.fused.backend:TritonBackend",
    "native": "bratune.kernels.native.backend:NativeBackend",
    "gather-sdpa": "bratune.kernels.gather:GatherSDPABackend",
    "dense": "bratune.kernels.dense:DenseBackend",
    "sparse": "bratune.kernels.sparse:SparseBackend",
    "gather": "bratune.kernels.gather:GatherBackend",
    "flex": "bratune.kernels.flex:FlexBackend",
    "reference": "bratune.kernels.reference:ReferenceBackend",
}

BACKENDS: tuple[str, ...] = tuple(_BUILT_IN)


class Unavailable:
    """A backend that is listed and cannot be loaded: it refuses every problem with one reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """The reason."""
        return (self.reason,)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """Raises `UnsupportedError` with the reason."""
        raise UnsupportedError(self.name, (self.reason,), str(problem))

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """There is nothing to set."""
        return ({},)

    def workspace_bytes(self, problem: Problem) -> int:
        """It never runs."""
        return 0

    def flops(self, problem: Problem) -> int:
        """It never runs."""
        return 0


def names() -> tuple[str, ...]:
    """The backends that are tried: the built-in ones in order of preference, then those that are allowed."""
    allowed = {name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",")}
    return (*BACKENDS, *(name for name in _added() if "all" in allowed or name in allowed))


def known_names() -> tuple[str, ...]:
    """Every name that `get` knows: those of `names`, and those that have to be asked for."""
    return (*BACKENDS, *_added())


def package_of(name: str) -> str:
    """The package and version that a backend of somebody else comes from; empty for a built-in one."""
    points = [] if name in _BUILT_IN else [point for point in _entry_points() if point.name == name]
    return ", ".join(f"{_distribution(p)} {p.dist.version if p.dist else ''}".strip() for p in points)


def _added() -> tuple[str, ...]:
    return tuple(sorted({point.name for point in _entry_points()} - set(BACKENDS)))


@functools.cache
def get(name: str) -> Backend:
    """The backend with this name; an `Unavailable` one where it is listed and cannot be loaded.

    Raises:
        UnknownNameError: no backend has this name.
    """
    if name in _BUILT_IN:
        return _load(name, _BUILT_IN[name], "bratune")
    sources = [(point.value, _distribution(point)) for point in _entry_points() if point.name == name]
    if not sources:
        raise UnknownNameError("backend", name, ("auto", *known_names()))
    if len(sources) > 1:
        owners = ", ".join(f"{owner} ({value})" for value, owner in sources)
        return Unavailable(
            name, f"the name {name!r} is taken more than once: {owners}; uninstall all but one"
        )
    value, owner = sources[0]
    return _load(name, value, owner)


def choose(problem: Problem, machine: Machine) -> Backend:
    """The first backend, in the order of `preference`, that accepts this problem on this machine.

    Raises:
        UnsupportedError: every backend refuses; the message has every reason.
    """
    return get(_chosen_name(problem, machine, preference(problem, machine)))


def preference(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """Every backend's name in the order in which `choose` asks them.

    That is the order of `names`, but where ``native`` cannot run on a CPU, ``dense`` comes first for small
    regions on a small map: with regions of up to 3x3 tokens and at most four keys on the map for every key
    that a query attends to, it took 0.1 to 1 times as long as ``gather-sdpa`` (float32, one thread of an AMD
    EPYC with AVX-512, torch 2.13; at 4x4 tokens 1.8 times). A plan (`bratune.kernels.tuned`) replaces this
    rule of thumb by what was measured on the machine.
    """
    order = names()
    few_keys = problem.kv_tokens <= 4 * problem.keys_per_query
    if not machine.is_cuda and few_keys and problem.kv_region_tokens <= 9:
        order = ("native", "dense", *(name for name in order if name not in ("native", "dense")))
    return order


@functools.lru_cache(maxsize=4096)
def _chosen_name(problem: Problem, machine: Machine, order: tuple[str, ...]) -> str:
    refusals = []
    for name in order:
        reasons = get(name).why_not(problem, machine)
        if not reasons:
            return name
        refusals += [f"{name}: {reason}" for reason in reasons]
    raise UnsupportedError("auto", refusals, str(problem))


@functools.cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown package"


def _load(name: str, value: str, owner: str) -> Backend:
    module, _, attribute = value.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        return Unavailable(name, f"{value} of {owner} cannot be imported here: {error}")
    except Exception as error:  # someone else's code: whatever it raises is the reason
        return Unavailable(name, f"{value} of {owner} fails to load: {type(error).__name__}: {error}")
    if not isinstance(made, Backend):
        return Unavailable(
            name, f"{value} of {owner} is no backend: it lacks a part of bratune.backend.Backend"
        )
    if made.name != name:
        return Unavailable(
            name, f"{value} of {owner} calls itself {made.name!r}; both names must be the same"
        )
    return made
