"""Compile before measuring: ``python -m bratune.studies kernels --compile``.

Compiling is host work, a second of a core per kernel, and a rented GPU waits for it. Here every kernel that
the proof and the whole models launch is compiled as it is launched there, by one process per core; Triton
keeps what it compiled, and processes that come later find it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from bratune.errors import UnsupportedError
from bratune.predict.offline import attention_launches, depthwise_launches, norm_launches, routing_launches
from bratune.problem import Problem

__all__ = ["Job", "compile_all", "jobs_of", "run_job"]


@dataclass(frozen=True)
class Job:
    """What one call compiles: an attention call, or what stands around it in a block.

    Attributes:
        what: ``attention``, or ``block``: routing, LayerNorm and both depthwise convolutions.
        problem: The attention call.
        config: Settings of the backend that are not left to the table, as pairs.
    """

    what: str
    problem: Problem
    config: tuple[tuple[str, int | str], ...] = ()


def jobs_of(calls: Iterable[tuple[Problem, Mapping[str, int | str]]]) -> tuple[Job, ...]:
    """One job per attention call and one per block around it, nothing twice, longest first."""
    found: dict[Job, None] = {}
    for problem, config in calls:
        found[Job("attention", problem, tuple(config.items()))] = None
        found[Job("block", problem.replace(direction="fwd"))] = None
    return tuple(sorted(found, key=lambda job: (not job.problem.backward, job.what)))


def run_job(job: Job, target: str) -> str:
    """Compile a job; empty, or why a kernel is not legal on the target."""
    p = job.problem
    try:
        if job.what == "attention":
            attention_launches(p, target, dict(job.config))
            return ""
        shape = (p.batch, p.height, p.width, p.channels)
        routing_launches(p, target, maps=False)
        norm_launches(shape, p.region, p.dtype, target)
        for kernel in (3, 5):
            depthwise_launches(shape, kernel, p.dtype, target)
    except UnsupportedError as error:
        return f"{p}: {error}"
    return ""


def compile_all(
    jobs: Sequence[Job], target: str, processes: int = 0, say: Callable[[str], None] = print
) -> None:
    """Compile jobs side by side and say how long it took and what was refused.

    Args:
        jobs: What to compile.
        target: For what, a name of `bratune.predict.targets.TARGETS`.
        processes: How many; 0 is all cores but two.
        say: Takes one line at a time.
    """
    started = time.monotonic()
    count = processes or max(1, (os.cpu_count() or 1) - 2)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        refused = [text for text in pool.map(run_job, jobs, [target] * len(jobs)) if text]
    for text in refused:
        say(text)
    seconds = time.monotonic() - started
    say(f"{len(jobs) - len(refused)} of {len(jobs)} compiled for {target} in {seconds:.0f} s")
