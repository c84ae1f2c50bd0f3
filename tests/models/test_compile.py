"""Compiled blocks and FlexAttention give the eager results."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffnext.models import attention
from diffnext.models.attention import BlockCausalMask, can_flex, flex_layout
from tests.tiny import generation_inputs, make_model, make_prompts


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_model(**options):
    """A model that is compiled wherever it can be; a graph break is an error."""
    model = make_model(frames=3, **options)
    model.compile_parts(fullgraph=True, backend="aot_eager")
    return model


@pytest.mark.parametrize("options", [{}, {"rotary_pos_embed": True}], ids=["tables", "rotary"])
def test_blocks_compile_without_graph_breaks_in_generation(options):
    inputs = {"max_latent_length": 3, "motion_flow": 5}
    eager = make_model(frames=3, **options)(generation_inputs(**inputs))["x"]
    compiled = compiled_model(**options)(generation_inputs(**inputs))["x"]
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", [0, 3])
def test_blocks_compile_without_graph_breaks_in_training(level, monkeypatch):
    # As on a GPU: what a CPU leaves out of the graph is attention itself, and nothing else.
    monkeypatch.setattr(attention, "_attend_uncompiled", F.scaled_dot_product_attention)

    def gradients(model):
        model.train().set_gradient_checkpointing(level)
        torch.manual_seed(0)
        np.random.seed(0)
        x = torch.randn(1, 4, 3, 8, 12)
        losses = model({"x": x, "prompt": make_prompts(1), "motion_flow": [5]})
        sum(losses.values()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    eager = gradients(make_model(frames=3))
    compiled = gradients(compiled_model())
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_flex_attention_and_prefixes_equal_the_dense_mask(monkeypatch):
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    mask = BlockCausalMask.of_frames(num_frames=4, frame_tokens=6, num_condition=5)
    q, k, v = torch.randn(3, 2, 2, 29, 16).unbind(0)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.dtype))
    torch.testing.assert_close(mask.attend(q, k, v), dense)
    layout = flex_layout(mask.lengths)
    monkeypatch.setattr(layout, "get_attn_func", lambda: flex_attention)  # not compiled
    torch.testing.assert_close(layout(q, k, v), dense, atol=1e-5, rtol=1e-5)


def test_layouts_are_made_once():
    assert flex_layout((5, 6)) is flex_layout((5, 6))
    assert flex_layout((5, 6)) is not flex_layout((6, 5))


@pytest.mark.parametrize("width", [8, 96])
def test_head_widths_that_kernels_do_not_take(width):
    assert not can_flex(width)


@pytest.mark.gpu
def test_flex_attention_on_a_gpu_equals_the_dense_mask():
    mask = BlockCausalMask.of_frames(num_frames=4, frame_tokens=60, num_condition=17)
    q, k, v = torch.randn(3, 2, 2, 257, 64, device="cuda").unbind(0)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.dtype, "cuda"))
    torch.testing.assert_close(mask.attend(q, k, v), dense, atol=1e-2, rtol=1e-2)
