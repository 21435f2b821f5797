"""The notebooks run from top to bottom, at a smaller setting."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, text_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        "data=text_files", f"data.train={text_file}", f"paths.cache={cache}", "data.vocab_size=400",
        "data.sequence_length=32", "steps.prune.recovery.max_steps=2", "budget.kind=steps", "budget.value=600",
        "recipes=[none,quant4,prune30]", "runtime.threads=1",
    ]  # fmt: skip
    monkeypatch.setenv("TOUR_OVERRIDES", " ".join(small))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    images = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) >= 2
    assert (tmp_path / "runs/tour/figures").is_dir()


def test_notebooks_are_committed_without_outputs() -> None:
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    assert cells and not any(cell.get("outputs") for cell in cells)
