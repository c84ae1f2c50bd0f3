"""Items of folders, patterns, tables and archives, and their captions."""

import io
import json
import tarfile

import pytest

from diffnext.data.caching.captions import read_annotation
from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.caching.settings import Columns
from diffnext.data.caching.sources import list_items
from tests.data.caching_inputs import draw_picture, make_settings, write_pictures


def items_of(source, **changes):
    return list_items(make_settings(source, "out", "vae", **changes)).items


def annotation_of(item, **changes):
    return read_annotation(item, make_settings("x", "out", "vae", **changes))


def picture_bytes(number=0):
    buffer = io.BytesIO()
    draw_picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def add_member(archive, name, content, **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    archive.addfile(member, io.BytesIO(content))


def test_a_folder_is_walked_in_order(tmp_path):
    write_pictures(tmp_path / "b", 2)
    write_pictures(tmp_path / "a", 1)
    (tmp_path / "notes.md").write_text("no picture")
    items = items_of(tmp_path)
    assert [item.name for item in items] == ["a/0000.png", "b/0000.png", "b/0001.png"]
    assert annotation_of(items[2]).caption == "Picture 1. It has a disc."


def test_a_pattern_selects_files(tmp_path):
    write_pictures(tmp_path / "a", 3)
    items = items_of(tmp_path / "**" / "000[12].png")
    assert [item.name[-8:] for item in items] == ["0001.png", "0002.png"]


def test_loops_of_links_end(tmp_path):
    write_pictures(tmp_path / "a", 2)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    items = items_of(tmp_path)
    assert [item.name for item in items] == ["a/0000.png", "a/0001.png", "a/self.png"]
    with pytest.raises(BadExample, match="cannot be opened"):
        items[2].media.open()


def test_json_beside_a_picture_has_both_captions_and_the_flow(tmp_path):
    write_pictures(tmp_path, 1)
    values = {"caption": "long", "text": "short", "flow": 3, "width": 48}
    (tmp_path / "0000.json").write_text(json.dumps(values))
    annotation = annotation_of(items_of(tmp_path)[0])
    assert (annotation.caption, annotation.text, annotation.flow) == ("long", "short", 3)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_names_files_and_captions(tmp_path, kind):
    write_pictures(tmp_path / "pictures", 2)
    rows = [{"file": f"pictures/000{n}.png", "caption": f'a "{n}",\tb'} for n in range(2)]
    path = tmp_path / f"list.{kind}"
    write_table(path, rows)
    items = items_of(path)
    assert [annotation_of(item).caption for item in items] == ['a "0",\tb', 'a "1",\tb']
    assert items[1].media.read(10**6) == (tmp_path / "pictures" / "0001.png").read_bytes()
    assert items[1].name.endswith("pictures/0001.png")


def write_table(path, rows):
    import csv

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)


def test_parquet_may_hold_the_bytes(tmp_path):
    rows = [{"image": {"bytes": picture_bytes(n), "path": None}, "text": f"t{n}"} for n in range(3)]
    write_table(tmp_path / "a.parquet", rows)
    items = items_of(tmp_path / "a.parquet")
    assert [item.media.read(10**6) for item in items] == [row["image"]["bytes"] for row in rows]
    assert annotation_of(items[2]).caption == "t2"  # an only text column has the long captions


def test_metadata_of_a_folder_is_its_table(tmp_path):
    write_pictures(tmp_path, 2)
    write_table(tmp_path / "metadata.jsonl", [{"file_name": "0001.png", "caption": "x"}])
    (item,) = items_of(tmp_path)
    assert annotation_of(item).caption == "x"


def test_saved_huggingface_datasets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = write_pictures(tmp_path / "pictures", 2)
    paths = [str(tmp_path / "pictures" / name) for name in names]
    data = datasets.Dataset.from_dict({"image": paths, "caption": ["one", "two"]})
    data = data.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    with pytest.raises(CacheError, match="has the splits train, test"):
        items_of(tmp_path / "saved")
    items = items_of(tmp_path / "saved", split="train")
    assert [annotation_of(item).caption for item in items] == ["one", "two"]
    assert items[0].media.read(10**6) == (tmp_path / "pictures" / names[0]).read_bytes()


