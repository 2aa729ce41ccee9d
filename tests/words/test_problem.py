"""Problem: what it derives, what it refuses, and what its messages say."""

from __future__ import annotations

from typing import Any

import pytest

from bratune.errors import ProblemError
from bratune.problem import Problem, ceil_div, factors_that_tile, split_map

STAGE_1 = Problem(batch=2, height=56, width=56, heads=2, head_dim=32, region=(8, 8), topk=1)
PADDED = Problem(batch=1, height=13, width=10, heads=2, head_dim=8, region=(4, 3), topk=3, dtype="float16")
CROSS = STAGE_1.replace(kv_height=28, kv_width=14, kv_region=(4, 2), v_head_dim=16, per_head=True)


def test_sizes_of_the_first_stage_are_the_published_ones() -> None:
    assert (STAGE_1.channels, STAGE_1.grid, STAGE_1.regions, STAGE_1.region_tokens) == (64, (7, 7), 49, 64)
    assert STAGE_1.keys_per_query == 64
    assert STAGE_1.scale == 64**-0.5, "the official scale is that of all channels, not of a head"
    assert STAGE_1.divisible
    assert STAGE_1.same_regions
    assert STAGE_1.item_bytes == 4


def test_counted_work_follows_from_the_sizes() -> None:
    pairs = 2 * 56 * 56 * 64
    assert STAGE_1.attention_macs == pairs * (64 + 64)
    assert STAGE_1.io_bytes == 2 * 56 * 56 * (64 + 64 + 64 + 64) * 4
    assert STAGE_1.gathered_bytes == 2 * 49 * 64 * 128 * 4
    assert STAGE_1.score_bytes == pairs * 2 * 4


def test_a_map_that_regions_do_not_tile_counts_its_padding() -> None:
    assert PADDED.grid == (4, 4)
    assert PADDED.padded == (16, 12)
    assert not PADDED.divisible
    assert PADDED.attention_macs == 16 * 12 * 3 * 12 * 32
    assert PADDED.tokens == 130


def test_keys_may_have_a_map_and_regions_of_their_own() -> None:
    assert CROSS.kv_grid == (7, 7)
    assert CROSS.kv_region_tokens == 8
    assert CROSS.v_channels == 32
    assert not CROSS.same_regions
    assert "keys 28x14 in regions of 4x2" in str(CROSS)
    assert "routes per head" in str(CROSS)


@pytest.mark.parametrize("problem", [STAGE_1, PADDED, CROSS], ids=str)
def test_a_problem_survives_json(problem: Problem) -> None:
    assert Problem.from_dict(problem.to_dict()) == problem
    assert hash(Problem.from_dict(problem.to_dict())) == hash(problem)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"topk": 50}, "top-k 50 is more than the 49 key regions (7x7); 1 to 49 would work"),
        ({"topk": 0}, "topk must be a whole number of at least 1, not 0"),
        ({"batch": -1}, "batch must be"),
        ({"batch": True}, "batch must be"),
        ({"height": 1.5}, "height must be"),
        ({"region": (0, 8)}, "region must be at least 1x1 tokens, not 0x8"),
        ({"region": 8}, "region must be two whole numbers"),
        ({"region": (8, 8, 8)}, "region must be two whole numbers"),
        ({"dtype": "fp32"}, "dtype 'fp32' is not known; these are: float16, bfloat16, float32, float64"),
        ({"direction": "bwd"}, "direction 'bwd' is not known; these are: fwd, fwd-bwd"),
        ({"padding": "reflect"}, "padding 'reflect' is not known"),
        ({"kv_height": -4}, "must be at least 1"),
        ({"heads": 2**31}, "heads must be at most 2147483647"),
        ({"region": (2**31, 1)}, "region must be at most 2147483647 tokens"),
        ({"v_head_dim": 2**31}, "must be at least 1, and up to 2147483647"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused_with_what_would_work(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemError) as error:
        STAGE_1.replace(**changes)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("n_win", "pad", "region"),
    [(7, False, (8, 8)), (8, False, (7, 7)), (9, True, (7, 7)), (56, False, (1, 1)), (100, True, (1, 1))],
)
def test_split_map_gives_the_region(n_win: int, pad: bool, region: tuple[int, int]) -> None:
    assert split_map(56, 56, n_win, pad=pad) == region


@pytest.mark.parametrize(("n_win", "said"), [(9, "these do: 1, 2, 4, 7, 8, 14, 28, 56"), (0, "at least 1")])
def test_split_map_names_the_factors_that_would_tile(n_win: int, said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        split_map(56, 56, n_win)


def test_factors_tile_both_sides() -> None:
    assert factors_that_tile(28, 42) == (1, 2, 7, 14)
    assert [ceil_div(7, 7), ceil_div(8, 7), ceil_div(0, 7)] == [1, 2, 0]
