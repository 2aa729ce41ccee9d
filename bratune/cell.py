"""Cell: the unit that is measured once and reused.

A cell says *what* is run (a part of a block, a whole block or a model, with its problem and backend)
and *how* (regime, cache state, routes, seed). It is plain data: it can be rebuilt in another process or
on another machine, and its `cell_id` is the same there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bratune.errors import BratuneError, ProblemError, UnknownNameError
from bratune.problem import Problem
from bratune.text import is_whole_numbers

__all__ = ["FORMS", "L2_STATES", "PARTS", "REGIMES", "ROUTE_KINDS", "RUNTIME_FORMS", "Cell", "form_fields"]

# What a cell times. The first eight add up to `block`; `model` is the whole network; `mixer` is any attention
# with its projections, see `bratune.work.mixers`.
PARTS = (
    "pos_embed",
    "norm",
    "qkv",
    "routing",
    "attention",
    "lepe",
    "proj",
    "mlp",
    "block",
    "model",
    "mixer",
)
# Runtimes of other projects; they compute in the cell's data type or in the one that the name says.
RUNTIME_FORMS = ("onnxruntime", "openvino", "openvino-bf16")
# In which form a model runs: the official sequence of operations, this package's layers, what the runtime
# makes of them for inference, what `Backbone.set_lean` makes of them for training; exported to another
# runtime; a model of timm; yours; the layout of a model with a mixer in the place of its attention.
FORMS = ("published", "plain", "runtime", "lean", *RUNTIME_FORMS, "timm", "yours", "mixer")
REGIMES = ("eager", "graph", "compile")
L2_STATES = ("cold", "warm")
ROUTE_KINDS = ("recorded", "random", "local", "same")
# Rows that were written before cells had a form name it where the backend stands; this is what they mean.
_FORMS_AS_BACKENDS = {"published": "", "runtime": "auto", "lean": "auto", "timm": ""}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured, and how.

    Attributes:
        part: One of `PARTS`.
        problem: The attention call of the stage; for ``model``, that of the first routed stage.
        form: One of `FORMS`; what is no whole model is ``plain`` or ``mixer``.
        backend: Backend name; for ``model``, one name or one per stage joined by ``,`` (see
            `bratune.work.cells.joined_backends`). Empty for parts and models that no backend computes. In the
            form ``mixer``, the mixer's name (see `bratune.kernels.mixers.registry`).
        config: Settings of the backend as canonical JSON; ``{}`` is its default.
        model: Variant name; empty for a bare attention call.
        task: Task name; empty for a bare attention call.
        image: Image size ``(height, width)`` in pixels; (0, 0) for a bare attention call.
        stage: 1 to 4; 0 for a whole model.
        block_count: How often the model repeats this part.
        n_win: S of the stage; for ``model``, the S of every stage joined by ``,``.
        topk: Top-k of the stage; for ``model``, of every stage joined by ``,``.
        regime: ``eager``, ``graph`` (CUDA graph) or ``compile`` (torch.compile).
        l2: ``cold`` (the last-level cache is flushed before every sample) or ``warm``.
        route_distribution: Where routes come from, one of `ROUTE_KINDS`.
        layout: ``nhwc`` or ``nchw`` memory order of the inputs.
        amp: Run under autocast in the problem's dtype, with float32 weights.
        deterministic: ``torch.use_deterministic_algorithms`` is on.
        seed: Seed of inputs and routes.
    """

    part: str
    problem: Problem
    form: str = "plain"
    backend: str = ""
    config: str = "{}"
    model: str = ""
    task: str = ""
    image: tuple[int, int] = (0, 0)
    stage: int = 0
    block_count: int = 1
    n_win: str = ""
    topk: str = ""
    regime: str = "eager"
    l2: str = "cold"
    route_distribution: str = "recorded"
    layout: str = "nhwc"
    amp: bool = False
    deterministic: bool = False
    seed: int = 0
    extra: str = field(default="{}")

    def __post_init__(self) -> None:
        for name, known in (
            ("part", PARTS),
            ("form", FORMS),
            ("regime", REGIMES),
            ("l2", L2_STATES),
            ("route_distribution", ROUTE_KINDS),
        ):
            if getattr(self, name) not in known:
                raise UnknownNameError(name.replace("_", " "), str(getattr(self, name)), known)
        for name in ("n_win", "topk"):
            if getattr(self, name) and not is_whole_numbers(getattr(self, name)):
                raise ProblemError(f"{name} must be whole numbers, not {getattr(self, name)!r}")
        for name in ("config", "extra"):
            try:
                canonical = json.dumps(json.loads(getattr(self, name)), sort_keys=True, separators=(",", ":"))
            except (ValueError, RecursionError):
                raise ProblemError(f"{name} must be JSON, not {str(getattr(self, name))[:80]!r}") from None
            object.__setattr__(self, name, canonical)
        object.__setattr__(self, "image", (int(self.image[0]), int(self.image[1])))

    @property
    def settings(self) -> dict[str, Any]:
        """The backend's settings as a dictionary."""
        return dict(json.loads(self.config))

    @property
    def cell_id(self) -> str:
        """Sixteen hexadecimal digits that name this content; the same in every process.

        A plain form is left out, so that cells have the names that they had before there were forms.
        """
        content = self.to_dict()
        if self.form == "plain":
            del content["form"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["problem"] = self.problem.to_dict()
        data["image"] = list(self.image)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        """The inverse of `to_dict`; of what was written before cells had a form, too.

        Raises:
            ProblemError: a field is missing or not known, or its value is none that a cell can have.
        """
        try:
            fields = dict(data)
            if fields.get("part") == "model" and "form" not in fields:
                fields |= form_fields(str(fields.get("backend", "")))
            fields["problem"] = Problem.from_dict(fields["problem"])
            fields["image"] = tuple(fields.get("image") or (0, 0))
            return cls(**fields)
        except BratuneError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ProblemError(f"this describes no cell: {str(data)[:80]} ({error})") from None

    def replace(self, **changes: Any) -> Cell:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        where = f"{self.model} stage {self.stage}" if self.stage else self.model or "call"
        what = self.part if self.form == "plain" else f"{self.part} ({self.form})"
        return f"{where} {what} by {self.backend}" if self.backend else f"{where} {what}"


def form_fields(backend: str) -> dict[str, str]:
    """Form and backend of a whole model whose row was written before there were forms."""
    if backend in _FORMS_AS_BACKENDS:
        return {"form": backend, "backend": _FORMS_AS_BACKENDS[backend]}
    return {"form": "plain", "backend": backend}
