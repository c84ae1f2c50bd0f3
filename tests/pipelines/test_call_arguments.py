"""One list of call arguments: which values are errors before any work, and which forms are taken.

Every refusal is a single line that names the argument, and comes before a component is called.
"""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.pipelines.conftest import PROMPTS, make_pipeline, seeded
from tests.tiny import generation_inputs

QUICK = {"num_inference_steps": 2, "num_diffusion_steps": 2, "disable_progress_bar": True}
NAN, INF = math.nan, math.inf


def picture(seed=0, size=(64, 96)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def clip(frames=5):
    return np.stack([picture(seed) for seed in range(frames)])


def states(*shape, fill=0.0):
    return torch.full(shape, fill)


def refusal(pipe, call, arguments):
    """The error of a call that must end before any component of the pipeline works."""
    worked = []
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    hooks = [
        module.register_forward_pre_hook(lambda module, _: worked.append(type(module).__name__))
        for part in parts
        for module in part.modules()
    ]
    try:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    message = str(caught.value)
    assert not worked
    assert "\n" not in message and len(message) < 500
    return message


def check_refused(pipes, kind, arguments, words):
    for name in ("__call__", "stream"):
        given = {"prompt": PROMPTS[kind], **QUICK, **arguments}
        message = refusal(pipes[kind], getattr(pipes[kind], name), given)
        assert all(word in message for word in (list(arguments)[-1], *words)), message


NEVER_NUMBERS = {
    "text": "3",
    "list": [3],
    "tuple": (3,),
    "truth": True,
    "NaN": NAN,
    "infinity": -INF,
    "negative": -1,
    "complex": 1j,
    "array": np.array([3.0]),
    "tensor": torch.tensor([3.0]),
    "NumPy's truth": np.True_,
}
# Each argument that is a number, and what it must not be besides.
NUMBERS = {
    "num_inference_steps": (0, 2.0, None, 10**9),
    "num_diffusion_steps": (0, 1.5, None, np.float32(2)),
    "max_latent_length": (0, 1.0, None),
    "guidance_scale": (None, INF),
    "guidance_trunc": (None, INF),
    "guidance_renorm": (None, INF),
    "image_guidance_scale": (None, INF),
    "spatiotemporal_guidance_scale": (None, INF),
    "min_guidance_scale": (INF,),
    "guidance_reuse": (0, 1.5, None),
    "flow_shift": (0, 0.0, INF),
    "motion_flow": (None, INF, [5.0]),
    "fps": (0, INF),
    "num_images_per_prompt": (0, 1.0, None),
    "num_frames": (0, 5.0),
    "height": (0, 64.0),
    "width": (0, 96.0),
    "vae_batch_size": (0, 1.0, None),
}


@pytest.mark.parametrize("wrong", [*NEVER_NUMBERS, "others"])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_not_a_number_in_range_is_refused(pipes, name, wrong):
    values = NUMBERS[name] if wrong == "others" else [NEVER_NUMBERS[wrong]]
    for value in values:
        for kind in ("video", "class"):
            check_refused(pipes, kind, {name: value}, [f"got {value!r}"])


LATENTS = states(1, 4, 2, 8, 12)
FRAME = states(1, 4, 8, 12)
LONG = {"max_latent_length": 3}
WRONG = [
    # Switches and choices
    ("text", {"disable_progress_bar": "no"}, ["must be true or false, got 'no'"]),
    ("text", {"disable_progress_bar": None}, ["got None"]),
    ("text", {"return_dict": 1}, ["got 1"]),
    ("text", {"output_type": "jpg"}, ["must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"]),
    ("class", {"output_type": None}, ["got None"]),
    ("video", {**LONG, "resize_mode": "cut"}, ["must be 'crop', 'fill' or 'default', got 'cut'"]),
    # Ranges
    ("video", {"pixel_range": 1}, ["must be a list or a tuple, got 1"]),
    ("video", {"pixel_range": "01"}, ["got '01'"]),
    ("video", {"pixel_range": (1,)}, ["must be longer, got (1,)"]),
    ("video", {"pixel_range": (0, 1, 2)}, ["must be shorter"]),
    ("video", {"pixel_range": (1, 0)}, ["the lower one first, got (1, 0)"]),
    ("video", {"pixel_range": (0, NAN)}, ["must be a finite number"]),
    ("video", {"pixel_range": (False, True)}, ["got (False, True)"]),
    ("text", {"guidance_interval": 500}, ["must be a list or a tuple, got 500"]),
    ("text", {"guidance_interval": {200, 800}}, ["must be a list or a tuple"]),
    ("text", {"guidance_interval": (800, 200)}, ["the least and the greatest timestep"]),
    ("text", {"guidance_interval": (0, INF)}, ["got (0, inf)"]),
    ("text", {"guidance_interval": (-1, 2)}, ["got (-1, 2)"]),
    ("text", {"guidance_interval": (1, 2, 3)}, ["must be shorter, got (1, 2, 3)"]),
    ("text", {"guidance_interval": ("a", "b")}, ["must be a number"]),
    # Sources of randomness
    ("text", {"generator": 7}, ["must be an instance of Generator or a list, got 7"]),
    ("text", {"generator": [7]}, ["got [7]"]),
    ("text", {"generator": (seeded(),)}, ["or a list"]),
    ("text", {"generator": []}, ["0 generators are given for 1 samples"]),
    ("class", {"generator": [seeded()] * 2}, ["2 generators are given for 1 samples"]),
    # Callbacks
    ("text", {"callback_on_step_end": "print"}, ["must be callable, got 'print'"]),
    ("class", {"callback_on_step_end": []}, ["must be callable, got []"]),
    ("text", {"callback_on_step_end_tensor_inputs": "latents"}, ["must be a list or a tuple"]),
    ("text", {"callback_on_step_end_tensor_inputs": ["noise"]}, ["must be 'latents'"]),
    ("text", {"callback_on_step_end_tensor_inputs": None}, ["got None"]),
    # Prompts
    ("text", {"prompt": None}, ["give a text, or prompt_embeds"]),
    ("text", {"prompt": []}, ["is an empty list"]),
    ("text", {"prompt": 3}, ["must be a text or a list of texts, got 3"]),
    ("text", {"prompt": b"a cat"}, ["got b'a cat'"]),
    ("text", {"prompt": ["a cat", None]}, ["got ['a cat', None]"]),
    ("text", {"prompt": [["a cat"]]}, ["got [['a cat']]"]),
    ("text", {"prompt": np.array(["a cat"])}, ["must be a text or a list of texts"]),
    ("text", {"negative_prompt": 0}, ["must be a text or a list of texts, got 0"]),
    ("text", {"negative_prompt": [None]}, ["got [None]"]),
    ("text", {"negative_prompt": ["red", "red"]}, ["got 2 for 1 prompts"]),
    ("text", {"guidance_scale": 1, "negative_prompt": 0}, ["must be a text or a list of texts"]),
    ("text", {"guidance_scale": 1, "negative_prompt": ["a", "a"]}, ["got 2 for 1 prompts"]),
    ("class", {"prompt": None}, ["give class ids"]),
    ("class", {"prompt": "3"}, ["must be whole numbers from 0 to 1000, got '3'"]),
    ("class", {"prompt": []}, ["got []"]),
    ("class", {"prompt": 3.0}, ["got 3.0"]),
    ("class", {"prompt": True}, ["got True"]),
    ("class", {"prompt": -1}, ["got -1"]),
    ("class", {"prompt": [1, 1001]}, ["got [1, 1001]"]),
    ("class", {"prompt": [[1, 2]]}, ["got [[1, 2]]"]),
    ("class", {"prompt": 2**70}, ["must be whole numbers"]),
    ("class", {"negative_prompt": [1, 2]}, ["got 2 for 1 prompts"]),
    ("class", {"guidance_scale": 1, "negative_prompt": 1001}, ["got 1001"]),
    # Latents
    ("video", {**LONG, "latents": 1}, ["must be a list of tensors (B, C, h, w)"]),
    (
        "video",
        {**LONG, "latents": FRAME},
        ["or a tensor (B, C, T, h, w), got Tensor (1, 4, 8, 12)"],
    ),
    ("video", {**LONG, "latents": FRAME[0]}, ["got Tensor (4, 8, 12)"]),
    ("video", {**LONG, "latents": [FRAME[0]]}, ["must be (1, 4, 8, 12), got (4, 8, 12)"]),
    ("video", {**LONG, "latents": [FRAME.numpy()]}, ["must be a list of tensors"]),
    ("video", {**LONG, "latents": LATENTS[..., :6]}, ["got (1, 4, 8, 6)"]),
    ("video", {**LONG, "latents": [FRAME[:, :3]]}, ["got (1, 3, 8, 12)"]),
    ("video", {**LONG, "latents": [FRAME, FRAME.expand(2, -1, -1, -1)]}, ["got (2, 4, 8, 12)"]),
    ("video", {**LONG, "latents": LATENTS.expand(2, -1, -1, -1, -1)}, ["got (2, 4, 8, 12)"]),
    (
        "video",
        {**LONG, "latents": [FRAME.long()]},
        ["must be floating-point numbers, got torch.int"],
    ),
    ("video", {**LONG, "latents": LATENTS + NAN}, ["must be finite, got NaN or infinity"]),
    ("video", {**LONG, "latents": [FRAME + INF]}, ["must be finite"]),
    ("video", {"max_latent_length": 2, "latents": LATENTS}, ["which leaves none of 2 to draw"]),
    ("video", {"latents": [FRAME]}, ["1 latent frames are given, which leaves none of 1"]),
    # Pictures and clips
    ("video", {**LONG, "image": "a.png"}, ["must be a PIL image", "got str"]),
    ("video", {**LONG, "image": []}, ["got [] frames"]),
    ("video", {**LONG, "image": picture()[..., :2]}, ["got the shape (64, 96, 2)"]),
    ("video", {**LONG, "image": states(3, 64, 96, fill=2.0)}, ["values from 2 to 2"]),
    ("video", {**LONG, "image": states(3, 64, 96, fill=NAN)}, ["values from nan to nan"]),
    ("video", {**LONG, "image": [picture(), picture()]}, ["got 2 for 1 prompts"]),
    ("video", {"image": picture()}, ["1 latent frames are given, which leaves none of 1 to draw"]),
    ("video", {**LONG, "video": "a.mp4"}, ["must be a list of pictures", "got str"]),
    ("video", {**LONG, "video": picture()}, ["must be a list of pictures"]),
    ("video", {**LONG, "video": clip(4)}, ["the nearest legal number is 1 or 5"]),
    ("video", {"max_latent_length": 2, "video": clip()}, ["2 latent frames are given"]),
    ("video", {**LONG, "video": [clip(), clip()]}, ["got 2 for 1 prompts"]),
    ("video", {**LONG, "video": [clip(1), clip()]}, ["of one length, got [1, 5] frames"]),
    (
        "video",
        {**LONG, "image": picture(), "video": clip()},
        ["an image or with a video, got both"],
    ),
    ("video", {"pixel_range": (-1, 1)}, ["is for image or video, and none is given"]),
    ("video", {"resize_mode": "fill"}, ["is for image or video, and none is given"]),
    # Sizes and lengths
    ("video", {"height": 32}, ["makes pictures of height 64, got 32"]),
    ("class", {"width": 64}, ["makes pictures of width 96, got 64"]),
    ("video", {"num_frames": 7}, ["the nearest legal number is 5 or 9"]),
    ("video", {"max_latent_length": 3, "num_frames": 5}, ["is 2 latent frames"]),
    # Weights that exclude each other
    (
        "text",
        {"image_guidance_scale": 1, "spatiotemporal_guidance_scale": 2},
        ["cannot be combined, got 1.0 and 2.0"],
    ),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    WRONG,
    ids=[f"{i}-{k}-{list(a)[-1]}" for i, (k, a, _) in enumerate(WRONG)],
)
def test_wrong_values_are_refused_before_any_work(pipes, kind, arguments, words):
    check_refused(pipes, kind, arguments, words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", picture()),
        ("video", clip()),
        ("latents", [FRAME]),
        ("latents", LATENTS),
        ("motion_flow", 3),
        ("fps", 24),
        ("num_frames", 5),
        ("max_latent_length", 2),
        ("pixel_range", (-1, 1)),
        ("resize_mode", "fill"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_model_of_images_has_no_use_for_what_makes_videos(pipes, kind, name, value):
    check_refused(pipes, kind, {name: value}, [])


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_a_model_of_classes_has_no_use_for_states_of_texts(pipes, name):
    check_refused(pipes, "class", {name: states(1, 2, 64)}, ["NOVAC2IPipeline has no use for"])


@pytest.mark.parametrize("scale", [1, 5])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a cat", "must be a list of (k, 64) or a tensor (B, k, 64), got 'a cat'"),
        (7, "got 7"),
        ({}, "got {}"),
        (states(2, 64), "got Tensor (2, 64), torch.float32"),
        ([], "at least one prompt is needed, got none"),
        ([7], "must be an array or tensor of floats, got int"),
        (["a cat"], "must be an array or tensor of floats, got str"),
        (states(1, 2, 63), "must be (k, 64) with k <= 7, got (2, 63)"),
        (states(1, 8, 64), "must be (k, 64) with k <= 7, got (8, 64)"),
        (states(1, 2, 64, fill=NAN), "must be finite, got NaN or infinity"),
        ([states(2, 64, fill=INF)], "must be finite, got NaN or infinity"),
        (states(1, 2, 64).long(), "must be an array or tensor of floats, got torch.int64"),
    ],
)
def test_wrong_states_of_texts_are_refused(pipes, value, words, scale):
    fine = states(1, 2, 64)
    for arguments in (
        {"prompt_embeds": value},
        {"prompt_embeds": fine, "negative_prompt_embeds": value},
    ):
        options = {"prompt": None, "guidance_scale": scale}
        check_refused(pipes, "text", {**options, **arguments}, [words])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt_embeds": states(1, 2, 64)}, "prompt is given, but so are"),
        ({"negative_prompt_embeds": states(1, 2, 64)}, "negative_prompt_embeds need prompt_embeds"),
        (
            {"prompt": None, "negative_prompt": "red", "prompt_embeds": states(1, 2, 64)},
            "negative_prompt is given, but so are",
        ),
        (
            {
                "prompt": None,
                "prompt_embeds": states(1, 2, 64),
                "negative_prompt_embeds": states(2, 2, 64),
            },
            "negative_prompt_embeds must hold one negative prompt per prompt: got 2 for 1",
        ),
    ],
)
def test_texts_and_states_are_not_mixed(pipes, arguments, words):
    check_refused(pipes, "text", arguments, [words])


