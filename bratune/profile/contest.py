"""A contest of whole models: all contenders agree, and are timed in turn.

What happens to the machine then happens to all of them. A ratio is the median over rounds of the ratio
within a round, with its distribution-free 95 % interval. A contender that fails is a row with the reason, and
the others go on. On the command line: `bratune.profile.whole_model`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bratune.measure.statistics import median, paired_ratio
from bratune.run.reuse import NOT_STARTED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bratune.kernels.backbone import Backbone

__all__ = [
    "AGREE",
    "CLOCKS",
    "COMPILED",
    "GRAPH",
    "LEAST_ROUNDS",
    "Contest",
    "Row",
    "contenders",
    "contest",
    "difference_limit",
    "with_compiled",
]

# ``cpu`` counts the time that this process computed, which other processes on a shared machine do not change
# much; it is the sum over threads, so that it is latency with one thread alone.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# What the twin of a contender is called that `torch.compile` has made, and what a CUDA graph is called.
COMPILED, GRAPH = ", compiled", ", graph"
# On max|a - b| / max|b| of the outputs, by data type. Below float64 it is routes that decide: sums in another
# order let one at a near tie fall the other way, which moved a gradient of biformer_tiny by 5e-4 in float32.
AGREE = {"float64": 1e-9, "float32": 5e-3, "bfloat16": 0.1, "float16": 0.02}
# The fewest rounds for which a 95 % interval of a median exists; they run whatever the budget.
LEAST_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender.

    Attributes:
        name: What ran.
        operations: Dispatched operations of a forward pass; None where they cannot be counted, as in what
            a compiler or a graph has made.
        megabytes: What they read and write at two bytes per number, weights included, in MB; None likewise.
        peak_mb: Most memory beyond weights and images, in MB, gradients included; None on a CPU and of a
            graph, which holds its memory for good.
        samples_ms: Times of a batch, round by round; empty where there is none.
        ratio: How many times faster than the baseline, the median over rounds.
        ratio_interval: Its 95 % interval.
        difference: Largest difference of its output from the baseline's, over the largest number; None of
            another model.
        outcome: See `bratune.record.OUTCOMES`.
        reason: Why there is no time.
    """

    name: str
    operations: int | None = None
    megabytes: float | None = None
    peak_mb: float | None = None
    samples_ms: tuple[float, ...] = ()
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    difference: float | None = None
    outcome: str = "measured"
    reason: str = ""

    @property
    def median_ms(self) -> float | None:
        """Median time of a batch."""
        return median(self.samples_ms) if self.samples_ms else None


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All contenders in the same run.

    Attributes:
        rows: In the order in which they took their turns.
        rounds: Times that everyone ran.
        batch: Images.
        baseline: What ratios and differences refer to: the first contender that ran; empty if none did.
    """

    rows: tuple[Row, ...]
    rounds: int
    batch: int
    baseline: str

    def table(self) -> str:
        """One line per contender."""
        memory = any(row.peak_mb is not None for row in self.rows)
        peak = f"{'peak MB':>9}" if memory else ""
        lines = [
            f"{'contender':24}{'ops':>6}{'MB/batch':>10}{peak}{'median ms':>11}{'images/s':>10}"
            f"{'x baseline':>12}  95 %"
        ]
        for row in self.rows:
            if row.median_ms is None or row.ratio is None or row.ratio_interval is None:
                lines.append(f"{row.name:24}  {row.outcome}: {row.reason}")
                continue
            operations = "-" if row.operations is None else str(row.operations)
            moved = "-" if row.megabytes is None else f"{row.megabytes:.0f}"
            held = f"{'-' if row.peak_mb is None else f'{row.peak_mb:.0f}':>9}" if memory else ""
            low, high = row.ratio_interval
            lines.append(
                f"{row.name:24}{operations:>6}{moved:>10}{held}{row.median_ms:>11.2f}"
                f"{1e3 * self.batch / row.median_ms:>10.1f}{row.ratio:>11.2f}x  {low:.2f} to {high:.2f}"
            )
        return "\n".join(lines)


def contenders(
    model: Backbone, images: Tensor, *, direction: str = "fwd"
) -> dict[str, Callable[[], nn.Module]]:
    """What there is to compare of a model, the baseline first; each is made when it is called.

    Args:
        model: In evaluation, with backend ``auto``; its weights are shared.
        images: A batch; on CUDA, graphs are captured for it.
        direction: ``fwd``, or ``fwd-bwd`` for a training step without the optimizer's.

    Returns:
        ``published`` (the official sequence of operations, for models that have one), ``gather`` (this
        package's layers with the published attention), ``auto`` (with the preferred backend). Then for
        ``fwd``, ``runtime`` (`bratune.kernels.runtime`) and, on CUDA, ``runtime, graph``; for ``fwd-bwd``,
        ``lean`` (`Backbone.set_lean`).
    """
    from bratune.kernels.biformer import BiFormer
    from bratune.kernels.published import as_published
    from bratune.kernels.runtime import optimize

    trained = direction == "fwd-bwd"

    def gather() -> nn.Module:
        form = copy.deepcopy(model)
        form.set_backend("gather")
        return form.train(trained)

    def lean() -> nn.Module:
        form = copy.deepcopy(model)
        form.set_lean()
        return form.train()

    found: dict[str, Callable[[], nn.Module]] = {}
    if isinstance(model, BiFormer):
        found["published"] = lambda: as_published(model).train(trained)
    found |= {"gather": gather, "auto": lambda: model.train(trained)}
    if trained:
        return found | {"lean": lean}
    found["runtime"] = lambda: optimize(model)
    if images.is_cuda:
        found["runtime" + GRAPH] = lambda: optimize(model, graph_input=images)
    return found


def with_compiled(
    models: Mapping[str, Callable[[], nn.Module]], model: Backbone | None = None
) -> dict[str, Callable[[], nn.Module]]:
    """Every contender, each followed by what `torch.compile` makes of it for one shape.

    Args:
        models: What makes them, by name. A captured graph has no twin: what it replays can be compiled
            before.
        model: The model whose ``runtime`` is among them: that one is compiled unpacked, as the runtime
            itself does it.
    """
    import torch

    from bratune.kernels.runtime import optimize

    found: dict[str, Callable[[], nn.Module]] = {}
    for name, make in models.items():
        made = found[name] = functools.cache(make)
        if name == "runtime" and model is not None:
            found[name + COMPILED] = lambda: optimize(model, compile=True)
        elif not name.endswith(GRAPH):

            def twin(made: Callable[[], nn.Module] = made) -> Any:
                return torch.compile(made(), dynamic=False)

            found[name + COMPILED] = twin
    return found


@dataclass(kw_only=True)
class _Turn:
    """A contender while the contest runs."""

    name: str
    form: nn.Module | None = None
    times: list[float] = field(default_factory=list)
    difference: float | None = None
    peak_mb: float | None = None
    outcome: str = "measured"
    reason: str = ""

    def compare(self, output: Tensor, expected: Tensor, limit: float) -> None:
        """Note how far an output is from the baseline's, and leave where that is too far."""
        self.difference = float((output - expected).abs().max() / expected.abs().max())
        if not self.difference <= limit:
            self.end(
                "incorrect",
                f"differs from the baseline by {self.difference:.1e} of the largest output; "
                f"{limit:.0e} would pass",
            )

    def end(self, outcome: str, reason: str) -> None:
        """It takes no part any longer, and gives its memory to the others."""
        self.form, self.times, self.outcome, self.reason = None, [], outcome, reason


def contest(
    models: Mapping[str, Callable[[], nn.Module]],
    images: Tensor,
    *,
    rounds: int = 30,
    clock: Callable[[], float] | None = None,
    direction: str = "fwd",
    rivals: Mapping[str, Callable[[], nn.Module]] | None = None,
    deadline: float | None = None,
) -> Contest:
    """Check that contenders agree, count what they do, and time them in turn.

    Whoever fails, or gives another output than the baseline, leaves the contest with a reason.

    Args:
        models: What makes the contenders, by name, the baseline first.
        images: A batch.
        rounds: Times that everyone runs.
        clock: Seconds; by default the wall clock.
        direction: ``fwd``, or ``fwd-bwd``: then what must agree are the gradients of the images.
        rivals: Other models, timed in the same rounds; their outputs are their own.
        deadline: When by `time.monotonic` no contender is made ready any longer, and no round is started
            beyond the first `LEAST_ROUNDS`.
    """
    import torch

    clock = clock or CLOCKS["wall"]
    step = _trained if direction == "fwd-bwd" else _inferred
    turns = [_Turn(name=name) for name in (*models, *(rivals or {}))]
    makers = {**models, **(rivals or {})}
    expected: Tensor | None = None
    limit = AGREE[str(images.dtype).removeprefix("torch.")]
    with torch.set_grad_enabled(direction == "fwd-bwd"):
        for turn in turns:
            if deadline is not None and time.monotonic() >= deadline:
                turn.end("timeout", f"{NOT_STARTED}the budget was spent")
                continue
            with _leaving(turn):
                turn.form = makers[turn.name]()
                output = _flat(step(turn.form, images))
                turn.peak_mb = _peak_mb(step, turn.form, images)
                if turn.name in models:
                    expected = output if expected is None else expected
                    turn.compare(output, expected, limit)
        for number in range(rounds):
            if number >= LEAST_ROUNDS and deadline is not None and time.monotonic() >= deadline:
                break
            for turn in turns:
                if turn.form is not None:
                    with _leaving(turn):
                        turn.times.append(_timed(step, turn.form, images, clock))
    ran = [turn for turn in turns if turn.times]
    rows = []
    for turn in turns:
        row = Row(name=turn.name, difference=turn.difference, outcome=turn.outcome, reason=turn.reason)
        if turn.form is not None:
            ratio, interval = paired_ratio(ran[0].times, turn.times)
            operations, megabytes = _counted(step, turn.form, images, turn.name, direction)
            row = dataclasses.replace(
                row,
                operations=operations,
                megabytes=megabytes,
                peak_mb=turn.peak_mb,
                samples_ms=tuple(1e3 * t for t in turn.times),
                ratio=ratio,
                ratio_interval=interval,
            )
        rows.append(row)
    return Contest(
        rows=tuple(rows),
        rounds=len(ran[0].times) if ran else 0,
        batch=images.shape[0],
        baseline=ran[0].name if ran else "",
    )


@contextlib.contextmanager
def _leaving(turn: _Turn) -> Iterator[None]:
    """Whatever a contender raises ends its part in the contest."""
    from bratune.measure.memory import release
    from bratune.run.measure_cell import failure

    try:
        yield
    except Exception as error:  # a model, a compiler or a driver may raise anything; the row says what
        turn.end(**failure(error))
    if turn.form is None:
        release()


def difference_limit(
    found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]
) -> tuple[float, float]:
    """How far a model's outputs are from another's, over the largest, and how far its data type allows."""
    a, b = _flat(found), _flat(expected)
    first = expected[0] if isinstance(expected, tuple) else expected
    limit = AGREE[str(first.dtype).removeprefix("torch.")]
    return float((a - b).abs().max() / b.abs().max()), limit


