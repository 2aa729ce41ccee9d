"""Launch settings are a pure function of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bratune.errors import UnknownNameError
from bratune.kernels.fused import launch
from bratune.kernels.fused.call import full_config
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.studies import launch_table

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU")
STAGE_1 = Problem(
    batch=128, height=56, width=56, heads=2, head_dim=32, region=(8, 8), topk=1, dtype="bfloat16"
)
Rows = dict[tuple[str, str], tuple[dict[str, Any], ...]]


def gpu(capability: str) -> Machine:
    return Machine(
        kind="cuda", device="cuda:0", gpu_key="x", gpu_name="X", compute_capability=capability, sm_count=100
    )


def entry(problem: Problem, **settings: int) -> dict[str, Any]:
    return {"class": launch.problem_class(problem), "settings": settings}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Rows], None]]:
    """A function that replaces the shipped table by rows of (kind, architecture)."""

    def put(rows: Rows) -> None:
        monkeypatch.setattr(launch, "_table", lambda: rows)
        launch._settings_for.cache_clear()

    yield put
    launch._settings_for.cache_clear()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ("8.0", "sm80"),
        ("8.6", "sm86"),
        ("8.7", "sm86"),
        ("8.9", "sm89"),
        ("9.0", "sm90"),
        ("10.0", "sm100"),
        ("10.3", "sm100"),
        ("12.0", "sm120"),
        ("7.5", "sm80"),
    ],
)
def test_architecture_is_the_newest_that_is_not_newer(capability: str, expected: str) -> None:
    assert launch.architecture_of(gpu(capability)) == expected


def test_a_cpu_has_no_architecture() -> None:
    assert launch.architecture_of(CPU) == ""


def test_exact_class_wins_over_a_near_amount_of_work(table: Callable[[Rows], None]) -> None:
    other = STAGE_1.replace(batch=64)
    table({("gather_fwd", "sm90"): (entry(other, block_m=16), entry(STAGE_1, block_m=32))})
    assert launch.settings_for("gather_fwd", STAGE_1, gpu("9.0"))["block_m"] == 32


def test_nearest_amount_of_work_is_taken_of_the_same_tile_geometry(table: Callable[[Rows], None]) -> None:
    near, far = STAGE_1.replace(batch=64), STAGE_1.replace(batch=1)
    narrow = STAGE_1.replace(head_dim=16, scale=0.0)
    table(
        {
            ("gather_fwd", "sm90"): (
                entry(far, block_m=16),
                entry(near, block_m=32),
                entry(narrow, block_m=128),
            )
        }
    )
    assert launch.settings_for("gather_fwd", STAGE_1, gpu("9.0"))["block_m"] == 32


@pytest.mark.parametrize(
    ("machine", "problem"),
    [(gpu("8.0"), STAGE_1), (CPU, STAGE_1), (gpu("9.0"), STAGE_1.replace(head_dim=64, scale=0.0))],
    ids=["another architecture", "cpu", "another geometry"],
)
def test_without_an_entry_the_rules_hold(
    machine: Machine, problem: Problem, table: Callable[[Rows], None]
) -> None:
    table({("gather_fwd", "sm90"): (entry(STAGE_1, block_m=16),)})
    assert launch.settings_for("gather_fwd", problem, machine) == launch.KINDS["gather_fwd"](problem)


def test_an_entry_overrides_only_what_it_names(table: Callable[[Rows], None]) -> None:
    table({("gather_fwd", "sm90"): (entry(STAGE_1, num_warps=8),)})
    rules = launch.KINDS["gather_fwd"](STAGE_1)
    assert launch.settings_for("gather_fwd", STAGE_1, gpu("9.0")) == rules | {"num_warps": 8}


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_problem_class_of_the_suites_has_its_own_entry(architecture: str) -> None:
    exact = {
        (kind, tuple(sorted(row["class"].items())))
        for (kind, name), rows in launch._table().items()
        for row in rows
        if name == architecture
    }
    absent = [
        f"{kind}: {problem}"
        for problem in launch_table.problems()
        for kind in launch_table.kinds_of(problem)
        if (kind, tuple(sorted(launch.problem_class(problem).items()))) not in exact
    ]
    assert not absent, f"python -m bratune.studies launch-table --missing --architecture {architecture}"


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_entry_names_settings_that_its_kernel_has_and_how_it_was_found(architecture: str) -> None:
    machine = gpu(f"{architecture[2:-1]}.{architecture[-1]}")
    for problem in launch_table.problems():
        for kind in launch_table.kinds_of(problem):
            found = launch.settings_for(kind, problem, machine)
            assert found.keys() == launch.KINDS[kind](problem).keys()
    rows = [row for (_, name), rows in launch._table().items() if name == architecture for row in rows]
    assert {row["evidence"] for row in rows} <= {"modelled", "measured"}


def test_changing_an_answer_does_not_change_the_next_one() -> None:
    launch.settings_for("gather_fwd", STAGE_1, CPU)["block_m"] = 7
    assert launch.settings_for("gather_fwd", STAGE_1, CPU)["block_m"] == 64


def test_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(UnknownNameError, match="gather_fwd"):
        launch.settings_for("gather", STAGE_1, CPU)


@pytest.mark.parametrize("kind", launch.KINDS)
@pytest.mark.parametrize("region", [(1, 1), (3, 5), (8, 8), (32, 32)])
@pytest.mark.parametrize("head_dim", [16, 24, 32, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rules_give_powers_of_two_that_matrix_units_take(
    kind: str, region: tuple[int, int], head_dim: int, dtype: str
) -> None:
    problem = Problem(
        batch=2, height=32, width=32, heads=2, head_dim=head_dim, region=region, topk=1, dtype=dtype
    )
    settings = launch.KINDS[kind](problem)
    powers = {n: v for n, v in settings.items() if n.startswith(("block", "num_warps", "heads"))}
    assert all(value & (value - 1) == 0 for value in powers.values())
    assert min(settings["block_m"], settings["block_n"]) >= 16


SMALL = Problem(batch=16, height=14, width=14, heads=8, head_dim=32, region=(2, 2), topk=16, dtype="bfloat16")


@pytest.mark.parametrize(("image", "stationary"), [(2.0, 1.0), (1.0, 2.0)], ids=["stationary", "image"])
def test_regions_of_few_tokens_take_the_family_that_takes_less(
    table: Callable[[Rows], None], image: float, stationary: float
) -> None:
    def row(us: float, evidence: str = "modelled") -> dict[str, Any]:
        settings = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 1}
        return entry(SMALL, **settings) | {"evidence": evidence, "us": us}

    kinds = ("image_fwd", "kv_stationary_fwd")
    # Where the general family is known too, it may be the one.
    rows = {("image_fwd", "sm90"): (row(image),), ("kv_stationary_fwd", "sm90"): (row(stationary),)}
    for us, family in ((0.5, "gather"), (9.0, "stationary" if stationary < image else "image")):
        table(rows | {("gather_fwd", "sm90"): (row(us),)})
        assert full_config(SMALL, {}, gpu("9.0"))["forward"] == family
    table({("image_fwd", "sm90"): (row(image),), ("kv_stationary_fwd", "sm90"): (row(stationary),)})
    expected = "stationary" if stationary < image else "image"
    assert launch.cheapest(kinds, SMALL, gpu("9.0")) == f"{'kv_' * (expected != 'image')}{expected}_fwd"
    assert full_config(SMALL, {}, gpu("9.0"))["forward"] == expected
    assert full_config(SMALL, {"forward": "gather"}, gpu("9.0"))["forward"] == "gather"
    # Nothing is known of another architecture, and a measured time is not compared with a modelled one.
    assert launch.cheapest(kinds, SMALL, gpu("8.0")) == ""
    assert full_config(SMALL, {}, gpu("8.0"))["forward"] == "image"
    table(
        {("image_fwd", "sm90"): (row(image, "measured"),), ("kv_stationary_fwd", "sm90"): (row(stationary),)}
    )
    assert launch.cheapest(kinds, SMALL, gpu("9.0")) == ""
