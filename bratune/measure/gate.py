"""Gate: the correctness check that a call must pass before it is timed.

The same call on the same data is compared with the ``reference`` backend in float64, image by image, so that
the reference never needs more memory than one image asks for. An error is relative to the largest value of
what is compared: ``max |a - b| / max |b|``.

One right call says little of the calls that are timed. So the call is repeated on other data at the same
addresses, on tensors of another layout, with large logits, and again on its own data; and what the last timed
call returned is compared with what it returned before (`agrees`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bratune.backend import Backend, Config
from bratune.kernels.reference import rounding_error
from bratune.problem import Problem

__all__ = [
    "TOLERANCES",
    "GateResult",
    "Tolerance",
    "agrees",
    "check",
    "images_to_check",
    "max_rel_err",
    "plain",
]


# Output and gradients.
_Truth: TypeAlias = tuple[Tensor, Sequence[Tensor]]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error of a result and of its gradients."""

    forward: float
    gradient: float


# The one table of tolerances, by dtype of the inputs; the same on every device, for every backend and in
# the conformance suite. float32 means float32 products (no TF32): on maps of 512x512 images the backends here
# are within 1.1e-6, their gradients within 5.7e-6, of float64. Half precision: twice the worst that `gather`
# showed, which rounds logits and weights to the dtype as the official code does (1.4e-3 and 1.4e-2). What
# rounding costs grows with the logits: where it may be more than the table says, that is what is allowed
# (`bratune.kernels.reference.rounding_error`).
# It cannot be written to: whoever is checked shares this process.
TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float64": Tolerance(1e-12, 1e-11),
        "float32": Tolerance(1e-5, 3e-5),
        "float16": Tolerance(3e-3, 3e-3),
        "bfloat16": Tolerance(3e-2, 3e-2),
    }
)

# Logits beyond which an exponential overflows in float32 where the largest is not subtracted first, and by
# how much their rounding may then exceed the tolerance.
_LARGE_LOGIT, _LARGE_LOGIT_SLACK = 100.0, 30.0

