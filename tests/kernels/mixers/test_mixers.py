"""Every mixer computes what its paper says: full attention under its mask, with its biases."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_models import apart
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bratune.errors import ProblemError, UnknownNameError
from bratune.kernels import mixers
from bratune.kernels.accounting import count
from bratune.kernels.mixers import registry
from bratune.kernels.mixers.mixer import MixerKind, Place, join_heads, split_heads
from bratune.kernels.mixers.neighbours import NeighbourhoodAttention
from bratune.kernels.mixers.network import LAYOUT, MixerNetwork, places
from bratune.kernels.mixers.reduction import LocalAttention, ReducedAttention
from bratune.kernels.mixers.stripes import AxialAttention, CrissCrossAttention, CrossShapedAttention
from bratune.kernels.mixers.tiles import RelativeBias, from_grid, from_windows, to_grid, to_windows
from bratune.kernels.mixers.whole import FullMapAttention
from bratune.kernels.mixers.windows import GridAttention, WindowAttention

# On max|a - b| / max|b|, in float64.
TOLERANCE = 1e-12
DIM, HEADS = 24, 3


def place(height: int, width: int, **values: Any) -> Place:
    return Place(**{"height": height, "width": width, "dim": DIM, "heads": HEADS, "stage": 1, **values})


def image(height: int, width: int, batch: int = 2) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, height, width, DIM, dtype=torch.float64)


def drawn(module: nn.Module) -> nn.Module:
    """The module in float64 with weights that are far from their start, biases too."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


Mask = Callable[[tuple[int, int], tuple[int, int]], bool]


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of ``[B, heads, N, d]`` over all tokens, where ``seen`` allows it: the plain reference."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    out: Tensor = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v
    return out


def seen_by(height: int, width: int, rule: Mask) -> Tensor:
    """``[N, N]``: which token sees which."""
    at = [(y, x) for y in range(height) for x in range(width)]
    return torch.tensor([[rule(here, there) for there in at] for here in at])


def offsets(height: int, width: int, bias: Callable[[int, int], Tensor]) -> Tensor:
    """``[heads, N, N]``: the bias of every pair of tokens, from the offset between them."""
    at = [(y, x) for y in range(height) for x in range(width)]
    rows = [torch.stack([bias(a[0] - b[0], a[1] - b[1]) for b in at]) for a in at]
    return torch.stack(rows).permute(2, 0, 1)


def plain(module: Any, x: Tensor, rule: Mask, bias: Callable[[int, int], Tensor] | None = None) -> Tensor:
    """What a module with one projection computes, as full attention under a mask."""
    height, width = x.shape[1:3]
    q, k, v = (split_heads(t, HEADS) for t in module.qkv(x.flatten(1, 2)).chunk(3, dim=-1))
    made = None if bias is None else offsets(height, width, bias)
    out = masked(q, k, v, seen_by(height, width, rule), made)
    projected: Tensor = module.proj(join_heads(out))
    return projected.reshape(x.shape)


def of_table(bias: RelativeBias, side: int) -> Callable[[int, int], Tensor]:
    """The bias of an offset within a window; of one that no window has, any."""
    width = 2 * side - 1
    return lambda dy, dx: bias.table[(dy + side - 1) % width * width + (dx + side - 1) % width]


