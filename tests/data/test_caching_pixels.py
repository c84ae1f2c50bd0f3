"""Pixels come out right: kinds of pictures and videos against the colours and sizes they have."""

import io
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffnext.data.caching.colours import BAD_PROFILE, HDR, NO_PROFILE, NO_SPACE
from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.geometry import Crop, plan_crop
from diffnext.data.caching.pictures import read_picture
from diffnext.data.caching.settings import CacheSettings, FrameSampling
from diffnext.data.caching.video_decoding import read_clips
from tests.data import pixel_files as files
from tests.data.pixel_files import encode, png, save, tiff, yuv_frame

av = pytest.importorskip("av")

WIDE, HIGH = (8, 16), (16, 8)
COLOR, GREY = (200, 100, 50), (64, 64, 64)
HALF = (227, 177, 152)  # COLOR at an opacity of 128 on white
WHITE = (255, 255, 255)
KEY = struct.pack(">H", 1)  # a transparent grey


def settings(**changes) -> CacheSettings:
    values = {"kind": "images", "source": "", "output": Path("o"), "vae": Path("v")}
    return CacheSettings(**{**values, "sizes": (WIDE, HIGH), **changes})


def plain(mode, color, **options):
    return save(Image.new(mode, (16, 8), color), options.pop("name", "PNG"), **options)


def half(count):
    """A red half that is seen, and a green half that is hidden."""
    pixels = np.zeros((64, 128, 4), np.uint8)
    pixels[:] = (250, 0, 0, 255)
    pixels[:, 40:] = (0, 250, 0, 0)
    return [pixels] * count


def array(kind, *samples):
    return np.array(samples, kind)


