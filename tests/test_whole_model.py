"""Whole models side by side: agreement before time, ratios within rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from bratune.errors import MeasureError
from bratune.kernels.biformer import BiFormer
from bratune.profile.whole_model import contenders, contest, with_compiled


class Slow(nn.Module):
    """Takes as long as it is told, on a clock that it turns itself."""

    def __init__(self, clock: list[float], seconds: list[float], error: float = 0.0) -> None:
        super().__init__()
        self.clock, self.seconds, self.error = clock, itertools.cycle(seconds), error

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += next(self.seconds)
        return x + self.error


def small_model() -> BiFormer:
    torch.manual_seed(0)
    return BiFormer(
        depth=(1, 1, 1, 1),
        embed_dim=(32, 32, 32, 32),
        head_dim=32,
        n_win=2,
        num_classes=5,
        topks=(1, 2, 4, -2),
        kv_downsample_mode="identity",
    )


def test_ratio_is_taken_within_rounds() -> None:
    clock = [0.0]
    # The machine is twice as slow in every other round, for both; the first call is the check.
    models = {"old": Slow(clock, [1.0, 2.0]), "new": Slow(clock, [0.5, 1.0])}
    found = contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0])
    old, new = found.rows
    assert (old.ratio, new.ratio) == (1.0, 2.0)
    assert new.ratio_interval == (2.0, 2.0)
    assert new.median_ms == pytest.approx(750.0)
    assert "2.00x" in found.table()


def test_contender_that_computes_something_else_is_not_timed() -> None:
    clock = [0.0]
    models = {"old": Slow(clock, [1.0]), "new": Slow(clock, [0.5], error=0.01)}
    with pytest.raises(MeasureError, match=r"new differs from old by 1\.0e-02"):
        contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0])
    assert clock[0] == 1.5


def test_real_contenders_agree_and_the_runtime_does_about_half() -> None:
    model = small_model().eval()
    images = torch.randn(1, 3, 64, 64)
    found = contest(contenders(model, images), images, rounds=6)
    work = {row.name: row.operations for row in found.rows}
    assert list(work) == ["published", "gather", "auto", "runtime"]
    assert work["published"] is not None
    assert work["runtime"] is not None
    assert work["runtime"] <= 0.55 * work["published"]
    assert all(row.difference is not None and row.difference < 1e-5 for row in found.rows)


def test_training_contenders_agree_on_gradients_and_keep_their_names() -> None:
    model = small_model().double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    forms = contenders(model.eval(), images, direction="fwd-bwd")
    found = contest(forms, images, rounds=6, direction="fwd-bwd")
    assert [row.name for row in found.rows] == ["published", "gather", "auto", "lean"]
    work = {row.name: row.operations for row in found.rows}
    assert work["auto"] is not None
    assert work["published"] is not None
    assert work["auto"] < 0.9 * work["published"]
    assert images.grad is None


def test_contender_with_another_gradient_is_not_timed() -> None:
    clock = [0.0]
    models = {"old": Slow(clock, [1.0]), "new": Slow(clock, [0.5], error=0.01)}
    with pytest.raises(MeasureError, match="new differs from old"):
        contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0], direction="fwd-bwd")
    assert clock[0] == 1.5


def test_compiled_twins_agree_and_are_not_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    images = torch.randn(5, 3)
    found = contest(with_compiled({"plain": model}), images, rounds=6, rivals=with_compiled({"other": model}))
    assert [row.name for row in found.rows] == ["plain", "plain, compiled", "other", "other, compiled"]
    assert [row.operations for row in found.rows] == [3, None, 3, None]
    assert found.rows[1].difference is not None
    assert found.rows[1].difference < 1e-5


def test_rivals_run_in_the_same_rounds_and_may_differ() -> None:
    clock = [0.0]
    models, rivals = {"own": Slow(clock, [1.0])}, {"other": Slow(clock, [2.0], error=5.0)}
    found = contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0], rivals=rivals)
    own, other = found.rows
    assert (own.name, other.name) == ("own", "other")
    assert (other.ratio, other.difference) == (0.5, None)
