"""Calibration of the divergence for given weights, and the weight-shared run."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bratune.cli.validate_proxy import command
from bratune.errors import StoreError, UsageError
from bratune.studies.accuracy import TRAINING, small_model, small_space
from bratune.studies.data_sets import canvas_digits, shifted
from bratune.tune.calibration import Calibration, CalibrationPoint, isotonic, limits_of, read_calibration
from bratune.tune.checkpoint_fidelity import CheckpointFidelity
from bratune.tune.pictures import Pictures
from bratune.tune.short_training import Recipe, SharedRun, draw, renorm, train_shared


def point(divergence: float, drop: float) -> CalibrationPoint:
    return CalibrationPoint(
        setting="",
        additive=divergence,
        divergence=divergence,
        disagreement=0.5,
        change_same=0.0,
        drop=drop,
        most_lost=drop + 0.001,
    )


@pytest.mark.parametrize(
    ("values", "fitted"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([3, 2, 1], [2, 2, 2]),
        ([1, 3, 2, 4], [1, 2.5, 2.5, 4]),
        ([], []),
    ],
)
def test_isotonic_fit_pools_what_falls(values: list[float], fitted: list[float]) -> None:
    assert isotonic(values) == fitted


def test_limits_are_the_largest_divergence_whose_loss_is_shown_to_be_accepted() -> None:
    points = [point(0.001, 0.0), point(0.01, 0.004), point(0.02, 0.003), point(0.1, 0.01), point(1.0, 0.2)]
    assert limits_of(points) == {"safe": 0.001, "balanced": 0.02, "fast": 0.1}
    noisy = [dataclasses.replace(p, most_lost=p.drop + 0.01) for p in points]
    assert limits_of(noisy) == {"safe": 0.0, "balanced": 0.0, "fast": 0.02}


def calibration(rho_low: float) -> Calibration:
    return Calibration(
        points=(point(0.1, 0.1),),
        rho=0.8,
        rho_interval=(rho_low, 0.95),
        additive_rho=0.9,
        limits={"safe": 0.001, "balanced": 0.01, "fast": 0.1},
        images=128,
        test_images=600,
        top1=0.9,
    )


@pytest.mark.parametrize(("low", "validated"), [(0.5, True), (0.1, False)])
def test_calibration_reads_back_with_its_verdict(tmp_path: Path, low: float, validated: bool) -> None:
    path = tmp_path / "w.pth.calibration.json"
    calibration(low).save(path)
    found = read_calibration(path)
    assert found is not None
    assert found["validated"] is validated
    assert found["limits"]["fast"] == 0.1
    assert ("not validated here" in str(calibration(low))) is not validated


def test_missing_calibration_is_none_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert read_calibration(path) is None
    path.write_text('{"limits": {}}')
    with pytest.raises(StoreError, match="validate-proxy"):
        read_calibration(path)


def test_canvases_are_repeatable_and_halves_of_the_scans_are_disjoint() -> None:
    pytest.importorskip("sklearn.datasets", reason="the scans come with scikit-learn")
    a, b = (canvas_digits(4, part="train", seed=0) for _ in range(2))
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, canvas_digits(4, part="train", seed=1).images)
    assert a.images.shape == (4, 3, 64, 64)


def random_pictures(count: int = 16) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    return Pictures(
        images=torch.randn(count, 3, 64, 64, generator=generator),
        labels=torch.arange(count) % 10,
        classes=(),
        key="random",
    )


def test_shared_draws_are_legal_and_reach_both_ends() -> None:
    space, rng = small_space(), random.Random(0)
    drawn = [draw(space, rng) for _ in range(60)]
    assert all(s.topks[0] in space.topks(0, s.n_win[0]) for s in drawn)
    assert any(s.topks[:3] == (16, 16, 16) for s in drawn)
    assert any(s.topks[:3] == (1, 1, 1) for s in drawn)


def test_statistics_are_those_of_the_setting_in_place() -> None:
    model = small_model()
    images = random_pictures().images
    renorm(model, images, batch=16, batches=1)
    stem: Any = model.downsample_layers[0]
    first, made = stem[1], stem[0](images)
    torch.testing.assert_close(first.running_mean, made.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert first.momentum == 0.1
    assert not model.training


@pytest.mark.slow
def test_shared_run_calls_indistinguishable_settings_equal() -> None:
    space, recipe = small_space(), Recipe(steps=2, batch=8)
    reference = space.setting(4, (1, 4, 8, -2))
    pictures = random_pictures()
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = small_model()
        assert pictures.labels is not None
        rng = random.Random(seed)
        losses = train_shared(model, pictures.images, pictures.labels, lambda: draw(space, rng), recipe)  # noqa: B023
        assert len(losses) == 2
        models.append(model)
    run = SharedRun(models, space, reference, pictures, pictures, recipe)
    assert run.joint(reference).loss == 0
    found = run.joint(space.setting(2, (1, 1, 1, -2)))
    assert found.evidence.level == "E1"
    assert "2 seeds" in found.evidence.text
    assert run.limits["fast"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --study accuracy, or --checkpoint"),
        (["--checkpoint", "w.pth", "--images", "d"], "either --study accuracy, or --checkpoint"),
        (["--study", "accuracy", "--checkpoint", "w.pth"], "leave one of them out"),
    ],
)
def test_half_a_request_says_what_is_missing(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, UsageError)
    assert words in str(result.exception)


@pytest.mark.slow
def test_lower_topk_costs_fidelity_and_accuracy_of_trained_weights() -> None:
    """The claim that a user relies on, on weights trained for half a minute on real pixels."""
    pytest.importorskip("sklearn.datasets", reason="the scans come with scikit-learn")
    space = small_space()
    own = space.setting(4, (1, 4, 8, -2))
    torch.manual_seed(0)
    model = small_model()
    train = canvas_digits(1024, part="train")
    assert train.labels is not None
    recipe = dataclasses.replace(TRAINING, steps=80)
    losses = train_shared(model, train.images, train.labels, lambda: own, recipe, augment=shifted)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    pictures = canvas_digits(256, part="test", seed=5)
    source = CheckpointFidelity(model, space, own, pictures)
    settings = [own, space.setting(4, (1, 2, 2, -2)), space.setting(4, (1, 1, 1, -2))]
    found = [source.joint(s) for s in settings]
    losses_of = [f.loss for f in found]
    assert losses_of == sorted(losses_of)
    assert losses_of[0] == 0
    top1 = [f.evidence.values["top1"] for f in found]
    assert top1[2] < top1[0]
    for f in found:
        disagreement = 1 - f.evidence.values["agree"] / f.evidence.values["images"]
        assert abs(f.evidence.values["change"]) <= disagreement + 1e-9


@pytest.mark.slow
def test_weights_and_pictures_are_tuned_end_to_end(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures are written with Pillow")
    from bratune.kernels.biformer import build
    from bratune.tune.conclude import conclude
    from bratune.tune.fidelity_source import calibration_path, open_fidelity
    from bratune.tune.request import TuneRequest
    from bratune.tune.show import plan_text
    from bratune.tune.synthetic import SyntheticWorld, offers
    from bratune.tune.tuner import Tuner

    torch.manual_seed(0)
    torch.save(build("biformer_tiny", num_classes=10).state_dict(), tmp_path / "w.pth")
    rng = random.Random(0)
    for i in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        pixels = bytes(rng.randrange(256) for _ in range(80 * 80 * 3))
        image.frombytes("RGB", (80, 80), pixels).save(tmp_path / "photos" / f"{i}.png")
    request = TuneRequest(
        model="biformer_tiny",
        task="classification",
        height=64,
        width=64,
        checkpoint=str(tmp_path / "w.pth"),
        trained_n_win=(4,) * 4,
        trained_topks=(1, 4, 8, -2),
        images=str(tmp_path / "photos"),
        allow_model_changes=True,
        effort="quick",
    )
    world = SyntheticWorld(seed=0)
    said: list[str] = []
    fidelity = open_fidelity(request, dataclasses.replace(world.machine, device="cpu"), say=said.append)
    assert any("unsure below 64" in line for line in said)
    url = f"journal:///{tmp_path}/study.journal"
    tuner = Tuner(world, request, url, offers=offers, fidelity=fidelity)
    tuner.search()
    plan = conclude(tuner)
    assert plan.default.topks == (1, 4, 8, -2)
    assert plan.evidence.level == "E2"
    assert "KL" in plan.evidence.text
    recall = plan.diagnostics["recall"]
    assert len(recall["plan"]) == len(recall["reference"]) == 2 + 2 + 8
    assert plan_text(plan).count("decides nothing") == 2
    # Six pictures show nothing: whatever is faster is not shown to keep what the rule allows.
    assert plan.setting.topks == (1, 4, 8, -2)
    calibration(rho_low=0.0).save(calibration_path(tmp_path / "w.pth"))
    open_fidelity(request, dataclasses.replace(world.machine, device="cpu"), say=said.append)
    assert any("does not order these weights' settings" in line for line in said)
