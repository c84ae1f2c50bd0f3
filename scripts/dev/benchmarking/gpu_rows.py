"""The rows of ``check_gpu.py``: each is a generator of figures, and raises if something is wrong.

A row runs in its own process. What it has yielded counts, even if it fails or hangs later.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import benchmark
from benchmarking import NONE, measuring, runs
from benchmarking.worker import Worker

ROOT = measuring.ROOT
PACKAGES = ("diffnext", "torch", "triton", "diffusers", "transformers", "accelerate", "deepspeed")
CONFIGS = {  # of the released models, and small ones
    "t2i": ("nova_d48w1024_sdxl1024", "nova_shapes_t2i"),
    "clip": ("nova_d48w1024_osp480", "nova_shapes_t2v"),
}
SIZES = {"t2i": ({"batch": 1}, {"batch": 8}), "clip": ({"frames": 1}, {"frames": 3})}
FRAMES = 9  # of the clip that is extrapolated
SMALL = ("vit_d2w64", "vit_d4w64", "mlp_d2w64")
LARGE = ("vit_d16w768", "vit_d32w768", "mlp_d6w768")
STEPS = 6

Figures = dict[str, Any]
Ask = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Context:
    """What a row needs.

    Attributes:
        is_rehearsal: Whether to run on the CPU, with small models.
        folder: Of its own.
        baseline: Folder that holds another package.
    """

    is_rehearsal: bool
    folder: Path
    baseline: Path | None

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.is_rehearsal else "cuda"

    @property
    def dtype(self) -> str:
        """Of drawings."""
        return "float32" if self.is_rehearsal else "bfloat16"


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        name: In the report.
        limit: Seconds on a card of the H200's class.
        measure: Yields figures.
        is_timed: Whether it must run by itself.
    """

    name: str
    limit: int
    measure: Callable[[Context], Iterator[Figures]]
    is_timed: bool = False


def describe_card(context: Context) -> Iterator[Figures]:
    """Versions, and the rates that the card reaches."""
    versions = {"python": sys.version.split()[0], "CUDA": torch.version.cuda}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    yield versions
    rate, bandwidth = find_rates(context)
    one = torch.zeros((), device=context.device)
    launches = 1000
    seconds = measuring.best_seconds(lambda: [one.add_(1) for _ in range(launches)], context.device)
    is_gpu = context.device == "cuda"
    yield {
        "card": torch.cuda.get_device_name() if is_gpu else measuring.processor_name(),
        "memory, GiB": torch.cuda.mem_get_info()[1] / 2**30 if is_gpu else None,
        f"{context.dtype} products, TFLOP/s": rate / 1e12,
        "copying, GB/s": bandwidth / 1e9,
        "a launch, us": seconds / launches * 1e6,
    }


def find_rates(context: Context) -> tuple[float, float]:
    """Floating-point operations of large products, and bytes of copies, per second."""
    side, size = (512, 2**20) if context.is_rehearsal else (8192, 2**32)
    rate = measuring.measure_matrix_rate(context.device, getattr(torch, context.dtype), side)
    return rate, measuring.measure_bandwidth(context.device, size)


