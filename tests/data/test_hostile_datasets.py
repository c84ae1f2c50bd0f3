"""Datasets that a stranger made: one error names file and rule, nothing outside is read."""

import json
import math
import os
import pickle

import numpy as np
import pytest

from diffnext.cli.inspect_cache import main
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.data.manifest import read_manifest
from diffnext.data.records import RecordDataset, RecordError, RecordWriter

FEATURES = {"moments": "bytes", "shape": ["int"], "caption": "string"}
SOUND = {"moments": np.zeros((2, 3), np.float16), "shape": (2, 3), "caption": "x"}
METADATA = {"entries": 2, "features": FEATURES, "version": 1}
DEEP = "int"
for _ in range(50):
    DEEP = {"a": DEEP}


def write_dataset(folder, *examples, features=FEATURES):
    folder.mkdir(parents=True)
    with RecordWriter(folder, features) as writer:
        for example in examples or (SOUND, SOUND):
            writer.write(example)
    return folder


def content(name, text):
    """Overwrite one file."""
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(data)


def metadata(**changes):
    return content("METADATA", json.dumps({**METADATA, **changes}))


def index(line):
    return content("00000.index", f"0 5\n{line}\n")


def link(name):
    """Put a link in the place of a file, to the same file of another dataset."""

    def change(folder):
        other = write_dataset(folder.parent / "other")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(other / name)

    return change


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def hole(name):
    """Make a file very long without using the disk."""

    def change(folder):
        (folder / name).touch()
        os.truncate(folder / name, 2**40)

    return change


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def folder_in_place(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


UNREADABLE = {
    "METADATA that is not JSON": (content("METADATA", "{"), "METADATA: Invalid JSON"),
    "METADATA that is not text": (content("METADATA", b"\xff\0"), "METADATA: Invalid JSON"),
    "METADATA that is a list": (content("METADATA", "[]"), "METADATA: must hold key: value pairs"),
    "endless brackets": (content("METADATA", "[" * 100_000), "METADATA: .* recursion limit"),
    "a METADATA of a terabyte": (hole("METADATA"), "METADATA must have at most 16777216 bytes"),
    "entries as text": (
        metadata(entries="2"),
        "METADATA: entries: must be a whole number, got '2'",
    ),
    "no entries": (metadata(entries=0), "METADATA: entries: .* equal to 1, got 0"),
    "entries below zero": (metadata(entries=-2), "METADATA: entries: .* got -2"),
    "entries that are true": (metadata(entries=True), "METADATA: entries: .* got True"),
    "more entries than fit": (metadata(entries=2**70), "METADATA: entries: .* less than"),
    "a number without end": (
        content("METADATA", '{"entries": ' + "9" * 9000 + "}"),
        "METADATA: Invalid JSON: number out of range",
    ),
    "another version": (metadata(version=2), "METADATA: version: must be 1, got 2"),
    "no features": (content("METADATA", '{"entries": 2}'), "features: must be given; version:"),
    "features in a list": (metadata(features=["int"]), "METADATA: features: .* got \\['int'\\]"),
    "an unknown type": (metadata(features={"a": "int8"}), "METADATA: .*'a': unknown type 'int8'"),
    "a list of two types": (metadata(features={"a": [1, 2]}), "METADATA: .* exactly one type"),
    "features in features": (metadata(features={"a": DEEP}), "METADATA: .* nest at most 16 deep"),
    "a link as METADATA": (link("METADATA"), "METADATA is a link"),
    "a pipe as METADATA": (pipe("METADATA"), "METADATA is not a regular file"),
    "a folder as METADATA": (folder_in_place("METADATA"), "METADATA is not a regular file"),
    "one number in a line": (index("0"), "00000.index, line 2: expected '<offset> <length>'"),
    "a word in a line": (index("0 x"), "00000.index, line 2: .* got b'0 x'"),
    "three numbers in a line": (index("0 5 7"), "00000.index, line 2: .* got b'0 5 7'"),
    "numbers of two lines in one": (index("0 5 7 8"), "00000.index, line 2: .* got b'0 5 7 8'"),
    "an empty line": (index("\n0 5"), "00000.index, line 2: .* got b''"),
    "a line in the wrong half": (index("0\n5 0 5"), "00000.index, line 2: .* got b'0'"),
    "no length": (index("0 "), "00000.index, line 2: .* got b'0 '"),
    "two blanks": (index("0  5"), "00000.index, line 2: expected"),
    "a blank in front": (index(" 0 5"), "00000.index, line 2: expected"),
    "a negative offset": (index("-1 5"), "00000.index, line 2: .* got b'-1 5'"),
    "a negative length": (index("0 -5"), "00000.index, line 2: .* got b'0 -5'"),
    "a fraction": (index("0 5.0"), "00000.index, line 2: expected"),
    "an offset beyond 64 bits": (index(f"{10**19} 5"), "line 2: .* 1 to 18 digits, got"),
    "a sum beyond 64 bits": (index(f"{2**63 - 1} 1"), "line 2: .* 1 to 18 digits, got"),
    "a length beyond 64 bits": (index(f"0 {2**64}"), "line 2: .* 1 to 18 digits, got"),
    "a sum that just fits": (
        index(f"{'9' * 18} {'9' * 18}"),
        "example 1 .* byte 19{17}8, the file",
    ),
    "an offset beyond the file": (
        index(f"{10**17} 5"),
        "00000.data is truncated: example 1 .* ends at byte 1.*5, the file .*00000.index, line 2",
    ),
    "a line of a megabyte": (index("1" * 2**20), "00000.index, line 2: expected"),
    "an index of a terabyte": (hole("00000.index"), "00000.index, line 3: expected"),
    "a record of a terabyte": (
        lambda folder: (hole("00000.data")(folder), index(f"0 {2**40}")(folder)),
        "00000.index, line 2: a record must have at most 2147479552 bytes, got 1099511627776",
    ),
    "checksums of other records": (
        content("00000.xxh3", b"x" * 24),
        "00000.xxh3 must have 8 bytes",
    ),
    "a terabyte of checksums": (
        hole("00000.xxh3"),
        "00000.xxh3 must have 8 bytes for each of 2 rec",
    ),
    "a link as checksums": (link("00000.xxh3"), "00000.xxh3 is a link"),
    "wrong checksums": (content("00000.xxh3", b"x" * 16), "example 0 .* not the one in .*0.xxh3"),
    "a lost line": (content("00000.index", "0 5\n"), "METADATA lists 2 examples, its 1 .* files 1"),
    "a line too many": (index("0 5\n0 5"), "METADATA lists 2 examples, its 1 .* files 3"),
    "a link as index": (link("00000.index"), "00000.index is a link"),
    "a pipe as index": (pipe("00000.index"), "00000.index is not a regular file"),
    "a link as data": (link("00000.data"), "00000.data is a link"),
    "a pipe as data": (pipe("00000.data"), "00000.data is not a regular file"),
    "no data": (lambda folder: (folder / "00000.data").unlink(), "has no data file 00000.data"),
    "cut data": (cut("00000.data", 99), "00000.data is truncated: example 1 .* file has 99 bytes"),
    "empty data": (cut("00000.data", 0), "00000.data is truncated: example 0 .* file has 0 bytes"),
    "a shape of another type": (
        metadata(features={**FEATURES, "shape": "string"}),
        "feature 'shape' must be \\['INT64'\\], got 'STRING'",
    ),
    "a caption of another type": (
        metadata(features={**FEATURES, "caption": {"data": "string"}}),
        "feature 'caption' must be STRING or .*, got {'data': 'STRING'}",
    ),
    "records of another type": (
        metadata(features={**FEATURES, "caption": {"data": "bytes", "shape": ["int"]}}),
        "example 0 .*00000.data\\) is corrupt: feature 'caption' holds bytes",
    ),
}


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "dataset")


