"""Compiled blocks and FlexAttention give the eager results."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from diffnext.models import attention
from diffnext.models import flex_attention as flex_attention_module
from diffnext.models.attention import BlockCausalMask, can_flex
from diffnext.models.flex_attention import FlexAttentionCausal2D
from tests.tiny import generation_inputs, make_model, make_prompts


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"rotary_pos_embed": True}], ids=["tables", "rotary"])
@pytest.mark.parametrize("guidance", [{}, {"guidance_renorm": 0.5}], ids=["tokens", "frames"])
def test_compiled_drawings_equal_eager_ones_without_graph_breaks(options, guidance):
    inputs = {"max_latent_length": 3, "motion_flow": 5, **guidance}
    model = make_model(frames=3, **options)
    eager = model(generation_inputs(**inputs))["x"]
    model.compile_drawing(fullgraph=True, backend="aot_eager")
    compiled = model(generation_inputs(**inputs))["x"]
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


class Graphs:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize(
    "num_preds", [[1] * 6 + [18], [2, 7, 15], [24]], ids=["ones", "three", "one"]
)
def test_the_number_of_graphs_is_bounded(num_preds):
    """None for another prompt, seed, weight or schedule; few for another batch or no guidance."""
    model, graphs = make_model(frames=3), Graphs()
    model.compile_drawing(backend=graphs)

    def draw(**options):
        before = graphs.count
        inputs = generation_inputs(num_preds=num_preds, **options)
        model({**inputs, "prompt": make_prompts(len(inputs["prompt"]), options.get("seed", 0))})
        return graphs.count - before

    assert 0 < draw() <= 10
    others = [
        {},
        {"seed": 1},
        {"guidance_scale": 2.5},
        {"min_guidance_scale": 1.0},
        {"num_diffusion_steps": 7},
        {"on_step": lambda frame, step, latents: latents + 1},
        {"max_latent_length": 2, "motion_flow": 5},
    ]
    assert [draw(**options) for options in others] == [0] * len(others)
    assert 0 < draw(guidance_scale=1.0) <= 10
    assert 0 < draw(batch=3) <= 10
    repeated = [draw(), draw(guidance_scale=1.0), draw(batch=3)]
    assert repeated == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "reduce-overhead"}, "replays CUDA graphs, whose results"),
        ({"mode": "max-autotune"}, "use mode='max-autotune-no-cudagraphs'"),
        ({"options": {"triton.cudagraphs": True}}, "replays CUDA graphs"),
        ({"dynamic": True}, "padded to few fixed ones instead"),
        ({"mode": "fast"}, "mode must be one of .*got 'fast'"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model().compile_drawing(**options)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3])
def test_blocks_compile_without_graph_breaks_in_training(level):
    def gradients(model):
        model.train().set_gradient_checkpointing(level)
        torch.manual_seed(0)
        np.random.seed(0)
        x = torch.randn(1, 4, 3, 8, 12)
        losses = model({"x": x, "prompt": make_prompts(1), "motion_flow": [5]})
        sum(losses.values()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    eager = gradients(make_model(frames=3))
    model = make_model(frames=3)
    model.compile_parts(fullgraph=True, backend="aot_eager")
    compiled = gradients(model)
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_flex_attention_and_prefixes_equal_the_dense_mask():
    mask = BlockCausalMask.of_frames(num_frames=4, frame_tokens=6, num_condition=5)
    q, k, v = torch.randn(3, 2, 2, 29, 16).unbind(0)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.dtype))
    torch.testing.assert_close(mask.attend(q, k, v), dense)
    layout = FlexAttentionCausal2D()
    layout.set_offsets_by_lens(mask.lengths)
    result = flex_attention(q, k, v, block_mask=layout.get_block_mask(q))  # not compiled
    torch.testing.assert_close(result, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "width", "expected"),
    [("cuda", 64, True), ("cuda", 8, False), ("cuda", 96, False), ("cpu", 64, False)],
)
def test_flex_attention_is_for_heads_that_its_kernels_take(monkeypatch, device, width, expected):
    monkeypatch.setattr(attention, "find_spec", lambda name: name)  # a CPU has no Triton
    assert can_flex(torch.device(device), width) == expected
    with torch._dynamo.config.patch(disable=True):
        assert not can_flex(torch.device(device), width)


def attend_dense(q, k, v, block_mask):
    """Stands for FlexAttention, which has no backward on a CPU."""
    places = torch.arange(q.size(2))
    visible = block_mask.mask_mod(None, None, places[:, None], places[None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


@pytest.mark.slow
@pytest.mark.parametrize("uses_flex", [False, True])
def test_blocks_compiled_for_training_run_with_gradients_alone_and_are_compiled_once(
    monkeypatch, uses_flex
):
    """Also where each step has a mask of its own, as long as it is of the same shape."""
    monkeypatch.setattr(attention, "can_flex", lambda *_: uses_flex)
    monkeypatch.setattr(flex_attention_module, "compiled_flex_attention", lambda: attend_dense)
    monkeypatch.setattr(flex_attention_module, "flex_attention", attend_dense)
    model, graphs = make_model(frames=3).train(), Graphs()
    model.mask_embed.mask_ratios = [0.7, 0.7, 0.25]
    model.compile_parts(backend=graphs)
    x = torch.randn(1, 4, 3, 8, 12)
    inputs = {"x": x, "prompt": make_prompts(1), "motion_flow": [5]}
    with torch.no_grad():  # as for held-out losses
        model(inputs)
    assert graphs.count == 0
    counts = []
    for _ in range(4):
        sum(model(inputs).values()).backward()
        counts.append(graphs.count)
    assert 0 < counts[0] and counts[1:] == counts[1:2] * 3


@pytest.mark.gpu
def test_flex_attention_on_a_gpu_equals_the_dense_mask():
    mask = BlockCausalMask.of_frames(num_frames=4, frame_tokens=60, num_condition=17)
    q, k, v = torch.randn(3, 2, 2, 257, 64, device="cuda").unbind(0)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.dtype, "cuda"))
    mask = mask.prepare(q.device, 64)
    torch.testing.assert_close(mask.attend(q, k, v), dense, atol=1e-2, rtol=1e-2)
