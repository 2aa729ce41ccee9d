"""Cases of the fused kernels, the same for the interpreter and for a GPU, and what they are compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bratune.kernels.fused.backend import TritonBackend
from bratune.kernels.fused.families import backward_families, forward_families
from bratune.kernels.reference import ReferenceBackend
from bratune.problem import Problem

# |x - reference| / |reference| in the 2-norm, for the output and every gradient. float32 has no TF32 here.
TOLERANCES = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}

LAYOUTS = ("packed", "split", "nchw", "sliced", "channel_stride")
ROUTES = ("random", "per_head", "int32", "shared_by_batch", "hub", "identity", "duplicates", "half_unchosen")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. ``layout`` is one of `LAYOUTS`, ``routes`` one of `ROUTES`, ``config`` pairs."""

    batch: int = 1
    map: tuple[int, int] = (8, 12)
    heads: int = 1
    head_dim: int = 32
    region: tuple[int, int] = (4, 4)
    topk: int = 3
    dtype: str = "float32"
    padding: str = "zeros"
    kv_map: tuple[int, int] | None = None
    kv_region: tuple[int, int] | None = None
    layout: str = "packed"
    routes: str = "random"
    config: tuple[tuple[str, int | str], ...] = ()
    expanded_grad: bool = False
    magnitude: float = 1.0

    @property
    def problem(self) -> Problem:
        kv_height, kv_width = self.kv_map or self.map
        return Problem(
            batch=self.batch,
            height=self.map[0],
            width=self.map[1],
            heads=self.heads,
            head_dim=self.head_dim,
            region=self.region,
            topk=self.topk,
            dtype=self.dtype,
            direction="fwd-bwd",
            padding=self.padding,
            kv_height=kv_height,
            kv_width=kv_width,
            kv_region=self.kv_region or self.region,
            per_head=self.routes == "per_head",
        )

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        """Whatever differs from the default, as the id of a test."""
        parts = []
        for f in dataclasses.fields(self):
            value: Any = getattr(self, f.name)
            if value != f.default:
                pairs = value if f.name == "config" else [(f.name, value)]
                parts += [f"{k}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in pairs]
        return ",".join(parts) or "default"


# Every family at least once, in mixed pairs too: statistics are shared. Of the backward families the first
# that can compute a case is taken.
PAIRS = (
    ("gather", ("image", "gather")),
    ("stationary", ("gather",)),
    ("image", ("key", "image", "gather")),
)


def with_pairs(*cases: Case) -> tuple[Case, ...]:
    """Every case once for each of `PAIRS`, with the general forward family where that one cannot."""
    found: dict[Case, None] = {}
    for case in cases:
        for forward, backwards in PAIRS:
            legal = forward_families(case.problem), backward_families(case.problem)
            pair = {
                "forward": forward if forward in legal[0] else "gather",
                "backward": next(family for family in backwards if family in legal[1]),
            }
            found[case.replace(config=(*pair.items(), *case.config))] = None
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The tensors of a case."""

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    grad: Tensor


def sample(case: Case, device: str = "cpu") -> Sample:
    """Random tensors of a case, the same for the same case on every device."""
    seed = torch.Generator().manual_seed(0)
    p = case.problem
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) * case.magnitude).to(dtype).to(device)

    q_map, kv_map, c = (p.batch, p.height, p.width), (p.batch, p.kv_height, p.kv_width), p.channels
    if case.layout == "packed" and q_map == kv_map:
        q, k, v = normal(*q_map, 3 * c).chunk(3, -1)
    elif case.layout == "nchw":
        q = normal(p.batch, c, *q_map[1:]).permute(0, 2, 3, 1)
        k, v = normal(p.batch, 2 * c, *kv_map[1:]).permute(0, 2, 3, 1).chunk(2, -1)
    elif case.layout == "sliced":
        q, k, v = normal(2 * p.batch, *q_map[1:], 3 * c)[::2].chunk(3, -1)
    elif case.layout == "channel_stride":
        q, k, v = normal(*q_map, 3 * c, 2)[..., 0].chunk(3, -1)
    else:
        q, k, v = normal(*q_map, c), normal(*kv_map, c), normal(*kv_map, c)
    grad = normal(*q_map, 1).expand(*q_map, c) if case.expanded_grad else normal(*q_map, c)
    return Sample(q=q, k=k, v=v, routes=_routes(case, seed).to(device), grad=grad)


def _routes(case: Case, seed: torch.Generator) -> Tensor:
    p = case.problem
    shape = (p.batch, p.heads, p.regions) if p.per_head else (p.batch, p.regions)
    if case.routes == "shared_by_batch":
        shape = (1, p.regions)
    available = max(p.topk, p.kv_regions // 2) if case.routes == "half_unchosen" else p.kv_regions
    routes = torch.rand(*shape, available, generator=seed).argsort(-1)[..., : p.topk]
    if case.routes == "hub":
        routes[..., 0] = p.kv_regions - 1
        routes[..., 1:] = torch.arange(p.topk - 1)
    elif case.routes == "identity":
        routes = (torch.arange(p.regions)[:, None] + torch.arange(p.topk)) % p.kv_regions
        routes = routes.expand(*shape, p.topk).clone()
    elif case.routes == "duplicates":
        routes[..., -1] = routes[..., 0]
    elif case.routes == "int32":
        routes = routes.int()
    return routes.expand(p.batch, *routes.shape[1:])


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Fill what is allocated and not written with NaN, so that an element that nobody writes is seen."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before


def fused(case: Case, s: Sample) -> dict[str, Tensor]:
    """Output and gradients of the fused backend."""
    q, k, v = (x.detach().requires_grad_() for x in (s.q, s.k, s.v))
    with uninitialised_is_nan():
        out = TritonBackend().forward(q, k, v, s.routes, case.problem, dict(case.config))
        return dict(zip(NAMES, (out, *torch.autograd.grad(out, (q, k, v), s.grad)), strict=True))


def reference(case: Case, s: Sample) -> dict[str, Tensor]:
    """Output and gradients of the reference, in float64 on the CPU."""
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in (s.q, s.k, s.v))
    out = ReferenceBackend().forward(q, k, v, s.routes.cpu(), case.problem)
    grads = torch.autograd.grad(out, (q, k, v), s.grad.cpu().double())
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


NAMES = ("out", "dq", "dk", "dv")


def errors(mine: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every result in the 2-norm; NaN where a NaN is in it."""
    return {
        name: float((mine[name].detach().cpu().double() - true[name]).norm() / (true[name].norm() or 1.0))
        for name in NAMES
    }


def assert_right(case: Case, device: str = "cpu", tolerance: float | None = None) -> None:
    """The fused backend agrees with the reference, in the output and in every gradient."""
    s = sample(case, device)
    found = errors(fused(case, s), reference(case, s))
    bound = tolerance or TOLERANCES[case.dtype]
    assert all(error <= bound for error in found.values()), f"{found} exceeds {bound}"
