"""The proof of the fused kernels asks fair questions and reads the answers right; nothing runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sample_plans import H200

from bratune.cli import run
from bratune.kernels.fused.call import as_text, call_for
from bratune.kernels.fused.families import backward_families, forward_families
from bratune.measure.settings import MeterSettings
from bratune.record import Record
from bratune.studies import execute_kernels
from bratune.studies import kernels as proof
from bratune.studies.__main__ import studies


def test_every_size_is_asked_of_every_backend_in_both_directions() -> None:
    trials = [*proof.side_by_side(), *proof.single_images()]
    groups = {trial.group for trial in trials}
    assert len(groups) == 3 * 3 * 3
    assert all(
        [trial.name for trial in trials if trial.group == group] == [*proof.BACKENDS, proof.FULL]
        for group in groups
    )
    assert {trial.cell.problem.batch for trial in trials if "224" in trial.group} == {128, 1}


def test_nothing_is_asked_twice_and_what_is_wanted_most_comes_first() -> None:
    trials = proof.trials()
    everything = [*proof.side_by_side(), *proof.questions(), *proof.single_images()]
    assert sorted(map(str, trials)) == sorted(map(str, everything))
    assert [t.name for t in trials[:12]] == ["triton"] * 12
    assert len({t.group for t in trials[:12]}) == 12
    assert [str(t) for t in trials[12 : 12 + len(list(proof.questions()))]] == [*map(str, proof.questions())]
    assert trials[-1].cell.regime == "eager"


def test_full_attention_sees_every_token_of_the_same_map() -> None:
    full = [trial.cell.problem for trial in proof.side_by_side() if trial.name == proof.FULL]
    routed = [trial.cell.problem for trial in proof.side_by_side() if trial.name == "triton"]
    for a, b in zip(full, routed, strict=True):
        assert a.keys_per_query == b.tokens
        assert a.io_bytes == b.io_bytes


@pytest.mark.parametrize("trial", list(proof.questions()), ids=lambda t: f"{t.group}: {t.name}")
def test_every_question_is_a_legal_configuration(trial: proof.Trial) -> None:
    call = call_for(trial.cell.problem, as_text(trial.cell.settings), H200)
    assert trial.cell.settings.get("forward", call.forward) == call.forward
    assert trial.cell.settings.get("backward", call.backward) == call.backward


def test_the_floor_is_the_fewest_bytes_over_the_copy_rate() -> None:
    problem = next(proof.side_by_side()).cell.problem
    assert problem.io_bytes == 4 * 128 * 3136 * 64 * 2
    assert proof.floor_ms(problem, 4000.0) == pytest.approx(problem.io_bytes / 4e12 * 1e3)
    training = problem.replace(direction="fwd-bwd")
    assert proof.floor_ms(training, 4000.0) == pytest.approx(3 * proof.floor_ms(problem, 4000.0))


def test_the_table_compares_within_a_group_and_gives_reasons() -> None:
    trials = list(proof.side_by_side())[:3]
    rows = [
        Record.of(trials[0].cell, H200, outcome="measured", median_ms=0.5, ci_lo_ms=0.4, ci_hi_ms=0.6),
        Record.of(trials[1].cell, H200, outcome="measured", median_ms=0.1, workspace_mb=51.0),
        Record.of(trials[2].cell, H200, outcome="oom", reason="no memory left"),
    ]
    heading, gather, triton, sdpa = proof._lines(trials, rows, 4000.0)
    assert "224x224 s1 b128 fwd: floor 51.4 us" in heading
    assert "500.0 us [400.0, 600.0]" in gather
    assert "1.00x gather" in gather
    assert "100.0 us" in triton
    assert "5.00x gather" in triton
    assert "51.4 % of floor" in triton
    assert "oom: no memory left" in sdpa


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernels", "-o", "nowhere"], group=studies) == 5
    assert "no CUDA device" in capsys.readouterr().err


def test_rivals_are_timed_where_they_run_and_refused_with_a_reason_elsewhere() -> None:
    import torch

    from bratune.machine import detect
    from bratune.problem import Problem
    from bratune.studies.rivals import depthwise_lines, norm_lines, sdpa_lines

    here = detect("cpu")
    brief = MeterSettings.for_effort(
        "quick", min_time_s=0.0, min_samples=2, max_samples=2, warmup_s=0.0, timeout_s=5.0, l2="warm"
    )
    lines = list(depthwise_lines(here, brief, [(1, 4, 4, 8)], torch.float32))
    assert [line.split()[:2] for line in lines if " us " in line] == [
        ["torch", "fwd"],
        ["torch", "fwd-bwd"],
    ] * 2
    assert sum("not here: " in line for line in lines) == 4
    (heading, *rows) = norm_lines(here, brief, [(1, 4, 4, 8)], 2, torch.float32)
    assert "LayerNorm of 1x4x4x8" in heading
    assert [" us " in row for row in rows] == [True, True, False, False]  # Triton needs a GPU
    assert [row.split()[:2] for row in rows[1:3]] == [["torch", "with"], ["triton", "not"]]
    problem = Problem(batch=1, height=4, width=4, heads=1, head_dim=8, region=(2, 2), topk=1)
    (heading, *rows) = sdpa_lines(here, brief, [problem])
    assert "1x16 tokens, 1x8" in heading
    assert any(row.split()[0] == "math" and " us " in row for row in rows)


def test_what_cells_do_not_express_ends_with_its_share_of_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof, "_beside", lambda machine, settings: iter(["heading", "a line"]))
    payload = {"machine": H200.to_dict(), "settings": MeterSettings().to_dict(), "seconds": 60.0}
    assert proof.beside(payload) == ["heading", "a line"]
    assert proof.beside({**payload, "seconds": 0.0}) == [
        "heading", "the rest was not started: its time was spent"
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_a_device_that_is_lost_before_the_first_cell_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The worker has a device that is not there; this process goes on and says so."""
    monkeypatch.setattr("bratune.machine.detect", lambda device: H200)
    assert run(["kernels", "-o", str(tmp_path)], group=studies) == 5
    assert "this device cannot copy: " in capsys.readouterr().err


