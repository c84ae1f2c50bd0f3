"""Building a cache: latents of pictures or clips with their captions, as a record dataset.

    settings = CacheSettings(
        kind="images", source="photos", output=Path("img_dataset"), vae=Path("nova/vae"),
        sizes=((1024, 1024),),
    )
    report = build_cache(settings)

The same call continues a build that was killed, notices changes of the source, and shares the work
with other processes that build the same folder, on this machine or another. The result depends only
on the settings and the source, not on kills or the number of processes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffnext.data.caching.claims import POLL, Claims
from diffnext.data.caching.encoding import (
    LatentEncoder,
    TextStates,
    make_records,
    record_features,
    vae_folder,
)
from diffnext.data.caching.errors import CacheError, Skipped
from diffnext.data.caching.examples import Example, Reading
from diffnext.data.caching.items import Item
from diffnext.data.caching.motion import FLOW_UNIT
from diffnext.data.caching.provenance import (
    SOURCES_NAME,
    Changes,
    ItemFacts,
    PreviousRecords,
    find_changes,
    read_facts,
)
from diffnext.data.caching.readers import ItemReaders
from diffnext.data.caching.settings import CacheSettings, Size, format_size, parse_size
from diffnext.data.caching.sources import list_items
from diffnext.data.caching.work_folder import SKIPPED_NAME, ChunkWriter, WorkFolder
from diffnext.data.manifest import (
    MOMENTS_DTYPE,
    Counts,
    Manifest,
    TextFacts,
    VaeFacts,
    package_versions,
    read_manifest,
    write_manifest,
)
from diffnext.data.records import (
    RecordDataset,
    RecordError,
    find_damage,
    normalize_features,
    write_metadata,
)
from diffnext.models.autoencoders.loading import read_autoencoder_config
from diffnext.utils.weights_files import hash_weights

MAX_DIFFERENCES = 3  # named in a message

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CacheReport:
    """The result of a build.

    Attributes:
        datasets: Number of examples by folder.
        items: Items of the source.
        skipped: Number of items and examples that were left out.
        unread: Files of the source that are not known media, by suffix.
        notes: Assumptions about items, with the number of items.
        changes: Changes of the source that an update found.
    """

    datasets: dict[Path, int]
    items: int
    skipped: int
    unread: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    changes: Changes = Changes()

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(self.datasets.values())


def build_cache(settings: CacheSettings, on_progress: Progress | None = None) -> CacheReport:
    """Build a cache, continue one, or update one.

    With one size the output folder is the dataset, with several it holds a dataset for each. Beside
    the records it gets ``manifest.json``, ``sources.jsonl`` and ``skipped.jsonl``. Several
    processes may call this at once with the same settings; each returns when the dataset is
    complete.

    Args:
        settings: Settings of the build.
        on_progress: Called with the number of items that all processes have done, and of all items.

    Returns:
        The contents of the dataset.

    Raises:
        CacheError: If the build cannot continue; see the message.
        OSError: If writing fails; the same call continues.
    """
    listing = list_items(settings)
    items = listing.items
    plan = make_plan(settings)
    work = WorkFolder(settings, len(items))
    with work.claims() as claims:
        with claims.alone("plan"):
            changes = _prepare(settings, items, plan, work, claims)
            if changes is None:
                work.remove()  # what a kill left after the dataset was complete
            else:
                claims.join()
        if changes is not None:
            _build_chunks(settings, items, work, claims, on_progress or (lambda done, total: None))
            with claims.alone("plan"):
                if work.is_begun:
                    _finish(settings, work, plan)
    report = _read_report(settings)
    if report is None:
        skipped = next(
            f.skipped[0] for f in read_facts(settings.output / SOURCES_NAME) if f.skipped
        )
        raise CacheError(
            f"none of the {len(items)} items can be used: see {settings.output / SKIPPED_NAME}; "
            f"{skipped.source}: {skipped.reason}"
        )
    return replace(report, unread=listing.unread, changes=changes or Changes())


def make_plan(settings: CacheSettings) -> dict[str, Any]:
    """All settings that the content of the dataset depends on."""
    plan = settings.describe()
    plan["vae_hash"] = hash_weights(vae_folder(settings))
    if settings.text_encoder is not None:
        folder = settings.text_encoder / "text_encoder"
        if not folder.is_dir():
            raise CacheError(f"text_encoder: {settings.text_encoder} has no folder text_encoder")
        plan["text_encoder_hash"] = hash_weights(folder)
    return plan


def _prepare(
    settings: CacheSettings,
    items: list[Item],
    plan: dict[str, Any],
    work: WorkFolder,
    claims: Claims,
) -> Changes | None:
    """Begin or continue a build; returns None if it is finished and nothing changed.

    Raises:
        CacheError: If it was begun with other settings, the source changed and ``update`` is
            False, or another process builds something else there.
    """
    manifest = read_manifest(settings.output)
    changes = Changes()
    if manifest is not None:
        _check_plan(manifest.plan or {}, plan, settings.output)
        if not work.is_being_set_aside:
            try:
                facts = _read_finished(settings, manifest)
            except (RecordError, OSError) as error:
                remedy = "--update builds again what cannot be read"
                _check_update(settings, f"{settings.output} is damaged: {error}; {remedy}")
            else:
                changes = find_changes([item.source for item in facts], facts, items)
                if not changes and not (settings.update and _has_damage(settings, manifest)):
                    return None
                _check_update(settings, _describe_changes(settings, changes))
    elif work.is_begun:
        begun = work.plan()
        if work.built_chunks():
            _check_plan(begun, plan, settings.output)
        changes = find_changes(work.names(), work.built_facts(), items)
        if begun == plan and not changes:
            return Changes()
        if work.built_chunks():
            _check_update(settings, _describe_changes(settings, changes))
    previous = work.previous_plan()
    if previous is not None:
        _check_plan(previous, plan, settings.output)
    if not claims.is_alone():
        raise CacheError(
            f"{settings.output} is being built by another process, with other settings or from "
            "other files: wait until it is through"
        )
    work.set_aside()
    work.begin(plan, [item.name for item in items])
    return changes


def _read_finished(settings: CacheSettings, manifest: Manifest) -> list[ItemFacts]:
    """The facts about the items of a finished dataset, whose files are all there.

    Raises:
        RecordError: If a file is damaged.
        OSError: If it is missing.
    """
    for folder, count in _count_examples(settings, manifest).items():
        with RecordDataset(folder) as records:
            if len(records) != count:
                raise RecordError(f"{folder} has {len(records)} examples in place of {count}")
    return list(read_facts(settings.output / SOURCES_NAME))


def _has_damage(settings: CacheSettings, manifest: Manifest) -> bool:
    """Whether a record of a finished dataset has no checksum, or another one."""
    return any(True for folder in _count_examples(settings, manifest) for _ in find_damage(folder))


def _describe_changes(settings: CacheSettings, changes: Changes) -> str:
    return (
        f"{settings.source} is not what it was when {settings.output} was built: {changes}; "
        "--update reads these items again and keeps the others"
    )


def _check_update(settings: CacheSettings, reason: str) -> None:
    if not settings.update:
        raise CacheError(reason)


def _check_plan(begun: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Check that a build continues with the settings it was begun with.

    Raises:
        CacheError: Naming what differs.
    """
    names = [name for name in {**begun, **wanted} if begun.get(name) != wanted.get(name)]
    if names:
        changes = [f"{n} {begun.get(n)!r:.80} -> {wanted.get(n)!r:.80}" for n in names]
        raise CacheError(
            f"{output} was begun with other settings: {'; '.join(changes[:MAX_DIFFERENCES])}; "
            "continue with the same, or name a new folder"
        )


