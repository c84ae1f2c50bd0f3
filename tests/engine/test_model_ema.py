"""The weight average."""

import pytest
import torch
from torch import nn

from diffnext.engine.model_ema import ModelEMA


def test_update_moves_trainable_weights_by_one_minus_decay():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    ema = ModelEMA(model, decay=0.9, device="cpu")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
        model.bias.add_(1)
    ema.update(model)
    torch.testing.assert_close(ema.model.weight, start["weight"] + 0.1)
    torch.testing.assert_close(ema.model.bias, start["bias"])


def test_average_is_float32_without_gradients_and_buffers_keep_their_dtype():
    model = nn.BatchNorm1d(3).to(torch.bfloat16)
    ema = ModelEMA(model)
    assert ema.model.weight.dtype == torch.float32
    assert ema.model.running_mean.dtype == torch.bfloat16
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_small_updates_of_half_precision_weights_are_not_lost():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = ModelEMA(model, decay=0.5)
    masters = [(model.weight, torch.tensor([[1.0 + 2**-12]]))]
    ema.update_from(masters)
    assert ema.model.weight.item() == 1.0 + 2**-13


def test_weights_that_are_not_finite_never_enter_the_average():
    model = nn.Linear(2, 1)
    ema = ModelEMA(model, decay=0.5)
    start = ema.model.weight.clone()
    with torch.no_grad():
        model.weight[0, 1] = float("inf")
        model.bias.add_(1)
    with pytest.raises(ValueError, match=r"1 weights are not finite, one of \(1, 2\)"):
        ema.update(model)
    assert torch.equal(ema.model.weight, start)
    assert torch.isfinite(ema.model.bias).all()


def test_what_merely_hangs_on_a_model_is_shared_not_copied():
    model = nn.Linear(2, 2)
    model.encoders = [nn.Linear(2, 2)]
    ema = ModelEMA(model)
    assert ema.model.encoders is model.encoders
    assert ema.model.weight is not model.weight


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "cuda:0"}, "device"),
        ({"decay": 1.5}, "decay"),
        ({"update_every": 0}, "update_every"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelEMA(nn.Linear(1, 1), **arguments)


def test_models_of_another_structure_are_refused():
    with pytest.raises(ValueError):
        ModelEMA(nn.Linear(1, 1)).update(nn.Linear(1, 1, bias=False))
