"""Cameras: priors against draws worked by hand, the conventions of the matrices, and the rays of patches."""

from __future__ import annotations

import math
import re

import pytest
import torch

from checks import SIGMAS, assert_close, assert_finite, draw_uniform
from epigraf_fast.camera import (
    POLE_MARGIN,
    Patch,
    cam2world_matrix,
    camera_rays,
    extract_patches,
    frustum_extent,
    paste_patches,
    pixel_grid,
    sample_angles,
)

PI = math.pi


def as_tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_angles(num):
    """Yaw anywhere, pitch at least 0.2 from the poles, some roll."""
    u = draw_uniform(num, 3, seed=1)
    return torch.stack([(2 * u[:, 0] - 1) * PI, 0.2 + u[:, 1] * (PI - 0.4), u[:, 2]], dim=1)


# --- Priors


@pytest.mark.parametrize(
    ("prior", "settings", "draws", "expected"),
    [
        # (u - 1/2) * 2 * spread + mean
        ("uniform", {}, [0.75, 0.25], [0.5 * PI, 0.25 * PI]),
        ("uniform", {"yaw_mean": 1, "yaw_spread": 0.5, "pitch_mean": 2, "pitch_spread": 0.25}, [0.0, 1.0], [0.5, 2.25]),
        # n * spread + mean
        ("normal", {"yaw_mean": 1, "yaw_spread": 0.5, "pitch_mean": 2, "pitch_spread": 0.25}, [-1.0, 2.0], [0.5, 2.5]),
        ("normal", {"yaw_spread": 2.0}, [3.0, 0.0], [6.0, PI / 2]),
        # The first of four inside (-2, 2): 1.5, and -1.9 since 2 and -2 are not inside.
        (
            "truncated_gaussian",
            {"yaw_spread": 2.0, "yaw_mean": 1.0, "pitch_spread": 0.5},
            [[3.0, -2.5, 1.5, 0.0], [2.0, -2.0, -1.9, 1.0]],
            [4.0, PI / 2 - 0.95],
        ),
        # v = u here: u = 1/4 is pitch arccos(1/2) = pi/3.
        ("spherical_uniform", {}, [0.5, 0.25], [0.0, PI / 3]),
        # v = (u - 1/2) * 2 * 1/4 + 1/2: 3/4 at u = 1, pitch arccos(-1/2) = 2 pi/3; 1/4 at u = 0.
        ("spherical_uniform", {"pitch_spread": PI / 4, "yaw_spread": 0.5}, [1.0, 1.0], [0.5, 2 * PI / 3]),
        ("spherical_uniform", {"pitch_spread": PI / 4, "pitch_mean": 3 * PI / 4}, [0.5, 0.0], [0.0, PI / 2]),
    ],
)
def test_priors_by_hand(prior, settings, draws, expected):
    angles = sample_angles(1, prior, draws=as_tensor([draws]), **settings)
    assert_close(angles, [[*expected, 0.0]], "angles")


@pytest.mark.parametrize("prior", ["uniform", "normal", "truncated_gaussian", "spherical_uniform"])
def test_pitch_stays_off_the_poles(prior):
    low, high = (0.0, 1.0) if prior == "spherical_uniform" else (-1.9, 1.9)
    draws = torch.tensor([[0.0, low], [0.0, high]])
    if prior == "truncated_gaussian":
        draws = draws[..., None].expand(2, 2, 4)
    pitch = sample_angles(2, prior, draws=draws, pitch_spread=PI / 2 if prior == "spherical_uniform" else 9.0)[:, 1]
    # spherical_uniform clamps v: cos(pitch) = 1 - 2e-5 is an angle of sqrt(4e-5) = 0.00632.
    margin = math.acos(1 - 2 * POLE_MARGIN) if prior == "spherical_uniform" else POLE_MARGIN
    assert margin >= 1e-5
    assert_close(pitch, [margin, PI - margin], "pitch", "hand" if prior != "spherical_uniform" else torch.float16)


