"""Microbenchmarks of the ops at the shapes of a training step: `python -m bench.ops --op decode_triplane --json FILE`.

On a GPU: device times with the L2 cache cold and warm, memory, and the share of what the GPU does at best (`ceilings`).
On a CPU: how many times as fast each backend is as the last one named, run in turn; no times. Every backend is compared
with the float64 reference first, and one that is wrong gets no speed. Exit status 1 if one was, or failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from epigraf_fast.training.memory import keep_freed_memory

from .. import results
from ..timing import Spread, cpu_ratios, gpu_times, peak_bytes, saved_bytes
from . import cases as catalogue
from . import published
from .cases import Case, Inputs, Work
from .parity import Parity, Verdict, arithmetic, draws_like, leaves

Row = dict[str, Any]


def runner(case: Case, inputs: Inputs, backend: str, mode: str) -> Callable[[], Any]:
    """What a measurement runs: the forward, the backward of a graph that stays, both, or the backward's backward."""
    values = leaves(case, {name: x for name, x in inputs.items() if name not in case.draws})
    forward = functools.partial(case.call, values, backend)
    if mode == "fwd":
        return forward
    wanted = [values[name] for name in case.wanted]
    outputs = forward()
    grad_ys = [g.requires_grad_(mode == "double") for g in draws_like(outputs, 40)]
    if mode == "bwd":
        return lambda: torch.autograd.grad(outputs, wanted, grad_ys, retain_graph=True)
    if mode == "step":
        del outputs
        return lambda: torch.autograd.grad(forward(), wanted, grad_ys)
    grads = torch.autograd.grad(outputs, wanted, grad_ys, create_graph=True)
    grad_grads = draws_like(grads, 50)
    return lambda: torch.autograd.grad(grads, [*wanted, *grad_ys], grad_grads, retain_graph=True, allow_unused=True)


def fractions(work: Work, dtype: str, ceilings: dict[str, float], seconds: float) -> dict[str, float]:
    """Achieved over possible, for each thing that a call must do, and `floor`, the least time over the time taken."""
    atomics = max(ceilings.get("atomics_scalar", 0.0), ceilings.get("atomics_vector", 0.0))
    needs = {
        "copy": (work.bytes, ceilings.get("copy_bytes")),
        "gather": (work.gather_bytes, ceilings.get("gather_bytes")),
        "atomics": (work.atomics, atomics),
        "product": (work.flops, ceilings.get(f"{dtype}_flops")),
    }
    found = {name: amount / ceiling / seconds for name, (amount, ceiling) in needs.items() if amount and ceiling}
    if found:
        l2 = found.get("gather", 0.0) + found.get("atomics", 0.0)  # they share the cache's bandwidth
        found["floor"] = max(l2, found.get("copy", 0.0), found.get("product", 0.0))
    return found


def measure_gpu(case: Case, inputs: Inputs, backend: str, mode: str, ceilings: dict[str, float], budget: float) -> Row:
    """Times, memory and fractions of one backend."""
    with arithmetic(case.dtype):
        function = runner(case, inputs, backend, mode)
        warm = Spread.of(gpu_times(function, cold=False, budget=budget))
        cold = Spread.of(gpu_times(function, cold=True, budget=budget))
        row: Row = {"ms": {"cold": cold.to_dict(), "warm": warm.to_dict()}, "peak_bytes": peak_bytes(function)}
        if mode == "fwd" and case.wanted:
            values = leaves(case, {name: x for name, x in inputs.items() if name not in case.draws})
            row["saved_bytes"] = saved_bytes(lambda: case.call(values, backend), list(values.values()))
    work = case.work.get(mode)
    if work is not None:
        seconds = cold.median / 1000
        row["rates"] = {
            "bytes": work.bytes / seconds,
            "gather_bytes": work.gather_bytes / seconds,
            "atomics": work.atomics / seconds,
            "flops": work.flops / seconds,
        }
        row["fractions"] = fractions(work, case.dtype, ceilings, seconds)
    return row


def measure_cpu(case: Case, inputs: Inputs, backends: list[str], mode: str, budget: float) -> dict[str, Spread]:
    """Backend -> how many times as fast it is as the last one."""
    functions = {backend: runner(case, inputs, backend, mode) for backend in backends}
    slower = cpu_ratios(functions, budget=budget)
    return {name: Spread(1 / s.median, 1 / s.p80, 1 / s.p20, s.count) for name, s in slower.items()}


