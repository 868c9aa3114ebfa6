"""Branches, loops, barriers and the end of threads."""

import numpy as np
import pytest
import torch

from bench.ptx import BarrierFault, Program, Runaway, Uninitialized
from ptx_snippets import kernel, launch

START = """
.reg .pred p, q; .reg .b32 t, b, n, x, y, i, at; .reg .b64 rd, o;
mov.u32 t, %tid.x; mov.u32 b, %ctaid.x; mov.u32 n, %ntid.x; mad.lo.s32 i, b, n, t;
ld.param.u64 rd, [out]; mad.wide.u32 rd, i, 4, rd;
"""


def run(text: str, block: int = 64, grid: int = 1, **options: object) -> np.ndarray:
    out = torch.full((grid * block,), -1, dtype=torch.int32)
    launch(START + text, {"out": out}, block=block, grid=grid, **options)
    return out.view(grid, block).numpy()


def test_both_ways_of_a_branch_meet_again() -> None:
    text = """
    setp.lt.u32 p, t, 10;
    @p bra $small;
    mov.b32 x, 100;
    bra.uni $end;
    $small: mov.b32 x, 1;
    $end: add.s32 x, x, t;
    st.global.b32 [rd], x; ret;
    """
    t = np.arange(64)
    assert (run(text) == np.where(t < 10, 1 + t, 100 + t)).all()


