"""Attention maps: the drawn weights are those that the block really uses."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bratune.cli import run
from bratune.errors import UnsupportedError, UsageError
from bratune.kernels.biformer import build
from bratune.kernels.full_attention import FullAttention
from bratune.report.attention_map import Look, block_at, look

pytest.importorskip("PIL")
from PIL import Image

from bratune.report.attention_page import (
    BAR,
    GAP,
    SIDE,
    THEMES,
    TITLE,
    attention_html,
    describe,
    draw,
    open_image,
    shape_of,
)


@functools.cache
def small(name: str = "biformer_tiny", **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build(name, depth=(1, 1, 2, 1), num_classes=0, **overrides)
    model.set_backend("gather")
    # Larger weights, so that attention is far from uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def picture(height: int = 112, width: int = 112) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))


def really_attended(model: nn.Module, stage: int, block: int, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values and output of a block's attention, caught from the block's own run."""
    attn: Any = block_at(model, stage, block).attn
    caught: dict[str, torch.Tensor] = {}
    original = attn.attend

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *routes: torch.Tensor) -> torch.Tensor:
        caught["v"] = v
        caught["out"] = original(q, k, v, *routes)
        return caught["out"]

    attn.attend = attend
    try:
        with torch.no_grad():
            model(image[None])
    finally:
        del attn.attend
    return caught


@pytest.mark.parametrize(
    ("name", "stage", "size"),
    [
        ("biformer_tiny", 1, 112),
        ("biformer_tiny", 2, 112),
        ("biformer_tiny", 3, 112),
        ("biformer_tiny", 4, 112),
        ("biformer_stl", 2, 224),
        ("biformer_stl_nchw", 2, 224),
        ("biformer_stl_nchw", 3, 240),  # padded: the added keys have values of zero
        ("biformer_stl_nchw", 4, 224),
    ],
)
def test_the_response_times_the_values_is_what_the_block_computes(name: str, stage: int, size: int) -> None:
    model, image = small(name), picture(size, size)
    x, y = size * 2 // 3, size // 3
    (seen,) = look(model, image, stage=stage, block=1, queries=[(x, y)])
    caught = really_attended(model, stage, 1, image)
    v, row, col = caught["v"][0], *seen.token
    heads = len(seen.response)
    values = v[: seen.map_size[0], : seen.map_size[1]].reshape(*seen.map_size, heads, -1)
    expected = torch.einsum("hij,ijhd->hd", seen.response, values).flatten()
    torch.testing.assert_close(caught["out"][0, row, col], expected, rtol=1e-4, atol=1e-5)


def test_weights_add_up_to_one_and_lie_in_the_routed_regions() -> None:
    (seen,) = look(small(), picture(), stage=2, block=1, queries=[(30, 80)])
    torch.testing.assert_close(seen.response.sum((1, 2)), torch.ones(len(seen.response)))
    inside = torch.zeros(seen.map_size, dtype=torch.bool)
    for top, left, bottom, right in seen.routed:
        inside[top:bottom, left:right] = True
    assert len(seen.routed) == 4
    assert bool((seen.response[:, ~inside] == 0).all())


def test_padding_takes_a_share_that_is_not_drawn() -> None:
    """A map of 25x25 tokens in 7x7 regions of 4x4: the last row and column of regions reach over the edge."""
    model = small(auto_pad=True, topks=(49, 4, 16, -2))
    (seen,) = look(model, picture(100, 100), stage=1, block=1, queries=[(50, 50)])
    assert seen.map_size == (25, 25)
    assert all(bottom <= 25 and right <= 25 for _, _, bottom, right in seen.routed)
    assert bool((seen.response.sum((1, 2)) < 1).all())


def test_full_attention_has_no_regions() -> None:
    model = small()
    assert isinstance(block_at(model, 4, 1).attn, FullAttention)
    (seen,) = look(model, picture(), stage=4, block=1, queries=[(5, 5)])
    assert seen.routed == ()
    assert seen.region == (0, 0, *seen.map_size)


