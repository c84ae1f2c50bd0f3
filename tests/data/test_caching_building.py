"""Builds: their results, also after kills and with hostile files."""

import json
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.data.caching import building, encoding
from diffnext.data.caching.building import build_cache
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.geometry import nearest_size
from diffnext.data.caching.settings import FrameSampling, parse_size
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.data.records import RecordDataset
from diffnext.models.autoencoders.loading import load_autoencoder
from diffnext.utils.weights_files import hash_weights
from tests.data.caching_inputs import (
    draw_picture,
    make_settings,
    numbered_frames,
    read_files,
    run_with_kills,
    save_video_vae,
    write_pictures,
    write_video,
)


@pytest.fixture(scope="module")
def video_vae(tmp_path_factory):
    return save_video_vae(tmp_path_factory.mktemp("video_vae"))


def read_all(folder):
    with RecordDataset(folder) as dataset:
        return list(dataset)


def skipped_reasons(output):
    lines = (output / "skipped.jsonl").read_text().splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def test_latents_are_those_of_the_guides_loop(tmp_path, vae):
    write_pictures(tmp_path / "in", 3)
    settings = make_settings(
        tmp_path / "in", tmp_path / "out", vae, sizes=((32, 48),), batch_size=1
    )
    build_cache(settings)
    model = load_autoencoder(vae)
    for number, example in enumerate(read_all(tmp_path / "out")):
        picture = np.array(Image.open(tmp_path / "in" / f"{number:04d}.png"))
        x = torch.as_tensor(picture[None].transpose(0, 3, 1, 2)).float()
        with torch.no_grad():
            x = model.encode(x.sub(127.5).div(127.5)).latent_dist.parameters.half().numpy()[0]
        assert example["moments"] == x.tobytes() and example["shape"] == list(x.shape)
        assert example["caption"] == f"Picture {number}. It has a disc."
        assert example["source"] == f"{number:04d}.png"


def test_a_loader_reads_what_is_built(tmp_path, vae):
    write_pictures(tmp_path / "in", 5)
    report = build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))
    assert (report.examples, report.items, report.skipped) == (5, 5, 0)
    with FeatureDataLoader(tmp_path / "out", batch_size=5, num_workers=0) as loader:
        batch = loader.next()[0]
    assert batch["latents"].shape == (5, 8, 4, 4) and "motion_flow" not in batch
    assert len({prompt[:9] for prompt in batch["prompt"]}) == 5
    assert not (tmp_path / "out" / ".building").exists()


def test_the_manifest_tells_what_it_was_made_with(tmp_path, vae):
    write_pictures(tmp_path / "in", 2)
    build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["vae_hash"] == hash_weights(vae)
    assert manifest["vae"]["config"] == json.loads((vae / "config.json").read_text())
    assert manifest["dtype"] == "float16" and manifest["plan"]["dtype"] == "float32"
    assert manifest["size"] == [32, 32] and manifest["shape"] == [8, 4, 4]
    assert manifest["counts"] == {"examples": 2, "items": 2, "skipped": 0}
    assert {"diffnext", "torch", "pillow"} <= set(manifest["versions"])


def test_each_example_goes_to_the_dataset_of_its_aspect(tmp_path, vae):
    (tmp_path / "in").mkdir()
    for name, size in {"wide": (96, 32), "square": (40, 40), "tall": (32, 96)}.items():
        draw_picture(0, *size).save(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    sizes = ((32, 32), (16, 48), (48, 16))
    report = build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae, sizes=sizes))
    assert report.examples == 3
    for folder, name, shape in [
        ("32x32", "square", [8, 4, 4]),
        ("16x48", "wide", [8, 2, 6]),
        ("48x16", "tall", [8, 6, 2]),
    ]:
        (example,) = read_all(tmp_path / "out" / folder)
        assert (example["caption"], example["shape"]) == (name, shape)
        assert (
            json.loads((tmp_path / "out" / folder / "manifest.json").read_text())["shape"] == shape
        )


def test_aspects_are_compared_by_their_ratio():
    assert nearest_size(100, 155, [(64, 64), (64, 144)]) == (64, 144)
    assert nearest_size(155, 100, [(64, 64), (64, 144)]) == (64, 64)


