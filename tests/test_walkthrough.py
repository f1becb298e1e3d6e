"""The notebooks in docs/ run from top to bottom, and what is committed was executed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "printed"), [("walkthrough", "a second backward adds:  True"), ("python", "did you mean train.seq_len?")])
def test_a_notebook_runs_and_was_committed_with_its_outputs(name: str, printed: str, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own packages
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(DOCS / f"{name}.ipynb", as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs and cell.execution_count for cell in code if "print" in cell.source)
        # The cells hold their own assertions: a failing one raises here.
        NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed in "".join(output.get("text", "") for cell in code for output in cell.outputs)
