"""Peers through a stand-in for timm: the same meter, a row like any other, plain words where it is absent."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bratune.errors import BratuneError, MissingPackageError, UnknownNameError
from bratune.machine import detect
from bratune.measure.settings import MeterSettings
from bratune.profile import peers
from bratune.record import Record
from bratune.report.figures.peers import infos as peer_points
from bratune.store import Store
from bratune.work.request import Request, make_request

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


def test_energy_is_that_of_what_was_timed(timm: Any, compiling: Any) -> None:
    cells = peers.peer_cells(["resnet50"], request(regimes=("compile",)))
    (row,) = peers.measure_peers(cells, detect("cpu"), SETTINGS, meter=compiling)
    assert row.ok
    assert compiling.energy_of == [compiling.made]


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
    with pytest.raises(UnknownNameError, match="runtime, swin_tiny, convnext_tiny"):
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


def test_torchvision_of_another_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(
        BratuneError, match=r"torchvision .* does not fit torch .* \(operator torchvision::nms"
    ):
        peers.peer_cells(["swin_tiny"], request())


def own(**more: Any) -> Request:
    """A request for a small map; the names of our forms need no timm."""
    return make_request(detect("cpu"), image=(112, 112), models=("biformer_tiny",), **more)


def test_our_forms_are_measured_beside_the_peers(tmp_path: Any) -> None:
    store = Store(tmp_path / "r.jsonl")
    cells = peers.peer_cells(["published", "gather", "auto", "runtime"], own(n_win=(7,), batches=(1,)))
    rows = list(peers.measure_peers(cells, detect("cpu"), SETTINGS, store=store))
    assert [(row.backend, row.model, row.outcome) for row in rows[1:]] == [
        (name, "biformer_tiny", "measured") for name in ("gather", "auto", "runtime")
    ]
    # 112 pixels leave a map of 7x7 in stage 3 and 14x14 in stage 2: seven regions tile all three.
    assert rows[0].outcome == "measured", rows[0].reason
    work = [2 * row.median_ms * row.tflops_s for row in rows if row.median_ms and row.tflops_s]
    assert work == pytest.approx([work[0]] * 4)
    assert store.records() == rows


@pytest.mark.parametrize(
    ("more", "reason"), [({"direction": "fwd-bwd"}, "--direction fwd"), ({"amp": True}, "--amp")]
)
def test_the_runtime_says_what_it_cannot_do(more: dict[str, Any], reason: str) -> None:
    (row,) = peers.measure_peers(peers.peer_cells(["runtime"], own(**more)), detect("cpu"), SETTINGS)
    assert row.outcome == "unsupported"
    assert reason in row.reason


def test_pairs_name_the_fastest_form_and_call_it_faster_where_intervals_part(timm: Any) -> None:
    cells = peers.peer_cells(["auto", "runtime", "resnet50"], own(batches=(2,)))
    (slow, fast, peer) = (
        Record.of(cell, detect("cpu"), outcome="measured", median_ms=ms, ci_lo_ms=low, ci_hi_ms=high)
        for cell, ms, low, high in zip(cells, (8, 4, 6), (7.0, 3.0, 5.0), (9.0, 4.5, 7.0), strict=True)
    )
    (line,) = peers.pair_lines([slow, fast, peer])
    assert line == (
        "biformer_tiny (runtime, eager) is 1.50x resnet50 (eager) at batch 2, 95 % 1.11 to 2.33: faster"
    )
    assert "no difference" in peers.pair_lines([fast.replace(ci_hi_ms=5.5), peer])[0]
