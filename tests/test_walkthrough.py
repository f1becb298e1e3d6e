"""docs/walkthrough.ipynb runs from top to bottom, and what is committed was executed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs/walkthrough.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_walkthrough_runs_and_was_committed_with_its_outputs(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own packages
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(NOTEBOOK, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs and cell.execution_count for cell in code if "print" in cell.source)
        # The cells hold their own assertions: a failing one raises here.
        NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "a second backward adds:  True" in printed
