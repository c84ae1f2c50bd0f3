"""From a request to latent frames, in three loops: over frames, over sets, over denoising steps.

The functions get everything as arguments and change only the run that they are given: not the
model, and not the scheduler, of which every drawing has its own copy.

Shapes: B samples, P guidance passes, T latent frames, C latent channels, h w latent size, p patch
size, N image tokens, n tokens of a set, Nv video tokens, Lc condition tokens, D encoder width,
Dd head width. Guided batches are pass-major: pass 0 of all samples, then pass 1, ...
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from pydantic import dataclasses as checked
from torch import Tensor
from tqdm import tqdm

from diffnext.models.attention import LayerKVCache
from diffnext.models.capture import Programs
from diffnext.models.compilation import FEWEST_TOKENS, pad_length, pad_tokens, repeat_last
from diffnext.models.diffusion_mlp import Modulation
from diffnext.models.embeddings import (
    RotaryEmbed3D,
    RotationTables,
    gather_tokens,
    scatter_tokens,
)
from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.models.modeling_utils import evaluating
from diffnext.models.transformers.transformer_3d import Transformer3DModel
from diffnext.models.vision_transformer import VisionTransformer
from diffnext.schedulers.denoising_run import DenoisingRun, Generators
from diffnext.schedulers.linear_update import LinearUpdate
from diffnext.utils.arguments import (
    CHECKED,
    AtLeastOne,
    AtLeastZero,
    Count,
    Flag,
    LatentFrames,
    Listed,
    OnePerSample,
    Positive,
    build_checked,
    take_checked,
)
from diffnext.utils.host_data import draw_normal, send
from diffnext.utils.messages import one_line

__all__ = [
    "GenerationRequest",
    "GenerationRun",
    "check_fit",
    "denoise",
    "draw_inputs",
    "generate_frame",
    "generate_frames",
    "own_precision",
]

T = TypeVar("T")

# For all tokens of a set; with less, products are smaller. On a CPU they should fit its caches.
MAX_MODULATION_BYTES = {"cpu": 2**26, "cuda": 2**28}


@checked.dataclass(frozen=True, kw_only=True, config={**CHECKED, "extra": "forbid"})
class GenerationRequest:
    """What to draw.

    Attributes:
        latent_shape: (B, C, h, w).
        num_preds: Tokens revealed at each step of a frame; sums to N. Zeros are skipped.
        max_latent_length: Frames T of the result.
        max_context_frames: How many of the latest frames the next one is drawn from; all if None.
        prompt: Text states or class ids, [conditional || null] with guidance, (2B or B, ...).
        c: Ready condition tokens, with the same rows, each (2B or B, L, D).
        motion_flow: Motion strength, one or one per sample; None adds no motion tokens.
        fps: Frames per second, one or one per sample.
        latents: Given first frames, each (B, C, h, w).
        guidance: Guidance weights.

    Raises:
        ValueError: Naming the part that does not fit.
    """

    latent_shape: tuple[AtLeastOne, AtLeastOne, AtLeastOne, AtLeastOne]
    num_preds: Annotated[tuple[Count, ...], Listed]
    max_latent_length: AtLeastOne = 1
    max_context_frames: AtLeastOne | None = None
    prompt: Any = None
    c: Annotated[tuple[Tensor, ...], Listed] = ()
    motion_flow: Annotated[tuple[AtLeastZero, ...], OnePerSample] | None = None
    fps: Annotated[tuple[Positive, ...], OnePerSample] | None = None
    latents: LatentFrames = ()
    guidance: GuidanceScaler = field(default_factory=GuidanceScaler)

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        batch = self.latent_shape[0]
        for name, values in (("motion_flow", self.motion_flow), ("fps", self.fps)):
            if values is not None and len(values) not in (1, batch):
                raise ValueError(f"{name} must be 1 or {batch} numbers, got {len(values)}")
        if len(self.latents) > self.max_latent_length:
            raise ValueError(
                f"{len(self.latents)} latent frames are given, but max_latent_length is "
                f"{self.max_latent_length}"
            )
        for latent in self.latents:
            if tuple(latent.shape) != self.latent_shape:
                raise ValueError(f"latents must be {self.latent_shape}, got {tuple(latent.shape)}")
            if not latent.is_floating_point():
                raise ValueError(f"latents must be floating-point numbers, got {latent.dtype}")
            if not latent.isfinite().all():  # may wait for a GPU, once, before it has work
                raise ValueError("latents must be finite, got NaN or infinity")


@dataclass(eq=False)
class GenerationRun:
    """One drawing in progress: where it draws from, what it keeps, and who follows it.

    Attributes:
        scheduler: The drawing's copy of a scheduler.
        generator: Source of every draw; a list gives each sample its own.
        on_step: Called as ``on_step(frame, step, latents)`` after every set of tokens, with the
            frame as far as it is filled, (B, C, h, w), and zeros where nothing is predicted yet.
            The drawing continues with what it returns, where tokens are predicted.
        show_frames: Whether to draw a progress bar over frames.
        show_sets: Whether to draw a progress bar over the sets of a frame.
        bar_options: Arguments of the bars, as of tqdm.
        is_stopped: Whether to stop after the current set; a video then ends with its last whole
            frame, and a first frame stays as far as it is filled.
        is_cut: Whether it stopped with tokens of a frame missing.
        order: Order of prediction, (B, N, 1) token ids; drawn at the first drawn frame.
        cache: Keys and values of earlier frames, by layer of the video encoder.
        first_states: The video encoder's states of the first frame, which a mixer modulates.
        programs: Recorded parts of drawings, if this one can use them.
    """

    scheduler: DenoisingRun
    generator: Generators = None
    on_step: Callable[[int, int, Tensor], Tensor] | None = None
    show_frames: bool = False
    show_sets: bool = False
    bar_options: Mapping[str, Any] | None = None
    is_stopped: bool = False
    is_cut: bool = False
    order: Tensor | None = None
    cache: Sequence[LayerKVCache] | None = None
    first_states: Tensor | None = None
    programs: Programs | None = None

    def bar(self, iterable: Iterable[T], is_shown: bool) -> Iterable[T]:
        """Iterate, with a progress bar if asked for."""
        return tqdm(iterable, **(self.bar_options or {})) if is_shown else iterable


class DenoisingStep(NamedTuple):
    """One timestep of the schedule.

    Attributes:
        timestep: As the scheduler lists it.
        value: The same as a number.
        update: The scheduler's step, if it is linear.
    """

    timestep: Any
    value: float
    update: LinearUpdate | None


class Schedule(NamedTuple):
    """All timesteps.

    Attributes:
        steps: In the order of denoising.
        embeddings: Their timesteps, projected by the diffusion head, (S, 1, 1, 1, Dd).
    """

    steps: Sequence[DenoisingStep]
    embeddings: Tensor


class Preparation(NamedTuple):
    """What all frames of a drawing share.

    Attributes:
        condition: Condition tokens of all passes, (P*B, Lc, D).
        schedule: The timesteps.
        time: Embeddings of the frames' times, (T, 1, D), of models with position tables.
        positions: Rotary positions of each frame, (1, Nv, 3), of models without.
    """

    condition: Tensor
    schedule: Schedule
    time: Tensor | None
    positions: Sequence[Tensor] | None


# Frames


@torch.no_grad()
def generate_frames(
    model: Transformer3DModel, request: GenerationRequest, run: GenerationRun
) -> Iterator[Tensor]:
    """Draw frame after frame; given frames are read, not drawn.

    Args:
        model: The networks. Everything that uses their weights is a call of the model, so the
            hooks of offloading and sharding see it; its mode is restored after every call.
        request: What to draw.
        run: Follows the drawing; not to be used again.

    Yields:
        Latents, (B, C, h, w), given frames included.

    Raises:
        ValueError: If ``num_preds`` does not cover the frame, or condition rows or generators do
            not fit the batch.
    """
    check_fit(model, request, run)

    def call(function: Callable[..., T], *args: Any) -> T:
        with evaluating(model):
            return model(partial(function, model, *args))

    shared = call(prepare, request, run)
    frame: Tensor | None = None
    for index in run.bar(range(request.max_latent_length), run.show_frames):
        frame = call(next_frame, request, run, shared, index, frame)
        if index == 0 or not run.is_cut:
            yield frame
        if run.is_stopped:
            return


def own_precision(model: Transformer3DModel) -> AbstractContextManager[None]:
    """Autocast as the caller has it, but off for weights in half precision.

    They do not need it, and on a CPU some operations fail with float16 under it.
    """
    if model.mask_embed.bos_token.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    return torch.autocast(get_module_execution_device(model).type, enabled=False)


def check_fit(model: Transformer3DModel, request: GenerationRequest, run: GenerationRun) -> None:
    """Check what can be checked before a drawing begins.

    Raises:
        TypeError: If the prompt is not of a kind that the model reads.
        ValueError: If shapes do not fit the model, ``num_preds`` does not cover the frame, or
            generators do not fit the batch.
    """
    channels = model.image_encoder.image_dim
    if request.latent_shape[1] != channels:
        raise ValueError(f"latents must have {channels} channels, got {request.latent_shape}")
    patch = model.image_encoder.patch_embed.patch_size
    if any(side % patch for side in request.latent_shape[-2:]):
        shape = request.latent_shape
        raise ValueError(f"the sides of latents must be multiples of {patch}, got {shape}")
    rows, columns = model.image_encoder.patch_embed.grid(request.latent_shape)
    if sum(request.num_preds) != rows * columns:
        raise ValueError(
            f"num_preds must sum to the {rows * columns} tokens of a frame, "
            f"got {sum(request.num_preds)}"
        )
    batch = request.latent_shape[0]
    if isinstance(run.generator, list) and len(run.generator) != batch:
        raise ValueError(f"{len(run.generator)} generators are given for {batch} samples")
    prompt = request.prompt
    if prompt is not None and not isinstance(prompt, (Tensor, list, tuple)):
        raise TypeError(f"prompt must be a tensor or a list, got {one_line(prompt)}")
    if isinstance(prompt, Tensor) and model.text_embed is not None:
        check_states("prompt", prompt, model.text_embed.token_dim)
    for part in request.c:
        check_states("c", part, model.video_encoder.embed_dim)
    scale = request.guidance.guidance_scale
    rows = batch * (2 if scale > 1 else 1)
    for part in (*request.c, *([] if prompt is None else [prompt])):
        if len(part) != rows:
            raise ValueError(
                f"{batch} samples with guidance scale {scale} need {rows} condition rows, got "
                f"{len(part)}"
            )


def check_states(name: str, states: Tensor, width: int) -> None:
    """Check text states or condition tokens.

    Raises:
        ValueError: If it is not (rows, tokens, width), or holds NaN or infinity (seen only on
            the CPU: on a GPU the check would wait for it).
    """
    if states.ndim != 3 or states.size(2) != width or not states.is_floating_point():
        raise ValueError(f"{name} must be floats (rows, L, {width}), got {one_line(states)}")
    if states.device.type == "cpu" and not states.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def prepare(
    model: Transformer3DModel, request: GenerationRequest, run: GenerationRun
) -> Preparation:
    """Encode the condition, the schedule and the positions in time; make room for the cache."""
    guidance = request.guidance
    is_guided = guidance.num_passes > 1
    condition = model.encode_condition(
        request.prompt, request.c, request.motion_flow, request.fps, is_guided
    )
    if model.programs is not None and model.programs.fit(model, condition.device):
        model.programs.prepare(model)
        run.programs = model.programs
    num_frames = request.max_latent_length
    condition = guidance.expand_text(condition)
    encoder = model.video_encoder
    grid = encoder.patch_embed.grid(request.latent_shape)
    if num_frames > 1:
        head_dim = encoder.rope.dim
        num_held = 1 + min(request.max_context_frames or num_frames, num_frames - 1)
        capacity = condition.size(1) + num_held * grid[0] * grid[1]
        shape = (2, len(condition), encoder.embed_dim // head_dim, capacity, head_dim)
        run.cache = [LayerKVCache(condition.new_empty(shape)) for _ in encoder.blocks]
    time, positions = None, None
    if isinstance(model.video_pos_embed, RotaryEmbed3D):
        positions = model.video_pos_embed.get_pos(num_frames, 1, grid).chunk(num_frames, dim=1)
    else:
        time = model.video_pos_embed.get_time_embed(num_frames, condition.device)
    schedule = embed_steps(model, run.scheduler, condition)
    return Preparation(condition, schedule, time, positions)


def embed_steps(model: Transformer3DModel, scheduler: DenoisingRun, like: Tensor) -> Schedule:
    """The schedule with its timesteps embedded once, for dtype and device of ``like``."""
    values = [float(timestep) for timestep in scheduler.timesteps]
    times = send(torch.tensor(values), like.device)
    table = model.image_decoder.time_cond_embed.embed_timestep(times, like.dtype)  # (S, 1, Dd)
    updates: Sequence[LinearUpdate | None] = scheduler.updates or [None] * len(values)
    steps = list(map(DenoisingStep, scheduler.timesteps, values, updates))
    return Schedule(steps, table[:, None, None])


def next_frame(
    model: Transformer3DModel,
    request: GenerationRequest,
    run: GenerationRun,
    shared: Preparation,
    index: int,
    previous: Tensor | None,
) -> Tensor:
    """Read what is known, then draw a frame, or take it as it is given.

    Args:
        model: The networks.
        request: What to draw.
        run: The drawing.
        shared: What all frames share.
        index: The frame's index.
        previous: The frame before it, (B, C, h, w); None before the first.

    Returns:
        Latents, (B, C, h, w).
    """
    states = read_frame(model, request, run, shared, index, previous)
    if index < len(request.latents):
        return request.latents[index].to(shared.condition)
    if run.order is None:
        run.order = draw_order(
            request.latent_shape[0], sum(request.num_preds), run.generator, shared.condition
        )
    return generate_frame(model, request, run, shared.schedule, index, states, run.order)


def read_frame(
    model: Transformer3DModel,
    request: GenerationRequest,
    run: GenerationRun,
    shared: Preparation,
    index: int,
    previous: Tensor | None,
) -> Tensor:
    """The video encoder's states for a frame, from text and earlier frames: (P*B, Nv, D)."""
    encoder = model.video_encoder
    begin, _ = model.mask_embed()
    if previous is None:
        rows, columns = encoder.patch_embed.grid(request.latent_shape)
        tokens = begin.expand(request.latent_shape[0], rows * columns, -1)
    else:
        tokens = encoder.patch_embed(previous)
    if shared.time is not None:
        tokens = model.video_pos_embed(tokens + shared.time[index])
    context = request.max_context_frames or index
    if shared.positions is not None and run.cache is not None and index > context:
        # Positions are relative: the prompt stays as near as in training.
        lag = encoder.rotation(shared.positions[index - context][:, :1], 0, tokens.dtype)
        for layer in run.cache:
            layer.turn_first(lag)
    states = encoder(
        request.guidance.expand(tokens, padding=begin),
        shared.condition if index == 0 else None,
        pos=None if shared.positions is None else shared.positions[index],
        cache=run.cache,
    )
    if run.first_states is None:
        run.first_states = states
        return states
    return model.mix_states(run.first_states, states)


