"""Fit an image autoencoder to pictures, frames of videos and drawn shapes.

    python scripts/train_autoencoder.py config=configs/autoencoder_tiny.yaml [key=value ...]
    python scripts/train_autoencoder.py config=configs/autoencoder_tiny.yaml training.steps=200

The same command continues after an interruption. The output folder receives

    vae/                 the fitted model, for ``AutoencoderKL.from_pretrained``
    comparison.png       held-out crops above their reconstructions
    training_state.pt    what a later run needs to continue

Shapes: B batch, C latent channels, H W pixels, h w latent size.
"""

from __future__ import annotations

import copy
import functools
import glob
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from diffusers.models.resnet import ResnetBlock2D
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.utils.config_schema import describe_schema, key
from diffnext.utils.omegaconf_utils import USAGE, ConfigError, get_config

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FIRST_LOG_VARIANCE = -6.0
TRAINING, EVALUATION, MEASUREMENT = range(3)  # independent streams of random crops


# --- settings -----------------------------------------------------------------------------------


def section(meaning: str, settings: type) -> Any:
    """Declare a group of keys."""
    return field(default_factory=settings, metadata={"meaning": meaning})


@dataclass
class DataSettings:
    """Where pictures come from and how they are cropped."""

    images: list[str] = key("Files, folders or glob patterns of pictures.", [])
    videos: list[str] = key("Video files.", [])
    frame_stride: int = key("Use every n-th frame of the videos.", 8)
    hold_out_every: int = key(
        "Keep every n-th picture or frame for evaluation; 0 evaluates on training pictures.", 0
    )
    crop_sizes: list[int] = key("Sizes of the crops in pixels; each batch has one of them.", [64])
    max_zoom_out: float = key("A crop shows at most this many times its own size, reduced.", 8.0)
    shapes_fraction: float = key("Share of drawn shapes on plain backgrounds, 0 to 1.", 0.0)


@dataclass
class LossSettings:
    """Weights of the terms, all means over elements."""

    l1: float = key("Absolute error of pixels.", 1.0)
    mse: float = key("Squared error of pixels.", 1.0)
    gradient: float = key("Absolute error of the differences between neighbours.", 0.5)
    kl: float = key("Divergence of the posterior from the unit normal.", 0.01)


@dataclass
class OptimizerSettings:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    learning_rate: float = key("Peak learning rate.", 1e-3)
    weight_decay: float = key("Decoupled weight decay.", 0.0)
    warmup_steps: int = key("Steps of the warm-up.", 100)
    max_grad_norm: float = key("Clip the gradient norm to this.", 1.0)


@dataclass
class TrainingSettings:
    """The training loop."""

    steps: int = key("Steps of the whole run.", 1000)
    batch_size: int = key("Pictures per batch of the smallest crops; fewer of larger ones.", 8)
    seed: int = key("Seed of weights, crops and posterior samples.", 0)
    device: str = key("Where to train: cpu, cuda, cuda:1.", "cpu")
    save_every: int = key("Steps between two saved states.", 500)
    evaluate_every: int = key("Steps between two evaluations on held-out crops.", 250)
    resume: bool = key("Continue from the state in output_dir, if there is one.", True)


@dataclass
class ExportSettings:
    """How the fitted model is written."""

    dtype: str = key("Type of the written weights.", "float16")
    whiten: bool = key("Bring every latent channel to mean 0 and the same variance.", True)
    measured_batches: int = key("Batches on which latents are measured.", 64)


@dataclass
class Settings:
    """Everything one run needs."""

    config: str = key("YAML file that the other arguments override.")
    output_dir: str = key("Folder for the model, the comparison and the training state.")
    init_from: str | None = key("Folder of an autoencoder to start from; null: at random.", None)
    model: dict = key("Arguments of AutoencoderKL; ignored with init_from.", {})
    data: DataSettings = section("Pictures.", DataSettings)
    loss: LossSettings = section("Loss.", LossSettings)
    optimizer: OptimizerSettings = section("Optimizer.", OptimizerSettings)
    training: TrainingSettings = section("Loop.", TrainingSettings)
    export: ExportSettings = section("Export.", ExportSettings)

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        data = self.data
        if not 0 <= data.shapes_fraction <= 1:
            raise ConfigError(f"data.shapes_fraction must be 0 to 1, got {data.shapes_fraction}")
        if not (data.images or data.videos) and data.shapes_fraction < 1:
            raise ConfigError("data needs images or videos, or shapes_fraction=1")
        if not data.crop_sizes or min(data.crop_sizes) < 1:
            raise ConfigError(f"data.crop_sizes must be positive, got {data.crop_sizes}")
        if not isinstance(getattr(torch, self.export.dtype, None), torch.dtype):
            raise ConfigError(f"export.dtype must name a torch type, got {self.export.dtype!r}")


