"""Toy study: does the divergence rank settings of trained weights? On real pixels, in minutes, on a CPU.

Scikit-learn's scanned digits on a cluttered canvas are classified by a small BiFormer. It is trained twice:
with a setting like the authors' and with a sparser one. Other settings are then tried without retraining.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bratune.errors import MissingPackageError
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import build
from bratune.tune.calibration import Calibration, calibrate, stratified_settings
from bratune.tune.checkpoint_fidelity import BACKEND, CheckpointFidelity
from bratune.tune.pictures import Pictures
from bratune.tune.progress import Say
from bratune.tune.setting import Setting
from bratune.tune.short_training import Recipe, train_shared
from bratune.tune.space import Space

__all__ = [
    "SIDE",
    "SMOKE",
    "TRAINING",
    "Toy",
    "canvas_digits",
    "run_toy",
    "toy_model",
    "toy_space",
    "train_toy",
]

SIDE = 64
# Grey noise on canvases from 0 to 1, and what they are divided by.
NOISE, SPREAD = 0.1, 0.25
# The settings that weights are trained with: S = 4 in every stage (16 regions).
TRAINED = {"reference": (1, 4, 8, -2), "sparse": (1, 1, 2, -2)}

TRAINING = Recipe(steps=160, batch=48, learning_rate=2e-3)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Size of the study.

    Attributes:
        train: Training canvases.
        proxy: Canvases of the proxy.
        test: Canvases that top-1 is measured on; their digits were not trained on.
        settings: Settings tried per checkpoint.
    """

    train: int = 2048
    proxy: int = 128
    test: int = 400
    settings: int = 16
    recipe: Recipe = TRAINING
    trained: tuple[str, ...] = ("reference", "sparse")


# Seconds, and too little training to prove anything.
SMOKE = Toy(
    train=128,
    proxy=64,
    test=64,
    settings=6,
    recipe=Recipe(steps=6, batch=16),
    trained=("reference",),
)


def canvas_digits(count: int, *, part: str, seed: int = 0) -> Pictures:
    """Canvases of 64 x 64 pixels with one whole digit each and pieces of others as clutter.

    Args:
        count: Canvases.
        part: ``train`` or ``test``: the digits come from disjoint halves of the scans.
        seed: Of positions, sizes and clutter.

    Raises:
        MissingPackageError: scikit-learn, which brings the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError("scikit-learn", "the toy study", extra="test") from None
    scans = load_digits()
    rows = [i for i in range(len(scans.images)) if (i % 2 == 0) == (part == "train")]
    pixels = torch.tensor(scans.images, dtype=torch.float32) / 16.0
    rng = random.Random(f"{seed}-{part}")
    images = torch.zeros(count, 1, SIDE, SIDE)
    labels = torch.zeros(count, dtype=torch.int64)
    noise = torch.Generator().manual_seed(seed + (part == "train"))
    for n in range(count):
        for _ in range(2):
            _paste(images[n, 0], pixels[rng.choice(rows)][: rng.randint(2, 4)], rng.randint(10, 16), rng)
        row = rng.choice(rows)
        _paste(images[n, 0], pixels[row], rng.randint(40, 48), rng)
        labels[n] = int(scans.target[row])
    images = images + NOISE * torch.randn(images.shape, generator=noise)
    images = ((images - 0.1) / SPREAD).expand(-1, 3, -1, -1).contiguous()
    key = f"digits-{part}-{seed}-{count}"
    return Pictures(images=images, labels=labels, classes=tuple("0123456789"), key=key)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The canvases moved by up to 4 pixels (what leaves comes back on the other side), with fresh noise.

    Without it a thousand canvases are learnt by heart in minutes.
    """
    down, right = (int(v) for v in torch.randint(-4, 5, (2,), generator=generator))
    moved = images.roll((down, right), dims=(2, 3))
    return moved + NOISE / SPREAD * torch.randn(len(images), 1, SIDE, SIDE, generator=generator)


def _paste(canvas: Tensor, scan: Tensor, side: int, rng: random.Random) -> None:
    """Draw a scan over a canvas at a random place, scaled to ``side`` columns."""
    height = max(side * scan.shape[0] // scan.shape[1], 2)
    drawn = torch.nn.functional.interpolate(scan[None, None], size=(height, side), mode="bilinear")[0, 0]
    top, left = rng.randint(0, SIDE - height), rng.randint(0, SIDE - side)
    spot = canvas[top : top + height, left : left + side]
    torch.maximum(spot, drawn, out=spot)


def toy_space() -> Space:
    """S of 2 or 4 and every top-k, at 64 x 64 pixels."""
    return Space(model="biformer_tiny", height=SIDE, width=SIDE, default_n_win=4)


def toy_model(**more: Any) -> Backbone:
    """A BiFormer of five blocks with few channels, ten classes."""
    return build(
        "biformer_tiny",
        depth=(1, 1, 2, 1),
        embed_dim=(32, 64, 96, 128),
        qk_dims=(32, 64, 96, 128),
        n_win=4,
        num_classes=10,
        auto_pad=True,
        backend=BACKEND,
        **more,
    )


def train_toy(setting: Setting, toy: Toy, *, seed: int = 0) -> tuple[Backbone, list[float]]:
    """A model trained with one setting, and the loss of every step."""
    torch.manual_seed(seed)
    model = toy_model()
    pictures = canvas_digits(toy.train, part="train", seed=seed)
    assert pictures.labels is not None
    losses = train_shared(
        model, pictures.images, pictures.labels, lambda: setting, toy.recipe, seed=seed, augment=shifted
    )
    return model, losses


def run_toy(
    toy: Toy | None = None,
    *,
    seed: int = 0,
    say: Say = lambda text: None,
    train: Callable[[Setting, Toy], tuple[Backbone, list[float]]] | None = None,
) -> dict[str, Calibration]:
    """One calibration per trained checkpoint, by its name.

    Args:
        toy: Size of the study.
        seed: Of everything.
        say: Told what happens.
        train: Makes weights; by default `train_toy`.
    """
    toy = toy or Toy()
    space, found = toy_space(), {}
    proxy_pictures = canvas_digits(toy.proxy, part="test", seed=seed + 1)
    test_pictures = canvas_digits(toy.test, part="test", seed=seed + 2)
    for name in toy.trained:
        own = space.setting(4, TRAINED[name])
        model, losses = (train or (lambda s, t: train_toy(s, t, seed=seed)))(own, toy)
        say(f"{name} ({own}): training loss {losses[0]:.3f} to {sum(losses[-10:]) / len(losses[-10:]):.3f}")
        proxy = CheckpointFidelity(model, space, own, proxy_pictures)
        test = CheckpointFidelity(model, space, own, test_pictures)
        settings: Sequence[Setting] = stratified_settings(space, proxy, toy.settings, seed=seed)
        found[name] = calibrate(proxy, test, settings, say=say, seed=seed)
        say(f"{name}: top-1 {100 * found[name].top1:.1f} %; {found[name]}")
    return found
