"""Looking into datasets, and making others of them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffnext.cli.inspect_cache import main
from diffnext.data.caching.building import build_cache
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.inspection import find_problems, summarize
from diffnext.data.caching.reshaping import merge, reshard, split
from diffnext.data.records import RecordDataset, RecordWriter
from tests.data.caching_inputs import make_settings, save_vae, write_pictures


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A dataset of ten pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    write_pictures(folder / "in", 10)
    save_vae(folder / "vae")
    build_cache(make_settings(folder / "in", folder / "out", folder / "vae"))
    return folder / "out"


def sources(folder):
    with RecordDataset(folder) as dataset:
        return [example["source"] for example in dataset]


def write_dataset(folder, moments, **values):
    folder.mkdir()
    features = {"moments": "bytes", "shape": ["int64"], "caption": "string", "source": "string"}
    with RecordWriter(folder, features) as writer:
        for index, array in enumerate(moments):
            record = {"moments": array, "shape": array.shape, "caption": "x", "source": f"{index}"}
            writer.write({**record, **values})
    return folder


def test_a_summary_counts_what_is_there(built):
    summary = summarize(built)
    assert (summary.entries, summary.shards) == (10, 2)
    assert summary.shapes == {(8, 4, 4): 10}
    assert len(summary.captions) == 10 and min(summary.captions) == 25
    assert summary.manifest.counts.examples == 10


def test_a_whole_dataset_has_no_problems(built):
    assert list(find_problems(built)) == []


def test_damage_is_found(tmp_path):
    good = np.zeros((8, 2, 2), np.float16)
    infinite = good.copy()
    infinite[0, 0, 0] = np.inf
    wide = np.zeros((8, 2, 3), np.float16)
    folder = write_dataset(tmp_path / "a", [good, infinite, wide], source="the same")
    (folder / "manifest.json").write_text('{"counts": {"examples": 4}, "shape": [8, 2, 2]}')
    problems = "\n".join(find_problems(folder))
    for expected in (
        "example 1 (number 1 in",
        "not finite",
        "the same source as example 0: the same",
        "several shapes",
        "the manifest counts 4 examples, METADATA 3",
        "the manifest lists latents of (8, 2, 2)",
    ):
        assert expected in problems


def test_bytes_that_belong_to_no_record_are_found(tmp_path):
    folder = write_dataset(tmp_path / "a", [np.zeros((8, 2, 2), np.float16)] * 2)
    with open(folder / "00000.data", "ab") as file:
        file.write(b"more")
    assert ["its records end at" in problem for problem in find_problems(folder)] == [True]
    index = (folder / "00000.index").read_text().splitlines()
    offset, length = index[1].split()
    (folder / "00000.index").write_text(f"{index[0]}\n{int(offset) + 1} {length}\n")
    problems = list(find_problems(folder))
    assert any("record 1 begins at" in problem for problem in problems)
    assert any("corrupt" in problem for problem in problems)


def test_a_truncated_dataset_is_found(tmp_path):
    folder = write_dataset(tmp_path / "a", [np.zeros((8, 2, 2), np.float16)] * 2)
    data = (folder / "00000.data").read_bytes()
    (folder / "00000.data").write_bytes(data[:-1])
    (problem,) = find_problems(folder)
    assert "is truncated" in problem


def test_other_shards_hold_the_same_records(built, tmp_path):
    assert reshard(built, tmp_path / "out", 3) == 4
    assert len(list((tmp_path / "out").glob("*.data"))) == 4
    with RecordDataset(built) as a, RecordDataset(tmp_path / "out") as b:
        assert [a.record(i) for i in range(10)] == [b.record(i) for i in range(10)]
    assert list(find_problems(tmp_path / "out")) == []


def test_the_parts_of_a_split_are_the_whole(built, tmp_path):
    assert split(built, [tmp_path / "a", tmp_path / "b"], 0.3, seed=1) == (3, 7)
    first, second = sources(tmp_path / "a"), sources(tmp_path / "b")
    assert sorted(first + second) == sources(built)
    assert first == sorted(first) and second == sorted(second)
    assert first != sources(built)[:3]  # drawn by lot
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert sources(tmp_path / "c") == first + second
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["counts"] == {"examples": 10}
    assert manifest["vae_hash"] == summarize(built).manifest.vae_hash
    assert list(find_problems(tmp_path / "c")) == []


def test_datasets_that_do_not_fit_are_not_merged(built, tmp_path):
    other = write_dataset(tmp_path / "other", [np.zeros((8, 4, 4), np.float16)])
    with pytest.raises(CacheError, match="have other features"):
        merge([built, other], tmp_path / "out")
    wide = write_dataset(tmp_path / "wide", [np.zeros((8, 4, 8), np.float16)])
    with pytest.raises(CacheError, match=r"latents of the shapes \[8, 4, 4\] and \[8, 4, 8\]"):
        merge([other, wide], tmp_path / "out")
    reshard(built, tmp_path / "foreign", 10)
    manifest = json.loads((tmp_path / "foreign" / "manifest.json").read_text())
    (tmp_path / "foreign" / "manifest.json").write_text(json.dumps({**manifest, "vae_hash": "0"}))
    with pytest.raises(CacheError, match="differ in vae_hash"):
        merge([built, tmp_path / "foreign"], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("share", [0, 1, 0.01])
def test_a_split_leaves_no_part_empty(built, tmp_path, share):
    with pytest.raises(CacheError, match="share"):
        split(built, [tmp_path / "a", tmp_path / "b"], share)


def test_nothing_is_overwritten(built, tmp_path):
    with pytest.raises(CacheError, match="exists: name a new folder"):
        reshard(built, tmp_path, 3)


def test_the_command_line_shows_checks_and_draws(built, tmp_path, capsys):
    assert main(["show", str(built)]) == 0
    shown = capsys.readouterr().out
    assert "examples  10" in shown and "(8, 4, 4): 10" in shown and "Picture 0. It has" in shown
    assert main(["check", str(built)]) == 0
    assert "no problems" in capsys.readouterr().out
    sheet_path, vae = str(tmp_path / "sheet.png"), str(built.parent / "vae")
    assert main(["sheet", str(built), sheet_path, "--num", "4", "--vae", vae]) == 0
    with Image.open(sheet_path) as sheet:
        assert sheet.width > 4 * 96


@pytest.mark.parametrize(
    "command", [["show"], ["check"], ["sheet", "sheet.png"], ["sheet", "sheet.png", "--vae", "vae"]]
)
def test_the_command_line_says_first_that_there_is_no_dataset(tmp_path, capsys, command):
    name, *options = command
    for folder, message in (
        (tmp_path, f"{tmp_path} is not a dataset: it has no METADATA"),
        (tmp_path / "none", f"there is no folder {tmp_path}/none"),
    ):
        assert main([name, str(folder), *options]) == 1
        assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("advice", ["--update", None])
def test_verifying_names_the_update_if_the_cache_command_built_it(built, tmp_path, capsys, advice):
    shutil.copytree(built, tmp_path / "copy")
    if advice is None:
        (tmp_path / "copy" / "manifest.json").unlink()
    data = tmp_path / "copy" / "00000.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert main(["verify", str(tmp_path / "copy")]) == 1
    assert ("--update" in capsys.readouterr().out) == (advice is not None)


def test_a_sheet_needs_the_autoencoder_of_the_latents(built, tmp_path, capsys):
    other = save_vae(tmp_path / "vae")
    weights = other / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert main(["sheet", str(built), "sheet.png", "--vae", str(other)]) == 1
    assert "made with another autoencoder" in capsys.readouterr().err


def test_a_sheet_does_not_open_the_autoencoder_of_the_manifest_unasked(built, tmp_path, capsys):
    assert main(["sheet", str(built), str(tmp_path / "sheet.png")]) == 1
    vae = built.parent / "vae"
    expected = f"error: name the autoencoder of {built} with --vae: its manifest names {vae}\n"
    assert capsys.readouterr().err == expected


def test_the_command_line_splits_merges_and_reshards(built, tmp_path, capsys):
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert main(["split", str(built), a, b, "--share", "0.5"]) == 0
    assert main(["merge", a, b, "--output", c]) == 0
    assert main(["reshard", c, d, "--shard-size", "4"]) == 0
    assert "3 shards" in capsys.readouterr().out
    bad = write_dataset(tmp_path / "bad", [np.full((8, 2, 2), np.nan, np.float16)])
    assert main(["check", str(bad)]) == 1
