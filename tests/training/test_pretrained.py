"""Where a generator is found, and what is said when it is none."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.runs.colours import data_statistics, statistics_of
from epigraf_fast.config import Config
from epigraf_fast.data import ImageDataset
from epigraf_fast.errors import UserError
from epigraf_fast.tools.convert import export_generator
from epigraf_fast.training.checkpoint import save_checkpoint
from epigraf_fast.training.networks import find_device
from epigraf_fast.training.pretrained import (
    check_finite,
    find_generator,
    load_generator,
    load_safetensors,
    save_safetensors,
)
from epigraf_fast.training.sampling import latents_of_seeds
from epigraf_fast.training.step import Trainer

TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]


@pytest.fixture
def saved(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> tuple[Config, Trainer, Path]:
    """A run's settings, its trainer and its checkpoint, at the beginning."""
    config = tiny_config()
    trainer, _ = tiny_trainer(config)
    return config, trainer, save_checkpoint(Path(config.run_dir), config, trainer.state_dict(), keep=3)


def test_the_average_comes_back(saved: tuple[Config, Trainer, Path]) -> None:
    """From the file, its folder and the run; the random state stays where it was."""
    config, trainer, path = saved
    with torch.no_grad():
        trainer.average.decoder.fc1.bias += 1
    save_checkpoint(Path(config.run_dir), config, trainer.state_dict(), keep=3)
    before = torch.get_rng_state()
    for source in (path, path.parent, path.parent.parent):
        loaded, generator = load_generator(source, "cpu")
        assert loaded == config
        assert not generator.training
        assert not any(p.requires_grad for p in generator.parameters())
        for name, value in trainer.average.state_dict().items():
            assert torch.equal(generator.state_dict()[name], value), name
    assert torch.equal(torch.get_rng_state(), before)


def test_safetensors_hold_settings_and_tensors(saved: tuple[Config, Trainer, Path], tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="needs the extra tools")
    config, trainer, _ = saved
    state = trainer.average.state_dict()
    path = tmp_path / "converted" / "G_ema.safetensors"
    path.parent.mkdir()
    save_safetensors(state, config, path)
    loaded, tensors, label_values = load_safetensors(path)
    assert loaded == config
    assert label_values is None
    assert tensors.keys() == state.keys()
    assert find_generator(path.parent) == path
    assert torch.equal(load_generator(path.parent, "cpu")[1].decoder.fc0.weight, trainer.average.decoder.fc0.weight)


