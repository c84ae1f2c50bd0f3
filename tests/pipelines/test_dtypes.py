"""Half precision, components of different dtypes and autocast: each draws, close to float32.

Distances are mean absolute differences over the standard deviation in float32, about 1 for another
seed. Measured are 0.003 where float16 is the coarsest dtype and 0.025 where bfloat16 is. The order
of prediction is drawn in the model's dtype, so that rounding may change it: not for these seeds.
"""

import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.pipelines.conftest import make_class_pipeline, make_pipeline
from tests.tiny import generation_inputs, make_model, make_vae, make_video_vae

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
QUICK = {"num_inference_steps": 2, "num_diffusion_steps": 2, "disable_progress_bar": True}
CLASSES = {"text_token_dim": None, "text_token_len": None}
MODELS = {
    "images": {},
    "images, rotary": {"rotary_pos_embed": True},
    "classes": CLASSES,
    "videos": {"frames": 3},
    "videos, rotary": {"frames": 3, "rotary_pos_embed": True},
    "videos, mixer": {"frames": 3, "video_mixer_rank": 8},
}
SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler,
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,  # takes whole frames
}
# Of the transformer, the autoencoder and the text encoder
MIXES = [
    (F16, F16, F16),
    (BF16, BF16, BF16),
    (F32, F16, BF16),
    (F32, BF16, F16),
    (F16, F32, BF16),
    (F16, BF16, F32),
    (BF16, F32, F16),
    (BF16, F16, F32),
]
OPTIONS = {
    "plain": {"guidance_scale": 1},
    "renormalised": {"guidance_renorm": 0.5},
    "reused": {"guidance_reuse": 2},
    "image guidance": {"image_guidance_scale": 1.5},
    "interval": {"guidance_interval": (200, 800)},
}


def name_of(value):
    if isinstance(value, tuple):
        return "-".join(str(dtype).removeprefix("torch.") for dtype in value)
    return None


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def picture():
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def make(kind, dtypes, scheduler="flow"):
    options = MODELS[kind]
    maker = make_class_pipeline if kind == "classes" else make_pipeline
    vae = make_video_vae() if "frames" in options else make_vae()
    pipe = maker(transformer=make_model(**options), scheduler=SCHEDULERS[scheduler](), vae=vae)
    for name, dtype in zip(("transformer", "vae", "text_encoder"), dtypes, strict=True):
        if name in pipe.components:
            getattr(pipe, name).to(dtype)
    return pipe


def draw(pipe, seed=1, **options):
    if pipe.transformer.motion_embed is not None:
        options = {"max_latent_length": 2, **options}
    prompt = 3 if pipe.transformer.text_embed is None else "a cat"
    options = {"output_type": "latent", "generator": seeded(seed), "return_dict": False, **options}
    return pipe(prompt, **options, **QUICK)[0]


def autocast(dtype=BF16):
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@functools.cache
def in_float32(kind, scheduler="flow", option=None, seed=1, output_type="latent"):
    options = {} if option is None else given_options(option)
    pipe = make(kind, (F32, F32, F32), scheduler)
    return draw(pipe, seed, output_type=output_type, **options)


def given_options(option):
    return {"image": picture()} if option == "first picture" else OPTIONS[option]


def check_close(found, expected, dtypes):
    assert torch.isfinite(found).all() and found.shape == expected.shape
    distance = (found.float() - expected).abs().mean() / expected.std()
    assert distance < (0.06 if BF16 in dtypes else 0.01)


@pytest.mark.parametrize("dtypes", MIXES, ids=name_of)
@pytest.mark.parametrize("kind", MODELS)
def test_components_of_any_dtypes_draw_close_to_float32(kind, dtypes):
    output_type = "latent" if "," in kind else "pt"  # to decode is what takes time
    found = draw(make(kind, dtypes), output_type=output_type)
    check_close(found, in_float32(kind, output_type=output_type), dtypes)


