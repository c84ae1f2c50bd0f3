"""Kill a training run at random points, again and again, and compare it with one left alone.

    python scripts/dev/check_resume.py --output resume_check --kills 10 --launcher plain zero2_x2

For every launcher and precision one run goes straight through, and one is killed (SIGKILL, all its
processes) at random moments and started anew by the same command. Losses, gradient norms and the
files of the final weights and averages must agree to the last byte. The table is printed as
Markdown; the exit code is 1 if any byte differs. By default a tiny model and records that differ
example by example are made first; arguments behind `--` go to scripts/train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarking.processes import describe_end, kill
from diffnext.data.records import RecordWriter

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "nova_shapes_t2i.yaml"
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port={port}"]
LAUNCH_FILES = ROOT / "accelerate_configs"
LAUNCHERS = {
    "plain": [],
    "plain_x2": [*ACCELERATE, "--config_file", str(LAUNCH_FILES / "2_cpus_ddp.yaml")],
    "fsdp2_x2": [*ACCELERATE, "--config_file", str(LAUNCH_FILES / "2_cpus_fsdp2.yaml")],
    "zero2": [*ACCELERATE, "--config_file", str(LAUNCH_FILES / "1_gpus_zero2.yaml")],
}
LAUNCHERS["zero2_x2"] = [*LAUNCHERS["zero2"], "--num_processes=2"]
ON_CPU = tuple(LAUNCHERS)
LAUNCHERS["fsdp2"] = [
    *(*ACCELERATE, "--config_file", str(LAUNCH_FILES / "8_gpus_fsdp2.yaml"), "--num_processes=1")
]
ARCH = ["vit_d2w64", "vit_d4w64", "mlp_d2w64"]  # small enough for a hundred restarts
NUM_RECORDS = 37  # several passes, the last batch of each is shared with the next
FILES = ("checkpoints", "ema_checkpoints")


@dataclass(frozen=True)
class Outcome:
    """How a killed run compares with a straight one.

    Attributes:
        kills: Steps that were reported when it was killed.
        metric_bytes: Differing bytes in the reported losses and gradient norms.
        weight_bytes: Differing bytes in the final weights and averages.
    """

    kills: list[int]
    metric_bytes: int
    weight_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("resume_check"), help="folder to write")
    parser.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=ON_CPU)
    parser.add_argument("--precision", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    parser.add_argument("--steps", type=int, default=120, help="length of a run (120)")
    parser.add_argument("--kills", type=int, default=10, help="of one run (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("arguments", nargs="*", help="for scripts/train.py, behind --")
    args = parser.parse_args(argv)
    overrides = [*make_inputs(args.output), *args.arguments]
    differing = 0
    print("| run | precision | killed at steps | loss bytes differing | weight bytes differing |")
    print("|---|---|---|---|---|")
    for launcher in args.launcher:
        for precision in args.precision:
            options = [*overrides, f"training.mixed_precision={precision}"]
            folder = args.output / f"{launcher}-{precision}"
            shutil.rmtree(folder, ignore_errors=True)
            outcome = compare_runs(folder, launcher, options, args.steps, args.kills, args.seed)
            differing += outcome.metric_bytes + outcome.weight_bytes
            steps = ", ".join(map(str, outcome.kills))
            print(
                f"| {launcher} | {precision} | {steps} | {outcome.metric_bytes} | "
                f"{outcome.weight_bytes} |",
                flush=True,
            )
    sys.exit(1 if differing else 0)


def make_inputs(folder: Path, arch: Sequence[str] | None = ARCH) -> list[str]:
    """Write a tiny model and records; returns the arguments that name them.

    Args:
        folder: Is made; several processes may do so at once.
        arch: Of the transformer; the config's when None.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("model", partial(write_model, arch=arch)), ("records", write_records)):
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                write(Path(scratch) / name)
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(scratch) / name).rename(folder / name)
    return [
        f"config={CONFIG}",
        f"pipeline.paths.pretrained_path={folder / 'model'}",
        f"train_dataloader.params.dataset={folder / 'records'}",
        *([f"pipeline.paths.module_config.transformer.arch=[{','.join(arch)}]"] if arch else []),
        "wandb=null",
        "validation=null",
        "lr_scheduler.params.warmup_steps=10",
        "training.batch_size=4",
        "train_dataloader.params.num_workers=1",
        "experiment.log_every=1",
        "ema.params.update_every=5",
    ]


def write_model(folder: Path, arch: Sequence[str] | None) -> None:
    """A release folder, with a smaller transformer than that of the config if ``arch`` says so."""
    command = ["-m", "diffnext", "init", "--config", CONFIG, "--tiny"]
    command += ["--output", folder]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    if arch:
        shutil.rmtree(folder / "transformer")
        write_transformer(folder, arch)