def _inferred(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def _trained(model: nn.Module, images: Tensor) -> Any:
    """The gradient of the images, after one of every parameter has been written."""
    import torch

    for parameter in model.parameters():
        parameter.grad = None
    images = images.detach().requires_grad_()
    scores = model(images)
    parts = scores if isinstance(scores, tuple) else (scores,)
    # A sum: the gradients of a mean over a large batch are too small for float16.
    torch.autograd.backward([part.float().square().sum() for part in parts])
    return images.grad


def _timed(
    step: Callable[[nn.Module, Tensor], Any], model: nn.Module, images: Tensor, clock: Callable[[], float]
) -> float:
    import torch

    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = clock()
    step(model, images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return clock() - start


def _peak_mb(step: Callable[[nn.Module, Tensor], Any], model: nn.Module, images: Tensor) -> float | None:
    """Most memory that a step takes on a GPU beyond what was there before; None of a captured graph."""
    from bratune.kernels.runtime import GraphRunner
    from bratune.measure.memory import cuda_memory

    if not images.is_cuda or isinstance(model, GraphRunner):
        return None

    def run() -> None:
        step(model, images)
        for parameter in model.parameters():
            parameter.grad = None

    return cuda_memory(run, images.device).workspace_mb


def _counted(
    step: Callable[[nn.Module, Tensor], Any], model: nn.Module, images: Tensor, name: str, direction: str
) -> tuple[int | None, float | None]:
    """Operations and MB; what a compiler or a graph has made dispatches nothing that could be counted."""
    from bratune.kernels.accounting import count

    if name.endswith((COMPILED, GRAPH)):
        return None, None
    account = count(lambda: step(model, images), weights=model, gradients=direction == "fwd-bwd")
    return account.operations, account.total_bytes / 1e6


def _flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    import torch

    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.flatten().double() for part in parts])