@pytest.mark.parametrize("kind", MODELS)
def test_another_seed_is_far_away(kind):
    """What "close" means: nothing of the tests above holds for another picture."""
    other = in_float32(kind, seed=2)
    assert (other - in_float32(kind)).abs().mean() / other.std() > 0.5


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), *MIXES], ids=name_of)
@pytest.mark.parametrize("kind", ["classes", "videos, rotary"])
def test_components_of_any_dtypes_draw_under_autocast(kind, dtypes):
    pipe = make(kind, dtypes)
    with autocast():
        found = draw(pipe)
    check_close(found, in_float32(kind), [BF16])


@pytest.mark.parametrize(
    ("dtypes", "cast"),
    [((F16, F16, F16), None), ((BF16, F32, F16), None), ((F32, F16, BF16), BF16)],
    ids=name_of,
)
@pytest.mark.parametrize("option", [*OPTIONS, "first picture"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_guidance_and_schedulers_draw_in_any_dtype(scheduler, option, dtypes, cast):
    pipe = make("videos", dtypes, scheduler)
    with autocast(cast):
        found = draw(pipe, **given_options(option))
    check_close(found, in_float32("videos", scheduler, option), [*dtypes, cast])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_models_in_half_precision_draw_the_same_under_autocast(dtype):
    for kind in ("images, rotary", "videos"):
        expected = draw(make(kind, (dtype, dtype, dtype)))
        pipe = make(kind, (dtype, dtype, dtype))
        with autocast():
            assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_text_encoder_in_half_precision_reads_the_same_under_autocast(dtype):
    pipe = make("images", (F32, F32, dtype))
    expected = pipe.encode_prompt(["a cat", "the mat"], negative_prompt="red")
    with autocast():
        found = pipe.encode_prompt(["a cat", "the mat"], negative_prompt="red")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [F16, BF16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (F16, F16, F16), (BF16, F32, F32)], ids=name_of
)
def test_given_latents_may_have_another_dtype(dtypes, dtype):
    latents = torch.randn(1, 4, 1, 8, 12, generator=seeded())
    pipe = make("videos", dtypes)
    options = {"latents": latents.to(dtype), "output_type": "latent"}
    for cast in (None, BF16):
        with autocast(cast):
            found = draw(pipe, **options)
        torch.testing.assert_close(found[:, :, :1].float(), latents, atol=0.02, rtol=0.02)


def test_streams_draw_in_half_precision_under_autocast():
    pipe = make("videos", (F16, F16, F16))
    options = {"max_latent_length": 2, "generator": seeded(), "output_type": "pt"}
    with autocast():
        pieces = list(pipe.stream("a cat", **options, **QUICK))
    assert torch.equal(torch.cat(pieces, dim=2), draw(pipe, output_type="pt"))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_callers_of_the_model_draw_under_autocast(dtype):
    model = make_model(frames=3).to(dtype)
    expected = model(generation_inputs(max_latent_length=2, motion_flow=5))["x"]
    with autocast():
        found = model(generation_inputs(max_latent_length=2, motion_flow=5))["x"]
    distance = (found.float() - expected.float()).abs().mean()
    assert distance / expected.float().std() < (0.1 if dtype == F32 else 1e-6)


@pytest.mark.parametrize("cast", [None, BF16], ids=["", "autocast"])
def test_autoencoders_that_overflow_in_float16_decode_in_float32(cast):
    pipe = make("images", (F16, F16, F16))
    pipe.vae = make_vae(force_upcast=True).half()
    # Ten thousands inside, as in the first released SDXL autoencoder
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 1e4
        pipe.vae.decoder.conv_in.bias.fill_(60000.0)
    with autocast(cast):
        pixels = draw(pipe, output_type="pt")
    assert pixels.dtype == F32 and torch.isfinite(pixels).all()
    assert pipe.vae.dtype == F16
    pipe.vae.register_to_config(force_upcast=False)
    assert not torch.isfinite(draw(pipe, output_type="pt")).all()


@pytest.mark.parametrize("dtypes", [(F16, F32, F32), (F32, F16, F16)], ids=name_of)
def test_first_pictures_are_encoded_close_to_float32(dtypes):
    pipe = make("videos", dtypes)
    exact = make("videos", (F32, F32, F32)).encode_image(picture(), generator=seeded())
    found = pipe.encode_image(picture(), generator=seeded())
    torch.testing.assert_close(found.float(), exact, atol=0.01, rtol=0.01)
