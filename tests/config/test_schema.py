"""The keys of a training configuration: types, limits, defaults, and the files that are shipped."""

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffnext.config.load import get_config, parse, parse_for_rank
from diffnext.config.schema import (
    KEEP,
    TrainConfig,
    TransformerConfig,
    describe_schema,
    iterate_schema,
)
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = [f"config={CONFIGS / 'nova_tiny_t2i.yaml'}", "experiment.output_dir=run"]


def parse_tiny(*overrides):
    return parse(get_config([*TINY, *overrides]), TrainConfig)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("nova_*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_unchanged(path):
    config = get_config([f"config={path}", "experiment.output_dir=run"])
    given = {"config": str(path), "experiment": {"output_dir": "run"}}
    assert config == OmegaConf.merge(OmegaConf.load(path), given)
    assert parse(config, TrainConfig).model.name == "transformer"


ACCEPTED = """
    optimizer.params.lr=1 training.mixed_precision=no lr_scheduler.params.max_steps=null
    experiment.resume_from_checkpoint= pipeline.paths.module_config.transformer.image_size=256
    pipeline.paths.module_config.scheduler.shift=3 validation.every=2 validation.prompts=[1,2]
    validation.holdout=0.1 model.lora.rank=4 model.lora.target_modules=[qkv] checkpoint.keep_last=2
    model.mask_ratios=[0.5,1,0.25] training.time_limit=1d2h training.gpu_id=0 ema.params=null
    train_dataloader.params.shard_id=0 training.mixed_precision= pipeline.paths.module_dict.vae=
"""


@pytest.mark.parametrize("override", ACCEPTED.split())
def test_values_within_the_limits_are_accepted(override):
    parse_tiny(override)


def test_parsing_fills_in_defaults_and_leaves_its_input_alone():
    config = get_config([*TINY, "~optimizer", "lr_scheduler.params.lr_max=1", "checkpoint=null"])
    before = copy.deepcopy(config)
    tree = parse(config, TrainConfig)
    assert config == before and parse(tree, TrainConfig) is tree
    assert tree.checkpoint.format == "safetensors" and tree.trust_remote_code is False
    assert tree.optimizer.target == "torch.optim.AdamW" and tree.optimizer.params == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.training.seed = 3


@pytest.mark.parametrize(
    "override, module_dict, transformer",
    [
        ("module_dict={}", None, None),
        ("module_dict.vae=", {"vae": None}, None),
        ("module_config.transformer.text_token_dim=null", None, {"text_token_dim": None}),
        ("module_config.transformer.image_size=[8,8]", None, {"image_size": [8, 8]}),
    ],
)
def test_overlays_tell_null_from_a_key_that_is_left_out(override, module_dict, transformer):
    clean = ["~pipeline.paths.module_dict", "~pipeline.paths.module_config"]
    tree = parse_tiny(*clean, f"pipeline.paths.{override}")
    for twin in (tree, copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        arguments = twin.pipeline.paths.arguments()
        assert arguments["module_dict"] == module_dict
        assert arguments["module_config"] == (transformer and {"transformer": transformer})
        assert twin.pipeline.paths.module_dict.tokenizer is KEEP


def test_the_seed_of_a_rank_reaches_whatever_refers_to_it():
    config = get_config([*TINY, "training.seed=7"])
    trees = [parse_for_rank(config, rank) for rank in (0, 3)]
    assert [tree.training.seed for tree in trees] == [7, 10]
    assert [tree.train_dataloader.params.seed for tree in trees] == [7, 10]


def test_schema_has_every_argument_of_the_transformer():
    arguments = list(inspect.signature(NOVATransformer3DModel).parameters)
    assert sorted(arguments) == sorted(item.path for item in iterate_schema(TransformerConfig))


def test_help_lists_every_key_with_type_default_and_meaning():
    text = describe_schema(TrainConfig)
    assert all(item.path in text and item.meaning for item in iterate_schema(TrainConfig))
    assert "training.max_train_steps  (int >= 1, required)" in text
    assert "checkpoint.keep_last  (int >= 1 | null, default null)" in text
    assert "module_dict.vae  (str | null, default the base folder's)" in text


@pytest.mark.parametrize("width", [768, 1024, 1536])
def test_image_configurations_have_the_published_values(width):
    config = OmegaConf.load(CONFIGS / f"nova_d48w{width}_sdxl1024.yaml")
    transformer = config.pipeline.paths.module_config.transformer
    assert transformer.arch == [f"vit_d16w{width}", f"vit_d32w{width}", f"mlp_d6w{width}"]
    assert transformer.image_size == [1024, 1024] and transformer.image_base_size == [64, 64]
    assert config.train_dataloader.params.batch_size == 8
    assert config.lr_scheduler.params.max_steps == 30000
    assert config.ema.params == {"decay": 0.98, "device": "cpu"}
    assert config.training.mixed_precision == "bf16"


def test_video_configuration_has_the_published_values():
    config = OmegaConf.load(CONFIGS / "nova_d48w1024_osp480.yaml")
    transformer = config.pipeline.paths.module_config.transformer
    assert transformer.arch == ["vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"]
    assert transformer.image_size == [480, 768] and transformer.video_base_size == [16, 15, 24]
    assert config.pipeline.target.endswith("pipeline_train_t2v.NOVATrainT2VPipeline")
    assert (config.training.batch_size, config.training.max_train_steps) == (3, 60000)
    assert config.ema.params.decay == 0.97
