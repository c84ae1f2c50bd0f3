"""Encoding of one record: a small, fixed part of the protobuf wire format.

A record is one serialized ``FeatureMap`` of the ``codewithgpu`` record format, version 1::

    message Feature {
      oneof kind {
        bytes s = 1;                  // BYTES and STRING
        float f = 2;                  // FLOAT32
        int64 i = 3;                  // INT64
        FeatureList feature_list = 4;
        FeatureMap feature_map = 5;
      }
    }
    message FeatureList { repeated Feature container = 1; }
    message FeatureMap { map<string, Feature> container = 1; }

A descriptor says which type each feature has: a type name, a list of one descriptor, or a dict of
descriptors. A feature that a record lacks reads as the default of its type.

Source: https://protobuf.dev/programming-guides/encoding
"""

import functools
import math
import operator
import struct
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from diffnext.utils.json_files import FileError

Descriptor: TypeAlias = "str | list[Descriptor] | dict[str, Descriptor]"
Span: TypeAlias = tuple[int, int]  # first byte, one past the last byte

TYPE_NAMES = {
    "bytes": "BYTES",
    "string": "STRING",
    "float": "FLOAT32",
    "float32": "FLOAT32",
    "float64": "FLOAT32",
    "int": "INT64",
    "int32": "INT64",
    "int64": "INT64",
}
DEFAULTS = {"BYTES": b"", "STRING": "", "FLOAT32": 0.0, "INT64": 0}

VARINT = 0
FIXED64 = 1
DELIMITED = 2
FIXED32 = 5
FIXED_SIZES = {FIXED32: 4, FIXED64: 8}  # bytes

STRING_FIELD = 1
FLOAT_FIELD = 2
INTEGER_FIELD = 3
LIST_FIELD = 4
MAP_FIELD = 5
FIELD_NAMES = {
    STRING_FIELD: "bytes",
    FLOAT_FIELD: "a float",
    INTEGER_FIELD: "an integer",
    LIST_FIELD: "a list",
    MAP_FIELD: "a map",
}
WIRE_TYPES = {FLOAT_FIELD: FIXED32, INTEGER_FIELD: VARINT}  # of the others DELIMITED
SCALAR_FIELDS = {
    "BYTES": STRING_FIELD,
    "STRING": STRING_FIELD,
    "FLOAT32": FLOAT_FIELD,
    "INT64": INTEGER_FIELD,
}
MAX_DEPTH = 16  # of lists and maps in each other
MAX_KNOWN = 64  # bytes of a list of integers, such as a shape, that is remembered
CONTAINER_FIELD = 1
KEY_FIELD = 1
VALUE_FIELD = 2
# A field begins with its number and its wire type.
CONTAINER_KEY = CONTAINER_FIELD << 3 | DELIMITED
KEY_KEY = KEY_FIELD << 3 | DELIMITED
VALUE_KEY = VALUE_FIELD << 3 | DELIMITED
MEMBER_KEYS = {field: field << 3 | WIRE_TYPES.get(field, DELIMITED) for field in FIELD_NAMES}


class RecordError(FileError):
    """A record, or a dataset of records, breaks a rule of the format."""


def normalize_features(features: Mapping[str, Any]) -> dict[str, Descriptor]:
    """Return a descriptor with the type names as they are stored.

    Args:
        features: Feature name to type name (any letter case), list of one type, or nested mapping.

    Returns:
        A new dict; the argument is not changed.

    Raises:
        RecordError: If a type is unknown, a list does not hold exactly one type, or lists and
            maps are nested too deep.
    """
    if not isinstance(features, Mapping):
        raise RecordError(f"features must map names to types, got {features!r}")
    return _normalize_map(features, "", 0)


def _normalize_map(features: Mapping[str, Any], path: str, depth: int) -> dict[str, Descriptor]:
    normalized = {}
    for name, kind in features.items():
        if not isinstance(name, str):
            raise RecordError(f"feature names must be strings, got {name!r}")
        normalized[name] = _normalize_type(kind, _join(path, name), depth + 1)
    return normalized


def _normalize_type(kind: Any, path: str, depth: int) -> Descriptor:
    if depth > MAX_DEPTH:
        raise RecordError(f"feature {path!r}: lists and maps must nest at most {MAX_DEPTH} deep")
    if isinstance(kind, Mapping):
        return _normalize_map(kind, path, depth)
    if isinstance(kind, (list, tuple)):
        if len(kind) != 1:
            raise RecordError(f"feature {path!r}: a list names exactly one type, got {kind!r:.80}")
        return [_normalize_type(kind[0], f"{path}[]", depth + 1)]
    if isinstance(kind, str) and kind.lower() in TYPE_NAMES:
        return TYPE_NAMES[kind.lower()]
    known = ", ".join(TYPE_NAMES)
    raise RecordError(f"feature {path!r}: unknown type {kind!r:.80}; known types are {known}")


