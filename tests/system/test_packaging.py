"""The house: what is importable from where, what the command line loads, what is installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bratune.kernels.fused.launch import OLDEST_TRITON
from bratune.machine import OLDEST_TORCH

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("kernels", "suites", "results")
ROOMS = {"kernels": ("fused", "mixers", "native")}  # folders inside, which are packages of their own

IMPORTED = """
import sys
from bratune.cli import run
code = run({arguments!r})
heavy = {{"torch", "pandas", "optuna", "plotly", "triton", "yaml", "numpy"}} & set(sys.modules)
print(code, sorted(heavy), file=sys.stderr)
"""


def python(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["profile", "--help"], ["list", "models"]])
def test_help_and_lists_load_nothing_heavy(arguments: list[str]) -> None:
    result = python(IMPORTED.format(arguments=arguments))
    assert result.stderr.strip() == "0 []"
    assert result.stdout


@pytest.mark.parametrize("verb", ["profile", "explain", "list"])
def test_every_verb_explains_itself(verb: str) -> None:
    result = python(IMPORTED.format(arguments=[verb, "--help"]))
    assert f"Usage: bratune {verb}" in result.stdout


@pytest.mark.parametrize("folder", LINKED)
def test_folders_at_the_top_are_reached_through_links_and_are_no_packages(folder: str) -> None:
    link = ROOT / "bratune" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
    assert not list((ROOT / folder).rglob("__init__.py")), "a package called kernels breaks transformers"
    inside = {p.name for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert inside == set(ROOMS.get(folder, ()))


def test_a_checkout_shadows_no_other_package() -> None:
    result = python("import importlib.util as u; print(getattr(u.find_spec('kernels'), 'origin', None))")
    assert result.stdout.strip() == "None"


def test_every_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = set(project["tool"]["setuptools"]["packages"])
    found = {"bratune", *(f"bratune.{name}" for name in LINKED)}
    found |= {f"bratune.{name}.{room}" for name, rooms in ROOMS.items() for room in rooms}
    for path in (ROOT / "bratune").rglob("__init__.py"):
        parts = path.relative_to(ROOT / "bratune").parent.parts
        if not parts or parts[0] not in LINKED:
            found.add(".".join(("bratune", *parts)))
    assert declared == found


def test_the_oldest_releases_are_the_same_wherever_they_are_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = dict(
        text.partition(";")[0].strip().split(">=") for text in project["dependencies"] if "5,<6" not in text
    )
    words = (ROOT / "README.md").read_text()
    oldest = ".".join(map(str, OLDEST_TORCH))
    assert needs["torch"] == oldest
    assert f"PyTorch {oldest} or newer" in words
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in words
    assert f"Triton {'.'.join(map(str, OLDEST_TRITON))} or newer" in words


def test_data_of_a_package_is_reached_as_a_resource() -> None:
    result = python(
        "import importlib.resources as r\n"
        "print(r.files('bratune.data').joinpath('gpus.csv').is_file(),"
        " r.files('bratune.suites').joinpath('yolo-640.yaml').is_file(),"
        " r.files('bratune.results').joinpath('README.md').is_file())"
    )
    assert result.stdout.split() == ["True", "True", "True"]


def test_public_names_are_those_that_are_promised_and_load_no_compiler() -> None:
    result = python(
        "import sys, bratune\n"
        "for n in bratune.__all__: getattr(bratune, n)\n"
        "print(*bratune.__all__, *sys.modules)"
    )
    assert result.returncode == 0, result.stderr
    found = set(result.stdout.split())
    assert {"create_model", "load_plan", "Plan", "BiLevelRoutingAttention"} <= found
    assert "torch" in found
    assert "torch._dynamo" not in found, "it takes as long to import as torch"
