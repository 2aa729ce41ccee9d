"""Fidelity of trained weights: exact for the reference, bounded, additive by stage, from real pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bratune.errors import ProblemError, UsageError
from bratune.kernels.biformer import build
from bratune.tune.checkpoint_fidelity import CheckpointFidelity, load_checkpoint, outputs, reroute
from bratune.tune.evidence import recall_text
from bratune.tune.fidelity import (
    agreement,
    divergence,
    feature_distance,
    mean_interval,
    paired_change,
)
from bratune.tune.pictures import Pictures, load_pictures
from bratune.tune.recall import model_recall, recall_curves
from bratune.tune.space import Space

SMALL: dict[str, Any] = {"depth": (1, 1, 1, 1), "auto_pad": True, "num_classes": 10}


def small(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return build("biformer_tiny", **{**SMALL, **more}).eval()


def random_pictures(count: int = 8, labels: bool = False) -> Pictures:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    found = torch.randint(0, 10, (count,), generator=generator) if labels else None
    return Pictures(images=images, labels=found, classes=(), key="random")


def source(labels: bool = False, **more: Any) -> CheckpointFidelity:
    space = Space(model="biformer_tiny", height=64, width=64, default_n_win=4)
    reference = space.setting(4, (1, 4, 16, -2))
    return CheckpointFidelity(small(**more), space, reference, random_pictures(labels=labels))


# --- measures ------------------------------------------------------------------------------


def test_divergence_is_the_textbook_sum() -> None:
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(p.log(), q.log()).item() == pytest.approx(expected, abs=1e-6)


def test_equal_outputs_have_no_divergence_even_in_half_precision() -> None:
    logits = torch.randn(4, 1000).half() * 20
    assert divergence(logits, logits).abs().max() == 0
    assert agreement(logits, logits).all()


def test_padded_positions_of_dense_outputs_do_not_count() -> None:
    a, b = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    b[0, 0, 0, 1] = 9.0  # differs only at the padded position
    valid = torch.tensor([[[True, False]]])
    assert divergence(a, b, valid).item() == 0
    assert divergence(a, b).item() > 0


def test_feature_distance_is_relative_and_averages_levels() -> None:
    maps = [torch.ones(2, 3, 4, 4), torch.ones(2, 5, 2, 2)]
    twice = [maps[0] * 2, maps[1]]
    assert feature_distance(maps, twice).tolist() == pytest.approx([0.5, 0.5])


def test_outputs_of_other_shape_are_refused() -> None:
    with pytest.raises(ProblemError, match="cannot be compared"):
        divergence(torch.zeros(2, 10), torch.zeros(2, 11))


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_never_changes_by_more_than_the_disagreement(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 50, 4, generator=generator)
    labels = torch.randint(0, 4, (50,), generator=generator)
    change, _ = paired_change(a.argmax(1) == labels, b.argmax(1) == labels)
    assert abs(change) <= 1 - agreement(a, b).float().mean().item() + 1e-9


def test_paired_interval_is_narrower_than_that_of_independent_samples() -> None:
    before = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.8
    after = before.clone()
    after[:10] = ~after[:10]
    change, (low, high) = paired_change(before, after)
    assert low < change < high
    assert high - low < 2 * 1.96 * math.sqrt(2 * 0.8 * 0.2 / 1000)


def test_interval_of_the_mean_holds_it_and_is_repeatable() -> None:
    values = torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 4
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert (low, high) == mean_interval(values)


# --- recall --------------------------------------------------------------------------------


def test_recall_of_constant_tokens_is_the_share_of_regions() -> None:
    q = torch.ones(2, 8, 8, 16)
    routed, best = recall_curves(q, q, region=(2, 2), heads=2, scale=0.25)
    expected = torch.arange(1, 17) / 16
    torch.testing.assert_close(routed, expected)
    torch.testing.assert_close(best, expected)


def test_recall_never_beats_the_best_regions_and_ends_at_all() -> None:
    q, k = torch.randn(2, 2, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    routed, best = recall_curves(q, k, region=(2, 4), heads=4, scale=1.0)
    assert (routed <= best + 1e-6).all()
    assert routed[-1].item() == pytest.approx(1.0)


def test_recall_in_pieces_is_that_of_the_whole_score_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    whole = recall_curves(q, k, region=(2, 2), heads=2, scale=0.5)
    monkeypatch.setattr("bratune.tune.recall.MOST_SCORES", 1)
    for piecewise, at_once in zip(recall_curves(q, k, region=(2, 2), heads=2, scale=0.5), whole, strict=True):
        torch.testing.assert_close(piecewise, at_once)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_every_routed_layer_of_a_model_has_a_recall(name: str) -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"auto_pad": True, "n_win": 3, "topks": (1, 4, 9, -2)}
    if name == "biformer_stl_nchw":
        arguments = {"n_wins": (3,) * 4, "topks": (1, 4, 9, -1)}
    model = build(name, depth=(1, 2, 1, 1), **arguments)
    layers = model_recall(model, random_pictures(3).images, batch=2)
    assert [(x.stage, x.block, x.topk) for x in layers] == [(1, 1, 1), (2, 1, 4), (2, 2, 4), (3, 1, 9)]
    assert all(0 < x.routed <= x.best + 1e-6 for x in layers)
    assert layers[3].topk < layers[3].regions or layers[3].routed == pytest.approx(1.0)
    again = model_recall(model, random_pictures(3).images, batch=3)
    assert [x.routed for x in again] == pytest.approx([x.routed for x in layers], abs=1e-5)
    assert recall_text(layers).startswith(f"stage 1 {layers[0].routed:.2f} of {layers[0].best:.2f} (k 1/")


# --- whole models --------------------------------------------------------------------------


def test_rerouted_model_equals_one_built_that_way() -> None:
    images = random_pictures(2).images
    built = small(n_win=4, topks=(2, 3, 5, -2))
    moved = small(n_win=7)
    moved.load_state_dict(built.state_dict())
    reroute(moved, (4,) * 4, (2, 3, 5, -2))
    torch.testing.assert_close(outputs(moved, images)[0], outputs(built, images)[0])


def test_reference_has_full_fidelity() -> None:
    found = source().joint(source().reference)
    assert found.loss == 0
    assert found.evidence.level == "E2"
    assert "100.0% of 8 images" in found.evidence.text


def test_backend_plays_no_part_in_fidelity() -> None:
    judge = source()
    setting = judge.space.setting(4, (1, 2, 3, -2), "gather")
    assert judge.joint(setting).loss == judge.joint(setting.replace(backends=("dense",) * 3 + ("",))).loss


def test_one_changed_stage_is_the_joint_loss_of_that_setting() -> None:
    judge = source()
    assert judge.stage_loss(2, 4, 1) == judge.joint(judge.space.setting(4, (1, 4, 1, -2))).loss
    assert judge.stage_loss(2, 4, 1) > 0
    assert judge.stage_loss(2, 4, 16) == 0


def test_labels_make_the_evidence_a_measured_top1() -> None:
    found = source(labels=True).joint(source().space.setting(4, (1, 1, 1, -2)))
    assert found.evidence.level == "E3"
    assert {"kl", "agree", "change", "interval", "top1"} <= set(found.evidence.values)


def test_backbone_without_head_is_judged_by_its_maps() -> None:
    judge = source(features_only=True)
    found = judge.joint(judge.space.setting(4, (1, 1, 1, -2)))
    assert 0 < found.loss < 2
    assert "no bound on accuracy follows" in found.evidence.text
    assert judge.joint(judge.reference).loss == 0


def test_checkpoint_brings_its_number_of_classes(tmp_path: Path) -> None:
    model = build("biformer_tiny", num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    assert load_checkpoint("biformer_tiny", tmp_path / "w.pth").num_classes == 7


# --- pictures ------------------------------------------------------------------------------


def save_pictures(folder: Path, names: list[str]) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures are written with Pillow")
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (90, 60 + i), (10 * i, 100, 200)).save(path)


def test_pictures_are_scaled_cropped_and_normalised(tmp_path: Path) -> None:
    save_pictures(tmp_path, ["a.png", "b.png"])
    found = load_pictures(tmp_path, 32, 48, count=9)
    assert found.images.shape == (2, 3, 32, 48)
    red = (0 / 255 - 0.485) / 0.229
    torch.testing.assert_close(found.images[0, 0], torch.full((32, 48), red), atol=1e-4, rtol=0)
    assert found.labels is None


def test_subfolders_are_classes_and_the_draw_is_repeatable(tmp_path: Path) -> None:
    save_pictures(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5)])
    found = load_pictures(tmp_path, 32, 32, count=6, labels=True)
    again = load_pictures(tmp_path, 32, 32, count=6, labels=True)
    assert found.classes == ("cat", "dog")
    assert isinstance(found.labels, Tensor)
    assert torch.equal(found.labels, again.labels if again.labels is not None else torch.empty(0))
    assert found.key == again.key
    assert found.key != load_pictures(tmp_path, 32, 32, count=6, labels=True, seed=1).key


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [([], False, "there are no pictures"), (["a.png"], True, "one subfolder per class")],
)
def test_folders_without_pictures_or_classes_say_so(
    tmp_path: Path, names: list[str], labels: bool, words: str
) -> None:
    save_pictures(tmp_path, names)
    with pytest.raises(UsageError, match=words):
        load_pictures(tmp_path, 32, 32, count=4, labels=labels)


def test_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"none of the 1 pictures below .* can be read"):
        load_pictures(tmp_path, 32, 32, count=4)
