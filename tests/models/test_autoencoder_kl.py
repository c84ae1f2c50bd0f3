"""The image autoencoder and its posterior."""

import diffusers
import pytest
import torch

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.modeling_utils import DiagonalGaussianDistribution
from tests.tiny import make_vae


@torch.no_grad()
def test_it_is_the_network_of_diffusers():
    ours = make_vae()
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    moments = ours.encode(x).latent_dist.parameters
    assert torch.equal(moments, theirs.encode(x).latent_dist.parameters)
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)


@torch.no_grad()
def test_one_frame_decodes_as_a_picture():
    vae = make_vae()
    z = torch.randn(2, 4, 1, 8, 8)
    before = z.clone()
    assert torch.equal(vae.decode(z).sample, vae.decode(z[:, :, 0]).sample)
    assert torch.equal(z, before)


def test_scaling_round_trips_and_leaves_its_input_alone():
    vae = make_vae(scaling_factor=0.13, shift_factor=0.2)
    z = torch.randn(1, 4, 2, 2)
    before = z.clone()
    scaled = vae.scale_(z)
    torch.testing.assert_close(scaled, (before - 0.2) * 0.13)
    torch.testing.assert_close(vae.unscale_(scaled), before)
    assert torch.equal(z, before)


def test_ignored_config_fields_do_not_matter():
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock3D"] * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=7,
        act_fn="relu",
    )
    assert vae.encoder.conv_norm_out.num_groups == 32


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 2, 64, 64)])
def test_other_shapes_than_batches_of_pictures_are_refused(shape):
    with pytest.raises(ValueError, match=r"pictures must be \(B, 3, H, W\), got"):
        make_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 2, 8, 8)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\)"):
        make_vae().decode(torch.zeros(shape))


def test_posterior_statistics_are_float32_and_samples_are_not():
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3).half() * 50)
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert posterior.logvar.min() >= -30 and posterior.logvar.max() <= 20
    assert posterior.sample().dtype == torch.float16
