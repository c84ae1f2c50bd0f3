"""What a run reads: opened once, and everything that is wrong with it told at once."""

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffnext.config.load import parse, read_config
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError
from diffnext.data.records import RecordWriter
from diffnext.engine.run_inputs import open_inputs
from diffnext.pipelines.release_folder import write_base_reference
from diffnext.utils.weights_files import hash_weights
from tests.engine.conftest import TinyRun, write_dataset

MODEL = "pipeline.paths.module_config.transformer"
PARTS = "pipeline.paths.module_dict"
DATA = "train_dataloader.params.dataset: "
WEIGHTS = "diffusion_pytorch_model.safetensors"


class OtherLoader:
    """A loader of another kind of records."""


@pytest.fixture
def run(tiny_base, tmp_path):
    """A run whose base folder and dataset may be damaged."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    write_dataset(tmp_path / "records")
    return TinyRun(base, tmp_path / "records", tmp_path / "run")


def open_run(run, *overrides, processes=1):
    merged, _ = read_config(run.arguments(*overrides))
    return open_inputs(parse(merged, TrainConfig), processes)


def problems_of(run, *overrides, processes=1):
    """The lines that keep a run from starting."""
    with pytest.raises(ConfigError) as refused:
        open_run(run, *overrides, processes=processes)
    assert not run.output.exists()
    return refused.value.problems


def write_records(folder, shapes=((8, 8, 8),), features=None, **values):
    """Records of 4 channels and 8x8 latents with a text, unless ``values`` say otherwise."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    example = {"caption": "a red star", **values}
    example = {name: value for name, value in example.items() if value is not None}
    types = {"moments": "bytes", "codes": "bytes", "shape": ["int64"], "label": "int64"}
    types = {**types, "caption": "string", **(features or {})}
    latents = "codes" if "codes" in example else "moments"
    with RecordWriter(folder, {name: types[name] for name in {latents, "shape", *example}}) as file:
        for shape in shapes:
            file.write({latents: np.zeros(shape, np.float16).tobytes(), "shape": shape, **example})


def write_states(run, length, width):
    states = {"data": np.zeros((length, width), np.float16).tobytes(), "shape": (length, width)}
    features = {"caption": {"data": "bytes", "shape": ["int64"]}}
    write_records(run.dataset, [(8, 8, 8)] * 3, features=features, caption=states)


def records(*shapes, **values):
    return lambda run: write_records(run.dataset, shapes or [(8, 8, 8)] * 3, **values)


def manifest(**content):
    return lambda run: (run.dataset / "manifest.json").write_text(json.dumps(content))


def write(path, content):
    return lambda run: (run.base.parent / path).write_bytes(content)


def delete(path):
    def damage(run):
        target = run.base.parent / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def change_json(path, **values):
    def damage(run):
        file = run.base / path
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


def widen_weights(run):
    """One tensor of another shape than config.json says."""
    file = run.base / "transformer" / WEIGHTS
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    save_file({**tensors, name: np.zeros((3, 5), np.float32)}, file, metadata={"format": "pt"})


def link_out(name):
    def damage(run):
        (run.base / name).rename(run.base.parent / "elsewhere")
        (run.base / name).symlink_to(run.base.parent / "elsewhere")

    return damage


def leave_adapters_only(run):
    (run.base / "pytorch_lora_weights.safetensors").write_bytes(b"")
    write_base_reference(run.base, run.base, {})


def cut(path, count):
    def damage(run):
        file = run.base.parent / path
        file.write_bytes(file.read_bytes()[:-count])

    return damage


def both(*damages):
    return lambda run: [damage(run) for damage in damages]


