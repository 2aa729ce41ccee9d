"""Train trials: real short trainings, each of one setting, as trials of a study with one objective.

The objective is the share of validation pictures that are classified wrongly, mean over seeds. The first
seed reports it while it trains, and what falls behind the median of the others at the same step is stopped
(Optuna's median pruner). Every seed starts from the same weights and sees the same pictures in the same
order whatever the setting, so that differences to the reference are paired. Where the pairs do not decide
whether a setting is worse, more seeds of both are trained, up to a limit. Which picture was classified
correctly is kept in the study: a run that goes on compares with what was trained before.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bratune.kernels.backbone import Backbone
from bratune.tune import evidence
from bratune.tune.checkpoint_fidelity import outputs, reroute
from bratune.tune.fidelity_source import Fidelity
from bratune.tune.ledger import Ledger, derived_seed
from bratune.tune.pictures import Pictures
from bratune.tune.request import TuneRequest
from bratune.tune.sampling import Encoding
from bratune.tune.setting import Setting
from bratune.tune.short_training import (
    NOT_WORSE,
    Recipe,
    TrainedSource,
    decides,
    fresh_model,
    labelled_halves,
    paired_gain,
    recipe_of,
    train_shared,
)
from bratune.tune.show import Say
from bratune.tune.space import Space

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

__all__ = ["TrainTrials"]

# Parts of a training after which it says how far it is.
REPORTS = 4
# Trainings that are never stopped: they are what the others are compared with.
STARTERS = 3
POLL_S = 0.5


class TrainTrials(TrainedSource):
    """A `bratune.tune.fidelity_source.FidelitySource` that trains every setting which it is asked about.

    A setting that was stopped, or for which no training is left, may not be picked.

    Args:
        make: A model with new weights, from a seed.
        space: Model and resolution.
        reference: What is compared with; it is trained first, and never stopped.
        train: Labelled pictures to train on.
        valid: Labelled pictures to validate on.
        recipe: How.
        most: Settings trained at most.
        seed: Everything else follows from it.
        say: Told what happens.
    """

    ledger: Ledger

    def __init__(
        self,
        make: Callable[[int], Backbone],
        space: Space,
        reference: Setting,
        train: Pictures,
        valid: Pictures,
        recipe: Recipe,
        *,
        most: int,
        seed: int = 0,
        say: Say = lambda text: None,
    ) -> None:
        self.make, self.space, self.reference = make, space, reference
        self.train_pictures, self.valid, self.recipe = train, valid, recipe
        self.most, self.seed, self.say = most, seed, say
        self.encoding = Encoding(space, ("",))

    @classmethod
    def of(cls, request: TuneRequest, *, device: str, say: Say = lambda text: None) -> TrainTrials:
        """Trainings on four fifths of the request's pictures."""
        train, valid = labelled_halves(request)
        space = request.space
        return cls(
            lambda seed: fresh_model(space, len(train.classes), device=device, seed=seed),
            space,
            request.reference,
            train,
            valid,
            recipe_of(request),
            most=request.train_trials,
            seed=request.seed,
            say=say,
        )

    def open(self, url: str, name: str, sampler: str, storage: BaseStorage | None = None) -> Ledger:
        """Keep the trainings in a study; returns its ledger."""
        from optuna.pruners import MedianPruner

        self.ledger = Ledger(
            url, f"{name}:{self.key}", ["validation_error"], sampler=sampler, seed=self.seed, storage=storage
        )
        self.ledger.study.pruner = MedianPruner(
            n_startup_trials=STARTERS, n_warmup_steps=self.recipe.steps // REPORTS
        )
        return self.ledger

    # --- what a tuner asks ------------------------------------------------------------------

    @property
    def key(self) -> str:
        """Pictures, recipe and reference."""
        text = f"{self.valid.key}-{self.recipe}-{self.space.model_key(self.reference)}-{self.seed}"
        return "trainings-" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def joint(self, setting: Setting) -> Fidelity:
        """How far validation accuracy falls below the reference's; trains both where they were not yet."""
        reference = self._train_now(self.reference)
        own = self._train_now(setting)
        if own is None or reference is None:
            return Fidelity(loss=1.0, evidence=evidence.not_trained(most=self.most), usable=False)
        if not _complete(own):
            steps = own.user_attrs.get("steps", 0)
            found = evidence.stopped_training(steps=steps, of=self.recipe.steps)
            return Fidelity(loss=1.0, evidence=found, usable=False)
        gain, error, seeds = self._paired(setting, _unpacked(own), _unpacked(reference))
        found = evidence.short_trainings(
            gain=100 * gain,
            error=100 * error,
            seeds=seeds,
            steps=self.recipe.steps,
            not_worse=100 * NOT_WORSE,
        )
        return Fidelity(loss=max(0.0, -gain - 2 * error), evidence=found)

    def _paired(
        self, setting: Setting, own: list[Tensor], reference: list[Tensor]
    ) -> tuple[float, float, int]:
        """Gain over the reference, its standard error, and the pairs behind them, as many as decide."""
        gain, error = paired_gain(own, reference)
        same = self.space.model_key(setting) == self.space.model_key(self.reference)
        while not same and not decides(gain, error) and len(own) < self.recipe.most_seeds:
            self.say(
                f"training {setting}: {gain:+.1%} +- {2 * error:.1%} after {len(own)} pairs decides nothing; "
                "another pair"
            )
            reference.append(self._one_more(self.reference, len(own)))
            own.append(self._one_more(setting, len(own)))
            gain, error = paired_gain(own, reference)
        return gain, error, len(own)

    def _one_more(self, setting: Setting, index: int) -> Tensor:
        """The pictures that one more seed of a setting classifies correctly; trained once per study."""
        name = f"seed {index} of {self.space.model_key(setting)}"
        packed = self.ledger.study.user_attrs.get(name)
        if packed is not None:
            return _bits(packed, len(self.valid))
        correct = self._train_one(setting, index, None)
        self.ledger.study.set_user_attr(name, _hex(correct))
        return correct

    def trained(self) -> list[Setting]:
        """Settings that were trained to the end."""
        done = self.ledger.by_key().values()
        return [Setting.from_dict(t.user_attrs["setting"]) for t in done if _complete(t)]

    def left(self) -> int:
        """Trainings that may still be started; settings that were refused unseen do not count."""
        return max(self.most - len(self.ledger.settled() - {None}), 0)  # the refused have no key

    # --- trials -----------------------------------------------------------------------------

    def propose(self, refusal: Callable[[Setting], float | None]) -> str:
        """Let the sampler propose a setting and train it; returns a line.

        It is empty where the setting was known, or refused because it is not worth a training.

        Args:
            refusal: By how much a setting breaks the limit on that; None or at most 0 where it does not.
        """
        known = self.ledger.by_key()
        trial, setting = self.ledger.propose(self.encoding.suggest)
        key = self.space.model_key(setting)
        done, over = known.get(key), refusal(setting)
        if done is not None and _complete(done):
            self.ledger.complete(trial, done.values, constraints=done.constraints, refused=True)
            return ""
        if done is not None or (over is not None and over > 0):
            broken = done.constraints if done is not None else {"not_faster": over or 0.0}
            self.ledger.prune(trial, "as before" if done else "not faster", constraints=broken, refused=True)
            return ""
        trial.set_user_attr("key", key)
        trial.set_user_attr("setting", setting.to_dict())
        return self._guarded(trial)

    def step(self) -> str:
        """Train a setting that waits in the queue; returns a line, empty where none waits."""
        trial = self.ledger.claim(self.encoding.suggest)
        return "" if trial is None else self._guarded(trial)

    def _train_now(self, setting: Setting) -> FrozenTrial | None:
        """The finished training of a setting; None where none is left or it failed."""
        key = self.space.model_key(setting)
        while key not in self.ledger.by_key():
            if not self.left() and key != self.space.model_key(self.reference):
                waiting = {t.user_attrs.get("key") for t in self.ledger.trials("WAITING", "RUNNING")}
                if key not in waiting:
                    return None
            bare = self.space.setting(setting.n_win, setting.topks)
            self.ledger.enqueue([(key, self.encoding.params(bare), {"setting": bare.to_dict()})])
            said = self.step()
            if said:
                self.say(said)
            elif self.ledger.busy_elsewhere():
                time.sleep(POLL_S)
                self.ledger.reap()
            else:
                return None
        return self.ledger.by_key()[key]

    def _guarded(self, trial: Trial) -> str:
        try:
            return self._run(trial)
        except BaseException:
            self.ledger.release(trial)
            raise

    def _run(self, trial: Trial) -> str:
        """Train a setting with every seed and finish its trial; returns a line about it."""
        setting = Setting.from_dict(trial.user_attrs["setting"])
        correct: list[Tensor] = []
        try:
            for index in range(self.recipe.seeds):
                correct.append(self._train_one(setting, index, None if index else trial))
        except _Stopped as stopped:
            text = f"behind the others after {stopped.steps} of {self.recipe.steps} steps"
            self.ledger.prune(trial, text, steps=stopped.steps)
            return f"training {setting}: stopped, {text}"
        error = 1.0 - float(torch.stack(correct).double().mean())
        packed = [_hex(one) for one in correct]
        self.ledger.complete(trial, [error], correct=packed, pictures=len(self.valid))
        return (
            f"training {setting}: {error:.1%} of {len(self.valid)} validation pictures wrong, mean of "
            f"{len(correct)} seeds of {self.recipe.steps} steps"
        )

    def _train_one(self, setting: Setting, index: int, trial: Trial | None) -> Tensor:
        """Whether each validation picture is classified correctly after a training, ``[N]`` bool."""
        labels = self.train_pictures.labels
        assert labels is not None
        seed = derived_seed(self.seed, "short training", index)
        model = self.make(seed)
        reroute(model, setting.n_win, setting.topks)
        every = max(self.recipe.steps // REPORTS, 1)
        protected = self.space.model_key(setting) == self.space.model_key(self.reference)

        def report(done: int) -> None:
            if trial is None or done % every or done == self.recipe.steps:
                return
            trial.report(1.0 - float(self._correct(model).double().mean()), done)
            if trial.should_prune() and not protected:
                raise _Stopped(done)

        train_shared(
            model,
            self.train_pictures.images,
            labels,
            lambda: setting,
            self.recipe,
            seed=seed,
            after_step=report,
        )
        return self._correct(model)

    def _correct(self, model: Backbone) -> Tensor:
        assert self.valid.labels is not None
        return outputs(model, self.valid.images)[0].argmax(1) == self.valid.labels


class _Stopped(Exception):
    """A training that the pruner ended."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.steps = steps


def _complete(trial: FrozenTrial) -> bool:
    """Whether it ended by itself: one that was stopped has a value too, the last that it reported."""
    return trial.state.name == "COMPLETE"


def _unpacked(trial: FrozenTrial) -> list[Tensor]:
    """Per seed, whether each validation picture was classified correctly, ``[N]`` bool."""
    count: int = trial.user_attrs["pictures"]
    texts: Any = trial.user_attrs["correct"]
    return [_bits(text, count) for text in texts]


def _hex(correct: Tensor) -> str:
    return np.packbits(correct.numpy()).tobytes().hex()


def _bits(text: str, count: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:count]
    return torch.from_numpy(bits.astype(bool))
