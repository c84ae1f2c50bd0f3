"""Where a run continues: the newest sound checkpoint of its own, and nothing that only looks so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from diffnext.config.targets import ConfigError
from diffnext.engine.resume import find_resume_point
from diffnext.engine.snapshot import RunFolder, write_component
from tests.engine.conftest import TinyRun

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SCHEDULE = ["experiment.save_every=2", "ema.params.update_every=2"]


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_dataset, tmp_path_factory):
    """The output folder of a run of 4 steps with checkpoints at 2 and 4."""
    run = TinyRun(tiny_base, tiny_dataset, tmp_path_factory.mktemp("finished") / "run")
    run.train("training.max_train_steps=4", *SCHEDULE)
    return run


@pytest.fixture
def used(finished, tmp_path):
    """A copy of that folder, which a test may spoil."""
    shutil.copytree(finished.output, tmp_path / "run")
    return TinyRun(finished.base, finished.dataset, tmp_path / "run")


def latest(run):
    return find_resume_point(RunFolder(run.output), "latest")


def files_of(run):
    """Every file of checkpoint-4, averaged weights included."""
    folders = (run.checkpoint(4), run.ema_checkpoint(4))
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_a_flipped_byte_in_any_file_is_noticed_and_the_older_checkpoint_used(used, place):
    files = files_of(used)
    assert len(files) >= 14
    for path in files:
        content = path.read_bytes()
        spoilt = bytearray(content)
        spoilt[int(place * (len(content) - 1))] ^= 0x01
        path.write_bytes(spoilt)
        point = latest(used)
        assert point.step == 2, path
        assert str(path) in point.notes[0]
        with pytest.raises(ConfigError, match="is not"):
            find_resume_point(RunFolder(used.output), str(used.checkpoint(4)))
        path.write_bytes(content)
    assert latest(used).step == 4


def test_a_missing_or_shortened_file_is_noticed(used):
    for path in files_of(used):
        content = path.read_bytes()
        path.unlink()
        assert latest(used).step == 2, path
        path.write_bytes(content[:-1])
        assert latest(used).step == 2, path
        path.write_bytes(content)


def test_recovered_run_equals_an_undisturbed_one(finished, used):
    path = used.checkpoint(4) / "state" / "engine.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    used.train("training.max_train_steps=4", *SCHEDULE)
    assert "checkpoint-4 is damaged and is not used" in used.log()
    for folder in ("checkpoint", "ema_checkpoint"):
        expected = load_file(getattr(finished, folder)(4) / WEIGHTS)
        actual = load_file(getattr(used, folder)(4) / WEIGHTS)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_damaged_checkpoint_is_not_kept_in_place_of_sound_ones(used):
    (used.checkpoint(4) / "state" / "rank_0.pt").unlink()
    used.train("training.max_train_steps=3", *SCHEDULE, "checkpoint.keep_last=1")
    assert latest(used).step == 3
    assert used.checkpoint(4).is_dir() and not used.checkpoint(2).exists()


def test_without_any_sound_checkpoint_the_run_is_refused(used):
    for step in (2, 4):
        (used.checkpoint(step) / "state" / "rank_0.pt").unlink()
    error = used.fail("training.max_train_steps=6", code=2)
    assert "can be continued" in error and "rank_0.pt is missing" in error
    assert used.checkpoint(2).is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-best-9",
        "checkpoint-old-99",
        ".checkpoint-98.tmp",
        "checkpoint-7.bak",
        "checkpoint-0099",
        "checkpoint--99",
    ],
)
def test_other_names_are_neither_continued_nor_deleted(used, name):
    stranger = used.checkpoint(4).with_name(name)
    shutil.copytree(used.checkpoint(4), stranger)
    assert latest(used).step == 4
    if not name.startswith("."):
        used.train("training.max_train_steps=6", *SCHEDULE, "checkpoint.keep_last=1")
        assert stranger.is_dir()
        names = {path.name for path in stranger.parent.iterdir()}
        assert names == {"checkpoint-6", name}


def test_checkpoint_of_another_run_is_not_continued(used):
    path = used.checkpoint(4) / "state" / "trainer_state.json"
    other = used.checkpoint(9)
    shutil.copytree(used.checkpoint(2), other)
    state = json.loads(path.read_text())
    status = json.loads((used.output / "status.json").read_text())
    assert state["run"] == status["run"]
    assert latest(used).step == 4
    (used.output / "status.json").write_text(json.dumps({**status, "run": "another"}))
    with pytest.raises(ConfigError, match="from another run"):
        latest(used)


def test_orphaned_average_is_not_taken(used):
    """One that the checkpoint does not list, as it was written without."""
    shutil.rmtree(used.output)
    used.train("training.max_train_steps=2", "ema=null")
    shutil.copytree(used.checkpoint(2), used.ema_checkpoint(2))
    assert latest(used).ema_weights is None


def test_going_back_to_an_earlier_checkpoint_loses_nothing(used):
    old = load_file(used.checkpoint(4) / WEIGHTS)
    back = f"experiment.resume_from_checkpoint={used.checkpoint(2)}/"
    used.train("training.max_train_steps=4", *SCHEDULE, back, "optimizer.params.lr=1e-3")
    (moved,) = used.output.glob("replaced-*/checkpoints/checkpoint-4")
    assert load_file(moved / WEIGHTS).keys() == old.keys()
    assert not load_file(used.checkpoint(4) / WEIGHTS)["image_encoder.norm.weight"].equal(
        old["image_encoder.norm.weight"]
    )


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_layout_with_weights_only_is_found_without_state(tmp_path, file_format):
    run = RunFolder(tmp_path / "checkpoints-of-mine")  # the word may occur in any path
    weights = torch.nn.Linear(3, 2).state_dict()
    for step in (9, 10):
        write_component(run.checkpoint(step) / "transformer", {}, weights, file_format)
    for resume in ("latest", str(run.checkpoint(10)), f"{run.checkpoint(10)}/"):
        point = find_resume_point(run, resume)
        assert (point.step, point.state, point.ema_weights) == (10, None, None)
    bare = find_resume_point(run, str(run.checkpoint(9) / "transformer"))
    assert (bare.step, bare.state) == (9, None)


@pytest.mark.parametrize(
    "name, message",
    [("nowhere-3", "there is no folder"), ("empty-3", "there is no"), ("x", "step")],
)
def test_unusable_path_is_explained(tmp_path, name, message):
    (tmp_path / "empty-3").mkdir()
    write_component(tmp_path / "x", {}, {}, "safetensors")
    with pytest.raises(ConfigError, match=message):
        find_resume_point(RunFolder(tmp_path), str(tmp_path / name))


def rewrite_state(run, **values):
    """Write the state of checkpoint-4 anew, sealed as one's own program would seal it."""
    path = run.checkpoint(4) / "state" / "trainer_state.json"
    content = {**json.loads(path.read_text()), "files": {}, **values}
    del content["seal"]
    seal = xxhash.xxh3_128_hexdigest(json.dumps(content, indent=2).encode())
    path.write_text(json.dumps({**content, "seal": seal}, indent=2) + "\n")


