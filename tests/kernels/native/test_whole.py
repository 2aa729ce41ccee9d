"""A block as one call of the library equals its parts, whatever the variant, and follows whatever changes."""

from __future__ import annotations

import copy
import ctypes
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from bratune.kernels.api import routed_attention
from bratune.kernels.biformer import biformer_tiny
from bratune.kernels.epilogues import FrozenLinear
from bratune.kernels.layer import RoutedLayer
from bratune.kernels.native import whole
from bratune.kernels.native.block import pack_depthwise
from bratune.kernels.native.library import Library, find, variant_number
from bratune.kernels.native.whole import PARTS, BlockCall, BlockParts, Norm, pack_linear
from bratune.kernels.routing import route
from bratune.kernels.runtime import FastBlock, FastModel, optimize

FOUND = find()
RUNNABLE = FOUND.runnable if isinstance(FOUND, Library) else ()
pytestmark = pytest.mark.skipif(not RUNNABLE, reason=str(FOUND))
# Of the largest value. In bfloat16 what goes from part to part is rounded, as PyTorch's operations round it.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 3e-2}


def normal(*size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


class Sample:
    """A block of random numbers, without and with what a block may lack."""

    def __init__(self, c: int, hidden: int, *, bare: bool, dtype: torch.dtype) -> None:
        def linear(n: int, k: int) -> tuple[Tensor, Tensor | None]:
            return normal(n, k, scale=k**-0.5).to(dtype), None if bare else normal(n)

        self.c, self.heads, self.dtype = c, c // 16, dtype
        self.enhances_input = False
        self.position = None if bare else (normal(c, 1, 3, 3, scale=0.2), normal(c))
        self.local = None if bare else (normal(c, 1, 5, 5, scale=0.2), normal(c))
        self.norms: list[Any] = (
            [(normal(c) + 1, normal(c + 0)) for _ in range(2)] if not bare else [(None, None)] * 2
        )
        self.qkv, self.proj = linear(3 * c, c), linear(c, c)
        self.widen, self.narrow = linear(hidden, c), linear(c, hidden)

    def parts(self, region: tuple[int, int] | None, topk: int) -> BlockParts:
        def strips(conv: Any) -> Any:
            return None if conv is None else (pack_depthwise(conv[0]), conv[1])

        def packed(layer: Any) -> Any:
            return pack_linear(layer[0]), layer[1]

        norm1, norm2 = (Norm(weight, bias, 1e-6) for weight, bias in self.norms)
        return BlockParts(
            strips(self.position), True, norm1, packed(self.qkv), self.heads, self.c, self.c**-0.5, region,
            topk, strips(self.local), self.enhances_input, packed(self.proj), norm2, packed(self.widen),
            packed(self.narrow),
        )  # fmt: skip

    def __call__(self, x: Tensor, region: tuple[int, int] | None, topk: int) -> Tensor:
        """The same in float64; what routes are made of is float32's."""

        def linear(y: Tensor, layer: Any) -> Tensor:
            return F.linear(y, layer[0].double(), None if layer[1] is None else layer[1].double())

        def conv(y: Tensor, held: Any) -> Tensor | float:
            if held is None:
                return 0.0
            weight, bias = (t.double() for t in held)
            y = F.conv2d(y.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=self.c)
            return y.permute(0, 2, 3, 1)

        def norm(y: Tensor, pair: Any) -> Tensor:
            weight, bias = (None if t is None else t.double() for t in pair)
            return F.layer_norm(y, (self.c,), weight, bias, 1e-6)

        x = x.double()
        x = x + conv(x, self.position)
        q, k, v = linear(norm(x, self.norms[0]), self.qkv).chunk(3, -1)
        area = region or (x.shape[1], x.shape[2])
        routes = route(q, k, region=area, topk=topk or 1)
        out = routed_attention(q, k, v, routes, heads=self.heads, region=area, backend="gather")
        local = conv(norm(x, self.norms[0]) if self.enhances_input else v, self.local)
        x = x + linear(out + local, self.proj)
        return x + linear(F.gelu(linear(norm(x, self.norms[1]), self.widen)), self.narrow)


# Few rows, of which outputs are cut, and many; rows and outputs that fill register tiles and that do not.
@pytest.mark.parametrize(
    ("size", "region", "topk", "c", "hidden", "bare"),
    [
        ((1, 7, 7), None, 0, 32, 96, False),
        ((2, 3, 5), None, 0, 64, 48 * 4, True),
        ((1, 12, 18), (4, 6), 3, 32, 160, False),
        ((3, 14, 14), (2, 2), 16, 64, 224, False),
        ((1, 30, 33), (5, 11), 9, 32, 64, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((name, torch.float32) for name in RUNNABLE), *[("amx", torch.bfloat16)] * ("amx" in RUNNABLE)],
    ids=str,
)
def test_a_call_is_the_block(
    variant: str,
    dtype: torch.dtype,
    threads: int,
    size: tuple[int, int, int],
    region: tuple[int, int] | None,
    topk: int,
    c: int,
    hidden: int,
    bare: bool,
) -> None:
    sample = Sample(c, hidden, bare=bare, dtype=dtype)
    if dtype == torch.bfloat16 and region is not None:
        topk = (size[1] // region[0]) * (size[2] // region[1])  # all regions: rounding decides no route
    sample.enhances_input = region is None and not bare
    x = normal(*size, c).to(dtype)
    call = BlockCall(sample.parts(region, topk), (*size, c), dtype, threads)
    call.variant = variant_number(variant)
    before = x.clone()
    found, true = call(x), sample(x, region, topk)
    assert torch.equal(x, before)
    error = float((found.double() - true).abs().max() / true.abs().max())
    assert error <= TOLERANCES[dtype], error
    seconds = (ctypes.c_double * len(PARTS))()
    assert torch.equal(call(x, seconds), found)
    lacking = {"position embedding", "LePE"} if bare else set()
    lacking |= {"routing"} if region is None else set()
    assert all(seconds[i] > 1e-7 for i, part in enumerate(PARTS) if part not in lacking)


def test_panels_hold_sixteen_outputs_side_by_side() -> None:
    weight = torch.arange(32.0 * 4).view(32, 4)
    panels = pack_linear(weight)
    assert panels.shape == (2, 4, 16)
    assert panels[1, 2].tolist() == weight[16:, 2].tolist()
    pairs = pack_linear(weight.bfloat16())
    assert pairs.shape == (2, 2, 16, 2)
    assert pairs[1, 1, 3].tolist() == weight.bfloat16()[19, 2:].tolist()


# --- in the runtime -------------------------------------------------------------------------------------

PRODUCTS = isinstance(FOUND, Library) and FOUND.default in ("amx", "avx512")
in_runtime = pytest.mark.skipif(not PRODUCTS, reason="the runtime asks oneDNN for products here")


def tiny(**more: Any) -> Any:
    torch.manual_seed(0)
    return biformer_tiny(num_classes=10, n_win=2, topks=(1, 2, 3, -2), **more).eval()


def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The maps that blocks took at once."""
    seen: list[torch.Size] = []
    plain = BlockCall.__call__

    def noted(self: BlockCall, x: Tensor, seconds: Any = None) -> Tensor:
        seen.append(x.shape)
        return plain(self, x, seconds)

    monkeypatch.setattr(whole.BlockCall, "__call__", noted)
    return seen


@in_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_block_of_a_model_is_a_call(calls: list[torch.Size], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and "amx" not in RUNNABLE:
        pytest.skip("bfloat16 needs matrix tiles")
    model = tiny().to(dtype)
    x = images(2).to(dtype)
    fast = optimize(model)
    with torch.no_grad():
        found, true = fast(x), model(x)
    assert len(calls) == sum(isinstance(m, FastBlock) for m in fast.modules()) == 14
    limit = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, true, rtol=limit, atol=limit)


@in_runtime
def test_weights_that_change_are_followed(calls: list[torch.Size]) -> None:
    fast: Any = optimize(tiny())
    other, x = optimize(tiny()), images()
    torch.manual_seed(1)
    changed = {name: t + 0.1 * torch.randn(t.shape) for name, t in other.state_dict().items()}
    with torch.no_grad():
        before = fast(x)
        fast.load_state_dict(changed)
        other.load_state_dict(changed)
        true = other(x)
        assert not torch.allclose(before, true)
        torch.testing.assert_close(fast(x), true)
        block: Any = fast.stages[0][0]
        block.widen.weight.mul_(2.0)  # in place
        assert not torch.allclose(fast(x), true)
        block.widen.weight.mul_(0.5)
        block.norm1.bias = block.norm1.bias + 1.0  # another tensor
        assert not torch.allclose(fast(x), true)
    assert len(calls) == 14 * 5


@in_runtime
def test_what_somebody_hooks_is_called_part_by_part(calls: list[torch.Size]) -> None:
    fast: Any = optimize(tiny())
    x = images()
    block: Any = fast.stages[0][0]
    seen: list[int] = []
    with torch.no_grad():
        before = fast(x)
        handle = block.attn.register_forward_hook(lambda *_: seen.append(1))
        hooked = fast(x)
        handle.remove()
        again = fast(x)
    assert len(seen) == 1
    assert len(calls) == 14 + 13 + 14
    torch.testing.assert_close(hooked, before)
    assert torch.equal(again, before)


@in_runtime
def test_copies_batches_and_numbers_of_threads_have_calls_of_their_own(calls: list[torch.Size]) -> None:
    fast, x = optimize(tiny()), images(3)
    threads = torch.get_num_threads()
    with torch.no_grad():
        true = fast(x)
        torch.testing.assert_close(torch.cat([fast(x[i : i + 1]) for i in range(3)]), true)
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(again(x), true)
        try:
            torch.set_num_threads(1)
            torch.testing.assert_close(fast(x), true)
        finally:
            torch.set_num_threads(threads)
    assert len(calls) == 14 * 7


@in_runtime
def test_threads_of_python_may_call_one_model() -> None:
    fast = optimize(tiny())
    inputs = [torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    with torch.no_grad():
        true = [fast(x) for x in inputs]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(fast, inputs))
    for a, b in zip(found, true, strict=True):
        assert torch.equal(a, b)


@in_runtime
@pytest.mark.parametrize("option", ["pooled_routing", "backend"])
def test_what_the_kernels_have_not_goes_part_by_part(calls: list[torch.Size], option: str) -> None:
    model = tiny()
    for layer in model.modules():
        if isinstance(layer, RoutedLayer):
            setattr(layer, option, {"pooled_routing": True, "backend": "gather"}[option])
    with torch.no_grad():
        torch.testing.assert_close(optimize(model)(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert [tuple(size) for size in calls] == [(1, 2, 2, 512)] * 2  # stage 4 attends in full


@in_runtime
def test_plain_runtimes_make_no_calls(calls: list[torch.Size]) -> None:
    with torch.no_grad():
        FastModel(tiny(), native=False)(images())
    assert not calls


@in_runtime
def test_weights_are_held_once_and_named_as_everywhere() -> None:
    model = tiny()
    fast: Any = optimize(model)
    with torch.no_grad():
        before = fast(images())
    layers = [part for part in fast.stages.modules() if isinstance(part, FrozenLinear)]
    assert len(layers) == 4 * 14
    for layer in layers:
        panels, _ = layer.panels()
        assert panels.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
        assert layer.packed is None
    state, plain = fast.state_dict(), FastModel(model, native=False).state_dict()
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in plain.items()}
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    for assign in (False, True):
        other: Any = optimize(tiny())
        with torch.no_grad():
            for t in other.buffers():
                t.zero_()
            other.load_state_dict(plain, assign=assign)
            assert torch.equal(other(images()), before)


@in_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_that_are_padded_are_multiplied_by_the_same_products(
    calls: list[torch.Size], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and "amx" not in RUNNABLE:
        pytest.skip("bfloat16 needs matrix tiles")
    torch.manual_seed(0)
    model = biformer_tiny(num_classes=10, n_win=3, topks=(9, 9, 9, -2), auto_pad=True).eval().to(dtype)
    x = images(2).to(dtype)
    with torch.no_grad():
        limit = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(optimize(model)(x), model(x), rtol=limit, atol=limit)
    assert calls == [torch.Size((2, 2, 2, 512))] * 2  # stage 4 attends in full


@in_runtime
def test_in_a_graph_a_block_is_one_operator(calls: list[torch.Size]) -> None:
    model = tiny()
    fast: Any = FastModel(model, pack=False, native=True)
    compiled: Any = torch.compile(fast, backend="aot_eager", fullgraph=True)
    seen: list[int] = []
    with torch.no_grad():
        true = model(images(2))
        torch.testing.assert_close(compiled(images(2)), true, rtol=1e-4, atol=1e-4)
        assert len(calls) == 14
        handle = fast.stages[0][0].attn.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(compiled(images(2)), true, rtol=1e-4, atol=1e-4)
        handle.remove()
        assert len(seen) == 1
        twin = copy.deepcopy(fast)
        twin.load_state_dict({name: 0.5 * t for name, t in fast.state_dict().items()})
        other: Any = torch.compile(twin, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(other(images(2)), twin(images(2)))
        assert not torch.allclose(other(images(2)), true, rtol=1e-2)
        torch.testing.assert_close(compiled(images(2)), true, rtol=1e-4, atol=1e-4)


def test_the_operators_pass_the_checks_of_pytorch() -> None:
    x, checks = normal(2, 3, 32), ("test_schema", "test_faketensor")
    widen, narrow = pack_linear(normal(48, 32)), pack_linear(normal(32, 48))
    ops = torch.ops.bratune
    library.opcheck(ops.native_linear.default, (x, widen, normal(48), normal(2, 3, 48)), test_utils=checks)
    mlp = (x, normal(32), None, 1e-6, widen, normal(48), narrow, None)
    library.opcheck(ops.native_add_mlp.default, mlp, test_utils=checks)
