"""Layers: shapes, identities and errors."""

import copy
import dataclasses
import random

import accelerate
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import profile

from diffnext.models.attention import BlockCausalMask, LayerKVCache
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
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.models.vision_transformer import Attention, Block, VisionTransformer
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from tests.tiny import make_model


def test_patches_round_trip():
    embed = PatchEmbed(4, 32, 2)
    x = torch.randn(2, 4, 8, 12)
    patches = embed.patchify(x)
    assert patches.shape == (2, 24, 16)
    assert torch.equal(embed.unpatchify(patches, embed.grid(x.shape)), x)
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


def test_token_ids_may_have_one_column_or_one_for_each_axis():
    rope = RotaryEmbed3D(32, (2, 3))
    ids = torch.tensor([[4, 1], [0, 5]]).unsqueeze(-1)
    rotation = rope.get_func(rope.get_pos(), pad=1, ids=ids)
    each = rope.get_func(rope.get_pos(), pad=1, ids=ids.expand(-1, -1, 3))
    assert torch.equal(rotation.weight, each.weight) and rotation.weight.size(2) == 3


def test_a_head_width_that_cannot_be_split_is_refused():
    rope = RotaryEmbed3D(44)
    with pytest.raises(ValueError, match="a head width of 44 cannot be split"):
        rope.get_func(rope.get_pos())


def test_rotary_tables_stay_out_of_the_state_dict():
    assert RotaryEmbed3D(64).state_dict() == {}


def test_a_block_turns_queries_and_keys_by_any_function():
    shapes = []

    def turn(x):
        shapes.append(x.shape)
        return x.roll(1, dims=-1)  # of both: their products stay as they are

    block = Block(32, 2)
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(block(x, pe_func=turn), block(x), atol=1e-5, rtol=1e-5)
    assert shapes == [(3, 2, 5, 16)] * 2


def test_block_causal_attention_equals_the_dense_mask():
    mask = BlockCausalMask(lengths=(7, 4, 4))
    q, k, v = torch.randn(3, 2, 4, 15, 16)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.dtype))
    torch.testing.assert_close(mask.attend(q, k, v), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "is_trained", "is_fused"),
    [
        (torch.bfloat16, 38, True, False),
        (torch.bfloat16, 38, False, True),
        (torch.bfloat16, 513, True, True),
        (torch.float32, 38, True, True),
    ],
)
def test_short_bfloat16_attention_is_trained_without_the_fused_kernel(
    dtype, num_tokens, is_trained, is_fused
):
    block = Block(32, 2).requires_grad_(is_trained)
    x = torch.randn(2, num_tokens, 32)
    with profile() as prof, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = block(x)
    operations = {event.key for event in prof.key_averages()}
    assert ("aten::scaled_dot_product_attention" in operations) is is_fused
    torch.testing.assert_close(output.float(), block(x), atol=0.05, rtol=0.05)


def test_a_mask_prepared_for_flex_attention_gives_the_same():
    mask = BlockCausalMask.of_frames(num_frames=3, frame_tokens=4, num_condition=3)
    flex = FlexAttentionCausal2D()
    flex.set_offsets_by_lens(mask.lengths)
    q, k, v = torch.randn(3, 2, 4, 15, 16)
    ready = dataclasses.replace(mask, block_mask=flex.get_block_mask(q))
    with torch.compiler.set_stance("force_eager"):
        attended = ready.attend(q, k, v)
    torch.testing.assert_close(attended, mask.attend(q, k, v), atol=1e-5, rtol=1e-5)


def test_block_lengths_must_cover_the_tokens():
    q = torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match=r"blocks of \(4, 4\) tokens do not cover 9 queries"):
        BlockCausalMask(lengths=(4, 4)).attend(q, q, q)


