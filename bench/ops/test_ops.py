"""The same cases under pytest-benchmark: `pytest bench --benchmark-json=FILE`.

`BENCH_SIZE`, `BENCH_DTYPE`, `BENCH_BACKENDS` and `BENCH_BATCHES` in the environment pick what is measured, as the flags
of `bench.ops` do.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench.ops import cases as catalogue
from bench.ops.parity import Parity, arithmetic
from bench.ops.run import runner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = os.environ.get("BENCH_SIZE", "real" if DEVICE.type == "cuda" else "tiny")
DTYPES = os.environ.get("BENCH_DTYPE", "fp32").split(",")
BACKENDS = os.environ.get("BENCH_BACKENDS", "").split(",") if os.environ.get("BENCH_BACKENDS") else None
BATCHES = tuple(map(int, os.environ["BENCH_BATCHES"].split(","))) if os.environ.get("BENCH_BATCHES") else None


def collect():
    for op in catalogue.OPS:
        for dtype in DTYPES:
            backends = [b for b in catalogue.available(op, dtype, DEVICE) if BACKENDS is None or b in BACKENDS]
            for case in catalogue.cases(op, SIZE, dtype, BATCHES):
                for mode in case.modes:
                    for backend in backends:
                        if mode != "double" or backend != "compile":  # it has no second derivative
                            name = f"{op} {case.name} {dtype} {mode} {backend}"
                            yield pytest.param(case, mode, backend, id=name.replace(" ", "-"))


@pytest.mark.parametrize(("case", "mode", "backend"), collect())
def test_op(case, mode, backend, benchmark):
    inputs = case.build(DEVICE)
    verdict = Parity(case, inputs, mode).check(backend)
    assert verdict.wrong is None, verdict.wrong
    benchmark.group = f"{case.op} {case.name} {case.dtype} {mode}"
    benchmark.extra_info |= {"backend": backend, "device": DEVICE.type}
    with arithmetic(case.dtype):
        function = runner(case, inputs, backend, mode)

        def run():
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(run)
