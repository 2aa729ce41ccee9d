"""Work: the call that a cell stands for, on real modules and real data.

>>> work = build(cell, machine)
>>> work.call()         # once, without waiting for the device
>>> work.attentions()   # what its attention received and gave, for the gate
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bratune.backend import Backend
from bratune.cell import Cell
from bratune.errors import UsageError
from bratune.foreign import AttentionCall
from bratune.kernels import registry, tuned
from bratune.kernels.api import route, routed_attention
from bratune.kernels.backbone import Backbone
from bratune.kernels.blocks import Residual
from bratune.machine import Machine, detect
from bratune.problem import Problem
from bratune.work import mixers
from bratune.work.cells import model_stages
from bratune.work.forms import build_form, cell_macs, difference_limit
from bratune.work.inputs import make_routes
from bratune.work.modules import block_for, images_for, scenery_for
from bratune.work.parts import State, Step, steps_of
from bratune.work.yours import attention_of

__all__ = ["CheckedAttention", "TimedWork", "build", "training_step"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class CheckedAttention:
    """One attention call of a cell, with the very data that the cell runs on, as the gate takes it."""

    backend: Backend
    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    config: Mapping[str, Any] | None


@dataclass(frozen=True)
class TimedWork:
    """What is timed.

    Attributes:
        call: Runs the cell once: forward, or forward and backward.
        before: For a part with warm caches: the rest of its block, which leaves the caches as the part
            finds them in the network. Repeated alone, a part would find its own weights in the nearest
            cache, and the parts of a block would add up to 10 to 30 % less than the block. Forward and
            eager, it ends with what precedes the part, whose results the part then takes: inputs that
            were made long ago would lie farther away than in the network, and add up to more.
        images: Images per call.
        attentions: The attention calls in it; of a model, those of the first block of every stage, and none
            of a model that is not ours.
        agreement: For a model in another form than plain: how far what it gives is from what the plain model
            gives, over the largest number, and how far its data type allows; for mixers, how far attentions
            are from their definitions. None for anything else.
        against: What that compares with.
        macs: Multiply-adds of a forward pass of a whole model or of mixers; None for anything else.
    """

    call: Call
    before: Call | None
    images: int
    attentions: Callable[[], tuple[CheckedAttention, ...]]
    agreement: Callable[[], tuple[float, float] | None] = lambda: None
    against: str = "the plain model"
    macs: Callable[[], int] | None = None


def build(cell: Cell, machine: Machine) -> TimedWork:
    """The work of a cell on a machine, its inputs made and on the device.

    Raises:
        UsageError: the cell names a part that its stage does not have.
        UnsupportedError: its backend cannot do this here.
    """
    device = machine.device
    if cell.form == "mixer":
        return _mixer(cell, device)
    if cell.part == "model":
        return _model(cell, device)
    if cell.form == "yours":
        return _of_a_layer(cell, attention_of(cell, device), device)
    if not cell.model:
        return _bare(cell, device)
    block = block_for(cell, device)
    x = scenery_for(cell, device).maps[cell.stage - 1].to(device)
    with _context(cell, device, gradients=False):
        states = _states(cell, block, {"x": x})

    def attentions() -> tuple[CheckedAttention, ...]:
        return tuple(_seen(block.attn, s, cell.problem) for step, s in states if step.part == "attention")

    if cell.part == "block":
        call = _timed(cell, device, [(Step("block", lambda s: {"x": block(s["x"])}), {"x": x})], block)
        return TimedWork(call, None, cell.problem.batch, attentions)
    wanted = [(step, state) for step, state in states if step.part == cell.part]
    if not wanted:
        raise UsageError(f"stage {cell.stage} of {cell.model} has no part called {cell.part}")
    before: Call | None
    if cell.l2 == "warm" and cell.regime == "eager" and not cell.problem.backward:
        call, before = _in_its_place(cell, device, states)
    else:
        call = _timed(cell, device, wanted, block)
        before = _rest_of_block(cell, device, states, block) if cell.l2 == "warm" else None
    return TimedWork(call, before, cell.problem.batch, attentions if cell.part == "attention" else tuple)


def _states(cell: Cell, block: Residual, state: State) -> list[tuple[Step, State]]:
    """Every step of a block with the state that it starts from; routes are those that the cell asks for."""
    found = []
    for step in steps_of(block):
        found.append((step, dict(state)))
        state = state | step.run(state)
        if step.part == "routing" and cell.route_distribution != "recorded":
            made = make_routes(cell.route_distribution, cell.problem, seed=cell.seed)
            state["routes"] = made.to(state["routes"])
    return found


class _FullAttention:
    """The full attention of a module where the gate expects a backend."""

    def __init__(self, attn: Any) -> None:
        self.attn, self.name = attn, "full"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, problem: Problem, config: Any = None
    ) -> Tensor:
        out: Tensor = self.attn.attend(q, k, v)
        return out


def _seen(attn: Any, state: State, problem: Problem) -> CheckedAttention:
    """The attention call of a module, as a state has it; full attention is one region."""
    q, k, v = state["q"], state["k"], state["v"]
    problem = problem.replace(dtype=str(q.dtype).removeprefix("torch."))
    if "routes" not in state:
        routes = torch.zeros(q.shape[0], 1, 1, dtype=torch.int64, device=q.device)
        shim = cast(Backend, _FullAttention(attn))
        return CheckedAttention(shim, problem, q, k, v, routes, None)
    if attn.backend == "auto":  # the gate checks what that comes to
        backend, config = tuned.choose(problem, detect(str(q.device)))
    else:
        backend, config = registry.get(attn.backend), attn.config
    return CheckedAttention(backend, problem, q, k, v, state["routes"], config)


def _timed(cell: Cell, device: str, steps: list[tuple[Step, State]], module: nn.Module | None) -> Call:
    """A call that runs steps on their states, with their gradients where the cell asks for them."""
    if not cell.problem.backward or cell.part == "routing":

        def forward() -> Any:
            with _context(cell, device, gradients=False):
                return [step.run(state) for step, state in steps]

        return forward
    parameters = [p for p in module.parameters() if p.requires_grad] if module else []
    leaves = [(step, {k: _leaf(t) for k, t in state.items()}) for step, state in steps]
    with _context(cell, device, gradients=True):
        ups = [{k: torch.ones_like(t) for k, t in step.run(state).items()} for step, state in leaves]

    def forward_backward() -> Any:
        grads = []
        for (step, state), up in zip(leaves, ups, strict=True):
            with _context(cell, device, gradients=True):
                made = step.run(state)
            inputs = [t for t in state.values() if t.requires_grad] + parameters
            outs = {k: t for k, t in made.items() if t.requires_grad}
            if outs:  # level one has no gradient
                ups_of_outs = [up[k] for k in outs]
                grads.append(torch.autograd.grad(list(outs.values()), inputs, ups_of_outs, allow_unused=True))
        return grads

    return forward_backward


def _rest_of_block(cell: Cell, device: str, states: list[tuple[Step, State]], block: nn.Module) -> Call:
    """A call that runs the other parts of the block, from the one that follows to the one that precedes."""
    last = max(i for i, (step, _) in enumerate(states) if step.part == cell.part)
    around = [*states[last + 1 :], *states[:last]]
    return _and_wait(
        device, _timed(cell, device, [(s, state) for s, state in around if s.part != cell.part], block)
    )


def _and_wait(device: str, call: Call) -> Call:
    def run_and_wait() -> None:
        call()
        _wait(device)

    return run_and_wait


def _in_its_place(cell: Cell, device: str, states: list[tuple[Step, State]]) -> tuple[Call, Call]:
    """A part, and the rest of the block that hands it its inputs: `TimedWork.call` and `TimedWork.before`.

    The steps that follow go on from what the part has just made; then those that precede it begin with a new
    map, when nothing of the old one is left: the allocator then hands out memory that is in the caches, as it
    does in the network. With the old map still alive, parts took 6 to 10 % longer than within their block.
    """
    places = [i for i, (step, _) in enumerate(states) if step.part == cell.part]
    live = {i: states[i][1] for i in places}
    after = places[-1] + 1
    made = dict(states[after][1]) if after < len(states) else {}

    def run() -> list[State]:
        with _context(cell, device, gradients=False):
            found = [states[i][0].run(state) for i, state in live.items()]
        made.clear()
        made.update(live[places[-1]] | found[-1])
        if cell.part == "routing":  # the routes that the cell asks for, not those just found
            made["routes"] = states[after][1]["routes"]
        return found

    def rest() -> None:
        with _context(cell, device, gradients=False):
            state = dict(made)
            made.clear()
            live.clear()
            for step, _ in states[after:]:
                state |= step.run(state)
            del state
            # The block before it has just written the input.
            state = {name: t.clone() for name, t in states[0][1].items()}
            for i, (step, _) in enumerate(states[: places[-1]]):
                if i in places:
                    live[i] = dict(state)
                state |= step.run(state)
                if step.part == "routing":
                    state["routes"] = states[i + 1][1]["routes"]
            live[places[-1]] = state
        _wait(device)

    return run, rest


def _wait(device: str) -> None:
    """A sample starts on a device that has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.is_floating_point())


