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
from diffnext.data.dataset_folders import Folders, batch_weights, list_folders
from diffnext.data.flex_pipelines import all_outputs
from diffnext.data.flex_transforms import check_features
from diffnext.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from diffnext.data.records import RecordDataset, RecordError, read_metadata
from diffnext.engine.base_folder import COMPONENTS, OVERLAY, BaseFolder, TransformerFacts
from diffnext.models.embeddings import LabelEmbed
from diffnext.utils.weights_files import hash_weights, weights_files

# A pipeline that freezes it does not train the parts that read earlier frames.
READS_EARLIER_FRAMES = "video_encoder.patch_embed"
SAMPLES = 8  # records looked at
NUM_CLASSES = inspect.signature(LabelEmbed).parameters["num_classes"].default


class Sample(NamedTuple):
    """What a record gives to the training.

    Attributes:
        name: The record, for messages.
        shape: Shape of the moments: (2C, h, w) or (2C, T, h, w).
        dtype: Type of the moments.
        prompts: All that may become its prompt: texts, text states (L, D), or a class.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    prompts: list[Any]


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A dataset, and what a few of its records tell about it.

    Attributes:
        key: The key of the configuration that names it, for messages.
        folder: Its folder.
        is_alone: Whether it is the only one, so that it must have the size the model is built for.
        num_examples: Records; 0 if another loader's dataset does not tell.
        fingerprint: Identifies its content, wherever it lies; empty if nothing is known.
        shape: Shape of the posterior moments, (2C, h, w) or (2C, T, h, w); empty, like the next
            three, if the records are another loader's.
        dtype: Type of the moments.
        prompt: What the model is conditioned on, in words.
        record_bytes: Mean size of a record's arrays and captions.
        num_held_out: Examples at the end that are kept for validation.
        weight: In which proportion batches come from the datasets of a run.
        samples: Some of its records; empty on other processes.
        records: The dataset, opened once. Other processes of a run open their own, which may be a
            copy on another machine.
    """

    key: str
    folder: Path
    is_alone: bool = True
    num_examples: int = 0
    fingerprint: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    prompt: str = ""
    record_bytes: int = 0
    num_held_out: int = 0
    weight: int = 1
    samples: Sequence[Sample] = field(default=(), compare=False, repr=False)
    records: RecordDataset | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "records": None, "samples": ()}

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


def open_datasets(
    key: str, dataset: Folders, share: float, is_ours: bool, problems: list[str]
) -> tuple[DatasetFacts, ...]:
    """Open the datasets that a key names.

    Args:
        key: The key.
        dataset: A folder, or several with or without weights.
        share: Share of each dataset that is held out.
        is_ours: Whether the package's loader reads them; the records of others are not looked at.
        problems: Gets a line for each dataset that cannot be read.
    """
    try:
        folders = list_folders(dataset)
    except (ValueError, OSError) as error:
        problems.append(f"{key}: {error}")
        return ()
    found = []
    for folder in folders:
        is_alone = len(folders) == 1 and not folder.is_size
        name = key if is_alone else f"{key}, {folder.path}"
        facts = DatasetFacts(key=name, folder=Path(folder.path), is_alone=is_alone)
        try:
            facts = _read_records(facts) if is_ours else _read_foreign(facts)
        except (RecordError, OSError) as error:
            if is_ours or not isinstance(error, FileNotFoundError):
                problems.append(f"{name}: {error}")
        found.append(replace(facts, num_held_out=round(share * facts.num_examples)))
    counts = [facts.num_train for facts in found]
    # Without examples, which cannot be read, there is nothing to weigh.
    weights = batch_weights(folders, counts) if all(counts) else [1] * len(found)
    return tuple(replace(f, weight=weight) for f, weight in zip(found, weights, strict=True))


def joint_fingerprint(datasets: Sequence[DatasetFacts]) -> str:
    """Identifies the datasets of a run."""
    if len(datasets) == 1:
        return datasets[0].fingerprint
    return _digest([[facts.fingerprint, facts.weight] for facts in datasets])


def _read_foreign(facts: DatasetFacts) -> DatasetFacts:
    """Look at METADATA only."""
    metadata = read_metadata(facts.folder)
    fingerprint = _digest([metadata.entries, metadata.features])
    return replace(facts, num_examples=metadata.entries, fingerprint=fingerprint)


