"""Planes of which a part is stored, against whole ones: values and gradients, in every op that reads planes."""

from __future__ import annotations

import pytest
import torch

from checks import assert_close, draw, draw_uniform
from epigraf_fast import ops
from epigraf_fast.ops import PlaneRegion, backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LACKING = backends.status()["decode_triplane"]["triton"]
TRITON = pytest.param("triton", marks=pytest.mark.skipif(LACKING is not None, reason=LACKING or ""))
EVERY = pytest.mark.parametrize("backend", ["reference", "cpu", TRITON])

WHOLE = (17, 23)  # rows, columns
# First texels of three images, and the size that is stored.
CASES = {
    "corners": ([[0, 0], [8, 10], [8, 0]], (9, 13)),
    "inside": ([[1, 3], [5, 9], [4, 4]], (9, 13)),
    "a row": ([[0, 3], [16, 0], [7, 5]], (1, 11)),
    "a column": ([[0, 0], [6, 22], [3, 11]], (11, 1)),
    "a texel": ([[0, 0], [16, 22], [5, 9]], (1, 1)),
    "whole": ([[0, 0], [0, 0], [0, 0]], WHOLE),
}
LINES = ("a row", "a column", "a texel")
CHANNELS, HIDDEN, OUT = 8, 16, 4


def dtype_of(backend):
    return torch.float32 if backend == "triton" else torch.float64


def region_of(case, device=None):
    first, size = CASES[case]
    return PlaneRegion(torch.tensor(first, dtype=torch.int32, device=device), WHOLE), size


def part_of(planes, region, size):
    return ops.cut(planes, region.first, size)


def points_in(region, size, count, dtype):
    """Points whose taps with weight are stored in all three planes: between the first texel and the last."""
    low = [region.first[:, i].double() for i in (0, 1)]
    spans = [(x * 2 / (n - 1) - 1, (x + m - 1) * 2 / (n - 1) - 1) for x, n, m in zip(low, WHOLE, size, strict=True)]
    rows, columns = spans
    # Axis 0 is read along columns, axis 2 along rows, axis 1 along both: where these share nothing, texels outside the
    # cube count as zero and that is all that is left to ask for.
    both = torch.maximum(rows[0], columns[0]), torch.minimum(rows[1], columns[1])
    lows, highs = (torch.stack([columns[i], both[i], rows[i]], dim=1) for i in range(2))
    u = draw_uniform(len(lows), count, 3, seed=7)
    points = lows[:, None] + u * (highs - lows).clamp(min=0)[:, None]
    apart = (both[0] > both[1] + 1e-9)[:, None, None] & torch.tensor([False, True, False])
    return points.masked_fill(apart, 2.5).to(dtype)


def network(dtype):
    shapes = (HIDDEN, CHANNELS), (HIDDEN,), (OUT, HIDDEN), (OUT,)
    return ops.Network(*(draw(*x, seed=10 + i, dtype=dtype).to(DEVICE).requires_grad_() for i, x in enumerate(shapes)))


def sampled(planes, points, net, **options):
    return ops.sample_triplane(planes, points, **options)


def decoded(planes, points, net, **options):
    return ops.decode_triplane(planes, points, net, **options)


def rays_of(points):
    """Rays of which the points are the samples, one a ray, at a cube of 0.5."""
    directions = torch.nn.functional.normalize(draw(*points.shape, seed=3, dtype=points.dtype).to(points), dim=-1)
    t = torch.full_like(points[..., :1], 0.25)
    return points * 0.5 - t * directions, directions, t


def decoded_rays(planes, points, net, **options):
    return ops.decode_triplane_rays(planes, *rays_of(points), net, 0.5, **options)


def decoded_twice(planes, points, net, **options):
    results = ops.decode_triplane_coarse_to_fine(
        planes, *rays_of(points), net, lambda coarse: torch.full_like(coarse[..., 0], 0.25), 0.5, **options
    )
    return torch.cat([results[0], results[2]], dim=2)


