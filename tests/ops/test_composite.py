"""composite: the reference against closed forms and rays worked by hand.

The extension for CPUs against the reference, in every instruction set. The Triton kernels against it: in Triton's
interpreter and compiled, or on the GPU where there is one.
"""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch

import compiled
from checks import (
    SIGMAS,
    assert_close,
    assert_error_within_reference,
    assert_finite,
    assert_same_specials,
    draw,
    draw_uniform,
    gradcheck,
    gradgradcheck,
    layouts,
    roundings,
)
from epigraf_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = compiled.on_triton()

composite = functools.partial(ops.composite, backend="reference")
LN2 = math.log(2)
OPAQUE = 1e4  # raw density


def ray(values):
    """Numbers as the one ray of one image: [1, 1, ...]."""
    return torch.tensor(values, dtype=torch.float64)[None, None]


# Three samples one unit apart, the last interval 1 too, of density ln 2 each: every opacity is 1 - exp(-ln 2) = 1/2,
# T = 1, 1/2, 1/4 and w = 1/2, 1/4, 1/8. Four colours of 1, 10, 100 times 1, 2, 3, 4.
HAND_T = ray([1, 2, 3])
HAND_VALUES = ray([[1, 2, 3, 4, LN2], [10, 20, 30, 40, LN2], [100, 200, 300, 400, LN2]])
HAND = functools.partial(composite, HAND_T, HAND_VALUES, activation="relu", last_interval=1.0)


def random_ray_sets(coarse=4, fine=3, colours=2, batch=1, rays=2):
    """Two sets with distinct, sorted depths that interleave."""
    t = draw_uniform(batch, rays, coarse, seed=1).sort(dim=-1).values
    t_fine = draw_uniform(batch, rays, fine, seed=2).sort(dim=-1).values
    return {
        "t": t,
        "values": draw(batch, rays, coarse, colours + 1, seed=3),
        "t_fine": t_fine,
        "values_fine": draw(batch, rays, fine, colours + 1, seed=4),
    }


def test_ray_by_hand():
    result = HAND(return_weights=True)
    assert_close(result.weights, ray([0.5, 0.25, 0.125]), "weights", "hand")
    # rgb = 0.5 * 1 + 0.25 * 10 + 0.125 * 100 = 15.5, times 1, 2, 3, 4. depth = 0.5 + 0.5 + 0.375, not divided by 0.875.
    assert_close(result.rgb, ray([15.5, 31, 46.5, 62]), "rgb", "hand")
    assert_close(result.depth, ray(1.375), "depth", "hand")
    assert_close(result.weight_sum, ray(0.875), "weight_sum", "hand")
    # In front of the last sample 1/4 is left (1/8 behind it).
    assert_close(result.final_transmittance, ray(0.25), "final_transmittance", "hand")


def test_weights_are_returned_only_on_demand():
    assert HAND().weights is None
    assert HAND()._fields == ("rgb", "depth", "weight_sum", "final_transmittance", "weights")


def test_last_back_by_hand():
    # The last weight grows by 1 - 0.875 to 0.25: rgb = 15.5 + 12.5 = 28, depth = 1.375 + 0.375 = 1.75.
    result = HAND(last_back=True, return_weights=True)
    assert_close(result.weights, ray([0.5, 0.25, 0.25]), "weights", "hand")
    assert_close(result.rgb, ray([28, 56, 84, 112]), "rgb", "hand")
    assert_close(result.depth, ray(1.75), "depth", "hand")
    assert_close(result.weight_sum, ray(0.875), "weight_sum, before last_back", "hand")
    assert_close(result.final_transmittance, ray(0.25), "final_transmittance", "hand")


def test_white_background_by_hand():
    result = HAND(white_background=True, return_weights=True)  # the first three colours get 0.125
    assert_close(result.rgb, ray([15.625, 31.125, 46.625, 62]), "rgb", "hand")
    assert_close(result.depth, ray(1.375), "depth", "hand")
    assert_close(result.weights, ray([0.5, 0.25, 0.125]), "weights", "hand")


def test_last_back_and_white_background_add_twice():
    assert_close(HAND(last_back=True, white_background=True).rgb, ray([28.125, 56.125, 84.125, 112]), "rgb", "hand")


def test_background_by_hand():
    result = HAND(background=ray([8, -8, 0, 4]))  # times 1/4
    assert_close(result.rgb, ray([17.5, 29, 46.5, 63]), "rgb", "hand")
    assert_close(result.weight_sum, ray(0.875), "weight_sum", "hand")
    result = HAND(background=ray([8, -8, 0, 4]), white_background=True, last_back=True)
    assert_close(result.rgb, ray([30.125, 54.125, 84.125, 113]), "rgb with everything", "hand")


def test_white_background_of_three_colours():
    values = torch.cat([HAND_VALUES[..., :3], HAND_VALUES[..., -1:]], dim=-1)
    actual = composite(HAND_T, values, activation="relu", last_interval=1.0, white_background=True).rgb
    assert_close(actual, ray([15.625, 31.125, 46.625]), "rgb", "hand")


@pytest.mark.parametrize(
    ("settings", "raw", "opacity"),
    [
        ({}, 0.0, 0.5),  # softplus(0) = ln 2
        ({"softplus_beta": 2.0}, 0.0, 1 - 2**-0.5),  # softplus(0) / 2 = ln(2) / 2
        ({"softplus_beta": 2.0}, 1.0, 1 - (1 + math.e**2) ** -0.5),  # ln(1 + e^2) / 2
        ({"density_shift": 3.0}, -3.0, 0.5),
        ({"softplus_beta": 2.0, "density_shift": 3.0}, -3.0, 1 - 2**-0.5),
        ({"activation": "relu"}, LN2, 0.5),
        ({"activation": "relu", "density_shift": 2 * LN2}, -LN2, 0.5),
        ({"activation": "relu"}, -1.0, 0.0),
        ({"activation": "relu", "softplus_beta": 5.0}, LN2, 0.5),
        ({"density_noise": 3.0}, -3.0, 0.5),
        ({"density_noise": 1.0, "density_shift": 2.0}, -3.0, 0.5),
        ({"activation": "relu", "density_noise": -1.0}, LN2 + 1, 0.5),  # inside the activation
        ({"activation": "relu", "density_noise": -9.0}, LN2, 0.0),
    ],
)
def test_density_by_hand(settings, raw, opacity):
    if "density_noise" in settings:
        settings = {**settings, "density_noise": ray([settings["density_noise"]])}
    result = composite(ray([2.0]), ray([[1.0, raw]]), last_interval=1.0, **settings)
    assert_close(result.weight_sum, ray(opacity), "opacity", "hand")


@pytest.mark.parametrize("last_interval", [1e-3, 1.0])
def test_last_interval(last_interval):
    # A single sample: its opacity comes from last_interval alone, and nothing is in front of it.
    result = composite(ray([2.0]), ray([[3.0, 0.0]]), last_interval=last_interval)
    opacity = 1 - math.exp(-LN2 * last_interval)
    assert_close(result.rgb, ray([3 * opacity]), "rgb", "hand")
    assert_close(result.depth, ray(2 * opacity), "depth", "hand")
    assert_close(result.final_transmittance, ray(1.0), "final_transmittance", "exact")


