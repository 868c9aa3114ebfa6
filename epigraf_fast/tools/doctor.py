"""What this machine can run, and why not the rest.

$ epigraf doctor
$ epigraf doctor --json
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from .. import __version__
from ..ops import backends
from ..training.metrics import PACKAGES as METRICS_PACKAGES
from .command import running

Report = dict[str, Any]

# Extras of setup.py that add a feature, and their packages.
EXTRAS = {
    "metrics": METRICS_PACKAGES,
    "make_dataset": ("pyvista", "pybullet"),
    "tools": ("safetensors", "imageio-ffmpeg", "scikit-image", "trimesh", "mrcfile", "matplotlib"),
    "viewer": ("viser",),
}

# Kernels that are opt-in as long as no GPU has passed their tests, see `backends.VERIFIED`.
KERNELS = {
    "triton": "--backend triton, the renderer on Triton kernels: not yet run on a GPU, only in Triton's interpreter",
    "cuda": "--backend cuda, the convolutions on the extension: not yet run on a GPU, only compiled, and in "
    "an emulation of its threads on the CPU",
}
# Code that only a GPU can run and that no GPU has run yet. It is never on by default.
OPT_IN = (
    "torchrun on several GPUs (NCCL): not yet run, only gloo between two processes on a CPU",
    "--precision tf32 and fp16, --discriminator.half-blocks: not yet run on a GPU",
    "--cuda-graphs, a training phase as one launch: not yet run on a GPU; a CPU tests what the phases read and give",
    *(text for backend, text in KERNELS.items() if backend not in backends.VERIFIED),
)


def report() -> Report:
    """Everything this module knows, as plain JSON values.

    Returns:
        versions: name -> version, or None where it is not there.
        cpu: `threads` that torch uses and `capability`, its vector instructions.
        cuda: `reason` why there is no GPU, or None, and `gpus`, each with name, capability, memory_gib, driver and
            `reason` why torch cannot run on it, or None.
        backends: op -> backend -> None if it can be used here, else the reason why not.
        defaults: op -> device type -> the backend that `backend=None` takes.
        extras: extra -> its packages that are missing.
        opt_in: `OPT_IN`.
    """
    cuda = _cuda()
    devices = ("cpu", "cuda") if cuda["gpus"] else ("cpu",)
    return {
        "versions": {
            "epigraf_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "nvcc": _nvcc(),
        },
        "cpu": {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()},
        "cuda": cuda,
        "backends": backends.status(),
        "defaults": {op: {device: backends.resolve(op, None, device) for device in devices} for op in backends.OPS},
        "extras": {extra: [name for name in names if _version(name) is None] for extra, names in EXTRAS.items()},
        "opt_in": list(OPT_IN),
    }


def format_backends(report: Report, chosen: dict[str, str] | None = None) -> str:
    """The backend table: one line an op, then one line a reason.

    Args:
        chosen: op -> the backend that a run takes, for a column of its own.
    """
    devices = list(next(iter(report["defaults"].values())))
    rows = [["op", *backends.BACKENDS, *(f"default on {device}" for device in devices)]]
    rows[0] += ["this run"] if chosen else []
    lacking: dict[tuple[str, str], list[str]] = {}
    for op, reasons in report["backends"].items():
        rows.append([op, *("yes" if reason is None else "-" for reason in reasons.values())])
        rows[-1] += report["defaults"][op].values()
        rows[-1] += [chosen[op]] if chosen else []
        for backend, reason in reasons.items():
            if reason is not None:
                lacking.setdefault((backend, reason), []).append(op)
    lines = _columns(rows)
    for (backend, reason), ops in lacking.items():
        some = "" if len(ops) == len(report["backends"]) else f" ({', '.join(ops)})"
        lines.append(f"no {backend}{some}: {reason}")
    return "\n".join(lines)


def format_report(report: Report) -> str:
    """The whole report as text."""
    cpu, cuda = report["cpu"], report["cuda"]
    devices = [["cpu", f"{cpu['threads']} threads, {cpu['capability']}"]]
    for index, gpu in enumerate(cuda["gpus"]):
        facts = f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB, driver {gpu['driver'] or 'unknown'}"
        devices.append([f"cuda:{index}", facts + (f"; cannot be used: {gpu['reason']}" if gpu["reason"] else "")])
    if not cuda["gpus"]:
        devices.append(["cuda", f"none: {cuda['reason']}"])
    extras = [
        [extra, f"missing: pip install {' '.join(missing)}" if missing else "yes"]
        for extra, missing in report["extras"].items()
    ]
    sections = {
        "versions": _columns([[name, version or "-"] for name, version in report["versions"].items()]),
        "devices": _columns(devices),
        "backends": format_backends(report).splitlines(),
        "extras": _columns(extras),
        "off by default": report["opt_in"],
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items() if lines)


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells -> aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a command prints; nothing if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvcc() -> str | None:
    nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    found = re.search(r"release (\S+),", _output(nvcc, "--version"))
    return found[1] if found else None


def _cuda() -> Report:
    if torch.version.cuda is None:
        return {"reason": "this torch is built without CUDA", "gpus": []}
    if not torch.cuda.is_available():
        return {"reason": "torch finds no GPU, or a driver too old for it", "gpus": []}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None
    gpus = []
    for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        capability = 10 * properties.major + properties.minor
        runs = any(_runs(arch, capability) for arch in torch.cuda.get_arch_list())
        gpus.append(
            {
                "name": properties.name,
                "capability": capability,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "driver": driver,
                "reason": None if runs else f"torch {torch.__version__} has no code for sm_{capability}",
            }
        )
    return {"reason": None, "gpus": gpus}


def _runs(arch: str, capability: int) -> bool:
    """Whether code for `arch` runs on a GPU: machine code (sm_) within a generation, PTX (compute_) from then on."""
    kind, number = re.match(r"([a-z]+)_(\d+)", arch).groups()
    return int(number) <= capability and (kind == "compute" or int(number) // 10 == capability // 10)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `epigraf doctor`."""

    json: bool = False
    """Print JSON, for programs."""


def main(args: Sequence[str] | None = None) -> None:
    from .arguments import parse  # here, as those that only ask for a report may lack tyro

    with running():
        options = parse(Options, "doctor", __doc__, args)
        print(json.dumps(report(), indent=2) if options.json else format_report(report()))
