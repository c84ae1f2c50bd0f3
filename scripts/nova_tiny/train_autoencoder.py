"""Fit an image or video autoencoder to pictures, videos and drawn shapes.

    python scripts/nova_tiny/train_autoencoder.py config=configs/autoencoder_tiny.yaml [key=value ...]
    python scripts/nova_tiny/train_autoencoder.py config=configs/autoencoder_tiny_video.yaml

The same command continues after an interruption. The output folder receives

    vae/                 the fitted model, for ``from_pretrained`` of its class
    comparison.png       held-out crops, or frames of clips, above their reconstructions
    training_state.pt    what a later run needs to continue

Shapes: B batch, C latent channels, F frames, H W pixels. Clips are (B, 3, F, H, W), pictures
(B, 3, H, W).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from pydantic import BeforeValidator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from autoencoder_data import EVALUATION, MEASUREMENT, TRAINING, DataSettings, Sampler
from diffnext.config.load import parse, read_config
from diffnext.config.schema import (
    USAGE,
    Count,
    Natural,
    NotNegative,
    Positive,
    Section,
    describe_schema,
    key,
    precision_name,
)
from diffnext.config.targets import ConfigError
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_opensora import (
    AutoencoderKLOpenSora,
    FrameAttention,
    ResBlock,
)

MODEL_CLASSES = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderKLOpenSora)}
FIRST_LOG_VARIANCE = -6.0
MAX_GRADIENT_NORM = 1.0
MATRIX = "parametrizations.weight.original"  # PyTorch's name of what a parametrization computes from

Autoencoder = AutoencoderKL | AutoencoderKLOpenSora


# --- settings -----------------------------------------------------------------------------------


TorchType = Literal["float16", "bfloat16", "float32"]
Precision = Annotated[Literal["no", "bf16"], BeforeValidator(precision_name), "no or bf16"]


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section):
    """Weights of the terms, all means over elements."""

    l1: NotNegative = key("Absolute error of pixels.", 1.0)
    mse: NotNegative = key("Squared error of pixels.", 1.0)
    gradient: NotNegative = key("Absolute error of the differences between neighbours.", 0.5)
    kl: NotNegative = key("Divergence of the posterior from the unit normal.", 0.01)
    alignment: NotNegative = key("Squared distance from the latents of align_with.", 1.0)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    """Adam, or Muon and Adam, with a linear warm-up and a cosine decay to zero."""

    kind: Literal["adam", "muon"] = key(
        "adam, or muon: kernels between hidden channels by Muon, which needs far fewer steps.", "adam"
    )
    learning_rate: Positive = key("Peak learning rate.", 1e-3)
    warmup_steps: Natural = key("Steps of the warm-up.", 100)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Section):
    """The training loop."""

    part: Literal["all", "decoder"] = key(
        "all, or decoder: the encoder stays as init_from has it, so that latents stay valid; "
        "only pixels count in the loss.",
        "all",
    )
    decoder_noise: NotNegative = key(
        "Noise on the latents when part=decoder, standard deviation.", 0.1
    )
    steps: Count = key("Steps of the whole run.", 1000)
    batch_size: Count = key(
        "Pictures, or shortest clips, per batch of the smallest crops; fewer of larger ones.", 8
    )
    seed: Natural = key("Seed of weights, crops and posterior samples.", 0)
    device: str = key("Where to train: cpu, cuda, cuda:1.", "cpu")
    mixed_precision: Precision = key(
        "no, or bf16: convolutions in bfloat16, twice as fast on processors that have it.", "no"
    )
    save_every: Count = key("Steps between two saved states.", 500)
    evaluate_every: Count = key("Steps between two evaluations on held-out crops.", 250)
    resume: bool = key("Continue from the state in output_dir, if there is one.", True)


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Section):
    """How the fitted model is written."""

    dtype: TorchType = key("Type of the written weights.", "float16")
    posterior_scale: Positive = key(
        "Times the posterior's standard deviation; below 1, latents have less noise to learn.",
        1.0,
    )
    measured_batches: Count = key("Batches on which latents are measured.", 64)


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """Everything one run needs."""

    config: str = key("YAML file that the other arguments override.")
    output_dir: str = key("Folder for the model, the comparison and the training state.")
    init_from: str | None = key(
        "Folder of an autoencoder to start from; null: at random. Clips may start from pictures.",
        None,
    )
    align_with: str | None = key(
        "Folder of an image autoencoder whose latents of every (fourth) frame are approached, so "
        "that a generator for those can work with these; then latents are not standardized.",
        None,
    )
    model_class: Literal["AutoencoderKL", "AutoencoderKLOpenSora"] = key(
        "AutoencoderKL, or AutoencoderKLOpenSora for clips.", "AutoencoderKL"
    )
    model: dict = key("Arguments of the model class; ignored with init_from of the same class.", {})
    data: DataSettings = key("Pictures and clips.", DataSettings)
    loss: LossSettings = key("Loss.", LossSettings)
    optimizer: OptimizerSettings = key("Optimizer.", OptimizerSettings)
    training: TrainingSettings = key("Loop.", TrainingSettings)
    export: ExportSettings = key("Export.", ExportSettings)

    def __post_init__(self) -> None:
        if not (self.data.images or self.data.videos) and self.data.shapes_fraction < 1:
            raise ValueError("data needs images or videos, or shapes_fraction=1")
        if not self.is_video and self.data.clip_lengths != (1,):
            raise ValueError(
                f"data.clip_lengths must be [1] for an {self.model_class}, "
                f"got {list(self.data.clip_lengths)}"
            )
        if self.is_decoder_only and not self.init_from:
            raise ValueError("training.part=decoder needs init_from: it fits to given latents")

    @property
    def is_decoder_only(self) -> bool:
        """Whether latents stay as they are."""
        return self.training.part == "decoder"

    @property
    def is_video(self) -> bool:
        """Whether the model takes clips."""
        return MODEL_CLASSES[self.model_class] is AutoencoderKLOpenSora


def load_settings(arguments: Sequence[str]) -> Settings:
    """Merge the file of ``config=``, ``key=value`` overrides and defaults.

    Raises:
        ConfigError: Naming every key that is unknown, missing, or has a value that cannot be.
    """
    config, origins = read_config(arguments)
    return parse(config, Settings, origins)


# --- loss ---------------------------------------------------------------------------------------


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures or clips in -1 to 1."""
    error = F.mse_loss(x.clamp(-1, 1), y.clamp(-1, 1)).item()
    return 10 * math.log10(4 / max(error, 1e-10))


