"""The runtime for inference computes what the plain model computes, in fewer operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import GOLDEN, apart, golden_runs, load, tiny
from torch import Tensor, nn

from bratune.errors import ProblemError, TargetError
from bratune.kernels import epilogues, norm, registry, runtime
from bratune.kernels.accounting import count
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import BiFormer, BiFormerSTL, NCHWBiFormerSTL, build
from bratune.kernels.fold import conv_then_norm, norm_then_conv, norm_then_linear
from bratune.kernels.layer import BiLevelRoutingAttention
from bratune.kernels.packed_attention import PackedAttention
from bratune.kernels.published import as_published
from bratune.kernels.runtime import FastModel, GraphRunner, optimize

# On max|a - b| / max|b|, as for the plain models.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize(("path", "tag"), golden_runs())
def test_fast_model_repeats_the_official_result(path: Path, tag: str) -> None:
    model, x, expected = load(path, tag, torch.float32)
    for found, official in zip(outputs(optimize(model), x), expected, strict=True):
        assert apart(found, official) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("path", "tag"), golden_runs())
def test_fast_model_equals_the_plain_one_in_float64(
    path: Path, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = load(path, tag, torch.float64)
    here = optimize(model)
    monkeypatch.setattr(runtime, "accumulates", lambda weight: True)
    expected = outputs(model, x)
    for fast in (here, optimize(model)):  # the form that it has on a CPU, and the one that it has on CUDA
        for found, plain in zip(outputs(fast, x), expected, strict=True):
            assert apart(found, plain) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", [name for name in registry.BACKENDS if name in ("gather", "sparse")])
def test_a_named_backend_is_the_one_that_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, expected = load(GOLDEN / "model_biformer_small4stage.npz", "b112", torch.float32)
    model.set_backend(backend)
    seen: list[str] = []
    chosen = registry.get(backend)
    forward = chosen.forward

    def watched(*args: Any) -> Tensor:
        seen.append(backend)
        return forward(*args)

    monkeypatch.setattr(chosen, "forward", watched)
    (found,) = outputs(optimize(model), x)
    assert apart(found, expected[0]) <= TOLERANCE[torch.float32]
    assert len(seen) == 4  # every routed layer


def test_bfloat16_is_no_further_from_float64_than_the_plain_model() -> None:
    """Routes decide near ties as they round: both are compared with what their own routes allow."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim": (32, 32, 64, 64),
        "head_dim": 32,
        "n_win": 2,
        "topks": (4, 4, 4, -2),
    }
    model = BiFormer(depth=(1, 1, 2, 1), kv_downsample_mode="identity", **sizes).eval()
    x = torch.randn(2, 3, 64, 64)
    (truth,) = outputs(model, x)
    half, y = model.bfloat16(), x.bfloat16()
    plain, fast = apart(outputs(half, y)[0], truth), apart(outputs(optimize(half), y)[0], truth)
    assert fast <= 1.5 * plain


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "gathered"])
@pytest.mark.parametrize("topk", [1, 3, 16])
def test_packed_attention_equals_the_layer(masked: bool, topk: int) -> None:
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(
        32,
        num_heads=2,
        n_win=4,
        topk=topk,
        qk_dim=16,
        side_dwconv=0,
        param_attention="qkv",
        backend="reference",
    ).double()
    x = torch.randn(2, 8, 12, 32, dtype=torch.float64)
    packed = PackedAttention(heads=2, qk_dim=16, n_win=4, topk=topk, scale=layer.scale)
    with torch.no_grad():
        found, values = packed(x, layer.qkv, masked=masked)
        assert apart(found, layer(x)) <= 1e-12
        assert torch.equal(values, layer.project(x)[2])


# --- the form that it has on CUDA --------------------------------------------------------------------


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packed weights; products are added to the map in their epilogue, and biases before them."""
    monkeypatch.setattr(epilogues, "packs", lambda weight: False)
    monkeypatch.setattr(runtime, "accumulates", lambda weight: True)


@pytest.fixture
def with_kernels(like_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the Triton kernels of norms and routing."""
    monkeypatch.setattr(epilogues, "layer_norm", functools.partial(norm.layer_norm, backend="triton"))
    monkeypatch.setattr(runtime, "_router", lambda q, k, region: "triton")


def randomized(model: Backbone) -> Backbone:
    """Every number of the model random: new biases are zero, and norms do nothing to speak of."""
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.data.normal_()
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return model.eval()


STL: dict[str, Any] = {
    "depth": (1, 2, 2, 1),
    "embed_dim": (32, 32, 32, 32),
    "head_dim": 32,
    "n_wins": 2,
    "topks": (1, 2, 3, -1),
    "num_classes": 5,
}


