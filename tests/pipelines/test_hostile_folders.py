"""Model folders, adapters and pictures of a stranger: nothing is run, nothing outside is touched.

A case changes a sound release folder, and names the file that the one error must name. Whatever
would run leaves a file called ``ran``; whatever a folder leads to outside of it is sound, so that a
reader who followed would raise no error.
"""

import json
import os
import pickle
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from diffnext.cli import generate, lora
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.loading import load_autoencoder
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.builder import build_pipeline, get_pipeline_path
from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline
from diffnext.pipelines.release_folder import LORA_FILE
from diffnext.utils.folders import find_folder
from diffnext.utils.json_files import FileError, read_json, write_json
from tests.pipelines.conftest import make_pipeline, write_release

INDEX = "model_index.json"
BASE = "base_folder.json"
VAE = "vae/diffusion_pytorch_model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_release(make_pipeline(), tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def world(sound, tmp_path, monkeypatch):
    """A folder that holds the model, what lies outside of it, and all that the test writes."""
    shutil.copytree(sound, tmp_path / "model")
    shutil.copytree(sound, tmp_path / "outside")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "outside" / "foreign.py").write_text(code(tmp_path) + "class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "outside")
    yield tmp_path
    sys.modules.pop("foreign", None)


def code(world):
    return f"open({str(world / 'ran')!r}, 'w').close()\n"


class Hostile:
    """Runs a program when it is unpickled."""

    def __init__(self, world):
        self.world = world

    def __reduce__(self):
        return os.system, (f"touch {self.world / 'ran'}",)


# Each case: what it does to a folder, and the file that the error must name.
CASES = {}


def case(title, file, /, **parameters):
    def register(change):
        CASES[title] = (lambda folder: change(folder, **parameters), file)
        return change

    return register


def entry(folder, name, value):
    write_json(folder / INDEX, {**read_json(folder / INDEX), name: value})


@case("an absolute name", INDEX, name="WORLD/planted")
@case("a name with ..", INDEX, name="../planted")
@case("a name that is a path", INDEX, name="vae/../../planted")
@case("an empty name", INDEX, name="")
def names(folder, name):
    name = name.replace("WORLD", str(folder.parent))
    entry(folder, name, ["diffusers", "AutoencoderKL"])


@case("an entry that is a text", INDEX, value="AutoencoderKL")
@case("an entry that is a flag", INDEX, value=True)
@case("an entry of three parts", INDEX, value=["diffusers", "AutoencoderKL", "x"])
@case("an entry of numbers", INDEX, value=[1, 2])
@case("a module of the working folder", INDEX, value=["foreign", "Thing"])
@case("a module of Python", INDEX, value=["os", "system"])
@case("a module of this package with a command", INDEX, value=["diffnext.__main__", "main"])
@case("a library that is a path", INDEX, value=["../../outside/foreign", "Thing"])
@case("a function", "diffusers", value=["diffusers", "logging"])
@case("a pipeline in a pipeline", "diffusers", value=["diffusers", "DiffusionPipeline"])
@case("another kind of component", "diffusers", value=["diffusers", "DDPMScheduler"])
def entries(folder, value):
    entry(folder, "vae", value)


@case("a pipeline with code", INDEX)
def pipeline_code(folder):
    (folder / "foreign.py").write_text(code(folder.parent))
    entry(folder, "_class_name", ["foreign", "Thing"])


@case("an index that is a list", INDEX, path=INDEX, text="[]")
@case("a damaged index", INDEX, path=INDEX, text="{")
@case("a deep index", INDEX, path=INDEX, text="[" * 100_000)
@case("an index in another encoding", INDEX, path=INDEX, text="\ud800")
@case(
    "a config that is a list", "transformer/config.json", path="transformer/config.json", text="[]"
)
@case("a damaged config", "vae/config.json", path="vae/config.json", text="{'a': 1}")
@case(
    "a scheduler that is a number",
    "scheduler_config.json",
    path="scheduler/scheduler_config.json",
    text="1",
)
@case("a damaged tokenizer", "tokenizer.json", path="tokenizer/tokenizer.json", text='{"model": ')
@case("a tokenizer of nothing", "tokenizer", path="tokenizer/tokenizer.json", text="{}")
@case(
    "a tokenizer's list", "tokenizer_config.json", path="tokenizer/tokenizer_config.json", text="[]"
)
@case("a list of base folders", BASE, path=BASE, text="[]")
@case("no base folder", BASE, path=BASE, text='{"components": {}}')
@case("a base folder that is a number", BASE, path=BASE, text='{"base_folder": 1}')
@case("a relative base folder", BASE, path=BASE, text='{"base_folder": "../outside"}')
@case(
    "a base folder's name with ..",
    BASE,
    path=BASE,
    text='{"base_folder": "/", "components": {"../planted": "/"}}',
)
@case("a base folder's list", BASE, path=BASE, text='{"base_folder": "/", "components": ["vae"]}')
@case("a shim with code", "__vae__.py", path="vae/__vae__.py", text="import foreign\n")
@case(
    "a shim of another module",
    "__vae__.py",
    path="vae/__vae__.py",
    text="from foreign import AutoencoderKL\n",
)
@case("a shim that is not Python", "__vae__.py", path="vae/__vae__.py", text="\0")
@case(
    "a shim of the command",
    "__vae__.py",
    path="vae/__vae__.py",
    text="from diffnext.__main__ import AutoencoderKL\n",
)
@case(
    "an adapter of another model",
    "adapter_config.json",
    path="text_encoder/adapter_config.json",
    text='{"base_model_name_or_path": "../outside/text_encoder"}',
)
@case("a pickle", "state.pkl", path="vae/state.pkl", text="x")
@case("an empty weights file", VAE, path=VAE, text="")
@case("a header that is not JSON", VAE, path=VAE, text="\x04\0\0\0\0\0\0\0abcd")
def texts(folder, path, text):
    (folder / path).write_bytes(text.encode(errors="surrogatepass"))


@case(
    "a channel count in words",
    "transformer",
    path="transformer/config.json",
    key="image_dim",
    value="four",
)
@case("layers in words", "vae", path="vae/config.json", key="block_out_channels", value="wide")
@case("a scale in words", "vae", path="vae/config.json", key="scaling_factor", value="0.5")
@case("a scale of 0", "vae", path="vae/config.json", key="scaling_factor", value=0)
@case("no scale", "vae", path="vae/config.json", key="scaling_factor", value=None)
@case("a scale of NaN", "vae", path="vae/config.json", key="scaling_factor", value=float("nan"))
@case("a shift in words", "vae", path="vae/config.json", key="shift_factor", value="a")
@case(
    "a width in words",
    "text_encoder",
    path="text_encoder/config.json",
    key="hidden_size",
    value="wide",
)
@case(
    "a negative width",
    "text_encoder",
    path="text_encoder/config.json",
    key="intermediate_size",
    value=-4,
)
@case(
    "a kernel of the Hub",
    "text_encoder/config.json",
    path="text_encoder/config.json",
    key="attn_implementation",
    value="a/kernel",
)
@case(
    "steps in words",
    "scheduler",
    path="scheduler/scheduler_config.json",
    key="num_train_timesteps",
    value="many",
)
@case(
    "tokens of another type",
    "tokenizer",
    path="tokenizer/tokenizer_config.json",
    key="added_tokens_decoder",
    value={"0": 5},
)
@case(
    "a tokenizer elsewhere",
    "fast_tokenizer_files",
    path="tokenizer/tokenizer_config.json",
    key="fast_tokenizer_files",
    value=["../../outside/tokenizer.4.0.0.json"],
)
@case(
    "a tokenizer below a folder with a tokenizer's name",
    "fast_tokenizer_files",
    path="tokenizer/tokenizer_config.json",
    key="fast_tokenizer_files",
    value=["tokenizer.4.0.0.json/../../../outside/any.txt"],
)
@case(
    "a tokenizer in a list",
    "fast_tokenizer_files",
    path="tokenizer/tokenizer_config.json",
    key="fast_tokenizer_files",
    value=[["tokenizer.json"]],
)
@case(
    "a length in words",
    "transformer",
    path="transformer/config.json",
    key="text_token_len",
    value="7",
)
@case("no length", "transformer", path="transformer/config.json", key="text_token_len", value=0)
@case(
    "a longer prompt than the null prompt",
    "transformer",
    path="transformer/config.json",
    key="text_token_len",
    value=600,
)
def values(folder, path, key, value):
    write_json(folder / path, {**read_json(folder / path), key: value})


@case("a header of exabytes", VAE, content=struct.pack("<Q", 2**62) + b"{}")
@case("a header longer than the file", VAE, content=struct.pack("<Q", 10_000) + b"{}")
def headers(folder, content):
    (folder / VAE).write_bytes(content)


@case("cut weights", TRANSFORMER)
def cut(folder):
    data = (folder / TRANSFORMER).read_bytes()
    (folder / TRANSFORMER).write_bytes(data[: len(data) // 2])


@case(
    "pickled weights of the autoencoder", "model.bin", path=VAE, name="diffusion_pytorch_model.bin"
)
@case(
    "pickled weights of the text encoder", "model.bin", path=TEXT_ENCODER, name="pytorch_model.bin"
)
def pickles(folder, path, name):
    weights = load_file(folder / path)
    (folder / path).unlink()
    torch.save({**weights, "hostile": Hostile(folder.parent)}, (folder / path).with_name(name))


@case("a raw pickle", "model.bin")
def raw_pickle(folder):
    (folder / VAE).unlink()
    pickled = pickle.dumps(Hostile(folder.parent))
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickled)


@case(
    "a shard with ..",
    "index.json",
    path=TEXT_ENCODER,
    shard="../../outside/text_encoder/model.safetensors",
)
@case(
    "a shard outside of the transformer",
    "index.json",
    path=TRANSFORMER,
    shard="../../outside/" + TRANSFORMER,
)
@case("an absolute shard", "index.json", path=VAE, shard="/outside/vae.safetensors")
@case("a shard that is a number", "index.json", path=VAE, shard=1)
@case("a missing shard", "index.json", path=VAE, shard="none.safetensors")
def shards(folder, path, shard):
    names = load_file(folder / path).keys()
    (folder / path).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    write_json(folder / f"{path}.index.json", index)


@case("shards in a list", "index.json", content={"metadata": {}, "weight_map": ["a"]})
@case("shards without metadata", "index.json", content={"weight_map": {"a": "b"}})
def shard_index(folder, content):
    (folder / VAE).unlink()
    write_json(folder / f"{VAE}.index.json", content)


@case("a component that is a link", "vae", path="vae")
@case("a config that is a link", "vae/config.json", path="vae/config.json")
@case("weights that are a link", TRANSFORMER, path=TRANSFORMER)
@case("a tokenizer's link", "tokenizer.json", path="tokenizer/tokenizer.json")
@case("an index that is a link", INDEX, path=INDEX)
def links(folder, path):
    place = folder / path
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(folder.parent / "outside" / path)


@case("a folder of templates that is a link", "additional_chat_templates")
def template_link(folder):
    (folder / "tokenizer" / "additional_chat_templates").symlink_to(folder.parent / "outside")


@case("a link that a forged base does not cover", VAE, base="outside/transformer")
@case("a link that a forged loop does not cover", VAE, base="model/vae")
def forged_base(folder, base):
    links(folder, VAE)
    write_json(folder / "vae" / BASE, {"base_folder": str(folder.parent / base)})


@case("a base folder with a link", "vae")
def base_link(folder):
    base = folder.parent / "base"
    shutil.copytree(folder, base)
    links(base, "vae")
    shutil.rmtree(folder / "vae")
    write_json(folder / BASE, {"base_folder": str(base)})


@case("a link to itself", "vae/config.json")
def link_loop(folder):
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("config.json")


@case("a pipe in place of a config", "vae/config.json")
def pipe(folder):
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")


def read_to_draw(folder, capsys):
    NOVAPipeline.from_pretrained(folder)


def read_to_train(folder, capsys):
    overlay = {"vae": {"sample_size": 64}}
    assembled = get_pipeline_path(folder, {}, overlay, folder.parent / "temporary" / "assembled")
    build_pipeline(assembled, NOVATrainT2IPipeline, torch.float32)


def read_by_command(folder, capsys):
    words = [
        "a cat",
        "--model",
        str(folder),
        "--output",
        str(folder.parent / "temporary" / "a.png"),
    ]
    assert generate.main(words) == 1
    shown = capsys.readouterr().err
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in shown
    raise FileError(line)


def test_a_tokenizer_that_fails_when_it_is_used_is_one_error(world):
    """WordPiece looks for its unknown token at the first word that it does not know."""
    file = world / "model" / "tokenizer" / "tokenizer.json"
    vocabulary = {"[PAD]": 0}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocabulary}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    write_json(file, {**read_json(file), "model": model, "added_tokens": []})
    pipe = NOVAPipeline.from_pretrained(world / "model")
    with pytest.raises(FileError, match="tokenizer cannot be loaded as a tokenizer: Exception: "):
        pipe("unknown", num_inference_steps=1, num_diffusion_steps=1)


def everything(world):
    """All files and links, but for those below the temporary folder."""
    paths = [path for path in world.rglob("*") if world / "temporary" not in path.parents]
    return {path: os.readlink(path) if path.is_symlink() else None for path in paths}


@pytest.mark.parametrize("read", [read_to_draw, read_to_train, read_by_command])
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_folder_is_one_error_and_nothing_else(world, read, name, capsys):
    change, file = CASES[name]
    change(world / "model")
    before = everything(world)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(world / "model", capsys)
    assert file in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert everything(world) == before


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("layers in words", lambda folder: AutoencoderKL.from_pretrained(folder / "vae")),
        ("a config that is a link", lambda folder: AutoencoderKL.from_pretrained(folder / "vae")),
        ("a config that is a link", load_autoencoder),
        ("a component that is a link", load_autoencoder),
        (
            "weights that are a link",
            lambda folder: NOVATransformer3DModel.from_pretrained(folder, subfolder="transformer"),
        ),
        (
            "a shard with ..",
            lambda folder: PhiEncoderModel.from_pretrained(folder / "text_encoder"),
        ),
    ],
)
def test_a_component_alone_is_read_by_the_same_rules(world, name, load):
    change, file = CASES[name]
    change(world / "model")
    with pytest.raises(FileError) as caught:
        load(world / "model")
    assert file in str(caught.value)


