"""The fused kernels compute what the reference computes, in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_cases import (
    LAYOUTS,
    NAMES,
    ROUTES,
    TOLERANCES,
    Case,
    assert_right,
    errors,
    fused,
    reference,
    sample,
    with_pairs,
)

pytest.importorskip("triton")

from bratune.errors import ConfigError
from bratune.kernels.fused.backend import TritonBackend
from bratune.kernels.fused.call import INTERPRETING, as_text, from_text
from bratune.kernels.fused.inverse import inverse_routes
from bratune.kernels.gather import GatherBackend
from bratune.kernels.packed import is_packed
from bratune.machine import Machine, detect
from bratune.problem import Problem
from bratune.testing.sanitizer import products_in_one_order

interpreter = pytest.mark.interpreter

REGIONS = (
    Case(map=(16, 16), region=(8, 8), topk=1),
    Case(map=(12, 12), region=(4, 4), topk=4),
    Case(map=(6, 6), region=(2, 2), topk=5),
    Case(map=(3, 4), region=(1, 1), topk=5),
    Case(map=(14, 14), region=(7, 7), topk=2),
    Case(map=(6, 10), region=(3, 5), topk=3),
    Case(map=(26, 21), region=(13, 21), topk=1),
    Case(map=(16, 32), region=(16, 16), topk=1),
    Case(map=(8, 12), region=(4, 4), topk=6),
    Case(batch=2, heads=2, map=(8, 8), topk=2),
)
RAGGED = tuple(
    Case(padding=padding, **shape)
    for padding in ("zeros", "masked")
    for shape in (
        {"map": (7, 8), "region": (4, 3)},
        {"map": (9, 9), "region": (8, 8), "topk": 1},
        {"map": (9, 9), "region": (8, 8), "topk": 2},
        {"map": (5, 5), "region": (8, 8), "topk": 1},
        {"map": (6, 6), "region": (3, 3), "kv_map": (7, 9), "kv_region": (2, 5)},
    )
)
KV_REGIONS = (
    Case(map=(8, 8), kv_region=(2, 2)),
    Case(map=(8, 8), kv_map=(4, 4), kv_region=(2, 2)),
    Case(map=(8, 8), kv_region=(2, 4), topk=1),
)
GATHER: dict[str, int | str] = {"forward": "gather", "backward": "gather"}
STATIONARY: dict[str, int | str] = {"forward": "stationary", "backward": "gather"}
IMAGE: dict[str, int | str] = {"forward": "image", "backward": "image"}
SETTINGS = (
    GATHER | {"fwd_block_n": 16},
    GATHER | {"fwd_block_n": 32, "fwd_block_m": 32},
    GATHER | {"fwd_block_n": 128, "fwd_heads_per_program": 2},
    GATHER | {"fwd_heads_per_program": 2, "fwd_block_n": 32, "dq_block_n": 16, "dkv_block_m": 16},
    GATHER | {"dq_block_m": 32, "dkv_block_m": 32, "dkv_block_n": 32, "dkv_chunk": 1},
    STATIONARY | {"fwd_group": 1},
    STATIONARY | {"fwd_group": 2, "fwd_splits": 3},
    STATIONARY | {"fwd_block_m": 32, "fwd_splits": 4},
    STATIONARY | {"fwd_heads_per_program": 2, "fwd_group": 2, "fwd_splits": 2},
    STATIONARY | {"fwd_heads_per_program": 2, "fwd_group": 2, "fwd_block_n": 16},
    IMAGE | {"fwd_block_m": 16, "fwd_block_n": 16, "dkv_block_n": 16, "dkv_block_m": 16},
    IMAGE | {"fwd_block_n": 32, "dkv_block_n": 32},
)


@interpreter
@pytest.mark.parametrize("case", with_pairs(*REGIONS), ids=str)
def test_every_region_and_top_k_agrees_with_the_reference(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize("case", with_pairs(*RAGGED), ids=str)
def test_maps_that_regions_do_not_tile_are_padded_as_asked(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize(
    "case",
    with_pairs(*(Case(map=(4, 8), head_dim=d, heads=2, topk=2) for d in (8, 16, 24, 48, 64, 96, 128))),
    ids=str,
)
def test_every_size_of_a_head_agrees_with_the_reference(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize(
    "case",
    with_pairs(*(Case(batch=2, map=(4, 8), heads=2, topk=2, layout=layout) for layout in LAYOUTS)),
    ids=str,
)
def test_every_memory_layout_agrees_with_the_reference(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize(
    "case", with_pairs(*(Case(batch=2, map=(8, 8), topk=2, heads=2, routes=r) for r in ROUTES)), ids=str
)
def test_every_kind_of_routes_agrees_with_the_reference(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize("case", with_pairs(*KV_REGIONS), ids=str)
def test_keys_may_have_a_map_and_regions_of_their_own(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize(
    "case",
    with_pairs(
        *(Case(dtype=d, region=r, topk=1) for d in ("float16", "bfloat16") for r in ((4, 4), (8, 12)))
    ),
    ids=str,
)
def test_half_types_agree_with_the_reference(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_settings_change_the_cost_and_not_the_result(config: dict[str, int | str]) -> None:
    assert_right(Case(map=(8, 8), heads=2, config=tuple(config.items())))


def hub(routes: str, backward: str, chunk: int, **shape: Any) -> Case:
    config = (("forward", "gather"), ("backward", backward), ("dkv_chunk", chunk))
    return Case(routes=routes, config=config, **shape)


# Lists of one to all queries, cut after every two or five entries: whole lists, lists that begin and end
# inside a stretch, and a hub of several stretches.
HUBS = (
    hub("hub", "key", 2, map=(8, 8), region=(2, 2), topk=1, head_dim=16),
    hub("hub", "gather", 5, map=(8, 8), region=(2, 2), topk=1, head_dim=16),
    hub("hub", "gather", 2, map=(12, 8), topk=3, kv_region=(2, 4), head_dim=24),
    hub("random", "gather", 2, map=(8, 8), region=(2, 2), topk=3),
    hub("half_unchosen", "key", 2, map=(8, 8), region=(2, 2), topk=1, dtype="float16"),
    hub("duplicates", "gather", 2, map=(8, 12), topk=3),
    hub("per_head", "gather", 2, map=(8, 8), topk=2, heads=2, batch=2),
    hub("hub", "key", 2, map=(7, 9), region=(2, 3), topk=1, padding="masked"),
    hub("hub", "gather", 2, map=(9, 17), region=(2, 5), topk=2, padding="zeros"),
)


@interpreter
@pytest.mark.parametrize("case", HUBS, ids=str)
def test_hubs_that_are_split_agree_with_the_reference(case: Case) -> None:
    assert_right(case)


@interpreter
def test_a_hub_that_is_split_gives_the_same_bits_twice_and_the_same_sums_unsplit() -> None:
    case = HUBS[0]
    s = sample(case)
    first, second = fused(case, s), fused(case, s)
    whole = fused(case.replace(config=(*case.config[:2], ("dkv_chunk", 0))), s)
    for name in first:
        assert torch.equal(first[name], second[name])
    assert torch.equal(first["dq"], whole["dq"])
    assert not torch.equal(first["dk"], whole["dk"]), "the order of a sum did not change: nothing was split"
    torch.testing.assert_close(first["dk"], whole["dk"])


def test_a_hub_has_one_program_per_stretch_and_one_that_adds_them_up() -> None:
    from bratune.kernels.fused.call import call_for

    p = problem(
        batch=3, height=56, width=56, kv_height=56, kv_width=56, region=(8, 8), kv_region=(8, 8), topk=1
    )
    whole, split, large = (call_for(p, as_text({"dkv_chunk": chunk}), gpu()) for chunk in (0, 8, 64))
    assert whole.grids["k1_bwd"] == (3 * 49,)
    assert "hub" not in whole.grids
    assert split.grids["k1_bwd"] == (3 * (49 + 6),)
    assert split.grids["hub"] == (3 * 6,)
    assert large.grids == whole.grids


@interpreter
@pytest.mark.parametrize("case", [Case(map=(8, 8), topk=1), Case(map=(6, 6), region=(2, 2))], ids=str)
def test_every_configuration_on_offer_is_right(case: Case) -> None:
    s = sample(case)
    true = reference(case, s)
    for config in TritonBackend().configs(case.problem, detect("cpu")):
        found = errors(fused(case.replace(config=tuple(config.items())), s), true)
        assert max(found.values()) < TOLERANCES["float32"], config


@interpreter
@pytest.mark.parametrize("case", with_pairs(Case(map=(4, 8), expanded_grad=True, topk=1)), ids=str)
def test_a_gradient_that_is_expanded_is_read_with_its_strides(case: Case) -> None:
    assert_right(case)


@interpreter
@pytest.mark.parametrize(
    "case",
    with_pairs(
        Case(magnitude=100.0),
        # A region with one real token: a query may have a tiny sum, and padding beside it.
        Case(magnitude=100.0, map=(9, 9), region=(8, 8), topk=1, padding="masked"),
    ),
    ids=str,
)
def test_scores_of_ten_thousand_stay_finite(case: Case) -> None:
    found = errors(fused(case, s := sample(case)), reference(case, s))
    # Between families, weights are known as well as float32 knows a score of ten thousand; with one-hot
    # weights the gradients of q and k are what is left of differences of equal numbers.
    assert found["out"] < 2e-6
    assert found["dv"] < 1e-2
    assert all(math.isfinite(error) for error in found.values())


@interpreter
@pytest.mark.parametrize("case", with_pairs(Case(map=(4, 8), heads=2, topk=1, layout="nchw")), ids=str)
def test_addresses_of_64_bits_are_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gather_fwd", "gather_bwd", "stationary", "image"):
        monkeypatch.setattr(f"bratune.kernels.fused.{module}.is_wide", lambda *maps: True)
    assert_right(case)


@interpreter
@pytest.mark.parametrize("case", with_pairs(Case(heads=2, routes="hub")), ids=str)
def test_two_runs_give_the_same_bits(case: Case) -> None:
    s = sample(case)
    first, second = fused(case, s), fused(case, s)
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreter
def test_the_gradients_of_packed_q_k_v_lie_in_one_tensor() -> None:
    case = Case(heads=2)
    s = sample(case)
    assert is_packed(s.q, s.k, s.v)
    found = fused(case, s)
    assert found["dq"].stride(-2) == 3 * case.problem.channels
    starts = [found[name].data_ptr() for name in ("dq", "dk", "dv")]
    size = case.problem.channels * found["dq"].element_size()
    assert [start - starts[0] for start in starts] == [0, size, 2 * size]


@interpreter
def test_without_a_gradient_no_statistics_are_kept() -> None:
    case = Case()
    s = sample(case)
    with torch.no_grad():
        out = TritonBackend().forward(s.q, s.k, s.v, s.routes, case.problem)
        lse = torch.ops.bratune.routed_attention(
            s.q, s.k, s.v, s.routes, 1, (4, 4), (4, 4), case.problem.scale, False, "", False
        )[1]
    torch.testing.assert_close(out, fused(case, s)["out"])
    assert lse.numel() == 0
    large = case.problem.replace(height=64, width=64, kv_height=64, kv_width=64, direction="fwd")
    assert TritonBackend().workspace_bytes(large) == 0


@interpreter
@pytest.mark.parametrize(
    "case",
    with_pairs(*(Case(magnitude=size, map=(4, 8), topk=topk) for size in (5.0, 20.0) for topk in (1, 2))),
    ids=str,
)
def test_large_logits_cost_the_gradient_of_values_no_digits(case: Case) -> None:
    s = sample(case)
    true = reference(case, s)
    with products_in_one_order():
        mine = errors(fused(case, s), true)
    q, k, v = (x.detach().requires_grad_() for x in (s.q, s.k, s.v))
    plain = GatherBackend().forward(q, k, v, s.routes, case.problem)
    grads = torch.autograd.grad(plain, (q, k, v), s.grad)
    assert mine["dv"] <= 4 * errors(dict(zip(NAMES, (plain, *grads), strict=True)), true)["dv"]


@interpreter
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 2, 40, 7), (2, 49, 1)], ids=str)
@pytest.mark.parametrize("kv_regions", [7, 16, 40])
def test_the_inverse_of_routes_is_a_stable_sort(shape: tuple[int, ...], kv_regions: int) -> None:
    routes = torch.randint(0, kv_regions, shape, generator=torch.Generator().manual_seed(0))
    starts, entries = inverse_routes(routes, kv_regions)
    flat = routes.reshape(-1, shape[-2] * shape[-1])
    order = torch.sort(flat, dim=-1, stable=True)
    bounds = torch.arange(kv_regions + 1).expand(len(flat), -1).contiguous()
    assert torch.equal(starts.flatten(0, 1).long(), torch.searchsorted(order.values.contiguous(), bounds))
    assert torch.equal(entries.flatten(0, 1).long(), order.indices // shape[-1])


# --- what needs no kernel to run ------------------------------------------------------------------


def problem(**changes: Any) -> Problem:
    return Case().problem.replace(**changes)


def gpu(compute_capability: str = "9.0") -> Machine:
    return Machine(
        kind="cuda", device="cuda:0", gpu_key="x", gpu_name="x", compute_capability=compute_capability
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float64"}, "found float64"),
        ({"head_dim": 160, "v_head_dim": 160}, "at most 128 channels, found 160"),
        ({"v_head_dim": 64}, "found 64 and 32"),
        ({"scale": -0.5}, "above 0, found -0.5"),
        ({"batch": 2**30}, "a smaller batch would work"),
    ],
    ids=str,
)
def test_every_obstacle_is_named(changes: dict[str, Any], reason: str) -> None:
    (found,) = TritonBackend().why_not(problem(**changes), gpu())
    assert reason in found


def test_an_ordinary_problem_on_a_gpu_has_no_obstacle() -> None:
    assert TritonBackend().why_not(problem(), gpu()) == ()
    (found,) = TritonBackend().why_not(problem(), gpu("7.5"))
    assert "8.0 or newer, found 7.5" in found


@pytest.mark.skipif(INTERPRETING, reason="the interpreter accepts a CPU")
def test_a_cpu_is_refused_with_what_would_work() -> None:
    (found,) = TritonBackend().why_not(problem(), detect("cpu"))
    assert "needs a CUDA device (or TRITON_INTERPRET=1" in found


@pytest.mark.parametrize(
    ("config", "message"),
    [({"forward": "image"}, "cannot compute"), ({"block_q": 3}, "'block_q' is not one of forward")],
    ids=str,
)
def test_a_setting_that_does_not_exist_here_is_refused(config: dict[str, Any], message: str) -> None:
    from bratune.kernels.fused.call import call_for

    large = problem(height=64, width=64, kv_height=64, kv_width=64)
    with pytest.raises(ConfigError, match=message):
        call_for(large, as_text(config), gpu())


def test_a_configuration_survives_as_text() -> None:
    config: dict[str, int | str] = {"forward": "gather", "fwd_block_m": 64}
    assert from_text(as_text(config)) == config
    assert as_text(None) == as_text({}) == ""
