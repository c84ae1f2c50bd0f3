"""The reports of a run: log lines, progress bar, trackers, metrics file, curves.

``<output_dir>/metrics.jsonl`` gets one JSON object for each report, with or without trackers;
``<output_dir>/curves.png`` is drawn from it. A report that fails is a warning.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffnext.config.schema import TrainConfig
from diffnext.engine.curves import draw_curves, truncate_metrics
from diffnext.utils.accelerate_utils import Logger, warn_on_error
from diffnext.utils.profiler import SmoothedValue

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of this process.

    Attributes:
        step: Steps completed before it.
        lr: Learning rate it used.
        metrics: Losses and metrics, averaged over its micro-batches; scalars on the device.
        grad_norm: Norm of all gradients before clipping, a scalar on the device.
        num_tokens: Latent tokens of this process that it trained on.
    """

    step: int
    lr: float
    metrics: dict[str, Tensor]
    grad_norm: Tensor
    num_tokens: int


class Reporter:
    """Collects the results of steps and reports them at intervals.

    Args:
        config: Training configuration.
        accelerator: Has the processes and trackers.
        logger: Where log lines go.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, logger: Logger) -> None:
        training = config.training
        self.accelerator = accelerator
        self.logger = logger
        self.show_bar = training.progress_bar and accelerator.is_main_process
        self.max_steps = training.max_train_steps
        self.samples_per_step = (
            training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes
        )
        self.metrics_file = Path(config.experiment.output_dir) / METRICS_FILE
        self.curves_file = Path(config.experiment.output_dir) / CURVES_FILE
        self.window: list[StepResult] = []
        self._num_restored = 0  # steps of the window that an earlier process did
        self._window_started = time.perf_counter()
        self._bar = tqdm(disable=True)  # outside of progress_bar()

    @contextlib.contextmanager
    def progress_bar(self, first_step: int) -> Iterator[None]:
        """Show a live bar on the main process; log lines pass above it."""
        is_terminal = sys.stderr.isatty()
        self._window_started = time.perf_counter()
        self._bar = tqdm(
            total=self.max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self.show_bar,
            # In a file each refresh is one more line, so refresh seldom.
            mininterval=0.5 if is_terminal else 10.0,
        )
        logger = getattr(self.logger, "logger", self.logger)  # an adapter's own logger
        loggers = [logger] if is_terminal and self.show_bar else []
        with self._bar, logging_redirect_tqdm(loggers):
            yield

    def add(self, result: StepResult) -> None:
        """Take the result of a step that was applied."""
        self.window.append(result)

    def advance(self) -> None:
        """Move the bar by a step."""
        self._bar.update()

    @contextlib.contextmanager
    def excluded_time(self) -> Iterator[None]:
        """Do not count the time inside as that of steps; draw the curves at the end."""
        start = time.perf_counter()
        yield
        if self.accelerator.is_main_process and self.metrics_file.is_file():
            with warn_on_error(self.logger, "%s is not drawn", self.curves_file):
                draw_curves(self.metrics_file, self.curves_file)
        self._window_started += time.perf_counter() - start

    def report(self) -> None:
        """Report the steps since the last report: median and mean over them and all processes."""
        if not self.window:
            return
        last = self.window[-1]
        num_timed = max(len(self.window) - self._num_restored, 1)
        seconds = (time.perf_counter() - self._window_started) / num_timed
        num_tokens = sum(result.num_tokens for result in self.window) / len(self.window)
        columns = self._reduce_window()
        self.logger.info("Iteration %d, lr = %.8f, time = %.2fs", last.step, last.lr, seconds)
        values = {name: column.median for name, column in columns.items()}
        norms = columns.pop("grad_norm")
        for name, column in columns.items():
            self.logger.info("    Train net output(%s): %s", name, column)
        self.logger.info("    Gradient norm: %s", norms)
        values |= {
            "lr": last.lr,
            "time": seconds,
            "samples_per_s": self.samples_per_step / seconds,
            "tokens_per_s": num_tokens * self.accelerator.num_processes / seconds,
            "memory_gb": peak_memory(self.accelerator.device) / 2**30,
        }
        self.track(values, last.step)
        self._show(values)
        self.window.clear()
        self._num_restored = 0
        self._window_started = time.perf_counter()

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Hand values to the metrics file and the trackers."""
        if self.accelerator.is_main_process:
            with (
                warn_on_error(self.logger, "step %d is not in %s", step, self.metrics_file),
                self.metrics_file.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(dict(values), step=step)

    def rewind(self, step: int) -> None:
        """Drop the reports of steps that will be done again."""
        if self.accelerator.is_main_process and self.metrics_file.is_file():
            with warn_on_error(self.logger, "%s keeps repeated steps", self.metrics_file):
                truncate_metrics(self.metrics_file, step)

    def state_dict(self) -> list[dict[str, Any]]:
        """The steps that are not yet reported."""
        return [vars(result) for result in self.window]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continue with the steps that were not yet reported; their time is not known."""
        self._num_restored = len(state)
        device = self.accelerator.device
        for item in state:
            metrics = {name: value.to(device) for name, value in item["metrics"].items()}
            grad_norm = item["grad_norm"].to(device)
            self.window.append(StepResult(**{**item, "metrics": metrics, "grad_norm": grad_norm}))

    def _reduce_window(self) -> dict[str, SmoothedValue]:
        """The metrics of the window's steps, averaged over the processes.

        Steps on other datasets may have other metrics, but all processes have the same.
        """
        names = sorted({name for result in self.window for name in result.metrics})
        columns = {name: SmoothedValue() for name in (*names, "grad_norm")}
        rows = [{**result.metrics, "grad_norm": result.grad_norm} for result in self.window]
        flat = torch.stack([value for row in rows for value in row.values()])
        means = iter(self.accelerator.reduce(flat, reduction="mean").tolist())
        for row in rows:
            for name in row:
                columns[name].update(next(means))
        return columns

    def _show(self, values: Mapping[str, float]) -> None:
        shown = {name: f"{values[name]:.4f}" for name in (*self.window[-1].metrics, "grad_norm")}
        shown["lr"] = f"{values['lr']:.2e}"
        shown["samples/s"] = f"{values['samples_per_s']:.3g}"
        shown["tokens/s"] = f"{values['tokens_per_s']:.3g}"
        shown["memory"] = f"{values['memory_gb']:.1f} GB"
        self._bar.set_postfix(shown, refresh=False)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of a CUDA device, or of this process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