def _read_records(facts: DatasetFacts) -> DatasetFacts:
    """Read some records, evenly spaced, as the loader does."""
    with RecordDataset(facts.folder) as dataset:
        check_features(dataset.features, str(facts.folder))
        if "codes" in dataset.features and "moments" not in dataset.features:
            raise RecordError(f"{facts.folder} holds VQ codes, training needs VAE moments")
        count = min(SAMPLES, len(dataset))
        indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
        samples = [_read_sample(dataset, index) for index in indices]
        content: list[Any] = [len(dataset), dataset.features]
        content += [shard.data_size for shard in dataset.shards]
        content += [hashlib.sha256(dataset.record(index)).hexdigest() for index in indices]
    first = samples[0]
    prompts = [prompt for sample in samples for prompt in sample.prompts]
    prompt_bytes = sum(_prompt_bytes(prompt) for prompt in prompts) / len(prompts)
    return replace(
        facts,
        num_examples=len(dataset),
        fingerprint=_digest(content),
        shape=first.shape,
        dtype=str(first.dtype),
        prompt=_describe_prompt(first.prompts[0]),
        record_bytes=math.prod(first.shape) * first.dtype.itemsize + round(prompt_bytes),
        samples=samples,
        records=dataset,
    )


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
    config: TrainConfig, facts: DatasetFacts, model: TransformerFacts, base: BaseFolder | None
) -> Iterator[str]:
    """Check records against each other, the pipeline, the model and the autoencoder.

    Args:
        config: Training configuration.
        facts: A dataset with its samples.
        model: To train.
        base: Base folder, if it is on this machine.

    Yields:
        What does not fit, a line each.
    """
    if not facts.samples:
        return
    first = facts.samples[0]
    for other in facts.samples:
        if other.shape != first.shape:
            yield (
                f"{first.name} and {other.name} have moments of the shapes {first.shape} and "
                f"{other.shape}: they cannot be in one batch"
            )
            break
    if len(first.shape) not in (3, 4):
        rule = "they must be (2C, h, w) or (2C, T, h, w)"
        yield f"{first.name} has moments of shape {first.shape}, {rule}"
        return
    yield from _wrong_frames(config, first)
    channels = list(_wrong_channels(first, model, base))
    size = list(_wrong_size(first, model, facts.is_alone))
    yield from (*channels, *size)
    lines = (wrong_prompt(s.name, p, model, base) for s in facts.samples for p in s.prompts)
    yield from itertools.islice(filter(None, lines), 1)
    try:
        manifest = read_manifest(facts.folder)
    except (RecordError, OSError) as error:
        yield str(error)
        return
    if manifest is None:
        return
    yield from _wrong_manifest(facts, manifest)
    if not size and facts.is_alone:
        yield from _wrong_pixels(manifest, model)
    if not channels:
        yield from _other_weights("vae", manifest.vae_hash, base)
    if manifest.text_encoder is not None:
        yield from _other_weights("text_encoder", manifest.text_encoder.hash, base)


def _wrong_frames(config: TrainConfig, sample: Sample) -> Iterator[str]:
    """Check that an image pipeline gets images and a video pipeline videos."""
    frozen = getattr(import_target(config.pipeline.target), "frozen_modules", None)
    if frozen is None or sample.shape[1:-2] == (1,):  # a clip of one frame suits both
        return
    trains_images = READS_EARLIER_FRAMES in frozen
    is_image = len(sample.shape) == 3
    if trains_images != is_image:
        yield (
            f"{sample.name} is {'an image' if is_image else 'a video'}, its moments have the shape "
            f"{sample.shape}, but pipeline.target={config.pipeline.target} trains on "
            f"{'images' if trains_images else 'videos'}"
        )


def _wrong_channels(
    sample: Sample, model: TransformerFacts, base: BaseFolder | None
) -> Iterator[str]:
    """Compare the channels of the latents with the model and the autoencoder."""
    channels = sample.shape[0] // 2
    found = f"{sample.name} has {channels} latent channels, but"
    wanted = model.sizes.get("image_dim", channels)
    made = (base.read_config("vae") if base else {}).get("latent_channels", channels)
    if channels != wanted:
        yield f"{found} {OVERLAY}.image_dim is {wanted}: was it made with another VAE?"
    elif channels != made:
        yield f"{found} the VAE has {made}"


def _wrong_size(sample: Sample, model: TransformerFacts, is_alone: bool) -> Iterator[str]:
    """Compare the size of the latents with the model."""
    wanted, size = model.latent_size, sample.shape[-2:]
    if wanted is None or size == wanted:
        return
    found = f"{sample.name} has latents of {_times(size)}"
    if is_alone:
        pixels, stride = model.sizes["image_size"], model.sizes["image_stride"]
        yield (
            f"{found}, but {OVERLAY}.image_size {pixels} at image_stride {stride} means "
            f"{_times(wanted)}"
        )
    elif not model.sizes.get("rotary_pos_embed"):
        yield (
            f"{found}, but the model has a table of positions for {_times(wanted)} only: to learn "
            "from several sizes, it needs rotary_pos_embed"
        )
    elif not model.takes(size):
        yield f"{found}: the sides must be multiples of {model.largest_patch}"


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
        fits = prompt.shape[1:] == (width,) and prompt.shape[0] <= (length or math.inf)
    if not fits:
        reads = f"null the model reads classes 0 to {NUM_CLASSES - 1}"
        if width:
            reads = f"{width} the model reads texts, or states up to ({length}, {width})"
        return f"{owner} has {found}, but with {OVERLAY}.text_token_dim={reads}"
    if isinstance(prompt, str) and base is not None and base.index:
        for name in ("text_encoder", "tokenizer"):
            if name not in base.components and name not in base.faulty:
                return f"{owner} has a text, but {COMPONENTS}.{name} is empty"
    return None


def _wrong_manifest(facts: DatasetFacts, manifest: Manifest) -> Iterator[str]:
    """Check that a manifest belongs to the records beside it."""
    pairs = {
        "dtype": (manifest.dtype, facts.dtype),
        "shape": (manifest.shape, facts.shape),
        "counts.examples": (manifest.counts.examples, facts.num_examples),
    }
    wrong = [f"{n} {a}, not {b}" for n, (a, b) in pairs.items() if a not in (None, b)]
    if wrong:
        file = facts.folder / MANIFEST_NAME
        yield f"{file} belongs to other records: it says {'; '.join(wrong)}"


def _wrong_pixels(manifest: Manifest, model: TransformerFacts) -> Iterator[str]:
    """Compare the size of the pictures that a dataset was made from with the model."""
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
