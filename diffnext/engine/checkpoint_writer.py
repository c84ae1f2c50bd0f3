"""Writing checkpoints: all of one or none, at once or while training goes on."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffnext.engine import checkpoint as checkpoints
from diffnext.engine.checkpoint import RunFolder
from diffnext.engine.control import Agreement, TrainingError
from diffnext.engine.run_state import EngineState
from diffnext.utils.json_files import write_json

FULL_DISK = 2**20  # bytes; what could not be written was larger


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one process contributes to a checkpoint.

    Attributes:
        step: Completed steps.
        rank_state: Content of this process's ``rank_<r>.pt``.
        trainer_state: Content of ``trainer_state.json``; main process only.
        write_weights: Writes trained weights and their like into a checkpoint folder; main only.
        write_average: The same for averaged weights; None if there are none.
    """

    step: int
    rank_state: Mapping[str, Any]
    trainer_state: Mapping[str, Any]
    write_weights: Callable[[Path], None]
    write_average: Callable[[Path], None] | None = None


class CheckpointWriter:
    """Writes checkpoints under temporary names and publishes them when every process is done.

    Args:
        run: Output folder.
        accelerator: Knows the processes. Building is collective.
        engine: Masters and optimizer state.
        asynchronous: Write in a thread, from copies in main memory.
        keep_last: Delete all but so many of the newest; None keeps all.
        keep_every: Never delete those of multiples of this step.
        logger: Where to report.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        engine: EngineState,
        asynchronous: bool,
        keep_last: int | None,
        keep_every: int | None,
        logger: logging.Logger | logging.LoggerAdapter,
    ) -> None:
        self.run = run
        self.engine = engine
        self.asynchronous = asynchronous
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.logger = logger
        self.is_main = accelerator.is_main_process
        self.rank = accelerator.process_index
        # The thread has a group of its own: the training's collectives go on beside it.
        self._agreement = Agreement(accelerator)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, or start to; collective. Waits for the one before.

        Raises:
            TrainingError: On every process, if any could not write.
        """
        self.wait()
        final = self.run.checkpoint(snapshot.step)
        failure = f"checkpoint-{snapshot.step} could not be written"
        temporary = checkpoints.temporary_folder(final)
        with self._cleaning_up([temporary]):
            self._agreement.together(lambda: self._prepare(temporary), failure)
            state = temporary / checkpoints.STATE
            finish_engine = self._agreement.together(
                lambda: self.engine.begin_save(state, self.asynchronous), failure
            )

        def complete() -> None:
            self._complete(snapshot, temporary, final, finish_engine, failure)

        if not self.asynchronous:
            complete()
            return
        self._thread = threading.Thread(target=self._guard, args=(complete,), name="checkpoint")
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            TrainingError: If the checkpoint in the background could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error = self.take_error()
        if error is not None:
            raise error

    def take_error(self) -> Exception | None:
        """The error of a checkpoint in the background, once."""
        error = self._error
        self._error = None
        return error

    def _guard(self, complete: Callable[[], None]) -> None:
        try:
            complete()
        except Exception as error:
            self._error = error

    def _prepare(self, temporary: Path) -> None:
        if self.is_main:
            self.run.remove_leftovers()
            (temporary / checkpoints.STATE).mkdir(parents=True)

    def _complete(
        self,
        snapshot: Snapshot,
        temporary: Path,
        final: Path,
        finish_engine: Callable[[], None],
        failure: str,
    ) -> None:
        """Write what is left, and publish."""
        average = self.run.ema_checkpoint(snapshot.step)
        folders = [(temporary, final)]
        if snapshot.write_average is not None:
            folders.insert(0, (checkpoints.temporary_folder(average), average))

        def write() -> None:
            finish_engine()
            rank_file = temporary / checkpoints.STATE / f"rank_{self.rank}.pt"
            torch.save(dict(snapshot.rank_state), rank_file)
            if self.is_main:
                snapshot.write_weights(temporary)
                if snapshot.write_average is not None:
                    snapshot.write_average(folders[0][0])

        def publish() -> None:
            if not self.is_main:
                return
            files = checkpoints.list_file_sizes(temporary)
            trainer_state = {**snapshot.trainer_state, "files": files}
            write_json(temporary / checkpoints.STATE / checkpoints.TRAINER_STATE, trainer_state)
            for source, target in folders:
                checkpoints.publish(source, target)

        with self._cleaning_up([source for source, _ in folders]):
            self._agreement.together(write, failure)
            self._agreement.together(publish, failure)
        self.logger.info("Wrote snapshot to: %s", final)
        if self.is_main and self.keep_last is not None:
            self.run.keep_newest(self.keep_last, self.keep_every)

    @contextlib.contextmanager
    def _cleaning_up(self, folders: Sequence[Path]) -> Iterator[None]:
        """Remove what was half written, and say what is left to continue from and to write on."""
        try:
            yield
        except TrainingError as error:
            free = shutil.disk_usage(self.run.output_dir).free
            complete = self.run.complete_checkpoints()
            newest = complete[-1].name if complete else "none"
            if self.is_main:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
            disk = f"{free / 2**30:.2f} GB were free"
            if free < FULL_DISK:
                disk = f"the disk of {self.run.output_dir} is full"
            text = f"{error}; {disk}; the newest complete checkpoint is {newest}"
            raise TrainingError(text) from error


def copy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to main memory, so that training can change the originals."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