def test_the_model_that_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, whatever lies in this folder; it names no place of the machine it was made on; colours follow z."""
    pytest.importorskip("safetensors", reason="needs the extra tools")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin").mkdir()
    config, generator = load_generator(Path("builtin"), "cpu")
    assert (config.data, config.resolution, config.run_dir) == ("builtin", 64, "runs/builtin")
    assert find_generator(Path("builtin")).stat().st_size < 12e6
    dataset = ImageDataset("builtin", 64)
    found = statistics_of(generator, dataset, config, 16)
    assert found["objects"] == 16
    assert found["spread"] > 0.25 * data_statistics(dataset, 64)["spread"]


def test_a_checkpoint_of_another_shape_is_one_line(saved: tuple[Config, Trainer, Path], tmp_path: Path) -> None:
    """A tensor that is too large, missing or unknown is named."""
    _, _, path = saved
    for change, words in (
        (lambda state: state.update({"decoder.fc0.bias": torch.zeros(9)}), "decoder.fc0.bias"),
        (lambda state: state.pop("decoder.fc0.bias"), "decoder.fc0.bias"),
        (lambda state: state.update({"decoder.fc7.bias": torch.zeros(9)}), "decoder.fc7.bias"),
    ):
        content = torch.load(path, weights_only=True)
        change(content["trainer"]["average"])
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=rf"x\.pt: the generator does not fit its settings: .*{words}") as caught:
            load_generator(tmp_path / "x.pt", "cpu")
        assert "\n" not in str(caught.value)


def test_an_image_generator_has_no_planes(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    config = tiny_config(generator={"backbone": "image"})
    trainer, _ = tiny_trainer(config)
    path = save_checkpoint(Path(config.run_dir), config, trainer.state_dict(), keep=3)
    with pytest.raises(UserError, match="it has no planes to look into"):
        load_generator(path, "cpu")
    _, generator = load_generator(path, "cpu", three_d=False)
    assert generator.state_dict().keys() == trainer.average.state_dict().keys()


def test_faults_are_one_line(
    saved: tuple[Config, Trainer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra tools")
    config, trainer, _ = saved
    empty = tmp_path / "empty"
    empty.mkdir()
    broken, foreign, odd = (tmp_path / f"{name}.safetensors" for name in ("broken", "foreign", "odd"))
    broken.write_bytes(b"no safetensors")
    safetensors.save_file({"x": torch.zeros(1)}, foreign)
    safetensors.save_file({"x": torch.zeros(1)}, odd, metadata={"config": json.dumps([1])})
    for path, words in (
        (empty, "holds no checkpoint"),
        (tmp_path / "none.pt", "there is no checkpoint"),
        (tmp_path / "none.safetensors", "there is no file"),
        (broken, "cannot be read as safetensors"),
        (foreign, "was not written by epigraf_fast"),
        (odd, "was not written by epigraf_fast"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_generator(path, "cpu")
        assert "\n" not in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU"):
            find_device("cuda")
    state = {"a": torch.zeros(2), "b": torch.tensor([1.0, torch.inf])}
    with pytest.raises(UserError, match="G: b is not finite"):
        check_finite(state, "G")
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"safetensors is not installed: pip install -e '\.\[tools\]'"):
        save_safetensors(trainer.average.state_dict(), config, tmp_path / "y.safetensors")


def skip_class_0(files: dict, metadata: dict) -> None:
    metadata["labels"] = [[name, 1 + 2 * (number % 2)] for number, (name, _) in enumerate(metadata["labels"])]


def vectors(files: dict, metadata: dict) -> None:
    metadata["labels"] = [[name, [0.5, number % 2]] for number, (name, _) in enumerate(metadata["labels"])]


def test_labels_are_drawn_from_those_that_have_images(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tmp_path: Path, write_data: Callable[..., Path]
) -> None:
    """Classes 1 and 3 of four: the checkpoint and its export know them, a checkpoint of before draws all."""
    config = tiny_config(data=str(write_data(tmp_path / "x.zip", edit=skip_class_0)))
    trainer, _ = tiny_trainer(config)
    path = save_checkpoint(tmp_path / "run", config, trainer.state_dict(), keep=1)
    _, generator = load_generator(path, "cpu")
    assert latents_of_seeds(generator, range(4))[1].argmax(dim=1).tolist() == [1, 3, 1, 3]
    assert latents_of_seeds(generator, range(4), [0, 2])[1].argmax(dim=1).tolist() == [0, 2, 0, 2]  # if one wants so
    with pytest.raises(UserError, match="from 0 to 3, got 4"):
        latents_of_seeds(generator, [0], [1, 4])

    export_generator(path, tmp_path / "exported")
    assert load_generator(tmp_path / "exported", "cpu")[1].label_values.tolist() == [1, 3]

    state = trainer.state_dict()
    del state["label_values"]
    _, generator = load_generator(save_checkpoint(tmp_path / "old", config, state, keep=1), "cpu")
    assert latents_of_seeds(generator, range(4))[1].argmax(dim=1).tolist() == [0, 1, 2, 3]
    trainer.load_state_dict(state)  # goes on, and knows them from then on
    assert trainer.state_dict()["label_values"].tolist() == [1, 3]


def test_vectors_of_labels_are_drawn_as_they_were(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tmp_path: Path, write_data: Callable[..., Path]
) -> None:
    """Not as classes, of which a vector has none."""
    config = tiny_config(data=str(write_data(tmp_path / "x.zip", edit=vectors)))
    trainer, _ = tiny_trainer(config)
    path = save_checkpoint(tmp_path / "run", config, trainer.state_dict(), keep=1)
    export_generator(path, tmp_path / "exported")
    for source in (path, tmp_path / "exported"):
        _, generator = load_generator(source, "cpu")
        assert latents_of_seeds(generator, range(3))[1].tolist() == [[0.5, 0], [0.5, 1], [0.5, 0]]
        with pytest.raises(UserError, match="vectors of labels: it has no classes"):
            latents_of_seeds(generator, [0], [1])


def test_a_damaged_checkpoint_is_one_line(saved: tuple[Config, Trainer, Path], tmp_path: Path) -> None:
    _, _, path = saved
    shutil.copy(path, tmp_path / "x.pt")
    with open(tmp_path / "x.pt", "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(UserError, match="cannot be read"):
        load_generator(tmp_path / "x.pt", "cpu")
