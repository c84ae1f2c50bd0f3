"""What diffusers' pipelines ask of an autoencoder holds for each of ours."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from tests.tiny import make_cogvideox, make_ltx, make_vae, make_video_vae


def make_point_vae(**overrides):
    return make_vae(double_z=False, **overrides)


MAKERS = {
    "image": make_vae,
    "image point": make_point_vae,
    "opensora": make_video_vae,
    "cogvideox": make_cogvideox,
    "ltx": make_ltx,
}


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture
def vae(kind):
    return MAKERS[kind]()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def make_input(kind, batch=2, latent_size=2):
    """Pictures for image autoencoders, clips of two latent frames for the others."""
    side = latent_size * (32 if kind == "ltx" else 8)
    frames = {"opensora": (5,), "cogvideox": (5,), "ltx": (9,)}.get(kind, ())
    return torch.randn(batch, 3, *frames, side, side)


def record_sizes(module):
    """The sizes of what goes into a network from now on."""
    sizes = []
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    return sizes


@pytest.mark.parametrize("mode", ["sample", "argmax", "latents"])
def test_diffusers_retrieves_latents(kind, vae, mode):
    output = vae.encode(make_input(kind))
    latents = retrieve_latents(output, torch.Generator().manual_seed(1), mode)
    posterior = output.latent_dist
    if mode == "sample":
        expected = posterior.sample(torch.Generator().manual_seed(1))
    else:
        expected = posterior.parameters[:, : vae.config.latent_channels]
    assert torch.equal(latents, expected)
    assert vae.decode(latents).sample.shape == make_input(kind).shape


def test_samples_follow_a_generator_given_by_position_or_name(kind, vae):
    posterior = vae.encode(make_input(kind)).latent_dist
    by_position = posterior.sample(torch.Generator().manual_seed(1))
    by_name = posterior.sample(generator=torch.Generator().manual_seed(1))
    assert torch.equal(by_position, by_name)


def test_each_sample_has_its_generator_in_a_list(kind, vae):
    x = make_input(kind)
    both = vae.encode(x).latent_dist.sample([torch.Generator().manual_seed(i) for i in (1, 2)])
    alone = vae.encode(x[1:]).latent_dist.sample(torch.Generator().manual_seed(2))
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


def test_modes_and_samples_have_the_type_of_the_model(kind, vae):
    output = vae.bfloat16().encode(make_input(kind).bfloat16())
    posterior = output.latent_dist
    assert {x.dtype for x in (posterior.mode(), posterior.sample(), output.latents)} == {
        torch.bfloat16
    }


def test_results_are_tuples_without_return_dict(kind, vae):
    x = make_input(kind)
    (posterior,) = vae.encode(x, return_dict=False)
    assert torch.equal(posterior.parameters, vae.encode(x).latent_dist.parameters)
    z = posterior.mode()
    (sample,) = vae.decode(z, return_dict=False)
    assert torch.equal(sample, vae.decode(z).sample)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_the_config_tells_whether_to_upcast(kind, force_upcast):
    assert MAKERS[kind](force_upcast=force_upcast).config.force_upcast is force_upcast
    assert MAKERS[kind]().config.force_upcast is True


def test_slicing_takes_one_sample_at_a_time(kind, vae):
    x = make_input(kind, batch=3)
    whole = vae.encode(x).latent_dist.mode()
    sample = vae.decode(whole).sample
    encoded, decoded = record_sizes(vae.encoder), record_sizes(vae.decoder)
    assert vae.use_slicing is False
    vae.enable_slicing()
    assert vae.use_slicing is True
    z = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(z, whole, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(vae.decode(whole).sample, sample, atol=2e-3, rtol=1e-3)
    assert [batch for batch, *_ in encoded] == [batch for batch, *_ in decoded] == [1, 1, 1]
    vae.disable_slicing()
    assert torch.equal(vae.encode(x).latent_dist.mode(), whole)
    assert encoded[-1][0] == 3 and vae.use_slicing is False


def test_tiling_takes_no_more_than_a_tile_at_a_time(kind):
    is_video = "image" not in kind
    size = 2 if is_video else 4  # of a tile, in latents
    ratio = 32 if kind == "ltx" else 8
    vae = MAKERS[kind](sample_size=size * ratio)
    x = make_input(kind, batch=1, latent_size=size + 1)
    whole = vae.encode(x).latent_dist.mode()
    sample = vae.decode(whole).sample
    encoded, decoded = record_sizes(vae.encoder), record_sizes(vae.decoder)
    assert vae.use_tiling is False
    vae.enable_tiling(*([size * ratio, size * ratio] if is_video else []))
    assert vae.use_tiling is True
    tiled = vae.encode(x).latent_dist.mode()
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert vae.decode(whole).sample.shape == sample.shape
    assert max(width for *_, width in encoded) == size * ratio
    assert max(width for *_, width in decoded) == size
    vae.disable_tiling()
    assert torch.equal(vae.encode(x).latent_dist.mode(), whole)
    assert torch.equal(vae.decode(whole).sample, sample) and vae.use_tiling is False


def test_a_list_of_generators_fits_the_samples():
    posterior = make_vae().encode(make_input("image", batch=3)).latent_dist
    with pytest.raises(ValueError, match="one per sample, got 2 for 3 samples"):
        posterior.sample([torch.Generator(), torch.Generator()])


def test_points_of_one_channel():
    vae = make_point_vae(latent_channels=1)
    assert vae.encode(make_input("image")).latents.shape == (2, 1, 2, 2)


def test_points_draw_no_random_numbers():
    posterior = make_point_vae().encode(make_input("image")).latent_dist
    before = torch.get_rng_state()
    posterior.sample()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_flag_alone_means_the_tiles_of_default_size(kind, vae):
    x = make_input(kind)
    whole = vae.encode(x).latent_dist.mode()
    vae.use_tiling = True
    assert torch.equal(vae.encode(x).latent_dist.mode(), whole)
