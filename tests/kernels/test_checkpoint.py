"""Weights files: what is understood, what is refused, and what the refusal says."""

from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import bratune
from bratune.errors import CheckpointError, UnknownNameError
from bratune.kernels.backbone import Backbone
from bratune.kernels.biformer import BiFormer, BiFormerSTL, NCHWBiFormerSTL
from bratune.kernels.checkpoint import TRUST_VARIABLE, classes_of, convert_stl, load_weights, read_weights

SMALL: dict[str, Any] = {
    "depth": (1, 1, 1, 1),
    "embed_dim": (16, 16, 32, 32),
    "head_dim": 16,
    "num_classes": 5,
    "mlp_ratios": (2, 2, 2, 2),
}


def small(seed: int = 0, **arguments: Any) -> BiFormer:
    torch.manual_seed(seed)
    defaults = {"topks": (1, 2, 4, -2), "n_win": 2, "kv_downsample_mode": "identity"}
    return BiFormer(**{**SMALL, **defaults, **arguments}).eval()


def same(a: Backbone, b: Backbone) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 299, "max_accuracy": 83.8},
        lambda state: {"state_dict": state, "meta": {"epoch": 12}},
        lambda state: {"model": prefixed("module.", state)},
        lambda state: prefixed("_orig_mod.", state),
        lambda state: {"state_dict": prefixed("module.", prefixed("backbone.", state))},
    ],
    ids=["bare", "official", "mm", "distributed", "compiled", "distributed-mm"],
)
def test_every_known_wrapping_is_taken_off(wrap: Any, tmp_path: Path) -> None:
    trained, fresh = small(0), small(1)
    torch.save(wrap(trained.state_dict()), tmp_path / "weights.pth")
    assert not same(trained, fresh)
    loaded = load_weights(fresh, tmp_path / "weights.pth")
    assert same(trained, fresh)
    assert loaded.kept == loaded.ignored == ()


