"""csrc's CUDA kernels on the CPU: every X.cu compiled as C++ against csrc/tests/emulation, and run on CPU tensors.

This shows what the kernels compute, in every thread of every block, where there is no GPU.
"""

from __future__ import annotations

import pytest

from bench.ptx import csrc_host
from epigraf_fast.ops import native


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of a test, the ops' backend cpu launches what a GPU would be given."""
    emulated = csrc_host.module()
    if isinstance(emulated, str):
        pytest.skip(emulated)
    monkeypatch.setattr(native, "extension", lambda: emulated)
    monkeypatch.setattr(native, "launch", csrc_host.launch_emulated)
    monkeypatch.setattr(native, "on_gpu", lambda x: True)
