"""Cameras: angle priors, camera-to-world matrices and the rays of an image or of a patch of it.

Conventions: the camera sits on a sphere of `radius` around the origin at (yaw, pitch, roll), looks at the origin, world
up is +y. Pitch is the polar angle, measured from +y: 0 is above the object, pi/2 is level with it, pi is below it.
Camera axes are right, up, backward (it looks along its own -z). Roll is stored with the poses and unused.
Angles are in radians, the field of view in degrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PRIORS = ("custom", "uniform", "normal", "truncated_gaussian", "spherical_uniform")
BOX_MARGIN = 1e-5  # of the cube's half size, what `patch_boxes` adds around the samples
POLE_MARGIN = 1e-5  # pitch stays this far from the poles, where "left" is undefined


class Patch(NamedTuple):
    """Where patches lie, one in each of B images, in parts of the image's side."""

    scale: Tensor  # [B] in (0, 1], the side of the patch
    offset: Tensor  # [B, 2] (x, y), each in [0, 1 - scale], its lower left corner; y is measured from the bottom

    @classmethod
    def whole(cls, like: Tensor) -> Patch:
        """The whole images, as many as `like` has rows, in its dtype and on its device."""
        return cls(like.new_ones(len(like)), like.new_zeros(len(like), 2))

    def split(self, size: int) -> Iterator[Patch]:
        """Micro-batches."""
        return map(Patch, self.scale.split(size), self.offset.split(size))


def sample_angles(
    num: int,
    prior: str,
    *,
    yaw_mean: float = 0.0,
    yaw_spread: float = math.pi,
    pitch_mean: float = math.pi / 2,
    pitch_spread: float = math.pi / 2,
    draws: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws camera angles from a prior that has a formula.

    With u uniform in [0, 1) and n standard normal, per angle:
      uniform             2 (u - 0.5) spread + mean
      normal              n spread + mean
      truncated_gaussian  the same, n being the first of four draws that lies in (-2, 2)
      spherical_uniform   yaw as uniform; pitch = arccos(1 - 2 v), v = 2 (u - 0.5) spread / pi + mean / pi

    Args:
        num: How many cameras.
        prior: One of the four names above (`custom`, the poses of a data set, is drawn by the data set).
        draws: The numbers to use in place of fresh ones: [num, 2], or [num, 2, 4] for `truncated_gaussian`
            (column 0 is yaw, column 1 is pitch).

    Returns:
        [num, 3] float32: yaw, pitch in [1e-5, pi - 1e-5], roll = 0.

    Raises:
        ValueError: Unknown prior, or `draws` of another shape.
    """
    if prior not in PRIORS[1:]:
        raise ValueError(f"sample_angles: prior must be one of {', '.join(PRIORS[1:])}, got {prior!r}")
    shape = (num, 2, 4) if prior == "truncated_gaussian" else (num, 2)
    if draws is None:
        # Drawn one angle after the other, so that yaw comes first in the random stream.
        random = torch.rand if prior in ("uniform", "spherical_uniform") else torch.randn
        draws = torch.stack([random((num, *shape[2:]), device=device) for _ in range(2)], dim=1)
    if tuple(draws.shape) != shape:
        raise ValueError(f"sample_angles: draws must have shape {shape} for prior {prior}, got {tuple(draws.shape)}")

    if prior == "truncated_gaussian":
        first_inside = (draws.abs() < 2).float().argmax(dim=-1, keepdim=True)
        draws = draws.gather(-1, first_inside).squeeze(-1)
    yaw, pitch = draws.unbind(dim=1)
    if prior in ("normal", "truncated_gaussian"):
        yaw, pitch = yaw * yaw_spread + yaw_mean, pitch * pitch_spread + pitch_mean
    else:
        yaw = (yaw - 0.5) * 2 * yaw_spread + yaw_mean
        if prior == "uniform":
            pitch = (pitch - 0.5) * 2 * pitch_spread + pitch_mean
        else:
            v = (pitch - 0.5) * 2 * (pitch_spread / math.pi) + pitch_mean / math.pi
            pitch = torch.arccos(1 - 2 * v.clamp(POLE_MARGIN, 1 - POLE_MARGIN))
    pitch = pitch.clamp(POLE_MARGIN, math.pi - POLE_MARGIN)
    return torch.stack([yaw, pitch, torch.zeros_like(yaw)], dim=1)


def cam2world_matrix(angles: Tensor, radius: float | Tensor) -> Tensor:
    """Camera-to-world matrices of cameras on a sphere that look at the origin.

    position = radius (sin p cos y, cos p, sin p sin y); growing yaw moves the camera to its own left, growing pitch
    moves it down. Columns: right, up, backward, position.

    Args:
        angles: [B, 3] yaw, pitch, roll (unused) in radians; pitch is clamped to [1e-5, pi - 1e-5].
        radius: Distance from the origin, a number or [B].

    Returns:
        [B, 4, 4], dtype of `angles`.
    """
    yaw = angles[:, 0]
    pitch = angles[:, 1].clamp(POLE_MARGIN, math.pi - POLE_MARGIN)
    outward = torch.stack([pitch.sin() * yaw.cos(), pitch.cos(), pitch.sin() * yaw.sin()], dim=-1)  # [B, 3]
    forward = -outward
    x, _, z = forward.unbind(dim=-1)
    left = torch.stack([z, torch.zeros_like(z), -x], dim=-1)  # (0, 1, 0) x forward
    left = torch.nn.functional.normalize(left, dim=-1)
    up = torch.nn.functional.normalize(torch.cross(forward, left, dim=-1), dim=-1)
    position = outward * (radius.to(angles)[..., None] if isinstance(radius, Tensor) else radius)
    matrix = torch.zeros(len(angles), 4, 4, dtype=angles.dtype, device=angles.device)
    matrix[:, :3] = torch.stack([-left, up, outward, position], dim=-1)
    matrix[:, 3, 3].fill_(1)
    return matrix


def pixel_grid(
    resolution: int,
    patch: Patch | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Image-plane coordinates of the pixels, corner-aligned: x from -1 to 1 rightwards, y from 1 to -1 downwards.

    A patch of scale s and offset (ox, oy) sees x' = (x + 1) s - 1 + 2 ox and y' = (y + 1) s - 1 + 2 oy.

    Args:
        resolution: Pixels along each side of the image or patch.
        patch: None for the whole image.

    Returns:
        [B, resolution * resolution, 2] (B = 1 without a patch), row by row from the top.
    """
    if patch is not None:
        dtype, device = patch.scale.dtype, patch.scale.device
    axis = torch.linspace(-1, 1, resolution, dtype=dtype, device=device)
    y, x = torch.meshgrid(axis.flip(0), axis, indexing="ij")
    grid = torch.stack([x, y], dim=-1).reshape(1, -1, 2)  # [1, R, 2]
    if patch is not None:
        grid = (grid + 1) * patch.scale[:, None, None] - 1 + 2 * patch.offset[:, None, :]
    return grid


def extract_patches(images: Tensor, patch: Patch, resolution: int) -> Tensor:
    """Resamples images at the pixel grids of patches, bilinear and corner-aligned.

    Args:
        images: [B, 3, R, R].
        resolution: r.

    Returns:
        [B, 3, r, r].
    """
    grid = pixel_grid(resolution, patch).unflatten(1, (resolution, resolution))
    grid = torch.stack([grid[..., 0], -grid[..., 1]], dim=-1)  # image rows run downwards
    return torch.nn.functional.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=True
    )


