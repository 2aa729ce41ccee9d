"""Opening: the sentence of a report names what to run, how fast, against what, and on what it rests."""

from __future__ import annotations

from drawn import attention, measured, model, peer

from bratune import gpus
from bratune.predict.model import predict_cell
from bratune.record import Record
from bratune.report.opening import opening
from bratune.store import pool


def test_a_shown_answer_comes_with_its_rate_and_machine() -> None:
    def passes(form: str, ms: float) -> list[Record]:
        cell = model("gather" if form == "published" else "auto").replace(form=form)
        own = [1.000, 1.002, 0.998]
        return [measured(cell, ms * f, run_id="r", pass_number=n + 1) for n, f in enumerate(own)]

    rows = [*passes("runtime", 2.0), *passes("published", 4.0)]
    sentence = opening(pool(rows), rows)
    assert "use runtime, 2.00x" in sentence
    assert "as fast as published" in sentence
    assert "500 images/s" in sentence
    assert "measured on a100" in sentence
    assert "use runtime" not in opening(pool(rows)), "without its passes nothing is shown"


def test_one_process_shows_nothing_and_the_rate_stands() -> None:
    sentence = opening([measured(model("triton"), 2.0), measured(model("gather"), 4.0)])
    assert "nothing is shown" in sentence
    assert "500 images/s" in sentence


def test_the_rate_is_that_of_what_is_named_though_another_runtime_is_faster() -> None:
    rival = model("auto").replace(form="openvino-bf16")
    rows = [measured(model("gather"), 4.0), measured(model("auto").replace(form="runtime"), 2.0)]
    sentence = opening([*rows, measured(rival, 1.0)])
    assert "500 images/s" in sentence
    assert "1000" not in sentence
    assert "1,000" not in sentence


def test_a_model_of_a_board_is_never_said_to_be_measured() -> None:
    board = gpus.resolve("a100")
    sentence = opening([predict_cell(model(b), board) for b in ("gather", "triton")])
    assert "modelled on a100" in sentence
    assert "measured" not in sentence
    assert "x the" in sentence


def test_biformer_is_spoken_of_though_another_model_is_faster() -> None:
    sentence = opening([measured(peer("resnet"), 1.0), measured(model("triton"), 2.0)])
    assert "500 images/s" in sentence
    assert "triton everywhere" in sentence


def test_without_whole_models_the_fastest_backend_of_each_stage_is_named() -> None:
    sentence = opening([measured(attention(1, b), ms) for b, ms in (("gather", 4.0), ("triton", 1.0))])
    assert "stage 1 triton 4.00x (3.00 to 5.33, measured)" in sentence
    assert "a100" in sentence


def test_nothing_is_said_of_nothing() -> None:
    assert "Nothing" in opening([])
