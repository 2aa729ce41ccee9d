"""Yours: a model of somebody else (`bratune.work.factory`, or one of this process) and its cells.

>>> request = request_of("package.module:factory", "1x3x640x640", machine)
>>> request.attention_cells()      # every routed layer by every backend
>>> request.model_cell("gather")   # the whole model, its routed layers by one backend

What is measured is evaluated, also where gradients are taken: dropout would tell two runs of a model apart.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bratune import defaults
from bratune.cell import Cell
from bratune.errors import UsageError
from bratune.foreign import AttentionCall, accelerate, attention_calls, swap
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.work.factory import example_of, load_factory, shape_of
from bratune.work.request import BASELINE

__all__ = [
    "LayerSite",
    "YoursRequest",
    "attention_of",
    "find_sites",
    "is_live",
    "live",
    "model_of",
    "request_of",
    "sites_job",
]

_LIVE = "live:"
# Models that are measured in this process, and what they are called with.
_HERE: dict[str, tuple[nn.Module, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class LayerSite:
    """A routed layer of somebody's model.

    Attributes:
        name: Of the submodule.
        how: See `bratune.foreign.swap`.
        problem: Its attention call.
        calls: How often a run of the model calls it.
    """

    name: str
    how: str
    problem: Problem
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "problem": self.problem.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerSite:
        """The inverse of `to_dict`."""
        return cls(**{**data, "problem": Problem.from_dict(data["problem"])})


@dataclass(frozen=True, kw_only=True)
class YoursRequest:
    """What is measured of a model of somebody else; the counterpart of `bratune.work.request.Request`.

    Attributes:
        model: ``package.module:factory``, or the name of a live model.
        input: Shape of its input, see `shape_of`.
        sites: Its routed layers.
        left: Why other layers that look like routed ones are not measured, by name.
        dtype: Of weights and images.
        direction: ``fwd`` or ``fwd-bwd``.
        backends: Names, in the order in which they are shown.
        regime: See `bratune.cell.REGIMES`.
        l2: ``cold`` or ``warm``.
        seed: Of weights and images.
    """

    model: str
    input: str
    sites: tuple[LayerSite, ...]
    left: Mapping[str, str]
    dtype: str
    direction: str
    backends: tuple[str, ...]
    regime: str = "eager"
    l2: str = "cold"
    seed: int = 0

    @property
    def setting_text(self) -> str:
        """S and top-k are those of the layers."""
        return f"{self.model} at {self.input}"

    def padding_notes(self) -> tuple[str, ...]:
        """Nothing: S is that of the layers."""
        return ()

    def attention_cells(self) -> list[Cell]:
        """The attention of every routed layer by every backend, the baseline first."""
        names = sorted(self.backends, key=lambda name: name != BASELINE)
        return [self._attention(i, backend) for i in range(len(self.sites)) for backend in names]

    def model_cell(self, *backends: str) -> Cell:
        """The whole model.

        Args:
            backends: Nothing for the model as it is; one for all routed layers, or one for each.
        """
        joined = backends[0] if len(set(backends)) == 1 else ",".join(backends)
        return self._cell("model", self.sites[0].problem, backend=joined)

    def _attention(self, number: int, backend: str) -> Cell:
        site = self.sites[number]
        return self._cell(
            "attention",
            site.problem,
            layer=site.name,
            backend=backend,
            stage=number + 1,
            block_count=site.calls,
            topk=str(site.problem.topk),
        )

    def _cell(self, part: str, problem: Problem, *, layer: str = "", **values: Any) -> Cell:
        shape = shape_of(self.input)
        extra = {"input": self.input, "layers": {site.name: site.how for site in self.sites}}
        return Cell(
            part=part,
            problem=problem.replace(dtype=self.dtype, direction=self.direction),
            form="yours",
            model=self.model,
            image=(shape[-2], shape[-1]),
            regime=self.regime,
            l2=self.l2,
            layout="nchw",
            seed=self.seed,
            extra=json.dumps(extra | ({"layer": layer} if layer else {})),
            **values,
        )


def request_of(
    model: str,
    shape: str,
    machine: Machine,
    *,
    sites: Sequence[LayerSite],
    left: Mapping[str, str],
    dtype: str | None = None,
    direction: str = "fwd",
    backends: Sequence[str] = (),
    skip: Sequence[str] = (),
    regime: str = "eager",
    l2: str | None = None,
    seed: int = 0,
) -> YoursRequest:
    """A request with the defaults of a machine.

    Raises:
        UsageError: the model has no routed layer that can be measured; the reasons say why.
    """
    from bratune.kernels import registry

    if not sites:
        why = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise UsageError(f"{model} has no routed layer that is proved to be one{f' ({why})' if why else ''}")
    usual = defaults.defaults_for(machine)
    return YoursRequest(
        model=model,
        input=shape,
        sites=tuple(sites),
        left=dict(left),
        dtype=dtype or usual.dtype,
        direction=direction,
        backends=tuple(name for name in tuple(backends) or registry.names() if name not in set(skip)),
        regime=regime,
        l2=l2 or usual.l2,
        seed=seed,
    )


def live(model: nn.Module, example: Any) -> tuple[str, str]:
    """Names for a model of this process and for the shape of its input, which cells of this process take."""
    name = f"{_LIVE}{type(model).__name__}"
    first = next((leaf for leaf in torch.utils._pytree.tree_leaves(example) if _is_map(leaf)), None)
    if first is None:
        raise UsageError("the example holds no tensor [batch, ..., height, width] of floating-point numbers")
    _HERE.clear()  # one at a time: they are large
    _base.cache_clear()
    _HERE[name] = model, example
    return name, "x".join(map(str, first.shape))


def is_live(name: str) -> bool:
    """Whether a name stands for a model of this process."""
    return name.startswith(_LIVE)


def find_sites(
    model: str, shape: str, *, dtype: str, device: str, seed: int = 0
) -> tuple[list[LayerSite], dict[str, str]]:
    """The routed layers of a model, each proved, and why others that look like them are left."""
    base = _base(model, shape, seed, dtype, device)
    sites = []
    for name, calls in base.calls.items():
        if calls:
            site = LayerSite(name=name, how=base.held[name], problem=_problem(calls[0]), calls=len(calls))
            sites.append(site)
        else:
            base.left[name] = "composes its attention by itself (soft routing)"
    return sites, base.left


def sites_job(payload: Mapping[str, Any]) -> dict[str, Any]:
    """`find_sites` in a worker."""
    sites, left = find_sites(**payload)
    return {"sites": [site.to_dict() for site in sites], "left": left}


def model_of(cell: Cell, device: str) -> tuple[nn.Module, Tensor, nn.Module | None]:
    """The model of a cell of form ``yours``, what it is called with, and the model as it is.

    The last is None where the cell asks for the model as it is.
    """
    base = _of(cell, device)
    if not cell.backend:
        return _fed(base.model, base.example), _first(base.example), None
    model = copy.deepcopy(base.model)
    held = json.loads(cell.extra)["layers"]
    names = cell.backend.split(",")
    names = names * len(held) if len(names) == 1 else names
    swap(model, _with_aliases(model, held), _with_aliases(model, dict(zip(held, names, strict=True))))
    return _fed(model, base.example), _first(base.example), _fed(base.model, base.example)


def attention_of(cell: Cell, device: str) -> AttentionCall:
    """The attention call of a layer, with the tensors that reach it."""
    return _of(cell, device).calls[json.loads(cell.extra)["layer"]][0]


@dataclass(frozen=True)
class _Base:
    """A model as it is, its routed layers and what reaches them."""

    model: nn.Module
    example: Any
    held: dict[str, str]
    left: dict[str, str]
    calls: dict[str, list[AttentionCall]]


def _of(cell: Cell, device: str) -> _Base:
    asked = json.loads(cell.extra)
    proved = json.dumps(asked["layers"])
    return _base(cell.model, asked["input"], cell.seed, cell.problem.dtype, device, proved)


@functools.lru_cache(maxsize=1)
def _base(name: str, shape: str, seed: int, dtype: str, device: str, proved: str = "") -> _Base:
    """A model with its layers as they were ``proved`` (JSON of how each is held), or as they prove here."""
    if is_live(name):
        model, example = copy.deepcopy(_HERE[name][0]).eval(), _HERE[name][1]
    else:
        model = load_factory(name, seed).to(device=device, dtype=getattr(torch, dtype))
        example = example_of(shape, seed).to(device=device, dtype=getattr(torch, dtype))
    ours = copy.deepcopy(model)
    left: dict[str, str] = {}
    if proved:
        held: dict[str, str] = json.loads(proved)
        swap(ours, _with_aliases(ours, held), _with_aliases(ours, dict.fromkeys(held, "auto")))
    else:
        held, left = _prove(ours, example, f"{name} cannot be called with {shape}")
    calls = attention_calls(ours, example)
    return _Base(model, example, held, left, {layer: c for layer, c in calls.items() if layer in held})


def _prove(model: nn.Module, example: Any, otherwise: str) -> tuple[dict[str, str], dict[str, str]]:
    """Replace the layers of a model; how each is held, and why others are left."""
    try:
        proof = accelerate(model, example)
    except RuntimeError as error:  # somebody else's code
        raise UsageError(f"{otherwise}: {' '.join(str(error).split())[:300]}") from None
    held, left = dict(proof.swapped), dict(proof.left)
    for layer, reason in list(left.items()):
        if reason.startswith("is a layer of bratune"):
            held[layer] = "bratune"
            del left[layer]
    return held, left


def _with_aliases(model: nn.Module, by_name: Mapping[str, str]) -> dict[str, str]:
    """The same for every name that a shared layer has."""
    of = {id(model.get_submodule(name)): value for name, value in by_name.items()}
    names = model.named_modules(remove_duplicate=False)
    return {name: of[id(module)] for name, module in names if id(module) in of}


class _Fed(nn.Module):
    """A model that takes one tensor, and finds what else it is called with by itself."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model, self._example = model, example

    def forward(self, x: Tensor) -> Any:
        """What the model gives, as a tuple of tensors where it is no single one."""
        leaves, spec = torch.utils._pytree.tree_flatten(self._example)
        place = next(i for i, leaf in enumerate(leaves) if _is_map(leaf))
        fed = torch.utils._pytree.tree_unflatten([*leaves[:place], x, *leaves[place + 1 :]], spec)
        if isinstance(fed, Mapping):
            out = self.model(**fed)
        else:
            out = self.model(*(fed if isinstance(fed, tuple | list) else (fed,)))
        if isinstance(out, Tensor):
            return out
        found = torch.utils._pytree.tree_leaves(out)
        return tuple(leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _fed(model: nn.Module, example: Any) -> nn.Module:
    return _Fed(model, example).eval()


def _first(example: Any) -> Tensor:
    leaf: Tensor = next(leaf for leaf in torch.utils._pytree.tree_leaves(example) if _is_map(leaf))
    return leaf


def _is_map(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.is_floating_point()


def _problem(call: AttentionCall) -> Problem:
    batch, height, width, channels = call.q.shape
    return Problem(
        batch=batch,
        height=height,
        width=width,
        heads=call.heads,
        head_dim=channels // call.heads,
        region=call.region,
        topk=call.routes.shape[-1],
        dtype=str(call.q.dtype).removeprefix("torch."),
        kv_height=call.k.shape[1],
        kv_width=call.k.shape[2],
        kv_region=call.kv_region,
        v_head_dim=call.v.shape[-1] // call.heads,
        per_head=call.routes.ndim == 4,
        scale=call.scale,
    )
