"""The ops of csrc/ on every backend that is here: a test that asks for one by name runs once for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled
from csrc_backends import here, use
from epigraf_fast import ops
from epigraf_fast.ops import backends


@pytest.fixture(params=here("bias_act"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def triton_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """What runs the Triton kernels of a test, see `compiled.on_triton`."""
    arch = getattr(request, "param", None)
    if arch is None:
        yield
    else:
        with compiled.triton_kernels(arch):
            yield


def on_backend(op: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """The op on a backend, of tensors on the CPU; cuda's go to the GPU and back, which derivatives follow."""
    if backend != "cuda":
        return functools.partial(op, backend=backend)

    def there(value: Any) -> Any:
        return value.cuda() if isinstance(value, Tensor) and value.device.type == "cpu" else value

    def run(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: there(value) for name, value in kwargs.items()}
        return op(*map(there, args), backend="cuda", **kwargs).cpu()

    return run


@pytest.fixture
def bias_act(backend: str) -> Callable[..., Tensor]:
    return on_backend(ops.bias_act, backend)


@pytest.fixture
def upfirdn2d(backend: str) -> Callable[..., Tensor]:
    return on_backend(ops.upfirdn2d, backend)


@pytest.fixture(params=("base", "v3", "v4"))
def cpu_level(request: pytest.FixtureRequest) -> str:
    """Runs a test in every instruction set of the extension that this processor has."""
    reason = backends.status()["bias_act"]["cpu"]
    if reason is not None:
        pytest.skip(reason)
    from epigraf_fast import _C

    before = _C.cpu_level()
    try:
        _C.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_cpu_level(before)


@pytest.fixture
def threads() -> Callable[[int], None]:
    """`threads(n)`: as many threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