def test_a_scheduler_that_cannot_make_so_many_steps_is_named():
    pipes = {"text": make_pipeline(scheduler=DDPMScheduler())}
    check_refused(pipes, "text", {"num_diffusion_steps": 1001}, ["cannot be larger than"])
    check_refused(pipes, "text", {"flow_shift": 2.0}, ["DDPMScheduler, which cannot be shifted"])


def test_pictures_are_one_or_as_many_as_prompts(pipes):
    four = {"prompt": ["a", "cat", "on", "mat"], **LONG}
    check_refused(pipes, "video", {**four, "image": [picture()] * 2}, ["got 2 for 4 prompts"])


def test_unexpected_places_are_refused(pipes):
    with pytest.raises(TypeError, match="too many positional arguments"):
        pipes["class"](3, 2, 2, 5, None, None, 1, None, None, True, "np", "pil")
    with pytest.raises(TypeError, match="multiple values for argument 'prompt'"):
        pipes["text"]("a cat", prompt="a dog")


MODEL_INPUTS = [
    {"num_preds": None},
    {"num_preds": 24},
    {"num_preds": [12, 11]},
    {"num_preds": [25, -1]},
    {"num_preds": [12.0, 12.0]},
    {"num_preds": {4, 20}},
    {"num_preds": [True] * 24},
    {"batch_size": 0},
    {"batch_size": "2"},
    {"batch_size": 2.0},
    {"batch_size": None},
    {"x": "latents"},
    {"x": states(2, 4, 1, 8, 12)},
    {"x": states(2, 3, 8, 12)},
    {"guidance_scale": NAN},
    {"guidance_renorm": "1"},
    {"guidance_interval": (2, 1)},
    {"generator": 1},
    {"generator": [seeded()]},
    {"num_diffusion_steps": 0},
    {"max_latent_length": 1.5},
    {"motion_flow": "5"},
    {"motion_flow": -1},
    {"motion_flow": [1, 2, 3]},
    {"motion_flow": [NAN, 1]},
    {"motion_flow": True},
    {"fps": 0},
    {"fps": [1, 2, 3]},
    {"latents": states(2, 4, 8, 12)},
    {"latents": [states(1, 4, 8, 12)]},
    {"latents": [states(2, 4, 8, 12, fill=NAN)]},
    {"latents": [1]},
    {"prompt": "a cat"},
    {"prompt": 3},
    {"prompt": states(4, 7, 63)},
    {"prompt": states(4, 64)},
    {"prompt": states(4, 7, 64, fill=NAN)},
    {"prompt": states(4, 7, 64).long()},
    {"prompt": states(3, 7, 64)},
    {"prompt": []},
    {"c": states(4, 1, 64)},
    {"c": [states(4, 1, 63)]},
    {"c": [states(4, 64)]},
    {"c": [states(3, 1, 64)]},
    {"c": [states(4, 1, 64, fill=INF)]},
    {"c": ["a cat"]},
    {"on_step": "print"},
    {"tqdm1": "yes"},
    {"progress_bar_config": "desc"},
    # Keys that no part of a drawing reads
    {"negative_prompt": "red"},
    {"num_inference_steps": 3},
    {"output_type": "pil"},
    {"image": 1},
    {"flow_shift": 3.0},
    {"loss_repeat": 4},
    {"guidance": 3},
]


