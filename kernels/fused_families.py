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

from bratune.problem import Problem

__all__ = ["BACKWARD", "FORWARD", "backward_families", "block_d", "forward_families", "power_of_2"]

# The kernels of every family by the prefix that their settings have in a configuration. The names are those
# of `bratune.kernels.launch.KINDS`.
FORWARD = {
    "gather": {"fwd": "gather_fwd"},
}
BACKWARD = {
    "gather": {"dq": "gather_dq", "dkv": "gather_dkv"},
    "key": {"dkv": "k1_bwd"},
}

# A whole key region must fit one tile for its program to see whole softmax rows.
_KEY_FAMILY_TOKENS = 128


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 16, the shortest side of a product of tiles."""
    return max(16, 1 << (n - 1).bit_length())


def block_d(problem: Problem) -> int:
    """Channels of a head as a tile holds them."""
    return power_of_2(problem.head_dim)


def forward_families(problem: Problem) -> tuple[str, ...]:
    """The forward families that can compute a problem, the preferred one first."""
    return ("gather",)


def backward_families(problem: Problem) -> tuple[str, ...]:
    """The backward families that can compute a problem, the preferred one first."""
    if problem.topk == 1 and problem.kv_region_tokens <= _KEY_FAMILY_TOKENS:
        return ("key", "gather")
    return ("gather",)
