"""Make the table of launch settings without a GPU: ``python -m bratune.studies launch-table``.

For every architecture and every problem class of the suites, candidate settings of each kernel are
compiled; what spills or leaves too few warps on an SM is dropped (unless nothing else is left), the rest is
ranked by the offline cost model, and the best is written to ``kernels/fused/launch_table.json``. An entry
whose evidence is ``measured`` is never replaced.

The whole table takes about an hour of one core. Every entry is written when it is known, with the code it was
made by: ``--stale`` goes on with a run that was cut short, and after a change of the kernels or the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from bratune.errors import UnsupportedError
from bratune.kernels.fused.call import as_text, call_for, from_text
from bratune.kernels.fused.families import BACKWARD, FORWARD, backward_families, forward_families
from bratune.kernels.fused.launch import ARCHITECTURES, KINDS, hub_chunk, next_power_of_2, problem_class
from bratune.predict.compile import Launch, Resources
from bratune.predict.cost import Cost, board_of, cost_of, hub_us
from bratune.predict.offline import attention_launches, machine_of
from bratune.problem import Problem
from bratune.studies.execute_kernels import hash_of
from bratune.suites.load import load, names
from bratune.variant import get_variant, stages

__all__ = ["best_settings", "candidates", "chunk_for", "code_of", "kinds_of", "main", "problems"]

# A kernel with more local memory than this per thread, or fewer warps on an SM, hides no latency. Below,
# spilled registers cost the instructions that they are.
_MOST_STACK = 64
_FEWEST_WARPS = 8
_MOST_WARPS = 16
# Scores of the largest tile that is tried.
_LARGEST_TILE = 64 * 256
# Estimates closer than this are ties; more warps than this on an SM decide none.
_TIE = 1.02
_ENOUGH_WARPS = 16
# Where one architecture has the matrix units of another, or the same kind of them, what is best there and the
# rules are all that is tried.
_LIKE = {"sm86": "sm80", "sm89": "sm80", "sm120": "sm80", "sm100": "sm90"}
# One more launch must be a small share of the time, so that balanced routes do not pay for hubs.
_LAUNCH_US = 2.0
_LAUNCH_SHARE = 0.05


def problems(suites: Sequence[str] = ()) -> tuple[Problem, ...]:
    """The routed attention calls of suites in bfloat16, one for every problem class.

    Calls that differ in the number of images and heads alone follow each other.

    Args:
        suites: Names of suites; by default all that compare backends.
    """
    found: dict[tuple[int, ...], Problem] = {}
    for name in suites or [name for name in names() if not load(name).mixers]:
        suite = load(name)
        calls = [
            stage.problem
            for model in suite.models
            for batch in suite.batch_sizes
            for stage in stages(
                get_variant(model),
                *suite.image,
                batch=batch,
                n_win=suite.n_win,
                topks=suite.topks,
                dtype="bfloat16",
                direction="fwd-bwd",
            )
            if stage.kind == "routed" and stage.problem
        ]
        for problem in sorted(calls, key=lambda p: (p.height, p.heads, p.batch)):
            found.setdefault(tuple(problem_class(problem).values()), problem)
    return tuple(found.values())


def candidates(kind: str, problem: Problem) -> Iterator[dict[str, int]]:
    """Settings of a kernel that are worth compiling for a problem; the rules come first."""
    rules = KINDS[kind](problem)
    yield rules
    seen = {tuple(sorted(rules.items()))}
    if kind == "kv_stationary_fwd":
        yield from (found for found in _stationary(rules, problem) if found != rules)
        return
    if kind == "image_bwd":
        # Four tiles of queries are in registers whatever the tile of keys.
        for block_n in (16, 32, 64):
            for num_warps in (4, 8):
                found = rules | {"block_n": block_n, "num_warps": num_warps}
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


def _stationary(rules: dict[str, int], problem: Problem) -> Iterator[dict[str, int]]:
    """Groups up to those that fill an SM alone, two heads that share lines of L1, heads cut into fewer parts.

    Regions of a group are computed at the same time, each by warps of its own.
    """
    widest = next_power_of_2(problem.keys_per_query)
    for block_n in (rules["block_n"], widest) if 128 < widest <= 256 else (rules["block_n"],):
        each = max(1, block_n // 128)
        # A tile of many keys may spill unless its warps are twice as many, and has no room for two heads.
        tried = ((4, 1), (8, 1), (16, 1)) if each == 1 else ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
        for group, warps in tried:
            if group * warps * each > _MOST_WARPS:
                continue
            for heads in (1, 2) if problem.heads % 2 == 0 and each == 1 else (1,):
                for splits in sorted({1, rules["splits"]}):
                    yield rules | {
                        "block_n": block_n,
                        "group": group,
                        "splits": splits,
                        "heads_per_program": heads,
                        "num_warps": group * warps * each,
                    }


def _tiles(kind: str, problem: Problem) -> list[tuple[int, int]]:
    """Tiles up to the size of what there is to put into them."""
    queries = max(16, next_power_of_2(problem.region_tokens))
    keys = max(16, next_power_of_2(problem.keys_per_query))
    own_keys = max(16, next_power_of_2(problem.kv_region_tokens))
    if kind == "image_fwd":
        return [(32, 64), (64, 64), (128, 64)]
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


def _two(rules: dict[str, int], known: Mapping[str, int]) -> list[dict[str, int]]:
    other = rules | {key: known[key] for key in known if key != "chunk"}
    return [rules] if other == rules else [rules, other]


@dataclass(frozen=True)
class _Ranked:
    """A candidate that compiled, with what it is ranked by."""

    settings: dict[str, int]
    launch: Launch
    cost: Cost
    taken: Resources

    @property
    def is_good(self) -> bool:
        """Whether it may hide latency."""
        return self.taken.stack_bytes <= _MOST_STACK and self.taken.resident_warps >= _FEWEST_WARPS

    @property
    def tie_break(self) -> tuple[int, int, float]:
        """Least local memory, then warps that keep loads in flight, then fewer instructions."""
        return (
            self.taken.stack_bytes,
            -min(self.taken.resident_warps, _ENOUGH_WARPS),
            self.cost.issue_us,
        )


def best_settings(
    kind: str, problem: Problem, architecture: str, *, known: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """The table's entry of one kernel for one problem; None where no candidate compiles.

    Args:
        kind: One of `bratune.kernels.fused.launch.KINDS`.
        problem: The attention call.
        architecture: One of `bratune.kernels.fused.launch.ARCHITECTURES`.
        known: The best settings of an architecture like this one: only these and the rules are tried, unless
            none of them hides latency.
    """
    every = functools.partial(candidates, kind, problem)
    tried = every() if known is None else _two(KINDS[kind](problem), known)
    compiled = _compilable(kind, problem, architecture, tried)
    if known is not None and not any(x.is_good for x in compiled):
        compiled = _compilable(kind, problem, architecture, every())
    if not compiled:
        return None
    least = min(x.taken.stack_bytes for x in compiled)
    good = [x for x in compiled if x.is_good]
    ranked = good or [x for x in compiled if x.taken.stack_bytes == least]
    limit = _TIE * min(x.cost.us for x in ranked)
    best = min((x for x in ranked if x.cost.us <= limit), key=lambda x: x.tie_break)
    settings = dict(best.settings)
    if "chunk" in settings:
        alone_us = hub_us(best.launch, kind, problem, board_of(architecture))
        settings["chunk"] = chunk_for(problem, best.cost.us, alone_us)
    return {
        "kind": kind,
        "architecture": architecture,
        "class": problem_class(problem),
        "settings": settings,
        "evidence": "modelled",
        "us": round(best.cost.us, 2),
        "code": code_of(),
    }


def _compilable(
    kind: str, problem: Problem, architecture: str, tried: Iterable[dict[str, int]]
) -> list[_Ranked]:
    """Those that compile."""
    found = []
    for settings in tried:
        try:
            launch = _compiled(kind, problem, settings, architecture)
        except UnsupportedError:
            continue
        cost = cost_of(launch, kind, problem, board_of(architecture))
        found.append(_Ranked(settings, launch, cost, launch.resources))
    return found


def chunk_for(problem: Problem, us: float, alone_us: float) -> int:
    """Query regions that one program of a hub takes; 0 where hubs are better left whole.

    Args:
        problem: The attention call.
        us: The estimate of the kernel that walks over them, with balanced routes.
        alone_us: How long the program of a region works that everybody was routed to.
    """
    pays = alone_us > us and _LAUNCH_SHARE * us >= _LAUNCH_US
    return hub_chunk(problem) if pays else 0


def _compiled(kind: str, problem: Problem, settings: Mapping[str, int], architecture: str) -> Launch:
    """The kernel alone: a forward kernel without, a backward kernel after the default forward pass.

    How many images and heads there are decides its grid and hardly an instruction: those of one image of two
    heads stand for all.
    """
    config: dict[str, int | str] = {}
    for direction, families in (("forward", FORWARD), ("backward", BACKWARD)):
        for family, kernels in families.items():
            for prefix, name in kernels.items():
                if name == kind:
                    config = {direction: family} | {f"{prefix}_{k}": v for k, v in settings.items()}
    text = as_text(config)
    (programs,) = call_for(problem, text, machine_of(architecture)).grids[kind]
    code = _machine_code(kind, problem.replace(batch=1, heads=2, scale=0.0), text, architecture)
    return code.on_grid((programs, 1, 1))


@functools.lru_cache(maxsize=64)
def _machine_code(kind: str, problem: Problem, config: str, architecture: str) -> Launch:
    return attention_launches(problem, architecture, from_text(config))[kind]


def kinds_of(problem: Problem) -> tuple[str, ...]:
    """The kernels of the families that a problem may prefer, with and without a backward pass."""
    training, inference = (problem.replace(direction=name) for name in ("fwd-bwd", "fwd"))
    families = {f: None for p in (training, inference) for f in _contenders(forward_families(p))}
    forward = {kind: None for family in families for kind in FORWARD[family].values()}
    return (*forward, *BACKWARD[backward_families(training)[0]].values())


def _contenders(legal: tuple[str, ...]) -> tuple[str, ...]:
    """The family that rules prefer, and on small maps the one that may be cheaper."""
    return (legal[0], "stationary") if {"image", "stationary"} <= set(legal) else legal[:1]


_Job = tuple[str, Problem, str, Mapping[str, int] | None]


def _job(job: _Job) -> dict[str, Any] | None:
    kind, problem, architecture, known = job
    return best_settings(kind, problem, architecture, known=known)


_OWN = Path(__file__).resolve().parents[1] / "kernels" / "fused" / "launch_table.json"


@functools.cache
def code_of() -> str:
    """What stands for the kernels, the model that ranks them and what is tried."""
    root = Path(__file__).resolve().parents[1]
    kernels = (root / "kernels" / "fused").glob("*.py")
    model = [root / "predict" / f"{name}.py" for name in ("compile", "cost", "roofline", "sass", "targets")]
    return hash_of([*kernels, *model, Path(__file__)])


@click.command("launch-table")
@click.option(
    "--architecture",
    "architectures",
    multiple=True,
    type=click.Choice(ARCHITECTURES),
    help="All by default.",
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(tuple(KINDS)), help="All by default.")
@click.option("--suite", "suites", multiple=True, type=click.Choice(names()), help="All by default.")
@click.option("--missing", is_flag=True, help="Only what the table has no entry for.")
@click.option("--stale", is_flag=True, help="Only what this code made no entry for.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes that compile.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=_OWN, help="The package's by default."
)
def main(
    architectures: tuple[str, ...],
    kinds: tuple[str, ...],
    suites: tuple[str, ...],
    missing: bool,
    stale: bool,
    jobs: int,
    output: Path,
) -> None:
    """Compile candidate settings of the fused kernels, rank them by the cost model, and write the table."""
    written = 0
    with contextlib.ExitStack() as pools:
        each: Callable[..., Iterable[dict[str, Any] | None]] = map
        if jobs > 1:
            pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
            each = pools.enter_context(pool).map
        for architecture in architectures or ARCHITECTURES:
            asked = _jobs(architecture, kinds or tuple(KINDS), suites, output, missing=missing, stale=stale)
            for (kind, problem, *_), entry in zip(asked, each(_job, asked), strict=True):
                if entry:
                    written = _write(output, [entry])
                click.echo(f"{architecture} {kind}: {problem}", err=True)
    click.echo(f"{written} entries in {output}", err=True)


def _jobs(
    architecture: str, kinds: Sequence[str], suites: Sequence[str], output: Path, *,
    missing: bool, stale: bool,
) -> list[_Job]:  # fmt: skip
    """What is asked of one architecture, kernel by kernel."""
    entries = _entries(output)
    there = {_key(entry): entry["settings"] for entry in entries}
    done = {_key(entry) for entry in entries if missing or entry.get("code") == code_of()}
    like = _LIKE.get(architecture, "")
    return [
        (kind, problem, architecture, there.get(_key_of(kind, problem, like)))
        for kind in kinds
        for problem in problems(suites)
        if kind in kinds_of(problem)
        and not ((missing or stale) and _key_of(kind, problem, architecture) in done)
    ]


def _write(path: Path, new: list[dict[str, Any]]) -> int:
    """Put entries into a table, save where it holds a measured one of their class; returns its size."""
    old = _entries(path)
    measured = [entry for entry in old if entry["evidence"] == "measured"]
    entries = _merged(old, new, measured)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    path.write_text(f'{{"schema": 1, "entries": [\n{lines}\n]}}\n', "utf-8")
    return len(entries)


def _entries(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8"))["entries"] if path.exists() else []


def _key_of(kind: str, problem: Problem, architecture: str) -> tuple[str, str, str]:
    return _key({"kind": kind, "architecture": architecture, "class": problem_class(problem)})


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["kind"], entry["architecture"], json.dumps(entry["class"], sort_keys=True)


def _merged(*parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per kind, architecture and class, in a fixed order; later parts win."""
    found = {_key(entry): entry for part in parts for entry in part}
    return [found[name] for name in sorted(found)]
