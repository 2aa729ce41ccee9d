"""Building the library: with no compiler, a broken one, nowhere to write, twice at once, and into a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bratune.kernels.native import build
from bratune.kernels.native.build import BuildError

# A compiler that takes a moment, notes that it ran, and writes what it was given as output.
COMPILER = """#!/bin/sh
echo run >> {log}
sleep 0.2
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo library > "$2"; fi; shift; done
"""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "bundled", lambda: None)
    return tmp_path


def compiler(folder: Path, text: str) -> Path:
    path = folder / "mycc"
    path.write_text(text.format(log=folder / "log"))
    path.chmod(0o755)
    return path


def test_without_a_compiler_one_sentence_says_what_brings_one(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "compilers", lambda: ())
    with pytest.raises(
        BuildError, match=r"needs a C compiler and finds none .*pip install 'bratune\[native\]'"
    ):
        build.find_or_build()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "#!/bin/sh\necho 'call.h:1: error: no such thing' >&2\nexit 1\n",
            "mycc fails: call.h:1: error: no such",
        ),
        ("#!/no/such/interpreter\n", "mycc cannot be started"),
    ],
    ids=["fails", "does not start"],
)
def test_a_broken_compiler_is_a_reason_and_leaves_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setenv("CC", str(compiler(fresh, text)))
    with pytest.raises(BuildError, match=reason):
        build.find_or_build()
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".lock"]


def test_a_compiler_that_fails_leaves_the_next_one_its_chance(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = fresh / "bad"
    bad.mkdir()
    commands = [
        (str(compiler(bad, "#!/bin/sh\nexit 1\n")),),
        (str(compiler(fresh, COMPILER)),),
    ]
    monkeypatch.setattr(build, "compilers", lambda: tuple(commands))
    assert build.find_or_build().read_text() == "library\n"


def test_a_cache_that_cannot_be_written_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setenv("CC", str(compiler(fresh, COMPILER)))
    with pytest.raises(BuildError, match=r"which cannot be written \(.*\); XDG_CACHE_HOME=DIR"):
        build.find_or_build()


def test_processes_that_meet_build_once(fresh: Path) -> None:
    code = (
        "from bratune.kernels.native import build\n"
        "build.bundled = lambda: None\n"
        "print(build.find_or_build().read_text().strip())"
    )
    path = compiler(fresh, COMPILER)
    root = Path(__file__).resolve().parents[3]
    env = os.environ | {"CC": str(path), "XDG_CACHE_HOME": str(fresh / "cache")}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["library"] * 3
    assert (fresh / "log").read_text() == "run\n"


def test_other_sources_or_another_compiler_are_another_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(compiler(fresh, COMPILER)))
    first = build.find_or_build()
    assert build.find_or_build() == first
    monkeypatch.setattr(build, "source_digest", lambda: "changed")
    second = build.find_or_build()
    (fresh / "mycc").write_text((fresh / "mycc").read_text() + "# newer\n")
    third = build.find_or_build()
    assert len({first, second, third}) == 3
    assert (fresh / "log").read_text() == "run\n" * 3


def test_a_library_that_came_along_is_taken_if_it_was_made_of_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (*build.SOURCES.glob("*.c"), *build.SOURCES.glob("*.h")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    build.source_digest.cache_clear()
    library = tmp_path / f"bratune-{build.source_digest()}.so"
    library.write_text("")
    assert build.find_or_build() == library
    (tmp_path / "call.h").write_text("/* another */")
    build.source_digest.cache_clear()
    assert build.bundled() is None
    build.source_digest.cache_clear()


@pytest.mark.parametrize("text", [COMPILER, "#!/bin/sh\nexit 1\n"], ids=["compiles", "fails"])
def test_a_wheel_holds_the_library_where_a_compiler_makes_it(tmp_path: Path, text: str) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel")
    if build.bundled() is not None:
        pytest.skip("this checkout has a library already")
    root = Path(__file__).resolve().parents[3]
    there = str(tmp_path)
    places = ["egg_info", "-e", there, "build", "-b", f"{there}/build"]
    command = [sys.executable, "setup.py", "-q", *places, "bdist_wheel", "-b", f"{there}/b", "-d", there]
    env = os.environ | {"CC": str(compiler(tmp_path, text))}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    if text == COMPILER:
        assert libraries == [f"bratune/kernels/native/bratune-{build.source_digest()}.so"]
        assert "-py3-none-any" not in wheel.name
        assert "-py3-none-" in wheel.name
    else:
        assert libraries == []
        assert wheel.name.endswith("-py3-none-any.whl")
        assert "will be built at their first use" in run.stderr


@pytest.mark.usefixtures("forked")
def test_the_backend_says_why_it_has_no_library() -> None:
    code = (
        "from bratune.kernels.registry import choose, get\n"
        "from bratune.machine import detect\n"
        "from bratune.problem import Problem\n"
        "p = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(4, 4), topk=2)\n"
        "m = detect('cpu')\n"
        "print(get('native').why_not(p, m)[0], choose(p, m).name, sep='|')"
    )
    root = Path(__file__).resolve().parents[3]
    env = os.environ | {"CC": "/no/such/cc"}
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    reason, chosen = run.stdout.strip().split("|")
    assert reason.startswith("the compiler /no/such/cc cannot be started")
    assert chosen == "gather-sdpa"
