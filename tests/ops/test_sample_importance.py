"""sample_importance and its inversion: the reference against method.md 5 in plain Python and against the density.

The Triton kernels against the reference: in Triton's interpreter and compiled, or on the GPU where there is one.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np
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
    layouts,
)
from epigraf_fast import ops
from epigraf_fast.reference.sample_importance import invert_cdf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = compiled.on_triton()

sample_importance = functools.partial(ops.sample_importance, sorted=False, backend="reference")
sample_stratified = functools.partial(ops.sample_stratified, backend="reference")


def test_stratified_t_by_hand():
    # Depths 1, 2, 3, 4; midpoints 1.5, 2.5, 3.5.
    jitter = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    expected = [[1, 1.5, 2.5, 3.5], [1.25, 2, 3, 3.75], [1.5, 2.5, 3.5, 4]]
    assert_close(sample_stratified(1, 3, 4, 1.0, 4.0, jitter=jitter[None]), [expected], "t")


def test_stratified_t_stays_in_its_strata():
    t = sample_stratified(3, 100, 9, 6.0, 10.0, jitter=draw_uniform(3, 100, 9, seed=1))
    assert (t.diff(dim=-1) >= 0).all()
    assert t.min() >= 6
    assert t.max() <= 10
    ends = torch.tensor([6, *(6.25 + 0.5 * i for i in range(8)), 10.0], dtype=torch.float64)
    assert (t >= ends[:-1]).all()
    assert (t <= ends[1:]).all()


def literal_inversion(bins, weights, u):
    """One ray, one number after the other."""
    pdf = [w + 1e-5 for w in weights]
    cdf = [0.0]
    for p in pdf:
        cdf.append(cdf[-1] + p / sum(pdf))
    samples = []
    for x in u:
        first = 0
        while first < len(cdf) and cdf[first] < x:
            first += 1
        lower, upper = max(first - 1, 0), min(first, len(weights))
        d = cdf[upper] - cdf[lower]
        if d < 1e-5:
            d = 1.0
        samples.append(bins[lower] + (x - cdf[lower]) / d * (bins[upper] - bins[lower]))
    return samples


def literal_importance(t, raw, u, activation="softplus", softplus_beta=1.0, density_shift=0.0):
    """One ray. The last interval sets the last weight only, and that one is dropped."""
    weights, transmittance = [], 1.0
    for i in range(len(t)):
        x = raw[i] + density_shift
        density = max(x, 0.0) if activation == "relu" else math.log(1 + math.exp(softplus_beta * x)) / softplus_beta
        interval = t[i + 1] - t[i] if i + 1 < len(t) else 1e10
        opacity = 1 - math.exp(-interval * density)
        weights.append(opacity * transmittance)
        transmittance *= 1 - opacity + 1e-10
    bins = [(t[i] + t[i + 1]) / 2 for i in range(len(t) - 1)]
    return literal_inversion(bins, [w + 1e-5 for w in weights][1:-1], u)


def rays(batch=2, rays=3, samples=6, scale=3.0):
    return {
        "t": draw_uniform(batch, rays, samples, seed=1).sort(dim=-1).values + 1,
        "raw_density": scale * draw(batch, rays, samples, seed=2),
        "u": draw_uniform(batch, rays, 9, seed=3),
    }


def as_tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_inversion_by_hand():
    # The two bins have probability 1/4 and 3/4 (the weights and the floor of 1e-5 add up to 1 and 3).
    # u = 1/8: half-way through the first bin. 1/4: its end. 5/8: half-way through the second. 0 and 1: both ends.
    samples = invert_cdf(as_tensor([0, 1, 3]), as_tensor([1 - 1e-5, 3 - 1e-5]), as_tensor([0.125, 0.25, 0.625, 0, 1]))
    assert_close(samples, [0.5, 1.0, 2.0, 0.0, 3.0], "samples")


def test_slots_narrower_than_1e_5_by_hand():
    # The middle bin has 1e-5 / (2 + 3e-5) = 5e-6 of the probability, centred at u = 1/2: d counts as 1 there, so the
    # sample lies (u - cdf) / 1 = 2.5e-6 bin widths (of 10) behind the bin's start, not 0.5.
    samples = invert_cdf(as_tensor([0, 1, 11, 12]), as_tensor([1, 0, 1]), as_tensor([0.5]))
    assert_close(samples, [1 + 25e-6 / (1 + 1.5e-5)], "sample in an empty bin")


def test_first_knot_is_left_sided_by_hand():
    # Probabilities 1 - 2^-20 and 2^-20, exact in binary. u = 1 is the last knot itself, so it belongs to the second
    # bin, which is narrower than 1e-5: 2^-20 of its width of 2 behind its start at 1, not at its end 3.
    samples = invert_cdf(as_tensor([0, 1, 3]), as_tensor([2**20 - 1 - 1e-5, 1 - 1e-5]), as_tensor([1.0, 1 - 2**-20]))
    assert_close(samples, [1 + 2 * 2**-20, 1.0], "samples at the knots")


def test_empty_ray_is_sampled_evenly():
    # All weights equal (the floors): even between the first and the last midpoint, 0.5 and 2.5.
    t, u = as_tensor([[[0, 1, 2, 3]]]), as_tensor([[[0, 0.25, 0.5, 1]]])
    samples = sample_importance(t, torch.full((1, 1, 4), -1.0, dtype=torch.float64), u, activation="relu")
    assert_close(samples, [[[0.5, 1.0, 1.5, 2.5]]], "samples")


def test_opaque_sample_by_hand():
    # Weights 0, 1, 0, 0: the middle ones are 1 and 0, and 1 + 2e-5 and 2e-5 with both floors. The bin of the opaque
    # sample, 0.5 to 1.5, gets p = (1 + 2e-5) / (1 + 4e-5): u = 1/2 is at 0.5 + 0.5 / p = 1.00001 to first order, where
    # one floor alone would give half of that excess.
    t, raw = as_tensor([[[0, 1, 2, 3]]]), as_tensor([[[-1, 1e4, -1, -1]]])
    samples = sample_importance(t, raw, as_tensor([[[0.5, 0.0]]]), activation="relu")
    assert_close(samples, [[[0.5 + 0.5 * (1 + 4e-5) / (1 + 2e-5), 0.5]]], "samples")
    assert abs(samples[0, 0, 0].item() - 1.00001) < 1e-9


def test_first_and_last_weight_are_dropped():
    for raw in ([1e4, -1, -1, -1, -1], [-1, -1, -1, -1, 1e4]):
        samples = sample_importance(
            as_tensor([[[0, 1, 2, 3, 4]]]), as_tensor([[raw]]), as_tensor([[[0, 0.5, 1]]]), activation="relu"
        )
        assert_close(samples, [[[0.5, 2.0, 3.5]]], f"samples of {raw}")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "relu"},
        {"softplus_beta": 4.0},
        {"density_shift": -1.5},
        {"activation": "relu", "density_shift": 0.7},
        {"last_interval": 1e-3},
    ],
)
@pytest.mark.parametrize("samples", [3, 6, 17])
def test_equals_the_literal_formula(settings, samples):
    inputs = rays(samples=samples)
    actual = sample_importance(**inputs, **settings)
    literal_settings = {name: value for name, value in settings.items() if name != "last_interval"}
    for b in range(2):
        for r in range(3):
            ray = [inputs[name][b, r].tolist() for name in ("t", "raw_density", "u")]
            expected = literal_importance(*ray, **literal_settings)
            assert_close(actual[b, r], expected, f"image {b}, ray {r}")


@pytest.mark.parametrize("bins", [1, 2, 7])
def test_inversion_equals_the_literal_formula(bins):
    edges = draw(3, bins + 1, seed=1).sort(dim=-1).values
    weights = draw_uniform(3, bins, seed=2) ** 8  # some are next to nothing
    weights[:, -1] = 1  # else u = 1 falls into the last bin or behind it as the sum rounds
    u = torch.cat([draw_uniform(3, 20, seed=3), as_tensor([0, 1]).expand(3, 2)], dim=-1)
    actual = invert_cdf(edges, weights, u)
    for i in range(3):
        expected = literal_inversion(edges[i].tolist(), weights[i].tolist(), u[i].tolist())
        assert_close(actual[i], expected, f"row {i}")
        assert_close(invert_cdf(edges[i], weights[i], u[i]), actual[i], f"row {i} alone")


def test_even_u_is_deterministic_and_reaches_both_ends():
    inputs = rays(samples=6)
    inputs["u"] = (torch.arange(6, dtype=torch.float64) / 5).expand(2, 3, 6)
    state = torch.get_rng_state()
    samples = sample_importance(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(sample_importance(**inputs), samples, "second call", "exact")
    midpoints = (inputs["t"][..., 1:] + inputs["t"][..., :-1]) / 2
    assert_close(samples[..., 0], midpoints[..., 0], "u = 0")
    assert_close(samples[..., -1], midpoints[..., -1], "u = 1")
    assert (samples.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_samples_lie_between_the_midpoints(scale, dtype):
    t = draw_uniform(4, 50, 48, seed=1).sort(dim=-1).values.to(dtype)
    u = torch.cat([draw_uniform(4, 50, 62, seed=3), torch.tensor([0.0, 1.0]).expand(4, 50, 2)], dim=-1).to(dtype)
    samples = sample_importance(t, (scale * draw(4, 50, 48, seed=2)).to(dtype), u)
    assert samples.dtype == dtype
    assert_finite(samples, "samples")
    midpoints = (t[..., 1:] + t[..., :-1]) / 2
    slack = 4 * torch.finfo(dtype).eps  # the interpolation rounds
    assert (samples >= midpoints[..., :1] - slack).all()
    assert (samples <= midpoints[..., -1:] + slack).all()


def test_samples_follow_the_density():
    bins, weights = as_tensor([0, 0.5, 0.6, 2, 3, 3.5]), as_tensor([0.1, 2.0, 0.5, 0.0, 1.0])
    num = 20000
    samples = invert_cdf(bins, weights, draw_uniform(num, seed=5)).sort().values.numpy()
    cdf = np.concatenate([[0], np.cumsum(weights.numpy() / 3.6)])  # piecewise linear between the bins
    # Kolmogorov-Smirnov: sqrt(num) times the largest distance has mean 0.87 and standard deviation 0.26.
    distance = np.abs(np.interp(samples, bins.numpy(), cdf) - (np.arange(num) + 0.5) / num).max()
    assert distance * num**0.5 < 0.87 + SIGMAS * 0.26
    counts = np.histogram(samples, bins.numpy())[0]
    probabilities = np.diff(cdf)
    spread = np.sqrt(num * probabilities * (1 - probabilities))
    assert (np.abs(counts - num * probabilities) <= SIGMAS * spread + 1).all()


def test_no_gradient():
    inputs = {name: x.requires_grad_() for name, x in rays().items()}
    assert not sample_importance(**inputs).requires_grad
    bins, weights, u = (draw_uniform(n).sort().values.requires_grad_() for n in (4, 3, 5))
    assert not invert_cdf(bins, weights, u).requires_grad


def test_without_u_torch_draws_as_many_as_there_are_samples():
    inputs = {name: x for name, x in rays().items() if name != "u"}
    torch.manual_seed(7)
    samples = sample_importance(**inputs)
    torch.manual_seed(7)
    u = torch.rand(2, 3, 6, dtype=torch.float64)
    assert_close(samples, sample_importance(**inputs, u=u), "samples", "exact")
    torch.manual_seed(7)
    sample_importance(**inputs, u=u)
    assert_close(torch.rand(2, 3, 6, dtype=torch.float64), u, "the generator, not used when u is given", "exact")


def test_samples_says_how_many_are_drawn():
    inputs = {name: x for name, x in rays().items() if name != "u"}
    torch.manual_seed(7)
    samples = sample_importance(**inputs, samples=9)
    torch.manual_seed(7)
    u = torch.rand(2, 3, 9, dtype=torch.float64)
    assert_close(samples, sample_importance(**inputs, u=u), "samples", "exact")


needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="tensors are on the GPU")
ALL = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=needs_triton)]
)


@ALL
def test_two_slots_by_hand(backend):
    """As above, of samples with weights of 0.2 and 0.6, floors included, between two that are dropped."""
    first, second = 0.2 - 2e-5, 0.6 - 2e-5
    t = torch.tensor([[[-0.5, 0.5, 1.5, 4.5]]], device=DEVICE)  # midpoints 0, 1, 3; intervals 1, 1, 3
    raw = torch.tensor([[[-1, -math.log(1 - first), -math.log(1 - second / (1 - first)) / 3, 1]]], device=DEVICE)
    u = torch.tensor([[[0.125, 0.25, 0.625, 0, 1]]], device=DEVICE)
    samples = ops.sample_importance(t, raw, u, activation="relu", sorted=False, backend=backend)
    assert_close(samples, [[[0.5, 1.0, 2.0, 0.0, 3.0]]], "samples")


@ALL
def test_sorted_by_default(backend):
    inputs = {name: x.float().to(DEVICE) for name, x in rays().items()}
    expected = ops.sample_importance(**inputs, sorted=False, backend=backend).sort(dim=-1).values
    actual = ops.sample_importance(**inputs, backend=backend)
    assert (actual.diff(dim=-1) >= 0).all()
    assert_close(actual, expected, "samples", "exact" if backend == "reference" else None)
    drawn = ops.sample_importance(inputs["t"], inputs["raw_density"], backend=backend)
    assert (drawn.diff(dim=-1) >= 0).all()


@ALL
@pytest.mark.parametrize("sorted", [False, True])
def test_unsorted_t_is_sorted_with_its_densities(backend, sorted):
    inputs = {name: x.float().to(DEVICE) for name, x in rays().items()}
    expected = ops.sample_importance(**inputs, sorted=sorted, t_sorted=True, backend=backend)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
    for name in ("t", "raw_density"):
        inputs[name] = inputs[name][..., order]
    assert_close(ops.sample_importance(**inputs, sorted=sorted, backend=backend), expected, "samples", "exact")


def test_result_is_in_the_order_of_u():
    inputs, order = rays(), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    expected = sample_importance(**inputs)[..., order]
    inputs["u"] = inputs["u"][..., order]
    assert_close(sample_importance(**inputs), expected, "samples", "exact")


@pytest.mark.parametrize(("batch", "rays_", "fine"), [(0, 2, 3), (2, 0, 3), (2, 2, 0), (1, 1, 1)])
def test_empty_and_single(batch, rays_, fine):
    t = draw_uniform(batch, rays_, 4).sort(dim=-1).values
    samples = sample_importance(t, draw(batch, rays_, 4), draw_uniform(batch, rays_, fine))
    assert samples.shape == (batch, rays_, fine)
    assert_finite(samples, "samples")


def test_layout_does_not_matter():
    inputs = rays()
    expected = sample_importance(**inputs)
    for changed, x in inputs.items():
        for name, view in layouts(x):
            assert_close(sample_importance(**{**inputs, changed: view}), expected, f"{changed}: {name}")


def test_result_has_the_dtype_of_the_bins():
    bins, weights, u = as_tensor([0, 1, 3]), as_tensor([1, 3]), as_tensor([0.2, 0.7])
    expected = invert_cdf(bins, weights, u)
    for dtypes in [(torch.float32,) * 3, (torch.float32, torch.float64, torch.float32)]:
        actual = invert_cdf(*(x.to(dtype) for x, dtype in zip((bins, weights, u), dtypes, strict=True)))
        assert actual.dtype == torch.float32
        assert_close(actual, expected, f"samples of {dtypes}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": draw(2, 6)}, ValueError, "t must have shape [B, R, S], got [2, 6]"),
        ({"t": None}, TypeError, "t must be a tensor, got NoneType"),
        ({"raw_density": draw(2, 3, 5)}, ValueError, "raw_density must have shape [2, 3, 6], got [2, 3, 5]"),
        ({"t": draw(2, 3, 2), "raw_density": draw(2, 3, 2)}, ValueError, "t must hold at least 3 samples"),
        ({"u": draw(2, 4, 9)}, ValueError, "u must have shape [2, 3, K], got [2, 4, 9]"),
        ({"u": torch.zeros(2, 3, 9, dtype=torch.int64)}, TypeError, "u must be floating point, got torch.int64"),
        ({"u": torch.zeros(2, 3, 9, device="meta")}, ValueError, "u must be on cpu as t is, got meta"),
        ({"raw_density": torch.zeros(2, 3, 6).int()}, TypeError, "raw_density must be floating point, got torch.int32"),
        ({"raw_density": torch.zeros(2, 3, 6, device="meta")}, ValueError, "raw_density must be on cpu as t is, got m"),
        ({"activation": "exp"}, ValueError, "activation must be one of softplus, relu, got 'exp'"),
        ({"samples": 9}, ValueError, "samples must be None where u is given"),
        ({"noise_std": -1.0}, ValueError, "noise_std must be finite and not negative, got -1.0"),
        (
            {"noise_std": torch.zeros(2)},
            ValueError,
            "noise_std must be a number or a tensor of one on cpu, got shape [2]",
        ),
        ({"u": None, "samples": -1}, ValueError, "samples must not be negative, got -1"),
        ({"u": None, "seed": torch.zeros(1, dtype=torch.int64)}, ValueError, "seed must be None for a backend other"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=re.escape(f"sample_importance: {message}")):
        sample_importance(**{**rays(), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, batch and rays 0, got 0, 2, 3"),
        ({"batch": -1}, ValueError, "samples must be at least 1, batch and rays 0, got 4, -1, 3"),
        ({"ray_end": 1.0}, ValueError, "ray_end must exceed ray_start, both finite, got 1.0 and 1.0"),
        ({"ray_start": -math.inf}, ValueError, "ray_end must exceed ray_start, both finite, got -inf"),
        ({"jitter": draw(2, 3, 5)}, ValueError, "jitter must have shape [2, 3, 4], got [2, 3, 5]"),
        ({"jitter": torch.zeros(2, 3, 4).int()}, TypeError, "jitter must be floating point, got torch.int32"),
        ({"jitter": 0.5}, TypeError, "jitter must be a tensor, got float"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, ValueError, "seed must be None for a backend other"),
    ],
)
def test_stratified_errors(change, error, message):
    arguments = {"batch": 2, "rays": 3, "samples": 4, "ray_start": 1.0, "ray_end": 2.0, **change}
    with pytest.raises(error, match=re.escape(f"sample_stratified: {message}")):
        sample_stratified(**arguments)


def test_stratified_draws_and_devices():
    torch.manual_seed(3)
    jitter = torch.rand(2, 3, 4, dtype=torch.float64)
    torch.manual_seed(3)
    actual = sample_stratified(2, 3, 4, 1.0, 2.0, dtype=torch.float64)
    assert_close(actual, sample_stratified(2, 3, 4, 1.0, 2.0, jitter=jitter), "torch's generator", "exact")
    even = sample_stratified(2, 3, 4, 1.0, 2.5, stochastic=False, device="cpu")
    assert even.dtype == torch.float32
    assert_close(even, torch.tensor([1.0, 1.5, 2.0, 2.5]).expand(2, 3, 4), "even", "hand")
    assert sample_stratified(1, 1, 1, 1.0, 2.0, stochastic=False).item() == 1.0


def test_even_u_and_noise_are_those_handed_in():
    inputs = rays()
    even = torch.linspace(0, 1, 4, dtype=torch.float64).expand(2, 3, 4)
    t, raw = inputs["t"], inputs["raw_density"]
    expected = sample_importance(t, raw, even)
    assert_close(sample_importance(t, raw, samples=4, stochastic=False), expected, "even", "exact")
    for std in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        torch.manual_seed(3)
        noise, u = torch.randn_like(raw), torch.rand(2, 3, 4, dtype=torch.float64)
        torch.manual_seed(3)
        actual = sample_importance(t, raw, samples=4, noise_std=std)
        assert_close(actual, sample_importance(t, raw + 0.5 * noise, u), f"noise of {std}", "exact")


triton_importance = functools.partial(ops.sample_importance, sorted=False, backend="triton")
triton_stratified = functools.partial(ops.sample_stratified, backend="triton", device=DEVICE)


def triton_rays(batch=1, rays_=3, samples=6, fine=9):
    inputs = {**rays(batch, rays_, samples), "u": draw_uniform(batch, rays_, fine, seed=3)}
    return {name: x.float().to(DEVICE) for name, x in inputs.items()}


def assert_errs_no_more(kernel, reference, inputs, what, **settings):
    truth = reference(**{name: x.double() for name, x in inputs.items()}, **settings)
    assert_error_within_reference(kernel(**inputs, **settings), reference(**inputs, **settings), truth, what)


SETTINGS = pytest.mark.parametrize(
    "settings",
    [{}, {"activation": "relu", "density_shift": 0.7}, {"softplus_beta": 4.0, "last_interval": 1e-3}],
    ids=str,
)


@needs_triton
@SETTINGS
@pytest.mark.parametrize(
    ("samples", "fine", "rays_"),
    [(3, 1, 1), (6, 9, 20), (17, 33, 2), (48, 48, 2), (129, 9, 3), (130, 9, 3), (302, 9, 3), (6, 140, 3)],
)
def test_triton_errs_no_more_than_the_reference(poisoned, samples, fine, rays_, settings):
    inputs = triton_rays(1, rays_, samples, fine)
    assert_errs_no_more(triton_importance, sample_importance, inputs, "samples", **settings)
    # sorted too: the same, in order
    expected = triton_importance(**inputs, **settings).sort(dim=-1).values
    assert_close(triton_importance(**inputs, **settings, sorted=True), expected, "sorted samples", "exact")


@needs_triton
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_triton_extreme_densities(poisoned, scale):
    inputs = triton_rays(1, 4, 9, 16)
    inputs["raw_density"] = inputs["raw_density"] * scale
    samples = triton_importance(**inputs, sorted=True)
    assert_finite(samples, "samples")
    middle = (inputs["t"][..., 1:] + inputs["t"][..., :-1]) / 2
    slack = 4 * torch.finfo(torch.float32).eps
    assert (samples >= middle[..., :1] - slack).all()
    assert (samples <= middle[..., -1:] + slack).all()
    assert (samples.diff(dim=-1) >= 0).all()


@needs_triton
def test_triton_even_u_reaches_both_ends(poisoned):
    inputs = triton_rays(1, 3, 6, 6)
    inputs["u"] = torch.linspace(0, 1, 6, device=DEVICE).expand(1, 3, 6)
    samples = triton_importance(**inputs, sorted=True)
    middle = (inputs["t"][..., 1:] + inputs["t"][..., :-1]) / 2
    assert_close(samples[..., 0], middle[..., 0], "u = 0")
    assert_close(samples[..., -1], middle[..., -1], "u = 1")


def triton_draws(rays_, fine, seed, **settings):
    """Fine t of rays without density, sampled evenly from 0 to 1."""
    t = torch.tensor([-0.5, 0.5, 1.5], device=DEVICE).expand(1, rays_, 3)
    raw, seed = torch.full((1, rays_, 3), -1.0, device=DEVICE), torch.tensor([seed], device=DEVICE)
    return triton_importance(t, raw, samples=fine, seed=seed, activation="relu", **settings)[0]


@needs_triton
def test_triton_seed_decides_the_draw(poisoned):
    first = triton_draws(4, 5, 3)
    assert_close(triton_draws(4, 5, 3), first, "the same seed", "exact")
    assert_close(triton_draws(2, 5, 3), first[:2], "fewer rays", "exact")
    for other in (4, 3 + 2**40):
        assert not torch.isclose(triton_draws(4, 5, other), first).any()
    assert len(first.unique()) == 20
    inputs = {name: x for name, x in triton_rays().items() if name != "u"}
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(triton_importance(**inputs))
        assert results[-1].shape == inputs["t"].shape
        assert not torch.equal(triton_importance(**inputs), results[-1])
    assert_close(results[1], results[0], "torch's generator, seeded alike", "exact")


@needs_triton
@pytest.mark.parametrize("in_order", [False, True])
def test_triton_draws_are_uniform(poisoned, in_order):
    rays_, fine = 256, 3
    samples = triton_draws(rays_, fine, 11, sorted=in_order).double().cpu()
    # Kolmogorov-Smirnov over all of them: mean 0.87 and standard deviation 0.26, in units of 1 / sqrt(number).
    num = samples.numel()
    values = samples.flatten().sort().values
    distance = (values - (torch.arange(num, dtype=torch.float64) + 0.5) / num).abs().max().item()
    assert distance * num**0.5 < 0.87 + SIGMAS * 0.26
    # The k-th of n has mean k / (n + 1) and variance k (n + 1 - k) / ((n + 1)^2 (n + 2)).
    assert (samples.diff(dim=-1) >= 0).all() == in_order
    for k, value in enumerate(samples.sort(dim=-1).values.T, 1):
        spread = math.sqrt(k * (fine + 1 - k) / ((fine + 1) ** 2 * (fine + 2)))
        assert abs(value.mean().item() - k / (fine + 1)) < SIGMAS * spread / rays_**0.5
        # A fourth moment of at most 3 bounds the spread of the standard deviation.
        assert abs(value.std().item() / spread - 1) < SIGMAS / (2 * rays_) ** 0.5


@needs_triton
def test_triton_takes_any_layout(poisoned):
    inputs = triton_rays(2)
    expected = triton_importance(**inputs)
    for changed, x in inputs.items():
        for name, view in layouts(x):
            actual = triton_importance(**{**inputs, changed: view})
            assert_close(actual, expected, f"{changed}: {name}", "exact")


@needs_triton
@pytest.mark.parametrize(("batch", "rays_", "fine"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_triton_empty(batch, rays_, fine):
    samples = triton_importance(**triton_rays(batch, rays_, 4, fine), sorted=True)
    assert samples.shape == (batch, rays_, fine)


@needs_triton
def test_triton_has_no_gradient():
    inputs = {name: x.requires_grad_() for name, x in triton_rays().items()}
    assert not triton_importance(**inputs).requires_grad


@needs_triton
def test_triton_shows_what_is_nan():
    inputs = triton_rays(1, 2, 6, 4)
    expected = triton_importance(**inputs)
    inputs["raw_density"][0, 0, 2] = torch.nan
    samples = triton_importance(**inputs)
    assert samples[0, 0].isnan().any()
    assert_close(samples[0, 1], expected[0, 1], "the ray beside it", "exact")


@needs_triton
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": draw(1, 3, 6)}, TypeError, 't must be float32 (because backend is "triton"), got torch.float64'),
        (
            {"u": torch.zeros(1, 3, 4097)},
            ValueError,
            'u must hold at most 4096 numbers a row (because backend is "triton"), got 4097',
        ),
        (
            {"t": torch.zeros(1, 3, 4097), "raw_density": torch.zeros(1, 3, 4097)},
            ValueError,
            "t must hold at most 4096",
        ),
        ({"u": None, "seed": 5}, ValueError, "seed must be a tensor of shape [1] of int64 on"),
        ({"u": None, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must be a tensor of shape [1]"),
    ],
)
def test_triton_errors(change, error, message):
    inputs = {**triton_rays(), **change}
    inputs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with pytest.raises(error, match=re.escape(f"sample_importance: {message}")):
        triton_importance(**inputs)


@needs_triton
@pytest.mark.parametrize("samples", [1, 2, 3, 17, 48])
@pytest.mark.parametrize(("start", "end"), [(0.88, 1.12), (-3.0, 40.0)])
def test_triton_stratified_errs_no_more_than_the_reference(poisoned, samples, start, end):
    jitter = draw_uniform(2, 5, samples, seed=1).float()
    jitter[:, 0], jitter[:, 1] = 0, 1
    for what, settings in (("jitter", {"jitter": jitter.to(DEVICE)}), ("even", {"stochastic": False})):
        double = {**settings, "jitter": jitter.double()} if what == "jitter" else {**settings, "dtype": torch.float64}
        truth = sample_stratified(2, 5, samples, start, end, **double)
        reference = sample_stratified(2, 5, samples, start, end, **settings)
        actual = triton_stratified(2, 5, samples, start, end, **settings)
        assert_error_within_reference(actual, reference, truth, what)
        assert (actual.diff(dim=-1) >= 0).all()
        assert (actual[..., 0] >= torch.tensor(start)).all()
        assert (actual[..., -1] <= torch.tensor(end)).all()


@needs_triton
def test_triton_stratified_takes_any_layout(poisoned):
    jitter = draw_uniform(2, 3, 6).float().to(DEVICE)
    expected = triton_stratified(2, 3, 6, 1.0, 2.0, jitter=jitter)
    for name, view in layouts(jitter):
        assert_close(triton_stratified(2, 3, 6, 1.0, 2.0, jitter=view), expected, name, "exact")
    for batch, rays_ in ((0, 3), (3, 0)):
        assert triton_stratified(batch, rays_, 6, 1.0, 2.0).shape == (batch, rays_, 6)


@needs_triton
def test_triton_stratified_draws_are_uniform_in_their_strata(poisoned):
    seed, rays_, samples = torch.tensor([5], device=DEVICE), 512, 4
    t = triton_stratified(1, rays_, samples, 0.0, 3.0, seed=seed)
    assert_close(triton_stratified(1, 2, samples, 0.0, 3.0, seed=seed), t[:, :2], "fewer rays", "exact")
    assert not torch.isclose(triton_stratified(1, rays_, samples, 0.0, 3.0, seed=seed + 1), t).any()
    ends = torch.tensor([0, 0.5, 1.5, 2.5, 3])
    u = ((t[0].cpu() - ends[:-1]) / ends.diff()).double()
    assert u.min() >= 0
    assert u.max() <= 1
    num = u.numel()
    distance = (u.flatten().sort().values - (torch.arange(num, dtype=torch.float64) + 0.5) / num).abs().max().item()
    assert distance * num**0.5 < 0.87 + SIGMAS * 0.26  # Kolmogorov-Smirnov, as below
    # Independent of each other, and of the importance samples that the same seed draws.
    fine = triton_draws(rays_, samples, 5).double().cpu()
    both = torch.cat([u, fine], dim=1).T
    correlation = torch.corrcoef(both) - torch.eye(2 * samples, dtype=torch.float64)
    assert correlation.abs().max() < (SIGMAS + 1) / rays_**0.5  # the largest of 28


@needs_triton
def test_triton_noise(poisoned):
    """It moves the fine t, and does not touch what else the seed draws. Its distribution: see test_composite.py."""
    inputs, seed = triton_rays(1, 6, 8, 5), torch.tensor([7], device=DEVICE)
    calm, noisy = triton_importance(**inputs), triton_importance(**inputs, noise_std=0.5, seed=seed)
    assert not torch.isclose(calm, noisy).all(dim=-1).any()
    tensor = torch.tensor([0.5], device=DEVICE)
    assert_close(triton_importance(**inputs, noise_std=tensor, seed=seed), noisy, "a tensor of one", "exact")
    assert not torch.equal(triton_importance(**inputs, noise_std=0.5, seed=seed + 1), noisy)
    del inputs["u"]
    expected = triton_importance(**inputs, seed=seed)
    for none in (1e-30, torch.tensor(1e-30, device=DEVICE)):
        assert_close(triton_importance(**inputs, noise_std=none, seed=seed), expected, "hardly any", "exact")
    # A sample of noise +-1e4 per ray: opaque or empty, each half of the time, and the fine t gather at its bin or not.
    t = torch.tensor([0.0, 1.0, 2.0, 3.0], device=DEVICE).expand(1, 512, 4)
    raw, even = torch.zeros_like(t), torch.full((1, 512, 1), 0.5, device=DEVICE)
    fine = triton_importance(t, raw, even, noise_std=1e4, seed=seed, activation="relu")[0, :, 0].cpu()
    first = (fine < 1.45).double().mean().item()  # sample 0 empty, sample 1 opaque: 1/4 of the rays
    assert abs(first - 0.25) < SIGMAS * (0.25 * 0.75 / 512) ** 0.5


@needs_triton
def test_triton_even_u_is_k_over_k_minus_one(poisoned):
    for fine in (1, 2, 5, 48):
        inputs = triton_rays(1, 3, 7, fine)
        even = torch.linspace(0, 1, fine, device=DEVICE).expand(1, 3, fine)
        expected = triton_importance(inputs["t"], inputs["raw_density"], even)
        actual = triton_importance(inputs["t"], inputs["raw_density"], samples=fine, stochastic=False, sorted=True)
        assert_close(actual, expected, f"{fine} samples")


cpu_importance = functools.partial(ops.sample_importance, sorted=False, t_sorted=True, backend="cpu")


@needs_cpu
@SETTINGS
@pytest.mark.parametrize(
    ("samples", "fine", "rays_"), [(3, 1, 1), (6, 9, 20), (12, 12, 400), (131, 9, 3), (6, 140, 3), (2500, 3000, 1)]
)
def test_cpu_errs_no_more_than_the_reference(cpu_level, threads, samples, fine, rays_, settings):
    inputs = triton_rays(1, rays_, samples, fine)
    assert_errs_no_more(cpu_importance, sample_importance, inputs, "samples", **settings)
    actual = cpu_importance(**inputs, **settings)
    expected = actual.sort(dim=-1).values
    assert_close(cpu_importance(**inputs, **settings, sorted=True), expected, "sorted samples", "exact")
    threads(3)
    assert_close(cpu_importance(**inputs, **settings), actual, "by three threads", "exact")


@needs_cpu
@SETTINGS
def test_cpu_in_double_precision(cpu_level, settings):
    inputs = {name: x.double() for name, x in triton_rays(2, 5, 7, 9).items()}
    assert_close(cpu_importance(**inputs, **settings), sample_importance(**inputs, **settings), "samples")


@needs_cpu
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_cpu_extreme_densities(cpu_level, scale):
    inputs = triton_rays(1, 4, 9, 16)
    inputs["raw_density"] = inputs["raw_density"] * scale
    samples = cpu_importance(**inputs, sorted=True)
    assert_close(samples, sample_importance(**inputs).sort(dim=-1).values, "samples")


@needs_cpu
def test_cpu_takes_any_layout(cpu_level):
    inputs = triton_rays(2)
    expected = cpu_importance(**inputs)
    for changed, x in inputs.items():
        for name, view in layouts(x):
            assert_close(cpu_importance(**{**inputs, changed: view}), expected, f"{changed}: {name}", "exact")
    even = inputs["raw_density"][..., :1].expand(-1, -1, 6)
    actual = cpu_importance(**{**inputs, "raw_density": even})
    assert_close(actual, cpu_importance(**{**inputs, "raw_density": even.clone()}), "expanded densities", "exact")
    values = torch.stack([torch.full_like(inputs["t"], torch.nan), inputs["raw_density"]], dim=-1)
    actual = cpu_importance(**{**inputs, "raw_density": values[..., -1]})  # as a decoder leaves them
    assert_close(actual, expected, "densities among colours", "exact")


@needs_cpu
@pytest.mark.parametrize(("batch", "rays_", "fine"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_cpu_empty(cpu_level, batch, rays_, fine):
    assert cpu_importance(**triton_rays(batch, rays_, 4, fine)).shape == (batch, rays_, fine)


@needs_cpu
@pytest.mark.parametrize("name", ["raw_density", "u", "t"])
def test_cpu_shows_what_is_nan(cpu_level, name):
    inputs = triton_rays(1, 2, 6, 4)
    inputs[name][0, 0, -1] = torch.nan
    actual, expected = cpu_importance(**inputs), sample_importance(**inputs)
    assert_same_specials(actual, expected, f"NaN in {name}")
    actual = cpu_importance(**inputs, sorted=True)
    assert_same_specials(actual, expected.sort(dim=-1).values, f"NaN in {name}, sorted")


@needs_cpu
def test_cpu_draws_what_the_reference_draws(cpu_level):
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(3)
        results.append(ops.sample_importance(**rays(), noise_std=0.5, backend=backend))
    assert_close(*results, "samples")


@needs_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": 0}, "t must not be a null pointer"),
        ({"u": 2}, "u must be aligned to its elements of 4 bytes, got 2"),
        ({"t_fine": 0}, "t_fine must not be a null pointer"),
        ({"dtype": 2}, "dtype must be that of fp32 or fp64"),
        ({"samples": 2}, "samples must be at least 3"),
        ({"fine": -1}, "fine must be at least 0"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"softplus_beta": -1.0}, "softplus_beta must be positive"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_binding_refuses_what_cannot_be_right(change, message, cpu_level):
    from epigraf_fast import _C

    inputs, t_fine = triton_rays(1, 1, 4, 2), torch.empty(1, 1, 2)
    arguments = {"t": inputs["t"].data_ptr(), "raw": inputs["raw_density"].data_ptr(), "u": inputs["u"].data_ptr()}
    arguments |= {"t_fine": t_fine.data_ptr(), "dtype": 0, "rays": 1, "samples": 4, "fine": 2, "stride": 1}
    arguments |= {"relu": False, "softplus_beta": 1.0, "density_shift": 0.0, "sorted": False, "threads": 1}
    _C.sample_importance_cpu(*arguments.values())
    assert_close(t_fine, sample_importance(**inputs), "samples")
    with pytest.raises(ValueError, match=re.escape(f"sample_importance: {message}")):
        _C.sample_importance_cpu(*{**arguments, **change}.values())
