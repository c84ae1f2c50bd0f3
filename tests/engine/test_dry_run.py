import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file

from diffnext.config.load import parse, read_config
from diffnext.config.schema import OptimizerConfig, TrainConfig
from diffnext.engine.dry_run import (
    ModelPlan,
    checkpoints_kept,
    dry_run,
    optimizer_states,
)
from diffnext.engine.run_inputs import inspect_inputs
from tests.engine.conftest import TinyRun
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]
RELEASED = {
    "nova_d48w768_sdxl1024": 363.95,
    "nova_d48w1024_sdxl1024": 645.69,
    "nova_d48w1536_sdxl1024": 1449.84,
    "nova_d48w1024_osp480": 644.12,
}


def configure(arguments):
    return parse(read_config(arguments)[0], TrainConfig)


def report_of(config, accelerator=None):
    """What the dry run says, and whether all is well."""
    lines = []
    is_ready = dry_run(config, accelerator, lines.append)
    return "\n".join(lines), is_ready


def plan(config):
    return ModelPlan.of(config, inspect_inputs(config))


@pytest.fixture(scope="module")
def ready_run(tiny_base, tiny_dataset, tmp_path_factory):
    """A run that can start, and what was said about it."""
    run = TinyRun(tiny_base, tiny_dataset, tmp_path_factory.mktemp("ready") / "run")
    text, is_ready = report_of(configure(run.arguments()), Accelerator(cpu=True))
    return SimpleNamespace(run=run, text=text, is_ready=is_ready)


def test_a_run_that_can_start_is_reported_and_timed(ready_run):
    text = ready_run.text
    assert ready_run.is_ready, text
    assert "12 examples; moments (8, 8, 8) float16; captions as text" in text
    assert "1 shards of 12 examples" in text
    assert "6 steps per epoch" in text
    assert "4 in the video encoder and 16 in the image encoder, 8 of condition; 64 in the" in text
    assert "| ZeRO-2 | 128 |" in text
    assert "samples/s" in text
    assert "Ready" in text


def test_nothing_is_written(ready_run):
    assert not ready_run.run.output.exists()


def test_steps_are_not_timed_when_a_batch_does_not_fit(tiny_run):
    config = configure(tiny_run.arguments("training.batch_size=1000000"))
    text, is_ready = report_of(config, Accelerator(cpu=True))
    assert not is_ready
    assert "does not fit" in text
    assert "not measured" in text
    assert "training.batch_size" in text


def test_checkpoints_that_overflow_the_disk_are_reported(tiny_run, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text, is_ready = report_of(configure(tiny_run.arguments()))
    assert not is_ready
    assert "checkpoint.keep_last" in text


@pytest.mark.parametrize(
    "name",
    [
        "nova_d48w768_sdxl1024",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(RELEASED)[1:]),
    ],
)
def test_released_sizes_are_estimated_without_any_file(name, tmp_path):
    arguments = [f"config={ROOT / 'configs' / name}.yaml", f"experiment.output_dir={tmp_path}"]
    text, is_ready = report_of(configure(arguments))
    assert not is_ready
    assert re.search(rf"in all +{RELEASED[name]}", text)
    assert "/path/to/nova" in text  # the placeholders, as problems
    assert "/path/to/" in text.split("because")[1]
    assert "text_encoder: no weights, assumed Phi-2, 2780 M" in text
    assert "| FSDP2 | 8 |" in text


def test_a_base_folder_without_weights_gives_sizes_and_says_what_is_missing(tiny_run, tmp_path):
    base = shutil.copytree(tiny_run.base, tmp_path / "base")
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    run = TinyRun(base, tiny_run.dataset, tiny_run.output)
    text, is_ready = report_of(configure(run.arguments()))
    assert not is_ready
    assert "4 in the video encoder and 16 in the image encoder" in text
    assert "vae: no weights, assumed AutoencoderKL, 84 M" in text
    for name in ("transformer", "text_encoder", "vae"):
        assert f"there are no weights in {base / name}" in text


PROBLEMS = {
    "pipeline.paths.module_config.transformer.text_token_dim=48": "text_token_dim is 48",
    "pipeline.paths.module_config.transformer.arch=[vit_d2w64,vit_d4w64,mlp_no]": "mlp_no",
    "train_dataloader.params.dataset=/nowhere": "there is no folder /nowhere",
    "experiment.resume_from_checkpoint=/nowhere-3": "/nowhere-3",
}


def test_all_problems_are_listed_at_the_end(tiny_run):
    text, is_ready = report_of(configure(tiny_run.arguments(*PROBLEMS)))
    assert not is_ready
    conclusion = text.split("because")[1]
    assert conclusion.count("\n") == len(PROBLEMS)
    for message in PROBLEMS.values():
        assert message in conclusion


def test_without_a_fitting_dataset_sizes_are_the_models(tiny_run):
    text, _ = report_of(configure(tiny_run.arguments("train_dataloader.params.dataset=/nowhere")))
    assert "Data: not readable" in text
    assert "A sample: 1 x 8 x 8 latents, assumed" in text


def test_what_is_frozen_is_not_counted_as_trained(tiny_run):
    model = plan(configure(tiny_run.arguments())).make()
    assert not any(p.requires_grad for p in model.video_encoder.patch_embed.parameters())
    assert any(p.requires_grad for p in model.image_encoder.patch_embed.parameters())


@pytest.mark.parametrize(
    ("overrides", "components"),
    [((), {"vae", "text_encoder"}), (("pipeline.paths.module_dict.text_encoder=",), {"vae"})],
)
def test_frozen_components_are_counted_unless_left_out(tiny_run, overrides, components):
    frozen = plan(configure(tiny_run.arguments(*overrides))).frozen_parameters
    assert set(frozen) == components
    assert all(0 < count < 1e6 for count in frozen.values())  # the tiny ones, not assumed ones


@pytest.mark.parametrize(
    ("target", "params", "expected"),
    [
        ("torch.optim.AdamW", {"lr": 0.1, "fused": True}, 2),
        ("torch.optim.SGD", {"lr": 0.1}, 0),
        ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}, 1),
    ],
)
def test_the_state_of_any_optimizer_is_found(tiny_run, target, params, expected):
    optimizer = OptimizerConfig(target=target, params=params)
    config = replace(configure(tiny_run.arguments()), optimizer=optimizer)
    assert optimizer_states(config) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 10),
        (("checkpoint.keep_last=2",), 3),
        (("checkpoint.keep_last=2", "checkpoint.keep_every=500"), 5),
        (("checkpoint.keep_last=50",), 10),
    ],
)
def test_checkpoints_on_disk_follow_what_is_kept(tiny_run, overrides, expected):
    intervals = ("training.max_train_steps=1000", "experiment.save_every=100")
    assert checkpoints_kept(configure(tiny_run.arguments(*intervals, *overrides))) == expected


LAUNCH_FILES = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_launch_files_are_read_by_accelerate(file):
    config = load_config_from_file(str(file))
    assert config.num_processes >= config.num_machines >= 1
    assert config.machine_rank < config.num_machines
    assert config.mixed_precision in (None, "no")
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
        classes = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        assert set(classes) <= {type(module).__name__ for module in make_model().modules()}
