"""A pipeline of tiny parts, and a release folder of it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PreTrainedTokenizerFast

from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
from diffnext.pipelines.release_folder import write_shim
from diffnext.utils.json_files import read_json, write_json
from tests.tiny import make_model, make_vae, make_video_vae

QUICK = {"num_inference_steps": 3, "num_diffusion_steps": 2, "disable_progress_bar": True}
PROMPTS = {"text": "a cat", "video": "a cat", "class": 3}
WORDS = ("a", "cat", "dog", "on", "the", "mat", "red")


def make_tokenizer(words=WORDS):
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def make_text_encoder():
    return PhiEncoderModel(
        PhiConfig(
            vocab_size=20,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            initializer_range=0.5,
        )
    ).eval()


def make_pipeline(**components):
    model = make_model()
    parts = {
        "transformer": model,
        "scheduler": model.sample_scheduler,
        "vae": make_vae(),
        "text_encoder": make_text_encoder(),
        "tokenizer": make_tokenizer(),
    }
    return NOVAPipeline(**{**parts, **components})


def make_video_pipeline(frames=3, **components):
    model = make_model(frames=frames)
    parts = {"transformer": model, "scheduler": model.sample_scheduler, "vae": make_video_vae()}
    return make_pipeline(**{**parts, **components})


def make_class_pipeline(**components):
    model = make_model(text_token_dim=None, text_token_len=None)
    parts = {"transformer": model, "scheduler": model.sample_scheduler, "vae": make_vae()}
    return NOVAC2IPipeline(**{**parts, **components})


MAKERS = {"text": make_pipeline, "video": make_video_pipeline, "class": make_class_pipeline}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipes():
    return {kind: make() for kind, make in MAKERS.items()}


@pytest.fixture
def pipe():
    return make_pipeline()


@pytest.fixture
def video_pipe():
    return make_video_pipeline()


@pytest.fixture
def class_pipe():
    return make_class_pipeline()


def write_release(pipe, folder):
    """Lay a folder out like the released ones: shims, no _class_name, diffusers' scheduler."""
    pipe.save_pretrained(folder)
    index = read_json(folder / "model_index.json")
    for component in ("vae", "text_encoder", "transformer"):
        class_name = type(getattr(pipe, component)).__name__
        index[component] = [write_shim(folder / component, component, class_name), class_name]
    index["scheduler"] = ["diffusers", type(pipe.scheduler).__name__]
    write_json(folder / "model_index.json", index)
    config = read_json(folder / "transformer" / "config.json")
    for key in [key for key in config if key.startswith("_")] + ["rotary_pos_embed"]:
        config.pop(key)
    write_json(folder / "transformer" / "config.json", config)
    return folder


@pytest.fixture
def release(pipe, tmp_path):
    """A folder laid out like the released ones."""
    return write_release(pipe, tmp_path / "nova-tiny")