def draw_order(batch: int, num_tokens: int, generator: Generators, like: Tensor) -> Tensor:
    """A random order of the tokens of each sample, (B, N, 1) ids.

    Scores are drawn in the dtype of ``like``; ties keep their place on every device.
    """
    if isinstance(generator, list):
        return torch.cat([draw_order(1, num_tokens, one, like) for one in generator])
    device = like.device if generator is None else generator.device
    shape = (batch, num_tokens, 1)
    scores = torch.rand(shape, generator=generator, device=device, dtype=like.dtype)
    return send(scores, like.device).argsort(dim=1, stable=True)


# Sets


def generate_frame(
    model: Transformer3DModel,
    request: GenerationRequest,
    run: GenerationRun,
    schedule: Schedule,
    index: int,
    states: Tensor,
    order: Tensor,
) -> Tensor:
    """Fill one frame, set by set.

    Args:
        model: The networks.
        request: What to draw.
        run: The drawing.
        schedule: The timesteps.
        index: The frame's index.
        states: The video encoder's states for this frame, (P*B, Nv, D).
        order: Order of prediction, (B, N, 1) token ids.

    Returns:
        Latents, (B, C, h, w).
    """
    batch = request.latent_shape[0]
    embed = model.image_encoder.patch_embed
    hw = embed.grid(request.latent_shape)
    _, hidden = model.mask_embed()
    tokens = hidden.expand(batch, order.size(1), -1).to(states.dtype)
    patches = states.new_zeros(batch, order.size(1), model.image_decoder.head.out_features)
    sets = [n for n in request.num_preds if n > 0]
    encoder = SetEncoder(model, states, hw, order, tokens, sets, request.guidance, run.programs)
    done = 0
    for number, n in enumerate(run.bar(sets, run.show_sets)):
        ids = order[:, done : done + n]
        z = encoder.encode(number, tokens)
        noise = draw_normal(request.latent_shape, run.generator, z)
        scale = request.guidance.scale_at((number + 1) / len(sets))
        predicted = denoise(model, request.guidance, run, schedule, z, noise, ids, scale)
        patches = scatter_tokens(patches, ids, predicted.to(patches.dtype))
        done += n
        if run.on_step is not None:
            known = order[:, :done]
            latents = run.on_step(index, number, embed.unpatchify(patches, hw).clone())
            replaced = gather_tokens(embed.patchify(latents), known)
            if not torch.equal(replaced, gather_tokens(patches, known)):
                ids, predicted = known, replaced
                patches = scatter_tokens(patches, ids, predicted)
        if run.is_stopped:
            run.is_cut = done < order.size(1)
            break
        tokens = scatter_tokens(tokens, ids, embed.embed_patches(predicted).to(tokens.dtype))
    return embed.unpatchify(patches, hw)


