"""Datasets made of other datasets: merged, split, or with other shards.

Records are copied unchanged, and get checksums.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffnext.data.caching.errors import CacheError, printable
from diffnext.data.manifest import Counts, Manifest, read_manifest, write_manifest
from diffnext.data.records import RecordDataset, copy_records

SAME = ("vae_hash", "dtype", "shape", "size", "kind", "flow_unit", "text_encoder")


def reshard(source: Path, output: Path, shard_size: int) -> int:
    """Copy a dataset into shards of another size.

    Returns:
        The number of shards.

    Raises:
        CacheError: If the output exists or the size is not positive.
    """
    if shard_size < 1:
        raise CacheError(f"shard_size must be at least 1, got {shard_size}")
    with RecordDataset(source) as dataset, _new_folder(output) as folder:
        order = ((dataset, index) for index in range(len(dataset)))
        copy_records(order, folder, shard_size)
        _write_manifest(folder, [source], len(dataset))
        return -(-len(dataset) // shard_size)


def merge(sources: Sequence[Path], output: Path) -> int:
    """Write several datasets as one, in their order.

    Returns:
        The number of examples.

    Raises:
        CacheError: If the output exists, or the datasets differ in their features, the shape of
            their latents or, if they have manifests, their autoencoder.
    """
    with ExitStack() as stack:
        datasets = [stack.enter_context(RecordDataset(source)) for source in sources]
        _check_alike(datasets)
        folder = stack.enter_context(_new_folder(output))
        order = _closing(datasets)
        count = copy_records(order, folder)
        _write_manifest(folder, sources, count)
        return count


def _closing(datasets: Sequence[RecordDataset]) -> Iterator[tuple[RecordDataset, int]]:
    """All examples; each dataset is closed after its last, as few files may be open at once."""
    for dataset in datasets:
        yield from ((dataset, index) for index in range(len(dataset)))
        dataset.close()


def split(source: Path, outputs: Sequence[Path], share: float, seed: int = 0) -> tuple[int, int]:
    """Write two datasets: a random share of the examples, and the others; both in their order.

    Args:
        source: Dataset.
        outputs: Folders of the first and the second.
        share: Share of the first, above 0 and below 1.
        seed: Seed of the choice.

    Returns:
        The number of examples of each.

    Raises:
        CacheError: If an output exists, or one of them would be empty.
    """
    if not 0 < share < 1:
        raise CacheError(f"share must be above 0 and below 1, got {share}")
    if len(outputs) != 2 or outputs[0] == outputs[1]:
        raise CacheError("a split needs two different folders")
    with RecordDataset(source) as dataset, ExitStack() as stack:
        count = round(share * len(dataset))
        if not 0 < count < len(dataset):
            raise CacheError(f"share {share} of {len(dataset)} examples leaves one part empty")
        folders = [stack.enter_context(_new_folder(output)) for output in outputs]
        order = np.random.default_rng(seed).permutation(len(dataset))
        for folder, chosen in zip(folders, (order[:count], order[count:]), strict=True):
            records = ((dataset, index) for index in np.sort(chosen).tolist())
            copy_records(records, folder)
            _write_manifest(folder, [source], len(chosen))
        return count, len(dataset) - count


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that gets its name after it was filled without an error."""
    if output.exists():
        raise CacheError(f"{output} exists: name a new folder")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, output)


def _check_alike(datasets: Sequence[RecordDataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        pair = f"{first.path} and {other.path}"
        if other.features != first.features:
            raise CacheError(f"{pair} have other features: {first.features}, {other.features}")
        shapes = [dataset.view(0).get("shape") for dataset in (first, other)]
        if shapes[0] != shapes[1]:
            raise CacheError(f"{pair} have latents of the shapes {shapes[0]} and {shapes[1]}")
        manifests = _read_manifests([first.path, other.path])
        for name in SAME if manifests else ():
            values = [getattr(manifest, name) for manifest in manifests]
            if values[0] != values[1]:
                raise CacheError(f"{pair} differ in {name}: {values[0]!r}, {values[1]!r}")


def _write_manifest(folder: Path, sources: Sequence[Path], count: int) -> None:
    """Write the part of the manifests that still holds; nothing if a source has none."""
    manifests = _read_manifests(sources)
    if not manifests:
        return
    made_of = [
        {"folder": printable(str(source)), "plan": manifest.plan, "sources": manifest.sources}
        for source, manifest in zip(sources, manifests, strict=True)
    ]
    counts = Counts(examples=count)
    write_manifest(folder, replace(manifests[0], counts=counts, plan=None, sources=made_of))


def _read_manifests(folders: Sequence[Path]) -> list[Manifest]:
    """The manifests of datasets; none if one of them has none."""
    found = [read_manifest(folder) for folder in folders]
    known = [manifest for manifest in found if manifest is not None]
    return known if len(known) == len(found) else []
