"""What `bench.counts` counts, bounds and compares; and that no kernel does more than its budget allows."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter

import pytest
import torch

from bench.counts import cases as count_cases
from bench.counts import counts, rates
from bench.counts import tables as count_tables
from bench.ops import tune
from bench.ops.cases import Work
from bench.ptx import Counts, Program, csrc_host, csrc_launch
from bench.report import report
from bench.resources import of_csrc
from epigraf_fast import ops
from ptx_snippets import kernel

# What is counted here, of each compiler something; all is counted by `python -m bench.counts --check`.
CHECKED = {
    70: ("decode fwd fp32", "stratified"),
    80: ("decode fwd fp32", "composite fwd", "composite bwd", "importance"),
    90: ("decode fwd fp32", "sample bwd fp32"),
}
CHECKED_OF_CSRC = {
    70: ("D 32x64x64 bias_act fp32 bwd",),
    80: ("G 64 conv1 epilogue fp32 fwd", "G 64 conv0 epilogue fp32 bwd", "G 64 planes up 2 and add bwd"),
}

UNIT = count_cases.Case("made up", "element", 100, lambda: None, Work(0))


def numbers_of(grid: tuple[int, int, int]) -> list[int]:
    return [number for number, _ in counts.chosen_blocks(grid)]


@pytest.mark.parametrize(
    "grid", [(1, 1, 1), (8, 1, 1), (9, 1, 1), (24673, 1, 1), (2, 26, 1), (16, 26, 1), (1024, 8, 2)]
)
def test_chosen_blocks_stand_for_the_whole_grid(grid: tuple[int, int, int]) -> None:
    chosen, width = counts.chosen_blocks(grid), grid[0]
    numbers = numbers_of(grid)
    assert sum(times for _, times in chosen) == grid[0] * grid[1] * grid[2]
    assert len(set(numbers)) == len(numbers)
    assert {number // width % grid[1] for number in numbers} == set(range(grid[1]))
    assert {number // width // grid[1] for number in numbers} == set(range(grid[2]))


def test_chosen_blocks_by_hand() -> None:
    assert counts.chosen_blocks((80, 1, 1)) == [(10 * i + 5, 10) for i in range(8)]
    assert counts.chosen_blocks((10, 1, 1), 3) == [(1, 3), (4, 3), (8, 4)]
    assert numbers_of((3, 4, 1)) == list(range(12))
    rows = counts.chosen_blocks((101, 2, 1))
    assert rows == [(0, 1), (26, 100), (101, 1), (177, 100)]
    # Of two layers of three rows, 50 columns each: row 0 in layer 0, rows 1 in layer 0, row 2 in layer 1.
    layers = counts.chosen_blocks((50, 3, 2))
    assert layers == [(0, 2), (9, 98), (50, 2), (75, 98), (250, 2), (291, 98)]


def made_up(text: str, grid: tuple[int, int, int]) -> count_cases.Launch:
    entry = Program(kernel(text)).entries["k"]
    return count_cases.Launch("k", entry, grid, (64, 1, 1), b"", {}, 0, 80)


def test_a_sample_by_hand() -> None:
    """Blocks from 40 on go twice round; the sample has four of each, and every one stands for 10."""
    text = """
    .reg .pred p; .reg .b32 b, i;
    mov.u32 b, %ctaid.x; setp.ge.u32 p, b, 40; selp.b32 i, 2, 1, p;
    $again: sub.s32 i, i, 1; bar.sync 0; setp.gt.s32 p, i, 0; @p bra $again;
    ret;
    """
    one = counts.sample(made_up(text, (80, 1, 1)))
    assert one.whole.warp_instructions == 2 * (40 * (3 + 4 + 1) + 40 * (3 + 8 + 1))
    assert one.whole.barriers == 2 * (40 + 80)
    assert one.whole.blocks == 80
    assert one.longest == 2 * 12
    row = counts.row(UNIT, 0, one)
    assert row["warp_instructions"] == 16.0
    assert row["barriers_of_block"] == 1.5
    assert row["lanes"] == 1.0


def test_sectors_that_blocks_share_are_distinct_ones_of_each() -> None:
    x = torch.zeros(4096, dtype=torch.int32)
    text = """
    .reg .b32 t, v; .reg .b64 rd, o;
    ld.param.u64 rd, [x]; mov.u32 t, %tid.x; mad.wide.u32 o, t, 4, rd;
    ld.global.b32 v, [o]; ld.global.b32 v, [o+128]; st.global.b32 [rd], v; st.global.b32 [o], v; ret;
    """
    program = Program(kernel(text, params=".param .u64 x"))
    address = x.data_ptr().to_bytes(8, "little")
    options = {"grid": (3, 1, 1), "block": (64, 1, 1), "params": address, "tensors": {"x": x}, "check": False}
    for together in (64, 8192):
        found = program.launch("k", **options, threads_at_once=together)
        # Each block: 256 bytes, and the 256 from byte 128 on, 384 in all; to the first sector two warps store twice.
        assert (found.global_load_sectors, found.global_load_distinct) == (3 * 16, 3 * 12)
        assert (found.global_store_sectors, found.global_store_distinct) == (3 * 10, 3 * 8)


A100 = rates.GPUS[80]


@pytest.mark.parametrize(
    ("has", "footprint", "limit", "seconds"),
    [
        ({"warp_instructions": 108 * 4 * 1.41e9}, None, "issue", 1.0),
        ({"opcodes": Counter({"fma.rn.f32": 108 * 2 * 1.41e9, "mov.u32": 9e12})}, None, "fp32", 1.0),
        ({"shared_load_wavefronts": 108e9, "shared_store_wavefronts": 44.28e9}, None, "shared memory", 1.0),
        ({"global_load_sectors": 4 * 108 * 1.41e9}, None, "L1", 1.0),
        ({"global_load_distinct": 100 * 1.41e9, "global_store_sectors": 60 * 1.41e9}, None, "L2", 1.0),
        ({"global_load_distinct": 1555e9 / 64, "global_store_distinct": 1555e9 / 64}, 1e13, "DRAM", 1.0),
        ({"global_load_distinct": 1555e7}, 1555e8, "DRAM", 0.1),
        ({"atomic_sectors": 80 * 1.41e9}, 0, "atomics", 1.0),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bounds_by_hand(has: dict[str, float], footprint: float | None, limit: str, seconds: float) -> None:
    found = rates.bounds(Counts(**has), A100, footprint=footprint)
    assert max(found, key=found.__getitem__) == limit
    assert found[limit] == pytest.approx(seconds, rel=1e-12)


def test_a_block_alone_bounds_a_launch() -> None:
    few = Counts(warp_instructions=2000)
    found = rates.bounds(few, A100, longest=1000)
    assert found["one block"] == pytest.approx(1000 / 4 / 1.41e9)
    assert found["issue"] == pytest.approx(2000 / 4 / 108 / 1.41e9)


def test_products_and_their_bound_by_hand() -> None:
    opcodes = {
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": 3,
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": 1,
        "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32": 4,
        "wgmma.commit_group.sync.aligned": 7,
        "fma.rn.f32": 11,
    }
    found = rates.tensor_flops(opcodes)
    assert found == {"tf32": 3 * 2048 + 2 * 64 * 32 * 8, "f16": 4096}
    assert rates.fp32_instructions(opcodes) == 11
    bound = rates.bounds(Counts(opcodes=Counter(opcodes)), A100)["tensor cores"]
    assert bound == pytest.approx((3 * 2048 + 2 * 64 * 32 * 8) / 156e12 + 4096 / 312e12)
    assert (
        rates.fp32_instructions({"add.f32": 1, "mul.rn.ftz.f32": 2, "fma.rn.f32x2": 1, "add.f64": 5, "max.f32": 3}) == 5
    )


def test_floors_by_hand() -> None:
    assert rates.floor(Work(1555 * 10**9), A100, "fp32") == pytest.approx(1.0)
    assert rates.floor(Work(0, gather_bytes=32 * 160 * 10**6), A100, "fp32") == pytest.approx(1e6 / 1.41e9)
    assert rates.floor(Work(0, atomics=8 * 80 * 10**6), A100, "fp32") == pytest.approx(1e6 / 1.41e9)
    flops = Work(0, flops=156 * 10**12)
    assert rates.floor(flops, A100, "tf32") == pytest.approx(1.0)
    assert rates.floor(flops, A100, "fp32") == pytest.approx(156e12 / (2 * 64 * 108 * 1.41e9))


@pytest.mark.parametrize(("arch", "flops"), [(70, 15.7e12), (80, 19.5e12), (90, 67e12)])
def test_rates_agree_with_the_datasheets(arch: int, flops: float) -> None:
    gpu = rates.GPUS[arch]
    assert 2 * gpu.fp32_lanes * gpu.multiprocessors * gpu.ghz * 1e9 == pytest.approx(flops, rel=0.01)


# ---- budgets


def rows_of(**changed: float) -> list[counts.Row]:
    one = counts.sample(made_up(".reg .b32 b; mov.u32 b, 1; bar.sync 0; ret;", (8, 1, 1)))
    return [{**counts.row(UNIT, 0, one), **changed}]


def test_a_budget_is_what_was_counted() -> None:
    budgets = counts.budgets_of(rows_of())
    assert budgets == {"sm_80 made up, k 0": {"warp_instructions": 0.48, "barriers": 0.16}}
    assert counts.compare(rows_of(), budgets) == ([], [])


@pytest.mark.parametrize(
    ("changed", "worse", "better"),
    [
        ({"warp_instructions": 0.4815}, 0, 0),
        ({"warp_instructions": 0.49}, 1, 0),
        ({"warp_instructions": 0.476}, 0, 0),
        ({"warp_instructions": 0.46}, 0, 1),
        ({"atomic_sectors": 0.1}, 1, 0),
        ({"atomic_sectors": 0.0005}, 0, 0),
        ({"barriers": 0.0, "warp_instructions": 1.0}, 1, 1),
    ],
)
def test_what_is_worse_or_better_than_a_budget(changed: dict[str, float], worse: int, better: int) -> None:
    found = counts.compare(rows_of(**changed), counts.budgets_of(rows_of()))
    assert [len(lines) for lines in found] == [worse, better]
    assert all("the budget is" in line for line in found[0])
    assert all("lower the budget" in line for line in found[1])


def test_a_kernel_without_a_budget_is_told() -> None:
    worse, better = counts.compare(rows_of(), {})
    assert (len(worse), better) == (1, [])
    assert "--write-budgets" in worse[0]


def test_written_budgets_are_read_and_the_others_stay(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those of cases that are no more."""
    monkeypatch.setattr(counts, "BUDGETS", tmp_path / "budgets.json")
    monkeypatch.setattr(counts, "names", lambda arch: ["first", "second"])
    counts.write_budgets(rows_of(case="first"))
    counts.write_budgets(rows_of(case="gone"))
    counts.write_budgets(rows_of(case="second", barriers=3.0))
    known = counts.read_budgets()
    assert list(known["budgets"]) == ["sm_80 first, k 0", "sm_80 second, k 0"]
    assert known["budgets"]["sm_80 second, k 0"]["barriers"] == 3.0
    assert known["versions"] == counts.versions()


