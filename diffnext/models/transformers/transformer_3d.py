"""Autoregression over frames and over sets of tokens: generation and training of NOVA.

Paper: "Autoregressive Video Generation without Vector Quantization", arXiv:2412.14169.

Shapes: B batch, P guidance passes, T latent frames, C latent channels, h w latent size, p patch
size, N image tokens, Nv video tokens, D encoder width, Dd head width, Lc condition tokens,
n tokens predicted in one step, R loss repeats. Guided batches are pass-major.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm import tqdm

from diffnext.models.attention import BlockCausalMask, KVCache
from diffnext.models.diffusion_mlp import Modulation
from diffnext.models.embeddings import RotationTables, gather_tokens, scatter_tokens
from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.models.vision_transformer import set_checkpointing
from diffnext.schedulers.denoising_run import DenoisingRun
from diffnext.schedulers.linear_update import LinearUpdate, linear_updates

__all__ = ["DenoisingStep", "GenerationMonitor", "GenerationRequest", "Transformer3DModel"]

Generators = torch.Generator | list[torch.Generator] | None
MAX_MODULATION_BYTES = 2**26  # of all tokens of a set; less only makes more, smaller products


class GenerationMonitor:
    """Follows a generation; this one lets it pass.

    Attributes:
        is_stopped: Whether to stop after the current step.
    """

    is_stopped = False

    def on_step(self, frame: int, step: int, latents: Tensor) -> Tensor:
        """Look at, or replace, the frame that is being filled.

        Args:
            frame: Index of the latent frame.
            step: Index of the set of tokens that was just predicted.
            latents: The frame, (B, C, h, w); zero where nothing is predicted yet.

        Returns:
            The frame to go on with; the same object when nothing is replaced.
        """
        return latents


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Everything one generation needs.

    Attributes:
        condition: Text, label and motion tokens, [conditional || null] with guidance,
            (2B or B, Lc, D).
        latent_shape: (B, C, h, w).
        num_preds: Tokens revealed at each step of a frame; sums to N. Zeros are skipped.
        num_diffusion_steps: Denoising steps of each set.
        max_latent_length: Frames T of the result.
        latents: Given first frames, each (B, C, h, w).
        guidance: Guidance weights.
        generator: Source of every draw; a list gives each sample its own.
        show_frames: Whether to draw a progress bar over frames.
        show_sets: Whether to draw a progress bar over the sets of a frame.
        progress_bar_config: Arguments of the bars, as of tqdm.
        monitor: Told of every step.
    """

    condition: Tensor
    latent_shape: tuple[int, int, int, int]
    num_preds: tuple[int, ...]
    num_diffusion_steps: int = 25
    max_latent_length: int = 1
    latents: tuple[Tensor, ...] = ()
    guidance: GuidanceScaler
    generator: Generators = None
    show_frames: bool = True
    show_sets: bool = False
    progress_bar_config: Mapping[str, Any] = field(default_factory=dict)
    monitor: GenerationMonitor = field(default_factory=GenerationMonitor)

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: Naming the part that does not.
        """
        batch = self.latent_shape[0]
        rows = batch * (2 if self.guidance.num_passes > 1 else 1)
        if self.condition.size(0) != rows:
            raise ValueError(
                f"{batch} samples with guidance scale {self.guidance.guidance_scale} need {rows} "
                f"condition rows, got {self.condition.size(0)}"
            )
        if len(self.latents) > self.max_latent_length:
            raise ValueError(
                f"{len(self.latents)} latent frames are given, but max_latent_length is "
                f"{self.max_latent_length}"
            )
        for latent in self.latents:
            if tuple(latent.shape) != self.latent_shape:
                raise ValueError(
                    f"given latent frames must be {self.latent_shape}, got {tuple(latent.shape)}"
                )
        if isinstance(self.generator, list) and len(self.generator) != batch:
            raise ValueError(f"{len(self.generator)} generators are given for {batch} samples")


@dataclass(frozen=True)
class DenoisingStep:
    """One timestep of the sampling schedule.

    Attributes:
        timestep: As the scheduler lists it.
        value: The same as a number.
        embedding: The same, projected by the diffusion head, (1, 1, Dd).
        update: The scheduler's step, if it is linear.
    """

    timestep: Any
    value: float
    embedding: Tensor
    update: LinearUpdate | None = None


class SetEncoder:
    """Runs the image encoder for the sets of tokens of one frame, one after the other.

    With ``guidance.guidance_reuse`` above 1, the passes without the prompt run for the first of so
    many sets alone, and then for the tokens of all of them: what those passes know of the frame is
    then a few sets old (the condition cache of LazyMAR, arXiv:2503.12450).

    Args:
        image_encoder: The encoder.
        states: The video encoder's states for this frame, (P*B, Nv, D).
        rotation: Rotary tables of the frame, if the model has them.
        order: Prediction order, (B, N, 1) token ids.
        sets: Tokens of each set.
        guidance: Guidance weights.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        states: Tensor,
        rotation: RotationTables | None,
        order: Tensor,
        sets: Sequence[int],
        guidance: GuidanceScaler,
    ) -> None:
        self.image_encoder = image_encoder
        self.states = states
        self.rotation = rotation
        self.order = order
        self.guidance = guidance
        self.ends = list(itertools.accumulate(sets))
        self.kept: Tensor | None = None  # ((P-1)*B, tokens of this set and those that share, D)

    def encode(self, index: int, tokens: Tensor) -> Tensor:
        """States of the tokens of a set.

        Args:
            index: Of the set; 0, 1, ... in turn.
            tokens: The frame as far as it is known, (B, N, D).

        Returns:
            (P*B, n, D).
        """
        begin = self.ends[index - 1] if index else 0
        end = self.ends[index]
        batch = tokens.size(0)
        reuse = self.guidance.guidance_reuse if self.guidance.num_passes > 1 else 1
        if index % reuse == 0:
            last = self.ends[min(index + reuse, len(self.ends)) - 1]
            expand = self.guidance.expand
            z = self._run(expand, tokens, self.states, begin, last)
            if last == end:
                return z
            own, self.kept = z[:batch], z[batch:]
            own = own[:, : end - begin]
        else:
            own = self._run(lambda x: x, tokens, self.states[:batch], begin, end)
        shared = self.kept[:, : end - begin]
        self.kept = self.kept[:, end - begin :]
        return torch.cat([own, shared])

    def _run(
        self,
        expand: Callable[[Tensor], Tensor],
        tokens: Tensor,
        states: Tensor,
        begin: int,
        end: int,
    ) -> Tensor:
        """One call of the encoder: what was before ``begin`` is known, up to ``end`` is wanted."""
        return self.image_encoder(
            expand(tokens),
            states,
            prev_ids=expand(self.order[:, :begin]),
            pos=self.rotation,
            out_ids=expand(self.order[:, begin:end]),
        )


