"""Synthetic worlds: cost tables with a known truth, to judge searches by.

A world is an engine and a fidelity source without a device: times follow a roofline with irregularities of
each option, whole models add terms that no sum of stages has, every measurement carries noise, and the
divergence grows with the distance from the reference. Its records are ``modelled``, never ``measured``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.tune.evidence import measured_top1
from bratune.tune.fidelity_source import Fidelity
from bratune.tune.lost_accuracy import ALLOWED_LOSS, CONFIDENCE, Counts, change_interval
from bratune.tune.setting import Setting
from bratune.tune.space import Space
from bratune.variant import get_variant

__all__ = ["BACKENDS", "SyntheticFidelity", "SyntheticWorld", "offers"]

MACHINE = Machine(
    kind="cuda",
    device="cuda:0",
    gpu_key="synthetic",
    gpu_name="synthetic board",
    compute_capability="9.0",
    sm_count=132,
    memory_gib=80.0,
)
# name -> (launch us, share of peak arithmetic, share of peak bandwidth, copies of gathered keys, of scores)
BACKENDS = {
    "gather": (60.0, 0.25, 0.6, 2.0, 3.0),
    "gather-sdpa": (40.0, 0.45, 0.7, 2.0, 0.0),
    "dense": (25.0, 0.5, 0.8, 0.0, 0.5),
    "triton": (20.0, 0.35, 0.8, 0.0, 0.0),
}
PEAK_TFLOPS, PEAK_GBPS = 400.0, 3000.0


def offers(problem: Problem) -> Sequence[tuple[str, tuple[str, ...]]]:
    """Every backend of the world accepts everything; ``triton`` has three settings."""
    return [
        (name, ("{}", '{"block":64}', '{"block":128}') if name == "triton" else ("{}",)) for name in BACKENDS
    ]


def _unit(*parts: object) -> float:
    """A number in [0, 1) that follows from its arguments."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass
