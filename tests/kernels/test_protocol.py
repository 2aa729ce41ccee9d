"""What people put in the way of a call acts alike in plain, lean and optimized models, or is refused."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import bratune
from bratune.errors import ProblemError, UnsupportedError
from bratune.kernels.backbone import Backbone
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bratune.kernels.published import as_published
from bratune.kernels.runtime import GraphRunner, optimize

SIZES: dict[str, Any] = {"depth": (1, 1), "embed_dim": (16, 16), "head_dim": 16, "num_classes": 3}
MODELS = ("biformer_tiny", "biformer_stl_nchw")
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model(name: str = "biformer_tiny", **changes: Any) -> Backbone:
    torch.manual_seed(changes.pop("seed", 0))
    more: dict[str, Any] = {"n_win": 2, "topks": (2, 2), "mlp_ratios": (2, 2)}
    if name == "biformer_tiny":
        more |= {"kv_per_wins": (-1, -1), "kv_downsample_ratios": (1, 1), "qk_dims": (None, None)}
        more["kv_downsample_kernels"] = (1, 1)
    made: Backbone = bratune.create_model(name, **{**SIZES, **more, **changes})
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0)  # new biases are zero, and hide what is left out
    return made.eval()


class Adapter(nn.Linear):
    """A low-rank adapter as people write it: a subclass with a forward of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Wrapper(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.base(x)  # type: ignore[no-any-return]


def replace(root: nn.Module, path: str, make: Callable[[Any], nn.Module]) -> None:
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    setattr(owner, name, make(getattr(owner, name)))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: out * 1.5)
    return module


def pre_hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, args: (args[0] + args[0].square(),))
    return module


def pruned(module: nn.Module) -> nn.Module:
    done: Any = prune.l1_unstructured
    return done(module, "weight", amount=0.5)  # type: ignore[no-any-return]


def forwarded(module: nn.Module) -> nn.Module:
    inner = module.forward
    module.forward = lambda x: inner(x) * 1.5
    return module


def leaves(root: nn.Module) -> list[str]:
    return [
        name
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GELU | nn.BatchNorm2d)
    ]


def outputs(made: Backbone) -> dict[str, Tensor]:
    """The same model plain and lean (with gradients), and optimized."""
    x = X.to(next(made.parameters()).dtype)
    made.set_lean(False)
    plain = made(x)
    made.set_lean()
    lean = made(x)
    made.set_lean(False)
    return {"plain": plain.detach(), "lean": lean.detach(), "optimized": optimize(made)(x)}


