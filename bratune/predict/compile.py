"""Compile Triton kernels for a GPU that is not here, exactly as their launch wrappers launch them.

::

    launches = compile_for("sm90", lambda: gather_forward(q, k, v, routes, problem, settings))
    launches[0].resources.registers

Inside `compile_for` a launch compiles and is written down instead of being run: the wrapper is called
with tensors on the CPU or, for large problems, on the ``meta`` device, which takes no memory. Arguments
are specialised as at a real launch (integers that are 1, alignment to 16), so that the machine code is
the one that the GPU would run. Only the assembler and disassembler that Triton brings are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bratune.errors import UnsupportedError, UsageError
from bratune.predict.sass import Listing, parse_amdgcn, parse_sass
from bratune.predict.targets import TARGETS, CompileTarget, get_target

__all__ = ["Launch", "Resources", "compile_for", "offline_driver", "record_launches"]

# Device numbers that no machine has, one per target: Triton keeps what it compiled per device.
_FIRST_DEVICE = 1_000_000
_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel takes from the GPU.

    Attributes:
        registers: Registers of a thread (AMD: vector registers).
        stack_bytes: Local memory of a thread: spilled registers and arrays that are indexed.
        shared_bytes: Shared memory of a block.
        num_warps: Warps of a block.
        resident_warps: Warps that an SM holds at a time; 0 when not even one block fits.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    resident_warps: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch that was compiled instead of run.

    Attributes:
        kernel: Name of the kernel.
        target: What it was compiled for.
        grid: Programs along the three axes of the grid.
        settings: The arguments that are compiled in (``tl.constexpr``), by name.
        num_warps: Warps of a program.
        num_stages: Tiles of a loop that are under way at a time; 1: loads are not pipelined.
        asm: The stages of compilation by name: ``ttir``, ``ttgir``, ``llir``, ``ptx``, ``cubin``.
        metadata_shared: Shared memory of a program, in bytes.
    """

    kernel: str
    target: CompileTarget
    grid: tuple[int, int, int]
    settings: Mapping[str, Any]
    num_warps: int
    num_stages: int
    metadata_shared: int
    asm: Mapping[str, Any] = field(repr=False)

    @property
    def programs(self) -> int:
        """Programs that the launch starts."""
        return math.prod(self.grid)

    def on_grid(self, grid: tuple[int, int, int]) -> Launch:
        """The same machine code, launched with another number of programs."""
        found = dataclasses.replace(self, grid=grid)
        # What was read off the machine code stays known.
        found.__dict__.update(listing=self.listing, resources=self.resources)
        return found

    @functools.cached_property
    def listing(self) -> Listing:
        """The machine code as instructions and loops."""
        if self.target.backend == "hip":
            return parse_amdgcn(self.asm["amdgcn"])
        return parse_sass(_disassemble(self.asm["cubin"]))

    @functools.cached_property
    def resources(self) -> Resources:
        """What the compiled kernel takes from the GPU."""
        if self.target.backend == "hip":
            registers, stack = _amd_usage(self.asm["amdgcn"])
        else:
            registers, stack = _nvidia_usage(self.asm["cubin"])
        return Resources(
            registers=registers,
            stack_bytes=stack,
            shared_bytes=self.metadata_shared,
            num_warps=self.num_warps,
            resident_warps=self.target.resident_warps(
                registers=registers, shared_bytes=self.metadata_shared, num_warps=self.num_warps
            ),
        )


def compile_for(target: str | CompileTarget, launch: Callable[[], object]) -> tuple[Launch, ...]:
    """The kernels that a call launches, compiled for a target.

    Args:
        target: A name of `TARGETS`, or the target itself.
        launch: A call without arguments that launches Triton kernels on CPU or meta tensors. It must not
            look at what the kernels computed: they do not run.

    Raises:
        UsageError: the process interprets Triton (``TRITON_INTERPRET``) instead of compiling it.
        UnsupportedError: a kernel does not compile for the target, or needs more than a block may have.
    """
    with record_launches(target) as launches:
        launch()
    return tuple(launches)


