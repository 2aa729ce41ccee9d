"""Shared fixtures: the devices at hand and why a test does not run here."""

from __future__ import annotations

import dataclasses
import gc
import os
import types
from collections.abc import Generator, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # processes that tests start share the cores with other tests
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else a pool of processes, each of which imports torch


# Where `make test` looks for tests of interpreted kernels: to collect all others once more takes longer.
INTERPRETED = ("kernels", "predict")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    strays = [i.nodeid for i in items if "interpreter" in i.keywords and not _is_looked_for(i.path)]
    if strays:
        raise pytest.UsageError(f"make test looks for interpreted kernels in {INTERPRETED} only: {strays}")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    broken = interpreting and _interpreter_is_broken()
    if interpreting and not broken:
        _quicken_the_interpreter()
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))
        if "interpreter" in item.keywords and not interpreting:
            item.add_marker(pytest.mark.skip(reason="runs with TRITON_INTERPRET=1 (make test does)"))
        if "interpreter" in item.keywords and broken:
            item.add_marker(
                pytest.mark.skip(reason="triton 3.6 cannot interpret loops with numpy 2.4 or newer")
            )
        if "compile" in item.keywords and interpreting:
            item.add_marker(pytest.mark.skip(reason="cross-compiles; runs without TRITON_INTERPRET"))


def _is_looked_for(path: Path) -> bool:
    return any(path.is_relative_to(Path(__file__).parent / name) for name in INTERPRETED)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected, a million objects, out of every later look at what lives."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End a process whose CUDA context a test has lost: every later test in it would fail with that error.

    A worker of pytest-xdist is replaced by a new one, which goes on with the next test; without workers the
    run ends. The report of the test is printed here, because that of a worker that ends is not sent.
    """
    report = yield
    if report.failed and (lost := _lost_device()):
        text = f"\n{item.nodeid}: the device is lost: {lost}\n{report.longreprtext}\n"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            item.session.shouldstop = f"the device is lost in {item.nodeid}: {lost}"
            return report
        capture = item.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            os.write(2, text.encode())
        os._exit(1)
    return report


def _lost_device() -> str:
    """What the device says where an earlier error comes back at every call; empty where it works."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return " ".join(str(error).split())
    return ""


def _interpreter_is_broken() -> bool:
    """Whether loops with loaded bounds fail: triton 3.6 leans on what numpy 2.4 removed."""
    try:
        found = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    except PackageNotFoundError:
        return False
    return found[0] < (3, 7) and found[1] >= (2, 4)


def _quicken_the_interpreter() -> None:
    """Leave out what Triton's interpreter does in vain, which is most of its time.

    It computes whether integers overflow and, unless it debugs, drops the answer. And in every call of a
    function by a kernel it replaces the language again that it has replaced for the kernel.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    replace, nothing = interpreter._patch_lang, types.SimpleNamespace(restore=lambda: None)

    def replace_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        done = languages and not any(tl.core.is_builtin(language.load) for language in languages)
        return nothing if done else replace(function)

    interpreter._patch_lang = replace_once


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: on a GPU, or on a CPU in the interpreter."""
    name: str = request.param
    return name


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN or of the largest integer, so that a gap shows."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def forked() -> Iterator[None]:
    """Processes of this Python that the test starts begin with torch imported; see `preloaded`."""
    from preloaded import forks

    with forks():
        yield


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backends of `bratune.testing.faults` are there, also for processes that the test starts."""
    from bratune.kernels import registry
    from bratune.testing import faults

    faults.install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A meter that times what it has ``made`` of a call, and a list of what the energy was asked of."""
    from bratune.measure.meter import Measurement

    class Compiling:
        def __init__(self) -> None:
            self.energy_of: list[Any] = []

        def made(self) -> None: ...

        def measure(self, call: Any, settings: Any, *, before: Any = None) -> Measurement:
            return Measurement(samples_ms=(1.0,), run=self.made)

        def energy_fields(self, call: Any, machine: Any, images: int) -> dict[str, Any]:
            self.energy_of.append(call)
            return {}

    meter = Compiling()
    for module in ("measure.energy", "run.measure_cell"):
        monkeypatch.setattr(f"bratune.{module}.energy_fields", meter.energy_fields)
    return meter


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)  # tensors are small: a second thread costs more time in waiting than it saves


@pytest.fixture(autouse=True)
def _no_plans_of_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` chooses in a test must not depend on plans that somebody tuned on this machine."""
    monkeypatch.setenv("BRATUNE_LOOKUP", "off")
