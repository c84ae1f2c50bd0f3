"""NOVAPipeline: what it returns, which errors it raises, what it does not change."""

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.pipelines.pipeline_utils import cosine_set_sizes
from tests.pipelines.conftest import QUICK, make_pipeline, make_video_pipeline, seeded


def test_output_types(pipe):
    pil = pipe("a cat", generator=seeded(), **QUICK)
    assert [type(image) for image in pil.images] == [Image.Image]
    assert pil.images[0].size == (96, 64)
    assert "frames" not in pil and "images" in pil
    array = pipe("a cat", generator=seeded(), output_type="np", **QUICK).images
    assert array.dtype == np.uint8 and array.shape == (1, 64, 96, 3)
    assert np.array_equal(np.asarray(pil.images[0]), array[0])
    assert pipe("a cat", output_type="pt", **QUICK).images.shape == (1, 3, 64, 96)
    latent = pipe("a cat", output_type="latent", **QUICK)
    assert latent.frames.shape == (1, 4, 1, 8, 12)
    assert "images" not in latent


def test_samples_of_one_prompt_stand_together(pipe):
    prompts, guided = ["a cat", "a dog"], {"do_classifier_free_guidance": True}
    rows = pipe.encode_prompt(prompts, num_images_per_prompt=2, **guided)
    assert rows.shape == (8, 7, 64)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3])
    assert torch.equal(rows[4], rows[7])  # the empty negative prompts
    assert not torch.equal(rows[0], rows[2])
    assert torch.equal(rows[4], pipe.transformer.text_embed.weight[:7])


def test_embeddings_do_what_their_texts_do(pipe):
    texts = ["a cat on the mat", "a dog"]
    states = pipe.encode_prompt(texts)
    embeds = [states[0, :5], states[1, :2]]
    by_text = pipe(texts, generator=seeded(), output_type="pt", **QUICK).images
    by_states = pipe(prompt_embeds=embeds, generator=seeded(), output_type="pt", **QUICK).images
    torch.testing.assert_close(by_text, by_states)


def test_embeddings_without_guidance(pipe):
    states = pipe.encode_prompt(["a cat"])
    images = pipe(prompt_embeds=states, guidance_scale=1, output_type="np", **QUICK).images
    assert images.shape == (1, 64, 96, 3)


def test_prompts_do_not_depend_on_their_batch(pipe):
    together = pipe.encode_prompt(["a cat on the mat", "a dog", ""])
    torch.testing.assert_close(together[1:2], pipe.encode_prompt("a dog"))


def test_a_prompt_longer_than_the_model_reads_is_cut(pipe):
    long = pipe.encode_prompt("a cat on the mat a dog red red red")
    assert torch.equal(long, pipe.encode_prompt("a cat on the mat a dog"))


def test_arguments_stay_as_they_are():
    pipe = make_video_pipeline()
    latents = [torch.randn(2, 4, 8, 12)]
    arguments = {
        "prompt": ["a cat", "a dog"],
        "negative_prompt": ["red", ""],
        "latents": latents,
    }
    before = copy.deepcopy(arguments)
    options = {"max_latent_length": 2, **QUICK}
    out = pipe(**arguments, output_type="latent", **options).frames
    pipe(**arguments, output_type="pt", **options)
    assert arguments["prompt"] == before["prompt"]
    assert arguments["negative_prompt"] == before["negative_prompt"]
    assert len(latents) == 1 and torch.equal(latents[0], before["latents"][0])
    assert torch.equal(out[:, :, 0], latents[0])


def test_batches_of_the_decoder_change_nothing(pipe):
    single = pipe("a cat", num_images_per_prompt=3, generator=seeded(), output_type="pt", **QUICK)
    options = {"vae_batch_size": 2, "output_type": "pt", **QUICK}
    double = pipe("a cat", num_images_per_prompt=3, generator=seeded(), **options)
    torch.testing.assert_close(single.images, double.images, atol=1e-5, rtol=1e-5)


def test_flow_shift_stays_until_another_is_given(pipe):
    def draw(**options):
        return pipe("a cat", generator=seeded(), output_type="pt", **options, **QUICK).images

    plain = draw()
    shifted = draw(flow_shift=3.0)
    assert not torch.equal(shifted, plain)
    assert torch.equal(draw(), shifted)
    assert torch.equal(draw(flow_shift=1.0), plain)
    assert pipe.scheduler.shift == 1.0


def test_texts_need_a_text_encoder():
    pipe = make_pipeline(text_encoder=None)
    with pytest.raises(ValueError, match="need a tokenizer and a text encoder"):
        pipe("a cat", **QUICK)


def test_prompts_that_are_cut_are_reported(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe("a cat", output_type="latent", num_inference_steps=1, num_diffusion_steps=1)
        assert not caplog.records
        text = "a cat " * 20
        pipe([text] * 2, output_type="latent", num_inference_steps=1, num_diffusion_steps=1)
    (record,) = caplog.records
    most = pipe.transformer.text_embed.num_tokens
    assert f" tokens, of which the model reads the first {most}: 'a cat a" in record.getMessage()


def test_unknown_arguments_are_reported(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe("a cat", seed=1, guidance=3, **QUICK)
    assert "ignores unknown arguments: ['guidance']" in caplog.text


def test_the_guidance_scale_can_start_lower(pipe):
    options = {"output_type": "latent", **QUICK}
    plain = pipe("a cat", generator=seeded(), **options).frames
    growing = pipe("a cat", generator=seeded(), min_guidance_scale=1, **options).frames
    assert not torch.equal(plain, growing)


def test_a_path_is_no_component(pipe):
    with pytest.raises(TypeError, match="vae must be an object, got the path"):
        pipe.register_module("/some/vae", "vae")


@pytest.mark.parametrize(
    ("steps", "tokens", "head", "tail"),
    [(64, 4096, [1, 4, 6, 9], [100, 100, 101]), (3, 16, [2, 6, 8], [8])],
)
def test_set_sizes_follow_the_cosine(steps, tokens, head, tail):
    sizes = cosine_set_sizes(steps, tokens)
    assert sizes[: len(head)].tolist() == head
    assert sizes[-len(tail) :].tolist() == tail
    assert sizes.sum() == tokens and sizes.dtype == np.int64


def test_small_frames_in_many_steps_have_empty_sets():
    assert (cosine_set_sizes(128, 1440) == 0).sum() == 2
