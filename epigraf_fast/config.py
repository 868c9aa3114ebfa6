"""Settings: frozen dataclasses, the presets, and every check that can be made before the first heavy call."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .camera import frustum_extent
from .errors import UserError

MICRO_BATCH = 8  # images, the most that `auto` takes where it does not know the memory
PRESETS = ("demo", "ffhq", "cats", "plants", "food")


@dataclass(frozen=True)
class CameraConfig:
    """Where cameras are and what they see. A data set that stores its own camera replaces all but the prior."""

    prior: Literal["custom", "uniform", "normal", "truncated_gaussian", "spherical_uniform"] = "custom"
    """Fake cameras: `custom` takes the poses of the data set, the others have a formula."""
    yaw_mean: float = 0.0
    """Radians."""
    yaw_spread: float = math.pi
    """Of the formulas, radians: half the range of uniform ones, else the standard deviation."""
    pitch_mean: float = math.pi / 2
    """Radians from straight above."""
    pitch_spread: float = math.pi / 2
    """As for the yaw."""
    fov: float = 12.0
    """Field of view, degrees."""
    radius: float = 1.0
    """Distance of cameras from the origin, world units, as all lengths here."""
    ray_start: float = 0.88
    """Distance from the camera at which rays begin."""
    ray_end: float = 1.12
    """Distance at which they end."""
    cube_scale: float = 0.2
    """Half size of the cube that the planes span; the view frustum must stay inside."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Mapping, synthesis network and decoder."""

    z_dim: int = 512
    """Numbers of the latent code z."""
    w_dim: int = 512
    """Numbers of a style vector w."""
    mapping_layers: int = 2
    """Fully connected layers from z to w."""
    plane_resolution: int = 512
    """Pixels along each side of a plane."""
    plane_channels: int = 32
    """Features of one plane."""
    channel_base: int = 32768
    """Channels at a resolution: min(channel_base / resolution, channel_max)."""
    channel_max: int = 512
    """See channel_base."""
    decoder_hidden: int = 64
    """Width of the decoder's hidden layer."""
    pose_conditioning: bool = False
    """Whether the mapping sees the camera (against 3D biases of a data set)."""
    pose_swap_probability: float = 0.5
    """Final probability of showing the mapping another sample's camera (1 at the start)."""
    pose_swap_kimg: float = 1000.0
    """Thousands of images in which that probability falls to its final one, linearly."""
    pose_dropout: float = 0.0
    """Dropout, in training, of the two numbers that the mapping sees of the camera."""
    clamp: float = 256.0
    """The synthesis network's activations and planes are clamped to this, in fp32 too; 0 for never."""
    noise: bool = True
    """Whether the synthesis network adds noise images; without them their strengths stay as they are."""
    backbone: Literal["triplane", "image"] = "triplane"
    """image: the synthesis network paints the image itself, the 2D baseline of Table 3; patches are cut from it."""
    region: Literal["auto", "off"] = "auto"
    """auto: the synthesis network computes the planes only where the rays of a patch look, for the same images and
    gradients (docs/region.md); but whole planes below 128x128, and where something needs them: a plane background,
    discriminator.global_context, backbone image. off: always whole planes."""
    style_mixing: float = 0.0
    """Probability that the style vectors from a random one on come from a second z; 0.9 in StyleGAN2."""
    decoder_fourier: int = 0
    """Steps of the Fourier features of a point that the decoder sees beside the planes' features; 0 for none."""
    view_direction: bool = False
    """Whether colours depend on the ray's direction (appendix C: it breaks multi-view consistency)."""


