"""The ops where torch does more than run them: every mode and transform gives what it gives with the reference."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from checks import assert_close, assert_error_within_reference, draw, draw_uniform
from epigraf_fast import ops
from epigraf_fast.ops import backends

Function = Callable[..., tuple[Tensor, ...]]
CPU, TRITON = torch.float64, torch.float32


class Case(NamedTuple):
    name: str
    op: str  # in the table of backends
    backend: str
    call: Callable[..., Any]  # of the inputs and `backend`
    inputs: tuple[Tensor, ...]
    order: int  # how often it can be differentiated to all of its inputs

    def on(self, backend: str) -> Function:
        """The op of its inputs, as a tuple of tensors."""

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            results = self.call(*inputs, backend=backend)
            results = (results,) if isinstance(results, Tensor) else results
            return tuple(x for x in results if x is not None)

        function.backend, function.inputs = backend, self.inputs
        return function


def numbers(dtype: torch.dtype) -> Callable[..., Tensor]:
    return functools.partial(draw, dtype=dtype)


KERNEL = draw_uniform(4) + 0.1  # not symmetric


def bias_act(x, bias, **more):
    return ops.bias_act(x, bias, act="swish", clamp=0.8, **more)


def upfirdn2d(x, **more):
    return ops.upfirdn2d(x, KERNEL, up=2, down=1, padding=(2, 1, 1, 2), gain=1.5, **more)


def upfirdn2d_add(x, added, bias, **more):
    return ops.upfirdn2d(x, KERNEL, up=2, padding=(2, 1, 2, 1), added=added, bias=bias, clamp=0.7, **more)


def epilogue(x, demod, noise, strength, bias, style0, style1, **more):
    vectors = {"demod": demod, "noise": noise, "strength": strength, "bias": bias}
    return ops.layer_epilogue(x, blur=KERNEL, **vectors, styles=(style0, style1), act="lrelu", clamp=2.0, **more)


def modulation(weight, style, **more):
    """Of the weight's energy as another call left it."""
    kept = ops.OfWeight()
    ops.modulation(weight, 2 * style, weight.dtype, of_weight=kept, **more)
    return ops.modulation(weight, style, weight.dtype, of_weight=kept, **more)


def modulated_conv2d(x, weight, style, bias, **more):
    return ops.modulated_conv2d(x, weight, style, up=2, kernel=KERNEL, bias=bias, act="lrelu", clamp=2.0, **more)


def rendering(dtype: torch.dtype, channels: int, hidden: int) -> dict[str, Any]:
    """What the renderer's ops take: planes and network, and points and rays, which get no gradient here."""
    n = numbers(dtype)
    network = n(hidden, channels, seed=1), n(hidden, seed=2), n(4, hidden, seed=3) / hidden**0.5, n(4, seed=4)
    t = (0.5 + draw_uniform(1, 3, 4, seed=5)).sort(dim=-1).values.to(dtype)
    directions = torch.nn.functional.normalize(n(1, 3, 3, seed=6), dim=-1)
    return {
        "planes": n(1, 3 * channels, 4, 5),
        "network": network,
        "points": n(1, 5, 3, seed=7).clamp(-0.9, 0.9),
        "rays": (n(1, 3, 3, seed=8) / 4, directions, t),
    }


def renderer_cases(dtype: torch.dtype, backend: str, channels: int, hidden: int) -> dict[str, Case]:
    given = rendering(dtype, channels, hidden)
    inputs, rays = (given["planes"], *given["network"]), given["rays"]

    def sample(planes, **more):
        return ops.sample_triplane(planes, given["points"].to(planes.dtype), **more)

    def decode(planes, *network, **more):
        return ops.decode_triplane(planes, given["points"].to(planes.dtype), ops.Network(*network), **more)

    def coarse_to_fine(planes, *network, **more):
        origins, directions, t = (x.to(planes.dtype) for x in rays)

        def resample(coarse: Tensor) -> Tensor:
            return t + 0.1 * torch.tanh(coarse[..., -1])

        return ops.decode_triplane_coarse_to_fine(
            planes, origins, directions, t, ops.Network(*network), resample, 1.3, **more
        )

    return {
        f"{name}-{backend}": Case(f"{name}-{backend}", op, backend, call, inputs[:count], 1)
        for name, op, call, count in (
            ("sample_triplane", "sample_triplane", sample, 1),
            ("decode_triplane", "decode_triplane", decode, 5),
            ("coarse_to_fine", "decode_triplane", coarse_to_fine, 5),
        )
    }


