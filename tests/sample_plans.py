"""Plans and machines that several tests start from."""

from __future__ import annotations

from pathlib import Path

from bratune.machine import Machine
from bratune.measure.verdict import MedianOfPasses
from bratune.tune.evidence import prior_only
from bratune.tune.plan import EndToEnd, Plan, stage_plans
from bratune.tune.space import Space
from bratune.variant import get_variant, stages

__all__ = ["H200", "RUN", "make_plan"]

# What a real run ended with; see results/README.md.
RUN = Path(__file__).resolve().parent.parent / "results" / "cpu-xeon-biformer-tiny-224.plan.json"

H200 = Machine(
    kind="cuda",
    device="cuda:0",
    gpu_key="h200",
    gpu_name="NVIDIA H200",
    compute_capability="9.0",
    sm_count=132,
    memory_gib=139.8,
    torch="2.13.0",
    triton="3.7.1",
)


def make_plan(
    machine: Machine = H200,
    *,
    model: str = "biformer_tiny",
    n_win: int = 7,
    topks: tuple[int, ...] | None = None,
    backend: str = "gather",
    config: str = "{}",
    size: tuple[int, int] = (224, 224),
    task: str = "classification",
    batch: int = 1,
    dtype: str = "bfloat16",
) -> Plan:
    space = Space(model=model, height=size[0], width=size[1], batch=batch, dtype=dtype)
    setting = space.setting(n_win, topks or get_variant(model).topks, backend, [config] * 4)
    found = stages(
        get_variant(model), *size, batch=batch, n_win=setting.n_win, topks=setting.topks, dtype=dtype
    )
    return Plan(
        model=model,
        task=task,
        height=size[0],
        width=size[1],
        batch=batch,
        dtype=dtype,
        direction="fwd",
        setting=setting,
        default=space.first_settings()["paper"],
        stages=stage_plans(
            setting,
            found,
            {1: {"default_ms": 2.0, "tuned_ms": 1.5, "ci": (1.4, 1.6), "n": 30, "complete": True}},
        ),
        end_to_end=EndToEnd(
            published=MedianOfPasses(20.0, 19.0, 21.0, 6),
            default=MedianOfPasses(10.0, 9.8, 10.2, 6),
            tuned=MedianOfPasses(9.0, 8.9, 9.1, 6),
            passes=6,
            verdict="FASTER",
            speedup_vs_default=MedianOfPasses(1.11, 1.08, 1.13, 6),
            speedup_vs_published=MedianOfPasses(2.2, 2.1, 2.3, 6),
        ),
        evidence=prior_only(unchanged=False),
        machine=machine,
        reason="lowest latency of 5 feasible settings",
    )
