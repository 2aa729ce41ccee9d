"""Public: how far real models stay behind a board's limits, from measurements that others published.

``bratune/data/calibration.json`` holds, for every kind of operation (`bratune.predict.counted.KINDS`), how
many times the ideal time its multiply-adds (at the board's matrix peak) and its bytes (at the bandwidth of
the memory) take, fitted by ``python -m bratune.studies calibrate`` on throughputs of hundreds of models. A
board that was measured has fits of its own; every other one gets the fit of all of them together, carried by
its specification. Both come with the error that they had on models, or boards, that were held out.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bratune.gpus import GPU
from bratune.predict.roofline import Rates

__all__ = [
    "HeldOut",
    "PublicRates",
    "PublishedFigure",
    "calibration_fits",
    "carried_fits",
    "public_rates",
    "published_figures",
    "used_matrix",
]

# Under autocast these compute and write in float32; without it they move what an elementwise kernel moves.
_WIDENED = ("layer-norm", "softmax")
# What an interval is widened by where nothing of the kind was published, as factors at 95 %.
WITHOUT_AUTOCAST = math.log(1.2)
OTHER_LAYOUT = math.log(1.15)
FULL_WIDTH = math.log(1.3)
BACKWARD = math.log(1.3)
OTHER_MAKER = math.log(1.5)
# Operations per clock and multiprocessor of the matrix units that the rates of several boards are brought to.
# Units of twice that rate are used 1.4 times as well: the square root predicts the one board that has them
# from the others with half the error, with compiled models (docs/predict.md).
PER_CLOCK = 512.0
# A board with more than this for each multiprocessor is unlike every board that was measured: operations per
# clock, and bytes per second and Hz.
FARTHEST_PER_CLOCK = 1100.0
FARTHEST_BYTES = 8.0
FAR = math.log(1.6)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The error on models (or a board) that the fit had not seen.

    Attributes:
        models: How many.
        median_pct: Median of the absolute error.
        p90_factor: 90 % of the models are within this factor.
        bias_factor: Predicted over measured, median.
        covered_pct: Models within the 95 % interval.
    """

    models: int
    median_pct: float
    p90_factor: float
    bias_factor: float
    covered_pct: float


@dataclass(frozen=True, kw_only=True)
class PublicRates:
    """Rates of one board, for one way to run.

    Attributes:
        macs: Times the ideal time of multiply-adds, by kind.
        moved: Times the ideal time of bytes, by kind.
        matrix: Multiply-adds that the board's specification promises, per second.
        memory: Bytes per second that it promises.
        lo: Logarithm of measured over predicted, lower end of the 95 % interval (negative).
        hi: Its upper end.
        family_ratio: Logarithm of the factor that holds 95 % of the ratios of two related models.
        other_ratio: The same for two models of different families.
        basis: What the rates rest on, in words.
        own: Whether this very board was measured.
    """

    macs: Mapping[str, float]
    moved: Mapping[str, float]
    matrix: float
    memory: float
    lo: float
    hi: float
    family_ratio: float
    other_ratio: float
    basis: str
    own: bool

    def us(self, kind: str, macs: float, moved: float) -> float:
        """Microseconds of an operation that fills the board."""
        return self.macs_us(kind, macs) + self.moved_us(kind, moved)

    def macs_us(self, kind: str, macs: float) -> float:
        """Microseconds of multiply-adds of a kind."""
        return self.macs.get(kind, 1.0) * macs / self.matrix * 1e6 if macs else 0.0

    def moved_us(self, kind: str, moved: float) -> float:
        """Microseconds of bytes of a kind."""
        return self.moved.get(kind, 1.0) * moved / self.memory * 1e6


