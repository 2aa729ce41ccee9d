"""What the accuracy study found, as plain numbers with intervals."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bratune.errors import UsageError
from bratune.measure.ranks import ranks, spearman
from bratune.measure.verdict import student_t
from bratune.studies.accuracy import TRAINED, SettingTrial, TrainedCase, keys_of, rank_of, small_space
from bratune.studies.proxies import PROXIES
from bratune.tune.lost_accuracy import CONFIDENCE, Counts, change_interval, most_lost_labelled

__all__ = ["ALLOWED", "SMALL", "findings_of"]

# Divergences that the search would try first.
SMALL = 0.03
# Divergences between which losses are summed up.
STEPS = (SMALL, 0.1)
# Losses of top-1 whose claims are tried out, as fractions.
ALLOWED = (0.005, 0.015, 0.03, 0.05)
REDRAWS = 40

# Rank correlations with the loss, by case and proxy.
Ranks = dict[tuple[tuple[str, int, str], str], float]


def findings_of(cases: Sequence[TrainedCase]) -> dict[str, Any]:
    """Everything that the study says, as plain numbers; what cannot be said is None.

    Intervals have 95 %. Those over everything are bootstrap intervals over data sets and, within them,
    networks; those of a data set come from its seeds (Student's t); those of a seed from the settings tried.

    Raises:
        UsageError: there are no cases.
    """
    if not cases:
        raise UsageError("the study has no case yet, so that it says nothing; a run of it would")
    # Pixels of a picture go wrong together, so that counts of them bound nothing.
    counted = [case for case in cases if case.measure == "top-1"]
    of_case: Ranks = {(case.key, proxy): rank_of(case, proxy) for case in cases for proxy in PROXIES}
    return {
        "cases": len(cases),
        "trials": sum(len(case.trials) for case in cases),
        "data": {name: _of_data([case for case in cases if case.data == name]) for name in _data(cases)},
        "ranks": {proxy: _ranks(cases, proxy, of_case) for proxy in PROXIES},
        "against_divergence": {
            proxy: _against(cases, proxy, of_case) for proxy in PROXIES if proxy != "divergence"
        },
        "redrawn": _redrawn(counted),
        "small": {proxy: _small(cases, proxy) for proxy in PROXIES},
        "by_divergence": [
            _between(counted, low, high) for low, high in itertools.pairwise((0.0, *STEPS, math.inf))
        ],
        "claims": _claims(counted),
        "held_out": {f"{100 * allowed:g}": _held_out(counted, allowed, of_case) for allowed in ALLOWED},
        "more_keys": _more_keys(cases),
    }


def _of_data(cases: Sequence[TrainedCase]) -> dict[str, Any]:
    return {
        "networks": len(cases),
        "seeds": sorted({case.seed for case in cases}),
        "measure": cases[0].measure,
        "top1": [min(case.top1 for case in cases), max(case.top1 for case in cases)],
        "images": cases[0].images,
        "test_images": cases[0].test_images,
    }


def _ranks(cases: Sequence[TrainedCase], proxy: str, of_case: Ranks) -> dict[str, Any]:
    """Spearman's correlation of a proxy with the loss, mean over data sets of the mean over networks."""
    groups = [_finite(of_case[c.key, proxy] for c in cases if c.data == name) for name in _data(cases)]
    return {
        "mean": _mean_of_means(groups),
        "interval": _bootstrap(groups),
        "by_data": {name: _of_seeds([c for c in cases if c.data == name], proxy) for name in _data(cases)},
    }


def _of_seeds(cases: Sequence[TrainedCase], proxy: str) -> dict[str, Any]:
    """The same of one data set: every seed, both trainings together, and their mean."""
    seeds = {
        str(seed): _over_settings([case for case in cases if case.seed == seed], proxy)
        for seed in sorted({case.seed for case in cases})
    }
    means = [found["mean"] for found in seeds.values() if found["mean"] is not None]
    return {"mean": _mean(means), "interval": _over_seeds(means), "seeds": seeds}


def _over_settings(cases: Sequence[TrainedCase], proxy: str, *, resamples: int = 1000) -> dict[str, Any]:
    """Mean over the networks of a seed; for the interval, ranks of their settings are drawn again."""
    rng = np.random.default_rng(0)
    drawn = []
    for case in cases:
        x = ranks([trial.proxies[proxy] for trial in case.trials])
        y = ranks([case.drop(trial) for trial in case.trials])
        rows = rng.integers(0, len(x), (resamples, len(x)))
        a, b = x[rows] - x[rows].mean(1, keepdims=True), y[rows] - y[rows].mean(1, keepdims=True)
        norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        drawn.append(np.divide((a * b).sum(1), norm, out=np.full(resamples, np.nan), where=norm > 0))
    means = np.mean(drawn, axis=0)
    means = means[np.isfinite(means)]
    return {
        "mean": _mean(_finite(rank_of(case, proxy) for case in cases)),
        "interval": _quantiles(means) if len(means) else None,
    }


def _against(cases: Sequence[TrainedCase], proxy: str, of_case: Ranks) -> dict[str, Any]:
    """By how much a proxy ranks better than the divergence, network by network."""
    groups = [
        _finite(of_case[c.key, proxy] - of_case[c.key, "divergence"] for c in cases if c.data == name)
        for name in _data(cases)
    ]
    return {"mean": _mean_of_means(groups), "interval": _bootstrap(groups)}


def _redrawn(cases: Sequence[TrainedCase]) -> dict[str, Any]:
    """What a proxy could reach at most that knows the truth: the loss against itself on other pictures.

    Other pictures are drawn by the counts that were seen, which hold noise already, so that this is a little
    too high.
    """
    rng = np.random.default_rng(0)
    by_data: dict[str, list[float]] = {name: [] for name in _data(cases)}
    for case in cases:
        drops = [case.drop(trial) for trial in case.trials]
        found = []
        for _ in range(REDRAWS):
            lost = rng.poisson([trial.test_lost for trial in case.trials])
            gained = rng.poisson([trial.test_gained for trial in case.trials])
            found.append(spearman(drops, (lost - gained).tolist()))
        by_data[case.data] += _finite([statistics.fmean(found)])
    return {
        "mean": _mean_of_means(by_data.values()),
        "by_data": {name: _mean(group) for name, group in by_data.items()},
    }


def _small(cases: Sequence[TrainedCase], proxy: str) -> dict[str, Any]:
    """Rank correlation where the divergence is small, all networks of a data set together."""
    found = {}
    for name in _data(cases):
        pairs = [
            (trial.proxies[proxy], case.drop(trial))
            for case in cases
            if case.data == name
            for trial in case.trials
            if trial.proxies["divergence"] <= SMALL
        ]
        if len(pairs) > 3:
            found[name] = spearman([a for a, _ in pairs], [b for _, b in pairs])
    known = _finite(found.values())
    return {"mean": _mean(known), "range": [min(known), max(known)] if known else None}


def _between(cases: Sequence[TrainedCase], low: float, high: float) -> dict[str, Any]:
    """What settings lose whose divergence is above one value and at most another."""
    rows = [(c, t) for c in cases for t in c.trials if low < t.proxies["divergence"] <= high]
    return {
        "above": low,
        "up_to": high if math.isfinite(high) else None,
        "settings": len(rows),
        "loss": _three([case.drop(trial) for case, trial in rows]),
        **_surely(rows),
    }


def _three(values: Sequence[float]) -> list[float] | None:
    """The smallest, the median and the largest."""
    return [min(values), statistics.median(values), max(values)] if values else None


def _surely(rows: Sequence[tuple[TrainedCase, SettingTrial]]) -> dict[str, int]:
    """How many settings lose or gain by more than the noise of the test pictures, each for itself."""
    return {
        "surely lose": sum(_surely_lost(case, trial) > 0 for case, trial in rows),
        "surely gain": sum(
            most_lost_labelled(trial.test_lost, trial.test_gained, case.test_images) < 0
            for case, trial in rows
        ),
    }


# --- claims ---------------------------------------------------------------------------------


def counts_of(case: TrainedCase, trial: SettingTrial) -> Counts:
    """What was counted of a setting on the proxy's pictures."""
    return Counts(images=case.images, differ=trial.differ, lost=trial.lost, gained=trial.gained)


def _stated(case: TrainedCase, trial: SettingTrial, among: int = 1) -> tuple[float, float, float]:
    """The loss of top-1 on the proxy's pictures between the ends of its interval, as a plan states it."""
    return _loss_between(trial.lost, trial.gained, case.images, 1 - (1 - CONFIDENCE) / among)


def _measured(case: TrainedCase, trial: SettingTrial) -> tuple[float, float, float]:
    """The same on the test pictures, whose number is a noise of its own."""
    return _loss_between(trial.test_lost, trial.test_gained, case.test_images, CONFIDENCE)


def _loss_between(lost: int, gained: int, images: int, confidence: float) -> tuple[float, float, float]:
    low, high = change_interval(gained, lost, images, confidence=confidence)
    return -high, (lost - gained) / images, -low


def _agree(stated: tuple[float, float, float], measured: tuple[float, float, float]) -> bool:
    """Whether two estimates differ by no more than their intervals together allow.

    Source: limits of a difference from those of its parts, Newcombe, Statistics in Medicine 17, 1998.
    """
    (low, loss, high), (low_then, loss_then, high_then) = stated, measured
    if loss_then > loss:
        return loss_then - loss <= math.hypot(high - loss, loss_then - low_then)
    return loss - loss_then <= math.hypot(loss - low, high_then - loss_then)


def _claims(cases: Sequence[TrainedCase]) -> dict[str, dict[str, Any]]:
    """How often other pictures contradict what was claimed, with and without their own noise.

    Settings of a network are judged on the same pictures, so that the share has an interval over networks.
    """
    kinds: dict[str, Callable[[TrainedCase, SettingTrial], tuple[bool, bool]]] = {
        "limit from answers that differ (no labels)": _beyond_unlabelled,
        "limit from answers lost and gained (labels)": _beyond_labelled,
        "interval of the change (labels)": _outside,
    }
    found = {}
    for name, kind in kinds.items():
        judged = [[kind(case, trial) for trial in case.trials] for case in cases]
        broken = [[float(one) for _, one in network] for network in judged]
        found[name] = {
            "settings": sum(len(case.trials) for case in cases),
            "outside": sum(outside for network in judged for outside, _ in network),
            "broken": int(sum(map(sum, broken))),
            "broken_share": _over_networks(broken),
        }
    return found


def _beyond_unlabelled(case: TrainedCase, trial: SettingTrial) -> tuple[bool, bool]:
    limit = Counts(images=case.images, differ=trial.differ).most_lost()
    return case.drop(trial) > limit, _surely_lost(case, trial) > limit


def _beyond_labelled(case: TrainedCase, trial: SettingTrial) -> tuple[bool, bool]:
    limit = counts_of(case, trial).most_lost()
    loss, drop = (trial.lost - trial.gained) / case.images, case.drop(trial)
    noise = math.hypot(limit - loss, drop - _surely_lost(case, trial))
    return drop > limit, drop - loss > noise


def _outside(case: TrainedCase, trial: SettingTrial, among: int = 1) -> tuple[bool, bool]:
    stated, measured = _stated(case, trial, among), _measured(case, trial)
    return not stated[0] <= measured[1] <= stated[2], not _agree(stated, measured)


def _surely_lost(case: TrainedCase, trial: SettingTrial) -> float:
    """Lower limit of the loss of top-1, from the test pictures."""
    return -most_lost_labelled(trial.test_gained, trial.test_lost, case.test_images)


def _held_out(cases: Sequence[TrainedCase], allowed: float, of_case: Ranks) -> dict[str, Any]:
    """What is claimed on networks whose seed and data set chose nothing.

    What is chosen, on all networks of other seeds and sets, is the proxy: the one that ranks best there says
    which half of the settings is looked at. Those of them that are shown to keep the limit are accepted; the
    pick is the one of fewest keys, where it has fewer than the weights were trained with. True losses are
    known from the test pictures, with their noise.
    """
    names = ("cases", "claims", "broken", "accepted", "kept", "inside", "within", "picks", "picks_within")
    found = dict.fromkeys(names, 0)
    proxies: dict[str, int] = {}
    shares = []
    for case in cases:
        others = [c for c in cases if c.data != case.data and c.seed != case.seed]
        if not others:
            continue
        proxy = _best(others, of_case)
        proxies[proxy] = proxies.get(proxy, 0) + 1
        found["cases"] += 1
        found["claims"] += len(case.trials)
        found["broken"] += sum(_beyond_unlabelled(case, trial)[1] for trial in case.trials)
        near = sorted(case.trials, key=lambda trial: trial.proxies[proxy])[: len(case.trials) // 2]
        shown = [t for t in near if counts_of(case, t).most_lost(among=len(near)) <= allowed]
        for trial in shown:
            outside, broken = _outside(case, trial, len(near))
            found["accepted"] += 1
            found["kept"] += _surely_lost(case, trial) <= allowed
            found["inside"] += not outside
            found["within"] += not broken
        cheaper = [trial for trial in shown if trial.keys < _own_keys(case)]
        if cheaper:
            pick = min(cheaper, key=lambda trial: trial.keys)
            found["picks"] += 1
            found["picks_within"] += not _outside(case, pick, len(near))[1]
            shares.append(pick.keys / _own_keys(case))
    return {**found, "proxies": proxies, "keys": _mean(shares)}


def _best(cases: Sequence[TrainedCase], of_case: Ranks) -> str:
    """The proxy that ranks best."""
    found = {name: _finite(of_case[case.key, name] for case in cases) for name in PROXIES}
    return max(found, key=lambda name: statistics.fmean(found[name] or [-1.0]))


def _more_keys(cases: Sequence[TrainedCase]) -> dict[str, dict[str, int]]:
    """What attending to more does: S as trained, more regions in some stage, in none fewer."""
    found = {}
    for trained, own in TRAINED.items():
        rows = [
            (case, trial)
            for case in cases
            if case.trained == trained and case.measure == "top-1"
            for trial in case.trials
            if _attends_to_more(trial.setting, own)
        ]
        found[trained] = {"settings": len(rows), **_surely(rows)}
    return found


def _attends_to_more(setting: str, own: Sequence[int]) -> bool:
    side, topks = setting.split()[:2]
    more = [int(k) - mine for k, mine in zip(topks.removeprefix("k=").split("/"), own, strict=False)]
    return side == "S=4" and min(more) >= 0 < max(more)


def _own_keys(case: TrainedCase) -> int:
    space = small_space()
    return keys_of(space, space.setting(4, TRAINED[case.trained]))


# --- means and intervals --------------------------------------------------------------------


def _data(cases: Sequence[TrainedCase]) -> list[str]:
    return sorted({case.data for case in cases})


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None


def _mean_of_means(groups: Iterable[Sequence[float]]) -> float | None:
    """Every group counts alike, however many networks it has."""
    return _mean(statistics.fmean(group) for group in groups if group)


def _over_seeds(means: Sequence[float]) -> list[float] | None:
    """Student's t interval of a mean of correlations; None from one alone."""
    if len(means) < 2:
        return None
    mean = statistics.fmean(means)
    reach = student_t(0.975, len(means) - 1) * statistics.stdev(means) / math.sqrt(len(means))
    return [max(mean - reach, -1.0), min(mean + reach, 1.0)]


def _over_networks(groups: Sequence[Sequence[float]], *, resamples: int = 2000) -> list[float] | None:
    """Interval of a share, networks drawn again."""
    if len(groups) < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(groups), (resamples, len(groups)))
    sums, sizes = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    return _quantiles(sums[drawn].sum(1) / sizes[drawn].sum(1))


def _bootstrap(groups: Sequence[Sequence[float]], *, resamples: int = 2000) -> list[float] | None:
    """Interval of the mean of all values, data sets drawn again and networks within them."""
    groups = [group for group in groups if group]
    if not groups:
        return None
    rng = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        drawn = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
        means.append(np.mean([np.mean(rng.choice(group, len(group))) for group in drawn]))
    return _quantiles(np.array(means))


def _quantiles(values: Any) -> list[float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]
