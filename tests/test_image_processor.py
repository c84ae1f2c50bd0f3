"""Pictures in all forms become the same pixels; latents become pictures."""

import threading
from contextlib import ExitStack

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.image_processor import VaeImageProcessor, full_precision
from tests.tiny import make_vae, make_video_vae

SIZE = (32, 48)


@pytest.fixture
def processor():
    return VaeImageProcessor()


def picture(channels=3):
    return np.random.default_rng(0).integers(0, 256, (*SIZE, channels), np.uint8)


def expected():
    return torch.as_tensor(picture()).permute(2, 0, 1)[None].float().sub(127.5).div(127.5)


def filled(value, dtype=np.uint8):
    """An array of one value."""
    return np.full((*SIZE, 3), value, dtype)


def pil(mode, value):
    """A PIL image of one colour; palettes grow from black to white."""
    image = Image.new(mode, (SIZE[1], SIZE[0]), value)
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in range(3)])
    return image


@pytest.mark.parametrize(
    ("image", "pixel_range"),
    [
        (Image.fromarray(picture()), None),
        (picture(), None),
        (np.ascontiguousarray(picture()[::-1, ::-1])[::-1, ::-1], None),
        (picture().astype(np.int64), None),
        (picture().astype(">u2"), None),
        (picture().astype(np.float64) / 255, None),
        (picture().astype(np.float32), (0, 255)),
        (picture().astype(np.float32) / 127.5 - 1, (-1, 1)),
        (picture().astype(np.int32) * 257, (0, 65535)),
        (picture()[None], None),
        (torch.as_tensor(picture()).permute(2, 0, 1), None),
        (torch.as_tensor(picture()).permute(2, 0, 1)[None].float() / 255, None),
        (expected().requires_grad_(), (-1, 1)),
        ([Image.fromarray(picture())], None),
        ((picture(),), None),
        (Image.fromarray(picture()), (-1, 1)),
    ],
    ids=[
        "PIL",
        "bytes",
        "reversed axes",
        "long integers",
        "big-endian",
        "floats to 1",
        "floats to 255",
        "floats from -1",
        "16 bits",
        "batch",
        "tensor",
        "tensor batch",
        "result",
        "list",
        "tuple",
        "PIL whatever the range",
    ],
)
def test_every_form_gives_the_same_pixels(processor, image, pixel_range):
    pixels = processor.preprocess(image, *SIZE, pixel_range=pixel_range)
    torch.testing.assert_close(pixels, expected(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("image", "pixel_range", "level"),
    [
        (filled(0), None, -1),
        (filled(1), None, 1 / 127.5 - 1),
        (filled(1, np.int64), None, 1 / 127.5 - 1),
        (filled(False, bool), None, -1),
        (filled(True, bool), None, 1),
        (filled(0, np.float32), None, -1),
        (filled(0.5, np.float16), None, 0),
        (filled(0, np.float32), (-1, 1), 0),
        (filled(0.5, np.float32), (-1, 1), 0.5),
        (filled(1, np.float32), (0, 255), 1 / 127.5 - 1),
        (filled(-0.5, np.float32), (-0.5, 0.5), -1),
        (torch.full((3, *SIZE), 0.5, dtype=torch.bfloat16), None, 0),
        (torch.full((3, *SIZE), 1.25), (-1, 1), 1),
        (torch.full((3, *SIZE), -1.25), (-1, 1), -1),
        (pil("I;16", 128), None, -1),
        (pil("I;16", 257), None, 1 / 127.5 - 1),
        (pil("I;16", 65535), None, 1),
        (pil("I;16B", 65535), None, 1),
        (pil("I", 128), None, -1),
        (pil("I", 257), None, 1 / 127.5 - 1),
        (pil("I", 65535), None, 1),
        (pil("F", 1), None, 1 / 127.5 - 1),
        (pil("F", 255), None, 1),
        (pil("L", 1), None, 1 / 127.5 - 1),
        (pil("1", 1), None, 1),
        (pil("P", 1), None, 1 / 127.5 - 1),
        (pil("CMYK", (0, 0, 0, 0)), None, 1),
        (pil("LA", (0, 255)), None, -1),
        (pil("LA", (0, 0)), None, 1),
    ],
)
def test_the_level_of_a_value_follows_from_its_type_and_the_range_alone(
    processor, image, pixel_range, level
):
    pixels = processor.preprocess(image, *SIZE, pixel_range=pixel_range)
    wanted = torch.full((1, 3, *SIZE), float(level))
    torch.testing.assert_close(pixels, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("values", [(-1, 0.25, 1), (0, 0.5, 1), (0, 1, 255)])
def test_no_frame_is_read_by_its_own_values(processor, values):
    """The dark frame in the middle would also fit into another range."""
    frames = np.stack([filled(value, np.float32) for value in values])
    low, middle, high = values
    pixels = processor.preprocess_video(frames, *SIZE, pixel_range=(low, high))
    level = 2 * (middle - low) / (high - low) - 1
    wanted = torch.tensor([-1, level, 1]).view(1, 1, 3, 1, 1).expand(1, 3, 3, *SIZE)
    torch.testing.assert_close(pixels, wanted)


def test_the_orientation_of_a_photograph_is_applied(processor, tmp_path):
    upright = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as photograph:
        assert photograph.size == (SIZE[0], SIZE[1])
        pixels = processor.preprocess(photograph, *SIZE)
    torch.testing.assert_close(pixels, expected())


def test_transparency_lies_on_white(processor):
    rgba = picture(4)
    rgba[..., 3] = 0
    for image in (Image.fromarray(rgba), rgba, torch.as_tensor(rgba).permute(2, 0, 1)):
        assert torch.equal(processor.preprocess(image, *SIZE), torch.ones(1, 3, *SIZE))
    rgba[..., 3] = 255
    opaque = torch.as_tensor(rgba[..., :3]).permute(2, 0, 1)[None].float().sub(127.5).div(127.5)
    torch.testing.assert_close(processor.preprocess(rgba, *SIZE), opaque)


def test_grey_arrays_become_rgb(processor):
    grey = picture(1)
    pixels = processor.preprocess(grey, *SIZE)
    assert torch.equal(pixels, processor.preprocess(grey[..., 0], *SIZE))
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_a_large_picture_covers_the_size_and_is_cut_in_the_middle(processor):
    image = np.zeros((64, 192, 3), np.uint8)
    image[:, :48] = (255, 0, 0)
    image[:, 144:] = (0, 255, 0)  # the outer quarters fall away
    assert (processor.preprocess(image, *SIZE) == -1).float().mean() > 0.97
    distorted = processor.preprocess(image, *SIZE, resize_mode="default")
    assert (distorted[0, 0, :, 0] == 1).all() and (distorted[0, 1, :, -1] == 1).all()


def test_tensors_are_channels_first_and_arrays_channels_last_where_both_would_fit(processor):
    values = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    as_tensor = processor.preprocess(torch.as_tensor(values), 4, 3)
    as_array = processor.preprocess(values, 3, 4)
    assert torch.equal(as_tensor, as_array.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("picture.png", "an image must be a PIL image, an array .* got str"),
        (None, "an image must be .* got NoneType"),
        ([], "an image must be"),
        ([[]], "an image must be"),
        (np.zeros(SIZE, object), "of real numbers, got object"),
        (np.zeros(SIZE, complex), "of real numbers, got complex128"),
        (torch.zeros(3, *SIZE, dtype=torch.complex64), "of real numbers, got torch.complex64"),
        (np.array([["a"]]), "of real numbers, got <U1"),
        (np.zeros((2, 2, *SIZE, 3)), "an image must be .* got pictures on 2 axes"),
        ([[picture()], [picture()]], "an image must be .* got pictures on 2 axes"),
        ([picture(), picture()[None]], "an image must be"),
        (np.zeros((8, 8, 5)), "1, 3 or 4 channels, got the shape"),
        (np.zeros((0, 8, 3)), r"got the shape \(0, 8, 3\)"),
        (np.zeros((0, 8, 8, 3)), r"got the shape \(0, 8, 8, 3\)"),
        (np.zeros(8), r"got the shape \(8,\)"),
        (pil("RGB", 0).resize((1, 1)).crop((0, 0, 0, 1)), "got the shape"),
        (pil("F", 0).crop((0, 0, 0, 1)), "got the shape"),
        (torch.zeros(*SIZE, 3), r"a tensor \(c, H, W\) .* got the shape \(32, 48, 3\) \(Tensor"),
        (np.zeros((3, *SIZE)), r"an array \(H, W, c\) .* got the shape \(3, 32, 48\) \(ndarray"),
        (np.full((8, 8, 3), -2.0), "0 to 1 .* pixel_range .* got values from -2 to -2"),
        (np.full((8, 8, 3), np.nan), "image must be .* got values from nan to nan"),
        (np.full((8, 8, 3), np.inf), "image must be .* got values from inf to inf"),
        (np.full((8, 8, 3), 256), "image must be 0 to 255 .* got values from 256 to 256"),
        (np.full((8, 8, 3), -1, np.int8), "got values from -1 to -1"),
        (picture().astype(np.float32), "image must be 0 to 1 .* pixel_range .* to 255"),
        (expected(), "image must be 0 to 1 .* pixel_range .* got values from -1 to 1"),
        (pil("I", 65536), "image must be 0 to 65535 in mode I, got values from 65536"),
        (pil("F", -1), "image must be 0 to 255 in mode F, got values from -1"),
        (pil("F", float("nan")), "image must be 0 to 255 in mode F, got values from nan"),
    ],
)
def test_what_is_not_a_picture_is_refused(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor.preprocess(image, *SIZE)


@pytest.mark.parametrize(
    ("image", "pixel_range"),
    [
        (picture().astype(np.float32), (-1, 1)),
        (picture().astype(np.float32), (0, 1)),
        (picture(), (0, 1)),
        (filled(np.nan, np.float32), (-1, 1)),
        (filled(-np.inf, np.float32), (-1, 1)),
    ],
)
def test_values_far_from_the_stated_range_are_refused(processor, image, pixel_range):
    with pytest.raises(ValueError, match="image must be .* by pixel_range, got values from"):
        processor.preprocess(image, *SIZE, pixel_range=pixel_range)


@pytest.mark.parametrize(
    "pixel_range",
    [(1, 0), (0, 0), (0, 1, 2), 1, "01a", (0, float("inf")), (float("nan"), 1), (0, None)],
)
@pytest.mark.parametrize("image", [picture(), Image.fromarray(picture())])
def test_a_range_must_be_two_rising_numbers(processor, image, pixel_range):
    with pytest.raises(ValueError, match=r"pixel_range must be \(low, high\), two numbers, got"):
        processor.preprocess(image, *SIZE, pixel_range=pixel_range)


def test_an_unknown_resize_mode_is_refused(processor):
    with pytest.raises(ValueError, match="resize_mode must be one of .* got 'zoom'"):
        processor.preprocess(picture(), *SIZE, resize_mode="zoom")


def clip(frames=5):
    """Frames that differ, (F, H, W, 3)."""
    return np.random.default_rng(1).integers(0, 256, (frames, *SIZE, 3), np.uint8)


@pytest.mark.parametrize(
    ("video", "count"),
    [
        (clip(), 1),
        (list(clip()), 1),
        ([Image.fromarray(frame) for frame in clip()], 1),
        ([torch.as_tensor(frame).movedim(-1, 0) for frame in clip()], 1),
        (torch.as_tensor(clip()).movedim(-1, 1), 1),
        (torch.as_tensor(clip()).movedim(-1, 0)[None], 1),
        (np.stack([clip()] * 2), 2),
        ([clip()] * 2, 2),
        ([[Image.fromarray(frame) for frame in clip()]] * 2, 2),
        (torch.stack([torch.as_tensor(clip()).movedim(-1, 0)] * 2), 2),
    ],
    ids=[
        "array",
        "list of arrays",
        "list of PIL",
        "list of tensors",
        "tensor of frames",
        "tensor of a result",
        "array of clips",
        "list of clips",
        "list of lists",
        "tensor of clips",
    ],
)
def test_every_form_of_a_clip_gives_the_same_pixels(processor, video, count):
    pixels = processor.preprocess_video(video, *SIZE)
    alone = torch.cat([processor.preprocess(frame, *SIZE) for frame in clip()])
    assert torch.equal(pixels, torch.stack([alone.transpose(0, 1)] * count))


def test_a_tensor_with_five_axes_is_as_results_are_where_two_layouts_would_fit(processor):
    result = processor.preprocess_video(clip(3), *SIZE)
    assert torch.equal(processor.preprocess_video(result, *SIZE, pixel_range=(-1, 1)), result)


def test_frames_of_other_sizes_are_resized_one_by_one(processor):
    wide = np.random.default_rng(1).integers(0, 256, (2, 40, 90, 3), np.uint8)
    pixels = processor.preprocess_video(wide, *SIZE)
    for index, frame in enumerate(wide):
        assert torch.equal(pixels[:, :, index], processor.preprocess(frame, *SIZE))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("clip.mp4", "a video must be a list of pictures, .* got str"),
        ([], "a video must be"),
        ([[]], "a video must be"),
        (picture(), "a video must be .* got pictures on 0 axes"),
        (Image.fromarray(picture()), "a video must be .* got pictures on 0 axes"),
        ([[clip()]], "a video must be .* got pictures on 3 axes"),
        (clip()[:0], r"a video must be .* got the shape \(0, 32"),
        ([clip(1), clip(2)], r"a video must be .* of one length, got \[1, 2\] frames"),
        ([picture(), clip(2)], r"a video must be .* of one length, got \[1, 2\] frames"),
        (torch.zeros(1, 5, 3, *SIZE), r"\(B, c, F, H, W\).* got the shape \(1, 5, 3, 32, 48\)"),
        (torch.zeros(3, 5, *SIZE), r"\(F, c, H, W\).* got the shape \(3, 5, 32, 48\)"),
        ([clip(), clip() / 127.5 - 1], "video must be 0 to 1 .* pixel_range .* from -1 to 1"),
    ],
)
def test_what_is_not_a_clip_is_refused(processor, video, message):
    with pytest.raises(ValueError, match=message):
        processor.preprocess_video(video, *SIZE)


