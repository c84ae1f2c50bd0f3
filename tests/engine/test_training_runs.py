"""Whole runs of scripts/train.py on a tiny model, in this process."""

import json
import logging
import re
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from diffnext.config.load import parse, read_config
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import config_to_class
from diffnext.engine import reporting
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.builder import build_pipeline, get_pipeline_path
from diffnext.utils.accelerate_utils import build_accelerator, set_logger
from diffnext.utils.omegaconf_utils import get_config, save_config
from tests.engine.conftest import TinyRun
from tests.tiny import make_vae

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def losses(log: str) -> list[str]:
    return re.findall(r"Train net output\(loss\): (\S+)", log)


def test_loss_falls(tiny_run):
    tiny_run.train("training.max_train_steps=40", "optimizer.params.lr=0.002")
    values = [float(value) for value in losses(tiny_run.log())]
    assert len(values) == 40
    assert statistics.mean(values[-5:]) < 0.7 * statistics.mean(values[:5])


def test_log_has_the_documented_lines(tiny_run):
    tiny_run.train("training.max_train_steps=22", "experiment.log_every=2")
    log = tiny_run.log()
    line = r"\d\d/\d\d [\d:]{8} INFO \w+\.py:\d+\] "
    assert re.search(line + r"Iteration 0, lr = 0\.00050000, time = \d+\.\d\ds\n", log)
    assert re.search(line + r"    Train net output\(loss\): \d+\.\d{4} \(\d+\.\d{4}\)\n", log)
    assert re.search(r"< PROGRESS: 90\.91% \| SPEED: \d\.\d{3}s / step \| ETA: 0:00:0\d >", log)
    # Steps 0, 2, ..., 20, and what is left at the end.
    assert [int(n) for n in re.findall(r"Iteration (\d+),", log)] == [*range(0, 21, 2), 21]
    assert re.search(r"#Params: \d+\.\d\dM", log)
    assert "Start training..." in log
    assert f"Wrote snapshot to: {tiny_run.checkpoint(22)}" in log


@pytest.mark.slow
def test_compiled_run_equals_an_eager_one(tiny_run):
    options = ["training.max_train_steps=6", "model.gradient_checkpointing=1"]
    tiny_run.train(*options)
    eager = [float(value) for value in losses(tiny_run.log())]
    weights = load_file(tiny_run.checkpoint(6) / WEIGHTS)
    shutil.rmtree(tiny_run.output)

    counters.clear()
    tiny_run.train(*options, "training.compile=true")
    assert counters["stats"]["unique_graphs"] > 0
    assert [float(value) for value in losses(tiny_run.log())] == pytest.approx(eager, abs=2e-4)
    torch.testing.assert_close(
        load_file(tiny_run.checkpoint(6) / WEIGHTS), weights, atol=1e-3, rtol=1e-2
    )


def test_stopped_and_continued_equals_straight(tiny_run, tmp_path):
    schedule = ["experiment.save_every=3", "ema.params.update_every=3"]
    tiny_run.train("training.max_train_steps=3", *schedule)
    tiny_run.train("training.max_train_steps=6", *schedule)
    continued = losses(tiny_run.log())
    folders = [tiny_run.checkpoint(6), tiny_run.ema_checkpoint(6)]
    stopped = [load_file(folder / WEIGHTS) for folder in folders]
    shutil.rmtree(tiny_run.output)

    tiny_run.train("training.max_train_steps=6", *schedule)
    assert losses(tiny_run.log()) == continued
    for folder, expected in zip(folders, stopped, strict=True):
        torch.testing.assert_close(load_file(folder / WEIGHTS), expected, rtol=0, atol=0)


def test_last_checkpoint_is_complete_when_it_coincides_with_an_interval(tiny_run):
    tiny_run.train("training.max_train_steps=4", "experiment.save_every=2")
    final = tiny_run.checkpoint(4)
    state = json.loads((final / "state" / "trainer_state.json").read_text())
    assert state["step"] == 4
    # The only average update so far is the final one, with decay 0.95.
    start = load_file(tiny_run.base / WEIGHTS)
    end = load_file(final / WEIGHTS)
    average = load_file(tiny_run.ema_checkpoint(4) / WEIGHTS)
    for name in ("mask_embed.mask_token", "image_encoder.norm.weight"):
        torch.testing.assert_close(average[name], 0.95 * start[name] + 0.05 * end[name])


