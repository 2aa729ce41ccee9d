"""Published: somebody else's numbers, read from their files as evidence ``published``.

timm publishes one CSV per GPU and software version; what it was measured with stands in the file's name only.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bratune import gpus
from bratune.errors import StoreError, UnknownNameError
from bratune.record import Record
from bratune.text import one_line

__all__ = ["TimmLine", "read_timm", "timm_conditions", "timm_lines"]

NEEDED = ("model", "infer_samples_per_sec", "infer_batch_size", "infer_img_size")
# What the second word of a file's name says: autocast, and the dtype.
_PRECISIONS = {
    "amp": (True, "float16"),
    "amp_bf16": (True, "bfloat16"),
    "bf16": (False, "bfloat16"),
    "fp16": (False, "float16"),
    "fp32": (False, "float32"),
}


@dataclass(frozen=True, kw_only=True)
class TimmLine:
    """A model of a timm inference benchmark.

    Attributes:
        model: Its name, with the tag of its weights.
        side: Of its square images, in pixels.
        batch: Images per call.
        rate: Images per second.
        gmacs: 10^9 multiply-adds per image; None where the publisher did not count them.
    """

    model: str
    side: int
    batch: int
    rate: float
    gmacs: float | None


def timm_lines(path: Path) -> Iterator[TimmLine]:
    """The models of a timm inference benchmark CSV that were timed.

    Raises:
        StoreError: the file is not such a CSV.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"the published table {path} cannot be read: {error}") from None
    if not rows or any(name not in rows[0] for name in NEEDED):
        raise StoreError(f"{path} is no timm inference table: it needs the columns {', '.join(NEEDED)}")
    for number, row in enumerate(rows, start=2):
        if not all(row[name] for name in NEEDED):  # a model that failed
            continue
        try:
            line = TimmLine(
                model=one_line(row["model"]),
                side=int(float(row["infer_img_size"])),
                batch=int(float(row["infer_batch_size"])),
                rate=float(row["infer_samples_per_sec"]),
                gmacs=float(row["infer_gmacs"]) if row.get("infer_gmacs") else None,
            )
        except (OverflowError, ValueError) as error:
            raise StoreError(f"{path}, line {number}: {error}") from None
        if not all(map(math.isfinite, (line.rate, line.gmacs or 0.0))):
            raise StoreError(f"{path}, line {number}: a rate or a number of multiply-adds is not finite")
        if line.rate > 0 and line.batch > 0 and line.side > 0:
            yield line


def read_timm(path: Path) -> tuple[list[Record], dict[str, float]]:
    """The rows of a timm inference benchmark CSV.

    Args:
        path: E.g. ``benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv``: precision, layout, torch, CUDA and
            GPU are read from the name.

    Returns:
        One record per model, and the models' 10^9 multiply-adds per image.

    Raises:
        StoreError: the file is not such a CSV.
    """
    how = timm_conditions(path.name)
    board = how.pop("board", None)
    unknown = how.pop("gpu_key")
    records, gmacs = [], {}
    for line in timm_lines(path):
        name = line.model.partition(".")[0]
        if line.gmacs:
            gmacs[name] = line.gmacs
        records.append(
            Record(
                cell_id=f"timm:{path.name}:{line.model}:{line.side}:{line.batch}",
                evidence="published",
                reason=f"timm results, {path.name}",
                gpu_key=board.key if board else unknown,
                gpu_name=board.name if board else unknown,
                model=name,
                part="model",
                form="timm",
                batch=line.batch,
                image_height=line.side,
                image_width=line.side,
                direction="fwd",
                median_ms=1e3 * line.batch / line.rate,
                images_per_s=line.rate,
                **how,
            )
        )
    return records, gmacs


def timm_conditions(name: str) -> dict[str, Any]:
    """What the name of a timm file says of its rows; what is not there is left out.

    Returns:
        ``regime``, ``layout``, ``gpu_key``, and where they are known ``amp``, ``dtype``, ``torch``, ``cuda``
        and ``board``, that of the table.
    """
    words = name.lower().removesuffix(".csv").split("-")
    found: dict[str, Any] = {"regime": "compile" if "dynamo" in words else "eager"}
    words = [word for word in words if word != "dynamo"]
    found["layout"] = "nhwc" if "nhwc" in words else "nchw"
    for word in words:
        if word in _PRECISIONS:
            found["amp"], found["dtype"] = _PRECISIONS[word]
        elif match := re.fullmatch(r"pt(\d)(\d+?)(\d)?", word):
            found["torch"] = ".".join(part for part in match.groups() if part)
        elif match := re.fullmatch(r"cu(\d\d)(\d)", word):
            found["cuda"] = f"{match[1]}.{match[2]}"
    for length in (1, 2, 3):
        try:
            board = gpus.resolve("-".join(words[-length:]).replace("_", "-"))
        except UnknownNameError:
            continue
        return found | {"gpu_key": board.key, "board": board}
    return found | {"gpu_key": words[-1]}
