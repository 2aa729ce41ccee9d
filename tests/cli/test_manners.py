"""The manners of the command line: help, silence, full disks, contradictions, widths, examples."""

from __future__ import annotations

import errno
import io
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from bratune import gpus
from bratune.cli import VERBS, cli, run
from bratune.errors import BratuneError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
FIRST, SECOND = RESULTS / "cpu-xeon-biformer-tiny-224.jsonl", RESULTS / "cpu-xeon-biformer-tiny-224-r2.jsonl"
PLAN = RESULTS / "cpu-xeon-biformer-tiny-224.plan.json"
# Commands that write to stdout without measuring, one per verb that does.
SPEAKING = {
    "profile": "profile --device cpu --dry-run",
    "tune": "tune --device cpu --dry-run",
    "export": f"export {PLAN} --to plan -o out.json",
    "compare": f"compare {FIRST} {SECOND}",
    "predict": "predict --gpu a100 --no-compile -b 1 --backend gather",
    "explain": "explain --device cpu",
    "list": "list models",
    "doctor": "doctor --device cpu --no-noise",
    "cache": f"cache ls {FIRST}",
    **{verb: f"{verb} --help" for verb in ("report", "visualize", "contribute", "validate-proxy")},
}


class Failing(io.RawIOBase):
    """Where every write fails."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(self.number, "No space left on device")


def test_every_verb_is_asked_to_write() -> None:
    assert set(SPEAKING) == set(VERBS)


@pytest.mark.parametrize("verb", SPEAKING)
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EPIPE, 141)], ids=["full", "pipe"])
def test_an_output_that_cannot_be_written_is_one_sentence(
    verb: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Failing(number)), write_through=True)
    )
    monkeypatch.setattr(sys, "stderr", said)
    found = run(SPEAKING[verb].split())
    sys.stdout = sys.__stdout__
    assert found == code, said.getvalue()
    complaint = "bratune: the output cannot be written: No space left on device\n"
    assert said.getvalue().endswith(complaint) == (code == 1)
    assert "Traceback" not in said.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_process_with_a_full_or_closed_stdout_ends_quietly() -> None:
    words = [sys.executable, "-m", "bratune", "list", "gpus", "--format", "json"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        1,
        "bratune: the output cannot be written: No space left on device\n",
    )
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before it writes
    assert (process.wait(), process.stderr.read()) == (141, b"")


def test_without_arguments_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: bratune")
    assert captured.err == ""
    assert run(["cache"]) == 0
    assert capsys.readouterr().out.startswith("Usage: bratune cache")


@pytest.mark.parametrize("words", ["-q predict", "predict -q", "predict --quiet"])
def test_quiet_leaves_only_errors_on_stderr(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = " --gpu a100 --no-compile -b 1 --backend gather"
    assert run((words + rest).split()) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "stage 1" in captured.out
    assert run((words + " --gpu a1000x").split()) == 2
    assert capsys.readouterr().err.startswith("bratune: no GPU is called 'a1000x'")
    assert run((words + " --res abc").split()) == 2, "also where the arguments cannot be read"
    assert capsys.readouterr().err.startswith("bratune: resolution 'abc'")
    assert run(("predict" + rest).split()) == 0
    assert "a100 -> " in capsys.readouterr().err


def test_verbose_says_versions_and_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", "--gpu", "a1000x", "-v"]) == 2
    said = capsys.readouterr().err
    assert re.match(r"3\.\d+\.\d+ · \w+ · bratune \S+ · torch \S+", said)
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("bratune: no GPU is called")


CONTRADICTIONS = [
    "profile --gpu a100 --device cpu --dry-run",
    "profile --gpu cpu --device cuda:0 --dry-run",
    "profile --gpu-spec {spec} --device cpu --dry-run",
    "profile --gpu a100 --gpu-spec {spec} --dry-run",
    "profile --no-stages --no-whole-model --dry-run",
    "tune --gpu a100 --device cpu --dry-run",
    "tune --gpu a100,h100 --device cpu --dry-run",
    "tune --gpu a100,h100 --gpu-spec {spec} --dry-run",
    "tune --device cpu --host slow --dry-run",
    "explain --gpu a100 --device cpu",
]


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_a_contradiction_is_refused_also_in_a_dry_run(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "board.yaml"
    spec.write_text("like: a100\nkey: mine\n")
    assert run(line.format(spec=spec).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bratune: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("profile --dry-run --config {path}", "res: 224\nmodel: biformer_tiny\nres: 512\n"),
        ("profile --dry-run --suite {path}", "task: a\ntask: b\n"),
        ("predict --gpu-spec {path}", "like: a100\nkey: a\nkey: b\n"),
    ],
)
def test_a_key_that_stands_twice_in_a_file_is_refused(
    words: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(text)
    assert run(words.format(path=path).split()) == 2
    assert re.search(r"line \d: the key '\w+' stands there twice", capsys.readouterr().err)


SUITE = (
    "about: x\ntask: classification\nres: 224\nn_win: 7\ntopks: published\nmodels: [biformer_tiny]\n"
    "batch_size: 1\nroutes: [recorded]\n"
)


@pytest.mark.parametrize(
    "text",
    [
        "task: 2026-13-45\n",
        f"task: {'[' * 5000}\n",
        f"task: {'9' * 5000}\n",
        "task: &a [*a]\n",
        "? [task]\n: a\n",
        "task: !!python/object/apply:os.system ['touch PWNED']\n",
        "\0",
        SUITE.replace("n_win: 7", "n_win: .inf"),
        SUITE.replace("n_win: 7", "n_win: {}"),
        SUITE.replace("topks: published", "topks: [.nan, 1, 1, 1]"),
        SUITE.replace("[biformer_tiny]", "&a [*a]"),
        SUITE.replace("batch_size: 1", "batch_size: [.inf]"),
        SUITE.replace("routes: [recorded]", "routes: 7"),
    ],
    ids=range(13),
)
@pytest.mark.parametrize("words", ["profile --dry-run --suite {path}", "predict --gpu-spec {path}"])
def test_a_file_that_is_odd_is_one_sentence(
    words: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.yaml"
    path.write_text(text)
    assert run(words.format(path=path).split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("bratune: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("columns", [60, 80, 140])
@pytest.mark.parametrize("what", ["backends", "models", "tasks", "suites", "gpus"])
def test_lists_fit_the_terminal(
    what: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(["list", what, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    # What cannot give way are numbers and their headings.
    assert max(map(len, text.splitlines())) <= max(columns, 80 if what in ("models", "gpus", "suites") else 0)
    assert run(["list", what, "--device", "cpu", "--format", "json"]) == 0
    monkeypatch.setenv("COLUMNS", "1000")
    run(["list", what, "--device", "cpu"])
    letters = "".join(capsys.readouterr().out.partition("]\n")[2].split())
    assert sorted(letters) == sorted("".join(text.split())), "nothing is cut"


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    RESULTS / "README.md",
    ROOT / "kernels" / "README.md",
]


def examples(page: Path) -> list[str]:
    """The commands that a page shows, those of docs/cli.md are the help texts'."""
    found: list[str] = []
    text = page.read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        plain = re.match(r"\s*(?:\$ )?(bratune [a-z-]+( .*)?)$", line)
        found += [plain[1]] if plain else re.findall(r"`(bratune [a-z-]+ [^`]*)`", line)
    commands = [re.split(r"\s+#|\s+\(|;|\s\||\s>", command)[0].strip() for command in found]
    return [
        c
        for c in dict.fromkeys(commands)
        if not re.search(r"\.\.\.|…|\w\||\[|<|FILE$|NAME$|\bthe\b|\bof\b", c)
    ]


