"""A device that is not there: kernels are compiled for it and loaded, and their launches written down.

`stub_device` stands in for Triton's driver, so that everything on the host's side of a launch runs as it
does on a GPU, on tensors of the CPU::

    with stub_device("sm90") as launches:
        run_forward(q, k, v, routes, call, keep_lse=False)
    launches[0].arguments
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bratune.predict.compile import offline_driver
from bratune.predict.offline import machine_of
from bratune.predict.targets import get_target

__all__ = ["StubLaunch", "stub_device"]

# Triton keeps what it compiled and loaded by the number of the device: every stub has one of its own.
_numbers = itertools.count(2_000_000)


@dataclass(frozen=True)
class StubLaunch:
    """What arrived at the driver.

    Attributes:
        kernel: Name of the compiled kernel.
        code: The machine code; kernels that are specialised differently differ in it.
        grid: Programs.
        stream: On which stream; here its number is that of the device.
        arguments: All of them, constants too.
    """

    kernel: str
    code: bytes
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


@contextlib.contextmanager
def stub_device(target: str = "sm90", *, keep: bool = True) -> Iterator[list[StubLaunch]]:
    """Have Triton launch on a device that is not there.

    Args:
        target: Its architecture, of `bratune.predict.targets.TARGETS`.
        keep: Write launches down; without, nothing is done, for timing what comes before.

    Yields:
        The launches; the list grows.

    Raises:
        UsageError: the process interprets Triton.
    """
    from triton.runtime.driver import driver

    from bratune.kernels.fused import direct, ops, run

    launches: list[StubLaunch] = []
    loaded: list[tuple[str, bytes]] = []

    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        loaded.append((name, kernel))
        return 0, len(loaded) - 1, 0, 0, 1024

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            pass

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if keep:
                # Behind metadata, metadata of the launch and two hooks come the arguments.
                launches.append(StubLaunch(*loaded[function], (x, y, z), stream, rest[4:]))

    stub = offline_driver(get_target(target))
    stub.launcher_cls = Launcher
    limits = {"max_shared_mem": get_target(target).smem_block_kib * 1024}
    number = next(_numbers)
    stub.get_current_device = lambda: number
    stub.get_current_stream = lambda device=number: device
    stub.utils = SimpleNamespace(load_binary=load_binary, get_device_properties=lambda device: limits)
    previous = driver._active  # `active` would look for a GPU first
    driver.set_active(stub)
    try:
        with (
            mock.patch.object(run, "_on_device_of", return_value=contextlib.nullcontext()),
            mock.patch.object(direct, "_launches", {}),
            mock.patch.object(ops, "_machine", return_value=machine_of(target)),
        ):
            yield launches
    finally:
        driver._active = previous
