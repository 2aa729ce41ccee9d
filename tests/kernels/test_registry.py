"""Backends by name: order, loading, backends of other packages, and what is said when one cannot run."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sample_plans import make_plan

from bratune.backend import Backend
from bratune.cell import Cell
from bratune.cli import run
from bratune.errors import UnknownNameError, UnsupportedError
from bratune.kernels import api, registry
from bratune.kernels.fused import launch
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.run.reuse import key_of
from bratune.work.contents import contents_of

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="a CPU")
GPU = Machine(kind="cuda", device="cuda:0", gpu_key="h100", gpu_name="a GPU", compute_capability="9.0")
PROBLEM = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(4, 4), topk=2)

MODULE = """
from bratune.kernels.reference import ReferenceBackend

class Mine(ReferenceBackend):
    name = "mine"

class Misnamed(ReferenceBackend):
    name = "another"

class Gather(ReferenceBackend):
    name = "gather"

class Broken:
    def __init__(self):
        raise RuntimeError("no licence found")

class Half:
    name = "half"
"""


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, str], str], None]]:
    """Gives a function that makes entry points visible as if a package had been installed."""

    def forget() -> None:
        registry.get.cache_clear()
        registry._entry_points.cache_clear()
        registry._chosen_name.cache_clear()
        api.forget_calls()

    def install(points: dict[str, str], package: str = "stranger") -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]))
        importlib.invalidate_caches()
        forget()

    (tmp_path / "stranger_backends.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    monkeypatch.undo()
    forget()


def attend(backend: str) -> torch.Tensor:
    q = torch.ones(1, 8, 8, 8)
    routes = torch.zeros(1, 4, 2, dtype=torch.int64)
    return api.routed_attention(q, q, q, routes, heads=1, region=(4, 4), backend=backend)


def test_the_order_of_preference_ends_with_the_slowest() -> None:
    assert registry.BACKENDS[-1] == "reference"
    assert set(registry.BACKENDS) >= {"gather-sdpa", "dense", "sparse", "gather", "flex"}


@pytest.mark.parametrize("name", registry.BACKENDS)
def test_every_listed_backend_is_there(name: str) -> None:
    made = registry.get(name)
    assert isinstance(made, Backend)
    assert made.name == name
    assert registry.get(name) is made


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"no backend is called 'gathr'.*auto, .*did you mean gather"):
        attend("gathr")


def test_the_registry_loads_no_backend_and_no_torch() -> None:
    code = "import bratune.kernels.registry as r, sys; r.names(); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0
    )


# --- what other packages add --------------------------------------------------------------------


def test_a_backend_of_another_package_runs_by_its_name(install: Callable[..., None]) -> None:
    install({"mine": "stranger_backends:Mine"})
    assert registry.known_names() == (*registry.BACKENDS, "mine")
    assert registry.package_of("mine") == "stranger 1.0"
    assert registry.package_of("gather") == ""
    assert torch.equal(attend("mine"), attend("reference"))


@pytest.mark.parametrize("allowed", ["mine", "all", "other, mine"])
def test_a_backend_of_another_package_is_tried_where_it_is_allowed(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    install({"mine": "stranger_backends:Mine"})
    assert registry.names() == registry.BACKENDS
    monkeypatch.setenv(registry.ALLOW_VARIABLE, allowed)
    assert registry.names() == (*registry.BACKENDS, "mine")
    assert registry.preference(PROBLEM, GPU)[-1] == "mine"


def test_an_installed_package_is_not_imported_unless_it_is_asked_for(
    install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + MODULE)
    install({"mine": "loud:Mine", "gather": "loud:Gather"})
    problem = PROBLEM.replace(batch=5)  # not chosen for before
    registry.choose(problem, CPU)
    attend("auto")
    attend("gather")
    for name in registry.names():
        registry.get(name)
    assert run(["list", "backends"]) == 0
    assert run(["explain", "--device", "cpu"]) == 0
    assert run(["profile", "--device", "cpu", "--dry-run"]) == 0
    plan = make_plan(backend="mine").save(tmp_path / "plans" / "plan.json")
    monkeypatch.setenv("BRATUNE_CONFIG_DIR", str(plan.parent))
    attend("auto")
    assert not (tmp_path / "ran").exists()
    registry.get("mine")
    assert (tmp_path / "ran").exists()


def test_a_row_names_the_package_of_a_strange_backend_and_is_not_reused_for_another_version(
    install: Callable[..., None],
) -> None:
    install({"mine": "stranger_backends:Mine"})
    cell = Cell(part="attention", problem=PROBLEM, backend="mine")
    assert contents_of(cell)["backend_package"] == "stranger 1.0"
    assert contents_of(cell.replace(backend="gather"))["backend_package"] == ""
    row = Record.of(cell, CPU, median_ms=1.0, **contents_of(cell))
    assert key_of(row) != key_of(row.replace(backend_package="stranger 1.1"))


def test_nobody_takes_the_name_of_a_built_in_backend(install: Callable[..., None]) -> None:
    install({"gather": "stranger_backends:Gather"})
    assert registry.known_names() == registry.BACKENDS
    assert type(registry.get("gather")).__module__ == "bratune.kernels.gather"


def test_built_in_backends_are_preferred_to_those_of_others(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install({"mine": "stranger_backends:Mine"})
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "mine")
    assert registry.choose(PROBLEM, CPU).name in registry.BACKENDS


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("absent", "no_such_module:Mine", "no_such_module:Mine of stranger cannot be imported here"),
        ("gone", "stranger_backends:Gone", "of stranger fails to load: AttributeError"),
        ("broken", "stranger_backends:Broken", "fails to load: RuntimeError: no licence found"),
        ("half", "stranger_backends:Half", "of stranger is no backend: it lacks"),
        ("misnamed", "stranger_backends:Misnamed", "calls itself 'another'; both names must be the same"),
    ],
)
def test_what_cannot_be_used_is_listed_and_says_why(
    install: Callable[..., None], name: str, value: str, reason: str
) -> None:
    install({name: value})
    assert name in registry.known_names()
    with pytest.raises(UnsupportedError, match=reason) as refusal:
        attend(name)
    assert refusal.value.reasons == registry.get(name).why_not(PROBLEM, CPU)


def test_two_packages_with_one_name_are_both_named(install: Callable[..., None]) -> None:
    install({"mine": "stranger_backends:Mine"}, "first")
    install({"mine": "stranger_backends:Mine"}, "second")
    with pytest.raises(UnsupportedError, match=r"'mine' is taken more than once: (first|second).*uninstall"):
        attend("mine")


@pytest.mark.usefixtures("forked")
def test_the_example_of_the_readme_is_a_backend_that_conforms(tmp_path: Path) -> None:
    readme = (Path(registry.__file__).parent / "README.md").read_text()
    _, mine, test = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    path = tmp_path / "test_einsum.py"
    path.write_text(mine + test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True
    )
    assert run.returncode == 0, run.stdout.decode()


# --- choosing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "region", "topk", "machine", "expected"),
    [
        (56, (8, 8), 1, CPU, "gather-sdpa"),
        (28, (4, 4), 4, CPU, "gather-sdpa"),
        (14, (2, 2), 16, CPU, "dense"),  # small regions on a small map
        (32, (4, 4), 16, CPU, "gather-sdpa"),
        (14, (2, 2), 4, CPU, "gather-sdpa"),  # few of many keys
    ],
)
def test_the_first_that_accepts_is_chosen(
    height: int,
    region: tuple[int, int],
    topk: int,
    machine: Machine,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = Problem(batch=1, height=height, width=height, heads=2, head_dim=32, region=region, topk=topk)
    for found, chosen in (("/a/library", "native"), ("no compiler", expected)):
        refusal = () if chosen == "native" else (found,)
        monkeypatch.setattr(type(registry.get("native")), "why_not", lambda *_, refusal=refusal: refusal)
        registry._chosen_name.cache_clear()
        assert registry.choose(problem, machine).name == chosen
    registry._chosen_name.cache_clear()


def test_the_order_on_a_gpu_is_that_of_the_table() -> None:
    problem = Problem(batch=1, height=14, width=14, heads=2, head_dim=32, region=(2, 2), topk=16)
    assert registry.preference(problem, GPU) == registry.names()


def test_kernels_are_refused_with_a_triton_that_they_never_ran_with(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "needs triton 3.6 or newer, found 3.4.0; a newer torch brings it along"
    backend = registry.get("triton")
    monkeypatch.setattr(launch, "_installed_triton", lambda: "3.4.0")
    assert backend.why_not(PROBLEM, GPU) == (refused,)
    assert backend.why_not(PROBLEM, dataclasses.replace(GPU, device="absent")) == ()
    assert launch.not_here("cuda:0") == [refused]
    monkeypatch.setattr(launch, "_installed_triton", lambda: "3.6.0+git1")
    assert backend.why_not(PROBLEM, GPU) == ()


def test_when_everybody_refuses_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = {name: registry.Unavailable(name, f"{name} is away") for name in ("one", "two")}
    monkeypatch.setattr(registry, "names", lambda: tuple(stubs))
    monkeypatch.setattr(registry, "get", stubs.__getitem__)
    problem = PROBLEM.replace(batch=77)  # not chosen for before
    with pytest.raises(UnsupportedError, match="one: one is away; two: two is away"):
        registry.choose(problem, GPU)
