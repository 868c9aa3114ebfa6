"""The GPUs and the driver of this machine, and the torch that fits them. Needs nothing but Python.

$ python -I epigraf_fast/machine.py constraints.txt .venv/constraints.txt      # as `make` does

prints one line, which torch and why, and writes the constraints for it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TESTED = "2.13.0"  # as in constraints.txt; PyPI's build of it is for CUDA 13
CUDA12 = "2.10.0"  # the newest whose build on PyPI is for CUDA 12; it has code for sm_70, which CUDA 13 has not

# The Triton that each torch was released with.
TRITONS = {
    "2.8.0": "3.4.0",
    "2.9.0": "3.5.0",
    "2.9.1": "3.5.1",
    "2.10.0": "3.6.0",
    "2.11.0": "3.6.0",
    "2.12.0": "3.7.0",
    "2.12.1": "3.7.1",
    "2.13.0": "3.7.1",
    "2.14.0": "3.8.0",
    "2.14.1": "3.8.0",
    "2.15.0": "3.9.0",
}

# The first driver whose CUDA is of that generation: within one, newer builds run on older drivers.
CUDA12_DRIVER, CUDA13_DRIVER = 525, 580
OLDEST = 70  # the oldest compute capability, times ten, that the kernels are written for
NEWEST_VOLTA = 72
VOLTAS = r"V100|TITAN V\b|GV100"

DRIVER = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+[\d.]*)")
ROOT = Path("/")  # under it /proc and /dev


class Gpu(NamedTuple):
    """`capability` is ten times the compute capability, as in sm_70; None where it is not known."""

    name: str
    capability: int | None

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability})" if self.capability else self.name


class Machine(NamedTuple):
    """What the system says, whatever torch sees.

    Args:
        driver: Its version, as "535.129.03"; None: there is none.
        fault: What nvidia-smi says where it is there and fails.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    fault: str | None = None

    def __str__(self) -> str:
        words = [*dict.fromkeys(map(str, self.gpus))] or (["a GPU of unknown kind"] if self.driver else ["no GPU"])
        words += [f"driver {self.driver}"] if self.driver else []
        words += [f"nvidia-smi fails: {self.fault}"] if self.fault else []
        return ", ".join(words)

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU that the kernels are written for, or one of which nothing is known."""
        return bool(self.usable or (self.driver and not self.gpus))

    @property
    def usable(self) -> tuple[Gpu, ...]:
        """The GPUs that the kernels are written for."""
        return tuple(gpu for gpu in self.gpus if gpu.capability is None or gpu.capability >= OLDEST)


class Condition(NamedTuple):
    """How a GPU is doing; None where nvidia-smi does not say.

    Args:
        busy: Percent of the last second or so in which it computed.
        watts, default_watts: What it may draw, and what it may as it is sold.
    """

    busy: float | None
    watts: float | None
    default_watts: float | None


class Choice(NamedTuple):
    """A torch and why; or, with `fault`, why no GPU of this machine can be used, and the way out."""

    torch: str
    reason: str
    fault: str | None = None


def look(root: Path = ROOT) -> Machine:
    """Asks nvidia-smi, else the driver's files in /proc, which a container that was given no GPU sees too."""
    fault = None
    if shutil.which("nvidia-smi"):
        for fields in ("driver_version,name,compute_cap", "driver_version,name"):  # old drivers do not know the last
            lines, fault = _nvidia_smi(fields)
            if lines:
                rows = [[cell.strip() for cell in line.split(",")] for line in lines]
                gpus = tuple(Gpu(row[1], _capability(row[2] if len(row) > 2 else "", row[1])) for row in rows)
                return Machine(gpus, rows[0][0])
    proc = root / "proc/driver/nvidia"
    try:
        text = (proc / "version").read_text()
    except OSError:
        return Machine(fault=fault)
    if not any((root / "dev").glob("nvidia[0-9]*")):
        return Machine(fault=fault)
    version = DRIVER.search(text)
    names = []
    for path in sorted(proc.glob("gpus/*/information")):
        model = re.search(r"^Model:\s*(.*\S)", path.read_text(), re.MULTILINE)
        names.append(model[1] if model else "unknown model")
    return Machine(tuple(Gpu(name, _capability("", name)) for name in names), version and version[1], fault)


