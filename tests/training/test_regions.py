"""Training with planes that are computed where rays look: the same losses, whatever else is on."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from epigraf_fast.config import Config, GeneratorConfig
from epigraf_fast.models import region as model_regions
from epigraf_fast.models.region import boxes_of
from epigraf_fast.training import regions
from epigraf_fast.training.regions import announcement, arrange, expected_share, is_on, sizes_of
from epigraf_fast.training.step import Trainer

TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]

GENERATOR = {"plane_resolution": 32, "noise": False}
# A lens that sees a part of the cube.
SETTINGS: dict[str, Any] = {
    "micro_batch": 4,
    "camera": {"fov": 6.0, "radius": 1.0, "ray_start": 0.88, "ray_end": 1.12, "cube_scale": 0.2},
    "patch": {"resolution": 8, "beta_start": 1.5, "beta_end": 2.0},
}


@pytest.fixture(autouse=True)
def small_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (model_regions, regions):
        monkeypatch.setattr(module, "WHOLE_BELOW", 16)


def config_of(tiny_config: TinyConfig, region: str, **overrides: Any) -> Config:
    merged = {**SETTINGS, **overrides}
    merged["generator"] = {**GENERATOR, **overrides.get("generator", {}), "region": region}
    return tiny_config(**merged)


def losses_of(trainer: Trainer, batches: Iterator, steps: int) -> list[dict[str, float]]:
    losses = []
    for _ in range(steps):
        trainer.iteration(*next(batches))
        losses.append(trainer.statistics())
        trainer.reset_statistics()
    return losses


def compare(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> list[float]:
    """Losses of a run in part and of one with whole planes; the measured shares."""
    shares = [step.pop("planes/share") for step in one]
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert math.isclose(a[name], value, rel_tol=tolerance, abs_tol=tolerance), f"step {number}: {name}"
    return shares


EVERYTHING = {
    "augment": {"mode": "ada", "interval": 2, "p": 0.3},
    "generator": {"style_mixing": 0.5},
    "renderer": {"background": "sphere", "background_samples": 3, "white_background": True},
}


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["plain", "everything"])
def test_losses_are_those_with_whole_planes(more: Any, tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    whole = losses_of(*tiny_trainer(config_of(tiny_config, "off", **more)), 10)
    part = losses_of(*tiny_trainer(config_of(tiny_config, "auto", **more)), 10)
    shares = compare(part, whole, 1e-5)
    assert min(shares) < 0.95


def test_graphs_of_several_sizes(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """Each phase has one size for all of its micro-batches then, and keeps a recording for each that comes."""
    config = config_of(tiny_config, "auto", patch={**SETTINGS["patch"], "beta_start": 0.01})
    whole = losses_of(*tiny_trainer(dataclasses.replace(config, generator=replaced(config, region="off"))), 6)
    trainer, batches = tiny_trainer(dataclasses.replace(config, cuda_graphs=True))
    compare(losses_of(trainer, batches, 6), whole, 1e-5)
    assert len(trainer.graphed["G"].recordings) > 1
    for recording in trainer.graphed["G"].recordings:
        (_, fakes) = recording.inputs
        assert len({plan.share for plan in fakes.plans}) == 1


def replaced(config: Config, **changes: Any) -> GeneratorConfig:
    return dataclasses.replace(config.generator, **changes)


def test_losses_in_double_precision(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name in ("auto", "off"):
        trainer, batches = tiny_trainer(config_of(tiny_config, name))
        for module in (trainer.generator, trainer.discriminator, trainer.average):
            module.double()
        draw_fakes = trainer._draw_fakes
        trainer._draw_fakes = lambda num, draw=draw_fakes: type(draw(0))(*(x.double() for x in draw(num)))
        trainer.labels = trainer.labels.double()
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        batches = ((images, labels.double(), angles.double()) for images, labels, angles in batches)
        results.append(losses_of(trainer, batches, 10))
        monkeypatch.undo()
        for module in (model_regions, regions):
            monkeypatch.setattr(module, "WHOLE_BELOW", 16)
    compare(*results, 1e-10)


@pytest.mark.parametrize("groups", ["strided", "consecutive"])
def test_groups_stay_together_and_micro_batches_are_sorted(groups: str) -> None:
    torch.manual_seed(0)
    first = torch.randint(0, 100, (24, 2))
    boxes = torch.cat([first, first + torch.randint(1, 100, (24, 2))], dim=1)
    order = arrange(boxes, 24, 3, 12, groups)
    assert order.sort().values.tolist() == list(range(24))
    extents = (boxes[:, 2:] - boxes[:, :2]).view(8, 3, 2).amax(dim=1).prod(dim=1)
    sizes = []
    for micro in order.view(2, 12):
        cells = micro.view(3, 4).T if groups == "strided" else micro.view(4, 3)
        for cell in cells.tolist():
            assert [x - cell[0] for x in cell] == [0, 1, 2]
            assert cell[0] % 3 == 0
            sizes.append(extents[cell[0] // 3].item())
    assert sizes == sorted(sizes, reverse=True)
    assert arrange(None, 24, 3, 12, "consecutive").tolist() == list(range(24))


def test_one_size_is_one_of_few() -> None:
    """Each is a CUDA graph: eighths of the planes, where sizes of micro-batches of their own are finer."""
    boxes = torch.tensor([[0, 0, 9, 20], [4, 4, 25, 12]])
    assert sizes_of(boxes, 64, 1, one_size=True) == [(24, 24)] * 2
    assert sizes_of(boxes, 64, 1, one_size=False) == [(10, 20), (22, 8)]


def test_patches_are_shared_by_groups(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """As D's minibatch statistics want them, sample i of a micro-batch in group i mod 2."""
    config = config_of(tiny_config, "auto", batch=16, micro_batch=8, discriminator={"minibatch_std_group": 4})
    trainer, _ = tiny_trainer(config)
    fakes = trainer._with_patches(trainer._draw_fakes(16))
    for part in fakes.split(8):
        scales = part.patch.scale.view(4, 2)
        assert (scales == scales[0]).all()
        assert scales[0, 0] != scales[0, 1]
        assert (part.patch.offset.view(4, 2, 2) == part.patch.offset[:2]).all()


