"""Launches of a training step of FFHQ-512 for `bench.counts`: every kernel at its real shape, on CPU memory.

Large tensors are zeros that the system gives no memory for until a block touches them; what decides where a kernel
reads (rays, depths, densities) has the values of a step. The kernels' ways do not depend on the others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from epigraf_fast.config import CameraConfig, preset
from epigraf_fast.models.layers import LOW_PASS

from ..ops import cases
from ..ops.cases import PATCH_SCALES, Work
from ..ptx import csrc_launch, triton_launch
from ..ptx.parse import Entry

SIZE = cases.SIZES["real"]
BATCH = preset("ffhq").micro
RAYS = SIZE.patch**2
OUT = 4
SCALE = 0.35  # of what is counted at one patch scale
LEVELS = (512, 256, 128, 64)  # whose convolutions are nearly all of the synthesis network's time
CPU = torch.device("cpu")


class Launch(NamedTuple):
    """What a GPU would be given."""

    kernel: str
    entry: Entry
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    tensors: dict[str, Tensor]
    shared: int
    arch: int


class Case(NamedTuple):
    """A call of a launcher or an op.

    Attributes:
        name: What tells it from others.
        unit: What its counts are divided by: point, ray or element.
        units: How many of these a call has.
        call: Makes the launches.
        work: What any implementation must do.
        precision: Of matrix products.
        streams: Whether what it reads comes from DRAM; planes are read from L2.
        plan: Of a case that has several, and whether it is the default.
    """

    name: str
    unit: str
    units: int
    call: Callable[[], Any]
    work: Work
    precision: str = "fp32"
    streams: bool = True
    plan: tuple[tuple[int | None, ...], ...] | None = None
    default: bool = True


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take memory where they are touched."""
    return torch.from_numpy(np.zeros(shape, str(dtype).removeprefix("torch.")))


