"""One bad item of a source is one skipped item, and the rest is read."""

import glob
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import time
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffnext.data.caching import media
from diffnext.data.caching.building import build_cache
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.examples import read_item
from diffnext.data.caching.media import describe_unread
from diffnext.data.caching.settings import Columns
from diffnext.data.caching.sources import list_items
from diffnext.data.records import RecordDataset
from diffnext.utils import pictures
from tests.data.caching_inputs import (
    draw_picture,
    make_settings,
    write_pictures,
)

SECONDS = 5
BLOCK = tarfile.BLOCKSIZE
NAMES = ["0000.png", "0001.png", "0002.png"]
CAPTIONS = [f"Picture {number}. It has a disc." for number in range(3)]


def picture_bytes(number):
    buffer = io.BytesIO()
    draw_picture(number).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = [(picture_bytes(number), CAPTIONS[number]) for number in range(3)]
GOOD_ROWS = list(zip(NAMES, CAPTIONS, strict=True))


def read_source(source, **changes):
    """Pixels and caption of each item that is fine, and the problem of each other."""
    settings = make_settings(source, "out", "vae", **changes)
    fine, problems = [], []
    for item in list_items(settings).items:
        reading = read_item(item, settings)
        problems += [skipped.reason for skipped in reading.facts.skipped]
        fine += [(e.pixels.tobytes(), e.annotation.caption) for e in reading.examples]
    return fine, problems


@contextmanager
def bounded(megabytes=500):
    """What is done within takes neither long nor much memory."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = peak_memory(), time.perf_counter()
    work = sum(os.times()[:4])  # of this process and its children
    yield
    assert sum(os.times()[:4]) - work < SECONDS
    assert time.perf_counter() - started < 10 * SECONDS  # others may work as well
    assert peak_memory() - before < megabytes


def peak_memory():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024


def check_rest(source, reasons, tmp_path, **changes):
    """All that is good comes out, and the bad has its reasons."""
    with bounded():
        fine, problems = read_source(source, **changes)
    write_pictures(tmp_path / "reference", 3)
    assert fine == read_source(tmp_path / "reference")[0]
    assert len(problems) == len(reasons), problems
    for problem, reason in zip(problems, reasons, strict=True):
        assert re.search(reason, problem), problem


# --- archives -------------------------------------------------------------------------------------


def member(name, content=b"", **attributes):
    """The bytes of a member of an archive."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for attribute, value in attributes.items():
        setattr(header, attribute, value)
    padding = bytes(-len(content) % BLOCK)
    return header.tobuf(tarfile.GNU_FORMAT) + content + padding


def good(number, picture_folder="", caption_folder="", member=member):
    content, caption = GOOD[number]
    picture = member(f"{picture_folder}{NAMES[number]}", content)
    return picture + member(f"{caption_folder}{number:04d}.txt", caption.encode())


def with_checksum(header):
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def header_of(name, kind=b"0", size=b"%011o\0" % 0):
    """A header with any bytes for a size."""
    header = bytearray(member(name)[:BLOCK])
    header[124:136] = size
    header[156:157] = kind
    return with_checksum(header)


def binary_size(size):
    return size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")


def extended(records, name="bad.png", content=b"x" * 600):
    """A member after a header of the pax format."""
    records += bytes(-len(records) % BLOCK)
    return header_of("x", b"x", b"%011o\0" % len(records)) + records + member(name, content)


def record(key, value):
    line = b" %s=%s\n" % (key, value)
    length = len(line) + 1
    while len(b"%d" % length) + len(line) != length:
        length += 1
    return b"%d" % length + line


def broken_header():
    damaged = bytearray(member("bad.png", b"x" * 700))
    damaged[3:50] = b"\xff" * 47
    return bytes(damaged)


SPARSE = (
    record(b"GNU.sparse.major", b"1")
    + record(b"GNU.sparse.minor", b"0")
    + record(b"GNU.sparse.name", b"bad.png")
    + record(b"GNU.sparse.realsize", b"99999999999")
)
END = bytes(2 * BLOCK)
WRONG_SIZE = "damaged or cut off: .* of -?[0-9]+ bytes"
NO_MEMBER = "the archive is damaged: [0-9]+ bytes hold no member"

