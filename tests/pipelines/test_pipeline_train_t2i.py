"""The training pipeline: batches in, losses out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline
from tests.pipelines.conftest import make_text_encoder, make_tokenizer
from tests.tiny import make_model, make_vae


@pytest.fixture
def train_pipe():
    model = make_model()
    return NOVATrainT2IPipeline(
        model, model.sample_scheduler, make_vae(), make_text_encoder(), make_tokenizer()
    )


def configure(pipe, **options):
    return pipe.configure_model(OmegaConf.create({"model": options}))


def batch(**overrides):
    moments = np.random.default_rng(0).normal(size=(2, 8, 8, 12)).astype(np.float16)
    return {"latents": moments, "prompt": ["a cat", "a dog"], **overrides}


def test_a_batch_gives_a_loss_and_stays_as_it_is(train_pipe):
    model = configure(train_pipe, loss_repeat=2)
    inputs = batch()
    loss = model(inputs)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert sorted(inputs) == ["latents", "prompt"]


def test_each_step_samples_the_posterior_anew(train_pipe):
    model = configure(train_pipe)
    first, second = (train_pipe.preprocess(batch())["x"] for _ in range(2))
    assert first.shape == (2, 4, 8, 12) and not torch.equal(first, second)
    assert model.training


def test_cached_states_serve_as_prompts(train_pipe):
    model = configure(train_pipe)
    states = [np.zeros((3, 64), np.float16), np.zeros((7, 64), np.float16)]
    assert torch.isfinite(model(batch(prompt=states))["loss"])


def test_frozen_parts(train_pipe):
    model = configure(train_pipe)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    prefixes = ("text_embed.norm.", "video_pos_embed.", "video_encoder.patch_embed.")
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


@pytest.mark.parametrize(
    "make_section",
    [dict, OmegaConf.create, lambda options: SimpleNamespace(**options)],
    ids=["mapping", "OmegaConf", "attributes"],
)
def test_options_reach_the_model(train_pipe, make_section):
    options = {"loss_repeat": 7, "gradient_checkpointing": 2}
    model = train_pipe.configure_model(SimpleNamespace(model=make_section(options)))
    assert model.loss_repeat == 7
    assert all(block.mlp_checkpointing for block in model.image_encoder.blocks)
    assert not any(block.mlp_checkpointing for block in model.image_decoder.blocks)


def test_the_share_of_hidden_tokens_can_be_chosen(train_pipe):
    model = configure(train_pipe, mask_ratios=[0.1, 0.3, 0.5])
    masks = [model.mask_embed.draw_mask(torch.zeros(1, 20, 8)).hidden.mean() for _ in range(30)]
    assert all(0.1 <= share <= 0.3 for share in masks)
    assert len({share.item() for share in masks}) > 2


def test_batches_are_prepared_in_training_mode_only(train_pipe):
    configure(train_pipe).eval()
    with pytest.raises(RuntimeError, match="in training mode only"):
        train_pipe.preprocess(batch())


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"images": 0}, NotImplementedError, "not 'images'"),
        ({"prompt": ["a"]}, ValueError, "needs 'latents'"),
        ({"latents": np.zeros((1, 2), np.int32)}, ValueError, "got torch.int32"),
    ],
)
def test_batches_without_moments_are_refused(train_pipe, inputs, error, message):
    configure(train_pipe)
    with pytest.raises(error, match=message):
        train_pipe.preprocess(inputs)
