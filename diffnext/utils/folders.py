"""Folders of models, here or on the Hub; nothing here needs torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffnext.utils.json_files import read_json
from diffnext.utils.messages import did_you_mean

__all__ = ["HUB_ARGUMENTS", "INDEX_FILE", "find_folder", "newest_checkpoint", "public_name"]

INDEX_FILE = "model_index.json"  # of a release folder or checkpoint
STATUS_FILE = "status.json"  # of the output folder of a training run
TRAINER_STATE = "state/trainer_state.json"  # of a checkpoint
CHECKPOINT_FOLDERS = ("checkpoints", "ema_checkpoints")  # in it: raw, then averaged weights

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
)  # of from_pretrained, for snapshot_download


def find_folder(path_or_id: str | os.PathLike, **hub_kwargs: Any) -> Path:
    """A local folder as it is, or the snapshot of a Hub repository.

    Args:
        path_or_id: Folder or Hub id. The Hub is not asked for ``a/b`` where there is a folder
            ``a``, only its cache is.
        **hub_kwargs: ``cache_dir``, ``revision``, ``token``, ``local_files_only`` and such, for
            ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: If there is no such folder, nor such a repository on the Hub, or the
            Hub cannot be reached and has left no copy in its cache.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder.absolute()
    name = str(path_or_id)
    if folder.exists():
        raise FileNotFoundError(f"{name} is a file, not the folder of a model")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"there is no folder {name}, and this is not a Hub id such as BAAI/nova-..."
            f"{did_you_mean(folder)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if folder.parent.is_dir():
        hub_kwargs["local_files_only"] = True
    try:
        return Path(snapshot_download(name, **hub_kwargs))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        where = "in the Hub's cache" if hub_kwargs.get("local_files_only") else "on the Hub"
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"there is no folder {name}, nor a model of that name {where}: {reason}"
            f"{did_you_mean(folder)}"
        ) from error


def public_name(model: str) -> str:
    """A Hub id, or the name of a folder without its path, which is private: for written files."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of the last training run in a folder, averaged weights before raw ones.

    Args:
        folder: Of a model; one that is not the output of a training run is returned as it is.

    Raises:
        FileNotFoundError: If the run has not written a checkpoint yet.
        FileError: If a file that says which run it was is damaged.
    """
    if (folder / INDEX_FILE).is_file() or not (folder / STATUS_FILE).is_file():
        return folder
    run = read_json(folder / STATUS_FILE).get("run")
    steps = {
        path.parent: path.parent.name.removeprefix("checkpoint-")
        for kind in CHECKPOINT_FOLDERS
        for path in (folder / kind).glob(f"checkpoint-*/{INDEX_FILE}")
        if _is_of(run, folder / "checkpoints" / path.parent.name)
    }
    found = sorted((int(step), path) for path, step in steps.items() if step.isdecimal())
    if not found:
        raise FileNotFoundError(f"the training run in {folder} has not written a checkpoint yet")
    return found[-1][1]


def _is_of(run: str | None, checkpoint: Path) -> bool:
    """Whether a run has written a checkpoint, as far as both say which one it was."""
    state = checkpoint / TRAINER_STATE
    owner = read_json(state).get("run") if state.is_file() else None
    return None in (run, owner) or run == owner
