"""Request: what a profiling run is asked to measure, checked and with every default filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bratune import defaults
from bratune.cell import L2_STATES, REGIMES, ROUTE_KINDS
from bratune.errors import ProblemError, UnknownNameError, UsageError
from bratune.machine import Machine
from bratune.variant import TASKS, Stage, Task, get_task, get_variant, stages
from bratune.work.peers import peer_name

__all__ = ["BASELINE", "MIXER_BASELINE", "Request", "auto_batch", "make_request"]


# What speedups are relative to: the implementation that the paper describes and the official code has.
BASELINE = "gather"
# What mixers are compared with: the layout is Swin's, and of all attentions it is the simplest whose work is
# linear in the number of tokens, so that it is there at every resolution, where full attention is not.
MIXER_BASELINE = "window"
# The model whose layout mixers stand in.
MIXER_LAYOUT = "biformer_stl"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured. Every combination of models, batches, regimes, L2 states and routes is.

    Attributes:
        models: Names of variants.
        task: The task.
        image: Size in pixels before the task's padding, ``(height, width)``.
        batches: Images per call.
        n_win: S, one for all stages or one per stage.
        topks: Top-k per stage; None for the published ones of each model.
        dtype: Long name of the dtype.
        amp: Autocast to ``dtype`` and keep float32 weights.
        layout: ``nchw`` or ``nhwc`` memory order of images and maps.
        direction: ``fwd`` or ``fwd-bwd``.
        directions: Several of them, one after the other; empty for ``direction`` alone.
        backends: Names of backends, in the order in which they are shown.
        routes: Kinds of routes.
        regimes: ``eager``, ``graph``, ``compile``.
        l2: ``cold``, ``warm`` or both.
        whole_model: Time whole models too.
        parts: Time the attention and the other parts of stages.
        forms: Of a whole model, in the order in which they are shown: forms of `bratune.cell.FORMS`, and
            names of backends (or ``auto``), which run everywhere in a plain one.
        peers: Models of timm beside ours, by the names that timm knows.
        mixers: Attentions that are compared in the layout of the model, and nothing else is measured.
        seed: Seed of weights, images and routes.
        images: Folder of pictures to feed; empty for synthetic images.
        checkpoint: Weights file of the model; empty for seeded random weights.
    """

    models: tuple[str, ...]
    task: Task
    image: tuple[int, int]
    batches: tuple[int, ...]
    n_win: tuple[int, ...]
    topks: tuple[int, ...] | None
    dtype: str
    amp: bool
    layout: str
    direction: str
    backends: tuple[str, ...]
    routes: tuple[str, ...]
    regimes: tuple[str, ...]
    l2: tuple[str, ...]
    whole_model: bool = True
    parts: bool = True
    forms: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    mixers: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    seed: int = 0
    images: str = ""
    checkpoint: str = ""

    def __post_init__(self) -> None:
        if not (self.parts or self.whole_model):
            raise UsageError("nothing is left to measure with --no-stages and without whole models")
        if not self.backends:
            raise UsageError("no backend is left to measure: --skip leaves none of those asked for")
        for name, values, known in (
            ("regime", self.regimes, REGIMES),
            ("cache state", self.l2, L2_STATES),
            ("kind of routes", self.routes, ROUTE_KINDS),
        ):
            if not values or any(value not in known for value in values):
                raise UsageError(f"{name} {', '.join(values)!r} is not known; these are: {', '.join(known)}")
        if self.mixers:
            self._check_mixers()
            return
        for model in self.models:
            if not any(stage.problem for stage in self.stages(model, self.batches[0])):
                raise UsageError(f"no stage has attention with top-k {self.topks}; 1,4,16,-2 would")

    def _check_mixers(self) -> None:
        if set(self.models) != {MIXER_LAYOUT}:
            raise UsageError(
                f"mixers are compared in the layout of {MIXER_LAYOUT}, not of {', '.join(self.models)}; "
                "leave --model out"
            )
        for what, given in (
            ("--topks", self.topks is not None),
            ("--peers", bool(self.peers)),
            ("--checkpoint", bool(self.checkpoint)),
            ("several S", len(set(self.n_win)) > 1),
        ):
            if given:
                raise UsageError(f"--mixer and {what} exclude each other; leave one of them out")

    def stages(self, model: str, batch: int) -> tuple[Stage, ...]:
        """The stages of one of the models, each with the attention call that it makes.

        Raises:
            ProblemError: S or a top-k does not fit a stage; the message names it.
        """
        return stages(
            get_variant(model),
            *self.task.padded(*self.image),
            batch=batch,
            n_win=self.n_win[0] if len(self.n_win) == 1 else self.n_win,
            topks=self.topks,
            dtype=self.dtype,
            direction=self.direction,
        )

    @property
    def setting_text(self) -> str:
        """S and top-k, in words: ``S 8 · top-k 1,4,16,-2``; the published top-k depend on the model."""
        topks = "as published" if self.topks is None else ",".join(map(str, self.topks))
        return f"S {','.join(map(str, self.n_win))} · top-k {topks}"

    def padding_notes(self) -> tuple[str, ...]:
        """A sentence per model whose maps are padded for S, where another task's S would divide them."""
        notes = []
        for model in () if self.mixers else self.models:
            worst = max(self.stages(model, self.batches[0]), key=lambda stage: stage.padding_waste)
            better = next((task for task in TASKS.values() if self._tiles(model, task)), None)
            if worst.problem and worst.padding_waste and better:
                height, width = worst.problem.padded
                notes.append(
                    f"{model}: S = {worst.n_win} of {self.task.name} pads the {worst.height}x{worst.width} "
                    f"map of stage {worst.index} to {height}x{width}; "
                    f"--task {better.name} has S = {better.n_win}, which divides every map"
                )
        return tuple(notes)

    def _tiles(self, model: str, task: Task) -> bool:
        """Whether the S of a task divides every map of a model at this resolution."""
        other = dataclasses.replace(self, task=task, n_win=(task.n_win,))
        try:
            return not any(stage.padding_waste for stage in other.stages(model, self.batches[0]))
        except ProblemError:
            return False


