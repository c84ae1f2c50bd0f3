"""Drawings share models, schedulers, pipelines and threads, and change none of each other."""

import gc
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchHeunDiscreteScheduler

from tests.pipelines.conftest import (
    MAKERS,
    QUICK,
    make_class_pipeline,
    make_pipeline,
    make_video_pipeline,
    seeded,
)
from tests.tiny import make_model

SETTINGS = [
    {"num_inference_steps": 2, "guidance_scale": 1.0},
    {"num_inference_steps": 4, "num_diffusion_steps": 3, "guidance_scale": 7.5},
    {"num_diffusion_steps": 4, "min_guidance_scale": 1.5, "guidance_trunc": 500.0},
    {"guidance_renorm": 0.5, "guidance_scale": 3.0, "num_images_per_prompt": 2},
    {"guidance_interval": (100.0, 700.0), "num_inference_steps": 2},
]
TEXTS = ["a cat", "the red dog on the mat", "", "red"]


@pytest.fixture(autouse=True)
def _many_switches():
    """One thread of PyTorch's per thread of Python's, which take turns often."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def draw(pipe, prompt=None, seed=0, **options):
    """Latents or pixels, one drawing's tensor."""
    arguments = call_arguments(pipe, prompt, seed=seed, **options)
    return pipe(return_dict=False, **arguments)[0]


def call_arguments(pipe, prompt=None, seed=0, **options):
    is_class = pipe.transformer.label_embed is not None
    prompt = (3 if is_class else "a cat") if prompt is None else prompt
    if is_video(pipe):
        options = {"max_latent_length": 2, **options}
    defaults = {"prompt": prompt, "generator": seeded(seed), "output_type": "latent", **QUICK}
    return {**defaults, **options}


def is_video(pipe):
    return pipe.transformer.config["video_base_size"][0] > 1


def in_threads(jobs, workers=8):
    """Results of jobs that run at the same time."""
    with ThreadPoolExecutor(workers) as executor:
        return [future.result() for future in [executor.submit(job) for job in jobs]]


# Who shares what: pipelines of one set of parts


def one_pipeline(make):
    return [make()]


def all_components(make):
    pipe = make()
    return [pipe, type(pipe)(**pipe.components)]


def a_transformer_under_two_schedulers(make):
    pipe = make()
    parts = {**pipe.components, "scheduler": DDPMScheduler()}
    return [pipe, type(pipe)(**parts)]


def a_scheduler_of_texts_and_classes(make):
    pipe = make()
    return [pipe, make_class_pipeline(scheduler=pipe.scheduler)]


def make_short_tiles():
    """A video pipeline that decodes two latent frames at a time, for short streams."""
    pipe = make_video_pipeline()
    pipe.vae.sample_min_t, pipe.vae.latent_min_t = 5, 2
    return pipe


def settings_of(pipe, index):
    """A drawing of its own for each index."""
    is_class = pipe.transformer.label_embed is not None
    setting = dict(SETTINGS[index % len(SETTINGS)])
    if hasattr(pipe.scheduler, "set_shift"):
        setting["flow_shift"] = 1.0 + index % 3
    return {"prompt": index % 10 if is_class else TEXTS[index % 4], "seed": index, **setting}


def assert_all_equal_those_alone(share, make, count):
    alone = [
        draw(pipe, **settings_of(pipe, index))
        for pipes in [share(make)]
        for index in range(count)
        for pipe in [pipes[index % len(pipes)]]
    ]
    pipes = share(make)

    def job(index):
        pipe = pipes[index % len(pipes)]
        return lambda: draw(pipe, **settings_of(pipe, index))

    together = in_threads([job(index) for index in range(count)])
    different = [i for i in range(count) if not torch.equal(alone[i], together[i])]
    assert not different


@pytest.mark.parametrize(
    "share",
    [
        one_pipeline,
        all_components,
        a_transformer_under_two_schedulers,
        a_scheduler_of_texts_and_classes,
    ],
)
@pytest.mark.parametrize("kind", ["text", "video"])
def test_drawings_in_threads_equal_those_alone(share, kind):
    assert_all_equal_those_alone(share, MAKERS[kind], count=20)


