"""The texels that a patch's rays touch: no sample, wherever a camera stands and a lens looks, reads one beside them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from epigraf_fast.camera import PRIORS, Patch, cam2world_matrix, camera_rays, patch_boxes, sample_angles
from epigraf_fast.reference.sample_triplane import PlaneRegion, sample_triplane

SAMPLES = 9  # along a ray, its ends among them
PIXELS = 5  # along each side of a patch, its corners among them


def look(angles, fov, radius, ray_start, ray_end, cube_scale, resolution, patch, grow=0):
    """Reads a box, grown or shrunk by some texels, at every sample of a patch: raises where one asks for more."""
    matrix = cam2world_matrix(angles, radius)
    box = patch_boxes(matrix, fov, ray_start, ray_end, cube_scale, resolution, patch)
    assert ((box >= 0) & (box <= resolution)).all()
    assert (box[:, 2:] > box[:, :2]).all()
    origins, directions = camera_rays(matrix, fov, PIXELS, patch)
    t = torch.linspace(ray_start, ray_end, SAMPLES, dtype=origins.dtype)
    points = (origins[:, :, None] + t[:, None] * directions[:, :, None]).flatten(1, 2) / cube_scale
    first, last = box[:, :2] - grow, box[:, 2:] + grow
    (height, width) = (last - first)[0].tolist()
    sample_triplane(torch.ones(1, 3, height, width), points, PlaneRegion(first, (resolution, resolution)))
    return box


unit = st.floats(0, 1)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    prior=st.sampled_from([p for p in PRIORS if p != "custom"]),
    seed=st.integers(0, 2**31),
    fov=st.floats(1, 150),
    radius=st.floats(0.3, 40),
    near=st.floats(0.01, 1.5),
    depth=st.floats(0.001, 1.5),
    cube=st.floats(0.05, 2),
    resolution=st.sampled_from([8, 32, 128, 512]),
    scale=st.floats(0.02, 1),
    x=unit,
    y=unit,
    double=st.booleans(),
)
@example("uniform", 0, 12.0, 1.0, 0.88, 0.24, 0.2, 512, 1.0, 0.0, 0.0, False)  # FFHQ, whole
@example("spherical_uniform", 1, 30.0, 1.0, 0.75, 0.5, 0.475, 512, 0.125, 1.0, 0.5, False)  # Megascans, a corner
def test_no_sample_reads_beside_the_box(prior, seed, fov, radius, near, depth, cube, resolution, scale, x, y, double):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        angles = sample_angles(1, prior, yaw_spread=math.pi, pitch_spread=math.pi / 2)
    dtype = torch.float64 if double else torch.float32
    side = torch.tensor([scale], dtype=dtype)
    patch = Patch(side, torch.tensor([[x, y]], dtype=dtype) * (1 - side))
    look(angles.to(dtype), fov, radius, near * radius, (near + depth) * radius, cube * radius, resolution, patch)


def test_a_box_that_is_too_small_is_noticed():
    """And those of the presets are not larger than they need be: a texel less on every side is too little."""
    patch = Patch(torch.tensor([0.4]), torch.tensor([[0.2, 0.5]]))
    angles = torch.tensor([[0.3, 1.4, 0.0]])
    camera = 12.0, 1.0, 0.88, 1.12, 0.2, 256
    box = look(angles, *camera, patch)
    assert (box[:, 2:] - box[:, :2]).amax() < 256
    with pytest.raises(ValueError, match="points must keep to the region"):
        look(angles, *camera, patch, grow=-3)
