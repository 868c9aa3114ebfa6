"""The renderer on the Triton kernels: against the reference, what it launches, what it keeps, in a CUDA graph.

In Triton's interpreter, or, marked gpu, on the GPU where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.ops import published
from checks import assert_close, assert_error_within_reference, draw, draw_uniform
from epigraf_fast.camera import Patch, cam2world_matrix, camera_rays
from epigraf_fast.config import CameraConfig, RendererConfig, preset
from epigraf_fast.models import renderer as renderer_module
from epigraf_fast.models.decoder import Decoder
from epigraf_fast.models.raw_planes import RawPlanes
from epigraf_fast.models.renderer import Draws, Renderer, Rendering
from epigraf_fast.ops import backends, library

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
interpreted = pytest.mark.skipif(not backends._interpreting(), reason="TRITON_INTERPRET is not set: the GPU runs them")
# Without a GPU the skipped tests of CUDA graphs below stand for all that would run there.
ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
on_each_device = pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpreted), *ON_GPU])

CAMERA = CameraConfig(fov=30.0, radius=8.0, ray_start=6.0, ray_end=10.0, cube_scale=3.8)
SMALL = RendererConfig(coarse_samples=7, fine_samples=6, density_shift=0.3)
ANGLES = torch.tensor([[0.4, 1.2, 0.0], [-2.0, 2.0, 0.0]], dtype=torch.float64)
CHANNELS, HIDDEN, RESOLUTION, SIDE = 8, 16, 12, 3


def scene(config: RendererConfig, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **options):
    """Two scenes of raw planes in training mode."""
    torch.manual_seed(0)
    model = RawPlanes(RESOLUTION, CHANNELS, HIDDEN, config, CAMERA, num_scenes=2, backend=backend, **options)
    model.decoder.fc0.bias.data.copy_(draw(HIDDEN, seed=10))
    return model.to(device=device, dtype=dtype)


def draws(config: RendererConfig, dtype: torch.dtype, device: str, rays: int = SIDE**2) -> Draws:
    coarse, fine = config.coarse_samples, config.fine_samples
    numbers = (
        draw_uniform(2, rays, coarse, seed=1),
        draw_uniform(2, rays, fine, seed=2),
        draw(2, rays, coarse, seed=3),
        draw(2, rays, coarse + fine, seed=4),
    )
    return Draws(*(x.float().to(device=device, dtype=dtype) for x in numbers))  # exact in fp32


def results(
    backend: str,
    dtype: torch.dtype,
    device: str,
    settings: dict[str, Any],
    view: dict[str, Tensor],
    options: dict[str, Any],
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Outputs, and the gradients of a sum that weighs all of them."""
    config = dataclasses.replace(SMALL, **settings)
    model = scene(config, backend, dtype, device, precision=precision)
    view = {"fov": CAMERA.fov, **view}
    view = {k: x.float().to(device=device, dtype=dtype) if isinstance(x, Tensor) else x for k, x in view.items()}
    angles = ANGLES.float().to(device=device, dtype=dtype)
    rays = camera_rays(cam2world_matrix(angles, CAMERA.radius), view.pop("fov"), SIDE, **view)
    given = draws(config, dtype, device)
    if options.get("stochastic") is False:
        given = given._replace(u=None)
    outputs = model.renderer(model.planes, model.decoder, *rays, draws=given, **options)
    total = sum((y * draw(*y.shape, seed=20 + i).to(y)).sum() for i, y in enumerate(outputs))
    total.backward()
    gradients = {f"gradient to {name}": p.grad for name, p in model.named_parameters()}
    return {**outputs._asdict(), **gradients}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # what: settings of the renderer, of the rays, options of the call
    "as FFHQ": ({}, {}, {}),
    "as the demo": ({"white_background": True, "last_interval": 1e-3, "density_shift": -1.0}, {}, {}),
    "noise": ({}, {}, {"density_noise_std": 0.7}),
    "noise of a tensor": ({"last_interval": 0.1}, {}, {"density_noise_std": torch.tensor([0.7])}),
    "last_back": ({"last_back": True, "last_interval": 1e-3}, {}, {}),
    "last_back, white": ({"last_back": True, "white_background": True, "last_interval": 0.1}, {}, {}),
    "fov of each": ({}, {"fov": torch.tensor([20.0, 29.0])}, {}),
    "patches": (
        {"white_background": True},
        {"patch": Patch(torch.tensor([0.3, 0.7]), torch.tensor([[0.1, 0.6], [0.25, 0.0]]))},
        {},
    ),
    "ReLU": ({"density_activation": "relu", "last_interval": 0.2}, {}, {"density_noise_std": 0.7}),
    "softplus of beta 4": ({"softplus_beta": 4.0, "last_interval": 0.2}, {}, {}),
    "even": ({"last_interval": 1e-3}, {}, {"stochastic": False}),
    "coarse alone": ({"fine_samples": 0, "last_interval": 0.1}, {}, {"density_noise_std": 0.7}),
}


