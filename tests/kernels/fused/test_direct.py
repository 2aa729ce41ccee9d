"""A direct launch is the launch that Triton makes, whatever changes from one call to the next."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_cases import Case, sample
from torch import Tensor

pytest.importorskip("triton")

from bratune.cli import run as run_command
from bratune.kernels.fused import direct
from bratune.kernels.fused.call import as_text, call_for
from bratune.kernels.fused.gather_fwd import gather_fwd
from bratune.kernels.fused.run import run_backward, run_forward
from bratune.measure.health import check_launches
from bratune.predict.offline import machine_of
from bratune.studies.__main__ import studies
from bratune.testing.stub_driver import StubLaunch, stub_device

pytestmark = pytest.mark.compile


def pair(forward: str, backward: str, **settings: int) -> tuple[tuple[str, int | str], ...]:
    return (("forward", forward), ("backward", backward), *settings.items())


CASES = (
    Case(map=(8, 16), region=(8, 8), topk=1, dtype="bfloat16", config=pair("gather", "key")),
    Case(map=(8, 16), region=(8, 8), topk=1, dtype="bfloat16", config=pair("gather", "key", dkv_chunk=1)),
    Case(map=(8, 12), topk=4, dtype="float16", config=pair("stationary", "gather")),
    Case(map=(6, 8), region=(2, 2), topk=5, config=pair("image", "image")),
)


@pytest.fixture(params=[False, True], ids=["triton", "directly"])
def directly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(direct, "_DIRECTLY", request.param)
    return bool(request.param)


def described(launch: StubLaunch) -> tuple[Any, ...]:
    """A launch without the addresses of what it allocated."""
    arguments = [(x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x for x in launch.arguments]
    return launch.kernel, launch.code, launch.grid, tuple(arguments)


def both_passes(case: Case) -> None:
    s, call = sample(case), call_for(case.problem, as_text(dict(case.config)), machine_of("sm90"))
    out, lse = run_forward(s.q, s.k, s.v, s.routes, call, keep_lse=True)
    run_backward(s.grad, s.q, s.k, s.v, s.routes, out, lse, call, packed=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_is_launched_as_triton_would(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with stub_device() as launches:
        for directly in (False, True, True):
            monkeypatch.setattr(direct, "_DIRECTLY", directly)
            both_passes(case)
        kept = len(direct._launches)
    each = len(launches) // 3
    assert each >= 3
    assert kept == len({described(x)[1] for x in launches})  # the third round found every one of them
    own, first, again = ([described(x) for x in launches[i * each : (i + 1) * each]] for i in range(3))
    assert first == own
    assert again == own


def changes() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Queries, keys and values of which each call for other machine code than those before."""
    shape = (1, 8, 8, 32)
    for dtype in (torch.float16, torch.bfloat16):
        whole = torch.zeros(1, 8, 8, 96, dtype=dtype)
        first, second, third = whole.chunk(3, -1)
        yield f"packed {dtype}", first, second, third
        q, k, v = (torch.zeros(shape, dtype=dtype) for _ in range(3))
        yield f"split {dtype}", q, k, v
        yield (
            f"one pointer is not aligned {dtype}",
            torch.zeros(8 * 8 * 32 + 1, dtype=dtype)[1:].view(shape),
            k,
            v,
        )
        yield f"odd strides {dtype}", torch.zeros(1, 8, 8, 33, dtype=dtype)[..., :32], k, v
        yield (
            f"a stride of 1 elsewhere {dtype}",
            torch.zeros(1, 32, 8, 8, dtype=dtype).permute(0, 2, 3, 1),
            k,
            v,
        )
        yield f"keys and values of other strides {dtype}", q, whole[..., :32], v


def test_every_change_of_the_arguments_changes_the_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0].replace(map=(8, 8))
    routes = torch.zeros(1, 1, 1, dtype=torch.int64)
    codes: dict[bool, list[bytes]] = {False: [], True: []}
    with stub_device() as launches:
        for directly in (False, True, True):
            monkeypatch.setattr(direct, "_DIRECTLY", directly)
            for _, q, k, v in changes():
                problem = case.replace(dtype=str(q.dtype).removeprefix("torch.")).problem
                call = call_for(problem, "forward=gather", machine_of("sm90"))
                out = torch.empty(1, 8, 8, 32, dtype=q.dtype)
                for statistics in (0, 64):
                    gather_fwd(q, k, v, routes, out, torch.empty(statistics), call)
                    codes[directly].append(launches[-1].code)
    once = len(codes[False])
    assert len(set(codes[False])) >= 16
    assert codes[True] == 2 * codes[False]
    assert once == 24


def test_devices_are_kept_apart() -> None:
    class Elsewhere(Tensor):
        def get_device(self) -> int:
            return 3

    case = CASES[0]
    s, call = sample(case), call_for(case.problem, as_text(dict(case.config)), machine_of("sm90"))
    out = torch.empty_like(s.grad)
    with stub_device() as launches:
        for q in (s.q, s.q.as_subclass(Elsewhere)):
            for _ in range(2):
                gather_fwd(q, s.k, s.v, s.routes, out, torch.empty(0), call)
        assert len(direct._launches) == 2
    assert [launch.stream for launch in launches[1::2]] == [-1, 3]


def test_what_triton_does_beside_launching_is_left_to_it() -> None:
    from triton import knobs

    seen: list[str] = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    with stub_device() as launches:
        both_passes(CASES[0])
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            kept = dict(direct._launches)
            assert direct._in_other_hands(gather_fwd_kernel())
            both_passes(CASES[0])
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert direct._launches == kept
        assert not direct._in_other_hands(gather_fwd_kernel())
    assert len(launches) == 2 * len(kept)


def gather_fwd_kernel() -> Any:
    from bratune.kernels.fused.gather_fwd import gather_fwd_kernel as found

    return found


@pytest.mark.usefixtures("forked")
def test_kernels_that_are_compiled_first_of_all_are_not_launched() -> None:
    code = (
        "from bratune.predict.offline import attention_launches; from bratune.problem import Problem; "
        "p = Problem(batch=1, height=8, width=8, heads=1, head_dim=32, region=(8, 8), topk=1); "
        "print(*attention_launches(p, 'sm80', {'forward': 'gather'}))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.split() == ["gather_fwd"], done.stderr


def test_a_program_that_never_repeats_itself_keeps_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_MOST", 2)
    with stub_device():
        for size in (8, 16, 24):
            both_passes(CASES[0].replace(map=(8, size)))
            assert len(direct._launches) <= 2


def test_other_releases_are_left_to_triton_and_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct.HOW == direct._how() == "directly"
    assert check_launches(direct.HOW).state == "ok"
    monkeypatch.setattr("triton.__version__", "3.9.0")
    assert direct._how().startswith("by triton 3.9.0 itself")
    found = check_launches(direct._how())
    assert found.state == "note"
    assert found.found.startswith("by triton 3.9.0 itself")


def test_the_study_prints_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["launches", "--calls", "10"], group=studies) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "launches: directly"
    assert [line.split()[:3] for line in lines[1:]] == [
        ["224", f"s{stage}", f"{direction},"] for stage in (1, 2, 3) for direction in ("forward", "backward")
    ]
    assert all("us by Triton" in line and "us directly" in line for line in lines[1:])
