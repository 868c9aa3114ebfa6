"""What is checked of the kernels on a device, item by item, in a process of its own that may crash: see `proof`.

$ python -m epigraf_fast.training.proof_items REQUEST.json

An item is "backend op", "backend gradients" (of tiny networks), "backend settings" (a micro-batch of the run, as it is)
or "graphs phases" (recorded ones). Truth is the reference, in float64 on the same device for ops.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..config import Config, from_dict
from ..errors import UserError
from ..ops import backends, convolution
from ..ops.verdicts import FAILED, PASSED, SLOWER, UNSUITED
from .graphs import GraphedPhase, GraphMemory
from .networks import find_device, set_arithmetic
from .precision import half_blocks_of, mode_of
from .step import Samples, Trainer

BEGUN = "begun"  # the state of an item that is being checked; whoever reads nothing after it knows where it ended

# Of the largest value of the truth. They find faults; roundings are far below.
# Of the largest value, by what products and images are rounded to.
TOLERANCE = {"fp32": 1e-4, "tf32x3": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
COSINE, NORM = 1e-5, 1e-3  # what gradients of networks may differ by from 1, in direction and length
GRADIENTS, SETTINGS, TIME, RECORDED = "gradients", "settings", "time", "phases"
SLOWER_BY = 1.05  # that kernels may be slower and are still taken: a measurement is no better
ROUNDS = 3  # of each of two ways, in turn
GRAPHS = "graphs"  # the backend of the item of phases that are recorded
BOTH = "all"  # the backend of an item that is checked with those of all kernels that passed until then

SEED, PHILOX = 2**40 + 123, (0.23770536, 0.62879139, 2.16664696, 2.86162829)  # four depths of ray 0 in [0, 3]

Values = dict[str, Tensor]


class Slow(Exception):
    """Kernels take longer than what they replace."""


class Wrong(Exception):
    """A kernel gives something else than the reference."""


class Sizes(NamedTuple):
    """Of the inputs of ops."""

    batch: int = 2
    rays: int = 67
    planes: int = 64
    image: int = 33


class Request(NamedTuple):
    """What is to be checked.

    Args:
        config: The run's settings, as `to_dict` gives them.
        label_dim, angles: Of its data set: [N, 3], some of its poses.
        micro: Images of a micro-batch.
        items: In order.
        passed: op -> backends that have passed, for items of networks.
    """

    config: dict[str, Any]
    label_dim: int
    angles: list[list[float]]
    micro: int
    device: str
    items: list[str]
    passed: dict[str, list[str]]
    sizes: Sizes = Sizes()


class Case:
    """The settings of a request, and inputs of ops on its device."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.config = from_dict(request.config)
        self.device = find_device(request.device)
        self.sizes = Sizes(*request.sizes)

    def draw(self, *shape: int, seed: int, low: float | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers, or with `low` even ones in [low, 1); the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        if low is None:
            x = torch.randn(*shape, generator=generator)
        else:
            x = low + (1 - low) * torch.rand(*shape, generator=generator)
        return x.to(self.device, dtype)

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the convolutions' images."""
        found, mode = [torch.float32], mode_of(self.config)
        if self.device.type == "cuda":
            found += [mode.half] if mode.half is not None else []
            found += [mode.half_of_discriminator] if half_blocks_of(self.config) else []
        return tuple(dict.fromkeys(found))

    def agree(
        self,
        op: Callable[[Values, str], tuple[Tensor, ...]],
        inputs: Values,
        wanted: tuple[str, ...],
        backend: str,
        *,
        order: int = 1,
        tolerance: float = TOLERANCE["fp32"],
    ) -> None:
        """Compares outputs and derivatives up to `order`. Raises Wrong where they are not the reference's."""
        truth = derivatives(op, {name: x.double() for name, x in inputs.items()}, wanted, "reference", order)
        found = derivatives(op, inputs, wanted, backend, order)
        for name, expected in truth.items():
            compare(name, found[name], expected, tolerance)


def derivatives(
    op: Callable[[Values, str], tuple[Tensor, ...]], inputs: Values, wanted: tuple[str, ...], backend: str, order: int
) -> Values:
    """Outputs, gradients and, with order 2, the gradients of a sum of these with random weights; each by its name."""
    values = {name: x.detach().requires_grad_(name in wanted and order > 0) for name, x in inputs.items()}
    outputs = op(values, backend)
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    if order:
        leaves = [values[name] for name in wanted]
        grads = torch.autograd.grad(
            outputs, leaves, [_weights(y, i) for i, y in enumerate(outputs)], create_graph=order > 1
        )
        found |= {f"gradient to {name}": grad for name, grad in zip(wanted, grads, strict=True)}
        if order > 1:
            moving = [(i, grad) for i, grad in enumerate(grads) if grad.requires_grad]
            weights = [_weights(grad, 100 + i) for i, grad in moving]
            seconds = torch.autograd.grad(
                [grad for _, grad in moving], leaves, weights, allow_unused=True, materialize_grads=True
            )
            found |= {f"second gradient to {name}": x for name, x in zip(wanted, seconds, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def _weights(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 + seed)).to(x)


def compare(name: str, found: Tensor, truth: Tensor, tolerance: float) -> None:
    """Raises Wrong where a value is not finite, or is off by more than the tolerance times the largest of the truth."""
    if found.shape != truth.shape:
        raise Wrong(f"{name} has shape {list(found.shape)}, not {list(truth.shape)}")
    if not bool(found.isfinite().all()):
        raise Wrong(f"{name} has NaN or infinite values")
    if truth.numel():
        error, largest = float((found.double() - truth).abs().amax()), float(truth.abs().amax())
        if error > tolerance * max(largest, 1e-6):
            raise Wrong(
                f"{name} is off by {error / max(largest, 1e-6):.2g} of the largest value, {tolerance:g} is allowed"
            )


# The renderer's ops


def _planes(case: Case) -> Tensor:
    channels, size = case.config.generator.plane_channels, case.sizes.planes
    planes = case.draw(case.sizes.batch, 3 * channels, size, size, seed=1)
    return planes.contiguous(memory_format=torch.channels_last)


def check_sample_triplane(case: Case, backend: str) -> None:
    inputs = {"planes": _planes(case), "points": case.draw(case.sizes.batch, case.sizes.rays, 3, seed=2, low=-1.1)}
    for deterministic in (False, True):

        def op(x: Values, name: str, deterministic: bool = deterministic) -> tuple[Tensor, ...]:
            return (ops.sample_triplane(**x, deterministic=deterministic, backend=name),)

        case.agree(op, inputs, ("planes",), backend)


def check_decode_triplane(case: Case, backend: str) -> None:
    """Coarse and fine samples of rays, as the renderer asks for them."""
    config, (batch, rays, *_) = case.config, case.sizes
    channels, hidden = config.generator.plane_channels, config.generator.decoder_hidden
    inputs = {
        "planes": _planes(case),
        "ray_origins": case.draw(batch, rays, 3, seed=2, low=-0.3),
        "ray_directions": F.normalize(case.draw(batch, rays, 3, seed=3), dim=-1),
        "t": case.draw(batch, rays, config.renderer.coarse_samples, seed=4, low=0.0).sort(dim=-1).values,
        "w0": case.draw(hidden, channels, seed=5) / channels**0.5,
        "b0": case.draw(hidden, seed=6),
        "w1": case.draw(4, hidden, seed=7) / hidden**0.5,
        "b1": case.draw(4, seed=8),
    }
    t_fine = case.draw(batch, rays, max(1, config.renderer.fine_samples), seed=9, low=0.0).sort(dim=-1).values
    for deterministic in (False, True):

        def op(x: Values, name: str, deterministic: bool = deterministic) -> tuple[Tensor, ...]:
            rays = {key: value for key, value in x.items() if key not in ops.Network._fields}
            coarse, _, fine = ops.decode_triplane_coarse_to_fine(
                **rays,
                network=ops.Network(*(x[key] for key in ops.Network._fields)),
                resample=lambda coarse: t_fine.to(coarse.dtype if x["t"].dtype == torch.float64 else t_fine.dtype),
                precision=mode_of(config).decoder,
                deterministic=deterministic,
                backend=name,
            )
            return coarse, fine

        wanted = ("planes", *ops.Network._fields)
        case.agree(op, inputs, wanted, backend, tolerance=TOLERANCE[mode_of(config).decoder])


def _depths(case: Case, samples: int, seed: int) -> Tensor:
    """Sorted, along rays of about two world units, whatever the run's are: densities then matter."""
    even = torch.linspace(0.1, 2.0, samples, device=case.device)
    return even + case.draw(case.sizes.batch, case.sizes.rays, samples, seed=seed, low=0.0) * (1.5 / samples)


def check_sample_importance(case: Case, backend: str) -> None:
    config, (batch, rays, *_) = case.config, case.sizes
    coarse, fine = max(3, config.renderer.coarse_samples), max(1, config.renderer.fine_samples)
    inputs = {
        "t": _depths(case, coarse, seed=11),
        "raw_density": case.draw(batch, rays, coarse, seed=12) - config.renderer.density_shift,
        "u": case.draw(batch, rays, fine, seed=13, low=0.0),
        "jitter": case.draw(batch, rays, coarse, seed=14, low=0.0),
    }

    def op(x: Values, name: str) -> tuple[Tensor, ...]:
        t = ops.sample_stratified(batch, rays, coarse, 0.0, 2.0, jitter=x["jitter"], backend=name)
        options = {**config.renderer.density, "t_sorted": True, "backend": name}
        return t, ops.sample_importance(x["t"], x["raw_density"], x["u"], **options)

    case.agree(op, inputs, (), backend, order=0)
    seed = torch.tensor([SEED], device=case.device)
    drawn = ops.sample_stratified(1, 1, 4, 0.0, 3.0, seed=seed, device=case.device, backend=backend)
    compare(
        "depths from a seed", drawn, torch.tensor(PHILOX, dtype=torch.float64, device=case.device).view(1, 1, 4), 1e-5
    )


def check_composite(case: Case, backend: str) -> None:
    config, (batch, rays, *_) = case.config, case.sizes
    coarse, fine = config.renderer.coarse_samples, config.renderer.fine_samples
    shift = torch.tensor([0.0, 0.0, 0.0, config.renderer.density_shift], device=case.device)
    inputs = {
        "t": _depths(case, coarse, seed=21),
        "values": case.draw(batch, rays, coarse, 4, seed=22) - shift,
        "density_noise": case.draw(batch, rays, coarse + fine, seed=25),
        "background": case.draw(batch, rays, 3, seed=26),
    }
    if fine:
        inputs |= {
            "t_fine": _depths(case, fine, seed=23),
            "values_fine": case.draw(batch, rays, fine, 4, seed=24) - shift,
        }

    def op(x: Values, name: str) -> tuple[Tensor, ...]:
        options = {"last_back": config.renderer.last_back, "white_background": config.renderer.white_background}
        return tuple(ops.composite(**x, **config.renderer.density, **options, t_sorted=True, backend=name)[:4])

    case.agree(op, inputs, tuple(name for name in inputs if name not in ("t", "t_fine")), backend)


def check_cut(case: Case, backend: str) -> None:
    batch, size = case.sizes.batch, case.sizes.image
    inputs = {"x": case.draw(batch, 8, size, size, seed=31).contiguous(memory_format=torch.channels_last)}
    first = torch.tensor([[i % 3, (2 * i) % 5] for i in range(batch)], device=case.device)

    def op(x: Values, name: str) -> tuple[Tensor, ...]:
        return (ops.cut(x["x"], first, (size - 4, size - 5), backend=name),)

    case.agree(op, inputs, ("x",), backend, order=2)


# The convolutions' ops


def _images(case: Case, channels: int, seed: int, dtype: torch.dtype) -> Tensor:
    x = case.draw(case.sizes.batch, channels, case.sizes.image, case.sizes.image, seed=seed, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _tolerance(dtype: torch.dtype, precision: str) -> float:
    return TOLERANCE[{torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, precision)]


def check_bias_act(case: Case, backend: str) -> None:
    def op(x: Values, name: str) -> tuple[Tensor, ...]:
        return (ops.bias_act(x["x"], x["bias"], act="lrelu", clamp=2.0, backend=name),)

    for dtype in case.dtypes():
        inputs = {"x": _images(case, 12, 41, dtype), "bias": case.draw(12, seed=42, dtype=dtype)}
        case.agree(op, inputs, ("x", "bias"), backend, order=2, tolerance=_tolerance(dtype, "fp32"))


def check_upfirdn2d(case: Case, backend: str) -> None:
    for dtype in case.dtypes():
        inputs = {
            "x": _images(case, 12, 43, dtype),
            "kernel": torch.tensor([1.0, 3.0, 3.0, 1.0], device=case.device) / 8,
        }
        for factors in ({"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}, {"down": 2, "padding": 1}):

            def op(x: Values, name: str, factors: dict[str, Any] = factors) -> tuple[Tensor, ...]:
                return (ops.upfirdn2d(x["x"], x["kernel"], **factors, backend=name),)

            case.agree(op, inputs, ("x",), backend, order=2, tolerance=_tolerance(dtype, "fp32"))


def check_modulated_conv2d(case: Case, backend: str) -> None:
    """Modulation and two layers of a chain: one at the resolution, one up."""
    clamp = case.config.generator.clamp or None
    c_in, c_out = (convolution.LEAST, convolution.LEAST) if mode_of(case.config).split else (16, 24)
    for dtype in case.dtypes():
        inputs = {
            "x": _images(case, c_in, 44, dtype),
            "weight": case.draw(c_out, c_in, 3, 3, seed=45) / (9 * c_in) ** 0.5,
            "style": 1 + case.draw(case.sizes.batch, c_in, seed=46) / 4,
            "bias": case.draw(c_out, seed=47),
            "next": 1 + case.draw(case.sizes.batch, c_out, seed=48) / 4,
            "kernel": torch.tensor([1.0, 3.0, 3.0, 1.0], device=case.device) / 8,
        }
        for up in (1, 2):
            size = case.sizes.image * up
            noise = case.draw(1, 1, size, size, seed=49)

            def op(x: Values, name: str, up: int = up, noise: Tensor = noise) -> tuple[Tensor, ...]:
                weight, style, demod = ops.modulation(x["weight"], x["style"], x["x"].dtype, backend=name)
                image = x["x"] if style is None else x["x"] * style.to(x["x"].dtype)[:, :, None, None]
                kernel = x["kernel"] if up > 1 else None
                options = {"bias": x["bias"], "styles": (x["next"],), "act": "lrelu", "clamp": clamp, "backend": name}
                options |= {"noise": noise.to(x["bias"]), "strength": x["bias"][0]}
                return ops.modulated_layer(image, weight, demod, up=up, kernel=kernel, **options)

            wanted = ("x", "weight", "style", "bias", "next")
            tolerance = _tolerance(dtype, "tf32" if mode_of(case.config).tf32 else "fp32")
            case.agree(op, inputs, wanted, backend, order=2, tolerance=tolerance)


# Networks


class Poses:
    """Stands for a data set: its poses and kinds of labels, and noise for images."""

    def __init__(self, case: Case) -> None:
        self.angles = torch.tensor(case.request.angles)
        self.label_dim = case.request.label_dim
        self.labels = torch.zeros(len(self.angles), self.label_dim)
        if self.label_dim:
            self.labels[torch.arange(len(self.labels)), torch.arange(len(self.labels)) % self.label_dim] = 1
        self.label_values = torch.arange(self.label_dim)
        self.mean_camera_pose = self.angles.mean(dim=0)
        self.resolution = case.config.resolution

    def __len__(self) -> int:
        return len(self.angles)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, self.resolution, self.resolution), generator=generator, dtype=torch.uint8)
        return image, self.labels[index], self.angles[index]


def tiny(config: Config) -> Config:
    """The settings at a small size: the constants that kernels are compiled with stay, and fp32 shows every fault."""
    generator, discriminator, patch = config.generator, config.discriminator, config.patch
    resolution = min(config.resolution, 64)
    group = min(discriminator.minibatch_std_group, 4)
    return dataclasses.replace(
        config,
        resolution=resolution,
        batch=group,
        micro_batch=None,
        precision="fp32",
        backend="auto",
        cuda_graphs=False,
        generator=dataclasses.replace(
            generator,
            plane_resolution=min(generator.plane_resolution, 128),
            channel_base=min(generator.channel_base, 1024),
            channel_max=min(generator.channel_max, 64),
        ),
        discriminator=dataclasses.replace(
            discriminator,
            channel_base=min(discriminator.channel_base, 1024),
            channel_max=min(discriminator.channel_max, 64),
            minibatch_std_group=group,
            half_blocks=0,
        ),
        patch=dataclasses.replace(patch, resolution=min(patch.resolution, 16), importance=0),
    )


def phases(trainer: Trainer, *, drawn: bool) -> dict[str, list[Tensor]]:
    """Phase -> the gradients of one micro-batch.

    Args:
        drawn: Whether the renderer draws samples and noise, which kernels do otherwise than torch does.
    """
    return {name: _copied(compute(*inputs)) for name, compute, inputs in _phases(trainer, drawn=drawn, seed=0)}


def _copied(result: tuple[list[Tensor | None], Any]) -> list[Tensor]:
    return [x.detach().clone() for x in result[0] if x is not None]


def _phases(
    trainer: Trainer, *, drawn: bool, seed: int
) -> Iterator[tuple[str, Callable[..., tuple[list[Tensor | None], Any]], tuple[Any, ...]]]:
    """Name, function and inputs of every phase, the networks being ready for it; see `Trainer._gradients`."""
    torch.manual_seed(seed)
    trainer.generator.train(drawn)
    config, share = trainer.config, trainer.share
    fakes = [trainer._with_patches(part) for part in trainer._draw_fakes(2 * share).split(share)]
    index = torch.arange(share) % len(trainer.angles)
    images = torch.rand(share, 3, config.resolution, config.resolution).to(trainer.device) * 2 - 1
    angles = trainer.angles[index].to(trainer.device)
    reals = Samples(images, trainer.labels[index.to(trainer.device)], angles, angles)
    now = trainer._schedule()
    if not drawn:
        now = now._replace(density_noise_std=0.0)
    g, d = trainer.g_optimizer, trainer.d_optimizer
    trainer.discriminator.requires_grad_(False)
    yield "G", functools.partial(trainer._gradients, g, trainer._generator_phase), (now, fakes[0])
    trainer.discriminator.requires_grad_(True)
    yield "D", functools.partial(trainer._gradients, d, trainer._discriminator_phase), (now, fakes[1], reals)
    if config.optim.r1_gamma:
        yield "R1", functools.partial(trainer._gradients, d, trainer._regularization_phase), (now, reals)


def check_gradients(case: Case, backend: str) -> None:
    """G, D and R1 of tiny networks: on the kernels that passed, and without any."""
    config = tiny(case.config)
    set_arithmetic(config)
    backends.accept({})
    torch.manual_seed(0)
    trainer = Trainer(config, Poses(case), case.device)
    try:
        plain = phases(trainer, drawn=False)
        backends.accept(_only(case, backend))
        fast = phases(trainer, drawn=False)
    finally:
        set_arithmetic(case.config)
    for name, grads in plain.items():
        _same_gradient(f"the gradient of {name}", fast[name], grads, "that without kernels")


def _same_gradient(what: str, found: list[Tensor], expected: list[Tensor], other: str) -> None:
    """Raises Wrong where a gradient, of many tensors, has another direction or length."""
    one, truth = (torch.cat([x.flatten() for x in part]).double() for part in (found, expected))
    if not bool(one.isfinite().all()):
        raise Wrong(f"{what} is not finite")
    length, cosine = float(one.norm() / truth.norm()), float(F.cosine_similarity(one, truth, dim=0))
    if not (cosine >= 1 - COSINE and abs(length - 1) <= NORM):
        raise Wrong(f"{what} has cosine {cosine:.7f} to {other}, and {length:.5f} of its length")


def check_recorded(case: Case, backend: str) -> None:
    """Phases as CUDA graphs against plain calls: one that only chooses kernels, one that records, and replays.

    Every call has draws and inputs of its own; the renderer's draws, which kernels make from seeds, are left out.
    """
    config = dataclasses.replace(tiny(case.config), cuda_graphs=True)
    set_arithmetic(config)
    backends.accept(_only(case, BOTH))
    torch.manual_seed(0)
    trainer = Trainer(config, Poses(case), case.device)
    memory, recorded = GraphMemory(case.device), {}
    for call in range(4):
        for name, compute, inputs in _phases(trainer, drawn=False, seed=call):
            torch.manual_seed(100 + call)
            expected = _copied(compute(*inputs))
            torch.manual_seed(100 + call)
            graphed = recorded.setdefault(name, GraphedPhase(compute, memory))
            what = f"the gradient of {name} in call {call + 1}"
            _same_gradient(what, _copied(graphed(*inputs)), expected, "that of a plain call")
    set_arithmetic(case.config)


def check_settings(case: Case, backend: str) -> None:
    """A micro-batch of every phase at the run's own sizes: everything is finite, the loss not being scaled."""
    optim = dataclasses.replace(case.config.optim, loss_scale=1.0)
    sizes = {"batch": case.request.micro, "micro_batch": None, "optim": optim}
    config = dataclasses.replace(case.config, **sizes, backend="auto", cuda_graphs=False)
    set_arithmetic(config)
    backends.accept(_only(case, backend))
    torch.manual_seed(0)
    for name, grads in phases(Trainer(config, Poses(case), case.device), drawn=True).items():
        if not all(bool(grad.isfinite().all()) for grad in grads):
            raise Wrong(f"the gradient of {name} is not finite")


def check_time(case: Case, backend: str) -> None:
    """A micro-batch of every phase at the run's own sizes is not slower than with torch's operations in their place."""
    config = dataclasses.replace(
        case.config, batch=case.request.micro, micro_batch=None, backend="auto", cuda_graphs=False
    )
    set_arithmetic(config)
    everything = _only(case, BOTH)
    without = {op: [name for name in names if name != backend] for op, names in everything.items()}
    backends.accept(everything)
    trainer = Trainer(config, Poses(case), case.device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * (ROUNDS + 1)):
        taken = turn % 2 == 0
        backends.accept(everything if taken else without)
        try:
            seconds[taken].append(measure(lambda: phases(trainer, drawn=True), case.device))
        except torch.OutOfMemoryError:
            if taken:
                raise
            return  # without them the run would not fit
    fast, plain = (min(seconds[taken][1:]) for taken in (True, False))  # the first turns choose and compile
    if fast > SLOWER_BY * plain:
        raise Slow(f"a micro-batch takes {1000 * fast:.3g} ms with them, {1000 * plain:.3g} ms without")


def measure(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a function takes on a device."""
    _synchronize(device)
    begun = time.monotonic()
    function()
    _synchronize(device)
    return time.monotonic() - begun


def _only(case: Case, backend: str) -> dict[str, list[str]]:
    return {op: [name for name in names if backend in (name, BOTH)] for op, names in case.request.passed.items()}


CHECKS: dict[str, Callable[[Case, str], None]] = {
    "sample_triplane": check_sample_triplane,
    "decode_triplane": check_decode_triplane,
    "sample_importance": check_sample_importance,
    "composite": check_composite,
    "cut": check_cut,
    "bias_act": check_bias_act,
    "upfirdn2d": check_upfirdn2d,
    "modulated_conv2d": check_modulated_conv2d,
    GRADIENTS: check_gradients,
    SETTINGS: check_settings,
    TIME: check_time,
    RECORDED: check_recorded,
}


def run(request: Request, report: Callable[[str, str, str, float], None]) -> int:
    """Checks the items in order.

    Args:
        report: Is given item, state, why and seconds; at the beginning of an item, too.

    Returns:
        An exit code: 0, or 3 where the device cannot be used any more and items are left.
    """
    case = Case(request)
    set_arithmetic(case.config)
    for item in request.items:
        report(item, BEGUN, "", 0.0)
        begun, (backend, what) = time.monotonic(), item.split(" ", 1)
        state, why = PASSED, ""
        try:
            CHECKS[what](case, backend)
            _synchronize(case.device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if what not in (SETTINGS, TIME):
                state, why = FAILED, _line(error)
            else:  # which is no fault of a kernel: a run says what would fit
                why = "not checked at these sizes, which need more memory than there is"
        except Slow as error:
            state, why = SLOWER, str(error)
        except Exception as error:
            refused = isinstance(error, TypeError | ValueError) and f'backend is "{backend}"' in str(error)
            state, why = UNSUITED if refused else FAILED, _line(error)
        report(item, state, why, time.monotonic() - begun)
        if state == FAILED and not _usable(case.device):
            return 3
    return 0


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, Wrong | UserError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0][:300] if lines else 'it says nothing'}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _usable(device: torch.device) -> bool:
    """Whether the process can still use the device: an illegal address, once met, stays with it."""
    try:
        _synchronize(device)
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False


def reporter(path: Path) -> Callable[[str, str, str, float], None]:
    """Adds a line for every report to a file, which another process reads meanwhile."""

    def report(*words: Any) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(words) + "\n")

    return report


def main(argv: list[str]) -> int:
    path = Path(argv[0])
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return run(Request(**values), reporter(path.with_suffix(".report")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
