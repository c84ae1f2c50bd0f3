"""diffnext init: complete folders, or a message."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from diffnext.cli.main import main
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
from diffnext.utils.json_files import read_json
from tests.tiny import make_vae

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "configs" / "nova_shapes_t2i.yaml"
SHAPES_T2V = ROOT / "configs" / "nova_shapes_t2v.yaml"
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
SHAPES_C2I = ROOT / "configs" / "nova_shapes_c2i.yaml"


def init(*arguments):
    return main(["init", *map(str, arguments)])


@pytest.fixture
def vae(tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_a_tiny_folder_is_laid_out_as_released_ones_and_draws(tmp_path, vae):
    output = tmp_path / "nova"
    assert init("--config", SHAPES, "--output", output, "--tiny", "--vae", vae) == 0
    assert read_json(output / "model_index.json")["vae"] == ["__vae__", "AutoencoderKL"]
    for component in ("transformer", "vae", "text_encoder"):
        assert (output / component / f"__{component}__.py").is_file()
    pipe = NOVAPipeline.from_pretrained(output)
    out = pipe("a red circle", num_inference_steps=2, num_diffusion_steps=2)
    assert out.images[0].size == (64, 64)
    embed = pipe.transformer.text_embed
    null = embed.weight[: embed.num_tokens]
    assert torch.equal(pipe.encode_prompt("")[0], null)


def test_a_tiny_folder_of_a_video_config_makes_a_clip(tmp_path):
    output = tmp_path / "nova"
    assert init("--config", SHAPES_T2V, "--output", output, "--tiny") == 0
    index = read_json(output / "model_index.json")
    assert index["_class_name"] == "NOVAPipeline"
    assert index["vae"] == ["__vae__", "AutoencoderKLOpenSora"]
    pipe = NOVAPipeline.from_pretrained(output)
    out = pipe("a star", num_inference_steps=2, num_diffusion_steps=2, max_latent_length=5)
    assert out.frames[0].shape == (17, 64, 64, 3)


def test_a_tiny_folder_of_a_class_config_draws_without_text(tmp_path):
    output = tmp_path / "nova"
    assert init("--config", SHAPES_C2I, "--output", output, "--tiny") == 0
    index = read_json(output / "model_index.json")
    assert index["_class_name"] == "NOVAC2IPipeline"
    assert set(index) == {"_class_name", "scheduler", "vae", "transformer"}
    assert not (output / "tokenizer").exists()
    pipe = NOVAC2IPipeline.from_pretrained(output)
    out = pipe(3, num_inference_steps=2, num_diffusion_steps=2)
    assert out.images[0].size == (64, 64)


def test_an_image_autoencoder_is_refused_for_videos(tmp_path, vae, capsys):
    output = tmp_path / "nova"
    assert init("--config", SHAPES_T2V, "--output", output, "--tiny", "--vae", vae) == 1
    assert "needs an AutoencoderKLOpenSora" in capsys.readouterr().err
    assert not output.exists()


def test_the_seed_decides_the_weights(tmp_path, vae):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / name
        init("--config", SHAPES, "--output", output, "--tiny", "--vae", vae, "--seed", seed)
    a, b, c = (
        (tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in "abc"
    )
    assert a == b != c


def test_branches_can_start_closed_and_noise_high(tmp_path, vae):
    options = ("--tiny", "--vae", vae, "--branch-gain", "0", "--shift", "3")
    assert init("--config", SHAPES, "--output", tmp_path / "nova", *options) == 0
    pipe = NOVAPipeline.from_pretrained(tmp_path / "nova")
    tokens = torch.randn(1, 4, 128)
    assert torch.equal(pipe.transformer.video_encoder.blocks[0](tokens), tokens)
    assert pipe.scheduler.config.shift == 3


def test_a_video_model_starts_from_a_picture_model(tmp_path, vae, capsys):
    pictures, clips = tmp_path / "pictures", tmp_path / "clips"
    assert init("--config", SHAPES, "--output", pictures, "--tiny", "--vae", vae) == 0
    options = ("--tiny", "--weights", pictures, "--seed", "1")
    assert init("--config", SHAPES_T2V, "--output", clips, *options) == 0
    assert "initialised: motion_embed\n" in capsys.readouterr().out
    first, second = (load_file(folder / WEIGHTS) for folder in (pictures, clips))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_weights_of_another_shape_are_named(tmp_path, vae, capsys):
    assert init("--config", SHAPES, "--output", tmp_path / "nova", "--tiny", "--vae", vae) == 0
    config = OmegaConf.load(SHAPES)
    config.pipeline.paths.module_config.transformer.arch = [
        "vit_d3w192",
        "vit_d6w192",
        "mlp_d3w192",
    ]
    OmegaConf.save(config, tmp_path / "wide.yaml")
    options = ("--tiny", "--vae", vae, "--weights", tmp_path / "nova")
    assert init("--config", tmp_path / "wide.yaml", "--output", tmp_path / "b", *options) == 1
    assert "proj.weight is (128, 4, 4, 4), the config has (192, 4, 4, 4)" in capsys.readouterr().err


def test_prompts_are_told_apart(tmp_path, vae):
    init("--config", SHAPES, "--output", tmp_path / "nova", "--tiny", "--vae", vae)
    pipe = NOVAPipeline.from_pretrained(tmp_path / "nova")
    embed = pipe.transformer.text_embed
    red, blue = pipe.encode_prompt(["a red circle", "a blue circle"])
    spread = (red - embed.weight[: embed.num_tokens]).norm()
    assert (red - blue).norm() > 0.3 * spread


def test_components_can_be_copied_from_a_folder(tmp_path, vae):
    tiny = tmp_path / "tiny"
    init("--config", SHAPES, "--output", tiny, "--tiny", "--vae", vae)
    parts = ["--text-encoder", tiny / "text_encoder", "--tokenizer", tiny / "tokenizer"]
    output = tmp_path / "nova"
    assert init("--config", SHAPES, "--output", output, "--vae", vae, *parts) == 0
    assert NOVAPipeline.from_pretrained(output).text_encoder is not None


def test_an_existing_folder_is_kept(tmp_path, vae, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    assert init("--config", SHAPES, "--output", tmp_path, "--tiny", "--vae", vae) == 1
    assert "exists: name a new folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep.txt", "vae"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --vae, the folder of an AutoencoderKL"),
        (["--vae", "{vae}"], "--tokenizer is needed, or --tiny"),
        (["--vae", "{wide}", "--tiny"], "'latent_channels': 8"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(tmp_path, vae, capsys, arguments, message):
    make_vae(latent_channels=8).save_pretrained(tmp_path / "wide")
    arguments = [a.format(vae=vae, wide=tmp_path / "wide") for a in arguments]
    assert init("--config", SHAPES, "--output", tmp_path / "nova", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "nova").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "is not a readable YAML file: line 2"),
        ("a: !!bool x", "is not a readable YAML file"),
        ("- a", "must hold key: value pairs"),
        ("hello", "hello"),
        ("", "cannot be loaded as a training config"),
        ("pipeline: {target: '${no.thing}'}", "pipeline.target"),
        ("{pipeline: {paths: {module_config: {transformer: [1]}}}}", "transformer must hold key"),
        ("{pipeline: {paths: {module_config: {transformer: {image_dim: x}}}}}", "image_dim must"),
        ("{pipeline: {paths: {module_config: {transformer: {text_token_dim: a}}}}}", "_dim must"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "config.yaml").write_text(text)
    assert init("--config", tmp_path / "config.yaml", "--output", tmp_path / "new", "--tiny") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shift", "0"], "shift must be greater than 0"),
        (["--shift", "nan"], "shift must be a finite number"),
        (["--branch-gain", "inf"], "--branch-gain must be a finite number, got inf"),
        (["--weights", "no/where"], "--weights no/where has no folder of a transformer"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, capsys, vae, options, message):
    words = ["--config", SHAPES, "--output", tmp_path / "new", "--tiny", "--vae", vae]
    assert init(*words, *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_config_may_calculate_as_in_a_training(tmp_path, vae):
    config = OmegaConf.load(SHAPES)
    config.pipeline.paths.module_config.transformer.image_stride = "${eval:'4 * 2'}"
    OmegaConf.save(config, tmp_path / "config.yaml")
    words = ["--config", tmp_path / "config.yaml", "--output", tmp_path / "new"]
    assert init(*words, "--tiny", "--vae", vae) == 0
