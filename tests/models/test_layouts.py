"""What full-size networks would keep and copy on a GPU, seen without one: tensors of no content that claim to be there.

Layouts: every large tensor arrives where it is read in a layout that the reader takes as it is. A convolution of
cuDNN takes channels_last if the image or the kernel comes so, and copies what does not; our epilogues take
channels_last, our other kernels anything dense, all tensors of a call alike.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from epigraf_fast.camera import Patch
from epigraf_fast.config import AugmentConfig, preset
from epigraf_fast.models.augment import Augment
from epigraf_fast.models.discriminator import Discriminator
from epigraf_fast.models.layers import Conv2d
from epigraf_fast.models.synthesis import Synthesis
from epigraf_fast.training.losses import discriminator_loss, r1_penalty

LARGE = 2**17  # numbers, from which on a tensor counts: at 4x4 none does
PUBLISHED = 1781  # MiB an image that the published synthesis network keeps for its backward at FFHQ-512
KEPT = 440  # MiB that this one keeps in fp32; lower it when it is less


@pytest.fixture
def elsewhere(monkeypatch):
    """In this mode tensors have shapes, layouts and the word that they lie on a GPU."""
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(FakeTensor, "is_cpu", property(lambda _: False), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeTensorMode() as mode:
        yield mode


def is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and is_last(x))


class Copies(TorchDispatchMode):
    """`found`: what is copied for its layout alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        large = [x for x in args if isinstance(x, Tensor) and x.ndim == 4 and x.numel() >= LARGE and x.shape[-1] > 3]
        wrong = []
        if name.startswith("epigraf_fast::layer_epilogue"):
            wrong = [x for x in large if not is_last(x)]
        elif name.startswith("epigraf_fast::") and large:
            wrong = [
                x for x in large if not is_dense(x) or (is_last(x) != is_last(large[0]) and not alike(x, large[0]))
            ]
        elif name in ("aten::convolution", "aten::convolution_backward"):
            operands = args[:3] if name.endswith("backward") else args[:2]
            *images, kernel = operands
            last = any(is_last(x) and not x.is_contiguous() for x in (images[-1], kernel))
            taken = is_last if last else Tensor.is_contiguous
            wrong = [x for x in operands if x.numel() >= LARGE and not taken(x)]  # kernels, too: these lie ready
        result = func(*args, **(kwargs or {}))
        if name in ("aten::clone", "aten::_to_copy", "aten::copy_") and large:
            source = large[-1]
            if isinstance(result, Tensor) and is_dense(source) and result.stride() != source.stride():
                wrong = [source]
        self.found += [f"{name} of {list(x.shape)}, {x.stride()}" for x in wrong]
        return result


def alike(x: Tensor, y: Tensor) -> bool:
    return (x.is_contiguous() and y.is_contiguous()) or (is_last(x) and is_last(y))


def discriminator_of(resolution: int, half: int) -> Discriminator:
    discriminator = Discriminator(
        preset("ffhq").discriminator, resolution, 64, half_blocks=half, half_on=("cpu",), backend="cpu"
    )
    for layer in discriminator.modules():  # as the trainer has it on a GPU
        if isinstance(layer, Conv2d):
            layer.weight = torch.nn.Parameter(layer.weight.detach().contiguous(memory_format=torch.channels_last))
    return discriminator


@contextlib.contextmanager
def kept_for_backward(batch: int):
    """The storages that are saved inside, once each, of what there is for every image: (shape, dtype, bytes)."""
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if batch in x.shape:
            storages.setdefault(x.untyped_storage()._cdata, x)
        return x

    found: list[tuple[tuple[int, ...], torch.dtype, int]] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
    found += [(tuple(x.shape), x.dtype, x.untyped_storage().nbytes()) for x in storages.values()]


def test_memory_of_the_synthesis_network(elsewhere):
    """A quarter of the published network's; with half blocks no activation of theirs is kept in fp32."""
    for half, most in ((0, KEPT), (4, 0.52 * KEPT)):
        synthesis = Synthesis(512, 512, 96, half_blocks=half, half_on=("cpu",), backend="cpu")
        ws = torch.randn(7, synthesis.num_ws, 512)
        with kept_for_backward(len(ws)) as kept:
            planes = synthesis(ws)
        assert planes.dtype == torch.float32
        assert is_last(planes)
        mebibytes = sum(size for *_, size in kept) / len(ws) / 2**20
        assert 0.95 * most < mebibytes <= most <= PUBLISHED / 2, f"{mebibytes} MiB an image"
        if half:
            activations = [shape for shape, dtype, _ in kept if len(shape) == 4 and shape[0] == 7 and shape[-1] > 64]
            singles = [shape for shape, dtype, _ in kept if shape in activations and dtype == torch.float32]
            assert activations
            assert not singles, "fp32 beside fp16"


def test_no_copy_for_a_layout(elsewhere):
    """In the G, D and R1 phases, forward and backward, blocks in fp16 and in fp32."""
    synthesis = Synthesis(512, 128, 96, half_blocks=2, half_on=("cpu",), backend="cpu")
    discriminator, augment = discriminator_of(128, 2), Augment(AugmentConfig(), backend="cpu")
    batch = 4
    patch = Patch(torch.rand(2 * batch), torch.rand(2 * batch, 2))
    label, angles = torch.zeros(2 * batch, 0), torch.rand(2 * batch, 3)
    p = torch.full([], 0.5)
    ws, patches = torch.randn(batch, synthesis.num_ws, 512), torch.randn(batch, 3, 64, 64)
    with Copies() as copies:
        planes = synthesis(ws)
        planes.backward(torch.empty_like(planes))
        assert copies.found == [], "planes"
        both = torch.cat([patches, patches]).requires_grad_()  # what the G phase asks of D, and the D phase
        logits = discriminator(augment(both, p), patch, label, angles, parts=2)
        discriminator_loss(*logits.chunk(2)).backward()
        assert copies.found == [], "G and D"
        reals = patches.clone().requires_grad_()
        logits = discriminator(augment(reals, p), *(next(iter(x.split(batch))) for x in (patch, label, angles)))
        r1_penalty(logits, reals).mean().backward()
        assert copies.found == [], "R1"
