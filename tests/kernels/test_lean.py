"""A lean model keeps less for the backward pass and has the gradients of the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import apart, golden_runs, load, tiny
from torch import Tensor

from bratune.kernels.biformer import build
from bratune.kernels.blocks import DropPath


def scalar(out: Any) -> Tensor:
    parts = out if isinstance(out, tuple) else (out,)
    return torch.stack([part.float().square().sum() if part.dtype.itemsize < 4 else part.square().sum()
                        for part in parts]).sum()  # fmt: skip


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Of every parameter and of the images, as ``x``."""
    model.zero_grad()
    images = x.clone().requires_grad_()
    torch.manual_seed(0)
    torch.autograd.backward(scalar(model(images)))
    assert images.grad is not None
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"x": images.grad}


def assert_equal_gradients(model: Any, x: Tensor, tolerance: float) -> None:
    model.set_lean(False)
    plain = gradients(model, x)
    model.set_lean()
    lean = gradients(model, x)
    assert lean.keys() == plain.keys()
    largest = max(float(grad.abs().max()) for grad in plain.values())
    for name, grad in plain.items():
        # A gradient that is zero in exact arithmetic (of a bias before a batch norm) is rounding alone.
        limit = max(float(grad.abs().max()), 1e-6 * largest)
        assert float((lean[name] - grad).abs().max()) <= tolerance * limit, name


@pytest.mark.parametrize(("path", "tag"), golden_runs())
def test_lean_golden_models_have_the_gradients_of_the_plain_ones(path: Path, tag: str) -> None:
    model, x, _ = load(path, tag, torch.float64)
    assert_equal_gradients(model, x, 1e-9)


@pytest.mark.parametrize(("name", "last"), [("biformer_stl", -2), ("biformer_stl_nchw", -1)])
def test_published_layouts_have_equal_gradients_in_training(name: str, last: int) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depth": (1, 1, 1, 1), "embed_dim": (32, 64, 64, 64), "n_win": 2}
    sizes["topks"] = (1, 2, 4, last)
    model = build(name, drop_path_rate=0.5, num_classes=3, **sizes).double().train()
    assert any(isinstance(module, DropPath) for module in model.modules())
    assert_equal_gradients(model, torch.randn(3, 3, 64, 64, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"layer_scale_init_value": 0.5}, id="layer-scale"),
        pytest.param({"pre_norm": False}, id="post-norm"),
        pytest.param({"mlp_dwconv": True}, id="mlp-dwconv"),
        pytest.param({"use_checkpoint_stages": (0, 2)}, id="checkpointed"),
        pytest.param({"drop_path_rate": 0.5}, id="drop-path"),
        pytest.param({"topks": (1, 0, 4, -1)}, id="other-attention"),
        pytest.param({"auto_pad": True, "n_win": 3}, id="padded"),
    ],
)
def test_every_option_has_equal_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = tiny(**options).double().train()
    assert_equal_gradients(model, torch.randn(2, 3, 64, 64, dtype=torch.float64), 1e-9)


def test_frozen_parameters_stay_without_gradient() -> None:
    torch.manual_seed(0)
    model = tiny().double().train()
    frozen = {name for name, _ in model.named_parameters() if "norm" in name or "mlp.0" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_equal_gradients(model, x, 1e-9)
    assert not frozen & gradients(model, x).keys()


def test_autocast_gradients_are_as_near_as_those_of_the_plain_model() -> None:
    torch.manual_seed(0)
    model = tiny(topks=(4, 4, 4, -2)).train()  # every region, so that no route flips
    x = torch.randn(2, 3, 64, 64)
    truth = gradients(model, x)

    def error(lean: bool) -> float:
        model.set_lean(lean)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, x)
        assert all(grad.dtype == torch.float32 for grad in found.values())
        return sum(apart(found[name], truth[name]) for name in truth if "head" in name or "stages" in name)

    assert error(True) <= 1.2 * error(False)


def test_compiled_into_one_graph_the_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    model = tiny(backend="gather").double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = gradients(model, x)
    model.set_lean()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(compiled, x)
    for name, grad in plain.items():
        same = found.get(name, found.get(f"_orig_mod.{name}"))
        assert same is not None
        assert torch.allclose(same, grad, rtol=1e-9, atol=1e-12), name


def test_a_lean_model_keeps_less() -> None:
    def kept_bytes(lean: bool) -> int:
        model = build("biformer_tiny", depth=(1, 1, 2, 1)).train()
        model.set_lean(lean)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, Tensor] = {}

        def hold(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            model(torch.zeros(1, 3, 224, 224))
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    assert kept_bytes(True) <= 0.82 * kept_bytes(False)


def test_without_gradients_a_lean_model_runs_as_the_plain_one() -> None:
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)
        model.set_lean()
        assert torch.equal(model(x), plain)
