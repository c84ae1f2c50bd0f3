"""Fixtures for tests of datasets and loaders."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffnext.data.records import RecordWriter
from tests.data.caching_inputs import save_vae
from tests.data.guide_examples import FEATURES, make_example


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """Folder of an image autoencoder of stride 8 with random weights."""
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a dataset and returns its folder."""

    def write(examples: int | list[dict], features: dict | None = None, **options) -> str:
        folder = tmp_path / f"dataset_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if isinstance(examples, int):
            examples = [make_example(number) for number in range(examples)]
        with RecordWriter(folder, features or FEATURES, **options) as writer:
            for example in examples:
                writer.write(example)
        return str(folder)

    return write