def gradient_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels of a picture or frame."""
    error = x - y
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def alignment_error(mean: Tensor, x: Tensor, teacher: AutoencoderKL) -> Tensor:
    """Mean squared distance of posterior means from the scaled means of an image autoencoder.

    Args:
        mean: (B, C, h, w), or (B, C, T, h, w) of clips.
        x: Pictures or clips, -1 to 1; of clips, the first frame counts and the last of every
            further group that shares a latent frame.
        teacher: The image autoencoder.
    """
    with torch.no_grad():
        if x.ndim == 4:
            wanted = teacher.scale_(teacher.encode(x).latent_dist.mean)
        else:
            stride = (x.size(2) - 1) // max(mean.size(2) - 1, 1) or 1
            frames = x[:, :, ::stride].transpose(1, 2)  # (B, T, 3, H, W)
            wanted = teacher.scale_(teacher.encode(frames.flatten(0, 1)).latent_dist.mean)
            wanted = wanted.unflatten(0, frames.shape[:2]).transpose(1, 2)
    return F.mse_loss(mean.float(), wanted.float())


def autoencoder_loss(
    vae: Autoencoder,
    x: Tensor,
    weights: LossSettings,
    generator: torch.Generator,
    teacher: AutoencoderKL | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of one batch.

    Args:
        vae: The model.
        x: Pictures or clips, -1 to 1.
        weights: Weights of the terms.
        generator: Source of the posterior sample.
        teacher: Whose latents are approached, if any.

    Returns:
        The loss, a scalar, and the reconstruction, of the shape of ``x``.

    Source: Auto-Encoding Variational Bayes, arXiv:1312.6114.
    """
    posterior = vae.encode(x).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    y = vae.decode(posterior.sample(generator)).sample.float()
    loss = pixel_loss(y, x, weights) + weights.kl * divergence
    if teacher is not None:
        loss = loss + weights.alignment * alignment_error(mean, x, teacher)
    return loss, y.detach()