T = (0.5 + draw_uniform(1, 2, 5)).sort(dim=-1).values.float()
T_FINE = (0.5 + draw_uniform(1, 2, 3, seed=1)).sort(dim=-1).values.float()
U = draw_uniform(1, 2, 4, seed=2).sort(dim=-1).values.float()


def composite(values, values_fine, density_noise, background, **more):
    others = {"density_noise": density_noise, "background": background, "return_weights": True, "last_back": True}
    t, t_fine = T.to(values.dtype), T_FINE.to(values.dtype)
    return ops.composite(t, values, t_fine, values_fine, **others, **more)


def sample_importance(raw_density, **more):
    t, u = T.to(raw_density.dtype), U.to(raw_density.dtype)
    return ops.sample_importance(t, raw_density, u, sorted=True, **more)


def sample_stratified(jitter, **more):
    return ops.sample_stratified(*jitter.shape, 0.5, 1.5, jitter=jitter, **more)


def cut(x, **more):
    return ops.cut(x, torch.tensor([[1, 2], [0, 3]]), (3, 2), **more)


def cases() -> dict[str, Case]:
    c, n = numbers(CPU), numbers(TRITON)
    x, style = c(2, 3, 4, 5), c(2, 3, seed=1)
    styles = c(2, 3, seed=2), c(2, 3, seed=3)
    vectors = style, c(4, 5, seed=4), c(seed=5), c(3, seed=6), *styles
    weight = c(4, 3, 3, 3, seed=7)
    found = {
        "bias_act": (bias_act, (x, c(3, seed=1)), 2),
        "upfirdn2d": (upfirdn2d, (x,), 2),
        "upfirdn2d_add": (upfirdn2d_add, (x, c(2, 3, 8, 10, seed=1), c(3, seed=2)), 2),
        "layer_epilogue": (epilogue, (c(2, 3, 5, 6), *vectors), 2),
        "modulation": (modulation, (weight, c(2, 3)), 2),
        "modulated_conv2d": (modulated_conv2d, (x, weight, style, c(4, seed=2)), 2),
    }
    on = {"bias_act": "bias_act", "upfirdn2d": "upfirdn2d", "upfirdn2d_add": "upfirdn2d"}
    found = {
        f"{name}-cpu": Case(f"{name}-cpu", on.get(name, "modulated_conv2d"), "cpu", call, inputs, order)
        for name, (call, inputs, order) in found.items()
    }
    found |= renderer_cases(CPU, "cpu", 2, 5) | renderer_cases(TRITON, "triton", 8, 16)
    name = "sample_stratified-triton"
    found[name] = Case(name, "sample_importance", "triton", sample_stratified, (U,), 0)
    for backend, r in (("cpu", c), ("triton", n)):
        values = r(1, 2, 5, 4), r(1, 2, 3, 4, seed=1), r(1, 2, 8, seed=2), r(1, 2, 3, seed=3)
        for call, inputs, order in ((composite, values, 1), (sample_importance, (r(1, 2, 5),), 0)):
            found[f"{call.__name__}-{backend}"] = Case(
                f"{call.__name__}-{backend}", call.__name__, backend, call, inputs, order
            )
        found[f"cut-{backend}"] = Case(f"cut-{backend}", "cut", backend, cut, (r(2, 3, 5, 6),), 2)
    return {name: case for name, case in found.items() if backends.status()[case.op][case.backend] is None}


CASES = cases()
every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DIFFERENTIABLE = {name: case for name, case in CASES.items() if case.order}
differentiable = pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
SOME = [CASES[name] for name in ("bias_act-cpu", "decode_triplane-cpu", "composite-triton") if name in CASES]
some_ops = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
TWICE = {name: case for name, case in CASES.items() if case.order == 2}
twice_differentiable = pytest.mark.parametrize("case", TWICE.values(), ids=TWICE)


def same(case: Case, measure: Callable[[Function], Any]) -> None:
    """What is measured of the op on its backend is what is measured of the reference.

    To the tolerance of its dtype; or, where sums are long, as near to float64 as twice the error of the reference.
    """
    actual, expected = (torch.utils._pytree.tree_leaves(measure(case.on(name))) for name in (case.backend, "reference"))
    assert len(actual) == len(expected) > 0
    try:
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert (one is None) == (other is None), f"result {i}"
            if one is not None:
                assert_close(one.detach(), other.detach().to(one.dtype), f"result {i}")
    except AssertionError:
        if case.backend != "triton":
            raise
        precise = case._replace(inputs=tuple(x.double() for x in case.inputs)).on("reference")
        truths = torch.utils._pytree.tree_leaves(measure(precise))
        for i, (one, other, truth) in enumerate(zip(actual, expected, truths, strict=True)):
            assert_error_within_reference(one.detach(), other.detach(), truth.detach(), f"result {i}")


