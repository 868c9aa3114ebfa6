"""Accesses that nothing orders, in shared and in global memory."""

import pytest
import torch

from bench.ptx import Race
from ptx_snippets import launch

START = """
.reg .pred p, q; .reg .b32 t, b, i, w, l, at, n, x<9>; .reg .b64 rd, o;
.shared .align 16 .b8 buffer[1024];
mov.u32 t, %tid.x; mov.u32 b, %ctaid.x; mov.u32 n, %nctaid.x; mad.lo.s32 i, b, %ntid.x, t;
shr.u32 w, t, 5; and.b32 l, t, 31; shl.b32 at, t, 2;
"""


def run(text: str, tensors: dict[str, torch.Tensor] | None = None, *, block: int = 64, **options: object) -> None:
    launch(START + text + "\nret;", tensors or {}, block=block, **options)


def races(text: str, *words: str, **options: object) -> None:
    """Whether a race is found, and named."""
    with pytest.raises(Race) as raised:
        run(text, **options)
    for word in words:
        assert word in str(raised.value)


def with_and_without(text: str, *words: str, **options: object) -> None:
    """Nothing is wrong, but where the lines marked ! are left out."""
    lines = text.splitlines()
    run("\n".join(line.replace("!", "") for line in lines), **options)
    races("\n".join(line for line in lines if "!" not in line), *words, **options)


def test_reading_what_another_warp_wrote() -> None:
    text = """
    st.shared.b32 [at], t;
    ! bar.sync 0;
    xor.b32 x0, at, 128; ld.shared.b32 x1, [x0];
    """
    with_and_without(text, "reads what thread (32, 0, 0) of block (0, 0, 0) wrote", "byte 0x80", "thread (0, 0, 0)")


def test_writing_over_what_another_warp_reads() -> None:
    text = """
    st.shared.b32 [at], t; bar.sync 0;
    xor.b32 x0, at, 128; ld.shared.b32 x1, [x0];
    ! bar.sync 0;
    st.shared.b32 [at], x1;
    """
    with_and_without(text, "writes over what thread (32, 0, 0)", "read")


def test_writing_over_what_all_read() -> None:
    text = """
    setp.eq.u32 p, t, 5; @p st.shared.b32 [buffer], t; bar.sync 0;
    ld.shared.b32 x1, [buffer];
    ! bar.sync 0;
    @p st.shared.b32 [buffer], x1;
    """
    with_and_without(text, "several warps")


def test_writing_over_what_another_warp_wrote() -> None:
    text = """
    setp.eq.u32 p, w, 0; setp.eq.u32 q, w, 1; shl.b32 x0, l, 2;
    @p st.shared.b32 [x0], t;
    ! bar.sync 0;
    @q st.shared.b32 [x0], t;
    """
    with_and_without(text, "writes over what thread (0, 0, 0)")


def test_warps_may_write_the_same() -> None:
    run("shl.b32 x0, l, 2; st.shared.b32 [x0], l; bar.sync 0; ld.shared.b32 x1, [x0];")
    races("shl.b32 x0, l, 2; st.shared.b32 [x0], t;", "different values at once")
    # One NaN is as good as another.
    text = "shl.b32 x0, l, 2; or.b32 x1, w, 2143289344; st.shared.b32 [x0], x1;"
    run(text)
    races(text.replace("2143289344", "1065353216"), "different values")


def test_lanes_of_one_warp_are_ordered_by_a_barrier_alone() -> None:
    text = """
    st.shared.b32 [at], t;
    ! bar.warp.sync -1;
    xor.b32 x0, at, 4; ld.shared.b32 x1, [x0];
    """
    with_and_without(text, "thread (1, 0, 0)", block=32)
    races(text.replace("!", "").replace("xor.b32 x0, at, 4", "xor.b32 x0, at, 128"))


def test_several_reads_of_a_warp_before_a_write() -> None:
    text = """
    st.shared.b32 [at], t; bar.sync 0;
    ld.shared.b32 x1, [buffer];
    ! bar.warp.sync -1;
    setp.eq.u32 p, t, 0; @p st.shared.b32 [buffer], x1;
    """
    with_and_without(text, "threads of warp 0", block=32)


def test_a_thread_is_ordered_with_itself() -> None:
    run("st.shared.b32 [at], t; ld.shared.b32 x0, [at]; st.shared.b32 [at], b; ld.shared.b32 x0, [at];")


def test_two_buffers_take_one_barrier_a_step() -> None:
    text = """
    mov.b32 x0, 0;
    $loop:
    and.b32 x1, x0, 1; shl.b32 x1, x1, 8; add.s32 x2, x1, at;
    st.shared.b32 [x2], t;
    bar.sync 0;
    xor.b32 x3, x2, 128; ld.shared.b32 x4, [x3];
    add.s32 x0, x0, 1; setp.lt.u32 p, x0, 6;
    @p bra $loop;
    """
    run(text, block=64)
    races(text.replace("shl.b32 x1, x1, 8", "mov.b32 x1, 0"), block=64)


