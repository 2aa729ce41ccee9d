"""A plan for a model of somebody else: which backend attends in each of its routed layers.

>>> plan = tune_model("package.module:factory", "1x3x640x640")
>>> bratune.accelerate(model, example, plan=plan)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bratune.errors import PlanError
from bratune.files import write_text
from bratune.machine import Machine
from bratune.record import Record, utc_now
from bratune.run.summary import best_attention, judged
from bratune.run.yours import Measured, measure_model
from bratune.tune.plan import Plan, read_json
from bratune.tune.plan_schema import MODEL_PLAN_SCHEMA, hidden_texts, on_lines, violations

__all__ = ["LayerChoice", "ModelPlan", "plan_from", "plan_of", "tune_model"]

_KIND, _SCHEMA = "bratune-model-plan", 1


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What attends in one routed layer.

    Attributes:
        name: Of the submodule.
        backend: Its name, or ``auto``.
        calls: How often a run of the model calls the layer.
        gather_ms: Median of its attention by ``gather``; None where that has no time.
        tuned_ms: Median by the fastest backend.
        fastest: That backend, which the plan takes where the whole model is faster for it.
    """

    name: str
    backend: str
    calls: int
    gather_ms: float | None = None
    tuned_ms: float | None = None
    fastest: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Backends by layer of a model, what they were measured on and what they gain.

    Attributes:
        model: ``package.module:factory``, or the class of a live model.
        input: Shape of its input.
        machine: Where it was measured.
        layers: Every routed layer that was proved to be one.
        left: Why others were left, by name.
        as_is_ms: Median of the model as it is.
        tuned_ms: Median of the model with this plan.
        speedup: The first over the second, within rounds; None where nothing compares them.
        speedup_ci: Its 95 % interval; None where one process measured it, which shows none.
        verdict: ``FASTER``, ``SLOWER``, ``SAME`` or ``UNDECIDED``; ``not compared`` of a single process.
        reason: Why these backends.
    """

    model: str
    input: str
    dtype: str
    direction: str
    machine: Machine
    layers: tuple[LayerChoice, ...]
    left: dict[str, str]
    as_is_ms: float | None = None
    tuned_ms: float | None = None
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    verdict: str = "not compared"
    reason: str = ""
    created_utc: str = ""

    @property
    def backends_by_layer(self) -> dict[str, str]:
        """What `bratune.accelerate` takes."""
        return {layer.name: layer.backend for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["machine"] = self.machine.to_dict()
        data["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        data["speedup_ci"] = list(self.speedup_ci) if self.speedup_ci else None
        return {"kind": _KIND, "schema": _SCHEMA, **data}

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "the plan") -> ModelPlan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: it is none, or one of a newer version.
        """
        if not isinstance(data, Mapping) or data.get("kind") != _KIND:
            own = isinstance(data, Mapping) and data.get("kind") == "bratune-plan"
            hint = "; it is one for a model by name, which bratune.create_model(FILE) makes" if own else ""
            raise PlanError(f"{source} is not a plan of tune_model: it has no kind {_KIND!r}{hint}")
        if data.get("schema") != _SCHEMA:
            raise PlanError(
                f"{source} has schema {data.get('schema')!r:.60} and this version reads {_SCHEMA}"
            )
        wrong = [*violations(data, MODEL_PLAN_SCHEMA), *hidden_texts(data)]
        if wrong:
            raise PlanError(f"{source} cannot be read: {'; '.join(wrong[:3])}")
        try:
            values = {f.name: data[f.name] for f in dataclasses.fields(cls)}
            values["machine"] = Machine.from_dict(values["machine"])
            values["layers"] = tuple(LayerChoice(**layer) for layer in values["layers"])
            values["speedup_ci"] = tuple(values["speedup_ci"]) if values["speedup_ci"] else None
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{source} cannot be read: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan in one step; returns the path.

        Raises:
            PlanError: the file cannot be written.
        """
        target = Path(path)
        try:
            write_text(target, json.dumps(on_lines(self.to_dict()), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise PlanError(f"the plan cannot be written to {target}: {error.strerror or error}") from None
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelPlan:
        """The plan in a file.

        Raises:
            PlanError: there is none.
        """
        return cls.from_dict(read_json(path), source=str(path))

    def __str__(self) -> str:
        lines = [f"{self.model} at {self.input}, {self.dtype}, {self.direction}, {self.machine.gpu_name}"]
        lines += [_line(layer) for layer in self.layers]
        lines += [f"  left {name}: {why}" for name, why in self.left.items()]
        if self.as_is_ms is not None and self.tuned_ms is not None:
            text = f"whole model: {self.as_is_ms:.3f} ms as it is, {self.tuned_ms:.3f} ms with the plan"
            if self.speedup is not None and self.speedup_ci is not None:
                lo, hi = self.speedup_ci
                text += f"; {self.verdict}, {self.speedup:.2f}x ({lo:.2f} to {hi:.2f})"
            lines.append(text)
        return "\n".join([*lines, self.reason])


def _line(layer: LayerChoice) -> str:
    text = f"  {layer.name}: {layer.backend}"
    if layer.tuned_ms is None:
        return text
    base = f", gather {layer.gather_ms:.3f} ms" if layer.gather_ms is not None else ""
    return f"{text} (attention: {layer.fastest} {layer.tuned_ms:.3f} ms{base})"


def plan_from(data: Any, *, source: str = "the plan") -> Plan | ModelPlan:
    """Either kind of plan, from plain values.

    Raises:
        PlanError: it is neither.
    """
    if isinstance(data, Mapping) and data.get("kind") == _KIND:
        return ModelPlan.from_dict(data, source=source)
    return Plan.from_dict(data, source=source)


def tune_model(model: nn.Module | str, example: Any, **settings: Any) -> ModelPlan:
    """The backend of each routed layer with which a model is fastest.

    Every layer is measured by every backend, then the whole model as it is, by ``auto``, and by the fastest
    backend of each layer; the latter is the plan where it is shown to be faster than ``auto``.

    Args:
        model: See `bratune.profile_model`.
        example: See `bratune.profile_model`.
        settings: See `bratune.run.yours.measure_model`.

    Raises:
        UsageError: see `bratune.profile_model`.
    """
    return plan_of(measure_model(model, example, **settings))


def plan_of(measured: Measured) -> ModelPlan:
    """The plan that measurements speak for."""
    request, rows = measured.request, measured.rows
    best = [best_attention(rows, number + 1) for number in range(len(request.sites))]
    whole = {row.backend: row for row in rows if row.part == "model" and row.ok}
    joined = request.model_cell(*(row.backend if row else "auto" for row in best)).backend
    as_is, auto, tuned = whole.get(""), whole.get("auto"), whole.get(joined)
    pairs = [(a, b) for a, b in ((tuned, auto), (tuned, as_is), (auto, as_is)) if a and b and a is not b]
    verdicts = dict(
        zip(((a.backend, b.backend) for a, b in pairs), judged(pairs, measured.passes), strict=True)
    )
    takes_tuned, reason = _decided(tuned, auto, verdicts.get((joined, "auto")))
    chosen = tuned if takes_tuned else auto
    gain = verdicts.get((chosen.backend, "")) if chosen else None
    layers = []
    for number, (site, row) in enumerate(zip(request.sites, best, strict=True)):
        base = next((r for r in rows if r.stage == number + 1 and r.backend == "gather"), None)
        layers.append(
            LayerChoice(
                name=site.name,
                backend=row.backend if takes_tuned and row else "auto",
                calls=site.calls,
                gather_ms=base.median_ms if base else None,
                tuned_ms=row.median_ms if row else None,
                fastest=row.backend if row else "",
            )
        )
    return ModelPlan(
        model=request.model,
        input=request.input,
        dtype=request.dtype,
        direction=request.direction,
        machine=measured.machine,
        layers=tuple(layers),
        left=dict(request.left),
        as_is_ms=as_is.median_ms if as_is else None,
        tuned_ms=chosen.median_ms if chosen else None,
        speedup=gain.speedup if gain else None,
        speedup_ci=gain.speedup_interval if gain and gain.lo else None,
        verdict=gain.verdict if gain else "not compared",
        reason=reason,
        created_utc=utc_now(),
    )


def _decided(tuned: Record | None, auto: Record | None, verdict: Any) -> tuple[bool, str]:
    """Whether the fastest backend of each layer is taken in the place of ``auto``, and why."""
    if tuned is None or auto is None:
        return tuned is not None, "only one of auto and the fastest backend of each layer has a time"
    if verdict is None:
        faster = (tuned.median_ms or 0.0) < (auto.median_ms or 0.0)
        return faster, "by the medians of one process: nothing is shown"
    words = f"{verdict.speedup_text} as fast as auto: {verdict.verdict}"
    if verdict.verdict == "FASTER":
        return True, f"the fastest backend of each layer is {words}"
    return False, f"auto is kept: the fastest backend of each layer is {words}"
