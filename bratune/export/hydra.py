"""hydra: a config group file that chooses the exported model in the official training code."""

from __future__ import annotations

from bratune.export.fields import DROP_PATH, header, identifier
from bratune.export.timm import launch_line
from bratune.tune.plan import Plan

__all__ = ["hydra_group"]


def hydra_group(plan: Plan, name: str = "") -> str:
    """The YAML of ``configs/bratune/NAME.yaml``.

    Its first line makes the keys global; without it they land below ``bratune:`` and change nothing.

    Args:
        plan: What to export.
        name: Of the model that the timm module registers.
    """
    name = identifier(plan, name)
    return f"""# @package _global_
{header(plan)}
#
# Put this file at configs/bratune/{name}.yaml and choose it with:
#   python hydra_main.py +bratune={name}
# It needs the module that `bratune export PLAN --to timm` writes, imported in main.py. The same by hand:
#   {launch_line(plan, name)}
model: {name}  # model: S and top-k live in the registered function, main.py passes nothing else
input_size: {plan.height}  # model: what the plan was tuned at
batch_size: 128  # cost
drop_path: {DROP_PATH[plan.model]}
lr: 5e-4
"""
