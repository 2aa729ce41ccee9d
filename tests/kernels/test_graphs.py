"""Layers become graphs in a process where they never ran: compiled, exported, traced, transformed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bratune
from bratune.errors import UnsupportedError
from bratune.kernels import registry

HERE = Path(__file__).resolve()
COMPOSED = ("gather", "gather-sdpa", "dense", "reference")


@pytest.fixture(scope="module")
def cold() -> dict[str, dict[str, Any]]:
    """What `cold_graphs` found in a fresh process, by name."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run(
        [sys.executable, str(HERE.with_name("cold_graphs.py"))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("options", "graphs"), [("fullgraph", 2), ("default", 2), ("dynamic", 1)], ids=lambda x: str(x)
)
def test_a_fresh_model_compiles_for_all_batches(
    cold: dict[str, dict[str, Any]], options: str, graphs: int
) -> None:
    """Beside the graph of an empty batch: one, or first one of the first batch."""
    found = dict(cold[f"compile-{options}"])
    assert found.pop("apart") < 1e-5
    assert found == {"graphs": graphs + 1, "breaks": [], "empty": [0, 8, 8, 32]}


@pytest.mark.parametrize("name", ["export", "export-nchw"])
def test_an_exported_layer_takes_any_batch(cold: dict[str, dict[str, Any]], name: str) -> None:
    assert cold[name].keys() == {"apart"}, cold[name]
    assert cold[name]["apart"] < 1e-5  # a graph for other tools attends by PyTorch's operations


@pytest.mark.parametrize("name", ["trace", "trace-nchw"])
def test_a_traced_layer_takes_any_batch(cold: dict[str, dict[str, Any]], name: str) -> None:
    assert cold[name].keys() == {"apart", "warnings"}, cold[name]
    assert cold[name]["apart"] < 1e-5
    assert cold[name]["warnings"] == []


def layer(backend: str) -> bratune.BiLevelRoutingAttention:
    torch.manual_seed(0)
    return bratune.BiLevelRoutingAttention(
        16, num_heads=2, n_win=2, topk=2, backend=backend, side_dwconv=3
    ).double()


def loss(module: torch.nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    out: Tensor = torch.func.functional_call(module, weights, (x[None],))
    return out.square().sum()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", COMPOSED)
def test_gradients_per_sample_are_those_of_one_sample_at_a_time(backend: str) -> None:
    module = layer(backend)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 4, 6, 16, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(lambda w, one: loss(module, w, one)), (None, 0))(weights, x)
    for index, one in enumerate(x):
        module.zero_grad()
        torch.autograd.backward(module(one[None]).square().sum())
        for name, p in module.named_parameters():
            torch.testing.assert_close(each[name][index], p.grad)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_forward_and_double_backward_derivatives_are_those_of_finite_differences(backend: str) -> None:
    module = layer(backend)
    x = torch.randn(1, 4, 4, 16, dtype=torch.float64, requires_grad=True)
    step = torch.randn_like(x)
    dual: Any = torch.autograd.forward_ad
    with dual.dual_level():
        ahead = dual.unpack_dual(module(dual.make_dual(x, step))).tangent
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (along,) = torch.autograd.grad(grad, x, step)

    near = [(x + sign * 1e-6 * step).detach().requires_grad_() for sign in (1, -1)]
    outs = [module(y) for y in near]
    grads = [torch.autograd.grad(o.square().sum(), y)[0] for o, y in zip(outs, near, strict=True)]
    torch.testing.assert_close(ahead, (outs[0] - outs[1]) / 2e-6, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(along, (grads[0] - grads[1]) / 2e-6, rtol=1e-5, atol=1e-5)


def test_sparse_products_refuse_what_would_be_silently_wrong() -> None:
    module = layer("sparse")
    x = torch.randn(1, 4, 4, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"no derivative.*the backend gather has one"):
        torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="cannot look into its products; gather can be"):
        torch.func.vmap(module)(x[:, None])


@pytest.mark.parametrize("backend", [*COMPOSED, "sparse", "auto"])
def test_an_empty_batch_has_an_empty_result_and_empty_gradients(backend: str) -> None:
    module = layer(backend)
    x = torch.randn(0, 4, 6, 16, dtype=torch.float64, requires_grad=True)
    out = module(x)
    assert out.shape == (0, 4, 6, 16)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.shape == x.shape


def test_every_backend_is_named_here() -> None:
    """`flex` is compiled per problem, `triton` and `native` have tests of their own."""
    assert {*COMPOSED, "sparse", "flex", "triton"} | {"native"} >= set(registry.BACKENDS)
