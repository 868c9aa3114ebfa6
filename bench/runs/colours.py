"""Whether a run's colours follow z, over time: `python -m bench.runs.colours RUN [RUN ...] --json FILE --plot FILE`.

A generator whose colours do not follow z paints all objects in one colour, which swings during training; its average
over time is grey. So each checkpoint of a run (keep them all: `--keep-checkpoints 1000 --checkpoint-kimg 0.5`) is asked
for the same objects, of G itself and of its average, and their colours are compared with those of the data:

- saturation: largest minus smallest channel of a pixel, mean over an object, then over objects;
- spread: standard deviation of the objects' mean colours, mean over the channels;
- colour: the mean of the objects' mean colours [3], which is steady where colours follow z;
- unevenness: how far an object is from one hue, the standard deviation of its colours without their brightness;
- crumbs (the newest checkpoint's average): share of opacity outside of the largest connected piece of an object, in the
  ball that every view shows whole.

Colours are those of pixels that are not white, in [-1, 1].
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epigraf_fast.config import Config, to_dict
from epigraf_fast.data import ImageDataset
from epigraf_fast.models.generator import Generator
from epigraf_fast.training.checkpoint import list_checkpoints, load_checkpoint
from epigraf_fast.training.networks import build_generator
from epigraf_fast.training.sampling import fixed_latents, render_images

from .. import results

SEED = 1  # other objects than those of the grids
WHITE = 0.9  # a pixel whose channels all exceed this is background
SIZE = 32  # pixels along each side of the images whose colours are measured
CELLS = 48  # of the grid that crumbs are looked for in, along each side
SOLID = 0.5  # opacity of a cell that belongs to a piece


def object_colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colour and mean saturation of every image that is not all white.

    Args:
        images: [N, 3, R, R] in [-1, 1]; what is outside is clamped, as a picture is.

    Returns:
        [M, 3], [M], M the number of images with an object.
    """
    pixels = images.clamp(-1, 1).flatten(2)
    solid = (pixels < WHITE).any(dim=1).float()  # [N, R*R]
    count = solid.sum(dim=1)
    seen = count > 0
    weight = (solid / count.clamp(min=1)[:, None])[seen]
    colour = (pixels[seen] * weight[:, None]).sum(dim=2)
    saturation = ((pixels.amax(dim=1) - pixels.amin(dim=1))[seen] * weight).sum(dim=1)
    return colour, saturation


def unevenness(images: Tensor) -> Tensor:
    """Standard deviation over an object of its colours, each minus the mean of its channels: root of the sum over them.

    Of pixels with none of the background beside them, which soft outlines mix in.

    Args:
        images: [N, 3, R, R] in [-1, 1]; what is outside is clamped.

    Returns:
        [M], M the number of images with such pixels.
    """
    pixels = images.clamp(-1, 1)
    empty = (pixels >= WHITE).all(dim=1, keepdim=True).float()
    inner = 1 - torch.nn.functional.max_pool2d(empty, 3, 1, 1)
    count = inner.sum(dim=(2, 3), keepdim=True)
    chroma = pixels - pixels.mean(dim=1, keepdim=True)
    away = chroma - (chroma * inner).sum(dim=(2, 3), keepdim=True) / count.clamp(min=1)
    variance = (away.square() * inner).sum(dim=(1, 2, 3)) / count.flatten().clamp(min=1)
    return variance[count.flatten() > 0].sqrt()


def colour_statistics(images: Tensor) -> dict[str, Any]:
    """What the module says of images [N, 3, R, R] in [-1, 1]; `objects` counts those that are not all white."""
    (colour, saturation), uneven = object_colours(images), unevenness(images)
    if len(colour) < 2:
        nothing = {"saturation": 0.0, "spread": 0.0, "unevenness": 0.0, "colour": [1.0, 1.0, 1.0]}
        return {"objects": len(colour), **nothing}
    return {
        "objects": len(colour),
        "saturation": float(saturation.mean()),
        "spread": float(colour.std(dim=0).mean()),
        "unevenness": float(uneven.mean()) if len(uneven) else 0.0,
        "colour": colour.mean(dim=0).tolist(),
    }


def outside_of_the_largest(opacity: np.ndarray) -> float:
    """Share of the opacity of solid cells that is not in the largest connected piece (26 neighbours) of them.

    Args:
        opacity: [D, H, W] in [0, 1].
    """
    from scipy.ndimage import label

    pieces, count = label(opacity > SOLID, structure=np.ones((3, 3, 3)))
    if count < 2:
        return 0.0
    sums = np.bincount(pieces.ravel(), weights=opacity.ravel())[1:]
    return float(1 - sums.max() / sums.sum())


@torch.no_grad()
def opacities(generator: Generator, z: Tensor, label: Tensor) -> Iterable[np.ndarray]:
    """Opacity of cells [CELLS, CELLS, CELLS] around the origin, to a ray that crosses one along an axis.

    They fill the ball that all views show whole; outside of it a cell has none, as what lies there is in the corners of
    some views only, or in none.
    """
    camera, settings = generator.camera, generator.renderer.config
    shown = min(camera.radius * math.sin(math.radians(camera.fov / 2)), camera.cube_scale)
    side = 2 * shown / CELLS
    line = (torch.arange(CELLS, device=z.device) + 0.5) * side - shown
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1).view(1, -1, 3)
    inside = points[0].norm(dim=1) <= shown
    for i in range(len(z)):
        planes = generator.synthesis(generator.ws(z[i : i + 1], label[i : i + 1]), noise_mode="const")
        raw = generator.decoder.at_points(planes, points, camera.cube_scale)[0, :, -1] + settings.density_shift
        if settings.density_activation == "softplus":
            density = torch.nn.functional.softplus(raw, beta=settings.softplus_beta)
        else:
            density = raw.relu()
        yield ((1 - torch.exp(-side * density)) * inside).view(CELLS, CELLS, CELLS).cpu().numpy()


