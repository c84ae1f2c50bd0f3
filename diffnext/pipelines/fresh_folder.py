"""A release folder with a freshly initialised NOVA, ready to be trained from scratch.

The transformer is built from ``pipeline.paths.module_config.transformer`` of a training config; the
frozen components are copied, or small ones are made.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PhiConfig, PreTrainedTokenizerFast

from diffnext.config.load import get_config
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.models.vision_transformer import Block
from diffnext.pipelines.release_folder import (
    BASE_FOLDER_FILE,
    INDEX_FILE,
    find_component,
    write_shim,
)
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.utils.component_files import component_files, reading
from diffnext.utils.json_files import read_json, write_json

ASSETS = Path(__file__).resolve().parents[2] / "assets"  # of a clone
TINY_VAES = {
    "AutoencoderKL": (ASSETS / "vae-tiny", ASSETS / "nova-tiny" / "vae"),
    "AutoencoderKLOpenSora": (ASSETS / "vae-tiny-video", ASSETS / "nova-tiny-video" / "vae"),
}
PAD_TOKEN = "<|pad|>"

# Words to learn word pieces from; other text is cut into smaller pieces or bytes.
TOKENIZER_CORPUS = """
a an the of on in at by with and or to from near above below under over left right behind before
one two three four small large big tiny bright dark quiet calm misty sunny night day morning
red green blue yellow orange purple pink cyan brown black white grey gray gold silver cream navy
circle square triangle star ring cross ellipse shape background
circles squares triangles stars rings crosses medium
moving turning growing shrinking sliding rising falling rotating getting around
up down upwards downwards smaller larger
mountain mountains lake river sea sky sun moon stars clouds trees forest hill field snow fog
city tower towers skyline window windows light lights street bridge boat balloon house
picture photo painting drawing image video clip scene landscape reflection water colourful colour
short long text caption describes shows there is are stands A An There This Two Three Four
"""


def write_folder(args: argparse.Namespace) -> None:
    """Write a release folder: everything beside its place, moved there at the end.

    Args:
        args: The command line of ``diffnext init``.

    Raises:
        ValueError: If the parts do not fit together, or the output exists.
    """
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} exists: name a new folder")
    if not math.isfinite(args.branch_gain):
        raise ValueError(f"--branch-gain must be a finite number, got {args.branch_gain}")
    config: Any = OmegaConf.to_container(get_config([f"config={args.config}"]), resolve=True)
    with reading(args.config, "a training config"):
        pipeline = config["pipeline"]["target"].rpartition(".")[2]
        model_config = dict(config["pipeline"]["paths"]["module_config"]["transformer"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".init-") as temporary:
        folder = Path(temporary) / args.output.name
        torch.manual_seed(args.seed)
        index = {
            "_class_name": "NOVAC2IPipeline" if "C2I" in pipeline else "NOVAPipeline",
            "scheduler": write_scheduler(folder / "scheduler", args),
            "vae": write_vae(folder / "vae", args, pipeline, model_config),
        }
        if model_config.get("text_token_dim"):
            index["tokenizer"] = write_tokenizer(folder / "tokenizer", args)
            index["text_encoder"] = write_text_encoder(folder / "text_encoder", args, model_config)
        index["transformer"] = write_transformer(folder / "transformer", model_config, args)
        write_json(folder / INDEX_FILE, index)
        if args.output.exists():
            args.output.rmdir()
        folder.rename(args.output)
    print(f"Wrote {args.output}")


def write_scheduler(folder: Path, args: argparse.Namespace) -> list[str]:
    """Write a sampling scheduler; returns its index entry."""
    if args.scheduler == "flow":
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=args.shift)
    else:
        scheduler = DDPMScheduler(clip_sample=False)
    scheduler.save_pretrained(folder)
    return ["diffusers", type(scheduler).__name__]


def write_vae(
    folder: Path, args: argparse.Namespace, pipeline: str, model_config: dict[str, Any]
) -> list[str]:
    """Copy the autoencoder that the training pipeline needs; returns its index entry."""
    class_name = "AutoencoderKLOpenSora" if "T2V" in pipeline else "AutoencoderKL"
    channels, stride = model_config.get("image_dim"), model_config.get("image_stride")
    source = args.vae or (find_tiny_vae(class_name, channels) if args.tiny else None)
    if source is None:
        raise ValueError(f"{pipeline} needs --vae, the folder of an {class_name}, or --tiny")
    vae_config = read_json(source / "config.json")
    if vae_config.get("_class_name", class_name) != class_name:
        raise ValueError(
            f"{pipeline} needs an {class_name}, {source} is an {vae_config['_class_name']}"
        )
    wanted = {"latent_channels": channels, "stride": stride}
    with reading(source, class_name):
        halvings = len(vae_config["block_out_channels"]) - 1
        found = {"latent_channels": vae_config["latent_channels"], "stride": 2**halvings}
    if wanted != found:
        raise ValueError(f"the config needs an autoencoder with {wanted}, {source} has {found}")
    copy_component(source, folder)
    return [write_shim(folder, "vae", class_name), class_name]


def find_tiny_vae(class_name: str, latent_channels: int | None) -> Path:
    """The shipped autoencoder with that many latent channels, or else the first of its class."""
    folders = TINY_VAES[class_name]
    if not folders[0].is_dir():
        raise ValueError(
            f"--tiny needs {folders[0]}, which is only there in a clone: install it with `pip "
            "install -e .`, or give --vae, --text-encoder and --tokenizer"
        )
    channels = [read_json(folder / "config.json")["latent_channels"] for folder in folders]
    return folders[channels.index(latent_channels) if latent_channels in channels else 0]


def copy_component(source: Path, folder: Path) -> None:
    """Copy a component without its Python files."""
    component_files(source)  # checks that they are its own
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", BASE_FOLDER_FILE))


def write_tokenizer(folder: Path, args: argparse.Namespace) -> list[str]:
    """Copy or learn the tokenizer; returns its index entry."""
    if args.tokenizer:
        copy_component(args.tokenizer, folder)
        name = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
        return ["transformers", name or "PreTrainedTokenizerFast"]
    if not args.tiny:
        raise ValueError("--tokenizer is needed, or --tiny for a small one")
    tiny_tokenizer().save_pretrained(folder)
    return ["transformers", "PreTrainedTokenizerFast"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a pad token; the empty prompt has no tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_CORPUS.split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD_TOKEN)


def write_text_encoder(
    folder: Path, args: argparse.Namespace, model_config: dict[str, Any]
) -> list[str]:
    """Copy or initialise the text encoder; returns its index entry."""
    width = model_config["text_token_dim"]
    if args.text_encoder:
        found = read_json(args.text_encoder / "config.json").get("hidden_size")
        if found != width:
            raise ValueError(
                f"text_token_dim is {width}, but the states of {args.text_encoder} are {found} wide"
            )
        copy_component(args.text_encoder, folder)
    elif args.tiny:
        tiny_text_encoder(width).save_pretrained(folder)
    else:
        raise ValueError("--text-encoder is needed, or --tiny for a small one")
    return [write_shim(folder, "text_encoder", "PhiEncoderModel"), "PhiEncoderModel"]


def tiny_text_encoder(width: int) -> PhiEncoderModel:
    """A random Phi; random features tell prompts apart, which is enough to learn from."""
    vocab_size = len(tiny_tokenizer())
    return PhiEncoderModel(
        PhiConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            # Wide enough that a word moves the states as much as in a trained encoder.
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def write_transformer(
    folder: Path, model_config: dict[str, Any], args: argparse.Namespace
) -> list[str]:
    """Initialise and save NOVA; returns its index entry."""
    with reading(args.config, "a NOVA"):
        model = NOVATransformer3DModel(**model_config)
    for module in model.modules():
        if isinstance(module, Block):  # residual branches that end with a norm: arXiv:2111.09883
            nn.init.constant_(module.norm1.weight, args.branch_gain)
            nn.init.constant_(module.norm2.weight, args.branch_gain)
    if args.weights:
        take_weights(model, args.weights)
    model.save_pretrained(folder)
    return [write_shim(folder, "transformer", type(model).__name__), type(model).__name__]


def take_weights(model: NOVATransformer3DModel, source: Path) -> None:
    """Copy the weights of a trained model, and print the parts that it does not have.

    Args:
        model: Changed in place.
        source: A release folder or checkpoint.

    Raises:
        ValueError: If there are no weights, one has no place in the model, or another shape.
    """
    folder = find_component(source, "transformer")
    if folder is None:
        raise ValueError(f"--weights {source} has no folder of a transformer")
    trained = NOVATransformer3DModel.from_pretrained(folder).state_dict()
    fresh = model.state_dict()
    for name, weight in trained.items():
        shape = tuple(fresh[name].shape) if name in fresh else None
        if shape != tuple(weight.shape):
            raise ValueError(
                f"--weights {source}: {name} is {tuple(weight.shape)}, the config has {shape}"
            )
    model.load_state_dict(trained, strict=False)
    parts = sorted({name.split(".")[0] for name in fresh.keys() - trained.keys()})
    print(f"Weights of {source}; initialised: {', '.join(parts) or 'nothing'}")
