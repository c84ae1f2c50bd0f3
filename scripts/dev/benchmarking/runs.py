"""Training runs of a tiny model, as a user starts them: launch, end, and what they report."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from benchmarking.processes import describe_end, kill
from diffnext.data.records import RecordWriter

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "configs" / "nova_shapes_t2i.yaml"


def accelerate(launch_file: str, *options: str) -> list[str]:
    """Words after ``python`` that launch a script, on a free port."""
    file = ROOT / "accelerate_configs" / f"{launch_file}.yaml"
    words = ["-m", "accelerate.commands.launch", "--main_process_port=0", "--config_file"]
    return [*words, str(file), *options]


LAUNCHERS = {
    "plain": [],
    "plain_x2": accelerate("2_cpus_ddp"),
    "fsdp2_x2": accelerate("2_cpus_fsdp2"),
    "zero2": accelerate("1_gpus_zero2"),
    "zero2_x2": accelerate("1_gpus_zero2", "--num_processes=2"),
    "fsdp2": accelerate("8_gpus_fsdp2", "--num_processes=1"),
}
ON_CPU = [name for name in LAUNCHERS if name != "fsdp2"]
SMALL = ("vit_d2w64", "vit_d4w64", "mlp_d2w64")  # small enough for a hundred restarts
NUM_RECORDS = 37  # so that the last batch of each pass takes examples of the next
FEATURES = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
TREES = ("checkpoints", "ema_checkpoints")
OVERRIDES = (
    "wandb=null",
    "validation=null",
    "lr_scheduler.params.warmup_steps=10",
    "training.batch_size=4",
    "training.progress_bar=false",
    "train_dataloader.params.num_workers=1",
    "experiment.log_every=1",
    "ema.params.update_every=5",
)


def make_inputs(folder: Path, arch: Sequence[str] | None = SMALL) -> list[str]:
    """Write a config, an untrained model and records; returns the arguments of a training.

    Args:
        folder: Gets a folder "inputs"; several processes may make it at once.
        arch: Of the transformer; default: the one of the config.
    """
    inputs = folder.resolve() / "inputs"
    if not inputs.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / "inputs"
            write_model(fresh, arch)
            write_records(fresh / "records")
            with contextlib.suppress(OSError):  # another process was faster
                fresh.rename(inputs)
    return [
        f"config={inputs / 'config.yaml'}",
        f"pipeline.paths.pretrained_path={inputs / 'model'}",
        f"train_dataloader.params.dataset={inputs / 'records'}",
        *OVERRIDES,
    ]


def write_model(folder: Path, arch: Sequence[str] | None) -> None:
    """Write a config and a release folder of its model."""
    folder.mkdir()
    config = OmegaConf.load(CONFIG)
    if arch is not None:
        config.pipeline.paths.module_config.transformer.arch = list(arch)
    OmegaConf.save(config, folder / "config.yaml")
    options = ["--config", f"{folder}/config.yaml", "--output", f"{folder}/model", "--tiny"]
    command = [sys.executable, "-m", "diffnext", "init", *options]
    subprocess.run(command, check=True, capture_output=True)


def write_records(folder: Path) -> None:
    """Records whose latents, captions and short captions differ example by example."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with RecordWriter(folder, FEATURES) as writer:
        for index in range(NUM_RECORDS):
            moments = rng.normal(size=(8, 8, 8)).astype(np.float16)
            writer.write(
                {
                    "moments": moments.tobytes(),
                    "shape": moments.shape,
                    "caption": f"a picture with the number {index}. It has a long caption.",
                    "text": f"number {index}",
                }
            )


@contextlib.contextmanager
def started(launcher: str, options: Sequence[str], output: Path) -> Iterator[subprocess.Popen]:
    """A run that is killed at the end; its log goes to a file beside the output folder."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    script = str(ROOT / "scripts" / "train.py")
    place = f"experiment.output_dir={output.resolve()}"
    command = [sys.executable, *LAUNCHERS[launcher], script, place, *options]
    output.mkdir(parents=True, exist_ok=True)
    with log_of(output).open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield process
        finally:
            kill(process)


def log_of(output: Path) -> Path:
    """Where the messages of a run go."""
    return output.with_name(f"{output.name}.log")


def run_to_end(launcher: str, options: Sequence[str], output: Path) -> None:
    """Start a run and wait for its end.

    Raises:
        RuntimeError: If it fails.
    """
    with started(launcher, options, output) as process:
        error = describe_end(process.wait(), log_of(output))
    if error:
        raise RuntimeError(f"the run failed, see {log_of(output)}: {error}")


def last_step(output: Path) -> int:
    """The last step in the metrics file; -1 if there is none."""
    rows = read_metrics(output)
    return rows[-1][0] if rows else -1


def read_metrics(output: Path) -> list[tuple]:
    """Step, learning rate, gradient norm and losses of every reported step."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            values = json.loads(line)
            losses = tuple(values[name] for name in sorted(values) if "loss" in name)
            rows.append((values["step"], values["lr"], values["grad_norm"], *losses))
    return rows


def count_differences(first: Path, second: Path, steps: int) -> tuple[int, int]:
    """Differing bytes of two runs: in what they reported, and in their final weights."""
    metrics = [np.array(read_metrics(output)).tobytes() for output in (first, second)]
    weights = 0
    for tree in TREES:
        name = f"{tree}/checkpoint-{steps}/transformer/diffusion_pytorch_model.safetensors"
        weights += differing_bytes((first / name).read_bytes(), (second / name).read_bytes())
    return differing_bytes(*metrics), weights


def differing_bytes(first: bytes, second: bytes) -> int:
    """Places at which two byte strings differ, missing bytes included."""
    shared = min(len(first), len(second))
    a, b = (np.frombuffer(data[:shared], dtype=np.uint8) for data in (first, second))
    return int((a != b).sum()) + abs(len(first) - len(second))
