"""Loads and stores of every width, and the faults that bench.ptx finds in them."""

import re

import numpy as np
import pytest
import torch

from bench.ptx import Misaligned, OutOfRange, Uninitialized
from ptx_snippets import evaluate, launch

START = """
.reg .pred p, q; .reg .b16 h<9>; .reg .b32 t, b, i, at, x<9>; .reg .b64 rd, o, w<5>;
mov.u32 t, %tid.x; mov.u32 b, %ctaid.x; mad.lo.s32 i, b, %ntid.x, t;
"""


def run(text: str, tensors: dict[str, torch.Tensor], **options: object) -> None:
    launch(START + text + "\nret;", tensors, **options)


def test_vectors() -> None:
    x = torch.arange(128, dtype=torch.int32)
    y = torch.zeros(128, dtype=torch.int32)
    text = """
    ld.param.u64 rd, [x]; mad.wide.u32 rd, t, 16, rd;
    ld.global.v4.b32 {x0, x1, x2, x3}, [rd];
    ld.param.u64 o, [y]; mad.wide.u32 o, t, 16, o;
    st.global.v2.b32 [o], {x3, x2};
    st.global.v2.b32 [o+8], {x1, x0};
    """
    run(text, {"x": x, "y": y})
    assert y.view(32, 4).equal(x.view(32, 4).flip(1))


@pytest.mark.parametrize(
    ("load", "stored", "expected"),
    [
        ("ld.global.u8 %r, [%p]", 0x1F0, 0xF0),
        ("ld.global.s8 %r, [%p]", 0x1F0, 0xFFFFFFF0),
        ("ld.global.u16 %r, [%p]", 0x1FFF0, 0xFFF0),
        ("ld.global.s16 %r, [%p]", 0x1FFF0, 0xFFFFFFF0),
        ("ld.global.b32 %r, [%p]", 0x1FFF0, 0x1FFF0),
        ("ld.global.nc.L1::evict_last.b32 %r, [%p]", 5, 5),
        ("ld.volatile.global.b32 %r, [%p]", 5, 5),
        ("ld.global.u8 %r, [%p+1]", 0x1F0, 1),
    ],
)
def test_what_is_narrower_than_its_register(load: str, stored: int, expected: int) -> None:
    x = np.array([stored], "u4")
    (found,) = evaluate("ld.param.u64 %p, [a];" + load + ";", {"a": x}, {"r": "u4"}, registers=".reg .b64 %p;")
    assert hex(found[0]) == hex(expected)


def test_narrow_stores() -> None:
    y = torch.zeros(32, dtype=torch.int16)
    text = """
    ld.param.u64 rd, [y]; mad.wide.u32 rd, t, 2, rd;
    add.s32 x0, t, 65536; st.global.u16 [rd], x0;
    setp.eq.u32 p, t, 3; @p st.global.u8 [rd+1], t;
    """
    run(text, {"y": y})
    assert y.tolist() == [3 + 3 * 256 if t == 3 else t for t in range(32)]


def test_parameters() -> None:
    params = ".param .align 8 .b8 s[24], .param .s32 n"
    text = """
    .reg .b64 a, out; .reg .b32 x, y, z; .reg .f32 f;
    mov.b64 a, s;
    ld.param.u64 out, [a];
    ld.param.v2.u32 {x, y}, [a+8];
    ld.param.f32 f, [s+16];
    ld.param.s32 a, [n];
    st.global.v2.b32 [out], {x, y};
    st.global.f32 [out+8], f;
    st.global.b64 [out+16], a;
    ret;
    """
    import struct

    from bench.ptx import Program
    from ptx_snippets import kernel

    out = torch.zeros(3, dtype=torch.int64)
    buffer = struct.pack("<QIIfxxxxi", out.data_ptr(), 7, 8, 1.5, -9)
    program = Program(kernel(text, params=params))
    program.launch("k", grid=(1, 1, 1), block=(1, 1, 1), params=buffer, tensors={"out": out})
    assert out.tolist() == [7 + (8 << 32), int(np.float32(1.5).view("u4")), -9]


def test_parameters_that_threads_choose() -> None:
    """Odd threads read the second of two numbers; those from 4 on do not read."""
    text = """
    .reg .pred p; .reg .b64 a, out; .reg .b32 t, odd, x;
    mov.u32 t, %tid.x; and.b32 odd, t, 1; mov.b64 a, s; mad.wide.u32 a, odd, 4, a;
    mov.u32 x, 7; setp.lt.u32 p, t, 4; @p ld.param.u32 x, [a];
    ld.param.u64 out, [y]; mad.wide.u32 out, t, 4, out; st.global.u32 [out], x;
    ret;
    """
    import struct

    from bench.ptx import Program
    from ptx_snippets import kernel

    y = torch.zeros(32, dtype=torch.int32)
    program = Program(kernel(text, params=".param .align 8 .b8 s[8], .param .u64 y"))
    buffer = struct.pack("<IIQ", 5, 6, y.data_ptr())
    program.launch("k", grid=(1, 1, 1), block=(32, 1, 1), params=buffer, tensors={"y": y})
    assert y.tolist() == [5, 6, 5, 6] + [7] * 28


