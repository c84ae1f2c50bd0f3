"""Wrong command lines and files: each is refused in one line that names the key.

Wrong folders are in tests/engine/test_run_inputs.py.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.engine.conftest import TinyRun, write_dataset

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
T2I = ROOT / "tests" / "engine" / "tiny_t2i.yaml"
MODEL = "pipeline.paths.module_config.transformer"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def run(base_template, tmp_path_factory):
    """A run with nothing wrong in its folders."""
    folder = tmp_path_factory.mktemp("sound")
    write_dataset(folder / "records")
    return TinyRun(base_template, folder / "records", folder / "run")


@pytest.fixture
def refuse(main, capsys, run):
    """Run a command and return the only line of the expected clean exit."""

    def refuse(arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        assert not run.output.exists()
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
        return line.removeprefix("error: ")

    return refuse


# What is written, and what the message must hold.
ARGUMENTS = [
    # keys that nothing reads
    ("wandb={run_idd: 1}", "'wandb.run_idd' on the command line: did you mean 'wandb.run_id'?"),
    ("experiment.ouput_dir=/tmp/x", "experiment.output_dir"),
    ("model.gradient_checkpoint=3", "model.gradient_checkpointing"),
    ("model.lora.rnk=8", "model.lora.rank"),
    ("pipeline.paths.pretrained=/tmp/x", "pipeline.paths.pretrained_path"),
    (f"{MODEL}.image_sise=[64,64]", f"{MODEL}.image_size"),
    ("optimizer.params.learning_rate=1", "optimizer.params.learning_rate"),
    ("lr_scheduler.params.warmup=10", "lr_scheduler.params.warmup_steps"),
    ("train_dataloader.params.datset=/tmp/x", "train_dataloader.params.dataset"),
    ("trainng.seed=6", "training.seed"),
    ("~training.sed", "did you mean 'training.seed'?"),
    ("~traning", "did you mean 'training'?"),
    # values of another type
    ("training.batch_size=two", "training.batch_size must be a whole number, got 'two'"),
    ("training.batch_size=true", "training.batch_size must be a whole number, got true"),
    ("training.batch_size=[1,2]", "training.batch_size must be a whole number, got [1, 2]"),
    ("training.max_train_steps=1e3", "must be a whole number, got 1000.0"),
    ("training.max_train_steps=", "training.max_train_steps must be a whole number, got null"),
    ("training.max_grad_norm='1e-4'", "training.max_grad_norm must be a number"),
    ("optimizer.params.lr='1e-4'", "optimizer.params.lr must be a number"),
    ("optimizer.params.betas=0.9", "optimizer.params.betas must be"),
    ("lr_scheduler.params.warmup_steps=0.5", "warmup_steps must be a whole number"),
    ("experiment.output_dir=5", "experiment.output_dir must be a text, got 5"),
    ("experiment.log_every=", "experiment.log_every must be a whole number, got null"),
    ("training.on_nonfinite=ignore", "training.on_nonfinite must be 'stop' or 'skip'"),
    ("validation.seeds=[0,x]", "validation.seeds"),
    ("validation.seeds=0", "validation.seeds must be a list"),
    (f"{MODEL}.image_size=64x64", f"{MODEL}.image_size must be a list"),
    ("training=5", "training must hold key: value pairs, got 5"),
    ("optimizer.params=[1]", "cannot apply 'optimizer.params=[1]' to the file"),
    ("optimizer.params=1", "optimizer.params must hold key: value pairs, got 1"),
    ("tracking=wandb", "tracking must be a list"),
    # values out of range
    ("experiment.save_every=0", "experiment.save_every must be "),
    ("checkpoint.keep_last=0", "checkpoint.keep_last must be "),
    ("checkpoint.format=zip", "checkpoint.format must be 'safetensors' or 'bin'"),
    ("validation.prompts=[]", "validation.prompts must not be empty"),
    ("validation.holdout=0.7", "validation.holdout must be "),
    ("training.time_limit=soon", "training.time_limit: a duration is written like"),
    ("training.max_grad_norm=0", "training.max_grad_norm must be greater than 0"),
    ("training.seed=-1", "training.seed must be "),
    ("training.mixed_precision=fp8", "training.mixed_precision must be 'no', 'fp16' or 'bf16'"),
    ("model.gradient_checkpointing=4", "model.gradient_checkpointing must be "),
    ("model.mask_ratios=[0.9,0.5,0.25]", "model.mask_ratios must be least share, largest share"),
    ("model.loss_weights={t2i: 0, i2v: 0}", "model.loss_weights must not all be 0"),
    ("model.lora={dropout: 1}", "model.lora.dropout must be less than 1"),
    ("ema.params.decay=1.5", "ema.params.decay must be less than or equal to 1"),
    ("tracking=[mlflow]", "tracking must be 'wandb' or 'tensorboard'"),
    ("train_dataloader.params.num_workers=-1", "train_dataloader.params.num_workers must be "),
    # targets
    ("lr_scheduler.target=diffnext.engine.lr_scheduler.LinearLR", "lr_scheduler.target: cannot"),
    ("optimizer.target=torch.optim.SGD", "'optimizer.params.betas' in"),
    ("train_dataloader.target=nosuch.Loader", "train_dataloader.target: cannot import"),
    ("pipeline.target=Pipeline", "pipeline.target: cannot import target 'Pipeline'"),
    # expressions
    ("training.seed=${training.sed}", "Interpolation key 'training.sed' not found"),
    ("training.seed=${training.seed}", "Recursive interpolation"),
    ("training.seed=${nosuch:1}", "Unsupported interpolation type nosuch"),
    ("training.seed=${training.batch_size", "training.seed=${training.batch_size"),
    ("training.seed=${eval:\"__import__('os').system('touch hostile')\"}", "cannot evaluate"),
    ("training.seed=${eval:'9**9**9**9'}", "cannot evaluate '9**9**9**9'"),
    # syntax
    ("--training.seed=3", "without dashes, got '--training.seed=3'"),
    ("-h=1", "without dashes"),
    ("=3", "arguments are written key=value, got '=3'"),
    ("~training.seed=3", "~key deletes a key"),
    ("~config", "~key deletes a key other than config"),
    ("training.seed=[1", "training.seed=[1"),
    ("config=/nowhere.yaml", "config=/nowhere.yaml: no such file"),
    (f"config={ROOT}", f"config={ROOT}: no such file"),
]


@pytest.mark.parametrize("argument, message", ARGUMENTS)
def test_wrong_argument_is_named_in_one_line(refuse, run, tmp_path, argument, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refuse(run.arguments(argument))
    assert not Path("hostile").exists()


# The content of the file, or a change of the shipped one; and what the message must hold.
FILES = {
    "tab": ("training:\n\tseed: 1\n", "line 2, column 1: found character"),
    "bracket": ("training: {seed: [1}\n", "line 1"),
    "duplicate": ("training: {seed: 1}\ntraining: {seed: 2}\n", "found duplicate key training"),
    "list": ("- 1\n- 2\n", "must hold key: value pairs at its top level"),
    "latin-1": ("experiment: {name: caf\xe9}\n".encode("latin-1"), "can't decode byte 0xe9"),
    "zero byte": (b"training: {seed: 1\x00}\n", "is not a readable YAML file"),
    "unknown key": (
        lambda c: c["training"].update(max_step=5),
        "unknown key 'training.max_step' in {file}: did you mean 'training.max_train_steps'? "
        "(write +training.max_step=... to keep it, ~training.max_step to drop it)",
    ),
    "unknown section": (lambda c: c.update(modle={"name": "x"}), "did you mean 'model.name'?"),
    "unknown argument": (
        lambda c: c["optimizer"]["params"].update(epsilon=1),
        "'optimizer.params.epsilon' in {file}, which torch.optim.AdamW does not take: "
        "did you mean 'optimizer.params.eps'?",
    ),
    "wrong type": (
        lambda c: c["training"].update(seed="many"),
        "training.seed must be a whole number, got 'many', in {file}",
    ),
    "wrong type behind an interpolation": (
        lambda c: c["train_dataloader"]["params"].update(num_workers="${experiment.name}"),
        "num_workers must be a whole number, got 'nova_shapes_t2i', in {file}",
    ),
    "list in place of a section": (
        lambda c: c.update(checkpoint=["bin"]),
        "checkpoint must hold key: value pairs, got ['bin']",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_file_is_named_in_one_line(refuse, run, tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "wrong.yaml"
    if callable(content):
        shipped = yaml.safe_load(T2I.read_text())
        content(shipped)
        content = yaml.safe_dump(shipped)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [f"config={path}", *run.arguments("training.batch_size=4")[1:]]
    assert message.format(file=path) in refuse(arguments)


def test_shell_sees_a_line_for_each_error_and_a_failure(run):
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            *run.arguments("experiment.log_every=0", f"{MODEL}.image_size=[128,64]"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "experiment.log_every" in errors[0] and "means 16x8" in errors[1]
    assert done.stderr.splitlines()[-2:] == errors
