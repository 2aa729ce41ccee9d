"""timm, imported where it is used, with what to do where it cannot be."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from bratune.errors import BratuneError, MissingPackageError

__all__ = ["import_timm"]


def import_timm(purpose: str) -> Any:
    """The package timm.

    Args:
        purpose: What needs it, as the subject of a sentence.

    Raises:
        MissingPackageError: timm, or something that it needs, is not installed.
        BratuneError: the torchvision that timm imports was built for another torch.
    """
    try:
        import timm
    except ImportError as error:
        if error.name in (None, "timm"):
            raise MissingPackageError("timm", purpose, extra="timm") from None
        raise MissingPackageError(str(error.name), f"timm, which is for {purpose},") from None
    except (RuntimeError, OSError) as error:
        # torchvision registers its operators when it is imported, and they exist for one torch alone.
        import torch

        text = str(error).strip().splitlines()[0]
        raise BratuneError(
            f"{purpose} needs timm, and timm needs torchvision; torchvision {_version('torchvision')} does "
            f"not fit torch {torch.__version__} here ({text}); the torchvision that is released for this "
            "torch, from the same source, would work"
        ) from None
    return timm


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
