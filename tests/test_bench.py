"""bench: the gate before every number, the CPU paths, the tables of the README, and a rehearsal of the GPU day."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import results, timing
from bench.ops import cases as catalogue
from bench.ops import parity, published, run
from bench.ops.cases import SIZES, Work
from bench.report import brief, report
from bench.runs import ablations, colours, demo, denormals, distances, loading, waiting
from bench.step import region, step
from checks import HANG, assert_error_within_reference
from epigraf_fast import ops
from epigraf_fast.config import CameraConfig, RendererConfig, check
from epigraf_fast.ops import backends, ranges
from epigraf_fast.tools import train
from epigraf_fast.training import log, profile
from epigraf_fast.training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def spoil(function, monkeypatch):
    """Gives the cpu backend of sample_triplane another result."""
    original = ops.sample_triplane

    def sample_triplane(*args, backend=None):
        y = original(*args, backend=backend)
        return function(y) if backend == "cpu" else y

    monkeypatch.setattr(ops, "sample_triplane", sample_triplane)


# What a kernel may get wrong: a value, a gradient alone, a shape, or all of it.
FAULTS = {
    "value": lambda y: y * (1 + 1e-5),
    "one value": lambda y: y.index_fill(1, torch.tensor([3]), 0.0),
    "gradient": lambda y: y.detach() + (y - y.detach()) * 1.001,
    "nan": lambda y: y.index_fill(1, torch.tensor([3]), torch.nan),
    "shape": lambda y: y[:, :-1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_gets_no_speed(fault, monkeypatch, tmp_path, capsys):
    spoil(FAULTS[fault], monkeypatch)
    path = tmp_path / "ops.json"
    line = ["--device", "cpu", "--size", "tiny", "--op", "sample_triplane", "--mode", "step", "--budget", "0.01"]
    status = run.main([*line, "--backend", "cpu,reference", "--json", str(path)])
    rows = json.loads(path.read_text())["cases"]
    assert status == 1
    assert {row["backend"] for row in rows} == {"cpu", "reference"}
    for row in rows:
        assert not {"times_as_fast", "ms"} & set(row)  # the reference has nothing left to be compared with
        refused = "failed" in row or row["parity"]["wrong"] is not None
        assert refused == (row["backend"] == "cpu")
    printed = capsys.readouterr().out
    assert "WRONG" in printed or "!" in printed
    assert "x reference" not in printed


def test_the_gate_is_the_rule_of_the_tests():
    """What `checks.assert_error_within_reference` allows, the gate allows; what it refuses, the gate refuses."""
    (case, *_) = catalogue.cases("upfirdn2d", "tiny", "fp32")
    inputs = case.build(CPU)
    gate = parity.Parity(case, inputs, "fwd")
    (reference,) = case.call(inputs, "reference")
    truth = gate.truth["output 0"]
    own = (reference.double() - truth).abs().amax()
    assert gate.judge({"output 0": reference}).wrong is None
    for factor, passes in ((1.9, True), (20.0, False)):
        off = (truth + factor * own).float()
        assert (gate.judge({"output 0": off}).wrong is None) == passes
        if passes:
            assert_error_within_reference(off, reference, truth, "off")
        else:
            with pytest.raises(AssertionError):
                assert_error_within_reference(off, reference, truth, "off")


@pytest.mark.parametrize("op", catalogue.OPS)
def test_every_case_runs_and_every_backend_here_is_right(op):
    found = catalogue.cases(op, "tiny", "fp32")
    assert found
    assert len({case.name for case in found}) == len(found)
    for case in found:
        inputs = case.build(CPU)
        gate = parity.Parity(case, inputs, case.modes[-1])
        backends = catalogue.available(op, "fp32", CPU)
        assert "reference" in backends
        for backend in backends:
            verdict = gate.check(backend)
            assert verdict.wrong is None, f"{case.name} {backend}: {verdict.wrong}"
            for mode in case.modes:
                run.runner(case, inputs, backend, mode)()


def test_real_shapes_are_those_of_a_step():
    """An image of FFHQ-512: 393,216 points, 12 taps of 32 numbers each; 62.7 GMAC of synthesis."""
    (case,) = [c for c in catalogue.cases("renderer", "real", "fp32", (1,)) if "scale=0.35" in c.name]
    work = case.work["fwd"]
    assert work.gather_bytes == 64 * 64 * 96 * 12 * 32 * 4
    assert case.work["bwd"].atomics == 64 * 64 * 96 * 12 * 32
    assert work.flops == 64 * 64 * 96 * 2 * (32 * 64 + 64 * 4)
    (synthesis,) = catalogue.cases("synthesis", "real", "fp32", (1,))
    assert synthesis.work["fwd"].flops == pytest.approx(2 * 62.7e9, rel=0.01)
    assert SIZES["real"].batches == (1, 4, 8, 16)
    names = [case.name for case in catalogue.cases("decode_triplane", "real", "tf32")]
    assert names == [f"batch={b} scale={s}" for b in (1, 4, 8, 16) for s in (0.125, 0.35, 1.0)]


def test_rays_of_a_smaller_patch_lie_closer():
    spread = [catalogue.rays(1, 8, scale, CPU)[1].std(dim=1).sum() for scale in catalogue.PATCH_SCALES]
    assert spread[0] < spread[1] < spread[2]


def test_fractions_are_of_the_slowest_need():
    ceilings = {"copy_bytes": 100.0, "gather_bytes": 1000.0, "atomics_scalar": 10.0, "fp32_flops": 1e4}
    found = run.fractions(Work(bytes=50, gather_bytes=500, atomics=5, flops=1000), "fp32", ceilings, seconds=2.0)
    # 0.5 s of copies, 0.5 s of gathers and 0.5 s of additions on the same cache, 0.1 s of products; 2 s taken.
    assert found == pytest.approx({"copy": 0.25, "gather": 0.25, "atomics": 0.25, "product": 0.05, "floor": 0.5})
    assert run.fractions(Work(bytes=50), "fp32", {}, seconds=1.0) == {}


def test_ratios_are_of_neighbouring_runs():
    clock = {"slow": 0.02, "fast": 0.005}
    found = timing.cpu_ratios({name: lambda t=t: time.sleep(t) for name, t in clock.items()}, budget=0.2)
    assert list(found) == ["slow"]
    assert 2 < found["slow"].median < 5
    assert found["slow"].p20 <= found["slow"].median <= found["slow"].p80


def test_saved_bytes_leave_inputs_out():
    x = torch.randn(1000, requires_grad=True)
    assert timing.saved_bytes(lambda: x.exp(), [x]) == 4000  # the result
    assert timing.saved_bytes(lambda: x * x, [x]) == 0


def test_published_ops_replace_those_of_the_networks_and_leave():
    (case,) = catalogue.cases("synthesis", "tiny", "fp32")
    before = ops.modulated_conv2d, ops.bias_act, ops.upfirdn2d
    with published.installed():
        assert ops.modulated_conv2d is not before[0]
    assert (ops.modulated_conv2d, ops.bias_act, ops.upfirdn2d) == before
    gate = parity.Parity(case, case.build(CPU), "bwd")
    assert gate.check("published").wrong is None


def test_steps_on_a_cpu_give_ratios_and_no_times(tmp_path, capsys):
    path, trace = tmp_path / "step.json", tmp_path / "trace.json"
    line = ["--device", "cpu", "--size", "tiny", "--seconds", "0.05", "--json", str(path), "--profile", str(trace)]
    assert step.main([*line, "--variants", "ours-cpu,published,reference"]) == 0
    found, said = json.loads(path.read_text()), capsys.readouterr().out
    assert [row["variant"] for row in found["cases"]] == ["ours-cpu", "published", "reference"]
    for row in found["cases"]:
        assert ("times_as_fast" in row) == (row["variant"] != "reference")
        assert not {"iteration_ms", "img_per_sec", "phase_ms"} & set(row)
        assert row["what"] in said
        assert step.describe(row["settings"]) in said
        layout = "contiguous" if row["variant"] == "published" else "channels_last"
        assert f"TF32 off, cudnn.benchmark off, {layout}, D's half blocks 0" in said
    assert found["cases"][2]["backends"] == dict.fromkeys(found["cases"][2]["backends"], "reference")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"iteration", "G", "D", "R1", "average"} <= names


def test_variants_that_are_not_there_are_refused():
    for name in ("fastest", "ours-fast"):
        with pytest.raises(ValueError, match="variant must be one of"):
            step.variant(name, CPU)
    assert step.variant("reference", CPU).backend == "reference"


def test_a_baseline_has_the_settings_of_what_it_is_compared_with(monkeypatch):
    """Precision, layout, D's half blocks; and kernels of bias_act and upfirdn2d that this GPU was not asked about."""
    for baseline, ours in (("eager-fp32", "ours-fp32"), ("eager", "ours-tf32"), ("eager-fp16", "ours-fp16")):
        one, other = (step.NAMED[name] for name in (baseline, ours))
        on_volta = "fp16" if ours == "ours-fp16" else "fp32"
        for capability, expected in ((90, one.precision), (70, on_volta), (None, "fp32")):
            assert step.precision_on(one, capability) == step.precision_on(other, capability) == expected
        assert (one.published, one.tuned, other.published) == (True, True, False)
    monkeypatch.setattr(backends, "lacking_on", lambda op, backend, device_type: None)
    assert published.fused_backend("cuda") == "cuda"
    assert published.fused_backend("cuda", compiled=True) == "reference"


