"""bratune: which region factor, top-k and backend should a BiFormer run, on this GPU, for this task?

Public names are loaded when they are first used, so that ``import bratune`` and ``bratune --help``
do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BiLevelRoutingAttention",
    "ModelPlan",
    "Plan",
    "__version__",
    "accelerate",
    "create_model",
    "load_plan",
    "profile_model",
    "tune_model",
]

if TYPE_CHECKING:
    from bratune.foreign import accelerate
    from bratune.kernels.layer import BiLevelRoutingAttention
    from bratune.run.yours import profile_model
    from bratune.tune.create import create_model
    from bratune.tune.model_plan import ModelPlan, tune_model
    from bratune.tune.plan import Plan, load_plan

_HOMES = {
    "BiLevelRoutingAttention": "bratune.kernels.layer",
    "ModelPlan": "bratune.tune.model_plan",
    "Plan": "bratune.tune.plan",
    "accelerate": "bratune.foreign",
    "create_model": "bratune.tune.create",
    "load_plan": "bratune.tune.plan",
    "profile_model": "bratune.run.yours",
    "tune_model": "bratune.tune.model_plan",
}


# Modules that README names; they, too, are loaded when they are first used.
_MODULES = ("gpus", "results", "store", "suites", "testing")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"bratune.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bratune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