def test_atomics_of_shared_memory() -> None:
    text = """
    setp.eq.u32 p, t, 0; mov.b32 x0, 0; @p st.shared.b32 [buffer], x0;
    ! bar.sync 0;
    atom.shared.add.u32 x1, [buffer], 1;
    """
    with_and_without(text, "adds to what thread (0, 0, 0)")
    text = "mov.b32 x0, 0; @p st.shared.b32 [buffer], x0; bar.sync 0; atom.shared.add.u32 x1, [buffer], 1;"
    text = "setp.eq.u32 p, t, 0;" + text + "\n! bar.sync 0;\nld.shared.b32 x2, [buffer];"
    with_and_without(text, "reads what an atomic of block (0, 0, 0) wrote")


def test_accesses_of_different_width() -> None:
    text = """
    shl.b32 x0, t, 3; mov.b64 rd, {t, t}; st.shared.b64 [x0], rd;
    ! bar.sync 0;
    mad.lo.s32 x1, t, -8, 508; ld.shared.b32 x2, [x1];
    """
    with_and_without(text, "byte 0x1fc", "thread (63, 0, 0)", block=64)


def test_blocks_that_write_to_one_place() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    text = "ld.param.u64 rd, [x]; mad.wide.u32 rd, t, 4, rd; st.global.b32 [rd], {};"
    races(text.format("i"), "block (0, 0, 0)", "x [64] int32 at byte 0", tensors={"x": x}, grid=2, threads_at_once=64)
    races(text.format("i"), "at once", tensors={"x": x}, grid=2)
    run(text.format("t"), {"x": x}, grid=2)


def test_blocks_that_read_what_others_write() -> None:
    x = torch.zeros(128, dtype=torch.int32)
    text = """
    ld.param.u64 rd, [x]; mad.wide.u32 o, i, 4, rd; st.global.b32 [o], i;
    xor.b32 x0, i, 64; mad.wide.u32 o, x0, 4, rd; ld.global.b32 x1, [o];
    """
    races(text, "reads what thread (0, 0, 0) of block (1, 0, 0) wrote", tensors={"x": x}, grid=2)
    races(
        text, "writes over what thread (0, 0, 0) of block (0, 0, 0) read", tensors={"x": x}, grid=2, threads_at_once=64
    )
    text = """
    ld.param.u64 rd, [x]; xor.b32 x0, i, 64; mad.wide.u32 o, x0, 4, rd; ld.global.b32 x1, [o];
    mad.wide.u32 o, i, 4, rd; st.global.b32 [o], i;
    """
    for together in (64, 128):
        words = ("writes over what", "read") if together == 128 else ("reads what", "wrote")
        races(text, *words, tensors={"x": x}, grid=2, threads_at_once=together)


def test_a_block_that_reads_its_own_global_memory() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    text = """
    ld.param.u64 rd, [x]; mad.wide.u32 o, i, 4, rd; st.global.b32 [o], i;
    ! bar.sync 0;
    xor.b32 x0, i, 32; mad.wide.u32 o, x0, 4, rd; ld.global.b32 x1, [o];
    """
    with_and_without(text, "reads what thread (32, 0, 0)", tensors={"x": x})


def test_atomics_and_plain_accesses() -> None:
    x = torch.zeros(4)
    atomics = "ld.param.u64 rd, [x]; atom.global.gpu.relaxed.add.f32 x0, [rd], 0f3F800000;"
    run(atomics, {"x": x}, grid=3)
    assert x[0] == 192
    races(atomics + "ld.global.f32 x1, [rd];", "an atomic", tensors={"x": x}, grid=3)
    races("ld.param.u64 rd, [x]; ld.global.f32 x1, [rd];" + atomics, "adds to what", tensors={"x": x}, grid=2)


LAST_BLOCK = """
ld.param.u64 rd, [x]; mad.wide.u32 o, i, 4, rd; st.global.b32 [o], i;
! membar.gl;
bar.sync 0;
ld.param.u64 o, [count]; setp.eq.u32 p, t, 0;
@p atom.global.add.u32 x0, [o], 1;
@p st.shared.b32 [buffer], x0;
bar.sync 0;
ld.shared.b32 x0, [buffer]; add.s32 x0, x0, 1; setp.ne.u32 q, x0, n;
@q bra $end;
? membar.gl;
mov.b32 x1, 0; mov.b32 x2, 0;
$loop:
mad.lo.s32 x3, x1, 64, t; mad.wide.u32 o, x3, 4, rd; ld.global.cg.b32 x4, [o]; add.s32 x2, x2, x4;
add.s32 x1, x1, 1; setp.lt.u32 p, x1, n; @p bra $loop;
ld.param.u64 rd, [sum]; mad.wide.u32 o, t, 4, rd; st.global.b32 [o], x2;
$end:
"""