@contextlib.contextmanager
def record_launches(
    target: str | CompileTarget, then: Callable[[Launch, tuple[tuple[str, Any], ...]], None] | None = None
) -> Iterator[list[Launch]]:
    """Compile every launch of a ``with`` block for a target; see `compile_for`.

    Not for several threads at once: Triton has one active driver.

    Args:
        target: A name of `TARGETS`, or the target itself.
        then: Called in the place of each launch, with the names and values of the arguments that the machine
            code takes.
    """
    goal = get_target(target) if isinstance(target, str) else target
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 is set, so Triton interprets kernels; compiling needs it unset")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = _compile(goal, kernel, lambda: run(kernel, *args, grid=grid, warmup=True, **kwargs))
        named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        bound = kernel.signature.bind_partial(*args, **named)
        bound.apply_defaults()
        arguments = bound.arguments
        sizes = grid(arguments) if callable(grid) else grid
        launches.append(
            Launch(
                kernel=kernel.__name__,
                target=goal,
                grid=_grid(sizes),
                settings={p.name: arguments[p.name] for p in kernel.params if p.is_constexpr},
                num_warps=int(compiled.metadata.num_warps),
                num_stages=int(compiled.metadata.num_stages),
                metadata_shared=int(compiled.metadata.shared),
                asm=compiled.asm,
            )
        )
        if then is not None:
            kinds = compiled.src.signature
            then(launches[-1], tuple((n, x) for n, x in arguments.items() if kinds[n] != "constexpr"))
        return compiled

    previous = driver._active  # `active` would look for a GPU first
    driver.set_active(offline_driver(goal))
    JITFunction.run = compile_instead
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = previous


def _grid(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)


def _compile(target: CompileTarget, kernel: Any, compile_kernel: Callable[[], Any]) -> Any:
    """The compiled kernel; raises `UnsupportedError` where a launch on the target would fail."""
    try:
        compiled = compile_kernel()
    except Exception as error:  # Triton, LLVM and the assembler each raise their own
        reason = f"it does not compile for {target.name}: {error}"
        raise UnsupportedError(kernel.__name__, (reason,)) from error
    reasons = []
    if (shared := compiled.metadata.shared) > (limit := target.smem_block_kib * 1024):
        reasons.append(f"it needs {shared} bytes of shared memory; {target.name} has {limit}")
    # Where products are accumulated on sm100; other targets have none and need none.
    if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > _TENSOR_MEMORY_COLUMNS:
        reasons.append(
            f"it needs {columns} columns of tensor memory; {target.name} has {_TENSOR_MEMORY_COLUMNS}"
        )
    if reasons:
        raise UnsupportedError(kernel.__name__, reasons)
    return compiled


def offline_driver(target: CompileTarget) -> Any:
    """A driver for Triton that knows what to compile for and has nothing to run it on."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class OfflineDriver(DriverBase):  # type: ignore[misc]
        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("nothing is launched")

        def get_current_target(self) -> Any:
            return GPUTarget(target.backend, target.arch, target.warp_size)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is timed")

        def get_current_device(self) -> int:
            return _FIRST_DEVICE + tuple(TARGETS).index(target.name)

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    return OfflineDriver()


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run_on_cubin(command: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


@functools.lru_cache(maxsize=256)
def _disassemble(cubin: bytes) -> str:
    return _run_on_cubin([_tool("nvdisasm"), "-c"], cubin)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory in bytes, of a thread."""
    text = _run_on_cubin([_tool("cuobjdump"), "--dump-resource-usage"], cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise UnsupportedError("cuobjdump", (f"its report has no register count: {text.strip()[:200]}",))
    return int(found[1]), int(found[2])


def _amd_usage(amdgcn: str) -> tuple[int, int]:
    """Vector registers (both kinds together) and scratch memory in bytes, of a thread."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", amdgcn)
        return int(found[1]) if found else 0

    return number("vgpr_count"), number("private_segment_fixed_size")
