"""What the decoder's kernels share: products with its matrices, and the points of rays.

Points are given as such, or as depths along rays; the kernels see both as rays, a point being one without a direction.
"""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_2 = tl.constexpr(2**0.5)


# In the products below hidden units are the rows and points the columns, so that every warp holds the weights of some
# hidden units as its operand. With points as rows each would hold all weights, more than there are registers.


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32, the operands rounded as PRECISION says."""
    if PRECISION == "ieee":
        # Without tensor cores lanes lie along the columns of what is multiplied, and read the second operand without
        # conflicts where its rows are contiguous: hidden units are the columns here.
        product = tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision="ieee"))
    elif PRECISION == "fp16":
        product = tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def load_matrix(matrix_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """A contiguous [ROWS, COLUMNS] matrix in fp32, padded with zeros to [BLOCK_R, BLOCK_K]."""
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask = (r < ROWS)[:, None] & (k < COLUMNS)[None, :]
    return tl.load(matrix_ptr + r[:, None] * COLUMNS + k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_operand(
    matrix_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for the first operand of `dot`; where that wants it, so that rows lie side by side in shared memory."""
    if PRECISION == "ieee":
        r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
        mask = (k < COLUMNS)[:, None] & (r < ROWS)[None, :]
        pointers = tl.max_contiguous(matrix_ptr + r[None, :] * COLUMNS + k[:, None], [1, 1])
        matrix = tl.trans(tl.load(pointers, mask=mask, other=0.0).to(tl.float32))
    else:
        matrix = load_matrix(matrix_ptr, ROWS, COLUMNS, BLOCK_R, BLOCK_K)
    return matrix


@triton.jit
def load_vector(vector_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(vector_ptr + i, mask=i < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _coordinate(origins_ptr, directions_ptr, ray, t, inverse_cube_scale, valid, AXIS: tl.constexpr):
    coordinate = tl.load(origins_ptr + ray * 3 + AXIS, mask=valid, other=0.0)
    if directions_ptr is not None:
        coordinate += t * tl.load(directions_ptr + ray * 3 + AXIS, mask=valid, other=0.0)
    return coordinate * inverse_cube_scale


@triton.jit
def points(origins_ptr, directions_ptr, t_ptr, inverse_cube_scale, image, n, num_points, samples):
    """The coordinates of points n of an image, sample n % samples of ray n // samples, and which of them exist."""
    valid = n < num_points
    ray = image * (num_points // samples) + n // samples
    t = 0.0
    if t_ptr is not None:
        t = tl.load(t_ptr + image * num_points + n, mask=valid, other=0.0)
    p0 = _coordinate(origins_ptr, directions_ptr, ray, t, inverse_cube_scale, valid, 0)
    p1 = _coordinate(origins_ptr, directions_ptr, ray, t, inverse_cube_scale, valid, 1)
    p2 = _coordinate(origins_ptr, directions_ptr, ray, t, inverse_cube_scale, valid, 2)
    return p0, p1, p2, valid
