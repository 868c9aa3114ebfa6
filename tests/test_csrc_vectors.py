"""Loops of csrc/ on a CPU, compiled for processors that need not be there: what the compiler makes of them."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools

from bench.resources.of_csrc import CSRC

LOOPS = {
    f"{act} {call}": ("bias_act", f"BiasAct<{act}, float>{{gain, clamp}}", call)
    for act in ("kLinear", "kRelu", "kLrelu")
    for call in ("value(u)", "backward(u, g)")
} | {
    f"LeakyClamp {call}": ("layer_epilogue", "LeakyClamp<float>{slope, gain, clamp}", call)
    for call in ("value(u)", "derivative(u, g)")
}
PROGRAM = """
#include "%s.h"
using namespace epigraf;
using namespace epigraf::EPIGRAF_ISA;
extern "C" void loop(const float* __restrict x, const float* __restrict grad_y, float* __restrict out, i64 n,
                     float bias, float slope, float gain, float clamp) {
  const auto f = %s;
#pragma omp simd
  for (i64 i = 0; i < n; i++) {
    const float u = x[i] + bias, g = grad_y[i];
    out[i] = f.%s;
  }
}
"""


READ = ("11", "12")  # versions of gcc whose code the limits below were read from


def version_of_gcc(compiler: list[str]) -> str | None:
    """The first part of it; None if the compiler is another one, is not there, or compiles for other processors."""
    if shutil.which(compiler[0]) is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    line = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    macros = dict(
        re.findall(r"#define (\w+) (.*)", subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    )
    return None if "__clang__" in macros else macros.get("__GNUC__")


def gcc() -> list[str]:
    """The compiler's command; skips where its code was never read."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if version_of_gcc(compiler) not in READ:
        pytest.skip(f"reads the code of gcc {' or '.join(READ)} on x86-64, which {compiler[0]} is not")
    return compiler


def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py compiles with."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(CSRC.parent / "setup.py"))


@pytest.mark.parametrize("loop", LOOPS)
def test_selects_cost_one_mask(loop: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A condition that the compiler splits into paths becomes a dozen instructions on masks; bias_act's backward pass
    took twice as long by that."""
    compiler, setup = gcc(), settings(monkeypatch)
    source, assembly = tmp_path / "loop.cpp", tmp_path / "loop.s"
    source.write_text(PROGRAM % LOOPS[loop])
    flags = [*setup["CXX_FLAGS"], *setup["X86_LEVELS"]["v4"], "-fopenmp-simd", "-DEPIGRAF_ISA=v4", f"-I{CSRC}"]
    subprocess.run([*compiler, *flags, "-S", str(source), "-o", str(assembly)], check=True)
    blocks = re.split(r"^\.L\w+:", assembly.read_text(), flags=re.MULTILINE)
    block = max(blocks, key=lambda text: text.count("%zmm"))
    block = block[: block.index("\tj")]  # to the jump back
    assert re.search(r"vmov\w+\s+%zmm\d+, \(%", block), block  # 16 elements at once
    unwanted = re.findall(r"^\t(k\w+|v?\w*gather\w*|v?\w*scatter\w*|call)\b", block, re.MULTILINE)
    assert len(unwanted) <= 1, block
    assert len(block.splitlines()) <= 26, block


ROWS = """
#include "layer_chunks.h"
using namespace epigraf;
using namespace epigraf::EPIGRAF_ISA;
extern "C" void rows(const LayerEpilogueArgs& a, const float* v, const float* const* g, float* const* out,
                     float* sums) {
  Chunk<float, %s> chunk(a, 0);
  chunk.template fwd_row<2>(0, a.width, v, v, out);
  chunk.template bwd_row<2, true>(0, a.width, v, v, v, g, out[0], sums);
  chunk.choose_row(0, a.width, g[0], g[1], out[1]);
  chunk.template outputs_bwd_row<2, true>(0, a.width, v, v, g, out[0], sums);
  Chunk<float, %s>::Second second{out[2], {out[0], out[1]}, out[3], out[4]};
  chunk.template double_bwd_row<2>(0, a.width, v, v, v, v, v, g, second, sums);
}
"""


@pytest.mark.parametrize("channels_last", ["true", "false"])
@pytest.mark.parametrize("level", ["v3", "v4"])
def test_rows_of_the_epilogue_are_vectors(
    level: str, channels_last: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every loop that is marked as one: with paths in it, as the double backward once had, it would be one by one."""
    compiler, setup = gcc(), settings(monkeypatch)
    source = tmp_path / "rows.cpp"
    source.write_text(ROWS % (channels_last, channels_last))
    flags = [*setup["CXX_FLAGS"], *setup["X86_LEVELS"][level], "-fopenmp-simd", f"-DEPIGRAF_ISA={level}", f"-I{CSRC}"]
    line = [*compiler, *flags, "-fopt-info-vec-optimized", "-c", str(source), "-o", str(tmp_path / "rows.o")]
    told = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    vectorized = {int(number) for number in re.findall(r"layer_chunks\.h:(\d+):\d+: optimized: loop vectorized", told)}
    lines = (CSRC / "layer_chunks.h").read_text().splitlines()
    marked = [number for number, text in enumerate(lines, 1) if text.strip() == "#pragma omp simd"]
    assert len(marked) == 5
    for number in marked:  # gcc names the loop, or the first line in it
        assert vectorized & {number + 1, number + 2, number + 3}, f"layer_chunks.h:{number}\n{told}"
