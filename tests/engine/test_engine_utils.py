"""Parameter groups, seeds and weight files."""

import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffnext.engine.engine_utils import (
    count_params,
    freeze_module,
    get_param_groups,
    load_weights,
    manual_seed,
)


def test_counts_trainable_parameters_in_the_unit():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    assert count_params(model) == pytest.approx(41e-6)
    freeze_module(model[0])
    assert count_params(model) == pytest.approx(25e-6)
    assert count_params(model, trainable=False, unit="B") == pytest.approx(41e-9)


def test_each_trainable_parameter_is_in_one_group_with_its_options():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight.lr_scale = 0.5
    model[2].bias.no_weight_decay = True
    freeze_module(model[3])
    groups = get_param_groups(model)
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {},
        {"weight_decay": 0},
        {"lr_scale": 0.5},
    ]
    assert [len(group["params"]) for group in groups] == [2, 3, 1]


def test_shared_parameters_appear_once():
    layer = nn.Linear(2, 2)
    (group,) = get_param_groups(nn.Sequential(layer, layer))
    assert len(group["params"]) == 2


def draws():
    return (random.random(), float(np.random.rand()), float(torch.rand(())))


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_seed_of_a_rank_covers_python_numpy_and_torch(device):
    results = []
    for rank in (0, 1, 0):
        manual_seed(3, (device, 3 + rank))
        results.append(draws())
    assert results[0] == results[2]
    assert all(a != b for a, b in zip(*results[:2], strict=True))


def test_a_seed_alone_is_for_torch():
    manual_seed(1, (None, 1))
    first = draws()
    manual_seed(1, (None, 1))
    manual_seed(5)
    python, numpy, noise = draws()
    assert (python, numpy) == first[:2] and noise != first[2]
    manual_seed(5)
    assert float(torch.rand(())) == noise


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the index names a GPU there")
def test_a_gpu_index_on_a_cpu_machine_means_the_cpu():
    manual_seed(3, (0, 7))
    first = draws()
    manual_seed(3, (None, 7))
    assert draws() == first


def test_a_frozen_module_is_in_evaluation_mode_and_a_thawed_one_in_training():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    for trainable in (False, True):
        assert freeze_module(module, trainable) is module
        assert [part.training for part in module.modules()] == [trainable] * 3
        assert [p.requires_grad for p in module.parameters()] == [trainable] * 2


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_leading_prefix_is_stripped_and_weights_without_it_left_out(tmp_path, suffix):
    source = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    state = {f"0.{name}": value.clone() for name, value in source.state_dict().items()}
    state["1.weight"] = torch.zeros(2)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    target = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    load_weights(target, path, prefix_removed="0.")
    torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_empty_file_name_does_nothing():
    load_weights(nn.Linear(1, 1), "")


def test_pickles_are_not_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    for name in ("weights.pkl", "weights.bin"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Attack()))
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            load_weights(nn.Linear(1, 1), path)
