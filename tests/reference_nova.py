"""NOVA as the specification words it, step by step and without saving any work.

The oracle of parity tests and the default baseline of ``scripts/dev/benchmark.py``. It takes a
model's weights, but none of its methods that sample, attend or compute losses: whole frames pass
through the diffusion head at every step, keys and values are concatenated, masks are dense.

Shapes: B batch, P guidance passes, T latent frames, N image tokens, Nv video tokens, D width, n
tokens of a set. Guided batches are pass-major.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[list[Tensor]]


# --- parts --------------------------------------------------------------------------------------


def modulate(norm: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """AdaLN: the modulated tokens, then the other statistics."""
    scale, shift, *others = norm.proj(F.silu(z)).chunk(norm.num_stats, dim=-1)
    return (norm.norm(x) * (1 + scale) + shift, *others)


def project(projector: nn.Module, x: Tensor) -> Tensor:
    """Linear, SiLU, linear."""
    return projector.fc2(F.silu(projector.fc1(x)))


def embed_time(embed: nn.Module, timestep: Tensor, z: Tensor) -> Tensor:
    """condition_proj(z) + timestep_proj([cos || sin])."""
    frequencies = torch.exp(torch.arange(128, device=z.device) * (-math.log(10000) / 128))
    angles = timestep.float().unsqueeze(-1) * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(z.dtype)
    if features.ndim == 2:
        features = features.unsqueeze(1)
    return project(embed.condition_proj, z) + project(embed.timestep_proj, features)


def diffusion_mlp(
    decoder: nn.Module, x: Tensor, timestep: Tensor, z: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Predictions of all tokens, or the patches of ``x`` with those at ``ids`` replaced."""
    tokens = decoder.patch_embed.proj(x).flatten(2).mT
    if ids is not None:
        tokens = tokens.gather(1, ids.expand(-1, -1, tokens.size(-1)))
        z = z.gather(1, ids.expand(-1, -1, z.size(-1)))
    z = embed_time(decoder.time_cond_embed, timestep, z)
    for block in decoder.blocks:
        h, gate = modulate(block.norm1, tokens, z)
        tokens = tokens + gate * block.norm2(project(block.proj, h))
    output = decoder.head(modulate(decoder.norm, tokens, z)[0])
    if ids is None:
        return output
    patches = patchify(x, decoder.patch_embed.patch_size)
    return patches.scatter(1, ids.expand(-1, -1, patches.size(-1)), output)


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, h, w) to (B, N, p*p*C)."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)
    return x.flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, p: int, hw: tuple[int, int]) -> Tensor:
    """(B, N, p*p*C) to (B, C, h, w)."""
    x = x.unflatten(2, (p, p, -1)).unflatten(1, (hw[0] // p, hw[1] // p))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rotation_matrices(rope: nn.Module, pos: Tensor) -> Tensor:
    """(B, 1, L, d/2, 2, 2) of positions (B, L, 3)."""
    scales = (rope.scale0, rope.scale1, rope.scale2)
    angles = [pos[..., i, None] / rope.theta**scale for i, scale in enumerate(scales)]
    angle = torch.cat(angles, dim=-1)[:, None]
    rows = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 2))


