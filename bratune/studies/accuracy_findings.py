"""What the accuracy study found: its cases as numbers with intervals, as tables and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from bratune.errors import MissingPackageError, UsageError
from bratune.measure.ranks import spearman
from bratune.studies.accuracy import (
    PROXIES,
    SMOKE,
    TRAINED,
    SettingTrial,
    Size,
    TrainedCase,
    keys_of,
    rank_of,
    run_study,
    small_space,
)
from bratune.studies.dense import SCENES, run_dense_case
from bratune.tune.lost_accuracy import CONFIDENCE, Counts, most_lost_labelled
from bratune.tune.show import Say

__all__ = ["figure_of", "findings_of", "main", "tables_of", "write_study"]

# Divergences that the search would try first.
SMALL = 0.03
# Losses of top-1 whose claims are tried out, as fractions.
ALLOWED = (0.005, 0.015, 0.03)


def write_study(folder: Path, seeds: Iterable[int], *, smoke: bool, say: Say = lambda text: None) -> str:
    """Run what a folder lacks of the study, write its findings and figure there, and give its tables.

    Args:
        folder: Gets ``accuracy-study.jsonl``, ``accuracy-study-dense.jsonl``, ``accuracy-study.json`` and
            ``accuracy-study.figure.json``.
        seeds: Of weights, pictures and settings.
        smoke: Seconds, which prove nothing.
        say: Told about every network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size, seeds = SMOKE if smoke else Size(), list(seeds)
    cases = run_study(folder / "accuracy-study.jsonl", size, seeds=seeds, say=say)
    dense = folder / "accuracy-study-dense.jsonl"
    cases += run_study(dense, size, data=[SCENES], seeds=seeds, say=say, run=run_dense_case)
    found = findings_of(cases)
    (folder / "accuracy-study.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "accuracy-study.figure.json").write_text(figure_of(cases) + "\n")
    say(f"results: {folder / 'accuracy-study.jsonl'}, .json and .figure.json")
    return tables_of(found)


@click.command("accuracy")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How many, from 0.")
@click.option("--smoke", is_flag=True, help="A version of seconds that proves nothing.")
def main(output: Path, seeds: int, smoke: bool) -> None:
    """Train small networks on three data sets and say which proxy ranks settings of their weights."""
    click.echo(
        write_study(output, range(1 if smoke else seeds), smoke=smoke, say=partial(click.echo, err=True))
    )


def findings_of(cases: Sequence[TrainedCase]) -> dict[str, Any]:
    """Everything that the study says, as plain numbers.

    Intervals of rank correlations are bootstrap 95 % intervals over data sets and, within them, networks.

    Raises:
        UsageError: there are no cases.
    """
    if not cases:
        raise UsageError("the study has no case yet, so that it says nothing; a run of it would")
    data = sorted({case.data for case in cases})
    # Pixels of a picture go wrong together, so that counts of them bound nothing.
    counted = [case for case in cases if case.measure == "top-1"]
    return {
        "cases": len(cases),
        "trials": sum(len(case.trials) for case in cases),
        "data": {name: _of_data([case for case in cases if case.data == name]) for name in data},
        "ranks": {proxy: _ranks(cases, proxy) for proxy in PROXIES},
        "small": {proxy: _small(cases, proxy) for proxy in PROXIES},
        "claims": _claims(counted),
        "picks": {f"{100 * allowed:g}": _picks(counted, allowed) for allowed in ALLOWED},
        "held_out": {f"{100 * allowed:g}": _held_out(counted, allowed) for allowed in ALLOWED},
        "more_keys": _more_keys(counted),
    }


def tables_of(found: dict[str, Any]) -> str:
    """The findings as Markdown tables."""
    names = list(found["data"])
    lines = [
        "| proxy | all [95 %] | " + " | ".join(names) + f" | divergence below {SMALL:g} |",
        "| --- | --- |" + " --- |" * (len(names) + 1),
    ]
    for proxy, ranks in found["ranks"].items():
        small = found["small"][proxy]
        cells = [_interval(ranks["mean"], ranks["interval"])]
        cells += [_interval(ranks["by_data"][n]["mean"], ranks["by_data"][n]["range"]) for n in names]
        cells.append(_interval(small["mean"], small["interval"]))
        lines.append(f"| {proxy} | " + " | ".join(cells) + " |")
    claims = found["claims"]
    lines += [
        "",
        "| claim at 95 % | settings | loss on the test pictures above it | by more than their noise |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in claims.items():
        lines.append(f"| {name} | {row['settings']} | {row['above']} | {row['broken']} |")
    lines += [
        "",
        "| allowed loss, points | networks with a pick beside the reference | true loss within the claim | "
        "mean keys per query against the reference's |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for allowed, row in found["picks"].items():
        keys = "" if row["keys"] is None else f"{row['keys']:.2f}"
        lines.append(f"| {allowed} | {row['picks']} of {row['cases']} | {row['within']} | {keys} |")
    lines += [
        "",
        "| allowed loss, points | networks of a seed and a set that chose nothing | picks | "
        "true loss within its interval | claims without labels | broken |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for allowed, row in found["held_out"].items():
        numbers = (row[name] for name in ("cases", "picks", "within", "claims", "broken"))
        lines.append(f"| {allowed} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def figure_of(cases: Sequence[TrainedCase]) -> str:
    """Divergence against lost top-1, one colour per data set, as JSON for plotly.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingPackageError("plotly", "the figure of the study") from None
    found = findings_of(cases)["ranks"]["divergence"]["by_data"]
    figure = go.Figure()
    for name in found:
        pairs = [(case, trial) for case in cases if case.data == name for trial in case.trials]
        low, high = found[name]["range"]
        figure.add_scatter(
            x=[max(trial.proxies["divergence"], 1e-6) for _, trial in pairs],
            y=[100 * case.drop(trial) for case, trial in pairs],
            text=[f"{trial.setting}, trained {case.trained}, seed {case.seed}" for case, trial in pairs],
            mode="markers",
            name=f"{name}: Spearman {found[name]['mean']:.2f}, networks from {low:.2f} to {high:.2f}",
        )
    figure.update_layout(
        title="Does the divergence from the trained setting rank settings by lost accuracy?",
        xaxis={"title": "KL divergence from the trained setting, nats", "type": "log"},
        yaxis={"title": "loss of top-1, points"},
        legend={"orientation": "h", "y": -0.2},
    )
    return str(figure.to_json())


def _of_data(cases: Sequence[TrainedCase]) -> dict[str, Any]:
    return {
        "networks": len(cases),
        "seeds": sorted({case.seed for case in cases}),
        "top1": [min(case.top1 for case in cases), max(case.top1 for case in cases)],
    }


def _ranks(cases: Sequence[TrainedCase], proxy: str) -> dict[str, Any]:
    """Spearman's correlation of a proxy with lost top-1, mean over networks."""
    of_data = {name: _finite(rank_of(c, proxy) for c in cases if c.data == name) for name in _data(cases)}
    every = [rank for ranks in of_data.values() for rank in ranks]
    return {
        "mean": _mean(every),
        "interval": _bootstrap(list(of_data.values())),
        "by_data": {
            name: {
                "mean": _mean(ranks),
                "range": [min(ranks, default=math.nan), max(ranks, default=math.nan)],
            }
            for name, ranks in of_data.items()
        },
    }


def _small(cases: Sequence[TrainedCase], proxy: str) -> dict[str, Any]:
    """The same among settings whose divergence is small, all networks of a data set together."""
    found = []
    for name in _data(cases):
        pairs = [
            (trial.proxies[proxy], case.drop(trial))
            for case in cases
            if case.data == name
            for trial in case.trials
            if trial.proxies["divergence"] <= SMALL
        ]
        found.append([spearman([a for a, _ in pairs], [b for _, b in pairs])] if len(pairs) > 3 else [])
    ranks = _finite(rank for ranks in found for rank in ranks)
    return {"mean": _mean(ranks), "interval": _range(ranks)}


def _claims(cases: Sequence[TrainedCase]) -> dict[str, dict[str, int]]:
    """How often other pictures lose more than was claimed."""
    kinds: dict[str, Callable[[TrainedCase, SettingTrial], float]] = {
        "answers that differ (no labels)": lambda case, trial: Counts(
            images=case.images, differ=trial.differ
        ).most_lost(),
        "answers lost and gained (labels)": lambda case, trial: counts_of(case, trial).most_lost(),
    }
    found = {}
    for name, claim in kinds.items():
        rows = [(case, trial, claim(case, trial)) for case in cases for trial in case.trials]
        found[name] = {
            "settings": len(rows),
            "above": sum(case.drop(trial) > limit for case, trial, limit in rows),
            "broken": sum(_surely_lost(case, trial) > limit for case, trial, limit in rows),
        }
    return found


def counts_of(case: TrainedCase, trial: SettingTrial) -> Counts:
    """What was counted of a setting on the proxy's pictures."""
    return Counts(images=case.images, differ=trial.differ, lost=trial.lost, gained=trial.gained)


def _surely_lost(case: TrainedCase, trial: SettingTrial) -> float:
    """Lower limit of the loss of top-1, from the test pictures."""
    return -most_lost_labelled(trial.test_gained, trial.test_lost, case.test_images, confidence=CONFIDENCE)


def _picks(cases: Sequence[TrainedCase], allowed: float) -> dict[str, Any]:
    """What a rule would pick on labelled pictures: fewest keys among what is shown to keep the limit."""
    picks = within = 0
    shares = []
    for case in cases:
        among = len(case.trials)
        shown = [t for t in case.trials if counts_of(case, t).most_lost(among=among) <= allowed]
        own = _own_keys(case)
        shown = [trial for trial in shown if trial.keys < own]
        if shown:
            pick = min(shown, key=lambda trial: trial.keys)
            picks += 1
            within += _surely_lost(case, pick) <= counts_of(case, pick).most_lost(among=among)
            shares.append(pick.keys / own)
    return {"cases": len(cases), "picks": picks, "within": within, "keys": _mean(shares) if shares else None}


def _held_out(cases: Sequence[TrainedCase], allowed: float) -> dict[str, Any]:
    """The pick and its claims on networks whose seed and data set chose nothing.

    What is chosen, on all networks of other seeds and sets, is the proxy: the one that ranks best there says
    which half of the settings is looked at, and the pick is the one of fewest keys among those of them that
    are shown to keep the limit. Its true loss has an interval from the test pictures, too.
    """
    tried = picks = within = claims = broken = 0
    proxies: dict[str, int] = {}
    for case in cases:
        others = [c for c in cases if c.data != case.data and c.seed != case.seed]
        if not others:
            continue
        tried += 1
        proxy = max(PROXIES, key=lambda name: _mean(_finite(rank_of(c, name) for c in others)))
        proxies[proxy] = proxies.get(proxy, 0) + 1
        for trial in case.trials:
            unlabelled = Counts(images=case.images, differ=trial.differ).most_lost()
            claims += 1
            broken += _surely_lost(case, trial) > unlabelled
        near = sorted(case.trials, key=lambda trial: trial.proxies[proxy])[: len(case.trials) // 2]
        shown = [t for t in near if counts_of(case, t).most_lost(among=len(near)) <= allowed]
        if shown:
            pick = min(shown, key=lambda trial: trial.keys)
            picks += 1
            highest = counts_of(case, pick).most_lost(among=len(near))
            lowest = -most_lost_labelled(pick.gained, pick.lost, case.images)
            most = most_lost_labelled(pick.test_lost, pick.test_gained, case.test_images)
            within += _surely_lost(case, pick) <= highest and most >= lowest
    return {
        "cases": tried,
        "proxies": proxies,
        "picks": picks,
        "within": within,
        "claims": claims,
        "broken": broken,
    }


def _more_keys(cases: Sequence[TrainedCase]) -> dict[str, int]:
    """What attending to more than in training does."""
    rows = [(c, t) for c in cases for t in c.trials if t.keys > _own_keys(c)]
    return {
        "settings": len(rows),
        "surely lose": sum(_surely_lost(c, t) > 0 for c, t in rows),
        "surely gain": sum(
            most_lost_labelled(t.test_lost, t.test_gained, c.test_images) < 0 for c, t in rows
        ),
    }


def _own_keys(case: TrainedCase) -> int:
    space = small_space()
    return keys_of(space, space.setting(4, TRAINED[case.trained]))


def _data(cases: Sequence[TrainedCase]) -> list[str]:
    return sorted({case.data for case in cases})


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _range(values: Sequence[float]) -> list[float]:
    return [min(values, default=math.nan), max(values, default=math.nan)]


def _bootstrap(groups: Sequence[Sequence[float]], *, resamples: int = 2000) -> list[float]:
    """Interval of the mean of all values, data sets drawn again and networks within them."""
    groups = [group for group in groups if group]
    if not groups:
        return [math.nan, math.nan]
    rng = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        drawn = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
        means.append(np.mean([np.mean(rng.choice(group, len(group))) for group in drawn]))
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]


def _interval(mean: float, interval: Sequence[float]) -> str:
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
