"""The codewithgpu package beside diffnext, with the protobuf that is installed or none."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffnext.data.records import RecordDataset, RecordWriter

GUIDE_SNIPPET = """
import codewithgpu
features = {{"moments": "bytes", "caption": "string", "shape": ["int64"], "flow": "float64"}}
writer = codewithgpu.RecordWriter({folder!r}, features)
for _ in range(3):
    writer.write({{"shape": (1, 2), "moments": b"xxxx", "caption": "long", "flow": 5}})
writer.close()
print(codewithgpu.RecordDataset({folder!r})[2])
"""
EXAMPLE = {"moments": b"xxxx", "caption": "long", "shape": [1, 2], "flow": 5.0}


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def codewithgpu():
    """Skip without the package."""
    pytest.importorskip("codewithgpu")


@pytest.mark.parametrize(
    "imports",
    [
        "import codewithgpu, diffnext",
        "import diffnext.data.codewithgpu_compat as compat, codewithgpu; compat.repair()",
        "from codewithgpu import RecordWriter; import diffnext.data.records",
    ],
)
@pytest.mark.parametrize("protobuf", ["pass", "import sys; sys.modules['google.protobuf'] = None"])
def test_the_snippet_of_the_guide_works(codewithgpu, tmp_path, imports, protobuf):
    printed = run_python("\n".join((protobuf, imports, GUIDE_SNIPPET.format(folder=str(tmp_path)))))
    assert printed == str(EXAMPLE)
    assert list(RecordDataset(tmp_path)) == [EXAMPLE] * 3


def test_a_repaired_writer_takes_examples_without_some_features(codewithgpu, tmp_path):
    code = (
        f"import codewithgpu, diffnext\nfeatures = {{'caption': 'string', 'text': 'string'}}\n"
        f"with codewithgpu.RecordWriter({str(tmp_path)!r}, features) as writer:\n"
        "    writer.write({'caption': 'long'})"
    )
    run_python(code)
    assert list(RecordDataset(tmp_path)) == [{"caption": "long", "text": ""}]


def test_codewithgpu_reads_what_we_write(codewithgpu, tmp_path):
    features = {"ids": [["int"]], "cached": {"data": "bytes", "shape": ["int"]}, "flow": "float"}
    example = {
        "ids": [[-1, 2**63 - 1], []],
        "cached": {"data": b"\x00\xff", "shape": [1]},
        "flow": -0.5,
    }
    with RecordWriter(tmp_path, features, max_examples=2) as writer:
        for _ in range(5):
            writer.write(example)
    code = f"import codewithgpu, diffnext; print(codewithgpu.RecordDataset({str(tmp_path)!r})[4])"
    assert run_python(code) == str(example)


def test_importing_diffnext_imports_neither_package():
    names = "('codewithgpu', 'google.protobuf', 'torch', 'numpy')"
    code = f"import diffnext, sys; print([name for name in {names} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_importing_the_record_reader_does_not_import_torch():
    code = "import diffnext.data.records, sys; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def write_fake_codewithgpu(folder: Path, message_module: str) -> None:
    """Make a package with the module that is repaired."""
    data = folder / "codewithgpu" / "data"
    data.mkdir(parents=True)
    (folder / "codewithgpu" / "__init__.py").write_text("from codewithgpu.data import record\n")
    (data / "__init__.py").write_text("")
    (data / "record_pb2.py").write_text(message_module)
    (data / "record.py").write_text("from codewithgpu.data import record_pb2\n")


def test_message_classes_that_load_are_left_alone(tmp_path):
    write_fake_codewithgpu(tmp_path, "FeatureMap = 'its own'")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import codewithgpu, diffnext; "
        "print(codewithgpu.data.record.record_pb2.FeatureMap)"
    )
    assert run_python(code) == "its own"