@pytest.mark.parametrize("path", ["vae/__vae__.py", "text_encoder/__text_encoder__.py"])
def test_a_shim_with_code_runs_for_those_who_trust_it(world, path):
    shim = world / "model" / path
    shim.write_text(code(world) + shim.read_text())
    build_pipeline(world / "model", NOVAPipeline, trust_remote_code=True)
    assert (world / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer/tokenizer_config.json", "text_encoder/config.json"])
def test_code_that_a_config_maps_to_is_not_run(world, name):
    values = {"AutoTokenizer": ["foreign.Thing", None], "AutoModel": "foreign.Thing"}
    content = read_json(world / "model" / name)
    write_json(world / "model" / name, {**content, "auto_map": values, "tokenizer_class": "Thing"})
    shutil.copy(world / "outside" / "foreign.py", world / "model" / name.split("/")[0])
    assert NOVAPipeline.from_pretrained(world / "model").text_encoder is not None
    assert not (world / "ran").exists()


# Sound folders


def as_it_is(folder):
    return folder


def as_hub_snapshot(folder):
    """As the cache of the Hub has it: links to files named by their hashes."""
    repository = folder.parent / "hub" / "models--a--nova"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(folder)
        shutil.move(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def as_checkpoint(folder):
    """What training writes, with an autoencoder from a third place."""
    checkpoint, other = folder.parent / "checkpoint-5", folder.parent / "other"
    checkpoint.mkdir()
    (folder / "transformer").rename(checkpoint / "transformer")
    (folder / "vae").rename(other)
    shutil.copy(folder / INDEX, checkpoint)
    content = {"base_folder": str(folder), "components": {"vae": str(other)}}
    write_json(checkpoint / BASE, content)
    return checkpoint


def as_assembled(folder):
    overlay = {"vae": {"scaling_factor": 0.5}}
    return Path(get_pipeline_path(folder, {}, overlay, folder.parent / "first"))


def as_assembled_twice(folder):
    overlay = {"transformer": {"image_dim": 4}}
    return Path(get_pipeline_path(as_assembled(folder), {}, overlay, folder.parent / "second"))


def with_links_inside(folder):
    (folder / "vae" / "config.json").rename(folder / "vae.json")
    (folder / "vae" / "config.json").symlink_to("../vae.json")
    return folder


def behind_a_link(folder):
    (folder.parent / "short").symlink_to(folder)
    return folder.parent / "short"


@pytest.mark.parametrize("read", [NOVAPipeline.from_pretrained, read_to_train])
@pytest.mark.parametrize(
    "arrange",
    [
        as_it_is,
        as_hub_snapshot,
        as_checkpoint,
        as_assembled,
        as_assembled_twice,
        with_links_inside,
        behind_a_link,
        lambda folder: as_assembled(as_hub_snapshot(folder)),
        lambda folder: as_assembled(as_checkpoint(folder)),
    ],
)
def test_a_sound_folder_loads(world, arrange, read):
    folder = arrange(world / "model")
    if read is read_to_train:
        read_to_train(folder, None)
    else:
        assert NOVAPipeline.from_pretrained(folder).vae.config.scaling_factor == 0.5


def test_an_assembled_folder_loads_in_another_order_of_things(world):
    """Made anew in the same place, it holds the components that are named now."""
    target = world / "target"
    get_pipeline_path(world / "model", {}, {}, target)
    vae = read_json(world / "outside" / "vae" / "config.json")
    write_json(world / "outside" / "vae" / "config.json", {**vae, "scaling_factor": 0.25})
    get_pipeline_path(world / "model", {"vae": str(world / "outside" / "vae")}, {}, target)
    assert NOVAPipeline.from_pretrained(target).vae.config.scaling_factor == 0.25


@pytest.mark.parametrize("name", ["../planted", "WORLD/planted", "a/b"])
def test_replaced_components_have_plain_names(world, name):
    before = everything(world)
    modules = {name.replace("WORLD", str(world)): str(world / "outside" / "vae")}
    with pytest.raises(FileError, match="plain name"):
        get_pipeline_path(world / "model", modules)
    assert everything(world) == before


@pytest.mark.parametrize("name", ["models/nova-tiny", "nobody/no-such-model", "a b/c..d"])
@pytest.mark.parametrize("read", [find_folder, NOVAPipeline.from_pretrained])
def test_a_folder_that_is_not_there_is_no_error_of_the_network(tmp_path, monkeypatch, name, read):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    where = "in the Hub's cache" if name.startswith("models/") else "on the Hub"
    message = f"there is no folder {name}, nor a model of that name {where}"
    with pytest.raises(FileNotFoundError, match=message):
        read(name)


# Adapters


@pytest.fixture
def adapters(world):
    """Sound adapters of the model, by diffusers."""
    pipe = make_pipeline()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["attn.qkv"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "default")
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="default")
    folder = world / "adapters"
    values = {"r": 2, "lora_alpha": 4, "target_modules": ["attn.qkv"]}
    write_adapters(folder, {f"transformer.{name}": value for name, value in layers.items()}, values)
    return folder


def write_adapters(folder, weights, values):
    folder.mkdir(exist_ok=True)
    if not isinstance(values, str):
        values = json.dumps({f"transformer.{name}": value for name, value in values.items()})
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: values}
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / LORA_FILE, metadata)


