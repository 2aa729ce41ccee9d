"""A block in training by the C kernels has the gradients of float64 autograd, whatever the variant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.errors import UnsupportedError
from bratune.kernels import blocks
from bratune.kernels.biformer import biformer_tiny
from bratune.kernels.blocks import Block, BlockSTL, DropPath, NCHWBlockSTL, Residual
from bratune.kernels.native import block as native_block
from bratune.kernels.native import library as native
from bratune.kernels.native import run, training, whole
from bratune.kernels.native.library import Library, find
from bratune.kernels.native.whole import pack_linear

FOUND = find()
RUNNABLE = FOUND.runnable if isinstance(FOUND, Library) else ()
pytestmark = pytest.mark.skipif(not RUNNABLE, reason=str(FOUND))

# Of the largest value of a gradient; sums over hundreds of tokens in float32.
TOLERANCE = 1e-5


@pytest.fixture(params=RUNNABLE)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every variant trains, those with which it is no gain as well."""
    name: str = request.param
    number = native.variant_number(name)
    for module in (native_block, run, training, whole):
        monkeypatch.setattr(module, "variant_number", lambda _: number)
    monkeypatch.setattr(training, "can_multiply", lambda weight: not any(side % 16 for side in weight.shape))
    return name


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The maps of blocks that trained by the C kernels."""
    seen: list[torch.Size] = []

    def noted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape)
        return training.train_block(x, *rest)

    monkeypatch.setattr(blocks, "train_block", noted)
    return seen


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def drawn(module: nn.Module) -> Any:
    """Weights of another size than those of a fresh module, biases and norms among them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def gradients(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a block gives, and the gradients of its parameters and of the map."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward((0.5 + normal(*out.shape)).to(out.dtype))
    assert x.grad is not None
    of_weights = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **of_weights}


def assert_gradients(block: Residual, x: Tensor) -> None:
    """Lean and in float32, a block has the gradients of the plain one in float64."""
    exact: Any = copy.deepcopy(block).double()
    exact.attn.set_backend("gather")
    block.lean = True
    found, true = gradients(block, x), gradients(exact, x.double())
    assert found.keys() == true.keys()
    for name, grad in true.items():
        assert found[name].shape == grad.shape, name
        assert float((found[name] - grad).abs().max()) <= TOLERANCE * float(grad.abs().max()), name


