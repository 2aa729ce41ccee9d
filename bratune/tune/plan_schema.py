"""The JSON schema of plan files, and a check against it that needs no other package.

`PLAN_SCHEMA` is an ordinary JSON schema (draft 2020-12) that other tools may use; `violations` understands
the part of the language that it is written in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PLAN_SCHEMA", "violations"]


def _array(items: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


_INT: dict[str, Any] = {"type": "integer"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
_TEXT: dict[str, Any] = {"type": "string"}
_BOOL: dict[str, Any] = {"type": "boolean"}
_MS: dict[str, Any] = {"type": ["number", "null"], "minimum": 0}
_PAIR: dict[str, Any] = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


_SETTING = _object(
    {"n_win": _array(_COUNT), "topks": _array(_INT), "backends": _array(_TEXT), "configs": _array(_TEXT)},
    {"regime": {"enum": ["eager", "graph", "compile"]}, "layout": {"enum": ["nhwc", "nchw"]}},
)

PLAN_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "bratune plan",
    **_object(
        {
            "kind": {"enum": ["bratune-plan"]},
            "schema": _COUNT,
            "machine": _object({"kind": _TEXT, "device": _TEXT, "gpu_key": _TEXT, "gpu_name": _TEXT}),
            "model": _TEXT,
            "task": _TEXT,
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
                        "backend": _TEXT,
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
                {"verdict": {"enum": ["faster", "default kept", "not compared"]}},
                {
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
            "table_error": {"type": "object"},
            "diagnostics": {"type": "object"},
            "knobs": {"type": "object"},
        },
    ),
}

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
        return [] if value in allowed else [f"{place} must be one of {', '.join(allowed)}, not {value!r}"]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(_KINDS[kind][1] for kind in kinds)
        return [f"{place} must be {wanted}, not {value!r}"]
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
    elif isinstance(value, int | float) and "minimum" in schema and value < schema["minimum"]:
        found.append(f"{place} must be at least {schema['minimum']}, not {value}")
    return found


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _KINDS[kind][0])