def tiny_step(name, **renderer):
    args = step.parser().parse_args(["--device", "cpu", "--size", "tiny"])
    config = step.settings(args)
    config = dataclasses.replace(config, renderer=dataclasses.replace(config.renderer, **renderer))
    return step.Step(step.variant(name, CPU), config, CPU)


@pytest.mark.parametrize("stochastic", [True, False])
def test_variants_of_a_step_compute_the_same(stochastic):
    """The published renderer and convolutions in place of ours: the same losses from the same draws."""
    losses = {}
    for name in ("reference", "published"):
        one = tiny_step(name, stochastic=stochastic)
        torch.manual_seed(1)
        one.run(regularize=True)
        losses[name] = one.trainer.statistics()
        assert isinstance(one.trainer.generator.renderer, published.PublishedRenderer) == (name == "published")
    assert losses["published"] == pytest.approx(losses["reference"], rel=1e-3, abs=1e-4)


def test_a_step_runs_the_regularization_when_asked():
    one = tiny_step("reference")
    one.run(regularize=False)
    assert "loss/R1" not in one.trainer.statistics()
    one.run(regularize=True)
    assert "loss/R1" in one.trainer.statistics()


class Clock:
    """Stands for a CUDA event."""

    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """The calls to a GPU's clock and memory do something on the CPU, so that the code around them runs."""
    replaced = {
        "Event": Clock,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 2**20,
        "get_device_properties": lambda device: type("Properties", (), {"total_memory": 2**24}),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, device=device and "cpu", **k))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 16)


