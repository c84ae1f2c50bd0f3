"""Timers and running statistics."""

from __future__ import annotations

import contextlib
import datetime
import re
import statistics
import time
from collections import deque
from collections.abc import Iterator


class SmoothedValue:
    """A window of recent values and their statistics.

    Args:
        window_size: Number of values kept; None keeps all.
        fmt: Format of ``str()``, with the fields ``median``, ``mean`` and ``value``.
    """

    def __init__(self, window_size: int | None = None, fmt: str | None = None) -> None:
        self.fmt = fmt or "{median:.4f} ({mean:.4f})"
        self.values: deque[float] = deque(maxlen=window_size)

    def update(self, value: float) -> None:
        """Append a value."""
        self.values.append(value)

    @property
    def value(self) -> float:
        """The last value."""
        return self.values[-1]

    @property
    def mean(self) -> float:
        """Mean of the window."""
        return statistics.fmean(self.values)

    @property
    def median(self) -> float:
        """Median of the window."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        return self.fmt.format(median=self.median, mean=self.mean, value=self.value)


class Timer:
    """Wall-clock timer that averages over calls, in seconds."""

    def __init__(self) -> None:
        self.total_time = 0.0
        self.calls = 0
        self.diff = 0.0
        self.average_time = 0.0
        self._start = time.perf_counter()

    def tic(self) -> None:
        """Start timing."""
        self._start = time.perf_counter()

    def toc(self, n: int = 1, average: bool = False) -> float:
        """Stop timing.

        Args:
            n: Number of calls that the measured time covers.
            average: Return the average per call so far rather than the time just measured.

        Returns:
            Seconds.
        """
        return self.add_diff(time.perf_counter() - self._start, n, average)

    def add_diff(self, diff: float, n: int = 1, average: bool = False) -> float:
        """Add a time measured elsewhere; arguments and result as for :meth:`toc`.

        Args:
            diff: Seconds.
            n: Number of calls it covers.
            average: Return the average per call so far rather than ``diff``.
        """
        self.diff = diff
        self.total_time += diff
        self.calls += n
        self.average_time = self.total_time / self.calls
        return self.average_time if average else self.diff

    @contextlib.contextmanager
    def tic_and_toc(self, n: int = 1) -> Iterator[Timer]:
        """Time the body of a ``with`` statement, covering ``n`` calls."""
        self.tic()
        try:
            yield self
        finally:
            self.toc(n)


def get_progress(timer: Timer, step: int, max_steps: int) -> str:
    """Describe progress, speed and remaining time.

    Args:
        timer: Its average is the time of a step.
        step: Completed steps.
        max_steps: Steps in total.

    Returns:
        ``< PROGRESS: 0.67% | SPEED: 1.500s / step | ETA: 12:25:00 >``.
    """
    remaining = datetime.timedelta(seconds=int(timer.average_time * (max_steps - step)))
    return (
        f"< PROGRESS: {100 * step / max_steps:.2f}% | "
        f"SPEED: {timer.average_time:.3f}s / step | ETA: {remaining} >"
    )


def parse_duration(text: str | None) -> float | None:
    """Read a duration such as "23h30m", "90m", "45s" or "1d2h".

    Args:
        text: The text; None gives None.

    Returns:
        Seconds.

    Raises:
        ValueError: If the text is not a duration.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not any(match.groups()):
        raise ValueError(f'a duration is written like "23h30m", got {text!r}')
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