@pytest.mark.parametrize("prior", ["uniform", "normal", "truncated_gaussian", "spherical_uniform"])
def test_fresh_draws(prior):
    torch.manual_seed(3)
    angles = sample_angles(1000, prior, yaw_spread=0.5, pitch_spread=0.2, yaw_mean=-0.3)
    assert angles.shape == (1000, 3)
    assert angles.dtype == torch.float32
    assert (angles[:, 2] == 0).all()
    # The same stream handed in, yaw first.
    torch.manual_seed(3)
    random = torch.rand if prior in ("uniform", "spherical_uniform") else torch.randn
    shape = (1000, 4) if prior == "truncated_gaussian" else (1000,)
    draws = torch.stack([random(shape), random(shape)], dim=1)
    expected = sample_angles(1000, prior, draws=draws, yaw_spread=0.5, pitch_spread=0.2, yaw_mean=-0.3)
    assert_close(angles, expected, "angles", "exact")
    assert len(angles[:, 0].unique()) > 900
    if prior != "normal":
        reach = 2 if prior == "truncated_gaussian" else 1
        assert (angles[:, 0] + 0.3).abs().max() <= reach * 0.5 + 1e-6
    if prior in ("uniform", "truncated_gaussian"):
        assert (angles[:, 1] - PI / 2).abs().max() <= reach * 0.2 + 1e-6


def test_truncated_gaussian_is_one():
    torch.manual_seed(0)
    n = sample_angles(10000, "truncated_gaussian", yaw_spread=1.0)[:, 0].double()
    assert n.abs().max() < 2
    # Cut at 2 the variance is 1 - 2 * 2 * phi(2) / (2 Phi(2) - 1) = 1 - 4 * 0.0539910 / 0.9544997 = 0.7737413.
    assert abs(n.mean()) < SIGMAS * (0.7737413 / 10000) ** 0.5
    assert abs(n.square().mean() - 0.7737413) < SIGMAS * n.square().std() / 100
    assert n.square().std() / 100 < 0.02


def test_spherical_uniform_is_uniform_on_the_sphere():
    num = 20000
    torch.manual_seed(0)
    directions = cam2world_matrix(sample_angles(num, "spherical_uniform"), 1.0)[:, :3, 3].double()
    assert_close(directions.norm(dim=1), torch.ones(num), "length", torch.float32)
    # Components have variance 1/3, their squares 4/45, their products 1/15.
    assert directions.mean(dim=0).abs().max() < SIGMAS * (1 / 3 / num) ** 0.5
    moments = directions.T @ directions / num
    spread = torch.full((3, 3), (1 / 15 / num) ** 0.5).fill_diagonal_((4 / 45 / num) ** 0.5)
    assert ((moments - torch.eye(3) / 3).abs() < SIGMAS * spread).all()


def test_no_cameras():
    assert sample_angles(0, "normal").shape == (0, 3)
    assert cam2world_matrix(torch.zeros(0, 3), 1.0).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("prior", "draws", "message"),
    [
        ("custom", None, "prior must be one of uniform, normal, truncated_gaussian, spherical_uniform, got 'custom'"),
        ("gaussian", None, "prior must be one of uniform"),
        ("uniform", torch.zeros(3, 2), "draws must have shape (2, 2) for prior uniform, got (3, 2)"),
        ("uniform", torch.zeros(2, 2, 4), "draws must have shape (2, 2) for prior uniform"),
        ("truncated_gaussian", torch.zeros(2, 2), "draws must have shape (2, 2, 4) for prior truncated_gaussian"),
    ],
)
def test_prior_errors(prior, draws, message):
    with pytest.raises(ValueError, match=re.escape(f"sample_angles: {message}")):
        sample_angles(2, prior, draws=draws)


# --- Matrices


@pytest.mark.parametrize(
    ("yaw", "pitch", "right", "up", "backward"),
    [
        (PI / 2, PI / 2, [1, 0, 0], [0, 1, 0], [0, 0, 1]),  # on +z: camera and world axes agree
        (0, PI / 2, [0, 0, -1], [0, 1, 0], [1, 0, 0]),  # on +x, looking along -x
        (-PI / 2, PI / 2, [-1, 0, 0], [0, 1, 0], [0, 0, -1]),
        # On +z, 30 degrees above the horizon: up leans away from +z.
        (PI / 2, PI / 3, [1, 0, 0], [0, 0.75**0.5, -0.5], [0, 0.5, 0.75**0.5]),
    ],
)
def test_matrices_by_hand(yaw, pitch, right, up, backward):
    matrix = cam2world_matrix(as_tensor([[yaw, pitch, 0.3]]), 2.0)[0]  # roll is unused
    position = [2 * x for x in backward]
    expected = [[*row, bottom] for row, bottom in zip((right, up, backward, position), (0, 0, 0, 1), strict=True)]
    assert_close(matrix.T, expected, "columns")


