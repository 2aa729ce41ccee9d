"""Target: which machine a command speaks of, and whether it is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bratune import gpus
from bratune.errors import TargetError, UsageError
from bratune.gpus import GPU
from bratune.machine import Machine, detect
from bratune.predict.model import absent_machine

__all__ = ["Target", "device_names", "find_target"]


@dataclass(frozen=True)
class Target:
    """What ``--gpu`` and ``--device`` mean together.

    Attributes:
        machine: The machine to speak of; when ``absent``, what the table says about the board:
            backends can say of it whether they would accept a problem, but nothing can be measured on it.
        absent: The board that was asked for and is not here; None when `machine` can be measured.
        here: What is here instead, in words; empty when nothing is absent.
    """

    machine: Machine
    absent: GPU | None = None
    here: str = ""

    def require_present(self) -> None:
        """Refuse a board that is not here.

        Raises:
            TargetError: it is absent; the message says what is here.
        """
        if self.absent is not None:
            raise TargetError(
                f"{self.absent.name} was asked for and cannot be measured here: this machine has "
                f"{self.here}; without --gpu that is what would be measured"
            )


def device_names(devices: str) -> tuple[str, ...]:
    """The devices of ``--device``: one name, several joined by ``,``, or ``all`` for every CUDA device.

    Raises:
        TargetError: ``all`` was asked for and there is no CUDA device.
    """
    if devices.strip().lower() != "all":
        return tuple(name.strip() for name in devices.split(","))
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise TargetError("--device all was asked for and torch finds no CUDA device; cpu would work")
    return tuple(f"cuda:{index}" for index in range(count))


def find_target(gpu: str = "auto", device: str = "auto", spec: Path | None = None) -> Target:
    """The target of ``--gpu KEY``, ``--gpu-spec FILE`` and ``--device NAME``.

    Args:
        gpu: ``auto`` (whatever is here), ``cpu``, or a key of the table of boards.
        device: See `bratune.machine.detect`.
        spec: Description of a board (`bratune.gpus.load_spec`); it is taken to be absent.

    Raises:
        ConfigError: the description is not one.
        UnknownNameError: the table has no such board.
        TargetError: the device is not here.
        UsageError: a board and the CPU, or two boards, are named at once.
    """
    wanted = gpu.strip().lower()
    if spec is not None:
        if wanted != "auto":
            raise UsageError(f"--gpu {gpu} and --gpu-spec {spec} both name a GPU; one of them would do")
        board = gpus.load_spec(spec)
        if device.strip().lower() == "cpu":
            raise UsageError(f"--gpu-spec {spec} and --device cpu name two machines; one of them would do")
        return Target(absent_machine(board), absent=board, here=detect(device).gpu_name)
    if wanted == "auto":
        return Target(detect(device))
    if wanted == "cpu":
        if device.strip().lower() not in ("auto", "cpu"):
            raise UsageError(f"--gpu cpu and --device {device} name two machines; one of them would do")
        return Target(detect("cpu"))
    board = gpus.resolve(wanted)
    if device.strip().lower() == "cpu":
        raise UsageError(
            f"--gpu {gpu} asks about a {board.name} and --device cpu names this machine's CPU; one of them "
            "would do"
        )
    machine = detect(device)
    if machine.is_cuda and machine.gpu_key in _family(board):
        return Target(machine)
    return Target(absent_machine(board), absent=board, here=machine.gpu_name)


def _family(board: GPU) -> set[str]:
    """Keys that an asked-for board also stands for: ``a100`` is any A100 that is here."""
    return {b.key for b in gpus.table() if b.key == board.key or b.key.startswith(board.key + "-")}