def run_tests(context: Context) -> Iterator[Figures]:
    """Run the tests that need a GPU; a rehearsal finds them."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    options = ["--collect-only"] if context.is_rehearsal else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *options, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    yield {"pytest -m gpu": done.stdout.strip().splitlines()[-1]}
    assert done.returncode == 0, f"pytest ended with {done.returncode}"


# --- drawings -----------------------------------------------------------------------------------


def draw(context: Context, name: str, modes: Sequence[str]) -> Iterator[Figures]:
    """Draw latents with a model of random weights: pictures, or a clip."""
    spec = make_spec(context, name)
    if "compiled" in modes:
        options = {"backend": "eager"} if context.is_rehearsal else {}
        spec |= {"compile": True, "compile_options": options}
    yield from measure_sizes(start_worker(spec).ask, context, name, modes)


def draw_baseline(context: Context, name: str) -> Iterator[Figures]:
    """The same with another package."""
    args = parse_drawing(context, name)
    side = measuring.start_side(args, str(context.baseline), make_spec(context, name))
    yield from measure_sizes(side.ask, context, name, ["baseline"])


def parse_drawing(context: Context, name: str) -> argparse.Namespace:
    """Arguments of the benchmark of a drawing."""
    words = ["--config", str(ROOT / "configs" / f"{CONFIGS[name][context.is_rehearsal]}.yaml")]
    words += (
        ["--sets", "4", "--steps", "2", "--arch", *SMALL]
        if context.is_rehearsal
        else ["--sets", "64"]
    )
    words += ["--device", context.device, "--dtype", context.dtype]
    return benchmark.parse_args(["generate", *words, "--baseline", NONE, "--threads", "1"])


def make_spec(context: Context, name: str) -> dict[str, Any]:
    """What the benchmark would draw."""
    return measuring.make_model_spec(parse_drawing(context, name), None)


def start_worker(spec: dict[str, Any]) -> Worker:
    """What draws, in this process."""
    return Worker({"work": "generate", "spec": spec, "is_plain": False, "threads": 1})


def measure_sizes(ask: Ask, context: Context, name: str, modes: Sequence[str]) -> Iterator[Figures]:
    """Measure pictures one by one and many at once, or clips of some lengths, in some modes."""
    rates = find_rates(context) if "eager" in modes else None
    found: dict[str, list[Figures]] = {mode: [] for mode in modes}
    for size in SIZES[name]:
        ask(f"change {json.dumps(size)}")
        for mode in modes:
            if "captured" in modes:
                recorder = "record_calls" if context.is_rehearsal else "record_cuda_graph"
                ask(f"record {recorder if mode == 'captured' else ''}")
            figures = measure_drawing(ask, runs=0 if size == {"batch": 8} else 3)
            if rates is not None:  # many pictures take many times the floor of one
                first = found[mode][0] if "batch" in size and found[mode] else None
                floor = first["floor, s"] * size["batch"] if first else find_floor(ask, rates)
                figures["floor, s"] = floor
            found[mode].append(figures)
            words = ", ".join(f"{key} {value}" for key, value in size.items())
            yield {"drawing": f"{name}, {words}", "mode": mode} | figures
    if name == "clip":
        for mode, (short, long) in found.items():
            label = {"drawing": f"clip, frames {FRAMES}, extrapolated", "mode": mode}
            yield label | extrapolate(short, long)


def measure_drawing(ask: Ask, runs: int) -> Figures:
    """The first drawing, which compiles and records, then the median of some; or of the counted."""
    first = ask("run")
    measured = [ask("run") for _ in range(runs)]
    counted = ask("launches")
    return {
        "first, s": first["seconds"],
        "s": statistics.median(run["seconds"] for run in measured or [counted]),
        "launches": counted["launches"],
        "peak, MB": counted["peak_mb"],
    }


def find_floor(ask: Ask, rates: tuple[float, float]) -> float:
    """Seconds of only the products, from drawings of two and three steps: all steps are alike."""
    steps = ask("change {}")["steps"]
    floors = []
    for few in (2, 3):
        ask(f"change {json.dumps({'steps': few})}")
        floors.append(ask(f"count {rates[0]} {rates[1]}")["floor"])
    ask(f"change {json.dumps({'steps': steps})}")
    return floors[0] + (steps - 2) * (floors[1] - floors[0])


def extrapolate(short: Figures, long: Figures) -> Figures:
    """A longer clip, each of whose frames costs as much as one between the two clips."""
    first, last = (size["frames"] for size in SIZES["clip"])
    ratio = (FRAMES - last) / (last - first)
    keys = [key for key in ("s", "launches", "floor, s") if key in long]
    return {key: long[key] + ratio * (long[key] - short[key]) for key in keys}


# --- waits --------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(device: str) -> Iterator[list[str]]:
    """Note the lines that wait for the card, as PyTorch sees them; filled at the end."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
    places += [f"{Path(one.filename).name}:{one.lineno}" for one in waits]


def report_waits(name: str, places: Sequence[str]) -> Iterator[Figures]:
    """Report where it waited, which is an error."""
    yield {"watched": name, "waits": len(places), "at": ", ".join(dict.fromkeys(places))}
    assert not places, f"a {name} waits for the card at {places[0]}"


def watch_drawing(context: Context) -> Iterator[Figures]:
    """Draw clips of a small model, eagerly and by recorded programs."""
    small = make_spec(Context(True, context.folder, None), "clip")
    worker = start_worker(small | {"device": context.device, "dtype": context.dtype})
    for name in ("drawing", "recorded drawing"):
        for _ in range(2):  # tables and programs are kept from the first
            inputs = worker.work.inputs()
            with torch.no_grad(), watched(context.device) as places:
                worker.work.model(inputs)
        yield from report_waits(name, places)
        worker.ask(f"record {'record_calls' if context.is_rehearsal else 'record_cuda_graph'}")


