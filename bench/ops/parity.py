"""The gate before every measurement: no speed is printed for a wrong kernel.

Truth is the reference in float64. The error of what is measured may be twice the error of the reference in the same
dtype and arithmetic, plus a rounding or two of the largest value (in a network, in each layer): the rule of the tests.
Gradients to parameters are sums over all images and pixels; they may round at every level of a pairwise sum.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import WHOLES, Case, Inputs

ERROR_FACTOR = 2.0
ERROR_ROUNDINGS = 2.0
CONVOLVING = ("modulated_conv2d", "upfirdn2d")
# Factors of products have 10 bits in these, whatever the tensors' dtype.
PRODUCT_ROUNDING = {"tf32": 2.0**-11, "fp16": 2.0**-11}


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Args:
        wrong: What is wrong, or None.
        error: The largest error over what is allowed, over all values compared; at most 1 where nothing is wrong.
        where: The output or gradient with that error.
    """

    wrong: str | None
    error: float
    where: str


@contextlib.contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """TF32 in torch's own products for "tf32", none for the others."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def leaves(case: Case, inputs: Inputs) -> Inputs:
    """The inputs, those that get a gradient as leaves of a new graph."""
    return {name: x.detach().requires_grad_(name in case.wanted) for name, x in inputs.items()}


def draws_like(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Incoming gradients: normal numbers in the shape, dtype and memory layout of the tensors, as a network's are."""
    out = []
    for i, x in enumerate(tensors):
        generator = torch.Generator(x.device).manual_seed(seed + i)
        out.append(torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator, device=x.device)))
    return tuple(out)


