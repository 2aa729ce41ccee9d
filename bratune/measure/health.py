"""Health: whether this machine can measure soundly, and what to do where it cannot.

Every check is a function of plain facts that gives findings: what was found, how bad it is, and what to do
about it. `examine` collects the facts; nothing is changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bratune.machine import OLDEST_TORCH, Machine, release
from bratune.measure.host import launch_us
from bratune.measure.stolen import StolenTime
from bratune.measure.telemetry import Reading

__all__ = [
    "Finding",
    "at_a_glance",
    "check_board",
    "check_disk",
    "check_environment",
    "check_flags",
    "check_host",
    "check_load",
    "check_native",
    "check_noise",
    "check_sensors",
    "check_stolen",
    "check_versions",
    "examine",
    "is_sound",
]

OK, NOTE, PROBLEM = "ok", "note", "problem"
# Repeats of one measurement that differ by more than this cannot tell backends apart.
NOISE_NOTE_PCT, NOISE_PROBLEM_PCT = 3.0, 10.0
# Of the processor time; the noise floor rises with it.
STOLEN_PROBLEM = 0.05
LEAST_DISK_GB = 1.0
REPEATS = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        state: ``ok``, ``note`` (results stay sound, but this is worth knowing) or ``problem``.
        found: What was found, in words.
        advice: What to do about it; empty where all is well.
    """

    what: str
    state: str
    found: str
    advice: str = ""


def is_sound(findings: Sequence[Finding]) -> bool:
    """Whether measurements taken now can be trusted: no finding is a problem."""
    return all(finding.state != PROBLEM for finding in findings)


def check_versions(torch: str, triton: str, wanted_triton: str) -> list[Finding]:
    """Versions, and whether triton is the one that torch was made for.

    Args:
        torch: Installed version.
        triton: Installed version; empty when it is not.
        wanted_triton: What torch requires, e.g. ``"==3.7.1"``; empty when it does not say.
    """
    found = [Finding("torch", OK, torch)]
    if release(torch) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        found = [Finding("torch", PROBLEM, torch, f"older than {needed}; pip install 'torch>={needed}'")]
    if not triton:
        advice = "the triton backend cannot run; pip install triton"
        return [*found, Finding("triton", NOTE, "not installed", advice)]
    exact = re.search(r"==\s*([\w.+]+)", wanted_triton)
    if exact and not triton.startswith(exact[1]):
        advice = f"this torch was made for triton {exact[1]}; pip install triton=={exact[1]}"
        return [*found, Finding("triton", PROBLEM, triton, advice)]
    return [*found, Finding("triton", OK, triton)]


def check_board(machine: Machine, known: bool) -> Finding:
    """Which board there is, and whether predictions and rooflines know it."""
    if not machine.is_cuda:
        advice = "the CPU will be measured; for GPUs elsewhere, rows are modelled"
        return Finding("GPU", NOTE, f"none; {machine}", advice)
    if not known:
        advice = "it is measured all the same; --gpu-spec FILE gives predictions its peaks"
        return Finding("GPU", NOTE, f"{machine}, not in the table of boards", advice)
    return Finding("GPU", OK, str(machine))


def check_sensors(reading: Reading, foreign: int | None) -> list[Finding]:
    """Clocks, throttling, temperature and other processes of a GPU."""
    if reading.sm_clock_mhz is None:
        advice = "clocks and throttling cannot be watched; pip install nvidia-ml-py, or ask for the right"
        clocks = Finding("clocks", NOTE, "the driver does not tell", advice)
    elif reading.throttled:
        reasons = ", ".join(reading.throttle_reasons)
        advice = "let it cool, or raise the power cap; throttled samples would be discarded"
        clocks = Finding("clocks", PROBLEM, f"{reading.sm_clock_mhz:.0f} MHz, held down by {reasons}", advice)
    else:
        top = f" of {reading.top_clock_mhz:.0f}" if reading.top_clock_mhz else ""
        clocks = Finding("clocks", OK, f"{reading.sm_clock_mhz:.0f}{top} MHz")
    found = [clocks]
    if reading.temp_c is not None:
        found.append(Finding("temperature", OK, f"{reading.temp_c:.0f} C"))
    if foreign is None:
        found.append(
            Finding("other processes", NOTE, "the driver does not tell", "make sure nobody else runs")
        )
    elif foreign:
        advice = "wait for them or use another board (--device cuda:N); they share its time and memory"
        found.append(Finding("other processes", PROBLEM, f"{foreign} on the board", advice))
    else:
        found.append(Finding("other processes", OK, "none on the board"))
    return found