def test_mirrored_copies_follow_unless_the_caption_names_a_side(tmp_path, vae):
    names = write_pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "0001.txt").write_text("a disc to the Left")
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste("red", (0, 0, 16, 32))
    picture.save(tmp_path / "in" / names[0])
    build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae, flip=True))
    examples = read_all(tmp_path / "out")
    assert [e["source"] for e in examples] == ["0000.png", "0000.png#mirrored", "0001.png"]
    assert examples[0]["moments"] != examples[1]["moments"]


def test_labels_take_the_place_of_captions(tmp_path, vae):
    write_pictures(tmp_path / "in", 2)
    for number in range(2):
        (tmp_path / "in" / f"000{number}.cls").write_text(f"{number + 5}\n")
    build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae, labels=True))
    with FeatureDataLoader(tmp_path / "out", batch_size=2, num_workers=0) as loader:
        assert sorted(loader.next()[0]["prompt"]) == [5, 6]


def test_text_states_are_those_that_training_would_make(tmp_path, vae):
    from tests.engine.conftest import save_base_folder

    base = tmp_path / "base"
    save_base_folder(base)
    (tmp_path / "in").mkdir()
    draw_picture(0).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("a red star. blue circle")
    settings = make_settings(
        tmp_path / "in", tmp_path / "out", vae, text_encoder=base, text_length=8
    )
    build_cache(settings)
    (example,) = read_all(tmp_path / "out")
    states = encoding.TextStates(settings.text_encoder, settings).encode(
        ["a red star. blue circle", "a red star."]
    )
    for name, expected in zip(("caption", "text"), states, strict=True):
        assert example[name]["shape"] == list(expected.shape) and expected.shape[1] == 32
        assert example[name]["data"] == expected.tobytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["text_encoder"]["hash"] == hash_weights(base / "text_encoder")


def test_clips_have_a_flow_of_their_own_or_a_measured_one(tmp_path, video_vae):
    pytest.importorskip("av")
    (tmp_path / "in").mkdir()
    for name in ("given", "measured"):
        write_video(tmp_path / "in" / f"{name}.mp4", numbered_frames(12))
        (tmp_path / "in" / f"{name}.json").write_text(
            json.dumps({"caption": name, **({"flow": 7} if name == "given" else {})})
        )
    frames = FrameSampling(num_frames=5, stride=1, clips=2)
    settings = make_settings(
        tmp_path / "in", tmp_path / "out", video_vae, kind="videos", frames=frames
    )
    build_cache(settings)
    examples = read_all(tmp_path / "out")
    names = ["given.mp4#0", "given.mp4#1", "measured.mp4#0", "measured.mp4#1"]
    assert [example["source"] for example in examples] == names
    assert [example["shape"] for example in examples] == [[8, 2, 4, 4]] * 4
    assert [example["flow"] for example in examples[:2]] == [7, 7]
    assert all(0 <= example["flow"] < 1 for example in examples[2:])


def test_several_builds_at_once_write_what_one_writes(tmp_path, vae, monkeypatch):
    write_pictures(tmp_path / "in", 19)
    build_cache(make_settings(tmp_path / "in", tmp_path / "one", vae))
    shared = encoding.load_autoencoder(vae)  # loading is not for several threads at once
    monkeypatch.setattr(encoding, "load_autoencoder", lambda *args: shared)
    settings = make_settings(tmp_path / "in", tmp_path / "three", vae, workers=1)
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda _: build_cache(settings), range(3)))
    assert reports[0] == reports[1] == reports[2]
    assert read_files(tmp_path / "three") == read_files(tmp_path / "one")


# --- kills ----------------------------------------------------------------------------------------


def test_a_build_killed_at_any_change_of_its_files_continues_to_the_same(
    tmp_path, vae, monkeypatch
):
    write_pictures(tmp_path / "in", 13)
    (tmp_path / "in" / "0005.png").write_bytes(b"")
    build_cache(make_settings(tmp_path / "in", tmp_path / "whole", vae, sizes=((32, 32), (32, 64))))
    expected = read_files(tmp_path / "whole")
    shared = encoding.load_autoencoder(vae)
    monkeypatch.setattr(encoding, "load_autoencoder", lambda *args: shared)
    settings = make_settings(
        tmp_path / "in", tmp_path / "killed", vae, sizes=((32, 32), (32, 64)), workers=1
    )
    assert (
        run_with_kills(monkeypatch, partial(build_cache, settings), (building, "make_records")) > 10
    )
    assert read_files(tmp_path / "killed") == expected