def _bare(cell: Cell, device: str) -> TimedWork:
    """An attention call without a model: normal q, k and v as slices of one tensor."""
    p = cell.problem
    if cell.part != "attention":
        raise UsageError(f"the part {cell.part} needs a model; attention does not")
    generator = torch.Generator().manual_seed(cell.seed)
    dtype = getattr(torch, p.dtype)
    if not p.same_regions:
        raise UsageError("a bare attention call is measured with keys on the map of the queries")
    packed = torch.randn(p.batch, p.height, p.width, 2 * p.channels + p.v_channels, generator=generator)
    packed = packed.to(device=device, dtype=dtype)
    q, k, v = torch.split(packed, [p.channels, p.channels, p.v_channels], dim=-1)
    if cell.route_distribution == "recorded":
        routes = route(q, k, region=p.region, topk=p.topk)
    else:
        routes = make_routes(cell.route_distribution, p, seed=cell.seed).to(device)
    return _of_a_layer(cell, AttentionCall(q, k, v, routes, p.heads, p.region, p.region, p.scale), device)


def _of_a_layer(cell: Cell, given: AttentionCall, device: str) -> TimedWork:
    """An attention call by the backend of a cell."""
    p, routes = cell.problem, given.routes

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(
            q,
            k,
            v,
            routes,
            heads=p.heads,
            region=p.region,
            kv_region=p.kv_region,
            scale=p.scale,
            padding=p.padding,
            backend=cell.backend,
            config=cell.settings or None,
        )

    q, k, v = given.q, given.k, given.v
    seen = CheckedAttention(registry.get(cell.backend), p, q, k, v, routes, cell.settings or None)
    step = Step("attention", lambda s: {"out": attend(s["q"], s["k"], s["v"])})
    call = _timed(cell, device, [(step, {"q": q, "k": k, "v": v})], None)
    return TimedWork(call, None, p.batch, lambda: (seen,))


