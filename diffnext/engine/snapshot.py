"""Checkpoint folders: their layout, writing them so that none is ever half there, finding them.

    <output_dir>/checkpoints/checkpoint-<step>/
        model_index.json          copy of the base folder's
        base_folder.json          where the frozen components are: {"base_folder": <path>,
                                  "components": {<name>: <path> of those from elsewhere}}
        <model.name>/             config.json, weights in the training dtype, __transformer__.py;
                                  pytorch_lora_weights.safetensors instead if adapters are trained
        state/                    what an exact resume needs, see run_state.py
    <output_dir>/ema_checkpoints/checkpoint-<step>/<model.name>/
                                  config.json, float32 weights, beside the same two JSON files;
                                  the adapters as above

A checkpoint is written under a temporary name and renamed when all of it has reached the disk.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffnext.engine.engine_utils import read_weights
from diffnext.pipelines.release_folder import (
    INDEX_FILE,
    LORA_FILE,
    find_folder,
    read_base_reference,
    write_base_reference,
    write_shim,
)
from diffnext.utils.json_files import read_json, write_json
from diffnext.utils.omegaconf_utils import ConfigError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
EMA_CHECKPOINTS = "ema_checkpoints"
STATE = "state"
TRAINER_STATE = "trainer_state.json"
COMPONENT = "transformer"  # name of the trained component in a pipeline
SHIM = "__transformer__.py"
WEIGHTS_FILES = {
    "safetensors": "diffusion_pytorch_model.safetensors",
    "bin": "diffusion_pytorch_model.bin",
}


@dataclass(frozen=True)
class RunFolder:
    """Names inside the output folder of a run.

    Attributes:
        output_dir: The folder.
        model_name: Folder of the trained component inside a checkpoint.
    """

    output_dir: Path
    model_name: str = "transformer"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.output_dir / CHECKPOINTS / f"checkpoint-{step}"

    def ema_checkpoint(self, step: int) -> Path:
        """Folder of the averaged weights of a step."""
        return self.output_dir / EMA_CHECKPOINTS / f"checkpoint-{step}"

    def find_trained(self, checkpoint: Path) -> Path | None:
        """The file of a checkpoint with what was trained: adapters or the model; None if none."""
        adapters = checkpoint / LORA_FILE
        if adapters.is_file():
            return adapters if _is_readable(adapters) else None
        return find_weights(checkpoint / self.model_name)

    def find_damage(self, checkpoint: Path) -> str | None:
        """Say what is missing from a checkpoint or cut short; None if it is whole."""
        if self.find_trained(checkpoint) is None:
            return f"no readable weights in {checkpoint / self.model_name}"
        state = checkpoint / STATE
        if not state.exists():
            return None
        try:
            sizes = read_json(state / TRAINER_STATE).get("files", {})
        except (OSError, ValueError):
            return f"no readable {state / TRAINER_STATE}"
        for name, size in sizes.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes instead of {size}"
        return None

    def complete_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest step first; damaged ones are reported and left out."""
        folders = list(self.output_dir.glob(f"{CHECKPOINTS}/checkpoint-*"))
        numbered = sorted((step_of(path), path) for path in folders if step_of(path) is not None)
        complete = []
        for _, path in numbered:
            damage = self.find_damage(path)
            if damage is None:
                complete.append(path)
            else:
                logger.warning("ignoring the incomplete checkpoint %s: %s", path, damage)
        return complete

    def remove_leftovers(self) -> None:
        """Delete what writing or deleting that was cut short has left behind."""
        for tree in (CHECKPOINTS, EMA_CHECKPOINTS):
            for path in self.output_dir.glob(f"{tree}/.checkpoint-*.tmp"):
                shutil.rmtree(path)

    def keep_newest(self, count: int, every: int | None = None) -> None:
        """Delete all but the newest complete checkpoints, averaged weights included.

        Args:
            count: How many to keep, at least 1.
            every: Keep those of multiples of this step as well.
        """
        for path in self.complete_checkpoints()[:-count]:
            if every is not None and step_of(path) % every == 0:
                continue
            # Renaming first keeps a deletion that is cut short from leaving half a checkpoint.
            doomed = temporary_folder(path)
            path.rename(doomed)
            shutil.rmtree(doomed)
            shutil.rmtree(self.output_dir / EMA_CHECKPOINTS / path.name, ignore_errors=True)


@dataclass(frozen=True)
class ResumePoint:
    """What a run continues from.

    Attributes:
        step: Completed steps.
        checkpoint: The checkpoint folder, as an absolute path.
        weights: File with the weights of the trained component.
        state: Folder with the rest of the state; None if the checkpoint has weights only.
        ema_weights: File with the averaged weights; None if there is none.
        trainer_state: Content of the state's ``trainer_state.json``.
    """

    step: int
    checkpoint: Path
    weights: Path
    state: Path | None = None
    ema_weights: Path | None = None
    trainer_state: Mapping[str, Any] = field(default_factory=dict)