def change_metadata(folder, values):
    write_adapters(folder, load_file(folder / LORA_FILE), values)


def pickle_adapters(folder):
    (folder / LORA_FILE).unlink()
    torch.save({"transformer.lora": Hostile(folder.parent)}, folder / "adapters.bin")


def link_adapters(folder):
    (folder / LORA_FILE).rename(folder.parent / LORA_FILE)
    (folder / LORA_FILE).symlink_to(folder.parent / LORA_FILE)


def shrink_adapters(folder):
    weights = {name: value[:1] for name, value in load_file(folder / LORA_FILE).items()}
    write_adapters(folder, weights, {"r": 2, "lora_alpha": 4, "target_modules": ["attn.qkv"]})


HOSTILE_ADAPTERS = {
    "a pickle": (pickle_adapters, "adapters.bin"),
    "a link": (link_adapters, LORA_FILE),
    "another shape": (shrink_adapters, LORA_FILE),
    "nothing": (lambda folder: (folder / LORA_FILE).unlink(), LORA_FILE),
    "an empty file": (lambda folder: (folder / LORA_FILE).write_bytes(b""), LORA_FILE),
    "a config that is not JSON": (lambda folder: change_metadata(folder, "{"), LORA_FILE),
    "a config that is a list": (lambda folder: change_metadata(folder, "[1]"), LORA_FILE),
    "a rank in words": (lambda folder: change_metadata(folder, {"r": "two"}), LORA_FILE),
    "an alpha of NaN": (
        lambda folder: change_metadata(folder, {"r": 2, "lora_alpha": float("nan")}),
        LORA_FILE,
    ),
    "an endless alpha for one layer": (
        lambda folder: change_metadata(folder, {"r": 2, "alpha_pattern": {"a": float("inf")}}),
        LORA_FILE,
    ),
    "a pattern of texts": (
        lambda folder: change_metadata(folder, {"r": 2, "rank_pattern": {"a": "b"}}),
        LORA_FILE,
    ),
    "names that take for ever to match": (
        lambda folder: change_metadata(folder, {"r": 2, "target_modules": "(.*.*)*x"}),
        LORA_FILE,
    ),
    "one name in a list that does": (
        lambda folder: change_metadata(folder, {"r": 2, "target_modules": ["(.*.*)*x"]}),
        LORA_FILE,
    ),
    "a rank for such names": (
        lambda folder: change_metadata(folder, {"r": 2, "rank_pattern": {"(.*.*)*x": 2}}),
        LORA_FILE,
    ),
}


