"""The synthesis network: sizes, layers worked by hand, who sees which style vector, noise, the sum of planes."""

from __future__ import annotations

import pytest
import torch
from emulated import emulate

from checks import assert_close, assert_error_within_reference, assert_finite, draw
from epigraf_fast import ops
from epigraf_fast.models.layers import scaled_once
from epigraf_fast.models.synthesis import (
    NOISE_MODES,
    Synthesis,
    SynthesisLayer,
    ToPlanes,
    parts_of,
    product_of_pixels,
)
from epigraf_fast.ops import backends


def available(op):
    """The backends that the op has here for tensors on the CPU, all but the reference."""
    here = [name for name in ("cpu",) if backends.status()[op][name] is None]
    missing = pytest.param("cpu", marks=pytest.mark.skip(reason="the extension is not built"))
    return here or [missing]


def make(dtype=torch.float64, backend="reference", **settings):
    """The reference evaluates layer by layer, which hooks can see; the others chain them."""
    torch.manual_seed(0)
    return Synthesis(6, 16, 9, channel_base=64, channel_max=8, backend=backend, **settings).to(dtype)


def layers(synthesis):
    return {name: m for name, m in synthesis.named_modules() if isinstance(m, SynthesisLayer | ToPlanes)}


def everything_on(synthesis):
    """Noise, and biases, which are 0 at first."""
    for layer in layers(with_noise(synthesis)).values():
        torch.nn.init.normal_(layer.bias)
    return synthesis


def with_noise(synthesis):
    """Every strength at something else than 0, where it is at first."""
    for i, layer in enumerate(m for m in synthesis.modules() if isinstance(m, SynthesisLayer)):
        torch.nn.init.constant_(layer.noise_strength, 0.5 + 0.1 * i)
    return synthesis


def test_published_size():
    with torch.device("meta"):
        synthesis = Synthesis(512, 512, 96)
    assert sum(p.numel() for p in synthesis.parameters()) == 28_455_823
    assert synthesis.num_ws == 16
    channels = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64}
    assert {res: getattr(synthesis, f"b{res}").conv1.weight.shape[0] for res in synthesis.resolutions} == channels


def test_initialization():
    torch.manual_seed(0)
    synthesis = Synthesis(64, 16, 9, channel_max=64)
    for name, layer in layers(synthesis).items():
        assert 0.8 < layer.weight.std() < 1.2, name
        assert not layer.bias.any(), name
        assert 0.8 < layer.affine.weight.std() < 1.2, name
        assert_close(layer.affine.bias, torch.ones(64), f"{name}: style bias", "exact")
        if isinstance(layer, SynthesisLayer):
            assert layer.noise_strength.shape == ()
            assert layer.noise_strength.item() == 0
            assert tuple(layer.noise_const.shape) == (layer.resolution, layer.resolution)
    assert tuple(synthesis.b4.const.shape) == (64, 4, 4)
    assert 0.8 < synthesis.b4.const.std() < 1.2
    state = synthesis.state_dict()
    assert "b8.conv0.noise_const" in state
    assert not [name for name in state if "low_pass" in name]  # a constant, not a weight


def test_planes_are_of_order_one_at_full_width():
    torch.manual_seed(0)
    synthesis = Synthesis(512, 16, 96)
    with torch.no_grad():
        planes = synthesis(torch.randn(2, 1, 512).expand(-1, synthesis.num_ws, -1))
    assert_finite(planes, "planes")
    assert 0.5 < planes.std() < 5


@pytest.mark.parametrize("up", [1, 2])
def test_layer_equals_the_formula(up):
    torch.manual_seed(0)
    layer = SynthesisLayer(3, 4, 5, 4 * up, up=up).double()
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.constant_(layer.noise_strength, 0.3)
    x, w = draw(2, 3, 4, 4, seed=1), draw(2, 5, seed=2)
    style = w @ layer.affine.weight.T / 5**0.5 + 1
    expected = []
    for i in range(2):
        weight = layer.weight * style[i][None, :, None, None]
        weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up == 1:
            y = torch.nn.functional.conv2d(x[i : i + 1], weight, padding=1)
        else:  # 2H + 1 wide, then the filter, its gain 4, with a pad of 1
            y = torch.nn.functional.conv_transpose2d(x[i : i + 1], weight.transpose(0, 1), stride=2)
            taps = torch.tensor([0.125, 0.375, 0.375, 0.125], dtype=torch.float64)
            taps = 4 * torch.outer(taps, taps).expand(4, 1, 4, 4)
            y = torch.nn.functional.conv2d(y, taps, padding=1, groups=4)
        expected.append(y)
    y = torch.cat(expected) + 0.3 * layer.noise_const + layer.bias[:, None, None]
    assert_close(layer(x, w, "const"), torch.where(y > 0, y, 0.2 * y) * 2**0.5, "y")


