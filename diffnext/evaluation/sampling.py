"""Drawing the samples of a benchmark: in groups, in several processes, continuing after a stop.

Consecutive prompts form groups, which are the same for any number of processes; a group with a
missing sample is drawn again as a whole. Each sample has its own generator, seeded by its prompt
and number. So the results do not depend on the number of processes or on stops, bit for bit. They
depend on the size of the groups only because matrix products of another size round differently.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from pydantic import Field
from pydantic import dataclasses as checked
from torch import Tensor
from tqdm import tqdm

from diffnext.evaluation.layouts import Layout
from diffnext.evaluation.prompts import PromptSet, check_model, encode_prompts
from diffnext.pipelines.nova.pipeline_nova import NOVAPipeline
from diffnext.utils.arguments import CHECKED, AtLeastOne, AtLeastZero
from diffnext.utils.device_utils import parse_device, parse_precision
from diffnext.utils.json_files import read_json, write_json

__all__ = [
    "SamplingOptions",
    "Shard",
    "draw_benchmark",
    "sample_seed",
]

SETTINGS_FILE = ".sampling.json"


@checked.dataclass(frozen=True, kw_only=True, config=CHECKED)
class SamplingOptions:
    """How samples are drawn.

    Attributes:
        ckpt: Release folder, checkpoint or Hub id.
        num_pred_steps: Autoregressive steps (sets of tokens) per frame.
        num_diff_steps: Denoising steps of each set.
        guidance_scale: Weight of the prompt.
        prompt_size: Prompts of a group.
        sample_size: Samples of each prompt.
        vae_batch_size: Samples decoded at once.
        max_latent_length: Latent frames; 1 is a picture.
        flow: Motion strength of videos.
        seed: The seeds of all samples are derived from it.
        compat: Whether to draw everything from one generator, one group after the other, as the
            first release of NOVA did. Nothing is skipped, and there can be one process only.
        device: For example "cuda:1"; "auto" takes the best there is.
        precision: The model's type; "auto" is float16, on a CPU float32.
    """

    ckpt: str
    num_pred_steps: AtLeastOne
    num_diff_steps: AtLeastOne
    guidance_scale: AtLeastZero
    prompt_size: AtLeastOne
    sample_size: AtLeastOne
    vae_batch_size: AtLeastOne
    max_latent_length: AtLeastOne = 1
    flow: AtLeastZero = 5.0
    seed: Annotated[int, Field(ge=0)]
    compat: bool
    device: str
    precision: str


@dataclass(frozen=True)
class Shard:
    """Which of several processes this is.

    Attributes:
        rank: Its number.
        count: Number of processes.
        local_rank: Its number on this machine, which picks the GPU; None for the current GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int | None = None

    @classmethod
    def from_environment(cls) -> Shard:
        """As ``torchrun`` and ``accelerate launch`` say; the only process without them.

        Raises:
            ValueError: If the numbers contradict each other.
        """
        rank = int(os.environ.get("RANK", 0))
        count = int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < count:
            raise ValueError(f"RANK must be below WORLD_SIZE, got {rank} of {count}")
        local_rank = os.environ.get("LOCAL_RANK")
        return cls(rank, count, None if local_rank is None else int(local_rank))


# --- drawing ------------------------------------------------------------------------------------


def draw_benchmark(
    prompts: PromptSet, layout: Layout, options: SamplingOptions, shard: Shard
) -> int:
    """Draw this process's share of what is missing.

    Args:
        prompts: The benchmark's; texts are encoded first.
        layout: Where samples go.
        options: How they are drawn.
        shard: This process's share.

    Returns:
        The number of samples that were written.

    Raises:
        FileNotFoundError: If the model is missing.
        ValueError: If the folder holds samples of other settings, or something does not fit.
    """
    if options.compat and shard.count > 1:
        raise ValueError(f"--compat draws in one process, but there are {shard.count}")
    check_model(options.ckpt)
    device = parse_device(options.device, shard.local_rank)
    dtype = parse_precision(options.precision, device)
    settings = describe_settings(prompts, options, dtype)
    check_settings(layout.outdir, settings)
    groups = plan_groups(len(prompts), layout, options, shard)
    groups = [group for group in groups if missing_samples(group, layout, options)]
    if not groups:
        return 0
    states = load_states(prompts, groups, options, device, dtype, is_silent=shard.rank > 0)
    pipe = NOVAPipeline.from_pretrained(
        options.ckpt, dtype=dtype, text_encoder=None, tokenizer=None
    ).to(device)
    for prompt, state in states.items():  # before hours of drawing
        pipe.transformer.text_embed.check_state(state, prompt)
    written = 0
    for group, clips in draw_groups(pipe, groups, states, options, is_silent=shard.rank > 0):
        if not (layout.outdir / SETTINGS_FILE).is_file():
            layout.outdir.mkdir(parents=True, exist_ok=True)
            own = layout.outdir / f"{SETTINGS_FILE}.{shard.rank}"  # all processes write the same
            write_json(own, settings)
            os.replace(own, layout.outdir / SETTINGS_FILE)
        written += write_group(group, clips, layout, options)
    return written


