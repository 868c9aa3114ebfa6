"""What the kernels along rays share: numbers drawn from a seed, density, absorption; and rows of tensors.

All but `rows` take tiles [RAYS, BLOCK_S] in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TRANSMITTANCE_FLOOR: tl.constexpr = tl.constexpr(1e-10)  # the reference's: added to 1 - alpha
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)  # ten bits, so that small integers times it are exact
LN2_LOW: tl.constexpr = tl.constexpr(-2.1219444005469057e-4)
PI: tl.constexpr = tl.constexpr(3.141592653589793)
# Which numbers of a seed are drawn for what: one seed serves all of a rendering.
IMPORTANCE_STREAM: tl.constexpr = tl.constexpr(0)
JITTER_STREAM: tl.constexpr = tl.constexpr(1)
COARSE_NOISE_STREAM: tl.constexpr = tl.constexpr(2)
NOISE_STREAM: tl.constexpr = tl.constexpr(3)
TILE = 128  # samples of a program that has one warp


# Numbers are limited by tl.where throughout: tl.maximum and tl.minimum would turn NaN into the limit.
#
# Products that are summed along a dimension are selected by tl.where too. The sum of two lanes would else be a fused
# multiply-add of one's product and the other's rounded one: the lanes would hold two roundings of one sum, and what is
# made of it depend on which of them is read.


@triton.jit
def uniforms(seed, ray, k, STREAM: tl.constexpr):
    """Two numbers of Philox at the counter (k, ray, STREAM), each in [0, 1), of the common shape of ray and k."""
    ray = ray.to(tl.int32)
    first, second, _, _ = tl.philox(seed, k, ray, ray * 0 + STREAM, ray * 0)
    return tl.uint_to_uniform_float(first), tl.uint_to_uniform_float(second)


@triton.jit
def _cos_turn(turn):
    """cos(2 pi turn) for turn in [0, 1): sin(y), y = pi (|2 turn - 1| - 1/2), by its series.

    (tl.cos prepares for any argument, and takes local memory for that.)
    """
    y = (tl.abs(2.0 * turn - 1.0) - 0.5) * PI
    series = tl.zeros_like(y) + 1.0
    for n in tl.static_range(12, 0, -2):
        series = 1.0 - y * y * (1.0 / (n * (n + 1))) * series
    return y * series


# Newer interpreters hand a number to a kernel as it is; older releases of Triton always as a tensor.
if hasattr(tl, "to_tensor"):

    @triton.jit
    def _as_tensor(x):
        return tl.to_tensor(x)

else:

    @triton.jit
    def _as_tensor(x):
        return x


@triton.jit
def density_noise(seed_ptr, noise_std, ray, k, STREAM: tl.constexpr):
    """Normal numbers by Box and Muller, times noise_std, a number or a pointer to it."""
    noise_std = _as_tensor(noise_std)
    if noise_std.dtype.is_ptr():
        noise_std = tl.load(noise_std)
    u, turn = uniforms(tl.load(seed_ptr), ray, k, STREAM)
    return noise_std * (tl.sqrt(-2.0 * tl.log(1.0 - u)) * _cos_turn(turn))


@triton.jit
def exp_minus(x):
    """e^-x for x >= 0 to about two roundings. (tl.exp rounds x log2(e), an error that grows with x.)"""
    x = tl.where(x > 104.0, 104.0, x)  # e^-104 is below the smallest fp32
    n = tl.floor(x * LOG2_E + 0.5)
    return tl.exp2(-n) * tl.exp2(((n * LN2_HIGH - x) + n * LN2_LOW) * LOG2_E)


@triton.jit
def _log_1_plus(z):
    """log(1 + z) for z in [0, 1] with full relative precision: 2 artanh(z / (2 + z)), a series in at most 1/9."""
    s = z / (2.0 + z)
    series = tl.zeros_like(s)
    for n in tl.static_range(15, 1, -2):
        series = s * s * (1.0 / n + series)
    return 2.0 * s * (1.0 + series)


@triton.jit
def density(x, softplus_beta, RELU: tl.constexpr):
    """softplus(beta x) / beta = (max(y, 0) + log(1 + e^-|y|)) / beta with y = beta x, or ReLU."""
    if RELU:
        result = tl.where(x <= 0.0, 0.0, x)
    else:
        y = x * softplus_beta
        result = (tl.where(y > 0.0, y, 0.0) + _log_1_plus(exp_minus(tl.abs(y)))) / softplus_beta
    return result


@triton.jit
def density_backward(x, grad, softplus_beta, RELU: tl.constexpr):
    """The gradient `grad` to `density` times its derivative: 1 / (1 + e^-y), or 0 where x is not positive."""
    if RELU:
        result = tl.where(x <= 0.0, 0.0, grad)
    else:
        y = x * softplus_beta
        z = exp_minus(tl.abs(y))
        result = grad * (tl.where(y > 0.0, 1.0, z) / (1.0 + z))
    return result


@triton.jit
def _then_sum(sum_l, before_l, sum_r, before_r):
    return sum_l + sum_r, sum_l + before_r


@triton.jit
def _then_product(product_l, before_l, product_r, before_r):
    return product_l * product_r, product_l * before_r


@triton.jit
def sum_before(x, REVERSE: tl.constexpr):
    """sum_{j<i} x_j along dimension 1, or sum_{j>i} x_j in reverse.

    A scan of (sum, sum without the last): taking x_i from a sum that includes it would lose what is small beside it.
    """
    return tl.associative_scan((x, tl.zeros_like(x)), 1, _then_sum, reverse=REVERSE)[1]


@triton.jit
def _product_before(x):
    """prod_{j<i} x_j along dimension 1."""
    return tl.associative_scan((x, tl.zeros_like(x) + 1.0), 1, _then_product)[1]


@triton.jit
def absorption(thickness, valid):
    """alpha_i = 1 - e_i with e_i = exp(-thickness_i), and T_i = prod_{j<i} (e_j + 1e-10), along dimension 1.

    Thin samples enter T by their sum, because a product of many factors near 1 rounds each of them (1e-10 is below that
    rounding), and thick ones by their product, because a large sum rounds to more than its exponential does.

    Args:
        thickness: [RAYS, BLOCK_S], not negative; what is not `valid` absorbs nothing.

    Returns:
        alpha, with full relative precision; T; e.
    """
    passed = exp_minus(thickness)
    thin = (thickness < 0.5) & valid
    x = tl.where(thin, thickness, 0.0)
    series = tl.zeros_like(x) + 1.0  # (1 - e^-x) / x = 1 - x/2 (1 - x/3 (1 - ...
    for n in tl.static_range(9, 1, -1):
        series = 1.0 - x * (1.0 / n) * series
    alpha = tl.where(thin, x * series, 1.0 - passed)
    thick = tl.where(thin | ~valid, 1.0, passed + TRANSMITTANCE_FLOOR)
    T = exp_minus(sum_before(x, REVERSE=False)) * _product_before(thick)
    return tl.where(valid, alpha, 0.0), T, passed


def rows(x: Tensor | None) -> Tensor | None:
    """[B, R, ...] as [B*R, ...] with dense rows. Copies only where rows are not dense or not evenly spaced."""
    if x is None:
        return None
    x = x.flatten(0, 1)
    dense = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != dense:
            return x.contiguous()
        dense *= size
    return x
