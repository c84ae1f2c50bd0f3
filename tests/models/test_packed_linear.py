"""Packed weights give the results of the layers they were made of, whatever happens to them."""

import copy

import pytest
import torch
from torch import nn

from diffnext.models.packed_linear import PackedLinear, prepack_linears
from diffnext.pipelines import NOVAPipeline
from tests.tiny import generation_inputs, make_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN"
)


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def sample(model):
    with torch.no_grad():
        return model(generation_inputs())["x"]


@pytest.fixture
def packed():
    model = make_model()
    NOVAPipeline(model, scheduler=model.sample_scheduler).prepack()
    return model


def test_samples_are_equal_up_to_rounding(packed):
    torch.testing.assert_close(sample(packed), sample(make_model()), atol=1e-5, rtol=1e-5)
    assert all(layer._packed is not None for layer in packed_layers(packed.image_encoder))


def test_parameters_keep_their_names_and_places():
    model = make_model()
    before = dict(model.named_parameters())
    prepack_linears(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_training_and_other_types_take_the_usual_way(packed):
    layer = packed_layers(packed)[0]
    x = torch.randn(3, layer.in_features)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer.bfloat16()(x.bfloat16()).dtype is torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x).dtype is torch.bfloat16
    assert layer._packed is None


@pytest.mark.parametrize("has_bias", [True, False])
def test_changed_weights_are_packed_anew(has_bias):
    linear = nn.Linear(8, 5, bias=has_bias)
    layer = PackedLinear(linear)
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x))
    with torch.no_grad():
        linear.weight.mul_(2)
        torch.testing.assert_close(layer(x), linear(x))
        linear.load_state_dict(nn.Linear(8, 5, bias=has_bias).state_dict())
        torch.testing.assert_close(layer(x), linear(x))
        layer.weight.data = torch.randn(5, 8)
        torch.testing.assert_close(layer(x), linear(x))


def test_a_copy_is_a_layer_of_its_own(packed):
    sample(packed)
    twin = copy.deepcopy(packed)
    first = sample(twin)
    with torch.no_grad():
        packed_layers(packed)[0].weight.zero_()
    assert torch.equal(sample(twin), first)


def test_models_that_it_does_not_help_are_refused():
    with pytest.raises(ValueError, match=r"for float32 on a CPU, the model is of torch.bfloat16"):
        prepack_linears(make_model().bfloat16())
    with pytest.raises(ValueError, match="on meta"):
        prepack_linears(make_model().to("meta"))
