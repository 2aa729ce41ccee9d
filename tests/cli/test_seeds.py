"""A seed that no generator takes is refused by every command that has one, before anything runs."""

from __future__ import annotations

import pytest

from bratune.cli import run

ASKED = {
    "profile": ["profile", "--stage", "4", "--backend", "gather", "--no-isolate"],
    "profile --dry-run": ["profile", "--dry-run"],
    "tune": ["tune", "--dry-run"],
    "visualize": ["visualize", "--image", "a.png"],
    "validate-proxy": ["validate-proxy", "--study", "accuracy"],
}


@pytest.mark.parametrize("seed", ["99999999999999999999", "-1", "4294967296", "1e3", "", "9" * 5000])
@pytest.mark.parametrize("verb", ASKED)
def test_a_seed_out_of_range_is_a_wrong_request(
    verb: str, seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ASKED[verb], f"--seed={seed}"]) == 2
    said = capsys.readouterr().err
    assert "is no seed; whole numbers from 0 to 4294967295 are" in said
    assert len(said) < 200
