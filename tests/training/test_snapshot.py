"""What a run leaves to look at, and that making it disturbs nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from checks import assert_close
from epigraf_fast.config import CameraConfig, Config
from epigraf_fast.data import ImageDataset
from epigraf_fast.models import region
from epigraf_fast.models.renderer import Images
from epigraf_fast.training import sampling, snapshot
from epigraf_fast.training.log import tile, to_uint8
from epigraf_fast.training.sampling import fixed_latents, render_images, render_turntable, turntable_angles
from epigraf_fast.training.snapshot import TURNTABLE_FRAMES, Snapshots, is_best, non_flat_share
from epigraf_fast.training.step import Trainer

TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]


class Log:
    """Keeps what would be said, and, as its own board, what would go to TensorBoard."""

    def __init__(self) -> None:
        self.board = self
        self.pictures: list[tuple[str, np.ndarray, int]] = []
        self.said: list[str] = []
        self.scalars: list[tuple[str, float, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def sparing(self, what: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def scalar(self, name: str, value: float, cur_nimg: int) -> None:
        self.scalars.append((name, value, cur_nimg))

    def image(self, name: str, picture: np.ndarray, cur_nimg: int) -> None:
        self.pictures.append((name, picture, cur_nimg))


class Distance:
    """Stands in for FeatureDistance: counts images, and gives the fakes' mean."""

    made = 0

    def __init__(self, device: torch.device, features: Any = None) -> None:
        self.scale = 1 if features is None else 2
        type(self).made += 1
        self.real: list[Tensor] = []
        self.fake: list[Tensor] = []

    def update_real(self, images: Tensor) -> None:
        self.real.append(images)

    def update_fake(self, images: Tensor) -> None:
        assert images.dtype == torch.uint8
        self.fake.append(images)

    def reset_fake(self) -> None:
        self.fake = []

    def compute(self) -> float:
        return self.scale * float(torch.cat(self.fake).float().mean())


