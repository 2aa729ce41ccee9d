"""The mixers by name. Other packages add theirs through the entry-point group ``bratune.mixers``.

QuadTree attention (Tang et al., ICLR 2022, arXiv 2201.02767) is not among them: every query gathers keys of
its own, level by level, which the published code does in CUDA kernels of its own; composed of PyTorch's
operations it would be a measurement of the composition, and say nothing about the attention.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from bratune.errors import BratuneError, UnknownNameError
from bratune.kernels.mixers.mixer import MixerKind

__all__ = ["GROUP", "MIXERS", "ROUTED", "get", "module_of", "names", "package_of"]

GROUP = "bratune.mixers"
_HERE = "bratune.kernels.mixers"

_BUILT_IN = {
    "window": "windows:WINDOW",
    "shifted-window": "windows:SHIFTED",
    "spatially-separable": "reduction:SEPARABLE",
    "spatial-reduction": "reduction:REDUCED",
    "sequential-axial": "stripes:AXIAL",
    "criss-cross": "stripes:CRISS_CROSS",
    "cross-shaped": "stripes:CROSS_SHAPED",
    "block-grid": "windows:GRID",
    "deformable": "deformable:DEFORMABLE",
    "neighbourhood": "neighbours:NEIGHBOURHOOD",
    "full": "whole:FULL",
}
# The mixer that takes a backend behind a colon: ``bi-level-routing:gather``.
ROUTED = "bi-level-routing"

MIXERS: tuple[str, ...] = (*_BUILT_IN, ROUTED)


def names() -> tuple[str, ...]:
    """Every mixer's name: the built-in ones, then those of other packages."""
    return (*MIXERS, *sorted({point.name for point in _entry_points()} - set(MIXERS)))


@functools.cache
def get(name: str) -> MixerKind:
    """The mixer with this name; ``bi-level-routing:NAME`` is that of a backend.

    Raises:
        UnknownNameError: no mixer, or no backend, has this name.
        BratuneError: a mixer of another package cannot be loaded.
    """
    base, _, backend = name.partition(":")
    if base == ROUTED:
        from bratune.kernels import registry
        from bratune.kernels.mixers.whole import bi_level_routing

        if backend and backend != "auto":
            registry.get(backend)
        return bi_level_routing(backend or "auto")
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        found: MixerKind = getattr(importlib.import_module(f"{_HERE}.{module}"), attribute)
        return found
    for point in _entry_points():
        if point.name == name:
            return _load(point)
    raise UnknownNameError("mixer", name, names())


def module_of(name: str) -> str:
    """The name of the module that defines a mixer; empty where nobody has it."""
    base = name.partition(":")[0]
    if base == ROUTED:
        return f"{_HERE}.whole"
    if name in _BUILT_IN:
        return f"{_HERE}.{_BUILT_IN[name].partition(':')[0]}"
    return next((point.module for point in _entry_points() if point.name == name), "")


def package_of(name: str) -> str:
    """The package and version that a mixer of somebody else comes from; empty for a built-in one."""
    found = [] if name.partition(":")[0] in MIXERS else [p for p in _entry_points() if p.name == name]
    return ", ".join(f"{p.dist.name} {p.dist.version}" if p.dist else p.module for p in found)


@functools.cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def _load(point: importlib.metadata.EntryPoint) -> MixerKind:
    try:
        made = point.load()
    except Exception as error:  # someone else's code: whatever it raises is the reason
        raise BratuneError(
            f"the mixer {point.name!r} ({point.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(made, MixerKind) or made.name != point.name:
        raise BratuneError(
            f"the mixer {point.name!r} ({point.value}) is none: it needs the parts of "
            "bratune.kernels.mixers.mixer.MixerKind and the name of its entry point"
        )
    return made
