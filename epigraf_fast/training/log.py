"""The record of a run: progress bar, stats.jsonl, TensorBoard, and the pictures."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..atomic import replacing
from ..errors import UserError
from ..progress import Sparing
from .board import Board
from .files import append
from .progress import say


class RunLog:
    """Writes what a run measures.

    `stats.jsonl` has one object per line: cur_nimg, kimg, seconds (over all sessions), sec_per_kimg, img_per_sec, and
    every statistic. A resumed run drops the lines beyond its checkpoint, so that no image counts twice, and damaged
    ones, with a word. What cannot be written, as on a full disk, is said once, and lines and events are kept for
    later.

    Args:
        run_dir: Where.
        kimg: Length of the run.
        cur_nimg: Where it starts.
    """

    def __init__(self, run_dir: Path, kimg: float, cur_nimg: int) -> None:
        from tqdm import tqdm

        self.path = run_dir / "stats.jsonl"
        self.failing: set[str] = set()  # what cannot be written at present
        self.bar = tqdm(
            total=round(kimg, 3),
            initial=round(cur_nimg / 1000, 3),
            unit="kimg",
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} kimg [{elapsed}<{remaining}]{postfix}",
            file=Sparing(sys.stderr),
        )
        self.board = Board(run_dir / "tensorboard", cur_nimg + 1)
        self.pending = b""  # lines that are not written yet
        self.restart: bytes | None = None  # what the file has to begin with, if it must be written anew
        self.seconds_before = self._cut_back(cur_nimg)
        self.started = self.last_time = time.perf_counter()
        self.idle = 0.0  # seconds since the last line that were not training
        self.last_nimg = cur_nimg

    def _cut_back(self, cur_nimg: int) -> float:
        """Drops the lines beyond an image count, and damaged ones; returns the seconds of the last that stays."""
        lines, damaged, cut_off = _read(self.path)
        if damaged:
            aside = unused(self.path.with_name("stats-damaged.jsonl"))
            with self.sparing("the copy of stats.jsonl"):
                self.path.rename(aside)
                self.say(f"warning: {self.path}: line {damaged[0]} is damaged; {len(damaged)} such, kept in {aside}")
        elif cut_off:
            self.say(f"{self.path}: the last line was cut off and is left out")
        kept = [line for line in lines if line["cur_nimg"] <= cur_nimg]
        self.restart = b"".join(json.dumps(line).encode() + b"\n" for line in kept)
        self.flush()
        return kept[-1].get("seconds", 0.0) if kept else 0.0

    def advance(self, cur_nimg: int) -> None:
        """Moves the bar."""
        self.bar.update(cur_nimg / 1000 - self.bar.n)

    def since(self, cur_nimg: int) -> tuple[int, float]:
        """Images since the last line, and the seconds of training that they took."""
        return cur_nimg - self.last_nimg, time.perf_counter() - self.last_time - self.idle

    def write(self, cur_nimg: int, statistics: dict[str, float]) -> None:
        """Writes one line of statistics everywhere."""
        now = time.perf_counter()
        images, seconds = self.since(cur_nimg)
        self.last_nimg, self.last_time, self.idle = cur_nimg, now, 0.0
        speed = {"sec_per_kimg": seconds / images * 1000, "img_per_sec": images / seconds} if images else {}
        line = {
            "cur_nimg": cur_nimg,
            "kimg": cur_nimg / 1000,
            "seconds": round(self.seconds_before + now - self.started, 3),
            **speed,
            **statistics,
        }
        self.pending += json.dumps(line).encode() + b"\n"
        for name, value in (speed | statistics).items():
            self.board.scalar(name, value, cur_nimg)
        self.flush()
        shown = {name.removeprefix("loss/"): f"{value:.3f}" for name, value in statistics.items() if "loss/" in name}
        if images:
            shown = {"s/kimg": f"{speed['sec_per_kimg']:.1f}", "img/s": f"{speed['img_per_sec']:.1f}"} | shown
        self.bar.set_postfix(shown, refresh=False)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """For work that is not training (pictures, checkpoints, metrics): speeds leave it out."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.idle += time.perf_counter() - begun

    @contextlib.contextmanager
    def sparing(self, what: str) -> Iterator[None]:
        """A block that writes something without which a run goes on; that it cannot is said, once until it can."""
        try:
            yield
        except OSError as error:
            if what not in self.failing:
                self.say(f"warning: {what} cannot be written ({error.strerror or error}): make room; training goes on")
            self.failing.add(what)
        else:
            self.failing.discard(what)

    def flush(self) -> None:
        """Brings to the disk what can be."""
        with self.sparing("stats.jsonl"):
            if self.restart is not None:
                with replacing(self.path) as temporary:
                    temporary.write_bytes(self.restart + self.pending)
            elif self.pending:
                append(self.path, self.pending)
            self.restart, self.pending = None, b""
        with self.sparing("tensorboard/"):
            self.board.flush()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        with self.bar.external_write_mode(self.bar.fp):  # `write` clears bars of sys.stderr alone
            say(text)

    def close(self) -> None:
        self.flush()
        self.bar.close()


def flush_output() -> None:
    """Writes out what was printed; what cannot be is given up, rather than reported by Python when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def read_stats(path: Path) -> list[dict[str, Any]]:
    """The lines of a stats.jsonl; a last line that was cut off by a kill is left out.

    Raises:
        UserError: Another line is damaged.
    """
    lines, damaged, _ = _read(path)
    if damaged:
        raise UserError(f"{path}: line {damaged[0]} is damaged; train.py --resume mends it, or move the file away")
    return lines


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int], bool]:
    """The good lines of a stats.jsonl, the numbers of the damaged ones, and whether the last line was cut off."""
    lines, damaged, cut_off = [], [], False
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # the former also where it is not UTF-8
            value = None
        if isinstance(value, dict) and _is_number(value.get("cur_nimg")) and _is_number(value.get("seconds", 0)):
            lines.append(value)
        elif line.endswith(b"\n"):
            damaged.append(number)
        else:
            cut_off = True
    return lines, damaged, cut_off


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def unused(path: Path) -> Path:
    """This path, or one with a number, where nothing is yet."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, any shape: (x + 1) 127.5, rounded and clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def depth_to_uint8(depth: Tensor, ray_start: float, ray_end: float) -> Tensor:
    """Depths in world units to a grey picture, near white and far black. [B, 1, H, W] -> uint8 [B, 3, H, W]."""
    nearness = (ray_end - depth.float()) / (ray_end - ray_start)
    return (nearness.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def tile(images: Tensor, columns: int) -> np.ndarray:
    """uint8 [B, 3, H, W] (B a multiple of columns) to one picture [rows H, columns W, 3]."""
    batch, channels, height, width = images.shape
    rows = batch // columns
    grid = images.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, channels).cpu().numpy()


def save_png(picture: np.ndarray, path: Path) -> None:
    """Writes a uint8 [H, W, 3] picture, whole or not at all."""
    with replacing(path) as temporary:
        PIL.Image.fromarray(picture).save(temporary, format="PNG")


def save_gif(frames: np.ndarray, path: Path, frames_per_second: float) -> None:
    """Writes uint8 frames [T, H, W, 3] as an endless GIF, whole or not at all."""
    import imageio.v3

    with replacing(path) as temporary:
        imageio.v3.imwrite(temporary, frames, extension=".gif", duration=1000 / frames_per_second, loop=0)
