"""What is in a checkpoint: its files, how they are sealed and how damage is noticed.

    <output_dir>/checkpoints/checkpoint-<step>/
        model_index.json          copy of the base folder's
        base_folder.json          where the frozen components are: {"base_folder": <path>,
                                  "components": {<name>: <path> of those from elsewhere}}
        <model.name>/             config.json, weights in the training dtype, __transformer__.py;
                                  pytorch_lora_weights.safetensors instead if adapters are trained
        state/
            trainer_state.json    what the run was, and a hash of every other file, see TrainerState
            config.yaml           the configuration as the user gave it
            rank_<r>.pt           random states, data position and unreported steps of a process
            engine.safetensors    float32 masters and optimizer state, see engine_state.py
    <output_dir>/ema_checkpoints/checkpoint-<step>/<model.name>/
                                  config.json, float32 weights, beside the same two JSON files;
                                  the adapters as above

No file holds code: only tensors and plain values are read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from diffnext.engine.engine_utils import read_weights
from diffnext.pipelines.release_folder import LORA_FILE
from diffnext.utils.folders import STATUS_FILE, TRAINER_STATE
from diffnext.utils.json_files import FileError, as_text, read_json, write_json

STATE_FORMAT = 3  # of trainer_state.json and the files beside it
CHECKPOINTS = "checkpoints"
EMA_CHECKPOINTS = "ema_checkpoints"
STATE = "state"
CONFIG = f"{STATE}/config.yaml"
ENGINE = f"{STATE}/engine.safetensors"
COMPONENT = "transformer"  # name of the trained component in a pipeline
WEIGHTS_FILES = {
    "safetensors": "diffusion_pytorch_model.safetensors",
    "bin": "diffusion_pytorch_model.bin",
}


@dataclass(frozen=True, kw_only=True)
class FileMark:
    """Size in bytes and hash (XXH3, 128 bits) of a file."""

    size: int
    hash: str


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Content of ``trainer_state.json``.

    Attributes:
        step: Completed steps.
        num_processes: Processes of the run.
        run: Id of the run that wrote it.
        precision: no, fp16 or bf16.
        optimizer: Class of the optimizer.
        pipeline: Class of the training pipeline.
        schedule: Class and parameters of the learning rate.
        dataset: Fingerprint of the training data.
        holdout: What was kept from training; empty if nothing was.
        wandb_run_id: The tracker's run.
        versions: Versions of the packages that affect the numbers.
        format: Version of the layout.
        files: Every other file of the checkpoint, by its name relative to it.
        average: The same for the folder with the averaged weights.
    """

    step: int
    num_processes: int
    run: str
    precision: str
    optimizer: str
    pipeline: str
    schedule: dict[str, Any]
    dataset: str
    holdout: dict[str, Any]
    wandb_run_id: str | None
    versions: dict[str, str]
    format: int = STATE_FORMAT
    files: dict[str, FileMark] = field(default_factory=dict)
    average: dict[str, FileMark] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """Names inside the output folder of a run.

    Attributes:
        output_dir: The folder.
        model_name: Folder of the trained component inside a checkpoint.
    """

    output_dir: Path
    model_name: str = COMPONENT

    def read_id(self) -> str | None:
        """Id of the run that the output folder belongs to; None if it does not say."""
        try:
            run_id = read_json(self.output_dir / STATUS_FILE).get("run")
        except (OSError, FileError):
            return None
        return run_id if isinstance(run_id, str) else None

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.output_dir / CHECKPOINTS / f"checkpoint-{step}"

    def ema_checkpoint(self, step: int) -> Path:
        """Folder of the averaged weights of a step."""
        return self.output_dir / EMA_CHECKPOINTS / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, in order, damaged ones included."""
        folders = (self.output_dir / CHECKPOINTS).glob("checkpoint-*")
        numbers = [path.name.removeprefix("checkpoint-") for path in folders if path.is_dir()]
        steps = sorted(int(number) for number in numbers if number.isdecimal())
        return [step for step in steps if f"{step}" in numbers]  # as written: 7, not 007

    def set_aside(self, path: Path) -> Path | None:
        """Move a damaged checkpoint, or another run's file, out of the way.

        Returns:
            Where it is now, below the output folder; None if there was nothing to move.
        """
        if not os.path.lexists(path):
            return None
        place = self.output_dir / time.strftime("replaced-%Y%m%d_%H%M%S")
        target = place / path.relative_to(self.output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        return target

    def find_trained(self, checkpoint: Path) -> Path | None:
        """The trained weights of a checkpoint, adapters or the model; None if there are none."""
        adapters = checkpoint / LORA_FILE
        return adapters if adapters.is_file() else find_weights(checkpoint / self.model_name)


def find_weights(folder: Path) -> Path | None:
    """The weights file of a component folder; None if there is none."""
    paths = [folder / name for name in WEIGHTS_FILES.values()]
    return next((path for path in paths if path.is_file()), None)


# Writing


def write_component(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], file_format: str
) -> None:
    """Write a component folder that ``from_pretrained`` reads.

    Args:
        folder: Folder to create.
        config: Content of config.json.
        weights: State dict.
        file_format: "safetensors" or "bin".
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Where the weights once came from is not a property of these weights.
    public = {name: value for name, value in config.items() if name != "_name_or_path"}
    write_json(folder / "config.json", public)
    path = folder / WEIGHTS_FILES[file_format]
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    if file_format == "safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def write_state(checkpoint: Path, state: TrainerState) -> None:
    """Write what a checkpoint is, and a hash over that; to be done last."""
    write_json(checkpoint / TRAINER_STATE, _seal(asdict(state)))


