"""Two sides that take turns at a piece of work, and the report of what they took."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarking import NONE, PLAIN
from benchmarking.tables import format_table

ROOT = Path(__file__).resolve().parents[3]  # holds the package, and in a checkout the configs
SCRIPTS = Path(__file__).resolve().parents[1]
UNCHANGED = {"compile": False, "prepack": False, "checkpointing": 0}  # the model of a baseline


@dataclass
class Side:
    """One of the two processes.

    Attributes:
        name: In the table.
        process: Its worker.
        runs: Reports of the measured runs.
        counts: Operations and matrix work of a run, if they were counted.
    """

    name: str
    process: subprocess.Popen
    runs: list[dict[str, float]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line; returns the answer.

        Raises:
            RuntimeError: If the process ended; its messages went to standard error.
        """
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer."""
        for text in self.process.stdout:
            if text.startswith("{"):
                return json.loads(text)
        raise RuntimeError(f"the process of {self.name} ended with {self.process.wait()}")

    def median(self, name: str) -> float:
        """Of the measured runs."""
        return statistics.median(run[name] for run in self.runs)


# --- what is measured ---------------------------------------------------------------------------


def make_specs(args: argparse.Namespace, scratch: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, kind of work and settings of everything a command measures."""
    if args.command == "data":
        names = ("records", "shape", "batch", "batches", "workers")
        spec = {name: getattr(args, name) for name in names}
        spec |= {"dataset": str(scratch / "records"), "shuffle": not args.in_order}
        return [("reading", "data", spec), ("first batch", "first-batch", spec)]
    spec = make_model_spec(args, scratch / "weights.pt")
    if args.command == "train":
        levels = args.levels
        return [(f"train, level {n}", "train", spec | {"checkpointing": n}) for n in levels]
    return [(args.command, args.command, spec)]


def make_model_spec(args: argparse.Namespace, weights: Path | None) -> dict[str, Any]:
    """Settings of work with a model, whose weights are shared by way of a file if one is named."""
    spec = {
        "transformer": make_model_arguments(args),
        "scheduler": args.scheduler,
        "batch": args.batch,
        "device": args.device,
        "dtype": args.dtype,
        "compile": args.compile,
        "weights": str(weights or ""),
    }
    is_video = spec["transformer"]["video_base_size"][0] > 1
    spec["frames"] = args.frames or (9 if is_video else 1)
    if args.command == "generate":
        from diffnext.pipelines.pipeline_utils import cosine_set_sizes  # takes seconds

        tokens = math.prod(spec["transformer"]["image_base_size"])
        num_preds = cosine_set_sizes(args.sets, tokens).tolist()
        spec |= {"num_preds": num_preds, "steps": args.steps, "guidance": args.guidance}
        spec["prepack"] = args.prepack
    return spec


