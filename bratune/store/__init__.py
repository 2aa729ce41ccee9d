"""Store: records on disk, append-only JSON Lines, and everything that reads them back."""

from bratune.store.lines import (
    SAMPLES_SUFFIX,
    Store,
    batches,
    cut_torn_line,
    locked,
    one_by_one,
    read,
    read_fields,
    read_records,
    record_files,
)

__all__ = [
    "SAMPLES_SUFFIX",
    "Store",
    "batches",
    "cut_torn_line",
    "locked",
    "one_by_one",
    "read",
    "read_fields",
    "read_records",
    "record_files",
]
