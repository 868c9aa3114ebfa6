"""The 2D baseline: its images, their patches, and the second derivatives of path length regularization."""

from __future__ import annotations

import pytest
import torch

from checks import assert_close, draw
from epigraf_fast.camera import Patch, extract_patches
from epigraf_fast.config import CameraConfig, GeneratorConfig, RendererConfig
from epigraf_fast.models.generator import Generator
from epigraf_fast.models.image_generator import ImageGenerator, generator_class
from epigraf_fast.models.mapping import StyleMapping
from epigraf_fast.models.synthesis import Synthesis
from epigraf_fast.training.losses import path_lengths
from epigraf_fast.training.memory import parameter_count

ANGLES = torch.tensor([[0.4, 1.2, 0.0], [-2.0, 2.0, 0.0]], dtype=torch.float64)


def make(label_dim: int = 0, **settings) -> ImageGenerator:
    torch.manual_seed(0)
    config = GeneratorConfig(
        z_dim=6, w_dim=8, channel_base=64, channel_max=8, plane_resolution=512, backbone="image", **settings
    )
    options = {"label_dim": label_dim, "image_resolution": 16}
    return ImageGenerator(config, RendererConfig(), CameraConfig(), **options).double().eval()


def test_which_generator() -> None:
    assert generator_class(GeneratorConfig()) is Generator
    assert generator_class(GeneratorConfig(backbone="image")) is ImageGenerator


def test_size() -> None:
    """The synthesis network of the planes with 3 outputs for 96, and no decoder."""
    with torch.device("meta"):
        generator = ImageGenerator(GeneratorConfig(), RendererConfig(), CameraConfig(), image_resolution=512)
    channels = [512, 512, 512, 512, 512, 256, 128, 64]
    assert parameter_count(generator) == 28_983_507 - 2372 - 93 * sum(c + 1 for c in channels)


def test_weights_are_those_of_synthesis_and_mapping_alone() -> None:
    """Their names, order and values for a seed, so that checkpoints fit; and no number more is drawn."""
    generator, drawn = make(label_dim=3), torch.rand(4)
    torch.manual_seed(0)
    synthesis = Synthesis(8, 16, 3, channel_base=64, channel_max=8)
    parts = torch.nn.ModuleDict({"synthesis": synthesis, "mapping": StyleMapping(6, 3, 8, synthesis.num_ws, 2)})
    assert torch.equal(drawn, torch.rand(4))
    state, expected = generator.state_dict(), parts.double().state_dict()
    assert list(state) == ["mean_camera_pose", *expected]
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_images_are_those_of_the_synthesis_network() -> None:
    generator, z = make(), draw(2, 6)
    images = generator(z, ANGLES, resolution=16, noise_mode="const")
    assert torch.equal(images.rgb, generator.synthesis(generator.ws(z), "const"))
    assert images.rgb.shape == (2, 3, 16, 16)
    assert torch.equal(images.depth, torch.zeros(2, 1, 16, 16))
    assert torch.equal(images.weight_sum, torch.ones(2, 1, 16, 16))


def test_patches_are_cut_from_the_image() -> None:
    generator, z = make(), draw(2, 6)
    image = generator(z, ANGLES, resolution=16, noise_mode="const").rgb
    cut = Patch(torch.tensor([0.5, 0.7]).double(), torch.tensor([[0.3, 0.1], [0.0, 0.25]]).double())
    options = {"patch": cut}
    patch = generator(z, ANGLES, resolution=8, noise_mode="const", **options).rgb
    assert_close(patch, extract_patches(image, cut, 8), "patch")
    small = generator(z, ANGLES, resolution=8, noise_mode="const").rgb
    assert_close(small, extract_patches(image, Patch.whole(image), 8), "preview")


def test_conditions() -> None:
    generator, z = make(label_dim=3, pose_conditioning=True), draw(2, 6)
    label = torch.eye(3).double()[:2]
    same = [
        generator(z, ANGLES, label, resolution=8, conditioning_angles=a, noise_mode="const").rgb for a in (ANGLES, None)
    ]
    assert not torch.equal(*same)
    with pytest.raises(ValueError, match="label must have shape"):
        generator(z, ANGLES, resolution=8)


def test_style_mixing_changes_late_vectors_only() -> None:
    generator, z = make(), draw(2, 6)
    seen = []
    handle = generator.synthesis.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(1)  # 0 would draw the same z again
    generator(z, ANGLES, resolution=16, style_mixing=1.0)
    handle.remove()
    ws = generator.ws(z)
    assert torch.equal(seen[0][:, 0], ws[:, 0])
    assert not torch.equal(seen[0][:, -1], ws[:, -1])


def test_second_derivatives_of_the_path_length(assert_directional_derivative) -> None:
    """The penalty's derivatives to weights of every kind against differences."""
    generator, z, noise = make(), draw(2, 6), draw(2, 3, 16, 16, seed=1)

    def penalty() -> torch.Tensor:
        ws = generator.ws(z)
        return (path_lengths(generator.synthesis(ws, "const"), ws, noise) - 0.3).square().mean()

    names = ("mapping.fc0.weight", "synthesis.b8.conv0.weight", "synthesis.b16.conv1.affine.weight")
    names += ("synthesis.b4.const", "synthesis.b16.to_planes.weight")
    parameters = dict(generator.named_parameters())
    assert_directional_derivative(penalty, {name: parameters[name] for name in names})
