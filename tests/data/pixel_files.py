"""Files of known colours: TIFF and PNG of any samples, colour profiles, videos of exact planes."""

import contextlib
import io
import math
import os
import struct
import zlib
from fractions import Fraction

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 8, 16

TIFF_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f"}


def save(picture: Image.Image, name: str, **options) -> bytes:
    """The file of a picture in a format of Pillow."""
    file = io.BytesIO()
    picture.save(file, name, **options)
    return file.getvalue()


def tiff(samples, photometric=1, bits=8, sample_format=1, order="<", **tags) -> bytes:
    """A TIFF without compression, every pixel of the same samples.

    Args:
        samples: Of a pixel; an array of the type of the samples, or the bytes of the whole picture.
        photometric: Tag 262.
        bits: Per sample.
        sample_format: 1 unsigned, 2 signed, 3 floating point.
        order: "<" or ">".
        tags: Others, as ``t338=(type, [values])``.
    """
    if isinstance(samples, bytes):
        count, data = 1, samples
    else:
        count = len(samples)
        data = np.tile(samples.astype(samples.dtype.newbyteorder(order)), HEIGHT * WIDTH).tobytes()
    entries = {
        256: (3, [WIDTH]),
        257: (3, [HEIGHT]),
        258: (3, [bits] * count),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [0]),
        277: (3, [count]),
        278: (3, [HEIGHT]),
        279: (4, [len(data)]),
        339: (3, [sample_format] * count),
        **{int(name[1:]): value for name, value in tags.items()},
    }
    packed = {
        tag: struct.pack(f"{order}{len(values)}{TIFF_TYPES[kind]}", *values)
        for tag, (kind, values) in entries.items()
    }
    start = 8 + 2 + 12 * len(entries) + 4
    long_ones = b"".join(value for _, value in sorted(packed.items()) if len(value) > 4)
    packed[273] = struct.pack(f"{order}I", start + len(long_ones))
    folder, place = struct.pack(f"{order}H", len(entries)), start
    for tag, (kind, values) in sorted(entries.items()):
        folder += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(packed[tag]) > 4:
            folder += struct.pack(f"{order}I", place)
            place += len(packed[tag])
        else:
            folder += packed[tag].ljust(4, b"\0")
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(f"{order}HI", 42, 8) + folder + bytes(4) + long_ones + data


def png(color: int, bits: int, pixel: bytes, **chunks: bytes) -> bytes:
    """A PNG whose rows repeat some bytes; chunks come before the pixels."""
    row = (
        b"\0"
        + (pixel * WIDTH)[: math.ceil(WIDTH * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] / 8)]
    )
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color, 0, 0, 0)
    parts = {"IHDR": header, **chunks, "IDAT": zlib.compress(row * HEIGHT), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data))
        + name.encode()
        + data
        + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in parts.items()
    )


P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def matrix_profile(primaries, gamma: float) -> bytes:
    """An ICC profile of RGB: XYZ of its primaries under D50, and one gamma."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)
    tags = {
        name: _xyz(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    return _profile(b"RGB ", b"XYZ ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey."""
    return _profile(
        b"GRAY",
        b"XYZ ",
        {b"kTRC": b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)},
    )


def cmyk_profile() -> bytes:
    """An ICC profile of grey inks: three take a third of the lightness each, black takes all."""
    nodes = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    lightness = (1 - nodes[:, :3].mean(1)) * (1 - nodes[:, 3])
    table = np.stack([255 * lightness, 0 * lightness + 128, 0 * lightness + 128], axis=-1)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel())
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4
    return _profile(
        b"CMYK", b"Lab ", {b"A2B0": lut + table.round().astype(np.uint8).tobytes() + ramp * 3}
    )


def _xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(0.9642, 1, 0.8249), b"cprt": b"text" + bytes(4) + b"none\0\0\0\0", **tags}
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value
    header = struct.pack(
        ">I4sI4s4s4s", start + len(data), b"none", 0x02400000, b"mntr", space, connection
    )
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += _xyz(0.9642, 1, 0.8249)[8:]
    return header.ljust(128, b"\0") + table + data


def to_srgb(color, primaries, gamma: float) -> list[float]:
    """What a colour of another space is in sRGB, by the formulas."""
    linear = (np.array(color) / 255) ** gamma
    light = np.linalg.solve(np.array(SRGB).T, np.array(primaries).T @ linear)
    light = light.clip(0, 1)
    coded = np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * coded).tolist()


MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def yuv_frame(color, matrix=5, full=False, pixel_format="yuv420p", bits=8, size=(48, 64), **tags):
    """A plain frame of PyAV, its planes computed by the formulas of ITU-R BT.601, 709 and 2020.

    Args:
        color: R, G, B, 0 to 255.
        matrix: Number of H.273.
        full: Range.
        pixel_format: Planar YUV without alpha.
        bits: Of it.
        size: (height, width).
        tags: ``color_trc`` and ``color_primaries``.
    """
    import av

    red, blue = MATRICES[matrix]
    r, g, b = (level / 255 for level in color)
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = np.array([(b - y) / (1 - blue), (r - y) / (1 - red)]) / 2
    top = 2**bits - 1 if full else 219 * 2 ** (bits - 8)
    low = 0 if full else 16 * 2 ** (bits - 8)
    span = 2**bits - 1 if full else 224 * 2 ** (bits - 8)
    levels = [low + top * y, *(2 ** (bits - 1) + span * chroma)]
    frame = av.VideoFrame(size[1], size[0], pixel_format)
    for plane, level in zip(frame.planes, levels, strict=True):
        kind = np.uint8 if bits == 8 else np.uint16
        count = plane.buffer_size // np.dtype(kind).itemsize
        plane.update(np.full(count, round(level), kind).tobytes())
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame


@contextlib.contextmanager
def usual_scheduling():
    """SVT-AV1, run as root, gives the calling process real-time priority and leaves it so."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, policy, priority)


def encode(
    path, frames, codec="libx264", rate=25, options=None, container=None, prepare=None
) -> None:
    """Write frames of PyAV as a video.

    Args:
        path: File to write.
        frames: All of one layout; their colours are written to the stream.
        codec: Name of the encoder.
        rate: Frames a second.
        options: Of the encoder.
        container: Name of the format; by default the path tells.
        prepare: Called with the stream before anything is encoded.
    """
    import av

    with usual_scheduling(), av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        first = frames[0]
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, first.format.name
        stream.options = {"qp": "1"} if codec == "libx264" and options is None else options or {}
        for name in ("colorspace", "color_range", "color_trc", "color_primaries"):
            setattr(stream.codec_context, name, getattr(first, name))
        if prepare is not None:
            prepare(stream)
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