def find_resume_point(run: RunFolder, resume: str | os.PathLike | None) -> ResumePoint | None:
    """Find the checkpoint to continue from.

    Args:
        run: Output folder of the run.
        resume: "latest" (the highest complete checkpoint of the run), a path, or "" for none. A
            path is a checkpoint folder or a bare folder of weights; its name, or the one above it,
            ends in the step number.

    Returns:
        The point, or None to start afresh.

    Raises:
        ConfigError: If a path does not exist, holds no readable weights or has no step number.
    """
    if not resume:
        return None
    if str(resume) == "latest":
        checkpoints = run.complete_checkpoints()
        return _describe(run, checkpoints[-1]) if checkpoints else None
    path = Path(os.path.abspath(resume))  # also removes a trailing slash
    if not path.is_dir():
        raise ConfigError(f"experiment.resume_from_checkpoint={resume}: no such folder")
    if (path / run.model_name).is_dir() or (path / LORA_FILE).exists():
        _require_step(path)
        damage = run.find_damage(path)
        if damage is not None:
            raise ConfigError(f"experiment.resume_from_checkpoint={resume}: {damage}")
        return _describe(run, path)
    return _describe_bare(path)


def _describe(run: RunFolder, checkpoint: Path) -> ResumePoint:
    """A resume point from a checkpoint folder of ours or with weights only."""
    checkpoint = checkpoint.absolute()
    trainer_state = checkpoint / STATE / TRAINER_STATE
    has_state = trainer_state.is_file()
    # The averages lie beside the checkpoint's own parent, whatever else the path contains.
    ema = checkpoint.parent.parent / EMA_CHECKPOINTS / checkpoint.name
    return ResumePoint(
        step=_require_step(checkpoint),
        checkpoint=checkpoint,
        weights=run.find_trained(checkpoint) or _require_weights(checkpoint / run.model_name),
        state=checkpoint / STATE if has_state else None,
        ema_weights=run.find_trained(ema),
        trainer_state=read_json(trainer_state) if has_state else {},
    )


def _describe_bare(folder: Path) -> ResumePoint:
    """A resume point from a folder that directly holds config.json and weights."""
    named = folder if step_of(folder) is not None else folder.parent
    return ResumePoint(
        step=_require_step(named), checkpoint=folder, weights=_require_weights(folder)
    )


def step_of(path: Path) -> int | None:
    """Step number at the end of a folder name; None if there is none."""
    match = re.search(r"-(\d+)$", path.name)
    return int(match.group(1)) if match else None


def _require_step(path: Path) -> int:
    step = step_of(path)
    if step is None:
        raise ConfigError(
            f"experiment.resume_from_checkpoint: the name of a checkpoint folder must end in its "
            f"step, such as checkpoint-5000, got {path}"
        )
    return step


def _require_weights(folder: Path) -> Path:
    weights = find_weights(folder)
    if weights is None:
        names = " or ".join(WEIGHTS_FILES.values())
        raise ConfigError(f"experiment.resume_from_checkpoint: no readable {names} in {folder}")
    return weights


def find_weights(folder: Path) -> Path | None:
    """The weights file of a component folder; None if there is none or it is cut short."""
    for name in WEIGHTS_FILES.values():
        path = folder / name
        if path.is_file() and _is_readable(path):
            return path
    return None


def _is_readable(path: Path) -> bool:
    """Whether a weights file is whole; reads its header or directory only."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)  # the directory of a zip file is at its end
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def load_weights_into(model: torch.nn.Module, weights: Path) -> None:
    """Load a weights file; names must match.

    Args:
        model: Module to fill.
        weights: File found by :func:`find_weights`.

    Raises:
        ConfigError: Listing names or shapes that do not fit.
    """
    try:
        model.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        raise ConfigError(f"the weights {weights} do not fit the model: {error}") from error


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
    folder.mkdir(parents=True)
    # Where the weights once came from is no property of these weights.
    public = {name: value for name, value in config.items() if name != "_name_or_path"}
    write_json(folder / "config.json", public)
    path = folder / WEIGHTS_FILES[file_format]
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    if file_format == "safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def complete_pipeline(
    folder: Path, base: str | os.PathLike, components: Mapping[str, str | None]
) -> None:
    """Make a folder with a trained transformer loadable as a whole pipeline.

    Args:
        folder: Checkpoint folder.
        base: Release folder or Hub id that the other components are read from.
        components: Components that the run took from elsewhere, as its ``module_dict``.
    """
    base_folder = find_folder(base)
    elsewhere = {
        name: Path(path).expanduser().absolute()
        for name, path in components.items()
        if path and name not in ("model_index", COMPONENT)
    }
    named = {
        name: path
        for name, path in elsewhere.items()
        if path != base_folder / name and path.is_dir()
    }
    older_base, older = read_base_reference(base_folder)
    if older_base is not None:  # the base is itself a checkpoint
        named = {**older, **named}
        base_folder = older_base
    shutil.copyfile(base_folder / INDEX_FILE, folder / INDEX_FILE)
    write_base_reference(folder, base_folder, named)
    if not (folder / COMPONENT).is_dir():  # adapters only
        return
    shim = base_folder / COMPONENT / SHIM
    if shim.is_file():
        shutil.copyfile(shim, folder / COMPONENT / SHIM)
    else:
        write_shim(folder / COMPONENT, COMPONENT, "NOVATransformer3DModel")


def temporary_folder(final: Path) -> Path:
    """Name under which a folder is written before it is renamed; never taken for a checkpoint."""
    return final.with_name(f".{final.name}.tmp")


def list_file_sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by their names relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name once its content is on the disk.

    Args:
        temporary: The finished folder.
        final: Its name; an older folder there is replaced.
    """
    for path in [temporary, *temporary.rglob("*")]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
