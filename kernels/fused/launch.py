"""Launch settings of the Triton kernels: tile sizes, warps and pipeline stages, read from a table.

Settings change what a kernel costs, never what it computes. They are data: ``launch_table.json`` holds
them by architecture and problem class, made offline by ``python -m bratune.studies.launch_table`` and
replaced by measured entries where a GPU was at hand. `settings_for` is a pure function of the table: it
times nothing, and gives every process of a distributed run the same answer.

A *problem class* is what the best settings depend on: the geometry of a tile (tokens of a region, keys of
a query, head dimension, item size) and the amount of work (regions, heads, programs). The lookup takes
the entry of exactly this class; else, of the entries with the same tile geometry, the one whose amount of
work is nearest; else the rules below, which are legal for every problem.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bratune.errors import UnknownNameError
from bratune.machine import Machine, release
from bratune.problem import Problem, ceil_div

__all__ = [
    "ARCHITECTURES",
    "KINDS",
    "OLDEST_TRITON",
    "Settings",
    "architecture",
    "architecture_of",
    "cheapest",
    "hub_chunk",
    "lookup",
    "missing_triton",
    "next_power_of_2",
    "not_here",
    "problem_class",
    "settings_for",
]

Settings = Mapping[str, int]

# The oldest release that the kernels were run with.
OLDEST_TRITON = (3, 6)

# Architectures the table is made for; others take the newest one that is not newer than they are.
ARCHITECTURES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")

# Keys of a problem class that decide which tiles are legal and how full they are: these must agree.
_GEOMETRY = (
    "tile_tokens",
    "tile_keys",
    "kv_tile_tokens",
    "tile_dim",
    "tile_v_dim",
    "item_bytes",
    "kernel_size",
    "tile_channels",
)


def missing_triton() -> list[str]:
    """Why what is installed here cannot compile the kernels, in one sentence; empty: it can."""
    if importlib.util.find_spec("triton") is None:
        return ["needs the package triton, which is not installed: pip install triton"]
    found = _installed_triton()
    if release(found) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return [f"needs triton {oldest} or newer, found {found}; a newer torch brings it along"]
    return []


@functools.cache
def _installed_triton() -> str:
    return importlib.metadata.version("triton")


def not_here(device: str) -> list[str]:
    """Every reason for which Triton kernels cannot run on tensors of a device; empty: they can."""
    reasons = missing_triton()
    if not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"the tensors are on {device}; Triton needs a GPU, or TRITON_INTERPRET=1 to be slow")
    return reasons


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def architecture_of(machine: Machine) -> str:
    """The architecture class of the table that a machine belongs to; empty for a CPU."""
    return architecture(machine.capability) if machine.is_cuda else ""


def architecture(capability: tuple[int, int]) -> str:
    """The architecture class of a compute capability."""
    major, minor = capability
    return max(
        (name for name in ARCHITECTURES if int(name[2:]) <= 10 * major + minor),
        key=lambda name: int(name[2:]),
        default=ARCHITECTURES[0],
    )


def problem_class(problem: Problem) -> dict[str, int]:
    """What the best settings of an attention kernel depend on."""
    return {
        "tile_tokens": next_power_of_2(problem.region_tokens),
        "tile_keys": next_power_of_2(problem.keys_per_query),
        "kv_tile_tokens": next_power_of_2(problem.kv_region_tokens),
        "tile_dim": next_power_of_2(problem.head_dim),
        "tile_v_dim": next_power_of_2(problem.v_head_dim),
        "item_bytes": problem.item_bytes,
        "regions": problem.regions,
        "heads": problem.heads,
        "programs": next_power_of_2(problem.batch * problem.heads * problem.regions),
    }


def settings_for(kind: str, problem: Problem, machine: Machine) -> dict[str, int]:
    """The launch settings of one kernel for one problem.

    Args:
        kind: What the kernel does, one of `KINDS`.
        problem: The attention call.
        machine: Where it runs; a CPU (Triton's interpreter) gets the rules.

    Returns:
        Settings by name, e.g. ``{"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 1}``.

    Raises:
        UnknownNameError: no kernel is of that kind.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of kernel", kind, KINDS)
    return dict(_settings_for(kind, problem, architecture_of(machine)))


@functools.lru_cache(maxsize=4096)
def _settings_for(kind: str, problem: Problem, architecture: str) -> tuple[tuple[str, int], ...]:
    found = lookup(kind, problem_class(problem), architecture)
    return tuple((KINDS[kind](problem) | dict(found or {})).items())


def lookup(kind: str, what: Mapping[str, int], architecture: str) -> Settings | None:
    """The table's entry for a kind of kernel and a problem class; None when none has its tile geometry."""
    geometry = _geometry(what)
    rows = [row for row in _table().get((kind, architecture), ()) if _geometry(row["class"]) == geometry]
    if not rows:
        return None
    best = min(rows, key=lambda row: (_distance(row["class"], what), json.dumps(row["class"])))
    settings: Settings = best["settings"]
    return settings


def cheapest(kinds: Sequence[str], problem: Problem, machine: Machine) -> str:
    """Which of several kernels takes least, by the table's times for the nearest problem class.

    Args:
        kinds: Kernels that compute the same, of `KINDS`.
        problem: The attention call.
        machine: Where it runs.

    Returns:
        One of them; empty where the table has no class of this geometry, with one evidence, for all.
    """
    what, architecture = problem_class(problem), architecture_of(machine)
    times: list[dict[str, float]] = []
    for kind in kinds:
        rows = [r for r in _table().get((kind, architecture), ()) if _geometry(r["class"]) == _geometry(what)]
        times.append({json.dumps([r["class"], r["evidence"]], sort_keys=True): r["us"] for r in rows})
    common = set(times[0]).intersection(*times)
    if not common:
        return ""
    nearest = min(common, key=lambda key: (_distance(json.loads(key)[0], what), key))
    return min(zip(kinds, times, strict=True), key=lambda pair: pair[1][nearest])[0]


def _geometry(what: Mapping[str, int]) -> tuple[int | None, ...]:
    return tuple(what.get(key) for key in _GEOMETRY)


def _distance(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """How far apart two amounts of work are: factors of two, summed over what is counted."""
    keys = (a.keys() | b.keys()) - set(_GEOMETRY)
    return sum(abs(math.log2(a.get(key, 1) / b.get(key, 1))) for key in keys)


@functools.cache
def _table() -> dict[tuple[str, str], tuple[Mapping[str, Any], ...]]:
    text = importlib.resources.files("bratune.kernels.fused").joinpath("launch_table.json").read_text("utf-8")
    found: dict[tuple[str, str], tuple[Mapping[str, Any], ...]] = {}
    for row in json.loads(text)["entries"]:
        key = (row["kind"], row["architecture"])
        found[key] = (*found.get(key, ()), row)
    return found


def hub_chunk(problem: Problem) -> int:
    """Query regions of one program where a hub is split; 0 where no key region can have enough of them.

    A chunk is eight times what a key region has on average, and the largest hub at least four chunks.
    """
    chunk = 8 * ceil_div(problem.regions * problem.topk, problem.kv_regions)
    return chunk if problem.regions >= 4 * chunk else 0


# --- rules: legal for every problem, good for the published shapes ----------------------------


def _clamp(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))


def _most_keys(problem: Problem) -> int:
    """Keys of a tile that registers can hold: 256 at 32 channels of two bytes, fewer for wider heads."""
    row_bytes = next_power_of_2(max(problem.head_dim, problem.v_head_dim)) * problem.item_bytes
    return _clamp(256 * 64 // row_bytes, 32, 256)


def _warps(problem: Problem, block_m: int, block_n: int) -> int:
    """A warp for every 1024 scores or sums of a tile: fewer spill, more leave warps without rows.

    Products of float32 numbers may have to do without matrix units; what they hold then fills four warps.
    """
    if problem.item_bytes > 2:
        return 4
    return _clamp(block_m * max(block_n, next_power_of_2(problem.head_dim)) // 1024, 1, 4)


def _gather_fwd(problem: Problem) -> dict[str, int]:
    tokens = next_power_of_2(problem.region_tokens)
    block_m = 128 if tokens >= 512 else _clamp(tokens, 16, 64)
    most = 64 if block_m == 128 else _most_keys(problem)
    block_n = _clamp(next_power_of_2(problem.keys_per_query), 16, most)
    if block_n < problem.keys_per_query:  # a running softmax beside a tile of more keys spills
        block_n = min(block_n, 64)
    return {
        "block_m": block_m,
        "block_n": block_n,
        "heads_per_program": 1,
        "num_warps": _warps(problem, block_m, block_n),
        # A pipeline of loads pays only where there is a loop.
        "num_stages": 1 if block_n >= problem.keys_per_query else 2,
    }


def _kv_stationary_fwd(problem: Problem) -> dict[str, int]:
    block_n = _clamp(next_power_of_2(problem.keys_per_query), 16, _most_keys(problem))
    if block_n > 128:  # tiles of 256 keys spill
        block_n = 64
    # A GPU of 132 SMs wants about 512 programs of four warps; each keeps to one head of one image.
    splits = _clamp(512 // (problem.batch * problem.heads), 1, 8)
    return {
        "block_m": 16,
        "block_n": block_n,
        "group": 4,
        "splits": splits,
        "heads_per_program": 1,
        "num_warps": 4,
        # Pipelined loads bypass L1, where this kernel keeps keys and values.
        "num_stages": 1,
    }


def _image(problem: Problem) -> dict[str, int]:
    return {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 1}


def _image_bwd(problem: Problem) -> dict[str, int]:
    # Tiles of 64 keys are faster where they fit, but take more tensor memory than an sm100 has.
    return {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 1}


def _query_stationary_bwd(problem: Problem) -> dict[str, int]:
    block_m = _clamp(next_power_of_2(problem.region_tokens), 16, 64)
    block_n = _clamp(next_power_of_2(problem.keys_per_query), 16, min(64, _most_keys(problem)))
    return {
        "block_m": block_m,
        "block_n": block_n,
        "num_warps": _warps(problem, block_m, block_n),
        "num_stages": 1 if block_n >= problem.keys_per_query else 2,
    }


def _key_stationary_bwd(problem: Problem) -> dict[str, int]:
    block_n = _clamp(next_power_of_2(problem.kv_region_tokens), 16, min(64, _most_keys(problem)))
    # One warp holds a tile of 16 keys and both of its sums, as long as heads are narrow.
    one = block_n == 16 and problem.head_dim <= 32 and problem.item_bytes <= 2
    return {
        "block_m": 64,
        "block_n": block_n,
        # Query regions after which the list of a hub is cut, see `gather_bwd`; 0 leaves hubs whole.
        "chunk": 0,
        "num_warps": 1 if one else 4,
        "num_stages": 1,
    }


# How each kind of attention kernel is launched where the table has nothing for it.
KINDS: Mapping[str, Callable[[Problem], dict[str, int]]] = {
    "gather_fwd": _gather_fwd,
    "kv_stationary_fwd": _kv_stationary_fwd,
    "image_fwd": _image,
    "gather_dq": _query_stationary_bwd,
    "gather_dkv": _key_stationary_bwd,
    "k1_bwd": _key_stationary_bwd,
    "image_bwd": _image_bwd,
}
