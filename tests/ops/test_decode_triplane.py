"""decode_triplane and decode_triplane_rays, reference and cpu, against the formula and numbers worked by hand.

The Triton kernels against the reference: in Triton's interpreter and compiled, or on the GPU where there is one.
"""

from __future__ import annotations

import contextlib
import functools
import re

import pytest
import torch

import compiled
from checks import (
    assert_close,
    assert_error_within_reference,
    draw,
    draw_uniform,
    gradcheck,
    gradgradcheck,
    layouts,
    roundings,
)
from epigraf_fast import ops

BACKENDS = ["reference", "cpu"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = compiled.on_triton()


def of_named_tensors(function):
    """An op as a function of tensors by name, those of the network among them."""

    def call(*rays, w0, b0, w1, b1, **options):
        return function(*rays, network=ops.Network(w0, b0, w1, b1), **options)

    return call


decode_at_points, decode_on_rays = of_named_tensors(ops.decode_triplane), of_named_tensors(ops.decode_triplane_rays)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def decode_triplane(backend):
    return functools.partial(decode_at_points, backend=backend)


@pytest.fixture
def decode_triplane_rays(backend):
    return functools.partial(decode_on_rays, backend=backend)


def network(channels=3, hidden=5, out=4, dtype=torch.float64):
    return {
        "w0": draw(hidden, channels, seed=11, dtype=dtype),
        "b0": draw(hidden, seed=12, dtype=dtype),
        "w1": draw(out, hidden, seed=13, dtype=dtype),
        "b1": draw(out, seed=14, dtype=dtype),
    }


def hand_network():
    as_tensor = functools.partial(torch.tensor, dtype=torch.float64)
    return {
        "w0": as_tensor([[1], [-1]]),
        "b0": as_tensor([0, 1]),
        "w1": as_tensor([[1, 0], [0, 1], [1, 1]]),
        "b1": as_tensor([0, 1, 0]),
    }


def test_value_by_hand(decode_triplane):
    planes = torch.tensor([3, 6, 9], dtype=torch.float64).view(1, 3, 1, 1)  # the feature is 6, everywhere
    points = torch.zeros(1, 1, 3, dtype=torch.float64)
    # Before the activation: 6 and -6 + 1 = -5; after it: 6 sqrt(2) = 8.4852814 and -5 * 0.2 * sqrt(2) = -1.4142136.
    # Out: the first; the second + 1; their sum.
    assert_close(
        decode_triplane(planes, points, **hand_network()), [[[8.4852814, -0.4142136, 7.0710678]]], "out", "hand"
    )


def test_gradients_by_hand(decode_triplane):
    planes = torch.tensor([3, 6, 9], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()
    net = {name: x.requires_grad_() for name, x in hand_network().items()}
    out = decode_triplane(planes, torch.zeros(1, 1, 3, dtype=torch.float64), **net)
    gradients = torch.autograd.grad(out[..., 2].sum(), [planes, *net.values()])
    root = 2**0.5
    # Output 2 is root * (lrelu(f) + lrelu(1 - f)) with f = 6, slopes 1 and 0.2: to f root (1 - 0.2), a third per plane.
    expected = {
        "planes": torch.full((1, 3, 1, 1), root * 0.8 / 3),
        "w0": [[6 * root], [6 * 0.2 * root]],
        "b0": [root, 0.2 * root],
        "w1": [[0, 0], [0, 0], [6 * root, -root]],
        "b1": [0, 0, 1],
    }
    for (name, value), gradient in zip(expected.items(), gradients, strict=True):
        assert_close(gradient, value, f"gradient to {name}", "hand")


def test_kink_has_the_slope_of_the_negative_side(decode_triplane):
    planes = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    net = hand_network()
    net["b0"] = torch.zeros(2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(decode_triplane(planes, torch.zeros(1, 1, 3), **net)[..., 0].sum(), planes)
    assert_close(gradient, torch.full((1, 3, 1, 1), 0.2 * 2**0.5 / 3), "gradient at the kink", "hand")


@pytest.mark.parametrize(("channels", "hidden", "out"), [(32, 64, 4), (5, 7, 4), (1, 1, 1)])
def test_equals_the_formula(decode_triplane, channels, hidden, out):
    planes = draw(2, 3 * channels, 5, 6, seed=1)
    points = 2.4 * draw_uniform(2, 17, 3, seed=2) - 1.2
    net = network(channels, hidden, out)
    features = ops.sample_triplane(planes, points, backend="reference")
    before = torch.einsum("bnc,hc->bnh", features, net["w0"]) + net["b0"]
    after = 2**0.5 * torch.where(before > 0, before, before / 5)
    expected = torch.einsum("bnh,oh->bno", after, net["w1"]) + net["b1"]
    assert_close(decode_triplane(planes, points, **net), expected, "out")


def test_points_of_a_ray_by_hand(decode_triplane, decode_triplane_rays):
    # From (0.1, 0, 1) along (0, 0, -1): t = 0.7 is (0.1, 0, 0.3), t = 1.5 is (0.1, 0, -0.5); divided by 0.5 that is
    # (0.2, 0, 0.6) and (0.2, 0, -1).
    planes, net = draw(1, 9, 4, 4), network()
    origins = torch.tensor([[[0.1, 0, 1]]], dtype=torch.float64)
    directions = torch.tensor([[[0, 0, -1]]], dtype=torch.float64)
    t = torch.tensor([[[0.7, 1.5]]], dtype=torch.float64)
    points = torch.tensor([[[0.2, 0, 0.6], [0.2, 0, -1]]], dtype=torch.float64)
    actual = decode_triplane_rays(planes, origins, directions, t, **net, cube_scale=0.5)
    assert_close(actual, decode_triplane(planes, points, **net)[:, None], "out")


@pytest.mark.parametrize("cube_scale", [1.0, 0.2])
def test_rays_equal_points(decode_triplane, decode_triplane_rays, cube_scale):
    planes, net = draw(2, 9, 4, 5, seed=1), network()
    origins, directions = 0.1 * draw(2, 3, 3, seed=2), 0.2 * draw(2, 3, 3, seed=3)
    t = draw_uniform(2, 3, 4, seed=4)
    actual = decode_triplane_rays(planes, origins, directions, t, **net, cube_scale=cube_scale)
    assert actual.shape == (2, 3, 4, 4)
    for ray in range(3):
        for sample in range(4):
            points = (origins[:, ray] + t[:, ray, sample, None] * directions[:, ray]) / cube_scale
            expected = decode_triplane(planes, points[:, None], **net)[:, 0]
            assert_close(actual[:, ray, sample], expected, f"ray {ray}, sample {sample}")


def check_derivatives(function, inputs, backend, what):
    gradcheck(function, inputs, what)
    try:
        gradgradcheck(function, inputs, what)
    except RuntimeError as error:  # neither the extension nor the grid sampler of an older torch has a second one
        known = "grid_sampler_2d_backward", "no second derivative"
        if backend == "reference" or not any(words in str(error) for words in known):
            raise


def test_derivatives_at_points(decode_triplane, backend):
    inputs = {
        "planes": draw(1, 6, 3, 2, seed=1),
        "points": 2.4 * draw_uniform(1, 2, 3, seed=2) - 1.2,
        **network(channels=2, hidden=3, out=2),
    }
    check_derivatives(decode_triplane, inputs, backend, "decode_triplane")


def test_derivatives_along_rays(decode_triplane_rays, backend):
    inputs = {
        "planes": draw(1, 3, 3, 2, seed=1),
        "ray_origins": 0.1 * draw(1, 2, 3, seed=2),
        "ray_directions": 0.5 * draw(1, 2, 3, seed=3),
        "t": draw_uniform(1, 2, 2, seed=4),
        **network(channels=1, hidden=3, out=2),
    }
    function = functools.partial(decode_triplane_rays, cube_scale=0.7)
    check_derivatives(function, inputs, backend, "decode_triplane_rays")


@pytest.mark.parametrize(("batch", "rays", "samples"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty(decode_triplane, decode_triplane_rays, batch, rays, samples):
    planes, net = draw(batch, 9, 3, 4).requires_grad_(), network()
    out = decode_triplane(planes, draw(batch, rays * samples, 3), **net)
    assert out.shape == (batch, rays * samples, 4)
    out = decode_triplane_rays(
        planes, draw(batch, rays, 3), draw(batch, rays, 3), draw(batch, rays, samples), **net, cube_scale=0.2
    )
    assert out.shape == (batch, rays, samples, 4)
    (gradient,) = torch.autograd.grad(out.sum(), planes)
    assert_close(gradient, torch.zeros(batch, 9, 3, 4), "gradient to planes", "exact")


def test_layout_does_not_matter(decode_triplane_rays):
    inputs = {
        "planes": draw(2, 9, 4, 5, seed=1),
        "ray_origins": 0.1 * draw(2, 3, 3, seed=2),
        "ray_directions": 0.5 * draw(2, 3, 3, seed=3),
        "t": draw_uniform(2, 3, 4, seed=4),
        **network(),
    }
    expected = decode_triplane_rays(**inputs)
    for changed, x in inputs.items():
        for name, view in layouts(x):
            assert_close(decode_triplane_rays(**{**inputs, changed: view}), expected, f"{changed}: {name}")


def test_float32(decode_triplane):
    inputs = {"planes": draw(1, 9, 4, 4), "points": draw_uniform(1, 9, 3), **network()}
    out = decode_triplane(**{name: x.float() for name, x in inputs.items()})
    assert out.dtype == torch.float32
    assert_close(out, decode_triplane(**inputs), "out")


NETWORK_ERRORS = [
    ({"planes": draw(9, 3, 4)}, ValueError, "planes must have shape [B, 3*C, H, W]"),
    ({"planes": draw(2, 8, 3, 4)}, ValueError, "planes must have 3*C channels"),
    ({"w0": draw(5, 4)}, ValueError, "network.w0 must have shape [hidden, 3], got [5, 4]"),
    ({"b0": draw(4)}, ValueError, "network.b0 must have shape [5], got [4]"),
    ({"w1": draw(4, 4)}, ValueError, "network.w1 must have shape [out, 5], got [4, 4]"),
    ({"b1": draw(1, 4)}, ValueError, "network.b1 must have shape [4], got [1, 4]"),
    ({"b1": None}, TypeError, "network.b1 must be a tensor, got NoneType"),
    ({"w1": torch.zeros(4, 5, dtype=torch.int8)}, TypeError, "network.w1 must be floating point, got torch.int8"),
    ({"w0": torch.zeros(5, 3, device="meta")}, ValueError, "network.w0 must be on cpu as planes is, got meta"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *NETWORK_ERRORS,
        ({"points": draw(2, 6, 2)}, ValueError, "points must have shape [2, N, 3], got [2, 6, 2]"),
        ({"points": draw(1, 6, 3)}, ValueError, "points must have shape [2, N, 3], got [1, 6, 3]"),
        ({"points": torch.zeros(2, 6, 3).int()}, TypeError, "points must be floating point, got torch.int32"),
        ({"points": torch.zeros(2, 6, 3, device="meta")}, ValueError, "points must be on cpu as planes is, got meta"),
        ({"points": 1.0}, TypeError, "points must be a tensor, got float"),
    ],
)
def test_errors_at_points(change, error, message):
    arguments = {"planes": draw(2, 9, 3, 4), "points": draw(2, 6, 3), **network(), **change}
    with pytest.raises(error, match=re.escape(f"decode_triplane: {message}")):
        decode_at_points(**arguments)


def test_a_network_is_named():
    with pytest.raises(TypeError, match=r"decode_triplane: network must be a Network\(w0, b0, w1, b1\), got tuple"):
        ops.decode_triplane(draw(2, 9, 3, 4), draw(2, 6, 3), tuple(network().values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *NETWORK_ERRORS,
        ({"ray_origins": draw(2, 6, 2)}, ValueError, "ray_origins must have shape [2, R, 3], got [2, 6, 2]"),
        ({"ray_directions": draw(2, 5, 3)}, ValueError, "ray_directions must have shape [2, 6, 3], got [2, 5, 3]"),
        ({"t": draw(2, 5, 4)}, ValueError, "t must have shape [2, 6, S], got [2, 5, 4]"),
        ({"t": torch.zeros(2, 6, 4).int()}, TypeError, "t must be floating point, got torch.int32"),
        ({"t": torch.zeros(2, 6, 4, device="meta")}, ValueError, "t must be on cpu as planes is, got meta"),
        ({"t": draw(2, 6)}, ValueError, "t must have shape [2, 6, S], got [2, 6]"),
        ({"cube_scale": 0.0}, ValueError, "cube_scale must be finite and positive, got 0.0"),
        ({"cube_scale": -1.0}, ValueError, "cube_scale must be finite and positive"),
        ({"cube_scale": float("inf")}, ValueError, "cube_scale must be finite and positive"),
        ({"cube_scale": float("nan")}, ValueError, "cube_scale must be finite and positive"),
    ],
)
def test_errors_along_rays(change, error, message):
    arguments = {
        "planes": draw(2, 9, 3, 4),
        "ray_origins": draw(2, 6, 3),
        "ray_directions": draw(2, 6, 3),
        "t": draw(2, 6, 4),
        **network(),
        **change,
    }
    with pytest.raises(error, match=re.escape(f"decode_triplane_rays: {message}")):
        decode_on_rays(**arguments)


def ray_inputs(batch=2, rays=3, samples=5, channels=8, height=5, width=6, *, hidden=16, out=4, dtype=torch.float32):
    """Rays through a cube of half size 0.5 and beyond it; planes of the dtype, all the rest in fp32."""
    return {
        "planes": draw(batch, 3 * channels, height, width, seed=1, dtype=dtype),
        "ray_origins": 0.1 * draw(batch, rays, 3, seed=2, dtype=torch.float32),
        "ray_directions": torch.nn.functional.normalize(draw(batch, rays, 3, seed=3, dtype=torch.float32), dim=-1),
        "t": 1.2 * draw_uniform(batch, rays, samples, seed=4, dtype=torch.float32) - 0.6,
        **network(channels, hidden, out, torch.float32),
    }


def point_inputs(batch=2, points=11, **sizes):
    """The same at points."""
    inputs = ray_inputs(batch, rays=points, samples=1, **sizes)
    rest = {name: inputs[name] for name in ("planes", "w0", "b0", "w1", "b1")}
    return {"points": 2.4 * draw_uniform(batch, points, 3, seed=5, dtype=torch.float32) - 1.2, **rest}


def values_and_gradients(function, inputs, *, gradients_to=("planes", "w0", "b0", "w1", "b1"), device=DEVICE):
    """The output and its gradients to planes and network, by name."""
    inputs = {name: x.detach().to(device) for name, x in inputs.items()}
    for name in gradients_to:
        inputs[name].requires_grad_()
    y = function(**inputs)
    grad_y = draw(*y.shape, seed=6).to(device, y.dtype)
    gradients = torch.autograd.grad(y, [inputs[name] for name in gradients_to], grad_y)
    return {"out": y, **{f"gradient to {name}": x for name, x in zip(gradients_to, gradients, strict=True)}}


# Matrix products that a result comes out of, one after the other.
PRODUCTS = {"out": 2, "planes": 2, "w0": 2, "b0": 1, "w1": 2, "b1": 0}


def more_roundings(name, y):
    """What the kernels add to the error of the reference: products on tensor cores, and sums over all points of y."""
    name = name.removeprefix("gradient to ")
    products = PRODUCTS[name] if compiled.tensor_cores() else 0
    return roundings(products=products, terms=0 if name == "out" else y[..., 0].numel())


def assert_triton_errs_no_more_than_the_reference(function, inputs, dtype=torch.float32):
    """`dtype` is that of planes and network."""
    inputs = {name: x.to(dtype) if name in ("planes", "w0", "b0", "w1", "b1") else x for name, x in inputs.items()}
    actual = values_and_gradients(functools.partial(function, backend="triton"), inputs)
    reference = values_and_gradients(functools.partial(function, backend="reference"), inputs)
    wide = {name: x.double() for name, x in inputs.items()}
    truth = values_and_gradients(functools.partial(function, backend="reference"), wide)
    for name in actual:
        more = more_roundings(name, truth["out"])
        assert_error_within_reference(actual[name], reference[name], truth[name], name, more)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 2, "rays": 150, "samples": 48, "channels": 32, "hidden": 64},  # several chunks
        {"batch": 1, "rays": 1, "samples": 1, "height": 1, "width": 1, "out": 2},
        {"batch": 3, "rays": 5, "samples": 3, "channels": 5, "hidden": 33, "out": 5, "height": 3},
        {"batch": 1, "rays": 13, "samples": 5, "channels": 17, "hidden": 7, "out": 16},
    ],
    ids=str,
)
def test_fused_on_the_cpu_by_levels_and_threads(sizes, cpu_level, threads):
    inputs = {name: x.cpu() for name, x in ray_inputs(**sizes).items()}
    decode = functools.partial(decode_on_rays, cube_scale=0.475)
    kernels = functools.partial(values_and_gradients, functools.partial(decode, backend="cpu"), device="cpu")
    actual = kernels(inputs)
    assert "DecodeTriplane" in str(actual["out"].grad_fn)
    reference = values_and_gradients(functools.partial(decode, backend="reference"), inputs, device="cpu")
    wide = {name: x.double() for name, x in inputs.items()}
    truth = values_and_gradients(functools.partial(decode, backend="reference"), wide, device="cpu")
    for name in actual:
        assert_error_within_reference(actual[name], reference[name], truth[name], name)
    threads(3)
    for name, result in kernels(inputs).items():
        assert_close(result, actual[name], f"{name} by three threads", "exact")


def gradients_for(grad_y, backend, inputs, names=("planes", "w0", "b0", "w1", "b1")):
    inputs = {name: x.detach().cpu().requires_grad_(name in names) for name, x in inputs.items()}
    out = decode_on_rays(**inputs, backend=backend)
    return dict(zip(names, torch.autograd.grad(out, [inputs[name] for name in names], grad_y), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_on_the_cpu_leaves_out_what_is_too_small_to_count(dtype, cpu_level, threads):
    """Points whose gradients are all below the largest times the square of the dtype's precision: nine of ten here."""
    inputs = {name: x.to(dtype) for name, x in ray_inputs(rays=150, samples=48).items()}
    grad_y = draw(2, 150, 48, 4, seed=6, dtype=dtype)
    small = draw_uniform(2, 150, 48, seed=7, dtype=torch.float64) < 0.9
    scaled = torch.where(small[..., None], grad_y * torch.finfo(dtype).eps ** 2 * 1e-2, grad_y)
    actual = gradients_for(scaled, "cpu", inputs)
    without = gradients_for(torch.where(small[..., None], torch.zeros_like(grad_y), grad_y), "cpu", inputs)
    wide = {name: x.double() for name, x in inputs.items()}
    reference = gradients_for(scaled, "reference", inputs)
    truth = gradients_for(scaled.double(), "reference", wide)
    threads(3)
    for name, result in gradients_for(scaled, "cpu", inputs).items():
        assert_close(result, actual[name], f"{name} by three threads", "exact")
        assert_close(without[name], actual[name], f"{name} without the small ones", "exact")
        if dtype == torch.float32:
            assert_error_within_reference(actual[name], reference[name], truth[name], name)


def test_fused_on_the_cpu_keeps_small_gradients_among_their_like(cpu_level):
    """What is too small beside a large one counts where all are as small, and where it is just above the limit."""
    inputs = ray_inputs(batch=1, rays=2, samples=1)
    grad_y = draw(1, 2, 1, 4, seed=6, dtype=torch.float32)
    large, alone = gradients_for(grad_y, "cpu", inputs), gradients_for(grad_y * 1e-20, "cpu", inputs)
    for name, gradient in large.items():
        assert_close(alone[name] * 1e20, gradient, name)
    eps = torch.finfo(torch.float32).eps
    limit = grad_y.abs().max() * eps**2  # of the second ray's numbers, the others being 0
    for factor, counts in ((0.99, False), (1.01, True)):
        second = torch.cat([grad_y[:, :1], torch.zeros(1, 1, 1, 4)], dim=1)
        second[0, 0, 0, 0] = grad_y.abs().max()
        second[0, 1, 0, 2] = limit * factor
        difference = gradients_for(second, "cpu", inputs)["planes"] != 0
        first_alone = gradients_for(second * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), "cpu", inputs)["planes"] != 0
        assert (difference != first_alone).any() == counts


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_fused_on_the_cpu_keeps_gradients_that_are_not_finite(broken, cpu_level):
    inputs = ray_inputs()
    grad_y = draw(2, 3, 5, 4, seed=6, dtype=torch.float32)
    grad_y[1, 2, 3, 1] = broken
    actual, expected = (gradients_for(grad_y, backend, inputs) for backend in ("cpu", "reference"))
    for name in actual:
        assert torch.equal(actual[name].isfinite(), expected[name].isfinite()), name
        zeros = torch.zeros_like(actual[name])
        finite = [torch.where(x[name].isfinite(), x[name], zeros) for x in (actual, expected)]
        assert_close(*finite, name)


def test_fused_on_the_cpu_gives_zeros_for_zeros(cpu_level):
    for name, gradient in gradients_for(torch.zeros(2, 3, 5, 4), "cpu", ray_inputs()).items():
        assert not gradient.any(), name


def test_fused_on_the_cpu_has_no_second_derivative(cpu_level):
    inputs = {name: x.cpu().requires_grad_(name == "planes") for name, x in ray_inputs().items()}
    out = decode_on_rays(**inputs, backend="cpu")
    (gradient,) = torch.autograd.grad(out.sum(), inputs["planes"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'backend "cpu" has no second derivative; use backend="reference"'):
        torch.autograd.grad(gradient.square().sum(), inputs["planes"])


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1e30])
def test_fused_on_the_cpu_keeps_to_the_planes(broken, cpu_level):
    inputs = {name: x.cpu() for name, x in point_inputs().items()}
    inputs["points"][0, 3, 1] = broken
    actual, expected = (decode_at_points(**inputs, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_close(actual.nan_to_num(), expected.nan_to_num(), "out")


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "deterministic"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False)],
)
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 2, "rays": 3, "samples": 48, "channels": 32, "hidden": 64},
        {"batch": 1, "rays": 1, "samples": 1, "height": 1, "width": 1, "out": 2},
        {"batch": 3, "rays": 5, "samples": 3, "channels": 24, "hidden": 33, "out": 5, "height": 3},
        {"batch": 1, "rays": 13, "samples": 5, "channels": 64, "hidden": 128, "out": 16},
    ],
    ids=str,
)
def test_triton_along_rays(poisoned, sizes, dtype, deterministic):
    function = functools.partial(decode_on_rays, cube_scale=0.475, deterministic=deterministic)
    assert_triton_errs_no_more_than_the_reference(function, ray_inputs(**sizes), dtype)


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("points", [1, 131, 600])  # a point, tiles, and programs of the backward
def test_triton_at_points(poisoned, points, deterministic):
    inputs = point_inputs(batch=2 if points < 600 else 1, points=points)
    function = functools.partial(decode_at_points, deterministic=deterministic)
    assert_triton_errs_no_more_than_the_reference(function, inputs)


