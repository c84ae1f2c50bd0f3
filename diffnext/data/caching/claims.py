"""Claims: files in a shared folder that say which process builds which chunk.

The processes may run on different machines that share only the folder. If a process is killed or
its machine goes down, its claims stay, and others take them over: a process of this machine is
looked for by its number, one of another machine renews the time of a file while it lives.

    <folder>/host-4711-1f2e3d.alive    a process, renewed every few seconds
    <folder>/chunk-00000012.claim      names the process that holds it
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

RENEWAL = 10.0  # seconds
DEAD_AFTER = 120.0  # seconds without a renewal, by the clock of the file system
BUILDER = "builder-"  # begins the claim that a process joins with
POLL = 0.5  # seconds between two looks at a claim that another process holds


class Claims:
    """The claims of this process; all are given back at the end of the ``with`` block.

    The end of the block also removes what dead processes have left, so the last process leaves an
    empty folder.

    Args:
        folder: Where the claims of all processes are; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        process = psutil.Process()
        self._host = _machine()
        self._owner = f"{socket.gethostname()}-{process.pid}-{uuid.uuid4().hex[:8]}"
        self._identity = {"host": self._host, "pid": process.pid, "started": process.create_time()}
        self._held: set[str] = set()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._keep_renewing, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._renew()
        self._renewing.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._renewing.join(RENEWAL)  # it may wait for a folder that is away
        for name in list(self._held):
            self.give_back(name)
        for path in self._folder.glob("*.claim*"):
            self._remove_abandoned(path)
        for path in self._folder.glob("*.alive"):
            if not self._is_alive(path.stem, path):
                path.unlink(missing_ok=True)
        self._alive_file(self._owner).unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Claim something, unless a living process holds it.

        Args:
            name: Name of the claim; part of a file's name.

        Returns:
            Whether this process has it now.
        """
        path = self._claim_file(name)
        while True:
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(self._owner)
            except FileNotFoundError:  # somebody removed the folder
                self._renew()
            except FileExistsError:
                if not self._remove_abandoned(path):
                    return False
            else:
                self._held.add(name)
                return True

    def join(self) -> None:
        """Let others know that this process builds."""
        self.take(f"{BUILDER}{self._owner}")

    def is_alone(self) -> bool:
        """Whether no other living process has joined."""
        joined = [path.stem for path in self._folder.glob(f"{BUILDER}*.claim")]
        return all(name in self._held or self.take(name) for name in joined)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold a claim for a while; waits for the process that has it."""
        while not self.take(name):
            time.sleep(POLL)
        try:
            yield
        finally:
            self.give_back(name)

    def give_back(self, name: str) -> None:
        """Let others have it."""
        self._held.discard(name)
        self._claim_file(name).unlink(missing_ok=True)

    def _remove_abandoned(self, path: Path) -> bool:
        """Remove a claim whose process is gone; returns whether the claim is gone."""
        owner = _read(path)
        if owner is None:
            return True
        if self._is_alive(owner, path):
            return False
        # Another process may be doing the same: the moved claim must be the one that was read.
        moved = path.with_name(f"{path.name}.{self._owner}")
        try:
            os.rename(path, moved)
            if _read(moved) != owner:
                os.rename(moved, path)
                return False
            moved.unlink()
        except FileNotFoundError:  # it was given back, or somebody removed the folder
            pass
        return True

    def _is_alive(self, owner: str, claim: Path) -> bool:
        """Whether the process that wrote a claim may still work on it."""
        if not owner:  # it has not written its name yet
            return self._is_fresh(claim)
        alive = self._alive_file(owner)
        try:
            identity = json.loads(_read(alive) or "{}")
        except ValueError:
            return self._is_fresh(alive)
        if identity.get("host") == self._host:
            return _runs(identity)
        return self._is_fresh(alive)

    def _is_fresh(self, path: Path) -> bool:
        own = self._alive_file(self._owner)
        try:
            self._renew()  # now, by the clock that the other file's time comes from
            return own.stat().st_mtime - path.stat().st_mtime < DEAD_AFTER
        except FileNotFoundError:
            return False

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEWAL):
            with contextlib.suppress(OSError):  # a shared folder may be away for a moment
                self._renew()

    def _renew(self) -> None:
        path = self._alive_file(self._owner)
        while True:
            # If a parent is not a folder, the error of mkdir names it.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.utime(path)
                return
            with contextlib.suppress(FileNotFoundError):  # others remove an empty folder
                self._folder.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(self._identity), encoding="utf-8")
                return

    def _alive_file(self, owner: str) -> Path:
        return self._folder / f"{owner}.alive"

    def _claim_file(self, name: str) -> Path:
        return self._folder / f"{name}.claim"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _machine() -> str:
    """What processes that can see each other's numbers have in common: no container's are."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        name += f"-{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return name


def _runs(identity: dict) -> bool:
    """Whether a process of this machine runs, and not a later one with its number."""
    try:
        process = psutil.Process(identity["pid"])
        is_same = process.create_time() == identity["started"]
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