def training_step(
    model: nn.Module, images: Tensor, wanted: Sequence[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """A forward and a backward pass, without an optimizer's step.

    The loss is the sum of everything that comes out, class scores or a tuple of maps, weighted from -1 to 1
    by place: normalized maps have sums and sums of squares that no weight of the model can change, and a mean
    over a large batch would have gradients too small for float16.

    Args:
        model: In training.
        images: A batch.
        wanted: What gradients are taken of; by default every parameter that has one.

    Returns:
        The gradients; None where there is none.
    """
    outs = _tensors(model(images))
    leaves = [p for p in model.parameters() if p.requires_grad] if wanted is None else list(wanted)
    loss = torch.stack([(out.float().flatten() * _ramp(out)).sum() for out in outs]).sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _ramp(out: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, out.numel(), device=out.device)


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """What a model gives: class scores, or maps in a tuple or list."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _model(cell: Cell, device: str) -> TimedWork:
    form = build_form(cell, device)
    model, images, backward = form.model, form.images, cell.problem.backward
    own = form.plain if form.plain is not None else model

    def attentions() -> tuple[CheckedAttention, ...]:
        if not isinstance(own, Backbone):
            return ()
        caught: list[CheckedAttention] = []
        problems = [stage.problem for stage in model_stages(cell)]
        with _context(cell, device, gradients=False), _listening(own, problems, caught):
            own(images)
        return tuple(caught)

    def agreement() -> tuple[float, float] | None:
        if form.plain is None:
            return None
        with _context(cell, device, gradients=backward):
            found, expected = (_seen_from_outside(m, images, backward) for m in (model, form.plain))
        return difference_limit(found, expected, form.dtype)

    call = _whole(cell, device, model, images)
    macs = functools.partial(cell_macs, cell, form)
    return TimedWork(call, None, cell.problem.batch, attentions, agreement, macs=macs)


def _whole(cell: Cell, device: str, model: nn.Module, images: Tensor) -> Call:
    """A call that runs a whole model on images: forward, or a training step."""

    def forward() -> Any:
        with _context(cell, device, gradients=False):
            return model(images)

    def forward_backward() -> Any:
        with _context(cell, device, gradients=True):
            return training_step(model, images)

    return forward_backward if cell.problem.backward else forward


def _mixer(cell: Cell, device: str) -> TimedWork:
    """A mixer: its network, two blocks of a stage, or the attentions of these alone."""
    before: Call | None = None
    if cell.part == "model":
        network, images = mixers.network_for(cell, device), images_for(cell, device)
        call = _whole(cell, device, network, images)
        reached = functools.partial(mixers.reaching, network, lambda: network(images))
    else:
        pair = mixers.pair_for(cell, device)
        x = scenery_for(cell, device).maps[cell.stage - 1].to(device)
        if cell.part == "block":
            call = _timed(cell, device, [(Step("block", lambda s: {"x": pair(s["x"])}), {"x": x})], pair)
            reached = functools.partial(mixers.reaching, pair, lambda: pair(x))
        elif cell.part == "mixer":
            x = mixers.normalised(x)
            attentions: list[Any] = [block.attn for block in pair]
            steps = [(Step("mixer", functools.partial(_mix, a)), {"x": x}) for a in attentions]
            call = _timed(cell, device, steps, nn.ModuleList(attentions))
            if cell.l2 == "warm":  # the rest of the blocks, as for every other part
                feeds: list[Any] = [block.mlp for block in pair]
                rest = [(Step("mlp", functools.partial(_mix, feed)), {"x": x}) for feed in feeds]
                before = _and_wait(device, _timed(cell, device, rest, None))
            reached = functools.partial(list, [(a, x) for a in attentions])
        else:
            raise UsageError(f"a mixer has no part called {cell.part}; mixer, block and model are")

    def agreement() -> tuple[float, float]:
        with _context(cell, device, gradients=False):
            found = reached()
        return mixers.difference(cell, found)

    macs = functools.partial(mixers.mixer_macs, cell)
    return TimedWork(call, before, cell.problem.batch, tuple, agreement, "its definition", macs)


def _mix(module: nn.Module, state: State) -> State:
    return {"x": module(state["x"])}


def _seen_from_outside(model: nn.Module, images: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """What tells two forms of a model apart: their outputs, in training the gradients of the images.

    One image gives a classifier in training no gradient (batch norm makes the mean of its last map a
    constant): there it is the outputs.
    """
    outs = _tensors(model(images))
    if not backward or (images.shape[0] == 1 and len(outs) == 1):
        return outs
    leaf = images.detach().requires_grad_()
    (gradient,) = training_step(model, leaf, [leaf])
    assert gradient is not None
    return (gradient,)


@contextlib.contextmanager
def _listening(
    model: Any, problems: Sequence[Problem | None], caught: list[CheckedAttention]
) -> Iterator[None]:
    """Note the attention call of the first block of every stage while the model runs."""
    handles = []
    for stage, problem in zip(model.stages, problems, strict=True):
        if problem is None:
            continue
        block = getattr(stage, "blocks", stage)[0]

        def keep(block: Any, inputs: tuple[Tensor, ...], problem: Problem = problem) -> None:
            state: State = {"x": inputs[0]}
            for step in steps_of(block):
                if step.part == "attention":
                    caught.append(_seen(block.attn, state, problem))
                    return
                state |= step.run(state)

        handles.append(block.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _context(cell: Cell, device: str, *, gradients: bool) -> Iterator[None]:
    """Gradients on or off, and autocast where the cell asks for it."""
    with torch.set_grad_enabled(gradients):
        if not cell.amp:
            yield
            return
        with torch.autocast(device.partition(":")[0], dtype=getattr(torch, cell.problem.dtype)):
            yield
