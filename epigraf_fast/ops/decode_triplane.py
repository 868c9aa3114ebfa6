"""Raw colour and density of points, from tri-planes and the two-layer decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.decode_triplane import Network, decode_features, points_on_rays
from ..reference.decode_triplane import decode_triplane as _reference
from ..reference.decode_triplane import decode_triplane_rays as _reference_rays
from ..reference.sample_triplane import PlaneRegion
from . import decode_triplane_cpu, library, native
from .backends import resolve, served
from .checks import (
    check_choice,
    check_network,
    check_positive,
    check_region,
    check_shape,
    check_together,
    check_triton_network,
    checked_resample,
    is_differentiated,
    resolve_deterministic,
)
from .ranges import annotate
from .sample_triplane import as_region, is_unordered, sample_triplane_cpu

PRECISIONS = ("fp32", "tf32", "fp16")


def _chosen(
    op: str, route: str, backend: str | None, planes: Tensor, network: Network, points: dict[str, Tensor]
) -> str:
    """The backend that a call gets, whose demands the arguments meet."""
    if route is library.REFERENCE:
        resolve("decode_triplane", backend, planes.device.type)
        return "reference"

    def check() -> None:
        check_triton_network(op, planes, network, points)

    return served("decode_triplane", backend, planes.device.type, check)


def decode_triplane(
    planes: Tensor,
    points: Tensor,
    network: Network,
    *,
    region: PlaneRegion | None = None,
    precision: str = "fp32",
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """out = w1 lrelu(w0 feature + b0) + b1, `feature` as in `sample_triplane`, lrelu of slope 0.2 and gain sqrt(2).

    Args:
        planes: [B, 3*C, H, W]; channels_last is read without a copy, and fastest. triton: fp32, fp16 or bf16, C a
            multiple of 8 and at most 64.
        points: [B, N, 3], in units of the cube's half size. triton: fp32.
        network: In the dtype of the planes or another. triton: hidden 16 to 128, out 2 to 16.
        region: Where the planes lie in whole ones, see `sample_triplane`.
        precision: triton: how the factors of the network's products are rounded: "fp32", "tf32" or "fp16" (gradients in
            tf32 then). Sums are fp32. The other backends follow torch's settings.
        deterministic: triton: whether the gradients have the same bits in every run, as in `sample_triplane`; those of
            the network are then written once a program and added in a fixed order.

    Returns:
        [B, N, out]: raw colour, raw density last; the widest dtype of planes and network (of fp16 and bf16 fp32).

    Derivatives: reference any order, to everything; torch the first; cpu the first, summed in a fixed order (by the
        extension where all is fp32 or all fp64 and no gradient to points is asked for, else by torch's grid sampler;
        the extension leaves out points whose gradients are below eps^2 of the largest, eps as in `torch.finfo`);
        triton the first, to planes and network, summed in fp32 in an order that changes from run to run unless
        `deterministic`.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; unknown or missing backend, unknown precision.
        NotImplementedError: triton: a gradient to points, or a second derivative, is asked for.
    """
    check_together("decode_triplane", planes=planes, points=points, **_tensors_of("decode_triplane", network))
    check_network("decode_triplane", planes, network)
    check_shape("decode_triplane", "points", points, (planes.shape[0], "N", 3))
    check_choice("decode_triplane", "precision", precision, PRECISIONS)
    check_region("decode_triplane", region, planes)
    route = library.route(planes, points, *network)
    chosen = _chosen("decode_triplane", route, backend, planes, network, {"points": points})
    if chosen == "reference":
        return _reference(planes, points, network, region)
    return _decode(route, chosen, planes, (points, None, None), network, 1.0, region, precision, deterministic)


def _tensors_of(op: str, network: Network) -> dict[str, Tensor]:
    """By the names that errors give them."""
    if not isinstance(network, Network):
        raise TypeError(f"{op}: network must be a Network(w0, b0, w1, b1), got {type(network).__name__}")
    return {f"network.{name}": x for name, x in network._asdict().items()}


def _is_fused(planes: Tensor, rays: tuple[Tensor | None, ...], network: Network) -> bool:
    """Whether the extension decodes on the CPU; else torch's grid sampler does, which knows gradients to points."""
    return not is_differentiated(*rays) and native.takes_on_cpu(planes, *rays, *network)


