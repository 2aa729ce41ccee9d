"""Peers: models of timm, measured by the same meter on the same kind of images as ours.

A peer's row is a whole-model row whose backend is ``timm``; its multiply-adds are counted by torch while it
runs, so that it stands beside ours on the axis of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bratune.cell import Cell
from bratune.errors import MissingPackageError, UnknownNameError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bratune.measure.meter import Meter
    from bratune.measure.settings import MeterSettings
    from bratune.profile.request import Request
    from bratune.store import Store

__all__ = ["BACKEND", "PEERS", "Peer", "build_peer", "measure_peers", "peer_cells"]

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


@dataclass(frozen=True)
class Peer:
    """A model of timm with its images.

    Attributes:
        model: On the device, in evaluation or training mode.
        images: ``[B, 3, H, W]`` on the device.
        macs: Multiply-adds of one forward pass over the batch.
    """

    model: nn.Module
    images: Tensor
    macs: int


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        if error.name == "timm":
            raise MissingPackageError("timm", "measuring peers", extra="timm") from None
        raise MissingPackageError(str(error.name), "timm, which measures peers,") from None
    return timm


def peer_cells(names: Sequence[str], request: Request) -> list[Cell]:
    """A whole-model cell per peer, batch size and regime of a request.

    Args:
        names: Short names of `PEERS`, or any name that timm knows.
        request: Batches, image, dtype, direction, regimes and cache states.

    Raises:
        UnknownNameError: timm has no such model.
        MissingPackageError: timm is not installed.
    """
    timm = _timm()
    found = []
    for name in names:
        model = PEERS.get(name, name)
        if not timm.is_model(model):
            raise UnknownNameError("peer", name, PEERS)
        for batch in request.batches:
            for regime in request.regimes:
                for l2 in request.l2:
                    found.append(_cell(model, request, batch, regime, l2))
    return found


def _cell(model: str, request: Request, batch: int, regime: str, l2: str) -> Cell:
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


def build_peer(cell: Cell, device: str) -> Peer:
    """The model of a peer's cell with seeded weights, and seeded images.

    Raises:
        MissingPackageError: timm is not installed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bratune.profile.scenery import images_for

    torch.manual_seed(cell.seed)
    timm, images = _timm(), images_for(cell, device)
    sized = {"img_size": cell.image} if _takes_size(timm, cell.model) else {}
    model = timm.create_model(cell.model, pretrained=False, **sized)
    order = torch.channels_last if cell.layout == "nhwc" else torch.contiguous_format
    model = model.to(device=device, dtype=images.dtype, memory_format=order)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return Peer(model.train(cell.problem.backward), images, counter.get_total_flops() // 2)


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
    from bratune.errors import BratuneError
    from bratune.measure.energy import energy_fields

    try:
        peer = build_peer(cell, machine.device)
        call = _call(cell, peer, machine.device)
        found = meter.measure(call, settings.replace(l2=cell.l2, regime=cell.regime))
    except MissingPackageError:
        raise
    except BratuneError as error:
        return Record.of(cell, machine, outcome="error", reason=str(error)), ()
    except Exception as error:  # another project's model may raise anything; the row says what
        text = str(error).strip().splitlines()
        outcome = "oom" if "out of memory" in str(error).lower() else "error"
        reason = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        return Record.of(cell, machine, outcome=outcome, reason=reason), ()
    seconds = found.median_ms / 1e3
    values = found.to_record_fields() | energy_fields(call, machine, cell.problem.batch)
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