def test_the_gpu_measurement_of_an_op_fills_its_row(pretended_gpu):
    (case, *_) = catalogue.cases("decode_triplane", "tiny", "fp32")
    ceilings = {"copy_bytes": 1e12, "gather_bytes": 1e12, "atomics_scalar": 1e12, "fp32_flops": 1e12}
    row = run.measure_gpu(case, case.build(CPU), "reference", "fwd", ceilings, budget=0.01)
    assert set(row) == {"ms", "peak_bytes", "saved_bytes", "rates", "fractions"}
    assert row["saved_bytes"] > 0
    assert set(row["fractions"]) == {"copy", "gather", "product", "floor"}


def test_launches_are_counted_and_overlaps_once():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(device, name, start, end, annotation=False):
        span = types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(device_type=device, name=name, time_range=span, is_user_annotation=annotation)

    events = [
        event(cpu, "cudaLaunchKernel", 0, 1),
        event(cpu, "cuLaunchKernelEx", 1, 2),
        event(cpu, "cudaStreamSynchronize", 2, 90),
        event(cuda, "a kernel", 10, 30),
        event(cuda, "another one beside it", 20, 40),
        event(cuda, "a later one", 60, 70),
        event(cuda, "G", 0, 90, annotation=True),
    ]
    launches, kernels, busy = step.activity(events)
    assert (launches, kernels) == (2, 3)
    assert busy == pytest.approx(40e-6)  # 10 to 40 and 60 to 70 microseconds


def test_the_gpu_measurement_of_a_step_fills_its_row(pretended_gpu, monkeypatch):
    monkeypatch.setattr(step, "_profile", lambda one, regularize: (32, 40, 0.0) if regularize else (16, 20, 0.0))
    row = step.measure_gpu(tiny_step("reference"), seconds=0.01, largest=False)
    assert set(row["phase_ms"]) == {"iteration", "G", "D", "R1", "average"}
    assert row["img_per_sec"] == pytest.approx(4 / (row["iteration_ms"] / 1000))
    assert row["iteration_ms"] == pytest.approx(row["without_r1_ms"] + row["r1_ms"] / 16)
    assert (row["launches"], row["kernels"], row["idle"]) == (17, 21.25, 1.0)
    assert row["gpu_days"] == pytest.approx(20e6 / row["img_per_sec"] / 86400)


def test_the_largest_micro_batch_is_predicted_and_tried(pretended_gpu, monkeypatch):
    tried = []

    class Trial:
        """An iteration that takes 1 MiB, and 256 KiB an image."""

        def __init__(self, variant, config, device):
            self.variant, self.config, self.device, self.trainer = variant, config, device, None

        def run(self, regularize):
            tried.append(self.config.batch)
            if self.config.batch > 52:
                raise torch.OutOfMemoryError("full")

    def peak():
        return 2**20 + 2**18 * tried[-1]

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(step, "Step", Trial)
    config = dataclasses.replace(tiny_step("reference").config, batch=8)
    found = step.largest_micro_batch(Trial(None, config, CPU), 2**20 + 8 * 2**18)
    # 0.97 of 16 MiB holds 58 images, 56 in whole groups; 56 and 52 are tried.
    assert (found, tried) == (52, [16, 56, 52])


def test_a_file_that_is_no_result_is_left_out(tmp_path):
    (tmp_path / "a.json").write_text('{"what": "another file"}')
    results.write(tmp_path / "b.json", results.result("ops", {}, []))
    (found,) = results.load(tmp_path)
    assert (found["file"], found["kind"], found["schema"]) == ("b.json", "ops", results.SCHEMA)
    assert found["environment"]["versions"]["torch"] == torch.__version__


def test_the_readme_holds_what_the_report_prints():
    found = results.load()
    for page, written in ((report.PAGE, report.text(found)), (report.README, brief.text(found))):
        _, inside, _ = report.split(page.read_text(encoding="utf-8"))
        assert inside == written, "run python -m bench.report"
    assert re.search(r"iteration of `demo` on a CPU.*\| \d\.\d\d to \d\.\d\dx \(.*\|  \| on a GPU \|", inside)


GPU = {
    "device": "Pretended GPU",
    "gpu": {"name": "Pretended GPU", "driver": "1"},
    "versions": {"torch": "2", "triton": "3"},
    "commit": "abc",
}