@pytest.mark.parametrize("name", HOSTILE_ADAPTERS)
def test_hostile_adapters_are_one_error_and_nothing_else(world, adapters, name):
    change, file = HOSTILE_ADAPTERS[name]
    change(adapters)
    pipe = NOVAPipeline.from_pretrained(world / "model")
    before = everything(world)
    options = {"weight_name": file} if file.endswith(".bin") else {}
    with pytest.raises((ValueError, OSError), match=file):
        pipe.load_lora_weights(adapters, **options)
    assert everything(world) == before
    assert pipe.get_active_adapters() == []


def test_a_config_of_adapters_imports_no_module(world, adapters):
    values = {"r": 2, "lora_alpha": 4, "target_modules": ["attn.qkv"]}
    foreign = {"megatron_config": {"a": 1}, "megatron_core": "foreign", "auto_mapping": {"a": 1}}
    change_metadata(adapters, {**values, **foreign})
    pipe = NOVAPipeline.from_pretrained(world / "model")
    pipe.load_lora_weights(adapters)
    assert pipe.get_active_adapters() and not (world / "ran").exists()
    assert pipe.transformer.peft_config["default_0"].megatron_core != "foreign"


@pytest.mark.parametrize("given", ["folder", "file", "weights"])
def test_sound_adapters_load(world, adapters, given):
    pipe = NOVAPipeline.from_pretrained(world / "model")
    file = adapters / LORA_FILE
    pipe.load_lora_weights({"folder": adapters, "file": file, "weights": load_file(file)}[given])
    assert pipe.get_active_adapters() == ["default_0"]


