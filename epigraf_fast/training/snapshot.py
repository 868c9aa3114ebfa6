"""What a run leaves to look at: sample grids, depth grids, a turntable, and the measured distance to the data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..atomic import replacing
from ..config import CameraConfig, Config
from ..data import ImageDataset
from ..errors import UserError
from ..models.generator import Generator
from ..models.renderer import Images
from ..progress import waiting
from .log import RunLog, depth_to_uint8, save_gif, save_png, tile, to_uint8, unused
from .metrics import FeatureDistance, ScriptFeatures
from .progress import progress
from .sampling import BATCH, fixed_latents, render_images, render_turntable, surface_depth

TURNTABLE_FRAMES = 36
TURNTABLE_SECONDS = 3.0
METRIC_SEED = 10_000  # other latents than those of the grids
SOLID = 0.5  # opacity of the pixels whose depth counts
FLAT = 0.05  # of the ray range


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
        batches = render_images(generator, *latents, config.resolution, noise_mode="random")
        for images in progress(batches, math.ceil(num / BATCH), "measuring: generated images"):
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
        self.distances: dict[str, FeatureDistance] = {}  # once needed
        self.reals_seen = False  # by them
        self.entries = self._read_entries()  # of metrics.json
        self.latents = fixed_latents(columns * rows, generator, dataset, config.camera, config.seed)

    def reals(self) -> Path:
        """A grid of real images."""
        columns, rows = self.config.grid
        index = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.config.seed))
        images = torch.stack([self.dataset[i][0] for i in index.repeat(columns * rows)[: columns * rows].tolist()])
        path = self.run_dir / "samples" / "reals.png"
        with self.log.sparing("samples/"):
            save_png(tile(images, columns), path)
        return path

    def grids(self, cur_nimg: int) -> tuple[Path, Path]:
        """Grids of images and of their depth."""
        camera, columns = self.config.camera, self.config.grid[0]
        batches = render_images(self.generator, *self.latents, self.config.resolution)
        batches = list(progress(batches, math.ceil(len(self.latents[0]) / BATCH), "drawing the samples"))
        rgb = tile(to_uint8(torch.cat([b.rgb for b in batches])), columns)
        depth = torch.cat([surface_depth(b, camera.ray_end) for b in batches])
        depth = tile(depth_to_uint8(depth, camera.ray_start, camera.ray_end), columns)
        paths = []
        for name, picture in (("images", rgb), ("depth", depth)):
            paths.append(self.run_dir / "samples" / f"{name}-{cur_nimg:09d}.png")
            with self.log.sparing("samples/"):
                save_png(picture, paths[-1])
            self.log.board.image(f"samples/{name}", picture, cur_nimg)
        if self.config.generator.backbone == "triplane":
            share = non_flat_share(batches, camera)
            self.log.board.scalar("geometry/non_flat", share, cur_nimg)
            if cur_nimg and share < 0.5:
                self.log.say(f"warning: {1 - share:.0%} of the shapes are flat; are the camera poses right?")
        return paths[0], paths[1]

    def turntable(self) -> Path:
        """A GIF of a few objects, once around."""
        latents = (x[: self.config.turntable] for x in self.latents[:2])
        frames = render_turntable(self.generator, *latents, TURNTABLE_FRAMES, self.config.resolution)
        frames = np.stack([tile(to_uint8(frame), frame.shape[0]) for frame in frames])  # [T, H, B*W, 3]
        path = self.run_dir / "turntable.gif"
        with self.log.sparing("turntable.gif"):
            save_gif(frames, path, TURNTABLE_FRAMES / TURNTABLE_SECONDS)
        return path

    def open_distances(self) -> None:
        """Builds what measures, unless it is there. Raises UserError where a package or a file is missing."""
        if self.distances:
            return
        device = self.latents[0].device
        with waiting("loading what measures"):
            distances = {"fd_efficientnet": FeatureDistance(device)}
            if self.config.inception is not None:
                distances["fid"] = FeatureDistance(device, ScriptFeatures(Path(self.config.inception), device))
        self.distances, self.reals_seen = distances, False

    def measure(self, cur_nimg: int) -> dict[str, float]:
        """Distances of `metric_images` generated to as many real images; added to metrics.json.

        They are fd_efficientnet, and fid where Inception's weights are given.
        """
        num = self.config.metric_images
        self.open_distances()
        if not self.reals_seen:
            batches = real_images(self.dataset, num)
            for images in progress(batches, math.ceil(min(num, len(self.dataset)) / BATCH), "measuring: real images"):
                for distance in self.distances.values():
                    distance.update_real(images)
            self.reals_seen = True
        for distance in self.distances.values():
            distance.reset_fake()

        def use(images: Tensor) -> None:
            for distance in self.distances.values():
                distance.update_fake(images)

        measure_fakes(self.generator, self.dataset, self.config, num, use)
        with waiting("measuring: distances"):
            values = {name: distance.compute() for name, distance in self.distances.items()}
        self.entries = [entry for entry in self.entries if entry["cur_nimg"] < cur_nimg]
        self.entries.append({"cur_nimg": cur_nimg, **values, "images": num})
        with self.log.sparing("metrics.json"), replacing(self.run_dir / "metrics.json") as temporary:
            temporary.write_text(json.dumps(self.entries, indent=2) + "\n")
        return values

    def _read_entries(self) -> list[dict[str, float]]:
        """The entries of metrics.json; a damaged one is put aside."""
        path = self.run_dir / "metrics.json"
        try:
            return read_metrics(self.run_dir)
        except UserError:
            aside = unused(path.with_name("metrics-damaged.json"))
            with self.log.sparing("the copy of metrics.json"):
                path.rename(aside)
                self.log.say(f"warning: {path} is damaged, and is now {aside}")
            return []


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The entries of metrics.json, oldest first. Raises UserError where it is damaged."""
    path = run_dir / "metrics.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_bytes())
        good = all(
            isinstance(entry["cur_nimg"], int) and {*map(type, entry.values())} <= {int, float} for entry in entries
        )
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        good = False
    if not (good and isinstance(entries, list)):
        raise UserError(f"{path} is damaged: train.py --resume starts another one, or move the file away")
    return entries


def is_best(entries: Sequence[dict[str, float]]) -> bool:
    """Whether the last measurement is the best so far, by FID if it was measured, else by fd_efficientnet."""
    name = "fid" if "fid" in entries[-1] else "fd_efficientnet"
    return entries[-1][name] <= min(entry[name] for entry in entries if name in entry)


def non_flat_share(batches: Sequence[Images], camera: CameraConfig) -> float:
    """The share of images whose depth is not flat: flat geometry is the commonest failure of a 3D GAN.

    An image is flat if the middle 90% of the depths of its solid pixels span less than 5% of ray_start to ray_end, or
    if it has no solid pixel.
    """
    flat = []
    for images in batches:
        for depth, opacity in zip(surface_depth(images, camera.ray_end), images.weight_sum, strict=True):
            solid = depth[opacity > SOLID].float()
            ends = torch.tensor([0.05, 0.95], device=solid.device)
            span = float(solid.quantile(ends).diff()) if len(solid) else 0.0
            flat.append(span < FLAT * (camera.ray_end - camera.ray_start))
    return 1 - sum(flat) / len(flat)
