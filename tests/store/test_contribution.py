"""What a run must be to stand in results/, and what of it goes there; every file there is held to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bratune.cell import Cell
from bratune.cli import run
from bratune.errors import StoreError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.store import Store
from bratune.store.contribution import TABLE_HEAD, prepare, read_strictly, row_files, why_not
from bratune.tune.plan import load_plan

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
MARK = "(one process)"
BOARD = "GPU-0a1b2c3d-0000-4000-8000-00c0ffee0000"
MACHINE = Machine(
    kind="cuda",
    device="cuda:0",
    gpu_key="h100",
    gpu_name="NVIDIA H100",
    gpu_uuid=BOARD,
    compute_capability="9.0",
    sm_count=132,
    memory_gib=80.0,
    driver="580.1",
    torch="2.13.0",
    triton="3.7.1",
    python="3.12.1",
    bratune="0.1.0",
)


def cell(backend: str = "gather", **values: Any) -> Cell:
    problem = Problem(batch=1, height=56, width=56, heads=2, head_dim=32, region=(8, 8), topk=1)
    return Cell(
        part="attention", problem=problem, backend=backend, model="biformer_small", task="classification",
        image=(224, 224), stage=1, block_count=4, n_win="7", topk="1", **values,
    )  # fmt: skip


def row(of: Cell | None = None, **values: Any) -> Record:
    given: dict[str, Any] = {
        "timestamp_utc": "2026-11-28T12:00:00Z",
        "median_ms": 1.0,
        "max_rel_err": 1e-3,
        "tolerance": 1e-2,
        "pass_number": 1,
        "passes": 2,
        "sampling": "some",
        "repro": "bratune profile --model biformer_small --res 224x224 -b 1 --stage 1 --backend gather",
        "git_sha": "0123abcd",
        "git_dirty": False,
    }
    return Record.of(of or cell(), MACHINE, **(given | values))


def passes(**values: Any) -> list[Record]:
    """Two passes of two cells, and the lines that came before."""
    return [
        row(cell(name), **({"pass_number": number} | values | how))
        for number in (1, 2)
        for name in ("gather", "dense")
        for how in ({"outcome": "started", "claimed_by": "myhost 12 34 56", "median_ms": None}, {})
    ]


def test_what_identifies_people_and_hosts_is_gone() -> None:
    failed = (
        "cannot open /home/jane/w/a.so on myhost, said jane; GPU-0a1b2c3d-0000-4000-8000-00c0ffee0000 ~/x/y"
    )
    rows = [*passes(), row(cell("sparse"), outcome="crashed", reason=failed, median_ms=None)]
    made = prepare(rows, names=("jane", "myhost"))
    text = "".join(one.to_json() for one in made.rows)
    for secret in ("jane", "myhost", "/home", "0a1b2c3d", "claimed_by", "started", "~/x"):
        assert secret not in text
    assert made.rows[-1].reason == "cannot open …/a.so on (name), said (name); (uuid) …/y"
    assert [one.cell for one in made.rows] == [one.cell for one in rows if one.outcome != "started"]


def test_cells_with_files_of_the_contributor_are_left_out() -> None:
    own = cell(extra=json.dumps({"images": "/home/jane/pictures"}))
    made = prepare([*passes(), row(own), row(own, pass_number=2)])
    assert (len(made.rows), made.left_out) == (4, 2)
    with pytest.raises(StoreError, match="nothing in it was measured"):
        prepare([row(own)])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"evidence": "modelled"}, "some rows are modelled"),
        ({"evidence": "replayed"}, "some rows are replayed"),
        ({"git_dirty": True}, "changes on top of 0123abcd"),
        ({"repro": ""}, "rows do not say their repro"),
        ({"torch": "", "sampling": ""}, "rows do not say their torch, sampling"),
        ({"cell_id": "0000"}, "row 0000 is not of the cell that it describes"),
        ({"cpu_wait_pct": 11.0}, "waited for a processor 11 % of the time"),
        ({"foreign_processes": 1}, "other processes used the GPU during 4 of 4"),
        ({"tolerance": None}, "4 times stand without a proof"),
        ({"max_rel_err": 0.1}, "4 times stand although their proof failed"),
        ({"grad_rel_err": 0.1}, "4 times stand although their proof failed"),
        ({"pass_number": 1}, "2 of 2 cells were measured in one process"),
        ({"repro": "bratune profile -o /home/jane/runs"}, "may name people or hosts in repro"),
    ],
    ids=str,
)
def test_a_run_that_is_not_fit_is_refused_with_the_reason(values: dict[str, Any], said: str) -> None:
    assert why_not(prepare(passes()).rows) == ()
    with pytest.raises(StoreError, match="not fit for results/: ") as error:
        prepare(passes(**values))
    assert said in str(error.value)


def test_rows_of_two_machines_are_no_file() -> None:
    with pytest.raises(StoreError, match=r"rows are of several torch: 2\.12\.0, 2\.13\.0"):
        prepare([*passes(), row(torch="2.12.0")])


def test_a_quiet_minority_of_disturbed_rows_is_no_reason() -> None:
    calm = [row(cell(), pass_number=n, cpu_wait_pct=1.0, foreign_processes=0) for n in range(1, 11)]
    assert (
        why_not([one.replace(gpu_uuid="") for one in [*calm, row(cpu_wait_pct=60.0, foreign_processes=1)]])
        == ()
    )


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Store(path).extend(passes())
    path.write_text(path.read_text() + "{nonsense}\n")
    with pytest.raises(StoreError, match="line 9: is not JSON"):
        read_strictly([tmp_path])


def test_contribute_writes_the_file_and_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Store(tmp_path / "runs" / "records.jsonl").extend(passes(throttle_reasons="sw_power_cap"))
    (tmp_path / "results").mkdir()
    readme = tmp_path / "results" / "README.md"
    readme.write_text(f"# R\n\n{TABLE_HEAD}\n| --- | --- | --- | --- |\n| `a.jsonl` | b | c | d |\n\nmore\n")
    assert run(["contribute", "runs", "--dry-run"]) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["README.md"]
    capsys.readouterr()
    assert run(["contribute", "runs", "--who", "J. Doe"]) == 0
    line = capsys.readouterr().out.strip()
    assert line == (
        "| `h100-biformer-small-224.jsonl` | NVIDIA H100, driver 580.1, torch 2.13.0; 2 passes; held back by "
        "sw_power_cap | J. Doe, 2026-11-28 | `bratune profile --model biformer_small --res 224x224 -b 1` |"
    )
    assert readme.read_text().splitlines()[4:] == ["| `a.jsonl` | b | c | d |", line, "", "more"]
    assert why_not(read_strictly([tmp_path / "results" / "h100-biformer-small-224.jsonl"])) == ()
    assert run(["contribute", "runs"]) == 2
    assert "--name h100-biformer-small-224-r2 would do" in capsys.readouterr().err
    assert run(["contribute", "runs", "--name", "../x"]) == 2


LINES = row_files((RESULTS / "README.md").read_text("utf-8"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_a_file_of_results_is_fit_to_be_there(path: Path) -> None:
    line = LINES.get(path.name, "")
    assert line, "results/README.md has a line for every file"
    rows = read_strictly([path])
    assert why_not(rows, single_process=MARK in line) == ()
    assert (MARK in line) == any(one.pass_number is None for one in rows), f"{MARK} marks what has no passes"


def test_results_hold_nothing_else() -> None:
    kinds = {".jsonl", ".plan.json", ".figure.json", ".json", ".md"}
    for path in RESULTS.iterdir():
        assert path.is_file()
        assert "".join(path.suffixes) in kinds, path.name
        if path.name.endswith(".plan.json"):
            load_plan(path)
    text = (RESULTS / "README.md").read_text("utf-8")
    assert set(LINES) <= {path.name for path in RESULTS.iterdir()}
    assert all(path.name in text for path in RESULTS.glob("*.plan.json"))
