"""Which attention: exponents from times, networks by rate, accuracy only where somebody published it."""

from __future__ import annotations

from typing import Any

import pytest

from bratune.machine import Machine
from bratune.record import Record
from bratune.report.figures import attentions, peers, throughput
from bratune.report.figures.attentions import AttentionModel, AttentionTime, growth, infos, panels
from bratune.report.figures.section import Source
from bratune.report.page import page
from bratune.run import session
from bratune.work.request import make_request

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="Some CPU", memory_gib=8.0)
NAMES = ("window", "full", "bi-level-routing:gather", "shifted-window")


def rows(**values: Any) -> list[Record]:
    """Attentions at three resolutions, whose time grows as N^1 or N^2."""
    found = []
    for side in (224, 448, 896):
        request = make_request(CPU, mixers=NAMES, image=(side, side), **values)
        for cell in (step.cell for step in session.plan(request)):
            assert cell is not None
            power = 2 if cell.backend == "full" else 1
            ms = 1e-6 * (cell.problem.height * cell.problem.width) ** power
            kind = {"median_ms": ms, "ci_lo_ms": 0.9 * ms, "ci_hi_ms": 1.1 * ms, "workspace_mb": 2 * ms}
            found.append(Record.of(cell, CPU, **kind))
    return found


def test_a_cost_that_grows_as_a_power_has_that_exponent() -> None:
    assert growth([(10, 3.0), (100, 3.0 * 10**1.5), (1000, 3.0 * 10**3)]) == pytest.approx(1.5)
    assert growth([(10, 3.0)]) is None
    assert growth([(10, 3.0), (10, 4.0)]) is None


def test_exponents_stand_in_the_names_of_lines() -> None:
    found = infos(rows())
    alone = [row for row in found if isinstance(row, AttentionTime)]
    assert {row.attention: round(row.time_exponent or 0, 6) for row in alone} == {
        "window": 1.0,
        "full": 2.0,
        "bi-level-routing:gather": 1.0,
        "shifted-window": 1.0,
    }
    assert {row.tokens for row in alone} == {56**2, 112**2, 224**2}
    time, memory, *_ = panels(found)
    assert {key.name for key in time.keys} >= {"full, N^2.00", "window, N^1.00"}
    assert {key.name for key in memory.keys} == {key.name for key in time.keys}
    assert time.layout["xaxis"]["type"] == time.layout["yaxis"]["type"] == "log"


def test_both_directions_have_panels_of_their_own() -> None:
    found = infos(rows(directions=("fwd", "fwd-bwd")))
    titles = [panel.title for panel in panels(found) if panel.title.endswith("stage 1")]
    assert len(titles) == len(set(titles)) == 2


def test_accuracy_stands_only_at_the_resolution_of_a_published_number() -> None:
    models = [row for row in infos(rows()) if isinstance(row, AttentionModel)]
    assert {(row.attention, row.image): row.top1_published for row in models if row.top1_published} == {
        ("bi-level-routing:gather", "224x224"): 82.7,
        ("shifted-window", "224x224"): 81.3,
    }
    assert all("published top-1 of" in row.note for row in models if row.top1_published)


def test_networks_are_ordered_by_their_rate() -> None:
    found = [row for row in infos(rows()) if isinstance(row, AttentionModel) and row.image == "448x448"]
    rates = [row.images_per_s for row in found]
    assert rates == sorted(rates, reverse=True)
    last = panels(infos(rows()))[-1]
    assert last.layout["yaxis"]["categoryarray"][0] == "full"  # the slowest is at the bottom


def test_a_modelled_network_does_not_look_measured() -> None:
    modelled = [row.replace(evidence="modelled", outcome="modelled") for row in rows()]
    for measured, other in zip(panels(infos(rows())), panels(infos(modelled)), strict=True):
        assert measured.data[0]["marker"] != other.data[0]["marker"]


def test_other_questions_do_not_see_mixers_and_the_page_shows_them() -> None:
    source = Source(rows(), None, {})
    assert throughput.section(source).rows == ()
    assert peers.section(source).rows == ()
    assert attentions.section(Source([], None, {})).missing.startswith("no attentions were compared")
    html = page(rows())
    assert '<section id="attentions"><h2>Which attention?</h2>' in html
    assert "full, N^2.00" in html
