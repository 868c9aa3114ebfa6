"""What ends or disturbs a long run: too little memory, a disk that fills up, data that break; nothing gets lost."""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from epigraf_fast.config import Config, check
from epigraf_fast.data import ImageDataset, InfiniteSampler
from epigraf_fast.errors import SaveError, UserError
from epigraf_fast.tools import train
from epigraf_fast.training import endurance, record, snapshot
from epigraf_fast.training.checkpoint import list_checkpoints, load_checkpoint
from epigraf_fast.training.distributed import World
from epigraf_fast.training.endurance import (
    USABLE,
    explain_out_of_memory,
    is_out_of_memory,
    micro_batch_that_fits,
    sized,
)
from epigraf_fast.training.memory import meta_networks, step_bytes
from epigraf_fast.training.snapshot import read_metrics
from epigraf_fast.training.step import Trainer

TinyConfig = Callable[..., Config]
CPU = torch.device("cpu")


def run(config: Config, dataset: ImageDataset, resume: str | None = None) -> int:
    return train.train(config, dataset, CPU, resume)


# Memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_which_errors_are_about_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_torch_says_so_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_micro_batch_that_fits(tiny_config: TinyConfig) -> None:
    """At most half; a divisor of the batch; and the settings with it pass every check."""
    config = tiny_config(batch=24)
    fixed, step = step_bytes(config, *meta_networks(config, 3))

    def fits(images: float) -> int | None:
        return micro_batch_that_fits(config, 3, round((fixed + step * images / 24) / 0.9) + 1)

    assert [fits(n) for n in (1000, 12, 11.9, 8, 7.9, 4, 3.9, 2.9, 1, 0.9)] == [12, 12, 8, 8, 4, 4, 3, 2, 1, None]
    for micro in (12, 8, 4, 3, 2, 1):
        check(tiny_config(batch=24, micro_batch=micro))


