"""Libraries that exports are for, imported with what their CPU wheels lack, or a reason to skip.

Beside a CPU build of torch, torchvision often comes without its compiled operators, and mmcv is installed
without them. Both only have to be imported: nothing that these tests run calls an operator.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from typing import Any

import pytest
from torch.library import Library

__all__ = ["require", "require_mm"]

# Kept for the life of the process: a library that is collected takes its operators along.
_OPERATORS: list[Any] = []


def require(name: str) -> Any:
    """A library that needs torchvision, or a skipped test."""
    try:
        _import_torchvision()
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # it may be there and what it needs not
        pytest.skip(f"{name} cannot be imported here: {error}")


def require_mm(name: str, generation: int) -> Any:
    """mmseg or mmdet of the generation before (0) or since (1) mmengine, or a skipped test."""
    pytest.importorskip("mmcv", reason=f"{name} is not installed")
    if "mmcv._ext" not in sys.modules:
        extension = _NoOperators("mmcv._ext")
        extension.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
        sys.modules["mmcv._ext"] = extension
    mmcv = importlib.import_module("mmcv")
    if (int(mmcv.__version__.split(".")[0]) >= 2) != bool(generation):
        pytest.skip(f"the config is for another {name} than goes with mmcv {mmcv.__version__}")
    module = require(name)
    importlib.import_module(f"{name}.models")
    return module


class _NoOperators(types.ModuleType):
    """mmcv's extension as mmcv looks at it while it is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*arguments: Any, **named: Any) -> None:
            raise RuntimeError(f"mmcv is installed without its operators, {name} among them")

        return operator


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its Python describes operators that its library did not bring
        operators: Any = Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(operators)
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
