"""Calibrate: how far timm's models stay behind the limits of the boards on which they were measured.

``python -m bratune.studies calibrate FOLDER`` reads files of throughputs as the timm project publishes them
(``benchmark-infer-<precision>-<layout>-pt<torch>-cu<cuda>-<board>[-dynamo].csv``), counts the models on
meta tensors (`bratune.predict.counted`), and fits, per file and over all boards together, how many times
the ideal time the multiply-adds and the bytes of every kind of operation take: non-negative least squares
on relative errors, the large ones weighed down. Whole families of models (modules of timm) and whole boards
are held out to say how wrong that is. ``bratune/data/calibration.json`` is what it writes.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import numpy as np
from numpy.typing import NDArray

from bratune.errors import BratuneError, MissingPackageError, UsageError
from bratune.gpus import GPU
from bratune.kernels.accounting import Operation
from bratune.predict.coefficients import TRANSFER_SPREAD
from bratune.predict.counted import KINDS, Load, count_peer, loads, timm_models
from bratune.predict.fit import PRIOR_RECORDS
from bratune.predict.public import PublishedFigure, used_matrix
from bratune.predict.roofline import rates
from bratune.report.published import timm_conditions, timm_lines

__all__ = ["FileSource", "calibrate", "count_models", "parse_name", "read_folder"]

# Below these a model says more about launches and about the benchmark than about operations.
LEAST_BATCH = 64
LEAST_GMACS = 0.3
# Images of a counted batch: what does not grow with the batch disappears in it, as it did when measured.
COUNTED_BATCH = 64
PER_FAMILY = 10
FOLDS = 10
# An error below this is as good as none when errors are weighed.
GOOD_ERROR = 0.08
REWEIGHTINGS = 6
# What a column is drawn to, and how strongly: as by a tenth of a model that consists of that column alone. A
# kind that few models have, or that always comes with another, would otherwise be put at nothing.
PRIOR_TIMES = 1.2
PRIOR_WEIGHT = 0.1
FEWEST_MODELS = 60
# What is published of these is shown beside our models; they are near BiFormer in work or in accuracy.
SHOWN = (
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "pvt_v2_b2",
    "maxvit_tiny_rw_224",
    "deit_small_patch16_224",
    "resnet50",
)
SOURCE = "huggingface/pytorch-image-models@aa4b5850 results/"
Z95 = 1.96

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """What a file of throughputs was measured with.

    Attributes:
        path: The file.
        board: The board, from the table.
        regime: ``eager`` or ``compile``.
        layout: ``nchw`` or ``nhwc``.
        autocast: Whether under autocast.
        dtype: Long name of the data type.
        torch: Version of torch.
        cuda: Version of CUDA.
    """

    path: Path
    board: GPU
    regime: str
    layout: str
    autocast: bool
    dtype: str
    torch: str
    cuda: str

    @property
    def plain_name(self) -> str:
        """The board and how it was used, in words."""
        cast_ = "autocast to " if self.autocast else ""
        return f"{self.board.key} {self.regime} {self.layout} {cast_}{self.dtype} torch {self.torch}"


def parse_name(path: Path) -> FileSource | None:
    """What a file's name says; None for files of other measurements (training, CPUs)."""
    how = timm_conditions(path.name)
    known = {"board", "dtype", "torch", "cuda"} <= how.keys()
    if not path.name.startswith("benchmark-infer-") or not known or how["dtype"] == "float32":
        return None
    return FileSource(
        path=path,
        board=how["board"],
        regime=how["regime"],
        layout=how["layout"],
        autocast=how["amp"],
        dtype=how["dtype"],
        torch=how["torch"],
        cuda=how["cuda"],
    )


class Timed(NamedTuple):
    """A line of a file: a model, its image and what was measured."""

    model: str
    side: int
    batch: int
    gmacs: float
    us: float


def read_file(path: Path) -> list[Timed]:
    """The models of a file that say something about operations; see `bratune.report.published.timm_lines`."""
    return [
        Timed(line.model, line.side, line.batch, line.gmacs, 1e6 / line.rate)
        for line in timm_lines(path)
        if line.batch >= LEAST_BATCH and line.gmacs is not None and line.gmacs >= LEAST_GMACS
    ]