def numbered(cases):
    """Names of cases, which must not show objects."""
    return [f"{index}-{list(case)[-1]}" for index, case in enumerate(cases)]


@pytest.mark.parametrize("wrong", MODEL_INPUTS, ids=numbered(MODEL_INPUTS))
def test_wrong_inputs_of_a_model_are_refused_before_it_computes(pipes, wrong):
    model = pipes["video"].transformer
    worked = []
    parts = [module for module in model.modules() if not list(module.children())]
    hooks = [part.register_forward_pre_hook(lambda *_: worked.append(1)) for part in parts]
    with pytest.raises((ValueError, TypeError)) as caught:
        model(generation_inputs(**{"max_latent_length": 2, **wrong}))
    for hook in hooks:
        hook.remove()
    (name,) = wrong
    words = {"prompt": ("prompt", "condition rows"), "c": ("c must", "condition rows")}
    assert any(word in str(caught.value) for word in words.get(name, (name, "latents must")))
    assert not worked and "\n" not in str(caught.value)


UNUSUAL = [
    ("text", {"num_inference_steps": np.int64(2)}, {}),
    ("text", {"num_inference_steps": torch.tensor(2)}, {}),
    ("text", {"num_diffusion_steps": np.array(2)}, {}),
    ("text", {"guidance_scale": np.float32(5)}, {}),
    ("text", {"guidance_scale": 5.0}, {}),
    ("text", {"guidance_scale": torch.tensor(5.0)}, {}),
    ("text", {"guidance_renorm": 1}, {}),
    ("text", {"prompt": ["a cat"]}, {}),
    ("text", {"prompt": ("a cat",)}, {}),
    ("text", {"negative_prompt": ""}, {}),
    ("text", {"negative_prompt": []}, {}),
    ("text", {"negative_prompt": ("red",)}, {"negative_prompt": "red"}),
    ("text", {"guidance_interval": [200, 800]}, {"guidance_interval": (200.0, 800.0)}),
    ("text", {"guidance_interval": np.array([200, 800])}, {"guidance_interval": (200, 800)}),
    ("text", {"guidance_interval": torch.tensor([200, 800])}, {"guidance_interval": (200, 800)}),
    ("text", {"flow_shift": 1}, {}),
    ("text", {"latents": []}, {}),
    ("text", {"motion_flow": 5.0}, {}),
    ("text", {"num_frames": 1}, {}),
    ("text", {"height": 64, "width": np.int32(96)}, {}),
    ("text", {"disable_progress_bar": np.True_}, {}),
    ("text", {"callback_on_step_end_tensor_inputs": ["latents"]}, {}),
    ("class", {"prompt": [3]}, {}),
    ("class", {"prompt": (3,)}, {}),
    ("class", {"prompt": np.int16(3)}, {}),
    ("class", {"prompt": np.array([3])}, {}),
    ("class", {"prompt": torch.tensor(3)}, {}),
    ("class", {"prompt": range(3, 4)}, {}),
    ("class", {"negative_prompt": [1000]}, {}),
    ("class", {"latents": []}, {}),
    ("video", {"fps": 12}, {}),
    ("video", {"motion_flow": np.float64(5)}, {}),
    ("video", {**LONG, "latents": FRAME.unsqueeze(2)}, {**LONG, "latents": [FRAME]}),
    ("video", {**LONG, "latents": (FRAME.double(),)}, {**LONG, "latents": [FRAME]}),
    ("video", {**LONG, "latents": [], "image": picture()}, {**LONG, "image": picture()}),
    ("video", {**LONG, "image": [picture()]}, {**LONG, "image": picture()}),
    (
        "video",
        {**LONG, "image": picture(), "pixel_range": [0, 255]},
        {**LONG, "image": picture()},
    ),
    ("video", {"num_frames": 5}, {"max_latent_length": 2}),
]