def test_autoencoder_from_elsewhere_is_remembered(tiny_run, tmp_path):
    vae = make_vae(seed=5)
    vae.save_pretrained(tmp_path / "other-vae")
    overrides = [f"pipeline.paths.module_dict.vae={tmp_path / 'other-vae'}"]
    tiny_run.train("training.max_train_steps=1", *overrides)
    pipe = NOVAPipeline.from_pretrained(tiny_run.checkpoint(1))
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(pipe.vae.state_dict()[name], value, rtol=0, atol=0)
    # A run that starts from this checkpoint passes the memory on.
    later = type(tiny_run)(tiny_run.checkpoint(1), tiny_run.dataset, tmp_path / "later")
    later.train("training.max_train_steps=1")
    pipe = NOVAPipeline.from_pretrained(later.checkpoint(1))
    torch.testing.assert_close(pipe.vae.state_dict(), vae.state_dict(), rtol=0, atol=0)


def test_values_laid_over_other_components_hold_for_the_run_and_are_named(tiny_run):
    config = parse(read_config(tiny_run.arguments("training.max_train_steps=1"))[0], TrainConfig)
    folder = get_pipeline_path(tiny_run.base, None, {"scheduler": {"shift": 3.5}})
    assert build_pipeline(folder, config_to_class(config.pipeline)).scheduler.config.shift == 3.5
    key = "pipeline.paths.module_config.scheduler"
    tiny_run.train("training.max_train_steps=1", f"{key}.shift=3.5")
    assert f"{key} holds for this run only" in tiny_run.log()


def test_steps_of_an_earlier_process_do_not_count_in_the_time(tiny_run, monkeypatch):
    config = parse(read_config(tiny_run.arguments("training.max_train_steps=4"))[0], TrainConfig)
    tiny_run.output.mkdir()
    clock = SimpleNamespace(perf_counter=lambda: 0.0)
    monkeypatch.setattr(reporting, "time", clock)
    accelerator = build_accelerator(config)
    before, after = (reporting.Reporter(config, accelerator, logging.getLogger()) for _ in range(2))
    one = torch.tensor(1.0)
    steps = [reporting.StepResult(number, 1e-3, {"loss": one}, one, 8) for number in range(4)]
    for step in steps[:3]:
        before.add(step)
    after.load_state_dict(before.state_dict())
    after.add(steps[3])
    clock.perf_counter = lambda: 2.0
    after.report()
    assert tiny_run.metrics("time") == [2.0]


def test_small_updates_survive_mixed_precision(tiny_run):
    """The master weights are float32: with bf16 ones, steps of 1e-6 would be rounded away."""
    tiny_run.train(
        "training.max_train_steps=2",
        "training.mixed_precision=bf16",
        "optimizer.params.lr=1e-6",
        "optimizer.params.weight_decay=0",
        "ema.params.decay=0",  # the average is the masters
    )
    start = load_file(tiny_run.base / WEIGHTS)["image_encoder.blocks.0.attn.qkv.weight"]
    state = load_file(tiny_run.ema_checkpoint(2) / WEIGHTS)
    moved = state["image_encoder.blocks.0.attn.qkv.weight"] - start
    assert moved.abs().median() > 1e-6


@pytest.fixture(scope="module")
def short_run(tiny_base, tiny_dataset, tmp_path_factory):
    """A run of two steps that no test changes."""
    run = TinyRun(tiny_base, tiny_dataset, tmp_path_factory.mktemp("short") / "run")
    run.train("training.max_train_steps=2", "training.mixed_precision=bf16")
    return run


