"""Shared fixtures: the devices at hand and why a test does not run here."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))
        if "interpreter" in item.keywords and not interpreting:
            item.add_marker(pytest.mark.skip(reason="runs with TRITON_INTERPRET=1 (make test does)"))
        if "compile" in item.keywords and interpreting:
            item.add_marker(pytest.mark.skip(reason="cross-compiles; runs without TRITON_INTERPRET"))


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _no_plans_of_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` chooses in a test must not depend on plans that somebody tuned on this machine."""
    monkeypatch.setenv("BRATUNE_LOOKUP", "off")
