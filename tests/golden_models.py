"""Golden models of the official implementation, a small model beside them, and how far results are apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import BiFormer, BiFormerSTL, NCHWBiFormerSTL

GOLDEN = Path(__file__).resolve().parent / "golden"
CLASSES: dict[str, type[Backbone]] = {
    "BiFormer": BiFormer,
    "BiFormer_mm": BiFormer,
    "BiFormerSTL": BiFormerSTL,
    "nchwBiFormerSTL": NCHWBiFormerSTL,
}


def golden_runs() -> list[Any]:
    runs = []
    for path in sorted(GOLDEN.glob("model_*.npz")):
        with np.load(path) as file:
            tags = json.loads(str(file["meta"]))["runs"]
        marks = [pytest.mark.slow] if "tinydepth" in path.stem else []
        runs += [pytest.param(path, tag, id=f"{path.stem}-{tag}", marks=marks) for tag in tags]
    return runs


def load(path: Path, tag: str, dtype: torch.dtype) -> tuple[Backbone, Tensor, list[Tensor]]:
    """A golden model, its images, and the official outputs."""
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        arguments = dict(meta["ctor"])
        if "norm_layer" in arguments:
            arguments["norm_layer"] = getattr(nn, arguments["norm_layer"])
        dense = meta["cls"] == "BiFormer_mm"
        model = CLASSES[meta["cls"]](**arguments, features_only=dense).to(dtype)
        model.load_state_dict(
            {n[3:]: torch.from_numpy(np.asarray(file[n])) for n in file.files if n.startswith("sd/")}
        )
        names = [f"{tag}/feat{i}" for i in range(4)] if dense else [f"{tag}/logits"]
        return (
            model.eval(),
            torch.from_numpy(file[f"{tag}/x"]).to(dtype),
            [torch.from_numpy(file[name]).double() for name in names],
        )


def tiny(**arguments: Any) -> BiFormer:
    sizes: dict[str, Any] = {"embed_dim": (32, 32, 32, 32), "head_dim": 32, "n_win": 2, "num_classes": 5}
    return BiFormer(
        **{
            **sizes,
            "depth": (1, 1, 1, 1),
            "topks": (1, 2, 4, -2),
            "kv_downsample_mode": "identity",
            **arguments,
        }
    )


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
