"""Notebooks: records, plans and reports show themselves, and a text in them is never markup."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from drawn import measured, model

from bratune.tune.plan import load_plan

RESULTS = Path(__file__).parents[2] / "results"


def test_a_record_shows_the_fields_that_hold_something() -> None:
    shown = measured(model("triton"), 2.0, reason="<b>")._repr_html_()
    assert "<td>median_ms</td><td>2.0</td>" in shown
    assert "<td>reason</td><td>&lt;b&gt;</td>" in shown
    assert "joules_per_image" not in shown


def test_a_plan_shows_its_stages_and_where_it_was_measured() -> None:
    plan = load_plan(RESULTS / "cpu-xeon-biformer-tiny-224.plan.json")
    shown = plan._repr_html_()
    assert shown.count("<tr>") == 1 + len(plan.stages)
    assert "<td>gather-sdpa</td>" in shown
    assert (plan.end_to_end.verdict or "not compared") in shown
    assert html.escape(plan.machine.gpu_name) in shown


def test_a_report_shows_its_page_in_a_frame() -> None:
    pytest.importorskip("plotly")
    from bratune.report.page import page

    text = page([measured(model("triton"), 2.0)])
    shown = text._repr_html_()
    assert shown.startswith("<iframe")
    assert shown.count("<") == 2, "the page is an attribute"
    assert html.unescape(shown.partition('srcdoc="')[2].partition('"')[0]) == text
