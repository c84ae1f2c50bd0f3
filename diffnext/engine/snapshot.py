"""What is in a checkpoint: its files, how they are written and how damage is noticed.

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

A checkpoint is written under a temporary name and renamed when all of it has reached the disk. No
file holds code: tensors and plain values are all that is read from one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffnext.engine.engine_utils import read_weights
from diffnext.engine.old_state import read_engine_folder
from diffnext.pipelines.release_folder import (
    INDEX_FILE,
    LORA_FILE,
    read_base_reference,
    write_base_reference,
    write_shim,
)
from diffnext.utils.json_files import read_json, write_json

STATE_FORMAT = 3  # of trainer_state.json and what lies beside it
STATUS_FILE = "status.json"  # of the output folder
CHECKPOINTS = "checkpoints"
EMA_CHECKPOINTS = "ema_checkpoints"
STATE = "state"
TRAINER_STATE = f"{STATE}/trainer_state.json"
CONFIG = f"{STATE}/config.yaml"
ENGINE = f"{STATE}/engine.safetensors"
COMPONENT = "transformer"  # name of the trained component in a pipeline
WEIGHTS_FILES = {
    "safetensors": "diffusion_pytorch_model.safetensors",
    "bin": "diffusion_pytorch_model.bin",
}
BLOCK = 2**22  # bytes read at a time
_SEAL = re.compile(r',\n  "seal": "([0-9a-f]{32})"\n}\n\Z')


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be used; the message names file and damage."""