def test_shared_and_local_memory() -> None:
    y = torch.zeros(64, dtype=torch.int32)
    text = """
    .shared .align 8 .b8 buffer[256];
    .local .align 8 .b8 own[16];
    shl.b32 at, t, 2; mov.u32 x0, buffer; add.s32 x0, x0, at;
    st.shared.b32 [x0], t;
    mov.u32 x4, own; st.local.v2.b32 [x4+8], {t, b};
    bar.sync 0;
    xor.b32 at, at, 252; mov.u32 x0, buffer; add.s32 x0, x0, at;
    ld.shared.b32 x1, [x0];
    ld.local.b32 x5, [x4+8]; mad.lo.s32 x1, x5, 100, x1;
    ld.param.u64 rd, [y]; mad.wide.u32 rd, t, 4, rd; st.global.b32 [rd], x1;
    """
    run(text, {"y": y}, block=64)
    assert y.tolist() == [63 - t + 100 * t for t in range(64)]


def message(error: type[Exception], text: str, tensors: dict[str, torch.Tensor], **options: object) -> str:
    with pytest.raises(error) as raised:
        run(text, tensors, **options)
    return str(raised.value)


def test_outside_of_a_tensor() -> None:
    x = torch.zeros(100, dtype=torch.float32)
    inside, behind = x[:40], x[60:]
    text = "ld.param.u64 rd, [x]; mad.wide.u32 rd, i, 4, rd; ld.global.f32 x0, [rd];"
    said = message(OutOfRange, text, {"x": inside, "z": behind}, grid=2)
    assert "4 bytes past the end of x [40] float32" in said
    assert "block (1, 0, 0), thread (8, 0, 0)" in said
    assert "`ld.global.f32 x0, [rd]`" in said
    text = "ld.param.u64 rd, [x]; mad.wide.u32 rd, i, 4, rd; ld.global.f32 x0, [rd+-8];"
    assert "8 bytes before x [40] float32" in message(OutOfRange, text, {"x": inside}, block=32)
    text = "ld.param.u64 rd, [x]; mov.b32 x0, 1; st.global.b32 [rd+160], x0;"
    assert "thread (0, 0, 0)" in message(OutOfRange, text, {"x": inside}, block=32)
    text = "mov.b64 rd, 64; ld.global.f32 x0, [rd];"
    message(OutOfRange, text, {"x": inside})
    message(OutOfRange, text, {})


def test_the_last_element_of_a_wide_access_is_outside() -> None:
    x = torch.zeros(126, dtype=torch.float32)
    text = "ld.param.u64 rd, [x]; mad.wide.u32 rd, t, 16, rd; ld.global.v4.f32 {x0, x1, x2, x3}, [rd];"
    said = message(OutOfRange, text, {"x": x})
    assert "8 bytes past the end of x [126] float32" in said
    assert "thread (31, 0, 0)" in said


