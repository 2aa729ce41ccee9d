"""Layers of other people's networks are replaced where ours are proved to be the same, and left elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_plans import make_plan
from somebodys_nets import BiLevelRoutingAttention, ConvolvedBRA, GatheredBRA, UNetLike, YOLOLike
from torch import Tensor, nn

import bratune
from bratune.errors import PlanError, ProblemError, UnknownNameError
from bratune.foreign import Accelerated


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(model(x).square().mean())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


CASES: list[Any] = [
    pytest.param(YOLOLike, (2, 3, 16, 24), {"c2f.0": "nchw outside", "c2f.1": "nchw"}, id="yolo"),
    pytest.param(UNetLike, (2, 3, 10, 14), dict.fromkeys(("attn", "again", "alike"), "nhwc"), id="unet"),
]


@pytest.mark.parametrize(("make", "shape", "swapped"), CASES)
def test_a_network_keeps_its_function_its_weights_and_its_way_back(
    make: Any, shape: tuple[int, ...], swapped: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model, x = make().double().train(), torch.randn(shape, dtype=torch.float64)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    layers = {name: model.get_submodule(name) for name in swapped}
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        expected = model.eval()(x)
    expected_grads = step(model, x)
    model.train()
    found = bratune.accelerate(model, x)
    assert found.swapped == swapped, str(found)
    assert all(isinstance(model.get_submodule(n), bratune.kernels.layer.RoutedLayer) for n in swapped)
    assert all(module.training for module in model.modules())
    assert sorted(model.state_dict()) == sorted(keys)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
    model.eval()
    assert apart(model(x).detach(), expected) < 1e-9
    for name, grad in step(model, x).items():
        assert apart(grad, expected_grads[name]) < 1e-9, name
    with torch.no_grad():  # a step of training, which the way back keeps
        for p in model.parameters():
            p.add_(0.01)
    trained = model(x).detach()
    found.restore()
    assert {name: model.get_submodule(name) for name in swapped} == layers
    assert apart(model(x).detach(), trained) < 1e-9


def accelerated(model: nn.Module, **settings: Any) -> Accelerated:
    torch.manual_seed(0)
    return bratune.accelerate(model.eval(), torch.randn(1, 3, 8, 12), **settings)


def test_a_look_alike_is_left_with_the_difference() -> None:
    torch.manual_seed(0)
    found = accelerated(UNetLike(factor=1.01))
    assert list(found.swapped) == ["attn", "again"]
    assert found.left["alike"].startswith("nhwc: differs ")
    assert float(found.left["alike"].split()[2].rstrip(";")) < 0.1
    assert found.left["unused"] == "was not called in a run of the example"


def test_what_would_be_lost_or_is_no_such_layer_is_left() -> None:
    model = UNetLike()
    model.attn.register_forward_hook(lambda *_: None)
    model.alike.lepe = nn.Conv2d(8, 8, 3, 1, 1)
    model.alike.extra = nn.Parameter(torch.ones(1))
    found = accelerated(model)
    assert found.swapped == {}
    assert found.left["attn"] == "has a forward hook, which ours in its place would leave out"
    assert "other parameters (extra)" in found.left["alike"]


def test_hooks_inside_a_layer_run_or_keep_it() -> None:
    model, seen = nn.Sequential(BiLevelRoutingAttention(8), BiLevelRoutingAttention(8)).eval(), []
    parts: Any = list(model)
    parts[0].qkv.register_forward_hook(lambda *_: None)
    for name, part in (("projection", parts[1].qkv.qkv), ("local", parts[1].lepe), ("output", parts[1].wo)):
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    found = bratune.accelerate(model, torch.randn(1, 8, 8, 8))
    assert list(found.swapped) == ["1"]
    assert "nhwc: has a forward hook at qkv, which ours in its place would leave out" in found.left["0"]
    seen.clear()
    model(torch.randn(1, 8, 8, 8))
    assert sorted(seen) == ["local", "output", "projection"]


def test_layers_of_bratune_choose_for_themselves() -> None:
    model = nn.Sequential(bratune.kernels.layer.NCHWBiLevelRoutingAttention(3, num_heads=1, n_win=2, topk=1))
    assert "set_backend chooses" in accelerated(model).left["0"]


def test_a_plan_names_backends_by_layer() -> None:
    model: Any = UNetLike()
    found = accelerated(model, plan={"attn": "dense"}, backend="gather")
    assert (model.attn.backend, model.alike.backend) == ("dense", "gather")
    found.restore()
    with pytest.raises(UnknownNameError, match=r"'stages\.0'.*alike"):
        accelerated(model, plan={"stages.0": "dense"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: GatheredBRA(8),
        lambda: GatheredBRA(8, pool=nn.AdaptiveAvgPool2d(2)),
        lambda: GatheredBRA(8, pool=nn.AdaptiveMaxPool2d(1)),
        lambda: GatheredBRA(8, pool=nn.AvgPool2d(2)),
        lambda: GatheredBRA(8, soft=True),
        lambda: GatheredBRA(8, soft=True, diff=True),
    ],
    ids=["plain", "ada-avg", "ada-max", "avg", "soft", "differentiable"],
)
def test_pooled_keys_and_soft_routing_are_replaced(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    x = torch.randn(2, 8, 12, 8)
    expected = model(x)
    found = bratune.accelerate(model, x)
    assert found.swapped == {"0": "nhwc"}, str(found)
    torch.testing.assert_close(model(x), expected)


def test_soft_routing_with_other_weights_is_left() -> None:
    class Sharper(GatheredBRA):
        def forward(self, x: Tensor) -> Tensor:
            self.scale *= 2
            try:
                return super().forward(x)
            finally:
                self.scale /= 2

    torch.manual_seed(0)
    found = bratune.accelerate(nn.Sequential(Sharper(8, soft=True)), torch.randn(1, 8, 12, 8))
    assert found.swapped == {}
    assert "nhwc: differs" in found.left["0"]


def test_the_layer_of_the_example_is_replaced() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "examples" / "official_like.py"
    spec = importlib.util.spec_from_file_location("official_like", path)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    network = example.make()
    assert sum(isinstance(m, example.BiLevelRoutingAttention) for m in network.modules()) == 12
    torch.manual_seed(0)
    model = nn.Sequential(example.BiLevelRoutingAttention(16, 2, 2, 3)).eval()
    x = torch.randn(2, 6, 4, 16)
    expected = model(x)
    found = bratune.accelerate(model, x)
    assert found.swapped == {"0": "nhwc"}
    torch.testing.assert_close(model(x), expected)


def test_a_backend_that_cannot_run_here_leaves_the_layer_with_its_reason() -> None:
    model = UNetLike().double()
    found = bratune.accelerate(model, torch.randn(1, 3, 8, 12, dtype=torch.float64), backend="triton")
    assert found.swapped == {}
    assert "computes in float16, bfloat16, float32, found float64" in found.left["attn"]
    with pytest.raises(UnknownNameError, match="no backend is called 'nonsense'"):
        accelerated(model, backend="nonsense")


# --- what an example does not show ---------------------------------------------------------------------


def alone(layer: nn.Module, *shape: int, **settings: Any) -> Accelerated:
    """One layer, found on a random map."""
    torch.manual_seed(0)
    return bratune.accelerate(nn.Sequential(layer).eval(), torch.randn(shape), **settings)


def test_a_constant_example_and_small_weights_prove_nothing() -> None:
    torch.manual_seed(0)
    model = UNetLike(factor=1.01).eval()
    for p in model.parameters():
        p.data.mul_(1e-6)
    found = bratune.accelerate(model, torch.zeros(1, 3, 8, 12))
    assert list(found.swapped) == ["attn", "again"]
    assert "with random weights on random maps" in found.left["alike"]


def test_weights_that_are_no_numbers_prove_nothing() -> None:
    layer = BiLevelRoutingAttention(8)
    layer.wo.weight.data.fill_(torch.nan)
    found = alone(layer, 1, 8, 8, 8)
    assert "numbers that are not finite" in found.left["0"]


class FirstImages(BiLevelRoutingAttention):
    """Attends in all images as in the first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:1]).expand(x.shape)