def decoder_loss(
    vae: Autoencoder, x: Tensor, weights: LossSettings, generator: torch.Generator, noise: float
) -> tuple[Tensor, Tensor]:
    """The same when the encoder stays as it is; ``noise`` is added to the latents."""
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean.float()
        z = z + noise * torch.randn(z.shape, generator=generator, device=z.device)
    y = vae.decode(z).sample.float()
    return pixel_loss(y, x, weights), y.detach()


def pixel_loss(y: Tensor, x: Tensor, weights: LossSettings) -> Tensor:
    """Errors of pixels and of the differences between them."""
    loss = weights.l1 * F.l1_loss(y, x) + weights.mse * F.mse_loss(y, x)
    return loss + weights.gradient * gradient_error(y, x)


# --- latents ------------------------------------------------------------------------------------


@torch.no_grad()
def measure_latents(vae: Autoencoder, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of samples of the posterior, (C,).

    Their variance is the variance of the mean plus the mean variance.
    """
    means, variances = [], []
    for x in batches:
        posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.double().transpose(0, 1).flatten(1))  # (C, positions)
        variances.append(posterior.var.double().transpose(0, 1).flatten(1))
    mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
    total = mean.var(1, correction=0) + variance.mean(1)
    return mean.mean(1), total.sqrt()


@torch.no_grad()
def whiten_latents(vae: Autoencoder, center: Tensor, std: Tensor) -> None:
    """Fold an affine map per channel into the convolutions around the latents.

    Encoded means become ``(mean - m) / s``, log-variances ``logvar - 2 log s``, and the decoder
    undoes both, so reconstructions stay the same. ``s`` leaves the overall spread of the latents
    as it was; the scaling factor, set here, then brings every channel to unit variance.

    Args:
        vae: The model, changed in place.
        center: Mean of its latents, (C,).
        std: Standard deviation, (C,).
    """
    scaling_factor = std.square().mean().rsqrt().item()
    spread = std * scaling_factor
    before: Any = vae.quant_conv
    after: Any = vae.post_quant_conv
    channels = len(center)
    center, spread = center.to(before.weight), spread.to(before.weight)
    ones = (1,) * (after.weight.ndim - 2)  # kernels of one position, 2-D or 3-D
    after.bias += after.weight.flatten(1) @ center
    after.weight *= spread.view(1, -1, *ones)
    before.bias[:channels] = (before.bias[:channels] - center) / spread
    before.weight[:channels] /= spread.view(-1, 1, *ones)
    before.bias[channels:] -= 2 * spread.log()
    vae.register_to_config(scaling_factor=scaling_factor, shift_factor=None)


@torch.no_grad()
def scale_posterior(vae: Autoencoder, factor: float) -> None:
    """Multiply the posterior's standard deviation, in the convolution before the latents."""
    before: Any = vae.quant_conv
    _, log_variance = before.bias.chunk(2)
    log_variance += 2 * math.log(factor)


# --- optimizers ---------------------------------------------------------------------------------


class KernelOfMatrix(nn.Module):
    """A kernel that is kept as a matrix, (out channels, in channels times places)."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, matrix: Tensor) -> Tensor:
        """The kernel of a matrix."""
        return matrix.view(self.shape)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        """The matrix of a kernel."""
        return kernel.flatten(1)


def hidden_convolutions(vae: Autoencoder) -> list[nn.Conv2d | nn.Conv3d]:
    """Convolutions from and to more channels than those of pixels."""
    convolutions = [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    return [m for m in convolutions if min(m.in_channels, m.out_channels) > 3]


def build_optimizers(vae: Autoencoder, kind: str) -> list[torch.optim.Optimizer]:
    """Optimizers of all parameters; for Muon, kernels of the model become matrices, in place.

    Source: Muon is scalable for LLM training, arXiv:2502.16982, whose steps are as large as Adam's.
    """
    for module in hidden_convolutions(vae) if kind == "muon" else ():
        parametrize.register_parametrization(module, "weight", KernelOfMatrix(module.weight.shape))
    named = list(vae.named_parameters())
    matrices = [value for name, value in named if name.endswith(MATRIX)]
    others = [value for name, value in named if not name.endswith(MATRIX)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, weight_decay=0.0)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


@torch.no_grad()
def without_matrices(vae: Autoencoder) -> Autoencoder:
    """A copy of the model whose kernels are plain parameters again."""
    copied: Any = type(vae).from_config(vae.config)
    weights = copied.to(vae.device).state_dict()  # shares memory with the parameters
    for name, value in vae.state_dict().items():
        weight = weights[name.replace(MATRIX, "weight")]
        weight.copy_(value.view_as(weight))
    return copied


# --- files --------------------------------------------------------------------------------------


def save_model(vae: Autoencoder, folder: Path) -> None:
    """Write the model; the folder is never half full."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    vae.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def save_comparison(x: Tensor, y: Tensor, path: Path) -> None:
    """Write pictures, or some frames of the first clip, in one row, reconstructions below."""
    if x.ndim == 5:
        every = max(1, x.size(2) // 5)
        x, y = (clips[0, :, ::every].transpose(0, 1) for clips in (x, y))
    rows = [torch.cat(list(pictures), dim=-1) for pictures in (x, y)]
    sheet = torch.cat(rows, dim=-2).clamp(-1, 1).add(1).mul(127.5).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(path)


# --- run ----------------------------------------------------------------------------------------


def build_model(settings: Settings) -> Autoencoder:
    """Load ``init_from``, or make a model with random weights that is easy to fit.

    A video autoencoder may start from the weights of an image autoencoder of the same widths.

    Raises:
        ConfigError: If the weights do not fit.
    """
    model_class = MODEL_CLASSES[settings.model_class]
    source = settings.init_from
    if source and AutoencoderKL.load_config(source)["_class_name"] == settings.model_class:
        return model_class.from_pretrained(source)
    vae = model_class(**settings.model)
    prepare_weights(vae)
    if source:
        inflate_weights(vae, AutoencoderKL.from_pretrained(source))
    return vae


@torch.no_grad()
def inflate_weights(vae: AutoencoderKLOpenSora, image_vae: AutoencoderKL) -> None:
    """Copy an image autoencoder into a fresh video autoencoder, in place.

    Kernels over time see only the present frame, so a still clip has the latents of its picture.
    Parts that the image autoencoder does not have keep their values.

    Args:
        vae: The model, after :func:`prepare_weights`.
        image_vae: A model of the same widths and depth.

    Raises:
        ConfigError: If the shapes do not fit.

    Source: I3D, arXiv:1705.07750, with the weight on one frame instead of spread over all.
    """
    weights = vae.state_dict()  # shares memory with the parameters
    for name, weight in image_vae.state_dict().items():
        target = weights.get(name)
        if target is not None and target.ndim == 5:
            target = target[:, :, -1]
        if target is None or target.shape != weight.shape:
            shape = None if target is None else tuple(target.shape)
            raise ConfigError(
                f"init_from: {name} is {tuple(weight.shape)} in the image autoencoder, "
                f"{shape} in the video autoencoder"
            )
        target.copy_(weight)


@torch.no_grad()
def prepare_weights(vae: Autoencoder) -> None:
    """Change fresh weights, in place, so the decoder sees a signal from the first step.

    Convolutions keep the variance of their input and have no bias: PyTorch's defaults shrink
    colors below the biases within a few layers, and gray pictures are then all that is learned.
    Those over time see only the present frame at first. Residual blocks and attention start as
    the identity (Goyal et al., arXiv:1706.02677). Log-variances start low: at 0, noise of variance
    1 would drown the means.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.zeros_(module.weight)
            present = module.weight[:, :, -1] if isinstance(module, nn.Conv3d) else module.weight
            nn.init.kaiming_normal_(present, nonlinearity="linear")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D | ResBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, FrameAttention):
            projection: Any = module.to_out[0]
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
    channels = vae.config["latent_channels"]
    last: Any = vae.quant_conv
    last.weight[channels:] *= 0.1
    last.bias[channels:] = FIRST_LOG_VARIANCE
    decoder: Any = vae.decoder
    decoder.conv_out.weight *= 0.3  # pictures stay within -1 to 1


def check_model(vae: Autoencoder, settings: Settings) -> None:
    """Stop before hours are spent on a combination that cannot work.

    Raises:
        ConfigError: If crops or clips do not fit the model, or its latents cannot be whitened.
    """
    stride = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if any(size % stride for size in settings.data.crop_sizes):
        raise ConfigError(
            f"data.crop_sizes must be multiples of {stride}, got {list(settings.data.crop_sizes)}"
        )
    if isinstance(vae, AutoencoderKLOpenSora):
        for length in settings.data.clip_lengths:
            try:
                vae.latent_length(length)
            except ValueError as error:
                raise ConfigError(f"data.clip_lengths: {error}") from error


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
        self.state_path = self.output_dir / "training_state.pt"
        self.model_dir = self.output_dir / "vae"
        self.sampler = Sampler(
            settings.data, settings.is_video, training.batch_size, training.seed
        )
        torch.manual_seed(training.seed)
        vae = build_model(settings)
        check_model(vae, settings)
        self.vae = vae.float().to(self.device).train()
        if settings.is_decoder_only:
            for part in (self.vae.encoder, self.vae.quant_conv):
                part.requires_grad_(False)
        self.teacher = None
        if settings.align_with and not settings.is_decoder_only:
            teacher = AutoencoderKL.from_pretrained(settings.align_with).float()
            self.teacher = teacher.to(self.device).eval().requires_grad_(False)
        self.optimizers = build_optimizers(self.vae, settings.optimizer.kind)
        self.step = 0

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
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate
        seed = self.settings.training.seed
        generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + self.step)
        x = self.batch(TRAINING, self.step)
        is_mixed = self.settings.training.mixed_precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_mixed):
            loss, y = self.compute_loss(x, generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}; lower optimizer.learning_rate "
                f"(now {learning_rate:g}) and run again to continue from the last saved state"
            )
        self.vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item(), psnr(x, y)

    def compute_loss(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss and reconstruction of a batch."""
        weights = self.settings.loss
        if self.settings.is_decoder_only:
            noise = self.settings.training.decoder_noise
            return decoder_loss(self.vae, x, weights, generator, noise)
        return autoencoder_loss(self.vae, x, weights, generator, self.teacher)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        settings = self.settings.optimizer
        warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        decay = 0.5 * (1 + math.cos(math.pi * step / self.settings.training.steps))
        return settings.learning_rate * warmup * decay

    def batch(self, stream: int, step: int) -> Tensor:
        """Pictures or clips, where the model is."""
        return self.sampler.batch(stream, step).to(self.device)

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> float:
        """Reconstruct held-out crops from the posterior's mean; returns the mean PSNR in dB."""
        self.vae.eval()
        values: list[float] = []
        for index in range(batches):
            x = self.batch(EVALUATION, index)
            y = self.vae.decode(self.vae.encode(x).latent_dist.mean).sample
            values.extend(psnr(*pair) for pair in zip(x, y, strict=True))
            if index == 0:
                save_comparison(x, y, self.output_dir / "comparison.png")
        self.vae.train()
        return sum(values) / len(values)

    def export(self) -> None:
        """Adjust the latents of a copy of the model, if they are its own, and write it."""
        settings = self.settings.export
        vae = without_matrices(self.vae).eval().requires_grad_(False)
        if not self.settings.is_decoder_only:
            if settings.posterior_scale != 1:
                scale_posterior(vae, settings.posterior_scale)
            if self.teacher is not None:
                vae.register_to_config(scaling_factor=1.0, shift_factor=None)
            else:
                batches = (self.batch(MEASUREMENT, k) for k in range(settings.measured_batches))
                whiten_latents(vae, *measure_latents(vae, batches))
        nn.Module.to(vae, dtype=getattr(torch, settings.dtype))
        save_model(vae, self.model_dir)

    def save_state(self) -> None:
        """Write the training state and the model of this step."""
        state = {
            "step": self.step,
            "model": self.vae.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "settings": {
                name: getattr(self.settings, name)
                for name in ("model_class", "model", "init_from", "align_with")
            },
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
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
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
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
