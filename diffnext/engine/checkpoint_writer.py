"""Writing checkpoints: all of one or none, at once or while training goes on."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator

from diffnext.config.schema import CheckpointConfig
from diffnext.engine import snapshot as snapshots
from diffnext.engine.control import Agreement, TrainingError
from diffnext.engine.snapshot import DamagedCheckpoint, Recipe, RunFolder, Snapshot

FULL_DISK = 2**24  # bytes; what could not be written was larger
RETRIES = (0.5, 2.0)  # seconds before another attempt to write


class CheckpointWriter:
    """Writes checkpoints under temporary names and publishes them when every process is done.

    Args:
        recipe: What all checkpoints of the run have in common.
        accelerator: Knows the processes. Building is collective.
        options: How to write, and which checkpoints to keep.
        run_id: Of this run; checkpoints of others are left alone.
        logger: Where to report.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        options: CheckpointConfig,
        run_id: str,
        logger: logging.Logger | logging.LoggerAdapter,
    ) -> None:
        self.recipe = recipe
        self.run = recipe.run
        self.options = options
        self.logger = logger
        self.is_main = accelerator.is_main_process
        self.steps = list(_find_own(self.run, run_id)) if self.is_main else []
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
        if not self.options.async_save:
            self._write(snapshot)
            return
        self._thread = threading.Thread(target=self._guard, args=(snapshot,), name="checkpoint")
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
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the error of a checkpoint in the background, once."""
        error = self._error
        self._error = None
        if error is not None:
            raise error

    def _guard(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except Exception as error:
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.trainer_state.step
        final = self.run.checkpoint(step)
        average = self.run.ema_checkpoint(step)
        folder, average_folder = (snapshots.temporary_folder(path) for path in (final, average))

        def prepare() -> None:
            if self.is_main:
                for leftover in self._leftovers():
                    self._try_to_remove(leftover)
                (folder / snapshots.STATE).mkdir(parents=True)

        def write() -> None:
            snapshot.write_rank(folder)
            if self.is_main:
                snapshot.write_run(folder, average_folder, self.recipe)

        def publish() -> None:
            if not self.is_main:
                return
            snapshot.seal(folder, average_folder)
            for path in (average, final):
                moved = self.run.set_aside(path)
                if moved is not None:
                    self.logger.warning("%s was there already: it is %s now", path, moved)
            if snapshot.average is not None:
                snapshots.publish(average_folder, average)
            snapshots.publish(folder, final)

        failure = f"{final.name} could not be written"
        with self._cleaning_up(folder, average_folder):
            for action in (prepare, write, publish):
                self._agreement.together(functools.partial(_retry, action), failure)
        self.logger.info("Wrote snapshot to: %s", final)
        if self.is_main:
            self.steps = sorted({*self.steps, step})
            self._delete_old()

    def _leftovers(self) -> Iterator[Path]:
        """What writing or deleting that was cut short has left behind."""
        for tree in (snapshots.CHECKPOINTS, snapshots.EMA_CHECKPOINTS):
            yield from self.run.output_dir.glob(f"{tree}/.checkpoint-*.tmp")

    def _delete_old(self) -> None:
        """Delete all but the newest of this run's own checkpoints, averaged weights included."""
        keep_last, keep_every = self.options.keep_last, self.options.keep_every
        for step in self.steps[:-keep_last] if keep_last is not None else ():
            if keep_every is None or step % keep_every:
                self.steps.remove(step)
                for path in (self.run.checkpoint(step), self.run.ema_checkpoint(step)):
                    self._try_to_remove(path)

    def _try_to_remove(self, path: Path) -> None:
        """Delete a folder; one that cannot be deleted is no reason to end a run."""
        doomed = path if path.name.startswith(".") else snapshots.temporary_folder(path)
        try:
            # Renaming first keeps a deletion that is cut short from leaving half a checkpoint.
            with contextlib.suppress(FileNotFoundError):
                path.rename(doomed)
            snapshots.remove(doomed)
        except OSError as error:
            self.logger.warning("%s could not be deleted and is left there: %s", path, error)

    @contextlib.contextmanager
    def _cleaning_up(self, *folders: Path) -> Iterator[None]:
        """Remove what was half written, and say what is left to continue from and to write on."""
        try:
            yield
        except TrainingError as error:
            free = shutil.disk_usage(self.run.output_dir).free
            newest = self.run.checkpoint(self.steps[-1]).name if self.steps else "none"
            for folder in folders if self.is_main else ():
                self._try_to_remove(folder)
            disk = f"{free / 2**30:.2f} GB were free"
            if free < FULL_DISK:
                disk = f"the disk of {self.run.output_dir} is full"
            text = f"{error}; {disk}; the newest sound checkpoint is {newest}"
            raise TrainingError(text) from error


def _find_own(run: RunFolder, run_id: str) -> Iterator[int]:
    """Steps of the checkpoints that a run has written."""
    for step in run.steps():
        with contextlib.suppress(DamagedCheckpoint):
            state = snapshots.read_state(run.checkpoint(step))
            if state is not None and state.run == run_id:
                yield step


def _retry(action: Callable[[], None]) -> None:
    """Do something that writes files; a file system may need a moment."""
    for pause in RETRIES:
        try:
            action()
            return
        except Exception:  # every library has its own for a disk
            time.sleep(pause)
    action()