def test_every_family_of_every_published_stage_is_executed() -> None:
    found = list(execute_kernels.cases())
    assert {case.problem.dtype for case in found} == {"float16", "bfloat16"}
    names = {case.name.rpartition(" ")[0] for case in found}
    assert len(names) == 9
    for name in names:
        mine = [case for case in found if case.name.startswith(name)]
        assert {case.forward for case in mine} == set(forward_families(mine[0].problem))
        assert {case.backward for case in mine} == set(backward_families(mine[0].problem))


def test_executed_cases_are_kept_and_what_is_wrong_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def run_case(case: execute_kernels.ExecutedCase, target: str) -> dict[str, Any]:
        asked.append(case.name)
        error = 1e-4 if case.problem.dtype == "float16" else 1e-2
        return {"findings": [], "errors": {"out": error}, "instructions": 1, "seconds": 0.1}

    monkeypatch.setattr(execute_kernels, "run_case", run_case)
    command = ["kernels", "--execute", "-o", str(tmp_path), "--only", "224x224 s2 float16"]
    assert run(command, group=studies) == 0
    assert "224x224 s2 float16 gather, gather: right, errors out 1.0e-04" in capsys.readouterr().out
    first = len(asked)
    assert first == 2
    assert run(command, group=studies) == 0
    assert len(asked) == first  # the file answers
    assert run([*command[:-1], "224x224 s2"], group=studies) == 1
    told = capsys.readouterr()
    assert "224x224 s2 bfloat16 gather, gather: WRONG" in told.out
    assert "a compiled kernel is wrong" in told.err


def test_measuring_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernels"], group=studies) == 2
    assert "-o FOLDER" in capsys.readouterr().err
