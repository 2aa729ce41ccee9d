"""The offline cost of a fused kernel: six lower bounds of its time, from its machine code and counted work.

A kernel cannot be faster than its bytes through memory and through the last-level cache, its exponentials
through the special function units, its products through the matrix units, and its instructions through the
schedulers. The last is read off the compiled machine code, loops counted as often as they run, and is what
ranks tile sizes of the same kernel. A program also waits for loads that follow from each other, and an SM has
room for so many programs at a time. Each bound is divided by the share of its peak that good kernels reach;
the longest is the estimate. Its evidence is ``modelled``: nothing has run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bratune.errors import UnknownNameError
from bratune.gpus import GPU, resolve
from bratune.predict.compile import Launch
from bratune.predict.roofline import rates
from bratune.predict.sass import Listing
from bratune.problem import Problem, ceil_div

__all__ = [
    "BOARDS",
    "Cost",
    "Work",
    "board_of",
    "cost_of",
    "executed_instructions",
    "hub_us",
    "l1_hits",
    "sustained_mhz",
    "work_of",
]

# The board that stands for an architecture where tables are made for the architecture as a whole.
BOARDS: Mapping[str, str] = {
    "sm80": "a100",
    "sm86": "rtx3090",
    "sm89": "rtx4090",
    "sm90": "h200",
    "sm100": "b200",
    "sm120": "rtx5090",
}

# Shares of the peaks that well-made kernels reach.
_MEMORY_SHARE = 0.88
_ISSUE_SHARE = 0.65
_EXP_SHARE = 0.80
_MATRIX_SHARE = 0.60
# Of every SM, per clock.
_SCHEDULERS = 4
_EXPS_PER_CLOCK = 16
# What the L1 cache keeps at least.
_LINE_BYTES = 128
# Programs that saturate the memory, as a share of the SMs.
_FEEDING_SHARE = 0.5
# Rows of the smallest product of the matrix units.
_LEAST_ROWS = 16
# Warps on an SM that keep its schedulers and its loads going.
_HIDING_WARPS = 12
# Cycles between two instructions of a warp that has its scheduler for itself: most wait for the one before.
_CYCLES_ALONE = 4
# Cycles until a load is there. Public measurements: 572 (A100), 658 (H100) and 632 (L40) from memory; 215
# (V100), 266 (H100) and 277 (L40) from the last-level cache.
_MEMORY_CYCLES = 620
_CACHE_CYCLES = 270
# Loads of which one waits for the other: a route, then the rows it leads to.
_LOADS_IN_TURN = 2
# Operations of a multiprocessor per clock, in half types, where all boards of a compute capability have the
# same: what is published for H100 and H200 is reached at 1830 of 1980 MHz.
_MATRIX_PER_CLOCK = {"8.0": 2048, "9.0": 4096}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch of a kernel has to do, counted.

    Attributes:
        memory_bytes: The fewest bytes from and to memory: every tensor once.
        cache_bytes: Bytes between the last-level cache and the SMs, re-reads included.
        scores: Entries of score tiles that are computed, padding of the tiles included.
        products: Tile products per score: two forward, up to five backward.
        iterations: How often a program goes through its loop over tiles, on average.
        inner: How many of these are in a loop inside that loop.
    """

    memory_bytes: float
    cache_bytes: float
    scores: float
    products: int
    iterations: float
    inner: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Lower bounds of the time of one launch, in microseconds, at full rates.

    Attributes:
        memory_us: Bytes through memory.
        cache_us: Bytes through the last-level cache.
        issue_us: Instructions through the schedulers.
        exp_us: Exponentials through the special function units.
        matrix_us: Products through the matrix units.
        latency_us: Loads that a program waits for, one after the other, and programs one after the other.
        us: The estimate: the longest of the six at the rate that good kernels reach.
        bound: Which one that is: ``memory``, ``cache``, ``issue``, ``exp``, ``matrix`` or ``latency``.
    """

    memory_us: float
    cache_us: float
    issue_us: float
    exp_us: float
    matrix_us: float
    latency_us: float
    us: float
    bound: str


def board_of(architecture: str) -> GPU:
    """The board that stands for an architecture.

    Raises:
        UnknownNameError: none does.
    """
    if architecture not in BOARDS:
        raise UnknownNameError("architecture", architecture, BOARDS)
    return resolve(BOARDS[architecture])


def work_of(kind: str, problem: Problem, settings: Mapping[str, int], *, l1_hits: float = 0.0) -> Work:
    """The counted work of an attention kernel.

    Args:
        kind: One of `bratune.kernels.fused.launch.KINDS`.
        problem: The attention call.
        settings: What is compiled into the kernel: ``BLOCK_M``, ``BLOCK_N`` and, where it has them,
            ``TAIL`` and ``LAST`` (keys and queries of a last, shorter tile), ``GROUP``, ``SPLITS`` and
            ``HEADS_PER_PROGRAM``.
        l1_hits: Share of the gathered keys and values that programs of ``kv_stationary_fwd`` find in L1, see
            `l1_hits`.

    Raises:
        UnknownNameError: no kernel is of that kind.
    """
    p = problem
    block_m, block_n = settings["BLOCK_M"], settings["BLOCK_N"]
    row = p.channels * p.item_bytes
    queries, keys = p.batch * p.tokens * row, p.batch * p.kv_tokens * row
    stats = 4.0 * p.batch * p.heads * p.regions * p.region_tokens
    # Along the routes: a tile of queries of one region reads the keys of the regions it was routed to.
    query_tiles = p.batch * p.regions * ceil_div(p.region_tokens, block_m)
    key_steps = ceil_div(p.keys_per_query, block_n)
    gathered = 2.0 * query_tiles * p.keys_per_query * row
    # A product has at least 16 rows, whatever the tile.
    rows = max(block_m, _LEAST_ROWS)
    routed_scores = float(p.heads * query_tiles * rows * key_steps * block_n)
    # Against the routes: a tile of keys of one region reads the queries that were routed to it, on average.
    key_tiles = p.batch * p.kv_regions * ceil_div(p.kv_region_tokens, block_n)
    routed_queries = p.regions * p.topk * p.region_tokens / p.kv_regions
    query_steps = max(1.0, routed_queries / block_m)
    inverse_scores = p.heads * key_tiles * block_n * query_steps * block_m
    scattered = key_tiles * routed_queries * row
    # The whole map, under a mask; the last keys may have a tile of their own, behind the loop; queries too.
    tail = settings.get("TAIL", 0)
    image_steps = p.kv_tokens // block_n if tail else ceil_div(p.kv_tokens, block_n)
    image_tiles = p.batch * ceil_div(p.tokens, block_m)
    image_rows = p.tokens // block_m * block_m
    if p.tokens % block_m:
        image_rows += settings.get("LAST", block_m)
    image_scores = float(p.heads * p.batch * image_rows * (image_steps * block_n + tail))
    image_reads = 2.0 * image_tiles * p.kv_tokens * row
    # Regions of a head one after the other.
    resident_steps = ceil_div(p.regions, settings.get("SPLITS", 1)) / settings.get("GROUP", 1)

    forward = 2 * queries + 2 * keys + (stats if p.backward else 0.0)
    backward = 4 * queries + 4 * keys + stats
    table = {
        "gather_fwd": (forward, 2 * queries + gathered, routed_scores, 2, key_steps),
        "kv_stationary_fwd": (
            forward,
            2 * queries + (1.0 - l1_hits) * gathered,
            routed_scores,
            2,
            resident_steps * key_steps,
        ),
        "image_fwd": (forward, 2 * queries + image_reads, image_scores, 2, image_steps),
        "gather_dq": (
            4 * queries + 2 * keys + 2 * stats,
            4 * queries + gathered,
            routed_scores,
            3,
            key_steps,
        ),
        "gather_dkv": (
            2 * queries + 4 * keys + 2 * stats,
            4 * keys + 2 * scattered,
            inverse_scores,
            4,
            query_steps,
        ),
        "k1_bwd": (backward, 4 * keys + 4 * scattered, inverse_scores, 5, query_steps),
        "image_bwd": (backward, 2 * backward, image_scores, 5, image_steps),
    }
    if kind not in table:
        raise UnknownNameError("kind of kernel", kind, table)
    memory, cache, scores, products, iterations = table[kind]
    return Work(
        memory_bytes=memory,
        cache_bytes=cache,
        scores=scores,
        products=products,
        iterations=max(1.0, iterations),
        inner=key_steps if kind == "kv_stationary_fwd" else 1.0,
    )


def l1_hits(launch: Launch, problem: Problem, sm_count: int) -> float:
    """The share of the keys and values that a launch of ``kv_stationary_fwd`` finds in the L1 cache.

    A program reads the regions that its query regions were routed to; by chance, some of them again. Of
    those it finds as large a share as the cache holds of what the programs of an SM read, a line for
    every row of a head, which may be half of it, or of the heads that share a program. A cache that evicts
    what was used longest ago does that with reads in random order.
    """
    p, target = problem, launch.target
    regions = ceil_div(p.regions, launch.settings.get("SPLITS", 1))
    distinct = p.kv_regions * (1.0 - (1.0 - min(1.0, p.topk / p.kv_regions)) ** regions)
    again = 1.0 - distinct / (regions * p.topk)
    programs = launch.resources.resident_warps // launch.num_warps
    programs = max(1, min(programs, ceil_div(launch.programs, sm_count)))
    capacity = target.l1_kib * 1024 - programs * (launch.metadata_shared + target.smem_reserved)
    heads = launch.settings.get("HEADS_PER_PROGRAM", 1)
    row = ceil_div(heads * p.head_dim * p.item_bytes, _LINE_BYTES) * _LINE_BYTES
    read = programs * 2 * distinct * p.kv_region_tokens * row
    return float(again * min(1.0, max(0.0, capacity) / read))


def executed_instructions(listing: Listing, *, iterations: float, exps: float, inner: float = 1.0) -> float:
    """Instructions that a warp executes on its way through a kernel that loops over tiles.

    The compiler may unroll the loop. How often its body then runs is told by its exponentials: a body
    with twice those of one tile runs half as often. Loops without any are run once.

    Args:
        listing: The machine code.
        iterations: Tiles that the kernel goes through.
        exps: Exponentials of a warp for one tile.
        inner: How many of the tiles a loop inside the loop goes through.
    """
    trips = []
    working = [loop for loop in listing.loops if listing.count_in("exp", loop)]
    for loop in listing.loops:
        around = [x for x in working if x.start <= loop.start and loop.end <= x.end and x != loop]
        inside = [x for x in working if loop.start <= x.start and x.end <= loop.end and x != loop]
        turns = inner if around else iterations / inner if inside else iterations
        unrolled = max(1, round(listing.count_in("exp", loop) / exps)) if exps and not inside else 1
        trips.append(max(1.0, turns / unrolled) if loop in working else 1.0)
    return listing.count(trips)


def cost_of(launch: Launch, kind: str, problem: Problem, board: GPU) -> Cost:
    """The cost of one compiled launch of an attention kernel on a board.

    Raises:
        UsageError: no source gives one of the board's peaks.
    """
    peak = rates(board, problem.dtype)
    hits = l1_hits(launch, problem, peak.sm_count) if kind == "kv_stationary_fwd" else 0.0
    work = work_of(kind, problem, launch.settings, l1_hits=hits)
    lanes = launch.programs * launch.num_warps * launch.target.warp_size
    instructions = executed_instructions(
        launch.listing,
        iterations=work.iterations,
        exps=work.scores / lanes / work.iterations,
        inner=work.inner,
    )
    clock = 1e6 * sustained_mhz(board)
    per_clock = peak.sm_count * clock
    channels = int(launch.settings["BLOCK_D"])
    seconds = {
        "memory": work.memory_bytes / peak.memory,
        "cache": work.cache_bytes / peak.cache,
        "issue": instructions * launch.num_warps * launch.programs / (_SCHEDULERS * per_clock),
        "exp": work.scores / (_EXPS_PER_CLOCK * per_clock),
        "matrix": 2 * work.products * work.scores * channels / peak.matrix,
        "latency": _waits(launch, work.iterations, peak.sm_count) / clock,
    }
    # A grid that leaves SMs idle, or fills its last wave badly, gets less of everything.
    waves = ceil_div(launch.programs, peak.sm_count)
    busy = launch.programs / (waves * peak.sm_count)
    feeding = min(1.0, launch.programs / (_FEEDING_SHARE * peak.sm_count))
    # Too few warps on an SM cannot hide the latency of each other's instructions.
    warps = min(launch.resources.resident_warps, launch.num_warps * ceil_div(launch.programs, peak.sm_count))
    hiding = min(1.0, warps / _HIDING_WARPS)
    shares = {
        "memory": _MEMORY_SHARE * feeding,
        "cache": feeding * hiding,
        "issue": _ISSUE_SHARE * busy * hiding,
        "exp": _EXP_SHARE * busy,
        "matrix": _MATRIX_SHARE * busy,
        "latency": 1.0,
    }
    reached = {name: 1e6 * value / shares[name] for name, value in seconds.items()}
    bound = max(reached, key=lambda name: reached[name])
    return Cost(
        memory_us=1e6 * seconds["memory"],
        cache_us=1e6 * seconds["cache"],
        issue_us=1e6 * seconds["issue"],
        exp_us=1e6 * seconds["exp"],
        matrix_us=1e6 * seconds["matrix"],
        latency_us=1e6 * seconds["latency"],
        us=reached[bound],
        bound=bound,
    )


def sustained_mhz(board: GPU) -> float:
    """The clock at which matrix units are busy: that of the published peak, where it is below the highest."""
    highest = board.boost_mhz or 1.0
    per_clock = _MATRIX_PER_CLOCK.get(board.compute_capability)
    if not per_clock or not board.bf16_tensor_tflops or not board.sm_count:
        return highest
    return min(highest, 1e6 * board.bf16_tensor_tflops / (board.sm_count * per_clock))


def _waits(launch: Launch, iterations: float, sm_count: int) -> float:
    """Cycles that an SM waits for loads, the programs that it holds at a time waiting together.

    The first rows come from memory. In a loop that is not pipelined every tile waits for its own, which the
    last-level cache has, `kv_stationary_fwd` for one head after the other.
    """
    held = max(1, launch.resources.resident_warps // launch.num_warps)
    cycles: float = _LOADS_IN_TURN * _MEMORY_CYCLES
    heads = launch.settings.get("HEADS_PER_PROGRAM", 1) if "GROUP" in launch.settings else 1
    if launch.num_stages == 1:
        cycles += (_LOADS_IN_TURN + heads - 1) * _CACHE_CYCLES * max(0.0, iterations - 1)
    return ceil_div(launch.programs, held * sm_count) * cycles


def hub_us(launch: Launch, kind: str, problem: Problem, board: GPU) -> float:
    """How long one program of `gather_dkv` or `k1_bwd` runs whose key region everybody was routed to.

    Raises:
        UsageError: no source gives one of the board's peaks.
    """
    work = work_of(kind, problem, launch.settings)
    lanes = launch.programs * launch.num_warps * launch.target.warp_size
    steps = ceil_div(problem.regions * problem.region_tokens, launch.settings["BLOCK_M"])
    instructions = executed_instructions(
        launch.listing, iterations=steps, exps=work.scores / lanes / work.iterations
    )
    return _CYCLES_ALONE * instructions / sustained_mhz(board)