def test_last_interval_is_endless_by_default():
    result = composite(ray([1.0, 2.0]), ray([[1.0, 0.0], [10.0, 0.0]]))  # 1/2, then all the rest
    assert_close(result.rgb, ray([5.5]), "rgb", "hand")
    assert_close(result.weight_sum, ray(1.0), "weight_sum", "hand")
    # ln(1 + e^-25) = 1.3887944e-11 is a very thin medium, but over 1e10 it stops 1 - exp(-0.13887944) = 0.1296670.
    result = composite(ray([1.0]), ray([[1.0, -25.0]]))
    assert_close(result.weight_sum, ray(0.1296670), "weight_sum of a thin medium", "hand")


@pytest.mark.parametrize("samples", [1, 2, 7, 96])
def test_constant_density_has_a_closed_form(samples):
    sigma, length = 1.7, 2.0
    t = torch.arange(samples, dtype=torch.float64) * (length / samples)
    values = torch.tensor([0.3, -0.8, sigma], dtype=torch.float64).expand(1, 1, samples, 3)
    result = composite(t[None, None], values, activation="relu", last_interval=length / samples)
    opacity = 1 - math.exp(-sigma * length)
    assert_close(result.weight_sum, ray(opacity), "weight_sum", "hand")
    assert_close(result.rgb, ray([0.3 * opacity, -0.8 * opacity]), "rgb", "hand")
    behind = math.exp(-sigma * length * (samples - 1) / samples)
    assert_close(result.final_transmittance, ray(behind), "final_transmittance", "hand")


def test_opaque_ray():
    # The first sample stops everything but the floor: T = 1, 1e-10, 1e-20.
    values = ray([[1, 1, 1, OPAQUE], [10, 10, 10, OPAQUE], [100, 100, 100, OPAQUE]])
    result = composite(HAND_T, values, white_background=True, return_weights=True)
    assert_close(result.rgb, ray([1.0, 1.0, 1.0]), "rgb", "hand")
    assert_close(result.weights[..., 0], ray(1.0), "first weight", "hand")
    assert_close(result.weights[..., 1] * 1e10, ray(1.0), "second weight, times 1e10", "hand")
    assert_close(result.final_transmittance * 1e20, ray(1.0), "final_transmittance, times 1e20", "hand")
    assert_close(composite(HAND_T, values, last_back=True).depth, ray(1.0), "depth", "hand")


def test_empty_ray():
    values = ray([[1, 1, 1, -5], [10, 10, 10, -5], [100, 100, 100, -5]])
    empty = functools.partial(composite, HAND_T, values, activation="relu")
    result = empty(return_weights=True)
    assert_close(result.weights, ray([0.0, 0.0, 0.0]), "weights", "exact")
    assert_close(result.rgb, ray([0.0, 0.0, 0.0]), "rgb (mid-grey)", "exact")
    assert_close(result.final_transmittance, ray(1.0), "final_transmittance", "hand")
    assert_close(empty(white_background=True).rgb, ray([1.0, 1.0, 1.0]), "rgb before white", "exact")
    assert_close(empty(last_back=True).rgb, ray([100.0, 100.0, 100.0]), "rgb with last_back", "exact")
    assert_close(empty(last_back=True).depth, ray(3.0), "depth with last_back", "exact")
    assert_close(empty(background=ray([-0.4, 0, 3])).rgb, ray([-0.4, 0, 3]), "rgb before a background", "hand")


def test_thin_media_keep_their_precision():
    # 1 - exp(-1e-7) is 0 or 1.2e-7 when it is rounded to float32 before the subtraction.
    values = torch.tensor([[[[1.0, 1e-7]]]])
    actual = composite(torch.ones(1, 1, 1), values, activation="relu", last_interval=1.0).weight_sum
    assert_close(actual * 1e7, torch.ones(1, 1), "opacity, times 1e7")


@pytest.mark.parametrize("fine", [1, 3, 5])
def test_two_sets_equal_one_that_was_sorted_by_hand(fine):
    sets = random_ray_sets(fine=fine, batch=2, rays=3)
    noise, background = draw(2, 3, 4 + fine, seed=5), draw(2, 3, 2, seed=6)
    t = torch.empty(2, 3, 4 + fine, dtype=torch.float64)
    values = torch.empty(2, 3, 4 + fine, 3, dtype=torch.float64)
    for b in range(2):
        for r in range(3):
            samples = [*zip(sets["t"][b, r].tolist(), sets["values"][b, r], strict=True)]
            samples += zip(sets["t_fine"][b, r].tolist(), sets["values_fine"][b, r], strict=True)
            for i, (depth, value) in enumerate(sorted(samples, key=lambda sample: sample[0])):
                t[b, r, i], values[b, r, i] = depth, value
    settings = {"density_noise": noise, "background": background, "last_interval": 0.3, "return_weights": True}
    expected = composite(t, values, **settings)
    for name, actual in composite(**sets, **settings)._asdict().items():
        assert_close(actual, getattr(expected, name), name)


def test_second_set_need_not_be_sorted():
    sets = random_ray_sets(fine=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {**sets, "t_fine": sets["t_fine"][..., order], "values_fine": sets["values_fine"][..., order, :]}
    assert_close(composite(**shuffled).rgb, composite(**sets).rgb, "rgb", "exact")


needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="tensors are on the GPU")
ALL = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=needs_triton)]
)


@ALL
def test_one_unsorted_set_by_hand(backend):
    # HAND with its samples at t = 3, 1, 2: the same ray.
    order = torch.tensor([2, 0, 1])
    t, values = HAND_T[..., order].float().to(DEVICE), HAND_VALUES[..., order, :].float().to(DEVICE)
    result = ops.composite(t, values, activation="relu", last_interval=1.0, return_weights=True, backend=backend)
    assert_close(result.weights, ray([0.5, 0.25, 0.125]), "weights", "hand")
    assert_close(result.rgb, ray([15.5, 31, 46.5, 62]), "rgb", "hand")
    assert_close(result.depth, ray(1.375), "depth", "hand")