# What is done to the folders, and what the only line must hold.
FOLDERS = {
    "no base": (delete("base"), "pipeline.paths.pretrained_path={base}: there is no folder {base}"),
    "no index": (delete("base/model_index.json"), "it has no model_index.json"),
    "damaged index": (write("base/model_index.json", b"{"), "model_index.json is not JSON"),
    "path as a component": (
        change_json("model_index.json", **{"../../up": ["diffusers", "AutoencoderKL"]}),
        "a component must have a plain name",
    ),
    "foreign code": (
        change_json("model_index.json", vae=["os", "system"]),
        "names foreign code as vae",
    ),
    **{
        f"no {name} in the index": (
            change_json("model_index.json", **{name: [None, None]}),
            f"model_index.json lists no {name}, but training needs it",
        )
        for name in ("transformer", "vae", "scheduler")
    },
    "a link": (link_out("text_encoder"), f"{PARTS}.text_encoder: {{base}}/text_encoder is a link"),
    "damaged config": (write("base/transformer/config.json", b"{"), "config.json is not JSON"),
    "wrong base reference": (write("base/base_folder.json", b"[]"), "base_folder.json must hold"),
    "no autoencoder": (delete("base/vae"), f"{PARTS}.vae: there is no folder"),
    "no weights": (delete(f"base/transformer/{WEIGHTS}"), "{base}: there are no weights in"),
    "cut weights": (cut(f"base/transformer/{WEIGHTS}", 9), "is not a safetensors file"),
    "a pickle": (write("base/vae/more.pkl", b""), "more.pkl is a pickle"),
    "other weights": (widen_weights, "1 weights in {base}/transformer do not fit the model"),
    "adapters": (leave_adapters_only, "holds adapters only: merge them first"),
    "no dataset": (delete("records"), f"{DATA}there is no folder {{data}}"),
    "damaged METADATA": (write("records/METADATA", b"{"), f"{DATA}{{data}}/METADATA"),
    "no data file": (delete("records/00000.data"), "00000.data"),
    "truncated": (cut("records/00000.data", 10), "is truncated"),
    "cut index": (cut("records/00000.index", 10), "00000.index, line 12"),
    "corrupt record": (
        write("records/00000.data", b"\xff" * 10**5),
        f"{DATA}example 0 (number 0 in",
    ),
    "a folder of datasets": (
        lambda run: (
            shutil.copytree(run.dataset, run.dataset / "64x64")
            and (run.dataset / "METADATA").unlink()
        ),
        "it has no METADATA; the datasets in it are 64x64",
    ),
    "codes": (records(codes=b""), "holds VQ codes, training needs VAE moments"),
    "two shapes": (records(*[(8, 8, 8)] * 9, (8, 8, 16)), "cannot be in one batch"),
    "flat": (records((8, 8)), "they must be (2C, h, w) or (2C, T, h, w)"),
    "fewer channels": (records((6, 8, 8)), f"has 3 latent channels, but {MODEL}.image_dim is 4"),
    "fewer channels of another VAE": (
        both(records((6, 8, 8)), manifest(vae_hash="0")),
        f"has 3 latent channels, but {MODEL}.image_dim is 4",
    ),
    "other autoencoder": (
        change_json("vae/config.json", latent_channels=16),
        "has 4 latent channels, but the VAE has 16",
    ),
    "other size": (
        records((8, 8, 16)),
        f"latents of 8x16, but {MODEL}.image_size [64, 64] at image_stride 8 means 8x8",
    ),
    "videos for images": (records((8, 3, 8, 8)), "NOVATrainT2IPipeline trains on images"),
    "classes for texts": (records(label=3), f"has the class 3, but with {MODEL}.text_token_dim=32"),
    "no caption": (records(caption=None), "an example needs a 'caption' or a 'label'"),
    "wide states": (lambda run: write_states(run, 8, 64), "of shape (L, D) = (8, 64), but with"),
    "long states": (lambda run: write_states(run, 9, 32), "of shape (L, D) = (9, 32), but with"),
    "another VAE": (manifest(vae_hash="0"), "made with another vae than the one in {base}/vae"),
    "another text encoder": (
        manifest(text_encoder={"hash": "0"}),
        "made with another text_encoder than the one in {base}/text_encoder",
    ),
    "other pixels": (manifest(size=[128, 64]), "made for 128x64 pixels"),
    "other dtype": (manifest(dtype="float32"), "it says dtype float32, not float16"),
    "other records": (manifest(shape=[8, 16, 16]), "it says shape (8, 16, 16), not (8, 8, 8)"),
    "before a merge": (manifest(counts={"examples": 1}), "it says counts.examples 1, not 12"),
    "wrong manifest": (manifest(vae_hash=5), "manifest.json: vae_hash"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_each_damage_is_one_line_that_names_it(run, name):
    damage, message = FOLDERS[name]
    damage(run)
    (problem,) = problems_of(run)
    assert message.format(base=run.base, data=run.dataset) in problem


MISFITS = [
    (f"{MODEL}.image_dim=16", "image_dim is 16, but the weights in"),
    (f"{MODEL}.text_token_dim=64", "text_token_dim is 64, but the weights in"),
    (f"{MODEL}.arch=[vit_d3w192,vit_d6w192,mlp_d3w192]", "arch is ['vit_d3w192'"),
    (f"{MODEL}.image_base_size=null", f"{MODEL}.image_base_size must be given"),
    (f"{MODEL}.image_size=[128,64]", "means 16x8"),
    (f"{PARTS}.text_encoder=", f"a text, but {PARTS}.text_encoder is empty"),
    (f"{PARTS}.vae=", f"{PARTS}.vae: vae is left out, but training needs it"),
    (f"{PARTS}.vae=/nowhere", f"{PARTS}.vae: there is no folder /nowhere"),
    ("pipeline.paths.pretrained_path=/nowhere", "there is no folder /nowhere"),
    ("pipeline.paths.pretrained_path=no/where", "there is no folder no/where"),
    (
        "pipeline.target=diffnext.pipelines.nova.pipeline_train_t2v.NOVATrainT2VPipeline",
        "NOVATrainT2VPipeline trains on videos",
    ),
    (
        "pipeline.target=diffnext.pipelines.nova.pipeline_train_c2i.NOVATrainC2IPipeline",
        "NOVATrainC2IPipeline trains on classes, but the model reads texts",
    ),
    ("pipeline.target=diffnext.pipelines.NOVAPipeline", "is not a training pipeline"),
    ("model.lora={target_modules: [nothing]}", "no linear layer is named 'nothing'"),
    ("optimizer.params.betas=[2,3]", "optimizer.params of torch.optim.AdamW: Invalid beta"),
    ("optimizer.params.lr=-1", "optimizer.params of torch.optim.AdamW: Invalid learning rate"),
    ("+pipeline.paths.module_config.scheduler={prediction_type: sample}", "got 'sample'"),
    ("lr_scheduler.params.lr_max=-1", "ConstantLR lead to a learning rate of -1"),
    ("validation.holdout=0.01", "validation.holdout=0.01 keeps none of the 12 examples"),
    ("validation.holdout=/nowhere", "validation.holdout: there is no folder /nowhere"),
    ("validation.prompts=[1]", "validation.prompts has the class 1, but with"),
    ("experiment.output_dir=/proc/run", "experiment.output_dir=/proc/run cannot be made"),
    (f"experiment.output_dir=/tmp/{'x' * 300}", "cannot be made or written to: File name too"),
    (f"experiment.output_dir={__file__}/run", f"{__file__} is not a folder"),
    ('experiment.output_dir="a\\0b"', "experiment.output_dir='a\\x00b' holds a NUL character"),
]


@pytest.mark.parametrize("override, message", MISFITS)
def test_each_value_that_does_not_fit_is_one_line_that_names_it(run, override, message):
    (problem,) = problems_of(run, override)
    assert message in problem


@pytest.mark.parametrize(
    "name, reason",
    [
        ("LBFGS", "LBFGS doesn't support per-parameter options"),
        ("SparseAdam", "SparseAdam does not support dense gradients"),
    ],
)
def test_optimizer_that_cannot_train_the_model_is_told_before(run, name, reason):
    overrides = [f"~optimizer.params.{key}" for key in ("betas", "fused", "weight_decay")]
    (problem,) = problems_of(run, f"optimizer.target=torch.optim.{name}", *overrides)
    assert f"optimizer.params of torch.optim.{name}: {reason}" in problem


def test_more_processes_than_examples_are_refused(run):
    (problem,) = problems_of(run, processes=13)
    assert "train_dataloader.params: 12 examples in shards of 1 fill only 12 of 13" in problem


def test_class_beyond_the_last_is_refused(run):
    write_records(run.dataset, label=1000, caption=None)
    change_json("transformer/config.json", text_token_dim=None)(run)
    pipeline = "diffnext.pipelines.nova.pipeline_train_c2i.NOVATrainC2IPipeline"
    problems = problems_of(run, f"pipeline.target={pipeline}", f"{MODEL}.text_token_dim=null")
    assert "has the class 1000" in problems[-1] and "classes 0 to 999" in problems[-1]


def test_validation_without_anything_to_draw_is_refused(run):
    write_states(run, 8, 32)
    (problem,) = problems_of(run, "validation.every=2")
    assert "validation.every=2 has nothing to draw" in problem


def test_held_out_records_are_checked_like_those_of_the_training(run, tmp_path):
    write_records(tmp_path / "held", [(6, 8, 8)])
    (problem,) = problems_of(run, f"validation.holdout={tmp_path / 'held'}")
    assert problem.startswith("validation.holdout: ") and "3 latent channels" in problem


def test_all_faults_are_told_at_once_each_in_one_line(run, tmp_path):
    widen_weights(run)
    write_records(run.dataset, [(8, 8, 8)] * 3, label=3)
    problems = problems_of(
        run,
        "optimizer.params.betas=[2,3]",
        "lr_scheduler.params.lr_max=-1",
        "experiment.output_dir=/proc/run",
        f"{PARTS}.vae=/nowhere",
        f"{MODEL}.image_size=[128,64]",
        "validation.prompts=[1000]",
        processes=4,
    )
    culprits = ["optimizer", "lr_scheduler", "experiment", f"{PARTS}.vae", "do not fit the model"]
    culprits += ["means 16x8", "class 3", "class 1000", "4 shards"]
    assert len(problems) == len(culprits), problems
    for culprit in culprits:
        assert sum(culprit in problem for problem in problems) == 1


def test_what_a_run_reads_is_told(run):
    inputs = open_run(run, "validation.holdout=0.25")
    assert inputs.base_folder == run.base
    assert inputs.components["vae"] == run.base / "vae"
    assert inputs.transformer["arch"] == ["vit_d2w64", "vit_d4w64", "mlp_d2w64"]
    (dataset,) = inputs.datasets
    assert (inputs.num_train, dataset.num_held_out) == (9, 3)
    assert (dataset.shape, dataset.dtype) == ((8, 8, 8), "float16")
    assert dataset.prompt == "captions as text"
    assert dataset.record_bytes == pytest.approx(8 * 8 * 8 * 2 + 12, abs=5)
    assert pickle.loads(pickle.dumps(inputs)) == inputs


def test_dataset_of_the_same_autoencoder_is_accepted(run):
    manifest(vae_hash=hash_weights(run.base / "vae"), size=[64, 64], shape=[8, 8, 8])(run)
    assert open_run(run).num_train == 12


def test_records_of_other_loaders_are_not_looked_at(run):
    write_records(run.dataset, [(3,)] * 5)
    inputs = open_run(run, f"train_dataloader.target={__name__}.OtherLoader", processes=13)
    assert (inputs.num_train, inputs.datasets[0].shape) == (5, ())


def test_fingerprint_tells_other_records_but_not_another_place(run, tmp_path):
    first = open_run(run).datasets[0].fingerprint
    moved = shutil.copytree(run.dataset, tmp_path / "moved")
    assert open_run(TinyRun(run.base, moved, run.output)).datasets[0].fingerprint == first
    data = moved / "00000.data"
    content = data.read_bytes()
    caption = content.index(b"a red")
    data.write_bytes(content[:caption] + b"a RED" + content[caption + 5 :])
    assert open_run(TinyRun(run.base, moved, run.output)).datasets[0].fingerprint != first


def test_paths_below_a_hub_name_are_those_of_its_copy(run, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / "0"
    shutil.copytree(run.base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    inputs = open_run(TinyRun(Path("some/model"), run.dataset, run.output))
    assert inputs.base_folder == snapshot
    assert inputs.paths["module_dict"]["vae"] == str(snapshot / "vae")
    assert inputs.components["tokenizer"] == snapshot / "tokenizer"


def test_components_of_a_checkpoint_are_in_its_base_folder(run, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    shutil.copy(run.base / "model_index.json", checkpoint)
    shutil.copytree(run.base / "transformer", checkpoint / "transformer")
    write_base_reference(checkpoint, run.base, {})
    inputs = open_run(TinyRun(checkpoint, run.dataset, run.output))
    assert inputs.components["transformer"] == checkpoint / "transformer"
    assert inputs.components["vae"] == run.base / "vae"


@pytest.mark.parametrize("trust", [False, True])
def test_no_code_of_a_folder_runs(run, tmp_path, trust):
    shim = run.base / "transformer" / "__transformer__.py"
    shim.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass NOVATransformer3DModel: ...\n")
    change_json("model_index.json", transformer=["__transformer__", "NOVATransformer3DModel"])(run)
    if trust:
        open_run(run, "trust_remote_code=true")
    else:
        (problem,) = problems_of(run)
        assert "names foreign code as transformer" in problem
    assert not (tmp_path / "ran").exists()


def test_trying_the_output_folder_leaves_nothing_behind(run, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    open_run(run, f"experiment.output_dir={tmp_path / 'a' / 'b'}")
    assert sorted(tmp_path.rglob("*")) == before