def test_adapters_that_are_not_there_are_no_error_of_the_network(world):
    pipe = NOVAPipeline.from_pretrained(world / "model")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        pipe.load_lora_weights("nobody/no-such-adapters")


def test_a_foreign_pipeline_is_not_merged(world, adapters):
    write_json(adapters / INDEX, {"_class_name": "foreign.Thing"})
    with pytest.raises(ValueError, match="must hold a NOVAPipeline or a NOVAC2IPipeline"):
        lora.merge(adapters, world / "merged", "float32")
    assert not (world / "ran").exists()


# Pictures


def bomb(path):
    """A picture of 10 gigapixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def post_script(path):
    Image.new("RGB", (8, 8)).save(path, format="EPS")


def cut_picture(path):
    Image.effect_noise((64, 64), 50).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize("make", [bomb, post_script, cut_picture, lambda path: path.touch()])
def test_a_hostile_picture_is_one_error_and_nothing_else(world, make, capsys, monkeypatch):
    (world / "bin").mkdir()
    (world / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {world / 'ran'}\n")
    (world / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{world / 'bin'}:{os.environ['PATH']}")
    picture = world / "picture.png"
    make(picture)
    words = ["a cat", "--model", str(world / "model"), "--image", str(picture)]
    assert generate.main([*words, "--output", str(world / "a.png")]) == 1
    assert f"error: {picture} " in capsys.readouterr().err
    assert not (world / "ran").exists() and not (world / "a.png").exists()
