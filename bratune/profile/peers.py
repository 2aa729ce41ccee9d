"""Peers: models of timm and whole models of ours, measured by the same meter on the same kind of images.

A peer's row is a whole-model row whose backend is ``timm``; its multiply-adds are counted by torch while it
runs, so that it stands beside ours on the axis of work. Our own rows here are those of `OWN`: forms of a
whole model, which no backend's name stands for.

    $ python -m bratune.profile.peers --model biformer_tiny --res 224 -b 1 --peers runtime,swin_tiny
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.cell import Cell
from bratune.errors import MeasureError, MissingPackageError, UnknownNameError, UnsupportedError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bratune.measure.meter import Meter
    from bratune.measure.settings import MeterSettings
    from bratune.store import Store
    from bratune.work.request import Request

__all__ = [
    "BACKEND",
    "OWN",
    "PEERS",
    "Peer",
    "build_peer",
    "describe",
    "measure_peers",
    "pair_lines",
    "peer_cells",
    "timm_cell",
    "timm_model",
]

BACKEND = "timm"
# Models of about the work or accuracy of BiFormer-T and -S, by the short names that users type.
PEERS = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "convnext_tiny": "convnext_tiny",
    "pvt_v2_b2": "pvt_v2_b2",
    "maxvit_tiny": "maxvit_tiny_rw_224",
    "deit_small": "deit_small_patch16_224",
    "resnet50": "resnet50",
}
# Forms of a model of ours: the official sequence of operations, the published attention in this package's
# layers, the preferred backend in them, and the runtime for inference.
OWN = ("published", "gather", "auto", "runtime")


@dataclass(frozen=True)
class Peer:
    """A model with its images.

    Attributes:
        model: On the device, in evaluation or training mode.
        images: ``[B, 3, H, W]`` on the device.
        macs: Multiply-adds of one forward pass over the batch.
    """

    model: nn.Module
    images: Tensor
    macs: int


def _timm() -> Any:
    from bratune.kernels.timm_import import import_timm

    return import_timm("measuring peers")


def peer_cells(names: Sequence[str], request: Request) -> list[Cell]:
    """A whole-model cell per peer, batch size and regime of a request.

    Args:
        names: Short names of `PEERS`, any name that timm knows, or a name of `OWN`, which stands for every
            model of the request.
        request: Batches, image, dtype, direction, regimes and cache states.

    Raises:
        UnknownNameError: timm has no such model.
        MissingPackageError: timm is not installed.
    """
    from bratune.work.cells import scenes

    found = []
    for name in names:
        if name in OWN:
            found += [scene.model_cell((name,)) for scene in scenes(request)]
            continue
        model, timm = PEERS.get(name, name), _timm()
        if not timm.is_model(model):
            raise UnknownNameError("peer", name, (*OWN, *PEERS))
        for batch in request.batches:
            for regime in request.regimes:
                for l2 in request.l2:
                    found.append(timm_cell(model, request, batch, regime, l2))
    return found


def timm_cell(model: str, request: Request, batch: int, regime: str, l2: str) -> Cell:
    """The whole-model cell of a model of timm, by the name that timm knows."""
    height, width = request.task.padded(*request.image)
    # A peer has no routed attention; its problem carries the batch, the dtype and the direction.
    problem = Problem(
        batch=batch,
        height=height,
        width=width,
        heads=1,
        head_dim=3,
        region=(height, width),
        topk=1,
        dtype=request.dtype,
        direction=request.direction,
    )
    return Cell(
        part="model",
        problem=problem,
        backend=BACKEND,
        model=model,
        task=request.task.name,
        image=(height, width),
        regime=regime,
        l2=l2,
        layout=request.layout,
        amp=request.amp,
        seed=request.seed,
    )


def timm_model(name: str, image: tuple[int, int]) -> nn.Module:
    """A model of timm for images of a size, with random weights.

    Args:
        name: A short name of `PEERS`, or any name that timm knows.
        image: ``(height, width)`` in pixels.

    Raises:
        UnknownNameError: timm has no such model.
        MissingPackageError: timm is not installed.
    """
    timm, full_name = _timm(), PEERS.get(name, name)
    if not timm.is_model(full_name):
        raise UnknownNameError("peer", name, PEERS)
    sized = {"img_size": image} if _takes_size(timm, full_name) else {}
    model: nn.Module = timm.create_model(full_name, pretrained=False, **sized)
    return model


def build_peer(cell: Cell, device: str) -> Peer:
    """The model of a peer's cell with seeded weights, and seeded images.

    Raises:
        MissingPackageError: timm is not installed.
        UnsupportedError: a form of ours that this model or this cell has not.
        MeasureError: a form of ours gives other scores than the plain model.
    """
    if cell.backend in OWN:
        return _own(cell, device)
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bratune.work.modules import images_for

    torch.manual_seed(cell.seed)
    images = images_for(cell, device)
    model: Any = timm_model(cell.model, cell.image)
    order = torch.channels_last if cell.layout == "nhwc" else torch.contiguous_format
    model = model.to(device=device, dtype=images.dtype, memory_format=order)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return Peer(model.train(cell.problem.backward), images, counter.get_total_flops() // 2)


def _own(cell: Cell, device: str) -> Peer:
    """A model of ours in one of its forms, checked against the plain model on these images."""
    import torch

    from bratune.kernels.biformer import BiFormer
    from bratune.kernels.published import as_published
    from bratune.kernels.runtime import FastModel
    from bratune.profile.contest import difference_limit
    from bratune.variant import get_variant
    from bratune.work.cells import model_stages
    from bratune.work.count import model_macs
    from bratune.work.modules import images_for, model_for

    plain = model_for(cell.replace(backend="auto"), device)
    images = images_for(cell, device)
    form: nn.Module = plain
    if cell.backend == "gather":
        form = model_for(cell, device)
    elif cell.backend == "published":
        if not isinstance(plain, BiFormer):
            raise UnsupportedError(
                "published", ("only BiFormer-T, -S and -B have an official composition here",)
            )
        form = as_published(plain).train(cell.problem.backward)
    elif cell.backend == "runtime":
        reasons = []
        if cell.problem.backward:
            reasons.append("the runtime is for inference; --direction fwd would work")
        if cell.amp:
            reasons.append("the runtime has its weights in --dtype already; no --amp would work")
        if reasons:
            raise UnsupportedError("runtime", reasons)
        form = FastModel(plain, pack=cell.regime != "compile")
    if form is not plain and not cell.problem.backward:
        kind, dtype = device.partition(":")[0], getattr(torch, cell.problem.dtype)
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=cell.amp):
            difference, limit = difference_limit(form(images), plain(images))
        if not difference <= limit:
            raise MeasureError(
                f"{cell.backend} differs from the plain model by {difference:.1e} of the largest output; "
                f"{limit:.0e} would pass"
            )
    return Peer(form, images, model_macs(get_variant(cell.model), model_stages(cell), cell.problem.batch))


def _takes_size(timm: Any, model: str) -> bool:
    """Whether the constructor wants to know the size of the image, as windowed models do."""
    import inspect

    configuration = timm.get_pretrained_cfg(model)
    fixed = bool(getattr(configuration, "fixed_input_size", False))
    entry = timm.model_entrypoint(model)
    return fixed or "img_size" in inspect.signature(entry).parameters


def measure_peers(
    cells: Sequence[Cell],
    machine: Machine,
    settings: MeterSettings,
    *,
    store: Store | None = None,
    run_id: str = "",
    meter: Meter | None = None,
) -> Iterator[Record]:
    """One row per cell, written to the store as soon as it is known; a failure is a row with its reason."""
    from bratune.measure.meter import meter_for

    meter = meter or meter_for(machine)
    for cell in cells:
        record, samples = _measured(cell, machine, settings, meter)
        record = record.replace(run_id=run_id)
        if store is not None:
            store.append(record, samples)
        yield record


def _measured(
    cell: Cell, machine: Machine, settings: MeterSettings, meter: Meter
) -> tuple[Record, tuple[float, ...]]:
    from bratune.measure.energy import energy_fields
    from bratune.run.measure_cell import failure

    try:
        peer = build_peer(cell, machine.device)
        call = _call(cell, peer, machine.device)
        found = meter.measure(call, settings.replace(l2=cell.l2, regime=cell.regime))
    except MissingPackageError:
        raise
    except Exception as error:  # another project's model may raise anything; the row says what
        return Record.of(cell, machine, **failure(error)), ()
    seconds = found.median_ms / 1e3
    values = found.to_record_fields() | energy_fields(found.run or call, machine, cell.problem.batch)
    values |= {"images_per_s": cell.problem.batch / seconds}
    if not cell.problem.backward:
        values["tflops_s"] = 2 * peer.macs / seconds / 1e12
    return Record.of(cell, machine, outcome="measured", **values), found.samples_ms


def _call(cell: Cell, peer: Peer, device: str) -> Any:
    import torch

    kind = device.partition(":")[0]
    dtype = getattr(torch, cell.problem.dtype)

    def forward() -> Any:
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=cell.amp):
            return peer.model(peer.images)

    def forward_backward() -> Any:
        with torch.autocast(kind, dtype=dtype, enabled=cell.amp):
            out = peer.model(peer.images)
        wanted = [p for p in peer.model.parameters() if p.requires_grad]
        return torch.autograd.grad(out.float().sum(), wanted, allow_unused=True)

    return forward_backward if cell.problem.backward else forward


def describe(row: Record) -> str:
    """A peer's row in one line."""
    kind = row.backend if row.backend in OWN else BACKEND
    found = f"{row.images_per_s:.1f} images/s, {row.median_ms:.4g} ms" if row.ok else row.reason
    return f"{row.model} ({kind}), batch {row.batch}, {row.regime}: {found}"