def plan_groups(
    num_prompts: int, layout: Layout, options: SamplingOptions, shard: Shard
) -> list[list[int]]:
    """This process's groups of prompts."""
    prompts = [p for p in range(num_prompts) if options.compat or not layout.repeats(p)]
    size = options.prompt_size
    groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return groups[shard.rank :: shard.count]


def missing_samples(
    group: Sequence[int], layout: Layout, options: SamplingOptions
) -> list[tuple[int, int]]:
    """Prompt and number of every sample of a group that must be written."""
    size = options.sample_size
    if options.compat:
        return [(prompt, sample) for prompt in group for sample in range(size)]
    return [(prompt, sample) for prompt in group for sample in layout.missing(prompt, size)]


def load_states(
    prompts: PromptSet,
    groups: Sequence[Sequence[int]],
    options: SamplingOptions,
    device: torch.device,
    dtype: torch.dtype,
    is_silent: bool,
) -> dict[int, Tensor]:
    """Text states of the prompts of some groups; texts are encoded."""
    wanted = [prompt for group in groups for prompt in group]
    drawn = {prompt: prompts.prompts[prompt] for prompt in wanted}
    texts = {prompt: text for prompt, text in drawn.items() if isinstance(text, str)}
    if not texts:
        return {prompt: state for prompt, state in drawn.items() if isinstance(state, Tensor)}
    states = encode_prompts(options.ckpt, list(texts.values()), device, dtype)
    progress = tqdm(states, total=len(texts), unit="prompt", desc="encoding", disable=is_silent)
    return dict(zip(texts, progress, strict=True))


def draw_groups(
    pipe: NOVAPipeline,
    groups: Sequence[Sequence[int]],
    states: dict[int, Tensor],
    options: SamplingOptions,
    is_silent: bool,
) -> Iterator[tuple[Sequence[int], ndarray]]:
    """Draw groups, one after the other; yields each with its samples, (B, F, H, W, 3)."""
    shared = None
    if options.compat:  # as the first release had it
        torch.manual_seed(options.seed)
        shared = torch.Generator(pipe.device).manual_seed(options.seed)
    total = sum(map(len, groups)) * options.sample_size
    with tqdm(total=total, unit="sample", disable=is_silent) as progress:
        for group in groups:
            generator = shared or make_generators(pipe, group, options)
            clips = draw_group(pipe, [states[prompt] for prompt in group], generator, options)
            yield group, clips
            progress.update(len(clips))


def write_group(
    group: Sequence[int], clips: ndarray, layout: Layout, options: SamplingOptions
) -> int:
    """Write what is missing of a group; returns the number of samples written."""
    for prompt in group:
        layout.prepare(prompt)
    missing = missing_samples(group, layout, options)
    for prompt, sample in missing:
        clip = clips[group.index(prompt) * options.sample_size + sample]
        layout.write(prompt, sample, clip)
    return len(missing)


def draw_group(
    pipe: NOVAPipeline, states: Sequence[Tensor], generator: Any, options: SamplingOptions
) -> ndarray:
    """Draw the samples of some prompts; returns (B, F, H, W, 3) of uint8."""
    output = pipe(
        prompt_embeds=[state for state in states for _ in range(options.sample_size)],
        num_inference_steps=options.num_pred_steps,
        num_diffusion_steps=options.num_diff_steps,
        guidance_scale=options.guidance_scale,
        max_latent_length=options.max_latent_length,
        motion_flow=options.flow,
        generator=generator,
        vae_batch_size=options.vae_batch_size,
        output_type="np",
        disable_progress_bar=True,
    )
    samples = output[0]  # pictures (B, H, W, 3), or clips
    return samples[:, None] if samples.ndim == 4 else samples


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one sample: a hash of the run's seed, the prompt's index and the sample's number."""
    state = np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))  # generators take 63 bits


def make_generators(
    pipe: NOVAPipeline, group: Sequence[int], options: SamplingOptions
) -> list[torch.Generator]:
    """A generator for each sample of a group."""
    return [
        torch.Generator(pipe.device).manual_seed(sample_seed(options.seed, prompt, sample))
        for prompt in group
        for sample in range(options.sample_size)
    ]


# --- what a folder was drawn with ---------------------------------------------------------------


def describe_settings(
    prompts: PromptSet, options: SamplingOptions, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything that samples depend on; how many are drawn does not matter."""
    settings = asdict(options)
    for name in ("prompt_size", "sample_size", "vae_batch_size", "device"):
        del settings[name]
    return {**settings, "precision": str(dtype).removeprefix("torch."), "prompts": digest(prompts)}


def digest(prompts: PromptSet) -> str:
    """A hash of what is drawn."""
    sha = hashlib.sha256()
    for prompt in prompts.prompts:
        if isinstance(prompt, str):
            data = prompt.encode()
        else:
            data = prompt.float().contiguous().numpy().tobytes()
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()[:16]


def check_settings(outdir: Path, settings: dict[str, Any]) -> None:
    """Check that a folder holds no samples that were drawn with other settings.

    Raises:
        ValueError: If it does.
    """
    path = outdir / SETTINGS_FILE
    found = read_json(path) if path.is_file() else settings
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{outdir} holds samples of {name} {found.get(name)!r}, not {value!r}: name "
                "another --outdir, or remove it"
            )
