"""Short trainings as trials: of scanned digits, with a standard error, stopped, resumed and never guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bratune.errors import UsageError
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import build
from bratune.studies.data_sets import canvas_digits
from bratune.tune.conclude import conclude, evidence_of, front_rows
from bratune.tune.pictures import Pictures
from bratune.tune.request import TuneRequest
from bratune.tune.short_training import Recipe, paired_gain
from bratune.tune.synthetic import SyntheticWorld, offers
from bratune.tune.train_trials import TrainTrials
from bratune.tune.tuner import Tuner

RECIPE = Recipe(steps=4, batch=8, seeds=2)


def request(**changes: Any) -> TuneRequest:
    asked: dict[str, Any] = {
        "model": "biformer_tiny",
        "task": "classification",
        "height": 64,
        "width": 64,
        "images": "digits",
        "labels": True,
        "train_trials": 3,
        "effort": "quick",
    }
    return TuneRequest(**{**asked, **changes})


def seeded(seed: int) -> Backbone:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"depth": (1, 1, 1, 1), "embed_dim": (32,) * 4, "qk_dims": (32,) * 4, "n_win": 4}
    return build("biformer_tiny", num_classes=10, auto_pad=True, backend="gather-sdpa", **small)


@pytest.fixture(scope="module")
def digits() -> tuple[Pictures, Pictures]:
    pytest.importorskip("sklearn.datasets", reason="the scans come with scikit-learn")
    return canvas_digits(32, part="train"), canvas_digits(24, part="test")


def trainings(
    digits: tuple[Pictures, Pictures],
    asked: TuneRequest | None = None,
    make: Callable[[int], Backbone] = seeded,
    **more: Any,
) -> TrainTrials:
    asked = asked or request()
    options: dict[str, Any] = {"recipe": RECIPE, "most": asked.train_trials, **more}
    return TrainTrials(make, asked.space, asked.reference, *digits, **options)


def opened(folder: Path, digits: tuple[Pictures, Pictures], **more: Any) -> TrainTrials:
    made = trainings(digits, **more)
    made.open(f"journal:///{folder}/study.journal", "run", "random")
    return made


def tuner(folder: Path, asked: TuneRequest, source: TrainTrials, **more: Any) -> Tuner:
    url = f"journal:///{folder}/study.journal"
    return Tuner(SyntheticWorld(seed=1), asked, url, offers=offers, fidelity=source, **more)


@pytest.mark.slow
def test_tuned_setting_was_trained_and_says_how_well(
    tmp_path: Path, digits: tuple[Pictures, Pictures]
) -> None:
    asked, said = request(), list[str]()
    worker = tuner(tmp_path, asked, trainings(digits, asked, say=said.append), say=said.append)
    worker.search()
    plan = conclude(worker)
    assert plan.evidence.level == "E1"
    assert "paired seeds of 4 steps)" in plan.evidence.text
    assert worker.trainings is not None
    done = {t.user_attrs["key"] for t in worker.trainings.ledger.trials("COMPLETE") if "key" in t.user_attrs}
    assert worker.space.model_key(plan.setting) in done
    assert 2 <= len(done) <= 3
    assert any("validation pictures wrong, mean of 2 seeds" in line for line in said)
    rows = front_rows(worker, plan)
    assert all(row["evidence"].startswith(("E1 short", "E0 not trained")) for row in rows)
    assert not any(row["feasible"] for row in rows if row["evidence"].startswith("E0"))

    def refuse(seed: int) -> Backbone:
        raise AssertionError("trained again")

    again = tuner(tmp_path, asked, trainings(digits, asked, refuse))
    again.search()  # every training is in the study
    found = again.find(plan.setting)
    assert found is not None
    assert evidence_of(again, found) == plan.evidence


def test_reference_differs_from_itself_by_nothing(tmp_path: Path, digits: tuple[Pictures, Pictures]) -> None:
    source = opened(tmp_path, digits)
    found = source.joint(source.reference)
    assert found.loss == 0
    assert found.evidence.values["gain"] == 0
    assert found.evidence.level == "E1"


class Scripted(TrainTrials):
    """Trainings whose outcome is written down: everything right for the first settings, then wrong."""

    right = 0

    def _correct(self, model: Backbone) -> Tensor:
        trained = len([t for t in self.ledger.trials("COMPLETE") if "key" in t.user_attrs])
        return torch.full((len(self.valid),), trained < self.right)


def test_training_that_falls_behind_is_stopped_and_not_picked(
    tmp_path: Path, digits: tuple[Pictures, Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "right", 3)
    monkeypatch.setattr("bratune.tune.train_trials.train_shared", steps_only)
    asked = request()
    source = Scripted(seeded, asked.space, asked.reference, *digits, RECIPE, most=4)
    source.open(f"journal:///{tmp_path}/study.journal", "run", "random")
    settings = [asked.space.setting(4, (k, 4, 16, -2)) for k in (1, 2, 3)]  # and the reference
    found = [source.joint(s) for s in settings]
    assert [f.usable for f in found] == [True, True, False]
    assert "stopped after 1 of 4 steps" in found[2].evidence.text
    (pruned,) = source.ledger.trials("PRUNED")
    assert pruned.intermediate_values == {1: 1.0}
    assert not source.joint(asked.space.setting(2, (1, 1, 1, -2))).usable  # four were trained


def steps_only(*arguments: Any, after_step: Callable[[int], None], **more: Any) -> list[float]:
    for done in range(1, RECIPE.steps + 1):
        after_step(done)
    return []


def test_interrupted_training_waits_for_the_next_run(
    tmp_path: Path, digits: tuple[Pictures, Pictures]
) -> None:
    def interrupted(seed: int) -> Backbone:
        raise KeyboardInterrupt

    source = opened(tmp_path, digits, make=interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.joint(source.reference)
    again = opened(tmp_path, digits)
    assert len(again.ledger.trials("WAITING")) == 1
    assert again.step().startswith("training S=7 k=1/4/16")
    assert again.left() == 2


def test_settings_that_are_not_faster_are_refused_untrained(
    tmp_path: Path, digits: tuple[Pictures, Pictures]
) -> None:
    source = opened(tmp_path, digits)
    assert source.propose(lambda setting: 0.5) == ""
    (trial,) = source.ledger.trials()
    assert trial.constraints == {"not_faster": 0.5}
    assert source.left() == 3


def test_error_of_a_gain_holds_pictures_and_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = [torch.rand(400, generator=generator) < 0.5 for _ in range(2)]
    same = paired_gain(reference, reference)
    assert same == (0.0, 0.0)
    better = [one | (torch.rand(400, generator=generator) < 0.2) for one in reference]
    gain, error = paired_gain(better, reference)
    assert 0.05 < gain < 0.15
    # Two times 400 pictures of which a tenth changes: 0.3 / sqrt(800), and more where seeds differ.
    assert 0.9 * 0.3 / 800**0.5 < error < 0.03


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": ""}, "--train-trials needs pictures"),
        ({"labels": False}, "--train-trials needs pictures"),
        ({"shared_run": True}, "exclude each other"),
        ({"checkpoint": "w.pth"}, "for training from scratch"),
        ({"train_trials": 0, "labels": False}, "--images alone judges nothing"),
        ({"train_trials": 0, "shared_run": True, "images": ""}, "--shared-run needs pictures"),
    ],
)
def test_requests_that_would_train_on_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        request(**changes)


def test_more_trainings_go_on_with_the_same_study() -> None:
    assert request(train_trials=8).study_name == request().study_name
    assert request(train_steps=9).study_name != request().study_name


class Counted(TrainTrials):
    """Trainings of a known outcome: how many of 400 pictures each seed classifies correctly."""

    gains: list[int]
    asked: list[tuple[str, int]]

    def _train_one(self, setting: Any, index: int, trial: Any) -> Tensor:
        self.asked.append((self.space.model_key(setting), index))
        right = 300 if setting == self.reference else 300 + self.gains[index]
        # The same pictures are right, apart from those that are gained or lost.
        return torch.arange(400) < right


@pytest.mark.parametrize(
    ("gains", "seeds", "verdict"),
    [
        ([-40] * 9, 2, "worse"),
        ([0] * 9, 2, "not worse by more than 0.5 points"),
        ([40] * 9, 2, "not worse by more than 0.5 points"),
        ([8, -8, 0, 0, 0, 0, 0, 0, 0], 5, "undecided"),
        ([8, -30, -30, -30, -30, -30, -30], 4, "worse"),
    ],
)
def test_pairs_are_added_until_they_decide_or_none_is_left(
    tmp_path: Path, gains: list[int], seeds: int, verdict: str
) -> None:
    labels = torch.zeros(400, dtype=torch.int64)
    pictures = Pictures(images=torch.zeros(400, 3, 64, 64), labels=labels, classes=("a",), key="p")
    recipe = Recipe(steps=4, seeds=2, most_seeds=5)

    def made() -> Counted:
        found = Counted(seeded, request().space, request().reference, pictures, pictures, recipe, most=3)
        found.gains, found.asked = gains, []
        found.open(f"journal:///{tmp_path}/study.journal", "run", "random")
        return found

    source = made()
    other = source.space.setting(4, (1, 1, 1, -2))
    evidence = source.joint(other).evidence
    assert evidence.values["seeds"] == seeds
    assert verdict in evidence.text
    assert f"({seeds} paired seeds of 4 steps)" in evidence.text
    assert len(source.asked) == len(set(source.asked)) == 2 * seeds
    again = made()
    assert again.joint(other).evidence == evidence
    assert again.asked == []  # the pairs that were added are in the study, too
