"""The tables of ``bratune explain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bratune.tables import Note, Row, Table
from bratune.work.capacity import Fit
from bratune.work.explain import MixerFacts, StageFacts

__all__ = ["backends_table", "fit_table", "mixers_table", "n_win_table", "stages_table"]


def stages_table(facts: Sequence[StageFacts]) -> Table:
    """One row per stage: geometry and counted work of one block, whole batch."""
    rows: list[Row] = []
    for fact in facts:
        stage = fact.stage
        grid = "-"
        if stage.kind == "routed" and stage.problem:
            (rows_, columns), (rh, rw) = stage.problem.grid, stage.problem.region
            grid = f"{rows_}x{columns} of {rh}x{rw}"
        rows.append(
            (
                f"{stage.index} x{stage.blocks}",
                f"{stage.height}x{stage.width}",
                grid,
                {"full": "all", "conv": "none"}.get(stage.kind, str(stage.topk)),
                f"{100 * fact.padding_waste:+.0f} %",
                str(fact.keys_per_query),
                f"{fact.pairs / 1e6:.2f}",
                f"{fact.gathered_bytes / 1e6:.1f}",
                f"{fact.score_bytes / 1e6:.1f}",
                f"{fact.attention_macs / 1e9:.3f}",
                f"{fact.block_macs / 1e9:.3f}",
            )
        )
    heads = (
        "<stage",
        "<map",
        "<regions",
        "top-k",
        "padding",
        "keys/q",
        "Mpairs",
        "gather MB",
        "scores MB",
        "GMAC att",
        "GMAC blk",
    )
    return Table(heads, tuple(rows), title="one block, whole batch")


def n_win_table(facts: Sequence[StageFacts], measure: Callable[[StageFacts], str]) -> Table:
    """The S in use beside that with the fewest multiply-adds and the fastest that was measured here.

    Args:
        facts: Of every stage.
        measure: The command that measures a stage with an S that was not measured yet.
    """
    rows: list[Row] = []
    for fact in facts:
        if fact.optimal_n_win is None or fact.optimal_keys is None:
            continue
        best = fact.measured_n_win
        if best is None:
            said = f"not measured yet: {measure(fact)}"
        elif len(best.tried) == 1:
            said = f"only S={best.n_win} was measured ({best.ms:.3f} ms, {best.backend}): {measure(fact)}"
        else:
            tried = ", ".join(map(str, best.tried))
            said = f"S={best.n_win}, {best.ms:.3f} ms per block with {best.backend} (measured: {tried})"
        before = (
            str(fact.stage.index),
            str(fact.stage.n_win),
            str(fact.keys_per_query),
            f"{fact.optimal_n_win:.1f}",
            f"{fact.optimal_keys:.0f}",
        )
        rows.append(Note(before, said))
    title = (
        "which S, with the stage's top-k; fewest multiply-adds of routing and attention, S^4 C + 2 top-k\n"
        "(HW)^2 C / S^2 with HW in tokens: (top-k (HW)^2)^(1/6) (the paper's eq. 7 to 9 count them otherwise)"
    )
    heads = ("<stage", "S", "keys/q", "fewest at", "keys/q there", "<fastest measured here")
    return Table(heads, tuple(rows), title=title)


def backends_table(facts: Sequence[StageFacts]) -> Table:
    """Every backend at every stage: accepted, or all its reasons."""
    rows: list[Row] = []
    for fact in facts:
        for i, (name, reasons) in enumerate(fact.reasons.items()):
            before = (str(fact.stage.index) if i == 0 else "", name)
            rows.append(Note(before, "accepts" if not reasons else "; ".join(reasons)))
    return Table(("<stage", "<backend", "<answer"), tuple(rows))


def fit_table(fits: Sequence[Fit], memory: str) -> Table:
    """The largest batch of the whole model per backend."""
    rows: list[Row] = []
    for fit in fits:
        if fit.reasons:
            rows.append(Note((fit.backend,), "; ".join(fit.reasons)))
            continue
        rows.append(
            (
                fit.backend,
                str(fit.batch) if fit.batch else "not one image",
                f"{fit.fixed_bytes / 1e6:.1f}",
                f"{fit.image_bytes / 1e6:.1f}",
                str(fit.stage),
            )
        )
    title = f"largest batch that {memory} hold, predicted from the tensors that are alive at once"
    heads = ("<backend", "batch", "weights MB", "MB per image", "worst stage")
    return Table(heads, tuple(rows), title=title)


def mixers_table(facts: Sequence[MixerFacts]) -> Table:
    """Every attention in every stage: counted work, and how it grows."""
    rows: list[Row] = []
    last = 0
    for fact in facts:
        start = (str(fact.stage), f"{fact.height}x{fact.width}") if fact.stage != last else ("", "")
        last = fact.stage
        if fact.reasons:
            rows.append(Note((*start, fact.mixer), "; ".join(fact.reasons)))
            continue
        rows.append(
            (
                *start,
                fact.mixer,
                f"{fact.macs / 1e9:.3f}",
                f"{fact.block_macs / 1e9:.3f}",
                f"{fact.workspace_bytes / 1e6:.1f}",
                f"{fact.exponent:.2f}",
                f"{fact.memory_exponent:.2f}",
                f"{fact.far_exponent:.2f}",
                fact.order,
            )
        )
    title = (
        "two blocks, batch; GMAC of both attentions and both blocks; MB beside input and output at most\n"
        "exponents of the number of tokens N: of GMAC and MB up to twice this side, of GMAC on huge maps"
    )
    heads = ("<stage", "<map", "<attention", "GMAC att", "GMAC blk", "MB", "GMAC^", "MB^", "huge^", "<paper")
    return Table(heads, tuple(rows), title=title)
