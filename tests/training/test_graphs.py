"""Phases that are replayed: what they read, what they leave, and that nothing in them waits for the device.

Recording itself needs a GPU. On a CPU a replay is a plain call on the recorded inputs, so that all else is tested.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from in_part import IN_PART
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from checks import TOLERANCES
from epigraf_fast.config import Config
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.errors import UserError
from epigraf_fast.reference import sample_triplane as reference
from epigraf_fast.tools import train
from epigraf_fast.training import graphs
from epigraf_fast.training.distributed import World
from epigraf_fast.training.gradients import clean_, flatten
from epigraf_fast.training.graphs import GraphedPhase, GraphMemory
from epigraf_fast.training.step import Samples, Schedule, Trainer

TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]

CPU = torch.device("cpu")
EVERYTHING = {  # every branch of a phase that has no settings against it
    "micro_batch": 4,
    "augment": {"mode": "ada", "p": 0.3},
    "patch": {"importance": 4},
    "discriminator": {"global_context": "concat"},
    "renderer": {"background": "sphere", "background_samples": 3},
    "optim": {"r1_interval": 2},
}
PATH_LENGTH = {
    "generator": {"backbone": "image", "style_mixing": 0.9},
    "optim": {
        "path_length_weight": 2.0,
        "path_length_interval": 2,
        "r1_interval": 2,
        "blur_kimg": 0.02,
        "reuse_fakes": True,
    },
    "patch": {"distribution": "discrete", "num_scales": 4},
}

# Recorded phases give all micro-batches one size: noise images would be larger, and all later draws others.
PARTS = {**IN_PART, "generator": {**IN_PART["generator"], "noise": False}}

EVERY_KIND = pytest.mark.parametrize(
    "settings", [EVERYTHING, PATH_LENGTH, PARTS], ids=["everything", "path length", "planes in part"]
)


def losses_of(trainer: Trainer, batches: Iterator, steps: int) -> list[dict[str, float]]:
    found = []
    for _ in range(steps):
        trainer.reset_statistics()
        trainer.iteration(*next(batches))
        found.append(trainer.statistics())
    return found


# GraphedPhase


class Counted:
    """sum(a b) + shift of nested inputs, and the inputs of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, pair: tuple[Tensor, Tensor], shift: float) -> Tensor:
        self.calls.append((*pair, shift))
        return (pair[0] * pair[1]).sum() + shift


def test_replays_read_the_copied_inputs() -> None:
    function = Counted()
    phase = GraphedPhase(function, GraphMemory(CPU))
    for seed in range(3):
        torch.manual_seed(seed)
        a, b = torch.randn(4), torch.randn(4, requires_grad=True)
        assert torch.equal(phase((a, b), 0.5), (a * b).sum() + 0.5)
        a.fill_(torch.nan)  # the caller's tensors are its own
    first, *others = function.calls
    assert len(others) == 2
    for call in others:
        assert call[0] is first[0]
        assert call[1] is first[1]
    assert not first[1].requires_grad


@pytest.mark.parametrize(
    "other",
    [
        ((torch.ones(5), torch.ones(5)), 0.5),
        ((torch.ones(4, dtype=torch.float64), torch.ones(4)), 0.5),
        ((torch.ones(4), torch.ones(4)), 0.25),
        ([torch.ones(4), torch.ones(4)], 0.5),
    ],
    ids=["shape", "dtype", "value", "structure"],
)
def test_another_kind_of_inputs_starts_anew(other: tuple[Any, float]) -> None:
    function = Counted()
    phase = GraphedPhase(function, GraphMemory(CPU))
    phase((torch.ones(4), torch.ones(4)), 0.5)
    assert phase(*other) == function(*other)
    old, new = phase.recordings
    assert new.kind != old.kind
    assert all(a is not b for a, b in zip(old.tensors, new.tensors, strict=True))


class Recorder(GraphMemory):
    """A memory that has a stream in name, and whose graphs say what is done to them: what a GPU would be asked for."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.done: list[str] = []

    def record(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        self.done.append("record")
        outputs = function()
        memory = self

        class Graph:
            def replay(self) -> None:
                memory.done.append("replay")
                outputs.copy_(function())  # as a graph writes its outputs

        return Graph(), outputs

    def release(self, graph: Any) -> None:
        self.done.append("release")


def test_the_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain call, a recording with its replay, replays; so with another kind of inputs, and the first one, which
    returns, is still there; that which was not used for longest goes when there are too many."""
    monkeypatch.setattr(graphs, "MOST_KINDS", 2)
    memory = Recorder()
    phase = GraphedPhase(Counted(), memory)
    monkeypatch.setattr(phase, "_plainly", lambda x: memory.done.append("plain") or phase.function(*x.inputs))
    memory.stream = object()

    def run(*shifts: float) -> list[str]:
        memory.done.clear()
        for i, shift in enumerate(shifts):
            assert phase((torch.full((2,), 1.0 + i), torch.ones(2)), shift) == 2 * (1.0 + i) + shift
        return list(memory.done)

    assert run(0.0, 0.0, 0.0) == ["plain", "record", "replay", "replay"]
    assert run(1.0, 1.0, 1.0) == ["plain", "record", "replay", "replay"]
    assert run(0.0, 1.0, 0.0) == ["replay"] * 3
    assert run(2.0) == ["release", "plain"]  # of 1.0
    assert run(0.0, 1.0, 1.0) == ["replay", "plain", "record", "replay"]  # 2.0 had no graph to let go