@dataclass(frozen=True, kw_only=True)
class FileMark:
    """Size in bytes and hash (XXH3, 128 bits) of a file."""

    size: int
    hash: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Content of ``trainer_state.json``.

    Attributes:
        format: Version of the layout; 2 had no hashes.
        step: Completed steps.
        num_processes: Of the run.
        run: Identifies the run that wrote it.
        precision: Of the run: no, fp16 or bf16.
        optimizer: Its class.
        pipeline: Its class.
        schedule: The learning rate's class and parameters.
        dataset: Tells one dataset from another.
        holdout: What was kept from training; empty if nothing was.
        wandb_run_id: Of the tracker's run.
        versions: Of the packages that decide on numbers.
        files: Every other file of the checkpoint, by its name relative to it.
        average: The same of the folder with the averaged weights.
    """

    format: int
    step: int
    num_processes: int
    run: str | None = None
    precision: str | None = None
    optimizer: str | None = None
    pipeline: str | None = None
    schedule: dict[str, Any] | None = None
    dataset: str | None = None
    holdout: dict[str, Any] | None = None
    wandb_run_id: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileMark] = field(default_factory=dict)
    average: dict[str, FileMark] = field(default_factory=dict)

    @property
    def has_hashes(self) -> bool:
        """Whether a flipped byte would be noticed."""
        return self.format >= 3


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
        """The run that the output folder belongs to; None if it does not say."""
        try:
            run_id = read_json(self.output_dir / STATUS_FILE).get("run")
        except (OSError, ValueError):
            return None
        return run_id if isinstance(run_id, str) else None

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.output_dir / CHECKPOINTS / f"checkpoint-{step}"

    def ema_checkpoint(self, step: int) -> Path:
        """Folder of the averaged weights of a step."""
        return self.output_dir / EMA_CHECKPOINTS / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint folder, in order, sound or not."""
        folders = (self.output_dir / CHECKPOINTS).glob("checkpoint-*")
        matches = [
            re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folders if path.is_dir()
        ]
        return sorted(int(match[1]) for match in matches if match)

    def set_aside(self, path: Path) -> Path | None:
        """Move what is of another run, or damaged, out of the way.

        Returns:
            Where it is now, below the output folder; None if it was not there.
        """
        if not os.path.lexists(path):
            return None
        place = self.output_dir / time.strftime("replaced-%Y%m%d_%H%M%S")
        target = place / path.relative_to(self.output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        return target

    def find_trained(self, checkpoint: Path) -> Path | None:
        """The file of a checkpoint with what was trained: adapters or the model; None if none."""
        adapters = checkpoint / LORA_FILE
        return adapters if adapters.is_file() else find_weights(checkpoint / self.model_name)


def find_weights(folder: Path) -> Path | None:
    """The weights file of a component folder; None if there is none."""
    paths = [folder / name for name in WEIGHTS_FILES.values()]
    return next((path for path in paths if path.is_file()), None)


# Writing


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all checkpoints of a run have in common.

    Attributes:
        run: Output folder.
        base_folder: Where the frozen components are.
        components: Folders of the components that are elsewhere.
        index: Content of ``model_index.json``.
        config_yaml: The configuration as the user gave it.
        write_trained: Writes the model, or its adapters, to a folder.
        dtype: Of the written weights.
    """

    run: RunFolder
    base_folder: Path
    components: Mapping[str, Path]
    index: Mapping[str, Any]
    config_yaml: str
    write_trained: Callable[[Path, Mapping[str, Tensor]], None]
    dtype: torch.dtype

    def write_model(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write trained weights so that ``from_pretrained`` loads the folder as a pipeline."""
        folder.mkdir(parents=True, exist_ok=True)
        self.write_trained(folder, weights)
        if self.run.model_name != COMPONENT:  # under another name no pipeline would find it
            return
        base, components = self.base_folder, dict(self.components)
        older_base, older = read_base_reference(base)
        if older_base is not None:  # the base is itself a checkpoint
            base, components = older_base, {**older, **components}
        write_json(folder / INDEX_FILE, dict(self.index))
        write_base_reference(folder, base, components)
        if (folder / COMPONENT).is_dir():  # not with adapters only
            write_shim(folder / COMPONENT, COMPONENT, "NOVATransformer3DModel")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one process contributes to a checkpoint; but for ``rank_state``, the main one.

    Attributes:
        trainer_state: Of the run, without files.
        rank: Of the process.
        rank_state: Content of its ``rank_<r>.pt``.
        engine: Masters and optimizer state.
        average: Averaged weights; None if there are none.
    """

    trainer_state: TrainerState
    rank: int
    rank_state: Mapping[str, Any]
    engine: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None = None

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's weights in a dtype, under the model's own names."""
        prefix = "model."
        return {
            name.removeprefix(prefix): value.to(dtype) if value.is_floating_point() else value
            for name, value in self.engine.items()
            if name.startswith(prefix)
        }

    def write_rank(self, folder: Path) -> None:
        """Write what every process has of its own."""
        torch.save(dict(self.rank_state), folder / STATE / f"rank_{self.rank}.pt")

    def write_run(self, folder: Path, average_folder: Path, recipe: Recipe) -> None:
        """Write what the main process has."""
        save_file(dict(self.engine), folder / ENGINE)
        recipe.write_model(folder, self.weights(recipe.dtype))
        (folder / CONFIG).write_text(recipe.config_yaml, encoding="utf-8")
        if self.average is not None:
            recipe.write_model(average_folder, self.average)

    def seal(self, folder: Path, average_folder: Path) -> None:
        """Write down what the files are, when all are there."""
        average = dict(mark_files(average_folder)) if self.average is not None else {}
        state = replace(self.trainer_state, files=dict(mark_files(folder)), average=average)
        text = json.dumps(asdict(state), indent=2)
        seal = xxhash.xxh3_128_hexdigest(text.encode())
        sealed = text.removesuffix("\n}") + f',\n  "seal": "{seal}"\n}}\n'
        (folder / TRAINER_STATE).write_text(sealed, encoding="utf-8")


def mark_files(folder: Path) -> Iterator[tuple[str, FileMark]]:
    """Size and hash of all files below a folder, by their names relative to it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / TRAINER_STATE:
            mark = FileMark(size=path.stat().st_size, hash=hash_file(path))
            yield str(path.relative_to(folder)), mark


def hash_file(path: Path) -> str:
    """XXH3 of a file, 128 bits in hexadecimal: it finds accidents, not forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, whichever it is, if it is there.

    Raises:
        OSError: If it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def read_state(checkpoint: Path) -> TrainerState | None:
    """What a checkpoint says of itself; None if it has weights only.

    Raises:
        DamagedCheckpoint: If that is not as it was written.
    """
    path = checkpoint / TRAINER_STATE
    if not path.parent.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        content = read_json(path)
        state = TypeAdapter(TrainerState).validate_python(
            {**content, "files": _old_marks(content.get("files"))}
        )
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DamagedCheckpoint(f"{path}: {where}: {error.errors()[0]['msg']}") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is not readable: {error}") from None
    seal = _SEAL.search(text)
    body = text if seal is None else text[: seal.start()] + "\n}"
    is_sound = seal is not None and xxhash.xxh3_128_hexdigest(body.encode()) == seal[1]
    if not is_sound and (seal is not None or state.has_hashes):
        raise DamagedCheckpoint(f"{path} is not as it was written")
    return state


def _old_marks(files: Any) -> Any:
    """Format 2 had sizes only."""
    if not isinstance(files, dict):
        return {} if files is None else files
    return {name: {"size": mark} if isinstance(mark, int) else mark for name, mark in files.items()}


def verify(checkpoint: Path, state: TrainerState, average_folder: Path) -> None:
    """Compare all files of a checkpoint with what was written.

    Raises:
        DamagedCheckpoint: Naming the first that is not the same.
    """
    for folder, marks in ((checkpoint, state.files), (average_folder, state.average)):
        for name, mark in marks.items():
            path = folder / name
            check_inside(folder, path)
            if not path.is_file():
                raise DamagedCheckpoint(f"{path} is missing")
            if path.stat().st_size != mark.size:
                size = path.stat().st_size
                raise DamagedCheckpoint(f"{path} has {size} bytes instead of {mark.size}")
            if mark.hash is not None and hash_file(path) != mark.hash:
                raise DamagedCheckpoint(f"{path} is not as it was written: its hash differs")


def check_inside(folder: Path, path: Path) -> None:
    """Check that neither a name nor a link leads out of a checkpoint.

    Raises:
        DamagedCheckpoint: If one does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DamagedCheckpoint(f"{path} leads out of the checkpoint, to {path.resolve()}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a file of tensors; nothing in it is run.

    Raises:
        DamagedCheckpoint: If it holds anything else, or is cut short.
    """
    try:
        tensors = read_weights(file)
        if all(isinstance(value, Tensor) for value in tensors.values()):
            return tensors
        reason = "it holds more than tensors"
    except (SafetensorError, OSError, AttributeError) as error:
        reason = str(error)
    except Exception as error:  # torch.load has many, and those of pickle
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise DamagedCheckpoint(f"{file} is not a readable file of tensors: {reason}")


def read_engine(checkpoint: Path) -> dict[str, Tensor] | None:
    """Masters and optimizer state of a checkpoint, see engine_state.py; None if it has none.

    Raises:
        DamagedCheckpoint: If they cannot be read.
    """
    file = checkpoint / ENGINE
    if file.is_file():
        return read_tensors(file)
    try:
        return read_engine_folder(checkpoint / STATE / "engine")
    except Exception as error:  # as for tensors
        raise DamagedCheckpoint(f"{checkpoint / STATE / 'engine'}: {error}") from error


def read_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    """What a process wrote down of its own.

    Raises:
        DamagedCheckpoint: If that cannot be read.
    """
    file = checkpoint / STATE / f"rank_{rank}.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = {"data", "random", "window", "scaler"} - set(state)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DamagedCheckpoint(f"{file} is not readable: {reason}") from error
    if missing:
        raise DamagedCheckpoint(f"{file} lacks {', '.join(sorted(missing))}")
    return state