# Bytes between the first and the second picture of an archive, and the reasons they give.
ARCHIVES = {
    "huge size": (header_of("bad.png", size=binary_size(2**62)), [WRONG_SIZE]),
    "size beyond 64 bits": (header_of("bad.png", size=binary_size(2**86)), [WRONG_SIZE]),
    "size of a terabyte": (header_of("bad.png", size=binary_size(2**40)), [WRONG_SIZE]),
    "negative size": (header_of("bad.png", size=binary_size(-5000)), [WRONG_SIZE]),
    "size of -1": (header_of("bad.png", size=b"\xff" * 12), [WRONG_SIZE]),
    "size that is no number": (header_of("bad.png", size=b"zzzzzzzzzzz\0"), [NO_MEMBER]),
    "size of another file": (header_of("bad.txt", size=binary_size(2**62)), [WRONG_SIZE]),
    "damaged header": (broken_header(), [NO_MEMBER]),
    "zeros over a header": (bytes(3 * BLOCK) + b"x" * BLOCK, [NO_MEMBER]),
    "noise": (bytes(range(1, 251)) * 41, [NO_MEMBER]),
    "an end, then more": (END, []),
    "a whole archive's end": (bytes(20 * BLOCK), []),
    "an odd number of bytes": (b"x" * 1001, [NO_MEMBER]),
    "pax: negative size": (extended(record(b"size", b"-7000")), [WRONG_SIZE]),
    "pax: huge size": (extended(record(b"size", b"9" * 30)), [WRONG_SIZE]),
    "pax: size of nonsense": (extended(record(b"size", b"many")), ["not a picture", NO_MEMBER]),
    "pax: length of nonsense": (extended(b"0 path=x.png\n"), [NO_MEMBER, "not a picture"]),
    "pax: huge length": (
        extended(b"9" * 5000 + b" path=x.png\n"),
        [NO_MEMBER, "not a picture"],
    ),
    "pax: no records": (extended(b"\xff" * 100), ["not a picture"]),
    "pax: times of nonsense": (extended(record(b"mtime", b"never")), ["not a picture"]),
    "pax: claims gigabytes": (header_of("x", b"x", b"77777777777\0"), [NO_MEMBER]),
    "pax: sparse of nonsense": (
        extended(SPARSE, content=b"7\n" + b"x" * 40_000),
        [NO_MEMBER, "not a picture"],
    ),
    "names of names": (
        (header_of("x", b"L", b"%011o\0" % BLOCK) + b"x" * BLOCK) * 2000 + bytes(BLOCK),
        [NO_MEMBER],
    ),
    "a name of gigabytes": (header_of("x", b"L", binary_size(2**50)), [NO_MEMBER]),
    "sparse": (header_of("bad.png", b"S"), ["not a regular file"]),
    "link": (header_of("bad.png", b"2"), ["is a link"]),
    "hard link": (header_of("bad.png", b"1"), ["is a link"]),
    "device": (header_of("bad.png", b"3"), ["not a regular file"]),
    "pipe": (header_of("bad.png", b"6"), ["not a regular file"]),
    "folder": (header_of("bad.png/", b"5"), []),
    "unknown type": (header_of("bad.png", b"Z"), ["not a regular file"]),
    "leads out": (member("../bad.png", b"x"), ["leads out of the archive"]),
    "absolute": (member("/bad.png", b"x"), ["leads out of the archive"]),
    "the same name": (member("0000.png", GOOD[0][0]), ["the same name as an item before it"]),
    "name that is not UTF-8": (member("bad\udcff.png", b"x"), ["no caption"]),
    "name of 10000 characters": (member("x" * 10_000 + ".png", b"x"), ["no caption"]),
    "name of a system": (member("__MACOSX/._0000.png", b"x"), []),
    "empty": (member("bad.png"), ["no caption"]),
    "other files": (member("cat.heic", b"x") + member("README", b"x"), []),
}
# These hide that they have no caption by being no picture either.
CAPTIONED = member("bad.txt", b"a caption")


@pytest.mark.parametrize("kind", ARCHIVES)
def test_one_bad_member_is_one_skipped_item(tmp_path, kind):
    bad, reasons = ARCHIVES[kind]
    if any("not a picture" in reason for reason in reasons):
        bad += CAPTIONED
    content = good(0) + bad + good(1) + good(2) + END
    (tmp_path / "a.tar").write_bytes(content)
    check_rest(tmp_path / "a.tar", reasons, tmp_path)


def test_a_header_for_all_members_renames_none(tmp_path):
    records = record(b"path", b"one.png") + record(b"size", b"3")
    records += bytes(-len(records) % BLOCK)
    everything = header_of("g", b"g", b"%011o\0" % len(records)) + records
    (tmp_path / "a.tar").write_bytes(everything + good(0) + good(1) + good(2) + END)
    check_rest(tmp_path / "a.tar", [], tmp_path)


def version_7(name, content):
    """A member as tar wrote it before headers had a mark."""
    written = member(name, content)
    header = bytearray(written[:BLOCK])
    header[257:500] = bytes(243)
    return with_checksum(header) + written[BLOCK:]


OLD_PICTURE, OLD_CAPTION = member("0001.png", GOOD[0][0]), member("0001.txt", b"not yet")
SOUND_ARCHIVES = {  # what is in them before the last picture, and what is listed as left out
    "a caption that was replaced": (good(0) + OLD_CAPTION + good(1), []),
    "a picture that was replaced": (good(0) + OLD_PICTURE + OLD_CAPTION + good(1), ["same name"]),
    "pictures in ./": (good(0, "./", "") + good(1, "./", ""), []),
    "captions in ./": (good(0, "", "./") + good(1, "", "./"), []),
    "an archive of version 7 with another in it": (
        good(0, member=version_7) + version_7("in.tar", good(1)) + good(1, member=version_7),
        [],
    ),
}


@pytest.mark.parametrize("kind", SOUND_ARCHIVES)
def test_archives_mean_what_they_mean_to_tar(tmp_path, kind):
    content, reasons = SOUND_ARCHIVES[kind]
    (tmp_path / "a.tar").write_bytes(content + good(2) + END)
    check_rest(tmp_path / "a.tar", reasons, tmp_path)


@pytest.mark.parametrize("missing", [1, 97, 200, BLOCK, 3000, 3500])
def test_an_archive_joined_to_one_that_is_cut_off_is_read(tmp_path, missing):
    cut_off = good(0) + member("bad.png", b"x" * 4096)[:-missing]
    (tmp_path / "a.tar").write_bytes(cut_off + good(1) + good(2) + END)
    check_rest(tmp_path / "a.tar", [f"{4096 - missing} of 4096 bytes"], tmp_path)


