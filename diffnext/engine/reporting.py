"""What a run tells while it goes on: log lines, progress bar, trackers, metrics file, curves.

``<output_dir>/metrics.jsonl`` gets one JSON object for each report, whatever tracker there is;
``<output_dir>/curves.png`` is drawn from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffnext.engine.curves import draw_curves, truncate_metrics
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
        num_tokens: Latent tokens that it trained on, of this process.
        applied: Whether the optimizer stepped; False when the step was left out.
    """

    step: int
    lr: float
    metrics: dict[str, Tensor]
    grad_norm: Tensor
    num_tokens: int
    applied: bool


class Reporter:
    """Collects the results of steps and reports them at intervals.

    Args:
        config: Training configuration.
        accelerator: Knows processes and trackers.
        logger: Where log lines go.
    """

    def __init__(
        self,
        config: DictConfig,
        accelerator: Accelerator,
        logger: logging.Logger | logging.LoggerAdapter,
    ) -> None:
        self.accelerator = accelerator
        self.logger = logger
        self.show_bar = config.training.get("progress_bar", True) and accelerator.is_main_process
        self.max_steps = config.training.max_train_steps
        self.samples_per_step = (
            config.training.batch_size
            * config.training.gradient_accumulation_steps
            * accelerator.num_processes
        )
        output_dir = Path(config.experiment.output_dir)
        self.metrics_file = output_dir / METRICS_FILE
        self.curves_file = output_dir / CURVES_FILE
        self.window: list[StepResult] = []
        self._window_started = time.perf_counter()
        self._bar: tqdm | None = None

    @contextlib.contextmanager
    def progress_bar(self, first_step: int) -> Iterator[None]:
        """Show a live bar on the main process; log lines pass above it."""
        is_terminal = sys.stderr.isatty()
        arguments = {
            "total": self.max_steps,
            "initial": first_step,
            "unit": "step",
            "dynamic_ncols": True,
            "disable": not self.show_bar,
            # In a file each refresh is one more line, so refresh seldom.
            "mininterval": 0.5 if is_terminal else 10.0,
        }
        self._window_started = time.perf_counter()
        with tqdm(**arguments) as bar, contextlib.ExitStack() as stack:
            if is_terminal and self.show_bar:
                logger = getattr(self.logger, "logger", self.logger)  # an adapter's own logger
                stack.enter_context(logging_redirect_tqdm([logger]))
            self._bar = bar
            yield
            self._bar = None

    def add(self, result: StepResult) -> None:
        """Take the result of a step; one that was left out does not count."""
        if result.applied:
            self.window.append(result)
        if self._bar is not None:
            self._bar.update()

    @contextlib.contextmanager
    def excluded_time(self) -> Iterator[None]:
        """Keep what is done inside out of the time of steps; draw the curves at the end."""
        start = time.perf_counter()
        yield
        if self.accelerator.is_main_process and self.metrics_file.is_file():
            draw_curves(self.metrics_file, self.curves_file)
        self._window_started += time.perf_counter() - start

    def report(self) -> None:
        """Report the steps since the last report: median and mean over them and all processes."""
        if not self.window:
            return
        last = self.window[-1]
        seconds = (time.perf_counter() - self._window_started) / len(self.window)
        columns = self._reduce_window()
        self.logger.info("Iteration %d, lr = %.8f, time = %.2fs", last.step, last.lr, seconds)
        for name in last.metrics:
            self.logger.info("    Train net output(%s): %s", name, columns[name])
        self.logger.info("    Gradient norm: %s", columns["grad_norm"])
        medians = {name: values.median for name, values in columns.items()}
        speed = self._speed(seconds)
        self.track({**medians, "lr": last.lr, "time": seconds, **speed}, last.step)
        self._show(medians, last.lr, speed)
        self.window.clear()
        self._window_started = time.perf_counter()

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Hand values to the metrics file and the trackers; a tracker must not end the run."""
        if self.accelerator.is_main_process:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        try:
            self.accelerator.log(dict(values), step=step)
        except Exception as error:
            self.logger.warning("the tracker did not take the values of step %d: %s", step, error)

    def rewind(self, step: int) -> None:
        """Forget what was reported of steps that will be done again."""
        if self.accelerator.is_main_process and self.metrics_file.is_file():
            truncate_metrics(self.metrics_file, step)

    def state_dict(self) -> list[dict[str, Any]]:
        """The steps that are not yet reported."""
        return [vars(result) for result in self.window]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continue with the steps that were not yet reported."""
        device = self.accelerator.device
        for item in state:
            metrics = {name: value.to(device) for name, value in item["metrics"].items()}
            grad_norm = item["grad_norm"].to(device)
            self.window.append(StepResult(**{**item, "metrics": metrics, "grad_norm": grad_norm}))

    def _reduce_window(self) -> dict[str, SmoothedValue]:
        """The metrics of the window's steps, averaged over the processes."""
        names = [*self.window[-1].metrics, "grad_norm"]
        rows = [[*result.metrics.values(), result.grad_norm] for result in self.window]
        table = torch.stack([torch.stack(row) for row in rows])
        table = self.accelerator.reduce(table, reduction="mean").tolist()  # (steps, metrics)
        columns = {}
        for name, column in zip(names, zip(*table, strict=True), strict=True):
            columns[name] = SmoothedValue()
            for value in column:
                columns[name].update(value)
        return columns

    def _speed(self, seconds: float) -> dict[str, float]:
        """Throughput of all processes and memory of this one."""
        tokens = self.window[-1].num_tokens * self.accelerator.num_processes
        return {
            "samples_per_s": self.samples_per_step / seconds,
            "tokens_per_s": tokens / seconds,
            "memory_gb": peak_memory(self.accelerator.device) / 2**30,
        }

    def _show(self, medians: Mapping[str, float], lr: float, speed: Mapping[str, float]) -> None:
        if self._bar is None:
            return
        shown = {name: f"{value:.4f}" for name, value in medians.items()}
        shown["lr"] = f"{lr:.2e}"
        shown["samples/s"] = f"{speed['samples_per_s']:.3g}"
        shown["tokens/s"] = f"{speed['tokens_per_s']:.3g}"
        shown["memory"] = f"{speed['memory_gb']:.1f} GB"
        self._bar.set_postfix(shown, refresh=False)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of a CUDA device, or of this process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