def smallest(case: Case) -> int:
    """Which input is."""
    return min(range(len(case.inputs)), key=lambda i: case.inputs[i].numel())


def other_numbers(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [0.5 * x + 0.25 for x in inputs]


def leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in inputs]


def squares(results: Sequence[Tensor]) -> Tensor:
    return sum(y.square().sum() for y in results)


def gradients(function: Function, order: int) -> Callable[..., tuple[Tensor, ...]]:
    """First, or with order 2 second derivatives to all inputs."""

    def derived(*inputs: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(squares(function(*inputs)), inputs, create_graph=order == 2)
        return grads if order == 1 else torch.autograd.grad(squares(grads), inputs)

    return derived


class Module(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(*inputs)


def check_seen(case: Case, function: Function, graph: torch.fx.Graph) -> None:
    """The op is in the graph as what it is, unless its backend is torch's own operations, or this is the reference."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    ours = any(target.startswith("epigraf_fast.") for target in targets)
    assert ours == (function.backend == case.backend != "reference" and case.name != "sample_triplane-cpu"), targets


# --- what looks at the operations of torch


@some_ops
@pytest.mark.parametrize(
    "how", [{}, {"pre_dispatch": True}, {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True}], ids=str
)
def test_make_fx(case, how):
    def measure(function):
        traced = make_fx(function, **how)(*function.inputs)
        check_seen(case, function, traced.graph)
        return traced(*other_numbers(function.inputs))

    same(case, measure)


@differentiable
def test_make_fx_of_derivatives(case):
    def measure(function):
        traced = make_fx(gradients(function, case.order))(*leaves(function.inputs))
        return traced(*leaves(other_numbers(function.inputs)))

    same(case, measure)


@every_op
def test_export(case):
    def measure(function):
        program = torch.export.export(Module(function), function.inputs)
        check_seen(case, function, program.graph)
        return program.module()(*other_numbers(function.inputs))

    same(case, measure)


@some_ops
def test_strict_export(case):
    def measure(function):
        program = torch.export.export(Module(function), function.inputs, strict=True)
        check_seen(case, function, program.graph)
        return program.module()(*other_numbers(function.inputs))

    same(case, measure)


def test_export_of_any_batch_to_a_file():
    case = CASES["layer_epilogue-cpu"]
    batch = torch.export.Dim("batch", min=2)
    fixed = (3, 4)  # strength and bias have no batch; noise does not either
    shapes = tuple({0: batch} if i not in (2, *fixed) else None for i in range(len(case.inputs)))
    program = torch.export.export(Module(case.on("cpu")), case.inputs, dynamic_shapes=(shapes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    larger = [x if shape is None else torch.cat([x, 2 * x]) for x, shape in zip(case.inputs, shapes, strict=True)]
    for one, other in zip(torch.export.load(file).module()(*larger), case.on("reference")(*larger), strict=True):
        assert_close(one, other, "y")


@every_op
def test_jit_trace(case):
    def measure(function):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the checks look at is taken for constant
            traced = torch.jit.trace(function, function.inputs)
        kinds = {node.kind().split("::")[0] for node in traced.graph.nodes()}
        assert kinds <= {"prim", "aten"}  # it runs where this package is not
        results = traced(*other_numbers(function.inputs))
        return results if not case.order else (results, gradients(traced, 1)(*leaves(other_numbers(function.inputs))))

    same(case, measure)


@every_op
def test_fake_tensors_have_the_layout_of_real_ones(case):
    function = case.on(case.backend)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in case.inputs]
    outside = function(*fakes)
    with mode:
        inside = function(*fakes)
    for fake, other, real in zip(inside, outside, function(*case.inputs), strict=True):
        assert type(fake) is type(other) is FakeTensor
        layout = real.shape, real.dtype, real.stride()
        assert layout == (fake.shape, fake.dtype, fake.stride()) == (other.shape, other.dtype, other.stride())


@every_op
def test_compile(case):
    def measure(function):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        if not case.order:
            return compiled(*function.inputs)
        inputs = leaves(function.inputs)
        results = compiled(*inputs)
        return results, torch.autograd.grad(squares(results), inputs)

    same(case, measure)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_compile_of_a_transform(transform):
    case = CASES["bias_act-cpu"]

    def measure(function):
        x, bias = function.inputs

        def run(x):
            if transform == "vmap":
                return torch.func.vmap(lambda one: function(one[None], bias)[0])(x)
            if transform == "grad":
                return torch.func.grad(lambda x: squares(function(x, bias)))(x)
            return torch.func.jvp(lambda x: function(x, bias)[0], (x,), (x,))

        torch._dynamo.reset()
        return torch.compile(run, backend="aot_eager", fullgraph=True)(x)

    same(case, measure)


class Recorder(TorchDispatchMode):
    """Calls of this package's ops: name -> arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "epigraf_fast":
            self.calls.setdefault(op._opname, []).append(args)
        return op(*args, **(kwargs or {}))


@functools.cache
def recorded() -> dict[str, list[tuple[Any, ...]]]:
    """What every op is called with by the cases and their derivatives."""
    with Recorder() as recorder:
        for case in CASES.values():
            function = case.on(case.backend)
            function(*case.inputs)
            for order in range(1, case.order + 1):
                gradients(function, order)(*leaves(case.inputs))
    return recorder.calls


def registered() -> list[str]:
    found = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if OURS.match(name)}
    missing = backends.status()["composite"]["triton"] is not None or backends.status()["bias_act"]["cpu"] is not None
    return [] if missing else sorted(found)


OURS = re.compile("epigraf_fast::")
UNDIFFERENTIABLE = {
    "sample_stratified",
    "sample_importance",
    "sample_triplane_backward",
    "decode_triplane_backward",
    "composite_backward",
    "bias_act_double_backward",
    "layer_epilogue_double_backward",
}


@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    """torch's own check of schema, fake and derivatives, of every op that is registered; what takes longest, of the
    call with most tensors alone."""
    calls = {str([None if x is None else getattr(x, "shape", x) for x in args]): args for args in recorded()[name]}
    checks = ["test_aot_dispatch_dynamic", "test_schema", "test_autograd_registration", "test_faketensor"]
    for args in sorted(calls.values(), key=lambda args: -sum(isinstance(x, Tensor) for x in args)):
        plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
        if name not in UNDIFFERENTIABLE:
            constant = (
                "points",
                "origins",
                "directions",
                "t",
                "t_fine",
                "kernel",
                "blur",
                "u",
                "seed",
                "noise_std",
                "known",
            )
            op = getattr(torch.ops.epigraf_fast, name).default
            for i, argument in enumerate(op._schema.arguments):
                if isinstance(plain[i], Tensor) and plain[i].is_floating_point() and argument.name not in constant:
                    plain[i].requires_grad_()
        torch.library.opcheck(getattr(torch.ops.epigraf_fast, name).default, tuple(plain), test_utils=checks)
        checks = checks[-3:]


def test_the_table_of_ops_is_complete():
    if registered():
        assert {*recorded()} == {*registered()}


def test_what_was_exported_refuses_a_gradient_that_it_has_not():
    given = rendering(CPU, 2, 5)

    def decode(planes, points, *network):
        return ops.decode_triplane(planes, points, ops.Network(*network), backend="cpu")

    program = torch.export.export(Module(decode), (given["planes"], given["points"], *given["network"]))
    points = given["points"].clone().requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r'decode_triplane: .* no gradient to origins; use backend="reference"'
    ):
        program.module()(given["planes"], points, *given["network"])


