"""Image data sets with camera poses: reading, checking, and an endless, exactly resumable stream of batches.

A data set is a zip or a folder of square images and a `dataset.json`:

    {"camera_angles": {"00/img0.png": [yaw, pitch, roll], ...},   radians, as in camera.py
     "labels": [["00/img0.png", 3], ...] or {"00/img0.png": 3, ...} or null,   classes, or vectors of floats
     "camera": {"fov": 30, "radius": 8, "ray_start": 6, "ray_end": 10, "cube_scale": 3.8}}   optional

Names are relative to the root; the extension and a top folder named like the set do not count.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import itertools
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .camera import frustum_extent
from .errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAMERA_KEYS = ("fov", "radius", "ray_start", "ray_end", "cube_scale")
ANGLE_NORM_MIN = 0.1  # norm over the set of the yaws, and of the pitches; below it they are placeholders
ANGLE_SLACK = 1e-5  # float32 rounds pi up


class ImageDataset(torch.utils.data.Dataset):
    """Images with poses and, if wanted, labels.

    The constructor checks everything that dataset.json and the first image show, `check_images` all images; both raise
    UserError with one line that names the file, the fault and the fix.

    Args:
        path: A zip, a folder, or "builtin" for the set that comes with the package.
        resolution: The side the images must have; None takes what they have.
        use_labels: Read the labels, integer classes as one-hot; otherwise they are empty.
        use_poses: Read and require the camera angles; otherwise they are zero.
        mirror: Double the set: N images, then the same N flipped left-right with yaw negated, label kept.

    Attributes:
        name: Name of the zip or folder, without extension.
        resolution, label_dim: R and L below.
        angles: [len, 3] float32, yaw, pitch, roll.
        labels: [len, L] float32, L = 0 without labels.
        mean_camera_pose: [3] float32, mean over the unmirrored set.
        camera: fov (degrees), radius, ray_start, ray_end and cube_scale the set was made with, or None.

    Items: image uint8 [3, R, R], label float32 [L], angles float32 [3].
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolution: int | None = None,
        *,
        use_labels: bool = False,
        use_poses: bool = True,
        mirror: bool = True,
    ) -> None:
        if path == "builtin":
            path = str(importlib.resources.files(__package__) / "builtin" / "objects64.zip")
        self.path = Path(path)
        self.name = self.path.resolve().name if self.path.is_dir() else self.path.stem
        self.mirror = mirror
        self._archive: tuple[int, zipfile.ZipFile] | None = None  # process id, its open file

        names = self._list_names()
        self.files = sorted(filter(_is_image, names))
        if not self.files:
            self._fail(f"holds no image ({', '.join(IMAGE_SUFFIXES)}): give a zip or folder of images")
        by_key: dict[str, str] = {}
        for name in self.files:
            if by_key.setdefault(self._key(name), name) != name:
                self._fail(f"images {by_key[self._key(name)]} and {name} have the same name: remove or rename one")
        self.resolution = self._first_resolution(resolution)

        metadata = self._read_metadata(names) if use_poses or use_labels else {}
        self.camera = self._read_camera(metadata)
        angles = self._read_angles(metadata) if use_poses else np.zeros((len(self.files), 3), np.float32)
        labels = self._read_labels(metadata) if use_labels else np.zeros((len(self.files), 0), np.float32)
        self.label_dim = labels.shape[1]
        self.mean_camera_pose = torch.from_numpy(angles.mean(axis=0, dtype=np.float64).astype(np.float32))  # [3]
        self.angles, self.labels = torch.from_numpy(angles), torch.from_numpy(labels)
        if mirror:
            self.angles = torch.cat([self.angles, self.angles * torch.tensor([-1.0, 1.0, 1.0])])
            self.labels = torch.cat([self.labels, self.labels])

    def __len__(self) -> int:
        return len(self.angles)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = self._read_image(self.files[index % len(self.files)])  # [R, R, 3]
        if index >= len(self.files):
            image = image[:, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return image, self.labels[index], self.angles[index]

    def check_images(self, progress: bool | Callable[[list[str], str], Iterable[str]] = False) -> None:
        """Reads every image. UserError names the first that cannot be read or differs from the others in size.

        Args:
            progress: Shows how far it is: tqdm, or a function of the files and a word for them.
        """
        files = self.files
        if callable(progress):
            files = progress(files, "images checked")
        elif progress:
            from tqdm import tqdm

            files = tqdm(files, desc="checking images", unit="img", leave=False)
        for name in files:
            self._read_image(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def _fail(self, fault: str) -> NoReturn:
        raise UserError(f"{self.path}: {fault}")

    def _key(self, name: str) -> str:
        """An image's name without what does not count."""
        name = name.removeprefix(f"{self.name}/")
        stem, suffix = os.path.splitext(name)
        return stem if suffix.lower() in IMAGE_SUFFIXES else name

    def _list_names(self) -> list[str]:
        if self.path.is_dir():
            return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]
        if not self.path.exists():
            self._fail("there is no such data set: give a zip or folder of images, or 'builtin'")
        return [name for name in self._zip().namelist() if not name.endswith("/")]

    def _zip(self) -> zipfile.ZipFile:
        # One handle per process: workers forked with an open one would move each other's file position.
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                self._fail(f"is not a folder and not a readable zip ({error}): copy it again, or unpack it to a folder")
        return self._archive[1]

    def _read_bytes(self, name: str) -> bytes:
        return (self.path / name).read_bytes() if self.path.is_dir() else self._zip().read(name)

    @contextlib.contextmanager
    def _open_image(self, name: str) -> Iterator[PIL.Image.Image]:
        try:
            with PIL.Image.open(io.BytesIO(self._read_bytes(name))) as image:
                transparent = "A" in image.mode or "transparency" in image.info
                if transparent or image.mode not in ("RGB", "L", "P", "1"):
                    kind = "transparent" if transparent else f"of mode {image.mode}"
                    self._fail(f"image {name} is {kind}: put it on its background colour and save it as 8-bit RGB")
                yield image
        except UserError:
            raise
        except (OSError, EOFError, SyntaxError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            reason = "it is no image" if isinstance(error, PIL.UnidentifiedImageError) else error
            self._fail(f"image {name} cannot be read ({reason}): replace it or remove it")

    def _read_image(self, name: str) -> np.ndarray:
        """[R, R, 3] uint8."""
        with self._open_image(name) as image:
            if image.size != (self.resolution, self.resolution):
                size, first = "x".join(map(str, image.size)), f"{self.files[0]} is {self.resolution}x{self.resolution}"
                self._fail(f"image {name} is {size} but {first}: bring all images to one size")
            return np.asarray(image.convert("RGB"))

    def _first_resolution(self, wanted: int | None) -> int:
        """The side of the first image, read from its header, if it is fit to train on."""
        with self._open_image(self.files[0]) as image:
            width, height = image.size
        found = f"image {self.files[0]} is {width}x{height}"
        if width != height:
            self._fail(f"{found}, not square: crop the images")
        if width < 4 or width & (width - 1):
            self._fail(f"{found}, not a power of two: resize the images to {2 ** max(2, round(math.log2(width)))}")
        if wanted not in (None, width):
            self._fail(f"{found} but resolution {wanted} was asked for: ask for {width} or resize the images")
        return width

    def _read_metadata(self, names: list[str]) -> dict[str, Any]:
        name = next((name for name in ("dataset.json", f"{self.name}/dataset.json") if name in names), None)
        if name is None:
            self._fail("has no dataset.json: add one with the camera_angles of the images (README, data format)")
        try:
            metadata = json.loads(self._read_bytes(name))
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            self._fail(f"dataset.json is not valid JSON ({error}): write it again")
        if not isinstance(metadata, dict):
            self._fail('dataset.json holds no object: write it as {"camera_angles": {...}}')
        return metadata

    def _read_camera(self, metadata: dict[str, Any]) -> dict[str, float] | None:
        camera = metadata.get("camera")
        if camera is None:
            return None
        for key in CAMERA_KEYS:
            value = camera.get(key) if isinstance(camera, dict) else None
            if not _is_number(value) or value <= 0:
                self._fail(f'dataset.json: "camera" needs a positive {key}, got {value}: add it or remove "camera"')
        camera = {key: float(camera[key]) for key in CAMERA_KEYS}
        if not (camera["ray_start"] < camera["ray_end"] and camera["fov"] < 180):
            self._fail('dataset.json: "camera" needs ray_start < ray_end and fov < 180 degrees: correct it')
        cube_scale = camera["cube_scale"]
        extent = frustum_extent(**{key: camera[key] for key in CAMERA_KEYS if key != "cube_scale"})
        if extent > cube_scale:
            self._fail(
                f'dataset.json: the view frustum of "camera" leaves the cube of half-size {cube_scale:g}: raise '
                f"cube_scale to {math.ceil(extent * 1000) / 1000:g}, or narrow fov or ray_start to ray_end"
            )
        return camera

    def _values(self, metadata: dict[str, Any], field: str) -> list[Any]:
        """The entries of a field of dataset.json, in the order of the images."""
        entries = metadata.get(field)
        if not entries:
            self._fail(f'dataset.json has no "{field}": add an entry for every image, or train without them')
        try:
            by_key = {self._key(name): value for name, value in dict(entries).items()}
        except (TypeError, ValueError, AttributeError):
            self._fail(f'dataset.json: "{field}" must be {{name: value}} or a list of [name, value] pairs: write it so')
        missing = [name for name in self.files if self._key(name) not in by_key]
        if missing:
            self._fail(
                f'dataset.json: "{field}" lacks {len(missing)} of {len(self.files)} images, first {missing[0]}: '
                "add them or remove the images"
            )
        return [by_key[self._key(name)] for name in self.files]

    def _read_angles(self, metadata: dict[str, Any]) -> np.ndarray:
        """[N, 3] float32."""
        values = self._values(metadata, "camera_angles")
        limits = (("yaw", -math.pi, math.pi, "-pi to pi"), ("pitch", 0, math.pi, "0 to pi"))
        for name, value in zip(self.files, values, strict=True):
            at = f"dataset.json: camera_angles of {name}"
            if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
                self._fail(f"{at} are {value}: write three finite numbers [yaw, pitch, roll]")
            for angle, (which, low, high, interval) in zip(value[:2], limits, strict=True):
                if not low - ANGLE_SLACK <= angle <= high + ANGLE_SLACK:
                    self._fail(f"{at} have {which} {angle:g}, outside {interval} (degrees?): store radians")
        angles = np.array(values, np.float64)
        for column, which in enumerate(("yaw", "pitch")):
            if np.linalg.norm(angles[:, column]) <= ANGLE_NORM_MIN:
                self._fail(
                    f"dataset.json: every {which} is zero (or nearly): store the true camera_angles, "
                    "or train without poses"
                )
        return angles.astype(np.float32)

    def _read_labels(self, metadata: dict[str, Any]) -> np.ndarray:
        """[N, L] float32."""
        values = self._values(metadata, "labels")
        length = len(values[0]) if isinstance(values[0], list) else None
        for name, value in zip(self.files, values, strict=True):
            if length is None:
                good = _is_number(value) and value >= 0 and value == int(value)
            else:
                good = isinstance(value, list) and len(value) == length > 0 and all(map(_is_number, value))
            if not good:
                kind = "a class number" if length is None else f"a vector of {length or 'some'} numbers"
                self._fail(
                    f"dataset.json: the label of {name} is {value}, that of {self.files[0]} calls for {kind}: "
                    "write all labels alike"
                )
        if length is not None:
            return np.array(values, np.float32)
        classes = np.array(values, np.int64)
        return np.eye(classes.max() + 1, dtype=np.float32)[classes]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.rpartition("/")[2].startswith(".")  # "._": macOS's zips


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class InfiniteSampler(torch.utils.data.Sampler):
    """Endless shuffled indices, a pure function of (seed, position).

    Epoch e, positions e * num_items and up, is a permutation drawn from (seed, e); so a run that has consumed
    `position` indices goes on exactly where it stopped. Rank r of w takes positions position + r, position + r + w...
    """

    def __init__(self, num_items: int, seed: int, position: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        if num_items < 1:
            raise ValueError(f"InfiniteSampler: num_items must be at least 1, got {num_items}")
        self.num_items, self.seed, self.position = num_items, seed, position
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[int]:
        drawn = None
        for position in itertools.count(self.position + self.rank, self.world_size):
            epoch, place = divmod(position, self.num_items)
            if epoch != drawn:
                # torch's CPU generator keeps 32 bits of a seed.
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
                order, drawn = torch.randperm(self.num_items, generator=generator).tolist(), epoch
            yield order[place]


def _leave_process_group(worker: int) -> None:
    """Keeps a terminal's Ctrl-C, and a SIGTERM to the group, from the workers: the trainer decides when to stop."""
    os.setpgid(0, 0)


def make_loader(
    dataset: ImageDataset,
    batch: int,
    seed: int,
    position: int = 0,
    workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches: images uint8 [B, 3, R, R], labels float32 [B, L], angles float32 [B, 3], all on the CPU.

    The batches depend on (seed, position) alone, not on `workers`, and torch's global random state is left alone.

    Args:
        batch: B, for this rank.
        position: Images consumed before, over all ranks.
        workers: Processes that read ahead, with one thread each (torch's own default there); 0 reads in this process.
        device: Where the batches will go; memory is pinned for CUDA.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch,
        sampler=InfiniteSampler(len(dataset), seed, position, rank=rank, world_size=world_size),
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_leave_process_group,
        generator=torch.Generator().manual_seed(seed),  # for the workers' seeds, which nothing uses
    )
    try:
        yield from map(tuple, loader)
    except UserError as error:
        # From a worker, the message comes wrapped in its traceback.
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError("a data loading process died, probably for want of memory: use fewer workers, or 0") from error