# Multiply-adds that the reference may spend: about a second on one core. A larger batch is sampled.
_REFERENCE_MACS = 2 * 10**9
# Multiply-adds of a region below which one thread computes it: handing so little to others takes longer than
# they need, and on a busy machine a time slice for every product.
_SMALL_MACS = 2**22


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Whether a call may be timed.

    Attributes:
        ok: It agrees with the reference.
        reason: What is wrong, one sentence; empty when ok.
        max_rel_err: Largest error of the output; None when it could not be compared.
        grad_rel_err: Largest error of the gradients of q, k and v; None for a forward problem.
        tolerance: Bound of ``max_rel_err``.
        images: Images that were compared; all others were checked for NaN and infinity.
    """

    ok: bool
    reason: str = ""
    max_rel_err: float | None = None
    grad_rel_err: float | None = None
    tolerance: float
    images: tuple[int, ...] = ()


def check(
    backend: Backend,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    config: Config | None = None,
    reference: Backend | None = None,
) -> GateResult:
    """Whether a backend computes what the reference computes, on this very data.

    Args:
        backend: Who is checked; what it raises is not caught.
        problem: The call; with direction ``fwd-bwd`` gradients of q, k and v are compared too.
        q: See `Backend.forward`, as are k, v and routes. Strides are kept.
        k: Keys.
        v: Values.
        routes: Routes.
        config: Settings of the backend.
        reference: Who is right; by default the backend ``reference``.
    """
    if reference is None:
        from bratune.kernels import registry

        reference = registry.get("reference")
    bound = TOLERANCES[problem.dtype]
    out, grads, cotangent, wrong = _candidate(backend, problem, (q, k, v), routes, config)
    if wrong:
        return GateResult(ok=False, reason=wrong, tolerance=bound.forward)
    worst_out, worst_grad, allowed, reason = 0.0, 0.0, bound, ""
    images = images_to_check(problem)
    truths = {}
    for image in images:
        truth = truths[image] = _truth(reference, problem, (q, k, v), routes, cotangent, image)
        error = _error((out, grads), truth, image)
        found, limit = _judged(error, truth, bound, problem, (q, k, v), routes, image)
        worst_out, worst_grad = max(worst_out, error[0]), max(worst_grad, error[1])
        allowed, reason = max(allowed, limit, key=lambda one: one.forward), reason or found
    if not reason:
        first = images[0]
        reason = _other_calls(backend, reference, problem, (q, k, v), routes, config, first, truths[first])
    return GateResult(
        ok=not reason,
        reason=reason,
        max_rel_err=worst_out,
        grad_rel_err=worst_grad if problem.backward else None,
        tolerance=allowed.forward,
        images=images,
    )


def agrees(last: object, first: object, dtype: str) -> str:
    """What is wrong with the result of a timed call, given that of an earlier call on the same data.

    Args:
        last: What the last timed call returned: tensors, in lists, tuples and dictionaries.
        first: What `plain` made of the earlier result.
        dtype: Of the problem; sets the tolerance.
    """
    now, before = plain(last), first
    if not isinstance(before, list) or len(now) != len(before):
        return "the last timed call returned something else than the first"
    allowed = TOLERANCES[dtype].gradient
    for mine, true in zip(now, before, strict=True):
        if mine.shape != true.shape:
            return f"the last timed call returned shape {mine.shape}, the first {true.shape}"
        scale = float(abs(true).max()) if true.size else 0.0
        error = float(abs(mine - true).max()) / (scale or 1.0) if true.size else 0.0
        if not error <= allowed:
            text = f"the last timed call differs from the first by {error:.2g}"
            return f"{text}; {allowed:g} is allowed in {dtype}"
    return ""


def plain(result: object) -> list[Any]:
    """The numbers of all tensors in a result, in order, as arrays that are no tensors."""
    if isinstance(result, Tensor):
        return [result.detach().double().cpu().numpy().copy()]
    if isinstance(result, Mapping):
        return [array for value in result.values() for array in plain(value)]
    if isinstance(result, list | tuple):
        return [array for value in result for array in plain(value)]
    return []


def max_rel_err(mine: Tensor, true: Tensor) -> float:
    """``max |mine - true| / max |true|`` in float64; infinity for a wrong shape, NaN or infinity.

    A truth of zero everywhere turns it into the absolute error.
    """
    if mine.shape != true.shape:
        return math.inf
    if not true.numel():
        return 0.0
    error = float((mine.detach().double() - true.detach().double()).abs().max())
    scale = float(true.detach().abs().max())
    return error / (scale or 1.0) if math.isfinite(error) else math.inf


def images_to_check(problem: Problem) -> tuple[int, ...]:
    """The images of the batch that are compared: all, or as many as the reference's budget allows.

    They are spread over the batch and always hold the first and the last, where wrong offsets show.
    """
    per_image = max(1, problem.attention_macs // problem.batch)
    count = min(problem.batch, max(2, _REFERENCE_MACS // per_image))
    if count == 1:
        return (0,)
    return tuple(sorted({round(i * (problem.batch - 1) / (count - 1)) for i in range(count)}))


def _other_calls(
    backend: Backend,
    reference: Backend,
    problem: Problem,
    inputs: tuple[Tensor, Tensor, Tensor],
    routes: Tensor,
    config: Config | None,
    image: int,
    own: _Truth,
) -> str:
    """What is wrong with further calls, of which one image each is compared; empty where nothing is.

    Args:
        backend: See `check`, as are reference, problem, inputs, routes and config.
        reference: Who is right.
        problem: The call.
        inputs: q, k and v.
        routes: Routes.
        config: Settings of the backend.
        image: The one that is compared.
        own: What the reference says of it.
    """
    bound = TOLERANCES[problem.dtype]
    forward = problem.replace(direction="fwd")

    def wrong(
        what: str,
        tensors: Sequence[Tensor],
        problem: Problem = forward,
        known: _Truth | None = None,
        slack: float = 1.0,
    ) -> str:
        out, grads, _, bad = _candidate(backend, problem, tensors, routes, config)
        if bad:
            return f"{what}: {bad}"
        truth = known or _truth(reference, problem, tensors, routes, None, image)
        allowed = Tolerance(slack * bound.forward, slack * bound.gradient)
        error = _error((out, grads), truth, image)
        bad, _ = _judged(error, truth, allowed, problem, tensors, routes, image)
        return f"{what}: {bad}" if bad else ""

    kept = [x.detach().clone() for x in inputs]
    found = ""
    if all(_is_writable(x) for x in inputs):
        with torch.no_grad():
            for x, old in zip(inputs, kept, strict=True):
                x.detach().copy_(0.5 * old.flip(0, 1, 2))
            try:
                found = wrong("called again with other data at the same addresses", inputs)
            finally:
                for x, old in zip(inputs, kept, strict=True):
                    x.detach().copy_(old)
    found = found or wrong(
        "called with tensors of another layout", _other_layout(inputs), known=(own[0].detach(), ())
    )
    if not found and problem.dtype in ("float32", "float64"):
        largest = float(kept[0].abs().amax() * kept[1].abs().amax()) * problem.scale * problem.head_dim
        factor = math.sqrt(_LARGE_LOGIT / largest) if largest > 0 else 1.0
        large = [factor * kept[0], factor * kept[1], kept[2]]
        found = wrong("called with large logits", large, slack=_LARGE_LOGIT_SLACK)
    for _ in range(2):
        found = found or wrong("called again with the same data", inputs, problem, own)
    return found


def _error(found: _Truth, truth: _Truth, image: int) -> tuple[float, float]:
    """Largest relative error of the output of an image, and of its gradients."""
    one = slice(image, image + 1)
    grads = (max_rel_err(mine[one], true) for mine, true in zip(found[1], truth[1], strict=True))
    return max_rel_err(found[0][one], truth[0]), max(grads, default=0.0)


def _judged(
    error: tuple[float, float],
    truth: _Truth,
    bound: Tolerance,
    problem: Problem,
    inputs: Sequence[Tensor],
    routes: Tensor,
    image: int,
) -> tuple[str, Tolerance]:
    """What is wrong with the errors of an image, and what is allowed.

    That is the bound of the table or, where logits are so large that rounding them to the dtype may do more
    than that to the output, what it may do; of the gradients so many times more, too.
    """
    reason = _verdict(*error, bound, problem.dtype)
    if not reason or not all(map(math.isfinite, error)):
        return reason, bound
    q, k, v = (x[image : image + 1].detach() for x in inputs)
    unit = torch.finfo(getattr(torch, problem.dtype)).eps / 2
    small = problem.replace(batch=1, direction="fwd")
    loss = float(rounding_error(q, k, v, routes[image : image + 1], small, unit).max())
    slack = max(1.0, loss / (float(truth[0].detach().abs().max()) or 1.0) / bound.forward)
    allowed = Tolerance(slack * bound.forward, slack * bound.gradient)
    return _verdict(*error, allowed, problem.dtype), allowed


def _is_writable(x: Tensor) -> bool:
    """Whether every element has an address of its own."""
    return all(stride > 0 or size <= 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def _other_layout(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors where slices were given, slices of wider tensors where contiguous ones were."""
    found = []
    for x in inputs:
        if not x.is_contiguous():
            found.append(x.detach().contiguous())
            continue
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
        wide[..., : x.shape[-1]] = x.detach()
        found.append(wide[..., : x.shape[-1]])
    return found