@pytest.mark.usefixtures("like_cuda")
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny(depth=(2, 1, 2, 1), layer_scale_init_value=0.5),
        lambda: tiny(before_attn_dwconv=0, depth=(2, 1, 2, 1), topks=(1, 0, -1, -2)),
        lambda: tiny(mlp_dwconv=True, param_attention="qkv"),
        lambda: tiny(pre_norm=False),
        lambda: BiFormerSTL(**STL, norm_layer=nn.BatchNorm2d),
        lambda: BiFormerSTL(**STL),
        lambda: NCHWBiFormerSTL(**STL, norm_layer=nn.BatchNorm2d),
    ],
    ids=["scaled", "no-embedding", "no-projection", "post-norm", "stl", "stl-layer-norm", "stl-nchw"],
)
def test_biases_are_added_before_the_products_and_taken_away_between(make: Callable[[], Backbone]) -> None:
    torch.manual_seed(0)
    model, x = randomized(make()).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    kept = x.clone()
    found, plain = outputs(optimize(model), x)[0], outputs(model, x)[0]
    assert apart(found, plain) <= TOLERANCE[torch.float64]
    assert torch.equal(x, kept)  # products are added to maps, not to images


@pytest.mark.usefixtures("like_cuda")
@pytest.mark.parametrize("stl", [False, True], ids=["biformer", "stl"])
def test_half_precision_with_leading_biases_is_no_further_from_float64(stl: bool) -> None:
    plain = fast = 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        deep: dict[str, Any] = {"depth": (1, 1, 4, 1), "topks": (4, 4, 4, -1)}
        model = BiFormerSTL(**{**STL, **deep}, norm_layer=nn.BatchNorm2d) if stl else tiny(**deep)
        randomized(model)
        for module in model.modules():
            if isinstance(module, nn.Linear):  # those of new models are too small to matter beside the biases
                module.weight.data.normal_(std=module.in_features**-0.5)
        x = torch.randn(2, 3, 64, 64)
        (truth,) = outputs(model.double(), x.double())
        half, y = model.bfloat16(), x.bfloat16()
        plain += apart(outputs(half, y)[0], truth)
        fast += apart(outputs(optimize(half), y)[0], truth)
    assert 0 < fast <= 1.5 * plain


@pytest.mark.interpreter
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("pooled", [False, True], ids=["by-queries-and-keys", "by-pooled-inputs"])
def test_form_on_cuda_with_its_kernels_equals_the_plain_model(pooled: bool) -> None:
    torch.manual_seed(0)
    model, x = randomized(tiny()), torch.randn(1, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, BiLevelRoutingAttention):
            module.pooled_routing = pooled
    model.set_backend("triton")
    fast: Any = FastModel(model, native=False)  # not the C kernels, which a CPU may have or not
    found = outputs(fast, x)[0]
    model.set_backend("gather")
    assert apart(found, outputs(model, x)[0]) <= TOLERANCE[torch.float32]
    # Position embedding (whose residual is in its kernel in float32 on a CPU), norm, projection, routing 2,
    # attention, enhancement 2, projection, norm, MLP 3. By pooled inputs, the projection of the means takes
    # the place of reading queries and keys.
    y = torch.zeros(1, 16, 16, 32)
    assert count(lambda: fast.stages[0](y)).operations == 13


def norm_of(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        assert tensor is not None
        tensor.data.normal_()
    assert norm.running_var is not None
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def test_folded_layers_equal_the_pairs_they_stand_for() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    padded = nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False).double()
    patches, after, before = nn.Conv2d(4, 5, 2, stride=2).double(), norm_of(5), norm_of(4)
    head = nn.Linear(4, 3).double()
    assert torch.allclose(conv_then_norm(padded, after)(x), after(padded(x)))
    assert torch.allclose(norm_then_conv(before, patches)(x), patches(before(x)))
    assert torch.allclose(norm_then_linear(before, head)(x.mean((2, 3))), head(before(x).mean((2, 3))))


def test_later_changes_of_the_model_do_not_reach_the_runtime() -> None:
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.randn(1, 3, 64, 64)
    fast = optimize(model)
    before = outputs(fast, x)[0]
    count(lambda: fast(x))  # under a counter blocks go part by part, which makes index tables
    operations = count(lambda: fast(x)).operations
    model.set_backend("gather")
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(outputs(fast, x)[0], before)
    assert count(lambda: fast(x)).operations == operations


def test_runtime_routes_by_the_means_of_the_input_where_the_layer_does() -> None:
    torch.manual_seed(0)
    model, x = tiny().double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, BiLevelRoutingAttention):
            module.pooled_routing = True
    assert apart(outputs(optimize(model), x)[0], outputs(model, x)[0]) <= TOLERANCE[torch.float64]


def test_means_of_the_input_are_those_of_the_padded_map() -> None:
    torch.manual_seed(0)
    # The map of stage 3 is 6x6: four regions per side have two tokens and pad it to 8x8, three would tile it.
    model = tiny(n_win=4, topks=(1, 3, 5, -2), auto_pad=True).double().eval()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, BiLevelRoutingAttention):
            module.pooled_routing = True
    assert apart(outputs(optimize(model), x)[0], outputs(model, x)[0]) <= TOLERANCE[torch.float64]


