"""``bratune visualize``: draw where a query position attends to."""

from __future__ import annotations

from pathlib import Path

import click

from bratune.cli import options, values
from bratune.errors import BratuneError, UsageError


@click.command("visualize")
@click.option("--image", "picture", required=True, type=click.Path(path_type=Path), help="Picture.")
@click.option("--model", "name", default="biformer_tiny", show_default=True, help="Model.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights; random without.")
@options.trust_option
@click.option(
    "--res",
    "--img-size",
    "resolution",
    default="224",
    show_default=True,
    help="Shorter side, e.g. 512, in the picture's own shape; 800x1333 (height x width) cuts it.",
)
@click.option("--n-win", type=click.IntRange(1), default=7, show_default=True, help="Regions per side, S.")
@click.option("--stage", type=click.IntRange(1), default=3, show_default=True, help="From 1.")
@click.option("--block", type=int, default=-1, show_default=True, help="From 1; -1 is the last of the stage.")
@click.option("--head", type=click.IntRange(0), help="From 0; by default the mean of all.")
@click.option("--query", "positions", multiple=True, metavar="X,Y", help="Pixels; repeatable.  [centre]")
@click.option("--seed", type=values.Seed(), default=0, show_default=True, help="Of random weights.")
@click.option(
    "--pictures", type=click.Path(path_type=Path), help="Also a light and a dark PNG, into this folder."
)
@click.option("-o", "--output", default="attention.html", show_default=True, type=click.Path(path_type=Path))
def command(
    picture: Path,
    name: str,
    checkpoint: Path | None,
    resolution: str,
    n_win: int,
    stage: int,
    block: int,
    head: int | None,
    positions: tuple[str, ...],
    seed: int,
    pictures: Path | None,
    output: Path,
) -> None:
    """Draw where query positions attend to: routed regions and attention response, as HTML and PNG.

    bratune visualize --image cat.jpg --checkpoint biformer_tiny.pth --stage 3 --query 120,80
    """
    import torch

    from bratune import variant as variants
    from bratune.kernels.biformer import build
    from bratune.report.attention_map import block_number, blocks_of, look
    from bratune.report.attention_page import THEMES, attention_html, describe, draw, open_image, shape_of
    from bratune.work.inputs import DEVIATION, MEAN

    variant = variants.get_variant(name)
    height, width = variants.parse_resolution(resolution)
    if resolution.strip().isdigit():
        height, width = shape_of(picture, height)
    image = open_image(picture, height, width)
    torch.manual_seed(seed)
    padding = {} if variant.layout == "stl_nchw" else {"auto_pad": True}  # that one always pads
    model = build(name, pretrained=checkpoint, n_win=n_win, **padding)
    model.set_backend("gather")
    queries = [_position(text) for text in positions] or [(width // 2, height // 2)]
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    normalised = (pixels.permute(2, 0, 1) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        DEVIATION
    ).view(3, 1, 1)
    seen = look(model, normalised, stage=stage, block=block, queries=queries)
    warning = "" if checkpoint else "Random weights: the drawing shows the mechanism and means nothing."
    which = "mean of all heads" if head is None else f"head {head}"
    place = f"stage {stage}, block {block_number(model, stage, block)} of {len(blocks_of(model, stage))}"
    facts = f"{name}, {width}x{height} pixels, {place}, {which}"
    page = attention_html(image, seen, title="Where does it look?", facts=facts, warning=warning, head=head)
    target = output.with_suffix(".png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, "utf-8")
        draw(image, seen, head=head).save(target)
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            for theme in THEMES:
                drawn = draw(image, seen, head=head, theme=theme)
                drawn.save(pictures / f"attention-{theme}.png", optimize=True)
    except OSError as error:
        raise BratuneError(f"the drawing cannot be written to {output}: {error.strerror}") from None
    click.echo(facts)
    for one in seen:
        click.echo(describe(one, head))
    if warning:
        click.echo(warning, err=True)
    click.echo(f"results: {output} and {target}", err=True)


def _position(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"the position {text!r} is not x,y in pixels; 120,80 would be")
    return int(parts[0]), int(parts[1])
