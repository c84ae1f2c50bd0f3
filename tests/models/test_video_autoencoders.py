"""The video autoencoders: lengths, tiles, memory options, errors, files."""

import json

import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diffnext.models.autoencoders import autoencoder_kl_ltx, video_layers
from diffnext.models.autoencoders.autoencoder_kl_cogvideox import resize_latents
from diffnext.models.autoencoders.autoencoder_kl_ltx import (
    depth_to_space,
    patchify,
    space_to_depth,
    unpatchify,
)
from diffnext.models.autoencoders.modeling_utils import TilingMixin
from diffnext.models.autoencoders.tiling import Tile, run_in_spatial_tiles
from diffnext.models.autoencoders.video_layers import (
    CausalConv3d,
    Downsample,
    FrameConv2d,
    Upsample,
)
from tests.tiny import make_cogvideox, make_ltx, make_video_vae

MAKERS = {"opensora": make_video_vae, "cogvideox": make_cogvideox, "ltx": make_ltx}
SIDE = {"opensora": 16, "cogvideox": 16, "ltx": 32}


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


def encode(vae, x):
    return vae.encode(x).latent_dist.parameters


def oracle(run, x, size, stride, drop):
    """Tiles by hand: whole ones, then the rest."""
    pieces = []
    start = 0
    while start == 0 or start + (size - stride) < x.size(2):
        piece = run(x[:, :, start : start + size])
        pieces.append(piece[:, :, drop if start else 0 :])
        start += stride
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize(
    ("frames", "latents"), [(17, 5), (33, 9), (21, 6), (29, 8), (37, 10), (1, 1), (5, 2)]
)
def test_opensora_encodes_every_legal_length(frames, latents):
    vae = make_video_vae()
    x = torch.randn(1, 3, frames, 16, 16)
    moments = encode(vae, x)
    assert moments.shape == (1, 8, latents, 2, 2)
    expected = vae.quant_conv(oracle(vae.encoder, x, size=17, stride=16, drop=1))
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("latents", "frames"), [(5, 17), (7, 25), (9, 33), (10, 37), (1, 1)])
def test_opensora_decodes_every_length(latents, frames):
    vae = make_video_vae()
    z = torch.randn(1, 4, latents, 2, 2)
    sample = vae.decode(z).sample
    assert sample.shape == (1, 3, frames, 16, 16)
    expected = oracle(vae.decoder, vae.post_quant_conv(z), size=5, stride=4, drop=1)
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("frames", "nearest"), [(20, "17 or 21"), (30, "29 or 33"), (34, "33 or 37"), (2, "1 or 5")]
)
def test_opensora_names_the_nearest_legal_lengths(frames, nearest):
    vae = make_video_vae()
    message = f"AutoencoderKLOpenSora cannot take {frames} frames: .* is {nearest}$"
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize(("frames", "latents"), [(17, 5), (21, 7), (33, 10), (29, 9), (5, 2)])
def test_cogvideox_tiles_share_no_latents(frames, latents):
    vae = make_cogvideox()
    x = torch.randn(1, 3, frames, 16, 16)
    moments = encode(vae, x)
    assert moments.shape == (1, 8, latents, 2, 2)
    expected = oracle(vae.encoder, x, size=17, stride=16, drop=0)
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=1e-5)
    z = moments[:, :4]
    sample = vae.decode(z).sample
    assert sample.shape == x.shape
    expected = oracle(vae.decoder, z, size=5, stride=5, drop=1)
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-5)


def test_a_latent_that_would_add_no_frame_is_refused():
    with pytest.raises(ValueError, match="cannot take 6 latent frames: .* is 5 or 7"):
        make_cogvideox().decode(torch.zeros(1, 4, 6, 2, 2))
    with pytest.raises(ValueError, match="cannot take 33 latent frames: .* is 32 or 34"):
        make_ltx().decode(torch.zeros(1, 8, 33, 1, 1))


def test_ltx_lengths():
    vae = make_ltx()
    assert [vae.latent_length(f) for f in (1, 9, 17, 249, 257, 497)] == [1, 2, 3, 32, 34, 64]
    assert [vae.sample_length(t) for t in (1, 2, 3, 32, 34, 64)] == [1, 9, 17, 249, 257, 497]
    x = torch.randn(1, 3, 17, 32, 32)
    moments = encode(vae, x)
    assert moments.shape == (1, 9, 3, 1, 1)
    assert vae.decode(moments[:, :8]).sample.shape == x.shape
    with pytest.raises(ValueError, match="cannot take 16 frames: .* is 9 or 17"):
        vae.encode(x[:, :, :16])


