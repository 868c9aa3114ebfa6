"""The Triton kernels, compiled ahead of time for GPUs that need not be there: `bench.resources` and what it finds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.resources import limits, resources
from checks import HANG

ROOT = Path(__file__).resolve().parents[1]
GOOD = {
    "arch": 80,
    "kernel": "_decode_triplane_fwd_kernel",
    "case": "decode fwd",
    "registers": 100,
    "spill": 0,
    "shared": 16384,
    "warps": 4,
    "load_bits": 128,
    "plane_bits": 128,
    "atomic": None,
    "products": ["mma.sync"],
    "occupancy": 0.25,
}


# What a user's run launches most, at the sizes of the FFHQ preset with its default plans.
COMPILED = (
    r"sm_80 decode \w+ C=32 hidden=64 float32 fp32",  # deterministic ones too
    r"sm_80 sample \w+ C=32 float32",
    r"sm_80 (cut|paste) C=96 float(32|16) channels_last",
    r"sm_80 (stratified S=48 drawn|composite \w+ S=48\+48( every)?$|importance S=48\+48 noise)",
    r"sm_90 (decode \w+ C=32 hidden=64 float(32 fp32|16 fp16)|sample \w+ C=32 float16) \S+$",
    # The limits of registers are those of the A100 and the H100; for others it is enough that the largest compiles (for
    # the V100 it does where tests execute it).
    r"sm_100 decode \w+ C=32 hidden=64 float32 fp32 \S+$",
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_every_kernel_compiles_and_fits() -> None:
    """`make compiled` has every size and plan."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.resources", "--only", "triton", "--brief", "--json"]
    command += ["--arch", "80", "90", "100", "--match", *COMPILED]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)
    assert result.stdout, result.stderr
    rows = json.loads(result.stdout)
    decoders = {f"_decode_triplane_{way}_kernel" for way in ("fwd", "bwd", "scatter")}
    sampling = {f"_sample_triplane_{way}_kernel" for way in ("fwd", "bwd")}
    depths = {"_sample_stratified_kernel", "_sample_importance_kernel"}
    rest = depths | {"_composite_fwd_kernel", "_composite_bwd_kernel", "_cut_kernel"}
    expected = {80: decoders | sampling | rest, 90: decoders | sampling, 100: decoders}
    found: dict[int, set[str]] = {arch: set() for arch in expected}
    for row in rows:
        found[row["arch"]].add(row["kernel"])
    assert found == expected
    scatters = {"_sample_triplane_bwd_kernel", "_decode_triplane_scatter_kernel"}
    gathers = [row for row in rows if row["kernel"] not in scatters and re.search("triplane|cut", row["kernel"])]
    assert all(row["plane_bits"] for row in gathers)  # the loads of texels are found at all
    lacking = [f"{row['case']}: {problem}" for row in rows for problem in row["problems"]]
    assert not lacking, "\n".join(lacking)
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"spill": 8}, ["spills 8 bytes"]),
        ({"spill": 8, "arch": 70}, []),
        ({"shared": 200 * 1024}, ["takes 204800 bytes of shared memory"]),
        ({"shared": 200 * 1024, "arch": 90}, []),
        ({"plane_bits": 64}, ["loads 64 bits of planes at once"]),
        ({"plane_bits": None, "load_bits": 32}, []),
        ({"products": []}, ["has no tensor-core instruction"]),
        ({"products": [], "kernel": "_sample_triplane_fwd_kernel"}, []),
    ],
    ids=str,
)
def test_problems(change: dict[str, Any], found: list[str]) -> None:
    assert resources.problems({**GOOD, **change}) == found


def test_table_has_a_line_a_problem() -> None:
    header, line, problem = resources.format_table([{**GOOD, "problems": ["spills 8 bytes"]}]).splitlines()
    assert header.split()[:2] == ["arch", "case"]
    assert line.split()[:4] == ["sm_80", "decode", "fwd", "100"]
    assert problem.split() == ["!", "spills", "8", "bytes"]


def test_loads_are_told_by_the_line_of_the_source_that_they_come_from() -> None:
    ptx = """
    .loc 3 104 7
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.b64 { %rd2 }, [ %rd1 + 0 ];
    .loc 1 9 0
    ld.global.b32 { %r5 }, [ %rd3 + 0 ];
    .file 1 "/a/decode_triplane.py"
    .file 3 "/a/sample_triplane.py"
    """
    expected = [(128, "sample_triplane.py", 104), (64, "sample_triplane.py", 104), (32, "decode_triplane.py", 9)]
    assert resources._loads(ptx) == expected


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "occupancy"),
    [(32, 0, 4, 1.0), (64, 0, 8, 0.5), (255, 0, 8, 0.125), (33, 0, 4, 0.75), (32, 100 * 1024, 4, 0.0625)],
)
def test_occupancy_by_hand(registers: int, shared: int, warps: int, occupancy: float) -> None:
    # A multiprocessor has 65536 registers: 2048 threads of 32, which are 64 warps. 33 are handed out as 40, and then
    # 65536 // (40 * 128) = 12 blocks of 4 warps fit. 164 KiB of shared memory hold one block of 100.
    assert limits.occupancy(registers, shared, warps, 80) == occupancy
