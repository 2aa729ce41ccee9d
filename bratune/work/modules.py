"""Scenery: real modules with seeded weights, and the maps that reach them on an image.

A stage is measured on the map that the published model hands to it, whatever S and top-k are being
tried there, so that candidates for a stage are compared on the same data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bratune.cell import Cell
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import build
from bratune.kernels.blocks import Residual
from bratune.kernels.checkpoint import load_weights
from bratune.problem import factors_that_tile
from bratune.variant import Variant, get_task, get_variant
from bratune.work.inputs import make_images

__all__ = ["Scenery", "block_for", "check_checkpoint", "images_for", "model_for", "scenery_for"]

# Captures maps without writing scores: the data of a stage must not depend on what fits into memory.
CAPTURE_BACKEND = "gather-sdpa"


@dataclass(frozen=True)
class Scenery:
    """What a published model makes of the images of a cell.

    Attributes:
        maps: Input of the first block of every stage, NHWC, on the CPU.
        weights: ``state_dict`` of the first block of every stage.
    """

    maps: tuple[Tensor, ...]
    weights: tuple[Mapping[str, Tensor], ...]


def images_for(cell: Cell, device: str) -> Tensor:
    """The images of a cell on a device, in the cell's dtype and memory order."""
    folder, _ = _sources(cell)
    images = make_images(cell.problem.batch, *cell.image, seed=cell.seed, folder=folder)
    order = torch.channels_last if cell.layout == "nhwc" else torch.contiguous_format
    return images.to(device=device, dtype=_weight_dtype(cell), memory_format=order)


def model_for(cell: Cell, device: str) -> Backbone:
    """The whole model of a ``model`` cell, its S, top-k, backends and settings set stage by stage.

    The cell's ``config`` holds settings by stage: ``{"1": {...}, "3": {...}}``.
    """
    windows = [max(1, int(s)) for s in cell.n_win.split(",")]
    topks = [int(k) for k in cell.topk.split(",")]
    names = cell.backend.split(",")
    model = _seeded(cell.model, cell.seed, task=cell.task, n_win=windows, topks=topks)
    _, checkpoint = _sources(cell)
    if checkpoint:
        load_weights(model, checkpoint, skip_head=True)
    configs = [cell.settings.get(str(i + 1)) for i in range(len(topks))]
    model.set_backend(names[0] if len(names) == 1 else names, configs)
    model = model.to(device=device, dtype=_weight_dtype(cell))
    if cell.layout == "nhwc":
        nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    return model.train(cell.problem.backward)


def block_for(cell: Cell, device: str) -> Residual:
    """The first block of the cell's stage with the cell's S, top-k, backend and settings."""
    variant, index = get_variant(cell.model), cell.stage - 1
    full = -1 if variant.layout == "stl_nchw" else -2
    count = len(variant.dims)
    topks, windows, depth = [full] * count, [1] * count, [0] * count
    topks[index], windows[index], depth[index] = int(cell.topk), max(1, int(cell.n_win)), 1
    model = _seeded(cell.model, cell.seed, n_win=windows, topks=topks, depth=depth, num_classes=0)
    block = _first_block(model.stages[index])
    published = scenery_for(cell, device).weights[index]
    own = block.state_dict()
    if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in published.items()}:
        block.load_state_dict(published)
    attn: Any = block.attn
    if hasattr(attn, "set_backend"):
        attn.set_backend(cell.backend or "auto", cell.settings or None)
    return block.to(device=device, dtype=_weight_dtype(cell)).eval()


def check_checkpoint(model: str, task: str, path: str) -> None:
    """Refuse a weights file that cannot be read or does not fit a model; raises `CheckpointError`."""
    variant = get_variant(model)
    windows, topks = _published_grid(variant, (224, 224), 7)
    load_weights(_seeded(model, 0, task=task, n_win=windows, topks=topks), path, skip_head=True)


def scenery_for(cell: Cell, device: str) -> Scenery:
    """The scenery that a cell shares with every other cell of its model, images, batch and dtype."""
    p = cell.problem
    how = (p.dtype, cell.amp, cell.layout, cell.seed)
    return _capture(cell.model, cell.task, cell.image, p.batch, *how, *_sources(cell), device)


@functools.lru_cache(maxsize=2)
def _capture(
    model: str,
    task: str,
    image: tuple[int, int],
    batch: int,
    dtype: str,
    amp: bool,
    layout: str,
    seed: int,
    folder: str,
    checkpoint: str,
    device: str,
) -> Scenery:
    variant = get_variant(model)
    windows, topks = _published_grid(variant, image, get_task(task).n_win if task else 7)
    net = _seeded(model, seed, task=task, n_win=windows, topks=topks)
    if checkpoint:
        load_weights(net, checkpoint, skip_head=True)
    net.set_backend(CAPTURE_BACKEND)
    weights = tuple({k: v.clone() for k, v in _first_block(s).state_dict().items()} for s in net.stages)
    weight_dtype = torch.float32 if amp else getattr(torch, dtype)
    net = net.to(device=device, dtype=weight_dtype).eval()
    caught: list[list[Tensor]] = [[] for _ in net.stages]
    for stage, into in zip(net.stages, caught, strict=True):
        _first_block(stage).register_forward_pre_hook(_keeper(into))
    images = make_images(batch, *image, seed=seed, folder=folder).to(weight_dtype)
    if layout == "nhwc":
        images = images.to(memory_format=torch.channels_last)
    kind = device.partition(":")[0]
    with torch.no_grad(), torch.autocast(kind, dtype=getattr(torch, dtype), enabled=amp):
        for i in range(batch):  # one image at a time, so that memory does not grow with the batch
            net(images[i : i + 1].to(device))
    return Scenery(tuple(torch.cat(maps) for maps in caught), weights)


def _keeper(into: list[Tensor]) -> Any:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        into.append(inputs[0].detach().to("cpu", copy=True))

    return keep


def _published_grid(
    variant: Variant, image: tuple[int, int], n_win: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """S and top-k per stage as published; where a model cannot pad, the nearest S that tiles its map."""
    windows, topks = [], []
    for (height, width), topk in zip(variant.maps(*image), variant.topks, strict=True):
        if variant.layout == "biformer":
            s = n_win
        elif variant.layout == "stl":
            s = max(f for f in factors_that_tile(height, width) if f <= n_win)
        else:
            s = min(n_win, height, width)
        windows.append(s)
        topks.append(min(topk, s * s))
    return tuple(windows), tuple(topks)


def _seeded(
    name: str, seed: int, *, n_win: Sequence[int], topks: Sequence[int], task: str = "", **overrides: Any
) -> Backbone:
    if get_variant(name).layout == "biformer":
        overrides["auto_pad"] = True
    if task and get_task(task).features_only:
        overrides["features_only"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(name, n_win=tuple(n_win), topks=tuple(topks), **overrides)


def _first_block(stage: nn.Module) -> Residual:
    blocks: Any = getattr(stage, "blocks", stage)
    block = blocks[0]
    assert isinstance(block, Residual)
    return block


def _weight_dtype(cell: Cell) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if cell.amp else getattr(torch, cell.problem.dtype)
    return dtype


def _sources(cell: Cell) -> tuple[str, str]:
    """The folder of pictures and the weights file of a cell; empty where it has none."""
    extra = json.loads(cell.extra)
    return str(extra.get("images", "")), str(extra.get("checkpoint", ""))