def _seal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a hash over it."""
    return {**content, "seal": xxhash.xxh3_128_hexdigest(as_text(content).encode())}


def mark_files(folder: Path) -> Iterator[tuple[str, FileMark]]:
    """Size and hash of all files below a folder, by their names relative to it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(Path(TRAINER_STATE).name):
            mark = FileMark(size=path.stat().st_size, hash=hash_file(path))
            yield str(path.relative_to(folder)), mark


def hash_file(path: Path) -> str:
    """XXH3 of a file, 128 bits in hexadecimal: it finds accidents, not forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def temporary_folder(final: Path) -> Path:
    """Name under which a folder is written before it is renamed; never taken for a checkpoint."""
    return final.with_name(f".{final.name}.tmp")


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name once its content is on the disk.

    Args:
        temporary: The finished folder.
        final: Its name, which must be free.
    """
    for path in [temporary, *temporary.rglob("*")]:
        _sync(path)
    temporary.rename(final)
    _sync(final.parent)


def remove(folder: Path) -> None:
    """Delete a folder; renaming it first keeps half a deletion from leaving half a checkpoint.

    Raises:
        OSError: If it cannot be deleted.
    """
    if not folder.exists():
        return
    doomed = folder if folder.name.startswith(".") else temporary_folder(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def read_state(checkpoint: Path) -> TrainerState | None:
    """What a checkpoint says of itself; None if it has only weights, or an older state.

    Raises:
        FileError: If the file was changed since it was written.
        OSError: If it cannot be read.
    """
    path = checkpoint / TRAINER_STATE
    if not path.parent.exists():
        return None
    content = read_json(path)
    is_sealed = content.pop("seal", None) is not None
    is_earlier = content.get("format") in range(1, STATE_FORMAT)  # which had no seal
    if is_sealed or not is_earlier:
        # Written anew it is the same file, to the last byte.
        if path.read_text(encoding="utf-8") != as_text(_seal(content)) + "\n":
            raise FileError(f"{path} is not as it was written")
    if is_earlier:
        return None
    try:
        return TypeAdapter(TrainerState).validate_python(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise FileError(f"{path}: {where}: {error.errors()[0]['msg']}") from None


def verify(checkpoint: Path, state: TrainerState, average_folder: Path) -> None:
    """Compare all files of a checkpoint with those that were written.

    Raises:
        FileError: Naming the first file that differs.
    """
    if state.average and not average_folder.exists():
        raise FileError(f"there is no {average_folder}, its averaged weights")
    for folder, marks in ((checkpoint, state.files), (average_folder, state.average)):
        for name, mark in marks.items():
            path = folder / name
            check_inside(folder, path)
            if not path.is_file():
                raise FileError(f"{path} is missing")
            size = path.stat().st_size
            if size != mark.size:
                raise FileError(f"{path} has {size} bytes instead of {mark.size}")
            if hash_file(path) != mark.hash:
                raise FileError(f"{path} is not as it was written: its hash differs")


def check_inside(folder: Path, path: Path) -> None:
    """Check that neither a name nor a link leads out of a checkpoint.

    Raises:
        FileError: If one does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"{path} leads out of the checkpoint, to {path.resolve()}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a file of tensors; nothing in it is run.

    Raises:
        FileError: If it is damaged, or holds anything else.
    """
    with _reading(file):
        tensors = read_weights(file)
        if not all(isinstance(value, Tensor) for value in tensors.values()):
            raise TypeError("it holds more than tensors")
    return tensors


def read_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    """The part of a checkpoint's state that one process wrote.

    Raises:
        FileError: If it cannot be read.
    """
    file = checkpoint / STATE / f"rank_{rank}.pt"
    with _reading(file):
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = {"data", "random", "window", "scaler"} - set(state)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    return state


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch, pickle and safetensors have many
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError(f"{file} is not readable: {reason}") from error