def _candidate(
    backend: Backend,
    problem: Problem,
    inputs: Sequence[Tensor],
    routes: Tensor,
    config: Config | None,
) -> tuple[Tensor, Sequence[Tensor], Tensor | None, str]:
    """Output, gradients, the cotangent that they belong to, and what is wrong with their form."""
    leaves = [x.detach().requires_grad_(problem.backward) for x in inputs]
    with torch.set_grad_enabled(problem.backward):
        out = backend.forward(leaves[0], leaves[1], leaves[2], routes, problem, config)
    shape = (problem.batch, problem.height, problem.width, problem.v_channels)
    wrong = _wrong_form(out, shape, inputs[0].dtype, differentiable=problem.backward)
    if wrong or not problem.backward:
        return out, (), None, wrong or _not_finite({"output": out})
    cotangent = _cotangent(out)
    grads = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    absent = [name for name, grad in zip("qkv", grads, strict=True) if grad is None]
    if absent:
        return out, (), None, f"the output does not depend on {' and '.join(absent)} for autograd"
    named = {"output": out} | {f"gradient of {name}": g for name, g in zip("qkv", grads, strict=True)}
    return out, grads, cotangent, _not_finite(named)


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            return f"the {name} has {bad} of {tensor.numel()} values that are NaN or infinite"
    return ""


def _truth(
    reference: Backend,
    problem: Problem,
    inputs: Sequence[Tensor],
    routes: Tensor,
    cotangent: Tensor | None,
    image: int,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The reference's output and gradients of one image, in float64."""
    one = slice(image, image + 1)
    exact = [x[one].detach().double().requires_grad_(cotangent is not None) for x in inputs]
    small = problem.replace(batch=1, dtype="float64")
    with _threads(1 if small.attention_macs < _SMALL_MACS * small.regions else 0):
        with torch.set_grad_enabled(cotangent is not None):
            out = reference.forward(exact[0], exact[1], exact[2], routes[one], small)
        if cotangent is None:
            return out, ()
        return out, torch.autograd.grad(out, exact, cotangent[one].double())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads of torch for a while; 0 leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _wrong_form(out: object, shape: tuple[int, ...], dtype: torch.dtype, *, differentiable: bool) -> str:
    if type(out) is not Tensor:  # a subclass may put its work off until nobody measures
        return f"the output is a {type(out).__name__}, not a tensor"
    if tuple(out.shape) != shape:
        return f"the output has shape {tuple(out.shape)}, not {shape}"
    if out.dtype != dtype:
        return f"the output is {out.dtype}, not {dtype} as the queries are"
    if differentiable and not out.requires_grad:
        return "the output carries no gradient, and gradients were asked for"
    return ""


def _cotangent(out: Tensor) -> Tensor:
    """Plus and minus one, the same for every backend: exact in every dtype."""
    draw = torch.Generator().manual_seed(out.numel())
    signs = torch.randint(0, 2, out.shape, generator=draw, dtype=torch.int8) * 2 - 1
    return signs.to(device=out.device, dtype=out.dtype)


def _verdict(out: float, grad: float, bound: Tolerance, dtype: str) -> str:
    for what, error, most in (
        ("the output differs", out, bound.forward),
        ("gradients differ", grad, bound.gradient),
    ):
        if not error <= most:
            return f"{what} from the reference by {error:.2g}; {most:.2g} is allowed in {dtype}"
    return ""
