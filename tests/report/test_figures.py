"""Figures: the numbers behind them, and that what was not measured does not look measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from drawn import MACHINE, attention, measured, model, peer

from bratune import gpus
from bratune.cell import Cell
from bratune.errors import StoreError
from bratune.machine import Machine
from bratune.predict.model import bound_cell, predict_cell
from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.demo import modelled_records
from bratune.report.figures import (
    energy,
    facts,
    peers,
    plans,
    resolution,
    roofline,
    speedup,
    stages,
    throughput,
)
from bratune.report.figures.facts import told_apart, trusted
from bratune.report.figures.panel import Panel, label_sides
from bratune.report.page import page
from bratune.report.published import read_timm
from bratune.report.sections import sections

A100 = gpus.resolve("a100")

# --- infos --------------------------------------------------------------------------------------------


def test_throughput_is_the_batch_over_the_median_with_the_interval_turned_round() -> None:
    (bar,) = throughput.infos([measured(model(), 2.0)])
    assert bar.images_per_s == pytest.approx(500)
    assert bar.lo == pytest.approx(1000 / 2.4)
    assert bar.hi == pytest.approx(1000 / 1.8)
    assert (bar.gpu, bar.series, bar.evidence) == ("a100", "biformer_tiny · gather everywhere", "measured")
    assert bar.work == "224x224, batch 1, bfloat16, fwd, eager"


def test_the_most_trusted_evidence_wins_and_of_equals_the_latest() -> None:
    cell = model()
    modelled = predict_cell(cell, A100)
    old, new = measured(cell, 2.0), measured(cell, 3.0)
    for records in ([modelled, old, new], [old, new, modelled]):
        (bar,) = throughput.infos(records)
        assert bar.evidence == "measured"
        assert bar.images_per_s == pytest.approx(1000 / 3)


def test_every_cpu_is_a_machine_with_its_name() -> None:
    rows = [
        measured(model(), ms, gpu_key="cpu", gpu_name=name) for name, ms in (("Xeon", 9.0), ("EPYC", 6.0))
    ]
    assert sorted(r.gpu_key for r in trusted(told_apart(rows)).values()) == ["EPYC", "Xeon"]
    assert {r.gpu_key for r in told_apart(rows[:1])} == {"Xeon"}
    text = page(rows)
    assert "Xeon" in text
    assert "EPYC" in text


def test_every_mixture_of_backends_is_named_by_what_runs() -> None:
    """The published composition has a backend per stage, too: a mixture is not the best one."""
    mixtures = ("dense,sparse,dense,gather", "dense,dense,dense,gather")
    records = [measured(model(b), ms) for b, ms in zip(mixtures, (4.0, 2.0), strict=True)]
    records += [measured(model("gather,gather,gather,gather-sdpa").replace(form="published"), 8.0)]
    assert {b.series: round(b.images_per_s) for b in throughput.infos(records)} == {
        "biformer_tiny · per stage: dense, sparse, dense, gather": 250,
        "biformer_tiny · per stage: dense, dense, dense, gather": 500,
        "biformer_tiny · published": 125,
    }


def test_a_chart_has_eight_bars_those_that_answer_and_a_colour_per_meaning() -> None:
    records = [measured(peer(f"net_{n}"), 2.0 + n) for n in range(6)]
    records += [measured(model(b), ms) for b, ms in (("gather", 5.0), ("dense", 9.0), ("flex", 8.0))]
    records += [measured(model("").replace(form="runtime"), 1.0)]
    records += [measured(model("").replace(form="published"), 9.5)]
    (bars,) = throughput.chart(throughput.infos(records))
    names = [b.series for b in bars]
    assert len(names) == 8
    assert names[0] == "biformer_tiny · runtime"
    assert [b.images_per_s for b in bars] == sorted((b.images_per_s for b in bars), reverse=True)
    assert "biformer_tiny · published" in names, "the official code, though gather everywhere is faster"
    left_out = {"flex", "dense", "gather"}
    assert {f"biformer_tiny · {name} everywhere" for name in left_out}.isdisjoint(names)
    (panel,) = throughput.panels(throughput.infos(records))
    colours = {trace["legendgroup"]: trace["marker"]["color"] for trace in panel.data}
    assert set(colours) == {throughput.BIFORMER, throughput.PUBLISHED, throughput.OTHERS}
    assert len(set(colours.values())) == 3
    assert "1 000 measured" in panel.layout["yaxis"]["ticktext"][0]


def test_several_machines_share_a_chart_in_turn_each_under_its_name() -> None:
    boards = [gpus.resolve(key) for key in ("a100", "h200", "rtx4090")]
    cells = [model(b) for b in ("gather", "triton", "dense", "flex", "gather-sdpa")]
    found = throughput.infos([predict_cell(c, board) for board in boards for c in cells])
    (bars,) = throughput.chart(found)
    counts = [sum(b.gpu == board.key for b in bars) for board in boards]
    assert sorted(counts) == [2, 3, 3]
    _, lines = throughput.lanes(bars)
    assert [lane.name for lane in lines if lane.bar is None] == list(dict.fromkeys(b.gpu for b in bars))
    (panel,) = throughput.panels(found)
    words = panel.layout["yaxis"]["ticktext"]
    assert all("modelled" in text or text.startswith("<b>") for text in words)


def test_a_text_of_a_record_is_never_markup_in_a_figure() -> None:
    evil = '<a href="x">%{evil}</a>'
    records = [
        r.replace(gpu_key=evil, gpu_name=evil, model=f"biformer{evil}", backend=f"{evil}", reason=evil)
        if r.backend != "gather"
        else r.replace(gpu_key=evil, gpu_name=evil, model=f"biformer{evil}", reason=evil)
        for r in modelled_records([A100])
    ]
    drawn = [panel for section in sections(records) for panel in section.panels]
    assert len(drawn) >= 4
    for panel in drawn:
        text = json.dumps([panel.title, panel.keys, panel.data, panel.layout])
        assert "<a" not in text
        assert "%{evil}" not in text
        assert "&lt;a" in text or "paper's formula" in panel.title
    rows = [row for section in sections(records) for row in section.rows]
    assert any(evil in map(str, row) for row in rows), "the data keep the text as it is"


@pytest.mark.parametrize("field", ["topk", "dtype", "direction", "l2"])
def test_a_series_over_resolution_has_one_setting(field: str) -> None:
    values = {
        "topk": ("2", "4"),
        "dtype": ("a", "b"),
        "direction": ("fwd", "fwd-bwd"),
        "l2": ("cold", "warm"),
    }
    records = [
        measured(attention(side=side).replace(extra=f'{{"n": "{value}"}}'), ms).replace(**{field: value})
        for side in (128, 256, 512)
        for value, ms in zip(values[field], (1.0, 9.0), strict=True)
    ]
    found: dict[str, list[float]] = {}
    for point in resolution.infos(records):
        found.setdefault(point.series, []).append(point.ms)
    assert sorted(found.values()) == [[1.0] * 3, [9.0] * 3]


def test_names_of_points_stand_inside_the_plot_and_neighbours_on_other_sides() -> None:
    assert label_sides([(1.0, 5.0), (9.0, 1.0), (10.0, 2.0)]) == ["bottom right", "top left", "bottom left"]


def test_another_function_is_another_series() -> None:
    changed = model(topk="1,2,4,-2").replace(task="classification", n_win="8,8,8,0")
    (bar,) = throughput.infos([measured(changed, 2.0)])
    assert bar.series == "biformer_tiny (S 8, k 1/2/4/-2) · gather everywhere"


def test_a_row_that_says_nothing_of_top_k_has_its_bar() -> None:
    whole = measured(model().replace(task="classification"), 2.0)
    (bar,) = throughput.infos([whole.replace(topk="", n_win="")])
    assert bar.series.startswith("biformer_tiny")


@pytest.mark.parametrize("cell", ["{", "[]", "[" * 100_000, '{"extra":5}', '{"extra":"[1]"}'])
def test_a_row_that_describes_no_cell_is_drawn_where_its_columns_say_enough(cell: str) -> None:
    rows = [measured(model(), 2.0).replace(cell=cell)]
    assert throughput.infos(rows)
    assert roofline.infos([row.replace(part="attention", stage=1) for row in rows])[1] == []
    assert stages.infos([row.replace(part="attention", stage=1, topk="1", n_win="7") for row in rows])


def test_a_bound_is_beside_a_bar_and_never_one() -> None:
    cell = model()
    bars_found = throughput.infos([predict_cell(cell, A100), bound_cell(cell, A100)])
    assert [b.evidence for b in bars_found] == ["modelled"]
    assert bars_found[0].bound is not None
    assert bars_found[0].bound > bars_found[0].images_per_s


def test_a_measured_model_on_a_known_board_gets_a_bound() -> None:
    records = facts.with_bounds([measured(model(), 2.0)])
    assert [r.evidence for r in records] == ["measured", "bound"]
    (bar,) = throughput.infos(records)
    assert bar.bound is not None


def test_failures_are_no_times() -> None:
    failed = Record.of(model(), MACHINE, outcome="oom", reason="out of memory")
    assert throughput.infos([failed]) == []


def test_speedups_are_over_gather_on_the_same_call() -> None:
    records = [measured(attention(s, b), ms) for s, b, ms in ((1, "gather", 4.0), (1, "triton", 1.0))]
    records += [measured(attention(2, "triton"), 1.0)]
    cells = speedup.infos(records)
    assert {(c.backend, c.stage): round(c.speedup, 6) for c in cells} == {
        ("gather", 1): 1,
        ("triton", 1): 4,
    }
    triton = next(c for c in cells if c.backend == "triton")
    assert triton.lo == pytest.approx(4 * 0.9 / 1.2)
    assert triton.hi == pytest.approx(4 * 1.2 / 0.9)


def test_a_speedup_is_the_ratio_that_was_measured_in_turn() -> None:
    records = [measured(attention(1, "gather"), 4.0)]
    records.append(measured(attention(1, "triton"), 1.0).replace(ratio=3.0, ratio_lo=2.9, ratio_hi=3.1))
    (triton,) = (c for c in speedup.infos(records) if c.backend == "triton")
    assert (triton.speedup, triton.lo, triton.hi) == (3.0, 2.9, 3.1)


def test_a_speedup_over_a_model_is_no_measurement() -> None:
    records = [predict_cell(attention(), A100), measured(attention(1, "triton"), 0.01)]
    assert {c.evidence for c in speedup.infos(records)} == {"modelled"}


def test_part_times_count_every_block_of_the_stage() -> None:
    rows = stages.infos([measured(attention(3), 0.5), measured(attention().replace(part="mlp"), 1.0)])
    assert {(r.part, r.stage): r.ms for r in rows} == {("attention", 3): 2.0, ("mlp", 1): 4.0}


def of_s(cell: Cell, n_win: str, topk: str = "2") -> Cell:
    return cell.replace(n_win=n_win, topk=topk)


def test_stage_times_of_several_s_stand_apart_and_are_never_added() -> None:
    times = (("7", 1.0), ("8", 2.0), ("14", 4.0))
    rows = stages.infos([measured(of_s(attention(), s), ms) for s, ms in times])
    assert {r.setting: r.ms for r in rows} == {"S 7": 4.0, "S 8": 8.0, "S 14": 16.0}
    (panel,) = stages.panels(rows)
    lanes = [name for trace in panel.data for name in trace["y"]]
    assert sorted(lanes) == ["stage 1  S 14  gather", "stage 1  S 7  gather", "stage 1  S 8  gather"]


def test_stage_times_of_other_caches_and_routes_are_not_added() -> None:
    cells = (
        attention(),
        attention().replace(l2="warm"),
        attention().replace(route_distribution="random"),
        attention().replace(config='{"block": 1}'),
    )
    for panel in stages.panels(stages.infos([measured(cell, 1.0) for cell in cells])):
        lanes = [name for trace in panel.data for name in trace["y"]]
        assert len(lanes) == len(set(lanes)), panel.title


def test_speedups_of_several_top_k_are_columns_of_their_own() -> None:
    records = [
        measured(of_s(attention(1, backend), "7", k), ms)
        for backend, k, ms in (
            ("gather", "1", 2.0),
            ("triton", "1", 1.0),
            ("gather", "4", 9.0),
            ("triton", "4", 1.0),
        )
    ]
    rows = speedup.infos(records)
    assert {r.setting: round(r.speedup, 6) for r in rows if r.backend == "triton"} == {"k 1": 2, "k 4": 9}
    (panel,) = speedup.panels(rows)
    assert panel.data[0]["x"] == ["stage 1<br>k 1", "stage 1<br>k 4"]


def test_forms_of_a_model_are_series_of_their_own() -> None:
    forms = (("published", ""), ("runtime", "auto"), ("plain", "auto"))
    records = [measured(model(backend).replace(form=form), 2.0) for form, backend in forms]
    assert {bar.series for bar in throughput.infos(records)} == {
        "biformer_tiny · published",
        "biformer_tiny · runtime",
        "biformer_tiny · auto",
    }


def test_a_roofline_point_is_useful_operations_over_time_and_least_bytes() -> None:
    cell = attention()
    roofs, found = roofline.infos([measured(cell, 0.1)])
    assert roofs == [roofline.Roof("a100 bfloat16", 312, 2039)]
    assert found[0].tflops == pytest.approx(2 * cell.problem.attention_macs / 0.1 / 1e9)
    assert found[0].intensity == pytest.approx(2 * cell.problem.attention_macs / cell.problem.io_bytes)


def test_a_cpu_has_no_roof() -> None:
    cpu = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="some CPU", sm_count=2)
    assert roofline.infos([Record.of(attention(), cpu, median_ms=1.0)]) == ([], [])


def test_the_front_holds_what_nothing_beats_and_the_default_is_marked() -> None:
    records = [
        measured(model(topk=k), ms, peak_alloc_mb=mb)
        for k, ms, mb in (("1,4,16,-2", 3.0, 30.0), ("1,1,1,-2", 1.0, 10.0), ("2,2,2,-2", 2.0, 40.0))
    ]
    found = {p.setting.split(", ")[1]: p for p in plans.infos(records)}
    assert {k: p.on_front for k, p in found.items()} == {
        "top-k 1,4,16,-2": False,
        "top-k 1,1,1,-2": True,
        "top-k 2,2,2,-2": False,
    }
    assert {k: p.mark for k, p in found.items() if p.mark} == {"top-k 1,4,16,-2": "default"}


def test_the_chosen_plan_is_marked_by_its_setting() -> None:
    plan = {
        "model": "biformer_tiny",
        "stages": [
            {"topk": k, "backend": b, "kind": kind, "n_win": 7}
            for k, b, kind in (
                (1, "triton", "routed"),
                (1, "dense", "routed"),
                (1, "dense", "routed"),
                (-2, "", "full"),
            )
        ],
    }
    records = [
        measured(model("triton,dense,dense,gather-sdpa", "1,1,1,-2"), 1.0, peak_alloc_mb=1.0),
        measured(model("dense", "1,1,1,-2"), 1.0, peak_alloc_mb=1.0),
        measured(
            model("triton,dense,dense,gather-sdpa", "1,1,1,-2").replace(n_win="14,7,7,7"),
            1.0,
            peak_alloc_mb=1.0,
        ),
    ]
    marks = {p.setting: p.mark for p in plans.infos(records, plan)}
    assert sorted(marks.values()) == ["", "", "chosen"]


def test_tuned_settings_show_what_was_verified() -> None:
    def row(
        setting: str, ms: float, mb: float, divergence: float | None, **more: object
    ) -> dict[str, object]:
        base = {"name": "", "picked": False, "front": True, "evidence": "E2"}
        return base | {"setting": setting, "ms": ms, "peak_alloc_mb": mb, "divergence": divergence} | more

    plan = {
        "model": "biformer_tiny",
        "resolution": [224, 224],
        "batch": 1,
        "dtype": "bfloat16",
        "direction": "fwd",
        "measured": "measured",
        "machine": {"gpu_key": "a100"},
        "front": [
            row("a", 3.0, 30.0, 0.0, name="default"),
            row("b", 1.0, 10.0, 0.02, picked=True),
            row("c", 2.0, 40.0, 0.01, front=False),
        ],
    }
    found = plans.tuned_points(plan)
    assert [(p.setting, p.mark, p.divergence) for p in found] == [
        ("b", "chosen", 0.02),
        ("c", "", 0.01),
        ("a", "default", 0.0),
    ]
    memory, fidelity = plans.panels(found)
    assert memory.layout["yaxis"]["title"]["text"] == "peak memory, MB"
    assert fidelity.layout["yaxis"]["title"]["text"] == "divergence of the outputs"
    front = fidelity.data[0]
    assert (front["x"], front["y"]) == ([1.0, 2.0, 3.0], [0.02, 0.01, 0.0])
    assert memory.data[0]["x"] == [1.0]


def test_the_report_says_what_routed_regions_hold_where_it_was_looked_at() -> None:
    layers = [
        {"stage": 1, "block": block, "regions": 49, "topk": 4, "routed": routed, "best": 0.9}
        for block, routed in ((1, 0.5), (2, 0.7))
    ]
    plan = {"diagnostics": {"recall": {"plan": layers}}}
    (section,) = (s for s in sections([], plan) if s.name == "pareto")
    assert section.lead.endswith(
        "Attention mass in routed regions, of the best possible (plan; decides nothing): "
        "stage 1 0.60 of 0.90 (k 4/49)."
    )
    (section,) = (s for s in sections([]) if s.name == "pareto")
    assert "routed regions" not in section.lead


def test_one_setting_is_no_front() -> None:
    assert plans.infos([measured(model(), 1.0, peak_alloc_mb=1.0)]) == []


def test_the_formula_grows_as_the_paper_says() -> None:
    """Dense attention as N^2, S growing with the map as N^(4/3); S fixed ends as N^2, too."""
    rows = resolution.complexity(channels=1, sides=(2**15, 2**17))
    by_rule = {rule: [r.gmacs for r in rows if r.rule == rule] for rule in ("dense", "S ~ N^(1/3)", "S = 7")}
    growth = {rule: math.log(b / a, 16) for rule, (a, b) in by_rule.items()}
    assert growth["dense"] == pytest.approx(2, abs=0.02)
    assert growth["S ~ N^(1/3)"] == pytest.approx(4 / 3, abs=0.02)
    assert growth["S = 7"] > 1.7
    assert by_rule["S ~ N^(1/3)"][0] < by_rule["S = 7"][0] < by_rule["dense"][0]


def test_scaling_needs_three_sizes() -> None:
    sizes = [measured(attention(side=side), side / 100) for side in (128, 256, 512)]
    assert [p.side for p in resolution.infos(sizes)] == [128, 256, 512]
    assert resolution.infos(sizes[:2]) == []


def test_energy_is_shown_where_it_was_measured() -> None:
    records = [
        measured(model(), 1.0, joules_per_image=0.5, energy_method="counter"),
        measured(attention(), 1.0),
    ]
    (bar,) = energy.infos(records)
    assert (bar.joules, bar.method) == (0.5, "counter")


# --- published ----------------------------------------------------------------------------------------

TIMM = """model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size,param_count,infer_gmacs
swin_tiny_patch4_window7_224.ms_in1k,224,2749.1,93.1,256,28.29,4.51
resnet50.a1_in1k,224,4303.0,59.5,256,25.56,4.11
"""


def test_a_timm_table_becomes_published_rows(tmp_path: Path) -> None:
    file = tmp_path / "benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv"
    file.write_text(TIMM)
    rows, gmacs = read_timm(file)
    assert [r.model for r in rows] == ["swin_tiny_patch4_window7_224", "resnet50"]
    first = rows[0]
    assert (first.evidence, first.gpu_key, first.amp, first.layout) == ("published", "rtx4090", True, "nhwc")
    assert (first.torch, first.cuda, first.batch) == ("2.4.0", "12.4", 256)
    assert first.images_per_s == pytest.approx(2749.1)
    assert gmacs["resnet50"] == 4.11
    found = peers.infos([*rows, measured(model(), 2.0)], gmacs)
    assert {(p.gpu, p.model) for p in found} == {
        ("rtx4090", "swin_tiny_patch4_window7_224"),
        ("rtx4090", "resnet50"),
        ("a100", "biformer_tiny"),
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("amp-nchw-pt240-cu124-rtx4090-dynamo", ("rtx4090", "compile", True, "float16")),
        ("amp_bf16-nchw-pt291-cu130-pro6000maxq-dynamo", ("rtxpro6000-maxq", "compile", True, "bfloat16")),
        ("bf16-nhwc-pt291-cu130-5090", ("rtx5090", "eager", False, "bfloat16")),
        ("fp32-nchw-pt240-cpu-i7_12700h", ("i7_12700h", "eager", False, "float32")),
    ],
)
def test_the_name_of_a_timm_table_says_board_and_dtype(
    name: str, said: tuple[str, str, bool, str], tmp_path: Path
) -> None:
    file = tmp_path / f"benchmark-infer-{name}.csv"
    file.write_text(TIMM + "failed_model,224,,,,,\n")
    rows, _ = read_timm(file)
    assert {(r.gpu_key, r.regime, r.amp, r.dtype) for r in rows} == {said}
    assert len(rows) == 2, "a model that failed has no time"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        TIMM.replace("2749.1", "fast"),
        TIMM.replace("2749.1", "inf"),
        TIMM.replace(",224,2749.1", ",inf,2749.1"),
        TIMM.replace("4.51", "nan"),
    ],
)
def test_what_is_no_timm_table_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text(text)
    with pytest.raises(StoreError):
        read_timm(file)


# --- drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", [e for e in EVIDENCE if e not in ("measured", "replayed", "bound")])
def test_what_was_not_measured_is_never_drawn_solid(evidence: str) -> None:
    assert style.bar_marker("#000", evidence)["pattern"]["fillmode"] == "replace"
    assert style.point_marker("#000", evidence)["symbol"].endswith("-open")
    assert style.line("#000", evidence)["dash"] != "solid"


def test_what_was_measured_is_drawn_solid() -> None:
    assert "pattern" not in style.bar_marker("#000", "measured")
    assert style.point_marker("#000", "measured")["symbol"] == "circle"
    assert style.line("#000", "measured")["dash"] == "solid"


def test_measured_and_modelled_rows_of_one_series_are_separate_traces() -> None:
    rows = throughput.infos([measured(model(), 2.0), predict_cell(model(), gpus.resolve("h200"))])
    (panel,) = throughput.panels(rows)
    patterns = sorted("pattern" in trace["marker"] for trace in panel.data)
    assert patterns == [False, True]
    assert {trace["legendgroup"] for trace in panel.data} == {throughput.PUBLISHED}


def all_panels() -> list[Panel]:
    records = facts.with_bounds(modelled_records([A100, gpus.resolve("rtx4090")]))
    roofs, under = roofline.infos(records)
    return [
        *throughput.panels(throughput.infos(records)),
        *stages.panels(stages.infos(records)),
        *speedup.panels(speedup.infos(records)),
        *roofline.panels(roofs, under),
        *plans.panels(plans.infos(records)),
        *resolution.panels(resolution.complexity(), resolution.infos(records)),
    ]


def test_every_legend_entry_switches_a_trace_and_every_axis_has_its_unit() -> None:
    panels = all_panels()
    assert len(panels) >= 15
    for panel in panels:
        groups = {trace.get("legendgroup") for trace in panel.data}
        assert {key.name for key in panel.keys} - {"roof"} <= groups
        kinds = {trace["type"] for trace in panel.data}
        assert panel.layout["xaxis"]["title"]["text"] or kinds == {"heatmap"}
        json.dumps([panel.data, panel.layout], allow_nan=False)


def test_titles_under_bars_fit_beside_the_names_on_a_phone() -> None:
    """They are centred under the bars, which names leave a third of 390 pixels."""
    titles = {
        panel.layout["xaxis"]["title"]["text"]
        for panel in all_panels()
        if any(trace["type"] == "bar" for trace in panel.data)
    }
    assert titles == {"images per second", "ms per stage"}
    assert max(map(len, titles)) <= 18


def test_modelled_figures_hold_no_solid_mark() -> None:
    for panel in all_panels():
        for trace in panel.data:
            marker = trace.get("marker", {})
            if trace["type"] == "bar":
                assert "pattern" in marker
            elif "markers" in trace.get("mode", ""):
                assert marker["symbol"].endswith("-open")


def test_plotly_accepts_every_figure() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    for panel in all_panels():
        go.Figure({"data": panel.data, "layout": panel.layout})
