"""Fidelity source: who judges settings by a model's answers, and the one that a request asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from bratune.errors import UsageError
from bratune.machine import Machine, detect
from bratune.tune.evidence import Evidence
from bratune.tune.request import TuneRequest
from bratune.tune.setting import Setting
from bratune.tune.show import Say
from bratune.tune.space import Space
from bratune.variant import get_task

if TYPE_CHECKING:
    from bratune.tune.calibration import Calibration

__all__ = ["Fidelity", "FidelitySource", "calibrate_checkpoint", "calibration_path", "open_fidelity"]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How far a setting is from the reference.

    Attributes:
        loss: Smaller is closer; 0 for the reference itself. Its unit is the source's.
        evidence: What is known about accuracy, with its interval.
        usable: The setting may be picked; False where the source could not judge it.
    """

    loss: float
    evidence: Evidence
    usable: bool = True


@runtime_checkable
class FidelitySource(Protocol):
    """Judges settings; backends play no part, they compute the same function."""

    @property
    def key(self) -> str:
        """Text that is equal where losses may be reused: weights, images, reference."""
        ...

    @property
    def limits(self) -> dict[str, float]:
        """Largest loss for the pick rules ``safe``, ``balanced`` and ``fast``."""
        ...

    def stage_loss(self, index: int, n_win: int, topk: int) -> float:
        """The loss of the reference with only stage ``index`` (from 0) changed."""
        ...

    def joint(self, setting: Setting) -> Fidelity:
        """The loss and the evidence of a whole setting."""
        ...


# Fewer pictures than this rank settings badly.
FEW = 64


def calibration_path(checkpoint: str | Path) -> Path:
    """Where `bratune validate-proxy` leaves the thresholds of a weights file: beside it."""
    return Path(f"{checkpoint}.calibration.json")


def open_fidelity(
    request: TuneRequest, machine: Machine, *, say: Say = lambda text: None
) -> FidelitySource | None:
    """What judges settings for a request; None where nothing can.

    Raises:
        UsageError: pictures are missing.
        CheckpointError: the weights cannot be loaded.
    """
    if request.second != "loss":
        _check_weights(request, say)
        return None
    if request.checkpoint:
        return _of_checkpoint(request, machine, say)
    if request.train_trials:
        from bratune.tune.train_trials import TrainTrials

        return TrainTrials.of(request, device=machine.device, say=say)
    from bratune.tune.short_training import SharedRun

    return SharedRun.train(request, device=machine.device, say=say)


def _check_weights(request: TuneRequest, say: Say) -> None:
    """Raise where the weights do not fit the model, although nothing is computed with them."""
    if not request.checkpoint:
        return
    from bratune.tune.checkpoint_fidelity import load_checkpoint

    load_checkpoint(request.model, request.checkpoint, features_only=get_task(request.task).features_only)
    if request.images:
        say("S and top-k stay those of the weights, so that outputs do too and --images are not looked at")


def _of_checkpoint(request: TuneRequest, machine: Machine, say: Say) -> FidelitySource:
    from bratune.tune.checkpoint_fidelity import CheckpointFidelity
    from bratune.tune.pictures import load_pictures

    pictures = load_pictures(
        request.images,
        request.height,
        request.width,
        count=request.calibration_images,
        labels=request.labels,
        seed=request.seed,
    )
    _say_order(request.checkpoint, say)
    if len(pictures) < FEW:
        say(f"only {len(pictures)} pictures: rankings by divergence are unsure below {FEW}")
    return CheckpointFidelity.open(
        request.space,
        request.reference,
        request.checkpoint,
        pictures,
        device=machine.device,
        features_only=get_task(request.task).features_only,
        confidence=request.confidence,
    )


def _say_order(checkpoint: str, say: Say) -> None:
    """Say what a calibration of these weights found about the order in which settings are tried."""
    from bratune.tune.calibration import read_calibration

    path = calibration_path(checkpoint)
    found = read_calibration(path)
    if found is not None and not found["validated"]:
        say(f"{path}: the divergence does not order these weights' settings, so that good ones may come late")


def calibrate_checkpoint(
    model: str,
    checkpoint: Path,
    folder: Path,
    height: int,
    width: int,
    *,
    n_win: Sequence[int],
    topks: Sequence[int],
    settings: int,
    images: int,
    test_images: int,
    device: str = "auto",
    seed: int = 0,
    say: Say = lambda text: None,
) -> Calibration:
    """The calibration of a weights file on a labelled folder; see `bratune.tune.calibration`.

    Args:
        model: Variant name.
        checkpoint: Weights.
        folder: One subfolder per class.
        height: In pixels.
        width: In pixels.
        n_win: S that they were trained with, one or one per stage.
        topks: Top-k likewise; empty for the published ones.
        settings: How many are tried.
        images: Pictures of the proxy.
        test_images: Other pictures, for top-1.
        device: To compute on.
        seed: Of everything.
        say: Told what happens.

    Raises:
        UsageError: there are too few pictures.
    """
    from bratune.tune.calibration import calibrate, stratified_settings
    from bratune.tune.checkpoint_fidelity import CheckpointFidelity, load_checkpoint
    from bratune.tune.pictures import load_pictures

    space = Space(model=model, height=height, width=width, default_n_win=n_win[0])
    sides = list(n_win) if len(n_win) > 1 else n_win[0]
    reference = space.setting(sides, list(topks) or space.variant.topks)
    whole = load_pictures(folder, height, width, count=images + test_images, labels=True, seed=seed)
    if len(whole) < images + 16:
        raise UsageError(
            f"{folder} holds {len(whole)} labelled pictures; {images} for the score and at least 16 others "
            "for top-1 are needed, or a smaller --calibration-images"
        )
    import torch

    assert whole.labels is not None
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    net = load_checkpoint(model, checkpoint).to(detect(device).device)
    proxy, test = (
        CheckpointFidelity(
            net,
            space,
            reference,
            dataclasses.replace(whole, images=whole.images[rows], labels=whole.labels[rows]),
        )
        for rows in (order[:images], order[images:])
    )
    return calibrate(proxy, test, stratified_settings(space, proxy, settings, seed=seed), say=say, seed=seed)
