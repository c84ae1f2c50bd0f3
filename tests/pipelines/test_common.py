"""What the pipeline tests of diffusers check, for both generating pipelines.

docs/pipeline_tests.md lists which of these hold.
"""

import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from tests.pipelines.conftest import MAKERS, QUICK, seeded

PROMPTS = {
    "text": ["a cat", "a dog", "red"],
    "video": ["a cat", "a dog", "red"],
    "class": [3, 1, 4],
}


@pytest.fixture
def pipe(kind):
    return MAKERS[kind]()


def draw(pipe, kind, prompt=None, **options):
    """Pixels, (B, 3, ...)."""
    options = {"generator": seeded(), "output_type": "pt", "return_dict": False, **options}
    if kind == "video":
        options = {"max_latent_length": 2, **options}
    (result,) = pipe(PROMPTS[kind][0] if prompt is None else prompt, **options, **QUICK)
    return result


def test_save_and_load(pipe, kind, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    torch.testing.assert_close(draw(loaded, kind), draw(pipe, kind), atol=1e-5, rtol=1e-5)


def test_save_and_load_of_absent_components(kind, tmp_path):
    pipe = MAKERS[kind]()
    for name in ("vae", "text_encoder", "tokenizer"):
        if name in pipe.components:
            pipe.register_modules(**{name: None})
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert loaded.vae is None
    if kind == "class":
        latents = draw(loaded, kind, output_type="latent")
        assert torch.isfinite(latents).all()


def test_save_and_load_in_half_precision(pipe, kind, tmp_path):
    pipe.to(torch.float16)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, dtype=torch.float16)
    modules = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in modules for p in part.parameters()} == {torch.float16}
    results = [draw(one, kind, output_type="latent") for one in (loaded, pipe)]
    torch.testing.assert_close(*results, atol=5e-2, rtol=1e-2)


def test_half_precision_is_near_full_precision(kind):
    full = draw(MAKERS[kind](), kind, output_type="latent")
    for dtype, tolerance in ((torch.float16, 0.03), (torch.bfloat16, 0.2)):
        half = draw(MAKERS[kind]().to(dtype), kind, output_type="latent")
        assert half.dtype == dtype
        assert (half.float() - full).abs().mean() < tolerance


def test_dict_and_tuple_are_equal(pipe, kind):
    options = {"generator": seeded(), "output_type": "pt", **QUICK}
    result = pipe(PROMPTS[kind][0], **options)
    (value,) = pipe(PROMPTS[kind][0], **{**options, "generator": seeded()}, return_dict=False)
    assert torch.equal(next(iter(result.values())), value)


def test_each_sample_of_a_batch_equals_the_sample_alone(pipe, kind):
    generators = [seeded(i) for i in range(3)]
    batch = draw(pipe, kind, PROMPTS[kind], generator=generators)
    assert len(batch) == 3
    for row, prompt in enumerate(PROMPTS[kind]):
        alone = draw(pipe, kind, prompt, generator=[seeded(row)])
        torch.testing.assert_close(batch[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2])
def test_num_images_per_prompt(pipe, kind, count, prompts):
    images = draw(pipe, kind, PROMPTS[kind][:prompts], num_images_per_prompt=count)
    assert len(images) == count * prompts


def test_generator_lists_must_fit_the_batch(pipe, kind):
    with pytest.raises(ValueError, match="2 generators are given for 3 samples"):
        draw(pipe, kind, PROMPTS[kind], generator=[seeded(), seeded(1)])


def test_the_same_seed_gives_the_same_result(pipe, kind):
    first = draw(pipe, kind)
    assert torch.equal(first, draw(pipe, kind))
    assert not torch.equal(first, draw(pipe, kind, generator=seeded(1)))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(pipe, kind, output_type):
    result = draw(pipe, kind, output_type=output_type)
    expected = draw(pipe, kind)
    if output_type == "latent":
        assert result.shape == (1, 4, 2 if kind == "video" else 1, 8, 12)
    elif output_type == "pt":
        assert torch.equal(result, expected)
    else:
        array = np.stack([np.asarray(image) for image in result])
        reference = (expected * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).movedim(1, -1)
        assert np.array_equal(array, reference.numpy())