@needs_triton
@pytest.mark.parametrize("sizes", [{"channels": 32, "hidden": 64}, {"out": 5}], ids=str)
def test_triton_by_programs_of_several_tiles(poisoned, monkeypatch, sizes):
    """Of which large problems have enough to fill a GPU; the last program of an image has two of four tiles."""
    from epigraf_fast.kernels import decode_triplane as kernels

    plan = kernels.plan
    monkeypatch.setattr(kernels, "plan", lambda case: tuple(one._replace(tiles=4) for one in plan(case)))
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", 0)
    function = functools.partial(decode_on_rays, cube_scale=0.475)
    assert_triton_errs_no_more_than_the_reference(function, ray_inputs(rays=7, samples=48, **sizes))


@needs_triton
@pytest.mark.parametrize(
    ("tiles", "old", "launched"),
    [
        (4 * 1024, False, (1024, 4, 96)),
        (4 * 1024 - 3, False, (1024, 4, 96)),
        (4 * 1023, False, (4 * 1023, 1, 96)),  # too few to fill a GPU
        (4 * 1024, True, (4 * 1024, 1, None)),
    ],
)
def test_triton_takes_several_tiles_where_programs_fill_a_gpu(tiles, old, launched, monkeypatch):
    """And not by a Triton whose code would spill at the registers of the plan."""
    from epigraf_fast.kernels import decode_triplane as kernels
    from epigraf_fast.kernels.tuning import Config

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((*grid, options["TILES"], options["maxnreg"]))

    def meta(*shape):
        return torch.empty(shape, device="meta")

    seen = []
    monkeypatch.setattr(kernels, "_decode_triplane_fwd_kernel", Launch())
    monkeypatch.setattr(kernels, "OLD_TRITON", old)
    planes, network = meta(1, 96, 8, 8), (meta(64, 32), meta(64), meta(4, 64), meta(4))
    rays = meta(1, tiles, 3), meta(1, tiles, 3), meta(1, tiles, 64)
    chosen = (Config(64, 4, 4, 96),)
    y = kernels.fwd(planes, *rays, *network, precision="tf32", chosen=chosen, arch=80)
    assert y.shape == (1, tiles, 64, 4)
    assert seen == [launched]


