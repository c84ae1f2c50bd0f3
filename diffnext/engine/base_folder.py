"""The base folder of a run and the model in it, found and checked without loading anything.

Only configurations and headers of weights are read; no code of a folder runs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from torch import nn

from diffnext.config.schema import PathsConfig, TrainConfig, TransformerConfig
from diffnext.config.targets import ConfigError, import_target
from diffnext.engine.memory import make_meta_model
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.release_folder import (
    BASE_FOLDER_FILE,
    INDEX_FILE,
    LORA_FILE,
    find_component,
    read_base_reference,
    read_index,
    resolve_index,
)
from diffnext.utils.component_files import component_files
from diffnext.utils.folders import find_folder
from diffnext.utils.json_files import FileError, read_json
from diffnext.utils.messages import explain, one_line
from diffnext.utils.weights_files import weights_files

BASE = "pipeline.paths.pretrained_path"
COMPONENTS = "pipeline.paths.module_dict"
OVERLAY = "pipeline.paths.module_config.transformer"

NEEDED = ("transformer", "vae", "scheduler")  # no training pipeline does without
WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
SIZES = ("image_dim", "image_size", "image_stride", "image_base_size", "video_base_size", "arch")
TEXT_SIZES = ("text_token_dim", "text_token_len")
# The weights of the base folder fit no other values of these.
FIXED_BY_WEIGHTS = ("arch", "image_dim", "text_token_dim")


@dataclass(frozen=True)
class BaseFolder:
    """A base folder with the configuration's own paths and overlays.

    Attributes:
        folder: Local folder.
        paths: See :class:`RunInputs`.
        index: Content of ``model_index.json``, empty if it cannot be read.
        components: Where each component comes from, or should.
        faulty: Those that cannot be loaded.
    """

    folder: Path
    paths: dict[str, Any]
    index: dict[str, Any]
    components: dict[str, Path]
    faulty: frozenset[str]

    def find(self, component: str) -> Path | None:
        """The folder of a component that can be loaded; else None."""
        return None if component in self.faulty else self.components.get(component)

    def read_saved(self, component: str) -> dict[str, Any]:
        """The config file of a component; empty if there is none, or it cannot be loaded."""
        folder = self.find(component)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        if folder is None or not (folder / name).is_file():
            return {}
        return read_json(folder / name)

    def read_config(self, component: str) -> dict[str, Any]:
        """The config file of a component with its overlay."""
        overlays = self.paths["module_config"] or {}
        return {**self.read_saved(component), **overlays.get(component, {})}


def open_base(config: TrainConfig, download: bool, problems: list[str]) -> BaseFolder | None:
    """Find the base folder and its components.

    Args:
        config: Training configuration.
        download: Whether to get it from the Hub if it is not on this machine.
        problems: Gets a line for each thing that is wrong.

    Returns:
        None if it is not on this machine; that is a problem unless the run would download it.
    """
    if not hasattr(import_target(config.pipeline.target), "configure_model"):
        problems.append(f"pipeline.target={config.pipeline.target} is not a training pipeline")
    name = config.pipeline.paths.pretrained_path
    try:
        folder = find_folder(name, local_files_only=not download)
    except (OSError, ValueError) as error:
        is_on_hub = error.__cause__ is not None and not Path(name).parent.is_dir()
        if download or not is_on_hub:
            problems.append(f"{BASE}={name}: {error}")
        return None
    key = f"{BASE}={name}"
    paths = _local_paths(config.pipeline.paths, folder)
    given = dict(paths["module_dict"] or {})
    index_file = Path(given.pop("model_index", None) or folder / INDEX_FILE)
    index: dict[str, Any] = {}
    lines: dict[str, str] = {}  # by fault, which may be found more than once
    with _noting(lines, key):
        read_base_reference(folder)
        index = read_index(index_file)
    listed = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]
    components = {}
    faulty = set()
    for component in dict.fromkeys([*NEEDED, *given, *listed]):
        faulty.add(component)
        with _noting(lines, f"{COMPONENTS}.{component}" if component in given else key):
            if index and component in NEEDED and component not in listed:
                raise FileError(f"{index_file} lists no {component}, but training needs it")
            place = _find_place(folder, component, given)
            if place is not None:
                components[component] = place
                component_files(place)
            faulty.remove(component)
            if place is not None and component in WITH_WEIGHTS and not weights_files(place):
                raise FileError(f"there are no weights in {place}")
    with _noting(lines, key):
        if (folder / BASE_FOLDER_FILE).is_file() and (folder / LORA_FILE).is_file():
            raise FileError("it holds adapters only: merge them first (diffnext lora merge)")
        if index_file == folder / INDEX_FILE:
            index = resolve_index(folder, config.trust_remote_code)
    problems += lines.values()
    return BaseFolder(folder, paths, index, components, frozenset(faulty))


def _find_place(folder: Path, component: str, given: Mapping[str, str | None]) -> Path | None:
    """Where a component is, or should be; None if it is left out.

    Raises:
        FileError: If it may not be left out.
    """
    path = given.get(component, str(folder / component))
    if not path and component in NEEDED:
        raise FileError(f"{component} is left out, but training needs it")
    if not path:
        return None
    inside = find_component(folder, Path(path).name) if Path(path).parent == folder else None
    return inside or Path(path)


@contextmanager
def _noting(lines: dict[str, str], key: str) -> Iterator[None]:
    """Continue after a fault of a folder, with a line about it."""
    try:
        yield
    except (OSError, FileError) as error:
        lines.setdefault(str(error), f"{key}: {error}")


def _local_paths(paths: PathsConfig, folder: Path) -> dict[str, Any]:
    """Arguments of ``get_pipeline_path``; what lies below the configured base is in ``folder``."""

    def move(path: str) -> str:
        if Path(path).is_relative_to(paths.pretrained_path):
            return str(folder / Path(path).relative_to(paths.pretrained_path))
        return str(Path(path).expanduser().absolute())

    arguments = paths.arguments()
    given = arguments["module_dict"]
    if given is not None:
        given = {name: move(path) if path else path for name, path in given.items()}
    return {**arguments, "pretrained_path": str(folder), "module_dict": given}


@dataclass(frozen=True, kw_only=True)
class TransformerFacts:
    """The model to train.

    Attributes:
        arguments: Arguments of the transformer.
        sizes: The arguments that the data must fit, without wrong ones.
        model: On the meta device; None if it cannot be made.
    """

    arguments: dict[str, Any]
    sizes: dict[str, Any]
    model: NOVATransformer3DModel | None = None

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """Rows and columns of a latent frame."""
        if "image_size" not in self.sizes or "image_stride" not in self.sizes:
            return None
        size, stride = self.sizes["image_size"], self.sizes["image_stride"]
        height, width = [size] * 2 if isinstance(size, int) else size
        return height // stride, width // stride

    @property
    def largest_patch(self) -> int:
        """Latents along the side of a token of the video encoder."""
        return 1 if self.model is None else self.model.video_encoder.patch_embed.patch_size

    def takes(self, latent_size: tuple[int, ...]) -> bool:
        """Whether the model can be trained on latents of a size.

        Rotary positions fit every size; a table of positions fits one.
        """
        if latent_size == self.latent_size:
            return True
        is_whole = all(side % self.largest_patch == 0 for side in latent_size)
        return bool(self.sizes.get("rotary_pos_embed")) and is_whole

    def fits(self, moments: tuple[int, ...]) -> bool:
        """Whether the model can be trained on moments of a shape."""
        has_channels = moments[:1] == (2 * self.sizes.get("image_dim", 0),)
        return len(moments) in (3, 4) and has_channels and self.takes(moments[-2:])


def inspect_transformer(
    config: TrainConfig, base: BaseFolder | None, problems: list[str]
) -> TransformerFacts:
    """Find the arguments of the transformer, and compare them with the weights.

    Args:
        config: Training configuration.
        base: Base folder, if it is on this machine.
        problems: Gets a line for each thing that is wrong.
    """
    overlay = config.pipeline.paths.overlay("transformer")
    folder = None if base is None else base.find("transformer")
    saved = {} if base is None else base.read_saved("transformer")
    arguments = {n: value for n, value in (saved | overlay).items() if not n.startswith("_")}
    if folder is None:  # which may hold the missing ones
        return TransformerFacts(arguments=arguments, sizes=overlay)
    file = folder / "config.json"
    wrong = _wrong_sizes(file, saved, overlay)
    changed = {
        name: saved[name]
        for name in FIXED_BY_WEIGHTS
        if name not in wrong and name in saved and arguments[name] != saved[name]
    }
    problems += wrong.values()
    problems += [
        f"{OVERLAY}.{name} is {arguments[name]}, but the weights in {folder} were made with {value}"
        for name, value in changed.items()
    ]
    # The data must fit the weights; they are not compared with a wrong size.
    sizes = {"text_token_dim": None, **arguments, **changed}
    sizes = {name: value for name, value in sizes.items() if name not in wrong}
    model = None
    if not wrong and not changed:
        try:
            model = make_meta_model(arguments)
            problems += _misfits(folder, model)
            problems += _wrong_adapters(config, model)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            problems.append(f"{OVERLAY}: no model can be made of {file} with it: {error}")
    return TransformerFacts(arguments=arguments, sizes=sizes, model=model)


def _wrong_sizes(
    file: Path, saved: Mapping[str, Any], overlay: Mapping[str, Any]
) -> dict[str, str]:
    """The sizes of a config.json that are wrong or missing; the overlay's were checked before."""
    given = {n: saved[n] for n in (*SIZES, *TEXT_SIZES) if n in saved and n not in overlay}
    lines = {}
    try:
        TypeAdapter(TransformerConfig).validate_json(json.dumps(given))
    except ValidationError as error:
        for name, parts in itertools.groupby(error.errors(), key=lambda part: part["loc"][0]):
            rule = explain(parts)
            lines[str(name)] = f"{file}: {name} {rule}, got {one_line(given[str(name)])}"
    values = {**given, **overlay}
    for name in (*SIZES, *(["text_token_len"] if values.get("text_token_dim") else [])):
        if values.get(name) is None:
            lines[name] = f"{OVERLAY}.{name} must be given, as {file} does not have it"
    return lines


def read_shapes(folder: Path, name: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of weights, from the headers of safetensors files.

    Args:
        folder: The component's folder.
        name: Beginning of the files' names.
    """
    shapes = {}
    for file in sorted(folder.glob(f"{name}*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                shapes[key] = tuple(weights.get_slice(key).get_shape())
    return shapes


def _misfits(folder: Path, model: nn.Module) -> Iterator[str]:
    """Compare the names and shapes of weights with those of the model."""
    found = read_shapes(folder, "diffusion_pytorch_model")  # as diffusers names the files
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if found and differing:
        first = differing[0]
        yield (
            f"{OVERLAY}: {len(differing)} weights in {folder} do not fit the model: {first} is "
            f"{found.get(first, 'missing')}, not {wanted.get(first, 'known')}"
        )


def _wrong_adapters(config: TrainConfig, model: NOVATransformer3DModel) -> Iterator[str]:
    """Add the adapters to a model without data."""
    if config.model.lora is None:
        return
    if find_spec("peft") is None:
        yield "model.lora needs the package peft: pip install peft"
        return
    from diffnext.engine.lora import add_lora

    try:
        with torch.device("meta"):
            add_lora(model, config.model.lora)
    except ConfigError as error:
        yield from error.problems
