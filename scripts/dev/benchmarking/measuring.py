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
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarking import NONE, PLAIN
from benchmarking.tables import format_table

ROOT = Path(__file__).resolve().parents[3]  # holds the package, and in a checkout the configs
SCRIPTS = Path(__file__).resolve().parents[1]
UNCHANGED = {"compile": False, "prepack": False, "checkpointing": 0}  # the model of a baseline


class Side:
    """One of the two processes.

    Args:
        name: In the table.
        command: Words that start its worker.
        environment: Of the worker.

    Attributes:
        runs: Reports of the measured runs.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.runs: list[dict[str, float]] = []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=environment
        )
        self.read()

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line; returns the answer.

        Raises:
            RuntimeError: If the process ended; its messages went to standard error.
        """
        print(line, file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer."""
        for text in self.process.stdout or ():
            if text.startswith("{"):
                return json.loads(text)
        raise RuntimeError(f"the process of {self.name} ended with {self.process.wait()}")

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()


# --- settings of works ---------------------------------------------------------------------------


def make_specs(args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Settings of everything that a command measures, by name."""
    spec = make_model_spec(args, scratch / "weights.pt")
    if args.command == "generate":
        return {"generate": spec}
    return {f"train, level {level}": spec | {"checkpointing": level} for level in args.levels}


def make_model_spec(args: argparse.Namespace, weights: Path | None) -> dict[str, Any]:
    """Settings of work with a model; a file, if named, shares the weights."""
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
        config: Any = json.loads((args.model / "transformer" / "config.json").read_text())
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
    args: argparse.Namespace, name: str, spec: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    """Run both sides in turns."""
    sides = [start_side(args, "ours", spec)]
    if args.baseline != NONE:
        sides.append(start_side(args, args.baseline, spec | UNCHANGED))
    try:
        for turn in range(args.warmup + args.runs):
            for side in sides:
                report = side.ask("run")
                if turn >= args.warmup:
                    side.runs.append(report)
        error = compare(sides, scratch) if len(sides) == 2 else None
        counts = [side.ask("count") for side in sides]
    finally:
        for side in sides:
            side.stop()
    return {
        "name": name,
        "spec": spec,
        "relative_error": error,
        "sides": [
            {"name": side.name, "runs": side.runs, **count, **medians(side.runs)}
            for side, count in zip(sides, counts, strict=True)
        ],
    }


def start_side(args: argparse.Namespace, name: str, spec: dict[str, Any]) -> Side:
    """Start a worker and wait until it is ready."""
    package = ROOT if name in ("ours", PLAIN) else Path(name).resolve()
    settings = {"work": args.command, "spec": spec, "is_plain": name == PLAIN}
    settings["threads"] = args.threads
    command = [sys.executable, str(SCRIPTS / "benchmarking" / "worker.py"), json.dumps(settings)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{package}{os.pathsep}{SCRIPTS}",
        "OMP_NUM_THREADS": str(args.threads),
    }
    return Side(name, command, environment)


def compare(sides: list[Side], scratch: Path) -> float:
    """Largest difference of what the sides computed, over the largest value of the baseline."""
    paths = [scratch / f"result{index}.pt" for index in range(len(sides))]
    for side, path in zip(sides, paths, strict=True):
        side.ask(f"save {path}")
    ours, theirs = (torch.load(path, weights_only=True).double() for path in paths)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """What the table shows of the measured runs."""
    seconds = [run["seconds"] for run in runs]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "rate": statistics.median(run["rate"] for run in runs),
        "peak_mb": max(run["peak_mb"] for run in runs),
    }


# --- reports ------------------------------------------------------------------------------------


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """The machine that the numbers belong to."""
    is_gpu = args.device.startswith("cuda")
    torch.set_num_threads(args.threads)
    return {
        "device": torch.cuda.get_device_name() if is_gpu else processor_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "matrix_gflops": measure_matrix_rate(args.device, getattr(torch, args.dtype)) / 1e9,
    }


def processor_name() -> str:
    """Model of the processor, if the system says."""
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
