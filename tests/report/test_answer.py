"""The last lines of a profile: what to use, and how much is shown."""

from __future__ import annotations

import pytest

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.record import Record
from bratune.report.answer import against, answer
from bratune.work.cells import Scene, scenes
from bratune.work.request import make_request

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="Some CPU", memory_gib=8.0)


def scene() -> Scene:
    (found,) = scenes(make_request(CPU))
    return found


def row(cell: Cell, ratio: float, half_width: float = 0.01, passes: int = 3) -> Record:
    """A cell that is ``ratio`` times as fast as the baseline, known to ``half_width``."""
    values = {"median_ms": 100.0 / ratio, "passes": passes, "baseline": "gather"}
    if cell.backend != "gather" or cell.form != "plain":
        lo, hi = ratio / (1 + half_width), ratio * (1 + half_width)
        values |= {"ratio": ratio, "ratio_lo": lo, "ratio_hi": hi}
    return Record.of(cell, CPU, **values)


def models(passes: int = 3, **ratios: float) -> list[Record]:
    own, found = scene(), []
    for name, ratio in ratios.items():
        form = name if name in ("published", "runtime") else "plain"
        cell = own.model_cell(("auto" if form == name else name,), form=form)
        found.append(row(cell, ratio, passes=passes))
    return found


def test_the_answer_says_what_to_use_and_by_how_much() -> None:
    (line,) = answer(models(published=0.8, gather=1.0, auto=1.5, runtime=2.0))
    assert line.startswith(
        "biformer_tiny, batch 1, eager: use runtime, 2.50x (2.47 to 2.54) as fast as published"
    )
    assert "1.33x (1.31 to 1.35) as fast as auto" in line


def test_what_is_not_shown_is_said() -> None:
    (line,) = answer(models(published=0.8, auto=1.999, runtime=2.0))
    assert line.endswith("nothing is shown against auto, 1.00x (0.99 to 1.01)")


def test_where_nothing_is_shown_nothing_is_advised() -> None:
    (line,) = answer(models(auto=1.999, runtime=2.0))
    assert "use" not in line.split()
    assert "runtime had the least median; nothing is shown against auto" in line


def test_without_a_baseline_nothing_is_shown() -> None:
    rows = [r.replace(ratio=None, ratio_lo=None, ratio_hi=None) for r in models(published=0.8, runtime=2.0)]
    (line,) = answer(rows)
    assert "runtime had the least median, without a baseline in the same rounds" in line


def test_a_busy_machine_gives_no_answer() -> None:
    rows = [row.replace(cpu_wait_pct=40.0) for row in models(published=0.8, auto=1.0, runtime=2.0)]
    assert answer(rows) == ["biformer_tiny, batch 1, eager: the machine was busy, no answer is given"]


def test_one_process_shows_nothing() -> None:
    (line,) = answer(models(passes=1, published=0.8, auto=1.0, runtime=2.0))
    assert line.endswith("runtime had the least median, in one process: nothing is shown")


@pytest.mark.parametrize(("ratio", "word"), [(1.0, "faster"), (3.0, "slower"), (2.0, "nothing is shown")])
def test_a_peer_is_compared_with_the_fastest_form(ratio: float, word: str) -> None:
    peer = row(scene().peer_cell("swin_tiny_patch4_window7_224"), ratio)
    lines = answer([*models(published=0.8, runtime=2.0), peer])
    assert len(lines) == 2
    assert "swin_tiny_patch4_window7_224 (timm)" in lines[1]
    assert lines[1].endswith(f": {word}")


def test_the_baseline_is_known_exactly() -> None:
    gather, auto = models(gather=1.0, auto=2.0)
    found = against(auto, gather)
    assert found is not None
    assert (found.value, round(found.lo, 3), round(found.hi, 3)) == (2.0, 1.98, 2.02)


def test_modelled_rows_give_no_answer() -> None:
    assert answer([r.replace(evidence="modelled") for r in models(published=0.8, runtime=2.0)]) == []
