"""Image data sets with camera poses: reading, checking, and an endless, exactly resumable stream of batches.

A data set is a zip or a folder of square images and a `dataset.json`:

    {"camera_angles": {"00/img0.png": [yaw, pitch, roll], ...},   radians, as in camera.py
     "labels": [["00/img0.png", 3], ...] or {"00/img0.png": 3, ...} or null,   classes, or vectors of floats
     "camera": {"fov": 30, "radius": 8, "ray_start": 6, "ray_end": 10, "cube_scale": 3.8}}   optional

Names are relative to the folder of dataset.json; what does not count in them is said in files.py.
"""

from __future__ import annotations

import importlib.resources
import itertools
import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .camera import frustum_extent
from .errors import UserError
from .files import IMAGE_SUFFIXES, Files, clean_name, is_image, name_key, pair_names, upright

CAMERA_KEYS = ("fov", "radius", "ray_start", "ray_end", "cube_scale")
ANGLE_MIN = 1e-4  # radians, of the largest yaw, and of the largest pitch; below it they are placeholders
ANGLE_SLACK = 1e-5  # float32 rounds pi up
LARGEST = float(np.finfo(np.float32).max)
CLASS_NUMBERS, CLASS_SHARE = 1000, 10  # class numbers may reach so far, or so many times the classes with images
LABEL_NUMBERS = 2**31  # in all labels together, as vectors
LABEL_VECTORS = 256  # kept of a set whose labels are vectors


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
        label_values: What a label can be: int64 [K], the classes that have images, in order; where labels are vectors,
            float32 [K, L], at most 256 of them. Empty without labels.
        unpaired: Field of dataset.json -> its names that no image has.

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
        if not self.path.exists():
            self._fail("there is no such data set: give a zip or folder of images, or 'builtin'")
        self.name = self.path.resolve().name if self.path.is_dir() else self.path.stem
        self.mirror = mirror
        self._source = Files(self.path)
        self.files = sorted(filter(is_image, self._source.names))
        if not self.files:
            self._fail(f"holds no image ({', '.join(IMAGE_SUFFIXES)}): give a zip or folder of images")
        by_key: dict[str, str] = {}
        with self._source.naming():
            for name in self.files:
                first = by_key.setdefault(name_key(name, self._source.tops), name)
                if first != name:
                    raise UserError(f"images {first} and {name} have the same name: remove or rename one")
        self.resolution = self._first_resolution(resolution)

        metadata = self._source.read_metadata() if use_poses or use_labels else {}
        self.unpaired: dict[str, list[str]] = {}
        self.label_values = torch.zeros(0, dtype=torch.int64)
        with self._source.naming(f"{self._source.metadata}: "):
            self.camera = None if metadata.get("camera") is None else check_camera(metadata["camera"])
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

    def check_images(self, progress: Callable[[list[str], str], Iterable[str]] | None = None) -> None:
        """Reads every image. UserError names the first that cannot be read or differs from the others in size.

        Args:
            progress: Shows how far it is: a function of the files and a word for them, that gives them one by one.
        """
        for name in self.files if progress is None else progress(self.files, "images checked"):
            self._read_image(name)

    def remarks(self) -> list[str]:
        """What is no fault but should be known, line by line."""
        lines = [
            f'names in "{field}" without an image: {len(names)}, first {names[0]}'
            for field, names in self.unpaired.items()
        ]
        if self.label_values.dtype == torch.int64 and len(self.label_values) < self.label_dim:
            empty = sorted(set(range(self.label_dim)) - set(self.label_values.tolist()))
            some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
            lines.append(f"classes without an image, which are never drawn: {len(empty)} of {self.label_dim}: {some}")
        return lines

    def _fail(self, fault: str) -> NoReturn:
        raise UserError(f"{self.path}: {fault}")

    def _read_image(self, name: str) -> np.ndarray:
        """[R, R, 3] uint8."""
        with self._source.image(name) as image:
            if image.size != (self.resolution, self.resolution):
                size, first = "x".join(map(str, image.size)), f"{self.files[0]} is {self.resolution}x{self.resolution}"
                self._fail(f"image {name} is {size} but {first}: bring all images to one size")
            image.load()  # here, where a fault has a name
            image = upright(image)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which would copy it

    def _first_resolution(self, wanted: int | None) -> int:
        """The side of the first image, read from its header, if it is fit to train on."""
        with self._source.image(self.files[0]) as image:
            width, height = image.size
        found = f"image {self.files[0]} is {width}x{height}"
        if width != height:
            self._fail(f"{found}, not square: crop the images")
        if width < 4 or width & (width - 1):
            self._fail(f"{found}, not a power of two: resize the images to {2 ** max(2, round(math.log2(width)))}")
        if wanted not in (None, width):
            self._fail(f"{found} but resolution {wanted} was asked for: ask for {width} or resize the images")
        return width

    def _values(self, metadata: dict[str, Any], field: str) -> list[Any]:
        """The entries of a field of dataset.json, in the order of the images."""
        entries = metadata.get(field)
        if not entries:
            raise UserError(f'has no "{field}": add an entry for every image, or train without them')
        try:
            names, values = zip(*(entries.items() if isinstance(entries, dict) else entries), strict=True)
            names = [*map(clean_name, names)]
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError):
            raise UserError(
                f'"{field}" must be {{name: value}} or a list of [name, value] pairs: write it so'
            ) from None
        pairs = pair_names(self.files, names, self._source.tops)
        if not pairs:
            raise UserError(
                f'no name in "{field}" is that of an image: an image is {self.files[0]}, a name {names[0]}: '
                "name them alike"
            )
        missing = [name for name in self.files if name not in pairs]
        if missing:
            raise UserError(
                f'"{field}" lacks {len(missing)} of {len(self.files)} images, first {missing[0]}: '
                "add them or remove the images"
            )
        if len(pairs) < len(names):
            self.unpaired[field] = sorted(set(names) - set(pairs.values()))
        by_name = dict(zip(names, values, strict=True))
        return [by_name[pairs[name]] for name in self.files]

    def _read_angles(self, metadata: dict[str, Any]) -> np.ndarray:
        """[N, 3] float32."""
        values = self._values(metadata, "camera_angles")
        for name, value in zip(self.files, values, strict=True):
            check_angles(name, value)
        angles = np.array(values, np.float64)
        for column, which in enumerate(("yaw", "pitch")):
            if np.abs(angles[:, column]).max() <= ANGLE_MIN:
                raise UserError(
                    f"every {which} is zero (or nearly): store the true camera_angles, or train without poses"
                )
        return angles.astype(np.float32)

    def _read_labels(self, metadata: dict[str, Any]) -> np.ndarray:
        """[N, L] float32."""
        values = self._values(metadata, "labels")
        length = len(values[0]) if isinstance(values[0], list) else None
        for name, value in zip(self.files, values, strict=True):
            if length is None:
                good = is_number(value) and value >= 0 and value == int(value)
            else:
                good = isinstance(value, list) and len(value) == length > 0 and all(map(is_number, value))
            if not good:
                kind = "a class number" if length is None else f"a vector of {length or 'some'} numbers"
                raise UserError(
                    f"the label of {name} is {reprlib.repr(value)}, that of {self.files[0]} calls for {kind}: "
                    "write all labels alike"
                )
        if length is not None:
            some = np.linspace(0, len(values) - 1, min(len(values), LABEL_VECTORS)).astype(int)
            labels = np.array(values, np.float32)
            self.label_values = torch.from_numpy(np.unique(labels[some], axis=0))
            return labels
        classes = [int(value) for value in values]
        present = sorted(set(classes))
        if present[-1] >= max(CLASS_NUMBERS, CLASS_SHARE * len(present)):
            name = self.files[classes.index(present[-1])]
            raise UserError(
                f"the label of {name} is {reprlib.repr(present[-1])}, but only {len(present)} classes have images: "
                "number the classes from 0 on"
            )
        shape = len(values), present[-1] + 1
        if math.prod(shape) > LABEL_NUMBERS:
            raise UserError(
                f"{shape[1]:,} classes of {shape[0]:,} images would take {4 * math.prod(shape) / 2**30:.0f} GiB: "
                "join classes, or train without labels"
            )
        self.label_values = torch.tensor(present)
        labels = np.zeros(shape, np.float32)
        labels[np.arange(len(values)), classes] = 1
        return labels


