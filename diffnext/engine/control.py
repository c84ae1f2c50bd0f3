"""Continuing, stopping and failing together: what the processes of a run tell each other."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from diffnext.config.targets import ConfigError

T = TypeVar("T")

EXIT_UNUSABLE = 2  # exit code of a run that did not begin: its configuration cannot be used
# Exit code of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_STOPPED = 75
NO_LIMIT = timedelta(days=365)
IMPATIENCE = 3.0  # seconds after which another Ctrl-C ends the process at once
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class TrainingError(RuntimeError):
    """A run that cannot continue; every process raises it with the same message."""


class ProcessLost(TrainingError):
    """A run that cannot continue because one of its processes is gone; the others raise it."""


class TrainingStopped(Exception):
    """A run that ended early because it was asked to, with a checkpoint written."""


class Agreement:
    """Tells all processes what one of them has to say.

    The messages travel through main memory over a group of their own, so they neither wait for an
    accelerator nor mix with the collectives of the training. They wait without a limit, as one
    process may be saving or drawing; a lost process is noticed at once.

    Args:
        accelerator: Tells rank and number of processes. Building is collective.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.size = accelerator.num_processes
        self.group = None
        if self.size > 1:
            self.group = distributed.new_group(backend="gloo", timeout=NO_LIMIT)

    def collect(self, message: str | None) -> list[str]:
        """Gather the messages of all processes; collective, and cheap when there is none.

        Args:
            message: What this process has to say; None for nothing.

        Returns:
            The messages with their ranks, the same list on every process.
        """
        return self._by_rank([message])[0]

    def _by_rank(self, messages: Sequence[str | None]) -> list[list[str]]:
        """Gather several messages at once; those of each kind with their ranks."""
        if self.group is None:
            return [[] if text is None else [text] for text in messages]
        raised = torch.tensor([any(text is not None for text in messages)], dtype=torch.int32)
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX, group=self.group)
        if not raised.item():
            return [[] for _ in messages]
        found: list[Sequence[str | None]] = [messages] * self.size
        distributed.all_gather_object(found, messages, group=self.group)
        return [
            [f"rank {rank}: {text}" for rank, text in enumerate(kind) if text is not None]
            for kind in zip(*found, strict=True)
        ]

    def decide(self, action: Callable[[], T]) -> T:
        """Let the main process do something for all; collective.

        Args:
            action: Called without arguments, on the main process only.

        Returns:
            What it returned, a copy on the other processes.

        Raises:
            ConfigError: On every process, if it was raised on the main process.
            TrainingError: On every process, if anything else was.
        """
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except ConfigError as error:
                outcome[1] = error
            except Exception as error:
                outcome[1] = TrainingError(_describe(error))
        if self.group is not None:
            distributed.broadcast_object_list(outcome, src=0, group=self.group)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result

    def together(self, action: Callable[[], Any], failure: str) -> Any:
        """Do something that may fail on some processes only; collective.

        Args:
            action: Called without arguments.
            failure: Start of the message if a process fails.

        Returns:
            What ``action`` returned.

        Raises:
            TrainingError: On every process, if ``action`` failed on any.
        """
        return self.unless(None, action, failure)[0]

    def unless(
        self, objection: str | None, action: Callable[[], Any], failure: str
    ) -> tuple[Any, list[str]]:
        """As :meth:`together`, unless a process objects; still one exchange.

        Args:
            objection: Why this process does not do it; None if it does.
            action: Called without arguments. If another process objects, it was called in vain,
                and that it failed does not count.
            failure: Start of the message if a process fails.

        Returns:
            What ``action`` returned, and the objections of all processes.

        Raises:
            TrainingError: On every process, if ``action`` failed on any and none objects.
        """
        error = None
        result = None
        if objection is None:
            try:
                result = action()
            except Exception as caught:
                error = caught
        problem = None if error is None else _describe(error)
        objections, problems = self._by_rank([objection, problem])
        if problems and not objections:
            raise TrainingError(f"{failure}: {'; '.join(problems)}") from error
        return result, objections


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone."""
    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)  # has no class of its own
    return is_of_gloo or isinstance(error, distributed.DistError)


def _describe(error: Exception) -> str:
    """One line that names the error's kind unless its text speaks for itself."""
    text = " ".join(str(error).split())
    speaks_for_itself = text and isinstance(error, ValueError | OSError | TrainingError)
    return text if speaks_for_itself else f"{type(error).__name__}: {text}"


class StopRequests:
    """Notes signals and the end of the allotted time; the trainer asks between steps.

    Launchers pass a signal on to processes that have received it themselves, so further signals
    change nothing, except another Ctrl-C a while later, which ends the process at once.

    Args:
        time_limit: Seconds from now; None for no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.time_limit = time_limit
        self._started = time.monotonic()
        self._process = os.getpid()
        self._received: signal.Signals | None = None
        self._received_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequests]:
        """Note signals inside this block, if it runs in the main thread."""
        is_main = threading.current_thread() is threading.main_thread()
        previous = {n: signal.signal(n, self._note) for n in STOP_SIGNALS if is_main}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def reason(self) -> str | None:
        """Why this process should stop; None if it should not."""
        if self._received is not None:
            return f"received {self._received.name}"
        if self.time_limit is not None and time.monotonic() - self._started >= self.time_limit:
            return f"training.time_limit of {self.time_limit:g} s reached"
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of the loader, which the trainer stops
            return
        received = signal.Signals(number)
        now = time.monotonic()
        if self._received is None:
            self._received = received
            self._received_at = now
        elif received is signal.SIGINT and now - self._received_at > IMPATIENCE:
            raise KeyboardInterrupt


class HeldSignal:
    """Keeps a signal from its handler until its error is expected.

    PyTorch reports the death of a loader's process by a handler that raises, wherever the main
    thread happens to be, and code that is writing a file may take the error for one of its own.
    Outside of :meth:`held`, and in other threads, nothing is held.

    Args:
        number: The signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        self._handler: Any = None
        self._has_arrived = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the signal from its handler inside this block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._has_arrived = False
        self._handler = signal.signal(self.number, self._note)
        try:
            yield
        finally:
            signal.signal(self.number, self._handler)
            self._handler = None

    @contextlib.contextmanager
    def delivered(self) -> Iterator[None]:
        """Let the handler run inside this block, at once if the signal has arrived before."""
        if self._handler is None:
            yield
            return
        signal.signal(self.number, self._handler)
        try:
            if self._has_arrived and callable(self._handler):
                self._has_arrived = False
                self._handler(self.number, None)
            yield
        finally:
            self._handler = signal.signal(self.number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._has_arrived = True
