"""Inputs: spectra of images, pictures from a folder, and the kinds of routes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bratune.errors import UnknownNameError, UsageError
from bratune.problem import Problem
from bratune.work.inputs import folder_images, local_routes, make_images, make_routes, natural_images

PROBLEM = Problem(batch=3, height=28, width=42, heads=2, head_dim=8, region=(4, 6), topk=5)


def test_synthetic_images_are_standardised_and_the_same_every_time() -> None:
    images = natural_images(2, 64, 96, seed=3)
    assert images.shape == (2, 3, 64, 96)
    assert torch.allclose(images.mean((1, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(images.std((1, 2, 3)), torch.ones(2), atol=1e-3)
    assert torch.equal(images, natural_images(2, 64, 96, seed=3))
    assert not torch.equal(images, natural_images(2, 64, 96, seed=4))


def test_an_image_does_not_depend_on_the_batch_that_it_is_in() -> None:
    assert torch.equal(natural_images(4, 32, 32, seed=0)[:2], natural_images(2, 32, 32, seed=0))


def test_the_amplitude_of_synthetic_images_falls_as_one_over_frequency() -> None:
    plane = natural_images(8, 128, 128, seed=0).mean(1)
    power = torch.fft.rfft2(plane).abs().pow(2).mean(0)
    fy, fx = torch.fft.fftfreq(128)[:, None], torch.fft.rfftfreq(128)[None]
    frequency = torch.sqrt(fy**2 + fx**2)
    low, high = (frequency - 0.05).abs() < 0.01, (frequency - 0.4).abs() < 0.01
    ratio = float((power[low].mean() / power[high].mean()).sqrt())
    assert ratio == pytest.approx(8, rel=0.15)  # amplitudes at frequencies that differ by 8
    noise = torch.fft.rfft2(torch.randn(8, 128, 128)).abs().pow(2).mean(0)
    assert float((noise[low].mean() / noise[high].mean()).sqrt()) == pytest.approx(1, rel=0.2)


def test_pictures_of_a_folder_are_scaled_normalised_and_repeated(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (10, 20), (255, 0, 0)).save(tmp_path / "b.png")
    image.new("L", (30, 5), 0).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    images = make_images(3, 8, 16, seed=0, folder=str(tmp_path))
    assert images.shape == (3, 3, 8, 16)
    assert torch.equal(images[0], images[2])
    assert float(images[1, 0, 0, 0]) == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)
    assert float(images[0, 2, 0, 0]) == pytest.approx((0 - 0.406) / 0.225, rel=1e-5)


def test_a_folder_without_pictures_and_a_broken_picture_are_errors(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    with pytest.raises(UsageError, match="no pictures"):
        folder_images(tmp_path, 1, 8, 8)
    with pytest.raises(UsageError, match="no pictures"):
        folder_images(tmp_path / "nowhere", 1, 8, 8)
    (tmp_path / "broken.jpg").write_bytes(b"not a jpeg")
    with (
        pytest.warns(UserWarning, match=r"broken\.jpg cannot be read"),
        pytest.raises(UsageError, match="none of the pictures"),
    ):
        folder_images(tmp_path, 1, 8, 8)


@pytest.mark.parametrize("kind", ["random", "local", "same"])
def test_made_routes_are_distinct_regions_that_exist(kind: str) -> None:
    routes = make_routes(kind, PROBLEM, seed=1)
    assert routes.shape == (3, 49, 5)
    assert routes.dtype == torch.int64
    assert int(routes.min()) >= 0
    assert int(routes.max()) < 49
    assert all(len(set(row.tolist())) == 5 for row in routes.flatten(0, 1))
    assert torch.equal(routes, make_routes(kind, PROBLEM, seed=1))


def test_random_routes_depend_on_the_seed_and_use_every_region() -> None:
    routes = make_routes("random", PROBLEM, seed=1)
    assert not torch.equal(routes, make_routes("random", PROBLEM, seed=2))
    assert len(set(routes.flatten().tolist())) == 49


def test_local_routes_start_with_the_region_itself_and_go_to_its_neighbours() -> None:
    routes = local_routes(PROBLEM)
    assert torch.equal(routes[:, 0], torch.arange(49))
    assert set(routes[24].tolist()) == {24, 17, 23, 25, 31}
    assert {1, 7} <= set(routes[0].tolist())


def test_same_routes_send_everyone_to_the_same_place() -> None:
    assert set(make_routes("same", PROBLEM, seed=0).flatten().tolist()) == {0, 1, 2, 3, 4}


def test_recorded_routes_cannot_be_made() -> None:
    with pytest.raises(UnknownNameError, match="recorded"):
        make_routes("recorded", PROBLEM, seed=0)
