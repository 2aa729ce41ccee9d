"""The GPU table: names, boards that share a name, MIG slices, own descriptions, dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bratune import gpus
from bratune.errors import ConfigError, UnknownNameError, UsageError
from bratune.machine import Machine


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ("a100", "a100"),
        ("A100", "a100"),
        ("a100-80gb", "a100"),
        ("a100_sxm4_40gb", "a100-40"),
        ("a100-pcie", "a100-pcie-40"),
        ("4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("v100", "v100-16"),
        ("h100-sxm", "h100"),
        ("orin", "orin-agx"),
    ],
)
def test_a_key_or_alias_names_one_board(asked: str, key: str) -> None:
    assert gpus.resolve(asked).key == key


def test_no_two_boards_share_a_key_or_alias() -> None:
    names = [name for board in gpus.table() for name in (board.key, *board.aliases)]
    assert len(names) == len(set(names))


def test_an_ambiguous_key_says_which_board_it_took_and_which_it_did_not() -> None:
    assert gpus.describe_choice("a100") == (
        "a100 -> A100-SXM4-80GB (documented default; also: a100-pcie-40, a100-40, a100-pcie-80)"
    )
    assert gpus.describe_choice("t4") == "t4 -> Tesla T4"


def test_an_unknown_key_lists_the_known_ones_and_a_close_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean rtx4090"):
        gpus.resolve("rtx409")


@pytest.mark.parametrize(
    ("name", "memory", "sms", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, 108, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, 108, "a100-40"),
        ("A100-PCIE-40GB", 39.4, 108, "a100-pcie-40"),
        ("NVIDIA A100 80GB PCIe", 79.3, 108, "a100-pcie-80"),
        ("Tesla T4", 14.7, 40, "t4"),
        ("NVIDIA H100 80GB HBM3", 79.2, 132, "h100"),
        ("NVIDIA H100 PCIe", 79.1, 114, "h100-pcie"),
        ("NVIDIA H200", 139.8, 132, "h200"),
        ("NVIDIA GeForce RTX 4090", 24.0, 128, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, 76, None),
        ("NVIDIA GeForce RTX 4090 D", 24.0, 114, None),
        ("NVIDIA GH200 480GB", 95.0, 132, "gh200"),
        ("NVIDIA A10G", 22.1, 80, "a10g"),
        ("NVIDIA A100-SXM4-80GB", 79.3, 90, None),
        ("Orin", 61.0, 16, "orin-agx"),
        ("Orin", 7.4, 8, None),
    ],
)
def test_what_a_device_reports_finds_its_board(name: str, memory: float, sms: int, key: str | None) -> None:
    board = gpus.match(name, memory_gib=memory, sm_count=sms)
    assert (board.key if board else None) == key


def test_a_mig_slice_is_a_board_of_its_own_with_its_share() -> None:
    board = gpus.match("NVIDIA A100-SXM4-80GB MIG 1g.10gb", memory_gib=9.5, sm_count=14)
    assert board is not None
    assert board.key == "a100-mig-1g.10gb"
    assert board.sm_count == 14
    assert board.memory_gbps == pytest.approx(2039 / 8, rel=1e-3)
    assert board.bf16_tensor_tflops == pytest.approx(312 * 14 / 108, rel=1e-3)
    assert board.tdp_w is None


def test_what_the_device_reports_wins_over_the_table() -> None:
    machine = Machine(
        kind="cuda",
        device="cuda:0",
        gpu_key="h100",
        gpu_name="NVIDIA H100 80GB HBM3",
        compute_capability="9.0",
        sm_count=132,
        memory_gib=79.19,
        l2_bytes=60 * 2**20,
        smem_per_block_kib=227,
    )
    board = gpus.from_machine(machine)
    assert board is not None
    assert (board.l2_mib, board.memory_gib, board.memory_gbps) == (60, 79.19, 3350)


def test_a_cpu_is_no_board() -> None:
    assert gpus.from_machine(Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="some CPU")) is None


def test_a_description_starts_from_a_known_board(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("key: a100-64\nname: A100 custom\nlike: a100\nsm_count: 124\nmemory_gib: 64\n")
    board = gpus.load_spec(file)
    assert (board.key, board.sm_count, board.memory_gib, board.memory_gbps) == ("a100-64", 124, 64.0, 2039)
    assert board.aliases == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key: x\nlike: a100\nspeed: 3\n", "unknown speed"),
        ("key: x\nlike: a100\nsm_count: many\n", "sm_count must be a number above 0"),
        ("key: x\nlike: a100\nsm_count: 0\n", "sm_count must be a number above 0"),
        ("key: x\nlike: a100\nsm_count: .inf\n", "sm_count must be a number above 0, not inf"),
        ("key: x\nlike: a100\nmemory_gib: .nan\n", "memory_gib must be a number above 0, not nan"),
        ("key: ../../x\nlike: a100\n", "key must be a name of letters"),
        ("key: 'x; touch y'\nlike: a100\n", "key must be a name of letters"),
        ("key: x\nlike: a100\ncompute_capability: new\n", "compute_capability must be two numbers"),
        ("key: x\ncompute_capability: '8.0'\n", "sm_count, boost_mhz, memory_gib"),
        ("- a\n", "must hold 'field: value' lines"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_bad_description_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        gpus.load_spec(file)


def test_a_dtype_that_nobody_knows_has_no_peak() -> None:
    assert gpus.resolve("a100").peak_tflops("fp3") is None
    assert gpus.resolve("a100").peak_tflops("float32") == 19.5


@pytest.mark.parametrize(
    ("key", "dtype", "works"),
    [
        ("t4", "bfloat16", False),
        ("v100", "bfloat16", False),
        ("t4", "float16", True),
        ("a100", "bfloat16", True),
        ("mi300x", "bfloat16", True),
    ],
)
def test_bfloat16_starts_with_sm_80(key: str, dtype: str, works: bool) -> None:
    board = gpus.resolve(key)
    assert (gpus.why_not_dtype(board, dtype) == "") is works
    if not works:
        with pytest.raises(UsageError, match="has no bfloat16 arithmetic"):
            gpus.check_dtype(board, dtype)


def test_tensor_peaks_follow_from_sm_count_and_clock() -> None:
    """The published dense rates are SMs x operations per clock x clock, so a typing error would show."""
    per_clock = {"7.0": 1024, "8.0": 2048, "9.0": 4096}
    for board in gpus.table():
        if board.compute_capability in per_clock and board.fp16_tensor_tflops and board.sm_count:
            formula = board.sm_count * per_clock[board.compute_capability] * (board.boost_mhz or 0) / 1e6
            # Hopper's published rates use a tensor clock below the boost clock.
            assert 0.86 < board.fp16_tensor_tflops / formula < 1.01, board.key
