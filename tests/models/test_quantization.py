"""Quantised models draw nearly the same; what they cannot do is an error with the way out."""

import copy
import sys

import pytest
import torch

from diffnext.models.packed_linear import prepack_linears
from diffnext.models.quantization import QUANTIZATIONS, quantize_blocks
from diffnext.pipelines import NOVAPipeline
from tests.tiny import generation_inputs, make_model


@pytest.fixture(params=QUANTIZATIONS)
def kind(request):
    return request.param


@pytest.fixture
def quantized(kind):
    model = make_model()
    quantize_blocks(model, kind)
    return model


@torch.no_grad()
def sample(model):
    return model(generation_inputs())["x"]


def error_of(samples):
    """Relative to the samples of the exact model."""
    exact = sample(make_model())
    return (samples - exact).norm() / exact.norm()


def test_a_quantised_model_is_smaller_and_nearly_the_same(quantized):
    assert quantized.image_encoder.blocks[0].mlp.fc1.weight.qdata.element_size() == 1
    assert 0 < error_of(sample(quantized)) < 0.1


def test_embeddings_and_heads_keep_their_type():
    model = make_model()
    before = {name: type(p.data) for name, p in model.named_parameters()}
    quantize_blocks(model, "int8")
    changed = {n for n, p in model.named_parameters() if type(p.data) is not before[n]}
    assert changed and all(".blocks." in name and name.endswith("weight") for name in changed)


def test_a_copy_and_a_moved_model_draw_the_same(quantized):
    expected = sample(quantized)
    assert torch.equal(sample(copy.deepcopy(quantized)), expected)
    assert torch.equal(sample(quantized.to("cpu").to(torch.float32).float()), expected)


@pytest.mark.parametrize("is_packed_first", [True, False])
def test_a_model_can_be_quantised_and_packed(kind, is_packed_first):
    model = make_model()
    if is_packed_first:
        prepack_linears(model)
        sample(model)
    quantize_blocks(model, kind)
    if not is_packed_first:
        prepack_linears(model)
    samples = sample(model)
    assert 0 < error_of(samples) < 0.1
    assert torch.equal(sample(copy.deepcopy(model)), samples)


def test_a_compiled_model_can_be_quantised(kind):
    model = make_model()
    model.compile_drawing()
    sample(model)
    quantize_blocks(model, kind)
    assert 0 < error_of(sample(model)) < 0.1


def test_a_model_without_its_weights_is_not_quantised(kind):
    with pytest.raises(ValueError, match="offloaded layer by layer cannot be quantised"):
        quantize_blocks(make_model().to("meta"), kind)


@pytest.mark.parametrize("other", QUANTIZATIONS)
def test_quantising_twice_is_refused(quantized, other):
    expected = sample(quantized)
    with pytest.raises(ValueError, match="cannot be quantised again: load it again"):
        quantize_blocks(quantized, other)
    assert torch.equal(sample(quantized), expected)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_saving_a_quantised_model_is_refused(quantized, tmp_path, safe_serialization):
    with pytest.raises(ValueError, match="cannot be saved: load it again"):
        quantized.save_pretrained(tmp_path / "new", safe_serialization=safe_serialization)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_quantised_model_is_refused(quantized, dtype):
    expected = sample(quantized)
    for cast in (lambda: quantized.to(dtype), lambda: quantized.to("cpu", dtype), quantized.half):
        with pytest.raises(ValueError, match="cannot be cast: load it again"):
            cast()
    assert torch.equal(sample(quantized), expected)


def test_a_cast_model_can_be_quantised(kind):
    model = make_model().bfloat16()
    quantize_blocks(model, kind)
    samples = sample(model)
    assert samples.dtype is torch.bfloat16 and error_of(samples.float()) < 0.1


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be one of .*float8.*, got 'int4'"):
        NOVAPipeline(make_model()).quantize("int4")


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        quantize_blocks(make_model(), "int8")