def driver(root: Path = ROOT) -> str | None:
    """The version of the driver, from its file where there is one: that is faster than nvidia-smi."""
    try:
        found = DRIVER.search((root / "proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else look(root).driver


def condition(index: int) -> Condition | None:
    """How the GPU that CUDA counts as `index` is doing; None where nvidia-smi is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return None
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[index] if index < len(visible) else str(index)
    fields = "driver_version,utilization.gpu,power.limit,power.default_limit"
    lines, _ = _nvidia_smi(fields, f"--id={name}", units=False)
    cells = [cell.strip() for cell in lines[0].split(",")] if lines else []
    if len(cells) != 4:
        return None
    return Condition(*(float(cell) if re.fullmatch(r"\d+(\.\d*)?", cell) else None for cell in cells[1:]))


def _nvidia_smi(fields: str, *options: str, units: bool = True) -> tuple[list[str], str | None]:
    """The lines of a query, one a GPU; and where it fails, what it says."""
    form = "csv,noheader" if units else "csv,noheader,nounits"
    command = ["nvidia-smi", f"--query-gpu={fields}", f"--format={form}", *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return [], str(error)
    lines = [line for line in result.stdout.splitlines() if re.match(r"\d+\.", line)]
    said = " ".join((result.stderr + result.stdout).split())
    return lines, None if lines else said[:200] or f"exit status {result.returncode}"


def _capability(number: str, name: str) -> int | None:
    if found := re.fullmatch(r"(\d+)\.(\d)", number):
        return 10 * int(found[1]) + int(found[2])
    return 70 if re.search(VOLTAS, name, re.IGNORECASE) else None


def hidden() -> bool:
    """Whether the environment hides every GPU from CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)


def runs(arch: str, capability: int) -> bool:
    """Whether code for `arch` runs on a GPU: machine code (sm_) within a generation, PTX (compute_) from then on."""
    kind, number = re.match(r"([a-z]+)_(\d+)", arch).groups()
    return int(number) <= capability and (kind == "compute" or int(number) // 10 == capability // 10)


def choose(machine: Machine) -> Choice:
    """The torch for the machine's GPUs; for one without, or whose GPUs are too old, `TESTED`."""
    if not machine.has_gpu:
        old = f": older than sm_{OLDEST}, the CPU trains" if machine.gpus else ": the CPU trains"
        return Choice(TESTED, f"{machine}{old}")
    driver = int(machine.driver.partition(".")[0]) if machine.driver else 0
    voltas = [gpu.name for gpu in machine.usable if gpu.capability and gpu.capability <= NEWEST_VOLTA]
    if driver < CUDA12_DRIVER:
        fault = f"{machine}: the driver is too old, CUDA 12 needs {CUDA12_DRIVER} or newer: update it"
        return Choice(TESTED, f"{machine}: the driver is too old for CUDA 12", fault)
    if voltas:
        return Choice(CUDA12, f"{machine}: CUDA 13 has no code for {voltas[0]}, so CUDA 12")
    if driver < CUDA13_DRIVER:
        return Choice(CUDA12, f"{machine}: CUDA 13 needs driver {CUDA13_DRIVER}, so CUDA 12")
    return Choice(TESTED, f"{machine}: CUDA 13")


def constraints(text: str, torch: str, triton: str) -> str:
    """constraints.txt for another torch: without the pins of what that torch has wishes of its own for."""
    if torch == TESTED and triton == TRITONS[TESTED]:
        return text
    text = re.sub(r"^torch==.*$", f"torch=={torch}", text, flags=re.MULTILINE)
    text = re.sub(r"^triton==.*$", f"triton=={triton}", text, flags=re.MULTILINE)
    return re.sub(r"^(?:setuptools|nvidia-[\w-]+)==.*\n", "", text, flags=re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Chooses torch by what this machine has.")
    parser.add_argument("constraints", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?", help="written anew only where it changes")
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="prints EPIGRAF_FAST_CUDA instead: 0 without a GPU, nvrtc where nvcc may be too new for it, else auto",
    )
    parser.add_argument("--torch", default="", help="this one, whatever the machine has")
    parser.add_argument("--triton", default="", help="this one, instead of the one that torch was released with")
    parser.add_argument("--device", default="", help="cpu: GPUs do not matter")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cuda:
        machine = Machine() if args.device == "cpu" or hidden() else look(args.root)
        cuda12 = choose(machine).torch == CUDA12  # whose torch brings NVRTC 12; nvcc may be 13
        print(("nvrtc" if cuda12 else "auto") if machine.has_gpu else "0")
        return 0
    if args.output is None:
        parser.error("name constraints and output")
    if args.torch:
        choice = Choice(args.torch, f"TORCH={args.torch} ({look(args.root)})")
    elif args.device == "cpu" or hidden():
        choice = Choice(TESTED, "DEVICE=cpu" if args.device == "cpu" else "CUDA_VISIBLE_DEVICES hides the GPUs")
    else:
        choice = choose(look(args.root))
    triton = args.triton or TRITONS.get(choice.torch)
    fault = choice.fault and f"{choice.fault}, or train on the CPU: make DEVICE=cpu"
    if triton is None:
        fault = f"TORCH={choice.torch}: name its Triton too, as in TRITON=3.7.1. Known: {' '.join(TRITONS)}"
    if fault:
        print(fault, file=sys.stderr)
        return 1
    print(f"torch {choice.torch}, triton {triton}: {choice.reason}", flush=True)
    text = constraints(args.constraints.read_text(encoding="utf-8"), choice.torch, triton)
    if not args.output.exists() or args.output.read_text(encoding="utf-8") != text:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
