"""Plan files: what they hold, what is refused, and what they say on another machine."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from sample_plans import H200, make_plan

from bratune.errors import PlanError
from bratune.export.fields import header
from bratune.machine import Machine
from bratune.tune.evidence import FROM_SCRATCH, prior_only, short_trainings
from bratune.tune.plan import EndToEnd, Plan, install, load_plan
from bratune.tune.plan_schema import PLAN_SCHEMA, violations
from bratune.tune.show import plan_text


def test_plan_reads_back_what_was_saved(tmp_path: Path) -> None:
    plan = make_plan(config='{"block": 64}')
    assert load_plan(plan.save(tmp_path / "deep" / "plan.json")) == plan


def test_saved_plan_keeps_the_published_schema(tmp_path: Path) -> None:
    data = json.loads(make_plan().save(tmp_path / "plan.json").read_text())
    assert violations(data, PLAN_SCHEMA) == []
    known = set(PLAN_SCHEMA["properties"])
    assert set(data) == known


def test_plan_tells_model_knobs_from_cost_knobs() -> None:
    knobs = make_plan().to_dict()["knobs"]
    assert knobs["model"] == ["n_win", "topks", "padding"]
    assert set(knobs["cost"]) == {"backend", "config", "regime", "layout"}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("kind",), "other", "has no kind 'bratune-plan'"),
        (("schema",), 99, "a newer bratune would read it"),
        (("batch",), 0, "batch must be at least 1, not 0"),
        (("batch",), True, "batch must be a whole number, not True"),
        (("dtype",), "int8", "dtype must be one of float16"),
        (("resolution",), [224], r"resolution must have 2 values, not 1"),
        (("stages", 0, "backend"), 3, r"stages\[0\].backend must be text, not 3"),
        (("model",), "resnet", "is for 'resnet'"),
        (("stages", 0, "problem", "topk"), 999, "top-k 999 is more than the 49 key regions"),
        (("setting", "topks"), [1, 4], "cannot be read: a setting needs one value per stage"),
        (("setting", "topks"), [400, 4, 16, -2], "top-k 400 of 49 regions in stage 1"),
        (("evidence", "level"), "E9", "evidence.level must be one of E0"),
    ],
)
def test_broken_plans_are_refused_with_the_place(path: tuple[Any, ...], value: Any, words: str) -> None:
    data = copy.deepcopy(make_plan().to_dict())
    inner: Any = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(PlanError, match=words):
        Plan.from_dict(data, source="plan.json")


def test_missing_part_is_named() -> None:
    data = make_plan().to_dict()
    del data["machine"]
    with pytest.raises(PlanError, match="lacks 'machine'"):
        Plan.from_dict(data)


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), ("{", "not JSON"), ("[]", "no kind")])
def test_files_that_are_no_plans_are_one_sentence(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PlanError, match=words):
        load_plan(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"gpu_name": "NVIDIA H200 NVL"}, []),  # a name alone decides nothing
        ({"compute_capability": "8.0", "sm_count": 108}, ["sm90"]),
        ({"sm_count": 66}, ["sm90-66sm-140gib"]),
        ({"torch": "2.11.0+cu130"}, ["torch 2.13.0"]),
    ],
)
def test_plan_says_where_it_may_not_hold(changes: dict[str, Any], words: list[str]) -> None:
    here = Machine(**(H200.to_dict() | changes))
    found = make_plan().obstacles(here)
    assert len(found) == len(words)
    for reason, word in zip(found, words, strict=True):
        assert word in reason


def test_plan_knows_whether_official_models_must_pad() -> None:
    assert not make_plan().pads
    assert make_plan(n_win=5).pads


def test_installed_plan_lies_under_architecture_not_marketing_name(tmp_path: Path) -> None:
    path = install(make_plan(), tmp_path)
    assert path.relative_to(tmp_path).as_posix() == (
        "sm90-132sm-140gib/biformer_tiny-classification-224x224-bfloat16-fwd-eager-b1.json"
    )


def test_model_of_a_plan_from_elsewhere_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bratune
    from bratune.tune import create

    monkeypatch.setattr(create, "_said", set())
    path = make_plan(backend="gather").save(tmp_path / "plan.json")
    small: dict[str, Any] = {"depth": (1, 1, 1, 1), "num_classes": 3}
    with pytest.warns(UserWarning, match="its times may not hold here"):
        model = bratune.create_model(path, **small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bratune.create_model(path, **small)
    routed: list[Any] = [m for m in model.modules() if hasattr(m, "topk") and hasattr(m, "n_win")]
    assert [(m.n_win, m.topk, m.backend) for m in routed] == [
        (7, 1, "gather"),
        (7, 4, "gather"),
        (7, 16, "gather"),
    ]


def earlier(verdict: str) -> dict[str, Any]:
    """What schema 1 said of a comparison."""
    values = {"default_ms": 119.0, "tuned_ms": 119.0, "speedup": 0.913, "speedup_ci": [0.737, 1.076]}
    return {**values, "rounds": 6, "verdict": verdict, "reason": "as it was"}


def test_comparison_reads_back_with_null_for_what_was_not_compared() -> None:
    end = make_plan().end_to_end
    data = json.loads(json.dumps(end.to_dict()))
    assert EndToEnd.from_dict(data) == end
    assert data["published"] == {"median_ms": 20.0, "ci_lo_ms": 19.0, "ci_hi_ms": 21.0}
    assert data["speedup_vs_default"] == {"value": 1.11, "lo": 1.08, "hi": 1.13}
    nothing = EndToEnd().to_dict()
    names = ("published", "default", "tuned", "verdict", "speedup_vs_default", "speedup_vs_published")
    assert [nothing[name] for name in names] == [None] * 6
    assert list(nothing)[:6] == list(names)
    assert EndToEnd.from_dict(nothing) == EndToEnd()


@pytest.mark.parametrize("verdict", ["faster", "default kept", "not compared"])
def test_plans_of_schema_1_are_read_and_claim_a_speedup_only_where_they_were_faster(verdict: str) -> None:
    data = make_plan().to_dict() | {"schema": 1, "end_to_end": earlier(verdict)}
    end = Plan.from_dict(data).end_to_end
    assert end.default is not None
    assert (end.default.value, end.passes, end.reason) == (119.0, 6, "as it was")
    assert (end.verdict is None) is (verdict != "faster")
    assert (end.speedup_vs_default is None) is (verdict != "faster")
    if end.speedup_vs_default is not None:
        found = end.speedup_vs_default
        assert (found.value, found.lo, found.hi) == (0.913, 0.737, 1.076)


def test_the_defaults_own_plan_claims_nothing_anywhere() -> None:
    path = Path(__file__).parents[2] / "results" / "cpu-xeon-biformer-tiny-224.plan.json"
    stored = load_plan(path)
    own = dataclasses.replace(make_plan(), setting=make_plan().default, end_to_end=stored.end_to_end)
    for plan in (stored, own):
        for text in (plan_text(plan), header(plan)):
            claims = [
                line for line in text.splitlines() if "against the default" in line or "Measured" in line
            ]
            assert claims
            assert not [line for line in claims if re.search(r"\d\.\d+x", line)]
    assert "the default itself" in header(own)
    assert "FASTER, 1.110x [1.080, 1.130] against the default" in header(make_plan())


def test_a_plan_with_another_setting_says_what_is_known_about_training_it_from_scratch() -> None:
    plan = make_plan()
    same = dataclasses.replace(plan, evidence=prior_only(unchanged=True))
    trained = dataclasses.replace(
        plan, evidence=short_trainings(gain=0.1, error=0.1, seeds=3, steps=300, not_worse=0.5)
    )
    assert "arXiv 2303.08810" in FROM_SCRATCH
    assert FROM_SCRATCH in plan_text(plan)
    assert FROM_SCRATCH in plan_text(trained)
    assert FROM_SCRATCH not in plan_text(same)


def test_the_plan_of_an_unfinished_search_is_not_installed(tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(), complete=False)
    with pytest.raises(PlanError, match="unfinished search"):
        install(plan, tmp_path)
    assert not list(tmp_path.iterdir())
    assert install(make_plan(), tmp_path).is_file()
