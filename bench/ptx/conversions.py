"""cvt: between integers and floating point, and between types of different size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .operations import CODES, INTEGERS, Opcode, Operation, operation, pure
from .parse import Instruction
from .rounding import flush, round_from_double, saturate


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
