"""Quantised models draw nearly the same, and say what is missing."""

import sys

import pytest
import torch

from diffnext.models.quantization import quantize_blocks
from diffnext.pipelines import NOVAPipeline
from tests.tiny import generation_inputs, make_model


@pytest.mark.parametrize("kind", ["int8", "int8_dynamic"])
def test_a_quantised_model_is_smaller_and_nearly_the_same(kind):
    model = make_model()
    exact = model(generation_inputs())["x"]
    quantize_blocks(model, kind)
    assert model.image_encoder.blocks[0].mlp.fc1.weight.qdata.dtype is torch.int8
    close = model(generation_inputs())["x"]
    error = (close - exact).norm() / exact.norm()
    assert 0 < error < 0.1


def test_embeddings_and_heads_keep_their_type():
    model = make_model()
    before = {name: type(p.data) for name, p in model.named_parameters()}
    quantize_blocks(model, "int8")
    changed = {n for n, p in model.named_parameters() if type(p.data) is not before[n]}
    assert changed and all(".blocks." in name and name.endswith("weight") for name in changed)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be one of .*float8.*, got 'int4'"):
        NOVAPipeline(make_model()).quantize("int4")


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        quantize_blocks(make_model(), "int8")
