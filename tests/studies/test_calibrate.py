"""The fit of public throughputs, on throughputs whose rates are known."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bratune import gpus
from bratune.errors import StoreError, UsageError
from bratune.predict.counted import KINDS, Load
from bratune.predict.roofline import rates
from bratune.studies import calibrate as study


def require_timm() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")


pytest.importorskip("scipy")

RATES = {"gemm": (0.8, 1.5), "conv": (1.1, 2.0), "copy": (0.0, 1.8), "elementwise": (0.0, 1.4)}


def source(board: str = "rtx4090", regime: str = "eager") -> study.FileSource:
    return study.FileSource(
        path=Path("x.csv"),
        board=gpus.resolve(board),
        regime=regime,
        layout="nchw",
        autocast=True,
        dtype="float16",
        torch="2.9.1",
        cuda="12.8",
    )


def made_models(count: int = 120) -> list[study.Counted]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        loads = {
            kind: Load(
                macs=float(rng.uniform(0.1, 4) * 1e9) if macs else 0.0,
                moved=float(rng.uniform(5, 200) * 1e6),
                launches=10,
            )
            for kind, (macs, _) in RATES.items()
        }
        found.append(study.Counted(model=f"m{i}", side=224, family=f"family{i % 20}", loads=loads))
    return found


def timed(
    models: list[study.Counted], board: str = "rtx4090", *, slower: float = 1.0, noise: float = 0.0
) -> list[study.Timed]:
    """Throughputs that the rates of `RATES` give on a board."""
    peak = rates(gpus.resolve(board), "float16")
    rng = np.random.default_rng(1)
    rows = []
    for m in models:
        us = sum(
            RATES[kind][0] * 2e6 * load.macs / peak.matrix + RATES[kind][1] * 1e6 * load.moved / peak.memory
            for kind, load in m.loads.items()
        )
        rows.append(study.Timed(m.model, m.side, 256, 1.0, us * slower * float(np.exp(noise * rng.normal()))))
    return rows


def test_rates_that_made_the_times_are_found_again() -> None:
    models = made_models()
    table = study.table_of(source(), timed(models), models)
    found = dict(zip(study.COLUMNS, study.solve(table.ideal, table.us), strict=True))
    for kind, (macs, moved) in RATES.items():
        if macs:
            assert found[kind, "macs"] == pytest.approx(macs, abs=0.08)  # drawn a little to the prior
        assert found[kind, "moved"] == pytest.approx(moved, abs=0.05)
    # A kind that no model has stays what it is drawn to.
    assert found["softmax", "moved"] == pytest.approx(study.PRIOR_TIMES)


def test_the_error_is_that_of_families_the_fit_has_not_seen() -> None:
    """A family whose times follow another law is predicted wrong, although half the models are its own."""
    models = made_models(200)
    odd = {m.model for m in models if m.family == "family3"}
    rows = [t._replace(us=t.us * 3) if t.model in odd else t for t in timed(models)]
    table = study.table_of(source(), rows, models)
    error = study.held_out(table)
    own = np.array([f == "family3" for f in table.families])
    assert np.median(error[own]) == pytest.approx(-np.log(3), abs=0.1)
    assert np.abs(np.median(error[~own])) < 0.05


def test_intervals_cover_models_of_other_families() -> None:
    models = made_models(400)
    table = study.table_of(source(), timed(models, noise=0.15), models)
    errors = study.held_out(table)
    assert 88 <= study.covered(table, errors) <= 99
    lo, hi = study.reach(errors)
    assert -0.45 < lo < -0.2
    assert 0.2 < hi < 0.45
    related, others = study.ratio_reaches(table, errors)
    assert related == pytest.approx(1.96 * 0.15 * 2**0.5, rel=0.2)
    assert others == pytest.approx(1.96 * 0.15 * 2**0.5, rel=0.2)


def test_a_slow_board_does_not_bend_the_rates_of_the_others() -> None:
    models = made_models()
    group = [
        study.table_of(source(board), timed(models, board, slower=slower), models)
        for board, slower in (("rtx3090", 1.0), ("rtx4090", 1.0), ("rtx5090", 1.6))
    ]
    found, slower = study.joint(group)
    assert slower == pytest.approx([1.0, 1.0, 1.6], abs=0.03)
    named = dict(zip(study.COLUMNS, found, strict=True))
    assert named["gemm", "macs"] == pytest.approx(0.8, abs=0.05)
    assert named["copy", "moved"] == pytest.approx(1.8, abs=0.05)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("amp-nchw-pt291-cu128-4090", ("rtx4090", "eager", "nchw", True, "float16", "2.9.1", "12.8")),
        ("amp-nhwc-pt240-cu124-rtx3090", ("rtx3090", "eager", "nhwc", True, "float16", "2.4.0", "12.4")),
        (
            "bf16-nchw-pt2111-cu130-pro6000maxq-dynamo",
            ("rtxpro6000-maxq", "compile", "nchw", False, "bfloat16", "2.11.1", "13.0"),
        ),
        ("fp32-nchw-pt240-cpu-i7_12700h-dynamo", None),
    ],
)
def test_the_name_of_a_file_says_what_it_was_measured_with(
    name: str, said: tuple[str, str, str, bool, str, str, str] | None
) -> None:
    found = study.parse_name(Path(f"benchmark-infer-{name}.csv"))
    if said is None:
        assert found is None
        return
    assert found is not None
    assert (
        found.board.key,
        found.regime,
        found.layout,
        found.autocast,
        found.dtype,
        found.torch,
        found.cuda,
    ) == said


def test_a_folder_without_throughputs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=r"holds no benchmark-infer-"):
        study.read_folder(tmp_path)
    (tmp_path / "benchmark-infer-amp-nchw-pt291-cu128-4090.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StoreError, match="no timm inference table"):
        study.read_folder(tmp_path)


def test_the_command_writes_what_the_package_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [*made_models(80), study.Counted(model="resnet50", side=224, family="resnet", loads={})]
    models[-1] = study.Counted(model="resnet50", side=224, family="resnet", loads=models[0].loads)
    for board in ("4090", "5090"):
        path = tmp_path / f"benchmark-infer-amp-nchw-pt291-cu128-{board}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["model", "infer_img_size", "infer_samples_per_sec", "infer_batch_size", "infer_gmacs"]
            )
            for t in timed(models, f"rtx{board}"):
                writer.writerow([t.model, t.side, 1e6 / t.us, t.batch, t.gmacs])
            writer.writerow(["failed", 224, "", "", ""])
            writer.writerow(["small", 224, 9e5, 64, 0.01])
    monkeypatch.setattr(study, "count_models", lambda *_, **__: models)
    out = tmp_path / "calibration.json"
    found = CliRunner().invoke(study.main, [str(tmp_path), "-o", str(out)])
    assert found.exit_code == 0, found.output
    data = json.loads(out.read_text())
    assert [f["gpu"] for f in data["fits"]] == ["rtx4090", "rtx5090"]
    assert data["carried"]["eager"]["gpus"] == ["rtx4090", "rtx5090"]
    assert "compile" not in data["carried"]
    assert set(data["fits"][0]["moved"]) == set(KINDS)
    assert data["fits"][0]["held_out"]["median_pct"] < 1
    with (tmp_path / "published.csv").open() as file:
        shown = list(csv.DictReader(file))
    assert [(row["model"], row["gpu"]) for row in shown] == [("resnet50", "rtx4090"), ("resnet50", "rtx5090")]


def test_counts_are_kept_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_timm()
    cache = tmp_path / "counts.jsonl"
    first = study.count_models([("resnet18", 64), ("no_such_model", 64)], cache)
    assert [c.model for c in first] == ["resnet18"]
    assert first[0].family == "resnet"
    cache.write_text(cache.read_text() + '{"stamp": "torn')

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr(study, "count_peer", refuse)
    assert study.count_models([("resnet18", 64)], cache) == first
