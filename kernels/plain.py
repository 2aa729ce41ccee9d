"""Whether reading a module's weights is as good as calling it.

The layers here read weights in the place of calling modules where that saves work: a 1x1 convolution is a
matrix product, a depthwise one may have a kernel of its own, a norm is computed with the projection after it.
People put things in the way of a call: hooks, adapters, wrappers, parametrizations, quantised twins. Where
anything stands there, the module is called.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bratune.kernels.dispatch import is_recorded

__all__ = ["hooks_of", "is_plain", "is_plain_throughout"]

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
# Classes of these packages do what their names say; a subclass elsewhere may do anything.
_KNOWN = ("torch.nn.modules.", "bratune.kernels.")


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, with nothing between a call and its weights.

    Not plain are subclasses (adapters, parametrizations, FSDP), modules with hooks or with a ``forward`` of
    their own (weight norm, pruning, observers, offloading), and weights that are more than a tensor.
    """
    known = module is not None and type(module) in kinds
    return known and not _is_watched(module) and _has_plain_weights(module)  # type: ignore[arg-type]


def is_plain_throughout(root: nn.Module) -> bool:
    """Whether a module and all modules in it are torch's own or ours, each of them plain."""
    return all(type(m).__module__.startswith(_KNOWN) and is_plain(m, type(m)) for m in root.modules())


def hooks_of(module: nn.Module) -> tuple[str, ...]:
    """What would run with a call of this very module, in words."""
    found = [text for name, text in _HOOKS.items() if getattr(module, name)]
    if "forward" in vars(module):
        found.append("a forward of its own")
    return tuple(found)


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _has_plain_weights(module: nn.Module) -> bool:
    """No quantised or distributed tensors; those of a graph that is recorded only pretend."""
    weights = module._parameters.values()
    return is_recorded() or all(w is None or type(w) in (nn.Parameter, Tensor) for w in weights)