def gpu_results():
    """Result files as a GPU would leave them, of round numbers."""
    spread = {"median": 2.0, "p20": 1.5, "p80": 2.5, "count": 9}
    rows = []
    for backend, ms in (("triton", 0.5), ("published", 2.0), ("reference", 4.0)):
        row = {"op": "decode_triplane", "case": "batch=8 scale=0.35", "dtype": "fp32", "mode": "step"}
        row |= {"backend": backend, "parity": {"wrong": None, "error": 0.1, "where": ""}, "peak_bytes": 2**20}
        row |= {"ms": {"cold": {**spread, "median": ms}, "warm": spread}, "fractions": {"floor": 0.61}}
        row |= {"rates": {"bytes": 1e9, "gather_bytes": 1e9, "atomics": 1e9, "flops": 1e12}}
        rows.append(row)
    broken = {**rows[0], "op": "composite", "parity": {"wrong": "output 0: off", "error": 9.0, "where": "output 0"}}
    rows.append({name: value for name, value in broken.items() if name not in ("ms", "fractions", "rates")})
    common = {"schema": 1, "date": "2026-01-01", "environment": GPU}
    small = {"size": "real"}
    variants = []
    for name, speed in (("published", 20.0), ("ours-fp32", 60.0)):
        row = {"variant": name, "what": f"what {name} is", "img_per_sec": speed, "iteration_ms": 8000 / speed}
        row |= {"phase_ms": {"G": spread, "D": spread}, "peak_bytes": 2**30, "launches": 1000.0, "idle": 0.125}
        variants.append(row | {"gpu_days": 20e6 / speed / 86400, "largest_micro_batch": 32})
    variants.append({"variant": "compile", "what": "what compile is", "failed": "took more than 75 seconds"})
    config = {"preset": "ffhq", "resolution": 512, "batch": 8, "micro_batch": None, "r1_interval": 16, "kimg": 20000}
    config["paper_v100_days"] = 24
    ceilings = {"copy_bytes": 3e12, "fp32_flops": 5e13}
    return [
        common | {"kind": "ops", "file": "gpu-ops.json", "config": small, "ceilings": ceilings, "cases": rows},
        common
        | {"kind": "step", "file": "gpu-step.json", "config": config | {"paper_v100_days": 24}, "cases": variants},
    ]


def test_tables_of_a_gpu():
    text = report.text(gpu_results())
    assert report.PENDING not in text
    (op,) = [line for line in text.splitlines() if line.startswith("| `decode_triplane`")]
    cells = [cell.strip() for cell in op.split("|")[1:-1]]
    assert cells[4:] == ["0.500 (1.500 to 2.500)", "61%", "4.0x", "-", "8.0x"]
    assert "No speed is shown where the result was wrong: `composite` triton fp32." in text
    (ours,) = [line for line in text.splitlines() if line.startswith("| `ours-fp32`")]
    assert [cell.strip() for cell in ours.split("|")[2:4]] == ["60.0", "3.00x"]
    assert "| `compile` | took more than 75 seconds |" in text
    assert "24 V100 GPU-days" in text
    assert "what ours-fp32 is" in text


def test_without_a_gpu_the_report_says_so():
    on_cpu = results.result("ops", {"size": "tiny"}, [])
    assert report.text([]).startswith("**GPU results are pending:**")
    assert report.text([on_cpu | {"file": "cpu.json"}]).startswith("**GPU results are pending:**")


def test_plots_are_of_what_the_files_hold(tmp_path):
    pytest.importorskip("matplotlib")
    written = report.plot(gpu_results(), tmp_path)
    names = ["gpu-ops-speed-up", "gpu-ops-roofline", "gpu-step-phases", "gpu-step-memory"]
    assert [path.stem for path in written] == names
    assert all(path.stat().st_size > 1000 for path in written)
    assert report.plot([], tmp_path) == []


def test_the_report_writes_between_the_markers_and_checks(tmp_path, capsys):
    pages = tmp_path / "README.md", tmp_path / "page.md"
    for page in pages:
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    line = ["--results", str(tmp_path), "--readme", str(pages[0]), "--page", str(pages[1]), "--plots", str(tmp_path)]
    assert report.main([*line, "--check"]) == 1
    assert report.main(line) == 0
    assert report.main([*line, "--check"]) == 0
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith(f"{report.END}\nafter\n")
    with pytest.raises(ValueError, match="must hold the line"):
        report.split("no markers")


def test_decorated_ranges_may_be_nested():
    @ranges.annotate("even")
    def even(n):
        return odd(n - 1) if n else True

    @ranges.annotate("odd")
    def odd(n):
        return even(n - 1) if n else False

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        assert even(3) is False
    events = sorted(profiler.events(), key=lambda event: (event.time_range.start, -event.time_range.end))
    assert [event.name for event in events] == ["even", "odd", "even", "odd"]
    ends = [event.time_range.end for event in events]
    assert ends == sorted(ends, reverse=True)  # every range lies in the one before


def test_ranges_reach_listeners_and_cost_nothing_without():
    seen = []

    @contextlib.contextmanager
    def listener(name):
        seen.append(f"+{name}")
        yield
        seen.append(f"-{name}")

    with profile.listening(listener), profile.annotate("G"), profile.annotate("inside"):
        pass
    with profile.annotate("unheard"):
        pass
    assert seen == ["+G", "+inside", "-inside", "-G"]


def test_the_demo_leaves_out_what_is_missing(monkeypatch, tmp_path):
    assert demo.missing("torch", "no-such-package") == ["no-such-package"]
    monkeypatch.setattr(log, "Board", demo.NoBoard)
    record = log.RunLog(tmp_path, 1.0, 0)
    record.write(8, {"loss/G": 1.0})
    record.close()
    assert [path.name for path in tmp_path.iterdir()] == ["stats.jsonl"]