@functools.cache
def _data() -> Mapping[str, Any]:
    text = importlib.resources.files("bratune.data").joinpath("calibration.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def calibration_fits() -> tuple[Mapping[str, Any], ...]:
    """Every fit of a board, as in the file, with its error on held-out families."""
    return tuple(_data()["fits"])


def carried_fits() -> Mapping[str, Mapping[str, Any]]:
    """By regime, the fit of all boards together, with its error on each board that was held out."""
    found: Mapping[str, Mapping[str, Any]] = _data()["carried"]
    return found


def used_matrix(board: GPU, matrix: float) -> float:
    """The matrix peak that rates of several boards are carried by, in operations per second.

    Args:
        board: The board.
        matrix: Its peak for the data type.
    """
    clocks = (board.sm_count or 1) * (board.boost_mhz or 1.0) * 1e6
    return matrix / math.sqrt(max(1.0, matrix / clocks / PER_CLOCK))


def _far(board: GPU, peak: Rates) -> bool:
    clocks = peak.sm_count * (board.boost_mhz or 1.0) * 1e6
    return peak.matrix / clocks > FARTHEST_PER_CLOCK or peak.memory / clocks > FARTHEST_BYTES


def public_rates(
    board: GPU,
    peak: Rates,
    *,
    regime: str = "eager",
    layout: str = "nchw",
    amp: bool = False,
    dtype: str = "",
    backward: bool = False,
) -> PublicRates | None:
    """The rates of a board from public measurements.

    Args:
        board: A GPU; others have none.
        peak: Its peaks for the data type (`bratune.predict.roofline.rates`).
        regime: ``graph`` has the kernels of ``eager``.
        layout: ``nchw`` or ``nhwc``.
        amp: Autocast, which every published eager measurement had.
        dtype: Long name; float32 is carried from half precision by the two peaks.
        backward: Whether gradients are computed, which is carried from forward passes.

    Returns:
        None for a CPU and for data types that nobody measured anything like.
    """
    if board.architecture == "CPU" or dtype == "float64":
        return None
    way = "compile" if regime == "compile" else "eager"
    own = [f for f in _data()["fits"] if f["gpu"] == board.key and f["regime"] == way]
    same = [f for f in own if f["layout"] == layout and f["autocast"] == amp]
    same = same or [f for f in own if f["layout"] == layout] or own
    found = max(same, key=lambda f: f["torch"]) if same else _data()["carried"][way]
    widen = []
    if not same or found["layout"] != layout:
        widen.append(OTHER_LAYOUT)
    plain = found["autocast"] and not amp
    if plain:
        widen.append(WITHOUT_AUTOCAST)
    if dtype == "float32":
        widen.append(FULL_WIDTH)
    if backward:
        widen.append(BACKWARD)
    if not same and _far(board, peak):
        widen.append(FAR)
    if board.capability == (0, 0):
        widen.append(OTHER_MAKER)
    macs, moved = dict(found["macs"]), dict(found["moved"])
    if plain:
        for kind in _WIDENED:
            moved[kind] = min(moved[kind], moved["elementwise"] if way == "eager" else moved[kind])
    if same:
        basis = (
            f"rates of {found['models']} models of timm on this board ({way}, {found['layout']}, "
            f"torch {found['torch']}, fitted {_data()['date']})"
        )
    else:
        basis = (
            f"rates of timm's models on {', '.join(found['gpus'])} ({way}, fitted {_data()['date']}), "
            "carried over by specifications" + (", which are unlike theirs" if _far(board, peak) else "")
        )
    return PublicRates(
        macs=macs,
        moved=moved,
        matrix=(peak.matrix if same else used_matrix(board, peak.matrix)) / 2,
        memory=peak.memory,
        lo=-math.hypot(found["lo"], *widen),
        hi=math.hypot(found["hi"], *widen),
        family_ratio=found["family_ratio"],
        other_ratio=found["other_ratio"],
        basis=basis,
        own=bool(same),
    )


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A throughput that somebody else published.

    Attributes:
        model: As its publisher names it.
        gpu: Key of the board.
        image: Side of the square image.
        batch: Images per call.
        regime: ``eager`` or ``compile``.
        dtype: Long name of the data type.
        amp: Whether under autocast.
        layout: ``nchw`` or ``nhwc``.
        images_per_s: The figure.
        software: Versions that the publisher names.
        source: Where it stands.
    """

    model: str
    gpu: str
    image: int
    batch: int
    regime: str
    dtype: str
    amp: bool
    layout: str
    images_per_s: float
    software: str
    source: str


@functools.cache
def published_figures() -> tuple[PublishedFigure, ...]:
    """The selected published figures that ship with the package (``bratune/data/published.csv``)."""
    text = importlib.resources.files("bratune.data").joinpath("published.csv").read_text("utf-8")
    return tuple(
        PublishedFigure(
            model=row["model"],
            gpu=row["gpu"],
            image=int(row["image"]),
            batch=int(row["batch"]),
            regime=row["regime"],
            dtype=row["dtype"],
            amp=row["amp"] == "yes",
            layout=row["layout"],
            images_per_s=float(row["images_per_s"]),
            software=row["software"],
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )
