"""Integers, bits, predicates, comparisons and moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .operations import BITS, CODES, INTEGERS, Opcode, Operation, operation, pure
from .parse import Immediate, Instruction, Pair, Vector


def _width(code: str) -> int:
    return 8 * int(code[1:])


@operation("add sub", types=INTEGERS)
def _add(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type].replace("i", "u")
    return pure(np.add if opcode.base == "add" else np.subtract, code, code, code)


@operation("add sub", "sat", types=("s32",))
def _add_s32(opcode: Opcode, _: Instruction) -> Operation:
    function = np.add if opcode.base == "add" else np.subtract
    if "sat" in opcode:
        return pure(
            lambda a, b: np.clip(function(a, b, dtype="i8"), -(2**31), 2**31 - 1).astype("i4"), "i4", "i4", "i4"
        )
    return pure(function, "u4", "u4", "u4")


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    code = a.dtype.str[1:]
    if code[1] != "8":
        return (a.astype(code[0] + "8") * b.astype(code[0] + "8") >> _width(code)).astype(code)
    ua, ub = a.view("u8"), b.view("u8")
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = ua & mask, ua >> half, ub & mask, ub >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = (middle & mask) + a0 * b1
    high = a1 * b1 + (middle >> half) + (other >> half)
    if code == "i8":  # a negative factor was read as 2^64 more
        high = high - np.where(a < 0, ub, 0) - np.where(b < 0, ua, 0)
    return high.astype("u8").view(code)


def multiply_wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A product of twice the size."""
    kind, size = a.dtype.kind, a.dtype.itemsize
    wide = f"{kind}{2 * size}"
    return a.astype(wide) * b.astype(wide)


@operation("mul mad", "lo hi wide", types=INTEGERS)
def _multiply(opcode: Opcode, _: Instruction) -> Operation | None:
    code = CODES[opcode.type]
    way = opcode.one_of("lo", "hi", "wide")
    if way == "lo":
        function, code = np.multiply, code.replace("i", "u")
        result = code
    elif way == "hi":
        function, result = multiply_high, code
    elif way == "wide" and code[1] != "8":
        function, result = multiply_wide, f"{code[0]}{2 * int(code[1])}"
    else:
        return None
    if opcode.base == "mul":
        return pure(function, result, code, code)
    return pure(lambda a, b, c: function(a, b) + c, result, code, code, result)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero. By zero: all bits set, which the manual leaves open."""
    quotient = (a if a.dtype.kind == "u" else a - np.fmod(a, b)) // b
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of `divide`, with the sign of a. By zero: a."""
    return np.where(b == 0, a, np.fmod(a, b))


