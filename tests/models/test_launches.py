"""What drawings at the released sizes give a GPU to do, counted without one.

A drawing that waits for the device, mixes floating-point types or copies from pageable memory fails
here, in every precision.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from diffnext.models.autoencoders.tiling import run_in_spatial_tiles
from diffnext.models.capture import Programs, Recorded
from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova import sampling
from diffnext.pipelines.nova.sampling import GenerationRequest, GenerationRun, generate_frames
from diffnext.pipelines.pipeline_utils import cosine_set_sizes
from diffnext.schedulers.denoising_run import DenoisingRun
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.fake_cuda import DEVICE, FakeCuda, move_to_fake_cuda
from tests.tiny import make_model

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGES, VIDEOS = "nova_d48w1024_sdxl1024", "nova_d48w1024_osp480"
SETS, STEPS, FRAMES = 64, 25, {IMAGES: 1, VIDEOS: 9}
MOST_CALLS = {IMAGES: 3_000, VIDEOS: 20_000}
MOST_LAUNCHES = {IMAGES: 100_500, VIDEOS: 584_500}
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def load(name, dtype):
    """The model of a shipped config, on the device."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config = config["pipeline"]["paths"]["module_config"]["transformer"]
    return move_to_fake_cuda(lambda: NOVATransformer3DModel(**config), dtype)


class MarkedRun(GenerationRun):
    """A drawing that notes how much was launched when each frame and each set of tokens begins."""

    def __init__(self, device, *args, **options):
        super().__init__(*args, **options)
        self.device = device
        self.marks = []

    def bar(self, iterable, is_shown):
        for item in iterable:
            self.marks.append(self.device.total)
            yield item
        self.marks.append(self.device.total)


def draw(model, sets, steps, frames=1, scheduler=None, device=None, **options):
    """Draw on the device; what was counted, and the drawing."""
    weight = model.mask_embed.bos_token
    with device or FakeCuda() as device, torch.no_grad():
        prompt = torch.empty(2, 256, model.text_embed.token_dim, dtype=weight.dtype, device=DEVICE)
        request = GenerationRequest(
            latent_shape=(1, *model.image_encoder.latent_shape),
            num_preds=tuple(sets),
            max_latent_length=frames,
            prompt=prompt,
            motion_flow=None if frames == 1 else (5.0,),
            guidance=GuidanceScaler(guidance_scale=5),
        )
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        run = MarkedRun(device, DenoisingRun(scheduler, steps), **options)
        for latents in generate_frames(model, request, run):
            assert latents.device == DEVICE and latents.dtype == weight.dtype
    return device, run