def make_model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the model, with the sizes that the command line changes.

    Raises:
        ValueError: If the size does not fit the model's strides.
    """
    if args.model:
        config = json.loads((args.model / "transformer" / "config.json").read_text())
        config = {name: value for name, value in config.items() if not name.startswith("_")}
    else:
        path = args.config or ROOT / "configs" / "nova_d48w768_sdxl1024.yaml"
        if not path.is_file():
            raise ValueError(f"there is no config {path}: give --config or --model")
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        config = config["pipeline"]["paths"]["module_config"]["transformer"]
    if args.arch:
        config["arch"] = args.arch
    size = config["image_size"]
    size = [size, size] if isinstance(size, int) else list(size)
    if args.size:
        size = [args.size[0], args.size[-1]]
        patch = 15 // config["image_stride"] + 1
        stride = config["image_stride"] * patch
        if any(side % (2 * stride) for side in size):
            raise ValueError(f"--size must be multiples of {2 * stride}, got {size}")
        config["image_base_size"] = [side // stride for side in size]
        frames = config["video_base_size"][0]
        config["video_base_size"] = [frames, *(side // stride // 2 for side in size)]
    return {**config, "image_size": size}


def measure(
    args: argparse.Namespace, work: str, name: str, spec: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    """Run both sides in turns."""
    sides = [start_side(args, "ours", work, spec)]
    if args.baseline != NONE:
        sides.append(start_side(args, args.baseline, work, {**spec, **UNCHANGED}))
    try:
        for _ in range(args.warmup):
            for side in sides:
                side.ask("run")
        for _ in range(args.runs):
            for side in sides:
                side.runs.append(side.ask("run"))
        error = compare(sides, scratch) if len(sides) == 2 else None
        if work in ("generate", "train"):
            for side in sides:
                side.counts = side.ask("count")
    finally:
        for side in sides:
            side.process.stdin.close()
            side.process.wait()
    return {
        "name": name,
        "spec": spec,
        "relative_error": error,
        "sides": [
            {"name": side.name, "runs": side.runs, **side.counts, **medians(side)} for side in sides
        ],
    }


def start_side(args: argparse.Namespace, name: str, work: str, spec: dict[str, Any]) -> Side:
    """Start a worker and wait until it is ready."""
    package = ROOT if name in ("ours", PLAIN) else Path(name).resolve()
    settings = {"work": work, "spec": spec, "is_plain": name == PLAIN, "threads": args.threads}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "benchmarking" / "worker.py"), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{package}{os.pathsep}{SCRIPTS}",
            "OMP_NUM_THREADS": str(args.threads),
        },
    )
    side = Side(name, process)
    side.read()
    return side


def compare(sides: list[Side], scratch: Path) -> float | None:
    """Largest difference of what the sides computed, over the largest value of the baseline."""
    results = []
    for index, side in enumerate(sides):
        path = scratch / f"result{index}.pt"
        if not side.ask(f"save {path}")["saved"]:
            return None
        results.append(torch.load(path, weights_only=True).double())
    ours, theirs = results
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def medians(side: Side) -> dict[str, float]:
    """What the table shows of a side."""
    seconds = [run["seconds"] for run in side.runs]
    return {
        "seconds": side.median("seconds"),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "rate": side.median("rate"),
        "peak_mb": max(run["peak_mb"] for run in side.runs),
    }


# --- reports ------------------------------------------------------------------------------------


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    device = getattr(args, "device", "cpu")
    dtype = getattr(torch, getattr(args, "dtype", "float32"))
    name = torch.cuda.get_device_name() if device.startswith("cuda") else processor_name()
    torch.set_num_threads(args.threads)
    return {
        "device": name,
        "threads": args.threads,
        "torch": torch.__version__,
        "matrix_gflops": measure_matrix_rate(device, dtype) / 1e9,
    }


def processor_name() -> str:
    """Model of the processor, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def measure_matrix_rate(device: str, dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second of a large square product."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    return 2 * size**3 / best_seconds(lambda: a @ b, device)


def measure_bandwidth(device: str, size: int = 2**28) -> float:
    """Bytes per second that copying inside a device's memory reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)


def best_seconds(function: Callable[[], Any], device: str, runs: int = 6) -> float:
    """Seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(runs):
        begin = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def format_report(report: dict[str, Any]) -> str:
    """What was measured on, and a table with a line for each side."""
    machine = report["machine"]
    results = report["results"]
    rows = [
        describe_side(result, side, machine["matrix_gflops"])
        for result in results
        for side in result["sides"]
    ]
    errors = [result["relative_error"] for result in results]
    return "\n".join(
        [
            f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"products at {machine['matrix_gflops']:.0f} GFLOP/s",
            "",
            format_table(rows),
            *(
                f"\nResults differ by {error:.1e} of the largest value."
                for error in errors
                if error is not None
            ),
        ]
    )


def describe_side(
    result: dict[str, Any], side: dict[str, Any], matrix_gflops: float
) -> dict[str, Any]:
    """The cells of a side; its share is of the rate of large matrix products."""
    flops = side.get("flops")
    baseline = result["sides"][-1]["seconds"] if len(result["sides"]) == 2 else None
    return {
        "work": result["name"],
        "side": side["name"],
        "median s": side["seconds"],
        "span": f"{side['fastest']:.4g} to {side['slowest']:.4g}",
        "per s": side["rate"],
        "ratio": f"{baseline / side['seconds']:.2f}x" if baseline else None,
        "peak MB": f"{side['peak_mb']:.0f}",
        "operations": side.get("operations"),
        "GFLOP": f"{flops / 1e9:.1f}" if flops else None,
        "share": f"{flops / side['seconds'] / matrix_gflops / 1e7:.0f} %" if flops else None,
    }
