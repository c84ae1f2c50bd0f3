"""Fine-tuning by low-rank adapters: what is trained, written, loaded and merged."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from diffnext.cli.main import main
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.builder import get_pipeline_path
from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline
from diffnext.pipelines.release_folder import LORA_FILE

LORA = ["model.lora.rank=4", "model.lora.alpha=8", "optimizer.params.lr=0.01"]
STEPS = "training.max_train_steps=4"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    steps = {"num_inference_steps": 2, "num_diffusion_steps": 2}
    options = {"output_type": "latent", "disable_progress_bar": True, "generator": generator}
    return pipe("a red circle", **steps, **options).frames


@pytest.fixture
def trained(tiny_run):
    tiny_run.train(*LORA, STEPS, "ema.params.update_every=2")
    return tiny_run


def test_checkpoint_holds_small_adapters_and_nothing_else(trained):
    file = trained.checkpoint(4) / LORA_FILE
    assert not (trained.checkpoint(4) / "transformer").exists()
    assert file.stat().st_size < 0.2 * (trained.base / WEIGHTS).stat().st_size
    weights = load_file(file)
    assert all(name.startswith("transformer.") for name in weights)
    layers = {name.rsplit(".lora_", 1)[0].split(".", 3)[-1] for name in weights}
    assert {name.split(".")[-1] for name in layers} == {"qkv", "proj"}
    assert all(4 in value.shape for value in weights.values())
    average = load_file(trained.ema_checkpoint(4) / LORA_FILE)
    assert average.keys() == weights.keys()
    assert any(not torch.equal(average[name], weights[name]) for name in weights)


def test_checkpoint_loads_as_a_pipeline_and_unloads_to_its_base(trained):
    base = draw(NOVAPipeline.from_pretrained(trained.base))
    pipe = NOVAPipeline.from_pretrained(trained.checkpoint(4))
    assert not torch.allclose(draw(pipe), base)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), base, rtol=0, atol=0)
    pipe.load_lora_weights(trained.checkpoint(4))
    again = draw(NOVAPipeline.from_pretrained(trained.checkpoint(4)))
    torch.testing.assert_close(draw(pipe), again, rtol=0, atol=0)
    average = draw(NOVAPipeline.from_pretrained(trained.ema_checkpoint(4)))
    assert not torch.allclose(average, again)


def test_merged_equals_unmerged(trained, tmp_path, capsys):
    expected = draw(NOVAPipeline.from_pretrained(trained.checkpoint(4)))
    pipe = NOVAPipeline.from_pretrained(trained.checkpoint(4))
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    merged = tmp_path / "merged"
    header = {"license": "mit", "inference": {"parameters": {"guidance_scale": 2.5}}}
    (trained.base / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n# The base\n")
    main(["lora", "merge", str(trained.checkpoint(4)), str(merged), "--dtype", "float32"])
    assert f"Wrote {merged}" in capsys.readouterr().out
    assert load_file(merged / WEIGHTS).keys() == load_file(trained.base / WEIGHTS).keys()
    pipe = NOVAPipeline.from_pretrained(merged)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    card = ModelCard.load(merged / "README.md")
    assert card.data.to_dict() == header
    assert "# merged" in card.text and "The base" not in card.text


def test_prepacked_weights_follow_adapters_that_are_fused_and_taken_off(trained):
    pipe = NOVAPipeline.from_pretrained(trained.checkpoint(4))
    pipe.fuse_lora()
    fused = draw(pipe)
    pipe.unfuse_lora()
    plain = draw(pipe)
    pipe.prepack()
    for change, expected in ((lambda: None, plain), (pipe.fuse_lora, fused)) * 2:
        change()
        torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
        if expected is fused:
            pipe.unfuse_lora()


def test_a_model_with_adapters_is_not_saved(trained, tmp_path):
    pipe = NOVAPipeline.from_pretrained(trained.checkpoint(4))
    for part in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match="a model with adapters cannot be saved"):
            part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()
    (tmp_path / "another" / LORA_FILE).parent.mkdir()
    wrong = {n: v[:1] for n, v in load_file(trained.checkpoint(4) / LORA_FILE).items()}
    save_file(wrong, tmp_path / "another" / LORA_FILE)
    with pytest.raises(ValueError, match=LORA_FILE):
        pipe.load_lora_weights(tmp_path / "another")
    pipe.save_pretrained(tmp_path / "saved")
    draw(NOVAPipeline.from_pretrained(tmp_path / "saved"))


def test_a_pipeline_that_trains_is_not_loaded_with_adapters(trained):
    with pytest.raises(ValueError, match="holds adapters: merge them first"):
        NOVATrainT2IPipeline.from_pretrained(trained.checkpoint(4))


def test_stopped_and_continued_equals_straight(tiny_run, tmp_path):
    options = [*LORA, "model.lora.dropout=0.2", "experiment.save_every=2"]
    tiny_run.train(*options, "training.max_train_steps=2", "ema.params.update_every=2")
    tiny_run.train(*options, STEPS, "ema.params.update_every=2")
    straight = type(tiny_run)(tiny_run.base, tiny_run.dataset, tmp_path / "straight")
    straight.train(*options, STEPS, "ema.params.update_every=2")
    for folder in ("checkpoint", "ema_checkpoint"):
        expected = load_file(getattr(straight, folder)(4) / LORA_FILE)
        actual = load_file(getattr(tiny_run, folder)(4) / LORA_FILE)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_adapters_of_a_checkpoint_load_onto_its_weights(tiny_run, tmp_path):
    tiny_run.train("training.max_train_steps=2", "optimizer.params.lr=0.01")
    base = tiny_run.checkpoint(2)
    later = type(tiny_run)(base, tiny_run.dataset, tmp_path / "later")
    later.train(*LORA, "training.max_train_steps=1")
    pipe = NOVAPipeline.from_pretrained(later.checkpoint(1))
    pipe.unload_lora_weights()
    expected = draw(NOVAPipeline.from_pretrained(base))
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=0)


def test_wrong_layer_is_named_with_those_that_exist(tiny_run):
    error = tiny_run.fail("model.lora.target_modules=[attn.q]", STEPS, code=2)
    assert "model.lora.target_modules: no linear layer is named 'attn.q'" in error
    assert "attn.qkv" in error


def test_run_with_and_without_adapters_do_not_continue_each_other(trained):
    error = trained.fail("training.max_train_steps=5", code=2)
    assert "model.lora is not set" in error and "has adapters" in error
    error = trained.fail("model.lora.rank=8", "training.max_train_steps=5", code=2)
    assert "model.lora does not fit" in error


def test_adapters_alone_are_no_base_folder(trained):
    with pytest.raises(ValueError, match="merge them first"):
        get_pipeline_path(trained.checkpoint(4), module_config={})