def draw_order(batch: int, num_tokens: int, generator: Generators, like: Tensor) -> Tensor:
    """A random order of the tokens of each sample, (B, N, 1) ids.

    Scores are drawn in the dtype of ``like``; ties keep their place on every device.
    """
    if isinstance(generator, list):
        rows = [draw_order(1, num_tokens, one, like) for one in generator]
        return torch.cat(rows)
    device = like.device if generator is None else generator.device
    scores = torch.rand(
        (batch, num_tokens, 1), generator=generator, device=device, dtype=like.dtype
    )
    return scores.to(like.device).argsort(dim=1, stable=True)


def progress_bar(
    iterable: Iterable[Any], enabled: bool, request: GenerationRequest
) -> Iterable[Any]:
    """Iterate with a progress bar when enabled."""
    return tqdm(iterable, **request.progress_bar_config) if enabled else iterable


def identity(inputs: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing of a model that no pipeline has claimed."""
    return inputs


class Transformer3DModel(nn.Module):
    """NOVA, put together from its parts.

    Args:
        video_encoder: Reads text and earlier frames.
        image_encoder: Fills one frame, set by set.
        image_decoder: Denoises each token.
        mask_embed: Vectors of hidden tokens and of the frame before the first.
        text_embed: Embeds text states; None for class-conditional models.
        label_embed: Embeds class labels; None for text-conditional models.
        video_pos_embed: Positions of the video encoder.
        image_pos_embed: Rotary positions of the image encoder; None when it has a table.
        motion_embed: Embeds motion strength; None for image models.
        noise_scheduler: Adds noise in training; set by training pipelines.
        sample_scheduler: Denoises; set by pipelines.

    Attributes:
        pipeline_preprocess: Applied to the inputs of every forward pass; set by pipelines.
        loss_repeat: How many noise levels each token is trained at in one step.
    """

    def __init__(
        self,
        video_encoder: nn.Module | None = None,
        image_encoder: nn.Module | None = None,
        image_decoder: nn.Module | None = None,
        mask_embed: nn.Module | None = None,
        text_embed: nn.Module | None = None,
        label_embed: nn.Module | None = None,
        video_pos_embed: nn.Module | None = None,
        image_pos_embed: nn.Module | None = None,
        motion_embed: nn.Module | None = None,
        noise_scheduler: Any = None,
        sample_scheduler: Any = None,
    ) -> None:
        super().__init__()
        self.video_encoder = video_encoder
        self.image_encoder = image_encoder
        self.image_decoder = image_decoder
        self.mask_embed = mask_embed
        self.text_embed = text_embed
        self.label_embed = label_embed
        self.video_pos_embed = video_pos_embed
        self.image_pos_embed = image_pos_embed
        self.motion_embed = motion_embed
        self.noise_scheduler = noise_scheduler
        self.sample_scheduler = sample_scheduler
        self.pipeline_preprocess: Callable[[dict[str, Any]], dict[str, Any]] = identity
        self.loss_repeat = 4

    def forward(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Train or generate, by the mode the model is in.

        Args:
            inputs: Left as it is. ``c`` (list of condition tokens), ``prompt`` (text states or
                prompts), ``motion_flow`` and ``fps``; in training ``x``, scaled latents (B, C, h,
                w) or (B, C, T, h, w); else ``batch_size``, ``num_preds`` and the other fields of
                :class:`GenerationRequest` and :class:`GuidanceScaler` by their names. Instead of
                all these ``frames``, an iterator of :meth:`iterate_frames`, makes one frame: a
                call, unlike the iterator alone, also works on offloaded weights.

        Returns:
            Losses in training, else ``x``: latents, (B, C, T, h, w), or the next frame, (B, C, h,
            w), None behind the last.
        """
        if "frames" in inputs:
            return {"x": next(inputs["frames"], None)}
        inputs = self.pipeline_preprocess(dict(inputs))
        if self.training:
            return self.train_video(inputs["x"], self.embed_condition(inputs))
        return {"x": torch.stack(list(self.generate_frames(self.preprocess(inputs))), dim=2)}

    @torch.no_grad()
    def iterate_frames(self, inputs: dict[str, Any]) -> Iterator[Tensor]:
        """Generate frame by frame.

        Args:
            inputs: As for :meth:`forward`.

        Yields:
            Latents, (B, C, h, w), given frames included.
        """
        yield from self.generate_frames(self.preprocess(inputs))

    def preprocess(self, inputs: dict[str, Any]) -> GenerationRequest:
        """Parse the inputs of a generation.

        Raises:
            ValueError: If they do not fit together.
        """
        guidance = GuidanceScaler(**inputs)
        condition = self.embed_condition(inputs, is_guided=guidance.num_passes > 1)
        return GenerationRequest(
            condition=condition,
            latent_shape=self._latent_shape(inputs),
            num_preds=tuple(int(n) for n in inputs["num_preds"]),
            num_diffusion_steps=inputs.get("num_diffusion_steps", 25),
            max_latent_length=inputs.get("max_latent_length", 1),
            latents=tuple(inputs.get("latents") or ()),
            guidance=guidance,
            generator=inputs.get("generator"),
            show_frames=inputs.get("tqdm1", True),
            show_sets=inputs.get("tqdm2", False),
            progress_bar_config=inputs.get("progress_bar_config") or {},
            monitor=inputs.get("monitor") or GenerationMonitor(),
        )

    def _latent_shape(self, inputs: dict[str, Any]) -> tuple[int, int, int, int]:
        if inputs.get("x") is not None:
            return tuple(inputs["x"].shape)
        encoder = self.image_encoder
        return (inputs["batch_size"], encoder.image_dim, *encoder.image_size)

    def embed_condition(self, inputs: dict[str, Any], is_guided: bool = False) -> Tensor:
        """Condition tokens from ready ones, prompts and motion.

        Args:
            inputs: Any of ``c``, ``prompt``, ``motion_flow`` and ``fps``.
            is_guided: Whether rows are [conditional || null], so that motion counts twice.

        Returns:
            (rows, Lc, D).

        Raises:
            ValueError: If nothing conditions the model.
        """
        tokens = list(inputs.get("c") or [])
        if inputs.get("prompt") is not None and self.text_embed is not None:
            tokens.append(self.text_embed(inputs["prompt"]))
        if not tokens:
            raise ValueError("a prompt or ready condition tokens are needed, got neither")
        if inputs.get("motion_flow") is not None and self.motion_embed is not None:
            rows = tokens[-1].size(0) // (2 if is_guided else 1)
            values = [inputs["motion_flow"], inputs.get("fps")]
            flow, fps = (per_sample(value, rows, 2 if is_guided else 1) for value in values)
            tokens.append(self.motion_embed(tokens[-1], flow, fps))
        return torch.cat(tokens, dim=1)

    # Generation

    @torch.no_grad()
    def generate_frames(self, request: GenerationRequest) -> Iterator[Tensor]:
        """Generate frame after frame; given frames are seen, not made.

        A monitor that stops ends the video with the last whole frame; the first frame is
        returned as far as it is filled.

        Yields:
            Latents, (B, C, h, w), given frames included.

        Raises:
            ValueError: If ``num_preds`` does not cover the frame.
        """
        num_tokens = self._check_num_preds(request)
        guidance = request.guidance
        condition = guidance.expand_text(request.condition)
        steps = self.prepare_steps(request.num_diffusion_steps, condition)
        total = request.max_latent_length
        embeds, positions = self._frame_positions(request.latent_shape, total, condition.device)
        cache = self._video_cache(request.latent_shape, condition, total) if total > 1 else None
        begin, _ = self.mask_embed()
        order = None
        first_states = None
        frame = None
        for t in progress_bar(range(total), request.show_frames, request):
            tokens = self._previous_tokens(frame, begin, request.latent_shape)
            if embeds is not None:
                tokens = self.video_pos_embed(tokens + embeds[t])
            states = self.video_encoder(
                guidance.expand(tokens, padding=begin),
                condition if t == 0 else None,
                pos=positions[t],
                cache=cache,
            )
            first_states = states if t == 0 else first_states
            if t < len(request.latents):
                frame = request.latents[t].to(condition)
                yield frame
                continue
            if order is None:
                order = draw_order(
                    request.latent_shape[0], num_tokens, request.generator, condition
                )
            mixed = self.mix_states(first_states, states) if t > 0 else states
            frame = self.generate_frame(t, mixed, order, steps, request)
            is_stopped = request.monitor.is_stopped
            if not is_stopped or t == 0:
                yield frame
            if is_stopped:
                return

    def generate_frame(
        self,
        frame: int,
        states: Tensor,
        order: Tensor,
        steps: Sequence[DenoisingStep],
        request: GenerationRequest,
    ) -> Tensor:
        """Fill one frame, set by set.

        Args:
            frame: Its index.
            states: The video encoder's states for this frame, (P*B, Nv, D).
            order: Prediction order, (B, N, 1) token ids.
            steps: The sampling schedule.
            request: What to generate.

        Returns:
            Latents, (B, C, h, w).
        """
        guidance = request.guidance
        batch = request.latent_shape[0]
        embed = self.image_encoder.patch_embed
        hw = self._grid(embed, request.latent_shape)
        rotation = None
        if self.image_pos_embed is not None:
            pos = self.image_pos_embed.get_pos(1, 1, hw)
            rotation = self.image_encoder.rotation(pos, states.size(1), states.dtype)
        _, hidden = self.mask_embed()
        tokens = hidden.expand(batch, order.size(1), -1)
        patches = states.new_zeros(batch, order.size(1), self.image_decoder.head.out_features)
        sets = [n for n in request.num_preds if n > 0]
        encoder = SetEncoder(self.image_encoder, states, rotation, order, sets, guidance)
        done = 0
        for index, n in enumerate(progress_bar(sets, request.show_sets, request)):
            ids = order[:, done : done + n]
            z = encoder.encode(index, tokens)
            noise = randn_tensor(
                request.latent_shape, request.generator, device=z.device, dtype=z.dtype
            )
            scale = guidance.scale_at((index + 1) / len(sets))
            predicted = self.denoise(z, noise, ids, steps, guidance, scale, request.generator)
            patches = scatter_tokens(patches, ids, predicted)
            done += n
            latents = embed.unpatchify(patches, hw)
            replaced = request.monitor.on_step(frame, index, latents)
            if request.monitor.is_stopped:
                return replaced
            if replaced is not latents:
                patches = embed.patchify(replaced)
                ids = order[:, :done]
                predicted = gather_tokens(patches, ids)
            tokens = scatter_tokens(tokens, ids, embed.embed_patches(predicted))
        return embed.unpatchify(patches, hw)

    def denoise(
        self,
        z: Tensor,
        noise: Tensor,
        ids: Tensor,
        steps: Sequence[DenoisingStep],
        guidance: GuidanceScaler,
        guidance_scale: float | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Denoise one set of tokens from pure noise.

        Args:
            z: The image encoder's states of these tokens, (P*B, n, D).
            noise: Start noise of the whole frame, (B, C, h, w).
            ids: Tokens to predict, (B, n, 1).
            steps: The sampling schedule.
            guidance: Guidance weights.
            guidance_scale: Weight of the prompt at this set; the full one when None.
            generator: Source of a stochastic scheduler's noise.

        Returns:
            Patches of the predicted tokens, (B, n, p*p*C).
        """
        decoder = self.image_decoder
        condition = decoder.time_cond_embed.condition_proj(z)
        condition = condition.unflatten(0, (guidance.num_passes, -1))  # (P, B, n, Dd)
        is_linear = all(step.update is not None for step in steps)
        denoise = self._denoise_tokens
        if guidance.guidance_renorm < 1 or not is_linear:
            denoise = self._denoise_frame
        return denoise(condition, noise, ids, steps, guidance, guidance_scale, generator)

    def _denoise_tokens(
        self,
        condition: Tensor,
        noise: Tensor,
        ids: Tensor,
        steps: Sequence[DenoisingStep],
        guidance: GuidanceScaler,
        guidance_scale: float | None,
        generator: Generators,
    ) -> Tensor:
        """:meth:`denoise` with the tokens alone; fresh noise is still drawn for whole frames."""
        embed = self.image_decoder.patch_embed
        sample = gather_tokens(embed.patchify(noise), ids)  # (B, n, p*p*C)
        for step, current, modulations in self._modulated_steps(condition, steps, guidance):
            predicted = self.image_decoder.denoise_step(sample, modulations).flatten(0, 1)
            predicted = current.scale(predicted, guidance_scale)
            update = step.update
            if update.sample_weight != 1:
                sample = sample * update.sample_weight
            sample = torch.add(sample, predicted, alpha=update.prediction_weight)
            if update.noise_weight:
                fresh = randn_tensor(noise.shape, generator, noise.device, noise.dtype)
                fresh = gather_tokens(embed.patchify(fresh), ids)
                sample = torch.add(sample, fresh, alpha=update.noise_weight)
        return sample

    def _denoise_frame(
        self,
        condition: Tensor,
        noise: Tensor,
        ids: Tensor,
        steps: Sequence[DenoisingStep],
        guidance: GuidanceScaler,
        guidance_scale: float | None,
        generator: Generators,
    ) -> Tensor:
        """:meth:`denoise` for any scheduler, and for guidance that is renormalised.

        The rest of the frame takes part in the scheduler's steps and in norms, but not in the
        result: rows are selected, so that nothing they hold can leak out.
        """
        run = DenoisingRun(self.sample_scheduler, generator)
        embed = self.image_decoder.patch_embed
        hw = embed.grid(noise)
        sample = run.start(noise)
        for step, current, modulations in self._modulated_steps(condition, steps, guidance):
            patches = embed.patchify(run.model_input(sample, step.timestep))  # (B, N, p*p*C)
            noisy = gather_tokens(patches, ids)  # (B, n, p*p*C)
            predicted = self.image_decoder.denoise_step(noisy, modulations).flatten(0, 1)
            output = scatter_tokens(current.expand(patches), current.expand(ids), predicted)
            output = embed.unpatchify(current.scale(output, guidance_scale), hw)
            sample = run.step(output, step.timestep, sample)
        return gather_tokens(embed.patchify(sample), ids)

    def _modulated_steps(
        self, condition: Tensor, steps: Sequence[DenoisingStep], guidance: GuidanceScaler
    ) -> Iterator[tuple[DenoisingStep, GuidanceScaler, list[Modulation]]]:
        """All steps with the guidance in force and what the head computes from the condition.

        The head's modulations are computed for many steps at once, as memory allows.

        Args:
            condition: Projected condition of the tokens, (P, B, n, Dd).
            steps: The sampling schedule.
            guidance: Guidance weights.
        """
        for is_off, group in itertools.groupby(steps, lambda step: guidance.is_off(step.value)):
            part_steps = list(group)
            part_guidance = GuidanceScaler() if is_off else guidance
            part_condition = condition[:1] if is_off else condition
            numbers = part_condition.numel() * (3 * len(self.image_decoder.blocks) + 2)
            at_once = max(1, MAX_MODULATION_BYTES // (numbers * condition.element_size()))
            for start in range(0, len(part_steps), at_once):
                chunk = part_steps[start : start + at_once]
                times = torch.stack([step.embedding for step in chunk])  # (S, 1, 1, Dd)
                z = part_condition + times.unsqueeze(1)  # (S, P, B, n, Dd)
                modulations = self.image_decoder.prepare_modulations(z)
                for index, step in enumerate(chunk):
                    yield step, part_guidance, [one.select(index) for one in modulations]

    def prepare_steps(self, num_steps: int, like: Tensor) -> list[DenoisingStep]:
        """The sampling schedule with its timesteps embedded once, for dtype and device of `like`.

        Raises:
            ValueError: If no scheduler is set.
        """
        scheduler = self.sample_scheduler
        if scheduler is None:
            raise ValueError("the model has no sample_scheduler: a pipeline sets it")
        scheduler.set_timesteps(num_steps)
        embed = self.image_decoder.time_cond_embed
        values = [float(timestep) for timestep in scheduler.timesteps]
        table = embed.embed_timestep(torch.tensor(values, device=like.device), like.dtype)
        updates = linear_updates(scheduler) or [None] * len(values)
        return [
            DenoisingStep(timestep, value, row.unsqueeze(0), update)
            for timestep, value, row, update in zip(
                scheduler.timesteps, values, table, updates, strict=True
            )
        ]

    def _check_num_preds(self, request: GenerationRequest) -> int:
        rows, columns = self._grid(self.image_encoder.patch_embed, request.latent_shape)
        total = sum(n for n in request.num_preds if n > 0)
        if total != rows * columns:
            raise ValueError(
                f"num_preds must sum to the {rows * columns} tokens of a frame, got {total}"
            )
        return total

    def _video_cache(
        self, latent_shape: Sequence[int], condition: Tensor, num_frames: int
    ) -> KVCache:
        encoder = self.video_encoder
        rows, columns = self._grid(encoder.patch_embed, latent_shape)
        capacity = condition.size(1) + num_frames * rows * columns
        attention = encoder.blocks[0].attn
        shape = (condition.size(0), attention.num_heads, capacity, attention.head_dim)
        return KVCache(len(encoder.blocks), shape, like=condition)

    def _previous_tokens(
        self, frame: Tensor | None, begin: Tensor, latent_shape: Sequence[int]
    ) -> Tensor:
        """What the video encoder reads behind a frame, at first ``begin``: (B, Nv, D)."""
        embed = self.video_encoder.patch_embed
        if frame is not None:
            return embed(frame)
        rows, columns = self._grid(embed, latent_shape)
        return begin.expand(latent_shape[0], rows * columns, -1)

    def _frame_positions(
        self, latent_shape: Sequence[int], num_frames: int, device: torch.device
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Time embeddings (T, 1, D) of absolute positions, or the rotary ones of each frame."""
        if self.image_pos_embed is None:
            return self.video_pos_embed.get_time_embed(num_frames, device), [None] * num_frames
        hw = self._grid(self.video_encoder.patch_embed, latent_shape)
        return None, self.video_pos_embed.get_pos(num_frames, 1, hw).chunk(num_frames, dim=1)

    @staticmethod
    def _grid(embed: nn.Module, latent_shape: Sequence[int]) -> tuple[int, int]:
        return latent_shape[-2] // embed.patch_size, latent_shape[-1] // embed.patch_size

    # Both

    def mix_states(self, first: Tensor, states: Tensor) -> Tensor:
        """The first frame's states modulated by a later frame's; those alone without a mixer."""
        mixer = self.video_encoder.mixer
        return states if isinstance(mixer, nn.Identity) else mixer(first, states)

    # Training

    def train_video(self, x: Tensor, c: Tensor) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            x: Scaled latents, (B, C, h, w) or (B, C, T, h, w).
            c: Condition tokens, (B, Lc, D).

        Returns:
            ``loss`` for images; for videos ``loss_t2i`` (first frame, from text alone) and
            ``loss_i2i`` (later frames).
        """
        video = x.unsqueeze(2) if x.ndim == 4 else x
        states = self.encode_video(video, c)
        frames = video.transpose(1, 2).flatten(0, 1)  # (B*T, C, h, w)
        embed = self.image_encoder.patch_embed
        tokens = embed(frames)
        mask = self.mask_embed.draw_mask(tokens)
        pos = None
        if self.image_pos_embed is not None:
            pos = self.image_pos_embed.get_pos(1, 1, embed.grid(frames))
        z = self.image_encoder(
            self.mask_embed.apply_mask(tokens, mask.hidden),
            states,
            prev_ids=mask.known_ids,
            pos=pos,
            out_ids=mask.hidden_ids,
        )
        return self.get_losses(z, frames, mask.hidden_ids, num_frames=video.size(2))

    def encode_video(self, x: Tensor, c: Tensor) -> Tensor:
        """States of every frame from text and earlier frames, all at once.

        Args:
            x: Latents, (B, C, T, h, w).
            c: Condition tokens, (B, Lc, D).

        Returns:
            (B*T, Nv, D), a sample's frames in a row.
        """
        batch, num_frames = x.size(0), x.size(2)
        seen = self.video_encoder.patch_embed(x[:, :, : num_frames - 1])  # (B, T-1, Nv, D)
        rows, columns = self._grid(self.video_encoder.patch_embed, x.shape)
        begin, _ = self.mask_embed()
        begin = begin.expand(batch, 1, rows * columns, -1)
        tokens = self.video_pos_embed(torch.cat([begin.to(seen.dtype), seen], dim=1))
        pos = None
        if self.image_pos_embed is not None:
            pos = self.video_pos_embed.get_pos(num_frames, 1, (rows, columns))
        mask = None
        if num_frames > 1:
            mask = BlockCausalMask.of_frames(num_frames, rows * columns, c.size(1))
        states = self.video_encoder(tokens.flatten(1, 2), c, pos=pos, mask=mask)
        states = states.unflatten(1, (num_frames, rows * columns))
        first, later = states[:, :1], states[:, 1:]
        if num_frames > 1:
            states = torch.cat([first, self.mix_states(first, later)], dim=1)
        return states.flatten(0, 1)

    def get_losses(
        self, z: Tensor, frames: Tensor, hidden_ids: Tensor, num_frames: int = 1
    ) -> dict[str, Tensor]:
        """Diffusion losses of the hidden tokens, at several noise levels each.

        Noise and levels are drawn for every token, as NOVA always did; only the hidden ones pass
        through the diffusion head.

        Args:
            z: The image encoder's states of the hidden tokens, (B*T, n, D).
            frames: Clean latents, (B*T, C, h, w).
            hidden_ids: The tokens to be predicted, (B*T, n, 1).
            num_frames: Frames T of a sample.

        Returns:
            As for :meth:`train_video`.

        Source: MAR, arXiv:2406.11838, section 3.2; flow matching target noise - data.
        """
        scheduler = self.noise_scheduler
        decoder = self.image_decoder
        ids = hidden_ids.repeat(self.loss_repeat, 1, 1)  # (R*B*T, n, 1)
        clean = decoder.patch_embed.patchify(frames).repeat(self.loss_repeat, 1, 1)
        noise = gather_tokens(torch.randn_like(clean), ids)  # (R*B*T, n, p*p*C)
        levels = scheduler.sample_timesteps(clean.shape[:2], device=clean.device)
        clean, levels = gather_tokens(clean, ids), levels.gather(1, ids.squeeze(-1))
        noisy, timestep = scheduler.corrupt(clean, noise, levels)
        target = prediction_target(scheduler, clean, noise)
        condition = decoder.time_cond_embed.condition_proj(z)
        time = decoder.time_cond_embed.embed_timestep(timestep, z.dtype)
        predicted = decoder.denoise(noisy, condition.repeat(self.loss_repeat, 1, 1) + time)
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
        """Compile the blocks of all three parts, and the denoising step.

        Args:
            **options: Of ``torch.compile``; by default shapes are dynamic, as sets of tokens grow.
        """
        options = {"dynamic": True, **options}
        for part in (self.video_encoder, self.image_encoder, self.image_decoder):
            for block in part.blocks:
                block.compile(**options)
        self.image_decoder.compile_denoising(**options)

    def set_gradient_checkpointing(self, level: int) -> None:
        """Trade time for memory in training.

        Args:
            level: 0 off, 1 video encoder, 2 also image encoder, 3 also diffusion head.

        Raises:
            ValueError: If the level is none of these.
        """
        if level not in range(4):
            raise ValueError(f"gradient_checkpointing must be 0, 1, 2 or 3, got {level!r}")
        parts = [self.video_encoder, self.image_encoder, self.image_decoder]
        for needed, part in enumerate(parts, start=1):
            if part is not None:
                set_checkpointing(part.blocks, level >= needed)


def per_sample(value: Any, batch: int, repeats: int) -> list[float] | None:
    """A number or one a sample as a list, repeated for every conditional pass.

    Raises:
        ValueError: If there are neither one nor ``batch`` values.
    """
    if value is None:
        return None
    values = torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist()
    if len(values) not in (1, batch):
        raise ValueError(f"motion needs 1 or {batch} values, got {len(values)}")
    values = values * batch if len(values) == 1 else values
    return values * repeats


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor) -> Tensor:
    """What the diffusion head learns: the noise, or the flow from data to noise.

    Raises:
        ValueError: For schedulers of another prediction type.
    """
    prediction_type = getattr(scheduler.config, "prediction_type", "flow")
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "flow":
        return noise - clean
    raise ValueError(
        f"prediction_type must be 'epsilon' or 'flow' to train, got {prediction_type!r}"
    )