def test_cached_attention_equals_attention_over_everything():
    attention = Attention(32, 4)
    x = torch.randn(2, 9, 32)
    cache = LayerKVCache(torch.empty(2, 2, 4, 9, 8))
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x.split([5, 4], dim=1)]
        whole = attention(x, mask=BlockCausalMask(lengths=(5, 4)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_so():
    k = torch.zeros(1, 1, 4, 8)
    cache = LayerKVCache(torch.empty(2, 1, 1, 3, 8))
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


@pytest.mark.parametrize(
    ("lens", "flags"),
    [
        ([5], None),
        ([128, 128], None),
        ([258 + 360, 360, 360], None),
        ([100, 200, 300, 41], [True, False, True]),
        ([256, 128, 1], [False]),
    ],
    ids=str,
)
def test_block_masks_are_those_of_a_dense_table_and_built_once(lens, flags):
    flex = FlexAttentionCausal2D()
    flex.set_offsets_by_lens(lens, flags)
    q = torch.empty(1, 1, sum(lens), 16)
    mask = flex.get_block_mask(q)
    dense = create_block_mask(flex.get_mask_mod(), None, None, sum(lens), sum(lens), "cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(dense, f"{kind}_num_blocks")
        assert torch.equal(getattr(mask, f"{kind}_num_blocks"), counts)
        columns = torch.arange(counts.size(-1)) < counts[..., None]  # the others do not count
        found, expected = (getattr(one, f"{kind}_indices") for one in (mask, dense))
        assert torch.equal(found[columns], expected[columns])
    assert flex.get_block_mask(q) is mask


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


def test_shared_modulation_takes_one_timestep_per_sample():
    model = DiffusionTransformer(1, 32, 2, image_dim=4)
    with pytest.raises(ValueError, match="one timestep per sample"):
        model(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4))


def test_a_diffusion_transformer_needs_its_latent_channels():
    with pytest.raises(ValueError, match="image_dim, .* is required"):
        DiffusionTransformer(1, 32, 2)


def test_labels_are_dropped_in_training_only():
    embed = LabelEmbed(8, num_classes=10, dropout=0.5)
    ids = torch.full((1000,), 3)
    kept = (embed.train()(ids) == embed.eval()(ids[:1])).all(-1).float().mean()
    assert 0.4 < kept < 0.6
    assert embed(ids).unique(dim=0).size(0) == 1


@pytest.mark.parametrize(("dropout", "label"), [(0.1, -1), (0.1, 11), (0, 10)])
def test_labels_without_a_class_are_refused(dropout, label):
    embed = LabelEmbed(8, num_classes=10, dropout=dropout)
    last = len(embed.weight) - 1
    assert embed(torch.tensor([0, last])).shape == (2, 1, 8)
    with pytest.raises(ValueError, match=rf"labels must be from 0 to {last}, got \[0, {label}\]"):
        embed(torch.tensor([0, label]))


def test_prompts_are_dropped_in_training_only():
    embed = TextEmbed(16, 8, num_tokens=4, dropout=0.5)
    states = [torch.ones(4, 16)] * 200
    dropped = (embed.train().encode_prompts(states) == embed.weight[:4]).all((1, 2)).float().mean()
    assert 0.35 < dropped < 0.65
    assert (embed.eval().encode_prompts(states) == 1).all()


def test_padding_neither_drops_nor_draws_whatever_the_mode():
    embed = TextEmbed(16, 8, num_tokens=4, dropout=0.9).train()
    before = random_states()
    padded = embed.pad_states([np.ones((3, 16), np.float16), torch.ones(0, 16)])
    assert random_states() == before
    assert (padded[0, :3] == 1).all() and padded.dtype == embed.weight.dtype
    assert torch.equal(padded[0, 3:], embed.weight[3:4])
    assert torch.equal(padded[1], embed.weight[:4])


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_dropping_draws_one_number_for_each_prompt(dropout):
    embed = TextEmbed(16, 8, num_tokens=4, dropout=dropout).eval()
    states = torch.ones(5, 4, 16)
    np.random.seed(3)
    dropped = embed.drop_states(states)
    after = np.random.rand()
    np.random.seed(3)
    draws = np.random.rand(5 if dropout else 0)
    assert np.random.rand() == after
    expected = [draw < dropout for draw in draws] or [False] * 5
    assert (dropped == embed.weight[:4]).all((1, 2)).tolist() == expected
    assert (states == 1).all()


def test_a_copy_shares_the_text_encoder_and_nothing_else():
    parent = nn.ModuleDict({"text_embed": TextEmbed(16, 8, num_tokens=4)})
    tokenizer, encoder = object(), nn.Linear(2, 2)
    parent["text_embed"].encoders = [tokenizer, encoder]
    copied = copy.deepcopy(parent)["text_embed"]
    assert copied.encoders[0] is tokenizer and copied.encoders[1] is encoder
    copied.encoders.clear()
    with torch.no_grad():
        copied.proj.weight.zero_()
        copied.weight.zero_()
    own = parent["text_embed"]
    assert own.encoders == [tokenizer, encoder]
    assert own.proj.weight.any() and own.weight.any()


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "at least one prompt"),
        ([np.zeros((1, 16)), "a"], TypeError, "prompt 1 must be an array .* of floats, got str"),
        ([np.zeros((5, 16))], ValueError, r"with k <= 4, got \(5, 16\) for prompt 0"),
        ([torch.zeros(2, 15)], ValueError, r"must be \(k, 16\) .* got \(2, 15\) for prompt 0"),
        ([torch.zeros(16)], ValueError, r"got \(16,\) for prompt 0"),
        ([torch.zeros(2, 16), None], TypeError, "prompt 1 must be .* of floats, got NoneType"),
        ([torch.zeros(2, 16).long()], TypeError, "prompt 0 must be .* of floats, got torch.int64"),
        ([torch.full((2, 16), torch.nan)], ValueError, "prompt 0 must be finite, got NaN"),
        (["a"], ValueError, "one is missing"),
    ],
)
def test_prompts_that_cannot_be_embedded_are_refused(prompts, error, message):
    with pytest.raises(error, match=message):
        TextEmbed(16, 8, num_tokens=4).encode_prompts(prompts)


