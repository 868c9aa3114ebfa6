"""Tri-plane sampling and the two-layer decoder in one: features and hidden units live in registers only."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decoder import SQRT_2, dot, load_operand, load_vector, points
from .decoder_gradients import _decode_triplane_bwd_kernel, _decode_triplane_scatter_kernel
from .planes import (
    adds_vectors,
    fixed_point_scale,
    from_fixed_point,
    gather_features,
    image_and_point,
    region_options,
    strides,
    zero_planes,
)
from .tuning import Case, Plan, architecture, plan

# The smallest size of a matrix product's operand.
MIN_DOT = 16

# Tiles of a program whose sums over them are kept apart: fewer programs, less memory.
DETERMINISTIC_TILES = 32

# With fewer programs of several tiles a GPU would not be full: they get one each.
MIN_PROGRAMS = 1024

# Its code takes more registers than some plans allow.
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)


@triton.jit
def _decode_triplane_fwd_kernel(
    planes_ptr,
    origins_ptr,
    directions_ptr,
    t_ptr,
    w0_ptr,
    b0_ptr,
    w1_ptr,
    b1_ptr,
    y_ptr,
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
):
    """y = w1 lrelu(w0 feature(p) + b0) + b1, p = (origin + t direction) / cube_scale, lrelu(x) = sqrt(2) max(x, x / 5).

    One program owns TILES tiles of BLOCK_N points of one image, one after the other: their features, hidden units and
    outputs. It keeps w0 over several tiles; with one it loads it last, so that it takes no registers before.
    """
    image, first = image_and_point(num_points, BLOCK_N * TILES)
    row_start = None if first_ptr is None else tl.load(first_ptr + image * 2)
    column_start = None if first_ptr is None else tl.load(first_ptr + image * 2 + 1)
    o = tl.arange(0, BLOCK_O)
    if TILES > 1:
        w0 = load_operand(w0_ptr, HIDDEN, CHANNELS, BLOCK_H, BLOCK_C, PRECISION)
    for tile in range(1 if TILES == 1 else tl.minimum(TILES, tl.cdiv(num_points - first, BLOCK_N))):
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
        if TILES == 1:
            w0 = load_operand(w0_ptr, HIDDEN, CHANNELS, BLOCK_H, BLOCK_C, PRECISION)
        w1 = load_operand(w1_ptr, OUT, HIDDEN, BLOCK_O, BLOCK_H, PRECISION)
        before = dot(w0, features, PRECISION) + load_vector(b0_ptr, HIDDEN, BLOCK_H)[:, None]
        hidden = before * tl.where(before > 0, SQRT_2, 0.2 * SQRT_2)
        y = dot(w1, hidden, PRECISION) + load_vector(b1_ptr, OUT, BLOCK_O)[:, None]
        mask = (o < OUT)[:, None] & valid[None, :]
        tl.store(y_ptr + o[:, None] + ((image * num_points + n) * OUT)[None, :], y, mask=mask)


def case(
    way: str,
    planes: Tensor,
    w0: Tensor,
    w1: Tensor,
    precision: str,
    arch: int,
    deterministic: bool = False,
    region: tuple[Tensor, tuple[int, int]] | None = None,
) -> Case:
    """What `tuning` knows a problem by, that of whole planes for a part of them; `way` is fwd or bwd."""
    (hidden, channels), size = w0.shape, planes.shape[2:] if region is None else region[1]
    texel = planes.element_size()
    return Case(f"decode_{way}", arch, channels, hidden, len(w1), *size, texel, precision, deterministic)


def fwd(
    planes: Tensor,
    origins: Tensor,
    directions: Tensor | None,
    t: Tensor | None,
    w0: Tensor,
    b0: Tensor,
    w1: Tensor,
    b1: Tensor,
    cube_scale: float = 1.0,
    precision: str = "fp32",
    *,
    region: tuple[Tensor, tuple[int, int]] | None = None,
    chosen: Plan | None = None,
    arch: int | None = None,
) -> Tensor:
    """Raw colour and density of points.

    Args:
        planes: [B, 3*C, H, W], fp32, fp16 or bf16, any strides.
        origins: Points [B, N, 3], then `directions` and `t` are None; or ray origins [B, R, 3]. fp32, as the next two.
        directions: [B, R, 3].
        t: [B, R, S].
        w0, b0, w1, b1: [hidden, C], [hidden], [out, hidden], [out]; fp32, fp16 or bf16.
        precision: "fp32", "tf32" or "fp16": how operands of the matrix products are rounded. Sums are fp32.
        region: (first [B, 2] integers, size of whole planes), where the planes are a part of such.
        chosen: Default: what `tuning` says.
        arch: Compute capability, as 80; default: that of the device.

    Returns:
        [B, N, out] or [B, R, S, out], in the widest dtype of planes and network.
    """
    shape = origins.shape[:2] if t is None else t.shape
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (planes, w0, b0, w1, b1)))
    y = torch.empty(*shape, w1.shape[0], dtype=dtype, device=planes.device)
    if y.numel() == 0:
        return y
    arch = architecture(planes.device) if arch is None else arch
    batch, num_points, samples = len(planes), shape[1:].numel(), 1 if t is None else shape[2]
    unit, plane_strides = strides(planes)
    (config,) = chosen or plan(case("fwd", planes, w0, w1, precision, arch, region=region))
    if OLD_TRITON and config.max_registers:
        config = config._replace(tiles=1, max_registers=None)
    programs = batch * triton.cdiv(num_points, config.block_n * config.tiles)
    if programs < MIN_PROGRAMS and config.tiles > 1:
        config = config._replace(tiles=1)
        programs = batch * triton.cdiv(num_points, config.block_n)
    with torch.cuda.device_of(planes):
        _decode_triplane_fwd_kernel[(programs,)](
            planes,
            *(None if x is None else x.contiguous() for x in (origins, directions, t)),
            *(x.contiguous() for x in (w0, b0, w1, b1)),
            y,
            1.0 / cube_scale,
            num_points,
            samples,
            *planes.shape[2:],
            *plane_strides,
            **region_options(region),
            **_sizes(w0, w1),
            BLOCK_N=config.block_n,
            TILES=config.tiles,
            UNIT=unit,
            PRECISION=_dot_precision(precision, arch),
            num_warps=config.num_warps,
            maxnreg=config.max_registers,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return y


def bwd(
    grad_y: Tensor,
    planes: Tensor,
    origins: Tensor,
    directions: Tensor | None,
    t: Tensor | None,
    w0: Tensor,
    b0: Tensor,
    w1: Tensor,
    cube_scale: float = 1.0,
    precision: str = "fp32",
    needs_planes: bool = True,
    needs_network: bool = True,
    deterministic: bool = False,
    *,
    region: tuple[Tensor, tuple[int, int]] | None = None,
    chosen: Plan | None = None,
    arch: int | None = None,
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """Gradients of `fwd` to planes and to the network; features and hidden units are computed again.

    "fp16" products of gradients are rounded to tf32: gradients may lie below the range of fp16.

    Args:
        grad_y: [B, N, out] or [B, R, S, out].
        needs_planes, needs_network: What to compute.
        region: See `fwd`.
        deterministic: The same bits whatever the order of programs. The planes' sum is in int64, as in
            `sample_triplane`; those of the network are written a row a program and added up by torch.

    Returns:
        The gradient to planes, channels_last, and those to w0, b0, w1, b1, all in fp32; None for what is not needed.
    """
    (hidden, channels), out = w0.shape, w1.shape[0]
    empty, device = grad_y.numel() == 0, planes.device
    fixed_point = deterministic and needs_planes and not empty
    grad_planes = scale = None
    if needs_planes:
        grad_planes = zero_planes(planes.shape, device, torch.int64 if fixed_point else torch.float32)
    sizes = [(hidden, channels), (hidden,), (out, hidden), (out,)]
    numbers = [*map(math.prod, sizes)]
    network = torch.zeros(1, sum(numbers), dtype=torch.float32, device=device) if needs_network else None
    if not empty:
        arch = architecture(device) if arch is None else arch
        batch, num_points, samples = len(planes), grad_y.shape[1:-1].numel(), 1 if t is None else t.shape[2]
        if fixed_point:
            scale = fixed_point_scale(_largest_grad_feature(grad_y, w0, w1), num_points)
        grad_y, unit, plane_strides = grad_y.contiguous(), *strides(planes)
        chosen = chosen or plan(case("bwd", planes, w0, w1, precision, arch, deterministic, region))
        inputs = [None if x is None else x.contiguous() for x in (origins, directions, t)]
        numbers_of_points = 1.0 / cube_scale, num_points, samples, *planes.shape[2:]
        w0, b0, w1 = (x.contiguous() for x in (w0, b0, w1))
        constants = {
            **region_options(region),
            **_sizes(w0, w1),
            "PRECISION": _dot_precision("tf32" if precision == "fp16" else precision, arch),
            "VECTORS": adds_vectors(arch, deterministic),
            "num_stages": 1,
            "enable_fp_fusion": True,
        }
        apart = len(chosen) == 2 and needs_planes and needs_network
        signs = None
        if apart:
            words = constants["BLOCK_H"] // 16
            signs = torch.empty(batch, num_points, words, dtype=torch.int16, device=device)
        config = chosen[-1] if needs_network else chosen[0]
        tiles = DETERMINISTIC_TILES if deterministic and needs_network else config.tiles
        programs = batch * triton.cdiv(num_points, config.block_n * tiles)
        if deterministic and needs_network:
            network = torch.empty(programs, sum(numbers), dtype=torch.float32, device=device)
        with torch.cuda.device_of(planes):
            _decode_triplane_bwd_kernel[(programs,)](
                grad_y,
                planes,
                *inputs,
                w0,
                b0,
                w1,
                None if apart else grad_planes,
                None if apart else scale,
                network,
                signs,
                *numbers_of_points,
                *plane_strides,
                **constants,
                BLOCK_N=config.block_n,
                TILES=tiles,
                UNIT=unit,
                DETERMINISTIC=deterministic,
                num_warps=config.num_warps,
                maxnreg=config.max_registers,
            )
            if apart:
                config = chosen[0]
                _decode_triplane_scatter_kernel[(batch * triton.cdiv(num_points, config.block_n * config.tiles),)](
                    grad_y,
                    signs,
                    *inputs,
                    w0,
                    w1,
                    grad_planes,
                    scale,
                    *numbers_of_points,
                    **constants,
                    BLOCK_N=config.block_n,
                    TILES=config.tiles,
                    num_warps=config.num_warps,
                    # Integers take more, and so do a part of planes and the code of Triton before 3.6.
                    maxnreg=None if fixed_point or region is not None or OLD_TRITON else config.max_registers,
                )
    if fixed_point:
        grad_planes = from_fixed_point(grad_planes, scale)
    if network is None:
        return grad_planes, None
    parts = (network[0] if len(network) == 1 else network.sum(0)).split(numbers)
    return grad_planes, tuple(part.view(size) for part, size in zip(parts, sizes, strict=True))


def _largest_grad_feature(grad_y: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    """A bound of |grad_feature|, sum_h |w0| sqrt(2) sum_o |w1| max |grad_y|, on the device."""
    largest = grad_y.abs().flatten(0, -2).amax(0).float()
    return (w0.float().abs().T @ (w1.float().abs().T @ largest)).amax() * 2**0.5


def _sizes(w0: Tensor, w1: Tensor) -> dict[str, int]:
    """The sizes of the network that the kernels are compiled for, plain and padded."""
    (hidden, channels), out = w0.shape, w1.shape[0]
    sizes = {"CHANNELS": channels, "HIDDEN": hidden, "OUT": out}
    blocks = {f"BLOCK_{name[0]}": max(MIN_DOT, triton.next_power_of_2(size)) for name, size in sizes.items()}
    return sizes | blocks


def _dot_precision(precision: str, arch: int) -> str:
    """What `dot` is told. Triton has no tensor cores before sm_80, and there fp32 is as fast as anything.

    From sm_80 on fp32 is tf32x3: three products of rounded parts keep the error of fp32, and take fewer instructions
    and registers than "ieee", multiplications one by one, which spill in the backward.
    """
    if arch < 80:
        return "ieee"
    return "tf32x3" if precision == "fp32" else precision
