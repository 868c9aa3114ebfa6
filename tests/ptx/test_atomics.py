"""atom and red: what they leave in memory, and what they give back, thread after thread."""

import numpy as np
import pytest
import torch

from ptx_snippets import launch

START = """
.reg .pred p; .reg .b16 h; .reg .b32 t, x<9>; .reg .b64 rd, o, w<4>;
mov.u32 t, %tid.x; ld.param.u64 rd, [x]; ld.param.u64 o, [y]; mad.wide.u32 o, t, {}, o;
"""


def run(text: str, x: np.ndarray, *, size: int = 4, threads: int = 8, **options: object) -> tuple[list, list]:
    """What is in x at the end, and what the threads stored."""
    x, y = torch.from_numpy(x), torch.zeros(threads, dtype=torch.int32 if size == 4 else torch.int64)
    launch(START.format(size) + text + "\nret;", {"x": x, "y": y}, block=threads, **options)
    return x.tolist(), y.tolist()


@pytest.mark.parametrize(
    ("opcode", "start", "end", "given"),
    [
        ("add.u32", 10, 38, [10, 10, 11, 13, 16, 20, 25, 31]),
        ("min.s32", 3, 0, [3, 0, 0, 0, 0, 0, 0, 0]),
        ("max.u32", 3, 7, [3, 3, 3, 3, 3, 4, 5, 6]),
        ("or.b32", 8, 15, [8, 8, 9, 11, 11, 15, 15, 15]),
        ("and.b32", 7, 0, [7, 0, 0, 0, 0, 0, 0, 0]),
        ("xor.b32", 1, 1, [1, 1, 0, 2, 1, 5, 0, 6]),
        ("exch.b32", 9, 7, [9, 0, 1, 2, 3, 4, 5, 6]),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_what_is_there_and_what_was(opcode: str, start: int, end: int, given: list[int], space: str) -> None:
    atomic = f"atom.{space}.{opcode} x0, [{'rd' if space == 'global' else 'buffer'}], t; st.global.b32 [o], x0;"
    if space == "shared":
        atomic = f"""
        .shared .align 4 .b8 buffer[4];
        setp.eq.u32 p, t, 0; ld.global.b32 x1, [rd]; @p st.shared.b32 [buffer], x1; bar.sync 0;
        {atomic}
        bar.sync 0; ld.shared.b32 x1, [buffer]; @p st.global.b32 [rd], x1;
        """
        atomic = atomic.replace("@p st.global", "bar.sync 0; @p st.global")
    found, old = run(atomic, np.array([start], "i4"))
    assert found == [end]
    assert old == given


def test_inc_dec_and_cas() -> None:
    found, old = run("atom.global.inc.u32 x0, [rd], 5; st.global.b32 [o], x0;", np.array([3], "i4"))
    assert (found, old) == ([5], [3, 4, 5, 0, 1, 2, 3, 4])
    found, old = run("atom.global.dec.u32 x0, [rd], 5; st.global.b32 [o], x0;", np.array([2], "i4"))
    assert (found, old) == ([0], [2, 1, 0, 5, 4, 3, 2, 1])
    text = "add.s32 x1, t, 1; atom.global.cas.b32 x0, [rd], t, x1; st.global.b32 [o], x0;"
    found, old = run(text, np.array([2], "i4"))
    assert (found, old) == ([8], [2, 2, 2, 3, 4, 5, 6, 7])


def test_sums_of_64_bits() -> None:
    text = "cvt.u64.u32 w0, t; atom.global.gpu.relaxed.add.u64 w1, [rd], w0; st.global.b64 [o], w1;"
    found, old = run(text, np.array([2**40], "i8"), size=8)
    assert found == [2**40 + 28]
    assert old == [2**40 + t * (t - 1) // 2 for t in range(8)]
    text = "cvt.rn.f64.u32 w0, t; red.global.add.f64 [rd], w0;"
    assert run(text, np.array([0.5]))[0] == [28.5]


def test_fp32_sums_come_in_the_order_of_threads() -> None:
    """1 + 2^-24 eight times is 1, and 2^-24 eight times + 1 is not."""
    text = """
    mov.b32 x0, 0f33800000; setp.eq.u32 p, t, {}; @p mov.b32 x0, 0f3F800000;
    red.global.add.f32 [rd], x0;
    """
    assert run(text.format(0), np.array([0], "f4"))[0] == [1.0]
    assert run(text.format(7), np.array([0], "f4"))[0] == [float(np.float32(1 + 7 * 2.0**-24))]


def test_subnormal_fp32_sums_are_lost_in_global_memory() -> None:
    text = "mov.b32 x0, 1; {} red.{}.add.f32 [{}], x0; {}"
    assert run(text.format("", "global", "rd", ""), np.array([0], "f4"))[0] == [0.0]
    shared = """
    .shared .align 4 .b8 buffer[4]; setp.eq.u32 p, t, 0; mov.b32 x1, 0; @p st.shared.b32 [buffer], x1; bar.sync 0;
    """
    end = "bar.sync 0; ld.shared.b32 x1, [buffer]; @p st.global.b32 [rd], x1;"
    assert run(text.format(shared, "shared", "buffer", end), np.array([0], "f4"))[0] == [8 * 2.0**-149]


def test_vectors_of_sums() -> None:
    text = """
    cvt.rn.f32.u32 x0, t; mov.b32 x1, 0f3F800000; mov.b32 x2, 0f40000000; mov.b32 x3, 0f40400000;
    atom.global.gpu.relaxed.add.v4.f32 {x4, x5, x6, x7}, [rd], {x0, x1, x2, x3};
    """
    assert run(text, np.zeros(4, "f4"), arch=90)[0] == [28, 8, 16, 24]
    assert run(text + "st.global.b32 [o], x5;", np.zeros(4, "f4"))[1] == [
        int(np.float32(t).view("u4")) for t in range(8)
    ]


def test_pairs_of_halves() -> None:
    text = "cvt.rn.f32.u32 x0, t; cvt.rn.f16x2.f32 x1, x0, 0f3F800000; red.global.add.noftz.f16x2 [rd], x1;"
    assert run(text, np.zeros(2, "f2"))[0] == [8, 28]


def test_guarded() -> None:
    text = "mov.b32 x0, -1; setp.gt.u32 p, t, 4; @p atom.global.add.u32 x0, [rd], 1; st.global.b32 [o], x0;"
    assert run(text, np.array([0], "i4")) == ([3], [-1] * 5 + [0, 1, 2])


def test_several_blocks_add_up() -> None:
    assert run("red.global.add.u32 [rd], 1;", np.array([0], "i4"), grid=5, threads_at_once=16)[0] == [40]
