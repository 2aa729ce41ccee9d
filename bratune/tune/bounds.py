"""Bounds on what may change the model: floors where there is no data, ceilings where there are weights.

Rankings of settings by trained accuracy differ so much between tasks that no score that never sees the
task can serve two of them. Without data a setting is therefore only required not to see less than the
authors' own: at least as many keys per query in every stage, and regions that are not larger.
"""

from __future__ import annotations

import math

from bratune.tune.setting import Bounds, Setting
from bratune.tune.space import Space

__all__ = ["checkpoint_bounds", "prior_bounds"]


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


def checkpoint_bounds(
    space: Space, reference: Setting, *, allow_model_changes: bool = False, allow_more_k: bool = False
) -> Bounds:
    """Limits for weights that were trained with a setting.

    By default nothing that changes the model may change. More keys than in training are not offered
    either unless asked for: they can cost a network that was trained sparse many points of accuracy, and can
    gain it some (docs/tune.md).
    """
    if not allow_model_changes:
        return Bounds(n_win=reference.n_win, topks=reference.topks)
    if allow_more_k:
        return Bounds()
    keys = []
    for i, (s, k) in enumerate(zip(reference.n_win, reference.topks, strict=True)):
        problem = space.stage(i, s, k).problem if i in space.routed else None
        keys.append(0 if problem is None else problem.keys_per_query)
    return Bounds(max_keys=tuple(keys))