@pytest.mark.parametrize(
    ("page", "line"),
    [pytest.param(page, line, id=f"{page.stem}: {line}") for page in PAGES for line in examples(page)],
)
def test_an_example_of_the_pages_is_a_command(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    context = click.Context(cli, info_name="bratune")
    try:
        command = cli.get_command(context, words[0])
        assert command is not None, f"no verb {words[0]}"
        if not {"--help", "-h"} & set(words) and not isinstance(command, click.Group):
            command.make_context(words[0], words[1:], parent=context)
    except (BratuneError, click.ClickException) as error:
        pytest.fail(f"{line}: {error}")
    if words[0] == "compare":
        from bratune.report.compare import load_set

        keys = {board.key for board in gpus.table()}
        for name in keys & set(words[1:]):  # stands for the records that ship
            load_set(name)


def test_modules_that_the_pages_name_are_there_after_importing_bratune() -> None:
    code = (
        "import sys, bratune\n"
        "assert not {'torch', 'pandas', 'numpy', 'bratune.store'} & set(sys.modules)\n"
        "print(len(bratune.store.read(['results'])) > 0, bratune.gpus.resolve('a100').key)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.returncode) == ("True a100\n", 0), result.stderr
    import bratune

    assert {"store", "create_model"} <= set(dir(bratune))
    with pytest.raises(AttributeError, match="no attribute 'stroe'"):
        bratune.stroe  # noqa: B018


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bratune pro", "profile"),
        ("bratune list mo", "models"),
        ("bratune profile --model biformer_t", "biformer_tiny"),
    ],
)
def test_a_shell_completes_verbs_and_names(line: str, expected: str) -> None:
    import os

    words = line.split()
    environment = {
        **os.environ,
        "_BRATUNE_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "import sys; from bratune.cli import main; sys.argv = ['bratune']; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert f"plain,{expected}" in result.stdout.splitlines(), result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_an_interrupt_is_answered_at_once_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = "profile --device cpu --res 64 --n-win 2 --topks 1,2,3,-2 --stage 1 --min-time 9s --timeout 60s"
    process = subprocess.Popen(
        [sys.executable, "-m", "bratune", *words.split(), "-o", str(tmp_path / "run")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "records.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    assert f"rows are in {tmp_path / 'run' / 'records.jsonl'}" in said
    assert f"the same command goes on: bratune {words} -o {tmp_path / 'run'}" in said
