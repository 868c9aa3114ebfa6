"""Checkpoints: exact continuation, whole files or none, no code in them, and what may change on resume."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import random
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_part import IN_PART

from checks import small_files
from epigraf_fast.config import Config
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.errors import SaveError, UserError
from epigraf_fast.training.checkpoint import (
    check_resumable,
    checkpoint_path,
    find_checkpoint,
    keep_best,
    list_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from epigraf_fast.training.regions import is_on
from epigraf_fast.training.step import Trainer

TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nests of dicts, sequences, tensors and plain values differ in any bit."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: lengths {len(a)}, {len(b)}"]
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{path}[{i}]")]
    same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


def save_tiny(run_dir: Path, config: Config, cur_nimg: int, keep: int = 3) -> Path:
    """A checkpoint without networks."""
    return save_checkpoint(run_dir, config, {"cur_nimg": cur_nimg, "value": torch.arange(1000)}, keep)


def names(run_dir: Path) -> list[int]:
    return [int(path.stem.split("-")[1]) for path in list_checkpoints(run_dir)]


def damage(path: Path) -> None:
    """A copy that broke off."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# Exact continuation


@pytest.mark.parametrize("draws", [1, 2])  # numpy and python keep the second normal number of a pair
def test_random_states_go_on(draws: int, tmp_path: Path, tiny_config: TinyConfig) -> None:
    def numbers(count: int) -> list[float]:
        return [
            *(random.gauss(0, 1) for _ in range(count)),
            *np.random.standard_normal(count),  # noqa: NPY002 - the global generator is what is stored
            *torch.randn(count).tolist(),
        ]

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    numbers(draws)
    path = save_tiny(tmp_path, tiny_config(), 8)
    expected = numbers(3)
    numbers(5)
    set_random_state(*load_checkpoint(path)[1]["random"])
    assert numbers(3) == expected


