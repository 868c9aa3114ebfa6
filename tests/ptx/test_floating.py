"""Every form of bench.ptx's floating-point instructions against numbers worked by hand."""

from fractions import Fraction

import numpy as np
import pytest

from ptx_snippets import evaluate

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-126  # the smallest normal fp32 number
ULP = 2.0**-23


def result_of(opcode: str, operands: tuple, code: str = "f4", result: str | None = None) -> np.ndarray:
    names = "abc"[: len(operands)]
    inputs = {name: np.array(value, code) for name, value in zip(names, operands, strict=True)}
    text = ", ".join(f"%{name}" for name in names)
    (found,) = evaluate(f"{opcode} %r, {text};", inputs, {"r": result or code})
    return found


def assert_bits(found: np.ndarray, expected: float) -> None:
    """The same number, with the same sign of a zero; or both NaN."""
    wanted = np.array([expected], found.dtype)
    if np.isnan(wanted[0]):
        assert np.isnan(found[0])
    else:
        assert found.view(f"u{found.itemsize}").tolist() == wanted.view(f"u{found.itemsize}").tolist(), (found, wanted)


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.f32", (1.0, ULP / 2), 1.0),  # half a unit: to even
        ("add.f32", (1.0 + ULP, ULP / 2), 1.0 + 2 * ULP),
        ("add.rz.f32", (1.0, 0.75 * ULP), 1.0),
        ("add.rz.f32", (-1.0, -0.75 * ULP), -1.0),
        ("add.rm.f32", (-1.0, -0.25 * ULP), -1.0 - ULP),
        ("add.rp.f32", (1.0, 2.0**-80), 1.0 + ULP),
        ("add.rm.f32", (1.0, -(2.0**-80)), 1.0 - ULP / 2),
        ("add.rz.f32", (1.0, -(2.0**-80)), 1.0 - ULP / 2),
        ("add.sat.f32", (0.75, 0.75), 1.0),
        ("add.sat.f32", (NAN, 0.75), 0.0),
        ("add.f32", (TINY / 2, 0.0), TINY / 2),
        ("add.ftz.f32", (TINY / 2, 0.0), 0.0),
        ("add.ftz.f32", (-TINY / 2, -0.0), -0.0),
        ("sub.f32", (1.0, 3.0), -2.0),
        ("sub.rz.f32", (1.0, 2.0**-80), 1.0 - ULP / 2),
        ("mul.f32", (1.0 + ULP, 1.0 + ULP), 1.0 + 2 * ULP),
        ("mul.rz.f32", (1.0 + ULP, 1.0 + ULP), 1.0 + 2 * ULP),
        ("mul.rp.f32", (1.0 + ULP, 1.0 + ULP), 1.0 + 3 * ULP),
        ("mul.ftz.f32", (TINY, 0.5), 0.0),
        ("mul.f32", (TINY, 0.5), TINY / 2),
        ("fma.rn.f32", (2.0, 3.0, 4.0), 10.0),
        # The product, not rounded: 1 + 2^-22 + 2^-46.
        ("fma.rn.f32", (1.0 + ULP, 1.0 + ULP, -(1.0 + 2 * ULP)), 2.0**-46),
        # In the middle of two numbers but for the product's last bit, which lies behind fp64's, too.
        ("fma.rn.f32", (2.0**-12 + 2.0**-35, 2.0**-12, 1.0), 1.0 + ULP),
        ("fma.rn.f32", (2.0**-12, 2.0**-12, 1.0), 1.0),
        ("fma.rn.f32", (-(2.0**-40), 2.0**-40, 1.0 + 1.5 * ULP - 0.5 * ULP), 1.0 + ULP),
        ("fma.rm.f32", (2.0**-40, -(2.0**-40), 1.0), 1.0 - ULP / 2),
        ("fma.rz.f32", (2.0**-40, -(2.0**-40), 1.0), 1.0 - ULP / 2),
        ("fma.rp.f32", (2.0**-40, 2.0**-40, 1.0), 1.0 + ULP),
        ("fma.rn.f32", (INF, 0.0, 1.0), NAN),
        ("fma.rn.f32", (INF, 1.0, 1.0), INF),
        ("fma.rn.f32", (3e38, 10.0, 0.0), INF),
        ("fma.rn.f32", (3e38, 10.0, -INF), -INF),
        ("fma.rn.f32", (-1.0, 0.0, 0.0), 0.0),
        ("fma.rn.f32", (-1.0, 0.0, -0.0), -0.0),
        ("fma.rn.ftz.f32", (TINY, 0.5, 0.0), 0.0),
        ("fma.rn.ftz.f32", (TINY / 2, 2.0, 1.0), 1.0),
        ("fma.rn.sat.f32", (2.0, 2.0, 0.0), 1.0),
        # A subnormal result, one unit and a half: a little less is rounded to one, a little more to two.
        ("fma.rn.f32", (2.0**-75 * (1 + 2.0**-20), 2.0**-75 * (1 - 2.0**-19), 2.0**-149), 2.0**-149),
        ("fma.rn.f32", (2.0**-75 * (1 + 2.0**-20), 2.0**-75, 2.0**-149), 2.0**-148),
        ("div.rn.f32", (1.0, 3.0), np.float32(1) / np.float32(3)),
        ("div.full.f32", (1.0, 3.0), np.float32(1) / np.float32(3)),
        ("div.approx.f32", (1.0, 2.0), 0.5),
        ("div.approx.f32", (3.0, -(2.0**127)), -0.0),
        ("div.rn.f32", (3.0, -(2.0**127)), np.float32(3) / np.float32(-(2.0**127))),
        ("div.full.ftz.f32", (1.0, TINY / 2), INF),
        ("rcp.rn.f32", (3.0,), np.float32(1) / np.float32(3)),
        ("rcp.approx.ftz.f32", (-4.0,), -0.25),
        ("rcp.approx.ftz.f32", (2.0**127,), 0.0),
        ("sqrt.rn.f32", (2.0,), np.sqrt(np.float32(2))),
        ("sqrt.approx.ftz.f32", (9.0,), 3.0),
        ("sqrt.approx.f32", (-1.0,), NAN),
        ("rsqrt.approx.f32", (0.25,), 2.0),
        ("rsqrt.approx.ftz.f32", (TINY / 4,), INF),
        ("ex2.approx.f32", (-3.0,), 0.125),
        ("ex2.approx.f32", (-149.0,), 2.0**-149),
        ("ex2.approx.ftz.f32", (-149.0,), 0.0),
        ("ex2.approx.ftz.f32", (-INF,), 0.0),
        ("lg2.approx.f32", (8.0,), 3.0),
        ("lg2.approx.ftz.f32", (0.0,), -INF),
        ("lg2.approx.f32", (-1.0,), NAN),
        ("sin.approx.f32", (0.0,), 0.0),
        ("cos.approx.f32", (0.0,), 1.0),
        ("tanh.approx.f32", (30.0,), 1.0),
        ("abs.f32", (-0.0,), 0.0),
        ("abs.ftz.f32", (-TINY / 2,), 0.0),
        ("neg.f32", (0.0,), -0.0),
        ("copysign.f32", (-1.0, 3.0), -3.0),  # the sign of the first, the size of the second
        ("min.f32", (-0.0, 0.0), -0.0),
        ("min.f32", (0.0, -0.0), -0.0),
        ("max.f32", (-0.0, 0.0), 0.0),
        ("max.f32", (-0.0, -0.0), -0.0),
        ("max.f32", (NAN, 1.0), 1.0),
        ("min.f32", (2.0, NAN), 2.0),
        ("max.NaN.f32", (NAN, 1.0), NAN),
        ("max.ftz.f32", (TINY / 2, -1.0), 0.0),
    ],
)
def test_fp32(opcode: str, operands: tuple[float, ...], expected: float) -> None:
    assert_bits(result_of(opcode, operands), expected)


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.f64", (1.0, 2.0**-53), 1.0),
        ("sub.f64", (1.0, 0.25), 0.75),
        ("mul.f64", (0.1, 3.0), 0.1 * 3.0),
        ("add.rn.f64", (0.1, 0.2), 0.1 + 0.2),
        ("fma.rn.f64", (1.0 + 2.0**-52, 1.0 + 2.0**-52, -(1.0 + 2.0**-51)), 2.0**-104),
        ("fma.rn.f64", (2.0**-27 + 2.0**-79, 2.0**-26, 1.0), 1.0 + 2.0**-52),
        ("fma.rn.f64", (2.0**-27, 2.0**-26, 1.0), 1.0),
        ("fma.rn.f64", (1e200, 1e200, -INF), -INF),
        ("fma.rn.f64", (1e200, 1e200, 1.0), INF),
        ("fma.rn.f64", (1e300, 1e-300, -1.0), float(Fraction(1e300) * Fraction(1e-300) - 1)),
        ("fma.rn.f64", (2.0**1000, 2.0**20, -(2.0**1019)), 2.0**1019),
        ("fma.rn.f64", (2.0**-600, 2.0**-460, 2.0**-1070), 2.0**-1060 + 2.0**-1070),
        ("fma.rn.f64", (0.0, 1.0, -0.0), 0.0),
        ("fma.rn.f64", (-1.0, 0.0, -0.0), -0.0),
        ("fma.rn.f64", (INF, 0.0, 1.0), NAN),
        ("div.rn.f64", (1.0, 3.0), 1 / 3),
        ("rcp.rn.f64", (3.0,), 1 / 3),
        ("sqrt.rn.f64", (2.0,), 2**0.5),
        ("rcp.approx.ftz.f64", (4.0,), 0.25),
        ("rsqrt.approx.ftz.f64", (4.0,), 0.5),
        ("neg.f64", (1.0,), -1.0),
        ("abs.f64", (-1.0,), 1.0),
        ("min.f64", (NAN, 1.0), 1.0),
        ("max.f64", (2.0, 1.0), 2.0),
        ("copysign.f64", (-0.0, 2.0), -2.0),
    ],
)
def test_fp64(opcode: str, operands: tuple[float, ...], expected: float) -> None:
    assert_bits(result_of(opcode, operands, "f8"), expected)


