"""What a file or folder is that was given as a checkpoint, but is none."""

from __future__ import annotations

import itertools
import json
import zipfile
from pathlib import Path

from ..data import IMAGE_SUFFIXES

DATA = "a data set: train.py --data and epigraf data check take it"
SNAPSHOT = "a pickle, as published snapshots are: make a checkpoint of it with epigraf convert"
TORCH_WITHOUT_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # how files of torch.save once began
PIECES = {
    "config.json": "the settings of a run: give the folder that it lies in",
    "stats.jsonl": "the log of a run: give the folder that it lies in",
    "metrics.json": "the measurements of a run: give the folder that it lies in",
    "dataset.json": "the description of a data set: train.py --data and epigraf data check take its folder or zip",
}
OTHERS = {
    "an image": IMAGE_SUFFIXES,
    "a video": (".mp4", ".gif", ".webm"),
    "a mesh or volume": (".ply", ".obj", ".glb", ".stl", ".mrc"),
}


def what_else(path: Path) -> str | None:
    """What `path` is and which command takes it; None for what may be a checkpoint, is not known or is not there.

    A safetensors file is such a thing too, where only a whole checkpoint will do.
    """
    try:
        return _folder(path) if path.is_dir() else _file(path) if path.is_file() else None
    except Exception:  # a damaged file makes zipfile trip in every possible way
        return None


def _folder(path: Path) -> str | None:
    names = sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith(".pkl")]
    if any(path.glob("checkpoint-*.pt")) or any(path.glob("checkpoints/*.pt")):
        return None
    if "G_ema.safetensors" in names:
        return "the folder of a generator alone (G_ema.safetensors)"
    if "stats.jsonl" in names or "config.json" in names:
        return "the folder of a run that has saved no checkpoint yet"
    if pickles:
        return f"a folder of pickles, as published snapshots are: epigraf convert takes {pickles[-1]}"
    files = itertools.chain(path.glob("*"), path.glob("*/*"))
    if "dataset.json" in names or any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return DATA
    return None


def _file(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if path.name in PIECES:
        return PIECES[path.name]
    if suffix == ".safetensors":
        return "a generator alone (safetensors), which render, mesh, viewer and metrics take"
    for what, suffixes in OTHERS.items():
        if suffix in suffixes:
            return what
    with path.open("rb") as file:
        first = file.read(len(TORCH_WITHOUT_ZIP))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "a network in TorchScript, as metrics --inception takes"
        if any(name.lower().endswith((*IMAGE_SUFFIXES, "dataset.json")) for name in names):
            return DATA
    elif first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05" and first != TORCH_WITHOUT_ZIP:
        return SNAPSHOT  # by a pickle's first two bytes
    elif first[:1] in (b"{", b"["):
        return _json(path)
    return None


def _json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    fields = set(content) if isinstance(content, dict) else set()
    if fields & {"camera_angles", "labels", "frames"}:
        return PIECES["dataset.json"]
    return PIECES["config.json"] if {"run_dir", "generator"} <= fields else "a JSON file"
