"""timm: a Python module that registers the tuned model, for the official classification code.

The official ``main.py`` passes a model's name and nothing else of it, and its own entry points reject S and
top-k, so a new name is the only way. One line has to be added there: the import of this module.
"""

from __future__ import annotations

from bratune.export.fields import DROP_PATH, classifier_fields, cost_fields, header, identifier, render_call
from bratune.tune.plan import Plan
from bratune.variant import get_variant

__all__ = ["launch_line", "timm_module"]

_HOMES = {
    "biformer": ("models.biformer", "BiFormer"),
    "stl": ("models.biformer_stl", "BiFormerSTL"),
    "stl_nchw": ("models.biformer_stl_nchw", "nchwBiFormerSTL"),
}
_OWN = {"biformer": "BiFormer", "stl": "BiFormerSTL", "stl_nchw": "NCHWBiFormerSTL"}


def launch_line(plan: Plan, name: str) -> str:
    """The command that trains it with the official code on eight GPUs."""
    rate = DROP_PATH[plan.model]
    return (
        f"python hydra_main.py model={name} input_size={plan.height} batch_size=128 drop_path={rate} lr=5e-4"
    )


def timm_module(plan: Plan, name: str = "") -> str:
    """The source of the module.

    Args:
        plan: What to export.
        name: Of the registered model; by default from model, GPU and resolution.

    Raises:
        PlanError: the official class cannot hold the plan.
    """
    name = identifier(plan, name)
    layout = get_variant(plan.model).layout
    home, official = _HOMES[layout]
    fields = classifier_fields(plan, "a timm module")
    own = [f for f in fields if layout != "stl_nchw" or f.name != "auto_pad"] + cost_fields(plan)
    norm = "" if layout == "biformer" else "        norm_layer=nn.BatchNorm2d,\n"
    nn_import = "" if layout == "biformer" else "from torch import nn\n"
    return f'''{header(plan)}
"""{name}: tuned by bratune.

In the official repository, add one line to main.py (and hydra_main.py uses it too):

    import {name}  # noqa: F401

Train with: {launch_line(plan, name)}
Works with timm 0.8 and 1.0. `{name}` needs the official repository on the path,
`{name}_backends` needs bratune instead and has the same parameters.
"""

{nn_import}
try:
    from timm.models import register_model
except ImportError:  # timm before 0.9
    from timm.models.registry import register_model

# What timm passes for its own use; the model does not know it.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict", "scriptable")


def _own_arguments(pretrained, arguments):
    if pretrained:
        raise ValueError("{name} has no weights to download; load yours with load_state_dict")
    return {{k: v for k, v in arguments.items() if k not in _TIMM_ONLY and v is not None}}


@register_model
def {name}(pretrained=False, **kwargs):
    """The tuned model, built by the official code."""
    from {home} import {official}

    arguments = dict(
{render_call(fields, indent=8)}
{norm}    )
    arguments.update(_own_arguments(pretrained, kwargs))
    return {official}(**arguments)


@register_model
def {name}_backends(pretrained=False, **kwargs):
    """The tuned model, built by bratune, every stage with its tuned backend."""
    from bratune.kernels.biformer import {_OWN[layout]}

    arguments = dict(
{render_call(own, indent=8)}
{norm}    )
    arguments.update(_own_arguments(pretrained, kwargs))
    return {_OWN[layout]}(**arguments)
'''
