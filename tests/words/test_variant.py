"""Variants, tasks and stages: published numbers, padding, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from bratune.errors import ProblemError, UnknownNameError, UsageError
from bratune.variant import TASKS, VARIANTS, get_task, get_variant, parse_resolution, stages


@pytest.mark.parametrize(
    ("model", "image", "maps"),
    [
        ("biformer_tiny", (224, 224), ((56, 56), (28, 28), (14, 14), (7, 7))),
        ("biformer_tiny", (225, 30), ((57, 8), (29, 4), (15, 2), (8, 1))),
        ("biformer_small", (800, 1344), ((200, 336), (100, 168), (50, 84), (25, 42))),
        ("biformer_stl", (225, 255), ((56, 63), (28, 31), (14, 15), (7, 7))),
    ],
)
def test_maps_round_up_in_biformer_and_down_in_stl(
    model: str, image: tuple[int, int], maps: tuple[tuple[int, int], ...]
) -> None:
    assert get_variant(model).maps(*image) == maps


@pytest.mark.parametrize("model", VARIANTS)
def test_every_query_sees_64_keys_in_the_routed_stages_at_224(model: str) -> None:
    found = stages(get_variant(model), 224, 224)
    assert [s.problem.keys_per_query if s.problem else 0 for s in found] == [64, 64, 64, 49]
    assert [s.kind for s in found] == ["routed"] * 3 + ["full"]
    assert all(s.padding_waste == 0 for s in found)


def test_detection_as_published_pads_stage_3_by_almost_half() -> None:
    task = get_task("detection")
    image = task.padded(task.height, task.width)
    assert image == (800, 1344)
    found = stages(get_variant("biformer_small"), *image, n_win=task.n_win)
    assert [round(s.padding_waste, 2) for s in found] == [0.04, 0.17, 0.46, 0.0]
    assert [s.padded_tokens for s in found] == [208 * 336, 112 * 176, 64 * 96, 25 * 42]


def test_the_nchw_model_has_more_regions_where_s_does_not_divide() -> None:
    third = stages(get_variant("biformer_stl_nchw"), 416, 416, n_win=8)[2].problem
    assert third is not None
    assert (third.height, third.region, third.grid) == (26, (3, 3), (9, 9))


def test_full_attention_is_one_region_with_the_scale_of_a_head() -> None:
    last = stages(get_variant("biformer_tiny"), 224, 224)[3].problem
    assert last is not None
    assert (last.regions, last.heads, last.head_dim, last.topk) == (1, 8, 64, 1)
    assert last.scale == 64**-0.5


def test_top_k_zero_has_no_attention() -> None:
    first = stages(get_variant("biformer_tiny"), 224, 224, topks=(0, 4, 16, -2))[0]
    assert (first.kind, first.problem, first.n_win) == ("conv", None, 0)
    assert first.padded_tokens == 56 * 56


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topks": (50, 4, 16, -2)}, "stage 1 of biformer_tiny: top-k 50 is more than the 49 key regions"),
        ({"topks": (1, 4)}, "topks needs one value per stage (4), not 2"),
        ({"n_win": (7, 7)}, "n_win needs one value per stage (4), not 2"),
        ({"n_win": 8, "pad": False}, "stage 2 of biformer_tiny: 8 regions per side do not tile a 28x28 map"),
        ({"n_win": 0}, "regions per side must be at least 1, not 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_names_the_stage(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemError) as error:
        stages(get_variant("biformer_tiny"), 224, 224, **options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "biformer_stl",
            "stage 1 of biformer_stl: 7 regions per side do not tile a 24x24 map; these do: 1, 2,",
        ),
        ("biformer_stl_nchw", "stage 3 of biformer_stl_nchw: 7 regions per side do not fit a 6x6 map"),
    ],
)
def test_models_that_cannot_pad_refuse_maps_that_s_does_not_fit(model: str, said: str) -> None:
    with pytest.raises(ProblemError) as error:
        stages(get_variant(model), 96, 96, n_win=7, topks=(1, 1, 1, -1))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "size"), [("512", (512, 512)), ("800x1333", (800, 1333)), (" 64X32 ", (64, 32))]
)
def test_resolutions_are_height_by_width(text: str, size: tuple[int, int]) -> None:
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["abc", "5x", "", "0", "-224", "224x", "31", "224x16", "2 2 4"])
def test_bad_resolutions_say_what_would_work(text: str) -> None:
    with pytest.raises(UsageError, match="resolution") as error:
        parse_resolution(text)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("get", "known"), [(get_variant, VARIANTS), (get_task, TASKS)])
def test_unknown_names_list_the_known_ones(get: Any, known: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError) as error:
        get("biformer_tinny")
    assert all(name in str(error.value) for name in known)
