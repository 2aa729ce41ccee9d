"""The tables of a profile: backends by stage, the parts of a block beside the block, whole models.

Made from records alone, so that stored rows give the same tables as a run.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence

from bratune.cell import PARTS
from bratune.measure.verdict import MARGIN, Verdict
from bratune.record import Record
from bratune.report.answer import base_of, model_verdicts, name_of
from bratune.run.summary import (
    UNSETTLED_PCT,
    best_attention,
    differ,
    group,
    is_base,
    judged,
    residual,
)
from bratune.tables import WIDTH, Note, Row, Table, to_markdown, to_text

__all__ = ["MIXER_TITLES", "profile_markdown", "profile_text", "scene_tables", "scene_title"]

DASH = "-"
FOOTNOTE = "* fastest of its stage   alloc MB: most memory that the call allocated on top of its inputs"
ONE_PROCESS = (
    "(..x) intervals overlap: no difference shown   ±95 %: interval of the median within one process"
)
# What `throttle_reasons` names, where its name says too little.
HELD_BACK_BY = {"cpu_steal": "cpu_steal (the host ran others on these processors)"}
MODELLED_FOOTNOTE = "x/÷ F: modelled; the time is expected between 1/F of that number and F times it"
# An interval over more orders of magnitude than this says nothing.
_OPEN = 100.0
WORDS_OF_VERDICTS = (
    f"FASTER, SLOWER: beyond noise and {100 * MARGIN:g} %, corrected for all ratios of a table; SAME: within "
    f"{100 * MARGIN:g} %; UNDECIDED: not shown."
)
# Of a part of mixers' cells, what is timed.
MIXER_TITLES = {
    "mixer": "attentions of two blocks, projections included (xN: such pairs in the model)",
    "block": "two blocks: attentions and MLPs",
}
OUTCOME_WORDS = {"unsupported": "not here", "incorrect": "WRONG RESULT, not timed"}


def profile_text(records: Sequence[Record], passes: Sequence[Record] = ()) -> str:
    """Every scene of some records as aligned text, at most a hundred characters wide.

    Args:
        records: Pooled over their passes.
        passes: Rows of single passes; what ratios and verdicts rest on.
    """
    blocks = [_scene_block(rows, passes, to_text) for rows in group(records)]
    return "\n\n".join([*blocks, "\n".join(_footnotes(records))]) if blocks else "no rows"


def _footnotes(records: Sequence[Record]) -> list[str]:
    """What is said once, below all tables."""
    foot = [FOOTNOTE]
    known = _how_well_known(records)
    foot += textwrap.wrap(known, WIDTH) if known else [ONE_PROCESS]
    if any(row.evidence == "modelled" for row in records):
        foot.append(MODELLED_FOOTNOTE)
    held_back = _held_back(records)
    return [*foot, held_back] if held_back else foot


def _how_well_known(records: Sequence[Record]) -> str:
    """How well times and ratios are known, for all rows of several passes; empty where there are none."""
    rows = [row for row in records if row.ok and (row.passes or 1) > 1 and row.noise_pct is not None]
    if not rows:
        return ""
    counts = sorted({row.passes or 1 for row in rows})
    passes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    widths = {
        kind: statistics.median(row.noise_pct or 0.0 for row in rows if row.part == kind)
        for kind in ("attention", "mixer", "model")
        if any(row.part == kind for row in rows)
    } or {"all": statistics.median(row.noise_pct or 0.0 for row in rows)}
    known = ", ".join(f"±{width:.0f} % ({kind})" for kind, width in widths.items())
    return (
        f"{passes} passes, each a fresh process: times are known to {known}, ratios as their 95 % intervals "
        f"say: they are taken in turn, within rounds. {WORDS_OF_VERDICTS} More --passes narrow both."
    )


def _held_back(records: Sequence[Record]) -> str:
    """How many times were taken while something held the machine back, and what; empty for none."""
    timed = [row for row in records if row.median_ms is not None]
    slowed = [row for row in timed if row.throttle_reasons]
    if not slowed:
        return ""
    reasons = sorted({reason for row in slowed for reason in row.throttle_reasons.split(",")})
    named = ", ".join(HELD_BACK_BY.get(reason, reason) for reason in reasons)
    return f"{len(slowed)} of {len(timed)} times taken while held back by: {named}"


def profile_markdown(records: Sequence[Record], passes: Sequence[Record] = ()) -> str:
    """Every scene of some records as Markdown; see `profile_text`."""
    blocks = [_scene_block(rows, passes, to_markdown) for rows in group(records)]
    known = _how_well_known(records)
    return "\n\n".join([*blocks, known] if known else blocks)


def _scene_block(rows: Sequence[Record], passes: Sequence[Record], render: Callable[[Table], str]) -> str:
    tables = [render(table) for table in scene_tables(rows, passes)]
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


def scene_tables(rows: Sequence[Record], passes: Sequence[Record] = ()) -> list[Table]:
    """The tables of one scene: those that have rows; see `profile_text`."""
    mixed = [row for row in rows if row.form == "mixer"]
    rows = [row for row in rows if row.form != "mixer"]
    tables = [_attention_table(rows, passes), _parts_table(rows), _model_table(rows, passes)]
    tables += [_mixer_table(mixed, passes, part) for part in MIXER_TITLES] + [_model_table(mixed, passes)]
    return [table for table in tables if table.rows]


# --- attention by backend ----------------------------------------------------------------------------


def _attention_table(rows: Sequence[Record], passes: Sequence[Record]) -> Table:
    # In the order of the model: what is measured first is where most can be gained.
    attention = sorted((row for row in rows if row.part == "attention"), key=lambda row: row.stage or 0)
    verdicts = _attention_verdicts(attention, passes)
    everywhere = _reasons_everywhere(attention)
    kinds = {row.route_distribution for row in attention}
    floors = any(row.roofline_pct is not None for row in attention)
    memory = any(row.workspace_mb is not None for row in attention)
    columns = ["<stage", "<map", "<regions", "top-k", "keys", "<backend"]
    columns += ["<routes"] if len(kinds) > 1 else []
    columns += ["median ms", *_ratio_columns("gather", judged=bool(verdicts))]
    columns += ["alloc MB"] if memory else []
    columns += ["of floor"] if floors else []
    found: list[Row] = []
    last: tuple[object, ...] = ()
    for row in attention:
        if row.backend in everywhere:
            continue
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
        ratio = _ratio_cells(row, attention, verdicts, is_base(row))
        peak = (_megabytes(row.workspace_mb),) if memory else ()
        floor = (_percent(row.roofline_pct),) if floors else ()
        found.append((*who, _ms(row.median_ms), *ratio, *peak, *floor))
    return Table(
        tuple(columns),
        tuple(found),
        title="attention of one block, by backend; regions: how many (tokens in each)",
        notes=tuple(f"{name}: {reason}" for name, reason in everywhere.items()),
    )


def _reasons_everywhere(attention: Sequence[Record]) -> dict[str, str]:
    """Backends that have the same reason against every row of theirs, of which there are several."""
    rows: dict[str, list[Record]] = {}
    for row in attention:
        rows.setdefault(row.backend, []).append(row)
    whys = {
        name: {_why(row) if row.median_ms is None else "" for row in found} for name, found in rows.items()
    }
    return {
        name: next(iter(why))
        for name, why in whys.items()
        if len(why) == 1 < len(rows[name]) and "" not in why
    }


def _attention_verdicts(attention: Sequence[Record], passes: Sequence[Record]) -> dict[Record, Verdict]:
    """Of every row against the baseline of its stage and routes; all stages are judged together."""
    base = {(row.stage, row.route_distribution): row for row in attention if row.ok and is_base(row)}
    pairs = [
        (row, base[row.stage, row.route_distribution])
        for row in attention
        if row.ok and not is_base(row) and (row.stage, row.route_distribution) in base
    ]
    found = zip(pairs, judged(pairs, passes), strict=True)
    return {row: verdict for (row, _), verdict in found if verdict is not None}


def _ratio_columns(base: str, *, judged: bool) -> list[str]:
    return [f"vs {base}, 95 %", "<verdict"] if judged else ["±95 %", f"vs {base}"]


def _ratio_cells(
    row: Record, rows: Sequence[Record], verdicts: dict[Record, Verdict], base: bool
) -> tuple[str, str]:
    """The speed-up with its interval and the verdict; of one process, the noise and the speed-up."""
    if not verdicts:
        return _spread(row), _speedup(row, rows)
    if base:
        return "1.00x          ", "baseline"
    verdict = verdicts.get(row)
    return (DASH, DASH) if verdict is None else (_interval(verdict), verdict.verdict)


def _interval(verdict: Verdict) -> str:
    """``2.70x 2.61-2.79``; open where one process shows no interval."""
    lo, hi = verdict.speedup_interval
    text = f"{lo:.2f}-{hi:.2f}" if hi < _OPEN * lo else "open"
    return f"{verdict.speedup:.2f}x {text:<9}"


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
    return f"{OUTCOME_WORDS.get(row.outcome, row.outcome)}: {row.reason}"


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


# --- mixers ------------------------------------------------------------------------------------------


def _mixer_table(rows: Sequence[Record], passes: Sequence[Record], part: str) -> Table:
    """Two blocks of every stage by every mixer, or their attentions alone; beside the baseline of a stage."""
    own = sorted((row for row in rows if row.part == part), key=lambda row: row.stage or 0)
    base = {row.stage: row for row in own if row.ok and is_base(row)}
    pairs = [(row, base[row.stage]) for row in own if row.ok and not is_base(row) and row.stage in base]
    judgements = zip(pairs, judged(pairs, passes), strict=True)
    verdicts = {row: verdict for (row, _), verdict in judgements if verdict is not None}
    found: list[Row] = []
    last: int | None = None
    for row in own:
        start = (f"{row.stage} x{row.block_count}", f"{row.height}x{row.width}")
        who = (*(start if row.stage != last else ("", "")), row.backend)
        last = row.stage
        if row.median_ms is None:
            found.append(Note(who, _why(row)))
            continue
        ratio = _ratio_cells(row, own, verdicts, is_base(row))
        found.append((*who, _ms(row.median_ms), *ratio, _megabytes(row.workspace_mb)))
    ratios = _ratio_columns("window", judged=bool(verdicts))
    columns = ("<stage", "<map", "<attention", "median ms", *ratios, "alloc MB")
    return Table(columns, tuple(found), title=MIXER_TITLES[part])


# --- whole models ------------------------------------------------------------------------------------


def _model_table(rows: Sequence[Record], passes: Sequence[Record]) -> Table:
    models = [row for row in rows if row.part == "model"]
    base = base_of(models)
    against = name_of(base) if base is not None else ""
    by_name = model_verdicts(models, passes)
    verdicts = {row: by_name[name_of(row), against] for row in models if (name_of(row), against) in by_name}
    launch = any(row.launch_bound is not None for row in models)
    columns = ["<whole model", "images/s", "median ms"]
    usual = "window" if any(row.form == "mixer" for row in models) else "gather"
    columns += _ratio_columns(against.split()[0] if verdicts else usual, judged=bool(verdicts))
    columns += ["peak MB"]
    columns += ["<launch-bound"] if launch else []
    found: list[Row] = []
    for row in models:
        who = name_of(row)
        if row.median_ms is None:
            found.append(Note((who,), _why(row)))
            continue
        rate = f"{row.images_per_s:.1f}" if row.images_per_s is not None else DASH
        bound = ({True: "yes", False: "no", None: DASH}[row.launch_bound],) if launch else ()
        ratio = _ratio_cells(row, models, verdicts, row is base)
        found.append((who, rate, _ms(row.median_ms), *ratio, _megabytes(row.peak_alloc_mb), *bound))
    notes = [f"best per stage: {row.backend.replace(',', ', ')}" for row in models if _is_mixed(row)]
    if _auto_is_best(rows, models):
        notes.append(
            "auto takes the fastest backend of every stage, so that best per stage is no other model"
        )
    return Table(tuple(columns), tuple(found), notes=tuple(dict.fromkeys(notes)))


def _is_mixed(row: Record) -> bool:
    return name_of(row) == "best per stage"


def _auto_is_best(rows: Sequence[Record], models: Sequence[Record]) -> bool:
    """Whether no model stands for each stage's fastest backend because ``auto`` is that model."""
    stages = {row.stage for row in rows if row.part == "attention" and not row.topk.startswith("-")}
    best = {row.backend for stage in stages if (row := best_attention(rows, stage or 0)) is not None}
    plain = {row.backend for row in models if row.form in ("", "plain")}
    mixed = any(_is_mixed(row) for row in models)
    return "auto" in plain and bool(best) and not mixed and plain.isdisjoint(best)


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
