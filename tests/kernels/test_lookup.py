"""Where `auto` finds plans, and which ones it believes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from sample_plans import H200, make_plan

from bratune.errors import ConfigError
from bratune.kernels import registry, tuned
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.tune.plan import Plan, install


@pytest.fixture(autouse=True)
def _no_plans_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BRATUNE_CONFIG_DIR", raising=False)
    monkeypatch.delenv("BRATUNE_LOOKUP", raising=False)
    monkeypatch.setattr(tuned, "_said", set())


def call(plan: Plan, stage: int = 1, **changes: Any) -> Problem:
    problem = plan.stages[stage - 1].problem
    assert problem is not None
    return problem.replace(**changes)


def quiet(problem: Problem, machine: Machine, **more: Any) -> tuned.Tuned | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tuned.lookup(problem, machine, **more)


def test_nothing_is_found_where_there_are_no_plans() -> None:
    assert quiet(call(make_plan()), H200) is None


def test_plan_for_the_same_call_is_exact_and_silent() -> None:
    plan = make_plan(backend="dense", config='{"block": 32}')
    install(plan)
    found = quiet(call(plan, 2), H200)
    assert found is not None
    assert (found.backend, dict(found.config), found.exact) == ("dense", {"block": 32}, True)


def test_places_are_asked_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argument = make_plan(backend="flex").save(tmp_path / "argument.json")
    problem = call(make_plan())
    install(make_plan(backend="gather"))
    found = [quiet(problem, H200)]
    make_plan(backend="dense").save(tmp_path / "named" / "any-name.json")
    monkeypatch.setenv("BRATUNE_CONFIG_DIR", str(tmp_path / "named"))
    found.append(quiet(problem, H200))
    found.append(quiet(problem, H200, plans=[argument]))
    assert [f.backend for f in found if f] == ["gather", "dense", "flex"]


@pytest.mark.parametrize(
    ("changes", "machine", "hit"),
    [
        ({"batch": 4}, {}, "near"),
        ({"batch": 8}, {}, "none"),
        ({"topk": 3}, {}, "near"),
        ({"dtype": "float16"}, {}, "none"),
        ({"direction": "fwd-bwd"}, {}, "none"),
        ({}, {"gpu_name": "NVIDIA H200 NVL", "gpu_key": "h200-nvl"}, "exact"),
        ({}, {"sm_count": 114, "memory_gib": 79.0}, "near"),
        ({}, {"compute_capability": "8.0"}, "none"),
    ],
)
def test_hits_are_decided_by_content(changes: dict[str, Any], machine: dict[str, Any], hit: str) -> None:
    plan = make_plan()
    install(plan)
    problem, here = call(plan, 2, **changes), Machine(**(H200.to_dict() | machine))
    if hit == "near":
        with pytest.warns(UserWarning, match="tuned for a similar call"):
            found = tuned.lookup(problem, here)
    else:
        found = quiet(problem, here)
    assert ("none" if found is None else "exact" if found.exact else "near") == hit


def test_near_hit_is_said_once_per_process() -> None:
    plan = make_plan()
    install(plan)
    with pytest.warns(UserWarning, match="bratune tune"):
        tuned.lookup(call(plan, batch=2), H200)
    assert quiet(call(plan, batch=3), H200) is not None


@pytest.mark.parametrize(("mode", "near", "exact"), [("strict", False, True), ("off", False, False)])
def test_mode_limits_what_counts(mode: str, near: bool, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan()
    install(plan)
    monkeypatch.setenv("BRATUNE_LOOKUP", mode)
    assert (quiet(call(plan, batch=2), H200) is not None) == near
    assert (quiet(call(plan), H200) is not None) == exact


def test_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRATUNE_LOOKUP", "sometimes")
    with pytest.raises(ConfigError, match="fuzzy, strict, off would work"):
        tuned.lookup(call(make_plan()), H200)


def test_closest_plan_wins() -> None:
    for batch, backend in ((1, "gather"), (8, "dense")):
        install(make_plan(batch=batch, backend=backend))
    with pytest.warns(UserWarning, match="similar call"):
        found = tuned.lookup(call(make_plan(), batch=4), H200)
    assert found is not None
    assert found.backend == "dense"


def test_file_that_is_no_plan_is_left_out_and_said(tmp_path: Path) -> None:
    plan = make_plan()
    path = install(plan)
    path.with_name("other.json").write_text('{"kind": "something else"}')
    path.with_name("broken.json").write_text("{")
    with pytest.warns(UserWarning, match=r"broken\.json was left out"):
        found = tuned.lookup(call(plan), H200)
    assert found is not None


def test_rewritten_plan_is_read_again() -> None:
    install(make_plan(backend="gather"))
    problem = call(make_plan())
    assert getattr(quiet(problem, H200), "backend", "") == "gather"
    install(make_plan(backend="gather-sdpa"))
    assert getattr(quiet(problem, H200), "backend", "") == "gather-sdpa"


def attend(plan: Plan, **more: Any) -> Any:
    import torch

    from bratune.kernels.api import routed_attention

    problem = call(plan, 3)
    q, k, v = torch.randn(3, 1, 14, 14, problem.channels)
    routes = torch.arange(16).expand(1, 49, 16)
    return routed_attention(q, k, v, routes, heads=problem.heads, region=(2, 2), **more)


def test_auto_runs_what_the_plan_of_this_machine_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    from bratune.kernels import api
    from bratune.machine import detect

    asked: list[Any] = []
    reference = registry.get("reference")

    class Spy:
        name = "spy"

        def __getattr__(self, name: str) -> Any:
            return getattr(reference, name)

        def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
            return ()

        def configs(self, problem: Problem, machine: Machine) -> Any:
            return ({"block": 32},)

        def forward(self, *args: Any) -> Any:
            asked.append(args[-1])
            return reference.forward(*args[:-1])

    install(make_plan(detect("cpu"), backend="spy", config='{"block": 32}', dtype="float32"))
    monkeypatch.setattr(registry, "names", lambda: ("reference", "spy"))
    monkeypatch.setattr(registry, "get", lambda name: Spy() if name == "spy" else reference)
    api.forget_calls()
    attend(make_plan())
    api.forget_calls()
    assert asked == [{"block": 32}]


def test_plan_cannot_make_a_backend_run_that_refuses() -> None:
    plan = make_plan(backend="no-such-backend")
    install(plan)
    backend, config = tuned.choose(call(plan), H200)
    assert backend.name in registry.names()
    assert config is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("machine",), []),
        (("machine", "memory_gib"), "much"),
        (("machine", "memory_gib"), float("inf")),
        (("machine", "compute_capability"), 9),
        (("stages",), [1]),
        (("stages", 0, "problem"), [1]),
        (("stages", 0, "problem", "batch"), 10**400),
        (("stages", 0, "backend"), "../x"),
        (("stages", 0, "backend"), 7),
        (("stages", 0, "config"), {"a": {}}),
        (("schema",), None),
    ],
)
def test_a_plan_that_is_damaged_anywhere_is_left_out_and_others_count(
    tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    plan = make_plan(backend="dense")
    data = plan.to_dict()
    inner: Any = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    (tmp_path / "a.json").write_text(json.dumps(data))
    plan.save(tmp_path / "b.json")
    with pytest.warns(UserWarning, match=r"a\.json was left out"):
        found = tuned.lookup(call(plan, 2), H200, plans=[tmp_path])
    assert found is not None
    assert found.source.endswith("b.json")


def test_a_plan_that_nests_without_end_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.warns(UserWarning, match=r"a\.json was left out"):
        assert tuned.lookup(call(make_plan()), H200, plans=[tmp_path]) is None
