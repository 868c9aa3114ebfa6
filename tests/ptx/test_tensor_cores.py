"""Products of matrices: where operands lie, and how sums are rounded."""

import re

import numpy as np
import pytest
import torch

from bench.ptx import BarrierFault
from bench.ptx.tensor_cores import Adder, adder_of, multiply
from ptx_snippets import launch, registers_a, registers_b, registers_c, tensor


def run_mma(opcode: str, *operands: np.ndarray, arch: int = 80) -> np.ndarray:
    """D's registers, [32, 4]."""
    lines, names = [".reg .b32 t, r<40>; .reg .b64 p, q; mov.u32 t, %tid.x;"], []
    first = 0
    for name, x in zip("abc", operands, strict=True):
        lines.append(f"ld.param.u64 p, [{name}]; mad.wide.u32 q, t, {4 * x.shape[1]}, p;")
        own = [f"r{first + i}" for i in range(x.shape[1])]
        lines += [f"ld.global.b32 {register}, [q+{4 * i}];" for i, register in enumerate(own)]
        names.append("{" + ", ".join(own) + "}")
        first += x.shape[1]
    lines.append(f"{opcode} {{r30, r31, r32, r33}}, {', '.join(names)};")
    lines.append("ld.param.u64 p, [d]; mad.wide.u32 q, t, 16, p; st.global.v4.b32 [q], {r30, r31, r32, r33}; ret;")
    d = np.zeros((32, 4), "u4")
    tensors = {name: tensor(np.ascontiguousarray(x)) for name, x in zip("abc", operands, strict=True)}
    launch("\n".join(lines), {**tensors, "d": tensor(d)}, arch=arch)
    return d


@pytest.mark.parametrize(
    ("shape", "kind", "depth"),
    [
        ("m16n8k4", "tf32", 4),
        ("m16n8k8", "tf32", 8),
        ("m16n8k8", "f16", 8),
        ("m16n8k16", "f16", 16),
        ("m16n8k8", "bf16", 8),
        ("m16n8k16", "bf16", 16),
    ],
)
def test_mma(shape: str, kind: str, depth: int) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 9, size) for size in ((16, depth), (depth, 8), (16, 8)))
    found = run_mma(
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32",
        registers_a(a, kind), registers_b(b, kind), registers_c(c),
    )  # fmt: skip
    assert (found == registers_c(a @ b + c)).all()


def test_mma_does_not_see_the_lowest_bits_of_its_operands() -> None:
    a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
    a[0, 0], b[0, 0] = np.float32(1 + 2.0**-10 + 2.0**-11), np.float32(1 + 2.0**-23)
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    found = run_mma(opcode, registers_a(a, "tf32"), registers_b(b, "tf32"), registers_c(c))
    assert found.view("f4")[0, 0] == 1 + 2.0**-10


def test_all_of_a_warp_multiplies() -> None:
    text = """
    .reg .pred p; .reg .b32 t, r<9>; mov.u32 t, %tid.x; setp.lt.u32 p, t, 31;
    @p mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {r0, r1, r2, r3}, {t, t}, {t}, {t, t, t, t}; ret;
    """
    with pytest.raises(BarrierFault, match=r"thread \(31, 0, 0\)"):
        launch(text, {})


def sum_of(products: list[float], start: float, adder: Adder) -> float:
    """start + the sum of products x 1."""
    a, b = np.array(products, "f4").reshape(-1, 1), np.ones((len(products), 1), "f4")
    with np.errstate(invalid="ignore"):
        return float(multiply(a, b, np.array([[start]], "f4"), adder)[0, 0])


def test_what_lies_below_the_largest_number_is_cut_off() -> None:
    ulp = 2.0**-23
    # Half a unit of 1 each: all are lost, to the nearest they would have been two units.
    assert sum_of([ulp / 2] * 4, 1.0, Adder(4, 0)) == 1.0
    # One more bit keeps them, and the sum is cut off.
    assert sum_of([ulp / 2] * 4, 1.0, Adder(4, 1)) == 1 + 2 * ulp
    assert sum_of([ulp / 2] * 3, 1.0, Adder(4, 1)) == 1 + ulp
    assert sum_of([ulp / 4] * 4, 1.0, Adder(4, 1)) == 1.0
    assert sum_of([ulp / 4] * 4, 1.0, Adder(4, 2)) == 1 + ulp
    # Towards zero, whatever the sign.
    assert sum_of([-ulp / 2] * 3, -1.0, Adder(4, 1)) == -1 - ulp
    # Between groups, too.
    assert sum_of([ulp / 2] * 4, 1.0, Adder(2, 1)) == 1 + 2 * ulp
    assert sum_of([ulp / 2] * 4, 1.0, Adder(1, 1)) == 1.0
    # A large product hides the others, even where another cancels it.
    assert sum_of([2.0**30, -(2.0**30), 1.0], 0.0, Adder(4, 0)) == 0.0
    assert sum_of([2.0**30, -(2.0**30), 1.0], 0.0, Adder(2, 0)) == 1.0


def test_products_are_not_normalized() -> None:
    """1.5 x 1.5 counts as a number from 1 on, not from 2: a bit more of what is beside it is kept."""
    a, b = np.array([[1.5], [2.0**-23]], "f4"), np.array([[1.5], [1.0]], "f4")
    total = multiply(a, b, np.zeros((1, 1), "f4"), Adder(4, 0))
    assert total[0, 0] == np.float32(2.25)  # the sum needs one bit more than there are
    a[1] = 2.0**-22
    assert multiply(a, b, np.zeros((1, 1), "f4"), Adder(4, 0))[0, 0] == 2.25 + 2.0**-22


