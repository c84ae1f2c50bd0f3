"""Runs on several datasets: whose turn it is, what they must have in common, what is told."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffnext.config.load import parse, read_config
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError
from diffnext.data.caching.reshaping import merge
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.data.records import RecordDataset, RecordWriter
from diffnext.engine.run_inputs import open_inputs
from tests.engine.conftest import WORDS, TinyRun, launch

MODEL = "pipeline.paths.module_config.transformer"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DATA = "train_dataloader.params.dataset"
VALIDATION = [
    "validation.every=2",
    "validation.num_inference_steps=2",
    "validation.num_diffusion_steps=2",
]
SHAPES = {"square": (8, 8), "wide": (8, 12), "tall": (12, 4)}


def write_records(folder, entries, size, channels=4, caption="a {} star"):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(entries)
    features = {"moments": "bytes", "shape": ["int64"], "caption": "string"}
    with RecordWriter(folder, features) as writer:
        for index in range(entries):
            mean = rng.normal(size=(channels, *size))
            moments = np.concatenate([mean, np.full_like(mean, -10.0)]).astype(np.float16)
            text = caption.format(WORDS[1 + index % 3])
            writer.write({"moments": moments, "shape": moments.shape, "caption": text})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("shapes")
    return [
        write_records(place / name, entries, SHAPES[name])
        for name, entries in (("square", 12), ("wide", 8), ("tall", 6))
    ]


def mix(folders, *weights):
    """The value of the key, as it is written on a command line."""
    weights = weights or (2, 1, 1)
    entries = [f"{{folder: {f}, weight: {w}}}" for f, w in zip(folders, weights, strict=True)]
    return f"[{','.join(entries)}]"


@pytest.fixture
def run(tiny_base, folders, tmp_path):
    """A run on three datasets of three shapes."""
    return TinyRun(tiny_base, mix(folders), tmp_path / "run")


@pytest.fixture
def batches(monkeypatch):
    """The latents of all batches that are read in this process."""
    taken = []
    read = FeatureDataLoader.next

    def note(loader):
        (batch,) = read(loader)
        taken.append(batch["latents"].copy())
        return [batch]

    monkeypatch.setattr(FeatureDataLoader, "next", note)
    return taken


def count_sizes(batches):
    return Counter(batch.shape[-2:] for batch in batches)


def problems_of(run, *overrides, processes=1):
    with pytest.raises(ConfigError) as refused:
        open_run(run, *overrides, processes=processes)
    return refused.value.problems


def open_run(run, *overrides, processes=1):
    return open_inputs(parse(read_config(run.arguments(*overrides))[0], TrainConfig), processes)


# Training


@pytest.mark.parametrize("accumulation", [1, 3])
def test_batches_come_in_the_proportion_of_the_weights(run, batches, accumulation):
    steps = 12 // accumulation
    run.train(
        f"training.max_train_steps={steps}",
        f"training.gradient_accumulation_steps={accumulation}",
    )
    assert count_sizes(batches) == {(8, 8): 6, (8, 12): 3, (12, 4): 3}
    assert all(len(batch) == 2 for batch in batches)
    assert len(run.metrics("loss")) == steps
    log = run.log()
    assert log.count("; 25.00% of the batches") == 2 * len(list(run.output.glob("logs/*.log")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_continued_reads_what_an_undisturbed_one_reads(
    run, batches, tmp_path, workers
):
    options = [f"train_dataloader.params.num_workers={workers}"]
    options.append("training.gradient_accumulation_steps=2")
    run.train("training.max_train_steps=3", *options)
    run.train("training.max_train_steps=7", *options)
    continued, batches[:] = list(batches), []
    straight = TinyRun(run.base, run.dataset, tmp_path / "straight")
    straight.train("training.max_train_steps=7", *options)
    for batch, expected in zip(continued, batches, strict=True):
        assert np.array_equal(batch, expected)
    expected = load_file(straight.checkpoint(7) / WEIGHTS)
    for name, value in load_file(run.checkpoint(7) / WEIGHTS).items():
        assert value.equal(expected[name])


@pytest.mark.slow
def test_four_hundred_batches_killed_once_are_those_of_an_undisturbed_run(run, batches, tmp_path):
    options = ["experiment.save_every=70", "training.max_train_steps=400"]
    run.train(*options[:1], "training.max_train_steps=210")
    shutil.rmtree(run.checkpoint(210))  # as if it had been killed before that one was written
    continued = batches[:140]
    batches.clear()
    run.train(*options)
    continued += batches
    batches.clear()
    straight = TinyRun(run.base, run.dataset, tmp_path / "straight")
    straight.train(*options)
    assert count_sizes(batches) == {(8, 8): 200, (8, 12): 100, (12, 4): 100}
    for batch, expected in zip(continued, batches, strict=True):
        assert np.array_equal(batch, expected)


def tokens_of_steps(run):
    """Image tokens of each step that was reported, as far as throughput tells them apart."""
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").open()]
    return [round(row["tokens_per_s"] * row["time"]) for row in rows]


def test_a_reported_loss_is_the_mean_of_its_micro_batches(run, tmp_path):
    still = ["optimizer.params.lr=0", "training.mixed_precision=no"]
    run.train("training.max_train_steps=6", *still)
    single = run.metrics("loss")
    other = TinyRun(run.base, run.dataset, tmp_path / "other")
    accumulation = "training.gradient_accumulation_steps=3"
    other.train("training.max_train_steps=2", accumulation, *still)
    expected = [np.mean(single[:3]), np.mean(single[3:])]
    np.testing.assert_allclose(other.metrics("loss"), expected, rtol=1e-5)


def test_throughput_is_that_of_all_steps_since_the_last_report(run):
    run.train("training.max_train_steps=8", "experiment.log_every=4")
    # Steps 0, 1 to 4 and 5 to 7, on two samples of 16, 24, 12, 16, 16, 24, 12, 16 tokens.
    assert tokens_of_steps(run) == [2 * 16, 2 * 17, round(2 * 52 / 3)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain_x2", "fsdp2_x2"])
def test_two_processes_take_turns_together_and_continue(run, tmp_path, launcher):
    precision = "training.mixed_precision=no"
    launch(run, launcher, precision, "experiment.save_every=3", "training.max_train_steps=3")
    launch(run, launcher, precision)
    straight = TinyRun(run.base, run.dataset, tmp_path / "straight")
    launch(straight, launcher, precision)
    # 16 tokens of the square, 24 of the wide and 12 of the tall ones; of 2 processes x 2 samples.
    expected = [4 * tokens for tokens in (16, 24, 12, 16, 16, 24)]
    assert tokens_of_steps(run) == tokens_of_steps(straight) == expected
    expected = load_file(straight.checkpoint(6) / WEIGHTS)
    for name, value in load_file(run.checkpoint(6) / WEIGHTS).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("plain_x2", "plain"), ("plain", "plain_x2")])
def test_another_number_of_processes_goes_on_with_the_next_dataset(run, first, second):
    precision = "training.mixed_precision=no"
    launch(run, first, precision, "training.max_train_steps=4", "experiment.save_every=4")
    launch(run, second, precision, "training.max_train_steps=6")
    assert "each continues after" in run.log()
    consumed = 4 * 2 * (2 if first == "plain_x2" else 1) // (2 if second == "plain_x2" else 1)
    with FeatureDataLoader(
        [{"folder": f, "weight": w} for f, w in zip(folders_of(run), (2, 1, 1), strict=True)],
        batch_size=2,
    ) as loader:
        loader.load_state_dict({**loader.state_dict(), "consumed": consumed})
        sizes = [loader.next()[0]["latents"].shape[-2:] for _ in range(2)]
    processes = 2 if second == "plain_x2" else 1
    expected = [processes * 2 * rows * columns // 4 for rows, columns in sizes]
    assert tokens_of_steps(run)[-2:] == expected


def folders_of(run):
    return re.findall(r"folder: ([^,]+),", run.dataset)


def test_other_weights_are_another_dataset(run, folders):
    run.train("training.max_train_steps=2")
    other = TinyRun(run.base, mix(folders, 1, 1, 1), run.output)
    other.train("training.max_train_steps=3")
    assert "the dataset was" in run.log() and "data restarts" in run.log()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("several", [True, False])
def test_each_dataset_is_opened_once(run, folders, monkeypatch, workers, several):
    opened = []
    real = os.open

    def note(path, *arguments, **options):
        opened.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", note)
    single = TinyRun(run.base, folders[0], run.output)
    (run if several else single).train(
        "training.max_train_steps=2",
        *VALIDATION,
        "validation.holdout=0.25",
        f"train_dataloader.params.num_workers={workers}",
    )
    counts = Counter(path for path in opened if path.endswith((".index", "METADATA")))
    wanted = [str(folder / n) for folder in folders for n in ("METADATA", "00000.index")]
    assert counts == dict.fromkeys(wanted if several else wanted[:2], 1)


def test_videos_of_several_lengths_and_single_frames_train_together(tmp_path):
    from tests.engine.test_video_and_class_runs import losses, train

    release = make_video_release(tmp_path / "base")
    data = [
        write_records(tmp_path / f"frames-{count}", 6, (count, 8, 12), caption="a cat")
        for count in (1, 2, 3)
    ]
    log = train(
        "nova_d48w1024_osp480.yaml",
        release,
        mix(data, 1, 1, 1),
        tmp_path / "run",
        "training.max_train_steps=6",
        "training.gradient_accumulation_steps=2",
        "experiment.log_every=2",
        *VALIDATION,
        "validation.every=6",
        "validation.holdout=0.34",
    )
    # Of the last step alone, which read clips of two lengths, there is no loss of single frames.
    for name, count in {"loss": 3, "loss_t2i": 4, "loss_i2i": 4}.items():
        assert len(losses(log, name)) == count
        assert f"Validation({name})" in log


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(1,), (1, 3)])
def test_single_frames_train_a_video_model_on_two_processes(tmp_path, lengths):
    """Parts that single frames do not use get no gradient, on which plain DDP would wait."""
    from tests.engine.test_video_and_class_runs import TINY

    release = make_video_release(tmp_path / "base")
    data = [write_records(tmp_path / f"{n}", 6, (n, 8, 12), caption="a cat") for n in lengths]
    run = TinyRun(release, mix(data, *[1] * len(data)), tmp_path / "run")
    sizes = {**TINY, "rotary_pos_embed": False}
    launch(
        run,
        "plain_x2",
        "pipeline.target=diffnext.pipelines.nova.pipeline_train_t2v.NOVATrainT2VPipeline",
        *(f"{MODEL}.{key}={value}" for key, value in sizes.items()),
        "training.gradient_accumulation_steps=2",
    )
    assert len(run.metrics("loss")) == 6
    assert len(run.metrics("loss_i2i")) == 6 * (len(lengths) - 1)


def make_video_release(folder):
    from diffusers import DDPMScheduler

    from diffnext.pipelines import NOVAPipeline
    from tests.pipelines.conftest import make_text_encoder, make_tokenizer, write_release
    from tests.tiny import make_model, make_video_vae

    pipe = NOVAPipeline(
        transformer=make_model(frames=3, video_mixer_rank=24),
        scheduler=DDPMScheduler(),
        vae=make_video_vae().half(),
        text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(),
    )
    return write_release(pipe, folder)


def test_pictures_of_several_sizes_are_built_and_trained_on(tiny_base, batches, tmp_path):
    from diffnext.cli.cache import main as build
    from tests.data.caching_inputs import draw_picture

    (tmp_path / "photos").mkdir()
    for number, (width, height) in enumerate([(90, 60), (60, 90), (64, 64), (99, 66)] * 4):
        picture = draw_picture(number, width, height)
        picture.save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text("a red circle")
    sizes = ["64", "64x96", "96x64"]
    arguments = [str(tmp_path / "photos"), "--output", str(tmp_path / "cache")]
    assert build(["images", *arguments, "--vae", str(tiny_base), "--size", *sizes]) == 0
    TinyRun(tiny_base, tmp_path / "cache", tmp_path / "run").train("training.max_train_steps=8")
    assert count_sizes(batches) == {(8, 12): 4, (12, 8): 2, (8, 8): 2}


# Held-out examples


@pytest.mark.parametrize("several", [True, False])
def test_a_share_of_each_is_held_out(run, folders, several, batches, tmp_path):
    options = ["training.max_train_steps=2", *VALIDATION]
    held = tmp_path / "held"
    for folder in folders:
        shutil.copytree(folder, held / folder.name)
    counts = {folder.name: 6 for folder in folders}
    (held / "manifest.json").write_text(json.dumps({"datasets": counts}))
    holdout = held if several else 0.25
    run.train(*options, f"validation.holdout={holdout}")
    if several:
        assert count_sizes(batches[2:]) == {(8, 8): 6, (8, 12): 4, (12, 4): 3}
        return
    assert count_sizes(batches[2:]) == {(8, 8): 2, (8, 12): 1, (12, 4): 1}
    for folder, count in zip(folders, (3, 2, 2), strict=True):
        with RecordDataset(folder) as dataset:
            last = {example["moments"] for example in list(dataset)[-count:]}
        size = SHAPES[folder.name]
        found = {m.tobytes() for batch in batches[2:] if batch.shape[-2:] == size for m in batch}
        trained = {m.tobytes() for batch in batches[:2] if batch.shape[-2:] == size for m in batch}
        assert found == last and not trained & last
    assert len(run.metrics("validation/loss")) == 1


def test_every_held_out_batch_counts(tiny_run, tmp_path):
    """Noise and first batch are the same, so that only a second one makes a difference."""
    merge([write_records(tmp_path / f"{count}", count, (8, 8)) for count in (2, 3)], tmp_path / "5")
    losses = []
    for count in (2, 5):
        run = TinyRun(tiny_run.base, tiny_run.dataset, tmp_path / f"run-{count}")
        options = ["validation.every=1", f"validation.holdout={tmp_path / str(count)}"]
        prompt = "validation.prompts=[a red star]"
        run.train("training.max_train_steps=1", "optimizer.params.lr=0", prompt, *options)
        losses += run.metrics("validation/loss")
    assert losses[0] != losses[1]


HOLDOUTS = ["null", "0.25", "0.4", "{held}", "{other}"]


@pytest.mark.parametrize("before", ["null", "0.25", "{held}"])
def test_another_holdout_than_the_runs_is_refused(tiny_run, tmp_path, before):
    places = {"held": tmp_path / "held", "other": tmp_path / "other"}
    for number, place in enumerate(places.values()):
        write_records(place, 5 + number, (8, 8))
    options = {name: f"validation.holdout={name.format(**places)}" for name in HOLDOUTS}
    steps = "training.max_train_steps=1"
    tiny_run.train(steps, options.pop(before))
    for option in options.values():
        error = tiny_run.fail(steps, option, code=2)
        assert error.startswith("error: validation.holdout keeps ") and error.count("\n") == 0
        assert "checkpoint-1 it was " in error


def test_the_dry_run_tells_of_another_holdout(tiny_run, capsys):
    tiny_run.train("training.max_train_steps=1")
    with pytest.raises(SystemExit) as ended:
        tiny_run.train("training.dry_run=true", "validation.holdout=0.25")
    assert ended.value.code == 1
    assert "  - validation.holdout keeps the share 0.25 of " in capsys.readouterr().out


def test_a_share_of_another_dataset_is_refused(tiny_run, tmp_path):
    """The end of a longer or shorter dataset may have been trained on."""
    options = ["training.max_train_steps=1", "validation.holdout=0.25"]
    tiny_run.train(*options)
    other = write_records(tmp_path / "other", 8, (8, 8))
    error = TinyRun(tiny_run.base, other, tiny_run.output).fail(*options, code=2)
    assert error.startswith("error: validation.holdout keeps the share 0.25 of ")


def test_weights_that_do_not_tell_their_holdout_are_not_validated(tiny_run):
    tiny_run.train("training.max_train_steps=1")
    shutil.rmtree(tiny_run.checkpoint(1) / "state")
    error = tiny_run.fail("training.max_train_steps=2", "validation.holdout=0.25", code=2)
    assert "checkpoint-1 it was nothing" in error


# What must fit, and what is told


def test_the_dry_run_tells_share_size_and_tokens_of_each(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run.train("training.dry_run=true", "training.max_train_steps=8")
    text = capsys.readouterr().out
    assert ended.value.code == 0, text
    square, wide, tall = folders_of(run)
    for expected in (
        f"Data, 50.00% of the batches from {square}: 12 examples; moments (8, 8, 8) float16",
        f"Data, 25.00% of the batches from {tall}: 6 examples; moments (8, 12, 4) float16",
        "12 steps per epoch; 8 steps are 0.67 epochs",
        f"A sample of {wide}: 1 x 8 x 12 latents",
        "6 in the video encoder and 24 in the image encoder, 8 of condition; 96 in the loss",
        "2 samples (2 x 1 micro-batches x 1 processes), 34 image tokens",
        "batch 2 of 1 x 8 x 12 latents",
        "samples/s",
        "Ready",
    ):
        assert expected in text


def test_the_memory_of_the_dry_run_is_that_of_the_largest(run, folders, capsys):
    def memory(dataset):
        with pytest.raises(SystemExit):
            TinyRun(run.base, dataset, run.output).train(
                "training.dry_run=true",
                "training.batch_size=4096",
                "experiment.resume_from_checkpoint=/nowhere-1",  # so that no step is measured
            )
        return float(re.search(r"Memory: ([\d.]+) GiB", capsys.readouterr().out)[1])

    square, wide, tall = folders
    largest = memory(mix(folders))
    assert largest == memory(mix([wide, square], 1, 9)) > 1.2 * memory(mix([square, tall], 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: write_records(f, 3, (8, 8), channels=3), "has 3 latent channels"),
        (lambda f: write_records(f, 3, (8, 6)), "latents of 8x6: the sides must be multiples of 4"),
        (lambda f: write_records(f, 3, (3, 8, 8)), "NOVATrainT2IPipeline trains on images"),
        (lambda f: None, "wrong: there is no folder "),
        (
            lambda f: os.truncate(write_records(f, 3, (8, 8)) / "00000.data", 99),
            "00000.data is truncated",
        ),
        (
            lambda f: (write_records(f, 3, (8, 8)) / "manifest.json").write_text(
                '{"counts": {"examples": 4}}'
            ),
            "manifest.json belongs to other records",
        ),
    ],
)
def test_each_dataset_is_checked_and_named(run, folders, tmp_path, change, message):
    folder = tmp_path / "wrong"
    change(folder)
    mixed = TinyRun(run.base, mix([*folders[:2], folder]), run.output)
    (problem,) = problems_of(mixed)
    assert problem.startswith(f"{DATA}, {folder}: ") and message in problem


def test_a_table_of_positions_takes_one_size(run, folders, tmp_path):
    overrides = [f"{MODEL}.rotary_pos_embed=false"]
    problems = problems_of(run, *overrides)
    named = [problem for problem in problems if "it needs rotary_pos_embed" in problem]
    assert [problem.split(": ")[0] for problem in named] == [f"{DATA}, {f}" for f in folders[1:]]


def test_several_datasets_of_one_process_each_need_no_example_for_all(run):
    open_run(run, processes=64)


def test_a_folder_of_one_size_alone_must_still_be_of_the_models(run, folders):
    (problem,) = problems_of(TinyRun(run.base, folders[1], run.output))
    assert "latents of 8x12, but" in problem
    (problem,) = problems_of(TinyRun(run.base, f"[{folders[1]}]", run.output))
    assert "latents of 8x12, but" in problem


def test_a_folder_of_sizes_may_have_one_alone(run, folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "sizes" / "wide")
    (tmp_path / "sizes" / "manifest.json").write_text('{"datasets": {"wide": 8}}')
    inputs = open_run(TinyRun(run.base, tmp_path / "sizes", run.output))
    assert inputs.datasets[0].shape == (8, 8, 12)


def test_what_is_written_wrongly_is_one_line(run, folders):
    twice = f"[{folders[0]},{folders[0]}]"
    (problem,) = problems_of(TinyRun(run.base, twice, run.output))
    assert problem == f"{DATA}: the dataset {folders[0]} is named twice: give it a larger weight"
    for value in ("[]", "[5]", "[{folder: a, weight: -1}]", "[{folder: a, weight: 1},b]"):
        with pytest.raises(ConfigError, match=f"{DATA} must "):
            open_run(TinyRun(run.base, value, run.output))


def test_a_holdout_that_leaves_nothing_of_small_datasets_holds_out_of_the_others(run):
    inputs = open_run(run, "validation.holdout=0.05")
    assert [facts.num_held_out for facts in inputs.datasets] == [1, 0, 0]
    assert [Path(facts.folder).name for facts in inputs.datasets] == list(SHAPES)
    (problem,) = problems_of(run, "validation.holdout=0.01")
    assert "validation.holdout=0.01 keeps none of the 26 examples" in problem