def evaluate(case: Case, inputs: Inputs, backend: str, mode: str, incoming: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and, by mode, gradients and second derivatives, each under its name.

    Args:
        mode: "fwd" gives outputs, "bwd" and "step" gradients too, "double" the gradients of gradients too.
        incoming: Name -> incoming gradient, of outputs and (for "double") of gradients.
    """
    values = leaves(case, inputs)
    outputs = case.call(values, backend)
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    if mode == "fwd" or not case.wanted:
        return {name: y.detach() for name, y in found.items()}
    wanted = [values[name] for name in case.wanted]
    grad_ys = [incoming[f"output {i}"].to(y).requires_grad_(mode == "double") for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, wanted, grad_ys, create_graph=mode == "double")
    found |= {f"gradient to {name}": grad for name, grad in zip(case.wanted, grads, strict=True)}
    if mode == "double":
        grad_grads = [incoming[f"gradient to {n}"].to(g) for n, g in zip(case.wanted, grads, strict=True)]
        to = [*wanted, *grad_ys]
        # One that is left out is 0: an op need not write what it knows to be 0 everywhere.
        seconds = torch.autograd.grad(grads, to, grad_grads, allow_unused=True, materialize_grads=True)
        names = [*case.wanted, *(f"output {i}" for i in range(len(outputs)))]
        found |= {f"second gradient to {name}": second for name, second in zip(names, seconds, strict=True)}
    return {name: y.detach() for name, y in found.items()}


def _by_image(case: Case, inputs: Inputs, mode: str, incoming: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the reference gives, image by image: it needs much memory."""
    whole: dict[str, list[Tensor]] = {}
    for i, image in enumerate(case.images(inputs)):
        grads = {name: x if name.split()[-1] in case.shared else x[i : i + 1] for name, x in incoming.items()}
        for name, y in evaluate(case, image, "reference", mode, grads).items():
            whole.setdefault(name, []).append(y)
    return {name: sum(ys) if name.split()[-1] in case.shared else torch.cat(ys) for name, ys in whole.items()}


def _references(case: Case, inputs: Inputs, mode: str, incoming: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What the reference gives in the inputs' dtypes: image by image, at once, and on contiguous inputs.

    Libraries choose another algorithm of convolution, with another error, for each.
    """
    yield _by_image(case, inputs, mode, incoming)
    contiguous = {name: x.contiguous() for name, x in inputs.items()}
    others = [inputs] if case.batch > 1 else []
    if case.op in CONVOLVING:
        others.append(contiguous)
    for other in others:
        with contextlib.suppress(torch.OutOfMemoryError):
            yield evaluate(case, other, "reference", mode, incoming)


class Parity:
    """The truth of one case and mode, and what is allowed to miss it by; made once, asked for every backend."""

    def __init__(self, case: Case, inputs: Inputs, mode: str) -> None:
        self.case, self.inputs, self.mode = case, inputs, mode
        with torch.no_grad():
            outputs = case.call(inputs, "reference")
        drawn = dict(zip((f"output {i}" for i in range(len(outputs))), draws_like(outputs, 40), strict=True))
        wanted = tuple(inputs[name] for name in case.wanted)
        drawn |= dict(zip((f"gradient to {n}" for n in case.wanted), draws_like(wanted, 50), strict=True))
        self.incoming = drawn
        with arithmetic("fp32"):
            double = {name: x.double() for name, x in inputs.items()}
            truth = _by_image(case, double, mode, drawn)
        self.truth = {name: y for name, y in truth.items() if name.split()[-1] not in case.unjudged}
        self.allowed: dict[str, float] = {}  # group -> error over the largest value of the truth
        with arithmetic(case.dtype):
            for reference in _references(case, inputs, mode, drawn):
                for name, truth in self.truth.items():
                    rounding = max(torch.finfo(reference[name].dtype).eps, PRODUCT_ROUNDING.get(case.dtype, 0.0))
                    rounding *= case.layers
                    rounding += self._levels(name) * torch.finfo(torch.float32).eps
                    allowed = ERROR_FACTOR * _relative(reference[name], truth) + ERROR_ROUNDINGS * rounding
                    self.allowed[self._group(name)] = max(allowed, self.allowed.get(self._group(name), 0.0))

    def _levels(self, name: str) -> float:
        """Of a pairwise sum that a gradient to a parameter is."""
        if name.split()[-1] not in self.case.shared:
            return 0.0
        return math.log2(max(1.0, self.truth["output 0"].numel() / self.truth[name].numel()))

    def _group(self, name: str) -> str:
        """What is judged as one: gradients to the parameters of a whole, else every value by itself."""
        whole = self.case.op in WHOLES and name.split()[-1] in self.case.shared
        return "gradients to parameters" if whole else name

    def check(self, backend: str) -> Verdict:
        """Compares a backend with the truth."""
        with arithmetic(self.case.dtype):
            found = evaluate(self.case, self.inputs, backend, self.mode, self.incoming)
        return self.judge(found)

    def judge(self, found: dict[str, Tensor]) -> Verdict:
        """Compares named values with the truth."""
        worst, where = 0.0, ""
        for name, truth in self.truth.items():
            if name not in found and name.startswith("second gradient"):
                found = {**found, name: torch.zeros_like(truth)}  # autograd's None
            if name not in found:
                return Verdict(f"{name} is missing", float("inf"), name)
            actual = found[name].double()
            if actual.shape != truth.shape:
                return Verdict(f"{name} has shape {list(actual.shape)}, not {list(truth.shape)}", float("inf"), name)
            if not torch.isfinite(actual).all():
                return Verdict(f"{name} has NaN or infinite values", float("inf"), name)
            error, allowed = _relative(actual, truth), self.allowed[self._group(name)]
            if error > worst * allowed:
                worst, where = error / allowed, name
            if error > allowed:
                text = f"{name}: the error is {error:.3g} of the largest value, {allowed:.3g} is allowed"
                return Verdict(f"{text}: {ERROR_FACTOR:g} times the reference's own and a rounding", worst, name)
        return Verdict(None, worst, where)


def _relative(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth| / max |truth|."""
    if truth.numel() == 0:
        return 0.0
    error, largest = (actual.double() - truth).abs().amax(), truth.abs().amax()
    return float(error / largest) if largest else float(error)