def test_rcp_approx_of_fp64_has_zeros_in_its_lower_half() -> None:
    (bits,) = result_of("rcp.approx.ftz.f64", (3.0,), "f8").view("u8")
    assert bits & 0xFFFFFFFF == 0
    assert abs(np.uint64(bits).view("f8") * 3 - 1) < 2.0**-19


@pytest.mark.parametrize("way", ["fp32", "fp64"])
def test_fma_is_rounded_once(way: str) -> None:
    """Random numbers whose sums lie at, or next to, the middle between two; the truth is in rational numbers."""
    rng = np.random.default_rng(0)
    code, bits = ("f4", 23) if way == "fp32" else ("f8", 52)
    count = 500
    c = (1 + rng.integers(0, 8, count) * 2.0**-bits).astype(code)
    # a b = 2^-(bits + 1) (1 + tiny) or (1 - tiny) or exactly that: half a unit of c.
    a = (2.0 ** -((bits + 1) // 2) * (1 + rng.integers(-1, 2, count) * 2.0 ** -(bits - 1))).astype(code)
    b = np.full(count, 2.0 ** -(bits + 1 - (bits + 1) // 2), code)
    found = evaluate(f"fma.rn.{way.replace('p', '')} %r, %a, %b, %c;", {"a": a, "b": b, "c": c}, {"r": code})[0]
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        unit = Fraction(2) ** -bits
        below = exact // unit * unit
        middle = below + unit / 2
        even = below if (below / unit) % 2 == 0 else below + unit
        nearest = below if exact < middle else below + unit if exact > middle else even
        assert Fraction(r) == nearest


@pytest.mark.parametrize("name", ["ex2", "lg2", "sin", "cos", "tanh", "rcp", "sqrt", "rsqrt"])
def test_approximations_are_within_a_rounding(name: str) -> None:
    x = np.linspace(0.1, 3, 100, dtype="f4")
    truth = {
        "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
        "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
    }[name](x.astype("f8"))  # fmt: skip
    (found,) = evaluate(f"{name}.approx.f32 %r, %a;", {"a": x}, {"r": "f4"})
    assert (np.abs(found - truth) <= np.spacing(np.abs(truth).astype("f4"))).all()


@pytest.mark.parametrize(
    ("opcode", "value", "code", "result", "expected"),
    [
        ("cvt.rn.f32.s32", 2**24 + 1, "i4", "f4", 2.0**24),
        ("cvt.rn.f32.s32", -5, "i4", "f4", -5.0),
        ("cvt.rz.f32.s32", 2**24 + 3, "i4", "f4", 2.0**24 + 2),
        ("cvt.rp.f32.u32", 2**24 + 1, "u4", "f4", 2.0**24 + 2),
        ("cvt.rn.f32.u32", 2**32 - 1, "u4", "f4", 2.0**32),
        ("cvt.rn.f32.u64", 2**63 + 2**39, "u8", "f4", 2.0**63),
        ("cvt.rn.f64.s64", -(2**53) - 1, "i8", "f8", -(2.0**53)),
        ("cvt.rn.f64.u32", 7, "u4", "f8", 7.0),
        ("cvt.rni.s32.f32", 2.5, "f4", "i4", 2),
        ("cvt.rni.s32.f32", -3.5, "f4", "i4", -4),
        ("cvt.rzi.s32.f32", -2.9, "f4", "i4", -2),
        ("cvt.rmi.s32.f32", -2.1, "f4", "i4", -3),
        ("cvt.rpi.s32.f32", 2.1, "f4", "i4", 3),
        ("cvt.rzi.s32.f32", 3e9, "f4", "i4", 2**31 - 1),
        ("cvt.rzi.s32.f32", -3e9, "f4", "i4", -(2**31)),
        ("cvt.rzi.s32.f32", NAN, "f4", "i4", 0),
        ("cvt.rzi.u32.f32", -5.0, "f4", "u4", 0),
        ("cvt.rzi.u32.f32", 3e9, "f4", "u4", 3_000_000_000),
        ("cvt.rzi.s64.f32", -1e12, "f4", "i8", int(np.float32(-1e12))),
        ("cvt.rzi.s64.f32", 1e30, "f4", "i8", 2**63 - 1),
        ("cvt.rzi.s64.f32", -INF, "f4", "i8", -(2**63)),
        ("cvt.rzi.s64.f64", 2.0**62, "f8", "i8", 2**62),
        ("cvt.rni.f32.f32", 2.5, "f4", "f4", 2.0),
        ("cvt.rmi.f32.f32", -0.5, "f4", "f4", -1.0),
        ("cvt.rmi.ftz.f32.f32", -TINY / 2, "f4", "f4", -0.0),
        ("cvt.rmi.f32.f32", -TINY / 2, "f4", "f4", -1.0),
        ("cvt.rzi.f32.f32", -0.5, "f4", "f4", -0.0),
        ("cvt.sat.f32.f32", 1.5, "f4", "f4", 1.0),
        ("cvt.sat.f32.f32", -1.5, "f4", "f4", 0.0),
        ("cvt.sat.f32.f32", NAN, "f4", "f4", 0.0),
        ("cvt.f64.f32", 0.1, "f4", "f8", float(np.float32(0.1))),
        ("cvt.rn.f32.f64", 1 + 2.0**-24, "f8", "f4", 1.0),
        ("cvt.rp.f32.f64", 1 + 2.0**-40, "f8", "f4", 1 + ULP),
        ("cvt.rz.f32.f64", 1 + 1.9 * ULP, "f8", "f4", 1 + ULP),
        ("cvt.rn.f16.f32", 1 + 2.0**-11, "f4", "f2", 1.0),
        ("cvt.rn.f16.f32", 65520.0, "f4", "f2", INF),
        ("cvt.rz.f16.f32", 1 + 1.9 * 2.0**-10, "f4", "f2", 1 + 2.0**-10),
        ("cvt.rn.f16.f32", 2.0**-25, "f4", "f2", 0.0),
        ("cvt.rn.f16.f32", 1.5 * 2.0**-25, "f4", "f2", 2.0**-24),
        ("cvt.f32.f16", 2.0**-24, "f2", "f4", 2.0**-24),
        # bf16 and tf32, whose bits are compared.
        ("cvt.rn.bf16.f32", 1 + 2.0**-8, "f4", "u2", 0x3F80),
        ("cvt.rn.bf16.f32", 1 + 3 * 2.0**-8, "f4", "u2", 0x3F82),
        ("cvt.rn.bf16.f32", NAN, "f4", "u2", 0x7FFF),
        ("cvt.rz.bf16.f32", -1.999, "f4", "u2", 0xBFFF),
        ("cvt.f32.bf16", 0x3FC0, "u2", "f4", 1.5),
        ("cvt.rna.tf32.f32", 1 + 2.0**-11, "f4", "f4", 1 + 2.0**-10),
        ("cvt.rna.tf32.f32", -1 - 2.0**-11, "f4", "f4", -1 - 2.0**-10),
        ("cvt.rna.tf32.f32", 1 + 0.999 * 2.0**-11, "f4", "f4", 1.0),
        ("cvt.rn.tf32.f32", 1 + 2.0**-11, "f4", "f4", 1.0),
        ("cvt.rz.tf32.f32", 1 + 1.9 * 2.0**-10, "f4", "f4", 1 + 2.0**-10),
        ("cvt.rna.tf32.f32", INF, "f4", "f4", INF),
    ],
)
def test_conversions(opcode: str, value: float, code: str, result: str, expected: float) -> None:
    assert_bits(result_of(opcode, (value,), code, result), expected)


def test_conversions_to_pairs_put_the_first_operand_above() -> None:
    (found,) = evaluate("cvt.rn.f16x2.f32 %r, %a, %b;", {"a": np.float32(1), "b": np.float32(-2)}, {"r": "u4"})
    assert hex(found[0]) == hex(0x3C00C000)
    (found,) = evaluate("cvt.rn.bf16x2.f32 %r, %a, %b;", {"a": np.float32(1), "b": np.float32(-2)}, {"r": "u4"})
    assert hex(found[0]) == hex(0x3F80C000)


@pytest.mark.parametrize(
    ("compare", "expected"),
    [  # of (1, 2), (2, 2), (NaN, 2), (-0, 0)
        ("eq", [0, 1, 0, 1]),
        ("ne", [1, 0, 0, 0]),
        ("lt", [1, 0, 0, 0]),
        ("le", [1, 1, 0, 1]),
        ("gt", [0, 0, 0, 0]),
        ("ge", [0, 1, 0, 1]),
        ("equ", [0, 1, 1, 1]),
        ("neu", [1, 0, 1, 0]),
        ("ltu", [1, 0, 1, 0]),
        ("leu", [1, 1, 1, 1]),
        ("gtu", [0, 0, 1, 0]),
        ("geu", [0, 1, 1, 1]),
        ("num", [1, 1, 0, 1]),
        ("nan", [0, 0, 1, 0]),
    ],
)
@pytest.mark.parametrize("code", ["f4", "f8", "f2", "bf16"])
def test_comparisons(compare: str, expected: list[int], code: str) -> None:
    a, b = np.array([1, 2, NAN, -0.0], "f4"), np.array([2, 2, 2, 0], "f4")
    kind = {"f4": "f32", "f8": "f64", "f2": "f16", "bf16": "bf16"}[code]
    inputs = {"a": a, "b": b}
    inputs = {n: (x.view("u4") >> 16).astype("u2") if code == "bf16" else x.astype(code) for n, x in inputs.items()}
    text = f"setp.{compare}.{kind} %p, %a, %b; selp.b32 %r, 1, 0, %p;"
    (found,) = evaluate(text, inputs, {"r": "u4"}, registers=".reg .pred %p;")
    assert found.tolist() == expected


def test_comparisons_flush_subnormals() -> None:
    text = "setp.gt{} %p, %a, 0f00000000; selp.b32 %r, 1, 0, %p;"
    for flush, expected in ((".f32", 1), (".ftz.f32", 0)):
        (found,) = evaluate(text.format(flush), {"a": np.float32(TINY / 2)}, {"r": "u4"}, registers=".reg .pred %p;")
        assert found[0] == expected


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("finite", [1, 1, 1, 0, 0]),
        ("infinite", [0, 0, 0, 1, 0]),
        ("number", [1, 1, 1, 1, 0]),
        ("notanumber", [0, 0, 0, 0, 1]),
        ("normal", [1, 0, 0, 0, 0]),
        ("subnormal", [0, 1, 0, 0, 0]),
    ],
)
def test_testp(test: str, expected: list[int]) -> None:
    a = np.array([1, TINY / 2, 0, INF, NAN], "f4")
    text = f"testp.{test}.f32 %p, %a; selp.b32 %r, 1, 0, %p;"
    (found,) = evaluate(text, {"a": a}, {"r": "u4"}, registers=".reg .pred %p;")
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.f16", (1.0, 2.0**-11), 1.0),
        ("add.rn.f16", (1 + 2.0**-10, 2.0**-11), 1 + 2.0**-9),
        ("sub.f16", (1.0, 3.0), -2.0),
        ("mul.f16", (300.0, 300.0), INF),
        ("mul.sat.f16", (300.0, 300.0), 1.0),
        ("fma.rn.f16", (1 + 2.0**-10, 1 + 2.0**-10, -(1 + 2.0**-9)), 2.0**-20),
        ("neg.f16", (1.0,), -1.0),
        ("abs.f16", (-1.0,), 1.0),
        ("max.f16", (NAN, 1.0), 1.0),
        ("min.NaN.f16", (NAN, 1.0), NAN),
        ("ex2.approx.f16", (3.0,), 8.0),
        ("tanh.approx.f16", (20.0,), 1.0),
        ("add.ftz.f16", (2.0**-24, 0.0), 0.0),
        ("add.f16", (2.0**-24, 0.0), 2.0**-24),
    ],
)
def test_fp16(opcode: str, operands: tuple[float, ...], expected: float) -> None:
    assert_bits(result_of(opcode, operands, "f2"), expected)


