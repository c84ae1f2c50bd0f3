"""Folders and schedulers assembled from parts."""

import json
import logging
from pathlib import Path

import diffusers
import pytest
import torch
from omegaconf import OmegaConf

from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.builder import (
    build_diffusion_scheduler,
    build_pipeline,
    get_pipeline_path,
)
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler


def read(path):
    return json.loads(Path(path).read_text())


def test_nothing_to_replace_leaves_the_path(release):
    assert get_pipeline_path(str(release)) == str(release)


def test_a_component_can_be_dropped(release):
    folder = get_pipeline_path(release, {"text_encoder": "", "tokenizer": None, "unheard": ""})
    pipe = NOVAPipeline.from_pretrained(folder)
    assert pipe.text_encoder is None and pipe.vae is not None


def test_an_explicit_component_wins_and_its_folder_stays(release, tmp_path):
    other = tmp_path / "other_vae"
    vae = NOVAPipeline.from_pretrained(release).vae
    vae.register_to_config(scaling_factor=0.25)
    vae.save_pretrained(other)
    before = (other / "config.json").read_text()
    folder = get_pipeline_path(release, {"vae": str(other)}, {"vae": {"shift_factor": 0.5}})
    config = NOVAPipeline.from_pretrained(folder).vae.config
    assert (config.scaling_factor, config.shift_factor) == (0.25, 0.5)
    assert (other / "config.json").read_text() == before


def test_config_values_overlay_those_of_the_folder(release, caplog):
    overlay = OmegaConf.create({"transformer": {"text_token_len": 5, "image_dim": 4}})
    with caplog.at_level(logging.WARNING):
        folder = get_pipeline_path(release, None, overlay)
    config = read(Path(folder) / "transformer" / "config.json")
    assert config["text_token_len"] == 5
    assert config["video_base_size"] == [1, 2, 3]  # of the folder
    assert "text_token_len is 7" in caplog.text and "image_dim" not in caplog.text
    assert read(release / "transformer" / "config.json")["text_token_len"] == 7


def test_a_relative_path_makes_links_that_lead_somewhere(release, monkeypatch):
    monkeypatch.chdir(release.parent)
    folder = get_pipeline_path(f"./{release.name}", {}, {})
    assert NOVAPipeline.from_pretrained(folder).vae is not None


def test_the_same_target_can_be_assembled_twice(release, tmp_path):
    for _ in range(2):
        overlay = {"vae": {"scaling_factor": 2.0}}
        target = get_pipeline_path(release, {}, overlay, tmp_path / "target")
        assert NOVAPipeline.from_pretrained(target).vae.config.scaling_factor == 2.0


def test_a_checkpoint_can_be_trained_from(release, tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (release / "transformer").rename(checkpoint / "transformer")
    (checkpoint / "model_index.json").write_text((release / "model_index.json").read_text())
    (checkpoint / "base_folder.json").write_text(json.dumps({"base_folder": str(release)}))
    modules = {name: f"{checkpoint}/{name}" for name in ("vae", "scheduler", "model_index.json")}
    modules["model_index"] = modules.pop("model_index.json")
    folder = get_pipeline_path(checkpoint, modules, {"vae": {"scaling_factor": 3.0}})
    pipe = NOVAPipeline.from_pretrained(folder)
    assert pipe.transformer is not None and pipe.vae.config.scaling_factor == 3.0


def test_another_index_can_be_named(release, tmp_path):
    index = read(release / "model_index.json")
    index.pop("tokenizer")
    (tmp_path / "index.json").write_text(json.dumps(index))
    folder = get_pipeline_path(release, {"model_index": str(tmp_path / "index.json")})
    assert "tokenizer" not in read(Path(folder) / "model_index.json")


@pytest.mark.parametrize("module_dict", [{"vae": "/no/vae"}, {"model_index": "/no/index.json"}])
def test_missing_parts_are_named(release, module_dict):
    with pytest.raises(FileNotFoundError, match="/no"):
        get_pipeline_path(release, module_dict)


def test_build_pipeline_loads_in_half_precision_by_default(release):
    assert build_pipeline(release, NOVAPipeline).transformer.dtype == torch.float16
    assert build_pipeline(release, NOVAPipeline, torch.float32).transformer.dtype == torch.float32


def test_schedulers_become_those_of_the_package():
    flow = build_diffusion_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert type(flow) is FlowMatchEulerDiscreteScheduler and flow.config.shift == 3.0
    assert build_diffusion_scheduler(flow).config.shift == 3.0
    ddpm = build_diffusion_scheduler(diffusers.DDPMScheduler(prediction_type="v_prediction"))
    assert type(ddpm) is DDPMScheduler and ddpm.config.prediction_type == "v_prediction"
    assert build_diffusion_scheduler(None) is None
    usual = diffusers.FlowMatchEulerDiscreteScheduler()
    assert build_diffusion_scheduler(usual, shift=4.0).config.shift == 4.0


def test_a_scheduler_folder_may_name_two_classes(tmp_path):
    config = {
        "_noise_class_name": "DDPMScheduler",
        "_sample_class_name": "FlowMatchEulerDiscreteScheduler",
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    assert type(build_diffusion_scheduler(tmp_path)) is DDPMScheduler
    sampler = build_diffusion_scheduler(tmp_path, sample=True)
    assert type(sampler) is FlowMatchEulerDiscreteScheduler


def test_an_unknown_scheduler_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got EulerDiscreteScheduler"):
        build_diffusion_scheduler(diffusers.EulerDiscreteScheduler())
    with pytest.raises(FileNotFoundError, match="no scheduler config"):
        build_diffusion_scheduler(tmp_path)
