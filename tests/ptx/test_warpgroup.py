"""wgmma: operands by descriptors in every layout, and what its being asynchronous asks for."""

import re

import numpy as np
import pytest

from bench.ptx import Fault, Program, Race
from ptx_snippets import kernel, launch, registers_a, tensor

SHARED_BYTES = 32768
WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of a swizzled block, by the descriptor's mode


def laid_out(x: np.ndarray, mode: int, start: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """Shared memory that holds x [outer, K] as the manual's figures have it, and the two strides in bytes.

    Blocks of eight rows (of K columns where transposed), as wide as the mode says, lie one behind the other; in each,
    16-byte chunk c of row r is found at c ^ (r reduced to the mode's number of chunks).
    """
    size, width = x.itemsize, WIDTHS[mode]
    memory = np.zeros(SHARED_BYTES, "u1")
    if transposed:
        x = x.T
    rows, columns = x.shape
    per_block = width // size
    along = -(-columns // per_block)  # blocks side by side
    for row in range(rows):
        for column in range(columns):
            block = row // 8 * along + column // per_block
            chunk, rest = divmod(column % per_block * size, 16)
            swizzled = chunk ^ (row % 8) // (128 // width) if width > 16 else chunk
            at = start + block * 8 * width + row % 8 * width + swizzled * 16 + rest
            memory[at : at + size] = np.frombuffer(x[row, column].tobytes(), "u1")
    down, side = along * 8 * width, 8 * width
    return memory, down, side


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def program(columns: int, kind: str, source: str, flags: str) -> str:
    """D = A B + D by one warp group; A is in registers or described by the 64-bit number `a`."""
    count = columns // 2
    accumulators = "{" + ", ".join(f"%d{i}" for i in range(count)) + "}"
    depth = 8 if kind == "tf32" else 16
    product = f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} "
    product += f"{accumulators}, {source}, %rb, %p, {flags};"
    load = "".join(f"ld.global.b32 %a{i}, [%q+{4 * i}];" for i in range(4)) if source[0] == "{" else ""
    return f"""
    .reg .pred %p, %go; .reg .b32 %t, %i, %x<4>, %a<4>, %d<{count}>; .reg .b64 %q, %ra, %rb, %m;
    mov.u32 %t, %tid.x;
    mov.b32 %i, 0;
    $fill:
    shl.b32 %x0, %t, 2; mad.lo.s32 %x0, %i, 512, %x0;
    ld.param.u64 %m, [memory]; cvt.u64.u32 %q, %x0; add.s64 %q, %q, %m; ld.global.b32 %x1, [%q];
    st.shared.b32 [%x0], %x1;
    add.s32 %i, %i, 1; setp.lt.u32 %go, %i, {SHARED_BYTES // 512};
    @%go bra $fill;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    ld.param.u64 %ra, [descriptors]; ld.global.v2.b64 {{%ra, %rb}}, [%ra];
    ld.param.u64 %q, [a]; mad.wide.u32 %q, %t, 16, %q; {load}
    ld.param.u64 %q, [d]; mad.wide.u32 %q, %t, {4 * count}, %q;
    {"".join(f"ld.global.b32 %d{i}, [%q+{4 * i}];" for i in range(count))}
    setp.eq.u32 %p, %i, %i;
    wgmma.fence.sync.aligned;
    {product}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {"".join(f"st.global.b32 [%q+{4 * i}], %d{i};" for i in range(count))}
    ret;
    """


def multiply(
    a: np.ndarray,
    b: np.ndarray,
    kind: str,
    mode: int,
    *,
    described: bool,
    transposed: bool = False,
    change: tuple[str, str] = ("", ""),
) -> np.ndarray:
    """a [64, K] b [K, N] + 1 for the accumulators: D, [64, N]."""
    columns = b.shape[1]
    code = {"tf32": "f4", "f16": "f2"}[kind]
    start_b = 16384
    memory, down, side = laid_out(b.T.astype(code), mode, start_b, transposed)
    given = descriptor(start_b, *strides(mode, transposed, down, side), mode)
    d_a = 0
    if described:
        memory_a, down, side = laid_out(a.astype(code), mode, 0, transposed)
        memory |= memory_a
        d_a = descriptor(0, *strides(mode, transposed, down, side), mode)
    registers = np.concatenate([registers_a(a[16 * w : 16 * w + 16], kind) for w in range(4)])
    d = np.ones((128, columns // 2), "f4")
    flags = "1, 1"
    if kind == "f16":
        flags += f", {int(transposed)}" * (2 if described else 1)
    text = program(columns, kind, "%ra" if described else "{%a0, %a1, %a2, %a3}", flags)
    assert change[0] in text
    tensors = {"memory": memory, "descriptors": np.array([d_a, given], "u8"), "a": registers, "d": d}
    made = text.replace(*change)
    launch(
        made, {name: tensor(np.ascontiguousarray(x)) if name != "d" else tensor(d) for name, x in tensors.items()},
        block=128, arch=90, header=".extern .shared .align 128 .b8 all[];", shared=SHARED_BYTES,
    )  # fmt: skip
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    result = np.zeros((64, columns), "f4")
    for i in range(columns // 2):
        result[16 * warp + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2] = d[:, i]
    return result


def strides(mode: int, transposed: bool, down: int, side: int) -> tuple[int, int]:
    """Leading and stride offset of a descriptor."""
    if transposed:
        return (down, side) if mode == 0 else (side, down)
    return (side, down) if mode == 0 else (16, down)


def numbers(columns: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(columns)
    return rng.integers(-8, 9, (64, depth)), rng.integers(-8, 9, (depth, columns))


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("kind", "columns", "transposed"), [("tf32", 16, False), ("f16", 64, False), ("f16", 64, True)]
)
def test_layouts(mode: int, described: bool, kind: str, columns: int, transposed: bool) -> None:
    a, b = numbers(columns, 8 if kind == "tf32" else 16)
    found = multiply(a, b, kind, mode, described=described, transposed=transposed)
    assert (found == a @ b + 1).all()


def test_accumulators_and_signs() -> None:
    a, b = numbers(8, 8)
    options = {"kind": "tf32", "mode": 1, "described": False}
    assert (multiply(a, b, change=("%p, 1, 1;", "0, 1, 1;"), **options) == a @ b).all()
    assert (multiply(a, b, change=("setp.eq.u32 %p, %i, %i", "setp.ne.u32 %p, %i, %i"), **options) == a @ b).all()
    assert (multiply(a, b, change=("%p, 1, 1;", "%p, -1, 1;"), **options) == 1 - a @ b).all()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (("fence.proxy.async.shared::cta;", ""), Race, "without a fence.proxy.async"),
        (("bar.sync 0;", ""), Race, "reads what"),
        (("wgmma.fence.sync.aligned;", ""), Race, "%a0 is given to a product without a wgmma.fence"),
        (("wgmma.wait_group.sync.aligned 0;", ""), Race, "%d0 is touched while a product is in flight"),
        (("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"), Race, "in flight"),
        (("wgmma.commit_group.sync.aligned;", ""), Race, "in flight"),
        (("wgmma.commit_group", "add.s32 %a0, %a0, 1; wgmma.commit_group"), Race, "%a0 is touched"),
        (("ld.global.v2.b64 {%ra, %rb}, [%ra];", "cvt.u64.u32 %rb, %t;"), Fault, "different descriptors"),
        (("ld.global.v2.b64 {%ra, %rb}, [%ra];", "mov.b64 %rb, 2047;"), Fault, "reaches byte"),
        # A write behind a barrier, but in front of the wait, and the same behind both.
        (("wgmma.wait_group", "bar.sync 0; st.shared.b32 [16384], %x1; wgmma.wait_group"), Race, "writes over what"),
        (("aligned 0;", "aligned 0; st.shared.b32 [16384], %x1;"), Race, "writes over what"),
    ],
)
def test_what_is_forgotten(change: tuple[str, str], error: type[Exception], said: str) -> None:
    a, b = numbers(8, 8)
    with pytest.raises(error, match=re.escape(said)):
        multiply(a, b, "tf32", 1, described=False, change=change)


def test_a_write_behind_the_wait_and_a_barrier() -> None:
    a, b = numbers(8, 8)
    change = "aligned 0;", "aligned 0; bar.sync 0; st.shared.b32 [16384], %i;"
    assert (multiply(a, b, "tf32", 1, described=False, change=change) == a @ b + 1).all()


def test_products_in_a_loop() -> None:
    """Registers are in flight from one turn of a loop to the next, too."""
    text = """
    .reg .pred p; .reg .b32 i, a<4>, d<4>; .reg .b64 b;
    mov.b32 i, 0; mov.b64 b, 0; mov.b32 d0, 0; mov.b32 d1, 0; mov.b32 d2, 0; mov.b32 d3, 0;
    mov.b32 a0, 0; mov.b32 a1, 0; mov.b32 a2, 0; mov.b32 a3, 0;
    $loop:
    WAIT
    add.f32 d0, d0, d1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {d0, d1, d2, d3}, {a0, a1, a2, a3}, b, 1, 1, 1;
    wgmma.commit_group.sync.aligned;
    add.s32 i, i, 1; setp.lt.u32 p, i, 3;
    @p bra $loop;
    wgmma.wait_group.sync.aligned 0; ret;
    """
    Program(kernel(text.replace("WAIT", "wgmma.wait_group.sync.aligned 0;"), arch=90)).code("k")
    with pytest.raises(Race, match="d0 is touched"):
        Program(kernel(text.replace("WAIT", ""), arch=90)).code("k")