@ALL
@pytest.mark.parametrize("fine", [0, 5])
def test_sets_need_not_be_sorted(backend, fine):
    inputs = {name: x.float().to(DEVICE) for name, x in random_ray_sets(coarse=4, fine=fine, batch=2).items()}
    settings = {"density_noise": draw(2, 2, 4 + fine, seed=5).float().to(DEVICE), "return_weights": True}
    orders = {"": torch.tensor([3, 0, 2, 1]), "_fine": torch.tensor([3, 0, 4, 1, 2])}
    if not fine:
        del inputs["t_fine"], inputs["values_fine"], orders["_fine"]
    shuffled = dict(inputs)
    for end, order in orders.items():
        order = order.to(DEVICE)
        shuffled |= {f"t{end}": inputs[f"t{end}"][..., order], f"values{end}": inputs[f"values{end}"][:, :, order]}
    results = []
    for sets, t_sorted in ((inputs, True), (inputs, False), (shuffled, False)):
        sets = {name: x.clone().requires_grad_(name.startswith("values")) for name, x in sets.items()}
        result = ops.composite(**sets, **settings, t_sorted=t_sorted, backend=backend)
        leaves = {name: x for name, x in sets.items() if name.startswith("values")}
        gradients = torch.autograd.grad(result.rgb.square().sum() + result.depth.sum(), leaves.values())
        results.append((result._asdict(), dict(zip(leaves, gradients, strict=True))))
    (expected, expected_gradients), *rest = results
    for number, (actual, gradients) in enumerate(rest):
        for name in OUTPUTS:
            assert_close(actual[name], expected[name], f"{name} {number}", "exact")
        for end, order in orders.items():
            gradient = expected_gradients[f"values{end}"]
            gradient = gradient[:, :, order.to(DEVICE)] if number else gradient
            assert_close(gradients[f"values{end}"], gradient, f"gradient to values{end} {number}", "exact")


@ALL
def test_importance_samples_go_straight_to_composite(backend):
    # Drawn in any order, as published: what comes out is what sorted samples give.
    t = ops.sample_stratified(1, 2, 6, 1.0, 2.0, jitter=draw_uniform(1, 2, 6).float().to(DEVICE), backend=backend)
    raw, u = draw(1, 2, 6, seed=1).float().to(DEVICE), draw_uniform(1, 2, 7, seed=2).float().to(DEVICE)
    rgb = []
    for options in ({}, {"sorted": False}):
        t_fine = ops.sample_importance(t, raw, u, **options, backend=backend)
        values = torch.stack([t_fine, t_fine.sin()], dim=-1)  # what a sample is depends on its place alone
        result = ops.composite(t_fine, values, backend=backend)
        assert (result.weight_sum > 0).all()
        rgb.append(result.rgb)
    assert_close(rgb[1], rgb[0], "rgb")


def test_equal_depths_list_fine_first():
    # At t = 1: fine, then coarse. The fine sample's interval is zero, so the coarse one counts with its colour 1.
    settings = {"activation": "relu", "last_interval": 1.0, "return_weights": True}
    result = composite(ray([1.0]), ray([[1.0, LN2]]), ray([1.0]), ray([[10.0, LN2]]), **settings)
    assert_close(result.weights, ray([0.0, 0.5]), "weights", "hand")
    assert_close(result.rgb, ray([0.5]), "rgb", "hand")
    # Three pairs: 16 samples or fewer may be sorted by another algorithm than many, so also a long ray.
    for samples in (3, 64):
        t = torch.arange(samples, dtype=torch.float64)[None, None]
        coarse = torch.tensor([1.0, LN2], dtype=torch.float64).expand(1, 1, samples, 2)
        fine = torch.tensor([10.0, LN2], dtype=torch.float64).expand(1, 1, samples, 2)
        result = composite(t, coarse, t, fine, **settings)
        assert_close(result.weights[..., ::2], torch.zeros(1, 1, samples), f"fine weights of {samples}", "exact")
        assert_close(result.rgb[..., 0], result.weight_sum, f"rgb of {samples}")
        assert_close(result.weight_sum, ray(1 - 0.5**samples), f"weight_sum of {samples}", "hand")


def test_noise_is_that_of_the_sorted_samples():
    # Sorted: coarse (t = 1), fine (2), coarse (3). The noise opens the second alone: it is the fine one.
    noise = ray([0, LN2, 0])
    values, values_fine = ray([[1.0, 0.0], [100.0, 0.0]]), ray([[10.0, 0.0]])
    result = composite(
        ray([1.0, 3.0]), values, ray([2.0]), values_fine, density_noise=noise, activation="relu", last_interval=1.0
    )
    assert_close(result.rgb, ray([5.0]), "rgb", "hand")


def differentiable(**settings):
    """All five results, as a function of tensors."""
    return lambda **inputs: tuple(composite(**inputs, **settings, return_weights=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"last_interval": 0.4},
        {"softplus_beta": 3.0, "density_shift": 0.5, "last_back": True, "white_background": True},
        {"activation": "relu", "last_interval": 1e-3, "last_back": True},
    ],
)
def test_derivatives_of_one_set(settings):
    sets = random_ray_sets(coarse=4, colours=3)
    inputs = {"t": sets["t"], "values": sets["values"], "density_noise": draw(1, 2, 4, seed=7)}
    gradcheck(differentiable(**settings), inputs, "composite")
    gradgradcheck(differentiable(**settings), inputs, "composite")


def test_derivatives_of_two_sets():
    inputs = {
        **random_ray_sets(coarse=3, fine=2, colours=3),
        "density_noise": draw(1, 2, 5, seed=5),
        "background": draw(1, 2, 3, seed=6),
    }
    gradcheck(differentiable(last_interval=0.4, white_background=True), inputs, "composite")
    gradgradcheck(differentiable(last_interval=0.4, white_background=True), inputs, "composite")


def test_gradient_to_colours_is_the_weight():
    values = HAND_VALUES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        composite(HAND_T, values, activation="relu", last_interval=1.0).rgb[..., 1].sum(), values
    )
    assert_close(gradient[..., 1], ray([0.5, 0.25, 0.125]), "gradient to colour 1", "hand")
    assert_close(gradient[..., 0], ray([0.0, 0.0, 0.0]), "gradient to colour 0", "exact")
    # To densities: opacity a_i changes by (1 - a_i) = 1/2 per unit; rgb[1] by T_i c_i less what is behind, per unit of
    # transmittance: sample 0: 1/2 (2 - (0.5 * 20 + 0.25 * 200)); 1: 1/4 (20 - 0.5 * 200); 2: 1/8 * 200.
    assert_close(gradient[..., -1], ray([-29.0, -20.0, 25.0]), "gradient to densities", "hand")