# --- transforms


@differentiable
def test_dual_numbers(case):
    def measure(function):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, 1 - x) for x in function.inputs]
            results = [forward_ad.unpack_dual(y) for y in function(*duals)]
            assert all(y.tangent is not None for y in results if y.primal.requires_grad)
            return results

    same(case, measure)


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.order], ids=lambda case: case.name)
def test_what_has_no_derivative_has_no_tangent(case):
    def measure(function):
        with forward_ad.dual_level():
            return [
                forward_ad.unpack_dual(y) for y in function(*(forward_ad.make_dual(x, 1 - x) for x in function.inputs))
            ]

    same(case, measure)


@every_op
def test_vmap_and_jvp(case):
    def measure(function):
        many = torch.func.vmap(function)(*(torch.stack([x, 2 * x, -x]) for x in function.inputs))
        return many, torch.func.jvp(function, function.inputs, tuple(other_numbers(function.inputs)))

    same(case, measure)


@some_ops
def test_other_transforms(case):
    def measure(function):
        of = smallest(case)
        jacobians = [transform(function, of)(*function.inputs) for transform in (torch.func.jacrev, torch.func.jacfwd)]
        return jacobians, torch.func.functionalize(function)(*function.inputs)

    same(case, measure)


@differentiable
def test_gradients_by_torch_func(case):
    everything = tuple(range(len(case.inputs)))
    same(case, lambda function: torch.func.grad(lambda *x: squares(function(*x)), everything)(*function.inputs))