def check_native(variants: Sequence[str], default: str, openmp: str, source: str, reason: str) -> Finding:
    """The backend for CPUs: which instruction sets it uses, whose threads, and where its library is from.

    Args:
        variants: Those that this processor runs, the fastest first.
        default: The one that runs where nobody names one.
        openmp: The OpenMP library whose threads it uses; empty for none.
        source: Where the library is from, in words.
        reason: Why there is no library; empty where there is one.
    """
    if reason:
        return Finding("native backend", NOTE, "cannot run here", reason)
    found = f"{default} (of {', '.join(variants)}), threads of {openmp or 'nobody'}, {source}"
    if not openmp:
        advice = "one thread: torch has loaded no OpenMP whose threads could be used"
        return Finding("native backend", NOTE, found, advice)
    if default != variants[0]:
        advice = f"BRATUNE_NATIVE asks for it; {variants[0]} is the fastest here"
        return Finding("native backend", NOTE, found, advice)
    return Finding("native backend", OK, found)


def check_launches(how: str) -> Finding:
    """How the host launches Triton kernels; see `bratune.kernels.fused.direct`."""
    if how == "directly":
        return Finding("kernel launches", OK, how)
    advice = "the host takes about five times as long per launch; small batches without CUDA graphs feel it"
    return Finding("kernel launches", NOTE, how, advice)


def check_load(load: float, cores: int, threads: int) -> Finding:
    """Whether others use the CPU, which also launches every kernel."""
    found = f"{load:.1f} running on {cores} cores, torch uses {threads}"
    if load > 0.5 * cores:
        return Finding("CPU load", PROBLEM, found, "wait until the machine is idle; launches are timed, too")
    if threads > cores:
        advice = f"torch.set_num_threads({cores}) or OMP_NUM_THREADS={cores}"
        return Finding("CPU load", NOTE, found, advice)
    return Finding("CPU load", OK, found)


def check_environment(env: Mapping[str, str]) -> list[Finding]:
    """Variables that change what is measured."""
    bad = {
        "CUDA_LAUNCH_BLOCKING": ("1", "every launch waits for its kernel"),
        "TRITON_INTERPRET": ("1", "Triton kernels are interpreted in Python"),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "every allocation goes to the driver"),
        "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "independent work is serialised"),
    }
    found = [
        Finding(name, PROBLEM, f"{name}={value}: {why}", f"unset {name}")
        for name, (value, why) in bad.items()
        if env.get(name) == value
    ]
    return found or [Finding("environment", OK, "no variable slows anything down")]


def check_flags(flags: Mapping[str, Any]) -> list[Finding]:
    """Switches of torch that change speed or numerics.

    Args:
        flags: ``deterministic``, ``tf32_matmul``, ``tf32_cudnn``, ``reduced_bf16``, ``reduced_fp16``,
            ``cudnn_benchmark``: as torch has them now.
    """
    found = []
    if flags["deterministic"]:
        advice = "torch.use_deterministic_algorithms(False), unless that is what you want to measure"
        text = "on: the backward pass of gathering becomes 5 to 10 times slower"
        found.append(Finding("deterministic algorithms", PROBLEM, text, advice))
    else:
        found.append(Finding("deterministic algorithms", OK, "off"))
    tf32 = [name for name in ("matmul", "cudnn") if flags[f"tf32_{name}"]]
    text = f"on for {' and '.join(tf32)}: float32 rows use TF32 there" if tf32 else "off"
    found.append(Finding("TF32", NOTE if flags["tf32_matmul"] else OK, text))
    reduced = [name for name in ("bf16", "fp16") if flags[f"reduced_{name}"]]
    text = f"allowed for {' and '.join(reduced)} sums in matrix products" if reduced else "not allowed"
    found.append(Finding("reduced precision", OK, text + (" (torch's default)" if reduced else "")))
    if flags["cudnn_benchmark"]:
        found.append(
            Finding("cuDNN benchmark", NOTE, "on: convolutions are chosen by timing, so that runs can differ")
        )
    return found


def check_noise(medians_ms: Sequence[float]) -> Finding:
    """The meter's noise floor: the same call measured several times in a row."""
    middle = statistics.median(medians_ms)
    spread = 100 * (max(medians_ms) - min(medians_ms)) / middle
    found = f"{len(medians_ms)} measurements of one call differ by {spread:.1f} %"
    if spread > NOISE_PROBLEM_PCT:
        advice = "stop other work, wait for the clocks to settle; smaller differences than this mean nothing"
        return Finding("noise floor", PROBLEM, found, advice)
    if spread > NOISE_NOTE_PCT:
        return Finding("noise floor", NOTE, found, "differences below this need more fresh processes")
    return Finding("noise floor", OK, found)


def check_host(us: float) -> Finding:
    """What the host takes to launch an operation, and who wants to know."""
    advice = f"of a like host, `bratune predict --host {us:.1f}` narrows what small batches may take"
    return Finding("host", OK, f"{us:.1f} us per operation of eager PyTorch", advice)


