"""The precisions: their gradients with products rounded as on a GPU, the scaled loss, and what a device gets.

On a GPU short runs in each end where those in fp32 do.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import precision as rounded
from bench.rounding import to_tf32
from checks import SIGMAS
from epigraf_fast.config import Config, preset, to_dict
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.errors import DivergenceError, UserError
from epigraf_fast.ops import convolution
from epigraf_fast.ops.verdicts import FAILED, PASSED
from epigraf_fast.tools import train
from epigraf_fast.training import gradients, proof, proof_items
from epigraf_fast.training.checkpoint import check_resumable
from epigraf_fast.training.distributed import World
from epigraf_fast.training.endurance import SKIPPED_STEPS, require_finite
from epigraf_fast.training.gradients import LossScale, step_unless
from epigraf_fast.training.networks import set_arithmetic
from epigraf_fast.training.precision import MODES, require, settled
from epigraf_fast.training.proof_items import BEGUN, Sizes
from epigraf_fast.training.step import SKIPPED, Trainer
from together import fork

SEEDS, STEPS = 4, 24
TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]


@pytest.fixture
def _tf32_as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# Gradients


def small() -> Config:
    """The demo preset with fewer channels, planes and patches of 16 x 16, micro-batches of 4, rates that a few steps
    learn by, fakes of D's own, samples along rays that are drawn, and cameras that D sees."""
    demo = preset("demo")
    sizes = {"channel_max": 16, "channel_base": 128, "plane_resolution": 16, "plane_channels": 4}
    of_d = {"channel_base": 256, "channel_max": 16, "code_dim": 16, "patch_table_dim": 4, "patch_skip_highest": 0}
    return dataclasses.replace(
        demo,
        batch=4,
        generator=dataclasses.replace(demo.generator, **sizes, decoder_hidden=8, z_dim=16, w_dim=16),
        renderer=dataclasses.replace(demo.renderer, coarse_samples=6, fine_samples=4, stochastic=True),
        discriminator=dataclasses.replace(demo.discriminator, **of_d, camera_conditioning=True),
        patch=dataclasses.replace(demo.patch, resolution=16, anneal_kimg=60.0),
        optim=dataclasses.replace(demo.optim, g_lr=0.006, d_lr=0.008, reuse_fakes=False),
    )


