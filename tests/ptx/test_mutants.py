"""bench.mutants: which faults it puts in, which it finds, and a few of them in real kernels."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch

import checks
from bench.mutants import launches as mutant_launches
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
fma.rn.f32 f, f, g, 0f00000000;
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


def test_every_fault_that_is_not_found_is_explained() -> None:
    content = json.loads(mutants.RESULTS.read_text())
    assert [one for one in mutants.unproved(content) if mutants.explanation(one) is None] == []
    tried, idle = (sum(row[key] for row in content["rows"]) for key in ("tried", "idle"))
    assert sum(sum(row["found"].values()) for row in content["rows"]) >= 0.95 * (tried - idle)
    assert {row["arch"] for row in content["rows"]} >= {80, 90}


@pytest.mark.parametrize(("why", "code"), [("", 1), (next(iter(mutants.IDLE.values())), 0)])
def test_the_exit_code_says_whether_all_are_explained(
    why: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivor = {
        "arch": 80,
        "kernel": "k",
        "kind": "store dropped",
        "source": "x.cu:1",
        "code": "",
        "ptx": "",
        "why": why,
    }
    row = {"arch": 80, "kernel": "k", "kind": "store dropped", "of": 1, "tried": 1, "idle": 0, "found": {}}
    monkeypatch.setattr(mutant_launches, "launches", lambda arch, **options: {"k": []})
    monkeypatch.setattr(mutants, "judge", lambda *_: {"rows": [row], "survivors": [survivor]})
    path = tmp_path / "x.json"
    assert mutants.main(["--arch", "80", "--json", str(path)]) == code
    assert json.loads(path.read_text())["survivors"] == [survivor]


def test_a_file_of_another_draw_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(mutants.RESULTS.read_bytes())
    assert mutants.main(["--kernel", "composite", "--json", str(path)]) == 2
    assert "is of --seed 0 --most 3: give those, or name another --json" in capsys.readouterr().err
    assert path.read_bytes() == mutants.RESULTS.read_bytes()


def test_what_differs() -> None:
    x = torch.tensor([1.0, torch.nan])
    assert not mutants.differs(x + 1e-6, x)
    assert mutants.differs(x + 1e-4, x)
    assert mutants.differs(torch.nan_to_num(x), x)
    assert mutants.differs(torch.tensor([2]), torch.tensor([1]))


@pytest.mark.skipif(backends.status()["composite"]["triton"] is not None, reason="Triton is not here")
def test_faults_of_a_compiled_kernel_are_found() -> None:
    """Of every kind one, in the kernel that samples planes; the mutants run where the kernel itself passes."""
    ((kernel_name, launches),) = mutant_launches.launches(80, only="sample_triplane_fwd", csrc=False).items()
    judged = mutants.judge(80, kernel_name, launches, most=2, seed=1)
    tried, idle = (sum(row[key] for row in judged["rows"]) for key in ("tried", "idle"))
    found = sum(sum(row["found"].values()) for row in judged["rows"])
    assert tried - idle >= 4
    assert found >= 0.9 * (tried - idle), judged["survivors"]


PROBED = """
.reg .b32 t; .reg .f32 f, g, zero; .reg .b64 a, o;
.shared .align 4 .b8 s[4];
mov.u32 t, %tid.x;
ld.param.u64 a, [x];
ld.param.u64 o, [y];
mad.wide.u32 o, t, 4, o;
ld.global.f32 f, [a];
ld.global.f32 g, [a+8];
mov.f32 zero, 0f00000000;
fma.rn.f32 f, f, f, zero;
st.shared.f32 [s], f;
st.shared.f32 [s], f;
st.global.f32 [o], f;
ret;
"""


def test_probes_show_what_has_no_effect() -> None:
    """x[0] = x[1], nobody uses x[2], 0 is added, and one value is stored twice; that the first store is idle is not
    seen, since nobody has written before it.
    """
    tensors = {"x": torch.tensor([3.0, 3.0, 4.0, 5.0]), "y": torch.full((1,), torch.nan)}
    entry = Program(kernel(PROBED, params=".param .u64 x, .param .u64 y")).entries["k"]
    params = struct.pack("<2Q", *(x.data_ptr() for x in tensors.values()))
    options = {"grid": (1, 1, 1), "block": (1, 1, 1), "params": params, "arch": 80}
    before = {name: x.view(torch.uint8).numpy().copy() for name, x in tensors.items()}
    mutant_launches.execute(mutant_launches.program_of(entry), tensors, options)
    assert tensors["y"].item() == 9.0
    after = {name: x.clone() for name, x in tensors.items()}
    launch = mutant_launches.Launch(entry, options, tensors, before, after)
    assert launch.last_changed("y") == 0
    judged = mutants.judge(80, "k 1", [launch], most=9, seed=0)
    not_proved = f"not proved; presumably {mutants.KINDS['shared store dropped']}"
    assert sorted((one["kind"], one["ptx"], one["why"]) for one in judged["survivors"]) == [
        ("fma made a product", "fma.rn.f32 f, f, f, zero;", mutants.IDLE["same"]),
        ("pointer shifted", "ld.global.f32 f, [a];", mutants.IDLE["same"]),
        ("pointer shifted", "ld.global.f32 g, [a+8];", mutants.IDLE["unused"]),
        ("shared store dropped", "st.shared.f32 [s], f;", not_proved),
        ("shared store dropped", "st.shared.f32 [s], f;", mutants.IDLE["same"]),
    ]
