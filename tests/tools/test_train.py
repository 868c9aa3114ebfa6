"""train.py from the outside: flags, faults, signals, and what a run leaves."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3
import PIL.Image
import pytest
import torch

from checks import HANG
from command_lines import SPEED, Distance, assert_one_error_line, flags, losses
from epigraf_fast.config import PRESETS, Config, differences, from_dict, preset
from epigraf_fast.errors import UserError
from epigraf_fast.ops import backends
from epigraf_fast.tools import train
from epigraf_fast.training import snapshot, step
from epigraf_fast.training.checkpoint import list_checkpoints, load_checkpoint
from epigraf_fast.training.distributed import World
from epigraf_fast.training.log import read_stats
from epigraf_fast.training.precision import settled

TinyConfig = Callable[..., Config]

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str) -> subprocess.Popen[str]:
    """`python train.py ...`, as a user would, on one thread."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(process: subprocess.Popen[str], run_dir: Path) -> None:
    deadline = time.monotonic() + HANG
    while not list_checkpoints(run_dir):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def _own_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


# Help and flags


def test_help_lists_the_presets() -> None:
    process = start("--help")
    output, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("usage: train.py [-h] {demo,ffhq,cats,plants,food}")
    for name in PRESETS:
        assert re.search(rf"• {name} ", output)
    for line in train.__doc__.splitlines():
        assert line in output.splitlines()  # the examples keep their lines


