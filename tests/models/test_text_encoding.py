"""Text states do not depend on threads, autocast or what else ran; wrong prompts are named."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffnext.models.text_encoders.encoding import encode_texts
from diffnext.models.text_encoders.phi import apply_rotary_emb, apply_rotary_emb_torch
from tests.pipelines.conftest import make_text_encoder, make_tokenizer

TEXTS = ["a cat on the mat", "red dog", "", "the red red red dog on the cat"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def encoder():
    return make_text_encoder()


def encode(tokenizer, encoder, texts=TEXTS, max_tokens=7):
    return encode_texts(tokenizer, encoder, texts, max_tokens, 64)


def assert_equal(states, expected):
    assert len(states) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(states, expected, strict=True))


def test_threads_share_a_tokenizer(tokenizer, encoder):
    texts = ["a cat on the mat " * 1000]  # long enough for threads to meet in the tokenizer
    lengths = [3, 7, 5, 8] * 20
    alone = {length: encode(tokenizer, encoder, texts, length) for length in set(lengths)}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda length: encode(tokenizer, encoder, texts, length), lengths)
        for length, states in zip(lengths, found, strict=True):
            assert_equal(states, alone[length])


@pytest.mark.parametrize("max_length", [None, 4])
def test_a_tokenizer_is_left_as_it_was(tokenizer, encoder, max_length):
    if max_length is not None:
        tokenizer.backend_tokenizer.enable_truncation(max_length)
    before = tokenizer.backend_tokenizer.to_str()
    assert len(encode(tokenizer, encoder)[-1]) == 7
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(tokenizer, encoder, dtype):
    exact = torch.cat(encode(tokenizer, encoder))
    states = encode(tokenizer, encoder.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(encode(tokenizer, encoder), states)
    assert {x.dtype for x in states} == {dtype}
    torch.testing.assert_close(torch.cat(states).float(), exact, atol=0.1, rtol=0.1)


def test_texts_without_tokens_have_states_of_the_type_of_the_encoder(tokenizer, encoder):
    (state,) = encode(tokenizer, encoder.bfloat16(), [""])
    assert state.shape == (0, 64) and state.dtype is torch.bfloat16


@pytest.mark.parametrize("text", [b"a cat", None, 3, ["a cat"]])
def test_prompts_that_are_not_strings_are_named(tokenizer, encoder, text):
    with pytest.raises(TypeError, match=f"prompt 1 must be a string, got {type(text).__name__}"):
        encode(tokenizer, encoder, ["a cat", text])


def test_prompts_that_are_not_unicode_are_named(tokenizer, encoder):
    with pytest.raises(ValueError, match=r"prompt 1 is not Unicode text: 'a\\udcff'"):
        encode(tokenizer, encoder, ["a cät", "a\udcff"])


def test_tokens_that_the_encoder_does_not_know_are_named(tokenizer, encoder):
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    with pytest.raises(ValueError, match=r"below 20, which the text encoder has; .* 'a word19'"):
        encode(tokenizer, encoder, ["a cat", "a word19"])


def test_fake_tensors_leave_no_trace(tokenizer, encoder):
    states = encode(tokenizer, encoder)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encode(tokenizer, encoder)
    assert_equal(encode(tokenizer, encoder), states)


def test_both_forms_of_rotation_agree():
    q, k = torch.randn(2, 1, 3, 5, 8).unbind(0)  # (B, H, S, r)
    angles = torch.randn(5, 4)
    cos, sin = angles.cos(), angles.sin()
    pair = apply_rotary_emb(q, k, cos.repeat(1, 2)[None], sin.repeat(1, 2)[None])
    for x, expected in zip((q, k), pair, strict=True):
        wider = torch.cat([x.transpose(1, 2), torch.ones(1, 5, 3, 2)], dim=-1)
        result = apply_rotary_emb_torch(wider, cos, sin)
        torch.testing.assert_close(result[..., :8].transpose(1, 2), expected)
        assert (result[..., 8:] == 1).all()
