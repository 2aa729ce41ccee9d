"""Ledger: an Optuna study as queue, record and source of proposals.

Every measurement is a trial: it waits in the queue, is claimed by one worker, and ends as complete, as
pruned (it ran and broke a constraint, e.g. out of memory: samplers learn from that) or as failed (nothing
is known). What a worker that died left running is found again and queued once more, however often that
happens: a death costs a retry, never the trial.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from bratune.errors import StoreError, UsageError
from bratune.store.claims import Holder
from bratune.tune.storage import make_sampler, open_storage, without_password

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = ["Ledger", "derived_seed"]

Proposal = TypeVar("Proposal")

# A trial of another host counts as lost when nothing was heard of it for this long.
LEASE_S = 900.0
# Why a trial failed that says nothing about the trial: it is queued again. A cell cannot end its worker,
# because it runs in a process of its own (with --no-isolate it can, and whoever sees that has to choose).
INTERRUPTED = "interrupted"
DIED = "its worker died"
DOUBLED = "it was queued twice"
# So many deaths with one trial are worth a word.
OFTEN = 3
LOST = (INTERRUPTED, DIED, DOUBLED)


def derived_seed(seed: int, *parts: object) -> int:
    """A seed that follows from another and from what it is for, the same in every process.

    A resumed run derives a new one from the number of trials that are there, so that it does not
    repeat the draws of the run before.
    """
    text = json.dumps([seed, *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class Ledger:
    """One study.

    Args:
        url: See `bratune.tune.storage.open_storage`.
        name: Of the study; it is opened when it exists.
        objectives: Names of what is minimised.
        sampler: Who proposes where the queue is empty; one of `SAMPLERS`.
        seed: See `derived_seed`.
        storage: Storage to share with another ledger; by default it is opened.
    """

    def __init__(
        self,
        url: str,
        name: str,
        objectives: Sequence[str],
        *,
        sampler: str = "random",
        seed: int = 0,
        storage: BaseStorage | None = None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name, self.objectives = name, tuple(objectives)
        self.storage = storage if storage is not None else open_storage(url)
        self.worker = Holder.current()
        several = len(self.objectives) > 1
        try:
            self.study: Study = optuna.create_study(
                storage=self.storage,
                study_name=name,
                directions=["minimize"] * len(self.objectives),
                load_if_exists=True,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names(list(self.objectives))
        except Exception as error:  # databases have error types of their own
            text = without_password(str(error), url)
            raise StoreError(f"the study {name!r} cannot be opened: {text}") from None
        if len(self.study.directions) != len(self.objectives):
            raise UsageError(
                f"the study {name!r} has {len(self.study.directions)} objectives and {len(self.objectives)} "
                "were asked for; another --study name would work"
            )
        number = len(self.trials())
        own_seed = derived_seed(seed, name, self.worker.host, number)
        self.study.sampler = make_sampler(sampler, own_seed, several=several)

    # --- reading ----------------------------------------------------------------------------

    def trials(self, *states: str) -> list[FrozenTrial]:
        """Trials in these states (``COMPLETE``, ``PRUNED``, ``FAIL``, ``WAITING``, ``RUNNING``), or all."""
        from optuna.trial import TrialState

        wanted = tuple(TrialState[s] for s in states) or None
        return self.study.get_trials(deepcopy=False, states=wanted)

    def by_key(self) -> dict[str, FrozenTrial]:
        """Finished trials (complete or pruned) by their key, the latest of each."""
        return {t.user_attrs["key"]: t for t in self.trials("COMPLETE", "PRUNED") if "key" in t.user_attrs}

    def keep(self, **attrs: Any) -> None:
        """Write facts about the whole study beside it."""
        for key, value in attrs.items():
            if self.study.user_attrs.get(key) != value:
                self.study.set_user_attr(key, value)

    # --- the queue --------------------------------------------------------------------------

    def enqueue(self, items: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> int:
        """Queue work that is neither done nor queued yet; returns how much was added.

        Args:
            items: ``(key, parameters, attributes)``, most wanted first.
        """
        known = self.settled()
        added = 0
        for key, parameters, attributes in items:
            if key in known:
                continue
            known.add(key)
            self.study.enqueue_trial(dict(parameters), user_attrs={**attributes, "key": key})
            added += 1
        return added

    def settled(self) -> set[str | None]:
        """Keys that are done or under way: of every trial but those that were lost."""
        return {t.user_attrs.get("key") for t in self.trials() if not _is_lost(t)}

    def claim(self, suggest: Callable[[Trial], Any]) -> Trial | None:
        """The next waiting trial, now this worker's; None when nothing waits.

        Args:
            suggest: Asks the trial for its parameters, so that they are recorded.
        """
        while self.trials("WAITING"):
            trial = self.study.ask()
            if "key" not in trial.user_attrs:  # another worker was faster, and this is a new proposal
                self.fail(trial, "nothing was waiting any more")
                continue
            if self._has_another(trial):
                self.fail(trial, DOUBLED)
                continue
            self._own(trial)
            suggest(trial)
            return trial
        return None

    def _has_another(self, trial: Trial) -> bool:
        """Whether an earlier trial of the same key is done or running: a death midway left this one."""
        key = trial.user_attrs["key"]
        others = self.trials("COMPLETE", "PRUNED", "RUNNING")
        return any(t.number < trial.number and t.user_attrs.get("key") == key for t in others)

    def propose(self, suggest: Callable[[Trial], Proposal]) -> tuple[Trial, Proposal]:
        """A trial with parameters from the sampler, and what ``suggest`` made of them."""
        trial = self.study.ask()
        self._own(trial)
        return trial, suggest(trial)

    def _own(self, trial: Trial) -> None:
        trial.set_user_attr("worker", [*dataclasses.astuple(self.worker)])
        trial.set_user_attr("claimed_s", time.time())

    # --- the ends of a trial ----------------------------------------------------------------

    def complete(
        self,
        trial: Trial,
        values: Sequence[float],
        *,
        constraints: Mapping[str, float] | None = None,
        **attrs: Any,
    ) -> None:
        """Record what was measured; a constraint holds where its value is at most 0."""
        self._note(trial, constraints, attrs)
        self.study.tell(trial, list(values))

    def prune(
        self, trial: Trial, reason: str, *, constraints: Mapping[str, float] | None = None, **attrs: Any
    ) -> None:
        """Record that it ran and cannot be used; samplers learn from the violated constraint."""
        from optuna.trial import TrialState

        self._note(trial, constraints, {**attrs, "reason": reason})
        self.study.tell(trial, state=TrialState.PRUNED)

    def release(self, trial: Trial) -> None:
        """Give a claimed trial back to the queue: its measurement was interrupted, not lost."""
        self.fail(trial, INTERRUPTED)
        self._queue_lost_again()

    def fail(self, trial: Trial | int, reason: str) -> None:
        """Record that nothing is known of it."""
        from optuna.trial import TrialState

        if isinstance(trial, int):
            self.storage.set_trial_user_attr(self._id_of(trial), "reason", reason)
        else:
            trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def _id_of(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)

    @staticmethod
    def _note(trial: Trial, constraints: Mapping[str, float] | None, attrs: Mapping[str, Any]) -> None:
        for name, value in (constraints or {}).items():
            trial.set_constraint(name, value)
        for name, value in attrs.items():
            trial.set_user_attr(name, value)

    # --- recovery ---------------------------------------------------------------------------

    def reap(self, *, lease_s: float = LEASE_S) -> int:
        """Take back what dead workers left running and queue it again; returns how many there were."""
        found = 0
        for trial in self.trials("RUNNING"):
            owner = trial.user_attrs.get("worker")
            alive = Holder(*owner).is_alive() if owner else False
            if not owner and "claimed_s" not in trial.user_attrs and trial.datetime_start is not None:
                # Popped a moment ago by someone who has not signed it yet, or who died before signing.
                alive = time.time() - trial.datetime_start.timestamp() < 10.0
            if alive is None:
                alive = time.time() - float(trial.user_attrs.get("claimed_s", 0.0)) < lease_s
            if alive:
                continue
            try:
                self.fail(trial.number, DIED)
            except StoreError:
                raise
            except Exception:  # somebody else took it back, or it finished after all
                continue
            found += 1
        self._queue_lost_again()
        return found

    def _queue_lost_again(self) -> None:
        """Queue every trial that was lost and is not done or under way since.

        Of them all, not only of those just found: whoever found another one may have died before this step.
        """
        from optuna.trial import TrialState

        lost: dict[str, FrozenTrial] = {}
        keys = {t.user_attrs.get("key") for t in self.trials() if t.state != TrialState.FAIL}
        for trial in self.trials("FAIL"):
            key = trial.user_attrs.get("key")
            if key is not None and key not in keys and _is_lost(trial):
                lost[key] = trial
        for trial in lost.values():
            attrs = {k: v for k, v in trial.user_attrs.items() if k not in ("worker", "claimed_s", "reason")}
            parameters = trial.system_attrs.get("fixed_params", trial.params)
            self.study.enqueue_trial(dict(parameters), user_attrs=attrs)

    def often_died(self) -> str:
        """What to say where workers died with the same trial again and again; empty where they did not."""
        waiting = {t.user_attrs.get("key", "") for t in self.trials("WAITING")}
        worst = max((self.deaths(key) for key in waiting), default=0)
        return f"; {worst} workers died with the same one" if worst >= OFTEN else ""

    def deaths(self, key: str) -> int:
        """How many workers died with a trial of this key."""
        dead = (t for t in self.trials("FAIL") if t.user_attrs.get("reason", DIED) == DIED)
        return sum(t.user_attrs.get("key") == key for t in dead)

    def busy_elsewhere(self) -> int:
        """Trials that living workers other than this one are running."""
        own = [*dataclasses.astuple(self.worker)]
        return sum(t.user_attrs.get("worker") != own for t in self.trials("RUNNING"))


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial ended without a word about what it tried."""
    return trial.state.name == "FAIL" and trial.user_attrs.get("reason", DIED) in LOST
