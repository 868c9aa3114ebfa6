"""Small launches of every kernel, for `bench.mutants`: odd sizes and several blocks, so that masks exclude some."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ..ptx import Program, csrc_launch, triton_launch
from ..ptx.memory import extent
from ..ptx.parse import Entry

RAYS = 67  # more than a program has, and odd
MOST_STEPS = 20_000  # basic blocks; none of these launches enters a tenth of that
MOST_BLOCKS = 32  # of larger grids a mutant runs the first two blocks, the one in the middle and the last
LARGE = 1 << 20  # elements of a tensor; what launches over such leave is drawn, see `_csrc`


class Launch(NamedTuple):
    """A launch that was run once.

    Attributes:
        before: The bytes of `tensors` when it began.
        after: What they held at its end.
    """

    entry: Entry
    options: dict[str, Any]  # of `Program.launch`
    tensors: dict[str, Tensor]
    before: dict[str, np.ndarray]
    after: dict[str, Tensor]

    @property
    def outputs(self) -> list[str]:
        """The tensors that it changed."""
        return [
            name for name, x in self.tensors.items() if not np.array_equal(self.before[name], _bytes(x, self, name))
        ]

    def last_changed(self, name: str) -> int:
        """The last element of a tensor, as it lies in memory, that it changed."""
        x = self.tensors[name]
        return int(np.flatnonzero(self.before[name] != _bytes(x, self, name))[-1]) // x.element_size()

    def run(self, program: Program, tensors: dict[str, Tensor] | None = None) -> None:
        """Runs it again from where it began, with another text of the kernel or other extents of the tensors."""
        for name, x in self.tensors.items():
            _memory(x)[:] = self.before[name]
        execute(program, tensors or self.tensors, self.options)


def _memory(x: Tensor) -> np.ndarray:
    start, end = extent(x)
    return np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), "u1")


def _bytes(x: Tensor, launch: Launch, name: str) -> np.ndarray:
    """What a tensor's bytes were at the end of the first run; between its elements nothing changes."""
    _restore(x, launch.after[name])
    return _memory(x).copy()


def _restore(x: Tensor, values: Tensor) -> None:
    if 0 not in x.stride() or x.numel() == 1:
        x.copy_(values)


def program_of(entry: Entry) -> Program:
    program = Program("")
    program.entries[entry.name] = entry
    return program


