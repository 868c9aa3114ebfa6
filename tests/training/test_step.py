"""One training iteration: who learns what from whom, in which order (method.md 8, 10, 11), and golden losses.

New golden losses, after a change that is meant to change them:

    python -m pytest tests/training/test_step.py -k golden --regenerate
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks import TOLERANCES, assert_close, draw
from compiled import on_each_device
from epigraf_fast.camera import Patch, extract_patches
from epigraf_fast.config import Config
from epigraf_fast.data import ImageDataset
from epigraf_fast.errors import UserError
from epigraf_fast.models.renderer import Draws, Renderer
from epigraf_fast.ops import backends, native
from epigraf_fast.training import step
from epigraf_fast.training.losses import blur
from epigraf_fast.training.networks import choose_backends, set_arithmetic
from epigraf_fast.training.step import Samples, Trainer, swap_poses

TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]

GOLDEN = Path(__file__).with_name("golden_losses.json")
GOLDEN_STEPS = 10


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def parameter_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


@contextlib.contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Arguments of every call of a network."""
    calls = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    yield calls
    handle.remove()


# Poses that the mapping sees


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_swap_poses(probability: float) -> None:
    """The picked poses move one place on among themselves, the last to the first; with 12 samples and 200 seeds there
    are draws with none and with one picked, which stay."""
    angles = torch.arange(36.0).view(12, 3)
    numbers = set()
    for seed in range(200):
        torch.manual_seed(seed)
        picked = [i for i, u in enumerate(torch.rand(12).tolist()) if u < probability]
        expected = angles.clone()
        for place, i in enumerate(picked):
            expected[i] = angles[picked[place - 1]]
        torch.manual_seed(seed)
        assert torch.equal(swap_poses(angles, probability), expected)
        numbers.add(len(picked))
    assert numbers >= {0.0: {0}, 0.2: {0, 1, 2}, 0.5: {2, 6, 11}, 0.8: {12}, 1.0: {12}}[probability]


def test_swap_poses_at_the_ends() -> None:
    angles = draw(5, 3)
    assert torch.equal(swap_poses(angles, 0.0), angles)
    assert torch.equal(swap_poses(angles, 1.0), angles.roll(1, dims=0))
    assert torch.equal(swap_poses(angles[:1], 1.0), angles[:1])


def test_the_mapping_sees_swapped_poses_and_all_else_the_true_ones(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer
) -> None:
    """At 0 images every pose is swapped, over the samples of both phases together."""
    config = tiny_config()
    trainer, batches = tiny_trainer(config)
    images, labels, angles = next(batches)
    draw_fakes = trainer._draw_fakes
    trainer._draw_fakes = lambda num: setattr(trainer, "drawn", draw_fakes(num)) or trainer.drawn
    with calls_of(trainer.generator) as generated, calls_of(trainer.discriminator) as judged:
        trainer.iteration(images, labels, angles)
    true = torch.cat([args[1] for args, _ in generated])
    seen = torch.cat([kwargs["conditioning_angles"] for _, kwargs in generated])
    assert len(true) == 2 * config.batch
    # Fakes are sorted after that: which pose came after which is found again.
    drawn = trainer.drawn.angles
    places = [(drawn == pose).all(dim=1).nonzero().flatten().tolist() for pose in true]
    rolled = drawn.roll(1, dims=0)
    for pose, place in zip(seen, places, strict=True):
        assert any(torch.equal(pose, rolled[i]) for i in place)
    g_phase, d_phase, r1_phase = (args[3] for args, _ in judged)
    assert torch.equal(torch.cat([g_phase, d_phase]), torch.cat([true, angles]))
    assert torch.equal(r1_phase, angles)
    g_phase, d_phase, r1_phase = (args[2] for args, _ in judged)
    fake_labels = torch.cat([args[2] for args, _ in generated])
    assert torch.equal(torch.cat([g_phase, d_phase]), torch.cat([fake_labels, labels]))
    assert torch.equal(r1_phase, labels)


