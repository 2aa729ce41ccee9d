"""A fork that stands for a new interpreter is a process of its own, as far as tests look at one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.usefixtures("forked"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux, as workers do"),
]

LOOK = r"""
import os, subprocess, sys
assert "torch" in sys.modules and "preloaded" not in sys.modules
print(os.getpid(), os.getppid(), os.getsid(0), os.getcwd(), *sys.argv[1:], os.environ["COLOUR"])
print(open("/proc/self/environ").read().strip("\0"), file=sys.stderr)
inner = "import os, sys; print(os.getppid(), 'torch' in sys.modules); sys.exit(5)"
found = subprocess.run([sys.executable, "-c", inner], stdout=subprocess.PIPE, text=True)
print(found.stdout == f"{os.getpid()} True\n", found.returncode)
sys.exit(3)
"""


def test_a_fork_has_a_parent_streams_an_environment_and_children_of_its_own(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOK, "one", "two"],
        cwd=tmp_path,
        env={"COLOUR": "red"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate()
    own = str(process.pid)
    assert out.splitlines() == [
        " ".join((own, str(os.getpid()), own, str(tmp_path), "one", "two", "red")),
        "True 5",
    ]
    assert err == "COLOUR=red\n"
    assert process.returncode == 3


def test_the_signal_that_ended_a_fork_is_told_and_a_module_runs_as_one() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    words = [sys.executable, "-m", "bratune", "list", "models", "--format", "json"]
    assert '"biformer_tiny"' in subprocess.run(words, capture_output=True, text=True, check=True).stdout
    words = [sys.executable, "-I", "-c", "import sys; sys.exit('torch' in sys.modules)"]  # no fork
    assert subprocess.run(words).returncode == 0