def test_poses_labels_and_latents_stay_together(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, _ = tiny_trainer(config_of(tiny_config, "auto", batch=16))
    drawn = trainer._draw_fakes(16)
    placed = trainer._with_patches(drawn)
    rows = {tuple(torch.cat(row).tolist()) for row in zip(*drawn, strict=True)}
    assert {tuple(torch.cat(row).tolist()) for row in zip(*placed[:4], strict=True)} == rows
    assert len(rows) == 16


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"generator": {"region": "off"}}, False),
        ({"generator": {"plane_resolution": 8}}, False),
        ({"generator": {"backbone": "image"}}, False),
        ({"renderer": {"background": "plane"}}, False),
        ({"renderer": {"background": "sphere"}}, True),
        ({"discriminator": {"global_context": "concat"}}, False),
    ],
    ids=str,
)
def test_when_it_is_on(change: Any, expected: bool, tiny_config: TinyConfig) -> None:
    overrides = {**SETTINGS, "generator": GENERATOR}
    for name, value in change.items():
        overrides[name] = {**overrides.get(name, {}), **value}
    assert is_on(tiny_config(**overrides)) == expected


SMALL_GROUPS = {"batch": 32, "micro_batch": 8, "discriminator": {"minibatch_std_group": 2}}
SINGLE = {"batch": 32, "micro_batch": 4, "discriminator": {"minibatch_std_group": 1}}
NARROW = {"camera": {**SETTINGS["camera"], "fov": 3.0}}


def test_micro_batches_hold_patches_of_like_sizes(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    config = config_of(tiny_config, "auto", **SMALL_GROUPS)
    trainer, _ = tiny_trainer(config)
    for _ in range(4):
        fakes = trainer._with_patches(trainer._draw_fakes(32))
        boxes = boxes_of(config.camera, 32, fakes.angles, fakes.patch)
        extents = (boxes[:, 2:] - boxes[:, :2]).view(4, 2, 4, 2).amax(dim=1).prod(dim=2)  # of 4 groups a micro-batch
        assert (extents.flatten().diff() <= 0).all()
        assert extents[0, 0] > extents[-1, -1]


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 16},
        {**SINGLE, **NARROW},
        {"batch": 4, "cuda_graphs": True, **NARROW},
    ],
    ids=["groups", "sorted", "graphs"],
)
def test_expected_share_is_what_is_measured(
    settings: dict[str, Any], tiny_config: TinyConfig, tiny_trainer: TinyTrainer
) -> None:
    config = config_of(tiny_config, "auto", **settings)
    trainer, _ = tiny_trainer(config)
    state = torch.get_rng_state()
    expected = expected_share(config, trainer.angles, 0, trainer.share, trainer.micro)
    assert torch.equal(torch.get_rng_state(), state)
    shares = [x.share for _ in range(64) for x in trainer._with_patches(trainer._draw_fakes(config.batch)).plans]
    assert abs(expected - sum(shares) / len(shares)) < 0.03
    assert 0.1 < expected < 0.95


def test_the_start_of_a_run_says_what_to_expect(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    config = config_of(tiny_config, "auto", patch={"resolution": 8, "beta_start": 0.001, "anneal_kimg": 0.01})
    trainer, _ = tiny_trainer(config)
    line = announcement(config, trainer.angles, 0, trainer.share, trainer.micro)
    now, end = map(float, re.findall(r"[01]\.\d\d", line))
    assert end < now <= 1
    resumed = announcement(config, trainer.angles, 1_000_000, trainer.share, trainer.micro)
    assert re.findall(r"[01]\.\d\d", resumed) == [f"{end:.2f}"] * 2
    assert announcement(tiny_config(), trainer.angles, 0, trainer.share, trainer.micro) is None
