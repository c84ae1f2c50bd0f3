"""Runs through launchers: several processes, DeepSpeed ZeRO-2, and changes between them."""

import re

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import launch

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.slow


def losses(run):
    return re.findall(r"Train net output\(loss\): (\S+)", run.log())


@pytest.mark.parametrize(
    "launcher, precision",
    [("plain", "bf16"), ("plain_x2", "no"), ("zero2", "bf16"), ("zero2_x2", "bf16")],
)
def test_stopped_and_continued_equals_straight(
    tiny_run, tmp_path, monkeypatch, launcher, precision
):
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled))
    precision = f"training.mixed_precision={precision}"
    save = "experiment.save_every=2"
    launch(tiny_run, launcher, precision, save, "training.max_train_steps=4")
    launch(tiny_run, launcher, precision)
    straight = type(tiny_run)(tiny_run.base, tiny_run.dataset, tmp_path / "straight")
    launch(straight, launcher, precision, save)
    assert losses(straight) == losses(tiny_run)
    for folder in ("checkpoint", "ema_checkpoint"):
        expected = load_file(getattr(straight, folder)(6) / WEIGHTS)
        actual = load_file(getattr(tiny_run, folder)(6) / WEIGHTS)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # A process that is killed while DeepSpeed compiles leaves a lock that stops all later runs.
    assert not compiled.exists()


def test_gradients_are_reduced_once_a_step_under_accumulation(tiny_run, tmp_path):
    def count(run, accumulation):
        printed = launch(
            run,
            "plain_x2",
            f"training.gradient_accumulation_steps={accumulation}",
            script="tests/engine/train_counting_reductions.py",
        )
        return [int(number) for number in re.findall(r"reductions: (\d+)", printed)]

    other = type(tiny_run)(tiny_run.base, tiny_run.dataset, tmp_path / "other")
    once = count(tiny_run, 1)
    assert len(once) == 2
    assert all(number >= 6 for number in once)  # a bucket or two for each of 6 steps
    assert count(other, 3) == once


def test_zero2_in_full_precision_equals_plain_training(tiny_run, tmp_path):
    launch(tiny_run, "plain", "training.mixed_precision=no")
    other = type(tiny_run)(tiny_run.base, tiny_run.dataset, tmp_path / "zero2")
    launch(other, "zero2", "training.mixed_precision=no")
    assert losses(other) == losses(tiny_run)
    for folder in ("checkpoint", "ema_checkpoint"):
        expected = load_file(getattr(tiny_run, folder)(6) / WEIGHTS)
        actual = load_file(getattr(other, folder)(6) / WEIGHTS)
        torch.testing.assert_close(actual, expected)


def test_two_processes_read_different_examples_and_log_once(tiny_run):
    launch(tiny_run, "plain_x2")
    state = tiny_run.checkpoint(6) / "state"
    shards = [torch.load(state / f"rank_{rank}.pt")["data"] for rank in (0, 1)]
    assert [shard["order"]["shard_id"] for shard in shards] == [0, 1]
    assert [shard["order"]["num_shards"] for shard in shards] == [2, 2]
    assert len(list(tiny_run.output.glob("logs/*.log"))) == 1
    assert tiny_run.log().count("Iteration 0,") == 1


# On every process the same examples, so that their number does not change the gradient.
SAME_EXAMPLES = [
    "train_dataloader.params.shard_id=0",
    "train_dataloader.params.num_shards=1",
    "training.mixed_precision=no",
]


@pytest.mark.parametrize(
    "first, second",
    [
        ("plain_x2", "plain"),
        ("plain", "plain_x2"),
        ("fsdp2_x2", "plain"),
        ("plain_x2", "fsdp2_x2"),
        ("zero2_x2", "zero2"),
        ("zero2", "zero2_x2"),
        ("zero2", "plain"),
        ("plain", "zero2"),
        ("zero2_x2", "fsdp2_x2"),
    ],
)
def test_another_engine_or_number_of_processes_keeps_masters_and_optimizer_state(
    tiny_run, tmp_path, first, second
):
    """A step of rate 0 shows the masters; the moments show in the size of the next update."""
    launch(tiny_run, first, "training.max_train_steps=3")
    launch(tiny_run, second, "training.max_train_steps=4", "optimizer.params.lr=0")
    log = tiny_run.log()
    assert "OPTIMIZER STATE IS RESET" not in log
    assert "each continues after" in log or first.endswith("x2") == second.endswith("x2")
    assert "Iteration 3," in log
    before = load_file(tiny_run.checkpoint(3) / WEIGHTS)
    after = load_file(tiny_run.checkpoint(4) / WEIGHTS)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_empty_shard_ends_every_rank_and_is_the_last_thing_that_the_launcher_prints(tiny_run):
    shards = ["train_dataloader.params.shard_id=19", "train_dataloader.params.num_shards=20"]
    with pytest.raises(AssertionError) as failed:
        launch(tiny_run, "plain_x2", *shards)
    _, _, end = str(failed.value).partition("Root Cause")
    assert "error: train_dataloader.params: 12 examples in shards of 1" in end