def test_ltx_tiles_cover_long_clips():
    vae = make_ltx()
    assert vae.sample_tiles(249) == [Tile(0, 249, 0)]
    assert vae.sample_tiles(257) == [Tile(0, 249, 0), Tile(248, 257, 0)]
    assert vae.sample_tiles(497) == [Tile(0, 249, 0), Tile(248, 497, 0)]
    assert vae.latent_tiles(32) == [Tile(0, 32, 0)]
    assert vae.latent_tiles(34) == [Tile(0, 32, 0), Tile(32, 34, 1)]
    assert vae.latent_tiles(64) == [Tile(0, 32, 0), Tile(32, 64, 1)]


@pytest.mark.parametrize(("tile", "latents"), [(17, 3), (9, 2)])
def test_ltx_tiles_equal_tiles_by_hand(tile, latents):
    """Smaller tiles than the released 249 frames, by the same rule."""
    vae = make_ltx()
    vae.sample_min_t = tile
    vae.latent_min_t = latents
    x = torch.randn(1, 3, 25, 32, 32)
    moments = encode(vae, x)
    expected = oracle(vae.encoder, x, size=tile, stride=tile - 1, drop=0)
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=1e-5)
    z = moments[:, :8]
    temb = torch.tensor([0.1])
    expected = oracle(lambda part: vae.decoder(part, temb), z, latents, latents, drop=1)
    torch.testing.assert_close(vae.decode(z, temb).sample, expected, atol=1e-5, rtol=1e-5)


def test_every_legal_length_comes_back(kind):
    vae = MAKERS[kind]()
    ratio = vae.temporal_compression_ratio
    for frames in range(1, 600, ratio):
        assert vae.sample_length(vae.latent_length(frames)) == frames


def test_the_mixin_serves_any_encoder_and_decoder():
    class Halves(TilingMixin):
        temporal_compression_ratio = 4

        def encoder(self, x):
            return x[:, :, ::4]

        def decoder(self, z, offset):
            first = z[:, :, :1]
            return torch.cat([first, z[:, :, 1:].repeat_interleave(4, dim=2)], dim=2) + offset

    tiles = Halves(sample_min_t=5, latent_min_t=2, sample_ovr_t=1, latent_ovr_t=1)
    x = torch.arange(13.0).view(1, 1, 13, 1, 1)
    assert tiles.tiled_encoder(x).flatten().tolist() == [0, 4, 8, 12]
    frames = tiles.tiled_decoder(x[:, :, :4], 10)
    assert frames.flatten().tolist() == [10, *[11] * 4, *[12] * 4, *[13] * 4]


def test_the_timestep_reaches_the_ltx_decoder():
    vae = make_ltx()
    z = torch.randn(2, 8, 2, 1, 1)
    default = vae.decode(z).sample
    assert torch.equal(default, vae.decode(z, torch.zeros(2)).sample)
    late = vae.decode(z, torch.tensor([0.0, 0.5])).sample
    torch.testing.assert_close(late[0], default[0])
    assert not torch.allclose(late[1], default[1])


@pytest.mark.parametrize("temb", [torch.zeros(3), torch.zeros(2, 1), torch.tensor(0.0)])
def test_timesteps_of_another_shape_are_refused(temb):
    with pytest.raises(ValueError, match=r"temb must be \(2,\), got"):
        make_ltx().decode(torch.zeros(2, 8, 2, 1, 1), temb)


@pytest.mark.parametrize(("height", "width"), [(48, 32), (32, 18)])
def test_ltx_names_the_sizes_it_takes(height, width):
    with pytest.raises(ValueError, match=f"multiples of 32, got {height}x{width}"):
        make_ltx().encode(torch.zeros(1, 3, 1, height, width))


def ltx_weights_with_factors():
    shift = torch.randn(1, 8, 1, 1, 1)
    scale = torch.rand(1, 8, 1, 1, 1) + 0.5
    weights = {**make_ltx().state_dict(), "shift_factors": shift, "scaling_factors": scale}
    return weights, shift, scale


def test_ltx_factors_of_a_state_dict_take_the_place_of_numbers():
    vae = make_ltx(scaling_factor=2.0)
    assert "shift_factors" not in vae.state_dict()
    weights, shift, scale = ltx_weights_with_factors()
    vae.load_state_dict(weights)
    z = torch.randn(2, 8, 2, 1, 1)
    torch.testing.assert_close(vae.scale_(z), (z - shift) * scale)
    torch.testing.assert_close(vae.unscale_(vae.scale_(z)), z)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_ltx_factors_of_a_file_take_the_place_of_numbers(low_cpu_mem_usage, tmp_path):
    weights, shift, scale = ltx_weights_with_factors()
    make_ltx().save_pretrained(tmp_path)
    save_file(weights, tmp_path / SAFETENSORS_WEIGHTS_NAME)
    loaded = autoencoder_kl_ltx.AutoencoderKLLTXVideo.from_pretrained(
        tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    z = torch.randn(2, 8, 2, 1, 1)
    torch.testing.assert_close(loaded.scale_(z), (z - shift) * scale)
    loaded.save_pretrained(tmp_path / "again")
    again = type(loaded).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.unscale_(z), z / scale + shift)