def encode_example(example: Mapping[str, Any], features: Mapping[str, Descriptor]) -> bytes:
    """Serialize one example.

    Args:
        example: Feature name to value. Lists, tuples and arrays are list features.
        features: Normalized descriptor.

    Returns:
        The serialized ``FeatureMap``.

    Raises:
        KeyError: If the example and the descriptor have different names.
        TypeError: If a value does not have the declared type.
        RecordError: If an integer does not fit in 64 bits, or a string holds half a character.
    """
    return _encode_map(example, features, "")


def _encode_map(example: Any, features: Mapping[str, Descriptor], path: str) -> bytes:
    if not isinstance(example, Mapping):
        raise _wrong_type(path, "a mapping", example)
    _check_names(example, features, path)
    entries = []
    for name, value in example.items():
        feature = _encode_feature(value, features[name], _join(path, name))
        entry = _delimited(KEY_FIELD, _as_text(name, path)) + _delimited(VALUE_FIELD, feature)
        entries.append(_delimited(CONTAINER_FIELD, entry))
    return b"".join(entries)


def _check_names(example: Mapping[str, Any], features: Mapping[str, Descriptor], path: str) -> None:
    place = f" in {path!r}" if path else ""
    unknown = sorted(str(name) for name in example if name not in features)
    if unknown:
        raise KeyError(f"undeclared features {unknown}{place}; declared are {sorted(features)}")
    missing = sorted(name for name in features if name not in example)
    if missing:
        raise KeyError(f"missing features {missing}{place}; every declared feature needs a value")


def _encode_feature(value: Any, kind: Descriptor, path: str) -> bytes:
    if isinstance(kind, dict):
        entries = _encode_map(value, kind, path)
        return _delimited(MAP_FIELD, entries) if entries else b""
    if isinstance(kind, list):
        items = _encode_list(value, kind[0], path)
        return _delimited(LIST_FIELD, items) if items else b""
    if kind == "BYTES":
        return _delimited(STRING_FIELD, _as_bytes(value, path))
    if kind == "STRING":
        return _delimited(STRING_FIELD, _as_text(value, path))
    if kind == "FLOAT32":
        return _tag(FLOAT_FIELD, FIXED32) + _pack_float(_as_float(value, path))
    return _tag(INTEGER_FIELD, VARINT) + _varint(_as_unsigned(value, path))


def _encode_list(values: Any, kind: Descriptor, path: str) -> bytes:
    is_sequence = isinstance(values, (list, tuple)) or (
        isinstance(values, np.ndarray) and values.ndim > 0
    )
    if not is_sequence:
        raise _wrong_type(path, "a list, a tuple or an array", values)
    items = []
    for i, value in enumerate(values):
        items.append(_delimited(CONTAINER_FIELD, _encode_feature(value, kind, f"{path}[{i}]")))
    return b"".join(items)


def _as_bytes(value: Any, path: str) -> bytes:
    if isinstance(value, np.ndarray):
        return value.tobytes()  # C order, as the readers of arrays expect
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise _wrong_type(path, "bytes or an array", value)


def _as_text(value: Any, path: str) -> bytes:
    if not isinstance(value, str):
        raise _wrong_type(path, "a string", value)
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"feature {path!r} must be Unicode text, got {value!r:.80}") from None


def _as_float(value: Any, path: str) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real):
        raise _wrong_type(path, "a number", value)
    return float(value)