@pytest.mark.parametrize(("change", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_dataset_that_breaks_a_rule_is_one_error(folder, capsys, change, message):
    change(folder)
    with pytest.raises(RecordError, match=message) as failure:
        FeatureDataLoader(folder, shuffle=False).next()
    assert str(folder) in str(failure.value) and "\n" not in str(failure.value)
    assert main(["check", str(folder)]) == 1
    assert str(failure.value) in capsys.readouterr().out


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": (-2, -3)}, "a shape of 1 to 8 sizes, none negative, got \\[-2, -3\\]"),
        ({"shape": [2**62] * 5000}, "a shape of 1 to 8 sizes"),
        ({"shape": (2**62, 2**62)}, "must be stored as float16"),
        ({"shape": ()}, "a shape of 1 to 8 sizes"),
        ({"moments": b""}, "must be stored as float16, 12 bytes, but has 0"),
        ({"flow": math.nan}, "'flow' must be a finite number, got nan"),
        ({"flow": -math.inf}, "'flow' must be a finite number, got -inf"),
    ],
)
def test_an_example_that_breaks_a_rule_is_one_error(tmp_path, values, message):
    example = {**SOUND, "flow": 1.0, **values}
    folder = write_dataset(tmp_path / "dataset", example, features={**FEATURES, "flow": "float"})
    with pytest.raises(RecordError, match=f"^example 0 .*00000.data.*{message}"):
        FeatureDataLoader(folder, shuffle=False).next()
    assert main(["check", str(folder)]) == 1


