"""Plan: the tuner's answer as a file that can be run, exported and looked up.

A plan says what it was measured on, what was chosen and why, which of its values change the *model* and
which only the *cost*, and what is known about accuracy. It holds contents, never indices into lists of
another version.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bratune.errors import PlanError, UsageError
from bratune.files import write_text
from bratune.kernels.tuned import SCHEMA, architecture, machine_key, user_plans
from bratune.machine import Machine
from bratune.measure.verdict import MedianOfPasses
from bratune.problem import Problem
from bratune.text import html_table
from bratune.tune.evidence import Evidence, recall_lines
from bratune.tune.plan_schema import EARLIER_VERDICTS, PLAN_SCHEMA, hidden_texts, on_lines, violations
from bratune.tune.setting import Setting
from bratune.variant import VARIANTS

__all__ = ["KNOBS", "EndToEnd", "Plan", "StagePlan", "install", "load_plan"]

KNOBS = {
    "model": ("n_win", "topks", "padding"),
    "cost": ("backend", "config", "regime", "layout"),
}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage runs.

    Attributes:
        stage: From 1.
        kind: ``routed``, ``full`` or ``conv``.
        problem: The attention call that was measured; None for ``conv``.
        default_ms: Time of all the stage's blocks with the default; None when not measured.
        tuned_ms: The same with this choice.
        ci: 95 % interval of ``tuned_ms``, in milliseconds.
        n: Samples behind it.
        complete: Every option of the stage was measured before this one was chosen.
    """

    stage: int
    blocks: int
    kind: str
    n_win: int
    topk: int
    backend: str = ""
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    problem: Problem | None = None
    default_ms: float | None = None
    tuned_ms: float | None = None
    ci: tuple[float, float] | None = None
    n: int | None = None
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["problem"] = self.problem.to_dict() if self.problem else None
        data["ci"] = list(self.ci) if self.ci else None
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StagePlan:
        """The inverse of `to_dict`."""
        fields = dict(data)
        fields["problem"] = Problem.from_dict(fields["problem"]) if fields.get("problem") else None
        fields["ci"] = tuple(fields["ci"]) if fields.get("ci") else None
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """The whole model with the default, with the plan and as published, in turn in fresh processes.

    What was not compared is None. A plan that is the default itself claims nothing: it has no verdict and no
    speed-up over the default.

    Attributes:
        published: Time of the official composition in milliseconds, with its 95 % interval.
        default: Time of the default.
        tuned: Time of the plan.
        passes: Fresh processes.
        verdict: One of `bratune.measure.verdict.VERDICTS`, of the plan against the default.
        speedup_vs_default: Median over passes of the ratio within rounds, with its interval.
        speedup_vs_published: The same against the official composition.
        reason: What was compared and what came out, in one sentence.
    """

    published: MedianOfPasses | None = None
    default: MedianOfPasses | None = None
    tuned: MedianOfPasses | None = None
    passes: int = 0
    verdict: str | None = None
    speedup_vs_default: MedianOfPasses | None = None
    speedup_vs_published: MedianOfPasses | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **{name: _plain(getattr(self, name), _TIME) for name in _TIMES},
            "verdict": self.verdict,
            **{name: _plain(getattr(self, name), _RATIO) for name in _SPEEDUPS},
            "passes": self.passes,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EndToEnd:
        """The inverse of `to_dict`; what plans of schema 1 say is read too."""
        if data["verdict"] in EARLIER_VERDICTS:
            return cls._earlier(data)
        passes = data.get("passes", 0)
        values = {name: _estimate(data.get(name), _TIME, passes) for name in _TIMES}
        values |= {name: _estimate(data.get(name), _RATIO, passes) for name in _SPEEDUPS}
        return cls(**values, passes=passes, verdict=data["verdict"], reason=data.get("reason", ""))

    @classmethod
    def _earlier(cls, data: Mapping[str, Any]) -> EndToEnd:
        """From schema 1, where the default's own plan said what became of its rival."""
        passes, faster = data.get("rounds", 0), data["verdict"] == "faster"
        times = [data.get(name) for name in ("default_ms", "tuned_ms")]
        default, tuned = (None if ms is None else MedianOfPasses(ms, None, None, passes) for ms in times)
        gain, (lo, hi) = data.get("speedup"), data.get("speedup_ci") or (None, None)
        return cls(
            default=default,
            tuned=tuned,
            passes=passes,
            verdict="FASTER" if faster else None,
            speedup_vs_default=MedianOfPasses(gain, lo, hi, passes) if faster and gain else None,
            reason=data.get("reason", ""),
        )


