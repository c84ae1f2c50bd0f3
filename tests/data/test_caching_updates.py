"""A source that changes: changes are noticed, and an update equals a fresh build."""

import json
import os
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from diffnext.data.caching import building, encoding
from diffnext.data.caching.building import build_cache
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.settings import FrameSampling
from diffnext.data.record_format import RecordError
from tests.data.caching_inputs import (
    Killed,
    draw_picture,
    make_settings,
    numbered_frames,
    read_files,
    run_with_kills,
    save_video_vae,
    write_pictures,
    write_video,
)

ROOT = Path(__file__).parents[2]
COUNT = 9  # items; chunks of 4, shards of 8


@pytest.fixture(autouse=True)
def shared_autoencoder(vae, monkeypatch):
    """Loaded once."""
    load = encoding.load_autoencoder
    model = load(vae)
    monkeypatch.setattr(
        encoding, "load_autoencoder", lambda path, *args: model if path == vae else load(path)
    )


def age(path):
    """Give a file another time, as copying does."""
    os.utime(path, ns=(1, 1_000_000_007 * len(os.fspath(path))))


def keep_times(folder, change):
    """Change files and set their times back, as tools that unpack do."""
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    change(folder)
    for path in folder.iterdir():
        os.utime(path, ns=(times[path.name],) * 2)


def swap(one, other):
    spare = one.with_name("spare")
    for old, new in ((one, spare), (other, one), (spare, other)):
        old.rename(new)


def make_alike(folder):
    """Files of one size and one time each, except the second, which is not a picture."""
    write_pictures(folder, COUNT, ".bmp")
    (folder / "0001.bmp").write_bytes(b"no picture")
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


# --- sources --------------------------------------------------------------------------------------


def write_folder(folder):
    write_pictures(folder, COUNT)
    return folder


