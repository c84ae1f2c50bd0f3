"""Motion strength: pixels that moving things move from frame to frame, at a height of 480."""

import functools
import sys

import numpy as np
import pytest
from PIL import Image

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.geometry import plan_crop
from diffnext.data.caching.motion import FLOW_UNIT, estimate_flow
from diffnext.data.caching.settings import CacheSettings, FrameSampling
from diffnext.data.caching.video_decoding import read_clips

pytest.importorskip("cv2")
HEIGHT, WIDTH = 480, 768


def texture(width=WIDTH, height=HEIGHT, seed=0):
    """Smooth noise of several scales, (height, width, 3)."""
    rng = np.random.default_rng(seed)
    layers = []
    for scale in (8, 16, 32):
        coarse = rng.random((height // scale + 2, width // scale + 2), np.float32)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        layers.append(np.asarray(picture) * scale)
    mixed = sum(layers)
    grey = (255 * (mixed - mixed.min()) / np.ptp(mixed)).astype(np.uint8)
    return grey[..., None].repeat(3, -1)


def pan(step, count=4):
    """A texture that moves to the left."""
    wide = texture(WIDTH + step * count)
    return np.stack([wide[:, step * n : step * n + WIDTH] for n in range(count)])


def with_thing(background, step=6, count=4, contrast=1.0):
    """A small thing that moves to the right before a still background."""
    thing = (texture(40, 40, seed=1) * contrast).astype(np.uint8)
    frames = np.stack([background] * count)
    for number, frame in enumerate(frames):
        left = 400 + step * number
        frame[200:240, left : left + 40] = thing
    return frames


def chessboard():
    cells = (np.arange(HEIGHT)[:, None] // 10 + np.arange(WIDTH) // 10) % 2
    board = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    board[:, :300] = (255 * cells[:, :300, None]).astype(np.uint8)
    return board


@pytest.mark.parametrize("step", [1, 2, 5, 8, 20])
def test_a_pan_is_measured_in_pixels(step):
    assert estimate_flow(pan(step)) == pytest.approx(step, rel=0.02)
    assert FLOW_UNIT == "pixels at 480 height"


@pytest.mark.parametrize("scale", [0.25, 0.5, 2])
def test_the_unit_is_that_of_480_pixels_height_whatever_the_size(scale):
    size = (round(WIDTH * scale), round(HEIGHT * scale))
    frames = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in pan(8)]
    assert estimate_flow(np.stack(frames)) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize(
    "background", [np.full((HEIGHT, WIDTH, 3), 128, np.uint8), texture(seed=2), chessboard()]
)
def test_what_stands_still_does_not_count(background):
    assert estimate_flow(with_thing(background)) == pytest.approx(6, rel=0.12)
    assert estimate_flow(with_thing(background, step=0)) == 0


def test_the_clip_of_the_guide():
    pytest.importorskip("av")
    settings = CacheSettings(
        kind="videos", source="", output=".", vae=".", sizes=((HEIGHT, WIDTH),)
    )
    with open("assets/sample_video.mp4", "rb") as file:
        plan = functools.partial(plan_crop, settings=settings)
        (clip,) = read_clips(file, FrameSampling(num_frames=33, stride=2), plan)
    assert estimate_flow(clip) == pytest.approx(3.4, abs=0.1)


def test_noise_flicker_and_fades_are_no_motion():
    still = texture()
    noise = np.random.default_rng(0).normal(0, 3, (4, HEIGHT, WIDTH, 1))
    assert estimate_flow((still + noise).clip(0, 255).astype(np.uint8)) == 0
    for strengths in ([1, 0.8, 1, 0.8], [1, 0.75, 0.5, 0.25]):
        frames = np.stack([(still * strength).astype(np.uint8) for strength in strengths])
        assert estimate_flow(frames) == 0
    faded = [(frame * (1 - 0.2 * n)).astype(np.uint8) for n, frame in enumerate(pan(5))]
    assert estimate_flow(np.stack(faded)) == pytest.approx(5, rel=0.05)


def test_a_cut_does_not_count():
    other = np.stack([np.flip(frame, 0) for frame in pan(5)])
    assert estimate_flow(np.concatenate([pan(5), other])) == pytest.approx(5, rel=0.02)
    assert estimate_flow(np.stack([texture(seed=n) for n in range(3)])) == 0


def test_where_nothing_is_to_be_seen_nothing_moves():
    assert estimate_flow(texture()[None]) == 0
    assert estimate_flow(np.full((3, HEIGHT, WIDTH, 3), 99, np.uint8)) == 0
    assert estimate_flow(np.zeros((3, 1, 1, 3), np.uint8)) == 0


def test_the_same_frames_give_the_same_number():
    frames = with_thing(texture(seed=2))
    assert len({estimate_flow(frames) for _ in range(3)}) == 1


def test_without_opencv_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(CacheError, match="pip install opencv-python-headless"):
        estimate_flow(pan(1))
