"""What a run leaves to look at: sample grids, depth grids, a turntable, and the measured distance to the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..data import ImageDataset
from ..models.generator import Generator
from .log import RunLog, depth_to_uint8, save_gif, save_png, tile, to_uint8
from .metrics import FeatureDistance
from .sampling import BATCH, fixed_latents, render_images, render_turntable, surface_depth

TURNTABLE_FRAMES = 36
TURNTABLE_SECONDS = 3.0
METRIC_SEED = 10_000  # other latents than those of the grids


def real_images(dataset: ImageDataset, num: int) -> Iterator[Tensor]:
    """Batches of uint8 images [B, 3, R, R], `num` random entries of the set, always the same ones."""
    index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(METRIC_SEED))[:num]
    for part in index.split(BATCH):
        yield torch.stack([dataset[i][0] for i in part.tolist()])


def measure_fakes(
    generator: Generator, dataset: ImageDataset, config: Config, num: int, use: Callable[[Tensor], None]
) -> None:
    """Hands `num` generated images to `use`, in batches of uint8 [B, 3, R, R], always of the same latents and noise."""
    latents = fixed_latents(num, generator, dataset, config.camera, METRIC_SEED)
    with torch.random.fork_rng():  # the noise images must not move the run's random state
        torch.manual_seed(METRIC_SEED)
        for images in render_images(generator, *latents, config.resolution, noise_mode="random"):
            use(to_uint8(images.rgb))


class Snapshots:
    """Writes pictures and measurements of one run, always of the same latent codes and cameras.

    Args:
        config, dataset: Of the run.
        generator: The average generator.
        log: The run's.
    """

    def __init__(self, config: Config, dataset: ImageDataset, generator: Generator, log: RunLog) -> None:
        self.config, self.dataset, self.generator, self.log = config, dataset, generator, log
        self.run_dir = Path(config.run_dir)
        columns, rows = config.grid
        self.distance: FeatureDistance | None = None  # once needed, with the real images seen
        self.latents = fixed_latents(columns * rows, generator, dataset, config.camera, config.seed)

    def reals(self) -> Path:
        """A grid of real images."""
        columns, rows = self.config.grid
        index = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.config.seed))
        images = torch.stack([self.dataset[i][0] for i in index.repeat(columns * rows)[: columns * rows].tolist()])
        path = self.run_dir / "samples" / "reals.png"
        save_png(tile(images, columns), path)
        return path

    def grids(self, cur_nimg: int) -> tuple[Path, Path]:
        """Grids of images and of their depth."""
        camera, columns = self.config.camera, self.config.grid[0]
        batches = list(render_images(self.generator, *self.latents, self.config.resolution))
        rgb = tile(to_uint8(torch.cat([b.rgb for b in batches])), columns)
        depth = torch.cat([surface_depth(b, camera.ray_end) for b in batches])
        depth = tile(depth_to_uint8(depth, camera.ray_start, camera.ray_end), columns)
        paths = []
        for name, picture in (("images", rgb), ("depth", depth)):
            paths.append(self.run_dir / "samples" / f"{name}-{cur_nimg:09d}.png")
            save_png(picture, paths[-1])
            self.log.image(f"samples/{name}", picture, cur_nimg)
        return paths[0], paths[1]

    def turntable(self) -> Path:
        """A GIF of a few objects, once around."""
        latents = (x[: self.config.turntable] for x in self.latents[:2])
        frames = render_turntable(self.generator, *latents, TURNTABLE_FRAMES, self.config.resolution)
        frames = np.stack([tile(to_uint8(frame), frame.shape[0]) for frame in frames])  # [T, H, B*W, 3]
        path = self.run_dir / "turntable.gif"
        save_gif(frames, path, TURNTABLE_FRAMES / TURNTABLE_SECONDS)
        return path

    def measure(self, cur_nimg: int) -> float:
        """fd_efficientnet of `metric_images` generated against as many real images; added to metrics.json."""
        num = self.config.metric_images
        if self.distance is None:
            self.distance = FeatureDistance(self.latents[0].device)
            for images in real_images(self.dataset, num):
                self.distance.update_real(images)
        self.distance.reset_fake()
        measure_fakes(self.generator, self.dataset, self.config, num, self.distance.update_fake)
        value = self.distance.compute()
        path = self.run_dir / "metrics.json"
        entries = json.loads(path.read_text()) if path.is_file() else []
        entries = [entry for entry in entries if entry["cur_nimg"] < cur_nimg]
        entries.append({"cur_nimg": cur_nimg, "fd_efficientnet": value, "images": num})
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(entries, indent=2) + "\n")
        temporary.replace(path)
        return value
