"""Tiny models for all tests."""

import torch

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffnext.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler


def make_model(frames=1, seed=0, **overrides):
    """A NOVA of 8x12 latents (24 tokens) and prompts of 7 tokens, 64 wide; in eval mode."""
    torch.manual_seed(seed)
    config = {
        "image_dim": 4,
        "image_size": [64, 96],
        "image_stride": 8,
        "text_token_dim": 64,
        "text_token_len": 7,
        "image_base_size": [4, 6],
        "video_base_size": [frames, 2, 3],
        "arch": ["vit_d2w64", "vit_d4w64", "mlp_d2w64"],
    }
    model = NOVATransformer3DModel(**{**config, **overrides}).eval()
    model.sample_scheduler = FlowMatchEulerDiscreteScheduler()
    model.noise_scheduler = FlowMatchEulerDiscreteScheduler()
    return model


def make_prompts(count, seed=0):
    """Text states of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3 + i % 4, 64, generator=generator) for i in range(count)]


def generation_inputs(batch=2, guidance_scale=5.0, seed=0, **overrides):
    """Inputs of a generation in three sets of tokens."""
    rows = batch * (2 if guidance_scale > 1 else 1)
    inputs = {
        "prompt": make_prompts(rows),
        "batch_size": batch,
        "guidance_scale": guidance_scale,
        "num_preds": [2, 7, 15],
        "num_diffusion_steps": 3,
        "generator": torch.Generator().manual_seed(seed),
        "tqdm1": False,
        "tqdm2": False,
    }
    return {**inputs, **overrides}


def make_vae(seed=0, **overrides):
    """An image autoencoder of stride 8 with random weights."""
    torch.manual_seed(seed)
    config = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "latent_channels": 4}
    return AutoencoderKL(**{**config, "scaling_factor": 0.5, **overrides}).eval()


def make_video_vae(seed=0, **overrides):
    """A video autoencoder of stride 4x8x8 with random weights, laid out like the released one."""
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2 + ("DownEncoderBlock3D",) * 2,
        "up_block_types": ("UpDecoderBlock3D",) * 4,
    }
    return AutoencoderKLOpenSora(**{**config, "scaling_factor": 0.5, **overrides}).eval()


def make_cogvideox(**overrides):
    """A video autoencoder of stride 4x8x8 with random weights."""
    torch.manual_seed(0)
    config = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "latent_channels": 4}
    return AutoencoderKLCogVideoX(**{**config, **overrides}).eval()


def make_ltx(**overrides):
    """A video autoencoder of stride 8x32x32 with random weights."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 8, 16, 16, 16),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_block_out_channels": (8, 8, 16, 16),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "latent_channels": 8,
    }
    return AutoencoderKLLTXVideo(**{**config, **overrides}).eval()
