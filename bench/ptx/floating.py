"""Floating point: arithmetic with the rounding that each opcode names, approximations, comparisons.

Approximations (`ex2.approx`, `div.full`, ...) are computed in fp64 and rounded once: within any documented error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .integer import _COMPARE, set_predicate
from .operations import CODES, Opcode, Operation, operation, pure
from .parse import Instruction
from .rounding import SMALLEST, flush, fma_double, fma_single, round_from_double, saturate, two_sum


def _flushing(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *operands: flush(function(*map(flush, operands)))


def _finished(opcode: Opcode, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """With the opcode's .ftz and .sat."""
    if "ftz" in opcode:
        function = _flushing(function)
    if "sat" in opcode:
        return lambda *operands: saturate(function(*operands))
    return function


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


def with_nan(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), function(a, b))


@operation("min max", "ftz NaN", types=("f32", "f64"))
def _limit(opcode: Opcode, _: Instruction) -> Operation:
    code = CODES[opcode.type]
    function = smaller if opcode.base == "min" else larger
    if "NaN" in opcode:
        function = with_nan(function)
    return pure(_finished(opcode, function), code, code, code)


def _unordered(compare: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


FLOAT_COMPARE = {
    **_COMPARE,
    "ne": lambda a, b: (a < b) | (a > b),  # false where one is NaN
    **{f"{name}u": _unordered(compare) for name, compare in _COMPARE.items()},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@operation("setp", f"{' '.join(FLOAT_COMPARE)} ftz and or xor", types=("f32", "f64"))
def _compare(opcode: Opcode, instruction: Instruction) -> Operation:
    compare = FLOAT_COMPARE[opcode.words[0]]
    if "ftz" in opcode:
        plain = compare
        compare = lambda a, b: plain(flush(a), flush(b))  # noqa: E731
    return set_predicate(compare, opcode, instruction, CODES[opcode.type])


_TESTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: ~np.isnan(x),
    "notanumber": np.isnan,
    "normal": lambda x: np.isfinite(x) & (np.abs(x) >= SMALLEST[x.dtype.itemsize]),
    "subnormal": lambda x: (x != 0) & (np.abs(x) < SMALLEST[x.dtype.itemsize]),
}


@operation("testp", " ".join(_TESTS), types=("f32", "f64"))
def _test(opcode: Opcode, _: Instruction) -> Operation:
    return pure(_TESTS[opcode.words[0]], "?", CODES[opcode.type])
