"""The accounting of the runtime on a CPU: every part has its time once, and its floor follows from counts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bratune.kernels.biformer import biformer_tiny
from bratune.kernels.native import block
from bratune.kernels.native.whole import PARTS
from bratune.kernels.runtime import FastModel
from bratune.studies.cpu_parts import FULL, REST, Clock, floors, table

MODEL: dict[str, Any] = {"num_classes": 10, "n_win": 2, "topks": (1, 2, 3, -2), "depth": (1, 1, 1, 1)}


def test_what_is_inside_a_part_is_not_counted_twice() -> None:
    torch.manual_seed(0)
    fast = FastModel(biformer_tiny(**MODEL).eval(), native=False)
    clock = Clock(fast)
    start = time.perf_counter()
    fast(torch.randn(1, 3, 64, 64))
    assert sum(clock.seconds.values()) <= time.perf_counter() - start
    assert set(clock.seconds) == {*PARTS, FULL} - {"routing"}  # which is inside attention


def test_floors_count_every_multiply_add_and_every_map_once() -> None:
    fast = FastModel(biformer_tiny(**MODEL).eval(), native=False)
    clock = Clock(fast)
    fast(torch.randn(1, 3, 64, 64))
    found = [floors(block, shape) for block, shape in clock.shapes.items()]
    tokens, channels, keys = (256, 64, 16, 4), (64, 128, 256, 512), (64, 32, 12, 4)
    for floor, n, c, k in zip(found, tokens, channels, keys, strict=True):
        attention = FULL if n == 4 else "attention"
        assert floor["norm and qkv"] == (3 * n * c * c, 4 * n * c + 3 * c * c)
        assert floor[attention] == (2 * n * k * c, 4 * n * c)
        assert floor["norm, MLP and residual"] == (6 * n * c * c, 2 * n * c + 6 * c * c)
        assert floor["LePE"] == (25 * n * c, 3 * n * c)
        assert ("routing" in floor) == (n != 4)


@pytest.mark.skipif(not block.can_run(torch.empty(1)), reason="there are no C kernels here")
def test_the_table_has_a_row_per_part_and_their_sum() -> None:
    model = biformer_tiny(**MODEL).eval()
    found = table(model, torch.randn(1, 3, 64, 64), 1, peak=100.0, copy=10.0)
    rows = {row[0]: row for row in found.rows if isinstance(row, tuple)}
    assert set(rows) == {*PARTS, FULL, REST, "whole model"}
    native = {part: float(row[2].replace("-", "0")) for part, row in rows.items()}
    assert min(native.values()) >= 0.0
    assert native["whole model"] >= sum(native[part] for part in (*PARTS, FULL)) - 0.1