def test_help_of_a_preset_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["demo", "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    shown = set(re.findall(r"--[a-z0-9.-]+", output))
    for name in differences(preset("demo"), preset("ffhq")):
        assert "--" + name.replace("_", "-") in shown
    assert {"--resume", "--dry-run", "--optim.g-lr", "--renderer.coarse-samples"} <= shown
    assert "(default: runs/demo)" in output
    assert "(default: builtin)" in output
    assert max(map(len, output.splitlines())) <= 100
    lines = [line.strip("│ ") for line in output.splitlines()]
    unexplained = [a for a, b in itertools.pairwise(lines) if a.startswith("--") and b.startswith("(default")]
    assert not unexplained
    assert "tf32x3: with convolutions as three such" in output  # where the source begins a new line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["demo", "--bad-flag"], "unrecognized options: --bad-flag"),
        (["demo", "--batch", "many"], "many"),
        (["demo", "--precision", "fp8"], "fp8"),
        (["demo", "--backend", "numpy"], "numpy"),
        (["birds"], "birds"),
        ([], "demo, ffhq, cats, plants, food"),
    ],
)
def test_bad_flags(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(line) == 2
    assert_one_error_line(capsys.readouterr().err, words, "--help)")


def test_every_setting_is_a_flag(tiny_config: TinyConfig) -> None:
    """The tiny settings differ from the preset in every part, and come through the command line as they are."""
    config = tiny_config(micro_batch=4, turntable=3, patch={"distribution": "discrete"}, renderer={"last_back": True})
    line = flags(config)
    assert len(line) > 60
    command = train.parse(line)
    assert command.config == config
    assert (command.resume, command.dry_run) == (None, False)
    command = train.parse([*line, "--resume", "auto", "--dry-run"])
    assert (command.resume, command.dry_run) == ("auto", True)


# --dry-run


@pytest.fixture(scope="module")
def faces(write_data: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of FFHQ's size, and no camera of their own."""

    def edit(files: dict, metadata: dict) -> None:
        del metadata["camera"]

    return write_data(tmp_path_factory.mktemp("faces") / "faces.zip", resolution=512, count=2, edit=edit)


@pytest.mark.parametrize(
    ("extra", "sizes"),
    [
        ([], "G 29,247,187, D 27,495,168"),
        (
            ["--generator.no-pose-conditioning", "--discriminator.no-camera-conditioning"],
            "G 28,983,507, D 27,482,880",
        ),
    ],
)
def test_dry_run_of_ffhq(extra: list[str], sizes: str, faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["ffhq", "--data", str(faces), "--resolution", "512", "--micro-batch", "4", "--device", "cpu", "--dry-run"]
    assert train.main([*line, *extra]) == 0
    output = capsys.readouterr().out
    assert f"parameters: {sizes}" in output
    assert "faces.zip: 2 images, 4 with the mirrored, all readable" in output
    assert "warning: 2 images are few: each is shown 5,000,000 times" in output
    assert "training: 20,000 kimg, 312,500 iterations of 64 images (micro-batches of 4), patches of 64x64" in output
    assert re.search(r"memory, estimated in fp32: 0\.95 GiB .*, \d+\.\d\d GiB for a micro-batch of 4", output)
    assert re.search(r"device: cpu of \d+\.\d GiB, which (fits|is too much)", output)
    differs = "generator.pose_conditioning False, discriminator.camera_conditioning False" if extra else "micro_batch 4"
    assert re.search(rf"differs from the preset ffhq: .*{differs}", output)
    assert len(output.splitlines()) <= 12


def test_dry_run_writes_nothing_and_shows_the_camera_of_the_data(
    tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    line = flags(tiny_config(camera={"fov": 12.0, "ray_start": 0.88, "ray_end": 1.12, "cube_scale": 0.2}))
    assert train.main([*line, "--dry-run", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    config = from_dict(printed["config"])
    assert (config.camera.fov, config.camera.cube_scale) == (30.0, 0.475)
    assert dataclasses.replace(config, camera=train.parse(line).config.camera) == train.parse(line).config
    assert printed["data"] == {"images": 24, "images_with_mirrored": 48, "classes": 3, "camera": "of the data"}
    assert (printed["resume"], printed["seconds_left"], printed["preset"]) == (None, None, "demo")
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_looks_at_the_checkpoint_too(tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(kimg=0.016, grid=(1, 1))
    assert train.main(flags(config)) == 0
    line = flags(dataclasses.replace(config, kimg=0.032))
    capsys.readouterr()
    assert train.main([*line, "--resume", "auto", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"resume: .*checkpoint-000000016\.pt, after 16 images: kimg: 0\.016 -> 0\.032", printed)
    assert re.search(r"time: about 0\.0 h left", printed)
    assert train.main([*line, "--generator.z-dim", "8", "--resume", "auto", "--dry-run"]) == 2
    assert_one_error_line(
        capsys.readouterr().err, "cannot resume: generator.z_dim is 8, but the checkpoint was made with 16"
    )


# Faults in the data


def drop_poses(files: dict, metadata: dict) -> None:
    del metadata["camera_angles"]


def drop_one_pose(files: dict, metadata: dict) -> None:
    del metadata["camera_angles"]["007.png"]


def zero_yaw(files: dict, metadata: dict) -> None:
    for pose in metadata["camera_angles"].values():
        pose[0] = 0.0


def degrees(files: dict, metadata: dict) -> None:
    metadata["camera_angles"]["003.png"][1] = 90.0


def drop_labels(files: dict, metadata: dict) -> None:
    metadata["labels"] = None


def narrow_cube(files: dict, metadata: dict) -> None:
    metadata["camera"]["cube_scale"] = 0.3


def broken_image(files: dict, metadata: dict) -> None:
    files["005.png"] = files["005.png"][:60]


def broken_first_image(files: dict, metadata: dict) -> None:
    files["000.png"] = b"not an image"


def resized(number: int, width: int, height: int) -> Callable[[dict, dict], None]:
    """All images from this number on are black, of another size."""

    def edit(files: dict, metadata: dict) -> None:
        for name in list(files)[number:]:
            buffer = io.BytesIO()
            PIL.Image.new("RGB", (width, height)).save(buffer, "png")
            files[name] = buffer.getvalue()

    return edit


FAULTS = {
    "no poses": (drop_poses, ['no "camera_angles"']),
    "a pose is missing": (drop_one_pose, ['"camera_angles" lacks 1 of 24 images, first 007.png']),
    "yaw all zero": (zero_yaw, ["every yaw is zero"]),
    "pitch out of range": (degrees, ["camera_angles of 003.png have pitch 90", "radians"]),
    "no labels": (drop_labels, ['no "labels"']),
    "frustum outside the cube": (narrow_cube, ["leaves the cube of half-size 0.3", "raise cube_scale to 0.475"]),
    "unreadable image": (broken_image, ["image 005.png cannot be read", "replace it or remove it"]),
    "unreadable first image": (broken_first_image, ["image 000.png cannot be read"]),
    "one image of another size": (resized(23, 32, 32), ["image 023.png is 32x32 but 000.png is 16x16"]),
    "not square": (resized(0, 16, 32), ["image 000.png is 16x32, not square"]),
    "not a power of two": (resized(0, 24, 24), ["image 000.png is 24x24, not a power of two"]),
    "another resolution": (resized(0, 32, 32), ["image 000.png is 32x32 but resolution 16 was asked for"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_faults(
    fault: str,
    tiny_config: TinyConfig,
    write_data: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, words = FAULTS[fault]
    data = write_data(tmp_path / "spoilt.zip", edit=edit)
    assert train.main([*flags(tiny_config(data=str(data))), "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert_one_error_line(captured.err, "spoilt.zip: ", *words)
    assert captured.out == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_a_training_run(
    workers: int,
    tiny_config: TinyConfig,
    write_data: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_data(tmp_path / "spoilt.zip", edit=broken_image)
    config = tiny_config(data=str(data), kimg=0.096, grid=(1, 1), loader={"workers": workers})
    assert train.main(flags(config)) == 2
    assert_one_error_line(capsys.readouterr().err, "spoilt.zip: image 005.png cannot be read")


def test_a_data_fault_of_a_real_process(
    tiny_config: TinyConfig, write_data: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_data(tmp_path / "spoilt.zip", edit=zero_yaw)
    process = start(*flags(tiny_config(data=str(data))))
    output, errors = process.communicate(timeout=HANG)
    assert (process.returncode, output) == (2, "")
    assert_one_error_line(errors, "every yaw is zero")
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Everything at once


def test_the_demo_with_augmentation_labels_and_background(
    write_data: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset's own networks, on a set with classes, to the end."""
    data = write_data(tmp_path / "labelled.zip", resolution=64, count=12)
    parts = ["--loader.labels", "--augment.mode", "ada", "--augment.p", "0.3", "--renderer.background", "sphere"]
    short = ["--kimg", "0.024", "--metric-images", "0", "--turntable", "0", "--grid", "1", "1", "--log-kimg", "0.008"]
    run_dir = tmp_path / "run"
    assert train.main(["demo", "--data", str(data), "--run-dir", str(run_dir), *parts, *short]) == 0
    assert "samples: " in capsys.readouterr().out
    lines = losses(run_dir)
    assert [line["cur_nimg"] for line in lines] == [8, 16, 24]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all("augment/p" in line for line in lines)
    state = load_checkpoint(list_checkpoints(run_dir)[-1])[1]["trainer"]["average"]
    assert state["mapping.embed.weight"].shape[1] == 3  # classes
    assert any(name.startswith("background.") for name in state)


# Faults in the settings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data": "no/such/set.zip"}, ["no/such/set.zip: there is no such data set"]),
        ({"precision": "fp16"}, ["precision fp16 needs a GPU", "set --precision fp32"]),
        ({"precision": "tf32"}, ["precision tf32 needs a GPU"]),
        ({"backend": "triton"}, ["plane_channels must be a multiple of 8 and at most 64 with backend triton, got 4"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_faults_in_the_settings(
    dry: bool,
    overrides: dict[str, Any],
    words: list[str],
    tiny_config: TinyConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "lacking_on", lambda op, backend, device_type: None)  # also where Triton is not here
    assert train.main([*flags(tiny_config(**overrides)), *(["--dry-run"] if dry else [])]) == 2
    captured = capsys.readouterr()
    assert_one_error_line(captured.err, *words)
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--micro-batch", "3"], ["batch must be a positive multiple of micro_batch, got 8 and 3"]),
        (["--batch", "6"], ["set --micro-batch 3 or --batch 8"]),
        (["--batch", "7"], ["set --micro-batch 1 or --batch 8"]),
        (["--augment.p", "5"], ["augment.p must be in [0, 1], got 5"]),
        (["--patch.resolution", "32"], ["set --patch.resolution 16"]),
        (["--optim.g-lr", "nan"], ["optim.g_lr must be finite and positive"]),
        (["--device", "abacus"], ["device must be cpu or cuda, got 'abacus'"]),
        (["--seed", "-1"], ["seed must be in [0, 2^32), got -1"]),
        (["--camera.cube-scale", "0.1"], ["the view frustum reaches 0.474", "set --camera.cube-scale 0.475"]),
        (["--resume", "no/such/run"], ["no/such/run holds no readable checkpoint"]),
    ],
)
def test_faults_on_the_command_line(
    extra: list[str], words: list[str], tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*flags(tiny_config()), *extra]) == 2
    assert_one_error_line(capsys.readouterr().err, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("size", [10**13, 10**18])
def test_networks_of_any_size(
    size: int, dry: list[str], tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Larger than the memory, and than any number of bytes: an estimate, or one line."""
    code = train.main([*flags(tiny_config()), "--generator.z-dim", str(size), *dry])
    captured = capsys.readouterr()
    if dry and size == 10**13:
        assert code == 0
        assert "parameters: G 160,000,000" in captured.out
    else:
        assert code == 2
        assert_one_error_line(captured.err, "needs more memory than the", "not even one image fits")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("epigraf_fast.training.start.choose_backends", lambda *args: {})
    monkeypatch.setattr("epigraf_fast.training.start.set_arithmetic", lambda *args: None)
    monkeypatch.setattr("epigraf_fast.training.networks._require_code", lambda device: None)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 2, but torch sees 2 GPUs .*--nproc_per_node 2"):
        train.pick_device(tiny_config(device="cuda"), World(2, 3, 2))
    with pytest.raises(UserError, match="of 3 processes each takes the GPU of its LOCAL_RANK: give --device cuda,"):
        train.pick_device(tiny_config(device="cuda:1"), World(1, 3, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu(tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*flags(tiny_config()), "--device", "cuda"]) == 2
    assert_one_error_line(capsys.readouterr().err, "torch sees no GPU", "epigraf doctor")


# Runs


def run(config: Config, *extra: str) -> int:
    return train.main([*flags(config), *extra])


def test_what_a_finished_run_leaves(
    tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    config = tiny_config(
        kimg=0.048,
        log_kimg=0.016,
        snapshot_kimg=0.024,
        checkpoint_kimg=0.016,
        keep_checkpoints=2,
        turntable=2,
        metric_images=10,
        backend="reference",
        precision="auto",
    )
    assert run(config) == 0
    config, precision = settled(config, None)
    run_dir = tmp_path / "run"
    assert {path.name for path in run_dir.iterdir()} == {
        "config.json",
        "starts.jsonl",
        "stats.jsonl",
        "tensorboard",
        "samples",
        "checkpoints",
        "turntable.gif",
        "metrics.json",
    }
    start = json.loads((run_dir / "starts.jsonl").read_text())
    assert start == {"cur_nimg": 0, "device": "cpu", "choices": [precision]}
    assert precision == "precision fp32 (fp32 without TF32): a CPU is fastest in it"
    assert from_dict(json.loads((run_dir / "config.json").read_text())) == config

    lines = read_stats(run_dir / "stats.jsonl")
    assert [line["cur_nimg"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert {"kimg", *SPEED, "loss/G", "loss/D", "logits/fake", "logits/real"} <= line.keys()
        assert {"time/data", "time/G", "time/D", "time/average"} <= line.keys()
        assert sum(value for name, value in line.items() if name.startswith("time/")) <= line["sec_per_kimg"]
        assert not any(name.startswith("gpu/") for name in line), "there is none"
        assert all(math.isfinite(value) for value in line.values())
    assert ["loss/R1" in line for line in lines] == [True, False, True]  # iterations 0 and 4 of 6

    assert [path.stem for path in list_checkpoints(run_dir)] == ["checkpoint-000000032", "checkpoint-000000048"]
    stored, _ = load_checkpoint(list_checkpoints(run_dir)[-1])
    assert stored == config

    samples = {path.name: path for path in (run_dir / "samples").iterdir()}
    steps = (0, 24, 48)
    assert samples.keys() == {"reals.png", *(f"{k}-{n:09d}.png" for k in ("images", "depth") for n in steps)}
    for path in samples.values():
        with PIL.Image.open(path) as image:
            assert (image.size, image.mode) == ((3 * 16, 2 * 16), "RGB")
    assert imageio.v3.imread(run_dir / "turntable.gif").shape == (36, 16, 32, 3)
    assert json.loads((run_dir / "metrics.json").read_text()) == [
        {"cur_nimg": 0, "fd_efficientnet": 10.0, "images": 10},
        {"cur_nimg": 48, "fd_efficientnet": 10.0, "images": 10},
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert {"loss/G", "loss/D", "img_per_sec", "time/G", "geometry/non_flat"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"samples/images", "samples/depth"}

    output = capsys.readouterr().out
    assert precision in output.splitlines()
    for path in ("samples/images-000000048.png", "samples/depth-000000048.png", "turntable.gif", "metrics.json"):
        assert str(run_dir / path) in output
    assert output.count("time: data ") == 1
    table = output[output.index("this run") :].splitlines()[1:8]
    assert [line.split()[-1] for line in table] == ["reference"] * 7, "the table of backends"


def test_a_used_folder_is_refused(tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(kimg=0.008)
    assert run(config) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(config) == 2
    assert_one_error_line(
        capsys.readouterr().err, "already holds a run: add --resume auto, or choose another --run-dir"
    )
    assert run(tiny_config(generator={"z_dim": 8}), "--resume", "auto") == 2
    assert_one_error_line(capsys.readouterr().err, "cannot resume: generator.z_dim is 8, but the checkpoint was made")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_longer_run_goes_on(tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--resume auto in an empty folder begins; then more kimg continue, and the change is told."""
    assert run(tiny_config(kimg=0.016), "--resume", "auto") == 0
    capsys.readouterr()
    assert run(tiny_config(kimg=0.04, optim={"g_lr": 0.001}), "--resume", "auto") == 0
    output = capsys.readouterr().out
    assert f"continuing from {tmp_path / 'run' / 'checkpoints' / 'checkpoint-000000016.pt'}" in output
    assert "  kimg: 0.016 -> 0.04\n" in output
    assert "  optim.g_lr: 0.0025 -> 0.001\n" in output
    assert [line["cur_nimg"] for line in losses(tmp_path / "run")] == [8, 16, 24, 32, 40]


LONG = {"kimg": 0.2, "checkpoint_kimg": 0.04}  # 25 steps, a checkpoint every 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs the losses of a `LONG` run that nobody stops."""
    return {"run_dir": tmp_path_factory.mktemp("undisturbed") / "run"}


@pytest.fixture
def expected(undisturbed: dict[str, Any], tiny_config: TinyConfig) -> list[dict[str, float]]:
    """The losses of a `LONG` run that nobody stops."""
    if "losses" not in undisturbed:
        assert run(tiny_config(**LONG, run_dir=str(undisturbed["run_dir"]))) == 0
        undisturbed["losses"] = losses(undisturbed["run_dir"])
    return undisturbed["losses"]


def test_kill_and_resume(tiny_config: TinyConfig, expected: list[dict[str, float]], tmp_path: Path) -> None:
    """kill -9 in the middle, then a fresh process: the losses are those of a run that nobody killed. Pictures at every
    step hold the first one up, and change nothing."""
    config, run_dir = tiny_config(**LONG), tmp_path / "run"
    process = start(*flags(tiny_config(**LONG, snapshot_kimg=0.008, grid=(8, 8))))
    wait_for_checkpoint(process, run_dir)
    process.kill()
    process.communicate(timeout=HANG)
    assert process.returncode == -signal.SIGKILL
    last = read_stats(run_dir / "stats.jsonl")[-1]["cur_nimg"]
    assert last < 200, "the run was over before it was killed"

    process = start(*flags(config), "--resume", "auto")
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    assert "continuing from" in output
    assert len(expected) == 25
    assert losses(run_dir) == expected


def test_damaged_newest_checkpoint(tiny_config: TinyConfig, expected: list[dict[str, float]], tmp_path: Path) -> None:
    """A newest checkpoint that broke off: the one before it is taken, with a warning, and the losses stay the same."""
    config, run_dir = tiny_config(**LONG), tmp_path / "run"
    assert run(tiny_config(**{**LONG, "kimg": 0.12})) == 0
    newest = list_checkpoints(run_dir)[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    (newest.parent / "checkpoint-000000160.tmp").write_bytes(b"half of it")
    with pytest.warns(UserWarning, match=r"checkpoint-000000120\.pt cannot be read .*: use the one before it"):
        assert run(config, "--resume", "auto") == 0
    assert losses(run_dir) == expected
    assert not list(newest.parent.glob("*.tmp"))


def test_sigterm_saves_and_leaves(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """A real process, with another one that reads its images."""
    config, run_dir = tiny_config(kimg=40.0, checkpoint_kimg=0.04, loader={"workers": 1}), tmp_path / "run"
    process = start(*flags(config))
    wait_for_checkpoint(process, run_dir)
    process.terminate()
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    newest = list_checkpoints(run_dir)[-1]
    message = f"stopped by signal 15; saved {newest}; go on with --run-dir {run_dir} --resume auto"
    assert message in output.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(
    number: signal.Signals,
    tiny_config: TinyConfig,
    expected: list[dict[str, float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of step 7, away from any checkpoint: the step ends, is saved, and the run goes on from there."""
    config, run_dir = tiny_config(**LONG), tmp_path / "run"
    original = step.Trainer.iteration

    def iteration(trainer: step.Trainer, *batch: torch.Tensor) -> None:
        assert gc.get_freeze_count() > 1000, "what was imported is not spared from collections"
        if trainer.iterations == 6:
            signal.raise_signal(number)
        original(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(step.Trainer, "iteration", iteration)
        assert run(config) == 128 + number
    newest = list_checkpoints(run_dir)[-1]
    assert newest.name == "checkpoint-000000056.pt"
    captured = capsys.readouterr()
    message = f"stopped by signal {number}; saved {newest}; go on with --run-dir {run_dir} --resume auto"
    assert message in captured.out.splitlines()
    assert "Traceback" not in captured.err
    assert run(config, "--resume", "auto") == 0
    assert losses(run_dir) == expected
    assert gc.get_freeze_count() == 0


TWICE = """
import signal, sys
from epigraf_fast.tools import train
from epigraf_fast.training import step
def iteration(trainer, *batch):
    signal.raise_signal(signal.SIGINT)
    print("the step goes on", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("it is still there", flush=True)
step.Trainer.iteration = iteration
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_second_interrupt_ends_at_once(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """Whatever the process does; the first one is confirmed."""
    line = [sys.executable, "-c", TWICE, *flags(tiny_config())]
    process = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False)
    assert process.returncode == -signal.SIGINT, process.stderr
    assert "the step goes on" in process.stdout
    assert "still there" not in process.stdout
    assert "stopping after this step; Ctrl-C ends at once, without saving" in process.stderr
    assert "Traceback" not in process.stderr
    assert list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize(("log_kimg", "seen_at"), [(0.008, 56), (1.0, 80)])
def test_a_loss_that_is_not_finite(
    log_kimg: float,
    seen_at: int,
    tiny_config: TinyConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From step 7 on, seen by the log or else before the next checkpoint is written: exit 1, and the last good
    checkpoint stays the last."""
    config, run_dir = tiny_config(**LONG, log_kimg=log_kimg), tmp_path / "run"
    original, calls = step.generator_loss, []

    def generator_loss(logits: torch.Tensor) -> torch.Tensor:
        calls.append(logits)
        return original(logits) * (math.nan if len(calls) >= 7 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(step, "generator_loss", generator_loss)
        assert run(config) == 1
    (good,) = list_checkpoints(run_dir)
    assert good.name == "checkpoint-000000040.pt"
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith(f"stopped: loss/G not finite at {seen_at} images; nothing was saved over the last good")
    assert str(good) in line
    assert "Lower the learning rates" in line
    assert "Traceback" not in captured.err
    _, stored = load_checkpoint(good)
    assert stored["trainer"]["cur_nimg"] == 40
    assert all(torch.isfinite(value).all() for value in stored["trainer"]["generator"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tiny_config(**{**LONG, "kimg": 0.08}), "--resume", "auto") == 0


def test_a_loss_that_is_not_finite_before_any_checkpoint(
    tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "discriminator_loss", lambda fake, real: fake.mean() * math.inf)
    assert run(tiny_config()) == 1
    assert "last good checkpoint (none yet)" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "run") == []