def test_checkpoint_of_an_earlier_version_is_continued_without_its_optimizer(used):
    rewrite_state(used, format=2)
    used.train("training.max_train_steps=5", *SCHEDULE)
    log = used.log()
    assert "Iteration 4," in log and "OPTIMIZER STATE IS RESET" in log


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def hostile_rank(run, canary):
    torch.save({"data": Canary(canary)}, run.checkpoint(4) / "state" / "rank_0.pt")


def hostile_weights(run, canary):
    folder = run.checkpoint(4) / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Canary(canary)}, folder / "diffusion_pytorch_model.bin")


def wrong_rank(run, canary):
    torch.save([1, 2], run.checkpoint(4) / "state" / "rank_0.pt")


def wrong_values_in_rank(run, canary):
    state = {"data": 3, "random": {}, "window": "x", "scaler": None}
    torch.save(state, run.checkpoint(4) / "state" / "rank_0.pt")


def wrong_engine(run, canary):
    save_file({"model.a": torch.zeros(1)}, run.checkpoint(4) / "state" / "engine.safetensors")


def engine_of_rubbish(run, canary):
    (run.checkpoint(4) / "state" / "engine.safetensors").write_bytes(b"\xff" * 8 + b"{}")


def state_is(**values):
    return lambda run, canary: rewrite_state(run, **values)


def state_is_a_list(run, canary):
    (run.checkpoint(4) / "state" / "trainer_state.json").write_text("[1]")


HOSTILE = {
    "pickle in rank_0.pt": hostile_rank,
    "pickled weights": hostile_weights,
    "list in rank_0.pt": wrong_rank,
    "wrong values in rank_0.pt": wrong_values_in_rank,
    "other engine tensors": wrong_engine,
    "huge header": engine_of_rubbish,
    "step is a text": state_is(step="four"),
    "processes are a list": state_is(num_processes=[1]),
    "files are a number": state_is(files=7),
    "a file outside": state_is(files={"../../../etc/passwd": {"size": 3, "hash": "0"}}),
    "state is a list": state_is_a_list,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoint_runs_nothing_and_is_one_error(used, tmp_path, kind):
    """Sealing is no answer: whoever made it could seal it as well."""
    rewrite_state(used)
    canary = tmp_path / "canary"
    HOSTILE[kind](used, canary)
    shutil.rmtree(used.checkpoint(2))
    printed = []
    try:
        used.train("training.max_train_steps=6", *SCHEDULE)
    except SystemExit as ended:
        printed.append(ended.code)
    assert printed in ([1], [2])
    assert not canary.exists()


@pytest.mark.parametrize(
    "override, names",
    [
        ("optimizer.target=torch.optim.SGD ~optimizer.params.betas", ["SGD", "AdamW"]),
        ("model.lora={rank: 2}", ["model.lora", "whole model"]),
        (
            "pipeline.target=diffnext.pipelines.nova.pipeline_train_t2v.NOVATrainT2VPipeline",
            ["NOVATrainT2VPipeline"],
        ),
    ],
)
def test_another_run_than_the_checkpoints_is_refused_naming_both(used, override, names):
    overrides = override.split(" ") if "~" in override else [override]
    error = used.fail("training.max_train_steps=6", *overrides, code=2)
    assert all(name in error for name in names)


def test_another_schedule_continues_with_a_note(used):
    cosine = "lr_scheduler.target=diffnext.engine.lr_scheduler.CosineLR"
    used.train("training.max_train_steps=5", *SCHEDULE, cosine)
    log = used.log()
    assert "lr_scheduler was" in log and "CosineLR" in log and "Iteration 4," in log
