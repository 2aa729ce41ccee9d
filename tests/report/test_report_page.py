"""The report page: one offline file with data beside every figure, seen through a real browser."""

from __future__ import annotations

import base64
import csv
import gzip
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bratune import gpus
from bratune.cli import run
from bratune.record import Record, field_types
from bratune.report.demo import demo_records, modelled_records
from bratune.report.page import _section, page
from bratune.report.sections import sections
from bratune.store import Store, read_records

get_plotlyjs = pytest.importorskip("plotly.offline").get_plotlyjs


@pytest.fixture(scope="module")
def records() -> list[Record]:
    rows = modelled_records([gpus.resolve(key) for key in ("h200", "a100", "rtx4090")])
    failed = rows[0].replace(outcome="oom", reason="needs <b>90 GiB</b>", median_ms=None, evidence="measured")
    return [*rows, failed]


@pytest.fixture(scope="module")
def text(records: list[Record]) -> str:
    return page(records, title="A <title>")


class Reader(html.parser.HTMLParser):
    """Collects what the page refers to and what it defines."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.files: list[str] = []
        self.headings: list[str] = []
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.ids.append(found["id"])
        if "src" in found:
            self.sources.append(found["src"])
        if tag == "a" and "download" in found:
            self.files.append(found["download"])
        if tag == "link":
            self.sources.append(found["href"])
        self._heading = tag == "h2"

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.headings.append(data)
            self._heading = False


def unpacked(text: str) -> str:
    """The plotting library, the files and the figures."""
    packed = text.partition('id="packed">')[2].partition("</script>")[0]
    return gzip.decompress(base64.b85decode(packed.replace(",", "<"))).decode()


def outside_scripts(text: str) -> str:
    """The page without the plotting library and the data of the figures."""
    return text[: text.index("<script ")]


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(outside_scripts(text))
    return reader


def test_nothing_is_fetched(read: Reader) -> None:
    assert all(source.startswith("data:") for source in read.sources)


def test_the_plotting_library_is_in_the_page_once(text: str) -> None:
    assert text.count("<script") == 2
    assert len(text.encode()) < 2.1e6
    assert unpacked(text).startswith(get_plotlyjs())


def test_the_same_records_give_the_same_bytes(records: list[Record], text: str) -> None:
    assert page(records, title="A <title>") == text


def test_every_figure_has_a_place_and_every_section_its_data(read: Reader, text: str) -> None:
    drawn = [line.split('"')[1] for line in unpacked(text).splitlines() if line.startswith('draw("')]
    assert drawn
    assert set(drawn) <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    sections = {name.rpartition("-")[0] for name in drawn}
    assert {f"{name}.csv" for name in sections} <= set(read.files)


def test_a_csv_link_holds_the_rows_of_the_figure(read: Reader, text: str) -> None:
    files = json.loads(unpacked(text).partition("const files = ")[2].partition(";\n")[0])
    assert set(files) == set(read.files)
    rows = list(csv.DictReader(io.StringIO(files["throughput.csv"])))
    assert {row["gpu"] for row in rows} == {"h200", "a100", "rtx4090"}
    assert {row["evidence"] for row in rows} == {"modelled"}
    assert all(float(row["images_per_s"]) > 0 for row in rows)


def test_empty_figures_are_left_out_with_the_reason(text: str, read: Reader) -> None:
    assert "energy" not in read.ids
    assert "no record has an energy" in text
    assert "Not shown" in read.headings


def test_failures_are_listed_with_their_reasons_as_text(text: str) -> None:
    assert "What did not run" in text
    assert "needs &lt;b&gt;90 GiB&lt;/b&gt;" in text
    assert "<b>90 GiB" not in outside_scripts(text)


def test_names_cannot_break_out_of_the_page(records: list[Record]) -> None:
    evil = '</script><img src=x onerror="alert(1)">'
    bad = [r.replace(gpu_key=evil, gpu_name=evil, model="biformer_small") for r in records if r.ok][:60]
    found = page(bad, title=evil)
    assert "<img" not in found
    assert found.count("</script>") == 2


# Texts of a record that are words of ours, or numbers.
OURS = {"part", "form", "evidence", "outcome", "n_win", "topk", "region", "cell", "task", "layout", "padding"}


def test_no_text_of_a_record_is_markup_in_any_section(records: list[Record]) -> None:
    shipped = Path(__file__).parents[2] / "results"
    stored = read_records(
        [shipped / name for name in ("cpu-xeon-attentions-224.jsonl", "cpu-xeon-forms-224.jsonl")]
    )
    rows = [row for row in (*stored, *records) if row.outcome != "started"]
    for name in [name for name, kind in field_types().items() if kind is str and name not in OURS]:
        found = sections(
            [row.replace(**{name: "<script>evil()</script>"}) for row in rows[:: 1 + len(rows) // 60]]
        )
        for one in found:
            if one.panels:
                assert "<script>evil" not in _section(one), (one.name, name)


def test_a_page_of_modelled_rows_says_that_nothing_was_measured(text: str) -> None:
    assert "nothing in it was measured" in text
    assert '<span class="swatch modelled">' in text


def test_the_page_opens_with_the_answer_then_its_chart_and_ends_with_the_machines(text: str) -> None:
    places = [text.index(f) for f in ('<p class="answer">', 'id="throughput-0"', "<nav", 'id="machines"')]
    assert places == sorted(places)


def test_what_did_not_run_is_not_counted_as_measured(records: list[Record]) -> None:
    late = [r.replace(evidence="measured", outcome="timeout", median_ms=None) for r in records[:3]]
    machines = page([*late, records[0].replace(evidence="measured")]).partition('id="machines"')[2]
    assert "1 measured, 3 without a number" in machines


def test_the_legend_names_what_is_on_the_page(records: list[Record]) -> None:
    cpu = records[0].replace(evidence="measured", gpu_key="cpu", gpu_name="Some CPU")
    assert re.findall(r'class="swatch (\w+)"', page([cpu])) == ["measured"]
    assert re.findall(r'class="swatch (\w+)"', page(records)) == ["measured", "modelled", "bound"]


def test_the_demo_shows_three_gpus() -> None:
    assert {"h200", "a100", "rtx4090"} <= {r.gpu_key for r in demo_records()}


def test_report_writes_the_page_from_records(
    tmp_path: Path, records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    target = Store(tmp_path / "rows.jsonl")
    for record in records[:40]:
        target.append(record)
    assert run(["report", str(tmp_path), "-o", str(tmp_path / "out" / "r.html")]) == 0
    assert "</html>" in (tmp_path / "out" / "r.html").read_text()
    assert "report: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "report needs records"),
        (["missing"], 1, "no such file or folder"),
        (["--gpu", "a1000"], 2, "no GPU is called"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["report", *arguments, "-o", str(tmp_path / "r.html")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_images_without_kaleido_say_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "kaleido", None)
    assert run(["report", "--gpu", "a100", "-o", str(tmp_path / "r.html"), "--images", "png"]) == 1
    assert "pip install 'bratune[images]'" in capsys.readouterr().err


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_every_figure_without_an_error(tmp_path: Path, text: str, width: int) -> None:
    """The page reports on itself: every figure drawn, no error, nothing wider than the window."""
    probe = """<script>
    let failure = "";
    window.onerror = (message) => { failure = String(message); };
    window.addEventListener("load", () => setTimeout(() => {
      const plots = [...document.querySelectorAll(".plot")];
      const drawn = plots.filter((p) => p.querySelector("svg.main-svg")).length;
      const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      window.parent.postMessage(`${drawn} of ${plots.length} drawn, ${wide} too wide, ${failure}`, "*");
    }, 1500));
    </script>"""
    (tmp_path / "page.html").write_text(text.replace("<head>", "<head>" + probe, 1))
    # Headless windows have a least width, so the page stands in a frame.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<script>onmessage = (e) => document.body.setAttribute("data-said", e.data);</script><body>'
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    assert BROWSER is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--enable-logging=stderr --virtual-time-budget=20000 --window-size=1400,1000 --dump-dom"
    )
    done = subprocess.run(
        [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    count = text.count('class="plot"')
    assert f'data-said="{count} of {count} drawn, 0 too wide, "' in done.stdout, done.stdout[:2000]


def test_modelled_rows_take_the_dtype_of_the_board_and_the_host_that_is_said() -> None:
    board = gpus.resolve("t4")
    times = []
    for host in ("fast", "60us"):
        rows = modelled_records([board], batches=(1,), host=host)
        assert {row.dtype for row in rows} == {"float16"}
        times.append(next(r.median_ms for r in rows if r.part == "model" and r.launch_bound) or 0.0)
    assert times[1] == pytest.approx(times[0] * 60 / 8)