@contextlib.contextmanager
def programs_in_reverse():
    """The interpreter runs the programs of a launch from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder

    forward = interpreter_builder.set_grid_idx

    def set_grid_idx(x, y, z):
        forward(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
        yield


@compiled.on_triton(compiled=False)
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU orders its programs itself: see the gpu-marked test")
@pytest.mark.parametrize("texel", [torch.float32, torch.float16])
def test_triton_gradients_have_the_same_bits_in_any_order_of_programs(poisoned, monkeypatch, texel):
    from epigraf_fast.kernels import decode_triplane as kernels

    monkeypatch.setattr(kernels, "DETERMINISTIC_TILES", 2)  # several programs out of few points
    inputs = ray_inputs(batch=1, rays=75, samples=2, height=2, width=2, dtype=texel)
    results = {}
    for deterministic in (False, True):
        function = functools.partial(decode_on_rays, deterministic=deterministic, backend="triton")
        given = values_and_gradients(function, inputs)
        with programs_in_reverse():
            results[deterministic] = given, values_and_gradients(function, inputs)
    given, reverse = results[True]
    for name in given:
        assert torch.equal(given[name], reverse[name]), name
    given, reverse = results[False]
    if texel == torch.float32:  # the order does matter to a sum in floating point, if it is not rounded away
        assert any(not torch.equal(given[name], reverse[name]) for name in given)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_triton_gradients_have_the_same_bits_in_every_run(precision):
    inputs = ray_inputs(batch=2, rays=2048, samples=48, channels=32, hidden=64, height=16, width=16)
    function = functools.partial(
        decode_on_rays, precision=precision, deterministic=True, cube_scale=0.5, backend="triton"
    )
    first = values_and_gradients(function, inputs)
    for _ in range(5):
        for name, x in values_and_gradients(function, inputs).items():
            assert torch.equal(x, first[name]), name


@needs_triton
def test_triton_half_planes_with_a_wide_network(poisoned):
    inputs = ray_inputs(dtype=torch.float16)
    actual = values_and_gradients(functools.partial(decode_on_rays, backend="triton"), inputs)
    expected, truth = (
        values_and_gradients(
            functools.partial(decode_on_rays, backend="reference"),
            {name: x.to(dtype) for name, x in inputs.items()},
        )
        for dtype in (torch.float32, torch.float64)
    )
    for name in actual:
        dtype = torch.float16 if name == "gradient to planes" else torch.float32
        assert actual[name].dtype == dtype
        more = more_roundings(name, truth["out"])
        assert_error_within_reference(actual[name], expected[name].to(dtype), truth[name], name, more)


@needs_triton
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_triton_in_lower_precision(precision):
    inputs = ray_inputs()
    function = functools.partial(decode_on_rays, backend="triton")
    expected = values_and_gradients(function, inputs)
    for name, x in values_and_gradients(functools.partial(function, precision=precision), inputs).items():
        largest = expected[name].abs().max()
        assert_close(x / largest, expected[name] / largest, name, torch.float16)


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("gradients_to", [("planes",), ("w0", "b0", "w1", "b1"), ("b1",), ("planes", "w1")], ids=str)
def test_triton_gives_the_gradients_that_are_asked_for(poisoned, gradients_to, deterministic):
    inputs = ray_inputs()
    function = functools.partial(decode_on_rays, deterministic=deterministic, backend="triton")
    expected = values_and_gradients(function, inputs)
    actual = values_and_gradients(function, inputs, gradients_to=gradients_to)
    for name in actual:
        assert_close(actual[name], expected[name], name)


@needs_triton
def test_triton_takes_any_layout(poisoned):
    inputs = ray_inputs()
    function = functools.partial(decode_on_rays, backend="triton")
    expected = values_and_gradients(function, inputs)
    for changed, x in inputs.items():
        for layout, view in layouts(x.to(DEVICE)):
            out = function(**{name: y.to(DEVICE) for name, y in inputs.items()} | {changed: view})
            assert_close(out, expected["out"], f"{changed}: {layout}", "exact")
    for layout, view in layouts(inputs["planes"]):
        for name, y in values_and_gradients(function, {**inputs, "planes": view}).items():
            assert_close(y, expected[name], f"planes: {layout}: {name}")


@needs_triton
def test_triton_far_rays_are_empty(poisoned):
    inputs = ray_inputs()
    inputs["t"] = torch.tensor([1e9, -1e30, torch.inf, 3e38, 40.0]).expand(2, 3, 5)
    out = values_and_gradients(functools.partial(decode_on_rays, backend="triton", cube_scale=0.2), inputs)
    before = inputs["b0"].double()
    empty = torch.nn.functional.leaky_relu(before, 0.2) * 2**0.5 @ inputs["w1"].double().T + inputs["b1"].double()
    assert_close(out["out"], empty.expand(2, 3, 5, 4), "out")
    for name in ("planes", "w0"):
        gradient = out[f"gradient to {name}"]
        assert_close(gradient, torch.zeros_like(gradient), f"gradient to {name}", "exact")


@needs_triton
@pytest.mark.parametrize(("batch", "rays", "samples"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_triton_empty(batch, rays, samples):
    function = functools.partial(decode_on_rays, backend="triton")
    result = values_and_gradients(function, ray_inputs(batch, rays, samples))
    assert result["out"].shape == (batch, rays, samples, 4)
    for name, gradient in [*result.items()][1:]:
        assert_close(gradient, torch.zeros_like(gradient), name, "exact")


@needs_triton
def test_triton_saves_its_inputs_alone():
    inputs = {name: x.to(DEVICE).requires_grad_(name in ("planes", "w0")) for name, x in ray_inputs().items()}
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add(x.data_ptr()), lambda x: x):
        decode_on_rays(**inputs, backend="triton")
    assert saved == {x.data_ptr() for name, x in inputs.items() if name != "b1"}
    with torch.no_grad():
        assert decode_on_rays(**inputs, backend="triton").grad_fn is None


@needs_triton
@pytest.mark.parametrize("second", ["planes", "w1"])
def test_triton_has_no_second_derivative(second):
    inputs = {name: x.to(DEVICE).requires_grad_(name in ("planes", "w1")) for name, x in ray_inputs().items()}
    out = decode_on_rays(**inputs, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), inputs["planes"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'decode_triplane: .*second derivative.*backend="reference"'):
        torch.autograd.grad(gradient.square().sum(), inputs[second])


TRITON_ERRORS = [
    (
        {"w0": torch.zeros(8, 8), "b0": torch.zeros(8), "w1": torch.zeros(4, 8)},
        ValueError,
        "network.w0 must have 16 to 128 rows",
    ),
    (
        {"w1": torch.zeros(17, 16), "b1": torch.zeros(17)},
        ValueError,
        "network.w1 must have 2 to 16 rows, outputs (because back",
    ),
    (
        {"w1": torch.zeros(1, 16), "b1": torch.zeros(1)},
        ValueError,
        "network.w1 must have 2 to 16 rows, outputs (because backe",
    ),
    ({"planes": draw(2, 24, 3, 4)}, TypeError, "planes must be float32 or float16 or bfloat16 (because backend is"),
    ({"b1": draw(4)}, TypeError, "network.b1 must be float32 or float16 or bfloat16 (because backend is"),
    ({"planes": torch.zeros(2, 15, 3, 4), "w0": torch.zeros(16, 5)}, ValueError, "planes must have a multiple of 8"),
    ({"precision": "fp8"}, ValueError, "precision must be one of fp32, tf32, fp16, got 'fp8'"),
]


@needs_triton
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *TRITON_ERRORS,
        ({"points": draw(2, 11, 3)}, TypeError, 'points must be float32 (because backend is "triton")'),
        (
            {"points": torch.zeros(2, 11, 3, requires_grad=True)},
            NotImplementedError,
            'backend "triton" has no gradient',
        ),
    ],
)
def test_triton_errors_at_points(change, error, message):
    arguments = {**point_inputs(), **change}
    arguments = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(error, match=re.escape(f"decode_triplane: {message}")):
        decode_at_points(**arguments, backend="triton")


@needs_triton
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *TRITON_ERRORS,
        ({"t": draw(2, 3, 5)}, TypeError, 't must be float32 (because backend is "triton"), got torch.float64'),
        (
            {"t": torch.zeros(2, 3, 5, requires_grad=True)},
            NotImplementedError,
            'backend "triton" has no gradient to t;',
        ),
    ],
)
def test_triton_errors_along_rays(change, error, message):
    arguments = {**ray_inputs(), **change}
    arguments = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(error, match=re.escape(f"decode_triplane_rays: {message}")):
        decode_on_rays(**arguments, backend="triton")


def test_coarse_to_fine_is_two_calls(backend):
    inputs = {name: x.double() for name, x in ray_inputs(channels=2, hidden=5).items()}
    asked = []

    def resample(coarse):
        assert not coarse.requires_grad
        asked.append(coarse)
        return inputs["t"][..., :2] + 0.1

    inputs["w0"].requires_grad_()
    rays = inputs["ray_origins"], inputs["ray_directions"]
    net = ops.Network(*(inputs[name] for name in ("w0", "b0", "w1", "b1")))
    coarse, t_fine, fine = ops.decode_triplane_coarse_to_fine(
        inputs["planes"], *rays, inputs["t"], net, resample, 0.7, backend=backend
    )
    assert_close(t_fine, inputs["t"][..., :2] + 0.1, "t_fine", "exact")
    for name, actual, t in (("coarse", coarse, inputs["t"]), ("fine", fine, t_fine)):
        expected = ops.decode_triplane_rays(inputs["planes"], *rays, t, net, 0.7, backend=backend)
        assert_close(actual, expected, name, "exact")
        assert actual.requires_grad
    assert_close(asked[0], coarse, "what resample saw", "exact")


class SideBySide(torch.autograd.Function):
    """Concatenates coarse and fine samples; their gradients are views of one tensor, as those of `composite` are."""

    @staticmethod
    def forward(ctx, coarse, fine):
        ctx.samples = coarse.shape[2]
        return torch.cat([coarse, fine], dim=2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        return grad[:, :, : ctx.samples], grad[:, :, ctx.samples :]


@needs_triton
@pytest.mark.parametrize("used", ["both", "side by side", "coarse", "fine"])
def test_triton_coarse_to_fine(poisoned, used):
    def function(t_fine, backend, **inputs):
        t, net = inputs.pop("t"), ops.Network(*(inputs.pop(name) for name in ("w0", "b0", "w1", "b1")))
        coarse, _, fine = ops.decode_triplane_coarse_to_fine(
            *inputs.values(), t, net, lambda coarse: t_fine, 0.475, backend=backend
        )
        if used == "side by side":
            return SideBySide.apply(coarse, fine)
        return {"both": torch.cat([coarse, fine], dim=2), "coarse": coarse, "fine": fine}[used]

    inputs = {**ray_inputs(), "t_fine": draw_uniform(2, 3, 4, seed=9).float().to(DEVICE)}
    assert_triton_errs_no_more_than_the_reference(function, inputs)


@needs_triton
def test_triton_coarse_to_fine_has_no_second_derivative():
    inputs = {name: x.to(DEVICE) for name, x in ray_inputs().items()}
    t, planes = inputs.pop("t"), inputs["planes"].requires_grad_()
    geometry, net = list(inputs.values())[:3], ops.Network(*list(inputs.values())[3:])
    coarse, _, fine = ops.decode_triplane_coarse_to_fine(*geometry, t, net, lambda coarse: t, backend="triton")
    (gradient,) = torch.autograd.grad(coarse.sum() + fine.sum(), planes, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'decode_triplane: .*second derivative.*backend="reference"'):
        torch.autograd.grad(gradient.square().sum(), planes)