def test_runtime_keeps_its_data_type_under_autocast_and_asks_for_it() -> None:
    torch.manual_seed(0)
    fast, x = optimize(tiny().eval()), torch.randn(1, 3, 64, 64)
    (expected,) = outputs(fast, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(fast, x)[0], expected)
    with pytest.raises(ProblemError, match=r"model in torch\.float32; the images are torch\.float64"):
        fast(x.double())


def test_model_in_training_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"model\.eval\(\)"):
        optimize(build("biformer_tiny"))


def test_cuda_graph_needs_a_cuda_device() -> None:
    with pytest.raises(TargetError, match="the example is on cpu"):
        GraphRunner(nn.Identity(), torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cuda_graph_repeats_the_model(dtype: torch.dtype) -> None:
    model = build("biformer_tiny").eval().to("cuda", dtype)
    x, y = (torch.randn(2, 3, 224, 224, device="cuda", dtype=dtype) for _ in range(2))
    fast = optimize(model)
    graph = optimize(model, graph_input=x)
    for images in (x, y):
        assert torch.equal(graph(images), fast(images))
    with pytest.raises(ProblemError, match="captured for"):
        graph(x[:1])


@pytest.mark.slow
def test_compiled_model_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    (found,) = outputs(optimize(model, compile=True), x)
    assert apart(found, outputs(model, x)[0]) <= TOLERANCE[torch.float32]


# --- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(), (0, 2)], ids=["all-kept", "checkpointed"])
@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_training_step_under_autocast_reaches_every_parameter(backend: str, stages: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = tiny(backend=backend, use_checkpoint_stages=stages).train()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(torch.randn(2, 3, 64, 64))
    assert scores.dtype == torch.bfloat16
    torch.autograd.backward(scores.float().logsumexp(1).sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_training_step_compiles_into_one_graph_with_equal_gradients() -> None:
    torch.manual_seed(0)
    model = tiny(backend="gather").double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.autograd.backward(model(x).square().sum())
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.autograd.backward(compiled(x).square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-12), name


# --- the published composition -----------------------------------------------------------------------


def published_runs() -> list[Any]:
    names = ("model_biformer_small4stage", "model_biformer_autopad", "model_mm_det")
    return [run for run in golden_runs() if run.values[0].stem in names]


@pytest.mark.parametrize(("path", "tag"), published_runs())
def test_published_composition_repeats_the_official_result(path: Path, tag: str) -> None:
    model, x, expected = load(path, tag, torch.float32)
    assert isinstance(model, BiFormer)
    for found, official in zip(outputs(as_published(model), x), expected, strict=True):
        assert apart(found, official) <= TOLERANCE[torch.float32]


# --- operations and bytes ---------------------------------------------------------------------------


def test_views_are_free_and_each_operation_counts_what_it_reads_and_writes() -> None:
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    account = count(lambda: (x.t().reshape(4, 8), (x @ w).relu_(), torch.empty(9)), weights=[w])
    assert account.operations == 3  # the copy of a transposed view, the product, the activation
    assert account.written_bytes == 3 * 32 * 2
    assert account.read_bytes == 3 * 32 * 2
    assert account.weight_bytes == 64 * 2


def test_broadcast_inputs_are_read_once_and_gathers_read_what_they_write() -> None:
    x, index = torch.zeros(3, 8), torch.tensor([[1] * 8] * 2)
    assert count(lambda: torch.zeros(1, 8).expand(4, 8) + torch.zeros(4, 8)).read_bytes == (8 + 32) * 2
    gathered = count(lambda: x.gather(0, index))
    assert gathered.read_bytes == 2 * 8 * 2 + index.numel() * 8


@pytest.fixture(scope="module")
def small() -> BiFormer:
    model = build("biformer_small").eval()
    assert isinstance(model, BiFormer)
    return model


def test_published_composition_does_the_counted_work(small: BiFormer) -> None:
    """868 operations and 670 MB with weights were counted on the official code, at bf16."""
    published, x = as_published(small), torch.zeros(1, 3, 224, 224)
    account = count(lambda: published(x), weights=small)
    assert account.operations == pytest.approx(868, rel=0.005)
    assert account.total_bytes == pytest.approx(670e6, rel=0.005)


@pytest.mark.parametrize(
    ("dtype", "operations"),
    [
        pytest.param(torch.float32, 450, id="float32"),
        # The residuals of the 30 position embeddings are operations of their own.
        pytest.param(torch.bfloat16, 480, id="bfloat16"),
    ],
)
def test_fast_model_does_half_the_operations_and_moves_half_the_bytes(
    small: BiFormer, dtype: torch.dtype, operations: int
) -> None:
    fast, x = optimize(small.to(dtype)), torch.zeros(1, 3, 224, 224, dtype=dtype)
    count(lambda: fast(x))  # makes its index tables
    account = count(lambda: fast(x), weights=fast)
    small.float()
    assert account.operations <= operations
    assert account.total_bytes <= 330e6