def test_several_queries_are_looked_at_in_their_order() -> None:
    seen = look(small(), picture(), stage=3, block=-1, queries=[(0, 0), (111, 111), (56, 10)])
    assert [s.query for s in seen] == [(0, 0), (111, 111), (56, 10)]
    assert [s.token for s in seen] == [(0, 0), (6, 6), (0, 3)]


def test_looking_leaves_the_model_as_it_was() -> None:
    model = small().train()
    try:
        look(model, picture(), stage=1, block=1, queries=[(0, 0)])
        assert model.training
    finally:
        model.eval()
    assert not block_at(model, 1, 1).attn._forward_pre_hooks


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"stage": 5}, "stage 5 of 4"),
        ({"block": 3}, "block 3 of 2 in stage 3"),
        ({"block": 0}, "block 0 of 2"),
        ({"queries": [(112, 0)]}, "outside of the 112x112 image"),
    ],
)
def test_what_is_not_there_cannot_be_looked_at(where: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"stage": 3, "block": 1, "queries": [(0, 0)]} | where
    with pytest.raises(UsageError, match=message):
        look(small(), picture(), **asked)


def test_a_block_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no attention to look at"):
        look(small(topks=(1, 0, 4, -2)), picture(), stage=2, block=1, queries=[(0, 0)])


def seen_by_hand() -> Look:
    response = torch.zeros(2, 4, 4)
    response[0, 0, 0] = 1.0
    response[1, 3, 3] = 1.0
    return Look((10, 10), (0, 0), (4, 4), (0, 0, 2, 2), ((2, 2, 4, 4), (0, 0, 2, 2)), response)


def test_a_head_is_one_map_and_none_is_their_mean() -> None:
    seen = seen_by_hand()
    assert float(seen.of_head(None)[0, 0]) == 0.5
    assert float(seen.of_head(1)[3, 3]) == 1.0
    with pytest.raises(UsageError, match="head 2 of 2"):
        seen.of_head(2)


def test_strong_responses_are_drawn_strong_and_routed_regions_stay_clear() -> None:
    image = Image.new("RGB", (64, 64), (40, 80, 160))
    drawn = draw(image, [seen_by_hand()], head=1)
    cell = SIDE // 4
    routed, other = (
        drawn.getpixel((int(2.5 * cell), TITLE + int(2.5 * cell))),
        drawn.getpixel((int(2.5 * cell), TITLE + cell)),
    )
    assert routed == (40, 80, 160)
    assert other != routed
    right = SIDE + GAP + SIDE
    strongest = drawn.crop((right - cell, TITLE + 3 * cell, right, TITLE + 4 * cell)).resize((1, 1))
    red, _, blue = strongest.tobytes()
    assert red > 180 > blue
    assert "2 regions" in describe(seen_by_hand(), None)


