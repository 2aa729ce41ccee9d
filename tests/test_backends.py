"""Every built-in backend passes the conformance suite that is shipped for everyone's."""

from __future__ import annotations

from typing import ClassVar

import pytest

from bratune.backend import Config
from bratune.testing import CASES, BackendConformance


class TestReference(BackendConformance):
    backend = "reference"
    cases = CASES[::4]  # compared with itself; what it must equal is in test_golden_ops.py


class TestGather(BackendConformance):
    backend = "gather"


class TestGatherSDPA(BackendConformance):
    backend = "gather-sdpa"


class TestDense(BackendConformance):
    backend = "dense"


class TestSparse(BackendConformance):
    backend = "sparse"


class TestTriton(BackendConformance):
    backend = "triton"


class TestFlex(BackendConformance):
    backend = "flex"
    # Each call of uncompiled FlexAttention traces anew, half a second, and to compile takes many: a few cases
    # here, all of them below.
    config: ClassVar[Config] = {"compiled": False}
    cases = CASES[::4]

    @pytest.mark.slow
    def test_no_setting_changes_the_result(self, device: str) -> None:
        super().test_no_setting_changes_the_result(device)


@pytest.mark.slow
class TestFlexOnEveryCase(BackendConformance):
    backend = "flex"
    config: ClassVar[Config] = {"compiled": False}
