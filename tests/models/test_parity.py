"""Whole models against recorded numbers: generation, losses and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffnext.models.transformers import transformer_nova as nova
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from tests.tiny import make_cogvideox, make_ltx, make_model, make_video_vae

FOLDER = Path(__file__).parent.parent / "parity"
ARCH = ("recorded_v64", "recorded_i64", "recorded_d48")

encoder_size = {"depth": 2, "embed_dim": 64, "num_heads": 2}
nova.VIDEO_ENCODERS.register(ARCH[0], nova.video_encoder, **encoder_size)
nova.IMAGE_ENCODERS.register(ARCH[1], nova.image_encoder, **encoder_size)
nova.IMAGE_DECODERS.register(ARCH[2], nova.image_decoder, depth=2, embed_dim=48)


def load(name, prefix):
    entries = load_file(FOLDER / f"{name}.safetensors").items()
    return {key.removeprefix(prefix): value for key, value in entries if key.startswith(prefix)}


def load_model(name, **overrides):
    model = make_model(frames=3, arch=ARCH, **overrides)
    model.load_state_dict({key: value.float() for key, value in load(name, "w.").items()})
    return model


@pytest.mark.parametrize(
    ("case", "weights", "overrides", "guidance_scale", "seed"),
    [
        ("nova_t2v_generate", "nova_t2v_train", {}, 5.0, 102),
        ("nova_t2v_generate_i2v", "nova_t2v_train", {}, 5.0, 103),
        ("nova_rope_generate", "nova_rope_train", {"rotary_pos_embed": True}, 5.0, 104),
        ("nova_mixer_generate_noguidance", "nova_mixer_train", {"video_mixer_rank": 8}, 1.0, 105),
    ],
)
def test_generation_follows_the_recorded_one(case, weights, overrides, guidance_scale, seed):
    model = load_model(weights, **overrides)
    model.sample_scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    recorded = load(case, "in.")
    prompts = [recorded[f"p{i}"] for i in range(4 if guidance_scale > 1 else 2)]
    inputs = {
        "prompt": prompts,
        "motion_flow": [2.5, 6.0],
        "guidance_scale": guidance_scale,
        "num_preds": [2, 0, 7, 15],
        "num_diffusion_steps": 3,
        "max_latent_length": 3,
        "batch_size": 2,
        "generator": torch.Generator().manual_seed(seed),
        "tqdm1": False,
    }
    if "first" in recorded:
        inputs["latents"] = [recorded["first"]]
    latents = model(inputs)["x"]
    torch.testing.assert_close(latents, load(case, "out.")["latents"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("case", "overrides", "seed"),
    [
        ("nova_t2v_train", {}, 1002),
        ("nova_rope_train", {"rotary_pos_embed": True}, 1003),
        ("nova_mixer_train", {"video_mixer_rank": 8}, 2004),
    ],
)
def test_losses_and_gradients_follow_the_recorded_ones(case, overrides, seed):
    model = load_model(case, **overrides).train()
    model.loss_repeat = 2
    recorded = load(case, "in.")
    torch.manual_seed(seed)
    np.random.seed(seed)
    prompts = [recorded[f"p{i}"] for i in range(len(recorded["x"]))]
    flow = [2.5, 6.0][: len(prompts)]
    losses = model({"x": recorded["x"], "prompt": prompts, "motion_flow": flow})
    sum(losses.values()).backward()
    expected = load(case, "out.")
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[f"losses.{name}"], atol=1e-4, rtol=1e-3)
    for name, parameter in model.named_parameters():
        norm = torch.tensor(-1.0) if parameter.grad is None else parameter.grad.norm()
        wanted = expected[f"gradnorm.{name}"][0]
        torch.testing.assert_close(norm, wanted, atol=1e-4, rtol=1e-3, msg=name)


VAE_CONFIGS = {
    "vae_opensora": {
        "block_out_channels": (64, 32, 32, 32),
        "scaling_factor": 0.18215,
    },
    "vae_cogvideox": {"block_out_channels": (32, 64, 32), "layers_per_block": 1},
    "vae_ltx": {
        "block_out_channels": (16, 16, 32, 32, 64),
        "layers_per_block": (1, 2, 1, 1, 1),
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 2, 1),
        "latent_channels": 8,
    },
}


@pytest.mark.parametrize(
    ("case", "make", "encoded", "decoded"),
    [
        (
            "vae_opensora",
            make_video_vae,
            {"v5": "moments_5", "img": "moments_img"},
            {("z2",): "frames_5"},
        ),
        ("vae_cogvideox", make_cogvideox, {"v5": "moments_5"}, {("z2",): "frames_5"}),
        ("vae_ltx", make_ltx, {"v9": "moments_9"}, {("z", "t"): "frames"}),
    ],
)
@torch.no_grad()
def test_video_autoencoders_follow_the_recorded_ones(case, make, encoded, decoded):
    vae = make(**VAE_CONFIGS[case])
    vae.load_state_dict({key: value.float() for key, value in load(case, "w.").items()})
    inputs = load(case, "in.")
    expected = load(case, "out.")
    for name, result in encoded.items():
        moments = vae.encode(inputs[name]).latent_dist.parameters
        torch.testing.assert_close(moments, expected[result], atol=2e-4, rtol=1e-3)
    for names, result in decoded.items():
        sample = vae.decode(*(inputs[name] for name in names)).sample
        torch.testing.assert_close(sample, expected[result], atol=2e-4, rtol=1e-3)
