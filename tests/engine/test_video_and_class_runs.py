"""Whole runs of scripts/train.py on videos and on classes."""

import re
import runpy
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diffnext.data.records import RecordWriter
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
from diffnext.utils.json_files import read_json
from tests.pipelines.conftest import make_text_encoder, make_tokenizer, write_release
from tests.tiny import make_model, make_vae, make_video_vae

ROOT = Path(__file__).parents[2]
VALIDATION = [
    "validation.holdout=0.25",
    "validation.num_inference_steps=2",
    "validation.num_diffusion_steps=2",
]
QUICK = {"num_inference_steps": 3, "num_diffusion_steps": 2, "disable_progress_bar": True}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# The shipped video config at a size for tests; it names no mixer.
TINY = {
    "image_size": [64, 96],
    "text_token_dim": 64,
    "text_token_len": 7,
    "image_base_size": [4, 6],
    "video_base_size": [3, 2, 3],
    "arch": ["vit_d2w64", "vit_d4w64", "mlp_d2w64"],
}


def train(config, base, dataset, output, *overrides, sizes=TINY):
    AcceleratorState._reset_state(reset_partial_state=True)
    transformer = "pipeline.paths.module_config.transformer"
    arguments = [
        f"config={ROOT / 'configs' / config}",
        f"pipeline.paths.pretrained_path={base}",
        f"experiment.output_dir={output}",
        f"train_dataloader.params.dataset={dataset}",
        *(f"{transformer}.{key}={value}" for key, value in sizes.items()),
        "wandb=null",
        "training.batch_size=2",
        "training.progress_bar=false",
        "training.mixed_precision=no",
        "train_dataloader.params.num_workers=0",
        "lr_scheduler.params.warmup_steps=0",
        "experiment.log_every=1",
        *overrides,
    ]
    runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"](arguments)
    return "".join(path.read_text() for path in sorted(Path(output).glob("logs/*.log")))


def losses(log, name):
    return [float(x) for x in re.findall(rf"Train net output\({name}\): (\S+)", log)]


@pytest.fixture
def video_release(tmp_path):
    """Like the released video folder: shims, a mixer in config.json, diffusers' DDPM, fp16 VAE."""
    pipe = NOVAPipeline(
        transformer=make_model(frames=3, video_mixer_rank=24),
        scheduler=DDPMScheduler(),
        vae=make_video_vae().half(),
        text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(),
    )
    return write_release(pipe, tmp_path / "nova-video")


@pytest.fixture
def video_dataset(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    features = {"moments": "bytes", "caption": "string", "shape": ["int64"], "flow": "float64"}
    with RecordWriter(str(folder), features) as writer:
        for index in range(6):
            mean = np.repeat(rng.normal(size=(4, 1, 8, 12)), 3, axis=1)
            moments = np.concatenate([mean, np.full_like(mean, -10.0)]).astype(np.float16)
            caption = ("a cat", "a dog", "the mat")[index % 3]
            example = {"caption": caption, "flow": 3 + index}
            content = moments.tobytes()
            writer.write({"moments": content, "shape": moments.shape, **example})
    return folder


def test_a_released_video_folder_samples_trains_and_keeps_its_mixer(
    video_release, video_dataset, tmp_path
):
    pipe = NOVAPipeline.from_pretrained(video_release, dtype=torch.float32)
    mixer = pipe.transformer.video_encoder.mixer
    assert mixer.lora.weight.shape == (24, 64)
    frames = pipe("a cat", max_latent_length=2, **QUICK).frames
    assert frames.shape == (1, 5, 64, 96, 3)
    output = tmp_path / "run"
    log = train(
        "nova_d48w1024_osp480.yaml",
        *(video_release, video_dataset, output),
        "training.max_train_steps=3",
    )
    assert len(losses(log, "loss_t2i")) == len(losses(log, "loss_i2i")) == 3
    checkpoint = output / "checkpoints" / "checkpoint-3"
    assert read_json(checkpoint / "transformer" / "config.json")["video_mixer_rank"] == 24
    trained = load_file(checkpoint / WEIGHTS)["video_encoder.mixer.lora.weight"]
    assert not torch.equal(trained.float(), mixer.lora.weight)
    loaded = NOVAPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    assert loaded("a cat", max_latent_length=2, **QUICK).frames.shape == (1, 5, 64, 96, 3)


def test_losses_of_videos_fall_and_continue(video_release, video_dataset, tmp_path):
    arguments = ("nova_d48w1024_osp480.yaml", video_release, video_dataset)
    schedule = ["optimizer.params.lr=0.002", "experiment.save_every=20"]
    train(*arguments, tmp_path / "a", "training.max_train_steps=20", *schedule)
    log = train(*arguments, tmp_path / "a", "training.max_train_steps=30", *schedule)
    for name in ("loss_t2i", "loss_i2i"):
        values = losses(log, name)
        assert len(values) == 30
        assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])
    straight = train(*arguments, tmp_path / "b", "training.max_train_steps=30", *schedule)
    assert losses(straight, "loss_i2i") == losses(log, "loss_i2i")


