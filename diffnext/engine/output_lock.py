"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffnext.config.targets import ConfigError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make an output folder, and keep other runs out of it inside this block.

    The lock belongs to the process: when the process dies, the folder is free.

    Args:
        folder: The output folder.

    Raises:
        ConfigError: If the folder cannot be made or written, or if another run is using it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise ConfigError(f"experiment.output_dir={folder} cannot be written: {reason}") from error
    with file:
        _acquire(file, folder)
        yield


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