def run_case(
    case: Case,
    mode: str,
    backends: list[str],
    device: torch.device,
    ceilings: dict[str, float],
    budget: float,
) -> Iterator[Row]:
    """One row a backend: what it is, whether it is right, and what was measured if it is."""
    head: Row = {"op": case.op, "case": case.name, "dtype": case.dtype, "mode": mode}
    inputs = case.build(device)
    parity = Parity(case, inputs, mode)
    right = []
    for backend in backends:
        row = head | {"backend": backend}
        try:
            verdict: Verdict = parity.check(backend)
            row["parity"] = {"wrong": verdict.wrong, "error": verdict.error, "where": verdict.where}
            if verdict.wrong is None and device.type == "cuda":
                row |= measure_gpu(case, inputs, backend, mode, ceilings, budget)
        except Exception as error:  # one backend's fault must not hide the others' numbers
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if device.type == "cuda" or "failed" in row or row["parity"]["wrong"]:
            yield row
        else:
            right.append((backend, row))
    if device.type != "cuda" and right:
        names = [backend for backend, _ in right]
        speed = measure_cpu(case, inputs, names, mode, budget) if len(names) > 1 else {}
        for backend, row in right:
            if backend in speed:
                row |= {"against": names[-1], "times_as_fast": speed[backend].to_dict()}
            yield row


def format_row(row: Row) -> str:
    """One line, or two if something is wrong."""
    line = f"{row['op']:<18} {row['case']:<44} {row['dtype']:<5} {row['mode']:<7} {row['backend']:<10}"
    if row.get("failed"):
        return f"{line} ! {row['failed']}"
    if row["parity"]["wrong"]:
        return f"{line} ! WRONG, no speed: {row['parity']['wrong']}"
    if "times_as_fast" in row:
        spread = row["times_as_fast"]
        line += f" {spread['median']:8.2f}x {row['against']} ({spread['p20']:.2f} to {spread['p80']:.2f})"
    if "ms" in row:
        cold, warm = row["ms"]["cold"], row["ms"]["warm"]
        line += f" {cold['median']:9.4f} ms ({cold['p20']:.4f} to {cold['p80']:.4f}), warm {warm['median']:9.4f}"
        line += f", peak {row['peak_bytes'] / 2**20:8.1f} MiB"
        parts = [f"{name} {100 * value:.0f}%" for name, value in row.get("fractions", {}).items()]
        line += f", {', '.join(parts)}" if parts else ""
    return line.rstrip()


def say(text: str) -> None:
    print(text, flush=True)


def run(args: argparse.Namespace) -> results.Result:
    """Measures what the command line asks for, and writes the file after every op."""
    device = torch.device(args.device)
    ceilings: dict[str, float] = {}
    if device.type == "cuda":
        from . import ceilings as measured

        published.prepare_compiler()
        ceilings = measured.measure(tiny=args.size == "tiny")
        for name, value in ceilings.items():
            say(f"ceiling {name:<16} {value:.4g} a second")
    else:
        keep_freed_memory()  # as a run does
    rows: list[Row] = []
    done: list[str] = []
    for op in args.op:
        for dtype in args.dtype:
            rows += run_op(op, dtype, args, device, ceilings)
        done.append(op)
        found = results.result("ops", described(args), rows, ceilings=ceilings, done=done)
        if args.json:
            results.write(args.json, found)
    return found


def run_op(
    op: str, dtype: str, args: argparse.Namespace, device: torch.device, ceilings: dict[str, float]
) -> Iterator[Row]:
    """Measures the cases of an op."""
    wanted = args.backend or catalogue.available(op, dtype, device)
    lacking = {name: catalogue.lacking(op, name, dtype, device) for name in wanted}
    for name, reason in lacking.items():
        if reason is not None and args.backend:
            say(f"{op} {dtype}: no {name}: {reason}")
    backends = [name for name, reason in lacking.items() if reason is None]
    for case in catalogue.cases(op, args.size, dtype, args.batch):
        for mode in case.modes:
            named = [b for b in backends if mode != "double" or b != "compile"]  # it has no second derivative
            if mode not in args.mode or not named:
                continue
            try:
                for row in run_case(case, mode, named, device, ceilings, args.budget):
                    say(format_row(row))
                    yield row
            except torch.OutOfMemoryError as error:  # of the reference
                row = {"op": op, "case": case.name, "dtype": dtype, "mode": mode, "backend": "reference"}
                row["failed"] = f"OutOfMemoryError: {str(error).splitlines()[0]}"
                say(format_row(row))
                yield row
            if device.type == "cuda":
                torch.cuda.synchronize()  # an illegal access ends the process here, at the op that made it
                torch.cuda.empty_cache()


