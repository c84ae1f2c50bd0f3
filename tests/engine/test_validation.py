"""Validation between training steps: samples, held-out loss, and no trace in the training."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from diffnext.engine.validation import make_grid
from tests.engine.conftest import write_dataset

STEPS = ["training.max_train_steps=4", "ema.params.update_every=2"]
VALIDATION = [
    "validation.every=2",
    "validation.seeds=[0,1]",
    "validation.num_inference_steps=2",
    "validation.num_diffusion_steps=2",
]


def test_grids_of_raw_and_averaged_weights_are_written(tiny_run):
    prompts = "validation.prompts=[a red circle,a blue star,a green square]"
    tiny_run.train(*STEPS, *VALIDATION, prompts)
    for step in (2, 4):
        folder = tiny_run.output / "validation" / f"step-{step}"
        pictures = {path.stem: Image.open(path) for path in folder.iterdir()}
        assert pictures.keys() == {"raw", "ema"}
        assert pictures["raw"].size == (2 * 64 + 2, 3 * 64 + 2 * 2)  # seeds x prompts
        assert np.asarray(pictures["raw"]).std() > 0
        assert np.any(np.asarray(pictures["raw"]) != np.asarray(pictures["ema"]))
    assert (tiny_run.output / "curves.png").is_file()


def test_prompts_come_from_the_dataset_by_default(tiny_run):
    tiny_run.train(*STEPS, *VALIDATION)
    picture = Image.open(tiny_run.output / "validation" / "step-4" / "raw.png")
    assert picture.size == (2 * 64 + 2, 4 * 64 + 3 * 2)


def test_samples_of_fixed_seeds_do_not_depend_on_their_neighbours(tiny_run):
    rate = "optimizer.params.lr=0"
    tiny_run.train(*STEPS, *VALIDATION, rate, "validation.prompts=[a red circle,a blue star]")
    folder = tiny_run.output / "validation"
    first, second = (np.asarray(Image.open(folder / f"step-{n}" / "raw.png")) for n in (2, 4))
    np.testing.assert_array_equal(first, second)


def test_validation_leaves_no_trace_in_the_training(tiny_run, tmp_path):
    weights = "transformer/diffusion_pytorch_model.safetensors"
    tiny_run.train(*STEPS)
    other = type(tiny_run)(tiny_run.base, tiny_run.dataset, tmp_path / "validated")
    other.train(*STEPS, *VALIDATION, f"validation.holdout={tiny_run.dataset}")
    expected = load_file(tiny_run.checkpoint(4) / weights)
    for name, value in load_file(other.checkpoint(4) / weights).items():
        assert value.equal(expected[name])


@pytest.mark.parametrize("workers", [0, 1])
def test_held_out_share_is_not_trained_on_and_has_the_same_noise_each_time(tiny_run, workers):
    tiny_run.train(
        *STEPS,
        "validation.every=2",
        "validation.holdout=0.25",
        "optimizer.params.lr=0",
        f"train_dataloader.params.num_workers={workers}",
    )
    losses = tiny_run.metrics("validation/loss")
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert "up to 9 of 9 examples" in tiny_run.log()
    assert "up to 3 of 3 examples" in tiny_run.log()


def test_failing_samples_are_a_warning(tiny_run):
    tiny_run.train(*STEPS, *VALIDATION, "validation.max_latent_length=5")
    assert "no samples at step 2" in tiny_run.log()
    assert tiny_run.checkpoint(4).is_dir()


@pytest.mark.parametrize(
    ("blocked", "warning"),
    [
        ("metrics.jsonl", "step 2 is not in"),
        ("curves.png", "curves.png is not drawn"),
        ("validation/step-4", "no samples at step 4"),
    ],
)
def test_report_that_cannot_be_written_is_a_warning(tiny_run, blocked, warning):
    tiny_run.train(*VALIDATION, "training.max_train_steps=2")
    place = tiny_run.output / blocked
    if place.parent.name == "validation":
        place.touch()  # where a folder should be made
    else:
        place.unlink()
        (place / "in the way").mkdir(parents=True)
    tiny_run.train(*STEPS, *VALIDATION)
    assert warning in tiny_run.log()
    assert tiny_run.checkpoint(4).is_dir()


def test_held_out_examples_that_cannot_be_read_are_a_warning(tiny_run, tmp_path):
    folder = tmp_path / "held-out"
    write_dataset(folder, entries=20, cut_short=1)  # which is not among those looked at before
    tiny_run.train(*STEPS, "validation.every=2", f"validation.holdout={folder}")
    assert "no held-out loss" in tiny_run.log()
    assert tiny_run.checkpoint(4).is_dir()


def test_grid_is_rows_of_columns_of_videos():
    pictures = np.zeros((2, 3, 4, 8, 6, 3), dtype=np.uint8)
    pictures[1, 2] = 100
    grid = make_grid(pictures)
    assert grid.shape == (4, 2 * 8 + 2, 3 * 6 + 2 * 2, 3)
    assert (grid[:, 10:, 16:] == 100).all()
    assert (grid[:, 8:10] == 255).all()
