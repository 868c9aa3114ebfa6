"""sample_triplane: the reference and the cpu backend against numbers worked by hand and against torch's grid_sample.

The Triton kernels against the reference: in Triton's interpreter and compiled, or on the GPU where there is one.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch

import compiled
from checks import (
    assert_close,
    assert_error_within_reference,
    assert_finite,
    draw,
    draw_uniform,
    gradcheck,
    gradgradcheck,
    layouts,
)
from epigraf_fast import ops
from epigraf_fast.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LACKING = backends.status()["sample_triplane"]["triton"]
needs_triton = compiled.on_triton()
if LACKING is None:
    import triton
    import triton.language as tl

    from epigraf_fast.kernels.planes import texel_offset

    @triton.jit
    def _texel_offset_kernel(row_ptr, column_ptr, offset_ptr, stride_h, stride_w, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        offset = texel_offset(tl.load(row_ptr + i), tl.load(column_ptr + i), stride_h, stride_w, 2)
        tl.store(offset_ptr + i, offset)


reference = functools.partial(ops.sample_triplane, backend="reference")
cpu = functools.partial(ops.sample_triplane, backend="cpu")

# One channel, three planes of 2 rows and 3 columns.
HAND_PLANES = torch.tensor(
    [[[[0, 1, 2], [10, 11, 12]], [[0, 100, 200], [0, 0, 400]], [[1, 3, 0], [5, 7, 0]]]], dtype=torch.float64
)
HAND_POINT = torch.tensor([[[0.5, -0.5, 0.0]]], dtype=torch.float64)


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def sample_triplane(request):
    return request.param


def grid_sample_triplane(planes, points):
    """The same through torch: one call per plane, then the mean."""
    samples = []
    for plane, axes in zip(planes.chunk(3, dim=1), ([0, 1], [0, 2], [1, 2]), strict=True):
        grid = points[:, None, :, axes]  # [B, 1, N, 2]
        sample = torch.nn.functional.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        samples.append(sample[:, :, 0].transpose(1, 2))
    return torch.stack(samples).mean(dim=0)


def test_value_by_hand(sample_triplane):
    # plane 0 at (c0, c1) = (0.5, -0.5): column (0.5 + 1) * 2/2 = 1.5, row (-0.5 + 1) * 1/2 = 0.25;
    #   row 0 is 1.5 there and row 1 is 11.5: 1.5 + 0.25 * 10 = 4
    # plane 1 at (c0, c2) = (0.5, 0): column 1.5, row 0.5; rows are 150 and 200 there: 175
    # plane 2 at (c1, c2) = (-0.5, 0): column 0.5, row 0.5; rows are 2 and 6 there: 4
    # mean: (4 + 175 + 4) / 3 = 61
    assert_close(sample_triplane(HAND_PLANES, HAND_POINT), [[[61.0]]], "feature")


def test_gradients_by_hand(sample_triplane):
    planes, point = HAND_PLANES.clone().requires_grad_(), HAND_POINT.clone().requires_grad_()
    grad_planes, grad_points = torch.autograd.grad(sample_triplane(planes, point).sum(), (planes, point))
    # A column is 1 wide in coordinates and a row 2. To c0: plane 0 slopes by 1 per column; plane 1 by 100 in row 0 and
    # 400 in row 1, 250 half-way. To c1: plane 0 by 10 per row, 5 per unit; plane 2 by 2 per column. To c2: plane 1 by
    # 50 per row, 25 per unit; plane 2 by 4 per row, 2 per unit. All divided by 3.
    assert_close(grad_points, [[[251 / 3, 7 / 3, 9.0]]], "gradient to points")
    # The tap weights, over 3: columns weigh (0, 1/2, 1/2) in planes 0 and 1, (1/2, 1/2, 0) in plane 2;
    # rows (3/4, 1/4) in plane 0, (1/2, 1/2) in the others.
    expected = torch.tensor(
        [
            [[0, 0.375, 0.375], [0, 0.125, 0.125]],
            [[0, 0.25, 0.25], [0, 0.25, 0.25]],
            [[0.25, 0.25, 0], [0.25, 0.25, 0]],
        ],
        dtype=torch.float64,
    )
    assert_close(grad_planes, expected[None] / 3, "gradient to planes")


def test_corners_are_texel_centres(sample_triplane):
    # (-1, -1, -1) is the first texel of every plane: 0, 0, 1. (1, 1, 1) is the last: 12, 400, 0.
    corners = torch.tensor([[[-1, -1, -1], [1, 1, 1]]], dtype=torch.float64)
    assert_close(sample_triplane(HAND_PLANES, corners), [[[1 / 3], [412 / 3]]], "corners")


def test_texels_outside_count_as_zero(sample_triplane):
    # c0 = 1.5 is column 2.5: half of the last column is left. At c1 = c2 = -1: plane 0 gives 2 / 2, plane 1 200 / 2,
    # plane 2 at (-1, -1) 1. c0 = 2 is column 3: nothing of planes 0 and 1. c0 = -1.25 is column -0.25: 3/4 of column 0.
    points = torch.tensor([[[1.5, -1, -1], [2, -1, -1], [-1.25, 1, 1]]], dtype=torch.float64)
    # Third point: plane 0 row 1 column 0: 10 * 3/4; plane 1: 0; plane 2 at (1, 1): 0.
    assert_close(sample_triplane(HAND_PLANES, points), [[[102 / 3], [1 / 3], [7.5 / 3]]], "outside")


@pytest.mark.parametrize("channels", [1, 5, 8])
@pytest.mark.parametrize(("height", "width"), [(7, 4), (2, 9), (16, 16), (1, 6), (6, 1), (1, 1)])
def test_equals_grid_sample(sample_triplane, channels, height, width):
    planes = draw(2, 3 * channels, height, width, seed=1).requires_grad_()
    points = (4 * draw_uniform(2, 50, 3, seed=2) - 2).requires_grad_()  # a good part is outside
    grad_y = draw(2, 50, channels, seed=3)
    expected = grid_sample_triplane(planes, points)
    actual = sample_triplane(planes, points)
    assert_close(actual, expected, "feature")
    expected_gradients = torch.autograd.grad(expected, (planes, points), grad_y)
    for name, actual_gradient, expected_gradient in zip(
        ("planes", "points"), torch.autograd.grad(actual, (planes, points), grad_y), expected_gradients, strict=True
    ):
        assert_close(actual_gradient, expected_gradient, f"gradient to {name}")


def test_cell_borders(sample_triplane):
    # With 5 texels on a side these are exactly texels, the borders -1 and 1 among them, and the first ones outside.
    axis = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis, axis)[None].requires_grad_()
    planes = draw(1, 6, 5, 5, seed=1)
    actual, expected = sample_triplane(planes, points), grid_sample_triplane(planes, points)
    assert_close(actual, expected, "feature")
    grad_y = draw(1, len(axis) ** 3, 2, seed=2)
    (actual_gradient,) = torch.autograd.grad(actual, points, grad_y)
    (expected_gradient,) = torch.autograd.grad(expected, points, grad_y)
    assert_close(actual_gradient, expected_gradient, "gradient to points")


def test_constant_planes_have_no_gradient_to_points_on_texels(sample_triplane):
    points = torch.tensor([[[-1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sample_triplane(torch.ones_like(draw(1, 3, 5, 5)), points).sum(), points)
    assert_close(gradient, torch.zeros(1, 2, 3), "gradient to points", "exact")


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("far", [1e9, -1e9, 1e30, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_points_are_empty(sample_triplane, far, height, width, dtype):
    planes = draw(1, 6, height, width, dtype=dtype).requires_grad_()
    points = torch.full((1, 2, 3), far, dtype=dtype)
    points[0, 1] = torch.tensor([0.0, far, 0.0], dtype=dtype)  # outside planes 0 and 2 only
    points.requires_grad_()
    features = sample_triplane(planes, points)
    assert_close(features[0, 0], torch.zeros(2), "far feature", "exact")
    inside = sample_triplane(planes[:, 2:4].repeat(1, 3, 1, 1), torch.zeros(1, 1, 3, dtype=dtype))
    if width > 1:  # else plane 2, whose horizontal coordinate is far, has its only column everywhere
        assert_close(features[0, 1], inside[0, 0] / 3, "feature outside two planes")
    for name, gradient in zip(("planes", "points"), torch.autograd.grad(features.sum(), (planes, points)), strict=True):
        assert_finite(gradient, f"gradient to {name}")


def test_a_point_that_is_nan_shows(sample_triplane):
    points = torch.tensor([[[0.0, torch.nan, 0.0], [0.0, 0.0, 0.0]]])
    features = sample_triplane(torch.ones(1, 3, 4, 4), points)
    assert features[0, 0].isnan().all()
    assert_close(features[0, 1], [1.0], "its neighbour")


@pytest.mark.parametrize(("height", "width", "channels"), [(3, 4, 2), (1, 3, 1), (2, 2, 1)])
def test_first_and_second_derivatives(sample_triplane, height, width, channels):
    inputs = {
        "planes": draw(2, 3 * channels, height, width, seed=1),
        "points": 2.6 * draw_uniform(2, 3, 3, seed=2) - 1.3,
    }
    gradcheck(sample_triplane, inputs, "sample_triplane")
    try:
        gradgradcheck(sample_triplane, inputs, "sample_triplane")
    except RuntimeError as error:  # the grid sampler of an older torch has one derivative only, and must say so
        if sample_triplane is reference or "grid_sampler_2d_backward" not in str(error):
            raise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cpu_errs_no_more_than_the_reference(dtype):
    # Planes so large that a coordinate rounded to half precision misses by texels; coordinates are fp32, as rays are.
    planes, points = draw(1, 12, 128, 256, seed=1, dtype=dtype), 2.2 * draw_uniform(1, 500, 3, seed=2) - 1.1
    points, grad_y = points.float(), draw(1, 500, 4, seed=3, dtype=dtype)
    results = []
    for function, wide in ((cpu, False), (reference, False), (reference, True)):
        inputs = [x.double() if wide else x.clone() for x in (planes, points)]
        y = function(*(x.requires_grad_() for x in inputs))
        results.append([y, *torch.autograd.grad(y, inputs, grad_y.to(y.dtype))])
    for name, *values in zip(("feature", "gradient to planes", "gradient to points"), *results, strict=True):
        assert_error_within_reference(*values, name)


@pytest.mark.parametrize(("batch", "points"), [(0, 4), (2, 0), (0, 0)])
def test_empty(sample_triplane, batch, points):
    planes = draw(batch, 6, 3, 4).requires_grad_()
    features = sample_triplane(planes, draw(batch, points, 3))
    assert features.shape == (batch, points, 2)
    (gradient,) = torch.autograd.grad(features.sum(), planes)
    assert_close(gradient, torch.zeros(batch, 6, 3, 4), "gradient to planes", "exact")


def test_layout_does_not_matter(sample_triplane):
    planes, points = draw(2, 6, 3, 4), draw(2, 5, 3)
    expected = sample_triplane(planes, points)
    for name, view in layouts(planes):
        assert_close(sample_triplane(view, points), expected, f"planes: {name}", "exact")
    for name, view in layouts(points):
        assert_close(sample_triplane(planes, view), expected, f"points: {name}", "exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_the_planes(sample_triplane, dtype):
    planes, points = draw(1, 6, 4, 4), 2 * draw_uniform(1, 20, 3) - 1
    features = sample_triplane(planes.to(dtype), points.float())
    assert features.dtype == dtype
    assert_close(features, sample_triplane(planes, points), "feature")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"planes": draw(6, 3, 4)}, ValueError, "planes must have shape [B, 3*C, H, W], got [6, 3, 4]"),
        ({"planes": draw(2, 7, 3, 4)}, ValueError, "planes must have 3*C channels"),
        (
            {"planes": draw(2, 6, 0, 4)},
            ValueError,
            "planes must have 3*C channels (three planes of C each) and at least",
        ),
        ({"planes": draw(2, 0, 3, 4)}, ValueError, "planes must have 3*C channels"),
        ({"planes": torch.zeros(2, 6, 3, 4, dtype=torch.int32)}, TypeError, "planes must be floating point, got"),
        ({"planes": [1.0]}, TypeError, "planes must be a tensor, got list"),
        ({"points": draw(2, 5, 2)}, ValueError, "points must have shape [2, N, 3], got [2, 5, 2]"),
        ({"points": draw(1, 5, 3)}, ValueError, "points must have shape [2, N, 3], got [1, 5, 3]"),
        ({"points": torch.zeros(2, 5, 3, dtype=torch.int64)}, TypeError, "points must be floating point"),
        ({"points": torch.zeros(2, 5, 3, device="meta")}, ValueError, "points must be on cpu as planes is, got meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {"planes": draw(2, 6, 3, 4), "points": draw(2, 5, 3), **change}
    with pytest.raises(error, match=re.escape(f"sample_triplane: {message}")):
        reference(**arguments)


def triton_sample(planes, points, deterministic=None):
    return ops.sample_triplane(planes, points, deterministic=deterministic, backend="triton")


def values_and_gradient(function, planes, points, grad_y):
    planes = planes.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(planes, points)
    return {"feature": y, "gradient to planes": torch.autograd.grad(y, planes, grad_y.to(y.dtype))[0]}


def points_of_all_kinds(batch, count, *, seed):
    """Inside and outside, on texels of planes with 5 of them, on borders, and far."""
    points = 2.6 * draw_uniform(batch, count, 3, seed=seed) - 1.3
    points[:, 1::4] = (points[:, 1::4] * 2).round() / 2
    points[:, 2::8, 1] = 1.0
    points[:, -1:] = torch.tensor([0.1, 1e30, -torch.inf], dtype=torch.float64)
    return points.float()


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "count", "channels", "height", "width"),
    [(2, 150, 32, 5, 9), (1, 3, 8, 1, 1), (2, 17, 24, 6, 1), (1, 1, 64, 1, 5)],
)
def test_triton_errs_no_more_than_the_reference(poisoned, batch, count, channels, height, width, dtype, deterministic):
    planes = draw(batch, 3 * channels, height, width, seed=1, dtype=dtype).to(DEVICE)
    points = points_of_all_kinds(batch, count, seed=2).to(DEVICE)
    grad_y = draw(batch, count, channels, seed=3, dtype=dtype).to(DEVICE)
    results = [
        values_and_gradient(functools.partial(triton_sample, deterministic=deterministic), planes, points, grad_y),
        values_and_gradient(reference, planes, points, grad_y),
        values_and_gradient(reference, planes.double(), points.double(), grad_y),
    ]
    for name in results[0]:
        assert_error_within_reference(*(result[name] for result in results), name)


@needs_triton
def test_triton_gradient_has_the_same_bits_in_any_order():
    planes = draw(1, 24, 3, 4, seed=1, dtype=torch.float32).to(DEVICE)
    points, grad_y = points_of_all_kinds(1, 700, seed=2), draw(1, 700, 8, seed=3, dtype=torch.float32)
    grad_y *= 10 ** (12 * draw_uniform(1, 700, 1, seed=4, dtype=torch.float32) - 6)  # roundings that differ by order
    order = torch.randperm(700, generator=torch.Generator().manual_seed(5))
    gradients = {}
    for deterministic in (False, True):
        sample = functools.partial(triton_sample, deterministic=deterministic)
        for name, index in (("given", torch.arange(700)), ("permuted", order)):
            inputs = planes, points[:, index].to(DEVICE), grad_y[:, index].to(DEVICE)
            gradients[deterministic, name] = values_and_gradient(sample, *inputs)["gradient to planes"]
    assert torch.equal(gradients[True, "given"], gradients[True, "permuted"])
    assert not torch.equal(gradients[False, "given"], gradients[False, "permuted"])  # so that the order does matter
    inputs = planes.cpu(), points, grad_y
    expected = values_and_gradient(reference, *inputs)["gradient to planes"]
    truth = values_and_gradient(reference, planes.cpu().double(), points.double(), grad_y)["gradient to planes"]
    assert_error_within_reference(gradients[True, "given"].cpu(), expected, truth, "gradient to planes")


@needs_triton
@pytest.mark.parametrize("largest", [0.0, 1e-38, 1e-20, 3.7, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("addends", [1, 196608, 2**31])
def test_triton_fixed_point_sums_fit(largest, addends):
    from epigraf_fast.kernels.planes import fixed_point_scale, from_fixed_point

    largest = torch.tensor(largest, device=DEVICE)
    scale = fixed_point_scale(largest, addends)
    assert torch.frexp(scale).mantissa.item() == 0.5  # a power of two
    assert 0 <= largest.double().item() * scale.double().item() * addends <= 2**62
    sums = (largest * scale).to(torch.int64)
    assert from_fixed_point(sums, scale).item() == pytest.approx(largest.item(), abs=2.0**-126)


@needs_triton
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_triton_deterministic_gradient_shows_what_is_not_finite(value):
    points, grad_y = torch.zeros(1, 2, 3, device=DEVICE), torch.ones(1, 2, 8, device=DEVICE)
    grad_y[0, 1, 3] = value
    planes = torch.zeros(1, 24, 3, 4, device=DEVICE, requires_grad=True)
    features = triton_sample(planes, points, deterministic=True)
    assert torch.autograd.grad(features, planes, grad_y)[0].isnan().all()


def test_the_torch_tier_calls_the_sampler_that_no_library_takes_over(monkeypatch):
    """On a GPU `grid_sample` would go to cuDNN."""
    planes, points = draw(2, 12, 5, 6, dtype=torch.float32), draw(2, 7, 3, dtype=torch.float32)
    expected = ops.sample_triplane(planes, points, backend="torch")
    for owner, name in ((torch.nn.functional, "grid_sample"), (torch, "grid_sampler")):
        monkeypatch.setattr(owner, name, lambda *args, **options: pytest.fail("cuDNN's"))
    assert torch.equal(ops.sample_triplane(planes, points, backend="torch"), expected)


@needs_triton
def test_triton_follows_torch_in_being_deterministic(monkeypatch):
    from epigraf_fast.kernels import sample_triplane as kernels

    asked, bwd = [], kernels.bwd
    monkeypatch.setattr(kernels, "bwd", lambda *args, **options: asked.append(args[4]) or bwd(*args, **options))
    planes, points = torch.zeros(1, 24, 3, 4, device=DEVICE, requires_grad=True), torch.zeros(1, 1, 3, device=DEVICE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for deterministic in (None, False):
            triton_sample(planes, points, deterministic).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    triton_sample(planes, points).sum().backward()
    assert asked == [True, False, False]


@needs_triton
def test_triton_values_by_hand(poisoned):
    planes = HAND_PLANES.repeat_interleave(8, dim=1).float().to(DEVICE)  # every channel is the one
    features = triton_sample(planes, HAND_POINT.float().to(DEVICE))
    assert_close(features, torch.full((1, 1, 8), 61.0), "feature")


@needs_triton
def test_triton_takes_any_layout(poisoned):
    planes, points = draw(2, 24, 3, 4, seed=1, dtype=torch.float32), points_of_all_kinds(2, 9, seed=2)
    grad_y = draw(2, 9, 8, seed=3, dtype=torch.float32).to(DEVICE)
    planes, points = planes.to(DEVICE), points.to(DEVICE)
    expected = values_and_gradient(triton_sample, planes, points, grad_y)
    variants = [(f"planes: {name}", view, points, grad_y) for name, view in layouts(planes)]
    variants += [(f"points: {name}", planes, view, grad_y) for name, view in layouts(points)]
    variants += [(f"grad_y: {name}", planes, points, view) for name, view in layouts(grad_y)]
    for variant, *inputs in variants:
        y = triton_sample(inputs[0].detach().requires_grad_(), inputs[1])
        assert_close(y, expected["feature"], variant, "exact")
        gradient = values_and_gradient(triton_sample, *inputs)["gradient to planes"]
        assert_close(gradient, expected["gradient to planes"], f"{variant}: gradient")


@needs_triton
def test_triton_keeps_off_texels_that_count_as_zero(poisoned):
    # Everything is NaN but the four texels in the middle: to read another one, even at weight 0, would show.
    planes = torch.full((1, 24, 6, 6), torch.nan)
    planes[:, :, 2:4, 2:4] = 1.0
    points = torch.tensor([[[0.1, -0.1, 0.05], [torch.inf, -torch.inf, 1e30], [-4.0, 5.0, 3e9]]])
    features = triton_sample(planes.to(DEVICE), points.to(DEVICE))
    expected = torch.tensor([1.0, 0.0, 0.0])[None, :, None].expand(1, 3, 8)
    assert_close(features, expected, "feature")


@needs_triton
def test_triton_shows_a_point_that_is_nan(poisoned):
    points = torch.tensor([[[0.0, torch.nan, 0.0], [0.0, 0.0, 0.0]]], device=DEVICE)
    planes = torch.ones(1, 24, 4, 4, device=DEVICE).requires_grad_()
    features = triton_sample(planes, points)
    assert features[0, 0].isnan().all()
    assert_close(features[0, 1], torch.ones(8), "its neighbour")


@needs_triton
@pytest.mark.parametrize(("batch", "points"), [(0, 4), (2, 0), (0, 0)])
def test_triton_empty(batch, points):
    planes = torch.zeros(batch, 24, 3, 4, device=DEVICE, requires_grad=True)
    features = triton_sample(planes, torch.zeros(batch, points, 3, device=DEVICE))
    assert features.shape == (batch, points, 8)
    (gradient,) = torch.autograd.grad(features.sum(), planes)
    assert_close(gradient, torch.zeros(batch, 24, 3, 4), "gradient to planes", "exact")


@needs_triton
def test_triton_saves_the_points_alone():
    planes, points = torch.zeros(1, 24, 3, 4, device=DEVICE, requires_grad=True), torch.zeros(1, 5, 3, device=DEVICE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        triton_sample(planes, points)
        triton_sample(planes.detach(), points)
        with torch.no_grad():
            triton_sample(planes, points)
    assert saved == [points.data_ptr()]


@needs_triton
def test_triton_has_no_second_derivative():
    planes = torch.zeros(1, 24, 3, 4, device=DEVICE, requires_grad=True)
    grad_y = torch.ones(1, 2, 8, device=DEVICE, requires_grad=True)
    features = triton_sample(planes, torch.zeros(1, 2, 3, device=DEVICE))
    (gradient,) = torch.autograd.grad(features, planes, grad_y, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'sample_triplane: .*second derivative.*backend="reference"'):
        gradient.sum().backward()


@compiled.on_triton(compiled=False)  # which only kernels of the package are
def test_triton_offsets_have_64_bits():
    rows, columns = [0, 3, 46341, 2**29], [7, 2**30, 46341, 5]
    offsets = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    as_tensor = functools.partial(torch.tensor, dtype=torch.int32, device=DEVICE)
    for stride_h, stride_w in ((46341, 96), (2**32, 2**31), (1, 2**31 - 1)):
        _texel_offset_kernel[(1,)](as_tensor(rows), as_tensor(columns), offsets, stride_h, stride_w, SIZE=4)
        expected = [2 * (row * stride_h + column * stride_w) for row, column in zip(rows, columns, strict=True)]
        assert offsets.tolist() == expected


@needs_triton
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"planes": torch.zeros(1, 15, 3, 4)},
            ValueError,
            "planes must have a multiple of 8 channels each, 64 at most",
        ),
        ({"planes": torch.zeros(1, 3 * 72, 3, 4)}, ValueError, "planes must have a multiple of 8 channels each, 64 at"),
        ({"planes": draw(1, 24, 3, 4)}, TypeError, "planes must be float32 or float16 or bfloat16 (because backend is"),
        ({"points": draw(1, 5, 3)}, TypeError, 'points must be float32 (because backend is "triton"), got torch.flo'),
        (
            {"points": torch.zeros(1, 5, 3, device="meta")},
            ValueError,
            f"points must be on {torch.zeros(0, device=DEVICE).device} as planes is, got meta",
        ),
        ({"points": torch.zeros(1, 5, 2)}, ValueError, "points must have shape [1, N, 3]"),
        (
            {"points": torch.zeros(1, 5, 3, requires_grad=True)},
            NotImplementedError,
            'backend "triton" has no gradient to points; use backend="reference", or detach points',
        ),
    ],
)
def test_triton_errors(change, error, message):
    arguments = {"planes": torch.zeros(1, 24, 3, 4), "points": torch.zeros(1, 5, 3), **change}
    arguments = {name: x if x.is_meta else x.to(DEVICE) for name, x in arguments.items()}
    with pytest.raises(error, match=re.escape(f"sample_triplane: {message}")):
        triton_sample(**arguments)
