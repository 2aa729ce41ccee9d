"""What the host takes to launch the fused kernels: ``python -m bratune.studies launches``.

Triton's driver is replaced by a stub (`bratune.testing.stub_driver`): everything up to the call of the
driver runs, the call itself does nothing. Every pass of every stage at 224 is timed as Triton launches it
and as `bratune.kernels.fused.direct` does, one after the other and again, so that what else the machine
does meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import click

from bratune.variant import get_variant, stages

__all__ = ["host_us", "main"]

_ROUNDS = 5


def host_us(call: Callable[[], object], calls: int) -> float:
    """Microseconds of a call: the tenth part that was quickest, at its slowest."""
    samples = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return 1e6 * statistics.quantiles(samples, n=10)[0]


@click.command("launches")
@click.option("--calls", type=click.IntRange(10), default=300, show_default=True, help="Calls of a round.")
@click.option("--target", default="sm90", show_default=True, help="Architecture that is compiled for.")
def main(calls: int, target: str) -> None:
    """Time the host's part of every pass, launched by Triton and directly; nothing runs on a device."""
    import torch

    from bratune.kernels.fused import direct, run
    from bratune.kernels.fused.call import call_for
    from bratune.predict.offline import machine_of
    from bratune.testing.stub_driver import stub_device

    print(f"launches: {direct.HOW}")
    found = stages(get_variant("biformer_small"), 224, 224, batch=1, dtype="bfloat16", direction="fwd-bwd")
    with stub_device(target, keep=False):
        for stage in found:
            p = stage.problem
            if stage.kind != "routed" or p is None:
                continue
            call = call_for(p, "", machine_of(target))
            packed = torch.zeros(p.batch, p.height, p.width, 3 * p.channels, dtype=torch.bfloat16)
            q, k, v = packed.chunk(3, -1)
            routes = torch.zeros(p.batch, p.regions, p.topk, dtype=torch.int64)
            out, lse = run.run_forward(q, k, v, routes, call, keep_lse=True)
            passes: dict[str, Callable[[], object]] = {
                f"forward, {call.forward}": partial(run.run_forward, q, k, v, routes, call, keep_lse=True),
                f"backward, {call.backward}": partial(
                    run.run_backward, out, q, k, v, routes, out, lse, call, packed=True
                ),
            }
            for name, one in passes.items():
                taken: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(_ROUNDS):
                    for directly, samples in taken.items():
                        with mock.patch.object(direct, "_DIRECTLY", directly):
                            one()
                            samples.append(host_us(one, calls))
                before, after = (statistics.median(taken[directly]) for directly in (False, True))
                print(
                    f"  224 s{stage.index} {name:20} {before:7.1f} us by Triton, {after:6.1f} us directly, "
                    f"{before / after:.1f}x",
                    flush=True,
                )
