"""The fused kernels pass what every backend passes: in the interpreter, and where there is one on a GPU."""

from __future__ import annotations

import pytest

from bratune.kernels.fused.call import INTERPRETING
from bratune.testing import CASES, BackendConformance

pytest.importorskip("triton")

# A program takes about 20 ms to interpret, so there only the smaller problems are asked.
_MOST_PROGRAMS = 24


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="runs with TRITON_INTERPRET=1 (make test does)")
class TestTritonInterpreted(BackendConformance):
    backend = "triton"
    cases = tuple(
        case
        for case in CASES
        if case.problem.batch * case.problem.heads * case.problem.regions <= _MOST_PROGRAMS
    )


@pytest.mark.gpu
class TestTritonOnGPU(BackendConformance):
    backend = "triton"
