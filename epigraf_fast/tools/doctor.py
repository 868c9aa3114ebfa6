"""What this machine can run, and why not the rest.

$ epigraf doctor
$ epigraf doctor --json
$ epigraf doctor --check       # the kernels on this GPU, as the first start of a run does
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from typing import Any, Literal

import torch

from .. import __version__, machine
from ..config import preset
from ..ops import backends, native, verdicts
from ..training import proof
from ..training.metrics import PACKAGES as METRICS_PACKAGES
from ..training.networks import find_device
from ..training.precision import capability_of, settled

Report = dict[str, Any]

# Extras of setup.py that add a feature, and their packages.
EXTRAS = {
    "metrics": METRICS_PACKAGES,
    "make_dataset": ("pyvista",),
    "tools": ("safetensors", "imageio-ffmpeg", "scikit-image", "scipy", "trimesh", "mrcfile", "matplotlib"),
    "viewer": ("viser",),
}

# Code that only a GPU can run and that no GPU has run yet. It is never on by default.
OPT_IN = (
    "torchrun on several GPUs (NCCL): not yet run, only gloo between two processes on a CPU",
    "--precision tf32x3, fp16 and bf16: not yet run on a GPU",
)


def report() -> Report:
    """Everything this module knows, as plain JSON values.

    Returns:
        versions: name -> version, or None where it is not there.
        cpu: `threads` that torch uses, `capability`, its vector instructions, and `level`, those of the extension, with
            what the processor has beyond, see `native.cpu_level`.
        cuda: `reason` why there is no GPU, or None, and `gpus`, each with name, capability, memory_gib, driver and
            `reason` why torch cannot run on it, or None.
        backends: op -> backend -> None if it can be used here, else the reason why not.
        defaults: op -> device type -> the backend that `backend=None` takes.
        extras: extra -> its packages that are missing.
        checked: item -> state and why, the worst that checks of the kernels found on this GPU; None: there was none.
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
        "cpu": {
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "level": native.cpu_level(),
        },
        "cuda": cuda,
        "backends": backends.status(),
        "defaults": {op: {device: backends.resolve(op, None, device) for device in devices} for op in backends.OPS},
        "extras": {extra: [name for name in names if _version(name) is None] for extra, names in EXTRAS.items()},
        "opt_in": list(OPT_IN),
        "checked": _checked() if cuda["gpus"] else None,
    }


def _checked() -> dict[str, tuple[str, str]] | None:
    items = verdicts.of_bare_ops("cuda")
    return None if items is None else {item: (verdict.state, verdict.why) for item, verdict in items.items()}


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
    devices = [["cpu", f"{cpu['threads']} threads, {cpu['capability']}{_level(cpu['level'])}"]]
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
        "kernels on this GPU": _columns([[item, *words] for item, words in (report["checked"] or {}).items()])
        if report["checked"]
        else [backends.UNCHECKED] * bool(cuda["gpus"]),
        "off by default": report["opt_in"],
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items() if lines)


def _level(level: tuple[str, str | None] | None) -> str:
    if level is None:
        return ""
    used, better = level
    advice = "pip install again, on this machine or with EPIGRAF_FAST_LEVELS=all"
    return f", extension for {used}" + (f", and this processor has {better}: {advice}" if better else "")


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
        return {"reason": f"this torch is built without CUDA (the system has {machine.look()})", "gpus": []}
    if not torch.cuda.is_available():
        reason = f"torch finds no GPU, or a driver too old for it (the system has {machine.look()})"
        return {"reason": reason, "gpus": []}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None
    gpus = []
    for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        capability = 10 * properties.major + properties.minor
        runs = any(machine.runs(arch, capability) for arch in torch.cuda.get_arch_list())
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


def check_kernels(preset_name: str, device: torch.device) -> int:
    """Checks the kernels with a preset's constants, prints what was found, and keeps it for calls and runs.

    Returns:
        An exit code: 1 where a kernel failed.
    """
    if device.type not in backends.CHECKED:
        print(f"nothing to check: there are no kernels for {device} that a check decides about")
        return 0
    config, _ = settled(preset(preset_name), capability_of(device))
    poses = torch.tensor([[0.2 * i, 1.2 + 0.1 * i, 0.0] for i in range(-3, 4)])
    found = proof.find(config, 0, poses, device, config.batch, settings=False, recheck=True)
    rows = [[item, verdict.state, f"{verdict.seconds:.1f} s", verdict.why] for item, verdict in found.items.items()]
    print("\n".join(_columns(rows)) if rows else "nothing to check: no kernel can be used here, see above")
    return int(any(verdict.state == verdicts.FAILED for verdict in found.items.values()))


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `epigraf doctor`."""

    json: bool = False
    """Print JSON, for programs."""
    check: bool = False
    """Check the kernels on this GPU, whatever was found before."""
    preset: Literal["demo", "ffhq", "cats", "plants", "food"] = "ffhq"
    """Whose constants to check with."""
    device: str | None = None
    """To check; default: the GPU, if there is one."""


def run(options: Options) -> None:
    if options.check:
        raise SystemExit(check_kernels(options.preset, find_device(options.device)))
    print(json.dumps(report(), indent=2) if options.json else format_report(report()))