def read_folder(folder: Path) -> dict[FileSource, list[Timed]]:
    """Every file of throughputs on a GPU in a folder, with its lines.

    Raises:
        UsageError: there is none.
    """
    sources = [s for path in sorted(folder.glob("*.csv")) if (s := parse_name(path))]
    if not sources:
        raise UsageError(
            f"{folder} holds no benchmark-infer-...csv of a GPU; the folder results/ of the timm project does"
        )
    return {source: read_file(source.path) for source in sources}


# --- counting -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A model in numbers.

    Attributes:
        model: Its name.
        side: Side of its image.
        family: The module of timm that defines it.
        loads: By kind, of one image of a large batch.
    """

    model: str
    side: int
    family: str
    loads: Mapping[str, Load]


def family_of(model: str) -> str:
    """The module of timm that defines a model: models of one are relatives."""
    timm = timm_models()
    return str(timm.models.model_entrypoint(model).__module__.rpartition(".")[2])


def count_models(
    wanted: Iterable[tuple[str, int]],
    cache: Path | None = None,
    *,
    per_family: int = PER_FAMILY,
    say: Any = lambda text: None,
) -> list[Counted]:
    """Models counted on meta tensors, at most so many of a family, in an order that is always the same.

    Args:
        wanted: Names and sides of images.
        cache: File of counts; what it holds is not counted again, what it lacks is added.
        per_family: The most of one family.
        say: Told about models that cannot be counted.
    """
    timm = timm_models()
    known = dict(_read_cache(cache)) if cache else {}
    order = sorted({pair for pair in wanted if timm.is_model(pair[0])})
    random.Random(1).shuffle(order)
    taken: Counter[str] = Counter()
    found = []
    for model, side in order:
        family = family_of(model)
        if taken[family] >= per_family:
            continue
        key = model, side
        if key not in known:
            try:
                known[key] = list(count_peer(model, (side, side), COUNTED_BATCH).items())
            except BratuneError as error:
                say(str(error))
                continue
            if cache:
                _append_cache(cache, key, known[key])
        taken[family] += 1
        per_image = {kind: load.scaled(1 / COUNTED_BATCH) for kind, load in loads(known[key]).items()}
        found.append(Counted(model=model, side=side, family=family, loads=per_image))
    return found


def _stamp() -> str:
    """What makes counts differ: the code that counts and the models that are counted."""
    import bratune.kernels.accounting as accounting

    code = hashlib.sha256(Path(accounting.__file__).read_bytes()).hexdigest()[:12]
    return f"{code} timm {timm_models().__version__}"


def _read_cache(cache: Path) -> Iterator[tuple[tuple[str, int], list[tuple[Operation, int]]]]:
    if not cache.exists():
        return
    stamp = _stamp()
    for line in cache.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was interrupted
            continue
        if row["stamp"] == stamp:
            pairs = [
                (Operation(name, read, written, weights, macs, tuple(shape)), times)
                for times, name, read, written, weights, macs, shape in row["operations"]
            ]
            yield (row["model"], row["side"]), pairs


def _append_cache(cache: Path, key: tuple[str, int], counted: Sequence[tuple[Operation, int]]) -> None:
    rows = [[n, o.name, o.read, o.written, o.weights, o.macs, o.shape] for o, n in counted]
    row = {"stamp": _stamp(), "model": key[0], "side": key[1], "operations": rows}
    with cache.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")


# --- fitting ------------------------------------------------------------------------------------------

# Kinds whose multiply-adds take time of their own; the others only move bytes.
MACS = (
    "gemm",
    "gemm-narrow",
    "batched",
    "conv",
    "conv-narrow",
    "pointwise",
    "pointwise-narrow",
    "grouped",
    "depthwise",
    "attention",
)
COLUMNS = tuple((kind, "macs") for kind in MACS) + tuple((kind, "moved") for kind in KINDS)


@dataclass(frozen=True, kw_only=True)
class FileEquations:
    """What one file says, as a linear system.

    Attributes:
        source: The file.
        ideal: Microseconds per image at the board's limits, ``[models, columns]``.
        us: Measured microseconds per image, ``[models]``.
        families: Of the models.
    """

    source: FileSource
    ideal: Floats
    us: Floats
    families: tuple[str, ...]


def table_of(source: FileSource, timed: Sequence[Timed], counted: Sequence[Counted]) -> FileEquations:
    """The system of a file, for the models that were counted."""
    by_key = {(t.model, t.side): t for t in timed}
    peak = rates(source.board, source.dtype)
    rows, us, families = [], [], []
    for c in counted:
        t = by_key.get((c.model, c.side))
        if t is None:
            continue
        rows.append([_ideal_us(c.loads.get(kind, Load()), what, peak) for kind, what in COLUMNS])
        us.append(t.us)
        families.append(c.family)
    return FileEquations(
        source=source,
        ideal=np.array(rows).reshape(len(rows), len(COLUMNS)),
        us=np.array(us),
        families=tuple(families),
    )


def _ideal_us(load: Load, what: str, peak: Any) -> float:
    if what == "macs":
        return float(2e6 * load.macs / peak.matrix)
    return float(1e6 * load.moved / peak.memory)


def solve(ideal: Floats, us: Floats) -> Floats:
    """Non-negative times-the-ideal of every column, for small relative errors of most models.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise MissingPackageError("scipy", "a calibration") from None
    relative, columns = ideal / us[:, None], ideal.shape[1]
    prior = np.sqrt(PRIOR_WEIGHT) * np.eye(columns)
    drawn = np.full(columns, np.sqrt(PRIOR_WEIGHT) * PRIOR_TIMES)
    weight = np.ones(len(us))
    found = np.zeros(columns)
    for _ in range(REWEIGHTINGS + 1):
        found = nnls(np.vstack([relative * weight[:, None], prior]), np.concatenate([weight, drawn]))[0]
        error = np.abs(np.log(np.maximum(relative @ found, 1e-3)))
        weight = 1 / np.sqrt(np.maximum(error, GOOD_ERROR))
    return cast(Floats, found)