@pytest.mark.parametrize("theme", THEMES)
def test_a_drawing_has_titles_and_a_scale_on_the_paper_of_its_theme(theme: str) -> None:
    paper, _ = THEMES[theme]
    drawn = draw(Image.new("RGB", (64, 32), (40, 80, 160)), [seen_by_hand()] * 2, theme=theme)
    assert drawn.getpixel((SIDE + GAP // 2, TITLE + 5)) == paper
    assert drawn.height == 2 * (TITLE + SIDE // 2) + GAP
    for left in (0, SIDE + GAP):
        title = drawn.crop((left, 0, left + SIDE, TITLE))
        assert len(set(title.tobytes())) > 3, "a title is written"
    bar = drawn.crop((2 * (SIDE + GAP), TITLE, 2 * (SIDE + GAP) + BAR, TITLE + SIDE // 2))
    red, _, blue = bar.crop((5, 2, 6, 3)).tobytes()
    assert red > 180 > blue
    assert bar.getpixel((5, bar.height - 1)) == (150, 150, 150)
    numbers = drawn.crop((2 * (SIDE + GAP) + BAR, 0, drawn.width, drawn.height))
    assert len(set(numbers.tobytes())) > 3


def test_regions_of_padding_alone_are_counted_and_not_drawn() -> None:
    seen = dataclasses.replace(seen_by_hand(), routed=((0, 0, 2, 2), (4, 0, 4, 2), (0, 4, 2, 4)))
    assert seen.inside == ((0, 0, 2, 2),)
    draw(Image.new("RGB", (64, 64)), [seen])
    assert "routed to 3 regions, 2 of them padding" in describe(seen, None)


@pytest.mark.parametrize(
    ("size", "shape"), [((320, 224), (224, 320)), ((100, 190), (416, 224)), ((50, 50), (224, 224))]
)
def test_the_model_sees_a_picture_in_its_own_shape(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    file = tmp_path / "x.png"
    Image.new("RGB", size).save(file)
    assert shape_of(file, 224) == shape


def test_a_strip_is_refused_with_what_would_work(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.new("RGB", (900, 30)).save(file)
    with pytest.raises(UsageError, match="--res 64x64 would cut a square"):
        shape_of(file, 64)


@pytest.mark.parametrize("model", ["biformer_tiny", "biformer_stl"])
def test_maps_that_the_regions_do_not_divide_are_drawn(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 64 pixels, stage 2 has 8x8 tokens in 7x7 regions: most regions are padding alone."""
    file = tmp_path / "in.png"
    Image.new("RGB", (60, 50), "green").save(file)
    asked = f"visualize --image {file} --model {model} --res 64 --stage 2 -o {tmp_path / 'a.html'}"
    assert run([*asked.split(), "--pictures", str(tmp_path / "p")]) == 0
    assert "64x64 pixels, stage 2, block 2 of 2" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["attention-dark.png", "attention-light.png"]


def test_a_checkpoint_of_ten_classes_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    weights, file = tmp_path / "w.pth", tmp_path / "in.png"
    torch.save(build("biformer_tiny", num_classes=10).state_dict(), weights)
    Image.new("RGB", (64, 64), "green").save(file)
    asked = f"visualize --image {file} --checkpoint {weights} --res 64 --stage 1 -o {tmp_path / 'a.html'}"
    assert run(asked.split()) == 0
    assert "means nothing" not in capsys.readouterr().err


def test_a_portrait_keeps_its_shape(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.new("RGB", (50, 90), "red").save(file)
    assert open_image(file, 128, 64).size == (64, 128)


def test_the_page_fetches_nothing_and_warns() -> None:
    text = attention_html(
        Image.new("RGB", (64, 64)), [seen_by_hand()], title="<x>", facts="f", warning="random & so on"
    )
    assert "random &amp; so on" in text
    assert "&lt;x&gt;" in text
    assert text.count("data:image/png;base64,") == 1
    assert "http" not in text


def test_visualize_writes_both_files_and_says_that_random_weights_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.png"
    Image.new("RGB", (120, 100), "green").save(file)
    target = tmp_path / "out" / "a.html"
    code = run(f"visualize --image {file} --res 64 --stage 1 --query 3,3 --query 60,9 -o {target}".split())
    out, err = capsys.readouterr()
    assert code == 0
    assert out.count("Query at") == 2
    assert "means nothing" in err
    assert "means nothing" in target.read_text()
    assert target.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png"], "cannot be read"),
        (["--image", "{file}", "--query", "middle"], "is not x,y in pixels"),
        (["--image", "{file}", "--model", "resnet"], "no model is called"),
        (["--image", "{text}"], "cannot be read"),
    ],
)
def test_bad_requests_are_one_sentence(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, words = tmp_path / "in.png", tmp_path / "in.txt"
    Image.new("RGB", (64, 64)).save(file)
    words.write_text("no picture")
    filled = [a.replace("{file}", str(file)).replace("{text}", str(words)) for a in arguments]
    assert run(["visualize", *filled, "-o", str(tmp_path / "a.html")]) == 2
    assert message in capsys.readouterr().err
