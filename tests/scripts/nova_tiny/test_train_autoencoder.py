"""The script that fits autoencoders: sources, fit, resume, export, failures."""

from itertools import pairwise
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import autoencoder_data
import train_autoencoder as script
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from shapes_world.rendering import draw_example
from shapes_world.scenes import CLIP_CATEGORIES

TINY_MODEL = {
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "mid_block_add_attention": False,
}
TINY_VIDEO_MODEL = {
    "block_out_channels": [64, 32, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2 + ["DownEncoderBlock3D"] * 2,
    "up_block_types": ["UpDecoderBlock3D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
}
MODELS = {
    "AutoencoderKL": (AutoencoderKL, TINY_MODEL),
    "AutoencoderKLOpenSora": (AutoencoderKLOpenSora, TINY_VIDEO_MODEL),
}


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


@pytest.fixture
def video_config_file(config_file):
    """The same run for a video autoencoder, with a clip of a square that moves."""
    video = config_file.parent / "clip.mp4"
    frames = np.full((24, 48, 48, 3), (40, 80, 120), dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[16:32, index : index + 16] = (200, 160, 60)
    imageio.mimwrite(video, list(frames), fps=8)
    config = OmegaConf.load(config_file)
    config.model_class = "AutoencoderKLOpenSora"
    config.model = TINY_VIDEO_MODEL
    config.data.update(videos=[str(video)], clip_lengths=[1, 5], crop_sizes=[16, 32])
    config.training.batch_size = 5
    config.export.measured_batches = 2
    path = config_file.parent / "tiny_video.yaml"
    OmegaConf.save(config, path)
    return path


def run_folder(config_file):
    return config_file.parent / "run"


def fresh_autoencoder(kind="AutoencoderKL"):
    model_class, arguments = MODELS[kind]
    vae = model_class(**arguments).eval()
    vae.quant_conv.weight.data[1] *= 5.0  # channels of unequal spread and off-center
    vae.quant_conv.bias.data[2] += 3.0
    return vae.requires_grad_(False)


def random_pixels(kind, count):
    frames = () if kind == "AutoencoderKL" else (5,)
    return torch.rand(count, 3, *frames, 32, 32) * 2 - 1


def refuse(capsys, config_file, *arguments):
    """Run and return what it says; nothing but that, and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        script.main([f"config={config_file}", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def weights_of(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_a_fit_writes_a_loadable_model_and_a_comparison(config_file):
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


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_fitting_raises_the_quality_on_held_out_pictures(config_file, kind):
    arguments = [f"config={config_file}", "data.crop_sizes=[16]", "data.shapes_fraction=0"]
    arguments.append(f"optimizer.kind={kind}")
    trainer = script.AutoencoderTrainer(script.load_settings([*arguments, "training.steps=40"]))
    trainer.output_dir.mkdir()
    before = trainer.evaluate()
    for _ in range(40):
        trainer.train_step()
    assert trainer.evaluate() > before + 2


def test_a_video_fit_writes_a_loadable_model_and_a_comparison(video_config_file):
    arguments = ["export.dtype=float16", "data.crop_sizes=[16]", "training.steps=3"]
    script.main([f"config={video_config_file}", *arguments])
    folder = run_folder(video_config_file)
    vae = AutoencoderKLOpenSora.from_pretrained(folder / "vae")
    assert {weight.dtype for weight in weights_of(folder / "vae").values()} == {torch.float16}
    x = torch.rand(1, 3, 9, 24, 32) * 2 - 1
    latents = vae.encode(x).latent_dist.mean
    assert latents.shape == (1, 4, 3, 3, 4)
    assert vae.decode(latents).sample.shape == x.shape
    with Image.open(folder / "comparison.png") as sheet:
        assert sheet.size == (5 * 16, 2 * 16)  # five frames above their reconstructions


@pytest.mark.slow
def test_fitting_raises_the_quality_on_held_out_clips(video_config_file):
    arguments = ["data.crop_sizes=[16]", "data.clip_lengths=[5]", "data.shapes_fraction=0"]
    arguments += ["data.images=[]", "training.steps=30", "training.batch_size=2"]
    settings = script.load_settings([f"config={video_config_file}", *arguments])
    trainer = script.AutoencoderTrainer(settings)
    trainer.output_dir.mkdir()
    before = trainer.evaluate()
    losses = [trainer.train_step()[0] for _ in range(30)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert trainer.evaluate() > before + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind", [("config_file", "adam"), ("config_file", "muon"), ("video_config_file", "muon")]
)
def test_a_killed_run_continues_exactly(name, kind, request, monkeypatch):
    config_file = request.getfixturevalue(name)
    arguments = [f"config={config_file}", "data.crop_sizes=[16]", "training.batch_size=2"]
    arguments.append(f"optimizer.kind={kind}")
    whole = config_file.parent / "whole"
    script.main([*arguments, f"output_dir={whole}"])
    train_step = script.AutoencoderTrainer.train_step

    def killed_at_step_five(trainer):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return train_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(script.AutoencoderTrainer, "train_step", killed_at_step_five)
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments)
    state = torch.load(run_folder(config_file) / "training_state.pt", weights_only=True)
    assert state["step"] == 4
    script.main(arguments)
    expected = weights_of(whole / "vae")
    for name, weight in weights_of(run_folder(config_file) / "vae").items():
        assert torch.equal(weight, expected[name]), name


def test_a_run_starts_from_the_weights_of_init_from(config_file):
    folder = config_file.parent / "start"
    fresh_autoencoder().save_pretrained(folder)
    settings = script.load_settings([f"config={config_file}", f"init_from={folder}"])
    trainer = script.AutoencoderTrainer(settings)
    for name, weight in weights_of(folder).items():
        assert torch.equal(trainer.vae.state_dict()[name], weight), name


def test_a_video_fit_starts_from_the_weights_of_an_image_autoencoder(video_config_file):
    folder = video_config_file.parent / "start"
    widths = TINY_VIDEO_MODEL["block_out_channels"]
    image_vae = AutoencoderKL(**TINY_MODEL | {"block_out_channels": widths}).eval()
    image_vae.save_pretrained(folder)
    settings = script.load_settings([f"config={video_config_file}", f"init_from={folder}"])
    vae = script.AutoencoderTrainer(settings).vae.eval()
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    clip = pictures[:, :, None].expand(-1, -1, 9, -1, -1)
    with torch.no_grad():
        expected = image_vae.encode(pictures).latent_dist.parameters
        moments = vae.encode(clip).latent_dist.parameters
    assert moments.shape == (2, 8, 3, 2, 3)
    for moment in moments.unbind(2):
        torch.testing.assert_close(moment, expected, atol=1e-4, rtol=1e-4)


def test_an_image_autoencoder_of_other_widths_is_refused(video_config_file, capsys):
    folder = video_config_file.parent / "start"
    AutoencoderKL(**TINY_MODEL).save_pretrained(folder)
    message = refuse(capsys, video_config_file, f"init_from={folder}")
    assert message.startswith("error: init_from: ") and "in the image autoencoder" in message


@pytest.mark.parametrize("kind", MODELS)
def test_whitening_keeps_reconstructions_and_gives_unit_latents(kind):
    vae = fresh_autoencoder(kind)
    x = random_pixels(kind, 6)
    before = vae.encode(x).latent_dist
    reconstruction = vae.decode(before.mean).sample
    script.whiten_latents(vae, *script.measure_latents(vae, [x[:2], x[2:]]))
    after = vae.encode(x).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, reconstruction, atol=1e-4, rtol=0)
    mean, std = script.measure_latents(vae, [x])
    scale = vae.config.scaling_factor
    torch.testing.assert_close(mean * scale, torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(std * scale, torch.ones(4).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_whitening_keeps_noisy_reconstructions(kind):
    vae = fresh_autoencoder(kind)
    x = random_pixels(kind, 3)
    before = vae.encode(x).latent_dist
    expected = vae.decode(before.mean + before.std).sample
    script.whiten_latents(vae, *script.measure_latents(vae, [x]))
    after = vae.encode(x).latent_dist
    torch.testing.assert_close(
        vae.decode(after.mean + after.std).sample, expected, atol=1e-4, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_latents_approach_those_of_an_image_autoencoder(
    config_file, video_config_file, kind
):
    teacher = AutoencoderKL(**{**TINY_MODEL, "block_out_channels": [32, 32, 32, 32]})
    teacher.save_pretrained(config_file.parent / "teacher")
    is_video = kind == "AutoencoderKLOpenSora"
    config = OmegaConf.load(video_config_file if is_video else config_file)
    config.align_with = str(config_file.parent / "teacher")
    config.model = {**MODELS[kind][1], "block_out_channels": [64, 32, 32, 64]}
    config.optimizer.learning_rate = 0.003
    config.data.clip_lengths = [5] if is_video else [1]
    distances = []
    for steps in (1, 20):
        config.training.steps = steps
        path = config_file.parent / "aligned.yaml"
        OmegaConf.save(config, path)
        script.main([f"config={path}", "training.resume=false"])
        vae = MODELS[kind][0].from_pretrained(run_folder(config_file) / "vae")
        assert vae.config.scaling_factor == 1
        trainer = script.AutoencoderTrainer(script.load_settings([f"config={path}"]))
        x = trainer.sampler.batch(autoencoder_data.EVALUATION, 0)
        with torch.no_grad():
            mean = vae.encode(x).latent_dist.mean
            wanted = teacher.encode(x[:, :, -1] if is_video else x).latent_dist.mean
        last = mean[:, :, -1] if is_video else mean
        distances.append((last - wanted * teacher.config.scaling_factor).square().mean())
    assert distances[1] < 0.85 * distances[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_narrower_posterior_has_the_same_means(kind):
    vae = fresh_autoencoder(kind)
    x = random_pixels(kind, 2)
    before = vae.encode(x).latent_dist
    script.scale_posterior(vae, 0.25)
    after = vae.encode(x).latent_dist
    torch.testing.assert_close(after.mean, before.mean)
    torch.testing.assert_close(after.std, before.std / 4)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["config_file", "video_config_file"])
def test_a_decoder_fit_leaves_the_latents_alone(fixture, request):
    path = request.getfixturevalue(fixture)
    script.main([f"config={path}"])
    first = Path(OmegaConf.load(path).output_dir)
    options = ["training.part=decoder", f"init_from={first / 'vae'}", "training.steps=3"]
    script.main([f"config={path}", *options, f"output_dir={first.with_name('decoder')}"])
    before, after = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        for folder in (first, first.with_name("decoder"))
    )
    for name, weight in before.items():
        is_fixed = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(weight, after[name]) == is_fixed, name


def test_mixed_precision_fits_almost_the_same(config_file):
    results = []
    for precision in ("no", "bf16"):
        settings = script.load_settings(
            [f"config={config_file}", f"training.mixed_precision={precision}"]
        )
        results.append(script.AutoencoderTrainer(settings).train_step()[0])
    assert results[0] != results[1]
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_crops_depend_only_on_seed_stream_and_step(config_file):
    settings = script.load_settings([f"config={config_file}"])
    first = script.Sampler(settings.data, is_video=False, batch_size=4, seed=1)
    second = script.Sampler(settings.data, is_video=False, batch_size=4, seed=1)
    second.batch(script.TRAINING, 3)
    assert torch.equal(first.batch(script.TRAINING, 7), second.batch(script.TRAINING, 7))
    other = script.Sampler(settings.data, is_video=False, batch_size=4, seed=2)
    a, b = first.batch(script.TRAINING, 7), other.batch(script.TRAINING, 7)
    assert a.shape != b.shape or not torch.equal(a, b)


def test_batches_hold_fewer_pictures_of_larger_crops(config_file):
    settings = script.load_settings([f"config={config_file}"])
    sampler = script.Sampler(settings.data, is_video=False, batch_size=4, seed=0)
    shapes = {tuple(sampler.batch(script.TRAINING, step).shape) for step in range(12)}
    assert shapes == {(4, 3, 16, 16), (1, 3, 32, 32)}


def test_held_out_pictures_are_never_trained_on(config_file):
    settings = script.load_settings([f"config={config_file}"])
    sampler = script.Sampler(settings.data, is_video=False, batch_size=4, seed=0)
    assert [path.name for path in sampler.held_out.pictures] == ["2.png"]
    assert [path.name for path in sampler.training.pictures] == ["0.png", "1.png"]


def test_clips_depend_only_on_seed_stream_and_step(video_config_file):
    settings = script.load_settings([f"config={video_config_file}"])
    first = script.Sampler(settings.data, is_video=True, batch_size=5, seed=1)
    second = script.Sampler(settings.data, is_video=True, batch_size=5, seed=1)
    second.batch(script.TRAINING, 3)
    assert torch.equal(first.batch(script.TRAINING, 7), second.batch(script.TRAINING, 7))
    a, b = first.batch(script.TRAINING, 7), first.batch(script.MEASUREMENT, 7)
    assert a.shape != b.shape or not torch.equal(a, b)


def test_batches_hold_fewer_of_longer_and_larger_clips(video_config_file):
    settings = script.load_settings([f"config={video_config_file}"])
    sampler = script.Sampler(settings.data, is_video=True, batch_size=20, seed=0)
    shapes = {tuple(sampler.batch(script.TRAINING, step).shape) for step in range(24)}
    assert shapes == {
        (20, 3, 1, 16, 16),
        (4, 3, 5, 16, 16),
        (5, 3, 1, 32, 32),
        (1, 3, 5, 32, 32),
    }
    assert {sampler.batch(script.EVALUATION, step).size(2) for step in range(8)} == {5}


def test_the_end_of_a_video_is_never_trained_on(video_config_file):
    settings = script.load_settings([f"config={video_config_file}", "data.hold_out_every=4"])
    sampler = script.Sampler(settings.data, is_video=True, batch_size=5, seed=0)
    (training,), (held_out,) = sampler.training.videos, sampler.held_out.videos
    assert (len(training), len(held_out)) == (18, 6)
    whole = autoencoder_data.read_frames(settings.data.videos[0], stride=1)
    assert [frame.tobytes() for frame in training + held_out] == [f.tobytes() for f in whole]
    assert len(sampler.training.pictures) == 3


def test_clips_of_a_video_have_even_distances_and_reach_all_frames():
    rng = np.random.default_rng(0)
    windows = [autoencoder_data.random_window(rng, range(24), 5, 8) for _ in range(400)]
    assert all(len(window) == 5 for window in windows)
    assert {window.step for window in windows} == {1, 2, 3, 4, 5}  # 6 would need 25 frames
    assert set().union(*windows) == set(range(24))
    assert list(autoencoder_data.random_window(rng, range(5), 5, 8)) == [0, 1, 2, 3, 4]


def test_all_frames_of_a_clip_show_the_same_region():
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    for seed in range(8):
        crops = autoencoder_data.crop_randomly(np.random.default_rng(seed), frames, 16, 2.0)
        first, second = (np.asarray(crop).astype(int) for crop in crops)
        assert np.abs(first + second - 255).max() <= 1


def test_a_pan_stays_within_the_picture_and_moves_evenly():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        first = autoencoder_data.random_box(rng, (48, 40), 16, 8.0)
        boxes = autoencoder_data.move_box(rng, (48, 40), first, 5)
        assert boxes[0] == first
        for box in boxes:
            assert min(box.left, box.top) >= -1e-9
            assert box.left + box.side <= 48 + 1e-9
            assert box.top + box.side <= 40 + 1e-9
        steps = [b.left - a.left for a, b in pairwise(boxes)]
        assert steps == pytest.approx([steps[0]] * 4)


def test_a_panned_picture_changes_from_frame_to_frame():
    gradient = np.tile(np.arange(0, 240, 5, dtype=np.uint8)[None, :, None], (40, 1, 3))
    clip = autoencoder_data.pan_picture(
        np.random.default_rng(0), Image.fromarray(gradient), 16, 1.5, 5
    )
    means = [np.asarray(frame).mean() for frame in clip]
    assert len(set(means)) == 5
    assert means in (sorted(means), sorted(means, reverse=True))


def test_moving_shapes_drift_away():
    for seed in range(5):
        _, clip, _ = draw_example(np.random.default_rng(seed), CLIP_CATEGORIES, 32, 9)
        first, second, last = (np.asarray(clip[k]).astype(int) for k in (0, 1, -1))
        assert 0 < np.abs(second - first).mean() < np.abs(last - first).mean()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(config_file):
    script.main([f"config={config_file}", "training.steps=2"])
    path = run_folder(config_file) / "training_state.pt"
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match="step 2"):
        script.main([f"config={config_file}", "loss.mse=1e39"])
    assert path.read_bytes() == before


def test_resuming_another_model_is_refused(config_file, capsys):
    script.main([f"config={config_file}", "training.steps=1"])
    assert "latent_channels" in refuse(capsys, config_file, "model.latent_channels=8")


def test_resuming_another_class_is_refused(config_file, video_config_file, capsys):
    script.main([f"config={config_file}", "training.steps=1"])
    message = refuse(capsys, video_config_file)
    assert "model_class=AutoencoderKL, now AutoencoderKLOpenSora" in message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("training.part=encoder", "training.part must be 'all' or 'decoder', got 'encoder'"),
        ("training.part=decoder", "training.part=decoder needs init_from"),
        ("training.mixed_precision=fp8", "mixed_precision must be 'no' or 'bf16', got 'fp8'"),
        ("training.step=3", "training.steps"),
        ("training.steps=many", "training.steps must be a whole number"),
        ("data.shapes_fraction=2", "shapes_fraction must be less than or equal to 1"),
        ("data.images=[]", "data needs images or videos, or shapes_fraction=1"),
        ("data.crop_sizes=[17]", "multiples of 2, got [17]"),
        ("data.images=[nowhere/*.png]", "nowhere"),
        ("data.hold_out_every=1", "leaves 0 pictures"),
        ("export.dtype=float17", "export.dtype must be 'float16', 'bfloat16' or 'float32'"),
        ("data.clip_lengths=[5]", "must be [1] for an AutoencoderKL, got [5]"),
        ("model_class=AutoencoderTiny", "must be 'AutoencoderKL' or 'AutoencoderKLOpenSora'"),
    ],
)
def test_impossible_settings_are_named_before_training(
    config_file, argument, message, capsys
):
    assert message in refuse(capsys, config_file, argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.clip_lengths=[1,6]", "nearest legal number is 5 or 9"),
        ("data.clip_lengths=[0]", "greater than or equal to 1"),
        ("data.clip_lengths=[]", "must not be empty"),
        ("data.clip_lengths=[9]", "leaves 8 of"),
        ("data.crop_sizes=[20]", "multiples of 8"),
        ("data.frame_stride=0", "frame_stride must be greater than or equal to 1"),
        ("data.videos=[nowhere.mp4]", "no file 'nowhere.mp4'"),
    ],
)
def test_impossible_settings_of_clips_are_named(
    video_config_file, argument, message, capsys
):
    assert message in refuse(capsys, video_config_file, argument)


def test_all_impossible_settings_are_named_at_once(config_file, capsys):
    arguments = ["~output_dir", "training.part=some", "loss.l1=-1", "data.crop_size=[8]"]
    lines = refuse(capsys, config_file, *arguments).splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)


def test_help_lists_the_keys(capsys):
    script.main(["--help"])
    text = capsys.readouterr().out
    assert "data.max_zoom_out" in text
    assert "export.posterior_scale" in text