class SetEncoder:
    """Runs the image encoder for the sets of tokens of one frame, one after the other.

    With ``guidance.guidance_reuse`` = r above 1, the passes without the prompt run once per r sets,
    for the tokens of all of them; what they see of the frame is then up to r - 1 sets old (the
    condition cache of LazyMAR, arXiv:2503.12450).

    Args:
        model: The networks.
        states: The video encoder's states for this frame, (P*B, Nv, D).
        hw: Rows and columns of the frame's tokens.
        order: Order of prediction, (B, N, 1) token ids.
        tokens: The frame before its first set, (B, N, D).
        sets: Tokens of each set.
        guidance: Guidance weights.
        programs: Recorded parts of drawings, if they can be used.
    """

    def __init__(
        self,
        model: Transformer3DModel,
        states: Tensor,
        hw: tuple[int, int],
        order: Tensor,
        tokens: Tensor,
        sets: Sequence[int],
        guidance: GuidanceScaler,
        programs: Programs | None = None,
    ) -> None:
        self.programs = programs
        self.image_encoder = model.image_encoder
        self.states = states
        self.order = order
        self.guided_order = guidance.expand(order)
        self.guidance = guidance
        self.table = self.image_encoder.position_table(tokens)
        self.ends = list(itertools.accumulate(sets))
        self.rotation: RotationTables | None = None
        if model.image_pos_embed is not None:
            pos = model.image_pos_embed.get_pos(1, 1, hw)
            self.rotation = self.image_encoder.rotation(pos, states.size(1), states.dtype)
        self._shared: Tensor | None = None  # ((P-1)*B, tokens of this set and those that share, D)

    def encode(self, index: int, tokens: Tensor) -> Tensor:
        """States of the tokens of a set.

        Args:
            index: The set's index; call with 0, 1, ... in order.
            tokens: The frame as far as it is known, (B, N, D).

        Returns:
            (P*B, n, D).
        """
        begin = self.ends[index - 1] if index else 0
        end = self.ends[index]
        reuse = self.guidance.guidance_reuse if self.guidance.num_passes > 1 else 1
        if reuse == 1:
            return self._run(tokens, begin, end)
        batch = len(tokens)
        if self._shared is None or index % reuse == 0:
            last = self.ends[min(index + reuse, len(self.ends)) - 1]
            z = self._run(tokens, begin, last)
            own, self._shared = z[:batch, : end - begin], z[batch:]
        else:
            own = self._run(tokens, begin, end, is_guided=False)
        shared = self._shared[:, : end - begin]
        self._shared = self._shared[:, end - begin :]
        return torch.cat([own, shared])

    def _run(self, tokens: Tensor, begin: int, end: int, is_guided: bool = True) -> Tensor:
        """Run the encoder once: tokens before ``begin`` are known, up to ``end`` wanted."""
        order = self.guided_order if is_guided else self.order
        known, wanted = order[:, :begin], order[:, begin:end]
        states = self.states if is_guided else self.states[: len(tokens)]
        tokens = self.guidance.expand(tokens) if is_guided else tokens
        num_rows = len(states) * (states.size(1) + order.size(1))
        if self.programs is None or num_rows > self.programs.most_rows["encoder"]:
            return self.image_encoder(
                tokens, states, known, pos=self.rotation, out_ids=wanted, table=self.table
            )
        if begin:
            known = repeat_last(known, pad_length(begin, order.size(1)))
        num_condition = states.size(1)
        places = torch.arange(num_condition + known.size(1), device=tokens.device)
        visible = places[None] < num_condition + begin
        inputs = [tokens, states, known, visible, pad_tokens(wanted, self.programs.fewest_tokens)]
        if self.rotation is not None:
            inputs += [self.rotation.cos, self.rotation.sin]
        elif self.table is not None:
            inputs += [self.table]
        states = self.programs.run("encoder", _encode_padded, self.image_encoder, inputs)
        return states[:, : end - begin]