def _build_chunks(
    settings: CacheSettings,
    items: list[Item],
    work: WorkFolder,
    claims: Claims,
    on_progress: Progress,
) -> None:
    """Build chunks until all exist, with those of other processes."""
    if not _missing_chunks(work):
        on_progress(len(items), len(items))
        return
    previous = PreviousRecords(work.previous_parts())
    with ItemReaders(settings) as readers:
        builder = _ChunkBuilder(settings, work, previous)
        on_progress(_count_done(work), len(items))  # the speed is measured from here on
        while missing := _missing_chunks(work):
            done = _count_done(work)
            is_idle = True
            tasks = _choose_tasks(missing, items, work, claims, previous)
            for (chunk, is_last), read in readers.read(tasks):
                is_idle = False
                builder.add(chunk, read)
                done += 1
                if is_last:
                    builder.finish()
                    claims.give_back(_claim(chunk))
                    done = _count_done(work)
                on_progress(done, len(items))
            if is_idle:  # other processes build the rest, and may die
                time.sleep(POLL)
                on_progress(_count_done(work), len(items))


def _missing_chunks(work: WorkFolder) -> list[int]:
    """Chunks that are not built; none when another process has finished the dataset."""
    missing = sorted(set(range(work.num_chunks)) - work.built_chunks())
    return missing if work.is_begun else []


