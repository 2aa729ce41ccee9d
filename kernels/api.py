"""Routed attention as one function: give it tensors, name a backend or let one be chosen."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from bratune import machine as machines
from bratune.backend import Backend, Config
from bratune.errors import ConfigError, ProblemError, UnsupportedError
from bratune.kernels import layout, registry, tuned
from bratune.kernels.constants import constant_in_graphs
from bratune.kernels.dispatch import is_exported, is_observed, is_transformed
from bratune.kernels.routing import route
from bratune.machine import Machine
from bratune.problem import Problem

__all__ = ["OPERATORS", "route", "routed_attention"]


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int] | None = None,
    scale: float | None = None,
    padding: str = "zeros",
    backend: str = "auto",
    config: Config | None = None,
) -> Tensor:
    """Attend from the tokens of every query region to the tokens of its routed key regions.

    For one image, one head and one query region, with maps that regions tile, it equals::

        keys = torch.cat([k_regions[i] for i in routes[r]])      # [topk * krh * krw, head_dim]
        values = torch.cat([v_regions[i] for i in routes[r]])
        out_regions[r] = ((q_regions[r] * scale) @ keys.T).softmax(-1) @ values

    Args:
        q: Queries ``[B, Hq, Wq, C]`` with ``C = heads * head_dim``, head-major; any strides, so slices of
            one qkv tensor are fine.
        k: Keys ``[B, Hk, Wk, C]``.
        v: Values ``[B, Hk, Wk, Cv]``; ``Cv`` is a multiple of ``heads``.
        routes: Indices of key regions, ``[B, R, topk]`` for all heads or ``[B, heads, R, topk]``, int32 or
            int64; an index that occurs twice counts twice. One that is out of range is a `ProblemError`
            on a CPU; on a GPU, where looking would wait for the device, and in a graph it is an error of the
            operations, as far as they look.
        heads: Attention heads.
        region: Query region ``(rh, rw)`` in tokens.
        kv_region: Key region in tokens; by default that of the queries.
        scale: Factor of the logits; by default ``C ** -0.5``, as the released weights expect.
        padding: What fills maps that regions do not tile. ``zeros``: keys like any other, with logit 0 and
            value 0 (the official behaviour). ``masked``: keys without weight.
        backend: A name of `bratune.kernels.registry.names`, or ``auto``: what a plan recommends for this
            call (`bratune.kernels.tuned`), else the first that accepts.
        config: Settings of the backend, one of its ``configs``; by default its first.

    Returns:
        ``[B, Hq, Wq, Cv]`` in the dtype of q, differentiable in q, k and v. Under autocast, inputs are first
        cast to the dtype of autocast, as for the attention of PyTorch.

    Raises:
        ProblemError: shapes, dtypes or devices contradict each other, or a route is out of range.
        UnknownNameError: no backend has this name.
        UnsupportedError: the backend cannot do this here; the message has every reason.
        ConfigError: the backend has no such setting.

    Source: BiFormer, arXiv 2303.08810, equations 5 and 6, without the local term.
    """
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return _attend(q, k, v, routes, heads, region, kv_region, scale, padding, backend, config)
    if q.dtype != torch.float64:
        lower = torch.get_autocast_dtype(kind)
        q, k, v = q.to(lower), k.to(lower), v.to(lower)
    with torch.autocast(kind, enabled=False):
        return _attend(q, k, v, routes, heads, region, kv_region, scale, padding, backend, config)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int] | None,
    scale: float | None,
    padding: str,
    backend: str,
    config: Config | None,
) -> Tensor:
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    as_before: tuple[Any, ...] | None = None
    if config is None and not is_observed(q):
        as_before = (
            q.shape, k.shape, v.shape, routes.shape, q.dtype, k.dtype, v.dtype, routes.dtype,
            q.device, k.device, v.device, routes.device,
            needs_grad, heads, tuple(region), kv_region and tuple(kv_region), scale, padding, backend,
        )  # fmt: skip
        known = _KNOWN.get(as_before)
        if known is not None:
            problem, chosen, planned, nothing_to_check = known
            if nothing_to_check:
                return chosen.forward(q, k, v, routes, problem, planned)
            return _run(q, k, v, routes, problem, chosen, planned)
    _check_alike(q, k, v, routes)
    call = _resolve(
        *_shapes(q, k, v, routes),
        str(q.dtype),
        str(q.device),
        needs_grad,
        heads,
        tuple(region),
        None if kv_region is None else tuple(kv_region),
        _settled_scale(scale),
        padding,
        backend,
        () if config is None else tuple(sorted(config)),
        is_exported(),
    )
    found: tuple[Problem, Backend, Config | None] = getattr(_RESOLVED, call)
    problem, chosen, planned = found
    if as_before is not None:
        if len(_KNOWN) >= _MOST_CALLS:
            _KNOWN.clear()
        _KNOWN[as_before] = (*found, q.shape[0] > 0 and (q.device.type != "cpu" or _checks_routes(chosen)))
    return _run(q, k, v, routes, problem, chosen, planned if config is None else config)


def _run(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, problem: Problem, chosen: Backend, config: Config | None
) -> Tensor:
    """The backend that was chosen, on tensors that fit."""
    if _is_empty(q):
        return _nothing(q, k, v)
    if routes.device.type == "cpu" and not (
        _checks_routes(chosen) or is_observed(routes) or is_transformed()
    ):
        _check_range(routes, problem.kv_regions)
    return chosen.forward(q, k, v, routes, problem, config)


def _checks_routes(chosen: Backend) -> bool:
    return getattr(chosen, "checks_routes", False)


def _shapes(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """The shapes as plain integers, on which a graph settles, but for the batch that it may leave open."""
    shapes = tuple(layout.comparable(x.shape) for x in tensors)
    if any(shape[:1] != shapes[0][:1] for shape in shapes):
        return tuple(layout.settled(shape) for shape in shapes)  # an error that `_check_shapes` words
    return tuple((*map(layout.batch_to_choose_by, s[:1]), *layout.settled(s[1:])) for s in shapes)


def _settled_scale(scale: float | None) -> float | None:
    """The factor as a plain number: with ``dynamic=True``, torch.compile makes a symbol of it."""
    if scale is None or not torch.compiler.is_compiling():
        return scale
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(scale)


def _is_empty(x: Tensor) -> bool:
    """Whether a batch has no image; a trace of one that has takes none that has not."""
    return not torch.jit.is_tracing() and x.shape[0] == 0  # type: ignore[attr-defined, no-untyped-call]


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result of an empty batch, differentiable as any other."""
    return q.new_zeros(0, *q.shape[1:3], v.shape[3]) + 0.0 * (q.sum() + k.sum() + v.sum())