def held_out(table: FileEquations) -> Floats:
    """Logarithm of predicted over measured, each family predicted without any of its relatives."""
    families = sorted(set(table.families))
    random.Random(0).shuffle(families)
    error = np.zeros(len(table.us))
    for fold in range(FOLDS):
        out = np.isin(table.families, families[fold::FOLDS])
        if out.any() and not out.all():
            error[out] = np.log(table.ideal[out] @ solve(table.ideal[~out], table.us[~out]) / table.us[out])
    return error


def reach(errors: Floats) -> tuple[float, float]:
    """The 95 % interval of log(measured / predicted), from errors of log(predicted / measured)."""
    lo, hi = np.quantile(-errors, [0.025, 0.975])
    return float(min(lo, -0.01)), float(max(hi, 0.01))


def covered(table: FileEquations, errors: Floats) -> float:
    """Per cent of models inside the interval that the errors of other families give."""
    families = sorted(set(table.families))
    random.Random(0).shuffle(families)
    inside = np.zeros(len(errors), dtype=bool)
    for fold in range(FOLDS):
        out = np.isin(table.families, families[fold::FOLDS])
        if out.any() and not out.all():
            lo, hi = reach(errors[~out])
            inside[out] = (-errors[out] >= lo) & (-errors[out] <= hi)
    return float(100 * inside.mean())


def error_row(errors: Floats, covered_pct: float) -> dict[str, Any]:
    """`bratune.predict.public.HeldOut` as it is written."""
    size = np.abs(errors)
    return {
        "models": len(errors),
        "median_pct": round(float(100 * np.median(np.expm1(size))), 1),
        "p90_factor": round(float(np.exp(np.quantile(size, 0.9))), 3),
        "bias_factor": round(float(np.exp(np.median(errors))), 3),
        "covered_pct": round(covered_pct, 1),
    }


def ratio_reaches(table: FileEquations, errors: Floats) -> tuple[float, float]:
    """The factor, in log, that holds 95 % of the ratios of two models on a board: of one family, of two.

    What is wrong about the board alike for every model cancels in a ratio.
    """
    first, second = np.triu_indices(len(errors), 1)
    families = np.array(table.families)
    related = families[first] == families[second]
    size = np.abs(errors[first] - errors[second])
    return float(np.quantile(size[related], 0.95)), float(np.quantile(size[~related], 0.95))


