"""Arithmetic on fp16 and bf16 numbers, alone or in pairs of 32 bits.

numpy rounds fp16 sums and products once; bf16 numbers are computed with in wider types and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .conversions import bfloat16_of_single, single_of_bfloat16
from .floating import FLOAT_COMPARE, larger, smaller, with_nan
from .integer import select, set_predicate
from .operations import Opcode, Operation, operation, pure
from .parse import Instruction
from .rounding import flush, round_from_double, saturate, two_sum

Function = Callable[..., np.ndarray]
_TYPES = ("f16", "bf16", "f16x2", "bf16x2")


def fma_half(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp16 a b + c, rounded once."""
    return round_from_double(*two_sum(a.astype("f8") * b.astype("f8"), c.astype("f8")), "f2", "rn")


def fma_bfloat16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The fp32 number that is rounded to the bf16 number next to a b + c; a, b and c are bf16 numbers in fp32."""
    total, lost = two_sum(a.astype("f8") * b.astype("f8"), c.astype("f8"))
    single = round_from_double(total, lost, "f4", "rz")
    # Rounded to odd: a last bit that says that something was cut off keeps the second rounding right.
    inexact = ((single != total) | (lost != 0)) & np.isfinite(total)
    return (single.view("u4") | inexact.astype("u4")).view("f4")


def _of_pairs(function: Function) -> Function:
    """On 32-bit registers that hold two numbers each, in 16 bits."""

    def paired(*registers: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(*(x.shape for x in registers))
        parts = [np.ascontiguousarray(np.broadcast_to(x, shape)).view("u2") for x in registers]
        return np.ascontiguousarray(function(*parts)).view("u4")

    return paired


def _made(opcode: Opcode, of_half: Function, of_single: Function, count: int) -> Operation:
    """An operation from the function on fp16 numbers and that on bf16 numbers in fp32."""
    kind = opcode.type.removesuffix("x2")

    def function(*bits: np.ndarray) -> np.ndarray:
        if kind == "bf16":
            return bfloat16_of_single(of_single(*map(single_of_bfloat16, bits)))
        numbers = [x.view("f2") for x in bits]
        if "ftz" in opcode:
            numbers = list(map(flush, numbers))
        result = of_half(*numbers)
        result = flush(result) if "ftz" in opcode else result
        return (saturate(result) if "sat" in opcode else result).view("u2")

    if opcode.type.endswith("x2"):
        return pure(_of_pairs(function), "u4", *["u4"] * count)
    return pure(function, "u2", *["u2"] * count)


_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@operation("add sub mul", "rn ftz sat", types=_TYPES)
def _plain(opcode: Opcode, _: Instruction) -> Operation:
    function = _ARITHMETIC[opcode.base]
    return _made(opcode, function, function, 2)


@operation("fma", "rn ftz sat relu", types=_TYPES)
def _fused(opcode: Opcode, _: Instruction) -> Operation | None:
    if "relu" in opcode:
        return None
    return _made(opcode, fma_half, fma_bfloat16, 3)


@operation("neg abs", "ftz", types=_TYPES)
def _sign(opcode: Opcode, _: Instruction) -> Operation:
    function = np.negative if opcode.base == "neg" else np.abs
    return _made(opcode, function, function, 1)


@operation("min max", "ftz NaN", types=_TYPES)
def _limit(opcode: Opcode, _: Instruction) -> Operation:
    function = smaller if opcode.base == "min" else larger
    if "NaN" in opcode:
        function = with_nan(function)
    return _made(opcode, function, function, 2)


@operation("ex2 tanh", "approx ftz", types=("f16", "f16x2"))
def _function(opcode: Opcode, _: Instruction) -> Operation:
    function = np.exp2 if opcode.base == "ex2" else np.tanh

    def rounded(x: np.ndarray) -> np.ndarray:
        return function(x.astype("f8")).astype("f2")

    return _made(opcode, rounded, rounded, 1)


@operation("setp", f"{' '.join(FLOAT_COMPARE)} ftz and or xor", types=("f16", "bf16"))
def _compare(opcode: Opcode, instruction: Instruction) -> Operation:
    compare = FLOAT_COMPARE[opcode.words[0]]
    if opcode.type == "f16":
        plain = compare
        compare = (lambda a, b: plain(flush(a), flush(b))) if "ftz" in opcode else plain
        return set_predicate(compare, opcode, instruction, "f2")
    return set_predicate(lambda a, b: compare(single_of_bfloat16(a), single_of_bfloat16(b)), opcode, instruction, "u2")


@operation("selp", types=("f16", "bf16", "f16x2", "bf16x2"))
def _select(opcode: Opcode, _: Instruction) -> Operation:
    code = "b4" if opcode.type.endswith("x2") else "b2"
    return Operation(select, (code,), (code, code, "?"), spreads="select")
