"""The models under timm's names: ``import bratune.kernels.timm_models``, then ``timm.create_model``.

    >>> import timm
    >>> import bratune.kernels.timm_models
    >>> model = timm.create_model("bratune_biformer_small", num_classes=10, n_win=8, auto_pad=True)

Importing this module is what registers; timm stays optional for everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from bratune.errors import CheckpointError
from bratune.kernels.biformer import build
from bratune.kernels.timm_import import import_timm
from bratune.variant import VARIANTS

timm = import_timm("timm.create_model")

__all__ = ["PREFIX"]

PREFIX = "bratune_"
# What timm hands to every entry point and only its own hub loader understands.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict", "scriptable")


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        if pretrained:
            raise CheckpointError(
                f"{PREFIX}{name} has no weights to download; checkpoint_path=FILE of timm.create_model loads "
                "a file"
            )
        for key in _TIMM_ONLY:
            arguments.pop(key, None)
        return build(name, **arguments)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__module__ = __name__
    create.__doc__ = f"The published {name}; arguments of its constructor are keywords."
    return create


def _register() -> None:
    module = sys.modules[__name__]
    for name in VARIANTS:
        entry = _entry_point(name)
        setattr(module, entry.__name__, entry)
        __all__.append(entry.__name__)
        if not timm.models.is_model(entry.__name__):
            timm.models.register_model(entry)


_register()
