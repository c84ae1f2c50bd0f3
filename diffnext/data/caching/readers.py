"""Processes that decode items: a decoder that hangs, crashes or takes all memory costs one item.

They import neither the autoencoder nor torch, and end with the process that started them.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.examples import Reading, read_item
from diffnext.data.caching.items import Item
from diffnext.data.caching.settings import CacheSettings

MEMORY_LIMIT = 3 * 2**30  # bytes of one process, beside the clips themselves
READY = "ready"
ATTEMPTS = 2  # at an item whose process is gone, which need not be the item's fault

Key = TypeVar("Key")


@dataclass
class _Task(Generic[Key]):
    """An item on its way.

    Attributes:
        key: What the caller knows it by.
        item: None where there is nothing to read.
        attempts: How often it was given to a process.
        reading: What became of it.
    """

    key: Key
    item: Item | None
    attempts: int = 0
    reading: Reading | None = None

    @property
    def is_done(self) -> bool:
        return self.item is None or self.reading is not None


class ItemReaders:
    """As many processes as ``settings.workers``; they end with the ``with`` block.

    Args:
        settings: Of the build.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._processes = [_ReadingProcess(settings) for _ in range(settings.workers)]

    def __enter__(self) -> ItemReaders:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.end()

    def read(
        self, tasks: Iterable[tuple[Key, Item | None]]
    ) -> Iterator[tuple[Key, Reading | None]]:
        """Decode items in order, a little further ahead than they are taken.

        Args:
            tasks: Items, each with a key; None where there is nothing to read.

        Yields:
            The key of each, and what became of it.

        Raises:
            CacheError: If the build cannot go on, as a decoder is not installed.
        """
        ahead = self._settings.workers + self._settings.batch_size
        waiting: deque[_Task[Key]] = deque()
        source = iter(tasks)
        is_exhausted = False
        while waiting or not is_exhausted:
            while not is_exhausted and len(waiting) <= ahead:
                following = next(source, None)
                is_exhausted = following is None
                if following is not None:
                    waiting.append(_Task(*following))
            self._give(task for task in waiting if not task.attempts and not task.is_done)
            while waiting and waiting[0].is_done:
                task = waiting.popleft()
                yield task.key, task.reading
            if waiting:
                self._collect()

    def _give(self, tasks: Iterable[_Task]) -> None:
        idle = [process for process in self._processes if process.task is None]
        for process, task in zip(idle, tasks, strict=False):
            process.start(task)

    def _collect(self) -> None:
        """Wait until a process has an answer, or is gone."""
        busy = [(process, process.task) for process in self._processes if process.task is not None]
        ready = wait([process.connection for process, _ in busy])
        for process, task in busy:
            if process.connection in ready:
                process.take_answer(task)


class _ReadingProcess:
    """A process that decodes one item at a time, and is replaced when it is gone.

    Args:
        settings: Of the build.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._is_ready = False
        self.task: _Task | None = None
        self.connection, self._process = self._launch()

    def start(self, task: _Task) -> None:
        """Give it an item."""
        self.task = task
        task.attempts += 1
        with contextlib.suppress(ConnectionError):  # it is gone: waiting for its answer shows that
            self.connection.send(task.item)

    def take_answer(self, task: _Task) -> None:
        """Take what became of its item; one whose process is gone is tried once more."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            code = self.end()
            if not self._is_ready:
                raise CacheError("a decoding process cannot be started, see above") from error
            self._is_ready = False
            self.connection, self._process = self._launch()
            if code != -signal.SIGALRM and task.attempts < ATTEMPTS:
                self.start(task)
                return
            answer = Reading([], problem=self._explain(code))
        if answer == READY:
            self._is_ready = True
            return
        if isinstance(answer, CacheError):
            raise answer
        task.reading = answer
        self.task = None

    def end(self) -> int:
        """End it; returns its exit code."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()

    def _launch(self) -> tuple[Connection, subprocess.Popen]:
        connection, other = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from diffnext.data.caching.readers import serve; serve({other.fileno()})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        other.close()
        with contextlib.suppress(ConnectionError):
            connection.send(self._settings)
        return connection, process

    def _explain(self, code: int) -> str:
        if code == -signal.SIGALRM:
            return f"was not decoded within {self._settings.time_limit:g} s"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its decoder crashed: {name}"


def serve(descriptor: int) -> None:
    """Decode items until the process at the other end is gone.

    Args:
        descriptor: Of a connection, which gives the settings of the build, then items.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the build does
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system ends it, whatever it is doing
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(descriptor) as connection:
        settings = connection.recv()
        limit = MEMORY_LIMIT + _clip_memory(settings)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        connection.send(READY)
        while True:
            try:
                item = connection.recv()
            except (EOFError, ConnectionError):
                return
            signal.setitimer(signal.ITIMER_REAL, settings.time_limit)
            try:
                answer: Reading | CacheError = read_item(item, settings)
            except CacheError as error:
                answer = error
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(answer)


def _clip_memory(settings: CacheSettings) -> int:
    """Bytes of all clips of a video: as frames, stacked, and on their way."""
    if settings.kind == "images":
        return 0
    largest = max(math.prod(size) for size in settings.sizes)
    return 3 * 3 * largest * settings.frames.num_frames * settings.frames.clips