def test_backbone_is_taken_out_of_a_detector(tmp_path: Path) -> None:
    trained, fresh = small(0, features_only=True), small(1, features_only=True)
    state = prefixed("backbone.", trained.state_dict()) | {"neck.conv.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "detector.pth")
    load_weights(fresh, tmp_path / "detector.pth")
    assert same(trained, fresh)


def test_backbone_takes_the_weights_of_a_classifier_and_says_what_it_keeps(tmp_path: Path) -> None:
    trained, fresh = small(0), small(1, features_only=True)
    torch.save({"model": trained.state_dict()}, tmp_path / "weights.pth")
    loaded = load_weights(fresh, tmp_path / "weights.pth")
    name = "stages.0.0.norm1.weight"
    assert torch.equal(fresh.get_parameter(name), trained.get_parameter(name))
    assert set(loaded.kept) == {f"extra_norms.{i}.{n}" for i in range(4) for n in ("weight", "bias")}
    assert "head.weight" in loaded.ignored
    assert "norm.running_mean" in loaded.ignored


def test_averaged_weights_are_taken_when_asked_for(tmp_path: Path) -> None:
    raw, averaged = small(0), small(1)
    torch.save({"model": raw.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "weights.pth")
    model = small(2)
    load_weights(model, tmp_path / "weights.pth", ema=True)
    assert same(model, averaged)
    torch.save({"model": raw.state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_weights(model, tmp_path / "plain.pth", ema=True)


@pytest.mark.parametrize("kind", ["namespace", "omegaconf", "paths", "numpy"])
@pytest.mark.parametrize("trust", [False, True], ids=["weights-only", "trusted"])
def test_arguments_and_numbers_beside_the_weights_need_no_trust(
    kind: str, trust: bool, tmp_path: Path
) -> None:
    arguments: Any = argparse.Namespace(model="biformer_small", lr=[5e-4], nested={"a": (1, None)})
    if kind == "omegaconf":
        omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
        arguments = omegaconf.OmegaConf.create({"model": "biformer_small", "a": {"b": [1, 2.0, None]}})
    if kind == "paths":
        arguments.output_dir = tmp_path
    if kind == "numpy":
        arguments = {"max_accuracy": numpy.float64(83.8), "epoch": numpy.int64(3)}
    trained, fresh = small(0), small(1)
    path = tmp_path / "best.pth"
    torch.save({"args": arguments, "model": trained.state_dict(), "epoch": 3}, path)
    load_weights(fresh, path, trust=trust)
    assert same(trained, fresh)


def test_arguments_of_a_package_that_is_not_installed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    trained, fresh = small(0), small(1)
    path = tmp_path / "best.pth"
    torch.save({"model": trained.state_dict(), "args": omegaconf.OmegaConf.create({"a": 1})}, path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "omegaconf"]:
        monkeypatch.setitem(sys.modules, name, None)
    load_weights(fresh, path)
    assert same(trained, fresh)


@pytest.mark.parametrize("content", ["model", "wrapped", "ema", "data parallel"])
def test_a_whole_model_is_read_when_trusted(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, fresh = small(0), small(1)
    path = tmp_path / "best.pt"
    saved: dict[str, Any] = {
        "model": trained,
        "wrapped": {"model": trained, "epoch": 3},
        "ema": {"model": None, "ema": trained},
        "data parallel": torch.nn.DataParallel(trained),
    }
    torch.save(saved[content], path)
    with pytest.raises(
        CheckpointError,
        match=r"trust_checkpoint=True .*--trust-checkpoint\) reads it, and a file of torch.save",
    ):
        load_weights(fresh, path)
    assert not same(trained, fresh)
    load_weights(fresh, path, trust=True)
    assert same(trained, fresh)
    load_weights(fresh := small(1), path, trust=True, ema=content == "ema")
    assert same(trained, fresh)
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert classes_of(path) == 5


def test_trust_is_recommended_only_where_it_would_help(tmp_path: Path) -> None:
    module = types.ModuleType("a_package_of_nobody")
    module.Net = type("Net", (torch.nn.Linear,), {"__module__": "a_package_of_nobody"})  # type: ignore[attr-defined]
    sys.modules["a_package_of_nobody"] = module
    try:
        torch.save(module.Net(2, 2), tmp_path / "theirs.pt")
    finally:
        del sys.modules["a_package_of_nobody"]
    with pytest.raises(CheckpointError, match="a_package_of_nobody cannot be imported here") as said:
        read_weights(tmp_path / "theirs.pt")
    assert "--trust-checkpoint" not in str(said.value)
    assert "torch.save(model.state_dict()) would work" in str(said.value)
    with pytest.raises(CheckpointError, match="pip install a_package_of_nobody would help"):
        read_weights(tmp_path / "theirs.pt", trust=True)


class Attack:
    """Runs a command of the system when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_a_file_that_asks_for_the_system_is_not_to_be_trusted(tmp_path: Path) -> None:
    torch.save({"model": small().state_dict(), "args": Attack()}, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=r"no weights need \w+.system, so do not trust this file"
    ) as said:
        read_weights(tmp_path / "weights.pth")
    assert "--trust-checkpoint" not in str(said.value)


class Payload:
    """Writes a file when it is unpickled, as a malicious checkpoint would."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_untrusted_file_runs_nothing(tmp_path: Path) -> None:
    torch.save({"model": small().state_dict(), "args": Payload(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="reading these runs code"):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), r"1 missing \(head.bias\)"),
        (lambda s: s.update({"extra": torch.zeros(1)}), r"1 unexpected \(extra\)"),
        (
            lambda s: s.update({"stages.0.0.norm1.weight": torch.zeros(7)}),
            r"stages.0.0.norm1.weight is \[7\] in the file and \[16\] in the model",
        ),
        (
            lambda s: s.update({"head.weight": torch.zeros(9, 32), "head.bias": torch.zeros(9)}),
            "another number of classes: .* num_classes .* skip_head=True",
        ),
    ],
    ids=["missing", "unexpected", "reshaped", "classes"],
)
def test_differences_are_named(change: Any, message: str, tmp_path: Path) -> None:
    model = small()
    state = dict(model.state_dict())
    change(state)
    torch.save({"model": state}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path / "weights.pth")


def test_head_can_be_kept_to_train_other_classes(tmp_path: Path) -> None:
    trained, fresh = small(0), small(1, num_classes=9)
    head = fresh.get_parameter("head.weight").detach().clone()
    torch.save({"model": trained.state_dict()}, tmp_path / "weights.pth")
    loaded = load_weights(fresh, tmp_path / "weights.pth", skip_head=True)
    assert loaded.kept == ("head.weight", "head.bias")
    assert torch.equal(fresh.get_parameter("head.weight"), head)
    assert torch.equal(fresh.get_parameter("norm.weight"), trained.get_parameter("norm.weight"))


def write_cut(path: Path) -> None:
    torch.save({"model": small().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "is not a file here"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_text("<html>404</html>"), "is not a weights file"),
        (lambda path: path.write_bytes(b""), "is not a weights file"),
        (write_cut, "is cut short or damaged"),
        (lambda path: torch.save([1, 2], path), "holds a list, not weights"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no weights, only epoch"),
    ],
    ids=["absent", "folder", "text", "empty", "truncated", "list", "no-tensors"],
)
@pytest.mark.parametrize("trust", [False, True], ids=["weights-only", "trusted"])
def test_bad_file_is_one_sentence(write: Any, message: str, trust: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(small(), path, trust=trust)
    assert "\n" not in str(caught.value)


def test_text_in_the_place_of_weights_is_not_answered_with_advice_to_run_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("# a page")
    with pytest.raises(CheckpointError, match=r"is not a weights file; a file written by torch.save would"):
        read_weights(path)


def test_create_model_loads_a_file(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {**SMALL, "qk_dims": SMALL["embed_dim"]}
    trained = bratune.create_model("biformer_tiny", **arguments)
    torch.save({"model": trained.state_dict()}, tmp_path / "weights.pth")
    model = bratune.create_model("biformer_tiny", pretrained=tmp_path / "weights.pth", **arguments)
    assert same(trained, model)


@pytest.mark.parametrize("route_stages_only", [True, False])
def test_converted_stl_weights_agree_up_to_stage_three(route_stages_only: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {**SMALL, "n_wins": 2, "norm_layer": torch.nn.BatchNorm2d}
    nhwc = BiFormerSTL(**options, topks=(1, 2, 4, -2)).double().eval()
    nchw = NCHWBiFormerSTL(**options, topks=(1, 2, 4, -1)).double().eval()
    with pytest.warns(UserWarning, match="stage 4"):
        nchw.load_state_dict(convert_stl(nhwc.state_dict(), "nchw"))
    a = b = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for stage in range(3 if route_stages_only else 4):
        a, b = nhwc.forward_stage(stage, a), nchw.forward_stage(stage, b)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12) is route_stages_only


def test_stl_conversion_there_and_back_changes_nothing() -> None:
    nhwc = BiFormerSTL(**SMALL, n_wins=2, topks=(1, 2, 4, -2))
    with pytest.warns(UserWarning, match="stage 4"):
        back = convert_stl(convert_stl(nhwc.state_dict(), "nchw"), "nhwc")
    assert all(torch.equal(value, back[name]) for name, value in nhwc.state_dict().items())
    with pytest.raises(UnknownNameError, match="nchw, nhwc"):
        convert_stl({}, "nhcw")
