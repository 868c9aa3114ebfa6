"""What bench.ptx counts, against numbers worked by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from bench.ptx import Counts
from bench.ptx.counts import sectors, wavefronts
from ptx_snippets import launch

LANE = np.arange(32)


@pytest.mark.parametrize(
    ("addresses", "width", "requests", "touched", "useful"),
    [
        (4 * LANE, 4, 1, 4, 128),
        (4 * LANE + 4, 4, 1, 5, 128),
        (4 * LANE[::-1], 4, 1, 4, 128),
        (0 * LANE, 4, 1, 1, 4),
        (32 * LANE, 4, 1, 32, 128),
        (16 * LANE, 16, 1, 16, 512),
        (2 * LANE, 2, 1, 2, 64),
        (LANE // 4 * 64, 16, 1, 8, 128),
        (LANE % 4 * 1024 + LANE // 4 * 16, 16, 1, 16, 512),
    ],
)
def test_sectors(addresses: np.ndarray, width: int, requests: int, touched: int, useful: int) -> None:
    assert sectors(addresses.reshape(1, 32), None, width) == (requests, touched, useful)
    both = np.stack([addresses, addresses + 4096])
    assert sectors(both, None, width) == (2 * requests, 2 * touched, 2 * useful)


def test_sectors_of_some_threads() -> None:
    addresses = (4 * LANE).reshape(1, 32)
    assert sectors(addresses, (LANE < 8).reshape(1, 32), 4) == (1, 1, 32)
    assert sectors(addresses, (LANE % 8 == 3).reshape(1, 32), 4) == (1, 4, 16)
    assert sectors(addresses, np.zeros((1, 32), bool), 4) == (0, 0, 0)
    two = np.concatenate([addresses, addresses], 1)
    assert sectors(two, (np.arange(64) < 40).reshape(1, 64), 4) == (2, 5, 160)


@pytest.mark.parametrize(
    ("addresses", "width", "fronts"),
    [
        (4 * LANE, 4, 1),
        (4 * (LANE ^ 5), 4, 1),
        (0 * LANE, 4, 1),
        (8 * LANE, 4, 2),
        (128 * LANE, 4, 32),
        (132 * LANE, 4, 1),
        (128 * (LANE // 16) + 4 * (LANE % 16), 4, 2),
        (2 * LANE, 2, 1),
        (LANE, 1, 1),
        (128 * LANE, 1, 32),
        (8 * LANE, 8, 2),
        (16 * LANE, 8, 4),
        (0 * LANE, 8, 2),
        (16 * LANE, 16, 4),
        (128 * LANE, 16, 32),
        (144 * LANE, 16, 4),
    ],
)
def test_wavefronts(addresses: np.ndarray, width: int, fronts: int) -> None:
    least = max(width // 4, 1)  # parts of a warp that are served one after the other
    assert wavefronts(addresses.reshape(1, 32), None, width) == (1, fronts, fronts - least)


def test_wavefronts_of_some_threads() -> None:
    addresses = (128 * LANE).reshape(1, 32)
    assert wavefronts(addresses, (LANE < 5).reshape(1, 32), 4) == (1, 5, 4)
    assert wavefronts(addresses, np.zeros((1, 32), bool), 4) == (0, 0, 0)
    assert wavefronts((16 * LANE).reshape(1, 32), (LANE < 9).reshape(1, 32), 16) == (1, 2, 0)


START = """
.shared .align 16 .b8 buffer[4096];
.reg .pred p; .reg .b32 t, b, i, at, x<9>; .reg .b64 rd, o;
mov.u32 t, %tid.x; mov.u32 b, %ctaid.x; mad.lo.s32 i, b, %ntid.x, t;
"""


def run(text: str, **options: object) -> Counts:
    x = torch.zeros(4096, dtype=torch.int32)
    return launch(START + text + "ret;", {"x": x}, **{"block": 64, "grid": 2, **options})


def test_instructions() -> None:
    counts = run("setp.lt.u32 p, t, 40; @p add.s32 i, i, 1;")
    # Three of the start, two, and ret; a guard takes nobody out.
    assert counts.thread_instructions == 6 * 128
    assert counts.warp_instructions == 6 * 4
    assert counts.opcodes["add.s32"] == 4
    assert counts.opcodes["mov.u32"] == 8
    assert counts.blocks == 2


def test_instructions_of_diverged_warps() -> None:
    text = """
    setp.lt.u32 p, t, 40;
    @p bra $low;
    add.s32 i, i, 1; bra $end;
    $low: sub.s32 i, i, 1;
    $end:
    """
    counts = run(text)
    # Warp 0 of each block goes low, warp 1 both ways.
    assert counts.divergent_branches == 2
    assert counts.opcodes["add.s32"] == 2
    assert counts.opcodes["sub.s32"] == 4
    assert counts.opcodes["ret"] == 4
    assert counts.thread_instructions == 128 * (3 + 1 + 1 + 1) + 2 * (24 * 2 + 40)


def test_memory() -> None:
    text = """
    ld.param.u64 rd, [x]; mad.wide.u32 o, i, 4, rd; ld.global.b32 x0, [o];
    setp.lt.u32 p, t, 8; @p ld.global.v4.b32 {x1, x2, x3, x4}, [rd];
    mad.wide.u32 o, i, 32, rd; st.global.b32 [o], x0;
    shl.b32 at, t, 3; st.shared.b32 [at], x0; bar.sync 0; ld.shared.b32 x1, [at]; ld.shared.b32 x1, [buffer];
    """
    counts = run(text.replace("st.global", "// st.global"))
    assert (counts.global_load_requests, counts.global_load_sectors, counts.global_load_bytes) == (6, 18, 544)
    assert (counts.shared_store_requests, counts.shared_store_wavefronts) == (4, 8)
    assert (counts.shared_load_requests, counts.shared_load_wavefronts) == (8, 12)
    assert counts.barriers == 4
    text = "ld.param.u64 rd, [x]; mad.wide.u32 o, i, 32, rd; st.global.b32 [o], t; red.global.add.u32 [o+4], t;"
    counts = run(text)
    assert (counts.global_store_requests, counts.global_store_sectors, counts.global_store_bytes) == (4, 128, 512)
    assert (counts.atomic_requests, counts.atomic_sectors, counts.atomic_bytes) == (4, 128, 512)


def test_what_threads_share_is_counted_for_every_warp() -> None:
    counts = run("ld.param.u64 rd, [x]; ld.global.b32 x0, [rd];")
    assert (counts.global_load_requests, counts.global_load_sectors, counts.global_load_bytes) == (4, 4, 16)
    counts = run("ld.param.u64 rd, [x]; mad.wide.u32 o, t, 4, rd; ld.global.b32 x0, [o];")
    assert (counts.global_load_requests, counts.global_load_sectors, counts.global_load_bytes) == (4, 16, 512)


@pytest.mark.parametrize("together", [64, 128, 4096])
def test_counts_do_not_depend_on_how_blocks_are_run(together: int) -> None:
    text = """
    ld.param.u64 rd, [x]; mad.wide.u32 o, i, 4, rd; ld.global.b32 x0, [o];
    mul.lo.s32 at, t, 12; st.shared.b32 [at], x0; setp.lt.u32 p, t, b; @p bra $end; add.s32 x0, x0, 1; $end:
    """
    assert run(text, grid=7, threads_at_once=together) == run(text, grid=7)


def test_counts_are_added_and_divided() -> None:
    one = run("", blocks=[0])
    assert one + one == run("")
    assert run("").per(2) == one
    assert isinstance(one.per(2).opcodes, Counter)


def test_without_counts() -> None:
    assert run("", count=False) == Counts(blocks=2)
