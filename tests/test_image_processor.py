"""Pictures in all forms become the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.image_processor import VaeImageProcessor

SIZE = (32, 48)


@pytest.fixture
def processor():
    return VaeImageProcessor()


def picture(channels=3):
    return np.random.default_rng(0).integers(0, 256, (*SIZE, channels), np.uint8)


def expected():
    return torch.as_tensor(picture()).permute(2, 0, 1)[None].float().sub(127.5).div(127.5)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(picture()),
        picture(),
        picture().astype(np.float32),
        picture().astype(np.float32) / 255,
        picture().astype(np.float32) / 127.5 - 1,
        picture()[None],
        torch.as_tensor(picture()),
        torch.as_tensor(picture()).permute(2, 0, 1),
        torch.as_tensor(picture()).permute(2, 0, 1)[None].float() / 255,
        [Image.fromarray(picture())],
    ],
    ids=[
        "PIL",
        "bytes",
        "floats to 255",
        "floats to 1",
        "floats from -1",
        "batch",
        "tensor HWC",
        "tensor CHW",
        "tensor batch",
        "list",
    ],
)
def test_every_form_gives_the_same_pixels(processor, image):
    pixels = processor.preprocess(image, *SIZE)
    torch.testing.assert_close(pixels, expected(), atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "F", "P", "CMYK", "LA"])
def test_other_colour_models_become_rgb(processor, mode):
    white = {"I;16": 65535, "F": 255.0, "CMYK": (0, 0, 0, 0), "LA": (255, 255), "1": 1}
    image = Image.new(mode, (SIZE[1], SIZE[0]), white.get(mode, 255))
    if mode == "P":
        image.putpalette([255] * 768)
    pixels = processor.preprocess(image, *SIZE)
    assert pixels.shape == (1, 3, *SIZE) and (pixels == 1).all()


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


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("picture.png", "must be a PIL image, an array .* got str"),
        (np.zeros((2, 2, 2, 2, 3)), "got shape"),
        (np.zeros((8, 8, 5)), "1, 3 or 4 channels"),
        (np.full((8, 8, 3), -2.0), "values from -2 to -2"),
        (np.full((8, 8, 3), np.nan), "values from nan"),
        (np.full((8, 8, 3), 256), "values from 256"),
        (np.zeros((0, 8, 3)), "got shape"),
    ],
)
def test_what_is_no_picture_is_refused(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor.preprocess(image, *SIZE)


def test_clips_must_have_one_length(processor):
    clips = [picture()[None].repeat(n, 0) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"one length, got \[1, 2\] frames"):
        processor.preprocess_video(clips, *SIZE)


def test_clips_keep_their_frames_in_order(processor):
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(48, 2)
    pixels = processor.preprocess_video(frames.repeat(3, 3) * 40, *SIZE)
    assert pixels.shape == (1, 3, 5, *SIZE)
    assert pixels[0, 0, :, 0, 0].diff().gt(0).all()
