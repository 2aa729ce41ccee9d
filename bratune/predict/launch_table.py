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
from bratune.predict.compile import Launch, Resources
from bratune.predict.cost import Cost, board_of, cost_of
from bratune.predict.offline import attention_launches
from bratune.problem import Problem
from bratune.suites.load import load, names
from bratune.variant import get_variant, stages

__all__ = ["best_settings", "candidates", "main", "problems"]

# A kernel with more local memory than this per thread, or fewer warps on an SM, hides no latency.
_MOST_STACK = 64
_FEWEST_WARPS = 8
# Scores of the largest tile that is tried.
_LARGEST_TILE = 64 * 256
# Estimates closer than this are ties; more warps than this on an SM decide none.
_TIE = 1.02
_ENOUGH_WARPS = 16
# One variant stands for all: others differ in the number of heads, not in the geometry of tiles.
_VARIANT = "biformer_small"
_BATCHES = (1, 128)


def problems(suites: Sequence[str] = ()) -> tuple[Problem, ...]:
    """The routed attention calls of suites in bfloat16, one for every geometry of tiles and batch.

    Of several maps with the same geometry the first stands for all: the lookup takes its entry for them.

    Args:
        suites: Names of suites; by default all of them.
    """
    found: dict[tuple[int, ...], Problem] = {}
    for name in suites or names():
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
    if kind in ("image_fwd", "image_bwd"):
        return [(64, 64), (128, 64)] if kind == "image_fwd" else [(64, 64)]
    if kind in ("k1_bwd", "gather_dkv"):  # queries are densified: their tile is full whatever the region
        return [(64, min(64, own_keys) if kind == "gather_dkv" else own_keys)]
    heights = sorted({min(queries, 64), min(queries, 128)})
    widths = sorted({min(keys, 64), min(keys, 256 if kind == "gather_fwd" else 64)})
    return [(m, n) for m in heights for n in widths if m * n <= _LARGEST_TILE]


def _variants(kind: str, problem: Problem, block_n: int) -> Iterable[dict[str, int]]:
    """Settings beside the tile: a pipeline where there is a loop, heads that share a program elsewhere."""
    if kind not in ("gather_fwd", "gather_dq"):
        return [{}]
    if problem.keys_per_query > block_n:
        return [{"num_stages": 2}]
    heads = (1, 2) if kind == "gather_fwd" and problem.heads % 2 == 0 else (1,)
    return [{"num_stages": 1} | ({"heads_per_program": n} if n > 1 else {}) for n in heads]


@dataclass(frozen=True)
class _Ranked:
    """A candidate that compiled, with what it is ranked by."""

    settings: dict[str, int]
    cost: Cost
    taken: Resources

    @property
    def tie_break(self) -> tuple[bool, int, float]:
        """No local memory, then warps that keep loads in flight, then fewer instructions."""
        return (
            self.taken.stack_bytes > 0,
            -min(self.taken.resident_warps, _ENOUGH_WARPS),
            self.cost.issue_us,
        )


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
            ranked.append(_Ranked(settings, cost_of(launch, kind, problem, board_of(architecture)), found))
    if not ranked:
        return None
    limit = _TIE * min(x.cost.us for x in ranked)
    best = min((x for x in ranked if x.cost.us <= limit), key=lambda x: x.tie_break)
    return {
        "kind": kind,
        "architecture": architecture,
        "class": problem_class(problem),
        "settings": best.settings,
        "evidence": "modelled",
        "us": round(best.cost.us, 2),
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
    parser.add_argument("--suite", action="append", choices=names(), help="default: all of them")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default 2)")
    default = Path(__file__).resolve().parent.parent / "kernels" / "launch_table.json"
    parser.add_argument(
        "-o", "--output", type=Path, default=default, help="default: the table of this package"
    )
    given = parser.parse_args(arguments)
    jobs = [
        (kind, problem, architecture)
        for architecture in given.architecture or ARCHITECTURES
        for problem in problems(given.suite or ())
        for kind in _kinds(problem)
    ]
    written = 0
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for job, entry in zip(jobs, pool.map(_job, jobs), strict=True):
            if entry:
                written = _write(given.output, [entry])
            print(f"{job[2]} {job[0]}: {job[1]}", file=sys.stderr, flush=True)
    print(f"{written} entries in {given.output}", file=sys.stderr)
    return 0


def _write(path: Path, new: list[dict[str, Any]]) -> int:
    """Put entries into a table, save where it holds a measured one of their class; returns its size."""
    old = json.loads(path.read_text("utf-8"))["entries"] if path.exists() else []
    measured = [entry for entry in old if entry["evidence"] == "measured"]
    entries = _merged(old, new, measured)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    path.write_text(f'{{"schema": 1, "entries": [\n{lines}\n]}}\n', "utf-8")
    return len(entries)


def _merged(*parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per kind, architecture and class, in a fixed order; later parts win."""

    def key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
        return entry["kind"], entry["architecture"], json.dumps(entry["class"], sort_keys=True)

    found = {key(entry): entry for part in parts for entry in part}
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    sys.exit(main())