def test_threads_that_take_no_part_are_not_looked_at() -> None:
    x, y = torch.arange(20, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    text = """
    setp.lt.u32 p, t, 20; mov.b32 x0, -1;
    ld.param.u64 rd, [x]; mad.wide.u32 rd, t, 4, rd; @p ld.global.b32 x0, [rd];
    ld.param.u64 rd, [y]; mad.wide.u32 rd, t, 4, rd; st.global.b32 [rd], x0;
    """
    run(text, {"x": x, "y": y})
    assert y.tolist() == [*range(20), *[-1] * 12]


def test_pointers_into_several_tensors_at_once() -> None:
    x, z = torch.arange(32, dtype=torch.int32), torch.arange(100, 132, dtype=torch.int32)
    y = torch.zeros(32, dtype=torch.int32)
    text = """
    setp.lt.u32 p, t, 7;
    ld.param.u64 rd, [x]; ld.param.u64 o, [z]; selp.b64 rd, rd, o, p; mad.wide.u32 rd, t, 4, rd;
    ld.global.b32 x0, [rd]; st.global.b32 [rd], b;
    ld.param.u64 rd, [y]; mad.wide.u32 rd, t, 4, rd; st.global.b32 [rd], x0;
    """
    run(text, {"x": x, "z": z, "y": y})
    assert y.tolist() == [t if t < 7 else 100 + t for t in range(32)]
    assert x.tolist() == [0 if t < 7 else t for t in range(32)]
    assert z.tolist() == [0 if t >= 7 else 100 + t for t in range(32)]
    short = text.replace("t, 7", "t, 31")
    assert "past the end of z [16] int32" in message(OutOfRange, text, {"x": x, "z": z[:16], "y": y})
    run(short.replace("x0, [rd]; st", "x0, [rd]; st"), {"x": x, "z": z, "y": y})


def test_alignment() -> None:
    x = torch.zeros(65, dtype=torch.float32)[1:]
    text = "ld.param.u64 rd, [x]; ld.global.v2.f32 {x0, x1}, [rd];"
    said = message(Misaligned, text, {"x": x})
    assert "8 bytes at address" in said
    assert "x [64] float32 at byte 0" in said
    text = "ld.param.u64 rd, [x]; mad.wide.u32 rd, t, 4, rd; ld.global.v2.f32 {x0, x1}, [rd+4];"
    assert "thread (1, 0, 0)" in message(Misaligned, text, {"x": x})
    shared = ".shared .align 8 .b8 buffer[256]; mov.u32 x0, buffer; st.shared.b64 [x0+4], rd;"
    assert re.search("8 bytes at 0x4 of shared memory", message(Misaligned, "mov.b64 rd, 1;" + shared, {}))


def test_shared_memory_has_an_end() -> None:
    text = ".shared .align 8 .b8 buffer[64]; shl.b32 at, t, 2; st.shared.b32 [at], t;"
    said = message(OutOfRange, text, {})
    assert "4 bytes at 0x40 of shared memory, of which there are 64" in said
    assert "thread (16, 0, 0)" in said
    header = ".extern .shared .align 16 .b8 dynamic[];"
    text = "mov.u32 x0, dynamic; shl.b32 at, t, 2; add.s32 x0, x0, at; st.shared.b32 [x0], t;"
    run(text, {}, header=header, shared=128)
    message(OutOfRange, text, {}, header=header, shared=124)


def test_what_nobody_has_written() -> None:
    text = ".shared .align 8 .b8 buffer[64]; ld.shared.b32 x0, [buffer+8];"
    assert "nobody has written byte 0x8 of shared memory" in message(Uninitialized, text, {})
    text = """
    .shared .align 8 .b8 buffer[256]; shl.b32 at, t, 2; mov.b32 x0, 0; setp.lt.u32 p, t, 20;
    @p st.shared.b32 [at], x0;
    ld.shared.b32 x1, [at];
    """
    assert "thread (20, 0, 0)" in message(Uninitialized, text, {})
    run(text.replace("ld.shared", "@p ld.shared"), {})
    y = torch.zeros(32, dtype=torch.int32)
    text = "ld.param.u64 rd, [y]; mad.wide.u32 rd, t, 4, rd; {} ld.global.b32 x1, [rd];"
    assert "nobody has written y [32] int32 at byte 0" in message(
        Uninitialized, text.format(""), {"y": y}, uninitialized=["y"]
    )
    run(text.format(""), {"y": y})
    run(text.format("st.global.b32 [rd], t;"), {"y": y}, uninitialized=["y"])
    text = ".local .align 4 .b8 own[8]; ld.local.b32 x1, [own];"
    assert "local memory" in message(Uninitialized, text, {})


def test_bytes_are_told_apart() -> None:
    text = """
    .shared .align 4 .b8 buffer[64]; mov.b32 x0, 0;
    st.shared.u8 [buffer], x0; ld.shared.u8 x1, [buffer+{}];
    """
    run(text.format(0), {}, block=1)
    message(Uninitialized, text.format(1), {}, block=1)


def test_what_lies_between_a_tensors_elements() -> None:
    x = torch.zeros(64, dtype=torch.float32)[::2]
    text = "ld.param.u64 rd, [x]; mad.wide.u32 rd, t, {}, rd; ld.global.b32 x0, [rd];"
    run(text.format(8), {"x": x})
    assert "byte 4" in message(Uninitialized, text.format(4), {"x": x})


def test_tensors_that_share_memory() -> None:
    x = torch.arange(64, dtype=torch.int32).view(4, 16)
    text = "ld.param.u64 rd, [left]; mad.wide.u32 rd, t, 4, rd; ld.global.b32 x0, [rd];"
    run(text, {"left": x[:, :8], "right": x[:, 8:]})
    message(Uninitialized, text, {"left": x[:, :8]})


def test_shared_memory_starts_anew_in_every_block() -> None:
    text = """
    .shared .align 4 .b8 buffer[128]; shl.b32 at, t, 2; setp.eq.u32 p, b, 0;
    @p st.shared.b32 [at], t;
    ld.shared.b32 x0, [at];
    """
    for together in (32, 64):
        said = message(Uninitialized, text, {}, grid=2, threads_at_once=together)
        assert "block (1, 0, 0)" in said


def test_an_empty_tensor_is_none() -> None:
    run("mov.b32 x0, 1;", {"x": torch.zeros(0)})