def test_prompts_are_encoded_apart(kind):
    """States of one pipeline serve another that has no text encoder."""
    if kind == "class":
        pytest.skip("classes have no encoder")
    pipe = MAKERS[kind]()
    states = pipe.encode_prompt(PROMPTS[kind], negative_prompt="the mat")
    positive, negative = states.chunk(2)
    bare = MAKERS[kind](text_encoder=None, tokenizer=None)
    options = {"output_type": "pt", "max_latent_length": 2 if kind == "video" else 1}
    by_states = bare(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        generator=seeded(),
        return_dict=False,
        **options,
        **QUICK,
    )[0]
    by_text = draw(pipe, kind, PROMPTS[kind], negative_prompt="the mat")
    torch.testing.assert_close(by_states, by_text, atol=1e-5, rtol=1e-5)


def test_moving_between_types(pipe, kind):
    before = draw(pipe, kind)
    pipe.to(torch.float64)
    assert draw(pipe, kind).dtype == torch.float64
    pipe.to(torch.float32)
    torch.testing.assert_close(draw(pipe, kind), before)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        DDPMScheduler(),
        DDIMScheduler(),
        EulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_can_be_swapped(pipe, kind, scheduler):
    before = draw(pipe, kind)
    pipe.scheduler = scheduler
    swapped = draw(pipe, kind)
    assert torch.isfinite(swapped).all() and not torch.equal(swapped, before)
    assert torch.equal(swapped, draw(pipe, kind))


def test_a_scheduler_that_does_not_fit_is_refused(pipe, kind):
    pipe.scheduler = DDPMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="DDPMScheduler has the prediction_type 'sample'"):
        draw(pipe, kind)


def test_components_and_signature_agree(pipe):
    arguments = set(inspect.signature(type(pipe).__init__).parameters)
    assert set(pipe.components) == arguments - {"self", "trust_remote_code"}
    for name, component in pipe.components.items():
        assert getattr(pipe, name) is component


def test_components_serve_a_second_pipeline(pipe, kind):
    other = type(pipe)(**pipe.components)
    assert torch.equal(draw(other, kind), draw(pipe, kind))


def test_one_whole_model_is_moved_at_a_time(pipe, kind):
    """Model offload with the CPU in the place of the accelerator: the hooks do run."""
    before = draw(pipe, kind)
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(draw(pipe, kind), before)
    assert len(pipe._all_hooks) == sum(
        isinstance(part, torch.nn.Module) for part in pipe.components.values()
    )


def test_weights_are_fetched_layer_by_layer(pipe, kind):
    """Sequential offload with the CPU in the place of the accelerator."""
    before = draw(pipe, kind)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"))
    assert next(pipe.transformer.parameters()).device.type == "meta"
    torch.testing.assert_close(draw(pipe, kind), before)
    assert next(pipe.transformer.parameters()).device.type == "meta"


def test_offloaded_pipelines_stream(kind):
    if kind == "class":
        pytest.skip("classes are not streamed")
    pipe = MAKERS[kind]()
    before = draw(pipe, kind)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"))
    frames = 2 if kind == "video" else 1
    options = {"max_latent_length": frames, "generator": seeded(), "output_type": "pt"}
    pieces = list(pipe.stream(PROMPTS[kind][0], **options, **QUICK))
    torch.testing.assert_close(torch.cat(pieces, dim=2), before)


def test_a_device_map_places_the_components(kind, tmp_path):
    MAKERS[kind]().save_pretrained(tmp_path)
    loaded = type(MAKERS[kind]()).from_pretrained(tmp_path, device_map="cpu")
    assert torch.isfinite(draw(loaded, kind)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_on_a_gpu(kind, method):
    on_device = MAKERS[kind]().to("cuda", torch.float16)
    options = {"generator": seeded()}
    before = draw(on_device, kind, **options).cpu()
    offloaded = MAKERS[kind]().to(torch.float16)
    getattr(offloaded, method)()
    after = draw(offloaded, kind, generator=seeded()).cpu()
    torch.testing.assert_close(after, before, atol=1e-2, rtol=1e-2)
    assert next(offloaded.transformer.parameters()).device.type != "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu(kind, dtype):
    full = draw(MAKERS[kind]().to("cuda"), kind).cpu()
    half = draw(MAKERS[kind]().to("cuda", dtype), kind).float().cpu()
    assert (half - full).abs().mean() < 0.05