class SyntheticWorld:
    """An `bratune.engine.Engine` whose truth is known.

    Args:
        seed: Which world.
        irregularity: Relative spread of an option's cost around the roofline.
        coupling: Relative size of what whole models cost beyond the sum of their stages.
        noise: Relative standard deviation of a measurement.
        equal: Every option costs the same: there is nothing to gain.
        memory_gb: Cells that need more are out of memory.
    """

    seed: int = 0
    irregularity: float = 0.1
    coupling: float = 0.05
    noise: float = 0.01
    equal: bool = False
    memory_gb: float = 80.0

    slots = passes = 1
    turns = False

    def __post_init__(self) -> None:
        self._draws = random.Random(self.seed)
        self.measured: list[Cell] = []

    @property
    def machine(self) -> Machine:
        """The board that does not exist."""
        return MACHINE

    def block_ms(self, model: str, problem: Problem, backend: str, config: str = "{}") -> float:
        """True time of one block."""
        if self.equal:
            return 1.0
        launch_us, arithmetic, bandwidth, copies, scores = BACKENDS[backend]
        ratio = get_variant(model).mlp_ratio
        linear = 2 * problem.batch * problem.tokens * problem.channels**2 * (4 + 2 * ratio)
        attention = 2 * problem.attention_macs
        if backend == "dense":  # computes every pair and masks
            attention = attention * problem.kv_regions // problem.topk
        moved = 12 * problem.io_bytes + copies * problem.gathered_bytes + 2 * scores * problem.score_bytes
        seconds = linear / (0.6e12 * PEAK_TFLOPS) + max(
            attention / (arithmetic * 1e12 * PEAK_TFLOPS), moved / (bandwidth * 1e9 * PEAK_GBPS)
        )
        own = _unit(self.seed, problem.region, problem.topk, problem.height, backend, config)
        return (1e3 * seconds + 1e-3 * launch_us) * (1 + self.irregularity * (2 * own - 1))

    def peak_mb(self, problem: Problem, backend: str) -> float:
        """True peak memory of one block."""
        _, _, _, copies, scores = BACKENDS[backend]
        extra = copies * problem.gathered_bytes + scores * problem.score_bytes
        return (6 * problem.io_bytes + extra) / 2**20

    def model_ms(self, space: Space, setting: Setting) -> float:
        """True time of a whole model."""
        total = 0.0
        for i in space.routed:
            problem = space.stage(i, setting.n_win[i], setting.topks[i]).problem
            assert problem is not None
            blocks = space.variant.depths[i]
            total += blocks * self.block_ms(space.model, problem, setting.backends[i], setting.configs[i])
        if self.equal:
            return total
        # Changes of backend between stages, and an interplay of all choices, that no stage shows.
        names = [setting.backends[i] for i in space.routed]
        changes = sum(a != b for a, b in itertools.pairwise(names)) / max(len(names) - 1, 1)
        own = _unit(self.seed, setting.key)
        return total * (1 + self.coupling * (changes + 2 * own - 1)) + 0.2

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One ``modelled`` record per cell; out of memory where the board has too little."""
        for cell in cells:
            self.measured.append(cell)
            yield self._record(cell)

    def in_turn(
        self,
        cells: Sequence[Cell],
        base: Cell,
        passes: int,
        *,
        enough: Callable[[int], bool] = lambda made: False,
        about: str = "",
    ) -> dict[Cell, list[Record]]:
        """See `bratune.engine.ComparingEngine.in_turn`."""
        rows: dict[Cell, list[Record]] = {cell: [] for cell in cells}
        for number in range(1, passes + 1):
            if enough(number - 1):
                break
            found = dict(zip(cells, self.run(cells), strict=True))
            base_ms = found[base].median_ms
            for cell, row in found.items():
                ratio = base_ms / row.median_ms if base_ms and row.median_ms else None
                rows[cell].append(row.replace(pass_number=number, passes=passes, ratio=ratio))
        return rows

    def _record(self, cell: Cell) -> Record:
        if cell.part == "model":
            space, setting = _setting_of(cell)
            ms = self.model_ms(space, setting)
            peaks = [
                self.peak_mb(problem, setting.backends[i])
                for i in space.routed
                if (problem := space.stage(i, setting.n_win[i], setting.topks[i]).problem)
            ]
            peak = max(peaks)
        else:
            ms = self.block_ms(cell.model, cell.problem, cell.backend, cell.config)
            peak = self.peak_mb(cell.problem, cell.backend)
        if peak > self.memory_gb * 1024:
            reason = f"CUDA out of memory: {peak:.0f} MiB of {self.memory_gb * 1024:.0f}"
            return Record.of(cell, self.machine, evidence="modelled", outcome="oom", reason=reason)
        seen = ms * math.exp(self._draws.gauss(0.0, self.noise))
        return Record.of(
            cell,
            self.machine,
            evidence="modelled",
            outcome="modelled",
            median_ms=seen,
            ci_lo_ms=seen * (1 - 2 * self.noise),
            ci_hi_ms=seen * (1 + 2 * self.noise),
            n_samples=30,
            peak_alloc_mb=peak,
            images_per_s=1e3 * cell.problem.batch / seen,
        )


def _setting_of(cell: Cell) -> tuple[Space, Setting]:
    """Model, resolution and setting that a ``model`` cell stands for."""
    per_stage = len(set(cell.n_win.split(","))) > 1
    space = Space(
        model=cell.model,
        height=cell.image[0],
        width=cell.image[1],
        batch=cell.problem.batch,
        dtype=cell.problem.dtype,
        direction=cell.problem.direction,
        per_stage=per_stage,
    )
    configs = ["{}"] * len(space.variant.dims)
    for stage, config in cell.settings.items():
        configs[int(stage) - 1] = json.dumps(config)
    sides = [max(int(s), 1) for s in cell.n_win.split(",")]
    backend = cell.backend or "gather"  # what the published form runs
    names = backend.split(",") if "," in backend else backend
    setting = space.setting(sides, [int(k) for k in cell.topk.split(",")], names, configs)
    return space, setting


@dataclass
class SyntheticFidelity:
    """A `bratune.tune.fidelity_source.FidelitySource` whose truth is known.

    Args:
        space: Model and resolution.
        reference: Where the divergence is 0.
        seed: Which world.
        coupling: Relative size of what the joint divergence adds to the sum of stages.
    """

    space: Space
    reference: Setting
    seed: int = 0
    coupling: float = 0.05

    @property
    def key(self) -> str:
        """Equal for equal worlds."""
        return f"synthetic-{self.seed}"

    @property
    def limits(self) -> dict[str, float]:
        """Loss of top-1 that each rule accepts at most."""
        return dict(ALLOWED_LOSS)

    def stage_loss(self, index: int, n_win: int, topk: int) -> float:
        """Grows with the logarithm of keys lost and of region size changed; the reference has 0."""
        own = self.space.stage(index, self.reference.n_win[index], self.reference.topks[index]).problem
        new = self.space.stage(index, n_win, topk).problem
        assert own is not None
        assert new is not None
        keys = abs(math.log2(new.keys_per_query / own.keys_per_query))
        side = abs(math.log2(new.region_tokens / own.region_tokens))
        weight = 0.5 + _unit(self.seed, "weight", index)
        spread = 0.7 + 0.6 * _unit(self.seed, index, n_win, topk)
        return float(0.01 * weight * spread * (keys**1.5 + 0.5 * side))

    def loss(self, setting: Setting) -> float:
        """The sum of stages with an interplay that no stage shows."""
        total = sum(self.stage_loss(i, setting.n_win[i], setting.topks[i]) for i in self.space.routed)
        own = _unit(self.seed, self.space.model_key(setting))
        return total * (1 + self.coupling * (2 * own - 1))

    def infidelity(self, setting: Setting) -> float:
        """``1 - exp(-loss)``: 0 for the reference, below 1."""
        return 1.0 - math.exp(-self.loss(setting))

    def joint(self, setting: Setting) -> Fidelity:
        """The loss, with the evidence that a hundred thousand labelled pictures would give."""
        loss = self.loss(setting)
        images = 100_000
        agree = round(images * math.exp(-loss))
        # Of two pictures that are answered otherwise, one more is lost than gained in a hundred.
        lost = round((images - agree) * 0.505)
        gained = images - agree - lost
        counts = Counts(images=images, differ=images - agree, lost=lost, gained=gained)
        change = (gained - lost) / images
        evidence = measured_top1(
            images=images,
            change=change,
            interval=change_interval(gained, lost, images),
            top1=0.8 + change,
            most_lost=counts.most_lost(),
            confidence=CONFIDENCE,
        )
        evidence.values["counts"] = dataclasses.asdict(counts)
        return Fidelity(loss=loss, evidence=evidence)