@dataclass(frozen=True)
class RendererConfig:
    """Samples along a ray, and how raw density becomes opacity."""

    coarse_samples: int = 48
    """Samples along a ray, evenly spaced; each is decoded."""
    fine_samples: int = 48
    """Samples more, drawn where the coarse ones have found something."""
    stochastic: bool = True
    """Training moves the coarse samples at random and draws the fine ones. Off: evenly spaced, as pictures are made.
    With few samples a ray the draws are noise, which pictures do not have."""
    density_activation: Literal["softplus", "relu"] = "softplus"
    """How a raw density becomes one that is not negative."""
    softplus_beta: float = 1.0
    """Inverse temperature of the softplus: larger is closer to relu."""
    density_shift: float = 0.0
    """Added to the raw density before the activation."""
    density_noise: float = 1.0
    """Standard deviation of the noise on raw densities at the start of training; falls linearly to 0."""
    density_noise_kimg: float = 5000.0
    """Thousands of images in which that noise falls to 0, linearly."""
    last_interval: float = 1e10
    """Length given to the last sample: 1e10 makes what is behind it opaque, 1e-3 leaves it to the background."""
    white_background: bool = False
    """What rays do not gather is white, not grey."""
    last_back: bool = False
    """Gives the last sample all remaining weight."""
    background: Literal["none", "sphere", "plane"] = "none"
    """Behind the planes: nothing, the inverted sphere of NeRF++, or three more channels of the synthesis network. With
    one, the last interval is at most 1e-3 and `white_background` holds behind the background alone."""
    white_foreground: bool = False
    """With a background and `white_background`: adds white to what the planes let through, too, beside the background
    that shows there. Published code does; `convert` sets it."""
    background_samples: int = 16
    """Of the sphere, along a ray; 8 in the published code."""
    background_start: float = 1.0
    """Inverse radius of the sphere's first sample, in radii of the sphere, which is the cameras'."""

    @property
    def density(self) -> dict[str, Any]:
        """How raw density becomes opacity, as `ops.sample_importance` and `ops.composite` take it."""
        return {
            "activation": self.density_activation,
            "softplus_beta": self.softplus_beta,
            "density_shift": self.density_shift,
            "last_interval": self.last_interval,
        }


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The patch discriminator."""

    channel_base: int = 16384
    """Channels at a resolution: min(channel_base / resolution, channel_max)."""
    channel_max: int = 512
    """See channel_base."""
    modulate: Literal["input", "output", "none"] = "input"
    """What of each block's conv1 the hypernetwork scales: input channels (published code), output channels (paper,
    Eq. 2), or nothing, without any patch embedding (the "standard" ablation)."""
    code_dim: int = 512
    """Width of the hypernetwork."""
    patch_position: bool = True
    """Whether D knows a patch's place beside its scale (without it: an ablation of Table 2)."""
    patch_steps: int = 1000
    """Steps that patch scales and offsets are resolved into."""
    patch_table_dim: int = 256
    """Width of the learned table of those steps; 0 for none."""
    patch_cosines: bool = True
    """Whether the patch embedding has cosines beside its sines."""
    patch_skip_lowest: int = 0
    """Lowest frequencies that the patch embedding leaves out."""
    patch_skip_highest: int = 0
    """Highest frequencies that it leaves out."""
    camera_conditioning: bool = False
    """Whether D sees the camera, too."""
    camera_steps: int = 64
    """Steps that yaw and pitch are resolved into."""
    camera_dropout: float = 0.5
    """Dropout, in training, of what D sees of the camera."""
    minibatch_std_group: int = 4
    """Images that share a standard deviation, and a draw of patches."""
    clamp: float = 256.0
    """Activations of the convolutions are clamped to this, in fp32 too; 0 for never."""
    half_blocks: int | None = None
    """Top blocks in half precision on a GPU, 4 in the published runs. Default: 4 with precision fp16 and bf16, and with
    auto on a GPU; else 0."""
    scales: int = 1
    """2 or 4 train that many discriminators without modulation, one for each scale of the discrete distribution, which
    then holds whatever `patch.distribution` says (Table 2: "scale-specific")."""
    global_context: Literal["none", "concat", "paste"] = "none"
    """Shows D the whole image, too (appendix C), at the patch's resolution: as three more channels, or upsampled to the
    image's resolution with the patch pasted into it."""


