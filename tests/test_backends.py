"""Every built-in backend passes the conformance suite that is shipped for everyone's."""

from __future__ import annotations

from bratune.testing import BackendConformance


class TestReference(BackendConformance):
    backend = "reference"


class TestGather(BackendConformance):
    backend = "gather"


class TestGatherSDPA(BackendConformance):
    backend = "gather-sdpa"


class TestDense(BackendConformance):
    backend = "dense"


class TestSparse(BackendConformance):
    backend = "sparse"