def test_relu_kink_has_no_gradient():
    values = ray([[3.0, 0.0], [5.0, 0.0]]).requires_grad_()
    result = composite(ray([1.0, 2.0]), values, activation="relu")
    assert_close(result.weight_sum, ray(0.0), "weight_sum", "exact")
    (gradient,) = torch.autograd.grad(result.rgb.sum(), values)
    assert_close(gradient, torch.zeros(1, 1, 2, 2), "gradient at the kink", "exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("raw", [OPAQUE, -OPAQUE, 0.0])
def test_extreme_densities_have_finite_derivatives(raw, activation, dtype):
    t = draw_uniform(1, 2, 96, seed=1).sort(dim=-1).values.to(dtype).requires_grad_()
    values = draw(1, 2, 96, 4, seed=2).to(dtype)
    values[..., -1] = raw
    values[:, 1, ::2, -1] *= -1  # the second ray alternates
    values.requires_grad_()
    for name in ("rgb", "depth", "weight_sum", "final_transmittance"):
        y = getattr(composite(t, values, activation=activation, white_background=True), name)
        assert_finite(y, name)
        gradients = torch.autograd.grad(y.square().sum(), (t, values), create_graph=True, materialize_grads=True)
        for target, gradient in zip(("t", "values"), gradients, strict=True):
            assert_finite(gradient, f"gradient of {name} to {target}")
        penalty = sum(gradient.square().sum() for gradient in gradients)
        seconds = torch.autograd.grad(penalty, (t, values), materialize_grads=True)
        for target, second in zip(("t", "values"), seconds, strict=True):
            assert_finite(second, f"second derivative of {name} to {target}")


def test_opaque_ray_has_the_gradients_of_its_first_sample():
    values = torch.ones(1, 1, 96, 2)
    values[..., -1] = OPAQUE
    values.requires_grad_()
    t = torch.linspace(0.9, 1.1, 96)[None, None]
    (gradient,) = torch.autograd.grad(composite(t, values).rgb.sum(), values)
    expected = torch.zeros(1, 1, 96, 2)
    expected[0, 0, 0, 0] = 1
    assert_close(gradient, expected, "gradient to values")


@pytest.mark.parametrize(("batch", "rays"), [(0, 2), (2, 0)])
@pytest.mark.parametrize("fine", [None, 0, 3])
def test_no_rays(batch, rays, fine):
    sets = {"t": draw(batch, rays, 4), "values": draw(batch, rays, 4, 4).requires_grad_()}
    if fine is not None:
        sets |= {"t_fine": draw(batch, rays, fine), "values_fine": draw(batch, rays, fine, 4)}
    result = composite(**sets, last_back=True, white_background=True, return_weights=True)
    assert result.rgb.shape == (batch, rays, 3)
    assert result.weights.shape == (batch, rays, 4 + (fine or 0))
    for single in result[1:4]:
        assert single.shape == (batch, rays)
    (gradient,) = torch.autograd.grad(result.rgb.sum(), sets["values"])
    assert gradient.shape == (batch, rays, 4, 4)


def test_empty_second_set_changes_nothing():
    sets = random_ray_sets(fine=0)
    assert_close(composite(**sets).rgb, composite(sets["t"], sets["values"]).rgb, "rgb", "exact")


def test_layout_does_not_matter():
    inputs = {**random_ray_sets(batch=2), "density_noise": draw(2, 2, 7, seed=5), "background": draw(2, 2, 2, seed=6)}
    expected = composite(**inputs)
    for changed, x in inputs.items():
        for name, view in layouts(x):
            actual = composite(**{**inputs, changed: view})
            for field in expected._fields[:4]:
                assert_close(getattr(actual, field), getattr(expected, field), f"{field}, {changed}: {name}")


def test_float32():
    sets = random_ray_sets(coarse=48, fine=48, colours=3)
    expected = composite(**sets, return_weights=True)
    for name, actual in composite(**{k: x.float() for k, x in sets.items()}, return_weights=True)._asdict().items():
        assert actual.dtype == torch.float32
        assert_close(actual, getattr(expected, name), name)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_float32_derivatives(scale):
    # In units of the largest; at 1e3 most rays are opaque and transmittances underflow.
    sets = {name: x.float() for name, x in random_ray_sets(coarse=48, fine=48, colours=3, rays=20).items()}
    for x in (sets["values"], sets["values_fine"]):
        x[..., -1] *= scale
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = {name: x.to(dtype).requires_grad_(name.startswith("values")) for name, x in sets.items()}
        values = (inputs["values"], inputs["values_fine"])
        first = torch.autograd.grad(composite(**inputs).rgb.square().sum(), values, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), values)
        results.append([*first, *second])
    for order, (actual, expected) in enumerate(zip(*results, strict=True)):
        largest = expected.abs().max()
        assert_close(actual.double() / largest, expected / largest, f"derivative {order}", torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": draw(2, 4)}, ValueError, "t must have shape [B, R, S], got [2, 4]"),
        ({"t": torch.zeros(1, 2, 4, dtype=torch.int64)}, TypeError, "t must be floating point, got torch.int64"),
        ({"values": draw(1, 2, 3, 3)}, ValueError, "values must have shape [1, 2, 4, C+1], got [1, 2, 3, 3]"),
        ({"values": draw(1, 2, 4, 1)}, ValueError, "values must hold a sample with a colour and a density at least"),
        ({"t": draw(1, 2, 0), "values": draw(1, 2, 0, 3)}, ValueError, "values must hold a sample"),
        ({"values": None}, TypeError, "values must be a tensor, got NoneType"),
        ({"t_fine": None}, ValueError, "t_fine and values_fine must be given together"),
        ({"values_fine": None}, ValueError, "t_fine and values_fine must be given together"),
        ({"t_fine": draw(1, 3, 3)}, ValueError, "t_fine must have shape [1, 2, S_fine], got [1, 3, 3]"),
        ({"values_fine": draw(1, 2, 3, 4)}, ValueError, "values_fine must have shape [1, 2, 3, 3], got [1, 2, 3, 4]"),
        ({"values_fine": draw(1, 2, 2, 3)}, ValueError, "values_fine must have shape [1, 2, 3, 3], got [1, 2, 2, 3]"),
        ({"density_noise": draw(1, 2, 4)}, ValueError, "density_noise must have shape [1, 2, 7], got [1, 2, 4]"),
        ({"background": draw(1, 2, 3)}, ValueError, "background must have shape [1, 2, 2], got [1, 2, 3]"),
        ({"background": 1.0}, TypeError, "background must be a tensor, got float"),
        (
            {"background": torch.zeros(1, 2, 2, device="meta")},
            ValueError,
            "background must be on cpu as t is, got meta",
        ),
        ({"values": torch.zeros(1, 2, 4, 3).int()}, TypeError, "values must be floating point, got torch.int32"),
        ({"t_fine": torch.zeros(1, 2, 3, device="meta")}, ValueError, "t_fine must be on cpu as t is, got meta"),
        ({"activation": "exp"}, ValueError, "activation must be one of softplus, relu, got 'exp'"),
        ({"last_interval": -1e-3}, ValueError, "last_interval must be finite and not negative, got -0.001"),
        ({"last_interval": math.inf}, ValueError, "last_interval must be finite and not negative, got inf"),
        ({"last_interval": math.nan}, ValueError, "last_interval must be finite and not negative, got nan"),
        ({"last_interval": torch.ones(())}, ValueError, "last_interval must be finite and not negative, got 1.0"),
        ({"softplus_beta": 0.0}, ValueError, "softplus_beta must be finite and positive, got 0.0"),
        ({"softplus_beta": -1.0}, ValueError, "softplus_beta must be finite and positive, got -1.0"),
        ({"softplus_beta": math.inf}, ValueError, "softplus_beta must be finite and positive, got inf"),
        ({"softplus_beta": math.nan}, ValueError, "softplus_beta must be finite and positive, got nan"),
        (
            {"softplus_beta": 1e300, "t": draw(1, 2, 4).float()},
            ValueError,
            "softplus_beta must be finite in torch.float3",
        ),
        (
            {"density_shift": -1e39, "t": draw(1, 2, 4).float()},
            ValueError,
            "density_shift must be finite in torch.float3",
        ),
        ({"density_shift": math.nan}, ValueError, "density_shift must be a finite number, got nan"),
        ({"density_shift": -math.inf}, ValueError, "density_shift must be a finite number, got -inf"),
        ({"white_background": True}, ValueError, "values must hold at least 3 colours and a density (because white_b"),
        ({"noise_std": math.nan}, ValueError, "noise_std must be finite and not negative, got nan"),
        ({"noise_std": -1.0}, ValueError, "noise_std must be finite and not negative, got -1.0"),
        ({"noise_std": 1.0, "density_noise": draw(1, 2, 7)}, ValueError, "noise_std must be 0 where density_noise is"),
        (
            {"seed": torch.zeros(1, dtype=torch.int64)},
            ValueError,
            "seed must be None for a backend other than 'triton'",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=re.escape(f"composite: {message}")):
        composite(**{**random_ray_sets(), **change})


triton_composite = functools.partial(ops.composite, t_sorted=True, backend="triton")
OUTPUTS = ops.Composite._fields


def with_everything(coarse, fine, colours, rays=3, batch=1):
    """All inputs in fp32, on the device; some depths are equal."""
    inputs = random_ray_sets(coarse, fine, colours, batch, rays)
    if not fine:
        del inputs["t_fine"], inputs["values_fine"]
    elif min(coarse, fine) > 2:
        inputs["t_fine"][:, ::2, 1:3] = inputs["t"][:, ::2, 1:2]
        inputs["t_fine"] = inputs["t_fine"].sort(dim=-1).values
    inputs["density_noise"] = draw(batch, rays, coarse + fine, seed=5)
    inputs["background"] = draw(batch, rays, colours, seed=6)
    return {name: x.float().to(DEVICE) for name, x in inputs.items()}


def outputs_and_gradients(function, inputs, settings, *, outputs=OUTPUTS, dtype=None):
    """Everything that comes out, and the gradients to everything but t for seeded gradients to `outputs`."""
    inputs = {name: (x if dtype is None else x.to(dtype)).detach() for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if not name.startswith("t")}
    result = function(**inputs, **settings, return_weights=True)
    ys = [getattr(result, name) for name in outputs]
    grad_ys = [draw(*y.shape, seed=20 + i).float().to(y) for i, y in enumerate(ys)]
    gradients = torch.autograd.grad(ys, [*leaves.values()], grad_ys, materialize_grads=True)
    return {
        **result._asdict(),
        **{f"gradient to {name}": x for name, x in zip(leaves, gradients, strict=True)},
    }


def assert_errs_no_more(inputs, settings, what="", *, kernel=triton_composite, **options):
    actual = outputs_and_gradients(kernel, inputs, settings, **options)
    expected = outputs_and_gradients(composite, inputs, settings, **options)
    truth = outputs_and_gradients(composite, inputs, settings, dtype=torch.float64, **options)
    for name in actual:
        # Two exponentials and two divisions to a density, two exponentials to an opacity; two divisions to gradients.
        steps = 8 if "gradient" in name else 6
        more = roundings(approximations=steps if compiled.approximate() else 0)
        white = 1.0 if name == "rgb" and settings.get("white_background") else 0.0  # is added to what may be -1
        assert_error_within_reference(actual[name], expected[name], truth[name], f"{name} {what}", more, white)


SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"softplus_beta": 2.0, "density_shift": 0.5, "last_interval": 0.3},
        {"activation": "relu", "last_back": True},
        {"white_background": True, "last_back": True, "last_interval": 1e-3},
    ],
    ids=str,
)


