"""Machine: what is detected here, what is refused, and JSON and back."""

from __future__ import annotations

import pytest
import torch

import bratune
from bratune.errors import BratuneError, TargetError, UsageError
from bratune.machine import Machine, detect, release

H100 = Machine(
    kind="cuda",
    device="cuda:0",
    gpu_key="h100",
    gpu_name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    sm_count=132,
    memory_gib=79.25,
    driver="570.86",
    torch="2.11.0",
    triton="3.6.0",
)


def test_the_cpu_is_described() -> None:
    here = detect("cpu")
    assert (here.kind, here.device, here.gpu_key) == ("cpu", "cpu", "cpu")
    assert here.gpu_name
    assert here.sm_count >= 1
    assert here.memory_gib > 0
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__
    assert here.bratune == bratune.__version__
    assert (here.capability, here.is_cuda) == ((0, 0), False)


def test_a_machine_survives_json_and_hashes() -> None:
    for machine in (H100, detect("cpu")):
        assert Machine.from_dict(machine.to_dict()) == machine
        assert hash(Machine.from_dict(machine.to_dict())) == hash(machine)


def test_the_line_of_a_gpu_names_architecture_and_versions() -> None:
    expected = "NVIDIA H100 80GB HBM3 · sm_90 · 132 SMs · driver 570.86 · torch 2.11.0 · triton 3.6.0"
    assert str(H100) == expected
    assert H100.capability == (9, 0)
    assert H100.memory_bytes == int(79.25 * 2**30)


@pytest.mark.parametrize(
    ("device", "kind", "said"),
    [
        ("tpu", UsageError, "auto, cpu, cuda and cuda:N are"),
        ("cuda:x", UsageError, "is not known"),
        ("cuda:99", TargetError, "is not here"),
        ("", UsageError, "is not known"),
    ],
)
def test_devices_that_do_not_exist_are_refused(device: str, kind: type[BratuneError], said: str) -> None:
    with pytest.raises(kind, match=said):
        detect(device)


def test_a_torch_that_is_too_old_is_refused_with_the_oldest_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(TargetError, match=r"torch 2\.7\.1\+cpu is installed, and 2\.8 or newer is needed"):
        detect("cpu")
    monkeypatch.setattr(torch, "__version__", "2.8.0a0")
    assert detect("cpu").torch == "2.8.0a0"
    assert [release(text) for text in ("2.13.0+cpu", "10.0", "unknown")] == [(2, 13), (10, 0), (0, 0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_an_error_that_says_so() -> None:
    assert detect("auto").kind == "cpu"
    with pytest.raises(TargetError, match="no CUDA device; cpu would work") as error:
        detect("cuda")
    assert error.value.exit_code == 5


@pytest.mark.gpu
def test_a_gpu_describes_itself() -> None:
    here = detect("cuda:0")
    assert here.is_cuda
    assert here.sm_count > 0
    assert here.capability >= (7, 0)
    assert here.l2_bytes > 0
    assert here.driver
