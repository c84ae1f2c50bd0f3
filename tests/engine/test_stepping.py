"""Training steps at the released sizes on a GPU that is not there: what they launch, and no wait.

A step that waits for the device, copies from pageable memory or mixes floating-point types fails
here, in every precision.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch.nn import functional as F

from diffnext.config.load import parse
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import config_to_class, config_to_object
from diffnext.engine.engine_utils import get_param_groups
from diffnext.engine.model_ema import ModelEMA
from diffnext.engine.stepping import Stepper
from diffnext.models import attention
from diffnext.models.flex_attention import make_block_mask
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.utils.accelerate_utils import build_accelerator
from diffnext.utils.omegaconf_utils import get_config
from tests.fake_cuda import DEVICE, FakeCuda, move_to_fake_cuda
from tests.models.test_launches import CONFIGS, IMAGES, VIDEOS, load
from tests.tiny import make_vae

FRAMES = {IMAGES: 1, VIDEOS: 9}
MOST_LAUNCHES = {
    (IMAGES, "no"): 1860,
    (IMAGES, "bf16"): 3200,
    (IMAGES, "fp16"): 3200,
    (VIDEOS, "no"): 1810,
    (VIDEOS, "bf16"): 3110,
    (VIDEOS, "fp16"): 3110,
}


@pytest.fixture
def one_kernel(monkeypatch):
    """FlexAttention, which only a GPU can compile: the mask is built, and one kernel attends."""
    monkeypatch.setattr(attention, "can_flex", lambda *_: True)
    kernel = mock.Mock(side_effect=lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v))
    monkeypatch.setattr(attention, "attend_flex", kernel)
    make_block_mask.cache_clear()
    yield kernel
    make_block_mask.cache_clear()


def read_config(name, precision, *overrides):
    file = CONFIGS / f"{name}.yaml"
    options = ["experiment.output_dir=none", f"training.mixed_precision={precision}", *overrides]
    return parse(get_config([f"config={file}", "training.max_grad_norm=1", *options]), TrainConfig)


def make_stepper(model, config):
    """What the trainer steps with, on the device."""
    with mock.patch.object(PartialState, "default_device", DEVICE):
        accelerator = build_accelerator(config)
    parts = (model, FlowMatchEulerDiscreteScheduler(), make_vae(), None, None)
    pipeline = config_to_class(config.pipeline)(*parts)
    model = pipeline.prepare_model(config)
    optimizer = config_to_object(config.optimizer, params=get_param_groups(model))
    return Stepper(config, accelerator, pipeline, *accelerator.prepare(model, optimizer))


def make_batch(config, name):
    """A batch as the loader gives it."""
    size, frames = config.training.batch_size, FRAMES[name]
    height, width = (
        side // 8 for side in config.pipeline.paths.module_config.transformer.image_size
    )
    shape = (height, width) if frames == 1 else (frames, height, width)
    batch = {
        "latents": np.zeros((size, 8, *shape), np.float16),
        "prompt": [np.zeros((20 + index, 2560), np.float16) for index in range(size)],
    }
    return batch if frames == 1 else {**batch, "motion_flow": [5.0] * size}


@pytest.mark.parametrize(("name", "precision"), MOST_LAUNCHES)
def test_a_training_step_waits_for_nothing(name, precision, one_kernel):
    config, model = read_config(name, precision), load(name, torch.float32)
    with FakeCuda(may_mix=precision != "no") as device:
        stepper = make_stepper(model, config)
        device.pageable.clear()
        for _ in range(2):  # the first one makes the optimizer's state, and the mask
            launches = device.total
            device.fetched.clear()
            losses = stepper.run_micro_batch(make_batch(config, name))
            outcome = stepper.step_optimizer()
            assert device.fetched == {(): 1}  # whether it was finite
        launches = device.total - launches
        assert {one.device for one in (*losses.values(), outcome.norm)} == {DEVICE}
    assert not device.pageable
    assert MOST_LAUNCHES[name, precision] - 100 < launches <= MOST_LAUNCHES[name, precision]
    masks = {id(call.args[3]) for call in one_kernel.call_args_list}
    assert len(masks) == (name == VIDEOS)
    assert one_kernel.call_count == len(masks) * 2 * len(model.video_encoder.blocks)


def test_only_optimizers_that_are_not_fused_wait(one_kernel):
    config = read_config(IMAGES, "no", "optimizer.params.fused=false")
    model = load(IMAGES, torch.float32)
    for part in (model.video_encoder, model.image_encoder, model.image_decoder):
        part.blocks = part.blocks[:1]  # is enough
    model.image_encoder.encoder_depth = 0
    with FakeCuda():
        stepper = make_stepper(model, config)
        stepper.run_micro_batch(make_batch(config, IMAGES))
        with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
            stepper.step_optimizer()


@pytest.mark.parametrize("device_of_average", ["cpu", "gpu"])
def test_averages_move_without_a_wait(device_of_average):
    live = move_to_fake_cuda(lambda: nn.Linear(3, 5), torch.float32)
    with FakeCuda() as device:
        ema = ModelEMA(nn.Linear(3, 5) if device_of_average == "cpu" else live)
        for parameter in ema.model.parameters():
            if device_of_average == "cpu":
                parameter.data = parameter.data.pin_memory()
        ema.update_from((one, one) for one in live.parameters())
    assert not device.pageable
    moved = {(5, 3): 1, (5,): 1} if device_of_average == "cpu" else {}
    assert device.fetched == {(2,): 1, **moved}  # and whether they were finite
