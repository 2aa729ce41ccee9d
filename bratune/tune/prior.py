"""What can be said about a setting without any data: floors, and never a score.

Rankings of settings by trained accuracy differ so much between tasks that no score that never sees the
task can serve two of them. Without data a setting is therefore only required not to see less than the
authors' own: at least as many keys per query in every stage, and regions that are not larger.
"""

from __future__ import annotations

import math

from bratune.tune.space import Bounds, Setting, Space

__all__ = ["formula_optimum", "prior_bounds"]


def prior_bounds(space: Space, reference: Setting, *, omega: float = 1.0) -> Bounds:
    """Floors that keep a setting from seeing less than a reference does, at the smallest top-k each.

    Args:
        space: Model and resolution.
        reference: Usually the authors' setting at this resolution.
        omega: Share of the reference's keys per query that is enough.
    """
    keys, sides = [], []
    for i, (s, k) in enumerate(zip(reference.n_win, reference.topks, strict=True)):
        problem = space.stage(i, s, k).problem if i in space.routed else None
        if problem is None:
            keys.append(0)
            sides.append(float(max(space.height, space.width)))
            continue
        height, width = space.variant.maps(space.height, space.width)[i]
        stride = max(space.height / height, space.width / width)
        # Padding can make a region's keys outnumber the map's real tokens; more than all is not a floor.
        keys.append(math.ceil(omega * min(problem.keys_per_query, height * width)))
        sides.append(max(problem.kv_region) * stride)
    return Bounds(min_keys=tuple(keys), max_region_px=tuple(sides), floor_only=True)


def formula_optimum(tokens: int, topk: int) -> float:
    """The S that minimises the multiply-adds of routing and attention for a map of that many tokens.

    With C channels, level one costs ``2 C S**4`` (the paper counts the affinity twice) and level two
    ``2 k C (HW)**2 / S**2``; the minimum is at ``S = (k (HW)**2 / 2) ** (1/6)``. ``tokens`` are those of
    the stage's map, not pixels: 56 x 56 tokens and k = 1 give 13.0.

    Source: BiFormer, arXiv 2303.08810, equations 7 to 9.
    """
    return float((topk * tokens**2 / 2.0) ** (1.0 / 6.0))
