"""The discriminator: sizes, blocks, modulation, conditions, and the second derivatives that R1 needs."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import emulate

from checks import assert_close, assert_error_within_reference, assert_finite, draw, gradgradcheck
from epigraf_fast.camera import Patch
from epigraf_fast.config import DiscriminatorConfig, preset
from epigraf_fast.models.discriminator import (
    Discriminator,
    DiscriminatorBlock,
    ScaleDiscriminators,
    discriminator_class,
    minibatch_std,
    modulation_of,
)
from epigraf_fast.training.losses import r1_penalty
from epigraf_fast.training.memory import meta_networks, parameter_count

ANGLES = torch.tensor([[0.4, 1.2, 0.0], [-2.0, 2.0, 0.0], [3.0, 0.7, 0.0], [0.0, 1.6, 0.0]], dtype=torch.float64)
PATCH = Patch(
    torch.tensor([0.5, 0.75, 0.6, 1.0], dtype=torch.float64),
    torch.tensor([[0.1, 0.5], [0.25, 0.0], [0.2, 0.3], [0.0, 0.0]], dtype=torch.float64),
)
PATCHES = draw(4, 3, 8, 8, seed=1)
PLAIN, PLAIN_256 = 27_482_880, 27_436_800


def make_meta(resolution=512, patch_resolution=64, label_dim=0, **settings):
    with torch.device("meta"):
        return Discriminator(DiscriminatorConfig(**settings), resolution, patch_resolution, label_dim=label_dim)


def test_published_sizes():
    assert parameter_count(make_meta()) == PLAIN
    assert parameter_count(make_meta(256)) == PLAIN_256
    assert parameter_count(make_meta(camera_conditioning=True)) == 27_495_168
    assert parameter_count(make_meta(label_dim=10)) == PLAIN + 10 * 512
    assert parameter_count(meta_networks(preset("ffhq"), 0)[1]) == 27_495_168
    assert parameter_count(meta_networks(preset("cats"), 0)[1]) == PLAIN_256 + 12_288
    assert parameter_count(meta_networks(preset("plants"), 198)[1]) == PLAIN_256 + 198 * 512


def test_the_patch_resolution_changes_no_size():
    for patch_resolution in (32, 128, 512):
        assert parameter_count(make_meta(patch_resolution=patch_resolution)) == PLAIN


def test_published_blocks():
    discriminator = make_meta()
    shapes = []
    for res in discriminator.resolutions:
        block = getattr(discriminator, f"b{res}")
        block.register_forward_hook(lambda _, __, y: shapes.append(list(y.shape[1:])))
    discriminator(torch.empty(4, 3, 64, 64, device="meta"), Patch.whole(torch.empty(4, device="meta")))
    # Three leading blocks, 32 -> 64 -> 128 -> 256 at 64x64; then down to 4x4.
    leading = [[64, 64, 64], [128, 64, 64], [256, 64, 64]]
    assert shapes == [*leading, [512, 32, 32], [512, 16, 16], [512, 8, 8], [512, 4, 4]]
    assert [getattr(discriminator, f"b{res}").from_rgb is not None for res in discriminator.resolutions] == [True] + [
        False
    ] * 6


@pytest.mark.parametrize(("resolution", "patch"), [(16, 16), (32, 16), (64, 8)])
def test_leading_blocks_keep_the_size(tiny_discriminator, resolution, patch):
    discriminator = tiny_discriminator(resolution=resolution, patch_resolution=patch)
    sizes = []
    for res in discriminator.resolutions:
        getattr(discriminator, f"b{res}").register_forward_hook(lambda _, __, y: sizes.append(y.shape[-1]))
    discriminator(draw(4, 3, patch, patch), PATCH)
    leading = int(math.log2(resolution // patch))
    assert sizes == [patch] * leading + [patch // 2**i for i in range(1, int(math.log2(patch)) - 1)]
    with pytest.raises(ValueError, match=rf"patches must have shape \['B', 3, {patch}, {patch}\], got \[4, 3, 4, 4\]"):
        discriminator(draw(4, 3, 4, 4), PATCH)


@pytest.mark.parametrize("resolution", [32, 64])  # width 512 throughout
def test_initial_code_and_logits_are_of_order_one(resolution):
    torch.manual_seed(0)
    config = DiscriminatorConfig(camera_conditioning=True)
    discriminator = Discriminator(config, resolution, 16)
    codes = []
    discriminator.hypernetwork.register_forward_hook(lambda _, __, y: codes.append(y))
    arguments = Patch(*(x.float() for x in PATCH)), None, ANGLES.float()
    with torch.no_grad():
        logits = discriminator(draw(4, 3, 16, 16, dtype=torch.float32), *arguments)
    assert tuple(logits.shape) == (4,)
    assert_finite(logits, "logits")
    assert logits.abs().max() < 20
    assert 0.3 < codes[0].square().mean().sqrt() < 3


def test_minibatch_std_by_hand():
    # Two groups, of samples 0, 2, 4, 6 and 1, 3, 5, 7; one channel of one pixel, another of a constant.
    first = torch.tensor([0, 5, 2, 5, 4, 5, 6, 5], dtype=torch.float64)
    x = torch.stack([first, torch.ones(8, dtype=torch.float64)], dim=1)[:, :, None, None]
    y = minibatch_std(x, 4)
    assert_close(y[:, :2], x, "what comes in comes out", "exact")
    varying = (5 + 1e-8) ** 0.5  # population variance of 0, 2, 4, 6
    expected = torch.tensor([(varying + 1e-4) / 2, 1e-4], dtype=torch.float64).repeat(4)
    assert_close(y[:, 2, 0, 0], expected, "standard deviation")
    # Smaller batches are one group.
    pair = minibatch_std(x[:3:2], 4)
    assert_close(pair[:, 2, 0, 0], [((1 + 1e-8) ** 0.5 + 1e-4) / 2] * 2, "of two")
    assert_close(minibatch_std(x[:1], 4)[:, 2, 0, 0], [1e-4], "of one")


def test_minibatch_std_averages_over_channels_and_pixels():
    x = draw(4, 3, 2, 5, seed=1)
    expected = (x.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
    assert_close(minibatch_std(x, 4)[:, 3], expected.expand(4, 2, 5), "standard deviation")
    with pytest.raises(ValueError, match="the batch must be a multiple of the group size 4, got 6"):
        minibatch_std(draw(6, 1, 2, 2), 4)


@pytest.mark.parametrize("modulate", ["input", "output", "none"])
@pytest.mark.parametrize("down", [1, 2])
def test_block_equals_the_formula(modulate, down):
    torch.manual_seed(0)
    block = DiscriminatorBlock(4, 5, image_channels=3, down=down, modulate=modulate, code_dim=6).double()
    x, code = draw(2, 3, 8, 8, seed=1), draw(2, 6, seed=2)
    seen = []
    block.conv1.register_forward_hook(lambda _, args, kwargs, __: seen.append((*args, kwargs)), with_kwargs=True)
    y = block(x, None if modulate == "none" else modulation_of(block.affine(code)))
    inner = block.from_rgb(x)
    features, scales = seen[0]
    assert (scales["out_scale"] is not None) == (modulate == "output")
    assert hasattr(block, "affine") == (modulate != "none")
    weight, bias = block.conv1.weight / 6.0, block.conv1.bias  # sqrt(4 * 9)
    if modulate != "none":
        assert not block.affine.bias.any()  # sigma is around 1
        sigma = 1 + torch.tanh(code @ block.affine.weight.T / 6**0.5)
        assert tuple(sigma.shape) == (2, {"input": 4, "output": 5}[modulate])
        assert_close(modulation_of(block.affine(code)), sigma, "sigma")
    expected = block.conv0(inner)
    if modulate == "input":
        expected = expected * sigma[:, :, None, None]
    assert_close(features, expected, "what conv1 sees")
    if down == 2:
        taps = torch.tensor([0.125, 0.375, 0.375, 0.125], dtype=torch.float64)
        taps = torch.outer(taps, taps).expand(4, 1, 4, 4)
        features = torch.nn.functional.conv2d(features, taps, padding=2, groups=4)
        main = torch.nn.functional.conv2d(features, weight, stride=2)
    else:
        main = torch.nn.functional.conv2d(features, weight, padding=1)
    if modulate == "output":
        main = main * sigma[:, :, None, None]
    main = main + bias[:, None, None]
    main = torch.where(main > 0, main, 0.2 * main)  # gains sqrt(2) and sqrt(1/2)
    assert_close(y, main + block.skip(inner), "y")
    assert block.skip.bias is None
    assert block.skip.clamp is None
    assert block.conv1.clamp == pytest.approx(256 * 0.5**0.5)
    assert block.conv0.clamp == block.from_rgb.clamp == 256


def test_clamps_are_those_of_the_settings(tiny_discriminator):
    """In every convolution but the skips, the last one too; 0 is none."""
    for clamp, expected in ((0.0, None), (5.0, 5.0)):
        discriminator = tiny_discriminator(clamp=clamp)
        for res in discriminator.resolutions:
            block = getattr(discriminator, f"b{res}")
            assert block.conv0.clamp == expected
            assert block.conv1.clamp == (expected and pytest.approx(expected * 0.5**0.5))
            assert block.skip.clamp is None
        assert discriminator.b16.from_rgb.clamp == discriminator.conv.clamp == expected
    clamped, free = (tiny_discriminator(clamp=clamp).eval() for clamp in (256.0, 0.0))
    small, large = PATCHES, 1e5 * PATCHES
    assert_close(free(small, PATCH), clamped(small, PATCH), "logits that no clamp reaches", "exact")
    assert (free(large, PATCH) - clamped(large, PATCH)).abs().min() > 10


@pytest.mark.parametrize("modulate", ["input", "output"])
def test_every_block_is_modulated_by_the_code(tiny_discriminator, modulate):
    discriminator = tiny_discriminator(modulate=modulate, resolution=32)
    scales, codes = {}, []
    discriminator.hypernetwork.register_forward_hook(lambda _, __, y: codes.append(y))
    for res in discriminator.resolutions:
        conv, name = ("conv0", "next_scale") if modulate == "input" else ("conv1", "out_scale")
        getattr(getattr(discriminator, f"b{res}"), conv).register_forward_hook(
            lambda _, __, kwargs, ___, res=res, name=name: scales.update({res: kwargs[name]}), with_kwargs=True
        )
    discriminator(PATCHES, PATCH)
    assert sorted(scales) == [8, 16, 32]  # both leading blocks, and the last
    for res, sigma in scales.items():
        block = getattr(discriminator, f"b{res}")
        assert_close(sigma, 1 + block.affine(codes[0]).tanh(), f"sigma at {res}")
        assert sigma.min() > 0
        assert sigma.max() < 2
        assert sigma.std() > 0.1, "sigma says nothing about the patch"
    wild = modulation_of(discriminator.b8.affine(1e3 * codes[0]))
    assert wild.min() >= 0
    assert wild.max() <= 2


def test_patch_parameters_change_the_logits(tiny_discriminator):
    for modulate in ("input", "output"):
        discriminator = tiny_discriminator(modulate=modulate)
        logits = discriminator(PATCHES, PATCH)
        for what, other in (
            ("scale", PATCH._replace(scale=PATCH.scale / 2)),
            ("offset x", PATCH._replace(offset=PATCH.offset + torch.tensor([0.1, 0.0]).double())),
            ("offset y", PATCH._replace(offset=PATCH.offset + torch.tensor([0.0, 0.1]).double())),
        ):
            assert (discriminator(PATCHES, other) - logits).abs().min() > 1e-6, f"{modulate}: {what}"


def test_head_is_a_projection(tiny_discriminator):
    """logit = <out, cmap> / sqrt(width), cmap from label, patch and camera, in this order."""
    discriminator = tiny_discriminator(label_dim=3, camera_conditioning=True).eval()
    seen = {}
    discriminator.out.register_forward_hook(lambda _, __, y: seen.update(out=y))
    discriminator.head.register_forward_hook(lambda _, args, y: seen.update(condition=args[1], cmap=y))
    discriminator.hypernetwork.register_forward_hook(lambda _, args, __: seen.update(patch=args[1]))
    label = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]]
    logits = discriminator(PATCHES, PATCH, label, ANGLES)
    assert seen["out"].shape == seen["cmap"].shape == (4, 8)
    assert_close(logits, (seen["out"] * seen["cmap"]).sum(dim=1) / 8**0.5, "logits")
    patch_dim = 3 * (20 + 4)
    assert_close(seen["condition"][:, :3], label, "label", "exact")
    assert_close(seen["condition"][:, 3 : 3 + patch_dim], seen["patch"], "patch", "exact")
    camera = seen["condition"][:, 3 + patch_dim :]
    assert tuple(camera.shape) == (4, 24)
    numbers = ANGLES[:, :2] / (2 * math.pi)  # all within one turn
    phases = numbers[:, :, None] * math.pi * 2.0 ** torch.arange(6)
    expected = torch.cat([phases.sin(), phases.cos()], dim=2).flatten(1)
    assert_close(camera, expected, "camera", torch.float32)
    encoded = discriminator.patch_encoder(torch.cat([PATCH.scale[:, None], PATCH.offset], dim=1))
    assert_close(seen["patch"], encoded, "scale, offset x, offset y")


def test_conditions_change_the_logits(tiny_discriminator):
    discriminator = tiny_discriminator(label_dim=3, camera_conditioning=True).eval()
    label = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]]
    logits = discriminator(PATCHES, PATCH, label, ANGLES)
    assert (discriminator(PATCHES, PATCH, label.roll(1, 1), ANGLES) - logits).abs().min() > 1e-6
    assert (discriminator(PATCHES, PATCH, label, ANGLES + 0.1) - logits).abs().min() > 1e-6


def test_camera_dropout_in_training_only(tiny_discriminator):
    discriminator = tiny_discriminator(camera_conditioning=True)
    conditions = []
    discriminator.head.register_forward_hook(lambda _, args, __: conditions.append(args[1][:, -24:]))

    def camera(training):
        discriminator.train(training)
        with torch.no_grad():
            discriminator(PATCHES, PATCH, None, ANGLES)
        return conditions.pop()

    full = camera(False)
    assert_close(camera(False), full, "evaluation", "exact")
    torch.manual_seed(1)
    masks = torch.stack([camera(True) for _ in range(50)])
    kept = masks != 0
    assert_close(masks[kept], (2 * full).expand(50, -1, -1)[kept], "what is kept is doubled")
    assert 0.45 < kept[:, full != 0].double().mean() < 0.55
    assert not torch.equal(masks[0], masks[1])


def test_the_standard_discriminator(tiny_discriminator):
    """No modulation: no hypernetwork, no patch embedding; without conditions, one number comes out."""
    plain = tiny_discriminator(modulate="none")
    assert plain.head is None
    assert plain.out.weight.shape[0] == 1
    assert not hasattr(plain, "hypernetwork")
    assert not hasattr(plain, "patch_encoder")
    assert not [name for name, _ in plain.named_parameters() if "affine" in name]
    logits = plain(PATCHES, PATCH)
    assert tuple(logits.shape) == (4,)
    assert_close(plain(PATCHES, Patch(PATCH.scale / 2, PATCH.offset + 0.1)), logits, "the patch is not seen", "exact")

    labelled = tiny_discriminator(modulate="none", label_dim=3)
    assert labelled.out.weight.shape[0] == 8
    assert tuple(labelled.head.embed.weight.shape) == (8, 3)
    label = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]]
    different = labelled(PATCHES, PATCH, label) - labelled(PATCHES, PATCH, label.roll(1, 1))
    assert different.abs().min() > 1e-6
    posed = tiny_discriminator(modulate="none", camera_conditioning=True)
    assert tuple(posed.head.embed.weight.shape) == (8, 24)


def test_epilogue_equals_the_formula(tiny_discriminator):
    discriminator = tiny_discriminator(modulate="none")
    features = []
    discriminator.b8.register_forward_hook(lambda _, __, y: features.append(y))
    logits = discriminator(PATCHES, PATCH)
    x = minibatch_std(features[0], 4)
    assert tuple(x.shape) == (4, 9, 4, 4)
    x = torch.nn.functional.conv2d(x, discriminator.conv.weight / 9.0, padding=1)  # sqrt(9 * 9)
    x = torch.where(x > 0, x, 0.2 * x) * 2**0.5
    x = x.flatten(1) @ discriminator.fc.weight.T / 128**0.5
    x = torch.where(x > 0, x, 0.2 * x) * 2**0.5
    assert_close(logits, (x @ discriminator.out.weight.T / 8**0.5)[:, 0], "logits")


def test_groups_are_strided(tiny_discriminator):
    """A sample's logit depends on those of its minibatch-std group, and on no other."""
    discriminator = tiny_discriminator()
    patches, patch = draw(8, 3, 8, 8, seed=2), Patch(PATCH.scale.repeat(2), PATCH.offset.repeat(2, 1))
    before = discriminator(patches, patch)
    patches[2] += 1
    changed = (discriminator(patches, patch) - before).abs() > 1e-12
    assert changed.tolist() == [i % 2 == 0 for i in range(8)]