def test_checkpoints_generate_as_they_are(short_run):
    for folder in (short_run.checkpoint(2), short_run.ema_checkpoint(2)):
        pipeline = NOVAPipeline.from_pretrained(folder)
        images = pipeline(
            "a red star", num_inference_steps=2, num_diffusion_steps=2, output_type="np"
        ).images
        assert images.shape == (1, 64, 64, 3)
    for folder, dtype in (("checkpoint", torch.bfloat16), ("ema_checkpoint", torch.float32)):
        weights = load_file(getattr(short_run, folder)(2) / WEIGHTS)
        assert weights["mask_embed.mask_token"].dtype == dtype


def test_frozen_weights_do_not_move(short_run):
    start = load_file(short_run.base / WEIGHTS)
    end = load_file(short_run.checkpoint(2) / "state" / "engine.safetensors")
    for name in ("text_embed.norm.weight", "video_encoder.patch_embed.proj.weight"):
        torch.testing.assert_close(end[f"model.{name}"], start[name], rtol=0, atol=0)


def test_saved_configuration_is_the_users_and_can_be_used_again(short_run):
    for path in (short_run.output, short_run.checkpoint(2) / "state"):
        saved = OmegaConf.load(path / "config.yaml")
        assert saved.training.seed == 1337
        assert saved.experiment.resume_from_checkpoint == "latest"
        assert "gpu_id" not in saved.training
        assert "max_examples" not in saved.train_dataloader.params
    file = short_run.output / "config.yaml"
    assert "${training.batch_size}" in file.read_text()
    config = get_config([f"config={file}", "training.max_train_steps=3"])
    assert config.training.max_train_steps == 3


def test_resume_from_an_explicit_path(tiny_run):
    tiny_run.train("training.max_train_steps=4", "experiment.save_every=2")
    first = losses(tiny_run.log())
    path = f"{tiny_run.checkpoint(2)}/"
    output = tiny_run.output.parent / "other"
    tiny_run.train(
        "training.max_train_steps=4",
        f"experiment.resume_from_checkpoint={path}",
        f"experiment.output_dir={output}",
    )
    log = "".join(file.read_text() for file in output.glob("logs/*.log"))
    assert losses(log) == first[2:]


def test_half_written_checkpoint_is_passed_over_and_moved_away(tiny_run):
    tiny_run.train("training.max_train_steps=4", "experiment.save_every=2")
    straight = losses(tiny_run.log())
    broken = tiny_run.checkpoint(4) / WEIGHTS
    broken.write_bytes(broken.read_bytes()[:5000])
    tiny_run.train("training.max_train_steps=4", "experiment.save_every=2")
    log = tiny_run.log()
    assert "checkpoint-4 is damaged and is not used" in log
    assert f"{tiny_run.checkpoint(4)} was there already" in log
    assert losses(log)[4:] == straight[2:]
    assert load_file(broken)


def test_original_layout_resumes_with_a_warning(tiny_run):
    source = tiny_run.base / "transformer"
    target = tiny_run.checkpoint(5) / "transformer"
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    torch.save(load_file(tiny_run.base / WEIGHTS), target / "diffusion_pytorch_model.bin")
    tiny_run.train("training.max_train_steps=6")
    log = tiny_run.log()
    assert "holds no optimizer state" in log and "THE OPTIMIZER STATE IS RESET" in log
    assert "holds no data position" in log
    assert "has no averaged weights" in log
    assert "Iteration 5," in log
    assert tiny_run.checkpoint(6).is_dir() and tiny_run.ema_checkpoint(6).is_dir()


def test_reached_step_ends_early_and_changes_nothing(tiny_run):
    tiny_run.train("training.max_train_steps=2")
    before = (tiny_run.ema_checkpoint(2) / WEIGHTS).stat().st_mtime_ns
    tiny_run.train("training.max_train_steps=2")
    assert "Nothing to do" in tiny_run.log()
    assert "Iteration 2" not in tiny_run.log()
    assert (tiny_run.ema_checkpoint(2) / WEIGHTS).stat().st_mtime_ns == before