def turned(orientation, name="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(Image.new("RGB", (16, 8), COLOR), name, exif=exif)


def uncalibrated():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 65535
    return save(Image.new("RGB", (16, 8), COLOR), "JPEG", quality=100, exif=exif)


def named(name, primaries, transfer):
    """A picture whose file names these numbers of H.273."""
    file = plain("RGB", COLOR, name=name, quality=100)
    place = file.index(b"colrnclx") + 8
    return file[:place] + struct.pack(">2H", primaries, transfer) + file[place + 4 :]


def profiled(mode, color, profile, name="PNG"):
    return save(Image.new(mode, (16, 8), color), name, icc_profile=profile)


def codestream(mode, color):
    return plain(mode, color, name="JPEG2000", no_jp2=True)


def color_map(bits, scale):
    """A palette of a TIFF whose second entry is COLOR."""
    others = [0] * (2**bits - 2)
    return (3, [level for one in COLOR for level in (9 * scale, one * scale, *others)])


PALETTE = bytes((9, 9, 9, *COLOR))
P3, ADOBE = files.matrix_profile(files.P3, 2.2), files.matrix_profile(files.ADOBE_RGB, 2.2)
U16 = array("u2", *(257 * level for level in COLOR))
PICTURES = {  # file, colour, note
    "jpeg": (plain("RGB", COLOR, name="JPEG", quality=100), COLOR),
    "jpeg grey": (plain("L", 64, name="JPEG"), GREY),
    "png": (plain("RGB", COLOR), COLOR),
    "png 16-bit": (png(2, 16, struct.pack(">3H", *U16)), COLOR),
    "png 16-bit grey": (png(0, 16, struct.pack(">H", 64 * 257)), GREY),
    "png 16-bit grey, transparent": (png(0, 16, KEY, tRNS=KEY), WHITE),
    "png 16-bit grey with alpha": (png(4, 16, struct.pack(">2H", 0, 128 * 257)), (127, 127, 127)),
    "png 16-bit with alpha": (png(6, 16, struct.pack(">4H", *U16, 128 * 257)), HALF),
    "png 4-bit grey": (png(0, 4, b"\x44"), (68, 68, 68)),
    "png 4-bit grey, transparent": (png(0, 4, b"\x11", tRNS=KEY), WHITE),
    "png 2-bit grey, transparent": (png(0, 2, b"\x55", tRNS=KEY), WHITE),
    "png palette": (png(3, 8, b"\1", PLTE=PALETTE), COLOR),
    "png palette, transparent": (png(3, 8, b"\1", PLTE=PALETTE, tRNS=b"\xff\x80"), HALF),
    "png LA": (plain("LA", (0, 128)), (127, 127, 127)),
    "png RGBA": (plain("RGBA", (*COLOR, 128)), HALF),
    "png, gamma 1": (png(2, 8, bytes(COLOR), gAMA=struct.pack(">I", 100000)), COLOR, NO_PROFILE),
    "png, sRGB": (png(2, 8, bytes(COLOR), sRGB=b"\0", gAMA=struct.pack(">I", 100000)), COLOR),
    "png, PQ": (png(2, 8, bytes(COLOR), cICP=bytes([9, 16, 0, 1])), COLOR, HDR),
    "png, P3 by number": (png(2, 8, bytes(COLOR), cICP=bytes([12, 13, 0, 1])), COLOR, NO_PROFILE),
    "avif": (plain("RGB", COLOR, name="AVIF", quality=100), COLOR),
    "avif, PQ": (named("AVIF", 9, 16), COLOR, HDR),
    "avif, P3 by number": (named("AVIF", 12, 13), COLOR, NO_PROFILE),
    "avif with alpha": (plain("RGBA", (*COLOR, 128), name="AVIF", quality=100), HALF),
    "gif, transparent": (save(Image.new("P", (16, 8), 3), "GIF", transparency=3), WHITE),
    "webp with alpha": (plain("RGBA", (*COLOR, 128), name="WEBP", lossless=True, exact=True), HALF),
    "jpeg 2000, 16-bit": (save(Image.new("I;16", (16, 8), 64 * 257), "JPEG2000"), GREY),
    "jpeg 2000 codestream": (codestream("RGB", COLOR), COLOR, NO_SPACE),
    "jpeg 2000 codestream, grey": (codestream("L", 64), GREY),
    "pgm, 12-bit": (b"P5 16 8 4095\n" + struct.pack(">128H", *[1028] * 128), GREY),
    "pfm": (b"Pf\n16 8\n-1.0\n" + struct.pack("<128f", *[0.25] * 128), GREY),
    "bmp": (plain("RGB", COLOR, name="BMP"), COLOR),
    "jpeg, turned": (turned(6), COLOR),
    "tiff": (tiff(array("u1", *COLOR), 2), COLOR),
    "tiff, turned": (tiff(array("u1", *COLOR), 2, t274=(3, [6])), COLOR),
    "tiff, white is zero": (tiff(array("u1", 191), 0), GREY),
    "tiff, 1 bit, white is zero": (tiff(bytes(16), 0, 1), WHITE),
    "tiff, 12-bit": (tiff(bytes([0x40, 0x44, 0x04]) * 64, 1, 12), GREY),
    "tiff, 16-bit": (tiff(array("u2", 64 * 257), 1, 16), GREY),
    "tiff, 16-bit big-endian": (tiff(array("u2", 64 * 257), 1, 16, order=">"), GREY),
    "tiff, 16-bit, white is zero": (tiff(array("u2", 191 * 257), 0, 16), GREY),
    "tiff, 16-bit to 4095": (tiff(array("u2", 1028), 1, 16, t340=(3, [0]), t341=(3, [4095])), GREY),
    "tiff, 16-bit, compressed": (
        plain("I;16", 64 * 257, name="TIFF", compression="tiff_lzw"),
        GREY,
    ),
    "tiff, 32-bit": (tiff(array("u4", 3 * 2**30), 1, 32), (191, 191, 191)),
    "tiff, signed 8-bit": (tiff(array("i1", -64), 1, 8, 2), GREY),
    "tiff, signed 16-bit": (tiff(array("i2", -16384), 1, 16, 2), GREY),
    "tiff, signed 32-bit": (tiff(array("i4", -(2**30)), 1, 32, 2), GREY),
    "tiff, float": (tiff(array("f4", 0.25), 1, 32, 3), GREY),
    "tiff, float, white is zero": (tiff(array("f4", 0.75), 0, 32, 3), GREY),
    "tiff, float of 10 to 50": (
        tiff(array("f4", 20), 1, 32, 3, t340=(11, [10]), t341=(11, [50])),
        GREY,
    ),
    "tiff, 16-bit colours": (tiff(U16, 2, 16), COLOR),
    "tiff, alpha": (tiff(array("u1", *COLOR, 128), 2, t338=(3, [2])), HALF),
    "tiff, premultiplied alpha": (tiff(array("u1", 100, 50, 25, 128), 2, t338=(3, [1])), HALF),
    "tiff, a fourth band": (tiff(array("u1", *COLOR, 128), 2, t338=(3, [0])), COLOR),
    "tiff, palette": (tiff(array("u1", 1), 3, 8, t320=color_map(8, 257)), COLOR),
    "tiff, palette of 8-bit colours": (tiff(array("u1", 1), 3, 8, t320=color_map(8, 1)), COLOR),
    "tiff, 4-bit, palette of 8-bit colours": (
        tiff(b"\x11" * 64, 3, 4, t320=color_map(4, 1)),
        COLOR,
    ),
    "tiff, palette with alpha": (save(Image.new("PA", (16, 8), (0, 128)), "TIFF"), (127, 127, 127)),
    "tiff, YCbCr": (plain("YCbCr", (124, 86, 182), name="TIFF", compression="jpeg"), COLOR),
    "tiff, Lab": (plain("LAB", (148, 128, 128), name="TIFF"), (139, 139, 139)),
    "tiff, Lab with a profile": (
        plain("LAB", (128, 168, 98), name="TIFF", icc_profile=P3),
        (166, 92, 172),
    ),
    "tiff, CMYK": (plain("CMYK", (55, 155, 205, 0), name="TIFF"), COLOR, NO_PROFILE),
    "jpeg, CMYK": (plain("CMYK", (55, 155, 205, 0), name="JPEG", quality=100), COLOR, NO_PROFILE),
    "jpeg, uncalibrated": (uncalibrated(), COLOR, NO_PROFILE),
    "Display P3": (profiled("RGB", COLOR, P3), files.to_srgb(COLOR, files.P3, 2.2)),
    "Adobe RGB": (profiled("RGB", COLOR, ADOBE), files.to_srgb(COLOR, files.ADOBE_RGB, 2.2)),
    "Adobe RGB of grey": (
        profiled("L", 64, ADOBE, "JPEG"),
        files.to_srgb([64] * 3, files.SRGB, 2.2),
    ),
    "grey, gamma 1": (profiled("L", 64, files.grey_profile(1.0)), (137, 137, 137)),
    "grey with alpha, gamma 1": (
        profiled("LA", (64, 128), files.grey_profile(1.0)),
        (196, 196, 196),
    ),
    "CMYK with a profile": (
        profiled("CMYK", (128, 128, 128, 0), files.cmyk_profile(), "JPEG"),
        (118, 118, 118),
    ),
    "a damaged profile": (profiled("RGB", COLOR, P3[:200]), COLOR, BAD_PROFILE),
    "a profile of grey": (profiled("RGB", COLOR, files.grey_profile(1.0)), COLOR, BAD_PROFILE),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_have_the_colour_and_the_size_that_their_files_say(kind):
    file, color, *notes = PICTURES[kind]
    picture = read_picture(io.BytesIO(file), settings())
    assert picture.pixels.shape[:2] == (HIGH if "turned" in kind else WIDE)
    assert picture.notes == tuple(notes)
    np.testing.assert_allclose(picture.pixels.reshape(-1, 3), [color] * 128, atol=2)


UNREADABLE = {
    "float colours": tiff(array("f4", 0.8, 0.4, 0.2), 2, 32, 3),
    "32-bit colours": tiff(array("u4", 1, 2, 3), 2, 32),
    "half floats": tiff(array("f2", 0.5), 1, 16, 3),
    "complex numbers": tiff(bytes(1024), 1, 64, 6),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_tiff_that_pillow_does_not_read_is_told_from_other_files(kind):
    with pytest.raises(BadExample, match="is a TIFF of a kind that Pillow does not read"):
        read_picture(io.BytesIO(UNREADABLE[kind]), settings())


@pytest.mark.parametrize(
    "samples, options, reason",
    [
        (array("f4", 25), {}, "holds values from 25 to 25, but black and white are 0 and 1"),
        (array("f4", np.nan), {}, "holds values from nan"),
        (array("f4", 0), {"t340": (11, [0]), "t341": (11, [0])}, "names 0 as black and 0 as white"),
    ],
)
def test_values_without_a_known_white_are_refused(samples, options, reason):
    with pytest.raises(BadExample, match=reason):
        read_picture(io.BytesIO(tiff(samples, 1, 32, 3, **options)), settings())


@pytest.mark.parametrize(
    "file, reason",
    [
        (
            tiff(array("u2", 1, 2, 3), 2, 16, t340=(3, [0] * 3), t341=(3, [4095] * 3)),
            "16-bit colours from 0 to 4095 cannot be scaled",
        ),
        (
            png(2, 16, struct.pack(">3H", 519, 3, 5), tRNS=struct.pack(">3H", 520, 3, 5)),
            "16-bit colours, one of them transparent, cannot be scaled",
        ),
        (codestream("CMYK", (55, 155, 205, 0)), "JPEG 2000 codestream of four channels"),
        (codestream("RGBA", (*COLOR, 128)), "JPEG 2000 codestream of four channels"),
    ],
)
def test_colours_that_may_mean_several_things_are_refused(file, reason):
    with pytest.raises(BadExample, match=reason):
        read_picture(io.BytesIO(file), settings())


@pytest.mark.parametrize("place", [60, 120, 180])
def test_a_flipped_bit_in_the_colours_of_a_png_is_noticed(place):
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    file = bytearray(save(Image.fromarray(noise), "PNG"))
    file[place] ^= 1
    with pytest.raises(BadExample, match="cannot be decoded: broken PNG file"):
        read_picture(io.BytesIO(bytes(file)), settings())


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "AVIF"])
def test_animations_are_refused(name):
    frames = [Image.new("RGB", (16, 8), (100 * number, 0, 0)) for number in range(3)]
    file = save(frames[0], name, save_all=True, append_images=frames[1:])
    with pytest.raises(BadExample, match="is animated, with 3 frames"):
        read_picture(io.BytesIO(file), settings())


def test_pictures_of_too_many_pixels_are_not_decoded(monkeypatch):
    loaded = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: loaded.append(self))
    with pytest.raises(BadExample, match="is 8x16 pixels, more than 100"):
        read_picture(io.BytesIO(plain("RGB", COLOR)), settings(max_pixels=100))
    assert not loaded


def test_heic_is_read_where_its_plug_in_is_installed():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    picture = read_picture(io.BytesIO(named("HEIF", 12, 13)), settings())
    assert picture.pixels[4, 8].tolist() == pytest.approx(COLOR, abs=2)
    assert picture.notes == (NO_PROFILE,)


def assert_nothing_hidden_is_seen(pixels):
    """Pixels between red and white have as much green as blue."""
    assert np.abs(pixels[..., 1].astype(int) - pixels[..., 2]).max() <= 4
    assert (pixels[..., 0] > 240).all() and pixels.min() < 20 and pixels[..., 1].max() > 250


@pytest.mark.parametrize(
    "name, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]
)
def test_hidden_colours_do_not_bleed_into_the_edges_of_pictures(name, options):
    file = save(Image.fromarray(half(1)[0]), name, **options)
    assert_nothing_hidden_is_seen(read_picture(io.BytesIO(file), settings()).pixels)


def test_orientations_that_mirror_are_applied():
    marked = Image.new("L", (16, 8))
    marked.paste(255, (0, 0, 8, 4))  # at the top left
    places = {2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    for orientation, place in places.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = read_picture(io.BytesIO(save(marked, "PNG", exif=exif)), settings()).pixels
        assert pixels[place].tolist() == [255] * 3, orientation
        assert pixels.shape[:2] == (WIDE if orientation < 5 else HIGH)


def read(path, decoder="pyav", num_frames=3, stride=1, plan=None, **sampling):
    """The clip of a video, at its own size without a plan."""
    plan = plan or (lambda height, width, aspect: Crop((height, width), (height, width), 0, 0))
    with open(path, "rb") as file:
        chosen = FrameSampling(num_frames=num_frames, stride=stride, **sampling)
        return read_clips(file, chosen, plan, decoder)[0]


def pq(nits):
    """Code of a brightness, 0 to 255."""
    power = (nits / 10000) ** (2610 / 16384)
    return 255 * ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def rgba_frames(pixel_format):
    return [
        av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pixel_format)
        for pixels in half(4)
    ]


VIDEOS = {  # frame, options of encode, colour
    "BT.601": (yuv_frame(COLOR), {}, COLOR),
    "BT.709": (yuv_frame(COLOR, 1), {}, COLOR),
    "BT.709, full range": (yuv_frame(COLOR, 1, True), {}, COLOR),
    "BT.601, full range": (yuv_frame(COLOR, 5, True), {}, COLOR),
    "BT.2020 matrix, 10-bit": (yuv_frame(COLOR, 9, False, "yuv420p10le", 10), {}, COLOR),
    "10-bit, 4:2:2": (yuv_frame(COLOR, 1, False, "yuv422p10le", 10), {}, COLOR),
    "4:4:4": (yuv_frame(COLOR, 1, False, "yuv444p"), {}, COLOR),
    "P3": (yuv_frame(COLOR, 1, color_primaries=12, color_trc=1), {}, (226, 100, 15)),
    "BT.2020": (yuv_frame([100] * 3, 9, color_primaries=9, color_trc=14), {}, [100] * 3),
    "PQ, black": (
        yuv_frame([0] * 3, 9, False, "yuv420p10le", 10, color_primaries=9, color_trc=16),
        {},
        [0] * 3,
    ),
    "PQ, 10,000 nits": (
        yuv_frame(WHITE, 9, False, "yuv420p10le", 10, color_primaries=9, color_trc=16),
        {},
        WHITE,
    ),
    "PQ, 100 nits": (
        yuv_frame([pq(100)] * 3, 9, False, "yuv420p10le", 10, color_primaries=9, color_trc=16),
        {},
        [128] * 3,
    ),
    "HLG, white": (
        yuv_frame(WHITE, 9, False, "yuv420p10le", 10, color_primaries=9, color_trc=18),
        {},
        WHITE,
    ),
    "HLG, white of paper": (
        yuv_frame([191] * 3, 9, False, "yuv420p10le", 10, color_primaries=9, color_trc=18),
        {},
        [173] * 3,
    ),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_videos_have_the_colours_that_their_tags_say(tmp_path, kind):
    frame, options, color = VIDEOS[kind]
    encode(tmp_path / "a.mp4", [frame] * 4, **options)
    clip = read(tmp_path / "a.mp4")
    assert clip.shape == (3, 48, 64, 3)
    np.testing.assert_allclose(clip[1, 8:-8, 8:-8].reshape(-1, 3), [color] * 32 * 48, atol=2)


def test_colours_without_a_known_matrix_are_refused(tmp_path):
    frame = yuv_frame(COLOR, pixel_format="yuv444p")
    frame.colorspace = 8  # YCgCo
    encode(tmp_path / "a.mp4", [frame] * 4)
    with pytest.raises(BadExample, match=r"its colours cannot be converted \(matrix 8\)"):
        read(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "aspect, rotation, chosen",
    [(1, 0, (32, 48)), (Fraction(2), 0, (32, 96)), (Fraction(2), 90, (96, 32)), (1, 270, (48, 32))],
)
def test_pixels_that_are_not_square_and_turned_frames_get_the_size_of_what_is_seen(
    tmp_path, aspect, rotation, chosen
):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)

    frame = yuv_frame(COLOR, size=(32, 48))
    encode(tmp_path / "a.mp4", [frame] * 4, prepare=prepare)
    build = settings(kind="videos", sizes=((32, 48), (48, 32), (32, 96), (96, 32)))
    clip = read(tmp_path / "a.mp4", plan=lambda h, w, a: plan_crop(h, w, a, settings=build))
    assert clip.shape[1:3] == chosen


