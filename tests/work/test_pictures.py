"""Pictures of every kind are read or refused in a sentence, and a bad one costs itself."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bratune.errors import UsageError
from bratune.tune.pictures import load_pictures
from bratune.work.inputs import folder_images
from bratune.work.pictures import PictureError, open_picture

Image: Any = pytest.importorskip("PIL.Image", reason="pictures need pillow")

GREY = (128, 128, 128)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says how large it is, whatever is in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", data or zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def sixteen_bits(path: Path) -> None:
    Image.frombytes("I;16", (8, 8), struct.pack("<H", 32896) * 64).save(path)


def palette(path: Path) -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, *GREY])
    picture.save(path, transparency=bytes([0, 128]))


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREY, "red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


READ: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: Image.new("RGB", (8, 8), GREY).save(path),
    "grey.png": lambda path: Image.new("L", (8, 8), 128).save(path),
    "alpha.png": lambda path: Image.new("RGBA", (8, 8), (*GREY, 10)).save(path),
    "sixteen.png": sixteen_bits,
    "palette.png": palette,
    "cmyk.jpg": lambda path: Image.new("CMYK", (8, 8), (127, 127, 127, 0)).save(path, quality=95),
    "animated.webp": animated,
    "bits.png": lambda path: Image.new("1", (8, 8), 1).save(path),
}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bomb.png": (lambda path: path.write_bytes(png(100_000, 100_000)), "pixels"),
    "large.png": (
        lambda path: path.write_bytes(png(12_000, 11_000)),
        "has 12000x11000 pixels; up to 120 million",
    ),
    "cut.png": (lambda path: path.write_bytes(png(8, 8)[:45]), "cannot be read"),
    "broken.png": (lambda path: path.write_bytes(png(8, 8, b"no stream")), "cannot be read"),
    "text.jpg": (lambda path: path.write_text("<html>"), "cannot be read"),
    "empty.bmp": (lambda path: path.write_bytes(b""), "cannot be read"),
    "nothing.png": (lambda path: path.write_bytes(png(0, 0)), "cannot be read"),
    "fractions.png": (lambda path: Image.new("F", (8, 8), 0.5).save(path, "TIFF"), "holds fractions"),
    "folder.png": (lambda path: path.mkdir(), "cannot be read"),
}


@pytest.mark.parametrize("name", READ)
def test_a_picture_of_any_kind_has_the_colour_that_it_shows(tmp_path: Path, name: str) -> None:
    READ[name](tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = open_picture(tmp_path / name)
    assert (picture.mode, picture.size) == ("RGB", (8, 8))
    wanted = 255 if name == "bits.png" else 128
    colour: Any = picture.getpixel((3, 3))
    assert all(abs(value - wanted) <= 2 for value in colour)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_one_sentence(tmp_path: Path, name: str) -> None:
    make, words = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(PictureError, match=words) as said:
        open_picture(tmp_path / name)
    assert name in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_picture_costs_that_picture(tmp_path: Path, name: str) -> None:
    for good in ("rgb.png", "grey.png"):
        READ[good](tmp_path / good)
    REFUSED[name][0](tmp_path / name)
    with pytest.warns(UserWarning, match=rf"{name}.*it is left out"):
        images = folder_images(tmp_path, 3, 8, 8)
    assert images.shape == (3, 3, 8, 8)
    assert (images[0] == images[2]).all()
    with pytest.warns(UserWarning, match=rf"{name}.*it is left out"):
        assert len(load_pictures(tmp_path, 8, 8, count=3)) == 2


def test_a_draw_without_bad_pictures_is_the_same_as_ever(tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number,) * 3).save(tmp_path / f"{number}.png")
    first = load_pictures(tmp_path, 8, 8, count=3, seed=1)
    assert (load_pictures(tmp_path, 8, 8, count=3, seed=1).images == first.images).all()
    assert load_pictures(tmp_path, 8, 8, count=3, seed=1).key == first.key
    assert load_pictures(tmp_path, 8, 8, count=3, seed=2).key != first.key


def test_a_folder_of_bad_pictures_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    for read in (lambda: folder_images(tmp_path, 1, 8, 8), lambda: load_pictures(tmp_path, 8, 8, count=1)):
        with pytest.warns(UserWarning, match="left out"), pytest.raises(UsageError, match="none of the"):
            read()
