"""What a distance to the data means: `python -m bench.runs.distances [RUN ...] --json FILE`.

Two halves of the built-in images are compared by `fd_efficientnet`: as they are, which is the least that a generator
can reach by so many images, and with one of them spoiled, each as a generator may fail. With runs, also what their
distances are made of: pictures and data are compared once both are reduced to a part of what they show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from epigraf_fast.data import ImageDataset
from epigraf_fast.training.checkpoint import load_checkpoint
from epigraf_fast.training.metrics import FeatureDistance
from epigraf_fast.training.progress import progress
from epigraf_fast.training.snapshot import measure_fakes

from .. import results
from .colours import WHITE, generator_of, newest_checkpoint

BATCH = 50
OTHERS = "the other half"  # what pictures are named beside
SOLID = 127.5 * (1 + WHITE)  # a pixel whose channels all exceed this is background


def blurred(side: int) -> Callable[[Tensor], Tensor]:
    """As if it had been painted with so many pixels along each side."""

    def change(x: Tensor) -> Tensor:
        small = F.interpolate(x, size=side, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)

    return change


def saturated(factor: float) -> Callable[[Tensor], Tensor]:
    """With so much of its colours."""
    return lambda x: x.mean(dim=1, keepdim=True).lerp(x, factor)


def noisy(sigma: float) -> Callable[[Tensor], Tensor]:
    """With normal noise of so many of 255 steps."""
    generator = torch.Generator().manual_seed(0)
    return lambda x: x + sigma * torch.randn(x.shape, generator=generator)


def rounded(side: int) -> Callable[[Tensor], Tensor]:
    """Each pixel the median of so many by so many: corners, and parts narrower than half of that, are lost."""

    def change(x: Tensor) -> Tensor:
        padded = F.pad(x, (side // 2,) * 4, mode="replicate")
        return padded.unfold(2, side, 1).unfold(3, side, 1).flatten(4).median(dim=4).values

    return change


def solid(x: Tensor) -> Tensor:
    """1 where an image shows its object, else 0: [B, 1, R, R]."""
    return (x < SOLID).any(dim=1, keepdim=True).float()


def iridescent(sigma: float) -> Callable[[Tensor], Tensor]:
    """Objects of several hues: smooth noise of so many of 255 steps, and no brightness."""
    generator = torch.Generator().manual_seed(0)

    def change(x: Tensor) -> Tensor:
        noise = sigma * torch.randn(len(x), 3, 4, 4, generator=generator)
        noise = noise - noise.mean(dim=1, keepdim=True)
        smooth = F.interpolate(noise, size=x.shape[2:], mode="bicubic", align_corners=True)
        return torch.where(solid(x) > 0, (x + smooth).clamp(max=SOLID - 1), x)

    return change


def flat(x: Tensor) -> Tensor:
    """Each object in its mean colour, without light and shadow."""
    object_ = solid(x)
    mean = (x * object_).sum(dim=(2, 3), keepdim=True) / object_.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return torch.where(object_ > 0, mean, 255.0)


def silhouette(x: Tensor) -> Tensor:
    """Grey objects on white."""
    return 255 - 191 * solid(x).expand_as(x)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "blurred to 48 pixels": blurred(48),
    "blurred to 36 pixels": blurred(36),
    "blurred to 28 pixels": blurred(28),
    "0.8 of the saturation": saturated(0.8),
    "grey": saturated(0.0),
    "noise of 4/255": noisy(4.0),
    "corners rounded": rounded(5),
    "hues that vary by 25/255": iridescent(25.0),
    "without light and shadow": flat,
}
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x,
    "blurred to 32 pixels": blurred(32),
    "grey": saturated(0.0),
    "without light and shadow": flat,
    "silhouettes": silhouette,
}


def halves(dataset: ImageDataset, images: int) -> tuple[Tensor, Tensor]:
    """Twice so many different images [images, 3, R, R] uint8, drawn by seed 0."""
    if not 2 <= images <= len(dataset) // 2:
        raise SystemExit(f"--images must be 2 to {len(dataset) // 2}, half of the data, got {images}")
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: 2 * images]
    return torch.stack([dataset[i][0] for i in chosen.tolist()]).chunk(2)


def as_images(x: Tensor) -> Tensor:
    """Values 0 to 255 in uint8."""
    return x.round().clamp(0, 255).byte()


def pictures(run: Path, num: int) -> Tensor:
    """What the average generator of a run's newest checkpoint paints: [num, 3, R, R] uint8."""
    config, state = load_checkpoint(newest_checkpoint(run))
    if config.data != "builtin":
        raise SystemExit(f"error: {run} was trained on {config.data}: name runs on the built-in data")
    dataset, parts = ImageDataset(config.data, config.resolution, use_labels=config.loader.labels), []
    generator = generator_of(config, state["trainer"], "average", dataset.label_dim)
    measure_fakes(generator, dataset, config, num, parts.append)
    return torch.cat(parts)


def parts_of(first: Tensor, others: dict[str, Tensor]) -> list[results.Result]:
    """Distances of other images to the first ones, each by every one of `PARTS` of both."""
    rows = []
    for part, reduce in progress(PARTS.items(), len(PARTS), "parts"):
        distance = FeatureDistance()
        for images in first.split(BATCH):
            distance.update_real(as_images(reduce(images.float())))
        rows.append({"part": part})
        for name, other in others.items():
            distance.reset_fake()
            for images in other.split(BATCH):
                distance.update_fake(as_images(reduce(images.float())))
            rows[-1][name] = distance.compute()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.distances", description=__doc__.split(":")[0] + ".")
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs on the built-in data")
    parser.add_argument("--images", type=int, default=1000, help="of each half (default: %(default)s)")
    parser.add_argument("--json", default=None, help="write the results there")
    args = parser.parse_args(argv)
    names = [run.name for run in args.runs]
    if len({"part", OTHERS, *names}) < len(names) + 2:
        raise SystemExit(f"error: runs must have different names, got {', '.join(names)}: rename or link one's folder")
    first, second = halves(ImageDataset("builtin"), args.images)
    painted = {run.name: pictures(run, args.images) for run in args.runs}
    distance, rows = FeatureDistance(), []
    for part in first.split(BATCH):
        distance.update_real(part)
    for name, change in progress(CHANGES.items(), len(CHANGES), "distances"):
        distance.reset_fake()
        for part in second.split(BATCH):
            distance.update_fake(as_images(change(part.float())))
        rows.append({"change": name, "fd_efficientnet": distance.compute()})
    print("\n".join(f"{row['change']:24} {row['fd_efficientnet']:6.1f}" for row in rows))
    more = {}
    if painted:
        others = {OTHERS: second, **painted}
        more["parts"] = parts_of(first, others)
        print("\n".join(["", " " * 24 + "".join(f" {name:>16}" for name in others)]))
        for row in more["parts"]:
            print(f"{row['part']:24}" + "".join(f" {row[name]:16.1f}" for name in others))
    if args.json:
        results.write(args.json, results.result("distances", {"data": "builtin", "images": args.images}, rows, **more))
    return 0


if __name__ == "__main__":
    sys.exit(main())