def test_the_same_call_again_changes_nothing(tmp_path, vae):
    write_pictures(tmp_path / "in", 3)
    settings = make_settings(tmp_path / "in", tmp_path / "out", vae)
    first = build_cache(settings)
    before = read_files(tmp_path / "out")
    assert build_cache(settings) == first
    assert read_files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": ((32, 48),)}, r"sizes \[\[32, 32\]\] -> \[\[32, 48\]\]"),
        ({"flip": True}, "flip False -> True"),
    ],
)
def test_other_settings_do_not_continue_a_build(tmp_path, vae, change, message):
    write_pictures(tmp_path / "in", 2)
    build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))
    with pytest.raises(CacheError, match=message):
        build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae, **change))


def test_other_settings_do_not_continue_an_unfinished_build(tmp_path, vae):
    write_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "0005.png").write_bytes(b"")
    settings = make_settings(tmp_path / "in", tmp_path / "out", vae, on_error="stop")
    with pytest.raises(CacheError, match="0005"):
        build_cache(settings)
    with pytest.raises(CacheError, match="max_upscale 4.0 -> 2.0"):
        build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae, max_upscale=2.0))


def test_a_folder_with_other_files_is_not_touched(tmp_path, vae):
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty"):
        build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_an_output_that_is_a_file_is_named(tmp_path, vae):
    write_pictures(tmp_path / "in", 1)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match=str(tmp_path / "out")):
        build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))


# --- errors ---------------------------------------------------------------------------------------


def test_wrong_sizes_frames_and_autoencoders_are_refused(tmp_path, vae):
    write_pictures(tmp_path / "in", 1)
    for change, message in [
        ({"sizes": ((30, 32),)}, "sizes must be multiples of 8 pixels"),
        ({"kind": "videos", "format": "media"}, "encodes no videos"),
        ({"vae": tmp_path}, "has no autoencoder"),
        ({"text_encoder": tmp_path}, "has no folder text_encoder"),
    ]:
        if change.get("kind") == "videos":
            (tmp_path / "in" / "a.mp4").write_bytes(b"")
        settings = make_settings(
            tmp_path / "in", tmp_path / "out", change.pop("vae", vae), **change
        )
        with pytest.raises(CacheError, match=message):
            build_cache(settings)
    (tmp_path / "in" / "a.mp4").unlink()
    # Nothing was built with the wrong settings, so right ones may follow.
    assert build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae)).examples == 1


def test_an_illegal_number_of_frames_names_legal_ones(tmp_path, video_vae):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"")
    frames = FrameSampling(num_frames=20)
    with pytest.raises(CacheError, match="the nearest legal number is 17 or 21"):
        build_cache(
            make_settings(
                tmp_path / "in", tmp_path / "out", video_vae, kind="videos", frames=frames
            )
        )


def test_a_bad_file_stops_a_build_that_asks_for_it(tmp_path, vae):
    write_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "0005.png").write_bytes(b"no picture")
    settings = make_settings(tmp_path / "in", tmp_path / "out", vae, on_error="stop")
    with pytest.raises(CacheError, match=r"0005\.png: is not a picture in a known format"):
        build_cache(settings)
    draw_picture(5).save(tmp_path / "in" / "0005.png")
    assert build_cache(settings).examples == 6


def test_nothing_usable_is_an_error_that_points_to_the_reasons(tmp_path, vae):
    write_pictures(tmp_path / "in", 1)
    (tmp_path / "in" / "0000.png").write_bytes(b"")
    with pytest.raises(CacheError, match="none of the 1 items can be used: see .*skipped.jsonl"):
        build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))
    assert len(skipped_reasons(tmp_path / "out")) == 1


def test_latents_beyond_float16_are_left_out(tmp_path, vae, monkeypatch):
    write_pictures(tmp_path / "in", 2)
    encode = encoding.LatentEncoder.encode

    def overflow(self, pixels):
        latents = encode(self, pixels)
        latents[0][0, 0, 0] = np.inf
        return latents

    monkeypatch.setattr(encoding.LatentEncoder, "encode", overflow)
    report = build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))
    assert report.examples == 1
    assert (
        "not finite when they are computed in float32"
        in skipped_reasons(tmp_path / "out")["0000.png"]
    )


