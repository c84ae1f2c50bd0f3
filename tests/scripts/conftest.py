"""A tiny base folder and dataset for the command lines of training."""

import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.engine.conftest import TinyRun, save_base_folder, write_dataset


@pytest.fixture(scope="session")
def base_template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "nova-tiny"
    save_base_folder(folder)
    return folder


@pytest.fixture
def scratch_run(base_template, tmp_path) -> TinyRun:
    """A run whose base folder and dataset may be damaged."""
    base = shutil.copytree(base_template, tmp_path / "base")
    write_dataset(tmp_path / "records")
    return TinyRun(base, tmp_path / "records", tmp_path / "run")


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Each test starts accelerate anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