@dataclass(frozen=True)
class PatchConfig:
    """Patches and their annealed scales."""

    resolution: int = 64
    """Pixels along each side of a patch."""
    distribution: Literal["beta", "uniform", "discrete", "graf", "gnerf"] = "beta"
    """Of patch scales: beta and uniform are annealed from whole images to all scales, discrete has a few, graf and
    gnerf are those schedules."""
    beta_start: float = 0.001
    """Beta(1, beta): from the whole image ..."""
    beta_end: float = 0.8
    """... to almost uniform."""
    anneal_kimg: float = 10_000.0
    """Thousands of images in which the distribution goes from its start to its end, linearly."""
    num_scales: int = 2
    """Of the discrete distribution: evenly spaced from 0.25 to 1."""
    groups: Literal["strided", "consecutive"] = "strided"
    """Which samples share a draw: those of a minibatch-std group, or neighbours (published code)."""
    importance: int = 0
    """Offsets are drawn from so many candidates, in proportion to how much the data set's images vary there
    (appendix C); 0 draws them evenly."""


@dataclass(frozen=True)
class DataConfig:
    """How the data set is read."""

    labels: bool = False
    """Train class-conditionally on the set's labels."""
    mirror: bool = True
    """Doubles the set: every image flipped left-right with its yaw negated."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes, which read and decode; 0 loads in the training process. auto: by the cores there are."""


@dataclass(frozen=True)
class OptimConfig:
    """Losses, regularization and averages."""

    g_lr: float = 0.0025
    """Learning rate of G (Adam)."""
    d_lr: float = 0.002
    """Learning rate of D."""
    lr_decay_kimg: float | None = None
    """Thousands of images after which both learning rates fall, as 1 / sqrt(images); default: they never do."""
    lr_rampdown: float = 0.0
    """Share of the run, at its end, in which both learning rates fall to 0, linearly."""
    beta1: float = 0.0
    """Adam's decay of the mean of gradients."""
    beta2: float = 0.99
    """Adam's decay of the mean of their squares."""
    r1_gamma: float = 0.05
    """Weight of R1, the penalty of D's gradient at real patches; larger where D learns real images by heart."""
    r1_interval: int = 16
    """Iterations between two R1 steps."""
    blur_sigma: float = 10.0
    """Standard deviation of the blur of D's input at the start, pixels (a Gaussian 2^-(i/sigma)^2)."""
    blur_kimg: float = 200.0
    """Thousands of images in which that blur falls to none, linearly."""
    ema_kimg: float | None = None
    """Half life of the average generator; default 0.3125 x batch."""
    ema_rampup: float = 0.05
    """The half life is at most this share of the images seen."""
    loss_scale: float = 16384.0
    """With precision fp16: G's loss is multiplied by this power of two, its gradient divided by it. A step whose
    gradient overflows is left out, and counted, and halves the scale, which 2000 good steps double again up to this."""
    path_length_weight: float = 0.0
    """Of StyleGAN2's path length regularization, for `generator.backbone image`; 2 in StyleGAN2."""
    path_length_interval: int = 4
    """Iterations between two path length steps."""
    reuse_fakes: bool = False
    """D learns from the fakes of G's step, of G before it, not from new ones: a quarter of G's work is saved."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the discriminator's input (docs/method.md 12)."""

    mode: Literal["none", "ada", "fixed"] = "none"
    """ada: the strength follows how sure D is of real patches; fixed: it stays at `p`."""
    p: float = 0.0
    """Strength, the probability of every operation: in the end (fixed), or at the start (ada)."""
    target: float = 0.6
    """ada: mean sign of D's logits of real patches that the strength aims at."""
    kimg: float = 500.0
    """ada: thousands of images in which the strength could go from 0 to 1."""
    interval: int = 4
    """ada: iterations between two adjustments."""
    exact_margins: bool = False
    """Pads by what a batch needs, which waits for the device, rather than by the most; the image is the same."""
    x_flip: bool = False
    """Left to the data set's mirroring, as published."""
    rotate90: bool = True
    """Turns by quarters."""
    xint: bool = True
    """Translation by whole pixels."""
    scale: bool = True
    """Larger and smaller."""
    rotate: bool = True
    """Turns by any angle."""
    aniso: bool = True
    """Stretching along one direction."""
    xfrac: bool = True
    """Translation by fractions of a pixel, too."""
    brightness: bool = True
    """Adds to all colours."""
    contrast: bool = True
    """Multiplies all colours."""
    luma_flip: bool = True
    """Inverts the brightness, keeps the hue."""
    hue: bool = True
    """Turns the hue."""
    saturation: bool = True
    """More and less colour."""


