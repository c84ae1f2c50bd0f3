"""Results carry what they were made with."""

import numpy as np
import PIL.Image
import pytest

from diffnext.utils import export_to_image, export_to_video, read_parameters

PARAMETERS = {
    "prompt": 'a "red" star; size=big #1 \\ 50 %\nsecond line, ümläute, 星, 🌟, <b>&amp;',
    "seed": 2147483647,
    "guidance_scale": 2.5,
    "negative_prompt": "",
    "image": None,
}
PIXELS = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".tiff"])
def test_pictures_carry_parameters(tmp_path, suffix):
    path = export_to_image(PIXELS, tmp_path / f"a{suffix}", parameters=PARAMETERS)
    assert read_parameters(path) == PARAMETERS


def test_parameters_leave_the_picture_as_it_is(tmp_path):
    path = export_to_image(PIXELS, tmp_path / "a.png", parameters=PARAMETERS)
    assert np.array_equal(np.asarray(PIL.Image.open(path)), PIXELS)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".mkv"])
def test_videos_carry_parameters(tmp_path, suffix):
    path = export_to_video([PIXELS] * 3, tmp_path / f"-a b{suffix}", parameters=PARAMETERS)
    assert read_parameters(path) == PARAMETERS


def test_files_without_parameters_are_told(tmp_path):
    picture = export_to_image(PIXELS, tmp_path / "a.webp")
    video = export_to_video([PIXELS] * 2, tmp_path / "a.mp4")
    for path in (picture, video):
        with pytest.raises(ValueError, match="carries no parameters"):
            read_parameters(path)


def test_foreign_descriptions_are_no_parameters(tmp_path):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.ImageDescription] = "my holidays"
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match="carries no parameters"):
        read_parameters(tmp_path / "a.jpg")


def test_what_is_no_picture_or_video_is_told(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match="not a picture or video"):
        read_parameters(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError):
        read_parameters(tmp_path / "none.png")


@pytest.mark.parametrize("value", ["x" * 70_000, float("nan"), object()])
def test_parameters_that_no_file_takes_are_refused(tmp_path, value):
    for export, name, content in (
        (export_to_image, "a.png", PIXELS),
        (export_to_video, "a.mp4", [PIXELS]),
    ):
        with pytest.raises(ValueError):
            export(content, tmp_path / name, parameters={"prompt": value})
        assert not (tmp_path / name).exists()


def test_a_playlist_in_the_place_of_a_video_opens_no_other_file(tmp_path):
    export_to_video([PIXELS] * 2, tmp_path / "other.mp4", parameters=PARAMETERS)
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(ValueError, match="not a picture or video"):
        read_parameters(tmp_path / "a.mp4")