def make_request(
    machine: Machine,
    *,
    models: Sequence[str] = (),
    task: str | None = None,
    image: tuple[int, int] | None = None,
    batches: Sequence[int | str] = (),
    n_win: Sequence[int] = (),
    topks: Sequence[int] | None = None,
    dtype: str | None = None,
    amp: bool = False,
    channels_last: bool | None = None,
    direction: str = "fwd",
    backends: Sequence[str] = (),
    skip: Sequence[str] = (),
    routes: Sequence[str] = (),
    regimes: Sequence[str] = (),
    l2: str | None = None,
    whole_model: bool = True,
    parts: bool = True,
    forms: Sequence[str] = (),
    peers: Sequence[str] = (),
    mixers: Sequence[str] = (),
    directions: Sequence[str] = (),
    seed: int = 0,
    images: str = "",
    checkpoint: str = "",
) -> Request:
    """A request with the defaults that suit a machine.

    Defaults: those of `bratune.defaults`, the task's size and S, batch 1, every backend, eager, recorded
    routes. A whole model is measured as published, by the baseline, by ``auto``, and in the runtime or, with
    gradients, lean; of a machine that is not here, by the baseline alone: the others are only ever measured.

    Raises:
        UsageError: a value does not fit; ProblemError for S and top-k.
        CheckpointError: the weights file cannot be read, or does not fit a model.
    """
    from bratune.kernels import registry
    from bratune.kernels.mixers.registry import get as get_mixer
    from bratune.work.inputs import picture_files
    from bratune.work.modules import check_checkpoint

    if images:
        picture_files(Path(images))
    chosen = get_task(task or defaults.TASK)
    names = tuple(models) or ((MIXER_LAYOUT,) if mixers else (defaults.MODEL,))
    usual = defaults.defaults_for(machine)
    layouts = {None: usual.layout, True: "nhwc", False: "nchw"}
    states = {"both": ("cold", "warm"), None: (usual.l2,)}
    names_of_backends = tuple(b for b in tuple(backends) or registry.names() if b not in set(skip))
    request = Request(
        models=names,
        task=chosen,
        image=image or (chosen.height, chosen.width),
        batches=(1,),
        n_win=tuple(n_win) or (chosen.n_win,),
        topks=None if topks is None else tuple(topks),
        dtype=dtype or usual.dtype,
        amp=amp,
        layout=layouts[channels_last],
        direction=direction,
        backends=names_of_backends,
        routes=tuple(routes) or ("recorded",),
        regimes=tuple(regimes) or ("eager",),
        l2=states.get(l2, (l2 or "",)),
        whole_model=whole_model,
        parts=parts,
        forms=_forms(forms, machine, direction, names_of_backends),
        peers=tuple(peer_name(name) for name in peers),
        mixers=tuple(dict.fromkeys(get_mixer(name).name for name in mixers)),
        directions=tuple(directions),
        seed=seed,
        images=images,
        checkpoint=checkpoint,
    )
    for name in names if checkpoint else ():
        check_checkpoint(name, chosen.name, checkpoint)
    numbers = {auto_batch(request, machine) if b == "auto" else int(b) for b in batches}
    return dataclasses.replace(request, batches=tuple(sorted(numbers)) or (1,))


def _forms(
    forms: Sequence[str], machine: Machine, direction: str, backends: Sequence[str]
) -> tuple[str, ...]:
    """The forms that were asked for, or those that tell what is gained by what.

    Raises:
        UnknownNameError: one is no form of a model of ours and no backend.
    """
    from bratune.kernels import registry
    from bratune.work.deploy import RUNTIMES

    known = ("published", "runtime", "lean", "auto", *RUNTIMES, *registry.names())
    for name in forms:
        if name not in known:
            raise UnknownNameError("form", name, known)
    if forms:
        return tuple(dict.fromkeys(forms))
    baseline = () if not backends else (BASELINE if BASELINE in backends else backends[0],)
    if machine.device == "absent":
        return baseline
    fastest = "lean" if direction == "fwd-bwd" else "runtime"
    return tuple(dict.fromkeys(("published", *baseline, "auto", fastest)))


def auto_batch(request: Request, machine: Machine) -> int:
    """The largest power of two up to 256 at which gather-then-dense should fit the memory.

    Counted per image: what `gather` copies out plus three copies of its score matrix in the worst stage,
    and the widest map of the MLP; gradients keep every block's share. Half the memory is left free.
    """
    worst = 0
    for model in request.models:
        variant, found = get_variant(model), request.stages(model, 1)
        shares = []
        for stage in found:
            wide = (4 + 2 * variant.mlp_ratio) * stage.dim * stage.height * stage.width
            p = stage.problem
            share = wide * (p.item_bytes if p else 4)
            if p is not None:
                share += p.gathered_bytes + 3 * p.score_bytes
            shares.append(share * (stage.blocks if request.direction == "fwd-bwd" else 1))
        worst = max(worst, sum(shares) if request.direction == "fwd-bwd" else max(shares))
    fitting = machine.memory_bytes // 2 // max(worst, 1)
    return 1 << max(0, min(8, fitting.bit_length() - 1))
