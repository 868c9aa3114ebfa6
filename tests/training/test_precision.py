"""The precision modes on a GPU: short runs in each end where those in fp32 do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch

from checks import SIGMAS
from epigraf_fast.config import Config
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.tools import train
from epigraf_fast.training.distributed import World
from epigraf_fast.training.step import Trainer

SEEDS, STEPS = 4, 24


def final_losses(config: Config, device: torch.device) -> dict[str, float]:
    """Means over the second half of a run."""
    torch.manual_seed(config.seed)
    dataset = ImageDataset(config.data, use_labels=True)
    trainer = Trainer(config, dataset, device)
    batches = make_loader(dataset, config.batch, config.seed)
    for step in range(STEPS):
        if step == STEPS // 2:
            trainer.reset_statistics()
        trainer.iteration(*next(batches))
    found = trainer.statistics()
    assert all(parameter.isfinite().all() for parameter in trainer.average.parameters())
    return {name: found[name] for name in ("loss/G", "loss/D", "loss/R1")}


@pytest.fixture
def _tf32_as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU computes in fp32, and says so")
@pytest.mark.usefixtures("_tf32_as_before")
@pytest.mark.parametrize(
    "change", [{"precision": "tf32"}, {"precision": "fp16"}, {"discriminator": {"half_blocks": 4}}]
)
def test_a_short_run_ends_near_fp32(change: dict, tiny_config: Callable[..., Config]) -> None:
    """The mean over seeds differs by no more than those seeds make two means of fp32 differ."""

    def runs(**settings: object) -> dict[str, list[float]]:
        found = []
        for seed in range(SEEDS):
            config = tiny_config(seed=seed, device="cuda", **settings)
            found.append(final_losses(config, train.pick_device(config, World())))
        return {name: [losses[name] for losses in found] for name in found[0]}

    expected = runs()
    for name, values in runs(**change).items():
        noise = statistics.stdev(expected[name]) * (2 / SEEDS) ** 0.5
        assert abs(statistics.mean(values) - statistics.mean(expected[name])) <= SIGMAS * noise, name
