"""Every text of a plan is data in every export: nothing in it runs, and nothing in it adds a key."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from sample_plans import make_plan

from bratune.errors import PlanError, UsageError
from bratune.export.write import export
from bratune.tune.plan import Plan, load_plan

TARGETS = ("timm", "hydra", "mmseg", "mmdet", "yolo")
# Ends of docstrings, of comments and of quoted texts, in the languages of the targets.
PAYLOADS = {
    "docstring": 'x"""\nopen("PWNED", "w")\n"""',
    "comment": 'x\nopen("PWNED", "w")\n#',
    "carriage": 'x\ropen("PWNED", "w")\r#',
    "yaml": "x\nmodel: evil\nnc: 99999\n#",
    "separator": "x\u2028model: evil\u2029#",
    "quotes": "x\"'''\\",
    "brackets": "x], evil: [{}]",
}
# Where a text stands: in which part of a plan, under which name.
PLACES = {
    "gpu_name": ("machine", "gpu_name"),
    "gpu_key": ("machine", "gpu_key"),
    "task": ("", "task"),
    "evidence": ("evidence", "text"),
    "measured": ("", "measured"),
    "verdict": ("end_to_end", "verdict"),
    "backend": ("setting", "backends"),
    "default": ("default", "backends"),
    "config": ("setting", "configs"),
}


def plan_with(place: str, text: str) -> Plan:
    """A plan with a text where a file could have put it, past every check of files."""
    task = "segmentation"
    plan = make_plan(model="biformer_small", task=task, config='{"block": 64}', size=(512, 512), n_win=8)
    part, name = PLACES[place]
    value: Any = text
    if name == "backends":
        value = tuple(text if backend else "" for backend in getattr(plan, part).backends)
    if name == "configs":
        value = tuple(json.dumps({"block": text}) for _ in plan.setting.configs)
    if not part:
        return dataclasses.replace(plan, **{name: value})
    return dataclasses.replace(plan, **{part: dataclasses.replace(getattr(plan, part), **{name: value})})


def file_with(where: tuple[str | int, ...], value: Any, file: Path) -> Path:
    """The file of a sound plan in which one value is another."""
    data: Any = json.loads(json.dumps(make_plan().to_dict()))
    inner = data
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    file.write_text(json.dumps(data))
    return file


def shape(path: Path) -> Any:
    """What an export does, without its texts: statements and calls of a module, keys of a YAML file."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        tree = ast.parse(text)
        calls = sorted(ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
        return [type(node).__name__ for node in tree.body], calls
    data = yaml.safe_load(text)
    rows = [len(row[3]) for row in data.get("backbone", [])]
    return {key: value for key, value in data.items() if key not in ("backbone", "head")}, rows


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_text_of_a_plan_changes_no_statement_and_no_key(tmp_path: Path, target: str, payload: str) -> None:
    options: dict[str, Any] = {"style": "1.x"} if target in ("mmseg", "mmdet") else {}
    options["force"] = True
    options |= {"name": "mine"} if target in ("timm", "hydra") else {}
    for place in PLACES:
        sound = plan_with(place, "x")
        bad = plan_with(place, PAYLOADS[payload])
        file = f"{place}.yaml" if target in ("hydra", "yolo") else f"{place}.py"
        expected = shape(export(sound, target, tmp_path / "sound" / file, **options))
        assert shape(export(bad, target, tmp_path / "bad" / file, **options)) == expected, place


def test_a_config_arrives_as_it_is_in_a_row_of_a_model_file(tmp_path: Path) -> None:
    text = 'it\'s 64: "quoted", [x]'
    plan = plan_with("config", text)
    data = yaml.safe_load(export(plan, "yolo", tmp_path, force=True).read_text())
    rows = [row[3] for row in data["backbone"] if row[2] == "BRABlock" and row[3][-1] != -2]
    assert [row[-1] for row in rows] == [{"block": text}] * 2


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("machine", "gpu_name"), "x\ny", r"machine.gpu_name holds characters that are not printed: 'x\\ny'"),
        (("machine", "gpu_key"), "../../etc", "machine.gpu_key must be a name of letters, digits"),
        (("machine", "compute_capability"), "../x", "compute_capability must be two numbers, as 9.0"),
        (("machine", "sm_count"), "132/..", "machine.sm_count must be a whole number, not '132/..'"),
        (("task",), "a/../b", "task must be a name of letters, digits"),
        (("setting", "backends"), ["a b", "", "", ""], r"setting.backends\[0\] must be a name of letters"),
        (("setting", "configs"), ["{}", "[]", "{}", "{}"], r"setting.configs\[1\] is not a JSON object"),
        (
            ("setting", "configs"),
            ['{"a": {}}', "{}", "{}", "{}"],
            r"setting.configs\[0\] is not a JSON object",
        ),
        (("evidence", "values", "x"), "\x1b[2J", "evidence.values.x holds characters that are not printed"),
        (("diagnostics", "a\u202eb"), 1, r"a name in diagnostics holds characters .*'a\\u202eb'"),
        (("table_error", "mape"), float("nan"), "table_error.mape must be a finite number, not nan"),
        (("end_to_end", "tuned_ms"), float("inf"), "end_to_end.tuned_ms must be a finite number, not inf"),
        (("end_to_end", "tuned_ms"), 10**400, "end_to_end.tuned_ms must be a finite number, not 1000"),
        (("reason",), "\ud800", "reason holds characters that are not printed"),
    ],
)
def test_a_plan_file_with_hidden_text_or_a_number_that_is_none_is_refused(
    tmp_path: Path, path: tuple[str, ...], value: Any, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        load_plan(file_with(path, value, tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("stages", 0, "problem"), {"heads": 2}),
        (("stages", 0, "problem"), {"region": [1, 1]}),
        (("stages", 0, "problem", "heads"), 10**400),
        (("stages", 0, "problem", "region"), 7),
        (("stages", 0, "odd"), 7),
        (("machine", "odd"), 7),
        (("table_error",), {"n": 5, "mape": "small"}),
        (("diagnostics",), {"recall": 5}),
        (("diagnostics",), {"recall": {"plan": [{"stage": 1}]}}),
        (
            ("diagnostics",),
            {
                "recall": {
                    "plan": [dict.fromkeys(("stage", "block", "regions", "topk", "routed", "best"), "x")]
                }
            },
        ),
        (("evidence", "odd"), 7),
        (("setting", "odd"), 7),
        (("setting", "topks"), [1]),
    ],
)
def test_a_plan_file_that_is_odd_deep_inside_is_one_sentence(
    tmp_path: Path, path: tuple[str | int, ...], value: Any
) -> None:
    with pytest.raises(PlanError, match=r"plan\.json cannot be read"):
        load_plan(file_with(path, value, tmp_path / "plan.json"))


def test_a_plan_that_nests_without_end_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"a":' * 100_000)
    with pytest.raises(PlanError, match="is not a plan: it is not JSON"):
        load_plan(file)


def test_a_plan_of_ours_with_an_odd_name_is_saved_so_that_it_loads(tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(), command="bratune tune -o 'a\nb'")
    assert load_plan(plan.save(tmp_path / "plan.json")).command == r"bratune tune -o 'a\nb'"


@pytest.mark.parametrize("name", ["class", "a b", "x\n", "__import__('os')"])
def test_a_name_that_python_cannot_define_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no Python identifier"):
        export(make_plan(), "timm", tmp_path, name=name)
