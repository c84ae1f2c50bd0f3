"""Configuration files, overrides and what is built from them."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.utils.config_check import fits
from diffnext.utils.config_schema import (
    TrainConfig,
    TransformerConfig,
    describe_schema,
    iterate_schema,
)
from diffnext.utils.omegaconf_utils import (
    ConfigError,
    OmegaConfEncoder,
    config_to_class,
    config_to_object,
    config_to_yaml,
    evaluate_arithmetic,
    fill_defaults,
    flatten_omega_conf,
    get_config,
    require_keys,
    save_config,
)

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = f"config={CONFIGS / 'nova_tiny_t2i.yaml'}"
T2I_CONFIGS = ["nova_d48w768_sdxl1024", "nova_d48w1024_sdxl1024", "nova_d48w1536_sdxl1024"]


def load(*overrides):
    return get_config([TINY, *overrides])


def test_overrides_win_over_the_file_and_have_yaml_values():
    config = load("optimizer.params.lr=1e-4", "optimizer.params.betas=[0.8,0.9]", "ema=null")
    assert config.optimizer.params.lr == 1e-4
    assert config.lr_scheduler.params.lr_max == 1e-4
    assert config.optimizer.params.betas == [0.8, 0.9]
    assert config.ema is None


def test_config_key_stays_in_the_result():
    assert load().config == TINY.removeprefix("config=")


def test_arguments_default_to_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", TINY, "training.seed=5"])
    assert get_config().training.seed == 5


@pytest.mark.parametrize(
    "override, suggestion",
    [
        ("training.max_train_step=6", "training.max_train_steps"),
        ("max_train_steps=6", "training.max_train_steps"),
        ("optimizer.params.epsilon=1", "optimizer.params.eps"),
        ("train_dataloader.params.num_worker=1", "train_dataloader.params.num_workers"),
        ("training={seed: 3, sed: 4}", "training.seed"),
        ("pipeline.paths.module_dict.text_encodr=x", "text_encoder"),
    ],
)
def test_misspelt_key_is_refused_with_the_nearest_valid_one(override, suggestion):
    with pytest.raises(ConfigError, match=suggestion):
        load(override)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.params.eps=1e-8",
        "training.max_grad_norm=1.0",
        "checkpoint.keep_last=2",
        "experiment.output_dir=/tmp/x",
        "pipeline.paths.module_config.scheduler.shift=3",
        "pipeline.paths.module_dict.text_encoder=",
        "ema.params.update_every=5",
        "train_dataloader.params.shard_id=0",
        "training.gpu_id=0",
        "experiment.resume_iter=7",
    ],
)
def test_keys_that_the_file_leaves_out_but_the_program_reads_are_accepted(override):
    load(override)


def test_valid_parameters_follow_the_target():
    cosine = "lr_scheduler.target=diffnext.engine.lr_scheduler.CosineLR"
    assert load(cosine, "lr_scheduler.params.decay_step=3").lr_scheduler.params.decay_step == 3
    with pytest.raises(ConfigError, match="decay_step"):
        load("lr_scheduler.params.decay_step=3")


def test_plus_adds_an_unknown_key():
    assert load("+notes.author=me").notes.author == "me"
    assert load("+notes={author: me, year: 1}").notes == {"author": "me", "year": 1}
    assert load("+optimizer.params.nosuch=1").optimizer.params.nosuch == 1


def test_tilde_deletes_keys_and_sections():
    config = load("~ema", "~optimizer.params.fused", "~train_dataloader.params.num_workers")
    assert "ema" not in config
    assert "fused" not in config.optimizer.params
    assert config.optimizer.params.lr == 1e-3
    assert load("~optimizer.params.fused").optimizer.params.betas == [0.9, 0.95]


def test_items_apply_in_order():
    decay = "ema.params.decay=0.5"
    assert load("~ema.params", decay).ema.params == {"decay": 0.5}
    assert "ema" not in load(decay, "~ema")
    assert load("training.seed=3", "training.seed=4").training.seed == 4


@pytest.mark.parametrize("item", ["~training.sed", "~training.seed.x", "~sed"])
def test_deleting_what_is_not_there_is_refused(item):
    with pytest.raises(ConfigError, match="there is no such key"):
        load(item)


def write_yaml(path, **sections):
    config = OmegaConf.load(CONFIGS / "nova_tiny_t2i.yaml")
    save_config(OmegaConf.merge(config, sections), path)
    return f"config={path}"


def test_unknown_key_of_a_file_is_refused_forced_or_deleted(tmp_path):
    config = write_yaml(tmp_path / "a.yaml", training={"old_key": 1}, notes={"author": "me"})
    with pytest.raises(ConfigError, match=r"'training.old_key' in .*a.yaml .*~training.old_key"):
        get_config([config, "~notes"])
    kept = get_config([config, "+training.old_key=2", "+notes={}"])
    assert kept.training.old_key == 2
    assert kept.notes.author == "me"
    assert "old_key" not in get_config([config, "~training.old_key", "~notes"]).training


def test_arguments_of_a_file_follow_the_target(tmp_path):
    config = write_yaml(tmp_path / "a.yaml", lr_scheduler={"params": {"decay_step": 3}})
    with pytest.raises(ConfigError, match=r"decay_step' in .*ConstantLR does not take"):
        get_config([config])
    get_config([config, "lr_scheduler.target=diffnext.engine.lr_scheduler.CosineLR"])


def test_without_a_schema_the_keys_of_the_file_are_those_that_exist(tmp_path):
    save_config(OmegaConf.create({"anything": {"goes": "here"}}), tmp_path / "a.yaml")
    arguments = [f"config={tmp_path / 'a.yaml'}", "anything.goes=3"]
    assert get_config(arguments, schema=None).anything.goes == 3
    with pytest.raises(ConfigError, match="unknown key 'else'"):
        get_config([*arguments, "else=1"], schema=None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("nova_*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_unchanged(path):
    config = get_config([f"config={path}"])
    assert config == OmegaConf.merge(OmegaConf.load(path), {"config": str(path)})


def test_values_are_typed_behind_interpolations_to_keys_left_out():
    # training.seed is left to its default, which only exists once the defaults are filled in.
    config = load("~training.seed")
    assert "seed" not in config.training
    with pytest.raises(ConfigError, match="num_workers must be int, got 'transformer'"):
        load("train_dataloader.params.num_workers=${model.name}")


def test_a_wrong_value_is_named_where_it_was_written():
    with pytest.raises(ConfigError, match="^training.batch_size must be int, got 'two', on the c"):
        load("training.batch_size=two")


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.params.lr=1",
        "training.mixed_precision=no",
        "training.mixed_precision=",
        "experiment.resume_from_checkpoint=",
        "pipeline.paths.module_config.transformer.image_size=256",
        "validation={every: 2, prompts: [a cat], holdout: 0.1}",
        "validation.prompts=[1,2]",
        "model.lora={rank: 4, target_modules: [qkv]}",
        "checkpoint=",
        "lr_scheduler.params.max_steps=",
    ],
)
def test_values_of_the_right_type_are_accepted(override):
    load(override)


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1.0, int, False),
        ("1", int, False),
        (None, int, False),
        (None, int | None, True),
        ("bin", Literal["bin", "zip"], True),
        (True, Literal[1], False),
        ([1, 2], list[int], True),
        ([1, "a"], list[int], False),
        (["a"], list[str] | list[int] | None, True),
        ([0.9, 0.95], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ("a", float | torch.Tensor, False),
        (0.1, float | torch.Tensor, True),
        ("float16", torch.dtype, True),
        ({"a": 1}, dict, True),
        ({"a": 1}, Any, True),
        (1, dict, False),
    ],
)
def test_types(value, hint, expected):
    assert fits(value, hint) is expected


def test_schema_has_every_argument_of_the_transformer():
    arguments = list(inspect.signature(NOVATransformer3DModel).parameters)
    assert sorted(arguments) == sorted(item.path for item in iterate_schema(TransformerConfig))


def test_saved_run_configuration_is_valid_input(tmp_path):
    save_config(load("training.seed=3"), tmp_path / "config.yaml")
    again = get_config([f"config={tmp_path / 'config.yaml'}", "training.seed=4"])
    assert again.training.seed == 4
    assert "${optimizer.params.lr}" in config_to_yaml(again)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "config is required"),
        (["config=/nowhere.yaml"], "no such file"),
        ([TINY, "--x=3"], "without dashes"),
        ([TINY, "-x"], "without dashes"),
        ([TINY, "training.seed=[1"], "cannot parse"),
    ],
)
def test_malformed_command_line_is_explained(arguments, message):
    with pytest.raises(ConfigError, match=message):
        get_config(arguments)


def test_file_that_is_no_yaml_mapping_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1")
    (tmp_path / "b.yaml").write_text("- 1\n- 2\n")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match=name):
            get_config([f"config={tmp_path / name}"])


def test_missing_required_key_is_named():
    with pytest.raises(ConfigError, match=r"experiment\.output_dir=\.\.\."):
        require_keys(load(), ["experiment.output_dir"])


def test_defaults_fill_what_is_left_out_and_nothing_else():
    training = {"seed": 7, "mixed_precision": False, "progress_bar": None}
    config = OmegaConf.create({"training": training, "ema": None})
    filled = fill_defaults(config)
    assert filled.training.seed == 7
    assert filled.training.mixed_precision is False
    assert filled.training.progress_bar is None
    assert filled.training.gradient_accumulation_steps == 1
    assert filled.experiment.log_every == 20
    assert filled.checkpoint.format == "safetensors"
    assert filled.ema is None and "wandb" not in filled
    assert "params" not in filled.train_dataloader
    assert "gradient_accumulation_steps" not in config.training


def test_eval_resolver_computes_with_numbers_and_can_be_registered_twice():
    config = load("training.seed=${eval:'1+1'}", "optimizer.params.lr=${eval:'1e-4*8'}")
    config = load("training.seed=${eval:'1+1'}", "optimizer.params.lr=${eval:'1e-4*8'}")
    assert config.training.seed == 2 and isinstance(config.training.seed, int)
    assert config.optimizer.params.lr == pytest.approx(8e-4)


@pytest.mark.parametrize(
    "expression, value",
    [
        ("7 // 2 + 7 % 4", 6),
        ("min(3, 2) ** 2", 4),
        ("-(2 - 5) / 2", 1.5),
        ("round(2.6)", 3),
        ("2 > 1", True),
    ],
)
def test_arithmetic(expression, value):
    assert evaluate_arithmetic(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').getcwd()",
        "().__class__",
        "'a' * 3",
        "[1]",
        "9 ** 9 ** 9",
        "((9 ** 999) ** 999) ** 999",
        "(" * 5000 + "1" + ")" * 5000,
        "open('x')",
        "1 /",
        "1 / 0",
    ],
)
def test_anything_but_arithmetic_is_refused(expression):
    with pytest.raises(ConfigError, match="cannot evaluate"):
        evaluate_arithmetic(expression)


def test_flatten_lists_leaves_by_dotted_key():
    config = OmegaConf.create({"a": {"b": [1, {"c": 2}]}, "d": None})
    assert flatten_omega_conf(config) == [("a.b.0", 1), ("a.b.1.c", 2), ("d", None)]


def test_json_encoder_resolves_containers():
    config = OmegaConf.create({"a": 1, "b": ["${a}"]})
    assert json.loads(json.dumps({"x": config}, cls=OmegaConfEncoder)) == {"x": {"a": 1, "b": [1]}}


def test_class_and_object_come_from_target_and_params():
    config = OmegaConf.create({"target": "fractions.Fraction", "params": {"numerator": 3}})
    assert config_to_class(config).__name__ == "Fraction"
    assert config_to_object(config, denominator=4) == 0.75
    assert config_to_class(None) is None
    assert config_to_object(OmegaConf.create({})) is None


def test_params_may_not_override_what_the_program_supplies():
    config = OmegaConf.create({"target": "fractions.Fraction", "params": {"numerator": 3}})
    with pytest.raises(ConfigError, match="numerator"):
        config_to_object(config, numerator=1)


def test_missing_or_wrong_target_is_explained():
    with pytest.raises(KeyError, match="Expected key `target` to instantiate"):
        config_to_class({"params": {}})
    for target in ("nosuch.module.Thing", "fractions.Nothing", "Thing"):
        with pytest.raises(ConfigError, match="cannot import target"):
            config_to_class({"target": target})


def test_help_lists_every_key_with_type_default_and_meaning():
    text = describe_schema(TrainConfig)
    for item in iterate_schema(TrainConfig):
        assert item.path in text
        assert item.meaning
    assert "training.max_train_steps  (int, required)" in text
    assert "checkpoint.format  (Literal['safetensors', 'bin'], default safetensors)" in text


def test_schema_knows_every_key_of_the_shipped_files():
    known = {item.path for item in iterate_schema(TrainConfig)}
    open_keys = tuple(item.path + "." for item in iterate_schema(TrainConfig) if item.open)
    for path in CONFIGS.glob("nova_*.yaml"):
        for key, _ in flatten_omega_conf(OmegaConf.load(path), resolve=False):
            key = key.rpartition(".")[0] if key.rpartition(".")[2].isdigit() else key
            assert key in known or key.startswith(open_keys), (path.name, key)


@pytest.mark.parametrize("name", T2I_CONFIGS)
def test_image_configurations_have_the_published_values(name):
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    width = name.split("_")[1].removeprefix("d48w")
    transformer = config.pipeline.paths.module_config.transformer
    assert config.experiment.name == name
    assert transformer.arch == [f"vit_d16w{width}", f"vit_d32w{width}", f"mlp_d6w{width}"]
    assert transformer.image_size == [1024, 1024]
    assert transformer.image_base_size == [64, 64]
    assert config.train_dataloader.params.batch_size == 8
    assert config.lr_scheduler.params.max_steps == 30000
    assert config.ema.params == {"decay": 0.98, "device": "cpu"}
    assert config.training.mixed_precision == "bf16"


def test_video_configuration_has_the_published_values():
    config = OmegaConf.load(CONFIGS / "nova_d48w1024_osp480.yaml")
    transformer = config.pipeline.paths.module_config.transformer
    assert transformer.arch == ["vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"]
    assert transformer.image_size == [480, 768]
    assert transformer.video_base_size == [16, 15, 24]
    assert config.pipeline.target.endswith("pipeline_train_t2v.NOVATrainT2VPipeline")
    assert config.training.batch_size == 3
    assert config.training.max_train_steps == 60000
    assert config.ema.params.decay == 0.97