def test_a_plain_call_is_in_the_order_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be torch's current one."""
    done, device = [], torch.device("cuda:1")

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.device = name, device

        def wait_stream(self, other: Stream) -> None:
            done.append((self.name, "waits for", other.name))

    streams = {device: Stream("the current one of cuda:1")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[device])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    phase = GraphedPhase(lambda x: done.append("call"), Recorder())
    phase.memory.stream = Stream("the side stream")
    phase(torch.ones(1))
    before = ("the side stream", "waits for", "the current one of cuda:1")
    assert done == [before, "call", before[::-1]]


# The phases of a step


@EVERY_KIND
def test_losses_are_those_without_graphs(
    settings: dict[str, Any], tiny_config: TinyConfig, tiny_trainer: TinyTrainer
) -> None:
    """To the last bit; the blur's radius and the density noise change on the way, and end.

    Planes in part are larger where phases are recorded, which rounds.
    """
    settings = {**settings, "renderer": {**settings.get("renderer", {}), "density_noise_kimg": 0.03}}
    config = tiny_config(**settings)
    plain, batches = tiny_trainer(config)
    expected = losses_of(plain, batches, 6)
    recorded, batches = tiny_trainer(tiny_config(**settings, cuda_graphs=True))
    actual = losses_of(recorded, batches, 6)
    if settings.get("generator") == PARTS["generator"]:
        for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert a.pop("planes/share") >= b.pop("planes/share"), number
            rounding = 2 * torch.finfo(torch.float32).eps  # of logits of about 1, whose mean is near 0
            assert a == pytest.approx(b, rel=TOLERANCES["ten_steps"][0], abs=rounding), number
    else:
        assert actual == expected
    names = {"G", "D", "R1", "path length"} if config.optim.path_length_weight else {"G", "D", "R1"}
    assert set(recorded.graphed) == names