@pytest.mark.parametrize(
    "last, reason",
    [
        (member("bad.png", b"x" * 4000)[:3000], "2488 of 4000 bytes"),
        (member("bad.png", b"x" * 4000)[: BLOCK + 4000], "no caption"),  # just its padding is gone
        (header_of("bad.png")[:-1], NO_MEMBER),
        (b"x", NO_MEMBER),
    ],
)
def test_an_archive_that_is_cut_off_gives_what_is_before(tmp_path, last, reason):
    (tmp_path / "a.tar").write_bytes(good(0) + good(1) + good(2) + last)
    check_rest(tmp_path / "a.tar", [reason], tmp_path)


def test_members_are_read_where_they_lie(tmp_path):
    """A member of gigabytes, most of it a hole, does not go through memory."""
    size = 3 * 2**30
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(good(0) + header_of("bad.png", size=binary_size(size)))
        file.seek(size, os.SEEK_CUR)
        file.write(member("bad.txt", b"zeros") + good(1) + good(2) + END)
    check_rest(tmp_path / "a.tar", ["not a picture"], tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no images"),
        (END, "holds no images"),
        (b"\x1f\x8b" + bytes(100), "not a readable uncompressed tar file: `gunzip` it"),
        (b"PK\3\4" + bytes(100), "`unzip` it"),
        (b"<html>" * 1000, "not a readable uncompressed tar file"),
        (member("cat.heic") + END, "no images; 1 .heic file was not read: pip install pillow-heif"),
        (member("/bad.png") + END, "leads out of the archive"),
    ],
)
def test_an_archive_without_pictures_is_an_error(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(CacheError, match=message):
        read_source(tmp_path / "a.tar")


def test_an_unreadable_archive_among_others_is_one_skipped_item(tmp_path):
    (tmp_path / "a.tar").write_bytes(good(0) + good(1) + END)
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    (tmp_path / "c.tar").mkdir()
    (tmp_path / "d.tar").write_bytes(b"")
    (tmp_path / "e.tar").write_bytes(good(2) + END)
    os.mkfifo(tmp_path / "f.tar")
    reasons = ["`gunzip` it", "not a regular file", "not a regular file"]
    check_rest(tmp_path, reasons, tmp_path)


# --- tables of text -------------------------------------------------------------------------------


def save_table(folder, name, content):
    write_pictures(folder, 3)
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "bad.png").write_bytes(picture_bytes(7))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def json_row(number):
    return json.dumps({"file_name": NAMES[number], "caption": CAPTIONS[number]})


JSON_LINES = {
    "not JSON": ('{"file_name": "bad.png", "caption": ', ["is not a line of JSON"]),
    "a list": ('["bad.png", "caption"]', ["is not a JSON object"]),
    "a number": ("17", ["is not a JSON object"]),
    "nested beyond the stack": ("[" * 100_000, ["is not a line of JSON"]),
    "nested caption": (
        '{"file_name": "bad.png", "caption": ' + "[" * 900 + "]" * 900 + "}",
        ["the caption must be text or a number, got list"],
    ),
    "number of digits without end": (
        '{"file_name": "bad.png", "caption": ' + "9" * 10_000 + "}",
        ["is not a line of JSON: Exceeds the limit"],
    ),
    "huge number": ('{"file_name": "bad.png", "caption": 1e999}', ["must be text, got float"]),
    "NaN": ('{"file_name": "bad.png", "caption": NaN}', ["no caption"]),
    "no file": ('{"caption": "x"}', ["no file in its column"]),
    "file that is a number": ('{"file_name": 3, "caption": "x"}', ["no file in its column"]),
    "file with a NUL": ('{"file_name": "bad\\u0000.png", "caption": "x"}', ["cannot be opened"]),
    "file that is half a character": ('{"file_name": "\\ud800", "caption": "x"}', ["be opened"]),
    "missing file": ('{"file_name": "none.png", "caption": "x"}', ["No such file"]),
    "a folder": ('{"file_name": ".", "caption": "x"}', ["is not a regular file"]),
    "caption that is not UTF-8": (
        b'{"file_name": "bad.png", "caption": "caf\xe9"}',
        ["the caption is not UTF-8"],
    ),
    "caption without end": (
        '{"file_name": "bad.png", "caption": "' + "x" * 20_000 + '"}',
        ["the caption has 20000 characters"],
    ),
    "a line without end": ("x" * (2**24 + 99), ["is longer than 16777216 characters"]),
    "the same row": (json_row(0), ["the same file and caption as row 1"]),
    "blank lines": (" \n\r\n\t", []),
}


@pytest.mark.parametrize("kind", JSON_LINES)
def test_one_bad_line_of_json_is_one_skipped_item(tmp_path, kind):
    bad, reasons = JSON_LINES[kind]
    bad = bad if isinstance(bad, bytes) else bad.encode()
    lines = [json_row(0).encode(), bad, json_row(1).encode(), json_row(2).encode()]
    table = save_table(tmp_path / "in", "list.jsonl", b"\n".join(lines))
    check_rest(table, reasons, tmp_path)


def test_of_two_values_of_one_name_the_last_counts(tmp_path):
    lines = [json_row(0), json_row(1), json_row(2)]
    lines[1] = lines[1].replace("{", '{"caption": "another", ')
    table = save_table(tmp_path / "in", "list.jsonl", "\n".join(lines))
    check_rest(table, [], tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["list.jsonl", "list.csv"])
def test_tables_tell_their_encoding_by_a_mark(tmp_path, encoding, name):
    rows = [json_row(number) for number in range(3)]
    if name == "list.csv":
        rows = ["file_name,caption", *map(",".join, zip(NAMES, CAPTIONS, strict=True))]
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    table = save_table(tmp_path / "in", name, (mark + "\r\n".join(rows)).encode(encoding))
    check_rest(table, [], tmp_path)


