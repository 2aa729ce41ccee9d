"""Attention page: what queries see, drawn over the image, as PNG and as one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bratune.errors import MissingPackageError, UsageError
from bratune.report.attention_map import Look
from bratune.work.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["THEMES", "attention_html", "draw", "open_image", "shape_of"]

SIDE = 448
GAP = 12
# Height of a title, width of the colour bar, and of the numbers beside it.
TITLE, BAR, NUMBERS = 30, 14, 64
# Paper and ink.
THEMES = {"light": ((255, 255, 255), (37, 48, 58)), "dark": ((13, 17, 23), (228, 232, 236))}
QUERY = (255, 214, 10)
ROUTED = (22, 200, 170)
# Colours of a weak to a strong response; weak is transparent, so that the image stays visible.
RAMP = ((20, 90, 120), (30, 160, 130), (250, 200, 60), (235, 80, 40))


def _pillow() -> Any:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise MissingPackageError("pillow", "drawing attention", extra="vision") from None
    return Image, ImageDraw, ImageFont


def shape_of(path: Path, shorter: int) -> tuple[int, int]:
    """Height and width of a picture scaled so that its shorter side has some pixels, in steps of 32.

    Raises:
        UsageError: the file is missing or is no picture, or one side is more than four times the other.
    """
    width, height = open_picture(path, upright=True).size
    if max(width, height) > 4 * min(width, height):
        raise UsageError(
            f"the picture {path} has {width}x{height} pixels, one side more than four times the other; "
            f"--res {shorter}x{shorter} would cut a square from its centre"
        )
    longer = max(shorter, 32 * round(shorter * max(width, height) / min(width, height) / 32))
    return (shorter, longer) if width >= height else (longer, shorter)


def open_image(path: Path, height: int, width: int) -> Image:
    """A picture scaled to cover ``height x width`` pixels and cut to it around the centre.

    Raises:
        UsageError: the file is missing or is no picture.
        MissingPackageError: Pillow is not installed.
    """
    picture = open_picture(path, upright=True)
    from PIL import ImageOps

    found: Image = ImageOps.fit(picture, (width, height))
    return found


def draw(image: Image, looks: Sequence[Look], *, head: int | None = None, theme: str = "light") -> Image:
    """One row per query: the routed regions on the left, the response with its scale on the right.

    Args:
        image: The picture that the model saw.
        looks: What its queries saw.
        head: A head; by default the mean of all.
        theme: One of `THEMES`, for the paper around the pictures.
    """
    module, drawing, fonts = _pillow()
    paper, ink = THEMES[theme]
    scale = SIDE / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    picture = image.resize(size, module.Resampling.BICUBIC)
    right = size[0] + GAP
    row = TITLE + size[1] + GAP
    canvas: Image = module.new("RGB", (right + size[0] + GAP + BAR + NUMBERS, len(looks) * row - GAP), paper)
    pen, font = drawing.Draw(canvas), fonts.load_default(size=15)
    for number, seen in enumerate(looks):
        top = number * row + TITLE
        left_title = "routed regions" if seen.routed else "attends to the whole map"
        right_title = "attention weight, " + (f"head {head}" if head is not None else "mean of all heads")
        pen.text((0, top - 8), left_title, fill=ink, font=font, anchor="ls")
        pen.text((right, top - 8), right_title, fill=ink, font=font, anchor="ls")
        canvas.paste(_regions(picture, seen, paper), (0, top))
        canvas.paste(_response(picture, seen, head), (right, top))
        beside = right + size[0] + GAP
        canvas.paste(_scale(size[1]), (beside, top))
        strongest = f"{100 * float(seen.of_head(head).max()):.2g} %"
        for place, text, anchor in ((top, strongest, "la"), (top + size[1], "0 %", "ld")):
            pen.text((beside + BAR + 6, place), text, fill=ink, font=font, anchor=anchor)
    return canvas


def _scale(height: int) -> Image:
    """The colour bar of the response, the strongest on top."""
    import numpy as np

    module, _, _ = _pillow()
    strength = np.linspace(1, 0, height, dtype=np.float32)[:, None].repeat(BAR, axis=1)
    grey = np.full((height, BAR, 3), 150, dtype=np.float32)
    bar: Image = module.fromarray(_coloured(strength, grey))
    return bar


def _regions(picture: Image, seen: Look, paper: tuple[int, int, int]) -> Image:
    """The picture with everything but the routed regions dimmed."""
    module, drawing, _ = _pillow()
    height, width = seen.map_size
    fx, fy = picture.width / width, picture.height / height
    dimmed: Image = module.blend(picture, module.new("RGB", picture.size, paper), 0.62)
    boxes = [(left * fx, t * fy, r * fx, b * fy) for t, left, b, r in seen.inside]
    if not seen.routed:
        dimmed = picture.copy()
    for box in boxes:
        left, top, right, bottom = (round(v) for v in box)
        dimmed.paste(picture.crop((left, top, right, bottom)), (left, top))
    pen = drawing.Draw(dimmed)
    for box in boxes:
        pen.rectangle([box[0], box[1], box[2] - 1, box[3] - 1], outline=ROUTED, width=2)
    top, left, bottom, right = seen.region
    if seen.routed:
        pen.rectangle([left * fx, top * fy, right * fx - 1, bottom * fy - 1], outline=QUERY, width=2)
    _mark(pen, picture, seen)
    return dimmed


def _response(picture: Image, seen: Look, head: int | None) -> Image:
    """The picture under the attention weights, scaled to the largest one."""
    module, drawing, _ = _pillow()
    import numpy as np

    weights = seen.of_head(head).float().numpy()
    relative = weights / max(float(weights.max()), 1e-12)
    levels = module.fromarray((relative * 255).astype("uint8"))
    # One token is many pixels; nearest keeps it visible that the response has that resolution.
    levels = levels.resize(picture.size, module.Resampling.NEAREST)
    strength = np.asarray(levels, dtype=np.float32) / 255
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32) * 0.75 + 50
    out: Image = module.fromarray(_coloured(strength, grey))
    _mark(drawing.Draw(out), picture, seen)
    return out


def _coloured(strength: Any, grey: Any) -> Any:
    """Strengths from 0 to 1 in colour over a grey picture; 0 is transparent."""
    import numpy as np

    ramp = np.array(RAMP, dtype=np.float32)
    position = strength * (len(RAMP) - 1)
    low = np.clip(position.astype(int), 0, len(RAMP) - 2)
    part = (position - low)[..., None]
    colour = ramp[low] * (1 - part) + ramp[low + 1] * part
    alpha = (0.12 + 0.75 * strength**0.6)[..., None] * (strength > 0)[..., None]
    return np.clip(grey * (1 - alpha) + colour * alpha, 0, 255).astype("uint8")


def _mark(pen: Any, picture: Image, seen: Look) -> None:
    """A ring at the centre of the query's token."""
    height, width = seen.map_size
    x = (seen.token[1] + 0.5) * picture.width / width
    y = (seen.token[0] + 0.5) * picture.height / height
    pen.ellipse([x - 7, y - 7, x + 7, y + 7], outline=(20, 24, 28), width=5)
    pen.ellipse([x - 6, y - 6, x + 6, y + 6], outline=QUERY, width=3)


