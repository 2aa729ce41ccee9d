"""Layers of other people's networks are replaced where ours are proved to be the same, and left elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bratune
from bratune.errors import UnknownNameError
from bratune.foreign import Accelerated


class QKV(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, side: int, topk: int, heads: int, scale: float) -> Tensor:
    """Routed attention on NHWC maps, region after region."""
    height, width = q.shape[1] // side, q.shape[2] // side

    def regions(x: Tensor) -> Tensor:
        split = x.unfold(1, height, height).unfold(2, width, width)  # [B, S, S, C, h, w]
        return split.flatten(1, 2).flatten(3).transpose(2, 3)  # [B, R, T, C]

    rq, rk, rv = map(regions, (q, k, v))
    routes = (rq.mean(2) @ rk.mean(2).transpose(1, 2)).topk(topk, -1).indices
    out = torch.zeros_like(q)
    for image in range(len(q)):
        for region in range(side * side):
            keys, values = (x[image, routes[image, region]].flatten(0, 1) for x in (rk, rv))
            parts = []
            for head in range(heads):
                some = slice(head * q.shape[3] // heads, (head + 1) * q.shape[3] // heads)
                logits = scale * rq[image, region][:, some] @ keys[:, some].T
                parts.append(logits.softmax(-1) @ values[:, some])
            row, col = region // side * height, region % side * width
            done = torch.cat(parts, -1).view(height, width, -1)
            out[image, row : row + height, col : col + width] = done
    return out


class BiLevelRoutingAttention(nn.Module):
    """An attention under the official name, as people paste it: ``nchw`` outside, padding, another scale."""

    def __init__(
        self, dim: int, *, outside: str = "nhwc", factor: float = 1.0, auto_pad: bool = False
    ) -> None:
        super().__init__()
        self.n_win, self.num_heads, self.topk, self.scale = 2, 2, 2, dim**-0.5
        self.outside, self.factor, self.auto_pad = outside, factor, auto_pad
        self.lepe = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.qkv = QKV(dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.outside == "nchw":
            x = x.permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        if self.auto_pad:
            x = F.pad(x, (0, 0, 0, -width % 2, 0, -height % 2))
        q, k, v = self.qkv(x).chunk(3, -1)
        out = attend(q, k, v, 2, self.topk, self.num_heads, self.scale * self.factor)
        out = self.wo(out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))[:, :height, :width]
        return out.permute(0, 3, 1, 2) if self.outside == "nchw" else out  # type: ignore[no-any-return]


class ConvolvedBRA(nn.Module):
    """The NCHW layer of the refactoring, under another name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.n_win, self.num_heads, self.topk, self.scale = 2, 2, 2, dim**-0.5
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim)
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_linear(x).permute(0, 2, 3, 1).chunk(3, -1)
        out = attend(q, k, v, 2, self.topk, self.num_heads, self.scale).permute(0, 3, 1, 2)
        return self.output_linear(out + self.lepe(v.permute(0, 3, 1, 2)))  # type: ignore[no-any-return]


class YOLOLike(nn.Module):
    """A neck with the attention in a branch, and its batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU())
        self.c2f = nn.ModuleList([BiLevelRoutingAttention(8, outside="nchw"), ConvolvedBRA(8)])
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).chunk(2, 1)
        return self.head(torch.cat([self.c2f[0](one), self.c2f[1](two)], 1))  # type: ignore[no-any-return]


class UNetLike(nn.Module):
    """Down, attend, up and add: an NHWC layer on a map that S does not divide, and one that is shared."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 2, 2)
        self.attn = BiLevelRoutingAttention(8, auto_pad=True)
        self.again = self.attn
        self.alike = BiLevelRoutingAttention(8, auto_pad=True, factor=factor)
        self.up = nn.ConvTranspose2d(8, 1, 2, 2)
        self.unused = BiLevelRoutingAttention(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).permute(0, 2, 3, 1)
        x = x + self.again(x + self.attn(x))
        return self.up((x + self.alike(x)).permute(0, 3, 1, 2))  # type: ignore[no-any-return]


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


def test_a_backend_that_cannot_run_here_leaves_the_layer_with_its_reason() -> None:
    model = UNetLike().double()
    found = bratune.accelerate(model, torch.randn(1, 3, 8, 12, dtype=torch.float64), backend="triton")
    assert found.swapped == {}
    assert "computes in float16, bfloat16, float32, found float64" in found.left["attn"]
    with pytest.raises(UnknownNameError, match="no backend is called 'nonsense'"):
        accelerated(model, backend="nonsense")