def run_apart(args: argparse.Namespace) -> results.Result:
    """All ops in a process of their own, and what is left in another when one breaks it or stands still."""
    rows: list[Row] = []
    ceilings: dict[str, float] = {}
    left = list(args.op)

    def keep(rows: list[Row], ceilings: dict[str, float]) -> results.Result:
        """What there is so far, written too: this process may be stopped."""
        whole = results.result("ops", described(args), rows, ceilings=ceilings)
        if args.json:
            results.write(args.json, whole)
        return whole

    while left:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            line = [*args.line, "--op", ",".join(left), "--json", str(path), "--child"]
            process = subprocess.Popen([sys.executable, "-m", "bench.ops", *line], cwd=results.ROOT)
            found: results.Result = {"cases": [], "ceilings": {}, "done": []}
            progress = time.monotonic()
            while process.poll() is None and time.monotonic() - progress < args.timeout:
                time.sleep(0.2)
                before = len(found["done"])
                found = json.loads(path.read_text()) if path.is_file() else found
                if len(found["done"]) > before:
                    progress = time.monotonic()
                    keep(rows + found["cases"], found["ceilings"])
            reason = f"exit status {process.poll()}"
            if process.poll() is None:
                process.kill()
                process.wait()
                reason = f"took more than {args.timeout:g} seconds"
            found = json.loads(path.read_text()) if path.is_file() else found
        rows += found["cases"]
        ceilings = ceilings or found["ceilings"]
        left = left[len(found["done"]) :]
        if left:
            row = {"op": left.pop(0), "case": "all", "dtype": ",".join(args.dtype), "mode": ",".join(args.mode)}
            rows.append(row | {"backend": "all", "failed": reason})
            say(format_row(rows[-1]))
        whole = keep(rows, ceilings)
    return whole


def described(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run, for its result file."""
    return {name: getattr(args, name) for name in ("op", "backend", "mode", "dtype", "size", "batch", "budget")}


def names(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """The type of an argument: names with commas between them, all of them choices."""

    def parse(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return found

    return parse


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    backends = (*catalogue.backends.BACKENDS, *catalogue.BASELINES)
    out = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.split(":")[0] + ".")
    out.add_argument("--op", type=names(catalogue.OPS), default=list(catalogue.OPS), help="default: all")
    out.add_argument("--backend", type=names(backends), default=None, help="default: all that are there")
    out.add_argument("--mode", type=names(catalogue.MODES), default=list(catalogue.MODES))
    out.add_argument("--dtype", type=names(tuple(catalogue.DTYPES)), default=["fp32"])
    out.add_argument("--size", choices=tuple(catalogue.SIZES), default="real" if gpu else "tiny")
    out.add_argument("--batch", type=lambda text: tuple(map(int, text.split(","))), default=None, help="as 1,8")
    out.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    out.add_argument("--budget", type=float, default=0.3, help="seconds for one measurement")
    out.add_argument("--timeout", type=float, default=600.0, help="of an op on a GPU, seconds")
    out.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    out.add_argument("--json", default=None, help="write the results there")
    return out


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.line = sys.argv[1:] if argv is None else argv
    found = run_apart(args) if args.device == "cuda" and not args.child else run(args)
    broken = [row for row in found["cases"] if row.get("failed") or row["parity"]["wrong"]]
    if broken:
        print(f"{len(broken)} of {len(found['cases'])} measurements are wrong or failed", file=sys.stderr)
    return int(any(not row.get("failed", "").startswith("OutOfMemoryError") for row in broken))


if __name__ == "__main__":
    sys.exit(main())