def pair_lines(rows: Sequence[Record]) -> list[str]:
    """The fastest form of each model of ours against every peer of the same batch and image.

    A ratio is of medians; its interval is the widest that the 95 % intervals of both allow, and only where it
    leaves 1 out is one called faster.
    """
    lines = []
    measured = [row for row in rows if row.ok and row.median_ms]
    for place in dict.fromkeys((row.batch, row.image_height, row.image_width) for row in measured):
        here = [r for r in measured if (r.batch, r.image_height, r.image_width) == place]
        ours = [row for row in here if row.backend != BACKEND]
        for model in dict.fromkeys(row.model for row in ours):
            best = min((r for r in ours if r.model == model), key=lambda r: r.median_ms or 0.0)
            lines += [_pair(best, peer) for peer in here if peer.backend == BACKEND]
    return lines


def _pair(own: Record, peer: Record) -> str:
    assert own.median_ms is not None
    assert peer.median_ms is not None
    low = (peer.ci_lo_ms or peer.median_ms) / (own.ci_hi_ms or own.median_ms)
    high = (peer.ci_hi_ms or peer.median_ms) / (own.ci_lo_ms or own.median_ms)
    word = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return (
        f"{own.model} ({own.backend}, {own.regime}) is {peer.median_ms / own.median_ms:.2f}x "
        f"{peer.model} ({peer.regime}) at batch {own.batch}, 95 % {low:.2f} to {high:.2f}: {word}"
    )


