"""Attention as products of sparse matrices: the backend ``sparse``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bratune.backend import Config
from bratune.errors import UnsupportedError
from bratune.kernels import layout
from bratune.kernels.dispatch import is_transformed, refuse_second_derivative
from bratune.machine import Machine
from bratune.problem import Problem

__all__ = ["SparseBackend"]

# What is used here has been stable for years; torch says "beta" on every first use.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_INT32_MAX = 2**31 - 1


class SparseBackend:
    """The routed pattern as one sparse matrix in CSR format, used through `torch.sparse`.

    Rows are the queries of all images and heads, columns their keys, so the matrix is block diagonal.
    The logits are a sampled product (``sampled_addmm``: only the stored positions are computed), the
    softmax runs over the stored values, the output is a sparse times a dense matrix. Every row stores
    ``topk * Tk`` numbers; a region that is routed twice is stored twice.

    CSR and not blocks (BSR): `torch.sparse` samples no product into blocks on a CPU, and its product of
    a block matrix with a dense one took 1.2 to 3.7 times as long there (torch 2.13).
    float16 and bfloat16 are computed in float32: the sampled product has no half precision.
    """

    name = "sparse"

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """Nothing stands in its way but memory, and that is for the device to say."""
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
        if is_transformed():
            raise UnsupportedError(
                self.name,
                ("torch.func and forward-mode differentiation cannot look into its products; gather can be",),
                str(problem),
            )
        dtype = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (
            layout.to_head_regions(x.to(dtype), region, problem.heads).flatten(0, 3)
            for x, region in ((q, problem.region), (k, problem.kv_region), (v, problem.kv_region))
        )  # [B * heads * R * T, D]
        columns = _columns(routes, problem)
        hidden = None
        if problem.padding == "masked":
            valid = layout.valid_tokens(problem.kv_height, problem.kv_width, problem.kv_region, q.device)
            hidden = ~valid.flatten()[columns % valid.numel()]
        function: Any = _SparseAttention  # torch types `apply` as untyped
        attended: Tensor = function.apply(queries, keys, values, columns, hidden, problem.scale)
        split = attended.view(q.shape[0], problem.heads, problem.regions, problem.region_tokens, -1)
        return layout.from_head_regions(split, problem.height, problem.width, problem.region).to(q.dtype)

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """There is nothing to set."""
        return ({},)

    def workspace_bytes(self, problem: Problem) -> int:
        """Maps in regions, then columns, logits, softmax and its scratch for every stored number."""
        item = max(problem.item_bytes, 4)
        stored = problem.score_bytes // problem.item_bytes
        index = 4 if stored <= _INT32_MAX else 8
        return 2 * problem.io_bytes * item // problem.item_bytes + stored * (3 * item + 2 * index)

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add of both products."""
        return 2 * problem.attention_macs


def _columns(routes: Tensor, problem: Problem) -> Tensor:
    """The key of every stored number, ``[B * heads * R * T, topk * Tk]``, int32 where that is enough."""
    batch, heads, regions = routes.shape[0], problem.heads, problem.regions
    # torch.sparse reads and writes wherever a column says.
    routes = layout.checked_routes(routes, problem.kv_regions)
    graph = routes if problem.per_head else routes[:, None].expand(-1, heads, -1, -1)
    flat = layout.flat_routes(graph, problem.kv_regions)  # [B, heads, R, topk]
    tokens = torch.arange(problem.kv_region_tokens, device=routes.device)
    keys = (flat[..., None] * problem.kv_region_tokens + tokens).flatten(3)  # [B, heads, R, topk * Tk]
    stored = batch * heads * regions * problem.region_tokens * problem.keys_per_query
    keys = keys.to(torch.int32 if stored <= _INT32_MAX else torch.int64)
    return keys[:, :, :, None].expand(-1, -1, -1, problem.region_tokens, -1).flatten(0, 3)


def _csr(columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A matrix with the same number of stored values in every row; both tensors are ``[rows, stored]``."""
    rows, stored = columns.shape
    starts = torch.arange(0, rows * stored + 1, stored, dtype=columns.dtype, device=columns.device)
    return _unchecked_csr(starts, columns.flatten(), values.flatten(), (rows, width))


def _unchecked_csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A CSR matrix that may store a position more than once, which the checks of torch would refuse."""
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


def _sampled(a: Tensor, b: Tensor, columns: Tensor, scale: float) -> Tensor:
    """``scale * a @ b.T`` at the stored positions only, ``[rows, stored]``."""
    pattern = _csr(columns, a.new_zeros(columns.shape), b.shape[0])
    product: Tensor = torch.sparse.sampled_addmm(pattern, a, b.t(), beta=0.0, alpha=scale)
    return product.values().view(columns.shape)


class _Transposed:
    """The pattern with rows and columns exchanged; its values are those of the pattern in another order.

    Built by sorting the columns once: `torch.sparse` transposes by converting, which took 2 to 5 times
    as long on a CPU (torch 2.13).
    """

    def __init__(self, columns: Tensor, width: int) -> None:
        rows, stored = columns.shape
        ordered, self.order = torch.sort(columns.flatten(), stable=True)
        edges = torch.arange(width + 1, dtype=columns.dtype, device=columns.device)
        self.starts = torch.searchsorted(ordered, edges).to(columns.dtype)
        self.columns = (self.order // stored).to(columns.dtype)
        self.size = width, rows

    def matmul(self, values: Tensor, dense: Tensor) -> Tensor:
        """The transpose of the matrix with these values, times a dense one."""
        ordered = values.flatten()[self.order]
        return _unchecked_csr(self.starts, self.columns, ordered, self.size) @ dense


class _SparseAttention(torch.autograd.Function):
    """Softmax attention over a sparse pattern; both directions use sampled and sparse products only."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        columns: Tensor,
        hidden: Tensor | None,
        scale: float,
    ) -> Tensor:
        logits = _sampled(queries, keys, columns, scale)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        weights = logits.softmax(1)
        ctx.save_for_backward(queries, keys, values, columns, weights)
        ctx.scale = scale
        return _csr(columns, weights, keys.shape[0]) @ values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("sparse", "the backend gather has one")
        queries, keys, values, columns, weights = ctx.saved_tensors
        transposed = _Transposed(columns, keys.shape[0])
        grad = grad.contiguous()
        grad_weights = _sampled(grad, values, columns, 1.0)
        grad_logits = weights * (grad_weights - (grad_weights * weights).sum(1, keepdim=True)) * ctx.scale
        return (
            _csr(columns, grad_logits, keys.shape[0]) @ keys,
            transposed.matmul(grad_logits, queries),
            transposed.matmul(weights, grad),
            None,
            None,
            None,
        )
