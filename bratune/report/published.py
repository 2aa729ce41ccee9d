"""Published: somebody else's numbers, read from their files as evidence ``published``.

timm publishes one CSV per GPU and software version; what it was measured with stands in the file's name only.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from bratune import gpus
from bratune.errors import StoreError, UnknownNameError
from bratune.record import Record

__all__ = ["read_timm"]

NEEDED = ("model", "infer_samples_per_sec", "infer_batch_size", "infer_img_size")


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
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"the published table {path} cannot be read: {error}") from None
    if not rows or any(name not in rows[0] for name in NEEDED):
        raise StoreError(f"{path} is no timm inference table: it needs the columns {', '.join(NEEDED)}")
    how = _from_name(path.name)
    records, gmacs = [], {}
    for number, row in enumerate(rows, start=2):
        try:
            rate, batch = float(row["infer_samples_per_sec"]), int(float(row["infer_batch_size"]))
            side = int(float(row["infer_img_size"]))
        except ValueError as error:
            raise StoreError(f"{path}, line {number}: {error}") from None
        if rate <= 0 or batch <= 0:
            continue
        name = row["model"].partition(".")[0]
        if row.get("infer_gmacs"):
            gmacs[name] = float(row["infer_gmacs"])
        records.append(
            Record(
                cell_id=f"timm:{path.name}:{row['model']}:{side}:{batch}",
                evidence="published",
                reason=f"timm results, {path.name}",
                model=name,
                part="model",
                form="timm",
                batch=batch,
                image_height=side,
                image_width=side,
                direction="fwd",
                median_ms=1e3 * batch / rate,
                images_per_s=rate,
                **how,
            )
        )
    return records, gmacs


def _from_name(name: str) -> dict[str, Any]:
    """GPU, precision, layout and versions from the name of the file; what is not there stays empty."""
    words = name.removesuffix(".csv").lower().split("-")
    found: dict[str, Any] = {"regime": "compile" if "dynamo" in words else "eager"}
    if "amp" in words:
        found |= {"amp": True, "dtype": "float16"}
    elif "fp32" in words:
        found |= {"amp": False, "dtype": "float32"}
    found["layout"] = "nhwc" if "nhwc" in words else "nchw"
    for word in words:
        if match := re.fullmatch(r"pt(\d)(\d+?)(\d)?", word):
            found["torch"] = ".".join(part for part in match.groups() if part)
        elif match := re.fullmatch(r"cu(\d\d)(\d)", word):
            found["cuda"] = f"{match[1]}.{match[2]}"
    for length in (1, 2, 3):
        try:
            board = gpus.resolve("-".join(words[-length:]))
        except UnknownNameError:
            continue
        return found | {"gpu_key": board.key, "gpu_name": board.name}
    return found | {"gpu_key": words[-1], "gpu_name": words[-1]}
