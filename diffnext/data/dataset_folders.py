"""The datasets of a run: one folder, or several whose batches alternate.

    "photos"                                        one dataset, or one of several sizes
    ["photos", "drawings"]                          as many batches as each has examples
    [{"folder": "photos", "weight": 2}, "..."]      two batches of these for one of those

A folder that the cache builder wrote for several sizes means all datasets in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf, lcm
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

from diffnext.data.manifest import read_manifest
from diffnext.data.record_format import RecordError
from diffnext.data.records import is_dataset

Folder: TypeAlias = "str | os.PathLike[str]"
Folders: TypeAlias = "Folder | Iterable[Folder | Mapping[str, Any]]"


@dataclass(frozen=True)
class DatasetFolder:
    """One dataset among those of a run.

    Attributes:
        path: Its folder.
        entry: Number of its entry in the list of folders.
        weight: Weight of that entry; None if no entry has one.
        is_size: Whether it is one of the sizes in a folder.
    """

    path: str
    entry: int = 0
    weight: Fraction | None = None
    is_size: bool = False


def list_folders(dataset: Folders) -> list[DatasetFolder]:
    """Find the datasets that the folders mean.

    Args:
        dataset: A folder, or several, each with or without a weight; see the module.

    Raises:
        ValueError: If a dataset is named twice; see also :func:`parse_folders`.
        RecordError: If the manifest of a folder of several sizes is damaged.
    """
    found = [
        DatasetFolder(path, number, weight, is_size=path != folder)
        for number, (folder, weight) in enumerate(parse_folders(dataset))
        for path in _find_sizes(folder)
    ]
    paths = [os.path.realpath(folder.path) for folder in found]
    twice = [folder.path for i, folder in enumerate(found) if paths[i] in paths[:i]]
    if twice:
        raise ValueError(f"the dataset {twice[0]} is named twice: give it a larger weight")
    return found


def parse_folders(dataset: Folders) -> list[tuple[str, Fraction | None]]:
    """The folders that are named, with their weights.

    Raises:
        ValueError: If there is none, an entry has another form, a weight is not a number above 0,
            or only some entries have a weight.
    """
    entries = [dataset] if isinstance(dataset, str | os.PathLike) else list(dataset)
    parsed = [_parse_entry(entry) for entry in entries]
    if not parsed:
        raise ValueError("must name a dataset")
    if len({weight is None for _, weight in parsed}) > 1:
        raise ValueError("must have a weight for each dataset, or for none")
    return parsed


def _parse_entry(entry: Any) -> tuple[str, Fraction | None]:
    if isinstance(entry, str | os.PathLike):
        return os.path.expanduser(entry), None
    is_mapping = isinstance(entry, Mapping) and entry.keys() <= {"folder", "weight"}
    if not is_mapping or not isinstance(entry.get("folder"), str | os.PathLike):
        raise ValueError(f"must list folders, or {{folder: ..., weight: ...}}, not {entry!r:.80}")
    weight = entry.get("weight")
    if weight is None:
        return os.path.expanduser(entry["folder"]), None
    is_number = isinstance(weight, Real) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < inf:
        raise ValueError(f"must have weights above 0, not {weight!r:.80} for {entry['folder']}")
    return os.path.expanduser(entry["folder"]), Fraction(str(weight))


def _find_sizes(folder: str) -> list[str]:
    """The datasets that a manifest lists, or the folder itself."""
    is_one = is_dataset(folder) or not os.path.isdir(folder)
    manifest = None if is_one else read_manifest(folder)
    if manifest is None or not manifest.datasets:
        return [folder]
    for name in manifest.datasets:
        path = Path(folder, name)
        if name == ".." or path.parent != Path(folder) or path.is_symlink():
            raise RecordError(f"{folder}: its manifest lists {name!r}, which is not a folder in it")
    return [os.path.join(folder, name) for name in manifest.datasets]


def batch_weights(folders: Sequence[DatasetFolder], counts: Sequence[int]) -> tuple[int, ...]:
    """In which proportion batches come from several datasets, in whole numbers.

    Args:
        folders: The datasets.
        counts: Their numbers of examples. These are the weights if none are given; the sizes in a
            folder share its weight in this proportion.
    """
    if folders[0].weight is None:
        return tuple(counts)
    totals: dict[int, int] = {}
    for folder, count in zip(folders, counts, strict=True):
        totals[folder.entry] = totals.get(folder.entry, 0) + count
    shares = [
        (folder.weight or 0) * Fraction(count, totals[folder.entry])
        for folder, count in zip(folders, counts, strict=True)
    ]
    scale = lcm(*(share.denominator for share in shares))
    return tuple(int(share * scale) for share in shares)
