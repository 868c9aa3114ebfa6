"""The record of a run: progress bar, stats.jsonl, TensorBoard, and the pictures."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..errors import UserError


class RunLog:
    """Writes what a run measures.

    `stats.jsonl` has one object per line: cur_nimg, kimg, seconds (over all sessions), sec_per_kimg, img_per_sec, and
    every statistic. A resumed run drops the lines beyond its checkpoint, so that no image counts twice.

    Args:
        run_dir: Where.
        kimg: Length of the run.
        cur_nimg: Where it starts.
    """

    def __init__(self, run_dir: Path, kimg: float, cur_nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path = run_dir / "stats.jsonl"
        kept = [line for line in read_stats(self.path) if line["cur_nimg"] <= cur_nimg]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.started = self.last_time = time.perf_counter()
        self.idle = 0.0  # seconds since the last line that were not training
        self.last_nimg = cur_nimg
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=cur_nimg + 1)
        self.bar = tqdm(
            total=round(kimg, 3),
            initial=round(cur_nimg / 1000, 3),
            unit="kimg",
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} kimg [{elapsed}<{remaining}]{postfix}",
        )

    def advance(self, cur_nimg: int) -> None:
        """Moves the bar."""
        self.bar.update(cur_nimg / 1000 - self.bar.n)

    def write(self, cur_nimg: int, statistics: dict[str, float]) -> None:
        """Writes one line of statistics everywhere."""
        now = time.perf_counter()
        images, seconds = cur_nimg - self.last_nimg, now - self.last_time - self.idle
        self.last_nimg, self.last_time, self.idle = cur_nimg, now, 0.0
        speed = {"sec_per_kimg": seconds / images * 1000, "img_per_sec": images / seconds} if images else {}
        line = {
            "cur_nimg": cur_nimg,
            "kimg": cur_nimg / 1000,
            "seconds": round(self.seconds_before + now - self.started, 3),
            **speed,
            **statistics,
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in (speed | statistics).items():
            self.board.add_scalar(name, value, cur_nimg)
        shown = {name.removeprefix("loss/"): f"{value:.3f}" for name, value in statistics.items() if "loss/" in name}
        if images:
            shown = {"s/kimg": f"{speed['sec_per_kimg']:.1f}", "img/s": f"{speed['img_per_sec']:.1f}"} | shown
        self.bar.set_postfix(shown, refresh=False)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """For work that is not training (pictures, checkpoints, metrics): speeds leave it out."""
        begun = time.perf_counter()
        yield
        self.idle += time.perf_counter() - begun

    def image(self, name: str, picture: np.ndarray, cur_nimg: int) -> None:
        """Adds a uint8 [H, W, 3] picture to TensorBoard."""
        self.board.add_image(name, picture, cur_nimg, dataformats="HWC")

    def scalar(self, name: str, value: float, cur_nimg: int) -> None:
        """Adds a number to TensorBoard alone."""
        self.board.add_scalar(name, value, cur_nimg)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        self.board.close()


def read_stats(path: Path) -> list[dict[str, Any]]:
    """The lines of a stats.jsonl; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            out.append(json.loads(line))
        except ValueError:
            if number != len(lines):
                raise UserError(f"{path}: line {number} is not JSON; move the file away to go on") from None
    return out


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    PIL.Image.fromarray(picture).save(temporary, format="PNG")
    temporary.replace(path)


def save_gif(frames: np.ndarray, path: Path, frames_per_second: float) -> None:
    """Writes uint8 frames [T, H, W, 3] as an endless GIF."""
    import imageio.v3

    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.v3.imwrite(path, frames, duration=1000 / frames_per_second, loop=0)
