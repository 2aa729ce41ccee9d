"""Call: everything about a fused call that does not depend on the tensors' contents, worked out once.

A forward pass of a small map takes a few microseconds on the device, so what surrounds it on the host counts:
families, tiles, grids and compile-time constants of a problem are looked up here by its numbers.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bratune.backend import Config
from bratune.errors import ConfigError
from bratune.kernels.fused import launch
from bratune.kernels.fused.families import (
    BACKWARD,
    FORWARD,
    backward_families,
    block_d,
    forward_families,
    power_of_2,
)
from bratune.machine import Machine
from bratune.problem import Problem, ceil_div

__all__ = [
    "INTERPRETING",
    "Call",
    "as_text",
    "call_for",
    "from_text",
    "full_config",
    "is_compiled_in",
    "is_wide",
    "precision",
    "route_strides",
    "statistics_planes",
]

# Triton reads this once, when it is imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

_LOG2_E = math.log2(math.e)
_INT32_NUMBERS = 2**31
_MOST_DIVIDED = 2**20

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """How one problem is launched.

    Attributes:
        forward: The forward family, of `fused_families.FORWARD`.
        backward: The backward family, of `fused_families.BACKWARD`.
        kernels: By kernel, its compile-time constants and launch options.
        grids: By kernel, its number of programs, and for ``hub`` that of the kernel which adds up parts of
            a hub. All are on the first axis of the grid, which alone may exceed 65535.
        sizes: Sizes of both maps in the order in which kernels take them.
        geometry: Regions, their sides and how many are in a row, of queries and of keys: eight numbers. Where
            `is_compiled_in` says so, kernels have them as constants too.
        stretches: Programs of `gather_bwd_dkv` for parts of hubs, per image, head and tile.
        logit_scale: What turns a product of q and k into an exponent of two.
        scale: What the gradients of q and k are multiplied with.
        planes: Numbers that are kept of every query for the backward pass: its base-2 log-sum-exp; in float32
            its maximum and the logarithm of its sum apart, see `bratune.kernels.fused.tiles`.
        delta_shape: ``[B, heads, rows]``, a number for every query, in the order of the regions and with
            padding.
        kv_regions: Key regions.
    """

    forward: str
    backward: str
    kernels: Mapping[str, Settings]
    grids: Mapping[str, tuple[int]]
    sizes: tuple[int, int, int, int]
    geometry: tuple[int, ...]
    stretches: int
    logit_scale: float
    scale: float
    planes: int
    delta_shape: tuple[int, int, int]
    kv_regions: int

    @property
    def lse_shape(self) -> tuple[int, int, int, int]:
        """Shape of the statistics, ``[B, heads, planes, rows]``."""
        batch, heads, rows = self.delta_shape
        return batch, heads, self.planes, rows


@functools.lru_cache(maxsize=4096)
def call_for(problem: Problem, settings: str, machine: Machine) -> Call:
    """The launch of a problem.

    Args:
        problem: The call in numbers; the backward pass is prepared where its direction has one.
        settings: Settings that are not left to the table, as `as_text` writes them.
        machine: Where it runs.

    Raises:
        ConfigError: a setting is unknown or not legal for this problem.
    """
    config = full_config(problem, from_text(settings), machine)
    kernels: dict[str, Settings] = {}
    grids: dict[str, tuple[int]] = {}
    stretches = 0
    for prefix, kernel in _used(str(config["forward"]), str(config["backward"])).items():
        own = {
            key.removeprefix(f"{prefix}_"): int(value)
            for key, value in config.items()
            if key.startswith(f"{prefix}_")
        }
        constants, programs = _LAUNCHES[kernel](problem, own)
        options = {key: own[key] for key in ("num_warps", "num_stages")}
        kernels[kernel] = constants | options
        grids[kernel] = (programs,)
        if constants.get("CHUNK"):
            stretches = _stretches(problem, constants["CHUNK"])
            grids["hub"] = (programs // (stretches + problem.kv_regions) * stretches,)
    return Call(
        forward=str(config["forward"]),
        backward=str(config["backward"]),
        kernels=kernels,
        grids=grids,
        sizes=(problem.height, problem.width, problem.kv_height, problem.kv_width),
        geometry=tuple(_regions(problem).values()),
        stretches=stretches,
        logit_scale=problem.scale * _LOG2_E,
        scale=problem.scale,
        planes=statistics_planes(problem.dtype),
        delta_shape=(problem.batch, problem.heads, problem.regions * problem.region_tokens),
        kv_regions=problem.kv_regions,
    )


def full_config(problem: Problem, given: Mapping[str, int | str], machine: Machine) -> dict[str, int | str]:
    """Every setting of a call: those that are given, and the table's for the rest.

    Keys: ``forward`` and ``backward`` are families, ``fwd_*``, ``dq_*`` and ``dkv_*`` settings of the
    kernels; a backward pass of one kernel has ``dkv_*`` only.

    Raises:
        ConfigError: a family cannot compute this problem, or a setting is not known to the families.
    """
    chosen = {}
    for key, legal in (("forward", forward_families(problem)), ("backward", backward_families(problem))):
        family = str(given.get(key) or _preferred(key, legal, problem, machine))
        if family not in legal:
            raise ConfigError(
                f"{key} family {family!r} cannot compute {problem}; these can: {', '.join(legal)}"
            )
        chosen[key] = family
    config: dict[str, int | str] = dict(chosen)
    for prefix, kernel in _used(**chosen).items():
        for key, value in launch.settings_for(kernel, problem, machine).items():
            config[f"{prefix}_{key}"] = int(value)
    for key, setting in given.items():
        if key not in config:
            raise ConfigError(f"setting {key!r} is not one of {', '.join(config)}")
        config[key] = setting if key in chosen else int(setting)
    return config


def _preferred(direction: str, legal: tuple[str, ...], problem: Problem, machine: Machine) -> str:
    """The family that is taken: for regions of few tokens the cheapest one, as far as that is known."""
    if direction == "forward" and "stationary" in legal:
        for rivals in (legal, tuple(family for family in legal if family != "gather")):
            kinds = {FORWARD[family]["fwd"]: family for family in rivals}
            if len(kinds) > 1 and (kind := launch.cheapest(tuple(kinds), problem, machine)):
                return kinds[kind]
    return legal[0]


def statistics_planes(dtype: str) -> int:
    """Numbers that are kept of every query: half types are too coarse to see what the second one saves."""
    return 2 if dtype == "float32" else 1


def _used(forward: str, backward: str) -> dict[str, str]:
    return FORWARD[forward] | BACKWARD[backward]


# --- compile-time constants of every kernel --------------------------------------------------------


def is_compiled_in(size: Sequence[int], region: Sequence[int]) -> bool:
    """Whether the sides of regions are constants of a kernel: for maps whose size is likely to stay.

    A constant saves divisions, and costs a compilation for every new size. Square maps that regions tile come
    from crops; where sides are powers of two there are few of them. Pictures for detection have neither.

    Args:
        size: Height and width of a map.
        region: Height and width of its regions.
    """
    (height, width), (rh, rw) = size, region
    even = height % rh == 0 and width % rw == 0
    return even and (height == width or (rh & (rh - 1) == 0 and rw & (rw - 1) == 0))


def _regions(problem: Problem) -> dict[str, int]:
    (rh, rw), (krh, krw) = problem.region, problem.kv_region
    return {
        "REGIONS": problem.regions,
        "RH": rh,
        "RW": rw,
        "GRID_W": problem.grid[1],
        "KV_REGIONS": problem.kv_regions,
        "KRH": krh,
        "KRW": krw,
        "KV_GRID_W": problem.kv_grid[1],
    }


def _is_static(problem: Problem) -> bool:
    # Up to so many tokens the kernels divide fast by sizes that they are given, see `split` in tiles.
    tokens = max(problem.regions * problem.region_tokens, problem.kv_regions * problem.kv_region_tokens)
    if tokens * problem.topk > _MOST_DIVIDED:
        return True
    return is_compiled_in((problem.height, problem.width), problem.region) and is_compiled_in(
        (problem.kv_height, problem.kv_width), problem.kv_region
    )


def _geometry(problem: Problem) -> dict[str, Any]:
    """Constants of every kernel; regions are 0 where they are known at the launch only."""
    regions = _regions(problem)
    del regions["KV_REGIONS"]
    if not _is_static(problem):
        regions = dict.fromkeys(regions, 0)
    return regions | {
        "HEADS": problem.heads,
        "TOPK": problem.topk,
        "D": problem.head_dim,
        "BLOCK_D": block_d(problem),
        "EVEN": problem.padded == (problem.height, problem.width),
        "KV_EVEN": problem.kv_padded == (problem.kv_height, problem.kv_width),
        "MASKED": problem.padding == "masked",
    }


def _gather_fwd(problem: Problem, own: Settings) -> tuple[dict[str, Any], int]:
    # A tile of several heads is a saving, so the next number of heads that works will do.
    heads = math.gcd(own.get("heads_per_program", 1), problem.heads)
    tiles = ceil_div(problem.region_tokens, own["block_m"])
    constants = {
        "BLOCK_M": own["block_m"],
        "BLOCK_N": own["block_n"],
        "ONE_TILE": problem.keys_per_query <= own["block_n"],
        "HEADS_PER_PROGRAM": heads,
        "PER_HEAD": problem.per_head,
    }
    return _geometry(problem) | constants, problem.batch * problem.regions * tiles * (problem.heads // heads)


def _gather_dq(problem: Problem, own: Settings) -> tuple[dict[str, Any], int]:
    tiles = ceil_div(problem.region_tokens, own["block_m"])
    constants = {"BLOCK_M": own["block_m"], "BLOCK_N": own["block_n"]}
    return _geometry(problem) | constants, problem.batch * problem.regions * tiles * problem.heads


def _gather_dkv(problem: Problem, own: Settings) -> tuple[dict[str, Any], int]:
    tiles = ceil_div(problem.kv_region_tokens, own["block_n"])
    chunk = own.get("chunk", 0)
    stretches = _stretches(problem, chunk)
    static = _is_static(problem)
    constants = {
        "KV_REGIONS": problem.kv_regions if static else 0,
        "BLOCK_M": own["block_m"],
        "BLOCK_N": own["block_n"],
        "PER_HEAD": problem.per_head,
        "FUSE_DQ": False,
        # A list that one chunk holds has nothing to cut.
        "CHUNK": chunk if stretches else 0,
        "STRETCHES": stretches if static else 0,
    }
    units = stretches + problem.kv_regions
    return _geometry(problem) | constants, problem.batch * units * tiles * problem.heads


def _stretches(problem: Problem, chunk: int) -> int:
    return (problem.regions * problem.topk - 1) // chunk if chunk else 0


def _k1_bwd(problem: Problem, own: Settings) -> tuple[dict[str, Any], int]:
    # The program of a key region must see whole softmax rows: its tile is never smaller than the region.
    block_n = max(own["block_n"], power_of_2(problem.kv_region_tokens))
    constants, programs = _gather_dkv(problem, {**own, "block_n": block_n})
    return constants | {"FUSE_DQ": True}, programs


def _kv_stationary_fwd(problem: Problem, own: Settings) -> tuple[dict[str, Any], int]:
    group = own.get("group", 1)
    # The settings say how many parts the regions of a head are cut into; no part is smaller than a group.
    splits = min(own.get("splits", 1), ceil_div(problem.regions, group))
    heads = math.gcd(own.get("heads_per_program", 1), problem.heads)
    constants = {
        "BLOCK_M": max(own["block_m"], 1 << (problem.region_tokens - 1).bit_length()),
        "BLOCK_N": own["block_n"],
        "ONE_TILE": problem.keys_per_query <= own["block_n"],
        "GROUP": group,
        "SPLITS": splits,
        "HEADS_PER_PROGRAM": heads,
        "PER_HEAD": problem.per_head,
    }
    return _geometry(problem) | constants, problem.batch * (problem.heads // heads) * splits


def _image_geometry(problem: Problem) -> dict[str, Any]:
    # Maps are small, and there are few of them: their regions are always compiled in.
    names = ("REGIONS", "HEADS", "RH", "RW", "GRID_W", "D", "BLOCK_D", "EVEN", "MASKED")
    geometry = _geometry(problem) | _regions(problem)
    return {name: geometry[name] for name in names} | {"PER_HEAD": problem.per_head}


def _span(problem: Problem, keys: int) -> int:
    """Regions that a tile of keys may touch, as a side of a product."""
    return power_of_2((keys - 1) // problem.region_tokens + 2)


def _image_tiles(problem: Problem, own: Settings) -> dict[str, Any]:
    tokens = problem.regions * problem.region_tokens
    rest = tokens % own["block_n"]
    tail = power_of_2(rest) if rest else 0
    return _image_geometry(problem) | {
        "BLOCK_M": own["block_m"],
        "BLOCK_N": own["block_n"],
        "SPAN": _span(problem, own["block_n"]),
        "TAIL": tail,
        "TAIL_SPAN": _span(problem, max(tail, 1)),
    }


def _image_fwd(problem: Problem, own: Settings) -> tuple[dict[str, Any], int]:
    tiles = ceil_div(problem.regions * problem.region_tokens, own["block_m"])
    return _image_tiles(problem, own), problem.batch * problem.heads * tiles


def _image_bwd(problem: Problem, own: Settings) -> tuple[dict[str, Any], int]:
    # The kernel has registers for four tiles of queries.
    tokens = problem.regions * problem.region_tokens
    least = power_of_2(ceil_div(tokens, 4))
    own = {**own, "block_m": max(own["block_m"], least)}
    rest = tokens % own["block_m"]
    last = power_of_2(rest) if rest else own["block_m"]
    return _image_tiles(problem, own) | {"LAST": last}, problem.batch * problem.heads


_LAUNCHES: Mapping[str, Callable[[Problem, Settings], tuple[dict[str, Any], int]]] = {
    "gather_fwd": _gather_fwd,
    "kv_stationary_fwd": _kv_stationary_fwd,
    "image_fwd": _image_fwd,
    "gather_dq": _gather_dq,
    "gather_dkv": _gather_dkv,
    "k1_bwd": _k1_bwd,
    "image_bwd": _image_bwd,
}


# --- what depends on the tensors --------------------------------------------------------------------


def route_strides(routes: Tensor) -> tuple[int, int, int, int]:
    """Strides of image, head, region and slot; routes shared by the heads have a head stride of 0."""
    strides = routes.stride()
    return strides if len(strides) == 4 else (strides[0], 0, *strides[1:])  # type: ignore[return-value]


def is_wide(*maps: Tensor) -> bool:
    """Whether an image of one of these maps spans 2^31 numbers, so that its addresses need 64 bits."""
    for t in maps:
        _, height, width, channels = t.shape
        _, y, x, c = t.stride()
        if y * (height - 1) + x * (width - 1) + c * (channels - 1) >= _INT32_NUMBERS:
            return True
    return False


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """How tiles are multiplied: float32 in TF32 where PyTorch's own products are allowed to be."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": INTERPRETING and dtype == torch.bfloat16,
    }


# --- a configuration as text ------------------------------------------------------------------------


def as_text(config: Config | None) -> str:
    """A configuration as one string, which an operator of PyTorch can take."""
    if not config:
        return ""
    return ",".join(f"{key}={value}" for key, value in config.items())


def from_text(text: str) -> dict[str, int | str]:
    """The inverse of `as_text`."""
    pairs = (item.split("=") for item in text.split(",") if item)
    return {key: int(value) if value.isdigit() else value for key, value in pairs}
