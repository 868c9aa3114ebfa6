"""Every form of the integer instructions of bench.ptx against numbers worked by hand."""

import numpy as np
import pytest

from ptx_snippets import evaluate

U, S = np.uint32, np.int32
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.s32", (0x7FFFFFFF, 1), 0x80000000),
        ("add.u32", (ONES, 2), 1),
        ("sub.s32", (3, 5), ONES - 1),
        ("add.sat.s32", (0x7FFFFFFF, 1), 0x7FFFFFFF),
        ("sub.sat.s32", (0x80000000, 1), 0x80000000),
        ("mul.lo.s32", (0x10001, 0x10001), 0x20001),
        ("mul.hi.u32", (ONES, ONES), 0xFFFFFFFE),
        ("mul.hi.s32", (ONES, 5), ONES),
        ("mad.lo.s32", (3, 5, 7), 22),
        ("mad.hi.u32", (0x80000000, 4, 1), 3),
        ("div.u32", (ONES, 16), 0x0FFFFFFF),
        ("div.s32", (-7, 2), -3),
        ("div.s32", (7, -2), -3),
        ("div.u32", (5, 0), ONES),
        ("rem.s32", (-7, 2), -1),
        ("rem.s32", (7, -2), 1),
        ("rem.u32", (7, 4), 3),
        ("min.s32", (-1, 1), -1),
        ("min.u32", (-1, 1), 1),
        ("max.s32", (-1, 1), 1),
        ("max.u32", (-1, 1), -1),
        ("abs.s32", (-5,), 5),
        ("neg.s32", (5,), -5),
        ("and.b32", (0b1100, 0b1010), 0b1000),
        ("or.b32", (0b1100, 0b1010), 0b1110),
        ("xor.b32", (0b1100, 0b1010), 0b0110),
        ("not.b32", (0,), ONES),
        ("shl.b32", (1, 31), 0x80000000),
        ("shl.b32", (1, 32), 0),
        ("shr.u32", (0x80000000, 31), 1),
        ("shr.u32", (0x80000000, 40), 0),
        ("shr.s32", (0x80000000, 31), ONES),
        ("shr.s32", (0x80000000, 99), ONES),
        ("shr.b32", (0x80000000, 1), 0x40000000),
        ("shf.l.wrap.b32", (0x80000000, 0x1, 1), 3),
        ("shf.r.wrap.b32", (0x2, 0x1, 33), 0x80000001),
        ("shf.l.clamp.b32", (0x12345678, 0x9ABCDEF0, 40), 0x12345678),
        ("shf.r.clamp.b32", (0x12345678, 0x9ABCDEF0, 40), 0x9ABCDEF0),
        ("bfe.u32", (0xABCD1234, 8, 8), 0x12),
        ("bfe.s32", (0x0000F000, 12, 4), ONES),
        ("bfe.s32", (0x00007000, 12, 4), 7),
        ("bfe.u32", (ONES, 28, 8), 0xF),
        ("bfe.s32", (0x80000000, 28, 8), 0xFFFFFFF8),
        ("bfe.u32", (ONES, 0, 0), 0),
        ("bfe.s32", (ONES, 4, 0), 0),
        ("bfe.u32", (0x12345678, 0, 32), 0x12345678),
        ("bfi.b32", (0xFF, 0x12345678, 8, 8), 0x1234FF78),
        ("bfi.b32", (0xFF, 0x12345678, 8, 0), 0x12345678),
        ("bfi.b32", (0xFF, 0, 28, 8), 0xF0000000),
        ("brev.b32", (1,), 0x80000000),
        ("brev.b32", (0x0F000000,), 0xF0),
        ("popc.b32", (0xF0F,), 8),
        ("clz.b32", (0,), 32),
        ("clz.b32", (0x00010000,), 15),
        ("clz.b32", (0x80000000,), 0),
        ("bfind.u32", (0x00010000,), 16),
        ("bfind.s32", (-1,), ONES),
        ("bfind.s32", (-256,), 7),
        ("bfind.shiftamt.u32", (0x00010000,), 15),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7531), 0x77553311),
        ("prmt.b32", (0x33221180, 0x77665544, 0x0008), 0x808080FF),
        ("lop3.b32", (0b1100, 0b1010, 0b0110), None),
    ],
)
def test_32_bits(opcode: str, operands: tuple[int, ...], expected: int | None) -> None:
    names = "abcd"[: len(operands)]
    inputs = {name: U(value & ONES) for name, value in zip(names, operands, strict=True)}
    text = ", ".join(f"%{name}" for name in names)
    if opcode.startswith("lop3"):
        for table, wanted in ((0x80, 0b1100 & 0b1010 & 0b0110), (0x96, 0b1100 ^ 0b1010 ^ 0b0110), (0xFE, 0b1110)):
            (found,) = evaluate(f"{opcode} %r, {text}, {table};", inputs, {"r": "u4"})
            assert found == wanted
        return
    (found,) = evaluate(f"{opcode} %r, {text};", inputs, {"r": "u4"})
    assert hex(found[0]) == hex(expected & ONES)


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.s64", (2**64 - 1, 1), 0),
        ("sub.s64", (0, 1), 2**64 - 1),
        ("mul.lo.s64", (2**33, 2**33 + 1), 2**33),
        ("mul.hi.u64", (2**64 - 1, 2**64 - 1), 2**64 - 2),
        ("mul.hi.s64", (-1, 3), -1),
        ("mul.hi.s64", (-(2**62), 8), -2),
        ("mul.hi.s64", (5, -(2**62)), -2),
        ("div.s64", (-7, 2), -3),
        ("rem.s64", (-7, 2), -1),
        ("div.u64", (2**64 - 1, 2**32), 2**32 - 1),
        ("min.s64", (-1, 1), -1),
        ("max.s64", (-1, 1), 1),
        ("neg.s64", (1,), -1),
        ("and.b64", (2**40 + 3, 2**40 + 2), 2**40 + 2),
        ("or.b64", (2**40, 1), 2**40 + 1),
        ("xor.b64", (2**40, 2**40 + 1), 1),
        ("not.b64", (0,), 2**64 - 1),
        ("brev.b64", (1,), 2**63),
    ],
)
def test_64_bits(opcode: str, operands: tuple[int, ...], expected: int) -> None:
    names = "ab"[: len(operands)]
    inputs = {name: np.uint64(value % 2**64) for name, value in zip(names, operands, strict=True)}
    text = ", ".join(f"%{name}" for name in names)
    (found,) = evaluate(f"{opcode} %r, {text};", inputs, {"r": "u8"})
    assert int(found[0]) == expected % 2**64


