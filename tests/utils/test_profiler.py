"""Timers and running statistics."""

import datetime

import pytest

from diffnext.utils.profiler import SmoothedValue, Timer, get_progress, parse_duration


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
