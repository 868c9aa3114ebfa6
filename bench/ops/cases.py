"""What is measured: every op at the shapes of a training step of FFHQ-512, and how much work each call is.

A `Case` builds its inputs, calls the public op with a backend, and says what must be read, written, gathered, added and
multiplied. `bench.ops` and `bench/ops/test_ops.py` take their cases from here.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epigraf_fast import ops
from epigraf_fast.camera import Patch, cam2world_matrix, camera_rays
from epigraf_fast.config import CameraConfig, RendererConfig
from epigraf_fast.models.decoder import Decoder
from epigraf_fast.models.layers import LOW_PASS
from epigraf_fast.models.renderer import Draws, Renderer
from epigraf_fast.models.synthesis import Synthesis
from epigraf_fast.ops import backends

from . import published

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
MODES = ("fwd", "bwd", "step", "double")
PATCH_SCALES = (0.125, 0.35, 1.0)

# Measured beside the ops: the renderer and the synthesis network as a whole.
WHOLES = ("renderer", "synthesis")
OPS = (*backends.OPS, *WHOLES)
# Measured beside the backends: the published op sequence in eager torch, and torch.compile of that.
BASELINES = ("published", "compile")

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Shapes of a step.

    "real" is the FFHQ-512 preset; "small" has its widths at a quarter of its resolution, for ratios on a CPU; "tiny"
    runs in the blink of an eye.
    """

    batches: tuple[int, ...]
    plane_resolution: int
    channels: int
    hidden: int
    patch: int
    samples: int
    channel_base: int
    channel_max: int
    code: int


SIZES = {
    "real": Size((1, 4, 8, 16), 512, 32, 64, 64, 48, 32768, 512, 512),
    "small": Size((1,), 128, 32, 64, 16, 48, 8192, 128, 512),
    "tiny": Size((2,), 16, 8, 16, 4, 8, 256, 16, 16),
}


@dataclass(frozen=True)
class Work:
    """What one call has to do, whatever the implementation.

    Args:
        bytes: Each input read once, each output written once; planes of the tri-plane ops left out, of which a patch
            touches a part.
        gather_bytes: Taps read from planes, mostly from the L2 cache.
        atomics: fp32 numbers added to planes.
        flops: Of matrix products and convolutions, in the case's dtype.
    """

    bytes: int
    gather_bytes: int = 0
    atomics: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: One of `OPS`.
        name: What tells it from the op's other cases.
        dtype: fp32, tf32 or fp16.
        build: Device -> inputs.
        call: Inputs, backend -> outputs.
        wanted: Inputs that get a gradient.
        shared: Inputs without a batch dimension.
        order: Derivatives that are measured.
        work: Mode -> `Work`; a mode left out has no floor.
        batch: Images.
        layers: Products one after the other, each with its roundings.
        draws: Inputs that decide random draws; they are handed in to compare, and left out to measure.
        unjudged: Inputs whose gradient is one number: an error of one number is luck, no measure of another one's.
    """

    op: str
    name: str
    dtype: str
    build: Callable[[torch.device], Inputs]
    call: Callable[[Inputs, str], tuple[Tensor, ...]]
    wanted: tuple[str, ...]
    shared: frozenset[str] = frozenset()
    order: int = 1
    work: dict[str, Work] = field(default_factory=dict)
    batch: int = 1
    layers: int = 1
    draws: frozenset[str] = frozenset()
    unjudged: frozenset[str] = frozenset()

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[: {0: 1, 1: 3, 2: 4}[self.order]]

    def images(self, inputs: Inputs) -> Iterator[Inputs]:
        """The inputs of each image alone: every op treats images separately."""
        for i in range(self.batch):
            yield {name: x if name in self.shared else x[i : i + 1] for name, x in inputs.items()}


def available(op: str, dtype: str, device: torch.device) -> list[str]:
    """Backends that can be measured here, the baselines among them; the reference last, for ratios to it."""
    names = [*(b for b in backends.BACKENDS if b != "reference"), *BASELINES, "reference"]
    if device.type == "cpu":
        names.remove("triton")  # its interpreter has no speed to measure
    return [name for name in names if lacking(op, name, dtype, device) is None]


def lacking(op: str, backend: str, dtype: str, device: torch.device) -> str | None:
    """Why a backend cannot be measured here, or None."""
    if backend in BASELINES and dtype == "fp16" and op in ("sample_triplane", "decode_triplane"):
        return "the published renderer is fp32"
    if backend == "published":
        return None if op in published.OPS else "the published sequence of this op is the reference"
    if backend == "compile":
        return "torch.compile is measured on a GPU" if device.type == "cpu" else None
    if op in WHOLES:
        reasons = [lacking(part, backend, dtype, device) for part in PARTS[op]]
        return None if None in reasons else reasons[0]
    try:
        backends.resolve(op, backend, device.type)
    except ValueError as error:
        return str(error)
    return None


PARTS = {
    "renderer": ("decode_triplane", "sample_importance", "composite"),
    "synthesis": ("modulated_conv2d", "upfirdn2d", "bias_act"),
}


def _backend_of_whole(op: str, backend: str, device: torch.device) -> str | None:
    """What to hand a whole: the backend if all its ops have it, else None, which takes it where it is."""
    if backend in BASELINES or any(lacking(part, backend, "fp32", device) for part in PARTS[op]):
        return None
    return backend


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _baseline(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A function of `published`, or that compiled."""
    return _compiled(function) if backend == "compile" else function


