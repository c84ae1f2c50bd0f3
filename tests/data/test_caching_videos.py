"""Clips from videos: times, rotation, sizes, damage; both decoders."""

import io

import numpy as np
import pytest

from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.caching.geometry import Crop
from diffnext.data.caching.settings import FrameSampling
from diffnext.data.caching.video_decoding import pick_frames, read_clips
from tests.data.caching_inputs import frame_numbers, numbered_frames, write_video

av = pytest.importorskip("av")
DECODERS = ["pyav", pytest.param("decord", marks=pytest.mark.slow)]


def keep(height, width, pixel_aspect):
    """Leave frames as they are."""
    return Crop((height, width), (height, width), 0, 0)


def read(path, decoder="pyav", plan=keep, **sampling):
    if decoder == "decord":
        pytest.importorskip("decord")
    with open(path, "rb") as file:
        return read_clips(file, FrameSampling(**sampling), plan, decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stride_takes_every_nth_frame(tmp_path, decoder):
    write_video(tmp_path / "a.mp4", numbered_frames(20))
    (clip,) = read(tmp_path / "a.mp4", decoder, num_frames=5, stride=3)
    assert clip.shape == (5, 32, 64, 3) and clip.dtype == np.uint8
    assert frame_numbers(clip) == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_varying_frame_rate_is_sampled_by_time(tmp_path, decoder):
    # 20 frames in the first second, then one of 0.5 s each.
    times = [5 * n for n in range(20)] + [100, 150, 200, 250]
    write_video(tmp_path / "a.mp4", numbered_frames(24), times=times)
    (clip,) = read(tmp_path / "a.mp4", decoder, num_frames=5, fps=2)
    assert frame_numbers(clip) == [0, 10, 20, 21, 22]


def test_frames_a_second_are_independent_of_the_rate(tmp_path):
    write_video(tmp_path / "slow.mp4", numbered_frames(10), rate=5)
    write_video(tmp_path / "fast.mp4", numbered_frames(20), rate=10)
    (slow,) = read(tmp_path / "slow.mp4", num_frames=5, fps=2.5)
    (fast,) = read(tmp_path / "fast.mp4", num_frames=5, fps=2.5)
    assert frame_numbers(slow) == [0, 2, 4, 6, 8]
    assert frame_numbers(fast) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_videos_are_upright(tmp_path, rotation):
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24] = (250, 0, 0)
    upright[24:, :16] = (0, 250, 0)
    stored = np.rot90(upright, -rotation // 90)
    write_video(tmp_path / "a.mp4", [stored] * 5, rotation=rotation)
    (clip,) = read(tmp_path / "a.mp4", num_frames=3, stride=1)
    assert clip.shape == (3, 48, 32, 3)
    assert np.abs(clip[0].astype(int) - upright).mean() < 8


def test_frames_are_scaled_and_cut_as_planned(tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, 16:48] = 200
    write_video(tmp_path / "a.mp4", [frame] * 3)
    plan = lambda height, width, aspect: Crop((16, 16), (16, 32), 0, 8)  # noqa: E731
    (clip,) = read(tmp_path / "a.mp4", plan=plan, num_frames=1)
    assert clip.shape == (1, 16, 16, 3)
    assert clip.mean() > 190  # only the middle


def test_several_clips_follow_each_other(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(23))
    clips = read(tmp_path / "a.mp4", num_frames=5, stride=2, clips=3)
    assert [frame_numbers(clip) for clip in clips] == [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18]]


def test_a_short_video_is_refused_or_held(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(6))
    with pytest.raises(BadExample, match=r"too short: 3 of 5 frames at a stride of 2"):
        read(tmp_path / "a.mp4", num_frames=5, stride=2)
    (clip,) = read(tmp_path / "a.mp4", num_frames=5, stride=2, short="hold")
    assert frame_numbers(clip) == [0, 2, 4, 4, 4]


def test_a_video_of_just_enough_frames_is_long_enough(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(9))
    (clip,) = read(tmp_path / "a.mp4", num_frames=5, stride=2)
    assert frame_numbers(clip) == [0, 2, 4, 6, 8]


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BadExample, match="no stream of pictures"):
        read(tmp_path / "a.mp4", num_frames=1)


def test_a_list_of_other_files_is_not_followed(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(3))
    (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/a.mp4'\n")
    with pytest.raises(BadExample, match="cannot be decoded"):
        read(tmp_path / "b.mp4", num_frames=1)


def test_noise_is_no_video():
    noise = np.random.default_rng(0).bytes(10000)
    with pytest.raises(BadExample, match="cannot be decoded"):
        read_clips(io.BytesIO(noise), FrameSampling(num_frames=1), keep)


def test_frames_are_picked_by_what_is_shown():
    frames = [(0.0, 1.0, "a"), (1.0, 1.1, "b"), (1.1, 3.0, "c")]
    assert list(pick_frames(frames, 0.5, 0.02, 9)) == ["a", "a", "b", "c", "c", "c"]
    assert list(pick_frames(frames, 0.5, 0.02, 2)) == ["a", "a"]
    assert list(pick_frames([], 0.5, 0.02, 2)) == []
    assert list(pick_frames([(0.0, 9.0, "still")], 0.5, 0.5, 2)) == ["still"]


@pytest.mark.parametrize("name, value", [("stride", 0), ("fps", 0), ("clips", 0), ("short", "cut")])
def test_impossible_sampling_is_refused(name, value):
    with pytest.raises(CacheError, match=name):
        FrameSampling(**{name: value})
