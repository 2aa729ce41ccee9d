"""What every kernel may take of every target: ``bratune/data/kernel_budgets.json``, checked by the tests.

A compiler or an edit that makes a kernel spill, or costs it half of its resident warps, shows here before
anyone has the GPU. ``python -m bratune.studies kernel-budgets`` compiles the cases below and raises
budgets to what they take; ``--reset`` also lowers them.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from bratune.predict.compile import Launch, Resources
from bratune.predict.offline import (
    attention_launches,
    depthwise_launches,
    norm_launches,
    routing_launches,
)
from bratune.predict.targets import TARGETS
from bratune.problem import Problem

__all__ = ["CASES", "Budget", "budget_of", "budgets", "main", "over_budget"]

Budget = Mapping[str, int]


def _attention(
    config: Mapping[str, int | str] | None = None, **values: object
) -> Callable[[str], dict[str, Launch]]:
    settings = {"batch": 16, "heads": 2, "head_dim": 32, "dtype": "bfloat16", "direction": "fwd-bwd"}
    problem = Problem(**{**settings, **values})  # type: ignore[arg-type]
    return lambda target: attention_launches(problem, target, config)


def _routing(side: int, n_win: int, topk: int, *, maps: bool) -> Callable[[str], dict[str, Launch]]:
    region = (side // n_win, side // n_win)
    problem = Problem(
        batch=16, height=side, width=side, heads=4, head_dim=32, region=region, topk=topk, dtype="bfloat16"
    )
    return lambda target: routing_launches(problem, target, maps=maps)


def _depthwise(side: int, channels: int, kernel: int) -> Callable[[str], dict[str, Launch]]:
    return lambda target: depthwise_launches((16, side, side, channels), kernel, "bfloat16", target)


def _norm(side: int, channels: int) -> Callable[[str], dict[str, Launch]]:
    region = (side // 7, side // 7)
    return lambda target: norm_launches((128, side, side, channels), region, "bfloat16", target)


# Every kernel at the sizes of the published models, and at the sizes that are hardest on it.
CASES: Mapping[str, Callable[[str], dict[str, Launch]]] = {
    "224 stage 1": _attention(batch=128, height=56, width=56, region=(8, 8), topk=1),
    "224 stage 2": _attention(batch=128, height=28, width=28, heads=4, region=(4, 4), topk=4),
    "224 stage 3": _attention(
        {"forward": "image"}, batch=128, height=14, width=14, heads=8, region=(2, 2), topk=16
    ),
    "224 stage 3, stationary": _attention(
        {"forward": "stationary"},
        batch=128,
        height=14,
        width=14,
        heads=8,
        region=(2, 2),
        topk=16,
        direction="fwd",
    ),
    "512 stage 1": _attention(height=128, width=128, region=(16, 16), topk=1),
    "512 stage 3": _attention(
        batch=128, height=32, width=32, heads=8, region=(4, 4), topk=16, direction="fwd"
    ),
    "ragged, masked": _attention(height=50, width=84, region=(13, 11), topk=4, padding="masked"),
    "float32, 24 channels": _attention(
        height=28, width=28, head_dim=24, region=(4, 4), topk=4, dtype="float32"
    ),
    "hubs": _attention({"dkv_chunk": 8}, height=56, width=56, region=(8, 8), topk=1),
    "128 channels": _attention(height=32, width=32, head_dim=128, region=(8, 8), topk=4),
    "49 regions": _routing(28, 7, 4, maps=True),
    "256 regions": _routing(64, 16, 16, maps=False),
    "depthwise 5x5": _depthwise(56, 64, 5),
    "depthwise 3x3": _depthwise(28, 96, 3),
    "norm of 64 channels": _norm(56, 64),
    "norm of 384 channels": _norm(14, 384),
    "norm of 768 channels": _norm(7, 768),
}


def budgets() -> dict[str, dict[str, Budget]]:
    """Every budget: by target, then by ``case: kernel``."""
    text = importlib.resources.files("bratune.data").joinpath("kernel_budgets.json").read_text("utf-8")
    found: dict[str, dict[str, Budget]] = json.loads(text)["budgets"]
    return found


def budget_of(found: Resources) -> dict[str, int]:
    """The budget that holds what a kernel takes and leaves room for another release of the compiler.

    Registers go up to the next multiple of 16 above a tenth more, local memory to the next of 64 bytes.
    """
    registers = -(-(found.registers * 11) // 160) * 16
    return {
        "registers": max(found.registers, min(registers, 255)),
        "stack_bytes": -(-found.stack_bytes // 64) * 64,
        "shared_bytes": -(-found.shared_bytes // 1024) * 1024,
    }


def over_budget(found: Resources, budget: Budget) -> tuple[str, ...]:
    """What a kernel takes beyond its budget, each a sentence; empty: nothing."""
    return tuple(
        f"{getattr(found, name)} {name.replace('_', ' ')}, {limit} are allowed"
        for name, limit in budget.items()
        if getattr(found, name) > limit
    )


_OWN = Path(__file__).resolve().parent.parent / "data" / "kernel_budgets.json"


@click.command("kernel-budgets")
@click.option("--target", "targets", multiple=True, type=click.Choice(tuple(TARGETS)), help="All by default.")
@click.option("--case", "cases", multiple=True, type=click.Choice(tuple(CASES)), help="All by default.")
@click.option("--reset", is_flag=True, help="Forget budgets that are larger than needed.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=_OWN, help="The package's by default."
)
def main(targets: tuple[str, ...], cases: tuple[str, ...], reset: bool, output: Path) -> None:
    """Compile every case for every target and write the budgets."""
    read = json.loads(output.read_text("utf-8"))["budgets"] if output.exists() else {}
    for target in targets or TARGETS:
        before = read.get(target, {})
        old = {} if reset else before
        new: dict[str, dict[str, int]] = {}
        for case, compile_case in CASES.items():
            if case not in (cases or CASES):
                new |= {name: budget for name, budget in before.items() if name.split(": ")[0] == case}
                continue
            for kernel, launch in compile_case(target).items():
                name, needed = f"{case}: {kernel}", budget_of(launch.resources)
                new[name] = {key: max(value, old.get(name, {}).get(key, 0)) for key, value in needed.items()}
            click.echo(f"{target} {case}", err=True)
        read[target] = new
        _write(output, read)


def _write(path: Path, found: Mapping[str, Mapping[str, Budget]]) -> None:
    """One kernel per line, in the order of `TARGETS`."""
    blocks = []
    for target in (name for name in TARGETS if name in found):
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in found[target].items())
        blocks.append(f'  "{target}": {{\n{lines}\n  }}')
    path.write_text('{"schema": 1, "budgets": {\n' + ",\n".join(blocks) + "\n}}\n", "utf-8")
