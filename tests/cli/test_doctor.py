"""The doctor: what it calls a problem, and that its exit code follows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bratune.cli import run
from bratune.machine import Machine
from bratune.measure import health
from bratune.measure.health import Finding
from bratune.measure.telemetry import Reading

FLAGS = {
    "deterministic": False,
    "tf32_matmul": False,
    "tf32_cudnn": True,
    "reduced_bf16": True,
    "reduced_fp16": True,
    "cudnn_benchmark": False,
}
GPU = Machine(kind="cuda", device="cuda:0", gpu_key="h100", gpu_name="NVIDIA H100", compute_capability="9.0")
CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="some CPU", sm_count=2, threads=2)


def states(findings: Finding | list[Finding]) -> dict[str, str]:
    found = [findings] if isinstance(findings, Finding) else findings
    return {f.what: f.state for f in found}


@pytest.mark.parametrize(
    ("triton", "wanted", "state"),
    [
        ("3.7.1", "triton==3.7.1; platform_system == 'Linux'", "ok"),
        ("3.6.0", "triton==3.7.1; platform_system == 'Linux'", "problem"),
        ("3.6.0", "", "ok"),
        ("", "triton==3.7.1", "note"),
    ],
)
def test_triton_must_be_the_one_that_torch_was_made_for(triton: str, wanted: str, state: str) -> None:
    findings = health.check_versions("2.13.0", triton, wanted)
    assert states(findings)["triton"] == state
    assert bool(findings[-1].advice) is (state != "ok")


def test_a_torch_older_than_the_tests_is_a_problem() -> None:
    assert states(health.check_versions("2.7.1", "3.3.1", ""))["torch"] == "problem"
    assert states(health.check_versions("2.8.0", "3.4.0", ""))["torch"] == "ok"


@pytest.mark.parametrize(
    ("reading", "foreign", "expected"),
    [
        (
            Reading(sm_clock_mhz=1900, top_clock_mhz=1980, temp_c=50),
            0,
            {"clocks": "ok", "other processes": "ok"},
        ),
        (
            Reading(sm_clock_mhz=1200, top_clock_mhz=1980, throttle_reasons=("hw_thermal",)),
            2,
            {"clocks": "problem", "other processes": "problem"},
        ),
        (Reading(), None, {"clocks": "note", "other processes": "note"}),
    ],
)
def test_sensors_that_are_absent_are_notes_and_bad_states_are_problems(
    reading: Reading, foreign: int | None, expected: dict[str, str]
) -> None:
    found = states(health.check_sensors(reading, foreign))
    assert {what: found[what] for what in expected} == expected


@pytest.mark.parametrize(
    ("load", "threads", "state"), [(0.2, 2, "ok"), (1.9, 2, "problem"), (0.2, 8, "note")]
)
def test_a_busy_cpu_is_a_problem(load: float, threads: int, state: str) -> None:
    assert health.check_load(load, 2, threads).state == state


@pytest.mark.parametrize(
    "name", ["CUDA_LAUNCH_BLOCKING", "TRITON_INTERPRET", "PYTORCH_NO_CUDA_MEMORY_CACHING"]
)
def test_variables_that_slow_everything_down_are_problems(name: str) -> None:
    assert states(health.check_environment({name: "1"})) == {name: "problem"}
    assert states(health.check_environment({name: "0"})) == {"environment": "ok"}


@pytest.mark.parametrize(
    ("change", "what", "state"),
    [
        ({}, "deterministic algorithms", "ok"),
        ({"deterministic": True}, "deterministic algorithms", "problem"),
        ({"tf32_matmul": True}, "TF32", "note"),
        ({}, "TF32", "ok"),
        ({"cudnn_benchmark": True}, "cuDNN benchmark", "note"),
    ],
)
def test_switches_that_change_what_is_measured_are_named(
    change: dict[str, Any], what: str, state: str
) -> None:
    assert states(health.check_flags(FLAGS | change))[what] == state


def test_the_deterministic_trap_is_read_from_torch() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert states(health.check_flags(health.torch_flags()))["deterministic algorithms"] == "problem"
    finally:
        torch.use_deterministic_algorithms(False)
    assert states(health.check_flags(health.torch_flags()))["deterministic algorithms"] == "ok"


def test_tf32_is_read_however_it_was_allowed() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        assert health.torch_flags()["tf32_matmul"] is matmul.allow_tf32
        return
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert health.torch_flags()["tf32_matmul"] is False
        # Torch's older question, get_float32_matmul_precision, raises after the newer switch.
        matmul.fp32_precision = "tf32"
        assert health.torch_flags()["tf32_matmul"] is True
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("medians", "state"), [([1.0, 1.01, 1.02], "ok"), ([1.0, 1.05], "note"), ([1.0, 1.3], "problem")]
)
def test_the_noise_floor_is_the_range_of_repeated_measurements(medians: list[float], state: str) -> None:
    assert health.check_noise(medians).state == state


@pytest.mark.parametrize(("share", "state"), [(0.0, "ok"), (0.04, "ok"), (0.2, "problem")])
def test_time_that_the_host_gave_to_others_is_a_problem(share: float, state: str) -> None:
    assert health.check_stolen(share).state == state


@pytest.mark.parametrize(("free", "state"), [(100.0, "ok"), (0.2, "problem")])
def test_a_full_disk_is_a_problem(free: float, state: str) -> None:
    assert health.check_disk(free, "/here").state == state


def test_no_gpu_and_an_unknown_gpu_are_notes() -> None:
    assert health.check_board(CPU, False).state == "note"
    assert health.check_board(GPU, False).state == "note"
    assert health.check_board(GPU, True).state == "ok"


def test_the_noise_floor_is_really_measured() -> None:
    samples = health.noise_samples(CPU, repeats=2)
    assert len(samples) == 2
    assert all(sample > 0 for sample in samples)


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_the_exit_code_says_whether_measuring_is_sound(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "examine", lambda *_, **__: [Finding("x", state, "found", "do this")])
    assert run(["doctor", "--device", "cpu", "--no-noise"]) == code
    assert "-> do this" in capsys.readouterr().out


def test_the_whole_examination_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--device", "cpu", "--no-noise", "--format", "json"]) in (0, 1)
    found = {f["what"] for f in json.loads(capsys.readouterr().out)}
    assert {"torch", "triton", "GPU", "CPU load", "TF32", "deterministic algorithms", "disk"} <= found


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({}, "ok", "amx (of amx, avx2), threads of libgomp.so, built by cc"),
        ({"default": "avx2"}, "note", "BRATUNE_NATIVE asks for it; amx is the fastest here"),
        ({"openmp": ""}, "note", "one thread"),
        ({"reason": "needs a C compiler"}, "note", "needs a C compiler"),
    ],
)
def test_the_backend_for_cpus_says_what_it_uses(change: dict[str, Any], state: str, words: str) -> None:
    facts: dict[str, Any] = {
        "variants": ("amx", "avx2"),
        "default": "amx",
        "openmp": "libgomp.so",
        "source": "built by cc",
        "reason": "",
    }
    found = health.check_native(**(facts | change))
    assert found.state == state
    assert words in f"{found.found} {found.advice}"


def test_on_a_cpu_the_backend_for_cpus_is_looked_at() -> None:
    found = states(health.examine(CPU, measure=False))
    assert "native backend" in found
