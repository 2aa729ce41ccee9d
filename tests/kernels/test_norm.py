"""LayerNorm with a shift and region means agrees with PyTorch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from bratune.errors import ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels.fused import norm as norm_fused
from bratune.kernels.norm import MAX_CHANNELS, NORMS, layer_norm, why_not
from bratune.kernels.routing import region_means

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
# On max|a - b| / max|b|: one rounding of the result and, in float32, the order of the sums.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max())


def given(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """A map far from zero, as a residual stream is, and the vectors."""
    rng = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(*shape, generator=rng)
    weight, bias, shift = (torch.randn(shape[-1], generator=rng) for _ in range(3))
    vectors = {"weight": weight.to(device, dtype), "bias": bias.to(device, dtype), "shift": shift.to(device)}
    return {"x": x.to(device, dtype), **vectors}


def expected(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None = None,
    region: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    wide = [None if tensor is None else tensor.cpu().double() for tensor in (weight, bias, shift)]
    y = x.cpu().double()
    y = F.layer_norm(y if wide[2] is None else y + wide[2], y.shape[-1:], wide[0], wide[1], EPS)
    return y, None if region is None else region_means(y, region)


def check(backend: str, tensors: dict[str, Any], region: tuple[int, int] | None = None) -> None:
    dtype = tensors["x"].dtype
    y, means = layer_norm(**tensors, eps=EPS, region=region, backend=backend)
    true_y, true_means = expected(**tensors, region=region)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert apart(y, true_y) <= TOLERANCE[dtype]
    assert (means is None) == (true_means is None)
    if means is not None and true_means is not None:
        assert means.dtype == torch.float32
        assert apart(means, true_means) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(2, 5, 3, 64), (1, 1, 1, 24), (1, 3, 7, 512), (1, 2, 1, 3000)])
def test_any_number_of_tokens_and_channels(shape: tuple[int, ...], device: str) -> None:
    check("triton", given(*shape, device=device))


@pytest.mark.parametrize(
    ("size", "region"),
    [((14, 14), (2, 2)), ((8, 12), (4, 6)), ((7, 10), (3, 4)), ((5, 5), (1, 1)), ((16, 16), (16, 16))],
)
def test_means_of_regions_leave_padding_out(
    size: tuple[int, int], region: tuple[int, int], device: str
) -> None:
    check("triton", given(2, *size, 40, device=device), region)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_rounds_once(dtype: torch.dtype, device: str) -> None:
    check("triton", given(1, 4, 6, 64, dtype=dtype, device=device), (2, 3))


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("shift",), ("weight", "bias", "shift")])
def test_every_vector_is_optional(missing: tuple[str, ...], device: str) -> None:
    check("triton", {**given(1, 4, 4, 32, device=device), **dict.fromkeys(missing)})


def test_a_map_of_other_strides_is_taken(device: str) -> None:
    tensors = given(2, 4, 6, 32, device=device)
    tensors["x"] = tensors["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    check("triton", tensors)


def test_operator_is_well_formed(device: str) -> None:
    tensors = given(1, 4, 4, 32, device=device)
    for region in ([], [2, 2]):
        library.opcheck(torch.ops.bratune.layer_norm.default, (*tensors.values(), EPS, region))


def test_compiled_code_holds_one_graph(device: str) -> None:
    tensors = given(1, 4, 4, 32, device=device)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    for backend in NORMS:
        found = compiled(**tensors, eps=EPS, backend=backend)[0]
        assert torch.equal(found, layer_norm(**tensors, eps=EPS, backend=backend)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "channels"), [(56, 64), (28, 128), (14, 256), (7, 512), (56, 96)])
def test_published_shapes_agree_with_float64(side: int, channels: int) -> None:
    tensors = given(4, side, side, channels, dtype=torch.bfloat16, device="cuda")
    check("triton", tensors)
    check("triton", tensors, (side // 7, side // 7))


@pytest.mark.parametrize("region", [None, (2, 3), (3, 4)])
def test_torch_agrees_with_float64(region: tuple[int, int] | None) -> None:
    check("torch", given(2, 4, 6, 32), region)


def test_auto_is_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_fused, "launch_layer_norm", None)
    tensors = given(1, 2, 2, 16)
    assert torch.equal(layer_norm(**tensors, eps=EPS)[0], layer_norm(**tensors, eps=EPS, backend="torch")[0])


def test_bad_input_is_told() -> None:
    tensors = given(1, 2, 2, 16)
    with pytest.raises(UnknownNameError, match=", ".join(NORMS)):
        layer_norm(**tensors, eps=EPS, backend="apex")
    with pytest.raises(ProblemError, match=r"vectors \[C\], not .*'shift': \(8,\)"):
        layer_norm(**{**tensors, "shift": torch.zeros(8)}, eps=EPS)
    wide = torch.zeros(1, 1, 1, MAX_CHANNELS + 1, dtype=torch.float64, device="meta")
    with pytest.raises(UnsupportedError, match=rf"float64.*{MAX_CHANNELS} fit into registers"):
        layer_norm(wide, None, None, eps=EPS, backend="triton")
    assert len(why_not(wide)) >= 2