def test_layer_clamps():
    layer = SynthesisLayer(3, 4, 5, 4).double()
    torch.nn.init.constant_(layer.bias, -1e6)
    assert_close(layer(draw(1, 3, 4, 4), draw(1, 5)), torch.full((1, 4, 4, 4), -256.0), "y", "exact")


@pytest.mark.parametrize("backend", ["reference", *available("modulated_conv2d")])
def test_without_clamps(backend):
    """Biases beyond the clamp arrive whole, in the layers and in the planes."""
    clamped, free = (everything_on(make(backend=backend, clamp=clamp)) for clamp in (256.0, None))
    ws = draw(2, 6, 6, seed=1)
    with torch.no_grad():
        assert_close(free(ws, "const"), clamped(ws, "const"), "planes that no clamp reaches", "exact")
        for synthesis in (clamped, free):
            torch.nn.init.constant_(synthesis.b4.to_planes.bias, 1e4)
            torch.nn.init.constant_(synthesis.b16.to_planes.bias, -1e4)
            torch.nn.init.constant_(synthesis.b16.conv1.bias, 1e4)
        a, b = clamped(ws, "const"), free(ws, "const")
    assert a.abs().max() < 1100
    assert b.abs().max() > 2000


def test_clamps_are_those_of_the_settings():
    """In the layers by themselves, where other numbers would hide it."""
    layer, to_planes = SynthesisLayer(3, 4, 5, 4, clamp=None).double(), ToPlanes(4, 9, 5, clamp=10.0).double()
    torch.nn.init.constant_(layer.bias, -1e6)
    torch.nn.init.constant_(to_planes.bias, 1e6)
    assert (layer(draw(1, 3, 4, 4), draw(1, 5)) < -2e5).all()
    assert_close(to_planes(draw(1, 4, 4, 4), draw(1, 5)), torch.full((1, 9, 4, 4), 10.0), "planes", "exact")


@pytest.mark.parametrize("backend", ["reference", *available("modulated_conv2d")])
def test_without_noise_images(backend):
    """Whatever mode is asked for; the strengths get no gradient, so that training leaves them alone."""
    synthesis = with_noise(make(backend=backend, noise=False))
    ws = draw(2, 6, 6, seed=1)
    planes = {mode: synthesis(ws, mode) for mode in NOISE_MODES}
    assert torch.equal(planes["random"], planes["none"])
    assert torch.equal(planes["const"], planes["none"])
    planes["random"].sum().backward()
    for name, parameter in synthesis.named_parameters():
        assert (parameter.grad is None) == name.endswith("noise_strength"), name


def test_to_planes_equals_the_formula():
    torch.manual_seed(0)
    layer = ToPlanes(4, 9, 5).double()
    torch.nn.init.normal_(layer.bias)
    x, w = draw(2, 4, 3, 3, seed=1), draw(2, 5, seed=2)
    style = (w @ layer.affine.weight.T / 5**0.5 + 1) / 4**0.5
    expected = torch.einsum("bihw,bi,oi->bohw", x, style, layer.weight[:, :, 0, 0]) + layer.bias[:, None, None]
    assert_close(layer(x, w), expected, "added planes")
    torch.nn.init.constant_(layer.bias, 1e6)
    assert_close(layer(x, w), torch.full((2, 9, 3, 3), 256.0), "clamped", "exact")


def test_who_sees_which_style_vector():
    synthesis = make()
    ws = torch.arange(synthesis.num_ws, dtype=torch.float64)[:, None].expand(1, -1, 6)
    seen = {}
    for name, layer in layers(synthesis).items():
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[1].unique().tolist()}))
    synthesis(ws, "none")
    # A to-planes layer takes the vector after conv1's, which is also that of the next conv0.
    assert seen == {
        "b4.conv1": [0],
        "b4.to_planes": [1],
        "b8.conv0": [1],
        "b8.conv1": [2],
        "b8.to_planes": [3],
        "b16.conv0": [3],
        "b16.conv1": [4],
        "b16.to_planes": [5],
    }
    assert synthesis.num_ws == 6


