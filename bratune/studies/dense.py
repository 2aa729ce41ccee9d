"""Dense accuracy study: which proxy ranks settings of a trained segmentation network by lost mIoU.

The pictures are synthetic scenes, a few shapes on a ground, each filled with a piece of a real texture
(scikit-image's photographs, left halves to train on, right halves for everything else); the classes are the
textures. The network is a small BiFormer whose four maps are added up by 1 x 1 convolutions. Cases are those
of `bratune.studies.accuracy`, with the loss of mIoU in the place of the loss of top-1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.record import utc_now
from bratune.studies.accuracy import (
    TRAINED,
    Size,
    TrainedCase,
    rank_of,
    small_model,
    small_space,
    spread,
    trial_of,
)
from bratune.studies.data_sets import PHOTOGRAPHS, SIDE, texture_halves
from bratune.studies.proxies import PROXIES, ROUTING_PICTURES, Observed, routed_regions
from bratune.tune.checkpoint_fidelity import reroute
from bratune.tune.fidelity import feature_distance
from bratune.tune.setting import Setting
from bratune.tune.short_training import Recipe
from bratune.tune.show import Say

__all__ = ["SCENES", "Segmenter", "mean_iou", "run_dense_case", "scenes"]

SCENES = "scenes"
TEXTURES = ("brick", "grass", "gravel", "coins", "immunohistochemistry")
NOISE = 0.3


def scenes(count: int, *, part: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures ``[count, 3, 64, 64]`` and the class of each pixel, ``[count, 64, 64]`` int64.

    Args:
        count: Scenes.
        part: ``train`` or ``test``: other halves of the photographs.
        seed: Of shapes, pieces and noise.

    Raises:
        MissingPackageError: scikit-image, which brings the photographs, is not installed.
    """
    halves = texture_halves(part)
    textures = [halves[PHOTOGRAPHS.index(name)] for name in TEXTURES]
    rng = random.Random(f"scenes-{seed}-{part}")
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images, labels = torch.zeros(count, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for n in range(count):
        for shape in range(1 + rng.randint(2, 4)):
            label = rng.randrange(len(TEXTURES))
            y, x = rng.uniform(0, SIDE), rng.uniform(0, SIDE)
            high, wide = rng.uniform(8, 24), rng.uniform(8, 24)
            inside = ((rows - y) / high) ** 2 + ((columns - x) / wide) ** 2 <= 1
            where = inside if shape else torch.ones_like(inside)  # the first is the ground
            images[n] = torch.where(where, _piece(textures[label], rng), images[n])
            labels[n] = torch.where(where, label, labels[n])
    noise = torch.Generator().manual_seed(2 * seed + (part == "train"))
    images = images + NOISE * torch.randn(images.shape, generator=noise)
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), labels


