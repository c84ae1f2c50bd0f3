import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from omegaconf import OmegaConf

from diffnext.data.records import RecordWriter
from diffnext.engine.dry_run import dry_run
from diffnext.engine.preflight import find_problems
from diffnext.engine.run_facts import (
    PHI2,
    checkpoints_kept,
    inspect_dataset,
    inspect_model,
    optimizer_states,
    shard_sizes,
)
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.utils.omegaconf_utils import fill_defaults, get_config
from tests.engine.conftest import TinyRun

ROOT = Path(__file__).parents[2]
RELEASED = {
    "nova_d48w768_sdxl1024": 363.95,
    "nova_d48w1024_sdxl1024": 645.69,
    "nova_d48w1536_sdxl1024": 1449.84,
    "nova_d48w1024_osp480": 644.12,
}


def configure(arguments):
    return fill_defaults(get_config(arguments))


def report_of(config, accelerator=None):
    """What the dry run says, and whether all is well."""
    lines = []
    is_ready = dry_run(config, accelerator, lines.append)
    return "\n".join(lines), is_ready


def released_config(name, folder, *overrides):
    config = f"config={ROOT / 'configs' / name}.yaml"
    return configure([config, f"experiment.output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def ready_run(tiny_base, tiny_dataset, tmp_path_factory):
    """A run that can start, and its configuration before and after; what was said about it."""
    run = TinyRun(tiny_base, tiny_dataset, tmp_path_factory.mktemp("ready") / "run")
    config = configure(run.arguments())
    before = config.copy()
    text, is_ready = report_of(config, Accelerator(cpu=True))
    return SimpleNamespace(run=run, before=before, after=config, text=text, is_ready=is_ready)


def test_a_run_that_can_start_is_reported_and_timed(ready_run):
    text = ready_run.text
    assert ready_run.is_ready, text
    assert "12 examples; moments (8, 8, 8) float16; captions as text" in text
    assert "1 shards of 12 examples" in text
    assert "6 steps an epoch" in text
    assert "4 in the video encoder and 16 in the image encoder, 8 of condition; 64 in the" in text
    assert "| ZeRO-2 | 128 |" in text
    assert "samples/s" in text
    assert "Ready" in text


def test_nothing_is_written(ready_run):
    assert not ready_run.run.output.exists()


def test_the_configuration_stays_as_it_is(ready_run):
    assert ready_run.after == ready_run.before


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
    text, is_ready = report_of(released_config(name, tmp_path))
    assert not is_ready
    assert re.search(rf"in all +{RELEASED[name]}", text)
    assert "/path/to/nova" in text  # the placeholders, as problems
    assert "/path/to/" in text.split("because")[1]
    assert "assumed PhiEncoderModel, 2780 M" in text
    assert "| FSDP2 | 8 |" in text


def save_configs_only(folder, transformer):
    """A base folder as of a release, without weights."""
    sources = {
        "transformer": {"_class_name": "NOVATransformer3DModel", **transformer},
        "text_encoder": {**PHI2, "architectures": ["PhiEncoderModel"], "model_type": "phi"},
        "vae": {"_class_name": "AutoencoderKL", "latent_channels": 4},
    }
    for name, config in sources.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir()
    index = {
        "_class_name": "NOVAPipeline",
        "transformer": ["__transformer__", "NOVATransformer3DModel"],
        "text_encoder": ["__text_encoder__", "PhiEncoderModel"],
        "vae": ["__vae__", "AutoencoderKL"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_base_folder_of_configs_only_gives_sizes_and_says_what_is_missing(tmp_path):
    base = tmp_path / "base"
    config = released_config(
        "nova_d48w768_sdxl1024", tmp_path / "run", f"pipeline.paths.pretrained_path={base}"
    )
    sizes = config.pipeline.paths.module_config.transformer
    save_configs_only(base, OmegaConf.to_container(sizes))
    facts = inspect_model(config)
    assert facts.frozen_parameters["text_encoder"] == pytest.approx(2.78e9, rel=0.01)
    assert facts.notes == ()
    assert facts.problems == ()
    text, _ = report_of(config)
    for name in ("transformer", "text_encoder", "vae"):
        assert f"there are no weights in {base / name}" in text


def test_weights_of_another_shape_are_reported(tiny_run):
    overlay = "pipeline.paths.module_config.transformer.text_token_dim=48"
    problems = inspect_model(configure(tiny_run.arguments(overlay))).problems
    assert len(problems) == 1
    assert "text_embed" in problems[0]
    assert "32" in problems[0]
    assert "48" in problems[0]


def test_an_unknown_architecture_is_one_problem(tiny_run):
    overlay = "pipeline.paths.module_config.transformer.arch=[vit_d2w64,vit_d4w64,mlp_nothing]"
    text, is_ready = report_of(configure(tiny_run.arguments(overlay)))
    assert not is_ready
    assert "mlp_nothing" in text.split("because")[1]


def test_what_is_frozen_is_not_counted_as_trained(tiny_run):
    facts = inspect_model(configure(tiny_run.arguments()))
    model = facts.make()
    assert isinstance(model, NOVATransformer3DModel)
    assert not any(p.requires_grad for p in model.video_encoder.patch_embed.parameters())
    assert any(p.requires_grad for p in model.image_encoder.patch_embed.parameters())


def test_a_component_that_is_left_out_is_not_counted(tiny_run):
    with_encoder = inspect_model(configure(tiny_run.arguments()))
    without = inspect_model(
        configure(tiny_run.arguments("pipeline.paths.module_dict.text_encoder=''"))
    )
    assert set(with_encoder.frozen_parameters) == {"vae", "text_encoder"}
    assert set(without.frozen_parameters) == {"vae"}


def write_records(folder, shapes):
    folder.mkdir()
    features = {"moments": "bytes", "caption": "string", "shape": ["int64"]}
    with RecordWriter(str(folder), features) as writer:
        for shape in shapes:
            moments = np.zeros(shape, np.float16)
            writer.write({"moments": moments, "shape": list(shape), "caption": "a star"})
    return str(folder)


def with_dataset(tiny_run, folder):
    return configure(tiny_run.arguments(f"train_dataloader.params.dataset={folder}"))


def test_a_dataset_is_described_by_some_of_its_records(tiny_run, tmp_path):
    path = write_records(tmp_path / "data", [(8, 4, 6)] * 100)
    facts = inspect_dataset(with_dataset(tiny_run, path))
    assert facts.num_examples == 100
    assert facts.moments == (8, 4, 6)
    assert facts.dtype == "float16"
    assert facts.record_bytes == 8 * 4 * 6 * 2 + len("a star")


def test_records_of_different_shapes_are_a_problem(tiny_run, tmp_path):
    path = write_records(tmp_path / "data", [(8, 4, 6)] * 9 + [(8, 6, 4)])
    text, is_ready = report_of(with_dataset(tiny_run, path))
    assert not is_ready
    assert "(8, 6, 4)" in text.split("because")[1]
    assert "cannot be in one batch" in text


def test_a_record_that_does_not_decode_is_named(tiny_run, tmp_path):
    path = write_records(tmp_path / "data", [(8, 8, 8)] * 3)
    data = tmp_path / "data" / "00000.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    text, is_ready = report_of(with_dataset(tiny_run, path))
    assert not is_ready
    assert "example 0" in text
    assert "train_dataloader.params.dataset" in text


def test_a_truncated_dataset_is_a_problem(tiny_run, tmp_path):
    path = write_records(tmp_path / "data", [(8, 8, 8)] * 3)
    data = tmp_path / "data" / "00000.data"
    data.write_bytes(data.read_bytes()[:-5])
    text, is_ready = report_of(with_dataset(tiny_run, path))
    assert not is_ready
    assert "truncated" in text


def test_a_missing_dataset_is_a_problem_beside_others(tiny_run, tmp_path):
    config = with_dataset(tiny_run, tmp_path / "nothing")
    config.training.batch_size = 0
    assert any("batch_size" in problem for problem in find_problems(config))
    config.training.batch_size = 1
    config.optimizer.params.betas = "?"
    problems = " ".join(find_problems(config))
    assert "METADATA" in problems
    assert "optimizer" in problems


def test_latents_of_another_size_are_a_problem_and_sizes_are_the_models(tiny_run, tmp_path):
    path = write_records(tmp_path / "data", [(8, 4, 6)] * 12)
    transformer = "pipeline.paths.module_config.transformer.rotary_pos_embed=false"
    text, is_ready = report_of(
        configure(tiny_run.arguments(transformer, f"train_dataloader.params.dataset={path}"))
    )
    assert not is_ready
    assert "4x6" in text.split("because")[1]
    assert "A sample: 1 x 8 x 8 latents, assumed" in text


def test_the_last_shard_is_smaller():
    assert shard_sizes(103, 4) == (26, 25)
    assert shard_sizes(100, 4) == (25, 25)
    with pytest.raises(ValueError, match="empty"):
        shard_sizes(3, 8)


@pytest.mark.parametrize(
    ("target", "params", "expected"),
    [
        ("torch.optim.AdamW", {"lr": 0.1, "fused": True}, 2),
        ("torch.optim.SGD", {"lr": 0.1}, 0),
        ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}, 1),
    ],
)
def test_the_state_of_any_optimizer_is_found(target, params, expected):
    config = OmegaConf.create({"optimizer": {"target": target, "params": params}})
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
        assert set(classes) <= classes_in_a_model()


def classes_in_a_model():
    """Names of the classes in a tiny model."""
    model = NOVATransformer3DModel(
        image_dim=4,
        image_size=64,
        image_stride=8,
        text_token_dim=32,
        text_token_len=8,
        video_base_size=[1, 2, 2],
        image_base_size=[4, 4],
        arch=["vit_d2w64", "vit_d4w64", "mlp_d2w64"],
    )
    return {type(module).__name__ for module in model.modules()}