def _op(op: str, backend: str) -> Callable[..., Any]:
    """The public op with a backend, or what stands for it as a baseline."""
    name = {"decode_triplane": "decode_triplane_rays"}.get(op, op)
    if backend not in BASELINES:
        return functools.partial(getattr(ops, name), backend=backend)
    if op in published.OPS:
        return _baseline(getattr(published, name), backend)
    return functools.partial(_compiled(getattr(ops, name)), backend="reference")


def cases(op: str, size: str, dtype: str, batches: tuple[int, ...] | None = None) -> list[Case]:
    """The cases of an op.

    Args:
        size: A name of `SIZES`.
        batches: Micro-batches; default: the size's.
    """
    shapes = SIZES[size]
    return [case for batch in batches or shapes.batches for case in _BUILDERS[op](shapes, batch, dtype)]


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _normal(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=_generator(seed, device), device=device).to(dtype)


def _uniform(device: torch.device, seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=_generator(seed, device), device=device)


def rays(batch: int, patch: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Origins and directions [B, patch^2, 3] of patches of one scale, seen as faces are: nearly from the front."""
    camera = CameraConfig()
    angles = _normal(device, 1, batch, 3) * torch.tensor([0.3, 0.15, 0.0], device=device)
    angles = angles + torch.tensor([math.pi / 2, math.pi / 2, 0.0], device=device)
    offset = _uniform(device, 2, batch, 2) * (1 - scale)
    where = Patch(torch.full((batch,), scale, device=device), offset)
    origins, directions = camera_rays(cam2world_matrix(angles, camera.radius), camera.fov, patch, where)
    return origins.contiguous(), directions.contiguous()


def _planes(shapes: Size, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    planes = _normal(device, 3, batch, 3 * shapes.channels, shapes.plane_resolution, shapes.plane_resolution)
    return planes.to(dtype).contiguous(memory_format=torch.channels_last)


def _depths(shapes: Size, batch: int, device: torch.device) -> Tensor:
    camera = CameraConfig()
    jitter = _uniform(device, 4, batch, shapes.patch**2, shapes.samples)
    return published.stratified_t(camera.ray_start, camera.ray_end, jitter)


def _network(shapes: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    hidden, channels = shapes.hidden, shapes.channels
    return {
        "w0": _normal(device, 5, hidden, channels, dtype=dtype) / math.sqrt(channels),
        "b0": _normal(device, 6, hidden, dtype=dtype),
        "w1": _normal(device, 7, 4, hidden, dtype=dtype) / math.sqrt(hidden),
        "b1": _normal(device, 8, 4, dtype=dtype),
    }


def _with_network(inputs: Inputs) -> tuple[ops.Network, Inputs]:
    """The network's tensors as the ops take them, and the other inputs."""
    rest = dict(inputs)
    return ops.Network(*(rest.pop(name) for name in ops.Network._fields)), rest


def _sample_triplane(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    kind = DTYPES[dtype]
    points = batch * shapes.patch**2 * shapes.samples
    taps, out = points * 12 * shapes.channels * kind.itemsize, points * shapes.channels * kind.itemsize
    if dtype == "tf32":  # it has no product
        return
    for scale in PATCH_SCALES:

        def build(device: torch.device, scale: float = scale) -> Inputs:
            origins, directions = rays(batch, shapes.patch, scale, device)
            t = _depths(shapes, batch, device)
            positions = origins[:, :, None] + t[..., None] * directions[:, :, None]
            return {
                "planes": _planes(shapes, batch, kind, device),
                "points": (positions / CameraConfig().cube_scale).flatten(1, 2),
            }

        work = {
            "fwd": Work(12 * points + out, gather_bytes=taps),
            "bwd": Work(12 * points + out, atomics=points * 12 * shapes.channels),
            "step": Work(2 * (12 * points + out), gather_bytes=taps, atomics=points * 12 * shapes.channels),
        }
        name = f"batch={batch} scale={scale}"
        yield Case("sample_triplane", name, dtype, build, _call_sample, ("planes",), work=work, batch=batch)


def _call_sample(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    return (_op("sample_triplane", backend)(inputs["planes"], inputs["points"]),)


def _decode_triplane(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    kind = DTYPES[dtype]
    points = batch * shapes.patch**2 * shapes.samples
    taps, adds = points * 12 * shapes.channels * kind.itemsize, points * 12 * shapes.channels
    flops = 2 * points * (shapes.channels + 4) * shapes.hidden
    moved = points * (4 + 4 * kind.itemsize)
    work = {
        "fwd": Work(moved, gather_bytes=taps, flops=flops),
        "bwd": Work(moved, gather_bytes=taps, atomics=adds, flops=3 * flops),  # features are gathered anew
        "step": Work(2 * moved, gather_bytes=2 * taps, atomics=adds, flops=4 * flops),
    }

    def call(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        options = {} if backend in BASELINES else {"precision": dtype}
        network, inputs = _with_network(inputs)
        scale = CameraConfig().cube_scale
        return (_op("decode_triplane", backend)(**inputs, network=network, cube_scale=scale, **options),)

    for scale in PATCH_SCALES:

        def build(device: torch.device, scale: float = scale) -> Inputs:
            origins, directions = rays(batch, shapes.patch, scale, device)
            return {
                "planes": _planes(shapes, batch, kind, device),
                "ray_origins": origins,
                "ray_directions": directions,
                "t": _depths(shapes, batch, device),
                **_network(shapes, kind, device),
            }

        network = ops.Network._fields
        name = f"batch={batch} scale={scale}"
        yield Case(
            "decode_triplane", name, dtype, build, call, ("planes", *network), frozenset(network), 1, work, batch
        )


def _ray_values(shapes: Size, batch: int, kind: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Raw colours and densities [B, R, S, 4]; densities as of a trained scene: large inside a blob, else negative."""
    values = _normal(device, seed, batch, shapes.patch**2, shapes.samples, 4)
    depth = torch.linspace(-1, 1, shapes.samples, device=device)
    values[..., 3] += 4 - 40 * (depth - 0.2 * values[..., :1, 0]).square()
    return values.to(kind)


def _sample_importance(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    if dtype != "fp32":  # depths are fp32
        return
    count = batch * shapes.patch**2 * shapes.samples

    def build(device: torch.device) -> Inputs:
        u = _uniform(device, 10, batch, shapes.patch**2, shapes.samples).sort(dim=-1).values
        density = _ray_values(shapes, batch, torch.float32, device, 9)[..., 3].contiguous()
        return {"t": _depths(shapes, batch, device), "raw_density": density, "u": u}

    def call(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        return (_op("sample_importance", backend)(**inputs),)

    work = {"fwd": Work(16 * count)}
    yield Case("sample_importance", f"batch={batch}", dtype, build, call, (), order=0, work=work, batch=batch)


def _composite(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    if dtype == "tf32":  # it has no product
        return
    kind = DTYPES[dtype]
    samples, rows = 2 * shapes.samples, batch * shapes.patch**2
    read = rows * samples * (4 + 4 * kind.itemsize + 4)

    def build(device: torch.device) -> Inputs:
        t = _depths(shapes, batch, device)
        fine = _uniform(device, 11, *t.shape).sort(dim=-1).values * 0.24 + 0.88
        return {
            "t": t,
            "values": _ray_values(shapes, batch, kind, device, 12),
            "t_fine": fine,
            "values_fine": _ray_values(shapes, batch, kind, device, 13),
            "density_noise": _normal(device, 14, *t.shape[:2], samples),
        }

    def call(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        return (_op("composite", backend)(**inputs).rgb,)

    work = {
        "fwd": Work(read + rows * 12),
        "bwd": Work(read + rows * 12 + rows * samples * 4 * kind.itemsize),
        "step": Work(2 * (read + rows * 12) + rows * samples * 4 * kind.itemsize),
    }
    yield Case("composite", f"batch={batch}", dtype, build, call, ("values", "values_fine"), work=work, batch=batch)


def _cut(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    """What a level of the synthesis network cuts of the one below, at about a box of half of each side."""
    if dtype == "tf32":  # it has no product
        return
    kind, whole = DTYPES[dtype], shapes.plane_resolution
    for channels, resolution, layout in (
        *((_channels(shapes, r), r, name) for r in (whole, whole // 2) for name in _layouts()),
        (3 * shapes.channels, whole, ""),
    ):
        size = resolution // 2 + 4, resolution // 2 + 4

        def build(
            device: torch.device, channels: int = channels, resolution: int = resolution, layout: str = layout
        ) -> Inputs:
            x = _image(device, 22, kind, batch, channels, resolution, resolution, layout=_layouts()[layout])
            first = _uniform(device, 23, batch, 2) * (resolution - resolution // 2 - 3)
            return {"x": x, "first": first.long()}

        def call(inputs: Inputs, backend: str, size: tuple[int, int] = size) -> tuple[Tensor, ...]:
            return (_op("cut", backend)(inputs["x"], inputs["first"].long(), size),)

        part, one = (batch * channels * n * kind.itemsize for n in (math.prod(size), resolution**2))
        work = {"fwd": Work(2 * part), "bwd": Work(part + one), "step": Work(3 * part + one)}
        yield Case(
            "cut",
            f"batch={batch} {channels}x{resolution}x{resolution}{layout}",
            dtype,
            build,
            call,
            ("x",),
            work=work,
            batch=batch,
        )


def _channels(shapes: Size, resolution: int) -> int:
    return min(shapes.channel_base // resolution, shapes.channel_max)


def _image(
    device: torch.device, seed: int, kind: torch.dtype, *shape: int, layout: torch.memory_format = torch.channels_last
) -> Tensor:
    return _normal(device, seed, *shape, dtype=kind).contiguous(memory_format=layout)


def _layouts() -> dict[str, torch.memory_format]:
    """Name -> memory layout of images: on a GPU the networks are channels-last, on a CPU they have both."""
    layouts = {"": torch.channels_last}
    return layouts if torch.cuda.is_available() else {**layouts, " contiguous": torch.contiguous_format}


def _bias_act(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    if dtype == "tf32":  # it has no product
        return
    kind = DTYPES[dtype]
    top = shapes.plane_resolution
    images = (
        ("G", _channels(shapes, top), top),
        ("G", _channels(shapes, top // 4), top // 4),
        ("D", _channels(shapes, top) // 2, shapes.patch),
    )
    for (where, channels, resolution), layout in itertools.product(images, _layouts()):

        def build(
            device: torch.device, channels: int = channels, resolution: int = resolution, layout: str = layout
        ) -> Inputs:
            x = _image(device, 20, kind, batch, channels, resolution, resolution, layout=_layouts()[layout])
            return {"x": x, "bias": _normal(device, 21, channels, dtype=kind)}

        def call(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
            return (_op("bias_act", backend)(**inputs, act="lrelu", clamp=256.0),)

        one = batch * channels * resolution**2 * kind.itemsize
        work = {"fwd": Work(2 * one), "bwd": Work(3 * one), "step": Work(5 * one)}
        name = f"batch={batch} {where} {channels}x{resolution}x{resolution}{layout}"
        yield Case("bias_act", name, dtype, build, call, ("x", "bias"), frozenset({"bias"}), 2, work, batch)


def _upfirdn2d(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    if dtype == "tf32":  # it has no product
        return
    kind = DTYPES[dtype]
    top, patch = shapes.plane_resolution, shapes.patch
    planes = 3 * shapes.channels
    images = (
        ("planes up 2", planes, top // 2, {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}),
        ("blur after an up-convolution", _channels(shapes, top), top + 1, {"padding": (1, 1, 1, 1), "gain": 4.0}),
        ("D down 2", _channels(shapes, patch) // 2, patch, {"down": 2, "padding": (1, 1, 1, 1)}),
    )
    for (where, channels, resolution, settings), layout in itertools.product(images, _layouts()):

        def build(
            device: torch.device, channels: int = channels, resolution: int = resolution, layout: str = layout
        ) -> Inputs:
            x = _image(device, 22, kind, batch, channels, resolution, resolution, layout=_layouts()[layout])
            return {"x": x, "kernel": torch.tensor(LOW_PASS, device=device)}

        def call(inputs: Inputs, backend: str, settings: dict[str, Any] = settings) -> tuple[Tensor, ...]:
            return (_op("upfirdn2d", backend)(**inputs, **settings),)

        up, down = settings.get("up", 1), settings.get("down", 1)
        size = (resolution * up + 2 * settings["padding"][1] + (up > 1) - 4) // down + 1
        moved = batch * channels * (resolution**2 + size**2) * kind.itemsize
        work = {"fwd": Work(moved), "bwd": Work(moved), "step": Work(2 * moved)}
        name = f"batch={batch} {where} {channels}x{resolution}x{resolution}{layout}"
        yield Case("upfirdn2d", name, dtype, build, call, ("x",), frozenset({"kernel"}), 2, work, batch)


def _modulated_conv2d(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    kind = DTYPES[dtype]
    top = shapes.plane_resolution
    for where, c_in, c_out, taps, resolution, up in (
        ("conv1", _channels(shapes, top), _channels(shapes, top), 3, top, 1),
        ("conv0 up 2", _channels(shapes, top // 2), _channels(shapes, top), 3, top // 2, 2),
        ("to_planes", _channels(shapes, top), 3 * shapes.channels, 1, top, 1),
        ("conv1", _channels(shapes, top // 8), _channels(shapes, top // 8), 3, top // 8, 1),
    ):
        size = resolution * up
        layer = {"up": up, "act": "lrelu", "clamp": 256.0} if taps == 3 else {"demodulate": False, "clamp": 256.0}

        def build(
            device: torch.device,
            c_in: int = c_in,
            c_out: int = c_out,
            taps: int = taps,
            resolution: int = resolution,
            size: int = size,
        ) -> Inputs:
            style_gain = 1.0 if taps == 3 else c_in**-0.5
            inputs = {
                "x": _image(device, 23, kind, batch, c_in, resolution, resolution),
                "weight": _normal(device, 24, c_out, c_in, taps, taps),
                "style": (1 + 0.3 * _normal(device, 25, batch, c_in)) * style_gain,
                "bias": _normal(device, 26, c_out),
                "kernel": torch.tensor(LOW_PASS, device=device),
            }
            if taps == 3:
                inputs["noise"] = 0.1 * _normal(device, 27, batch, 1, size, size)
            return inputs

        def call(inputs: Inputs, backend: str, layer: dict[str, Any] = layer) -> tuple[Tensor, ...]:
            return (_op("modulated_conv2d", backend)(**inputs, **layer),)

        flops = 2 * batch * c_in * c_out * taps**2 * resolution**2
        moved = batch * (c_in * resolution**2 + c_out * size**2) * kind.itemsize
        work = {
            "fwd": Work(moved, flops=flops),
            "bwd": Work(2 * moved, flops=2 * flops),
            "step": Work(3 * moved, flops=3 * flops),
        }
        name = f"batch={batch} {where} {c_in}->{c_out} {size}x{size}"
        wanted = ("x", "weight", "style", "bias", *(("noise",) if taps == 3 else ()))
        shared = frozenset({"weight", "bias", "kernel"})
        yield Case("modulated_conv2d", name, dtype, build, call, wanted, shared, 2, work, batch)


def _renderer(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    options = {"precision": dtype} if "precision" in inspect.signature(Decoder).parameters else {}
    if dtype != "fp32" and not options:
        return
    camera, samples = CameraConfig(), shapes.samples
    config = RendererConfig(coarse_samples=samples, fine_samples=samples)
    points = batch * shapes.patch**2 * 2 * samples
    taps, flops = points * 12 * shapes.channels * 4, 2 * points * (shapes.channels + 4) * shapes.hidden
    work = {
        "fwd": Work(points * 8, gather_bytes=taps, flops=flops),
        "bwd": Work(points * 8, gather_bytes=taps, atomics=taps // 4, flops=3 * flops),
        "step": Work(points * 16, gather_bytes=2 * taps, atomics=taps // 4, flops=4 * flops),
    }

    modules: dict[tuple[str, torch.device], tuple[Renderer, Decoder]] = {}

    def renderer(backend: str, device: torch.device) -> tuple[Renderer, Decoder]:
        if (backend, device) not in modules:
            chosen = _backend_of_whole("renderer", backend, device)
            module = Renderer(config, camera.ray_start, camera.ray_end, camera.cube_scale, backend=chosen)
            modules[backend, device] = module, Decoder(shapes.channels, shapes.hidden, backend=chosen, **options)
        return modules[backend, device]

    def call(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        network, inputs = _with_network(inputs)
        planes = inputs.pop("planes")
        module, decoder = renderer(backend, planes.device)
        # What is left out to measure is drawn.
        draws = Draws(*(inputs.pop(name, None) for name in ("jitter", "u", "coarse_noise", "fine_noise")))
        rays = {**inputs, "draws": draws, "density_noise_std": 0.5}
        if backend in BASELINES:
            render = _baseline(published.render, backend)
            return (render(module, planes, network, **rays).rgb,)
        # The effective weights are inputs, so that gradients to them are seen.
        decoder.network = lambda: network
        return (module(planes, decoder, **rays).rgb,)

    for scale in PATCH_SCALES:

        def build(device: torch.device, scale: float = scale) -> Inputs:
            origins, directions = rays(batch, shapes.patch, scale, device)
            shape = batch, shapes.patch**2
            # Features of a trained generator change slowly from texel to texel.
            coarse = _normal(device, 3, batch, 3 * shapes.channels, 16, 16)
            planes = torch.nn.functional.interpolate(
                coarse, size=(shapes.plane_resolution,) * 2, mode="bilinear", align_corners=True
            )
            return {
                "planes": planes.contiguous(memory_format=torch.channels_last),
                "ray_origins": origins,
                "ray_directions": directions,
                "jitter": _uniform(device, 4, *shape, samples),
                "u": _uniform(device, 10, *shape, samples).sort(dim=-1).values,
                "coarse_noise": _normal(device, 15, *shape, samples),
                "fine_noise": _normal(device, 16, *shape, 2 * samples),
                **_network(shapes, torch.float32, device),
            }

        network = ops.Network._fields
        name = f"batch={batch} scale={scale}"
        yield Case(
            "renderer",
            name,
            dtype,
            build,
            call,
            wanted=("planes", *network),
            shared=frozenset(network),
            work=work,
            batch=batch,
            draws=frozenset({"jitter", "u", "coarse_noise", "fine_noise"}),
        )


def _synthesis(shapes: Size, batch: int, dtype: str) -> Iterator[Case]:
    if dtype == "fp16":
        return
    resolution = shapes.plane_resolution
    modules: dict[tuple[str, torch.dtype, torch.device], Synthesis] = {}

    def make(backend: str | None) -> Synthesis:
        channels = {"channel_base": shapes.channel_base, "channel_max": shapes.channel_max}
        return Synthesis(shapes.code, resolution, 3 * shapes.channels, **channels, backend=backend)

    def network(backend: str, kind: torch.dtype, device: torch.device) -> Synthesis:
        """One per backend, with the same buffers."""
        key = backend, kind, device
        if key not in modules:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = make(_backend_of_whole("synthesis", backend, device)).to(device, kind)
            if backend in BASELINES:
                module.forward = functools.partial(published.synthesize, module, torch.contiguous_format)
            modules[key] = module
        return modules[key]

    def build(device: torch.device) -> Inputs:
        parameters = network("reference", torch.float32, device).named_parameters()
        inputs = {"ws": _normal(device, 30, batch, 2 * (resolution.bit_length() - 2), shapes.code)}
        return inputs | {name: p.detach() + 0.1 * name.endswith("noise_strength") for name, p in parameters}

    def call(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        parameters = dict(inputs)
        ws = parameters.pop("ws")
        module = network(backend, ws.dtype, ws.device)
        if backend not in BASELINES:
            return (torch.func.functional_call(module, parameters, (ws, "const")),)
        with published.installed(published.fused_backend(ws.device.type, backend == "compile")):
            return (_baseline(torch.func.functional_call, backend)(module, parameters, (ws, "const")),)

    flops = _synthesis_flops(shapes) * batch
    work = {"fwd": Work(0, flops=flops), "bwd": Work(0, flops=2 * flops), "step": Work(0, flops=3 * flops)}
    with torch.device("meta"):
        names = tuple(name for name, _ in make(None).named_parameters())
    yield Case(
        "synthesis",
        f"batch={batch} {resolution}",
        dtype,
        build,
        call,
        wanted=("ws", *names),
        shared=frozenset(names),
        work=work,
        batch=batch,
        layers=2 * (resolution.bit_length() - 2),
        unjudged=frozenset(name for name in names if name.endswith("noise_strength")),
    )


def _synthesis_flops(shapes: Size) -> int:
    """Of the convolutions of one image, forward."""
    flops, resolution, c_in = 0, 4, 0
    while resolution <= shapes.plane_resolution:
        c_out = _channels(shapes, resolution)
        flops += 2 * 9 * c_in * c_out * (resolution // 2) ** 2 + 2 * (9 * c_out + 3 * shapes.channels) * c_out * (
            resolution**2
        )
        c_in, resolution = c_out, 2 * resolution
    return flops


_BUILDERS = {
    "sample_triplane": _sample_triplane,
    "decode_triplane": _decode_triplane,
    "sample_importance": _sample_importance,
    "composite": _composite,
    "cut": _cut,
    "bias_act": _bias_act,
    "upfirdn2d": _upfirdn2d,
    "modulated_conv2d": _modulated_conv2d,
    "renderer": _renderer,
    "synthesis": _synthesis,
}
