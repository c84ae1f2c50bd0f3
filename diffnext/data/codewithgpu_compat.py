"""Makes ``codewithgpu`` 0.2.8 write and read records with protobuf 4 and later.

The message classes in that package were generated for protobuf 3. Later versions refuse to load
them; the import still succeeds, and then every call fails with "Package <protobuf<4.0.0> is
required". The same classes, built at run time from a descriptor, work with every version.

``install()`` runs when diffnext is imported. It imports neither package itself: it repairs a
``codewithgpu`` that is already there, or else waits for its import. A package whose own classes
load, as with protobuf 3.20, is left as it is.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PACKAGE = "codewithgpu"
MESSAGE_MODULE = "codewithgpu.data.record_pb2"
USER_MODULES = ("codewithgpu.data.record", "codewithgpu.data.dataset")


def install() -> None:
    """Repair ``codewithgpu`` now if it is imported, otherwise as soon as it is."""
    if PACKAGE in sys.modules:
        repair()
    elif not any(isinstance(finder, _RepairingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RepairingFinder())


def repair() -> None:
    """Give an imported ``codewithgpu`` working message classes, if its own did not load."""
    if MESSAGE_MODULE in sys.modules:
        return
    try:
        messages = build_messages()
    except ImportError:
        return  # without protobuf the complaint of the package is right
    sys.modules[MESSAGE_MODULE] = messages
    for name in USER_MODULES:
        if name in sys.modules:
            sys.modules[name].record_pb2 = messages


def build_messages() -> ModuleType:
    """Return a module with the classes Feature, FeatureList and FeatureMap.

    Raises:
        ImportError: If protobuf is not installed.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    description = descriptor_pb2.FileDescriptorProto(**_describe_messages())
    pool = descriptor_pool.DescriptorPool()  # its own, as another pool may hold the same names
    pool.Add(description)
    module = ModuleType(MESSAGE_MODULE)
    for name in ("Feature", "FeatureList", "FeatureMap"):
        descriptor = pool.FindMessageTypeByName(f"{PACKAGE}.{name}")
        if hasattr(message_factory, "GetMessageClass"):
            message_class = message_factory.GetMessageClass(descriptor)
        else:  # protobuf before 4.22
            message_class = message_factory.MessageFactory(pool).GetPrototype(descriptor)
        setattr(module, name, message_class)
    return module


def _describe_messages() -> dict[str, Any]:
    """Return the fields of a FileDescriptorProto; see ``record_format`` for the schema."""
    feature = {
        "name": "Feature",
        "oneof_decl": [{"name": "kind"}],
        "field": [
            _describe_field("s", 1, "TYPE_BYTES", oneof_index=0),
            _describe_field("f", 2, "TYPE_FLOAT", oneof_index=0),
            _describe_field("i", 3, "TYPE_INT64", oneof_index=0),
            _describe_field("feature_list", 4, "FeatureList", oneof_index=0),
            _describe_field("feature_map", 5, "FeatureMap", oneof_index=0),
        ],
    }
    feature_list = {
        "name": "FeatureList",
        "field": [_describe_field("container", 1, "Feature", "LABEL_REPEATED")],
    }
    map_entry = {
        "name": "ContainerEntry",
        "options": {"map_entry": True},
        "field": [
            _describe_field("key", 1, "TYPE_STRING"),
            _describe_field("value", 2, "Feature"),
        ],
    }
    feature_map = {
        "name": "FeatureMap",
        "nested_type": [map_entry],
        "field": [_describe_field("container", 1, "FeatureMap.ContainerEntry", "LABEL_REPEATED")],
    }
    return {
        "name": "diffnext/codewithgpu_record.proto",
        "package": PACKAGE,
        "syntax": "proto3",
        "message_type": [feature, feature_list, feature_map],
    }


def _describe_field(
    name: str, number: int, kind: str, label: str = "LABEL_OPTIONAL", **options: Any
) -> dict[str, Any]:
    if kind.startswith("TYPE_"):
        options["type"] = kind
    else:
        options["type"] = "TYPE_MESSAGE"
        options["type_name"] = f".{PACKAGE}.{kind}"
    return {"name": name, "number": number, "label": label, **options}


class _RepairingFinder(importlib.abc.MetaPathFinder):
    """Finds ``codewithgpu`` the ordinary way, and repairs it once its import is done.

    The submodules take their message classes while the package is imported, so repairing must
    come after that.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_repair(module: ModuleType) -> None:
            execute(module)
            repair()

        spec.loader.exec_module = execute_and_repair
        return spec