def _check_range(routes: Tensor, kv_regions: int) -> None:
    lowest, highest = torch.aminmax(routes)
    if lowest < 0 or highest >= kv_regions:
        where = ((routes < 0) | (routes >= kv_regions)).nonzero()[0].tolist()
        raise ProblemError(
            f"route {int(routes[tuple(where)])} at {where} is out of range: there are {kv_regions} key "
            f"regions, 0 to {kv_regions - 1}"
        )


def _check_alike(q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise ProblemError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device == routes.device:
        raise ProblemError(
            f"q, k, v and routes must be on one device, not {q.device}, {k.device}, {v.device} "
            f"and {routes.device}"
        )
    if routes.dtype not in (torch.int32, torch.int64):
        raise ProblemError(f"routes must be int32 or int64, not {routes.dtype}")


class _Resolved:
    """The problem, the backend and a plan's settings for it, of the calls seen so far, an attribute each.

    They are kept here and not returned by `_resolve` because torch.compile can take a name as a constant of
    its graph, but not an object. They are attributes because it reads a dictionary once and for all, before
    `_resolve` has written to it, and an attribute when it is asked for.
    """

    def clear(self) -> None:
        """Forget all calls."""
        vars(self).clear()


def forget_calls() -> None:
    """Choose anew in every later call: backends or plans are others now."""
    _PLACES.clear()
    _KNOWN.clear()


_RESOLVED = _Resolved()
_PLACES: dict[tuple[Any, ...], str] = {}
# The same by what tensors say of themselves, where no graph is made: most calls are like one before. Last,
# whether the backend may be called at once: there is an image, and it is the backend that looks at routes.
_KNOWN: dict[tuple[Any, ...], tuple[Problem, Backend, Config | None, bool]] = {}
_NUMBERS = itertools.count()
# Backends that are operators of ours in a graph, which other tools do not know.
OPERATORS = ("triton", "native")
# Detection at free resolutions makes a new call per image size; the older half of so many is let go.
_MOST_CALLS = 4096


@constant_in_graphs
def _resolve(*call: Any) -> str:
    """The place in `_RESOLVED` of what was found out about a call."""
    place = _PLACES.get(call)
    if place is None:
        found = _found_out(*call)
        if len(_PLACES) >= _MOST_CALLS:
            for old in list(_PLACES)[: _MOST_CALLS // 2]:
                vars(_RESOLVED).pop(_PLACES.pop(old, ""), None)
        place = f"call_{next(_NUMBERS)}"
        setattr(_RESOLVED, place, found)
        _PLACES[call] = place
    return place


def _found_out(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    routes: tuple[int, ...],
    dtype: str,
    device: str,
    needs_grad: bool,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int] | None,
    scale: float | None,
    padding: str,
    backend: str,
    settings: tuple[str, ...],
    exported: bool,
) -> tuple[Problem, Backend, Config | None]:
    """The problem that tensors of these shapes state, its backend, and a plan's settings for it."""
    _check_shapes(q, k, v, heads)
    if scale is not None and not (scale and math.isfinite(scale)):
        raise ProblemError(f"scale must be a number other than 0, not {scale}")
    if len(routes) not in (3, 4):
        raise ProblemError(f"routes must be [B, R, topk] or [B, heads, R, topk], not {list(routes)}")
    problem = Problem(
        batch=q[0],
        height=q[1],
        width=q[2],
        heads=heads,
        head_dim=q[3] // heads,
        region=region,
        topk=routes[-1],
        dtype=dtype.removeprefix("torch."),
        direction="fwd-bwd" if needs_grad else "fwd",
        padding=padding,
        kv_height=k[1],
        kv_width=k[2],
        kv_region=kv_region or region,
        v_head_dim=v[3] // heads,
        per_head=len(routes) == 4,
        scale=q[3] ** -0.5 if scale is None else scale,
    )
    rows = (q[0], heads, problem.regions) if problem.per_head else (q[0], problem.regions)
    if routes[:-1] != rows:
        raise ProblemError(
            f"routes of shape {list(routes)} do not fit {problem}; {[*rows, problem.topk]} would"
        )
    here = _machine(device)
    if backend == "auto" and exported and not here.is_cuda:
        # Operators of our own are nothing to the tools that graphs are exported for.
        names = [name for name in registry.preference(problem, here) if name not in OPERATORS]
        chosen, planned = next(b for b in map(registry.get, names) if not b.why_not(problem, here)), None
    elif backend == "auto":
        chosen, planned = tuned.choose(problem, here)
    else:
        planned = None
        chosen = registry.get(backend)
        reasons = chosen.why_not(problem, here)
        if reasons:
            raise UnsupportedError(chosen.name, reasons, str(problem))
    known = sorted({key for choice in chosen.configs(problem, here) for key in choice})
    unknown = [key for key in settings if key not in known]
    if unknown:
        these = f"these are: {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"backend {chosen.name!r} has no setting {unknown[0]!r}; {these}")
    return problem, chosen, planned


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], heads: int) -> None:
    if not len(q) == len(k) == len(v) == 4:
        raise ProblemError(f"q, k and v must be [B, H, W, C], not {list(q)}, {list(k)} and {list(v)}")
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        raise ProblemError(
            f"k and v must have one map, q and k the same batch and channels, "
            f"not q {list(q)}, k {list(k)} and v {list(v)}"
        )
    if heads < 1 or q[3] % heads or v[3] % heads:
        raise ProblemError(f"{heads} heads do not divide the {q[3]} channels of q and the {v[3]} of v")


@functools.cache
def _machine(device: str) -> Machine:
    return machines.detect(device)
