"""The JSON schema of plan files, and a check against it that needs no other package.

`PLAN_SCHEMA` is an ordinary JSON schema (draft 2020-12) that other tools may use; `violations` understands
the part of the language that it is written in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from bratune.measure.verdict import VERDICTS
from bratune.text import NAME, is_plain, one_line

__all__ = [
    "EARLIER_VERDICTS",
    "FRONT_SCHEMA",
    "MODEL_PLAN_SCHEMA",
    "PLAN_SCHEMA",
    "hidden_texts",
    "on_lines",
    "violations",
]

# What `end_to_end` of schema 1 said in the place of a verdict.
EARLIER_VERDICTS = ("faster", "default kept", "not compared")
# Beyond this a number is nothing that was measured, and arithmetic on it overflows.
_LARGEST = 1e300


def _array(items: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


_INT: dict[str, Any] = {"type": "integer"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
_NOT_NEGATIVE: dict[str, Any] = {"type": "integer", "minimum": 0}
_TEXT: dict[str, Any] = {"type": "string"}
_LETTERS = "a name of letters, digits and ._+-"
_NAME: dict[str, Any] = {"type": "string", "pattern": NAME, "description": _LETTERS}
_NAME_OR_NONE: dict[str, Any] = {"type": "string", "pattern": f"^$|{NAME}", "description": _LETTERS}
_TEXT_OR_NONE: dict[str, Any] = {"type": ["string", "null"]}
_NUMBER: dict[str, Any] = {"type": "number"}
_BOOL: dict[str, Any] = {"type": "boolean"}
_MS: dict[str, Any] = {"type": ["number", "null"], "minimum": 0}
_PAIR: dict[str, Any] = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _number(*names: str) -> dict[str, Any]:
    """A number with its interval, or nothing."""
    found = _object({names[0]: {"type": "number", "minimum": 0}}, dict.fromkeys(names[1:], _MS))
    return {**found, "type": ["object", "null"]}


_TIME, _RATIO = _number("median_ms", "ci_lo_ms", "ci_hi_ms"), _number("value", "lo", "hi")
_SETTING = _object(
    {
        "n_win": _array(_COUNT),
        "topks": _array(_INT),
        "backends": _array(_NAME_OR_NONE),
        "configs": _array(_TEXT),
    },
    {"regime": {"enum": ["eager", "graph", "compile"]}, "layout": {"enum": ["nhwc", "nchw"]}},
)

# How well the sum of stages predicted whole models.
_ERRORS = ("mape", "kendall", "spearman")

_MACHINE = _object(
    {"kind": {"enum": ["cuda", "cpu"]}, "device": _TEXT, "gpu_key": _NAME, "gpu_name": _TEXT},
    {
        "gpu_uuid": _TEXT,
        "compute_capability": {
            "type": "string",
            "pattern": r"^$|^[0-9]+\.[0-9]+$",
            "description": "two numbers, as 9.0, or empty",
        },
        "sm_count": _NOT_NEGATIVE,
        "memory_gib": {"type": "number", "minimum": 0},
        "l2_bytes": _NOT_NEGATIVE,
        "smem_per_block_kib": _NOT_NEGATIVE,
        "threads": _NOT_NEGATIVE,
        **{name: _TEXT for name in ("driver", "cuda", "torch", "triton", "python", "bratune", "git_sha")},
        "git_dirty": {"type": ["boolean", "null"]},
    },
)

PLAN_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "bratune plan",
    **_object(
        {
            "kind": {"enum": ["bratune-plan"]},
            "schema": _COUNT,
            "machine": _MACHINE,
            "model": _NAME,
            "task": _NAME,
            "resolution": _array(_COUNT, minItems=2, maxItems=2),
            "batch": _COUNT,
            "dtype": {"enum": ["float16", "bfloat16", "float32", "float64"]},
            "direction": {"enum": ["fwd", "fwd-bwd"]},
            "setting": _SETTING,
            "default": _SETTING,
            "stages": _array(
                _object(
                    {
                        "stage": _COUNT,
                        "blocks": _COUNT,
                        "kind": {"enum": ["routed", "full", "conv"]},
                        "n_win": _INT,
                        "topk": _INT,
                        "backend": _NAME_OR_NONE,
                        "config": {"type": "object"},
                    },
                    {
                        "problem": {"type": ["object", "null"]},
                        "default_ms": _MS,
                        "tuned_ms": _MS,
                        "ci": _PAIR,
                        "n": {"type": ["integer", "null"]},
                        "complete": _BOOL,
                    },
                )
            ),
            "end_to_end": _object(
                {"verdict": {"enum": [*VERDICTS, None, *EARLIER_VERDICTS]}},
                {
                    **dict.fromkeys(("published", "default", "tuned"), _TIME),
                    **dict.fromkeys(("speedup_vs_default", "speedup_vs_published"), _RATIO),
                    "passes": _INT,
                    # schema 1
                    "default_ms": _MS,
                    "tuned_ms": _MS,
                    "speedup": _MS,
                    "speedup_ci": _PAIR,
                    "rounds": _INT,
                    "reason": _TEXT,
                },
            ),
            "evidence": _object(
                {"level": {"enum": ["E0", "E1", "E2", "E3"]}, "text": _TEXT}, {"values": {"type": "object"}}
            ),
        },
        {
            "created_utc": _TEXT,
            "command": _TEXT,
            "study": _TEXT,
            "seed": _INT,
            "complete": _BOOL,
            "measured": {"enum": ["measured", "replayed", "modelled"]},
            "amp": _BOOL,
            "l2": {"enum": ["cold", "warm"]},
            "padding": {"enum": ["zeros", "masked"]},
            "reason": _TEXT,
            "table_error": _object({}, {"n": _NOT_NEGATIVE, **dict.fromkeys(_ERRORS, _NUMBER)}),
            "diagnostics": {"type": "object"},
            "knobs": {"type": "object"},
        },
    ),
}

# What `bratune.tune.model_plan.ModelPlan` holds.
MODEL_PLAN_SCHEMA = _object(
    {
        "kind": {"enum": ["bratune-model-plan"]},
        "schema": _COUNT,
        **dict.fromkeys(("model", "input", "dtype", "direction", "verdict", "reason", "created_utc"), _TEXT),
        "machine": _MACHINE,
        "layers": _array(
            _object(
                {"name": _TEXT, "backend": _NAME, "calls": _COUNT},
                {"gather_ms": _MS, "tuned_ms": _MS, "fastest": _NAME_OR_NONE},
            )
        ),
        "left": {"type": "object"},
        **dict.fromkeys(("as_is_ms", "tuned_ms", "speedup"), _MS),
        "speedup_ci": _PAIR,
    }
)
# The settings that a search verified end to end, as ``front.json`` beside a plan.
FRONT_SCHEMA = _array(
    _object(
        {
            "setting": _TEXT,
            "ms": {"type": "number", "minimum": 0},
            "evidence": _TEXT,
            "front": _BOOL,
            "picked": _BOOL,
        },
        {"name": _TEXT_OR_NONE, "peak_alloc_mb": _MS, "divergence": _MS},
    )
)

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "object": ((Mapping,), "an object"),
    "array": ((list, tuple), "a list"),
    "string": ((str,), "text"),
    "integer": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
    "null": ((type(None),), "nothing"),
}


def violations(value: Any, schema: Mapping[str, Any], where: str = "") -> list[str]:
    """What a value breaks, each as ``place: what it needs, what was found``; empty when it fits."""
    place = where or "the file"
    if "enum" in schema:
        allowed = schema["enum"]
        names = ", ".join("nothing" if one is None else one for one in allowed)
        return [] if value in allowed else [f"{place} must be one of {names}, not {_short(value)}"]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(_KINDS[kind][1] for kind in kinds)
        return [f"{place} must be {wanted}, not {_short(value)}"]
    found: list[str] = []
    if isinstance(value, Mapping):
        for name in schema.get("required", ()):
            if name not in value:
                found.append(f"{place} lacks {name!r}")
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                found += violations(value[name], inner, f"{where}.{name}" if where else name)
    elif isinstance(value, list | tuple):
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not low <= len(value) <= high:
            found.append(f"{place} must have {low} values, not {len(value)}")
        for i, item in enumerate(value):
            found += violations(item, schema.get("items", {}), f"{place}[{i}]")
    elif isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            found.append(f"{place} must be {schema['description']}, not {_short(value)}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= _LARGEST:
        found.append(f"{place} must be a finite number, not {_short(value)}")
    elif isinstance(value, int | float) and "minimum" in schema and value < schema["minimum"]:
        found.append(f"{place} must be at least {schema['minimum']}, not {value}")
    return found


def hidden_texts(value: Any, where: str = "") -> list[str]:
    """Texts and numbers anywhere in plain data that a plan never holds, each as ``place: what was found``.

    These are characters that are not printed (they end lines, colour terminals or change the direction of
    writing) and numbers that are not finite, also where the schema says nothing of a value.
    """
    place = where or "the file"
    if isinstance(value, str):
        return [] if is_plain(value) else [f"{place} holds characters that are not printed: {_short(value)}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{place} must be a finite number, not {value}"]
    found: list[str] = []
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not is_plain(str(name)):
                found.append(f"a name in {place} holds characters that are not printed: {_short(name)}")
            found += hidden_texts(inner, f"{where}.{one_line(str(name))}" if where else one_line(str(name)))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            found += hidden_texts(item, f"{where}[{i}]")
    return found


def on_lines(value: Any) -> Any:
    """Plain data whose texts are on one line each, as those who read plans demand."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, Mapping):
        return {one_line(str(key)): on_lines(inner) for key, inner in value.items()}
    return [on_lines(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any, most: int = 60) -> str:
    """A value as it is shown in a message."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    return one_line(text if len(text) <= most else f"{text[:most]}...")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _KINDS[kind][0])
