"""Measuring a model of somebody else: every routed layer by every backend, and the whole model.

>>> profile_model("package.module:factory", "1x3x640x640")     # in passes, each a fresh process
>>> profile_model(model, torch.randn(1, 3, 640, 640))          # in this process, which it says
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bratune.defaults import defaults_for
from bratune.errors import BratuneError, UsageError
from bratune.machine import Machine, detect
from bratune.measure.settings import MeterSettings
from bratune.measure.worker import Worker
from bratune.record import Record, new_run_id
from bratune.run.engine import CellEngine, LocalEngine
from bratune.run.isolated import IsolatedEngine
from bratune.run.session import run
from bratune.store import Store
from bratune.work.factory import shape_of
from bratune.work.yours import LayerSite, YoursRequest, find_sites, is_live, live, request_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Measured", "ask", "measure_model", "profile_model"]

# Importing somebody's code, running the model and proving its layers in float64.
_LIMIT_S = 600.0
_ONE_PROCESS = (
    "a model of this process is measured in it, in one pass: times are shown and no difference is called "
    "real; package.module:factory and a shape would be measured in fresh processes"
)


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        request: What was asked.
        machine: Where.
        rows: A row per cell, pooled over its passes.
        passes: Rows of single passes; none of a model of this process.
    """

    request: YoursRequest
    machine: Machine
    rows: tuple[Record, ...]
    passes: tuple[Record, ...]


def profile_model(model: nn.Module | str, example: Any, **settings: Any) -> pd.DataFrame:
    """Every routed layer of a model by every backend, and the whole model, as a table.

    Layers are found and proved as `bratune.accelerate` does it; the model itself is not changed. The whole
    model is measured as it is (the baseline), with its routed layers by ``gather``, by what ``auto`` takes,
    and by the fastest backend of each.

    Args:
        model: ``package.module:factory``, measured in fresh processes that import it, or any module, measured
            in this one.
        example: The shape of its input, ``1x3x640x640``; of a module, what it is called with.
        settings: See `measure_model`.

    Returns:
        A row per cell, as `bratune.store.read` gives them. ``stage`` counts the routed layers from 1.

    Raises:
        UsageError: the model cannot be made or called, or has no routed layer.
    """
    import pandas as pd

    return pd.DataFrame([row.to_dict() for row in measure_model(model, example, **settings).rows])


def measure_model(
    model: nn.Module | str,
    example: Any,
    *,
    device: str = "auto",
    dtype: str | None = None,
    direction: str = "fwd",
    backends: Sequence[str] = (),
    skip: Sequence[str] = (),
    regime: str = "eager",
    l2: str | None = None,
    seed: int = 0,
    effort: str | None = None,
    passes: int | None = None,
    budget_s: float | None = None,
    store: str | Path | None = None,
    fresh: bool = False,
    **sampling: Any,
) -> Measured:
    """Measure what `profile_model` shows.

    Args:
        model: See `profile_model`.
        example: See `profile_model`.
        device: See `bratune.machine.detect`; a module stays where it is.
        dtype: Long name, of weights and input; a module keeps its own.
        direction: ``fwd`` or ``fwd-bwd``.
        backends: Names; by default all.
        skip: Names to leave out.
        regime: ``eager``, ``graph`` or ``compile``.
        l2: ``cold`` or ``warm``.
        seed: Of weights and input.
        effort: See `bratune.measure.settings.EFFORTS`.
        passes: Fresh processes per cell.
        budget_s: Seconds after which no cell is started.
        store: File of records; rows that are there are not measured again.
        fresh: Measure them again nevertheless.
        sampling: Values that differ from the effort's, see `bratune.measure.settings.MeterSettings`.

    Raises:
        UsageError: see `profile_model`.
    """
    if isinstance(model, nn.Module):
        weight = next(model.parameters())
        device, dtype = str(weight.device), str(weight.dtype).removeprefix("torch.")
        name, shape = live(model, example)
        warnings.warn(_ONE_PROCESS, stacklevel=3)
    else:
        name, shape = model, str(example)
    machine = detect(device)
    request = ask(
        name,
        shape,
        machine,
        dtype=dtype,
        direction=direction,
        backends=backends,
        skip=skip,
        regime=regime,
        l2=l2,
        seed=seed,
    )
    usual = effort or defaults_for(machine).effort
    how = MeterSettings.for_effort(usual, **sampling)
    given: dict[str, Any] = {
        "store": Store(store) if store is not None else None,
        "fresh": fresh,
        "run_id": new_run_id(),
        "flags": ("--effort", usual),
        "budget_s": budget_s,
    }
    engine: CellEngine
    if is_live(name):
        engine = LocalEngine(machine, how, **given)
    else:
        engine = IsolatedEngine(machine, how.per_pass(), passes=passes or how.passes, **given)
    with engine:
        rows = tuple(run(request, engine))
        return Measured(request, machine, rows, tuple(engine.pass_rows))


def ask(model: str, shape: str, machine: Machine, **asked: Any) -> YoursRequest:
    """A request, its routed layers found and proved in a process of their own; for a live model, in this one.

    Args:
        model: ``package.module:factory``, or a name of `bratune.work.yours.live`.
        shape: Of its input.
        machine: Where it shall run.
        asked: See `bratune.work.yours.request_of`.

    Raises:
        UsageError: the model cannot be made or called, or has no routed layer.
    """
    shape_of(shape)
    values = {
        "model": model,
        "shape": shape,
        "dtype": asked.get("dtype") or defaults_for(machine).dtype,
        "device": machine.device,
        "seed": asked.get("seed", 0),
    }
    if is_live(model):
        sites, left = find_sites(**values)
    else:
        with Worker() as worker:
            outcome = worker.run("bratune.work.yours:sites_job", values, limit_s=_LIMIT_S)
        if not outcome.ok:
            known = outcome.error in _names_of(BratuneError)
            said = outcome.reason.removeprefix(f"{outcome.error}: ") if known else outcome.reason
            raise UsageError(said if known else f"{model} cannot be measured: {said}")
        sites = [LayerSite.from_dict(site) for site in outcome.value["sites"]]
        left = outcome.value["left"]
    return request_of(model, shape, machine, sites=sites, left=left, **asked)


def _names_of(kind: type[BaseException]) -> set[str]:
    return {kind.__name__, *(name for sub in kind.__subclasses__() for name in _names_of(sub))}