def execute(program: Program, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    (entry,) = program.entries
    program.launch(entry, tensors=tensors, count=False, most_steps=MOST_STEPS, **options)


def launches(arch: int, *, only: str = "", csrc: bool = True) -> dict[str, list[Launch]]:
    """Kernel -> its launches for an architecture, at most the first two and the last.

    Kernels of one name and different code are told apart by a number.

    Args:
        only: Part of the name of the kernels that are wanted.
        csrc: Those of csrc/ too.
    """
    found: dict[str, list[Launch]] = {}
    codes: dict[tuple[str, str], str] = {}

    def keep(name: str, entry: Entry, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
        before = {key: _memory(x).copy() for key, x in tensors.items()}
        execute(program_of(entry), tensors, options)
        if only not in name:
            return
        left, blocks = {}, math.prod(options["grid"])
        if blocks > MOST_BLOCKS:
            options = options | {"blocks": [0, 1, blocks // 2, blocks - 1]}
            left = {key: _memory(x).copy() for key, x in tensors.items()}
            for key, x in tensors.items():
                _memory(x)[:] = before[key]
            execute(program_of(entry), tensors, options)
        code = codes.setdefault((name, entry.text), f"{name} {1 + sum(known == name for known, _ in codes)}")
        after = {key: x.detach().clone() for key, x in tensors.items()}
        for key, content in left.items():
            _memory(tensors[key])[:] = content
        found.setdefault(code, []).append(Launch(entry, options, tensors, before, after))

    with ExitStack() as stack:
        stack.enter_context(_poisoned())
        stack.enter_context(_triton(keep, arch))
        for name, case in triton_cases(arch):
            if only in name:
                case()
        if csrc:
            stack.enter_context(_csrc(keep, arch))
            for name, case in csrc_cases():
                if only in name or name in only:
                    case()
    return {name: made[:2] + made[2:][-1:] for name, made in found.items()}


@contextmanager
def _poisoned() -> Iterator[None]:
    """`torch.empty` is full of NaN, and our ops do not hear of what torch must be told for that."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=False):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _triton(keep: Callable[..., None], arch: int) -> Iterator[None]:
    def run(launch: triton_launch.Launch) -> None:
        compiled = launch.compiled
        entry = triton_launch._program(compiled.ptx).entries[compiled.name]
        options = {"grid": launch.grid, "block": launch.block, "params": launch.params, "arch": arch}
        keep(compiled.name.strip("_"), entry, launch.tensors, options | {"shared": compiled.shared})

    with triton_launch.recorded(run, arch):
        yield


@contextmanager
def _csrc(keep: Callable[..., None], arch: int) -> Iterator[None]:
    """The ops' backend cpu launches csrc's kernels.

    Those over large tensors are not run: random numbers stand for the partial sums that they leave, and the kernels
    that add them up have those alone and what they write.
    """

    def run(one: csrc_launch.Compiled) -> None:
        if any(x.numel() > LARGE for x in one.tensors.values()):
            if "sums" not in one.kernel and "slices" not in one.kernel:
                if "partials" in one.tensors:
                    one.tensors["partials"].copy_(_draw(*one.tensors["partials"].shape, seed=40))
                return
            small = {name: x for name, x in one.tensors.items() if x.numel() <= LARGE}
            one = one._replace(tensors=small)
        options = {"grid": one.grid, "block": one.block, "params": one.params, "arch": arch}
        keep(one.kernel.split("<")[0], one.entry, one.tensors, options)

    with csrc_launch.forwarded(arch, run):
        yield


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def triton_cases(arch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The names of one kernel or more, and a call of their launcher."""
    from epigraf_fast.kernels import composite, cut, decode_triplane, sample_importance, sample_triplane

    cpu, seed = torch.device("cpu"), torch.tensor([7])
    t, t_fine = (_uniform(1, RAYS, n, seed=n).sort(-1).values for n in (5, 3))
    density = {"activation": "softplus", "softplus_beta": 1.0, "density_shift": 0.5}
    yield "sample_stratified_kernel", lambda: sample_importance.stratified(5, RAYS, 7, 0.9, 1.1, None, seed, cpu)
    raw = _draw(1, RAYS, 5, seed=1)
    yield (
        "sample_importance_kernel",
        lambda: sample_importance.fwd(t, raw, None, seed, 7, sorted=True, noise_std=torch.tensor([0.5]), **density),
    )

    planes = _draw(2, 24, 5, 3, seed=5).contiguous(memory_format=torch.channels_last)
    points = 2.8 * _uniform(2, 75, 3, seed=6) - 1.4  # some outside
    yield "sample_triplane_fwd_kernel", lambda: sample_triplane.fwd(planes, points, arch=arch)
    yield "sample_triplane_bwd_kernel", lambda: sample_triplane.bwd(_draw(2, 75, 8, seed=7), points, 5, 3, arch=arch)
    network = _draw(17, 8, seed=8), _draw(17, seed=9), _draw(4, 17, seed=10), _draw(4, seed=11)
    origins, directions = 0.3 * _draw(2, 27, 3, seed=12), _draw(2, 27, 3, seed=13)
    depths = _uniform(2, 27, 3, seed=14)
    rays = planes, origins, directions, depths
    yield "decode_triplane_fwd_kernel", lambda: decode_triplane.fwd(*rays, *network, arch=arch)
    yield (
        "decode_triplane_bwd_kernel, decode_triplane_scatter_kernel",
        lambda: decode_triplane.bwd(_draw(2, 27, 3, 4, seed=15), *rays, *network[:3], arch=arch),
    )

    first = torch.tensor([[1, 0], [2, 3]])
    for layout in (torch.channels_last, torch.contiguous_format):
        whole, part = (_draw(2, 8, *size, seed=30).contiguous(memory_format=layout) for size in ((5, 7), (3, 4)))
        yield "cut_kernel", lambda whole=whole: cut.cut(whole, first, (3, 4))
        yield "cut_kernel", lambda part=part: cut.paste(part, first, (5, 7))

    settings = {**density, "last_interval": 1.0, "last_back": True, "white_background": True}
    values, values_fine = _draw(1, RAYS, 5, 4, seed=16), _draw(1, RAYS, 3, 4, seed=17)
    sets = t, values, t_fine, values_fine, None, _draw(1, RAYS, 3, seed=18), seed, torch.tensor([0.5])
    yield "composite_fwd_kernel", lambda: composite.fwd(*sets, return_weights=True, **settings)
    grads = tuple(_draw(1, RAYS, *more, seed=19 + i) for i, more in enumerate(((3,), (), (), (), (8,))))
    yield (
        "composite_bwd_kernel",
        lambda: composite.bwd(grads, *sets, to_density_noise=False, to_background=True, **settings),
    )


def _derivatives(function: Callable[..., Any], *inputs: Tensor, most: int = 2) -> None:
    """Runs a function and its first and second derivatives, or the first alone."""
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    values = function(*inputs)
    for order in range(1, most + 1):
        values = values if isinstance(values, tuple) else (values,)
        values = [v for v in values if v is not None and v.requires_grad]
        loss = sum((v * _draw(*v.shape, seed=30 * order + i)).sum() for i, v in enumerate(values))
        values = torch.autograd.grad(loss, inputs, create_graph=order < most, allow_unused=True)
        values = tuple(v for v in values if v is not None)


def csrc_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the names of an op's kernels begin with, and the op with its derivatives."""
    from epigraf_fast import ops

    taps = torch.tensor([1, 3, 2.5, 1.5]) / 8
    flat, image = _draw(19, 8, seed=1), _draw(2, 3, 5, 7, seed=2)
    for x in (flat, image):
        bias = _draw(x.shape[1], seed=3)
        yield (
            "bias_act",
            lambda x=x, bias=bias: _derivatives(
                lambda x, bias: ops.bias_act(x, bias, act="lrelu", clamp=1.2, backend="cpu"), x, bias
            ),
        )
    for kernel, up in ((taps, 2), (_draw(3, 2, seed=4), 1)):
        yield (
            "upfirdn2d",
            lambda kernel=kernel, up=up: ops.upfirdn2d(image, kernel, up=up, padding=(2, 1, 2, 1), backend="cpu"),
        )
    # Two chunks of channels, to whose map a block adds one after the other; three rounds of the blur's rows.
    demod, bias, style = _draw(2, 11, seed=5).abs() + 0.3, _draw(11, seed=6), _draw(2, 11, seed=7)
    image = _draw(2, 11, 11, 5, seed=2).contiguous(memory_format=torch.channels_last)
    for blur, keep_x in ((None, True), (None, False), (taps, False)):
        noise = _draw(2, 1, *((10, 4) if blur is not None else (11, 5)), seed=8)

        def epilogue(x, demod, noise, strength, bias, style, blur=blur, keep_x=keep_x):
            vectors = {"demod": demod, "noise": noise, "strength": strength, "bias": bias, "styles": (style,)}
            return ops.layer_epilogue(x, blur=blur, **vectors, act="lrelu", clamp=1.7, keep_x=keep_x, backend="cpu")

        inputs, most = (image, demod, noise, torch.tensor(0.7), bias, style), 2 if keep_x else 1
        yield "layer", lambda epilogue=epilogue, inputs=inputs, most=most: _derivatives(epilogue, *inputs, most=most)
    large = torch.zeros(2, 136, 128, 256).contiguous(memory_format=torch.channels_last)

    def sums(style):
        return ops.layer_epilogue(large, styles=(style,), act="lrelu", backend="cpu")

    yield "layer", lambda: _derivatives(sums, _draw(2, 136, seed=13), most=1)

    # More channels in than threads, and more channels out than warps; then so many out that a block has eight images.
    for size, style in (((9, 260, 3, 3), _draw(2, 260, seed=7)), ((132, 3, 1, 1), _draw(9, 3, seed=14))):

        def modulation(weight, style):
            return tuple(ops.modulation(weight, style, torch.float32, backend="cpu"))

        weight, most = _draw(*size, seed=9), 2 if size[0] < 10 else 0
        yield (
            "modulation",
            lambda f=modulation, weight=weight, style=style, most=most: _derivatives(f, weight, style, most=most),
        )