@needs_triton
@SETTINGS
@pytest.mark.parametrize(
    ("coarse", "fine", "colours", "rays"), [(1, 0, 1, 1), (5, 0, 3, 20), (4, 7, 3, 3), (9, 1, 2, 5), (3, 2, 15, 2)]
)
def test_triton_errs_no_more_than_the_reference(poisoned, coarse, fine, colours, rays, settings):
    colours = max(colours, 3) if "white_background" in settings else colours
    assert_errs_no_more(with_everything(coarse, fine, colours, rays), settings)


@needs_triton
def test_triton_long_rays(poisoned):
    inputs = with_everything(48, 48, 3, rays=2, batch=2)
    assert_errs_no_more(inputs, {"last_interval": 0.1})


@needs_triton
@pytest.mark.parametrize("output", OUTPUTS)
def test_triton_gradient_from_one_output(poisoned, output):
    settings = {"white_background": True, "last_back": True, "last_interval": 0.3}
    assert_errs_no_more(with_everything(4, 3, 3), settings, f"from {output}", outputs=(output,))


@needs_triton
@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("raw", [OPAQUE, -OPAQUE, 30.0, 0.0])
def test_triton_extreme_densities(poisoned, raw, activation):
    inputs = with_everything(9, 5, 3, rays=2)
    del inputs["density_noise"]
    for name in ("values", "values_fine"):
        inputs[name][..., -1] = raw
        inputs[name][:, 1, ::2, -1] *= -1  # the second ray alternates
    assert_errs_no_more(inputs, {"activation": activation, "white_background": True})


@needs_triton
def test_triton_thin_media_keep_their_precision():
    values = torch.tensor([[[[1.0, 1e-7]]]], device=DEVICE)
    t = torch.ones(1, 1, 1, device=DEVICE)
    actual = triton_composite(t, values, activation="relu", last_interval=1.0).weight_sum
    assert_close(actual * 1e7, torch.ones(1, 1), "opacity, times 1e7")
    values[..., 1] = -25.0  # see test_last_interval_is_endless_by_default
    assert_close(triton_composite(t, values).weight_sum, ray(0.1296670), "weight_sum of a thin medium", torch.float32)


@needs_triton
def test_triton_ray_by_hand(poisoned):
    t, values = HAND_T.float().to(DEVICE), HAND_VALUES.float().to(DEVICE)
    result = triton_composite(t, values, activation="relu", last_interval=1.0, last_back=True, return_weights=True)
    by_hand = functools.partial(assert_close, tolerance=torch.float32 if compiled.approximate() else "hand")
    by_hand(result.weights, ray([0.5, 0.25, 0.25]), "weights")
    by_hand(result.rgb, ray([28, 56, 84, 112]), "rgb")
    by_hand(result.depth, ray(1.75), "depth")
    by_hand(result.weight_sum, ray(0.875), "weight_sum")
    by_hand(result.final_transmittance, ray(0.25), "final_transmittance")
    assert triton_composite(t, values).weights is None