def test_classes_drawn_in_threads_equal_those_alone():
    assert_all_equal_those_alone(all_components, make_class_pipeline, count=20)


@pytest.mark.parametrize("share", [one_pipeline, all_components])
def test_eight_threads_draw_twenty_each(share):
    assert_all_equal_those_alone(share, make_pipeline, count=160)


def test_models_in_training_are_drawn_with_in_threads(kind):
    """All threads share the mode of a model: none may change it for another."""
    alone = [draw(MAKERS[kind](), seed=seed) for seed in range(8)]
    pipe = MAKERS[kind]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.train()
    together = in_threads([lambda seed=seed: draw(pipe, seed=seed) for seed in range(8)])
    assert all(map(torch.equal, alone, together))
    assert all(part.training for part in pipe.transformer.modules())


def test_pixels_are_decoded_in_threads(kind):
    pipe = MAKERS[kind]()
    alone = [draw(pipe, seed=seed, output_type="pt") for seed in range(2)]
    together = in_threads(
        [lambda seed=seed: draw(pipe, seed=seed, output_type="pt") for seed in range(2)]
    )
    assert all(map(torch.equal, alone, together))


def test_prompts_are_encoded_in_threads():
    """By one tokenizer, which has to cut them to other lengths for another model."""
    pipe = make_pipeline()
    shorter = make_pipeline(**{**pipe.components, "transformer": make_model(text_token_len=3)})
    pipes = [pipe, shorter] * 32
    prompts = [
        [
            " ".join(["red", "cat", "dog"][(i + j) % 3] for j in range(1 + (i + k) % 40))
            for k in range(20)
        ]
        for i in range(len(pipes))
    ]
    jobs = [partial(*job) for job in zip([p.encode_prompt for p in pipes], prompts, strict=True)]
    alone = [job() for job in jobs]
    assert all(map(torch.equal, alone, in_threads(jobs)))


@pytest.mark.parametrize("offload", ["models", "layers"])
def test_offloaded_weights_serve_one_thread_after_the_other(offload):
    from accelerate import cpu_offload

    alone = [draw(make_pipeline(), seed=seed) for seed in range(8)]
    pipe = make_pipeline()
    if offload == "models":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            cpu_offload(part, torch.device("cpu"))
    together = in_threads([lambda seed=seed: draw(pipe, seed=seed) for seed in range(8)], 4)
    assert all(map(torch.equal, alone, together))


# Calls inside of calls


@pytest.mark.parametrize(
    "inner", [one_pipeline, all_components, a_transformer_under_two_schedulers]
)
def test_a_callback_may_draw(kind, inner):
    options = {"num_inference_steps": 2, "num_diffusion_steps": 3, "guidance_scale": 2.0, "seed": 5}
    outer, other = (lambda pipes: (pipes[0], pipes[-1]))(inner(MAKERS[kind]))
    expected = draw(outer), draw(other, **options)
    found = []

    def callback(pipe, step, frame, values):
        found.append(draw(other, **options))
        return values

    assert torch.equal(draw(outer, callback_on_step_end=callback), expected[0])
    assert len(found) >= 3 and all(torch.equal(x, expected[1]) for x in found)


def test_a_callback_of_offloaded_models_is_told_that_it_cannot_draw():
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(RuntimeError, match="a callback cannot draw while whole models"):
        draw(pipe, callback_on_step_end=lambda *_: draw(pipe))
    assert torch.equal(draw(pipe), draw(make_pipeline()))


# Streams


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_streams_and_calls_take_turns(output_type):
    """Of one pipeline, from two streams and whole calls; other steps, weights and shifts each."""
    first = {"max_latent_length": 3, "flow_shift": 2.0, "output_type": output_type}
    second = {"max_latent_length": 3, "flow_shift": 3.0, "num_diffusion_steps": 3, "seed": 1}
    third = {"guidance_scale": 1.0, "seed": 2, "flow_shift": 1.0, "max_latent_length": 1}
    expected = [draw(make_short_tiles(), **options) for options in (first, second, third)]
    pipe = make_short_tiles()
    streams = [pipe.stream(**call_arguments(pipe, **options)) for options in (first, second)]
    pieces = ([], [])
    for parts in zip(*streams, strict=True):
        for held, part in zip(pieces, parts, strict=True):
            held.append(part)
        assert torch.equal(draw(pipe, **third), expected[2])
    assert len(pieces[0]) == 2
    for held, whole in zip(pieces, expected, strict=False):
        assert torch.equal(torch.cat(held, dim=2), whole)


