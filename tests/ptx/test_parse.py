"""What bench.ptx reads from PTX text."""

import pytest

from bench.ptx import Program, UnknownOpcode
from bench.ptx.parse import Address, Immediate, Not, Pair, Register, Sink, Special, Symbol, Vector
from ptx_snippets import kernel


def body(text: str, **options: str) -> list:
    return Program(kernel(text, **options)).entries["k"].body.instructions


def test_parameters_lie_where_their_alignment_puts_them() -> None:
    params = """
        .param .u32 a, .param .u64 .ptr .global .align 16 b, .param .align 8 .b8 c[13], .param .u8 d, .param .f32 e
    """
    entry = Program(kernel("ret;", params=params)).entries["k"]
    assert [(p.name, p.type, p.size, p.align, p.offset) for p in entry.parameters] == [
        ("a", "u32", 4, 4, 0),
        ("b", "u64", 8, 8, 8),
        ("c", "b8", 13, 8, 16),
        ("d", "u8", 1, 1, 29),
        ("e", "f32", 4, 4, 32),
    ]
    assert entry.parameter_bytes == 36


def test_operands() -> None:
    text = """
    .reg .pred p, q;
    .reg .b32 %r<9>;
    .reg .b64 %rd<3>;
    @!p setp.lt.and.s32 p|q, %r1, -0x10, !q;
    mov.b64 {_, %r2}, %rd1;
    ld.global.v2.b32 {%r3, %r4}, [%rd1+-8];
    ld.global.b32 %r5, [ %rd2 + 0 ];
    mov.u32 %r6, %tid.x;
    mov.u32 %r7, buffer;
    add.f32 %r8, %r7, 0fBF800000;
    bra $end;
    $end: ret;
    """
    setp, unpack, vector, load, special, symbol, add, branch, _ = body(text)
    assert isinstance(setp.guard, Not)
    assert setp.guard.of.name == "p"
    assert isinstance(setp.operands[0], Pair)
    assert setp.operands[2] == Immediate(-16)
    assert isinstance(setp.operands[3], Not)
    assert isinstance(unpack.operands[0], Vector)
    assert unpack.operands[0].of[0] == Sink()
    assert isinstance(vector.operands[1], Address)
    assert (vector.operands[1].base.name, vector.operands[1].offset) == ("%rd1", -8)
    assert load.operands[1].offset == 0
    assert special.operands[1] == Special("%tid.x")
    assert symbol.operands[1] == Symbol("buffer")
    assert add.operands[2] == Immediate(0xBF800000, 4)
    assert branch.operands[0] == Symbol("$end")


def test_registers_of_an_inner_scope_are_others() -> None:
    text = """
    .reg .b32 %r<3>;
    { .reg .b32 %r<2>; .reg .b64 t; mov.b32 %r1, 1; mov.b64 t, 2; }
    { .reg .pred t; mov.pred t, 1; }
    mov.b32 %r1, 3;
    """
    inner, wide, predicate, outer = [i.operands[0] for i in body(text)]
    assert isinstance(inner, Register)
    assert inner.index != outer.index
    assert (wide.type, predicate.type) == ("b64", "pred")


def test_places() -> None:
    header = '.file 1 "/some/where/kernel.py"\n.file 2 "other.cu"'
    text = """
    .loc 1 7 3 // a comment; with { brackets
    .reg .b32 r;
    mov.b32 r, 1; /* another;
    */ mov.b32 r, 2;
    .loc 2 9 1, function_name $L__info_string0, inlined_at 1 7 3
    mov.b32 r, 3;
    .loc 1 0 0
    mov.b32 r, 4;
    """
    ptx = kernel(text, header=header)
    first, second, third, fourth = Program(ptx).entries["k"].body.instructions
    lines = ptx.splitlines()
    for instruction in (first, second, third, fourth):
        assert instruction.text in lines[instruction.line - 1]
    assert first.source == second.source == ("kernel.py", 7)
    assert third.source == fourth.source == ("other.cu", 9)  # line 0 is nowhere in particular
    assert str(third) == f"PTX line {third.line}: `mov.b32 r, 3`, other.cu:9"


def test_shared_memory_is_laid_out_with_what_the_launch_sizes_at_its_end() -> None:
    header = ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 unused[400];"
    text = """
    .shared .align 4 .b8 a[6];
    .shared .align 8 .f64 b[2];
    .reg .b32 r;
    mov.u32 r, dynamic;
    """
    entry = Program(kernel(text, header=header)).entries["k"]
    assert entry.shared == {"a": 0, "b": 8, "dynamic": 32}
    assert entry.static_bytes("shared") == 32


def test_several_kernels() -> None:
    one = kernel(".reg .b32 r; { mov.b32 r, 1; }")
    entries = Program(one + one.split(".address_size 64")[1].replace(" k(", " other(")).entries
    assert sorted(entries) == ["k", "other"]
    assert len(entries["other"].body.instructions) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("frobnicate.b32 %r1, %r2;", "frobnicate.b32"),
        ("add.cc.s32 %r1, %r2, %r2;", "add.cc.s32"),
        ("cvt.rn.f32.e4m3 %r1, %r2;", "cvt.rn.f32.e4m3"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r2}, {%r2};", "m8n8k4"),
        ("ld.b32 %r1, [%rd1];", "ld.b32"),
        ("mov.u32 %r1, nowhere;", "nowhere"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("call foo;", "call"),
        (".branchtargets a, b;", ".branchtargets"),
    ],
)
def test_what_is_not_known_is_named(text: str, words: str) -> None:
    program = Program(kernel(f".reg .b32 %r<4>; .reg .b64 %rd<2>; mov.b32 %r2, 1; mov.b64 %rd1, 1; {text} ret;"))
    with pytest.raises(UnknownOpcode) as raised:
        program.launch("k", grid=(1, 1, 1), block=(32, 1, 1), params=b"", tensors={})
    assert words in str(raised.value)
    assert "PTX line" in str(raised.value)


def test_launches_that_make_no_sense() -> None:
    program = Program(kernel("ret;", params=".param .u64 a"))
    options = {"grid": (1, 1, 1), "block": (32, 1, 1), "tensors": {}}
    with pytest.raises(ValueError, match="entry must be one of"):
        program.launch("j", params=bytes(8), **options)
    with pytest.raises(ValueError, match="params must have 8 bytes"):
        program.launch("k", params=bytes(4), **options)
    with pytest.raises(ValueError, match="uninitialized must be names"):
        program.launch("k", params=bytes(8), uninitialized=["x"], **options)