def paste_patches(patches: Tensor, images: Tensor, patch: Patch, resolution: int) -> Tensor:
    """Images, upsampled, with patches at their places: the inverse of `extract_patches` inside of a patch.

    A pixel of the result at (x', y') lies at (x, y) = ((x', y') + 1 - 2 offset) / scale - 1 of the patch, and shows it
    there, bilinear and corner-aligned, if that is within [-1, 1]; else it shows the image.

    Args:
        patches: [B, C, r, r].
        images: [B, C, any, any].
        resolution: R.

    Returns:
        [B, C, R, R].
    """
    grid = pixel_grid(resolution, dtype=patch.scale.dtype, device=patch.scale.device)
    grid = (grid + 1 - 2 * patch.offset[:, None, :]) / patch.scale[:, None, None] - 1
    grid = grid.unflatten(1, (resolution, resolution))
    inside = (grid.abs() <= 1 + 1e-5).all(dim=-1)[:, None]  # the last pixel of a patch is hit but for rounding
    grid = torch.stack([grid[..., 0], -grid[..., 1]], dim=-1)  # image rows run downwards
    pasted = torch.nn.functional.grid_sample(
        patches, grid.to(patches.dtype), mode="bilinear", padding_mode="border", align_corners=True
    )
    whole = torch.nn.functional.interpolate(images, size=resolution, mode="bilinear", align_corners=True)
    return torch.where(inside, pasted, whole)


