"""Pictures: calibration images from a folder, with the usual preprocessing of the official models."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bratune.errors import UsageError
from bratune.work.inputs import DEVIATION, MEAN, SUFFIXES
from bratune.work.pictures import BICUBIC, each_readable, open_picture

__all__ = ["Pictures", "load_pictures"]

# Share of the shorter side that the centre crop keeps, as in the official evaluation at 224.
CROP = 0.875


@dataclass(frozen=True)
class Pictures:
    """Images ready for a model.

    Attributes:
        images: ``[N, 3, H, W]`` float32, normalised.
        labels: ``[N]`` int64; None where they are not known.
        classes: Names of the labels.
        key: Sixteen hexadecimal digits that name the set.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        return len(self.images)


def load_pictures(
    folder: str | Path, height: int, width: int, *, count: int, labels: bool = False, seed: int = 0
) -> Pictures:
    """Up to ``count`` pictures of a folder, drawn with a fixed seed; what cannot be read is left out.

    The shorter side is scaled so that the centre crop of ``height x width`` keeps 87.5 % of it.

    Args:
        folder: Searched with its subfolders; with ``labels``, the subfolders are the classes, numbered in the
            order of their names (as a folder of ImageNet).
        height: Of the crop, in pixels.
        width: Of the crop.
        count: Most pictures.
        labels: Read labels.
        seed: Which pictures are drawn.

    Raises:
        UsageError: there are no pictures that can be read, or no classes.
        MissingPackageError: Pillow is not installed.
    """
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES) if root.is_dir() else []
    if not files:
        raise UsageError(f"there are no pictures ({', '.join(SUFFIXES)}) below {root}")
    names = sorted({p.relative_to(root).parts[0] for p in files if p.parent != root})
    if labels and len(names) < 2:
        raise UsageError(
            f"--labels needs one subfolder per class below {root}, found {len(names)}; without --labels "
            "the pictures would serve"
        )
    if labels:
        files = [p for p in files if p.parent != root]
    drawn = random.Random(seed).sample(files, len(files))
    # A picture that cannot be read makes room for the next that was drawn.
    readable = each_readable(drawn, lambda path: _read(path, height, width))
    pictures = sorted(itertools.islice(readable, count), key=lambda pair: pair[0])
    if not pictures:
        raise UsageError(f"none of the {len(files)} pictures below {root} can be read")
    chosen = [path for path, _ in pictures]
    images = torch.stack([image for _, image in pictures])
    found = [names.index(p.relative_to(root).parts[0]) for p in chosen] if labels else []
    text = "\n".join([f"{height}x{width}", *(f"{p.relative_to(root)}:{p.stat().st_size}" for p in chosen)])
    return Pictures(
        images=images,
        labels=torch.tensor(found) if labels else None,
        classes=tuple(names) if labels else (),
        key=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _read(path: Path, height: int, width: int) -> Tensor:
    picture = open_picture(path)
    scale = max(height / picture.height, width / picture.width) / CROP
    size = (max(round(picture.width * scale), width), max(round(picture.height * scale), height))
    picture = picture.resize(size, BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = pixels.view(height, width, 3).permute(2, 0, 1) / 255.0
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
