"""shfl, vote, redux, and the faults of threads that are not where others want them."""

import numpy as np
import pytest

from bench.ptx import BarrierFault, Uninitialized
from ptx_snippets import evaluate

LANES = np.arange(32)


def shuffle(text: str, a: np.ndarray | None = None, count: int = 32, **outputs: str) -> list[np.ndarray]:
    a = np.arange(count, dtype="u4") if a is None else a
    registers = ".reg .pred %p, %q; .reg .b32 %x, %y;"
    return evaluate(text, {"a": a}, outputs or {"r": "u4"}, registers=registers)


@pytest.mark.parametrize(
    ("way", "b", "c", "expected", "inside"),
    [
        ("up", 1, 0, np.maximum(LANES - 1, 0), LANES >= 1),
        ("up", 4, 0, np.where(LANES < 4, LANES, LANES - 4), LANES >= 4),
        ("down", 1, 31, np.minimum(LANES + 1, 31), LANES < 31),
        ("bfly", 16, 31, LANES ^ 16, LANES >= 0),
        ("bfly", 3, 31, LANES ^ 3, LANES >= 0),
        ("idx", 5, 31, LANES * 0 + 5, LANES >= 0),
        # Segments of 8 lanes: bits 8 to 12 say which bits of the lane stay.
        ("idx", 5, 0x1800 | 31, LANES // 8 * 8 + 5, LANES >= 0),
        ("down", 2, 0x1800 | 31, np.where(LANES % 8 < 6, LANES + 2, LANES), LANES % 8 < 6),
        ("up", 2, 0x1800, np.where(LANES % 8 >= 2, LANES - 2, LANES), LANES % 8 >= 2),
        # Behind lane 15 nothing is read.
        ("idx", 20, 15, LANES, LANES < 0),
        ("bfly", 16, 15, np.where(LANES >= 16, LANES ^ 16, LANES), LANES >= 16),
    ],
)
def test_shfl(way: str, b: int, c: int, expected: np.ndarray, inside: np.ndarray) -> None:
    expected = np.concatenate([expected, expected + 32])
    inside = np.tile(inside, 2)
    text = f"shfl.sync.{way}.b32 %r|%p, %a, {b}, {c}, -1; selp.b32 %s, 1, 0, %p;"
    r, s = shuffle(text, count=64, r="u4", s="u4")
    assert r.tolist() == expected.tolist()
    assert s.tolist() == inside.astype(int).tolist()
    text = f"mov.b32 %x, {b}; mov.b32 %y, {c}; shfl.sync.{way}.b32 %r, %a, %x, %y, -1;"
    assert shuffle(text, count=64)[0].tolist() == expected.tolist()


def test_every_lane_may_read_another() -> None:
    text = "mul.lo.s32 %x, %a, 7; and.b32 %x, %x, 31; shfl.sync.idx.b32 %r, %a, %x, 31, -1;"
    assert shuffle(text)[0].tolist() == (LANES * 7 % 32).tolist()


def test_what_all_threads_share_is_shuffled() -> None:
    assert shuffle("mov.b32 %x, 9; shfl.sync.up.b32 %r, %x, 1, 0, -1;")[0].tolist() == [9] * 32


def test_some_lanes_among_themselves() -> None:
    text = """
    mov.b32 %r, 99; setp.lt.u32 %p, %a, 8;
    @!p bra $end;
    shfl.sync.idx.b32 %r, %a, 7, 31, 255;
    $end:
    """.replace("@!p", "@!%p")
    assert shuffle(text)[0].tolist() == [7] * 8 + [99] * 24
    with pytest.raises(Uninitialized, match="the lane that is read takes no part"):
        shuffle(text.replace(" 7, 31", " 8, 31"))
    with pytest.raises(BarrierFault, match="names a thread that is elsewhere"):
        shuffle(text.replace("255", "511"))
    with pytest.raises(BarrierFault, match="not in its own membermask"):
        shuffle(text.replace("255", "127"))


def test_threads_that_returned_may_be_named() -> None:
    text = "setp.ge.u32 %p, %a, 8; @%p ret; shfl.sync.idx.b32 %r, %a, 7, 31, -1;"
    assert shuffle(text)[0].tolist() == [7] * 8 + [0] * 24
    with pytest.raises(Uninitialized):
        shuffle(text.replace(" 7, 31", " 9, 31"))


def test_vote() -> None:
    text = """
    setp.lt.u32 %p, %a, 40;
    vote.sync.all.pred %q, %p, -1; selp.b32 %r, 1, 0, %q;
    vote.sync.any.pred %q, %p, -1; selp.b32 %s, 1, 0, %q;
    vote.sync.uni.pred %q, %p, -1; selp.b32 %t, 1, 0, %q;
    vote.sync.ballot.b32 %u, %p, -1;
    """
    r, s, t, u = shuffle(text, count=96, **dict.fromkeys("rstu", "u4"))
    first = [0, 32, 64]
    assert r[first].tolist() == [1, 0, 0]
    assert s[first].tolist() == [1, 1, 0]
    assert t[first].tolist() == [1, 0, 1]
    assert u[first].tolist() == [0xFFFFFFFF, 0xFF, 0]
    assert (u == np.repeat(u[first], 32)).all()


def test_activemask() -> None:
    text = """
    mov.b32 %r, 0; setp.lt.u32 %p, %a, 3;
    @!%p bra $end;
    activemask.b32 %r;
    $end:
    """
    assert shuffle(text)[0].tolist() == [7] * 3 + [0] * 29


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.s32", sum(range(32)) - 5 * 32),
        ("min.s32", -5),
        ("max.s32", 26),
        ("min.u32", 0),
        ("max.u32", 2**32 - 1),
        ("and.b32", 0),
        ("or.b32", 2**32 - 1),
        ("xor.b32", int(np.bitwise_xor.reduce((np.arange(32) - 5).astype("u4")))),
    ],
)
def test_redux(opcode: str, expected: int) -> None:
    (r,) = shuffle(f"sub.s32 %x, %a, 5; redux.sync.{opcode} %r, %x, -1;")
    assert r.tolist() == [expected % 2**32] * 32


def test_redux_of_some_lanes() -> None:
    text = "mov.b32 %r, 0; setp.lt.u32 %p, %a, 4; @!%p bra $end; redux.sync.{}.s32 %r, %a, 15; $end:"
    assert shuffle(text.format("add"))[0].tolist() == [6] * 4 + [0] * 28
    assert shuffle(text.format("min"))[0].tolist() == [0] * 32
    assert shuffle(text.format("max"))[0].tolist() == [3] * 4 + [0] * 28


def test_lane_masks() -> None:
    text = "".join(f"mov.u32 %{name}, %lanemask_{name};" for name in ("lt", "le", "eq", "ge", "gt"))
    lt, le, eq, ge, gt = shuffle(text, **dict.fromkeys(("lt", "le", "eq", "ge", "gt"), "u4"))
    assert (lt[3], le[3], eq[3], ge[3], gt[3]) == (7, 15, 8, 0xFFFFFFF8, 0xFFFFFFF0)
    assert (lt[31], gt[31], ge[0]) == (0x7FFFFFFF, 0, 0xFFFFFFFF)