def test_windows_are_full_attention_within_windows() -> None:
    module, x = drawn(WindowAttention(DIM, HEADS, side=3)), image(6, 9)
    assert isinstance(module, WindowAttention)
    expected = plain(
        module, x, lambda a, b: (a[0] // 3, a[1] // 3) == (b[0] // 3, b[1] // 3), of_table(module.bias, 3)
    )
    assert apart(module(x), expected) <= TOLERANCE


def test_shifted_windows_see_only_tokens_that_are_neighbours_on_the_map() -> None:
    module, x = drawn(WindowAttention(DIM, HEADS, side=4, shift=2)), image(8, 12)
    assert isinstance(module, WindowAttention)

    def near(a: tuple[int, int], b: tuple[int, int]) -> bool:
        # Windows begin two tokens to the left and above; what sticks out is cut off.
        return all((i + 2) // 4 == (j + 2) // 4 for i, j in zip(a, b, strict=True))

    assert apart(module(x), plain(module, x, near, of_table(module.bias, 4))) <= TOLERANCE


def test_a_window_that_covers_the_map_is_not_shifted() -> None:
    module, x = drawn(WindowAttention(DIM, HEADS, side=4, shift=2)), image(4, 4)
    still = copy.deepcopy(module)
    still.shift = 0  # type: ignore[assignment]
    assert torch.equal(module(x), still(x))


def test_a_grid_sees_tokens_that_lie_evenly_over_the_map() -> None:
    module, x = drawn(GridAttention(DIM, HEADS, side=3)), image(6, 9)
    assert isinstance(module, GridAttention)

    def far(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return (a[0] % 2, a[1] % 3) == (b[0] % 2, b[1] % 3)

    table = of_table(module.bias, 3)
    expected = plain(module, x, far, lambda dy, dx: table(round(dy / 2), round(dx / 3)))
    assert apart(module(x), expected) <= TOLERANCE


def test_local_attention_is_full_attention_within_windows() -> None:
    module, x = drawn(LocalAttention(DIM, HEADS, side=3)), image(6, 6)
    expected = plain(module, x, lambda a, b: (a[0] // 3, a[1] // 3) == (b[0] // 3, b[1] // 3))
    assert apart(module(x), expected) <= TOLERANCE


def test_reduced_attention_attends_to_a_strided_convolution_of_the_map() -> None:
    module, x = drawn(ReducedAttention(DIM, HEADS, stride=2)), image(6, 4)
    assert isinstance(module, ReducedAttention)
    assert isinstance(module.sr, nn.Conv2d)
    patches = x.reshape(2, 3, 2, 2, 2, DIM).permute(0, 1, 3, 5, 2, 4).reshape(2, 6, -1)
    assert module.sr.bias is not None
    assert module.norm is not None
    small = patches @ module.sr.weight.flatten(1).T + module.sr.bias
    k, v = module.kv(module.norm(small)).chunk(2, dim=-1)
    q = module.q(x.flatten(1, 2))
    everything = torch.ones(24, 6, dtype=torch.bool)
    out = masked(split_heads(q, HEADS), split_heads(k, HEADS), split_heads(v, HEADS), everything)
    assert apart(module(x), module.proj(join_heads(out)).reshape(x.shape)) <= TOLERANCE


def test_axial_attention_is_rows_then_columns() -> None:
    module, x = drawn(AxialAttention(DIM, HEADS)), image(4, 6)
    assert isinstance(module, AxialAttention)
    across = plain(module.rows, x, lambda a, b: a[0] == b[0])
    assert apart(module(x), plain(module.columns, across, lambda a, b: a[1] == b[1])) <= TOLERANCE


def test_criss_cross_attention_sees_its_row_and_its_column_and_itself_once() -> None:
    module, x = drawn(CrissCrossAttention(DIM, HEADS)), image(4, 6)
    expected = plain(module, x, lambda a, b: a[0] == b[0] or a[1] == b[1])
    assert apart(module(x), expected) <= TOLERANCE


@pytest.mark.parametrize("stripe", [1, 2])
def test_cross_shaped_windows_are_stripes_of_rows_and_of_columns(stripe: int) -> None:
    module, x = drawn(CrossShapedAttention(DIM, HEADS, stripe)), image(4, 6)
    assert isinstance(module, CrossShapedAttention)
    q, k, v = module.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    parts = []
    for first, heads, axis, conv in ((0, 1, 0, module.lepe[0]), (8, 2, 1, module.lepe[1])):
        mine = slice(first, first + 8 * heads)
        seen = seen_by(4, 6, lambda a, b, axis=axis: a[axis] // stripe == b[axis] // stripe)  # type: ignore[misc]
        mine_q, mine_k, mine_v = (split_heads(t[..., mine], heads) for t in (q, k, v))
        out = join_heads(masked(mine_q, mine_k, mine_v, seen))
        maps = v[..., mine].reshape(2, 4, 6, -1).permute(0, 3, 1, 2)
        # The convolution does not look beyond its stripe.
        local = torch.cat([conv(part) for part in maps.split(stripe, dim=2 + axis)], dim=2 + axis)
        parts.append(out + local.permute(0, 2, 3, 1).flatten(1, 2))
    expected = module.proj(torch.cat(parts, dim=-1)).reshape(x.shape)
    assert apart(module(x), expected) <= TOLERANCE


def test_the_last_stage_of_cross_shaped_windows_sees_the_whole_map() -> None:
    found = registry.get("cross-shaped").make(place(7, 7, stage=4))
    assert isinstance(found, CrossShapedAttention)
    assert (found.stripe, found.across) == (0, DIM)


@pytest.mark.parametrize("size", [(7, 9), (5, 8), (3, 4)])
def test_neighbours_are_the_nearest_tokens_and_as_many_everywhere(size: tuple[int, int]) -> None:
    module, x = drawn(NeighbourhoodAttention(DIM, HEADS, side=5)), image(*size)
    assert isinstance(module, NeighbourhoodAttention)

    def near(a: tuple[int, int], b: tuple[int, int]) -> bool:
        first = [max(0, min(i - 2, n - 5)) for i, n in zip(a, size, strict=True)]
        return all(f <= j < f + 5 for f, j in zip(first, b, strict=True))

    expected = plain(module, x, near, lambda dy, dx: module.table[:, (4 - dy) % 9, (4 - dx) % 9])
    assert apart(module(x), expected) <= TOLERANCE


def test_full_attention_sees_everything() -> None:
    module, x = drawn(FullMapAttention(DIM, HEADS)), image(3, 5)
    assert apart(module(x), plain(module, x, lambda a, b: True)) <= TOLERANCE


def test_deformable_attention_without_offsets_attends_to_a_grid_of_tokens() -> None:
    module: Any = drawn(registry.get("deformable").make(place(8, 8, stage=3)))
    nn.init.zeros_(module.offset.weight)
    nn.init.zeros_(module.table)
    x = image(8, 8)
    q = module.q(x.flatten(1, 2))
    # Points stand at the middle of 4x4 pieces of the square from -1 to 1, whose corners are tokens.
    axis = (torch.arange(4, dtype=torch.float64) + 0.5) * 7 / 4
    low, part = axis.floor().long(), axis - axis.floor()
    rows = x[:, low] * (1 - part)[:, None, None] + x[:, low + 1] * part[:, None, None]
    sampled = rows[:, :, low] * (1 - part)[:, None] + rows[:, :, low + 1] * part[:, None]
    k, v = module.kv(sampled.flatten(1, 2)).chunk(2, dim=-1)
    everything = torch.ones(64, 16, dtype=torch.bool)
    out = masked(split_heads(q, HEADS), split_heads(k, HEADS), split_heads(v, HEADS), everything)
    assert apart(module(x), module.proj(join_heads(out)).reshape(x.shape)) <= TOLERANCE


def test_deformable_points_follow_the_offsets_within_their_reach() -> None:
    module: Any = drawn(registry.get("deformable").make(place(8, 8, stage=3)))
    x = image(8, 8)
    still = copy.deepcopy(module)
    nn.init.zeros_(still.offset.weight)
    moved = (module.points(module.q(x)) - still.points(still.q(x))).abs()
    assert 0 < float(moved.max()) <= 2 / 3


def test_tiles_are_taken_apart_and_put_together() -> None:
    x = image(6, 8)
    assert torch.equal(from_windows(to_windows(x, 3, 2), 3, 2, 6, 8), x)
    assert torch.equal(from_grid(to_grid(x, 3, 2), 3, 2, 6, 8), x)


ALL = [name for name in registry.MIXERS]


@pytest.mark.parametrize("name", [*ALL, "bi-level-routing:gather"])
@pytest.mark.parametrize("stage", [1, 3, 4])
def test_every_mixer_keeps_the_shape_and_gives_every_weight_a_gradient(name: str, stage: int) -> None:
    kind = registry.get(name)
    for block in (0, 1):
        where = place(14, 15, dim=96, heads=3 if stage < 4 else 8, stage=stage, block=block)
        assert kind.why_not(where) == ()
        module = kind.make(where)
        x = torch.randn(2, 14, 15, 96, requires_grad=True)
        out = module(x)
        assert out.shape == x.shape
        out.square().sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        silent = [n for n, p in module.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert silent == []


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("stage", [1, 2, 4])
def test_counted_products_are_those_that_run(name: str, stage: int) -> None:
    """On a map that needs no padding, the formula is what torch's counter of operations sees."""
    where = place(14, 14, dim=96, heads=4 if stage < 4 else 8, stage=stage, block=1)
    kind = registry.get(name)
    module, x = kind.make(where).eval(), torch.randn(1, 14, 14, 96)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x)
    counted = counter.get_total_flops() / 2
    # Interpolation and means are counted here, and are no products to torch.
    assert counted <= kind.macs(where) <= 1.25 * counted


@pytest.mark.parametrize("name", ALL)
def test_the_workspace_bounds_what_a_call_writes_at_a_time(name: str) -> None:
    where = place(14, 14, dim=96, heads=4, stage=2, block=1)
    kind = registry.get(name)
    module, x = kind.make(where).eval(), torch.randn(1, 14, 14, 96)
    written = count(lambda: module(x), weights=module, item_bytes=4).written_bytes
    assert 0 < kind.workspace_bytes(where) <= 4 * written


@pytest.mark.parametrize("name", ALL)
def test_a_network_of_every_mixer_learns(name: str) -> None:
    torch.manual_seed(0)
    small = dataclasses.replace(LAYOUT, dims=(24, 48, 96, 192), depths=(1, 2, 1, 1), head_dim=8)
    model = MixerNetwork(registry.get(name), 64, 64, layout=small, num_classes=4, n_win=2)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        out = model(x)
        assert isinstance(out, Tensor)
        loss = nn.functional.cross_entropy(out, y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_the_layout_is_that_of_swin_tiny() -> None:
    found = places(224, 224)
    assert len(found) == 12
    assert [(p.height, p.dim, p.heads) for p in found if p.block == 0] == [
        (56, 96, 3),
        (28, 192, 6),
        (14, 384, 12),
        (7, 768, 24),
    ]
    swin = sum(p.numel() for p in MixerNetwork(registry.get("shifted-window")).parameters())
    assert round(swin / 1e6) == 28  # 28.3 million in its paper, with a larger merging of patches


def test_an_unknown_mixer_is_told_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"'sliding'.*shifted-window"):
        registry.get("sliding")
    with pytest.raises(UnknownNameError, match=r"'quick'.*gather"):
        registry.get("bi-level-routing:quick")


def test_a_mixer_says_where_it_cannot_stand() -> None:
    kind = registry.get("spatial-reduction")
    assert kind.why_not(place(7, 7)) == ("its keys stand for 8x8 tokens, and the map has 7x7",)
    with pytest.raises(ProblemError, match="spatial-reduction: its keys stand for 8x8 tokens"):
        kind.make(place(7, 7))


def test_every_mixer_has_the_parts_of_the_interface() -> None:
    for name in registry.names():
        assert isinstance(registry.get(name), MixerKind), name
    assert mixers.__name__ == "bratune.kernels.mixers"