@pytest.mark.parametrize("index", range(6))
def test_a_style_vector_changes_its_layers_only(index):
    synthesis = make()
    outputs: dict[str, list] = {}
    for name, layer in layers(synthesis).items():
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.setdefault(name, []).append(y))
    ws = draw(1, 6, 6, seed=1)
    changed = ws.clone()
    changed[:, index] = draw(1, 6, seed=2)
    with torch.no_grad():
        synthesis(ws, "const")
        synthesis(changed, "const")
    moved = {name for name, (before, after) in outputs.items() if not torch.equal(before, after)}
    # In the order of evaluation, first those that see the vector, then all convolutions after a changed one.
    order = ["b4.conv1", "b4.to_planes", "b8.conv0", "b8.conv1", "b8.to_planes", "b16.conv0", "b16.conv1"]
    first_conv = {0: "b4.conv1", 1: "b8.conv0", 2: "b8.conv1", 3: "b16.conv0", 4: "b16.conv1"}
    expected = {"b16.to_planes"}
    if index in first_conv:
        expected |= set(order[order.index(first_conv[index]) :])
    expected |= {1: {"b4.to_planes"}, 3: {"b8.to_planes"}}.get(index, set())
    assert moved == expected


@pytest.mark.parametrize("backend", available("modulated_conv2d"))
def test_noise_modes(backend):
    synthesis = with_noise(make(backend=backend))
    ws = draw(2, 1, 6, seed=1).expand(-1, 6, -1)
    with torch.no_grad():
        const = synthesis(ws, "const")
        none = synthesis(ws, "none")
        assert_close(synthesis(ws, "const"), const, "const again", "exact")
        assert_close(synthesis(ws, "none"), none, "none again", "exact")
        assert not torch.equal(const, none)
        first, second = synthesis(ws), synthesis(ws)  # random
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        one = synthesis(ws, "random")
        torch.manual_seed(3)
        assert_close(synthesis(ws, "random"), one, "the same draws", "exact")
        equal = synthesis(ws[:1].expand(2, -1, -1))
        assert not torch.equal(equal[0], equal[1])  # an image has its own noise
        for buffer in (layer.noise_const for layer in synthesis.modules() if isinstance(layer, SynthesisLayer)):
            buffer.zero_()
        assert_close(synthesis(ws, "const"), none, "noise_const of zero", "exact")
    with pytest.raises(ValueError, match="Synthesis: noise_mode must be one of random, const, none, got 'off'"):
        synthesis(ws, "off")


def test_noise_is_silent_at_first():
    synthesis = make()
    ws = draw(1, 6, 6, seed=1)
    assert_close(synthesis(ws, "random"), synthesis(ws, "none"), "strength 0")


@pytest.mark.parametrize("backend", available("modulated_conv2d"))
def test_planes_are_channels_last_in_the_dtype_of_ws(backend):
    for dtype in (torch.float32, torch.float64):
        planes = make(dtype, backend, half_blocks=2)(draw(2, 6, 6, dtype=dtype))  # fp16 is for GPUs
        assert planes.dtype == dtype
        assert tuple(planes.shape) == (2, 9, 16, 16)
        assert planes.is_contiguous(memory_format=torch.channels_last)


def test_the_sum_of_planes_is_upsampled():
    """With only the first to-planes layer on, the planes are its output, twice interpolated linearly."""
    synthesis = make()
    with torch.no_grad():
        for res in (8, 16):
            getattr(synthesis, f"b{res}").to_planes.weight.zero_()
        first = []
        synthesis.b4.to_planes.register_forward_hook(lambda _, __, y: first.append(y))
        planes = synthesis(draw(2, 6, 6, seed=1), "none")
    expected = first[0]
    for _ in range(2):
        expected = torch.nn.functional.interpolate(expected, scale_factor=2, mode="bilinear", align_corners=False)
    # Outside there are zeros, which torch's interpolation does not know: those reach three pixels far.
    assert_close(planes[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3], "inner planes")


def test_the_planes_are_a_sum_over_resolutions():
    synthesis = make()
    with torch.no_grad():
        planes = synthesis(draw(1, 6, 6, seed=1), "none")
        added = []
        synthesis.b16.to_planes.register_forward_hook(lambda _, __, y: added.append(y))
        synthesis(draw(1, 6, 6, seed=1), "none")
        synthesis.b16.to_planes.weight.zero_()
        rest = synthesis(draw(1, 6, 6, seed=1), "none")
    assert_close(planes, rest + added[0], "sum")


def derivatives(synthesis, noise_mode, order):
    """Planes, and named gradients of their sum with random weights; of order 2, of the gradient to ws squared."""
    dtype = synthesis.b4.const.dtype
    ws = draw(2, synthesis.num_ws, 6, seed=1, dtype=dtype).requires_grad_()
    inputs = {"ws": ws, **dict(synthesis.named_parameters())}
    torch.manual_seed(7)
    planes = synthesis(ws, noise_mode)
    loss = (planes * draw(*planes.shape, seed=2, dtype=dtype)).sum()
    if order == 2:
        loss = torch.autograd.grad(loss, ws, create_graph=True)[0].square().sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return planes.detach(), dict(zip(inputs, gradients, strict=True))


