"""The ops' tests on compiled kernels: the PTX of sm_70, sm_80 and sm_90, executed on CPU tensors by `bench.ptx`.

A test runs so once for every architecture, under the mark `compiled`. That takes minutes, so of those tests an ordinary
run has the ones `SELECTED`; `make compiled` runs all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import emulate

from bench.resources import of_csrc
from epigraf_fast.ops import backends, native

ARCHS = (70, 80, 90)

# test -> the cases of it that an ordinary run has: what their names hold, one word or several.
SELECTED: dict[str, tuple[str, ...]] = {
    "test_triton_values_by_hand": ("",),
    "test_triton_ray_by_hand": ("",),
    "test_triton_at_points": ("131-False",),
    "test_triton_reads_and_writes_nothing_outside": ("",),
    "test_first_derivative_by_hand": ("lrelu", "softplus"),
    "test_upsampling_convolution_by_hand": ("",),
    "test_demodulation_floor_by_hand": ("sm_80",),  # of csrc's largest files: sm_70's code takes half a minute
}


def options(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compiled",
        choices=("none", "some", "all"),
        default="some",
        help="which of the tests on compiled kernels run",
    )


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out what `--compiled` leaves out."""
    wanted = config.getoption("--compiled")
    if wanted == "all":
        return
    left, kept = [], []
    for item in items:
        runs = item.get_closest_marker("compiled") is None or (wanted == "some" and _selected(item))
        (kept if runs else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _selected(item: Any) -> bool:
    name, _, case = item.name.partition("[")
    return any(all(word in case for word in words.split()) for words in SELECTED.get(name, ()))


def on_triton(*, compiled: bool = True) -> Any:
    """Marks a test of the Triton kernels: it runs on the GPU, or else interpreted and, if `compiled`, compiled."""
    lacking = backends.status()["composite"]["triton"]
    if torch.cuda.is_available() or lacking is not None:
        return pytest.mark.skipif(lacking is not None, reason=lacking or "")
    params = [pytest.param(None, id="interpreted")]
    if compiled:
        params += [pytest.param(arch, id=f"sm_{arch}", marks=pytest.mark.compiled) for arch in ARCHS]
    return pytest.mark.parametrize("triton_kernels", params, indirect=True)


def on_each_device() -> pytest.MarkDecorator:
    """Parametrizes a test of Triton by its `device`: the GPU where there is one, else the CPU, in the interpreter."""
    lacking = backends.status()["composite"]["triton"]
    skip = pytest.mark.skipif(lacking is not None, reason=lacking or "")
    gpu = torch.cuda.is_available()
    params = [pytest.param("cuda", marks=pytest.mark.gpu)] if gpu else [pytest.param("cpu", marks=skip)]
    return pytest.mark.parametrize("device", params)


_arch: int | None = None


def tensor_cores() -> bool:
    """Whether the Triton kernels of a test multiply matrices on tensor cores: not interpreted, and from sm_80 on."""
    if _arch is None:
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return _arch >= 80


def approximate() -> bool:
    """Whether exponentials, logarithms, roots and divisions of a test's Triton kernels are a GPU's: not interpreted."""
    return _arch is not None or torch.cuda.is_available()


@contextlib.contextmanager
def triton_kernels(arch: int) -> Iterator[None]:
    """What Triton launches in this block is compiled for the architecture and executed."""
    from bench.ptx import triton_launch
    from epigraf_fast.kernels import decode_triplane, sample_triplane

    run = functools.partial(triton_launch.execute, count=False)
    with pytest.MonkeyPatch.context() as patch, triton_launch.recorded(run, arch):
        patch.setattr(sys.modules[__name__], "_arch", arch)
        for module in (decode_triplane, sample_triplane):
            patch.setattr(module, "architecture", lambda device: arch)
        yield


def csrc_params() -> list[Any]:
    """The backends of csrc's tests that are compiled kernels.

    sm_90's code is sm_80's: test_csrc_compile.py holds that.
    """
    if importlib.util.find_spec("pybind11") is None:
        return []
    archs = [arch for arch in ARCHS[:2] if of_csrc.lacking(arch) is None]
    return [pytest.param(f"sm_{arch}", marks=pytest.mark.compiled) for arch in archs]


def csrc_kernels(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    """For the rest of a test, the ops' backend cpu launches csrc's kernels, compiled for the architecture."""
    from bench.ptx import csrc_launch

    emulate(monkeypatch)
    monkeypatch.setattr(native, "launch", functools.partial(csrc_launch.launch_compiled, arch, count=False))
