"""Machine code is read as instructions and loops."""

from __future__ import annotations

import pytest

from bratune.errors import MeasureError
from bratune.predict.sass import parse_amdgcn, parse_sass

SASS = """
        .section .text.kernel
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 FFMA R8, R4, R5, R8 ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   MUFU.EX2 R9, R8 ;
        /*0050*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0060*/                   ISETP.GE.AND P0, PT, R3, R7, PT ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
        /*0080*/                   IADD3 R10, R10, 0x1, RZ ;
        /*0090*/              @!P1 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
        /*00d0*/                   NOP;
"""

AMDGCN = """
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
\ts_add_i32 s6, s6, 1
\ts_cmp_lt_i32 s6, s7
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_dword v4, v0, s[0:1]
\ts_endpgm
"""


def test_classes_count_each_instruction_once_without_trip_counts() -> None:
    found = parse_sass(SASS).classes()
    assert (found["load"], found["store"], found["mma"], found["exp"], found["fma"]) == (1, 1, 1, 1, 1)
    assert sum(found.values()) == 13  # NOP does not count


def test_nested_loops_multiply() -> None:
    listing = parse_sass(SASS)
    assert [loop.size for loop in listing.loops] == [9, 5]
    found = listing.classes([3, 10])
    assert (found["load"], found["fma"], found["mma"], found["exp"], found["store"]) == (3, 3, 30, 30, 1)
    assert listing.count([3, 10]) == 13 + 2 * 9 + 3 * 9 * 5


def test_an_endless_loop_after_the_exit_is_no_loop() -> None:
    assert all(loop.end < 11 for loop in parse_sass(SASS).loops)


def test_a_wait_behind_the_end_that_jumps_back_is_no_loop() -> None:
    # As Blackwell's waits for products are laid out: tried once in line, again and again behind the end.
    waits = """
.L_x_3:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R5], R6 ;
        /*00e0*/              @!P2 BRA `(.L_x_1) ;
        /*00f0*/                   BRA `(.L_x_3) ;
"""
    assert parse_sass(SASS + waits).loops == parse_sass(SASS).loops


def test_wrong_number_of_trip_counts_names_the_loops() -> None:
    with pytest.raises(MeasureError, match=r"1 trip counts.*9, 5"):
        parse_sass(SASS).classes([3])


def test_amd_assembly_is_read_with_the_same_classes() -> None:
    listing = parse_amdgcn(AMDGCN)
    assert [loop.size for loop in listing.loops] == [6]
    found = listing.classes([4])
    assert (found["load"], found["mma"], found["store"]) == (4, 4, 1)
