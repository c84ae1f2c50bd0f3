"""The contents of a dataset, and its problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffnext.data.caching.provenance import SOURCES_NAME, read_facts
from diffnext.data.flex_pipelines import all_outputs
from diffnext.data.flex_transforms import check_features
from diffnext.data.manifest import Manifest, read_manifest
from diffnext.data.records import RecordDataset, RecordError
from diffnext.data.shards import Shard

FLOW_EDGES = (0, 0.5, 1, 2, 3, 5, 7, 10, 20, float("inf"))
BAR_LENGTH = 40  # characters


@dataclass
class Summary:
    """The contents of a dataset.

    Attributes:
        entries: Examples.
        shards: Number of pairs of files.
        size: Bytes of the records.
        features: Descriptor.
        shapes: Examples by shape of their moments.
        captions: Length of each long caption in characters.
        texts: Examples with a short caption of their own.
        states: Length of each long caption's cached states in tokens.
        flows: Motion strength of each example that has one.
        labels: Examples by class.
        manifest: None if there is none.
    """

    entries: int
    shards: int
    size: int
    features: Mapping[str, Any]
    shapes: Counter = field(default_factory=Counter)
    captions: list[int] = field(default_factory=list)
    texts: int = 0
    states: list[int] = field(default_factory=list)
    flows: list[float] = field(default_factory=list)
    labels: Counter = field(default_factory=Counter)
    manifest: Manifest | None = None


def summarize(folder: Path) -> Summary:
    """Read everything in a dataset except the latents.

    Raises:
        RecordError: If it is damaged.
        FileNotFoundError: If there is no dataset.
    """
    with RecordDataset(folder) as dataset:
        check_features(dataset.features, str(folder))
        summary = Summary(
            entries=len(dataset),
            shards=len(dataset.shards),
            size=dataset.num_bytes,
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
        summary.captions.append(len(caption))
    elif isinstance(caption, Mapping) and caption["shape"]:
        summary.states.append(caption["shape"][0])
    text = example.get("text")
    summary.texts += bool(text["data"] if isinstance(text, Mapping) else text)
    if "flow" in example:
        summary.flows.append(example["flow"])
    if "label" in example:
        summary.labels[example["label"]] += 1


def draw_histogram(flows: Sequence[float]) -> list[str]:
    """Numbers of motion strengths, a line for each range."""
    counts, _ = np.histogram(flows, FLOW_EDGES)
    unit = max(1.0, counts.max() / BAR_LENGTH)
    ranges = zip(FLOW_EDGES[:-1], FLOW_EDGES[1:], counts.tolist(), strict=True)
    return [
        f"{low:>5g} to {high:<5g} {count:>7}  {'#' * round(count / unit)}".rstrip()
        for low, high, count in ranges
    ]


def list_sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Where the records of a dataset came from.

    Args:
        folder: Folder of the dataset.

    Yields:
        For each record its source, empty if it names none, and the hash of the source's item that
        it came from, empty if that is unknown.

    Raises:
        RecordError: If something is damaged.
    """
    parent = read_manifest(folder.parent)
    is_one_of_several = parent is not None and folder.name in (parent.datasets or {})
    path = (folder.parent if is_one_of_several else folder) / SOURCES_NAME
    hashes = {facts.source: facts.hash for facts in read_facts(path)} if path.is_file() else {}
    with RecordDataset(folder) as dataset:
        for index in range(len(dataset)):
            source = str(dataset.view(index).get("source", ""))
            item = source
            while item not in hashes and "#" in item:  # the number of a clip, or a mirrored copy
                item = item.rpartition("#")[0]
            yield source, hashes.get(item, "")


def find_problems(folder: Path) -> Iterator[str]:
    """Look for all problems of a dataset.

    Every byte must belong to a record that training can read, and the manifest must agree.

    Args:
        folder: Folder of the dataset.

    Yields:
        A line for each problem.
    """
    try:
        dataset = RecordDataset(folder)
        check_features(dataset.features, str(folder))
        manifest = read_manifest(folder)
    except (RecordError, OSError) as error:
        yield str(error)
        return
    with dataset:
        for shard in dataset.shards:
            yield from _shard_problems(shard)
        shapes: Counter = Counter()
        sources: dict[str, int] = {}
        for index in range(len(dataset)):
            yield from _record_problems(dataset, index, shapes, sources)
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
    try:
        example = dataset.view(index)
        outputs = all_outputs(example, name)
    except RecordError as error:
        yield str(error)
        return
    latents = outputs[0]["latents"][0]
    shapes[latents.shape] += 1
    if latents.dtype.kind == "f" and not np.isfinite(latents).all():
        yield f"{name} has latents that are not finite"
    source = example.get("source")
    if source and isinstance(source, str):
        first = sources.setdefault(source, index)
        if first != index:
            yield f"{name} has the same source as example {first}: {source}"


def _manifest_problems(
    folder: Path, manifest: Manifest, entries: int, shapes: Counter
) -> Iterator[str]:
    counted = manifest.counts.examples
    if counted not in (None, entries):
        yield f"{folder}: the manifest counts {counted} examples, METADATA {entries}"
    if manifest.shape is not None and shapes and set(shapes) != {manifest.shape}:
        yield f"{folder}: the manifest lists latents of {manifest.shape}, there are {list(shapes)}"
