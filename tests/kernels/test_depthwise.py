"""The depthwise convolution and its gradients agree with PyTorch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from bratune.errors import ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels.blocks import Block, NCHWBlockSTL
from bratune.kernels.depthwise import DEPTHWISE, depthwise
from bratune.kernels.fused import depthwise as depthwise_fused  # noqa: F401  (makes the operators)
from bratune.kernels.nhwc import conv_nhwc

pytestmark = pytest.mark.usefixtures("poisoned")
# Relative errors, as a fraction of the largest number of the reference: one rounding of the result and,
# in float32, the order of the sum.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    half = weight.shape[-1] // 2
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=half, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return y if add is None else y + add


def check(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = (found.detach().double().cpu() - expected).abs().max() / expected.abs().max()
    assert float(error) <= tolerance


def run(
    backend: str,
    device: str,
    *,
    size: tuple[int, int],
    channels: int,
    kernel: int,
    dtype: torch.dtype,
    batch: int = 1,
    bias: bool = True,
    add: bool = True,
) -> None:
    """Output and every gradient against float64."""
    x, out_grad = (
        normal(batch, *size, 3 * channels)[..., channels : 2 * channels],
        normal(batch, *size, channels, seed=1),
    )
    tensors = {"x": x, "weight": normal(channels, 1, kernel, kernel, seed=2)}
    if bias:
        tensors["bias"] = normal(channels, seed=3)
    if add:
        tensors["add"] = normal(batch, *size, channels, seed=4)
    low = {name: value.to(device, dtype).requires_grad_() for name, value in tensors.items()}
    wide = {name: value.detach().cpu().double().requires_grad_() for name, value in low.items()}
    expected = convolve(wide["x"], wide["weight"], wide.get("bias"), wide.get("add"))
    found = depthwise(low["x"], low["weight"], low.get("bias"), add=low.get("add"), backend=backend)
    assert found.dtype == dtype
    check(found, expected.detach(), TOLERANCE[dtype])
    out_grad = out_grad.to(dtype)
    torch.autograd.backward(expected, out_grad.double())
    torch.autograd.backward(found, out_grad.to(device))
    for name, value in low.items():
        true = wide[name].grad
        assert value.grad is not None, name
        assert true is not None
        check(value.grad, true, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("size", "kernel"),
    [((7, 7), 3), ((7, 7), 5), ((9, 10), 5), ((2, 3), 5), ((1, 8), 3), ((4, 4), 7)],
)
def test_strips_and_gradients_agree_with_float64(size: tuple[int, int], kernel: int, device: str) -> None:
    run("triton", device, size=size, channels=32, kernel=kernel, dtype=torch.float32, batch=1 + (kernel == 3))


@pytest.mark.parametrize(
    ("channels", "bias", "add"), [(8, False, True), (72, True, False), (24, False, False)]
)
def test_bias_and_sum_are_optional_and_channels_may_be_odd(
    channels: int, bias: bool, add: bool, device: str
) -> None:
    run("triton", device, size=(3, 5), channels=channels, kernel=3, dtype=torch.float32, bias=bias, add=add)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_rounds_once(dtype: torch.dtype, device: str) -> None:
    run("triton", device, size=(4, 4), channels=16, kernel=5, dtype=dtype)


@pytest.mark.parametrize("kernel", [3, 5])
def test_torch_convolution_agrees_with_float64(kernel: int) -> None:
    run("torch", "cpu", size=(7, 9), channels=16, kernel=kernel, dtype=torch.float32)


def test_channels_first_maps_and_weights_of_another_dtype_are_taken(device: str) -> None:
    x = normal(2, 16, 6, 5).to(device, torch.float16).permute(0, 2, 3, 1)
    weight = normal(16, 1, 3, 3, seed=1).to(device)
    expected = convolve(x.cpu().double(), weight.cpu().double(), None, None)
    check(depthwise(x, weight, backend="triton"), expected, TOLERANCE[torch.float16])


def test_only_the_gradients_that_are_asked_for_are_computed(device: str) -> None:
    x, weight = normal(1, 4, 4, 16).to(device), normal(16, 1, 3, 3).to(device).requires_grad_()
    torch.autograd.backward(depthwise(x, weight, backend="triton").sum())
    other = weight.detach().clone().requires_grad_()
    torch.autograd.backward(depthwise(x, other, backend="torch").sum())
    assert x.grad is None
    torch.testing.assert_close(weight.grad, other.grad)


def test_a_gradient_that_is_expanded_from_one_number_is_taken(device: str) -> None:
    x = normal(1, 4, 4, 16).to(device).requires_grad_()
    weight = normal(16, 1, 3, 3).to(device)
    torch.autograd.backward(depthwise(x, weight, backend="triton").sum())
    other = x.detach().clone().requires_grad_()
    torch.autograd.backward(depthwise(other, weight, backend="torch").sum())
    torch.testing.assert_close(x.grad, other.grad)


def test_operators_are_well_formed(device: str) -> None:
    x, weight = (
        normal(1, 4, 4, 16).to(device).requires_grad_(),
        normal(16, 1, 3, 3).to(device).requires_grad_(),
    )
    bias = normal(16).to(device).requires_grad_()
    library.opcheck(torch.ops.bratune.depthwise.default, (x, weight, bias, x))
    library.opcheck(
        torch.ops.bratune.depthwise_backward.default, (x.detach(), x.detach(), weight.detach(), True, True)
    )


def test_compiled_code_holds_one_graph(device: str) -> None:
    x, weight = normal(1, 4, 4, 16).to(device), normal(16, 1, 3, 3).to(device)
    compiled = torch.compile(depthwise, fullgraph=True, backend="aot_eager")
    for backend in DEPTHWISE:
        assert torch.equal(compiled(x, weight, backend=backend), depthwise(x, weight, backend=backend))


@pytest.mark.gpu
def test_gradients_are_the_same_to_the_bit_in_two_runs() -> None:
    x, weight = normal(4, 28, 28, 96).cuda(), normal(96, 1, 5, 5).cuda().requires_grad_()
    first, second = (
        torch.autograd.grad(depthwise(x, weight, backend="triton").square().sum(), weight)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_published_shapes_agree_with_float64() -> None:
    for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
        run("triton", "cuda", size=(size, size), channels=channels, kernel=5, dtype=torch.bfloat16)


def test_auto_is_torch_without_a_measured_entry() -> None:
    x, weight = normal(1, 4, 4, 16), normal(16, 1, 3, 3)
    assert torch.equal(depthwise(x, weight), depthwise(x, weight, backend="torch"))


@pytest.mark.parametrize(
    "block",
    [
        Block(32, num_heads=1, n_win=2, topk=1, mlp_dwconv=True),
        Block(32, topk=0),
        Block(32, topk=-2),
        NCHWBlockSTL(32, num_heads=1, n_win=2, topk=1),
        NCHWBlockSTL(32, topk=-1),
    ],
    ids=["routed", "convolutions", "full", "routed, NCHW", "full, NCHW"],
)
def test_every_depthwise_convolution_of_a_block_is_chosen_here(
    block: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None, **more: Any) -> Tensor:
        seen.append(weight)
        return depthwise(x, weight, bias, **more)

    monkeypatch.setattr("bratune.kernels.nhwc.convolve", spy)
    with torch.no_grad():
        block(normal(1, 8, 8, 32))
    there = [m.weight for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert sorted(map(id, seen)) == sorted(map(id, there))
    assert there


def test_a_convolution_that_shrinks_the_map_is_left_to_its_module() -> None:
    conv = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)
    x = normal(1, 8, 8, 16)
    assert torch.equal(conv_nhwc(conv, x), conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_unknown_backend_lists_the_names() -> None:
    with pytest.raises(UnknownNameError, match=", ".join(DEPTHWISE)):
        depthwise(normal(1, 4, 4, 16), normal(16, 1, 3, 3), backend="cudnn")


def test_reasons_are_all_told() -> None:
    x, weight = normal(1, 4, 4, 16).double().to("meta"), normal(16, 1, 9, 9).to("meta")
    with pytest.raises(UnsupportedError, match=r"float64.*9x9"):
        depthwise(x, weight, backend="triton")


@pytest.mark.parametrize("shape", [(16, 1, 4, 4), (8, 1, 3, 3), (16, 2, 3, 3)])
def test_weights_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProblemError, match="odd K"):
        depthwise(normal(1, 4, 4, 16), normal(*shape))


def test_flops_are_those_of_a_convolution() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = torch.empty(2, 6, 6, 16, device="meta"), torch.empty(16, 1, 5, 5, device="meta")
    with FlopCounterMode(display=False) as ours:
        torch.ops.bratune.depthwise(x, weight, None, None)
    with FlopCounterMode(display=False) as theirs:
        depthwise(x, weight, backend="torch")
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