def camera_rays(
    cam2world: Tensor,
    fov: float | Tensor,
    resolution: int,
    patch: Patch | None = None,
) -> tuple[Tensor, Tensor]:
    """World-space rays of the pixels of an image or of a patch of it.

    Camera-space direction = norm(x', y', -1 / tan(fov / 2)).

    Args:
        cam2world: [B, 4, 4].
        fov: Field of view in degrees, a number or [B].
        resolution: Pixels along each side.
        patch: None for the whole image.

    Returns:
        ray_origins [B, R, 3] and unit ray_directions [B, R, 3], R = resolution^2, row by row from the top.
    """
    batch = len(cam2world)
    grid = pixel_grid(resolution, patch, dtype=cam2world.dtype, device=cam2world.device)
    grid = grid.to(cam2world.dtype).expand(batch, -1, -1)
    if isinstance(fov, Tensor):
        depth = -1 / torch.tan(torch.deg2rad(fov.to(grid)) / 2)
    else:  # written by a fill, as a copy from the host would make a GPU wait
        depth = grid.new_full((1,), -1 / math.tan(math.radians(fov) / 2))
    depth = depth.reshape(-1, 1, 1).expand(batch, grid.shape[1], 1)
    directions = torch.cat([grid, depth], dim=-1)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    # Multiplied and summed: TF32 would round a matrix product, by more than a pixel of a large image.
    x, y, z = (directions[..., i, None] * cam2world[:, None, :3, i] for i in range(3))
    directions = x + y + z
    origins = cam2world[:, None, :3, 3].expand_as(directions).contiguous()
    return origins, directions


def patch_boxes(
    cam2world: Tensor,
    fov: float | Tensor,
    ray_start: float,
    ray_end: float,
    cube_scale: float,
    plane_resolution: int,
    patch: Patch | None = None,
) -> Tensor:
    """The texels of the tri-planes that the rays of a patch, or of a whole image, can touch.

    With d_c the unit directions of the patch's corners and cos_c their cosines to the optical axis, every sample lies
    in the hull of the eight points o + (depth / cos_c) d_c, depth being ray_start min cos_c, or ray_end times the
    cosine at the patch's point next to the optical axis. Their ranges on the three axes are the box: the planes share
    the network's pixels, so columns cover axes 0 and 1, rows axes 1 and 2 (see `sample_triplane`).

    Args:
        cam2world: [B, 4, 4].
        fov: Degrees, a number or [B].
        ray_start, ray_end: Along unit rays, world units.
        cube_scale: Half size of the cube that the planes span, world units.
        plane_resolution: Texels along each side of a plane.
        patch: None for the whole image.

    Returns:
        [B, 4] int64 on the device of cam2world: first row, first column, and the row and column after the last.
    """
    matrix = cam2world.double()
    scale, offset = (x.to(matrix) for x in (Patch.whole(matrix) if patch is None else patch))
    low = 2 * offset - 1  # [B, 2], the corners in the image plane
    high = low + 2 * scale[:, None]
    nearest = torch.maximum(low, torch.minimum(high, torch.zeros_like(low)))  # to the optical axis
    fov = torch.as_tensor(fov, dtype=torch.float64, device=matrix.device).expand(len(matrix))
    focal = 1 / torch.tan(torch.deg2rad(fov) / 2)  # [B]
    x, y = (torch.stack([low[:, i], high[:, i]], dim=1) for i in range(2))
    corners = torch.stack([x[:, [0, 0, 1, 1]], y[:, [0, 1, 0, 1]]], dim=2) / focal[:, None, None]  # at depth 1

    def cosine(at: Tensor) -> Tensor:  # of image-plane points at depth 1 to the optical axis
        return (1 + at.square().sum(-1)).rsqrt()

    depths = torch.stack(
        [ray_start * cosine(corners).amin(dim=1), ray_end * cosine(nearest / focal[:, None])], dim=1
    )  # [B, 2], along the optical axis
    ahead = torch.cat([corners, -corners.new_ones(*corners.shape[:2], 1)], dim=2)  # [B, 4, 3], camera space
    ahead = ahead @ matrix[:, :3, :3].transpose(1, 2)
    points = matrix[:, None, None, :3, 3] + depths[:, :, None, None] * ahead[:, None]  # [B, 2, 4, 3]
    points = points.flatten(1, 2) / cube_scale
    # Samples are placed in fp32: a box may be a texel too large, never too small.
    lows, highs = points.amin(dim=1) - BOX_MARGIN, points.amax(dim=1) + BOX_MARGIN
    first, last = ((v.clamp(-1, 1) + 1) * ((plane_resolution - 1) / 2) for v in (lows, highs))  # [B, 3]
    first, last = first.floor().long(), (last.floor().long() + 1).clamp(max=plane_resolution - 1) + 1
    ends = [first[:, 1:].amin(dim=1), first[:, :2].amin(dim=1), last[:, 1:].amax(dim=1), last[:, :2].amax(dim=1)]
    return torch.stack(ends, dim=1)


def frustum_extent(fov: float, radius: float, ray_start: float, ray_end: float) -> float:
    """How far from the origin the view frustum reaches, over all directions (world units).

    The corner ray leaves the optical axis by a, tan a = sqrt(2) tan(fov / 2); its points at t = ray_start and ray_end
    are the farthest: sqrt((t cos a - radius)^2 + (t sin a)^2). Rendering is sound only if that is at most `cube_scale`.
    """
    a = math.atan(math.sqrt(2) * math.tan(math.radians(fov) / 2))
    return max(math.hypot(t * math.cos(a) - radius, t * math.sin(a)) for t in (ray_start, ray_end))