# Few tokens and many; rows that fill register tiles and that do not; filters that are wider than the map.
BLOCKS: dict[str, tuple[Callable[[], Residual], tuple[int, ...]]] = {
    "routed": (lambda: Block(64, num_heads=2, n_win=2, topk=3, mlp_ratio=3, kv_downsample_mode="identity"),
               (2, 12, 8, 64)),
    "many": (lambda: Block(32, num_heads=1, n_win=3, topk=4, kv_downsample_mode="identity"), (3, 18, 21, 32)),
    "narrow": (lambda: Block(32, num_heads=2, n_win=1, topk=1, kv_downsample_mode="identity"), (1, 3, 1, 32)),
    "bare": (lambda: BlockSTL(48, num_heads=3, n_win=2, topk=2, side_dwconv=0), (2, 4, 6, 48)),
    "full": (lambda: Block(64, topk=-2), (2, 7, 7, 64)),
    "full-plain": (lambda: Block(64, topk=-1, before_attn_dwconv=0), (1, 5, 3, 64)),
    "nchw": (lambda: NCHWBlockSTL(64, num_heads=2, n_win=2, topk=3), (2, 6, 10, 64)),
    "nchw-full": (lambda: NCHWBlockSTL(64, topk=-1, side_dwconv=3), (2, 5, 5, 64)),
}  # fmt: skip


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_has_the_gradients_of_autograd(variant: str, taken: list[torch.Size], case: str) -> None:
    make, size = BLOCKS[case]
    torch.manual_seed(0)
    block = drawn(make())
    assert_gradients(block, normal(*size))
    assert taken == [size]
    first, again = gradients(block, normal(*size)), gradients(block, normal(*size))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_branches_that_are_dropped_get_no_gradient(
    variant: str, taken: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = drawn(BlockSTL(32, drop_path=0.5, num_heads=1, n_win=2, topk=2)).train()
    masks: list[Tensor] = []

    def draw(self: DropPath, x: Tensor) -> Tensor:
        masks.append(torch.tensor([[0.0, 2.0, 2.0], [2.0, 0.0, 2.0]][len(masks) % 2]).view(3, 1, 1, 1))
        return masks[-1].to(x.dtype)

    monkeypatch.setattr(DropPath, "draw", draw)
    assert_gradients(block, normal(3, 8, 8, 32))
    assert len(masks) == 4
    assert taken == [(3, 8, 8, 32)]


@pytest.mark.parametrize("side", [3, 5, 7, 9])
@pytest.mark.parametrize("size", [(9, 21), (2, 1), (7, 7), (1, 4)], ids=str)
def test_gradients_of_depthwise_weights(variant: str, side: int, size: tuple[int, int]) -> None:
    x, grad = normal(2, *size, 3 * 48)[..., 48:96], normal(2, *size, 48)
    weight = torch.zeros(48, 1, side, side, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(48, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.double().permute(0, 3, 1, 2), weight, bias, padding=side // 2, groups=48)
    true = torch.autograd.grad(y, (weight, bias), grad.double().permute(0, 3, 1, 2))
    for found, wanted in zip(training.depthwise_grads(x, grad, weight), true, strict=True):
        assert found is not None
        assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


def test_panels_are_those_of_the_matrix_and_of_its_transpose(variant: str) -> None:
    weight = normal(32, 48)
    assert torch.equal(training.panels(weight, by_columns=False), pack_linear(weight))
    assert torch.equal(training.panels(weight, by_columns=True), pack_linear(weight.t().contiguous()))


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train by the C kernels on processors for which they are no gain, too."""
    monkeypatch.setattr(training, "can_multiply", lambda weight: not any(side % 16 for side in weight.shape))


@pytest.mark.usefixtures("everywhere")
def test_what_is_frozen_stays_without_gradient(taken: list[torch.Size]) -> None:
    torch.manual_seed(0)
    block = drawn(BLOCKS["routed"][0]())
    block.lean = True
    x = normal(1, 4, 8, 64)
    whole = gradients(block, x)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("norm" in name or "mlp.0" in name)
    some = gradients(block, x)
    assert set(some) == {"out", "x", *(name for name in whole if "norm" in name or "mlp.0" in name)}
    assert all(torch.equal(grad, whole[name]) for name, grad in some.items())
    block.zero_grad()
    block(x).sum().backward()  # the map itself wants none
    assert len(taken) == 3


@pytest.mark.usefixtures("everywhere")
def test_a_second_derivative_is_refused() -> None:
    torch.manual_seed(0)
    block = BLOCKS["routed"][0]()
    block.lean = True
    x = normal(1, 4, 8, 64).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"set_lean\(False\) has one"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "reason", ["autocast", "float64", "hook", "backend", "padding", "transform", "counter"]
)
def test_what_they_do_not_take_goes_part_by_part(taken: list[torch.Size], reason: str) -> None:
    torch.manual_seed(0)
    backend = "gather" if reason == "backend" else "auto"
    block = Block(
        64, num_heads=2, n_win=2, topk=3, kv_downsample_mode="identity", auto_pad=True, backend=backend
    )
    block.lean = True
    x = normal(1, 4, 8, 64)
    block(x.clone().requires_grad_())
    assert len(taken) == (reason != "backend")
    taken.clear()
    if reason == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
    elif reason == "float64":
        block.double()(x.double())
    elif reason == "hook":
        seen: list[Any] = []
        next(block.mlp.children()).register_forward_hook(lambda *given: seen.append(given))
        block(x)
        assert seen
    elif reason == "padding":
        block(normal(1, 5, 7, 64))
    elif reason == "transform":
        torch.func.grad(lambda x: block(x).sum())(x)
    elif reason == "counter":
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            block(x)
        assert counter.get_total_flops() > 0
    else:
        block(x)
    assert not taken


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("checkpointed", [(), (0, 2)], ids=str)
def test_a_model_trains_by_them(taken: list[torch.Size], checkpointed: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = biformer_tiny(
        num_classes=10, n_win=2, topks=(4, 4, 4, -2), use_checkpoint_stages=checkpointed
    ).train()
    x = torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(model).double()
    model.set_lean()
    found, true = gradients(model, x), gradients(exact, x.double())
    assert len(taken) == 14 + (10 if checkpointed else 0)
    largest = max(float(grad.abs().max()) for grad in true.values())
    for name, grad in true.items():
        # A gradient that is zero in exact arithmetic (of a bias before a batch norm) is rounding alone.
        limit = max(float(grad.abs().max()), 1e-2 * largest)
        assert float((found[name] - grad).abs().max()) <= 1e-4 * limit, name