def test_how_demos_wait_is_compared(monkeypatch, tmp_path, capsys):
    """Ratios of medians to the base alone, which is measured whatever is asked for; and their table."""
    speeds = {"libgomp's own": {1: 10.0, 2: 1.0}, "passive": {1: 9.9, 2: 9.0}}
    factors = iter([1.0, 1.0, 1.0, 1.0, 7.0, 0.1, 7.0, 0.1, 1.0, 1.0, 1.0, 1.0])  # one round is disturbed

    def speed(policy, together, *rest):
        name = next(name for name, environment in waiting.POLICIES.items() if environment == policy)
        return speeds[name][together] * next(factors)

    monkeypatch.setattr(waiting, "speed", speed)
    assert waiting.main(["--policy", "passive", "--json", str(tmp_path / "waiting.json")]) == 0
    (found,) = results.load(tmp_path)
    rows = [(row["policy"], row["alone"], row["pair"]) for row in found["cases"]]
    assert rows == [("libgomp's own", 1.0, 0.1), ("passive", 0.99, 0.9)]
    assert "passive: alone 0.990, two together 0.900 of libgomp's own, alone" in capsys.readouterr().out
    assert "| `passive` | 0.99 | 0.90 |" in report.text([found])


def test_the_speed_of_demos_together(monkeypatch):
    """From when both have begun; and none of them stays behind."""
    program = (
        "import itertools, json, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[1], 'stats.jsonl')\n"
        "path.parent.mkdir()\n"
        "for n in itertools.count(8, 8):\n"
        "    path.open('a').write(json.dumps({'cur_nimg': n}) + chr(10))\n"
        "    time.sleep(0.001)\n"
    )
    started = []

    def start(run_dir, policy, threads):
        started.append(subprocess.Popen([sys.executable, "-c", program, str(run_dir)]))
        return started[-1]

    monkeypatch.setattr(waiting, "start", start)
    assert waiting.speed({}, 2, 1, 16, 60.0) > 0
    assert [process.returncode for process in started] == [-9, -9]
    monkeypatch.setattr(waiting, "start", lambda *args: subprocess.Popen([sys.executable, "-c", ""]))
    with pytest.raises(RuntimeError, match="a demo ended before it was measured"):
        waiting.speed({}, 1, 1, 16, 60.0)


def test_a_checkout_needs_no_installation(tmp_path):
    """A copy of the sources alone, with bench/site on the path, has the kernels; a hidden sitecustomize still runs."""
    for name in ("epigraf_fast", "bench", "kernels"):
        (tmp_path / name).mkdir()
    (tmp_path / "epigraf_fast" / "__init__.py").write_text("")
    (tmp_path / "kernels" / "__init__.py").write_text("WHERE = __file__")
    (tmp_path / "kernels" / "inner.py").write_text("VALUE = 5")
    (tmp_path / "bench" / "site").mkdir()
    (tmp_path / "bench" / "site" / "sitecustomize.py").write_text((ROOT / "bench/site/sitecustomize.py").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("print('hidden')")
    program = "import epigraf_fast.kernels.inner as k, epigraf_fast.kernels as p; print(k.VALUE, p.WHERE)"
    path = os.pathsep.join(str(tmp_path / name) for name in ("bench/site", "other", "."))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["hidden", "5", str(tmp_path / "kernels" / "__init__.py")]


def gpu_day(*args, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "bench/gpu_day.sh"), *args],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * HANG,
    )


