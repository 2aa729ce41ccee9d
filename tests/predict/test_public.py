"""Public measurements: what is counted, what ships, and what the fit promises."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from bratune import gpus
from bratune.kernels.accounting import ATTENTION, count
from bratune.predict.counted import KINDS, Load, load_of, loads, peer_loads
from bratune.predict.public import (
    calibration_fits,
    carried_fits,
    public_rates,
    published_figures,
    used_matrix,
)
from bratune.predict.roofline import rates


def require_timm() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")


MEASURED = ("rtx3090", "rtx4090", "rtx5090", "rtxpro6000-maxq")


# --- counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape", "kind", "macs"),
    [
        (nn.Linear(256, 512), (4, 10, 256), "gemm", 40 * 256 * 512),
        (nn.Linear(64, 512), (4, 10, 64), "gemm-narrow", 40 * 64 * 512),
        (nn.Conv2d(64, 128, 3, padding=1), (2, 64, 8, 8), "conv", 2 * 64 * 128 * 64 * 9),
        (nn.Conv2d(3, 64, 3, padding=1), (2, 3, 8, 8), "conv-narrow", 2 * 64 * 3 * 64 * 9),
        (nn.Conv2d(128, 128, 1), (2, 128, 8, 8), "pointwise", 2 * 64 * 128 * 128),
        (nn.Conv2d(32, 128, 1), (2, 32, 8, 8), "pointwise-narrow", 2 * 64 * 32 * 128),
        (nn.Conv2d(64, 64, 3, padding=1, groups=4), (2, 64, 8, 8), "grouped", 2 * 64 * 16 * 64 * 9),
        (nn.Conv2d(64, 64, 5, padding=2, groups=64), (2, 64, 8, 8), "depthwise", 2 * 64 * 64 * 25),
        (nn.LayerNorm(64), (2, 7, 64), "layer-norm", 0),
        (nn.BatchNorm2d(64), (2, 64, 8, 8), "batch-norm", 0),
        (nn.Softmax(-1), (2, 7, 64), "softmax", 0),
        (nn.GELU(), (2, 7, 64), "elementwise", 0),
        (nn.AvgPool2d(2), (2, 64, 8, 8), "pool", 0),
        (nn.ZeroPad2d(1), (2, 64, 8, 8), "copy", 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_operation_is_sorted_into_its_kind_with_its_multiply_adds(
    module: nn.Module, shape: tuple[int, ...], kind: str, macs: int
) -> None:
    module = module.to("meta").eval()
    x = torch.empty(shape, device="meta")
    found = loads(count(lambda: module(x), weights=module).by_operation)
    assert set(found) >= {kind}
    assert found[kind].macs == macs
    assert sum(load.macs for load in found.values()) == macs


def test_a_product_of_two_activations_is_batched_and_moves_both() -> None:
    a, b = torch.empty(6, 5, 7, device="meta"), torch.empty(6, 7, 3, device="meta")
    (pair,) = count(lambda: a @ b).by_operation
    assert load_of(pair) == ("batched", Load(6 * 5 * 7 * 3, 2 * 6 * (5 * 7 + 7 * 3 + 5 * 3), 1))
    assert pair.shape == (6, 5, 7, 3)


def test_fused_attention_is_one_operation_where_a_gpu_would_fuse_it() -> None:
    def attend(*shape: int) -> dict[str, tuple[int, int]]:
        q, k, v = (torch.empty(*shape, device="meta") for _ in range(3))
        attention = torch.nn.functional.scaled_dot_product_attention
        return count(lambda: attention(q, k, v), fused_attention=True).by_name

    assert attend(2, 4, 16, 8) == {ATTENTION: (1, 4 * 2 * 4 * 16 * 8 * 2)}
    # With five axes torch composes it on a GPU, too.
    assert "bmm" in attend(2, 3, 4, 16, 8)
    assert ATTENTION not in attend(2, 3, 4, 16, 8)


def test_a_peer_is_counted_with_the_multiply_adds_that_are_published() -> None:
    require_timm()
    found = peer_loads("deit_small_patch16_224", (224, 224), 4)
    assert set(found) <= set(KINDS)
    # 4.61 GMAC are published with the throughputs.
    assert sum(load.macs for load in found.values()) / 4e9 == pytest.approx(4.61, rel=0.01)
    assert found["attention"].launches == 12


# --- what ships ---------------------------------------------------------------------------------------


def test_every_shipped_fit_keeps_what_docs_promise_of_it() -> None:
    """Families held out whole: median 10 %, 90 % within 1.35x, 85 to 97 % of models in the interval."""
    fits = calibration_fits()
    assert {f["gpu"] for f in fits} == set(MEASURED)
    assert {f["regime"] for f in fits} == {"eager", "compile"}
    for f in fits:
        error = f["held_out"]
        assert error["models"] >= 500
        assert f["families"] >= 80
        assert 85 <= error["covered_pct"] <= 97
        if f["layout"] == "nchw":
            assert error["median_pct"] <= 10
            assert error["p90_factor"] <= 1.352
        assert set(f["moved"]) == set(KINDS)
        assert all(times >= 0 for times in (*f["macs"].values(), *f["moved"].values()))
        assert f["lo"] < 0 < f["hi"]


def test_a_board_that_was_held_out_is_predicted_from_the_others() -> None:
    carried = carried_fits()
    assert set(carried) == {"eager", "compile"}
    assert set(carried["eager"]["boards"]) == set(MEASURED)
    for way in carried.values():
        assert way["held_out"]["median_pct"] <= 20
        assert all(error["median_pct"] <= 25 for error in way["boards"].values())
        assert all(error["covered_pct"] >= 85 for error in way["boards"].values())


@pytest.mark.parametrize("gpu", MEASURED)
def test_rates_of_a_measured_board_reproduce_what_was_published_of_it(gpu: str) -> None:
    """Every shown figure of the board lies in the interval of its own prediction."""
    require_timm()
    board = gpus.resolve(gpu)
    figures = [f for f in published_figures() if f.gpu == gpu and f.layout == "nchw"]
    assert len(figures) >= 6
    for figure in figures:
        found = public_rates(
            board,
            rates(board, figure.dtype),
            regime=figure.regime,
            layout=figure.layout,
            amp=figure.amp,
            dtype=figure.dtype,
        )
        assert found is not None
        assert found.own
        loads_ = peer_loads(figure.model, (figure.image, figure.image), 64)
        predicted = 64e6 / sum(found.us(kind, load.macs, load.moved) for kind, load in loads_.items())
        # Half as far again as the 95 % interval: six models of hundreds that the interval was made for.
        assert 1 / 1.7 < figure.images_per_s / predicted < 1.7, figure


def test_a_board_without_measurements_is_carried_and_its_interval_is_wider() -> None:
    own_board, other = gpus.resolve("rtx4090"), gpus.resolve("a100")
    own = public_rates(own_board, rates(own_board, "float16"), amp=True, dtype="float16")
    carried = public_rates(other, rates(other, "float16"), amp=True, dtype="float16")
    assert own is not None
    assert carried is not None
    assert own.own
    assert not carried.own
    assert "carried over" in carried.basis
    assert "on this board" in own.basis
    assert "unlike theirs" in carried.basis
    assert carried.hi > own.hi
    assert carried.lo < own.lo
    # Twice the bytes take twice as long, at the bandwidth of the board.
    assert carried.moved_us("copy", 2e9) == pytest.approx(2 * carried.moved_us("copy", 1e9))


def test_without_autocast_norms_do_not_go_through_float32_and_the_interval_is_wider() -> None:
    board = gpus.resolve("rtx4090")
    peak = rates(board, "bfloat16")
    plain = public_rates(board, peak, dtype="bfloat16")
    cast = public_rates(board, peak, dtype="bfloat16", amp=True)
    assert plain is not None
    assert cast is not None
    assert plain.moved["layer-norm"] == plain.moved["elementwise"] < cast.moved["layer-norm"]
    assert plain.hi > cast.hi


def test_wider_matrix_units_are_used_less_well() -> None:
    """A GeForce is taken at its peak, a board with four times the rate per clock at half of it."""
    geforce, a100 = gpus.resolve("rtx4090"), gpus.resolve("a100")
    assert used_matrix(geforce, 165.2e12) == pytest.approx(165.2e12, rel=0.001)
    assert used_matrix(a100, 312e12) == pytest.approx(156e12, rel=0.01)


def test_nothing_public_speaks_of_a_cpu_or_of_float64() -> None:
    board = gpus.resolve("a100")
    assert public_rates(board, rates(board, "float64"), dtype="float64") is None
    cpu = gpus.GPU(key="cpu", name="CPU", architecture="CPU")
    assert public_rates(cpu, rates(board, "float32"), dtype="float32") is None


def test_published_figures_say_where_they_stand() -> None:
    for figure in published_figures():
        assert gpus.resolve(figure.gpu).key == figure.gpu
        assert "@" in figure.source
        assert figure.images_per_s > 0
        assert figure.software.startswith("torch ")
