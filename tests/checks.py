"""What the tests measure with: the only table of tolerances, and the assertions that read it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

# name: (relative, absolute); |actual - expected| <= absolute + relative |expected|, element by element.
TOLERANCES: dict[torch.dtype | str, tuple[float, float]] = {
    # One formula evaluated in two orders, in the dtype of the actual tensor.
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.float16: (4e-3, 2e-3),
    torch.bfloat16: (3e-2, 2e-2),
    # The same numbers: copies, layouts, a fixed order of operations.
    "exact": (0.0, 0.0),
    # Numbers worked by hand, or printed, to seven digits.
    "hand": (1e-6, 1e-7),
    # A whole modulated layer in fp16 against the same in fp32: products of hundreds of rounded numbers.
    "fp16_layer": (1e-2, 1e-2),
    # An analytic derivative against a central difference of step GRADCHECK_STEP, in float64.
    "gradcheck": (1e-6, 1e-7),
    # The same derivative, once more: on a GPU sums of atomic additions and of some convolutions have no order.
    "again": (0.0, 1e-10),
    # A patch rendered in fp32 against the crop of the image: directions differ by roundings, and with them all samples.
    "patch_crop": (1e-5, 1e-5),
    # A whole tiny network in fp32 against the same in fp64.
    "network_fp32": (1e-3, 1e-4),
    # A golden loss, of order one: room for other CPUs and releases of torch, not for another formula.
    "golden": (1e-4, 0.0),
    # Gradients of two processes against those of one, each divided by its largest value: another order of one sum.
    "distributed": (0.0, 1e-6),
    # Resampling in fp32 against the same in float64: two filters of 144 taps on numbers up to 1.
    "augment_identity": (0.0, 2e-6),
    # The whole of the reflected surroundings against as much as is needed: 1e-4 of the range of 2.
    "augment_margins": (0.0, 2e-4),
    # Depths of the inverted sphere, whose denominators carry the published 1e-6.
    "background_depth": (1e-4, 1e-5),
    # A smooth blob that the pipeline moves against the moved formula: bilinear sampling at twice the resolution.
    "augment_blob": (0.0, 1e-2),
    # The same losses with other kernels: ten steps of training do not multiply roundings by more than a hundred.
    "ten_steps": (1e-5, 0.0),
}
GRADCHECK_STEP = 1e-6
HANG = 900.0  # seconds after which something hangs: no test depends on how fast a machine is
SIGMAS = 4.0  # how far a statistic of a seeded draw may lie from its mean, in standard deviations

# A kernel may err so many times as much as the reference does in the kernel's own dtype, plus so many roundings of the
# largest value, for the cases where the reference happens to be exact.
ERROR_FACTOR = 2.0
ERROR_ROUNDINGS = 2.0
# What a kernel's arithmetic rounds beyond that, in roundings of fp32, 2^-23 of the largest value:
# A product on tensor cores of factors in two parts (Triton's tf32x3, which stands for fp32 from sm_80 on). The low part
# of a factor, at most 2^-11 of it, is cut off after 11 bits, an error of 2^-21 for each factor; the product of both low
# parts, 2^-22, is left out.
PRODUCT_ROUNDINGS = (2 * 2**-21 + 2**-22) / 2**-23
# An approximate exponential, logarithm, square root or division of a GPU.
APPROXIMATE_ROUNDINGS = 2.0
# A sum of n terms one after the other: n roundings of half a place or less without a common sign, most of them of
# partial sums that are smaller than the largest whole one. Their deviation is below sqrt(n) / 10, and of thousands of
# sums none is off by five times that.
SUM_ROUNDINGS = 0.5


def roundings(*, products: int = 0, terms: int = 0, approximations: int = 0) -> float:
    """What `assert_error_within_reference` allows beyond the rule for the arithmetic of a kernel.

    Args:
        products: Matrix products on tensor cores, one out of the other.
        terms: Of a sum that the kernel makes in another order than the reference.
        approximations: Approximate functions and divisions, one out of the other.
    """
    return PRODUCT_ROUNDINGS * products + SUM_ROUNDINGS * terms**0.5 + APPROXIMATE_ROUNDINGS * approximations


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on shape and seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1) that depend on shape and seed only."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other memory layouts; what lies between them is NaN."""
    gapped = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
    gapped[..., 1::2] = x
    yield "every second element, from the second", gapped[..., 1::2]
    yield "first and last dimension swapped", x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.ndim == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)


def assert_finite(actual: Tensor, what: str) -> None:
    """No NaN, no infinity."""
    bad = ~torch.isfinite(actual)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} values are NaN or infinite, the first at {first}: "
            f"{actual[first].item()}"
        )


def assert_same_specials(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal shape and dtype; NaN, inf and -inf in the same places, and nowhere else."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    for special, is_special in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = is_special(actual) != is_special(expected)
        if differ.any():
            first = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {special} differs in {int(differ.sum())} of {differ.numel()} places, the first at {first}: "
                f"got {actual[first].item()}, expected {expected[first].item()}"
            )


def _index(position: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in position)


def _tensor(x: Any) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64)


def _compared(actual: Any, expected: Any, what: str) -> tuple[Tensor, Tensor]:
    actual, expected = _tensor(actual), _tensor(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    assert_finite(expected, f"{what} (expected)")
    assert_finite(actual, what)
    return actual.cpu().double(), expected.cpu().double()


def assert_close(actual: Any, expected: Any, what: str, tolerance: torch.dtype | str | None = None) -> None:
    """Equal shape, everything finite, every element within the tolerance named; default: that of the actual dtype."""
    if tolerance is None:
        tolerance = actual.dtype if isinstance(actual, Tensor) else torch.float64
    relative, absolute = TOLERANCES[tolerance]
    actual, expected = _compared(actual, expected, what)
    excess = (actual - expected).abs() - (absolute + relative * expected.abs())
    if (excess > 0).any():
        worst = torch.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {excess.numel()} values are off, the worst at {_index(worst)}: "
            f"got {actual[worst].item():.17g}, expected {expected[worst].item():.17g} "
            f"(tolerance {tolerance}: relative {relative:g}, absolute {absolute:g})"
        )