def test_old_checkpoints_are_deleted_on_request(tiny_run):
    tiny_run.train(
        "training.max_train_steps=4", "experiment.save_every=1", "checkpoint.keep_last=2"
    )
    for tree in ("checkpoints", "ema_checkpoints"):
        names = sorted(path.name for path in (tiny_run.output / tree).iterdir())
        assert names == ["checkpoint-3", "checkpoint-4"]


def test_bin_format_is_written_and_resumed(tiny_run):
    tiny_run.train("training.max_train_steps=1", "checkpoint.format=bin")
    folder = tiny_run.checkpoint(1) / "transformer"
    assert (folder / "diffusion_pytorch_model.bin").is_file()
    assert not (folder / "diffusion_pytorch_model.safetensors").exists()
    tiny_run.train("training.max_train_steps=2", "checkpoint.format=bin")
    assert "Iteration 1," in tiny_run.log()
    NOVAPipeline.from_pretrained(tiny_run.checkpoint(2))


def test_without_ema_section_no_average_is_written(tiny_run):
    tiny_run.train("training.max_train_steps=1", "ema=null")
    assert not (tiny_run.output / "ema_checkpoints").exists()


def sgd_arguments(run, *overrides):
    """A configuration with plain SGD of rate 1, so that the update is the gradient."""
    config = get_config(run.arguments(*overrides))
    config.optimizer = {"target": "torch.optim.SGD", "params": {"lr": 1.0}}
    path = run.output.parent / "sgd.yaml"
    save_config(config, path)
    return f"config={path}"


def update_of(run, step=1):
    start = load_file(run.base / WEIGHTS)
    end = load_file(run.checkpoint(step) / WEIGHTS)
    return torch.cat([(end[name] - start[name]).flatten() for name in start])


def test_gradient_norm_is_clipped(tiny_run):
    sgd = sgd_arguments(tiny_run)
    tiny_run.train(sgd, "training.max_train_steps=1", "training.max_grad_norm=0.25")
    assert update_of(tiny_run).norm().item() == pytest.approx(0.25, rel=1e-3)


def test_accumulation_averages_the_gradients_of_its_micro_batches(tiny_run):
    sgd = sgd_arguments(tiny_run)
    tiny_run.train(sgd, "training.max_train_steps=1")
    first = update_of(tiny_run)
    shutil.rmtree(tiny_run.output)

    # A vanishing rate in step 0: the second micro-batch meets the same weights as the first.
    tiny_run.train(
        sgd,
        "training.max_train_steps=2",
        "lr_scheduler.target=diffnext.engine.lr_scheduler.MultiStepLR",
        "lr_scheduler.params.lr_max=1e-12",
        "lr_scheduler.params.decay_steps=[1]",
        "lr_scheduler.params.decay_gamma=1e12",
    )
    second = update_of(tiny_run, step=2)
    shutil.rmtree(tiny_run.output)

    tiny_run.train(sgd, "training.max_train_steps=1", "training.gradient_accumulation_steps=2")
    torch.testing.assert_close(update_of(tiny_run), (first + second) / 2, rtol=1e-3, atol=1e-6)
    assert len(losses(tiny_run.log())) == 1
    assert not torch.allclose(first, second)


def test_trainer_of_the_library_counts_steps_and_returns_results(tiny_run):
    from diffnext.engine.train_engine import Trainer

    config = get_config(tiny_run.arguments("training.max_train_steps=2"))
    accelerator = build_accelerator(config)
    trainer = Trainer(config, accelerator, set_logger(accelerator=accelerator))
    result = trainer.run_step(accum_steps=1)
    assert (result.step, result.lr) == (0, 5e-4)
    assert list(result.metrics) == ["loss"]
    assert not result.metrics["loss"].requires_grad
    trainer.close()
    with pytest.raises(RuntimeError, match="closed"):
        trainer.run_step(accum_steps=1)


def test_changed_dataset_restarts_the_data_with_a_warning(tiny_run):
    tiny_run.train("training.max_train_steps=1")
    tiny_run.train("training.max_train_steps=2", "train_dataloader.params.shuffle=false")
    assert "data restarts" in tiny_run.log()
    assert "Iteration 1," in tiny_run.log()
