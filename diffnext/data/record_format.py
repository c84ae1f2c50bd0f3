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
FIELD_WIRE_TYPES = {
    STRING_FIELD: DELIMITED,
    FLOAT_FIELD: FIXED32,
    INTEGER_FIELD: VARINT,
    LIST_FIELD: DELIMITED,
    MAP_FIELD: DELIMITED,
}
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
# Wire types of the fields of messages.
CONTAINER_WIRE_TYPES = {CONTAINER_FIELD: DELIMITED}
ENTRY_WIRE_TYPES = {KEY_FIELD: DELIMITED, VALUE_FIELD: DELIMITED}


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
        RecordError: If an integer does not fit in 64 bits.
    """
    return _encode_map(example, features, "")


def _encode_map(example: Any, features: Mapping[str, Descriptor], path: str) -> bytes:
    if not isinstance(example, Mapping):
        raise _wrong_type(path, "a mapping", example)
    _check_names(example, features, path)
    entries = []
    for name, value in example.items():
        feature = _encode_feature(value, features[name], _join(path, name))
        entry = _delimited(KEY_FIELD, name.encode()) + _delimited(VALUE_FIELD, feature)
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
        if not isinstance(value, str):
            raise _wrong_type(path, "a string", value)
        return _delimited(STRING_FIELD, value.encode())
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
        values = {name: _default(kind) for name, kind in features.items()}
        for entry in self._read_repeated(span):
            name, value_span = self._read_entry(entry)
            if name in features:
                values[name] = self._read_feature(value_span, features[name], _join(path, name))
        return values

    def read_list(self, span: Span, kind: Descriptor, path: str) -> list[Any]:
        """Decode a FeatureList."""
        items = self._read_repeated(span)
        return [self._read_feature(item, kind, f"{path}[{i}]") for i, item in enumerate(items)]

    def _read_repeated(self, span: Span) -> list[Span]:
        """The items of a FeatureList or the entries of a FeatureMap."""
        found = self._read_fields(span, CONTAINER_WIRE_TYPES)
        return [content for field, content in found if field == CONTAINER_FIELD]

    def _read_entry(self, span: Span) -> tuple[str, Span]:
        name, value_span = "", (span[1], span[1])
        for field, content in self._read_fields(span, ENTRY_WIRE_TYPES):
            if field == KEY_FIELD:
                name = self._read_text(content)
            elif field == VALUE_FIELD:
                value_span = content
        return name, value_span

    def _read_feature(self, span: Span, kind: Descriptor, path: str) -> Any:
        content = self._read_member(span, _field_of(kind), path)
        if content is None:
            return _default(kind)
        start, end = content
        if kind == "BYTES":
            content_bytes = memoryview(self.buffer)[start:end]
            return bytes(content_bytes) if self.copies else content_bytes
        if kind == "STRING":
            return self._read_text(content)
        if kind == "INT64":
            number, _ = _read_varint(self.buffer, start, end)
            return number - 2**64 if number >= 2**63 else number
        if kind == "FLOAT32":
            return struct.unpack_from("<f", self.buffer, start)[0]
        if isinstance(kind, dict):
            return self.read_map(content, kind, path)
        if kind == ["INT64"] and end - start <= MAX_KNOWN:
            return list(_read_integers(bytes(self.buffer[start:end]), path))
        return self.read_list(content, kind[0], path)

    def _read_member(self, span: Span, expected: int, path: str) -> Span | None:
        """The content of the one member that a Feature holds, None for an empty Feature."""
        member = None
        for field, content in self._read_fields(span, FIELD_WIRE_TYPES):
            if field == expected:
                member = content
            elif field in FIELD_NAMES:
                raise RecordError(
                    f"feature {path!r} holds {FIELD_NAMES[field]}, "
                    f"but METADATA declares {FIELD_NAMES[expected]}"
                )
        return member

    def _read_text(self, span: Span) -> str:
        try:
            return bytes(self.buffer[span[0] : span[1]]).decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"text is not UTF-8: {error}") from error

    def _read_fields(self, span: Span, wire_types: Mapping[int, int]) -> Iterator[tuple[int, Span]]:
        """Number and content of each field of a message whose known fields have these types."""
        position, end = span
        while position < end:
            key, start = _read_varint(self.buffer, position, end)
            field, wire_type = key >> 3, key & 7
            if wire_types.get(field, wire_type) != wire_type:
                raise RecordError(f"field {field} has wire type {wire_type}")
            size = FIXED_SIZES.get(wire_type, 0)
            if wire_type == DELIMITED:
                size, start = _read_varint(self.buffer, start, end)
            elif wire_type == VARINT:
                size = _read_varint(self.buffer, start, end)[1] - start
            elif not size:
                raise RecordError(f"unknown wire type {wire_type}")
            position = start + size
            if position > end:
                raise RecordError(f"field {field} needs {size} bytes, {end - start} are left")
            yield field, (start, position)


@functools.lru_cache(maxsize=256)
def _read_integers(content: bytes, path: str) -> tuple[int, ...]:
    """Decode a FeatureList of integers, most often the same shape in one record after the other."""
    return tuple(_Decoder(content, copies=True).read_list((0, len(content)), "INT64", path))


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
