"""Wrong command lines, files and folders: each is refused in one line that names the key."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffnext.data.records import RecordWriter
from diffnext.utils.weights_files import hash_weights

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
T2I = ROOT / "tests" / "engine" / "tiny_t2i.yaml"
TRANSFORMER = "pipeline.paths.module_config.transformer"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def refuse(main, arguments):
    """Run and return the only line of the expected clean exit."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    message = stopped.value.code
    assert isinstance(message, str) and message.startswith("error: ")
    assert "\n" not in message
    return message


def write_config(path, change):
    """Save the shipped file after ``change`` was applied to its content."""
    content = yaml.safe_load(T2I.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return f"config={path}"


def write_records(folder, count=3, features=None, **values):
    """Records of 4 channels and 8x8 latents with a text, unless ``values`` say otherwise."""
    shutil.rmtree(folder)
    folder.mkdir()
    values = {"shape": (8, 8, 8), "caption": "a red star", **values}
    moments = np.zeros(values["shape"], np.float16).tobytes()
    example = {name: value for name, value in values.items() if value is not None}
    types = {"moments": "bytes", "shape": ["int64"], "caption": "string", "label": "int64"}
    types = {**types, **(features or {})}
    features = {name: types[name] for name in ("moments", *example)}
    with RecordWriter(folder, features) as writer:
        for _ in range(count):
            writer.write({**example, "moments": moments})


def write_states(folder, length, width):
    states = {"data": np.zeros((length, width), np.float16).tobytes(), "shape": (length, width)}
    features = {"caption": {"data": "bytes", "shape": ["int64"]}}
    write_records(folder, features=features, caption=states)


# Keys that nothing reads: what is written, and what the message must hold.
UNKNOWN = [
    ("wandb={run_idd: 1}", "'wandb.run_idd' on the command line: did you mean 'wandb.run_id'?"),
    ("experiment.ouput_dir=/tmp/x", "experiment.output_dir"),
    ("model.gradient_checkpoint=3", "model.gradient_checkpointing"),
    ("model.lora.rnk=8", "model.lora.rank"),
    ("pipeline.paths.pretrained=/tmp/x", "pipeline.paths.pretrained_path"),
    (f"{TRANSFORMER}.image_sise=[64,64]", f"{TRANSFORMER}.image_size"),
    ("optimizer.params.learning_rate=1", "optimizer.params.learning_rate"),
    ("lr_scheduler.params.warmup=10", "lr_scheduler.params.warmup_steps"),
    ("train_dataloader.params.datset=/tmp/x", "train_dataloader.params.dataset"),
    ("ema.params.deccay=0.9", "ema.params.decay"),
    ("checkpoint.keep_lst=2", "checkpoint.keep_last"),
    ("validation.evry=5", "validation.every"),
    ("training.max_train_step=6", "training.max_train_steps"),
    ("trainng.seed=6", "training.seed"),
    ("~training.sed", "did you mean 'training.seed'?"),
    ("~traning", "did you mean 'training'?"),
]
TYPES = [
    ("training.batch_size=two", "training.batch_size must be int, got 'two'"),
    ("training.batch_size=true", "training.batch_size must be int, got true"),
    ("training.batch_size=[1,2]", "training.batch_size must be int, got [1, 2]"),
    ("training.max_train_steps=1e3", "must be int, got 1000.0 (write 1000)"),
    ("training.max_grad_norm='1e-4'", "training.max_grad_norm must be float | None, got '1e-4'"),
    ("optimizer.params.lr='1e-4'", "optimizer.params.lr must be float"),
    ("optimizer.params.betas=0.9", "optimizer.params.betas must be"),
    ("lr_scheduler.params.warmup_steps=0.5", "lr_scheduler.params.warmup_steps must be int"),
    ("experiment.output_dir=5", "experiment.output_dir must be str, got 5"),
    ("experiment.log_every=", "experiment.log_every must be int, got null"),
    ("training.on_nonfinite=ignore", "training.on_nonfinite must be stop or skip, got 'ignore'"),
    ("ema.params.device=tpu", "ema.params.device must be cpu or gpu, got 'tpu'"),
    ("validation.seeds=[0,x]", "validation.seeds must be list[int], got [0, 'x']"),
    ("validation.seeds=0", "validation.seeds must be list[int], got 0 (a list is written [0])"),
    (f"{TRANSFORMER}.image_size=64x64", f"{TRANSFORMER}.image_size must be list[int] | int"),
    ("training=5", "training must hold key: value pairs, got 5"),
    ("optimizer.params=[1]", "cannot apply 'optimizer.params=[1]' to the file"),
    ("optimizer.params=1", "optimizer.params must hold key: value pairs, got 1"),
    ("tracking=wandb", "tracking must be list[str] | None, got 'wandb'"),
]
VALUES = [
    ("experiment.save_every=0", "experiment.save_every must be a whole number of at least 1"),
    ("checkpoint.keep_every=0", "checkpoint.keep_every must be a whole number of at least 1"),
    ("validation.every=0", "validation.every must be a whole number of at least 1"),
    ("validation.prompts=[]", "validation.prompts must be a list with something in it"),
    ("validation.prompts=[1,2]", "validation.prompts has the class 1"),
    ("validation.holdout=0.7", "validation.holdout must be above 0 and at most 0.5, got 0.7"),
    ("validation.holdout=0.01", "validation.holdout=0.01 keeps none of the 12 examples"),
    ("validation.holdout=/nowhere", "validation.holdout=/nowhere is neither"),
    ("training.time_limit=soon", "training.time_limit: a duration is written like"),
    ("training.max_train_steps=0", "training.max_train_steps must be a whole number"),
    ("training.max_grad_norm=0", "training.max_grad_norm must be a number above 0, got 0"),
    ("training.seed=-1", "training.seed must be at least 0"),
    ("training.mixed_precision=fp8", "training.mixed_precision must be no, fp16 or bf16"),
    ("model.gradient_checkpointing=4", "model.gradient_checkpointing must be 0, 1, 2 or 3"),
    ("model.loss_repeat=0", "model.loss_repeat must be a whole number of at least 1"),
    ("model.mask_ratios=[0.9,0.5,0.25]", "model.mask_ratios must be least share, largest share"),
    ("model.loss_weights.t2i=-1", "model.loss_weights.t2i must be a number of at least 0"),
    ("model.lora.rank=0", "model.lora.rank must be a whole number of at least 1"),
    ("model.lora={alpha: 0}", "model.lora.alpha must be a number above 0"),
    ("model.lora={dropout: 1}", "model.lora.dropout must be at least 0 and below 1"),
    ("ema.params.decay=1.5", "ema.params.decay must be between 0 and 1, got 1.5"),
    ("optimizer.params.lr=-1", "optimizer.params.lr must be a finite number of at least 0"),
    ("optimizer.params.lr=.nan", "optimizer.params.lr must be a finite number of at least 0"),
    ("optimizer.params.betas=[2,3]", "optimizer.params of torch.optim.AdamW: Invalid beta"),
    ("tracking=[mlflow]", "tracking must name wandb or tensorboard, got 'mlflow'"),
    ("train_dataloader.params.num_workers=-1", "num_workers must be at least 0, got -1"),
    ("train_dataloader.params.start_method=clone", "start_method must be one of"),
    ("experiment.resume_from_checkpoint=/nowhere-3", "experiment.resume_from_checkpoint"),
]
TARGETS = [
    ("lr_scheduler.target=diffnext.engine.lr_scheduler.LinearLR", "lr_scheduler.target: cannot"),
    ("lr_scheduler.target=fractions.Fraction", "lr_max' in"),
    ("optimizer.target=torch.optim.SGD", "'optimizer.params.betas' in"),
    ("optimizer.target=torch.optim.AdamWW", "optimizer.target: cannot import"),
    ("train_dataloader.target=nosuch.Loader", "train_dataloader.target: cannot import"),
    ("pipeline.target=Pipeline", "pipeline.target: cannot import target 'Pipeline'"),
    ("pipeline.target=diffnext.pipelines.NOVAPipeline", "is no training pipeline"),
]
EXPRESSIONS = [
    ("training.seed=${training.sed}", "training.seed: Interpolation key 'training.sed' not found"),
    ("training.seed=${training.seed}", "training.seed: Recursive interpolation"),
    ("training.seed=${nosuch:1}", "training.seed: Unsupported interpolation type nosuch"),
    ("training.seed=${training.batch_size", "training.seed=${training.batch_size"),
    (
        "training.seed=${eval:\"__import__('os').system('touch hostile')\"}",
        "training.seed: cannot evaluate",
    ),
    ("training.seed=${eval:'9**9**9**9'}", "training.seed: cannot evaluate '9**9**9**9'"),
]
SYNTAX = [
    ("--training.seed=3", "without dashes, got '--training.seed=3'"),
    ("-h=1", "without dashes"),
    ("=3", "arguments are written key=value, got '=3'"),
    ("~training.seed=3", "~key deletes a key"),
    ("~config", "~key deletes a key other than config"),
    ("training.seed=[1", "training.seed=[1"),
    ("config=/nowhere.yaml", "config=/nowhere.yaml: no such file"),
    (f"config={ROOT}", f"config={ROOT}: no such file"),
]


@pytest.mark.parametrize(
    "argument, message", [*UNKNOWN, *TYPES, *VALUES, *TARGETS, *EXPRESSIONS, *SYNTAX]
)
def test_wrong_argument_is_named_in_one_line(main, scratch_run, argument, message, monkeypatch):
    monkeypatch.chdir(scratch_run.base.parent)
    assert message in refuse(main, scratch_run.arguments(argument))
    assert not Path("hostile").exists()


FILES = {
    "tab": ("training:\n\tseed: 1\n", "line 2, column 1: found character"),
    "bracket": ("training: {seed: [1}\n", "line 1"),
    "duplicate": ("training: {seed: 1}\ntraining: {seed: 2}\n", "found duplicate key training"),
    "list": ("- 1\n- 2\n", "must hold key: value pairs at its top level"),
    "text": ("hello\n", "unknown key 'hello' in"),
    "latin-1": ("experiment: {name: caf\xe9}\n".encode("latin-1"), "can't decode byte 0xe9"),
    "zero byte": (b"training: {seed: 1\x00}\n", "is not a readable YAML file"),
    "empty": ("", "is required"),
}


@pytest.mark.parametrize("name", FILES)
def test_unreadable_file_is_named_in_one_line(main, scratch_run, tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [f"config={path}", f"experiment.output_dir={tmp_path / 'run'}"]
    error = refuse(main, arguments)
    assert message in error
    assert str(path) in error or name == "empty"


CONTENTS = {
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
        "training.seed must be int, got 'many', in {file}",
    ),
    "wrong type behind an interpolation": (
        lambda c: c["train_dataloader"]["params"].update(num_workers="${experiment.name}"),
        "train_dataloader.params.num_workers must be int, got 'nova_shapes_t2i', in {file}",
    ),
    "list in place of a section": (
        lambda c: c.update(checkpoint=["bin"]),
        "checkpoint must hold key: value pairs, got ['bin']",
    ),
    "cycle": (
        lambda c: c["training"].update(max_train_steps="${lr_scheduler.params.max_steps}"),
        "Recursive interpolation",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_wrong_content_of_a_file_is_named_in_one_line(main, scratch_run, tmp_path, name):
    change, message = CONTENTS[name]
    config = write_config(tmp_path / "wrong.yaml", change)
    error = refuse(main, [config, *scratch_run.arguments("training.batch_size=4")[1:]])
    assert message.format(file=tmp_path / "wrong.yaml") in error


def damage_json(path):
    def damage(run):
        (run.base / path).write_text("{")

    return damage


def delete(path):
    def damage(run):
        target = run.base / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


FOLDERS = {
    "no base": (lambda run: shutil.rmtree(run.base), "pipeline.paths.pretrained_path"),
    "damaged index": (damage_json("model_index.json"), "model_index.json is damaged"),
    "damaged config": (damage_json("transformer/config.json"), "config.json is damaged"),
    "no autoencoder": (delete("vae"), "pipeline.paths.module_dict.vae: there is no folder"),
    "no weights": (
        delete("transformer/diffusion_pytorch_model.safetensors"),
        "there are no weights in",
    ),
    "no data file": (
        lambda run: (run.dataset / "00000.data").unlink(),
        "train_dataloader.params.dataset",
    ),
    "corrupt record": (
        lambda run: (run.dataset / "00000.data").write_bytes(
            bytes((run.dataset / "00000.data").stat().st_size)
        ),
        "example 0",
    ),
    "fewer channels": (
        lambda run: write_records(run.dataset, shape=(6, 8, 8)),
        f"{TRANSFORMER}.image_dim is 4, which needs moments of 8 channels",
    ),
    "other size": (
        lambda run: write_records(run.dataset, shape=(8, 8, 16)),
        f"{TRANSFORMER}.image_size [64, 64] at image_stride 8 means latents of 8x8",
    ),
    "videos for images": (
        lambda run: write_records(run.dataset, shape=(8, 3, 8, 8)),
        "NOVATrainT2IPipeline trains on images, but example 0",
    ),
    "classes for texts": (
        lambda run: write_records(run.dataset, label=3),
        f"{TRANSFORMER}.text_token_dim is 32, so the model reads texts",
    ),
    "no caption": (
        lambda run: write_records(run.dataset, caption=None),
        "an example needs a 'caption' or a 'label'",
    ),
    "wide text states": (
        lambda run: write_states(run.dataset, 8, 64),
        f"{TRANSFORMER}.text_token_dim and text_token_len are 32 and 8",
    ),
    "long text states": (
        lambda run: write_states(run.dataset, 9, 32),
        "cached text states of shape (L, D) = (9, 32)",
    ),
    "another autoencoder": (
        lambda run: (run.dataset / "manifest.json").write_text(json.dumps({"vae_hash": "0"})),
        "was made with another VAE",
    ),
    "a folder of datasets": (
        lambda run: (
            shutil.copytree(run.dataset, run.dataset / "64x64")
            and (run.dataset / "METADATA").unlink()
        ),
        "has no METADATA file; the datasets in it are 64x64)",
    ),
    "another size": (
        lambda run: (run.dataset / "manifest.json").write_text(json.dumps({"size": [128, 64]})),
        "was made for 128x64 pixels",
    ),
    "another dtype": (
        lambda run: (run.dataset / "manifest.json").write_text('{"dtype": "float32"}'),
        "has moments of float32",
    ),
    "the manifest of other records": (
        lambda run: (run.dataset / "manifest.json").write_text('{"shape": [8, 16, 16]}'),
        "it belongs to other records",
    ),
    "a manifest from before a merge": (
        lambda run: (run.dataset / "manifest.json").write_text('{"counts": {"examples": 1}}'),
        "counts 1 examples",
    ),
    "another text encoder": (
        lambda run: (run.dataset / "manifest.json").write_text('{"text_encoder": {"hash": "0"}}'),
        "was made with another text encoder",
    ),
    "a damaged manifest": (
        lambda run: (run.dataset / "manifest.json").write_text("{"),
        "manifest.json is damaged",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_wrong_folder_is_named_in_one_line(main, scratch_run, name):
    damage, message = FOLDERS[name]
    damage(scratch_run)
    error = refuse(main, scratch_run.arguments())
    assert message in error
    assert not scratch_run.output.exists()


MISFITS = [
    (f"{TRANSFORMER}.image_dim=16", "image_dim is 16, but the weights in"),
    (f"{TRANSFORMER}.text_token_dim=64", "text_token_dim is 64, but the weights in"),
    (f"{TRANSFORMER}.arch=[vit_d3w192,vit_d6w192,mlp_d3w192]", "arch is ['vit_d3w192'"),
    (f"{TRANSFORMER}.arch=[vit_d2w64,vit_d4w65,mlp_d2w64]", "did you mean 'vit_d4w64'?"),
    (f"{TRANSFORMER}.arch=[vit_d2w64]", "arch must name video encoder, image encoder and"),
    (f"{TRANSFORMER}.image_size=[64,64,64]", "image_size must be 1 or 2 whole numbers"),
    (f"{TRANSFORMER}.image_size=[128,64]", "means latents of 16x8"),
    ("pipeline.paths.module_dict.text_encoder=", "module_dict.text_encoder is empty, but"),
    ("pipeline.paths.module_dict.vae=", "pipeline.paths.module_dict.vae is empty"),
    (
        "pipeline.target=diffnext.pipelines.nova.pipeline_train_t2v.NOVATrainT2VPipeline",
        "NOVATrainT2VPipeline trains on videos, but example 0",
    ),
]


@pytest.mark.parametrize("argument, message", MISFITS)
def test_sizes_that_do_not_fit_are_named_in_one_line(main, scratch_run, argument, message):
    assert message in refuse(main, scratch_run.arguments(argument))


def test_more_processes_than_examples_are_refused(main, scratch_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "13")
    message = refuse(main, scratch_run.arguments())
    assert "train_dataloader.params: 12 examples in shards of 1 fill only 12 of 13" in message


def test_class_beyond_the_last_is_refused(main, scratch_run):
    write_records(scratch_run.dataset, label=1000, caption=None)
    settings = json.loads((scratch_run.base / "transformer" / "config.json").read_text())
    settings["text_token_dim"] = None
    (scratch_run.base / "transformer" / "config.json").write_text(json.dumps(settings))
    pipeline = "diffnext.pipelines.nova.pipeline_train_c2i.NOVATrainC2IPipeline"
    overrides = [f"pipeline.target={pipeline}", f"{TRANSFORMER}.text_token_dim=null"]
    assert "classes must be 0 to 999, but example 0" in refuse(
        main, scratch_run.arguments(*overrides)
    )


def test_validation_without_anything_to_draw_is_refused(main, scratch_run):
    write_states(scratch_run.dataset, 8, 32)
    message = refuse(main, scratch_run.arguments("validation.every=2"))
    assert "validation.every=2 has nothing to draw" in message and "validation.prompts" in message


def test_held_out_records_are_checked_like_those_of_the_training(main, scratch_run, tmp_path):
    (tmp_path / "held").mkdir()
    write_records(tmp_path / "held", shape=(6, 8, 8))
    message = refuse(main, scratch_run.arguments(f"validation.holdout={tmp_path / 'held'}"))
    assert f"{TRANSFORMER}.image_dim is 4" in message and str(tmp_path / "held") in message


def test_dataset_of_the_same_autoencoder_is_accepted(main, scratch_run):
    manifest = {"vae_hash": hash_weights(scratch_run.base / "vae")}
    (scratch_run.dataset / "manifest.json").write_text(json.dumps(manifest))
    # What is checked last is wrong, so everything before was right.
    message = refuse(main, scratch_run.arguments("validation.prompts=[1]"))
    assert "validation.prompts" in message


def test_shell_sees_one_line_and_a_failure(scratch_run):
    for argument, message in [
        ("training.batch_size=two", "training.batch_size must be int, got 'two'"),
        (f"{TRANSFORMER}.image_size=[128,64]", "means latents of 16x8"),
    ]:
        done = subprocess.run(
            [sys.executable, SCRIPT, *scratch_run.arguments(argument)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0]
        assert done.stderr.splitlines()[-1] == errors[0]
