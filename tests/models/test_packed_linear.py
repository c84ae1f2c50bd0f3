"""Packed weights give the results of their layers, also after changes, casts and copies."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffnext.models.packed_linear import PackedLinear, prepack_linears
from tests.tiny import generation_inputs, make_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN"
)


class PackedProducts(TorchDispatchMode):
    """Counts the products with packed weights."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


def count_packed(layer, x):
    with PackedProducts() as products:
        layer(x)
    return products.count


def sample(model):
    with torch.no_grad():
        return model(generation_inputs())["x"]


@pytest.fixture
def packed():
    model = make_model()
    prepack_linears(model)
    return model


@pytest.fixture
def layer():
    return PackedLinear(nn.Linear(8, 5))


def test_samples_are_equal_up_to_rounding(packed):
    with PackedProducts() as products:
        samples = sample(packed)
    torch.testing.assert_close(samples, sample(make_model()), atol=1e-5, rtol=1e-5)
    assert products.count > 100


def test_parameters_keep_their_names_and_places():
    model = make_model()
    before = dict(model.named_parameters())
    prepack_linears(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_packed_model_is_saved_as_any_other(packed, tmp_path):
    expected = sample(packed)
    packed.save_pretrained(tmp_path)
    loaded = type(packed).from_pretrained(tmp_path).eval()
    loaded.sample_scheduler = packed.sample_scheduler
    torch.testing.assert_close(sample(loaded), expected, atol=1e-5, rtol=1e-5)


def test_a_packed_model_can_be_cast_and_cast_back(packed):
    sample(packed)
    assert sample(packed.bfloat16()).dtype is torch.bfloat16
    expected = sample(make_model().bfloat16().float())
    torch.testing.assert_close(sample(packed.float()), expected, atol=1e-5, rtol=1e-5)


def test_training_and_other_types_take_the_usual_way(layer):
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert count_packed(layer, x) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert count_packed(layer, x) == 0
            assert layer(x).dtype is torch.bfloat16
        assert count_packed(layer.bfloat16(), x.bfloat16()) == 0


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
        linear.weight = layer.weight = nn.Parameter(torch.randn(5, 8))
        torch.testing.assert_close(layer(x), linear(x))


@torch.inference_mode()
def test_weights_whose_changes_are_not_counted_take_the_usual_way():
    layer = PackedLinear(nn.Linear(8, 5))
    x = torch.randn(3, 8)
    before = layer(x)
    layer.weight.zero_()
    assert torch.equal(layer(x), layer.bias.expand(3, 5)) and not torch.equal(layer(x), before)


@torch.no_grad()
def test_fake_tensors_leave_no_trace(layer):
    x = torch.randn(3, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert layer(fake.from_tensor(x)).shape == (3, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_copy_is_a_layer_of_its_own(packed):
    sample(packed)
    twin = copy.deepcopy(packed)
    first = sample(twin)
    with torch.no_grad():
        packed.image_encoder.blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(sample(twin), first)


def test_models_that_it_does_not_help_are_refused():
    with pytest.raises(ValueError, match=r"for float32 on a CPU, the model is torch.bfloat16"):
        prepack_linears(make_model().bfloat16())
    with pytest.raises(ValueError, match="on meta"):
        prepack_linears(make_model().to("meta"))
