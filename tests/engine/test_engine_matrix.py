"""Every engine as users launch it, in every precision that a CPU can train in, with everything on.

Validation, averaging, the highest level of checkpointing and a resume, and the same for adapters,
must leave the losses of a plain straight run as they are. Half precision (fp16) needs a GPU.
"""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from diffnext.pipelines.release_folder import LORA_FILE
from tests.engine.conftest import TinyRun, launch

ENGINES = ("none", "ddp_x2", "fsdp2_x2", "zero2_x2")
TOLERANCE = {"no": 2e-5, "bf16": 2e-3}
LORA = ["model.lora={rank: 2}"]
HOLDOUT = "validation.holdout=0.25"
EVERYTHING = [
    "model.gradient_checkpointing=3",
    "experiment.save_every=2",
    "validation.every=2",
    "validation.prompts=[a red circle]",
    "validation.num_inference_steps=2",
    "validation.num_diffusion_steps=2",
    HOLDOUT,
]

pytestmark = pytest.mark.slow


def start(run, engine, *overrides):
    if engine == "none":
        run.train("ema.params.update_every=2", *overrides)
        return run.log()
    return launch(run, engine, *overrides)


@pytest.fixture(scope="module")
def straight(tiny_base, tiny_dataset, tmp_path_factory):
    """Losses of a run without extras in full precision, by number of processes and kind."""
    known = {}

    def find(engine, *kind):
        plain = "none" if engine == "none" else "ddp_x2"
        if (plain, kind) not in known:
            output = tmp_path_factory.mktemp("straight") / "run"
            run = TinyRun(tiny_base, tiny_dataset, output)
            steps = "training.max_train_steps=4"
            start(run, plain, "training.mixed_precision=no", "ema=null", steps, HOLDOUT, *kind)
            known[plain, kind] = run.metrics("loss")
        return known[plain, kind]

    return find


def check_pictures(run, step):
    pictures = {
        path.stem: np.asarray(Image.open(path))
        for path in (run.output / "validation" / f"step-{step}").iterdir()
    }
    assert pictures.keys() == {"raw", "ema"}
    assert all(picture.std() > 0 for picture in pictures.values())
    assert np.any(pictures["raw"] != pictures["ema"])


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [[], LORA], ids=["whole", "lora"])
def test_everything_on_changes_no_loss(tiny_run, straight, engine, precision, kind):
    expected = straight(engine, *kind)
    for stop in (2, 4):
        steps = f"training.max_train_steps={stop}"
        start(tiny_run, engine, f"training.mixed_precision={precision}", steps, *EVERYTHING, *kind)
    losses = tiny_run.metrics("loss")
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE[precision])
    if precision == "bf16":  # in which a loss between 1 and 2 is one of 128 numbers
        assert not all((loss * 256).is_integer() for loss in losses)
    for step in (2, 4):
        check_pictures(tiny_run, step)
    held_out = tiny_run.metrics("validation/loss")
    assert len(held_out) == 2 and held_out[0] > held_out[1]
    assert "no samples" not in tiny_run.log()
    if kind == LORA:
        adapters = load_file(tiny_run.checkpoint(4) / LORA_FILE)
        ups = [value for name, value in adapters.items() if "lora_B" in name]  # are 0 at first
        assert ups and all(value.isfinite().all() and value.any() for value in ups)


def test_fsdp2_averages_gradients_in_float32(tiny_run):
    recording = "optimizer.target=tests.engine.recording_adamw.RecordingAdamW"
    steps = ["training.max_train_steps=1", "training.mixed_precision=bf16"]
    printed = launch(tiny_run, "fsdp2_x2", recording, *steps)
    assert printed.count("gradients of torch.float32, rounded: False") == 2


def test_samples_that_fail_on_the_main_process_leave_no_other_waiting(tiny_run):
    wrong = ["validation.max_latent_length=5", "training.max_train_steps=2"]
    launch(tiny_run, "fsdp2_x2", *EVERYTHING, *wrong)
    assert "no samples at step 2" in tiny_run.log()
    assert len(tiny_run.metrics("validation/loss")) == 1
    assert tiny_run.checkpoint(2).is_dir()