def random_states():
    """Global random states of torch, NumPy and Python."""
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        numpy_state[1].tolist(),
        numpy_state[2],
        random.getstate(),
    )


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": "auto"}])
@pytest.mark.parametrize(
    "config",
    [{"frames": 3, "video_mixer_rank": 4}, {"text_token_dim": None, "rotary_pos_embed": True}],
    ids=["text-video", "class-image"],
)
def test_loading_a_model_leaves_random_states_alone(tmp_path, config, options):
    make_model(**config).save_pretrained(tmp_path)
    before = random_states()
    NOVATransformer3DModel.from_pretrained(tmp_path, **options)
    assert random_states() == before


def test_building_without_weights_leaves_random_states_alone():
    before = random_states()
    with accelerate.init_empty_weights():
        DiffusionTransformer(1, 32, 2, image_dim=4)
        LabelEmbed(8)
    assert random_states() == before


def test_learned_vectors_start_small_and_random():
    model = make_model()
    tables = {"text": model.text_embed.weight, "class": LabelEmbed(64).weight}
    tables["mask"] = torch.cat([make_model(seed=s).mask_embed.mask_token for s in range(9)])
    for name, table in tables.items():
        assert table.std().item() == pytest.approx(0.02, rel=0.1), name


def position_table(size):
    embed = PosEmbed(4, (1, size))
    expected = [[[np.sin(x), np.cos(x), 0, 1] for x in range(size)]]
    return lambda: embed(torch.zeros(1, size, 4)), expected


def training_noise(size):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=size)

    def add_noise():
        index = torch.tensor([0, size - 1])
        return scheduler.add_noise(torch.zeros(2, 1), torch.ones(2, 1), index)

    return add_noise, [[1], [1 / size]]


def masked_attention(size):
    mask = BlockCausalMask((size - 1, 1))

    def attend():
        v = torch.arange(1.0, size + 1).view(1, 1, size, 1)
        return mask.attend(torch.zeros_like(v), torch.zeros_like(v), v).flatten()

    return attend, [size / 2] * (size - 1) + [(size + 1) / 2]


@pytest.mark.parametrize("make_work", [position_table, training_noise, masked_attention])
@pytest.mark.parametrize("without_data", [FakeTensorMode, lambda: torch.device("meta")])
@pytest.mark.parametrize("is_first", [True, False])
def test_tensors_without_data_never_get_into_real_work(make_work, without_data, is_first):
    work, expected = make_work(10 + is_first)  # a size for each order, should a process share
    if not is_first:
        work()
    with without_data():
        made = work()
        assert isinstance(made, FakeTensor) or made.is_meta
    np.testing.assert_allclose(work(), expected, atol=1e-6)
