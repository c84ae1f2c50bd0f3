"""The datasets of a run: what a few records tell about them, and whether they fit the model.

Shapes: C latent channels, T latent frames, h w latent size, L text tokens, D width.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffnext.config.schema import TrainConfig
from diffnext.config.targets import import_target
from diffnext.data.dataset_folders import DatasetFolder, Folders, batch_weights, list_folders
from diffnext.data.flex_pipelines import all_outputs
from diffnext.data.flex_transforms import check_features
from diffnext.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from diffnext.data.records import RecordDataset, RecordError, read_metadata
from diffnext.engine.base_folder import COMPONENTS, OVERLAY, BaseFolder, TransformerFacts
from diffnext.models.embeddings import LabelEmbed
from diffnext.utils.weights_files import hash_weights, weights_files

# A pipeline that freezes it does not train what reads earlier frames.
READS_EARLIER_FRAMES = "video_encoder.patch_embed"
SAMPLES = 8  # records looked at
NUM_CLASSES = inspect.signature(LabelEmbed).parameters["num_classes"].default


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A dataset, and what a few of its records tell about it.

    Attributes:
        folder: Of the dataset.
        num_examples: Records; 0 if another loader's dataset does not tell.
        fingerprint: Tells one dataset from another, wherever it lies; empty if nothing is known.
        shape: Of the posterior moments, (2C, h, w) or (2C, T, h, w); empty, like what follows, if
            the records are another loader's.
        dtype: Of the moments.
        prompt: What the model is conditioned on, in words.
        record_bytes: Mean size of a record's arrays and captions.
        num_held_out: Examples at the end that are kept for validation.
        weight: In which proportion batches come from the datasets of a run.
        records: The dataset, opened once. Other processes of a run open their own, which may be a
            copy on another machine.
    """

    folder: Path
    num_examples: int = 0
    fingerprint: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    prompt: str = ""
    record_bytes: int = 0
    num_held_out: int = 0
    weight: int = 1
    records: RecordDataset | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "records": None}

    @property
    def has_single_frames(self) -> bool:
        """Whether its examples are pictures, or clips of one latent frame."""
        return len(self.shape) == 3 or self.shape[1:2] == (1,)

    @property
    def num_train(self) -> int:
        """Examples to train on."""
        return self.num_examples - self.num_held_out

    def open(self, start: int = 0, stop: int | None = None) -> RecordDataset:
        """The dataset, or the examples ``start`` to ``stop`` (exclusive) of it, to be closed."""
        dataset = RecordDataset(self.folder) if self.records is None else copy.copy(self.records)
        stop = self.num_examples if stop is None else stop
        return dataset.subset(start, stop)


