"""Training on videos through the pipeline."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from diffnext.pipelines.nova.pipeline_train_t2v import NOVATrainT2VPipeline
from tests.pipelines.conftest import make_video_pipeline


@pytest.fixture
def trainer():
    return NOVATrainT2VPipeline(**make_video_pipeline().components)


def configure(pipe, **options):
    return pipe.configure_model(OmegaConf.create({"model": options}))


def batch(**overrides):
    moments = np.random.default_rng(0).normal(size=(2, 8, 3, 8, 12)).astype(np.float16)
    return {"latents": moments, "prompt": ["a cat", "a dog"], "motion_flow": [5.0, 3], **overrides}


def test_a_batch_of_videos_gives_two_losses(trainer):
    losses = configure(trainer, loss_repeat=2)(batch())
    sum(losses.values()).backward()
    assert sorted(losses) == ["loss_i2i", "loss_t2i"]
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_what_stays_frozen_for_videos(trainer):
    model = configure(trainer)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    prefixes = ("text_embed.norm.", "motion_embed.")
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


def test_the_flow_of_a_record_reaches_the_model(trainer):
    model = configure(trainer)

    def losses(flow):
        torch.manual_seed(0)
        np.random.seed(0)
        return model(batch(motion_flow=flow))["loss_i2i"]

    with torch.no_grad():
        assert torch.equal(losses([5.0, 3]), losses([5.0, 3]))
        assert not torch.equal(losses([5.0, 3]), losses([5.0, 9]))


def test_an_image_cache_trains_a_video_model_on_first_frames(trainer):
    moments = np.zeros((2, 8, 8, 12), np.float16)
    losses = configure(trainer)(batch(latents=moments))
    assert list(losses) == ["loss"]