def test_gradients_of_every_precision_are_near_those_of_float64() -> None:
    """Of a network that was trained a little, with what a GPU rounds; losing few gradients in half precision."""
    halves = ("fp16", "bf16", rounded.PUBLISHED)
    found = rounded.measure(small(), iterations=8, precisions=("tf32x3", "tf32", *halves))
    print(rounded.table(found))
    rows = {(row["precision"], row["phase"]): row for row in found["rows"]}
    assert len(rows) == 15
    for (name, phase), row in rows.items():
        half = name in halves
        assert 1 - row["cosine"] <= (1e-10 if name == "tf32x3" else 1e-3 if half else 1e-4), (name, phase)
        assert abs(row["length"] - 1) <= (1e-5 if name == "tf32x3" else 5e-2), (name, phase)
        assert (row["lost"] is not None) == half, (name, phase)
    assert 1 - rows["tf32", "G"]["cosine"] > 1e3 * (1 - rows["tf32x3", "G"]["cosine"]), "what is rounded, or split?"
    assert rows["bf16", "G"]["cosine"] < rows["fp16", "G"]["cosine"]
    assert rows["fp16", "G"]["lost"] < 2e-3 < rows[rounded.PUBLISHED, "G"]["lost"], "the scale of the loss, and none"
    below = list(found["planes_that_fp16_loses"].values())
    assert below == sorted(below, reverse=True)
    assert below[0] > 1e-2 > below[-1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_convolutions_to_the_second_derivative(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products of factors that TF32 holds are near float64; of too few channels one product is not."""

    def derivatives(dtype: torch.dtype, up: bool, stride: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(2, 6, 7, 6).to(dtype).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(6, 4, 3, 3) if up else torch.randn(4, 6, 3, 3)
        weight = weight.to(dtype).requires_grad_()
        with rounded.Rounding():
            if up:
                y = convolution.conv_transpose2d(x, weight, stride=stride)
            else:
                y = convolution.conv2d(x, weight, stride=stride, padding=1)
            firsts = torch.autograd.grad((y**3).sum(), (x, weight), create_graph=True)
            seconds = torch.autograd.grad(sum((g**2).sum() for g in firsts), (x, weight))
        return [z.detach() for z in (y, *firsts, *seconds)]

    def errors(least: int | None, tf32: bool) -> list[float]:
        monkeypatch.setattr(convolution, "_least", least)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        found = [derivatives(torch.float32, *case) for case in cases]
        assert torch.backends.cudnn.allow_tf32 == tf32
        pairs = [pair for results in zip(found, truth, strict=True) for pair in zip(*results, strict=True)]
        return [float((x - y).abs().max() / y.abs().max()) for x, y in pairs]

    cases = ((False, 1), (False, 2), (True, 2))
    truth = [derivatives(torch.float64, *case) for case in cases]
    assert max(errors(4, tf32=False)) < 2**-19
    assert min(errors(5, tf32=True)) > 2**-14, "not split, and so rounded"
    assert max(errors(None, tf32=False)) < 2**-19


# The scaled loss


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.generator.parameters()]


def test_a_step_that_overflows_is_left_out_and_counted(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tmp_path: Path
) -> None:
    """G's weights and moments stay, D learns; the count is in the statistics and goes through a checkpoint's state."""
    trainer, batches = tiny_trainer(tiny_config(precision="fp16", optim={"loss_scale": 1024.0}))
    assert trainer.generator.synthesis.half_on == trainer.discriminator.half_on == ("cuda", "cpu")
    trainer.iteration(*next(batches))
    assert trainer.statistics()["skipped/G_steps"] == trainer.statistics()[SKIPPED] == 0
    before, moments = weights(trainer), copy.deepcopy(trainer.g_optimizer.state_dict()["state"])
    of_d = [p.detach().clone() for p in trainer.discriminator.parameters()]
    trainer.loss_scale.value.fill_(2.0**30)  # beyond fp16 whatever the gradient
    trainer.iteration(*next(batches))
    for old, new in zip(before, weights(trainer), strict=True):
        assert torch.equal(old, new)
    for index, kept in trainer.g_optimizer.state_dict()["state"].items():
        assert all(torch.equal(kept[name], moments[index][name]) for name in kept)
    assert any(not torch.equal(old, new) for old, new in zip(of_d, trainer.discriminator.parameters(), strict=True))
    found = require_finite(trainer, tmp_path)
    assert (found["skipped/G_steps"], found[SKIPPED], found["loss_scale/G"]) == (1, 0.5, 1024)
    trainer.loss_scale.value.fill_(512.0)
    trainer.iteration(*next(batches))
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))
    other, _ = tiny_trainer(trainer.config)
    other.load_state_dict(trainer.state_dict())
    assert (other.loss_scale.skipped, other.loss_scale.value) == (1, 512)
    other, _ = tiny_trainer(tiny_config(precision="fp16", optim={"loss_scale": 64.0}))
    other.load_state_dict(trainer.state_dict())
    assert (other.loss_scale.skipped, other.loss_scale.value) == (1, 64)  # no more than the settings in force say
    trainer.reset_statistics()
    trainer.sums[SKIPPED] = torch.tensor(float(SKIPPED_STEPS))
    trainer.counts[SKIPPED] = SKIPPED_STEPS
    with pytest.raises(DivergenceError, match=r"each of the last 20 steps of G overflowed fp16 .* by 512: .* bf16"):
        require_finite(trainer, tmp_path)


def test_a_scaled_loss_has_the_same_gradient(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """Through the optimizer's step, by a power of two: bit by bit, where nothing is in half precision."""
    results = []
    for scale in (None, LossScale(4096.0, torch.device("cpu"))):
        trainer, batches = tiny_trainer(tiny_config(deterministic=True))
        trainer.loss_scale = scale
        trainer.iteration(*next(batches))
        results.append([*weights(trainer), trainer.sums["loss/G"]])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_fused_optimizer_skips_on_its_device() -> None:
    """No value is read by the host, and a skipped step counts for nothing."""
    torch.manual_seed(0)
    value = torch.nn.Parameter(torch.randn(5))
    plain = torch.nn.Parameter(value.detach().clone())
    fused = torch.optim.Adam([value], lr=0.1, fused=True)
    expected = torch.optim.Adam([plain], lr=0.1)
    scale = LossScale(8.0, torch.device("cpu"))
    for grad in (torch.ones(5), torch.tensor([1.0, torch.inf, 0.0, 1.0, 2.0]), torch.arange(5.0)):
        flat = grad * 8
        overflow = scale.unscale_(flat)
        assert overflow.item() == (not grad.isfinite().all())
        value.grad, plain.grad = flat, grad
        step_unless(fused, overflow)
        if not overflow:
            expected.step()
    torch.testing.assert_close(value, plain)
    assert fused.state[value]["step"] == expected.state[plain]["step"] == 2


def test_the_scale_is_halved_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "GROWTH", 3)
    scale, seen = LossScale(4.0, torch.device("cpu")), []
    for overflow in (0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0):
        scale.update(torch.tensor(float(overflow)))
        seen.append(scale.value.item())
    assert seen == [4, 2, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 4, 4, 4, 4]
    assert scale.skipped.item() == 4


def test_all_processes_skip_where_one_overflows(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(precision="fp16")

    def main(rank: int) -> None:
        world, device = World.from_environment(), torch.device("cpu")
        world.connect(device)
        trainer = Trainer(config, ImageDataset(config.data, use_labels=True), device, world)
        before, asked = weights(trainer), []
        for overflow in (torch.tensor(float(rank == 1)), torch.tensor(0.0)):
            trainer.g_optimizer.step = lambda: asked.append(trainer.g_optimizer.found_inf.item())
            trainer._step_or_skip(trainer.g_optimizer, overflow)
        assert asked == [1, 0]
        assert (trainer.loss_scale.skipped, trainer.loss_scale.value) == (1, config.optim.loss_scale / 2)
        assert all(torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))
        assert trainer.statistics()[SKIPPED] == 0.5

    assert fork(2, main) == [0, 0]


# What a device gets


@pytest.mark.parametrize(
    ("capability", "settings", "precision", "blocks", "words"),
    [
        (None, {}, "fp32", 0, "a CPU is fastest in it"),
        (70, {}, "fp32", 4, "D's top 4 blocks in float16): sm_70 has no TF32"),
        (75, {}, "fp32", 4, "sm_75 has no TF32"),
        (80, {}, "tf32", 4, "D's top 4 blocks in float16): sm_80 multiplies in TF32"),
        (90, {}, "tf32", 4, "sm_90 multiplies in TF32"),
        (90, {"precision": "fp32"}, "fp32", None, "precision fp32 (fp32 without TF32): asked for"),
        (90, {"precision": "tf32x3"}, "tf32x3", None, "three products in TF32): asked for"),
        (70, {"precision": "fp16"}, "fp16", None, "D's top 4 blocks in float16): asked for"),
        (90, {"precision": "bf16"}, "bf16", None, "D's top 4 blocks in bfloat16): asked for"),
        (None, {"precision": "bf16"}, "bf16", None, "asked for"),
        (90, {"discriminator": {"half_blocks": 0}}, "tf32", 0, "D's half blocks are as asked for"),
        (90, {"discriminator": {"clamp": 0.0}}, "tf32", 0, "D has no clamp, and so no half blocks"),
        (90, {"deterministic": True}, "tf32", 4, "sm_90 multiplies in TF32"),
    ],
)
def test_what_auto_takes(
    capability: int | None,
    settings: dict[str, Any],
    precision: str,
    blocks: int | None,
    words: str,
    tiny_config: TinyConfig,
) -> None:
    config, line = settled(tiny_config(**{"precision": "auto", **settings}), capability)
    assert (config.precision, config.discriminator.half_blocks) == (precision, blocks)
    assert line.startswith(f"precision {precision} (")
    assert words in line
    assert "\n" not in line
    assert settled(config, capability)[0] == config


@pytest.mark.parametrize(
    ("capability", "precision", "words"),
    [
        (None, "fp16", "precision fp16 needs a GPU, a CPU computes in fp32: set --precision fp32"),
        (70, "bf16", "bf16 needs a GPU of compute capability 8.0 .*, this one has 7.0: set --precision auto, fp32 or"),
        (75, "tf32x3", "this one has 7.5"),
        (72, "tf32", "this one has 7.2"),
    ],
)
def test_what_a_device_cannot(capability: int | None, precision: str, words: str, tiny_config: TinyConfig) -> None:
    with pytest.raises(UserError, match=words):
        require(tiny_config(precision=precision), capability)


def test_the_oldest_gpu_decides_for_all(tiny_config: TinyConfig) -> None:
    class Two(World):
        def exchange(self, value: Any) -> list[Any]:
            return [value, 70]

    config, line = settled(tiny_config(precision="auto"), 90, Two())
    assert (config.precision, line.partition("): ")[2]) == (
        "fp32",
        "the oldest GPU decides: sm_70 has no TF32; D's half blocks are the published ones",
    )


def test_resuming_and_the_proof_know_the_precision(tiny_config: TinyConfig) -> None:
    """A checkpoint of another GPU goes on, and what changes is said; what one was proved for is not proved for both."""
    old, new = (settled(tiny_config(precision="auto"), capability)[0] for capability in (80, 70))
    assert check_resumable(old, new) == ["precision: tf32 -> fp32"]
    assert check_resumable(old, settled(tiny_config(precision="auto"), None)[0]) == [
        "precision: tf32 -> fp32",
        "discriminator.half_blocks: 4 -> 0",
    ]
    assert len({proof.signature(config, 2, 4) for config in (old, new, tiny_config())}) == 3


@pytest.mark.usefixtures("_tf32_as_before")
def test_the_proof_sees_split_products(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked on a device has channels enough to be split; without the low parts it is wrong."""
    monkeypatch.setattr(convolution, "_least", None)
    monkeypatch.setattr(convolution, "LEAST", 8)
    config, item = tiny_config(precision="tf32x3"), "cpu modulated_conv2d"
    request = proof_items.Request(to_dict(config), 0, [[0.0, 1.5, 0.0]], 1, "cpu", [item], {}, Sizes(image=6))
    found: list[tuple[Any, ...]] = []
    proof_items.run(request, lambda *words: found.append(words))
    split = convolution._split
    monkeypatch.setattr(convolution, "_split", lambda x, dim, parts: split(x, dim, parts.replace("b", "a")))
    proof_items.run(request, lambda *words: found.append(words))
    assert [words[1] for words in found] == [BEGUN, PASSED, BEGUN, FAILED]
    assert "is off by" in found[-1][2]


@pytest.mark.usefixtures("_tf32_as_before")
@pytest.mark.parametrize("name", MODES)
def test_the_switches_of_a_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not MODES[name].tf32
    monkeypatch.setattr(convolution, "_least", None)
    set_arithmetic(dataclasses.replace(preset("demo"), precision=name))
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == MODES[name].tf32
    assert convolution._least == (convolution.LEAST if name == "tf32x3" else None)


def test_tf32_rounds_to_the_nearest() -> None:
    step = 2.0**-10
    x = torch.tensor([1.0, 1 + step, 1 + 0.49 * step, 1 + 0.51 * step, -1 - 0.51 * step, torch.inf, 0.0])
    expected = torch.tensor([1.0, 1 + step, 1.0, 1 + step, -1 - step, torch.inf, 0.0])
    assert torch.equal(to_tf32(x), expected)


# On a GPU


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU computes in fp32, and says so")
@pytest.mark.usefixtures("_tf32_as_before")
@pytest.mark.parametrize(
    "change", [*({"precision": name} for name in MODES if name != "fp32"), {"discriminator": {"half_blocks": 4}}]
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