def _decode(
    route: str,
    chosen: str,
    planes: Tensor,
    rays: tuple[Tensor, Tensor | None, Tensor | None],
    network: Network,
    cube_scale: float,
    region: PlaneRegion | None,
    precision: str,
    deterministic: bool | None,
) -> Tensor:
    """At points, or at rays and their t, by triton, cpu or torch."""
    if chosen == "torch" and is_unordered(planes, deterministic):
        if rays[2] is None:
            return _reference(planes, rays[0], network, region)
        return _reference_rays(planes, *rays, network, cube_scale, region)
    if chosen == "triton" or (chosen == "cpu" and _is_fused(planes, rays, network)):
        first, settings = _settings(cube_scale, region, precision, deterministic, chosen)
        return library.call(route, _DecodeTriplane, planes, *rays, *network, first, settings)
    points, directions, t = rays
    if t is None:
        return decode_features(sample_triplane_cpu(planes, points, region), network)
    points = points_on_rays(points, directions, t) / cube_scale
    features = sample_triplane_cpu(planes, points.flatten(1, 2), region)
    return decode_features(features, network).unflatten(1, t.shape[1:])


def decode_triplane_rays(
    planes: Tensor,
    ray_origins: Tensor,
    ray_directions: Tensor,
    t: Tensor,
    network: Network,
    cube_scale: float = 1.0,
    *,
    region: PlaneRegion | None = None,
    precision: str = "fp32",
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """`decode_triplane` at the points (ray_origin + t ray_direction) / cube_scale.

    Args:
        ray_origins, ray_directions: [B, R, 3], world units, directions of length one.
        t: [B, R, S], distance along the ray, world units.
        cube_scale: Half size of the cube that the planes span, world units.
        planes, network, region, precision, deterministic: See `decode_triplane`.

    Returns:
        [B, R, S, out]: raw colour, raw density last; dtype as of `decode_triplane`.

    Derivatives: reference any order, to everything; cpu the first; triton the first, to planes and network.

    Raises:
        ValueError, TypeError: Wrong ranks, shapes, dtypes or devices; a cube_scale that is not finite and positive;
            unknown or missing backend, unknown precision.
        NotImplementedError: triton: a gradient to rays or t, or a second derivative, is asked for.
    """
    op, rays = "decode_triplane_rays", (ray_origins, ray_directions, t)
    route, chosen = check_rays(op, planes, rays, network, cube_scale, region, precision, backend)
    if chosen == "reference":
        return _reference_rays(planes, *rays, network, cube_scale, region)
    return _decode(route, chosen, planes, rays, network, cube_scale, region, precision, deterministic)


def decode_triplane_coarse_to_fine(
    planes: Tensor,
    ray_origins: Tensor,
    ray_directions: Tensor,
    t: Tensor,
    network: Network,
    resample: Callable[[Tensor], Tensor],
    cube_scale: float = 1.0,
    *,
    region: PlaneRegion | None = None,
    precision: str = "fp32",
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_triplane_rays` at t, then at the depths that `resample` finds with the result (method.md 5).

    The same as two calls; but with triton one backward launch serves both, and one gradient of the planes.

    Args:
        resample: Maps the coarse result [B, R, S, out], detached, to fine t [B, R, K], dtype and device of t. It must
            not change any argument in place.
        planes, ray_origins, ray_directions, t, network, cube_scale, region, precision, deterministic: See
            `decode_triplane_rays`.

    Returns:
        coarse [B, R, S, out]; fine t [B, R, K], as `resample` gave it; fine [B, R, K, out].

    Derivatives: as `decode_triplane_rays`; none through `resample`.

    Raises:
        As `decode_triplane_rays`; also where `resample` gives something else, or changes what it was given.
    """
    op, rays = "decode_triplane_coarse_to_fine", (ray_origins, ray_directions, t)
    route, chosen = check_rays(op, planes, rays, network, cube_scale, region, precision, backend)
    plain = route is library.PLAIN
    resample = checked_resample(op, resample, t, (planes, *rays, *network) if plain else None)
    if plain and (chosen == "triton" or (chosen == "cpu" and _is_fused(planes, rays, network))):
        first, settings = _settings(cube_scale, region, precision, deterministic, chosen)
        return _DecodeCoarseToFine.apply(planes, *rays, resample, *network, first, settings)
    options = {"region": region, "precision": precision, "deterministic": deterministic, "backend": chosen}
    coarse = decode_triplane_rays(planes, *rays, network, cube_scale, **options)
    t_fine = resample(coarse)
    fine = decode_triplane_rays(planes, *rays[:2], t_fine, network, cube_scale, **options)
    return coarse, t_fine, fine


def check_rays(
    op: str,
    planes: Tensor,
    rays: tuple[Tensor, Tensor, Tensor],
    network: Network,
    cube_scale: float,
    region: PlaneRegion | None,
    precision: str,
    backend: str | None,
) -> tuple[str, str]:
    """Route and backend that a call with rays gets, its arguments checked."""
    rays = dict(zip(("ray_origins", "ray_directions", "t"), rays, strict=True))
    check_together(op, planes=planes, **rays, **_tensors_of(op, network))
    check_network(op, planes, network)
    check_region(op, region, planes)
    check_shape(op, "ray_origins", rays["ray_origins"], (planes.shape[0], "R", 3))
    check_shape(op, "ray_directions", rays["ray_directions"], tuple(rays["ray_origins"].shape))
    check_shape(op, "t", rays["t"], (planes.shape[0], rays["ray_origins"].shape[1], "S"))
    check_positive(op, "cube_scale", cube_scale)
    check_choice(op, "precision", precision, PRECISIONS)
    route = library.route(planes, *rays.values(), *network)
    return route, _chosen(op, route, backend, planes, network, rays)


class _Settings(NamedTuple):
    cube_scale: float
    precision: str
    deterministic: bool
    backend: str
    whole: Sequence[int] | None  # of the region, of which `first` is among the tensors

    @property
    def kernels(self) -> ModuleType:
        return decode_triplane_cpu if self.backend == "cpu" else _triton_kernels()


def _settings(
    cube_scale: float, region: PlaneRegion | None, precision: str, deterministic: bool | None, backend: str
) -> tuple[Tensor | None, _Settings]:
    first, whole = (None, None) if region is None else region
    return first, _Settings(float(cube_scale), precision, resolve_deterministic(deterministic), backend, whole)


@functools.cache
def _triton_kernels() -> ModuleType:
    from ..kernels import decode_triplane as kernels

    return kernels


_INPUTS = "Tensor planes, Tensor origins, Tensor? directions, Tensor? t, Tensor w0, Tensor b0, Tensor w1"
_OPTIONS = "Tensor? first, float cube_scale, str precision, bool deterministic, str backend, SymInt[2]? whole"


@library.register(f"decode_triplane({_INPUTS}, Tensor b1, {_OPTIONS}) -> Tensor")
class _DecodeTriplane:
    """`origins` are points, or rays with `directions` and `t`.

    Only the inputs are saved: the backward computes features and hidden units again.
    """

    Settings = _Settings
    constants = ("origins", "directions", "t")

    @staticmethod
    @annotate("decode_triplane_fwd")
    def run(*args: Any) -> Tensor:
        *tensors, first, settings = args
        region = as_region(first, settings.whole)
        return settings.kernels.fwd(*tensors, settings.cube_scale, settings.precision, region=region)

    @staticmethod
    def empty(planes: Tensor, origins: Tensor, directions: Tensor | None, t: Tensor | None, *args: Any) -> Tensor:
        *network, _, _ = args
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in network), planes.dtype)
        return planes.new_empty(*(origins.shape[:2] if t is None else t.shape), len(network[2]), dtype=dtype)

    @staticmethod
    def reference(planes: Tensor, origins: Tensor, directions: Tensor | None, t: Tensor | None, *args: Any) -> Tensor:
        *network, first, settings = args
        region = as_region(first, settings.whole)
        if t is None:
            return _reference(planes, origins, Network(*network), region)
        return _reference_rays(planes, origins, directions, t, Network(*network), settings.cube_scale, region)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
        *tensors, b1, first, ctx.settings = inputs
        ctx.b1_dtype = b1.dtype
        ctx.save_for_backward(*tensors, first)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        options = ctx.settings, ctx.b1_dtype, (ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:8]))
        gradients = library.apply(_DecodeTriplaneBackward, grad_y, *ctx.saved_tensors, *options)
        return gradients[0], None, None, None, *gradients[1:], None, None


class _DecodeCoarseToFine(torch.autograd.Function):
    """Two of `kernels.fwd` with `resample` between them, and one of `kernels.bwd`, for both sets of samples."""

    @staticmethod
    @annotate("decode_coarse_to_fine_fwd")
    def forward(
        ctx: Any,
        planes: Tensor,
        origins: Tensor,
        directions: Tensor,
        t: Tensor,
        resample: Callable[[Tensor], Tensor],
        w0: Tensor,
        b0: Tensor,
        w1: Tensor,
        b1: Tensor,
        first: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        network, options = (w0, b0, w1, b1), (settings.cube_scale, settings.precision)
        region = as_region(first, settings.whole)
        coarse = settings.kernels.fwd(planes, origins, directions, t, *network, *options, region=region)
        t_fine = resample(coarse)
        fine = settings.kernels.fwd(planes, origins, directions, t_fine, *network, *options, region=region)
        ctx.save_for_backward(planes, origins, directions, t, t_fine, w0, b0, w1, first)
        ctx.mark_non_differentiable(t_fine)
        ctx.settings, ctx.b1_dtype = settings, b1.dtype
        return coarse, t_fine, fine

    @staticmethod
    def backward(ctx: Any, grad_coarse: Tensor | None, _: None, grad_fine: Tensor | None) -> tuple[Tensor | None, ...]:
        options = ctx.settings, ctx.b1_dtype, (ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:9]))
        planes, origins, directions, t, t_fine, *network = ctx.saved_tensors
        if grad_coarse is None and grad_fine is None:
            return (None,) * len(ctx.needs_input_grad)
        if grad_coarse is None or grad_fine is None:  # only one of them was used
            grad_y, all_t = (grad_coarse, t) if grad_fine is None else (grad_fine, t_fine)
        else:
            grad_y, all_t = _joined(grad_coarse, grad_fine), torch.cat([t, t_fine], dim=-1)
        saved = planes, origins, directions, all_t, *network
        gradients = library.apply(_DecodeTriplaneBackward, grad_y, *saved, *options)
        return gradients[0], None, None, None, None, *gradients[1:], None, None


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """[B, R, S, C] and [B, R, K, C] as [B, R, S + K, C]; no copy where they lie so, as `composite` leaves them."""
    batch, rays, samples, channels = first.shape
    both = samples + second.shape[2]
    stride = (rays * both * channels, both * channels, channels, 1)
    if (
        first.stride() == second.stride() == stride
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + samples * channels
    ):
        return first.as_strided((batch, rays, both, channels), stride)
    return torch.cat([first, second], dim=2)


@library.register(
    f"decode_triplane_backward(Tensor grad_y, {_INPUTS}, {_OPTIONS}, ScalarType b1_dtype, bool[2] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class _DecodeTriplaneBackward(library.Last):
    """To planes and to the network, where these are needed."""

    Settings = _Settings
    refusal = 'decode_triplane: backend "{0.backend}" has no second derivative; use backend="reference"'

    @staticmethod
    @annotate("decode_triplane_bwd")
    def run(grad_y: Tensor, planes: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        *rays, w0, b0, w1, first, settings, b1_dtype, needs = args
        options = settings.cube_scale, settings.precision, *needs, settings.deterministic
        region = as_region(first, settings.whole)
        grad_planes, grad_network = settings.kernels.bwd(grad_y, planes, *rays, w0, b0, w1, *options, region=region)
        if grad_planes is not None:
            grad_planes = grad_planes.to(planes.dtype)
        if grad_network is None:
            return grad_planes, None, None, None, None
        dtypes = w0.dtype, b0.dtype, w1.dtype, b1_dtype
        return grad_planes, *(grad.to(dtype) for grad, dtype in zip(grad_network, dtypes, strict=True))

    @staticmethod
    def empty(grad_y: Tensor, planes: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        *_, w0, b0, w1, _, _, b1_dtype, needs = args
        grad_planes = torch.empty_like(planes, memory_format=torch.channels_last) if needs[0] else None
        if not needs[1]:
            return grad_planes, None, None, None, None
        return grad_planes, *(x.new_empty(x.shape) for x in (w0, b0, w1)), w1.new_empty(len(w1), dtype=b1_dtype)

    @staticmethod
    def reference(grad_y: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, first, settings, b1_dtype, _ = args

        def forward(*tensors: Tensor | None) -> Tensor:
            return _DecodeTriplane.reference(*tensors, first, settings)

        b1 = grad_y.new_zeros(grad_y.shape[-1], dtype=b1_dtype)  # no gradient depends on it
        gradients = library.pull_back(forward, (*tensors, b1), (grad_y,))
        return gradients[0], *gradients[4:]