def rotate(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply interleaved pairs of (B, H, L, d) by their matrices."""
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (matrices.to(x.dtype) * pairs).sum(-1).flatten(-2)


def attend(
    attention: nn.Module,
    x: Tensor,
    matrices: Tensor | None,
    mask: Tensor | None,
    cache: list[Tensor] | None,
) -> Tensor:
    """Self-attention; a cache (keys, values) is extended in place."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if matrices is not None:
        q, k = rotate(q, matrices), rotate(k, matrices)
    if cache is not None:
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        cache[:] = [k, v]
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.proj(output.transpose(1, 2).flatten(2))


def run_block(
    block: nn.Module,
    x: Tensor,
    matrices: Tensor | None = None,
    mask: Tensor | None = None,
    cache: list[Tensor] | None = None,
) -> Tensor:
    """Post-norm residual block."""
    x = x + block.norm1(attend(block.attn, x, matrices, mask, cache))
    return x + block.norm2(block.mlp.fc2(F.gelu(block.mlp.fc1(x))))


def encode(
    encoder: nn.Module,
    tokens: Tensor,
    c: Tensor | None,
    prev_ids: Tensor | None = None,
    pos: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Encode (B, N, D); the first blocks see only known tokens and the condition."""
    tokens = encoder.pos_embed(tokens)
    num_condition = 0 if c is None else c.size(1)
    matrices = known_matrices = None
    if pos is not None:
        matrices = rotation_matrices(encoder.rope, F.pad(pos, (0, 0, num_condition, 0)))
        known_matrices = matrices
        if prev_ids is not None:
            known = pos.gather(1, prev_ids.expand(-1, -1, 3))
            known = F.pad(known, (0, 0, num_condition, 0))
            known_matrices = rotation_matrices(encoder.rope, known)
    x = tokens
    if prev_ids is not None:
        x = tokens.gather(1, prev_ids.expand(-1, -1, tokens.size(-1)))
    x = x if c is None else torch.cat([c, x], dim=1)
    for index, block in enumerate(encoder.blocks):
        if index == encoder.encoder_depth and prev_ids is not None:
            c, known = x[:, :num_condition], x[:, num_condition:]
            known_ids = prev_ids.expand(-1, -1, tokens.size(-1))
            x = torch.cat([c, tokens.scatter(1, known_ids, known)], dim=1)
        is_first = index < encoder.encoder_depth
        layer_cache = None if cache is None else cache[index]
        x = run_block(block, x, known_matrices if is_first else matrices, mask, layer_cache)
    return encoder.norm(x[:, num_condition:])


def mix(encoder: nn.Module, first: Tensor, states: Tensor) -> Tensor:
    """The mixer's states of a later frame."""
    return states if isinstance(encoder.mixer, nn.Identity) else encoder.mixer(first, states)


# --- sampling -----------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Latents (B, C, T, h, w) of the inputs of ``model.forward``."""
    passes = count_passes(inputs)
    c = model.encode_condition(*conditions(inputs), is_guided=passes > 1)
    if passes == 3:
        text, null = c.chunk(2)
        c = torch.cat([text, null, null if inputs.get("image_guidance_scale") else text])
    scheduler = copy.deepcopy(model.sample_scheduler)
    scheduler.set_timesteps(inputs.get("num_diffusion_steps", 25))
    shape = (inputs["batch_size"], model.image_encoder.image_dim, *model.image_encoder.image_size)
    generator = inputs.get("generator")
    length = inputs.get("max_latent_length", 1)
    cache = [[] for _ in model.video_encoder.blocks] if length > 1 else None
    given = list(inputs.get("latents") or [])
    begin, order, first, frame, frames = model.mask_embed.bos_token, None, None, None, []
    for t in range(length):
        states = video_states(model, frame, t, length, shape, c, inputs, begin, cache)
        first = states if t == 0 else first
        states = mix(model.video_encoder, first, states) if t > 0 else states
        if t < len(given):
            frame = given[t]
        else:
            if order is None:
                num_tokens = sum(inputs["num_preds"])
                order = draw_order(shape[0], num_tokens, generator, c)
            frame = generate_frame(model, scheduler, states, order, shape, inputs)
        frames.append(frame)
    return torch.stack(frames, dim=2)


def conditions(inputs: dict[str, Any]) -> list[Any]:
    """What conditions a model, in the order of its arguments."""
    return [inputs.get(name) for name in ("prompt", "c", "motion_flow", "fps")]


def count_passes(inputs: dict[str, Any]) -> int:
    """One without guidance, three with that of images or with the spatiotemporal one."""
    if inputs.get("guidance_scale", 1) <= 1:
        return 1
    names = ("image_guidance_scale", "spatiotemporal_guidance_scale")
    return 3 if any(inputs.get(name, 0) > 0 for name in names) else 2


def draw_order(batch: int, num_tokens: int, generator: Any, like: Tensor) -> Tensor:
    """Ids in the order of prediction, (B, N, 1)."""
    if isinstance(generator, list):
        return torch.cat([draw_order(1, num_tokens, one, like) for one in generator])
    scores = torch.rand((batch, num_tokens, 1), generator=generator, dtype=like.dtype)
    return scores.argsort(dim=1, stable=True)


def video_states(
    model: nn.Module,
    frame: Tensor | None,
    t: int,
    length: int,
    shape: tuple[int, ...],
    c: Tensor,
    inputs: dict[str, Any],
    begin: Tensor,
    cache: Cache | None,
) -> Tensor:
    """States of the video encoder for frame t, (P*B, Nv, D)."""
    encoder = model.video_encoder
    p = encoder.patch_embed.patch_size
    hw = (shape[2] // p, shape[3] // p)
    if frame is None:
        tokens = begin.expand(shape[0], hw[0] * hw[1], -1)
    else:
        tokens = encoder.patch_embed.proj(frame).flatten(2).mT
    pos = None
    if model.image_pos_embed is None:
        tokens = tokens + model.video_pos_embed.get_time_embed(length)[t]
        tokens = tokens + model.video_pos_embed.get_space_embed(tokens.device, tokens.dtype)
    else:
        pos = model.video_pos_embed.get_pos(length, 1, hw).chunk(length, dim=1)[t]
    passes = [tokens] * count_passes(inputs)
    if len(passes) == 3 and inputs.get("image_guidance_scale"):
        passes[1] = begin.expand(shape[0], hw[0] * hw[1], -1)  # no picture, and no position
    tokens = torch.cat(passes)
    return encode(encoder, tokens, c if t == 0 else None, pos=pos, cache=cache)


def generate_frame(
    model: nn.Module,
    scheduler: Any,
    states: Tensor,
    order: Tensor,
    shape: tuple[int, ...],
    inputs: dict[str, Any],
) -> Tensor:
    """One frame, set by set."""
    passes = count_passes(inputs)
    encoder = model.image_encoder
    p = encoder.patch_embed.patch_size
    hw = shape[2:]
    maximum = inputs.get("guidance_scale", 1)
    minimum = inputs.get("min_guidance_scale")
    minimum = maximum if minimum is None else minimum
    generator = inputs.get("generator")
    x = states.new_zeros(shape)
    mask = states.new_ones(shape[0], order.size(1), 1)
    sets = [n for n in inputs["num_preds"] if n > 0]
    done = 0
    for index, n in enumerate(sets):
        scale = minimum + (maximum - minimum) * (index + 1) / len(sets)
        z = encoder.patch_embed.proj(x).flatten(2).mT
        z = z * (1 - mask) + model.mask_embed.mask_token * mask
        pos = None
        if model.image_pos_embed is not None:
            grid = (hw[0] // p, hw[1] // p)
            pos = model.image_pos_embed.get_pos(1, passes * shape[0], grid)
        ids = order[:, done : done + n]
        known = torch.cat([order[:, :done]] * passes)
        z = encode(encoder, torch.cat([z] * passes), states, prev_ids=known, pos=pos)
        noise = randn_tensor(shape, generator, states.device, states.dtype)
        patches = denoise(model, scheduler, z, noise, ids, scale, inputs)
        chosen = torch.zeros_like(mask).scatter(1, ids, 1)
        x = x + unpatchify(patches * chosen, p, hw)
        mask = mask * (1 - chosen)
        done += n
    return x


def denoise(
    model: nn.Module,
    scheduler: Any,
    z: Tensor,
    noise: Tensor,
    ids: Tensor,
    g: float,
    inputs: dict[str, Any],
) -> Tensor:
    """Patches of the whole frame, of which those at ``ids`` are predictions."""
    p = model.image_decoder.patch_embed.patch_size
    hw = noise.shape[2:]
    low, high = inputs.get("guidance_interval") or (0, math.inf)
    low = max(low, inputs.get("guidance_trunc", 0))
    run = copy.copy(scheduler)
    run._step_index = None
    y = noise
    for timestep in scheduler.timesteps:
        passes = count_passes(inputs) if low <= float(timestep) <= high else 1
        x = torch.cat([y] * passes)
        rows = torch.as_tensor(timestep, device=x.device).expand(len(x))
        many_ids = torch.cat([ids] * passes)
        output = diffusion_mlp(model.image_decoder, x, rows, z[: len(x)], many_ids)
        output = guide(output.chunk(passes), g, inputs)
        output = unpatchify(output, p, hw)
        y = run.step(output, timestep, y, generator=inputs.get("generator")).prev_sample
    return patchify(y, p)


def guide(passes: Sequence[Tensor], g: float, inputs: dict[str, Any]) -> Tensor:
    """One prediction from those of all passes, each (B, N, p*p*C)."""
    if len(passes) == 1:
        return passes[0]
    cond, uncond = passes[:2]
    image = inputs.get("image_guidance_scale", 0)
    spatiotemporal = inputs.get("spatiotemporal_guidance_scale", 0)
    guided = uncond + g * (cond - (passes[2] if image else uncond))
    renorm = inputs.get("guidance_renorm", 1)
    if renorm < 1:
        norms = [one.flatten(1).norm(dim=1)[:, None, None] for one in (cond, guided)]
        guided = guided * (norms[0] / norms[1]).clamp(renorm, 1)
    if image:
        return guided + image * (passes[2] - uncond)
    return guided + spatiotemporal * (cond - passes[-1]) if spatiotemporal else guided


# --- training -----------------------------------------------------------------------------------


def train(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Losses of the inputs of ``model.forward`` in training mode."""
    x = inputs["x"]
    video = x.unsqueeze(2) if x.ndim == 4 else x
    c = model.encode_condition(*conditions(inputs))
    batch, _, length, *hw = video.shape
    encoder = model.video_encoder
    p = encoder.patch_embed.patch_size
    grid = (hw[0] // p, hw[1] // p)
    begin = model.mask_embed.bos_token.expand(batch, 1, grid[0] * grid[1], -1)
    seen = encoder.patch_embed(video[:, :, : length - 1])
    tokens = model.video_pos_embed(torch.cat([begin, seen], dim=1)).flatten(1, 2)
    pos = None
    if model.image_pos_embed is not None:
        pos = model.video_pos_embed.get_pos(length, batch, grid)
    mask = None
    if length > 1:
        frame = torch.arange(length).repeat_interleave(grid[0] * grid[1])
        frame = torch.cat([frame.new_zeros(c.size(1)), frame])
        mask = torch.where(frame[:, None] >= frame[None], 0.0, -torch.inf).to(tokens)
    states = encode(encoder, tokens, c, pos=pos, mask=mask).unflatten(1, (length, -1))
    if length > 1:
        states = torch.cat([states[:, :1], mix(encoder, states[:, :1], states[:, 1:])], dim=1)
    frames = video.transpose(1, 2).flatten(0, 1)
    return losses(model, frames, states.flatten(0, 1), length)


def losses(model: nn.Module, frames: Tensor, states: Tensor, length: int) -> dict[str, Tensor]:
    """Losses of frames (B*T, C, h, w) given the video encoder's states."""
    encoder, decoder, scheduler = model.image_encoder, model.image_decoder, model.noise_scheduler
    p = encoder.patch_embed.patch_size
    z = encoder.patch_embed.proj(frames).flatten(2).mT
    count = z.size(1)
    scores = torch.rand(len(z), count, 1)
    ratio = model.mask_embed._draw_ratio()
    known = scores.argsort(dim=1, stable=True)[:, : round((1 - ratio) * count)]
    hidden = z.new_ones(len(z), count, 1).scatter(1, known, 0)
    z = z * (1 - hidden) + model.mask_embed.mask_token * hidden
    pos = None
    if model.image_pos_embed is not None:
        grid = (frames.shape[2] // p, frames.shape[3] // p)
        pos = model.image_pos_embed.get_pos(1, len(z), grid)
    z = encode(encoder, z, states, prev_ids=known, pos=pos)
    repeats = model.loss_repeat
    z = z.repeat(repeats, 1, 1)
    clean = patchify(frames.repeat(repeats, 1, 1, 1), p)
    noise = torch.randn_like(clean)
    levels = scheduler.sample_timesteps(clean.shape[:2])
    noisy = scheduler.add_noise(clean, noise, levels)
    timestep = getattr(scheduler, "timestep", None)
    timestep = levels if timestep is None else timestep
    is_noise = getattr(scheduler.config, "prediction_type", "flow") == "epsilon"
    target = noise if is_noise else noise - clean
    output = diffusion_mlp(decoder, unpatchify(noisy, p, frames.shape[2:]), timestep, z)
    weight = hidden.repeat(repeats, 1, 1).squeeze(-1)
    error = (output.float() - target.float()).square().mean(-1) * weight
    error = error / (weight.sum() + 1e-5)
    if length == 1:
        return {"loss": error.sum()}
    per_frame = error.unflatten(0, (-1, length)).sum(dim=(0, 2))
    later = per_frame[1:].sum() * length / (length - 1)
    return {"loss_t2i": per_frame[0] * length, "loss_i2i": later}


def seed_all(seed: int) -> None:
    """Both sources of training's draws."""
    torch.manual_seed(seed)
    np.random.seed(seed)
