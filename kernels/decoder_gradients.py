"""The kernels of `decode_triplane`'s backward, which computes features and hidden units again.

One makes all gradients; or it leaves those to planes to a second one, with the signs of hidden units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoder import SQRT_2, dot, load_matrix, load_operand, load_vector, points
from .planes import gather_features, image_and_point, scatter_gradient


@triton.jit
def _give_matrix(
    matrix_ptr,
    x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWN: tl.constexpr,
):
    """Writes the unpadded part of x [BLOCK_R, BLOCK_K] to a contiguous [ROWS, COLUMNS] matrix of the program's OWN, or
    adds it to one that programs share."""
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask = (r < ROWS)[:, None] & (k < COLUMNS)[None, :]
    pointers = matrix_ptr + r[:, None] * COLUMNS + k[None, :]
    if OWN:
        tl.store(pointers, x, mask=mask)
    else:
        tl.atomic_add(pointers, x, mask=mask, sem="relaxed")


@triton.jit
def _give_vector(vector_ptr, x, SIZE: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr):
    """The same for a vector."""
    i = tl.arange(0, BLOCK)
    if OWN:
        tl.store(vector_ptr + i, x, mask=i < SIZE)
    else:
        tl.atomic_add(vector_ptr + i, x, mask=i < SIZE, sem="relaxed")


@triton.jit
def _pack_signs(before, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of before [BLOCK_H, BLOCK_N] are positive: 16-bit words [BLOCK_H / 16, BLOCK_N], hidden unit after unit."""
    words = tl.reshape((before > 0).to(tl.int32), BLOCK_H // 16, 16, BLOCK_N) << tl.arange(0, 16)[None, :, None]
    return tl.sum(words, axis=1).to(tl.int16)


@triton.jit
def _word_pointers(signs_ptr, point, BLOCK_H: tl.constexpr):
    """Where the words of points lie, [BLOCK_H / 16, BLOCK_N]."""
    return signs_ptr + (point * (BLOCK_H // 16))[None, :] + tl.arange(0, BLOCK_H // 16)[:, None]


@triton.jit
def _decode_triplane_bwd_kernel(
    grad_y_ptr,
    planes_ptr,
    origins_ptr,
    directions_ptr,
    t_ptr,
    w0_ptr,
    b0_ptr,
    w1_ptr,
    grad_planes_ptr,
    scale_ptr,
    grad_network_ptr,
    signs_ptr,
    inverse_cube_scale,
    num_points,
    samples,
    height,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    first_ptr,
    whole_height,
    whole_width,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """With h = w0 feature + b0, y = w1 lrelu(h) + b1, features and h computed again:

        grad_h = lrelu'(h) w1^T grad_y     grad_w1 = sum grad_y lrelu(h)^T    grad_b1 = sum grad_y
        grad_feature = w0^T grad_h         grad_w0 = sum grad_h feature^T     grad_b0 = sum grad_h

    and grad_feature is scattered as in `sample_triplane`. One program owns TILES tiles of BLOCK_N points of one image,
    one after the other, and adds its sums over them to the weights' gradients at the end: w0's, b0's, w1's and b1's,
    one after the other at grad_network_ptr. All are sums over programs, by atomics into fp32. If DETERMINISTIC, the
    planes' is summed in int64 (see `scatter_gradient`), and every program has a row of grad_network_ptr of its own.
    The planes' or the weights' are left out where their pointers are None.
    """
    image, first = image_and_point(num_points, BLOCK_N * TILES)
    row_start = None if first_ptr is None else tl.load(first_ptr + image * 2)
    column_start = None if first_ptr is None else tl.load(first_ptr + image * 2 + 1)
    w0 = load_operand(w0_ptr, HIDDEN, CHANNELS, BLOCK_H, BLOCK_C, PRECISION)
    b0 = load_vector(b0_ptr, HIDDEN, BLOCK_H)
    w1 = load_matrix(w1_ptr, OUT, HIDDEN, BLOCK_O, BLOCK_H)
    o = tl.arange(0, BLOCK_O)
    grad_w0 = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    grad_b0 = tl.zeros([BLOCK_H], tl.float32)
    grad_w1 = tl.zeros([BLOCK_H, BLOCK_O], tl.float32)
    grad_b1 = tl.zeros([BLOCK_O], tl.float32)
    for tile in range(tl.minimum(TILES, tl.cdiv(num_points - first, BLOCK_N))):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        p0, p1, p2, valid = points(
            origins_ptr, directions_ptr, t_ptr, inverse_cube_scale, image, n, num_points, samples
        )
        features = gather_features(
            planes_ptr + image * stride_b * UNIT,
            p0,
            p1,
            p2,
            valid,
            height,
            width,
            stride_c,
            stride_h,
            stride_w,
            row_start,
            column_start,
            whole_height,
            whole_width,
            CHANNELS,
            BLOCK_C,
            UNIT,
        )
        features = tl.reshape(tl.permute(features, (0, 2, 1)), BLOCK_C, BLOCK_N)
        mask = valid[:, None] & (o < OUT)[None, :]
        grad_y_pointers = grad_y_ptr + ((image * num_points + n) * OUT)[:, None] + o[None, :]
        grad_y = tl.load(grad_y_pointers, mask=mask, other=0.0).to(tl.float32)

        before = dot(w0, features, PRECISION) + b0[:, None]
        if signs_ptr is not None:
            words = _pack_signs(before, BLOCK_H, BLOCK_N)
            tl.store(_word_pointers(signs_ptr, image * num_points + n, BLOCK_H), words, mask=valid[None, :])
        slope = tl.where(before > 0, SQRT_2, 0.2 * SQRT_2)
        grad_before = dot(tl.trans(w1), tl.trans(grad_y), PRECISION) * slope
        if grad_network_ptr is not None:
            grad_w1 += dot(before * slope, grad_y, PRECISION)
            grad_b1 += tl.sum(grad_y, axis=0)
            grad_w0 += dot(grad_before, tl.trans(features), PRECISION)
            # Selected, so that lanes which hold the same sum hold the same rounding of it: see `composite`.
            grad_b0 += tl.sum(tl.where(valid[None, :], grad_before, 0.0), axis=1)
        if grad_planes_ptr is not None:
            grad_features = dot(tl.trans(w0), grad_before, PRECISION)
            scatter_gradient(
                grad_planes_ptr + image * height * width * (3 * CHANNELS),
                scale_ptr,
                tl.permute(tl.reshape(grad_features, BLOCK_C // 8, 8, BLOCK_N), (0, 2, 1)),
                p0,
                p1,
                p2,
                valid,
                height,
                width,
                1,
                width * (3 * CHANNELS),
                3 * CHANNELS,
                row_start,
                column_start,
                whole_height,
                whole_width,
                CHANNELS,
                BLOCK_C,
                1,
                VECTORS,
            )
    if grad_network_ptr is not None:
        if DETERMINISTIC:
            grad_network_ptr += tl.program_id(0).to(tl.int64) * (HIDDEN * (CHANNELS + 1) + OUT * (HIDDEN + 1))
        _give_matrix(grad_network_ptr, grad_w0, HIDDEN, CHANNELS, BLOCK_H, BLOCK_C, DETERMINISTIC)
        grad_network_ptr += HIDDEN * CHANNELS
        _give_vector(grad_network_ptr, grad_b0, HIDDEN, BLOCK_H, DETERMINISTIC)
        grad_network_ptr += HIDDEN
        _give_matrix(grad_network_ptr, tl.trans(grad_w1), OUT, HIDDEN, BLOCK_O, BLOCK_H, DETERMINISTIC)
        grad_network_ptr += OUT * HIDDEN
        _give_vector(grad_network_ptr, grad_b1, OUT, BLOCK_O, DETERMINISTIC)


@triton.jit
def _decode_triplane_scatter_kernel(
    grad_y_ptr,
    signs_ptr,
    origins_ptr,
    directions_ptr,
    t_ptr,
    w0_ptr,
    w1_ptr,
    grad_planes_ptr,
    scale_ptr,
    inverse_cube_scale,
    num_points,
    samples,
    height,
    width,
    first_ptr,
    whole_height,
    whole_width,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """The planes' part of `_decode_triplane_bwd_kernel`, which has left the signs of hidden units: no texel is read."""
    image, first = image_and_point(num_points, BLOCK_N * TILES)
    row_start = None if first_ptr is None else tl.load(first_ptr + image * 2)
    column_start = None if first_ptr is None else tl.load(first_ptr + image * 2 + 1)
    o = tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    bits = tl.arange(0, 16)
    for tile in range(tl.minimum(TILES, tl.cdiv(num_points - first, BLOCK_N))):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < num_points
        point = image * num_points + n
        mask = valid[:, None] & (o < OUT)[None, :]
        grad_y = tl.load(grad_y_ptr + (point * OUT)[:, None] + o[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.trans(grad_y)
        grad_features = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        for word in range(BLOCK_H // 16):
            h = word * 16 + bits
            w0_pointers = w0_ptr + h[None, :] * CHANNELS + c[:, None]
            w0 = tl.load(w0_pointers, mask=(h < HIDDEN)[None, :] & (c < CHANNELS)[:, None], other=0.0).to(tl.float32)
            w1_pointers = w1_ptr + o[None, :] * HIDDEN + h[:, None]
            w1 = tl.load(w1_pointers, mask=(h < HIDDEN)[:, None] & (o < OUT)[None, :], other=0.0).to(tl.float32)
            signs = tl.load(signs_ptr + point * (BLOCK_H // 16) + word, mask=valid, other=0).to(tl.int32)
            positive = (signs[None, :] >> bits[:, None]) & 1
            grad_before = dot(w1, grad_y, PRECISION) * tl.where(positive != 0, SQRT_2, 0.2 * SQRT_2)
            grad_features += dot(w0, grad_before, PRECISION)
        # Only now, so that they take no registers before.
        p0, p1, p2, valid = points(
            origins_ptr, directions_ptr, t_ptr, inverse_cube_scale, image, n, num_points, samples
        )
        scatter_gradient(
            grad_planes_ptr + image * height * width * (3 * CHANNELS),
            scale_ptr,
            tl.permute(tl.reshape(grad_features, BLOCK_C // 8, 8, BLOCK_N), (0, 2, 1)),
            p0,
            p1,
            p2,
            valid,
            height,
            width,
            1,
            width * (3 * CHANNELS),
            3 * CHANNELS,
            row_start,
            column_start,
            whole_height,
            whole_width,
            CHANNELS,
            BLOCK_C,
            1,
            VECTORS,
        )
