"""Both attention layers against results of the official modules, and what they refuse."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bratune.errors import BratuneError, ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels import registry
from bratune.kernels.composed import COMPOSED
from bratune.kernels.full_attention import Attention, AttentionLePE, NCHWAttentionLePE
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted([*GOLDEN.glob("legacy_*.npz"), *GOLDEN.glob("nchw_*.npz")])
KINDS: dict[str, type[torch.nn.Module]] = {
    "legacy": BiLevelRoutingAttention,
    "nchw": NCHWBiLevelRoutingAttention,
}
DTYPES = [torch.float32, torch.float64]
# On max|a - b| / max|b|: ten times the difference of the official float32 and float64 runs.
OUTPUT_TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-12


@functools.cache
def arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        data: dict[str, Any] = {name: file[name] for name in file.files}
    data["meta"] = json.loads(str(data["meta"]))
    return data


def tensor(data: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(data[name]).to(dtype)


def make(data: dict[str, Any], dtype: torch.dtype, backend: str = "reference") -> torch.nn.Module:
    layer: torch.nn.Module = KINDS[data["meta"]["kind"]](**data["meta"]["ctor"], backend=backend)
    parameters = {k.removeprefix("param/"): tensor(data, k, dtype) for k in data if k.startswith("param/")}
    layer.load_state_dict(parameters)
    return layer.to(dtype)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    found = found.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def check(data: dict[str, Any], name: str, found: Tensor, tolerance: float) -> None:
    """Compare with the official run in the dtype of ``found``, as far as it is stored."""
    exact = found.dtype == torch.float64 and f"{name}_f64" in data
    expected = tensor(data, f"{name}_f64" if exact else name, found.dtype)
    error = apart(found.detach(), expected)
    limit = FLOAT64_TOLERANCE if exact else tolerance
    assert error <= limit, f"{name} differs by {error:.1e} of its largest value"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_layer_repeats_the_official_result(backend: str, path: Path, dtype: torch.dtype) -> None:
    data = arrays(path)
    x = tensor(data, "x", dtype).requires_grad_()
    try:
        layer = make(data, dtype, backend)
        out = layer(x)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    parameters = dict(layer.named_parameters())
    dx, *grads = torch.autograd.grad(
        out, (x, *parameters.values()), tensor(data, "gout", dtype), allow_unused=True
    )
    check(data, "out", out, OUTPUT_TOLERANCE)
    check(data, "dx", dx, GRADIENT_TOLERANCE)
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        found = torch.zeros_like(parameter) if grad is None else grad
        check(data, f"grad/{name}", found, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layer_routes_as_the_official_module(path: Path) -> None:
    data = arrays(path)
    if data["meta"]["idx_tie_ok"]:
        pytest.skip("regions of pure padding are equal, so that any of them may be chosen")
    layer = make(data, torch.float64)
    x = tensor(data, "x", torch.float64)
    x = layer.pad(x) if isinstance(layer, BiLevelRoutingAttention) else x.permute(0, 2, 3, 1)
    q, k, _ = layer.project(x)  # type: ignore[operator]
    routes = layer.route(q, k)  # type: ignore[operator]
    expected = torch.from_numpy(data["idx"]).long()
    assert torch.equal(routes.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("legacy")], ids=lambda path: path.stem
)
def test_legacy_layer_returns_what_it_looked_at(path: Path) -> None:
    data = arrays(path)
    layer = make(data, torch.float64)
    x = tensor(data, "x", torch.float64)
    out, weights, routes, attn = (t.detach() for t in layer(x, ret_attn_mask=True))
    assert apart(layer(x), out) <= 1e-12
    if not data["meta"]["idx_tie_ok"]:
        assert torch.equal(routes, torch.from_numpy(data["idx"]).long())
        assert apart(weights, tensor(data, "r_weight", torch.float64)) <= 1e-6
    assert torch.allclose(attn.sum(-1), torch.ones(()).double())
    if "attn" in data:
        assert attn.shape == data["attn"].shape
        assert apart(attn, tensor(data, "attn", torch.float64)) <= 1e-6


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("nchw")], ids=lambda path: path.stem
)
def test_nchw_layer_returns_what_it_looked_at(path: Path) -> None:
    data = arrays(path)
    layer = make(data, torch.float64)
    x = tensor(data, "x", torch.float64)
    out, attn = (t.detach() for t in layer(x, ret_attn_mask=True))
    assert apart(layer(x), out) <= 1e-12
    if "attn" in data:
        assert attn.shape == data["attn"].shape
        assert apart(attn, tensor(data, "attn", torch.float64)) <= 1e-6


def test_both_layers_agree_where_regions_tile_the_map() -> None:
    torch.manual_seed(0)
    legacy = BiLevelRoutingAttention(32, num_heads=2, n_win=4, topk=3, side_dwconv=5).double()
    nchw = NCHWBiLevelRoutingAttention(32, num_heads=2, n_win=4, topk=3, side_dwconv=5).double()
    state = legacy.state_dict()
    nchw.load_state_dict(
        {
            "lepe.weight": state["lepe.weight"],
            "lepe.bias": state["lepe.bias"],
            "qkv_linear.weight": state["qkv.qkv.weight"][:, :, None, None],
            "qkv_linear.bias": state["qkv.qkv.bias"],
            "output_linear.weight": state["wo.weight"][:, :, None, None],
            "output_linear.bias": state["wo.bias"],
        }
    )
    x = torch.randn(2, 12, 8, 32, dtype=torch.float64)
    assert apart(nchw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), legacy(x)) <= 1e-12


@pytest.mark.parametrize("kind", [Attention, AttentionLePE, NCHWAttentionLePE])
def test_full_attention_is_the_same_fused_and_composed(kind: Any) -> None:
    torch.manual_seed(0)
    shape = (2, 32, 5, 3) if kind is NCHWAttentionLePE else (2, 5, 3, 32)
    layer, x = kind(32, backend="reference").double(), torch.randn(shape, dtype=torch.float64)
    composed = layer(x)
    layer.set_backend("auto")
    assert apart(layer(x), composed) <= 1e-12


def test_full_attention_matrix_is_written_out_only_where_it_is_published() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def products(backend: str) -> list[str]:
        with FlopCounterMode(display=False) as counter:
            AttentionLePE(32, backend=backend)(torch.randn(1, 4, 4, 32))
        return sorted(str(op) for op in counter.get_flop_counts()["Global"])

    assert "aten.bmm" in products("reference")
    assert "aten.bmm" not in products("auto")


@pytest.mark.parametrize("backend", [name for name in registry.BACKENDS if name not in COMPOSED])
def test_soft_routing_refuses_backends_that_cannot(backend: str) -> None:
    with pytest.raises(UnsupportedError, match="soft routing needs the gathered keys"):
        BiLevelRoutingAttention(32, n_win=2, topk=1, soft_routing=True, backend=backend)


def test_soft_routing_is_the_same_fused_and_composed() -> None:
    data = arrays(GOLDEN / "legacy_soft_diff.npz")
    x = tensor(data, "x", torch.float64)
    check(data, "out", make(data, torch.float64, "auto")(x), OUTPUT_TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": 5}, ProblemError, "5 heads do not divide 32 channels"),
        ({"num_heads": 0}, ProblemError, "0 heads do not divide"),
        ({"qk_dim": 31}, ProblemError, "32 channels of v and 31 of q and k"),
        ({"n_win": 0}, ProblemError, "at least 1"),
        ({"n_win": 2, "topk": 5}, ProblemError, "top-k 5 of 2x2 = 4 regions; 1 to 4 would work"),
        ({"topk": 0}, ProblemError, "1 to 49 would work"),
        ({"param_attention": "qk"}, UnknownNameError, "these are: qkvo, qkv"),
        ({"param_routing": True}, ProblemError, "diff_routing=True would work"),
        ({"diff_routing": True}, ProblemError, "soft_routing=True would work"),
        ({"kv_downsample_mode": "conv"}, ProblemError, "implemented nowhere"),
        ({"kv_downsample_mode": "mean"}, UnknownNameError, "ada_avgpool"),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": -1}, ProblemError, "kv_per_win must be"),
        ({"side_dwconv": 4}, ProblemError, "odd side"),
        ({"backend": "cuda"}, UnknownNameError, "no backend is called 'cuda'"),
    ],
)
def test_layer_says_what_would_work(
    arguments: dict[str, Any], error: type[BratuneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        BiLevelRoutingAttention(32, **{"num_heads": 2, **arguments})


def test_map_that_regions_do_not_tile_names_the_factors_that_do() -> None:
    layer = BiLevelRoutingAttention(32, num_heads=2, n_win=7)
    with pytest.raises(ProblemError, match=r"128x128 map; these do: 1, 2, 4, 8, .* or auto_pad=True"):
        layer(torch.zeros(1, 128, 128, 32))


def test_nchw_layer_names_the_smallest_map() -> None:
    layer = NCHWBiLevelRoutingAttention(32, num_heads=2, n_win=7)
    with pytest.raises(ProblemError, match="7 regions per side do not fit a 6x9 map; 1 to 6 would work"):
        layer(torch.zeros(1, 32, 6, 9))


def test_pooling_window_larger_than_a_region_is_refused() -> None:
    layer = BiLevelRoutingAttention(
        32, num_heads=2, n_win=4, kv_downsample_mode="avgpool", kv_downsample_ratio=4
    )
    with pytest.raises(ProblemError, match="larger than a region of 2x2 tokens; 1 to 2 would work"):
        layer(torch.zeros(1, 8, 8, 32))
