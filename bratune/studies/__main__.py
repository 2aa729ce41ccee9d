"""``python -m bratune.studies NAME``: every study behind one door, with the manners of the command line."""

from __future__ import annotations

import sys

import click

from bratune.cli import LazyGroup, prepare, run

__all__ = ["main"]

# name -> where its command is, and one line for --help.
STUDIES = {
    "kernels": (
        "bratune.studies.kernels:main",
        "Prove the fused kernels on a GPU, beside their rivals.",
    ),
    "coverage": ("bratune.studies.coverage:main", "Do intervals hold the medians of other runs?"),
    "accuracy": ("bratune.studies.accuracy_show:main", "Which proxy ranks settings of trained weights?"),
    "calibrate": ("bratune.studies.calibrate:main", "Fit the rates of boards on published throughputs."),
    "search": ("bratune.studies.search:main", "How fast does each search find the front?"),
    "verdict": ("bratune.studies.verdict:main", "How often is the verdict wrong, on data of known truth?"),
    "scale": (
        "bratune.studies.scale:main",
        "How large do records become, and how slow to read?",
    ),
    "sweep": ("bratune.studies.sweep:main", "What does a sweep of many cells cost?"),
    "cpu-parts": ("bratune.studies.cpu_parts:command", "Where does the runtime's time go on a CPU?"),
    "launches": ("bratune.studies.launches:main", "What does the host take to launch a kernel?"),
    "launch-table": ("bratune.studies.launch_table:main", "Make the launch settings of the fused kernels."),
    "kernel-budgets": ("bratune.studies.kernel_budgets:main", "Write down what the fused kernels may take."),
    "resident-kernel": (
        "bratune.studies.resident_kernel:main",
        "Execute and count the kernel of docs/next-kernel.md.",
    ),
}


@click.group(
    cls=LazyGroup, table=STUDIES, kind="study", context_settings={"help_option_names": ["-h", "--help"]}
)
def studies() -> None:
    """Experiments about the tool itself, each with its figures."""


def main() -> int:
    """Run a study and return the exit code."""
    prepare()
    return run(group=studies, name="python -m bratune.studies")


if __name__ == "__main__":
    sys.exit(main())