def test_ltx_factors_scale_latents_of_pictures():
    vae = make_ltx()
    vae.load_state_dict(ltx_weights_with_factors()[0])
    z = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(vae.scale_(z), vae.scale_(z.unsqueeze(2)).squeeze(2))
    torch.testing.assert_close(vae.unscale_(z), vae.unscale_(z.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("missing", ["shift_factors", "scaling_factors"])
def test_one_ltx_factor_alone_is_refused(missing):
    weights = ltx_weights_with_factors()[0]
    del weights[missing]
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*{missing}"):
        make_ltx().load_state_dict(weights)


def test_ltx_factors_take_the_dtype_of_the_model():
    vae = make_ltx().bfloat16()
    vae.load_state_dict(ltx_weights_with_factors()[0])
    assert vae.shift_factors.dtype == vae.scaling_factors.dtype == torch.bfloat16


def test_pictures_are_clips_of_one_frame(kind, vae):
    side = SIDE[kind]
    x = torch.randn(2, 3, side, side)
    moments = encode(vae, x)
    torch.testing.assert_close(moments, encode(vae, x.unsqueeze(2)).squeeze(2))
    z = moments[:, : vae.config.latent_channels]
    picture = vae.decode(z).sample
    assert picture.shape == x.shape
    torch.testing.assert_close(picture, vae.decode(z.unsqueeze(2)).sample.squeeze(2))


@pytest.mark.parametrize("shape", [(1, 4, 5, 32, 32), (3, 5, 32, 32), (1, 3, 32)])
def test_shapes_that_do_not_fit_are_refused(vae, shape):
    with pytest.raises(ValueError, match="pictures or videos must be"):
        vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="latents must be"):
        vae.decode(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("size", [(32, 32), (40, 64), (72, 48), (16, 24)])
def test_spatial_tiles_of_local_functions_are_exact(size):
    x = torch.randn(2, 3, 4, *size)
    pooled = run_in_spatial_tiles(
        lambda tile: F.avg_pool3d(tile, (1, 8, 8)), x, (32, 32), overlap=0.25, unit=8
    )
    torch.testing.assert_close(pooled, F.avg_pool3d(x, (1, 8, 8)))
    large = run_in_spatial_tiles(
        lambda tile: F.interpolate(tile, scale_factor=(1.0, 2.0, 2.0)), x, (16, 24), overlap=0.3
    )
    torch.testing.assert_close(large, F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 32), "multiples of 8 pixels, got 20x32"),
        ((32, -8), "multiples of 8 pixels, got 32x-8"),
        ((0, 32), "multiples of 8 pixels, got 0x32"),
        ((32.0, None), "multiples of 8 pixels, got 32.0xNone"),
        ((32, 32, 1.0), "below 1, got 1.0"),
        ((32, 32, -0.1), "below 1, got -0.1"),
    ],
)
def test_impossible_spatial_tiles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_video_vae().enable_tiling(*arguments)


def test_pictures_that_spatial_tiles_do_not_fit_are_refused():
    vae = make_video_vae()
    vae.enable_tiling(32, 32)
    with pytest.raises(ValueError, match=r"multiples of 8 to be tiled, got \(36, 40\)"):
        vae.encode(torch.zeros(1, 3, 36, 40))


def test_causal_convolutions_see_no_later_frame():
    conv = CausalConv3d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 6, 4, 4)
    y = conv(x)
    x[:, :, 3:] += 1
    changed = conv(x)
    assert torch.equal(y[:, :, :3], changed[:, :, :3])
    assert not torch.equal(y[:, :, 3], changed[:, :, 3])


@pytest.mark.parametrize(
    ("layer", "frames", "changed_from", "kept"),
    [
        (Downsample(4, CausalConv3d), 9, 5, 3),
        (Upsample(4, CausalConv3d, has_time=True, mode="trilinear"), 5, 3, 4),
        (Downsample(4, FrameConv2d, has_time=True), 9, 5, 3),
        (Upsample(4, FrameConv2d, has_time=True), 5, 3, 5),
        (autoencoder_kl_ltx.Downsample(4, 8, (2, 2, 2)), 9, 5, 3),
    ],
)
def test_resampling_in_time_is_causal(layer, frames, changed_from, kept):
    """``kept`` output frames come from the ``changed_from`` first frames of the input.

    Where OpenSora enlarges time, a frame is interpolated with the next one: one frame less.
    """
    x = torch.randn(1, 4, frames, 8, 8)
    before = layer(x)
    x[:, :, changed_from:] += 1
    after = layer(x)
    torch.testing.assert_close(after[:, :, :kept], before[:, :, :kept])
    assert not torch.allclose(after[:, :, kept], before[:, :, kept])