@needs_triton
@pytest.mark.parametrize("samples", [1, 3, 9])
def test_triton_equal_depths_list_fine_first(poisoned, samples):
    t = torch.arange(samples, dtype=torch.float32, device=DEVICE)[None, None]
    coarse = torch.tensor([1.0, LN2], device=DEVICE).expand(1, 1, samples, 2)
    fine = torch.tensor([10.0, LN2], device=DEVICE).expand(1, 1, samples, 2)
    result = triton_composite(t, coarse, t, fine, activation="relu", last_interval=1.0, return_weights=True)
    assert_close(result.weights[..., ::2], torch.zeros(1, 1, samples), "fine weights", "exact")
    assert_close(result.rgb[..., 0], result.weight_sum, "rgb")
    assert_close(result.weight_sum, ray(1 - 0.5**samples), "weight_sum")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_half_values(poisoned, dtype):
    # The kernel computes in fp32: half values give the results of the same in fp32, and gradients rounded to theirs.
    inputs = with_everything(4, 3, 3)
    for name in ("values", "values_fine"):
        inputs[name] = inputs[name].to(dtype)
    actual = outputs_and_gradients(triton_composite, inputs, {})
    whole = {name: x.float() for name, x in inputs.items()}
    for name, expected in outputs_and_gradients(triton_composite, whole, {}).items():
        # (Triton's interpreter does not round to bf16, but cuts off.)
        assert_close(actual[name], expected, name, "exact" if actual[name].dtype == torch.float32 else None)


@needs_triton
def test_triton_takes_any_layout(poisoned):
    inputs, settings = with_everything(4, 3, 2, batch=2), {"last_interval": 0.3}
    expected = outputs_and_gradients(triton_composite, inputs, settings)
    for changed, x in inputs.items():
        for layout, view in layouts(x):
            actual = outputs_and_gradients(triton_composite, {**inputs, changed: view}, settings)
            for name, y in actual.items():
                assert_close(y, expected[name], f"{name}, {changed}: {layout}", "exact")


@needs_triton
def test_triton_reads_expanded_depths_in_place():
    from epigraf_fast.kernels import rays as kernels

    t = torch.arange(4.0, device=DEVICE).expand(2, 3, -1)
    assert kernels.rows(t).data_ptr() == t.data_ptr()
    assert kernels.rows(t).stride() == (0, 1)
    values = torch.zeros(1, 6, 4, 4, device=DEVICE)[:, 2:4]
    assert kernels.rows(values).data_ptr() == values.data_ptr()


@needs_triton
@pytest.mark.parametrize(("batch", "rays"), [(0, 2), (2, 0), (1, 2)])
@pytest.mark.parametrize("fine", [None, 0])
def test_triton_empty(poisoned, batch, rays, fine):
    inputs = {"t": draw_uniform(batch, rays, 4).sort().values, "values": draw(batch, rays, 4, 3)}
    inputs = {name: x.float().to(DEVICE) for name, x in inputs.items()}
    inputs["values"].requires_grad_()
    expected = composite(**inputs, return_weights=True)
    empty = {}
    if fine is not None:
        empty = {"t_fine": inputs["t"][..., :0], "values_fine": inputs["values"].detach()[:, :, :0].requires_grad_()}
    actual = triton_composite(**inputs, **empty, return_weights=True)
    for name in OUTPUTS:
        assert_close(getattr(actual, name), getattr(expected, name), name)
    leaves = [inputs["values"], *(x for x in empty.values() if x.requires_grad)]
    for leaf, gradient in zip(leaves, torch.autograd.grad(actual.rgb.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert_finite(gradient, "gradient")


@needs_triton
@pytest.mark.parametrize(
    "nan", [{"t": (3,)}, {"t_fine": (2,)}, {"t": (2, 3), "t_fine": (1, 2)}, {"t": (0, 1, 2, 3)}], ids=str
)
def test_triton_merges_nan_last(nan):
    inputs = with_everything(4, 3, 2, rays=2)
    for name, places in nan.items():
        inputs[name][..., list(places)] = torch.nan
    actual, expected = (function(**inputs, return_weights=True) for function in (triton_composite, composite))
    for name in OUTPUTS:
        assert_same_specials(getattr(actual, name), getattr(expected, name), name)


@needs_triton
def test_triton_shows_what_is_nan():
    inputs = with_everything(4, 3, 2, rays=2)
    expected = triton_composite(**inputs)
    for name in ("values", "values_fine", "t", "t_fine", "density_noise"):
        x = inputs[name].clone()
        x[0, 0, 1] = torch.nan
        result = triton_composite(**{**inputs, name: x}, t_sorted=False)
        for field in ("rgb", "depth", "weight_sum", "final_transmittance"):
            assert getattr(result, field)[0, 0].isnan().all(), f"{field} of a NaN in {name}"
        assert_close(result.rgb[0, 1], expected.rgb[0, 1], f"the ray beside a NaN in {name}", "exact")


@needs_triton
def test_triton_saves_its_inputs_alone():
    inputs = with_everything(4, 3, 2)
    saved = []

    def keep(x):
        saved.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        triton_composite(**inputs)
        values = inputs["values"].requires_grad_()
        with torch.no_grad():
            triton_composite(**inputs)
        assert not saved
        result = triton_composite(**inputs, return_weights=True)
    assert {*saved} == {x.data_ptr() for x in inputs.values()}
    assert len(saved) == len(inputs)
    (gradient,) = torch.autograd.grad(result.rgb.sum(), values)
    assert gradient.shape == values.shape


@needs_triton
def test_triton_has_no_second_derivative():
    inputs = with_everything(4, 3, 2)
    inputs["values"].requires_grad_()
    (gradient,) = torch.autograd.grad(triton_composite(**inputs).rgb.sum(), inputs["values"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'composite: .*second derivative.*backend="reference"'):
        gradient.sum().backward()


@needs_triton
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": draw(1, 2, 4)}, TypeError, 't must be float32 (because backend is "triton"), got torch.float64'),
        ({"t_fine": draw(1, 2, 3)}, TypeError, "t_fine must be float32"),
        ({"values": draw(1, 2, 4, 3)}, TypeError, "values must be float32 or float16 or bfloat16"),
        ({"values": torch.zeros(1, 2, 4, 3).half()}, TypeError, "values_fine must be float16"),
        (
            {"values": torch.zeros(1, 2, 4, 33), "values_fine": torch.zeros(1, 2, 3, 33)},
            ValueError,
            'values must hold at most 32 numbers a sample (because backend is "triton"), got 33',
        ),
        (
            {"t": torch.zeros(1, 2, 2046), "values": torch.zeros(1, 2, 2046, 3)},
            ValueError,
            't and t_fine must hold at most 2048 samples of 3 numbers together (because backend is "triton"), got 2049',
        ),
        ({"values": torch.zeros(1, 2, 4, 4)}, ValueError, "values_fine must have shape [1, 2, 3, 4], got [1, 2, 3, 3]"),
        (
            {"t_fine": torch.zeros(1, 2, 3, requires_grad=True)},
            NotImplementedError,
            'backend "triton" has no gradient to t_fine; use backend="reference", or detach t_fine',
        ),
    ],
)
def test_triton_errors(change, error, message):
    inputs = {**{name: x.float() for name, x in random_ray_sets().items()}, **change}
    with pytest.raises(error, match=re.escape(f"composite: {message}")):
        triton_composite(**{name: x.to(DEVICE) for name, x in inputs.items()})


def drawn_noise(rays, std, seed, **settings):
    """The noise of a single sample per ray, from the opacity 1 - exp(-(5 + noise)) that it leaves: [R]."""
    t, values = torch.zeros(1, rays, 1, device=DEVICE), torch.full((1, rays, 1, 2), 5.0, device=DEVICE)
    settings = {"activation": "relu", "last_interval": 0.1, "backend": "triton", **settings}
    result = ops.composite(t, values, noise_std=std, seed=torch.tensor([seed], device=DEVICE), **settings)
    return -torch.log1p(-result.weight_sum[0].double().cpu()) / 0.1 - 5


@needs_triton
def test_triton_noise_is_normal(poisoned):
    num, std = 4096, 0.75
    noise = drawn_noise(num, std, 3) / std
    assert abs(noise.mean().item()) < SIGMAS / num**0.5
    assert abs(noise.var().item() - 1) < SIGMAS * (2 / num) ** 0.5
    # Kolmogorov-Smirnov: mean 0.87 and standard deviation 0.26, in units of 1 / sqrt(number).
    cdf = torch.special.ndtr(noise.sort().values)
    distance = (cdf - (torch.arange(num, dtype=torch.float64) + 0.5) / num).abs().max().item()
    assert distance * num**0.5 < 0.87 + SIGMAS * 0.26
    assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1].item()) < SIGMAS / num**0.5
    assert_close(drawn_noise(7, std, 3), noise[:7] * std, "fewer rays", "exact")
    tensor = torch.tensor([std], device=DEVICE)
    assert_close(drawn_noise(7, tensor, 3), noise[:7] * std, "a tensor of one", "exact")
    assert not torch.isclose(drawn_noise(7, std, 4), noise[:7] * std).any()