def crumbs(generator: Generator, z: Tensor, label: Tensor) -> float:
    """`outside_of_the_largest`, mean over objects."""
    return float(np.mean([outside_of_the_largest(opacity) for opacity in opacities(generator, z, label)]))


def newest_checkpoint(run: Path) -> Path:
    """Raises SystemExit where a folder has none."""
    paths = list_checkpoints(run)
    if not paths:
        raise SystemExit(f"error: {run} has no checkpoints: name a run's folder")
    return paths[-1]


def generator_of(config: Config, trainer: dict[str, Any], name: str, label_dim: int) -> Generator:
    """ "generator" or "average" of a checkpoint's trainer, on the CPU, in evaluation mode."""
    generator = build_generator(config, label_dim, "cpu")
    generator.load_state_dict(trainer[name])
    return generator.eval().requires_grad_(False)


def statistics_of(generator: Generator, dataset: ImageDataset, config: Config, num: int) -> dict[str, Any]:
    """Colour statistics of `num` objects, one view each, always the same ones."""
    latents = fixed_latents(num, generator, dataset, config.camera, SEED)
    size = min(SIZE, config.resolution)
    return colour_statistics(torch.cat([images.rgb for images in render_images(generator, *latents, size)]))


def measure(run: Path, num: int) -> dict[str, Any]:
    """A run's course: settings, what its checkpoints gave, and the newest one's crumbs."""
    paths, course = list_checkpoints(run), []
    for path in paths:
        config, state = load_checkpoint(path)
        if not course:
            dataset = ImageDataset(config.data, config.resolution, use_labels=config.loader.labels)
        networks = {name: generator_of(config, state["trainer"], name, dataset.label_dim) for name in NETWORKS}
        of = {NETWORKS[name]: statistics_of(network, dataset, config, num) for name, network in networks.items()}
        course.append({"cur_nimg": state["trainer"]["cur_nimg"], **of})
        print(run, *_line(course[-1]), flush=True)
    average = networks["average"]
    latents = fixed_latents(num, average, dataset, config.camera, SEED)
    return {"run": run.name, "config": to_dict(config), "course": course, "crumbs": crumbs(average, *latents[:2])}


NETWORKS = {"generator": "G", "average": "average"}


def _line(row: dict[str, Any]) -> Iterable[str]:
    yield f"{row['cur_nimg'] / 1000:.1f} kimg"
    for name in ("G", "average"):
        colour = " ".join(f"{x:+.2f}" for x in row[name]["colour"])
        saturation, spread, uneven = (row[name][what] for what in ("saturation", "spread", "unevenness"))
        yield f"{name}: saturation {saturation:.2f} spread {spread:.2f} unevenness {uneven:.2f} colour {colour}"


def data_statistics(dataset: ImageDataset, num: int) -> dict[str, Any]:
    """Colour statistics of `num` random entries of a set."""
    index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED))[:num]
    return colour_statistics(torch.stack([dataset[i][0] for i in index.tolist()]).float() / 127.5 - 1)


def plot(data: dict[str, Any], runs: list[dict[str, Any]], path: Path) -> None:
    """Mean colour of G's objects over images, and their spread beside the data's; a column for each run."""
    from epigraf_fast.tools.plotting import new_figure, save

    shape = (3, len(runs))
    picture = new_figure(4 * len(runs), 7)
    axes = picture.subplots(*shape, sharex="col", sharey="row", squeeze=False)
    for column, run in zip(axes.T, runs, strict=True):
        kimg = [row["cur_nimg"] / 1000 for row in run["course"]]
        for channel, name in enumerate(("red", "green", "blue")):
            column[0].plot(kimg, [row["G"]["colour"][channel] for row in run["course"]], color=name)
            column[0].axhline(data["colour"][channel], color=name, linestyle=":")
        for row, what in ((1, "spread"), (2, "saturation")):
            for network, style in (("G", "-"), ("average", "--")):
                column[row].plot(kimg, [x[network][what] for x in run["course"]], style, color="black", label=network)
            column[row].axhline(data[what], color="grey", linestyle=":", label="data")
        column[0].set_title(run["run"])
        column[2].set_xlabel("thousands of images")
    for row, what in enumerate(("mean colour of G", "spread of colours", "saturation")):
        axes[row, 0].set_ylabel(what)
    axes[1, 0].legend()
    save(picture, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.colours", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--objects", type=int, default=64)
    parser.add_argument("--json", default=None)
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args(argv)
    newest = [newest_checkpoint(run) for run in args.runs]
    config, _ = load_checkpoint(newest[0])
    dataset = ImageDataset(config.data, config.resolution, use_labels=config.loader.labels)
    data = data_statistics(dataset, 8 * args.objects)
    print("data: " + " ".join(f"{what} {data[what]:.2f}" for what in ("saturation", "spread", "unevenness")))
    runs = [measure(run, args.objects) for run in args.runs]
    for run in runs:
        print(f"{run['run']}: crumbs {run['crumbs']:.4f}")
    if args.json:
        results.write(args.json, results.result("colours", {"objects": args.objects}, runs, data=data))
    if args.plot:
        plot(data, runs, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
