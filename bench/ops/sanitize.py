"""Every GPU kernel once, on tiny shapes, for compute-sanitizer: `compute-sanitizer python -m bench.ops.sanitize`.

Without a GPU, the backends that are here. Each op's values and derivatives are computed; none may fail.
"""

from __future__ import annotations

import argparse
import sys

import torch

from . import cases as catalogue
from .parity import draws_like, evaluate
from .run import names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--op", type=names(catalogue.OPS), default=[*catalogue.backends.OPS, "renderer"])
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = ("triton", "cuda") if device.type == "cuda" else ("cpu",)
    ran = 0
    for op in args.op:
        for backend in wanted:
            if catalogue.lacking(op, backend, "fp32", device) is not None:
                continue
            for case in catalogue.cases(op, "tiny", "fp32"):
                inputs = case.build(device)
                with torch.no_grad():
                    outputs = case.call(inputs, backend)
                incoming = dict(zip((f"output {i}" for i in range(len(outputs))), draws_like(outputs, 40), strict=True))
                gradients = tuple(inputs[name] for name in case.wanted)
                incoming |= dict(zip((f"gradient to {n}" for n in case.wanted), draws_like(gradients, 50), strict=True))
                found = evaluate(case, inputs, backend, case.modes[-1], incoming)
                broken = [name for name, y in found.items() if not torch.isfinite(y).all()]
                print(f"{op} {case.name} {backend}: {len(found)} values{f', not finite: {broken}' if broken else ''}")
                if broken:
                    return 1
                ran += 1
    print(f"{ran} cases ran on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
