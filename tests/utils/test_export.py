"""Exported files: what cannot be written is refused, a path is only returned with a file."""

import tempfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import PIL.Image
import pytest

from diffnext.utils import export_to_image, export_to_video

PIXELS = np.zeros((32, 48, 3), np.uint8)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 4)])
def test_grey_coloured_and_transparent_arrays_are_written(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = export_to_image(pixels, tmp_path / "a.PNG")
    assert np.array_equal(np.asarray(PIL.Image.open(path)), pixels)


def test_a_pil_image_is_written_as_it_is(tmp_path):
    path = export_to_image(PIL.Image.fromarray(PIXELS + 7), tmp_path / "a.png")
    assert np.array_equal(np.asarray(PIL.Image.open(path)), PIXELS + 7)


def test_exports_without_a_path_make_new_files(temporary):
    paths = [export_to_image(PIXELS) for _ in range(2)]
    assert {Path(path).parent for path in paths} == {temporary} and paths[0] != paths[1]
    assert all(PIL.Image.open(path).format == "WEBP" for path in paths)


@pytest.mark.parametrize("size", [(48, 50), (33, 47)])
def test_a_video_keeps_its_frames_and_its_rate(tmp_path, size):
    frames = np.stack([np.full((*size, 3), 40 * i, np.uint8) for i in range(5)])
    path = export_to_video(frames, str(tmp_path / "a.mp4"), fps=5)
    read = iio.imread(path)
    assert read.shape == (5, *(length + length % 2 for length in size), 3)
    assert np.abs(read.mean((1, 2, 3)) - frames.mean((1, 2, 3))).max() < 6
    assert iio.immeta(path)["fps"] == 5


@pytest.mark.parametrize(
    "suffix", [".mp4", ".webm", ".MOV", ".mkv", ".avi", ".mpg", ".mpeg", ".wmv"]
)
def test_every_listed_video_format_is_written(tmp_path, suffix):
    path = export_to_video([PIXELS + 200] * 3, tmp_path / f"a{suffix}", fps=25)
    frames = iio.imread(path, plugin="FFMPEG")
    assert frames.shape[1:] == PIXELS.shape and abs(frames.mean() - 200) < 4
    assert suffix != ".webm" or iio.immeta(path, plugin="FFMPEG")["codec"] == "vp9"


def test_a_gif_keeps_its_frames_and_plays_for_ever(tmp_path):
    path = export_to_video([PIXELS, PIXELS + 99, PIXELS + 200], tmp_path / "a.GIF", fps=10)
    with PIL.Image.open(path) as picture:
        assert (picture.format, picture.n_frames, picture.info["loop"]) == ("GIF", 3, 0)
        assert picture.info["duration"] == 100
        picture.seek(2)
        assert np.array_equal(picture.convert("RGB"), PIXELS + 200)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 16)])
