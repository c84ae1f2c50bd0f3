"""Reading a configuration: files, overrides, and everything that is wrong with them at once."""

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffnext.config.load import (
    OmegaConfEncoder,
    config_to_yaml,
    flatten_omega_conf,
    get_config,
    parse,
    read_config,
    save_config,
)
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError

TINY = f"config={Path(__file__).parents[2] / 'configs' / 'nova_tiny_t2i.yaml'}"
BOMB = "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(8))


def load(*overrides):
    return get_config([TINY, *overrides])


def test_overrides_win_over_the_file_and_have_yaml_values(monkeypatch):
    overrides = ["optimizer.params.lr=1e-4", "optimizer.params.betas=[0.8,0.9]", "ema=null"]
    monkeypatch.setattr(sys, "argv", ["train.py", TINY, *overrides])
    config = get_config()
    assert config.config == TINY.removeprefix("config=")
    assert config.lr_scheduler.params.lr_max == 1e-4
    assert config.optimizer.params.betas == [0.8, 0.9]
    assert config.ema is None


def test_plus_adds_keys_and_tilde_deletes_them_in_order():
    assert load("+notes={author: me}", "+optimizer.params.nosuch=1").notes == {"author": "me"}
    config = load("~ema.params", "ema.params.decay=0.5", "~wandb", "~optimizer.params.fused")
    assert config.ema.params == {"decay": 0.5}
    assert "wandb" not in config and "fused" not in config.optimizer.params
    assert load("training.seed=3", "training.seed=4").training.seed == 4


def test_an_unknown_key_of_a_file_can_be_kept_or_dropped(tmp_path):
    config = OmegaConf.load(TINY.removeprefix("config="))
    config.training.old_key = 1
    save_config(config, tmp_path / "a.yaml")
    path = f"config={tmp_path / 'a.yaml'}"
    with pytest.raises(ConfigError, match=r"'training.old_key' in .*a.yaml .*~training.old_key"):
        get_config([path])
    assert get_config([path, "+training.old_key=2"]).training.old_key == 2
    assert "old_key" not in get_config([path, "~training.old_key"]).training


def test_valid_parameters_follow_the_target():
    cosine = "lr_scheduler.target=diffnext.engine.lr_scheduler.CosineLR"
    assert load(cosine, "lr_scheduler.params.decay_step=3").lr_scheduler.params.decay_step == 3
    with pytest.raises(ConfigError, match=r"decay_step' .*ConstantLR does not take"):
        load("lr_scheduler.params.decay_step=3")


@pytest.mark.parametrize(
    "arguments, keys",
    [
        (
            "training.sed=3 training.batch_size=two experiment.save_every=0 wandb.id=a "
            "optimizer.target=torch.optim.AdamV lr_scheduler.params.warmup_steps=soon "
            "model.mask_ratios=[1,0,1] model.loss_weights.t2i=0 model.loss_weights.i2v=0 "
            "~training.max_train_steps",
            "experiment.output_dir experiment.save_every lr_scheduler.params.warmup_steps "
            "model.loss_weights model.mask_ratios optimizer.target training.batch_size "
            "training.max_train_steps training.sed wandb.id",
        ),
        # What refers to one of these is not worth a line.
        ("OUT training.seed=${training.sed} model.name=${nosuch}", "model.name training.seed"),
        (
            "experiment=null training=3 ema.params=3 model.name=state",
            "ema.params experiment.output_dir model.name training",
        ),
        (
            "experiment.output_dir=??? training.seed=${training.batch_size} "
            "training.batch_size=${training.seed} training.gradient_accumulation_steps='1' "
            "optimizer.params.lr=[] optimizer.params.params=1",
            "experiment.output_dir optimizer.params.lr optimizer.params.params training.batch_size "
            "training.gradient_accumulation_steps training.seed",
        ),
        (
            "OUT optimizer.target=math.pi pipeline.target=a.b model.lora.rank=0 model.lora.rnk=1 "
            "train_dataloader.params.num_workers=${model.name}",
            "model.lora.rank model.lora.rnk optimizer.target pipeline.target "
            "train_dataloader.params.num_workers",
        ),
    ],
)
def test_all_mistakes_are_named_at_once_and_each_once(arguments, keys):
    arguments = arguments.replace("OUT", "experiment.output_dir=run").split()
    config, origins = read_config([TINY, *arguments])
    with pytest.raises(ConfigError) as caught:
        parse(config, TrainConfig, origins)
    lines = [line.removeprefix("unknown key ") for line in caught.value.problems]
    assert sorted(line.split()[0].strip("':") for line in lines) == keys.split()


def test_interpolations_may_refer_to_keys_left_to_their_defaults():
    arguments = ["~training.seed", "checkpoint.keep_last=${eval:'2*3'}", "experiment.output_dir=x"]
    tree = parse(load(*arguments, "validation.seeds=['${training.seed}']"), TrainConfig)
    assert tree.validation.seeds == (1337,) and tree.checkpoint.keep_last == 6
    assert tree.train_dataloader.params.seed == 1337


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "config is required"),
        ([TINY, "training.seed"], "written key=value, got 'training.seed'"),
        ([TINY, "training=[1]"], "cannot apply"),
        ([TINY, "~training.seed.x"], "no such key"),
        ([TINY, "training.seed=!!bool x"], "cannot parse 'training.seed=!!bool x'"),
        ([TINY, "training.seed=!!int ''"], "cannot parse"),
        ([TINY, "training.seed=!!timestamp x"], "cannot parse"),
        ([TINY, f"training.seed=0x{'f' * 5000}"], "cannot parse"),
        ([TINY, "training.seed=1", "training=[1]"], r"cannot parse 'training=\[1\]'"),
    ],
)
def test_malformed_command_line_is_explained(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        get_config(arguments)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: &a {b: *a}", "recursive"),
        ("a0: &a0 [x]\n" + BOMB, "limit"),
        ("a: !!python/object/apply:os.system [exit]", "constructor"),
        ("a: " + "[" * 5000 + "]" * 5000, "nest"),
        ("a: " + "{a: " * 400 + "1" + "}" * 400, "nested too deeply"),
        ("a: caf\udce9", "utf-8"),
        ("a: \0", "control characters"),
        ("a: !!bool x", "not a readable YAML file"),
        ("a: !!int '-'", "not a readable YAML file"),
        ("a: !!timestamp x", "not a readable YAML file"),
        ("a: {b: 1, b: 2}", "duplicate key b"),
        ("!!binary aGk=: 1", "keys must be"),
        ("model: {name: '${eval:''__import__(1)''}'}", "name does not resolve: cannot evaluate"),
    ],
)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message) as caught:
        get_config([f"config={path}"])
    (problem,) = caught.value.problems
    assert "\n" not in problem


def test_saved_run_configuration_is_valid_input(tmp_path):
    save_config(load("training.seed=3"), tmp_path / "config.yaml")
    again = get_config([f"config={tmp_path / 'config.yaml'}", "training.seed=4"])
    assert again.training.seed == 4
    assert "${optimizer.params.lr}" in config_to_yaml(again)


def test_containers_become_leaves_and_json():
    config = OmegaConf.create({"a": {"b": [1, {"c": 2}]}, "d": "${a.b}"})
    assert flatten_omega_conf(config.a) == [("b.0", 1), ("b.1.c", 2)]
    assert json.loads(json.dumps({"x": config.d}, cls=OmegaConfEncoder)) == {"x": [1, {"c": 2}]}