def watch_training(context: Context) -> Iterator[Figures]:
    """Train for some steps, of which the last is watched."""
    import check_reliability

    output = f"experiment.output_dir={context.folder}"
    options = [*runs.make_inputs(context.folder.parent), output, "experiment.log_every=1000"]
    trainer = check_reliability.make_trainer(options)
    for _ in range(4):
        with watched(context.device) as places:
            check_reliability.step(trainer)
    trainer.close()
    yield from report_waits("training step", places)


# --- training, memory ---------------------------------------------------------------------------


def train(context: Context, engine: str) -> Iterator[Figures]:
    """Six steps, then the last three again from the checkpoint between them."""
    launcher = "fsdp2_x2" if context.is_rehearsal and engine == "fsdp2" else engine
    output, straight = context.folder / "run", context.folder / "straight"
    options = [
        *runs.make_inputs(context.folder.parent),
        "training.mixed_precision=bf16",
        f"training.max_train_steps={STEPS}",
        "lr_scheduler.params.warmup_steps=0",
        f"experiment.save_every={STEPS // 2}",
        "checkpoint.async_save=true",
        f"validation={{every: {STEPS // 2}, num_inference_steps: 2, prompts: [a red circle]}}",
    ]
    for folder in (output, straight):
        shutil.rmtree(folder, ignore_errors=True)
    runs.run_to_end(launcher, options, output)
    shutil.copytree(output, straight)
    for tree in runs.TREES:
        shutil.rmtree(output / tree / f"checkpoint-{STEPS}")
    runs.run_to_end(launcher, options, output)
    first, second = (np.array(runs.read_metrics(one)) for one in (straight, output))
    differing = runs.count_differences(straight, output, STEPS)
    pictures = len(list(output.glob(f"validation/step-{STEPS}/*.png")))
    yield {
        "engine": engine,
        "loss": first[-1, 3],
        "differing bytes, metrics": differing[0],
        "differing bytes, weights": differing[1],
        "pictures": pictures,
    }
    assert pictures, "there are no validation pictures"
    assert len(first) == STEPS and np.isfinite(first).all(), "some loss is missing or not finite"
    # The first loss needs no gradient; kernels of gradients may add in another order.
    assert first[STEPS // 2, 3] == second[STEPS // 2, 3], "the resumed run differs at once"
    np.testing.assert_allclose(second, first, rtol=1e-3, err_msg="the resumed run differs")


def compare_memory(context: Context) -> Iterator[Figures]:
    """Peak of training steps and of recorded drawings, against the simulated one."""
    import check_memory

    is_small = context.is_rehearsal
    sizes = (SMALL, 64, 1) if is_small else (LARGE, 1024, 4)
    for work in ("training", "recorded"):
        case = check_memory.Case(*sizes, context.dtype, 0, context.device, work, sets=8)
        simulated = check_memory.simulate(case) / 2**30
        measured = check_memory.run_child(case) / 2**30
        ratio = simulated / measured
        gib = {"simulated, GiB": simulated, "measured, GiB": measured}
        yield {"memory": case.work, **gib, "ratio": ratio}
        assert is_small or 0.85 < ratio < 1.15, f"{case.work}: {ratio:.2f}"


CAPTURED = ("compiled", "captured")
ROWS = (
    Row("card", 25, describe_card, is_timed=True),
    Row("t2i eager", 65, partial(draw, name="t2i", modes=["eager"]), is_timed=True),
    Row("t2i captured", 150, partial(draw, name="t2i", modes=CAPTURED), is_timed=True),
    Row("clip eager", 45, partial(draw, name="clip", modes=["eager"]), is_timed=True),
    Row("clip captured", 85, partial(draw, name="clip", modes=CAPTURED), is_timed=True),
    Row("tests", 110, run_tests),
    Row("waits drawing", 60, watch_drawing),
    Row("waits training", 60, watch_training),
    Row("training plain", 110, partial(train, engine="plain")),
    Row("training zero2", 110, partial(train, engine="zero2")),
    Row("training fsdp2", 110, partial(train, engine="fsdp2")),
    Row("memory", 110, compare_memory),
)
BASELINE_ROWS = (
    Row("t2i baseline", 65, partial(draw_baseline, name="t2i"), is_timed=True),
    Row("clip baseline", 45, partial(draw_baseline, name="clip"), is_timed=True),
)
