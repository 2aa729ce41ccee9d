"""Tuner: from a request to a plan.

First the reference, the authors' setting and the other named ones, end to end. Then the table: every option
of every stage once, the divergence of every model-changing option. The exact front of the table says which
settings to verify end to end; the table's own error, measured on them, says whether it may go on saying so.
`bratune.tune.conclude` then picks, compares with the default and makes the plan.

Every step is a trial of a study: a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bratune.cell import Cell
from bratune.engine import ComparingEngine
from bratune.errors import UsageError
from bratune.kernels.tuned import machine_key
from bratune.record import Record
from bratune.run.groups import groups_of
from bratune.tune.bench import Bench, Offers, StageOptions, failure, summary
from bratune.tune.fidelity_source import FidelitySource
from bratune.tune.ledger import Ledger
from bratune.tune.lost_accuracy import Counts
from bratune.tune.pick import Verified, violations
from bratune.tune.request import TuneRequest
from bratune.tune.sampling import Encoding, black_box
from bratune.tune.setting import Setting
from bratune.tune.show import Clock, Pace, Say
from bratune.tune.table import Entry, OptionTable, TableError
from bratune.tune.train_trials import TrainTrials

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

__all__ = ["GATHER", "Tuner"]

# Shares of the budget after which a phase must be over.
CELLS_UNTIL, LOSSES_UNTIL = 0.3, 0.4
# Largest share kept free for the closing comparison, and what a pass of it takes before anything is timed.
MOST_RESERVED = 0.45
PASS_START_S = 6.0
# The name of the default with gather-then-dense in every routed stage.
GATHER = "gather everywhere"
POLL_S = 0.5
# Whole models that take turns with the default in one process of the search.
AT_ONCE = 4
# Proposals in a row that are known or not worth a training, after which the sampler has no more to say.
MOST_IDLE = 60


class Tuner:
    """One worker of a tuning run.

    Args:
        engine: Who turns cells into records.
        request: What is tuned.
        url: Storage of the studies; see `bratune.tune.storage`.
        study: Name of the study; by default `TuneRequest.study_name`.
        offers: Which backends accept a call; by default the registry's answer.
        fidelity: Judges settings; needed where the request's second objective is ``loss``.
        say: Told what happens, a line at a time.
        clock: Seconds that only grow.

    Raises:
        UsageError: the study was made on another kind of machine, or no fidelity source is given.
    """

    def __init__(
        self,
        engine: ComparingEngine,
        request: TuneRequest,
        url: str,
        *,
        study: str = "",
        offers: Offers | None = None,
        fidelity: FidelitySource | None = None,
        say: Say = lambda text: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.request, self.engine, self.fidelity, self.say = request, engine, fidelity, say
        self.bench = Bench(engine, request, offers)
        self.space = self.bench.space
        self.second = request.second
        if self.second == "loss" and fidelity is None:
            raise UsageError("the second objective is the divergence and nothing was given to measure it")
        self.pace = Pace(clock, request.budget_s)
        self.clock = clock
        self.reference = self.bench.with_default_backends(request.reference)
        here = machine_key(engine.machine)
        name = study or f"{request.study_name}-{here}"
        objectives = ["latency_ms", "divergence" if self.second == "loss" else "peak_alloc_mb"]
        self.settings = Ledger(url, name, objectives, sampler=request.sampler, seed=request.seed)
        shared = self.settings.storage
        self.cells = Ledger(url, f"{request.cells_name}-{here}:cells", ["block_ms"], storage=shared)
        self.losses: Ledger | None = None
        self.trainings = fidelity if isinstance(fidelity, TrainTrials) and self.second == "loss" else None
        if self.trainings is not None:
            self.trainings.open(url, name, request.sampler, storage=shared)
        elif self.second == "loss" and fidelity is not None:
            self.losses = Ledger(url, f"{name}:fidelity-{fidelity.key}", ["divergence"], storage=shared)
        self.options = StageOptions(self.bench, self.cells, self.losses, fidelity, self.reference)
        self._check_machine(here)
        self.encoding = Encoding(self.space, self._backend_names(), request.regimes)
        self.table = OptionTable(self.space, (), objective=self.second)
        # Settings by key that took turns with the default, and whose trials are to come.
        self._beside: dict[str, Record] = {}

    def _check_machine(self, here: str) -> None:
        known = self.settings.study.user_attrs.get("machine")
        if known not in (None, here):
            raise UsageError(
                f"the study {self.settings.name!r} was measured on {known} and this is {here}; "
                "another --study name would work"
            )
        self.settings.keep(machine=here, request=self.request.to_dict())

    def _backend_names(self) -> tuple[str, ...]:
        names = [
            name
            for i in self.space.routed
            for s, k in self.space.model_choices(i)
            for name, _ in self.bench.offered(i, s, k)
        ]
        known = self.settings.study.user_attrs.get("backends", [])
        names = list(dict.fromkeys([*known, *names, *(b for b in self.reference.backends if b)]))
        self.settings.keep(backends=names)
        return tuple(names)

    # --- the phases -------------------------------------------------------------------------

    def search(self) -> None:
        """Measure until the effort is done or the budget is spent; what was done before is not repeated.

        Raises:
            KeyboardInterrupt: the trial at hand went back to the queue; everything else is kept.
        """
        self.settings.keep(finished=False)
        self.reap()
        self.enqueue_settings(self.named().items())
        self.drain_settings()
        if self.request.table:
            self.measure_table()
            if self.trainings is not None:
                self.train(self.trainings)
            else:
                self.verify()
        else:
            black_box(self)
        self.try_regimes()
        self.settings.keep(finished=True)

    def reap(self) -> None:
        """Queue again what dead workers left running."""
        for ledger in self._ledgers():
            count = ledger.reap()
            if count:
                self.say(f"{count} unfinished trial(s) of dead workers are queued again{ledger.often_died()}")

    def _ledgers(self) -> Iterator[Ledger]:
        trainings = self.trainings.ledger if self.trainings is not None else None
        yield from (x for x in (self.cells, self.losses, trainings, self.settings) if x is not None)

    def named(self) -> dict[str, Setting]:
        """The settings that are measured before any other, by name; the first one is the default."""
        found = {"default": self.reference}
        for name, setting in self.request.first_settings().items():
            found[name] = self.bench.with_default_backends(setting)
        if "gather" in self.encoding.backends:  # the attention of the official code
            paper = found.get("paper", self.reference)
            gather = self.space.setting(paper.n_win, paper.topks, "gather", regime=self.request.regimes[0])
            offered = (self.bench.offered(i, paper.n_win[i], paper.topks[i]) for i in self.space.routed)
            if all("gather" in [name for name, _ in some] for some in offered):
                found[GATHER] = gather
        return found

    def measure_table(self) -> None:
        """Measure options of stages, the most promising first, then divergences; sets `table`."""
        options = self.options.ordered(self.named().values())
        self._measure_options(options, CELLS_UNTIL, "stage options")
        if self.losses is not None:
            self.losses.enqueue(self.options.loss_items())
            self._drain(self.losses, self.options.run_loss, LOSSES_UNTIL, "divergences")
        self.read_table()
        if self.request.how_much.configs > 1:
            front = {entry for c in self.table.candidates() for entry in self.table.find(c.setting) or ()}
            most = self.request.how_much.configs
            more = [other for entry in sorted(front) for other in self.bench.other_configs(entry, most)]
            self._measure_options(more, LOSSES_UNTIL, "backend settings")
            self.read_table()

    def _measure_options(self, entries: Sequence[Entry], share: float, what: str) -> None:
        """Measure options, together where the engine can, until a share of the budget is spent.

        Together are the options that one stage has with one S and top-k, which take turns, or as many as
        there are devices. What was measured so is in the table, however late it became.
        """
        cells = {self.bench.block_cell(entry): entry for entry in entries}
        known = self.cells.by_key()
        missing = [cell for cell in cells if cell.cell_id not in known]
        batches = self._batches(missing)
        self.cells.enqueue(self.options.cell_items(cells[cell] for batch in batches for cell in batch))
        done, slots = 0, self.engine.slots
        for batch in batches if slots > 1 or self.engine.turns else ():
            if self.pace.left(share) <= 0:
                break
            done += len(list(self.engine.run(batch)))
            how = f"{slots} at a time" if slots > 1 else f"the last {len(batch)} in turn"
            self.say(f"{done} of {len(missing)} {what} are measured, {how}")
        self._drain(self.cells, self.options.run_cell, share, what, known=done)

    def _batches(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Cells that the engine is given together; between batches the budget is looked at."""
        if self.engine.slots == 1:
            return groups_of(cells)
        at_once = 4 * self.engine.slots
        return [[*cells[start : start + at_once]] for start in range(0, len(cells), at_once)]

    def verify(self) -> None:
        """Measure the best settings of the table end to end, then the next ones, while that helps."""
        effort = self.request.how_much
        limit = next((c.limit for c in self.request.limits if c.field == "peak_alloc_mb"), None)
        if self.pace.left() < effort.verify * self.pace.typical("setting") + self._reserved_s():
            # A swap of one stage is what the table knows best, and the measured default is next to it.
            swaps = [("", s.replace(regime=self.reference.regime)) for s in self.table.swaps(self.reference)]
            self.enqueue_settings(swaps)
            self.drain_settings()
        depth, already = 1, len(self.verified())
        while self.time_left():
            room = effort.verify - len(self.verified())
            error = self.error()
            if room <= 0:
                break
            if already and error.n >= 5 and not error.trustworthy:
                self.say(f"{error}: the sampler takes over from the table")
                black_box(self)
                break
            candidates = self.table.candidates(depth=depth, max_memory_mb=limit)
            added = self.enqueue_settings([("", c.setting) for c in candidates], most=room)
            if not added and depth >= 6:
                break
            self.drain_settings()
            depth, already = depth + 1, already + added
        if self.table.entries:
            self.say(str(self.error()))

    def train(self, trainings: TrainTrials) -> None:
        """Train settings that the table calls faster than the default, then measure them end to end."""
        self.settings.keep(training=True)
        idle = 0
        while trainings.left() and self.time_left() and idle < MOST_IDLE:
            idle = 0 if self._train_one(trainings) else idle + 1
        self.settings.keep(training=False)
        while trainings.ledger.busy_elsewhere():
            time.sleep(POLL_S)
            trainings.ledger.reap()
        found = [self.table.fastest(s.n_win, s.topks) for s in trainings.trained()]
        best = sorted((c for c in found if c is not None), key=lambda c: c.ms)
        self.enqueue_settings([("", c.setting) for c in best])
        self.drain_settings()
        self.say(str(self.error()))

    def _train_one(self, trainings: TrainTrials) -> bool:
        """Train a proposal of the sampler, if it is worth it."""
        default = self.table.predict_ms(self.reference)

        def refusal(setting: Setting) -> float | None:
            candidate = self.table.fastest(setting.n_win, setting.topks)
            if candidate is None:  # the budget ended before its stages were measured
                return 1.0
            return candidate.ms / default - 1.0 if default else None

        start = self.clock()
        text = trainings.step() or trainings.propose(refusal)
        if not text:
            return False
        self.pace.note("training", self.clock() - start)
        eta = self.pace.eta("training", trainings.left())
        self.say(" · ".join(filter(None, [text, f"{trainings.left()} trainings left", eta])))
        return True

    def try_regimes(self) -> None:
        """Measure the three fastest settings in the other regimes."""
        others = self.request.regimes[1:]
        if not others or not self.time_left():
            return
        best = sorted((v for v in self.verified() if v.feasible), key=lambda v: v.ms)[:3]
        self.enqueue_settings([("", v.setting.replace(regime=r)) for v in best for r in others])
        self.drain_settings()

    def help(self, *, patience_s: float = 60.0) -> int:
        """Work on what another worker queued until it says that it is finished; returns trials done."""
        done, idle_since = 0, self.clock()
        while True:
            worked = 0
            for ledger, run in (
                (self.cells, self.options.run_cell),
                (self.losses, self.options.run_loss),
                (self.settings, self._run_setting),
            ):
                if ledger is not None:
                    worked += self._step(ledger, run, "shared work")
            if self.trainings is not None and self.settings.study.user_attrs.get("training"):
                self.read_table()
                worked += bool(self.trainings.left()) and self._train_one(self.trainings)
            done += worked
            if worked:
                idle_since = self.clock()
                continue
            if self.settings.study.user_attrs.get("finished") or self.clock() - idle_since > patience_s:
                return done
            time.sleep(POLL_S)

    # --- queues -----------------------------------------------------------------------------

    def time_left(self) -> bool:
        """Whether another whole model can be measured before the closing comparison must start."""
        return self.pace.left() > self._reserved_s()

    def _reserved_s(self) -> float:
        """What the closing comparison of the default, the pick, a rival and the published form may take."""
        a_pass = PASS_START_S + 4 * self.pace.typical("setting")
        return min(self.request.how_much.passes * a_pass, MOST_RESERVED * self.request.budget_s)

    def enqueue_settings(self, named: Any, *, most: int | None = None) -> int:
        """Queue settings that were not measured yet; ``named`` are pairs of a name (or "") and a setting."""
        known = self.settings.settled()
        fresh = [(name, s) for name, s in named if s.key not in known][:most]
        return self.settings.enqueue(
            (s.key, self.encoding.params(s), {"setting": s.to_dict(), "name": name}) for name, s in fresh
        )

    def drain_settings(self) -> None:
        """Measure every waiting setting; where one process can run several, in turn with the default."""
        self._drain(self.settings, self._run_setting, None, "settings")

    def _drain(
        self, ledger: Ledger, run: Callable[[Trial], str], share: float | None, what: str, known: int = 0
    ) -> None:
        """Run what waits while there is time; what the first ``known`` ask for is measured and takes none."""
        while True:
            in_time = self.time_left() if share is None else self.pace.left(share) > 0
            if not in_time and known <= 0:
                left = len(ledger.trials("WAITING"))
                if left:
                    self.say(f"the budget for {what} is spent; {left} stay queued for the next run")
                return
            known -= 1
            if self._step(ledger, run, what):
                continue
            if not ledger.busy_elsewhere():
                return
            time.sleep(POLL_S)
            ledger.reap()

    def _step(self, ledger: Ledger, run: Callable[[Trial], str], what: str) -> bool:
        """Claim and run one trial; False where nothing waits."""
        suggest = self.encoding.suggest if ledger is self.settings else self.options.suggest
        trial = ledger.claim(suggest)
        if trial is None:
            return False
        kind = "setting" if ledger is self.settings else "cell" if ledger is self.cells else "loss"
        start = self.clock()
        try:
            text = run(trial)
        except BaseException:
            ledger.release(trial)
            raise
        self.pace.note(kind, self.clock() - start)
        waiting = len(ledger.trials("WAITING"))
        eta = self.pace.eta(kind, waiting)
        best = min((v.ms for v in self.verified() if v.feasible), default=None) if kind == "setting" else None
        parts = [
            text,
            f"best {best:.3f} ms" if best else "",
            f"{waiting} {what} waiting" if waiting else "",
            eta,
        ]
        self.say(" · ".join(part for part in parts if part))
        return True

    def read_table(self) -> None:
        """Set `table` from everything measured so far, the rest of the model from the default."""
        table = self.options.table(self.encoding.backends, self.second)
        default = self.find(self.reference)
        self.table = table.calibrated(self.reference, default.ms) if default else table

    # --- whole settings ---------------------------------------------------------------------

    def _run_setting(self, trial: Trial) -> str:
        setting = Setting.from_dict(trial.user_attrs["setting"])
        return self.measure_setting(trial, setting)

    def _take_turns(self, setting: Setting) -> None:
        """Let a setting and those that wait next take turns with the default, where that is known.

        A machine changes its speed from one minute to the next. What is kept of each is the default's time
        over the ratio within rounds: times of a search differ by their settings, and not by the minute.
        """
        default = self.find(self.reference)
        if default is None or setting.regime != self.reference.regime:
            return
        queued = [t.user_attrs for t in self.settings.trials("WAITING")]
        waiting = [Setting.from_dict(attrs["setting"]) for attrs in queued if not attrs.get("name")]
        same = [s for s in waiting if s.regime == setting.regime and s.key not in self._beside]
        each = self.pace.typical("setting")
        room = min(AT_ONCE, (self.pace.left() - self._reserved_s()) / each) if each else AT_ONCE
        chosen = [setting, *same][: max(1, int(room))]
        cells = {self.bench.model_cell(one): one for one in chosen}
        base = self.bench.model_cell(self.reference)
        found = self.engine.in_turn([base, *cells], base, 1, about="search")
        for cell, one in cells.items():
            if found[cell]:
                self._beside[one.key] = _scaled(found[cell][-1], default.ms)

    def measure_setting(self, trial: Trial, setting: Setting) -> str:
        """Measure a setting end to end and finish its trial; returns a line about it."""
        name = trial.user_attrs.get("name", "")
        # What `bratune profile` measures, too, is measured as it does, so that either finds the other's rows.
        if not name and self.engine.slots == 1 and setting.key not in self._beside:
            self._take_turns(setting)
        known = self._beside.pop(setting.key, None)
        record = self.bench.measure(self.bench.model_cell(setting)) if known is None else known
        what = f"{setting} ({name})" if name else str(setting)
        common: dict[str, Any] = {"record": summary(record), "setting": setting.to_dict()}
        if not record.ok:
            self.settings.prune(trial, record.reason, constraints=failure(record), **common)
            return f"{what}: {record.outcome}, {record.reason}"
        over = violations(self.request.limits, record)
        if not self.request.allows(setting):
            over["floors"] = 1.0
        second = record.peak_alloc_mb or 0.0
        text = f"{what}: {record.median_ms:.3f} ms"
        if self.fidelity is not None and self.second == "loss":
            fidelity = self.fidelity.joint(setting)
            second = fidelity.loss
            if not fidelity.usable:
                over["accuracy unknown"] = 1.0
            common |= {"evidence": fidelity.evidence.to_dict()}
            text += f", {fidelity.evidence}"
        predicted = self.table.predict_ms(setting)
        if predicted is not None:
            common |= {"predicted_ms": predicted}
        self.settings.complete(trial, [record.median_ms or 0.0, second], constraints=over, **common)
        broken = [name for name, value in over.items() if value > 0]
        return text + (f", breaks {', '.join(broken)}" if broken else "")

    def verified(self) -> list[Verified]:
        """Every setting that was measured end to end, once each."""
        return [self._verified(t) for t in self.settings.by_key().values() if t.values is not None]

    def _verified(self, trial: FrozenTrial) -> Verified:
        record = Record.from_dict(trial.user_attrs["record"])
        ms = trial.values[0]
        low, high = record.ci_lo_ms, record.ci_hi_ms
        setting = Setting.from_dict(trial.user_attrs["setting"])
        return Verified(
            trial=trial.number,
            setting=setting,
            ms=ms,
            ci=None if low is None or high is None or low == high else (low, high),  # one sample has none
            memory_mb=record.peak_alloc_mb,
            loss=trial.values[1] if self.second == "loss" else None,
            counts=self._counts(trial, setting),
            feasible=all(value <= 0 for value in trial.constraints.values()),
            predicted_ms=self.table.predict_ms(setting),
        )

    def _counts(self, trial: FrozenTrial, setting: Setting) -> Counts | None:
        """What was counted of a setting's answers; None of the reference, whose answers are its own."""
        found = trial.user_attrs.get("evidence", {}).get("values", {}).get("counts")
        same = self.space.model_key(setting) == self.space.model_key(self.request.reference)
        return None if found is None or same else Counts(**found)

    def find(self, setting: Setting) -> Verified | None:
        """The measurement of a setting; None when there is none."""
        return next((v for v in self.verified() if v.setting.key == setting.key), None)

    def error(self) -> TableError:
        """How well the table predicts what was measured end to end, the calibrating default left out."""
        regime = self.request.regimes[0]
        return self.table.error(
            (v.setting, v.ms)
            for v in self.verified()
            if v.setting.key != self.reference.key and v.setting.regime == regime
        )


def _scaled(row: Record, base_ms: float) -> Record:
    """A row with the time that its ratio to a base says, whose own time is ``base_ms``."""
    if not row.ok or not row.ratio or not row.median_ms:
        return row
    factor = base_ms / row.ratio / row.median_ms
    times = {name: getattr(row, name) for name in ("median_ms", "ci_lo_ms", "ci_hi_ms")}
    return row.replace(
        **{name: None if ms is None else factor * ms for name, ms in times.items()},
        images_per_s=None if row.images_per_s is None else row.images_per_s / factor,
    )
