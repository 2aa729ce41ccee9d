"""The recipe of docs/tune.md logs the trials and the plan of a run to MLflow's local store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recorded import record

ROOT = Path(__file__).resolve().parents[2]


def recipe() -> str:
    section = (ROOT / "docs" / "tune.md").read_text("utf-8").partition("## Experiment trackers")[2]
    return section.partition("```python\n")[2].partition("```")[0]


def test_the_recipe_logs_every_trial_and_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("optuna_integration", reason="optuna-integration is not installed")
    record(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(recipe().replace("runs/tune/NAME", "run"), names)

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    runs = mlflow.search_runs(experiment_names=[names["name"]])
    trials = names["study"].get_trials(states=[names["optuna"].trial.TrialState.COMPLETE])
    assert len(runs) == len(trials) + 1
    logged = sorted(runs["metrics.latency_ms"].dropna())
    assert logged == pytest.approx(sorted(trial.values[0] for trial in trials))
    (plan,) = runs[runs["tags.mlflow.runName"] == "plan"].to_dict("records")
    assert plan["metrics.tuned_ms"] == names["plan"]["end_to_end"]["tuned_ms"]
    assert [file.path for file in mlflow.MlflowClient().list_artifacts(plan["run_id"])] == ["plan.json"]
