"""The CUDA files of csrc/, compiled for GPUs that need not be there: registers, spills, loads."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.resources import of_csrc

# Whose code an ordinary run compiles: for sm_90 that of the smallest file; for sm_70 what its tests execute.
IN_THE_SUITE = {70: ("bias_act", "upfirdn2d"), 90: ("upfirdn2d",)}


def sources_for(*archs: int) -> list[Any]:
    """(file, architecture); the others are `compiled`."""
    return [
        pytest.param(
            source,
            arch,
            id=f"{source.stem}-{arch}",
            marks=() if source.stem in IN_THE_SUITE.get(arch, (source.stem,)) else pytest.mark.compiled,
        )
        for source in of_csrc.sources()
        for arch in archs
    ]


GOOD = {"case": "bias_act_runs_kernel<Half, 8, false, (Order)1>", "spill": 0, "load_bits": 128}


@pytest.mark.parametrize(("source", "arch"), sources_for(*of_csrc.NVRTC_ARCHS, *of_csrc.NVCC_ARCHS))
def test_every_kernel_compiles_and_fits(source: Path, arch: int) -> None:
    reason = of_csrc.lacking(arch)
    if reason is not None:
        pytest.skip(reason)
    rows = of_csrc.rows((arch,), [source])
    assert rows
    lacking = [f"{row['case']}: {problem}" for row in rows for problem in row["problems"]]
    assert not lacking, "\n".join(lacking)
    few = [
        row["case"]
        for row in rows
        if re.match(r"layer_epilogue_blurred_bwd_kernel<\w+, \d, 1>", row["case"]) and row["occupancy"] < 0.25
    ]
    assert not few, f"fewer than 16 warps a multiprocessor: {few}"


@pytest.mark.parametrize(("source", "arch"), sources_for(90))
def test_code_for_sm_90_is_that_for_sm_80(source: Path, arch: int) -> None:
    """So that to execute one is to execute both, see `compiled`."""
    reason = of_csrc.lacking(arch)
    if reason is not None:
        pytest.skip(reason)

    ptx80, ptx90 = (of_csrc.compiled(source, to)[1].read_text().partition(".version")[2] for to in (80, arch))
    assert ".target sm_90" in ptx90
    assert "ld.global" in ptx90
    assert ptx80.replace(".target sm_80", ".target sm_90") == ptx90


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"spill": 8}, ["spills 8 bytes"]),
        ({"load_bits": 16}, ["loads at most 16 bits at once"]),
        ({"load_bits": 16, "case": "bias_act_runs_kernel<Half, 1, true, (Order)1>"}, []),
        ({"load_bits": 32, "case": "layer_epilogue_bwd_kernel<float, 4, 3>"}, ["loads at most 32 bits at once"]),
        ({"load_bits": 32, "case": "modulation_fwd_kernel<float>"}, []),
        ({"load_bits": 0, "case": "bias_act_sum_parts_kernel<float>"}, []),
    ],
    ids=str,
)
def test_problems(change: dict[str, Any], found: list[str]) -> None:
    assert of_csrc.problems({**GOOD, **change}) == found


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_the_program_for_the_sanitizers(whole: bool, tmp_path: Path) -> None:
    """What `make sanitize` builds, without sanitizers: that it is C++; whole: a fifth of its cases."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("there is no C++ compiler")
    makefile = (of_csrc.CSRC.parent / "Makefile").read_text()
    (names,), (command,) = (re.findall(rf"^{name} :?= \$?(.*)", makefile, re.M) for name in ("SANITIZED", "SANITIZE"))
    flags = [flag for flag in command.split() if flag.startswith(("-std", "-D"))]
    sources = [str(of_csrc.CSRC / f"{name}.cpp") for name in names.split()]
    assert len(flags) == 3
    if not whole:
        check = ["-w", "-fsyntax-only", f"-I{of_csrc.CSRC}"]
        subprocess.run([*compiler, *flags, *check, str(of_csrc.CSRC / "tests" / "sanitize.cpp")], check=True)
        return
    program = str(tmp_path / "program")
    options = ["-w", "-O0", f"-I{of_csrc.CSRC}", "-pthread", "-ldl", "-o", program]
    subprocess.run([*compiler, *flags, *sources, *options], check=True)
    found = subprocess.run([program, "few"], capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr, found.returncode) == ("ok\n", "", 0)