def test_infinities_and_nan() -> None:
    adder = Adder(4, 1)
    assert sum_of([np.inf, 1.0], 0.0, adder) == np.inf
    assert np.isnan(sum_of([np.inf, -np.inf], 0.0, adder))
    assert np.isnan(sum_of([np.nan], 0.0, adder))
    assert sum_of([0.0, 0.0], 0.0, adder) == 0.0
    assert sum_of([1.0], -np.inf, adder) == -np.inf
    assert sum_of([2.0**100] * 4, 2.0**127 * 1.5, adder) == 2.0**127 * 1.5


def test_architectures_differ() -> None:
    assert adder_of(70, "f16") == Adder(4, 0)
    assert adder_of(80, "f16") == Adder(8, 1)
    assert adder_of(80, "tf32") == Adder(4, 1)
    assert adder_of(90, "f16") == Adder(16, 2)
    assert adder_of(90, "tf32") == Adder(8, 2)
    ulp = 2.0**-23
    a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
    a[0], b[:, 0], c[0, 0] = ulp / 4, 1.0, 1.0
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    registers = registers_a(a, "tf32"), registers_b(b, "tf32"), registers_c(c)
    assert run_mma(opcode, *registers, arch=80).view("f4")[0, 0] == 1.0
    assert run_mma(opcode, *registers, arch=90).view("f4")[0, 0] == 1 + 2 * ulp


GROUP, MEMBER = np.divmod(np.arange(32), 4)
MATRICES = """
.shared .align 16 .b8 buffer[1024];
.reg .b32 t, at, x<8>; .reg .b64 p, q; mov.u32 t, %tid.x;
ld.param.u64 p, [x]; mad.wide.u32 q, t, 16, p; shl.b32 at, t, 4;
"""


def test_ldmatrix() -> None:
    """Lane 8 i + r gives the address of row r of matrix i; lane t gets the pair at row t / 4, columns 2 (t % 4)."""
    x = np.arange(256, dtype="u2").reshape(4, 8, 8)
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            y = np.zeros((32, count), "u4")
            names = ", ".join(f"x{i}" for i in range(count))
            store = "".join(f"st.global.b32 [q+{4 * i}], x{i};" for i in range(count))
            text = f"""{MATRICES}
            ld.global.v4.b32 {{x0, x1, x2, x3}}, [q]; st.shared.v4.b32 [at], {{x0, x1, x2, x3}}; bar.sync 0;
            ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [at];
            ld.param.u64 p, [y]; mad.wide.u32 q, t, {4 * count}, p; {store} ret;
            """
            counts = launch(text, {"x": tensor(x.copy()), "y": tensor(y)})
            pairs = y.view("u2").reshape(32, count, 2)
            for i in range(count):
                matrix = x[i].T if trans else x[i]
                expected = np.stack([matrix[GROUP, 2 * MEMBER], matrix[GROUP, 2 * MEMBER + 1]], 1)
                assert (pairs[:, i] == expected).all()
            assert (counts.shared_load_requests, counts.shared_load_wavefronts) == (1, count)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse(trans: str) -> None:
    x = np.arange(256, dtype="u2")
    y = np.zeros(256, "u2")
    text = f"""{MATRICES}
    ld.global.v4.b32 {{x0, x1, x2, x3}}, [q]; st.shared.v4.b32 [at], {{x0, x1, x2, x3}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{x0, x1, x2, x3}}, [at];
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [at+512], {{x0, x1, x2, x3}};
    bar.sync 0;
    ld.shared.v4.b32 {{x0, x1, x2, x3}}, [at+512];
    ld.param.u64 p, [y]; mad.wide.u32 q, t, 16, p; st.global.v4.b32 [q], {{x0, x1, x2, x3}}; ret;
    """
    launch(text, {"x": tensor(x), "y": tensor(y)})
    assert (y == x).all()


def test_rows_of_matrices_are_checked() -> None:
    from bench.ptx import Misaligned, OutOfRange, Race, Uninitialized

    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {x0, x1, x2, x3}, [at+OFFSET]; ret;"
    x = torch.zeros(256, dtype=torch.int32)
    fill = "mov.b64 p, 0; st.shared.v2.b64 [at], {p, p};"
    for text, offset, error in (
        (fill + "bar.sync 0;" + load, 0, None),
        (fill + "bar.sync 0;" + load, 8, Misaligned),
        (fill + "bar.sync 0;" + load, 528, OutOfRange),
        (fill + "bar.sync 0;" + load, 256, Uninitialized),
        (fill + load, 0, Race),
    ):
        made = MATRICES + text.replace("OFFSET", str(offset))
        if error is None:
            launch(made, {"x": x})
        else:
            with pytest.raises(error, match=re.escape("ldmatrix")):
                launch(made, {"x": x})


def test_conflicts_between_rows_of_a_matrix() -> None:
    """Rows 128 bytes apart lie in the same banks: eight wavefronts a matrix."""
    text = """
    .shared .align 16 .b8 buffer[4096];
    .reg .b32 t, at, i, x<8>; .reg .b64 z; .reg .pred p;
    mov.u32 t, %tid.x; mov.b64 z, 0; shl.b32 at, t, 7; mov.b32 i, 0;
    $loop: add.s32 x0, at, i; st.shared.v2.b64 [x0], {z, z}; add.s32 i, i, 16; setp.lt.u32 p, i, 128; @p bra $loop;
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {x0, x1, x2, x3}, [at]; ret;
    """
    counts = launch(text, {})
    assert counts.shared_load_wavefronts == 32