def _bf16(x: float) -> int:
    return int(np.float32(x).view("u4")) >> 16


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.bf16", (1.0, 2.0**-8), 1.0),
        ("sub.bf16", (1.0, 3.0), -2.0),
        ("mul.bf16", (1 + 2.0**-7, 1 + 2.0**-7), 1 + 2.0**-6),
        ("fma.rn.bf16", (1 + 2.0**-7, 1 + 2.0**-7, -(1 + 2.0**-6)), 2.0**-14),
        ("fma.rn.bf16", (2.0**-40, 2.0**-40, 1 + 2.0**-7), 1 + 2.0**-7),
        ("neg.bf16", (1.0,), -1.0),
        ("max.bf16", (2.0, 1.0), 2.0),
    ],
)
def test_bf16(opcode: str, operands: tuple[float, ...], expected: float) -> None:
    found = result_of(opcode, tuple(map(_bf16, operands)), "u2")
    assert hex(found[0]) == hex(_bf16(expected))


def test_fma_of_halves_is_rounded_once() -> None:
    """A product in the middle between two numbers, of which a tiny summand decides."""
    for tiny, last in ((2.0**-60, 2.0**-7), (-(2.0**-60), 0.0)):
        found = result_of("fma.rn.bf16", (_bf16(1 + 2.0**-4), _bf16(1 + 2.0**-4), _bf16(tiny)), "u2")
        assert hex(found[0]) == hex(_bf16(1 + 2.0**-3 + last))
    for tiny, last in ((2.0**-24, 2.0**-10), (-(2.0**-24), 0.0)):
        found = result_of("fma.rn.f16", (1 + 2.0**-5, 1 + 2.0**-6, tiny), "f2")
        assert found[0] == 1 + 2.0**-5 + 2.0**-6 + last


