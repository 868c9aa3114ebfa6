"""How many images a core reads and decodes: `python -m bench.runs.loading [--json FILE]`.

Images of 512^2 as training reads them, from a zip to a tensor, beside nothing but Pillow's decoder, in turn on the same
files. Seconds are those in which this process computed, so that other programs matter less.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from epigraf_fast.data import ImageDataset
from epigraf_fast.training.defaults import MOST_LOADERS

from .. import results

FORMATS = {"jpeg": {"format": "JPEG", "quality": 95}, "png": {"format": "PNG"}}
NOISE = 4.0  # standard deviation of what a camera adds, of 255: it decides how large a PNG is


def picture(resolution: int, seed: int) -> PIL.Image.Image:
    """Smooth colours with a camera's noise."""
    rng = np.random.default_rng(seed)
    knots = PIL.Image.fromarray(rng.integers(0, 256, (17, 17, 3), dtype=np.uint8))
    smooth = np.asarray(knots.resize((resolution, resolution), PIL.Image.Resampling.BICUBIC)).astype(np.float64)
    noisy = smooth + rng.normal(0, NOISE, smooth.shape)
    return PIL.Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def measure(
    kind: str, resolution: int, images: int, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, Any]:
    """Images a second of computing, decoded and as items of a data set.

    Args:
        kind: Of `FORMATS`.
        rounds: Over all images, of which the median counts.
    """
    files = []
    for seed in range(images):
        buffer = io.BytesIO()
        picture(resolution, seed).save(buffer, **FORMATS[kind])
        files.append(buffer.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "set.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for number, content in enumerate(files):
                archive.writestr(f"{number:03d}.{kind}", content)
        dataset = ImageDataset(path, use_poses=False, mirror=False)

        def decode(number: int) -> np.ndarray:
            with PIL.Image.open(io.BytesIO(files[number])) as image:
                return np.asarray(image)

        for number in range(images):  # beforehand: what is read is what is decoded
            if (dataset[number][0].permute(1, 2, 0).numpy() != decode(number)).any():
                raise ValueError(f"image {number} is read otherwise than it is decoded")
        seconds: dict[str, list[float]] = {"decoded": [], "read": []}
        for _ in range(rounds):
            for name, work in (("decoded", decode), ("read", dataset.__getitem__)):
                begun = clock()
                for number in range(images):
                    work(number)
                seconds[name].append((clock() - begun) / images)
    decoded, read = (1 / statistics.median(seconds[name]) for name in ("decoded", "read"))
    return {
        "format": kind,
        "resolution": resolution,
        "bytes": sum(map(len, files)) // images,
        "decoded_per_core_second": decoded,
        "read_per_core_second": read,
        "read_over_decoded": read / decoded,
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    lines = ["format  KiB   decoded/s and core  read/s and core  share of the decoder  read/s by all loader processes"]
    for row in rows:
        lines.append(
            f"{row['format']:<6}{row['bytes'] / 1024:>5.0f}{row['decoded_per_core_second']:>20.0f}"
            f"{row['read_per_core_second']:>17.0f}{row['read_over_decoded']:>21.0%}"
            f"{row['read_per_core_second'] * MOST_LOADERS:>18.0f} of {MOST_LOADERS} cores"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.loading", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--resolution", type=int, default=512, help="side of the images (default: 512)")
    parser.add_argument("--images", type=int, default=16, help="of each format (default: 16)")
    parser.add_argument("--rounds", type=int, default=9, help="over all of them (default: 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    args = parser.parse_args(argv)
    rows = [measure(kind, args.resolution, args.images, args.rounds) for kind in FORMATS]
    print(format_rows(rows))
    if args.json:
        settings = {"images": args.images, "rounds": args.rounds, "noise": NOISE, "pillow": PIL.__version__}
        results.write(args.json, results.result("loading", settings, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
