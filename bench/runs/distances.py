"""What a distance to the data means: `python -m bench.runs.distances --json FILE`.

Two halves of the built-in images are compared by `fd_efficientnet`: as they are, which is the least that a generator
can reach by so many images, and with one of them blurred, paler or noisy, each as a generator may fail.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from epigraf_fast.data import ImageDataset
from epigraf_fast.training.metrics import FeatureDistance
from epigraf_fast.training.progress import progress

from .. import results

BATCH = 50


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


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "blurred to 48 pixels": blurred(48),
    "blurred to 36 pixels": blurred(36),
    "blurred to 28 pixels": blurred(28),
    "0.8 of the saturation": saturated(0.8),
    "grey": saturated(0.0),
    "noise of 4/255": noisy(4.0),
}


def halves(dataset: ImageDataset, images: int) -> tuple[Tensor, Tensor]:
    """Twice so many different images [images, 3, R, R] uint8, drawn by seed 0."""
    if not 2 <= images <= len(dataset) // 2:
        raise SystemExit(f"--images must be 2 to {len(dataset) // 2}, half of the data, got {images}")
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: 2 * images]
    return torch.stack([dataset[i][0] for i in chosen.tolist()]).chunk(2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.distances", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--images", type=int, default=1000, help="of each half (default: %(default)s)")
    parser.add_argument("--json", default=None, help="write the results there")
    args = parser.parse_args(argv)
    first, second = halves(ImageDataset("builtin"), args.images)
    distance, rows = FeatureDistance(), []
    for part in first.split(BATCH):
        distance.update_real(part)
    for name, change in progress(CHANGES.items(), len(CHANGES), "distances"):
        distance.reset_fake()
        for part in second.split(BATCH):
            distance.update_fake(change(part.float()).round().clamp(0, 255).byte())
        rows.append({"change": name, "fd_efficientnet": distance.compute()})
    print("\n".join(f"{row['change']:24} {row['fd_efficientnet']:6.1f}" for row in rows))
    if args.json:
        results.write(args.json, results.result("distances", {"data": "builtin", "images": args.images}, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