class Dropping(BiLevelRoutingAttention):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


def test_what_one_image_and_evaluation_do_not_show_is_left() -> None:
    assert "random maps" in alone(FirstImages(8), 1, 8, 8, 8).left["0"]
    assert "in training" in alone(Dropping(8), 1, 8, 8, 8).left["0"]


class Padding(nn.Module):
    """Pads as the official layer does, and does not say so by an attribute."""

    def __init__(self, inner: BiLevelRoutingAttention) -> None:
        super().__init__()
        self.n_win, self.num_heads, self.topk, self.scale = 2, 2, 2, inner.scale
        self.lepe, self.qkv, self.wo = inner.lepe, inner.qkv, inner.wo
        self.inner = [inner]

    def forward(self, x: Tensor) -> Tensor:
        self.inner[0].lepe, self.inner[0].qkv, self.inner[0].wo = self.lepe, self.qkv, self.wo
        return self.inner[0](x)  # type: ignore[no-any-return]


def test_maps_that_regions_do_not_tile_are_treated_alike_or_refused() -> None:
    odd = torch.randn(2, 7, 5, 8)
    found = alone(Padding(BiLevelRoutingAttention(8, auto_pad=True)), 1, 8, 8, 8)
    assert found.swapped == {"0": "nhwc"}, str(found)
    ours = found.model(odd)
    torch.testing.assert_close(ours, found.restore()(odd))
    found = alone(BiLevelRoutingAttention(8), 1, 8, 8, 8)  # drops a row and a column of them
    assert found.swapped == {"0": "nhwc"}
    with pytest.raises(ProblemError, match="auto_pad"):
        found.model(odd)
    assert (
        "on maps of 3x3, which it takes as well" in alone(ConvolvedBRA(8, drops=True), 1, 8, 8, 12).left["0"]
    )


