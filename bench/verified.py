"""Writes which kernels a GPU has passed the tests of: `python -m bench.verified --json FILE`, after those tests.

The file's place is epigraf_fast/ops/verified.json: committed there, it makes those backends the default on GPUs.
"""

from __future__ import annotations

import argparse
import sys

import torch

from epigraf_fast.ops import backends

from . import results


def record() -> results.Result:
    """The backends of GPUs that every op they are written for has here, and what this machine is."""
    status = backends.status()
    usable = [name for name in ("triton", "cuda") if all(status[op][name] is None for op in backends.IMPLEMENTED[name])]
    return results.result("verified", {}, [], backends=usable)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verified", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--json", required=True)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no GPU: nothing has been verified", file=sys.stderr)
        return 1
    results.write(args.json, record())
    return 0


if __name__ == "__main__":
    sys.exit(main())