@pytest.mark.parametrize("frames", [(), (5,)], ids=["pictures", "clips"])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_results_can_be_given_back(processor, frames, output_type):
    pixels = torch.empty(2, 3, *frames, *SIZE).uniform_(-1.2, 1.2)
    process = processor.preprocess_video if frames else processor.preprocess
    result = processor.postprocess(pixels, output_type)
    again = process(result, *SIZE, pixel_range=(-1, 1) if output_type == "pt" else None)
    tolerance = 0 if output_type == "pt" else 1 / 127.5
    torch.testing.assert_close(again, pixels.clamp(-1, 1), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frames", [(), (5,)], ids=["pictures", "clips"])
def test_pixels_of_every_dtype_are_converted(processor, dtype, frames):
    pixels = torch.ones(2, 3, *frames, *SIZE, dtype=dtype)
    array = processor.postprocess(pixels, "np")
    assert array.dtype == np.uint8 and array.shape == (2, *frames, *SIZE, 3)
    assert (array == 255).all()
    assert processor.postprocess(pixels, "pt") is pixels
    assert np.array_equal(np.stack(processor.postprocess(pixels, "pil")), array)


def test_nan_becomes_black_with_a_warning(processor, caplog):
    pixels = torch.ones(1, 3, *SIZE, dtype=torch.float16)
    pixels[0, 1, :2, 0] = torch.nan
    array = processor.postprocess(pixels, "np")
    assert (array[0, :2, 0] == (255, 0, 255)).all() and (array == 0).sum() == 2
    assert [record.getMessage() for record in caplog.records] == [
        "2 pixel values are NaN and become 0"
    ]


def test_an_unknown_output_type_is_refused(processor):
    with pytest.raises(ValueError, match="output_type must be one of .* got 'jpg'"):
        processor.postprocess(torch.ones(1, 3, *SIZE), "jpg")


# Autoencoders of half precision


def latents(dtype=torch.float16):
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


def half_vae():
    """A float16 autoencoder that asks for float32."""
    return make_vae(force_upcast=True).half()


@pytest.fixture
def upcast():
    """Pixels of the same weights in float32."""
    return VaeImageProcessor.decode_latents(half_vae().float(), latents())


@pytest.mark.parametrize("make", [make_vae, make_video_vae])
def test_force_upcast_decodes_float16_in_float32(processor, make):
    vae = make(force_upcast=True).half()
    z = latents() if make is make_vae else latents().unsqueeze(2)
    wanted = processor.decode_latents(make(force_upcast=True).half().float(), z)
    pixels = processor.decode_latents(vae, z)
    assert torch.equal(pixels, wanted)
    assert {weight.dtype for weight in vae.parameters()} == {torch.float16}
    weights = make(force_upcast=True).half().state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in vae.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "force_upcast"),
    [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True), (torch.float64, True)],
)
def test_other_autoencoders_decode_in_their_own_dtype(processor, dtype, force_upcast):
    vae = make_vae(force_upcast=force_upcast).to(dtype)
    for given in (torch.float16, torch.float32):
        assert processor.decode_latents(vae, latents(given)).dtype == dtype