def calibrate(tables: Sequence[FileEquations], *, today: str, say: Any = lambda text: None) -> dict[str, Any]:
    """Every fit with its errors, as ``calibration.json`` holds it."""
    fits = []
    kept = [t for t in tables if len(t.us) >= FEWEST_MODELS]
    for table in kept:
        errors = held_out(table)
        row = _row([table], solve(table.ideal, table.us), errors, covered(table, errors))
        fits.append(row)
        say(f"{table.source.plain_name}: {_describe(row['held_out'])}")
    carried = {}
    for way in ("eager", "compile"):
        group = _newest([t for t in kept if t.source.regime == way])
        if len({t.source.board.key for t in group}) > 1:
            carried[way] = _carried(group, say)
    return {"schema": 1, "date": today, "fits": fits, "carried": carried}


def _newest(tables: Sequence[FileEquations]) -> list[FileEquations]:
    """One table per board: autocast, channels first, of the newest torch."""
    best: dict[str, FileEquations] = {}
    for table in sorted(tables, key=lambda t: [int(x) for x in t.source.torch.split(".")]):
        s = table.source
        if s.layout == "nchw" and s.autocast and s.dtype == "float16":
            best[s.board.key] = table
    return list(best.values())


def joint(group: Sequence[FileEquations]) -> tuple[Floats, Floats]:
    """Times-the-ideal of several boards together, and how much slower than that each board is.

    A board that stays behind its specification in everything, for its power say, would bend the rates of
    single kinds if it had no factor of its own. The median board's factor is 1.
    """
    slower = np.ones(len(group))
    found = np.zeros(len(COLUMNS))
    for _ in range(4):
        found = solve(
            np.vstack([t.ideal * factor for t, factor in zip(group, slower, strict=True)]),
            np.concatenate([t.us for t in group]),
        )
        slower = np.array([np.exp(np.median(np.log(t.us / (t.ideal @ found)))) for t in group])
        slower /= np.median(slower)
    return found, slower


def _carried(group: Sequence[FileEquations], say: Any) -> dict[str, Any]:
    """One fit of several boards, its error that of each board predicted from the others."""
    group = [_as_carried(table) for table in group]
    errors: dict[str, Floats] = {}
    for table in group:
        found, _ = joint([t for t in group if t is not table])
        errors[table.source.board.key] = np.log(table.ideal @ found / table.us)
    boards = {}
    for key, own in errors.items():
        lo, hi, _ = _carried_reach([e for k, e in errors.items() if k != key])
        boards[key] = error_row(own, float(100 * np.mean((-own >= lo) & (-own <= hi))))
        say(f"{key} from the others, {group[0].source.regime}: {_describe(boards[key])}")
    lo, hi, board_reach = _carried_reach(list(errors.values()))
    found, slower = joint(group)
    every = np.concatenate(list(errors.values()))
    row = _row(group, found, every, float(np.mean([b["covered_pct"] for b in boards.values()])))
    for name in ("gpu", "torch", "cuda"):
        row.pop(name)
    return {
        "gpus": [t.source.board.key for t in group],
        **row,
        "lo": round(lo, 3),
        "hi": round(hi, 3),
        "board_reach": round(board_reach, 3),
        "slower": {t.source.board.key: round(float(f), 3) for t, f in zip(group, slower, strict=True)},
        "boards": boards,
    }


def _as_carried(table: FileEquations) -> FileEquations:
    """The table with multiply-adds at the peak that rates are carried by."""
    board, peak = table.source.board, rates(table.source.board, table.source.dtype).matrix
    factor = np.array([peak / used_matrix(board, peak) if what == "macs" else 1.0 for _, what in COLUMNS])
    return dataclasses.replace(table, ideal=table.ideal * factor)


def _carried_reach(errors: Sequence[Floats]) -> tuple[float, float, float]:
    """The 95 % interval of log(measured / predicted) on a board that nobody measured, and the board's part.

    What a board as a whole is off by, with a prior for as few boards as there are, beside what models are off
    by on one board.
    """
    offsets = [float(np.median(e)) for e in errors]
    prior = PRIOR_RECORDS * TRANSFER_SPREAD**2
    square = (prior + sum(o * o for o in offsets)) / (PRIOR_RECORDS + len(offsets))
    board = Z95 * float(np.sqrt(square))
    lo, hi = reach(np.concatenate([e - o for e, o in zip(errors, offsets, strict=True)]))
    return -float(np.hypot(lo, board)), float(np.hypot(hi, board)), board