def test_pairs() -> None:
    def pair(low: float, high: float) -> np.uint32:
        return np.array([low, high], "f2").view("u4")[0]

    inputs = {"a": pair(1, 2), "b": pair(10, 20), "c": pair(-1, 1)}
    (found,) = evaluate("fma.rn.f16x2 %r, %a, %b, %c;", inputs, {"r": "u4"})
    assert found.view("f2").tolist() == [9, 41]
    (found,) = evaluate("add.f16x2 %r, %a, %b;", inputs, {"r": "u4"})
    assert found.view("f2").tolist() == [11, 22]
    (found,) = evaluate("neg.f16x2 %r, %a;", inputs, {"r": "u4"})
    assert found.view("f2").tolist() == [-1, -2]
    inputs = {"a": np.uint32(_bf16(2) << 16 | _bf16(1)), "b": np.uint32(_bf16(20) << 16 | _bf16(10))}
    (found,) = evaluate("mul.bf16x2 %r, %a, %b;", inputs, {"r": "u4"})
    assert hex(found[0]) == hex(_bf16(40) << 16 | _bf16(10))


def test_immediates_are_bits() -> None:
    text = "add.f32 %r, %a, 0f3F800000; mov.b32 %s, 0f40000000; mov.b32 %t, 1065353216; selp.f32 %u, 0fC0000000, %a, 1;"
    r, s, t, u = evaluate(text, {"a": np.float32(2)}, {"r": "f4", "s": "f4", "t": "f4", "u": "f4"})
    assert [*r, *s, *t, *u] == [3, 2, 1, -2]
    (d,) = evaluate("add.f64 %r, %a, 0d3FF0000000000000;", {"a": np.float64(2)}, {"r": "f8"})
    assert d[0] == 3