def load_settings(arguments: Sequence[str]) -> Settings:
    """Merge the file of ``config=``, ``key=value`` overrides and defaults.

    Raises:
        ConfigError: If a key is unknown, a type is wrong or a value impossible.
    """
    config = get_config(arguments, schema=Settings)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), config))
    except OmegaConfBaseException as error:
        raise ConfigError(f"config={config.config}: {error}") from error


# --- data ---------------------------------------------------------------------------------------


def star(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star inside the unit circle; ``inner`` = cos(pi / points) gives a polygon."""
    angles = [math.pi * k / points - math.pi / 2 for k in range(2 * points)]
    radii = [1.0, inner] * points
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


OUTLINES = {
    "circle": star(24, 1.0),
    "triangle": star(3, 0.5),
    "square": star(4, math.cos(math.pi / 4)),
    "hexagon": star(6, math.cos(math.pi / 6)),
    "star": star(5, 0.4),
    "cross": star(4, 0.35),
}


def draw_shapes(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one to three colored shapes on a plain background, anti-aliased."""
    canvas = size * 4
    picture = Image.new("RGB", (canvas, canvas), random_color(rng))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, 4)):
        outline = OUTLINES[rng.choice(list(OUTLINES))]
        radius = canvas * rng.uniform(0.1, 0.4)
        center = rng.uniform(0.15, 0.85, 2) * canvas
        turn = rng.choice([0.0, math.pi / 4, rng.uniform(0, 2 * math.pi)])
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        corners = [
            (center[0] + x * cos - y * sin, center[1] + x * sin + y * cos) for x, y in outline
        ]
        pen.polygon(corners, fill=random_color(rng))
    return picture.resize((size, size), Image.Resampling.BOX)