def count_chunks(model, tokens, steps):
    """How often the head's modulations are computed for a set of so many tokens."""
    head = model.image_decoder
    width, size = head.head.in_features, model.mask_embed.bos_token.element_size()
    numbers = 2 * tokens * width * (3 * len(head.blocks) + 2)
    return math.ceil(steps / max(1, sampling.MAX_MODULATION_BYTES["cuda"] // (numbers * size)))


def count_launches(model, name):
    """Launches of a whole drawing, from two short ones.

    A set of tokens costs something itself, for each step, and each time modulations are computed.
    All of it follows from a few sets, and other sets show that nothing else counts; one of a single
    token may save a copy. Frames after the first cost the same as each other.
    """
    tokens = math.prod(model.config["image_base_size"])
    sets = (4, 8, tokens // 4, tokens - tokens // 4 - 13, 1)
    frames = min(FRAMES[name], 2)
    chunks = {steps: [count_chunks(model, n, steps) for n in sets] for steps in (2, 5)}
    costs = {}
    for steps in chunks:
        device, run = draw(model, sets, steps, frames)
        assert not device.pageable
        ends = [after - before for before, after in itertools.pairwise(run.marks)]
        costs[steps] = [ends[first : first + 7] for first in range(0, 7 * frames, 7)]
    begin = run.marks[0]
    of_sets = {steps: frame[0][1:6] for steps, frame in costs.items()}
    for_chunk = (of_sets[5][3] - of_sets[5][0]) // (chunks[5][3] - chunks[5][0])
    for_step = (of_sets[5][0] - of_sets[2][0] - for_chunk * (chunks[5][0] - chunks[2][0])) // 3
    own = of_sets[2][0] - 2 * for_step - for_chunk * chunks[2][0]
    saved = of_sets[2][0] - of_sets[2][4]

    def of_set(steps, n):
        chunks = count_chunks(model, n, steps)
        return own + for_step * steps + for_chunk * chunks - saved * (n == 1)

    for steps in chunks:
        for frame in costs[steps]:
            assert frame[1:6] == [of_set(steps, n) for n in sets]
            assert frame[6] == costs[2][0][6]
    sizes = [n for n in cosine_set_sizes(SETS, tokens).tolist() if n > 0]
    whole = sum(of_set(STEPS, n) for n in sizes) + costs[2][0][6]
    later = FRAMES[name] - 1
    return begin + costs[2][0][0] + whole + later * (costs[2][-1][0] + whole)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_launches_of_a_drawing_at_released_sizes(name, dtype):
    count = count_launches(load(name, dtype), name)
    assert MOST_LAUNCHES[name] - 3000 < count <= MOST_LAUNCHES[name]


class CountingRecorder:
    """Records programs on the device: a replay is one call, however much it launches."""

    def __init__(self, device):
        self.device = device

    def __call__(self, function, pool):
        before = self.device.launches.copy()
        output = function()
        self.device.launches = before
        return Recorded(lambda: self.device.launches.update(["replay"]), output)


@pytest.mark.parametrize("name", MOST_CALLS)
def test_calls_of_the_host_when_programs_are_replayed(name, monkeypatch):
    monkeypatch.setattr(Programs, "prepare", lambda *_: None)  # fake weights lie nowhere
    model, device = load(name, torch.bfloat16), FakeCuda()
    model.programs = Programs(CountingRecorder(device))
    sizes = cosine_set_sizes(SETS, math.prod(model.config["image_base_size"])).tolist()
    frames, num_sets = min(FRAMES[name], 2), sum(n > 0 for n in sizes)
    _, run = draw(model, sizes, 2, frames, device=device)
    assert not device.pageable
    assert device.launches["replay"] == 2 * frames * num_sets
    assert len(model.programs) <= 14
    last_frame = run.marks[-1] - run.marks[-num_sets - 3]
    assert device.total + (FRAMES[name] - frames) * last_frame <= MOST_CALLS[name]


def place(dtype=torch.float32, **options):
    """A tiny model on the device."""
    return move_to_fake_cuda(lambda: make_model(**options), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("make_scheduler", [FlowMatchEulerDiscreteScheduler, DDPMScheduler])
@pytest.mark.parametrize(
    ("options", "is_listed"),
    [({}, False), ({"rotary_pos_embed": True}, True)],
    ids=["table, one", "rotary, listed"],
)
def test_generators_of_the_cpu_do_not_make_a_drawing_wait(
    dtype, make_scheduler, options, is_listed
):
    generator = torch.Generator().manual_seed(0)
    generator = [generator] if is_listed else generator
    model = place(dtype, frames=3, **options)
    device, _ = draw(model, [2, 7, 15], 3, 3, make_scheduler(), generator=generator)
    assert not device.pageable
    assert device.launches["_to_copy"] > 0


def test_class_ids_of_the_cpu_reach_the_device():
    model = place(text_token_dim=None, text_token_len=None)
    with FakeCuda() as device, torch.no_grad():
        tokens = model.label_embed(torch.tensor([1, 2]))
    assert tokens.device == DEVICE and not device.pageable


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("make_scheduler", [FlowMatchEulerDiscreteScheduler, DDPMScheduler])
def test_losses_and_gradients_are_computed_without_a_wait(dtype, make_scheduler):
    model = place(dtype).train()
    with FakeCuda(may_mix=dtype != torch.float32) as device:  # the loss itself is in float32
        x = torch.empty(2, 4, 8, 12, dtype=dtype, device=DEVICE)
        prompt = torch.empty(2, 7, 64, dtype=dtype, device=DEVICE)
        losses = model({"x": x, "prompt": prompt, "noise_scheduler": make_scheduler()})
        losses["loss"].backward()
    assert losses["loss"].device == DEVICE
    assert model.mask_embed.mask_token.grad.dtype == dtype
    assert not device.pageable


def test_spatial_tiles_are_blended_without_a_wait():
    with FakeCuda() as device:
        x = torch.empty(1, 4, 16, 16, device=DEVICE)
        assert run_in_spatial_tiles(lambda tile: tile * 2, x, (8, 8), 0.25).shape == x.shape
    assert not device.pageable


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: torch.ones(3, 3).copy_(x),
        lambda x: torch.ones(3, 3).copy_(x, non_blocking=True),
        lambda x: x + torch.ones(3),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.half() + x,
        lambda x: F.linear(x, x.bfloat16()),
    ],
    ids=[
        "item",
        "bool",
        "cpu",
        "copy",
        "pageable copy",
        "two devices",
        "nonzero",
        "equal",
        "sum of two types",
        "product of two types",
    ],
)
def test_the_device_refuses_to_be_waited_for(operation):
    with FakeCuda(), pytest.raises((AssertionError, RuntimeError)):
        operation(torch.empty(3, 3, device=DEVICE))


def test_the_device_counts_launches_and_copies_that_wait():
    with FakeCuda() as device:
        x = torch.ones(3, 4, device=DEVICE)
        assert (x[1:, None, ..., 2] @ x[:1, :2]).shape == (2, 2)
        torch.ones(2).to(DEVICE)
        torch.ones(5).pin_memory().to(DEVICE, non_blocking=True)
        x[0] = torch.ones(4)
        F.scaled_dot_product_attention(*[x.view(1, 1, 3, 4)] * 3)
        assert x.to("cpu", non_blocking=True).tolist() == [[0.0] * 4] * 3
    assert device.launches == {
        **{"ones": 1, "mm": 1, "_to_copy": 2, "copy_": 1},
        "_scaled_dot_product_efficient_attention": 1,
    }
    assert device.pageable == {(2,): 1, (4,): 1}
    assert device.fetched == {(3, 4): 1}


def test_the_device_casts_and_keeps_gradients_as_cuda_does():
    layer = move_to_fake_cuda(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), torch.float32
    )
    with FakeCuda(may_mix=True) as device:
        with torch.autocast("cuda", torch.bfloat16):
            x = layer[0](torch.ones(2, 3, device=DEVICE))
            y = layer[1](x)
        y.sum().backward()
    assert (x.dtype, y.dtype) == (torch.bfloat16, torch.float32)
    assert layer[0].weight.grad.dtype == torch.float32
    assert device.launches["mm"] == 1 and device.launches["addmm"] == 1
