"""NOVA's networks: what conditions them, how they read frames, and the losses they learn from.

:mod:`diffnext.pipelines.nova.sampling` draws frames with them.

Paper: "Autoregressive Video Generation without Vector Quantization", arXiv:2412.14169.

Shapes: B batch, T latent frames, C latent channels, h w latent size, p patch size, N image tokens,
Nv video tokens, D encoder width, Lc condition tokens, n hidden tokens, R loss repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from diffnext.models.attention import BlockCausalMask
from diffnext.models.capture import Programs, TracedPrograms
from diffnext.models.compilation import check_options
from diffnext.models.diffusion_mlp import DiffusionMLP
from diffnext.models.embeddings import (
    LabelEmbed,
    MaskEmbed,
    MotionEmbed,
    RotaryEmbed3D,
    TextEmbed,
    VideoPosEmbed,
    gather_tokens,
)
from diffnext.models.quantization import is_quantized
from diffnext.models.vision_transformer import VisionTransformer, set_checkpointing

__all__ = ["Transformer3DModel"]


def identity(inputs: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing of a model as long as no training pipeline has set its own."""
    return inputs


class Transformer3DModel(nn.Module):
    """NOVA, put together from its parts.

    Args:
        video_encoder: ``VisionTransformer`` that reads text and earlier frames.
        image_encoder: ``VisionTransformer`` that fills one frame, set by set.
        image_decoder: ``DiffusionMLP`` that denoises each token.
        mask_embed: Vectors of hidden tokens and of the frame before the first.
        text_embed: Embeds text states; None for class-conditional models.
        label_embed: Embeds class labels; None for text-conditional models.
        video_pos_embed: Positions of the video encoder.
        image_pos_embed: Rotary positions of the image encoder; None when it has a table.
        motion_embed: Embeds motion strength; None for image models.
        noise_scheduler: Adds noise in training, for callers of :meth:`forward` who pass none.
        sample_scheduler: Denoises, for callers who draw with :meth:`forward`.

    Attributes:
        pipeline_preprocess: Applied to the inputs of :meth:`forward`.
        loss_repeat: How many noise levels each token is trained at in one step, for callers of
            :meth:`forward` who pass no number.
        context_noise: Largest share of noise, 0 to 1, in earlier frames in training; see
            :meth:`disturb`.
        programs: Recorded parts of drawings, if recording is on; see :meth:`capture_drawing`.
    """

    def __init__(
        self,
        video_encoder: Any = None,
        image_encoder: Any = None,
        image_decoder: Any = None,
        mask_embed: Any = None,
        text_embed: TextEmbed | None = None,
        label_embed: LabelEmbed | None = None,
        video_pos_embed: Any = None,
        image_pos_embed: RotaryEmbed3D | None = None,
        motion_embed: MotionEmbed | None = None,
        noise_scheduler: Any = None,
        sample_scheduler: Any = None,
    ) -> None:
        super().__init__()
        self.video_encoder: VisionTransformer = video_encoder
        self.image_encoder: VisionTransformer = image_encoder
        self.image_decoder: DiffusionMLP = image_decoder
        self.mask_embed: MaskEmbed = mask_embed
        self.text_embed: TextEmbed | None = text_embed
        self.label_embed: LabelEmbed | None = label_embed
        self.video_pos_embed: VideoPosEmbed | RotaryEmbed3D = video_pos_embed
        self.image_pos_embed: RotaryEmbed3D | None = image_pos_embed
        self.motion_embed: MotionEmbed | None = motion_embed
        self.noise_scheduler = noise_scheduler
        self.sample_scheduler = sample_scheduler
        self.pipeline_preprocess: Callable[[dict[str, Any]], dict[str, Any]] = identity
        self.loss_repeat = 4
        self.context_noise = 0.0
        self.programs: Programs | None = None

    def forward(self, inputs: Mapping[str, Any] | Callable[[], Any]) -> Any:
        """Train or draw, by the mode the model is in.

        Args:
            inputs: Left as it is. ``prompt`` (text states, class ids, or prompts for
                ``text_embed.encoders``), ``c`` (a list of condition tokens), ``motion_flow`` and
                ``fps``. In training also ``x``, scaled latents (B, C, h, w) or (B, C, T, h, w),
                and, to override the attributes, ``noise_scheduler`` and ``loss_repeat``; other
                features of a batch are ignored. In evaluation mode what
                :func:`diffnext.pipelines.nova.sampling.draw_inputs` takes.

                Or a function without arguments, which is run: whatever uses the weights outside
                a training step is called this way, so the hooks of offloading and sharding see
                it.

        Returns:
            Losses in training, otherwise ``x``: latents, (B, C, T, h, w); or the function's result.

        Raises:
            ValueError: If the inputs do not fit together, or a drawing has no use for one.
        """
        if callable(inputs):
            return inputs()
        values = self.pipeline_preprocess(dict(inputs))
        if not self.training:
            from diffnext.pipelines.nova.sampling import draw_inputs

            return {"x": draw_inputs(self, values)}
        condition = self.encode_condition(
            values.get("prompt"), values.get("c"), values.get("motion_flow"), values.get("fps")
        )
        if values.get("x") is None:
            raise ValueError(f"a training batch needs latents as 'x', got {sorted(values)}")
        scheduler = values.get("noise_scheduler", self.noise_scheduler)
        repeats = values.get("loss_repeat", self.loss_repeat)
        return self.train_video(values["x"], condition, scheduler, repeats)

    def encode_condition(
        self,
        prompt: Any = None,
        c: Sequence[Tensor] | None = None,
        motion_flow: Any = None,
        fps: Any = None,
        is_guided: bool = False,
    ) -> Tensor:
        """Condition tokens of a batch, in the order [c || prompt || motion].

        Args:
            prompt: Text states (rows, L, D_text), a list of them or of prompts; for models of
                classes their ids (rows,).
            c: Ready condition tokens, each (rows, L, D).
            motion_flow: Motion strength, one or one per sample; None adds no motion tokens.
            fps: Frames per second, one or one per sample; 12 when None.
            is_guided: Whether rows are [conditional || null]; motion then counts twice.

        Returns:
            (rows, Lc, D).

        Raises:
            ValueError: If nothing conditions the model, or numbers of rows differ.
        """
        tokens = list(c or [])
        if prompt is not None and self.text_embed is not None:
            tokens.append(self.text_embed(prompt))
        elif prompt is not None and self.label_embed is not None:
            tokens.append(self.label_embed(torch.as_tensor(prompt)))
        if not tokens:
            raise ValueError("a prompt or ready condition tokens are needed, got neither")
        if motion_flow is not None and self.motion_embed is not None:
            passes = 2 if is_guided else 1
            samples = tokens[-1].size(0) // passes
            flow = per_sample("motion_flow", motion_flow, samples, passes)
            frequency = per_sample("fps", fps, samples, passes)
            tokens.append(self.motion_embed(tokens[-1], flow, frequency))
        rows = sorted({len(part) for part in tokens})
        if len(rows) > 1:
            raise ValueError(f"c and prompt must have equally many rows, got {rows}")
        return torch.cat(tokens, dim=1)

    def encode_video(self, x: Tensor, c: Tensor) -> Tensor:
        """States of every frame from text and earlier frames, all at once.

        Args:
            x: Latents, (B, C, T, h, w).
            c: Condition tokens, (B, Lc, D).

        Returns:
            (B*T, Nv, D), a sample's frames in a row.
        """
        batch, num_frames = x.size(0), x.size(2)
        rows, columns = self.video_encoder.patch_embed.grid(x.shape)
        seen = self.video_encoder.patch_embed(x[:, :, : num_frames - 1])  # (B, T-1, Nv, D)
        begin, _ = self.mask_embed()
        begin = begin.expand(batch, 1, rows * columns, -1)
        tokens = self.video_pos_embed(torch.cat([begin.to(seen.dtype), seen], dim=1))
        pos = None
        if isinstance(self.video_pos_embed, RotaryEmbed3D):
            pos = self.video_pos_embed.get_pos(num_frames, 1, (rows, columns))
        mask = None
        if num_frames > 1:
            mask = BlockCausalMask.of_frames(num_frames, rows * columns, c.size(1))
        states = self.video_encoder(tokens.flatten(1, 2), c, pos=pos, mask=mask)
        states = states.unflatten(1, (num_frames, rows * columns))
        if num_frames > 1:
            mixed = self.mix_states(states[:, :1], states[:, 1:])
            states = torch.cat([states[:, :1], mixed], dim=1)
        return states.flatten(0, 1)

    def mix_states(self, first: Tensor, states: Tensor) -> Tensor:
        """The first frame's states modulated by a later frame's; without a mixer, the latter."""
        mixer = self.video_encoder.mixer
        return states if isinstance(mixer, nn.Identity) else mixer(first, states)

    def train_video(
        self, x: Tensor, c: Tensor, noise_scheduler: Any, loss_repeat: int = 4
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            x: Scaled latents, (B, C, h, w) or (B, C, T, h, w).
            c: Condition tokens, (B, Lc, D).
            noise_scheduler: Adds noise: one of diffnext's schedulers.
            loss_repeat: Noise levels R of each token.

        Returns:
            ``loss`` for images; for videos ``loss_t2i`` (first frame, from text only) and
            ``loss_i2i`` (later frames).
        """
        video = x.unsqueeze(2) if x.ndim == 4 else x
        states = self.encode_video(self.disturb(video), c)
        frames = video.transpose(1, 2).flatten(0, 1)  # (B*T, C, h, w)
        embed = self.image_encoder.patch_embed
        tokens = embed(frames)
        mask = self.mask_embed.draw_mask(tokens)
        pos = None
        if self.image_pos_embed is not None:
            pos = self.image_pos_embed.get_pos(1, 1, embed.grid(frames.shape))
        z = self.image_encoder(
            self.mask_embed.apply_mask(tokens, mask.hidden),
            states,
            prev_ids=mask.known_ids,
            pos=pos,
            out_ids=mask.hidden_ids,
        )
        return self.get_losses(
            z, frames, mask.hidden_ids, noise_scheduler, loss_repeat, num_frames=video.size(2)
        )

    def disturb(self, video: Tensor) -> Tensor:
        """Frames as later ones read them, (B, C, T, h, w): each with a random share of noise in it.

        A model that has only read clean frames believes its own mistakes, which then grow from
        frame to frame. The model is not told the share, which is at most ``context_noise``.

        Source: diffusion forcing (arXiv:2407.01392), here with a share for each frame of a video.
        """
        if self.context_noise == 0 or video.size(2) == 1:
            return video
        shape = (video.size(0), 1, video.size(2), 1, 1)
        share = torch.rand(shape, device=video.device, dtype=video.dtype) * self.context_noise
        return video.lerp(torch.randn_like(video), share)

    def get_losses(
        self,
        z: Tensor,
        frames: Tensor,
        hidden_ids: Tensor,
        noise_scheduler: Any,
        loss_repeat: int = 4,
        num_frames: int = 1,
    ) -> dict[str, Tensor]:
        """Diffusion losses of the hidden tokens, at several noise levels each.

        Noise and levels are drawn for every token; only the hidden ones pass through the
        diffusion head.

        Args:
            z: The image encoder's states of the hidden tokens, (B*T, n, D).
            frames: Clean latents, (B*T, C, h, w).
            hidden_ids: The tokens to be predicted, (B*T, n, 1).
            noise_scheduler: Adds noise.
            loss_repeat: Noise levels R of each token.
            num_frames: Frames T of a sample.

        Returns:
            As for :meth:`train_video`.

        Raises:
            ValueError: For schedulers of another prediction type.

        Source: MAR, arXiv:2406.11838, section 3.2; flow matching target noise - data.
        """
        decoder = self.image_decoder
        ids = hidden_ids.repeat(loss_repeat, 1, 1)  # (R*B*T, n, 1)
        clean = decoder.patch_embed.patchify(frames).repeat(loss_repeat, 1, 1)
        noise = gather_tokens(torch.randn_like(clean), ids)  # (R*B*T, n, p*p*C)
        levels = noise_scheduler.sample_timesteps(clean.shape[:2], device=clean.device)
        clean, levels = gather_tokens(clean, ids), levels.gather(1, ids.squeeze(-1))
        noisy, timestep = noise_scheduler.corrupt(clean, noise, levels)
        target = prediction_target(noise_scheduler, clean, noise)
        condition = decoder.time_cond_embed.condition_proj(z)
        time = decoder.time_cond_embed.embed_timestep(timestep, z.dtype)
        predicted = decoder.denoise(noisy, condition.repeat(loss_repeat, 1, 1) + time)
        error = (predicted.float() - target.float()).square().mean(dim=-1)  # (R*B*T, n)
        error = error / (error.numel() + 1e-5)
        if num_frames == 1:
            return {"loss": error.sum()}
        per_frame = error.unflatten(0, (-1, num_frames)).sum(dim=(0, 2))  # (T,)
        return {
            "loss_t2i": per_frame[0] * num_frames,
            "loss_i2i": per_frame[1:].sum() * num_frames / (num_frames - 1),
        }

    def compile_parts(self, **options: Any) -> None:
        """Compile the blocks of all three parts for training; without gradients they stay eager.

        Args:
            **options: Options of ``torch.compile``; shapes are dynamic by default, as sets vary.
        """
        options = {"dynamic": True, **options}
        for part in (self.video_encoder, self.image_encoder, self.image_decoder):
            part.compile_training(**options)

    def compile_drawing(self, **options: Any) -> None:
        """Compile the image encoder's blocks and the denoising step for drawing.

        On a CPU, without options, small drawings are traced instead.

        Args:
            **options: Options of ``torch.compile``.

        Raises:
            ValueError: For options that cannot work, with the reason.
        """
        check_options(options)
        is_on_cpu = get_module_execution_device(self).type == "cpu"
        if not options and is_on_cpu and not is_quantized(self):
            self.programs = TracedPrograms()
            return
        self.image_encoder.compile_blocks(**options)
        self.image_decoder.compile_denoising(**options)

    def capture_drawing(self) -> None:
        """Record each set of tokens as CUDA graphs, and replay them; see ``Programs``."""
        self.programs = Programs()

    def set_gradient_checkpointing(self, level: int) -> None:
        """Trade time for memory in training.

        Args:
            level: 0 off, 1 video encoder, 2 also image encoder, 3 also diffusion head.

        Raises:
            ValueError: If the level is none of these.
        """
        if level not in range(4):
            raise ValueError(f"gradient_checkpointing must be 0, 1, 2 or 3, got {level!r}")
        parts = (self.video_encoder, self.image_encoder, self.image_decoder)
        for needed, part in enumerate(parts, start=1):
            if part is not None:
                set_checkpointing(cast("nn.ModuleList", part.blocks), level >= needed)


def per_sample(name: str, value: Any, batch: int, repeats: int) -> list[float] | None:
    """A number or one per sample as a list, repeated for every conditional pass.

    Raises:
        ValueError: If there are neither one nor ``batch`` values, or one is NaN or infinity.
    """
    if value is None:
        return None
    values = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
    if len(values) not in (1, batch) or not values.isfinite().all():
        raise ValueError(f"{name} must be 1 or {batch} finite numbers, got {values.tolist()}")
    return values.expand(batch).tolist() * repeats


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor) -> Tensor:
    """What the diffusion head learns: the noise, or the flow from data to noise.

    Raises:
        ValueError: For schedulers of another prediction type.
    """
    prediction_type = check_prediction_type(scheduler.config)
    return noise if prediction_type == "epsilon" else noise - clean


def check_prediction_type(config: Mapping[str, Any]) -> str:
    """The prediction type of a scheduler's config, which is "flow" unless it says so.

    Raises:
        ValueError: If NOVA does not learn it.
    """
    prediction_type = config.get("prediction_type", "flow")
    if prediction_type not in ("epsilon", "flow"):
        raise ValueError(
            f"prediction_type must be 'epsilon' or 'flow' to train, got {prediction_type!r}"
        )
    return prediction_type
