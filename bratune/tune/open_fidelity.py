"""Open the fidelity source that a request asks for."""

from __future__ import annotations

import json
from pathlib import Path

from bratune.errors import UsageError
from bratune.machine import Machine
from bratune.tune.fidelity_source import FidelitySource
from bratune.tune.progress import Say
from bratune.tune.request import Request
from bratune.variant import get_task

__all__ = ["calibration_path", "open_fidelity", "stored_limits"]

# Fewer pictures than this rank settings badly; how badly is in docs/tune.md.
FEW = 64


def calibration_path(checkpoint: str | Path) -> Path:
    """Where `bratune validate-proxy` leaves the thresholds of a weights file: beside it."""
    return Path(f"{checkpoint}.calibration.json")


def stored_limits(checkpoint: str | Path) -> dict[str, float] | None:
    """Divergence limits by pick rule that were calibrated for these weights; None where they were not."""
    path = calibration_path(checkpoint)
    if not path.exists():
        return None
    found = json.loads(path.read_text("utf-8"))
    return {str(name): float(value) for name, value in found["limits"].items()}


def open_fidelity(
    request: Request, machine: Machine, *, say: Say = lambda text: None
) -> FidelitySource | None:
    """What judges settings for a request; None where nothing can.

    Raises:
        UsageError: pictures or labels are missing.
        CheckpointError: the weights cannot be loaded.
    """
    if request.second != "loss":
        return None
    from bratune.tune.pictures import load_pictures

    if request.checkpoint:
        from bratune.tune.checkpoint_fidelity import CheckpointFidelity

        pictures = load_pictures(
            request.images,
            request.height,
            request.width,
            count=request.calibration_images,
            labels=request.labels,
            seed=request.seed,
        )
        if len(pictures) < FEW:
            say(f"only {len(pictures)} pictures: rankings by divergence are unsure below {FEW}")
        limits = stored_limits(request.checkpoint)
        say(
            f"divergence limits from {calibration_path(request.checkpoint)}"
            if limits
            else "divergence limits are defaults; `bratune validate-proxy` calibrates them for these weights"
        )
        return CheckpointFidelity.open(
            request.space,
            request.reference,
            request.checkpoint,
            pictures,
            device=machine.device,
            features_only=get_task(request.task).features_only,
            limits=limits,
        )
    from bratune.tune.shared_run import SharedRun

    if not request.labels:
        raise UsageError("a weight-shared run needs --labels: subfolders of --images are the classes")
    return SharedRun.train(request, device=machine.device, say=say)