@pytest.mark.parametrize("text, size", [("512", (512, 512)), ("480x768", (480, 768))])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "480x", "1x2x3", "-4", "4.5", "²"])
def test_other_sizes_are_refused(text):
    with pytest.raises(CacheError, match="SIDE or HEIGHTxWIDTH"):
        parse_size(text)


# --- hostile files --------------------------------------------------------------------------------


def png_of(width, height):
    """The beginning of a PNG that claims a size."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def save_hostile_pictures(folder):
    """Files of all sorts; returns the reason expected of each, None of those that are fine."""
    fine = draw_picture(1)
    expected = {}

    def add(name, write, reason=None, caption="a caption"):
        write(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
        expected[name] = reason

    def content(data):
        return lambda path: path.write_bytes(data)

    def saved(picture, **options):
        return lambda path: picture.save(path, **options)

    def truncated(picture, kind):
        def write(path):
            picture.save(path, kind)
            path.write_bytes(path.read_bytes()[:-30])

        return write

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    deep = Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40)
    turned = Image.Exif()
    turned[0x0112] = 6
    bad_exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    add("zero.jpg", content(b""), "not a picture")
    add("text.jpg", content(b"<html>not found</html>"), "not a picture")
    add("truncated.jpg", truncated(noise, "JPEG"), "cannot be decoded")
    add("truncated.png", truncated(noise, "PNG"), "cannot be decoded")
    add("head_only.jpg", content(b"\xff\xd8\xff\xe0\x00\x10JFIF"), "")
    add("png_named.jpg", saved(fine, format="PNG"))
    add("jpeg_named.png", saved(fine, format="JPEG"))
    add("cmyk.jpg", saved(fine.convert("CMYK")))
    add("deep.png", saved(deep))
    add("grey_alpha.png", saved(fine.convert("LA")))
    add("palette.png", saved(fine.convert("P"), transparency=0))
    add("one_bit.png", saved(fine.convert("1")))
    add("float.tif", saved(fine.convert("F")), "black and white are 0 and 1")
    add("alpha.webp", saved(fine.convert("RGBA")))
    add("still.gif", saved(fine))
    add(
        "animated.gif",
        saved(fine, save_all=True, append_images=[noise.resize(fine.size)]),
        "animated",
    )
    add(
        "animated.png",
        saved(fine, save_all=True, append_images=[noise.resize(fine.size)]),
        "animated",
    )
    add("bomb.png", content(png_of(60_000, 60_000)), "too many pixels")
    add("large.png", content(png_of(13_000, 13_000)), "more than 134217728")
    add(
        "postscript.jpg",
        content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "not a picture",
    )
    add("one_pixel.png", saved(fine.resize((1, 1))), "more than 4 times")
    add("thin.png", saved(fine.resize((2000, 1))), "more than 4 times")
    add("odd.png", saved(fine.resize((33, 47))))
    add("turned.jpg", saved(fine, exif=turned))
    add("bad_exif.jpg", saved(fine, exif=bad_exif))
    add("empty_caption.png", saved(fine), "caption is empty", caption=" ")
    add("huge_caption.png", saved(fine), "more than", caption="x" * 100_000)
    add("ünïcode 图.png", saved(fine))
    add("no_caption.png", saved(fine), "no caption")
    (folder / "no_caption.txt").unlink()
    add("latin.png", saved(fine), "not UTF-8")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "caption_pipe.png").write_bytes(b"")
    os.mkfifo(folder / "caption_pipe.txt")
    expected["caption_pipe.png"] = "its .txt file: is not a regular file"
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_text("x")
    expected["pipe.jpg"] = "not a regular file"
    for name, target, reason in [
        ("device.jpg", "/dev/zero", "not a regular file"),
        ("dangling.jpg", "nowhere.jpg", "cannot be opened"),
        ("loop.jpg", "loop.jpg", "cannot be opened"),
        ("good_link.png", "odd.png", None),
    ]:
        (folder / name).symlink_to(target)
        (folder / name).with_suffix(".txt").write_text("x")
        expected[name] = reason
    (folder / "folder.jpg").mkdir()
    fine.save(folder / "folder.jpg" / "inside.png")
    (folder / "folder.jpg" / "inside.txt").write_text("x")
    expected["folder.jpg/inside.png"] = None
    (folder / "folder.jpg" / "loop").symlink_to(folder)
    raw = os.fsencode(folder) + b"/raw\xff.png"
    shutil.copy(folder / "odd.png", raw)
    with open(os.fsencode(folder) + b"/raw\xff.txt", "w") as file:
        file.write("x")
    expected["raw\\udcff.png"] = None
    return expected


def test_folders_need_not_have_names_in_utf_8(tmp_path, vae):
    folder = tmp_path / os.fsdecode(b"ph\xffotos")
    write_pictures(folder / "in", 3)
    settings = make_settings(folder / "in", folder / "out", vae)
    assert build_cache(settings).examples == 3
    build_cache(settings)  # which finds the same plan


def test_hostile_pictures_are_left_out_with_a_reason_or_read_right(tmp_path, vae):
    (tmp_path / "in").mkdir()
    expected = save_hostile_pictures(tmp_path / "in")
    assert len(expected) > 35
    before = read_files(tmp_path)
    build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae, shard_size=64))
    reasons = skipped_reasons(tmp_path / "out")
    wanted = {name: reason for name, reason in expected.items() if reason is not None}
    assert set(reasons) == set(wanted)
    for name, reason in wanted.items():
        assert reason in reasons[name], (name, reasons[name])
    fine = {name for name, reason in expected.items() if reason is None}
    assert {example["source"] for example in read_all(tmp_path / "out")} == fine
    after = {
        name: data for name, data in read_files(tmp_path).items() if not name.startswith("out/")
    }
    assert after == before  # nothing is written outside of the output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_left_out(tmp_path, vae):
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "0000.png").chmod(0)
    build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))
    assert "Permission denied" in skipped_reasons(tmp_path / "out")["0000.png"]


def test_hostile_videos_are_left_out_with_a_reason_or_read_right(tmp_path, video_vae):
    av = pytest.importorskip("av")
    folder = tmp_path / "in"
    folder.mkdir()
    frames = numbered_frames(8)
    expected = {}

    def add(name, reason=None):
        (folder / name).with_suffix(".txt").write_text("x")
        expected[name] = reason
        return folder / name

    write_video(add("fine.mp4"), frames)
    write_video(add("odd.mkv"), [frame[:31, :47] for frame in frames])
    write_video(add("short.mp4", "too short: 3 of 5"), frames[:3])
    write_video(add("tiny.mp4", "more than 4 times"), [frame[:4, :4] for frame in frames])
    add("zero.mp4", "cannot be decoded").write_bytes(b"")
    add("text.avi", "cannot be decoded").write_text("no video " * 100)
    whole = (folder / "fine.mp4").read_bytes()
    add("no_index.mp4", "").write_bytes(whole[: len(whole) // 2])
    add("playlist.mp4", "cannot be decoded").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    shutil.copy(folder / "fine.mp4", add("mp4_named.avi"))
    Image.new("RGB", (64, 32)).save(add("still.gif", "too short: 1 of 5"))
    pictures = [Image.fromarray(frame) for frame in numbered_frames(6, 32, 48)]
    pictures[0].save(add("animated.gif"), save_all=True, append_images=pictures[1:], duration=100)
    Image.new("RGB", (64, 32)).save(add("picture.mp4", "cannot be decoded"), "PNG")
    with av.open(str(add("empty.mp4", "")), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.start_encoding()
    damaged = bytearray((folder / "odd.mkv").read_bytes())
    damaged[len(damaged) // 3 : 2 * len(damaged) // 3] = bytes(len(damaged) // 3)
    add("holes.mkv", "").write_bytes(damaged)
    before = read_files(folder)
    settings = make_settings(
        folder,
        tmp_path / "out",
        video_vae,
        kind="videos",
        frames=FrameSampling(num_frames=5, stride=1),
    )
    build_cache(settings)
    reasons = skipped_reasons(tmp_path / "out")
    wanted = {name: reason for name, reason in expected.items() if reason is not None}
    assert set(reasons) == set(wanted)
    for name, reason in wanted.items():
        assert reason in reasons[name], (name, reasons[name])
    assert read_files(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
