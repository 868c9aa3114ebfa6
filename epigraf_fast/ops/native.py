"""The compiled extension `epigraf_fast._C` as the ops see it: loaded when first needed, called with tensors.

A launcher X is there as X_cpu and, where it was built for CUDA, as X_cuda. Both take the same arguments; the first
then takes a number of threads, the second a stream. Where nvcc built it, kernels are in it; else NVRTC compiles them
when they are first launched.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import nvrtc, verdicts
from .library import constant
from .ranges import annotate

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # as in csrc/common.h

BUILD = "build it with pip install and a C++17 compiler"
NOTE = Path(__file__).parents[1] / "_build.txt"  # which setup.py leaves where a compiler failed


@functools.cache
def extension() -> ModuleType | str:
    """`epigraf_fast._C`, or why it cannot be had."""
    if os.environ.get("EPIGRAF_FAST_EXTENSION") == "0":
        return "EPIGRAF_FAST_EXTENSION=0 in the environment hides the extension"
    # torch is imported by now: the extension then takes torch's OpenMP threads and makes none of its own.
    try:
        module = importlib.import_module("epigraf_fast._C")
        if hasattr(module, "set_cuda_compiler"):
            module.set_cuda_compiler(_machine_code)
        return module
    except ModuleNotFoundError:
        return f"the extension is not built{_why()}: {BUILD}"
    except ImportError as error:
        return f"the extension does not load ({error}): {BUILD}"


@constant
def lacking(backend: str) -> str | None:
    """Why the backend, cpu or cuda, cannot be used; None if it can."""
    module = extension()
    if isinstance(module, str):
        return module
    if backend == "cuda" and not module.cuda_built:
        return f"the extension is built without CUDA{_why()}: EPIGRAF_FAST_CUDA=nvrtc pip install (docs/install.md)"
    if backend == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if backend == "cuda" and _by_driver():
        found = _nvrtc()
        return found if isinstance(found, str) else None
    return _unfit(**module.build_info()) if backend == "cuda" else None


def _by_driver() -> bool:
    """Whether the extension launches through the driver's library, and its kernels are compiled by NVRTC."""
    return hasattr(extension(), "set_cuda_compiler")


def _nvrtc() -> tuple[nvrtc.Nvrtc, int] | str:
    """NVRTC for the current GPU, and the architecture; or why there is none."""
    major, minor = torch.cuda.get_device_capability()
    return nvrtc.find(10 * major + minor, torch._C._cuda_getDriverVersion() // 1000)


def _machine_code(name: str) -> bytes:
    """A kernel's for the current GPU, at its first launch there.

    Raises:
        RuntimeError: It does not compile, or NVRTC is missing.
    """
    found = _nvrtc()
    if isinstance(found, str):
        raise RuntimeError(found)
    return nvrtc.machine_code(name, *found, verdicts.folder("kernels"))


def takes_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether the extension is here, and has the renderer's launchers for these dtypes: all fp32, or all fp64."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return lacking("cpu") is None and (dtypes == {torch.float32} or dtypes == {torch.float64})


def cpu_level() -> tuple[str, str | None] | None:
    """The instruction set that the CPU's launchers use, and the better one that this processor has and the build lacks.

    Either is "base" for plain x86-64 (or another kind of processor), "v3" for AVX2, "v4" for AVX-512. None without the
    extension.
    """
    module = extension()
    if isinstance(module, str):
        return None
    best = module.processor_level()
    return module.cpu_level(), None if best in module.build_info()["cpu_levels"] else best


def _why() -> str:
    """What the compiler said when the extension was built, as an insertion."""
    try:
        return f" ({' '.join(NOTE.read_text(encoding='utf-8').split())})"
    except OSError:
        return ""


def _unfit(cuda: str, cuda_archs: str, **_: Any) -> str | None:
    """Why the driver or the current GPU cannot run what nvcc built.

    Args:
        cuda: Version of nvcc, whose runtime is linked in: a driver of its generation runs it.
        cuda_archs: Numbers of the architectures that there is machine code for; for the last one PTX too, which needs a
            driver as new as nvcc.
    """
    driver = divmod(torch._C._cuda_getDriverVersion(), 1000)  # 12040 is CUDA 12.4
    driver = driver[0], driver[1] // 10
    built = tuple(int(part) for part in cuda.split(".")[:2])
    if driver[0] < built[0]:
        return (
            f"the extension is built by nvcc {cuda}, and the driver is of CUDA {driver[0]}.{driver[1]}: update the "
            "driver, or build it anew: EPIGRAF_FAST_CUDA=nvrtc pip install"
        )
    major, minor = torch.cuda.get_device_capability()
    archs = [int(arch) for arch in cuda_archs.split()]
    if any(arch <= 10 * major + minor and arch // 10 == major for arch in archs):
        return None
    if archs[-1] <= 10 * major + minor and driver >= built:
        return None
    has = f"only for sm_{', sm_'.join(map(str, archs))}: build it anew, EPIGRAF_FAST_CUDA=nvrtc pip install"
    return f"the extension has no code for sm_{major}{minor}, {has}"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a launcher computes in: fp64 for fp64, else fp32. Biases and other small vectors are passed in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def launch(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Calls the launcher of the tensors' device.

    Args:
        tensors: Passed as their addresses, None as a null pointer.
        numbers: What follows them, a dtype by its code in `DTYPES`.
    """
    addresses = []
    for x in tensors:
        if x is None:
            addresses.append(0)
        else:
            addresses.append(x.data_ptr())
            device = x.device
    if device.type == "cpu":
        with annotate(name):
            _launcher(name, "cpu")(*addresses, *numbers, torch.get_num_threads())
    else:
        with annotate(name), torch.cuda.device(device):
            if _by_driver():
                extension().use_cuda_device(device.index)
            _launcher(name, "cuda")(*addresses, *numbers, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _launcher(name: str, device_type: str) -> Callable[..., None]:
    return getattr(extension(), f"{name}_{device_type}")


def on_gpu(x: Tensor) -> bool:
    """Whether a launcher of the GPU gets the tensor: some of them want another layout, or scratch memory."""
    return x.is_cuda


def dense(x: Tensor) -> Tensor:
    """x in contiguous or channels-last memory: as it is, or copied."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def dense_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of `like`, which is dense."""
    if x.stride() == like.stride():
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def contiguous(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v.contiguous() for v in vectors)


def like(vector: Tensor | None, needed: bool = True) -> Tensor | None:
    """Memory for a gradient, where there is one."""
    return None if vector is None or not needed else torch.empty_like(vector)
