"""The rows of ``check_gpu.py``: each is a generator of figures, and raises if something is wrong.

A row runs in a process of its own. What it has yielded counts, also if it fails or hangs later.
"""

from __future__ import annotations

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
from torch import Tensor
from torch.nn import functional as F

import benchmark
from benchmarking import NONE, measuring
from benchmarking.worker import Worker

ROOT = measuring.ROOT
PACKAGES = ("diffnext", "torch", "triton", "diffusers", "transformers", "accelerate", "deepspeed")
FRAMES = (1, 3, 9)  # the last is extrapolated
MOST_WAITS = {"drawing": 0, "recorded drawing": 0, "training step": 1}  # the norm of the gradients
STEPS = 6

Figures = dict[str, Any]
Rates = tuple[float, float]  # operations and bytes per second
Ask = Callable[[str], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the rows are.

    Attributes:
        device: On which they run.
        dtype: Of drawings.
        drawings: What is drawn, by name: arguments of ``benchmark.py generate``.
        batches: Pictures at once.
        runs: Measured of each drawing, behind one that is not.
        compile_options: Of ``torch.compile``.
        recorder: Of what is captured.
        matrix: Rows and columns of the product that tells the matrix rate.
        copied: Bytes whose copy tells the bandwidth.
        pytest: Arguments of the tests.
        attention: Frames, and tokens of each.
        memory: Arguments of measure_memory.py.
    """

    device: str
    dtype: str
    drawings: dict[str, Sequence[str]]
    batches: Sequence[int]
    runs: int
    compile_options: dict[str, Any]
    recorder: str
    matrix: int
    copied: int
    pytest: Sequence[str]
    attention: tuple[int, int]
    memory: Sequence[str]


CONFIGS = ROOT / "configs"
RELEASED = Scale(
    device="cuda",
    dtype="bfloat16",
    drawings={
        "t2i": ["--config", f"{CONFIGS}/nova_d48w1024_sdxl1024.yaml", "--sets", "64"],
        "clip": ["--config", f"{CONFIGS}/nova_d48w1024_osp480.yaml", "--sets", "64"],
    },
    batches=(1, 8),
    runs=3,
    compile_options={},
    recorder="record_cuda_graph",
    matrix=8192,
    copied=2**32,
    pytest=(),
    attention=(9, 360),
    memory=["--arch", "vit_d16w768", "vit_d32w768", "mlp_d6w768", "--image-size", "1024"]
    + ["--batch-size", "4", "--dtype", "bfloat16", "--device", "cuda"],
)
TINY = ["--arch", "vit_d2w64", "vit_d4w64", "mlp_d2w64", "--sets", "4", "--steps", "2"]
REHEARSAL = Scale(
    device="cpu",
    dtype="float32",
    drawings={
        "t2i": ["--config", f"{CONFIGS}/nova_shapes_t2i.yaml", *TINY],
        "clip": ["--config", f"{CONFIGS}/nova_shapes_t2v.yaml", *TINY],
    },
    batches=(1, 2),
    runs=1,
    compile_options={"backend": "aot_eager"},
    recorder="record_calls",
    matrix=512,
    copied=2**20,
    pytest=["--collect-only"],
    attention=(3, 6),
    memory=[*TINY[:4], "--image-size", "64", "--batch-size", "1"],
)


@dataclass(frozen=True)
class Context:
    """What a row is told.

    Attributes:
        scale: How large it is.
        folder: Of its own.
        baseline: Folder that holds another package.
    """

    scale: Scale
    folder: Path
    baseline: Path | None


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        name: In the report.
        limit: Seconds on a card of the H200's class.
        measure: Yields figures.
        is_timed: Whether nothing else may run beside it.
    """

    name: str
    limit: int
    measure: Callable[[Context], Iterator[Figures]]
    is_timed: bool = False


def describe_card(context: Context) -> Iterator[Figures]:
    """Versions; rates that the card reaches, from which floors are computed."""
    versions = {"python": sys.version.split()[0], "CUDA": torch.version.cuda}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    yield versions
    scale = context.scale
    is_cuda = scale.device == "cuda"
    rate, bandwidth = measure_rates(scale)
    one = torch.zeros((), device=scale.device)
    launches = 1000
    seconds = measuring.best_seconds(lambda: [one.add_(1) for _ in range(launches)], scale.device)
    yield {
        "card": torch.cuda.get_device_name() if is_cuda else measuring.processor_name(),
        "memory, GiB": torch.cuda.mem_get_info()[1] / 2**30 if is_cuda else None,
        f"{scale.dtype} products, TFLOP/s": rate / 1e12,
        "copying, GB/s": bandwidth / 1e9,
        "a launch, us": seconds / launches * 1e6,
    }


def measure_rates(scale: Scale) -> Rates:
    """Floating-point operations and bytes per second."""
    rate = measuring.measure_matrix_rate(scale.device, getattr(torch, scale.dtype), scale.matrix)
    return rate, measuring.measure_bandwidth(scale.device, scale.copied)


def run_tests(context: Context) -> Iterator[Figures]:
    """Run the tests that need a GPU."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *context.scale.pytest, *files]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    yield {"pytest -m gpu": done.stdout.strip().splitlines()[-1]}
    assert done.returncode == 0, f"pytest ended with {done.returncode}"


# --- drawings -----------------------------------------------------------------------------------


def draw(context: Context, name: str, modes: Sequence[str]) -> Iterator[Figures]:
    """Measure latents drawn by a model with random weights: pictures, or a clip."""
    scale = context.scale
    spec = make_spec(scale, name)
    if "compiled" in modes:
        spec |= {"compile": True, "compile_options": scale.compile_options}
    worker = Worker({"work": "generate", "spec": spec, "is_plain": False, "threads": 1})
    for mode in modes:
        if mode == "captured":
            worker.ask(f"record {scale.recorder}")
        rates = measure_rates(scale) if mode == "eager" else None
        for figures in measure_sizes(worker.ask, scale, name, rates):
            yield figures | {"mode": mode}


def draw_baseline(context: Context, name: str) -> Iterator[Figures]:
    """The same with another package."""
    spec = make_spec(context.scale, name)
    args = parse_drawing(context.scale, name)
    side = measuring.start_side(args, str(context.baseline), "generate", spec)
    for figures in measure_sizes(side.ask, context.scale, name):
        yield figures | {"mode": "baseline"}


def parse_drawing(scale: Scale, name: str) -> Any:
    """Arguments of the benchmark of a drawing."""
    words = ["--device", scale.device, "--dtype", scale.dtype, "--baseline", NONE, "--threads", "1"]
    return benchmark.parse_args(["generate", *scale.drawings[name], *words])


def make_spec(scale: Scale, name: str) -> dict[str, Any]:
    """What the benchmark would draw."""
    return measuring.make_model_spec(parse_drawing(scale, name), None)


def measure_sizes(
    ask: Ask, scale: Scale, name: str, rates: Rates | None = None
) -> Iterator[Figures]:
    """Measure pictures one by one and many at once, or clips of some lengths."""
    if name == "t2i":
        for batch in scale.batches:
            ask(f"change {json.dumps({'batch': batch})}")
            runs = scale.runs if batch == 1 else 1
            yield {"drawing": f"{name}, batch {batch}"} | measure_drawing(ask, runs, rates)
        return
    measured = []
    for frames in FRAMES[:2]:
        ask(f"change {json.dumps({'frames': frames})}")
        measured.append(measure_drawing(ask, scale.runs, rates))
        yield {"drawing": f"{name}, frames {frames}"} | measured[-1]
    yield {"drawing": f"{name}, frames {FRAMES[2]}, extrapolated"} | extrapolate(*measured)


def measure_drawing(ask: Ask, runs: int, rates: Rates | None) -> Figures:
    """The first drawing, which compiles and records, then the median of some.

    Args:
        ask: Gives orders to what draws.
        runs: How many.
        rates: Of the card, to compute the floor by.
    """
    first = ask("run")
    measured = [ask("run") for _ in range(runs)]
    figures = {
        "first, s": first["seconds"],
        "s": statistics.median(run["seconds"] for run in measured),
        "launches": ask("launches")["launches"],
        "peak, MB": measured[-1]["peak_mb"],
    }
    return figures if rates is None else figures | {"floor, s": find_floor(ask, rates)}


def find_floor(ask: Ask, rates: Rates) -> float:
    """Seconds of the products alone, from drawings of two and three steps: all steps are alike."""
    steps = ask("change {}")["steps"]
    floors = []
    for few in (2, 3):
        ask(f"change {json.dumps({'steps': few})}")
        floors.append(ask(f"count {rates[0]} {rates[1]}")["floor"])
    ask(f"change {json.dumps({'steps': steps})}")
    return floors[0] + (steps - 2) * (floors[1] - floors[0])


def extrapolate(short: Figures, long: Figures) -> Figures:
    """A clip whose further frames cost what those between two clips do."""
    ratio = (FRAMES[2] - FRAMES[1]) / (FRAMES[1] - FRAMES[0])
    keys = [key for key in ("s", "launches", "floor, s") if key in long]
    return {key: long[key] + ratio * (long[key] - short[key]) for key in keys}


def draw_in_all_dtypes(context: Context) -> Iterator[Figures]:
    """Draw with NOVA-tiny, of pictures and of videos, against float32."""
    from diffnext.pipelines import NOVAPipeline

    for name, frames in (("nova-tiny", 1), ("nova-tiny-video", 3)):
        exact: np.ndarray | None = None
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            pipe = NOVAPipeline.from_pretrained(ROOT / "assets" / name, dtype=dtype)
            output = pipe.to(context.scale.device)(
                "a red circle",
                num_inference_steps=1,  # with more, rounding may change the order of tokens
                num_diffusion_steps=5,
                max_latent_length=frames,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
                disable_progress_bar=True,
            )
            drawn = np.asarray(output[0], dtype=np.float32)  # pictures or frames, 0 to 255
            exact = drawn if exact is None else exact
            distance = float(np.abs(drawn - exact).mean() / exact.std())
            yield {"model": name, "dtype": str(dtype), "distance to float32": distance}
            assert distance < 0.5, f"{name} in {dtype} is {distance:.2f} from float32"


# --- waits --------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(device: str) -> Iterator[list[str]]:
    """Note the lines that wait for the card, as PyTorch sees them; filled at the end."""
    places: list[str] = []
    if device != "cuda":
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
    places += [f"{Path(one.filename).name}:{one.lineno}" for one in waits]


def report_waits(name: str, places: Sequence[str]) -> Iterator[Figures]:
    """Say where it waited; too often is an error."""
    yield {"work": name, "waits": len(places), "at": ", ".join(dict.fromkeys(places))}
    assert len(places) <= MOST_WAITS[name], f"a {name} waits for the card {len(places)} times"


def watch_drawing(context: Context) -> Iterator[Figures]:
    """Draw clips of a small model, eagerly and by recorded programs."""
    scale = context.scale
    spec = make_spec(REHEARSAL, "clip") | {"device": scale.device, "dtype": scale.dtype}
    worker = Worker({"work": "generate", "spec": spec, "is_plain": False, "threads": 1})
    for name in ("drawing", "recorded drawing"):
        for _ in range(2):  # tables and programs are kept from the first
            inputs = worker.work.inputs()
            with torch.no_grad(), watched(scale.device) as places:
                worker.work.model(inputs)
        yield from report_waits(name, places)
        worker.ask(f"record {scale.recorder}")


def watch_training(context: Context) -> Iterator[Figures]:
    """Train for some steps, of which the last is watched."""
    import benchmark_async_save
    import check_resume

    inputs = check_resume.make_inputs(context.folder.parent / "inputs")
    output = f"experiment.output_dir={context.folder}"
    trainer = benchmark_async_save.make_trainer([*inputs, output, "experiment.log_every=1000"])
    for _ in range(4):
        with watched(context.scale.device) as places:
            benchmark_async_save.step(trainer)
    trainer.close()
    yield from report_waits("training step", places)


# --- attention, training, memory ----------------------------------------------------------------


def compare_attention(context: Context) -> Iterator[Figures]:
    """Attention of the video encoder's blocks in bfloat16, against a dense mask in float32."""
    from diffnext.models.attention import BlockCausalMask

    device = context.scale.device
    frames, tokens = context.scale.attention
    mask = BlockCausalMask.of_frames(num_frames=frames, frame_tokens=tokens, num_condition=257)
    shape = (3, 2, 16, sum(mask.lengths), 64)
    exact = torch.randn(shape, device=device).to(torch.bfloat16).float().requires_grad_()
    rounded = exact.detach().to(torch.bfloat16).requires_grad_()
    dense = mask.dense(torch.float32, device)
    prepared = mask.prepare(torch.device(device), 64)

    def attend_dense(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x.unbind(0), attn_mask=dense.to(x.dtype))

    ways: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "dense, float32": (attend_dense, exact),
        "dense, bfloat16": (attend_dense, rounded),
        "blocks, bfloat16": (lambda x: prepared.attend(*x.unbind(0)), rounded),
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (attend, x) in ways.items():
        run = partial(forward_and_backward, attend, x)
        found[name] = run()
        exact_pair = found["dense, float32"]
        errors = [relative_error(*pair) for pair in zip(found[name], exact_pair, strict=True)]
        seconds = measuring.best_seconds(run, device)
        yield {"attention": name, "error": errors[0], "of gradients": errors[1], "s": seconds}
        assert max(errors) < 0.02, f"attention ({name}) differs by {max(errors):.3f}"


def forward_and_backward(attend: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and the gradient of the sum of its squares."""
    result = attend(x)
    (gradient,) = torch.autograd.grad(result.float().square().sum(), x)
    return result.detach(), gradient


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root of the mean square of the difference, over that of what is expected."""
    difference = found.float() - expected.float()
    return (difference.norm() / expected.float().norm()).item()


def train(context: Context, engine: str) -> Iterator[Figures]:
    """Six steps, then the last three again from the checkpoint between them."""
    import check_resume

    launcher = "fsdp2_x2" if (engine, context.scale.device) == ("fsdp2", "cpu") else engine
    output = context.folder / "run"
    options = [
        *check_resume.make_inputs(context.folder.parent / "inputs"),
        "training.mixed_precision=bf16",
        f"training.max_train_steps={STEPS}",
        "lr_scheduler.params.warmup_steps=0",
        f"experiment.save_every={STEPS // 2}",
        "checkpoint.async_save=true",
        f"validation={{every: {STEPS // 2}, num_inference_steps: 2, prompts: [a red circle]}}",
    ]
    shutil.rmtree(output, ignore_errors=True)
    check_resume.run_to_end(launcher, options, output)
    straight = context.folder / "straight"
    shutil.copytree(output, straight)
    for tree in check_resume.FILES:
        shutil.rmtree(output / tree / f"checkpoint-{STEPS}")
    check_resume.run_to_end(launcher, options, output)
    first, second = (np.array(check_resume.read_metrics(run)) for run in (straight, output))
    differing = check_resume.count_differences(straight, output, STEPS)
    pictures = list(output.glob(f"validation/step-{STEPS}/*.png"))
    yield {
        "engine": engine,
        "loss": first[-1, 3],
        "differing bytes, metrics": differing[0],
        "differing bytes, weights": differing[1],
        "pictures": len(pictures),
    }
    assert pictures, "there are no validation pictures"
    assert len(first) == STEPS and np.isfinite(first).all(), "some loss is missing or not finite"
    # The first is a forward pass alone; kernels of gradients may add in another order.
    assert (first[STEPS // 2, 3] == second[STEPS // 2, 3]).all(), "the resumed run differs at once"
    np.testing.assert_allclose(second, first, rtol=1e-3, err_msg="the resumed run differs")


def compare_memory(context: Context) -> Iterator[Figures]:
    """Peak of training steps and of recorded drawings, against the simulated one."""
    import measure_memory

    words = [*context.scale.memory, "--work", "training", "recorded", "--sets", "8"]
    for case in measure_memory.make_cases(measure_memory.parse_args(words)):
        simulated = measure_memory.simulate(case)
        measured = measure_memory.run_child(case)
        ratio = simulated / measured
        gib = {"simulated, GiB": simulated / 2**30, "measured, GiB": measured / 2**30}
        yield {"work": case.work, **gib, "ratio": ratio}
        assert case.device == "cpu" or 0.85 < ratio < 1.15, f"{case.work}: {ratio:.2f}"


ROWS = (
    Row("card", 25, describe_card, is_timed=True),
    Row("t2i eager", 65, partial(draw, name="t2i", modes=["eager"]), is_timed=True),
    Row(
        "t2i captured",
        130,
        partial(draw, name="t2i", modes=["compiled", "captured"]),
        is_timed=True,
    ),
    Row("clip eager", 45, partial(draw, name="clip", modes=["eager"]), is_timed=True),
    Row(
        "clip captured",
        85,
        partial(draw, name="clip", modes=["compiled", "captured"]),
        is_timed=True,
    ),
    Row("tests", 110, run_tests),
    Row("dtypes", 60, draw_in_all_dtypes),
    Row("waits drawing", 60, watch_drawing),
    Row("waits training", 60, watch_training),
    Row("attention", 60, compare_attention),
    Row("training plain", 110, partial(train, engine="plain")),
    Row("training zero2", 110, partial(train, engine="zero2")),
    Row("training fsdp2", 110, partial(train, engine="fsdp2")),
    Row("memory", 110, compare_memory),
)
BASELINE_ROWS = (
    Row("t2i baseline", 65, partial(draw_baseline, name="t2i"), is_timed=True),
    Row("clip baseline", 45, partial(draw_baseline, name="clip"), is_timed=True),
)