@pytest.mark.parametrize("scales", [1, 2])
def test_parts_of_a_batch_are_judged_apart(tiny_discriminator, scales):
    """Fake and real patches in one call: logits, and gradients of parameters and patches, are those of two calls."""
    if scales == 1:
        judge = tiny_discriminator(label_dim=2)
    else:
        torch.manual_seed(0)
        config = DiscriminatorConfig(channel_base=128, channel_max=8, scales=scales, minibatch_std_group=2)
        judge = ScaleDiscriminators(config, 16, 8, label_dim=2).double()
    support = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.25, 1.0, 0.25, 1.0], dtype=torch.float64)
    inputs = [draw(8, 3, 8, 8, seed=4).requires_grad_(), Patch(support, draw(8, 2) * 0), draw(8, 2, seed=5)]
    parameters = [*judge.parameters(), inputs[0]]
    results = []
    for logits in (
        torch.cat([judge(*part) for part in zip(*(x.split(4) for x in inputs), strict=True)]),
        judge(*inputs, parts=2),
    ):
        results.append([logits, *torch.autograd.grad(logits @ draw(8, seed=6), parameters)])
    assert not torch.allclose(judge(*inputs), logits), "the parts are small enough to tell"
    for apart, together in zip(*results, strict=True):
        assert_close(together, apart, "logits and gradients")