def write_table(folder, suffix=".csv"):
    write_pictures(folder / "files", COUNT)
    for path in (folder / "files").glob("*.txt"):
        path.unlink()
    rows = [f"files/{number:04d}.png,row {number}" for number in range(COUNT)]
    (folder / "list.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    return folder / "list.csv"


def write_tar(folder):
    write_pictures(folder / "files", COUNT)
    pack(folder)
    return folder / "all.tar"


def pack(folder):
    with tarfile.open(folder / "all.tar", "w") as archive:
        for path in sorted((folder / "files").iterdir()):
            archive.add(path, path.name)


def write_parquet(folder, change=None):
    import pyarrow
    from pyarrow import parquet

    write_pictures(folder / "files", COUNT)
    numbers = [number for number in range(COUNT) if number != change]
    rows = [
        {"image": (folder / "files" / f"{n:04d}.png").read_bytes(), "caption": f"row {n}"}
        for n in numbers
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "list.parquet")
    return folder / "list.parquet"


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def copy_with_times(folder):
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def repack_without_times(folder):
    for path in (folder / "files").iterdir():
        age(path)
    pack(folder)


SOURCES = {
    "folder": write_folder,
    "table": write_table,
    "tar": write_tar,
    "parquet": write_parquet,
    "alike": make_alike,
}

# kind: (source, change, message)
CHANGES = {
    "a caption": ("folder", lambda f: (f / "0003.txt").write_text("new"), "1 changed (0003.png)"),
    "a picture": (
        "folder",
        lambda f: draw_picture(77).save(f / "0006.png"),
        "1 changed (0006.png)",
    ),
    "a picture that breaks": (
        "folder",
        lambda f: (f / "0000.png").write_bytes(b"no"),
        "1 changed (0000.png)",
    ),
    "a caption of the same size and time": (
        "alike",
        lambda f: keep_times(f, lambda f: edit(f / "0003.txt", "disc", "dish")),
        "1 changed (0003.bmp)",
    ),
    "pictures of the same size and time": (
        "alike",
        lambda f: swap(f / "0003.bmp", f / "0006.bmp"),
        "2 changed (0003.bmp, 0006.bmp)",
    ),
    "a bad file of the same size and time": (
        "alike",
        lambda f: keep_times(f, lambda f: (f / "0001.bmp").write_bytes(b"no Picture")),
        "1 changed (0001.bmp)",
    ),
    "a caption that goes": (
        "folder",
        lambda f: (f / "0008.txt").unlink(),
        "1 changed (0008.png)",
    ),
    "a side file that comes": (
        "folder",
        lambda f: (f / "0001.json").write_text('{"text": "short"}'),
        "1 changed (0001.png)",
    ),
    "a picture that goes": ("folder", lambda f: (f / "0002.png").unlink(), "1 removed (0002.png)"),
    "a picture in front": ("folder", lambda f: add_picture(f, "-new"), "1 added (-new.png)"),
    "pictures at the end": (
        "folder",
        lambda f: [add_picture(f, f"x{i}") for i in range(5)],
        "5 added (x0.png, x1.png, x2.png, ...)",
    ),
    "a picture of another name": (
        "folder",
        lambda f: [(f / f"0004{s}").rename(f / f"zebra{s}") for s in (".png", ".txt")],
        "1 added (zebra.png), 1 removed (0004.png)",
    ),
    "a caption in a table": (
        "table",
        lambda f: edit(f / "list.csv", "row 5", "other"),
        "1 changed (list.csv:7 files/0005.png)",
    ),
    "a row in front": (
        "table",
        lambda f: edit(f / "list.csv", "caption\n", "caption\nfiles/0000.png,again\n"),
        "1 changed (list.csv:2 files/0000.png), 9 added (list.csv:3 files/0000.png",
    ),
    "a file of a table": (
        "table",
        lambda f: draw_picture(78).save(f / "files" / "0007.png"),
        "1 changed (list.csv:9 files/0007.png)",
    ),
    "a member of an archive": (
        "tar",
        lambda f: [draw_picture(79).save(f / "files" / "0007.png"), pack(f)],
        "1 changed (all.tar/0007.png)",
    ),
    "a row of Parquet": (
        "parquet",
        lambda f: write_parquet(f, change=COUNT - 1),
        "1 removed (list.parquet:9)",
    ),
}
NO_CHANGES = {
    "times of files": ("folder", lambda f: [age(path) for path in f.iterdir()]),
    "a folder copied with the times of its files": ("alike", copy_with_times),
    "an archive packed anew": ("tar", repack_without_times),
    "Parquet written anew": ("parquet", write_parquet),
    "a table that gained a blank line": (
        "table",
        lambda f: (f / "list.csv").write_text((f / "list.csv").read_text() + "\n"),
    ),
}


def add_picture(folder, name):
    draw_picture(55).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(name)


def build_half(settings, monkeypatch):
    """A build that is killed when some chunks are complete."""
    calls = iter(range(100))
    make = building.make_records

    def deadly(*args):
        if next(calls) == 4:
            raise Killed
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(building, "make_records", deadly)
        with pytest.raises(Killed):
            build_cache(settings)


def count_encoded(monkeypatch):
    """A list that grows with every example that is encoded."""
    encoded = []
    make = building.make_records

    def counting(examples, *args):
        encoded.extend(examples)
        return make(examples, *args)

    monkeypatch.setattr(building, "make_records", counting)
    return encoded


@pytest.mark.parametrize("state", ["finished", "killed"])
@pytest.mark.parametrize("kind", CHANGES)
def test_changes_are_noticed_and_an_update_equals_a_fresh_build(
    tmp_path, vae, monkeypatch, kind, state
):
    name, change, message = CHANGES[kind]
    source = SOURCES[name](tmp_path / "in")
    settings = make_settings(source, tmp_path / "out", vae, workers=1)
    if state == "finished":
        build_cache(settings)
    else:
        build_half(settings, monkeypatch)
    before = read_files(tmp_path / "out")
    change(tmp_path / "in")
    is_built_yet = state == "finished" or kind not in LATE
    if is_built_yet:
        with pytest.raises(CacheError) as error:
            build_cache(settings)
        assert message in str(error.value) and "--update" in str(error.value)
        assert read_files(tmp_path / "out") == before
    encoded = count_encoded(monkeypatch)
    build_cache(make_settings(source, tmp_path / "out", vae, workers=1, update=True))
    if state == "finished":
        assert len(encoded) <= 5  # the others are copied
    build_cache(make_settings(source, tmp_path / "fresh", vae, workers=1))
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")


# Of items that the killed build had not reached; it reads them as they are.
LATE = ("a caption that goes",)


@pytest.mark.parametrize("kind", NO_CHANGES)
def test_what_only_looks_changed_is_not(tmp_path, vae, kind):
    name, change = NO_CHANGES[kind]
    source = SOURCES[name](tmp_path / "in")
    settings = make_settings(source, tmp_path / "out", vae, workers=1)
    report = build_cache(settings)
    before = read_files(tmp_path / "out")
    change(tmp_path / "in")
    assert build_cache(settings) == report
    assert read_files(tmp_path / "out") == before


def test_a_changed_video_is_noticed(tmp_path):
    pytest.importorskip("av")
    video_vae = save_video_vae(tmp_path / "vae")
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "in" / f"{name}.mp4", numbered_frames(8))
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    changes = {"kind": "videos", "frames": FrameSampling(num_frames=5, stride=1)}
    settings = make_settings(tmp_path / "in", tmp_path / "out", video_vae, **changes)
    build_cache(settings)
    write_video(tmp_path / "in" / "b.mp4", numbered_frames(8)[::-1])
    with pytest.raises(CacheError, match=r"1 changed \(b.mp4\)"):
        build_cache(settings)
    build_cache(make_settings(tmp_path / "in", tmp_path / "out", video_vae, update=True, **changes))
    build_cache(make_settings(tmp_path / "in", tmp_path / "fresh", video_vae, **changes))
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")