def test_every_case_has_budgets() -> None:
    """A plan or a shape that is added is counted too, under a name of its own."""
    pytest.importorskip("triton")
    named = {name.partition(", ")[0] for name in counts.read_budgets()["budgets"]}
    cases = [f"sm_{arch} {name}" for arch in counts.ARCHS for name in counts.names(arch)]
    assert len(set(cases)) == len(cases)
    assert set(cases) == named


def check(launches, cases, arch: int, names: tuple[str, ...]) -> None:
    """Raises where one of these cases, of those with plans the default, does more than its budget."""
    known = counts.read_budgets()
    if known["versions"] != counts.versions():
        pytest.skip(f"the budgets are of {known['versions']}, this is {counts.versions()}")
    wanted = [case for case in cases if any(is_called(case, name) for name in names)]
    assert len(wanted) == len(names)
    found = [row for case in wanted for row in counts.count(case, launches, arch)]
    worse, better = counts.compare(found, known["budgets"])
    assert not worse, "\n".join(worse)
    assert not better, "fewer than the budget, which is to be lowered by --write-budgets:\n" + "\n".join(better)


def is_called(case: count_cases.Case, name: str) -> bool:
    of_plan = case.name.startswith(f"{name} ") and case.name.endswith(count_tables.SHOWN_SCALE)
    return case.default and (case.name == name or of_plan)


