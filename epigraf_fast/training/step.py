"""One training iteration: the phases G, D and D regularization, and the average of the generator (method.md 10)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..camera import Patch, extract_patches
from ..config import Config
from ..data import ImageDataset
from ..errors import UserError
from ..models.layers import scaled_once
from ..models.mapping import mix_styles
from ..models.region import Plan, boxes_of
from .distributed import World
from .ema import average_of, update_average
from .gradients import LossScale, clean_, flatten, step_unless
from .graphs import GraphedPhase, GraphMemory
from .losses import blur, blur_radius, discriminator_loss, generator_loss, path_lengths, r1_penalty
from .networks import build_augment, build_discriminator, build_generator, choose_backends
from .patches import importance_map, patch_progress, sample_patches, with_context
from .precision import mode_of
from .profile import annotate
from .regions import arrange, is_on, plans_of
from .sampling import prior_angles
from .schedule import blur_sigma, density_noise_std, ema_decay, lr_factor, pose_swap_probability

PATH_LENGTH_DECAY = 0.99
SKIPPED = "skipped/G_share"  # the statistic: of the steps of G, those that overflowed
IMPORTANCE_IMAGES = 256  # that the importance of patches is averaged over


class Samples(NamedTuple):
    """A batch of what the generator is asked for, or of real images."""

    content: Tensor  # z [B, z_dim], or images [B, 3, R, R] in [-1, 1]
    label: Tensor  # [B, L]
    angles: Tensor  # [B, 3]
    conditioning_angles: Tensor  # [B, 3], what the mapping sees

    def split(self, size: int) -> Iterator[Samples]:
        """Micro-batches."""
        return (Samples(*parts) for parts in zip(*(x.split(size) for x in self), strict=True))


class Fakes(NamedTuple):
    """`Samples` that the generator is asked for, with their patches, and what it computes for each micro-batch."""

    content: Tensor
    label: Tensor
    angles: Tensor
    conditioning_angles: Tensor
    patch: Patch  # its scale on the CPU for scale-specific discriminators
    plans: tuple[Plan | None, ...]  # None: whole planes

    def split(self, size: int) -> Iterator[Fakes]:
        """Micro-batches."""
        *batches, plans = self
        parts = zip(*(x.split(size) for x in batches), strict=True)
        return (Fakes(*part, (plan,)) for part, plan in zip(parts, plans, strict=True))


class Schedule(NamedTuple):
    """What changes during training, as the phases of an iteration see it.

    Tensors of one number, which a CUDA graph reads anew at each replay; from plain values a change makes another graph.
    """

    patch: Tensor  # see `patch_progress`
    density_noise_std: Tensor | float  # a number only where it is 0, and nothing is drawn
    blur_sigma: Tensor
    blur_radius: int


def swap_poses(angles: Tensor, probability: float) -> Tensor:
    """Each pose is picked with a probability; the picked ones are rolled by one among themselves. [N, 3] -> [N, 3]."""
    picked = torch.rand(len(angles), device=angles.device) < probability
    places = (~picked).to(torch.uint8).argsort(stable=True)  # those of the picked ones come first
    rank = picked.cumsum(0) - 1
    before = places[(rank - 1) % picked.sum().clamp(min=1)]
    return torch.where(picked[:, None], angles[before], angles)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Trainer:
    """Networks, optimizers and counters of a run, and the iteration that advances them.

    Args:
        config: Settings, checked.
        dataset: For labels and poses of the fake samples; real batches are handed to `iteration`.
        device: Where to train.
        world: The processes that train together, each on its share of the batch.
    """

    def __init__(self, config: Config, dataset: ImageDataset, device: torch.device, world: World | None = None) -> None:
        self.config, self.device = config, device
        self.world = World() if world is None else world
        self.share = config.batch // self.world.size
        self.micro = min(config.micro, self.share)
        self.backends = choose_backends(config, device.type)
        self.labels, self.angles = dataset.labels.to(device), dataset.angles.cpu()
        self.label_values = dataset.label_values  # for those who draw labels from the trained generator
        # Half precision that was asked for is taken on a CPU too; D's half blocks alone are for a GPU.
        half_on = ("cuda", device.type) if mode_of(config).half is not None else ("cuda",)
        self.generator = build_generator(config, dataset.label_dim, device.type, half_on=half_on)
        if config.camera.prior == "custom":
            self.generator.mean_camera_pose.copy_(dataset.mean_camera_pose)
        self.discriminator = build_discriminator(config, dataset.label_dim, device.type, half_on=half_on)
        self.generator.to(device)
        self.discriminator.to(device)
        # Its convolutions want channels last of the kernels, too, or copy them in every call.
        self.discriminator.to(memory_format=torch.channels_last)
        self.average = average_of(self.generator)

        optim = config.optim
        g_lazy = optim.path_length_interval / (optim.path_length_interval + 1) if optim.path_length_weight else 1.0
        d_lazy = optim.r1_interval / (optim.r1_interval + 1) if optim.r1_gamma else 1.0
        self.g_optimizer = self._adam(self.generator, optim.g_lr, g_lazy)
        self.d_optimizer = self._adam(self.discriminator, optim.d_lr, d_lazy)
        self.rates = (self.g_optimizer, optim.g_lr * g_lazy), (self.d_optimizer, optim.d_lr * d_lazy)
        self.cur_nimg = 0
        self.iterations = 0
        self.augment = build_augment(config, device.type)
        if self.augment is not None:
            self.augment.to(device)
        self.augment_p = torch.tensor(config.augment.p, device=device)
        self.real_signs = torch.zeros(2, device=device)  # since the last adjustment of p: their sum, how many
        self.path_length = torch.zeros([], device=device)  # its running mean
        self.importance = self.placed_importance = None
        if config.patch.importance:
            index = torch.linspace(0, len(dataset) - 1, min(len(dataset), IMPORTANCE_IMAGES)).long().tolist()
            self.importance = importance_map(torch.stack([dataset[i][0] for i in index]).float())
            self.placed_importance = self.importance.to(device)
        self.fakes: Tensor | None = None  # what D sees of G's last step, where it learns from that
        if config.optim.reuse_fakes:
            context = config.discriminator.global_context
            size = config.resolution if context == "paste" else config.patch.resolution
            self.fakes = torch.zeros(self.share, 6 if context == "concat" else 3, size, size, device=device)
        self.begun = 0  # the first of the micro-batch that is computed
        self.now = self._schedule()  # of the phase that runs
        self.recorded: dict[str, tuple[Tensor, int]] = {}  # of the phase that runs: name -> sum, how many
        self.graphs = GraphMemory(device) if config.cuda_graphs else None
        self.graphed: dict[str, GraphedPhase] = {}
        self.uploads = torch.cuda.Stream(device) if device.type == "cuda" else None
        half = mode_of(config).half == torch.float16
        self.loss_scale = LossScale(config.optim.loss_scale, device) if half else None  # of G's; D's are not scaled
        self.scale: Tensor | None = None  # of the phase that runs
        self.sums: dict[str, Tensor] = {}  # of every statistic since `reset_statistics`, and how many went in
        self.counts: dict[str, int] = {}

    def _adam(self, module: nn.Module, lr: float, lazy: float) -> torch.optim.Adam:
        betas = (self.config.optim.beta1**lazy, self.config.optim.beta2**lazy)
        return torch.optim.Adam(module.parameters(), lr=lr * lazy, betas=betas, eps=1e-8, fused=True)

    def where(self) -> str:
        """The step that the run is at, for people."""
        return f"step {self.iterations}, at {self.cur_nimg} images"

    @annotate("iteration")
    def iteration(self, images: Tensor, labels: Tensor, angles: Tensor) -> None:
        """Trains on one batch, or on this process's share of it.

        Args:
            images: uint8 [share, 3, R, R].
            labels: [share, L].
            angles: [share, 3].
        """
        config = self.config
        regularize_g = config.optim.path_length_weight and self.iterations % config.optim.path_length_interval == 0
        # The phases' fakes are drawn together, so that poses are swapped over all of them.
        patched = 2 if self.fakes is None else 1  # batches of them that are rendered
        every = [*self._draw_fakes((patched + bool(regularize_g)) * self.share).split(self.share)]
        g_fakes, *d_fakes = (self._with_patches(fakes) for fakes in every[:patched])
        path_fakes, d_fakes = every[patched:], d_fakes or [g_fakes]
        images, labels, angles = self._upload(images, labels, angles)
        reals = Samples(images.float() / 127.5 - 1, labels, angles, angles)
        now = self._schedule()
        for optimizer, lr in self.rates:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(config.optim, self.cur_nimg, config.kimg)

        self.discriminator.requires_grad_(False)
        self._phase("G", self.g_optimizer, self._generator_phase, now, g_fakes)
        if regularize_g:
            (fakes,) = path_fakes
            fakes = fakes._replace(angles=self._place(fakes.angles))
            self._phase("path length", self.g_optimizer, self._path_length_phase, now, fakes)
            self.world.average([self.path_length])
        self.discriminator.requires_grad_(True)
        self._phase("D", self.d_optimizer, self._discriminator_phase, now, *d_fakes, reals)
        if config.optim.r1_gamma and self.iterations % config.optim.r1_interval == 0:
            self._phase("R1", self.d_optimizer, self._regularization_phase, now, reals)

        if config.augment.mode == "ada" and (self.iterations + 1) % config.augment.interval == 0:
            self._adjust_augmentation()
        self.world.average([self.generator.mapping.w_avg])
        with annotate("average"):
            update_average(self.average, self.generator, ema_decay(config.optim, self.cur_nimg, config.batch))
        self.cur_nimg += config.batch
        self.iterations += 1

    def _upload(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors on the device; those in pinned memory are copied beside the computation that goes on there."""
        if self.uploads is None:
            return [x.to(self.device) for x in tensors]
        with torch.cuda.stream(self.uploads):
            uploaded = [x.to(self.device, non_blocking=True) for x in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.uploads)
        for x in uploaded:
            x.record_stream(current)  # its memory is that of the other stream
        return uploaded

    def _place(self, x: Tensor) -> Tensor:
        """A small tensor of the host's on the device, which is not waited for."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _schedule(self) -> Schedule:
        config = self.config

        def number(value: float) -> Tensor:  # written by a fill: a copy from the host would make a GPU wait
            return torch.full([], value, device=self.device)

        noise, sigma = density_noise_std(config.renderer, self.cur_nimg), blur_sigma(config.optim, self.cur_nimg)
        return Schedule(
            number(patch_progress(config.patches, config.resolution, self.cur_nimg, config.batch)),
            number(noise) if noise else 0.0,
            number(sigma),
            blur_radius(sigma),
        )

    def _phase(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        micro_phase: Callable[..., None],
        now: Schedule,
        *samples: Samples | Fakes,
    ) -> None:
        """A phase: the gradients are averaged over the processes, cleaned, and stepped on."""
        with annotate(name):
            compute = functools.partial(self._gradients, optimizer, micro_phase)
            if self.graphs is not None:
                compute = self.graphed.setdefault(name, GraphedPhase(compute, self.graphs))
            gradients, recorded = compute(now, *samples)
            for what, (total, count) in recorded.items():
                self.sums[what] = self.sums[what] + total if what in self.sums else total.clone()
                self.counts[what] = self.counts.get(what, 0) + count
            parameters = _parameters(optimizer)
            somewhere = [grad is not None for grad in gradients]
            if self.graphs is not None:
                # A parameter that none of the processes has a gradient of is left alone, as by one process.
                somewhere = self.world.agree(*somewhere)
            learning = [p for p, has_grad in zip(parameters, somewhere, strict=True) if has_grad]
            gradients = [
                torch.zeros_like(p) if grad is None else grad
                for p, grad, has_grad in zip(parameters, gradients, somewhere, strict=True)
                if has_grad
            ]
            overflow = None
            if learning:
                flat, gradients = flatten(gradients, learning)
                if self.graphs is not None:
                    self.world.average([flat])
                if self.scale_of(optimizer) is not None:
                    overflow = self.loss_scale.unscale_(flat)
                clean_(flat)
                for p, grad in zip(learning, gradients, strict=True):
                    p.grad = grad
            if overflow is None:
                optimizer.step()
            else:
                self._step_or_skip(optimizer, overflow)

    def scale_of(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """What the losses of an optimizer's phases, and so `_gradients`, are multiplied by, if they are."""
        scaled = self.loss_scale is not None and optimizer is self.g_optimizer
        return self.loss_scale.value if scaled else None

    def _step_or_skip(self, optimizer: torch.optim.Optimizer, overflow: Tensor) -> None:
        """A step of G, unless a gradient overflowed in any process."""
        if self.world.size > 1:  # the means are the same everywhere; that all do the same must not hang on it
            self.world.average([overflow])
            overflow = overflow.ceil()
        self.loss_scale.update(overflow)
        self.sums[SKIPPED] = self.sums[SKIPPED] + overflow if SKIPPED in self.sums else overflow.clone()
        self.counts[SKIPPED] = self.counts.get(SKIPPED, 0) + 1
        step_unless(optimizer, overflow)

    def _networks(self, micro_phase: Callable[..., None]) -> list[nn.Module]:
        """Those that a phase calls."""
        generating, judging = micro_phase != self._regularization_phase, micro_phase != self._path_length_phase
        return [self.generator] * generating + [self.discriminator] * judging

    def _gradients(
        self,
        optimizer: torch.optim.Optimizer,
        micro_phase: Callable[..., None],
        now: Schedule,
        *samples: Samples | Fakes,
    ) -> tuple[list[Tensor | None], dict[str, tuple[Tensor, int]]]:
        """The gradients of a phase, each a sum over micro-batches, and what those recorded.

        Without graphs, which cannot hold it, the mean over the processes is taken here, during the last backward pass.
        Reads its arguments, and what keeps its memory from one iteration to the next; see `GraphedPhase`.
        """
        self.now, self.recorded, self.scale = now, {}, self.scale_of(optimizer)
        optimizer.zero_grad(set_to_none=True)
        parameters = _parameters(optimizer)
        *first, last = zip(*(x.split(self.micro) for x in samples), strict=True)
        with scaled_once(*self._networks(micro_phase)) as scaled:
            for i, micro in enumerate(first):
                self.begun = i * self.micro
                micro_phase(*micro)
            leaves = [*{id(leaf): leaf for leaf in (scaled.get(id(p), p) for p in parameters)}.values()]
            self.begun = len(first) * self.micro
            with self.world.averaged_gradients(leaves) if self.graphs is None else contextlib.nullcontext():
                micro_phase(*last)
        return [p.grad for p in parameters], self.recorded

    def _generator_phase(self, fakes: Fakes) -> None:
        patches, patch = self._generate(fakes, update_w_avg=self.fakes is not None)
        if self.fakes is not None:
            self.fakes[self.begun : self.begun + len(patches)] = patches.detach()
        logits = self._judge(patches, patch, fakes.label, fakes.angles)
        loss = generator_loss(logits)
        self._backward(loss)
        self._record("loss/G", loss)

    def _path_length_phase(self, fakes: Samples) -> None:
        """weight mean (length - running mean)^2 on half a micro-batch, with gradient through the new mean, too."""
        config = self.config
        half = Samples(*(x[: max(1, len(x) // 2)] for x in fakes))
        z, pose = half.content, half.conditioning_angles
        ws = self.generator.ws(z, half.label, pose)
        if config.generator.style_mixing:
            others = self.generator.ws(torch.randn_like(z), half.label, pose)
            ws = mix_styles(ws, others, config.generator.style_mixing)
        lengths = path_lengths(self.generator.synthesis(ws), ws)
        mean = lengths.mean().lerp(self.path_length, PATH_LENGTH_DECAY)
        self.path_length.copy_(mean.detach())
        penalty = (lengths - mean).square()
        self._backward(penalty.mean() * (config.optim.path_length_weight * config.optim.path_length_interval))
        self._record("loss/path_length", penalty)

    def _discriminator_phase(self, fakes: Fakes, real: Samples) -> None:
        if self.fakes is None:
            with torch.no_grad():
                patches, patch = self._generate(fakes, update_w_avg=True)
        else:
            patches, patch = self.fakes[self.begun :][: self.micro], fakes.patch
        # In one call, whose launches and whose work on the weights are needed once.
        real_patches, real_patch = self._cut(real)
        logits = self._judge(
            torch.cat([patches, real_patches]),
            Patch(*map(torch.cat, zip(patch, real_patch, strict=True))),
            torch.cat([fakes.label, real.label]),
            torch.cat([fakes.angles, real.angles]),
            parts=2,
        )
        fake_logits, real_logits = logits.chunk(2)
        loss = discriminator_loss(fake_logits, real_logits)
        self._backward(loss)
        self._record("loss/D", loss)
        self._record("logits/fake", fake_logits)
        self._record("logits/real", real_logits)
        self._record("logits/real_sign", real_logits.sign())
        self._observe(real_logits)

    def _regularization_phase(self, real: Samples) -> None:
        patches, patch = self._cut(real)
        patches.requires_grad_(True)
        logits = self._judge(patches, patch, real.label, real.angles)
        penalty = r1_penalty(logits, patches)
        optim = self.config.optim
        self._backward(penalty.mean() * (optim.r1_gamma / 2 * optim.r1_interval))
        self._record("loss/R1", penalty)
        self._observe(logits)

    def _observe(self, real_logits: Tensor) -> None:
        """Keeps what the augmentation's strength follows."""
        if self.augment is not None:
            total, count = self.real_signs
            total += real_logits.detach().sign().sum()
            count += len(real_logits)
            self._record("augment/p", self.augment_p)

    def _adjust_augmentation(self) -> None:
        """p <- max(p + sign(mean sign(D(real)) - target) images / kimg, 0), on the device."""
        augment = self.config.augment
        self.world.average([self.real_signs])
        total, count = self.real_signs
        step = self.config.batch * augment.interval / (augment.kimg * 1000)
        self.augment_p.add_((total / count - augment.target).sign() * step).clamp_(min=0)
        self.real_signs.zero_()

    def _backward(self, loss: Tensor) -> None:
        loss = loss if self.micro == self.share else loss * (self.micro / self.share)
        (loss if self.scale is None else loss * self.scale).backward()

    def _generate(self, fakes: Fakes, update_w_avg: bool = False) -> tuple[Tensor, Patch]:
        """Fake patches as D sees them, and where they lie."""
        patch, (plan,) = fakes.patch, fakes.plans
        placed = self._placed(patch)
        context = self.config.discriminator.global_context
        if plan is not None:
            self._record("planes/share", torch.full([], plan.share, device=self.device))
        patches = self.generator(
            fakes.content,
            fakes.angles,
            fakes.label,
            resolution=self.config.patch.resolution,
            patch=placed,
            conditioning_angles=fakes.conditioning_angles,
            density_noise_std=self.now.density_noise_std,
            update_w_avg=update_w_avg,
            style_mixing=self.config.generator.style_mixing,
            with_context=context != "none",
            region=False if plan is None else plan,
        ).rgb
        if context != "none":
            patches = with_context(patches, placed, self.config)
        return patches, patch

    def _cut(self, real: Samples) -> tuple[Tensor, Patch]:
        """Real patches as D sees them, and where they lie."""
        patch = self._sample_patches(len(real.content))
        placed, resolution = self._placed(patch), self.config.patch.resolution
        patches = extract_patches(real.content, placed, resolution)
        if self.config.discriminator.global_context != "none":
            whole = extract_patches(real.content, Patch.whole(placed.scale), resolution)
            patches = with_context(torch.cat([patches, whole], dim=1), placed, self.config)
        return patches, patch

    def _placed(self, patch: Patch) -> Patch:
        """Where offsets are always: on the device."""
        return patch._replace(scale=patch.scale.to(self.device, non_blocking=True))

    def _judge(self, patches: Tensor, patch: Patch, label: Tensor, angles: Tensor, parts: int = 1) -> Tensor:
        patches = blur(patches, self.now.blur_sigma, self.now.blur_radius)
        if self.augment is not None:
            patches = self.augment(patches, self.augment_p)
        return self.discriminator(patches, patch, label, angles, parts=parts)

    @torch.no_grad()
    def rehearse(self) -> None:
        """Computes a micro-batch's fakes, and what D says of as many fakes and reals: for those that look at how.

        Of what a run goes on with, it changes the states of random generators alone.
        """
        self.now, self.recorded, self.begun = self._schedule(), {}, 0
        fakes = self._with_patches(self._draw_fakes(self.micro))
        patches, patch = self._generate(fakes)
        twice = (torch.cat([x, x]) for x in (patches, *patch, fakes.label, fakes.angles))
        patches, scale, offset, label, angles = twice
        self._judge(patches, Patch(scale, offset), label, angles, parts=2)

    def _draw_fakes(self, num: int) -> Samples:
        """On the device but for `angles`, which the host has to know: see `_with_patches`."""
        camera = self.config.camera
        z = torch.randn(num, self.config.generator.z_dim, device=self.device)
        entry = torch.randint(len(self.angles), (num,))
        angles = self.angles[entry] if camera.prior == "custom" else prior_angles(camera, num)
        conditioning = self._place(angles)
        if self.config.generator.pose_conditioning:
            conditioning = swap_poses(conditioning, pose_swap_probability(self.config.generator, self.cur_nimg))
        return Samples(z, self.labels[self._place(entry)], angles, conditioning)

    def _with_patches(self, fakes: Samples) -> Fakes:
        """Draws the patches of a phase's fakes, one for every minibatch-std group, and says what they look at.

        On the host, so that sizes are known without waiting for a GPU. Whether planes are computed in part or not, the
        fakes are sorted by what they look at: the draws, and the losses, are the same.
        """
        config, num = self.config, len(fakes.content)
        group = min(config.discriminator.minibatch_std_group, self.micro)
        patch = Patch(*(x.repeat_interleave(group, dim=0) for x in self._draw_patches(num // group)))
        boxes, resolution = None, config.generator.plane_resolution
        if config.generator.backbone == "triplane":
            boxes = boxes_of(config.camera, resolution, fakes.angles, patch)
        order = arrange(boxes, num, group, self.micro, config.patch.groups)
        plans: tuple[Plan | None, ...] = (None,) * (num // self.micro)
        if is_on(config):
            one_size = self.graphs is not None
            plans = plans_of(boxes[order], resolution, self.micro, self.device, one_size=one_size)
        placed, (scale, offset) = self._place(order), (x[order] for x in patch)
        return Fakes(
            fakes.content[placed],
            fakes.label[placed],
            self._place(fakes.angles[order]),
            fakes.conditioning_angles[placed],
            Patch(scale if config.discriminator.scales > 1 else self._place(scale), self._place(offset)),
            plans,
        )

    def _draw_patches(self, num: int) -> Patch:
        """Independent patches, on the CPU."""
        config = self.config
        progress = patch_progress(config.patches, config.resolution, self.cur_nimg, config.batch)
        return sample_patches(config.patches, config.resolution, progress, num, 1, importance=self.importance)

    def _sample_patches(self, num: int) -> Patch:
        """Patches of the real images of a micro-batch."""
        config, scale_draw, progress = self.config, None, self.now.patch
        group = config.discriminator.minibatch_std_group
        if config.discriminator.scales > 1:  # on the CPU, where the scales say who judges what
            scale_draw = torch.rand(num // min(group, num))
            progress = patch_progress(config.patches, config.resolution, self.cur_nimg, config.batch)
        return sample_patches(
            config.patches,
            config.resolution,
            progress,
            num,
            group,
            device=self.device,
            scale_draw=scale_draw,
            importance=self.placed_importance,
        )

    def _record(self, name: str, values: Tensor) -> None:
        values = values.detach().float()
        added, count = values if values.ndim == 0 else values.sum(), values.numel()
        if name in self.recorded:
            total, before = self.recorded[name]
            added, count = total + added, before + count
        self.recorded[name] = added, count

    def statistics(self) -> dict[str, float]:
        """Means since `reset_statistics`, over all processes, which all have to ask; waits for the device.

        With a scaled loss also the scale, the share of G's steps since then that overflowed, and how many did in all.
        """
        totals = dict(self.sums)
        if self.world.size > 1:
            totals = {name: total.clone() for name, total in totals.items()}
            with self.world.watch.waiting():
                self.world.average(list(totals.values()))
        means = {name: total.item() / self.counts[name] for name, total in totals.items()}
        if self.loss_scale is not None:
            means |= {"skipped/G_steps": self.loss_scale.skipped.item(), "loss_scale/G": self.loss_scale.value.item()}
        return means

    def share_statistics(self) -> None:
        """Makes what every process counts on its own the mean over all, so that one can save it for all."""
        self.world.average([self.real_signs, *self.sums.values()])

    def reset_statistics(self) -> None:
        self.sums, self.counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all that an exact continuation needs, but the random states.

        Of several processes one saves it, once all have called `share_statistics`.
        """
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "cur_nimg": self.cur_nimg,
            "iterations": self.iterations,
            "augment_p": self.augment_p,
            "real_signs": self.real_signs,
            "path_length": self.path_length,
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state,
            "sums": self.sums,
            "counts": self.counts,
            "label_values": self.label_values,
            "backends": dict(self.backends),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; learning rates and betas stay those of the settings.

        Raises:
            UserError: The networks have other shapes.
        """
        try:
            for name in ("generator", "discriminator", "average"):
                getattr(self, name).load_state_dict(state[name])
        except RuntimeError:  # the settings agree, so it is the number of classes
            raise UserError(
                f"the checkpoint's {name} does not fit, the data set has other labels: give the set it was trained on"
            ) from None
        for optimizer, name in ((self.g_optimizer, "g_optimizer"), (self.d_optimizer, "d_optimizer")):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state[name]["state"]})
            for parameter, moments in optimizer.state.items():
                # In the parameter's layout, which may be another than where they were saved: a fused Adam reads memory
                # as it lies, and that of a GPU refuses what differs.
                for moment in ("exp_avg", "exp_avg_sq"):
                    moments[moment] = torch.empty_like(parameter).copy_(moments[moment])
        self.cur_nimg, self.iterations = state["cur_nimg"], state["iterations"]
        if self.config.augment.mode != "fixed":
            self.augment_p.copy_(state["augment_p"])
        if self.loss_scale is not None and state.get("loss_scale") is not None:
            self.loss_scale.state.copy_(state["loss_scale"])
            self.loss_scale.value.clamp_(max=self.loss_scale.first)
        for name in ("real_signs", "path_length"):  # which the first release did not keep
            getattr(self, name).copy_(state.get(name, getattr(self, name)))
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