def image(batch: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same, [B, C, H, W] in channels_last."""
    return zeros(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


# ---- kernels/


def triton_cases(arch: int) -> Iterator[Case]:
    """The renderer: default plans at every patch scale, the others at one."""
    yield from _decoder_cases(arch)
    yield from _sample_cases(arch)
    yield from _ray_cases()


@functools.cache
def _rays(scale: float) -> tuple[Tensor, Tensor]:
    return cases.rays(BATCH, SIZE.patch, scale, CPU)


@functools.cache
def _depths(passes: int) -> Tensor:
    """[B, R, passes * S]: sets one behind the other, each sorted."""
    depths = cases._depths(SIZE, BATCH, CPU)
    return torch.cat([depths, *(depths.flip(0) for _ in range(passes - 1))], dim=-1)


def _text(plan: tuple[tuple[int | None, ...], ...]) -> str:
    """Points x warps of every launch, and @ the registers that it is held to."""
    return "+".join(f"{block_n}x{num_warps}{f'@{most}' if most else ''}" for block_n, num_warps, _, most in plan)


def _scales(plans: tuple[Any, ...]) -> Iterator[tuple[Any, bool, float]]:
    """Plans, which is the default, and scales."""
    for scale in sorted(PATCH_SCALES, key=lambda scale: scale != SCALE):
        for number, plan in enumerate(plans):
            if number == 0 or scale == SCALE:
                yield plan, number == 0, scale


def _decoder_cases(arch: int) -> Iterator[Case]:
    from epigraf_fast.kernels import decode_triplane, tuning

    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("fp16", torch.float16)):
        if precision == "tf32" and arch < 80:
            continue  # it is fp32 there
        network = tuple(cases._network(SIZE, dtype, CPU).values())
        for way, passes in (("fwd", 1), ("bwd", 2)):
            points = BATCH * RAYS * passes * SIZE.samples
            work = _decoder_work(points, dtype.itemsize)[way]

            def planes(dtype: torch.dtype = dtype) -> Tensor:
                return image(BATCH, 3 * SIZE.channels, SIZE.plane_resolution, SIZE.plane_resolution, dtype)

            def call(
                way: str = way,
                planes: Callable[[], Tensor] = planes,
                network: tuple[Tensor, ...] = network,
                precision: str = precision,
                passes: int = passes,
                plan: Any = None,
                scale: float = SCALE,
            ) -> None:
                cube = CameraConfig().cube_scale
                inputs = planes(), *_rays(scale), _depths(passes)
                options = {"chosen": plan, "arch": arch}
                if way == "fwd":
                    decode_triplane.fwd(*inputs, *network, cube, precision, **options)
                else:
                    grad_y = zeros(*inputs[-1].shape, OUT) + 1
                    decode_triplane.bwd(grad_y, *inputs, *network[:3], cube, precision, **options)

            case = decode_triplane.case(way, planes(), network[0], network[2], precision, arch)
            for plan, default, scale in _scales(tuning.plans(case)):
                name = f"decode {way} {precision} {_text(plan)} scale {scale:g}"
                run = functools.partial(call, plan=plan, scale=scale)
                yield Case(name, "point", points, run, work, precision, False, plan, default)


def _decoder_work(points: int, itemsize: int) -> dict[str, Work]:
    """What `cases` says of the op."""
    taps, adds = points * 12 * SIZE.channels * itemsize, points * 12 * SIZE.channels
    flops, moved = 2 * points * (SIZE.channels + OUT) * SIZE.hidden, points * (4 + OUT * itemsize)
    return {"fwd": Work(moved, taps, 0, flops), "bwd": Work(moved, taps, adds, 3 * flops)}


def _sample_cases(arch: int) -> Iterator[Case]:
    from epigraf_fast.kernels import sample_triplane, tuning

    size, points = (SIZE.plane_resolution,) * 2, BATCH * RAYS * SIZE.samples

    def positions(scale: float) -> Tensor:
        origins, directions = _rays(scale)
        along = origins[:, :, None] + _depths(1)[..., None] * directions[:, :, None]
        return (along / CameraConfig().cube_scale).flatten(1, 2)

    for dtype in (torch.float32, torch.float16):
        kind = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
        numbers = points * 12 * SIZE.channels
        moved = points * (12 + SIZE.channels * dtype.itemsize)
        for way in ("fwd", "bwd"):
            work = Work(moved, numbers * dtype.itemsize) if way == "fwd" else Work(moved, atomics=numbers)

            def call(
                way: str = way, dtype: torch.dtype = dtype, moved: int = moved, plan: Any = None, scale: float = SCALE
            ) -> None:
                options = {"chosen": plan, "arch": arch}
                if way == "fwd":
                    planes = image(BATCH, 3 * SIZE.channels, *size, dtype)
                    sample_triplane.fwd(planes, positions(scale), **options)
                else:
                    grad = zeros(BATCH, RAYS * SIZE.samples, SIZE.channels, dtype=dtype)
                    sample_triplane.bwd(grad, positions(scale), *size, **options)

            plans = tuning.plans(sample_triplane.case(way, SIZE.channels, *size, dtype, arch))
            for plan, default, scale in _scales(plans):
                name = f"sample {way} {kind} {_text(plan)} scale {scale:g}"
                run = functools.partial(call, plan=plan, scale=scale)
                yield Case(name, "point", points, run, work, kind, False, plan, default)


def _ray_cases() -> Iterator[Case]:
    from epigraf_fast.kernels import composite, sample_importance

    samples, rays = SIZE.samples, BATCH * RAYS
    camera, seed, std = CameraConfig(), torch.tensor([7]), torch.tensor([0.5])
    density = {"activation": "softplus", "softplus_beta": 1.0, "density_shift": 0.0}
    settings = {**density, "last_interval": 1e10, "last_back": False, "white_background": False}

    @functools.cache
    def values(seed: int) -> Tensor:
        return cases._ray_values(SIZE, BATCH, torch.float32, CPU, seed)

    def stratified() -> None:
        sample_importance.stratified(BATCH, RAYS, samples, camera.ray_start, camera.ray_end, None, seed, CPU)

    def importance() -> None:
        inputs = _depths(1), values(1)[..., -1], None, seed, samples
        sample_importance.fwd(*inputs, sorted=True, noise_std=std, **density)

    def sets() -> tuple[Any, ...]:
        fine = _depths(1).flip(0)
        return _depths(1), values(1), fine, values(2), None, None, seed, std

    def backward() -> None:
        grads = (zeros(BATCH, RAYS, OUT - 1) + 1, None, None, None, None)
        composite.bwd(grads, *sets(), to_density_noise=False, to_background=False, **settings)

    read = rays * 2 * samples * 4 * (1 + OUT)
    yield Case("stratified", "ray", rays, stratified, Work(rays * samples * 4))
    yield Case("importance", "ray", rays, importance, Work(rays * samples * 12))
    forward = functools.partial(lambda: composite.fwd(*sets(), return_weights=False, **settings))
    yield Case("composite fwd", "ray", rays, forward, Work(read + rays * 4 * (OUT + 2)))
    yield Case("composite bwd", "ray", rays, backward, Work(read + rays * 8 * samples * OUT + rays * 12))


# ---- csrc/


def csrc_cases() -> Iterator[Case]:
    """What surrounds the convolutions of both networks: forward, backward, and for R1 the second derivative."""
    for level in LEVELS:
        yield from _synthesis_cases(level)
    yield from _modulation_cases()
    yield from _discriminator_cases()


def _gradients(outputs: Any, inputs: list[Tensor]) -> Any:
    """Of zeros; the launches are what is wanted."""
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    return torch.autograd.grad(outputs, inputs, [_zeros_like(y) for y in outputs], allow_unused=True)


def _zeros_like(x: Tensor) -> Tensor:
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return image(*x.shape, dtype=x.dtype)
    return zeros(*x.shape, dtype=x.dtype)


def _ways(
    name: str, units: int, work: dict[str, Work], inputs: Callable[[], list[Tensor]], op: Callable[..., Any]
) -> Iterator[Case]:
    """An op's forward; its backward, and the backward of that, without the launches before it.

    `inputs` gives what has a gradient, x first. R1 takes the gradient to x, and that one's to everything.
    """

    def call(order: int) -> None:
        tensors = [x.requires_grad_() for x in inputs()]
        with _unlisted() if order else nullcontext():
            y = op(*tensors)
        if order == 1:
            _gradients(y, tensors)
        elif order == 2:
            ys = [v for v in (y if isinstance(y, tuple) else (y,)) if v is not None]
            grads = [_zeros_like(v).requires_grad_() for v in ys]
            with _unlisted():
                (first,) = torch.autograd.grad(ys, tensors[:1], grads, create_graph=True)
            _gradients(first, [*grads, *tensors])

    for order, way in enumerate(("fwd", "bwd", "double")):
        if way in work:
            yield Case(f"{name} {way}", "element", units, functools.partial(call, order), work[way])


_listed = True


@contextmanager
def _unlisted() -> Iterator[None]:
    """Launches in this block are not counted."""
    global _listed
    before, _listed = _listed, False
    try:
        yield
    finally:
        _listed = before


def _synthesis_cases(level: int) -> Iterator[Case]:
    """The convolutions' epilogues and the running sum of planes, at one resolution."""
    from epigraf_fast import ops

    channels = cases._channels(SIZE, level)
    taps, planes = torch.tensor(LOW_PASS), 3 * SIZE.channels
    for dtype in (torch.float32, torch.float16) if level == LEVELS[0] else (torch.float32,):
        kind, one = {torch.float32: "fp32", torch.float16: "fp16"}[dtype], dtype.itemsize
        elements = BATCH * channels * level**2
        for conv, blur, outputs in (("conv0", taps, 1), ("conv1", None, 2)):

            def inputs(blur: Tensor | None = blur, dtype: torch.dtype = dtype) -> list[Tensor]:
                size = level + (blur is not None)
                vectors = [zeros(BATCH, channels) + 1 for _ in range(2)]
                return [image(BATCH, channels, size, size, dtype), *vectors, zeros(channels), zeros()]

            def op(
                x: Tensor,
                demod: Tensor,
                style: Tensor,
                bias: Tensor,
                strength: Tensor,
                blur: Tensor | None = blur,
                outputs: int = outputs,
            ) -> tuple[Tensor, ...]:
                styles = (style,) if outputs == 1 else (None, style)
                noise = zeros(BATCH, 1, level, level)
                vectors = {"demod": demod, "noise": noise, "strength": strength, "bias": bias, "styles": styles}
                options = {"act": "lrelu", "clamp": 256.0, "keep_x": False, "backend": "cpu"}
                return ops.layer_epilogue(x, blur=blur, **vectors, **options)

            work = {
                "fwd": Work(elements * one * (1 + outputs)),
                "bwd": Work(elements * one * (2 + outputs)),
            }
            yield from _ways(f"G {level} {conv} epilogue {kind}", elements, work, inputs, op)
        if dtype == torch.float16:
            continue  # planes stay fp32, but for what is added
        numbers = BATCH * planes * level**2

        def images() -> list[Tensor]:
            half = image(BATCH, planes, level // 2, level // 2)
            return [half, image(BATCH, planes, level, level), zeros(planes)]

        def add(x: Tensor, added: Tensor, bias: Tensor) -> Tensor:
            options = {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0, "clamp": 256.0}
            return ops.upfirdn2d(x, taps, added=added, bias=bias, **options, backend="cpu")

        work = {"fwd": Work(numbers * 9), "bwd": Work(numbers * (4 + 1 + 8))}
        yield from _ways(f"G {level} planes up 2 and add", numbers, work, images, add)


def _modulation_cases() -> Iterator[Case]:
    from epigraf_fast import ops

    for level in (LEVELS[0], LEVELS[-1]):
        channels = cases._channels(SIZE, level)
        numbers = channels * channels * 9

        def inputs(channels: int = channels) -> list[Tensor]:
            return [zeros(channels, channels, 3, 3), zeros(BATCH, channels)]

        def op(weight: Tensor, style: Tensor) -> tuple[Tensor, ...]:
            return tuple(ops.modulation(weight, style, torch.float32, backend="cpu"))

        work = {"fwd": Work(4 * numbers), "bwd": Work(12 * numbers)}
        name = f"G {level} modulation {channels}x{channels}x3x3"
        yield from _ways(name, numbers, work, inputs, op)

        def again(weight: Tensor, style: Tensor, channels: int = channels) -> tuple[Tensor, ...]:
            kept = ops.OfWeight()
            kept.made["energy", False] = zeros(channels, channels)
            return tuple(ops.modulation(weight, style, torch.float32, of_weight=kept, backend="cpu"))

        for case in _ways(f"{name} again", numbers, {"fwd": Work(4 * channels * channels)}, inputs, again):
            yield case._replace(streams=False)  # the weight, which is given, is not read


def _discriminator_cases() -> Iterator[Case]:
    """Blocks of the top, which all work on patches."""
    from epigraf_fast import ops

    config, patch = preset("ffhq").discriminator, SIZE.patch
    taps = torch.tensor(LOW_PASS)
    for resolution, dtype in itertools.product((SIZE.plane_resolution, patch), (torch.float32, torch.float16)):
        channels = min(config.channel_base // resolution, config.channel_max)
        kind, elements = {torch.float32: "fp32", torch.float16: "fp16"}[dtype], BATCH * channels * patch**2
        one = elements * dtype.itemsize

        def inputs(channels: int = channels, dtype: torch.dtype = dtype) -> list[Tensor]:
            return [image(BATCH, channels, patch, patch, dtype), zeros(BATCH, channels) + 1, zeros(channels)]

        def plain(x: Tensor, _: Tensor, bias: Tensor) -> Tensor:
            return ops.bias_act(x, bias, act="lrelu", clamp=256.0, backend="cpu")

        def scaled(x: Tensor, style: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            options = {"bias": bias, "styles": (style,), "act": "lrelu", "clamp": 256.0}
            return ops.layer_epilogue(x, **options, backend="cpu")

        def down(x: Tensor, *_: Tensor) -> Tensor:
            return ops.upfirdn2d(x, taps, down=2, padding=(1, 1, 1, 1), backend="cpu")

        work = {"fwd": Work(2 * one), "bwd": Work(3 * one), "double": Work(5 * one)}
        yield from _ways(f"D {channels}x{patch}x{patch} epilogue {kind}", elements, work, inputs, scaled)
        work = {"fwd": Work(2 * one), "bwd": Work(3 * one), "double": Work(3 * one)}
        yield from _ways(f"D {channels}x{patch}x{patch} bias_act {kind}", elements, work, inputs, plain)
        if resolution == patch:
            work = {"fwd": Work(one * 5 // 4), "bwd": Work(one * 5 // 4)}
            yield from _ways(f"D {channels}x{patch}x{patch} down 2 {kind}", elements, work, inputs, down)


# ---- what is launched


@contextmanager
def triton_launches(arch: int, run: Callable[[Launch], None]) -> Iterator[None]:
    """Launches of Triton kernels in this block go to `run`, compiled for an architecture."""

    def forward(launch: triton_launch.Launch) -> None:
        compiled = launch.compiled
        entry = triton_launch._program(compiled.ptx).entries[compiled.name]
        sizes = launch.grid, launch.block, launch.params, launch.tensors
        run(Launch(compiled.name.strip("_"), entry, *sizes, compiled.shared, arch))

    with triton_launch.recorded(forward, arch):
        yield


@contextmanager
def csrc_launches(arch: int, run: Callable[[Launch], None]) -> Iterator[None]:
    """The same for csrc's kernels, which the ops' backend cpu launches.

    Raises:
        RuntimeError: The emulated launchers cannot be built, or a compiler for the architecture is missing.
    """

    def forward(one: csrc_launch.Compiled) -> None:
        if _listed:
            run(Launch(*one, shared=0, arch=arch))

    with csrc_launch.forwarded(arch, forward):
        yield