@pytest.fixture
def run(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tiny_dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> tuple[Trainer, Snapshots]:
    """A trainer at its beginning, and its snapshots."""
    config = tiny_config(turntable=2, metric_images=20)
    trainer, _ = tiny_trainer(config)
    monkeypatch.setattr(Distance, "made", 0)
    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    Path(config.run_dir).mkdir()
    return trainer, Snapshots(config, tiny_dataset, trainer.average, Log())


def read(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def test_grids(run: tuple[Trainer, Snapshots], tmp_path: Path) -> None:
    trainer, snapshots = run
    paths = snapshots.grids(8)
    assert paths == tuple(tmp_path / "run" / "samples" / f"{name}-000000008.png" for name in ("images", "depth"))
    assert [(name, cur_nimg) for name, _, cur_nimg in snapshots.log.pictures] == [
        ("samples/images", 8),
        ("samples/depth", 8),
    ]
    for path, (_, picture, _) in zip(paths, snapshots.log.pictures, strict=True):
        assert (read(path) == picture).all()
        assert picture.shape == (2 * 16, 3 * 16, 3)
    z, label, angles = snapshots.latents
    with torch.no_grad():
        images = trainer.average(
            z, angles, label, resolution=16, conditioning_angles=angles, noise_mode="const", stochastic=False
        )
    difference = read(paths[0]).astype(int) - tile(to_uint8(images.rgb), 3)
    assert abs(difference).max() <= 1  # rounding: the batch size differs


def test_grids_show_the_average_and_always_the_same_codes(run: tuple[Trainer, Snapshots]) -> None:
    trainer, snapshots = run
    first, again = (read(snapshots.grids(cur_nimg)[0]) for cur_nimg in (0, 8))
    assert (first == again).all()
    with torch.no_grad():
        trainer.average.decoder.fc1.bias += 0.5
    assert (read(snapshots.grids(16)[0]) != first).any()


def test_reals(run: tuple[Trainer, Snapshots], tiny_dataset: ImageDataset) -> None:
    """Different images of the set, the same ones in every run of a seed."""
    _, snapshots = run
    picture = read(snapshots.reals())
    assert picture.shape == (32, 48, 3)
    cells = {picture[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16, 32)}
    images = {tiny_dataset[i][0].permute(1, 2, 0).numpy().tobytes() for i in range(len(tiny_dataset))}
    assert len(cells) == 6
    assert cells <= images
    assert (read(snapshots.reals()) == picture).all()


def test_turntable(run: tuple[Trainer, Snapshots], tmp_path: Path) -> None:
    _, snapshots = run
    path = snapshots.turntable()
    assert path == tmp_path / "run" / "turntable.gif"
    assert imageio.v3.imread(path).shape == (TURNTABLE_FRAMES, 16, 2 * 16, 3)


def test_measure(run: tuple[Trainer, Snapshots], tmp_path: Path, tiny_dataset: ImageDataset) -> None:
    trainer, snapshots = run
    first = snapshots.measure(0)
    assert sum(map(len, snapshots.distances["fd_efficientnet"].real)) == 20
    assert sum(map(len, snapshots.distances["fd_efficientnet"].fake)) == 20
    reals = {image.numpy().tobytes() for batch in snapshots.distances["fd_efficientnet"].real for image in batch}
    assert len(reals) == 20
    assert reals <= {tiny_dataset[i][0].numpy().tobytes() for i in range(len(tiny_dataset))}
    with torch.no_grad():
        trainer.average.decoder.fc1.bias += 0.5
    last = snapshots.measure(40)
    assert last != first
    assert Distance.made == 1  # the real images are seen once
    expected = [
        {"cur_nimg": 0, **first, "images": 20},
        {"cur_nimg": 40, **last, "images": 20},
    ]
    path = tmp_path / "run" / "metrics.json"
    assert json.loads(path.read_text()) == expected
    snapshots.measure(40)  # once more after a resume
    assert json.loads(path.read_text()) == expected


def test_fid_where_weights_are_given(run: tuple[Trainer, Snapshots], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a local file; and then it says which checkpoint is the best."""
    _, snapshots = run
    opened = []
    monkeypatch.setattr(snapshot, "ScriptFeatures", lambda path, device: opened.append(path) or object())
    snapshots.config = dataclasses.replace(snapshots.config, inception="some/inception.pt")
    values = snapshots.measure(0)
    assert opened == [Path("some/inception.pt")]
    assert values["fid"] == 2 * values["fd_efficientnet"]


def test_which_is_best() -> None:
    def best(**values: list[float]) -> bool:
        return is_best([dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)])

    assert best(fd_efficientnet=[9.0, 7.0])
    assert not best(fd_efficientnet=[7.0, 9.0])
    assert best(fd_efficientnet=[7.0, 9.0], fid=[3.0, 2.0])  # FID decides
    assert not best(fd_efficientnet=[9.0, 7.0], fid=[2.0, 3.0])


def test_non_flat_share_by_hand() -> None:
    """Ray range 1 to 3, so that a span of 0.1 is the least: a slope, a plane, an empty image, one solid pixel, a slope
    that is too transparent to count, a slope of 0.08 in its middle 90%."""
    camera = CameraConfig(ray_start=1.0, ray_end=3.0)
    slope = torch.linspace(1.8, 2.2, 64).view(1, 8, 8)
    plane, ones = torch.full((1, 8, 8), 2.0), torch.ones(1, 8, 8)
    point = torch.zeros(1, 8, 8)
    point[0, 3, 3] = 1
    gentle = torch.linspace(2 - 0.08 / 1.8, 2 + 0.08 / 1.8, 64).view(1, 8, 8)
    depth = torch.stack([slope, plane, 0 * ones, 2 * point, 0.4 * slope, gentle])
    opacity = torch.stack([ones, ones, 0 * ones, point, 0.4 * ones, ones])
    batches = [Images(depth[part], depth[part], opacity[part]) for part in (slice(0, 2), slice(2, 6))]
    assert non_flat_share(batches, camera) == pytest.approx(1 / 6)


def test_flat_shapes_are_said(run: tuple[Trainer, Snapshots], monkeypatch: pytest.MonkeyPatch) -> None:
    _, snapshots = run
    for share, cur_nimg, said in ((0.2, 0, []), (0.9, 8, []), (0.2, 8, ["warning: 80% of the shapes are flat"])):
        monkeypatch.setattr(snapshot, "non_flat_share", lambda *args, share=share: share)
        snapshots.log.said = []
        snapshots.grids(cur_nimg)
        assert snapshots.log.scalars[-1] == ("geometry/non_flat", share, cur_nimg)
        assert [text.partition(";")[0] for text in snapshots.log.said] == said


def test_nothing_disturbs_the_training(run: tuple[Trainer, Snapshots]) -> None:
    trainer, snapshots = run
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what is looked at
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    weights = {name: value.clone() for name, value in trainer.average.state_dict().items()}
    snapshots.reals()
    snapshots.grids(0)
    snapshots.turntable()
    snapshots.measure(0)
    Snapshots(snapshots.config, snapshots.dataset, trainer.average, Log())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    for name, value in trainer.average.state_dict().items():
        assert torch.equal(value, weights[name]), name


# Latent codes and cameras


@pytest.mark.parametrize("prior", ["custom", "uniform", "normal", "truncated_gaussian", "spherical_uniform"])
def test_fixed_latents(
    prior: str, tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tiny_dataset: ImageDataset
) -> None:
    config = tiny_config(camera={"prior": prior})
    generator = tiny_trainer(config)[0].average
    torch.manual_seed(1)
    first = fixed_latents(7, generator, tiny_dataset, config.camera, 5)
    torch.manual_seed(2)
    again = fixed_latents(7, generator, tiny_dataset, config.camera, 5)
    other = fixed_latents(7, generator, tiny_dataset, config.camera, 6)
    assert [tuple(x.shape) for x in first] == [(7, 16), (7, 3), (7, 3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[2], other[2])
    if prior == "custom":
        entries = set(map(tuple, torch.cat([tiny_dataset.angles, tiny_dataset.labels], dim=1).tolist()))
        assert set(map(tuple, torch.cat([first[2], first[1]], dim=1).tolist())) <= entries


def test_render_images_in_batches(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tiny_dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    generator = tiny_trainer(config)[0].average
    latents = fixed_latents(5, generator, tiny_dataset, config.camera, 0)
    monkeypatch.setattr(sampling, "BATCH", 2)
    batches = [images.rgb for images in render_images(generator, *latents, 8)]
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert not batches[0].requires_grad
    monkeypatch.setattr(sampling, "BATCH", 5)
    (together,) = (images.rgb for images in render_images(generator, *latents, 8))
    assert_close(torch.cat(batches)[0], together[0], "first image", torch.float16)


@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_images_of_planes_in_part(
    noise_mode: str,
    tiny_config: TinyConfig,
    tiny_trainer: TinyTrainer,
    tiny_dataset: ImageDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One view of each object: planes are painted where it looks, and the images are those of whole planes."""
    monkeypatch.setattr(region, "WHOLE_BELOW", 8)
    camera = {"fov": 6.0, "radius": 1.0, "ray_start": 0.95, "ray_end": 1.05, "cube_scale": 0.2}
    config = tiny_config(generator={"plane_resolution": 32}, camera=camera)
    generator = tiny_trainer(config)[0].average
    for name, p in generator.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.3)
    monkeypatch.setattr(sampling, "BATCH", 1)
    latents, sizes = fixed_latents(3, generator, tiny_dataset, config.camera, 0), []
    painted = generator.paint
    monkeypatch.setattr(generator, "paint", lambda *args, **kwargs: sizes.append(painted(*args, **kwargs)) or sizes[-1])
    in_part = list(render_images(generator, *latents, 8, noise_mode))
    assert all(planes.shape[2] * planes.shape[3] < 0.9 * 32**2 for planes, _ in sizes)
    assert len(sizes) == 3
    generator.region = "off"
    for a, b in zip(in_part, render_images(generator, *latents, 8, noise_mode), strict=True):
        for name, got, want in zip(a._fields, a, b, strict=True):
            assert_close(got, want, name)
    assert len(sizes) == 3  # whole planes are not painted for a view


def test_turntable_angles() -> None:
    angles = turntable_angles(4, pitch=1.0)
    expected = [[0, 1, 0], [math.pi / 2, 1, 0], [math.pi, 1, 0], [3 * math.pi / 2, 1, 0]]
    assert_close(angles, torch.tensor(expected), "angles")


def test_turntable_frames(tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tiny_dataset: ImageDataset) -> None:
    """Frame by frame what the renderer gives; the style is that of the mean pose throughout."""
    config = tiny_config()
    generator = tiny_trainer(config)[0].average
    z, label, _ = fixed_latents(2, generator, tiny_dataset, config.camera, 0)
    frames = render_turntable(generator, z, label, 3, 8)
    assert frames.shape == (3, 2, 3, 8, 8)
    angles = turntable_angles(3)[1].expand(2, -1)
    with torch.no_grad():
        expected = generator(z, angles, label, resolution=8, noise_mode="const", stochastic=False).rgb
    assert torch.equal(frames[1], expected)
