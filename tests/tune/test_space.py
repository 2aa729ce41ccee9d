"""Which S and top-k are legal where, and when two settings are the same."""

from __future__ import annotations

import pytest

from bratune.errors import ProblemError
from bratune.tune.space import Bounds, Setting, Space, checkpoint_bounds, prior_bounds


def space(
    model: str = "biformer_tiny", size: tuple[int, int] = (224, 224), s: int = 7, **more: object
) -> Space:
    return Space(model=model, height=size[0], width=size[1], default_n_win=s, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "size", "default", "expected"),
    [
        ("biformer_tiny", (224, 224), 7, (2, 3, 5, 7, 14)),
        ("biformer_small", (512, 512), 8, (2, 3, 4, 5, 7, 8, 11, 16, 17, 32)),
        # 256x256 maps are 64, 32 and 16 tokens wide; 7 pads stage 3 by 72 % but is the authors' choice.
        ("biformer_tiny", (256, 256), 7, (2, 4, 7, 8, 16)),
    ],
)
def test_shared_windows_tile_every_stage_within_the_waste(
    model: str, size: tuple[int, int], default: int, expected: tuple[int, ...]
) -> None:
    found = space(model, size, default)
    assert tuple(w.n_win for w in found.shared_windows()) == expected
    for window in found.shared_windows():
        assert window.n_win == default or max(window.waste) <= 0.25


def test_padding_waste_is_that_of_the_padded_map() -> None:
    found = {w.n_win: w.waste for w in space().shared_windows()}
    assert found[7] == (0.0, 0.0, 0.0)
    assert found[5] == pytest.approx(((60 / 56) ** 2 - 1, (30 / 28) ** 2 - 1, (15 / 14) ** 2 - 1))


def test_stl_models_take_one_s_per_stage_and_never_pad() -> None:
    found = space("biformer_stl")
    assert found.per_stage
    assert found.windows(0) == (2, 4, 7, 8, 14, 28, 56)
    assert found.windows(2) == (2, 7, 14)


def test_windows_that_cut_the_same_regions_are_merged() -> None:
    # Regions round down there: every S from 29 to 56 cuts a 56-token side into single tokens.
    assert len([s for s in space("biformer_stl_nchw").windows(0) if s > 28]) == 1


def test_topks_end_with_all_regions_and_keep_the_published_one() -> None:
    assert space().topks(0, 2) == (1, 2, 3, 4)
    assert space().topks(2, 7)[-1] == 49
    assert 16 in space().topks(2, 7)


@pytest.mark.parametrize(
    ("bounds", "s", "expected"),
    [
        (Bounds(max_keys=(64, 64, 64, 0)), 7, (1, 2, 3, 4, 6, 8, 12, 16)),
        (Bounds(max_keys=(64, 64, 20, 0)), 7, (1, 2, 3, 4, 5)),
        (Bounds(max_keys=(64, 64, 64, 0)), 2, (1,)),
        (Bounds(min_keys=(0, 0, 64, 0), floor_only=True), 7, (16,)),
        (Bounds(min_keys=(0, 0, 64, 0)), 7, (16, 24, 32, 48, 49)),
        (Bounds(min_keys=(0, 0, 64, 0)), 14, (64, 196)),
        (Bounds(max_region_px=(32.0, 32.0, 32.0, 0.0)), 5, ()),
        (Bounds(n_win=(7, 7, 7, 7), topks=(1, 4, 16, -2)), 7, (16,)),
    ],
)
def test_bounds_cut_the_topks_of_stage_three(bounds: Bounds, s: int, expected: tuple[int, ...]) -> None:
    assert space(bounds=bounds).topks(2, s) == expected


def test_top_k_beyond_the_regions_is_clipped_to_the_same_key() -> None:
    found = space()
    assert found.setting(2, (1, 4, 400, -2)).key == found.setting(2, (1, 4, 4, -2)).key


def test_full_attention_is_the_same_model_whatever_the_regions() -> None:
    found = space()
    whole = (found.setting(s, (s * s, s * s, s * s, -2)) for s in (2, 7, 14))
    assert {found.model_key(setting) for setting in whole} == {"all|all|all|-2"}


def test_full_attention_over_a_padded_map_is_another_model() -> None:
    found = space()
    assert found.model_key(found.setting(5, (25, 25, 25, -2))) == "5:25|5:25|5:25|-2"


def test_stage_without_routing_has_no_backend() -> None:
    setting = space().setting(7, (1, 4, 16, -2), "gather", ['{"a": 1}'] * 4)
    assert setting.backends == ("gather", "gather", "gather", "")
    assert setting.configs[3] == "{}"


def test_setting_survives_json_shape() -> None:
    setting = space().setting(7, (1, 4, 16, -2), "gather", ['{"b":2,"a": 1}'] * 4, regime="graph")
    assert Setting.from_dict(setting.to_dict()) == setting
    assert setting.configs[0] == '{"a":1,"b":2}'


@pytest.mark.parametrize(
    ("size", "default", "names"),
    [
        ((224, 224), 7, {"paper": 7}),
        ((512, 512), 8, {"paper": 8, "constant-region": 16}),
        ((800, 1333), 16, {"paper": 16, "constant-region": 29}),
    ],
)
def test_first_settings_are_the_papers_and_constant_regions(
    size: tuple[int, int], default: int, names: dict[str, int]
) -> None:
    found = space("biformer_small", size, default).first_settings()
    assert {name: setting.n_win[0] for name, setting in found.items()} == names


def test_s_that_fits_no_stage_is_one_sentence() -> None:
    with pytest.raises(ProblemError, match=r"S 5 .* does not fit stage 1 \(56x56 tokens\) of biformer_stl"):
        space("biformer_stl").stage(0, 5, 1)


def test_prior_floors_keep_keys_and_region_size_of_the_reference() -> None:
    free = space()
    bounds = prior_bounds(free, free.first_settings()["paper"])
    assert bounds.min_keys == (64, 64, 64, 0)
    held = space(bounds=bounds)
    assert held.windows(0) == (7, 14)
    assert [held.topks(i, 14) for i in (0, 1, 2)] == [(4,), (16,), (64,)]


def test_checkpoint_changes_nothing_of_the_model_unless_allowed() -> None:
    free = space()
    own = free.first_settings()["paper"]
    assert [list(space(bounds=checkpoint_bounds(free, own)).model_choices(i)) for i in (0, 1, 2)] == [
        [(7, 1)],
        [(7, 4)],
        [(7, 16)],
    ]
    fewer = space(bounds=checkpoint_bounds(free, own, allow_model_changes=True))
    assert max(fewer.topks(1, 7)) == 4
    assert max(fewer.topks(1, 14)) == 16
    more = space(bounds=checkpoint_bounds(free, own, allow_model_changes=True, allow_more_k=True))
    assert max(more.topks(1, 7)) == 49