@pytest.mark.parametrize(
    ("kind", "unusual", "plain"),
    UNUSUAL,
    ids=numbered(u for _, u, _ in UNUSUAL),
)
def test_right_values_are_taken_in_any_form(pipes, kind, unusual, plain):
    def draw(arguments):
        options = {"prompt": PROMPTS[kind], "generator": seeded(), "output_type": "latent"}
        (result,) = pipes[kind](**{**options, **QUICK, **arguments}, return_dict=False)
        return result

    assert torch.equal(draw(unusual), draw(plain))


def test_arrays_of_states_are_taken(pipes):
    given = np.random.default_rng(0).normal(size=(1, 3, 64)).astype(np.float16)
    options = {"output_type": "latent", **QUICK}
    results = [
        pipes["text"](prompt_embeds=embeds, generator=seeded(), **options).frames
        for embeds in (given, list(given), torch.tensor(given), (torch.tensor(given[0]),))
    ]
    assert all(torch.equal(one, results[0]) for one in results)


# Arguments by place, with what they are when nothing is given.
PLACES = {
    NOVAPipeline: {
        "prompt": None,
        "num_inference_steps": 64,
        "num_diffusion_steps": 25,
        "max_latent_length": 1,
        "guidance_scale": 5,
        "guidance_trunc": 0,
        "guidance_renorm": 1,
        "image_guidance_scale": 0,
        "spatiotemporal_guidance_scale": 0,
        "flow_shift": None,
        "motion_flow": 5,
        "negative_prompt": None,
        "image": None,
        "num_images_per_prompt": 1,
        "generator": None,
        "latents": None,
        "prompt_embeds": None,
        "negative_prompt_embeds": None,
        "disable_progress_bar": False,
        "output_type": "pil",
    },
    NOVAC2IPipeline: {
        "prompt": None,
        "num_inference_steps": 64,
        "num_diffusion_steps": 25,
        "guidance_scale": 5,
        "min_guidance_scale": None,
        "negative_prompt": None,
        "num_images_per_prompt": 1,
        "generator": None,
        "latents": None,
        "disable_progress_bar": False,
        "output_type": "pil",
    },
}


