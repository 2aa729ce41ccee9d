"""Whole models side by side: agreement before time, ratios within rounds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from bratune.errors import MeasureError
from bratune.kernels.biformer import BiFormer
from bratune.kernels.layer import BiLevelRoutingAttention
from bratune.profile import whole_model
from bratune.profile.contest import LEAST_ROUNDS, contenders, contest, with_compiled
from bratune.store import Store


class Slow(nn.Module):
    """Takes as long as it is told, on a clock that it turns itself."""

    def __init__(self, clock: list[float], seconds: list[float], error: float = 0.0) -> None:
        super().__init__()
        self.clock, self.seconds, self.error = clock, itertools.cycle(seconds), error

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += next(self.seconds)
        return x + self.error


def made(**models: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """What `contest` takes: what makes the contenders."""
    return {name: lambda model=model: model for name, model in models.items()}  # type: ignore[misc]


class Failing(nn.Module):
    """Raises from its nth call on."""

    def __init__(self, error: Exception, after: int = 0) -> None:
        super().__init__()
        self.error, self.left = error, after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return x


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
    models = made(old=Slow(clock, [1.0, 2.0]), new=Slow(clock, [0.5, 1.0]))
    found = contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0])
    old, new = found.rows
    assert (old.ratio, new.ratio) == (1.0, 2.0)
    assert new.ratio_interval == (2.0, 2.0)
    assert new.median_ms == pytest.approx(750.0)
    assert "2.00x" in found.table()
    assert "1.3" in found.table()  # one image in 750 ms


def test_contender_that_computes_something_else_is_not_timed() -> None:
    clock = [0.0]
    models = made(old=Slow(clock, [1.0]), new=Slow(clock, [0.5], error=0.01), third=Slow(clock, [0.25]))
    found = contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0])
    old, new, third = found.rows
    assert (new.outcome, new.median_ms) == ("incorrect", None)
    assert new.difference == pytest.approx(0.01, rel=1e-3)
    assert "differs from the baseline by 1.0e-02" in new.reason
    assert "incorrect: differs" in found.table()
    assert (old.ratio, third.ratio) == (1.0, 4.0)


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

    class Tripled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    models = made(old=Slow(clock, [1.0]), new=Tripled())
    found = contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0], direction="fwd-bwd")
    assert [row.outcome for row in found.rows] == ["measured", "incorrect"]


def test_compiled_twins_agree_and_are_not_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    images = torch.randn(5, 3)
    rivals = with_compiled(made(other=model))
    found = contest(with_compiled(made(plain=model)), images, rounds=6, rivals=rivals)
    assert [row.name for row in found.rows] == ["plain", "plain, compiled", "other", "other, compiled"]
    assert [row.operations for row in found.rows] == [3, None, 3, None]
    assert found.rows[1].difference is not None
    assert found.rows[1].difference < 1e-5


def test_rivals_run_in_the_same_rounds_and_may_differ() -> None:
    clock = [0.0]
    models, rivals = made(own=Slow(clock, [1.0])), made(other=Slow(clock, [2.0], error=5.0))
    found = contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0], rivals=rivals)
    own, other = found.rows
    assert (own.name, other.name) == ("own", "other")
    assert (other.ratio, other.difference) == (0.5, None)


@pytest.mark.parametrize(
    ("error", "after", "outcome", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 0, "oom", "9 GiB"),
        (RuntimeError("no kernel image\nmore"), 0, "error", "RuntimeError: no kernel image"),
        (MeasureError("the contender is broken"), 3, "error", "the contender is broken"),
    ],
    ids=["first", "second", "in-a-round"],
)
@pytest.mark.parametrize("place", ["baseline", "contender", "rival"])
def test_who_fails_leaves_with_a_reason_and_the_others_go_on(
    place: str, error: Exception, after: int, outcome: str, reason: str
) -> None:
    clock = [0.0]
    sick, sound = made(sick=Failing(error, after)), made(one=Slow(clock, [1.0]), two=Slow(clock, [0.5]))
    models = sick | sound if place == "baseline" else sound | sick if place == "contender" else sound
    rivals = sick if place == "rival" else {}
    found = contest(models, torch.ones(1, 3), rounds=8, clock=lambda: clock[0], rivals=rivals)
    rows = {row.name: row for row in found.rows}
    assert (rows["sick"].outcome, rows["sick"].median_ms) == (outcome, None)
    assert reason in rows["sick"].reason
    assert (rows["one"].ratio, rows["two"].ratio) == (1.0, 2.0)
    assert found.baseline == "one"


def test_a_contest_that_nobody_finishes_says_why() -> None:
    found = contest(
        made(a=Failing(RuntimeError("broken")), b=Failing(RuntimeError("worse"))), torch.ones(1, 3)
    )
    assert (found.rounds, found.baseline) == (0, "")
    assert [row.reason for row in found.rows] == ["RuntimeError: broken", "RuntimeError: worse"]


def test_what_the_budget_leaves_out_is_a_row_and_the_least_rounds_run() -> None:
    clock = [0.0]
    now = time.monotonic()

    class Late(Slow):
        """Ends the budget."""

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(max(0.0, now + 0.2 - time.monotonic()))
            return super().forward(x)

    models = made(first=Late(clock, [1.0]), second=Slow(clock, [0.5]))
    found = contest(models, torch.ones(1, 3), rounds=50, clock=lambda: clock[0], deadline=now + 0.1)
    first, second = found.rows
    assert (first.outcome, found.rounds, len(first.samples_ms)) == ("measured", LEAST_ROUNDS, LEAST_ROUNDS)
    assert (second.outcome, second.reason) == ("timeout", "not started: the budget was spent")


def test_every_row_of_a_contest_becomes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str, image: tuple[int, int]) -> Any:
        raise ValueError(f"{name} is made for 224")

    monkeypatch.setattr("bratune.profile.peers.timm_model", failing)
    words = "--res 32 -b 1 -b 2 --rounds 2 --only published,runtime --peers swin_tiny --device cpu"
    arguments = [*words.split(), "-o", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["whole_model", *arguments])
    result = CliRunner().invoke(whole_model.main, arguments)
    assert result.exit_code == 1
    assert "2 of 6 rows have no time" in result.output
    assert "images/s" in result.output
    rows = Store(tmp_path / "records.jsonl").records()
    assert [(row.backend, row.batch, row.outcome) for row in rows] == [
        ("published", 1, "measured"),
        ("runtime", 1, "measured"),
        ("timm", 1, "error"),
        ("published", 2, "measured"),
        ("runtime", 2, "measured"),
        ("timm", 2, "error"),
    ]
    published, runtime, peer = rows[:3]
    assert (published.model, published.n_samples, published.speedup) == ("biformer_tiny", 2, 1.0)
    assert runtime.median_ms is not None
    assert runtime.images_per_s == pytest.approx(1e3 / runtime.median_ms)
    assert (runtime.baseline, runtime.l2, runtime.regime, runtime.dtype) == (
        "published", "warm", "eager", "float32"
    )  # fmt: skip
    assert runtime.max_rel_err is not None
    assert runtime.repro == f"python -m bratune.profile.whole_model {words}"
    assert peer.model == "swin_tiny_patch4_window7_224"
    assert "made for 224" in peer.reason


def test_names_of_forms_that_are_not_there_are_refused() -> None:
    result = CliRunner().invoke(whole_model.main, ["--only", "publisched", "--device", "cpu"])
    assert result.exit_code == 1
    assert "published, gather, auto, runtime" in result.output


def test_training_on_one_image_is_refused_with_a_batch_that_works() -> None:
    result = CliRunner().invoke(whole_model.main, ["--direction", "fwd-bwd", "--device", "cpu"])
    assert result.exit_code == 1
    assert "no gradient" in result.output
    assert "-b 2 would work" in result.output


def test_padded_maps_have_a_published_form_too() -> None:
    model = small_model()
    for module in model.modules():
        if isinstance(module, BiFormer | BiLevelRoutingAttention):
            module.auto_pad = True
    images = torch.randn(1, 3, 80, 72)
    found = contest(contenders(model.eval(), images), images, rounds=6)
    assert [row.outcome for row in found.rows] == ["measured"] * 4


def test_gradients_of_a_large_batch_do_not_vanish_in_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1000).half()
    with torch.no_grad():
        model.weight.mul_(1e-3)
        model.bias.zero_()
    images = torch.randn(64, 8).half()
    found = contest(made(a=model, b=model), images, rounds=6, direction="fwd-bwd")
    assert [row.outcome for row in found.rows] == ["measured", "measured"]
