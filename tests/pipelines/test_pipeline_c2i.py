"""Class-conditional images: generation and training."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from diffnext.pipelines.nova.pipeline_train_c2i import NOVATrainC2IPipeline
from tests.pipelines.conftest import QUICK, make_class_pipeline, seeded
from tests.tiny import make_model


def test_output_types_of_classes(class_pipe):
    pil = class_pipe(7, generator=seeded(), **QUICK)
    assert [type(image) for image in pil.images] == [Image.Image] and "frames" not in pil
    array = class_pipe([7, 8], output_type="np", **QUICK).images
    assert array.dtype == np.uint8 and array.shape == (2, 64, 96, 3)
    assert class_pipe(7, output_type="pt", **QUICK).images.shape == (1, 3, 64, 96)
    assert class_pipe(7, output_type="latent", **QUICK).images.shape == (1, 4, 1, 8, 12)


def test_classes_make_a_difference(class_pipe):
    options = {"output_type": "latent", **QUICK}
    one, other = (class_pipe(c, generator=seeded(), **options).images for c in (0, 1))
    assert not torch.equal(one, other)


def test_class_zero_can_be_avoided(class_pipe):
    """Zero is a class, not the absence of one."""
    rows = class_pipe.encode_prompt([5, 6], negative_prompt=0)
    table = class_pipe.transformer.label_embed
    with torch.no_grad():
        expected = table(torch.tensor([5, 6, 0, 0]))
    assert torch.equal(rows, expected)
    null = class_pipe.encode_prompt([5], do_classifier_free_guidance=True)
    assert torch.equal(null[1], table(torch.tensor([1000]))[0])


def test_images_of_a_class_stand_together(class_pipe):
    rows = class_pipe.encode_prompt([5, 6], num_images_per_prompt=2)
    assert rows.shape == (4, 1, 64)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3])
    assert not torch.equal(rows[0], rows[2])


def test_the_guidance_of_classes_can_start_lower(class_pipe):
    options = {"output_type": "latent", **QUICK}
    plain = class_pipe(3, generator=seeded(), **options).images
    growing = class_pipe(3, generator=seeded(), min_guidance_scale=1, **options).images
    assert not torch.equal(plain, growing)


def test_a_text_model_takes_no_classes():
    pipe = make_class_pipeline(transformer=make_model())
    with pytest.raises(ValueError, match="takes texts, not classes"):
        pipe(1, **QUICK)


@pytest.fixture
def trainer(class_pipe):
    return NOVATrainC2IPipeline(**class_pipe.components)


def configure(pipe, **options):
    return pipe.configure_model(OmegaConf.create({"model": options}))


def batch(**overrides):
    moments = np.random.default_rng(0).normal(size=(2, 8, 8, 12)).astype(np.float16)
    return {"latents": moments, "prompt": [3, 999], **overrides}


def test_a_batch_of_classes_gives_a_loss(trainer):
    inputs = batch()
    losses = configure(trainer, loss_repeat=2)(inputs)
    losses["loss"].backward()
    assert list(losses) == ["loss"] and torch.isfinite(losses["loss"])
    assert trainer.model.label_embed.weight.grad is not None
    assert sorted(inputs) == ["latents", "prompt"]


def test_what_stays_frozen_for_classes(trainer):
    model = configure(trainer)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    prefixes = ("label_embed.norm.", "video_pos_embed.", "video_encoder.patch_embed.")
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["a cat", "a dog"], "records with a label, got captions"),
        ([3, 1000], r"from 0 to 999, got \[3, 1000\]"),
        ([0.5, 1.0], "whole numbers"),
    ],
)
def test_labels_that_are_none_are_refused(trainer, prompt, message):
    configure(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.preprocess(batch(prompt=prompt))


def test_a_batch_without_labels_is_refused(trainer):
    configure(trainer)
    inputs = batch()
    del inputs["prompt"]
    with pytest.raises(ValueError, match="needs class ids as 'prompt'"):
        trainer.preprocess(inputs)