def test_float64_agrees_with_float32(tiny_discriminator):
    settings = {"label_dim": 3, "camera_conditioning": True}
    label = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]]
    expected = tiny_discriminator(**settings).eval()(PATCHES, PATCH, label, ANGLES)
    patches, *place, label, angles = (x.float() for x in (PATCHES, *PATCH, label, ANGLES))
    judge = tiny_discriminator(dtype=torch.float32, half_blocks=2, **settings).eval()
    actual = judge(patches, Patch(*place), label, angles)
    assert expected.dtype == torch.float64
    assert actual.dtype == torch.float32
    assert_close(actual, expected, "logits", "network_fp32")


@pytest.mark.parametrize("modulate", ["input", "output"])
def test_second_derivatives_to_the_patches(tiny_discriminator, modulate):
    discriminator = tiny_discriminator(
        modulate=modulate, resolution=8, patch_resolution=4, channel_max=2, camera_conditioning=True
    ).eval()
    patches = draw(2, 3, 4, 4, seed=3)

    def logits(patches):
        return discriminator(patches, Patch(PATCH.scale[:2], PATCH.offset[:2]), None, ANGLES[:2])

    gradgradcheck(logits, {"patches": patches}, f"D, modulate {modulate}")


@pytest.mark.parametrize("modulate", ["input", "output", "none"])
def test_r1_gradient_against_differences(tiny_discriminator, assert_directional_derivative, modulate):
    discriminator = tiny_discriminator(modulate=modulate, label_dim=3, camera_conditioning=True).eval()
    label = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]]

    def penalty():
        patches = PATCHES.clone().requires_grad_()
        return r1_penalty(discriminator(patches, PATCH, label, ANGLES), patches).mean()

    assert penalty() > 1e-6
    # The penalty jumps where an activation changes its sign: a short step meets few of these.
    assert_directional_derivative(penalty, dict(discriminator.named_parameters()), step=1e-7)


