"""Answer: what to run, in words, from the whole models of a run that were measured in turn.

Every statement is a verdict (`bratune.measure.verdict`) on ratios within rounds of several fresh processes,
the same that the table of whole models shows.
"""

from __future__ import annotations

from collections.abc import Sequence

from bratune.cell import RUNTIME_FORMS
from bratune.measure.verdict import BUSY_PCT, MARGIN, Verdict
from bratune.record import Record
from bratune.run.summary import fastest, group, is_base, judged

__all__ = ["answer", "base_of", "model_verdicts", "name_of"]

# Forms that are not ours: models and runtimes of others.
_RIVALS = ("timm", *RUNTIME_FORMS)
# A pair of rows, by what they are in words.
Pair = tuple[str, str]


def name_of(row: Record) -> str:
    """What ran, in words: ``runtime``, ``gather everywhere``, ``best per stage``."""
    if row.form == "timm":
        return f"{row.model} (timm)"
    if row.form == "mixer":
        return row.backend
    if row.form == "yours" and not row.backend:
        return "as it is"
    if row.form not in ("", "plain", "yours"):
        return row.form
    names = set(row.backend.split(","))
    if row.backend == "auto":
        return "auto"
    return f"{row.backend.split(',')[0]} everywhere" if len(names) == 1 else "best per stage"


def base_of(models: Sequence[Record]) -> Record | None:
    """What the whole models of a scene are compared with: the published form, or ``gather`` everywhere.

    Of a model of somebody else it is the model as it is, of mixers the network of windows.
    """
    timed = {name_of(row): row for row in reversed(models) if row.ok}
    mixed = next((row for row in models if row.form == "mixer" and row.ok and is_base(row)), None)
    known = (timed.get(name) for name in ("as it is", "published", "gather everywhere"))
    return next((row for row in known if row is not None), mixed)


def model_verdicts(rows: Sequence[Record], passes: Sequence[Record]) -> dict[Pair, Verdict]:
    """Every verdict that is given on the whole models of one scene, by the names of both; judged together.

    Every form and peer against the base, and the fastest of our forms against ``auto``, every peer and every
    other runtime.

    Args:
        rows: Of one scene, pooled over their passes.
        passes: Rows of single passes.
    """
    models = [row for row in rows if row.part == "model" and row.ok]
    base, best = base_of(models), fastest([row for row in models if row.form not in _RIVALS])
    pairs = [(row, base) for row in models if base is not None and row is not base]
    if best is not None:
        rivals = [row for row in models if name_of(row) == "auto" or row.form in _RIVALS]
        pairs += [(best, row) for row in rivals if row is not best and row is not base]
    verdicts = judged(pairs, passes)
    return {
        (name_of(row), name_of(other)): verdict
        for (row, other), verdict in zip(pairs, verdicts, strict=True)
        if verdict is not None
    }


def answer(rows: Sequence[Record], passes: Sequence[Record] = ()) -> list[str]:
    """A sentence per model, batch and regime: what to use, and how much faster it is; then one per peer.

    Args:
        rows: Pooled over their passes.
        passes: Rows of single passes, which alone can show that anything is faster.
    """
    measured = [row for row in rows if row.part == "model" and row.evidence in ("measured", "replayed")]
    models = [row for row in measured if row.form != "mixer"]  # each another model: there is no one to use
    return [line for scene in group(models) for line in _of_scene(scene, passes)]


def _of_scene(scene: Sequence[Record], passes: Sequence[Record]) -> list[str]:
    best = fastest([row for row in scene if row.ok and row.form not in _RIVALS])
    if best is None:
        return []
    where = f"{best.model}, batch {best.batch}, {best.regime}"
    if (best.passes or 1) < 2:
        return [f"{where}: {name_of(best)} had the least median, in one process: nothing is shown"]
    if (best.cpu_wait_pct or 0.0) > BUSY_PCT:
        return [f"{where}: the machine was busy, no answer is given"]
    known, name = model_verdicts(scene, passes), name_of(best)
    rivals = {
        rival: known[name, rival] for rival in ("as it is", "published", "auto") if (name, rival) in known
    }
    lines = [f"{where}: {_advice(name, rivals)}"]
    for peer in (row for row in scene if row.form in _RIVALS and row.ok):
        verdict = known.get((name, name_of(peer)))
        if verdict is not None:
            lines.append(f"{where}: {name} against {name_of(peer)}: {_words(verdict)}")
    return lines


def _advice(name: str, rivals: dict[str, Verdict]) -> str:
    """What to use, with what is shown against others and what is not."""
    if not rivals:
        return f"{name} had the least time; nothing that it could be compared with took turns with it"
    shown = [f"{v.speedup_text} as fast as {rival}" for rival, v in rivals.items() if v.verdict == "FASTER"]
    shown += [
        f"the same as {rival} within {100 * MARGIN:g} %" for rival, v in rivals.items() if v.verdict == "SAME"
    ]
    left = {rival: v for rival, v in rivals.items() if v.verdict not in ("FASTER", "SAME")}
    text = f"use {name}, {' and '.join(shown)}" if shown else f"{name} had the least time"
    for rival, verdict in left.items():
        text += f"; against {rival} {_words(verdict)}"
    return text


def _words(verdict: Verdict) -> str:
    """A verdict as the answer says it; what is undecided, with what would settle it."""
    if verdict.verdict != "UNDECIDED":
        return f"{verdict.verdict}, {verdict.speedup_text}"
    return f"nothing is shown, {verdict.speedup_text}: {verdict.settles}"
