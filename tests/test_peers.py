"""Peers through a stand-in for timm: the same meter, a row like any other, plain words where it is absent."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bratune.errors import MissingPackageError, UnknownNameError
from bratune.machine import detect
from bratune.measure.settings import MeterSettings
from bratune.profile import peers
from bratune.profile.request import Request, make_request
from bratune.report.point_infos import peers as peer_points
from bratune.store import Store

SETTINGS = MeterSettings(min_time_s=0.0, warmup_s=0.0, min_samples=3, max_samples=3, timeout_s=5.0)


class Net(nn.Module):
    """A classifier that knows the size of its image, as windowed models do."""

    def __init__(self, img_size: tuple[int, int] = (224, 224)) -> None:
        super().__init__()
        self.img_size = img_size
        self.conv = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[2:]) != tuple(self.img_size):
            raise ValueError(f"made for {self.img_size}")
        out: torch.Tensor = self.head(self.conv(x).mean((2, 3)))
        return out


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("timm")
    known = {"swin_tiny_patch4_window7_224": Net, "resnet50": Net}
    module.is_model = lambda name: name in known
    module.create_model = lambda name, pretrained, **kwargs: known[name](**kwargs)
    module.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=True)
    module.model_entrypoint = lambda name: known[name]
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def request(**more: Any) -> Request:
    return make_request(detect("cpu"), image=(64, 64), batches=(2,), **more)


def test_a_peer_is_measured_like_a_model_of_ours(timm: Any, tmp_path: Any) -> None:
    store = Store(tmp_path / "r.jsonl")
    cells = peers.peer_cells(["swin_tiny"], request())
    (row,) = peers.measure_peers(cells, detect("cpu"), SETTINGS, store=store, run_id="r1")
    assert (row.outcome, row.part, row.backend) == ("measured", "model", "timm")
    assert row.model == "swin_tiny_patch4_window7_224"
    assert (row.batch, row.image_height, row.n_samples, row.run_id) == (2, 64, 3, "r1")
    assert row.median_ms is not None
    assert row.images_per_s == pytest.approx(2e3 / row.median_ms)
    assert store.records() == [row]
    macs = 2 * (16 * 16 * 8 * 48 + 8 * 10)
    assert row.tflops_s == pytest.approx(2 * macs / row.median_ms / 1e9)


def test_its_work_per_image_places_it_on_the_axis(timm: Any) -> None:
    cells = peers.peer_cells(["resnet50"], request())
    rows = list(peers.measure_peers(cells, detect("cpu"), SETTINGS))
    (point,) = peer_points(rows, {})
    assert point.gmacs == pytest.approx((16 * 16 * 8 * 48 + 8 * 10) / 1e9)


def test_training_is_measured_where_it_is_asked_for(timm: Any) -> None:
    cells = peers.peer_cells(["resnet50"], request(direction="fwd-bwd"))
    (row,) = peers.measure_peers(cells, detect("cpu"), SETTINGS)
    assert (row.outcome, row.direction, row.tflops_s) == ("measured", "fwd-bwd", None)


def test_a_model_that_fails_is_a_row_with_the_reason(timm: Any) -> None:
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=False)
    timm.model_entrypoint = lambda name: lambda: None
    cells = peers.peer_cells(["resnet50"], request())
    (row,) = peers.measure_peers(cells, detect("cpu"), SETTINGS)
    assert row.outcome == "error"
    assert row.reason == "ValueError: made for (224, 224)"


def test_an_unknown_peer_lists_the_usual_ones(timm: Any) -> None:
    with pytest.raises(UnknownNameError, match="swin_tiny, convnext_tiny"):
        peers.peer_cells(["swin_tinny"], request())


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_what_is_missing_is_named_with_the_command(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "timm":
        monkeypatch.setitem(sys.modules, "timm", None)
    else:

        class Broken:
            def find_spec(self, name: str, *_: Any) -> None:
                if name == "timm":
                    raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

        monkeypatch.delitem(sys.modules, "timm", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=f"{missing}.*pip install"):
        peers.peer_cells(["swin_tiny"], request())