def r1_gradients(discriminator, dtype):
    """The penalty's gradient to every parameter that it reaches, and the penalty."""
    patches = PATCHES.to(dtype).requires_grad_()
    label = torch.eye(3, dtype=dtype)[[0, 2, 1, 0]]
    patch = Patch(*(x.to(dtype) for x in PATCH))
    penalty = r1_penalty(discriminator(patches, patch, label, ANGLES.to(dtype)), patches)
    parameters = dict(discriminator.named_parameters())
    gradients = torch.autograd.grad(penalty.mean(), list(parameters.values()), allow_unused=True)
    reached = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return {"penalty": penalty.detach(), **reached}


@pytest.mark.parametrize(
    ("modulate", "resolution", "kernels"),
    [
        *((modulate, resolution, "here") for modulate in ("input", "output", "none") for resolution in (16, 32)),
        ("input", 16, "emulated"),
        ("output", 16, "emulated"),
    ],
)
def test_r1_on_the_backends_equals_the_reference(
    tiny_discriminator, modulate, resolution, kernels, poisoned, monkeypatch
):
    """Every parameter's second derivative, in float64 to rounding, in float32 as near as the reference."""
    if kernels == "emulated":
        emulate(monkeypatch)
    settings = {"modulate": modulate, "resolution": resolution, "label_dim": 3, "camera_conditioning": True}

    def run(backend, dtype):
        discriminator = tiny_discriminator(dtype=torch.float64, backend=backend, **settings).eval()
        for name, p in discriminator.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
        return r1_gradients(discriminator.to(dtype), dtype)

    truth, reference = run("reference", torch.float64), run("reference", torch.float32)
    scale = {name: x.abs().max().clamp(min=1e-9) for name, x in truth.items()}
    actual = run(None, torch.float64)
    assert actual.keys() == truth.keys()  # an optimizer steps where there is a gradient, be it 0
    for name, x in actual.items():
        assert_close(x / scale[name], truth[name] / scale[name], name)

    def relative(values):
        """All in one vector, so that no single parameter where the reference is lucky decides."""
        return torch.cat([(x / scale[name]).flatten() for name, x in values.items()])

    actual = relative(run(None, torch.float32)).float()
    assert_error_within_reference(actual, relative(reference).float(), relative(truth), "penalty and gradients")


