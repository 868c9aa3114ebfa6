"""Which backends of csrc/ this machine has: tests run once on each; test_backends.py skips once for each other.

"emulated" stands for the CUDA kernels on the CPU, see `emulated`; "sm_70" and so on for their PTX, see `compiled`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated import emulate
from torch import Tensor

import compiled
from checks import assert_close, derivatives, gradcheck, gradgradcheck
from epigraf_fast.ops import backends, native

OPS = ("bias_act", "upfirdn2d", "modulated_conv2d")
KERNELS = ("cpu", "cuda", "emulated")
ALL = ("reference", *KERNELS)


def cpu_levels() -> Iterator[str]:
    """Every instruction set of the extension that this processor has, in use until the next one. Skips without it."""
    reason = backends.status()["bias_act"]["cpu"]
    if reason is not None:
        pytest.skip(reason)
    from epigraf_fast import _C

    before = _C.cpu_level()
    try:
        for level in ("base", "v3", "v4"):
            with contextlib.suppress(ValueError):
                _C.set_cpu_level(level)
                yield level
    finally:
        _C.set_cpu_level(before)


def here(op: str, names: tuple[str, ...] = ALL) -> list[Any]:
    """Those of the names that can run the op, as parameters; cuda is marked gpu."""
    found = [name for name in names if backends.status()[op]["cpu" if name == "emulated" else name] is None]
    params = [pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in found]
    return params + compiled.csrc_params() if "emulated" in found else params


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a backend of those above ready for a test: the `backend` that its ops are then called with."""
    if name == "emulated":
        emulate(monkeypatch)
    elif name.startswith("sm_"):
        compiled.csrc_kernels(monkeypatch, int(name.removeprefix("sm_")))
    else:
        return name
    return "cpu"


def on_backend(op, backend):
    """The op on a backend, of tensors on the CPU; cuda's go to the GPU and back, which derivatives follow."""
    if backend != "cuda":
        return functools.partial(op, backend=backend)

    def there(value):
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return value.cuda() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    def back(value):
        return tuple(x if x is None else x.cpu() for x in value) if isinstance(value, tuple) else value.cpu()

    def run(*args, **kwargs):
        return back(op(*map(there, args), backend="cuda", **{name: there(value) for name, value in kwargs.items()}))

    return run


def on_kernels(op: str) -> pytest.MarkDecorator:
    """For a test of what only kernels do: its `backend` is never the reference."""
    return pytest.mark.parametrize("backend", here(op, KERNELS), indirect=True)


def check_derivatives(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: dict[str, Tensor], what: str
) -> None:
    """First and second derivatives of `function(**inputs)`, float64 on the CPU, on the backend in use.

    Against differences; those of kernels that are emulated, or compiled and executed, of which the thousands of calls
    would take minutes, against the derivatives of the reference, which are compared with differences themselves.
    """
    if not native.on_gpu(next(iter(inputs.values()))):
        gradcheck(function, inputs, what)
        gradgradcheck(function, inputs, what)
        return
    expected = derivatives(reference, inputs)
    for name, actual in derivatives(function, inputs).items():
        assert_close(actual, expected[name], f"{what}: {name}")