def random_color(rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw a color; half of them are corners of the color cube, the named colors of prompts."""
    color = rng.uniform(0, 255, 3)
    if rng.random() < 0.5:
        color = np.where(color < 128, 0, 255)
    return tuple(int(channel) for channel in color)


def find_images(patterns: list[str]) -> list[Path]:
    """Expand files, folders and glob patterns.

    Raises:
        ConfigError: If a pattern matches no picture.
    """
    found = []
    for pattern in patterns:
        matches = sorted(
            glob.glob(os.path.join(pattern, "*") if os.path.isdir(pattern) else pattern)
        )
        pictures = [Path(match) for match in matches if match.lower().endswith(IMAGE_SUFFIXES)]
        if not pictures:
            raise ConfigError(f"data.images: no pictures match {pattern!r}")
        found.extend(pictures)
    return found


@functools.lru_cache(maxsize=64)
def read_image(path: Path) -> Image.Image:
    """Decode a picture to RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def read_frames(path: str, stride: int) -> list[Image.Image]:
    """Decode every ``stride``-th frame of a video."""
    with imageio.get_reader(path) as reader:
        return [Image.fromarray(frame) for index, frame in enumerate(reader) if index % stride == 0]


def crop_randomly(
    rng: np.random.Generator, picture: Image.Image, size: int, max_zoom_out: float
) -> Image.Image:
    """Cut a random square, of log-uniform side, and reduce it to ``size``; flip half of them."""
    short_side = min(picture.size)
    largest = max(size, min(short_side, size * max_zoom_out))
    side = min(short_side, math.exp(rng.uniform(math.log(size), math.log(largest))))
    left, top = (rng.uniform(0, length - side) for length in picture.size)
    if side < size * 1.1 and short_side >= size:  # keep every pixel as it is
        left, top, side = (
            min(int(left), picture.width - size),
            min(int(top), picture.height - size),
            size,
        )
    crop = picture.resize(
        (size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side)
    )
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


class CropSampler:
    """Random batches of crops, each a function of the seed, the stream and the step.

    Args:
        settings: Sources and sizes.
        batch_size: Pictures per batch at the smallest crop size.
        seed: Seed of every stream.
    """

    def __init__(self, settings: DataSettings, batch_size: int, seed: int) -> None:
        self.settings = settings
        self.batch_size = batch_size
        self.seed = seed
        pictures: list[Path | Image.Image] = [*find_images(settings.images)]
        for video in settings.videos:
            pictures.extend(read_frames(video, settings.frame_stride))
        every = settings.hold_out_every
        self.held_out = pictures[every - 1 :: every] if every else pictures
        self.pictures = [p for k, p in enumerate(pictures) if not every or (k + 1) % every]
        if settings.shapes_fraction < 1 and not (self.pictures and self.held_out):
            raise ConfigError(
                f"data.hold_out_every={every} leaves {len(self.pictures)} pictures to train and "
                f"{len(self.held_out)} to evaluate on"
            )

    def batch(self, stream: int, step: int) -> Tensor:
        """Draw pictures, (B, 3, H, W), -1 to 1."""
        rng = np.random.default_rng([self.seed, stream, step])
        pictures = self.held_out if stream == EVALUATION else self.pictures
        smallest = min(self.settings.crop_sizes)
        size = int(rng.choice(self.settings.crop_sizes))
        count = max(1, round(self.batch_size * (smallest / size) ** 2))
        crops = [np.asarray(self._draw(rng, pictures, size)) for _ in range(count)]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)

    def _draw(
        self, rng: np.random.Generator, pictures: list[Path | Image.Image], size: int
    ) -> Image.Image:
        if rng.random() < self.settings.shapes_fraction:
            return draw_shapes(rng, size)
        picture = pictures[rng.integers(len(pictures))]
        if isinstance(picture, Path):
            picture = read_image(picture)
        return crop_randomly(rng, picture, size, self.settings.max_zoom_out)