def test_loops_of_different_length() -> None:
    text = """
    mov.b32 x, 0; mov.b32 y, 0;
    $loop: setp.ge.u32 p, y, t;
    @p bra $end;
    add.s32 y, y, 1; add.s32 x, x, y;
    bra $loop;
    $end: st.global.b32 [rd], x; ret;
    """
    t = np.arange(64)
    assert (run(text) == t * (t + 1) // 2).all()
    assert (run(text, grid=3, threads_at_once=64) == t * (t + 1) // 2).all()


def test_loops_whose_length_is_the_blocks_own() -> None:
    text = """
    mov.b32 x, 0;
    $loop: setp.ge.u32 p, x, b;
    @p bra $end;
    add.s32 x, x, 1;
    bar.sync 0;
    bra $loop;
    $end: st.global.b32 [rd], x; ret;
    """
    assert (run(text, grid=5) == np.arange(5)[:, None]).all()


def test_guarded_instructions_leave_others_alone() -> None:
    text = """
    mov.b32 x, 7; setp.eq.u32 p, t, 3;
    @p mov.b32 x, 8;
    @!p add.s32 x, x, 2;
    st.global.b32 [rd], x; ret;
    """
    assert (run(text) == np.where(np.arange(64) == 3, 8, 9)).all()


def test_threads_that_return_are_not_waited_for() -> None:
    text = """
    setp.ge.u32 p, t, 32;
    @p ret;
    bar.sync 0;
    st.global.b32 [rd], t; ret;
    """
    assert (run(text) == np.where(np.arange(64) < 32, np.arange(64), -1)).all()


def test_a_block_may_have_a_part_of_a_warp() -> None:
    assert (run("bar.sync 0; st.global.b32 [rd], t; ret;", block=40, grid=2) == np.arange(40)).all()


def test_warps_may_wait_at_different_barriers_of_one_number() -> None:
    text = """
    setp.lt.u32 p, t, 32;
    @p bra $first;
    bar.sync 0; mov.b32 x, 2; bra $end;
    $first: bar.sync 0; mov.b32 x, 1;
    $end: st.global.b32 [rd], x; ret;
    """
    assert (run(text) == np.where(np.arange(64) < 32, 1, 2)).all()


def test_named_barriers_of_a_part_of_the_block() -> None:
    text = """
    mov.b32 x, 0; setp.ge.u32 p, t, 64;
    @p bra $end;
    bar.sync 1, 64; mov.b32 x, 1;
    $end: st.global.b32 [rd], x; ret;
    """
    assert (run(text, block=128) == (np.arange(128) < 64)).all()


def test_threads_of_a_warp_that_do_not_come_to_its_barrier() -> None:
    text = """
    setp.lt.u32 p, t, 40;
    @!p bra $end;
    bar.sync 0;
    $end: st.global.b32 [rd], t; ret;
    """
    with pytest.raises(BarrierFault, match=r"thread \(40, 0, 0\).*bar.sync 0"):
        run(text)


def test_warps_that_wait_for_ever() -> None:
    text = """
    setp.lt.u32 p, t, 32;
    @p bra $one;
    bar.sync 2; bra $end;
    $one: bar.sync 1;
    $end: st.global.b32 [rd], t; ret;
    """
    with pytest.raises(BarrierFault, match="wait for ever"):
        run(text)


def test_a_loop_without_end() -> None:
    with pytest.raises(Runaway, match="PTX line"):
        run("$a: add.s32 t, t, 1; bra $a;", most_steps=1000)


def test_a_sample_of_blocks() -> None:
    found = run("st.global.b32 [rd], b; ret;", grid=6, blocks=[1, 4])
    assert found[:, 0].tolist() == [-1, 1, -1, -1, 4, -1]


def test_coordinates() -> None:
    text = """
    mov.u32 x, %tid.y; mad.lo.s32 x, x, 10, t;
    mov.u32 y, %ctaid.z; mad.lo.s32 x, y, 1000, x;
    mov.u32 y, %nctaid.z; mad.lo.s32 x, y, 10000, x;
    mov.u32 y, %ntid.y; mad.lo.s32 x, y, 100000, x;
    mov.u32 b, %ctaid.z; mov.u32 n, %tid.y; mad.lo.s32 i, n, 8, t; mad.lo.s32 i, b, 32, i;
    ld.param.u64 rd, [out]; mad.wide.u32 rd, i, 4, rd;
    st.global.b32 [rd], x; ret;
    """
    out = torch.zeros(64, dtype=torch.int32)
    program = Program(kernel(START + text, params=".param .u64 out"))
    params = out.data_ptr().to_bytes(8, "little")
    program.launch("k", grid=(1, 1, 2), block=(8, 4, 1), params=params, tensors={"out": out})
    z, y, x = np.mgrid[:2, :4, :8]
    assert (out.numpy().reshape(2, 4, 8) == x + 10 * y + 1000 * z + 20000 + 400000).all()


def test_a_register_that_was_never_written() -> None:
    with pytest.raises(Uninitialized, match=r"register x was never written; block \(0, 0, 0\), thread \(0, 0, 0\)"):
        run("st.global.b32 [rd], x; ret;")
    only_some = "setp.lt.u32 p, t, 5; @p mov.b32 x, 1; add.s32 y, x, 1; st.global.b32 [rd], y; ret;"
    with pytest.raises(Uninitialized, match=r"register y .*thread \(5, 0, 0\)"):
        run(only_some)
    with pytest.raises(Uninitialized, match="register p"):
        run("@p bra $end; $end: ret;")
    with pytest.raises(Uninitialized, match="register rd"):
        run("{ .reg .b64 rd; mov.b32 x, 1; st.global.b32 [rd], x; } ret;")


def test_a_register_on_one_way_only() -> None:
    text = """
    setp.lt.u32 p, t, 5;
    @p bra $end;
    mov.b32 x, 1;
    $end: st.global.b32 [rd], x; ret;
    """
    with pytest.raises(Uninitialized, match="register x"):
        run(text)


def test_what_was_never_written_may_be_moved_and_left_out() -> None:
    """As compilers do: values of threads that take no part are shuffled, and selected away."""
    text = """
    setp.lt.u32 p, t, 5;
    @p mov.b32 x, 1;
    mov.b32 y, x;
    shfl.sync.down.b32 y, y, 1, 31, -1;
    setp.lt.u32 q, t, 4;
    selp.b32 y, y, 9, q;
    st.global.b32 [rd], y; ret;
    """
    assert (run(text, block=32) == np.where(np.arange(32) < 4, 1, 9)).all()
    with pytest.raises(Uninitialized, match=r"thread \(4, 0, 0\)"):
        run(text.replace("t, 4", "t, 6"), block=32)
