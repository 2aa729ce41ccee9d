"""The command line: options as numbers, files and environment, exit codes, one sentence per error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import forks

from bratune.cli import run
from bratune.cli.options import settings_of
from bratune.cli.profile import command
from bratune.cli.progress import Progress
from bratune.record import Record
from bratune.store import Store

ROOT = Path(__file__).resolve().parents[2]
# A run of a second or so: one stage, two backends, few samples.
TINY = (
    "--device cpu --res 64 --n-win 2 --topks 1,2,3,-2 --stage 1 --backend gather --backend dense "
    "--min-time 1ms --timeout 50ms"
)


def bratune(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    code = run(arguments.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def options_of(arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return command.make_context("profile", arguments.split()).params


# --- bad inputs --------------------------------------------------------------------------------------

BAD = [
    ("profile --gpu a1000x", 2, "no GPU is called 'a1000x'"),
    ("profile --gpu a100 --measured", 5, "cannot be measured here"),
    ("profile --device cuda:99", 5, "is not here"),
    ("profile --device tpu", 2, "device 'tpu' is not known"),
    ("profile --backend warp", 2, "no backend is called 'warp'; these are:"),
    ("profile --skip warp", 2, "no backend is called 'warp'"),
    ("profile --backend gather --skip gather", 2, "no backend is left"),
    ("profile --model resnet50", 2, "no model is called 'resnet50'; these are: biformer_tiny"),
    ("profile --model biformer_tinny", 2, "did you mean biformer_tiny?"),
    ("profile --task dancing", 2, "no task is called 'dancing'"),
    ("profile --res 0", 2, "resolution '0' is too small"),
    ("profile --res 5x", 2, "resolution '5x' is not a size; 512 or 800x1333"),
    ("profile --res abc", 2, "resolution 'abc' is not a size"),
    ("profile --res -224", 2, "resolution '-224' is not a size"),
    ("profile --res 31", 2, "both sides must be at least 32 pixels"),
    ("profile --n-win 8 --model biformer_stl", 2, "8 regions per side do not tile a 28x28 map; these do"),
    ("profile --n-win 0", 2, "regions per side must be at least 1"),
    ("profile --n-win seven", 2, "is not a list of whole numbers"),
    ("profile --n-win 7,0", 2, "regions per side must be at least 1"),
    ("profile --device cpu --host slow", 2, "--host is about a GPU that is not here"),
    ("profile --gpu a100 --host soon", 2, "--host soon is neither one of fast, typical, slow"),
    ("predict --gpu a100 --host 0", 2, "--host 0 is neither one of"),
    ("predict --gpu a100 --backend warp", 2, "no backend is called 'warp'"),
    ("predict --gpu a100 --validate README.md", 2, "leave --gpu and --gpu-spec out"),
    ("profile --topks 50,4,16,-2", 2, "top-k 50 is more than the 49 key regions"),
    ("profile --topks 1,4", 2, "topks needs one value per stage (4), not 2"),
    ("profile -b 0", 2, "batch size '0' is not a number of images"),
    ("profile -b many", 2, "1, 32 or auto would be"),
    ("profile --dtype int8", 2, "no dtype is called 'int8'"),
    ("profile --direction sideways", 2, "no direction is called 'sideways'"),
    ("profile --regime lazy", 2, "no regime is called 'lazy'; these are: eager, graph, compile"),
    ("profile --l2 tepid", 2, "these are: cold, warm, both"),
    ("profile --routes scenic", 2, "these are: recorded, random, local, same"),
    ("profile --effort heroic", 2, "these are: quick, standard, full"),
    ("profile --format xml", 2, "these are: table, json, csv, md, timm"),
    ("profile --min-time soon", 2, "'soon' is not a duration"),
    ("profile --timeout 0s", 2, "must be longer than nothing"),
    ("profile --max-noise loud", 2, "'loud' is not a percentage"),
    ("profile --stage 5", 2, "5 is not in the range"),
    ("profile --seed x", 2, "--seed x is no seed"),
    ("profile --suite imagenet", 2, "no suite is called 'imagenet'; these are: "),
    ("profile --config nowhere.yaml", 2, "nowhere.yaml cannot be read: No such file"),
    ("profile --images nowhere --stage 1 --backend gather", 2, "there are no pictures"),
    ("profile --checkpoint nowhere.pth", 1, "nowhere.pth"),
    ("profile --checkpoint README.md", 1, "README.md"),
    ("profile --no-such-flag", 2, "No such option"),
    ("profile surplus", 2, "unexpected extra argument"),
    ("profile -o README.md", 2, "--output takes a folder, README.md is a file"),
    ("profile -o runs/new.jsonl", 2, "runs/new.jsonl has the name of a file; runs/new would work"),
    ("profile -o /dev/null/x", 1, "records cannot be written"),
    ("explain --model resnet50", 2, "no model is called 'resnet50'"),
    ("explain --res abc", 2, "is not a size"),
    ("explain --fit 24XB", 2, "memory '24XB' is not an amount; 24GB, 80GiB or 512MB would be"),
    ("list cars", 2, "no list is called 'cars'; these are: backends, models, mixers, tasks"),
    ("list", 2, "Missing argument"),
    ("dance", 2, "no command is called 'dance'; these are: profile, tune"),
    ("proflie", 2, "did you mean profile?"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=[arguments for arguments, *_ in BAD])
def test_a_bad_input_gives_one_sentence_and_its_exit_code(
    arguments: str,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("a file")
    found, out, err = bratune(arguments, capsys)
    assert found == code, err
    assert said in err
    assert err.startswith("bratune: ")
    assert err.count("\n") == 1, "one sentence, on one line"
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists(), "nothing is written before the request is known to be sound"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: biformer_tiny", "no key is called 'modle'"),
        ("res: abc", "resolution 'abc' is not a size"),
        ("batch-size: [1, many]", "batch size 'many' is not a number of images"),
        ("- a\n- b", "holds a list"),
        ("res: [", "is not YAML"),
        ("config: other.yaml", "no key is called 'config'"),
    ],
)
def test_a_wrong_configuration_file_is_a_usage_error(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, _, err = bratune(f"profile --config {path} --dry-run", capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err


# --- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("--res 800x1333", "res", (800, 1333)),
        ("--img-size 512", "res", (512, 512)),
        ("-b 1 -b auto", "batch_size", (1, "auto")),
        ("--dtype bf16", "dtype", "bfloat16"),
        ("--n-win 7", "n_win", ((7,),)),
        ("--topks 1,4,16,-2", "topks", ((1, 4, 16, -2),)),
        ("--min-time 200ms", "min_time", 0.2),
        ("--budget 20m", "budget", 1200.0),
        ("--max-noise 0.5%", "max_noise", 0.5),
        ("--regime eager --regime graph", "regime", ("eager", "graph")),
        ("--model BiFormer_Tiny", "model", ("biformer_tiny",)),
        ("--no-whole-model", "whole_model", False),
    ],
)
def test_options_become_numbers(
    arguments: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options_of(arguments, monkeypatch)[name] == value


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("res: 512\nbatch_size: [2, 4]\nn-win: 8\nmodel: biformer_small\nmin-time: 1s\n")
    monkeypatch.setenv("BRATUNE_RES", "256")
    monkeypatch.setenv("BRATUNE_BATCH_SIZE", "16 32")
    given = options_of(f"--config {path} -b 1", monkeypatch)
    assert (given["res"], given["batch_size"], given["n_win"]) == ((256, 256), (1,), ((8,),))
    assert (given["model"], given["min_time"]) == (("biformer_small",), 1.0)
    assert options_of(f"--config {path}", monkeypatch)["batch_size"] == (16, 32)


def test_dumped_settings_give_the_same_settings_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (
        "--res 800x1333 -b 2 -b auto --dtype fp16 --topks 1,4,16,-2 --l2 both --no-whole-model --amp -o out"
    )
    code, out, _ = bratune(f"profile {asked} --dump-config", capsys)
    assert code == 0
    path = tmp_path / "run.yaml"
    path.write_text(out)
    again, before = options_of(f"--config {path}", monkeypatch), options_of(asked, monkeypatch)
    assert again == before


def test_a_suite_fills_in_what_the_command_line_leaves_open(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bratune(
        "profile --suite yolo-640 --model biformer_tiny -b 1 --device cpu --dry-run", capsys
    )
    assert code == 0
    assert "biformer_tiny stage 3 attention by gather on same routes" in out
    assert "biformer_small" not in out


# --- verbs -------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bratune("profile --device cpu --dry-run", capsys)
    assert (code, err) == (0, "")
    assert "biformer_tiny stage 1 attention by gather" in out
    assert "cells; sampling takes" in out
    assert list(tmp_path.iterdir()) == []


def test_whole_models_are_planned_and_their_names_known_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bratune("profile --device cpu --dry-run --no-stages --forms lean,dense", capsys)
    assert (code, err) == (0, "")
    assert out.splitlines()[1:3] == [
        f"biformer_tiny ({form}), batch 1, eager" for form in ("lean", "dense everywhere")
    ]
    assert len(out.splitlines()) == 4
    code, out, err = bratune("profile --device cpu --forms runtme", capsys)
    assert (code, out) == (2, "")
    assert "did you mean runtime?" in err
    code, out, err = bratune("profile --device cpu --peers nosuchnet", capsys)
    assert code != 0
    assert "nosuchnet" in err or "timm" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["backends", "models", "tasks", "suites", "gpus"])
@pytest.mark.parametrize("style", ["table", "json", "csv", "md"])
def test_lists_come_in_every_format(what: str, style: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bratune(f"list {what} --format {style} --device cpu", capsys)
    assert code == 0
    assert len(json.loads(out) if style == "json" else out.splitlines()) >= 4


def test_explain_says_how_large_a_batch_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bratune("explain --gpu rtx4090 --fit 24GB --direction fwd-bwd --format json", capsys)
    assert code == 0
    batches = {fit["backend"]: fit["batch"] for fit in json.loads(out)["fit"]}
    assert batches["triton"] > batches["gather"] > 0
    code, out, _ = bratune("explain --gpu rtx4090 --fit 40MB", capsys)
    assert "not one image" in out


def test_explain_names_every_backend_with_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bratune("explain --model biformer_small --task detection --device cpu", capsys)
    assert code == 0
    assert "800x1333 (padded to 800x1344)" in out
    assert "+46 %" in out
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = bratune("explain --gpu v100-16 --format json", capsys)
    facts = json.loads(out)
    assert set(facts[0]["reasons"]) >= {"gather", "dense", "sparse", "reference", "triton"}
    assert facts[0]["optimal_n_win"] == pytest.approx(14.6, abs=0.05)
    assert facts[0]["optimal_keys"] == pytest.approx(56 * 56 / 14.6**2, abs=0.1)


def test_explain_answers_for_every_model_batch_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "explain --gpu a100 --n-win 7,14 --topks 1,4,16,-2 --topks 2,8,32,-2 -b 1 -b 8 "
    code, out, _ = bratune(asked + "--format json --fit 24GB", capsys)
    assert code == 0
    data = json.loads(out)
    found = {
        (f["batch"], f["stage"]["n_win"], f["stage"]["topk"])
        for f in data["stages"]
        if f["stage"]["index"] == 2
    }
    assert found == {(batch, n_win, k) for batch in (1, 8) for n_win in (7, 14) for k in (4, 8)}
    assert len({(f["setting"], f["backend"]) for f in data["fit"]}) == len(data["fit"])
    assert len({f["setting"] for f in data["fit"]}) == 4
    code, out, _ = bratune("explain --gpu a100 --n-win 7,14", capsys)
    titles = [line for line in out.splitlines() if line.startswith("biformer_tiny")]
    assert [title.split(" · ")[-2] for title in titles] == ["S 7", "S 14"]
    assert "S 7 ·" not in bratune("explain --gpu a100", capsys)[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--n-win 7,14", {((7,), None), ((14,), None)}),
        ("--n-win 7 --n-win 14", {((7,), None), ((14,), None)}),
        ("--n-win 7,7", {((7,), None)}),
        ("--n-win 7,7,14,7", {((7, 7, 14, 7), None)}),
        ("--n-win 7 --topks 1,4,16,-2 --topks 2,8,32,-2", {((7,), (1, 4, 16, -2)), ((7,), (2, 8, 32, -2))}),
        ("", {((), None)}),
    ],
)
def test_lists_of_s_and_top_k_are_every_pair(
    text: str,
    said: set[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert {(one["n_win"], one["topks"]) for one in settings_of(options_of(text, monkeypatch))} == said
    config = tmp_path / "run.yaml"
    capsys.readouterr()
    assert run(["profile", "--dump-config", *text.split()]) == 0
    config.write_text(capsys.readouterr().out)
    again = options_of(f"--config {config}", monkeypatch)
    assert {(one["n_win"], one["topks"]) for one in settings_of(again)} == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n-win: 7\ntopks: [1, 4, 16, -2]", {((7,), (1, 4, 16, -2))}),
        ("n-win: [7, 7, 14, 7]", {((7, 7, 14, 7), None)}),
        ("n-win: [7, 14]", {((7,), None), ((14,), None)}),
        ("n-win: [[7], [14]]", {((7,), None), ((14,), None)}),
        ("topks: [[1, 4, 16, -2], '2,8,32,-2']", {((), (1, 4, 16, -2)), ((), (2, 8, 32, -2))}),
    ],
)
def test_a_file_gives_lists_of_s_and_top_k(
    text: str, said: set[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    given = options_of(f"--config {path}", monkeypatch)
    assert {(one["n_win"], one["topks"]) for one in settings_of(given)} == said


def test_predict_says_s_and_top_k_where_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "predict --gpu a100 --no-compile -b 1 --backend gather --task segmentation "
    _, out, _ = bratune(asked + "--n-win 8,16 --topks 1,4,16,-2 --topks 4,4,16,-2", capsys)
    rows = [line.split() for line in out.splitlines() if line.startswith("a100 ")]
    assert [row[2:5] for row in rows if row[4] == "model"] == [
        [n_win, topk, "model"] for n_win in ("8", "16") for topk in ("1,4,16,-2", "4,4,16,-2")
    ]
    stages = [tuple(row[2:6]) for row in rows if row[4] == "stage"]
    assert len(stages) == len(set(stages)) == 8, "a stage that settings share stands once"
    _, out, _ = bratune(asked, capsys)
    assert out.splitlines()[0].split()[:3] == ["gpu", "batch", "what"]


def test_predict_gives_one_refusal_per_reason_and_fails_where_nothing_has_a_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = bratune("predict --gpu a100 --backend native -b 1 -b 64", capsys)
    assert (code, out.splitlines()) == (1, ["a100 native: not there: runs on CPUs, found A100-SXM4-80GB"])
    code, out, err = bratune("predict --gpu t4,v100-16 --dtype bf16", capsys)
    assert (code, out, err.count("arithmetic"), err.count("\n")) == (2, "", 2, 3)
    code, out, err = bratune("predict --gpu t4,a100 --backend gather -b 1 --dtype bf16", capsys)
    assert code == 0
    assert len([line for line in err.splitlines() if "no bfloat16 arithmetic" in line]) == 1
    code, out, _ = bratune("predict --gpu t4 --backend gather -b 1 --format json", capsys)
    assert {json.loads(line)["dtype"] for line in out.splitlines()} == {"float16"}


def test_every_s_of_a_profile_has_its_own_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = f"profile --gpu a100 --n-win 7,14 --backend gather --stage 1 -o {tmp_path} --format "
    _, out, err = bratune(asked + "table", capsys)
    assert err.count("is not here: rows are modelled") == 1
    assert [line for line in out.splitlines() if line.startswith("S ")] == [
        "S 7 · top-k as published",
        "S 14 · top-k as published",
    ]
    _, out, _ = bratune(asked + "json", capsys)
    assert {row["n_win"] for row in json.loads(out) if row["part"] == "attention"} == {"7", "14"}


@pytest.mark.parametrize(
    "words",
    [
        "profile --gpu a100 --stage 1 --backend gather -o {folder}",
        "predict --gpu a100 -b 1 --backend gather --no-compile -o {folder}/records.jsonl",
    ],
)
def test_a_model_that_is_asked_again_adds_no_rows(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, file = words.format(folder=tmp_path), tmp_path / "records.jsonl"
    bratune(asked, capsys)
    before = file.read_bytes()
    assert bratune(asked, capsys)[0] == 0
    assert file.read_bytes() == before
    assert bratune(f"{asked} --host slow", capsys)[0] == 0
    assert len(file.read_bytes()) > len(before), "another host is another answer"


def test_a_slow_host_makes_modelled_launches_slow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "--gpu a100 --backend gather -b 1 --format json --host"
    times = []
    for verb in (f"profile -o {tmp_path} --no-stages", "predict --no-compile"):
        for host in ("fast", "60us"):
            _, out, _ = bratune(f"{verb} {asked} {host}", capsys)
            rows = json.loads(out) if out.startswith("[") else [json.loads(line) for line in out.splitlines()]
            times.append(
                next(r["median_ms"] for r in rows if r["part"] == "model" and r["evidence"] == "modelled")
            )
    assert times[:2] == times[2:]
    assert times[1] == pytest.approx(times[0] * 60 / 8)


def test_a_gpu_that_is_not_here_gives_modelled_rows_and_says_so_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = bratune(f"profile --gpu a100 --res 224 --backend gather --stage 1 -o {tmp_path}", capsys)
    assert code == 0
    assert "is not here: rows are modelled, not measured" in err.splitlines()[0]
    assert "modelled, not measured" in out
    rows = list(Store(tmp_path / "records.jsonl").records())
    assert {row.evidence for row in rows} == {"modelled"}
    (line,) = [line for line in out.splitlines() if line.startswith("1 x2")]
    assert "x/÷ " in line, "no GPU was measured yet: a factor, not a percentage below zero"
    assert "x/÷ F: modelled" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--res 512", "S = 7 of classification pads the 64x64 map of stage 2 to 70x70; --task segmentation"),
        ("--res 512 --n-win 7", ""),  # chosen, so nothing to learn
        ("--res 224", ""),
        ("--task detection", ""),  # no task divides its maps
    ],
)
def test_whoever_did_not_choose_s_learns_that_it_pads(
    arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, err = bratune(f"profile --gpu a100 --backend gather {arguments} -o {tmp_path}", capsys)
    notes = [line for line in err.splitlines() if line.startswith("biformer_tiny: S = ")]
    assert len(notes) == bool(said)
    assert said in "".join(notes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A real run in this process: its folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("tiny")
    words = [sys.executable, "-m", "bratune", "profile", *TINY.split(), "-o", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with forks():
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return folder, result.stdout, result.stderr


def test_a_run_shows_its_table_on_stdout_and_where_its_rows_are_on_stderr(
    tiny: tuple[Path, str, str],
) -> None:
    folder, out, err = tiny
    assert "gather" in out
    assert "dense" in out
    assert "residual" in out
    assert "[1/" not in out
    last = err.splitlines()[-1]
    assert last.startswith(f"results: {folder / 'records.jsonl'}   again: bratune profile --device cpu")
    rows = Store(folder / "records.jsonl").records()
    begun = [(row.cell_id, row.pass_number) for row in rows if row.outcome == "started"]
    ended = [(row.cell_id, row.pass_number) for row in rows if row.outcome != "started"]
    assert rows[0].outcome == "started"
    assert sorted(begun) == sorted(ended)
    assert {number for _, number in ended} == {1, 2}  # the passes of `quick`


@pytest.mark.parametrize("style", ["json", "csv", "md", "timm"])
def test_stored_rows_answer_a_second_run_in_any_format(
    style: str, tiny: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)  # as in the first run: another number of threads is another machine
    code, out, err = bratune(f"profile {TINY} -o {tiny[0]} --format {style}", capsys)
    assert code == 0
    assert "rows were in" in err
    if style == "json":
        assert Record.from_dict(json.loads(out)[0]).backend == "gather"
    if style == "csv":
        assert out.startswith("schema,run_id,cell_id")


@pytest.mark.usefixtures("forked")
def test_a_full_disk_ends_the_run_with_one_sentence_and_keeps_earlier_rows(
    tiny: tuple[Path, str, str],
) -> None:
    path = tiny[0] / "records.jsonl"
    before = path.read_bytes()
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, resource.RLIM_INFINITY))\n"
        "from bratune.cli import run\n"
        f"sys.exit(run({['profile', *TINY.split(), '--fresh', '--no-isolate', '-o', str(tiny[0])]!r}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "bratune: records cannot be written" in result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert path.read_bytes() == before


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "interrupted"),
        pytest.param(signal.SIGTERM, "ended by SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_keeps_the_rows_and_exits_130(tmp_path: Path, number: signal.Signals, said: str) -> None:
    longer = ["--min-time", "1s", "--timeout", "60s"]  # than it takes this process to see the second line
    words = [sys.executable, "-m", "bratune", "profile", *TINY.split(), *longer, "--no-isolate"]
    words += ["-o", str(tmp_path)]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[2/"):
            process.send_signal(number)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert f"{said}; what was measured so far is saved, and the same command goes on" in rest
    assert "Traceback" not in rest
    rows = [row for row in Store(tmp_path / "records.jsonl").records() if row.outcome == "measured"]
    assert len(rows) >= 2


def test_strict_turns_failed_cells_into_exit_code_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bratune.kernels import registry

    kind = type(registry.get("dense"))
    monkeypatch.setattr(kind, "forward", lambda self, q, *args, **kwargs: q * 0)
    code, out, _ = bratune(f"profile {TINY} --strict --no-isolate -o {tmp_path}", capsys)
    assert code == 4
    assert "WRONG RESULT, not timed" in out


def test_the_page_of_the_command_line_is_what_help_says() -> None:
    from bratune.cli.help_page import page

    written = (ROOT / "docs" / "cli.md").read_text()
    # Versions of click wrap lines differently; words are what must agree.
    assert written.split() == page().split(), "python -m bratune.cli.help_page > docs/cli.md"


def test_the_time_left_follows_from_measured_cells_and_ends_with_the_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    moments = iter([0.0, 0.001, 0.002, 4.0, 4.0, 10.0, 10.0])
    progress = Progress(10, budget_s=12.0, clock=lambda: next(moments))
    for _ in range(4):  # two answered by stored rows, two measured
        progress.finish(Record(model="m", part="norm", median_ms=1.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == lines[1].replace("2/10", "1/10") == "[1/10] m norm: 1.000 ms"
    assert lines[2].endswith("(8 s left)")  # 7 cells of 4 s would be 28 s
    assert lines[3].endswith("(2 s left)")
