"""Cells measured in a worker process, for real, on this CPU and on a GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bratune import machine
from bratune.cell import Cell
from bratune.kernels import registry
from bratune.measure.meter import meter_for
from bratune.measure.settings import MeterSettings
from bratune.measure.state import TorchState
from bratune.problem import Problem
from bratune.run import isolated
from bratune.run.isolated import IsolatedEngine, IsolatedRunner
from bratune.run.measure_cell import run_cell

PROBLEM = Problem(batch=1, height=8, width=8, heads=2, head_dim=8, region=(4, 4), topk=2)
CELL = Cell(part="attention", problem=PROBLEM, backend="gather", l2="warm")
SETTINGS = MeterSettings(min_time_s=0.0, max_noise_pct=100.0, min_samples=6, max_samples=6, warmup_s=0.0)


@pytest.mark.usefixtures("forked")
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cheat-second-call", "other data at the same addresses"),
        ("cheat-one-in-five", "called again with the same data"),
        ("cheat-many-calls", "the last timed call differs from the first by 1"),
        ("cheat-contiguous", "tensors of another layout"),
        ("cheat-large-logits", "large logits"),
        ("cheat-by-pointer", "other data at the same addresses"),
        ("cheat-lazy", "the output is a _LazyTensor"),
    ],
)
def test_a_backend_that_is_right_once_is_caught(failing: None, name: str, says: str) -> None:
    row = run_cell(
        CELL.replace(backend=name), machine.detect("cpu"), meter_for(machine.detect("cpu")), SETTINGS
    )
    assert (row.record.outcome, row.record.median_ms) == ("incorrect", None)
    assert says in row.record.reason


@pytest.mark.usefixtures("forked")
def test_what_a_backend_leaves_behind_reaches_no_other_cell(failing: None) -> None:
    here = machine.detect("cpu")
    with IsolatedEngine(here, SETTINGS) as engine:
        left, after = engine.run([CELL.replace(backend="cheat-state"), CELL])
    assert (left.outcome, after.outcome) == ("measured", "measured")
    # That one had a process of its own; in one process, too, a job begins with the state as it was found.
    payload = {"machine": here.to_dict(), "settings": SETTINGS.to_dict()}
    before, clock = TorchState.now(), time.perf_counter_ns
    isolated._as_found.cache_clear()
    try:
        isolated._begin(payload)
        q, k, v = torch.randn(3, 1, 8, 8, 16)
        registry.get("cheat-state").forward(q, k, v, torch.zeros(1, 4, 4, dtype=torch.int64), PROBLEM)
        assert torch.get_default_dtype() == torch.float64
        isolated._begin(payload)
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_num_threads() == here.threads
    finally:
        time.perf_counter_ns = clock
        before.restore()
        isolated._as_found.cache_clear()


def test_the_state_of_torch_is_what_it_was_before_a_cell() -> None:
    before = TorchState.now()
    torch.set_num_threads(before.threads + 1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    torch.manual_seed(5)
    before.restore()
    now = TorchState.now()
    assert torch.equal(now.random, before.random)
    assert dataclasses.replace(now, random=before.random) == before
