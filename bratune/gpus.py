"""GPUs that are known by name: the table behind ``--gpu a100`` and ``bratune list gpus``.

The table is ``bratune/data/gpus.csv``; an empty cell means that no source was found. What a device
reports about itself always wins over the table.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import re
from dataclasses import dataclass

from bratune.errors import UnknownNameError

__all__ = ["GPU", "match", "resolve", "slug", "table"]


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One board. Rates are dense peaks; None where no source was found."""

    key: str
    name_pattern: str
    architecture: str
    compute_capability: str
    sm_count: int | None
    boost_mhz: float | None
    memory_gib: float | None
    memory_gbps: float | None
    l2_mib: float | None
    smem_per_sm_kib: float | None
    smem_per_block_optin_kib: float | None
    registers_per_sm: int | None
    max_warps_per_sm: int | None
    fp32_tflops: float | None
    fp16_tensor_tflops: float | None
    bf16_tensor_tflops: float | None
    tf32_tensor_tflops: float | None
    fp64_tflops: float | None
    tdp_w: float | None
    note: str


_INTEGERS = {"sm_count", "registers_per_sm", "max_warps_per_sm"}
_TEXTS = {"key", "name_pattern", "architecture", "compute_capability", "note"}


@functools.cache
def table() -> tuple[GPU, ...]:
    """Every known board, in the order of the table."""
    text = importlib.resources.files("bratune.data").joinpath("gpus.csv").read_text("utf-8")
    boards = []
    for row in csv.DictReader(text.splitlines()):
        row["name_pattern"] = row["nvml_name_pattern"]
        values: dict[str, object] = {}
        for field in GPU.__dataclass_fields__:
            cell = (row.get(field) or "").strip()
            if field in _TEXTS:
                values[field] = cell
            elif not cell:
                values[field] = None
            else:
                values[field] = int(float(cell)) if field in _INTEGERS else float(cell)
        boards.append(GPU(**values))  # type: ignore[arg-type]
    return tuple(boards)


def resolve(key: str) -> GPU:
    """The board of a short key; raises `UnknownNameError`."""
    for board in table():
        if board.key == key.strip().lower():
            return board
    raise UnknownNameError("GPU", key, (board.key for board in table()))


def match(name: str, *, memory_gib: float = 0.0, sm_count: int = 0) -> GPU | None:
    """The board that a device's own name, memory and SM count point to; None when unsure."""
    found = [board for board in table() if re.search(board.name_pattern, name)]
    if sm_count:
        found = [b for b in found if b.sm_count in (None, sm_count)] or []
    if memory_gib and len(found) > 1:
        found.sort(key=lambda b: abs((b.memory_gib or 0.0) - memory_gib))
    return found[0] if found else None


def slug(name: str) -> str:
    """A short key made from the name of a board that the table does not have."""
    text = re.sub(r"^(nvidia|amd)\s+", "", name.strip().lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "gpu"
