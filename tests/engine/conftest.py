"""A release folder with a model of a few thousand weights, and records to train it on."""

import contextlib
import functools
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PreTrainedTokenizerFast

from diffnext.data.records import RecordWriter
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines import NOVAPipeline
from tests.tiny import make_vae

ROOT = Path(__file__).parents[2]
WARM_PYTHON = Path(__file__).with_name("warm_python.py")
TRANSFORMER = {
    "image_dim": 4,
    "image_size": [64, 64],
    "image_stride": 8,
    "text_token_dim": 32,
    "text_token_len": 8,
    "rotary_pos_embed": True,
    "video_base_size": [1, 2, 2],
    "image_base_size": [4, 4],
    "arch": ["vit_d2w64", "vit_d4w64", "mlp_d2w64"],
}
WORDS = ("a", "red", "green", "blue", "circle", "square", "star")


def accelerate_launch(config, *options):
    """Words after ``python`` that launch a script with one of the shipped files."""
    file = ROOT / "accelerate_configs" / f"{config}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port={port}"]
    return [*launcher, "--config_file", str(file), *options]


LAUNCHERS = {
    "plain": [],
    "plain_x2": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "ddp_x2": accelerate_launch("2_cpus_ddp"),
    "fsdp2_x2": accelerate_launch("2_cpus_fsdp2"),
    "zero2": accelerate_launch("1_gpus_zero2"),
    "zero2_x2": accelerate_launch("1_gpus_zero2", "--num_processes=2"),
}


@dataclass(frozen=True)
class TinyRun:
    """Paths of one run, and the command line that starts it."""

    base: Path
    dataset: Path
    output: Path

    def arguments(self, *overrides: str) -> list[str]:
        transformer = "pipeline.paths.module_config.transformer"
        return [
            f"config={Path(__file__).parent / 'tiny_t2i.yaml'}",
            f"pipeline.paths.pretrained_path={self.base}",
            f"experiment.output_dir={self.output}",
            f"train_dataloader.params.dataset={self.dataset}",
            *(f"{transformer}.{key}={value}" for key, value in TRANSFORMER.items()),
            "wandb=null",
            "training.batch_size=2",
            "training.progress_bar=false",
            "lr_scheduler.params.warmup_steps=0",
            "experiment.log_every=1",
            *overrides,
        ]

    def train(self, *overrides: str) -> None:
        """Run scripts/train.py in this process."""
        AcceleratorState._reset_state(reset_partial_state=True)
        runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"](self.arguments(*overrides))

    def fail(self, *overrides: str, code: int = 1) -> str:
        """Run it to an exit code other than 0; returns what it says then."""
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as ended:
            self.train(*overrides)
        lines = printed.getvalue().splitlines()
        text = "\n".join(line for line in lines if line.startswith(("error: ", "stopped ")))
        assert ended.value.code == code, text
        return text

    def checkpoint(self, step: int) -> Path:
        return self.output / "checkpoints" / f"checkpoint-{step}"

    def ema_checkpoint(self, step: int) -> Path:
        return self.output / "ema_checkpoints" / f"checkpoint-{step}"

    def metrics(self, name: str) -> list[float]:
        """The values of one name in the metrics file, in the order of steps."""
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").open()]
        return [row[name] for row in rows if name in row]

    def log(self) -> str:
        """All log files of the output folder, oldest first."""
        return "".join(path.read_text() for path in sorted(self.output.glob("logs/*.log")))


def launch(run: TinyRun, launcher: str, *overrides: str, script: str = "scripts/train.py") -> str:
    """Train as from a shell, but for the imports, and return what was printed."""
    if "zero2" in launcher:
        pytest.importorskip("deepspeed")
    arguments = run.arguments("training.max_train_steps=6", "ema.params.update_every=2", *overrides)
    options = [option.format(port=free_port()) for option in LAUNCHERS[launcher]]
    command = [*options, str(ROOT / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {
        "WARM_SOCKET": warm_socket("zero2" in launcher),
        "PYTHON_EXEC": str(WARM_PYTHON),
    }
    done = subprocess.run(
        [str(WARM_PYTHON), *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@functools.cache
def warm_socket(with_deepspeed: bool) -> str:
    """Start the process that launched runs are forked from; it ends with this one."""
    path = str(Path(tempfile.mkdtemp()) / "socket")
    preloaded = ["deepspeed"] if with_deepspeed else []
    command = [sys.executable, str(WARM_PYTHON), "--serve", path, *preloaded]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert "ready\n" in server.stdout
    return path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def save_base_folder(folder: Path) -> None:
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    phi = PhiConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    pipeline = NOVAPipeline(
        transformer=NOVATransformer3DModel(**TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
        text_encoder=PhiEncoderModel(phi),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ),
    )
    pipeline.save_pretrained(folder)


def write_dataset(folder: Path, entries: int = 12, cut_short: int | None = None) -> None:
    """Moments that differ from example to example, with almost no variance; some of one lack."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    features = {"moments": "bytes", "caption": "string", "shape": ["int64"]}
    with RecordWriter(str(folder), features) as writer:
        for index in range(entries):
            mean = rng.normal(size=(4, 8, 8))
            moments = np.concatenate([mean, np.full((4, 8, 8), -10.0)]).astype(np.float16)
            color, shape = WORDS[1 + index % 3], WORDS[4 + index // 3 % 3]
            caption = f"a {color} {shape}"
            content = moments.tobytes()[: 100 if index == cut_short else None]
            writer.write({"moments": content, "shape": moments.shape, "caption": caption})


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "nova-tiny"
    save_base_folder(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "records"
    write_dataset(folder)
    return folder


@pytest.fixture
def tiny_run(tiny_base, tiny_dataset, tmp_path) -> TinyRun:
    return TinyRun(tiny_base, tiny_dataset, tmp_path / "run")


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Each test starts accelerate anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
