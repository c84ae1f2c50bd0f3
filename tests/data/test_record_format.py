"""The encoding of a record, against reference bytes and the protobuf library."""

import struct

import numpy as np
import pytest

from diffnext.data.record_format import (
    RecordError,
    decode_example,
    encode_example,
    normalize_features,
)

# Written by codewithgpu 0.2.8 with protobuf 3.20.3.
REFERENCE = [
    ({"a": "INT64"}, {"a": -1}, "0a100a0161120b18ffffffffffffffffff01"),
    ({"a": "FLOAT32"}, {"a": 0.1}, "0a0a0a0161120515cdcccc3d"),
    ({"a": "FLOAT32"}, {"a": 5}, "0a0a0a01611205150000a040"),
    ({"a": ["INT64"]}, {"a": [1, 2, 3]}, "0a130a0161120e220c0a0218010a0218020a021803"),
    ({"a": "STRING"}, {"a": "\u00e9"}, "0a090a016112040a02c3a9"),
    ({"a": "BYTES"}, {"a": b""}, "0a070a016112020a00"),
    ({"a": ["INT64"]}, {"a": []}, "0a050a01611200"),
    (
        {"a": {"data": "BYTES", "shape": ["INT64"]}},
        {"a": {"data": b"xx", "shape": [1, 2]}},
        "0a2a0a016112252a230a0c0a046461746112040a0278780a130a057368617065120a22080a0218010a021802",
    ),
]

ALL_TYPES = {
    "flag": "int",
    "score": "float",
    "name": "string",
    "data": "bytes",
    "shape": ["int"],
    "tags": ["string"],
    "rows": [["int"]],
    "cached": {"data": "bytes", "shape": ["int"], "inner": {"scale": "float"}},
    "boxes": [{"label": "int", "corner": ["float"]}],
}
EVERYTHING = {
    "flag": -(2**63),
    "score": -1.5,
    "name": "caf\u00e9 \U0001f600",
    "data": bytes(range(256)),
    "shape": [8, 128, 0, 2**63 - 1, -7],
    "tags": ["", "a"],
    "rows": [[1, 2], [], [300]],
    "cached": {"data": b"", "shape": [], "inner": {"scale": 0.25}},
    "boxes": [{"label": 1, "corner": [0.5, 2.0]}, {"label": 0, "corner": []}],
}


# The schema of the format, from which protobuf makes the classes that test ours.
SCHEMA = """
name: "record.proto" package: "codewithgpu" syntax: "proto3"
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "s" number: 1 label: LABEL_OPTIONAL oneof_index: 0 type: TYPE_BYTES }
  field { name: "f" number: 2 label: LABEL_OPTIONAL oneof_index: 0 type: TYPE_FLOAT }
  field { name: "i" number: 3 label: LABEL_OPTIONAL oneof_index: 0 type: TYPE_INT64 }
  field { name: "feature_list" number: 4 label: LABEL_OPTIONAL oneof_index: 0
          type: TYPE_MESSAGE type_name: ".codewithgpu.FeatureList" }
  field { name: "feature_map" number: 5 label: LABEL_OPTIONAL oneof_index: 0
          type: TYPE_MESSAGE type_name: ".codewithgpu.FeatureMap" }
}
message_type {
  name: "FeatureList"
  field { name: "container" number: 1 label: LABEL_REPEATED
          type: TYPE_MESSAGE type_name: ".codewithgpu.Feature" }
}
message_type {
  name: "FeatureMap"
  nested_type {
    name: "ContainerEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL
            type: TYPE_MESSAGE type_name: ".codewithgpu.Feature" }
  }
  field { name: "container" number: 1 label: LABEL_REPEATED
          type: TYPE_MESSAGE type_name: ".codewithgpu.FeatureMap.ContainerEntry" }
}
"""


@pytest.fixture(scope="module")
def messages():
    """Classes by name; skip without protobuf."""
    message_factory = pytest.importorskip("google.protobuf.message_factory")
    from google.protobuf import descriptor_pb2, text_format

    schema = text_format.Parse(SCHEMA, descriptor_pb2.FileDescriptorProto())
    classes = message_factory.GetMessages([schema])
    return {name.removeprefix("codewithgpu."): kind for name, kind in classes.items()}


def decode(record: bytes, features: dict) -> dict:
    return decode_example(record, (0, len(record)), normalize_features(features))


def encode(example: dict, features: dict) -> bytes:
    return encode_example(example, normalize_features(features))


