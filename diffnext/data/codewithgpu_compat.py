"""Makes ``codewithgpu`` 0.2.8 write and read records with any version of protobuf, or none.

The message classes in that package were generated for protobuf 3 and do not load with later
versions. The import still succeeds, but then every call fails with "Package <protobuf<4.0.0> is
required". Here the package gets our own encoding and decoding of the same records.

Importing diffnext repairs a ``codewithgpu`` that was imported before. If it is imported later, call
:func:`repair`.
"""

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from diffnext.data.record_format import decode_example, encode_example

MESSAGE_MODULE = "codewithgpu.data.record_pb2"
RECORD_MODULE = "codewithgpu.data.record"
DATASET_MODULE = "codewithgpu.data.dataset"


def repair() -> None:
    """Let an imported ``codewithgpu`` work, if its own message classes did not load."""
    if MESSAGE_MODULE in sys.modules or RECORD_MODULE not in sys.modules:
        return
    record: Any = sys.modules[RECORD_MODULE]
    record.RecordEncoder.encode = staticmethod(_encode)
    record.RecordDecoder.decode = staticmethod(_decode)
    dataset: Any = sys.modules[DATASET_MODULE]
    dataset.record_pb2 = SimpleNamespace(FeatureMap=_Record)


class _Record:
    """One record, with the two methods of a protobuf message that the package calls."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content

    def SerializeToString(self) -> bytes:  # noqa: N802
        return self.content

    def ParseFromString(self, content: bytes) -> None:  # noqa: N802
        self.content = content


def _encode(data: Mapping[str, Any], features: Mapping[str, Any]) -> _Record:
    # Unlike our own writer, the package takes examples without some of the features.
    present = {name: kind for name, kind in features.items() if name in data}
    return _Record(encode_example(data, present))


def _decode(record: _Record, features: Mapping[str, Any]) -> dict[str, Any]:
    return decode_example(record.content, (0, len(record.content)), features)
