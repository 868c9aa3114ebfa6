"""Floating point: arithmetic with the rounding that each opcode names, approximations, comparisons, conversions.

Approximations (`ex2.approx`, `div.full`, ...) are computed in fp64 and rounded once: within any documented error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .integer import _COMPARE, set_predicate
from .operations import CODES, INTEGERS, Opcode, Operation, operation, pure
from .parse import Instruction

_SMALLEST = {4: np.float32(2.0**-126), 8: 2.0**-1022}  # normal numbers


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of the same sign, `.ftz`."""
    small = np.abs(x) < _SMALLEST[x.dtype.itemsize]
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if np.count_nonzero(small) else x


def saturate(x: np.ndarray) -> np.ndarray:
    """Into [0, 1], NaN to 0, `.sat`."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def _flushing(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *operands: flush(function(*map(flush, operands)))


def _finished(opcode: Opcode, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """With the opcode's .ftz and .sat."""
    if "ftz" in opcode:
        function = _flushing(function)
    if "sat" in opcode:
        return lambda *operands: saturate(function(*operands))
    return function


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b rounded, and what the rounding lost (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def round_from_double(x: np.ndarray, lost: np.ndarray | float, dtype: str, way: str) -> np.ndarray:
    """x + lost, `lost` being less than half a unit of x's last place, in a narrower type, rounded once.

    Args:
        x: fp64.
        dtype: "f4" or "f2".
        way: rn, rz, rm or rp.
    """
    result = x.astype(dtype)
    wide = result.astype("f8")
    difference = wide - x  # exact; the result's error is difference - lost
    if way == "rn":
        # What lay just beside the middle of two numbers became the middle in fp64, and that was rounded to even.
        below, above = np.nextafter(result, dtype_of(dtype)(-np.inf)), np.nextafter(result, dtype_of(dtype)(np.inf))
        other = np.where(x > wide, above, below)
        middle = np.abs(other.astype("f8") - x) == np.abs(difference)
        towards_other = np.where(x > wide, lost > 0, lost < 0)
        return np.where(middle & (difference != 0) & towards_other, other, result)
    above = (difference > 0) | (difference == 0) & (lost < 0)
    below = (difference < 0) | (difference == 0) & (lost > 0)
    down = above if way == "rm" else above & (x > 0) if way == "rz" else np.zeros_like(above)
    up = below if way == "rp" else below & (x < 0) if way == "rz" else np.zeros_like(above)
    infinity = dtype_of(dtype)(np.inf)
    result = np.where(down & np.isfinite(x), np.nextafter(result, -infinity), result)
    return np.where(up & np.isfinite(x), np.nextafter(result, infinity), result)


def dtype_of(code: str) -> type[np.generic]:
    return np.dtype(code).type


# The bits of fp64 numbers that fp32 has no place for, and these where a number lies in the middle between two of fp32.
_BELOW_SINGLE, _MIDDLE = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)


