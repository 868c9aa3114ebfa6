"""What tests share: one thread, a tiny data set on disk, and settings that take a step in a fraction of a second."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import multiprocessing
import os
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import compiled
import interpreter
from epigraf_fast.config import (
    CameraConfig,
    Config,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    OptimConfig,
    PatchConfig,
    RendererConfig,
    check,
)
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.ops import backends
from epigraf_fast.training import networks, pretrained, start
from epigraf_fast.training.step import Trainer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind a shell's `&`: what tests start shall hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup: the same, and the tests themselves go on
    signal.signal(signal.SIGHUP, lambda *_: None)
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that the machine has and torch does not see is none of these tests'
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported, which `ops` do when called

CAMERA = {"fov": 30.0, "radius": 1.0, "ray_start": 0.75, "ray_end": 1.25, "cube_scale": 0.475}
RESOLUTION, IMAGES, CLASSES = 16, 24, 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="record the golden losses anew")
    compiled.options(parser)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    compiled.choose(config, items)


def pytest_collection_finish() -> None:
    """What is here before the first test stays, and cycles may wait: that took a twelfth of the ops' time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    os.register_at_fork(after_in_child=gc.freeze)  # a test's garbage, which may print or wait, is none of its forks'


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums have one order, so that equal runs are equal to the last bit."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    interpreter.hasten()


@pytest.fixture(autouse=True)
def _arithmetic() -> None:
    """A GPU rounds no product to TF32 and sums convolutions in one order, and a CPU has denormal numbers, whatever the
    test before has set."""
    torch.set_flush_denormal(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told no device takes the CPU, also where there is a GPU: tests of the GPU name it."""
    for module in (pretrained, start):
        monkeypatch.setattr(module, "find_device", lambda name: networks.find_device(name or "cpu"))


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine's GPU has passed before decides nothing."""
    monkeypatch.setattr(backends, "_accepted", {})


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """A test's processes end with it, and not when garbage happens to be collected: in a fork, or at the very end.

    Those that were forked, that is; the compiler of kernels, which serves all tests of a worker, is spawned.
    """
    before = forked()
    yield
    assert forked() <= before


def forked() -> set[int | None]:
    """Process ids."""
    spawned = multiprocessing.context.SpawnProcess
    return {process.pid for process in multiprocessing.active_children() if not isinstance(process, spawned)}


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """A training run takes SIGTERM and SIGINT over; the next test gets pytest's own back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` is full of NaN, so that what a kernel leaves unwritten shows.

    Our ops do not hear that torch is told to be deterministic for that: they sum as they do by default.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    yield
    torch.use_deterministic_algorithms(False)


def smooth_images(count: int, resolution: int, seed: int) -> np.ndarray:
    """Random colours at 5x5 points, bilinear between them: [count, R, R, 3] uint8."""
    knots = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3)).astype(np.float64)
    place = np.arange(resolution) * (4 / resolution)
    low = place.astype(int)
    part = place - low
    rows = knots[:, low] * (1 - part)[:, None, None] + knots[:, low + 1] * part[:, None, None]
    columns = rows[:, :, low] * (1 - part)[:, None] + rows[:, :, low + 1] * part[:, None]
    return columns.astype(np.uint8)


def write_set(
    path: Path,
    *,
    resolution: int = RESOLUTION,
    count: int = IMAGES,
    seed: int = 0,
    edit: Callable[[dict[str, bytes], dict[str, Any]], None] | None = None,
) -> Path:
    """Writes a data set with poses, classes and a camera of its own as a zip.

    Args:
        edit: Spoils the image files (name -> bytes) and dataset.json before they are written.
    """
    rng = np.random.default_rng(seed + 1)
    files = {}
    for number, image in enumerate(smooth_images(count, resolution, seed)):
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "png")
        files[f"{number:03d}.png"] = buffer.getvalue()
    poses = zip(rng.uniform(-math.pi, math.pi, count), rng.uniform(0.5, 2.5, count), strict=True)
    metadata = {
        "camera_angles": {name: [*pose, 0.0] for name, pose in zip(files, poses, strict=True)},
        "labels": [[name, number % CLASSES] for number, name in enumerate(files)],
        "camera": dict(CAMERA),
    }
    if edit is not None:
        edit(files, metadata)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("dataset.json", json.dumps(metadata))
    return path


@pytest.fixture(scope="session")
def write_data() -> Callable[..., Path]:
    """`write_set`."""
    return write_set


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of 24 smooth 16x16 images with poses, classes and a camera of its own."""
    return write_set(tmp_path_factory.mktemp("data") / "tiny.zip")


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Callable[..., Config]:
    """`tiny_config(**overrides)`: settings of a run on `tiny_data` that has everything switched on.

    An override of a part is a dict: `tiny_config(batch=4, optim={"r1_gamma": 0.0})`.
    """
    base = Config(
        data=str(tiny_data),
        resolution=RESOLUTION,
        batch=8,
        kimg=0.04,
        run_dir=str(tmp_path / "run"),
        device="cpu",
        log_kimg=0.008,
        snapshot_kimg=1.0,
        checkpoint_kimg=1.0,
        grid=(3, 2),
        camera=CameraConfig(**CAMERA),
        generator=GeneratorConfig(
            z_dim=16,
            w_dim=16,
            plane_resolution=8,
            plane_channels=4,
            channel_base=128,
            channel_max=16,
            decoder_hidden=8,
            pose_conditioning=True,
            pose_swap_kimg=0.1,
        ),
        renderer=RendererConfig(
            coarse_samples=4, fine_samples=4, density_noise=0.5, density_noise_kimg=0.1, white_background=True
        ),
        discriminator=DiscriminatorConfig(
            channel_base=128,
            channel_max=16,
            code_dim=16,
            patch_steps=32,
            patch_table_dim=4,
            camera_conditioning=True,
            camera_steps=8,
        ),
        patch=PatchConfig(resolution=8, beta_start=0.2, anneal_kimg=0.1),
        loader=DataConfig(labels=True, workers=0),
        optim=OptimConfig(r1_interval=4, blur_sigma=1.0, blur_kimg=0.1),
    )

    def tiny_config(**overrides: Any) -> Config:
        values = {
            name: dataclasses.replace(getattr(base, name), **value) if isinstance(value, dict) else value
            for name, value in overrides.items()
        }
        config = dataclasses.replace(base, **values)
        check(config)
        return config

    return tiny_config


@pytest.fixture
def tiny_dataset(tiny_data: Path) -> ImageDataset:
    """`tiny_data`, mirrored, with labels."""
    return ImageDataset(tiny_data, use_labels=True)


@pytest.fixture
def tiny_trainer() -> Callable[[Config], tuple[Trainer, Iterator]]:
    """`tiny_trainer(config)`: a trainer and its batches, as train.py builds them, on the device of the config."""

    def tiny_trainer(config: Config) -> tuple[Trainer, Iterator]:
        random.seed(config.seed)
        np.random.seed(config.seed)  # noqa: NPY002 - the global generator belongs to a run's state
        torch.manual_seed(config.seed)
        dataset = ImageDataset(config.data, use_labels=config.loader.labels, mirror=config.loader.mirror)
        device = torch.device(config.device)
        return Trainer(config, dataset, device), make_loader(dataset, config.batch, config.seed, device=device)

    return tiny_trainer
