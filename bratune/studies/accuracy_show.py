"""The accuracy study on the command line: its run, its file, its tables and its figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from bratune.errors import MissingPackageError, StoreError
from bratune.studies.accuracy import SMOKE, Size, TrainedCase, rank_of, run_study
from bratune.studies.accuracy_findings import SMALL, findings_of
from bratune.studies.dense import SCENES, run_dense_case
from bratune.studies.proxies import PROXIES
from bratune.tables import Table, to_markdown
from bratune.tune.show import Say

__all__ = ["figure_of", "main", "read_study", "tables_of", "write_study"]

Interval = Sequence[float] | None


@click.command("accuracy")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How many, from 0.")
@click.option("--smoke", is_flag=True, help="A version of seconds that proves nothing.")
@click.option(
    "--show",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Run nothing; the tables of an accuracy-study.json.",
)
def main(output: Path, seeds: int, smoke: bool, show: Path | None) -> None:
    """Train small networks on four data sets and say which proxy ranks settings of their weights."""
    if show:
        click.echo(tables_of(findings_of(read_study(show))))
        return
    click.echo(
        write_study(output, range(1 if smoke else seeds), smoke=smoke, say=partial(click.echo, err=True))
    )


def write_study(folder: Path, seeds: Iterable[int], *, smoke: bool, say: Say = lambda text: None) -> str:
    """Run what a folder lacks of the study, write its findings and figure there, and give its tables.

    Args:
        folder: Gets ``accuracy-study.jsonl``, ``accuracy-study-dense.jsonl``, from which an interrupted study
            goes on, and ``accuracy-study.json`` and ``accuracy-study.figure.json``, which hold everything.
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
    (folder / "accuracy-study.json").write_text(_as_text(found, cases))
    (folder / "accuracy-study.figure.json").write_text(figure_of(cases) + "\n")
    say(f"results: {folder / 'accuracy-study.json'} and .figure.json")
    return tables_of(found)


def _as_text(found: dict[str, Any], cases: Sequence[TrainedCase]) -> str:
    """The findings, and every network that they come from in a line."""
    networks = ",\n".join("  " + case.to_json() for case in cases)
    return f'{json.dumps(found, indent=1)[:-2]},\n "networks": [\n{networks}\n ]\n}}\n'