def test_a_still_clip_stays_still_in_a_causal_convolution():
    """The first frame is repeated in front, so it is not an edge."""
    conv = CausalConv3d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 1, 4, 4).expand(-1, -1, 5, -1, -1)
    y = conv(x)
    torch.testing.assert_close(y, y[:, :, :1].expand_as(y))


@pytest.mark.parametrize("kernel", [3, 1, (1, 3, 3)])
def test_large_inputs_are_convolved_in_chunks(kernel, monkeypatch):
    conv = CausalConv3d(2, 3, kernel, padding=0 if kernel == 1 else 1)
    x = torch.randn(1, 2, 11, 6, 6)
    whole = conv(x)
    monkeypatch.setattr(video_layers, "_MAX_ELEMENTS", x.numel() // 3)
    torch.testing.assert_close(conv(x), whole)


def test_upsampling_keeps_the_first_frame_one_frame():
    up = Upsample(2, CausalConv3d, has_time=True, mode="trilinear")
    assert up(torch.randn(1, 2, 3, 4, 4)).shape == (1, 2, 5, 8, 8)
    assert up(torch.randn(1, 2, 1, 4, 4)).shape == (1, 2, 1, 8, 8)


def test_latents_are_resized_beside_their_first_frame():
    z = torch.arange(3.0).view(1, 1, 3, 1, 1)
    assert resize_latents(z, (5, 1, 1)).flatten().tolist() == [0, 1, 1, 2, 2]
    assert resize_latents(z, (6, 1, 1)).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_folding_space_into_channels_is_undone():
    x = torch.randn(2, 3, 4, 8, 12)
    for stride in ((1, 2, 2), (2, 1, 1), (2, 2, 2)):
        assert torch.equal(depth_to_space(space_to_depth(x, stride), stride), x)
    assert torch.equal(unpatchify(patchify(x)), x)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near(kind, dtype, share):
    frames = 9 if kind == "ltx" else 5
    x = torch.randn(1, 3, frames, SIDE[kind], SIDE[kind])
    full = MAKERS[kind]()
    half = MAKERS[kind]().to(dtype)
    moments = encode(full, x)
    rounded = encode(half, x.to(dtype))
    assert rounded.dtype == dtype
    assert (rounded - moments).abs().mean() < share * moments.abs().mean()
    z = moments[:, : full.config.latent_channels]
    sample = full.decode(z).sample
    rounded = half.decode(z.to(dtype)).sample
    assert rounded.dtype == dtype
    assert (rounded - sample).abs().mean() < share * sample.abs().mean()


def test_files_come_back(kind, vae, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = type(vae).from_pretrained(tmp_path)
    x = torch.randn(1, 3, 1, SIDE[kind], SIDE[kind])
    torch.testing.assert_close(encode(loaded, x), encode(vae, x))
    file = tmp_path / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(file)
    weights["stray.weight"] = weights.pop("encoder.conv_in.bias")
    save_file(weights, file)
    with pytest.raises(RuntimeError, match=r"conv_in\.bias[\s\S]*stray\.weight"):
        type(vae).from_pretrained(tmp_path)


def test_a_released_config_loads(tmp_path):
    """The key set of the released video autoencoder, whose class only the index names."""
    config = {
        "_class_name": "AutoencoderKLOpenSora",
        "act_fn": "silu",
        "block_out_channels": [32, 32, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2 + ["DownEncoderBlock3D"] * 2,
        "up_block_types": ["UpDecoderBlock3D"] * 4,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "sample_size": 480,
        "scaling_factor": 0.18215,
    }
    vae = make_video_vae(scaling_factor=0.18215)
    vae.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = type(vae).from_pretrained(tmp_path)
    assert loaded.config.sample_size == 480
    x = torch.randn(1, 3, 5, 16, 16)
    torch.testing.assert_close(encode(loaded, x), encode(vae, x))


def test_old_names_of_attention_weights_are_understood(tmp_path):
    vae = make_video_vae()
    vae.save_pretrained(tmp_path)
    file = tmp_path / SAFETENSORS_WEIGHTS_NAME
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in load_file(file).items():
        for new_part, old_part in old.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        weights[name] = value
    save_file(weights, file)
    loaded = type(vae).from_pretrained(tmp_path)
    x = torch.randn(1, 3, 1, 16, 16)
    torch.testing.assert_close(encode(loaded, x), encode(vae, x))