FUNCTIONS = {f.__name__: f for f in (sampled, decoded, decoded_rays, decoded_twice)}


def values_and_gradients(function, planes, points, net, **options):
    planes = planes.detach().requires_grad_()
    y = function(planes, points, net, **options)
    asked = [planes] if function is sampled else [planes, *net]
    return [y.detach(), *torch.autograd.grad(y, asked, draw(*y.shape, seed=5, dtype=y.dtype).to(y))]


@EVERY
@pytest.mark.parametrize(
    ("function", "case", "layout"),
    [
        (function, case, layout)
        for function in FUNCTIONS
        for case in CASES
        for layout in (torch.channels_last, torch.contiguous_format)
        # One layout but once; and a point that a ray rounds off its only line asks for the next one.
        if (layout == torch.channels_last or case == "inside")
        and not (case in LINES and function in ("decoded_rays", "decoded_twice"))
    ],
)
def test_values_and_gradients_are_those_of_whole_planes(backend, function, case, layout):
    dtype, function = dtype_of(backend), FUNCTIONS[function]
    region, size = region_of(case)
    shrunk = points_in(region, size, 12, dtype)
    if case not in LINES:  # away from the ends, where a rounding would ask for a texel more
        centre = shrunk.mean(dim=1, keepdim=True)
        shrunk = torch.where(shrunk.abs() <= 1, centre + (shrunk - centre) * 0.999, shrunk)
    region, points = PlaneRegion(region.first.to(DEVICE), WHOLE), shrunk.to(DEVICE)
    planes = draw(3, 3 * CHANNELS, *WHOLE, seed=1, dtype=dtype).contiguous(memory_format=layout).to(DEVICE)
    net = network(dtype)
    expected = values_and_gradients(function, planes, points, net, backend=backend)
    part = part_of(planes, region, size).contiguous(memory_format=layout)
    actual = values_and_gradients(function, part, points, net, backend=backend, region=region)
    outside = expected[1] - torch.zeros_like(planes)
    expected[1] = part_of(expected[1], region, size)
    assert_close(outside.abs().sum(), expected[1].abs().sum(), "all of the gradient lies in the part")
    for name, got, want in zip(("values", "planes", "w0", "b0", "w1", "b1"), actual, expected, strict=False):
        scale = want.abs().amax().clamp(min=1e-30)
        assert_close(got / scale, want / scale, name)