@needs_triton
def test_triton_drawn_noise_has_the_gradients_of_noise_handed_in(poisoned):
    """Noise sits in the sum with the raw density: shifting that shifts the argument of the activation alike."""
    sets = {name: x.float().to(DEVICE) for name, x in random_ray_sets(colours=3, rays=5).items()}
    seed, settings = torch.tensor([3], device=DEVICE), {"last_interval": 0.2, "white_background": True}

    def run(density_noise=None, **options):
        inputs = {name: x.clone().requires_grad_(name.startswith("values")) for name, x in sets.items()}
        result = ops.composite(**inputs, density_noise=density_noise, **settings, **options, return_weights=True)
        total = result.rgb.square().sum() + result.depth.sum() + result.final_transmittance.sum()
        return result, torch.autograd.grad(total, (inputs["values"], inputs["values_fine"]))

    result, gradients = run(noise_std=0.5, seed=seed, backend="triton")
    again, same = run(noise_std=torch.tensor(0.5, device=DEVICE), seed=seed, backend="triton")
    for one, other in zip((*result, *gradients), (*again, *same), strict=True):
        assert_close(other, one, "a tensor of one", "exact")
    # The noise, solved for from the weights: alpha_i = w_i / T_i = 1 - exp(-interval_i softplus(raw_i + noise_i)).
    t, order = torch.cat([sets["t_fine"], sets["t"]], dim=-1).double().sort(dim=-1, stable=True)
    raw = torch.cat([sets["values_fine"], sets["values"]], dim=-2)[..., -1].double().gather(-1, order)
    intervals = torch.cat([t.diff(dim=-1), torch.full_like(t[..., :1], 0.2)], dim=-1)
    weights = result.weights.detach().double()
    T = 1 - torch.cat([torch.zeros_like(weights[..., :1]), weights.cumsum(dim=-1)[..., :-1]], dim=-1)
    density = -torch.log1p(-weights / T) / intervals
    noise = torch.log(torch.expm1(density)) - raw
    handed_in, expected = run(density_noise=noise.float(), backend="triton")
    for name in ("rgb", "depth", "final_transmittance"):
        assert_close(getattr(result, name), getattr(handed_in, name), name, torch.float16)
    for name, one, other in zip(("values", "values_fine"), gradients, expected, strict=True):
        assert_close(one, other, f"gradient to {name}", torch.float16)


def test_reference_noise_is_torchs():
    sets = random_ray_sets()
    for std in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        torch.manual_seed(3)
        noise = 0.5 * torch.randn(1, 2, 7, dtype=torch.float64)
        torch.manual_seed(3)
        assert_close(composite(**sets, noise_std=std).rgb, composite(**sets, density_noise=noise).rgb, "rgb", "exact")


@needs_triton
def test_triton_gradients_of_both_sets_lie_side_by_side():
    sets = {name: x.float().to(DEVICE) for name, x in random_ray_sets().items()}
    values = sets["values"].requires_grad_(), sets["values_fine"].requires_grad_()
    coarse, fine = torch.autograd.grad(triton_composite(**sets).rgb.sum(), values)
    assert coarse.stride() == fine.stride() == (2 * 7 * 3, 7 * 3, 3, 1)
    assert fine.data_ptr() - coarse.data_ptr() == 4 * 4 * 3


cpu_composite = functools.partial(ops.composite, t_sorted=True, backend="cpu")
on_the_cpu = functools.partial(assert_errs_no_more, kernel=cpu_composite)


@needs_cpu
@SETTINGS
@pytest.mark.parametrize(
    ("coarse", "fine", "colours", "rays"),
    [(1, 0, 1, 1), (5, 0, 3, 20), (4, 7, 3, 3), (9, 1, 2, 5), (3, 2, 15, 2), (12, 12, 3, 200), (1500, 1300, 3, 1)],
)
def test_cpu_errs_no_more_than_the_reference(cpu_level, coarse, fine, colours, rays, settings):
    colours = max(colours, 3) if "white_background" in settings else colours
    inputs = with_everything(coarse, fine, colours, rays)
    on_the_cpu(inputs, settings)
    assert "Composite" in str(cpu_composite(**{**inputs, "values": inputs["values"].requires_grad_()}).rgb.grad_fn)


@needs_cpu
@SETTINGS
def test_cpu_in_double_precision(cpu_level, settings):
    inputs = with_everything(7, 5, 3, rays=4, batch=2)
    actual, expected = (
        outputs_and_gradients(function, inputs, settings, dtype=torch.float64)
        for function in (cpu_composite, composite)
    )
    for name, y in actual.items():
        assert_close(y, expected[name], name)


@needs_cpu
@pytest.mark.parametrize("output", OUTPUTS)
def test_cpu_gradient_from_one_output(cpu_level, output):
    settings = {"white_background": True, "last_back": True, "last_interval": 0.3}
    on_the_cpu(with_everything(4, 3, 3), settings, f"from {output}", outputs=(output,))


@needs_cpu
@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("raw", [OPAQUE, -OPAQUE, 30.0, 0.0])
def test_cpu_extreme_densities(cpu_level, raw, activation):
    inputs = with_everything(9, 5, 3, rays=2)
    del inputs["density_noise"]
    for name in ("values", "values_fine"):
        inputs[name][..., -1] = raw
        inputs[name][:, 1, ::2, -1] *= -1  # the second ray alternates
    on_the_cpu(inputs, {"activation": activation, "white_background": True})