# --- loss ---------------------------------------------------------------------------------------


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1 to 1, (B, 3, H, W)."""
    error = F.mse_loss(x.clamp(-1, 1), y.clamp(-1, 1)).item()
    return 10 * math.log10(4 / max(error, 1e-10))


def gradient_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels."""
    error = x - y
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def autoencoder_loss(
    vae: AutoencoderKL, x: Tensor, weights: LossSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss of one batch.

    Args:
        vae: The model.
        x: Pictures, (B, 3, H, W), -1 to 1.
        weights: Weights of the terms.
        generator: Source of the posterior sample.

    Returns:
        The loss, a scalar, and the reconstruction, (B, 3, H, W).

    Source: Auto-Encoding Variational Bayes, arXiv:1312.6114.
    """
    posterior = vae.encode(x).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    y = vae.decode(posterior.sample(generator)).sample
    loss = weights.l1 * F.l1_loss(y, x) + weights.mse * F.mse_loss(y, x)
    loss = loss + weights.gradient * gradient_error(y, x) + weights.kl * divergence
    return loss, y.detach()


# --- latents ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of sampled latents per channel, (C,)."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, batches: list[Tensor]) -> LatentStatistics:
    """Measure samples of the posterior: their variance is that of the mean plus the mean variance.

    Args:
        vae: The model.
        batches: Pictures, each (B, 3, H, W).
    """
    means, variances = [], []
    for x in batches:
        posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.double().transpose(0, 1).flatten(1))  # (C, B*h*w)
        variances.append(posterior.var.double().transpose(0, 1).flatten(1))
    mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
    total = mean.var(1, correction=0) + variance.mean(1)
    return LatentStatistics(mean.mean(1), total.sqrt())


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, statistics: LatentStatistics) -> None:
    """Set the factors with which scaled latents have mean 0 and variance 1, channels together."""
    center = statistics.mean.mean()
    variance = (statistics.std.square() + (statistics.mean - center).square()).mean()
    factors = {"scaling_factor": variance.rsqrt().item(), "shift_factor": center.item()}
    vae.register_to_config(**factors)


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, statistics: LatentStatistics) -> None:
    """Fold an affine map per channel into the convolutions around the latents.

    Encoded means become ``(mean - m) / s``, log-variances ``logvar - 2 log s``, and the decoder
    undoes both, so reconstructions stay the same. ``s`` leaves the overall spread of the latents
    as it was; the scaling factor, set here, then brings every channel to unit variance.

    Args:
        vae: The model, changed in place.
        statistics: Mean and standard deviation of its latents.
    """
    scaling_factor = statistics.std.square().mean().rsqrt().item()
    center = statistics.mean
    spread = statistics.std * scaling_factor
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(center)
    to_affine = {"dtype": before.weight.dtype, "device": before.weight.device}
    center, spread = center.to(**to_affine), spread.to(**to_affine)
    after.bias += (after.weight[:, :, 0, 0] * center).sum(1)
    after.weight *= spread[None, :, None, None]
    before.bias[:channels] = (before.bias[:channels] - center) / spread
    before.weight[:channels] /= spread[:, None, None, None]
    if before.bias.numel() == 2 * channels:
        before.bias[channels:] -= 2 * spread.log()
    vae.register_to_config(scaling_factor=scaling_factor, shift_factor=None)


# --- files --------------------------------------------------------------------------------------


def save_model(vae: AutoencoderKL, folder: Path) -> None:
    """Write the model so that the folder is never seen half full."""
    fresh = folder.with_name(folder.name + ".new")
    stale = folder.with_name(folder.name + ".old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    vae.save_pretrained(fresh)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def save_comparison(x: Tensor, y: Tensor, path: Path) -> None:
    """Write pictures (B, 3, H, W) in one row, and their reconstructions below."""
    rows = [torch.cat(list(pictures), dim=-1) for pictures in (x, y)]
    sheet = torch.cat(rows, dim=-2).clamp(-1, 1).add(1).mul(127.5).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(path)


# --- run ----------------------------------------------------------------------------------------


def build_model(settings: Settings) -> AutoencoderKL:
    """Load ``init_from``, or make a model with random weights that is easy to fit."""
    if settings.init_from:
        return AutoencoderKL.from_pretrained(settings.init_from)
    vae = AutoencoderKL(**settings.model)
    prepare_weights(vae)
    return vae


@torch.no_grad()
def prepare_weights(vae: AutoencoderKL) -> None:
    """Change fresh weights, in place, so that the decoder sees a signal from the first step.

    Convolutions keep the variance of their input and have no bias: PyTorch's defaults shrink
    colors below the biases within a few layers, and gray pictures are then all that is learned.
    Residual blocks start as the identity (Goyal et al., arXiv:1706.02677). Log-variances start
    low: at 0, noise of variance 1 would drown the means.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    channels = vae.config.latent_channels
    last.weight[channels:] *= 0.1
    last.bias[channels:] = FIRST_LOG_VARIANCE
    vae.decoder.conv_out.weight *= 0.3  # pictures stay within -1 to 1


def check_model(vae: AutoencoderKL, settings: Settings) -> None:
    """Refuse combinations that would only fail after hours.

    Raises:
        ConfigError: If crops do not fit the stride, or latents cannot be sampled or whitened.
    """
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    if any(size % stride for size in settings.data.crop_sizes):
        raise ConfigError(
            f"data.crop_sizes must be multiples of {stride}, got {settings.data.crop_sizes}"
        )
    if not vae.config.double_z:
        raise ConfigError("model.double_z must be true: the loss needs a mean and a variance")
    if settings.export.whiten and None in (vae.quant_conv, vae.post_quant_conv):
        raise ConfigError("export.whiten needs model.use_quant_conv and model.use_post_quant_conv")


class AutoencoderTrainer:
    """Fits, evaluates, saves and resumes.

    Args:
        settings: Everything the run needs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        training = settings.training
        self.device = torch.device(training.device)
        self.output_dir = Path(settings.output_dir)
        self.sampler = CropSampler(settings.data, training.batch_size, training.seed)
        torch.manual_seed(training.seed)
        vae = build_model(settings)
        check_model(vae, settings)
        self.vae = vae.float().to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(),
            lr=settings.optimizer.learning_rate,
            weight_decay=settings.optimizer.weight_decay,
        )
        self.step = 0

    @property
    def state_path(self) -> Path:
        """File that a later run continues from."""
        return self.output_dir / "training_state.pt"

    @property
    def model_dir(self) -> Path:
        """Folder of the fitted model."""
        return self.output_dir / "vae"

    def run(self) -> None:
        """Train to the last step, then write the model and the comparison."""
        training = self.settings.training
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if training.resume and self.state_path.exists():
            self.load_state()
        progress = tqdm(total=training.steps, initial=self.step, desc="autoencoder", mininterval=2)
        held_out = math.nan
        while self.step < training.steps:
            loss, train_psnr = self.train_step()
            if self.step % training.evaluate_every == 0:
                held_out = self.evaluate()
            if self.step % training.save_every == 0:
                self.save_state()
            report = {"loss": loss, "psnr": train_psnr, "held_out_psnr": held_out}
            progress.set_postfix(report, refresh=False)
            progress.update()
        progress.close()
        self.save_state()
        print(f"held-out PSNR {self.evaluate():.2f} dB, model in {self.model_dir}")

    def train_step(self) -> tuple[float, float]:
        """Take one optimizer step; returns the loss and the PSNR of the batch.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        learning_rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        seed = self.settings.training.seed
        generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + self.step)
        x = self.to_device(self.sampler.batch(TRAINING, self.step))
        loss, y = autoencoder_loss(self.vae, x, self.settings.loss, generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}; lower optimizer.learning_rate "
                f"(now {learning_rate:g}) and run again to continue from the last saved state"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        max_norm = self.settings.optimizer.max_grad_norm
        nn.utils.clip_grad_norm_(self.vae.parameters(), max_norm)
        self.optimizer.step()
        self.step += 1
        return loss.item(), psnr(x, y)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        settings = self.settings.optimizer
        warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        decay = 0.5 * (1 + math.cos(math.pi * step / self.settings.training.steps))
        return settings.learning_rate * warmup * decay

    def to_device(self, x: Tensor) -> Tensor:
        """Move pictures to where the model is."""
        return x.to(self.device)

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> float:
        """Reconstruct held-out crops from the posterior's mean; returns the mean PSNR in dB."""
        self.vae.eval()
        values = []
        for index in range(batches):
            x = self.to_device(self.sampler.batch(EVALUATION, index))
            y = self.vae.decode(self.vae.encode(x).latent_dist.mean).sample
            values.extend(psnr(*pair) for pair in zip(x, y, strict=True))
            if index == 0:
                save_comparison(x, y, self.output_dir / "comparison.png")
        self.vae.train()
        return sum(values) / len(values)

    def export(self) -> None:
        """Standardize the latents of a copy of the model and write it."""
        settings = self.settings.export
        vae = copy.deepcopy(self.vae).eval().requires_grad_(False)
        batches = [
            self.to_device(self.sampler.batch(MEASUREMENT, index))
            for index in range(settings.measured_batches)
        ]
        statistics = measure_latents(vae, batches)
        adjust = whiten_latents if settings.whiten else standardize_latents
        adjust(vae, statistics)
        nn.Module.to(vae, dtype=getattr(torch, settings.dtype))
        save_model(vae, self.model_dir)

    def save_state(self) -> None:
        """Write the training state and the model of this step."""
        state = {
            "step": self.step,
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": {"model": self.settings.model, "init_from": self.settings.init_from},
        }
        fresh = self.state_path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, self.state_path)
        self.export()

    def load_state(self) -> None:
        """Continue from the training state.

        Raises:
            ConfigError: If it belongs to another model.
        """
        state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        for name, saved in state["settings"].items():
            wanted = asdict(self.settings)[name]
            if saved != wanted:
                raise ConfigError(
                    f"{self.state_path} was written with {name}={saved}, now {wanted}; "
                    "choose another output_dir"
                )
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def main(arguments: Sequence[str]) -> None:
    """Parse, build and run."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE.format(program=Path(__file__).name))
        print(describe_schema(Settings))
        return
    try:
        AutoencoderTrainer(load_settings(arguments)).run()
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