@pytest.mark.parametrize("together", [64, 128, 1024])
def test_the_block_that_comes_last_reads_what_all_wrote(together: int) -> None:
    def tensors() -> dict[str, torch.Tensor]:
        names = {"x": 256, "count": 1, "sum": 64}
        return {name: torch.zeros(n, dtype=torch.int32) for name, n in names.items()}

    def text(*without: str) -> str:
        lines = [line for line in LAST_BLOCK.splitlines() if line[:1] not in without]
        return "\n".join(line.lstrip("!?") for line in lines)

    made = tensors()
    run(text(), made, grid=4, threads_at_once=together)
    assert made["sum"].tolist() == [4 * t + 64 * 6 for t in range(64)]
    for left_out in "!?":
        with pytest.raises(Race, match="reads what thread"):
            run(text(left_out), tensors(), grid=4, threads_at_once=together)


def test_one_thread_that_publishes() -> None:
    """Thread 0's own fence covers what it wrote itself, and with a barrier in front what all wrote."""
    text = """
    setp.eq.u32 p, t, 0; setp.ne.u32 q, t, 0;
    ld.param.u64 rd, [x]; mad.wide.u32 o, i, 4, rd; {} st.global.b32 [o], i;
    {}
    @q bra $end;
    fence.acq_rel.gpu;
    ld.param.u64 o, [count]; atom.global.add.u32 x0, [o], 1;
    fence.acq_rel.gpu;
    setp.ne.u32 p, x0, 1; @p bra $end;
    ld.global.b32 x1, [rd]; ld.global.b32 x1, [rd+256]; {}
    $end:
    """
    for own, barrier, other, right in (
        ("@p", "", "", True),
        ("", "bar.sync 0;", "ld.global.b32 x1, [rd+40]; ld.global.b32 x1, [rd+296];", True),
        ("", "", "ld.global.b32 x1, [rd+40]; ld.global.b32 x1, [rd+296];", False),
    ):
        tensors = {name: torch.zeros(128, dtype=torch.int32) for name in ("x", "count")}
        made = text.format(own, barrier, other)
        if right:
            run(made, tensors, grid=2)
        else:
            races(made, tensors=tensors, grid=2)


def test_without_checks_nothing_is_looked_for() -> None:
    run("st.shared.b32 [at], t; xor.b32 x0, at, 128; ld.shared.b32 x1, [x0];", check=False)


COPY = """
ld.param.u64 rd, [x]; mad.wide.u32 rd, t, 16, rd; shl.b32 x0, t, 4;
cp.async.cg.shared.global [x0], [rd], 16;
cp.async.commit_group;
"""


def test_copies_are_waited_for() -> None:
    x, y = torch.arange(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    text = (
        COPY
        + """
    ! cp.async.wait_group 0;
    ! bar.sync 0;
    xor.b32 x1, x0, 512; ld.shared.b32 x2, [x1];
    ld.param.u64 rd, [y]; mad.wide.u32 rd, t, 4, rd; st.global.b32 [rd], x2;
    """
    )
    with_and_without(text, "a cp.async of block (0, 0, 0) that nobody has waited for", tensors={"x": x, "y": y})
    assert y.tolist() == [4 * (t ^ 32) for t in range(64)]
    races(text.replace("! cp.async", "cp.async").replace("! bar.sync 0;", ""), "thread (32", tensors={"x": x, "y": y})
    races(text.replace("! cp.async.wait_group 0", "cp.async.wait_group 1").replace("!", ""), tensors={"x": x, "y": y})


def test_copies_of_a_thread_in_groups() -> None:
    x, y = torch.arange(512, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    text = (
        COPY
        + """
    cp.async.ca.shared.global [x0+512], [rd+512], 8, 8;
    cp.async.ca.shared.global [x0+520], [rd+520], 8, 0;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 x2, [x0];
    cp.async.wait_all;
    ld.shared.v4.b32 {x3, x4, x5, x6}, [x0+512];
    add.s32 x2, x2, x4; add.s32 x2, x2, x5; add.s32 x2, x2, x6;
    ld.param.u64 rd, [y]; mad.wide.u32 rd, t, 4, rd; st.global.b32 [rd], x2;
    """
    )
    run(text, {"x": x, "y": y}, block=32)
    assert y.tolist() == [4 * t + 128 + 4 * t + 1 for t in range(32)]
    races(text.replace("cp.async.wait_all;", ""), tensors={"x": x, "y": y}, block=32)