def _count_done(work: WorkFolder) -> int:
    return sum(len(work.items_of(chunk)) for chunk in work.built_chunks())


def _claim(chunk: int) -> str:
    return f"chunk-{chunk:08d}"


def _choose_tasks(
    missing: list[int],
    items: list[Item],
    work: WorkFolder,
    claims: Claims,
    previous: PreviousRecords,
) -> Iterator[tuple[tuple[int, bool], Item | ItemFacts]]:
    """The items of missing chunks that nobody else builds.

    Yields:
        The number of its chunk, whether it is the last of the chunk, and the item, or the facts
        about it if its records can be copied.
    """
    for chunk in missing:
        if not claims.take(_claim(chunk)):
            continue
        # The order counts: a process that finishes the dataset removes the plan before the chunks.
        if work.chunk_folder(chunk).is_dir() or not work.is_begun:  # another process was faster
            claims.give_back(_claim(chunk))
            continue
        places = work.items_of(chunk)
        for place in places:
            yield (chunk, place == places[-1]), previous.find(items[place]) or items[place]


class _ChunkBuilder:
    """Encodes the examples of chunks, in batches of one size, and copies known records.

    Args:
        settings: Settings of the build.
        work: State of the build.
        previous: Records that can be copied.
    """

    def __init__(
        self, settings: CacheSettings, work: WorkFolder, previous: PreviousRecords
    ) -> None:
        self._settings = settings
        self._work = work
        self._previous = previous
        self._encoder = LatentEncoder(settings)
        text_encoder = settings.text_encoder
        self._text_states = TextStates(text_encoder, settings) if text_encoder else None
        self._features = record_features(settings)
        self._writer: ChunkWriter | None = None
        self._facts: list[ItemFacts] = []
        # By size: examples to encode, and records that are copied, in their order.
        self._waiting: dict[str, list[tuple[ItemFacts, Example | dict[str, Any]]]] = {}

    def add(self, chunk: int, read: Reading | ItemFacts) -> None:
        """Take an item that was read, or the facts about one whose records are copied.

        Raises:
            CacheError: If it is bad, and ``on_error`` is "stop".
        """
        if self._writer is None:
            self._writer = ChunkWriter(self._work, chunk, self._features)
        if isinstance(read, ItemFacts):
            self._facts.append(read)
            for size, record in self._previous.read(read):
                self._wait(read, size, record)
            return
        self._facts.append(read.facts)
        for skipped in read.facts.skipped:
            self._check_skipped(skipped)
        for example in read.examples:
            self._wait(read.facts, format_size(example.size), example)

    def finish(self) -> None:
        """Encode the rest, and complete the chunk."""
        for size in list(self._waiting):
            self._flush(size)
        if self._writer is not None:
            self._writer.commit(self._facts)
        self._writer = None
        self._facts = []

    def _wait(self, facts: ItemFacts, size: str, example: Example | dict[str, Any]) -> None:
        """Keep an example, or a record that is copied, until its batch is full."""
        waiting = self._waiting.setdefault(size, [])
        waiting.append((facts, example))
        if sum(isinstance(other, Example) for _, other in waiting) == self._settings.batch_size:
            self._flush(size)

    def _flush(self, size: str) -> None:
        waiting = self._waiting.pop(size)
        fresh = [example for _, example in waiting if isinstance(example, Example)]
        made = iter(
            make_records(fresh, self._settings, self._encoder, self._text_states) if fresh else ()
        )
        for facts, example in waiting:
            record = next(made) if isinstance(example, Example) else example
            if isinstance(record, Skipped):
                self._check_skipped(record)
                facts.skipped.append(record)
            elif self._writer is not None:
                self._writer.write(size, record)
                if isinstance(example, Example):
                    facts.examples[size] = facts.examples.get(size, 0) + 1

    def _check_skipped(self, skipped: Skipped) -> None:
        if self._settings.on_error == "stop":
            raise CacheError(f"{skipped.source}: {skipped.reason}")