@pytest.mark.parametrize(
    ("opcode", "inputs", "result", "expected"),
    [
        ("mul.wide.s32 %r, %a, %b", {"a": S(-3), "b": S(2**30)}, "i8", -3 * 2**30),
        ("mul.wide.u32 %r, %a, %b", {"a": U(ONES), "b": U(ONES)}, "u8", ONES * ONES),
        ("mad.wide.s32 %r, %a, -4, %b", {"a": S(-3), "b": np.int64(5)}, "i8", 17),
        ("mad.wide.u32 %r, %a, 12, %b", {"a": U(ONES), "b": np.int64(5)}, "i8", 12 * ONES + 5),
        ("mad.lo.s64 %r, %a, 12, %b", {"a": np.int64(-1), "b": np.int64(5)}, "i8", -7),
        ("shl.b64 %r, %a, 40", {"a": np.uint64(3)}, "u8", 3 << 40),
        ("shl.b64 %r, %a, %b", {"a": np.uint64(3), "b": U(64)}, "u8", 0),
        ("shr.s64 %r, %a, 63", {"a": np.int64(-2)}, "i8", -1),
        ("shr.u64 %r, %a, 62", {"a": np.int64(-2)}, "i8", 3),
        ("bfe.u64 %r, %a, 40, 8", {"a": np.uint64(0xAB << 40)}, "u8", 0xAB),
        ("bfi.b64 %r, %a, %b, 40, 8", {"a": np.uint64(0xAB), "b": np.uint64(1)}, "u8", (0xAB << 40) + 1),
        ("popc.b64 %r, %a", {"a": np.uint64(2**64 - 1)}, "u4", 64),
        ("clz.b64 %r, %a", {"a": np.uint64(1)}, "u4", 63),
        ("add.s16 %r, %a, %b", {"a": np.uint16(0xFFFF), "b": np.uint16(2)}, "u2", 1),
        ("mul.lo.s16 %r, %a, %b", {"a": np.uint16(300), "b": np.uint16(300)}, "u2", 300 * 300 % 65536),
        ("mul.wide.s16 %r, %a, %b", {"a": np.int16(-300), "b": np.int16(300)}, "i4", -90000),
        ("and.b16 %r, %a, 12", {"a": np.uint16(10)}, "u2", 8),
        ("shl.b16 %r, %a, 15", {"a": np.uint16(3)}, "u2", 0x8000),
        ("shr.s16 %r, %a, 15", {"a": np.int16(-3)}, "i2", -1),
        ("shr.u16 %r, %a, 15", {"a": np.int16(-3)}, "i2", 1),
        # The lower 16 or 8 bits of what is wider, signs and zeros in front of what is narrower.
        ("cvt.u16.u32 %r, %a", {"a": U(0x12345678)}, "u2", 0x5678),
        ("cvt.u32.u16 %r, %a", {"a": np.int16(-1)}, "u4", 0xFFFF),
        ("cvt.s32.s16 %r, %a", {"a": np.int16(-1)}, "i4", -1),
        ("cvt.s64.s32 %r, %a", {"a": S(-1)}, "i8", -1),
        ("cvt.u64.u32 %r, %a", {"a": S(-1)}, "i8", ONES),
        ("cvt.u32.u64 %r, %a", {"a": np.uint64(2**40 + 7)}, "u4", 7),
        ("cvt.s32.s8 %r, %a", {"a": np.uint16(0x1280)}, "i4", -128),
        ("cvt.u32.u8 %r, %a", {"a": np.uint16(0x1280)}, "u4", 128),
        ("cvt.sat.u16.u32 %r, %a", {"a": U(70000)}, "u2", 65535),
        ("cvt.sat.u32.s32 %r, %a", {"a": S(-5)}, "u4", 0),
        ("cvt.sat.s8.s32 %r, %a", {"a": S(300)}, "i2", 127),
        ("mov.u32 %r, %a", {"a": U(5)}, "u4", 5),
        ("mov.b32 %r, {%a, %b}", {"a": np.uint16(1), "b": np.uint16(2)}, "u4", 0x20001),
        ("mov.b64 %r, {%a, %b}", {"a": U(1), "b": U(2)}, "u8", 2**33 + 1),
        ("mov.b64 {_, %r}, %a", {"a": np.uint64(2**33 + 1)}, "u4", 2),
        ("mov.b64 {%r, _}, %a", {"a": np.uint64(2**33 + 1)}, "u4", 1),
        ("mov.b32 {_, %r}, %a", {"a": U(0x20001)}, "u2", 2),
    ],
)
def test_widths(opcode: str, inputs: dict, result: str, expected: int) -> None:
    (found,) = evaluate(f"{opcode};", inputs, {"r": result})
    assert int(found[0]) == expected


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        ("eq.s32", [0, 1, 0]),
        ("ne.s32", [1, 0, 1]),
        ("lt.s32", [1, 0, 0]),
        ("le.s32", [1, 1, 0]),
        ("gt.s32", [0, 0, 1]),
        ("ge.s32", [0, 1, 1]),
        ("lt.u32", [0, 0, 0]),
        ("lo.u32", [0, 0, 0]),
        ("hi.u32", [1, 0, 1]),
        ("ls.u32", [0, 1, 0]),
        ("hs.u32", [1, 1, 1]),
        ("eq.b32", [0, 1, 0]),
    ],
)
def test_setp_and_selp(compare: str, expected: list[int]) -> None:
    text = f"setp.{compare} %p, %a, %b; selp.b32 %r, 1, 0, %p;"
    inputs = {"a": np.array([-1, 5, 6], S), "b": np.array([3, 5, 1], S)}
    (found,) = evaluate(text, inputs, {"r": "u4"}, registers=".reg .pred %p;")
    assert found.tolist() == expected


