"""Processes: their answers, their time limit, and their end with all their descendants."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Job", "Outcome", "describe_end", "family", "kill", "run_job"]


@dataclass(frozen=True)
class Job:
    """A command that may take a while, crash or hang.

    Attributes:
        name: Of its files.
        command: Its words.
        limit: Seconds after which it is killed.
        is_alone: Whether it must run by itself.
    """

    name: str
    command: Sequence[str]
    limit: float
    is_alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        name: Of the job.
        error: Why it failed; empty if it did not.
        seconds: Until its end.
        answers: JSON objects that it printed, one per line, also before it failed.
    """

    name: str
    error: str
    seconds: float
    answers: list[dict[str, Any]]


def run_job(job: Job, folder: Path, environment: Mapping[str, str] = os.environ) -> Outcome:
    """Run a job to its end, or to its limit.

    Args:
        job: What to run.
        folder: Gets NAME.out and NAME.log, standard output and error of the job.
        environment: Of the job.
    """
    stem = job.name.replace(" ", "-")
    output, log = folder / f"{stem}.out", folder / f"{stem}.log"
    begin = time.monotonic()
    with output.open("w") as out, log.open("w") as err:
        process = subprocess.Popen(job.command, stdout=out, stderr=err, env=environment)
        try:
            error = describe_end(process.wait(timeout=job.limit), log)
        except subprocess.TimeoutExpired:
            error = f"stopped after {job.limit:.3g} s"
        finally:
            kill(process)
    return Outcome(job.name, error, time.monotonic() - begin, read_answers(output))


def describe_end(code: int, log: Path) -> str:
    """Why a process failed, given its exit code; empty if it did not."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'no message'}" if code else ""


def read_answers(output: Path) -> list[dict[str, Any]]:
    """JSON objects of a file, one per line; other lines are left out."""
    answers = []
    for line in output.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed process may be half there
            if line.startswith("{"):
                answers.append(json.loads(line))
    return answers


def kill(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started, and wait until they are gone."""
    victims = family(process)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims)
    process.wait()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all its descendants; ranks are leaders of sessions of their own."""
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
