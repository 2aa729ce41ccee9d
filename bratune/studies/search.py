"""Search study: how fast each way to search finds the front, in worlds whose whole front is known.

    python -m bratune.studies search results

Worlds are synthetic (`bratune.tune.synthetic`): rooflines with irregular options, whole models that are not
the sum of their stages, noisy measurements. Every setting of the space is evaluated without noise to get the
true front; a search is judged by the hypervolume of the true costs of what it measured, as a share of
that of the true front. A setting that is proposed again costs nothing.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bratune.tune.bench import Bench
from bratune.tune.ledger import derived_seed
from bratune.tune.request import TuneRequest
from bratune.tune.sampling import Encoding
from bratune.tune.setting import Setting
from bratune.tune.storage import make_sampler
from bratune.tune.synthetic import BACKENDS, SyntheticFidelity, SyntheticWorld, offers
from bratune.tune.table import OptionTable, hypervolume

__all__ = ["BUDGETS", "METHODS", "Contest", "run_study"]

BUDGETS = (10, 20, 40, 80, 160)
METHODS = ("table", "tpe", "nsga2", "random")
# Relative size of what no sum of stages shows.
COUPLINGS = (0.05, 0.15)


@dataclass
class Contest:
    """One world and everything that is true in it.

    Args:
        seed: Which world.
        coupling: See `SyntheticWorld`.
    """

    seed: int
    coupling: float

    def __post_init__(self) -> None:
        self.request = TuneRequest(
            model="biformer_small",
            task="classification",
            height=224,
            width=224,
            batch=64,
            dtype="bfloat16",
            checkpoint="weights",
            images="pictures",
            allow_model_changes=True,
        )
        self.space = self.request.space
        self.world = SyntheticWorld(seed=self.seed, coupling=self.coupling)
        self.fidelity = SyntheticFidelity(self.space, self.request.reference, seed=self.seed)
        self.encoding = Encoding(self.space, tuple(BACKENDS))
        self._costs: dict[str, tuple[float, float]] = {}
        start = self.space.setting(self.request.reference.n_win, self.request.reference.topks, "gather")
        self.start = start
        self.corner = (1.1 * self.costs(start)[0], 1.0)

    def costs(self, setting: Setting) -> tuple[float, float]:
        """True latency in milliseconds and true ``1 - exp(-divergence)`` of a setting."""
        if setting.key not in self._costs:
            ms = self.world.model_ms(self.space, setting)
            self._costs[setting.key] = ms, self.fidelity.infidelity(setting)
        return self._costs[setting.key]

    def every_setting(self) -> Iterator[Setting]:
        """The whole space."""
        routed = self.space.routed
        for window in self.space.shared_windows():
            s = window.n_win
            for topks in itertools.product(*(self.space.topks(i, s) for i in routed)):
                for names in itertools.product(BACKENDS, repeat=len(routed)):
                    yield self.space.setting(s, [*topks, -2], [*names, ""])

    def volume(self, settings: list[Setting]) -> float:
        """Hypervolume of the true costs of settings."""
        return hypervolume((self.costs(s) for s in settings), self.corner)

    # --- the ways to search: each gives settings in the order in which it would measure them ----

    def by_table(self, most: int) -> list[Setting]:
        """The default, then the levels of the front of the measured table."""
        bench = Bench(self.world, self.request, offers)
        entries = [
            bench.entry(option, bench.measure(bench.block_cell(option)))
            for i in self.space.routed
            for option in bench.options(i)
        ]
        losses = {
            (i, s, k): self.fidelity.stage_loss(i, s, k)
            for i in self.space.routed
            for s, k in self.space.model_choices(i)
        }
        table = OptionTable(self.space, entries).with_losses(losses)
        found = {self.start.key: self.start}
        for depth in range(1, 20):
            for candidate in table.candidates(depth=depth):
                found.setdefault(candidate.setting.key, candidate.setting)
            if len(found) >= most:
                break
        return list(found.values())[:most]

    def by_sampler(self, name: str, most: int) -> list[Setting]:
        """What a sampler proposes, from noisy measurements."""
        import optuna

        seed = derived_seed(self.seed, name, self.coupling)
        study = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler(name, seed))
        study.enqueue_trial(self.encoding.params(self.start))
        bench = Bench(self.world, self.request, offers)
        found: dict[str, tuple[Setting, tuple[float, float]]] = {}
        for _ in range(6 * most):
            trial = study.ask()
            setting = self.encoding.suggest(trial)
            if setting.key not in found:
                record = bench.measure(bench.model_cell(setting))
                values = record.median_ms or 0.0, self.fidelity.infidelity(setting)
                found[setting.key] = setting, values
            study.tell(trial, list(found[setting.key][1]))
            if len(found) >= most:
                break
        return [setting for setting, _ in found.values()]


def run_study(
    seeds: int = 4, budgets: tuple[int, ...] = BUDGETS, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Share of the true hypervolume by method, coupling and budget: mean and worst over worlds."""
    shares: dict[tuple[str, float, int], list[float]] = {}
    sizes = []
    for coupling, seed in itertools.product(COUPLINGS, range(seeds)):
        contest = Contest(seed, coupling)
        everything = list(contest.every_setting())
        sizes.append(len(everything))
        truth = contest.volume(everything)
        for method in METHODS:
            most = max(budgets)
            order = contest.by_table(most) if method == "table" else contest.by_sampler(method, most)
            for budget in budgets:
                shares.setdefault((method, coupling, budget), []).append(
                    contest.volume(order[:budget]) / truth
                )
        say(f"world {seed}, coupling {coupling}: {len(everything)} settings")
    rows = [
        {
            "method": method,
            "coupling": coupling,
            "trials": budget,
            "mean": round(statistics.fmean(found), 4),
            "worst": round(min(found), 4),
        }
        for (method, coupling, budget), found in shares.items()
    ]
    return {
        "what": "share of the true front's hypervolume after so many different whole-model measurements",
        "evidence": "synthetic worlds with a known front; nothing was measured on a device",
        "worlds": seeds,
        "settings": max(sizes),
        "rows": rows,
    }


