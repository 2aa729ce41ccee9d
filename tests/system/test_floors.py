"""Imports only go down. The table below is the house; a module that is not in it has no place."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Lowest floor first. A name stands for the module, or for every module below the package.
FLOORS = (
    ("bratune.errors", "bratune.files", "bratune.text", "bratune.tables"),
    (
        "bratune.problem",
        "bratune.variant",
        "bratune.gpus",
        "bratune.machine",
        "bratune.cell",
        "bratune.record",
        "bratune.backend",
        "bratune.defaults",
        "bratune.engine",
        "bratune.measure.beside",  # arithmetic only, as the next: what rows say together
        "bratune.measure.verdict",
        "bratune.store",
        "bratune.data",
    ),
    ("bratune.kernels",),
    ("bratune.measure",),
    ("bratune.predict", "bratune.suites", "bratune.results", "bratune.testing"),
    ("bratune.work", "bratune.foreign", "bratune.proof"),
    ("bratune.run",),
    ("bratune.tune",),
    ("bratune.report", "bratune.export", "bratune.cluster"),
    ("bratune.studies",),
    ("bratune.cli",),
    ("bratune.profile",),
    ("bratune.__main__", "bratune.studies.__main__"),
)


def floor_of(module: str) -> int | None:
    levels = {name: level for level, names in enumerate(FLOORS) for name in names}
    above = [name for name in levels if module == name or module.startswith(name + ".")]
    return levels[max(above, key=len)] if above else None


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in (
        ("bratune", "bratune"),
        ("kernels", "bratune.kernels"),
        ("suites", "bratune.suites"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "bratune" and relative.parts[0] in ("kernels", "suites", "results"):
                continue  # links to the folders that are listed themselves
            name = ".".join((prefix, *relative.with_suffix("").parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("bratune.")}


@pytest.mark.parametrize("module", [m for m in modules() if m != "bratune"])
def test_imports_only_go_down(module: str) -> None:
    own = floor_of(module)
    assert own is not None, f"{module} stands on no floor: add it"
    above = {name for name in imports(modules()[module]) if (floor_of(name) or 0) > own}
    assert not above, f"{module} imports {sorted(above)} from above"


def test_a_class_name_means_one_thing() -> None:
    """Two classes of one name in the package send a reader to the wrong one."""
    places: dict[str, list[str]] = {}
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path.name}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