def _encode_padded(
    encoder: VisionTransformer,
    tokens: Tensor,
    states: Tensor,
    known: Tensor,
    visible: Tensor,
    wanted: Tensor,
    *positions: Tensor,
) -> Tensor:
    """A call of the image encoder that takes only tensors, so it can be recorded.

    Args:
        encoder: The image encoder.
        tokens: The frame, (P*B, N, D).
        states: The video encoder's, (P*B, Nv, D).
        known: Ids of known tokens, (P*B, k, 1); the last may be repeated.
        visible: Which states and known tokens are real, (1, Nv + k).
        wanted: Ids of the tokens to return, (P*B, n, 1).
        *positions: A table for ``pos_embed``, or cosines and sines of a rotation.
    """
    is_rotary = len(positions) == 2
    return encoder(
        tokens,
        states,
        known,
        pos=RotationTables(*positions) if is_rotary else None,
        out_ids=wanted,
        table=positions[0] if len(positions) == 1 else None,
        visible=visible,
    )


# Denoising steps


def denoise(
    model: Transformer3DModel,
    guidance: GuidanceScaler,
    run: GenerationRun,
    schedule: Schedule,
    z: Tensor,
    noise: Tensor,
    ids: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Denoise one set of tokens from pure noise.

    Where the scheduler's steps are weighted sums, only the tokens exist, but fresh noise is still
    drawn for whole frames. For other schedulers, and for renormalised guidance, the rest of the
    frame takes part in steps and norms but not in the result, for which rows are selected.

    Args:
        model: The networks.
        guidance: Guidance weights.
        run: The drawing.
        schedule: The timesteps.
        z: The image encoder's states of these tokens, (P*B, n, D).
        noise: Start noise of the whole frame, (B, C, h, w).
        ids: Tokens to predict, (B, n, 1).
        scale: Weight of the prompt at this set; the full one when None.

    Returns:
        Patches of the predicted tokens, (B, n, p*p*C).
    """
    n = ids.size(1)
    programs = run.programs
    if programs is not None and z.size(0) * n > programs.most_rows["head"]:
        programs = None
    if model.image_decoder.is_compiled or programs is not None:
        fewest = FEWEST_TOKENS if programs is None else programs.fewest_tokens
        ids, z = pad_tokens(ids, fewest), pad_tokens(z, fewest)
    if guidance.guidance_renorm < 1 or run.scheduler.updates is None:
        return _denoise_frame(model, guidance, run, schedule, z, noise, ids, scale)[:, :n]
    embed = model.image_decoder.patch_embed
    fresh = []
    sample = gather_tokens(embed.patchify(noise), ids)  # (B, n, p*p*C)
    for update in run.scheduler.updates:
        if update.noise_weight:
            frame = draw_normal(noise.shape, run.generator, noise)
            fresh.append(gather_tokens(embed.patchify(frame), ids))
    scale = guidance.guidance_scale if scale is None else scale
    inputs = [sample, z, schedule.embeddings, *fresh]
    if programs is None:
        tokens = _denoise_tokens(model, scale, *inputs, guidance=guidance, steps=schedule.steps)
        return tokens[:, :n]
    # Recorded once for all weights of the prompt.
    guidance = replace(
        guidance,
        guidance_scale=2 if guidance.num_passes > 1 else 1,
        min_guidance_scale=None,
        guidance_reuse=1,
    )
    key = ("head", guidance, tuple((step.value, step.update) for step in schedule.steps))
    program = partial(_denoise_tokens, guidance=guidance, steps=schedule.steps)
    weight = torch.full((), scale, dtype=torch.float32, device=z.device)
    return programs.run(key, program, model, [weight, *inputs])[:, :n]


def _denoise_tokens(
    model: Transformer3DModel,
    scale: float | Tensor,
    sample: Tensor,
    z: Tensor,
    embeddings: Tensor,
    *fresh: Tensor,
    guidance: GuidanceScaler,
    steps: Sequence[DenoisingStep],
) -> Tensor:
    """All steps of a set; takes only tensors and draws no random numbers, so it can be recorded.

    Args:
        model: The networks.
        scale: Weight of the prompt.
        sample: Start noise, (B, n, p*p*C).
        z: States of the tokens, (P*B, n, D).
        embeddings: Embedded timesteps, (S, 1, 1, 1, Dd).
        *fresh: Noise of each step that adds some, like ``sample``.
        guidance: Guidance weights, except the prompt's.
        steps: The schedule; every step is linear.
    """
    head = model.image_decoder.denoiser()
    noises = iter(fresh)
    for step, step_guidance, modulations in modulate_steps(
        model, guidance, Schedule(steps, embeddings), z
    ):
        predicted = head(sample, modulations).flatten(0, 1)
        predicted = step_guidance.scale(predicted, scale)
        update = step.update
        assert update is not None  # as `denoise` asked
        if update.sample_weight != 1:
            sample = sample * update.sample_weight
        sample = torch.add(sample, predicted.to(sample.dtype), alpha=update.prediction_weight)
        if update.noise_weight:
            sample = torch.add(sample, next(noises), alpha=update.noise_weight)
    return sample


def _denoise_frame(
    model: Transformer3DModel,
    guidance: GuidanceScaler,
    run: GenerationRun,
    schedule: Schedule,
    z: Tensor,
    noise: Tensor,
    ids: Tensor,
    scale: float | None,
) -> Tensor:
    embed = model.image_decoder.patch_embed
    hw = embed.grid(noise.shape)
    head = model.image_decoder.denoiser()
    run.scheduler.restart()
    sample = run.scheduler.scale_noise(noise)
    for step, step_guidance, modulations in modulate_steps(model, guidance, schedule, z):
        patches = embed.patchify(run.scheduler.model_input(sample, step.timestep))  # (B, N, p*p*C)
        noisy = gather_tokens(patches, ids)  # (B, n, p*p*C)
        predicted = head(noisy, modulations).flatten(0, 1)
        rows = step_guidance.expand(ids)
        output = scatter_tokens(step_guidance.expand(patches), rows, predicted.to(patches.dtype))
        output = embed.unpatchify(step_guidance.scale(output, scale), hw)
        sample = run.scheduler.step(output, step.timestep, sample, run.generator)
    return gather_tokens(embed.patchify(sample), ids)


def modulate_steps(
    model: Transformer3DModel,
    guidance: GuidanceScaler,
    schedule: Schedule,
    z: Tensor,
) -> Iterator[tuple[DenoisingStep, GuidanceScaler, tuple[Modulation, ...]]]:
    """All steps with the guidance in force and what the head computes from the condition.

    The head's modulations are computed for many steps at once, as memory allows.

    Args:
        model: The networks.
        guidance: Guidance weights.
        schedule: The timesteps.
        z: States of the tokens, (P*B, n, D).
    """
    decoder = model.image_decoder
    condition = decoder.time_cond_embed.condition_proj(z)
    condition = condition.unflatten(0, (guidance.num_passes, -1))  # (P, B, n, Dd)
    most_bytes = MAX_MODULATION_BYTES.get(condition.device.type, 2**26)
    begin = 0
    for is_off, group in itertools.groupby(guidance.is_off(step.value) for step in schedule.steps):
        end = begin + len(list(group))
        part_guidance = GuidanceScaler() if is_off else guidance
        part_condition = condition[:1] if is_off else condition
        numbers = part_condition.numel() * (3 * len(decoder.blocks) + 2)
        at_once = max(1, most_bytes // (numbers * condition.element_size()))
        for start in range(begin, end, at_once):
            chunk = slice(start, min(start + at_once, end))
            modulations = decoder.prepare_modulations(part_condition + schedule.embeddings[chunk])
            by_step = zip(*(one.unbind() for one in modulations), strict=True)
            for step, of_step in zip(schedule.steps[chunk], by_step, strict=True):
                yield step, part_guidance, of_step
        begin = end


# Callers of the model


@checked.dataclass(frozen=True, kw_only=True, config=CHECKED)
class RunOptions:
    """Inputs of a call of the model that are about the run; see :func:`draw_inputs`."""

    batch_size: AtLeastOne | None = None
    x: Tensor | None = None
    num_diffusion_steps: AtLeastOne = 25
    generator: Generators = None
    on_step: Callable[[int, int, Tensor], Tensor] | None = None
    tqdm1: Flag = True
    tqdm2: Flag = False
    progress_bar_config: dict[str, Any] | None = None


def draw_inputs(model: Transformer3DModel, inputs: Mapping[str, Any]) -> Tensor:
    """Draw for a call of the model, with its ``sample_scheduler``.

    Args:
        model: The networks.
        inputs: Fields of :class:`GenerationRequest` and :class:`GuidanceScaler` by name;
            ``batch_size``, or ``x``, latents (B, C, h, w) whose shape counts; ``generator`` and
            ``on_step`` as for :class:`GenerationRun`; ``tqdm1`` (a bar over frames, True),
            ``tqdm2`` (one over sets, False) and ``progress_bar_config``.

    Returns:
        Latents, (B, C, T, h, w).

    Raises:
        ValueError: If inputs do not fit together, or a drawing has no use for one.
    """
    values = {name: value for name, value in inputs.items() if value is not None}
    options = take_checked(RunOptions, values)
    guidance = take_checked(GuidanceScaler, values)
    if options.x is not None and options.x.ndim != 4:
        raise ValueError(f"x must be latents (B, C, h, w), got {one_line(options.x)}")
    if options.x is None and options.batch_size is None:
        raise ValueError("batch_size must be given, or latents as x")
    if options.x is not None and options.batch_size not in (None, len(options.x)):
        raise ValueError(f"batch_size is {options.batch_size}, but x has {len(options.x)} samples")
    sizes = (options.batch_size, *model.image_encoder.latent_shape)
    shape = sizes if options.x is None else tuple(options.x.shape)
    values = dict(**values, latent_shape=shape, guidance=guidance)  # either given twice is an error
    request = build_checked(GenerationRequest, values)
    run = GenerationRun(
        DenoisingRun(model.sample_scheduler, options.num_diffusion_steps),
        options.generator,
        options.on_step,
        show_frames=options.tqdm1,
        show_sets=options.tqdm2,
        bar_options=options.progress_bar_config,
    )
    with own_precision(model):
        return torch.stack(list(generate_frames(model, request, run)), dim=2)