# The fields of `EndToEnd` that are times and ratios, and the names of a number and its interval in each.
_TIMES, _TIME = ("published", "default", "tuned"), ("median_ms", "ci_lo_ms", "ci_hi_ms")
_SPEEDUPS, _RATIO = ("speedup_vs_default", "speedup_vs_published"), ("value", "lo", "hi")


def _plain(found: MedianOfPasses | None, names: Sequence[str]) -> dict[str, float | None] | None:
    return None if found is None else dict(zip(names, (found.value, found.lo, found.hi), strict=True))


def _estimate(data: Mapping[str, Any] | None, names: Sequence[str], passes: int) -> MedianOfPasses | None:
    if data is None:
        return None
    first, *interval = names
    lo, hi = (data.get(name) for name in interval)
    return MedianOfPasses(data[first], lo, hi, passes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The tuner's answer for a model, a task, a resolution, a batch, a data type and a machine.

    Attributes:
        padding: What fills maps that S does not divide; ``zeros`` is the official behaviour.
        default: The setting that the plan was compared with.
        reason: Why this setting was picked.
        evidence: What is known about its accuracy.
        measured: Where the times come from: ``measured``, ``replayed`` or ``modelled``.
        machine: Where it was measured.
        table_error: How well the sum of stages predicted whole models: ``n``, ``mape``, ``kendall``,
            ``spearman``.
        diagnostics: What was looked at beside the objectives and decided nothing: ``recall`` of every routed
            layer of the plan and of the reference (`bratune.tune.recall.LayerRecall`).
        command: What makes this plan again.
        complete: The search ran to its end; False after an interrupt or a spent budget.
    """

    model: str
    task: str
    height: int
    width: int
    batch: int
    dtype: str
    direction: str
    setting: Setting
    stages: tuple[StagePlan, ...]
    end_to_end: EndToEnd
    evidence: Evidence
    machine: Machine
    default: Setting
    reason: str = ""
    amp: bool = False
    l2: str = "cold"
    padding: str = "zeros"
    measured: str = "measured"
    table_error: dict[str, Any] = field(default_factory=dict, hash=False)
    diagnostics: dict[str, Any] = field(default_factory=dict, hash=False)
    created_utc: str = ""
    command: str = ""
    study: str = ""
    seed: int = 0
    complete: bool = True

    @property
    def n_win(self) -> tuple[int, ...]:
        """Regions per side of each stage."""
        return self.setting.n_win

    @property
    def topks(self) -> tuple[int, ...]:
        """Top-k of each stage, in official spelling."""
        return self.setting.topks

    @property
    def backends(self) -> tuple[str, ...]:
        """Backend of each stage; empty where a stage has none."""
        return self.setting.backends

    @property
    def configs(self) -> tuple[dict[str, Any], ...]:
        """Settings of each stage's backend."""
        return tuple(json.loads(text) for text in self.setting.configs)

    @property
    def pads(self) -> bool:
        """Whether some stage's map has to be padded, so that official models need ``auto_pad=True``."""
        maps = VARIANTS[self.model].maps(self.height, self.width)
        return any(h % s or w % s for s, k, (h, w) in zip(self.n_win, self.topks, maps, strict=True) if k > 0)

    @property
    def shared_n_win(self) -> int | None:
        """The one S of all routed stages; None where they differ."""
        sides = {s for s, k in zip(self.n_win, self.topks, strict=True) if k > 0}
        return sides.pop() if len(sides) == 1 else None

    @property
    def file_name(self) -> str:
        """Where `install` puts it below a folder: architecture, then what it is for."""
        size = f"{self.height}x{self.width}"
        mode = f"{self.direction}-{self.setting.regime}-b{self.batch}"
        return f"{machine_key(self.machine)}/{self.model}-{self.task}-{size}-{self.dtype}-{mode}.json"

    def obstacles(self, machine: Machine) -> tuple[str, ...]:
        """Why the plan's times and backends may not hold on a machine; empty where they should.

        Each reason is a sentence with what the plan was measured on and what is here.
        """
        found = []
        if architecture(machine) != architecture(self.machine):
            found.append(
                f"the plan was measured on {architecture(self.machine)} ({self.machine.gpu_name}) "
                f"and this is {architecture(machine)} ({machine.gpu_name})"
            )
        elif machine_key(machine) != machine_key(self.machine):
            found.append(
                f"the plan was measured on {machine_key(self.machine)} and this is {machine_key(machine)}"
            )
        for name in ("torch", "triton"):
            then, now = getattr(self.machine, name), getattr(machine, name)
            if then.split("+")[0] != now.split("+")[0]:
                found.append(
                    f"the plan was measured with {name} {then or 'absent'} and here is {now or 'none'}"
                )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": "bratune-plan",
            "schema": SCHEMA,
            "created_utc": self.created_utc,
            "command": self.command,
            "study": self.study,
            "seed": self.seed,
            "complete": self.complete,
            "measured": self.measured,
            "machine": self.machine.to_dict(),
            "model": self.model,
            "task": self.task,
            "resolution": [self.height, self.width],
            "batch": self.batch,
            "dtype": self.dtype,
            "amp": self.amp,
            "direction": self.direction,
            "l2": self.l2,
            "padding": self.padding,
            "setting": self.setting.to_dict(),
            "default": self.default.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "end_to_end": self.end_to_end.to_dict(),
            "reason": self.reason,
            "evidence": self.evidence.to_dict(),
            "table_error": self.table_error,
            "diagnostics": self.diagnostics,
            "knobs": {name: list(fields) for name, fields in KNOBS.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "the plan") -> Plan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: something is missing, of the wrong kind or contradicts itself; the message names it.
        """
        if not isinstance(data, Mapping) or data.get("kind") != "bratune-plan":
            if isinstance(data, Mapping) and data.get("kind") == "bratune-model-plan":
                raise PlanError(
                    f"{source} is a plan for the layers of {str(data.get('model'))[:80]}, a model of yours: "
                    f"bratune.accelerate(model, example, plan=bratune.ModelPlan.load(FILE)) applies it, and "
                    "bratune export takes it for onnx, openvino and pt2"
                )
            raise PlanError(f"{source} is not a plan: it has no kind 'bratune-plan'")
        if isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
            raise PlanError(
                f"{source} has schema {data['schema']} and this version reads up to {SCHEMA}; "
                "a newer bratune would read it"
            )
        wrong = [*violations(data, PLAN_SCHEMA), *hidden_texts(data)]
        if wrong:
            raise PlanError(f"{source} cannot be read: {'; '.join(wrong[:3])}")
        if data["model"] not in VARIANTS:
            raise PlanError(f"{source} is for {data['model']!r}; known models are {', '.join(VARIANTS)}")
        fields = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in data.items() if k in fields}
        values["height"], values["width"] = data["resolution"]
        try:
            values["machine"] = Machine.from_dict(data["machine"])
            values["setting"] = Setting.from_dict(data["setting"])
            values["default"] = Setting.from_dict(data["default"])
            values["stages"] = tuple(StagePlan.from_dict(s) for s in data["stages"])
            values["end_to_end"] = EndToEnd.from_dict(data["end_to_end"])
            values["evidence"] = Evidence.from_dict(data["evidence"])
            for name in ("setting", "default"):
                _check_configs(values[name], name)
            recall_lines(values.get("diagnostics", {}))
        except (ArithmeticError, AttributeError, LookupError, TypeError, UsageError, ValueError) as error:
            raise PlanError(f"{source} cannot be read: {error}") from None
        plan = cls(**values)
        variant = VARIANTS[plan.model]
        for i, (s, k) in enumerate(zip(plan.n_win, plan.topks, strict=True)):
            if k > s * s and variant.layout != "stl_nchw":  # there, regions that do not tile are more
                raise PlanError(f"{source} has top-k {k} of {s * s} regions in stage {i + 1}")
        count = len(variant.dims)
        if len(plan.stages) != count or len(plan.topks) != count:
            raise PlanError(f"{source} has {len(plan.stages)} stages and {plan.model} has {count}")
        return plan

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan in one step, so that nobody reads half of it; returns the path.

        Raises:
            PlanError: the file cannot be written.
        """
        target = Path(path)
        text = json.dumps(on_lines(self.to_dict()), indent=2, allow_nan=False) + "\n"
        try:
            write_text(target, text)
        except OSError as error:
            raise PlanError(f"the plan cannot be written to {target}: {error.strerror or error}") from None
        return target

    def _repr_html_(self) -> str:
        """What a notebook shows: the plan in a sentence, and a row per stage."""
        stages = [
            (str(s.stage), s.kind, str(s.n_win), str(s.topk), s.backend, _ms(s.default_ms), _ms(s.tuned_ms))
            for s in self.stages
        ]
        heads = ("stage", "kind", "S", "top-k", "backend", "default ms", "tuned ms")
        verdict = self.end_to_end.verdict or "not compared"
        words = f"{self}; {verdict}; {self.measured} on {self.machine.gpu_name}"
        return f"<p>{html.escape(words)}</p>{html_table(heads, stages)}"

    def __str__(self) -> str:
        return f"{self.model} at {self.height}x{self.width}, batch {self.batch}, {self.dtype}: {self.setting}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _check_configs(setting: Setting, name: str) -> None:
    """Raise `UsageError` where the settings of a backend are no JSON object of names and plain values."""
    for i, text in enumerate(setting.configs):
        try:
            config = json.loads(text)
        except (ValueError, RecursionError):
            config = None
        plain = isinstance(config, dict) and all(
            isinstance(value, int | float | str) and not hidden_texts([key, value])
            for key, value in config.items()
        )
        if not plain:
            raise UsageError(f"{name}.configs[{i}] is not a JSON object of plain values: {text[:60]!r}")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file.

    Raises:
        PlanError: there is no such file, or it is not a plan that this version can read; one for the layers
            of a model of yours is read by `bratune.ModelPlan.load`.
    """
    return Plan.from_dict(read_json(path), source=str(path))


def read_json(path: str | os.PathLike[str]) -> Any:
    """What stands in the file of a plan.

    Raises:
        PlanError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not a plan: it is not JSON ({error})") from None


def install(plan: Plan, folder: str | os.PathLike[str] | None = None) -> Path:
    """Put a plan where ``backend="auto"`` finds it, by default in the user's cache; returns its path.

    Raises:
        PlanError: the plan was modelled, and only what was measured decides; or its search is unfinished.
    """
    if plan.measured == "modelled":
        raise PlanError(
            f"the plan for {plan.machine.gpu_name} was modelled: only a measured one is put there"
        )
    if not plan.complete:
        raise PlanError(
            "the plan is of an unfinished search, and the next one may choose otherwise; "
            f"`{plan.command or 'bratune tune'}` goes on"
        )
    return plan.save((user_plans() if folder is None else Path(folder)) / plan.file_name)


def stage_plans(
    setting: Setting, stages: Sequence[Any], measured: Mapping[int, Mapping[str, Any]]
) -> tuple[StagePlan, ...]:
    """One `StagePlan` per stage of a setting.

    Args:
        setting: What was chosen.
        stages: `bratune.variant.Stage` of that setting, in order.
        measured: By stage from 1: ``default_ms``, ``tuned_ms``, ``ci``, ``n``, ``complete``.
    """
    return tuple(
        StagePlan(
            stage=stage.index,
            blocks=stage.blocks,
            kind=stage.kind,
            n_win=stage.n_win,
            topk=stage.topk,
            backend=backend,
            config=json.loads(config),
            problem=stage.problem,
            **measured.get(stage.index, {}),
        )
        for stage, backend, config in zip(stages, setting.backends, setting.configs, strict=True)
    )
