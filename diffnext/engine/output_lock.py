"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffnext.config.targets import ConfigError
from diffnext.engine.reporting import METRICS_FILE
from diffnext.engine.snapshot import CHECKPOINTS, EMA_CHECKPOINTS
from diffnext.utils.folders import STATUS_FILE

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What a run opens as it is there; every other file it replaces by a new one.
NEEDED_FOLDERS = (CHECKPOINTS, EMA_CHECKPOINTS)
OTHERS = (LOCK_FILE, METRICS_FILE, STATUS_FILE, "logs", "tensorboard", "validation", "wandb")
WALKED = (*NEEDED_FOLDERS, "validation")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make an output folder, and keep other runs out of it inside this block.

    The lock belongs to the process: when the process dies, the folder is free.

    Args:
        folder: The output folder.

    Raises:
        ConfigError: If the folder cannot be made or written, if another run is using it, or if a
            run could write or wait outside of it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_own(folder)
        file = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise ConfigError(f"experiment.output_dir={folder} cannot be written: {reason}") from error
    with file:
        _acquire(file, folder)
        yield


def _check_own(folder: Path) -> None:
    """Refuse links that lead out of the folder, and pipes and devices in it.

    A stranger may have put them there; or a link leads to a disk that is not mounted.
    """
    root = os.path.realpath(folder)
    needed = [folder / name for name in NEEDED_FOLDERS]
    walks = itertools.chain(*(os.walk(folder / name) for name in WALKED))
    below = (Path(place, name) for place, *names in walks for name in itertools.chain(*names))
    for path in (*needed, *(folder / name for name in OTHERS), *below):
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise ConfigError(f"{path} is a link that leads out of the run's output folder")
        if os.path.lexists(path) and not (path.is_dir() or path.is_file() and path not in needed):
            raise ConfigError(f"{path} must be a {'folder' if path in needed else 'file'}")


def _acquire(file: IO[str], folder: Path) -> None:
    file.seek(0)
    try:
        # Unlike flock, this is not inherited by the reading processes of the loader.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ConfigError(
            f"experiment.output_dir={folder} is in use by another run: {file.readline().strip()}. "
            "Wait for it, stop it, or choose another folder"
        ) from error
    except OSError as error:
        logger.warning("%s has no locks (%s): let no second run use it", folder, error.strerror)
    file.truncate()
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
    file.flush()
