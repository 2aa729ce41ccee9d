"""The models against results of the official ones, and what they promise beside."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bratune
from bratune.errors import BratuneError, ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels import registry
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import BiFormer, BiFormerSTL, NCHWBiFormerSTL, build
from bratune.kernels.blocks import DropPath
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bratune.variant import VARIANTS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("model_*.npz"))
CLASSES: dict[str, type[Backbone]] = {
    "BiFormer": BiFormer,
    "BiFormer_mm": BiFormer,
    "BiFormerSTL": BiFormerSTL,
    "nchwBiFormerSTL": NCHWBiFormerSTL,
}
# On max|a - b| / max|b|: ten times the difference of the official float32 and float64 runs.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@functools.cache
def arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        data: dict[str, Any] = {name: file[name] for name in file.files}
    data["meta"] = json.loads(str(data["meta"]))
    return data


def marks(path: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if "tinydepth" in path.stem else []


RUNS = [
    pytest.param(path, tag, id=f"{path.stem}-{tag}", marks=marks(path))
    for path in FILES
    for tag in arrays(path)["meta"]["runs"]
]


def tensor(data: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(data[name])).to(dtype)


def make(path: Path, dtype: torch.dtype, backend: str = "reference") -> Backbone:
    data = arrays(path)
    meta = data["meta"]
    arguments = dict(meta["ctor"])
    if "norm_layer" in arguments:
        arguments["norm_layer"] = getattr(nn, arguments["norm_layer"])
    model = CLASSES[meta["cls"]](**arguments, backend=backend, features_only=meta["cls"] == "BiFormer_mm").to(
        dtype
    )
    names = [key for key in data if key.startswith("sd/")]
    state = {name.removeprefix("sd/"): torch.from_numpy(np.asarray(data[name])) for name in names}
    model.load_state_dict(state)
    return model.eval()


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found.detach() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@dataclass(frozen=True)
class Run:
    """One forward and backward pass of a golden model."""

    outputs: dict[str, Tensor]
    dx: Tensor
    grad_norms: dict[str, float]
    stages: tuple[Tensor, ...]
    routes: tuple[Tensor, ...]


@functools.lru_cache(maxsize=1)  # tests of one run follow each other
def run(path: Path, tag: str, backend: str, dtype: torch.dtype) -> Run:
    data, model = arrays(path), make(path, dtype, backend)
    stages: list[Tensor] = []
    routes: list[Tensor] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: stages.append(out.detach()))
    for module in model.modules():
        if isinstance(module, BiLevelRoutingAttention | NCHWBiLevelRoutingAttention):
            module.route = functools.partial(_seen, module.route, routes)  # type: ignore[method-assign]
    x = tensor(data, f"{tag}/x", dtype).requires_grad_()
    out = model(x)
    outputs = {f"feat{i}": m for i, m in enumerate(out)} if isinstance(out, tuple) else {"logits": out}
    sum(
        (value * tensor(data, f"{tag}/{name.replace('feat', 'gout').replace('logits', 'gout')}", dtype)).sum()
        for name, value in outputs.items()
    ).backward()
    assert x.grad is not None
    return Run(
        outputs={name: value.detach() for name, value in outputs.items()},
        dx=x.grad,
        grad_norms={
            name: 0.0 if p.grad is None else float(p.grad.double().norm())
            for name, p in model.named_parameters()
        },
        stages=tuple(stages),
        routes=tuple(routes),
    )


def _seen(route: Callable[[Tensor, Tensor], Tensor], routes: list[Tensor], q: Tensor, k: Tensor) -> Tensor:
    routes.append(route(q, k))
    return routes[-1]


def check_results(path: Path, tag: str, found: Run, dtype: torch.dtype) -> None:
    data, limit = arrays(path), TOLERANCE[dtype]
    for name, value in found.outputs.items():
        exact = dtype == torch.float64 and f"{tag}/{name}_f64" in data
        expected = tensor(data, f"{tag}/{name}_f64" if exact else f"{tag}/{name}", dtype)
        assert apart(value, expected) <= (limit if exact else TOLERANCE[torch.float32]), name
    at = torch.from_numpy(data[f"{tag}/dx_pos"]).long()
    assert apart(found.dx.flatten()[at], tensor(data, f"{tag}/dx_val_f64", dtype)) <= limit
    norms = dict(zip(data["param_names"], data[f"{tag}/param_grad_norms_f64"], strict=True))
    assert found.grad_norms.keys() == norms.keys()
    largest = max(norms.values())
    for name, norm in norms.items():  # gradients that cancel to nothing are compared with the largest
        assert abs(found.grad_norms[name] - norm) <= limit * max(norm, 1e-3 * largest), name


@pytest.mark.parametrize(("path", "tag"), RUNS)
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_model_repeats_the_official_result(backend: str, path: Path, tag: str) -> None:
    try:
        found = run(path, tag, backend, torch.float32)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    check_results(path, tag, found, torch.float32)


@pytest.mark.parametrize("what", ["results", "stages", "routes"])
@pytest.mark.parametrize(("path", "tag"), RUNS)
def test_model_repeats_the_official_run_in_float64(path: Path, tag: str, what: str) -> None:
    data, found = arrays(path), run(path, tag, "reference", torch.float64)
    if what == "results":
        check_results(path, tag, found, torch.float64)
    elif what == "stages":
        for i, x in enumerate(found.stages):  # NHWC
            for kind, value in (("mean", x.mean((0, 1, 2))), ("std", x.std((0, 1, 2)))):
                expected = tensor(data, f"{tag}/stage{i}_{kind}_f64", torch.float64)
                assert apart(value, expected) <= 1e-10, (i, kind)
    else:
        if data["meta"]["runs"][tag]["rows_with_exact_ties"]:
            pytest.skip("regions of pure padding are equal, so that any of them may be chosen")
        assert len(found.routes) == data["meta"]["runs"][tag]["routing_layers"]
        for i, routes in enumerate(found.routes):
            idx = torch.from_numpy(data[f"{tag}/idx{i}"]).long()
            assert torch.equal(routes.sort(-1).values, idx.sort(-1).values), f"layer {i}"


def test_training_mode_updates_the_batch_statistics_as_the_official_model() -> None:
    path = GOLDEN / "model_biformer_small4stage.npz"
    data = arrays(path)
    model = make(path, torch.float64).train()
    logits = model(tensor(data, "b112/x", torch.float64))
    assert isinstance(logits, Tensor)
    assert apart(logits, tensor(data, "train_b112/logits_f64", torch.float64)) <= 1e-11
    state = model.state_dict()
    prefix = "train_b112/bn_after/"
    for name in (key for key in data if key.startswith(prefix)):
        after = torch.from_numpy(np.asarray(data[name])).double()
        assert apart(state[name.removeprefix(prefix)].double(), after) <= 1e-6, name


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("keys_*.json")), ids=lambda path: path.stem)
def test_full_size_model_has_the_official_keys(path: Path) -> None:
    listing = json.loads(path.read_text())
    name = listing["model"]
    with torch.device("meta"):
        model = build(name.replace("_mm", ""), features_only="_mm" in name)
    parameters = dict(model.named_parameters())
    found = [
        [key, list(value.shape), str(value.dtype).removeprefix("torch."), key in parameters]
        for key, value in model.state_dict().items()
    ]
    assert found == listing["keys"]
    assert sum(p.numel() for p in parameters.values()) == listing["n_params"]


@pytest.mark.parametrize("name", VARIANTS)
def test_published_size_and_work(name: str) -> None:
    backend = "gather" if "gather" in registry.BACKENDS else "reference"
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[name].parameters
    model.set_backend(backend)
    model = model.to_empty(device="cpu").eval()
    with (  # counts operations without computing them
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(VARIANTS[name].gmacs_224, abs=1e-3)


SMALL: dict[str, Any] = {
    "depth": (1, 1, 1, 1),
    "embed_dim": (16, 16, 32, 32),
    "head_dim": 16,
    "num_classes": 5,
    "mlp_ratios": (2, 2, 2, 2),
    "topks": (1, 2, 4, -2),
}


def small(**arguments: Any) -> BiFormer:
    torch.manual_seed(0)
    return BiFormer(**{**SMALL, "n_win": 2, "kv_downsample_mode": "identity", **arguments})


def test_stages_may_use_different_backends() -> None:
    model = small(backend=["reference", "auto", "reference", "auto"], config=[None, None, {}, None])
    attns = [stage[0].attn for stage in model.stages]  # type: ignore[index]
    assert [attn.backend for attn in attns] == ["reference", "auto", "reference", "auto"]
    model.set_backend("reference")
    assert {attn.backend for attn in attns} == {"reference"}


def test_regions_per_side_may_differ_between_stages() -> None:
    model = small(n_win=(8, 4, 2, 1)).eval()
    out = model(torch.zeros(1, 3, 64, 64))
    assert isinstance(out, Tensor)
    assert out.shape == (1, 5)


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (33, 47)])
def test_any_image_size_works_with_padding(size: tuple[int, int]) -> None:
    maps = small(auto_pad=True, features_only=True).eval()(torch.randn(1, 3, *size))
    expected = [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected


def test_checkpointing_changes_memory_and_not_gradients() -> None:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = small().double()
    thrifty = small(use_checkpoint_stages=(0, 1, 2, 3)).double()
    assert list(plain.state_dict()) == list(thrifty.state_dict())
    outs = [model(x) for model in (plain, thrifty)]
    for out in outs:
        assert isinstance(out, Tensor)
        torch.autograd.backward(out.square().sum())
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-14), name
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, thrifty.get_buffer(name)), name


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = layer(x)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert layer.eval()(x) is x


def test_drop_path_grows_from_the_first_block_to_the_last() -> None:
    model = small(depth=(1, 2, 1, 1), drop_path_rate=0.4)
    rates = [b.drop_path.rate if isinstance(b.drop_path, DropPath) else 0.0 for s in model.stages for b in s]  # type: ignore
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_classifier_can_be_replaced() -> None:
    model = small()
    model.reset_classifier(3)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 32)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("biformer_smal", {}, UnknownNameError, "did you mean biformer_small"),
        ("biformer_tiny", {"window": 7}, UnknownNameError, "no argument of biformer_tiny is called 'window'"),
        (
            "biformer_tiny",
            {"topks": (1, 4, 16)},
            ProblemError,
            r"topks needs one value per stage \(4\), not 3",
        ),
        ("biformer_tiny", {"topks": (1, 4, 64, -2)}, ProblemError, "stage 3: top-k 64 of 7x7 = 49 regions"),
        ("biformer_tiny", {"topks": (1, 4, 16, -3)}, ProblemError, "stage 4: top-k -3 means nothing"),
        ("biformer_tiny", {"backend": ["gather"]}, ProblemError, "backend needs one value per stage"),
        ("biformer_tiny", {"backend": "fastest"}, UnknownNameError, "no backend is called 'fastest'"),
        (
            "biformer_tiny",
            {"head_dim": 48},
            ProblemError,
            "stage 3: 5 heads do not divide 256 channels",
        ),
        ("biformer_tiny", {"before_attn_dwconv": 5}, ProblemError, "must be 3, or 0 for none"),
        ("biformer_tiny", {"drop_path_rate": 1.0}, ProblemError, "below 1"),
        ("biformer_stl_nchw", {"topks": (1, 4, 16, -2)}, ProblemError, "means nothing to the NCHW model"),
        ("biformer_stl", {"n_wins": (7, 7)}, ProblemError, r"n_wins needs one value per stage \(4\), not 2"),
    ],
)
def test_bad_arguments_are_named(
    name: str, arguments: dict[str, Any], error: type[BratuneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        bratune.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("biformer_tiny", 256, "stage 1: 7 regions per side do not tile a 64x64 map; .* or auto_pad=True"),
        ("biformer_stl", 448 + 16, "stage 1: 7 regions per side do not tile a 116x116 map"),
        ("biformer_stl_nchw", 96, "stage 3: 7 regions per side do not fit a 6x6 map; 1 to 6 would work"),
        ("biformer_stl_nchw", 16, "stage 1: 7 regions per side do not fit a 4x4 map"),
    ],
)
def test_image_that_does_not_fit_names_the_stage(name: str, size: int, message: str) -> None:
    model = build(name, depth=(1, 1, 1, 1), embed_dim=(32, 32, 32, 32))
    with pytest.raises(ProblemError, match=message):
        model(torch.zeros(1, 3, size, size))


def test_public_names_are_there() -> None:
    assert bratune.create_model("biformer_tiny", num_classes=2, n_win=8).n_wins == (8, 8, 8, 8)
    assert bratune.BiLevelRoutingAttention is BiLevelRoutingAttention


def test_n_win_means_s_for_every_model() -> None:
    assert bratune.create_model("biformer_stl", n_win=8).n_wins == (8, 8, 8, 8)