def test_mirrored_videos_are_upright(tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 250
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
    unit = 65536
    matrix = (-unit, 0, 0, 0, unit, 0, 0, 0, 2**30)
    encode(
        tmp_path / "a.mp4", [frame] * 4, prepare=lambda stream: stream.set_display_matrix(matrix)
    )
    clip = read(tmp_path / "a.mp4")
    assert clip[0, :14, 34:].min() > 230
    assert clip[0, 18:].max() < 20 and clip[0, :, :30].max() < 20


ALPHA = {
    "ProRes 4444": ("a.mov", "prores_ks", "yuva444p10le"),
    "Animation": ("a.mov", "qtrle", "argb"),
    "PNG": ("a.mov", "png", "rgba"),
    "FFV1": ("a.mkv", "ffv1", "yuva420p"),
    "VP9": ("a.webm", "libvpx-vp9", "yuva420p"),
}


@pytest.mark.parametrize("kind", ALPHA)
def test_hidden_colours_of_videos_are_not_seen(tmp_path, kind):
    name, codec, pixel_format = ALPHA[kind]
    encode(tmp_path / name, rgba_frames(pixel_format), codec)
    clip = read(tmp_path / name, plan=lambda h, w, a: Crop((16, 32), (16, 32), 0, 0))
    assert clip.shape == (3, 16, 32, 3)
    assert np.abs(clip[..., 1].astype(int) - clip[..., 2]).max() < 24
    assert clip[1, 8, 2].tolist() == pytest.approx([250, 0, 0], abs=8)
    assert clip[1, 8, -2].tolist() == [255] * 3


def test_transparent_palettes_of_videos_are_laid_on_white(tmp_path):
    palette = np.array([[255, 250, 0, 0], [0, 0, 250, 0], *[[255, 9, 9, 9]] * 254], np.uint8)
    indices = np.zeros((64, 128), np.uint8)
    indices[:, 64:] = 1  # ARGB: red, and hidden green
    frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
    encode(tmp_path / "a.mov", [frame] * 4, "png")
    clip = read(tmp_path / "a.mov")
    assert clip[1, 32, 8].tolist() == [250, 0, 0] and clip[1, 32, -8].tolist() == [255] * 3


def test_transparent_gifs_are_laid_on_white(tmp_path):
    frames = [Image.fromarray(pixels) for pixels in half(4)]
    for number, frame in enumerate(frames):
        frame.paste((0, 0, 250, 255), (number, 0, number + 4, 4))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2)
    clip = read(tmp_path / "a.gif")
    assert clip[1, 32, 8].tolist() == pytest.approx([250, 0, 0], abs=8)
    assert clip[1, 32, -8].tolist() == [255] * 3