@twice_differentiable
def test_hessian(case):
    of = smallest(case)

    def measure(function):
        def loss(x):
            return squares(function(*function.inputs[:of], x, *function.inputs[of + 1 :]))

        x = function.inputs[of]
        forward = {"outer_jacobian_strategy": "forward-mode", "vectorize": True}
        hessian = torch.autograd.functional.hessian
        return torch.func.hessian(loss)(x), hessian(loss, x, vectorize=True), hessian(loss, x, **forward)

    same(case, measure)


def directions(results: Sequence[Tensor], count: int) -> list[Tensor]:
    return [draw(count, *y.shape, seed=i, dtype=y.dtype) for i, y in enumerate(results)]


@differentiable
@pytest.mark.parametrize("kind", ["batched", "vmap", "dual"])
def test_gradients_of_many_or_dual_directions(case, kind):
    """The forward was plain; what is special comes with the gradients."""

    def measure(function):
        inputs = leaves(function.inputs)
        results = [y for y in function(*inputs) if y.requires_grad]
        grads = directions(results, 3)
        if kind == "batched":
            return torch.autograd.grad(results, inputs, grads, is_grads_batched=True)
        if kind == "vmap":
            return torch.func.vmap(lambda *grads: torch.autograd.grad(results, inputs, grads, retain_graph=True))(
                *grads
            )
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x[0], x[1]) for x in grads]
            return [forward_ad.unpack_dual(x) for x in torch.autograd.grad(results, inputs, duals)]

    if kind == "dual" and case.name == "sample_triplane-cpu":
        pytest.skip("torch's grid sampler has no forward-mode derivative, and says so")
    same(case, measure)


@twice_differentiable
@pytest.mark.parametrize("kind", ["batched", "dual", "first batched"])
def test_second_derivatives_of_many_or_dual_directions(case, kind):
    def measure(function):
        inputs = leaves(function.inputs)
        results = [y.square() for y in function(*inputs)]
        if kind == "first batched":
            many = directions(results, 3)
            grads = torch.autograd.grad(results, inputs, many, is_grads_batched=True, create_graph=True)
            return torch.autograd.grad(squares(grads), inputs)
        grads = torch.autograd.grad(sum(y.sum() for y in results), inputs, create_graph=True)
        many = directions(grads, 3)
        if kind == "batched":
            return torch.autograd.grad(grads, inputs, many, is_grads_batched=True)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x[0], x[1]) for x in many]
            return [forward_ad.unpack_dual(x) for x in torch.autograd.grad(grads, inputs, duals)]

    same(case, measure)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_functional_jacobian(vectorize, strategy):
    if strategy == "forward-mode" and not vectorize:
        pytest.skip("torch has none")
    case = CASES["bias_act-cpu"]
    jacobian = functools.partial(torch.autograd.functional.jacobian, vectorize=vectorize, strategy=strategy)
    same(case, lambda function: jacobian(lambda *x: function(*x)[0], function.inputs))


def test_noise_of_a_seed_is_refused_under_transforms():
    seed = torch.zeros(1, dtype=torch.int64)
    values = draw(1, 2, 5, 4, dtype=torch.float32)

    def noisy(values, **more):
        return ops.composite(T, values, noise_std=0.5, seed=seed, backend="triton", **more).rgb

    with pytest.raises(ValueError, match=r'composite: seed must be None .*use backend="reference"'):
        torch.func.vmap(noisy)(values[None])
    values.requires_grad_()
    rgb = noisy(values)
    with pytest.raises(NotImplementedError, match=r'composite: .*density_noise, or use backend="reference"'):
        torch.autograd.grad(rgb, values, torch.ones(2, *rgb.shape), is_grads_batched=True)


# --- tensors and surroundings