def test_archives_are_read_in_place(tmp_path):
    for part in range(2):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
            for number in range(2):
                add_member(archive, f"{number}.png", picture_bytes(2 * part + number))
                add_member(archive, f"{number}.txt", b"caption %d" % number)
    items = items_of(tmp_path)
    assert [item.name for item in items] == [
        "0.tar/0.png",
        "0.tar/1.png",
        "1.tar/0.png",
        "1.tar/1.png",
    ]
    assert items[3].media.read(10**6) == picture_bytes(3)
    assert annotation_of(items[3]).caption == "caption 1"


def test_members_that_lead_out_or_are_no_files_have_a_problem(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "../../up.png", picture_bytes())
        add_member(archive, "/tmp/absolute.png", picture_bytes())
        add_member(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(archive, "hard.png", b"", type=tarfile.LNKTYPE, linkname="up.png")
        add_member(archive, "pipe.png", b"", type=tarfile.FIFOTYPE)
        add_member(archive, "device.png", b"", type=tarfile.CHRTYPE)
        add_member(archive, "twice.png", picture_bytes())
        add_member(archive, "twice.png", picture_bytes())
    problems = {item.name: item.problem for item in items_of(tmp_path / "a.tar")}
    assert problems == {
        "a.tar/../../up.png": "its name leads out of the archive",
        "a.tar//tmp/absolute.png": "its name leads out of the archive",
        "a.tar/link.png": "is a link",
        "a.tar/hard.png": "is a link",
        "a.tar/pipe.png": "is not a regular file",
        "a.tar/device.png": "is not a regular file",
        "a.tar/twice.png": None,
        "a.tar/twice.png (2)": "the same name as an item before it",
    }


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "a.csv").write_text("name,prompt\na.png,x\n")
    with pytest.raises(CacheError, match=r"no column 'file_name' or .*; it has name, prompt"):
        items_of(tmp_path / "a.csv")
    with pytest.raises(CacheError, match=r"no column 'title'; it has name, prompt"):
        items_of(tmp_path / "a.csv", columns=Columns(media="name", caption="title"))


def test_nothing_is_an_error(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photo").symlink_to(tmp_path / "nothing")
    with pytest.raises(CacheError, match="there is no folder or file .*/photo; .* mean .*/photos?"):
        items_of(tmp_path / "photo")
    with pytest.raises(CacheError, match="there is nothing at"):
        items_of(tmp_path / "no_such_folder" / "*.png")
    with pytest.raises(CacheError, match="holds no images"):
        items_of(tmp_path)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"caf\xe9", "not UTF-8"),
        (b"  \n", "the caption is empty"),
        (b"a\0b", "NUL"),
        (b"x" * 50, "has 50 characters, more than 40"),
        (b"x" * 200, "more than 160 bytes"),
    ],
)
def test_unusable_captions_have_a_reason(tmp_path, content, reason):
    write_pictures(tmp_path, 1)
    (tmp_path / "0000.txt").write_bytes(content)
    (item,) = items_of(tmp_path)
    with pytest.raises(BadExample, match=reason):
        annotation_of(item, max_caption=40)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no JSON object"),
        ('{"caption": 5}', "must be text, got int"),
        ('{"caption": "\\ud800"}', "not UTF-8"),
        ('{"caption": "x", "flow": "fast"}', "flow must be a number"),
        ('{"caption": "x", "flow": -1}', "at least 0"),
    ],
)
def test_unusable_json_has_a_reason(tmp_path, content, reason):
    write_pictures(tmp_path, 1)
    (tmp_path / "0000.txt").unlink()
    (tmp_path / "0000.json").write_text(content)
    (item,) = items_of(tmp_path)
    with pytest.raises(BadExample, match=reason):
        annotation_of(item)


def test_a_missing_caption_is_a_reason_unless_empty_ones_are_wanted(tmp_path):
    write_pictures(tmp_path, 1)
    (tmp_path / "0000.txt").unlink()
    (item,) = items_of(tmp_path)
    with pytest.raises(BadExample, match="no caption"):
        annotation_of(item)
    assert annotation_of(item, empty_captions=True).caption == ""


@pytest.mark.parametrize(
    "value, label", [("7", 7), (7.0, 7), (None, None), (1.5, None), ("x", None)]
)
def test_labels_are_whole_numbers(tmp_path, value, label):
    write_pictures(tmp_path, 1)
    (tmp_path / "0000.json").write_text(json.dumps({"label": value}))
    (item,) = items_of(tmp_path)
    if label is None:
        with pytest.raises(BadExample, match="label"):
            annotation_of(item, labels=True)
    else:
        assert annotation_of(item, labels=True).label == label