@dataclass(frozen=True)
class Config:
    """A training run, whole."""

    data: str = "builtin"
    """A zip or folder of images with dataset.json, or `builtin`."""
    resolution: int = 64
    """Of the data set's images."""
    batch: int = 64
    """Images per iteration, over all micro-batches."""
    micro_batch: int | Literal["auto"] | None = None
    """Images in memory at once; default: the whole batch. auto: on a GPU as many as fit, else 8. Gradients do not
    depend on it."""
    kimg: float = 20_000.0
    """Length of training, thousands of real images."""
    run_dir: str = "runs/run"
    """The folder of everything that the run writes."""
    seed: int = 0
    """Of networks, draws and the order of the images."""
    precision: Literal["auto", "fp32", "tf32x3", "tf32", "fp16", "bf16"] = "fp32"
    """fp32: no TF32, and fp16 only in discriminator.half_blocks; tf32: the same with products in TF32; tf32x3: with
    convolutions as three such products, nearly as exact as fp32; fp16, bf16: also the top 4 resolutions of G in half
    precision. auto: what the device is fast and safe in, the line at the start says which. A CPU computes in fp32."""
    backend: Literal["auto", "gpu", "reference", "torch", "triton", "cuda", "cpu"] = "auto"
    """Of the ops: every op that has the named one takes it, the others their default for the device, and so do all with
    auto; gpu is triton and cuda together. The table at the start of a run says what it takes. On a GPU auto takes the
    kernels that this GPU has passed a check of, which the first start makes; a name takes them unchecked."""
    deterministic: bool = False
    """Whether gradients have the same bits in every run, at some cost: those of planes and decoder are summed in fixed
    point or in a fixed order, and torch takes its deterministic kernels (and warns where it has none)."""
    cuda_graphs: bool = False
    """Record each phase of an iteration as a CUDA graph, which one launch replays. A run on a GPU does so by itself
    where this GPU has passed a check of it, unless --no-tune."""
    device: str | None = None
    """cpu or cuda; default: a GPU if there is one."""
    log_kimg: float = 4.0
    """Between two lines of the log."""
    snapshot_kimg: float = 200.0
    """Between two sample grids."""
    checkpoint_kimg: float = 200.0
    """Between two checkpoints."""
    keep_checkpoints: int = 3
    """Of the newest ones; older ones are removed."""
    grid: tuple[int, int] = (8, 4)
    """Columns and rows of the sample grids."""
    metric_images: int = 0
    """Generated images that fd_efficientnet is measured on, before and after training; 0 measures nothing."""
    metric_kimg: float | None = None
    """Between two measurements during training, each at a checkpoint; the best one is kept as best.pt."""
    inception: str | None = None
    """A TorchScript file of Inception's features: FID is measured, too, and decides which checkpoint is the best."""
    turntable: int = 0
    """Objects of the turntable that a finished run leaves; 0 for none."""
    camera: CameraConfig = field(default_factory=CameraConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    renderer: RendererConfig = field(default_factory=RendererConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    loader: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def micro(self) -> int:
        """The micro-batch in force."""
        return micro_of(self, self.batch)

    @property
    def patches(self) -> PatchConfig:
        """The patch settings in force: scale-specific discriminators ask for their own scales."""
        if self.discriminator.scales == 1:
            return self.patch
        return replace(self.patch, distribution="discrete", num_scales=self.discriminator.scales)


def preset(name: str) -> Config:
    """The settings of a preset: the paper's, for the data set of that name; `demo` for the built-in data on a CPU."""
    if name == "demo":
        return _demo()
    if name not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    paper = Config(
        data=f"datasets/{name}.zip",
        resolution=256,
        micro_batch="auto",
        precision="auto",
        kimg=15_000,
        run_dir=f"runs/{name}",
        augment=AugmentConfig(mode="ada"),
    )
    if name == "ffhq":
        return replace(
            paper,
            resolution=512,
            kimg=20_000,
            generator=GeneratorConfig(pose_conditioning=True),
            discriminator=DiscriminatorConfig(camera_conditioning=True),
            optim=OptimConfig(r1_gamma=0.1),
        )
    if name == "cats":
        return replace(paper, discriminator=DiscriminatorConfig(camera_conditioning=True))
    return replace(
        paper,
        camera=CameraConfig(
            prior="spherical_uniform", fov=30.0, radius=1.0, ray_start=0.75, ray_end=1.25, cube_scale=0.475
        ),
        renderer=RendererConfig(white_background=True),
        loader=DataConfig(labels=True),
    )


def _demo() -> Config:
    """Small enough for minutes on two CPU cores. The built-in data stores its camera, in units that suit densities.

    What makes it learn in so few images: a finite last interval, so that empty space shows the white background instead
    of having to be painted; no density noise; many small iterations, in which D learns from the fakes of G's step; a
    discriminator that learns faster than G, and sees of a patch's scale and place the low frequencies (a table's rows
    would be seen too rarely), and nothing of the camera; samples of rays in the same places in training as in pictures;
    few latent numbers, each of which is seen often.
    What brings its colours back: rates that fall to nothing (docs/demo.md).
    """
    return Config(
        data="builtin",
        resolution=64,
        batch=8,
        precision="auto",
        kimg=35.0,
        run_dir="runs/demo",
        log_kimg=0.2,
        snapshot_kimg=2.0,
        checkpoint_kimg=1.0,
        metric_images=1000,
        turntable=8,
        camera=CameraConfig(
            prior="spherical_uniform", fov=30.0, radius=32.0, ray_start=24.0, ray_end=40.0, cube_scale=15.2
        ),
        generator=GeneratorConfig(
            z_dim=16,
            w_dim=128,
            plane_resolution=64,
            plane_channels=16,
            channel_base=1024,
            channel_max=128,
            decoder_hidden=32,
        ),
        renderer=RendererConfig(
            coarse_samples=12,
            fine_samples=12,
            stochastic=False,
            density_shift=-3.0,
            density_noise=0.0,
            last_interval=1e-3,
            white_background=True,
        ),
        discriminator=DiscriminatorConfig(
            channel_base=1024,
            channel_max=128,
            code_dim=128,
            patch_table_dim=0,
            patch_skip_highest=6,
        ),
        patch=PatchConfig(resolution=32, anneal_kimg=24.0),
        loader=DataConfig(workers=0),
        optim=OptimConfig(g_lr=0.003, d_lr=0.006, lr_rampdown=0.64, r1_gamma=0.01, blur_sigma=0.0, reuse_fakes=True),
    )


# Settings, what their numbers have to be, and the same in words; of `grid` the smaller one.
BOUNDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "resolution patch.resolution generator.plane_resolution",
        lambda x: x >= 8 and x & (x - 1) == 0,
        "a power of two of at least 8",
    ),
    ("discriminator.minibatch_std_group", lambda x: x >= 1, "at least 1"),
    (
        """
        keep_checkpoints patch.anneal_kimg patch.num_scales patch.beta_start patch.beta_end generator.z_dim
        generator.w_dim generator.mapping_layers generator.plane_channels generator.channel_base generator.channel_max
        generator.decoder_hidden generator.pose_swap_kimg discriminator.scales discriminator.channel_base
        discriminator.channel_max discriminator.code_dim discriminator.patch_steps discriminator.camera_steps
        renderer.softplus_beta renderer.background_start renderer.last_interval renderer.density_noise_kimg optim.g_lr
        optim.d_lr optim.lr_decay_kimg optim.r1_interval optim.path_length_interval optim.blur_kimg augment.kimg
        augment.interval camera.radius camera.ray_start camera.cube_scale grid
        """,
        lambda x: 0 < x < math.inf,
        "finite and positive",
    ),
    (
        """
        metric_images turntable loader.workers renderer.density_noise optim.r1_gamma optim.blur_sigma optim.ema_rampup
        optim.ema_kimg camera.yaw_spread camera.pitch_spread generator.decoder_fourier generator.clamp
        discriminator.clamp patch.importance optim.path_length_weight discriminator.half_blocks
        discriminator.patch_table_dim discriminator.patch_skip_lowest discriminator.patch_skip_highest
        """,
        lambda x: 0 <= x < math.inf,
        "finite and zero or more",
    ),
    (
        "kimg log_kimg snapshot_kimg checkpoint_kimg metric_kimg",
        lambda x: 0.001 <= x < math.inf,
        "finite and at least 0.001, which is one image",
    ),
    (
        """
        discriminator.camera_dropout generator.pose_swap_probability generator.pose_dropout generator.style_mixing
        optim.lr_rampdown augment.p
        """,
        lambda x: 0 <= x <= 1,
        "in [0, 1]",
    ),
    ("optim.beta1 optim.beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
    ("augment.target", lambda x: -1 <= x <= 1, "in [-1, 1], the mean of a sign"),
    ("metric_images generator.decoder_fourier", lambda x: x != 1, "0 or at least 2"),
    ("seed", lambda x: 0 <= x < 2**32, "in [0, 2^32)"),
)


def check(config: Config) -> None:
    """Raises UserError, one line naming the setting and the fix, unless the settings can train."""
    c = config
    values, unset = flat(c) | {"grid": min(c.grid)}, flat(Config())
    for name, value in values.items():
        if type(unset[name]) in (int, float) and not isinstance(value, int | float):
            raise UserError(f"{name} must be a number, got {value}")
    for names, fits, words in BOUNDS:
        for name in names.split():
            value = values[name]  # not a number only where the default is none
            if not (fits(value) if isinstance(value, int | float) else value == unset[name]):
                raise UserError(f"{name} must be {words}, got {value}")
    if c.patch.resolution > c.resolution:
        raise UserError(
            f"patch.resolution must be at most the resolution {c.resolution}, got {c.patch.resolution}: "
            f"set --patch.resolution {c.resolution}"
        )
    if c.batch < 1 or c.micro < 1:
        raise UserError(f"batch must be a positive multiple of micro_batch, got {c.batch} and {c.micro}")
    group = min(c.discriminator.minibatch_std_group, c.micro)
    if c.batch % c.micro or c.micro % group:
        advice = f"set --micro-batch {micro_batch_for(c.batch, c.micro, group)}"
        if c.batch % c.micro:
            raise UserError(f"batch must be a positive multiple of micro_batch, got {c.batch} and {c.micro}: {advice}")
        whole_groups = -(-c.batch // group) * group
        if c.micro_batch is None or (c.micro_batch != "auto" and c.micro_batch >= whole_groups):
            advice += f" or --batch {whole_groups}"
        raise UserError(
            f"micro_batch must be a multiple of discriminator.minibatch_std_group = {group}, got {c.micro}: {advice}"
        )
    for name, value in (("metric_kimg", c.metric_kimg), ("inception", c.inception)):
        if value is not None and not c.metric_images:
            raise UserError(f"{name} needs images to measure: set --metric-images 2048")
    if not 1 <= c.optim.loss_scale <= 2**24 or math.frexp(c.optim.loss_scale)[0] != 0.5:
        raise UserError(
            f"optim.loss_scale must be a power of two from 1 to 2^24, got {c.optim.loss_scale:g}: set 16384"
        )
    half_of_g = c.precision in ("fp16", "bf16")
    for name, half, clamp in (
        ("generator", half_of_g, c.generator.clamp),
        ("discriminator", half_of_g or c.discriminator.half_blocks, c.discriminator.clamp),
    ):
        if half and not clamp and c.precision != "bf16":
            raise UserError(f"{name}.clamp must be positive with fp16, whose largest number is 65504: set it to 256")
    if c.cuda_graphs:
        for name, value, off in (
            ("discriminator.scales", c.discriminator.scales > 1, "1"),
            ("augment.exact_margins", c.augment.exact_margins, "False"),
        ):
            if value:
                raise UserError(f"cuda_graphs must be off with {name} (which waits for the GPU), or {name} {off}")
    if c.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", c.device):
        raise UserError(f"device must be cpu or cuda, got {c.device!r}")
    if c.renderer.coarse_samples < 3 or c.renderer.fine_samples < 0:
        raise UserError(
            f"renderer.coarse_samples must be at least 3 and fine_samples at least 0, "
            f"got {c.renderer.coarse_samples} and {c.renderer.fine_samples}"
        )
    if c.renderer.background_samples < 2 or c.renderer.background_start > 1:
        raise UserError(
            f"renderer.background_samples must be at least 2 and background_start at most 1, "
            f"got {c.renderer.background_samples} and {c.renderer.background_start}"
        )
    if c.renderer.white_foreground and (c.renderer.background == "none" or not c.renderer.white_background):
        raise UserError("renderer.white_foreground belongs to a background and white_background: leave it out")
    levels = math.ceil(math.log2(c.discriminator.patch_steps))
    skipped = c.discriminator.patch_skip_lowest + c.discriminator.patch_skip_highest
    if skipped > levels or (skipped == levels and not c.discriminator.patch_table_dim):
        raise UserError(
            f"discriminator.patch_skip_lowest and patch_skip_highest must leave some of the {levels} frequencies, "
            f"got {c.discriminator.patch_skip_lowest} and {c.discriminator.patch_skip_highest}"
        )
    if c.generator.backbone == "image":
        for name, value in (
            ("renderer.background", c.renderer.background != "none"),
            ("generator.view_direction", c.generator.view_direction),
            ("generator.decoder_fourier", c.generator.decoder_fourier),
        ):
            if value:
                raise UserError(f"{name} belongs to generator.backbone triplane, image has no rays: leave it out")
    elif c.optim.path_length_weight:
        raise UserError("optim.path_length_weight must be 0 with generator.backbone triplane, as published")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be finite, got {value}")
    check_camera(c.camera)


def micro_of(config: Config, batch: int) -> int:
    """The micro-batch of a batch, or of a process's share of one."""
    if config.micro_batch == "auto" and batch > 0:
        return micro_batch_for(batch, MICRO_BATCH, config.discriminator.minibatch_std_group)
    return batch if config.micro_batch in (None, "auto") else min(config.micro_batch, batch)


def micro_batch_for(batch: int, at_most: int, group: int) -> int:
    """The largest micro-batch of at most so many images that divides a batch, into whole groups of minibatch-std."""
    sizes = range(min(batch, at_most, 2**16), 0, -1)
    return next(micro for micro in sizes if batch % micro == 0 and micro % min(group, micro) == 0)


def check_camera(camera: CameraConfig) -> None:
    """The frustum exists and stays inside the cube."""
    if not 0 < camera.fov < 180:
        raise UserError(f"camera.fov must be between 0 and 180 degrees, got {camera.fov}")
    if not camera.ray_start < camera.ray_end:
        raise UserError(f"camera.ray_end must exceed ray_start = {camera.ray_start}, got {camera.ray_end}")
    extent = frustum_extent(camera.fov, camera.radius, camera.ray_start, camera.ray_end)
    if not extent <= camera.cube_scale:
        advice = "narrow the rays"
        if extent < 1e6:
            advice = f"set --camera.cube-scale {math.ceil(extent * 1000 + 1e-6) / 1000} or {advice}"
        raise UserError(
            f"the view frustum reaches {extent:.4g} from the origin, outside the cube of half size camera.cube_scale = "
            f"{camera.cube_scale}: {advice}"
        )


def with_data_camera(config: Config, camera: dict[str, float] | None) -> Config:
    """The settings with the camera that a data set stores (fov, radius, ray_start, ray_end, cube_scale), if it does."""
    return config if camera is None else replace(config, camera=replace(config.camera, **camera))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, for JSON and checkpoints."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Raises UserError on a setting that this version does not know."""
    parts = {
        f.name: f.default_factory for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING
    }
    try:
        nested = {name: parts[name](**value) if name in parts else value for name, value in values.items()}
        nested["grid"] = tuple(values["grid"]) if "grid" in values else Config.grid
        return Config(**nested)
    except TypeError as error:
        raise UserError(f"the stored settings do not fit this version: {error}") from None


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    values: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        values |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return values


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as dotted name -> (old, new)."""
    a, b = flat(old), flat(new)
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}