def write_records(folder: Path) -> None:
    """Records whose latents, captions and short captions differ example by example."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    features = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
    with RecordWriter(str(folder), features) as writer:
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


def write_transformer(model: Path, arch: Sequence[str]) -> None:
    """Draw the weights of a transformer."""
    import torch
    from omegaconf import OmegaConf

    from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
    from diffnext.pipelines.release_folder import write_shim

    overlay = OmegaConf.load(CONFIG).pipeline.paths.module_config.transformer
    config = {**OmegaConf.to_container(overlay), "arch": list(arch)}
    torch.manual_seed(0)
    NOVATransformer3DModel(**config).save_pretrained(model / "transformer")
    write_shim(model / "transformer", "transformer", "NOVATransformer3DModel")


def compare_runs(
    folder: Path, launcher: str, options: Sequence[str], steps: int, kills: int, seed: int
) -> Outcome:
    """Make a straight and a killed run and compare them.

    Args:
        folder: Folder for both.
        launcher: How to start them, a key of ``LAUNCHERS``.
        options: Arguments of train.py, without output folder and length.
        steps: Length of the runs.
        kills: How often to kill.
        seed: Of the moments.

    Raises:
        RuntimeError: If a run fails by itself.
    """
    rng = random.Random(seed)
    options = [*options, f"training.max_train_steps={steps}"]
    every = max(1, steps // 20)
    options.append(f"experiment.save_every={every}")
    straight = folder / "straight"
    killed = folder / "killed"
    run_to_end(launcher, options, straight)
    reached = []
    for target in sorted(rng.sample(range(1, steps - 1), kills)):
        reached.append(run_and_kill(launcher, options, killed, target, rng.random() * 0.2))
    run_to_end(launcher, options, killed)
    return Outcome(reached, *count_differences(straight, killed, steps))


def command_line(launcher: str, options: Sequence[str], output: Path) -> list[str]:
    """The command of a run."""
    words = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    script = str(ROOT / "scripts" / "train.py")
    output = f"experiment.output_dir={output.resolve()}"
    return [sys.executable, *words, script, output, *options, "training.progress_bar=false"]


@contextlib.contextmanager
def started(launcher: str, options: Sequence[str], output: Path) -> Iterator[subprocess.Popen]:
    """A run that is killed at the end; its log goes to a file beside the output folder."""
    bin_folder = str(Path(sys.executable).parent)  # DeepSpeed looks for ninja
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    output.mkdir(parents=True, exist_ok=True)
    with (output.parent / f"{output.name}.log").open("a") as log:
        process = subprocess.Popen(
            command_line(launcher, options, output),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            yield process
        finally:
            kill(process)


def run_to_end(launcher: str, options: Sequence[str], output: Path) -> None:
    """Start a run and wait for its end.

    Raises:
        RuntimeError: If it fails.
    """
    log = output.with_name(f"{output.name}.log")
    with started(launcher, options, output) as process:
        error = describe_end(process.wait(), log)
    if error:
        raise RuntimeError(f"the run failed, see {log}: {error}")


def run_and_kill(
    launcher: str, options: Sequence[str], output: Path, target: int, delay: float
) -> int:
    """Start a run and kill it some time after it has reported a step.

    Returns:
        The last step reported.

    Raises:
        RuntimeError: If it ends by itself.
    """
    with started(launcher, options, output) as process:
        begin = time.time()
        metrics = output / "metrics.jsonl"
        # A run first drops the lines of steps that it will do again.
        while not metrics.exists() or metrics.stat().st_mtime < begin or last_step(output) < target:
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before step {target}, see {output}.log")
            time.sleep(0.005)
        time.sleep(delay)
    return last_step(output)


def last_step(output: Path) -> int:
    """The last step in the metrics file; -1 if there is none."""
    rows = read_metrics(output)
    return rows[-1][0] if rows else -1


def read_metrics(output: Path) -> list[tuple]:
    """Step, learning rate, loss and gradient norm of every reported step."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line may be half there
            values = json.loads(line)
            losses = tuple(values[name] for name in sorted(values) if "loss" in name)
            rows.append((values["step"], values["lr"], values["grad_norm"], *losses))
    return rows


def count_differences(first: Path, second: Path, steps: int) -> tuple[int, int]:
    """Differing bytes of two runs: in what they reported, and in their final weights."""
    metrics = [np.array(read_metrics(output)).tobytes() for output in (first, second)]
    weights = 0
    for tree in FILES:
        name = f"{tree}/checkpoint-{steps}/transformer/diffusion_pytorch_model.safetensors"
        weights += differing_bytes((first / name).read_bytes(), (second / name).read_bytes())
    return differing_bytes(*metrics), weights


def differing_bytes(first: bytes, second: bytes) -> int:
    """Places at which two byte strings differ, missing bytes included."""
    shared = min(len(first), len(second))
    a, b = (np.frombuffer(data[:shared], dtype=np.uint8) for data in (first, second))
    return int((a != b).sum()) + abs(len(first) - len(second))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    main()