@pytest.mark.parametrize("change", [hooked, pre_hooked, forwarded, Wrapper], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_that_stands_at_a_layer_is_left_out(name: str, change: Callable[[Any], nn.Module]) -> None:
    """Hooks at every layer, everything else at those that are read in the most ways."""
    made = model(name).double()
    bare = made(X.double()).detach()
    first = [path for path in leaves(made) if not path.startswith("stages.1")]
    for path in first if change is hooked else first[:: 2 if change is Wrapper else 3]:
        changed = copy.deepcopy(made)
        replace(changed, path, change)
        found = outputs(changed)
        assert (found["plain"] - bare).abs().max() > 1e-6, path
        for form in ("lean", "optimized"):
            assert (found[form] - found["plain"]).abs().max() < 1e-9, f"{form} {path}"


@pytest.mark.parametrize("change", [Adapter, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_adapters_and_parametrizations_act_in_every_form(change: Callable[[Any], nn.Module]) -> None:
    made = model()
    bare = made(X).detach()
    for path in ("stages.0.0.mlp.0", "stages.0.0.attn.qkv.qkv", "stages.1.0.attn.wo"):
        replace(made, path, change)
    found = outputs(made)
    # Weight norm is the same function until it is trained.
    assert (change is parametrizations.weight_norm) == torch.allclose(found["plain"], bare, rtol=1e-4)
    for form in ("lean", "optimized"):
        torch.testing.assert_close(found[form], found["plain"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["mlp", "attn", "drop_path", "", "attn.qkv", "attn.router", "attn.kv_down"])
def test_hooks_of_containers_run_in_every_form(path: str) -> None:
    made = model()
    seen: list[str] = []
    target = made.get_submodule(f"stages.0.0.{path}".rstrip("."))
    target.register_forward_hook(lambda *_: seen.append(path))
    for form in (made, made, optimize(made)):
        made.set_lean(form is made and bool(seen))
        seen.clear()
        form(X)
        assert seen, form


@pytest.mark.parametrize("name", MODELS)
def test_a_hook_on_all_modules_sees_every_one(name: str) -> None:
    made = model(name)
    seen: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        made.set_lean()
        made(X)
    finally:
        handle.remove()
    unseen = {n for n, m in made.named_modules() if m not in seen and not isinstance(m, nn.ModuleList)}
    # The one container that is not called, because it holds convolutions of an NHWC map.
    assert all(isinstance(made.get_submodule(n), nn.Sequential) for n in unseen), unseen


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_run_in_every_form() -> None:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    made = quantise(model(), {nn.Linear})
    plain = made(X)
    made.set_lean()
    torch.testing.assert_close(made(X), plain)
    torch.testing.assert_close(optimize(made)(X), plain, rtol=1e-3, atol=1e-3)


def test_pruned_layers_act_when_lean_and_are_refused_where_they_cannot_be_copied() -> None:
    made = model()
    replace(made, "stages.0.0.mlp.0", pruned)
    plain = made(X)
    made.set_lean()
    torch.testing.assert_close(made(X), plain)
    made(X)  # leaves a computed weight behind
    with pytest.raises(ProblemError, match=r"cannot be copied; make them permanent first"):
        optimize(made)
    prune.remove(made.get_submodule("stages.0.0.mlp.0"), "weight")  # type: ignore[no-untyped-call]
    torch.testing.assert_close(optimize(made)(X), plain.detach(), rtol=1e-4, atol=1e-4)


def test_a_model_that_would_lose_something_is_not_optimized() -> None:
    made = model()
    made.register_forward_hook(lambda *_: None)
    with pytest.raises(ProblemError, match="has a forward hook, which an optimized model would leave out"):
        optimize(made)
    other: Any = nn.Sequential(nn.Linear(3, 3)).eval()
    with pytest.raises(ProblemError, match=r"not Sequential; bratune\.accelerate takes any"):
        optimize(other)


# --- an optimized model as a module -----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loaded_weights_are_all_of_the_other_model(name: str) -> None:
    first, second = (optimize(model(name, seed=seed)) for seed in (1, 2))
    first(X)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(X), second(X))
    with torch.no_grad():  # and what is written in place
        for ours, theirs in zip(first.buffers(), optimize(model(name, seed=3)).buffers(), strict=True):
            ours.copy_(theirs)
    torch.testing.assert_close(first(X)[0] - first(X)[0], torch.zeros(3))
    fresh = optimize(model(name, seed=3))
    first.load_state_dict(fresh.state_dict())
    assert torch.equal(first(X), fresh(X))


def test_weights_of_another_kind_are_refused() -> None:
    fast = optimize(model())
    with pytest.raises(ProblemError, match="load them into the plain model"):
        fast.load_state_dict(model().state_dict())
    with pytest.raises(ProblemError, match=r"is torch\.float64 in the file and torch\.float32 here"):
        fast.load_state_dict(optimize(model().double()).state_dict())


@pytest.mark.parametrize("change", ["bfloat16", "double", "half"])
def test_another_data_type_is_refused_and_changes_nothing(change: str) -> None:
    fast = optimize(model())
    before = fast(X)
    for holder in (fast, nn.Sequential(fast), fast.get_submodule("stages.0")):
        with pytest.raises(ProblemError, match="move the plain model, then optimize it"):
            getattr(holder, change)()
    assert torch.equal(fast.float().to("cpu").eval()(X), before)
    with pytest.raises(ProblemError, match="for inference alone"):
        fast.train()


def through_torch(fast: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch],
    ids=["copy", "pickle", "save"],
)
def test_copies_compute_the_same_and_are_apart(twin: Callable[[Any], Any]) -> None:
    fast = optimize(model())
    expected = fast(X)
    other = twin(fast)
    assert torch.equal(other(X), expected)
    other.load_state_dict(optimize(model(seed=9)).state_dict())
    assert not torch.equal(other(X), expected)
    assert torch.equal(fast(X), expected)


def test_a_captured_graph_is_not_copied() -> None:
    runner = GraphRunner.__new__(GraphRunner)
    nn.Module.__init__(runner)
    for twin in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ProblemError, match="bound to the memory of its process"):
            twin(runner)


@pytest.mark.parametrize("name", MODELS)
def test_an_optimized_model_is_exported_and_takes_no_image(name: str) -> None:
    fast = optimize(model(name))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (X,), dynamic_shapes=({0: batch},), strict=False)
    for images in (X, X.repeat(3, 1, 1, 1), X[:1]):
        torch.testing.assert_close(program.module()(images), fast(images), rtol=1e-4, atol=1e-5)
    assert fast(X[:0]).shape == (0, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["plain", "optimized"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "tracing"])
def test_onnx_files_take_any_batch(form: str, dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made: nn.Module = model()
    made = optimize(made) if form == "optimized" else made  # type: ignore[arg-type]
    file = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    opened: dict[str, Any] = {"dynamic_shapes": ({0: batch},), "verbose": False}
    if not dynamo:
        opened = {"input_names": ["x"], "output_names": ["y"]}
        opened["dynamic_axes"] = {"x": {0: "batch"}, "y": {0: "batch"}}
    torch.onnx.export(made, (X,), str(file), dynamo=dynamo, **opened)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for images in (X, X.repeat(3, 1, 1, 1), X[:1]):
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), made(images), rtol=1e-4, atol=1e-4)


# --- sentences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "optimized"])
def test_one_image_is_told_to_be_no_batch(form: str) -> None:
    made: nn.Module = model()
    made = optimize(made) if form == "optimized" else made  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=re.escape("not [3, 32, 32]; x[None] is a batch of one")):
        made(X[0])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (BiLevelRoutingAttention, (8, 8, 16)),
        (BiLevelRoutingAttention, (1, 16, 8, 8)),
        (NCHWBiLevelRoutingAttention, (16, 8, 8)),
        (NCHWBiLevelRoutingAttention, (1, 8, 8, 16)),
    ],
)
def test_a_map_in_another_layout_is_an_error_that_names_it(kind: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ProblemError, match=re.escape(f"with 16 channels, not {list(shape)}")):
        kind(16, num_heads=2, n_win=2, topk=2)(torch.randn(shape))


def test_models_without_a_published_form_are_refused() -> None:
    for made in (
        model("biformer_stl_nchw"),
        model("biformer_stl"),
        model(topks=(2, -1)),
        model(topks=(0, 2)),
    ):
        with pytest.raises(UnsupportedError, match="published"):
            as_published(made)  # type: ignore[arg-type]
