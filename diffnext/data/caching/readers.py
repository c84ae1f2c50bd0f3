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
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

from diffnext.data.caching.errors import CacheError, Skipped
from diffnext.data.caching.examples import Reading, read_item
from diffnext.data.caching.items import Item
from diffnext.data.caching.provenance import ItemFacts, stamp_item
from diffnext.data.caching.settings import CacheSettings

MEMORY_LIMIT = 3 * 2**30  # bytes of one process, beside the clips themselves
ATTEMPTS = 2  # at an item whose process died, which need not be the item's fault

Key = TypeVar("Key")


class ItemReaders:
    """As many processes as ``settings.workers``; they end with the ``with`` block.

    Args:
        settings: Settings of the build.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._ahead = settings.workers + settings.batch_size
        self._processes = [_ReadingProcess(settings) for _ in range(settings.workers)]
        self._idle: SimpleQueue[_ReadingProcess] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(settings.workers)  # each waits for a process

    def __enter__(self) -> ItemReaders:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.end()
        self._threads.shutdown(cancel_futures=True)

    def read(
        self, tasks: Iterable[tuple[Key, Item | ItemFacts]]
    ) -> Iterator[tuple[Key, Reading | ItemFacts]]:
        """Decode items in order, a little further ahead than they are taken.

        Args:
            tasks: Items, each with a key; facts about an item are passed on.

        Yields:
            The key of each, and its reading.

        Raises:
            CacheError: If the build cannot go on, because a decoder is not installed.
        """
        waiting: deque[tuple[Key, Future[Reading] | ItemFacts]] = deque()
        for key, item in tasks:
            if isinstance(item, ItemFacts):
                waiting.append((key, item))
            else:
                waiting.append((key, self._threads.submit(self._read, item)))
            if len(waiting) > self._ahead:
                yield _take(*waiting.popleft())
        while waiting:
            yield _take(*waiting.popleft())

    def _read(self, item: Item) -> Reading:
        process = self._idle.get()
        try:
            return process.read(item)
        finally:
            self._idle.put(process)


def _take(key: Key, reading: Future[Reading] | ItemFacts) -> tuple[Key, Reading | ItemFacts]:
    return key, reading if isinstance(reading, ItemFacts) else reading.result()


class _ReadingProcess:
    """A process that decodes one item at a time, and is replaced when it dies.

    Args:
        settings: Settings of the build.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._has_ended = False
        self._launch()

    def read(self, item: Item) -> Reading:
        """Decode an item; if the process dies, try once more.

        Raises:
            CacheError: If the build cannot go on.
        """
        stamp = stamp_item(item)
        code = 0
        for _ in range(ATTEMPTS):
            self._wait_until_ready()
            try:
                self._connection.send(item)
                answer = self._connection.recv()
            except (EOFError, ConnectionError):
                self._process.kill()
                code = self._process.wait()
                self._launch()
            else:
                if isinstance(answer, CacheError):
                    raise answer
                return answer
            if code == -signal.SIGALRM:
                break
        skipped = [Skipped(item.name, self._explain(code))]
        return Reading(ItemFacts(item.name, stamp, skipped=skipped))

    def _explain(self, code: int) -> str:
        if code == -signal.SIGALRM:
            return f"was not decoded within {self._settings.time_limit:g} s"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its decoder crashed: {name}"

    def end(self) -> None:
        """End it; a thread that waits for its answer gets an error."""
        self._has_ended = True
        self._process.kill()
        self._process.wait()

    def _launch(self) -> None:
        self._connection, other = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from diffnext.data.caching.readers import serve; serve({other.fileno()})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        other.close()
        self._is_ready = False
        with contextlib.suppress(ConnectionError):
            self._connection.send(self._settings)
        if self._has_ended:  # while this thread replaced the process that was ended
            self.end()

    def _wait_until_ready(self) -> None:
        try:
            self._is_ready = self._is_ready or self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise CacheError("a decoding process cannot be started, see above") from error


def serve(descriptor: int) -> None:
    """Decode items until the process at the other end is gone.

    Args:
        descriptor: Descriptor of a connection, which gives the settings of the build, then items.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the build does
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system ends it at any time
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(descriptor) as connection:
        settings = connection.recv()
        limit = MEMORY_LIMIT + _clip_memory(settings)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        connection.send(True)  # ready
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
