"""The offline cost model counts what it says it counts."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from bratune.errors import UnknownNameError
from bratune.kernels.fused.call import call_for
from bratune.kernels.fused.launch import ARCHITECTURES, KINDS, problem_class
from bratune.predict.compile import Launch
from bratune.predict.cost import (
    BOARDS,
    board_of,
    cost_of,
    executed_instructions,
    hub_us,
    l1_hits,
    sustained_mhz,
    work_of,
)
from bratune.predict.offline import (
    attention_launches,
    depthwise_launches,
    machine_of,
    routing_launches,
)
from bratune.predict.sass import Listing, Loop
from bratune.problem import Problem, ceil_div
from bratune.studies import launch_table

STAGE_1 = Problem(
    batch=128,
    height=56,
    width=56,
    heads=2,
    head_dim=32,
    region=(8, 8),
    topk=1,
    dtype="bfloat16",
    direction="fwd-bwd",
)
STAGE_2 = STAGE_1.replace(height=28, width=28, heads=4, region=(4, 4), kv_height=28, kv_width=28, topk=4)
STAGE_2 = STAGE_2.replace(kv_region=(4, 4), scale=0.0)
TILE = {"BLOCK_M": 64, "BLOCK_N": 64}
PASS = 128 * 56 * 56 * 64 * 2  # bytes of q, k, v or the output of stage 1


def listing(*, exps: int, body: int = 10, outside: int = 6) -> Listing:
    """``outside`` instructions around a loop whose ``body`` holds ``exps`` exponentials."""
    loop = ["MUFU.EX2"] * exps + ["FADD"] * (body - exps)
    before = outside // 2
    return Listing(
        (*["MOV"] * before, *loop, *["MOV"] * (outside - before)), (Loop(before, before + body - 1),)
    )


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("gather_fwd", 4), ("gather_dq", 6), ("gather_dkv", 6), ("k1_bwd", 8), ("image_bwd", 8)],
)
def test_memory_bytes_are_every_tensor_once(kind: str, passes: int) -> None:
    stats = 4 * 128 * 2 * 56 * 56
    found = work_of(kind, STAGE_1, TILE).memory_bytes / PASS
    assert passes <= found <= passes + 2 * stats / PASS


def test_gathered_keys_are_read_again_for_every_tile_of_queries() -> None:
    whole, halves = (work_of("gather_fwd", STAGE_1, TILE | {"BLOCK_M": m}) for m in (64, 32))
    assert whole.cache_bytes == 4 * PASS
    assert halves.cache_bytes - whole.cache_bytes == 2 * PASS


def test_padding_of_tiles_counts_as_scores() -> None:
    exact = work_of("gather_fwd", STAGE_2, {"BLOCK_M": 16, "BLOCK_N": 64}).scores
    assert exact == 128 * 4 * 49 * 16 * 64
    assert work_of("gather_fwd", STAGE_2, {"BLOCK_M": 32, "BLOCK_N": 128}).scores == 4 * exact


def test_the_rest_of_a_small_map_counts_as_the_short_tiles_that_it_gets() -> None:
    sides = {"height": 14, "width": 14, "kv_height": 14, "kv_width": 14}
    small = STAGE_2.replace(**sides, region=(2, 2), kv_region=(2, 2), scale=0.0)
    config = "backward=image,dkv_block_m=64,dkv_block_n=32"
    settings = call_for(small, config, machine_of("sm90")).kernels["image_bwd"]
    assert (settings["LAST"], settings["TAIL"]) == (16, 16)
    assert work_of("image_bwd", small, settings).scores == 128 * 4 * (192 + 16) * (192 + 16)


def test_inverse_routes_bring_as_many_scores_as_routes_on_average() -> None:
    along = work_of("gather_dq", STAGE_2, {"BLOCK_M": 16, "BLOCK_N": 64})
    against = work_of("gather_dkv", STAGE_2, {"BLOCK_M": 64, "BLOCK_N": 16})
    assert along.scores == against.scores


@pytest.mark.parametrize(
    ("exps", "iterations", "expected"),
    [(4, 1, 16), (4, 8, 6 + 80), (8, 8, 6 + 40), (2, 8, 6 + 80), (0, 8, 16)],
    ids=["once", "looped", "unrolled by two", "half of the lanes empty", "no exponentials"],
)
def test_loops_count_as_often_as_their_exponentials_say(exps: int, iterations: int, expected: int) -> None:
    assert executed_instructions(listing(exps=exps), iterations=iterations, exps=4) == expected


def launch_of(target: str = "sm90", programs: int = 6272) -> Launch:
    from bratune.predict.targets import get_target

    class Stub(Launch):
        listing = listing(exps=4)
        resources = type("R", (), {"resident_warps": 32})()

    return Stub(
        kernel="k",
        target=get_target(target),
        grid=(programs, 1, 1),
        settings=TILE | {"BLOCK_D": 32},
        num_warps=4,
        num_stages=1,
        metadata_shared=0,
        asm={},
    )


def test_the_estimate_is_the_longest_bound_at_its_reachable_rate() -> None:
    board = board_of("sm90")
    assert board.memory_gbps is not None
    assert board.boost_mhz is not None
    cost = cost_of(launch_of(), "gather_fwd", STAGE_1, board)
    assert cost.bound == "memory"
    assert cost.memory_us == pytest.approx(1e6 * (4 * PASS + 4 * 128 * 2 * 3136) / (board.memory_gbps * 1e9))
    assert cost.us == pytest.approx(cost.memory_us / 0.88)
    slow = dataclasses.replace(board, boost_mhz=board.boost_mhz / 1000)
    assert cost_of(launch_of(), "gather_fwd", STAGE_1, slow).bound in ("issue", "exp")


def test_a_loop_that_is_not_pipelined_waits_for_every_tile() -> None:
    problem, board = STAGE_1.replace(topk=8, scale=0.0), board_of("sm90")
    held = 132 * 32 // 4  # programs of four warps that 132 SMs hold at a time
    plain = launch_of(programs=held)
    cost, two_waves, pipelined = (
        cost_of(x, "gather_fwd", problem, board)
        for x in (plain, launch_of(programs=held + 1), dataclasses.replace(plain, num_stages=2))
    )
    assert cost.latency_us == pytest.approx((2 * 620 + 7 * 2 * 270) / sustained_mhz(board))
    assert two_waves.latency_us == pytest.approx(2 * cost.latency_us)
    assert pipelined.latency_us == pytest.approx(2 * 620 / sustained_mhz(board))


@pytest.mark.parametrize(("architecture", "mhz"), [("sm80", 1410), ("sm86", 1695), ("sm90", 1830)])
def test_the_clock_is_that_of_the_published_peak(architecture: str, mhz: float) -> None:
    assert sustained_mhz(board_of(architecture)) == pytest.approx(mhz, rel=2e-3)


def test_a_grid_smaller_than_the_gpu_gets_a_part_of_it() -> None:
    one = STAGE_1.replace(batch=1)
    few, many = (cost_of(launch_of(programs=n), "gather_fwd", one, board_of("sm90")) for n in (13, 132))
    assert few.us > many.us


def stationary_launch(warps: int, splits: int = 1, programs: int = 512) -> Launch:
    found = launch_of(programs=programs)
    settings = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_D": 32, "GROUP": 1, "SPLITS": splits}
    changed = dataclasses.replace(found, settings=settings, metadata_shared=20 * 1024)
    changed.__dict__["resources"] = type("R", (), {"resident_warps": warps})()
    return changed


def simulated_hits(problem: Problem, launch: Launch, programs: int) -> float:
    """Hits in a cache that evicts what was used longest ago, programs taking a region in turn."""
    generator = random.Random(0)
    lines = (launch.target.l1_kib * 1024 - programs * (launch.metadata_shared + 1024)) // 128
    cache: collections.OrderedDict[tuple[int, int, int], None] = collections.OrderedDict()
    hits = reads = 0
    for _ in range(ceil_div(problem.regions, launch.settings["SPLITS"])):
        for program in range(programs):
            for region in generator.sample(range(problem.kv_regions), problem.topk):
                for row in range(2 * problem.kv_region_tokens):
                    place = (program, region, row)
                    reads += 1
                    if place in cache:
                        hits += 1
                        cache.move_to_end(place)
                    else:
                        cache[place] = None
                        if len(cache) > lines:
                            cache.popitem(last=False)
    return hits / reads


@pytest.mark.parametrize(("programs", "splits"), [(1, 1), (2, 1), (4, 1), (1, 4)])
def test_hits_in_l1_are_those_of_a_cache_that_is_simulated(programs: int, splits: int) -> None:
    launch = stationary_launch(4 * programs, splits)
    modelled = l1_hits(launch, STAGE_2, 132)
    assert modelled == pytest.approx(simulated_hits(STAGE_2, launch, programs), abs=0.08)


def test_keys_that_l1_does_not_keep_come_through_the_last_level_cache() -> None:
    settings = dict(stationary_launch(4).settings)
    gathered = 2 * 128 * 49 * 64 * 4 * 32 * 2
    all_missed, all_hit = (
        work_of("kv_stationary_fwd", STAGE_2, settings, l1_hits=share).cache_bytes for share in (0.0, 1.0)
    )
    assert all_hit == PASS  # queries and output: each half as large as those of stage 1
    assert all_missed - all_hit == gathered
    crowded, alone = (
        cost_of(stationary_launch(4 * n), "kv_stationary_fwd", STAGE_2, board_of("sm90")).cache_us
        for n in (4, 1)
    )
    assert crowded > 2 * alone


def test_unknown_kinds_and_architectures_are_named() -> None:
    with pytest.raises(UnknownNameError, match="gather_fwd"):
        work_of("route", STAGE_1, TILE)
    with pytest.raises(UnknownNameError, match="sm90"):
        board_of("gfx942")


def test_every_architecture_of_the_table_has_a_board() -> None:
    assert tuple(BOARDS) == ARCHITECTURES
    for name in BOARDS:
        assert board_of(name).sm_count


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_start_with_the_rules_and_do_not_repeat(kind: str) -> None:
    found = list(launch_table.candidates(kind, STAGE_2))
    assert found[0] == KINDS[kind](STAGE_2)
    assert len({json.dumps(x, sort_keys=True) for x in found}) == len(found)


@pytest.mark.parametrize(
    ("us", "alone_us", "regions", "expected"),
    [(100.0, 300.0, 64, 8), (100.0, 90.0, 64, 0), (30.0, 300.0, 64, 0), (100.0, 300.0, 16, 0)],
    ids=["a hub would be last", "other images take longer", "a launch costs too much", "too few regions"],
)
def test_hubs_are_split_where_that_costs_balanced_routes_nothing_much(
    us: float, alone_us: float, regions: int, expected: int
) -> None:
    side = math.isqrt(regions)
    problem = STAGE_1.replace(
        height=8 * side, width=8 * side, kv_height=8 * side, kv_width=8 * side, scale=0.0
    )
    assert launch_table.chunk_for(problem, us, alone_us) == expected


def test_a_hub_takes_one_program_as_long_as_all_of_its_steps() -> None:
    board = board_of("sm90")
    once, twice = (
        hub_us(launch_of(), "k1_bwd", STAGE_1.replace(height=56 * n, kv_height=56 * n, scale=0.0), board)
        for n in (1, 2)
    )
    assert once > 0
    assert twice > once


def test_measured_entries_survive_a_new_table(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"kind": "gather_fwd", "architecture": "sm90", "settings": {"block_m": 16}}
    measured = entry | {"class": {"regions": 1}, "evidence": "measured"}
    stale = entry | {"class": {"regions": 2}, "evidence": "modelled"}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema": 1, "entries": [measured, stale]}))
    better = {"evidence": "modelled", "settings": {"block_m": 64}}
    assert launch_table._write(path, [measured | better, stale | better]) == 2
    assert json.loads(path.read_text())["entries"] == [measured, stale | better]


def test_entries_of_another_code_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    def asked(**settings: bool) -> int:
        chosen = {"missing": False, "stale": False} | settings
        return len(launch_table._jobs("sm90", ["image_bwd"], (), path, **chosen))

    every = asked()
    kind, problem, architecture, _ = launch_table._jobs(
        "sm90", ["image_bwd"], (), path, missing=True, stale=False
    )[0]
    entry = {"kind": kind, "architecture": architecture, "class": problem_class(problem)}
    entry |= {"settings": {}, "evidence": "modelled", "code": launch_table.code_of()}
    launch_table._write(path, [entry])
    assert (every, asked(stale=True), asked(missing=True)) == (every, every - 1, every - 1)
    launch_table._write(path, [entry | {"code": "of another day"}])
    assert (asked(stale=True), asked(missing=True)) == (every, every - 1)


@pytest.mark.compile
def test_a_compiled_kernel_of_every_part_has_its_kind() -> None:
    attention = attention_launches(STAGE_1, "sm90")
    assert {"gather_fwd", "k1_bwd"} <= set(attention)
    cost = cost_of(attention["gather_fwd"], "gather_fwd", STAGE_1, board_of("sm90"))
    assert cost.bound == "memory"
    assert 0 < cost.issue_us < cost.us
    assert set(routing_launches(STAGE_1, "sm90")) == {"region_means", "route"}
    assert set(depthwise_launches((1, 7, 7, 64), 5, "bfloat16", "sm90")) == {
        "depthwise_fwd",
        "depthwise_dgrad",
        "depthwise_wgrad",
    }
