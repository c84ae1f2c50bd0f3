"""The unfinished part of a dataset, which a killed build is continued from.

Items are built in chunks. A chunk's folder appears under its name when it is complete, by one
rename, so that after a kill every chunk is there as a whole or not at all. Chunks are independent
of each other and of the number of processes. When all are there, runs of them become shards of the
dataset, one after the other; what is known of a shard is written once its files are in place, and
its chunks go after that.

    <output>/.building/plan.json           what is built; continuing takes the same
    <output>/.building/chunks/00000012/    records by size, and skipped.jsonl
    <output>/.building/shards/00003.json   what shard 3 holds
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.examples import Skipped
from diffnext.data.caching.settings import Size, format_size
from diffnext.data.plain_files import read_typed
from diffnext.data.records import RecordDataset, RecordWriter, copy_records
from diffnext.utils.json_files import write_json

logger = logging.getLogger(__name__)

WORK_NAME = ".building"
MAX_DIFFERENCES = 3  # named in a message


@dataclass(frozen=True)
class ShardFacts:
    """What a shard holds.

    Attributes:
        counts: Examples by size.
        shapes: Shapes of their moments by size.
        skipped: What is not in it.
    """

    counts: dict[str, int]
    shapes: dict[str, list[int]]
    skipped: list[Skipped]


class WorkFolder:
    """State of a build.

    Args:
        output: Folder of the dataset.
        num_items: Items of the source.
        chunk_size: Items to a chunk.
        chunks_per_shard: Chunks to a shard.
    """

    def __init__(
        self, output: Path, num_items: int, chunk_size: int, chunks_per_shard: int
    ) -> None:
        self.output = output
        self.path = output / WORK_NAME
        self.num_items = num_items
        self.chunk_size = chunk_size
        self.chunks_per_shard = chunks_per_shard
        self._lock: TextIOWrapper | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks of the source."""
        return -(-self.num_items // self.chunk_size)

    @property
    def num_shards(self) -> int:
        """Shards of a dataset at most."""
        return -(-self.num_chunks // self.chunks_per_shard)

    def items_of(self, chunk: int) -> range:
        """Places of the items of a chunk."""
        start = chunk * self.chunk_size
        return range(start, min(start + self.chunk_size, self.num_items))

    def prepare(self, plan: Mapping[str, Any]) -> None:
        """Begin, or go on with the same plan; only the main process calls this.

        Raises:
            CacheError: If another plan was begun, another process is at it, or the folder holds
                something else.
        """
        if not self.path.is_dir():
            if self.output.is_dir() and any(self.output.iterdir()):
                raise CacheError(f"{self.output} is not empty: name a new folder")
            self.path.mkdir(parents=True)
        self._take_lock()
        self._chunks.mkdir(exist_ok=True)
        self._shards.mkdir(exist_ok=True)
        for leftover in self._chunks.glob("*.partial"):
            shutil.rmtree(leftover)
        plan_path = self.path / "plan.json"
        if any(self._chunks.iterdir()) or any(self._shards.iterdir()):
            self.check(plan)
        else:  # nothing is lost by another plan
            write_json(plan_path, dict(plan))

    def check(self, plan: Mapping[str, Any]) -> None:
        """Check that this process has the plan of the main process.

        Raises:
            CacheError: If it has another.
        """
        begun = read_typed(self.path / "plan.json", TypeAdapter(dict[str, Any]))
        check_plan(begun, plan, self.output)

    def chunk_folder(self, chunk: int) -> Path:
        """Where a chunk is when it is complete and no shard has it yet."""
        return self._chunks / f"{chunk:08d}"

    def is_built(self, chunk: int) -> bool:
        """Whether a chunk is complete."""
        return self.chunk_folder(chunk).is_dir() or self.has_shard(chunk // self.chunks_per_shard)

    def has_shard(self, shard: int) -> bool:
        """Whether a shard is complete."""
        return self._shard(shard).is_file()

    def shard_facts(self, shard: int) -> ShardFacts:
        """What a complete shard holds."""
        return read_typed(self._shard(shard), TypeAdapter(ShardFacts))

    def write_shard(self, shard: int, datasets: Mapping[str, Path]) -> None:
        """Make a shard of its chunks, and remove them.

        Args:
            shard: Number.
            datasets: Folder of the dataset of each size.
        """
        first = shard * self.chunks_per_shard
        chunks = range(first, min(first + self.chunks_per_shard, self.num_chunks))
        facts = ShardFacts({}, {}, [])
        for name, folder in datasets.items():
            parts = [self.chunk_folder(chunk) / name for chunk in chunks]
            parts = [part for part in parts if part.is_dir()]
            if parts:
                facts.counts[name] = self._join(parts, folder, shard)
                facts.shapes[name] = _first_shape(parts[0])
        for chunk in chunks:
            facts.skipped.extend(read_skipped(self.chunk_folder(chunk) / "skipped.jsonl"))
        write_json(self._shard(shard), asdict(facts))
        for chunk in chunks:
            shutil.rmtree(self.chunk_folder(chunk), ignore_errors=True)

    def remove(self) -> None:
        """Remove all of it, which a finished dataset does not need."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _join(self, parts: list[Path], folder: Path, shard: int) -> int:
        """Write the records of chunks as one shard; the index, which makes it one, comes last."""
        scratch = self.path / "joining"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        folder.mkdir(exist_ok=True)
        count = copy_records(_all_records(parts), scratch)
        flush_files(scratch)
        name = str(shard).zfill(max(5, len(str(self.num_shards - 1))))
        for suffix in (".data", ".index"):
            os.replace(scratch / f"00000{suffix}", folder / f"{name}{suffix}")
        shutil.rmtree(scratch)
        return count

    def _take_lock(self) -> None:
        """Hold the folder until this process ends, however it ends."""
        self._lock = open(self.path / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(f"another process is building {self.output}") from error
        except OSError as error:  # not every network file system has locks
            logger.warning("%s cannot be locked: %s", self.path, error)

    @property
    def _chunks(self) -> Path:
        return self.path / "chunks"

    @property
    def _shards(self) -> Path:
        return self.path / "shards"

    def _shard(self, shard: int) -> Path:
        return self._shards / f"{shard:05d}.json"


class ChunkWriter:
    """Collects the records of a chunk; nothing of them counts before ``commit``.

    Args:
        work: State of the build.
        chunk: Number.
        features: Descriptor of the records.
    """

    def __init__(self, work: WorkFolder, chunk: int, features: Mapping[str, Any]) -> None:
        self._target = work.chunk_folder(chunk)
        self._folder = self._target.with_name(f"{self._target.name}.partial")
        self._features = features
        self._writers: dict[str, RecordWriter] = {}
        self._skipped: list[Skipped] = []
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()

    def write(self, size: Size, record: Mapping[str, Any]) -> None:
        """Add an example."""
        name = format_size(size)
        if name not in self._writers:
            (self._folder / name).mkdir()
            self._writers[name] = RecordWriter(self._folder / name, self._features)
        self._writers[name].write(record)

    def skip(self, skipped: Skipped) -> None:
        """Note what is left out."""
        self._skipped.append(skipped)

    def commit(self) -> None:
        """Make the chunk complete."""
        for writer in self._writers.values():
            writer.close()
        write_skipped(self._folder / "skipped.jsonl", self._skipped)
        flush_files(self._folder)
        self._folder.rename(self._target)


def check_plan(begun: Mapping[str, Any], wanted: Mapping[str, Any], output: Path) -> None:
    """Check that a build goes on with the plan it was begun with.

    Raises:
        CacheError: Naming what differs.
    """
    names = [name for name in {**begun, **wanted} if begun.get(name) != wanted.get(name)]
    if names:
        changes = [f"{n} {begun.get(n)!r:.80} -> {wanted.get(n)!r:.80}" for n in names]
        raise CacheError(
            f"{output} was begun with other settings or another source: "
            f"{'; '.join(changes[:MAX_DIFFERENCES])}; go on with the same, or name a new folder"
        )


def _all_records(folders: Iterable[Path]) -> Iterator[tuple[RecordDataset, int]]:
    """The records of datasets, of which one at a time is open."""
    for folder in folders:
        with RecordDataset(folder) as dataset:
            yield from ((dataset, index) for index in range(len(dataset)))


def write_skipped(path: Path, lines: Iterable[Skipped]) -> None:
    """Write a ``skipped.jsonl``."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines)


def read_skipped(path: Path) -> list[Skipped]:
    """Read a ``skipped.jsonl``."""
    return [Skipped(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def flush_files(folder: Path) -> None:
    """Bring the files of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _first_shape(folder: Path) -> list[int]:
    with RecordDataset(folder) as dataset:
        return dataset.view(0)["shape"]