class Sample(NamedTuple):
    """What a record gives to the training.

    Attributes:
        name: Of the record, for messages.
        shape: Of the moments: (2C, h, w) or (2C, T, h, w).
        dtype: Of the moments.
        prompts: All that may become its prompt: texts, text states (L, D), or a class.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    prompts: list[Any]


class Records(NamedTuple):
    """A dataset and some of its records; none if they cannot be looked at.

    Attributes:
        key: That names the dataset.
        facts: About it.
        samples: Some of its records.
        is_alone: Whether it is the only one, so that it must have the size the model is built for.
    """

    key: str
    facts: DatasetFacts
    samples: Sequence[Sample] = ()
    is_alone: bool = True


def open_datasets(
    key: str, dataset: Folders, share: float, is_ours: bool, problems: list[str]
) -> list[Records]:
    """Open the datasets that a key names.

    Args:
        key: The key.
        dataset: A folder, or several with or without weights.
        share: Of the examples of each that are held out.
        is_ours: Whether the package's loader reads them; the records of others are not looked at.
        problems: Gets a line for what is wrong.

    Returns:
        Those that could be found.
    """
    try:
        folders = list_folders(dataset)
    except (ValueError, OSError) as error:
        problems.append(f"{key}: {error}")
        return []
    found = []
    for folder in folders:
        is_alone = len(folders) == 1 and not folder.is_size
        name = key if is_alone else f"{key}, {folder.path}"
        records = _open_records(name, folder.path, is_ours, problems)
        held_out = round(share * records.facts.num_examples)
        facts = replace(records.facts, num_held_out=held_out)
        found.append(records._replace(facts=facts, is_alone=is_alone))
    return _weighted(folders, found)


def _weighted(folders: Sequence[DatasetFolder], found: list[Records]) -> list[Records]:
    counts = [records.facts.num_train for records in found]
    if 0 in counts:  # they cannot be read
        return found
    return [
        records._replace(facts=replace(records.facts, weight=weight))
        for records, weight in zip(found, batch_weights(folders, counts), strict=True)
    ]


def joint_fingerprint(datasets: Sequence[DatasetFacts]) -> str:
    """Tells the datasets of a run from those of another."""
    if len(datasets) == 1:
        return datasets[0].fingerprint
    return _digest([[facts.fingerprint, facts.weight] for facts in datasets])


def _open_records(key: str, folder: str, is_ours: bool, problems: list[str]) -> Records:
    """Read some records, evenly spaced, as the loader does."""
    facts = DatasetFacts(folder=Path(folder))
    try:
        if not is_ours:
            metadata = read_metadata(folder)
            fingerprint = _digest([metadata.entries, metadata.features])
            facts = replace(facts, num_examples=metadata.entries, fingerprint=fingerprint)
            return Records(key, facts)
        with RecordDataset(folder) as dataset:
            facts = replace(facts, num_examples=len(dataset), records=dataset)
            content: list[Any] = [len(dataset), dataset.features]
            check_features(dataset.features, folder)
            if "codes" in dataset.features and "moments" not in dataset.features:
                raise RecordError(f"{folder} holds VQ codes, training needs VAE moments")
            count = min(SAMPLES, len(dataset))
            indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
            samples = [_read_sample(dataset, index) for index in indices]
            content += [shard.data_size for shard in dataset.shards]
            content += [hashlib.sha256(dataset.record(index)).hexdigest() for index in indices]
    except (RecordError, OSError) as error:
        if is_ours or not isinstance(error, FileNotFoundError):
            problems.append(f"{key}: {error}")
        return Records(key, facts)
    first = samples[0]
    prompts = [prompt for sample in samples for prompt in sample.prompts]
    prompt_bytes = sum(_prompt_bytes(prompt) for prompt in prompts) / len(prompts)
    facts = replace(
        facts,
        fingerprint=_digest(content),
        shape=first.shape,
        dtype=str(first.dtype),
        prompt=_describe_prompt(first.prompts[0]),
        record_bytes=math.prod(first.shape) * first.dtype.itemsize + round(prompt_bytes),
    )
    return Records(key, facts, samples)


def _read_sample(dataset: RecordDataset, index: int) -> Sample:
    name = dataset.describe(index)
    outputs = all_outputs(dataset[index], name)
    prompts = [prompt for output in outputs for prompt in output["prompt"]]
    moments = outputs[0]["latents"][0]
    return Sample(name, moments.shape, moments.dtype, prompts)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _prompt_bytes(prompt: Any) -> int:
    return prompt.nbytes if isinstance(prompt, np.ndarray) else len(str(prompt).encode())


def _describe_prompt(prompt: Any) -> str:
    if isinstance(prompt, np.ndarray):
        return f"cached text states, {prompt.shape} {prompt.dtype}"
    return "captions as text" if isinstance(prompt, str) else "class labels"


def wrong_records(
    config: TrainConfig, records: Records, model: TransformerFacts, base: BaseFolder | None
) -> Iterator[str]:
    """Check records against each other, the pipeline, the model and the autoencoder.

    Args:
        config: Training configuration.
        records: Of one dataset.
        model: To train.
        base: Base folder, if it is on this machine.

    Yields:
        What does not fit, a line each.
    """
    if not records.samples:
        return
    first = records.samples[0]
    others = [sample for sample in records.samples if sample.shape != first.shape]
    if others:
        yield (
            f"{first.name} and {others[0].name} have moments of the shapes {first.shape} and "
            f"{others[0].shape}: they cannot be in one batch"
        )
    if len(first.shape) not in (3, 4):
        yield (
            f"{first.name} has moments of shape {first.shape}, they must be (2C, h, w) or "
            "(2C, T, h, w)"
        )
        return
    yield from _wrong_frames(config, first)
    channels = list(_wrong_channels(first, model, base))
    size = list(_wrong_size(first, model, records.is_alone))
    yield from (*channels, *size)
    lines = (wrong_prompt(s.name, p, model, base) for s in records.samples for p in s.prompts)
    yield from itertools.islice(filter(None, lines), 1)
    try:
        manifest = read_manifest(records.facts.folder)
    except (RecordError, OSError) as error:
        yield str(error)
        return
    if manifest is None:
        return
    yield from _wrong_manifest(records.facts, manifest)
    if not size and records.is_alone:
        yield from _wrong_pixels(manifest, model)
    if not channels:
        yield from _other_weights("vae", manifest.vae_hash, base)
    if manifest.text_encoder is not None:
        yield from _other_weights("text_encoder", manifest.text_encoder.hash, base)


def _wrong_frames(config: TrainConfig, sample: Sample) -> Iterator[str]:
    """Check that an image pipeline gets images and a video pipeline videos."""
    frozen = getattr(import_target(config.pipeline.target), "frozen_modules", None)
    if frozen is None:
        return
    wanted = "images" if READS_EARLIER_FRAMES in frozen else "videos"
    found = "an image" if len(sample.shape) == 3 else "a video"
    is_either = len(sample.shape) == 4 and sample.shape[1] == 1
    if not is_either and wanted[:5] not in found:
        yield (
            f"{sample.name} is {found}, its moments have the shape {sample.shape}, but "
            f"pipeline.target={config.pipeline.target} trains on {wanted}"
        )


def _wrong_channels(
    sample: Sample, model: TransformerFacts, base: BaseFolder | None
) -> Iterator[str]:
    """Compare the channels of the latents with the model and the autoencoder."""
    found = sample.shape[0] // 2
    wanted = model.sizes.get("image_dim", found)
    vae = {} if base is None else base.read_config("vae")
    made = vae.get("latent_channels", found)
    if found != wanted:
        yield (
            f"{sample.name} has {found} latent channels, but {OVERLAY}.image_dim is {wanted}: was "
            "it made with another VAE?"
        )
    elif found != made:
        yield f"{sample.name} has {found} latent channels, but those of the VAE are {made}"


def _wrong_size(sample: Sample, model: TransformerFacts, is_alone: bool) -> Iterator[str]:
    """Compare the size of the latents with the model."""
    wanted, found = model.latent_size, sample.shape[-2:]
    if wanted is None or found == wanted:
        return
    if is_alone:
        yield (
            f"{sample.name} has latents of {_times(found)}, but {OVERLAY}.image_size "
            f"{model.sizes['image_size']} at image_stride {model.sizes['image_stride']} means "
            f"{_times(wanted)}"
        )
    elif not model.sizes.get("rotary_pos_embed"):
        yield (
            f"{sample.name} has latents of {_times(found)}, but the model has a table of positions "
            f"for {_times(wanted)} alone: only one with rotary_pos_embed learns from several sizes"
        )
    elif not model.takes(found):
        yield (
            f"{sample.name} has latents of {_times(found)}: the sides must be multiples of "
            f"{model.largest_patch}"
        )


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def wrong_prompt(
    owner: str, prompt: Any, model: TransformerFacts, base: BaseFolder | None
) -> str | None:
    """Compare a text, cached text states (L, D) or a class with what the model reads.

    Args:
        owner: Whose prompt it is.
        prompt: The prompt.
        model: To train.
        base: Base folder, if it is on this machine.

    Returns:
        What does not fit, if anything.
    """
    if "text_token_dim" not in model.sizes:
        return None
    width, length = model.sizes["text_token_dim"], model.sizes.get("text_token_len")
    if isinstance(prompt, str):
        found, fits = "a text", bool(width)
    elif isinstance(prompt, int):
        found, fits = f"the class {prompt}", not width and 0 <= prompt < NUM_CLASSES
    else:
        found = f"cached text states of shape (L, D) = {prompt.shape}"
        fits = (
            prompt.ndim == 2
            and prompt.shape[1] == width
            and prompt.shape[0] <= (length or math.inf)
        )
    if not fits:
        reads = (
            f"texts, or states up to ({length}, {width})"
            if width
            else f"classes 0 to {NUM_CLASSES - 1}"
        )
        dim = "null" if width is None else width
        return (
            f"{owner} has {found}, but with {OVERLAY}.text_token_dim={dim} the model reads {reads}"
        )
    if isinstance(prompt, str) and base is not None and base.index:
        for name in ("text_encoder", "tokenizer"):
            if name not in base.components and name not in base.faulty:
                return f"{owner} has a text, but {COMPONENTS}.{name} is empty"
    return None


def _wrong_manifest(facts: DatasetFacts, manifest: Manifest) -> Iterator[str]:
    """Check that a manifest is that of the records beside it."""
    pairs = {
        "dtype": (manifest.dtype, facts.dtype),
        "shape": (manifest.shape, facts.shape),
        "counts.examples": (manifest.counts.examples, facts.num_examples),
    }
    wrong = [f"{n} {a}, not {b}" for n, (a, b) in pairs.items() if a not in (None, b)]
    if wrong:
        yield (
            f"{facts.folder / MANIFEST_NAME} belongs to other records: it says {'; '.join(wrong)}"
        )


def _wrong_pixels(manifest: Manifest, model: TransformerFacts) -> Iterator[str]:
    """Compare the pixels that a dataset was made of with the model."""
    wanted = model.sizes.get("image_size")
    wanted = [wanted] * 2 if isinstance(wanted, int) else wanted
    if wanted is not None and manifest.size not in (None, tuple(wanted)):
        size = _times(manifest.size or ())
        yield f"made for {size} pixels, says {MANIFEST_NAME}, but {OVERLAY}.image_size is {wanted}"


def _other_weights(component: str, expected: str | None, base: BaseFolder | None) -> Iterator[str]:
    """Check that a component is the one that a dataset was made with, if it tells."""
    folder = None if base is None else base.find(component)
    if expected is None or folder is None or not weights_files(folder):
        return
    found = hash_weights(folder)
    if found != expected:
        yield (
            f"made with another {component} than the one in {folder}: {MANIFEST_NAME} names the "
            f"hash {expected}, not {found}"
        )
