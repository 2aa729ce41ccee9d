"""The model of absent GPUs: counts, shapes that must hold, refusals, fits and their check."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import random
from pathlib import Path

import pytest

from bratune import gpus, variant
from bratune.cell import Cell
from bratune.cli import run
from bratune.engine import Engine
from bratune.errors import UnknownNameError, UsageError
from bratune.gpus import GPU
from bratune.machine import Machine
from bratune.predict import fit, validate
from bratune.predict.attention import ATTENTION, attention_ops
from bratune.predict.coefficients import HOSTS, UNCALIBRATED, host_us_of
from bratune.predict.compiled import compiled_time
from bratune.predict.estimate import estimate
from bratune.predict.model import ModelEngine, bound_cell, predict_cell
from bratune.predict.public import PublishedFigure, published_figures
from bratune.predict.work import backward_ops, fuse
from bratune.problem import Problem
from bratune.record import Record
from bratune.store import Store


def stages(
    batch: int = 1, res: int = 224, n_win: int = 7, dtype: str = "bfloat16"
) -> tuple[variant.Stage, ...]:
    return variant.stages(
        variant.get_variant("biformer_small"), res, res, batch=batch, n_win=n_win, dtype=dtype
    )


def attention(stage: int = 1, backend: str = "gather", regime: str = "eager", **where: int | str) -> Cell:
    found = stages(**where)[stage - 1]  # type: ignore[arg-type]
    assert found.problem is not None
    return Cell(
        part="attention",
        problem=found.problem,
        backend=backend,
        model="biformer_small",
        image=(int(where.get("res", 224)),) * 2,
        stage=stage,
        regime=regime,
    )


def whole(
    name: str = "biformer_small", batch: int = 1, backend: str = "gather", regime: str = "eager"
) -> Cell:
    v = variant.get_variant(name)
    first = variant.stages(v, 224, 224, batch=batch, dtype="bfloat16")[0].problem
    assert first is not None
    return Cell(
        part="model",
        problem=first,
        backend=backend,
        model=name,
        task="classification",
        image=(224, 224),
        n_win="7",
        topk=",".join(map(str, v.topks)),
        regime=regime,
    )


A100, H200, T4 = (gpus.resolve(key) for key in ("a100", "h200", "t4"))


def with_(board: GPU, **changes: float) -> GPU:
    return dataclasses.replace(board, **changes)  # type: ignore[arg-type]


# --- counts -------------------------------------------------------------------------------------------


def test_gather_moves_twenty_passes_and_ten_per_route_over_the_map() -> None:
    """The official composition, counted on its code: about 22 + 10 k passes of N x C."""
    for stage, k in ((1, 1), (2, 4), (3, 16)):
        p = attention(stage, batch=128).problem
        one_pass = p.batch * p.tokens * p.channels * p.item_bytes
        moved = sum(op.read + op.written + op.reread for op in attention_ops(p, "gather"))
        assert moved / one_pass == pytest.approx(20 + 10 * k, rel=0.1)


def test_a_fused_kernel_moves_the_minimum_and_rereads_keys_through_the_cache() -> None:
    p = attention(3, batch=8).problem
    (kernel,) = attention_ops(p, "triton")
    assert kernel.read + kernel.written == p.io_bytes
    assert kernel.reread == p.gathered_bytes - p.io_bytes / 2


def test_a_region_of_four_queries_occupies_a_tile_of_sixteen_rows() -> None:
    p = attention(3, batch=8).problem
    assert p.region_tokens == 4
    (kernel,) = attention_ops(p, "triton")
    assert kernel.macs == 4 * p.attention_macs
    full = attention(1, batch=8).problem
    assert attention_ops(full, "triton")[0].macs == full.attention_macs


def test_the_official_model_launches_as_many_kernels_as_were_counted_on_it() -> None:
    assert estimate(whole(), H200).launches == pytest.approx(868, rel=0.05)


@pytest.mark.parametrize("backend", sorted(ATTENTION))
def test_backward_costs_more_than_forward(backend: str) -> None:
    forward = attention(2, backend, batch=32)
    both = forward.replace(problem=forward.problem.replace(direction="fwd-bwd"))
    assert estimate(both, A100).device_ms > 1.8 * estimate(forward, A100).device_ms
    assert len(backward_ops(attention_ops(forward.problem, backend))) >= 1


def test_a_compiler_merges_runs_of_copies_and_keeps_products() -> None:
    ops = attention_ops(attention(1).problem, "gather")
    merged = fuse(ops)
    assert len(merged) < len(ops)
    assert sum(op.macs for op in merged) == sum(op.macs for op in ops)
    assert sum(op.read + op.written for op in merged) < sum(op.read + op.written for op in ops)


# --- shapes that must hold ----------------------------------------------------------------------------


def test_a_launch_bound_model_costs_the_same_for_one_image_and_for_four() -> None:
    one, four = (estimate(whole(batch=b), H200) for b in (1, 4))
    assert one.launch_bound
    assert four.launch_bound
    assert one.ms == pytest.approx(four.ms)
    assert estimate(whole(batch=128), H200).ms > 2 * one.ms


def test_a_cuda_graph_removes_the_host_and_nothing_else() -> None:
    eager, graph = (estimate(whole(regime=r), H200) for r in ("eager", "graph"))
    assert graph.ms < 0.6 * eager.ms
    big_eager, big_graph = (estimate(whole(batch=256, regime=r), H200) for r in ("eager", "graph"))
    assert big_graph.ms == pytest.approx(big_eager.ms, rel=0.05)


def test_models_of_equal_flops_differ_in_throughput() -> None:
    small, stl = variant.get_variant("biformer_small"), variant.get_variant("biformer_stl")
    assert small.gmacs_224 == pytest.approx(stl.gmacs_224, rel=0.03)
    for board in (A100, H200, gpus.resolve("rtx4090")):
        ratio = estimate(whole(batch=64), board).ms / estimate(whole("biformer_stl", batch=64), board).ms
        assert ratio > 1.2, board.key


@pytest.mark.parametrize("backend", sorted(ATTENTION))
@pytest.mark.parametrize("field", ["memory_gbps", "bf16_tensor_tflops", "sm_count", "boost_mhz", "l2_mib"])
def test_more_of_a_resource_never_makes_a_kernel_slower(backend: str, field: str) -> None:
    value = getattr(A100, field)
    for stage in (1, 2, 3):
        cell = attention(stage, backend, batch=64)
        times = [estimate(cell, with_(A100, **{field: f * value})).ms for f in (0.5, 1, 2, 4)]
        # A last wave of blocks that is not full makes the number of multiprocessors lumpy.
        slack = 1.1 if field == "sm_count" else 1 + 1e-9
        assert all(b <= a * slack for a, b in itertools.pairwise(times)), times


def test_double_bandwidth_halves_a_memory_bound_part() -> None:
    cell = attention(1, "gather", batch=512)
    before, after = (estimate(cell, with_(A100, memory_gbps=2039 * f, l2_mib=0.001)).ms for f in (1, 2))
    assert before / after == pytest.approx(2, rel=0.15)


def test_no_prediction_beats_its_bound() -> None:
    for board in gpus.table():
        dtype = "bfloat16" if not gpus.why_not_dtype(board, "bfloat16") else "float16"
        if board.peak_tflops(dtype) is None:
            continue
        for batch in (1, 128):
            cells = [attention(s, "triton", batch=batch, dtype=dtype) for s in (1, 2, 3)]
            model = whole(batch=batch, backend="triton", regime="graph")
            cells.append(model.replace(problem=model.problem.replace(dtype=dtype)))
            for cell in cells:
                floor = bound_cell(cell, board).median_ms
                assert floor is not None
                assert estimate(cell, board).ms >= floor, (board.key, str(cell))


def test_data_that_fits_the_cache_is_not_fetched_from_memory_twice() -> None:
    cell = attention(3, "gather", batch=2)
    small, large = (with_(H200, l2_mib=mib) for mib in (0.01, 500.0))
    assert estimate(cell, large).memory_bytes < 0.2 * estimate(cell, small).memory_bytes


@pytest.mark.parametrize("part", ["pos_embed", "norm", "qkv", "routing", "lepe", "proj", "mlp", "block"])
def test_every_part_of_a_block_has_a_time(part: str) -> None:
    cell = attention(2, batch=16).replace(part=part, backend="gather" if part == "block" else "")
    assert estimate(cell, A100).ms > 0


def test_a_block_is_the_sum_of_its_parts() -> None:
    cell = attention(2, "gather", batch=256, regime="graph")
    names = ("pos_embed", "norm", "qkv", "routing", "attention", "lepe", "proj", "mlp")
    parts = [estimate(cell.replace(part=name), A100).device_ms for name in names]
    block = estimate(cell.replace(part="block"), A100).device_ms
    assert block == pytest.approx(sum(parts))


def test_full_attention_is_computed_by_the_module_whatever_a_backend_thinks_of_it() -> None:
    last = stages(batch=8)[3]
    assert last.problem is not None
    cell = attention(1).replace(part="attention", problem=last.problem, stage=4, topk="-2")
    composed, fused = (predict_cell(cell.replace(backend=b), A100) for b in ("gather", "gather-sdpa"))
    assert composed.ok
    assert fused.ok
    assert composed.median_ms is not None
    assert fused.median_ms is not None
    assert composed.median_ms > fused.median_ms


# --- rows and refusals --------------------------------------------------------------------------------


def test_a_modelled_row_says_so_and_has_an_interval_and_a_bound() -> None:
    row, floor = predict_cell(whole(batch=8), A100), bound_cell(whole(batch=8), A100)
    assert (row.evidence, row.outcome, row.gpu_key) == ("modelled", "modelled", "a100")
    assert row.ci_lo_ms is not None
    assert row.median_ms is not None
    assert row.ci_hi_ms is not None
    assert row.ci_lo_ms < row.median_ms < row.ci_hi_ms
    assert row.images_per_s == pytest.approx(8e3 / row.median_ms)
    assert "uncalibrated" in row.reason
    assert (row.speedup, row.baseline) == (1.0, "gather")
    assert floor.evidence == "bound"
    assert floor.median_ms is not None
    assert row.roofline_pct == pytest.approx(100 * floor.median_ms / row.median_ms)
    assert Record.from_json(row.to_json()) == row


def test_an_unsupported_dtype_is_a_row_with_the_reason() -> None:
    for row in (predict_cell(attention(1), T4), bound_cell(attention(1), T4)):
        assert row.outcome == "unsupported"
        assert row.median_ms is None
        assert "no bfloat16 arithmetic" in row.reason


def test_a_backend_whose_work_is_not_counted_is_a_row_with_the_reason() -> None:
    row = predict_cell(attention(1, "somebody-elses"), A100)
    assert row.outcome == "unsupported"
    assert "not counted" in row.reason


def test_a_call_that_does_not_fit_the_memory_is_a_row_with_the_reason() -> None:
    row = predict_cell(attention(1, "gather", batch=100_000), A100)
    assert row.outcome == "unsupported"
    assert "GiB" in row.reason


def test_a_board_without_published_rates_is_refused_with_what_is_missing() -> None:
    with pytest.raises(UsageError, match="no published bfloat16 peak or clock"):
        estimate(attention(1), dataclasses.replace(A100, boost_mhz=None, bf16_tensor_tflops=None))


def test_the_engine_is_an_engine_and_says_first_that_the_gpu_is_absent() -> None:
    engine = ModelEngine(A100)
    assert isinstance(engine, Engine)
    assert engine.machine.gpu_key == "a100"
    assert engine.notice.startswith("A100-SXM4-80GB is not here: rows are modelled, not measured")
    rows = list(engine.run([attention(1), attention(2)]))
    assert [row.evidence for row in rows] == ["modelled", "modelled"]


# --- compiled kernels ---------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("key", ["a100", "rtx4090", "h200"])
def test_the_fused_backend_is_costed_from_kernels_compiled_for_the_board(key: str) -> None:
    cell, board = attention(2, "triton", batch=64, regime="graph"), gpus.resolve(key)
    row = predict_cell(cell, board, compiled=True)
    target = "sm" + board.compute_capability.replace(".", "")
    assert f"compiled for {target}" in row.reason
    assert "registers" in row.reason
    counted = estimate(cell, board)
    assert row.median_ms is not None
    assert 0.3 < row.median_ms / counted.ms < 3


@pytest.mark.compile
def test_a_board_without_a_compile_target_is_counted() -> None:
    cell = attention(2, "gather", batch=64, dtype="float16")
    assert predict_cell(cell, T4, compiled=True).median_ms == predict_cell(cell, T4).median_ms
    assert compiled_time(attention(2, "triton", dtype="float16").problem, gpus.resolve("v100")) is None


def test_a_process_that_interprets_kernels_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiled_time.cache_clear()
    assert compiled_time(attention(1, "triton").problem, A100) is None
    compiled_time.cache_clear()


# --- fit and check ------------------------------------------------------------------------------------


def measured(cell: Cell, board: GPU, slower: float = 1.0) -> Record:
    """A record as a meter would write it, on a board where everything takes ``slower`` times the model."""
    machine = Machine(
        kind="cuda",
        device="cuda:0",
        gpu_key=board.key,
        gpu_name=f"NVIDIA {board.name}",
        sm_count=board.sm_count or 0,
        memory_gib=board.memory_gib or 0.0,
    )
    found = estimate(cell, board)
    return Record.of(cell, machine, median_ms=found.device_ms * slower, launch_bound=False)


def big_cells(backend: str = "gather") -> list[Cell]:
    return [attention(s, backend, batch=b, regime="graph") for s in (1, 2, 3) for b in (32, 64, 128, 256)]


def test_a_factor_found_on_one_gpu_is_carried_to_another() -> None:
    records = [measured(cell, H200, 1.7) for cell in big_cells()]
    c = fit.calibrate(fit.samples_of(records))
    assert c.factor("gather") == pytest.approx(1.7, rel=1e-6)
    cell = big_cells()[0]
    assert estimate(cell, A100, c).ms == pytest.approx(1.7 * estimate(cell, A100).ms, rel=1e-6)
    here, there = predict_cell(cell, H200, c), predict_cell(cell, A100, c)
    assert here.ci_hi_ms is not None
    assert here.median_ms is not None
    assert there.ci_hi_ms is not None
    assert there.median_ms is not None
    plain = predict_cell(cell, A100)
    assert plain.ci_hi_ms is not None
    assert plain.median_ms is not None
    widths = [r.ci_hi_ms / r.median_ms for r in (here, there, plain)]  # type: ignore[operator]
    assert widths == sorted(widths)
    assert "carried over" in there.reason


def test_host_time_per_launch_comes_from_records_that_the_host_limits() -> None:
    records = []
    for batch in (1, 2, 3, 4):
        cell = whole(batch=batch)
        launches = estimate(cell, H200).launches
        row = measured(cell, H200)
        records.append(row.replace(median_ms=launches * 0.012, launch_bound=True))
    c = fit.calibrate(fit.samples_of(records))
    assert c.host_fitted
    assert c.host_us == pytest.approx(12)


def test_a_record_that_does_not_say_what_limits_it_is_judged_by_the_model() -> None:
    rows = [measured(whole(batch=b), H200).replace(launch_bound=None) for b in (1, 128)]
    assert [s.launch_bound for s in fit.samples_of(rows)] == [True, False]


def test_a_cpu_never_informs_the_model_of_a_gpu() -> None:
    cpu = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="some CPU", sm_count=2, threads=2)
    rows = [Record.of(cell, cpu, median_ms=50.0 + i) for i, cell in enumerate(big_cells())]
    assert fit.calibrate(fit.samples_of(rows)) is UNCALIBRATED
    assert fit.calibrate(fit.samples_of(rows), cpu=True).sources == ("cpu",)


def test_rows_that_are_not_measured_are_never_fitted() -> None:
    rows = [predict_cell(cell, H200) for cell in big_cells()]
    assert fit.samples_of(rows) == []


def test_each_gpu_is_predicted_from_the_others_alone() -> None:
    """Boards that are 2x and 1x the model: each predicts the other wrongly by exactly that factor."""
    records = [measured(cell, H200, 2.0) for cell in big_cells()]
    records += [measured(cell, A100, 1.0) for cell in big_cells()]
    checked = validate.check(records)
    ratios = {c.gpu_key: c.predicted_ms / c.measured_ms for c in checked}
    assert ratios["a100"] == pytest.approx(2.0, rel=1e-6)
    assert ratios["h200"] == pytest.approx(0.5, rel=1e-6)
    assert validate.verdict(checked) == "2 GPUs were measured; each was predicted from the others alone"
    rows = validate.error_rows(checked)
    assert [(r.gpu_key, r.name, r.records) for r in rows][:2] == [("a100", "", 12), ("a100", "gather", 12)]
    assert rows[0].median_pct == pytest.approx(100)
    assert rows[0].rank == pytest.approx(1)


def test_intervals_cover_what_they_promise_under_the_spread_they_were_fitted_to() -> None:
    rng = random.Random(0)
    cells = [attention(s, "gather", batch=b, regime="graph") for s in (1, 2, 3) for b in range(32, 512, 8)]
    records = [measured(cell, H200, math.exp(rng.gauss(0.4, 0.2))) for cell in cells]
    checked = validate.check(records)
    assert len(checked) == len(cells)
    assert 0.90 <= sum(c.covered for c in checked) / len(checked) <= 1.0


def test_one_gpu_and_none_are_called_what_they_are() -> None:
    assert "says nothing about carrying over" in validate.verdict(
        validate.check([measured(cell, H200) for cell in big_cells()])
    )
    assert "unchecked" in validate.verdict([])


def test_each_cpu_is_predicted_from_the_others_alone() -> None:
    """Two CPUs, the second three times slower: without its own rows it is predicted as the first is."""

    def cpu(name: str) -> Machine:
        return Machine(
            kind="cpu", device="cpu", gpu_key="cpu", gpu_name=name, sm_count=4, threads=4, memory_gib=16.0
        )

    cells = [cell for cell in big_cells() if cell.backend != "triton"]
    ms = [estimate(cell, H200).device_ms * 100 for cell in cells]
    rows = [Record.of(cell, cpu("Fast"), median_ms=t) for cell, t in zip(cells, ms, strict=True)]
    rows += [Record.of(cell, cpu("Slow"), median_ms=3 * t) for cell, t in zip(cells, ms, strict=True)]
    checked = validate.check(rows)
    bias = {row.gpu_key: row.bias_factor for row in validate.error_rows(checked) if not row.name}
    assert set(bias) == {"cpu-fast-4c", "cpu-slow-4c"}
    assert bias["cpu-slow-4c"] * 8 < bias["cpu-fast-4c"]
    assert validate.verdict(checked).startswith("2 CPUs were measured, each predicted from the others alone")


# --- command line -------------------------------------------------------------------------------------


def test_predict_prints_rows_and_what_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    assert run(["predict", "--gpu", "a100", "-b", "1", "--backend", "gather", "-o", str(target)]) == 0
    out, err = capsys.readouterr()
    assert "a100 -> A100-SXM4-80GB (documented default" in err
    assert "modelled, not measured" in out
    assert {r.evidence for r in Store(target).records()} == {"modelled", "bound"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "predict needs a GPU"),
        (["--gpu", "a1000"], "no GPU is called 'a1000'"),
        (["--gpu", "a100", "--res", "5x"], "is not a size"),
        (["--gpu-spec", "missing.yaml"], "cannot be read"),
        (["--gpu", "t4", "--dtype", "bf16"], "no bfloat16 arithmetic"),
        (["--gpu", "a100", "--backend", "fast"], "no backend is called 'fast'"),
        (["--gpu", "a100", "--host", "quick"], "--host quick"),
    ],
)
def test_what_cannot_be_predicted_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["predict", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_dtype_that_a_board_lacks_is_refused_once(capsys: pytest.CaptureFixture[str]) -> None:
    """With another board beside it, its rows are left out with one line."""
    line = "predict --gpu t4 --gpu a100 --dtype bf16 -b 1 --backend gather"
    assert run(line.split()) == 0
    out, err = capsys.readouterr()
    assert err.count("no bfloat16 arithmetic") == 1
    assert "not there" not in out
    assert {row.split()[0] for row in out.splitlines() if "launches" in row} == {"a100"}


def test_a_dtype_that_suits_the_board_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    for gpu, dtype in (("t4", "float16"), ("a100", "bfloat16")):
        assert run(["predict", "--gpu", gpu, "-b", "1", "--backend", "gather", "--format", "json"]) == 0
        rows = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
        assert {row["dtype"] for row in rows} == {dtype}


def test_a_backend_that_a_board_cannot_run_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", "--gpu", "t4", "-b", "1", "--backend", "triton", "--backend", "gather"]) == 0
    out = capsys.readouterr().out
    assert out.count("needs compute capability 8.0") == 1


def test_peers_stand_beside_our_models(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    line = "predict --gpu rtx4090 -b 128 --dtype fp16 --amp --backend gather --no-compile --format json"
    assert run([*line.split(), "--peers", "resnet50,swin_tiny"]) == 0
    rows = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    peers = {
        r["model"]: r["images_per_s"] for r in rows if r["form"] == "timm" and r["evidence"] == "modelled"
    }
    published = {f.model: f.images_per_s for f in published_figures() if _is_eager_4090(f)}
    assert set(peers) == {"resnet50", "swin_tiny_patch4_window7_224"}
    for name, speed in peers.items():
        assert speed == pytest.approx(published[name], rel=0.15)


def _is_eager_4090(figure: PublishedFigure) -> bool:
    how = figure.gpu, figure.regime, figure.layout, figure.software.split(",")[0]
    return how == ("rtx4090", "eager", "nchw", "torch 2.9.1")


def test_a_form_whose_operations_are_not_listed_is_not_taken_for_another() -> None:
    published = predict_cell(whole(batch=64).replace(form="published", backend=""), A100)
    assert published.median_ms == predict_cell(whole(batch=64), A100).median_ms
    row = predict_cell(whole(batch=64).replace(form="runtime", backend="auto"), A100)
    assert row.outcome == "unsupported"
    assert "'runtime'" in row.reason


def test_validate_prints_the_error_of_every_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = Store(tmp_path / "rows.jsonl")
    for cell in big_cells():
        target.append(measured(cell, H200, 1.5))
    assert run(["predict", "--validate", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "only one GPU was measured (h200)" in out
    assert "gather" in out


def test_problem_sizes_of_a_bare_call_are_enough() -> None:
    p = Problem(batch=2, height=32, width=32, heads=4, head_dim=32, region=(8, 8), topk=4, dtype="float16")
    assert predict_cell(Cell(part="attention", problem=p, backend="gather"), T4).ok


# --- profile on an absent board -----------------------------------------------------------------------


def test_profile_of_an_absent_gpu_says_first_that_rows_are_modelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "profile --gpu a100 --res 512 --stage 1 --no-whole-model --backend gather"
    assert run([*arguments.split(), "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("A100-SXM4-80GB is not here: rows are modelled, not measured")
    assert "a100 -> A100-SXM4-80GB (documented default" in err.splitlines()[0]
    assert "modelled" in out
    rows = [r for r in Store(tmp_path / "records.jsonl").records() if r.outcome != "started"]
    assert rows
    assert {(r.evidence, r.gpu_key) for r in rows} == {("modelled", "a100")}


def test_profile_refuses_a_dtype_that_an_absent_gpu_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["profile", "--gpu", "t4", "--dtype", "bf16", "-o", str(tmp_path / "x")]) == 2
    assert "no bfloat16 arithmetic" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_profile_of_a_described_gpu_uses_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "mine.yaml"
    spec.write_text("key: mine\nname: My board\nlike: a100\nsm_count: 54\nmemory_gbps: 1000\n")
    arguments = f"profile --gpu-spec {spec} --stage 1 --no-whole-model --backend gather -o {tmp_path / 'out'}"
    assert run(arguments.split()) == 0
    assert capsys.readouterr().err.startswith("My board is not here")
    rows = Store(tmp_path / "out" / "records.jsonl").records()
    assert {r.sm_count for r in rows} == {54}
    assert run(["profile", "--gpu", "a100", "--gpu-spec", str(spec), "-o", str(tmp_path / "o")]) == 2


# --- public rates --------------------------------------------------------------------------------------


def test_operations_that_nobody_published_keep_the_uncalibrated_interval() -> None:
    """Routing has no like among models of timm; a linear layer has."""
    own = predict_cell(attention(2, "gather", batch=128).replace(part="routing", backend=""), A100)
    linear = predict_cell(attention(2, "gather", batch=128).replace(part="qkv", backend=""), A100)
    for row in (own, linear):
        assert row.ci_lo_ms is not None
        assert row.median_ms is not None
    assert "nobody published the like of" in own.reason
    assert "nobody published the like of" not in linear.reason
    assert "carried over by specifications" in linear.reason


def test_a_model_is_better_known_than_its_attention_alone() -> None:
    def width(cell: Cell) -> float:
        row = predict_cell(cell, gpus.resolve("rtx4090"))
        assert row.ci_hi_ms is not None
        assert row.median_ms is not None
        return row.ci_hi_ms / row.median_ms

    assert width(whole(batch=128)) < width(attention(2, batch=128))
    assert width(whole(batch=128)) < 1.8


def test_an_unknown_host_widens_a_small_batch_upwards_and_a_known_one_does_not() -> None:
    row = predict_cell(whole(batch=1), A100)
    known = predict_cell(whole(batch=1), A100, dataclasses.replace(UNCALIBRATED, host_fitted=True))
    assert row.launch_bound
    assert row.median_ms == known.median_ms
    assert row.median_ms is not None
    assert row.ci_hi_ms == pytest.approx(row.median_ms * HOSTS["slow"] / HOSTS["typical"])
    assert known.ci_hi_ms == pytest.approx(row.median_ms * 1.3)
    assert row.ci_hi_ms is not None
    # A published BiFormer-S took 59 us per kernel: inside.
    assert row.ci_hi_ms > estimate(whole(), A100).launches * 59e-3
    assert "15 us per operation (a typical host, others 8 to 60)" in row.reason
    assert "typical" not in known.reason


@pytest.mark.parametrize(("text", "us"), [("slow", 60.0), ("fast", 8.0), ("12.5", 12.5), ("9us", 9.0)])
def test_a_host_is_a_name_or_microseconds(text: str, us: float) -> None:
    assert host_us_of(text) == us


@pytest.mark.parametrize("text", ["quick", "0", "-3", "nan"])
def test_a_host_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="slow"):
        host_us_of(text)


def test_counts_of_our_models_agree_with_what_runs() -> None:
    """The kernels that are listed move and multiply what the published composition does, by kind."""
    import torch

    from bratune.kernels.accounting import count
    from bratune.kernels.biformer import BiFormer, build
    from bratune.kernels.published import as_published
    from bratune.predict.counted import loads
    from bratune.predict.parts import groups

    with torch.device("meta"):
        plain = build("biformer_small", backend="gather")
        assert isinstance(plain, BiFormer)
        model = as_published(plain).eval()
        x = torch.empty(8, 3, 224, 224)
    run = loads(count(lambda: model(x), weights=model, fused_attention=True).by_operation)
    cell = whole(batch=8, backend="gather")
    listed: dict[str, list[float]] = {}
    for group in groups(cell):
        for op in group.ops:
            one = listed.setdefault(op.rate_kind or op.kind, [0.0, 0.0])
            one[0] += group.times * op.rate_macs
            one[1] += group.times * (op.read + op.written + op.reread)
    macs = sum(load.macs for load in run.values())
    assert sum(m for m, _ in listed.values()) == pytest.approx(macs, rel=0.35)  # tiles are filled up
    for kind in ("gemm", "copy", "layer-norm"):
        assert listed[kind][1] == pytest.approx(run[kind].moved, rel=0.35), kind
    total = sum(load.moved for load in run.values())
    assert sum(b for _, b in listed.values()) == pytest.approx(total, rel=0.15)


def test_a_peer_is_predicted_like_a_model_of_ours() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    cell = whole(batch=64).replace(
        model="swin_tiny_patch4_window7_224", backend="timm", n_win="", topk="", amp=True, layout="nchw"
    )
    board = gpus.resolve("rtx4090")
    row, floor = predict_cell(cell, board), bound_cell(cell, board)
    assert row.outcome == "modelled"
    assert floor.median_ms is not None
    assert row.median_ms is not None
    assert floor.median_ms < row.median_ms
    # Published for this board: 2749 images per second.
    assert row.images_per_s == pytest.approx(2749, rel=0.1)
    with pytest.raises(UnknownNameError, match="no model of timm is called 'swin_tiny'"):
        predict_cell(cell.replace(model="swin_tiny"), board)