@pytest.mark.parametrize("where", ["choose_layouts", "warm_up"])
def test_out_of_memory_before_the_first_step(
    where: str, tiny_config: TinyConfig, tiny_dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what is timed, which computes a micro-batch too."""

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(train, where, full)
    monkeypatch.setattr(endurance, "device_bytes", lambda device: 2**40)
    with pytest.raises(UserError, match=r"a micro-batch of 8 needs more memory .*: set --micro-batch 4"):
        train.train(tiny_config(), tiny_dataset, CPU, None, tune=True)


@pytest.mark.parametrize(("gib", "advice"), [(64, "set --micro-batch 4"), (0.000_001, "not even one image fits")])
def test_out_of_memory_in_the_first_step(
    gib: float,
    advice: str,
    tiny_config: TinyConfig,
    tiny_dataset: ImageDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def iteration(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Trainer, "iteration", iteration)
    monkeypatch.setattr(endurance, "device_bytes", lambda device: round(gib * 2**30))
    with pytest.raises(
        UserError, match=f"a micro-batch of 8 needs more memory than the {gib:.1f} GiB of cpu: {advice}"
    ):
        run(tiny_config(), tiny_dataset)


def test_the_micro_batch_that_fits_is_one_of_the_share(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes share 24 images: 12 each is what did not fit, so 8, which divides the batch, is no advice."""
    monkeypatch.setattr(endurance, "device_bytes", lambda device: 2**40)
    with (
        pytest.raises(UserError, match=r"a micro-batch of 12 needs .*: set --micro-batch 4$"),
        explain_out_of_memory(tiny_config(batch=24), 3, CPU, processes=2),
    ):
        raise MemoryError


def test_other_errors_pass(tiny_config: TinyConfig) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(tiny_config(), 3, CPU):
        raise RuntimeError("shapes do not match")


# The disk


def test_a_disk_that_is_full_for_a_while(
    tiny_config: TinyConfig,
    tiny_dataset: ImageDataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training goes on, and the next checkpoint is written."""
    config = tiny_config(kimg=0.032, checkpoint_kimg=0.008)
    original, calls = record.save_checkpoint, itertools.count(1)

    def save_checkpoint(*args: Any) -> Path:
        if next(calls) in (2, 3):
            raise SaveError("checkpoint x could not be written (No space left on device): make room")
        return original(*args)

    monkeypatch.setattr(record, "save_checkpoint", save_checkpoint)
    assert run(config, tiny_dataset) == 0
    assert [int(path.stem[-9:]) for path in list_checkpoints(Path(config.run_dir))] == [8, 32]
    assert capsys.readouterr().out.count("No space left on device): make room; training goes on") == 2


def test_a_disk_that_is_full_at_the_end(
    tiny_config: TinyConfig, tiny_dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_checkpoint(*args: Any) -> Path:
        raise SaveError("could not be written")

    monkeypatch.setattr(record, "save_checkpoint", save_checkpoint)
    with pytest.raises(SaveError, match="could not be written"):
        run(tiny_config(kimg=0.008), tiny_dataset)


# The data


@pytest.mark.parametrize("fault", ["image 005.png cannot be read", "a data loading process died"])
def test_what_was_trained_is_saved_when_the_data_break(
    fault: str, tiny_config: TinyConfig, tiny_dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run goes on from there, to the weights of a run that met no fault."""
    config = tiny_config(kimg=0.04)
    original = train.make_loader

    def make_loader(*args: Any, **kwargs: Any) -> Iterator:
        yield from itertools.islice(original(*args, **kwargs), 3)
        raise UserError(fault)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_loader", make_loader)
        with pytest.raises(
            UserError, match=rf"{fault} \(saved .*checkpoint-000000024\.pt; go on with --run-dir .* --resume auto\)"
        ):
            run(config, tiny_dataset)
    assert run(config, tiny_dataset, "auto") == 0
    resumed = load_checkpoint(list_checkpoints(Path(config.run_dir))[-1])[1]["trainer"]

    whole = tiny_config(kimg=0.04, run_dir=config.run_dir + "-whole")
    assert run(whole, tiny_dataset) == 0
    expected = load_checkpoint(list_checkpoints(Path(whole.run_dir))[-1])[1]["trainer"]
    for network in ("generator", "discriminator", "average"):
        assert all(torch.equal(resumed[network][name], value) for name, value in expected[network].items())


def deflate64(path: Path, name: str) -> None:
    """Says of a member of a zip that it is packed by a method that Python does not know."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo(name).header_offset
    central = content.index(name.encode(), content.index(b"PK\x01\x02")) - 46
    content[local + 8] = content[central + 10] = 9
    path.write_bytes(content)


def flip(path: Path, name: str) -> None:
    """Damages the content of a member."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo(name).header_offset + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("spoil", "words"), [(deflate64, "repack with Deflate"), (flip, "replace it")])
def test_a_damaged_archive_loses_nothing_that_was_trained(
    workers: int,
    spoil: Callable[[Path, str], None],
    words: str,
    tiny_config: TinyConfig,
    write_data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The last image of the epoch that the run meets: the batches before it are trained, and saved."""
    data = write_data(tmp_path / "x.zip")
    config = tiny_config(data=str(data), kimg=0.096, grid=(1, 1), loader={"workers": workers})
    dataset = ImageDataset(data, use_labels=True)
    real = torch.randperm(48, generator=torch.Generator().manual_seed(config.seed))[0] % 24  # in the grid of reals
    order = [index % 24 for index in itertools.islice(InfiniteSampler(48, config.seed), 48)]
    last = max(set(range(24)) - {int(real)}, key=order.index)
    before = order.index(last) // config.batch * config.batch
    assert before >= 8
    spoil(data, dataset.files[last])
    dataset = ImageDataset(data, use_labels=True)
    with pytest.raises(UserError, match=rf"image {dataset.files[last]} cannot be read .*{words}.* \(saved ") as caught:
        run(config, dataset)
    assert "\n" not in str(caught.value)
    assert [int(path.stem[-9:]) for path in list_checkpoints(Path(config.run_dir))] == [before]


def test_a_run_says_what_its_data_lack(
    tiny_config: TinyConfig, write_data: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(files: dict, metadata: dict) -> None:
        metadata["labels"] = [[name, 1 + number % 2] for number, (name, _) in enumerate(metadata["labels"])]
        metadata["camera_angles"] |= {"gone.png": [1.0, 1.5, 0.0]}

    config = tiny_config(data=str(write_data(tmp_path / "x.zip", edit=edit)), kimg=0.008)
    assert run(config, ImageDataset(config.data, use_labels=True)) == 0
    printed = capsys.readouterr().out
    assert "warning: classes without an image, which are never drawn: 1 of 3: 0" in printed
    assert 'warning: names in "camera_angles" without an image: 1, first gone.png' in printed


def test_data_that_break_at_once_save_nothing(
    tiny_config: TinyConfig, tiny_dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_loader(*args: Any, **kwargs: Any) -> Iterator:
        raise UserError("image 000.png cannot be read")
        yield

    monkeypatch.setattr(train, "make_loader", make_loader)
    config = tiny_config()
    with pytest.raises(UserError, match=r"cannot be read$"):
        run(config, tiny_dataset)
    assert not list_checkpoints(Path(config.run_dir))


# The best


def test_the_best_checkpoint_is_kept(
    tiny_config: TinyConfig, tiny_dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured at 0, 16, 32 and 48 images: the third is the best, and outlives the newest."""
    values = iter([9.0, 7.0, 5.0, 6.0])

    class Distance:
        def __init__(self, device: torch.device) -> None:
            pass

        def update_real(self, images: torch.Tensor) -> None:
            pass

        update_fake = update_real

        def reset_fake(self) -> None:
            pass

        def compute(self) -> float:
            return next(values)

    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    config = tiny_config(kimg=0.048, metric_kimg=0.016, metric_images=2, keep_checkpoints=1, grid=(1, 1))
    assert run(config, tiny_dataset) == 0
    run_dir = Path(config.run_dir)
    assert [(e["cur_nimg"], e["fd_efficientnet"]) for e in read_metrics(run_dir)] == [(0, 9), (16, 7), (32, 5), (48, 6)]
    (newest,) = list_checkpoints(run_dir)
    assert newest.name == "checkpoint-000000048.pt"
    assert load_checkpoint(newest.with_name("best.pt"))[1]["trainer"]["cur_nimg"] == 32


def test_the_micro_batch_follows_the_memory(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the memory for steps is twice the images; the smallest of all processes is that of all."""
    config = dataclasses.replace(tiny_config(), batch=64, micro_batch="auto")
    one = dataclasses.replace(config, micro_batch=8)
    fixed, step = 10**9, 8 * 10**8
    monkeypatch.setattr(endurance, "meta_networks", lambda config, label_dim: ())
    monkeypatch.setattr(endurance, "step_bytes", lambda config: (fixed, step * config.micro // 8))
    device = torch.device("cpu")

    def micro(free: float, world: World | None = None) -> int:
        chosen, said = sized(config, 3, device, world or World(), int(free))
        assert said.startswith(f"micro-batch {chosen.micro_batch}, by ")
        return chosen.micro_batch

    assert micro((fixed + 2.01 * step) / USABLE) == 16
    assert micro((fixed + 4.01 * step) / USABLE) == 32
    assert micro((fixed + 3.9 * step) / USABLE) == 16  # a divisor of the batch
    assert micro(1e15) == 64
    assert micro(fixed / 2) == 1
    assert sized(config, 3, device, World())[0].micro_batch == 8
    assert sized(one, 3, device, World()) == (one, "")

    class Two(World):
        def exchange(self, value: int) -> list[int]:
            return [value, 4]

    assert micro(1e15, Two(0, 2, 0)) == 4
