"""Point infos: roofline, plans, resolution and other models, as plain numbers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bratune.predict.fit import board_of
from bratune.record import Record
from bratune.report.infos import BASELINE, milliseconds, provenance, timed, work_of
from bratune.variant import VARIANTS

__all__ = [
    "ComplexityPoint",
    "PeerPoint",
    "PlanPoint",
    "Roof",
    "RoofPoint",
    "ScalingPoint",
    "complexity",
    "peers",
    "plan_points",
    "roofline",
    "scaling",
    "tuned_points",
]

# Names under which tuning measures the paper's S and top-k.
OUR_DEFAULTS = ("default", "paper", "published")
SIDES = (128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)


class Roof(NamedTuple):
    """The roof of one machine: peak arithmetic and bandwidth."""

    gpu: str
    tflops: float
    gb_s: float


class RoofPoint(NamedTuple):
    """One attention call under the roof: useful operations per least byte, and operations per second."""

    gpu: str
    stage: int
    backend: str
    batch: int
    intensity: float
    tflops: float
    evidence: str
    note: str


class PlanPoint(NamedTuple):
    """One setting of a whole model: latency, memory and fidelity.

    Attributes:
        divergence: How far its outputs are from those of the setting it was trained with; None where no
            weights and images were given.
        mark: ``default`` (the paper's S and top-k), ``chosen`` (the plan), or empty.
        on_front: No other setting of the same work is better in latency and memory.
    """

    work: str
    gpu: str
    setting: str
    ms: float
    memory_mb: float
    divergence: float | None
    mark: str
    on_front: bool
    evidence: str
    note: str


class ComplexityPoint(NamedTuple):
    """Multiply-adds of one attention block by the paper's formula, at one image side."""

    rule: str
    side: int
    tokens: int
    gmacs: float


class ScalingPoint(NamedTuple):
    """A time at one image side."""

    gpu: str
    model: str
    series: str
    side: int
    tokens: int
    ms: float
    lo: float
    hi: float
    evidence: str
    note: str


class PeerPoint(NamedTuple):
    """A model among others: work per image and images per second."""

    gpu: str
    model: str
    gmacs: float
    images_per_s: float
    evidence: str
    note: str


def roofline(records: Sequence[Record]) -> tuple[list[Roof], list[RoofPoint]]:
    """The roofs of the machines whose peaks are published, and the attention calls under them."""
    roofs: dict[str, Roof] = {}
    points = []
    for r in timed(records, "attention"):
        board = board_of(r)
        if board is None or board.architecture == "CPU" or not r.cell or _has_rule(r):
            continue
        peak = board.peak_tflops(r.dtype)
        if not peak or not board.memory_gbps:
            continue
        problem = r.to_cell().problem
        ms, _, _ = milliseconds(r)
        flops, moved = 2 * problem.attention_macs, problem.io_bytes
        if problem.backward:
            flops, moved = 3 * flops, int(2.5 * moved)
        roofs[f"{r.gpu_key} {r.dtype}"] = Roof(f"{r.gpu_key} {r.dtype}", peak, board.memory_gbps)
        points.append(
            RoofPoint(
                f"{r.gpu_key} {r.dtype}",
                r.stage or 0,
                r.backend,
                r.batch or 1,
                flops / moved,
                flops / ms / 1e9,
                r.evidence,
                provenance(r),
            )
        )
    return sorted(roofs.values()), sorted(points)


def plan_points(records: Sequence[Record], plan: Mapping[str, object] | None = None) -> list[PlanPoint]:
    """Whole models by S, top-k and backend: latency against peak memory, the front marked.

    Args:
        records: Any; those of whole models with a peak are used.
        plan: The contents of a plan file, whose setting is marked ``chosen``.
    """
    rows = [r for r in timed(records, "model") if r.peak_alloc_mb is not None]
    settings: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in rows:
        settings[(f"{r.model}, {work_of(r)}", r.gpu_key)].append(r)
    found = []
    for (work, gpu), group in settings.items():
        if len({(r.n_win, r.topk, r.backend) for r in group}) < 2:
            continue
        for r in group:
            ms, _, _ = milliseconds(r)
            dominated = any(
                (o.median_ms or 0) <= ms
                and (o.peak_alloc_mb or 0) <= (r.peak_alloc_mb or 0)
                and ((o.median_ms or 0) < ms or (o.peak_alloc_mb or 0) < (r.peak_alloc_mb or 0))
                for o in group
            )
            found.append(
                PlanPoint(
                    work,
                    gpu,
                    f"S {r.n_win}, top-k {r.topk}, {r.backend}",
                    ms,
                    r.peak_alloc_mb or 0.0,
                    None,
                    _mark(r, plan),
                    not dominated,
                    r.evidence,
                    provenance(r),
                )
            )
    return sorted(found, key=lambda p: (p.work, p.gpu, p.ms, p.setting))


def tuned_points(plan: Mapping[str, Any]) -> list[PlanPoint]:
    """The settings that tuning verified end to end, from a plan and the ``front`` beside it."""
    height, width = plan["resolution"]
    work = f"{plan['model']}, {height}x{width}, batch {plan['batch']}, {plan['dtype']}, {plan['direction']}"
    found = []
    for row in plan["front"]:
        name = str(row.get("name") or "")
        mark = "chosen" if row["picked"] else "default" if name in OUR_DEFAULTS else ""
        found.append(
            PlanPoint(
                work,
                plan["machine"]["gpu_key"],
                row["setting"],
                row["ms"],
                row.get("peak_alloc_mb") or 0.0,
                row.get("divergence"),
                mark,
                bool(row["front"]),
                plan["measured"],
                ", ".join(filter(None, (name, plan["measured"], f"accuracy: {row['evidence']}"))),
            )
        )
    return sorted(found, key=lambda p: (p.ms, p.setting))


def _mark(record: Record, plan: Mapping[str, object] | None) -> str:
    if plan is not None and _is_plan(record, plan):
        return "chosen"
    variant = VARIANTS.get(record.model)
    published = variant is not None and record.topk == ",".join(map(str, variant.topks))
    same_backend = set(record.backend.split(",")) == {BASELINE}
    return "default" if published and same_backend else ""


def _is_plan(record: Record, plan: Mapping[str, object]) -> bool:
    stages = plan.get("stages")
    if not isinstance(stages, list) or plan.get("model") != record.model:
        return False
    topks = ",".join(str(s.get("topk")) for s in stages)
    routed = [str(s.get("backend")) for s in stages if s.get("kind") == "routed"]
    names = record.backend.split(",")
    names = names * len(routed) if len(names) == 1 else names
    return topks == record.topk and names[: len(routed)] == routed


def complexity(channels: int = 64, topk: int = 1, sides: Sequence[int] = SIDES) -> list[ComplexityPoint]:
    """Multiply-adds of one stage-1 block over image side, by the paper's formula.

    ``3 N C^2 + 2 S^4 C + 2 k N^2 C / S^2`` with N tokens (BiFormer, arXiv 2303.08810, eq. 7), for S fixed at
    7, for S that minimises it, ``(k N^2 / 2)^(1/6)``, which grows as ``N^(1/3)``, and for dense attention
    (``2 N^2 C`` instead of the last two terms).
    """
    found = []
    for side in sides:
        tokens = (side // 4) ** 2
        best = (topk * tokens**2 / 2) ** (1 / 6)
        linear = 3 * tokens * channels**2
        rules = {
            "S = 7": 2 * 7**4 * channels + 2 * topk * tokens**2 * channels / 7**2,
            "S ~ N^(1/3)": 2 * best**4 * channels + 2 * topk * tokens**2 * channels / best**2,
            "dense": 2 * tokens**2 * channels,
        }
        found += [ComplexityPoint(r, side, tokens, (linear + macs) / 1e9) for r, macs in rules.items()]
    return found


def scaling(records: Sequence[Record]) -> list[ScalingPoint]:
    """Attention time of one block of stage 1 over image side, where a series has three sides or more."""
    groups: dict[tuple[str, str, str], list[ScalingPoint]] = defaultdict(list)
    for r in timed(records, "attention"):
        if r.stage != 1 or not r.image_height or r.image_height != r.image_width:
            continue
        ms, lo, hi = milliseconds(r)
        rule = _window_rule(r)
        series = f"{r.backend if rule in ('', r.backend) else f'{r.backend}, {rule}'}, batch {r.batch}"
        point = ScalingPoint(
            r.gpu_key,
            r.model,
            series,
            r.image_height,
            (r.height or 0) * (r.width or 0),
            ms,
            lo,
            hi,
            r.evidence,
            provenance(r),
        )
        groups[(r.gpu_key, r.model, series)].append(point)
    return sorted(p for points in groups.values() if len({p.side for p in points}) >= 3 for p in points)


def _has_rule(record: Record) -> bool:
    """Whether the record belongs to a sweep over resolution, which has a figure of its own."""
    return bool(_extra(record).get("window_rule"))


def _window_rule(record: Record) -> str:
    """How S was chosen: ``S = 7``, or that it grows with the image."""
    return str(_extra(record).get("window_rule") or f"S = {record.n_win}")


def _extra(record: Record) -> dict[str, object]:
    extra = json.loads(record.cell).get("extra", "{}") if record.cell else "{}"
    return dict(json.loads(extra))


def peers(records: Sequence[Record], gmacs: Mapping[str, float]) -> list[PeerPoint]:
    """The best throughput of every model whose work per image is known, on its machine.

    Args:
        records: Any; those of whole models are used.
        gmacs: Multiply-adds per image in 10^9, by model; BiFormer's are known, and what was counted while a
            model was measured stands in its record.
    """
    known = {name: v.gmacs_224 for name, v in VARIANTS.items()} | dict(gmacs)
    best: dict[tuple[str, str, str], PeerPoint] = {}
    for r in timed(records, "model"):
        ms, batch = milliseconds(r)[0], r.batch or 1
        rate = 1e3 * batch / ms
        work = known.get(r.model) or (r.tflops_s or 0.0) * ms / batch / 2
        if not work:
            continue
        key = (r.gpu_key, r.model, r.evidence)
        if key not in best or rate > best[key].images_per_s:
            note = f"{work_of(r)}, {provenance(r)}"
            best[key] = PeerPoint(r.gpu_key, r.model, work, rate, r.evidence, note)
    return sorted(best.values())
