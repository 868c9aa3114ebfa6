"""One of the processes of test_distributed.py: a step of the tiny run, its gradients written to a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from epigraf_fast.config import from_dict
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.training import distributed
from epigraf_fast.training.distributed import World
from epigraf_fast.training.step import Trainer


def main(settings: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.BUCKET = 1000  # numbers, so that the tiny networks make several
    config = from_dict(json.loads(Path(settings).read_text()))
    world, device = World.from_environment(), torch.device("cpu")
    world.connect(device)
    dataset = ImageDataset(config.data, use_labels=True)
    torch.manual_seed(config.seed)
    trainer = Trainer(config, dataset, device, world)
    world.reseed(config.seed, 0)
    start = torch.get_rng_state()
    grads = []
    for network, optimizer in ((trainer.generator, trainer.g_optimizer), (trainer.discriminator, trainer.d_optimizer)):

        def step(network=network, original=optimizer.step) -> None:
            grads.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
            original()

        optimizer.step = step
    loader = make_loader(dataset, trainer.share, config.seed, rank=world.rank, world_size=world.size)
    trainer.iteration(*next(loader))
    result = {
        "start": start,
        "grads": grads,
        "statistics": trainer.statistics(),
        "augment_p": trainer.augment_p,
        "weights": {name: p.detach() for name, p in trainer.average.state_dict().items()},
    }
    torch.save(result, Path(out) / f"rank{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
