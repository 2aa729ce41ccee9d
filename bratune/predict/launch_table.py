"""Make the table of launch settings without a GPU: ``python -m bratune.predict.launch_table``.

For every architecture and every problem class of the suites, candidate settings of each kernel are
compiled; what spills or leaves too few warps on an SM is dropped, the rest is ranked by the offline cost
model, and the best is written to ``kernels/launch_table.json``. An entry whose evidence is ``measured``
is never replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bratune.errors import UnsupportedError
from bratune.kernels.fused_families import BACKWARD, FORWARD, backward_families, forward_families
from bratune.kernels.launch import ARCHITECTURES, KINDS, next_power_of_2, problem_class
from bratune.predict.compile import Launch
from bratune.predict.cost import board_of, cost_of
from bratune.predict.offline import attention_launches
from bratune.problem import Problem
from bratune.suites.load import load, names
from bratune.variant import get_variant, stages

__all__ = ["best_settings", "candidates", "main", "problems"]

# A kernel with more local memory than this per thread, or fewer warps on an SM, hides no latency.
_MOST_STACK = 64
_FEWEST_WARPS = 8
# Estimates closer than this are ties, which fewer instructions decide.
_TIE = 1.02
# One variant stands for all: others differ in the number of heads, not in the geometry of tiles.
_VARIANT = "biformer_small"
_BATCHES = (1, 128)


def problems() -> tuple[Problem, ...]:
    """The routed attention calls of the suites in bfloat16, one for every geometry of tiles and batch.

    Of several maps with the same geometry the first stands for all: the lookup takes its entry for them.
    """
    found: dict[tuple[int, ...], Problem] = {}
    for name in names():
        suite = load(name)
        for batch in _BATCHES:
            for stage in stages(
                get_variant(_VARIANT),
                *suite.image,
                batch=batch,
                n_win=suite.n_win,
                topks=suite.topks,
                dtype="bfloat16",
                direction="fwd-bwd",
            ):
                if stage.kind == "routed" and stage.problem:
                    what = problem_class(stage.problem)
                    key = (batch, what["tile_tokens"], what["tile_keys"], what["kv_tile_tokens"])
                    found.setdefault(key, stage.problem)
    return tuple(found.values())


def candidates(kind: str, problem: Problem) -> Iterator[dict[str, int]]:
    """Settings of a kernel that are worth compiling for a problem; the rules come first."""
    rules = KINDS[kind](problem)
    yield rules
    seen = {tuple(sorted(rules.items()))}
    if kind == "kv_stationary_fwd":
        # Regions of a group are computed at the same time, each by warps of its own.
        for group in (1, 2, 4):
            found = rules | {"group": group, "num_warps": group * max(1, rules["block_n"] // 128)}
            if found != rules:
                yield found
        return
    for block_m, block_n in _tiles(kind, problem):
        for num_warps in (1, 2, 4, 8):
            # Fewer scores per warp leave lanes idle, more spill.
            if not 1024 <= block_m * block_n // num_warps <= 2048:
                continue
            for more in _variants(kind, problem, block_n):
                found = rules | {"block_m": block_m, "block_n": block_n, "num_warps": num_warps} | more
                if (key := tuple(sorted(found.items()))) not in seen:
                    seen.add(key)
                    yield found


def _tiles(kind: str, problem: Problem) -> list[tuple[int, int]]:
    """Tiles up to the size of what there is to put into them."""
    queries = max(16, next_power_of_2(problem.region_tokens))
    keys = max(16, next_power_of_2(problem.keys_per_query))
    own_keys = max(16, next_power_of_2(problem.kv_region_tokens))
    if kind == "k1_bwd":  # its tile holds a whole key region
        return [(64, own_keys), (128, own_keys)]
    heights, widths = _SIDES[kind]
    most_high = 128 if kind in ("gather_dkv", "image_fwd", "image_bwd") else queries
    most_wide = {"gather_dkv": own_keys, "image_fwd": 64, "image_bwd": 64}.get(kind, keys)
    rows = [n for n in heights if n <= most_high][-2:] or [heights[0]]
    columns = [n for n in widths if n <= most_wide][-2:] or [widths[0]]
    return [(m, n) for m in rows for n in columns]


# Queries and keys of a tile that are worth trying.
_SIDES = {
    "gather_fwd": ((16, 64, 128), (64, 128, 256)),
    "image_fwd": ((64, 128), (32, 64)),
    "gather_dq": ((16, 64, 128), (32, 64, 128)),
    "gather_dkv": ((64, 128), (16, 32, 64)),
    "image_bwd": ((64,), (32, 64)),
}


def _variants(kind: str, problem: Problem, block_n: int) -> Iterable[dict[str, int]]:
    """Settings beside the tile: heads that share a program, stages where there is a loop to pipeline."""
    if kind != "gather_fwd":
        return [{}]
    if problem.keys_per_query > block_n:
        return [{"num_stages": 1}, {"num_stages": 2}]
    return [{"heads_per_program": n, "num_stages": 1} for n in (1, 2) if problem.heads % n == 0]


@dataclass(frozen=True)
class _Ranked:
    settings: dict[str, int]
    us: float
    issue_us: float
    resident_warps: int


def best_settings(kind: str, problem: Problem, architecture: str) -> dict[str, Any] | None:
    """The table's entry of one kernel for one problem; None where no candidate is good.

    Args:
        kind: One of `bratune.kernels.launch.KINDS`.
        problem: The attention call.
        architecture: One of `bratune.kernels.launch.ARCHITECTURES`.
    """
    ranked = []
    for settings in candidates(kind, problem):
        try:
            launch = _compiled(kind, problem, settings, architecture)
        except UnsupportedError:
            continue
        found = launch.resources
        if found.stack_bytes <= _MOST_STACK and found.resident_warps >= _FEWEST_WARPS:
            cost = cost_of(launch, kind, problem, board_of(architecture))
            ranked.append(_Ranked(settings, cost.us, cost.issue_us, found.resident_warps))
    if not ranked:
        return None
    limit = _TIE * min(x.us for x in ranked)
    best = min((x for x in ranked if x.us <= limit), key=lambda x: (x.issue_us, -x.resident_warps))
    return {
        "kind": kind,
        "architecture": architecture,
        "class": problem_class(problem),
        "settings": best.settings,
        "evidence": "modelled",
        "us": round(best.us, 2),
    }


def _compiled(kind: str, problem: Problem, settings: Mapping[str, int], architecture: str) -> Launch:
    """The kernel alone: a forward kernel without, a backward kernel after the default forward pass."""
    config: dict[str, int | str] = {}
    for direction, families in (("forward", FORWARD), ("backward", BACKWARD)):
        for family, kernels in families.items():
            for prefix, name in kernels.items():
                if name == kind:
                    config = {direction: family} | {f"{prefix}_{k}": v for k, v in settings.items()}
    return attention_launches(problem, architecture, config)[kind]


def _kinds(problem: Problem) -> tuple[str, ...]:
    """The kernels of the preferred families."""
    forward, backward = forward_families(problem)[0], backward_families(problem)[0]
    return (*FORWARD[forward].values(), *BACKWARD[backward].values())


def _job(job: tuple[str, Problem, str]) -> dict[str, Any] | None:
    return best_settings(*job)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bratune.predict.launch_table", description=main.__doc__)
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="default: all of them")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default 2)")
    default = Path(__file__).resolve().parent.parent / "kernels" / "launch_table.json"
    parser.add_argument(
        "-o", "--output", type=Path, default=default, help="default: the table of this package"
    )
    given = parser.parse_args(arguments)
    for architecture in given.architecture or ARCHITECTURES:
        jobs = [(kind, problem, architecture) for problem in problems() for kind in _kinds(problem)]
        new = []
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            for job, entry in zip(jobs, pool.map(_job, jobs), strict=True):
                new += [entry] if entry else []
                print(f"{architecture} {job[0]}: {job[1]}", file=sys.stderr, flush=True)
        print(f"{_write(given.output, architecture, new)} entries in {given.output}", file=sys.stderr)
    return 0


def _write(path: Path, architecture: str, new: list[dict[str, Any]]) -> int:
    """Replace what a table holds of an architecture, save what was measured; returns its size."""
    old = json.loads(path.read_text("utf-8"))["entries"] if path.exists() else []
    kept = [x for x in old if x["evidence"] == "measured" or x["architecture"] != architecture]
    entries = _merged(kept, new)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    path.write_text(f'{{"schema": 1, "entries": [\n{lines}\n]}}\n', "utf-8")
    return len(entries)


def _merged(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per kind, architecture and class, in a fixed order; the kept ones win."""

    def key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
        return entry["kind"], entry["architecture"], json.dumps(entry["class"], sort_keys=True)

    found = {key(entry): entry for entry in (*new, *kept)}
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    sys.exit(main())