def assert_error_within_reference(
    actual: Tensor, reference: Tensor, truth: Tensor, what: str, more: float = 0.0, largest: float = 0.0
) -> None:
    """max |actual - truth| <= 2 max |reference - truth| + a rounding or two of the largest value.

    Args:
        actual: What a kernel gave.
        reference: What the reference gave in the kernel's own dtype.
        truth: What the reference gave in float64.
        more: `roundings` of fp32 (of float64 for that) that the kernel's arithmetic adds.
        largest: Of the terms that a result is the sum of, where they cancel out; default: the largest of the truth.
    """
    if truth.dtype != torch.float64 or reference.dtype != actual.dtype:
        raise AssertionError(
            f"{what}: dtypes are {actual.dtype}, {reference.dtype} and {truth.dtype}; the first two must agree and the "
            f"third be float64"
        )
    rounding = ERROR_ROUNDINGS * torch.finfo(actual.dtype).eps
    more *= torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    actual, truth = _compared(actual, truth, what)
    reference, _ = _compared(reference, truth, f"{what} (reference)")
    if truth.numel() == 0:
        return
    errors = (actual - truth).abs()
    allowed = ERROR_FACTOR * (reference - truth).abs().max() + rounding * truth.abs().max()
    allowed += more * truth.abs().max().clamp(min=largest)
    if errors.max() > allowed:
        worst = torch.unravel_index(errors.argmax(), errors.shape)
        raise AssertionError(
            f"{what}: the error {errors.max().item():.3g} at {_index(worst)} is above {allowed.item():.3g} "
            f"({ERROR_FACTOR:g} times the reference's own {(reference - truth).abs().max().item():.3g}): "
            f"got {actual[worst].item():.9g}, truth {truth[worst].item():.9g}"
        )


def _differentiable_outputs(outputs: Any) -> tuple[Tensor, ...]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    return tuple(output for output in outputs if output is not None)


def derivatives(function: Callable[..., Any], inputs: dict[str, Tensor], order: int = 2) -> dict[str, Tensor]:
    """Outputs of `function(**inputs)`, a tensor or several; the gradients of their weighted sum; those of such a sum of
    the gradients; and so on. By name.
    """
    inputs = {
        name: x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, x in inputs.items()
    }
    outputs = function(**inputs)
    values = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = {f"out{k}": y for k, y in enumerate(values)}
    for number in range(1, order + 1):
        terms = [
            (v * draw(*v.shape, seed=40 * number + k).to(v)).sum() for k, v in enumerate(values) if v.requires_grad
        ]
        if not terms:
            break  # all that follows is 0
        loss = sum(terms)
        values = torch.autograd.grad(loss, [*inputs.values()], create_graph=number < order, materialize_grads=True)
        found |= {f"derivative {number} to {name}": v for name, v in zip(inputs, values, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def _compare_with_differences(function: Callable[[Tensor], Any], x: Tensor, what: str) -> None:
    relative, absolute = TOLERANCES["gradcheck"]
    try:
        torch.autograd.gradcheck(
            function,
            (x.detach().clone().requires_grad_(),),
            eps=GRADCHECK_STEP,
            rtol=relative,
            atol=absolute,
            nondet_tol=TOLERANCES["again"][1],
        )
    except GradcheckError as error:
        raise AssertionError(f"{what}: {error}") from None


def gradcheck(function: Callable[..., Any], inputs: dict[str, Tensor], what: str) -> None:
    """First derivatives of `function(**inputs)`, a tensor or several, to each float64 input against differences."""
    for name, x in inputs.items():
        _compare_with_differences(
            lambda x, name=name: _differentiable_outputs(function(**{**inputs, name: x})),
            x,
            f"{what}: gradient to {name}",
        )


def gradgradcheck(function: Callable[..., Any], inputs: dict[str, Tensor], what: str) -> None:
    """Second derivatives: the gradient to each input, differentiated to every input and to the incoming gradients."""
    with torch.no_grad():
        outputs = _differentiable_outputs(function(**inputs))
    incoming = {f"grad_y[{i}]": draw(*y.shape, seed=100 + i) for i, y in enumerate(outputs)}
    everything = {**inputs, **incoming}
    for first in inputs:
        for second, x in everything.items():

            def gradient(x: Tensor, first: str = first, second: str = second) -> Tensor:
                values = {**everything, second: x}
                if first != second:
                    values[first] = values[first].detach().clone().requires_grad_()
                ys = _differentiable_outputs(function(**{name: values[name] for name in inputs}))
                pairs = [(y, values[name]) for y, name in zip(ys, incoming, strict=True) if y.requires_grad]
                if not pairs:
                    return torch.zeros_like(values[first])
                ys, grad_ys = zip(*pairs, strict=True)
                (grad_x,) = torch.autograd.grad(ys, values[first], grad_ys, create_graph=True, materialize_grads=True)
                return grad_x

            _compare_with_differences(gradient, x, f"{what}: gradient to {first}, differentiated to {second}")


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as if the disk were full; pytest's own, behind the block, may.

    Nor are modules compiled to files: Python (before 3.12.8) leaves those cut off there, and cannot import them again.
    """
    import resource

    limits, without_files = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = without_files
