"""Rounding: numbers without their subnormals, cut to [0, 1], and sums and products that are rounded once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

SMALLEST = {2: np.float16(2.0**-14), 4: np.float32(2.0**-126), 8: 2.0**-1022}  # normal numbers


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of the same sign, `.ftz`."""
    small = np.abs(x) < SMALLEST[x.dtype.itemsize]
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if np.count_nonzero(small) else x


def saturate(x: np.ndarray) -> np.ndarray:
    """Into [0, 1], NaN to 0, `.sat`."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


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
    infinity = result.dtype.type(np.inf)
    wide = result.astype("f8")
    difference = wide - x  # exact; the result's error is difference - lost
    if way == "rn":
        # What lay just beside the middle of two numbers became the middle in fp64, and that was rounded to even.
        other = np.nextafter(result, np.where(x > wide, infinity, -infinity))
        middle = np.abs(other.astype("f8") - x) == np.abs(difference)
        towards_other = np.where(x > wide, lost > 0, lost < 0)
        return np.where(middle & (difference != 0) & towards_other, other, result)
    above = (difference > 0) | (difference == 0) & (lost < 0)
    below = (difference < 0) | (difference == 0) & (lost > 0)
    down = above & {"rm": True, "rp": False, "rz": x > 0}[way] & np.isfinite(x)
    up = below & {"rm": False, "rp": True, "rz": x < 0}[way] & np.isfinite(x)
    result = np.where(down, np.nextafter(result, -infinity), result)
    return np.where(up, np.nextafter(result, infinity), result)


# The bits of fp64 numbers that fp32 has no place for, and these where a number lies in the middle between two of fp32.
_BELOW_SINGLE, _MIDDLE = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)


def fma_single(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of fp32 numbers, rounded once to nearest.

    The product is exact in fp64 and the sum nearly so; it is looked at again where it lies in the middle between two
    fp32 numbers, or below the normal ones.
    """
    c = c.astype("f8")
    product = a.astype("f8") * b.astype("f8")
    total = product + c
    result = total.astype("f4")
    doubtful = (total.view("u8") & _BELOW_SINGLE) == _MIDDLE
    small = np.abs(result) < SMALLEST[4]
    if np.count_nonzero(small):
        doubtful |= small & (total != 0)
    if np.count_nonzero(doubtful):
        total, lost = two_sum(*(np.broadcast_to(x, result.shape)[doubtful] for x in (product, c)))
        if np.count_nonzero(lost):
            result[doubtful] = round_from_double(total, lost, "f4", "rn")
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
    finite = np.isfinite(a) & np.isfinite(b)
    plain = ~finite | ~np.isfinite(c) | (a == 0) | (b == 0)
    result = np.where(plain, np.where(finite & np.isinf(c), c, a * b + c), result)
    # Too large to be split, or so small that what is lost is not a number of its own: by rational numbers.
    size = np.abs(a * b)
    extreme = ~plain & ((size > 2.0**960) | (size < 2.0**-900))
    extreme |= ~plain & (np.maximum(np.maximum(np.abs(a), np.abs(b)), np.abs(c)) > 2.0**960)
    if np.count_nonzero(extreme):
        numbers = zip(a[extreme], b[extreme], c[extreme], strict=True)
        result[extreme] = [_fma_exactly(*map(float, x)) for x in numbers]
    return result


def _fma_exactly(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    try:
        return float(exact)
    except OverflowError:
        return np.inf if exact > 0 else -np.inf
