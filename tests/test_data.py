"""ImageDataset, its faults, InfiniteSampler and make_loader."""

from __future__ import annotations

import io
import itertools
import json
import math
import multiprocessing.reduction
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from checks import HANG
from epigraf_fast.data import ImageDataset, InfiniteSampler, _begin_worker, make_loader
from epigraf_fast.errors import UserError

NAMES = ("00/a.png", "00/b.png", "01/c.png")
ANGLES = ([0.5, 1.0, 0.0], [-0.4, 1.5, 0.0], [3.0, 2.0, 0.0])
CAMERA = {"fov": 30, "radius": 1, "ray_start": 0.75, "ray_end": 1.25, "cube_scale": 0.475}


def encode(image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


def picture(index: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def files() -> dict[str, bytes | dict]:
    """A good set: three 8x8 images with poses, classes and a camera. Tests spoil it before they write it."""
    metadata = {
        "camera_angles": dict(zip(NAMES, ANGLES, strict=True)),
        "labels": [[name, label] for name, label in zip(NAMES, (2, 0, 1), strict=True)],
        "camera": dict(CAMERA),
    }
    return {**{name: encode(picture(i)) for i, name in enumerate(NAMES)}, "dataset.json": metadata}


@pytest.fixture(params=["folder", "zip"])
def kind(request) -> str:
    return request.param


def write(files: dict[str, bytes | dict], path: Path, kind: str = "folder") -> Path:
    contents = {n: json.dumps(c).encode() if isinstance(c, dict) else c for n, c in files.items()}
    if kind == "zip":
        path = path / "cats.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return path
    path = path / "cats"
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def fault(action, *words: str) -> None:
    """The action must fail with one line that contains the words."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# Reading


def test_items(files, kind, tmp_path):
    dataset = ImageDataset(write(files, tmp_path, kind), 8, use_labels=True)
    assert (dataset.name, dataset.resolution, dataset.label_dim, len(dataset)) == ("cats", 8, 3, 6)
    assert dataset.camera == CAMERA
    for index in range(6):
        image, label, angles = dataset[index]
        expected = picture(index % 3)[:, ::-1] if index >= 3 else picture(index)
        assert (image.dtype, label.dtype, angles.dtype) == (torch.uint8, torch.float32, torch.float32)
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
        assert label.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]][index % 3]
        sign = -1 if index >= 3 else 1
        yaw, pitch, roll = ANGLES[index % 3]
        torch.testing.assert_close(angles, torch.tensor([sign * yaw, pitch, roll]))
        assert torch.equal(angles, dataset.angles[index])
        assert torch.equal(label, dataset.labels[index])
    torch.testing.assert_close(dataset.mean_camera_pose, torch.tensor(ANGLES).mean(dim=0))
    dataset.check_images()


def test_unmirrored_without_labels_and_poses(files, tmp_path):
    del files["dataset.json"]
    dataset = ImageDataset(write(files, tmp_path), use_poses=False, mirror=False)
    assert len(dataset) == 3
    assert dataset.label_dim == 0
    assert dataset.camera is None
    assert dataset[2][1].shape == (0,)
    assert not dataset.angles.any()


def test_names_ignore_top_folder_and_extension(files, kind, tmp_path):
    files = {f"cats/{name}": content for name, content in files.items()}
    poses = files["cats/dataset.json"]["camera_angles"]
    poses["00/a.jpg"], poses["cats/01/c"] = poses.pop("00/a.png"), poses.pop("01/c.png")
    dataset = ImageDataset(write(files, tmp_path, kind), use_labels=True, mirror=False)
    torch.testing.assert_close(dataset.angles, torch.tensor(ANGLES))


def test_label_dict_of_vectors(files, tmp_path):
    files["dataset.json"]["labels"] = {name: [0.5 * i, -1] for i, name in enumerate(NAMES)}
    dataset = ImageDataset(write(files, tmp_path), use_labels=True)
    assert dataset.labels.tolist() == 2 * [[0, -1], [0.5, -1], [1, -1]]


def test_grey_and_hidden_images(files, tmp_path):
    grey = picture(0)[..., 0]
    files["00/a.png"] = encode(grey)
    files["__MACOSX/00/._a.png"] = b"resource fork"
    image = ImageDataset(write(files, tmp_path))[0][0]
    np.testing.assert_array_equal(image, np.broadcast_to(grey, (3, 8, 8)))


def test_pickles_with_open_zip(files, tmp_path):
    dataset = ImageDataset(write(files, tmp_path, "zip"))
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[4][0], dataset[4][0])


@pytest.mark.parametrize("count", [1, 3])
def test_frontal_sets_of_any_size(count, files, tmp_path):
    """Small yaws are poses, however few the images are."""
    for name in NAMES[count:]:
        del files[name]
    files["dataset.json"]["camera_angles"] = {name: [0.031, 1.57, 0] for name in NAMES[:count]}
    assert len(ImageDataset(write(files, tmp_path), mirror=False)) == count


def test_builtin():
    dataset = ImageDataset("builtin", 64)
    assert (dataset.name, len(dataset)) == ("objects64", 8000)
    assert dataset.camera == {"fov": 30, "radius": 32, "ray_start": 24, "ray_end": 40, "cube_scale": 15.2}
    angles = dataset.angles[:4000]
    # Uniform on the sphere: the mean direction vanishes, to a few standard errors (1 / sqrt(3 * 4000) per axis).
    yaw, pitch = angles[:, 0], angles[:, 1]
    position = torch.stack([pitch.sin() * yaw.cos(), pitch.cos(), pitch.sin() * yaw.sin()], dim=1)
    assert position.mean(dim=0).abs().max() < 4 / math.sqrt(12_000)
    for index in range(0, 4000, 97):
        image = dataset[index][0]
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
        assert (border == 255).all()  # white, and the object in view
        assert 0.02 < (image.amin(dim=0) < 250).float().mean() < 0.7


# Faults


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("camera_angles", None, ('no "camera_angles"', "add")),
        ("camera_angles", {}, ('no "camera_angles"',)),
        ("camera_angles", 3, ("{name: value}",)),
        ("camera_angles", {NAMES[0]: ANGLES[0]}, ("lacks 2 of 3 images", "first 00/b.png")),
        ("camera_angles", {n: [0, a[1], 0] for n, a in zip(NAMES, ANGLES, strict=True)}, ("every yaw is zero",)),
        ("camera_angles", {n: [1e-5, 1.5, 0] for n in NAMES}, ("every yaw is zero",)),
        ("camera_angles", {n: [a[0], 0, 0] for n, a in zip(NAMES, ANGLES, strict=True)}, ("every pitch is zero",)),
        ("camera_angles", {n: [90, 1, 0] for n in NAMES}, ("00/a.png", "yaw 90", "-pi to pi", "degrees")),
        ("camera_angles", {n: [1, -0.2, 0] for n in NAMES}, ("00/a.png", "pitch -0.2", "0 to pi")),
        ("camera_angles", {n: [1, 3.2, 0] for n in NAMES}, ("00/a.png", "pitch 3.2")),
        ("camera_angles", {n: [1, math.nan, 0] for n in NAMES}, ("00/a.png", "three finite numbers")),
        ("camera_angles", {n: [1, 1] for n in NAMES}, ("00/a.png", "three finite numbers")),
        ("labels", None, ('no "labels"',)),
        ("labels", [[NAMES[0], 1], [NAMES[2], 0]], ('"labels" lacks 1 of 3', "first 00/b.png")),
        ("labels", [[NAMES[0], 1], [NAMES[1], [0.5]], [NAMES[2], 0]], ("00/b.png is [0.5]", "a class number")),
        ("labels", [[NAMES[0], [1, 2]], [NAMES[1], [1]], [NAMES[2], 0]], ("00/b.png is [1]", "a vector of 2")),
        ("labels", [[name, -1] for name in NAMES], ("00/a.png is -1", "a class number")),
        ("camera", {k: v for k, v in CAMERA.items() if k != "radius"}, ('"camera"', "radius", "None")),
        ("camera", CAMERA | {"fov": -1}, ('"camera"', "fov", "-1")),
        ("camera", CAMERA | {"ray_end": 0.5}, ('"camera"', "ray_start < ray_end")),
        ("camera", CAMERA | {"cube_scale": 0.4}, ("frustum", "half-size 0.4:", "raise cube_scale to 0.475")),
        ("camera", [1], ('"camera"', "fov")),
    ],
)
def test_metadata_faults(files, tmp_path, field, value, words):
    files["dataset.json"][field] = value
    path = write(files, tmp_path)
    fault(lambda: ImageDataset(path, use_labels=True), str(path), "dataset.json", *words)


HUGE = 10**400


@pytest.mark.parametrize("number", [200_000_000, 10**20, 1e20, 2**63, 5000])
def test_a_class_number_far_above_the_classes_is_one_line(files, tmp_path, number):
    """And takes no memory: one-hot vectors of 2e8 numbers would be 2.4 GB, a square of them 142 PiB."""
    files["dataset.json"]["labels"][1][1] = number
    path = write(files, tmp_path)
    tracemalloc.start()
    fault(lambda: ImageDataset(path, use_labels=True), "the label of 00/b.png is", "only 3 classes", "from 0 on")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("labels", [[NAMES[0], HUGE], [NAMES[1], 0], [NAMES[2], 0]], ("the label of 00/a.png", "write all labels")),
        ("labels", {n: [HUGE, 0] for n in NAMES}, ("the label of 00/a.png", "write all labels alike")),
        ("labels", {n: [1e39, 0] for n in NAMES}, ("the label of 00/a.png is [1e+39, 0]",)),  # infinite in float32
        ("camera_angles", {n: [HUGE, 1, 0] for n in NAMES}, ("camera_angles of 00/a.png", "three finite numbers")),
        ("camera_angles", {n: [0.5, 1, HUGE] for n in NAMES}, ("camera_angles of 00/a.png", "three finite numbers")),
        ("camera", CAMERA | {"ray_end": HUGE}, ('"camera" needs a positive ray_end',)),
        ("camera", CAMERA | {"ray_end": 1e308}, ('"camera" needs a positive ray_end',)),
        ("camera", CAMERA | {"ray_end": 1e38}, ("view frustum", "raise cube_scale to")),
    ],
)
def test_numbers_of_400_digits_are_one_short_line(files, tmp_path, field, value, words):
    files["dataset.json"][field] = value
    path = write(files, tmp_path)
    fault(lambda: ImageDataset(path, use_labels=True), str(path), *words)
    with pytest.raises(UserError) as caught:
        ImageDataset(path, use_labels=True)
    assert len(str(caught.value)) - len(str(path)) < 300


def test_more_digits_than_python_reads(files, tmp_path):
    path = write(files, tmp_path)
    text = (path / "dataset.json").read_text().replace("1.25", "9" * 5000)
    (path / "dataset.json").write_text(text)
    fault(lambda: ImageDataset(path), "not valid JSON", "digits")


def test_classes_without_images_are_known(files, tmp_path):
    files["dataset.json"]["labels"] = dict(zip(NAMES, (2, 5, 2), strict=True))
    dataset = ImageDataset(write(files, tmp_path), use_labels=True, mirror=False)
    assert dataset.label_dim == 6
    assert dataset.labels.argmax(dim=1).tolist() == [2, 5, 2]
    assert dataset.labels.sum(dim=1).tolist() == [1, 1, 1]
    assert dataset.label_values.tolist() == [2, 5]
    assert dataset.remarks() == ["classes without an image, which are never drawn: 4 of 6: 0, 1, 3, 4"]


def test_as_many_classes_as_images_and_more_memory_than_there_is(files, tmp_path, monkeypatch):
    path = write(files, tmp_path)
    assert ImageDataset(path, use_labels=True).label_values.tolist() == [0, 1, 2]
    monkeypatch.setattr("epigraf_fast.data.LABEL_NUMBERS", 8)
    fault(lambda: ImageDataset(path, use_labels=True), "3 classes of 3 images", "GiB", "join classes")


def test_label_vectors_are_kept_to_draw_from(files, tmp_path):
    vectors = ([0.5, -1], [0, 2], [0.5, -1])
    files["dataset.json"]["labels"] = dict(zip(NAMES, vectors, strict=True))
    dataset = ImageDataset(write(files, tmp_path), use_labels=True)
    assert dataset.label_values.tolist() == [[0, 2], [0.5, -1]]
    assert dataset.remarks() == []
    assert ImageDataset(dataset.path).label_values.tolist() == []


def test_files_at_the_limits_are_good(files, tmp_path):
    pi = float(np.float32(math.pi))  # a little more than pi
    files["dataset.json"]["camera_angles"] = dict(zip(NAMES, ([pi, pi, 0], [-pi, 0, 0], [1, 1, 0]), strict=True))
    assert len(ImageDataset(write(files, tmp_path))) == 6


def test_path_faults(files, tmp_path):
    fault(lambda: ImageDataset(tmp_path / "none.zip"), "none.zip", "no such data set", "builtin")
    (tmp_path / "text.zip").write_text("hello")
    fault(lambda: ImageDataset(tmp_path / "text.zip"), "text.zip", "not a readable zip")
    whole = write(files, tmp_path, "zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    fault(lambda: ImageDataset(tmp_path / "half.zip"), "half.zip", "not a readable zip", "copy it again")
    (tmp_path / "empty").mkdir()
    fault(lambda: ImageDataset(tmp_path / "empty"), "empty", "holds no image")


def test_dataset_json_faults(files, kind, tmp_path):
    for content, words in ((b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[]", "holds no object")):
        path = write(files | {"dataset.json": content}, tmp_path, kind)
        fault(lambda path=path: ImageDataset(path), "cats", "dataset.json", words)
    path.unlink() if kind == "zip" else (path / "dataset.json").unlink()
    del files["dataset.json"]
    path = write(files, tmp_path, kind)
    fault(lambda: ImageDataset(path), "cats", "no dataset.json", "camera_angles")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (picture(0)[:, :4], ("4x8", "not square", "crop")),
        (picture(0, 12), ("12x12", "not a power of two", "resize")),
        (picture(0, 16), ("16x16", "resolution 8 was asked for")),
        (np.zeros((8, 8, 4), np.uint8), ("transparent", "RGB")),
    ],
)
def test_header_of_the_first_image(files, tmp_path, image, words):
    path = write(files | {"00/a.png": encode(image)}, tmp_path)
    fault(lambda: ImageDataset(path, 8), "00/a.png", *words)


def test_unreadable_first_image(files, kind, tmp_path):
    path = write(files | {"00/a.png": b"nothing"}, tmp_path, kind)
    fault(lambda: ImageDataset(path), "00/a.png cannot be read", "replace it")


def test_same_name_twice(files, tmp_path):
    path = write(files | {"00/a.jpg": encode(picture(0), "jpeg")}, tmp_path)
    fault(lambda: ImageDataset(path), "00/a.jpg and 00/a.png", "rename")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nothing", ("cannot be read", "no image")),
        (encode(picture(1))[:-40], ("cannot be read",)),
        (encode(picture(1, 16)), ("is 16x16", "00/a.png is 8x8")),
        (encode(picture(1)[:, :4]), ("is 4x8",)),
        (encode(np.dstack([picture(1), picture(1)[..., 0]])), ("transparent", "background", "8-bit RGB")),
        (encode(PIL.Image.new("LA", (8, 8))), ("transparent",)),
        (encode(PIL.Image.new("I;16", (8, 8))), ("I;16", "8-bit RGB")),
        (encode(PIL.Image.new("CMYK", (8, 8)), "jpeg"), ("CMYK", "8-bit RGB")),
    ],
)
def test_faults_of_later_images(files, kind, tmp_path, content, words):
    dataset = ImageDataset(write(files | {"00/b.png": content}, tmp_path, kind))
    fault(dataset.check_images, "cats", "00/b.png", *words)
    fault(lambda: dataset[4], "00/b.png", *words)
    assert dataset[0][0].shape == (3, 8, 8)


def test_damaged_zip_member(files, tmp_path):
    path = write(files, tmp_path, "zip")
    whole = bytearray(path.read_bytes())
    start = whole.index(files["00/b.png"])
    whole[start + 60] ^= 0xFF
    path.write_bytes(whole)
    fault(ImageDataset(path).check_images, "00/b.png", "cannot be read")


# The stream of batches


def test_sampler_visits_everything_in_every_epoch():
    drawn = list(itertools.islice(InfiniteSampler(10, seed=3), 40))
    epochs = [drawn[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert drawn != list(itertools.islice(InfiniteSampler(10, seed=4), 40))


@pytest.mark.parametrize("position", [0, 1, 9, 10, 25])
def test_sampler_resumes_exactly(position):
    whole = list(itertools.islice(InfiniteSampler(10, seed=3), 60))
    assert list(itertools.islice(InfiniteSampler(10, seed=3, position=position), 30)) == whole[position : position + 30]


def test_sampler_ranks_share_the_stream():
    whole = list(itertools.islice(InfiniteSampler(7, seed=0, position=5), 60))
    for rank in range(3):
        sampler = InfiniteSampler(7, seed=0, position=5, rank=rank, world_size=3)
        assert list(itertools.islice(sampler, 20)) == whole[rank::3]


def test_sampler_needs_items():
    with pytest.raises(ValueError, match="num_items"):
        InfiniteSampler(0, seed=0)


def test_loader_resumes_and_workers_change_nothing(files, tmp_path):
    dataset = ImageDataset(write(files, tmp_path, "zip"), use_labels=True)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    plain = list(itertools.islice(make_loader(dataset, 4, seed=1), 6))
    worked = list(itertools.islice(make_loader(dataset, 4, seed=1, workers=2), 6))
    resumed = list(itertools.islice(make_loader(dataset, 4, seed=1, position=12), 3))
    assert [tuple(t.shape) for t in plain[0]] == [(4, 3, 8, 8), (4, 3), (4, 3)]
    for ours, theirs in zip(plain + plain[3:], worked + resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_names_the_unreadable_image(files, tmp_path, workers):
    dataset = ImageDataset(write(files | {"00/b.png": b"nothing"}, tmp_path))
    loader = make_loader(dataset, 6, seed=0, workers=workers)
    fault(lambda: next(loader), f"{dataset.path}: image 00/b.png cannot be read")


class Dying(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)


def test_loader_says_that_a_worker_died():
    fault(lambda: next(make_loader(Dying(), 2, seed=0, workers=1)), "process died", "fewer workers")


class HangingUp(torch.utils.data.Dataset):
    """In the worker, somebody asks for what it hands over, hangs up before it is there, and the worker goes on."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        address = multiprocessing.reduction.DupFd(0)._id[0]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
        time.sleep(0.1)
        return torch.zeros(1), torch.zeros(1), torch.zeros(1)


@pytest.mark.skipif(sys.platform != "linux", reason="file descriptors travel by Unix sockets there")
def test_who_hangs_up_leaves_no_traceback(capfd):
    """A trainer that leaves while a worker hands images over; what else goes wrong in a worker's threads is said."""
    loader = make_loader(HangingUp(), 2, seed=0, workers=1)
    assert len(next(loader)[0]) == 2
    loader.close()
    assert "Traceback" not in capfd.readouterr().err


def test_other_faults_of_a_workers_threads_are_said(capfd, monkeypatch):
    monkeypatch.setattr(os, "setpgid", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    _begin_worker(0)
    for fault in (EOFError(), ConnectionResetError(), ValueError("a fault")):
        sys.excepthook(type(fault), fault, None)
    assert capfd.readouterr().err == "ValueError: a fault\n"


def test_workers_outlive_signals_to_the_group(files, tmp_path):
    """Ctrl-C and `timeout` signal the whole process group; the trainer must still get its batches to finish a step."""
    program = f"""
        import os, signal, time
        from epigraf_fast.data import ImageDataset, make_loader
        loader = make_loader(ImageDataset({str(write(files, tmp_path))!r}), 2, seed=0, workers=1)
        next(loader)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
            os.killpg(0, number)
        time.sleep(0.2)
        for _ in range(10):
            next(loader)
        print("alive")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=HANG,
    )
    assert done.stdout == "alive\n", done.stderr
