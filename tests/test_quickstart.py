"""docs/quickstart.ipynb runs from top to bottom, with a shorter training."""

import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if "ITERATIONS =" in cell.source)
    settings.source = f"ITERATIONS = 2\nIMAGES = 12\nOUTPUT = {str(tmp_path / 'run')!r}"
    shutil.copytree(DOCS / "images", tmp_path / "images")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [x for x in outputs if "image/png" in x.get("data", {})]
    assert len(pictures) == 3
    printed = "".join(x.get("text", "") for x in outputs)
    assert "nuclei, the best scores" in printed and "Results are in" in printed