def _pack_float(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # beyond single precision, which stores it as infinity
        return struct.pack("<f", math.copysign(math.inf, value))


def _as_unsigned(value: Any, path: str) -> int:
    """Return an integer as the unsigned number with the same 64 bits."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise _wrong_type(path, "an integer", value) from None
    if not -(2**63) <= integer < 2**63:
        raise RecordError(f"feature {path!r}: {integer} does not fit in 64 bits")
    return integer % 2**64


def _wrong_type(path: str, expected: str, value: Any) -> TypeError:
    place = f"feature {path!r}" if path else "an example"
    return TypeError(f"{place} must be {expected}, got {type(value).__name__} {value!r:.80}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _delimited(field: int, payload: bytes) -> bytes:
    return _tag(field, DELIMITED) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    """Return seven bits per byte, lowest first; the high bit marks that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def decode_example(
    buffer: Any, span: Span, features: Mapping[str, Descriptor], copies: bool = True
) -> dict[str, Any]:
    """Decode the record that lies at ``span`` of ``buffer``.

    Args:
        buffer: Bytes, or a memory map; only the values themselves are copied.
        span: First byte of the record and one past its last byte.
        features: Normalized descriptor.
        copies: Whether values of type ``bytes`` are copied; otherwise they are memory views of the
            buffer, which they keep alive.

    Returns:
        A value for every declared feature; absent ones get the default of their type.

    Raises:
        RecordError: If the bytes are not such a record.
    """
    return _Decoder(buffer, copies).read_map(span, features, "")


class _Decoder:
    """Reads the messages of one buffer.

    Args:
        buffer: Bytes or a memory map.
        copies: See :func:`decode_example`.
    """

    def __init__(self, buffer: Any, copies: bool) -> None:
        self.buffer = buffer
        self.copies = copies

    def read_map(self, span: Span, features: Mapping[str, Descriptor], path: str) -> dict[str, Any]:
        """Decode a FeatureMap."""
        values = {}
        for entry in self._read_repeated(span):
            name, value_span = self._read_entry(entry)
            if name in features:
                place = f"{path}.{name}" if path else name
                values[name] = self._read_feature(value_span, features[name], place)
        return {
            name: values[name] if name in values else _default(kind)
            for name, kind in features.items()
        }

    def _read_entry(self, span: Span) -> tuple[str, Span]:
        name = ""
        position, end = span
        value_span = (end, end)
        while position < end:
            key, start, position = _read_field(self.buffer, position, end)
            if key == KEY_KEY:
                name = self._read_text((start, position))
            elif key == VALUE_KEY:
                value_span = (start, position)
            elif key >> 3 in (KEY_FIELD, VALUE_FIELD):
                raise RecordError(f"map field {key >> 3} has wire type {key & 7}")
        return name, value_span

    def _read_feature(self, span: Span, kind: Descriptor, path: str) -> Any:
        content = self._read_member(span, _field_of(kind), path)
        if content is None:
            return _default(kind)
        if kind == "BYTES":
            return self._read_bytes(content)
        if kind == "STRING":
            return self._read_text(content)
        if kind == "INT64":
            number, _ = _read_varint(self.buffer, *content)
            return number - 2**64 if number >= 2**63 else number
        if kind == "FLOAT32":
            return struct.unpack_from("<f", self.buffer, content[0])[0]
        if isinstance(kind, dict):
            return self.read_map(content, kind, path)
        start, end = content
        if kind == ["INT64"] and end - start <= MAX_KNOWN:
            return list(_read_integers(bytes(self.buffer[start:end]), path))
        return self.read_list(content, kind[0], path)

    def read_list(self, span: Span, kind: Descriptor, path: str) -> list[Any]:
        """Decode a FeatureList."""
        items = self._read_repeated(span)
        return [self._read_feature(item, kind, f"{path}[{i}]") for i, item in enumerate(items)]

    def _read_bytes(self, span: Span) -> bytes | memoryview:
        start, end = span
        if self.copies:
            return bytes(self.buffer[start:end])
        return memoryview(self.buffer)[start:end]

    def _read_member(self, span: Span, expected: int, path: str) -> Span | None:
        """The content of the one member that a Feature holds, None for an empty Feature."""
        member = None
        position, end = span
        while position < end:
            key, start, position = _read_field(self.buffer, position, end)
            if key == MEMBER_KEYS[expected]:
                member = (start, position)
            elif key >> 3 == expected:
                raise RecordError(f"feature {path!r} has wire type {key & 7}")
            elif key >> 3 in FIELD_NAMES:
                raise RecordError(
                    f"feature {path!r} holds {FIELD_NAMES[key >> 3]}, "
                    f"but METADATA declares {FIELD_NAMES[expected]}"
                )
        return member

    def _read_repeated(self, span: Span) -> Iterator[Span]:
        """Yield the items of a FeatureList or the entries of a FeatureMap."""
        position, end = span
        while position < end:
            key, start, position = _read_field(self.buffer, position, end)
            if key == CONTAINER_KEY:
                yield start, position
            elif key >> 3 == CONTAINER_FIELD:
                raise RecordError(f"container item has wire type {key & 7}")

    def _read_text(self, span: Span) -> str:
        try:
            return self.buffer[span[0] : span[1]].decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"text is not UTF-8: {error}") from error


@functools.lru_cache(maxsize=256)
def _read_integers(content: bytes, path: str) -> tuple[int, ...]:
    """Decode a FeatureList of integers, most often the same shape in one record after the other."""
    return tuple(_Decoder(content, copies=True).read_list((0, len(content)), "INT64", path))


def _read_field(buffer: Any, position: int, end: int) -> tuple[int, int, int]:
    """The field at a position: its key (number and wire type), first byte and the one past it."""
    key = buffer[position]
    position += 1
    if key > 0x7F:
        key, position = _read_varint(buffer, position - 1, end)
    wire_type = key & 7
    if wire_type == DELIMITED and position < end and buffer[position] < 0x80:
        size = buffer[position]  # most sizes take one byte, and are read most often
        position += 1
    elif wire_type == DELIMITED:
        size, position = _read_varint(buffer, position, end)
    elif wire_type == VARINT:
        return key, position, _read_varint(buffer, position, end)[1]
    elif wire_type in FIXED_SIZES:
        size = FIXED_SIZES[wire_type]
    else:
        raise RecordError(f"unknown wire type {wire_type}")
    if size > end - position:
        raise RecordError(f"field {key >> 3} needs {size} bytes, {end - position} are left")
    return key, position, position + size


def _read_varint(buffer: Any, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise RecordError("the message ends inside a number")
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value % 2**64, position
    raise RecordError("a number is longer than 10 bytes")


def _field_of(kind: Descriptor) -> int:
    if isinstance(kind, str):
        return SCALAR_FIELDS[kind]
    return LIST_FIELD if isinstance(kind, list) else MAP_FIELD


def _default(kind: Descriptor) -> Any:
    if isinstance(kind, dict):
        return {name: _default(nested) for name, nested in kind.items()}
    if isinstance(kind, list):
        return []
    return DEFAULTS[kind]