@pytest.mark.parametrize("arch", CHECKED)
def test_triton_kernels_keep_their_budgets(arch: int) -> None:
    pytest.importorskip("triton")
    check(count_cases.triton_launches, count_cases.triton_cases(arch), arch, CHECKED[arch])


def csrc_is_here(arch: int) -> None:
    lacking = of_csrc.lacking(arch) or csrc_host.module()
    if isinstance(lacking, str):
        pytest.skip(lacking)


@pytest.mark.parametrize("arch", CHECKED_OF_CSRC)
def test_csrc_kernels_keep_their_budgets(arch: int) -> None:
    csrc_is_here(arch)
    check(count_cases.csrc_launches, count_cases.csrc_cases(), arch, CHECKED_OF_CSRC[arch])


def test_counts_of_csrc_do_not_depend_on_values() -> None:
    """So that zeros stand for activations."""
    csrc_is_here(80)

    def epilogue(draw) -> list[counts.Row]:
        def call() -> None:
            x, demod = draw(2, 64, 16, 16).contiguous(memory_format=torch.channels_last), draw(2, 64)
            (y,) = ops.layer_epilogue(
                x.requires_grad_(), demod=demod.requires_grad_(), act="lrelu", clamp=0.5, backend="cpu"
            )
            torch.autograd.grad(y, (x, demod), draw(*y.shape).contiguous(memory_format=torch.channels_last))

        case = count_cases.Case(f"epilogue {draw}", "element", 2 * 64 * 256, call, Work(0))
        return [{**row, "case": ""} for row in counts.count(case, count_cases.csrc_launches, 80)]

    drawn = epilogue(functools.partial(torch.randn, generator=torch.Generator().manual_seed(0)))
    assert len(drawn) == 3
    assert drawn == epilogue(torch.zeros)