def attention_html(
    image: Image, looks: Sequence[Look], *, title: str, facts: str, warning: str = "", head: int | None = None
) -> str:
    """The drawing of every query with its numbers, as one file that fetches nothing.

    Args:
        image: The picture that the model saw.
        looks: What its queries saw.
        title: Of the page.
        facts: Model, stage, block and head in words.
        warning: Shown above everything, e.g. that the weights are random.
        head: A head; by default the mean of all.
    """
    figures = "".join(_figure(image, seen, head) for seen in looks)
    note = f'<p class="warning">{html.escape(warning)}</p>' if warning else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(facts)}</p>{note}{figures}</body></html>\n"
    )


CSS = """
:root { color-scheme: light dark; }
body {
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  max-width: 960px; margin: 0 auto; padding: 32px 20px 60px;
}
h1 { font-size: 24px; margin: 0 0 4px; letter-spacing: -0.01em; }
p { margin: 0 0 12px; opacity: 0.75; }
.warning { opacity: 1; border-left: 3px solid #c8603c; padding: 6px 12px; }
figure { margin: 28px 0 0; }
img { width: 100%; height: auto; border-radius: 4px; display: block; }
figcaption { font-size: 13.5px; margin-top: 8px; opacity: 0.8; }
"""


def _figure(image: Image, seen: Look, head: int | None) -> str:
    buffer = io.BytesIO()
    draw(image, [seen], head=head).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    caption = describe(seen, head)
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def describe(seen: Look, head: int | None) -> str:
    """A query and what it sees in words."""
    weights = seen.of_head(head)
    best = int(weights.argmax())
    row, col = divmod(best, weights.shape[1])
    tokens = f"{seen.map_size[0]}x{seen.map_size[1]} tokens"
    regions = f"routed to {len(seen.routed)} regions" if seen.routed else "attends to the whole map"
    outside = len(seen.routed) - len(seen.inside)
    regions += f", {outside} of them padding" if outside else ""
    return (
        f"Query at {seen.query[0]},{seen.query[1]} (token {seen.token[0]},{seen.token[1]} of {tokens}): "
        f"{regions}; the strongest token, {row},{col}, has {100 * float(weights.max()):.1f} % of the weight, "
        f"padding {100 * max(0.0, 1 - float(weights.sum())):.1f} %."
    )
