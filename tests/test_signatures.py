"""Arguments that scripts written for the original pass by name or by place."""

import inspect

import pytest

from diffnext.data.flex_pipelines import FeaturePipe
from diffnext.data.flex_transforms import ParseAnnotations, ParseLatents
from diffnext.engine.engine_utils import count_params, freeze_module, load_weights, manual_seed
from diffnext.models import diffusion_transformer, vision_transformer
from diffnext.models.embeddings import LabelEmbed, MotionEmbed, RotaryEmbed3D
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from diffnext.utils.accelerate_utils import build_accelerator, set_logger
from diffnext.utils.omegaconf_utils import save_config
from diffnext.utils.profiler import Timer


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (count_params, "module trainable unit"),
        (freeze_module, "module trainable"),
        (load_weights, "module weights_file prefix_removed strict"),
        (manual_seed, "seed device_and_seed"),
        (build_accelerator, "config log_with deepspeed_log_lvl kwargs"),
        (set_logger, "output_dir name level accelerator"),
        (save_config, "config f"),
        (Timer().toc, "n average"),
        (Timer().add_diff, "diff n average"),
        (ParseLatents(), "inputs"),
        (ParseAnnotations(), "inputs"),
        (FeaturePipe().get_outputs, "inputs"),
        (LabelEmbed(8).forward, "input_ids"),
        (MotionEmbed(8).forward, "c flow fps"),
        (RotaryEmbed3D().get_pos, "t bs hw"),
        (RotaryEmbed3D().get_func, "pos pad ids"),
        (vision_transformer.Block(8, 1).forward, "x pe_func"),
        (vision_transformer.VisionTransformer(1, 8, 1).forward, "x c prev_ids pos"),
        (diffusion_transformer.Block(8, 1).forward, "x z pe_func"),
        (FlowMatchEulerDiscreteScheduler().set_timesteps, "num_inference_steps mu"),
        (
            FlowMatchEulerDiscreteScheduler().step,
            "model_output timestep sample generator return_dict",
        ),
        (DDPMScheduler().set_timesteps, "num_inference_steps device timesteps"),
        (DDPMScheduler().step, "model_output timestep sample generator return_dict"),
    ],
    ids=lambda value: getattr(value, "__qualname__", type(value).__name__),
)
def test_public_arguments_keep_their_names_and_places(function, names):
    expected = names.split()
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected
