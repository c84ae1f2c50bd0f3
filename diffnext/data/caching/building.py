"""Building a cache: latents of pictures or clips with their captions, as a record dataset.

    settings = CacheSettings(
        kind="images", source="photos", output=Path("img_dataset"), vae=Path("nova/vae"),
        sizes=((1024, 1024),),
    )
    report = build_cache(settings)

The same call continues a build that was killed. What it writes depends on the settings and the
source alone, neither on kills nor on the number of processes.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffnext.data.caching.encoding import LatentEncoder, TextStates, vae_folder
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.examples import (
    Example,
    Skipped,
    make_records,
    read_item,
    record_features,
)
from diffnext.data.caching.items import Item
from diffnext.data.caching.manifest import (
    MOMENTS_DTYPE,
    Counts,
    Manifest,
    TextFacts,
    VaeFacts,
    package_versions,
    read_manifest,
    write_manifest,
)
from diffnext.data.caching.settings import CacheSettings, Size, format_size
from diffnext.data.caching.sources import hash_items, list_items
from diffnext.data.caching.work_folder import (
    ChunkWriter,
    ShardFacts,
    WorkFolder,
    check_plan,
    write_skipped,
)
from diffnext.data.records import normalize_features, write_metadata
from diffnext.models.autoencoders.loading import read_autoencoder_config
from diffnext.utils.weights_files import hash_weights

logger = logging.getLogger(__name__)

SKIPPED_NAME = "skipped.jsonl"


@dataclass(frozen=True)
class Processes:
    """The processes that share a build.

    Attributes:
        index: Of this process; 0 is the main one.
        count: Of all.
        wait: Returns when all have called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class CacheReport:
    """What a build gave.

    Attributes:
        datasets: Number of examples by folder.
        items: Items of the source.
        skipped: Number of items and examples that are not in it.
    """

    datasets: dict[Path, int]
    items: int
    skipped: int

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(self.datasets.values())


def build_cache(
    settings: CacheSettings,
    processes: Processes | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CacheReport:
    """Build a cache, or continue one.

    With one size the output folder is the dataset, with several it holds a dataset for each. Beside
    the records it gets ``manifest.json`` and ``skipped.jsonl``.

    Args:
        settings: What to build.
        processes: That share the work, each calling this; default: this one alone.
        on_progress: Called with the items of this process's share that are done, and all of them.

    Returns:
        What the dataset holds.

    Raises:
        CacheError: If the build cannot go on; see the message.
        OSError: If writing fails; the same call continues.
    """
    processes = processes or Processes()
    items = list_items(settings)
    plan = make_plan(settings, items)
    work = WorkFolder(settings.output, len(items), settings.chunk_size, settings.chunks_per_shard)
    finished = _read_finished(settings, plan)
    if finished is not None:
        work.remove()
        return finished
    if processes.index == 0:
        work.prepare(plan)
    processes.wait()
    work.check(plan)
    _build_chunks(settings, items, work, processes, on_progress or _ignore)
    processes.wait()
    if processes.index == 0:
        _finish(settings, work, plan)
    processes.wait()
    finished = _read_finished(settings, plan)
    if finished is None:
        raise CacheError(
            f"none of the {len(items)} items can be used: see {settings.output / SKIPPED_NAME}"
        )
    return finished


def make_plan(settings: CacheSettings, items: list[Item]) -> dict[str, Any]:
    """All that the content of the dataset depends on."""
    plan = settings.describe()
    plan |= {"num_items": len(items), "items_hash": hash_items(items)}
    plan["vae_hash"] = hash_weights(vae_folder(settings))
    if settings.text_encoder is not None:
        folder = settings.text_encoder / "text_encoder"
        if not folder.is_dir():
            raise CacheError(f"text_encoder: {settings.text_encoder} has no folder text_encoder")
        plan["text_encoder_hash"] = hash_weights(folder)
    return plan


def _build_chunks(
    settings: CacheSettings,
    items: list[Item],
    work: WorkFolder,
    processes: Processes,
    on_progress: Callable[[int, int], None],
) -> None:
    """Build the chunks of this process's share that are missing."""
    share = range(processes.index, work.num_chunks, processes.count)
    missing = [chunk for chunk in share if not work.is_built(chunk)]
    total = sum(len(work.items_of(chunk)) for chunk in share)
    done = total - sum(len(work.items_of(chunk)) for chunk in missing)
    if not missing:
        on_progress(done, total)
        return
    builder = _ChunkBuilder(settings, work)
    on_progress(done, total)  # the time that is left begins to count when all is loaded
    order = [(chunk, items[index]) for chunk in missing for index in work.items_of(chunk)]
    outcomes = _read_ahead(order, settings)
    for chunk, group in itertools.groupby(outcomes, key=lambda outcome: outcome[0]):
        builder.start(chunk)
        for _, outcome in group:
            builder.add(outcome)
            done += 1
            on_progress(done, total)
        builder.finish()


class _ChunkBuilder:
    """Encodes the examples of a chunk, in batches of one size.

    Args:
        settings: Of the build.
        work: State of the build.
    """

    def __init__(self, settings: CacheSettings, work: WorkFolder) -> None:
        self._settings = settings
        self._work = work
        self._encoder = LatentEncoder(settings)
        text_encoder = settings.text_encoder
        self._text_states = TextStates(text_encoder, settings) if text_encoder else None
        self._features = record_features(settings)
        self._waiting: dict[Size, list[Example]] = {}

    def start(self, chunk: int) -> None:
        """Begin a chunk."""
        self._writer = ChunkWriter(self._work, chunk, self._features)

    def add(self, outcome: list[Example] | Skipped) -> None:
        """Take what became of an item.

        Raises:
            CacheError: If it is a bad one, and the build is to stop then.
        """
        if isinstance(outcome, Skipped):
            self._skip(outcome)
            return
        for example in outcome:
            waiting = self._waiting.setdefault(example.size, [])
            waiting.append(example)
            if len(waiting) == self._settings.batch_size:
                self._encode(example.size)

    def finish(self) -> None:
        """Encode what is left, and complete the chunk."""
        for size in list(self._waiting):
            self._encode(size)
        self._writer.commit()

    def _encode(self, size: Size) -> None:
        examples = self._waiting.pop(size)
        for record in make_records(examples, self._settings, self._encoder, self._text_states):
            if isinstance(record, Skipped):
                self._skip(record)
            else:
                self._writer.write(size, record)

    def _skip(self, skipped: Skipped) -> None:
        if self._settings.on_error == "stop":
            raise CacheError(f"{skipped.source}: {skipped.reason}")
        logger.debug("skipped %s: %s", skipped.source, skipped.reason)
        self._writer.skip(skipped)


def _read_ahead(
    order: list[tuple[int, Item]], settings: CacheSettings
) -> Iterator[tuple[int, list[Example] | Skipped]]:
    """Decode items in threads, a little further than they are taken, in order."""
    depth = settings.workers + settings.batch_size
    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(settings.workers) as pool:
        try:
            for chunk, item in order:
                waiting.append((chunk, pool.submit(read_item, item, settings)))
                if len(waiting) > depth:
                    number, future = waiting.popleft()
                    yield number, future.result()
            while waiting:
                number, future = waiting.popleft()
                yield number, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finish(settings: CacheSettings, work: WorkFolder, plan: dict[str, Any]) -> None:
    """Make shards of the chunks, then what makes a dataset of them; the manifest comes last."""
    datasets = _dataset_folders(settings)
    for shard in range(work.num_shards):
        if not work.has_shard(shard):
            work.write_shard(shard, datasets)
    facts = [work.shard_facts(shard) for shard in range(work.num_shards)]
    skipped = [line for shard in facts for line in shard.skipped]
    write_skipped(settings.output / SKIPPED_NAME, skipped)
    features = normalize_features(record_features(settings))
    examples: dict[str, int] = {}
    for size in settings.sizes:
        name = format_size(size)
        count = sum(shard.counts.get(name, 0) for shard in facts)
        if count == 0:
            continue
        examples[name] = count
        write_metadata(datasets[name], count, features)
        write_manifest(datasets[name], _make_manifest(settings, plan, size, count, facts))
    if not examples:
        return
    if len(settings.sizes) > 1:
        counts = Counts(items=work.num_items, skipped=len(skipped))
        write_manifest(settings.output, Manifest(datasets=examples, plan=plan, counts=counts))
    work.remove()


def _dataset_folders(settings: CacheSettings) -> dict[str, Path]:
    """Folder of the dataset of each size."""
    names = [format_size(size) for size in settings.sizes]
    if len(names) == 1:
        return {names[0]: settings.output}
    return {name: settings.output / name for name in names}


def _make_manifest(
    settings: CacheSettings,
    plan: dict[str, Any],
    size: Size,
    examples: int,
    facts: list[ShardFacts],
) -> Manifest:
    folder = vae_folder(settings)
    text = None
    if settings.text_encoder is not None:
        text = TextFacts(hash=plan["text_encoder_hash"], max_tokens=settings.text_length)
    shapes = (shard.shapes.get(format_size(size)) for shard in facts)
    return Manifest(
        kind=settings.kind,
        vae_hash=plan["vae_hash"],
        vae=VaeFacts(folder=str(folder.absolute()), config=read_autoencoder_config(folder)),
        dtype=MOMENTS_DTYPE,
        shape=next(tuple(shape) for shape in shapes if shape),
        size=size,
        num_frames=settings.frames.num_frames if settings.kind == "videos" else None,
        text_encoder=text,
        counts=Counts(
            examples=examples,
            items=plan["num_items"],
            skipped=sum(len(shard.skipped) for shard in facts),
        ),
        plan=plan,
        versions=package_versions(),
    )


def _read_finished(settings: CacheSettings, plan: dict[str, Any]) -> CacheReport | None:
    """What a complete dataset holds; None if it is not complete.

    Raises:
        CacheError: If it was built by another plan.
    """
    manifest = read_manifest(settings.output)
    if manifest is None:
        return None
    check_plan(manifest.plan or {}, plan, settings.output)
    counts = manifest.counts
    examples = manifest.datasets or {".": counts.examples or 0}
    found = {settings.output / name: count for name, count in examples.items()}
    return CacheReport(found, counts.items or 0, counts.skipped or 0)


def _ignore(done: int, total: int) -> None:
    """No progress bar."""