def test_every_launcher_has_names_for_its_tensors() -> None:
    launchers = re.findall(r"EPIGRAF_DEFINE\(m, (\w+)\);", (csrc_host.CSRC / "bindings.cpp").read_text())
    assert {"layer_epilogue_fwd", "layer_epilogue_double_bwd", "upfirdn2d"} <= set(launchers)
    for name in launchers:
        assert csrc_launch.argument_names(name)


def test_cases_that_are_counted_again_take_their_old_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that are no more go."""
    monkeypatch.setattr(counts, "names", lambda arch: ["x", "y", "z"] if arch == 80 else ["x"])
    before = [{"arch": a, "case": c, "launch": i, "n": 1} for a in (70, 80) for c in ("x", "y") for i in range(2)]
    again = [{"arch": 80, "case": "x", "launch": 0, "n": 2}, {"arch": 80, "case": "z", "launch": 0, "n": 2}]
    assert counts.merged(before, again) == [*before[:2], again[0], *before[6:], again[1]]


# ---- what is said of the counts


def result(rows: list[counts.Row]) -> dict:
    config = {"command": "python -m bench.counts", "batch": 8, "versions": {"triton": "1.2"}}
    environment = {"commit": "abc", "gpu": None, "versions": {}, "cpu": {}}
    return {
        "schema": 1, "kind": "counts", "date": "2026-01-02", "environment": environment, "config": config,
        "rates": rates.table(), "cases": rows, "file": "counts.json",
    }  # fmt: skip


def test_the_short_table_adds_launches_and_divides_by_the_batch() -> None:
    one = rows_of()[0]
    launch = {**one, "case": "decode bwd fp32 16x4+16x4 scale 0.35", "unit": "point", "floor_us": 24.0}
    first = {
        "warp_instructions": 100.0,
        "bound_us": 80.0,
        "bound": "atomics",
        "load_sectors": 30.0,
        "load_requests": 2.0,
    }
    second = {"warp_instructions": 23.4, "bound_us": 8.0, "bound": "issue", "load_sectors": 6.0, "load_requests": 1.0}
    rows = [
        {**launch, **first},
        {**launch, **second},
        {**launch, "case": "decode bwd fp32 16x4 scale 0.35", "default": False, "warp_instructions": 1e6},
        {**launch, "case": "decode bwd fp32 16x4+16x4 scale 1", "warp_instructions": 1e6},
    ]
    text = count_tables.short(result(rows))
    assert "| decoder, backward | point | 123 | 12 | 0 | 0 | 11 | atomics | 3 |" in text
    assert "counted, not timed" in text
    assert "[counts.json](bench/results/counts.json)" in text
    from_docs = text.replace("](bench/", "](../bench/").replace("](docs/", "](")
    assert from_docs in report.text([result(rows)])


def test_the_long_tables_have_every_launch_of_default_plans(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rows_of()[0]
    slow = {**one, "case": "decode fwd fp32 16x4 scale 0.35", "bound_us": 20.0, "us": {"issue": 20.0, "L1": 4.0}}
    fast = {**slow, "case": "decode fwd fp32 64x4 scale 0.35", "default": False, "bound_us": 10.0}
    text = count_tables.long(result([slow, fast, one]))
    assert text.count("| decode fwd fp32 16x4 scale 0.35 | `k` |") == 1
    assert "issue 20, L1 4" in text
    assert "decode fwd fp32 64x4 scale 0.35" not in text
    plans = text.partition("Plans of sm_80")[2]
    assert plans.index("| 64x4 |") < plans.index("| 16x4 (default) |")
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{count_tables.BEGIN}\nold\n{count_tables.END}\nafter\n")
    monkeypatch.setattr(count_tables, "PAGE", page)
    count_tables.write_page(result([slow, fast, one]))
    assert page.read_text() == f"before\n{count_tables.BEGIN}\n{text}\n{count_tables.END}\nafter\n"


def test_the_page_is_what_the_result_file_says() -> None:
    stored = {**json.loads(counts.RESULTS.read_text()), "file": counts.RESULTS.name}
    inside = count_tables.PAGE.read_text().partition(count_tables.BEGIN)[2].partition(count_tables.END)[0]
    assert inside.strip("\n") == count_tables.long(stored)


def test_the_readme_is_what_the_result_files_say() -> None:
    assert report.main(["--check"]) == 0


def test_the_result_file_is_of_the_budgets() -> None:
    stored = json.loads(counts.RESULTS.read_text())
    known = counts.read_budgets()
    assert stored["config"]["versions"] == known["versions"]
    assert counts.compare(stored["cases"], known["budgets"]) == ([], [])
    assert stored["rates"] == json.loads(json.dumps(rates.table()))
    assert stored["config"]["label"] == "counted, not timed"


def test_the_counted_order_of_plans() -> None:
    one = {**rows_of()[0], "unit": "point", "bound": "issue"}

    def launch(case: str, us: float, number: int = 0, **more: object) -> counts.Row:
        return {
            **one,
            "case": f"{case} scale 0.35",
            "bound_us": us,
            "launch": number,
            "plan": [[16, 4, 1, None]],
            **more,
        }

    rows = [
        launch("decode bwd fp32 16x4+16x4", 60.0),
        launch("decode bwd fp32 16x4+16x4", 50.0, 1),
        launch("decode bwd fp32 16x4", 100.0, default=False, plan=[[16, 4, 8, None]]),
        launch("decode fwd tf32 16x4", 7.0),
        launch("sample fwd fp32 16x4", 1.0),
        {**launch("decode fwd tf32 16x4", 1.0), "case": "decode fwd tf32 16x4 scale 1"},
        launch("decode fwd tf32 16x4", 5.0, arch=70),
    ]
    found = tune.counted(result(rows), archs=(80,))
    assert [(row["kernel"], row["precision"], row["least_us"], row["default"]) for row in found] == [
        ("decode_bwd", "fp32", 100.0, False),
        ("decode_bwd", "fp32", 110.0, True),
        ("decode_fwd", "tf32", 7.0, True),
    ]
    assert found[0]["plan"] == [[16, 4, 8, None]]
    lines = tune.format_counted(found).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("16x4 (default)")


def test_without_a_gpu_plans_are_listed_as_counted(tmp_path) -> None:
    assert "python -m bench.counts" in tune.without_gpu(tmp_path / "none.json")
    said = tune.without_gpu(counts.RESULTS)
    assert "counted and not timed" in said
    assert said.count("(default)") == sum(1 for arch in counts.ARCHS for _ in range(4 if arch < 80 else 6))


def test_command_lines(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**rows_of()[0], "case": "decode fwd"}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which the command ignores
    monkeypatch.setattr(counts, "rows", lambda archs, part, most: iter([row]))
    monkeypatch.setattr(counts, "BUDGETS", tmp_path / "budgets.json")
    path = tmp_path / "counts.json"
    assert counts.main(["--json", str(path), "--write-budgets", "--check"]) == 0
    out = capsys.readouterr().out
    assert "counted, not timed" in out
    assert "DRAM 1555 GB/s" in out
    stored = json.loads(path.read_text())
    assert stored["cases"] == [row]
    assert stored["config"]["command"].endswith("--write-budgets --check")
    assert {"torch", "triton"} <= set(stored["config"]["versions"])
    row["barriers"] += 1
    assert counts.main(["--check"]) == 1
    assert "worse: sm_80 decode fwd, k 0: barriers 1.16 a element, the budget is 0.16" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        counts.main(["--check", "--blocks", "3"])


def test_a_picture_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    row = rows_of(floor_us=1.0, bound_us=2.0)[0]
    rows = [{**row, "case": "stratified"}, {**row, "case": "importance", "bound": "L2"}]
    written = report.plot([result(rows)], tmp_path)
    assert [path.stem for path in written] == ["counts"]
    assert written[0].stat().st_size > 1000


def test_counts_are_summed_field_by_field() -> None:
    one = Counts(shared_conflicts=1, load_lines=Counter({("a:1", "sectors"): 4}), global_load_distinct=2)
    twice = one + one
    assert twice.load_lines["a:1", "sectors"] == 8
    assert twice.per(2) == one
    assert dataclasses.replace(one, shared_conflicts=2) != one