CSV_ROWS = {
    "quote that is not closed": ('bad.png,"a caption', ["quotation mark"]),
    "quote too many": ('bad.png,"a" caption', ["quotation mark"]),
    "quote within quotes": ('bad.png,"a "good" caption"', ["quotation mark"]),
    "too few cells": ("bad.png", ["has 1 cells, the header 2"]),
    "too many cells": ("bad.png,a,caption", ["has 3 cells, the header 2"]),
    "NUL": ("bad.png,a\0caption", ["holds a NUL character"]),
    "caption that is not UTF-8": (b"bad.png,caf\xe9", ["the caption is not UTF-8"]),
    "no caption": ("bad.png,", ["no caption"]),
    "no file": (",caption", ["no file in its column"]),
    "caption without end": ("bad.png," + "x" * 20_000, ["the caption has 20000 characters"]),
    "field without end": ('bad.png,"' + "x" * (2**24 + 99) + '"', ["longer than|quotation mark"]),
    "blank lines": ("\n\r\n", []),
}


@pytest.mark.parametrize("kind", CSV_ROWS)
def test_one_bad_row_is_one_skipped_item(tmp_path, kind):
    bad, reasons = CSV_ROWS[kind]
    bad = bad if isinstance(bad, bytes) else bad.encode()
    rows = [f"{NAMES[number]},{CAPTIONS[number]}".encode() for number in range(3)]
    content = b"\n".join([b"file_name,caption", rows[0], bad, rows[1], rows[2]])
    table = save_table(tmp_path / "in", "list.csv", content)
    check_rest(table, reasons, tmp_path)


@pytest.mark.parametrize(
    "opening, closing",
    [
        ('bad.png,"a caption', 'bad.png,"another"'),
        ('bad.png,"a caption', 'bad.png,5"'),
        ('bad.png,"a caption', 'bad.png,5", or 6'),
        ('"bad.png,a caption', '"bad.png",another'),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_other_row(tmp_path, opening, closing):
    rows = [",".join(row) for row in zip(NAMES, CAPTIONS, strict=True)]
    lines = ["file_name,caption", rows[0], opening, rows[1], closing, rows[2]]
    table = save_table(tmp_path / "in", "list.csv", "\n".join(lines) + "\n")
    fine, problems = read_source(table)
    assert [caption for _, caption in fine if caption in CAPTIONS] == CAPTIONS
    assert "quotation mark" in problems[0]


def test_captions_of_several_lines_are_read(tmp_path):
    rows = [
        f'{name},"{caption}\nIt has, ""so to speak"",\n\na.png.\n"' for name, caption in GOOD_ROWS
    ]
    table = save_table(tmp_path / "in", "list.csv", "\r\n".join(["file_name,caption", *rows]))
    fine, problems = read_source(table)
    assert not problems
    ending = '\nIt has, "so to speak",\n\na.png.'
    assert [caption for _, caption in fine] == [caption + ending for caption in CAPTIONS]


@pytest.mark.parametrize(
    "header, row",
    [
        ("file_name, caption", '{}, "{}"'),
        ("caption;file_name", '"{1}";{0}'),
        ("file_name\tcaption", "{}\t{}"),
        ("file_name|caption|width", "{}|{}|3"),
        ("\r\nfile_name,caption", "{},{}"),
        (",file_name,,caption", "0,{},,{}"),
        ("file_name;caption;a,b,c,d", "{};{};3"),
        ("file_name\tcaption\ta,b,c,d;e;f;g", "{}\t{}\t3"),
    ],
)
@pytest.mark.parametrize("name", ["list.csv", "list.tsv"])
def test_csv_has_dialects(tmp_path, name, header, row):
    rows = [row.format(*names) for names in GOOD_ROWS]
    table = save_table(tmp_path / "in", name, "\r\n".join([header, *rows]))
    check_rest(table, [], tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "0000.png,a caption\n", "the first row must name the columns"),
        ("a.csv", "file_name,caption,caption\n", "more than one column 'caption'"),
        ("a.csv", "file_name,caption\n".encode("utf-16-le"), "as UTF-16 does: save it as UTF-8"),
        ("a.csv", '"file_name,caption\n0000.png,x\n', "no header"),
        ("a.csv", "\n\n", "no header"),
        ("a.csv", "", "no header"),
        ("a.csv", "file_name,caption\n", "holds no images"),
        ("a.csv", "text\na caption\n", "no column 'file_name' or .*; it has text"),
        ("a.jsonl", '[\n  {"file_name": "0000.png"}\n]', "is one JSON list.* `jq -c"),
        ("a.jsonl", '[{"file_name": "0000.png"}]', "is one JSON list"),
        ("a.json", '[{"file_name": "0000.png"}]', "is one JSON list"),
        ("a.jsonl", "\n", "no line with a JSON object"),
        ("a.jsonl", '{\n  "file_name": "0000.png"\n}', "no line with a JSON object"),
        (
            "a.jsonl",
            '{"name": "0000.png"}\n' * 9,
            "no column 'file_name' or .*; it has name; --media-column",
        ),
        ("a.jsonl", '{"file_name": ""}', "a.jsonl:1: no file in its column"),
        ("a.zip", b"PK", "a.zip is not a kind of source that is read: unpack them"),
        ("a.mp4", b"", "`diffnext cache videos` reads them"),
    ],
)
def test_a_table_that_means_nothing_is_an_error_that_says_what_to_do(
    tmp_path, name, content, message
):
    table = save_table(tmp_path / "in", name, content)
    with pytest.raises(CacheError, match=message):
        read_source(table)