@needs_cpu
def test_cpu_large_densities_at_equal_depths(cpu_level):
    """Where beta times a density is no number of fp32's any more, the density is."""
    values = torch.ones(1, 1, 3, 4)
    values[..., -1] = 1e37
    t = torch.tensor([[[1.0, 1.0, 2.0]]])
    results = [
        ops.composite(t, values, softplus_beta=50.0, last_interval=0.0, backend=name) for name in ("cpu", "reference")
    ]
    for name in OUTPUTS[:4]:
        assert_close(getattr(results[0], name), getattr(results[1], name), name)


@needs_cpu
def test_cpu_threads_agree(cpu_level, threads):
    inputs = with_everything(12, 12, 3, rays=300, batch=2)
    threads(1)
    expected = outputs_and_gradients(cpu_composite, inputs, {})
    threads(3)
    for name, actual in outputs_and_gradients(cpu_composite, inputs, {}).items():
        assert_close(actual, expected[name], f"{name} by three threads", "exact")


@needs_cpu
def test_cpu_takes_any_layout(cpu_level):
    inputs, settings = with_everything(4, 3, 2, batch=2), {"last_interval": 0.3}
    expected = outputs_and_gradients(cpu_composite, inputs, settings)
    for changed, x in inputs.items():
        for layout, view in layouts(x):
            actual = outputs_and_gradients(cpu_composite, {**inputs, changed: view}, settings)
            for name, y in actual.items():
                assert_close(y, expected[name], f"{name}, {changed}: {layout}", "exact")


@needs_cpu
@pytest.mark.parametrize(
    "nan", [{"t": (3,)}, {"t_fine": (2,)}, {"t": (2, 3), "t_fine": (1, 2)}, {"t": (0, 1, 2, 3)}], ids=str
)
def test_cpu_merges_nan_last(cpu_level, nan):
    inputs = with_everything(4, 3, 2, rays=2)
    for name, places in nan.items():
        inputs[name][..., list(places)] = torch.nan
    actual, expected = (outputs_and_gradients(function, inputs, {}) for function in (cpu_composite, composite))
    for name in OUTPUTS:
        assert_same_specials(actual[name], expected[name], name)


@needs_cpu
@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_cpu_shows_what_is_not_finite(cpu_level, special, activation):
    for name in ("values", "values_fine", "density_noise", "background"):
        for channel in (0, -1):
            inputs = with_everything(4, 3, 2, rays=2)
            inputs[name][0, 0, ..., channel] = special
            settings = {"activation": activation, "last_interval": 0.3}
            actual, expected = (outputs_and_gradients(f, inputs, settings) for f in (cpu_composite, composite))
            for what in OUTPUTS:
                assert_same_specials(actual[what], expected[what], f"{what}, {special} in {name}")
            for what in actual:  # the ray beside it
                assert_close(actual[what][0, 1], expected[what][0, 1], f"{what}, {special} in {name}")


@needs_cpu
@pytest.mark.parametrize(("batch", "rays"), [(0, 2), (2, 0), (1, 2)])
@pytest.mark.parametrize("fine", [None, 0])
def test_cpu_empty(cpu_level, batch, rays, fine):
    inputs = {"t": draw_uniform(batch, rays, 4).sort().values, "values": draw(batch, rays, 4, 3)}
    if fine is not None:
        inputs |= {"t_fine": inputs["t"][..., :0], "values_fine": inputs["values"][:, :, :0]}
    actual, expected = (outputs_and_gradients(f, inputs, {}) for f in (cpu_composite, composite))
    for name, y in actual.items():
        assert_close(y, expected[name], name)


@needs_cpu
def test_cpu_draws_the_noise_of_the_reference(cpu_level):
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(3)
        results.append(ops.composite(**random_ray_sets(), noise_std=0.5, backend=backend).rgb)
    assert_close(*results, "rgb")


@needs_cpu
def test_cpu_is_the_reference_where_t_has_a_gradient():
    inputs = random_ray_sets()
    inputs["t_fine"].requires_grad_()
    results = [ops.composite(**inputs, backend=backend).rgb for backend in ("cpu", "reference")]
    assert_close(*results, "rgb", "exact")
    gradients = [torch.autograd.grad(y.square().sum(), inputs["t_fine"])[0] for y in results]
    assert_close(*gradients, "gradient to t_fine", "exact")


@needs_cpu
def test_cpu_gradients_of_both_sets_lie_side_by_side(cpu_level):
    sets = random_ray_sets()
    values = sets["values"].requires_grad_(), sets["values_fine"].requires_grad_()
    coarse, fine = torch.autograd.grad(cpu_composite(**sets).rgb.sum(), values)
    assert coarse.stride() == fine.stride() == (2 * 7 * 3, 7 * 3, 3, 1)
    assert fine.data_ptr() - coarse.data_ptr() == 8 * 4 * 3


@needs_cpu
def test_cpu_has_no_second_derivative(cpu_level):
    inputs = with_everything(4, 3, 2)
    inputs["values"].requires_grad_()
    (gradient,) = torch.autograd.grad(cpu_composite(**inputs).rgb.sum(), inputs["values"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'backend "cpu" has no second derivative; use backend="reference"'):
        gradient.sum().backward()


@needs_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": 0}, "t must not be a null pointer"),
        ({"values": 6}, "values must be aligned to its elements of 4 bytes, got 6"),
        ({"t_fine": 0}, "t_fine must not be a null pointer"),
        ({"rgb": 0}, "rgb must not be a null pointer"),
        ({"dtype": 1}, "dtype must be that of fp32 or fp64"),
        ({"rays": -1}, "rays must be at least 0"),
        ({"coarse": 0}, "coarse must be at least 1"),
        ({"channels": 1}, "channels must be at least 2"),
        ({"channels": 3, "white_background": True}, "channels must be at least 4"),
        ({"rays": 1 << 47}, "colours must be at most 2^48"),
        ({"softplus_beta": 0.0}, "softplus_beta must be positive"),
        ({"last_interval": -1.0}, "last_interval must not be negative"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_binding_refuses_what_cannot_be_right(change, message, cpu_level):
    from epigraf_fast import _C

    inputs, rgb, single = with_everything(4, 3, 3, rays=1), torch.empty(3), torch.empty(3)
    arguments = {name: inputs[name].data_ptr() for name in ("t", "values", "t_fine", "values_fine")}
    arguments |= {"noise": 0, "background": 0, "rgb": rgb.data_ptr()}
    arguments |= {name: single.data_ptr() + 4 * i for i, name in enumerate(("depth", "weight_sum", "transmittance"))}
    arguments |= {"weights": 0, "dtype": 0, "rays": 1, "coarse": 4, "fine": 3, "channels": 4, "relu": False}
    arguments |= {"softplus_beta": 1.0, "density_shift": 0.0, "last_interval": 1.0}
    arguments |= {"last_back": False, "white_background": False, "threads": 1}
    _C.composite_fwd_cpu(*arguments.values())
    sets = {name: inputs[name] for name in ("t", "values", "t_fine", "values_fine")}
    assert_close(rgb, composite(**sets, last_interval=1.0).rgb[0, 0], "rgb")
    with pytest.raises(ValueError, match=re.escape(f"composite_fwd: {message}")):
        _C.composite_fwd_cpu(*{**arguments, **change}.values())
