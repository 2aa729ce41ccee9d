"""The models under timm's names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import require

from bratune.errors import CheckpointError, MissingPackageError
from bratune.kernels.biformer import BiFormer
from bratune.variant import VARIANTS

SMALL: dict[str, Any] = {
    "depth": (1, 1, 1, 1),
    "embed_dim": (32, 32, 32, 32),
    "qk_dims": (32, 32, 32, 32),
    "topks": (1, 2, 4, -2),
    "n_win": 2,
}


@pytest.fixture(scope="module")
def timm() -> Any:
    module = require("timm")
    importlib.import_module("bratune.kernels.timm_models")
    return module


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_has_a_timm_name(timm: Any, name: str) -> None:
    assert timm.is_model(f"bratune_{name}")


def test_timm_creates_a_model_with_overrides(timm: Any) -> None:
    model = timm.create_model("bratune_biformer_tiny", num_classes=3, cache_dir="unused", **SMALL)
    assert isinstance(model, BiFormer)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_timm_creates_a_backbone(timm: Any) -> None:
    model = timm.create_model("bratune_biformer_tiny", features_only=True, **SMALL)
    assert [m.shape[1] for m in model(torch.zeros(1, 3, 64, 64))] == [32] * 4


def test_timm_loads_a_checkpoint_file(timm: Any, tmp_path: Path) -> None:
    trained = timm.create_model("bratune_biformer_tiny", **SMALL)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model("bratune_biformer_tiny", checkpoint_path=str(tmp_path / "weights.pth"), **SMALL)
    assert torch.equal(model.head.weight, trained.head.weight)


def test_downloads_are_refused_with_what_would_work(timm: Any) -> None:
    with pytest.raises(CheckpointError, match="checkpoint_path=FILE"):
        timm.create_model("bratune_biformer_tiny", pretrained=True)


def test_absent_timm_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "timm" or n.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "bratune.kernels.timm_models", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_NoTimm(), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=r"pip install 'bratune\[timm\]'"):
        importlib.import_module("bratune.kernels.timm_models")


class _NoTimm:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