class Looking(nn.Module):
    """Reads of one of its layers what ours has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BiLevelRoutingAttention(8), BiLevelRoutingAttention(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.second.factor  # type: ignore[no-any-return]


def test_a_layer_of_which_the_model_wants_more_is_left() -> None:
    model = Looking()
    found = bratune.accelerate(model, torch.randn(1, 8, 8, 8))
    assert found.swapped == {"first": "nhwc"}
    assert "with ours in its place the model raises AttributeError" in found.left["second"]
    model(torch.randn(1, 8, 8, 8))


def test_nothing_to_replace_is_said() -> None:
    found = bratune.accelerate(BiLevelRoutingAttention(8), torch.randn(1, 8, 8, 8))
    assert str(found).startswith("left (the model): is the layer itself")
    found = bratune.accelerate(nn.Sequential(nn.ReLU()), torch.randn(1))
    assert str(found) == "no layer of this Sequential looks like routed attention"


def test_in_inference_mode_layers_are_proved_as_elsewhere() -> None:
    with torch.inference_mode():
        found = alone(BiLevelRoutingAttention(8), 1, 8, 8, 8)
        assert found.swapped == {"0": "nhwc"}, str(found)
        found.model(torch.randn(1, 8, 8, 8))


def test_a_compiled_model_takes_ours_and_a_compiled_layer_is_left() -> None:
    torch.manual_seed(0)
    plain, x = UNetLike().eval(), torch.randn(1, 3, 8, 12)
    plain.alike = torch.compile(plain.alike, backend="eager")  # type: ignore[assignment]
    model, used = torch.compile(plain, backend="eager"), []
    with torch.no_grad():
        expected = model(x)
        found = bratune.accelerate(model, x)  # type: ignore[arg-type]
        assert list(found.swapped) == ["_orig_mod.attn", "_orig_mod.again"]
        assert "is compiled by itself" in found.left["_orig_mod.alike._orig_mod"]
        plain.attn.register_forward_hook(lambda module, *_: used.append(type(module)))
        torch.testing.assert_close(model(x), expected)
    assert used == [bratune.kernels.layer.BiLevelRoutingAttention] * 2


def test_plans_of_another_kind_and_contradictions_are_refused() -> None:
    for plan in (make_plan(), "plan.json"):
        with pytest.raises(PlanError, match=f"a {type(plan).__name__} says nothing about the layers"):
            accelerated(UNetLike(), plan=plan)
    model: Any = UNetLike()
    accelerated(model, plan={"again": "dense"})
    assert model.attn.backend == "dense"
    with pytest.raises(PlanError, match="again is one layer under several names"):
        accelerated(UNetLike(), plan={"attn": "gather", "again": "dense"})
