"""Compiles every kernel with several versions of Triton: `python -m bench.resources.triton_matrix [--archs 80]`.

No GPU is needed.

Each version is installed into a folder of its own, put in front of what is installed here, and asked for the table of
`bench.resources`. The result goes to `bench/results/triton-matrix.json`, beside what is there of other versions and
architectures. Exit status 1 if a version fails to compile something.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "triton-matrix.json"
VERSIONS = ("3.4.0", "3.6.0", "3.7.1", "3.9.0")
ARCHS = (70, 80, 90)


def install(version: str, folder: Path) -> Path:
    """The folder that holds this Triton, and nothing else."""
    target = folder / f"triton-{version}"
    if not (target / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, f"triton=={version}"], check=True)
    return target


def compile_all(version: str, folder: Path, arch: int) -> dict[str, Any]:
    """Kernels compiled, kernels that fall short of what `bench.resources` asks for, or the error."""
    target = install(version, folder)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(target), str(ROOT)])
    command = [sys.executable, "-m", "bench.resources", "--json", "--brief", "--arch", str(arch)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    row: dict[str, Any] = {"triton": version, "arch": arch}
    try:
        rows = json.loads(result.stdout)
    except json.JSONDecodeError:
        return {**row, "error": (result.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    short = [f"{x['case']}: {problem}" for x in rows for problem in x["problems"]]
    return {**row, "compiled": len(rows), "spilling": sum(x["spill"] > 0 for x in rows), "problems": short}


def format_matrix(rows: list[dict[str, Any]]) -> str:
    lines = ["triton   arch    compiled  spilling  problems"]
    for row in rows:
        end = row.get("error") or f"{row['compiled']:>8}  {row['spilling']:>8}  {len(row['problems'])}"
        lines.append(f"{row['triton']:<8} sm_{row['arch']:<5}{end}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources.triton_matrix", description=__doc__.split(":")[0] + "."
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".triton-versions", help="where the versions are kept")
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    args = parser.parse_args()
    rows = [compile_all(version, args.folder, arch) for version in args.versions for arch in args.archs]
    done = {(row["triton"], row["arch"]) for row in rows}
    kept = [row for row in json.loads(RESULT.read_text()) if (row["triton"], row["arch"]) not in done]
    rows_of_all = sorted(kept + rows, key=lambda row: ([*map(int, row["triton"].split("."))], row["arch"]))
    RESULT.write_text(json.dumps(rows_of_all, indent=2) + "\n")
    print(format_matrix(rows))
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