def read_study(path: Path) -> list[TrainedCase]:
    """The networks of an ``accuracy-study.json``.

    Raises:
        StoreError: it is none.
    """
    try:
        networks = json.loads(path.read_text("utf-8"))["networks"]
        return [TrainedCase.from_json(json.dumps(network)) for network in networks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is no accuracy study ({error}); a run of the study writes one") from None


# --- tables ---------------------------------------------------------------------------------


def tables_of(found: dict[str, Any]) -> str:
    """The findings as Markdown tables."""
    parts = (_ranks, _seeds, _by_divergence, _claims, _held_out, _more_keys)
    return "\n\n".join(to_markdown(part(found)) for part in parts)


def _ranks(found: dict[str, Any]) -> Table:
    names = list(found["data"])
    columns = ("<proxy", "all", *names, "beyond divergence", f"divergence up to {SMALL:g}")
    rows = []
    for proxy, label in PROXIES.items():
        ranks, small = found["ranks"][proxy], found["small"][proxy]
        cells = [_shown(ranks["mean"], ranks["interval"])]
        cells += [_shown(ranks["by_data"][n]["mean"], ranks["by_data"][n]["interval"]) for n in names]
        gain = found["against_divergence"].get(proxy)
        cells.append(_shown(gain["mean"], gain["interval"], sign="+") if gain else "")
        cells.append(_shown(small["mean"], small["range"]))
        rows.append((label, *cells))
    redrawn = found["redrawn"]
    cells = [_shown(redrawn["by_data"].get(name), None) for name in names]
    rows.append(("the loss itself, on other pictures", _shown(redrawn["mean"], None), *cells, "", ""))
    return Table(columns, tuple(rows))


def _seeds(found: dict[str, Any]) -> Table:
    rows = []
    for name, data in found["data"].items():
        for seed in data["seeds"]:
            cells = [found["ranks"][proxy]["by_data"][name]["seeds"][str(seed)] for proxy in PROXIES]
            rows.append((name, str(seed), *(_shown(cell["mean"], cell["interval"]) for cell in cells)))
    return Table(("<data", "seed", *PROXIES.values()), tuple(rows))


def _by_divergence(found: dict[str, Any]) -> Table:
    columns = (
        "<divergence",
        "settings",
        "loss of top-1, points: least, median, most",
        "surely lose",
        "surely gain",
    )
    rows = []
    for row in found["by_divergence"]:
        upto = "" if row["up_to"] is None else f" to {row['up_to']:g}"
        loss = " ".join(f"{100 * value:+.1f}" for value in row["loss"]) if row["loss"] else "-"
        numbers = (str(row[name]) for name in ("surely lose", "surely gain"))
        rows.append((f"above {row['above']:g}{upto}", str(row["settings"]), loss, *numbers))
    return Table(columns, tuple(rows))


def _claims(found: dict[str, Any]) -> Table:
    columns = ("<claim at 95 %", "settings", "other pictures beyond it", "by more than the noise of both")
    rows = []
    for name, row in found["claims"].items():
        broken = str(row["broken"])
        if row["settings"] and row["broken_share"]:
            low, high = row["broken_share"]
            broken += f" ({row['broken'] / row['settings']:.1%} [{low:.1%}, {high:.1%}])"
        rows.append((name, str(row["settings"]), str(row["outside"]), broken))
    return Table(columns, tuple(rows))


def _held_out(found: dict[str, Any]) -> Table:
    columns = (
        "allowed loss, points", "networks", "limits without labels", "broken", "accepted", "limit kept",
        "other pictures in the interval", "within the noise of both", "picks with fewer keys",
        "within the noise of both", "their keys",
    )  # fmt: skip
    names = ("cases", "claims", "broken", "accepted", "kept", "inside", "within", "picks", "picks_within")
    rows = [
        (allowed, *(str(row[name]) for name in names), _shown(row["keys"], None))
        for allowed, row in found["held_out"].items()
    ]
    return Table(columns, tuple(rows))


def _more_keys(found: dict[str, Any]) -> Table:
    columns = ("<trained", "settings with more keys", "surely lose", "surely gain")
    rows = [
        (name, str(row["settings"]), str(row["surely lose"]), str(row["surely gain"]))
        for name, row in found["more_keys"].items()
    ]
    return Table(columns, tuple(rows))


def _shown(mean: float | None, interval: Interval, *, sign: str = "") -> str:
    if mean is None:
        return "-"
    text = f"{mean:{sign}.2f}"
    return text if interval is None else f"{text} [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


# --- figure ---------------------------------------------------------------------------------

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def figure_of(cases: Sequence[TrainedCase]) -> str:
    """How well every proxy ranks, and divergence against loss, one colour per data set, as JSON for plotly.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise MissingPackageError("plotly", "the figure of the study") from None
    found = findings_of(cases)
    figure = make_subplots(
        rows=2,
        cols=1,
        vertical_spacing=0.16,
        subplot_titles=(
            "Rank correlation with the loss of each network (small), mean over seeds and 95 % (large)",
            "What settings lose, by their divergence",
        ),
    )
    for place, name in enumerate(found["data"]):
        own = [case for case in cases if case.data == name]
        style = {"name": name, "legendgroup": name, "mode": "markers"}
        colour = _COLOURS[place % len(_COLOURS)]
        shift = 0.18 * (place - (len(found["data"]) - 1) / 2)
        for proxies in (_dots(own, shift), _means(found, name, shift)):
            figure.add_scatter(
                **proxies["points"], **style, marker={"color": colour, **proxies["marker"]},
                showlegend=False, row=1, col=1,
            )  # fmt: skip
        figure.add_scatter(
            **_losses(own), **style, marker={"color": colour, "size": 5, "opacity": 0.7}, row=2, col=1
        )
    labels = list(PROXIES.values())
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, row=1, col=1)
    figure.update_yaxes(title="Spearman", range=[-1.05, 1.05], row=1, col=1)
    figure.update_xaxes(
        title="KL divergence from the trained setting, nats", type="log", exponentformat="power", row=2, col=1
    )
    figure.update_yaxes(title="loss of top-1, scenes: of mIoU, points", row=2, col=1)
    figure.update_layout(
        title="Which proxy ranks settings of trained weights by what they lose?",
        width=900,
        height=900,
        legend={"orientation": "h", "y": -0.08},
    )
    return str(figure.to_json())


def _dots(cases: Sequence[TrainedCase], shift: float) -> dict[str, Any]:
    pairs = [(i, case, proxy) for i, proxy in enumerate(PROXIES) for case in cases]
    points = {
        "x": [i + shift for i, _, _ in pairs],
        "y": [rank_of(case, proxy) for _, case, proxy in pairs],
        "text": [f"seed {case.seed}, trained {case.trained}" for _, case, _ in pairs],
    }
    return {"points": points, "marker": {"size": 5, "opacity": 0.4}}


def _means(found: dict[str, Any], name: str, shift: float) -> dict[str, Any]:
    rows = [(i, found["ranks"][proxy]["by_data"][name]) for i, proxy in enumerate(PROXIES)]
    rows = [(i, row) for i, row in rows if row["mean"] is not None]
    ends = [row["interval"] or [row["mean"]] * 2 for _, row in rows]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [high - row["mean"] for (_, row), (_, high) in zip(rows, ends, strict=True)],
        "arrayminus": [row["mean"] - low for (_, row), (low, _) in zip(rows, ends, strict=True)],
    }
    points = {"x": [i + shift + 0.06 for i, _ in rows], "y": [row["mean"] for _, row in rows]}
    return {"points": {**points, "error_y": error}, "marker": {"size": 10}}


def _losses(cases: Sequence[TrainedCase]) -> dict[str, Any]:
    pairs = [(case, trial) for case in cases for trial in case.trials]
    return {
        "x": [max(trial.proxies["divergence"], 1e-6) for _, trial in pairs],
        "y": [100 * case.drop(trial) for case, trial in pairs],
        "text": [f"{trial.setting}, trained {case.trained}, seed {case.seed}" for case, trial in pairs],
    }