@operation("div rem", types=INTEGERS)
def _divide(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    return pure(divide if opcode.base == "div" else remainder, code, code, code)


_LIMITS = {"min": np.minimum, "max": np.maximum}


@operation("min max", types=INTEGERS)
def _limit(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    return pure(_LIMITS[opcode.base], code, code, code)


@operation("abs neg", types=("s16", "s32", "s64"))
def _sign(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    return pure(np.abs if opcode.base == "abs" else np.negative, code, code)


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@operation("and or xor", types=(*BITS, "pred"))
def _logic(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type].replace("b", "u")
    return pure(_LOGIC[opcode.base], code, code, code)


@operation("not", types=(*BITS, "pred"))
def _not(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type].replace("b", "u")
    return pure(np.invert, code, code)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
    for row in range(8):
        if table >> row & 1:
            terms = [x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result |= terms[0] & terms[1] & terms[2]
    return result


@operation("lop3", types=("b32",))
def _lop3(_: Opcode, instruction: Instruction) -> Operation | None:
    table = instruction.operands[4]
    if not isinstance(table, Immediate):
        return None
    return pure(lambda a, b, c, _: lop3(a, b, c, table.value), "u4", *["u4"] * 4)


def shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """By at most the width, which leaves 0."""
    width = _width(a.dtype.str[1:])
    return np.where(count < width, a << np.minimum(count, width - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """By at most the width, which leaves 0, or of a signed number the sign."""
    width = _width(a.dtype.str[1:])
    if a.dtype.kind == "i":
        return a >> np.minimum(count, width - 1).astype(a.dtype)
    return np.where(count < width, a >> np.minimum(count, width - 1).astype(a.dtype), a.dtype.type(0))


@operation("shl shr", types=(*BITS, *INTEGERS))
def _shift(opcode: Opcode, instruction: Instruction) -> Operation:
    code = CODES[opcode.type].replace("b", "u")
    count = instruction.operands[2]
    left = opcode.base == "shl"
    if isinstance(count, Immediate) and 0 <= count.value < _width(code):
        return pure(np.left_shift if left else np.right_shift, code, code, code)
    return pure(shift_left if left else shift_right, code, code, "u4")


def funnel_shift(low: np.ndarray, high: np.ndarray, count: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    """32 bits of high:low, shifted: the upper ones after a shift to the left, else the lower ones."""
    count = (count & 31 if wrap else np.minimum(count, 32)).astype("u8")
    both = high.astype("u8") << np.uint64(32) | low
    return ((both << count >> np.uint64(32)) if left else both >> count).astype("u4")


@operation("shf", "l r wrap clamp", types=("b32",))
def _funnel(opcode: Opcode, _: Instruction) -> Operation:
    left, wrap = "l" in opcode, "wrap" in opcode
    return pure(lambda a, b, c: funnel_shift(a, b, c, left, wrap), "u4", "u4", "u4", "u4")


def extract_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`length` bits from `position` on, signed ones extended by the field's uppermost bit (or a's, where it ends)."""
    width = _width(a.dtype.str[1:])
    position, length = position & 255, length & 255
    unsigned = a.view(f"u{width // 8}")
    kept = np.minimum(length, np.maximum(width, position) - position)
    field = shift_right(unsigned, position) & ~shift_left(~unsigned.dtype.type(0) + 0 * unsigned, kept)
    if a.dtype.kind == "u":
        return field
    last = np.minimum(position + length - 1, width - 1)
    sign = shift_right(unsigned, last) & 1
    extended = field | np.where(sign == 1, shift_left(~unsigned.dtype.type(0) + 0 * unsigned, kept), 0)
    return np.where(length == 0, 0, extended).astype(unsigned.dtype).view(a.dtype)


@operation("bfe", types=("u32", "s32", "u64", "s64"))
def _extract(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    return pure(extract_field, code, code, "u4", "u4")


def insert_field(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """b, with the low `length` bits of a from `position` on."""
    position, length = position & 255, length & 255
    ones = ~b.dtype.type(0) + 0 * b
    mask = shift_left(~shift_left(ones, length), position)
    return b & ~mask | shift_left(a, position) & mask


@operation("bfi", types=("b32", "b64"))
def _insert(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type].replace("b", "u")
    return pure(insert_field, code, code, code, "u4", "u4")


def reverse_bits(a: np.ndarray) -> np.ndarray:
    order = np.arange(256, dtype="u1")
    order = np.packbits(np.unpackbits(order.reshape(-1, 1), axis=1)[:, ::-1], axis=1).reshape(-1)
    bytes_of = np.ascontiguousarray(a).view("u1").reshape(*a.shape, a.dtype.itemsize)
    return np.ascontiguousarray(order[bytes_of][..., ::-1]).view(a.dtype).reshape(a.shape)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    """In front of the uppermost set bit; the width where none is set."""
    bytes_of = np.ascontiguousarray(a).view("u1").reshape(*a.shape, a.dtype.itemsize)[..., ::-1]
    return np.argmax(
        np.concatenate([np.unpackbits(bytes_of, axis=-1), np.ones((*a.shape, 1), "u1")], axis=-1), axis=-1
    ).astype("u4")


@operation("brev popc clz", types=("b32", "b64"))
def _count(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type].replace("b", "u")
    if opcode.base == "brev":
        return pure(reverse_bits, code, code)
    if opcode.base == "popc":
        return pure(lambda a: np.bitwise_count(a).astype("u4"), "u4", code)
    return pure(leading_zeros, "u4", code)


def last_set_bit(a: np.ndarray, shift_amount: bool) -> np.ndarray:
    """The place of the uppermost bit that is not the sign's; all bits set where there is none."""
    width = _width(a.dtype.str[1:])
    unsigned = np.where(a < 0, ~a, a).view(f"u{width // 8}")
    zeros = leading_zeros(unsigned)
    return np.where(zeros == width, 2**32 - 1, zeros if shift_amount else width - 1 - zeros).astype("u4")


@operation("bfind", "shiftamt", types=("u32", "s32", "u64", "s64"))
def _find_bit(opcode: Opcode, _: Instruction) -> Operation:
    return pure(lambda a: last_set_bit(a, "shiftamt" in opcode), "u4", CODES[opcode.type])


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i of the result is the one of b:a that digit i of the selector names, or its sign where the digit's bit 3
    is set."""
    both = b.astype("u8") << np.uint64(32) | a
    result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), "u4")
    for i in range(4):
        digit = selector >> np.uint32(4 * i)
        byte = (both >> (8 * (digit & 7)).astype("u8") & np.uint64(255)).astype("u4")
        byte = np.where(digit & 8, np.where(byte & 128, 255, 0), byte).astype("u4")
        result |= byte << np.uint32(8 * i)
    return result


@operation("prmt", types=("b32",))
def _permute(_: Opcode, __: Instruction) -> Operation:
    return pure(permute_bytes, "u4", "u4", "u4", "u4")


_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def set_predicate(compare: Callable[..., np.ndarray], opcode: Opcode, instruction: Instruction, code: str) -> Operation:
    """setp by a comparison: one result or its negation too, and perhaps combined with a predicate."""
    logic = opcode.one_of("and", "or", "xor")
    both = isinstance(instruction.operands[0], Pair)
    if not logic and not both:
        return pure(compare, "?", code, code)
    combine = _LOGIC[logic] if logic else lambda p, _: p

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray | tuple[np.ndarray, ...]:
        p = compare(a, b)
        return (combine(p, c), combine(~p, c)) if both else combine(p, c)

    return Operation(function, ("?",) * (1 + both), (code, code, *["?"] * bool(logic)))


@operation("setp", "eq ne lt le gt ge lo ls hi hs and or xor", types=(*BITS, *INTEGERS))
def _compare(opcode: Opcode, instruction: Instruction) -> Operation | None:
    name = opcode.words[0]
    compare = _COMPARE.get(_UNSIGNED.get(name, name))
    code = CODES[opcode.type].replace("b", "u")
    return compare and set_predicate(compare, opcode, instruction, code)


def select(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.where(p, a, b)


@operation("selp", types=(*BITS, *INTEGERS, "f32", "f64"))
def _select(opcode: Opcode, _: Instruction) -> Operation:
    code = f"b{CODES[opcode.type][1:]}"
    return Operation(select, (code,), (code, code, "?"), spreads="select")


@operation("mov", types=(*BITS, *INTEGERS, "f32", "f64", "pred"))
def _move(opcode: Opcode, instruction: Instruction) -> Operation:
    to, source = instruction.operands
    code = "?" if opcode.type == "pred" else f"b{CODES[opcode.type][1:]}"
    whole = f"u{code[1:]}"
    if isinstance(source, Vector):
        part = f"u{int(code[1:]) // len(source.of)}"
        return Operation(_pack(whole, _width(part)), (whole,), (part,) * len(source.of))
    if isinstance(to, Vector):
        count = len(to.of)
        part = f"u{int(code[1:]) // count}"
        return Operation(_unpack(part, count), (part,) * count, (whole,))
    return pure(lambda a: a, code, code)


def _pack(whole: str, width: int) -> Callable[..., np.ndarray]:
    def pack(*parts: np.ndarray) -> np.ndarray:
        result = parts[0].astype(whole)
        for i, part in enumerate(parts[1:], 1):
            result = result | part.astype(whole) << np.dtype(whole).type(i * width)
        return result

    return pack


def _unpack(part: str, count: int) -> Callable[..., tuple[np.ndarray, ...]]:
    def unpack(whole: np.ndarray) -> tuple[np.ndarray, ...]:
        width = whole.dtype.type(_width(part))
        return tuple((whole >> whole.dtype.type(i) * width).astype(part) for i in range(count))

    return unpack


@operation("cvta", "to global shared local const", types=("u64", "u32"))
def _generic_address(opcode: Opcode, _: Instruction) -> Operation | None:
    # Only global addresses are the same in both spaces; others would need windows, which nothing here asks for.
    return pure(lambda a: a, "u8", "u8") if "global" in opcode else None
