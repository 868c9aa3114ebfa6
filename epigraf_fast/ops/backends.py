"""Which implementations of each op there are, and which one a call gets."""

from __future__ import annotations

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
IMPLEMENTED = {"cpu": ("sample_triplane", "decode_triplane")}


def status() -> dict[str, dict[str, str | None]]:
    """op -> backend -> None if it can be used here, else the reason why not."""
    missing = "not part of this release"
    return {
        op: {b: None if b == "reference" or op in IMPLEMENTED.get(b, ()) else missing for b in BACKENDS} for op in OPS
    }


def resolve(op: str, backend: str | None, device_type: str) -> str:
    """The backend that a call gets: the named one, or with None the fastest that is there for the device.

    Raises:
        ValueError: The named backend is unknown, or is missing here; the message says why.
    """
    if backend is None:
        return "cpu" if device_type == "cpu" and op in IMPLEMENTED["cpu"] else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = status()[op][backend]
    if reason is None and backend == "cpu" and device_type != "cpu":
        reason = f"the tensors are on {device_type}"
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} is not available ({reason}); use backend=None")
    return backend
