"""Inputs: images with natural statistics, and the routes that a measurement runs on.

Random noise hides what data does to caches: neighbouring regions of a picture resemble each other, so that
level one sends them to the same places. Synthetic images therefore have the spectrum of photographs
(amplitude falling as 1 / frequency) and correlated colours.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from bratune.errors import UnknownNameError, UsageError
from bratune.problem import Problem
from bratune.work.pictures import BICUBIC, each_readable, open_picture

__all__ = ["folder_images", "local_routes", "make_images", "make_routes", "natural_images", "picture_files"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Mean and deviation of ImageNet's red, green and blue, as the official models expect them.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def make_images(batch: int, height: int, width: int, *, seed: int, folder: str = "") -> Tensor:
    """``[batch, 3, height, width]`` float32 images on the CPU, from a folder where one is given."""
    if folder:
        return folder_images(Path(folder), batch, height, width)
    return natural_images(batch, height, width, seed=seed)


def natural_images(batch: int, height: int, width: int, *, seed: int) -> Tensor:
    """Synthetic images ``[batch, 3, height, width]`` with the spectrum of photographs.

    Each image has mean 0 and deviation 1. Image i is the same for every batch size.
    """
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.rfftfreq(width)[None, :]
    frequency = torch.sqrt(fy**2 + fx**2)
    frequency[0, 0] = 1.0
    images = []
    for index in range(batch):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        noise = torch.randn(4, height, width, generator=generator)
        spectrum = torch.fft.rfft2(noise) / frequency
        spectrum[:, 0, 0] = 0
        planes = torch.fft.irfft2(spectrum, s=(height, width))
        planes = planes / planes.std(dim=(1, 2), keepdim=True)
        colours = 0.9 * planes[:1] + 0.4 * planes[1:]  # brightness is shared, colour differs a little
        images.append((colours - colours.mean()) / colours.std())
    return torch.stack(images)


def folder_images(folder: Path, batch: int, height: int, width: int) -> Tensor:
    """Pictures of a folder, scaled to ``height x width`` and normalised, ``[batch, 3, height, width]``.

    Files are taken in the order of their names, and again from the first where there are too few. One that
    cannot be read is left out, with a warning.

    Raises:
        UsageError: the folder holds no picture that can be read.
        MissingPackageError: Pillow is not installed.
    """

    def read(path: Path) -> Tensor:
        scaled = open_picture(path).resize((width, height), BICUBIC)
        pixels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, 3).permute(2, 0, 1) / 255.0

    found = [image for _, image in itertools.islice(each_readable(picture_files(folder), read), batch)]
    if not found:
        raise UsageError(f"none of the pictures in the folder {folder} can be read")
    images = [found[index % len(found)] for index in range(batch)]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (torch.stack(images) - mean) / deviation


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; raises `UsageError` when there are none."""
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise UsageError(f"there are no pictures ({', '.join(SUFFIXES)}) in the folder {folder}")
    return files


def make_routes(kind: str, problem: Problem, *, seed: int) -> Tensor:
    """Routes ``[B, R, topk]`` int64 on the CPU, of any kind but ``recorded``.

    Args:
        kind: ``random`` (every choice of distinct regions is as likely), ``local`` (see `local_routes`) or
            ``same`` (every query region attends to the first ``topk`` key regions).
        problem: The call; its regions are those of a padded map where S does not divide the map.
        seed: Seed of ``random``.

    Raises:
        UnknownNameError: the kind is none of these.
    """
    shape = (problem.batch, problem.regions, problem.topk)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(problem.batch, problem.regions, problem.kv_regions, generator=generator)
        return scores.topk(problem.topk, dim=-1).indices
    if kind == "local":
        return local_routes(problem).expand(shape).contiguous()
    if kind == "same":
        return torch.arange(problem.topk).expand(shape).contiguous()
    raise UnknownNameError("kind of made routes", kind, ("random", "local", "same"))


def local_routes(problem: Problem) -> Tensor:
    """The ``topk`` key regions nearest to every query region, itself first, ``[R, topk]``."""
    distance = torch.cdist(_centres(problem.grid), _centres(problem.kv_grid))
    return distance.sort(dim=1, stable=True).indices[:, : problem.topk]


def _centres(grid: tuple[int, int]) -> Tensor:
    """Centres of the regions of a grid on a map of side 1, ``[R, 2]``."""
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
    return torch.cartesian_prod(rows, columns)