def test_matrices_are_rotations_that_look_at_the_origin():
    radius = 0.5 + draw_uniform(50)
    matrix = cam2world_matrix(random_angles(50), radius)
    rotation, position = matrix[:, :3, :3], matrix[:, :3, 3]
    assert_close(rotation.transpose(1, 2) @ rotation, torch.eye(3).expand(50, 3, 3), "R^T R")
    assert_close(torch.linalg.det(rotation), torch.ones(50), "determinant")
    assert_close(position, rotation[:, :, 2] * radius[:, None], "position, along backward")
    assert (rotation[:, 1, 1] > 0).all()  # up is up
    assert_close(rotation[:, 1, 0], torch.zeros(50), "right is level")
    assert_close(matrix[:, 3], as_tensor([0, 0, 0, 1]).expand(50, 4), "bottom row", "exact")


def test_growing_angles_move_the_camera_left_and_down():
    angles, step = random_angles(20), 1e-6
    matrix = cam2world_matrix(angles, 1.5)
    right, up = matrix[:, :3, 0], matrix[:, :3, 1]
    for column, direction, speed in ((0, -right, 1.5 * angles[:, 1].sin()), (1, -up, torch.full((20,), 1.5))):
        ahead = angles.clone()
        ahead[:, column] += step
        velocity = (cam2world_matrix(ahead, 1.5)[:, :3, 3] - matrix[:, :3, 3]) / step
        assert_close(velocity, speed[:, None] * direction, ("yaw", "pitch")[column], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poles_are_clamped(dtype):
    angles = torch.tensor([[0.4, 0.0, 0.0], [0.4, PI, 0.0], [0.4, -1.0, 0.0]], dtype=dtype)
    matrix = cam2world_matrix(angles, 1.0)
    assert matrix.dtype == dtype
    assert_finite(matrix, "matrix")
    assert_close(matrix[:, 1, 3], [1.0, -1.0, 1.0], "height", torch.float32)
    rotation = matrix[:, :3, :3]
    assert_close(rotation.transpose(1, 2) @ rotation, torch.eye(3).expand(3, 3, 3), "R^T R", torch.float32)
    clamped = cam2world_matrix(torch.tensor([[0.4, 1e-5, 0.0]], dtype=dtype), 1.0)
    assert_close(matrix[:1], clamped, "matrix at the pole", "exact")


# --- Rays


def test_pixel_grid_by_hand():
    # From the top left, row by row.
    assert_close(
        pixel_grid(3, dtype=torch.float64),
        [[[-1, 1], [0, 1], [1, 1], [-1, 0], [0, 0], [1, 0], [-1, -1], [0, -1], [1, -1]]],
        "3 x 3",
        "exact",
    )
    # Half the size: offset (0, 0) is the bottom left quarter, (1/2, 1/4) right and half-way up.
    grid = pixel_grid(2, Patch(as_tensor([0.5, 0.5]), as_tensor([[0, 0], [0.5, 0.25]])))
    assert_close(grid[0], [[-1, 0], [0, 0], [-1, -1], [0, -1]], "bottom left", "exact")
    assert_close(grid[1], [[0, 0.5], [1, 0.5], [0, -0.5], [1, -0.5]], "right", "exact")
    assert grid.dtype == torch.float64
    # Three of four steps: from -1 to 1/2; thirds are exact to the dtype of the patch.
    grid = pixel_grid(4, Patch(as_tensor([0.75]), as_tensor([[0, 0]])))
    assert_close(grid[0, :4, 0], [-1, -0.5, 0, 0.5], "three quarters")
    grid = pixel_grid(4, Patch(as_tensor([1.0]), as_tensor([[0, 0]])))
    assert_close(grid[0, :4, 0], [-1, -1 / 3, 1 / 3, 1], "all")


def test_rays_by_hand():
    # On +z at 2, 90 degrees: the image plane is at distance 1.
    matrix = cam2world_matrix(as_tensor([[PI / 2, PI / 2, 0]]), 2.0)
    origins, directions = camera_rays(matrix, 90.0, 3)
    assert_close(origins, as_tensor([0, 0, 2]).expand(1, 9, 3), "origins")
    a, b = 2**-0.5, 3**-0.5
    expected = [[-b, b, -b], [0, a, -a], [b, b, -b], [-a, 0, -a], [0, 0, -1], [a, 0, -a], [-b, -b, -b]]
    assert_close(directions[0, :7], expected, "directions")
    # At 60 degrees the plane is sqrt(3) away: the edge is 30 degrees off the axis.
    _, directions = camera_rays(matrix, 60.0, 3)
    assert_close(directions[0, 5], [0.5, 0, -(0.75**0.5)], "edge at 60 degrees")


def test_rays_of_any_camera():
    matrix = cam2world_matrix(random_angles(10), 1.3)
    origins, directions = camera_rays(matrix, 18.0, 5)
    assert origins.shape == directions.shape == (10, 25, 3)
    assert_close(directions.norm(dim=-1), torch.ones(10, 25), "length")
    assert_close(origins[:, 12] + 1.3 * directions[:, 12], torch.zeros(10, 3), "the central ray, at the radius")
    # Right of the centre, then above it: towards the camera's axes.
    right, up = matrix[:, :3, 0], matrix[:, :3, 1]
    assert ((directions[:, 14] * right).sum(dim=-1) > 0.1).all()
    assert_close((directions[:, 14] * up).sum(dim=-1), torch.zeros(10), "the pixel to the right is not above")
    assert ((directions[:, 2] * up).sum(dim=-1) > 0.1).all()


def test_field_of_view_and_radius_per_sample():
    angles, fov, radius = random_angles(3), as_tensor([12.0, 30.0, 75.0]), as_tensor([1.0, 2.0, 3.0])
    origins, directions = camera_rays(cam2world_matrix(angles, radius), fov, 4)
    for i in range(3):
        one = camera_rays(cam2world_matrix(angles[i : i + 1], radius[i].item()), fov[i].item(), 4)
        assert_close(origins[i], one[0][0], f"origins of {i}", "exact")
        assert_close(directions[i], one[1][0], f"directions of {i}")


@pytest.mark.parametrize(("resolution", "patch"), [(5, 3), (8, 2), (4, 4)])
def test_patches_are_crops_of_the_image(resolution, patch):
    # Only at s = (r-1)/(R-1) do the pixels of a patch fall on pixels of the image (method.md 2).
    corners = [(row, col) for row in range(resolution - patch + 1) for col in range(resolution - patch + 1)]
    matrix = cam2world_matrix(random_angles(1), 1.0).expand(len(corners), 4, 4)
    scale = torch.full((len(corners),), (patch - 1) / (resolution - 1), dtype=torch.float64)
    offset = as_tensor(
        [[col / (resolution - 1), (resolution - patch - row) / (resolution - 1)] for row, col in corners]
    )
    whole = camera_rays(matrix[:1], 30.0, resolution)[1].view(resolution, resolution, 3)
    origins, directions = camera_rays(matrix, 30.0, patch, Patch(scale, offset))
    assert_close(origins, matrix[:, None, :3, 3].expand(-1, patch * patch, 3), "origins", "exact")
    for i, (row, col) in enumerate(corners):
        crop = whole[row : row + patch, col : col + patch].reshape(-1, 3)
        assert_close(directions[i], crop, f"patch at row {row}, column {col}")


def test_whole_patch_is_the_image():
    assert_close(pixel_grid(4, Patch.whole(torch.empty(2))), pixel_grid(4).expand(2, -1, -1), "grid")


@pytest.mark.parametrize(("resolution", "patch"), [(5, 3), (8, 2), (4, 4)])
def test_pasted_patches_lie_where_they_were_cut(resolution, patch):
    """Pixels on pixels: inside is the patch, as it is, outside the image; its own patch leaves an image alone."""
    corners = [(row, col) for row in range(resolution - patch + 1) for col in range(resolution - patch + 1)]
    scale = torch.full((len(corners),), (patch - 1) / (resolution - 1), dtype=torch.float64)
    offset = as_tensor(
        [[col / (resolution - 1), (resolution - patch - row) / (resolution - 1)] for row, col in corners]
    )
    place = Patch(scale, offset)
    images = draw_uniform(len(corners), 3, resolution, resolution)
    patches = draw_uniform(len(corners), 3, patch, patch, seed=1)
    expected = images.clone()
    for i, (row, col) in enumerate(corners):
        expected[i, :, row : row + patch, col : col + patch] = patches[i]
    assert_close(paste_patches(patches, images, place, resolution), expected, "pasted")
    own = extract_patches(images, place, patch)
    assert_close(paste_patches(own, images, place, resolution), images, "its own patch")
    # The same in the precision that training has, where a border pixel is only nearly at 1.
    single = paste_patches(patches.float(), images.float(), Patch(scale.float(), offset.float()), resolution)
    assert_close(single, expected.float(), "in fp32")


def test_a_pasted_patch_is_resampled_and_the_image_is_upsampled():
    """A ramp stays a ramp, whatever the scale; the gradient of what is covered is that of the patch alone."""
    patch = Patch(as_tensor([0.5, 1.0, 0.3]), as_tensor([[0.25, 0.5], [0, 0], [0.1, 0.6]]))
    ramp = pixel_grid(9, dtype=torch.float64).unflatten(1, (9, 9)).permute(0, 3, 1, 2).expand(3, 2, 9, 9)
    low = pixel_grid(3, dtype=torch.float64).unflatten(1, (3, 3)).permute(0, 3, 1, 2).expand(3, 2, 3, 3).clone()
    patches = extract_patches(ramp, patch, 5).requires_grad_(True)
    low.requires_grad_(True)
    pasted = paste_patches(patches, low, patch, 9)
    assert_close(pasted, ramp, "ramp")
    pasted.sum().backward()
    total = patches.grad.sum(dim=(1, 2, 3)) + low.grad.sum(dim=(1, 2, 3))
    assert_close(total, [2.0 * 81] * 3, "every pixel has one source")
    assert low.grad[1].abs().max() == 0


def test_rays_have_the_dtype_of_the_camera():
    matrix = cam2world_matrix(random_angles(2), 1.0)
    patch = torch.full((2,), 0.5), torch.zeros(2, 2)
    for dtype in (torch.float32, torch.float64):
        for of_patch in (torch.float32, torch.float64):
            for rays in camera_rays(matrix.to(dtype), 30.0, 4, Patch(*(x.to(of_patch) for x in patch))):
                assert rays.dtype == dtype


# --- Frustum


def test_frustum_extent_of_the_presets():
    # 0.1968 and, rounded up, 0.4741.
    assert_close(frustum_extent(12.0, 1.0, 0.88, 1.12), 0.1968310, "FFHQ", "hand")
    assert_close(frustum_extent(30.0, 1.0, 0.75, 1.25), 0.4740434, "Megascans", "hand")


@pytest.mark.parametrize(
    ("fov", "radius", "ray_start", "ray_end"), [(12.0, 1.0, 0.88, 1.12), (60.0, 3.0, 0.5, 3.1), (90.0, 0.5, 0.1, 2.0)]
)
def test_frustum_extent_is_that_of_the_farthest_sample(fov, radius, ray_start, ray_end):
    origins, directions = camera_rays(cam2world_matrix(random_angles(3), radius), fov, 5)
    farthest = max((origins + t * directions).norm(dim=-1).max().item() for t in (ray_start, ray_end))
    assert_close(frustum_extent(fov, radius, ray_start, ray_end), farthest, "extent")


def test_rays_take_no_matrix_product():
    """TF32, where a run allows it, would round one to 10 bits: more than a pixel of 512^2."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names = frozenset()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names |= {function.overloadpacket.__name__}
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        camera_rays(cam2world_matrix(random_angles(2).float(), 1.0), 30.0, 4)
    assert "mul" in seen.names
    assert not seen.names & {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum"}
