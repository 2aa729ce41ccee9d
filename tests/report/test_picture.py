"""Picture: the first chart as an SVG that runs no script, in both themes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from drawn import measured, model, peer

from bratune import gpus
from bratune.cli import run
from bratune.predict.model import predict_cell
from bratune.report.picture import THEMES, throughput_svg
from bratune.store import Store

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "net<b>&\"'"


@pytest.mark.parametrize("theme", THEMES)
def test_a_picture_names_every_bar_with_its_value_and_evidence(theme: str) -> None:
    records = [measured(model("gather"), 4.0), measured(model("triton"), 2.0), measured(peer(EVIL), 3.0)]
    root = ElementTree.fromstring(throughput_svg(records, theme=theme))
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"biformer_tiny · triton everywhere", f"{EVIL} (timm)"} <= set(words)
    assert {"500 measured", "333 measured", "250 measured"} <= set(words)
    assert "images per second" in words
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("stroke")]
    widths = [float(r.get("width", 0)) for r in bars]
    assert widths[0] / widths[-1] == pytest.approx(2, rel=0.01), "bars are as long as what they stand for"
    assert not any((r.get("fill") or "").startswith("url") for r in bars)
    ends = [float(r.get("x", 0)) + float(r.get("width", 0)) for r in bars]
    assert max(ends) < float(root.get("width", 0))


def test_a_long_name_has_room_before_its_value() -> None:
    root = ElementTree.fromstring(throughput_svg([measured(peer("n" * 60), 3.0)]))
    (name,) = (t for t in root.iter(f"{SVG}text") if (t.text or "").startswith("nnn"))
    (value,) = (t for t in root.iter(f"{SVG}text") if (t.text or "").endswith("measured"))
    assert float(value.get("x", 0)) - float(name.get("x", 0)) > 7 * len(name.text or "") + 100


def test_what_was_not_measured_is_hatched_and_several_machines_are_named() -> None:
    boards = [gpus.resolve(key) for key in ("a100", "h200")]
    root = ElementTree.fromstring(throughput_svg([predict_cell(model("triton"), b) for b in boards]))
    assert {"a100", "h200"} <= {text.text for text in root.iter(f"{SVG}text")}
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("stroke")]
    assert len(bars) == 2
    assert all((r.get("fill") or "").startswith("url(#hatch") for r in bars)


def test_without_a_whole_model_there_is_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput_svg([]) == ""
    Store(tmp_path / "rows.jsonl").append(measured(model().replace(part="attention", stage=1), 1.0))
    asked = ["report", str(tmp_path), "-o", str(tmp_path / "r.html"), "--pictures", str(tmp_path / "p")]
    assert run(asked) == 2
    assert "--pictures draws whole models" in capsys.readouterr().err


def test_report_writes_both_themes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path / "rows.jsonl").append(measured(model("triton"), 2.0))
    asked = ["report", str(tmp_path), "-o", str(tmp_path / "r.html"), "--pictures", str(tmp_path / "p")]
    assert run(asked) == 0
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == ["throughput-dark.svg", "throughput-light.svg"]
    assert "500 measured" in (tmp_path / "p" / names[0]).read_text()
