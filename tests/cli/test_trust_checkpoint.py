"""Weights files on the command line: checked before a dry run, trusted only when that is asked for."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bratune
from bratune.cli import VERBS, run
from bratune.cli.options import TRUST_VARIABLE
from bratune.kernels import checkpoint
from bratune.machine import detect
from bratune.run.repro import command_for
from bratune.work.cells import scenes
from bratune.work.request import make_request

READERS = {
    "tune": ["tune", "--device", "cpu", "--dry-run"],
    "profile": ["profile", "--device", "cpu", "--dry-run"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    model = bratune.create_model("biformer_tiny", num_classes=5)
    contents: dict[str, Any] = {
        "official": {"model": model.state_dict(), "args": argparse.Namespace(lr=1e-3)},
        "whole": model,
        "other": {"model": {"a": torch.zeros(1)}},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in contents}


def test_the_variable_is_the_one_that_files_are_read_by() -> None:
    assert TRUST_VARIABLE == checkpoint.TRUST_VARIABLE


@pytest.mark.parametrize("verb", READERS)
def test_a_dry_run_reads_the_weights(
    verb: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*READERS[verb], "--checkpoint"]
    assert run([*asked, str(files["official"])]) == 0
    assert run([*asked, str(files["other"])]) == 1
    assert "does not fit the model" in capsys.readouterr().err


@pytest.mark.parametrize("verb", READERS)
def test_a_whole_model_is_read_only_with_the_flag_and_only_by_that_command(
    verb: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*READERS[verb], "--checkpoint", str(files["whole"])]
    assert run(asked) == 1
    assert "--trust-checkpoint" in capsys.readouterr().err
    assert run([*asked, "--trust-checkpoint"]) == 0
    assert TRUST_VARIABLE not in os.environ
    assert run(asked) == 1


def test_every_command_that_reads_weights_has_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    reading = []
    for verb in VERBS:
        assert run([verb, "--help"]) == 0
        said = capsys.readouterr().out
        if re.search(r"^  --checkpoint ", said, re.MULTILINE):
            assert "--trust-checkpoint" in said, verb
            reading.append(verb)
    assert {"export", "profile", "tune", "validate-proxy", "visualize"} <= set(reading)


def test_the_command_of_a_row_asks_for_the_trust_that_it_was_measured_with(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(detect("cpu"), checkpoint=str(files["official"]))
    (scene,) = scenes(request)
    cells = [scene.model_cell(("gather",)), next(iter(scene.attention_cells(scene.stages[0])))]
    for cell in cells:
        assert "--trust-checkpoint" not in command_for(cell)
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    for cell in cells:
        assert f"--checkpoint {files['official']} --trust-checkpoint" in command_for(cell)
    assert "--trust-checkpoint" not in command_for(cells[0].replace(extra="{}"))


def test_visualize_takes_the_number_of_classes_from_the_file(tmp_path: Path, files: dict[str, Path]) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need pillow")
    image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    asked = ["visualize", "--image", str(tmp_path / "a.png"), "--n-win", "7", "--stage", "1"]
    asked += ["-o", str(tmp_path / "out.html"), "--checkpoint"]
    assert run([*asked, str(files["official"])]) == 0
    assert run([*asked, str(files["whole"]), "--trust-checkpoint"]) == 0