class Segmenter(nn.Module):
    """Scores per pixel from the four maps of a small BiFormer."""

    def __init__(self, classes: int = len(TEXTURES)) -> None:
        super().__init__()
        self.backbone = small_model(features_only=True)
        self.heads = nn.ModuleList(
            nn.Conv2d(norm.weight.numel(), classes, 1)
            for norm in self.backbone.extra_norms
            if isinstance(norm, nn.LayerNorm)
        )

    def from_maps(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores ``[N, classes, H / 4, W / 4]`` of the maps of the backbone."""
        size = maps[0].shape[-2:]
        scores = [
            F.interpolate(head(level), size=size, mode="bilinear")
            for head, level in zip(self.heads, maps, strict=True)
        ]
        return torch.stack(scores).sum(0)

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[N, classes, H, W]``."""
        return F.interpolate(self.from_maps(self.backbone(images)), size=images.shape[-2:], mode="bilinear")


def mean_iou(found: Tensor, labels: Tensor, classes: int = len(TEXTURES)) -> float:
    """Intersection over union of the pixels of all pictures, mean over the classes that occur."""
    counts = torch.bincount((labels * classes + found).flatten(), minlength=classes**2)
    table = counts.reshape(classes, classes).double()
    both = table.diagonal()
    union = table.sum(0) + table.sum(1) - both
    return float((both / union)[union > 0].mean())


def run_dense_case(
    data: str, seed: int, trained: str, size: Size, *, say: Say = lambda text: None
) -> TrainedCase:
    """Train one segmentation network and try other settings on it; as `bratune.studies.accuracy.run_case`."""
    space = small_space()
    own = space.setting(4, TRAINED[trained])
    torch.manual_seed(seed)
    model = Segmenter()
    _train(model, own, size, seed)
    # A scene holds thousands of labelled pixels, so that fewer are needed than pictures with a label each.
    proxy = scenes(max(size.proxy // 5, ROUTING_PICTURES), part="test", seed=2 * seed + 1)
    test = scenes(max(size.test // 5, ROUTING_PICTURES), part="test", seed=2 * seed + 2)
    before, before_test = _observe(model, own, proxy[0]), _observe(model, own, test[0])
    score = mean_iou(before_test.top, test[1])
    trials = []
    for setting in spread(space, own, size.settings, seed):
        after, after_test = _observe(model, setting, proxy[0]), _observe(model, setting, test[0])
        apart = float(feature_distance(before.features, after.features).mean())
        lost = score - mean_iou(after_test.top, test[1])
        trials.append(
            trial_of(
                space, setting, (before, after), proxy[1], (before_test, after_test), test[1],
                features=apart, test_loss=lost,
            )
        )  # fmt: skip
    found = TrainedCase(
        data=data,
        seed=seed,
        trained=trained,
        top1=score,
        images=len(proxy[0]),
        test_images=len(test[0]),
        trials=tuple(trials),
        created_utc=utc_now(),
        measure="mIoU",
    )
    say(
        f"{data}, seed {seed}, trained {trained}: mIoU {100 * score:.1f} %; Spearman with lost mIoU: "
        + ", ".join(f"{name} {rank_of(found, name):.2f}" for name in PROXIES)
    )
    return found


def _observe(model: Segmenter, setting: Setting, images: Tensor, *, batch: int = 64) -> Observed:
    reroute(model.backbone, setting.n_win, setting.topks)
    model.eval()
    logits: list[Tensor] = []
    maps: list[list[Tensor]] = []
    with torch.no_grad():
        for some in torch.split(images, batch):
            levels = list(model.backbone(some))
            maps.append(levels)
            logits.append(F.interpolate(model.from_maps(levels), size=some.shape[-2:], mode="bilinear"))
    seen = routed_regions(model.backbone, images[:ROUTING_PICTURES])
    joined = tuple(torch.cat(levels) for levels in zip(*maps, strict=True))
    return Observed(torch.cat(logits), joined, seen)


def _train(model: Segmenter, own: Setting, size: Size, seed: int) -> None:
    """Train with one setting; as `bratune.tune.short_training.train_shared`, a label per pixel."""
    recipe: Recipe = size.recipe
    images, labels = scenes(size.train // 4, part="train", seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    generator = torch.Generator().manual_seed(seed)
    reroute(model.backbone, own.n_win, own.topks)
    model.train()
    for _ in range(recipe.steps):
        rows = torch.randint(len(images), (max(recipe.batch // 3, 2),), generator=generator)
        some, wanted = images[rows], labels[rows]
        if int(torch.randint(2, (1,), generator=generator)):
            some, wanted = some.flip(3), wanted.flip(2)
        some = some + NOISE * torch.randn(len(some), 1, SIDE, SIDE, generator=generator)
        loss = F.cross_entropy(model(some), wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()


def _piece(half: Tensor, rng: random.Random) -> Tensor:
    top, left = rng.randint(0, half.shape[0] - SIDE), rng.randint(0, half.shape[1] - SIDE)
    piece = half[top : top + SIDE, left : left + SIDE]
    return (piece - piece.mean()) / piece.std().clamp_min(1e-3)