def test_decoding_leaves_the_latents_as_they_are(processor):
    z = latents(torch.float32)
    processor.decode_latents(make_vae(scaling_factor=1.0), z)
    assert torch.equal(z, latents(torch.float32))


def test_chunks_of_the_decoder_change_nothing(processor):
    one, both = (processor.decode_latents(make_vae(), latents(), size) for size in (1, 2))
    torch.testing.assert_close(one, both)
    with pytest.raises(ValueError, match="vae_batch_size must be at least 1, got 0"):
        processor.decode_latents(make_vae(), latents(), 0)


def test_an_autoencoder_is_cast_back_after_an_error(processor):
    vae = half_vae()
    with pytest.raises(ValueError, match="latents must be"):
        processor.decode_latents(vae, torch.zeros(1, 5, 4, 6))
    assert {weight.dtype for weight in vae.parameters()} == {torch.float16}


def test_the_last_of_several_users_casts_an_autoencoder_back(processor, upcast):
    vae = half_vae()
    first, second = ExitStack(), ExitStack()
    for user in (first, second):
        assert user.enter_context(full_precision(vae)) == torch.float32
    first.close()
    assert vae.dtype == torch.float32
    assert torch.equal(processor.decode_latents(vae, latents()), upcast)
    second.close()
    assert vae.dtype == torch.float16


