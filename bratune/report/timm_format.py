"""timm's columns: whole-model rows as ``benchmark.py`` of pytorch-image-models writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bratune.record import Record
from bratune.tables import to_csv
from bratune.variant import VARIANTS

__all__ = ["timm_csv", "timm_row"]


def timm_row(row: Record) -> dict[str, Any]:
    """One whole-model row under timm's names.

    ``infer_*`` for a forward pass, ``train_*`` for forward and backward (without an optimiser step, which
    timm includes). Step times are in milliseconds per batch; ``param_count`` is in millions, with 1000
    classes.
    """
    side = "train" if row.direction == "fwd-bwd" else "infer"
    variant = VARIANTS.get(row.model)
    size = (
        row.image_height if row.image_height == row.image_width else f"{row.image_height}x{row.image_width}"
    )
    rate = None if row.images_per_s is None else round(row.images_per_s, 2)
    step = None if row.median_ms is None else round(row.median_ms, 3)
    values: dict[str, Any] = {
        "model": row.model,
        f"{side}_samples_per_sec": rate,
        f"{side}_step_time": step,
        f"{side}_batch_size": row.batch,
        f"{side}_img_size": size,
    }
    if side == "infer":
        values["infer_gmacs"] = _gmacs(row)
    values["param_count"] = None if variant is None else round(variant.parameters / 1e6, 2)
    return values | {"backend": row.backend, "dtype": row.dtype}


def timm_csv(records: Sequence[Record]) -> str:
    """The whole-model rows among some records, as CSV; a heading alone where there are none."""
    models = [r for r in records if r.part == "model" and r.form != "mixer"]
    rows = [timm_row(r) for r in models if r.median_ms is not None]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        columns = ["model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size"]
    return to_csv(columns, [[row.get(column) for column in columns] for row in rows])


def _gmacs(row: Record) -> float | None:
    """Multiply-adds per image in 10^9, from the row's rate and time."""
    if row.tflops_s is None or row.median_ms is None or not row.batch:
        return None
    return round(row.tflops_s * 1e3 * row.median_ms / 1e3 / 2 / row.batch, 2)