def test_a_stream_goes_on_with_the_components_that_it_began_with():
    expected = draw(make_short_tiles(), max_latent_length=3, output_type="pt")
    pipe = make_short_tiles()
    stream = pipe.stream(**call_arguments(pipe, max_latent_length=3, output_type="pt"))
    replaced = []
    for piece in stream:
        pipe.register_modules(transformer=None, vae=None, scheduler=None, text_encoder=None)
        replaced.append(piece)
    assert torch.equal(torch.cat(replaced, dim=2), expected)


# Stops


def test_a_stop_in_a_callback_stops_its_own_drawing_alone(kind):
    """Both drawings are under way when one stops, and the other continues."""
    whole = draw(MAKERS[kind]())
    pipe = MAKERS[kind]()
    both_draw, has_stopped = threading.Barrier(2), threading.Event()
    steps = {"stopped": 0, "other": 0}

    def stop(pipe, step, frame, values):
        steps["stopped"] += 1
        both_draw.wait(timeout=60)
        pipe._interrupt = True
        return values

    def wait(pipe, step, frame, values):
        if not steps["other"]:
            both_draw.wait(timeout=60)
            assert has_stopped.wait(timeout=60)
        assert not pipe.interrupt
        steps["other"] += 1
        return values

    def stopped():
        draw(pipe, callback_on_step_end=stop)
        has_stopped.set()

    _, other = in_threads([stopped, lambda: draw(pipe, callback_on_step_end=wait)])
    assert steps["stopped"] == 1 < steps["other"]
    assert torch.equal(other, whole)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_from_outside_stops_what_the_pipeline_draws(is_streamed):
    pipe, other = all_components(make_video_pipeline)
    whole = draw(other)
    begun, goes_on = threading.Barrier(3), threading.Event()
    steps = {pipe: 0, other: 0}

    def callback(pipe, step, frame, values):
        steps[pipe] += 1
        if steps[pipe] == 1:
            begun.wait(timeout=60)
            assert goes_on.wait(timeout=60)
        return values

    def draw_it(pipe):
        arguments = call_arguments(pipe, callback_on_step_end=callback)
        return list(pipe.stream(**arguments)) if is_streamed else pipe(**arguments).frames

    with ThreadPoolExecutor(2) as executor:
        drawings = [executor.submit(draw_it, one) for one in (pipe, other)]
        begun.wait(timeout=60)
        pipe._interrupt = True
        goes_on.set()
        results = [drawing.result() for drawing in drawings]
    assert steps == {pipe: 1, other: 6}
    assert torch.equal(results[1][0] if is_streamed else results[1], whole)
    assert torch.equal(draw(pipe), whole)


# Traces


def refused(**options):
    def call(pipe):
        first = {"image": np.zeros((64, 96, 3), np.uint8)} if is_video(pipe) else {}
        generator = seeded()
        before = generator.get_state()
        given = {"flow_shift": 3.0, "generator": generator, **first, **options}
        arguments = call_arguments(pipe, **given)
        for refuse in (pipe, pipe.stream):
            with pytest.raises((TypeError, ValueError)):
                refuse(**arguments)
        assert torch.equal(generator.get_state(), before)

    return call


def accepted(**options):
    return lambda pipe: draw(pipe, **options)


