"""Rows that figures are drawn from: one machine, one model, an attention call and models beside it."""

from __future__ import annotations

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record

MACHINE = Machine(
    kind="cuda", device="cuda:0", gpu_key="a100", gpu_name="NVIDIA A100-SXM4-80GB", sm_count=108
)


def attention(stage: int = 1, backend: str = "gather", side: int = 224) -> Cell:
    tokens = side // (2 ** (stage + 1))
    problem = Problem(
        batch=1,
        height=tokens,
        width=tokens,
        heads=2 * stage,
        head_dim=32,
        region=(4, 4),
        topk=2,
        dtype="bfloat16",
    )
    return Cell(
        part="attention",
        problem=problem,
        backend=backend,
        model="biformer_tiny",
        image=(side, side),
        stage=stage,
        block_count=4,
        n_win="7",
        topk="2",
    )


def model(backend: str = "gather", topk: str = "1,4,16,-2") -> Cell:
    return attention().replace(
        part="model", backend=backend, stage=0, block_count=1, n_win="7,7,7,7", topk=topk
    )


def measured(cell: Cell, ms: float, **more: object) -> Record:
    values = {"median_ms": ms, "ci_lo_ms": 0.9 * ms, "ci_hi_ms": 1.2 * ms, "n_samples": 30} | more
    return Record.of(cell, MACHINE, **values)


def peer(name: str) -> Cell:
    return model("").replace(model=name, form="timm")
