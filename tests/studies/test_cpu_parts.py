"""The accounting of the runtime on a CPU: every part has its time once, and its floor follows from counts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bratune.kernels.biformer import biformer_tiny
from bratune.kernels.native import block
from bratune.kernels.runtime import FastModel
from bratune.studies.cpu_parts import ATTENTION, Clock, table

MODEL: dict[str, Any] = {"num_classes": 10, "n_win": 2, "topks": (1, 2, 3, -2), "depth": (1, 1, 1, 1)}


def test_what_is_inside_a_part_is_not_counted_twice() -> None:
    torch.manual_seed(0)
    fast = FastModel(biformer_tiny(**MODEL).eval(), native=False)
    clock = Clock(fast)
    start = time.perf_counter()
    fast(torch.randn(1, 3, 64, 64))
    assert sum(clock.seconds.values()) <= time.perf_counter() - start
    assert set(clock.seconds) == {
        ATTENTION, "LePE", "mlp", "norms", "position embedding", "projection and residual", "qkv",
    }  # fmt: skip
    # Stage by stage, tokens x channels x channels: 3 times for q, k and v.
    tokens_channels = ((256, 64), (64, 128), (16, 256), (4, 512))
    assert clock.macs["qkv"] == sum(3 * n * c * c for n, c in tokens_channels)
    keys = (64, 32, 12, 4)
    assert clock.macs[ATTENTION] == sum(
        2 * n * k * c for (n, c), k in zip(tokens_channels, keys, strict=True)
    )


@pytest.mark.skipif(not block.can_run(torch.empty(1)), reason="there are no C kernels here")
def test_the_table_has_a_row_per_part_and_their_sum() -> None:
    model = biformer_tiny(**MODEL).eval()
    found = table(model, torch.randn(1, 3, 64, 64), 1, peak=100.0, copy=10.0)
    assert len(found.rows) == 8
    last = found.rows[-1]
    assert isinstance(last, tuple)
    assert last[0] == "all blocks"