def test_without_pose_conditioning_nothing_is_swapped(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, batches = tiny_trainer(tiny_config(generator={"pose_conditioning": False}))
    with calls_of(trainer.generator) as generated:
        trainer.iteration(*next(batches))
    for args, kwargs in generated:
        assert torch.equal(kwargs["conditioning_angles"], args[1])


# Draws


def test_custom_prior_takes_pose_and_label_of_one_entry(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, _ = tiny_trainer(tiny_config())
    fakes = trainer._draw_fakes(500)

    def pairs(angles: Tensor, label: Tensor) -> set[tuple[float, ...]]:
        return set(map(tuple, torch.cat([angles, label], dim=1).tolist()))

    entries = pairs(trainer.angles, trainer.labels)
    assert len(entries) == 48  # the mirrored ones, too
    assert pairs(fakes.angles, fakes.label) == entries  # 500 draws find every one


def test_other_priors_follow_their_formula(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """And labels are still those of random entries."""
    camera = {"prior": "uniform", "yaw_mean": 1.0, "yaw_spread": 0.1, "pitch_mean": 1.5, "pitch_spread": 0.2}
    trainer, _ = tiny_trainer(tiny_config(camera=camera))
    fakes = trainer._draw_fakes(500)
    assert 0.9 <= fakes.angles[:, 0].min() < 0.95
    assert 1.05 < fakes.angles[:, 0].max() <= 1.1
    assert 1.3 <= fakes.angles[:, 1].min() < 1.35
    assert 1.65 < fakes.angles[:, 1].max() <= 1.7
    assert (fakes.angles[:, 2] == 0).all()
    assert (fakes.label.sum(dim=1) == 1).all()
    assert (fakes.label.sum(dim=0) > 100).all()
    assert fakes.content.shape == (500, 16)


def test_mean_camera_pose(tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tiny_dataset: ImageDataset) -> None:
    trainer, _ = tiny_trainer(tiny_config())
    assert torch.equal(trainer.generator.mean_camera_pose, tiny_dataset.mean_camera_pose)
    trainer, _ = tiny_trainer(tiny_config(camera={"prior": "normal", "yaw_mean": 0.3, "pitch_mean": 1.2}))
    assert_close(trainer.generator.mean_camera_pose, torch.tensor([0.3, 1.2, 0.0]), "pose", "exact")


def test_every_phase_draws_its_own(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, batches = tiny_trainer(tiny_config(patch={"beta_start": 0.8}))
    with calls_of(trainer.generator) as generated, calls_of(trainer.discriminator) as judged:
        trainer.iteration(*next(batches))
    assert not torch.equal(generated[0][0][0], generated[1][0][0])
    scales = [scale for args, _ in judged for scale in args[1].scale.split(8)]  # G, D fake, D real, D regularization
    assert len({tuple(scale.tolist()) for scale in scales}) == 4
    for scale in scales:
        assert scale.tolist() == scale[:2].repeat(4).tolist()  # strided groups of 4


# Schedules


def test_schedules_reach_the_networks(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halfway through all of them, at the images seen at the iteration's start; what is constant reaches them, too."""
    config = tiny_config(generator={"style_mixing": 0.7})
    trainer, batches = tiny_trainer(config)
    trainer.cur_nimg, trainer.iterations = 50, 1
    seen: dict[str, list] = {"blur": [], "patch": [], "swap": []}
    monkeypatch.setattr(step, "blur", lambda images, *sigma: seen["blur"].append(sigma) or images)
    monkeypatch.setattr(step, "swap_poses", lambda angles, p: seen["swap"].append(p) or angles)
    original = step.sample_patches

    def sample_patches(patch: Any, resolution: int, progress: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["patch"].append((resolution, progress))
        return original(patch, resolution, progress, *args, **kwargs)

    monkeypatch.setattr(step, "sample_patches", sample_patches)
    with calls_of(trainer.generator) as generated:
        trainer.iteration(*next(batches))
    assert seen["blur"] == [(0.5, 1)] * 2
    assert seen["patch"] == [(16, 2.0)] * 3  # 1 / beta, which goes from 0.2 to 0.8
    assert seen["swap"] == [0.75]
    assert [kwargs["density_noise_std"] for _, kwargs in generated] == [0.25] * 2
    assert [kwargs["style_mixing"] for _, kwargs in generated] == [0.7] * 2
    assert (trainer.cur_nimg, trainer.iterations) == (58, 2)


def test_only_r1_looks_at_the_number_of_iterations(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    results = []
    for iterations in (1, 7):
        trainer, batches = tiny_trainer(tiny_config())
        trainer.cur_nimg, trainer.iterations = 16, iterations
        trainer.iteration(*next(batches))
        results.append((copy_state(trainer.average), copy_state(trainer.discriminator), trainer.statistics()))
    for first, second in zip(results[0][:2], results[1][:2], strict=True):
        assert not changed(first, second)
    assert results[0][2] == results[1][2]


# Phases


class Recorder:
    """Puts itself before both optimizers, and keeps the gradients and both networks as they are at every step."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, *, step: bool = True) -> None:
        self.trainer = trainer
        self.steps: list[tuple[str, dict[str, Tensor]]] = []  # (optimizer, gradients of its network)
        self.d_idle: list[bool] = []  # at every step, whether D has no gradient at all
        self.states: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # G and D before the first step, after each
        for name, module in (("g", trainer.generator), ("d", trainer.discriminator)):
            optimizer = getattr(trainer, f"{name}_optimizer")
            original = optimizer.step if step else lambda: None
            monkeypatch.setattr(optimizer, "step", lambda *a, n=name, m=module, o=original: self._step(n, m, o))
        self.keep()

    def keep(self) -> None:
        self.states.append((copy_state(self.trainer.generator), copy_state(self.trainer.discriminator)))

    def _step(self, name: str, module: nn.Module, original: Callable[[], None]) -> None:
        grads = {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
        self.steps.append((name, grads))
        self.d_idle.append(all(p.grad is None for p in self.trainer.discriminator.parameters()))
        original()
        self.keep()


def test_phases_touch_only_their_own(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batches = tiny_trainer(tiny_config())
    record = Recorder(trainer, monkeypatch)
    trainer.iteration(*next(batches))
    assert [name for name, _ in record.steps] == ["g", "d", "d"]
    start, after_g, after_d, after_r1 = record.states
    generator, discriminator = trainer.generator, trainer.discriminator

    assert changed(start[0], after_g[0])
    assert changed(start[0], after_g[0]) <= parameter_names(generator)  # w_avg among the others
    assert not changed(start[1], after_g[1])
    assert changed(after_g[0], after_d[0]) == {"mapping.w_avg"}
    assert changed(after_g[1], after_d[1])
    assert not changed(after_d[0], after_r1[0])
    assert changed(after_d[1], after_r1[1])

    # Every parameter learns, the G phase leaves no gradient in D, nor the D phases in G.
    assert record.d_idle == [True, False, False]
    assert set(record.steps[0][1]) == parameter_names(generator)
    assert set(record.steps[1][1]) == parameter_names(discriminator)
    for name, parameter in generator.named_parameters():
        assert torch.equal(parameter.grad, record.steps[0][1][name])


def test_w_avg_follows_the_fakes_of_the_d_phase(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.998 * 0 + 0.002 * mean, with the weights after G's step."""
    trainer, batches = tiny_trainer(tiny_config())
    with calls_of(trainer.generator) as generated:
        trainer.iteration(*next(batches))
    (z, _, label), kwargs = generated[1]
    with torch.no_grad():
        w = trainer.generator.ws(z, label, kwargs["conditioning_angles"])[:, 0]
    assert_close(trainer.generator.mapping.w_avg, 0.002 * w.mean(dim=0), "w_avg")


def test_fakes_of_the_g_phase_serve_d(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `reuse_fakes`: micro-batch for micro-batch what G's step was judged by, before G learned of it."""
    trainer, batches = tiny_trainer(tiny_config(micro_batch=4, optim={"reuse_fakes": True, "r1_gamma": 0.0}))
    judged = []
    judge = trainer._judge
    monkeypatch.setattr(trainer, "_judge", lambda *args, **options: judged.append(args) or judge(*args, **options))
    with calls_of(trainer.generator) as generated:
        trainer.iteration(*next(batches))
    assert len(generated) == 2  # the micro-batches of G's phase
    assert all(kwargs["update_w_avg"] for _, kwargs in generated)
    assert trainer.generator.mapping.w_avg.any()
    assert len(judged) == 4
    for of_g, of_d in zip(judged[:2], judged[2:], strict=True):
        flat = ((patches, *patch, *condition) for patches, patch, *condition in (of_g, of_d))
        for name, a, b in zip(("patches", "scale", "offset", "label", "angles"), *flat, strict=True):
            assert torch.equal(a, b[: len(a)]), name
            assert b.requires_grad is False
    assert not torch.equal(judged[0][0], judged[1][0])


def test_gradients_do_not_depend_on_the_micro_batch(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one patch for all, no minibatch statistics and rendering without draws, the micro-batches hold the same
    samples as the whole batch. (Importance samples jump where rounding carries u over a knot: none here.)"""
    results, energies = {}, []
    launch = native.launch

    def launched(name: str, tensors: Any, *numbers: Any) -> None:
        if name == "modulation_fwd":
            energies.append(numbers[-1])
        launch(name, tensors, *numbers)

    monkeypatch.setattr(native, "launch", launched)
    for micro in (8, 4, 1):
        energies.clear()
        config = tiny_config(
            micro_batch=micro,
            renderer={"density_noise": 0.0, "fine_samples": 0},
            discriminator={"minibatch_std_group": 1, "camera_dropout": 0.0},
        )
        trainer, batches = tiny_trainer(config)
        trainer.generator.eval()  # evenly spaced samples; and the noise of the synthesis network starts at strength 0
        for name in ("_sample_patches", "_draw_patches"):
            monkeypatch.setattr(
                trainer, name, lambda num: Patch(torch.full((num,), 0.75), torch.tensor([[0.1, 0.2]] * num))
            )
        record = Recorder(trainer, monkeypatch, step=False)
        trainer.iteration(*next(batches))
        results[micro] = record.steps, trainer.statistics()
        if (
            energies
        ):  # not on the reference: of 3 weights in each of two phases, known to all micro-batches but the first
            assert (energies.count(False), energies.count(True)) == (6, 6 * (8 // micro - 1))
    steps, statistics = results[8]
    for micro in (4, 1):
        assert [name for name, _ in results[micro][0]] == ["g", "d", "d"]
        for (name, expected), (_, actual) in zip(steps, results[micro][0], strict=True):
            assert actual.keys() == expected.keys()
            for key in expected:
                if key.endswith("noise_strength"):  # whose gradient is a sum over the noise itself
                    continue
                unit = expected[key].abs().max().clamp(min=1e-12)
                assert_close(actual[key] / unit, expected[key] / unit, f"micro-batch {micro}, {name}: {key}")
        for name, expected in statistics.items():
            assert_close(torch.tensor(results[micro][1][name]), torch.tensor(expected), f"micro-batch {micro}: {name}")


def test_gradients_are_cleaned(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, _ = tiny_trainer(tiny_config())
    bias = trainer.discriminator.out.bias
    trainer.discriminator.out.weight.grad = torch.ones_like(trainer.discriminator.out.weight)  # of another phase
    before = copy_state(trainer.discriminator)
    samples = Samples(*(torch.zeros(8, 1) for _ in Samples._fields))

    def phase(_: Samples) -> None:
        bias.grad = torch.zeros_like(bias)
        bias.grad[:4] = torch.tensor([math.nan, math.inf, -math.inf, 0.5])

    trainer._phase("D", trainer.d_optimizer, phase, trainer._schedule(), samples)
    assert bias.grad[:4].tolist() == [0.0, 1e5, -1e5, 0.5]
    assert changed(before, copy_state(trainer.discriminator)) == {"out.bias"}
    assert bias[0] == before["out.bias"][0]
    assert torch.isfinite(bias).all()


def test_a_nan_loss_changes_no_weight(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batches = tiny_trainer(tiny_config())
    monkeypatch.setattr(step, "generator_loss", lambda logits: logits.mean() * math.nan)
    before = copy_state(trainer.generator)
    trainer.iteration(*next(batches))
    assert changed(before, copy_state(trainer.generator)) == {"mapping.w_avg"}
    assert math.isnan(trainer.statistics()["loss/G"])


# Augmentation


def test_no_augmentation_draws_nothing(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, batches = tiny_trainer(tiny_config())
    assert trainer.augment is None
    trainer.iteration(*next(batches))
    assert "augment/p" not in trainer.statistics()


def test_patches_are_blurred_then_augmented_then_judged(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """In every phase; and R1's gradient is that to the patch before both."""
    trainer, batches = tiny_trainer(tiny_config(augment={"mode": "fixed", "p": 0.7}))
    made = []
    handle = trainer.augment.register_forward_hook(lambda _, args, result: made.append((*args, result)))
    cut = []
    cut_out = trainer._cut
    trainer._cut = lambda real: cut.append(cut_out(real)) or cut[-1]
    with calls_of(trainer.discriminator) as judged:
        trainer.iteration(*next(batches))
    handle.remove()
    assert len(judged) == len(made) == 3
    for (args, _), (before, p, after) in zip(judged, made, strict=True):
        assert args[0] is after
        assert p == trainer.augment_p == torch.tensor(0.7)
        assert not torch.equal(before, after)
    assert torch.equal(made[2][0], blur(cut[1][0], 1.0))
    assert cut[1][0].requires_grad


def test_the_strength_follows_the_real_logits(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 4 iterations by 8 * 4 / 1000, up if more than a share of 0.8 (mean sign 0.6) is positive; never below 0."""
    config = tiny_config(augment={"mode": "ada", "kimg": 1.0}, optim={"r1_gamma": 0.0})
    trainer, batches = tiny_trainer(config)
    positives = iter([8, 8, 8, 1] + [8, 8, 8, 1] + [7, 7, 7, 6] + [6, 6, 6, 6] * 2)  # of 8: 25, 25, 27, 24, 24 of 32
    monkeypatch.setattr(trainer, "_generator_phase", lambda *args: None)

    def phase(fakes: Samples, real: Samples) -> None:
        count = next(positives)
        trainer._observe(torch.tensor([1.0] * count + [-2.0] * (8 - count)))

    monkeypatch.setattr(trainer, "_discriminator_phase", phase)
    batch = next(batches)
    strengths = []
    for _ in range(20):
        trainer.iteration(*batch)
        strengths.append(trainer.augment_p.item())
    step = 0.032
    # Mean signs 0.5625, 0.5625, 0.6875, 0.5, 0.5 against 0.6.
    expected = [0.0] * 11 + [step] * 4 + [0.0] * 5
    assert_close(torch.tensor(strengths), torch.tensor(expected), "p", "hand")
    assert trainer.real_signs.tolist() == [0, 0]


def test_real_logits_of_both_d_phases_count(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """8 of the D phase every iteration, 8 of R1 in iterations 0 and 2."""
    trainer, batches = tiny_trainer(tiny_config(augment={"mode": "ada"}, optim={"r1_interval": 2}, micro_batch=4))
    counts = []
    for _ in range(5):
        trainer.iteration(*next(batches))
        counts.append(trainer.real_signs[1].item())
    assert counts == [16, 24, 40, 0, 16]
    assert trainer.statistics()["augment/p"] >= 0


def test_strength_survives_a_checkpoint(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, _ = tiny_trainer(tiny_config(augment={"mode": "ada"}))
    trainer.augment_p.fill_(0.3)
    trainer.real_signs.copy_(torch.tensor([5.0, 16.0]))
    state = trainer.state_dict()
    for mode, p in (("ada", 0.3), ("fixed", 0.6)):
        other, _ = tiny_trainer(tiny_config(augment={"mode": mode, "p": 0.6}))
        other.load_state_dict(state)
        assert_close(other.augment_p, torch.tensor(p), mode)
        assert other.real_signs.tolist() == [5, 16]


# Path length


def test_path_length_phase(tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own step of G between G's and D's, every 2 iterations here, on half a micro-batch; the mean moves by 1%."""
    config = tiny_config(
        micro_batch=4,
        generator={"backbone": "image", "style_mixing": 0.9},
        optim={"path_length_weight": 2.0, "path_length_interval": 2, "r1_gamma": 0.0},
    )
    trainer, batches = tiny_trainer(config)
    record = Recorder(trainer, monkeypatch)
    losses, lengths = [], iter([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])])
    backward = trainer._backward
    monkeypatch.setattr(trainer, "_backward", lambda loss: losses.append(loss.detach()) or backward(loss))
    sizes = []

    def path_lengths(images: Tensor, ws: Tensor) -> Tensor:
        sizes.append((tuple(images.shape), len(ws)))
        return next(lengths) + ws.sum() * 0

    monkeypatch.setattr(step, "path_lengths", path_lengths)
    trainer.iteration(*next(batches))
    assert [name for name, _ in record.steps] == ["g", "g", "d"]
    assert sizes == [((2, 3, 16, 16), 2)] * 2
    # Means 0.02 and 0.02 * 0.99 + 0.02 = 0.0398; mean squares of (0.98, 2.98) and of 1.9602, times 2 and 2.
    expected = torch.tensor([4 * (0.98**2 + 2.98**2) / 2, 4 * 1.9602**2])
    assert_close(torch.stack(losses[2:4]), expected, "losses", "hand")
    assert_close(trainer.path_length, torch.tensor(0.0398), "mean", "hand")
    trainer.iteration(*next(batches))
    assert [name for name, _ in record.steps[3:]] == ["g", "d"]
    (g,) = trainer.g_optimizer.param_groups
    assert_close([g["lr"], g["betas"][1]], [0.0025 * 2 / 3, 0.99 ** (2 / 3)], "lazy", "hand")


def test_path_length_reaches_the_generator(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient to the lengths l is that of 2 * 2 * mean((l - m)^2), m = 0.99 m' + 0.01 mean(l), through m too; from
    there it reaches mapping and synthesis. Styles are mixed."""
    config = tiny_config(
        generator={"backbone": "image", "style_mixing": 0.9},
        optim={"path_length_weight": 2.0, "path_length_interval": 2, "r1_gamma": 0.0},
    )
    trainer, batches = tiny_trainer(config)
    trainer.path_length.fill_(0.3)
    original, backward, seen, found, grads, taken = step.path_lengths, trainer._backward, [], [], [], []

    def path_lengths(images: Tensor, ws: Tensor) -> Tensor:
        seen.append(ws)
        found.append(original(images, ws))
        return found[-1]

    def at(loss: Tensor) -> None:
        if found and not grads:
            grads.extend(torch.autograd.grad(loss, found[0], retain_graph=True))
        backward(loss)

    def g_step() -> None:
        named = trainer.generator.named_parameters()
        taken.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    monkeypatch.setattr(step, "path_lengths", path_lengths)
    monkeypatch.setattr(trainer, "_backward", at)
    monkeypatch.setattr(trainer.g_optimizer, "step", g_step)
    trainer.iteration(*next(batches))
    lengths = found[0].detach()
    off = lengths - (0.99 * 0.3 + 0.01 * lengths.mean())
    assert_close(grads[0], 4 * (2 / len(lengths)) * (off - 0.01 * off.mean()), "gradient to the lengths", torch.float32)
    assert (seen[0] != seen[0][:, :1]).any()
    for name in ("mapping.fc0.weight", "synthesis.b8.conv0.weight"):
        assert taken[1][name].abs().sum() > 0, name


def test_importance_reaches_every_draw_of_patches(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fakes for G and for D, of reals for D and for R1."""
    trainer, batches = tiny_trainer(tiny_config(patch={"importance": 4}))
    found, original = [], step.sample_patches

    def sample_patches(*args: Any, **options: Any) -> Patch:
        found.append(options["importance"])
        return original(*args, **options)

    monkeypatch.setattr(step, "sample_patches", sample_patches)
    trainer.iteration(*next(batches))
    assert len(found) == 4
    assert trainer.importance.std() > 0
    assert all(torch.equal(importance, trainer.importance) for importance in found)


def test_the_context_of_a_patch_is_its_whole_image(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, batches = tiny_trainer(tiny_config(discriminator={"global_context": "concat"}))
    images, labels, angles = next(batches)
    reals = step.Samples(images.float() / 127.5 - 1, labels, angles, angles)
    patches, patch = trainer._cut(reals)
    size = trainer.config.patch.resolution
    assert torch.equal(patches[:, :3], extract_patches(reals.content, patch, size))
    assert torch.equal(patches[:, 3:], extract_patches(reals.content, Patch.whole(patch.scale), size))
    assert not torch.equal(patches[:, :3], patches[:, 3:])


# R1


@pytest.mark.parametrize(
    ("interval", "expected"), [(16, [0, 16, 32]), (4, list(range(0, 36, 4))), (1, list(range(36)))]
)
def test_when_r1_runs(
    interval: int,
    expected: list[int],
    tiny_config: TinyConfig,
    tiny_trainer: TinyTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, batches = tiny_trainer(tiny_config(optim={"r1_interval": interval}))
    ran = []
    monkeypatch.setattr(trainer, "_generator_phase", lambda *args: None)
    monkeypatch.setattr(trainer, "_discriminator_phase", lambda *args: None)
    monkeypatch.setattr(trainer, "_regularization_phase", lambda *args: ran.append(trainer.iterations))
    batch = next(batches)
    for _ in range(36):
        trainer.iteration(*batch)
    assert ran == expected


@pytest.mark.parametrize("interval", [4, 16])
def test_r1_loss(
    interval: int, tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mean(penalty) * gamma / 2, times the interval; the statistic is the penalty itself."""
    trainer, batches = tiny_trainer(tiny_config(optim={"r1_interval": interval, "r1_gamma": 0.3}))
    losses = []
    monkeypatch.setattr(trainer, "_backward", lambda loss: losses.append(loss))
    monkeypatch.setattr(step, "r1_penalty", lambda logits, patches: torch.tensor([1.0, 5.0]))
    trainer.iteration(*next(batches))
    assert_close(losses[2], torch.tensor(3.0 * 0.15 * interval), "loss", "hand")
    assert trainer.statistics()["loss/R1"] == 3.0


def test_r1_is_the_gradient_to_the_patch_before_the_blur(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batches = tiny_trainer(tiny_config())
    penalized, cut = [], []
    original, cut_out = step.r1_penalty, trainer._cut
    monkeypatch.setattr(
        step, "r1_penalty", lambda logits, patches: penalized.append(patches) or original(logits, patches)
    )
    monkeypatch.setattr(trainer, "_cut", lambda real: cut.append(cut_out(real)) or cut[-1])
    with calls_of(trainer.discriminator) as judged:
        trainer.iteration(*next(batches))
    patches = penalized[0]
    assert patches is cut[1][0]
    assert patches.is_leaf
    blurred = judged[2][0][0]
    assert torch.equal(blurred, blur(patches, 1.0))
    assert not torch.equal(blurred, patches)


def test_optimizers(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """Adam(0, 0.99) at 0.0025; D, with k = 16: lr k / (k + 1), betas to the power k / (k + 1)."""
    trainer, _ = tiny_trainer(tiny_config(optim={"r1_interval": 16}))
    (g,), (d,) = trainer.g_optimizer.param_groups, trainer.d_optimizer.param_groups
    assert isinstance(trainer.g_optimizer, torch.optim.Adam)
    assert_close([g["lr"], *g["betas"], g["eps"]], [0.0025, 0.0, 0.99, 1e-8], "G", "hand")
    assert_close([d["lr"], *d["betas"], d["eps"]], [0.0018823529, 0.0, 0.99058567, 1e-8], "D", "hand")
    assert {id(p) for p in g["params"]} == {id(p) for p in trainer.generator.parameters()}
    assert {id(p) for p in d["params"]} == {id(p) for p in trainer.discriminator.parameters()}
    assert g["weight_decay"] == d["weight_decay"] == 0


def test_optimizers_without_r1(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    """Nor at the learning rates of the beginning: four times the images of `lr_decay_kimg`, half the rates."""
    trainer, batches = tiny_trainer(tiny_config(optim={"r1_gamma": 0.0, "beta1": 0.5, "lr_decay_kimg": 2.0}))
    (g,), (d,) = trainer.g_optimizer.param_groups, trainer.d_optimizer.param_groups
    assert (d["lr"], d["betas"]) == (0.002, (0.5, 0.99))
    trainer.cur_nimg = 8000
    trainer.iteration(*next(batches))
    assert "loss/R1" not in trainer.statistics()
    assert (g["lr"], d["lr"]) == (0.00125, 0.001)


def test_learning_rates_ramp_down_to_the_end_of_the_run(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    config = tiny_config(kimg=16.0, optim={"r1_interval": 4, "lr_rampdown": 0.5})
    trainer, batches = tiny_trainer(config)
    (g,), (d,) = trainer.g_optimizer.param_groups, trainer.d_optimizer.param_groups
    trainer.cur_nimg = 14_000
    trainer.iteration(*next(batches))
    assert_close([g["lr"], d["lr"]], [0.0025 / 4, 0.002 * 0.8 / 4], "rates", "hand")


def test_lazy_powers_of_both_betas(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, _ = tiny_trainer(tiny_config(optim={"r1_interval": 4, "beta1": 0.5, "d_lr": 0.01}))
    (d,) = trainer.d_optimizer.param_groups
    assert_close([d["lr"], *d["betas"]], [0.008, 0.57434918, 0.99199194], "D", "hand")  # powers of 4/5


# The average


def test_the_average_follows_after_the_phases(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first iteration copies G; the second keeps 0.5^(8 / (10 * 8)), from the images seen before it."""
    trainer, batches = tiny_trainer(tiny_config(optim={"ema_rampup": 10.0}))
    start = copy_state(trainer.generator)
    assert not changed(start, copy_state(trainer.average))
    trainer.iteration(*next(batches))
    first = copy_state(trainer.generator)
    assert changed(start, first)
    assert not changed(first, copy_state(trainer.average))
    trainer.iteration(*next(batches))
    second, average = copy_state(trainer.generator), copy_state(trainer.average)
    for name in parameter_names(trainer.generator):
        assert_close(average[name], second[name].lerp(first[name], 0.5**0.1), name)
    for name in set(average) - parameter_names(trainer.generator):
        assert torch.equal(average[name], second[name]), name
    assert "mapping.w_avg" in set(average) - parameter_names(trainer.generator)


# Statistics


def test_statistics_are_means_since_the_last_reset(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batches = tiny_trainer(tiny_config(micro_batch=4))
    assert trainer.statistics() == {}
    losses = iter([1.0, 2.0, 4.0, 9.0])
    monkeypatch.setattr(step, "generator_loss", lambda logits: logits.mean() * 0 + next(losses))
    for _ in range(2):
        trainer.iteration(*next(batches))
    statistics = trainer.statistics()
    assert statistics.keys() == {"loss/G", "loss/D", "logits/fake", "logits/real", "logits/real_sign", "loss/R1"}
    assert statistics["loss/G"] == 4.0
    assert -1 <= statistics["logits/real_sign"] <= 1
    assert trainer.counts["logits/real"] == 16
    trainer.reset_statistics()
    assert trainer.statistics() == {}


def test_scales_of_scale_specific_discriminators_stay_on_the_cpu(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer
) -> None:
    """Offsets, and all scales without them, are drawn on the device, here one that is neither."""
    for scales, expected in ((1, "meta"), (2, "cpu")):
        trainer, _ = tiny_trainer(tiny_config(discriminator={"scales": scales}))
        trainer.device = torch.device("meta")
        scale, offset = trainer._sample_patches(8)
        assert (scale.device.type, offset.device.type) == (expected, "meta")


# Backends


def test_backends_are_chosen_before_the_first_step(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = {"generator": {"plane_channels": 8, "decoder_hidden": 16}, "backend": "triton"}
    convolutions = ("bias_act", "upfirdn2d", "modulated_conv2d")
    defaults = choose_backends(tiny_config(), "cpu")
    assert defaults == {op: backends.resolve(op, None, "cpu") for op in backends.OPS}
    assert set(choose_backends(tiny_config(backend="reference"), "cpu").values()) == {"reference"}
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_lacking_triton", lambda: None)
        chosen = choose_backends(tiny_config(**triton), "cuda")
        assert chosen == {
            op: backends.resolve(op, None, "cuda") if op in convolutions else "triton" for op in backends.OPS
        }
        for change, message in (
            ({"plane_channels": 4}, "generator.plane_channels must be a multiple of 8 and at most 64"),
            ({"decoder_hidden": 8}, r"generator.decoder_hidden must be in \[16, 128\] with backend triton, got 8"),
        ):
            generator = {**triton["generator"], **change}
            with pytest.raises(UserError, match=message):
                choose_backends(tiny_config(generator=generator, backend="triton"), "cuda")
            auto = choose_backends(tiny_config(generator=generator), "cuda")
            assert auto == {op: backends.resolve(op, None, "cuda") for op in backends.OPS}
    with monkeypatch.context() as patch:  # a default that cannot serve the settings
        patch.setattr(backends, "_accepted", dict.fromkeys(backends.KERNELS["triton"], ("triton",)))
        patch.setattr(backends, "_lacking_triton", lambda: None)
        odd = {"plane_channels": 12, "decoder_hidden": 16}
        chosen = choose_backends(tiny_config(generator=odd), "cuda")
        assert (chosen["decode_triplane"], chosen["composite"]) == ("torch", "triton")
    for why in ("Triton is not installed: pip install triton", "there is no CUDA device"):
        monkeypatch.setattr(backends, "_lacking_triton", lambda why=why: why)
        with pytest.raises(UserError, match=rf"^backend 'triton' is not available: {why} \(--backend auto .*\)$"):
            choose_backends(tiny_config(**triton), "cuda")


def test_the_networks_take_the_backends_of_the_run(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_lacking_triton", lambda: None)
    monkeypatch.setattr(backends, "_interpreting", lambda: True)
    config = tiny_config(generator={"plane_channels": 8, "decoder_hidden": 16}, backend="triton")
    trainer, _ = tiny_trainer(config)
    for generator in (trainer.generator, trainer.average):
        assert generator.renderer.backend == generator.decoder.options["backend"] == "triton"
        assert generator.decoder.options["precision"] == config.precision
        assert generator.synthesis.b8.backend is None
    assert trainer.discriminator.conv.backend is None
    trainer, _ = tiny_trainer(tiny_config(backend="reference"))
    for module in (trainer.generator.renderer, trainer.generator.synthesis.b8, trainer.discriminator.conv):
        resolved = backends.resolve("composite", module.backend, "cpu")
        assert resolved == "reference"


# Determinism


@on_each_device()
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_torch_and_the_kernels(
    tiny_config: TinyConfig,
    tiny_trainer: TinyTrainer,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    deterministic: bool,
) -> None:
    """Two runs with the flag have the same gradients, bit by bit, from kernels whose sums have no order."""
    from epigraf_fast.kernels import decode_triplane as kernels

    asked, bwd = [], kernels.bwd
    monkeypatch.setattr(kernels, "bwd", lambda *args, **options: asked.append(args[12]) or bwd(*args, **options))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    config = tiny_config(
        batch=1,
        device=device,
        backend="triton",
        deterministic=deterministic,
        generator={"plane_channels": 8, "decoder_hidden": 16},
        renderer={"coarse_samples": 3, "fine_samples": 2},
    )
    gradients = []
    try:
        set_arithmetic(config)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
        for _ in range(2):
            trainer, batches = tiny_trainer(config)
            trainer.iteration(*next(batches))
            gradients.append({name: p.grad for name, p in trainer.generator.named_parameters()})
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(asked) == {deterministic}
    if deterministic:
        for name, grad in gradients[0].items():
            assert torch.equal(grad, gradients[1][name]), name


# Golden losses


def test_golden_losses(tiny_config: TinyConfig, tiny_trainer: TinyTrainer, request: pytest.FixtureRequest) -> None:
    """The losses of ten tiny steps are those on record."""
    trainer, batches = tiny_trainer(tiny_config())
    steps = []
    for _ in range(GOLDEN_STEPS):
        trainer.reset_statistics()
        trainer.iteration(*next(batches))
        steps.append({name: value for name, value in trainer.statistics().items() if name.startswith("loss/")})
    if request.config.getoption("--regenerate"):
        GOLDEN.write_text(json.dumps({"torch": torch.__version__, "steps": steps}, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(golden["steps"]) == GOLDEN_STEPS
    for number, (actual, expected) in enumerate(zip(steps, golden["steps"], strict=True)):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert actual[name] == pytest.approx(value, rel=TOLERANCES["golden"][0]), (
                f"step {number}: {name}; recorded with torch {golden['torch']}, this is {torch.__version__}"
            )


@on_each_device()
def test_ten_steps_on_triton_have_the_losses_of_the_reference(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """With the same random numbers: those of the renderer are drawn here, in the order of the reference.

    Four steps where the kernels are interpreted, one of them with R1: a step takes seconds there.
    """
    render = Renderer.forward

    def with_draws(self: Renderer, planes: Tensor, decoder: nn.Module, *rays: Tensor, **options: Any) -> Any:
        shape, coarse, fine = rays[0].shape[:2], self.config.coarse_samples, self.config.fine_samples
        options["draws"] = Draws(
            jitter=torch.rand(*shape, coarse, device=device),
            coarse_noise=torch.randn(*shape, coarse, device=device),
            u=torch.rand(*shape, fine, device=device),
            fine_noise=torch.randn(*shape, coarse + fine, device=device),
        )
        return render(self, planes, decoder, *rays, **options)

    monkeypatch.setattr(Renderer, "forward", with_draws)
    tiny = {  # as small as the kernels allow: the interpreter is slow
        "batch": 1,
        "device": device,
        "generator": {"plane_channels": 8, "decoder_hidden": 16},
        "renderer": {"coarse_samples": 3, "fine_samples": 2},
    }
    losses: dict[str, list[dict[str, float]]] = {"reference": [], "triton": []}
    for backend, steps in losses.items():
        trainer, batches = tiny_trainer(tiny_config(backend=backend, **tiny))
        assert trainer.backends["composite"] == trainer.backends["decode_triplane"] == backend
        for _ in range(4 if device == "cpu" else GOLDEN_STEPS):
            trainer.reset_statistics()
            trainer.iteration(*next(batches))
            steps.append({name: value for name, value in trainer.statistics().items() if name.startswith("loss/")})
    assert any("loss/R1" in step for step in losses["triton"])
    for number, (actual, expected) in enumerate(zip(losses["triton"], losses["reference"], strict=True)):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert actual[name] == pytest.approx(value, rel=TOLERANCES["ten_steps"][0]), f"step {number}: {name}"
