"""Layers: shapes, identities and refusals."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffnext.models.attention import BlockCausalMask, KVCache
from diffnext.models.diffusion_mlp import DiffusionMLP
from diffnext.models.diffusion_transformer import DiffusionTransformer
from diffnext.models.embeddings import (
    LabelEmbed,
    PatchEmbed,
    PosEmbed,
    RotaryEmbed3D,
    TextEmbed,
    VideoPosEmbed,
    gather_tokens,
)
from diffnext.models.flex_attention import FlexAttentionCausal2D
from diffnext.models.vision_transformer import Attention, VisionTransformer


def test_patches_round_trip():
    embed = PatchEmbed(4, 32, 2)
    x = torch.randn(2, 4, 8, 12)
    patches = embed.patchify(x)
    assert patches.shape == (2, 24, 16)
    assert torch.equal(embed.unpatchify(patches, embed.grid(x)), x)
    torch.testing.assert_close(embed.embed_patches(patches), embed(x))


def test_patch_embedding_remembers_the_last_grid():
    embed = PatchEmbed(4, 32, 2)
    assert embed.hw == (None, None)
    embed(torch.randn(1, 4, 8, 12))
    assert embed.hw == (4, 6)


def test_position_tables_leave_their_input_alone():
    x = torch.zeros(1, 15, 64)
    PosEmbed(64, (3, 5))(x)
    VideoPosEmbed(64, (4, 3, 5))(x.unsqueeze(1))
    assert torch.equal(x, torch.zeros_like(x))


def test_a_grid_of_another_size_is_refused():
    with pytest.raises(ValueError, match="holds 3x5 tokens, got 12"):
        PosEmbed(64, (3, 5))(torch.zeros(1, 12, 64))


def test_a_table_first_made_in_inference_mode_can_be_trained_with():
    embed = PosEmbed(64, (7, 9))
    with torch.inference_mode():
        embed(torch.zeros(1, 63, 64))
    x = torch.zeros(1, 63, 64, requires_grad=True)
    (embed(x) * embed(x)).sum().backward()
    assert x.grad is not None


def test_rotation_depends_on_distance_alone():
    rope = RotaryEmbed3D(64, (4, 4))
    q, k = torch.randn(2, 1, 1, 1, 64)
    at = lambda *p: rope.get_func(torch.tensor([[p]], dtype=torch.float32))  # noqa: E731
    near = (at(0, 1, 2)(q) * at(0, 3, 1)(k)).sum()
    far = (at(2, 4, 5)(q) * at(2, 6, 4)(k)).sum()
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


def test_rotation_matrices_equal_the_call():
    rope = RotaryEmbed3D(32, (2, 3))
    rotation = rope.get_func(rope.get_pos(2), pad=1)
    x = torch.randn(1, 2, 13, 32)
    turned = (rotation.weight @ x.unflatten(-1, (-1, 2)).unsqueeze(-1)).squeeze(-1).flatten(-2)
    torch.testing.assert_close(rotation(x), turned)


def test_a_head_width_that_cannot_be_split_is_refused():
    rope = RotaryEmbed3D(44)
    with pytest.raises(ValueError, match="a head width of 44 cannot be split"):
        rope.get_func(rope.get_pos())


def test_rotary_tables_stay_out_of_the_state_dict():
    assert RotaryEmbed3D(64).state_dict() == {}


def test_block_causal_attention_equals_the_dense_mask():
    mask = BlockCausalMask(lengths=(7, 4, 4))
    q, k, v = torch.randn(3, 2, 4, 15, 16)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.dtype))
    torch.testing.assert_close(mask.attend(q, k, v), dense, atol=1e-5, rtol=1e-5)


def test_block_lengths_must_cover_the_tokens():
    q = torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match=r"blocks of \(4, 4\) tokens do not cover 9 queries"):
        BlockCausalMask(lengths=(4, 4)).attend(q, q, q)


def test_cached_attention_equals_attention_over_everything():
    attention = Attention(32, 4)
    x = torch.randn(2, 9, 32)
    cache = KVCache(depth=1, shape=(2, 4, 9, 8), like=x).layers[0]
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x.split([5, 4], dim=1)]
        whole = attention(x, mask=BlockCausalMask(lengths=(5, 4)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_so():
    k = torch.zeros(1, 1, 4, 8)
    cache = KVCache(depth=1, shape=(1, 1, 3, 8), like=k).layers[0]
    with pytest.raises(ValueError, match="holds 3 tokens, 4 needed"):
        cache.append(k, k)


def test_flex_visibility_with_and_without_flags():
    flex = FlexAttentionCausal2D()
    q = torch.arange(6)[:, None]
    k = torch.arange(6)[None, :]
    flex.set_offsets_by_lens([2, 4])
    open_blocks = flex.get_mask_mod()(0, 0, q, k)
    assert torch.equal(open_blocks, BlockCausalMask(lengths=(2, 4)).dense(torch.float32) == 0)
    flex.set_offsets_by_lens([2, 4], flags=[True])
    assert flex.get_mask_mod()(0, 0, q, k)[0, 1]
    assert not flex.get_mask_mod()(0, 0, q, k)[2, 3]


def test_flex_segments_must_cover_the_queries():
    flex = FlexAttentionCausal2D()
    flex.set_offsets([2, 4])
    with pytest.raises(ValueError, match=r"segments end at \[4\], but there are 5 tokens"):
        flex.get_block_mask(torch.zeros(1, 1, 5, 16))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 30 is not a multiple of the number of heads 4"):
        Attention(30, 4)


def test_known_tokens_in_any_order_give_the_same_states():
    encoder = VisionTransformer(4, 32, 2).eval()
    x = torch.randn(2, 12, 32)
    ids = torch.rand(2, 12, 1).argsort(1)[:, :5]
    with torch.no_grad():
        states = encoder(x, prev_ids=ids)
        torch.testing.assert_close(encoder(x, prev_ids=ids.flip(1)), states, atol=1e-5, rtol=1e-5)


def test_hidden_tokens_are_unseen_by_the_first_half():
    encoder = VisionTransformer(2, 32, 2, encoder_depth=2).eval()
    x = torch.randn(1, 12, 32)
    ids = torch.arange(5).view(1, 5, 1)
    with torch.no_grad():
        states = encoder(x, prev_ids=ids)
        x[:, 5:] += 1
        torch.testing.assert_close(encoder(x, prev_ids=ids)[:, :5], states[:, :5])


def test_the_head_works_on_chosen_tokens_and_leaves_the_rest():
    head = DiffusionMLP(2, 32, 16).eval()
    x = torch.randn(2, 4, 8, 12)
    z = torch.randn(2, 24, 16)
    ids = torch.rand(2, 24, 1).argsort(1)[:, :5]
    rest = torch.ones(2, 24, dtype=torch.bool).scatter_(1, ids.squeeze(-1), False)
    for timestep in (torch.rand(2) * 1000, torch.rand(2, 24) * 1000):
        with torch.no_grad():
            every, chosen = head(x, timestep, z), head(x, timestep, z, ids)
        torch.testing.assert_close(gather_tokens(chosen, ids), gather_tokens(every, ids))
        assert torch.equal(chosen[rest], head.patch_embed.patchify(x)[rest])


def test_shared_modulation_takes_one_timestep_a_sample():
    model = DiffusionTransformer(1, 32, 2, image_dim=4)
    with pytest.raises(ValueError, match="one timestep a sample"):
        model(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4))


def test_labels_are_dropped_in_training_only():
    embed = LabelEmbed(8, num_classes=10, dropout=0.5)
    ids = torch.full((1000,), 3)
    kept = (embed.train()(ids) == embed.eval()(ids[:1])).all(-1).float().mean()
    assert 0.4 < kept < 0.6
    assert embed(ids).unique(dim=0).size(0) == 1


def test_prompts_are_dropped_in_training_only():
    embed = TextEmbed(16, 8, num_tokens=4, dropout=0.5)
    states = [torch.ones(4, 16)] * 200
    dropped = (embed.train().encode_prompts(states) == embed.weight[:4]).all((1, 2)).float().mean()
    assert 0.35 < dropped < 0.65
    assert (embed.eval().encode_prompts(states) == 1).all()


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "at least one prompt"),
        (["a", np.zeros((1, 16))], TypeError, "all strings or all text states"),
        ([np.zeros((5, 16))], ValueError, r"with k <= 4, got \(5, 16\) for prompt 0"),
        (["a"], ValueError, "none is attached"),
    ],
)
def test_prompts_that_cannot_be_embedded_are_refused(prompts, error, message):
    with pytest.raises(error, match=message):
        TextEmbed(16, 8, num_tokens=4).encode_prompts(prompts)