def fma_single(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of fp32 numbers, rounded once to nearest.

    The product is exact in fp64 and the sum nearly so; it is looked at again where it lies in the middle between two
    fp32 numbers, or below the normal ones.
    """
    total = a.astype("f8") * b.astype("f8") + c.astype("f8")
    result = total.astype("f4")
    doubtful = (total.view("u8") & _BELOW_SINGLE) == _MIDDLE
    small = np.abs(result) < _SMALLEST[4]
    if np.count_nonzero(small):
        doubtful |= small & (total != 0)
    if np.count_nonzero(doubtful):
        a, b, c = (np.broadcast_to(x, result.shape)[doubtful].astype("f8") for x in (a, b, c))
        result[doubtful] = round_from_double(*two_sum(a * b, c), "f4", "rn")
    return result


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a b rounded, and what the rounding lost (Dekker, Veltkamp)."""
    product = a * b

    def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = 134217729.0 * x
        high = scaled - (scaled - x)
        return high, x - high

    (a1, a0), (b1, b0) = halves(a), halves(b)
    return product, ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0


def fma_double(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of fp64 numbers, rounded once to nearest (Boldo and Melquiond, "Emulation of FMA", 2008)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    product, product_lost = _two_product(a, b)
    high, low = two_sum(c, product_lost)
    total, total_lost = two_sum(product, high)
    odd, lost = two_sum(total_lost, low)
    bits = odd.view("i8")
    # Rounded to odd: where something was lost and the last bit is even, the neighbour on the side of what was lost.
    towards_zero = (lost > 0) != (odd > 0)
    bits = np.where((lost != 0) & (bits & 1 == 0), np.where(towards_zero, bits - 1, bits + 1), bits)
    result = total + bits.view("f8")
    # Too large to be split, or so small that what is lost is not a number of its own: by integers.
    size = np.abs(a * b)
    odd_ones = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a != 0) & (b != 0)
    odd_ones &= (size > 2.0**960) | (size < 2.0**-900) | (np.abs(a) > 2.0**960) | (np.abs(b) > 2.0**960)
    odd_ones |= odd_ones & (np.abs(c) > 2.0**1000)
    plain = ~np.isfinite(total) & ~odd_ones
    result = np.where(plain, a * b + c, result)
    if odd_ones.any():
        result[odd_ones] = [
            _fma_exactly(*map(float, x)) for x in zip(a[odd_ones], b[odd_ones], c[odd_ones], strict=True)
        ]
    return result


def _fma_exactly(a: float, b: float, c: float) -> float:
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    try:
        return float(exact)
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def fused_by(way: str) -> Callable[..., np.ndarray]:
    """fp32 a b + c with another rounding than to nearest."""

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return round_from_double(*two_sum(np.multiply(a, b, dtype="f8"), c.astype("f8")), "f4", way)

    return function


_PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


def _directed(base: str, way: str) -> Callable[..., np.ndarray]:
    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if base == "mul":
            return round_from_double(np.multiply(a, b, dtype="f8"), 0.0, "f4", way)
        b = -b if base == "sub" else b
        return round_from_double(*two_sum(a.astype("f8"), b.astype("f8")), "f4", way)

    return function


@operation("add sub mul", "rn rz rm rp ftz sat", types=("f32", "f64"))
def _plain(opcode: Opcode, _: Instruction) -> Operation | None:
    code = CODES[opcode.type]
    way = opcode.one_of("rn", "rz", "rm", "rp", default="rn")
    if way != "rn" and code == "f8":
        return None
    function = _PLAIN[opcode.base] if way == "rn" else _directed(opcode.base, way)
    return pure(_finished(opcode, function), code, code, code)


@operation("fma mad", "rn rz rm rp ftz sat", types=("f32", "f64"))
def _fused(opcode: Opcode, _: Instruction) -> Operation | None:
    code = CODES[opcode.type]
    way = opcode.one_of("rn", "rz", "rm", "rp", default="rn")
    if way != "rn" and code == "f8":
        return None
    function = fma_double if code == "f8" else fma_single if way == "rn" else fused_by(way)
    return pure(_finished(opcode, function), code, code, code, code)


def divide_approximately(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div.approx: where the divisor lies above 2^126, 0 and NaN for an infinite dividend."""
    large = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(large, np.where(np.isinf(a), np.nan, np.copysign(0, a) * np.sign(b)), a / b).astype("f4")


@operation("div", "rn approx full ftz", types=("f32", "f64"))
def _divide(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    function = divide_approximately if "approx" in opcode else np.divide
    return pure(_finished(opcode, function), code, code, code)


def _wide(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(x.astype("f8")).astype("f4")


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
_EXACT = {"rcp": lambda x: x.dtype.type(1) / x, "sqrt": np.sqrt}


@operation("rcp sqrt", "rn approx ftz", types=("f32",))
@operation("rsqrt ex2 lg2 sin cos tanh", "approx ftz", types=("f32",))
def _function(opcode: Opcode, _: Instruction) -> Operation | None:
    if "approx" in opcode:
        return pure(_finished(opcode, _wide(_FUNCTIONS[opcode.base])), "f4", "f4")
    return pure(_finished(opcode, _EXACT[opcode.base]), "f4", "f4") if "rn" in opcode else None


def _upper_bits(x: np.ndarray) -> np.ndarray:
    """fp64 numbers of which the lower 32 bits are zero."""
    return (x.view("u8") & np.uint64(0xFFFFFFFF00000000)).view("f8")


@operation("rcp sqrt rsqrt", "rn approx ftz", types=("f64",))
def _function_double(opcode: Opcode, _: Instruction) -> Operation | None:
    if "approx" not in opcode:
        return pure(_EXACT[opcode.base], "f8", "f8") if opcode.base in _EXACT and "rn" in opcode else None
    if "ftz" not in opcode or opcode.base == "sqrt":
        return None
    return pure(_flushing(lambda x: _upper_bits(_FUNCTIONS[opcode.base](x))), "f8", "f8")


@operation("abs neg", "ftz", types=("f32", "f64"))
def _sign(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    return pure(_finished(opcode, np.abs if opcode.base == "abs" else np.negative), code, code)


@operation("copysign", types=("f32", "f64"))
def _copysign(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    return pure(lambda sign, size: np.copysign(size, sign), code, code, code)


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number where one is NaN; -0 is below 0."""
    code = f"u{a.dtype.itemsize}"
    equal = a == b
    result = np.fmin(a, b)
    return np.where(equal, (a.view(code) | b.view(code)).view(a.dtype), result) if np.count_nonzero(equal) else result


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number where one is NaN; 0 is above -0."""
    code = f"u{a.dtype.itemsize}"
    equal = a == b
    result = np.fmax(a, b)
    return np.where(equal, (a.view(code) & b.view(code)).view(a.dtype), result) if np.count_nonzero(equal) else result


def _with_nan(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), function(a, b))


@operation("min max", "ftz NaN", types=("f32", "f64"))
def _limit(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    function = smaller if opcode.base == "min" else larger
    if "NaN" in opcode:
        function = _with_nan(function)
    return pure(_finished(opcode, function), code, code, code)


def _unordered(compare: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_FLOAT_COMPARE = {
    **_COMPARE,
    "ne": lambda a, b: (a < b) | (a > b),  # false where one is NaN
    **{f"{name}u": _unordered(compare) for name, compare in _COMPARE.items()},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@operation("setp", f"{' '.join(_FLOAT_COMPARE)} ftz and or xor", types=("f32", "f64"))
def _compare(opcode: Opcode, instruction: Instruction) -> Operation:
    compare = _FLOAT_COMPARE[opcode.words[0]]
    if "ftz" in opcode:
        plain = compare
        compare = lambda a, b: plain(flush(a), flush(b))  # noqa: E731
    return set_predicate(compare, opcode, instruction, CODES[opcode.type])


_TESTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: ~np.isnan(x),
    "notanumber": np.isnan,
    "normal": lambda x: np.isfinite(x) & (np.abs(x) >= _SMALLEST[x.dtype.itemsize]),
    "subnormal": lambda x: (x != 0) & (np.abs(x) < _SMALLEST[x.dtype.itemsize]),
}


@operation("testp", " ".join(_TESTS), types=("f32", "f64"))
def _test(opcode: Opcode, _: Instruction) -> Operation:
    return pure(_TESTS[opcode.words[0]], "?", CODES[opcode.type])


# ---- conversions


def single_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("u4") << np.uint32(16)).view("f4")


def bfloat16_of_single(x: np.ndarray, way: str = "rn") -> np.ndarray:
    """The bits of fp32 numbers rounded to bf16, rn or rz."""
    bits = x.view("u4")
    if way == "rn":
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype("u2"))


def tf32_of_single(x: np.ndarray, way: str = "rna") -> np.ndarray:
    """The bits of fp32 numbers rounded to 10 bits of mantissa: rna (ties away from zero), rn (to even) or rz."""
    bits = x.view("u4")
    if way == "rna":
        rounded = bits + np.uint32(0x1000)
    elif way == "rn":
        rounded = bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    else:
        rounded = bits
    return np.where(np.isfinite(x), rounded & np.uint32(0xFFFFE000), np.where(np.isnan(x), np.uint32(0x7FFFFFFF), bits))


def half_of_single(x: np.ndarray, way: str = "rn") -> np.ndarray:
    if way == "rn":
        return x.astype("f2")
    return round_from_double(x.astype("f8"), 0.0, "f2", way)


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def integer_of_float(x: np.ndarray, code: str, way: str) -> np.ndarray:
    """Rounded and limited to what the integer holds; NaN is 0."""
    limits = np.iinfo(code)
    rounded = _TO_INTEGER[way](x.astype("f8"))
    too_large = rounded >= float(limits.max) if code[1] == "8" else rounded > limits.max
    too_small = rounded < limits.min
    result = np.where(too_large | too_small | np.isnan(rounded), 0, rounded).astype(code)
    return np.where(too_large, limits.max, np.where(too_small, limits.min, result)).astype(code)


def _float_of_integer(code: str, way: str) -> Callable[[np.ndarray], np.ndarray]:
    if way == "rn":
        return (lambda x: x.astype("f8").astype("f2")) if code == "f2" else lambda x: x.astype(code)
    return lambda x: round_from_double(x.astype("f8"), 0.0, code, way)


def _convert_integer(code: str, saturated: bool) -> Callable[[np.ndarray], np.ndarray]:
    limits = np.iinfo(code)
    if not saturated:
        return lambda x: x.astype(code)
    return lambda x: np.clip(x, max(limits.min, np.iinfo(x.dtype).min), min(limits.max, np.iinfo(x.dtype).max)).astype(
        code
    )


def _packed(half: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """Two fp32 numbers, the upper one first, in halves of 32 bits."""

    def function(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        bits = [half(x).view("u2").astype("u4") for x in (upper, lower)]
        return bits[0] << np.uint32(16) | bits[1]

    return function


_ROUNDINGS = ("rn", "rz", "rm", "rp")


@operation("cvt", "rn rz rm rp rna rni rzi rmi rpi ftz sat")
def _convert(opcode: Opcode, _: Instruction) -> Operation | None:
    if len(opcode.types) != 2:
        return None
    to, source = opcode.types
    way = opcode.one_of(*_ROUNDINGS, "rna")
    whole = opcode.one_of(*_TO_INTEGER)
    small = ("u8", "s8")
    if to in INTEGERS + small and source in INTEGERS + small:
        return pure(_convert_integer(CODES[to], "sat" in opcode), CODES[to], CODES[source])
    if to in INTEGERS + small and source in ("f16", "f32", "f64") and whole:
        code = CODES[to]
        prepare = flush if "ftz" in opcode and source == "f32" else lambda x: x
        return pure(lambda x: integer_of_float(prepare(x), code, whole), code, CODES[source])
    if to in ("f16", "f32", "f64") and source in INTEGERS + small and way in _ROUNDINGS:
        if way != "rn" and (to == "f64" or source[1:] == "64"):
            return None
        return pure(_float_of_integer(CODES[to], way), CODES[to], CODES[source])
    return _convert_float(opcode, to, source, way, whole)


def _convert_float(opcode: Opcode, to: str, source: str, way: str, whole: str) -> Operation | None:
    code = CODES[to]
    if to == source and to in ("f16", "f32", "f64") and not way:
        function = _TO_INTEGER[whole] if whole else lambda x: x
    elif (source, to) in (("f32", "f64"), ("f16", "f32"), ("f16", "f64")) and not way:
        function = lambda x: x.astype(code)  # noqa: E731
    elif (source, to) in (("f64", "f32"), ("f64", "f16"), ("f32", "f16")) and way in _ROUNDINGS:
        function = (
            (lambda x: x.astype(code)) if way == "rn" else lambda x: round_from_double(x.astype("f8"), 0.0, code, way)
        )
    elif (source, to) == ("bf16", "f32") and not way:
        function = single_of_bfloat16
    elif (source, to) == ("f32", "bf16") and way in ("rn", "rz"):
        return pure(lambda x: bfloat16_of_single(x, way), "u2", "f4")
    elif (source, to) == ("f32", "tf32") and way in ("rna", "rn", "rz"):
        return pure(lambda x: tf32_of_single(x, way), "u4", "f4")
    elif (source, to) == ("f32", "f16x2") and way in ("rn", "rz"):
        return pure(_packed(lambda x: half_of_single(x, way)), "u4", "f4", "f4")
    elif (source, to) == ("f32", "bf16x2") and way in ("rn", "rz"):
        return pure(_packed(lambda x: bfloat16_of_single(x, way)), "u4", "f4", "f4")
    else:
        return None
    if "ftz" in opcode:
        plain = function
        function = (
            (lambda x: flush(plain(flush(x))))
            if source == to == "f32"
            else (lambda x: plain(flush(x)))
            if source == "f32"
            else (lambda x: flush(plain(x)))
        )
    if "sat" in opcode:
        unlimited = function
        function = lambda x: saturate(unlimited(x))  # noqa: E731
    return pure(function, code, CODES[source])