def test_pickled_moments_are_not_run(tmp_path):
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    folder = write_dataset(tmp_path / "dataset", {**SOUND, "moments": pickle.dumps(trap)})
    with pytest.raises(RecordError, match="must be stored as float16"):
        FeatureDataLoader(folder, shuffle=False).next()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ("[" * 100_000, "recursion limit"),
        ('"x"', "must hold key: value pairs"),
        ('{"format": 2}', "format: must be 1, got 2"),
        ('{"vae": []}', "vae: must hold .* got \\[\\]"),
        ('{"vae": {"folder": 3}}', "vae.folder: must be a text, got 3"),
        ('{"vae_hash": {}}', "vae_hash: must be a text"),
        ('{"shape": "8"}', "shape: .* got '8'"),
        ('{"shape": [8, "4"]}', "shape.1: .* whole number, got '4'"),
        ('{"shape": [-8]}', "shape.0: .* 0, got -8"),
        ('{"size": [32]}', "size.1: must be given"),
        ('{"text_encoder": "phi"}', "text_encoder: .* got 'phi'"),
        ('{"counts": null}', "counts: .* got None"),
        ('{"counts": {"examples": "2"}, "plan": 3}', "plan: .* got 3"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_one_error(folder, tmp_path, capsys, text, message):
    (folder / "manifest.json").write_text(text)
    commands = (
        ["show", str(folder)],
        ["sheet", str(folder), str(tmp_path / "sheet.png")],
        ["reshard", str(folder), str(tmp_path / "out"), "--shard-size", "1"],
        ["merge", str(folder), str(folder), "--output", str(tmp_path / "out")],
    )
    for command in commands:
        assert main(command) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: {folder}/manifest.json: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset"]
    with pytest.raises(RecordError, match=f"manifest.json: .*{message}"):
        read_manifest(folder)


def test_a_linked_manifest_is_not_read(folder, tmp_path):
    (tmp_path / "secret").write_text('{"vae_hash": "1"}')
    (folder / "manifest.json").symlink_to(tmp_path / "secret")
    with pytest.raises(RecordError, match="manifest.json is a link"):
        read_manifest(folder)


def test_linked_folders_are_no_datasets_of_a_folder(folder, tmp_path, capsys):
    (tmp_path / "buckets").mkdir()
    (tmp_path / "buckets" / "32x32").symlink_to(folder)
    assert main(["show", str(tmp_path / "buckets")]) == 1
    assert "is not a dataset" in capsys.readouterr().err


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    assert len(RecordDataset(tmp_path / "alias")) == 2