@pytest.mark.parametrize("path, codec", [("a.mp4", "libx264"), ("a.mpg", "mpeg2video")])
def test_interlaced_videos_become_progressive(tmp_path, path, codec):
    """A bar moves from field to field; its edges must not become combs."""
    frames = []
    for number in range(8):
        pixels = np.full((64, 96, 3), 30, np.uint8)
        for field in (0, 1):
            left = 8 + 4 * (2 * number + field)
            pixels[field::2, left : left + 20] = 220
        frames.append(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p"))
    flags = {"qp": "1", "x264-params": "tff=1"} if codec == "libx264" else {"flags": "+ildct+ilme"}
    encode(tmp_path / path, frames, codec, options=flags)
    clip = read(tmp_path / path, num_frames=8)
    for number, frame in enumerate(clip.astype(int)):
        rows = frame[16:48, :, 0]
        assert np.abs(rows[1:] - rows[:-1]).max() < 60
        (columns,) = np.nonzero(rows[0] > 125)
        assert columns[0] == pytest.approx(8 + 8 * number, abs=5)


def numbered(count):
    """Frames whose brightness shows their number."""
    return [yuv_frame([10 + 6 * number] * 3) for number in range(count)]


def numbers(clip):
    return [round((float(frame.mean()) - 10) / 6) for frame in clip]


GROUPS = {"qp": "1", "g": "10", "bf": "2"}
OPEN = {**GROUPS, "g": "11", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}
MPEG = {"g": "10", "bf": "2", "qmin": "1", "qmax": "2"}
CONTAINERS = {  # codec, format, options, why decord is not used
    "a.mp4": ("libx264", None, GROUPS, None),
    "a.mov": ("libx264", None, GROUPS, None),
    "a.mkv": ("libx264", None, GROUPS, None),
    "a.webm": ("libvpx-vp9", None, {"g": "10", "crf": "10", "b": "0"}, None),
    "a.3gp": ("mpeg4", None, {"g": "10"}, None),
    "open.mp4": ("libx264", None, OPEN, "open groups"),
    "open.mkv": ("libx264", None, OPEN, "open groups"),
    "b.mp4": ("mpeg4", None, MPEG, "open groups"),
    "mpeg2.mkv": ("mpeg2video", None, MPEG, "open groups"),
    "a.avi": ("mpeg4", None, {"g": "10"}, "avi files"),
    "b.avi": ("mpeg4", None, MPEG, "avi files"),
    "h264.avi": ("libx264", None, GROUPS, "avi files"),
    "a.ts": ("libx264", "mpegts", GROUPS, "mpegts files"),
    "mpeg2.ts": ("mpeg2video", "mpegts", MPEG, "mpegts files"),
    "a.mpg": ("mpeg2video", "mpeg", MPEG, "mpeg files"),
    "mpeg1.mpg": ("mpeg1video", "mpeg", MPEG, "mpeg files"),
    "a.wmv": ("wmv2", "asf", {"g": "10"}, "asf files"),
    "a.flv": ("libx264", None, GROUPS, "flv files"),
    "a.h264": ("libx264", "h264", GROUPS, "h264 files"),
}


def write_numbered(folder, name):
    codec, container, options, refused = CONTAINERS[name]
    encode(folder / name, numbered(36), codec, options=options, container=container)
    return folder / name, refused


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_its_frames_in_order(tmp_path, name):
    path, _ = write_numbered(tmp_path, name)
    assert numbers(read(path, num_frames=9, stride=4)) == list(range(0, 36, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTAINERS)
def test_decord_gives_the_same_frames_or_says_why_not(tmp_path, name):
    pytest.importorskip("decord")
    path, refused = write_numbered(tmp_path, name)
    if refused is None:
        clip = read(path, "decord", num_frames=9, stride=4)
        assert np.abs(clip.astype(int) - read(path, num_frames=9, stride=4)).max() < 4
    else:
        with pytest.raises(BadExample, match=f"decord does not read {refused}.*--decoder pyav"):
            read(path, "decord", num_frames=9, stride=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, frame, codec, options, prepare",
    [
        ("turned frames", yuv_frame(COLOR), "libx264", None, lambda s: s.set_display_rotation(90)),
        ("interlaced", yuv_frame(COLOR), "libx264", {"x264-params": "tff=1"}, None),
        (
            "HDR and wide colours",
            yuv_frame(COLOR, 1, color_primaries=12, color_trc=1),
            "libx264",
            None,
            None,
        ),
        ("transparent", rgba_frames("argb")[0], "qtrle", None, None),
        ("frames in RGB", yuv_frame(COLOR).reformat(format="rgb24"), "qtrle", None, None),
        ("AV1", yuv_frame(COLOR, size=(64, 64)), "libsvtav1", None, None),
    ],
)
def test_decord_is_refused_where_its_pixels_would_be_wrong(
    tmp_path, what, frame, codec, options, prepare
):
    pytest.importorskip("decord")
    path = tmp_path / ("a.mp4" if what == "AV1" else "a.mov")
    encode(path, [frame] * 8, codec, options=options, prepare=prepare)
    assert len(read(path)) == 3
    with pytest.raises(BadExample, match=f"decord does not read {what}"):
        read(path, "decord")


def write_damaged(folder, number):
    """A video with a damaged packet."""
    path, _ = write_numbered(folder, "a.mp4")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    for index in range(place + 6, place + size):
        content[index] = (7 * content[index] + 13) % 256
    path.write_bytes(content)
    return path


def test_damaged_frames_are_noticed(tmp_path):
    with pytest.raises(BadExample, match=r"is damaged at frame \d+"):
        read(write_damaged(tmp_path, 10), num_frames=9, stride=4)


@pytest.mark.slow
def test_a_reason_of_decord_does_not_tell_the_time(tmp_path):
    """The same damage has the same reason in every build."""
    pytest.importorskip("decord")
    path = write_damaged(tmp_path, 3)
    with pytest.raises(BadExample, match="^cannot be decoded: Check failed"):
        read(path, "decord", num_frames=9, stride=4)


@pytest.mark.slow
def test_decord_is_refused_for_edit_lists(tmp_path):
    pytest.importorskip("decord")
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    path, _ = write_numbered(tmp_path, "a.mp4")
    cut = tmp_path / "cut.mp4"
    command = [ffmpeg, "-v", "error", "-ss", "0.2", "-i", str(path), "-c", "copy", str(cut)]
    subprocess.run(command, check=True)
    assert numbers(read(cut, num_frames=7, stride=4)) == list(range(5, 33, 4))
    with pytest.raises(BadExample, match="decord does not read edit lists"):
        read(cut, "decord", num_frames=7, stride=4)


def test_a_video_that_changes_its_size_is_refused(tmp_path):
    for name, size in (("a.ts", (48, 64)), ("b.ts", (64, 96))):
        encode(tmp_path / name, [yuv_frame(COLOR, size=size)] * 12, container="mpegts")
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join((tmp_path / name).read_bytes() for name in ("a.ts", "b.ts")))
    assert len(read(tmp_path / "a.ts", num_frames=9)) == 9
    with pytest.raises(BadExample, match="changes its size on the way"):
        read(joined, num_frames=20)