@click.command()
@click.option("--model", "models", multiple=True, default=("biformer_tiny",), show_default=True)
@click.option("--task", default="classification", show_default=True, help="Sets S; see bratune list tasks.")
@click.option("--res", default="224", show_default=True, help="Image size, 512 or 800x1333.")
@click.option("-b", "--batch-size", "batches", multiple=True, type=int, default=(1,), show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="As profile, by default."
)
@click.option("--regime", "regimes", multiple=True, default=("eager",), show_default=True)
@click.option("--peers", default=",".join((*OWN, *PEERS)), show_default=True, help="Names, joined by commas.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--effort", default="standard", show_default=True, help="quick, standard or full.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, help="Folder for records.jsonl."
)
def main(
    models: tuple[str, ...],
    task: str,
    res: str,
    batches: tuple[int, ...],
    dtype: str | None,
    regimes: tuple[str, ...],
    peers: str,
    device: str,
    effort: str,
    output: Path | None,
) -> None:
    """Time whole models of ours and of timm, without the stages; `bratune profile --peers` times both."""
    import shlex
    import sys
    import time

    from bratune.errors import BratuneError
    from bratune.machine import detect
    from bratune.measure.settings import MeterSettings
    from bratune.store import Store
    from bratune.variant import parse_resolution
    from bratune.work.request import make_request

    try:
        machine = detect(device)
        request = make_request(
            machine,
            models=models,
            task=task,
            image=parse_resolution(res),
            batches=batches,
            regimes=regimes,
            dtype=dtype,
        )
        cells = peer_cells([name.strip() for name in peers.split(",")], request)
        store = None if output is None else Store(output / "records.jsonl")
        run_id = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        click.echo(str(machine))
        rows = []
        for row in measure_peers(
            cells, machine, MeterSettings.for_effort(effort), store=store, run_id=run_id
        ):
            rows.append(row)
            click.echo(describe(row))
    except BratuneError as error:
        raise click.ClickException(str(error)) from None
    click.echo("\n".join(pair_lines(rows)))
    click.echo(f"again: python -m bratune.profile.peers {shlex.join(sys.argv[1:])}", err=True)


if __name__ == "__main__":
    main()