@pytest.mark.parametrize("backend", [*available("modulated_conv2d"), "emulated"])
@pytest.mark.parametrize("noise_mode", NOISE_MODES)
@pytest.mark.parametrize("order", [1, 2])
def test_the_chain_equals_the_reference(backend, noise_mode, order, poisoned, monkeypatch):
    """Path length needs the second order."""
    if backend == "emulated":
        emulate(monkeypatch)
        backend = None
    truth, true_gradients = derivatives(everything_on(make()), noise_mode, order)
    planes, gradients = derivatives(everything_on(make(backend=backend)), noise_mode, order)
    assert_close(planes, truth, "planes")
    for name, gradient in gradients.items():
        assert_close(gradient, true_gradients[name], f"gradient to {name}")


@pytest.mark.parametrize("backend", available("modulated_conv2d"))
def test_the_chain_errs_no_more_than_the_reference(backend):
    truth, true_gradients = derivatives(everything_on(make()), "const", 1)
    reference, expected = derivatives(everything_on(make(torch.float32)), "const", 1)
    planes, gradients = derivatives(everything_on(make(torch.float32, backend)), "const", 1)
    assert_error_within_reference(planes, reference, truth, "planes")

    # The layers' noise strengths are one vector: how much of a single number cancels out is luck.
    strengths = max(g.abs() for g in true_gradients.values() if g.ndim == 0)
    scales = {name: g.abs().max() if g.ndim else strengths for name, g in true_gradients.items()}

    def relative(gradients):
        """All of them in one vector, so that no single one where the reference is lucky decides."""
        return torch.cat([(g / scales[name]).flatten() for name, g in gradients.items()])

    actual, expected, truth = (relative(g) for g in (gradients, expected, true_gradients))
    assert_error_within_reference(actual.float(), expected.float(), truth, "gradients")


def test_products_of_pixels_in_parts():
    """The weight's gradient is summed part by part, for the same numbers, to the second derivative."""
    assert [parts_of(n * n) for n in (16, 64, 128, 512)] == [1, 1, 4, 64]
    assert parts_of(24 * 1000) == 6
    assert parts_of(8209) == 1  # a prime
    values = []
    for parts in (1, 4):
        pixels, weight = draw(2, 24, 3).requires_grad_(), draw(2, 5, 3, seed=1).requires_grad_()
        y = product_of_pixels(pixels, weight, parts)
        firsts = torch.autograd.grad(y.square().sum(), (pixels, weight), create_graph=True)
        seconds = torch.autograd.grad(sum(x.square().sum() for x in firsts), (pixels, weight))
        values.append((y, *firsts, *seconds))
    for name, a, b in zip(("y", "to pixels", "to weight", "2nd to pixels", "2nd to weight"), *values, strict=True):
        assert_close(b, a, name)
    shapes = []
    product = torch.bmm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", lambda a, b: shapes.append((tuple(a.shape), tuple(b.shape))) or product(a, b))
        product_of_pixels(pixels, weight, 4).sum().backward()
    assert shapes[-1] == ((8, 5, 6), (8, 6, 3))  # 2 images in 4 parts of 6 pixels


def test_weights_are_laid_out_once_for_all_micro_batches(monkeypatch):
    """As a GPU's convolutions read them; values and gradients are the same bits."""
    emulate(monkeypatch)
    synthesis = everything_on(make(torch.float32, "cpu"))
    parameters = dict(synthesis.named_parameters())
    copy, made = ops.OfWeight.copy, []

    def counted(self, weight, what, make):
        return copy(self, weight, what, lambda weight: made.append(what) or make(weight))

    monkeypatch.setattr(ops.OfWeight, "copy", counted)

    def micro_batches():
        planes = []
        for seed in range(2):
            planes.append(synthesis(draw(2, 6, 6, seed=seed, dtype=torch.float32), "const"))
            planes[-1].square().sum().backward()
        return planes

    expected = micro_batches()
    assert not made
    gradients = {name: p.grad for name, p in parameters.items()}
    synthesis.zero_grad()
    with scaled_once(synthesis):
        actual = micro_batches()
    assert made == [("laid out", torch.float32)] * 5
    assert all(layer.of_weight is None for layer in synthesis.modules() if isinstance(layer, SynthesisLayer))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    for name, p in parameters.items():
        if not name.endswith(
            ("affine.weight", "affine.bias", "to_planes.weight")
        ):  # scaled together, see test_layers.py
            assert torch.equal(p.grad, gradients[name]), name