@pytest.mark.parametrize("sizes", [((32, 32),), ((32, 32), (32, 64))])
def test_an_update_killed_at_any_change_of_its_files_goes_on(tmp_path, vae, monkeypatch, sizes):
    source = write_folder(tmp_path / "in")
    settings = make_settings(source, tmp_path / "out", vae, workers=1, sizes=sizes, update=True)
    build_cache(settings)
    draw_picture(91, 96, 32).save(source / "0001.png")
    add_picture(source, "new")
    (source / "0004.png").unlink()
    assert run_with_kills(monkeypatch, partial(build_cache, settings)) > 10
    build_cache(make_settings(source, tmp_path / "fresh", vae, workers=1, sizes=sizes))
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")


def empty(path):
    path.write_bytes(b"")


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, empty, flip_a_byte])
@pytest.mark.parametrize("sizes", [((32, 32),), ((32, 32), (32, 64))])
def test_a_damaged_dataset_is_noticed_and_mended_by_an_update(tmp_path, vae, damage, sizes):
    source = write_folder(tmp_path / "in")
    settings = make_settings(source, tmp_path / "out", vae, workers=1, sizes=sizes)
    build_cache(settings)
    fresh = read_files(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    names = [n for n in fresh if Path(n).name not in ("manifest.json", "skipped.jsonl")]
    assert len(names) >= 6
    for name in names:
        damage(tmp_path / "out" / name)
        is_seen = damage is not flip_a_byte and not (damage is Path.unlink and "xxh3" in name)
        if is_seen:  # the others are seen by `diffnext inspect verify`, or by an update
            with pytest.raises(CacheError, match="--update (builds|reads)"):
                build_cache(settings)
        elif Path(name).suffix not in (".data", ".xxh3"):  # which an update reads in any case
            add_picture(source, "new")
            build_cache(replace(settings, update=True))
            (source / "new.png").unlink()
            (source / "new.txt").unlink(missing_ok=True)
        build_cache(replace(settings, update=True))
        assert read_files(tmp_path / "out") == fresh, name
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "copy", tmp_path / "out")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_text("[]"), "json: must hold key: value pairs; .*new folder"),
        (Path.unlink, "holds a dataset that lost its manifest.json: copy that file back, or"),
    ],
)
@pytest.mark.parametrize("update", [True, False])
def test_a_manifest_that_is_lost_or_damaged_stops_a_build(tmp_path, vae, damage, message, update):
    settings = make_settings(write_folder(tmp_path / "in"), tmp_path / "out", vae, update=update)
    build_cache(settings)
    damage(tmp_path / "out" / "manifest.json")
    with pytest.raises((CacheError, RecordError), match=message):
        build_cache(settings)