@EVERY
def test_integers_of_both_sizes_are_taken(backend):
    dtype = dtype_of(backend)
    region, size = region_of("inside", DEVICE)
    planes = draw(3, 3 * CHANNELS, *size, dtype=dtype).to(DEVICE)
    points = points_in(PlaneRegion(region.first.cpu(), WHOLE), size, 5, dtype).to(DEVICE)
    results = [
        sampled(planes, points * 0.99, None, backend=backend, region=PlaneRegion(region.first.to(integers), WHOLE))
        for integers in (torch.int32, torch.int64)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", ["cpu", TRITON])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_texels_that_are_not_stored_count_as_zero(backend, function):
    """Points everywhere: the kernels read and write what is stored and no more, as if all else were zero."""
    dtype, function = dtype_of(backend), FUNCTIONS[function]
    region, size = region_of("inside", DEVICE)
    planes = draw(3, 3 * CHANNELS, *WHOLE, seed=1, dtype=dtype).to(DEVICE)
    stored = torch.zeros_like(planes)
    for image, (row, column) in enumerate(region.first.tolist()):
        stored[image, :, row : row + size[0], column : column + size[1]] = 1
    points = (2.6 * draw_uniform(3, 24, 3, seed=2) - 1.3).to(dtype).to(DEVICE)
    net = network(dtype)
    expected = values_and_gradients(function, planes * stored, points, net, backend=backend)
    part = part_of(planes, region, size)
    actual = values_and_gradients(function, part, points, net, backend=backend, region=region)
    expected[1] = part_of(expected[1], region, size)
    for name, got, want in zip(("values", "planes", "w0", "b0", "w1", "b1"), actual, expected, strict=False):
        scale = want.abs().amax()
        assert_close(got / scale, want / scale, name)


def test_points_have_gradients_where_the_backend_gives_any():
    region, size = region_of("inside")
    planes = draw(3, 3 * CHANNELS, *WHOLE, seed=1)
    points = points_in(region, size, 20, torch.float64) * 0.999
    part = part_of(planes, region, size)
    gradients = []
    for backend, arguments in (
        ("reference", {"planes": planes}),
        ("reference", {"planes": part, "region": region}),
        ("cpu", {"planes": part, "region": region}),
    ):
        x = points.clone().requires_grad_()
        y = ops.sample_triplane(points=x, backend=backend, **arguments)
        gradients.append(torch.autograd.grad(y, x, draw(*y.shape, seed=5))[0])
    assert_close(gradients[1], gradients[0], "reference")
    assert_close(gradients[2], gradients[0], "cpu")


def test_the_reference_says_where_points_leave_the_region():
    region, size = region_of("inside")
    part = draw(3, 3 * CHANNELS, *size)
    outside = torch.zeros(3, 1, 3, dtype=torch.float64)
    outside[1, 0, 0] = -0.9
    with pytest.raises(ValueError, match="points must keep to the region"):
        ops.sample_triplane(part, outside, region=region, backend="reference")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("first", "whole", "error", "message"),
    [
        (torch.zeros(3, 2), WHOLE, TypeError, r"region\.first must be int32 or int64"),
        (torch.zeros(2, 2, dtype=torch.int32), WHOLE, ValueError, r"region\.first must have shape \[3, 2\]"),
        (torch.zeros(3, 2, dtype=torch.int32), (8, 23), ValueError, r"region\.whole must be at least the size \[9, 13"),
        (torch.tensor([[0, 0], [9, 0], [0, 0]]), WHOLE, ValueError, r"region\.first must leave room"),
        (torch.tensor([[0, 0], [0, -1], [0, 0]]), WHOLE, ValueError, r"region\.first must leave room"),
    ],
    ids=str,
)
def test_wrong_regions(function, first, whole, error, message):
    points = torch.zeros(3, 2, 3, dtype=torch.float64)
    with pytest.raises(error, match=message):
        FUNCTIONS[function](draw(3, 24, 9, 13), points, network(torch.float64), region=PlaneRegion(first, whole))


@pytest.mark.skipif(LACKING is not None, reason=LACKING or "")
def test_without_a_region_the_kernels_are_told_of_none(monkeypatch):
    """None is compiled in: what comes out is the kernel of whole planes."""
    from epigraf_fast.kernels import decode_triplane, sample_triplane

    told = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: told.append(
                [options[name] for name in ("first_ptr", "whole_height", "whole_width")]
            )

    for module, op in ((sample_triplane, "sample"), (decode_triplane, "decode")):
        for way in ("fwd", "bwd"):
            monkeypatch.setattr(module, f"_{op}_triplane_{way}_kernel", Kernel())
    planes, points = torch.zeros(1, 24, 4, 4), torch.zeros(1, 5, 3)
    net = [x.detach().cpu() for x in network(torch.float32)]
    for region in (None, PlaneRegion(torch.zeros(1, 2, dtype=torch.int32), WHOLE)):
        told.clear()
        sample_triplane.fwd(planes, points, region=region, arch=80)
        sample_triplane.bwd(torch.zeros(1, 5, 8), points, 4, 4, region=region, arch=80)
        decode_triplane.fwd(planes, points, None, None, *net, region=region, arch=80)
        decode_triplane.bwd(torch.zeros(1, 5, 4), planes, points, None, None, *net[:3], region=region, arch=80)
        assert len(told) >= 4
        for first, *whole in told:
            assert whole == ([None, None] if region is None else list(WHOLE))
            assert first is None or torch.equal(first, region.first)
            assert (first is None) == (region is None)
