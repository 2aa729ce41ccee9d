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
from bratune.store.pooled import pool, pool_each, pooled
from bratune.store.rows import Rows, read_rows

__all__ = [
    "SAMPLES_SUFFIX",
    "Batch",
    "Rows",
    "Store",
    "batches",
    "locked",
    "mend_end",
    "pool",
    "pool_each",
    "pooled",
    "read",
    "read_fields",
    "read_records",
    "read_rows",
    "record_files",
]
