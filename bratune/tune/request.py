"""Request: everything that a tuning run was asked for, as plain data that other workers can read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bratune.errors import UsageError
from bratune.tune.lost_accuracy import CONFIDENCE
from bratune.tune.pick import Constraint, check_rule, parse_constraint
from bratune.tune.setting import Setting
from bratune.tune.space import Space, checkpoint_bounds, prior_bounds
from bratune.variant import get_task

__all__ = ["EFFORTS", "Effort", "TuneRequest"]


@dataclass(frozen=True)
class Effort:
    """How much work an effort stands for.

    Attributes:
        verify: Settings measured end to end, at most.
        passes: Fresh processes of the closing comparison.
        configs: Settings of a backend that are tried for the options that matter.
    """

    verify: int
    passes: int
    configs: int


EFFORTS = {"quick": Effort(8, 6, 1), "standard": Effort(20, 6, 4), "full": Effort(60, 10, 16)}


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """What to tune, for what, with which freedom.

    Attributes:
        regimes: Stages are measured in the first; the best settings are tried in the others too.
        backends: Names to choose from; empty means all that accept.
        checkpoint: Weights file; then what changes the model needs ``allow_model_changes``.
        trained_n_win: S per stage that the weights were trained with; empty: the task's.
        trained_topks: Top-k per stage, likewise.
        trained_res: Image size that the weights were trained at; (0, 0): the size tuned for.
        images: Folder of calibration images.
        labels: Its subfolders are classes.
        shared_run: Without weights: judge settings by one weight-shared training.
        train_trials: Without weights: judge by short trainings of so many settings.
        train_steps: Steps of a short training.
        train_seeds: Short trainings that differ in nothing else.
        train_most_seeds: How many at most, where those do not decide (train_trials).
        objective: Second objective beside latency: ``auto`` (fidelity where it is measured, else memory),
            ``fidelity`` or ``memory``.
        constraints: Texts for `bratune.tune.pick.parse_constraint`.
        pick: Rule for `bratune.tune.pick.pick`.
        confidence: One-sided, of what is said about lost accuracy.
        omega: Without data, share of the reference's keys per query that is enough.
        trials: Settings measured end to end, at most; 0: what the effort says.
        table: Measure stages first; otherwise whole models only (black-box search).
        budget_s: Seconds for everything; 0: no limit.
    """

    model: str
    task: str
    height: int
    width: int
    batch: int = 1
    dtype: str = "float32"
    amp: bool = False
    direction: str = "fwd"
    layout: str = "nchw"
    regimes: tuple[str, ...] = ("eager",)
    l2: str = "cold"
    backends: tuple[str, ...] = ()
    per_stage_s: bool | None = None
    max_waste: float = 0.25
    checkpoint: str = ""
    trained_n_win: tuple[int, ...] = ()
    trained_topks: tuple[int, ...] = ()
    trained_res: tuple[int, int] = (0, 0)
    images: str = ""
    labels: bool = False
    shared_run: bool = False
    train_trials: int = 0
    train_steps: int = 300
    train_seeds: int = 2
    train_most_seeds: int = 6
    calibration_images: int = 1000
    confidence: float = CONFIDENCE
    allow_model_changes: bool = False
    allow_more_k: bool = False
    objective: str = "auto"
    constraints: tuple[str, ...] = ()
    pick: str = "balanced"
    omega: float = 1.0
    trials: int = 0
    sampler: str = "tpe"
    table: bool = True
    effort: str = "standard"
    budget_s: float = 0.0
    seed: int = 0

    @property
    def question(self) -> dict[str, Any]:
        """What a plan repeats of it."""
        names = ("model", "task", "height", "width", "batch", "dtype", "amp", "direction", "l2")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise UsageError(f"effort {self.effort!r} is not known; these are: {', '.join(EFFORTS)}")
        if self.objective not in ("auto", "fidelity", "memory"):
            raise UsageError(f"objective {self.objective!r} is not known; auto, fidelity and memory are")
        self._check_fidelity()
        for text in self.constraints:
            parse_constraint(text)
        check_rule(self.pick)
        if not 0.5 <= self.confidence < 1.0:
            raise UsageError(f"a confidence of {self.confidence:g} is none; 0.95 would be, or 0.99")
        self._check_checkpoint()

    def _check_checkpoint(self) -> None:
        """Raise where something was said about weights and there are none."""
        about = {
            "--n-win and --topks": self.trained_n_win or self.trained_topks,
            "--trained-res": any(self.trained_res),
            "--allow-model-changes": self.allow_model_changes,
            "--allow-more-k": self.allow_more_k,
        }
        idle = [flag for flag, given in about.items() if given]
        if idle and not self.checkpoint:
            raise UsageError(
                f"{' and '.join(idle)} say something about trained weights; --checkpoint names them, and "
                "without it S and top-k are tuned anyway"
            )

    def _check_fidelity(self) -> None:
        """Raise where something was given to judge settings by and would not be used."""
        trains = "--shared-run" if self.shared_run else "--train-trials" if self.train_trials else ""
        if self.shared_run and self.train_trials:
            raise UsageError("--shared-run and --train-trials exclude each other; leave one of them out")
        if trains and self.checkpoint:
            raise UsageError(
                f"{trains} is for training from scratch and --checkpoint brings trained weights; "
                "leave one of them out"
            )
        if trains and not (self.images and self.labels):
            raise UsageError(f"{trains} needs pictures to train on: --images DIR with --labels")
        if self.objective == "fidelity" and not self.measures_fidelity:
            raise UsageError(
                "objective 'fidelity' needs something to measure it on: --checkpoint with --images, "
                "or --images with --labels and --shared-run or --train-trials"
            )
        if self.labels and not self.images:
            raise UsageError("--labels says what the subfolders of --images are; --images DIR is missing")
        if self.images and not self.measures_fidelity:
            raise UsageError(
                "--images alone judges nothing: --checkpoint says whose outputs to compare, --labels with "
                "--shared-run or --train-trials trains on them"
            )

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The parsed constraints."""
        return tuple(parse_constraint(text) for text in self.constraints)

    @property
    def how_much(self) -> Effort:
        """The effort, with the number of trials that was asked for."""
        effort = EFFORTS[self.effort]
        return dataclasses.replace(effort, verify=self.trials) if self.trials else effort

    @property
    def measures_fidelity(self) -> bool:
        """Whether a fidelity can be computed: weights and images, or labelled images to train on."""
        trains = self.labels and (self.shared_run or self.train_trials > 0)
        return bool(self.images) and (bool(self.checkpoint) or trains)

    @property
    def second(self) -> str:
        """The second objective: ``loss`` or ``memory``."""
        if self.objective == "memory":
            return "memory"
        changes = not self.checkpoint or self.allow_model_changes
        return "loss" if self.measures_fidelity and changes else "memory"

    @functools.cached_property
    def free_space(self) -> Space:
        """Everything that is legal, before limits on the model."""
        return Space(
            model=self.model,
            height=self.height,
            width=self.width,
            batch=self.batch,
            dtype=self.dtype,
            direction=self.direction,
            default_n_win=get_task(self.task).n_win,
            per_stage=self.per_stage_s,
            max_waste=self.max_waste,
        )

    @functools.cached_property
    def reference(self) -> Setting:
        """What every setting is judged against: the checkpoint's own setting, else the authors'.

        At another resolution than in training, it is the one whose regions have the same size in pixels.
        """
        free = self.free_space
        paper = free.first_settings()["paper"]
        if not self.checkpoint:
            return paper
        n_win = self.trained_n_win or paper.n_win
        topks = self.trained_topks or free.variant.topks
        native = self.trained_res
        if any(native) and native != (self.height, self.width):
            scale = ((self.height * self.width) / (native[0] * native[1])) ** 0.5
            n_win = (free.nearest_window(n_win[0] * scale),) * len(n_win)
        return free.setting(list(n_win), list(topks))

    @functools.cached_property
    def space(self) -> Space:
        """What may be chosen."""
        free = self.free_space
        if self.checkpoint:
            bounds = checkpoint_bounds(
                free,
                self.reference,
                allow_model_changes=self.allow_model_changes,
                allow_more_k=self.allow_more_k,
            )
        elif self.measures_fidelity:
            return free
        else:
            bounds = prior_bounds(free, self.reference, omega=self.omega)
        return dataclasses.replace(free, bounds=bounds)

    def first_settings(self) -> dict[str, Setting]:
        """Named settings that are tried first, the reference before all others, without backends.

        They are tried even where they break a floor (`allows`), so that the result shows them.
        """
        if self.checkpoint and not self.allow_model_changes:
            return {"checkpoint": self.reference}
        own = "checkpoint" if self.checkpoint else "paper"
        found = {own: self.reference}
        for name, setting in self.space.first_settings().items():
            if setting not in found.values():
                found[name] = setting
        return found

    def allows(self, setting: Setting) -> bool:
        """Whether a setting may become the plan; the reference always may."""
        space, own = self.space, self.reference
        return all(
            (s, k) == (own.n_win[i], own.topks[i]) or (s, k) in space.model_choices(i)
            for i in space.routed
            for s, k in [(setting.n_win[i], setting.topks[i])]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TuneRequest:
        """The inverse of `to_dict`.

        Raises:
            UsageError: it is of another version, with other fields.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(
                f"this request was made by another bratune ({error}); that one reads it"
            ) from None

    @property
    def study_name(self) -> str:
        """A name that is equal for requests that may share their trials."""
        loose = ("budget_s", "pick", "trials", "effort", "seed", "sampler", "train_most_seeds")
        data = {k: v for k, v in self.to_dict().items() if k not in loose}
        data["train_trials"] = bool(self.train_trials)  # more of them go on with the same study
        text = json.dumps(data, sort_keys=True)
        size = f"{self.height}x{self.width}"
        digits = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.model}-{self.task}-{size}-b{self.batch}-{self.dtype}-{self.direction}-{digits}"

    @property
    def cells_name(self) -> str:
        """A name that is equal for requests whose stages cost the same."""
        size = f"{self.height}x{self.width}"
        how = f"{self.layout}-{self.regimes[0]}-{self.l2}" + ("-amp" if self.amp else "")
        return f"{self.model}-{self.task}-{size}-b{self.batch}-{self.dtype}-{self.direction}-{how}"
