"""Commands that stored rows name in ``repro`` still run, as ``bratune profile``."""

from __future__ import annotations

import shlex

import pytest

from bratune.profile.translate import main, translated


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (
            "whole_model",
            "--compile --peers swin_tiny,convnext_tiny",
            "--no-stages --l2 warm --regime eager --regime compile --peers swin_tiny,convnext_tiny "
            "--dtype fp32",
        ),
        (
            "whole_model",
            "--model biformer_small --only published,auto,runtime --rounds 20 -b 4 --dtype bfloat16",
            "--no-stages --l2 warm --model biformer_small --forms published,auto,runtime --batch-size 4 "
            "--dtype bfloat16",
        ),
        ("peers", "--peers runtime,gather,swin_tiny", "--no-stages --forms runtime,gather --peers swin_tiny"),
        ("peers", "--peers=swin_tiny -o x", "--no-stages --peers swin_tiny --output x"),
        (
            "stage_contest",
            "--backend dense --stage 3 --rounds 9",
            "--no-whole-model --backend dense --stage 3",
        ),
    ],
)
def test_an_earlier_command_is_told_to_profile(command: str, arguments: str, expected: str) -> None:
    words, gone = translated(command, shlex.split(arguments))
    assert words == ["profile", *shlex.split(expected)]
    assert gone == (["--rounds"] if "--rounds" in arguments else [])


@pytest.mark.parametrize("arguments", [["--nonsense", "1"], ["--only"]])
def test_a_flag_that_the_command_had_not_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("whole_model", arguments) == 2
    assert capsys.readouterr().err.startswith("bratune: ")


@pytest.mark.parametrize("command", ["whole_model", "peers", "stage_contest"])
def test_profile_knows_what_it_is_told(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bratune.cli.profile._run", lambda jobs, asked: ([[] for _ in jobs], [[] for _ in jobs])
    )
    arguments = "--device cpu --res 64 --model biformer_tiny -b 2 -o unused"
    assert main(command, shlex.split(arguments)) == 0
    assert f"python -m bratune.profile.{command} is now: bratune profile" in capsys.readouterr().err