def test_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    os.mkfifo(tmp_path / "b.jsonl")
    os.mkfifo(tmp_path / "c.parquet")
    for name in ["a.csv", "b.jsonl", "c.parquet"]:
        with pytest.raises(CacheError, match="is not a regular file"):
            read_source(tmp_path / name)


def test_tables_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ["a", "b"]:
        save_table(tmp_path / folder, "list.jsonl", json_row(0))
    items = list_items(make_settings(tmp_path / "*" / "list.jsonl", "out", "vae")).items
    assert [item.name for item in items] == ["a/list.jsonl:1 0000.png", "b/list.jsonl:1 0000.png"]


def test_an_unreadable_table_among_others_is_one_skipped_item(tmp_path):
    save_table(tmp_path / "in", "a.jsonl", json_row(0) + "\n" + json_row(1))
    save_table(tmp_path / "in", "b.jsonl", "[\n]")
    save_table(tmp_path / "in", "c.jsonl", json_row(2))
    (tmp_path / "in" / "d.jsonl").symlink_to("/proc/self/mem")
    reasons = ["is one JSON list", "Input/output error"]
    check_rest(tmp_path / "in" / "*.jsonl", reasons, tmp_path)


# --- Parquet --------------------------------------------------------------------------------------


def write_parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)


def insert(cells, bad):
    return [cells[0], bad, *cells[1:]]


def arrow_cells(cells, kind=None):
    pyarrow = pytest.importorskip("pyarrow")
    array = pyarrow.array(cells)
    return array if kind is None else array.cast("int64").cast(kind)


def not_utf8():
    """Captions of which one is not UTF-8, in a column that says that they are."""
    return arrow_cells(insert([c.encode() for c in CAPTIONS], b"caf\xe9")).view("string")


CONTENTS = [content for content, _ in GOOD]
PARQUET = {
    "times beyond Python's": ({"time": [0, 2**62, 0, 0]}, "timestamp[ms]", ["no caption"]),
    "caption that is not UTF-8": ({"caption": not_utf8}, None, ["the caption is not UTF-8"]),
    "caption of 50 megabytes": (
        {"caption": insert(CAPTIONS, "x" * 50_000_000)},
        None,
        ["the caption has 50000000 characters"],
    ),
    "no bytes": ({"image": insert(CONTENTS, None)}, None, ["neither bytes nor a path"]),
    "empty bytes": ({"image": insert(CONTENTS, b"")}, None, ["neither bytes nor a path"]),
    "picture of 100 megabytes": (
        {"image": insert(CONTENTS, bytes(10**8)), "caption": insert(CAPTIONS, "zeros")},
        None,
        ["not a picture"],
    ),
    "missing file": (
        {"image": insert(NAMES, "none.png"), "caption": insert(CAPTIONS, "x")},
        None,
        ["No such file"],
    ),
    "no path": ({"image": insert(NAMES, None)}, None, ["no file in its column"]),
    "structure of nothing": (
        {"image": [{"bytes": c, "path": None} for c in insert(CONTENTS, None)]},
        None,
        ["no caption"],
    ),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_one_bad_cell_is_one_skipped_item(tmp_path, kind):
    table = save_table(tmp_path / "in", "a.parquet", b"")
    changed, arrow_kind, reasons = PARQUET[kind]
    columns = {"image": insert(CONTENTS, picture_bytes(7)), "caption": insert(CAPTIONS, "")}
    if reasons == ["neither bytes nor a path"]:
        columns["caption"] = insert(CAPTIONS, "x")
    for name, cells in changed.items():
        columns[name] = cells() if callable(cells) else arrow_cells(cells, arrow_kind)
    write_parquet(table, columns)
    check_rest(table, reasons, tmp_path)


@pytest.mark.parametrize(
    "cells, kind, reason",
    [
        ([0, 2**62], "timestamp[ms]", "the caption cannot be read: "),
        ([["x"], ["y"]], None, "the caption must be text or a number, got list"),
        ([{"en": "x"}, {"en": "y"}], None, "the caption must be text or a number, got dict"),
    ],
)
def test_captions_of_other_kinds_are_refused(tmp_path, cells, kind, reason):
    columns = {"image": CONTENTS[:2], "caption": arrow_cells(cells, kind)}
    write_parquet(tmp_path / "a.parquet", columns)
    try:
        problems = read_source(tmp_path / "a.parquet")[1]
    except CacheError as error:
        problems = [str(error)]
    assert any(reason in problem for problem in problems), problems


def test_what_fills_the_memory_is_left_behind_when_items_are_listed(tmp_path):
    columns = {"image": CONTENTS[:2], "caption": ["x" * 20_000, CAPTIONS[1]]}
    write_parquet(tmp_path / "a.parquet", columns)
    first, second = list_items(make_settings(tmp_path / "a.parquet", "out", "vae")).items
    assert "has 20000 characters" in first.problem and not first.values
    assert second.values["caption"] == CAPTIONS[1]


def test_paths_may_be_coded_as_a_dictionary(tmp_path):
    table = save_table(tmp_path / "in", "a.parquet", b"")
    columns = {"path": arrow_cells(NAMES).dictionary_encode(), "caption": CAPTIONS}
    write_parquet(table, columns)
    items = list_items(make_settings(table, "out", "vae")).items
    assert [item.name for item in items] == [f"a.parquet:{n + 1} {NAMES[n]}" for n in range(3)]
    check_rest(table, [], tmp_path)


def damage(path, place, count=40):
    content = bytearray(path.read_bytes())
    content[place : place + count] = b"\xff" * count
    path.write_bytes(content)


@pytest.mark.parametrize("column", [0, 1])
def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path, column):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "a.parquet"
    columns = {
        "image": [CONTENTS[0], *CONTENTS[:2], *CONTENTS[1:]],
        "caption": [CAPTIONS[0], "x" * 200, "y" * 200, *CAPTIONS[1:]],
    }
    write_parquet(table, columns, row_group_size=1)
    facts = parquet.ParquetFile(table).metadata
    for group in (1, 2):
        damage(table, facts.row_group(group).column(column).data_page_offset + 4)
    reasons = [f"row group {group} of {table} cannot be read" for group in (1, 2)]
    check_rest(table, reasons, tmp_path)