def _row(group: Sequence[FileEquations], found: Floats, errors: Floats, covered_pct: float) -> dict[str, Any]:
    source, families = group[0].source, tuple(f for t in group for f in t.families)
    ends = np.cumsum([len(t.us) for t in group])[:-1]
    parts = np.split(errors, ends)
    reaches = [ratio_reaches(*pair) for pair in zip(group, parts, strict=True)]
    family_ratio, other_ratio = np.max(reaches, axis=0)
    lo, hi = reach(errors)

    def column(kind_of_column: str) -> dict[str, float]:
        pairs = zip(COLUMNS, found, strict=True)
        return {kind: round(float(v), 3) for (kind, what), v in pairs if what == kind_of_column}

    return {
        "gpu": source.board.key,
        "regime": source.regime,
        "layout": source.layout,
        "autocast": source.autocast,
        "dtype": source.dtype,
        "torch": source.torch,
        "cuda": source.cuda,
        "models": len(errors) // len(group),
        "families": len(set(families)),
        "macs": column("macs"),
        "moved": column("moved"),
        "lo": round(lo, 3),
        "hi": round(hi, 3),
        "family_ratio": round(float(family_ratio), 3),
        "other_ratio": round(float(other_ratio), 3),
        "held_out": error_row(errors, covered_pct),
    }


def _describe(row: Mapping[str, Any]) -> str:
    return (
        f"{row['models']} models, median error {row['median_pct']:.1f} %, 90 % within "
        f"{row['p90_factor']:.2f}x, bias {row['bias_factor']:.2f}x, "
        f"{row['covered_pct']:.0f} % in the interval"
    )


@click.command("calibrate")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--counts", type=click.Path(path_type=Path), help="File of counts to keep and to go on from.")
@click.option("--per-family", type=click.IntRange(1), default=PER_FAMILY, show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(__file__).resolve().parent.parent / "data" / "calibration.json",
    help="Where the fits go.  [default: the package's own file]",
)
def main(folder: Path, counts: Path | None, per_family: int, output: Path) -> None:
    """Fit the rates of boards on a FOLDER of throughputs of timm's models.

    Beside the file of fits, ``published.csv`` gets the figures that are shown beside our models.
    """
    start = time.monotonic()
    files = read_folder(folder)
    wanted = {(t.model, t.side) for timed in files.values() for t in timed}

    def say(text: str) -> None:
        click.echo(text, err=True)

    counted = count_models(wanted, counts, per_family=per_family, say=say)
    families = Counter(c.family for c in counted)
    say(f"{len(counted)} models of {len(families)} families counted in {time.monotonic() - start:.0f} s")
    tables = [table_of(source, timed, counted) for source, timed in files.items()]
    found = calibrate(tables, today=datetime.date.today().isoformat(), say=say)
    found = {"source": SOURCE, **found}
    output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    shown = output.with_name("published.csv")
    say(f"results: {output} and {shown} ({write_published(files, shown)} figures)")


def write_published(files: Mapping[FileSource, Sequence[Timed]], path: Path) -> int:
    """Write the figures of `SHOWN` that stand in the files, and return how many there are."""
    fields = [f.name for f in dataclasses.fields(PublishedFigure)]
    rows = []
    for s, timed in files.items():
        for t in timed:
            if t.model not in SHOWN or t.side != 224:
                continue
            figure = PublishedFigure(
                model=t.model,
                gpu=s.board.key,
                image=t.side,
                batch=t.batch,
                regime=s.regime,
                dtype=s.dtype,
                amp=s.autocast,
                layout=s.layout,
                images_per_s=round(1e6 / t.us, 1),
                software=f"torch {s.torch}, CUDA {s.cuda}",
                source=SOURCE + s.path.name,
            )
            rows.append(dataclasses.asdict(figure) | {"amp": "yes" if s.autocast else "no"})
    rows.sort(key=lambda row: (row["gpu"], row["model"], row["source"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)
