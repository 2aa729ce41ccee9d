"""Steps: a block taken apart into the parts that are timed, which together compute what the block computes.

Every step reads and adds named tensors of a state, so that any step can be run alone on the state that
the steps before it leave:

    >>> state = {"x": x}
    >>> for step in steps_of(block):
    ...     state |= step.run(state)
    >>> torch.equal(state["x"], block(x))
    True

Attention maps, recall and the optimized models take a layer apart by the same methods of the layer;
`bratune.predict.parts` has the sizes of the same parts without any layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from bratune.kernels import layout
from bratune.kernels.blocks import Residual
from bratune.kernels.full_attention import AttentionLePE
from bratune.kernels.nhwc import conv_nhwc

__all__ = ["State", "Step", "queries_and_keys", "steps_of"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """A piece of a block.

    Attributes:
        part: Its name in `bratune.cell.PARTS`; both norms have the same.
        run: From a state to the tensors that the step adds to it.
    """

    part: str
    run: Callable[[State], State]


def steps_of(block: Residual) -> tuple[Step, ...]:
    """The steps of a block, in the order in which they run.

    The state starts with ``x``, the map ``[B, H, W, C]``, and ends with the block's output in ``x``. The
    steps are those of a block that is evaluated: no branch is dropped, and no layer is scaled.
    """
    attn: Any = block.attn  # any of the five modules; they share the names of their parts
    steps = [
        Step(
            "pos_embed",
            lambda s: {"x": conv_nhwc(cast(nn.Module, block.pos_embed), s["x"], add=s["x"])},
        ),
        Step("norm", lambda s: {"y": block.norm1(s["x"])}),
        Step("qkv", lambda s: _project(attn, s["y"])),
        Step("routing", lambda s: {"routes": attn.route(s["q"], s["k"])}),
        Step("attention", _attention(attn)),
        Step("lepe", _enhance(attn)),
        Step("proj", lambda s: {"x": s["x"] + _cropped(attn.merge(s["out"]), s["x"])}),
        Step("norm", lambda s: {"y": block.norm2(s["x"])}),
        Step("mlp", lambda s: {"x": s["x"] + block.feed(s["y"])}),
    ]
    absent = set()
    if block.pos_embed is None:
        absent.add("pos_embed")
    if not hasattr(attn, "route"):
        absent.add("routing")
    if getattr(attn, "lepe", None) is None:
        absent.add("lepe")
    return tuple(step for step in steps if step.part not in absent)


def queries_and_keys(attn: nn.Module, y: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """What level two of a routed layer compares.

    Args:
        attn: The layer, of either layout, with a key for every token.
        y: Its input, ``[B, H, W, C]``.

    Returns:
        Queries and keys, ``[B, Hp, Wp, C]`` each, as the layer routes by them, and the region ``(rh, rw)``.
        Where regions do not tile the map, the NHWC module has padded its input; the NCHW module adds zeros
        to these.
    """
    layer: Any = attn
    state = _project(layer, y)
    return state["q"], state["k"], layer.region_of(*layout.sides(state["q"]))


def _project(attn: Any, y: Tensor) -> State:
    padded = attn.pad(y) if hasattr(attn, "pad") else y
    q, k, v = attn.project(padded)
    return {"q": q, "k": k, "v": v}


def _attention(attn: Any) -> Callable[[State], State]:
    if hasattr(attn, "route"):
        return lambda s: {"out": attn.attend(s["q"], s["k"], s["v"], s["routes"])}
    return lambda s: {"out": attn.attend(s["q"], s["k"], s["v"])}


def _enhance(attn: Any) -> Callable[[State], State]:
    """Add the local term: of the values, but of the module's input in the official full attention."""
    source = "y" if isinstance(attn, AttentionLePE) else "v"
    return lambda s: {"out": s["out"] + attn.enhance(s[source])}


def _cropped(merged: Tensor, x: Tensor) -> Tensor:
    return layout.crop_tokens(merged, x.shape[1], x.shape[2])
