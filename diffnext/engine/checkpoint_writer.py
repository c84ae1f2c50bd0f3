"""Writing checkpoints: all of one or none, at once or while training continues."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from diffnext.config.schema import TrainConfig
from diffnext.engine import snapshot as snapshots
from diffnext.engine.control import Agreement, TrainingError
from diffnext.engine.run_inputs import RunInputs
from diffnext.engine.snapshot import RunFolder, TrainerState
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.release_folder import (
    INDEX_FILE,
    read_base_reference,
    write_base_reference,
    write_shim,
)
from diffnext.utils.accelerate_utils import Logger, precision_to_dtype
from diffnext.utils.json_files import FileError, read_json, write_json

FULL_DISK = 2**24  # bytes; less than any checkpoint that could not be written
RETRIES = (0.5, 2.0)  # seconds before another attempt to write


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The part of a checkpoint that one process has; engine and average only on the main process.

    Attributes:
        state: The run, without files.
        rank_state: Content of the process's ``rank_<r>.pt``.
        engine: Masters and optimizer state.
        average: Averaged weights; None if there are none.
    """

    state: TrainerState
    rank_state: Mapping[str, Any]
    engine: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None = None


class CheckpointWriter:
    """Writes checkpoints under temporary names and publishes them when every process is done.

    Args:
        config: Training configuration.
        inputs: What the run reads.
        accelerator: Tells the process's rank. Building is collective.
        model: The model being trained, without wrappers.
        run_id: Id of this run; checkpoints of others are left alone.
        first_step: Step that the run begins at; its own checkpoints of later ones are damaged.
        config_yaml: The configuration as the user gave it.
        logger: Where to report.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: RunInputs,
        accelerator: Accelerator,
        model: NOVATransformer3DModel,
        run_id: str,
        first_step: int,
        config_yaml: str,
        logger: Logger,
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.model = model
        self.config_yaml = config_yaml
        self.logger = logger
        index = (inputs.paths["module_dict"] or {}).get("model_index")
        self.index = read_json(index or inputs.base_folder / INDEX_FILE)
        # The base folder may itself be a checkpoint.
        self.base = read_base_reference(inputs.base_folder)[0] or inputs.base_folder
        self.run = RunFolder(Path(config.experiment.output_dir), config.model.name)
        self.rank = accelerator.process_index
        self.is_main = accelerator.is_main_process
        own = _find_own(self.run, run_id) if self.is_main else ()
        self.steps = [step for step in own if step <= first_step]
        # The thread has a group of its own, beside the collectives of the training.
        self._agreement = Agreement(accelerator)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, or start to; collective. Waits for the one before.

        Raises:
            TrainingError: On every process, if any could not write.
        """
        self.wait()
        if self.config.checkpoint.async_save:
            self._pending = self._thread.submit(self._write, snapshot)
        else:
            self._write(snapshot)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            TrainingError: If the checkpoint in the background could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def raise_error(self) -> None:
        """Raise the error of a checkpoint in the background, once."""
        if not self.is_writing:
            self.wait()

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.state.step
        final = self.run.checkpoint(step)
        average = self.run.ema_checkpoint(step)
        folder, average_folder = (snapshots.temporary_folder(path) for path in (final, average))

        def prepare() -> None:
            if self.is_main:
                for tree in (snapshots.CHECKPOINTS, snapshots.EMA_CHECKPOINTS):
                    for leftover in self.run.output_dir.glob(f"{tree}/.checkpoint-*.tmp"):
                        self._try_to_remove(leftover)
                (folder / snapshots.STATE).mkdir(parents=True)

        def write() -> None:
            file = folder / snapshots.STATE / f"rank_{self.rank}.pt"
            torch.save(dict(snapshot.rank_state), file)
            if self.is_main:
                self._write_run(snapshot, folder, average_folder)

        def seal() -> None:
            if self.is_main:
                files = dict(snapshots.mark_files(folder))
                average_files = dict(snapshots.mark_files(average_folder))
                state = replace(snapshot.state, files=files, average=average_files)
                snapshots.write_state(folder, state)

        def publish() -> None:
            if self.is_main:
                self._publish(average_folder, average)
                self._publish(folder, final)

        failure = f"{final.name} could not be written"
        with self._cleaning_up(folder, average_folder):
            for action in (prepare, write, seal, publish):
                self._agreement.together(functools.partial(_retry, action), failure)
        self.logger.info("Wrote snapshot to: %s", final)
        if self.is_main:
            self.steps = sorted({*self.steps, step})
            self._delete_old()

    def _write_run(self, snapshot: Snapshot, folder: Path, average_folder: Path) -> None:
        """Write the main process's part."""
        save_file(dict(snapshot.engine), folder / snapshots.ENGINE)
        dtype = precision_to_dtype(self.config.training.mixed_precision)
        prefix = "model."
        weights = {
            name.removeprefix(prefix): value.to(dtype) if value.is_floating_point() else value
            for name, value in snapshot.engine.items()
            if name.startswith(prefix)
        }
        self._write_model(folder, weights)
        (folder / snapshots.CONFIG).write_text(self.config_yaml, encoding="utf-8")
        if snapshot.average is not None:
            self._write_model(average_folder, snapshot.average)

    def _write_model(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write trained weights so that ``from_pretrained`` loads the folder as a pipeline."""
        name = self.config.model.name
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.model.lora is not None:
            from diffnext.engine.lora import write_adapter

            write_adapter(folder, self.model, weights)
        else:
            arguments = json.loads(self.model.to_json_string())
            file_format = self.config.checkpoint.format
            snapshots.write_component(folder / name, arguments, weights, file_format)
        if name == snapshots.COMPONENT:  # under another name no pipeline would find it
            self._write_references(folder)

    def _write_references(self, folder: Path) -> None:
        """Say where the components are that the folder does not hold."""
        write_json(folder / INDEX_FILE, self.index)
        own = folder / snapshots.COMPONENT
        if own.is_dir():  # not with adapters only
            write_shim(own, snapshots.COMPONENT, "NOVATransformer3DModel")
        elsewhere = {
            name: path
            for name, path in self.inputs.components.items()
            if path != self.base / name and not (folder / name).is_dir()
        }
        write_base_reference(folder, self.base, elsewhere)

    def _publish(self, temporary: Path, final: Path) -> None:
        if not temporary.is_dir():  # there is no average, or it has its name already
            return
        moved = self.run.set_aside(final)
        if moved is not None:
            self.logger.warning("%s was there already: it is %s now", final, moved)
        snapshots.publish(temporary, final)

    def _delete_old(self) -> None:
        """Delete all but the newest of this run's own checkpoints, averaged weights included."""
        options = self.config.checkpoint
        for step in self.steps[: -options.keep_last] if options.keep_last is not None else ():
            if options.keep_every is None or step % options.keep_every:
                self.steps.remove(step)
                self._try_to_remove(self.run.checkpoint(step))
                self._try_to_remove(self.run.ema_checkpoint(step))

    def _try_to_remove(self, path: Path) -> None:
        """Delete a folder; if that fails, the run continues."""
        try:
            snapshots.remove(path)
        except OSError as error:
            self.logger.warning("%s could not be deleted and is left there: %s", path, error)

    @contextlib.contextmanager
    def _cleaning_up(self, *folders: Path) -> Iterator[None]:
        """Remove half a checkpoint; add the free space and the newest checkpoint to the error."""
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
        with contextlib.suppress(FileError, OSError):
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