@needs_triton
@on_each_device
@pytest.mark.parametrize(("case", "deterministic"), [*((case, False) for case in CASES), ("as FFHQ", True)])
def test_errs_no_more_than_the_reference(
    case: str, deterministic: bool, device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sums of atomic additions in any order, which is the default, and with the same bits in every run."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    settings, view, options = CASES[case]
    std = options.get("density_noise_std")
    if isinstance(std, Tensor):
        options = {**options, "density_noise_std": std.to(device)}
    kernel, reference, truth = (
        results(backend, dtype, device, settings, view, options)
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    for name, expected in truth.items():
        assert_error_within_reference(kernel[name], reference[name], expected, f"{case}: {name}")


@needs_triton
@on_each_device
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precision_reaches_the_kernels(precision: str, device: str, poisoned: None) -> None:
    """Factors of the products have 11 bits then: results differ from fp32's, by no more than some such roundings."""
    exact, rounded = (
        results("triton", torch.float32, device, {"last_interval": 0.1}, {}, {}, precision=name)
        for name in ("fp32", precision)
    )
    for name, expected in exact.items():
        error = (rounded[name] - expected).abs().max() / expected.abs().max()
        assert error < 16 * 2**-11, f"{precision}: {name}"
    if precision == "fp16" or device == "cuda":  # the interpreter does not round to tf32
        assert not torch.equal(rounded["rgb"], exact["rgb"])


@needs_triton
@on_each_device
def test_a_seed_decides_every_draw(device: str, poisoned: None) -> None:
    """Jitter, importance samples and both noises; and a run of its own where no seed is given."""
    model = scene(dataclasses.replace(SMALL, last_interval=0.1), "triton", device=device)
    angles, side = ANGLES.float().to(device), 2
    seeds = [torch.tensor([n], device=device) for n in (5, 6, 5 + 2**40)]
    options = {"density_noise_std": 0.5}
    one, two, three = (model(angles, side, draws=Draws(seed=seed), **options).rgb for seed in seeds)
    assert_close(model(angles, side, draws=Draws(seed=seeds[0]), **options).rgb, one, "again", "exact")
    assert not torch.equal(one, two)
    assert not torch.equal(one, three)
    assert not torch.equal(model(angles, side, **options).rgb, model(angles, side, **options).rgb)
    given = draws(SMALL, torch.float32, device, rays=side**2)
    for name in given._fields[:4]:  # the other three from the seed: it matters to each
        kept = Draws(seed=seeds[0])._replace(**{name: getattr(given, name)})
        assert not torch.equal(model(angles, side, draws=kept, **options).rgb, one), name
    given = given._replace(fine_noise=None)
    first, second = (model(angles, side, draws=given._replace(seed=seed), **options).rgb for seed in seeds[:2])
    assert not torch.equal(first, second), "noise of the last integration"


@needs_triton
@on_each_device
def test_chunks_draw_numbers_of_their_own(device: str, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    model = scene(SMALL, "triton", device=device).eval()
    # A plane of one colour and density: what differs between rays are their draws.
    model.planes.data.fill_(0.1)
    monkeypatch.setattr(renderer_module, "EVALUATION_CHUNK", 2 * 13)
    seed = torch.tensor([3], device=device)
    with torch.no_grad():
        depth = model(ANGLES.float().to(device), 2, stochastic=True, draws=Draws(seed=seed)).depth
    assert len(depth[0].unique()) == 4


# What it launches and keeps: full sizes, on tensors that have no memory


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Names of the kernels that would be launched in this block; none is."""
    from triton.runtime import interpreter, jit

    names: list[str] = []

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit.JITFunction, "run", run)
        patch.setattr(interpreter.InterpretedFunction, "run", run)
        patch.setattr(backends, "_lacking_triton", lambda: None)
        patch.setattr(backends, "_interpreting", lambda: True)  # whatever the device
        patch.setattr(library, "_len_torch_dispatch_stack", lambda: 0)  # TorchOps only watches: the way of plain calls
        yield names


class TorchOps(TorchDispatchMode):
    """Notes what torch launches, and the elements of the largest tensor that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
            if func.name() != "aten::empty.memory_format":
                self.calls.append(func.name())
        return result


BATCH, RAYS, FULL = 4, 64 * 64, preset("ffhq")
SAMPLES = FULL.renderer.coarse_samples + FULL.renderer.fine_samples


def full_size(backend: str, config: RendererConfig = FULL.renderer) -> tuple[Renderer, Decoder, Tensor, Tensor, Tensor]:
    """The renderer of the FFHQ preset, its decoder, planes and rays, on no device."""
    camera = FULL.camera
    with torch.device("meta"):
        renderer = Renderer(config, camera.ray_start, camera.ray_end, camera.cube_scale, backend=backend)
        decoder = Decoder(FULL.generator.plane_channels, FULL.generator.decoder_hidden, backend=backend)
        planes = torch.empty(BATCH, 3 * 32, 512, 512, requires_grad=True)
        return renderer, decoder, planes, torch.empty(BATCH, RAYS, 3), torch.empty(BATCH, RAYS, 3)


FORWARD = [
    "_sample_stratified_kernel",
    "_decode_triplane_fwd_kernel",
    "_sample_importance_kernel",
    "_decode_triplane_fwd_kernel",
    "_composite_fwd_kernel",
]
# The gradient to the network and that to planes, for both sets of samples, are one launch each.
BACKWARD = ["_composite_bwd_kernel", "_decode_triplane_bwd_kernel", "_decode_triplane_scatter_kernel"]


@needs_triton
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("std", [0.0, 0.5, torch.empty([], device="meta")], ids=["calm", "noisy", "tensor"])
def test_five_launches_forward_and_three_backward(stochastic: bool, std: float | Tensor) -> None:
    renderer, decoder, *inputs = full_size("triton")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    network = list(decoder.parameters())
    with recorded_launches() as launches:
        with TorchOps() as forward:
            options = {"stochastic": stochastic, "density_noise_std": std, "draws": Draws(seed=seed)}
            result = renderer(inputs[0], decoder, *inputs[1:], **options)
        assert launches == FORWARD
        grad_rgb, grad_depth = torch.empty_like(result.rgb), torch.empty_like(result.depth)
        launches.clear()
        with TorchOps() as backward:
            torch.autograd.grad((result.rgb, result.depth), (inputs[0], *network), (grad_rgb, grad_depth))
        assert launches == BACKWARD
    # The learning rates of two layers' weights; nothing is copied, cast, sorted or drawn.
    assert forward.calls == ["aten::mul.Tensor"] * 2
    assert forward.largest == BATCH * RAYS * 48 * 4
    # The gradients' zeros, coarse and fine t side by side, and the learning rates again.
    assert sorted(backward.calls) == ["aten::cat", *["aten::mul.Tensor"] * 2, *["aten::zeros"] * 2]
    assert backward.largest == inputs[0].numel()


@needs_triton
def test_without_a_seed_one_is_drawn() -> None:
    renderer, decoder, *inputs = full_size("triton")
    with recorded_launches() as launches, TorchOps() as ops:
        renderer(inputs[0], decoder, *inputs[1:], density_noise_std=0.5)
    assert launches == FORWARD
    assert [name for name in ops.calls if name != "aten::mul.Tensor"] == ["aten::randint"]


@needs_triton
def test_coarse_samples_alone_take_three_launches() -> None:
    renderer, decoder, *inputs = full_size("triton", dataclasses.replace(FULL.renderer, fine_samples=0))
    with recorded_launches() as launches:
        renderer(inputs[0], decoder, *inputs[1:]).rgb.sum().backward()
    assert launches == [*FORWARD[:2], FORWARD[4], *BACKWARD]


def saved_bytes(render: Callable[[], Any], leaves: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps for the backward of a call, each storage once, without those of the leaves."""
    known = {x.untyped_storage()._cdata for x in leaves}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in known:
            kept[x.untyped_storage()._cdata] = x  # alive, so that no other storage takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = render()
    assert result.rgb.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def published_render(renderer: Renderer, planes: Tensor, decoder: Decoder, *rays: Tensor, **options: Any) -> Rendering:
    return published.render(renderer, planes, decoder.network(), *rays, **options)


@needs_triton
def test_a_thirtieth_is_kept_for_the_backward() -> None:
    """Beside planes and weights. Rays are counted with both."""
    renderer, decoder, *inputs = full_size("triton")
    leaves = (inputs[0], *decoder.parameters())
    options = {"density_noise_std": 0.5}
    with recorded_launches():
        ours = saved_bytes(lambda: renderer(inputs[0], decoder, *inputs[1:], **options), leaves)
    theirs = saved_bytes(
        lambda: published_render(renderer, inputs[0], decoder, *inputs[1:], stochastic=True, **options), leaves
    )
    # Depth, colour and density of a sample: five numbers. And the rays, the seed, two weight matrices, a bias.
    assert ours <= 4 * (BATCH * RAYS * (5 * SAMPLES + 6) + 2 + 32 * 64 + 64 + 64 * 4)
    assert theirs >= 30 * ours
    stated = re.search(r"keep ([\d.]+) MiB an image.*?`grid_sample` keeps (\d+)", README, re.DOTALL).groups()
    assert [float(x) for x in stated] == [round(ours / BATCH / 2**20, 1), round(theirs / BATCH / 2**20)]


# The baseline of the benchmarks


@pytest.mark.parametrize("std", [0.0, 0.7])
@pytest.mark.parametrize("settings", [{}, {"white_background": True, "last_back": True, "density_activation": "relu"}])
def test_the_published_sequence_is_the_reference(settings: dict[str, Any], std: float) -> None:
    config = dataclasses.replace(SMALL, last_interval=0.1, **settings)
    given = draws(config, torch.float64, "cpu")
    both = []
    for as_published in (False, True):
        model = scene(config, "reference", torch.float64)
        rays = camera_rays(cam2world_matrix(ANGLES, CAMERA.radius), CAMERA.fov, SIDE)
        inputs = model.planes, model.decoder, *rays
        if as_published:
            result = published_render(model.renderer, *inputs, density_noise_std=std, draws=given)
        else:
            result = model.renderer(*inputs, density_noise_std=std, draws=given)
        sum((y * draw(*y.shape, seed=i)).sum() for i, y in enumerate(result)).backward()
        both.append({**result._asdict(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, expected in both[0].items():
        assert_close(both[1][name], expected, name)


# CUDA graphs


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_in_a_cuda_graph() -> None:
    """Captured once, forward and backward; each replay draws anew from what the seed holds."""
    model = scene(dataclasses.replace(SMALL, last_interval=0.1), "triton", device="cuda")
    angles, seed = ANGLES.float().cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    std = torch.full((1,), 0.5, device="cuda")
    parameters = list(model.parameters())
    weights = draw(2, 3, SIDE, SIDE, dtype=torch.float32).cuda()

    def step() -> tuple[Tensor, ...]:
        images = model(angles, SIDE, draws=Draws(seed=seed), density_noise_std=std)
        loss = (images.rgb * weights).sum() + images.depth.sum()
        return images.rgb, *torch.autograd.grad(loss, parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles what is to be captured
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    images = []
    for number in (5, 6, 5):
        seed.fill_(number)
        graph.replay()
        replayed = [x.clone() for x in captured]
        images.append(replayed[0])
        names = "rgb", *(f"gradient to {name}" for name, _ in model.named_parameters())
        for name, actual, expected in zip(names, replayed, step(), strict=True):
            largest = expected.abs().max()  # sums of many terms, in an order that changes
            assert_close(actual / largest, expected / largest, f"seed {number}: {name}")
    assert_close(images[2], images[0], "the same seed", "exact")
    assert not torch.equal(images[1], images[0])


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_nothing_waits_for_the_gpu() -> None:
    """Rays, rendering and backward, for cameras, patches and fields of view of their own."""
    model = scene(SMALL, "triton", device="cuda")
    angles, fov = ANGLES.float().cuda(), torch.tensor([20.0, 29.0], device="cuda")
    patch = Patch(torch.tensor([0.3, 0.7], device="cuda"), torch.zeros(2, 2, device="cuda"))
    for options in ({}, {"fov": fov}, {"patch": patch}):
        model(angles, SIDE, density_noise_std=0.5, **options).rgb.sum().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(angles, SIDE, density_noise_std=0.5, **options).rgb.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