def test_bad_items_leave_the_others_as_they_would_be(tmp_path):
    """The same bytes, although they share other batches, chunks and shards."""
    write_pictures(tmp_path / "good", 21)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    for number in range(7):  # so one chunk has a single good picture
        (tmp_path / "bad" / f"0000_{number}.png").write_bytes(b"no picture")
    (tmp_path / "bad" / "0013_.png").write_bytes(b"no picture")
    vae = ROOT / "assets" / "vae-tiny"  # one whose latents depend on the size of a batch
    changes = {"batch_size": 8, "chunk_size": 8, "sizes": ((64, 64),)}
    build_cache(make_settings(tmp_path / "good", tmp_path / "one", vae, **changes))
    report = build_cache(make_settings(tmp_path / "bad", tmp_path / "two", vae, **changes))
    assert report.skipped == 8
    one, two = read_files(tmp_path / "one"), read_files(tmp_path / "two")
    records = {name for name in one if not name.endswith((".json", ".jsonl"))}
    assert len(records) == 10  # three shards and METADATA
    assert {name: one[name] for name in records} == {name: two.get(name) for name in records}


def test_an_update_with_other_settings_is_refused(tmp_path, vae):
    source = write_folder(tmp_path / "in")
    build_cache(make_settings(source, tmp_path / "out", vae, workers=1))
    with pytest.raises(CacheError, match="flip False -> True"):
        build_cache(make_settings(source, tmp_path / "out", vae, flip=True, update=True))


@pytest.mark.parametrize("function", ["make_records", "ItemReaders", "WorkFolder.begin"])
@pytest.mark.parametrize("state", ["finished", "killed"])
def test_an_update_that_was_cut_short_goes_on_with_the_same_settings_only(
    tmp_path, vae, monkeypatch, state, function
):
    source = write_folder(tmp_path / "in")
    settings = make_settings(source, tmp_path / "out", vae, workers=1, update=True)
    if state == "killed":
        build_half(settings, monkeypatch)
    else:
        build_cache(settings)
    add_picture(source, "new")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"{building.__name__}.{function}", Mock(side_effect=Killed))
        build_cache(settings)
    with pytest.raises(CacheError, match="flip False -> True"):
        build_cache(replace(settings, flip=True))
    build_cache(settings)
    build_cache(make_settings(source, tmp_path / "fresh", vae, workers=1))
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")


def test_a_build_does_not_begin_anew_while_another_process_works(tmp_path, vae, monkeypatch):
    source = write_folder(tmp_path / "in")
    settings = make_settings(source, tmp_path / "out", vae, workers=1)
    refused = []
    make = building.make_records

    def meanwhile(*args):
        if not refused:
            with pytest.raises(CacheError, match="is being built by another process") as error:
                build_cache(replace(settings, flip=True))
            refused.append(error)
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(building, "make_records", meanwhile)
        build_cache(settings)
    assert refused
    build_cache(make_settings(source, tmp_path / "fresh", vae, workers=1))
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")


def test_sources_lists_every_item_with_its_hash(tmp_path, vae):
    source = write_folder(tmp_path / "in")
    (source / "0003.png").write_bytes(b"no picture")
    build_cache(make_settings(source, tmp_path / "out", vae, workers=1))
    lines = Path(tmp_path / "out" / "sources.jsonl").read_text().splitlines()
    items = {line["source"]: line for line in map(json.loads, lines)}
    assert list(items) == [f"{number:04d}.png" for number in range(COUNT)]
    assert len({item["hash"] for item in items.values()}) == COUNT
    bad = items.pop("0003.png")
    assert bad["skipped"][0]["reason"].startswith("is not a picture")
    assert all(item["examples"] == {"32x32": 1} for item in items.values())