def test_the_rows_of_a_damaged_group_are_one_item(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_pictures(tmp_path, 3)
    table = tmp_path / "a.parquet"
    write_parquet(table, {"file_name": NAMES, "caption": CAPTIONS}, row_group_size=2)
    facts = parquet.ParquetFile(table).metadata
    damage(table, facts.row_group(0).column(1).data_page_offset + 4)
    items = list_items(make_settings(table, "out", "vae")).items
    assert [item.name for item in items] == ["a.parquet:1-2", "a.parquet:3 0002.png"]
    assert f"row group 0 of {table} cannot be read" in items[0].problem


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a readable Parquet file"),
        (b"PAR1" + bytes(100) + b"PAR1", "not a readable Parquet file"),
        (b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1", "not a readable Parquet file"),
    ],
)
def test_a_parquet_file_without_a_footer_is_an_error(tmp_path, content, message):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(CacheError, match=message):
        read_source(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_among_others_is_one_skipped_item(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", {"image": CONTENTS[:2], "caption": CAPTIONS[:2]})
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    write_parquet(tmp_path / "in" / "c.parquet", {"image": CONTENTS[:0], "caption": CAPTIONS[:0]})
    write_parquet(tmp_path / "in" / "d.parquet", {"image": CONTENTS[2:], "caption": CAPTIONS[2:]})
    reasons = ["b.parquet is not a readable Parquet file"]
    check_rest(tmp_path / "in" / "*.parquet", reasons, tmp_path)


def test_a_parquet_file_without_rows_is_an_error(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": CONTENTS[:0], "caption": CAPTIONS[:0]})
    with pytest.raises(CacheError, match="holds no images"):
        read_source(tmp_path / "a.parquet")


def test_the_cells_of_a_large_row_group_are_read_one_after_the_other(tmp_path):
    """A group of 150 megabytes does not go through memory, whichever cell is wanted."""
    noise = np.random.default_rng(0).bytes(10**6)
    cells = [noise[number:] + noise[:number] for number in range(150)]
    columns = {"image": cells, "caption": ["x"] * 150}
    write_parquet(tmp_path / "a.parquet", columns, write_batch_size=8, use_dictionary=False)
    items = list_items(make_settings(tmp_path / "a.parquet", "out", "vae")).items
    with bounded(megabytes=100):
        for number in (0, 149, 17, 18):
            with items[number].media.open() as file:
                assert file.read() == cells[number]


def test_a_damaged_saved_dataset_is_an_error(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": CONTENTS, "caption": CAPTIONS}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    check_rest(tmp_path / "saved", [], tmp_path)
    (file,) = (tmp_path / "saved").glob("*.arrow")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CacheError, match="is not a saved dataset"):
        read_source(tmp_path / "saved")


# --- folders --------------------------------------------------------------------------------------


def no_bytes(path):
    path.write_bytes(b"")


def with_caption(path, content=None):
    path.write_bytes(picture_bytes(7) if content is None else content)
    path.with_suffix(".txt").write_text("a caption")


def other_caption(write, suffix=".txt"):
    def save(folder):
        (folder / "bad.png").write_bytes(picture_bytes(7))
        write((folder / "bad.png").with_suffix(suffix))

    return save


def link_to(target):
    return lambda path: path.symlink_to(target)


def containing(content):
    return lambda path: path.write_bytes(content)


FOLDERS = {
    "caption with an I/O error": (
        other_caption(link_to("/proc/self/mem")),
        ["its .txt file: cannot be read: Input/output error"],
    ),
    "JSON with an I/O error": (
        other_caption(link_to("/proc/self/mem"), ".json"),
        ["its .json file: cannot be read: Input/output error"],
    ),
    "picture with an I/O error": (
        lambda folder: (
            (folder / "bad.png").symlink_to("/proc/self/mem"),
            (folder / "bad.txt").write_text("x"),
        ),
        ["Input/output error"],
    ),
    "caption that is a folder": (
        other_caption(lambda path: path.mkdir()),
        ["no caption|not a regular file"],
    ),
    "caption that is a pipe": (other_caption(os.mkfifo), ["its .txt file: is not a regular file"]),
    "caption that is a device": (
        other_caption(link_to("/dev/zero")),
        ["its .txt file: is not a regular file"],
    ),
    "caption that leads nowhere": (other_caption(link_to("none")), ["No such file"]),
    "caption that leads to itself": (other_caption(link_to("bad.txt")), ["Too many levels"]),
    "caption of megabytes": (other_caption(containing(b"x" * 10**7)), ["more than 40000 bytes"]),
    "caption in Latin-1": (other_caption(containing(b"caf\xe9")), ["is not UTF-8"]),
    "half a caption in UTF-16": (other_caption(containing(b"\xff\xfea\0b")), ["is not UTF-8"]),
    "JSON of a list": (other_caption(containing(b"[]"), ".json"), ["no JSON object"]),
    "JSON nested": (other_caption(containing(b"[" * 10**6), ".json"), ["is not JSON"]),
    "JSON of digits": (
        other_caption(containing(b'{"caption": ' + b"9" * 10**5 + b"}"), ".json"),
        ["is not JSON: Exceeds the limit"],
    ),
    "picture that leads nowhere": (lambda f: (f / "bad.png").symlink_to("none"), ["no caption"]),
    "picture that is a pipe": (lambda f: os.mkfifo(f / "bad.png"), ["no caption"]),
    "folder like a picture": (lambda folder: (folder / "bad.png").mkdir(), []),
    "loop of links": (lambda folder: (folder / "loop").symlink_to(folder), []),
    "link to itself": (lambda folder: (folder / "loop").symlink_to("loop"), []),
    "half a download": (lambda folder: no_bytes(folder / "bad.png.part"), []),
    "notes of a system": (lambda folder: no_bytes(folder / "._bad.png"), []),
    "a folder's settings": (lambda folder: no_bytes(folder / ".DS_Store"), []),
    "two captions": (lambda folder: (folder / "0001.TXT").write_text("another"), []),
    "caption without a picture": (lambda folder: no_bytes(folder / "bad.txt"), []),
    "other files": (lambda folder: no_bytes(folder / "bad.heic"), []),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_one_bad_file_is_one_skipped_item(tmp_path, kind):
    write, reasons = FOLDERS[kind]
    write_pictures(tmp_path / "in", 3)
    write(tmp_path / "in")
    check_rest(tmp_path / "in", reasons, tmp_path)
    check_rest(tmp_path / "in" / "**" / "*", reasons, tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".txt"])
def test_a_file_that_would_wait_for_its_content_is_skipped(tmp_path, monkeypatch, suffix):
    """As regular files in /proc may; here it is a pipe that passes for one."""
    write_pictures(tmp_path / "in", 1)
    file = (tmp_path / "in" / "0000").with_suffix(suffix)
    file.unlink()
    os.mkfifo(file)
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: True)
    with open(os.open(file, os.O_RDWR), "wb"):  # keeps the pipe from ending
        fine, problems = read_source(tmp_path / "in")
    assert not fine and "cannot be read: Resource temporarily unavailable" in problems[0]


@pytest.mark.parametrize("stem", ["a\nb", "blank ", " blank", "raw\udcff", "x" * 250, "a.b", "-rf"])
@pytest.mark.parametrize("suffixes", [(".png", ".txt"), (".PNG", ".TXT"), (".Png", ".txt")])
def test_names_are_what_they_are(tmp_path, stem, suffixes):
    write_pictures(tmp_path / "in", 3)
    names = [f"{number}{stem}"[:250] for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / "in" / NAMES[number]).rename(tmp_path / "in" / (name + suffixes[0]))
        text = (tmp_path / "in" / NAMES[number]).with_suffix(".txt")
        text.rename(tmp_path / "in" / (name + suffixes[1]))
    check_rest(tmp_path / "in", [], tmp_path)
    check_rest(tmp_path / "in" / "*", [], tmp_path)


def test_files_that_are_gone_when_they_are_read_are_skipped(tmp_path):
    write_pictures(tmp_path / "in", 5)
    settings = make_settings(tmp_path / "in", "out", "vae")
    items = list_items(settings).items
    (tmp_path / "in" / "0001.png").unlink()
    (tmp_path / "in" / "0003.txt").unlink()
    skipped = [line for item in items for line in read_item(item, settings).facts.skipped]
    problems = {line.source: line.reason for line in skipped}
    assert problems.keys() == {"0001.png", "0003.png"}
    assert "No such file" in problems["0001.png"]
    assert "its .txt file: cannot be opened: No such file" in problems["0003.png"]


def test_a_folder_that_cannot_be_read_is_one_skipped_item(tmp_path):
    """Here for the length of its path; for others permission is missing."""
    write_pictures(tmp_path / "in", 3)
    home = os.getcwd()
    os.chdir(tmp_path / "in")
    try:
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
    finally:
        os.chdir(home)
    check_rest(tmp_path / "in", ["the folder cannot be read: File name too long"], tmp_path)
    subprocess.run(["rm", "-rf", tmp_path / "in"], check=True)


def test_a_pattern_ends_in_a_maze_of_links(tmp_path):
    write_pictures(tmp_path / "in" / "a" / "b", 3)
    for number in range(5):
        (tmp_path / "in" / "a" / f"link{number}").symlink_to(tmp_path / "in")
    check_rest(tmp_path / "in" / "**" / "*.png", [], tmp_path)


@pytest.mark.parametrize(
    "pattern", ["**/*.png", "a/**/*.png", "*/**/*.png", "**/a/**/*.png", "a/**"]
)
def test_patterns_are_those_of_glob(tmp_path, pattern, monkeypatch):
    for folder in ["a", "a/b", "a/b/a", "c", ".hidden", "a/.hidden"]:
        write_pictures(tmp_path / folder, 1)
    for source in (str(tmp_path / pattern), pattern):
        monkeypatch.chdir(tmp_path)
        items = list_items(make_settings(source, "out", "vae")).items
        expected = [path for path in glob.glob(source, recursive=True) if path.endswith(".png")]
        assert [item.name for item in items] == sorted(set(expected))


def test_captions_in_utf16_are_read(tmp_path):
    write_pictures(tmp_path / "in", 3)
    for path in (tmp_path / "in").glob("*.txt"):
        path.write_text(path.read_text(), encoding="utf-16")
    check_rest(tmp_path / "in", [], tmp_path)


# --- hints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table", ["in/list.csv", "in/below/captions.jsonl", "in/all.json", "a.parquet"]
)
def test_a_table_beside_pictures_without_captions_is_named(tmp_path, table):
    write_pictures(tmp_path / "in", 2)
    for path in (tmp_path / "in").glob("*.txt"):
        path.unlink()
    (tmp_path / table).parent.mkdir(exist_ok=True)
    (tmp_path / table).write_text("")
    message = f"has a caption beside it, but there is {tmp_path / table}: make the table the source"
    for source in [tmp_path / "in", tmp_path / "in" / "**"][: 1 if table == "a.parquet" else 2]:
        with pytest.raises(CacheError, match=message):
            read_source(source)
        assert len(read_source(source, empty_captions=True)[0]) == 2
    (tmp_path / "in" / "0001.txt").write_text("a caption")
    assert len(read_source(tmp_path / "in")[0]) == 1


def test_a_table_in_place_of_pictures_is_named(tmp_path):
    (tmp_path / "train-00000.parquet").write_bytes(b"")
    with pytest.raises(CacheError, match=f"no images; there is the table {tmp_path}/train-00000"):
        read_source(tmp_path)


@pytest.mark.parametrize("columns", [Columns(), Columns(text="text")])
def test_an_only_text_is_the_caption(tmp_path, columns):
    rows = [json.dumps({"file_name": n, "text": c}) for n, c in GOOD_ROWS]
    table = save_table(tmp_path / "in", "list.jsonl", "\n".join(rows))
    check_rest(table, [], tmp_path, columns=columns)


@pytest.mark.parametrize("labels", [True, False])
def test_a_table_without_a_column_of_captions_is_an_error_that_names_the_option(tmp_path, labels):
    wanted = "label" if labels else "caption"
    table = save_table(tmp_path / "in", "list.csv", "file_name,prompt\n0000.png,a disc\n")
    message = f"no row of {table} has a {wanted}: --{wanted}-column names its column"
    with pytest.raises(CacheError, match=message):
        read_source(table, labels=labels)
    assert len(read_source(table, empty_captions=True)[0]) == 1
    assert read_source(table, columns=Columns(text="prompt"))[0][0][1] == "a disc"
    write_pictures(tmp_path / "in", 1)  # the caption may also be beside the file
    assert read_source(table)[0][0][1] == CAPTIONS[0]


def test_files_that_are_not_read_are_counted(tmp_path):
    write_pictures(tmp_path / "in" / "below", 1)
    for name in ["1.heic", "2.HEIC", "below/3.heic", "clip.mp4", "README", "a.csv", "._1.heic"]:
        no_bytes(tmp_path / "in" / name)
    unread = list_items(make_settings(tmp_path / "in", "out", "vae")).unread
    assert unread == {".heic": 3, ".mp4": 1, "": 1, ".csv": 1}
    assert describe_unread(unread, "images") == [
        "3 .heic files were not read: pip install pillow-heif",
        "1 file without a suffix was not read",
        "1 .csv file was not read: make the table the source, or name it metadata, as in "
        "metadata.csv",
        "1 .mp4 file was not read: `diffnext cache videos` reads them",
    ]
    many = {f".{number}": 1 for number in range(10**5)}
    assert describe_unread(unread | many, "images")[-1] == "99996 other files were not read"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "in", ".")
    assert list_items(make_settings(tmp_path / "a.tar", "out", "vae")).unread == unread


