"""``bratune visualize``: draw where a query position attends to."""

from __future__ import annotations

from pathlib import Path

import click

from bratune.cli import options
from bratune.errors import BratuneError, UsageError


@click.command("visualize")
@click.option("--image", "picture", required=True, type=click.Path(path_type=Path), help="Picture.")
@click.option("--model", "name", default="biformer_tiny", show_default=True, help="Model.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights; random without.")
@options.trust_option
@click.option("--res", "--img-size", "resolution", default="224", show_default=True, help="512 or 800x1333.")
@click.option("--n-win", type=click.IntRange(1), default=7, show_default=True, help="Regions per side, S.")
@click.option("--stage", type=click.IntRange(1), default=3, show_default=True, help="From 1.")
@click.option("--block", type=int, default=-1, show_default=True, help="From 1; -1 is the last of the stage.")
@click.option("--head", type=click.IntRange(0), help="From 0; by default the mean of all.")
@click.option("--query", "positions", multiple=True, metavar="X,Y", help="Pixels; repeatable.  [centre]")
@click.option("--seed", type=options.Seed(), default=0, show_default=True, help="Of random weights.")
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
    output: Path,
) -> None:
    """Draw where query positions attend to: routed regions and attention response, as HTML and PNG.

    bratune visualize --image cat.jpg --checkpoint biformer_tiny.pth --stage 3 --query 120,80
    """
    import torch

    from bratune import variant as variants
    from bratune.kernels.biformer import build
    from bratune.report.attention_map import look
    from bratune.report.attention_page import attention_html, describe, draw, open_image
    from bratune.work.inputs import DEVIATION, MEAN

    variant = variants.get_variant(name)
    height, width = variants.parse_resolution(resolution)
    image = open_image(picture, height, width)
    torch.manual_seed(seed)
    padding = {"auto_pad": True} if variant.layout == "biformer" else {}
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
    facts = f"{name}, {width}x{height} pixels, stage {stage}, block {block}, {which}"
    page = attention_html(image, seen, title="Where does it look?", facts=facts, warning=warning, head=head)
    target = output.with_suffix(".png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, "utf-8")
        draw(image, seen, head=head).save(target)
    except OSError as error:
        raise BratuneError(f"the drawing cannot be written to {output}: {error.strerror}") from None
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
