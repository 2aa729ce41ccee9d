"""The tables of a profile: backends by stage, the parts of a block beside the block, whole models.

Made from records alone, so that stored rows give the same tables as a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bratune.cell import PARTS
from bratune.record import Record
from bratune.report.answer import name_of
from bratune.report.tables import Note, Row, Table, to_markdown, to_text
from bratune.run.summary import UNSETTLED_PCT, best_attention, differ, group, residual

__all__ = ["profile_markdown", "profile_text", "scene_tables", "scene_title"]

DASH = "-"
FOOTNOTE = (
    "* fastest of its stage   (..x) intervals overlap: no difference shown\n"
    "alloc MB: most memory that the call allocated on top of its inputs   ±95 %: interval of the median"
)
# What `throttle_reasons` names, where its name says too little.
HELD_BACK_BY = {"cpu_steal": "cpu_steal (the host ran others on these processors)"}
MODELLED_FOOTNOTE = "x/÷ F: modelled; the time is expected between 1/F of that number and F times it"


def profile_text(records: Sequence[Record]) -> str:
    """Every scene of some records as aligned text, at most a hundred characters wide."""
    blocks = [_scene_block(rows, to_text) for rows in group(records)]
    foot = [FOOTNOTE]
    if any(row.evidence == "modelled" for row in records):
        foot.append(MODELLED_FOOTNOTE)
    held_back = _held_back(records)
    if held_back:
        foot.append(held_back)
    return "\n\n".join([*blocks, "\n".join(foot)]) if blocks else "no rows"


def _held_back(records: Sequence[Record]) -> str:
    """How many times were taken while something held the machine back, and what; empty for none."""
    timed = [row for row in records if row.median_ms is not None]
    slowed = [row for row in timed if row.throttle_reasons]
    if not slowed:
        return ""
    reasons = sorted({reason for row in slowed for reason in row.throttle_reasons.split(",")})
    named = ", ".join(HELD_BACK_BY.get(reason, reason) for reason in reasons)
    return f"{len(slowed)} of {len(timed)} times taken while held back by: {named}"


def profile_markdown(records: Sequence[Record]) -> str:
    """Every scene of some records as Markdown."""
    return "\n\n".join(_scene_block(rows, to_markdown) for rows in group(records))


def _scene_block(rows: Sequence[Record], render: Callable[[Table], str]) -> str:
    tables = [render(table) for table in scene_tables(rows)]
    return "\n\n".join([scene_title(rows[0]), *tables])


def scene_title(row: Record) -> str:
    """What the rows of a scene have in common, in one line."""
    batch = f"batch {row.batch}"
    cache = f"{row.l2} {'L2' if row.compute_capability else 'cache'}"
    precision = f"amp {row.dtype}" if row.amp else row.dtype
    image = f"{row.image_height}x{row.image_width}"
    words = [row.model, row.task, image, batch, precision, row.direction, cache, row.regime]
    if row.layout == "nhwc":
        words.append("channels-last")
    if row.evidence != "measured":
        words.append(f"{row.evidence}, not measured")
    return " · ".join(word for word in words if word)


def scene_tables(rows: Sequence[Record]) -> list[Table]:
    """The tables of one scene: those that have rows."""
    tables = [_attention_table(rows), _parts_table(rows), _model_table(rows)]
    return [table for table in tables if table.rows]


# --- attention by backend ----------------------------------------------------------------------------


def _attention_table(rows: Sequence[Record]) -> Table:
    # In the order of the model: what is measured first is where most can be gained.
    attention = sorted((row for row in rows if row.part == "attention"), key=lambda row: row.stage or 0)
    kinds = {row.route_distribution for row in attention}
    floors = any(row.roofline_pct is not None for row in attention)
    memory = any(row.workspace_mb is not None for row in attention)
    columns = ["<stage", "<map", "<regions", "top-k", "keys/query", "<backend"]
    columns += ["<routes"] if len(kinds) > 1 else []
    columns += ["median ms", "±95 %", "vs gather"]
    columns += ["alloc MB"] if memory else []
    columns += ["of floor"] if floors else []
    found: list[Row] = []
    last: tuple[object, ...] = ()
    for row in attention:
        here = (row.stage, row.route_distribution)
        start = _stage_cells(row) if here != last else ("",) * 5
        last = here
        best = best_attention(rows, row.stage or 0)
        mark = "*" if best is not None and best == row else " "
        who = (
            *start,
            f"{row.backend} {mark}".rstrip(),
            *((row.route_distribution,) if len(kinds) > 1 else ()),
        )
        if row.median_ms is None:
            found.append(Note(who, _why(row)))
            continue
        peak = (_megabytes(row.workspace_mb),) if memory else ()
        floor = (_percent(row.roofline_pct),) if floors else ()
        found.append((*who, _ms(row.median_ms), _spread(row), _speedup(row, attention), *peak, *floor))
    return Table(
        tuple(columns),
        tuple(found),
        title="attention of one block, by backend; regions: how many (tokens in each)",
    )


def _stage_cells(row: Record) -> tuple[str, ...]:
    stage = f"{row.stage} x{row.block_count}"
    rh, rw = (int(side) for side in row.region.split("x"))
    height, width = row.height or 0, row.width or 0
    if row.topk.startswith("-"):
        return stage, f"{height}x{width}", "whole map", "all", str(height * width)
    grid = -(-height // rh), -(-width // rw)
    regions = f"{grid[0]}x{grid[1]} ({rh * rw})"
    return (
        stage,
        f"{height}x{width}",
        regions,
        f"{row.topk}/{grid[0] * grid[1]}",
        str(int(row.topk) * rh * rw),
    )


def _why(row: Record) -> str:
    word = {"unsupported": "not here", "incorrect": "WRONG RESULT, not timed"}.get(row.outcome, row.outcome)
    return f"{word}: {row.reason}"


# --- the parts of a block ----------------------------------------------------------------------------


def _parts_table(rows: Sequence[Record]) -> Table:
    found = {stage: residual(rows, stage) for stage in sorted({r.stage for r in rows if r.stage})}
    known = {stage: r for stage, r in found.items() if r is not None}
    parts = [p for p in PARTS if any(p in r.parts_ms for r in known.values())]
    cells: list[Row] = []
    for stage, r in known.items():
        times = [_ms(r.parts_ms.get(part)) + "~" * (part in r.unsettled) for part in parts]
        block = _ms(r.block_ms) + "~" * ("block" in r.unsettled)
        cells.append((str(stage), *times, _ms(r.sum_ms), block, f"{100 * r.relative:+.1f} %"))
    title = "one block with its fastest backend, median ms: its parts, their sum, the block as a whole"
    if any(r.unsettled for r in known.values()):
        title += f"\n~ did not settle: half its interval is more than {UNSETTLED_PCT:.0f} %"
    return Table(("stage", *parts, "sum", "block", "residual"), tuple(cells), title=title)


# --- whole models ------------------------------------------------------------------------------------


def _model_table(rows: Sequence[Record]) -> Table:
    models = [row for row in rows if row.part == "model"]
    launch = any(row.launch_bound is not None for row in models)
    columns = ["<whole model", "images/s", "median ms", "±95 %", "vs gather", "peak MB"]
    columns += ["<launch-bound"] if launch else []
    found: list[Row] = []
    for row in models:
        who = name_of(row)
        if row.median_ms is None:
            found.append(Note((who,), _why(row)))
            continue
        rate = f"{row.images_per_s:.1f}" if row.images_per_s is not None else DASH
        bound = ({True: "yes", False: "no", None: DASH}[row.launch_bound],) if launch else ()
        numbers = (
            rate,
            _ms(row.median_ms),
            _spread(row),
            _speedup(row, models),
            _megabytes(row.peak_alloc_mb),
        )
        found.append((who, *numbers, *bound))
    return Table(tuple(columns), tuple(found))


# --- cells -------------------------------------------------------------------------------------------


def _ms(value: float | None) -> str:
    """Three significant digits at least, never more than three decimals."""
    if value is None:
        return DASH
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _spread(row: Record) -> str:
    """Half the interval of the median in percent of it; one sample has none, a model's is a factor."""
    if row.n_samples == 1:
        return "1 sample"
    if row.evidence == "modelled" and row.ci_lo_ms and row.ci_hi_ms:
        return f"x/÷ {math.sqrt(row.ci_hi_ms / row.ci_lo_ms):.1f}"
    if row.noise_pct is not None:
        return f"±{row.noise_pct:.1f} %"
    if not row.median_ms or row.ci_lo_ms is None or row.ci_hi_ms is None:
        return DASH
    return f"±{100 * (row.ci_hi_ms - row.ci_lo_ms) / 2 / row.median_ms:.0f} %"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.0f} %"


def _megabytes(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _speedup(row: Record, rows: Sequence[Record]) -> str:
    """Relative to the baseline: ``2.1x``, in parentheses where nothing is shown.

    That is where the interval of a ratio within rounds holds 1, or where intervals of medians overlap.
    """
    if row.ratio is not None and row.ratio_lo and row.ratio_hi:
        text = f"{row.ratio:.2f}x"
        return f"({text})" if row.ratio_lo <= 1 <= row.ratio_hi else text
    base = next(
        (
            r
            for r in rows
            if r.stage == row.stage
            and r.route_distribution == row.route_distribution
            and set(r.backend.split(",")) == {row.baseline}
            and r.median_ms is not None
        ),
        None,
    )
    if row.speedup is None or base is None:
        return DASH
    text = f"{row.speedup:.2f}x"
    return text if base == row or differ(base, row) else f"({text})"