def markdown(study: dict[str, Any]) -> str:
    """The study as a table, one line per method and coupling: mean (worst)."""
    budgets = sorted({row["trials"] for row in study["rows"]})
    lines = [
        "| search | non-additive | " + " | ".join(f"{b} trials" for b in budgets) + " |",
        "| --- | --- |" + " ---: |" * len(budgets),
    ]
    for method, coupling in dict.fromkeys((row["method"], row["coupling"]) for row in study["rows"]):
        cells = [
            f"{row['mean']:.3f} ({row['worst']:.3f})"
            for budget in budgets
            for row in study["rows"]
            if (row["method"], row["coupling"], row["trials"]) == (method, coupling, budget)
        ]
        lines.append(f"| {method} | {coupling:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(study: dict[str, Any]) -> str:
    """The study as a plotly figure in JSON."""
    import plotly.graph_objects as go

    plot = go.Figure()
    for method, coupling in dict.fromkeys((row["method"], row["coupling"]) for row in study["rows"]):
        rows = [r for r in study["rows"] if (r["method"], r["coupling"]) == (method, coupling)]
        plot.add_scatter(
            x=[r["trials"] for r in rows],
            y=[r["mean"] for r in rows],
            name=f"{method}, {coupling:.0%} non-additive",
            line={"dash": "solid" if coupling == min(COUPLINGS) else "dot"},
        )
    plot.update_layout(
        title="How fast does each search find the front?",
        xaxis={"title": "different settings measured end to end", "type": "log"},
        yaxis={"title": "share of the true hypervolume"},
    )
    return str(plot.to_json())


@click.command("search")
@click.argument("path", metavar="FOLDER", type=click.Path(path_type=Path), default=Path("results"))
def main(path: Path) -> None:
    """Run the study and write search-study.json and its figure into a folder."""
    found = run_study()
    path.mkdir(parents=True, exist_ok=True)
    (path / "search-study.json").write_text(json.dumps(found, indent=1) + "\n")
    (path / "search-study.figure.json").write_text(figure(found) + "\n")
    click.echo(markdown(found))