def check_camera(camera: Any) -> dict[str, float]:
    """The "camera" of a dataset.json, as numbers. UserError says what is wrong with it."""
    for key in CAMERA_KEYS:
        value = camera.get(key) if isinstance(camera, dict) else None
        if not is_number(value) or value <= 0:
            raise UserError(f'"camera" needs a positive {key}, got {reprlib.repr(value)}: add it or remove "camera"')
    camera = {key: float(camera[key]) for key in CAMERA_KEYS}
    if not (camera["ray_start"] < camera["ray_end"] and camera["fov"] < 180):
        raise UserError('"camera" needs ray_start < ray_end and fov < 180 degrees: correct it')
    cube_scale = camera["cube_scale"]
    extent = frustum_extent(**{key: camera[key] for key in CAMERA_KEYS if key != "cube_scale"})
    if extent > cube_scale:
        raise UserError(
            f'the view frustum of "camera" leaves the cube of half-size {cube_scale:g}: raise '
            f"cube_scale to {math.ceil(extent * 1000) / 1000:g}, or narrow fov or ray_start to ray_end"
        )
    return camera


def check_angles(name: str, angles: Any) -> None:
    """Raises UserError unless an image's "camera_angles" are yaw, pitch and roll in radians, in their ranges."""
    if not (isinstance(angles, list) and len(angles) == 3 and all(map(is_number, angles))):
        raise UserError(
            f"camera_angles of {name} are {reprlib.repr(angles)}: write three finite numbers [yaw, pitch, roll]"
        )
    for angle, (which, low, high, interval) in zip(
        angles, (("yaw", -math.pi, math.pi, "-pi to pi"), ("pitch", 0, math.pi, "0 to pi")), strict=False
    ):
        if not low - ANGLE_SLACK <= angle <= high + ANGLE_SLACK:
            raise UserError(
                f"camera_angles of {name} have {which} {angle:g}, outside {interval} (degrees?): store radians"
            )


def is_number(value: Any) -> bool:
    """Whether a value from a .json is a number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


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


def _begin_worker(worker: int) -> None:
    """Keeps a terminal's Ctrl-C, and a SIGTERM to the group, from the workers: the trainer decides when to stop.

    A trainer that leaves may hang up while a worker's thread hands images over: Python would print a traceback.
    """
    os.setpgid(0, 0)
    said = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, (ConnectionError, EOFError)) else said(kind, *rest)


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
        worker_init_fn=_begin_worker,
        generator=torch.Generator().manual_seed(seed),  # for the workers' seeds, which nothing uses
    )
    try:
        yield from map(tuple, loader)
    except (UserError, RuntimeError) as error:
        if isinstance(error, UserError):  # from a worker, its message comes wrapped in its traceback
            fault = str(error).rsplit("UserError: ", 1)[-1].strip()
        elif "DataLoader worker" in str(error):
            fault = "a data loading process died, probably for want of memory: use fewer workers, or 0"
        else:
            raise
        error.__traceback__ = None  # it and torch's frames hold each other, and those the processes, which end now
    del loader
    raise UserError(fault)
