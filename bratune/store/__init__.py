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

__all__ = [
    "SAMPLES_SUFFIX",
    "Batch",
    "Store",
    "batches",
    "locked",
    "mend_end",
    "read",
    "read_fields",
    "read_records",
    "record_files",
]
