"""Recorded programs give the eager results; a CPU replays them by calling them again."""

import copy
import math

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from diffnext.models.capture import Programs, TracedPrograms, record_calls
from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.models.packed_linear import prepack_linears
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.tiny import generation_inputs, make_model, make_prompts


def make_recording(**options):
    model = make_model(**options)
    model.programs = Programs(record_calls)
    return model


def name_of(key):
    return key[0] if isinstance(key, tuple) else key


def draw(model, **options):
    return model(generation_inputs(**options))["x"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 1.5},
        {"min_guidance_scale": 1.0},
        {"guidance_trunc": 500.0},
        {"guidance_interval": (300, 800)},
        {"guidance_reuse": 2},
        {"guidance_renorm": 0.5},
        {"image_guidance_scale": 1.2, "max_latent_length": 2, "motion_flow": 5},
        {"generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)]},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("scheduler", ["flow", "ddpm"])
def test_recorded_drawings_equal_eager_ones(options, scheduler):
    model = make_model(frames=2)
    if scheduler == "ddpm":
        model.sample_scheduler = DDPMScheduler()
    state = [one.get_state() for one in options.get("generator", [])]
    eager = draw(model, **options)
    model.programs = Programs(record_calls)
    for _ in range(2):  # recorded, then replayed
        for one, before in zip(options.get("generator", []), state, strict=True):
            one.set_state(before)
        torch.testing.assert_close(draw(model, **options), eager, atol=1e-4, rtol=1e-4)
    kinds = {"encoder"} if "guidance_renorm" in options else {"encoder", "head"}
    assert {name_of(key) for key in model.programs.keys} == kinds


@pytest.mark.parametrize("options", [{}, {"rotary_pos_embed": True}], ids=["tables", "rotary"])
def test_compiled_parts_are_recorded_too(options):
    model = make_model(**options)
    eager = draw(model)
    model.compile_drawing(fullgraph=True, backend="aot_eager")
    model.programs = Programs(record_calls)
    for _ in range(2):
        torch.testing.assert_close(draw(model), eager, atol=1e-4, rtol=1e-4)
    assert len(model.programs) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("passes", [{}, {"image_guidance_scale": 1.2}], ids=["two", "three"])
def test_the_weight_of_the_prompt_is_not_rounded(dtype, passes):
    guidance = GuidanceScaler(guidance_scale=5, **passes)
    x = torch.randn(6, 1000, dtype=torch.float64).to(dtype)
    exact = guidance.scale(x.double(), 4.567)
    result = guidance.scale(x, torch.tensor(4.567))
    assert result.dtype == dtype
    error = (result.double() - exact).abs() / exact.abs()
    assert error.max() < 0.51 * torch.finfo(dtype).eps


def test_programs_are_few_and_shared():
    """None for another prompt, seed or weight of the prompt."""
    model = make_recording(frames=3)
    draw(model)
    # The head for 8 and 16 tokens; the encoder for these and 0, 6 and 12 known ones.
    assert len(model.programs) == 5
    for options in (
        {"seed": 1},
        {"guidance_scale": 2.5},
        {"min_guidance_scale": 1.0},
        {"prompt": make_prompts(4, seed=3)},
        {"max_latent_length": 3, "motion_flow": 5},
    ):
        draw(model, **options)
        assert len(model.programs) == 5
    draw(model, num_diffusion_steps=4)
    assert len(model.programs) == 7
    many = make_recording()
    draw(many, num_preds=[1] * 24)
    assert len(many.programs) == 1 + 5


def test_results_are_not_overwritten():
    def double(model, x):
        return x * 2

    programs = Programs(record_calls)
    results = [programs.run("double", double, None, [torch.full((3,), n)]) for n in (1.0, 2.0)]
    assert len(programs) == 1
    assert [result.tolist() for result in results] == [[2.0] * 3, [4.0] * 3]


def test_the_memory_of_programs_is_that_of_their_inputs_and_results():
    """As what one keeps of a drawing without data: buffers, and nothing of what is between."""
    programs = Programs(record_calls)
    x, y = torch.zeros(3, 5), torch.zeros(7, dtype=torch.float64)
    programs.run("sum", lambda _, x, y: (x * 2).sum(dim=1) + y[:3].float(), None, [x, y])
    assert programs.nbytes == x.nbytes + y.nbytes + 3 * 4
    programs.run("sum", lambda _, x: x.sum(), None, [x])
    assert programs.nbytes == 2 * x.nbytes + y.nbytes + 3 * 4 + 4


@pytest.mark.parametrize("programs", [Programs(record_calls), TracedPrograms()], ids=["", "traced"])
def test_changed_weights_are_seen_and_moved_ones_recorded_anew(programs):
    model, plain = make_model(), make_model()
    model.programs = programs
    draw(model)
    programs = list(model.programs._programs.values())
    with torch.no_grad():
        for one in (model, plain):
            one.image_decoder.head.weight.mul_(2)
    torch.testing.assert_close(draw(model), draw(plain), atol=1e-5, rtol=1e-4)
    assert list(model.programs._programs.values()) == programs
    for one in (model, plain):
        one.image_decoder.head.weight = nn.Parameter(one.image_decoder.head.weight.detach() * 2)
    torch.testing.assert_close(draw(model), draw(plain), atol=1e-5, rtol=1e-4)
    assert not set(model.programs._programs.values()) & set(programs)


@pytest.mark.parametrize("reason", ["rows", "hook", "adapter", "autocast", "no GPU"])
def test_what_cannot_be_recorded_is_drawn_eagerly(reason):
    model = make_recording()
    if reason == "rows":
        # 2 passes, 2 samples, 2 tokens and more
        model.programs.most_rows = {"encoder": math.inf, "head": 7}
    elif reason == "hook":
        add_hook_to_module(model.text_embed, ModelHook())
    elif reason == "adapter":
        model.peft_config = {"default": object()}
    elif reason == "no GPU":
        model.programs = Programs()
    with torch.autocast("cpu", enabled=reason == "autocast"):
        draw(model)
    names = {name_of(key) for key in model.programs.keys}
    assert names == ({"encoder"} if reason == "rows" else set())


@pytest.mark.parametrize("options", [{}, {"rotary_pos_embed": True}], ids=["tables", "rotary"])
@pytest.mark.parametrize("scheduler", ["flow", "ddpm"])
@pytest.mark.parametrize("is_prepacked", [False, True], ids=["", "prepacked"])
def test_compiling_on_a_cpu_traces_small_drawings(options, scheduler, is_prepacked):
    model = make_model(**options)
    if scheduler == "ddpm":
        model.sample_scheduler = DDPMScheduler()
    inputs = {"batch_size": 1, "num_preds": [1, 2, 3, 6, 12], "num_diffusion_steps": 3}
    variants = ({}, {"seed": 1, "guidance_scale": 2.5, "prompt": make_prompts(2, seed=3)})
    eager = [draw(model, **inputs, **{"prompt": make_prompts(2), **one}) for one in variants]
    if is_prepacked:
        prepack_linears(model)
    model.compile_drawing()
    for _ in range(3):  # traced, optimised, then as it stays
        for one, expected in zip(variants, eager, strict=True):
            result = draw(model, **inputs, **{"prompt": make_prompts(2), **one})
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
            assert {name_of(key) for key in model.programs.keys} == {"encoder", "head"}
            assert len(model.programs) == 5 + 5  # 1, 2, 4, 8 and 16 tokens


@pytest.mark.parametrize("reason", ["rows", "options", "device"])
def test_what_a_cpu_does_not_trace(reason):
    model = make_model()
    options = {"backend": "aot_eager"} if reason == "options" else {}
    model.compile_drawing(**options)
    if reason == "options":
        assert model.programs is None and model.image_decoder.is_compiled
    elif reason == "device":
        assert not model.programs.fit(model, torch.device("cuda"))
    else:
        prompt = [one for one in make_prompts(2) for _ in range(8)]
        draw(model, batch_size=8, num_preds=[24], prompt=prompt)
        assert len(model.programs) == 0


def test_a_copy_of_the_model_records_for_itself():
    model = make_recording()
    draw(model)
    other = copy.deepcopy(model)
    assert len(other.programs) == 0
    with torch.no_grad():
        other.image_decoder.head.weight.mul_(2)
    assert not torch.equal(draw(model), draw(other))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_of_a_gpu_equal_eager_drawings(dtype):
    model = make_model().to("cuda", dtype)
    inputs = {"prompt": [one.cuda() for one in make_prompts(4)]}
    eager = draw(model, **inputs)
    model.capture_drawing()
    for _ in range(2):
        tolerance = 8 * torch.finfo(dtype).eps * eager.abs().max().item()
        torch.testing.assert_close(draw(model, **inputs), eager, atol=tolerance, rtol=0)
    assert len(model.programs) == 2