@every_op
def test_negated_views(case):
    """`torch.conj(z).imag` is one: memory that holds the numbers with another sign."""

    def negated(x):
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    def measure(function):
        inputs = leaves(function.inputs)
        views = [negated(x) for x in inputs]
        assert all(x.is_neg() for x in views)
        results = [y.square() for y in function(*views) if y.requires_grad or not case.order]
        if not case.order:
            return results
        grads = torch.autograd.grad(results, inputs, [negated(y.detach()) for y in results], create_graph=True)
        if case.order == 1:
            return results, grads
        return results, grads, torch.autograd.grad(grads, inputs, [negated(x.detach()) for x in grads])

    same(case, measure)


class Subclass(torch.Tensor):
    pass


@every_op
def test_tensors_of_a_subclass(case):
    def measure(function):
        results = function(*(x.as_subclass(Subclass) for x in function.inputs))
        return [y.as_subclass(torch.Tensor) for y in results]

    same(case, measure)


@every_op
def test_expanded_inputs(case):
    """Strides of zero."""
    same(case, lambda function: function(*(x[:1].expand_as(x) if x.ndim else x for x in function.inputs)))


def surroundings() -> dict[str, Callable[[], Any]]:
    return {
        "device": lambda: torch.device("cpu"),
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
        "saved on the cpu": torch.autograd.graph.save_on_cpu,
        "anomalies": torch.autograd.detect_anomaly,
        "flops": lambda: FlopCounterMode(display=False),
    }


@some_ops
@pytest.mark.parametrize("name", surroundings())
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_surroundings(case, name):
    def measure(function):
        with surroundings()[name]():
            inputs = leaves(function.inputs)
            results = function(*inputs)
            return results if name == "inference" or not case.order else torch.autograd.grad(squares(results), inputs)

    same(case, measure)


@differentiable
def test_checkpoint(case):
    def measure(function):
        inputs = leaves(function.inputs)
        return torch.autograd.grad(squares(checkpoint(function, *inputs, use_reentrant=False)), inputs)

    same(case, measure)


def test_second_derivative_to_a_bias_with_gaps():
    """A copy of it that the forward made would have no past."""

    def measure(function):
        x, bias = CASES["bias_act-cpu"].inputs
        both = torch.stack([bias, bias], dim=1).requires_grad_()
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(squares(function(x, both[:, 0])), x, create_graph=True)
        return torch.autograd.grad(squares([grad]), both)

    same(CASES["bias_act-cpu"], measure)


def test_second_derivative_of_a_demodulation_whose_gradient_has_gaps():
    def measure(function):
        inputs = leaves(CASES["modulation-cpu"].inputs)
        demod = function(*inputs)[-1]
        factor = draw(*reversed(demod.shape), seed=9).requires_grad_()
        grads = torch.autograd.grad((demod.exp() * factor.t()).sum(), inputs, create_graph=True)
        return torch.autograd.grad(squares(grads), [*inputs, factor])

    same(CASES["modulation-cpu"], measure)


FILTERED = {
    "layer_epilogue": lambda kernel, **more: ops.layer_epilogue(draw(2, 3, 5, 5), blur=kernel, **more)[0],
    "modulated_layer": lambda kernel, **more: ops.modulated_layer(
        draw(2, 3, 4, 4), draw(2, 3, 3, 3), up=2, kernel=kernel, **more
    )[0],
    "modulated_conv2d": lambda kernel, **more: ops.modulated_conv2d(
        draw(2, 3, 4, 4), draw(2, 3, 3, 3), draw(2, 3), up=2, kernel=kernel, **more
    ),
    "conv2d_resample": lambda kernel, **more: ops.conv2d_resample(
        draw(2, 3, 4, 4), draw(2, 3, 3, 3), down=2, kernel=kernel, **more
    ),
}


@pytest.mark.skipif("bias_act-cpu" not in CASES, reason="needs the extension")
@pytest.mark.parametrize("op", FILTERED)
def test_gradient_to_the_low_pass_filter(op):
    """The reference gives it where no backend is named; a named one says that it has none."""
    kernel = KERNEL.clone().requires_grad_()
    (expected,) = torch.autograd.grad(FILTERED[op](kernel, backend="reference").square().sum(), kernel)
    (actual,) = torch.autograd.grad(FILTERED[op](kernel).square().sum(), kernel)
    assert_close(actual, expected, "gradient to the filter")
    with pytest.raises(NotImplementedError, match=f'{op}: backend "cpu" has no gradient .*use backend="reference"'):
        FILTERED[op](kernel, backend="cpu")
    by_func = torch.func.grad(lambda kernel: FILTERED[op](kernel, backend="cpu").square().sum())(KERNEL)
    assert_close(by_func, expected, "by torch.func")