def test_a_rehearsed_gpu_day_passes(tmp_path):
    done = gpu_day("--cpu", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.partition("== cpu")[2].splitlines()
    for part in ("build", "check", "tests", "kernels", "sanitize", "demo", "ops", "renderer", "step", "report"):
        assert any(line.startswith(part) and line.endswith("ok") for line in summary), done.stdout
    assert len(summary) < 50
    for name in ("cpu-ops.json", "cpu-renderer.json", "cpu-step.json", "cpu-demo.json"):
        assert json.loads((tmp_path / name).read_text())["schema"] == results.SCHEMA


def test_a_failing_part_of_a_gpu_day_is_reported(tmp_path):
    broken = tmp_path / "python"
    fault = 'case "$*" in *bench.ops*) echo "no luck on [$CUDA_VISIBLE_DEVICES]"; exit 7;; esac'
    broken.write_text(f'#!/bin/sh\n{fault}\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    done = gpu_day("--cpu", "--only", "ops", str(tmp_path / "out"), PYTHON=str(broken), CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 1
    assert "FAILED: exit status 7" in done.stdout
    assert "no luck on []" in done.stdout  # a rehearsal leaves the GPU alone, where there is one
    assert gpu_day("--only", "nothing").returncode == 2
    assert gpu_day("--no-such-option").returncode == 2


# bench.step.region


def test_planes_in_part_are_measured_against_whole_ones(tmp_path, capsys):
    """Once losses agree; with what share of the planes was computed, and the memory where Linux says it."""
    line = ["--preset", "demo", "--planes", "128", "--micro-batch", "1", "--kimg", "60", "--rounds", "1"]
    assert region.main([*line, "--json", str(tmp_path / "region.json")]) == 0
    written = json.loads((tmp_path / "region.json").read_text())
    assert written["kind"] == "region"
    assert [(row["phase"], row["kimg"], row["micro_batch"]) for row in written["cases"]] == [("G", 60, 1), ("D", 60, 1)]
    for row in written["cases"]:
        assert 0 < row["planes_share"] < 1
        assert row["times_as_fast"]["count"] == 1
        assert 1 < row["multiplications_ratio"] < 1 / row["planes_share"]
    assert "G phase, micro-batch 1," in capsys.readouterr().out


def test_ways_that_disagree_get_no_ratio(monkeypatch):
    monkeypatch.setattr(region.Phases, "run", lambda self, phase, fakes: float(fakes.plans[0] is None))
    arguments = region.parser().parse_args(["--preset", "demo", "--planes", "128"])
    with pytest.raises(RuntimeError, match="G at 0 kimg: losses differ"):
        region.measure(region.Phases(arguments, 1), 0.0, "G", 1)


def region_result(**more):
    """A result of few, made-up numbers."""
    rows = [
        {
            "phase": phase,
            "kimg": kimg,
            "micro_batch": 4,
            "times_as_fast": {"median": fast, "p20": fast - 0.125, "p80": fast + 0.25, "count": 2},
            "planes_share": share,
            **more,
        }
        for phase, kimg, fast, share in (
            ("G", 0.0, 1.25, 0.5),
            ("D", 0.0, 1.5, 0.75),
            ("G", 15000.0, 1.75, 0.375),
            ("D", 15000.0, 2.0, 0.375),
        )
    ]
    config = {"preset": "ffhq", "resolution": 512, "planes": 512, "patch": 64, "threads": 1}
    return {**results.result("region", config, rows), "file": "cpu-region.json"}


def test_the_report_has_planes_in_part_with_their_picture():
    written = report.text([region_result(peak_ratio=0.625, multiplications_ratio=1.875)])
    assert "`ffhq` at 512x512 with planes of 512x512, on a CPU with 1 thread:" in written
    assert (
        "| micro-batch | kimg | share of the planes | G phase | counted | its memory | D phase | counted | its memory |"
        in written
    )
    assert "| 4 | 0 | 0.62 | 1.25x (1.12 to 1.50) | 1.88x | 0.62 | 1.50x (1.38 to 1.75) | 1.88x | 0.62 |" in written
    assert (
        "| 4 | 15,000 | 0.38 | 1.75x (1.62 to 2.00) | 1.88x | 0.62 | 2.00x (1.88 to 2.25) | 1.88x | 0.62 |" in written
    )
    picture = re.search(r"!\[[^]]+\]\(([^)]+)\)", written)[1]
    assert (ROOT / "docs" / picture).is_file()
    assert "(../bench/results/cpu-region.json)" in written
    assert "2.00x  D, micro-batch 4, 15000 kimg" in report.summary([region_result()])


def test_the_report_of_planes_in_part_without_memory_or_a_phase():
    """Where Linux does not say what a phase took; where the measurement was stopped."""
    result = region_result()
    result["cases"].pop()
    assert "| 4 | 15,000 | 0.38 | 1.75x (1.62 to 2.00) | - | - | - | - | - |" in report.text([result])


def test_the_readme_has_numbers_of_regions_only_from_their_file():
    """And with it."""
    there = (ROOT / "bench/results/cpu-region.json").is_file()
    assert ("(../bench/results/cpu-region.json)" in (ROOT / "docs/benchmarks.md").read_text()) == there


def test_colours_of_objects() -> None:
    """Red, blue and nothing on white: as saturated as colours are, and far apart; and crumbs by hand."""
    images = torch.ones(3, 3, 8, 8)
    images[0, :, 2:4, 2:4] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    images[1, :, 5:, 5:] = torch.tensor([-1.0, -1.0, 3.0])[:, None, None]  # shown as 1
    found = colours.colour_statistics(images)
    assert (found["objects"], found["saturation"], found["colour"]) == (2, 2.0, [0.0, -1.0, 0.0])
    assert found["spread"] == pytest.approx((2**0.5 + 0 + 2**0.5) / 3)
    assert found["unevenness"] == 0  # of the one with pixels inside: 2 by 2 have none
    images[1, :, 5:, 6:] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    # Inside, with no background beside them, are rows 6 and 7 of columns 6 and 7: all red, then half of them blue.
    assert colours.unevenness(images).tolist() == [pytest.approx(0.0, abs=1e-6)]
    images[1, :, 5:, 7] = torch.tensor([-1.0, -1.0, 1.0])[:, None]
    assert colours.unevenness(images).tolist() == [pytest.approx(2**0.5)]
    opacity = np.zeros((6, 6, 6))
    opacity[0, 0, :3] = 1.0
    opacity[5, 5, 5] = 0.6
    opacity[3, 3, 3] = 0.4  # not solid
    assert colours.outside_of_the_largest(opacity) == pytest.approx(0.6 / 3.6)
    assert colours.outside_of_the_largest(opacity[:3]) == 0


@pytest.mark.parametrize(("place", "expected"), [(30, 0.0), (16, 0.2)])
def test_crumbs_are_where_every_view_shows_them(place: int, expected: float) -> None:
    """A cube of 16^3 cells at the origin, of 8^3 at `place` cells along x and -x; the ball ends at 24."""
    camera = CameraConfig(fov=40.0, radius=16.0, ray_start=8.0, ray_end=24.0, cube_scale=10.0)

    def at_points(planes: object, points: torch.Tensor, cube_scale: float) -> torch.Tensor:
        x, y, z = (points.abs() / (16 * math.sin(math.radians(20)) / 24)).unbind(dim=-1)
        cube = (x < 8) & (y < 8) & (z < 8)
        beside = ((x - place).abs() < 4) & (y < 4) & (z < 4)
        return torch.where(cube | beside, 100.0, -100.0)[..., None]

    stub = types.SimpleNamespace(
        camera=camera,
        renderer=types.SimpleNamespace(config=RendererConfig()),
        decoder=types.SimpleNamespace(at_points=at_points),
        synthesis=lambda ws, noise_mode: None,
        ws=lambda z, label: None,
    )
    found = colours.crumbs(stub, torch.zeros(1, 1), torch.zeros(1, 0))
    assert found == pytest.approx(expected, abs=1e-6)


def seen_by_distances(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the distances of `bench.runs.distances` are asked about, real and fake, each of one batch; they count."""
    seen = []

    class Distance:
        def update_real(self, images):
            self.real = images

        def reset_fake(self):
            pass

        def update_fake(self, images):
            seen.append((self.real, images))

        def compute(self):
            return float(len(seen))

    monkeypatch.setattr(distances, "FeatureDistance", Distance)
    return seen


def test_what_a_distance_means(monkeypatch, tmp_path, capsys):
    """Two halves that share no image; every change does what it says, and the page has the stored numbers."""
    seen = seen_by_distances(monkeypatch)
    assert distances.main(["--images", "4", "--json", str(tmp_path / "x.json")]) == 0
    same, *blurs, paler, grey, noise, corners, hues, flat = (fake.float() for _, fake in seen)
    first, second = distances.halves(distances.ImageDataset("builtin"), 4)
    assert torch.equal(same, second.float())
    assert not any(torch.equal(a, b) for a, b in itertools.product(first, second))
    sharp = [x.diff(dim=3).square().mean() for x in (same, *blurs)]
    assert sharp == sorted(sharp, reverse=True)
    spread = [float((x.amax(dim=1) - x.amin(dim=1)).mean()) for x in (same, paler, grey)]
    assert spread[1] == pytest.approx(0.8 * spread[0], rel=0.02)
    assert spread[2] == 0
    assert float((noise - same)[same < 230].std()) == pytest.approx(4.0, rel=0.1)
    inside = distances.solid(same).expand_as(same) > 0
    assert [torch.equal(x[~inside], same[~inside]) for x in (corners, hues, flat)] == [False, True, False]
    assert torch.equal(distances.solid(hues), distances.solid(same))
    within = ((hues > 0) & (hues < 240)).all(dim=1)  # not clamped
    assert float((hues - same).mean(dim=1)[within].abs().max()) < 1  # hues alone, but for what rounding does
    assert 10 < float((hues - same)[inside].std()) < 30
    assert all(len(x[:, where].unique(dim=1).T) == 1 for x, where in zip(flat, inside[:, 0], strict=True))
    assert torch.equal(distances.rounded(5)(torch.eye(9)[None, None]), torch.zeros(1, 1, 9, 9))
    assert [row["fd_efficientnet"] for row in json.loads((tmp_path / "x.json").read_text())["cases"]] == [*range(1, 11)]
    with pytest.raises(SystemExit, match="--images must be 2 to 4000"):
        distances.main(["--images", "4001"])
    page = (ROOT / "docs/demo.md").read_text()
    stored = json.loads((ROOT / "bench/results/distances.json").read_text())
    for row in stored["cases"]:
        assert f"{row['fd_efficientnet']:.1f}" in page
    for row in stored["parts"]:
        assert " | ".join(f"{value:.1f}" for value in list(row.values())[1:]) in page


def test_what_the_distance_of_a_run_is_made_of(monkeypatch, tmp_path, capsys):
    """Every part of the pictures of a run, and of the other half, is held against that part of the data."""
    folder = tmp_path / "run"
    small = (
        "--kimg 0.008 --generator.plane-resolution 8 --patch.resolution 8 --grid 1 1 --metric-images 0 --turntable 0"
    )
    assert train.main(["demo", *small.split(), "--run-dir", str(folder)]) == 0
    seen = seen_by_distances(monkeypatch)
    monkeypatch.setattr(distances, "CHANGES", {})
    assert distances.main([str(folder), "--images", "4", "--json", str(tmp_path / "x.json")]) == 0
    first, second = distances.halves(distances.ImageDataset("builtin"), 4)
    painted = distances.pictures(folder, 4)
    assert torch.equal(seen[0][0], first)
    assert [torch.equal(x, y) for x, (_, y) in zip((second, painted), seen, strict=False)] == [True, True]
    for (real, fake), reduce in zip(seen[::2], distances.PARTS.values(), strict=True):
        for images, whole in ((real, first), (fake, second)):
            assert torch.equal(images, distances.as_images(reduce(whole.float())))
    assert set(seen[-1][0].unique().tolist()) == {64, 255}
    stored = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert [row["part"] for row in stored] == list(distances.PARTS)
    assert [row["the other half"] for row in stored] == [1, 3, 5, 7, 9]
    assert folder.name in capsys.readouterr().out
    with pytest.raises(SystemExit, match="runs must have different names, got run, run: rename or link"):
        distances.main([str(folder), str(tmp_path / "other" / "run"), "--images", "4"])
    for command in (distances, colours):
        with pytest.raises(SystemExit, match="empty has no checkpoints: name a run's folder"):
            command.main([str(tmp_path / "empty"), *(["--images", "4"] if command is distances else [])])
    config, state = distances.load_checkpoint(distances.newest_checkpoint(folder))
    other = dataclasses.replace(config, data="other.zip")
    monkeypatch.setattr(distances, "load_checkpoint", lambda path: (other, state))
    with pytest.raises(SystemExit, match=r"run was trained on other\.zip: name runs on the built-in data"):
        distances.pictures(folder, 4)


def test_loading_counts_images_a_second_of_computing(tmp_path, capsys):
    """By a clock that goes on by 2 s in each decoded round and 3 s in each read one, 4 images each."""
    steps = iter(itertools.cycle((0, 2, 0, 3)))
    now = itertools.accumulate(steps)
    row = loading.measure("png", 16, 4, 3, clock=lambda: next(now))
    assert (row["decoded_per_core_second"], row["read_per_core_second"]) == (2, pytest.approx(4 / 3))
    assert row["read_over_decoded"] == pytest.approx(2 / 3)
    path = tmp_path / "loading.json"
    assert loading.main(["--resolution", "16", "--images", "2", "--rounds", "1", "--json", str(path)]) == 0
    assert [case["format"] for case in json.loads(path.read_text())["cases"]] == ["jpeg", "png"]
    assert capsys.readouterr().out.count("of 16 cores") == 2


# bench.runs.ablations


def test_ablations_go_on_and_write_their_table(monkeypatch, tmp_path, capsys):
    """Every variant's line is one that trains; what is done is not done again, what was interrupted is."""
    seen, codes = [], iter([0, 0, 130, 0, 0])

    def run(line):
        assert train.parse(line[2:]).config.data == "builtin"
        config = train.parse(line[2:]).config
        check(config)
        seen.append((config.discriminator.modulate, config.patch.resolution, config.seed))
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps([{"cur_nimg": 19, "fd_efficientnet": 100.0 + len(seen)}]))
        lines = [{"cur_nimg": 8, "img_per_sec": 3.0}, {"cur_nimg": 16, "img_per_sec": 5.0}]
        (folder / "stats.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
        return next(codes), 1.5

    monkeypatch.setattr(ablations, "train", run)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ablations.BEGIN}\nold\n{ablations.END}\nafter\n")
    places = ["--json", str(tmp_path / "x.json"), "--page", str(page), "--runs", str(tmp_path / "runs")]
    line = [*places, "--variants", "modulated", "standard", "--seeds", "0", "1"]
    assert ablations.main(line) == 130
    assert "modulated, seed 1, ended with 130" in capsys.readouterr().out
    assert ablations.main(line) == 0
    assert seen == [("input", 16, 0), ("none", 16, 0), *[("input", 16, 1)] * 2, ("none", 16, 1)]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{ablations.END}\nafter\n")
    assert "by modulation | 2 | 102.5 (101.0 to 104.0) | 4.0 | 1.50 |" in text
    assert "| whole images | images of 64 | pending |" in text
    assert ablations.main([*line, "--", "--kimg", "4"]) == 2
    assert "is of `python -m bench.runs.ablations`: name another --json" in capsys.readouterr().out


def test_denormal_numbers_are_kept_and_flushed_in_turn(tiny_config, tiny_trainer, monkeypatch, tmp_path, capsys):
    config, run_dir, asked = tiny_config(), tmp_path / "run", []
    with pytest.raises(SystemExit, match="has no checkpoints: name a run's folder"):
        denormals.main([str(run_dir)])
    trainer, _ = tiny_trainer(config)
    path = save_checkpoint(run_dir, config, trainer.state_dict(), 1)
    assert denormals.main([str(path), "--once", "flush", "--iterations", "1"]) == 0
    assert float(capsys.readouterr().out) > 0
    assert (torch.tensor(1e-39) * 0.5).item() == 0
    assert denormals.main([str(path), "--once", "keep", "--iterations", "1"]) == 0
    assert (torch.tensor(1e-39) * 0.5).item() > 0

    def run(line, **options):
        asked.append(line[line.index("--once") + 1])
        return types.SimpleNamespace(stdout="2.0" if asked[-1] == "flush" else "3.0")

    monkeypatch.setattr(denormals, "subprocess", types.SimpleNamespace(run=run, PIPE=None))
    result = tmp_path / "x.json"
    assert denormals.main([str(run_dir), "--rounds", "2", "--json", str(result)]) == 0
    assert asked == ["keep", "flush", "flush", "keep"]
    found = json.loads(result.read_text())
    assert found["cases"][0]["times_as_fast"]["median"] == 1.5
    assert "denormal numbers flushed against kept | 1.50x (" in brief.text([{**found, "file": "x.json"}])


def test_a_shared_machine_gives_no_speed(tmp_path):
    (tmp_path / "metrics.json").write_text('[{"cur_nimg": 8, "fd_efficientnet": 7.0}]')
    (tmp_path / "stats.jsonl").write_text('{"cur_nimg": 8, "img_per_sec": 3.0}\n')
    cases = [ablations.measured("standard", seed, tmp_path, 1.5, shared=seed > 0) for seed in (0, 1)]
    assert "| patches of 16 alone | 2 | 7.0 (7.0 to 7.0) | 3.0 | 1.50 |" in "\n".join(ablations.table(cases))
    assert "| patches of 16 alone | 1 | 7.0 | - | 1.50 |" in "\n".join(ablations.table(cases[1:]))


def test_every_ablation_is_one_that_trains():
    for name in ablations.VARIANTS:
        check(train.parse(ablations.command(name, 3, Path("x"), ["--kimg", "1"])[2:]).config)


def test_the_page_of_ablations_is_that_of_its_file():
    content = json.loads(ablations.RESULT.read_text()) if ablations.RESULT.is_file() else None
    inside = ablations.PAGE.read_text().partition(ablations.BEGIN)[2].partition(ablations.END)[0]
    assert inside.strip() == ablations.page(content)