def test_heic_is_read_where_its_plugin_is(tmp_path, monkeypatch):
    """A plug-in that reads everything as PNG."""
    write_pictures(tmp_path / "in", 3)
    for name in NAMES:
        (tmp_path / "in" / name).rename((tmp_path / "in" / name).with_suffix(".HEIC"))
    plugin = types.ModuleType("pillow_heif")
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    monkeypatch.setattr(Image, "ID", list(Image.ID))

    def register():
        Image.register_open("HEIF", *Image.OPEN["PNG"])
        Image.register_extension("HEIF", ".heic")

    plugin.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    for cached in (pictures.known_formats, media.media_suffixes):
        cached.cache_clear()
    try:
        check_rest(tmp_path / "in", [], tmp_path)
    finally:
        for cached in (pictures.known_formats, media.media_suffixes):
            cached.cache_clear()


def test_a_build_is_the_same_as_without_the_bad_items(tmp_path, vae):
    (tmp_path / "clean").mkdir()
    (tmp_path / "in").mkdir()
    bad = b"".join(content for content, _ in ARCHIVES.values() if len(content) < 10**5)
    (tmp_path / "clean" / "a.tar").write_bytes(good(0) + good(1) + good(2) + END)
    (tmp_path / "in" / "a.tar").write_bytes(good(0) + bad + good(1) + bad + good(2) + END)
    for name in ("clean", "in"):
        build_cache(make_settings(tmp_path / name / "a.tar", tmp_path / f"{name}_out", vae))
    records = []
    for name in ("clean", "in"):
        with RecordDataset(tmp_path / f"{name}_out") as dataset:
            records.append(list(dataset))
    assert len(records[0]) == 3
    assert records[0] == records[1]
