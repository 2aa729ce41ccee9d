"""Cells measured in a worker process, for real, on this CPU and on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bratune import machine
from bratune.cell import Cell
from bratune.kernels import registry
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.run.isolated import IsolatedEngine, IsolatedRunner
from bratune.testing import faults

PROBLEM = Problem(batch=1, height=8, width=8, heads=2, head_dim=8, region=(4, 4), topk=2)
CELL = Cell(part="attention", problem=PROBLEM, backend="gather", l2="warm")
SETTINGS = MeterSettings(min_time_s=0.0, max_noise_pct=100.0, min_samples=6, max_samples=6, warmup_s=0.0)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    faults.install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


def test_a_cell_is_measured_in_another_process_with_the_same_threads() -> None:
    here = machine.detect("cpu")
    with IsolatedEngine(here, SETTINGS) as engine:
        measured, refused, unknown = engine.run(
            [CELL, CELL.replace(regime="graph"), CELL.replace(backend="nobody")]
        )
    assert (measured.outcome, measured.n_samples, measured.evidence) == ("measured", 6, "measured")
    assert measured.threads == here.threads
    assert measured.max_rel_err is not None
    assert (refused.outcome, refused.median_ms) == ("unsupported", None)
    assert "CUDA" in refused.reason
    assert unknown.outcome == "error"
    assert "no backend is called 'nobody'" in unknown.reason


@pytest.mark.parametrize(("devices", "visible"), [(1, None), (2, "GPU-ab-12")])
def test_the_worker_is_shown_one_gpu_of_several(
    devices: int, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone may be a part of a GPU, which this name does not find."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    gpu = machine.Machine(
        kind="cuda", device="cuda:0", gpu_key="h100", gpu_name="NVIDIA H100", gpu_uuid="ab-12"
    )
    worker = IsolatedRunner(gpu, SETTINGS)._worker
    assert worker._env.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.gpu
def test_the_parent_makes_no_cuda_context() -> None:
    script = (
        "import torch\n"
        "from bratune import machine\n"
        "from bratune.cell import Cell\n"
        "from bratune.measure.settings import MeterSettings\n"
        "from bratune.run.isolated import IsolatedEngine\n"
        f"cell = Cell.from_dict({CELL.to_dict()!r})\n"
        f"settings = MeterSettings.from_dict({SETTINGS.to_dict()!r})\n"
        "with IsolatedEngine(machine.detect('cuda'), settings) as engine:\n"
        "    (row,) = engine.run([cell])\n"
        "assert row.outcome == 'measured', row.reason\n"
        "assert not torch._C._cuda_hasPrimaryContext(0)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("fault-index", "crashed", "the device is lost"),
        ("fault-exhaust", "oom", "out of memory"),
        ("fault-nan", "incorrect", "NaN"),
        ("fault-raise", "error", "always raises"),
    ],
)
def test_faults_on_a_gpu_are_typed_and_the_next_cell_runs(fault: str, outcome: str, reason: str) -> None:
    with IsolatedEngine(machine.detect("cuda"), SETTINGS) as engine:
        first, sick, sound = engine.run([CELL, CELL.replace(backend=fault), CELL.replace(seed=1)])
    assert first.outcome == "measured", first.reason
    assert sick.outcome == outcome, sick.reason
    assert reason in sick.reason
    assert sound.outcome == "measured", sound.reason
