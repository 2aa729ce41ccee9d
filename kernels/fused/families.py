"""The families of fused kernels: which are legal for a problem and which is preferred.

Three ways to compute the same forward pass. ``gather``: a program per tile of queries reads its routed keys;
the general one. ``stationary``: a program stays with one head of one image and goes through its regions, so
that keys and values are re-read from the L1 cache; for regions of few tokens, whose keys would otherwise be
read topk times from L2. ``image``: maps of at most 256 tokens, attended to in full under the table of routes;
routing saves no time on them, and the backward pass becomes one kernel.

Three backward passes: ``gather`` (two kernels, general), ``key`` (one kernel, where topk is 1) and ``image``.
All share the order of the statistics, so every forward family goes with every backward family.
"""

from __future__ import annotations

from bratune.problem import Problem, ceil_div

__all__ = [
    "BACKWARD",
    "FORWARD",
    "IMAGE_REGIONS",
    "TABLE_ROW_BYTES",
    "backward_families",
    "block_d",
    "forward_families",
    "power_of_2",
]

# The kernels of every family by the prefix that their settings have in a configuration. The names are those
# of `bratune.kernels.fused.launch.KINDS`.
FORWARD = {
    "gather": {"fwd": "gather_fwd"},
    "stationary": {"fwd": "kv_stationary_fwd"},
    "image": {"fwd": "image_fwd"},
}
BACKWARD = {
    "gather": {"dq": "gather_dq", "dkv": "gather_dkv"},
    "key": {"dkv": "k1_bwd"},
    "image": {"dkv": "image_bwd"},
}

# A map is small up to here; a row of its table of counts has a place for every region.
IMAGE_REGIONS = 64
TABLE_ROW_BYTES = 2 * IMAGE_REGIONS
_IMAGE_TOKENS = 256
# One tile of the image family's backward pass holds q, and another one its gradient, of a whole map.
_IMAGE_TILE_BYTES = 32 * 1024
# A whole key region must fit one tile for its program to see whole softmax rows.
_KEY_FAMILY_TOKENS = 128
# What the stationary family was tried with: keys of a query, and bytes of them.
_STATIONARY_KEYS = 256
_STATIONARY_TILE_BYTES = 16 * 1024
# From here on a region fills a tile by itself, and its keys are not read often enough to be worth keeping.
_LARGE_REGION = 48
# Keys and values of a head that an L1 cache of 128 KiB and more can keep.
_L1_BYTES = 128 * 1024
# Programs of the stationary family below which a GPU would stand idle.
_FEW_PROGRAMS = 256


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 16, the shortest side of a product of tiles."""
    return max(16, 1 << (n - 1).bit_length())


def block_d(problem: Problem) -> int:
    """Channels of a head as a tile holds them."""
    return power_of_2(problem.head_dim)


def forward_families(problem: Problem) -> tuple[str, ...]:
    """The forward families that can compute a problem, the preferred one first."""
    legal = ["gather"]
    row_bytes = block_d(problem) * problem.item_bytes
    keys = power_of_2(problem.keys_per_query)
    if (
        problem.region_tokens <= _LARGE_REGION
        and keys <= _STATIONARY_KEYS
        and keys * row_bytes <= _STATIONARY_TILE_BYTES
    ):
        legal.insert(0 if _keeps_keys(problem, row_bytes) else 1, "stationary")
    if _is_small_map(problem):
        # Counted instructions: routing pays below about a 23rd of the map per token of a region. Where the
        # launch table knows what both families take, that decides instead (`bratune.kernels.fused.call`).
        pays = 23 * problem.topk < problem.region_tokens * problem.kv_regions
        legal.insert(1 if pays and not problem.backward else 0, "image")
    return tuple(legal)


def backward_families(problem: Problem) -> tuple[str, ...]:
    """The backward families that can compute a problem, the preferred one first."""
    legal = ["gather"]
    if problem.topk == 1 and problem.kv_region_tokens <= _KEY_FAMILY_TOKENS:
        legal.insert(0, "key")
    tile_bytes = power_of_2(_padded_tokens(problem)) * block_d(problem) * problem.item_bytes
    if _is_small_map(problem) and tile_bytes <= _IMAGE_TILE_BYTES:
        legal.insert(0, "image")
    return tuple(legal)


def _padded_tokens(problem: Problem) -> int:
    return problem.regions * problem.region_tokens


def _is_small_map(problem: Problem) -> bool:
    return (
        problem.same_regions and _padded_tokens(problem) <= _IMAGE_TOKENS and problem.regions <= IMAGE_REGIONS
    )


def _keeps_keys(problem: Problem, row_bytes: int) -> bool:
    """Whether keys and values of a head stay in L1, and enough programs do so at a time."""
    kept = 2 * problem.kv_regions * problem.kv_region_tokens * row_bytes
    programs = problem.batch * problem.heads * ceil_div(problem.regions, 4)
    return kept <= _L1_BYTES and programs >= _FEW_PROGRAMS