def check_stolen(share: float) -> Finding:
    """Whether the host of a virtual machine gave its processors to others while something was measured.

    Args:
        share: Of the processor time that was wanted; see `bratune.measure.stolen`.
    """
    found = f"the host gave {share:.0%} of the processor time to others" if share else "none"
    if share > STOLEN_PROBLEM:
        advice = "measure when the host is quieter, or on a machine of your own; the times are partly theirs"
        return Finding("stolen time", PROBLEM, found, advice)
    return Finding("stolen time", OK, found)


def check_disk(free_gb: float, where: str) -> Finding:
    """Whether results will fit."""
    found = f"{free_gb:.0f} GB free at {where}"
    if free_gb < LEAST_DISK_GB:
        return Finding("disk", PROBLEM, found, "free some space, or write elsewhere with --output")
    return Finding("disk", OK, found)


# --- collecting the facts -----------------------------------------------------------------------------


def examine(machine: Machine, *, measure: bool = True, folder: str | Path = ".") -> list[Finding]:
    """Everything that can be looked at on a machine; takes a few seconds.

    Args:
        machine: Where measurements would be taken.
        measure: Measure the noise floor and the host, too.
        folder: Where results would be written.
    """
    from bratune import gpus
    from bratune.measure.telemetry import open_telemetry

    findings = check_versions(machine.torch, machine.triton, _wanted_triton())
    findings.append(check_board(machine, gpus.from_machine(machine) is not None))
    if machine.is_cuda:
        with open_telemetry(machine) as telemetry:
            findings += check_sensors(telemetry.read(), telemetry.foreign_processes(holds_context=False))
        if machine.triton:
            from bratune.kernels.fused.direct import HOW

            findings.append(check_launches(HOW))
    else:
        findings.append(check_native(**native_facts()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings.append(check_load(os.getloadavg()[0], cores, machine.threads or cores))
    findings += check_environment(os.environ)
    findings += check_flags(torch_flags())
    if measure and machine.is_cuda:
        findings.append(check_host(launch_us(machine.device)))
    if measure:
        stolen = StolenTime()
        findings.append(check_noise(noise_samples(machine)))
        findings.append(check_stolen(stolen.share()))
    findings.append(check_disk(shutil.disk_usage(folder).free / 1e9, str(Path(folder).resolve())))
    return findings


def at_a_glance(machine: Machine) -> str:
    """What stands against measuring now, as far as it is known at once; empty where nothing does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [check_load(os.getloadavg()[0], cores, machine.threads or cores)]
    findings += check_environment(os.environ)
    bad = [f"{f.what}: {f.found}; {f.advice}" for f in findings if f.state == PROBLEM]
    return f"this machine is not quiet: {' · '.join(bad)} (bratune doctor says more)" if bad else ""


def _wanted_triton() -> str:
    """What the installed torch requires of triton."""
    try:
        wanted = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    return next((text for text in wanted if re.match(r"triton\b", text)), "")


def native_facts() -> dict[str, Any]:
    """What there is of the backend for CPUs, for `check_native`; builds its library where that is missing."""
    from bratune.kernels.native import build, library

    found = library.find()
    if isinstance(found, str):
        return {"variants": (), "default": "", "openmp": "", "source": "", "reason": found}
    compilers = [" ".join(compiler) for compiler in build.compilers()]
    came_along = found.path == build.bundled()
    return {
        "variants": found.runnable,
        "default": found.default,
        "openmp": found.openmp,
        "source": "came with the package" if came_along else f"built by {compilers[0] if compilers else '?'}",
        "reason": "",
    }


def torch_flags() -> dict[str, Any]:
    """The switches of torch, for `check_flags`."""
    import torch

    matmul = torch.backends.cuda.matmul
    # The newer switch, of torch 2.9; to ask by the older one after it was set raises.
    newer = getattr(matmul, "fp32_precision", None)
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32_matmul": matmul.allow_tf32 if newer is None else newer == "tf32",
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "reduced_bf16": matmul.allow_bf16_reduced_precision_reduction,
        "reduced_fp16": matmul.allow_fp16_reduced_precision_reduction,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def noise_samples(machine: Machine, repeats: int = REPEATS) -> list[float]:
    """Medians of one call (a matrix product and an addition), measured several times in a row."""
    import torch

    from bratune.measure.meter import meter_for
    from bratune.measure.settings import MeterSettings

    side = 4096 if machine.is_cuda else 512
    a = torch.randn(side, side, device=machine.device, generator=_generator(machine.device))
    meter = meter_for(machine)
    settings = MeterSettings.for_effort("quick", l2="warm", timeout_s=2.0)
    return [meter.measure(lambda: torch.addmm(a, a, a), settings).median_ms for _ in range(repeats)]


def _generator(device: str) -> Any:
    import torch

    return torch.Generator(device=device).manual_seed(0)
