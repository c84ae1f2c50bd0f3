"""The metrics file of a run, and learning curves drawn from it.

Each line of ``metrics.jsonl`` is a JSON object with a ``step`` and some values: losses, ``lr``,
``grad_norm``, ``samples_per_s``; a validation's values are named ``validation/...``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from diffnext.utils.json_files import write_lines, write_whole

logger = logging.getLogger(__name__)

# Titles, and what the names of the values in a panel contain.
PANELS = {
    "loss": "loss",
    "gradient norm": "grad_norm",
    "learning rate": "lr",
    "samples / s": "samples_per_s",
}
SMOOTHING = 0.05  # share of the points that one point of the smooth curve averages over


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file; broken lines, as after a crash, are left out."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def truncate_metrics(file: Path, step: int) -> None:
    """Drop the lines of a step and all later ones, which a resumed run will write again."""
    write_lines(file, [row for row in read_metrics(file) if row["step"] < step])


def draw_curves(metrics_file: Path, output: Path) -> None:
    """Draw losses, gradient norm, learning rate and speed over the steps.

    Without matplotlib there is a warning and no picture.

    Args:
        metrics_file: Written by a run.
        output: PNG file, replaced when the new one is whole.
    """
    if not _can_draw():
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_file)
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for panel, (title, word) in zip(axes, PANELS.items(), strict=True):
        names = sorted({name for row in rows for name in row if word in name})
        for index, name in enumerate(names):
            _draw_line(panel, rows, name, f"C{index}")
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if len(names) > 1:
            panel.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_whole(output, [picture.getvalue()])


@functools.cache
def _can_draw() -> bool:
    """Whether matplotlib is installed; warns once if it is not."""
    if find_spec("matplotlib") is None:
        logger.warning("matplotlib is not installed, so no learning curves: pip install matplotlib")
        return False
    return True


def _draw_line(panel: Any, rows: Iterable[dict[str, Any]], name: str, color: str) -> None:
    """One value over the steps: thin as it is, thick when smoothed; dashed for a validation."""
    points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float)
    steps, values = points.T
    if name.startswith("validation/"):
        panel.plot(steps, values, "o--", color=color, label=name, markersize=3)
        return
    width = 1 if name == "lr" else max(1, round(SMOOTHING * len(values)))
    if width == 1:
        panel.plot(steps, values, color=color, label=name)
        return
    panel.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    panel.plot(steps[width - 1 :], smooth, color=color, label=name)