def fail(pipe):
    def callback(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(pipe, callback_on_step_end=callback, flow_shift=3.0)


def stop(pipe):
    def callback(pipe, step, frame, values):
        pipe._interrupt = True
        return values

    draw(pipe, callback_on_step_end=callback)


def abandon(pipe, pieces=1):
    length = 3 if is_video(pipe) else 1
    stream = pipe.stream(**call_arguments(pipe, max_latent_length=length, flow_shift=3.0))
    for _ in range(pieces):
        next(stream)
    del stream
    gc.collect()


def encode(pipe):
    prompts = [1, 2] if pipe.transformer.text_embed is None else ["a cat on the mat", "red"] * 4
    pipe.encode_prompt(prompts, num_images_per_prompt=2)


CALLS = {
    "accepted": accepted(),
    "accepted without guidance": accepted(guidance_scale=1.0),
    "accepted as pixels": accepted(output_type="np"),
    "encoding": encode,
    "failing": fail,
    "stopped": stop,
    "abandoned": abandon,
    "abandoned before it began": lambda pipe: abandon(pipe, pieces=0),
    "NaN flow shift": refused(flow_shift=float("nan")),
    "no flow shift": refused(flow_shift=0.0),
    "no steps": refused(num_diffusion_steps=0),
    "negative guidance": refused(guidance_scale=-1.0),
    "two kinds of guidance": refused(image_guidance_scale=1.0, spatiotemporal_guidance_scale=1.0),
    "unknown output": refused(output_type="jpg"),
    "no prompt": refused(prompt=[]),
    "prompt of another kind": refused(prompt=[object()]),
    "generators of other samples": refused(generator=[seeded(), seeded(), seeded()]),
    "more negative prompts": refused(negative_prompt=["red", "red"]),
    "latents of another size": refused(latents=[torch.zeros(1, 4, 3, 3)]),
    "another height": refused(height=13),
}


def traces(pipe):
    """Everything that a call could leave changed."""
    model = pipe.transformer
    encoder = None if model.text_embed is None else model.text_embed.encoders
    tokenizer = getattr(pipe, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "modes": {
            (name, path): module.training
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
            for path, module in part.named_modules()
        },
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "scheduler": {name: str(value) for name, value in vars(pipe.scheduler).items()},
        "model": {name: id(value) for name, value in vars(model).items() if name != "training"},
        "settings": [model.sample_scheduler, model.noise_scheduler, model.loss_repeat, encoder],
        "pipeline": {name: id(value) for name, value in vars(pipe).items()},
        "tokenizer": backend and str((backend.truncation, backend.padding)),
        "interrupt": pipe.interrupt,
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in np.random.get_state()],
        "python": random.getstate(),
    }


def in_mixed_modes(pipe):
    """Training, with dropout of nearly all conditions, but for a part in each model."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.train()
            list(part.children())[-1].eval()
    for embed in (pipe.transformer.text_embed, pipe.transformer.label_embed):
        if embed is not None:
            embed.dropout = 0.9
            embed.train()
    return pipe


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_no_trace(kind, call):
    pipe = MAKERS[kind]()
    rows = pipe.encode_prompt([1, 2] if kind == "class" else ["a cat on the mat", "red"])
    expected = draw(pipe, seed=7)
    pipe = in_mixed_modes(MAKERS[kind]())
    before = traces(pipe)
    CALLS[call](pipe)
    after = traces(pipe)
    assert {name: after[name] == before[name] for name in before} == dict.fromkeys(before, True)
    again = pipe.encode_prompt([1, 2] if kind == "class" else ["a cat on the mat", "red"])
    assert torch.equal(again, rows)
    assert torch.equal(draw(pipe, seed=7), expected)


def test_a_heun_scheduler_keeps_no_state_of_an_unfinished_drawing():
    """Its steps come in pairs, and the second one reads what the first one left."""
    expected = draw(make_pipeline(scheduler=FlowMatchHeunDiscreteScheduler()))
    pipe = make_pipeline(scheduler=FlowMatchHeunDiscreteScheduler())
    fail_at_once = {"callback_on_step_end": lambda *_: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        draw(pipe, **fail_at_once)
    together = in_threads([lambda: draw(pipe)] * 8)
    assert all(torch.equal(x, expected) for x in together)


def test_threads_keep_their_own_flow_shift():
    pipe = make_pipeline()
    plain, shifted = draw(pipe), draw(make_pipeline(), flow_shift=3.0)
    with ThreadPoolExecutor(1) as executor:
        assert torch.equal(executor.submit(draw, pipe, flow_shift=3.0).result(), shifted)
        assert torch.equal(draw(pipe), plain)
        assert torch.equal(executor.submit(draw, pipe).result(), shifted)
