"""Store: records on disk, append-only JSON Lines, and everything that reads them back."""

from bratune.store.lines import (
    SAMPLES_SUFFIX,
    Batch,
    Store,
    batches,
    locked,
    mend_end,
    read,
    read_fields,
    read_records,
    record_files,
)
from bratune.store.pooled import pool, pooled

__all__ = [
    "SAMPLES_SUFFIX",
    "Batch",
    "Store",
    "batches",
    "locked",
    "mend_end",
    "pool",
    "pooled",
    "read",
    "read_fields",
    "read_records",
    "record_files",
]