def test_phases_read_their_inputs_alone(
    tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No counter, schedule or data set: those may not be there while a phase runs, and are host values, which a
    recording would keep."""
    trainer, batches = tiny_trainer(tiny_config(**EVERYTHING, cuda_graphs=True))
    compute = trainer._gradients

    def alone(*args: Any) -> Any:
        hidden = {name: trainer.__dict__.pop(name) for name in ("cur_nimg", "iterations", "labels", "angles", "sums")}
        try:
            return compute(*args)
        finally:
            trainer.__dict__.update(hidden)

    monkeypatch.setattr(trainer, "_gradients", alone)
    losses = losses_of(trainer, batches, 2)
    reference, batches = tiny_trainer(tiny_config(**EVERYTHING))
    assert losses == losses_of(reference, batches, 2)


def test_schedules_are_tensors_and_what_they_switch_is_not(tiny_config: TinyConfig, tiny_trainer: TinyTrainer) -> None:
    trainer, _ = tiny_trainer(tiny_config())
    trainer.cur_nimg = 50
    now = trainer._schedule()
    assert [x.item() for x in now[:3]] == [2.0, 0.25, 0.5]
    assert now.blur_radius == 1
    trainer.cur_nimg = 100  # the noise and the blur are over
    now = trainer._schedule()
    assert now.density_noise_std == 0.0
    assert not isinstance(now.density_noise_std, Tensor)
    assert now.blur_radius == 0


class NothingWaits(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU: looks at values, sizes that depend on them, host-made tensors."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "item",
        "lift_fresh",
        "is_nonzero",
        "equal",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{func} makes the host wait"
        if name == "index" or name.startswith("index_put"):
            assert all(x is None or x.dtype == torch.int64 for x in args[1]), f"{func} with a mask makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: bool((x > 0).all()),
    ],
    ids=["item", "mask", "tensor", "bool"],
)
def test_waiting_is_noticed(operation: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1.0, -1.0])
    with pytest.raises(AssertionError, match="makes the host wait"), NothingWaits():
        operation(x)


@EVERY_KIND
def test_nothing_in_an_iteration_waits(
    settings: dict[str, Any], tiny_config: TinyConfig, tiny_trainer: TinyTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ops' references, as the extension's own launchers are not seen; without Adam's step, which is fused on a
    GPU, and without the look at a region that the reference takes on a CPU alone."""
    monkeypatch.setattr(reference, "reads_outside", lambda *args: False)
    trainer, batches = tiny_trainer(tiny_config(**settings, backend="reference"))
    for optimizer in (trainer.g_optimizer, trainer.d_optimizer):
        monkeypatch.setattr(optimizer, "step", lambda: None)
    batch = next(batches)
    place = trainer._with_patches  # what the host works out on its own tensors makes nobody wait

    def on_the_host(*args: Any) -> Any:
        with _disable_current_modes():
            return place(*args)

    monkeypatch.setattr(trainer, "_with_patches", on_the_host)
    trainer.iterations = 3  # ADA adjusts its strength after this one
    with NothingWaits():
        trainer.iteration(*batch)
        trainer.iteration(*batch)  # with regularization
    assert "loss/R1" in trainer.sums


# Settings


def test_what_cannot_be_recorded_is_refused(tiny_config: TinyConfig) -> None:
    with pytest.raises(UserError, match=r"cuda_graphs must be off with discriminator\.scales"):
        tiny_config(cuda_graphs=True, discriminator={"scales": 2})
    with pytest.raises(UserError, match=r"cuda_graphs must be off with augment\.exact_margins"):
        tiny_config(cuda_graphs=True, augment={"exact_margins": True})
    with pytest.raises(UserError, match="cuda_graphs needs a GPU"):
        train.pick_device(tiny_config(cuda_graphs=True), World())


# Gradients in one piece


def test_flat_gradients_are_copies_laid_out_as_the_parameters() -> None:
    torch.manual_seed(0)
    parameters = [
        torch.empty(3),
        torch.empty([]),
        torch.empty(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.empty(17, 2),
    ]
    gradients = [torch.randn(p.shape) for p in parameters]
    flat, parts = flatten(gradients, parameters)
    for part, grad, parameter in zip(parts, gradients, parameters, strict=True):
        assert torch.equal(part, grad)
        assert part.stride() == parameter.stride()
        assert part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() != grad.data_ptr()
        assert part.storage_offset() % 16 == 0
    assert flat.abs().sum() == pytest.approx(sum(grad.abs().sum().item() for grad in gradients), rel=1e-5)
    flat[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert clean_(flat) is flat
    assert parts[0].tolist() == [0.0, 1e5, -1e5]
    assert torch.equal(parts[3], gradients[3])


# On a GPU


def gpu_trainer(config: Config) -> tuple[Trainer, Iterator]:
    torch.manual_seed(config.seed)
    dataset = ImageDataset(config.data, use_labels=config.loader.labels, mirror=config.loader.mirror)
    device = torch.device("cuda")
    return Trainer(config, dataset, device), make_loader(dataset, config.batch, config.seed, device=device)


GPU = {"generator": {"plane_channels": 8, "decoder_hidden": 16}, "device": "cuda"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def gpu_settings(settings: dict[str, Any], backend: str) -> dict[str, Any]:
    merged = copy.deepcopy(settings)
    for name, value in GPU.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return {**merged, "backend": backend}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["reference", "gpu"])
@EVERY_KIND
def test_replayed_losses_are_those_of_plain_launches(
    settings: dict[str, Any], backend: str, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 20 iterations. Atomic additions have no order, so that deterministic algorithms stand in for them."""
    settings = gpu_settings(settings, backend)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        losses = {}
        for recorded in (False, True):
            trainer, batches = gpu_trainer(tiny_config(**settings, cuda_graphs=recorded))
            losses[recorded] = losses_of(trainer, batches, 20)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(phase.recordings[-1].graph is not None for phase in trainer.graphed.values())
    for number, (actual, expected) in enumerate(zip(losses[True], losses[False], strict=True)):
        assert actual.keys() == expected.keys()
        expected.pop("planes/share", None)  # larger where phases are recorded
        for name, value in expected.items():
            assert actual[name] == pytest.approx(value, rel=TOLERANCES["golden"][0]), f"step {number}: {name}"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["reference", "gpu"])
@pytest.mark.parametrize("recorded", [False, True])
@EVERY_KIND
def test_no_iteration_waits_for_the_gpu(
    settings: dict[str, Any], recorded: bool, backend: str, tiny_config: TinyConfig
) -> None:
    trainer, batches = gpu_trainer(tiny_config(**gpu_settings(settings, backend), cuda_graphs=recorded))
    trainer.cur_nimg = 1000  # the schedules stand still: every graph is recorded in the first iterations
    for _ in range(8):
        trainer.iteration(*next(batches))
    batch = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            trainer.iteration(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_uploads_do_not_overtake_the_computation(tiny_config: TinyConfig) -> None:
    trainer, _ = gpu_trainer(tiny_config(**gpu_settings({}, "reference")))
    images = [torch.full((64, 3, 256, 256), number, dtype=torch.uint8).pin_memory() for number in range(8)]
    sums = [trainer._upload(x)[0].float().mean() for x in images]
    assert [x.item() for x in sums] == list(range(8))


def test_the_inputs_are_trees_of_tensors() -> None:
    """A schedule and samples keep their names through the copies."""
    seen = []
    phase = GraphedPhase(lambda now, samples: seen.append((now, samples)), GraphMemory(CPU))
    now = Schedule(torch.tensor(1.0), 0.0, torch.tensor(2.0), 3)
    phase(now, Samples(*(torch.ones(2) for _ in range(4))))
    ((copied, samples),) = seen
    assert isinstance(copied, Schedule)
    assert isinstance(samples, Samples)
    assert (copied.density_noise_std, copied.blur_radius) == (0.0, 3)
    assert copied.patch is not now.patch
