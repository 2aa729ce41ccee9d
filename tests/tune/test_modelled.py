"""Tuning for a GPU that is not here: ranks, ties, and a plan that nobody takes for a measured one."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from bratune import gpus
from bratune.cli import run
from bratune.errors import PlanError, UsageError
from bratune.kernels.tuned import lookup
from bratune.predict.coefficients import UNCALIBRATED
from bratune.predict.estimate import Estimate
from bratune.predict.public import public_rates
from bratune.predict.ratio import ratio_of
from bratune.predict.roofline import rates
from bratune.tune.modelled import Modelled, measuring_command, search
from bratune.tune.plan import install, load_plan
from bratune.tune.request import TuneRequest

A100 = gpus.resolve("a100")


@functools.cache
def found(batch: int = 64, regime: str = "eager") -> Modelled:
    request = TuneRequest(
        model="biformer_small",
        task="segmentation",
        height=512,
        width=512,
        batch=batch,
        dtype="bfloat16",
        regimes=(regime,),
    )
    return search(request, A100, UNCALIBRATED)


def bratune(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run(line.split())
    said = capsys.readouterr()
    return code, said.out, said.err


# --- ratios -------------------------------------------------------------------------------------------


def made(
    kinds: dict[str, float], *, launches: int = 0, gpu: str = "rtx4090", own: tuple[str, ...] = ()
) -> Estimate:
    board = gpus.resolve(gpu)
    device = sum(kinds.values()) / 1e3
    host = launches * UNCALIBRATED.host_us / 1e3
    return Estimate(
        ms=max(device, host),
        device_ms=device,
        host_ms=host,
        launches=launches,
        bound="memory",
        memory_bytes=0.0,
        by_group=(),
        by_kind=kinds,
        own_ms=sum(kinds[name] for name in own) / 1e3,
        public=public_rates(board, rates(board, "bfloat16"), amp=True, dtype="bfloat16"),
    )


def test_the_same_work_has_a_ratio_of_one_for_sure() -> None:
    one = made({"gemm": 500.0, "copy": 300.0})
    assert ratio_of(one, one, UNCALIBRATED) == (1.0, 1.0, 1.0)


def test_a_ratio_is_as_uncertain_as_what_differs() -> None:
    """A tenth more copies: known to a few percent, although the times are known to tens of percent."""
    base = made({"gemm": 500.0, "copy": 500.0})
    more = made({"gemm": 500.0, "copy": 600.0})
    ratio = ratio_of(more, base, UNCALIBRATED)
    assert ratio.value == pytest.approx(1.1)
    assert base.public is not None
    assert ratio.hi / ratio.value < 1.06
    other = ratio_of(made({"conv": 1100.0}), base, UNCALIBRATED, related=False)
    assert other.hi / other.value > 1.4


def test_what_nobody_published_makes_a_ratio_uncertain() -> None:
    base = made({"gemm": 500.0, "copy": 500.0})
    known = ratio_of(made({"gemm": 500.0, "copy": 700.0}), base, UNCALIBRATED)
    own = ratio_of(made({"gemm": 500.0, "copy": 500.0, "triton": 200.0}), base, UNCALIBRATED)
    assert own.value == known.value
    assert own.hi > known.hi
    assert not known.open
    assert own.lo < known.lo


def test_where_the_host_limits_both_the_launches_decide_on_every_host() -> None:
    few, many = made({"copy": 5.0}, launches=300), made({"copy": 5.0}, launches=600)
    ratio = ratio_of(few, many, UNCALIBRATED)
    assert ratio.value == 0.5
    assert ratio.lo == pytest.approx(0.5 / 1.05)
    assert ratio.hi == pytest.approx(0.5 * 1.05)


# --- the search ---------------------------------------------------------------------------------------


def test_settings_are_ranked_and_those_that_cannot_be_told_apart_are_tied() -> None:
    answer = found()
    times = [r.ms for r in answer.ranked]
    assert times == sorted(times)
    assert answer.best.tied
    assert answer.best.to_fastest == (1.0, 1.0, 1.0)
    for r in answer.ranked:
        assert r.tied == (r.to_fastest.lo <= 1)
        assert r.interval[0] < r.ms < r.interval[1]
        assert r.speedup.value == pytest.approx(answer.default.ms / r.ms)
    (published,) = [r for r in answer.ranked if r.name == "published"]
    assert not published.tied, "three times slower is slower for sure"
    assert published.to_fastest.lo > 1.5
    assert len({r.setting.n_win for r in answer.ranked}) > 3


def test_every_setting_keeps_the_keys_of_the_authors() -> None:
    answer = found()
    own = answer.default.keys
    assert all(k >= mine for r in answer.ranked for k, mine in zip(r.keys, own, strict=True))


def test_the_answer_is_one_sentence_with_a_number_and_its_evidence() -> None:
    text = found().sentence()
    assert text.startswith("A100-SXM4-80GB: S=8 k=1/4/16 triton, about ")
    assert "images/s" in text
    assert "x the published composition (" in text
    assert text.endswith("(modelled, nothing was measured)")


def test_a_request_for_accuracy_is_refused(tmp_path: Path) -> None:
    request = dataclasses.replace(
        found().request, images=str(tmp_path), labels=True, train_trials=2, height=224, width=224
    )
    with pytest.raises(UsageError, match="nothing runs on a GPU that is not here"):
        search(request, A100, UNCALIBRATED)


def test_the_plan_says_modelled_and_claims_nothing(tmp_path: Path) -> None:
    answer = found()
    plan = load_plan(answer.plan("bratune tune").save(tmp_path / "plan.json"))
    assert plan.measured == "modelled"
    assert plan.setting == answer.best.setting
    assert plan.end_to_end.verdict is None
    assert plan.end_to_end.speedup_vs_default is None
    assert plan.end_to_end.tuned is None
    assert all(stage.tuned_ms is None and stage.n is None for stage in plan.stages)
    assert plan.evidence.level == "E0"
    assert len(plan.diagnostics["modelled"]) == len(answer.ranked)
    with pytest.raises(PlanError, match="modelled"):
        install(plan, tmp_path / "cache")


def test_a_lookup_never_takes_a_modelled_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRATUNE_LOOKUP", raising=False)
    plan = found().plan("bratune tune")
    problem = plan.stages[0].problem
    assert problem is not None
    path = plan.save(tmp_path / "plan.json")
    assert lookup(problem, plan.machine, plans=[path]) is None
    measured = dataclasses.replace(plan, measured="measured").save(tmp_path / "measured.json")
    assert lookup(problem, plan.machine, plans=[measured]) is not None


def test_the_command_that_measures_tries_as_many_settings_as_are_tied() -> None:
    words = measuring_command(found()).split()
    assert words[:4] == ["bratune", "tune", "--gpu", "a100"]
    assert "--measured" in words
    assert words[words.index("--trials") + 1] == str(len(found().tied))
    assert words[words.index("--res") + 1] == "512x512"


# --- the command --------------------------------------------------------------------------------------


def test_tune_answers_for_gpus_that_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = tmp_path / "measure.sh"
    code, out, err = bratune(
        "tune --gpu a100,rtx4090 --res 512 --task segmentation --model biformer_small -b 16 "
        f"-o {tmp_path} --plan-run {script}",
        capsys,
    )
    assert code == 0
    first, second = out.splitlines()[:2]
    assert first.startswith("A100-SXM4-80GB: ")
    assert second.startswith("GeForce RTX 4090: ")
    assert "not here: rows are modelled" in err
    assert "measure first, when the GPU is here:" in out
    assert [line.split()[:4] for line in script.read_text().splitlines()[1:]] == [
        ["bratune", "tune", "--gpu", "a100"],
        ["bratune", "tune", "--gpu", "rtx4090"],
    ]
    plans = [load_plan(tmp_path / f"plan-{key}.json") for key in ("a100", "rtx4090")]
    assert [plan.machine.gpu_key for plan in plans] == ["a100", "rtx4090"]
    assert not (tmp_path / "cache").exists(), "a modelled plan is put nowhere"


def test_a_known_host_narrows_a_small_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interval(more: str) -> tuple[float, float]:
        line = f"tune --gpu a100 --res 224 --format json -o {tmp_path} {more}"
        code, out, _ = bratune(line, capsys)
        assert code == 0
        low, high = json.loads(out)[0]["ms_interval"]
        return low, high

    unknown, known = interval(""), interval("--host 12")
    assert unknown[1] / unknown[0] > 5
    assert known[1] / known[0] < 2


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("tune --gpu a100 --measured", 5, "cannot be measured here"),
        ("tune --gpu a100,h100 --measured", 2, "one of them would do"),
        ("tune --gpu a100,nothing", 2, "no GPU is called 'nothing'"),
        ("tune --gpu a100 --host quick", 2, "--host quick"),
        ("tune --gpu t4 --dtype bf16", 2, "no bfloat16"),
        ("tune --device cpu --host fast --dry-run", 2, "a GPU that is not here"),
    ],
)
def test_what_cannot_be_modelled_is_refused(
    line: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found_code, _, err = bratune(line, capsys)
    assert (found_code, said in err) == (code, True), err
    assert len(err.strip().splitlines()) <= 3
