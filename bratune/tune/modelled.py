"""Modelled: which S, top-k and backends to try first on a GPU that is not here.

Every option of every routed stage is modelled, the settings on the front of their sums are modelled whole and
ranked, and those whose ratio to the fastest may be 1 are tied with it: a model can shorten the list, only a
measurement can decide it. The plan that comes out says ``modelled``; it claims no speed-up, and nothing that
looks plans up takes it.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Any

from bratune.errors import UnsupportedError, UsageError
from bratune.gpus import GPU
from bratune.predict.coefficients import Coefficients
from bratune.predict.estimate import Estimate, estimate
from bratune.predict.model import ModelEngine, basis, interval_ms
from bratune.predict.ratio import Ratio, ratio_of
from bratune.record import utc_now
from bratune.tune.bench import Bench
from bratune.tune.evidence import prior_only
from bratune.tune.plan import EndToEnd, Plan, stage_plans
from bratune.tune.request import TuneRequest
from bratune.tune.setting import Setting
from bratune.tune.table import Entry, OptionTable

__all__ = ["Modelled", "Ranked", "measuring_command", "search"]

# Levels of the front of stages below the fastest that are modelled whole.
DEPTH = 3
# What the paper describes: every published speed is of it.
PUBLISHED_BACKEND = "gather"


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A setting with its modelled time.

    Attributes:
        name: ``default`` or ``published``, where it is one of those; else empty.
        ms: Modelled milliseconds per call.
        interval: The 95 % interval.
        keys: Keys per query of each routed stage.
        to_fastest: Its time over that of the fastest.
        speedup: Time of the default over its own.
        reason: What the time rests on.
    """

    setting: Setting
    name: str
    ms: float
    interval: tuple[float, float]
    keys: tuple[int, ...]
    to_fastest: Ratio
    speedup: Ratio
    reason: str

    @property
    def tied(self) -> bool:
        """Whether it may be as fast as the fastest."""
        return self.to_fastest.open


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """The answer for one board.

    Attributes:
        board: The board.
        request: What was asked.
        ranked: Settings by rising time, the default and the published one among them.
        options: How many options of stages were modelled.
        refused: Backends that no stage can run there, with the first reason of each.
    """

    board: GPU
    request: TuneRequest
    ranked: tuple[Ranked, ...]
    options: int
    refused: tuple[tuple[str, str], ...]

    @property
    def best(self) -> Ranked:
        """The fastest."""
        return self.ranked[0]

    @property
    def tied(self) -> tuple[Ranked, ...]:
        """The fastest and all that the model cannot tell from it."""
        return tuple(r for r in self.ranked if r.tied)

    @property
    def default(self) -> Ranked:
        """The authors' S and top-k with the backends that would be chosen without a plan."""
        return next(r for r in self.ranked if r.name == "default")

    @property
    def _published(self) -> Ranked | None:
        return next((r for r in self.ranked if r.name == "published"), None)

    def sentence(self) -> str:
        """The answer in one sentence, with its evidence."""
        best, batch = self.best, self.request.batch
        low, high = (1e3 * batch / ms for ms in reversed(best.interval))
        others = len(self.tied) - 1
        tied = f"; {others} more settings cannot be told from it" if others else ""
        published = self._published
        if best.name == "default":
            gain = "no other setting is faster than the default"
            if published is not None:
                gain = (
                    f"the default, {published.to_fastest.value:.2f}x the published composition "
                    f"({published.to_fastest.lo:.2f} to {published.to_fastest.hi:.2f})"
                )
        else:
            gain = (
                f"{best.speedup.value:.2f}x the default ({best.speedup.lo:.2f} to {best.speedup.hi:.2f}), "
                f"{self.default.setting}"
            )
        return (
            f"{self.board.name}: {best.setting}, about {1e3 * batch / best.ms:.0f} images/s "
            f"({low:.0f} to {high:.0f}), {gain}{tied} (modelled, nothing was measured)"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per setting, by rising time."""
        return [
            {
                "gpu": self.board.key,
                "evidence": "modelled",
                "setting": str(r.setting),
                "name": r.name,
                "n_win": list(r.setting.n_win),
                "topks": list(r.setting.topks),
                "backends": list(r.setting.backends),
                "keys_per_query": list(r.keys),
                "ms": r.ms,
                "ms_interval": list(r.interval),
                "images_per_s": 1e3 * self.request.batch / r.ms,
                "speedup_vs_default": list(r.speedup),
                "tied_with_fastest": r.tied,
                "reason": r.reason,
            }
            for r in self.ranked
        ]

    def plan(self, command: str) -> Plan:
        """The fastest setting as a plan whose evidence is ``modelled``.

        It holds no measured time: not of a stage, not end to end.
        """
        request, best, space = self.request, self.best, self.request.space
        parts = space.stages_of(best.setting)
        same = space.model_key(best.setting) == space.model_key(request.reference)
        return Plan(
            **request.question,
            setting=best.setting,
            default=self.default.setting,
            stages=stage_plans(best.setting, parts, {}),
            end_to_end=EndToEnd(
                reason=f"nothing was measured: {self.board.name} is not here, and the setting is modelled",
            ),
            evidence=prior_only(unchanged=same, omega=request.omega),
            machine=ModelEngine(self.board).machine,
            reason=f"modelled: the fastest of {len(self.ranked)} settings, {len(self.tied)} of them tied",
            measured="modelled",
            diagnostics={"modelled": self.rows()},
            created_utc=utc_now(),
            command=command,
            seed=request.seed,
        )


def search(request: TuneRequest, board: GPU, c: Coefficients) -> Modelled:
    """Rank the settings of a request on a board that need not be here.

    Args:
        request: What is tuned, for what.
        board: The board.
        c: Coefficients of the model.

    Raises:
        UsageError: the request wants accuracy looked at, or no backend accepts a stage there, or a rate of
            the board is not known.
    """
    if request.measures_fidelity or request.shared_run or request.train_trials:
        raise UsageError(
            f"{board.name} is not here, and nothing runs on a GPU that is not here: --images, --labels, "
            "--shared-run and --train-trials need a device; without them S and top-k keep the authors' keys"
        )
    bench = Bench(ModelEngine(board, c, compiled=False), request)
    space = request.space
    entries, refused = _entries(bench, board, c)
    table = OptionTable(space, entries, objective="memory")
    default = bench.with_default_backends(request.reference)
    names = {default.key: "default"}
    wanted = {default.key: default}
    published = space.setting(
        request.reference.n_win, request.reference.topks, PUBLISHED_BACKEND, regime=request.regimes[0]
    )
    names.setdefault(published.key, "published")
    wanted.setdefault(published.key, published)
    for candidate in table.candidates(depth=DEPTH):
        setting = candidate.setting.replace(regime=request.regimes[0])
        if request.allows(setting):
            wanted.setdefault(setting.key, setting)
    for window in space.shared_windows():
        sides = [window.n_win] * len(space.variant.dims)
        topks = list(space.variant.topks)
        for i in space.routed:
            topks[i] = min(space.topks(i, window.n_win))
        found = table.fastest(sides, topks)
        if found is not None:
            setting = found.setting.replace(regime=request.regimes[0])
            wanted.setdefault(setting.key, setting)
    estimates: dict[str, Estimate] = {}
    for key, setting in wanted.items():
        try:
            estimates[key] = estimate(bench.model_cell(setting), board, c)
        except UnsupportedError as error:
            if key == default.key:
                raise UsageError(f"the default {default} cannot be modelled: {error}") from None
    order = sorted(estimates, key=lambda key: estimates[key].ms)
    fastest, usual = estimates[order[0]], estimates[default.key]
    ranked = []
    for key in order:
        one, cell = estimates[key], bench.model_cell(wanted[key])
        ranked.append(
            Ranked(
                setting=wanted[key],
                name=names.get(key, ""),
                ms=one.ms,
                interval=interval_ms(cell, board, c, one),
                keys=_keys(request, wanted[key]),
                to_fastest=ratio_of(one, fastest, c),
                speedup=ratio_of(usual, one, c),
                reason=basis(cell, board, c, one),
            )
        )
    return Modelled(
        board=board, request=request, ranked=tuple(ranked), options=len(entries), refused=tuple(refused)
    )


def _entries(bench: Bench, board: GPU, c: Coefficients) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Every option of every routed stage with the device's time, and why backends have none."""
    found: list[Entry] = []
    refused: dict[str, str] = {}
    for i in bench.space.routed:
        for option in bench.options(i):
            cell = bench.block_cell(option)
            try:
                one = estimate(cell, board, c)
            except UnsupportedError as error:
                refused.setdefault(option.backend, error.reasons[0])
                continue
            workspace = 0.0
            if cell.problem is not None:
                from bratune.kernels import registry

                workspace = registry.get(option.backend).workspace_bytes(cell.problem) / 1e6
            blocks = bench.space.variant.depths[i]
            found.append(dataclasses.replace(option, ms=blocks * one.device_ms, memory_mb=workspace))
    used = {entry.backend for entry in found}
    return found, [(name, why) for name, why in refused.items() if name not in used]


def _keys(request: TuneRequest, setting: Setting) -> tuple[int, ...]:
    """Keys per query of every routed stage."""
    problems = [request.space.stages_of(setting)[i].problem for i in request.space.routed]
    return tuple(problem.keys_per_query for problem in problems if problem is not None)


def measuring_command(found: Modelled) -> str:
    """The command that measures on the board, once it is here, what the model cannot decide.

    It tries as many settings as are tied, the default among them; the search finds them again by measuring
    stages first.
    """
    request = found.request
    words = ["bratune", "tune", "--gpu", found.board.key, "--measured", "--model", request.model]
    words += ["--task", request.task, "--res", f"{request.height}x{request.width}"]
    words += ["-b", str(request.batch), "--dtype", request.dtype]
    if request.amp:
        words.append("--amp")
    if request.direction != "fwd":
        words += ["--direction", request.direction]
    words += ["--channels-last" if request.layout == "nhwc" else "--no-channels-last"]
    for regime in request.regimes:
        words += ["--regime", regime]
    for backend in request.backends:
        words += ["--backend", backend]
    if request.checkpoint:
        words += ["--checkpoint", request.checkpoint]
    words += ["--trials", str(len({r.setting.key for r in found.tied} | {found.default.setting.key}))]
    return shlex.join(words)
