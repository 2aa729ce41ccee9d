"""The backend ``reference``: slow, and right in a way that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bratune.backend import Config
from bratune.kernels import layout
from bratune.machine import Machine
from bratune.problem import Problem

__all__ = ["ReferenceBackend", "rounding_error"]


class ReferenceBackend:
    """One query region after the other, in float64 whatever the inputs are, rounded once at the end.

    It does everything that a problem can ask for and is what every other backend is compared with.
    """

    name = "reference"

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """Nothing stands in its way."""
        return ()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """Attend from every query region to its routed key regions; see `bratune.backend.Backend`."""
        outputs = [logits.softmax(-1) @ values for logits, values in _by_region(q, k, v, routes, problem)]
        return _joined(outputs, problem).to(q.dtype)

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """There is nothing to set."""
        return ({},)

    def workspace_bytes(self, problem: Problem) -> int:
        """The maps in float64, three times over, and one region's keys, values and scores."""
        maps = problem.io_bytes // problem.item_bytes * 3
        region = (problem.gathered_bytes + 3 * problem.score_bytes) // (problem.regions * problem.item_bytes)
        return (maps + region) * 8

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add of both products."""
        return 2 * problem.attention_macs


def rounding_error(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, problem: Problem, unit: float) -> Tensor:
    """How far outputs may be from the truth where logits, weights and outputs are rounded; to first order.

    A logit is rounded twice, as a product and with its scale, a weight and an output once. An error of the
    logits moves the output by the mean of its product with the distance of the values from the output; that
    is at most the root of the product of their mean squares (Cauchy-Schwarz). It grows with the logits until
    one key has all the weight.

    Args:
        q: See `bratune.backend.Backend.forward`, as are k, v, routes and problem.
        k: Keys.
        v: Values.
        routes: Routes.
        problem: The call.
        unit: Largest relative error of one rounding.

    Returns:
        ``[B, H, W, heads * Dv]``, float64.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition (2002), section 2.2, for
    the model of rounding.
    """
    errors = []
    for logits, values in _by_region(q, k, v, routes, problem):
        weights = logits.softmax(-1)
        out = weights @ values
        spread = (weights @ values.square() - out.square()).clamp_min(0.0)
        sizes = torch.where(
            weights > 0, logits, torch.zeros_like(logits)
        ).square()  # a masked one is infinite
        moved = 2 * ((weights * sizes).sum(-1, keepdim=True) * spread).sqrt()
        errors.append(unit * (moved + weights @ values.abs() + out.abs()))
    return _joined(errors, problem)


def _by_region(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, problem: Problem
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits ``[B, heads, T, topk * Tk]`` of every query region with the values that it attends to."""
    heads = problem.heads
    queries = layout.to_head_regions(q.double(), problem.region, heads)  # [B, heads, R, T, D]
    keys = layout.to_head_regions(k.double(), problem.kv_region, heads)  # [B, heads, Rk, Tk, D]
    values = layout.to_head_regions(v.double(), problem.kv_region, heads)
    valid = layout.valid_tokens(problem.kv_height, problem.kv_width, problem.kv_region, q.device)
    routes = layout.checked_routes(routes, problem.kv_regions)
    if not problem.per_head:
        routes = routes[:, None].expand(-1, heads, -1, -1)
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    head = torch.arange(heads, device=q.device)[None, :, None]
    for region in range(problem.regions):
        routed = routes[:, :, region]  # [B, heads, topk]
        k_routed = keys[image, head, routed].flatten(2, 3)  # [B, heads, topk * Tk, D]
        v_routed = values[image, head, routed].flatten(2, 3)
        logits = queries[:, :, region] @ k_routed.transpose(-2, -1) * problem.scale
        if problem.padding == "masked":
            # No region is all padding, so every row keeps a key and its softmax is finite.
            real = valid[routed].flatten(2, 3)  # [B, heads, topk * Tk]
            logits = logits.masked_fill(~real[:, :, None, :], -torch.inf)
        yield logits, v_routed


def _joined(regions: Sequence[Tensor], problem: Problem) -> Tensor:
    """The map of what was computed region by region, ``[B, heads, T, Dv]`` each."""
    attended = torch.stack(list(regions), dim=2)  # [B, heads, R, T, Dv]
    return layout.from_head_regions(attended, problem.height, problem.width, problem.region)
