"""Which implementations of each op there are, and which one a call gets."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence

import torch

from . import native, verdicts
from .library import constant

OPS = (
    "sample_triplane",
    "decode_triplane",
    "sample_importance",
    "composite",
    "cut",
    "bias_act",
    "upfirdn2d",
    "modulated_conv2d",
)
PARTS = ("modulation", "layer_epilogue")  # have files of their own, and the backends of modulated_conv2d
BACKENDS = ("reference", "torch", "triton", "cuda", "cpu")
RUN_BACKENDS = ("auto", "gpu", *BACKENDS)  # what a run may name, see `choose`

# Ops that one module takes together, and that it hands one backend.
FAMILIES = {"renderer": OPS[:5], "convolutions": OPS[5:]}

# What exists beside the reference, which has every op.
IMPLEMENTED = {
    "torch": FAMILIES["renderer"],  # its grid sampler; what samples no planes is the reference, which is torch too
    "triton": ("sample_triplane", "decode_triplane", "sample_importance", "composite", "cut"),
    "cuda": ("bias_act", "upfirdn2d", "modulated_conv2d"),
    "cpu": OPS,
}

KERNELS = {name: IMPLEMENTED[name] for name in ("triton", "cuda")}  # for GPUs, which have to pass a check there
CHECKED = ("cuda",)  # kinds of devices that default to such kernels

_accepted: dict[str, tuple[str, ...]] | None = None  # op -> those that the GPU has passed; None: not asked for yet


def accept(passed: Mapping[str, Sequence[str]] | None) -> None:
    """Says for the whole process which kernels are taken where nobody names a backend: op -> names, the fastest first.

    None stands for what is on disk of this GPU, see `verdicts`.
    """
    global _accepted
    _accepted = None if passed is None else {op: tuple(names) for op, names in passed.items()}


def accepted() -> dict[str, tuple[str, ...]]:
    """op -> the kernels that are taken where nobody names a backend.

    A process that nobody told reads what earlier checks of this GPU found; where there was none it says so, once.
    """
    global _accepted
    if _accepted is None:
        items = verdicts.of_bare_ops("cuda") if torch.cuda.is_available() else {}
        if items is None:
            print(f"epigraf_fast: {UNCHECKED}", file=sys.stderr)
        _accepted = verdicts.accepted(items or {}, KERNELS)
    return _accepted


UNCHECKED = "the kernels have not been checked on this GPU, slower ones are taken: epigraf doctor --check"


def status() -> dict[str, dict[str, str | None]]:
    """op -> backend -> None if it can be used here, else the reason why not."""
    return {op: {backend: _lacking(op, backend) for backend in BACKENDS} for op in OPS}


@constant
def resolve(op: str, backend: str | None, device_type: str) -> str:
    """The backend that a call gets: the named one, or with None the fastest that is there for the device.

    On a GPU that is what this GPU has passed, see `accepted`, or `fallback`.

    Raises:
        ValueError: The named backend is unknown, or is missing here; the message says why.
    """
    if backend is None:
        if device_type in CHECKED:
            for name in accepted().get(op, ()):
                if lacking_on(op, name, device_type) is None:
                    return name
        return fallback(op, device_type)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = lacking_on(op, backend, device_type)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} is not available ({reason}); use backend=None")
    return backend


def fallback(op: str, device_type: str) -> str:
    """What a call gets where nobody named a backend, and the kernels for GPUs cannot serve it.

    On a CPU the backend cpu where it is there, on a GPU torch's own sampler, else the reference.
    """
    name = {"cpu": "cpu", "cuda": "torch"}.get(device_type, "reference")
    return name if _lacking(op, name) is None else "reference"


def served(op: str, backend: str | None, device_type: str, check: Callable[[], None]) -> str:
    """`resolve`; but where nobody named a backend, `fallback` for what triton's kernels refuse.

    Args:
        check: Raises what triton has against the arguments, called where triton would take them.
    """
    chosen = resolve(op, backend, device_type)
    if chosen == "triton":
        try:
            check()
        except (TypeError, ValueError, NotImplementedError):
            if backend is not None:
                raise
            return fallback(op, device_type)
    return chosen


def choose(backend: str, device_type: str) -> dict[str, str]:
    """What a run takes: op -> the named backend where the op has one, else the op's default for the device.

    Args:
        backend: One of `BACKENDS`, "gpu" for triton and cuda together, or "auto" for every op's default.

    Raises:
        ValueError: The named backend is unknown, no op has it, or it is missing here; the message says why.
    """
    if backend not in RUN_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(RUN_BACKENDS)}, got {backend!r}")
    named = {}
    for name in ("triton", "cuda") if backend == "gpu" else (backend,):
        ops = OPS if name == "reference" else IMPLEMENTED.get(name, ())
        reasons = [lacking_on(op, name, device_type) for op in ops]
        if any(reasons):
            raise ValueError(f"backend {name!r} is not available: {next(filter(None, reasons))}")
        named |= dict.fromkeys(ops, name)
    return {op: named.get(op) or resolve(op, None, device_type) for op in OPS}


def family_backend(family: str, chosen: dict[str, str], device_type: str) -> str | None:
    """The one `backend` argument that gives every op of a family what `choose` chose for it.

    Raises:
        ValueError: There is none: the ops of a family have to have a backend together, or as their default.
    """
    ops = FAMILIES[family]
    if all(resolve(op, None, device_type) == chosen[op] for op in ops):
        return None
    if len({chosen[op] for op in ops}) == 1:
        return chosen[ops[0]]
    raise ValueError(f"{family}: the ops must share a backend, got {', '.join(f'{op} {chosen[op]}' for op in ops)}")


def lacking_on(op: str, backend: str, device_type: str) -> str | None:
    """Why the op cannot have the backend on this device; None if it can."""
    reason = _lacking(op, backend)
    if reason is None and (
        (backend in ("cpu", "cuda") and device_type != backend)
        or (backend == "triton" and device_type != "cuda" and not _interpreting())
    ):
        reason = f"the tensors are on {device_type}"
    return reason


def _interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on any device, slowly."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def _lacking(op: str, backend: str) -> str | None:
    """Why the op cannot have the backend on this machine; None if it can."""
    if backend == "reference":
        return None
    if op not in IMPLEMENTED[backend]:
        return "not part of this release"
    if backend == "triton":
        return _lacking_triton()
    # The renderer's ops need no extension on the CPU: torch's grid sampler samples where it is missing.
    return native.lacking(backend) if op in IMPLEMENTED["cuda"] else None


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None  # does not import it


def _lacking_triton() -> str | None:
    if not _installed("triton"):
        return "Triton is not installed: pip install triton"
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly"
    return _lacking_compiler()


@functools.cache
def _lacking_compiler() -> str | None:
    """What Triton builds its launchers with, at the first launch: a C compiler, and Python's header."""
    compiler = os.environ.get("CC")
    if not (shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")):
        named = f"CC={compiler} is none" if compiler else "there is no gcc and no clang"
        return f"Triton needs a C compiler, and {named}: apt-get install gcc, or name one by CC"
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        version = "{}.{}".format(*sys.version_info)
        return f"Triton needs Python.h in {sysconfig.get_path('include')}: apt-get install python{version}-dev"
    return None
