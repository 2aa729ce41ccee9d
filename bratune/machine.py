"""Machine: the hardware and the versions that a measurement was taken with.

`detect` asks the device; what it reports wins over any table. A machine holds no handles: it hashes
and serialises, and travels to worker processes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bratune
from bratune.errors import TargetError, UsageError
from bratune.text import is_name

__all__ = ["OLDEST_TORCH", "Machine", "detect", "release"]

# The oldest release that the tests pass with; pyproject.toml and the README say the same.
OLDEST_TORCH = (2, 8)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where something runs.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        device: As torch names it: ``cuda:0``, ``cpu``.
        gpu_key: Short key of the GPU table, ``cpu`` for a CPU, else derived from the name.
        gpu_name: Name that the device (or the operating system, for a CPU) reports.
        gpu_uuid: Identity of the board; empty when unknown.
        compute_capability: ``"9.0"``; empty for a CPU.
        sm_count: Streaming multiprocessors; for a CPU, the cores that this process may use.
        memory_gib: Memory that the device reports, in GiB; 0 when unknown.
        l2_bytes: Last-level cache that a cold measurement flushes, in bytes; 0 when unknown.
        smem_per_block_kib: Shared memory that one block may opt in to, in KiB; 0 for a CPU.
        threads: Threads that torch uses on a CPU; 0 for a GPU.
    """

    kind: str
    device: str
    gpu_key: str
    gpu_name: str
    gpu_uuid: str = ""
    compute_capability: str = ""
    sm_count: int = 0
    memory_gib: float = 0.0
    l2_bytes: int = 0
    smem_per_block_kib: int = 0
    threads: int = 0
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    bratune: str = ""
    git_sha: str = ""
    git_dirty: bool | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.kind == "cuda"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as two numbers; (0, 0) for a CPU."""
        if not self.compute_capability:
            return 0, 0
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def memory_bytes(self) -> int:
        """Memory of the device in bytes."""
        return int(self.memory_gib * 2**30)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        """The inverse of `to_dict`."""
        return cls(**data)

    def __str__(self) -> str:
        if self.is_cuda:
            parts = [
                self.gpu_name,
                f"sm_{self.compute_capability.replace('.', '')}",
                f"{self.sm_count} SMs",
                f"driver {self.driver or '?'}",
            ]
        else:
            parts = [self.gpu_name, f"{self.sm_count} cores", f"{self.threads} threads"]
        parts.append(f"torch {self.torch}")
        if self.triton:
            parts.append(f"triton {self.triton}")
        return " · ".join(parts)


def detect(device: str = "auto") -> Machine:
    """The machine behind a torch device.

    Args:
        device: ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: the text names no kind of device.
        TargetError: a CUDA device was named that is not here, or torch is too old.
    """
    import torch

    if release(torch.__version__) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise TargetError(
            f"torch {torch.__version__} is installed, and {needed} or newer is needed: "
            f"pip install 'torch>={needed}'"
        )
    name = device.strip().lower()
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return _detect_cpu()
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"device {device!r} is not known; auto, cpu, cuda and cuda:N are")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
        raise TargetError(f"device {device!r} is not here: torch finds {found}; cpu would work")
    return _detect_cuda(int(index or 0))


def _detect_cpu() -> Machine:
    import torch

    return Machine(
        kind="cpu",
        device="cpu",
        gpu_key="cpu",
        gpu_name=_cpu_name(),
        sm_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        memory_gib=_memory_gib(),
        l2_bytes=_cpu_cache_bytes(),
        threads=torch.get_num_threads(),
        **_versions(),
    )


def _detect_cuda(index: int) -> Machine:
    import torch

    from bratune import gpus

    props = torch.cuda.get_device_properties(index)
    memory_gib = round(props.total_memory / 2**30, 2)
    board = gpus.match(props.name, memory_gib=memory_gib, sm_count=props.multi_processor_count)
    key = board.key if board else gpus.slug(props.name)
    return Machine(
        kind="cuda",
        device=f"cuda:{index}",
        gpu_key=_named_key() or key,
        gpu_name=props.name,
        gpu_uuid=str(getattr(props, "uuid", "")),
        compute_capability=f"{props.major}.{props.minor}",
        sm_count=props.multi_processor_count,
        memory_gib=memory_gib,
        l2_bytes=int(getattr(props, "L2_cache_size", 0)),
        smem_per_block_kib=int(getattr(props, "shared_memory_per_block_optin", 0)) // 1024,
        driver=_driver(),
        cuda=torch.version.cuda or "",
        **_versions(),
    )


def _named_key() -> str:
    """The key that the environment gives this board; empty where it gives none."""
    name = os.environ.get("BRATUNE_GPU_NAME", "")
    if name and not is_name(name):
        raise UsageError(f"BRATUNE_GPU_NAME is {name!r}; a name of letters, digits and ._+- would work")
    return name


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version: (2, 13) of ``2.13.0+cpu``; zeros where it has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _versions() -> dict[str, Any]:
    import torch

    sha, dirty = _git_state()
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "bratune": bratune.__version__,
        "git_sha": sha,
        "git_dirty": dirty,
    }


def _triton_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no library, no driver, no permission: the version stays unknown
        return ""


def _cores() -> int:
    return os.cpu_count() or 1


def _memory_gib() -> float:
    """Memory of this machine; 0, unknown, where the system does not say (Windows)."""
    if not hasattr(os, "sysconf"):
        return 0.0
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def _cpu_cache_bytes() -> int:
    """The largest cache that the operating system reports, in bytes; 0 when it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * factor)
    return max(sizes)


@functools.cache
def _git_state() -> tuple[str, bool | None]:
    """Commit of the checkout that this package runs from; empty when it is not one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "", None
    try:
        sha, status = (
            subprocess.run(
                ["git", "-C", str(root), *args],
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            ).stdout.strip()
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return "", None
    return sha, bool(status)
