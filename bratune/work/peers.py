"""Peers: models of timm of about the work or accuracy of BiFormer-T and -S, to stand beside them."""

from __future__ import annotations

from typing import Any

from bratune.errors import UnknownNameError

__all__ = ["PEERS", "import_timm", "peer_name"]

# By the short names that users type.
PEERS = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "convnext_tiny": "convnext_tiny",
    "pvt_v2_b2": "pvt_v2_b2",
    "maxvit_tiny": "maxvit_tiny_rw_224",
    "deit_small": "deit_small_patch16_224",
    "resnet50": "resnet50",
}


def import_timm() -> Any:
    """timm; raises `MissingPackageError` where it is not installed."""
    from bratune.kernels.timm_import import import_timm

    return import_timm("measuring peers")


def peer_name(name: str) -> str:
    """The name that timm knows a model by, of a short name of `PEERS` or any name of timm.

    Raises:
        UnknownNameError: timm has no such model.
        MissingPackageError: timm is not installed.
    """
    full = PEERS.get(name, name)
    if not import_timm().is_model(full):
        raise UnknownNameError("peer", name, PEERS)
    return full
