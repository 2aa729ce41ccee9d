"""Launching a kernel that is compiled already, without asking Triton again what it has asked before.

At every launch Triton binds some fifty arguments, finds out for each whether it is 1 or a multiple of 16,
and makes a text of the answers to look its compiled kernel up: tens of microseconds, more than many kernels
here run. Here the first launch of a call is Triton's own; its compiled kernel is kept under everything that
went into it: the numbers themselves, data types, alignment of pointers, device, compile-time constants. The
next launch of the same takes the last step of Triton's launch alone, by the same function of the compiled
kernel.

Where that cannot be sure, Triton launches: other releases than those that were read (`HOW` says so),
another backend than CUDA, hooks of a profiler, debugging, `JITFunction.run` in other hands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bratune.kernels.fused.call import INTERPRETING

__all__ = ["HOW", "launch_kernel"]

# Releases whose launch was read, and is what `_Launch` repeats.
_READ = ("3.6.", "3.7.")
# Calls that are kept; a program that never repeats itself starts over.
_MOST = 4096
_ALIGNED = 16


def _how() -> str:
    if INTERPRETING:
        return "interpreted"
    if not triton.__version__.startswith(_READ):
        return f"by triton {triton.__version__} itself: what it does at a launch is known of 3.6 and 3.7"
    return "directly"


# How kernels are launched: ``directly``, or why not.
HOW = _how()
_DIRECTLY = HOW == "directly"
# By its name: what is in its place when this module is imported need not be it.
_RUN = "JITFunction.run"


class _Launch:
    """A compiled kernel and what it is launched with."""

    __slots__ = ("constants", "function", "metadata", "owner", "run")

    def __init__(self, compiled: Any, constants: tuple[Any, ...], owner: object) -> None:
        self.run = compiled.run  # loads the kernel: before its function is asked for
        self.function = compiled.function
        self.metadata = compiled.packed_metadata
        self.constants = constants
        self.owner = owner  # what the key names by its identity lives as long as the key


_launches: dict[tuple[Hashable, ...], _Launch] = {}


def launch_kernel(
    kernel: Any,
    grid: tuple[int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: Callable[[], Mapping[str, Any]],
    *key: Hashable,
    owner: object = None,
) -> None:
    """Launch a kernel on the current device, which is that of the tensors.

    Args:
        kernel: The function of Triton; its parameters are the tensors, the numbers, then constants.
        grid: How many programs.
        tensors: In order.
        numbers: In order.
        constants: Gives compile-time constants and launch options by name; called where they are not known.
        *key: What the constants follow from, beside the kernel, shapes and strides in ``numbers``.
        owner: An object whose identity is a part of the key.
    """
    if not _DIRECTLY or _in_other_hands(kernel):
        kernel[grid](*tensors, *numbers, **constants())
        return
    pointers = [x.data_ptr() for x in tensors]
    unaligned = None
    for pointer in pointers:
        if pointer % _ALIGNED:
            unaligned = tuple(p % _ALIGNED == 0 for p in pointers)
            break
    device = tensors[0].get_device()
    place = (kernel.fn, id(owner), key, numbers, tuple([x.dtype for x in tensors]), unaligned, device)
    found = _launches.get(place)
    if found is None:
        _first(kernel, grid, tensors, numbers, constants(), place, owner)
        return
    stream = driver.active.get_current_stream(device)
    found.run(
        grid[0], 1, 1, stream, found.function, found.metadata, None, None, None,
        *tensors, *numbers, *found.constants,
    )  # fmt: skip


def _in_other_hands(kernel: Any) -> bool:
    """Whether a launch of Triton would do more than launch."""
    runtime = knobs.runtime
    return bool(
        JITFunction.run.__qualname__ != _RUN
        or kernel.pre_run_hooks
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
    )


def _first(
    kernel: Any, grid: tuple[int], tensors: tuple[Tensor, ...], numbers: tuple[int | float, ...],
    constants: Mapping[str, Any], place: tuple[Hashable, ...], owner: object,
) -> None:  # fmt: skip
    """Have Triton compile and launch, and keep what it launched."""
    compiled = kernel[grid](*tensors, *numbers, **constants)
    rest = kernel.params[len(tensors) + len(numbers) :]
    if compiled is None or not all(p.is_constexpr for p in rest) or len(rest) == len(kernel.params):
        return
    if driver.active.get_current_target().backend != "cuda":
        return  # others look at the size of a tensor too
    if len(_launches) >= _MOST:
        _launches.clear()
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    _launches[place] = _Launch(compiled, tuple(constants[p.name] for p in rest), owner)
