"""Which backends of csrc/ this machine has: tests run once on each; test_backends.py skips once for each other.

"emulated" stands for the CUDA kernels on the CPU, see `emulated`.
"""

from __future__ import annotations

from typing import Any

import pytest

from epigraf_fast.ops import backends

OPS = ("bias_act", "upfirdn2d", "modulated_conv2d")
KERNELS = ("cpu", "cuda", "emulated")
ALL = ("reference", *KERNELS)


def here(op: str, names: tuple[str, ...] = ALL) -> list[Any]:
    """Those of the names that can run the op, as parameters; cuda is marked gpu."""
    found = [name for name in names if backends.status()[op]["cpu" if name == "emulated" else name] is None]
    return [pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in found]


def on_kernels(op: str) -> pytest.MarkDecorator:
    """For a test of what only kernels do: its `backend` is never the reference."""
    return pytest.mark.parametrize("backend", here(op, KERNELS), indirect=True)