def test_threads_can_share_an_autoencoder(processor, upcast):
    vae = half_vae()
    wrong = []

    def decode():
        for _ in range(8):
            if not torch.equal(processor.decode_latents(vae, latents()), upcast):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=decode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and vae.dtype == torch.float16


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast_does_not_reach_the_autoencoder(processor, upcast, amp, dtype):
    vae = half_vae().to(dtype)
    with torch.autocast("cpu", dtype=amp):
        assert torch.equal(processor.decode_latents(vae, latents()), upcast)
        assert torch.is_autocast_enabled("cpu")


def test_inference_mode_leaves_weights_that_can_be_trained():
    vae = half_vae()
    with ExitStack() as use:
        with torch.inference_mode():
            dtype = use.enter_context(full_precision(vae))
        vae.decode(latents(dtype)).sample.sum().backward()
        with torch.inference_mode():
            use.close()
    vae.zero_grad()
    vae.decode(latents()).sample.sum().backward()


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.cpu_offload_with_hook])
def test_offloaded_weights_are_upcast_too(processor, upcast, offload):
    vae = half_vae()
    offload(vae, torch.device("cpu"))
    assert torch.equal(processor.decode_latents(vae, latents()), upcast)
    assert vae.dtype == torch.float16


def test_encoding_is_upcast_too(processor):
    vae = half_vae()
    pixels = processor.preprocess(picture(), *SIZE)
    with torch.no_grad(), full_precision(vae) as dtype:
        moments = vae.encode(pixels.to(dtype)).latent_dist.parameters
        wanted = half_vae().float().encode(pixels).latent_dist.parameters
    assert torch.equal(moments, wanted)