def feature_to_message(messages, value):
    """Build a Feature with the protobuf library."""
    feature = messages["Feature"]()
    if isinstance(value, dict):
        feature.feature_map.SetInParent()
        for name, item in value.items():
            feature.feature_map.container[name].CopyFrom(feature_to_message(messages, item))
    elif isinstance(value, list):
        feature.feature_list.SetInParent()
        feature.feature_list.container.extend(feature_to_message(messages, v) for v in value)
    elif isinstance(value, int):
        feature.i = value
    elif isinstance(value, float):
        feature.f = value
    else:
        feature.s = value.encode() if isinstance(value, str) else value
    return feature


def message_to_feature(feature, example):
    """Read a Feature of the protobuf library, guided by the value expected."""
    if isinstance(example, dict):
        container = feature.feature_map.container
        return {name: message_to_feature(container[name], example[name]) for name in example}
    if isinstance(example, list):
        container = feature.feature_list.container
        assert len(container) == len(example)
        return [message_to_feature(f, e) for f, e in zip(container, example, strict=True)]
    if isinstance(example, int):
        return feature.i
    if isinstance(example, float):
        return feature.f
    return feature.s.decode() if isinstance(example, str) else feature.s


@pytest.mark.parametrize(("features", "example", "encoded"), REFERENCE)
def test_encoding_gives_the_reference_bytes(features, example, encoded):
    assert encode(example, features).hex() == encoded


@pytest.mark.parametrize(("features", "example", "encoded"), REFERENCE)
def test_decoding_reads_the_reference_bytes(features, example, encoded):
    decoded = decode(bytes.fromhex(encoded), features)
    if features["a"] == "FLOAT32":
        assert decoded == {"a": float(np.float32(example["a"]))}
    else:
        assert decoded == example


def test_every_type_survives_a_round_trip():
    assert decode(encode(EVERYTHING, ALL_TYPES), ALL_TYPES) == EVERYTHING


def test_protobuf_reads_what_we_encode(messages):
    message = messages["FeatureMap"]()
    message.ParseFromString(encode(EVERYTHING, ALL_TYPES))
    assert set(message.container) == set(EVERYTHING)
    for name, value in EVERYTHING.items():
        assert message_to_feature(message.container[name], value) == value


def test_we_decode_what_protobuf_writes(messages):
    message = messages["FeatureMap"]()
    for name, value in EVERYTHING.items():
        message.container[name].CopyFrom(feature_to_message(messages, value))
    assert decode(message.SerializeToString(), ALL_TYPES) == EVERYTHING


def test_floats_are_stored_in_single_precision():
    example = {"a": [0.1, 1e300, -1e300]}
    decoded = decode(encode(example, {"a": ["float64"]}), {"a": ["float64"]})
    assert decoded == {"a": [0.10000000149011612, float("inf"), float("-inf")]}


def test_absent_entries_read_as_the_default_of_their_type():
    assert decode(b"", ALL_TYPES) == {
        "flag": 0,
        "score": 0.0,
        "name": "",
        "data": b"",
        "shape": [],
        "tags": [],
        "rows": [],
        "cached": {"data": b"", "shape": [], "inner": {"scale": 0.0}},
        "boxes": [],
    }


def test_undeclared_entries_are_ignored():
    record = encode({"a": 1, "b": 2}, {"a": "int", "b": "int"})
    assert decode(record, {"b": "int"}) == {"b": 2}


def test_a_map_entry_without_a_value_reads_as_the_default():
    assert decode(bytes.fromhex("0a030a0161"), {"a": "int"}) == {"a": 0}


def test_unknown_fields_of_any_wire_type_are_skipped():
    extra = bytes.fromhex("5001") + bytes.fromhex("51") + bytes(8) + bytes.fromhex("5d") + bytes(4)
    assert decode(extra + encode({"a": 3}, {"a": "int"}), {"a": "int"}) == {"a": 3}


def test_numpy_values_are_encoded_like_python_values():
    features = {"i": "int", "f": "float", "b": "bytes", "shape": ["int"], "rows": [["float"]]}
    moments = np.arange(6, dtype=np.float16).reshape(2, 3)
    decoded = decode(
        encode(
            {
                "i": np.int32(-4),
                "f": np.float16(0.5),
                "b": moments.T,
                "shape": np.array(moments.T.shape),
                "rows": np.eye(2),
            },
            features,
        ),
        features,
    )
    assert decoded["i"] == -4
    assert decoded["f"] == 0.5
    assert decoded["shape"] == [3, 2]
    assert decoded["rows"] == [[1.0, 0.0], [0.0, 1.0]]
    restored = np.frombuffer(decoded["b"], np.float16).reshape(decoded["shape"])
    assert np.array_equal(restored, moments.T)


