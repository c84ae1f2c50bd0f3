"""The unfinished part of a dataset, which a killed build is continued from.

Items are built in chunks. A chunk's folder gets its name when it is complete, by one rename, so
after a kill every chunk is there as a whole or not at all. Chunks do not depend on each other, nor
on the process that builds them. When all are there, their records are copied to the shards of the
dataset, one shard after the other, and the copied chunks are removed.

    <output>/.building/plan.json           the settings; a build continues only with the same
    <output>/.building/names.jsonl         the items of the source, in order
    <output>/.building/chunks/00000012/    records by size, and facts about each item
    <output>/.building/previous/...        such folders of a build that is being updated
    <output>/.building/claims/             which process builds which chunk
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from diffnext.data.caching.claims import Claims
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.provenance import SOURCES_NAME, ItemFacts, read_facts, write_facts
from diffnext.data.caching.settings import CacheSettings, format_size
from diffnext.data.manifest import MANIFEST_NAME, read_manifest
from diffnext.data.plain_files import read_typed
from diffnext.data.records import METADATA_NAME, RecordDataset, RecordWriter, copy_records
from diffnext.data.shards import INDEX_SUFFIX, SUFFIXES
from diffnext.utils.json_files import naming_place, write_json, write_lines

WORK_NAME = ".building"
CLAIMS = "claims"
SKIPPED_NAME = "skipped.jsonl"


class WorkFolder:
    """State of a build.

    Args:
        settings: Settings of the build.
        num_items: Items of the source.
    """

    def __init__(self, settings: CacheSettings, num_items: int) -> None:
        self.output = settings.output
        self.path = settings.output / WORK_NAME
        self.num_items = num_items
        self.num_chunks = -(-num_items // settings.chunk_size)
        self.chunk_size = settings.chunk_size
        self.shard_size = settings.shard_size
        names = [format_size(size) for size in settings.sizes]
        # With one size, the output folder itself is the dataset.
        several = {name: settings.output / name for name in names}
        self.datasets = several if len(names) > 1 else {names[0]: settings.output}

    @property
    def is_begun(self) -> bool:
        """Whether there is something to continue."""
        return (self.path / "plan.json").is_file()

    def items_of(self, chunk: int) -> range:
        """Places of the items of a chunk."""
        start = chunk * self.chunk_size
        return range(start, min(start + self.chunk_size, self.num_items))

    @contextlib.contextmanager
    def claims(self) -> Iterator[Claims]:
        """The claims of the processes that share the build.

        Raises:
            CacheError: If the output folder holds something else.
        """
        if not self.path.is_dir() and not (self.output / MANIFEST_NAME).is_file():
            found = os.listdir(self.output) if self.output.is_dir() else []
            if set(found) - {SKIPPED_NAME, SOURCES_NAME, WORK_NAME}:
                problem = "is not empty: name a new folder"
                if SOURCES_NAME in found:
                    problem = (
                        f"holds a dataset that lost its {MANIFEST_NAME}: copy that file back, or "
                        "name a new folder"
                    )
                raise CacheError(f"{self.output} {problem}")
        try:
            with Claims(self.path / CLAIMS) as claims:
                yield claims
        finally:
            with contextlib.suppress(OSError):  # others still work, or a build is left
                (self.path / CLAIMS).rmdir()
                self.path.rmdir()

    # Beginning, continuing, updating: only while ``claims.alone`` is held.

    def begin(self, plan: Mapping[str, Any], names: Iterable[str]) -> None:
        """Write names and plan; with the plan, which comes last, the build has begun."""
        (self.path / "chunks").mkdir(parents=True, exist_ok=True)
        write_lines(self.path / "names.jsonl", names)
        write_json(self.path / "plan.json", dict(plan))

    def plan(self) -> dict[str, Any]:
        """The plan of the build that was begun."""
        return read_typed(self.path / "plan.json", TypeAdapter(dict[str, Any]))

    def names(self) -> list[str]:
        """The names of the items when the build was begun."""
        with open(self.path / "names.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def set_aside(self) -> None:
        """Move all built records to ``previous``, to copy from; may be repeated after a kill."""
        previous = self.path / "previous"
        previous.mkdir(parents=True, exist_ok=True)
        chunks = sorted(self.built_chunks())
        with contextlib.suppress(FileNotFoundError):
            if chunks:
                os.replace(self.path / "plan.json", previous / "plan.json")
            else:
                os.remove(self.path / "plan.json")
        for chunk in chunks:
            os.rename(self.chunk_folder(chunk), previous / f"{len(os.listdir(previous)):08d}")
        manifest = read_manifest(self.output)
        if manifest is None:
            return
        write_json(previous / "plan.json", manifest.plan or {})
        part = previous / "dataset"  # after a kill, the same
        part.mkdir(exist_ok=True)
        for name, folder in self.datasets.items():
            if not folder.is_dir():
                continue
            (part / name).mkdir(exist_ok=True)
            for path in sorted(folder.iterdir()):
                if path.name == METADATA_NAME or path.suffix in SUFFIXES:
                    os.replace(path, part / name / path.name)
            if folder != self.output:
                shutil.rmtree(folder)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.output / SOURCES_NAME, part / SOURCES_NAME)
        os.remove(self.output / MANIFEST_NAME)  # from here on it is not finished

    @property
    def is_being_set_aside(self) -> bool:
        """Whether a kill ended :meth:`set_aside` of a finished dataset."""
        return (self.path / "previous" / "dataset").is_dir()

    def previous_plan(self) -> dict[str, Any] | None:
        """The plan of the build that is being updated; None if there is none."""
        file = self.path / "previous" / "plan.json"
        return read_typed(file, TypeAdapter(dict[str, Any])) if file.is_file() else None

    def previous_parts(self) -> list[Path]:
        """Folders of the build that is being updated, with the same content as chunks."""
        parts = sorted((self.path / "previous").glob("*"), key=lambda path: path.name)
        return [part for part in parts if (part / SOURCES_NAME).is_file()]

    def remove(self) -> None:
        """Remove what a finished dataset does not need.

        The plan goes first: while it exists, all chunks exist. The claims stay, as other processes
        may still have some: :meth:`claims` removes them with the last process.
        """
        (self.path / "plan.json").unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir() and path.name != CLAIMS:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file():
                path.unlink()

    # Chunks

    def built_chunks(self) -> set[int]:
        """Numbers of the chunks that are complete."""
        with contextlib.suppress(FileNotFoundError):
            return {int(name) for name in os.listdir(self.path / "chunks") if name.isdecimal()}
        return set()

    def chunk_folder(self, chunk: int) -> Path:
        """Where a chunk is when it is complete."""
        return self.path / "chunks" / f"{chunk:08d}"

    def built_facts(self) -> Iterator[ItemFacts]:
        """Facts about the items of all complete chunks, in order."""
        for chunk in sorted(self.built_chunks()):
            yield from read_facts(self.chunk_folder(chunk) / SOURCES_NAME)

    # The dataset: only when all chunks are complete, and while ``claims.alone`` is held.

    def write_lists(self) -> int:
        """Write ``sources.jsonl`` and ``skipped.jsonl``; returns the number of skipped lines."""
        write_facts(self.output / SOURCES_NAME, self.built_facts())
        skipped = [asdict(line) for facts in self.built_facts() for line in facts.skipped]
        write_lines(self.output / SKIPPED_NAME, skipped)
        return len(skipped)

    def join(self) -> dict[str, int]:
        """Write the missing shards, each by renames, and remove the chunks they were copied from.

        Returns:
            The number of examples of each size.
        """
        found: list[Counter[str]] = [Counter() for _ in range(self.num_chunks)]
        for chunk, counter in enumerate(found):
            for facts in read_facts(self.chunk_folder(chunk) / SOURCES_NAME):
                counter.update(facts.examples)
        counts = {name: np.array([one[name] for one in found]) for name in self.datasets}
        return {name: self._join_size(name, counts[name]) for name in self.datasets}

    def _join_size(self, name: str, counts: np.ndarray) -> int:
        """Make the dataset of a size.

        Args:
            name: Name of the size.
            counts: Its examples in each chunk.
        """
        ends = np.cumsum(counts)
        starts = ends - counts
        num_shards = -(-int(ends[-1]) // self.shard_size)
        for shard in range(num_shards):
            start, stop = shard * self.shard_size, (shard + 1) * self.shard_size
            taken = np.flatnonzero((counts > 0) & (ends > start) & (starts < stop)).tolist()
            spans = {
                self.chunk_folder(chunk) / name: range(
                    max(start - starts[chunk], 0), min(stop, ends[chunk]) - starts[chunk]
                )
                for chunk in taken
            }
            stem = str(shard).zfill(max(5, len(str(num_shards - 1))))
            if not (self.datasets[name] / f"{stem}{INDEX_SUFFIX}").is_file():
                self._write_shard(_records_of(spans), name, stem)
            for chunk in taken:
                if ends[chunk] <= stop:
                    shutil.rmtree(self.chunk_folder(chunk) / name, ignore_errors=True)
        return int(ends[-1])

    def _write_shard(
        self, records: Iterable[tuple[RecordDataset, int]], name: str, stem: str
    ) -> None:
        """Write a shard beside the dataset, then move it there; its index comes last and counts."""
        scratch = self.path / "joining"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        folder = self.datasets[name]
        folder.mkdir(exist_ok=True)
        with naming_place(scratch):
            copy_records(records, scratch)
        flush_files(scratch)
        written = [path for path in scratch.iterdir() if path.suffix in SUFFIXES]
        for path in sorted(written, key=lambda path: path.suffix == INDEX_SUFFIX):
            os.replace(path, folder / f"{stem}{path.suffix}")
        shutil.rmtree(scratch)


class ChunkWriter:
    """Collects the records of a chunk; they count only after ``commit``.

    Args:
        work: State of the build.
        chunk: Number.
        features: Descriptor of the records.
    """

    def __init__(self, work: WorkFolder, chunk: int, features: Mapping[str, Any]) -> None:
        self._target = work.chunk_folder(chunk)
        self._folder = self._target.with_name(f"{self._target.name}.{uuid.uuid4().hex[:8]}.partial")
        self._features = features
        self._writers: dict[str, RecordWriter] = {}
        self._folder.mkdir(parents=True)

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Add an example to the dataset of a size."""
        if name not in self._writers:
            (self._folder / name).mkdir()
            self._writers[name] = RecordWriter(self._folder / name, self._features)
        with naming_place(self._folder / name):
            self._writers[name].write(record)

    def commit(self, facts: Iterable[ItemFacts]) -> None:
        """Complete the chunk with the facts about its items."""
        for name, writer in self._writers.items():
            with naming_place(self._folder / name):
                writer.close()
        write_facts(self._folder / SOURCES_NAME, facts)
        flush_files(self._folder)
        try:
            self._folder.rename(self._target)
        except OSError:
            if not self._target.is_dir():
                raise
            shutil.rmtree(self._folder)  # another process took this one for dead


def flush_files(folder: Path) -> None:
    """Bring the files of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with naming_place(path), open(path, "rb") as file:
                os.fsync(file.fileno())


def _records_of(spans: Mapping[Path, range]) -> Iterator[tuple[RecordDataset, int]]:
    """Some records of each of several datasets, which are open one at a time."""
    for folder, places in spans.items():
        with RecordDataset(folder) as dataset:
            for place in places:
                yield dataset, place
