"""Wheel and source distribution hold what a user needs, and run without the extras."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import check_docs

pytestmark = pytest.mark.slow
ROOT = check_docs.ROOT
SOURCES = (
    *("diffnext", "configs", "accelerate_configs", "scripts", "pyproject.toml", "MANIFEST.in"),
    *("README.md", "TRAINING.md", "CONTRIBUTING.md", "LICENSE"),
)
EXTRAS = (
    *("codewithgpu", "google", "protobuf", "decord", "deepspeed", "peft", "wandb", "tensorboard"),
    *("gradio", "cv2", "opencv", "av", "pandas", "pyarrow", "datasets", "webdataset"),
)
USE = """
import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np

import diffnext.pipelines
import diffnext.data.flex_loaders
import diffnext.engine.train_engine
import diffnext.pipelines.nova.pipeline_train_t2v
from diffnext.data.records import RecordDataset, RecordWriter

for name in ("codewithgpu", "deepspeed", "peft", "wandb", "decord", "gradio"):
    assert importlib.util.find_spec(name) is None, name
print(Path(diffnext.pipelines.__file__).parent)
pipe = diffnext.pipelines.NOVAPipeline.from_pretrained(sys.argv[1])
picture = pipe("a red star", num_inference_steps=2, num_diffusion_steps=2).images[0]
assert picture.size == (64, 64)
folder = tempfile.mkdtemp()
with RecordWriter(folder, {"moments": "bytes", "shape": ["int64"]}) as writer:
    writer.write({"moments": np.zeros((8, 8, 8), np.float16).tobytes(), "shape": (8, 8, 8)})
with RecordDataset(folder) as records:
    assert records[0]["shape"] == [8, 8, 8]
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    pytest.importorskip("build")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
    (archive,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return archive, wheel


def modules(names):
    return {name for name in names if name.startswith("diffnext/") and name.endswith(".py")}


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    own = (path.relative_to(ROOT).as_posix() for path in (ROOT / "diffnext").rglob("*.py"))
    assert modules(names) == set(own)
    data = ("page.css", "page.js", "pictures.txt", "videos.txt")
    assert {"diffnext/py.typed", *(f"diffnext/apps/{name}" for name in data)} <= names
    assert all(re.match(r"diffnext(-[^/]+\.dist-info)?/", name) for name in names)


def test_the_source_distribution_can_train(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"scripts/train.py", "LICENSE", "README.md", "TRAINING.md"} <= names
    for folder in ("configs", "accelerate_configs"):
        own = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.yaml")}
        assert own <= names


def test_the_metadata_is_complete(distributions):
    wheel = zipfile.ZipFile(distributions[1])
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    text = wheel.read(name).decode()
    for field in ("Summary", "License-Expression", "Requires-Python", "Project-URL", "Classifier"):
        assert f"\n{field}: " in text
    assert "Description-Content-Type: text/markdown" in text
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    subprocess.run(command, check=True, capture_output=True)


def test_the_wheel_runs_without_the_extras(distributions, tmp_path):
    """In an environment that has the core's dependencies, and neither extras nor this folder."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = (environment / "lib").glob("python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        is_extra = re.split(r"[-.]", entry.name)[0].lower() in EXTRAS
        is_own = entry.name.startswith(("diffnext", "__editable__")) or entry.suffix == ".pth"
        if not is_extra and not is_own and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    wheel = str(distributions[1])
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, cwd=tmp_path)
    result = subprocess.run(
        [str(python), "-I", "-c", USE, str(ROOT / "assets" / "nova-tiny")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert Path(result.stdout.splitlines()[0]).is_relative_to(environment)