def test_type_names_are_normalized_without_changing_the_argument():
    features = {"a": "Float64", "b": ["INT"], "c": {"d": "bytes"}, "e": ("string",)}
    assert normalize_features(features) == {
        "a": "FLOAT32",
        "b": ["INT64"],
        "c": {"d": "BYTES"},
        "e": ["STRING"],
    }
    assert features == {"a": "Float64", "b": ["INT"], "c": {"d": "bytes"}, "e": ("string",)}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": "flaot"}, "'a': unknown type 'flaot'"),
        ({"a": {"b": ["half"]}}, r"'a.b\[\]': unknown type 'half'"),
        ({"a": []}, "exactly one type"),
        ({"a": ["int", "int"]}, "exactly one type"),
        ({"a": None}, "unknown type None"),
        ({1: "int"}, "names must be strings"),
        (["int"], "must map names to types"),
    ],
)
def test_a_wrong_descriptor_is_refused(features, message):
    with pytest.raises(RecordError, match=message):
        normalize_features(features)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("int", 1.0, "'a' must be an integer, got float 1.0"),
        ("int", "1", "must be an integer"),
        ("float", "1", "must be a number"),
        ("float", np.ones(2), "must be a number"),
        ("string", b"x", "must be a string"),
        ("bytes", "x", "must be bytes"),
        (["int"], 3, "must be a list"),
        (["int"], "34", "must be a list"),
        (["int"], [1, 2.5], r"'a\[1\]' must be an integer"),
        ({"b": "int"}, [1], "must be a mapping"),
        ({"b": "int"}, {"b": None}, "'a.b' must be an integer"),
    ],
)
def test_a_value_of_another_type_is_refused(kind, value, message):
    with pytest.raises(TypeError, match=message):
        encode({"a": value}, {"a": kind})


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("int", 2**63, "'a': 9223372036854775808 does not fit in 64 bits"),
        ("string", "x\udcff", r"'a' must be Unicode text, got 'x\\udcff'"),
        (["string"], ["x", "\ud800"], r"'a\[1\]' must be Unicode text"),
        ({"\ud800": "int"}, {"\ud800": 1}, "'a.*' must be Unicode text"),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused(kind, value, message):
    with pytest.raises(RecordError, match=message):
        encode({"a": value}, {"a": kind})


def test_undeclared_and_missing_names_are_refused():
    with pytest.raises(KeyError, match="captoin.*declared are"):
        encode({"captoin": "x"}, {"caption": "string"})
    with pytest.raises(KeyError, match="missing features.*shape.*in 'a'"):
        encode({"a": {"data": b""}}, {"a": {"data": "bytes", "shape": ["int"]}})


def test_a_value_stored_with_another_type_is_refused():
    record = encode({"a": 1}, {"a": "int"})
    with pytest.raises(RecordError, match="'a' holds an integer, but METADATA declares a float"):
        decode(record, {"a": "float"})


def test_every_truncation_is_refused_or_loses_whole_entries_only():
    features = {"a": "int", "b": "string"}
    record = encode({"a": 300, "b": "text"}, features)
    first_entry = len(encode({"a": 300}, {"a": "int"}))
    for length in range(1, len(record)):
        if length == first_entry:
            assert decode(record[:length], features) == {"a": 300, "b": ""}
            continue
        with pytest.raises(RecordError):
            decode(record[:length], features)


def test_random_bytes_are_refused_or_decoded_but_never_crash():
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        junk = generator.bytes(int(generator.integers(1, 40)))
        try:
            decoded = decode(junk, ALL_TYPES)
        except RecordError:
            refused += 1
        else:
            assert decoded.keys() == ALL_TYPES.keys()
    assert refused > 250


def test_text_that_is_not_utf8_is_refused():
    record = encode({"a": b"\xff"}, {"a": "bytes"})
    with pytest.raises(RecordError, match="not UTF-8"):
        decode(record, {"a": "string"})


def test_a_number_of_more_than_ten_bytes_is_refused():
    with pytest.raises(RecordError, match="10 bytes"):
        decode(b"\x78" + b"\xff" * 11, {"a": "int"})  # field 15


def test_decoding_starts_and_ends_at_the_span():
    record = encode({"a": 7}, {"a": "int"})
    buffer = struct.pack("<q", -1) + record + b"\xff\xff"
    decoded = decode_example(buffer, (8, 8 + len(record)), normalize_features({"a": "int"}))
    assert decoded == {"a": 7}
