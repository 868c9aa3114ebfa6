"""bench.mutants: which faults it puts in, which it finds, and a few of them in real kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

import checks
from bench.mutants import mutants
from bench.ptx import Program
from epigraf_fast.ops import backends
from ptx_snippets import kernel

BODY = """
.reg .pred p; .reg .b32 t, x, y; .reg .f32 f, g; .reg .b64 a;
.shared .align 4 .b8 s[128];
mov.u32 t, %tid.x;
setp.lt.u32 p, t, 5;
@p bra $skip;
mov.f32 f, 0f3F800000;
$skip:
@p ld.global.b32 x, [a+8];
@!p st.global.v2.b16 [ a + 0 ], { x, y };
st.shared.b32 [s], x;
bar.sync 0;
@p red.global.add.f32 [a], g;
fma.rn.f32 f, f, f, g;
ret;
"""


def made() -> dict[str, list[mutants.Mutant]]:
    """By kind."""
    entry = Program(kernel(BODY)).entries["k"]
    return {
        kind: list(group)
        for kind, group in itertools.groupby(
            sorted(mutants.mutants(entry), key=lambda mutant: mutant.kind), key=lambda mutant: mutant.kind
        )
    }


def test_every_kind_is_made() -> None:
    assert {kind: len(found) for kind, found in made().items()} == {
        "atomic dropped": 1,
        "barrier removed": 1,
        "branch removed": 1,
        "fma made a product": 1,
        "mask removed": 3,
        "pointer shifted": 4,
        "shared store dropped": 1,
        "store dropped": 1,
    }


@pytest.mark.parametrize(
    ("kind", "number", "change"),
    [
        ("mask removed", 0, ("@p ld.global.b32 x, [a+8];", "ld.global.b32 x, [a+8];")),
        ("pointer shifted", 0, ("@p ld.global.b32 x, [a+8];", "@p ld.global.b32 x, [a+12];")),
        ("pointer shifted", 1, ("[ a + 0 ]", "[a+2]")),
        ("barrier removed", 0, ("bar.sync 0;", "")),
        ("branch removed", 0, ("@p bra $skip;", "")),
        ("fma made a product", 0, ("fma.rn.f32 f, f, f, g;", " mul.rn.f32 f, f, f;")),
        ("shared store dropped", 0, ("st.shared.b32 [s], x;", "")),
        ("atomic dropped", 0, ("@p red.global.add.f32 [a], g;", "")),
    ],
)
def test_a_mutant_is_one_change(kind: str, number: int, change: tuple[str, str]) -> None:
    before = Program(kernel(BODY)).entries["k"].text
    assert made()[kind][number].entry.text == before.replace(*change)


def test_the_line_is_that_of_the_machine() -> None:
    entry = Program(kernel(BODY)).entries["k"]
    lines = {instruction.text: instruction.line for instruction in entry.body.instructions}
    for mutant in mutants.mutants(entry):
        assert lines[mutant.text.removesuffix(";")] == mutant.line


def test_tolerances_are_those_of_the_tests() -> None:
    assert {dtype: checks.TOLERANCES[dtype] for dtype in mutants.TOLERANCES} == mutants.TOLERANCES


def test_what_differs() -> None:
    x = torch.tensor([1.0, torch.nan])
    assert not mutants.differs(x + 1e-6, x)
    assert mutants.differs(x + 1e-4, x)
    assert mutants.differs(torch.nan_to_num(x), x)
    assert mutants.differs(torch.tensor([2]), torch.tensor([1]))


@pytest.mark.skipif(backends.status()["composite"]["triton"] is not None, reason="Triton is not here")
def test_faults_of_a_compiled_kernel_are_found() -> None:
    """Of every kind one, in the kernel that samples planes; the mutants run where the kernel itself passes."""
    from bench.mutants import launches as mutant_launches

    ((kernel_name, launches),) = mutant_launches.launches(80, only="sample_triplane_fwd", csrc=False).items()
    judged = mutants.judge(80, kernel_name, launches, most=2, seed=1)
    tried, idle = (sum(row[key] for row in judged["rows"]) for key in ("tried", "idle"))
    found = sum(sum(row["found"].values()) for row in judged["rows"])
    assert tried - idle >= 4
    assert found >= 0.9 * (tried - idle), judged["survivors"]
