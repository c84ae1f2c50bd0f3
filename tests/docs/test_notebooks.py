"""The notebooks run from the first cell to the last; RENEW_NOTEBOOKS=1 keeps their outputs."""

import os
import shutil
from pathlib import Path

import pytest

import check_docs

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((check_docs.ROOT / "docs" / "notebooks").glob("*.ipynb"))


def in_a_copy(notebook: Path, folder: Path) -> Path:
    """A folder where the notebook finds what it finds in the repository."""
    for name in set(check_docs.SOURCES) - {"docs"}:
        (folder / name).symlink_to(check_docs.ROOT / name)
    place = folder / "docs" / "notebooks"
    place.mkdir(parents=True)
    shutil.copy(notebook, place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    for name, value in check_docs.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND")  # of the notebook: pictures in it
    place = in_a_copy(path, tmp_path)
    notebook = nbformat.read(place / path.name, as_version=4)
    resources = {"metadata": {"path": str(place)}}
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources=resources, record_timing=False
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert os.listdir(tmp_path)
    if "RENEW_NOTEBOOKS" in os.environ:
        for cell in code_cells(notebook):  # progress bars and warnings of this machine
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        nbformat.write(notebook, path)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_the_outputs_of_one_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert not [out for out in outputs if out.output_type == "error" or "stderr" in out.values()]
    text = path.read_text()
    assert len(text) < 400_000
    assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text
