"""Demos alone and two side by side, by how their threads wait and how many there are.

`python -m bench.runs.waiting --json FILE`, on a machine that does nothing else. Each round runs
every policy alone and in a pair, in turn, so that whatever disturbs meets all alike; ratios are of medians.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from epigraf_fast.training.log import read_stats

from .. import results

# name -> environment. A run that is told one of these keeps its threads, see `epigraf_fast.training.cores`.
POLICIES = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "100 spins": {"GOMP_SPINCOUNT": "100"},
    "1000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10000 spins": {"GOMP_SPINCOUNT": "10000"},
    "epigraf_fast": {},  # libgomp's own, and a thread for every core that others leave free
}
BASE = "libgomp's own"
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
WARM_UP = 80  # images of each demo that do not count
START = 180.0  # seconds that they may take
POLL = 0.05  # seconds
# A demo that logs every step, and does nothing but train.
DEMO = "demo --device cpu --kimg 1000 --log-kimg 0.008 --snapshot-kimg 1000 --checkpoint-kimg 1000 --grid 1 1"
DEMO = [*DEMO.split(), "--metric-images", "0", "--turntable", "0"]


def start(run_dir: Path, policy: dict[str, str], threads: int) -> subprocess.Popen:
    """A demo under a policy."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "train.py", *DEMO, "--run-dir", str(run_dir)]
    return subprocess.Popen(
        command,
        cwd=results.ROOT,
        env={**environment, **policy, **({"OMP_NUM_THREADS": str(threads)} if policy else {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def images(run_dirs: list[Path]) -> list[int]:
    """Trained on so far."""
    lines = [read_stats(run_dir / "stats.jsonl") for run_dir in run_dirs]
    return [own[-1]["cur_nimg"] if own else 0 for own in lines]


def speed(policy: dict[str, str], together: int, threads: int, count: int, seconds: float) -> float:
    """Images a second of so many demos together, from when all have begun: over `count` images, or so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run_dirs = [Path(folder, str(number)) for number in range(together)]
        processes = [start(run_dir, policy, threads) for run_dir in run_dirs]
        try:
            begun = time.perf_counter()
            while min(images(run_dirs)) < WARM_UP:
                if any(process.poll() is not None for process in processes):
                    raise RuntimeError("a demo ended before it was measured: run train.py demo to see why")
                if time.perf_counter() - begun > START:
                    return 0.0
                time.sleep(POLL)
            before, begun = sum(images(run_dirs)), time.perf_counter()
            trained = took = 0.0
            while trained < count and took < seconds:
                time.sleep(POLL)
                trained, took = sum(images(run_dirs)) - before, time.perf_counter() - begun
            return trained / took
        finally:
            for process in processes:
                process.kill()
                process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.waiting", description=__doc__.split("\n")[0])
    parser.add_argument("--json", default=None, help="write the ratios there")
    parser.add_argument("--images", type=int, default=400, help="that a measurement takes, over all of its demos")
    parser.add_argument("--seconds", type=float, default=60.0, help="that it takes at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each demo")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=[*POLICIES])
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no demo stays behind
    policies = {name: POLICIES[name] for name in dict.fromkeys([BASE, *args.policy])}
    speeds: dict[tuple[str, int], list[float]] = {(name, number): [] for name in policies for number in (1, 2)}
    for number in range(args.rounds):
        for (name, together), seen in speeds.items():
            seen.append(speed(policies[name], together, args.threads, args.images, args.seconds))
            base = speeds[BASE, 1][-1]
            if not base:
                raise RuntimeError(
                    f"one demo alone did not begin within {START:.0f} s: this machine does something else"
                )
            print(f"round {number + 1}: {name}, {together} at a time: {seen[-1] / base:.3f}", flush=True)
    base = statistics.median(speeds[BASE, 1])
    cases = []
    for name, policy in policies.items():
        alone, pair = (statistics.median(speeds[name, together]) / base for together in (1, 2))
        spread = [round(x / base, 3) for together in (1, 2) for x in sorted(speeds[name, together])]
        cases.append({"policy": name, "environment": policy, "alone": alone, "pair": pair, "all": spread})
        print(f"{name:>14}: alone {alone:.3f}, two together {pair:.3f} of {BASE}, alone")
    if args.json:
        config = {"preset": "demo", "threads": args.threads, "images": args.images, "rounds": args.rounds}
        results.write(args.json, results.result("waiting", config, cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