def _finish(settings: CacheSettings, work: WorkFolder, plan: dict[str, Any]) -> None:
    """Join the chunks to shards, and complete the datasets; the manifest comes last."""
    skipped = work.write_lists()
    totals = work.join()
    features = normalize_features(record_features(settings))
    examples = {name: count for name, count in totals.items() if count}
    counts = Counts(items=work.num_items, skipped=skipped)
    for name, count in examples.items():
        write_metadata(work.datasets[name], count, features)
        own = replace(counts, examples=count)
        manifest = _make_manifest(settings, plan, parse_size(name), work.datasets[name], own)
        write_manifest(work.datasets[name], manifest)
    if examples and len(settings.sizes) > 1:
        write_manifest(settings.output, Manifest(datasets=examples, plan=plan, counts=counts))
    work.remove()


def _make_manifest(
    settings: CacheSettings, plan: dict[str, Any], size: Size, dataset: Path, counts: Counts
) -> Manifest:
    folder = vae_folder(settings)
    text = None
    if settings.text_encoder is not None:
        text = TextFacts(hash=plan["text_encoder_hash"], max_tokens=settings.text_length)
    with RecordDataset(dataset) as records:
        shape = tuple(records.view(0)["shape"])
    is_video = settings.kind == "videos"
    return Manifest(
        kind=settings.kind,
        vae_hash=plan["vae_hash"],
        vae=VaeFacts(folder=str(folder.absolute()), config=read_autoencoder_config(folder)),
        dtype=MOMENTS_DTYPE,
        shape=shape,
        size=size,
        num_frames=settings.frames.num_frames if is_video else None,
        flow_unit=FLOW_UNIT if is_video else None,
        text_encoder=text,
        counts=counts,
        plan=plan,
        versions=package_versions(),
    )


def _read_report(settings: CacheSettings) -> CacheReport | None:
    """The contents of a complete dataset; None if it is not complete."""
    manifest = read_manifest(settings.output)
    if manifest is None:
        return None
    counts = manifest.counts
    datasets = _count_examples(settings, manifest)
    sources = read_facts(settings.output / SOURCES_NAME)
    notes = Counter(note for facts in sources for note in facts.notes)
    return CacheReport(datasets, counts.items or 0, counts.skipped or 0, notes=dict(notes))


def _count_examples(settings: CacheSettings, manifest: Manifest) -> dict[Path, int]:
    """Number of examples by folder."""
    examples = manifest.datasets or {".": manifest.counts.examples or 0}
    return {settings.output / name: count for name, count in examples.items()}
