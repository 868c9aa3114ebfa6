"""Result files: one JSON each, with what it was measured on and the settings of the run beside the cases."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from epigraf_fast.atomic import replacing

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results"
SCHEMA = 1

Result = dict[str, Any]


def result(kind: str, config: dict[str, Any], cases: list[Result], **more: Any) -> Result:
    """What a result file holds.

    Args:
        kind: "ops", "step", "counts" or "resources".
        config: The settings of the run.
        cases: Its measurements.
        more: What belongs to all cases, as the ceilings.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "config": config,
        **more,
        "cases": cases,
    }


def environment() -> Result:
    """GPU, driver, versions, commit and backends."""
    from epigraf_fast.tools import doctor  # and torch, which reading results needs not

    report = doctor.report()
    gpus = report["cuda"]["gpus"]
    return {
        "device": gpus[0]["name"] if gpus else "CPU",
        "gpu": gpus[0] if gpus else None,
        "cpu": {**report["cpu"], "name": _cpu_name(), "cores": os.cpu_count()},
        "versions": report["versions"],
        "commit": commit(),
        "defaults": report["defaults"],
    }


def commit() -> str | None:
    """The commit of this checkout, with + where files differ from it; None outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write(path: str | os.PathLike[str], content: Result) -> None:
    """Writes a result, whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def load(folder: Path = FOLDER) -> list[Result]:
    """The result files of a folder that have this schema, and the lists that `bench.resources` prints, by name.

    `file` is added to each.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list) and all("registers" in row for row in content):
            found.append({"kind": "resources", "cases": content, "file": path.name})
        elif isinstance(content, dict) and content.get("schema") == SCHEMA:
            found.append({**content, "file": path.name})
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
