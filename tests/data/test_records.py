"""Datasets of records on disk."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffnext.cli.inspect_cache import main as inspect
from diffnext.data.caching.reshaping import merge, reshard, split
from diffnext.data.records import RecordDataset, RecordError, RecordWriter


def write_numbers(folder, count, **options):
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder, {"number": "int"}, **options) as writer:
        for number in range(count):
            writer.write({"number": number})
    return folder


def numbers(dataset):
    return [example["number"] for example in dataset]


def test_files_are_those_of_the_reference(tmp_path):
    features = {
        "moments": "bytes",
        "caption": "string",
        "text": "string",
        "shape": ["int64"],
        "flow": "float64",
    }
    with RecordWriter(tmp_path, features) as writer:
        for _ in range(3):
            writer.write(
                {"moments": b"x" * 90, "caption": "a", "text": "", "shape": (1, 9, 5), "flow": 5}
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.data",
        "00000.index",
        "METADATA",
    ]
    metadata = (tmp_path / "METADATA").read_text()
    stored_features = {
        "moments": "BYTES",
        "caption": "STRING",
        "text": "STRING",
        "shape": ["INT64"],
        "flow": "FLOAT32",
    }
    expected = {"entries": 3, "features": stored_features, "version": 1}
    assert metadata == json.dumps(expected, indent=2)
    length = (tmp_path / "00000.data").stat().st_size // 3
    index = (tmp_path / "00000.index").read_text()
    assert index == f"0 {length}\n{length} {length}\n{2 * length} {length}\n"


def test_examples_are_read_in_the_order_written_over_several_shards(tmp_path):
    write_numbers(tmp_path, 7, max_examples=3)
    assert sorted(path.name for path in tmp_path.glob("*.index")) == [
        "00000.index",
        "00001.index",
        "00002.index",
    ]
    with RecordDataset(tmp_path) as dataset:
        assert len(dataset) == dataset.size == 7
        assert numbers(dataset) == list(range(7))
        assert [dataset[i]["number"] for i in (6, 0, 3, 2, -1)] == [6, 0, 3, 2, 6]


def test_the_cursor_follows_reads_seeks_and_indexing(tmp_path):
    dataset = RecordDataset(write_numbers(tmp_path, 5))
    assert dataset.read() == {"number": 0}
    assert dataset.tell() == 1
    assert dataset[3] == {"number": 3}
    assert dataset.tell() == 4
    assert numbers(dataset) == [4]
    with pytest.raises(StopIteration):
        dataset.read()
    dataset.seek(2)
    assert numbers(dataset) == [2, 3, 4]
    dataset.reset()
    assert dataset.read() == {"number": 0}


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_out_of_range_is_refused(tmp_path, index):
    dataset = RecordDataset(write_numbers(tmp_path, 5))
    with pytest.raises(IndexError, match=f"5 examples, no example {index}"):
        dataset[index]


def test_a_pickled_dataset_reads_the_same(tmp_path):
    dataset = RecordDataset(write_numbers(tmp_path, 5, max_examples=2))
    assert dataset[4] == {"number": 4}
    copy = pickle.loads(pickle.dumps(dataset))
    assert numbers(copy) == list(range(5))


def test_a_closed_dataset_and_a_closed_writer_refuse(tmp_path):
    dataset = RecordDataset(write_numbers(tmp_path / "a", 2))
    dataset.close()
    dataset.close()
    with pytest.raises(RuntimeError, match="closed"):
        dataset[0]
    (tmp_path / "b").mkdir()
    writer = RecordWriter(tmp_path / "b", {"a": "int"})
    writer.close()
    for example in ({"a": 1}, {}, {"a": "not a number"}):
        with pytest.raises(RuntimeError, match="closed"):
            writer.write(example)


def test_shards_are_read_by_number_and_not_by_letter(tmp_path):
    write_numbers(tmp_path, 12, max_examples=1, zfill_width=1)
    assert numbers(RecordDataset(tmp_path)) == list(range(12))


def test_shard_names_may_hold_the_word_index(tmp_path):
    folder = write_numbers(tmp_path / "my.index.folder", 2)
    (folder / "00000.index").rename(folder / "a.index.b.index")
    (folder / "00000.data").rename(folder / "a.index.b.data")
    assert numbers(RecordDataset(folder)) == [0, 1]


def test_the_writer_leaves_the_descriptor_of_the_caller_alone(tmp_path):
    features = {"shape": ["int64"], "flow": "float64"}
    RecordWriter(tmp_path, features)
    assert features == {"shape": ["int64"], "flow": "float64"}


def test_a_writer_without_examples_writes_nothing(tmp_path):
    RecordWriter(tmp_path, {"a": "int"}).close()
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_cannot_be_written_over(tmp_path):
    write_numbers(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RecordError, match="already holds records"):
        RecordWriter(tmp_path, {"number": "int"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_writers_cannot_share_a_folder(tmp_path):
    first = RecordWriter(tmp_path, {"number": "int"})
    second = RecordWriter(tmp_path, {"number": "int"})
    first.write({"number": 1})
    with pytest.raises(RecordError, match="00000.data already exists"):
        second.write({"number": 2})


def test_the_folder_of_a_writer_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RecordWriter(tmp_path / "none", {"a": "int"})


def test_a_refused_example_leaves_no_trace(tmp_path):
    with RecordWriter(tmp_path, {"a": "int", "b": "bytes"}) as writer:
        writer.write({"a": 1, "b": b"1"})
        with pytest.raises(TypeError):
            writer.write({"a": 2, "b": "not bytes"})
        with pytest.raises(KeyError):
            writer.write({"a": 2})
        writer.write({"a": 3, "b": b"3"})
    assert [example["a"] for example in RecordDataset(tmp_path)] == [1, 3]


def test_what_was_written_before_a_failure_stays_readable(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        RecordWriter(tmp_path, {"number": "int"}) as writer,
    ):
        writer.write({"number": 4})
        raise KeyboardInterrupt
    assert numbers(RecordDataset(tmp_path)) == [4]
    assert not (tmp_path / "METADATA.tmp").exists()


def test_a_folder_whose_writer_was_killed_is_no_dataset(tmp_path):
    writer = RecordWriter(tmp_path, {"number": "int"})
    writer.write({"number": 4})
    with pytest.raises(FileNotFoundError, match="METADATA"):
        RecordDataset(tmp_path)


def test_a_corrupt_record_is_refused_with_file_and_example(tmp_path):
    write_numbers(tmp_path, 5, max_examples=2)
    data_path = tmp_path / "00001.data"
    content = bytearray(data_path.read_bytes())
    content[len(content) // 2] = 0xFF  # first byte of example 3
    data_path.write_bytes(content)
    dataset = RecordDataset(tmp_path)
    assert dataset[2] == {"number": 2}
    with pytest.raises(RecordError, match=r"example 3 \(number 1 in .*00001.data\) is corrupt"):
        dataset[3]
    assert dataset[4] == {"number": 4}


def test_a_folder_of_datasets_names_them(tmp_path):
    write_numbers(tmp_path / "a", 1)
    write_numbers(tmp_path / "b", 1)
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {tmp_path}/aa; did you mean"):
        RecordDataset(tmp_path / "aa")
    message = f"^{tmp_path} is not a dataset: it has no METADATA; the datasets in it are a, b$"
    with pytest.raises(FileNotFoundError, match=message):
        RecordDataset(tmp_path)


def test_empty_records_are_read_as_defaults(tmp_path):
    with RecordWriter(tmp_path, {}) as writer:
        writer.write({})
        writer.write({})
    assert (tmp_path / "00000.data").stat().st_size == 0
    assert list(RecordDataset(tmp_path)) == [{}, {}]


def test_array_payloads_survive_a_round_trip(tmp_path):
    moments = np.random.default_rng(0).normal(size=(8, 16, 16)).astype(np.float16)
    with RecordWriter(tmp_path, {"moments": "bytes", "shape": ["int64"]}) as writer:
        writer.write({"moments": moments, "shape": moments.shape})
    example = RecordDataset(Path(tmp_path))[0]
    restored = np.frombuffer(example["moments"], np.float16).reshape(example["shape"])
    assert np.array_equal(restored, moments)


def test_sizes_of_the_writer_are_checked(tmp_path):
    with pytest.raises(ValueError, match="max_examples must be at least 1, got 0"):
        RecordWriter(tmp_path, {"a": "int"}, max_examples=0)


def test_views_are_the_bytes_without_a_copy(tmp_path):
    with RecordWriter(tmp_path, {"data": "bytes", "name": "string"}) as writer:
        for number in range(3):
            writer.write({"data": bytes([number] * 300), "name": f"number {number}"})
    dataset = RecordDataset(tmp_path)
    views = [dataset.view(index) for index in (2, 0, -2)]
    assert dataset.tell() == 0
    for view, number in zip(views, (2, 0, 1), strict=True):
        assert view["name"] == f"number {number}"
        assert isinstance(view["data"], memoryview) and view["data"].readonly
        assert view["data"] == dataset[number]["data"]
    with pytest.raises(IndexError, match="no example 3"):
        dataset.view(3)
    dataset.close()
    assert bytes(views[0]["data"]) == bytes([2] * 300)  # outlives the dataset
    with pytest.raises(RuntimeError, match="closed"):
        dataset.view(0)


# Files that change while they are read


def write_long(folder, count=6, **options):
    """Records of 300 bytes, written an hour ago."""
    folder.mkdir(parents=True)
    with RecordWriter(folder, {"data": "bytes", "number": "int"}, **options) as writer:
        for number in range(count):
            writer.write({"data": bytes([number] * 300), "number": number})
    for path in folder.iterdir():
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    return folder


def replace_by_another(path):
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


CHANGES = {
    "cut to nothing": lambda path: os.truncate(path, 0),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, 10**6),
    "the same size": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "replaced": replace_by_another,
    "replaced by a link": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_a_file_that_changes_while_it_is_read_is_an_error_that_names_it(tmp_path, change, begun):
    folder = write_long(tmp_path / "dataset")
    dataset = RecordDataset(folder)
    if begun:
        assert dataset[2]["number"] == 2
    path = folder / "00000.data"
    change(path)
    readers = [dataset] if begun else [dataset, copy.copy(dataset)]
    for reader in readers:
        for read in (reader.view, reader.record, reader.__getitem__):
            with pytest.raises(RecordError, match=str(path)):
                read(5)


def test_reading_a_file_leaves_its_time_of_change_alone(tmp_path):
    dataset = RecordDataset(write_long(tmp_path / "dataset"))
    os.utime(tmp_path / "dataset" / "00000.index")
    assert numbers(dataset) == list(range(6))


@pytest.mark.parametrize("make", [copy.copy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_of_a_dataset_does_not_read_its_index_again(tmp_path, make):
    dataset = RecordDataset(write_long(tmp_path / "dataset", max_examples=4))
    dataset.seek(3)
    dataset.close()
    for path in (tmp_path / "dataset").glob("*.index"):
        path.unlink()
    (tmp_path / "dataset" / "METADATA").unlink()
    twin = make(dataset)
    assert numbers(twin) == list(range(6))
    with pytest.raises(RuntimeError, match="closed"):
        dataset[0]


def test_few_files_of_many_shards_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr("diffnext.data.records.MAX_OPEN_FILES", 3)
    dataset = RecordDataset(write_numbers(tmp_path, 9, max_examples=1))
    for number in (0, 5, 1, 8, 5, 2, 7, 7, 0):
        assert dataset[number] == {"number": number}
        names = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
        assert 1 <= sum(name.startswith(str(tmp_path)) for name in names) <= 3


# The index


def write_index(folder, text, data_size, entries):
    folder.mkdir(exist_ok=True)
    (folder / "00000.index").write_bytes(text)
    with open(folder / "00000.data", "wb") as file:
        file.truncate(data_size)
    content = {"entries": entries, "features": {}, "version": 1}
    (folder / "METADATA").write_text(json.dumps(content))
    return folder


def test_an_index_of_many_lines_holds_what_numpy_reads_of_it(tmp_path):
    rng = np.random.default_rng(0)
    spans = np.stack([10 ** rng.uniform(0, 12, 400_000), 10 ** rng.uniform(0, 9, 400_000)], axis=1)
    spans = spans.astype(np.int64)
    text = "".join(f"{offset} {length}\n" for offset, length in spans.tolist()).encode()
    assert len(text) > 2**22  # more than is parsed at a time
    folder = write_index(tmp_path / "dataset", text, 2**40, len(spans))
    (shard,) = RecordDataset(folder).shards
    expected = np.loadtxt(folder / "00000.index", np.int64)
    assert shard.spans.dtype == np.int64 and np.array_equal(shard.spans, expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"12 34 56", "line 600001: expected .* got b'12 34 56'"),
        (b"0 1234567", "00000.data is truncated: example 600000 of it ends at byte 1234567"),
    ],
)
def test_a_wrong_line_far_down_is_named(tmp_path, line, message):
    lines = [b"123 456"] * 600_000 + [line] + [b"0 0"] * 3
    folder = write_index(tmp_path / "dataset", b"\n".join(lines) + b"\n", 2**20, len(lines))
    with pytest.raises(RecordError, match=message) as failure:
        RecordDataset(folder)
    assert "line 600001" in str(failure.value)


def test_the_last_line_need_not_end(tmp_path):
    folder = write_numbers(tmp_path, 3)
    index = folder / "00000.index"
    index.write_bytes(index.read_bytes()[:-1])
    assert numbers(RecordDataset(folder)) == [0, 1, 2]


# Checksums


def flip_bit(folder, number):
    """Damage that the format itself does not show: inside of the bytes of a record."""
    path = folder / "00000.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 6 * number + 150] ^= 1
    path.write_bytes(content)


def test_checksums_lie_beside_records_that_stay_as_they_are(tmp_path):
    plain = write_long(tmp_path / "plain", max_examples=4)
    summed = write_long(tmp_path / "summed", max_examples=4, checksums=True)
    sizes = {path.name: path.stat().st_size for path in summed.glob("*.xxh3")}
    assert sizes == {"00000.xxh3": 8 * 4, "00001.xxh3": 8 * 2}
    for path in plain.iterdir():
        assert path.read_bytes() == (summed / path.name).read_bytes()
    assert numbers(RecordDataset(summed)) == list(range(6))
    with pytest.raises(RecordError, match="already holds records"):
        shutil.copy(summed / "00000.xxh3", tmp_path)
        RecordWriter(tmp_path, {"a": "int"})


def test_a_flipped_bit_is_noticed_where_there_are_checksums(tmp_path, capsys):
    folder = write_long(tmp_path / "dataset", checksums=True)
    assert inspect(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == "no problems\n"
    flip_bit(folder, 4)
    dataset = RecordDataset(folder)
    assert [dataset[number]["number"] for number in (0, 3, 5)] == [0, 3, 5]
    message = f"example 4 .*00000.data\\) cannot be used: .* not the one in {folder}/00000.xxh3$"
    for read in (dataset.view, dataset.record, dataset.__getitem__):
        with pytest.raises(RecordError, match=message):
            read(4)
    for command in ("verify", "check"):
        assert inspect([command, str(folder)]) == 1
        assert "example 4 " in capsys.readouterr().out


def test_records_without_checksums_are_read_but_not_verified(tmp_path, capsys):
    folder = write_long(tmp_path / "dataset")
    flip_bit(folder, 4)
    assert numbers(RecordDataset(folder)) == list(range(6))
    assert inspect(["verify", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert printed == f"{folder}/00000.data has no checksums: it cannot be verified\n1 problems\n"


@pytest.mark.parametrize(
    "copy_to",
    [
        lambda folder, out: reshard(folder, out, 4),
        lambda folder, out: merge([folder], out),
        lambda folder, out: split(folder, [out, out.with_name("rest")], 0.5),
    ],
)
@pytest.mark.parametrize("checksums", [True, False])
def test_copies_of_records_get_checksums_unless_a_record_is_damaged(tmp_path, copy_to, checksums):
    folder = write_long(tmp_path / "dataset", checksums=checksums)
    copy_to(folder, tmp_path / "out")
    assert inspect(["verify", str(tmp_path / "out")]) == 0
    if checksums:
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "rest", ignore_errors=True)
        for number in range(6):
            flip_bit(folder, number)
        with pytest.raises(RecordError, match="cannot be used: its checksum"):
            copy_to(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