@pytest.mark.parametrize("method", ["__call__", "stream"])
@pytest.mark.parametrize("pipeline", PLACES)
def test_places_and_defaults_are_those_of_the_original(pipeline, method):
    _, *parameters, rest = inspect.signature(getattr(pipeline, method)).parameters.values()
    places = [one for one in parameters if one.kind == one.POSITIONAL_OR_KEYWORD]
    assert {one.name: one.default for one in places} == PLACES[pipeline]
    assert [one.name for one in places] == list(PLACES[pipeline])
    assert rest.kind == rest.VAR_KEYWORD
    assert all(one.default is not one.empty for one in parameters)


def test_both_pipelines_take_the_same_but_for_texts():
    texts, classes = (set(inspect.signature(one.__call__).parameters) for one in PLACES)
    assert texts - classes == {"prompt_embeds", "negative_prompt_embeds"}
    assert classes < texts


@pytest.mark.parametrize("method", ["__call__", "stream"])
@pytest.mark.parametrize("pipeline", PLACES)
def test_the_help_explains_every_argument(pipeline, method):
    function = getattr(pipeline, method)
    section = inspect.getdoc(function).partition("\nArgs:\n")[2].partition("\n\n")[0]
    explained = re.findall(r"^    (\w+): ", section, flags=re.MULTILINE)
    assert explained == list(inspect.signature(function).parameters)[1:-1]


