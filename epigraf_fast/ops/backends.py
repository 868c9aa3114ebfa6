"""Which implementations of each op there are, and which one a call gets."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from . import native

OPS = (
    "sample_triplane",
    "decode_triplane",
    "sample_importance",
    "composite",
    "bias_act",
    "upfirdn2d",
    "modulated_conv2d",
)
BACKENDS = ("reference", "triton", "cuda", "cpu")


# What exists beside the reference, which has every op.
IMPLEMENTED = {
    "triton": ("sample_triplane", "decode_triplane", "sample_importance", "composite"),
    "cuda": ("bias_act", "upfirdn2d", "modulated_conv2d"),
    "cpu": ("sample_triplane", "decode_triplane", "bias_act", "upfirdn2d", "modulated_conv2d"),
}


def status() -> dict[str, dict[str, str | None]]:
    """op -> backend -> None if it can be used here, else the reason why not."""
    return {op: {backend: _lacking(op, backend) for backend in BACKENDS} for op in OPS}


def resolve(op: str, backend: str | None, device_type: str) -> str:
    """The backend that a call gets: the named one, or with None the fastest that is there for the device.

    The kernels of triton and cuda have not run on a GPU yet, so that None does not take them.

    Raises:
        ValueError: The named backend is unknown, or is missing here; the message says why.
    """
    if backend is None:
        return "cpu" if device_type == "cpu" and _lacking(op, "cpu") is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = _lacking(op, backend)
    if reason is None and (
        (backend in ("cpu", "cuda") and device_type != backend)
        or (backend == "triton" and device_type != "cuda" and not _interpreting())
    ):
        reason = f"the tensors are on {device_type}"
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} is not available ({reason}); use backend=None")
    return backend


def _interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on any device, slowly."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def _lacking(op: str, backend: str) -> str | None:
    if backend == "reference":
        return None
    if op not in IMPLEMENTED[backend]:
        return "not part of this release"
    if backend == "triton":
        return _lacking_triton()
    # On the CPU the renderer's ops take torch's own kernels.
    return native.lacking(backend) if op in IMPLEMENTED["cuda"] else None


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None  # does not import it


def _lacking_triton() -> str | None:
    if not _installed("triton"):
        return "Triton is not installed: pip install triton"
    if not (torch.cuda.is_available() or _interpreting()):
        return "there is no CUDA device; TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly"
    return None
