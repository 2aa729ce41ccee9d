"""The last lines of a profile: what to use, and how much is shown."""

from __future__ import annotations

import math

import pytest

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.record import Record
from bratune.report.answer import answer, model_verdicts, name_of
from bratune.report.profile_tables import profile_text
from bratune.run.summary import fastest, paired
from bratune.store import pool
from bratune.work.cells import Scene, scenes
from bratune.work.request import make_request

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="Some CPU", memory_gib=8.0)
# What passes scatter by, around their middle.
SCATTER = (-1.0, 0.0, 1.0)


def scene() -> Scene:
    (found,) = scenes(make_request(CPU))
    return found


def rows_of(cell: Cell, ratio: float, scatter: float = 0.005, passes: int = 3) -> list[Record]:
    """Passes of a cell that is ``ratio`` times as fast as the baseline; the machine drifts between them."""
    found = []
    is_base = cell.backend == "gather" and cell.form == "plain"
    for number in range(1, passes + 1):
        value = ratio * math.exp(scatter * SCATTER[number - 1]) if not is_base else 1.0
        drift = 1.0 + 0.3 * number
        values = {"median_ms": 100.0 * drift / value, "pass_number": number, "passes": passes, "run_id": "r"}
        if not is_base:
            values |= {"ratio": value, "ratio_lo": value / 1.002, "ratio_hi": value * 1.002}
        found.append(Record.of(cell, CPU, **values))
    return found


def models(passes: int = 3, **ratios: float) -> list[Record]:
    own, found = scene(), []
    for name, ratio in ratios.items():
        form = name if name in ("published", "runtime") else "plain"
        cell = own.model_cell(("auto" if form == name else name,), form=form)
        found += rows_of(cell, ratio, passes=passes)
    return found


def scattered(rows: list[Record], name: str, by: float = 0.03) -> list[Record]:
    """The rows, those of one model with a scatter that the others do not share."""
    return [
        row.replace(ratio=row.ratio * math.exp(by * SCATTER[row.pass_number - 1]))
        if name_of(row) == name and row.ratio and row.pass_number
        else row
        for row in rows
    ]


def said(rows: list[Record]) -> list[str]:
    return answer(pool(rows), rows)


def test_the_answer_says_what_to_use_and_by_how_much() -> None:
    (line,) = said(models(published=0.8, gather=1.0, auto=1.5, runtime=2.0))
    assert line.startswith("biformer_tiny, batch 1, eager: use runtime, 2.50x (2.")
    assert ") as fast as published and 1.33x (1." in line
    assert line.endswith(") as fast as auto")


def test_ratios_are_paired_by_pass_so_that_what_both_share_cancels() -> None:
    rows = models(published=0.8, gather=1.0, runtime=2.0)
    published, runtime = rows[:3], rows[6:]
    found = paired(runtime, published)
    assert found is not None
    assert found.values == pytest.approx([2.5] * 3)  # the scatter of both is the same and in no ratio


def test_without_a_baseline_medians_of_the_same_processes_are_compared() -> None:
    plain = [r.replace(ratio=None, ratio_lo=None, ratio_hi=None) for r in models(published=0.8, runtime=2.0)]
    (line,) = said(plain)
    assert "use runtime, 2.50x (" in line
    others = [r.replace(run_id="another") if r.form == "published" else r for r in plain]
    assert paired(others[3:], others[:3]) is None
    assert "nothing that it could be compared with took turns with it" in said(others)[0]


def test_what_is_not_shown_is_said_with_what_would_show_it() -> None:
    (line,) = said(scattered(models(published=0.8, auto=1.95, runtime=2.0), "auto"))
    assert "; against auto nothing is shown, 1.03x (0." in line
    assert "passes per side would settle it" in line


def test_a_difference_that_does_not_matter_is_none() -> None:
    (line,) = said(models(published=0.8, auto=2.0, runtime=2.001))
    assert line.endswith("as fast as published and the same as auto within 2 %")


def test_where_nothing_is_shown_nothing_is_advised() -> None:
    (line,) = said(scattered(models(auto=1.95, runtime=2.0), "auto"))
    assert "use" not in line.split()
    assert "runtime had the least time; against auto nothing is shown" in line


def test_a_busy_machine_gives_no_answer() -> None:
    rows = [row.replace(cpu_wait_pct=40.0) for row in models(published=0.8, auto=1.0, runtime=2.0)]
    assert said(rows) == ["biformer_tiny, batch 1, eager: the machine was busy, no answer is given"]


def test_one_process_shows_nothing() -> None:
    (line,) = said(models(passes=1, published=0.8, auto=1.0, runtime=2.0))
    assert line.endswith("runtime had the least median, in one process: nothing is shown")


@pytest.mark.parametrize(("ratio", "word"), [(1.0, "FASTER"), (3.0, "SLOWER"), (1.97, "nothing is shown")])
def test_a_peer_is_compared_with_the_fastest_form(ratio: float, word: str) -> None:
    peer = scattered(
        rows_of(scene().peer_cell("swin_tiny_patch4_window7_224"), ratio),
        "swin_tiny_patch4_window7_224 (timm)",
    )
    lines = said([*models(published=0.8, gather=1.0, runtime=2.0), *peer])
    assert len(lines) == 2
    assert f"runtime against swin_tiny_patch4_window7_224 (timm): {word}" in lines[1]


def test_the_table_and_the_answer_speak_one_verdict() -> None:
    peer = rows_of(scene().peer_cell("swin_tiny_patch4_window7_224"), 1.0)
    rows = [*models(published=0.8, gather=1.0, auto=1.5, runtime=2.0), *peer]
    verdicts = model_verdicts(pool(rows), rows)
    assert verdicts["runtime", "published"].verdict == "FASTER"
    assert verdicts["swin_tiny_patch4_window7_224 (timm)", "published"].verdict == "FASTER"
    lo, hi = verdicts["runtime", "published"].speedup_interval
    assert lo < 2.5 < hi
    text = profile_text(pool(rows), rows)
    assert max(map(len, text.splitlines())) <= 100
    (line,) = [line for line in text.splitlines() if line.startswith("runtime ")]
    assert f"2.50x {lo:.2f}-{hi:.2f}  FASTER" in line
    assert f"2.50x ({lo:.2f} to {hi:.2f}) as fast as published" in said(rows)[0]
    (line,) = [line for line in text.splitlines() if line.startswith("published ")]
    assert "1.00x" in line
    assert "baseline" in line


def test_the_fastest_is_chosen_by_ratios_where_all_have_them() -> None:
    rows = pool(models(published=0.8, gather=1.0, runtime=2.0))
    slow_process = [row.replace(median_ms=500.0) if row.form == "runtime" else row for row in rows]
    found = fastest(slow_process)
    assert found is not None
    assert found.form == "runtime"
    old = [row.replace(ratio=None) for row in slow_process]
    found = fastest(old)
    assert found is not None
    assert found.form != "runtime"
    assert fastest([]) is None


def test_modelled_rows_give_no_answer() -> None:
    assert said([r.replace(evidence="modelled") for r in models(published=0.8, runtime=2.0)]) == []
