"""NaN and infinities come out of every kernel where they come out of the reference: values and derivatives.

A kernel that decides by x > 0, by a minimum or by a maximum may turn NaN into a number, which nothing then reports.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from checks import assert_same_specials, draw, draw_uniform
from csrc_backends import on_kernels
from epigraf_fast import ops
from epigraf_fast.ops import backends

NAN, INF = torch.nan, torch.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LACKING = backends.status()["composite"]["triton"]
needs_triton = pytest.mark.skipif(LACKING is not None, reason=LACKING or "")
ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Both sides of every kink, of a clamp at 1 and of where softplus becomes linear. Incoming gradients are of all kinds.
ARGUMENTS = (NAN, INF, -INF, 0.0, 0.5, -0.5, 3.0, -3.0, 30.0, -200.0)
INCOMING = (1.0, 0.0, NAN, INF, -INF)
RUN = 37  # elements alike, one after the other: two vectors of AVX-512, and some more


def activation_cases(act, infinite):
    """x, the gradient to y, and the gradient to that to x: [C], one of every combination."""
    cases = []
    for x, g, h in itertools.product(ARGUMENTS, INCOMING, INCOMING):
        # 1 - tanh(x)^2 is 0 in the reference and tiny in truth: an infinity times it is NaN or an infinity.
        if act == "tanh" and 30 <= abs(x) < INF and INF in (abs(g), abs(h)):
            continue
        # The reference adds up two terms that differ in sign, where the kernels multiply by what they add up to.
        if act == "swish" and not infinite and INF in (abs(g), abs(h)):
            continue
        cases.append((x, g, h))
    return torch.tensor(cases, dtype=torch.float64).unbind(1)


def activation_results(function, cases, dtype, act, clamp, channels_first):
    x, g, h = (v.to(dtype)[:, None].expand(-1, RUN) for v in cases)
    x, g, h = (v[None].contiguous() if channels_first else v.t().contiguous() for v in (x, g, h))
    bias = torch.zeros(x.shape[1], dtype=dtype).requires_grad_()
    x, g = x.requires_grad_(), g.requires_grad_()
    y = function(x, bias, act=act, clamp=clamp)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), g, create_graph=True)
    second = torch.autograd.grad(grad_x, (g, x, bias), h, materialize_grads=True, allow_unused=True)
    names = "y", "to x", "to bias", "to g", "to x, again", "to bias, again"
    return dict(zip(names, (y, grad_x, grad_bias, *second), strict=True))


def compare_activation(function, act, clamp, dtype):
    reference = functools.partial(ops.bias_act, backend="reference")
    for infinite in (False, True) if act == "swish" else (True,):
        cases = activation_cases(act, infinite)
        for channels_first in (True, False):
            arguments = cases, dtype, act, clamp, channels_first
            expected = activation_results(reference, *arguments)
            for what, actual in activation_results(function, *arguments).items():
                if infinite and act == "swish" and what.endswith("again"):
                    continue
                assert_same_specials(actual, expected[what], what)


@on_kernels("bias_act")
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_act(bias_act, backend, act, clamp, dtype):
    compare_activation(bias_act, act, clamp, dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_in_every_instruction_set(act, cpu_level):
    function = functools.partial(ops.bias_act, backend="cpu")
    for clamp, dtype in itertools.product((None, 1.0), DTYPES):
        compare_activation(function, act, clamp, dtype)


@on_kernels("bias_act")
def test_an_infinite_clamp_is_none(bias_act, backend):
    x = torch.tensor([[NAN, 1.0]]).requires_grad_()
    for function in (bias_act, functools.partial(ops.bias_act, backend="reference")):
        (gradient,) = torch.autograd.grad(function(x, clamp=INF).sum(), x)
        assert gradient.tolist() == [[1.0, 1.0]]


LAYER = (1, 19, 2, 37)  # lanes are 37 columns, or channels-last 19 channels: a vector and more


def layer_tensors(dtype, blur, channels_last):
    """Inputs and incoming gradients of `layer_epilogue` with everything, of moderate numbers."""
    batch, channels, height, width = LAYER
    shapes = {"x": (batch, channels, height + blur, width + blur), "demod": (batch, channels), "bias": (channels,)}
    shapes |= {"noise": (batch, 1, height, width), "strength": (), "style0": (batch, channels)}
    shapes |= {"style1": (batch, channels), "grad0": LAYER, "grad1": LAYER}
    tensors = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for name, x in tensors.items():
        x = x.to(dtype if x.ndim == 4 and name != "noise" else torch.promote_types(dtype, torch.float32))
        tensors[name] = x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
    return tensors


def layer_results(backend, tensors, blur, again, **settings):
    """Outputs, gradients, and the gradients of those named in `again`."""
    leaves = {name: x.clone(memory_format=torch.preserve_format).requires_grad_() for name, x in tensors.items()}
    inputs = {name: x for name, x in leaves.items() if not name.startswith(("grad", "style"))}
    styles = [leaves.get("style0"), leaves.get("style1")][: sum(name.startswith("grad") for name in leaves)]
    taps = torch.tensor([1.0, 3, 3, 1]).to(tensors["bias"]) / 8 if blur else None
    ys = ops.layer_epilogue(**inputs, styles=styles, blur=taps, backend=backend, **settings)
    of_inputs = {name: x for name, x in leaves.items() if not name.startswith("grad")}
    options = {"allow_unused": True, "materialize_grads": True}
    grad_ys = [leaves[f"grad{k}"] for k in range(len(ys))]
    first = torch.autograd.grad(ys, of_inputs.values(), grad_ys, create_graph=True, **options)
    first = dict(zip(of_inputs, first, strict=True))
    results = {f"y{k}": y for k, y in enumerate(ys)} | {f"to {name}": x for name, x in first.items()}
    wanted = [first[name] for name in again if name in first and first[name].requires_grad]
    if wanted:
        dots = [draw(*x.shape, seed=30 + i).to(x.dtype) for i, x in enumerate(wanted)]
        second = torch.autograd.grad(wanted, leaves.values(), dots, **options)
        results |= {f"to {name}, again": x for name, x in zip(leaves, second, strict=True)}
    return results


def compare_layer(backend, dtype, blur, channels_last, *, left_out=(), again=(), **settings):
    tensors = {name: x for name, x in layer_tensors(dtype, blur, channels_last).items() if name not in left_out}
    for name, special in [(name, NAN) for name in tensors] + [
        (name, s) for name in ("x", "grad0") for s in (INF, -INF)
    ]:
        spoiled = tensors[name].clone(memory_format=torch.preserve_format)
        spoiled[tuple(size // 2 for size in spoiled.shape)] = special
        changed = {**tensors, name: spoiled}
        actual = layer_results(backend, changed, blur, again, **settings)
        expected = layer_results("reference", changed, blur, again, **settings)
        for what in actual:
            if what == "to x, again" and not {"demod", "style0", "style1"} & set(again):
                # Gradients to x, bias and noise know of x only its sign: it gets none of theirs, not even 0 times NaN.
                assert (actual[what] == 0).all()
                continue
            assert_same_specials(actual[what], expected[what], f"{what}, {special} in {name}")


@on_kernels("modulated_conv2d")
@pytest.mark.parametrize(("act", "clamp"), [("lrelu", None), ("lrelu", 1.0), ("linear", 1.0)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layer_epilogue(backend, act, clamp, channels_last):
    everything = ("x", "demod", "bias", "noise", "strength", "style0", "style1")
    compare_layer(backend, torch.float32, False, channels_last, again=everything, act=act, clamp=clamp)


@on_kernels("modulated_conv2d")
@pytest.mark.parametrize(
    ("left_out", "again"),
    [
        ((), ("x",)),
        ((), ("demod",)),
        ((), ("style0",)),
        ((), ("style1", "noise")),
        (("style1", "grad1"), ("x", "style0")),
        (("demod", "noise", "strength", "style0", "style1", "grad1"), ("x", "bias")),
        (("style0", "noise"), ("demod", "bias")),
    ],
    ids=str,
)
def test_layer_epilogue_without_some_of_it(backend, left_out, again):
    """What is absent adds nothing: 0 times NaN is NaN."""
    compare_layer(backend, torch.float32, False, False, left_out=left_out, again=again, act="lrelu", clamp=1.0)


@on_kernels("modulated_conv2d")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layer_epilogue_dtypes(backend, dtype):
    # No clamp: what lies next to it may round to either side.
    compare_layer(backend, dtype, False, True, again=("x",), act="lrelu", clamp=None)


@on_kernels("modulated_conv2d")
@pytest.mark.parametrize("channels_last", [False, True])
def test_layer_epilogue_with_blur(backend, channels_last):
    compare_layer(backend, torch.float32, True, channels_last, again=("x", "style0"), act="lrelu", clamp=1.0)


def test_layer_epilogue_in_every_instruction_set(cpu_level):
    for channels_last, dtype in itertools.product((False, True), (torch.float32, torch.float16)):
        compare_layer("cpu", dtype, False, channels_last, again=("x", "demod"), act="lrelu", clamp=1.0)


@on_kernels("modulated_conv2d")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_modulation(backend, dtype):
    """In fp16 styles are divided by the largest of an image, which is NaN where one of them is."""
    tensors = {"weight": draw(5, 37, 3, 3, seed=1).float(), "style": draw(3, 37, seed=2).float()}

    def results(tensors, backend):
        weight, style, demod = ops.modulation(tensors["weight"], tensors["style"], dtype, backend=backend)
        return {"weight": weight, "style": style, "demod": demod}

    for name, special in itertools.product(tensors, (NAN, INF, -INF)):
        for place in (0, -1):  # NaN first, and NaN last, of what a maximum is taken of
            spoiled = tensors[name].clone()
            spoiled.flatten()[place] = special
            changed = {**tensors, name: spoiled}
            expected = results(changed, "reference")
            for what, actual in results(changed, backend).items():
                assert_same_specials(actual, expected[what], f"{what}, {special} in {name}")


@on_kernels("upfirdn2d")
@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_upfirdn2d_and_what_it_adds(upfirdn2d, backend, clamp, dtype):
    reference = functools.partial(ops.upfirdn2d, backend="reference")
    tensors = {"x": draw(1, 3, 5, 19, seed=1), "added": draw(1, 3, 10, 38, seed=2), "grad": draw(1, 3, 10, 38, seed=3)}
    bias = draw(3, seed=4).to(dtype)

    def results(function, x, added, grad):
        x, added, of_bias = x.requires_grad_(), added.requires_grad_(), bias.detach().requires_grad_()
        taps = torch.tensor([1, 3, 3, 1]) / 8
        y = function(x, taps.to(dtype), up=2, padding=(2, 1, 2, 1), gain=4, added=added, bias=of_bias, clamp=clamp)
        gradients = torch.autograd.grad(y, (x, added, of_bias), grad)
        return dict(zip(("y", "to x", "to added", "to bias"), (y, *gradients), strict=True))

    for name, special, last in itertools.product(tensors, (NAN, INF, -INF), (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        changed = {key: x.to(dtype, copy=True).contiguous(memory_format=layout) for key, x in tensors.items()}
        changed[name][0, 1, 2, 7] = special
        expected = results(reference, **{key: x.clone() for key, x in changed.items()})
        for what, actual in results(upfirdn2d, **changed).items():
            assert_same_specials(actual, expected[what], f"{what}, {special} in {name}")


def decoder_tensors(points, channels=8):
    """A point a ray, each inside of the planes."""
    shapes = {"ray_origins": (1, points, 3), "ray_directions": (1, points, 3), "t": (1, points, 1)}
    tensors = {name: 0.4 * draw(*shape, seed=i).clamp(-1, 1) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {"planes": draw(1, 3 * channels, 5, 6, seed=4), "w0": draw(16, channels, seed=5)}
    tensors |= {"b0": draw(16, seed=6), "w1": draw(4, 16, seed=7), "b1": draw(4, seed=8)}
    return {name: x.float() for name, x in tensors.items()} | {"grad": draw(1, points, 1, 4, seed=9).float()}


def compare_decoder(backend, tensors, what, leaves=("planes", "w0", "b0", "w1", "b1")):
    results = []
    for name in (backend, "reference"):
        inputs = {name: x.clone().to(DEVICE).requires_grad_(name in leaves) for name, x in tensors.items()}
        grad = inputs.pop("grad")
        rays = [inputs[name] for name in ("planes", "ray_origins", "ray_directions", "t")]
        network = ops.Network(*(inputs[name] for name in ops.Network._fields))
        y = ops.decode_triplane_rays(*rays, network, cube_scale=1.0, backend=name)
        results.append((y, *torch.autograd.grad(y, [inputs[name] for name in leaves], grad)))
    for name, actual, expected in zip(("y", *(f"to {leaf}" for leaf in leaves)), *results, strict=True):
        assert_same_specials(actual, expected, f"{name}, {what}")


def compare_decoder_everywhere(backend, points):
    tensors = decoder_tensors(points)
    for point, name in enumerate(("ray_origins", "ray_directions", "t", "grad")):
        tensors[name][0, point].flatten()[-1] = NAN
    tensors["ray_origins"][0, 4], tensors["ray_origins"][0, 5, 0] = INF, -INF  # far away, where there is nothing
    compare_decoder(backend, tensors, "by points", ("planes",))
    for name in ("planes", "w0", "w1", "grad"):
        tensors = decoder_tensors(points)
        tensors[name][tuple(size // 2 for size in tensors[name].shape)] = NAN
        compare_decoder(backend, tensors, f"NaN in {name}")


@pytest.mark.skipif(DEVICE != "cpu", reason="compares on the CPU")
def test_decode_triplane_in_every_instruction_set(cpu_level):
    compare_decoder_everywhere("cpu", 70)


@needs_triton
def test_decode_triplane_by_triton():
    compare_decoder_everywhere("triton", 7)


@needs_triton
def test_sample_triplane_by_triton():
    cases = [*itertools.product(((0,), (1,), (2,), (0, 1, 2)), (NAN, INF, -INF))]  # a point each
    planes, grad = draw(1, 24, 4, 5, seed=1).float().to(DEVICE), draw(1, len(cases), 8, seed=2).float().to(DEVICE)
    points = (1.6 * draw_uniform(1, len(cases), 3, seed=3) - 0.8).float()
    for point, (axes, special) in enumerate(cases):
        points[0, point, list(axes)] = special
    results = []
    for backend in ("triton", "reference"):
        leaf = planes.clone().requires_grad_()
        y = ops.sample_triplane(leaf, points.to(DEVICE), backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, grad)))
    for what, actual, expected in zip(("features", "to planes"), *results, strict=True):
        assert_same_specials(actual, expected, what)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_sample_triplane_by_torchs_sampler(special):
    points = (1.6 * draw_uniform(1, 9, 3, seed=3) - 0.8).float()
    points[0, 2, 1] = special
    planes = draw(1, 24, 4, 5, seed=1).float()
    actual, expected = (ops.sample_triplane(planes, points, backend=name) for name in ("cpu", "reference"))
    assert_same_specials(actual, expected, "features")


def compare_composite(backend, activation, fine):
    sets = ["t", "values"] + (["t_fine", "values_fine"] if fine else [])
    outputs = ops.Composite._fields
    # A ray each: one number of what goes in, or of a gradient that comes in.
    cases = [(name, special) for name in (*sets, "density_noise", "background") for special in (NAN, INF, -INF)]
    cases = [case for case in cases if case[0][0] != "t" or case[1] is NAN] + [(name, NAN) for name in outputs]
    rays = len(cases)
    tensors = {"t": draw_uniform(1, rays, 6, seed=1).sort().values, "values": draw(1, rays, 6, 4, seed=2)}
    if fine:
        tensors["t_fine"] = draw_uniform(1, rays, fine, seed=3).sort().values
        tensors["values_fine"] = draw(1, rays, fine, 4, seed=4)
    tensors |= {"density_noise": draw(1, rays, 6 + fine, seed=5), "background": draw(1, rays, 3, seed=6)}
    grads = {"rgb": draw(1, rays, 3, seed=7), "weights": draw(1, rays, 6 + fine, seed=8)}
    grads |= {name: draw(1, rays, seed=9 + i) for i, name in enumerate(outputs[1:4])}
    for ray, (name, special) in enumerate(cases):
        spoiled = tensors.get(name, grads.get(name))[0, ray]
        spoiled[spoiled.shape[0] // 2 if spoiled.ndim else ...] = special  # of values: colours and density alike
    settings = {"activation": activation, "last_interval": 0.3, "white_background": True, "return_weights": True}
    results = []
    for name in (backend, "reference"):
        leaves = {name: x.float().to(DEVICE).requires_grad_(name[0] != "t") for name, x in tensors.items()}
        ys = ops.composite(**leaves, **settings, backend=name)
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        incoming = [grads[name].float().to(DEVICE) for name in outputs]
        gradients = torch.autograd.grad(ys, wanted.values(), incoming)
        results.append(ys._asdict() | {f"to {name}": x for name, x in zip(wanted, gradients, strict=True)})
    for name, actual in results[0].items():
        for ray, case in enumerate(cases):
            assert_same_specials(actual[0, ray], results[1][name][0, ray], f"{name}, {case}")


by_activation = pytest.mark.parametrize("activation", ["softplus", "relu"])
by_fine_samples = pytest.mark.parametrize("fine", [0, 5])


@needs_triton
@by_activation
@by_fine_samples
def test_composite_by_triton(activation, fine):
    compare_composite("triton", activation, fine)


@pytest.mark.skipif(DEVICE != "cpu", reason="compares on the CPU")
@by_activation
@by_fine_samples
def test_composite_in_every_instruction_set(activation, fine, cpu_level):
    compare_composite("cpu", activation, fine)


def compare_sample_importance(backend, activation, sorted):
    cases = [("t", NAN), ("raw_density", NAN), ("raw_density", INF), ("raw_density", -INF), ("u", NAN)]  # a ray each
    shape = 1, len(cases)
    tensors = {"t": draw_uniform(*shape, 7, seed=1).sort().values, "raw_density": draw(*shape, 7, seed=2)}
    tensors["u"] = draw_uniform(*shape, 5, seed=3)
    for ray, (name, special) in enumerate(cases):
        tensors[name][0, ray, 2] = special
    tensors = {name: x.float().to(DEVICE) for name, x in tensors.items()}
    settings = {"activation": activation, "sorted": sorted}
    actual, expected = (ops.sample_importance(**tensors, **settings, backend=name) for name in (backend, "reference"))
    assert_same_specials(actual, expected, "t_fine")


by_order = pytest.mark.parametrize("sorted", [False, True])


@needs_triton
@by_activation
@by_order
def test_sample_importance_by_triton(activation, sorted):
    compare_sample_importance("triton", activation, sorted)


@pytest.mark.skipif(DEVICE != "cpu", reason="compares on the CPU")
@by_activation
@by_order
def test_sample_importance_in_every_instruction_set(activation, sorted, cpu_level):
    compare_sample_importance("cpu", activation, sorted)