# What a pipeline returns can be given back to it.


def draw_video(pipe, **options):
    options = {"max_latent_length": 2, "generator": seeded(), "return_dict": False, **options}
    return pipe(["a cat", "a dog"], **options, **QUICK)[0]


@pytest.mark.parametrize(
    ("output_type", "options", "as_image", "tolerance"),
    [
        ("pil", {}, lambda frames: [Image.fromarray(frame) for frame in frames[:, -1]], 0),
        ("np", {}, lambda frames: frames[:, -1], 0),
        ("pt", {"pixel_range": (-1, 1)}, lambda frames: frames[:, :, -1], 0.02),
    ],
)
def test_pixels_that_a_pipeline_returns_begin_the_next_video(
    pipes, output_type, options, as_image, tolerance
):
    """The rounding to 8 bits apart, they are the same in every form."""
    pipe = pipes["video"]
    expected, given = (draw_video(pipe, output_type=kind) for kind in ("np", output_type))
    for name, first, reference in (
        ("image", as_image(given), expected[:, -1]),
        ("video", given, expected),
    ):
        more = {"max_latent_length": 3, "output_type": "latent"}
        found = draw_video(pipe, **{name: first}, **options, **more)
        by_array = draw_video(pipe, **{name: reference}, **more)
        num_given = 1 if name == "image" else 2
        error = (found - by_array)[:, :, :num_given].abs().max()
        assert found.shape == (2, 4, 3, 8, 12) and error <= tolerance
        assert found[:, :, :num_given].std() > 0.05  # no flat picture, whose range hardly matters


def test_latents_that_a_pipeline_returns_begin_the_next_video(pipes):
    pipe = pipes["video"]
    given = draw_video(pipe, output_type="latent")
    pieces = list(
        pipe.stream(
            ["a cat", "a dog"], latents=given, max_latent_length=3, output_type="latent", **QUICK
        )
    )
    continued = torch.cat(pieces, dim=2)
    assert torch.equal(continued[:, :, :2], given)
    by_frames = draw_video(
        pipe, latents=list(given.unbind(2)), max_latent_length=3, output_type="latent"
    )
    assert torch.equal(by_frames[:, :, :2], given)


def test_pictures_of_a_model_of_images_begin_a_video(pipes):
    images = pipes["text"]("a cat", generator=seeded(), **QUICK).images
    video = pipes["video"]("a cat", image=images[0], max_latent_length=2, **QUICK).frames
    assert video.shape == (1, 5, 64, 96, 3)