def test_r1_equals_the_gradient_by_differences(tiny_discriminator):
    """|d sum(D) / d patch|^2, the gradient taken by differences in every pixel of one image."""
    discriminator = tiny_discriminator(channel_max=4)
    patches = PATCHES.clone().requires_grad_()
    actual = r1_penalty(discriminator(patches, PATCH), patches)
    step = 1e-5
    total = 0.0
    with torch.no_grad():
        for index in range(3 * 8 * 8):
            values = []
            for sign in (1, -1):
                moved = PATCHES.clone()
                moved[1].view(-1)[index] += sign * step
                values.append(discriminator(moved, PATCH).sum().item())
            total += ((values[0] - values[1]) / (2 * step)) ** 2
    assert_close(actual[1], torch.tensor(total), "penalty of image 1", "gradcheck")


def test_a_training_step_reaches_every_parameter(tiny_discriminator):
    for modulate in ("input", "output", "none"):
        discriminator = tiny_discriminator(modulate=modulate, camera_conditioning=True, camera_dropout=0.0).train()
        discriminator(PATCHES, PATCH, None, ANGLES).square().mean().backward()
        for name, p in discriminator.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


# Ablations


def test_which_discriminator():
    assert discriminator_class(DiscriminatorConfig()) is Discriminator
    assert discriminator_class(DiscriminatorConfig(scales=2)) is ScaleDiscriminators