def test_setp_with_a_second_result_and_a_third_operand() -> None:
    text = """
    setp.ne.s32 %c, %a, 2;
    setp.lt.and.s32 %p|%q, %a, %b, %c;
    selp.b32 %r, 1, 0, %p;
    selp.b32 %s, 1, 0, %q;
    setp.lt.or.s32 %p, %a, %b, !%c;
    selp.b32 %t, 1, 0, %p;
    """
    inputs = {"a": np.array([1, 2, 9], S), "b": np.array([3, 3, 3], S)}
    r, s, t = evaluate(text, inputs, {"r": "u4", "s": "u4", "t": "u4"}, registers=".reg .pred %p, %q, %c;")
    assert r.tolist() == [1, 0, 0]
    assert s.tolist() == [0, 0, 1]  # not (a < b), and c
    assert t.tolist() == [1, 1, 0]


def test_predicates_are_combined() -> None:
    text = """
    setp.lt.s32 %p, %a, 2;
    setp.gt.s32 %q, %a, 0;
    and.pred %c, %p, %q;   selp.u32 %r, 1, 0, %c;
    or.pred %c, %p, %q;    selp.u32 %s, 1, 0, %c;
    xor.pred %c, %p, %q;   selp.u32 %t, 1, 0, %c;
    not.pred %c, %p;       selp.u32 %u, 1, 0, %c;
    mov.pred %c, 1;        selp.u32 %v, 1, 0, %c;
    """
    outputs = dict.fromkeys("rstuv", "u4")
    r, s, t, u, v = evaluate(text, {"a": np.array([0, 1, 2], S)}, outputs, registers=".reg .pred %p, %q, %c;")
    assert r.tolist() == [0, 1, 0]
    assert s.tolist() == [1, 1, 1]
    assert t.tolist() == [1, 0, 1]
    assert u.tolist() == [0, 0, 1]
    assert v.tolist() == [1, 1, 1]
