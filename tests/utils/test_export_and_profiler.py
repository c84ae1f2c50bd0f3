"""Exported files, timers and running statistics."""

import datetime

import imageio.v3 as iio
import numpy as np
import PIL.Image
import pytest

from diffnext.utils import export_to_image, export_to_video
from diffnext.utils.profiler import SmoothedValue, Timer, get_progress, parse_duration


@pytest.mark.parametrize("as_array", [True, False])
def test_image_round_trip(tmp_path, as_array):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = pixels if as_array else PIL.Image.fromarray(pixels)
    path = export_to_image(image, tmp_path / "a.png")
    assert np.array_equal(np.asarray(PIL.Image.open(path)), pixels)


def test_exports_without_a_path_make_new_files():
    paths = [export_to_image(np.zeros((4, 4, 3), np.uint8)) for _ in range(2)]
    assert paths[0] != paths[1]
    assert all(PIL.Image.open(path).format == "WEBP" for path in paths)


@pytest.mark.parametrize("size", [(48, 50), (33, 47)])
def test_video_keeps_its_frames(tmp_path, size):
    frames = np.stack([np.full((*size, 3), 40 * i, np.uint8) for i in range(5)])
    path = export_to_video(frames, str(tmp_path / "a.mp4"), fps=5)
    read = iio.imread(path)
    assert len(read) == 5
    assert np.abs(read.mean((1, 2, 3)) - frames.mean((1, 2, 3))).max() < 6
    assert iio.immeta(path)["fps"] == 5


def test_even_frame_sizes_are_not_changed(tmp_path):
    path = export_to_video([np.zeros((48, 50, 3), np.uint8)] * 2, tmp_path / "a.mp4")
    assert iio.imread(path).shape[1:] == (48, 50, 3)


def test_frames_of_a_wrong_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        export_to_video([], tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="uint8"):
        export_to_video([np.zeros((4, 4, 3))], tmp_path / "a.mp4")


def test_smoothed_value_reports_median_and_mean():
    value = SmoothedValue()
    for number in (1, 2, 4):
        value.update(number)
    assert str(value) == "2.0000 (2.3333)"
    assert value.value == 4


def test_smoothed_value_forgets_what_leaves_its_window():
    value = SmoothedValue(window_size=2, fmt="{value} {mean}")
    for number in (1, 2, 4):
        value.update(number)
    assert str(value) == "4 3.0"


def test_timer_averages_over_calls():
    timer = Timer()
    timer.add_diff(3.0, n=2)
    timer.add_diff(1.0, n=2)
    assert (timer.total_time, timer.calls, timer.average_time) == (4.0, 4, 1.0)
    with timer.tic_and_toc():
        pass
    assert timer.calls == 5 and timer.diff >= 0


@pytest.mark.parametrize(("average", "expected"), [(False, 1.0), (True, 2.0)])
def test_an_added_time_is_returned_or_the_average_so_far(average, expected):
    timer = Timer()
    timer.add_diff(3.0)
    assert timer.add_diff(1.0, average=average) == expected


def test_progress_line():
    timer = Timer()
    timer.add_diff(1.5)
    expected = "< PROGRESS: 0.67% | SPEED: 1.500s / step | ETA: 12:25:00 >"
    assert get_progress(timer, 200, 30000) == expected
    assert "PROGRESS: 100.00%" in get_progress(timer, 300, 300)
    assert str(datetime.timedelta(seconds=0)) in get_progress(timer, 300, 300)


@pytest.mark.parametrize(
    "text, seconds",
    [("23h30m", 84600), ("90m", 5400), ("45s", 45), ("1d2h", 93600), (None, None)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "90", "1h 30m", "30m1h", "-1h", "1.5h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="a duration is written like"):
        parse_duration(text)