@pytest.mark.parametrize("scales", [2, 4])
def test_scale_specific_discriminators_see_their_own_groups(scales):
    """Each is a standard discriminator; their groups, strided over the batch, are judged as if alone."""
    torch.manual_seed(0)
    config = DiscriminatorConfig(channel_base=128, channel_max=8, scales=scales, minibatch_std_group=2)
    judges = ScaleDiscriminators(config, 32, 8, label_dim=2).double()
    assert len(judges.discriminators) == scales
    assert judges.scales == torch.linspace(1, 0.25, scales).tolist()
    assert not hasattr(judges.discriminators[0], "hypernetwork")
    support = torch.tensor(judges.scales).double()
    which = torch.tensor([1, 0, scales - 1, 1] * 2)  # 4 groups of 2, strided
    patch = Patch(support[which], draw(8, 2) * 0)
    inputs = draw(8, 3, 8, 8), *patch, draw(8, 2, seed=1), ANGLES.repeat(2, 1)
    logits = judges(inputs[0], patch, *inputs[3:])
    for k in range(scales):
        mine = which == k
        if mine.any():
            patches, scale, offset, *condition = (x[mine] for x in inputs)
            expected = judges.discriminators[k](patches, Patch(scale, offset), *condition)
            assert_close(logits[mine], expected, f"scale {k}")
    logits.sum().backward()
    for k, judge in enumerate(judges.discriminators):
        assert all((p.grad is not None) == bool((which == k).any()) for p in judge.parameters()), k
    off = patch._replace(scale=(patch.scale + 0.1 * torch.tensor([1.0, -1.0, 0.5, -0.5] * 2)).clamp(0.2, 1))
    assert torch.equal(judges(inputs[0], off, *inputs[3:]), logits)  # which are those of the nearest scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scale_specific_discriminators_do_not_wait_for_the_gpu():
    """With the scales on the CPU, where the trainer draws them."""
    config = DiscriminatorConfig(channel_base=128, channel_max=8, scales=2, minibatch_std_group=2)
    judges = ScaleDiscriminators(config, 32, 8).cuda()
    patches, scale = draw(8, 3, 8, 8, dtype=torch.float32).cuda(), torch.tensor([1.0, 0.25, 1.0, 0.25] * 2)
    patch = Patch(scale, torch.zeros(8, 2, device="cuda"))
    judges(patches, patch).sum().backward()  # loads what is loaded once
    torch.cuda.set_sync_debug_mode("error")
    try:
        judges(patches, patch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_global_context_is_three_more_channels(tiny_discriminator):
    judge, plain = tiny_discriminator(global_context="concat"), tiny_discriminator()
    assert parameter_count(judge) == parameter_count(plain) + 3 * 8
    whole = draw(4, 3, 8, 8, seed=5)
    logits = [judge(torch.cat([PATCHES, w], dim=1), PATCH) for w in (whole, whole.flip(0))]
    assert not torch.equal(*logits)
    with pytest.raises(ValueError, match=r"patches must have shape \['B', 6, 8, 8\], got \[4, 3, 8, 8\]"):
        judge(PATCHES, PATCH)


def test_a_pasted_patch_is_judged_in_its_image(tiny_discriminator):
    """No leading blocks, so the same weights; whole images of 16 pixels come in."""
    judge, plain = tiny_discriminator(global_context="paste"), tiny_discriminator()
    assert parameter_count(judge) == parameter_count(plain)
    assert judge(draw(4, 3, 16, 16), PATCH).shape == (4,)
    with pytest.raises(ValueError, match=r"patches must have shape \['B', 3, 16, 16\], got \[4, 3, 8, 8\]"):
        judge(PATCHES, PATCH)


def test_a_smaller_patch_embedding(tiny_discriminator):
    """What the flags leave out is missing from the head and the hypernetwork."""
    judge, plain = tiny_discriminator(patch_cosines=False, patch_skip_lowest=1), tiny_discriminator()
    levels = len(plain.patch_encoder.frequencies)
    assert plain.patch_encoder.dim - judge.patch_encoder.dim == 2 * levels - (levels - 1)
    assert judge.hypernetwork.embed.weight.shape[1] == 3 * judge.patch_encoder.dim
    assert judge(PATCHES, PATCH).shape == (4,)
