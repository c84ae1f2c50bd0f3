"""The script that fits an image autoencoder: fit, resume, export, failures."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_autoencoder.py"
TINY_MODEL = {
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "mid_block_add_attention": False,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_autoencoder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def config_file(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0)
    for index in range(3):
        coarse = noise.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
        picture.save(pictures / f"{index}.png")
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": TINY_MODEL,
        "data": {
            "images": [str(pictures)],
            "hold_out_every": 3,
            "crop_sizes": [16, 32],
            "shapes_fraction": 0.3,
        },
        "optimizer": {"learning_rate": 0.002, "warmup_steps": 2},
        "training": {"steps": 6, "batch_size": 4, "save_every": 2, "evaluate_every": 3},
        "export": {"dtype": "float32", "measured_batches": 4},
    }
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def run_folder(config_file):
    return config_file.parent / "run"


def fresh_autoencoder():
    vae = AutoencoderKL(**TINY_MODEL).eval()
    vae.quant_conv.weight.data[1] *= 5.0  # channels of unequal spread and off-center
    vae.quant_conv.bias.data[2] += 3.0
    return vae.requires_grad_(False)


def weights_of(folder):
    return AutoencoderKL.from_pretrained(folder).state_dict()


def test_a_fit_writes_a_loadable_model_and_a_comparison(script, config_file):
    script.main([f"config={config_file}", "export.dtype=float16"])
    vae = AutoencoderKL.from_pretrained(run_folder(config_file) / "vae")
    weights = load_file(run_folder(config_file) / "vae" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert list(vae.config.block_out_channels) == [32, 32]
    assert vae.config.scaling_factor > 0
    with Image.open(run_folder(config_file) / "comparison.png") as sheet:
        assert sheet.height in (32, 64)  # two rows of 16 or of 32 pixels
    leftovers = [path.name for path in run_folder(config_file).iterdir()]
    assert sorted(leftovers) == ["comparison.png", "training_state.pt", "vae"]


def test_fitting_raises_the_quality_on_held_out_pictures(script, config_file):
    arguments = [f"config={config_file}", "data.crop_sizes=[16]", "data.shapes_fraction=0"]
    trainer = script.AutoencoderTrainer(script.load_settings([*arguments, "training.steps=40"]))
    trainer.output_dir.mkdir()
    before = trainer.evaluate()
    for _ in range(40):
        trainer.train_step()
    assert trainer.evaluate() > before + 2


def test_a_killed_run_continues_exactly(script, config_file, monkeypatch):
    whole = config_file.parent / "whole"
    script.main([f"config={config_file}", f"output_dir={whole}"])
    train_step = script.AutoencoderTrainer.train_step

    def killed_at_step_five(trainer):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return train_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(script.AutoencoderTrainer, "train_step", killed_at_step_five)
        with pytest.raises(KeyboardInterrupt):
            script.main([f"config={config_file}"])
    state = torch.load(run_folder(config_file) / "training_state.pt", weights_only=True)
    assert state["step"] == 4
    script.main([f"config={config_file}"])
    expected = weights_of(whole / "vae")
    for name, weight in weights_of(run_folder(config_file) / "vae").items():
        assert torch.equal(weight, expected[name]), name


def test_a_run_starts_from_the_weights_of_init_from(script, config_file):
    folder = config_file.parent / "start"
    fresh_autoencoder().save_pretrained(folder)
    settings = script.load_settings([f"config={config_file}", f"init_from={folder}"])
    trainer = script.AutoencoderTrainer(settings)
    for name, weight in weights_of(folder).items():
        assert torch.equal(trainer.vae.state_dict()[name], weight), name


def test_whitening_keeps_reconstructions_and_gives_unit_latents(script):
    vae = fresh_autoencoder()
    x = torch.rand(6, 3, 32, 32) * 2 - 1
    before = vae.encode(x).latent_dist
    reconstruction = vae.decode(before.mean).sample
    statistics = script.measure_latents(vae, [x[:2], x[2:]])
    script.whiten_latents(vae, statistics)
    after = vae.encode(x).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, reconstruction, atol=1e-4, rtol=0)
    scaled = script.measure_latents(vae, [x])
    scale = vae.config.scaling_factor
    torch.testing.assert_close(scaled.mean * scale, torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std * scale, torch.ones(4).double(), atol=1e-4, rtol=0)


def test_whitening_keeps_noisy_reconstructions(script):
    vae = fresh_autoencoder()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    before = vae.encode(x).latent_dist
    expected = vae.decode(before.mean + before.std).sample
    script.whiten_latents(vae, script.measure_latents(vae, [x]))
    after = vae.encode(x).latent_dist
    torch.testing.assert_close(
        vae.decode(after.mean + after.std).sample, expected, atol=1e-4, rtol=0
    )


def test_without_whitening_the_factors_give_unit_latents_overall(script):
    vae = fresh_autoencoder()
    weights = {name: weight.clone() for name, weight in vae.state_dict().items()}
    x = torch.rand(6, 3, 32, 32) * 2 - 1
    script.standardize_latents(vae, script.measure_latents(vae, [x]))
    posterior = vae.encode(x).latent_dist
    scaled = vae.scale_(posterior.mean)
    variance = scaled.square().mean() + posterior.var.mean() * vae.config.scaling_factor**2
    assert scaled.mean().abs() < 1e-4
    assert abs(variance - 1) < 1e-4
    assert all(torch.equal(weights[name], weight) for name, weight in vae.state_dict().items())


def test_crops_depend_only_on_seed_stream_and_step(script, config_file):
    settings = script.load_settings([f"config={config_file}"])
    first = script.CropSampler(settings.data, batch_size=4, seed=1)
    second = script.CropSampler(settings.data, batch_size=4, seed=1)
    second.batch(script.TRAINING, 3)
    assert torch.equal(first.batch(script.TRAINING, 7), second.batch(script.TRAINING, 7))
    other = script.CropSampler(settings.data, batch_size=4, seed=2)
    a, b = first.batch(script.TRAINING, 7), other.batch(script.TRAINING, 7)
    assert a.shape != b.shape or not torch.equal(a, b)


def test_batches_hold_fewer_pictures_of_larger_crops(script, config_file):
    settings = script.load_settings([f"config={config_file}"])
    sampler = script.CropSampler(settings.data, batch_size=4, seed=0)
    shapes = {tuple(sampler.batch(script.TRAINING, step).shape) for step in range(12)}
    assert shapes == {(4, 3, 16, 16), (1, 3, 32, 32)}


def test_held_out_pictures_are_never_trained_on(script, config_file):
    settings = script.load_settings([f"config={config_file}"])
    sampler = script.CropSampler(settings.data, batch_size=4, seed=0)
    assert [path.name for path in sampler.held_out] == ["2.png"]
    assert [path.name for path in sampler.pictures] == ["0.png", "1.png"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(script, config_file):
    script.main([f"config={config_file}", "training.steps=2"])
    path = run_folder(config_file) / "training_state.pt"
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match="step 2"):
        script.main([f"config={config_file}", "loss.mse=.inf"])
    assert path.read_bytes() == before


def test_resuming_another_model_is_refused(script, config_file):
    script.main([f"config={config_file}", "training.steps=1"])
    with pytest.raises(SystemExit, match="latent_channels"):
        script.main([f"config={config_file}", "model.latent_channels=8"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("training.step=3", "training.steps"),
        ("training.steps=many", "training.steps"),
        ("data.shapes_fraction=2", "shapes_fraction"),
        ("data.crop_sizes=[17]", "multiples of 2"),
        ("data.images=[nowhere/*.png]", "nowhere"),
        ("data.hold_out_every=1", "leaves 0 pictures"),
        ("export.dtype=float17", "float17"),
        ("+model.use_quant_conv=false", "use_quant_conv"),
        ("+model.double_z=false", "double_z"),
    ],
)
def test_impossible_settings_are_named_before_training(script, config_file, argument, message):
    with pytest.raises(SystemExit, match=message):
        script.main([f"config={config_file}", argument])


def test_help_lists_the_keys(script, capsys):
    script.main(["--help"])
    text = capsys.readouterr().out
    assert "data.max_zoom_out" in text
    assert "export.whiten" in text