def test_a_loss_without_weight_is_shown_but_not_trained(video_release, video_dataset, tmp_path):
    arguments = ("nova_d48w1024_osp480.yaml", video_release, video_dataset)
    steps = "training.max_train_steps=2"
    plain = train(*arguments, tmp_path / "a", steps)
    weighted = train(
        *(*arguments, tmp_path / "b", steps),
        *("model.loss_weights.t2i=1.0", "model.loss_weights.i2v=0"),
    )
    assert losses(plain, "loss_i2i")[0] == losses(weighted, "loss_i2i")[0] > 0
    weights = [load_file(tmp_path / run / "checkpoints" / "checkpoint-2" / WEIGHTS) for run in "ab"]
    name = "mask_embed.mask_token"
    assert not torch.equal(weights[0][name], weights[1][name])
    # Without the later frames' loss nothing flows through what embeds earlier frames.
    name = "video_encoder.patch_embed.proj.bias"
    untrained = NOVAPipeline.from_pretrained(video_release).transformer.state_dict()[name]
    decay = (1 - 1e-4 * 0.02) ** 2
    torch.testing.assert_close(weights[1][name], untrained * decay, atol=1e-7, rtol=1e-5)
    assert not torch.allclose(weights[0][name], untrained * decay, atol=1e-6)


def test_classes_train_and_draw(tmp_path):
    sizes = {key: TINY[key] for key in ("image_size", "image_base_size", "arch")}
    sizes |= {"video_base_size": [1, 2, 3], "rotary_pos_embed": False}
    base = tmp_path / "nova-classes"
    NOVAC2IPipeline(
        transformer=make_model(text_token_dim=None, text_token_len=None),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
    ).save_pretrained(base)
    dataset = tmp_path / "classes"
    dataset.mkdir()
    rng = np.random.default_rng(0)
    features = {"moments": "bytes", "label": "int64", "shape": ["int64"]}
    with RecordWriter(str(dataset), features) as writer:
        for index in range(4):
            mean = rng.normal(size=(4, 8, 12))
            moments = np.concatenate([mean, np.full_like(mean, -10.0)]).astype(np.float16)
            record = {"moments": moments.tobytes(), "shape": moments.shape, "label": index}
            writer.write(record)
    arguments = ("nova_shapes_c2i.yaml", base, dataset, tmp_path / "run")
    steps = ["training.max_train_steps=30", "optimizer.params.lr=0.002", "validation.every=30"]
    log = train(*arguments, *steps, *VALIDATION, sizes=sizes)
    assert "no samples" not in log and "Validation(loss)" in log
    assert (tmp_path / "run" / "validation" / "step-30" / "raw.png").is_file()
    values = losses(log, "loss")
    assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5])
    pipe = NOVAC2IPipeline.from_pretrained(tmp_path / "run" / "checkpoints" / "checkpoint-30")
    assert pipe([0, 3], output_type="np", **QUICK).images.shape == (2, 64, 96, 3)


def test_validation_of_a_video_model_writes_clips_and_both_losses(
    video_release, video_dataset, tmp_path
):
    output = tmp_path / "run"
    arguments = ("nova_d48w1024_osp480.yaml", video_release, video_dataset, output)
    log = train(*arguments, *VALIDATION, "training.max_train_steps=2", "validation.every=2")
    assert "no samples" not in log
    assert re.search(r"Validation\(loss_i2i\): \d", log) and "Validation(loss_t2i)" in log
    folder = output / "validation" / "step-2"
    for name in ("raw", "ema"):
        frames = imageio.v3.imread(folder / f"{name}.mp4")
        assert len(frames) == 9  # of three latent frames
