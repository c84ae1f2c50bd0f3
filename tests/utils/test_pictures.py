"""Pictures are opened by their content, in formats that start no other program."""

import io

import pytest
from PIL import Image, features

from diffnext.utils.json_files import FileError
from diffnext.utils.pictures import load_picture, open_picture

PICTURE = Image.effect_noise((16, 8), 50).convert("RGB")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_known_formats_are_read_whatever_their_name_says(tmp_path, name):
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this build of PIL has no AVIF")
    PICTURE.save(tmp_path / "a.txt", format=name)
    assert load_picture(tmp_path / "a.txt").size == (16, 8)


@pytest.mark.parametrize("name", ["EPS", "PDF", "ICO", "TGA", "SGI"])
def test_other_formats_are_refused(tmp_path, name):
    PICTURE.save(tmp_path / "a.png", format=name)
    with pytest.raises(FileError, match=r"a\.png is not a picture in a known format"):
        open_picture(tmp_path / "a.png")


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 8 // 2 - 1)
    PICTURE.save(tmp_path / "a.png")
    with pytest.raises(FileError, match=r"a\.png has too many pixels"):
        open_picture(tmp_path / "a.png")


def test_the_error_of_an_open_file_says_what_is_wrong_alone():
    with pytest.raises(FileError, match="^is not a picture in a known format$"):
        load_picture(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0"))


def test_a_missing_picture_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_picture(tmp_path / "none.png")