@pytest.mark.parametrize("planes", ["whole", "in part"])
@pytest.mark.parametrize("steps", [1, 5])
def test_continuation_is_exact(
    steps: int, planes: str, tmp_path: Path, tiny_config: TinyConfig, tiny_trainer: TinyTrainer
) -> None:
    """2 N steps against N, a checkpoint, new objects under other random states, and N."""
    config = tiny_config(optim={"r1_interval": 2}, **(IN_PART if planes == "in part" else {}))
    assert is_on(config) == (planes == "in part")
    trainer, batches = tiny_trainer(config)
    trainer.augment_p.fill_(0.25)
    for _ in range(2 * steps):
        trainer.iteration(*next(batches))
    expected, expected_statistics, expected_random = trainer.state_dict(), trainer.statistics(), random_state()

    trainer, batches = tiny_trainer(config)
    trainer.augment_p.fill_(0.25)
    for _ in range(steps):
        trainer.iteration(*next(batches))
    path = save_checkpoint(tmp_path, config, trainer.state_dict(), 1)
    del trainer, batches

    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    stored_config, stored = load_checkpoint(path)
    assert stored_config == config
    dataset = ImageDataset(config.data, use_labels=True)
    trainer = Trainer(stored_config, dataset, torch.device("cpu"))
    trainer.load_state_dict(stored["trainer"])
    set_random_state(*stored["random"])
    for batch, _ in zip(make_loader(dataset, config.batch, config.seed, trainer.cur_nimg), range(steps), strict=False):
        trainer.iteration(*batch)
    assert differences(trainer.state_dict(), expected) == []
    assert trainer.statistics() == expected_statistics
    assert 0 < expected_statistics.get("planes/share", 0.5) < 1
    assert differences(random_state(), expected_random) == []
    assert trainer.counts["loss/G"] == 2 * steps * (config.batch // config.micro)
    assert trainer.augment_p == 0.25


def test_moments_have_the_layout_of_their_parameters(
    tmp_path: Path, tiny_config: TinyConfig, tiny_trainer: TinyTrainer
) -> None:
    """A checkpoint may hold moments of another layout than D's: a CPU's fused Adam would read them as they lie in
    memory, and a GPU's refuses them."""
    config = tiny_config()
    trainer, batches = tiny_trainer(config)
    trainer.iteration(*next(batches))
    path = save_checkpoint(tmp_path, config, trainer.state_dict(), 1)
    other, _ = tiny_trainer(config)
    other.discriminator.to(memory_format=torch.contiguous_format)
    other.load_state_dict(load_checkpoint(path)[1]["trainer"])
    laid_out = 0
    for optimizer, known in ((other.g_optimizer, trainer.g_optimizer), (other.d_optimizer, trainer.d_optimizer)):
        states = zip(optimizer.state.items(), known.state.values(), strict=True)
        for (parameter, moments), expected in states:
            for name in ("exp_avg", "exp_avg_sq"):
                assert moments[name].stride() == parameter.stride()
                assert torch.equal(moments[name], expected[name])
                laid_out += moments[name].stride() != expected[name].stride()
    assert laid_out > 0


def test_settings_in_force_are_the_new_ones(tmp_path: Path, tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """Learning rates and betas come from the settings, not from the checkpoint."""
    config = tiny_config()
    trainer, batches = tiny_trainer(config)
    trainer.iteration(*next(batches))
    path = save_checkpoint(tmp_path, config, trainer.state_dict(), 1)
    moments = trainer.g_optimizer.state_dict()["state"]

    slower, _ = tiny_trainer(tiny_config(optim={"g_lr": 1e-5, "d_lr": 2e-5, "beta2": 0.9}))
    wanted = [dict(o.param_groups[0]) for o in (slower.g_optimizer, slower.d_optimizer)]
    slower.load_state_dict(load_checkpoint(path)[1]["trainer"])
    for before, optimizer in zip(wanted, (slower.g_optimizer, slower.d_optimizer), strict=True):
        (after,) = optimizer.param_groups
        assert (after["lr"], after["betas"]) == (before["lr"], before["betas"])
        assert all(a is b for a, b in zip(after["params"], before["params"], strict=True))
    assert slower.g_optimizer.param_groups[0]["lr"] == 1e-5
    assert differences(slower.g_optimizer.state_dict()["state"], moments) == []


def test_another_number_of_classes(
    tmp_path: Path, tiny_config: TinyConfig, tiny_trainer: TinyTrainer, write_data: Callable[..., Path]
) -> None:
    config = tiny_config()
    trainer, _ = tiny_trainer(config)
    path = save_checkpoint(tmp_path, config, trainer.state_dict(), 1)

    def one_class_more(files: dict, metadata: dict) -> None:
        metadata["labels"][0][1] = 7

    other = write_data(tmp_path / "other.zip", edit=one_class_more)
    trainer, _ = tiny_trainer(dataclasses.replace(config, data=str(other)))
    with pytest.raises(UserError, match="the checkpoint's generator does not fit, the data set has other labels"):
        trainer.load_state_dict(load_checkpoint(path)[1]["trainer"])


def test_what_is_saved_is_taken_up(tmp_path: Path, tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """A value that were missing would be taken from the new run in silence."""
    config = tiny_config(
        generator={"backbone": "image"},
        optim={"path_length_weight": 2.0, "path_length_interval": 1},
        augment={"mode": "ada", "interval": 1},
    )
    trainer, batches = tiny_trainer(config)
    trainer.iteration(*next(batches))
    trainer.real_signs.copy_(torch.tensor([3.0, 8.0]))
    path = save_checkpoint(tmp_path, config, trainer.state_dict(), 1)
    names = {"generator", "discriminator", "average", "g_optimizer", "d_optimizer", "cur_nimg", "iterations", "sums"}
    names |= {"augment_p", "real_signs", "path_length", "loss_scale", "counts", "label_values", "backends"}
    stored = load_checkpoint(path)[1]["trainer"]
    assert stored.keys() == names
    other, _ = tiny_trainer(config)
    other.load_state_dict(stored)
    assert trainer.path_length > 0
    for name in ("path_length", "real_signs", "augment_p"):
        assert torch.equal(getattr(other, name), getattr(trainer, name)), name
    assert other.statistics() == trainer.statistics()


# Files


def test_the_file_is_plain_data(tmp_path: Path, tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    config = tiny_config()
    trainer, batches = tiny_trainer(config)
    trainer.iteration(*next(batches))
    path = save_checkpoint(tmp_path, config, trainer.state_dict(), 1)
    assert path == checkpoint_path(tmp_path, 8)
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"format", "version", "config", "trainer", "random"}
    assert content["trainer"].keys() >= {"generator", "discriminator", "average", "g_optimizer", "d_optimizer"}
    assert content["config"]["generator"]["z_dim"] == 16


class Malicious:
    """Unpickling it makes a directory."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused(legacy: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "broken_in"
    content = {"format": "epigraf_fast", "version": 1, "trainer": Malicious(target)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the trap does work


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "broken_in"
    path.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(UserError, match="is no checkpoint but a pickle"):
        load_checkpoint(path)
    assert not target.exists()


def test_damaged_files(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Broken off anywhere, or garbage: one line that names the file."""
    path = save_tiny(tmp_path, tiny_config(), 8)
    whole = path.read_bytes()
    ends = [0, 1, 2, 4, 100, *range(200, len(whole), len(whole) // 40), len(whole) - 1]
    contents = [whole[:end] for end in ends]
    contents += [b"not a checkpoint\n", bytes(5000), whole[100:], b"PK\x03\x04" + bytes(100)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_checkpoint(path)
        assert str(caught.value).startswith(f"checkpoint {path} cannot be read (")
        assert "\n" not in str(caught.value)


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not a checkpoint of epigraf_fast"),
        ({"weights": torch.zeros(2)}, "is not a checkpoint of epigraf_fast"),
        ({"format": "epigraf_fast", "version": 99}, "has version 99, this release reads version 1"),
        (
            {"format": "epigraf_fast", "version": 1, "config": {"colour": 3}, "trainer": {}, "random": {}},
            "stored settings do not fit this version.*colour",
        ),
    ],
)
def test_files_of_others(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "other.pt")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*none\.pt"):
        load_checkpoint(tmp_path / "none.pt")


# Killed while writing


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_last_checkpoint(
    where: str, tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    good = save_tiny(tmp_path, config, 8)

    def fail(*args: Any, **kwargs: Any) -> None:
        if where == "torch.save":
            args[1].write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        module, name = where.split(".")
        patch.setattr({"torch": torch, "os": os}[module], name, fail)
        with pytest.raises(
            SaveError, match=r"checkpoint-000000016\.pt could not be written \(No space left on device\)"
        ):
            save_tiny(tmp_path, config, 16)
    assert names(tmp_path) == [8]
    assert load_checkpoint(good)[1]["trainer"]["cur_nimg"] == 8
    assert find_checkpoint("auto", tmp_path) == good
    assert not list(good.parent.glob("*.tmp"))  # the half of it makes room again

    save_tiny(tmp_path, config, 24)
    assert sorted(path.name for path in good.parent.iterdir()) == ["checkpoint-000000008.pt", "checkpoint-000000024.pt"]


def test_a_truncated_temporary_file_is_no_checkpoint(tmp_path: Path, tiny_config: TinyConfig) -> None:
    good = save_tiny(tmp_path, tiny_config(), 8)
    left = good.with_name("checkpoint-000000016.tmp")
    left.write_bytes(good.read_bytes()[:100])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint("auto", tmp_path) == good
    save_tiny(tmp_path, tiny_config(), 16)
    assert names(tmp_path) == [8, 16]
    assert left.exists()  # another process may be writing it; see test_lock.py


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_a_truncated_newest_one_is_passed_over(resume: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    for cur_nimg in (8, 16, 24):
        newest = save_tiny(tmp_path, tiny_config(), cur_nimg)
    damage(newest)
    with pytest.warns(UserWarning, match=r"checkpoint-000000024\.pt cannot be read .*: use the one before it"):
        found = find_checkpoint("auto" if resume == "auto" else str(tmp_path), tmp_path)
    assert found == checkpoint_path(tmp_path, 16)


def test_all_damaged(tmp_path: Path, tiny_config: TinyConfig) -> None:
    damage(save_tiny(tmp_path, tiny_config(), 8))
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(UserError, match="holds no readable checkpoint"),
    ):
        find_checkpoint("auto", tmp_path)


def test_a_full_disk_of_a_real_file(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """The system refuses to let the file grow beyond 4000 bytes, in the middle of torch's writer."""
    config = tiny_config()
    good = save_tiny(tmp_path, config, 8)
    message = r"could not be written \(File too large\): make room; the last one is checkpoint-000000008"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with small_files(4000), pytest.raises(SaveError, match=message):
            save_tiny(tmp_path, config, 16)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in good.parent.iterdir()] == ["checkpoint-000000008.pt"]
    assert load_checkpoint(good)[1]["trainer"]["cur_nimg"] == 8


def test_a_flipped_bit(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Anywhere: it is found, or it changes nothing. In a tensor torch itself would read it without a word."""
    path = save_tiny(tmp_path, tiny_config(), 8)
    whole, (_, before) = path.read_bytes(), load_checkpoint(path)
    value = torch.arange(1000).numpy().tobytes()
    found = 0
    for place in (whole.index(value) + 4001, *range(0, len(whole), len(whole) // 150)):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        path.write_bytes(flipped)
        try:
            _, after = load_checkpoint(path)
        except UserError:
            found += 1
        else:
            assert differences(before, after) == [], f"byte {place}"
    assert found > 75

    flipped = bytearray(whole)
    flipped[whole.index(value) + 4001] ^= 16
    path.write_bytes(flipped)
    assert not torch.equal(torch.load(path, weights_only=True)["trainer"]["value"], torch.arange(1000))
    with pytest.raises(UserError, match=r"the checksum of \S+/data/\d+ is wrong|Bad CRC"):
        load_checkpoint(path)


def test_a_flipped_bit_falls_back(tmp_path: Path, tiny_config: TinyConfig) -> None:
    for cur_nimg in (8, 16):
        newest = save_tiny(tmp_path, tiny_config(), cur_nimg)
    content = bytearray(newest.read_bytes())
    content[content.index(torch.arange(1000).numpy().tobytes()) + 100] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint-000000016\.pt cannot be read .*: use the one before it"):
        assert find_checkpoint("auto", tmp_path) == checkpoint_path(tmp_path, 8)


@pytest.mark.parametrize("links", [True, False])
def test_the_best_is_kept(
    links: bool, tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the newest, and it is no candidate for resuming."""

    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    save_tiny(tmp_path, tiny_config(), 8, keep=1)
    best = keep_best(tmp_path, 8)
    assert best.name == "best.pt"
    save_tiny(tmp_path, tiny_config(), 16, keep=1)
    assert names(tmp_path) == [16]
    assert load_checkpoint(best)[1]["trainer"]["cur_nimg"] == 8
    assert find_checkpoint("auto", tmp_path) == checkpoint_path(tmp_path, 16)
    assert load_checkpoint(keep_best(tmp_path, 16))[1]["trainer"]["cur_nimg"] == 16
    assert keep_best(tmp_path, 24) is None
    assert load_checkpoint(best)[1]["trainer"]["cur_nimg"] == 16
    assert not list(best.parent.glob("*.tmp"))


def test_keep(tmp_path: Path, tiny_config: TinyConfig) -> None:
    kept = []
    for cur_nimg in range(8, 48, 8):
        save_tiny(tmp_path, tiny_config(), cur_nimg, keep=2)
        kept.append(names(tmp_path))
    assert kept == [[8], [8, 16], [16, 24], [24, 32], [32, 40]]
    save_tiny(tmp_path, tiny_config(), 48, keep=1)
    assert names(tmp_path) == [48]


def test_the_one_just_written_is_kept(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """After a damaged newest one was passed over, on the way to overwriting it."""
    for cur_nimg in (8, 16, 24):
        newest = save_tiny(tmp_path, tiny_config(), cur_nimg)
    damage(newest)
    path = save_tiny(tmp_path, tiny_config(), 20, keep=1)
    assert path.is_file()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert find_checkpoint("auto", tmp_path) == path


# What --resume means


def test_find_checkpoint(tmp_path: Path, tiny_config: TinyConfig) -> None:
    run, other, empty = tmp_path / "run", tmp_path / "other", tmp_path / "empty"
    assert find_checkpoint(None, run) is None
    assert find_checkpoint("auto", run) is None
    old, new = save_tiny(run, tiny_config(), 8), save_tiny(run, tiny_config(), 16)
    assert find_checkpoint("auto", run) == new
    assert find_checkpoint(str(run), run) == new
    assert find_checkpoint(str(new), run) == new
    # Branches off into a folder of their own.
    assert find_checkpoint(str(old), empty) == old
    assert find_checkpoint(str(run), empty) == new
    for resume in (str(tmp_path / "nothing"), str(empty)):
        with pytest.raises(UserError, match="holds no readable checkpoint"):
            find_checkpoint(resume, other)


def test_a_run_is_not_mixed_with_another(tmp_path: Path, tiny_config: TinyConfig) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    old, _ = save_tiny(run, tiny_config(), 8), save_tiny(run, tiny_config(), 16)
    save_tiny(other, tiny_config(), 8)
    with pytest.raises(UserError, match="already holds a run: add --resume auto, or choose another --run-dir"):
        find_checkpoint(None, run)
    for resume in (old, other, checkpoint_path(other, 8)):
        with pytest.raises(UserError, match=r"already holds a run that reaches checkpoint-000000016\.pt"):
            find_checkpoint(str(resume), run)


def test_other_files_are_no_checkpoints(tmp_path: Path, tiny_config: TinyConfig) -> None:
    path = save_tiny(tmp_path, tiny_config(), 8)
    for name in ("checkpoint-9.pt", "checkpoint-000000009.pt.bak", "best.pt"):
        (path.parent / name).write_bytes(b"")
    assert list_checkpoints(tmp_path) == [path]


# What may change on resume


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resolution", 32),
        ("seed", 1),
        ("generator", {"plane_resolution": 16}),
        ("generator", {"pose_conditioning": False}),
        ("discriminator", {"modulate": "output"}),
        ("discriminator", {"minibatch_std_group": 2}),
        ("discriminator", {"clamp": 0.0}),
        ("generator", {"clamp": 0.0}),
        ("generator", {"noise": False}),
        ("renderer", {"background": "sphere"}),
        ("patch", {"resolution": 16}),
        ("loader", {"labels": False}),
        ("loader", {"mirror": False}),
    ],
)
def test_fatal_differences(name: str, value: Any, tiny_config: TinyConfig) -> None:
    setting = f"{name}.{next(iter(value))}" if isinstance(value, dict) else name
    new = next(iter(value.values())) if isinstance(value, dict) else value
    with pytest.raises(UserError, match=rf"cannot resume: {setting} is {new}, but the checkpoint was made with"):
        check_resumable(tiny_config(), tiny_config(**{name: value}))


def test_harmless_differences(tiny_config: TinyConfig) -> None:
    old = tiny_config()
    assert check_resumable(old, old) == []
    new = tiny_config(
        kimg=1.0,
        batch=16,
        run_dir="runs/elsewhere",
        optim={"g_lr": 0.001},
        generator={"pose_swap_kimg": 3.0, "pose_dropout": 0.5, "pose_swap_probability": 0.3, "style_mixing": 0.4},
        renderer={"background_samples": 3, "background_start": 0.9},
        discriminator={"camera_dropout": 0.1, "half_blocks": 1},
        patch={"anneal_kimg": 7.0},
        loader={"workers": 3},
    )
    lines = check_resumable(old, new)
    assert "kimg: 0.04 -> 1.0" in lines
    assert "optim.g_lr: 0.0025 -> 0.001" in lines
    assert {line.split(":")[0] for line in lines} == {
        "kimg",
        "batch",
        "run_dir",
        "optim.g_lr",
        "generator.pose_swap_kimg",
        "generator.pose_dropout",
        "generator.pose_swap_probability",
        "generator.style_mixing",
        "renderer.background_samples",
        "renderer.background_start",
        "discriminator.camera_dropout",
        "discriminator.half_blocks",
        "patch.anneal_kimg",
        "loader.workers",
    }
