"""Release folders: loading them as they are, saving them again, errors for what does not fit."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline
from diffnext.utils.json_files import read_json, write_json

WEIGHTS = "diffusion_pytorch_model.safetensors"


def draw(pipe):
    options = {"num_inference_steps": 2, "num_diffusion_steps": 2, "disable_progress_bar": True}
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=generator, output_type="pt", **options).images


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}])
def test_a_release_folder_loads_and_draws_the_same(pipe, release, options):
    loaded = NOVAPipeline.from_pretrained(release, **options)
    assert type(loaded.transformer) is NOVATransformer3DModel
    assert type(loaded.vae) is AutoencoderKL
    assert type(loaded.text_encoder) is PhiEncoderModel
    torch.testing.assert_close(draw(loaded), draw(pipe))


def test_a_relative_path_loads(release, monkeypatch):
    monkeypatch.chdir(release.parent)
    assert NOVAPipeline.from_pretrained(release.name).transformer is not None
    assert NOVAPipeline.from_pretrained(f"./{release.name}/").vae is not None


def test_training_pipelines_load_the_same_folder(release):
    pipe = NOVATrainT2IPipeline.from_pretrained(release)
    assert type(pipe.noise_scheduler).__module__.startswith("diffnext.")


def test_save_and_load_round_trips(release, tmp_path):
    pipe = NOVAPipeline.from_pretrained(release)
    pipe.save_pretrained(tmp_path / "again")
    again = NOVAPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(draw(pipe), draw(again))


def test_a_saved_pipeline_loads_in_a_fresh_process(release, tmp_path):
    NOVAPipeline.from_pretrained(release).save_pretrained(tmp_path / "again")
    program = (
        "import sys; from diffnext.pipelines import NOVAPipeline; "
        "print(type(NOVAPipeline.from_pretrained(sys.argv[1]).vae).__name__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "again")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "AutoencoderKL"


def test_a_sharded_text_encoder_loads(pipe, release):
    for file in (release / "text_encoder").glob("*.safetensors"):
        file.unlink()
    pipe.text_encoder.save_pretrained(release / "text_encoder", max_shard_size="20KB")
    assert (release / "text_encoder" / "model.safetensors.index.json").exists()
    torch.testing.assert_close(draw(NOVAPipeline.from_pretrained(release)), draw(pipe))


def test_an_int_image_size_is_a_square():
    from tests.tiny import make_model

    model = make_model(image_size=64, image_base_size=[4, 4], video_base_size=[1, 2, 2])
    assert model.image_encoder.image_size == (8, 8)


def test_components_can_be_left_out_or_replaced(release, pipe):
    loaded = NOVAPipeline.from_pretrained(release, text_encoder=None, tokenizer=None)
    assert loaded.text_encoder is None
    loaded = NOVAPipeline.from_pretrained(release, vae=pipe.vae)
    assert loaded.vae is pipe.vae


def test_half_precision_loads(release):
    loaded = NOVAPipeline.from_pretrained(release, torch_dtype=torch.float16)
    assert loaded.transformer.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.half


def edit_weights(file, edit):
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_missing_and_unknown_weights_are_listed(release):
    def rename(weights):
        weights["stray.weight"] = weights.pop("mask_embed.bos_token")

    edit_weights(release / "transformer" / WEIGHTS, rename)
    with pytest.raises(RuntimeError) as caught:
        NOVAPipeline.from_pretrained(release)
    assert "do not fit NOVATransformer3DModel" in str(caught.value)
    assert "1 missing from the weights: mask_embed.bos_token" in str(caught.value)
    assert "1 unknown to the model: stray.weight" in str(caught.value)


def test_weights_of_another_shape_are_refused(release):
    def shrink(weights):
        weights["mask_embed.bos_token"] = torch.zeros(1, 3)

    edit_weights(release / "transformer" / WEIGHTS, shrink)
    with pytest.raises((RuntimeError, ValueError), match="bos_token"):
        NOVAPipeline.from_pretrained(release)


def test_text_encoder_weights_must_fit(release):
    file = release / "text_encoder" / "model.safetensors"
    edit_weights(file, lambda weights: weights.pop("model.final_layernorm.weight"))
    with pytest.raises(
        RuntimeError, match="missing from the weights: model.final_layernorm.weight"
    ):
        NOVAPipeline.from_pretrained(release)


def test_foreign_shims_are_not_run_without_permission(release):
    shim = release / "vae" / "__vae__.py"
    shim.write_text("raise SystemExit('this ran')\n" + shim.read_text())
    with pytest.raises(ValueError, match="trust_remote_code"):
        NOVAPipeline.from_pretrained(release)


def test_a_missing_shim_is_found_by_class_name(release):
    (release / "transformer" / "__transformer__.py").unlink()
    assert NOVAPipeline.from_pretrained(release).transformer is not None


def test_a_checkpoint_takes_the_rest_from_its_base_folder(release, pipe, tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    (release / "transformer").rename(checkpoint.parent / "moved")
    checkpoint.mkdir()
    (checkpoint.parent / "moved").rename(checkpoint / "transformer")
    write_json(checkpoint / "model_index.json", read_json(release / "model_index.json"))
    write_json(checkpoint / "base_folder.json", {"base_folder": str(release)})
    torch.testing.assert_close(draw(NOVAPipeline.from_pretrained(checkpoint)), draw(pipe))


def test_a_component_that_is_nowhere_is_named(release):
    write_json(release / "base_folder.json", {"base_folder": str(release)})
    for file in (release / "vae").iterdir():
        file.unlink()
    (release / "vae").rmdir()
    with pytest.raises(FileNotFoundError, match="component 'vae'"):
        NOVAPipeline.from_pretrained(release)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "nowhere"])
def test_a_path_that_is_no_folder_is_refused(path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        NOVAPipeline.from_pretrained(path)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model_index.json"):
        NOVAPipeline.from_pretrained(tmp_path)


OPTIONAL = ("wandb", "gradio", "decord", "codewithgpu", "deepspeed", "cv2", "scipy")


def run_python(program):
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1]


def test_importing_the_pipelines_needs_no_optional_package():
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"
    assert run_python(f"{block}; import diffnext.pipelines; print('imported')") == "imported"


def test_importing_the_pipelines_pulls_in_no_optional_package():
    # transformers itself imports scipy where it is installed
    heavy = tuple(name for name in OPTIONAL if name != "scipy")
    program = f"import sys, diffnext.pipelines; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(program) == "[]"
