"""Two processes on a CPU: one step is that of one process, a run finishes, a dead process ends the job."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_part import IN_PART

from checks import assert_close
from command_lines import flags
from epigraf_fast.camera import Patch
from epigraf_fast.config import Config, DiscriminatorConfig, check
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.errors import UserError
from epigraf_fast.tools import train
from epigraf_fast.training import distributed
from epigraf_fast.training.checkpoint import list_checkpoints, load_checkpoint
from epigraf_fast.training.distributed import World, check_world
from epigraf_fast.training.log import read_stats
from epigraf_fast.training.step import Fakes, Samples, Trainer
from together import fork, train_together

TinyConfig = Callable[..., Config]


def step_of_two(config: Config, tmp_path: Path) -> list[dict[str, Any]]:
    """What the two processes saw in one step."""

    def main(rank: int) -> None:
        distributed.BUCKET = 1000  # numbers, so that the tiny networks make several
        world, device = World.from_environment(), torch.device("cpu")
        world.connect(device)
        dataset = ImageDataset(config.data, use_labels=True)
        torch.manual_seed(config.seed)
        trainer = Trainer(config, dataset, device, world)
        world.reseed(config.seed, 0)
        start = torch.get_rng_state()
        grads = gradients_of_steps(trainer)
        loader = make_loader(dataset, trainer.share, config.seed, rank=world.rank, world_size=world.size)
        trainer.iteration(*next(loader))
        result = {
            "start": start,
            "grads": grads,
            "statistics": trainer.statistics(),
            "augment_p": trainer.augment_p,
            "weights": {name: p.detach() for name, p in trainer.average.state_dict().items()},
        }
        trainer.share_statistics()
        state = trainer.state_dict()
        result["saved"] = {name: total.item() / state["counts"][name] for name, total in state["sums"].items()}
        torch.save(result, tmp_path / f"rank{world.rank}.pt")
        world.close()

    assert fork(2, main) == [0, 0]
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def gradients_of_steps(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """Filled with the gradients of G, D and R1 as the optimizers take them."""
    grads: list[dict[str, torch.Tensor]] = []
    networks = ((trainer.generator, trainer.g_optimizer), (trainer.discriminator, trainer.d_optimizer))
    for network, optimizer in networks:

        def step(network: Any = network, original: Callable[[], None] = optimizer.step) -> None:
            grads.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
            original()

        optimizer.step = step
    return grads


class Alternating(Trainer):
    """One process that does the micro-batches of two in turn, each under the random numbers of its own."""

    states: list[torch.Tensor]

    def under(self, rank: int, function: Callable[..., Any], *args: Any) -> Any:
        torch.set_rng_state(self.states[rank])
        result = function(*args)
        self.states[rank] = torch.get_rng_state()
        return result

    def _draw_fakes(self, num: int) -> Samples:
        draw = super()._draw_fakes
        draws = [self.under(rank, draw, num // 2) for rank in range(2)]
        halves = [
            draws_of.split(self.micro) for draws_of in draws
        ]  # of each phase, the share of rank 0, then that of rank 1
        order = [part for parts in zip(*halves, strict=True) for part in parts]
        return Samples(*(torch.cat(parts) for parts in zip(*order, strict=True)))

    def _with_patches(self, fakes: Samples) -> Fakes:
        """Each process sorts its own share."""
        parts = list(fakes.split(self.micro))
        shares = [Samples(*map(torch.cat, zip(*parts[rank::2], strict=True))) for rank in range(2)]
        placed = [self.under(rank, super(Alternating, self)._with_patches, share) for rank, share in enumerate(shares)]
        in_turn = [part for pair in zip(*(x.split(self.micro) for x in placed), strict=True) for part in pair]
        *tensors, patches, plans = zip(*in_turn, strict=True)
        patch = Patch(*map(torch.cat, zip(*patches, strict=True)))
        return Fakes(*map(torch.cat, tensors), patch, tuple(itertools.chain(*plans)))

    def in_turn(self, name: str) -> None:
        original, ranks = getattr(self, name), itertools.cycle((0, 1))
        setattr(self, name, lambda *args: self.under(next(ranks), original, *args))


@pytest.mark.parametrize("settings", [{}, IN_PART], ids=["whole planes", "planes in part"])
def test_gradients_are_those_of_one_process(settings: dict[str, Any], tiny_config: TinyConfig, tmp_path: Path) -> None:
    """Of G, D and R1, to 1e-6 of their largest value, and the same on both; statistics are means over both.

    Each has two micro-batches: the first stays at home, the second's backward pass sends the sum, in several buckets.
    Steps are short: Adam divides a gradient by itself, so that the last bits of D's would be the first ones of R1's.
    """
    config = tiny_config(
        batch=16,
        **{"micro_batch": 4, **settings},
        augment={"mode": "ada", "interval": 1, "p": 0.3},
        optim={"g_lr": 1e-9, "d_lr": 1e-9},
    )
    first, second = step_of_two(config, tmp_path)
    for a, b in zip(first["grads"], second["grads"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())
    assert first["statistics"] == second["statistics"] == first["saved"] == second["saved"]
    assert torch.equal(first["augment_p"], second["augment_p"])
    assert not torch.equal(first["start"], second["start"])

    dataset = ImageDataset(config.data, use_labels=True)
    torch.manual_seed(config.seed)
    trainer = Alternating(config, dataset, torch.device("cpu"))
    trainer.states = [first["start"], second["start"]]
    for name in ("_generator_phase", "_discriminator_phase", "_regularization_phase"):
        trainer.in_turn(name)
    grads = gradients_of_steps(trainer)
    batches = [next(make_loader(dataset, 8, config.seed, rank=rank, world_size=2)) for rank in range(2)]
    halves = [[part.split(4) for part in batch] for batch in batches]  # of rank 0, then of rank 1, in turn
    trainer.iteration(
        *(torch.cat([x for pair in zip(*parts, strict=True) for x in pair]) for parts in zip(*halves, strict=True))
    )
    assert len(grads) == 3
    for phase, alone, together in zip(("G", "D", "R1"), grads, first["grads"], strict=True):
        assert alone.keys() == together.keys()
        for name, expected in alone.items():
            unit = expected.abs().max().clamp(min=1e-12)
            if expected.numel() == 1:  # a sum over all pixels whose terms cancel
                unit *= 4
            assert_close(together[name] / unit, expected / unit, f"{phase}: {name}", "distributed")
    for name, expected in trainer.statistics().items():
        assert_close(torch.tensor(first["statistics"][name]), torch.tensor(expected), name)
    assert_close(first["augment_p"], trainer.augment_p, "augment_p")
    assert ("planes/share" in first["statistics"]) == bool(settings)
    assert 0 < first["statistics"].get("planes/share", 0.5) < 1


def test_a_run_of_two_and_its_continuation_by_one(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """One set of files; global batch and image count stay."""
    line = flags(tiny_config(kimg=0.032))
    first, second = train_together(tmp_path / "ended", line, line)
    assert first.code == second.code == 0, first.errors
    assert (first.output + second.output).count("initial samples:") == 1
    run_dir = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-000000032.pt"]
    assert [line["cur_nimg"] for line in read_stats(run_dir / "stats.jsonl")] == [8, 16, 24, 32]

    assert train.main([*flags(tiny_config(kimg=0.048)), "--resume", "auto"]) == 0
    lines = read_stats(run_dir / "stats.jsonl")
    assert [line["cur_nimg"] for line in lines] == [8, 16, 24, 32, 40, 48]


def test_two_go_on_exactly(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """A run of two that stopped halfway ends with the weights of one that did not."""
    settings = {"augment": {"mode": "ada", "p": 0.3}}  # adjusted every 4 steps, so in the middle of its count
    folders = tmp_path / "whole", tmp_path / "halves"
    for part, (folder, kimg) in enumerate(((folders[0], 0.04), (folders[1], 0.024), (folders[1], 0.04))):
        line = flags(tiny_config(kimg=kimg, checkpoint_kimg=0.024, run_dir=str(folder), **settings))
        line += ["--resume", "auto"] if part == 2 else []
        for ended in train_together(tmp_path / f"ended{part}", line, line):
            assert ended.code == 0, ended.errors
    whole, halves = (load_checkpoint(list_checkpoints(folder)[-1])[1] for folder in folders)
    assert whole["trainer"]["cur_nimg"] == halves["trainer"]["cur_nimg"] == 40
    assert len(whole["random"]) == 2
    assert not torch.equal(whole["random"][0]["torch"], whole["random"][1]["torch"])
    for a, b in zip(whole["random"], halves["random"], strict=True):
        assert torch.equal(a["torch"], b["torch"])
    for name in ("generator", "discriminator", "average"):
        assert all(torch.equal(halves["trainer"][name][key], x) for key, x in whole["trainer"][name].items()), name
    assert torch.equal(whole["trainer"]["augment_p"], halves["trainer"]["augment_p"])


# One process


def test_alone_nothing_is_exchanged() -> None:
    world = World()
    tensor = torch.tensor([3.0])
    world.connect(torch.device("cpu"))
    world.average([tensor])
    state = torch.get_rng_state()
    world.reseed(0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (tensor.item(), world.agree(15, 0), world.exchange("x")) == (3.0, [15, 0], ["x"])
    world.close()


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank) == (5, 8, 1)


def test_every_process_has_its_random_numbers() -> None:
    seen = set()
    for seed, cur_nimg, rank in itertools.product((0, 1), (0, 64), range(4)):
        World(rank, 4).reseed(seed, cur_nimg)
        seen.add(torch.rand(1).item())
    assert len(seen) == 16


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (3, {}, "batch must be a multiple of the 3 processes, got 8: set --batch 12"),
        (2, {"batch": 16, "micro_batch": 16}, None),
        (2, {"batch": 24, "micro_batch": 8}, "= 12, must be a multiple of micro_batch = 8"),
        (2, {"batch": 12}, "must be a multiple of micro_batch = 6, and that of discriminator.minibatch_std_group = 4"),
        (4, {"batch": 8}, None),  # two each, fewer than a group
    ],
)
def test_the_batch_is_shared(size: int, settings: dict[str, Any], message: str | None, tiny_config: TinyConfig) -> None:
    config = tiny_config(**settings)
    if message is None:
        check_world(config, World(0, size))
    else:
        with pytest.raises(UserError, match=message):
            check_world(config, World(0, size))


def test_advice_on_shares_is_accepted() -> None:
    """By the check of one process, too."""
    advised = 0
    for batch, micro, group in itertools.product(range(1, 17), (None, 1, 2, 3, 4, 8), (1, 2, 3, 4)):
        config = Config(batch=batch, micro_batch=micro, discriminator=DiscriminatorConfig(minibatch_std_group=group))
        try:
            check(config)
        except UserError:
            continue
        for size in (2, 3, 5, 8):
            try:
                check_world(config, World(0, size))
            except UserError as error:
                advice = re.findall(r"--(micro-batch|batch) (\d+)", str(error))
                assert advice
                better = dataclasses.replace(config, **{name.replace("-", "_"): int(value) for name, value in advice})
                check(better)
                check_world(better, World(0, size))
                advised += 1
    assert advised > 100


def test_shares_make_the_batch(tiny_config: TinyConfig, tiny_dataset: ImageDataset) -> None:
    """The images of all processes are those that one would take."""

    def taken(loader: Iterator) -> list[bytes]:
        return [image.numpy().tobytes() for image in next(loader)[0]]

    whole = taken(make_loader(tiny_dataset, 8, 0))
    shares = [taken(make_loader(tiny_dataset, 4, 0, rank=rank, world_size=2)) for rank in range(2)]
    assert whole == [image for pair in zip(*shares, strict=True) for image in pair]