def test_small_and_odd_frames_are_written(tmp_path, size, suffix):
    frames = [np.zeros((*size, 3), np.uint8)]
    assert Path(export_to_video(frames, tmp_path / f"a{suffix}")).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": PIXELS / 255}, "image must be .* uint8, got .* float64"),
        ({"image": PIXELS.astype(object)}, "image must be .* got .* object"),
        ({"image": "a.png"}, "image must be"),
        ({"image": None}, "image must be"),
        ({"image": PIXELS[None]}, r"image must be \(H, W, 3\) uint8, got \(1, 32, 48, 3\)"),
        ({"image": PIXELS[..., :2]}, "image must be"),
        ({"image": PIXELS[0, :, 0]}, "image must be"),
        ({"image": PIXELS[:0]}, "image must be"),
        ({"quality": 0}, "quality must be a whole number, 1 to 100, got 0"),
        ({"quality": 101}, "quality must be .* got 101"),
        ({"quality": "high"}, "quality must be .* got 'high'"),
        ({"output_image_path": "a.xyz"}, "output_image_path must end in one of .* got .*a.xyz"),
        ({"output_image_path": "a.mp4"}, "output_image_path must end in"),
        ({"output_image_path": "a"}, "output_image_path must end in"),
        ({"output_image_path": ""}, "output_image_path must end in"),
        ({"output_image_path": None, "suffix": ".xyz"}, "suffix must end in .* got '.xyz'"),
        ({"output_image_path": None, "suffix": "webp"}, "suffix must end in .* got 'webp'"),
        ({"output_image_path": None, "suffix": None}, "suffix must end in .* got None"),
    ],
)
def test_what_is_not_an_image_file_is_refused(tmp_path, temporary, arguments, message):
    arguments = {"image": PIXELS, "output_image_path": "a.png", **arguments}
    if arguments["output_image_path"] is not None:
        arguments["output_image_path"] = tmp_path / arguments["output_image_path"]
    with pytest.raises(ValueError, match=message):
        export_to_image(**arguments)
    assert list(tmp_path.iterdir()) == [temporary] and not any(temporary.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps must be a positive number, got 0"),
        ({"fps": -1}, "fps must be a positive number, got -1"),
        ({"fps": float("nan")}, "fps must be a positive number, got nan"),
        ({"fps": float("inf")}, "fps must be a positive number, got inf"),
        ({"fps": None}, "fps must be a positive number, got None"),
        ({"fps": "12"}, "fps must be a positive number, got '12'"),
        ({"video_frames": []}, "video_frames must be at least one frame"),
        ({"video_frames": PIXELS[None][:0]}, "video_frames must be at least one frame"),
        ({"video_frames": "a.mp4"}, "video_frames must be"),
        ({"video_frames": None}, "video_frames must be frames, got NoneType"),
        ({"video_frames": PIXELS[None] / 255}, "video_frames must be .* uint8, got .* float64"),
        ({"video_frames": PIXELS}, r"video_frames must be .* got \(48, 3\) uint8"),
        ({"video_frames": PIXELS[None, None]}, r"video_frames must be .* got \(1, 32, 48, 3\)"),
        ({"video_frames": PIXELS[None, :, :0]}, "video_frames must be"),
        ({"video_frames": [PIXELS, PIXELS[1:]]}, r"video_frames .* one size, got \[\(31, 48\),"),
        ({"output_video_path": "a.png"}, "output_video_path must end in one of .* got .*a.png"),
        ({"output_video_path": "a.ogv"}, r"must end in one of .*'\.gif'.*'\.mp4'.*'\.webm'"),
        ({"output_video_path": ""}, "output_video_path must end in"),
    ],
)
def test_what_is_not_a_video_file_is_refused(tmp_path, arguments, message):
    arguments = {"video_frames": [PIXELS], "output_video_path": "a.mp4", **arguments}
    arguments["output_video_path"] = tmp_path / arguments["output_video_path"]
    with pytest.raises((ValueError, TypeError), match=message):
        export_to_video(**arguments)
    assert not any(tmp_path.iterdir())


EXPORTS = [
    (export_to_image, PIXELS, "output_image_path", "a.png"),
    (export_to_video, [PIXELS], "output_video_path", "a.mp4"),
]


@pytest.mark.parametrize(("export", "content", "name", "file"), EXPORTS)
def test_what_is_not_a_path_is_refused(export, content, name, file):
    for path in (3, True, file.encode(), [file]):
        with pytest.raises(ValueError, match=f"{name} must end in"):
            export(content, path)


@pytest.mark.parametrize(("export", "content", "name", "file"), EXPORTS)
def test_places_that_cannot_be_written_are_told(tmp_path, export, content, name, file):
    with pytest.raises(FileNotFoundError, match=f"{name} cannot be written: .*missing"):
        export(content, tmp_path / "missing" / file)
    (tmp_path / file).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} cannot be written: .*{file}"):
        export(content, tmp_path / file)


def test_no_incomplete_file_stays_behind(tmp_path, temporary):
    transparent = PIL.Image.new("RGBA", (4, 4))
    for path in (tmp_path / "a.jpg", None):
        with pytest.raises(OSError, match="JPEG"):
            export_to_image(transparent, path, suffix=".jpg")
    with pytest.raises(OSError, match="output_video_path was not written: .*a.mp4"):
        export_to_video([PIXELS], tmp_path / "a.mp4", fps=1e-12)  # ffmpeg reads 0
    assert list(tmp_path.iterdir()) == [temporary] and not any(temporary.iterdir())
