"""Pictures: files of images as red, green and blue, eight bits each, or a sentence why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bratune.errors import MissingPackageError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BICUBIC", "PictureError", "each_readable", "open_picture"]

# `PIL.Image.Resampling.BICUBIC`, without importing Pillow.
BICUBIC: Any = 3
# A photograph of the largest cameras; a file of a few kilobytes may claim to be larger and fill the memory.
LARGEST_PIXELS = 120_000_000
# Modes whose values are 16 bits wide: Pillow clips them where they should be scaled.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class PictureError(UsageError):
    """A file that is no picture, or one that is not read."""


def open_picture(path: Path, *, upright: bool = False) -> Image:
    """The picture in a file, of an animation the first one, as RGB.

    Values of 16 bits are scaled, CMYK and palettes are converted, transparency is dropped.

    Args:
        path: The file.
        upright: Turn it as the camera says it was held.

    Raises:
        PictureError: the file is missing, broken, no picture, or claims more pixels than any camera takes.
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingPackageError("pillow", "reading pictures", "vision") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its limits, ours is asked first
            with Image.open(path) as file:
                width, height = file.size
                if width * height > LARGEST_PIXELS:
                    raise PictureError(
                        f"the picture {path} has {width}x{height} pixels; "
                        f"up to {LARGEST_PIXELS / 1e6:.0f} million are read"
                    )
                turned: Any = ImageOps.exif_transpose(file) if upright else file
                return _as_rgb(turned, path)
    except PictureError:
        raise
    except Exception as error:  # bytes that are no picture make the reader raise anything
        what = str(error).strip() or type(error).__name__
        raise PictureError(f"the picture {path} cannot be read: {what}") from None


def _as_rgb(picture: Any, path: Path) -> Image:
    if picture.mode in _SIXTEEN_BITS:
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    elif picture.mode == "F":
        raise PictureError(f"the picture {path} holds fractions, of which no range is known; PNG would work")
    elif picture.mode == "P":
        picture = picture.convert("RGBA")  # a palette may have transparent entries
    converted: Image = picture.convert("RGB")
    return converted


T = TypeVar("T")


def each_readable(files: Iterable[Path], read: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """Files with what ``read`` makes of them; one that cannot be read is left out with a warning."""
    for path in files:
        try:
            found = read(path)
        except PictureError as error:
            warnings.warn(f"{error}; it is left out", stacklevel=3)
            continue
        yield path, found
