"""With weights of timm's modules, the mixers give timm's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from frameworks import require
from golden_models import apart
from torch import Tensor, nn

from bratune.kernels.mixers.reduction import LocalAttention, ReducedAttention
from bratune.kernels.mixers.tiles import from_grid, from_windows, to_grid, to_windows
from bratune.kernels.mixers.whole import FullMapAttention
from bratune.kernels.mixers.windows import WindowAttention

TOLERANCE = 1e-12
DIM, HEADS, HEIGHT, WIDTH = 24, 3, 14, 21


@pytest.fixture(scope="module")
def models() -> Any:
    import importlib

    require("timm")

    class Models:
        swin = importlib.import_module("timm.models.swin_transformer")
        twins = importlib.import_module("timm.models.twins")
        pvt = importlib.import_module("timm.models.pvt_v2")
        vit = importlib.import_module("timm.models.vision_transformer")
        maxvit = importlib.import_module("timm.models.maxxvit")

    return Models


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def image() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, HEIGHT, WIDTH, DIM, dtype=torch.float64)


def take(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """Ours with the weights of theirs, by name."""
    state = theirs.state_dict()
    renamed = {names.get(name, name): value for name, value in state.items()}
    wanted = ours.state_dict().keys()
    ours.load_state_dict({name: value for name, value in renamed.items() if name in wanted})
    return ours.double().eval()


@pytest.mark.parametrize("shift", [0, 3])
def test_shifted_windows_are_those_of_swin(models: Any, shift: int) -> None:
    theirs = drawn(
        models.swin.SwinTransformerBlock(
            DIM, (HEIGHT, WIDTH), num_heads=HEADS, window_size=7, shift_size=shift, mlp_ratio=1.0
        )
    )
    ours = take(
        WindowAttention(DIM, HEADS, shift=shift),
        theirs.attn,  # type: ignore[arg-type]
        {"relative_position_bias_table": "bias.table"},
    )
    x = image()
    assert apart(ours(x), theirs._attn(x)) <= TOLERANCE  # type: ignore[operator]


def test_sub_sampled_attention_is_that_of_twins(models: Any) -> None:
    theirs = drawn(models.twins.GlobalSubSampleAttn(DIM, HEADS, sr_ratio=7))
    ours = take(ReducedAttention(DIM, HEADS, 7), theirs, {})
    x = image()
    expected = theirs(x.flatten(1, 2), (HEIGHT, WIDTH)).reshape(x.shape)
    assert apart(ours(x), expected) <= TOLERANCE


def test_local_attention_is_that_of_twins(models: Any) -> None:
    theirs = drawn(models.twins.LocallyGroupedAttn(DIM, HEADS, ws=7))
    ours = take(LocalAttention(DIM, HEADS), theirs, {})
    x = image()
    expected = theirs(x.flatten(1, 2), (HEIGHT, WIDTH)).reshape(x.shape)
    assert apart(ours(x), expected) <= TOLERANCE


@pytest.mark.parametrize("stride", [1, 7])
def test_spatial_reduction_is_that_of_pvt(models: Any, stride: int) -> None:
    theirs = drawn(models.pvt.Attention(DIM, HEADS, sr_ratio=stride, qkv_bias=True))
    ours = take(ReducedAttention(DIM, HEADS, stride), theirs, {})
    x = image()
    expected = theirs(x.flatten(1, 2), (HEIGHT, WIDTH)).reshape(x.shape)
    assert apart(ours(x), expected) <= TOLERANCE


def test_full_attention_is_that_of_vision_transformers(models: Any) -> None:
    theirs = drawn(models.vit.Attention(DIM, HEADS, qkv_bias=True))
    ours = take(FullMapAttention(DIM, HEADS), theirs, {})
    x = image()
    assert apart(ours(x), theirs(x.flatten(1, 2)).reshape(x.shape)) <= TOLERANCE


def test_windows_and_grids_are_partitioned_as_by_maxvit(models: Any) -> None:
    x = image()
    windows = models.maxvit.window_partition(x, (7, 7)).reshape(2, -1, 49, DIM)
    grid = models.maxvit.grid_partition(x, (7, 7)).reshape(2, -1, 49, DIM)
    assert torch.equal(to_windows(x, 7, 7), windows)
    assert torch.equal(to_grid(x, 7, 7), grid)
    assert torch.equal(from_windows(windows, 7, 7, HEIGHT, WIDTH), x)
    assert torch.equal(from_grid(grid, 7, 7, HEIGHT, WIDTH), x)
