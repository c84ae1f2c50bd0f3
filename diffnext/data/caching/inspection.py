"""What a dataset holds, and whether it is whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.manifest import read_manifest
from diffnext.data.flex_pipelines import FeaturePipe
from diffnext.data.records import RecordDataset, RecordError, Shard

FIRST_DRAW, SECOND_DRAW = 0.0, 0.9  # of the short caption, and of the long one


@dataclass
class Range:
    """Least, mean and greatest of some numbers."""

    least: float = float("inf")
    greatest: float = float("-inf")
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take one more."""
        self.least = min(self.least, value)
        self.greatest = max(self.greatest, value)
        self.total += value
        self.count += 1

    def __str__(self) -> str:
        return f"{self.least:.4g} to {self.greatest:.4g}, mean {self.total / self.count:.4g}"


@dataclass
class Summary:
    """What a dataset holds.

    Attributes:
        entries: Examples.
        shards: Pairs of files.
        size: Bytes of the records.
        features: Descriptor.
        shapes: Examples by shape of their moments.
        captions: Lengths of the long captions in characters.
        texts: Examples with a short caption of their own.
        states: Lengths of cached text states in tokens.
        flows: Motion strengths.
        labels: Examples by class.
        manifest: None if there is none.
    """

    entries: int
    shards: int
    size: int
    features: Mapping[str, Any]
    shapes: Counter = field(default_factory=Counter)
    captions: Range = field(default_factory=Range)
    texts: int = 0
    states: Range = field(default_factory=Range)
    flows: Range = field(default_factory=Range)
    labels: Counter = field(default_factory=Counter)
    manifest: dict[str, Any] | None = None


def find_datasets(folder: str | os.PathLike[str]) -> list[Path]:
    """The dataset in a folder, or those of several sizes in its folders.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(folder)
    if (folder / "METADATA").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/METADATA"))
    if not found:
        raise FileNotFoundError(f"{folder} is not a dataset: it has no METADATA")
    return found


def summarize(folder: Path) -> Summary:
    """Read all of a dataset but the latents.

    Raises:
        RecordError: If it is damaged.
        FileNotFoundError: If it is none.
    """
    with RecordDataset(folder) as dataset:
        summary = Summary(
            entries=len(dataset),
            shards=len(dataset.shards),
            size=sum(shard.data_size for shard in dataset.shards),
            features=dataset.features,
            manifest=read_manifest(folder),
        )
        for index in range(len(dataset)):
            _count(dataset.view(index), summary)
    return summary


def _count(example: Mapping[str, Any], summary: Summary) -> None:
    summary.shapes[tuple(example.get("shape", ()))] += 1
    caption = example.get("caption")
    if isinstance(caption, str):
        summary.captions.add(len(caption))
    elif isinstance(caption, Mapping) and caption["shape"]:
        summary.states.add(caption["shape"][0])
    text = example.get("text")
    summary.texts += bool(text["data"] if isinstance(text, Mapping) else text)
    if "flow" in example:
        summary.flows.add(example["flow"])
    if "label" in example:
        summary.labels[example["label"]] += 1


def find_problems(
    folder: Path, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """Look for all that is wrong with a dataset.

    Every byte must belong to a record that training can read, and the manifest must agree.

    Args:
        folder: Of the dataset.
        on_progress: Called with the examples that are done, and all of them.

    Yields:
        What is wrong, a line each.
    """
    try:
        dataset = RecordDataset(folder)
        manifest = read_manifest(folder)
    except (RecordError, CacheError, OSError) as error:
        yield str(error)
        return
    with dataset:
        for shard in dataset.shards:
            yield from _shard_problems(shard)
        shapes: Counter = Counter()
        sources: dict[str, int] = {}
        for index in range(len(dataset)):
            yield from _record_problems(dataset, index, shapes, sources)
            if on_progress is not None:
                on_progress(index + 1, len(dataset))
        if len(shapes) > 1:
            found = ", ".join(f"{shape} ({count})" for shape, count in shapes.most_common())
            yield f"{folder} has latents of several shapes, which fit in no batch: {found}"
        if manifest is not None:
            yield from _manifest_problems(folder, manifest, len(dataset), shapes)


def _shard_problems(shard: Shard) -> Iterator[str]:
    """Gaps and overlaps of the records of a shard."""
    expected = 0
    for number, (offset, length) in enumerate(shard.spans.tolist()):
        if offset != expected:
            yield f"{shard.data_path}: record {number} begins at {offset}, not at {expected}"
        expected = offset + length
    if expected != shard.data_size:
        yield f"{shard.data_path} has {shard.data_size} bytes, its records end at {expected}"


def _record_problems(
    dataset: RecordDataset, index: int, shapes: Counter, sources: dict[str, int]
) -> Iterator[str]:
    name = dataset.describe(index)
    pipe = FeaturePipe()
    try:
        example = dataset.view(index)
        outputs = [pipe.get_outputs(example, lambda: d) for d in (FIRST_DRAW, SECOND_DRAW)]  # noqa: B023
    except (RecordError, LookupError, TypeError, ValueError) as error:
        yield str(error) if isinstance(error, RecordError) else f"{name}: {error}"
        return
    latents = outputs[0]["latents"][0]
    shapes[latents.shape] += 1
    if latents.dtype.kind == "f" and not np.isfinite(latents).all():
        yield f"{name} has latents that are not finite"
    source = example.get("source")
    if source:
        first = sources.setdefault(source, index)
        if first != index:
            yield f"{name} is of the same source as example {first}: {source}"


def _manifest_problems(
    folder: Path, manifest: Mapping[str, Any], entries: int, shapes: Counter
) -> Iterator[str]:
    counted = manifest.get("counts", {}).get("examples")
    if counted not in (None, entries):
        yield f"{folder}: the manifest counts {counted} examples, METADATA {entries}"
    shape = manifest.get("shape")
    if shape is not None and shapes and set(shapes) != {tuple(shape)}:
        yield f"{folder}: the manifest tells latents of {tuple(shape)}, there are {list(shapes)}"
